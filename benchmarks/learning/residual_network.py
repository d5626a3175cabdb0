"""A convolutional residual network on images: the width fixed, learned, and learned with noise, at two first widths.

Nine convolutions with normalisation and neurons in four residual blocks, T = 4, trained on MNIST at 14 x 14 by SGD with
momentum and by Adam, with the groups of `asgl_cuda.parameter_groups`, along half a cosine. The report has the test
accuracy after every epoch, with hard spikes, and the widths at the end. It is the largest network that is trained for
these pages; CIFAR and ImageNet need a GPU.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import BatchNormLIF, OverTime

from .. import palette
from ..common import parser_of
from .data import SOURCES, Data
from .optimizers import RATES, optimizer_of
from .runs import add_jobs, begun, result_file, train_all
from .tables import print_table, print_total, spread

SEEDS = 3
CHANNELS = 16
TIME_STEPS = 4
EPOCHS, BATCH = 4, 64
WIDTHS = (1.0, 10.0)
SURROGATE = "rectangle"
ARMS: dict[str, dict[str, Any]] = {
    "SG": {"learn_width": False, "analog_prob": 0.0},
    "learned": {"analog_prob": 0.0},
    "ASGL": {"analog_prob": 0.2},
}


class Run(NamedTuple):
    """One training."""

    optimizer: str
    width: float
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer} {self.width:g} {self.arm} {self.seed}"


class Block(nn.Module):
    """Two convolutions; the shortcut is added between the second normalisation and its neurons."""

    def __init__(self, inputs: int, outputs: int, stride: int, **neuron: Any) -> None:
        super().__init__()
        self.conv1 = OverTime(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
        self.neurons1 = BatchNormLIF(outputs, **neuron)
        self.conv2 = OverTime(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False))
        self.neurons2 = BatchNormLIF(outputs, **neuron)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = OverTime(nn.Sequential(convolution, nn.BatchNorm2d(outputs)))

    def forward(self, s_seq: Tensor) -> Tensor:
        y_seq = self.conv2(self.neurons1(self.conv1(s_seq)))
        return self.neurons2(y_seq, self.shortcut(s_seq))


class Network(nn.Module):
    """Scores `[B, 10]` of images `[B, 1, H, W]`, a constant current over the time steps."""

    def __init__(self, channels: int = CHANNELS, **neuron: Any) -> None:
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            OverTime(nn.Conv2d(1, channels, 3, 1, 1, bias=False)),
            BatchNormLIF(channels, **neuron),
            Block(channels, channels, 1, **neuron),
            Block(channels, wide, 2, **neuron),
            Block(wide, wide, 1, **neuron),
            Block(wide, 2 * wide, 2, **neuron),
        )
        self.last = nn.Linear(2 * wide, 10)

    def forward(self, images: Tensor) -> Tensor:
        s_seq = self.body(images.expand(TIME_STEPS, *images.shape))
        return self.last(s_seq.mean((0, 3, 4)))


@cache
def read() -> Data:
    return SOURCES["mnist"].read(None)


def train(run: Run, epochs: int = EPOCHS, channels: int = CHANNELS) -> dict[str, Any]:
    """Test accuracies in percent after each epoch, mean losses of training, and the final widths by layer."""
    data = read()
    images, test = data.train[:, 0], data.test[:, 0]
    torch.manual_seed(run.seed)
    model = Network(channels, width=run.width, surrogate=SURROGATE, **ARMS[run.arm])
    optimizer = optimizer_of(model, run.optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(images) / BATCH))
    accuracies, losses = [], []
    for _ in range(epochs):
        model.train()
        found = []
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), data.train_labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            found.append(loss.item())
        losses.append(round(statistics.fmean(found), 4))
        model.eval()
        with torch.no_grad():
            answers = torch.cat([model(part).argmax(1) for part in test.split(256)])
        accuracies.append(round(100 * (answers == data.test_labels).float().mean().item(), 2))
    widths = [round(torch.as_tensor(layer.width).item(), 3) for _, layer in asgl_cuda.asgl_layers(model)]
    return {"accuracies": accuracies, "losses": losses, "widths": widths}


def of_seeds(report: dict[str, Any], *run: Any) -> list[dict[str, Any]]:
    found = (report["runs"].get(str(Run(*run, seed))) for seed in range(SEEDS))
    return [each for each in found if each is not None]


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: mean accuracies, least and most, after each epoch."""
    marks = range(EPOCHS)
    found = []
    for optimizer, width, arm in itertools.product(RATES, WIDTHS, ARMS):
        seeds = of_seeds(report, optimizer, width, arm)
        if not seeds:
            continue
        cells = [spread([each["accuracies"][mark] for each in seeds]) for mark in marks]
        means = [statistics.fmean(each["widths"]) for each in seeds]
        found.append([f"{optimizer}, width {width:g}, {arm}", *cells, f"{statistics.fmean(means):.2f}"])
    return ["", *(f"epoch {mark + 1}" for mark in marks), "mean width, end"], found


@palette.styled
def plot(report: dict[str, Any], file: Path) -> None:
    """Accuracies over the epochs, a panel for each optimizer and first width, all seeds and their mean."""
    from matplotlib.figure import Figure

    cases = list(itertools.product(RATES, WIDTHS))
    figure = Figure(figsize=(3.1 * len(cases), 3.2))
    panels = figure.subplots(1, len(cases), sharey=True)
    for panel, case in zip(panels, cases, strict=True):
        for number, arm in enumerate(ARMS):
            curves = [each["accuracies"] for each in of_seeds(report, *case, arm)]
            if not curves:
                continue
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                panel.plot(epochs, curve, color=palette.CYCLE[number], alpha=0.3, linewidth=0.8)
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            panel.plot(epochs, means, label=arm, **palette.line(number))
        panel.set(title=f"{case[0]}, first width {case[1]:g}", xlabel="epoch")
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(handlelength=4)
    figure.savefig(file, dpi=90)


def main() -> int:
    """Trains missing runs, prints the table, draws the curves."""
    parser = parser_of("benchmarks.learning.residual_network", __doc__, "json", "plot")
    add_jobs(parser)
    arguments = parser.parse_args()
    file = result_file(arguments.json, "residual_network")
    settings = {
        "seeds": SEEDS, "channels": CHANNELS, "time_steps": TIME_STEPS, "epochs": EPOCHS, "batch": BATCH,
        "rates": RATES, "surrogate": SURROGATE, "parameters": sum(each.numel() for each in Network().parameters()),
    }  # fmt: skip
    report = begun(file, settings)
    runs = [Run(*each) for each in itertools.product(RATES, WIDTHS, ARMS, range(SEEDS))]
    runs.sort(key=lambda run: run.seed)
    train_all(runs, train, report, file, arguments.jobs)
    print_table("Test accuracy in percent, mean (least to most)", *rows(report))
    print_total(report, 1, file)
    if arguments.plot:
        plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
