"""Memory of training steps: bytes kept for backward, peak, and time, with spikes kept and recomputed.

A VGG-like network, eight blocks of a convolution and `BatchNormLIF`, for several lengths, a spiking ResNet-18 of
SpikingJelly, and the networks of linear layers of `end_to_end`. `asgl_cuda.recompute_spikes` is compared with torch's
activation checkpointing of each VGG block and, for the ResNet, with SpikingJelly's neurons, with and without its memory
optimisation of level 1. Where the neurons are the
same, gradients are first compared for equality. All variants take turns within each repeat.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import BatchNormLIF, OverTime

from ..common import device_of, in_words, parser_of, text_row, write_json
from .clocks import allocated_bytes, in_turns, keep_memory, spread
from .end_to_end import NETWORKS
from .peers import machine_and_peers, spiking_resnet18

BATCH, CLASSES = 8, 10
LENGTHS = (4, 8, 16)
KEPT, RECOMPUTED, CHECKPOINTED = "asgl_cuda", "asgl_cuda, recompute_spikes", "asgl_cuda, activation checkpointing"
LINEAR = {
    f"{name}, T = {network.input_shape[0]}, batch {network.input_shape[1]}": network
    for name, network in NETWORKS.items()
    if name not in ("convolutional", "ResNet-18")  # the others stand for them
}
SPIKINGJELLY, OPTIMISED = "SpikingJelly", "SpikingJelly, memopt level 1"


class Checkpointed(nn.Module):
    """A block that keeps only its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_seq: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.block, x_seq, use_reentrant=False)
        return result


def vgg(wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = (3, 32, 32, 64, 64, 128, 128, 128, 128)
    for number, (inputs, outputs) in enumerate(pairwise(channels)):
        convolution = OverTime(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers.append(wrap(nn.Sequential(convolution, BatchNormLIF(outputs))))
        if number in (1, 3, 5):
            layers.append(OverTime(nn.AvgPool2d(2)))
    return nn.Sequential(*layers, nn.Flatten(2), nn.Linear(128 * 16, CLASSES))


def resnet18() -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    return spiking_resnet18(lambda: neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True), CLASSES)


def with_ours(model: nn.Module) -> nn.Module:
    converted, _ = asgl_cuda.convert(model)
    fused, _ = asgl_cuda.fuse(converted)
    return fused


class Training:
    """A model with its data; all variants begin with the same weights."""

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...], device: torch.device) -> None:
        torch.manual_seed(0)
        self._model = make().to(device)
        self._x_seq = torch.rand(shape, device=device)
        self._device = device

    def clear(self) -> None:
        """Frees gradients and SpikingJelly's states: inside a measured call that would count as less."""
        self._model.zero_grad()
        for layer in self._model.modules():
            if hasattr(layer, "store_v_seq"):
                layer.reset()

    def forward(self) -> Tensor:
        torch.manual_seed(1)
        scores: Tensor = self._model(self._x_seq)
        return scores.mean(0).square().sum()

    def step(self) -> list[Tensor | None]:
        self.forward().backward()
        return [parameter.grad for parameter in self._model.parameters()]

    def seconds(self) -> float:
        self.clear()
        started = time.perf_counter()
        self.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def trainings(name: str, device: torch.device) -> dict[str, Training]:
    """The variants of a network."""
    if name.startswith("VGG"):
        shape = (int(name.split("= ")[1]), BATCH, 3, 32, 32)
        makers: dict[str, Callable[[], nn.Module]] = {
            KEPT: vgg,
            RECOMPUTED: lambda: asgl_cuda.recompute_spikes(vgg()),
            CHECKPOINTED: lambda: vgg(Checkpointed),
        }
    elif name in LINEAR:
        network = LINEAR[name]
        shape = network.input_shape
        makers = {
            KEPT: lambda: network.make(asgl_cuda.LIF),
            RECOMPUTED: lambda: asgl_cuda.recompute_spikes(network.make(asgl_cuda.LIF)),
        }
    else:
        from spikingjelly.activation_based import memopt, neuron

        shape = (4, BATCH, 3, 64, 64)
        example = torch.rand(shape, device=device)
        makers = {
            KEPT: lambda: with_ours(resnet18()),
            RECOMPUTED: lambda: asgl_cuda.recompute_spikes(with_ours(resnet18())),
            SPIKINGJELLY: resnet18,
            OPTIMISED: lambda: memopt.optimize_memory(
                resnet18().to(device), neuron.LIFNode, example_forward=lambda model: model(example), level=1
            ),
        }
    return {variant: Training(make, shape, device) for variant, make in makers.items()}


def networks() -> list[str]:
    found = [*(f"VGG, T = {length}" for length in LENGTHS), *LINEAR]
    try:
        resnet18()
    except ImportError:
        return found
    return [*found, "spiking_resnet18, T = 4"]


def measure(name: str, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Bytes kept, peak and median seconds of each variant."""
    found = trainings(name, device)
    expected = found[KEPT].step()
    for variant in (RECOMPUTED, CHECKPOINTED):
        if variant in found:
            gradients = found[variant].step()
            if not all(torch.equal(*each) for each in zip(expected, gradients, strict=True) if each[0] is not None):
                raise RuntimeError(f"{name}: {variant} has other gradients")
    for training in found.values():
        training.seconds()
    seconds = in_turns({variant: training.seconds for variant, training in found.items()}, repeats)
    report = {}
    for variant, training in found.items():
        training.clear()
        peak, _ = allocated_bytes(training.step, device)  # first: states keep alive a graph without backward
        training.clear()
        _, kept = allocated_bytes(training.forward, device)
        report[variant] = {
            "seconds": statistics.median(seconds[variant]),
            "spread": spread(seconds[variant]),
            "kept_bytes": kept,
            "peak_bytes": peak,
        }
    return report


def table(name: str, found: dict[str, dict[str, float]]) -> str:
    lines = [text_row(name, ("kept, MB", "peak, MB", "step, ms", "kept", "peak", "step"), 38, 10)]
    base = found[KEPT]
    for variant, each in found.items():
        cells = [f"{each[key] / 1e6:.0f}" for key in ("kept_bytes", "peak_bytes")] + [f"{1e3 * each['seconds']:.0f}"]
        cells += [f"{each[key] / base[key]:.2f}" for key in ("kept_bytes", "peak_bytes", "seconds")]
        lines.append(text_row(variant, cells, 38, 10))
    return "\n".join((*lines, ""))


def main() -> int:
    """Measures every network and prints a table for each."""
    parser = parser_of("benchmarks.speed.memory", __doc__, "device", "repeats", "json")
    arguments = parser.parse_args()
    device = device_of(parser, arguments.device)
    keep_memory()
    about = machine_and_peers(device)
    print(f"{in_words(about)}; medians of {arguments.repeats}; the last three columns: as a share of the first row\n")
    report: dict[str, Any] = {"machine": about, "batch": BATCH, "networks": {}}
    for name in networks():
        report["networks"][name] = measure(name, device, arguments.repeats)
        print(table(name, report["networks"][name]), flush=True)
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
