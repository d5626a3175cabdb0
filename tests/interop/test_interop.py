"""Layers of other libraries give the same spikes, states and gradients when they are converted."""

import copy
import re

import pytest

pytest.importorskip("norse")
pytest.importorskip("sinabs")
pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")

import authors_code
import norse.torch as norse
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from snntorch import surrogate as snn_surrogate
from snntorch import utils
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

import asgl_cuda
from asgl_cuda.interop import snntorch as interop_snntorch
from asgl_cuda.interop.identify import identify
from asgl_cuda.selfcheck import THRESHOLD_BAND

SHAPE = (5, 3, 7)  # T, B, neurons
CALLS = 3
# Of the largest value: some tens of float32 roundings, as two orders of the same sums differ by.
TOLERANCE = 1e-5


class Trace:
    """What a layer did over several calls: all tensors are [calls * T, ...], `h` being the potential before reset."""

    def __init__(self, s, v, h, grads):
        self.s, self.v, self.h, self.grads = s, v, h, grads


def trace(layer, run, x, grads):
    """`run(layer, x)` is called for each of `x` with the state that the layer keeps, and returns s, v and h."""
    leaves = [each.clone().requires_grad_() for each in x]
    parts = [run(layer, leaf) for leaf in leaves]
    s, v, h = (torch.cat(values) for values in zip(*parts, strict=True))
    loss = (s * grads[0]).sum() + (v * grads[1]).sum()
    parameters = [value for _, value in sorted(layer.named_parameters()) if value.requires_grad]
    return Trace(s.detach(), v.detach(), h, torch.autograd.grad(loss, [*leaves, *parameters]))


def close(ours, theirs):
    return bool(((ours - theirs).abs() <= TOLERANCE * theirs.abs().max().clamp(min=1)).all())


def check(make, run, threshold=1.0, scale=1.0, dead_parameters=False):
    """Compares a layer with its conversion: spikes equal, unless both potentials are as good as at the threshold.

    A spike that flips changes everything after it, so an input on which one does is only checked for that.
    """
    for seed in range(6):
        torch.manual_seed(seed)
        x = [scale * torch.randn(SHAPE) for _ in range(CALLS)]
        grads = torch.randn(2, CALLS * SHAPE[0], *SHAPE[1:])
        layer = make()
        fused, report = asgl_cuda.convert(make(), inplace=True)
        assert [row.path for row in report.replaced] == [""], report
        assert type(fused) is not type(layer)
        assert isinstance(fused, type(layer))
        theirs, ours = trace(layer, run, x, grads), trace(fused, run, x, grads)
        flips = ours.s != theirs.s
        if flips.any():
            first = flips & (flips.cumsum(0) == 1)
            distance = torch.maximum((theirs.h - threshold).abs(), (ours.h - threshold).abs())
            assert (distance[first] < THRESHOLD_BAND).all(), "a spike differs away from the threshold"
            continue
        assert 0.02 < (theirs.s != 0).float().mean() < 0.98
        assert close(ours.v, theirs.v)
        assert len(ours.grads) == len(theirs.grads)
        for number, (our, their) in enumerate(zip(ours.grads, theirs.grads, strict=True)):
            assert their.abs().max() > 0 or (number >= CALLS and dead_parameters)
            assert close(our, their), f"gradient {number} differs by {(our - their).abs().max()}"
        return
    raise AssertionError("spikes flipped for every seed")


# ---- SpikingJelly ----


def jelly_run(layer, x_seq):
    """With the potential after each step; that before it follows from the equation."""
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
    """A step a call, with states passed by the layer itself; the potential that comes back is that before reset."""
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
@pytest.mark.parametrize("change", ["nothing", "detach", "in place", "threshold", "another", "no gradient"])
def test_snntorch_between_two_calls(change, reset_mechanism):
    """What is remembered of a potential holds for that potential alone, as it was."""
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
    """Also those that stay what they are."""

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
    with pytest.raises(ValueError, match=r"layer must be a Leaky of snnTorch: it is a Linear"):
        interop_snntorch.MultiStep(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layer must be a Leaky of snnTorch: it quantises its state"):
        interop_snntorch.MultiStep(snntorch.Leaky(beta=0.5, state_quant=lambda mem: mem))
    with pytest.raises(TypeError, match=r"snntorch\.MultiStep: layer must be a Leaky of snnTorch, got int"):
        interop_snntorch.MultiStep(5)
    multi = interop_snntorch.MultiStep(snntorch.Leaky(beta=0.5))
    for arguments, name in ((([1.0],), "x_seq"), ((torch.ones(2, 3), 5), "mem")):
        with pytest.raises(TypeError, match=rf"snntorch\.MultiStep: {name} must be a tensor, got (list|int)"):
            multi(*arguments)


# ---- Norse ----


def norse_run(layer, x_seq):
    state = getattr(layer, "kept", None)
    s, v, h = [], [], []
    for x in x_seq:
        before = layer.p.v_leak if state is None else state.v
        h.append((before + layer.dt * layer.p.tau_mem_inv * (x + layer.p.v_leak - before)).detach().expand(x.shape))
        spike, state = layer(x, state)
        s.append(spike)
        v.append(state.v)
    layer.kept = state
    return torch.stack(s), torch.stack(v), torch.stack(h)


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
    """In Norse a parameter is wherever the user keeps it; its gradient is that of the tuple."""
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


# ---- sinabs ----


def sinabs_run(layer, x_seq):
    """Inputs are time first here, as everywhere in these tests."""
    before = layer.v_mem if layer.is_state_initialised() else torch.zeros_like(x_seq[0])
    x = x_seq.transpose(0, 1)
    squeezed = hasattr(layer, "num_timesteps")
    out = layer(x.flatten(0, 1) if squeezed else x)
    s = (out.unflatten(0, x.shape[:2]) if squeezed else out).transpose(0, 1)
    v = layer.recordings["v_mem"].transpose(0, 1)
    alpha = layer.alpha_mem_calculated
    previous = torch.cat([before[None], v[:-1]])
    gain = 1 - alpha if layer.norm_input else 1.0
    return s, v, (alpha * previous + gain * x_seq).detach()


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"tau_mem": 2.0},
        {"tau_mem": 3.0, "norm_input": False},
        {"tau_mem": 3.0, "norm_input": False, "train_alphas": True},
        {"tau_mem": torch.linspace(1, 5, SHAPE[-1]), "norm_input": False},
        {"tau_mem": 3.0, "norm_input": False, "reset_fn": sinabs.activation.MembraneReset()},
        {"tau_mem": 3.0, "norm_input": False, "reset_fn": sinabs.activation.MembraneSubtract(0.4)},
        {},
    ],
    ids=lambda options: ", ".join(map(str, options)) or "IAF",
)
def test_sinabs(options, squeezed):
    kind = ("LIF" if options else "IAF") + ("Squeeze" if squeezed else "")
    more = {"batch_size": SHAPE[1]} if squeezed else {}

    def make():
        return getattr(sinabs.layers, kind)(
            spike_threshold=torch.tensor(0.8), spike_fn=sinabs.activation.SingleSpike, record_states=True, **options,
            **more,
        )  # fmt: skip

    check(make, sinabs_run, threshold=0.8, scale=2.0 if options == {"tau_mem": 2.0} else 1.0)


@pytest.mark.parametrize(
    "function",
    [
        sinabs.activation.SingleExponential(0.7, 1.3), sinabs.activation.Gaussian(0.0, 0.6, 0.8),
    ],
    ids=lambda function: type(function).__name__,
)  # fmt: skip
def test_surrogates_of_sinabs(function):
    def make():
        return sinabs.layers.LIF(
            3.0, spike_fn=sinabs.activation.SingleSpike, surrogate_grad_fn=function, norm_input=False,
            record_states=True,
        )  # fmt: skip

    check(make, sinabs_run)


def test_sinabs_state_and_copies():
    torch.manual_seed(0)
    layer = sinabs.layers.LIF(3.0, spike_fn=sinabs.activation.SingleSpike, norm_input=False)
    fused, _ = asgl_cuda.convert(layer, asgl={"width": 2.0})
    x = torch.randn(4, 9, 5)
    fused(x)
    twin = copy.deepcopy(fused)
    assert type(twin) is type(fused)
    assert twin.analog_prob == 0.2
    assert torch.equal(twin.v_mem, fused.v_mem)
    assert twin.log_width is not fused.log_width
    assert twin.spike_threshold is not fused.spike_threshold
    fused.reset_states()
    assert not fused.v_mem.any()
    assert twin.v_mem.any()
    fused.eval()(x[:2])  # another batch size: sinabs takes over states of the old one
    assert fused.v_mem.shape == (2, 5)
    assert 0 < fused.firing_rate < 1


# ---- the code of the authors ----


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("kind", [authors_code.InvRectangle, authors_code.InvSigmoid])
@pytest.mark.parametrize("vreset", [None, 0.1])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_authors_code(p, vreset, kind, granularity):
    """With all elements hard or all smooth: between, the noise is another."""

    def make():
        spike = authors_code.EfficientNoisySpikeII(kind(2.0, granularity=granularity), p=p)
        layer = authors_code.LIFLayer(4, spike_fn=spike, decay=0.6, thresh=0.7, vreset=vreset)
        layer(torch.zeros(4, 3, 2, 5, 5))  # makes the widths
        return layer

    torch.manual_seed(0)
    x_seq = torch.randn(4, 3, 2, 5, 5)
    grad = torch.randn_like(x_seq)
    layer = make()
    fused, report = asgl_cuda.convert(layer)
    assert len(report.replaced) == 1
    results = []
    for each in (layer, fused):
        leaf = x_seq.clone().requires_grad_()
        out = each(leaf)
        results.append((out, each.vmem, torch.autograd.grad((out * grad).sum(), [leaf, *each.parameters()])))
    (theirs, their_v, their_grads), (ours, our_v, our_grads) = results
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_v, their_v)
    assert len(our_grads) == 3
    for our, their in zip(our_grads, their_grads, strict=True):
        assert their.abs().max() > 0
        assert close(our, their)


@pytest.mark.parametrize("learnable", [False, True])
def test_authors_code_before_the_widths_are_made(learnable):
    """The parameter is made at the first call, by whichever layer, with the authors' shape and name."""
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(2.0, learnable, "channel"), p=0.0)
    layer = authors_code.LIFLayer(3, spike_fn=spike)
    fused, _ = asgl_cuda.convert(layer)
    x_seq = torch.randn(5, 2, 6, 3, 3)
    torch.testing.assert_close(fused(x_seq), layer(x_seq))
    assert {name: value.shape for name, value in fused.named_parameters()} == {
        name: value.shape for name, value in layer.named_parameters()
    }
    assert torch.as_tensor(fused.width).mean().item() == pytest.approx(0.5)


def test_authors_code_noise_and_share():
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvRectangle(1.0), p=0.3)
    fused, _ = asgl_cuda.convert(authors_code.LIFLayer(1, spike_fn=spike, thresh=1.0))
    x_seq = torch.full((1, 20000), 1.25)  # analog elements are 3/4, spikes are 1
    assert abs((fused(x_seq) == 0.75).float().mean() - 0.3) < 0.02
    assert fused.analog_prob == 0.3
    fused.analog_prob = 0.1  # as a schedule sets it
    assert fused.cell.spike_fn.p == 0.1
    assert abs((fused(x_seq) == 0.75).float().mean() - 0.1) < 0.02
    assert (fused.eval()(x_seq) == 1).all()
    back, report = asgl_cuda.revert(fused)
    assert type(back) is authors_code.LIFLayer
    assert back.cell.spike_fn.p == 0.1
    assert not report.left


# ---- integers ----


def sinabs_layer(kind, **options):
    return getattr(sinabs.layers, kind)(spike_fn=sinabs.activation.SingleSpike, **options)


def jelly_steps(layer, x_seq):
    return [torch.stack(values) for values in zip(*((layer(x), layer.v) for x in x_seq), strict=True)]


def leaky_steps(layer, x_seq):
    return [torch.stack(values) for values in zip(*(layer(x) for x in x_seq), strict=True)]


INTEGERS = {
    "SpikingJelly": (lambda: neuron.LIFNode(step_mode="m"), lambda layer, x: (layer(x), layer.v, layer(x), layer.v)),
    "SpikingJelly, a step a call": (lambda: neuron.ParametricLIFNode(v_reset=0.3), jelly_steps),
    "SpikingJelly, soft": (lambda: neuron.IFNode(v_reset=None), jelly_steps),
    "snnTorch": (lambda: snntorch.Leaky(beta=0.5, threshold=1), leaky_steps),
    "snnTorch, zero": (lambda: snntorch.Leaky(beta=1, threshold=2, reset_mechanism="zero"), leaky_steps),
    "Norse": (
        lambda: norse.LIFBoxCell(norse.LIFBoxParameters(v_th=torch.tensor(1), tau_mem_inv=torch.tensor(400))),
        lambda layer, x: norse_run(layer, x)[:2],
    ),
    "sinabs LIF": (lambda: sinabs_layer("LIF", tau_mem=3, spike_threshold=1), lambda layer, x: (layer(x), layer.v_mem)),
    "sinabs IAF": (lambda: sinabs_layer("IAF", spike_threshold=50), lambda layer, x: (layer(x), layer.v_mem)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name, dtype):
    """A threshold or an input of whole numbers, which PyTorch's operations take beside floats."""
    make, call = INTEGERS[name]
    torch.manual_seed(0)
    x = torch.randint(0, 60 if "IAF" in name else 4, (6, 4, 30)).to(dtype)
    layer, (fused, report) = make(), asgl_cuda.convert(make())
    assert len(report.replaced) == 1
    theirs = call(layer, x)
    assert 0 < theirs[0].float().mean() < 1
    torch.testing.assert_close(call(fused, x), theirs)


# ---- what is left ----

LEFT = {
    "a neuron that there is not": (lambda: neuron.QIFNode(), "asgl_cuda has no such neuron"),
    "a subclass": (
        lambda: type("Mine", (neuron.LIFNode,), {"__module__": "here"})(),
        "it is a subclass of LIFNode, which may compute something else; convert knows LIFNode itself",
    ),
    "a subclass of a subclass": (
        lambda: type("Mine", (sinabs.layers.IAFSqueeze,), {"__module__": "here"})(batch_size=1),
        "it is a subclass of IAFSqueeze",
    ),
    "a subclass of no known neuron": (
        lambda: type("Mine", (neuron.QIFNode,), {"__module__": "here"})(), "asgl_cuda has no such neuron",
    ),
    "smooth spikes": (
        lambda: neuron.IFNode(surrogate_function=surrogate.Sigmoid(spiking=False)),
        r"does not spike \(spiking=False\)",
    ),
    "another surrogate": (
        lambda: neuron.IFNode(surrogate_function=surrogate.PiecewiseLeakyReLU()),
        "its surrogate is none of those of asgl_cuda",
    ),
    "inhibition": (lambda: snntorch.Leaky(beta=0.5, inhibition=True), "it has inhibition"),
    "quantised": (lambda: snntorch.Leaky(beta=0.5, state_quant=lambda mem: mem), "it quantises its state"),
    "graded": (lambda: snntorch.Leaky(beta=0.5, graded_spikes_factor=0.5), "its spikes are graded"),
    "no decay": (lambda: snntorch.Leaky(beta=0.0), r"nothing is left \(beta=0\)"),
    "no gradient": (lambda: snntorch.Leaky(beta=0.5, surrogate_disable=True), "its spike function has no gradient"),
    "straight through": (
        lambda: snntorch.Leaky(beta=0.5, spike_grad=snn_surrogate.straight_through_estimator()),
        "its surrogate does not fall off",
    ),
    "Synaptic": (lambda: snntorch.Synaptic(alpha=0.5, beta=0.5), "asgl_cuda has no such neuron"),
    "LIFCell": (lambda: norse.LIFCell(), "asgl_cuda has no such neuron"),
    "LIF of Norse": (lambda: norse.LIF(), "asgl_cuda has no such neuron"),
    "circ": (lambda: norse.LIFBoxCell(norse.LIFBoxParameters(method="circ")), "its surrogate is none"),
    "MultiSpike": (lambda: sinabs.layers.LIF(2.0), r"several times a step \(spike_fn=MultiSpike;"),
    "MaxSpike": (
        lambda: sinabs.layers.LIF(2.0, spike_fn=sinabs.activation.MaxSpike(3)), r"\(spike_fn=MaxSpike;",
    ),
    "least potential": (
        lambda: sinabs.layers.IAF(spike_fn=sinabs.activation.SingleSpike, min_v_mem=-1.0),
        r"least potential \(min_v_mem\)",
    ),
    "synaptic current": (
        lambda: sinabs.layers.LIF(2.0, tau_syn=3.0, spike_fn=sinabs.activation.SingleSpike),
        r"synaptic current \(tau_syn\)",
    ),
    "reset to a value": (
        lambda: sinabs.layers.LIF(
            2.0, spike_fn=sinabs.activation.SingleSpike, reset_fn=sinabs.activation.MembraneReset(0.5)
        ),
        "resets to a value that is not 0",
    ),
    "ExpLeak": (lambda: sinabs.layers.ExpLeak(2.0), "asgl_cuda has no such neuron"),
    "gate": (
        lambda: authors_code.LIFLayer(
            2, spike_fn=authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid()), use_gate=True
        ),
        "use_gate=True",
    ),
    "smooth evaluation": (
        lambda: authors_code.LIFLayer(
            2, spike_fn=authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(), spike=False)
        ),
        r"smooth values in evaluation \(spike=False\)",
    ),
    "InvTanh": (
        lambda: authors_code.LIFLayer(2, spike_fn=authors_code.EfficientNoisySpike(authors_code.InvTanh())),
        "its surrogate is InvTanh; known are InvRectangle and InvSigmoid",
    ),
}  # fmt: skip


ALSO_LEFT = {
    **{name: lambda name=name: getattr(neuron, name)() for name in (
        "DSRIFNode", "DSRLIFNode", "ActivationAwareIFNode", "ILIFNode", "SimpleIFNode",
    )},
    "PSN": lambda: neuron.PSN(4),
    "MaskedPSN": lambda: neuron.MaskedPSN(2, 4),
    "SlidingPSN": lambda: neuron.SlidingPSN(2),
    "GatedLIFNode": lambda: neuron.GatedLIFNode(4),
    "STBIFNode": lambda: neuron.STBIFNode(torch.tensor(1.0), 4, True),
    "FlexSN": lambda: neuron.FlexSN(lambda x, v: (x, v), num_states=1),
    "CobaLIFCell": lambda: norse.CobaLIFCell(2, 2),
    "LILinearCell": lambda: norse.LILinearCell(2, 2),
    "LIFCorrelation": lambda: norse.LIFCorrelation(2, 2),
    "LeakyParallel": lambda: snntorch.LeakyParallel(2, 2),
    "ALIF": lambda: sinabs.layers.ALIF(3.0, 3.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ALSO_LEFT)
def test_neurons_of_the_libraries_are_left_with_a_reason(name):
    _, report = asgl_cuda.convert(nn.Sequential(ALSO_LEFT[name]()))
    assert report == ([], [("0", name, "asgl_cuda has no such neuron")])


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name):
    make, reason = LEFT[name]
    layer = make()
    before = type(layer)
    net, report = asgl_cuda.convert(nn.Sequential(nn.Linear(2, 2), layer), inplace=True)
    assert type(net[1]) is before
    assert not report.replaced
    ((path, kind, why),) = report.left
    assert (path, kind) == ("1", before.__name__)
    assert re.search(reason, why), why


# ---- which surrogate a function is ----


@pytest.mark.parametrize("width", [1e-3, 0.3, 1.0, 7.0, 200.0])
@pytest.mark.parametrize("gain", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", asgl_cuda.surrogate.SURROGATES)
def test_surrogates_are_told_apart(name, gain, width):
    def function(u):
        smooth = asgl_cuda.surrogate.SURROGATES[name].cumulative(u / width) * gain
        return smooth + ((u > 0).to(u) - smooth).detach()

    found = identify(function)
    assert found.surrogate == name
    assert found.width == pytest.approx(width, rel=1e-6)
    assert found.gain == pytest.approx(gain, rel=1e-6)
    assert found.strict


def test_a_lopsided_surrogate_is_none_of_ours():
    def function(u):
        smooth = torch.sigmoid(torch.where(u < 0, u, 1.001 * u))
        return smooth + ((u >= 0).to(u) - smooth).detach()

    assert identify(function) == "its surrogate is none of those of asgl_cuda"
