"""Neurons of Norse: spikes, potentials and gradients before and after conversion."""

import norse.torch as norse
import pytest
import torch
from conversions import SHAPE, assert_same, check, norse_run, train_alike
from norse.torch.functional import reset as resets
from torch import nn

import asgl_cuda


def tensors(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


FIRING = tensors(v_th=0.6, v_reset=-0.2)
CURRENT = tensors(tau_syn_inv=300.0, tau_mem_inv=400.0, v_leak=0.1)


@pytest.mark.parametrize("reset", ["value", "subtract"])
@pytest.mark.parametrize("method", ["super", "triangle", "tanh", "heavi_erfc"])
def test_box(method, reset):
    p = norse.LIFBoxParameters(
        **FIRING, **tensors(tau_mem_inv=400.0, v_leak=0.1, alpha=1.7), method=method,
        reset_method=getattr(resets, f"reset_{reset}"),
    )  # fmt: skip
    check(lambda: norse.LIFBoxCell(p), norse_run, threshold=0.6, scale=2.0)


@pytest.mark.parametrize("method", ["super", "triangle"])
@pytest.mark.parametrize("name", ["LIF", "LIFCell", "IAF", "IAFCell"])
def test_neurons(name, method):
    values = (CURRENT if "LIF" in name else {}) | FIRING
    parameters = (norse.LIFParameters if "LIF" in name else norse.IAFParameters)(**values, method=method)

    def make():
        made = getattr(norse, name)(parameters)
        if not name.endswith("Cell"):
            made.record_states = True
        return made

    check(make, norse_run, threshold=0.6, scale=2.0)


def test_by_default():
    check(lambda: norse.LIF(record_states=True), norse_run, scale=12.0)


def test_learned_time_constant():
    """Norse leaves parameters to the user; gradients reach a parameter through the tuple."""
    torch.manual_seed(0)
    tau_mem_inv = torch.tensor(400.0, requires_grad=True)
    cell = norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=tau_mem_inv))
    converted, _ = asgl_cuda.convert(cell, inplace=True)
    x = 2 * torch.randn(SHAPE)
    (ours,) = torch.autograd.grad(norse_run(converted, x)[1].sum(), tau_mem_inv)
    back, _ = asgl_cuda.revert(converted, inplace=True)
    del back.kept
    (theirs,) = torch.autograd.grad(norse_run(back, x)[1].sum(), tau_mem_inv)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["LIF", "LI"])
def test_states_and_learned_time_constants(name):
    """Gradients also flow through states passed on."""
    x = 20 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    tau_syn, tau_mem, leak = (torch.tensor(value, requires_grad=True) for value in (200.0, 100.0, 0.2))
    given = {"tau_syn_inv": tau_syn, "tau_mem_inv": tau_mem, "v_leak": leak}
    made = norse.LIF(norse.LIFParameters(**given)) if name == "LIF" else norse.LI(norse.LIParameters(**given))
    converted, _ = asgl_cuda.convert(made, inplace=False)
    converted.p = made.p  # the copy has its own
    results = []
    for each in (made, converted):
        first, state = each(x[0])
        out, state = each(x[1], state)
        assert type(state).__name__ == {"LIF": "LIFFeedForwardState", "LI": "LIState"}[name]
        total = (out + first).sum() + (state.v * 3 + state.i).sum()
        results.append([first, out, *state, *torch.autograd.grad(total, [tau_syn, tau_mem, leak])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert all(each.any() for each in results[0])


READ_OUTS = {
    "LI": (lambda: norse.LI(), lambda layer, x: [layer(x)[0], *layer(x, layer(x)[1])[1]]),
    "LI, a leak": (lambda: norse.LI(norse.LIParameters(**CURRENT)), lambda layer, x: [layer(x)[0], *layer(x)[1]]),
    "LI, states": (lambda: norse.LI(record_states=True), lambda layer, x: [layer(x)[0], *layer(x)[1]]),
}


@pytest.mark.parametrize("asgl", [None, {}])
@pytest.mark.parametrize("name", READ_OUTS)
def test_read_outs(name, asgl):
    make, call = READ_OUTS[name]
    assert_same(make, call, torch.randn(SHAPE), {"asgl": asgl})


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


@pytest.mark.parametrize("whole", [True, False])
def test_convolutional_nets_train_alike(whole):
    torch.manual_seed(0)
    lift = norse.Lift if whole else (lambda module: module)
    parts = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6 * 16, 3)
    first, second, last = map(lift, parts)
    neurons = [norse.LIF(), norse.IAF(), norse.LI()] if whole else [norse.LIFCell(), norse.IAFCell(), norse.LICell()]
    pool, flat = lift(nn.AvgPool2d(2)), nn.Flatten(2 if whole else 1)
    model = norse.SequentialState(first, neurons[0], pool, second, neurons[1], flat, last, neurons[2])
    x_seq = 20 * torch.rand(9, 6, 1, 8, 8)

    def scores_of(net):
        return 10 * (net(x_seq) if whole else stepped(net, x_seq))[0].mean(0)

    train_alike(model, scores_of, 3 if whole else 2, left=[] if whole else ["LICell"])


def test_nets_train_alike():
    torch.manual_seed(0)
    p = norse.LIFBoxParameters(tau_mem_inv=torch.tensor(400.0))
    model = norse.SequentialState(nn.Linear(8, 10), norse.LIFBoxCell(p), nn.Linear(10, 3), norse.LIFBoxCell(p))
    x_seq = 6 * torch.rand(7, 6, 8)
    train_alike(model, lambda net: sum(stepped(net, x_seq)).mean(0), 2)
