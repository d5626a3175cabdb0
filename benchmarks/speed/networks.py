"""Networks whose training steps are measured, and the measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from asgl_cuda import BatchNormLIF, OverTime

from ..learning.recipe.networks import VGG
from .clocks import allocated_bytes, in_turns

CLASSES = 10
MakeNeuron = Callable[[], nn.Module]


class Network(NamedTuple):
    """A network and the shape of its data."""

    make: Callable[[MakeNeuron], nn.Module]
    input_shape: tuple[int, ...]  # [T, B, ...]
    left: int = 0  # normalisations without neurons of their own
    recurrent: int = 0  # neurons of each layer, if recurrent


def fully_connected(inputs: int, hidden: Sequence[int]) -> Callable[[MakeNeuron], nn.Module]:
    def make(neuron: MakeNeuron) -> nn.Module:
        layers: list[nn.Module] = []
        for pair in pairwise((inputs, *hidden)):
            layers += [OverTime(nn.Linear(*pair)), neuron()]
        return nn.Sequential(*layers, OverTime(nn.Linear(hidden[-1], CLASSES)))

    return make


def convolutional(neuron: MakeNeuron) -> nn.Module:
    """VGG-like convolutions with batch normalisation, on images of 32 x 32."""
    return VGG((32, 32, "A", 64, 64, "A", 128, 128, "AA"), 1, 3, CLASSES, neuron)


def vgg(wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> nn.Module:
    """Eight blocks of a convolution and BatchNormLIF, each wrapped."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise((3, 32, 32, 64, 64, 128, 128, 128, 128))):
        convolution = OverTime(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers.append(wrap(nn.Sequential(convolution, BatchNormLIF(outputs))))
        if number in (1, 3, 5):
            layers.append(OverTime(nn.AvgPool2d(2)))
    return nn.Sequential(*layers, nn.Flatten(2), nn.Linear(128 * 16, CLASSES))


def resnet18(neuron: MakeNeuron) -> nn.Module:
    """SpikingJelly's, with these neurons."""
    from spikingjelly.activation_based import functional as jelly
    from spikingjelly.activation_based.model import spiking_resnet

    model: nn.Module = spiking_resnet.spiking_resnet18(spiking_neuron=neuron, num_classes=CLASSES)
    jelly.set_step_mode(model, "m")
    return model


MLP = Network(fully_connected(784, (512,) * 4), (8, 128, 784))
SPEECH = Network(fully_connected(700, (256,) * 3), (100, 64, 700))  # the frames of a word
NETWORKS = {
    "MLP": MLP,
    "convolutional": Network(convolutional, (4, 32, 3, 32, 32)),
    "speech": SPEECH,
    "recurrent speech": SPEECH._replace(recurrent=256),
}
if find_spec("spikingjelly") is not None:
    NETWORKS["ResNet-18"] = Network(resnet18, (4, 8, 3, 64, 64), left=3)


class Training:
    """A network, its data and its optimiser; weights, data and noise are the same for all of a kind."""

    def __init__(
        self, model: nn.Module, input_shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.device = model.to(device, dtype), device
        generator = torch.Generator(device).manual_seed(0)
        self.x_seq = torch.rand(input_shape, device=device, dtype=dtype, generator=generator)
        self._labels = torch.randint(CLASSES, input_shape[1:2], device=device, generator=generator)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def clear(self) -> None:
        """Frees what the last step left, gradients and SpikingJelly's states: freed inside, it would count as less."""
        self._optimizer.zero_grad()
        for layer in self.model.modules():
            if hasattr(layer, "store_v_seq"):
                layer.reset()

    def loss(self) -> Tensor:
        torch.manual_seed(1)
        return functional.cross_entropy(self.model(self.x_seq).mean(0), self._labels)

    def step(self) -> Tensor:
        """Trains once; returns the prior loss."""
        self.clear()
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        self.clear()
        self.loss().backward()
        return [each.grad for each in self.model.parameters() if each.grad is not None]

    def allocated_bytes(self) -> dict[str, int]:
        """The peak of a step, and what forward leaves for backward; states keep alive a graph without backward."""
        self.clear()
        peak, _ = allocated_bytes(self.step, self.device)
        self.clear()
        _, kept = allocated_bytes(self.loss, self.device)
        return {"peak_bytes": peak, "kept_bytes": kept}

    def seconds(self) -> float:
        started = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def measure_steps(trainings: dict[str, Training], repeats: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a step, their spread, peak and kept memory, of trainings that take turns."""
    for training in trainings.values():
        for _ in range(2):
            training.seconds()  # compiles, loads
    times = in_turns({name: training.seconds for name, training in trainings.items()}, repeats)
    return {
        name: {"seconds": times[name].median, "spread": times[name].spread, **training.allocated_bytes()}
        for name, training in trainings.items()
    }
