"""Study of a penalty on firing rates: accuracies, rates, and the layers that become spike layers.

Networks with batch normalisation are trained with Adam, without and with a penalty in the loss. The penalty is the mean
firing rate (`asgl_cuda.FiringRates`) times a weight that rises from 0 over the first steps.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import BatchNormLIF, OverTime

from .data import SOURCES, Data
from .neurons import OverSamples
from .optimizers import ADAM, accuracy_of, fit, optimizer_of
from .studies import Report, Study, paired

SETTINGS = {"steps": 250, "ramp": 100, "batch": 64}


def neurons(channels: int) -> nn.Module:
    """Without noise, whose smooth values are not zero."""
    return BatchNormLIF(channels, analog_prob=0.0)


def fully_connected(inputs: int, classes: int) -> nn.Module:
    hidden = [(nn.Linear(*pair), neurons(512)) for pair in itertools.pairwise((inputs, 512, 512, 512))]
    return OverSamples(nn.Flatten(2), *itertools.chain(*hidden), nn.Linear(512, classes))


def convolutional(pixels: int, classes: int) -> nn.Module:
    """A network of five convolutions, of which the third halves height and width."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise((1, 64, 64, 128, 128, 128))):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, stride=2 if number == 2 else 1, bias=False)
        layers += [OverTime(convolution), neurons(outputs)]
    return OverSamples(*layers, nn.Flatten(2), nn.Linear(128 * pixels // 4, classes))


SEEDS = 10
# The data, the network, and the weight of the penalty.
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], float]] = {
    "digits, fully connected": ("digits", partial(fully_connected, 64, 10), 3.0),
    "digits, convolutional": ("digits", partial(convolutional, 64, 10), 2.0),
    "mnist, convolutional": ("mnist", partial(convolutional, 196, 10), 2.0),
}


class Sparse(NamedTuple):
    """One training."""

    network: str
    penalty: bool
    seed: int


def trained(run: Sparse, settings: dict[str, int] = SETTINGS) -> tuple[nn.Module, Data]:
    """The network after training, and its data."""
    torch.manual_seed(run.seed)
    name, make, weight = NETWORKS[run.network]
    data = SOURCES[name].read(None)
    model = make().to(memory_format=torch.channels_last)
    weights = [weight * run.penalty * min(1, step / settings["ramp"]) for step in range(settings["steps"])]
    batches = [(each, torch.randint(len(data.train), (settings["batch"],))) for each in weights]
    with asgl_cuda.FiringRates(model) as rates:

        def loss_of(batch: Any) -> torch.Tensor:
            factor, samples = batch
            loss = functional.cross_entropy(model(data.train[samples]), data.train_labels[samples])
            return loss + factor * rates.penalty()

        fit(loss_of, batches, optimizer_of(model, ADAM))
    return model, data


def train_sparse(run: Sparse, settings: dict[str, int] = SETTINGS) -> dict[str, Any]:
    """Test accuracy in percent, rates by layer, and how many layers `to_spike_layers` replaces."""
    model, data = trained(run, settings)
    with asgl_cuda.Monitor(model.eval()) as monitor, torch.no_grad():
        model(data.test)
    _, report = asgl_cuda.to_spike_layers(model, data.test)
    return {
        "accuracy": round(accuracy_of(model, model, data.test, data.test_labels), 3),
        "rates": [round(each["firing_rate"], 4) for each in monitor.result().values()],
        "spike_layers": len(report.replaced),
    }


def sparse_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: by network and penalty accuracies and rates, means over the seeds."""
    table = []
    for network, penalty in itertools.product(NETWORKS, (False, True)):
        found = runs_of(report, network, penalty)
        if not found:
            continue
        accuracies = [each["accuracy"] for each in found]
        cells = [f"{statistics.fmean(accuracies):.1f}"]
        if penalty:
            gain, error = paired(accuracies, [each["accuracy"] for each in runs_of(report, network, False)])
            cells[0] += f" ({gain:+.1f} ± {error:.1f})"
        layers = [statistics.fmean(each) for each in zip(*(each["rates"] for each in found), strict=True)]
        cells.append(f"{min(layers):.2f} to {max(layers):.2f}")
        table.append([f"{network}, {'penalty' if penalty else 'none'}", *cells])
    return ["", "accuracy, %", "rates of the layers"], table


def runs_of(report: Report, network: str, penalty: bool) -> list[dict[str, Any]]:
    """The runs by seed."""
    return [run for run in report["runs"] if (run["network"], run["penalty"]) == (network, penalty)]


RUNS = list(itertools.starmap(Sparse, itertools.product(NETWORKS, (False, True), range(SEEDS))))
SPARSE = Study("sparse", {"settings": SETTINGS}, RUNS, train_sparse, listed=True)
