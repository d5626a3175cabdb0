"""The effect of `asgl_cuda.calibrate`: test accuracy of networks without normalisation, by calibrated rate.

Each network is trained by SGD with momentum and by Adam, from torch's default weights and from the same weights
calibrated to a rate on 256 training samples. The last layer's rate is measured before training.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import LIF, OverTime

from ..common import machine, parser_of, write_json
from .data import SOURCES
from .runs import add_jobs, result_file, trainings
from .tables import print_table

RATES = (None, 0.05, 0.1, 0.2, 0.4)  # None: not calibrated
SEEDS = 3
STEPS = 350
BATCH = 64
SAMPLES = 256  # to calibrate on
TIME_STEPS = 4  # of an image
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
}


def linear(inputs: int, layers: int, classes: int, **neuron: Any) -> nn.Sequential:
    sizes = (inputs, *(128,) * layers)
    hidden = [(nn.Linear(*pair), LIF(**neuron)) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(nn.Flatten(2), *itertools.chain(*hidden), nn.Linear(128, classes))


def convolutional(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((1, 16, 16, 32, 32)):
        if inputs < outputs == 32:
            layers.append(OverTime(nn.MaxPool2d(2)))
        layers += [OverTime(nn.Conv2d(inputs, outputs, 3, padding=1)), LIF()]
    return nn.Sequential(*layers, nn.Flatten(2), nn.Linear(512, 128), LIF(), nn.Linear(128, classes))


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {  # the data, and the network
    "digits, 2 layers": ("digits", partial(linear, 64, 2, 10)),
    "digits, 6 layers": ("digits", partial(linear, 64, 6, 10)),
    "digits, 12 layers": ("digits", partial(linear, 64, 12, 10)),
    "digits, 12 layers, triangle": ("digits", partial(linear, 64, 12, 10, surrogate="triangle")),
    "digits, convolutional, 5 layers": ("digits", partial(convolutional, 10)),
    "vowels, 6 layers": ("vowels", partial(linear, 12, 6, 9)),
}


class Run(NamedTuple):
    """One training."""

    network: str
    optimizer: str
    rate: float | None
    seed: int


def scores_of(model: nn.Module, samples: Tensor) -> Tensor:
    """`[B, classes]`, means over time."""
    x_seq = samples.transpose(0, 1)
    if x_seq.shape[0] == 1:
        x_seq = x_seq.expand(TIME_STEPS, *x_seq.shape[1:])
    scores: Tensor = model(x_seq).mean(0)
    return scores


@torch.no_grad()
def accuracy_of(model: nn.Module, samples: Tensor, labels: Tensor) -> float:
    """The accuracy in percent, with hard spikes."""
    model.eval()
    right = sum(
        int((scores_of(model, batch).argmax(1) == wanted).sum())
        for batch, wanted in zip(samples.split(256), labels.split(256), strict=True)
    )
    return 100 * right / len(labels)


def train(run: Run, steps: int = STEPS) -> dict[str, Any]:
    """Accuracy in percent on the test samples, and the last layer's rate before the first step.

    Both are None where no weights reach the rate, as with mostly silent samples.
    """
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    name, make = NETWORKS[run.network]
    data = SOURCES[name].read(None)
    model = make()
    samples = data.train[torch.randperm(len(data.train))[:SAMPLES]]
    if run.rate is not None:
        try:
            asgl_cuda.calibrate(_Scored(model), samples, run.rate)
        except ValueError:
            return {"accuracy": None, "last_rate": None}
    with asgl_cuda.spiking_eval(model), asgl_cuda.Monitor(model) as monitor, torch.no_grad():
        scores_of(model, samples)
    *_, last = monitor.result().values()
    optimizer = OPTIMIZERS[run.optimizer](model.parameters())
    for _ in range(steps):
        batch = torch.randint(len(data.train), (BATCH,))
        loss = functional.cross_entropy(scores_of(model, data.train[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"accuracy": accuracy_of(model, data.test, data.test_labels), "last_rate": last["firing_rate"]}


class _Scored(nn.Module):
    """A network from samples to scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Tensor) -> Tensor:
        return scores_of(self.model, samples)


def name_of(rate: float | None) -> str:
    return "as made" if rate is None else f"{rate:g}"


def summary(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: mean accuracies over the seeds by rate, and the last layer's rate as made."""
    rates = list(dict.fromkeys(run["rate"] for run in report["runs"]))
    found: dict[tuple[str, str], dict[float | None, list[dict[str, Any]]]] = {}
    for run in report["runs"]:
        found.setdefault((run["network"], run["optimizer"]), {}).setdefault(run["rate"], []).append(run)
    rows = []
    for (network, optimizer), by_rate in found.items():
        cells = []
        for rate in rates:
            reached = [run["accuracy"] for run in by_rate[rate] if run["accuracy"] is not None]
            cells.append(f"{statistics.fmean(reached):.1f}" if len(reached) == len(by_rate[rate]) else "out of reach")
        last = statistics.fmean(run["last_rate"] for run in by_rate[None])
        rows.append([f"{network}, {optimizer}", f"{last:.4f}", *cells])
    return ["", "rate of the last layer, as made", *map(name_of, rates)], rows


def main() -> int:
    """Trains all, prints the table."""
    parser = parser_of("benchmarks.learning.calibration", __doc__, "json")
    parser.add_argument("--quick", action="store_true", help="one seed, two rates, a tenth of the steps")
    add_jobs(parser)
    arguments = parser.parse_args()
    rates, seeds, steps = (RATES[::3], 1, STEPS // 10) if arguments.quick else (RATES, SEEDS, STEPS)
    file = result_file(arguments.json, f"calibration{'_quick' if arguments.quick else ''}")
    runs = [Run(*each) for each in itertools.product(NETWORKS, OPTIMIZERS, rates, range(seeds))]
    started = time.perf_counter()
    with trainings(partial(train, steps=steps), runs, arguments.jobs) as waiting:
        results = [each.result() for each in track(waiting)]
    report = {
        "machine": machine(torch.device("cpu")),
        "settings": {"steps": steps, "batch": BATCH, "samples": SAMPLES, "seeds": seeds},
        "seconds": time.perf_counter() - started,
        "runs": [run._asdict() | result for run, result in zip(runs, results, strict=True)],
    }
    write_json(file, report)
    print_table("Test accuracy in percent, by calibrated rate", *summary(report))
    print(f"{len(runs)} trainings in {report['seconds'] / 60:.1f} minutes, in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
