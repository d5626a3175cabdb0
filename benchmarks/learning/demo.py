"""Trains a spiking network on handwritten digits twice, with the plain PyTorch neuron and with the fused one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import OverTime

from .. import palette
from ..common import machine, parser_of, text_table, write_json
from .optimizers import SGD, accuracy_of, fit, optimizer_of

TIME_STEPS = 4
HIDDEN = (256, 256, 256, 256)
BATCH_SIZE = 64
ANALOG_PROB = 0.2
NEURON: dict[str, Any] = {"surrogate": "rectangle", "analog_prob": ANALOG_PROB, "detach_reset": False}


def spiking_mlp(hidden: Sequence[int], **neuron: Any) -> nn.Sequential:
    """A network of normalised layers of LIF neurons, from images `[T, B, 64]` to scores `[T, B, 10]`.

    Statistics are over time and batch. Options are those of `asgl_cuda.LIF`. The surrogate is a rectangle, with which
    every backend computes the same bits.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((64, *hidden)):
        layers += [OverTime(nn.Linear(inputs, outputs, bias=False)), OverTime(nn.BatchNorm1d(outputs))]
        layers += [asgl_cuda.LIF(**NEURON | neuron)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 10))


def scores_of(model: nn.Module, images: Tensor) -> Tensor:
    """The scores `[B, 10]` of images `[B, 64]`, which are a constant input current, as means over the time steps."""
    scores: Tensor = model(images.expand(TIME_STEPS, -1, -1)).mean(0)
    return scores


@torch.no_grad()
def widths_of(model: nn.Module) -> list[float]:
    return [float(lif.width) for _, lif in asgl_cuda.asgl_layers(model)]


class Run(NamedTuple):
    """The results of one training."""

    label: str
    losses: list[float]  # one per step
    first_grads: list[Tensor]  # in the first step
    accuracy: list[float]  # in percent on the test images, after each epoch
    widths: list[list[float]]  # at the start and after each epoch
    seconds: list[float]  # one per epoch, without the test


def load_data(seed: int) -> list[Tensor]:
    """Training images, test images, training labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    samples = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return list(train_test_split(*samples, test_size=0.2, stratify=labels, random_state=seed))


def train(label: str, backend: str | None, data: list[Tensor], epochs: int, progress: Progress) -> Run:
    """Trains a new network on the training images and tests it after every epoch."""
    images, test_images, labels, test_labels = data
    # Weights, order of the images and noise come from the default generator: one seed makes all runs equal.
    torch.manual_seed(0)
    model = spiking_mlp(HIDDEN, backend=backend)
    optimizer = optimizer_of(model, SGD)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    run = Run(label, [], [], [], [widths_of(model)], [])

    def loss_of(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores_of(model, images[batch]), labels[batch])

    for _ in progress.track(range(epochs), description=label):
        started = time.perf_counter()
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            run.losses.extend(fit(loss_of, [batch], optimizer))
            if not run.first_grads:
                run.first_grads.extend(parameter.grad.clone() for parameter in model.parameters())
        run.seconds.append(time.perf_counter() - started)
        schedule.step()
        run.accuracy.append(accuracy_of(model, partial(scores_of, model), test_images, test_labels))
        run.widths.append(widths_of(model))
    return run


def summary(reference: Run, fused: Run, test_images: int) -> str:
    """A table of accuracy and times, and the agreement of the two runs."""
    grads = zip(reference.first_grads, fused.first_grads, strict=True)
    difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in grads)
    steps = len(reference.losses)
    same = next((step for step in range(steps) if reference.losses[step] != fused.losses[step]), steps)
    rows = [("neuron layer", "test accuracy ± its standard error", "median seconds per epoch")]
    for run in (reference, fused):
        share = run.accuracy[-1] / 100
        error = 100 * math.sqrt(share * (1 - share) / test_images)
        rows.append((run.label, f"{run.accuracy[-1]:.1f} ± {error:.1f} %", f"{median(run.seconds):.3f}"))
    rows.append(("times faster", "", f"{median(reference.seconds) / median(fused.seconds):.1f}"))
    return (
        f"{text_table(*rows)}\n"
        f"Rounding: gradients of the first step differ by at most {difference:.1e} of each tensor's largest value.\n"
        f"Losses are equal in the first {same} of {steps} steps. Then the differences grow, as rounding errors do."
    )


def draw(reference: Run, fused: Run, path: Path) -> None:
    """Draws accuracy and widths over the epochs of both runs. They nearly coincide: thin lines on broad pale ones."""
    with palette.panels(path, 1, 2, (11, 4)) as ((accuracy, width),):
        for run in (reference, fused):
            broad = {"linewidth": 6, "alpha": 0.35, "linestyle": "-", "marker": ""} if run is reference else {}
            epochs = range(len(run.widths))
            style = {**palette.line(0, color=palette.BLACK, linestyle="--"), **broad}
            accuracy.plot(epochs[1:], run.accuracy, label=f"{run.label}, {median(run.seconds):.2f} s/epoch", **style)
            for layer, values in enumerate(zip(*run.widths, strict=True)):
                style = {**palette.line(layer, markevery=max(1, len(values) // 8)), **broad}
                width.plot(epochs, values, label=f"layer {layer + 1}" if run is fused else None, **style)
        accuracy.set(title="Digits recognised", xlabel="epoch", ylabel="test accuracy (%)")
        accuracy.legend(loc="lower right", title="neuron layer")
        width.set(title="Learned width of the surrogate", xlabel="epoch", ylabel="width (1 = threshold)")
        width.legend(loc="upper left", bbox_to_anchor=(1, 1), title="thin: fused\nbroad: plain", handlelength=4)


def main() -> None:
    """Runs both trainings, then prints the table and draws the figure."""
    parser = parser_of("benchmarks.learning.demo", __doc__, "json")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of each training run (default: %(default)s)")
    parser.add_argument(
        "--figure",
        type=Path,
        default=Path("demo.png"),
        metavar="FILE",
        help="the figure to write (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not args.figure.absolute().parent.is_dir():
        parser.error(f"--figure must be in a folder that exists, got {args.figure}")
    if (problem := asgl_cuda.unavailable_backends().get("cpu")) is not None:
        parser.exit(1, f"the fused layer does not work here: {problem}\n")
    data = load_data(seed=0)
    print(
        f"{len(HIDDEN)} spiking layers of {HIDDEN[0]} neurons, T = {TIME_STEPS}, {len(data[0])} images to train on and "
        f"{len(data[1])} to test on, {torch.get_num_threads()} threads"
    )
    with Progress() as progress:
        reference = train("plain PyTorch", "reference", data, args.epochs, progress)
        fused = train("fused", None, data, args.epochs, progress)
    found = summary(reference, fused, len(data[1]))
    print(found)
    write_json(args.json, {"machine": machine(torch.device("cpu")), "printed": found.splitlines()})
    draw(reference, fused, args.figure)
    print(f"Figure: {args.figure.absolute()}")


if __name__ == "__main__":
    main()
