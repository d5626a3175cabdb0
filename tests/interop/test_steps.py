"""Layers that take a step a call: conversion must not cost more than it saves, eager or compiled."""

import norse.torch as norse
import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch._dynamo.testing import CompileCounter

import asgl_cuda

MECHANISMS = ("subtract", "zero", "none")
LEARNED = {"learn_beta": True, "learn_threshold": True}


def leaky(how, **fixed):
    return lambda **given: snntorch.Leaky(0.8, reset_mechanism=how, **fixed, **given)


SNNTORCH = {
    **{f"Leaky, {how}": leaky(how) for how in MECHANISMS},
    **{f"Leaky, {how}, at once": leaky(how, reset_delay=False) for how in MECHANISMS},
    "Leaky, learned": leaky("subtract", **LEARNED),
    "Leaky, by neuron": lambda **given: snntorch.Leaky(torch.linspace(0.3, 0.9, 5), threshold=torch.ones(5), **given),
    "Lapicque": lambda **given: snntorch.Lapicque(R=1.0, C=4.5, **given),
    "Lapicque, none": lambda **given: snntorch.Lapicque(R=0.5, C=3.0, reset_mechanism="none", **given),
    "Synaptic": lambda **given: snntorch.Synaptic(alpha=0.7, beta=0.8, **given),
    "Synaptic, none": lambda **given: snntorch.Synaptic(alpha=0.7, beta=0.8, reset_mechanism="none", **given),
    "Synaptic, learned": lambda **given: snntorch.Synaptic(0.7, 0.8, learn_alpha=True, **LEARNED, **given),
}
STEPS = {
    **SNNTORCH,
    **{f"{name}, hidden": lambda make=make: make(init_hidden=True) for name, make in SNNTORCH.items()},
    **{name: getattr(norse, name) for name in ("LIFCell", "LIFBoxCell", "IAFCell", "LSNNCell")},
    "LIFCell, learned": lambda: learned_cell(),
    **{name: getattr(neuron, name) for name in ("IFNode", "LIFNode", "ParametricLIFNode", "CUBALIFNode")},
}


def learned_cell():
    """Norse keeps parameters wherever the user does."""
    tau = nn.Parameter(torch.tensor(400.0))
    cell = norse.LIFCell(norse.LIFParameters(tau_mem_inv=tau))
    cell.tau = tau
    return cell


def run(layer, x_seq, call=None):
    """Outputs and last states of a sequence from rest; `call` is called instead of the layer."""
    call = layer if call is None else call
    if isinstance(layer, snntorch.SpikingNeuron):
        layer.reset_mem()
    else:
        functional.reset_net(layer)
    states, out = (), []
    for x in x_seq:
        result = call(x, *states)
        s, *found = result if isinstance(result, tuple) else (result,)
        states = found
        out.append(s)
    if isinstance(layer, norse.module.snn.SNNCell):
        states = states[0]
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
    return 2 * torch.randn(steps, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.get_default_dtype())


def compiled(layer):
    torch.compiler.reset()
    counter = CompileCounter()
    return torch.compile(layer, backend=counter), counter


# The remaining layers share the forward of one of these.
COMPILED = (
    "Leaky, subtract", "Leaky, subtract, hidden", "Leaky, zero, at once, hidden", "Leaky, learned, hidden",
    "Lapicque, hidden", "Synaptic", "Synaptic, hidden", "LIFCell", "LIFBoxCell", "IAFCell", "LSNNCell", "LIFNode",
    "CUBALIFNode",
)  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiler_sees_no_more(name, training):
    """As many graphs and operations as before: a compiled step is faster than a kernel between the steps."""
    counts = []
    for layer in (STEPS[name](), asgl_cuda.convert(STEPS[name]())[0]):
        call, counter = compiled(layer)
        for _ in range(3):
            if training:
                with_gradients(layer, currents(), call)
            else:
                with torch.no_grad():
                    run(layer, currents(), call)
        counts.append((counter.frame_count, counter.op_count))
    assert counts[1] == counts[0]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_eager_and_before_are_the_same(name, in_double):
    """Compiled and eager steps may alternate: compilation for training only, or between two steps."""
    layer, converted = STEPS[name](), asgl_cuda.convert(STEPS[name]())[0]
    call, _ = compiled(converted)
    turns = iter((call, converted) * 3)
    expected = with_gradients(layer, currents())
    assert 0 < expected[0].mean() < 1
    for each in (None, call, lambda *args: next(turns)(*args)):
        # snnTorch's spikes are float32 whatever the input.
        torch.testing.assert_close(with_gradients(converted, currents(), each), expected, check_dtype=False)


@pytest.mark.parametrize("name", ["Leaky, subtract, hidden", "Synaptic", "LIFCell", "LIFNode"])
def test_asgl_layers_are_compiled(name):
    asgl = {"surrogate": "triangle", "width": 3.0, "analog_prob": 1.0}
    layer, _ = asgl_cuda.convert(STEPS[name](), asgl=asgl)
    call, counter = compiled(layer)
    for _ in range(3):
        ours, theirs = with_gradients(layer, currents(), call), with_gradients(layer, currents())
        assert ((ours[0] > 0) & (ours[0] < 1)).any()
        torch.testing.assert_close(ours, theirs)
        assert ours[-1].any()  # gradient of the width
    # The output is carried from step to step beside the potential.
    assert counter.frame_count <= 6


def test_a_backend_that_was_asked_for_is_compiled(monkeypatch):
    layer = asgl_cuda.convert(snntorch.Leaky(0.8, init_hidden=True), backend="reference")[0]
    call, _ = compiled(layer)
    torch.testing.assert_close(with_gradients(layer, currents(), call), with_gradients(layer, currents()))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not layer.steps_as_before()


# A call on tiny inputs takes 20 to 30 us, mostly in Python: 50 to 150 calls more without steps.py's stored calls.


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


CHANGES = {
    "by a number": lambda layer, name: setattr(layer, name, getattr(layer, name) * 0.5),
    "in place": lambda layer, name: getattr(layer, name).mul_(0.5),
    "behind the version": lambda layer, name: getattr(layer, name).data.mul_(0.5),
}
CHANGED = {
    SNNTORCH["Leaky, subtract"]: ("threshold", "beta"),
    SNNTORCH["Leaky, by neuron"]: ("threshold", "beta"),
    lambda: snntorch.Lapicque(R=0.5, C=3.0, time_step=0.8): ("threshold", "R", "C", "time_step"),
    SNNTORCH["Synaptic"]: ("threshold", "alpha", "beta"),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize(("make", "name"), [(make, name) for make, names in CHANGED.items() for name in names])
def test_values_that_change_between_two_steps(make, name, how):
    if how == "behind the version" and make is SNNTORCH["Leaky, by neuron"]:
        pytest.skip("what was kept of a tensor by neuron holds until its version tells of a change")
    results = []
    for layer in (make(), asgl_cuda.convert(make())[0]):
        layer(currents()[0])
        state = layer(currents()[1])[1:]
        CHANGES[how](layer, name)
        results.append([*layer(currents()[2], *state), *layer(currents()[3], *state)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("how", ["in place", "behind the version", "another"])
@pytest.mark.parametrize("name", ["tau_mem_inv", "tau_syn_inv", "v_th", "v_leak", "v_reset"])
def test_values_of_norse_that_change_between_two_steps(name, how):
    given = {"tau_mem_inv": 400.0, "tau_syn_inv": 300.0, "v_th": 0.6, "v_leak": 0.1, "v_reset": -0.2}
    results = []
    for convert in (False, True):
        layer = norse.LIFCell(norse.LIFParameters(**{key: torch.tensor(value) for key, value in given.items()}))
        layer = asgl_cuda.convert(layer)[0] if convert else layer
        _, state = layer(currents()[0])
        _, state = layer(currents()[1], state)
        if how == "another":
            layer.p = layer.p._replace(**{name: getattr(layer.p, name) * 0.5})
        else:
            value = getattr(layer.p, name)
            (value if how == "in place" else value.data).mul_(0.5)
        s, state = layer(currents()[2], state)
        results.append([s, *state])
        layer.dt *= 0.5
        results[-1].append(layer(currents()[3], state)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["Leaky, subtract", "Leaky, zero, at once", "Synaptic", "LIFCell"])
def test_one_neuron_without_dimensions(name):
    layer, converted = STEPS[name](), asgl_cuda.convert(STEPS[name]())[0]
    x_seq = currents()[:, 0, 0]
    torch.testing.assert_close(with_gradients(converted, x_seq), with_gradients(layer, x_seq))
