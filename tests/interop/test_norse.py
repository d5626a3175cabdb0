"""Neurons of Norse: spikes, potentials and gradients before and after conversion."""

import norse.torch as norse
import torch
from conversions import SHAPE, train_alike
from torch import nn

import asgl_cuda


def test_half_types():
    """The current of LIF and LI is float32 at first, which makes their results float32."""
    x = torch.randn(SHAPE).bfloat16()
    for made in (norse.LIF(), norse.LIFCell(), norse.LI(), norse.IAF()):
        out, converted = made(x)[0], asgl_cuda.convert(made)[0](x)[0]
        assert converted.dtype == out.dtype
        torch.testing.assert_close(converted, out, rtol=2e-2, atol=2e-2)


def test_lifted():
    x = 20 * torch.rand(SHAPE)
    for cell in (norse.LIFCell(), norse.IAFCell()):
        converted, report = asgl_cuda.convert(norse.Lift(cell))
        assert [row.path for row in report.replaced] == ["lifted_module"]
        (ours, our_state), (theirs, their_state) = converted(x), norse.Lift(cell)(x)
        torch.testing.assert_close((ours, *our_state), (theirs, *their_state))


def test_sparse_input():
    x = torch.eye(4) * 20
    converted, _ = asgl_cuda.convert(norse.LIFCell())
    out, _ = converted(x.to_sparse())
    assert out.is_sparse
    assert torch.equal(out.to_dense(), norse.LIFCell()(x)[0])


def stepped(net, x_seq):
    """The outputs of time steps, and the potentials of the last layer."""
    state, out, potentials = None, [], []
    for x in x_seq:
        v, state = net(x, state)
        out.append(v)
        potentials.append(state[-1].v)
    return torch.stack(out), torch.stack(potentials)


def test_nets_train_alike():
    torch.manual_seed(0)
    p = norse.LIFBoxParameters(tau_mem_inv=torch.tensor(400.0))
    model = norse.SequentialState(nn.Linear(8, 10), norse.LIFBoxCell(p), nn.Linear(10, 3), norse.LIFBoxCell(p))
    x_seq = 6 * torch.rand(7, 6, 8)
    train_alike(model, lambda net: sum(stepped(net, x_seq)).mean(0), 2)
