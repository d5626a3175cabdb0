"""The networks of the paper, `[T, B, C, H, W]` to scores `[T, B, classes]`, with the module names of the authors' code.

The authors' state dicts load, because the layers of `neurons_of` read decay and width from `cell.decay` and
`cell.spike_fn.inv_sg.alpha`. The authors' tdBN is a batch normalisation over time and batch. `asgl_cuda.fuse` merges it
into the neurons after it, also with a shortcut in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import OverTime

from .presets import CLASSES, Settings

MakeNeurons = Callable[[], asgl_cuda.LIF]


class Neurons(asgl_cuda.LIF):
    """LIF that learns, and loads, the authors' `alpha`: 1 / width, for the rectangle its logarithm."""

    alpha: nn.Parameter

    @property
    def log_width(self) -> Any:
        """The logarithm of the width, through which gradients reach `alpha`."""
        if self.surrogate == "rectangle":
            return -self.alpha
        least = self.alpha.clamp(min=1e-3)  # beyond, alpha keeps its gradient, to come back
        return -(self.alpha + (least - self.alpha).detach()).log()

    @log_width.setter
    def log_width(self, value: nn.Parameter | None) -> None:
        self.alpha = value  # type: ignore[assignment]

    def _set_width(self, value: Any) -> None:
        super()._set_width(value)
        nn.init.constant_(self.alpha, -math.log(value) if self.surrogate == "rectangle" else 1 / value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *options: Any) -> None:
        for theirs, ours in (("cell.decay", "logit_decay"), ("cell.spike_fn.inv_sg.alpha", "alpha")):
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs).reshape(-1)
        super()._load_from_state_dict(state_dict, prefix, *options)


class NeuronsByStep(Neurons):
    """A width for each time step, by the broadcasting of `asgl_cuda.lif`."""

    def __init__(self, steps: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_features = (steps,)
        self.alpha = nn.Parameter(self.alpha.detach().repeat(steps))

    def _arguments_of_call(self, x_seq: Tensor, *arguments: Any, **options: Any) -> dict[str, Any]:
        given = super()._arguments_of_call(x_seq, *arguments, **options)
        given["width"] = self._broadcast(given["width"].value(), x_seq)
        del given["features"]  # steps are no features
        return given

    def _broadcast(self, value: Any, x_seq: Tensor) -> Any:
        is_by_step = isinstance(value, Tensor) and value.shape == self.alpha.shape
        return value.reshape(-1, *(1,) * (x_seq.dim() - 1)) if is_by_step else value


def neurons_of(settings: Settings) -> Neurons:
    make = partial(NeuronsByStep, settings.steps) if settings.widths == "per-step" else Neurons
    neurons = make(
        decay=settings.decay, learn_decay=settings.learn_decay, v_threshold=settings.threshold, width=settings.width,
        surrogate=settings.surrogate, analog_prob=settings.analog_prob, scale_output=True, detach_reset=False,
    )  # fmt: skip
    # Frozen instead of constant: a compiled graph would have the constant in it.
    neurons.alpha.requires_grad_(settings.widths in ("learned", "per-step"))
    return neurons


def normalised(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> tuple[OverTime, OverTime]:
    """A convolution and its normalisation."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return OverTime(convolution), OverTime(nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is added before the second layer of neurons."""

    def __init__(self, inputs: int, outputs: int, stride: int, make: MakeNeurons) -> None:
        super().__init__()
        (self.conv1, self.bn1), self.spike1 = normalised(inputs, outputs, stride=stride), make()
        (self.conv2, self.bn2), self.spike2 = normalised(outputs, outputs), make()
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*(() if same else normalised(inputs, outputs, 1, stride)))

    def forward(self, s_seq: Tensor) -> Tensor:
        c_seq = self.bn2(self.conv2(self.spike1(self.bn1(self.conv1(s_seq)))))
        return self.spike2(c_seq + self.shortcut(s_seq))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stages of blocks, of which all but the first halve the size. `hidden` neurons precede the scores, if any."""

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], hidden: int, inputs: int, classes: int, make: MakeNeurons
    ) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(*normalised(inputs, channels[0]), make())
        self.stages = [f"layer{number}" for number in range(1, len(channels) + 1)]
        before = channels[0]
        for name, outputs, count in zip(self.stages, channels, blocks, strict=True):
            first = BasicBlock(before, outputs, 1 if name == "layer1" else 2, make)
            rest = [BasicBlock(outputs, outputs, 1, make) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
            before = outputs
        self.avg_pool = OverTime(nn.AdaptiveAvgPool2d(1))
        scores: list[nn.Module] = [OverTime(nn.Linear(hidden or before, classes, bias=not hidden))]
        if hidden:
            scores = [OverTime(nn.Linear(before, hidden, bias=False)), make(), *scores]
        self.classifier = nn.Sequential(*scores)

    def forward(self, x_seq: Tensor) -> Tensor:
        s_seq = self.conv0(x_seq)
        for name in self.stages:
            s_seq = self.get_submodule(name)(s_seq)
        return self.classifier(self.avg_pool(s_seq).flatten(2))  # type: ignore[no-any-return]


class VGG(nn.Module):
    """Convolutions and average pools ("A"; "AA" down to one pixel), weights drawn from N(0, 0.5)."""

    def __init__(self, plan: Sequence[int | str], pixels: int, inputs: int, classes: int, make: MakeNeurons) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for each in plan:
            if isinstance(each, int):
                layers += [*normalised(inputs, each), make()]
                inputs = each
            else:
                layers.append(OverTime(nn.AvgPool2d(2) if each == "A" else nn.AdaptiveAvgPool2d(1)))
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Sequential(OverTime(nn.Linear(inputs * pixels, classes, bias=False)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, 0, 0.5)

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.classifier(self.feature(x_seq).flatten(2))  # type: ignore[no-any-return]


_RESNETS = {"resnet18": ((64, 128, 256, 512), (2, 2, 2, 2), 0), "resnet19": ((128, 256, 512), (3, 3, 2), 256)}
_VGGS: dict[str, tuple[tuple[int | str, ...], int]] = {
    "vgg13": ((64, 64, "A", 128, 128, "A", 256, 256, "A", 512, 512, 512, "A", 512, "AA"), 1),
    "vggsnn2": ((64, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"), 3 * 3),  # 48 / 2^4 = 3
}


def network_of(settings: Settings) -> nn.Module:
    inputs, classes = 2 if settings.data == "dvs-cifar10" else 3, CLASSES[settings.data]
    make = partial(neurons_of, settings)

    def scaled(plan: Sequence[Any]) -> list[Any]:
        return [max(1, round(each * settings.channels)) if isinstance(each, int) else each for each in plan]

    if settings.network in _RESNETS:
        channels, blocks, hidden = _RESNETS[settings.network]
        return ResNet(scaled(channels), blocks, hidden, inputs, classes, make)
    plan, pixels = _VGGS[settings.network]
    return VGG(scaled(plan), pixels, inputs, classes, make)
