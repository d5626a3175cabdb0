"""Layers and models of other libraries, and their comparison with their conversions."""

import copy

import authors_code
import norse.torch as norse
import sinabs.layers
import snntorch
import torch
from sinabs.activation import MembraneReset, MembraneSubtract, SingleSpike
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn.functional import cross_entropy

import asgl_cuda
from asgl_cuda.interop.converted import Converted
from asgl_cuda.interop.fuse import Fused
from asgl_cuda.selfcheck import THRESHOLD_BAND

SHAPE = (5, 3, 7)  # T, B, neurons
CALLS = 3
T, B, C = 5, 4, 3  # steps, batch and channels in models to fuse
# A share of the largest value: two orders of the same sums differ by some tens of float32 roundings.
TOLERANCE = 1e-5
SINGLE = {"spike_fn": SingleSpike}
FAST = norse.LSNNParameters(tau_mem_inv=torch.tensor(600.0), tau_adapt_inv=torch.tensor(50.0), v_th=torch.tensor(0.3))
WHOLE, STEP = (3, 2, 5), (6, 5)


def in_sequences(node):
    """For nodes of SpikingJelly whose constructor does not take `step_mode` or `store_v_seq`."""
    node.step_mode, node.store_v_seq = "m", True
    return node


# A layer and the shape of its input.
LAYERS = {
    "IFNode": (lambda: neuron.IFNode(step_mode="m"), WHOLE),
    "LIFNode": (lambda: neuron.LIFNode(step_mode="m"), WHOLE),
    "LIFNode, a step": (lambda: neuron.LIFNode(), STEP),
    "ParametricLIFNode": (lambda: neuron.ParametricLIFNode(step_mode="m"), WHOLE),
    "ParametricLIFNode, a step": (lambda: neuron.ParametricLIFNode(), STEP),
    "SimpleLIFNode": (lambda: neuron.SimpleLIFNode(2.0, True, step_mode="m"), WHOLE),
    "CUBALIFNode": (lambda: in_sequences(neuron.CUBALIFNode()), WHOLE),
    "CUBALIFNode, a step": (lambda: neuron.CUBALIFNode(), STEP),
    "NonSpikingLIFNode": (lambda: neuron.NonSpikingLIFNode(decode="last_mem"), WHOLE),
    "Leaky": (lambda: snntorch.Leaky(beta=0.5), STEP),
    "Leaky, zero": (lambda: snntorch.Leaky(beta=0.5, reset_mechanism="zero"), STEP),
    "Leaky, none": (lambda: snntorch.Leaky(beta=0.5, reset_mechanism="none"), STEP),
    "Leaky, none, each": (lambda: snntorch.Leaky(beta=torch.full((5,), 0.5), reset_mechanism="none"), STEP),
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
    "norse LSNN": (lambda: norse.LSNN(FAST), WHOLE),
    "norse LSNNCell": (lambda: norse.LSNNCell(FAST), STEP),
    "norse LI": (lambda: norse.LI(), WHOLE),
    "sinabs LIF": (lambda: sinabs.layers.LIF(2.0, **SINGLE), WHOLE),
    "sinabs LIF, several": (lambda: sinabs.layers.LIF(2.0), WHOLE),
    "sinabs IAF": (lambda: sinabs.layers.IAF(record_states=True, **SINGLE), WHOLE),
    "sinabs LIF, tau_syn": (lambda: sinabs.layers.LIF(2.0, tau_syn=2.0, record_states=True), WHOLE),
    "sinabs LIF, each": (lambda: sinabs.layers.LIF(torch.full((5,), 2.0), **SINGLE), WHOLE),
    "sinabs LIFSqueeze": (lambda: sinabs.layers.LIFSqueeze(tau_mem=2.0, batch_size=3), STEP),
    "sinabs ALIF, default": (lambda: sinabs.layers.ALIF(2.0, 5.0), WHOLE),
    "sinabs ALIF": (lambda: sinabs.layers.ALIF(2.0, 5.0, reset_fn=MembraneReset()), WHOLE),
    "sinabs ALIF, tau_syn": (
        lambda: sinabs.layers.ALIF(2.0, 5.0, 3.0, reset_fn=MembraneSubtract(0.5), record_states=True), WHOLE,
    ),
    "sinabs ExpLeak": (lambda: sinabs.layers.ExpLeak(2.0), WHOLE),
    "sinabs ExpLeakSqueeze": (lambda: sinabs.layers.ExpLeakSqueeze(tau_mem=2.0, batch_size=3), STEP),
}  # fmt: skip


def authors_layer(steps, p=0.0, surrogate=authors_code.InvSigmoid, **options):
    return authors_code.LIFLayer(steps, spike_fn=authors_code.EfficientNoisySpikeII(surrogate(), p=p), **options)


def flat(value):
    """All tensors in a nested output."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, (tuple, list)) else []


def reset(model):
    """Resets other libraries' layers, by the layers' own methods."""
    for module in model.modules():
        if isinstance(module, sinabs.layers.StatefulLayer):
            module.reset_states()
        elif isinstance(module, snntorch.SpikingNeuron):
            if module.init_hidden:
                module.reset_mem()
        elif hasattr(module, "reset") and not isinstance(module, asgl_cuda.layer.NeuronLayer):
            module.reset()


# ---- layers ----


class Trace:
    """A layer's record of several calls: all tensors are [calls * T, ...], `h` is the potential before reset."""

    def __init__(self, s, v, h, grads):
        self.s, self.v, self.h, self.grads = s, v, h, grads


def trace(layer, run, x, grads):
    """Calls `run(layer, x)`, which returns s, v and h, for each of `x`; the layer keeps its state."""
    leaves = [each.clone().requires_grad_() for each in x]
    parts = [run(layer, leaf) for leaf in leaves]
    s, v, h = (torch.cat(values) for values in zip(*parts, strict=True))
    loss = (s * grads[0]).sum() + (v * grads[1]).sum()
    parameters = [value for _, value in sorted(layer.named_parameters()) if value.requires_grad]
    return Trace(s.detach(), v.detach(), h, torch.autograd.grad(loss, [*leaves, *parameters]))


def close(ours, theirs):
    return bool(((ours - theirs).abs() <= TOLERANCE * theirs.abs().max().clamp(min=1)).all())


def check(make, run, threshold=1.0, scale=1.0, dead_parameters=False, several=False):
    """Compares a layer with its conversion: spikes equal, unless both potentials are at the threshold within rounding.

    With `several`, spikes may flip at every multiple of the threshold.

    A flipped spike changes everything after the flip, so an input with a flip is only checked for the flip.
    """
    for seed in range(6):
        torch.manual_seed(seed)
        x = [scale * torch.randn(SHAPE) for _ in range(CALLS)]
        grads = torch.randn(2, CALLS * SHAPE[0], *SHAPE[1:])
        layer = make()
        converted, report = asgl_cuda.convert(make(), inplace=True)
        assert [row.path for row in report.replaced] == [""], report
        assert type(converted) is not type(layer)
        assert isinstance(converted, type(layer))
        theirs, ours = trace(layer, run, x, grads), trace(converted, run, x, grads)
        flips = ours.s != theirs.s
        if flips.any():
            first = flips & (flips.cumsum(0) == 1)
            nearest = ((theirs.h / threshold).round() * threshold) if several else threshold
            distance = torch.maximum((theirs.h - nearest).abs(), (ours.h - nearest).abs())
            assert (distance[first] < THRESHOLD_BAND).all(), "a spike differs away from the threshold"
            continue
        assert 0.02 < (theirs.s != 0).float().mean() < 0.98
        assert (theirs.s.max() > 1) == several
        assert close(ours.v, theirs.v)
        assert len(ours.grads) == len(theirs.grads)
        for number, (our, their) in enumerate(zip(ours.grads, theirs.grads, strict=True)):
            assert their.abs().max() > 0 or (number >= CALLS and dead_parameters)
            assert close(our, their), f"gradient {number} differs by {(our - their).abs().max()}"
        return
    raise AssertionError("spikes flipped for every seed")


def steps(layer, x_seq, hand_on=True):
    """The outputs of single steps, each stacked; states go to the next step."""
    results, states = [], ()
    for x in x_seq:
        results.append(layer(x, *states))
        states = results[-1][1:] if hand_on else ()
    return [torch.stack(values) for values in zip(*results, strict=True)]


def norse_run(layer, x_seq):
    """A cell, or a layer that records states; the current, if any, is added to the potential."""
    state, p = getattr(layer, "kept", None), layer.p
    if isinstance(layer, norse.module.snn.SNNCell):
        start, results = layer.initial_state(x_seq[0]) if state is None else state, []
        for x in x_seq:
            results.append(layer(x, state))
            state = results[-1][1]
        s, states = map(list, zip(*results, strict=True))
        s, states = torch.stack(s), type(state)(*map(torch.stack, zip(*states, strict=True)))
    else:
        start = layer.initial_state(x_seq) if state is None else state
        s, states = layer(x_seq, state)
    layer.kept = type(states)(*(each[-1] for each in states))
    before = {name: torch.cat([getattr(start, name).expand(x_seq.shape[1:])[None], getattr(states, name)[:-1]])
              for name in states._fields}  # fmt: skip
    current = x_seq + before.get("i", 0)
    charged = layer.dt * p.tau_mem_inv * (current + p.v_leak - before["v"]) if hasattr(p, "v_leak") else current
    return s, sum(states), (before["v"] + charged).detach()


def assert_same(make, call, x, options=()):
    """Outputs, and gradients of x and of parameters, of a layer that does not fire and of its conversion."""
    layer, (converted, report) = make(), asgl_cuda.convert(make(), **dict(options))
    assert [row.by for row in report.replaced] == ["leaky_integrator"], report
    results = []
    for each in (layer, converted):
        leaf = x.clone().requires_grad_()
        outputs = call(each, leaf)
        weighted = [(out * torch.arange(1.0, 1 + out.numel()).reshape(out.shape).cos()).sum() for out in outputs]
        leaves = [leaf, *(value for value in each.parameters() if value.requires_grad)]
        results.append([*outputs, *torch.autograd.grad(sum(weighted), leaves)])
    for ours, theirs in zip(*results[::-1], strict=True):
        assert theirs.any()
        assert ours.shape == theirs.shape
        assert close(ours, theirs), (ours - theirs).abs().max()
    return converted


# ---- models ----


def losses(model, scores_of, steps=4):
    """The losses of a short training on one batch of 6 samples in 3 classes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(steps):
        reset(model)
        optimizer.zero_grad()
        loss = cross_entropy(scores_of(model), torch.arange(6) % 3)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    assert found[-1] != found[0]
    return torch.stack(found)


def train_alike(model, scores_of, layers, left=()):
    """The losses agree until rounding flips a spike, which these seeds do not show."""
    converted, report = asgl_cuda.convert(model)
    assert (len(report.replaced), [row.layer for row in report.left]) == (layers, list(left))
    torch.testing.assert_close(losses(converted, scores_of), losses(model, scores_of), rtol=1e-4, atol=1e-5)


def on(model, backend):
    """All layers of neurons on one backend."""
    for module in model.modules():
        if isinstance(module, asgl_cuda.LIF):
            module.backend = backend
        elif isinstance(module, Converted):
            module.settings = module.settings._replace(backend=backend)
    return model


def monitored(model, x_seq, layer):
    """What a Monitor says of a layer, over one call with the noise of seed 0."""
    torch.manual_seed(0)
    with asgl_cuda.Monitor(model) as monitor:
        model(x_seq)
    return monitor.result()[layer]


def scattered(model):
    """The model with normalisations that are not the identity."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.3), ("running_var", 0.5)):
                    if getattr(module, name) is not None:
                        getattr(module, name).uniform_(low, low + 1.5)
    return model


def history(model, x_seq, call=None):
    """The outputs, gradients and buffers of two calls in training and one in evaluation."""
    found = {}
    for number, training in enumerate((True, True, False)):
        torch.manual_seed(number)
        model.train(training)
        model.zero_grad()
        x = x_seq.clone().requires_grad_()
        out = model(x) if call is None else call(model, x)
        if out.requires_grad:  # not in evaluation of the authors' code
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(number))).sum().backward()
        found |= {f"output {number}": out.detach(), f"x.grad {number}": x.grad}
        found |= {f"{name}.grad {number}": value.grad for name, value in model.named_parameters()}
        found |= {f"{name} {number}": value.clone() for name, value in model.named_buffers() if "mem" not in name}
        if call is not None:
            reset(model)
    return found


def assert_same_sums(found, expected):
    """Equal histories up to roundings of float32, where sums are in another order.

    A sum rounds as its terms, and gradients of a call have terms of the largest's size: 1e-5 of it are some hundred
    roundings. The gradient of a bias in front of a normalisation is such a sum, whose true value is 0.
    """
    for name, value in expected.items():
        summed = [each.abs().max() for key, each in expected.items() if key[-7:] == name[-7:] and each is not None]
        size = max(summed) if ".grad " in name else value.abs().max()
        assert (found[name] - value).abs().max() <= 1e-5 * size, name


def assert_alike(model, x_seq, pairs, backend, call=None):
    """The fused and the unfused model give the results of the model that is only converted.

    The model itself differs where `convert` finds the width of a surrogate inexactly.
    """
    scattered(model)
    classes = [type(module) for module in model.modules()]
    fused, report = asgl_cuda.fuse(model, x_seq)
    assert (len(report.replaced), report.left) == (pairs, []), report
    assert len([module for module in fused.modules() if isinstance(module, Fused)]) == pairs
    on(fused, backend)
    expected = history(on(asgl_cuda.convert(model)[0], backend), x_seq, call)
    assert 0.02 < expected["output 1"].count_nonzero() / expected["output 1"].numel() < 0.98
    torch.testing.assert_close(history(fused, x_seq, call), expected, rtol=1e-9, atol=1e-11)
    original = {name: value for name, value in history(copy.deepcopy(model), x_seq, call).items() if value is not None}
    found = {name: expected[name] for name in original}
    torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert list(fused.state_dict()) == list(model.state_dict())
    back, report = asgl_cuda.unfuse(asgl_cuda.fuse(model, x_seq)[0])
    assert len([row for row in report.replaced if row.layer.startswith("Fused")]) == pairs
    assert [type(module) for module in back.modules()] == classes
    back = on(asgl_cuda.convert(back)[0], backend)
    torch.testing.assert_close(history(back, x_seq, call), expected, rtol=1e-9, atol=1e-11)


def reasons(model, *example):
    _, report = asgl_cuda.fuse(model, *example)
    return {row.path: row.reason for row in report.left}
