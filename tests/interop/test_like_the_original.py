"""Calls of converted layers that need not be those of `forward`, their types, tracing, and gradients at the ends."""

from contextlib import nullcontext

import authors_code
import libraries  # noqa: F401
import norse.torch as norse
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from converted_layers import close, leaky_steps_of
from spikingjelly.activation_based import functional, neuron
from test_convert import set_whole
from torch import nn

import asgl_cuda
from asgl_cuda.interop.snntorch import MultiStep

SINGLE = {"spike_fn": sinabs.activation.SingleSpike}
WHOLE, STEP = (3, 2, 5), (6, 5)

LAYERS = {
    "IFNode": (lambda: neuron.IFNode(step_mode="m"), WHOLE),
    "LIFNode": (lambda: neuron.LIFNode(step_mode="m"), WHOLE),
    "LIFNode, a step": (lambda: neuron.LIFNode(), STEP),
    "ParametricLIFNode": (lambda: neuron.ParametricLIFNode(step_mode="m"), WHOLE),
    "ParametricLIFNode, a step": (lambda: neuron.ParametricLIFNode(), STEP),
    "SimpleLIFNode": (lambda: neuron.SimpleLIFNode(2.0, True, step_mode="m"), WHOLE),
    "CUBALIFNode": (lambda: set_whole(neuron.CUBALIFNode()), WHOLE),
    "CUBALIFNode, a step": (lambda: neuron.CUBALIFNode(), STEP),
    "NonSpikingLIFNode": (lambda: neuron.NonSpikingLIFNode(decode="last_mem"), WHOLE),
    "Leaky": (lambda: snntorch.Leaky(beta=0.5), STEP),
    "Leaky, zero": (lambda: snntorch.Leaky(beta=0.5, reset_mechanism="zero"), STEP),
    "Leaky, none": (lambda: snntorch.Leaky(beta=0.5, reset_mechanism="none"), STEP),
    "Leaky, none, each": (
        lambda: snntorch.Leaky(beta=torch.full((5,), 0.5), reset_mechanism="none"), STEP,
    ),
    "Leaky without delay": (lambda: snntorch.Leaky(beta=0.5, reset_delay=False), STEP),
    "Leaky, each": (lambda: snntorch.Leaky(beta=torch.full((5,), 0.5), learn_beta=True), STEP),
    "Leaky, learned": (lambda: snntorch.Leaky(beta=0.5, learn_beta=True, learn_threshold=True), STEP),
    "Leaky, state inside": (lambda: snntorch.Leaky(beta=0.5, init_hidden=True, output=True), STEP),
    "Lapicque": (lambda: snntorch.Lapicque(beta=0.5), STEP),
    "Synaptic": (lambda: snntorch.Synaptic(alpha=0.5, beta=0.5), STEP),
    "norse LIF": (lambda: norse.LIF(), WHOLE),
    "norse LIFCell": (lambda: norse.LIFCell(), STEP),
    "norse LIFBoxCell": (lambda: norse.LIFBoxCell(), STEP),
    "norse IAF": (lambda: norse.IAF(), WHOLE),
    "norse IAFCell": (lambda: norse.IAFCell(), STEP),
    "norse LI": (lambda: norse.LI(), WHOLE),
    "sinabs LIF": (lambda: sinabs.layers.LIF(2.0, **SINGLE), WHOLE),
    "sinabs LIF, several": (lambda: sinabs.layers.LIF(2.0), WHOLE),
    "sinabs IAF": (lambda: sinabs.layers.IAF(record_states=True, **SINGLE), WHOLE),
    "sinabs LIF, tau_syn": (lambda: sinabs.layers.LIF(2.0, tau_syn=2.0, record_states=True), WHOLE),
    "sinabs LIF, each": (lambda: sinabs.layers.LIF(torch.full((5,), 2.0), **SINGLE), WHOLE),
    "sinabs LIFSqueeze": (lambda: sinabs.layers.LIFSqueeze(tau_mem=2.0, batch_size=3), STEP),
    "sinabs ExpLeak": (lambda: sinabs.layers.ExpLeak(2.0), WHOLE),
    "sinabs ExpLeakSqueeze": (lambda: sinabs.layers.ExpLeakSqueeze(tau_mem=2.0, batch_size=3), STEP),
}  # fmt: skip


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, (tuple, list)) else []


def types_of(layer, x):
    """The types of what two calls return, and of what sinabs records."""
    found, state = [], ()
    for _ in range(2):
        out = layer(x, *state)
        found += [tensor.dtype for tensor in tensors_of(out)]
        state = out[1:] if isinstance(out, tuple) and not getattr(layer, "init_hidden", False) else ()
    return found + [value.dtype for value in getattr(layer, "recordings", {}).values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_types_are_those_of_the_library(name, cast, dtype):
    make, shape = LAYERS[name]
    x = (3 * torch.rand(shape)).to(dtype)
    with torch.autocast("cpu", dtype=cast) if cast else nullcontext():
        try:
            expected = types_of(make(), x)
        except RuntimeError as error:
            assert "autocast" in str(error)  # noqa: PT017
            pytest.skip("the library's own layer can't")
        assert types_of(asgl_cuda.convert(make())[0], x) == expected


def test_under_autocast_a_network_gives_the_spikes_and_gradients_of_the_library():
    """In sinabs the state is float32, and so is all that is computed with it: also counts that bfloat16 has not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), sinabs.layers.IAF(spike_threshold=torch.tensor(0.01)), nn.Linear(6, 3))
    fused, _ = asgl_cuda.convert(model)
    x = 10 * torch.rand(2, 5, 4)
    results = []
    for net in (model, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            spikes = net[:2](x)
            out = net[2](spikes)
        out.float().square().mean().backward()
        results.append(
            (spikes.detach(), out.detach(), *(value.grad for value in net.parameters() if value.grad is not None))
        )
    (theirs, *_), (ours, *_) = results
    assert ours.dtype == theirs.dtype == torch.float32
    assert theirs.max() > 256
    for ours, theirs in zip(*results[::-1], strict=True):
        assert torch.equal(ours, theirs) or close(ours, theirs)


# ---- torch.jit ----


@pytest.mark.parametrize("name", LAYERS)
def test_traces_as_the_original_does(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    x, other = 3 * torch.rand(2, *shape)
    try:
        expected = torch.jit.trace(make(), x, check_trace=False)(other)
    except RuntimeError as error:
        assert "as a constant" in str(error)  # noqa: PT017
        pytest.skip("the library's own layer can't be traced")
    fused, _ = asgl_cuda.convert(make())
    made = type(fused)
    found = torch.jit.trace(fused, x, check_trace=False)(other)
    assert type(fused) is made
    torch.testing.assert_close(tensors_of(found), tensors_of(expected), rtol=0, atol=0)


def test_a_network_is_traced_that_has_asgl_layers_in_evaluation():
    model = nn.Sequential(nn.Linear(5, 4), neuron.LIFNode(step_mode="m"), nn.Linear(4, 2))
    fused, _ = asgl_cuda.convert(model, asgl={"width": 2.0})
    x_seq, other = 3 * torch.rand(2, *WHOLE)
    traced = torch.jit.trace(fused.eval(), x_seq, check_trace=False)
    functional.reset_net(model)
    torch.testing.assert_close(traced(other), torch.jit.trace(model, x_seq, check_trace=False)(other))
    functional.reset_net(fused.train())
    with pytest.raises(RuntimeError, match=r"asgl_cuda\.convert: torch\.jit can't .* LIFNode.*: asgl_cuda\.revert"):
        torch.jit.trace(fused, x_seq, check_trace=False)


def test_what_can_not_be_traced_or_scripted_says_so():
    x_seq = torch.rand(WHOLE)
    joined, _ = asgl_cuda.fuse(nn.Sequential(nn.BatchNorm1d(2), neuron.LIFNode(step_mode="m")).eval())
    if asgl_cuda.unfuse(joined)[1].replaced:
        with pytest.raises(RuntimeError, match=r"LIFNode.*asgl_cuda\.unfuse and asgl_cuda\.revert"):
            torch.jit.trace(joined, x_seq, check_trace=False)
    multi = MultiStep(snntorch.Leaky(beta=0.5))
    with pytest.raises(RuntimeError, match=r"asgl_cuda\.convert: torch\.jit can't .* Leaky"):
        torch.jit.trace(multi, x_seq, check_trace=False)
    for make, _ in LAYERS.values():
        with pytest.raises(RuntimeError, match=r"asgl_cuda\.convert: torch\.jit can't script a converted"):
            torch.jit.script(nn.Sequential(asgl_cuda.convert(make())[0]))


def test_the_authors_layer_is_traced():
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(learnable=False), p=0.0)
    layer = authors_code.LIFLayer(3, spike_fn=spike).eval()
    x_seq, other = torch.rand(2, *WHOLE)
    traced = torch.jit.trace(asgl_cuda.convert(layer)[0], x_seq, check_trace=False)
    torch.testing.assert_close(traced(other), layer(other))


# ---- SpikingJelly: the method that is called tells a step from a sequence ----


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("kind", ["LIFNode", "ParametricLIFNode", "CUBALIFNode", "IFNode"])
def test_spikingjelly_by_method(kind, step_mode):
    torch.manual_seed(0)
    layer = getattr(neuron, kind)()
    layer.store_v_seq, layer.step_mode = True, step_mode  # CUBALIFNode's __init__ does not take the first
    fused, report = asgl_cuda.convert(layer)
    assert len(report.replaced) == 1
    x_seq = 3 * torch.rand(WHOLE)
    theirs, ours = layer.multi_step_forward(x_seq), fused.multi_step_forward(x_seq)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(fused.v_seq, layer.v_seq)
    torch.testing.assert_close(fused.v, layer.v)
    layer.reset(), fused.reset()
    for x in x_seq:
        theirs, ours = layer.single_step_forward(x), fused.single_step_forward(x)
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(fused.v_seq, layer.v_seq)
    if kind == "CUBALIFNode":
        torch.testing.assert_close(fused.c, layer.c)


# ---- snnTorch: beta at the ends of its clamp ----

ENDS = [-0.5, 0.0, 1e-7, 1e-4, 0.3, 1.0, 1.5, [-0.5, 0.0, 1e-5, 0.4, 1.0, 1.5, 0.9]]


def beta_of(value):
    return torch.tensor(value) if isinstance(value, list) else value


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("options", [{}, {"learn_threshold": True}, {"reset_delay": False}], ids=str)
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
@pytest.mark.parametrize("beta", ENDS, ids=str)
def test_snntorch_beta_at_the_ends(beta, kind, options, whole):
    if whole and "reset_delay" in options:
        pytest.skip("MultiStep takes none")
    more = {"alpha": 0.5} if kind == "Synaptic" else {}

    def make():
        return getattr(snntorch, kind)(beta=beta_of(beta), learn_beta=True, threshold=0.8, **more, **options)

    torch.manual_seed(0)
    x_seq = torch.randn(8, 5, 7)
    layer, twin = make(), make()
    fused = MultiStep(twin) if whole else asgl_cuda.convert(twin, inplace=True)[0]
    results = []
    for module, owner in ((layer, layer), (fused, twin)):
        leaf = x_seq.clone().requires_grad_()
        outputs = module(leaf) if module is not owner else leaky_steps_of(module, leaf)
        loss = sum((out * torch.arange(1.0, 1 + out.numel()).reshape(out.shape).cos()).sum() for out in outputs)
        leaves = [leaf, owner.beta, *([owner.threshold] if "learn_threshold" in options else [])]
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results[::-1], strict=True):
        assert close(ours, theirs), (ours - theirs).abs().max()
    if not isinstance(beta, list):
        assert bool(results[0][-1 - ("learn_threshold" in options)].any()) == (0 <= beta <= 1)


def test_a_beta_that_moves_to_zero_is_followed():
    """By an optimizer, or by a clamp after its step, as many do."""
    torch.manual_seed(0)
    layer = snntorch.Leaky(beta=0.3, learn_beta=True)
    multi = MultiStep(snntorch.Leaky(beta=0.3, learn_beta=True))
    x_seq = torch.randn(6, 5, 7)
    for value in (0.3, 0.0, 0.5):
        for each in (layer, multi.layer):
            each.reset_mem()
            with torch.no_grad():
                each.beta.fill_(value)
        (theirs,) = torch.autograd.grad(sum(map(torch.sum, leaky_steps_of(layer, x_seq))), layer.beta)
        (ours,) = torch.autograd.grad(sum(map(torch.sum, multi(x_seq))), multi.layer.beta)
        assert close(ours, theirs)


def test_a_normalised_leaky_with_a_beta_of_zero():
    """There the input is not what is reset. The gradient of beta is that of numbers as large as threshold / 1e-6."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(7), snntorch.Leaky(beta=0.0, learn_beta=True, init_hidden=True, output=True))
    fused, report = asgl_cuda.fuse(model)
    assert len(report.replaced) == 1
    found = []
    for net in (model, fused):
        total = sum((mem * (1 + step)).sum() for step in range(3) for mem in net(torch.randn(50, 7).abs())[1:])
        found.append(torch.autograd.grad(total, net[1].beta)[0])
        torch.manual_seed(0)
    assert found[0].abs() > 1


def test_asgl_steps_of_a_learned_beta_reset_by_what_was_emitted():
    fused, _ = asgl_cuda.convert(
        snntorch.Leaky(beta=0.5, learn_beta=True), asgl={"width": 4.0, "analog_prob": 1.0, "learn_width": False}
    )
    twin, _ = asgl_cuda.convert(snntorch.Leaky(beta=0.5), asgl={"width": 4.0, "analog_prob": 1.0, "learn_width": False})
    x_seq = torch.rand(6, 3, 4)
    for ours, theirs in zip(leaky_steps_of(fused, x_seq), leaky_steps_of(twin, x_seq), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_snntorch_in_inference_mode():
    layer = snntorch.Leaky(beta=0.5, init_hidden=True, output=True)
    fused, _ = asgl_cuda.convert(layer)
    x_seq = 2 * torch.rand(4, 3, 5)
    with torch.inference_mode():
        for x in x_seq:
            torch.testing.assert_close(fused(x), layer(x))
            fused.mem += 0.5  # it is the state of the next step
            layer.mem += 0.5
