"""Layers that take a step a call: conversion must not cost more than it saves, eager or compiled."""

import norse.torch as norse
import pytest
import snntorch
import torch
from conversions import STEP, N, leaky
from spikingjelly.activation_based import neuron
from torch._dynamo.testing import CompileCounter

import asgl_cuda


def handed_on(**options):
    return lambda: leaky(**{"init_hidden": False, "output": False, **options})


SYNAPTIC = {"kind": "Synaptic", "alpha": 0.7, "threshold": 1.0}
STEPS = {
    "Leaky": handed_on(),
    "Leaky, zero, at once": handed_on(reset_mechanism="zero", reset_delay=False),
    "Leaky, learned, hidden": lambda: leaky(learn_beta=True, learn_threshold=True, output=False),
    "Leaky, by neuron": lambda: snntorch.Leaky(torch.linspace(0.3, 0.9, N), threshold=torch.ones(N)),
    "Lapicque": handed_on(kind="Lapicque", beta=False, R=0.5, C=3.0, time_step=0.8),
    "Synaptic": handed_on(**SYNAPTIC),
    "Synaptic, hidden": lambda: leaky(**SYNAPTIC, output=False),
    "LIFCell": norse.LIFCell, "IAFCell": norse.IAFCell, "LIFBoxCell": norse.LIFBoxCell,
    "LIFNode": neuron.LIFNode, "CUBALIFNode": neuron.CUBALIFNode,
}  # fmt: skip


def run(layer, x_seq, call=None):
    """Outputs and last states of a sequence from rest; `call` is called instead of the layer."""
    asgl_cuda.reset(layer)
    call = layer if call is None else call
    states, out = (), []
    for x in x_seq:
        s, *states = found if isinstance(found := call(x, *states), tuple) else (found,)
        out.append(s)
    if isinstance(layer, norse.module.snn.SNNCell):
        (states,) = states
    elif not states:
        states = [layer.mem if isinstance(layer, snntorch.SpikingNeuron) else layer.v]
    return [torch.stack(out), *states]


def with_gradients(layer, x_seq, call=None):
    leaf = x_seq.clone().requires_grad_()
    results = run(layer, leaf, call)
    total = sum((each * torch.arange(1.0, 1 + each.numel()).reshape(each.shape).cos()).sum() for each in results)
    parameters = [value for value in layer.parameters() if value.requires_grad]
    return [*results, *torch.autograd.grad(total, [leaf, *parameters], allow_unused=True)]


def currents(steps=6):
    dtype = torch.get_default_dtype()
    return 2 * torch.randn(steps, *STEP, generator=torch.Generator().manual_seed(0), dtype=dtype)


def compiled(layer):
    torch.compiler.reset()
    counter = CompileCounter()
    return torch.compile(layer, backend=counter), counter


# The remaining layers share the forward of one of these.
COMPILED = ("Leaky, learned, hidden", "Synaptic", "LIFCell", "LIFNode")


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiler_sees_no_more(name, in_double):
    """As many graphs and operations as before: a compiled step is faster than a kernel between the steps.

    Compiled and eager steps may alternate: compilation for training only, or between two steps.
    """
    layer, converted = STEPS[name](), asgl_cuda.convert(STEPS[name]())[0]
    expected, counts = with_gradients(STEPS[name](), currents()), []
    assert 0 < expected[0].mean() < 1
    for made in (layer, converted):
        call, counter = compiled(made)
        for _ in range(2):
            found = with_gradients(made, currents(), call)
        # snnTorch's spikes are float32 whatever the input.
        torch.testing.assert_close(found, expected, check_dtype=False)
        with torch.no_grad():
            run(made, currents(), call)
        counts.append((counter.frame_count, counter.op_count))
    assert counts[1] == counts[0]
    turns = iter((call, converted) * 3)
    for each in (None, lambda *args: next(turns)(*args)):
        torch.testing.assert_close(with_gradients(converted, currents(), each), expected, check_dtype=False)


def test_asgl_layers_are_compiled():
    layer, _ = asgl_cuda.convert(STEPS["LIFCell"](), asgl={"surrogate": "triangle", "width": 3.0, "analog_prob": 1.0})
    call, counter = compiled(layer)
    for _ in range(2):
        ours, theirs = with_gradients(layer, currents(), call), with_gradients(layer, currents())
        assert ((ours[0] > 0) & (ours[0] < 1)).any()
        torch.testing.assert_close(ours, theirs)
        assert ours[-1].any()  # gradient of the width
    # The output is carried from step to step beside the potential.
    assert counter.frame_count <= 6


def test_a_backend_that_was_asked_for_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for options, own in (({}, True), ({"backend": "reference"}, False)):
        layer, _ = asgl_cuda.convert(snntorch.Leaky(0.8, init_hidden=True), **options)
        assert layer.prefers_original_step() == own


@pytest.mark.parametrize("name", ["LIFRecurrentCell", "container, a step"])
def test_steps_without_noise_are_the_librarys_own(name, monkeypatch):
    """Which are faster than a kernel's call; with `asgl` or a backend they are not."""
    from conversions import RECURRENT, T
    from conversions import run as run_case

    module, calls, original = asgl_cuda.interop.recurrent, [], asgl_cuda.interop.recurrent.recurrent_lif
    monkeypatch.setattr(module, "recurrent_lif", lambda *x, **o: calls.append(1) or original(*x, **o))
    make, _, shape, *_ = RECURRENT[name]
    for options, times in (({}, 0), ({"backend": "reference"}, T), ({"asgl": {}}, T)):
        calls.clear()
        run_case(asgl_cuda.convert(make(), **options)[0].float(), torch.rand(T, *shape))
        assert len(calls) == times


@pytest.mark.parametrize("name", STEPS)
def test_inference_mode(name):
    """Inference tensors have no version counter that would show a change."""
    layer, converted = STEPS[name](), asgl_cuda.convert(STEPS[name]())[0]
    with torch.no_grad():
        expected = run(layer, currents())
    with torch.inference_mode():
        torch.testing.assert_close(run(converted, currents()), expected)
        made_there = asgl_cuda.convert(STEPS[name]())[0]
        torch.testing.assert_close(run(made_there, currents()), expected)
    torch.testing.assert_close(run(converted, currents()), expected)


@pytest.mark.parametrize("change", ["nothing", "in place", "another"])
def test_a_noisy_step_resets_by_what_it_emitted(change):
    """A potential from elsewhere by comparison."""
    options = {"surrogate": "triangle", "width": 1.0, "analog_prob": 1.0}
    layer, _ = asgl_cuda.convert(snntorch.Leaky(beta=0.5), asgl=options)
    s, mem = layer(2 * torch.rand(300))
    assert ((s > 0) & (s < 1)).any()
    before = mem.detach().clone()
    if change == "in place":
        mem.detach_().add_(0.0)
    _, after = layer(torch.zeros(300), before if change == "another" else mem)
    torch.testing.assert_close(after, 0.5 * before - (s if change == "nothing" else (before > 1).to(s)))
