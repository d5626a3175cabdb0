"""Trainings of thirty steps have the same losses by the reference, fused, and with layers of each library."""

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from comparison import Stack
from conversions import SINGLE, reset
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn.functional import cross_entropy

import asgl_cuda
from asgl_cuda.neurons.over_time import OverTime

T, B, FEATURES, HIDDEN, CLASSES, STEPS = 6, 30, 8, 16, 3, 30
FAST = norse.LIFParameters(tau_mem_inv=torch.tensor(600.0), v_th=torch.tensor(0.3))
# Losses that differ in the order of sums alone stay this close, relatively. A spike that rounding flips would move them
# by 1e-4 and more.
SAME = 1e-8
# bfloat16 rounds products to 2^-9; a gradient of a parameter that differs in the last place of float32 may round apart.
ROUNDED = 2e-3


def residual(net, x_seq):
    """A residual network, [T, B, FEATURES] to [B, CLASSES]."""
    s_seq = net.lif1(net.first(x_seq))
    s_seq = net.lif2(net.second(s_seq) + s_seq)
    return net.read_out(s_seq).mean(0)


def linear(inputs):
    return OverTime(nn.Sequential(nn.Linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN)))


def spikes_alone(layer):
    """A layer that returns its state, too."""
    return Stack(lambda net, x_seq: net.layer(x_seq)[0], layer=layer)


def batch_first(layer):
    """A layer that takes [B, T, ...]; sinabs returns float32."""
    return Stack(lambda net, x_seq: net.layer(x_seq.transpose(0, 1)).transpose(0, 1).double(), layer=layer)


def step_by_step(layer, members):
    """A layer that takes and returns the states of a step; snnTorch returns float32."""

    def forward(net, x_seq):
        states, spikes = (torch.zeros_like(x_seq[0]),) * members, []
        for x in x_seq:
            spike, *states = net.layer(x, *states)
            spikes.append(spike.double())
        return torch.stack(spikes)

    return Stack(forward, layer=layer)


def losses(model, **autocast):
    """Those of a training that lowers them by a fifth."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(B) % CLASSES
    centres = torch.randn(CLASSES, FEATURES, dtype=torch.float64, generator=generator)
    noise = torch.randn(T, B, FEATURES, dtype=torch.float64, generator=generator)
    x_seq = (centres[labels] + noise).to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for step in range(STEPS):
        torch.manual_seed(step)  # of the noise
        reset(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", enabled=bool(autocast), **autocast):
            loss = cross_entropy(model(x_seq).float() if autocast else model(x_seq), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    assert torch.stack(found[-3:]).mean() < 0.8 * found[0], found
    return torch.stack(found)


def network(neurons, dtype=torch.float64):
    """The network with the weights of seed 0."""
    torch.manual_seed(0)
    parts = {"first": linear(FEATURES), "second": linear(HIDDEN), "lif1": neurons(), "lif2": neurons()}
    return Stack(residual, **parts, read_out=nn.Linear(HIDDEN, CLASSES)).to(dtype)


def ours(backend=None, **options):
    return asgl_cuda.LIF(width=2.0, decay=0.6, learn_decay=True, backend=backend, **options)


def recurrent(backend=None):
    return asgl_cuda.RecurrentLIF(HIDDEN, width=2.0, syn_decay=0.3, analog_prob=0.2, backend=backend)


def adaptive(backend=None):
    return asgl_cuda.AdaptiveLIF(width=2.0, analog_prob=0.2, backend=backend)


@pytest.mark.parametrize("neurons", [ours, recurrent, adaptive])
def test_the_reference(neurons):
    expected = losses(network(lambda: neurons("reference")))
    torch.testing.assert_close(losses(network(neurons)), expected, rtol=SAME, atol=0)


def test_fused_normalisations():
    model = network(ours)
    fused, report = asgl_cuda.fuse(model, torch.rand(T, B, FEATURES, dtype=torch.float64))
    assert (len(report.replaced), report.left) == (2, [])
    torch.testing.assert_close(losses(fused), losses(model), rtol=SAME, atol=0)


# Neurons, and how many of the two normalisations `fuse` joins.
LIBRARIES = {
    "SpikingJelly": (lambda: neuron.LIFNode(step_mode="m"), 2),
    "snnTorch": (lambda: step_by_step(snntorch.Leaky(beta=0.6), 1), 0),
    "snnTorch, recurrent": (
        lambda: step_by_step(snntorch.RLeaky(beta=0.6, linear_features=HIDDEN), 2), 0,
    ),
    "Norse": (lambda: spikes_alone(norse.LIF(FAST)), 0),
    "Norse, recurrent": (lambda: spikes_alone(norse.LIFRecurrent(HIDDEN, HIDDEN, FAST)), 0),
    "sinabs": (lambda: batch_first(sinabs.layers.LIF(3.0, **SINGLE)), 2),
}  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
def test_layers_of_libraries(library):
    make, joined = LIBRARIES[library]
    expected = losses(network(make))
    converted, report = asgl_cuda.convert(network(make))
    assert (len(report.replaced), report.left) == (2, [])
    torch.testing.assert_close(losses(converted), expected, rtol=SAME, atol=0)
    fused, report = asgl_cuda.fuse(network(make), torch.rand(T, B, FEATURES, dtype=torch.float64))
    assert len([row for row in report.replaced if "normalises" in row.by]) == joined, report
    torch.testing.assert_close(losses(fused), expected, rtol=SAME, atol=0)


def test_autocast():
    """With a rectangle, whose spikes and gradients have the reference's bits: bfloat16 multiplies every difference."""
    rectangle = {"surrogate": "rectangle"}
    expected = losses(network(lambda: ours("reference", **rectangle), torch.float32), dtype=torch.bfloat16)
    found = losses(network(lambda: ours(**rectangle), torch.float32), dtype=torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=ROUNDED, atol=0)


def test_compiled():
    expected = losses(network(ours))
    found = losses(torch.compile(network(ours), backend="aot_eager"))
    torch.testing.assert_close(found, expected, rtol=SAME, atol=0)
