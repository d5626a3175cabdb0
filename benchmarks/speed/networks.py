"""Networks whose training steps are measured, and the measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import BatchNormLIF, OverTime

from ..learning.recipe.networks import VGG, ResNet
from .clocks import allocated_bytes, in_turns

CLASSES = 10
# Factor on weights that multiply spikes. With it about one element in ten is a spike in every layer.
GAIN = 2.5
ATTENTION_SCALE = 0.13  # 1 / 8, but for sums of spikes that would be the threshold, where neurons of libraries differ
STREAMED_STEPS = 100
MakeNeuron = Callable[..., nn.Module]  # without arguments; of recurrent layers, with the weights of input and spikes


class Network(NamedTuple):
    """A network and the shape of its data."""

    make: Callable[[MakeNeuron], nn.Module]
    input_shape: tuple[int, ...]  # [T, B, ...]
    left: int = 0  # normalisations without neurons of their own
    kind: str = "LIF"  # of the neurons in PEERS


def orthogonal(inputs: int, outputs: int, first: bool) -> Tensor:
    """A weight `[outputs, inputs]`."""
    return nn.init.orthogonal_(torch.empty(outputs, inputs), gain=1.0 if first else GAIN)


def fully_connected(inputs: int, hidden: Sequence[int], make_neuron: MakeNeuron) -> nn.Module:
    layers: list[nn.Module] = []
    for pair in pairwise((inputs, *hidden)):
        linear = nn.Linear(*pair)
        linear.weight.data = orthogonal(*pair, first=not layers)
        layers += [OverTime(linear), make_neuron()]
    return nn.Sequential(*layers, OverTime(nn.Linear(hidden[-1], CLASSES)))


def recurrent(inputs: int, hidden: Sequence[int], make_neuron: MakeNeuron) -> nn.Module:
    """Layers of recurrent neurons, whose own weights are drawn as RecurrentLIF draws them."""
    weights = []  # drawn first: neurons of some libraries draw numbers of their own
    for before, count in pairwise((inputs, *hidden)):
        weight = torch.empty(count, count).uniform_(-(count**-0.5), count**-0.5)
        weights.append((orthogonal(before, count, first=not weights), weight))
    last = OverTime(nn.Linear(hidden[-1], CLASSES))
    return nn.Sequential(*(make_neuron(*each) for each in weights), last)


def convolutional(neuron: MakeNeuron) -> nn.Module:
    """VGG-like convolutions with batch normalisation, on images of 32 x 32."""
    return VGG((32, 32, "A", 64, 64, "A", 128, 128, "AA"), 1, 3, CLASSES, neuron)


def residual(channels: Sequence[int], blocks: int, neuron: MakeNeuron) -> nn.Module:
    """A network of stages of residual blocks, for images of 32 x 32."""
    return ResNet(channels, (blocks,) * len(channels), 0, 3, CLASSES, neuron)


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
    """SpikingJelly's spiking ResNet-18 with these neurons."""
    from spikingjelly.activation_based import functional as jelly
    from spikingjelly.activation_based.model import spiking_resnet

    model: nn.Module = spiking_resnet.spiking_resnet18(spiking_neuron=neuron, num_classes=CLASSES)
    jelly.set_step_mode(model, "m")
    return model


class Attention(nn.Module):
    """Spiking self-attention over `[T, B, tokens, features]`: products of spikes, without a softmax."""

    def __init__(self, features: int, heads: int, make_neuron: MakeNeuron) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (spiking_linear(features, features, make_neuron) for _ in range(4))
        self.mixed = make_neuron()

    def forward(self, x_seq: Tensor) -> Tensor:
        q, k, v = (each(x_seq).unflatten(-1, (self.heads, -1)).transpose(2, 3) for each in (self.q, self.k, self.v))
        mixed = q @ (k.transpose(-2, -1) @ v) * ATTENTION_SCALE  # [T, B, heads, tokens, features / heads]
        return self.out(self.mixed(mixed.transpose(2, 3).flatten(-2)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A branch that is added to its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x_seq: Tensor) -> Tensor:
        return x_seq + self.branch(x_seq)  # type: ignore[no-any-return]


class MeanOverTokens(nn.Module):
    """The mean over tokens."""

    def forward(self, x_seq: Tensor) -> Tensor:
        return x_seq.mean(2)


def spiking_linear(inputs: int, outputs: int, make_neuron: MakeNeuron) -> nn.Module:
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = orthogonal(inputs, outputs, first=False)
    return nn.Sequential(linear, make_neuron())


def transformer(inputs: int, features: int, heads: int, make_neuron: MakeNeuron) -> nn.Module:
    """One block of a spiking transformer, as in Spikformer (Zhou et al., ICLR 2023), without normalisations."""
    perceptron = (spiking_linear(*sizes, make_neuron) for sizes in ((features, 4 * features), (4 * features, features)))
    return nn.Sequential(
        spiking_linear(inputs, features, make_neuron),
        Residual(Attention(features, heads, make_neuron)),
        Residual(nn.Sequential(*perceptron)),
        MeanOverTokens(),
        nn.Linear(features, CLASSES),
    )


MLP = Network(partial(fully_connected, 784, (512,) * 4), (8, 128, 784))
SPEECH = Network(partial(fully_connected, 700, (256,) * 3), (100, 64, 700))  # the frames of a word
NETWORKS = {
    "MLP": MLP,
    "convolutional": Network(convolutional, (4, 32, 3, 32, 32)),
    "residual": Network(partial(residual, (32, 64, 128), 1), (4, 32, 3, 32, 32), left=2),
    "ResNet-18": Network(partial(residual, (64, 128, 256, 512), 2), (4, 8, 3, 32, 32), left=3),
    "speech": SPEECH,
    "recurrent speech": Network(partial(recurrent, 700, (256,) * 3), SPEECH.input_shape, kind="recurrent"),
    "transformer": Network(partial(transformer, 48, 256, 8), (4, 16, 64, 48)),  # 8 x 8 patches of 4 x 4 pixels
}


class Training:
    """A network with its data and optimiser. Weights, data and noise depend only on the kind of network."""

    def __init__(
        self, model: nn.Module, input_shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.device = model.to(device, dtype), device
        generator = torch.Generator(device).manual_seed(0)
        self.x_seq = torch.rand(input_shape, device=device, dtype=dtype, generator=generator)
        self._labels = torch.randint(CLASSES, input_shape[1:2], device=device, generator=generator)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def clear(self) -> None:
        """Frees gradients and states of the last step, because freeing them in the next one would lower its bytes."""
        self._optimizer.zero_grad()
        asgl_cuda.reset(self.model)

    def loss(self) -> Tensor:
        torch.manual_seed(1)
        return functional.cross_entropy(self.model(self.x_seq).mean(0), self._labels)

    def step(self) -> Tensor:
        """Takes one training step, and returns the loss before it."""
        self.clear()
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The scores `[B, classes]` in evaluation mode, without gradients."""
        self.model.eval()
        asgl_cuda.reset(self.model)
        scores: Tensor = self.model(self.x_seq).mean(0)
        self.model.train()
        return scores

    @torch.no_grad()
    def stream(self, steps: int = STREAMED_STEPS) -> Tensor:
        """The mean scores of the first sample in evaluation mode, whose time steps repeat, one time step per call."""
        self.model.eval()
        asgl_cuda.reset(self.model)
        sequence = self.x_seq[:, :1]
        scores = [asgl_cuda.step(self.model, sequence[t % len(sequence)]) for t in range(steps)]
        self.model.train()
        return torch.stack(scores).mean(0)

    def gradients(self) -> list[Tensor]:
        self.clear()
        self.loss().backward()
        return [each.grad for each in self.model.parameters() if each.grad is not None]

    def allocated_bytes(self) -> dict[str, int]:
        """The peak of allocated bytes in a step, and the bytes that forward keeps for backward."""
        self.clear()
        peak, _ = allocated_bytes(self.step, self.device)
        self.clear()
        _, kept = allocated_bytes(self.loss, self.device)
        return {"peak_bytes": peak, "kept_bytes": kept}

    def seconds(self, work: Callable[[Training], Tensor] | None = None) -> float:
        """The seconds of a training step, or of other `work`."""
        started = time.perf_counter()
        (work or Training.step)(self)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def measure_steps(trainings: dict[str, Training], repeats: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a step, their spread, peak and kept bytes of each training. The trainings take turns."""
    for training in trainings.values():
        for _ in range(2):
            training.seconds()  # compiles, loads
    times = in_turns({name: training.seconds for name, training in trainings.items()}, repeats)
    return {
        name: {"seconds": times[name].median, "spread": times[name].spread, **training.allocated_bytes()}
        for name, training in trainings.items()
    }
