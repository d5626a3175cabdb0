"""Training steps of four networks with exchanged neuron layers: time, its distribution over layers, and memory.

A step is forward, loss, backward and optimiser. All variants take turns within each repeat; the median is reported.
Shares of layers come from a separate run under the profiler: hooks of every layer open a range in forward and in
backward. `asgl_cuda.fuse` fuses batch normalisation and the sums of residual blocks with neurons; before a fused
network is timed, its losses are compared with the unfused network's. SpikingJelly's ResNet-18 is converted, too.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import OverTime

from ..common import device_of, fused_backends, in_words, parser_of, text_row, write_json
from .clocks import allocated_bytes, in_turns, keep_memory, peak_bytes, silence, spread
from .microbench import MOST_STEPS_TO_COMPILE
from .peers import machine_and_peers, spiking_resnet18, spikingjelly_node

ANALOG_PROB = 0.2
NEURONS, PRODUCTS, NORMALISATION, REST = "neuron layers", "convolutions and linear", "normalisation", "the rest"
CATEGORIES = (NEURONS, PRODUCTS, NORMALISATION)
PROFILED_STEPS = 20
FUSED_BLOCK = ", fused block"  # suffix of a variant whose neurons normalise
COMPARED_STEPS = 3
COMPARED_BATCH = 4
# Losses are compared in float64: fusion changes roundings, and a single other spike changes all that follows. In
# float32, other spikes occur within a few steps, in float64 none. Other noise changes a loss by at least 1e-4.
LOSS_TOLERANCE = 1e-9

MakeNeuron = Callable[[], nn.Module]


# ---- networks ----


def mlp(neuron: MakeNeuron) -> nn.Sequential:
    """Four layers of 512 neurons."""
    layers: list[nn.Module] = []
    for inputs in (784, 512, 512, 512):
        layers += [OverTime(nn.Linear(inputs, 512)), neuron()]
    return nn.Sequential(*layers, OverTime(nn.Linear(512, 10)))


def convolutional(neuron: MakeNeuron) -> nn.Sequential:
    """VGG-like convolutions with batch normalisation, on images of 32 x 32."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)):
        if inputs in (32, 64) and inputs != outputs:
            layers.append(OverTime(nn.AvgPool2d(2)))
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [OverTime(convolution), OverTime(nn.BatchNorm2d(outputs)), neuron()]
    return nn.Sequential(*layers, OverTime(nn.AvgPool2d(8)), OverTime(nn.Flatten()), OverTime(nn.Linear(128, 10)))


def speech(neuron: MakeNeuron) -> nn.Sequential:
    """Three layers of 256 neurons over the frames of a word, without recurrence."""
    layers: list[nn.Module] = []
    for inputs in (700, 256, 256):
        layers += [OverTime(nn.Linear(inputs, 256)), neuron()]
    return nn.Sequential(*layers, OverTime(nn.Linear(256, 20)))


class Network(NamedTuple):
    """A network and the shape of its data."""

    make: Callable[[MakeNeuron], nn.Module]
    input_shape: tuple[int, ...]  # [T, B, ...]
    classes: int
    left: int = 0  # normalisations without neurons of their own


NETWORKS = {
    "MLP": Network(mlp, (8, 128, 784), 10),
    "convolutional": Network(convolutional, (4, 32, 3, 32, 32), 10),
    "speech": Network(speech, (100, 64, 700), 20),
}
if find_spec("spikingjelly") is not None:
    NETWORKS["ResNet-18"] = Network(partial(spiking_resnet18, classes=10), (4, 8, 3, 64, 64), 10, left=3)


# ---- neurons ----


def asgl(backend: str) -> nn.Module:
    return asgl_cuda.LIF(analog_prob=ANALOG_PROB, backend=backend)


def plain(backend: str) -> nn.Module:
    return asgl_cuda.LIF(learn_width=False, analog_prob=0.0, backend=backend)


class Variant(NamedTuple):
    """The neurons of a network."""

    name: str
    neuron: MakeNeuron
    fused: bool = False  # with the normalisations
    converted: str | None = None  # to this backend


def variants(network: Network, device: torch.device) -> Iterator[Variant]:
    """The neuron of ASGL in every implementation; then the ordinary neuron, which SpikingJelly has as well."""
    yield Variant("reference", lambda: asgl("reference"))
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in network.make(nn.Identity).modules())
    residual = network.left > 0
    if network.input_shape[0] <= MOST_STEPS_TO_COMPILE and not residual:  # more layers than Dynamo compiles anew
        yield Variant("torch.compile", lambda: torch.compile(asgl("reference"), fullgraph=True, dynamic=False))
    for backend in fused_backends(device):
        yield Variant(f"asgl_cuda {backend}", lambda backend=backend: asgl(backend))
        if normalised:
            yield Variant(f"asgl_cuda {backend}{FUSED_BLOCK}", lambda backend=backend: asgl(backend), fused=True)
    for backend in fused_backends(device):
        yield Variant(f"LIF: asgl_cuda {backend}", lambda backend=backend: plain(backend))
    try:
        spikingjelly_node()
    except ImportError:
        return
    yield Variant("LIF: SpikingJelly", spikingjelly_node)
    for backend in fused_backends(device) if residual else ():
        name = f"LIF: SpikingJelly, converted {backend}"
        yield Variant(name, spikingjelly_node, converted=backend)
        yield Variant(f"{name}{FUSED_BLOCK}", spikingjelly_node, fused=True, converted=backend)


# ---- a step ----


class Training:
    """A network, its data and its optimiser."""

    def __init__(
        self,
        network: Network,
        neuron: MakeNeuron,
        device: torch.device,
        fused: bool = False,
        dtype: torch.dtype = torch.float32,
        converted: str | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.model = network.make(neuron).to(device, dtype)
        if converted:
            asgl_cuda.convert(self.model, inplace=True, backend=converted)
        self._x_seq = torch.rand(network.input_shape, device=device, dtype=dtype)
        if fused:
            _, report = asgl_cuda.fuse(self.model, self._x_seq, inplace=True)
            if len(report.left) != network.left:
                raise RuntimeError(f"not all of the network is fused:\n{report}")
        self.device = device
        self._labels = torch.randint(network.classes, network.input_shape[1:2], device=device)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def clear(self) -> None:
        """Frees what the last step left: gradients and SpikingJelly's states."""
        self._optimizer.zero_grad()
        for layer in self.model.modules():
            if hasattr(layer, "store_v_seq"):
                layer.reset()

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.model(self._x_seq).mean(0), self._labels)

    def step(self) -> Tensor:
        """Trains once; returns the prior loss."""
        self.clear()
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def peak_bytes(self) -> int:
        """The peak of a step's allocations; freed inside, older gradients would count as less."""
        self.clear()
        return peak_bytes(self.step, self.device)

    def kept_bytes(self) -> int:
        """The bytes that forward leaves for backward."""
        self.clear()
        return allocated_bytes(self.loss, self.device)[1]

    def seconds(self) -> float:
        started = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def check_losses(network: Network, device: torch.device) -> list[str]:
    """Compares losses with and without fusion; returns the names of fused variants."""
    steps, _, *sizes = network.input_shape
    network = network._replace(input_shape=(steps, COMPARED_BATCH, *sizes))

    def losses(variant: Variant) -> Tensor:  # with the same noise: a Training seeds the generator
        training = Training(network, variant.neuron, device, variant.fused, torch.float64, variant.converted)
        return torch.stack([training.step() for _ in range(COMPARED_STEPS)])

    found = {variant.name: variant for variant in variants(network, device)}
    names = [name for name, variant in found.items() if variant.fused]
    for name in names:
        ours, theirs = losses(found[name]), losses(found[name.removesuffix(FUSED_BLOCK)])
        if not torch.allclose(ours, theirs, rtol=LOSS_TOLERANCE, atol=0):
            raise RuntimeError(f"{name} has losses of {ours.tolist()} where they are {theirs.tolist()} without fusing")
    return names


# ---- shares of layers ----


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


def category(layer: nn.Module) -> str:
    inner = layer.layer if isinstance(layer, OverTime) else layer
    if isinstance(inner, (nn.Linear, nn.Conv2d)):
        return PRODUCTS
    if isinstance(inner, nn.BatchNorm2d):
        return NORMALISATION
    return REST if isinstance(inner, (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Flatten)) else NEURONS


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a chain or of a residual network."""
    for layer in model.children():
        if isinstance(layer, nn.Sequential) or hasattr(layer, "downsample"):
            yield from layers_of(layer)
        else:
            yield layer


def shares(training: Training) -> dict[str, float]:
    """The share of each category in the time of a step."""
    ranges = Ranges()
    for layer in layers_of(training.model):
        ranges.watch(layer, category(layer))

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
    averages = {event.key: event for event in profile.key_averages()}

    def total(name: str) -> float:
        event = averages.get(name)
        return 0.0 if event is None else float(event.device_time_total if cuda else event.cpu_time_total)

    found = {name: total(name) / total("step") for name in CATEGORIES}
    return {**found, REST: 1 - sum(found.values())}


# ---- measurement ----


def measure(network: Network, device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a step, their spread, the shares of layers, peak and kept memory, by variant."""
    trainings = {
        each.name: Training(network, each.neuron, device, each.fused, converted=each.converted)
        for each in variants(network, device)
    }
    for training in trainings.values():
        for _ in range(2):
            training.seconds()  # compiles, loads
    seconds = in_turns({name: training.seconds for name, training in trainings.items()}, repeats)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "spread": spread(seconds[name]),
            "peak_bytes": training.peak_bytes(),
            "kept_bytes": training.kept_bytes(),
            "shares": shares(training),
        }
        for name, training in trainings.items()
    }


def table(name: str, network: Network, found: dict[str, dict[str, Any]]) -> str:
    """The measurements of a network as text."""
    lines = [f"{name}, {list(network.input_shape)}"]
    head = ("step, ms", "+-", "faster", "neurons", "products", "norm", "rest", "peak, MB", "kept, MB")
    lines.append(text_row("", head, 42, 10))
    slowest = found["reference"]["seconds"]
    for variant, each in found.items():
        cells = [f"{1e3 * each['seconds']:.1f}", f"{100 * each['spread']:.0f} %", f"{slowest / each['seconds']:.1f}"]
        cells += [f"{100 * share:.0f} %" for share in each["shares"].values()]
        cells += [f"{each[key] / 1e6:.0f}" for key in ("peak_bytes", "kept_bytes")]
        lines.append(text_row(variant, cells, 42, 10))
    return "\n".join((*lines, ""))


def main() -> int:
    """Measures all networks and prints a table for each."""
    parser = parser_of("benchmarks.speed.end_to_end", __doc__, "device", "repeats", "json")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="only these")
    arguments = parser.parse_args()
    device = device_of(parser, arguments.device)
    keep_memory()
    about = machine_and_peers(device)
    print(f"{in_words(about)}; medians of {arguments.repeats} training steps")
    print("faster: than with the reference; shares of the step by the profiler")
    print("peak: allocated during a step; kept: left by forward")
    print("fused block: normalisation and neurons in one, by asgl_cuda.fuse; their share is the sum")
    print("LIF: without noise and learned width, as SpikingJelly has it\n", flush=True)
    report: dict[str, Any] = {"machine": about, "networks": {}}
    for name in arguments.networks:
        network = NETWORKS[name]
        for checked in check_losses(network, device):
            print(f"{checked}: the losses of the first {COMPARED_STEPS} steps are those without fusion")
        found = measure(network, device, arguments.repeats)
        print(table(name, network, found), flush=True)
        report["networks"][name] = {"input_shape": network.input_shape, "variants": found}
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
