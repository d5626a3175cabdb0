"""The paper's second claim: training the noisy network becomes training the spiking network embedded in it.

A network of six layers learns the digits under ASGL. After each epoch, for each layer: the learned width, the share of
elements whose potential is inside the window of the surrogate, and the smoothing error, the mean distance of the smooth
value from its spike. For the whole network: its loss with noise, and the loss of the spiking network with the same
weights, both on the test images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda.surrogate import SURROGATES

from .. import palette
from ..common import machine, parser_of, text_row, write_json
from .demo import BATCH_SIZE, load_data, scores_of, spiking_mlp
from .optimizers import cosine_schedules, optimizers_of

HIDDEN = (256,) * 6
OBSERVED = ("width", "inside", "smoothing_error")  # reported by asgl_cuda.Monitor for each layer
NOISE_DRAWS = 20  # for the mean of the noisy network's loss


def network(width: float, surrogate: str) -> nn.Sequential:
    return spiking_mlp(HIDDEN, width=width, surrogate=surrogate)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores_of(model, images), labels)


def train_epoch(model: nn.Module, images: Tensor, labels: Tensor, steppers: Sequence[Any]) -> None:
    model.train()
    for batch in torch.randperm(len(images)).split(BATCH_SIZE):
        model.zero_grad()
        loss_of(model, images[batch], labels[batch]).backward()
        for stepper in steppers:
            stepper.step()


@torch.no_grad()
def observe(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Widths, shares and errors by layer without noise; both losses, and the accuracy without noise."""
    model.eval()
    with asgl_cuda.Monitor(model) as monitor:
        scores = scores_of(model, images)
    layers = monitor.result().values()
    for _, neuron in asgl_cuda.asgl_layers(model):
        neuron.train()  # only neurons, so that only the noise differs
    noisy = [loss_of(model, images, labels).item() for _ in range(NOISE_DRAWS)]
    return {
        **{key: [layer[key] for layer in layers] for key in OBSERVED},
        "noisy_loss": sum(noisy) / len(noisy),
        "spiking_loss": functional.cross_entropy(scores, labels).item(),
        "accuracy": (scores.argmax(1) == labels).float().mean().item(),
    }


def run(width: float, surrogate: str, epochs: int, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """The observations before the first epoch and after each."""
    train_images, test_images, train_labels, test_labels = load_data(seed)
    torch.manual_seed(seed)
    model = network(width, surrogate)
    optimizers = optimizers_of(model, lr=0.1, width_lr=0.01)
    steppers = [*optimizers, *cosine_schedules(optimizers, epochs * -(-len(train_images) // BATCH_SIZE))]
    found = [observe(model, test_images, test_labels)]
    task = progress.add_task(f"{surrogate}, width {width:g}", total=epochs)
    for _ in range(epochs):
        train_epoch(model, train_images, train_labels, steppers)
        found.append(observe(model, test_images, test_labels))
        progress.advance(task)
    return found


@palette.styled
def plot(report: dict[str, Any], file: Path) -> None:
    """A row for each training: widths, shares and errors by layer, and the two losses."""
    from matplotlib.figure import Figure

    runs = report["runs"]
    figure = Figure(figsize=(17, 3.6 * len(runs)))
    rows = figure.subplots(len(runs), 4, squeeze=False)
    for row, each in zip(rows, runs, strict=True):
        epochs = each["epochs"]
        mark = max(1, len(epochs) // 8)
        for panel, key in zip(row, OBSERVED, strict=False):
            for layer in range(len(HIDDEN)):
                values = [epoch[key][layer] for epoch in epochs]
                panel.plot(values, label=f"layer {layer + 1}", **palette.line(layer, markevery=mark))
        for number, (key, label) in enumerate(
            (("noisy_loss", "noisy network"), ("spiking_loss", "embedded spiking network"))
        ):
            row[3].plot([epoch[key] for epoch in epochs], label=label, **palette.line(number, markevery=mark))
        row[0].set_ylabel(f"{each['surrogate']}, width {each['width']:g}")
        row[3].set_yscale("log")
        row[3].legend(fontsize=8, handlelength=4)
        for panel in row:
            panel.set_xlabel("epoch")
    titles = ("learned width", "share inside the window", "smoothing error E|H(u) - spike|", "loss on the test images")
    for panel, title in zip(rows[0], titles, strict=True):
        panel.set_title(title)
    rows[0][0].legend(fontsize=7, handlelength=4)
    figure.savefig(file, dpi=80)


def main() -> int:
    """Trains, prints the first and the last epoch, draws."""
    parser = parser_of("benchmarks.learning.smoothing", __doc__, "json", "plot")
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 5.0], help="at the start (default 1 5)")
    parser.add_argument("--surrogates", nargs="+", choices=SURROGATES, default=["rectangle", "sigmoid"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "seed": arguments.seed, "runs": []}
    with Progress(transient=True) as progress:
        for surrogate in arguments.surrogates:
            for width in arguments.widths:
                epochs = run(width, surrogate, arguments.epochs, arguments.seed, progress)
                report["runs"].append({"surrogate": surrogate, "width": width, "epochs": epochs})
    head = ("accuracy", "widths", "inside", "error", "noisy loss", "spiking loss", "gap")
    print(text_row("", head, 32, 14))
    for each in report["runs"]:
        for when, epoch in (("start", each["epochs"][0]), ("end", each["epochs"][-1])):
            means = [sum(epoch[key]) / len(HIDDEN) for key in OBSERVED]
            losses = epoch["noisy_loss"], epoch["spiking_loss"], abs(epoch["noisy_loss"] - epoch["spiking_loss"])
            cells = [f"{100 * epoch['accuracy']:.1f} %", *(f"{value:.4f}" for value in (*means, *losses))]
            print(text_row(f"{each['surrogate']}, width {each['width']:g}, {when}", cells, 32, 14))
    print("widths, inside, error: means over the layers")
    write_json(arguments.json, report)
    if arguments.plot:
        plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
