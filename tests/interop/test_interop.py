"""Layers of other libraries give the same spikes, states and gradients when they are converted."""

import libraries  # noqa: F401
import norse.torch as norse
import pytest
import snntorch
import torch
from converted_layers import SHAPE, check, norse_run
from snntorch import surrogate as snn_surrogate
from snntorch import utils
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

import asgl_cuda
from asgl_cuda.interop import snntorch as interop_snntorch

# ---- SpikingJelly ----


def jelly_run(layer, x_seq):
    """It returns the potential after each step; the potential before reset follows from the equation."""
    before = layer.v
    s = layer(x_seq)
    v = layer.v_seq
    before = torch.full_like(x_seq[0], before) if isinstance(before, float) else before
    previous = torch.cat([before[None], v[:-1]])
    rest = layer.v_reset or 0.0
    share = 0.0 if isinstance(layer, neuron.IFNode) else layer.w.sigmoid() if hasattr(layer, "w") else 1 / layer.tau
    gain = share if getattr(layer, "decay_input", False) else 1.0
    return s, v, (previous - (previous - rest) * share + gain * x_seq).detach()


NODES = {
    "IF": lambda **options: neuron.IFNode(**options),
    "LIF": lambda **options: neuron.LIFNode(tau=2.5, decay_input=False, **options),
    "LIF decay_input": lambda **options: neuron.LIFNode(tau=1.6, decay_input=True, **options),
    "PLIF": lambda **options: neuron.ParametricLIFNode(init_tau=2.5, decay_input=False, **options),
    "PLIF decay_input": lambda **options: neuron.ParametricLIFNode(init_tau=1.6, decay_input=True, **options),
}


@pytest.mark.parametrize(("v_threshold", "v_reset"), [(1.0, 0.0), (0.7, -0.3), (0.8, None)])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("name", NODES)
def test_spikingjelly(name, detach_reset, v_threshold, v_reset):
    def make():
        return NODES[name](
            v_threshold=v_threshold, v_reset=v_reset, detach_reset=detach_reset, step_mode="m", store_v_seq=True
        )

    check(make, jelly_run, threshold=v_threshold)


SURROGATES = (
    surrogate.Sigmoid(4.0), surrogate.ATan(2.0), surrogate.PiecewiseQuadratic(1.5), surrogate.SoftSign(2.0),
    surrogate.SuperSpike(1.5), surrogate.Erf(2.0), surrogate.Rect(1.3), surrogate.Sigmoid(0.5),
)  # fmt: skip


@pytest.mark.parametrize("function", SURROGATES, ids=lambda function: f"{type(function).__name__} {function.alpha}")
def test_surrogates_of_spikingjelly(function):
    check(lambda: neuron.LIFNode(surrogate_function=function, step_mode="m", store_v_seq=True), jelly_run)


def test_spikingjelly_a_step_a_call():
    def run(layer, x_seq):
        s, v, h = zip(*(step(layer, x) for x in x_seq), strict=True)
        return torch.stack(s), torch.stack(v), torch.stack(h)

    def step(layer, x):
        before = layer.v
        s = layer(x)
        return s, layer.v, (before - before / layer.tau + x).detach()

    check(lambda: neuron.LIFNode(decay_input=False, step_mode="s"), run)
    node = neuron.LIFNode(step_mode="s", store_v_seq=True)
    fused, _ = asgl_cuda.convert(node)
    for x in torch.randn(4, 2, 3):
        node(x), fused(x)
    torch.testing.assert_close(fused.v_seq, node.v_seq)


def test_spikingjelly_state():
    """reset_net, detach_net and set_step_mode reach the converted layer; another batch size begins anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), neuron.LIFNode(step_mode="m"))
    fused, _ = asgl_cuda.convert(net)
    x = torch.randn(5, 3, 4)
    first, v = fused(x), fused[1].v
    fused(x)
    assert not torch.equal(fused[1].v, v)
    net(x), net(x)
    torch.testing.assert_close(fused[1].v, net[1].v)
    functional.detach_net(fused)
    assert not fused[1].v.requires_grad
    functional.reset_net(fused)
    assert torch.equal(fused(x), first)
    assert torch.equal(fused(x[:, :2]), net(x[:, :2]))
    functional.set_step_mode(fused, "s")
    functional.reset_net(fused)
    assert torch.equal(torch.stack([fused(each) for each in x]), first)


def test_spikingjelly_in_half_types():
    torch.manual_seed(0)
    node = neuron.LIFNode(step_mode="m")
    fused, _ = asgl_cuda.convert(node)
    x_seq = torch.randn(6, 4, 5).bfloat16()
    for _ in range(2):
        assert fused(x_seq).dtype == torch.bfloat16
        assert (fused(x_seq) != node(x_seq)).float().mean() < 0.1
        functional.reset_net(node), functional.reset_net(fused)


# ---- snnTorch ----


def leaky_run(layer, x_seq):
    """Each call is one step, the layer itself passes states; the potential that comes back is the one before reset."""
    steps = [layer(x) for x in x_seq]
    s = torch.stack([step[0] for step in steps])
    mem = torch.stack([step[1] for step in steps])
    return s, mem, mem.detach()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("reset_delay", [True, False])
@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero", "none"])
def test_snntorch(reset_mechanism, reset_delay, learned):
    def make():
        return snntorch.Leaky(
            beta=0.8, threshold=0.9, reset_mechanism=reset_mechanism, reset_delay=reset_delay, learn_beta=learned,
            learn_threshold=learned,
        )  # fmt: skip

    check(make, leaky_run, threshold=0.9, scale=1.5)


@pytest.mark.parametrize("beta", [1.2, 1.0, 0.0, -0.1])
def test_snntorch_learned_beta_is_clamped(beta):
    def make():
        return snntorch.Leaky(beta=beta, learn_beta=True, reset_mechanism="subtract" if beta > 0.5 else "zero")

    check(make, leaky_run, scale=1.5, dead_parameters=not 0 <= beta <= 1)


def test_snntorch_learned_beta_of_nothing_with_a_reset_by_subtraction():
    """There is no threshold / beta; spikes and potentials are right all the same."""
    layer = snntorch.Leaky(beta=0.0, learn_beta=True)
    fused, _ = asgl_cuda.convert(layer)
    x_seq = 2 * torch.randn(30, 50)
    theirs, ours = leaky_run(layer, x_seq), leaky_run(fused, x_seq)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=0)


SPIKE_GRADS = {
    "default": None, "atan": snn_surrogate.atan(alpha=3.0), "fast_sigmoid": snn_surrogate.fast_sigmoid(slope=5),
    "sigmoid": snn_surrogate.sigmoid(slope=5),
}  # fmt: skip


@pytest.mark.parametrize("name", SPIKE_GRADS)
def test_surrogates_of_snntorch(name):
    check(lambda: snntorch.Leaky(beta=0.8, spike_grad=SPIKE_GRADS[name]), leaky_run)


def test_snntorch_one_beta_a_neuron():
    check(lambda: snntorch.Leaky(beta=torch.linspace(0.3, 0.9, SHAPE[-1]), learn_beta=True), leaky_run)


@pytest.mark.parametrize(("init_hidden", "output"), [(False, False), (True, False), (True, True)])
def test_snntorch_arguments_and_results(init_hidden, output):
    torch.manual_seed(0)
    layer = snntorch.Leaky(beta=0.8, init_hidden=init_hidden, output=output)
    fused, _ = asgl_cuda.convert(layer)
    x, mem = torch.randn(2, 3, 4)
    if init_hidden:
        with pytest.raises(TypeError, match="`mem` should not be passed"):
            fused(x, mem)
        theirs, ours = layer(x), fused(x)
    else:
        theirs, ours = layer(x, mem), fused(x, mem)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(fused.mem, layer.mem)
    assert fused.mem.any()
    assert fused.mem.grad_fn is None
    utils.reset(nn.Sequential(fused))
    assert not fused.mem.any()


@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero"])
@pytest.mark.parametrize("change", ["nothing", "detach", "in place", "threshold", "beta", "another", "no gradient"])
def test_snntorch_between_two_calls(change, reset_mechanism):
    """A memory of a potential holds for that potential alone, as it was."""
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        layer = snntorch.Leaky(beta=0.8, learn_beta=True, reset_mechanism=reset_mechanism)
        layer = asgl_cuda.convert(layer)[0] if convert else layer
        x = torch.randn(2, 300, requires_grad=True)
        _, mem = layer(2 * x[0])
        if change == "detach":
            mem.detach_()
        elif change == "in place":
            mem = mem.detach()
            mem += 0.5
        elif change == "threshold":
            layer.threshold = torch.tensor(0.5)
        elif change == "beta":
            layer.beta = nn.Parameter(torch.tensor(0.4))
        elif change == "another":
            mem = mem.flip(0)
        if change == "no gradient":
            with torch.no_grad():
                _, mem = layer(x[0], mem)
        s, mem = layer(x[1], mem)
        results.append((s.detach(), mem.detach(), *torch.autograd.grad((s + mem).sum(), [x, layer.beta])))
    for ours, theirs in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_snntorch_finds_its_layers():
    """`detach_hidden` and `reset_hidden` go through a list of all layers that were made."""
    layer = snntorch.Leaky(beta=0.5, init_hidden=True)
    fused, _ = asgl_cuda.convert(nn.Sequential(nn.Linear(2, 2), layer))
    fused(torch.randn(3, 2))
    assert fused[1].mem.requires_grad
    snntorch.Leaky.detach_hidden()
    assert not fused[1].mem.requires_grad
    count = len(snntorch.SpikingNeuron.instances)
    asgl_cuda.convert(layer, inplace=True)
    assert len(snntorch.SpikingNeuron.instances) == count


@pytest.mark.parametrize("function", ["convert", "revert", "fuse", "unfuse"])
def test_snntorch_finds_the_layers_of_a_copy(function):
    """Layers that stay as they are have it, too."""

    class Mine(snntorch.Leaky):
        pass

    kept = [Mine(beta=0.5, init_hidden=True), snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True)]
    model = nn.Sequential(nn.BatchNorm1d(2), snntorch.Leaky(beta=0.5, init_hidden=True), *kept)
    if function in ("revert", "unfuse"):
        model, _ = asgl_cuda.fuse(asgl_cuda.convert(model)[0])
    made, _ = getattr(asgl_cuda, function)(model)
    x = 5 + torch.randn(3, 2)
    made(x), model(x)
    layers = [layer for net in (made, model) for layer in net if isinstance(layer, snntorch.SpikingNeuron)]
    utils.reset(made)
    for layer in layers:
        assert not (layer.syn if isinstance(layer, snntorch.Synaptic) else layer.mem).any(), type(layer)


@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("reset_delay", [True, False])
@pytest.mark.parametrize("init_hidden", [True, False])
def test_snntorch_multi_step(init_hidden, reset_delay, reset_mechanism):
    torch.manual_seed(0)
    options = {"reset_mechanism": reset_mechanism, "reset_delay": reset_delay, "learn_beta": True}
    layer = snntorch.Leaky(beta=0.8, init_hidden=init_hidden, output=init_hidden, **options)
    twin = snntorch.Leaky(beta=0.8, init_hidden=init_hidden, output=init_hidden, **options)
    if reset_mechanism == "subtract" and not reset_delay:
        with pytest.raises(ValueError, match="needs reset_delay=True, got False"):
            interop_snntorch.MultiStep(twin)
        return
    multi = interop_snntorch.MultiStep(twin)
    for _ in range(2):
        x_seq = torch.randn(9, 4, 5)
        s, mem, _ = leaky_run(layer, x_seq)
        s_seq, mem_seq = multi(x_seq)
        assert torch.equal(s_seq, s)
        torch.testing.assert_close(mem_seq, mem)
        theirs = torch.autograd.grad((s + mem).sum(), layer.beta, retain_graph=True)
        ours = torch.autograd.grad((s_seq + mem_seq).sum(), twin.beta, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_snntorch_multi_step_of_something_else():
    with pytest.raises(ValueError, match=r"layer must be a Leaky, Lapicque or Synaptic of snnTorch: it is a Linear"):
        interop_snntorch.MultiStep(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"layer must be a Leaky, Lapicque or Synaptic of snnTorch: it quantises its state"
    ):
        interop_snntorch.MultiStep(snntorch.Leaky(beta=0.5, state_quant=lambda mem: mem))
    with pytest.raises(
        TypeError, match=r"snntorch\.MultiStep: layer must be a Leaky, Lapicque or Synaptic of snnTorch, got int"
    ):
        interop_snntorch.MultiStep(5)
    multi = interop_snntorch.MultiStep(snntorch.Leaky(beta=0.5))
    for arguments, name in ((([1.0],), "x_seq"), ((torch.ones(2, 3), 5), "a state")):
        with pytest.raises(TypeError, match=rf"snntorch\.MultiStep: {name} must be a tensor, got (list|int)"):
            multi(*arguments)


# ---- Norse ----


@pytest.mark.parametrize("reset", ["value", "subtract"])
@pytest.mark.parametrize("method", ["super", "triangle", "tanh", "heavi_erfc"])
def test_norse(method, reset):
    from norse.torch.functional import reset as resets

    def make():
        p = norse.LIFBoxParameters(
            tau_mem_inv=torch.tensor(400.0), v_leak=torch.tensor(0.1), v_th=torch.tensor(0.6),
            v_reset=torch.tensor(-0.2), method=method, alpha=torch.tensor(1.7),
            reset_method=getattr(resets, f"reset_{reset}"),
        )  # fmt: skip
        return norse.LIFBoxCell(p)

    check(make, norse_run, threshold=0.6, scale=2.0)


def test_norse_learned_time_constant():
    """In Norse a parameter is wherever the user keeps it; its gradient comes from the tuple."""
    torch.manual_seed(0)
    tau_mem_inv = torch.tensor(400.0, requires_grad=True)
    cell = norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=tau_mem_inv))
    fused, _ = asgl_cuda.convert(cell, inplace=True)
    x = 2 * torch.randn(SHAPE)
    (ours,) = torch.autograd.grad(norse_run(fused, x)[1].sum(), tau_mem_inv)
    back, _ = asgl_cuda.revert(fused, inplace=True)
    del back.kept
    (theirs,) = torch.autograd.grad(norse_run(back, x)[1].sum(), tau_mem_inv)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
