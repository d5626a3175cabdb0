"""Training steps of networks with exchanged neuron layers: time, the share of the neurons, and memory.

A step is forward, loss, backward and optimiser. All variants take turns within each repeat; the median is reported.
The share comes from a separate run under the profiler: hooks of every layer open a range in forward and in
backward. `asgl_cuda.fuse` fuses batch normalisation and the sums of residual blocks with neurons; before a fused
network is timed, its losses are compared with the unfused network's. SpikingJelly's ResNet-18 is converted, too. The
share of recurrent layers includes the products of their recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import LIF, OverTime, RecurrentLIF

from ..common import fused_backends
from .clocks import silence
from .microbench import ANALOG_PROB, MOST_STEPS_TO_COMPILE
from .networks import NETWORKS, MakeNeuron, Network, Training, measure_steps
from .peers import RLeaky, spikingjelly_node

NEURONS, REST = "neuron layers", "the rest"
OTHERS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Flatten)
PROFILED_STEPS = 4  # the events of a recurrent loop take 0.7 GB a step
FUSED_BLOCK = ", fused block"  # suffix of a variant whose neurons normalise
COMPARED_STEPS = 3
COMPARED_BATCH = 4
# Losses are compared in float64: fusion changes roundings, and a single other spike changes all that follows. In
# float32, other spikes occur within a few steps, in float64 none. Other noise changes a loss by at least 1e-4.
LOSS_TOLERANCE = 1e-9


class Variant(NamedTuple):
    """The neurons of a network."""

    name: str
    neuron: MakeNeuron
    fused: bool = False  # with the normalisations
    converted: str | None = None  # to this backend


def variants(network: Network, device: torch.device) -> Iterator[Variant]:
    """The neuron of ASGL in every implementation; then the ordinary neuron, which another library has as well."""
    backends, residual = fused_backends(device), network.left > 0
    layer = partial(RecurrentLIF, network.recurrent) if network.recurrent else LIF
    asgl = {backend: partial(layer, analog_prob=ANALOG_PROB, backend=backend) for backend in (*backends, "reference")}
    yield Variant("reference", asgl["reference"])
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in network.make(nn.Identity).modules())
    if network.input_shape[0] <= MOST_STEPS_TO_COMPILE and not residual:  # more layers than Dynamo compiles anew
        yield Variant("torch.compile", lambda: torch.compile(asgl["reference"](), fullgraph=True, dynamic=False))
    for backend in backends:
        yield Variant(f"asgl_cuda {backend}", asgl[backend])
        if normalised:
            yield Variant(f"asgl_cuda {backend}{FUSED_BLOCK}", asgl[backend], fused=True)
    for backend in backends:
        yield Variant(f"LIF: asgl_cuda {backend}", partial(layer, learn_width=False, analog_prob=0.0, backend=backend))
    name = "snnTorch" if network.recurrent else "SpikingJelly"
    peer: MakeNeuron = partial(RLeaky, network.recurrent) if network.recurrent else spikingjelly_node
    try:
        peer()
    except ImportError:
        return
    yield Variant(f"LIF: {name}", peer)
    for backend in backends if residual else ():
        name = f"LIF: SpikingJelly, converted {backend}"
        yield Variant(name, spikingjelly_node, converted=backend)
        yield Variant(f"{name}{FUSED_BLOCK}", spikingjelly_node, fused=True, converted=backend)


def training_of(
    network: Network, variant: Variant, device: torch.device, dtype: torch.dtype = torch.float32
) -> Training:
    torch.manual_seed(0)
    model = network.make(variant.neuron)
    if variant.converted:
        asgl_cuda.convert(model, inplace=True, backend=variant.converted)
    training = Training(model, network.input_shape, device, dtype)
    if variant.fused:
        _, report = asgl_cuda.fuse(model, training.x_seq, inplace=True)
        if len(report.left) != network.left:
            raise RuntimeError(f"not all of the network is fused:\n{report}")
    return training


def check_losses(network: Network, device: torch.device) -> list[str]:
    """Compares losses with and without fusion; returns the names of fused variants."""
    steps, _, *sizes = network.input_shape
    network = network._replace(input_shape=(steps, COMPARED_BATCH, *sizes))

    def losses(variant: Variant) -> Tensor:
        training = training_of(network, variant, device, torch.float64)
        return torch.stack([training.step() for _ in range(COMPARED_STEPS)])

    found = {variant.name: variant for variant in variants(network, device)}
    names = [name for name, variant in found.items() if variant.fused]
    for name in names:
        ours, theirs = losses(found[name]), losses(found[name.removesuffix(FUSED_BLOCK)])
        if not torch.allclose(ours, theirs, rtol=LOSS_TOLERANCE, atol=0):
            raise RuntimeError(f"{name} has losses of {ours.tolist()} where they are {theirs.tolist()} without fusing")
    return names


# ---- the share of the neurons ----


class Ranges:
    """The profiler's open range, one at most: what follows a layer, such as a sum, counts as of the layer."""

    def __init__(self) -> None:
        self._open: Any = None

    def watch(self, layer: nn.Module, name: str) -> None:
        """Opens a range in forward and in backward, which the next layer's range ends."""

        def after(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.end()
            if type(output) is Tensor and output is not inputs[0]:  # else the neurons compute it
                output.register_hook(lambda grad: self.begin(name))

        layer.register_forward_pre_hook(lambda *_: self.begin(name))
        layer.register_forward_hook(after)

    def begin(self, name: str) -> None:
        self.end()
        self._open = torch.profiler.record_function(name)
        self._open.__enter__()

    def end(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def computes_spikes(layer: nn.Module) -> bool:
    return not isinstance(layer.layer if isinstance(layer, OverTime) else layer, OTHERS)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a chain or of a residual network."""
    for layer in model.children():
        if isinstance(layer, nn.Sequential) or hasattr(layer, "downsample"):
            yield from layers_of(layer)
        else:
            yield layer


def share_of_neurons(training: Training) -> float:
    """The share of the neuron layers in the time of a step; in a fused block it includes the normalisation."""
    ranges = Ranges()
    for layer in layers_of(training.model):
        ranges.watch(layer, NEURONS if computes_spikes(layer) else REST)

    def step() -> None:
        training.step()
        ranges.end()  # the range of the first layer

    step()
    cuda = training.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    with silence(), torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_STEPS):
            with torch.profiler.record_function("step"):
                step()
        if cuda:
            torch.cuda.synchronize()
    events = {event.key: event for event in profile.key_averages()}
    neurons, whole = (getattr(events[key], f"{'device' if cuda else 'cpu'}_time_total") for key in (NEURONS, "step"))
    return float(neurons / whole)


# ---- measurement ----


def measurements(report: dict[str, Any], device: torch.device, repeats: int) -> Iterator[str]:
    """Every network, once the losses of its first steps are those without fusion."""
    report["networks"] = {}
    for name, network in NETWORKS.items():
        check_losses(network, device)
        trainings = {each.name: training_of(network, each, device) for each in variants(network, device)}
        found = measure_steps(trainings, repeats)
        for variant, training in trainings.items():
            found[variant]["shares"] = {NEURONS: share_of_neurons(training)}
        report["networks"][name] = {"input_shape": list(network.input_shape), "variants": found}
        yield name
