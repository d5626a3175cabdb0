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


def close(ours, theirs):
    return bool(((ours - theirs).abs() <= TOLERANCE * theirs.abs().max().clamp(min=1)).all())


def results(layer, run, x, training):
    """Outputs of several calls with states carried over, and all gradients."""
    layer.double().train(training)
    leaves = [each.clone().requires_grad_() for each in x]
    outputs = [output for leaf in leaves for output in run(layer, leaf)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in outputs]
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    leaves += [value for _, value in sorted(layer.named_parameters()) if value.requires_grad]
    return [each.detach() for each in outputs], torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_equal(make, by, run, shape, scale=2.0, wrap=None, fires=True, modes=(True, False), rtol=1e-12):
    """The layer converts, described as `by`: equal spikes, outputs and gradients of several calls within `rtol`."""
    layer, (converted, report) = make(), asgl_cuda.convert(make(), inplace=True)
    assert len(report.replaced) == 1, report
    assert by in (None, report.replaced[0].by)
    assert isinstance(converted, type(layer))
    assert list(converted.state_dict()) == list(layer.state_dict())
    for training in modes:
        torch.manual_seed(0)
        x = [scale * (torch.randn(shape, dtype=torch.float64) + 0.3) for _ in range(CALLS)]
        theirs, their_grads = results(layer, run, x, training)
        ours, our_grads = results(wrap(converted) if wrap else converted, run, x, training)
        if fires and by != "leaky_integrator":
            assert 0.02 < (theirs[0] != 0).double().mean() < 0.98
            assert torch.equal(ours[0], theirs[0])
        for our, their in zip((*ours, *our_grads), (*theirs, *their_grads), strict=True):
            assert (our is None) == (their is None)
            if their is not None:
                assert our.dtype is their.dtype
                torch.testing.assert_close(our, their, rtol=rtol, atol=rtol * max(1, float(their.abs().max())))
        assert all(each is not None and each.any() for each in their_grads[:CALLS])
        for each in (layer, converted):
            reset(each)
            vars(each).pop("kept", None)


def steps(layer, x_seq, hand_on=True):
    """The outputs of single steps, each stacked; states go to the next step."""
    results, states = [], ()
    for x in x_seq:
        results.append(layer(x, *states))
        states = results[-1][1:] if hand_on else ()
    return [torch.stack(values) for values in zip(*results, strict=True)]


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
