"""The paper's second claim: training the noisy network becomes training the spiking network embedded in it.

A network of six layers learns the digits under ASGL. After each epoch, for each layer: the learned width, the share of
elements whose potential lies inside the window of the surrogate, and the smoothing error, the mean distance of the
smooth value from the spike that it stands for. And for the whole: the loss of the noisy network against that of the
spiking network with the same weights, both on the test images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import OverTime
from asgl_cuda.surrogate import SURROGATES

from .demo import load_data
from .microbench import machine

STEPS = 4
HIDDEN = (256,) * 6
BATCH = 64
ANALOG_PROB = 0.2
# Where a surrogate changes: the rectangle's window, and as much of the sigmoid's range as lies around 1/2 alike.
WINDOW = 0.5
NOISE_DRAWS = 20  # over which the noisy network's loss is averaged


def network(width: float, surrogate: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((64, *HIDDEN)):
        layers += [OverTime(nn.Linear(inputs, outputs, bias=False)), OverTime(nn.BatchNorm1d(outputs))]
        layers += [asgl_cuda.LIF(width=width, surrogate=surrogate, analog_prob=ANALOG_PROB)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 10))


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model(images.expand(STEPS, -1, -1)).mean(0), labels)


def optimizers_of(model: nn.Module, epochs: int, batches: int) -> list[Any]:
    """SGD for the weights, as the authors have it; Adam without decay for the widths. And the schedules of both."""
    widths = [value for name, value in model.named_parameters() if name.endswith("log_width")]
    others = [value for name, value in model.named_parameters() if not name.endswith("log_width")]
    optimizers = [
        torch.optim.SGD(others, lr=0.1, momentum=0.9, weight_decay=5e-4),
        torch.optim.Adam(widths, lr=0.01),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, epochs * batches) for each in optimizers]
    return [*optimizers, *schedules]


def train_epoch(model: nn.Module, images: Tensor, labels: Tensor, steppers: Sequence[Any]) -> None:
    model.train()
    for batch in torch.randperm(len(images)).split(BATCH):
        model.zero_grad()
        loss_of(model, images[batch], labels[batch]).backward()
        for stepper in steppers:
            stepper.step()


@torch.no_grad()
def observe(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Widths, shares and errors by layer, in the network without noise; both losses, and the accuracy without noise."""
    layers: dict[str, list[float]] = {"width": [], "inside": [], "smoothing_error": []}

    def look(neuron: nn.Module, inputs: tuple[Tensor], s_seq: Tensor) -> None:
        assert isinstance(neuron, asgl_cuda.LIF)
        width = float(neuron.width)
        output = asgl_cuda.lif(
            inputs[0], decay=neuron.decay, width=width, surrogate=neuron.surrogate, return_h_seq=True
        )
        assert torch.equal(output.s_seq, s_seq)
        y = (output.h_seq - neuron.v_threshold) / width
        layers["width"].append(width)
        layers["inside"].append((y.abs() < WINDOW).float().mean().item())
        smooth = SURROGATES[neuron.surrogate].cumulative(y)
        layers["smoothing_error"].append((smooth - s_seq).abs().mean().item())

    model.eval()
    neurons = [layer for layer in model.modules() if isinstance(layer, asgl_cuda.LIF)]
    handles = [neuron.register_forward_hook(look) for neuron in neurons]
    scores = model(images.expand(STEPS, -1, -1)).mean(0)
    for handle in handles:
        handle.remove()
    for neuron in neurons:
        neuron.train()  # these alone, so that the noise is the only difference
    noisy = [loss_of(model, images, labels).item() for _ in range(NOISE_DRAWS)]
    return {
        **layers,
        "noisy_loss": sum(noisy) / len(noisy),
        "spiking_loss": functional.cross_entropy(scores, labels).item(),
        "accuracy": (scores.argmax(1) == labels).float().mean().item(),
    }


def run(width: float, surrogate: str, epochs: int, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """What was observed before the first epoch and after each."""
    train_images, test_images, train_labels, test_labels = load_data(seed)
    torch.manual_seed(seed)
    model = network(width, surrogate)
    steppers = optimizers_of(model, epochs, -(-len(train_images) // BATCH))
    found = [observe(model, test_images, test_labels)]
    task = progress.add_task(f"{surrogate}, width {width:g}", total=epochs)
    for _ in range(epochs):
        train_epoch(model, train_images, train_labels, steppers)
        found.append(observe(model, test_images, test_labels))
        progress.advance(task)
    return found


def plot(report: dict[str, Any], file: Path) -> None:
    """A row for each training: widths, shares and errors by layer, and the two losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = report["runs"]
    figure, rows = plt.subplots(len(runs), 4, figsize=(17, 3.6 * len(runs)), layout="constrained", squeeze=False)
    shades = plt.get_cmap("viridis")
    for row, each in zip(rows, runs, strict=True):
        epochs = each["epochs"]
        for panel, key in zip(row, ("width", "inside", "smoothing_error"), strict=False):
            for layer in range(len(HIDDEN)):
                values = [epoch[key][layer] for epoch in epochs]
                panel.plot(values, color=shades(layer / len(HIDDEN)), label=f"layer {layer + 1}")
        for key, label in (("noisy_loss", "noisy network"), ("spiking_loss", "embedded spiking network")):
            row[3].plot([epoch[key] for epoch in epochs], label=label)
        row[0].set_ylabel(f"{each['surrogate']}, width {each['width']:g}")
        row[3].set_yscale("log")
        row[3].legend(fontsize=8)
        for panel in row:
            panel.grid(alpha=0.3)
            panel.set_xlabel("epoch")
    titles = ("learned width", "share inside the window", "smoothing error E|H(u) - spike|", "loss on the test images")
    for panel, title in zip(rows[0], titles, strict=True):
        panel.set_title(title)
    rows[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=80)


def main() -> int:
    """Trains, prints the first and the last epoch, draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoothing", description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 5.0], help="at the start (default 1 5)")
    parser.add_argument("--surrogates", nargs="+", choices=SURROGATES, default=["rectangle", "sigmoid"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was observed to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "seed": arguments.seed, "runs": []}
    with Progress(transient=True) as progress:
        for surrogate in arguments.surrogates:
            for width in arguments.widths:
                epochs = run(width, surrogate, arguments.epochs, arguments.seed, progress)
                report["runs"].append({"surrogate": surrogate, "width": width, "epochs": epochs})
    head = ("accuracy", "widths", "inside", "error", "noisy loss", "spiking loss", "gap")
    print(f"{'':<32}" + "".join(f"{cell:>14}" for cell in head))
    for each in report["runs"]:
        for when, epoch in (("start", each["epochs"][0]), ("end", each["epochs"][-1])):
            means = [sum(epoch[key]) / len(HIDDEN) for key in ("width", "inside", "smoothing_error")]
            losses = epoch["noisy_loss"], epoch["spiking_loss"], abs(epoch["noisy_loss"] - epoch["spiking_loss"])
            cells = [f"{100 * epoch['accuracy']:.1f} %", *(f"{value:.4f}" for value in (*means, *losses))]
            name = f"{each['surrogate']}, width {each['width']:g}, {when}"
            print(f"{name:<32}" + "".join(f"{cell:>14}" for cell in cells))
    print("widths, inside, error: means over the layers")
    if arguments.json:
        arguments.json.write_text(json.dumps(report) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
