"""Memory of training steps: bytes kept for backward, peak, and time, with spikes kept and recomputed.

A VGG-like network, eight blocks of a convolution and `BatchNormLIF`, for several lengths, a spiking ResNet-18 of
SpikingJelly, and the networks of linear layers of `end_to_end`. `asgl_cuda.recompute_spikes` is compared with torch's
activation checkpointing of each VGG block and, for the ResNet, with SpikingJelly's neurons, with and without its memory
optimisation of level 1. Where the neurons are the same, gradients are first compared for equality. All variants take
turns within each repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda

from .networks import MLP, SPEECH, Training, measure_steps, resnet18, vgg

BATCH = 8
LENGTHS = (4, 8, 16)
KEPT, RECOMPUTED, CHECKPOINTED = "asgl_cuda", "asgl_cuda, recompute_spikes", "asgl_cuda, activation checkpointing"
SPIKINGJELLY, OPTIMISED = "SpikingJelly", "SpikingJelly, memopt level 1"


class Checkpointed(nn.Module):
    """A block under torch's activation checkpointing, which stores only the block's input for backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_seq: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.block, x_seq, use_reentrant=False)
        return result


class Case:
    """The variants of a network. Each is made only when it is measured."""

    def __init__(self, shape: tuple[int, ...], ours: Callable[[], nn.Module]) -> None:
        self.shape = shape
        self.makers = {KEPT: ours, RECOMPUTED: lambda: asgl_cuda.recompute_spikes(ours())}


def spiking_resnet() -> Case:
    from spikingjelly.activation_based import memopt, neuron, surrogate

    shape = (4, BATCH, 3, 64, 64)

    def theirs() -> nn.Module:
        return resnet18(lambda: neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True))

    def optimised() -> nn.Module:
        example = torch.rand(shape)
        return memopt.optimize_memory(  # type: ignore[no-any-return]
            theirs(), neuron.LIFNode, example_forward=lambda model: model(example), level=1
        )

    case = Case(shape, lambda: asgl_cuda.fuse(asgl_cuda.convert(theirs())[0], torch.zeros(1, 1, *shape[2:]))[0])
    case.makers |= {SPIKINGJELLY: theirs, OPTIMISED: optimised}
    return case


def cases() -> dict[str, Case]:
    found = {f"VGG, T = {length}": Case((length, BATCH, 3, 32, 32), vgg) for length in LENGTHS}
    for case in found.values():
        case.makers[CHECKPOINTED] = lambda: vgg(Checkpointed)
    for name, network in {"MLP": MLP, "speech": SPEECH}.items():
        steps, batch, _ = network.input_shape
        found[f"{name}, T = {steps}, batch {batch}"] = Case(network.input_shape, partial(network.make, asgl_cuda.LIF))
    return found | ({"spiking_resnet18, T = 4": spiking_resnet()} if find_spec("spikingjelly") else {})


def measure(name: str, case: Case, device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """Measures the bytes kept for backward, the peak and the median seconds of each variant."""
    trainings = {}
    for variant, make in case.makers.items():
        torch.manual_seed(0)
        trainings[variant] = Training(make(), case.shape, device)
    expected = trainings[KEPT].gradients()
    for variant in (RECOMPUTED, CHECKPOINTED):
        if variant in trainings and not all(map(torch.equal, expected, trainings[variant].gradients())):
            raise RuntimeError(f"{name}: {variant} has other gradients")
    return measure_steps(trainings, repeats)


def rows(name: str, found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The rows of a network: kept bytes, peak and time of each variant, also as fractions of the first variant's."""
    base = found[KEPT]
    table = []
    for variant, each in found.items():
        cells = [f"{each['kept_bytes'] / 1e6:.0f} MB", f"{each['peak_bytes'] / 1e6:.0f} MB"]
        cells.append(f"{1e3 * each['seconds']:.0f} ms")
        shares = (each[key] / base[key] for key in ("kept_bytes", "peak_bytes", "seconds"))
        table.append([f"{name}: {variant}", *map("{}, {:.2f}".format, cells, shares)])
    return table


HEAD = ["", "kept", "peak", "step"]


def measurements(report: dict[str, Any], device: torch.device, repeats: int) -> Iterator[str]:
    """Measures every network."""
    report |= {"batch": BATCH, "networks": {}}
    for name, case in cases().items():
        report["networks"][name] = measure(name, case, device, repeats)
        yield name
