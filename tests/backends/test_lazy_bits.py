"""Tensors whose memory does not hold their values, beside those of test_features.py."""

import pytest
import torch
from comparison import negated, random_input, uniform

import asgl_cuda
from asgl_cuda.backends import BACKENDS


@pytest.fixture(params=["direct", "torch.ops"])
def way(request, backend, monkeypatch):
    """Both ways of calling the operators."""
    if request.param == "torch.ops":
        monkeypatch.setitem(BACKENDS, backend, BACKENDS[backend]._replace(direct=None))
    elif BACKENDS[backend].direct is None:
        pytest.skip("there is one way only")


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_running_statistics_are_changed_where_they_are(backend, device, way, name):
    """The memory beneath the negative bit is changed, not a copy; a batch is counted once."""
    layer = asgl_cuda.BatchNormLIF(4, backend=backend).to(device)
    other = asgl_cuda.BatchNormLIF(4, backend=backend).to(device)
    beneath = getattr(layer, name).neg()
    setattr(layer, name, torch._neg_view(beneath))
    x_seq = torch.randn(5, 3, 4, device=device)
    torch.manual_seed(0)
    layer(x_seq)
    torch.manual_seed(0)
    other(x_seq)
    assert torch.equal(beneath.neg(), getattr(other, name))


def test_zero_tensors(backend, device, way):
    """Tensors without memory."""
    x_seq = random_input(5, 31, device=device)
    zero = torch._efficientzerotensor((31,), device=device)
    out = asgl_cuda.lif(x_seq, input_bias=zero, decay=zero, v_init=zero, return_v_seq=True, backend=backend)
    expected = asgl_cuda.lif(x_seq, decay=0.0, return_v_seq=True, backend=backend)
    assert torch.equal(out.v_seq, expected.v_seq)
    grads = torch._efficientzerotensor(x_seq.shape, device=device), torch.ones_like(x_seq)
    (grad,) = torch.autograd.grad((out.s_seq, out.v_seq), x_seq, grads)
    assert torch.equal(grad, torch.autograd.grad(expected.v_seq, x_seq, grads[1])[0])


def test_under_a_compiler_and_vmap(backend, device):
    torch._dynamo.reset()
    x_seq, decay = random_input(5, 31, device=device).detach(), uniform(low=0.3, high=0.9, device=device).detach()

    def function(x_seq, decay):
        return asgl_cuda.lif(x_seq, decay=decay, return_v_seq=True, backend=backend).v_seq

    expected = function(x_seq, decay)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x_seq, negated(decay)), expected)
    several = torch.func.vmap(function, in_dims=(None, 0))(x_seq, negated(decay.expand(2)))
    assert torch.equal(several, expected.expand(2, 5, 31))
