"""Trains a spiking network on handwritten digits twice, with the plain PyTorch neuron and with the fused one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import OverTime

from .. import palette
from ..common import parser_of
from .optimizers import SGD, optimizer_of

TIME_STEPS = 4
HIDDEN = (256, 256, 256, 256)
BATCH_SIZE = 64
ANALOG_PROB = 0.2


def spiking_mlp(hidden: Sequence[int], **neuron: Any) -> nn.Sequential:
    """A network from images `[T, B, 64]` to scores `[T, B, 10]`, of normalised layers of LIF neurons.

    Statistics are over time and batch. Options are those of `asgl_cuda.LIF`.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((64, *hidden)):
        layers += [OverTime(nn.Linear(inputs, outputs, bias=False)), OverTime(nn.BatchNorm1d(outputs))]
        layers += [asgl_cuda.LIF(**{"analog_prob": ANALOG_PROB, **neuron})]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 10))


def scores_of(model: nn.Module, images: Tensor) -> Tensor:
    """The scores `[B, 10]` of images `[B, 64]` as a constant current, means over the time steps."""
    scores: Tensor = model(images.expand(TIME_STEPS, -1, -1)).mean(0)
    return scores


@torch.no_grad()
def widths_of(model: nn.Module) -> list[float]:
    return [float(lif.width) for _, lif in asgl_cuda.asgl_layers(model)]


class Stopwatch:
    """Seconds in the watched modules, forward and backward.

    Autograd runs the newest node first, so a module's backward is contiguous, from its pre-hook to its hook.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def watch(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)
        module.register_full_backward_pre_hook(self._start)
        module.register_full_backward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started


@dataclass
class Run:
    """The results of one training."""

    label: str
    losses: list[float] = field(default_factory=list)  # one per step
    first_grads: list[Tensor] = field(default_factory=list)  # in the first step
    accuracy: list[float] = field(default_factory=list)  # on the test images, after each epoch
    widths: list[list[float]] = field(default_factory=list)  # at the start and after each epoch
    seconds: list[float] = field(default_factory=list)  # one per epoch, without the test
    neuron_seconds: list[float] = field(default_factory=list)


def load_data(seed: int) -> list[Tensor]:
    """Training images, test images, training labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    samples = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return list(train_test_split(*samples, test_size=0.2, stratify=labels, random_state=seed))


def train(label: str, backend: str | None, data: list[Tensor], epochs: int, seed: int, progress: Progress) -> Run:
    """Trains a new network on the training images and tests it after every epoch."""
    train_images, test_images, train_labels, test_labels = data
    # Weights, order of the images and noise come from the default generator: one seed makes all runs equal.
    torch.manual_seed(seed)
    model = spiking_mlp(HIDDEN, backend=backend)
    stopwatch = Stopwatch()
    for _, lif in asgl_cuda.asgl_layers(model):
        stopwatch.watch(lif)
    optimizer = optimizer_of(model, SGD)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    run = Run(label, widths=[widths_of(model)])

    for _ in progress.track(range(epochs), description=label):
        model.train()
        stopwatch.seconds = 0.0
        started = time.perf_counter()
        for batch in torch.randperm(len(train_images)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(scores_of(model, train_images[batch]), train_labels[batch])
            model.zero_grad()
            loss.backward()
            if not run.first_grads:
                run.first_grads = [parameter.grad.clone() for parameter in model.parameters()]
            optimizer.step()
            run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - started)
        run.neuron_seconds.append(stopwatch.seconds)
        schedule.step()
        model.eval()
        with torch.no_grad():
            run.accuracy.append((scores_of(model, test_images).argmax(1) == test_labels).float().mean().item())
        run.widths.append(widths_of(model))
    return run


def summary(reference: Run, fused: Run, test_images: int) -> Table:
    """A table of accuracy and times, and the agreement of the two runs."""
    difference = max(
        ((a - b).abs().max() / a.abs().max()).item()
        for a, b in zip(reference.first_grads, fused.first_grads, strict=True)
    )
    steps = len(reference.losses)
    same = next((step for step in range(steps) if reference.losses[step] != fused.losses[step]), steps)
    table = Table(
        "neuron layer",
        caption=f"Gradients of the first step: they differ by at most {difference:.1e} of the largest value of their "
        f"tensor. Loss: the same to the last bit in the first {same} of {steps} steps; after that, rounding may set "
        "the runs apart. Accuracy: with its standard error. Seconds: median over the epochs, training only.",
        caption_justify="left",
    )
    for header in ("test accuracy", "s/epoch in neurons", "s/epoch in all"):
        table.add_column(header, justify="right")
    for run in (reference, fused):
        share = run.accuracy[-1]
        error = math.sqrt(share * (1 - share) / test_images)
        neurons, total = median(run.neuron_seconds), median(run.seconds)
        table.add_row(run.label, f"{100 * share:.1f} ± {100 * error:.1f} %", f"{neurons:.3f}", f"{total:.3f}")
    table.add_section()
    neurons = median(reference.neuron_seconds) / median(fused.neuron_seconds)
    total = median(reference.seconds) / median(fused.seconds)
    table.add_row("times faster", "", f"{neurons:.1f}", f"{total:.1f}")
    return table


@palette.styled
def draw(reference: Run, fused: Run, path: Path) -> None:
    """Accuracy and widths over the epochs, and the time of an epoch, of both runs."""
    figure = Figure(figsize=(14, 4))
    accuracy, width, seconds = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    runs = (reference, fused)
    for run in runs:
        # The runs nearly coincide: a thin line on a broad pale one shows both.
        broad = {"linewidth": 6, "alpha": 0.35, "linestyle": "-", "marker": ""} if run is reference else {}
        epochs = range(len(run.widths))
        style = {**palette.line(0, color=palette.BLACK, linestyle="--"), **broad}
        accuracy.plot(epochs[1:], [100 * share for share in run.accuracy], label=run.label, **style)
        for layer, values in enumerate(zip(*run.widths, strict=True)):
            style = {**palette.line(layer, markevery=max(1, len(values) // 8)), **broad}
            width.plot(epochs, values, label=f"layer {layer + 1}" if run is fused else None, **style)
    accuracy.set(title="Digits recognised", xlabel="epoch", ylabel="test accuracy (%)")
    accuracy.legend(loc="lower right", title="neuron layer")
    width.set(title="Learned width of the surrogate", xlabel="epoch", ylabel="width (1 = threshold)")
    width.legend(loc="upper left", bbox_to_anchor=(1, 1), title="thin: fused\nbroad: plain", handlelength=4)
    for axes in (accuracy, width):
        axes.set_xlim(0, len(reference.accuracy))
        axes.xaxis.get_major_locator().set_params(integer=True)

    labels = [run.label for run in runs]
    neurons = [median(run.neuron_seconds) for run in runs]
    rest = [median(run.seconds) - inside for run, inside in zip(runs, neurons, strict=True)]
    parts = ("neuron layers", neurons, [0.0, 0.0], palette.SKY), ("the rest", rest, neurons, "white")
    for part, heights, bottom, color in parts:
        bars = seconds.bar(labels, heights, 0.6, bottom=bottom, label=part, color=color, edgecolor=palette.BLACK)
        seconds.bar_label(bars, fmt="%.3f s", label_type="center")
    seconds.set(title="Time of a training epoch", ylabel="median time (s)")
    seconds.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs both trainings, then prints the table and draws the figure."""
    parser = parser_of("benchmarks.learning.demo", __doc__)
    parser.add_argument("--epochs", type=int, default=30, help="of each training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights, order and noise (default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=Path("demo.png"), metavar="FILE", help="default: %(default)s")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not args.figure.absolute().parent.is_dir():
        parser.error(f"--figure must be in a folder that exists, got {args.figure}")
    if (problem := asgl_cuda.unavailable_backends().get("cpu")) is not None:
        parser.exit(1, f"the fused layer does not work here: {problem}\n")

    console = Console()
    data = load_data(args.seed)
    console.print(
        f"{len(HIDDEN)} spiking layers of {HIDDEN[0]} neurons, T = {TIME_STEPS}, {len(data[0])} images to train on and "
        f"{len(data[1])} to test on, {torch.get_num_threads()} threads"
    )
    with Progress(console=console) as progress:
        reference = train("plain PyTorch", "reference", data, args.epochs, args.seed, progress)
        fused = train("fused", None, data, args.epochs, args.seed, progress)
    console.print(summary(reference, fused, len(data[1])))
    draw(reference, fused, args.figure)
    console.print(f"Figure: {args.figure.absolute()}", soft_wrap=True)


if __name__ == "__main__":
    main()
