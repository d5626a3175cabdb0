"""The benchmark of whole training steps: shares are those of their layers, and measuring changes no result."""

import math
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda import OverTime
from benchmarks.speed import end_to_end
from benchmarks.speed.end_to_end import NEURONS, NORMALISATION, PRODUCTS, REST, Network, Training

CPU = torch.device("cpu")


class Clock:
    """A profiler on a clock that slow layers advance."""

    def __init__(self):
        self.now = 0
        self.totals = Counter()

    @contextmanager
    def record_function(self, name):
        started = self.now
        yield
        self.totals[name] += self.now - started

    @contextmanager
    def profile(self, **_):
        self.totals.clear()
        yield self

    def key_averages(self):
        return [SimpleNamespace(key=name, cpu_time_total=total) for name, total in self.totals.items()]


CLOCK = Clock()


class Slow(torch.autograd.Function):
    """The identity: three times as slow backward as forward."""

    @staticmethod
    def forward(ctx, x):
        CLOCK.now += 1
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        CLOCK.now += 3
        return grad


class SlowNeuron(nn.Module):
    """A slow layer without parameters."""

    def forward(self, x):
        return Slow.apply(x)


class SlowNorm(nn.BatchNorm2d):
    """A slow normalisation."""

    def forward(self, x):
        return Slow.apply(super().forward(x))


def small(neuron):
    return nn.Sequential(OverTime(nn.Linear(3, 4)), neuron(), OverTime(nn.Linear(4, 2)))


def normalised(neuron):
    first = OverTime(nn.Conv2d(1, 2, 1)), OverTime(SlowNorm(2)), neuron()
    return nn.Sequential(*first, OverTime(nn.Flatten()), OverTime(nn.Linear(8, 2)))


def block(neuron):
    first = OverTime(nn.Conv2d(1, 8, 3)), OverTime(nn.BatchNorm2d(8)), neuron()
    return nn.Sequential(*first, OverTime(nn.Flatten()), OverTime(nn.Linear(8 * 6 * 6, 2)))


BLOCK = Network(block, (2, 5, 1, 8, 8), 2)


def test_shares_of_slow_layers(monkeypatch):
    monkeypatch.setattr(torch.profiler, "record_function", CLOCK.record_function)
    monkeypatch.setattr(torch.profiler, "profile", CLOCK.profile)
    nothing = dict.fromkeys(end_to_end.CATEGORIES, 0)
    for network, shape, neuron, expected in (
        (small, (2, 5, 3), SlowNeuron, {NEURONS: 1}),
        (normalised, (2, 5, 1, 2, 2), SlowNeuron, {NEURONS: 0.5, NORMALISATION: 0.5}),
        (normalised, (2, 5, 1, 2, 2), nn.Identity, {NORMALISATION: 1}),
    ):
        found = end_to_end.shares(Training(Network(network, shape, 2), neuron, CPU))
        assert found == {**nothing, REST: 0, **expected}


@pytest.mark.parametrize("fused", [False, True])
def test_ranges_change_no_result(fused):
    network = BLOCK if fused else end_to_end.NETWORKS["convolutional"]._replace(input_shape=(2, 2, 3, 32, 32))
    plain, ranged = (Training(network, lambda: end_to_end.plain("reference"), CPU, fused) for _ in range(2))
    assert {PRODUCTS, NORMALISATION, NEURONS, REST} == set(end_to_end.shares(ranged))
    for _ in range(1 + end_to_end.PROFILED_STEPS):
        plain.step()
    for ours, theirs in zip(plain.model.parameters(), ranged.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


needs_kernels = pytest.mark.skipif("cpu" not in end_to_end.fused_backends(CPU), reason="no CPU kernels")


def test_peak_has_the_gradients():
    """Older gradients, freed in the step, are not counted as less."""
    training = Training(Network(small, (1, 1, 3), 2), lambda: nn.Linear(4, 2**18, bias=False), CPU)
    training.model[2] = OverTime(nn.Linear(2**18, 2))
    for _ in range(2):
        training.step()
        gradients = 4 * 2**18 * 4  # bytes of the large layer's
        assert training.peak_bytes() > gradients


@needs_kernels
@pytest.mark.skipif("ResNet-18" not in end_to_end.NETWORKS, reason="no SpikingJelly")
def test_shares_of_a_residual_network(monkeypatch):
    monkeypatch.setattr(end_to_end, "PROFILED_STEPS", 1)
    network = end_to_end.NETWORKS["ResNet-18"]._replace(input_shape=(2, 2, 3, 32, 32))
    for fused in (False, True):
        found = end_to_end.shares(Training(network, lambda: end_to_end.asgl("cpu"), CPU, fused))
        assert sum(found.values()) == pytest.approx(1)
        assert min(found.values()) > 0


def test_fused_blocks_train_as_unfused_ones():
    names = [f"asgl_cuda {backend}, fused block" for backend in end_to_end.fused_backends(CPU)]
    assert end_to_end.check_losses(BLOCK, CPU) == names
    assert [each.name for each in end_to_end.variants(BLOCK, CPU) if each.fused] == names
    assert not [each for each in end_to_end.variants(end_to_end.NETWORKS["MLP"], CPU) if each.fused]


@needs_kernels
@pytest.mark.parametrize("wrong", [{"eps": 2e-5}, {"analog_prob": 0.25}, {"width": 1.1}])
def test_other_blocks_are_refused(monkeypatch, wrong):
    def fuse(model, *example, inplace):
        fused, report = asgl_cuda.fuse(model, *example, inplace=inplace)
        for layer in model.modules():
            for name, value in wrong.items():
                if name == "width" and isinstance(layer, asgl_cuda.LIF):
                    layer.log_width.data.fill_(math.log(value))
                elif name in vars(layer) or isinstance(getattr(type(layer), name, None), property):
                    setattr(layer, name, value)
        return fused, report

    monkeypatch.setattr(end_to_end, "asgl_cuda", SimpleNamespace(fuse=fuse, LIF=asgl_cuda.LIF))
    with pytest.raises(RuntimeError, match=r"^asgl_cuda .*, fused block has losses of \[.*\] without fusing$"):
        end_to_end.check_losses(BLOCK, CPU)


def test_a_network_without_fusion_is_refused():
    with pytest.raises(RuntimeError, match=r"^not all of the network is fused:\n0 replaced, 1 left"):
        Training(Network(normalised, (2, 5, 1, 2, 2), 2), SlowNeuron, CPU, fused=True)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "ResNet-18" else []) for name in end_to_end.NETWORKS],
)
def test_networks_train_with_every_neuron(name):
    network = end_to_end.NETWORKS[name]
    network = network._replace(input_shape=(3, 2, *network.input_shape[2:]))
    for variant, neuron, fused, converted in end_to_end.variants(network, CPU):
        if variant == "torch.compile":
            continue
        training = Training(network, neuron, CPU, fused, converted=converted)
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        training.step()
        training.step()  # state of one sequence must not leak into the next
        changed = [not torch.equal(ours, old) for ours, old in zip(training.model.parameters(), before, strict=True)]
        assert changed[-1], variant
