"""How far a noisy network is from the spiking network embedded in it, trained with the noise of ASGL and without.

Networks of six layers with learned widths learn the digits. After each epoch, as means over the layers: the width, the
share of elements whose potential is inside the window of the surrogate, and the smoothing error, the mean distance of
the smooth value from its spike. For the whole network, on the test images: its loss with noise, also where it was
trained without, and the loss of the spiking network with the same weights.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda.surrogate import SURROGATES

from .. import palette
from ..common import machine, parser_of, write_json
from .demo import ANALOG_PROB, BATCH_SIZE, load_data, scores_of, spiking_mlp
from .optimizers import RATES, optimizer_of
from .tables import print_table

HIDDEN = (64,) * 6
OBSERVED = ("width", "inside", "smoothing_error")  # reported by asgl_cuda.Monitor for each layer
LOSSES = {"noisy_loss": "noisy network", "spiking_loss": "embedded spiking network"}
NOISE_DRAWS = 20  # for the mean of the noisy network's loss
ARMS = {"noise": ANALOG_PROB, "no noise": 0.0}


def network(width: float, surrogate: str, analog_prob: float) -> nn.Sequential:
    return spiking_mlp(HIDDEN, width=width, surrogate=surrogate, analog_prob=analog_prob)


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
def observe(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Widths, shares and errors without noise, means over the layers; and both losses."""
    model.eval()
    with asgl_cuda.Monitor(model) as monitor:
        spiking = loss_of(model, images, labels).item()
    layers = monitor.result().values()
    neurons = [neuron for _, neuron in asgl_cuda.asgl_layers(model)]
    probs = [neuron.analog_prob for neuron in neurons]
    for neuron in neurons:
        neuron.train()  # only neurons, so that only the noise differs
        neuron.analog_prob = ANALOG_PROB
    noisy = [loss_of(model, images, labels).item() for _ in range(NOISE_DRAWS)]
    for neuron, prob in zip(neurons, probs, strict=True):
        neuron.analog_prob = prob
    means = {key: statistics.fmean(layer[key] for layer in layers) for key in OBSERVED}
    return {**means, "noisy_loss": statistics.fmean(noisy), "spiking_loss": spiking}


def run(
    optimizer: str, width: float, surrogate: str, analog_prob: float, epochs: int, seed: int
) -> list[dict[str, float]]:
    """The observations before the first epoch and after each."""
    train_images, test_images, train_labels, test_labels = load_data(seed)
    torch.manual_seed(seed)
    model = network(width, surrogate, analog_prob)
    stepped = optimizer_of(model, optimizer)
    steps = epochs * -(-len(train_images) // BATCH_SIZE)
    steppers = [stepped, torch.optim.lr_scheduler.CosineAnnealingLR(stepped, steps)]
    found = [observe(model, test_images, test_labels)]
    for _ in range(epochs):
        train_epoch(model, train_images, train_labels, steppers)
        found.append(observe(model, test_images, test_labels))
    return found


def over_seeds(runs: Sequence[list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Means and standard deviations of each quantity, by epoch."""
    by_epoch = [{key: [epoch[key] for epoch in epochs] for key in epochs[0]} for epochs in zip(*runs, strict=True)]
    return {
        key: {
            "mean": [round(statistics.fmean(values[key]), 5) for values in by_epoch],
            "deviation": [round(statistics.stdev(values[key]), 5) for values in by_epoch],
        }
        for key in by_epoch[0]
    }


def case_of(run: dict[str, Any]) -> str:
    return f"{run['optimizer']}, {run['surrogate']}, width {run['width']:g}"


@palette.styled
def plot(report: dict[str, Any], file: Path) -> None:
    """A row for each optimizer, surrogate and width: widths, shares and errors, and the two losses, of both arms."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(case_of(each) for each in report["runs"]))
    figure = Figure(figsize=(17, 3.4 * len(names)))
    rows = figure.subplots(len(names), 4, squeeze=False)
    for each in report["runs"]:
        row = rows[names.index(case_of(each))]
        number = list(ARMS).index(each["arm"])
        series = [(panel, key, each["arm"], number) for panel, key in zip(row, OBSERVED, strict=False)]
        series += [(row[3], key, f"{each['arm']}: {LOSSES[key]}", 2 * number + i) for i, key in enumerate(LOSSES)]
        for panel, key, label, style in series:
            mean, deviation = (torch.tensor(each["observed"][key][which]) for which in ("mean", "deviation"))
            panel.plot(mean, label=label, **palette.line(style, markevery=max(1, len(mean) // 8)))
            panel.fill_between(
                range(len(mean)), mean - deviation, mean + deviation, color=palette.CYCLE[style], alpha=0.2, linewidth=0
            )
    for row, name in zip(rows, names, strict=True):
        row[0].set_ylabel(name)
        row[3].set_yscale("log")
        for panel in row:
            panel.set_xlabel("epoch")
    titles = ("learned width", "share inside the window", "smoothing error E|H(u) - spike|", "loss on the test images")
    for panel, title in zip(rows[0], titles, strict=True):
        panel.set_title(title)
    rows[0][0].legend(title="trained with", handlelength=4)
    rows[0][3].legend(title="trained with", fontsize=8, handlelength=4)
    figure.savefig(file, dpi=70)


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: widths and errors at the start and the end, losses at the end."""
    found = []
    for each in report["runs"]:
        observed = each["observed"]
        cells = [
            f"{observed[key]['mean'][0]:.2f} to {observed[key]['mean'][-1]:.2f} ± {observed[key]['deviation'][-1]:.2f}"
            for key in ("width", "smoothing_error")
        ]
        cells += [f"{observed[key]['mean'][-1]:.3f} ± {observed[key]['deviation'][-1]:.3f}" for key in LOSSES]
        found.append([f"{case_of(each)}, {each['arm']}", *cells])
    return ["", "learned width", "smoothing error", "loss, noisy", "loss, spiking"], found


def main() -> int:
    """Trains, prints the first and the last epoch, draws."""
    parser = parser_of("benchmarks.learning.smoothing", __doc__, "json", "plot")
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 5.0], help="at the start (default 1 5)")
    parser.add_argument("--surrogates", nargs="+", choices=SURROGATES, default=["rectangle", "sigmoid"])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "machine": machine(torch.device("cpu")), "seeds": arguments.seeds, "epochs": arguments.epochs, "runs": [],
    }  # fmt: skip
    cases = itertools.product(RATES, arguments.surrogates, arguments.widths, ARMS)
    for optimizer, surrogate, width, arm in track([*cases]):
        seeds = range(arguments.seeds)
        runs = [run(optimizer, width, surrogate, ARMS[arm], arguments.epochs, seed) for seed in seeds]
        case = {"optimizer": optimizer, "surrogate": surrogate, "width": width, "arm": arm}
        report["runs"].append({**case, "observed": over_seeds(runs)})
        write_json(arguments.json, report)
    head, found = rows(report)
    print_table("Means over the layers, and standard deviations over the seeds", head, found)
    if arguments.plot:
        plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
