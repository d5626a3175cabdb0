"""Tensors whose memory does not hold their values: torch's negative and conjugate bits, or no memory."""

import pytest
import torch
from comparison import random_input, rng_state, uniform

import asgl_cuda
from asgl_cuda.backends import BACKENDS

PARAMETERS = ("width", "decay", "v_threshold", "v_reset", "reset_amount", "input_gain", "input_bias", "input_mean")


def negated(value):
    """The same values under torch's negative bit."""
    lazy = torch._neg_view(value.detach().neg())
    assert lazy.is_neg()
    assert torch.equal(lazy, value)
    return lazy.requires_grad_(value.requires_grad)


def imaginary(value):
    """The same values as the imaginary part of a conjugate, which has the negative bit; one value is dense."""
    lazy = torch.complex(torch.zeros_like(value), -value.detach()).conj().imag
    assert lazy.is_neg()
    return lazy.requires_grad_(value.requires_grad)


@pytest.fixture(params=["direct", "torch.ops"])
def way(request, backend, monkeypatch):
    """Both ways of calling the operators."""
    if request.param == "torch.ops":
        monkeypatch.setitem(BACKENDS, backend, BACKENDS[backend]._replace(direct=None))
    elif BACKENDS[backend].direct is None:
        pytest.skip("there is one way only")


def copied(value):
    return value.detach().clone().requires_grad_(value.requires_grad)


def assert_equal_with(lazy, function, x_seq, tensors, chosen):
    """Outputs and gradients of function(x_seq, **tensors) are the same with the tensors in `chosen` lazy."""

    def results(changed):
        given = {"x_seq": x_seq, **tensors}.items()
        leaves = {name: (changed if name in chosen else copied)(value) for name, value in given}
        outputs = [each for each in function(**leaves) if each is not None]
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
        if "grads" in chosen:
            grads = [changed(each) for each in grads]
        wanted = [each for each in leaves.values() if each.requires_grad]
        return *outputs, *torch.autograd.grad(outputs, wanted, grads)

    for ours, theirs in zip(results(lazy), results(copied), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lazy", [negated, imaginary])
@pytest.mark.parametrize("chosen", ["x_seq", "v_init", "rng_state", *PARAMETERS, "grads", "analog_prob"])
def test_lif(backend, device, way, lazy, chosen):
    soft = chosen == "reset_amount"

    def function(x_seq, **tensors):
        reset = {"v_reset": None} if soft else {}
        every = {"return_v_last": True, "return_v_seq": True, "return_h_seq": True}
        return asgl_cuda.lif(x_seq, **tensors, **reset, **every, surrogate="triangle", backend=backend)

    names = [name for name in PARAMETERS if name != ("v_reset" if soft else "reset_amount")]
    tensors = {name: uniform(31, low=0.3, high=0.9, device=device) for name in names}
    tensors["v_init"] = uniform(3, 31, low=-1, high=1, device=device)
    tensors["rng_state"] = rng_state(device=device)
    tensors["analog_prob"] = torch.tensor(0.3, device=device)
    if chosen == "rng_state":
        lazy = negated  # integers have no imaginary part
    assert_equal_with(lazy, function, random_input(20, 3, 31, device=device), tensors, {chosen})


@pytest.mark.parametrize("chosen", ["x_seq", "v_init", "decay", "input_gain", "grads"])
def test_integrator(backend, device, way, chosen):
    def function(x_seq, **tensors):
        return asgl_cuda.leaky_integrator(x_seq, **tensors, return_v_last=True, backend=backend)

    tensors = {name: uniform(31, low=0.3, high=0.9, device=device) for name in ("decay", "input_gain")}
    tensors["v_init"] = uniform(3, 31, low=-1, high=1, device=device)
    assert_equal_with(negated, function, random_input(20, 3, 31, device=device), tensors, {chosen})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "chosen", ["x_seq", "v_init", "weight", "bias", "running_mean", "running_var", "width", "grads", "all"]
)
def test_batch_norm(backend, device, way, training, chosen):
    x_seq = random_input(5, 3, 4, 6, device=device)
    tensors = {name: uniform(4, low=0.3, high=0.9, device=device) for name in ("weight", "bias")}
    tensors["width"] = uniform(low=0.3, high=0.9, device=device)
    tensors["v_init"] = uniform(3, 4, 6, low=-1, high=1, device=device)
    for name in ("running_mean", "running_var"):
        tensors[name] = uniform(4, low=0.3, high=0.9, device=device).detach()

    def function(x_seq, running_mean, running_var, **tensors):
        out = asgl_cuda.batch_norm_lif(
            x_seq, running_mean, running_var, **tensors, training=training, return_v_last=True, backend=backend
        )
        statistics.append((running_mean.clone(), running_var.clone()))
        return out

    statistics = []
    every = {"x_seq", *tensors, "grads"} if chosen == "all" else {chosen}
    assert_equal_with(negated, function, x_seq, tensors, every)
    for ours, theirs in zip(*statistics, strict=True):
        assert torch.equal(ours, theirs)


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


def test_complex_values_are_refused(backend, device):
    value = torch.tensor(0.3 - 0.5j, device=device).conj()
    x_seq = random_input(5, 31, device=device)
    for name in ("decay", "width", "v_init"):
        with pytest.raises(TypeError, match=f"{name} must be of a floating type"):
            asgl_cuda.lif(x_seq, **{name: value}, backend=backend)
    with pytest.raises(TypeError, match="x_seq must be float16"):
        asgl_cuda.lif(x_seq * value, backend=backend)


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
