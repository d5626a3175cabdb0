"""Trains fully connected networks that differ only in their seed at once; each layer is one batched product.

Training a small network is mostly overhead. Ten networks at once take a fifth of the time that they take one after the
other. The loss is the sum of the networks' losses, and the optimisers work element by element, so each network learns
as if it were alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda

from .data import SOURCES, Data
from .optimizers import MOMENTUM, SGD, WEIGHT_DECAY

HIDDEN = 64
DECAY, THRESHOLD = 0.5, 1.0


class Setting(NamedTuple):
    """The settings that the networks of a training run share."""

    width: float
    learned: bool = True
    analog_prob: float = 0.0
    annealed: bool = False  # analog_prob falls to 0, along half a cosine
    dropout: float = 0.0  # of spikes
    surrogate: str = "sigmoid"
    steps: int = 250
    time_steps: int = 4  # of a constant sample
    batch: int = 32
    optimizer: str = SGD  # of the weights
    rate: float = 0.1
    width_rate: float = 0.03  # of Adam
    width_by_weights: bool = False  # the weights' optimizer instead of Adam
    layers: int = 6
    by_channel: bool = False  # a width for each channel, else one for each layer
    decay: float = DECAY  # as made
    detach_reset: bool = False
    decay_rate: float | None = None  # of learned decays and thresholds, None: constants


class Networks(nn.Module):
    """The networks. Each layer is linear, with a normalisation over time and batch and LIF neurons.

    Scores are means over time.
    """

    def __init__(self, features: int, classes: int, seeds: Sequence[int], setting: Setting) -> None:
        super().__init__()
        self.seeds, self.setting = tuple(seeds), setting
        sizes = (features, *(HIDDEN,) * setting.layers)
        made = []
        for seed in seeds:
            torch.manual_seed(seed)
            made.append([nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)])
            made[-1].append(nn.Linear(HIDDEN, classes))
        *hidden, last = zip(*made, strict=True)

        def stacked(values: Sequence[Tensor]) -> nn.Parameter:
            return nn.Parameter(torch.stack([value.detach() for value in values]))

        self.weights = nn.ParameterList([stacked([each.weight for each in layer]) for layer in (*hidden, last)])
        self.bias = stacked([each.bias[:, None] for each in last])
        self.norms = nn.ModuleList([nn.BatchNorm1d(len(seeds) * HIDDEN) for _ in hidden])

        def values(value: float, channels: int, learned: bool) -> nn.ParameterList:
            filled = torch.full((len(seeds), channels, 1, 1), value)
            return nn.ParameterList([nn.Parameter(filled.clone(), learned) for _ in hidden])

        self.log_widths = values(math.log(setting.width), HIDDEN if setting.by_channel else 1, setting.learned)
        self.logit_decays = values(math.log(setting.decay / (1 - setting.decay)), 1, setting.decay_rate is not None)
        self.thresholds = values(THRESHOLD, 1, setting.decay_rate is not None)

    def forward(self, samples: Tensor, analog_prob: float = 0.0) -> Tensor:
        """The scores `[S, classes, B]` of samples `[S, B, T, features]`. If S is 1, networks share the samples."""
        networks, batch = len(self.seeds), samples.shape[1]
        s_seq = samples.permute(0, 3, 2, 1).expand(networks, -1, -1, -1)  # [S, features, T, B]
        steps = self.setting.time_steps if s_seq.shape[2] == 1 else s_seq.shape[2]
        layers = zip(self.weights, self.norms, self.log_widths, self.logit_decays, self.thresholds, strict=False)
        for weight, norm, log_width, logit_decay, threshold in layers:
            x_seq = torch.bmm(weight, s_seq.flatten(2)).unflatten(2, (-1, batch)).expand(-1, -1, steps, -1)
            x_seq = norm(x_seq.reshape(1, networks * HIDDEN, -1)).view(networks, HIDDEN, steps, batch)
            learned = {"decay": logit_decay.sigmoid(), "v_threshold": threshold} if threshold.requires_grad else {}
            s_seq = asgl_cuda.lif(
                x_seq, width=log_width.exp() if log_width.requires_grad else self.setting.width,
                surrogate=self.setting.surrogate, analog_prob=analog_prob, time_dim=2,
                detach_reset=self.setting.detach_reset,
                **({"decay": self.setting.decay, "v_threshold": THRESHOLD} | learned),
            )  # fmt: skip
            s_seq = functional.dropout(s_seq, self.setting.dropout, self.training)
        return torch.baddbmm(self.bias, self.weights[-1], s_seq.mean(2))

    def loss(self, samples: Tensor, labels: Tensor, analog_prob: float = 0.0) -> Tensor:
        """The loss of each network, `[S]`, for samples `[S, B, T, features]` and labels `[S, B]`."""
        return functional.cross_entropy(self(samples, analog_prob), labels, reduction="none").mean(1)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """SGD with momentum or Adam for the weights; Adam for the neurons, or the weights' optimizer for the widths."""
        setting = self.setting
        neurons = {id(value) for each in (self.log_widths, self.logit_decays, self.thresholds) for value in each}
        weights: dict[str, Any] = {"params": [value for value in self.parameters() if id(value) not in neurons]}
        if setting.optimizer == SGD:
            weights["weight_decay"] = WEIGHT_DECAY
        widths = {"params": [*self.log_widths], "lr": setting.width_rate}
        groups, for_adam = [weights], list[dict[str, Any]]()
        if setting.learned:
            (groups if setting.width_by_weights else for_adam).append(widths)
        if setting.decay_rate is not None:
            for_adam.append({"params": [*self.logit_decays, *self.thresholds], "lr": setting.decay_rate})
        kind: Any = getattr(torch.optim, setting.optimizer)
        if setting.optimizer == SGD:
            kind = partial(kind, momentum=MOMENTUM)
        return [kind(groups, lr=setting.rate), *([torch.optim.Adam(for_adam)] if for_adam else [])]

    def widths(self) -> list[list[float]]:
        """The widths of the layers, by network."""
        values = torch.stack([value.detach().exp().flatten(1).mean(1) for value in self.log_widths], 1)
        return [[round(width, 4) for width in network] for network in values.tolist()]

    @torch.no_grad()
    def accuracies(self, samples: Tensor, labels: Tensor) -> list[float]:
        """The percentage of the samples `[N, T, features]` that each network classifies correctly, with hard spikes."""
        self.eval()
        parts = zip(samples.split(256), labels.split(256), strict=True)
        right = sum((self(part[None]).argmax(1) == wanted).sum(1) for part, wanted in parts)
        self.train()
        return [round(value, 3) for value in (100 * right / len(labels)).tolist()]


def shortened(data: Data) -> Data:
    """The data with pairs of frames averaged, if a sample has more than eight, which halves the time of training."""
    if data.train.shape[1] <= 8:
        return data
    even = data.train.shape[1] // 2 * 2
    train, test = (part[:, :even].unflatten(1, (-1, 2)).mean(2) for part in (data.train, data.test))
    return data._replace(train=train, test=test)


@cache
def read(name: str, root: Path | None = None) -> Data:
    """A data set, shortened, read once per process."""
    return shortened(SOURCES[name].read(root))


def flat(samples: Tensor) -> Tensor:
    """`[N, T, features]`."""
    return samples.flatten(2).to(torch.get_default_dtype())


def orders(count: int, setting: Setting, seeds: Sequence[int]) -> Tensor:
    """The indices of the samples that each network gets, `[steps, S, B]`: in each epoch in an order by its seed."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        epochs = math.ceil(setting.steps * setting.batch / count)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        found.append(order[: setting.steps * setting.batch].view(setting.steps, setting.batch))
    return torch.stack(found, 1)


def trained(
    data: Data, setting: Setting, seeds: Sequence[int], observe: Callable[[Networks, int], None] | None = None
) -> Networks:
    """Trains networks and returns them. Before each step, `observe` is called with the networks and the step."""
    samples, labels = flat(data.train), data.train_labels
    networks = Networks(samples.shape[2], data.classes, seeds, setting)
    optimizers = networks.optimizers()
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, setting.steps) for each in optimizers]
    steppers: list[Any] = [*optimizers, *schedules]
    for step, order in enumerate(orders(len(samples), setting, seeds)):
        if observe is not None:
            observe(networks, step)
        share = (1 + math.cos(math.pi * step / setting.steps)) / 2 if setting.annealed else 1.0
        networks.zero_grad()
        networks.loss(samples[order], labels[order], setting.analog_prob * share).sum().backward()
        for stepper in steppers:
            stepper.step()
    return networks
