"""Trains one spiking network on handwritten digits twice, with the plain PyTorch neuron and with the fused one."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
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
from torch.nn import functional as F

import asgl_cuda

TIME_STEPS = 4
HIDDEN = (512, 512, 512, 512)
BATCH_SIZE = 64


class SpikingLayer(nn.Module):
    """Linear layer, batch normalisation over time and batch together, LIF neurons: `[T, B, in]` to `[T, B, out]`."""

    def __init__(self, in_features: int, out_features: int, backend: str | None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.norm = nn.BatchNorm1d(out_features)
        self.lif = asgl_cuda.LIF(analog_prob=0.2, backend=backend)

    def forward(self, x_seq: Tensor) -> Tensor:
        current = self.norm(self.linear(x_seq).flatten(0, 1))
        return self.lif(current.unflatten(0, x_seq.shape[:2]))


class SpikingMLP(nn.Module):
    """Images `[B, 64]`, shown as a constant current at every time step, to class scores `[B, 10]`."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        sizes = (64, *HIDDEN)
        self.layers = nn.Sequential(*(SpikingLayer(*pair, backend) for pair in zip(sizes, sizes[1:], strict=False)))
        self.readout = nn.Linear(sizes[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.readout(self.layers(images.expand(TIME_STEPS, -1, -1))).mean(0)

    def widths(self) -> list[float]:
        """The learned width of each spiking layer."""
        return [layer.lif.width.item() for layer in self.layers]


class Stopwatch:
    """Seconds spent in the watched modules, forward and backward.

    Autograd runs the newest node first, so a module's backward is one uninterrupted stretch: from the gradient of its
    output, where the pre-hook fires, to that of its input, where the hook fires.
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
    """What one training leaves behind: lists have one entry an epoch, widths one more for the start."""

    layer: str
    accuracy: list[float] = field(default_factory=list)
    widths: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    neuron_seconds: list[float] = field(default_factory=list)
    first_loss: float = 0.0
    first_grads: list[Tensor] = field(default_factory=list)


def load_data(seed: int) -> list[Tensor]:
    """Training images, test images, training labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        torch.tensor(images / 16, dtype=torch.float32),
        torch.tensor(labels),
        test_size=0.2,
        stratify=labels,
        random_state=seed,
    )
    return list(split)


def train(layer: str, backend: str | None, data: list[Tensor], epochs: int, seed: int, progress: Progress) -> Run:
    """Trains a new network on the training images and tests it after every epoch."""
    train_images, test_images, train_labels, test_labels = data
    # Weights, order of the images and noise all come from the default generator: one seed makes all runs the same.
    torch.manual_seed(seed)
    model = SpikingMLP(backend)
    stopwatch = Stopwatch()
    for module in model.layers:
        stopwatch.watch(module.lif)
    # As in the paper's code, the widths have an optimiser of their own and no weight decay.
    widths = [module.lif.log_width for module in model.layers]
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith("log_width")]
    optimizers = [
        torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=5e-4),
        torch.optim.Adam(widths, lr=3e-3),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs) for optimizer in optimizers]
    run = Run(layer, widths=[model.widths()])

    for _ in progress.track(range(epochs), description=layer):
        model.train()
        stopwatch.seconds = 0.0
        started = time.perf_counter()
        for batch in torch.randperm(len(train_images)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(train_images[batch]), train_labels[batch])
            model.zero_grad()
            loss.backward()
            if not run.first_grads:
                run.first_loss = loss.item()
                run.first_grads = [parameter.grad.clone() for parameter in model.parameters()]
            for optimizer in optimizers:
                optimizer.step()
        run.seconds.append(time.perf_counter() - started)
        run.neuron_seconds.append(stopwatch.seconds)
        for scheduler in schedulers:
            scheduler.step()
        model.eval()
        with torch.no_grad():
            run.accuracy.append((model(test_images).argmax(1) == test_labels).float().mean().item())
        run.widths.append(model.widths())
    return run


def summary(reference: Run, fused: Run) -> Table:
    """Accuracy, times and the agreement of the first step."""
    differences = [
        ((a - b).abs().max() / a.abs().max()).item()
        for a, b in zip(reference.first_grads, fused.first_grads, strict=True)
    ]
    table = Table(
        caption=f"First step: loss {reference.first_loss:.6f} and {fused.first_loss:.6f}; gradients differ by at most "
        f"{max(differences):.1e} of the largest value of their tensor. Times: training only, median over the epochs."
    )
    table.add_column("layer")
    for header in ("test accuracy", "s/epoch, neurons", "s/epoch, all"):
        table.add_column(header, justify="right")
    for run in (reference, fused):
        neurons, total = median(run.neuron_seconds), median(run.seconds)
        table.add_row(run.layer, f"{run.accuracy[-1]:.1%}", f"{neurons:.3f}", f"{total:.3f}")
    table.add_section()
    neurons = median(reference.neuron_seconds) / median(fused.neuron_seconds)
    total = median(reference.seconds) / median(fused.seconds)
    table.add_row("ratio", "", f"{neurons:.1f}", f"{total:.1f}")
    return table


def draw(reference: Run, fused: Run, path: Path) -> None:
    """Accuracy and widths over the epochs, and the time of an epoch, of both runs."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    accuracy, width, seconds = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    # The runs all but coincide: the fused one is a thin dark line on a broad pale one.
    styles = {"linewidth": 6, "alpha": 0.35}, {"linewidth": 1.5, "linestyle": "--"}

    for run, style in zip((reference, fused), styles, strict=True):
        epochs = range(len(run.widths))
        accuracy.plot(epochs[1:], [100 * value for value in run.accuracy], color="black", label=run.layer, **style)
        for number, values in enumerate(zip(*run.widths, strict=True), start=1):
            width.plot(epochs, values, color=f"C{number - 1}", label=f"layer {number}, {run.layer}", **style)
    accuracy.set(title="Digits recognised", xlabel="epoch", ylabel="test accuracy (%)")
    accuracy.legend(loc="lower right")
    width.set(title="Learned width of the surrogate", xlabel="epoch", ylabel="width (threshold = 1)")
    width.legend(fontsize="small", ncols=2)

    layers = [run.layer for run in (reference, fused)]
    neurons = [median(run.neuron_seconds) for run in (reference, fused)]
    others = [median(run.seconds) - part for run, part in zip((reference, fused), neurons, strict=True)]
    for label, values, bottom in (("neuron layers", neurons, 0), ("everything else", others, neurons)):
        bars = seconds.bar(layers, values, 0.6, bottom=bottom, label=label)
        seconds.bar_label(bars, fmt="%.3f s", label_type="center")
    seconds.set(title="Time of a training epoch", ylabel="median time (s)")
    seconds.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs both trainings, then prints the table and draws the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
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
    console.print(summary(reference, fused))
    draw(reference, fused, args.figure)
    console.print(f"Figure: {args.figure.absolute()}", soft_wrap=True)


if __name__ == "__main__":
    main()
