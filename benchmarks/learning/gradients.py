"""Fidelity of gradients along a training: the change of the loss by a step, as a share of what the gradient predicts.

At marks of a training the gradient of a batch is taken as the training takes it, with its noise. A step against it, of
all weights, so long that it predicts the loss to fall by a hundredth, is tried. The measured change, divided by the
prediction, is that of the loss with the same noise, and that of the loss of the embedded spiking network, with hard
spikes alone. 1 is a true gradient, 0 a useless one, 2 as far from the truth as 0. Three arms: the width fixed, learned
without noise, and learned with noise. Means over the seeds; differences between the last two arms are paired, with 95 %
intervals. Trained by SGD and by Adam, with two surrogates.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from ..common import machine, parser_of, write_json
from .batched import Networks, Setting, flat, trained
from .data import SOURCES, Data
from .optimizers import RATES
from .runs import paired
from .tables import print_table

SEEDS = 10
STEPS, MARKS = 120, (0, 20, 60, 119)
BATCH = 512
SURROGATES = ("rectangle", "sigmoid")
PREDICTED = 0.01  # of the loss
NOISY = "learned, noise 0.2"
ARMS: dict[str, dict[str, Any]] = {"fixed": {"learned": False}, "learned": {}, NOISY: {"analog_prob": 0.2}}


def fidelity(networks: Networks, samples: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Measured by predicted change of the loss, with the same noise and with none, of each network, left as it is."""
    seeds = len(networks.seeds)
    state = {key: value.clone() for key, value in networks.state_dict().items()}
    weights, generator = [*networks.weights], torch.get_rng_state()

    def loss(analog_prob: float) -> Tensor:
        torch.set_rng_state(generator)
        return networks.loss(samples[None], labels.expand(seeds, -1), analog_prob)

    losses = {"same noise": networks.setting.analog_prob, "spiking": 0.0}
    before = {name: loss(prob).detach() for name, prob in losses.items()}
    noisy = loss(networks.setting.analog_prob)
    grads = torch.autograd.grad(noisy.sum(), weights)
    predicted = PREDICTED * noisy.detach()
    size = predicted / sum(grad.square().sum((1, 2)) for grad in grads)
    with torch.no_grad():
        for weight, grad in zip(weights, grads, strict=True):
            weight -= size[:, None, None] * grad
        change = {name: (before[name] - loss(prob)) / predicted for name, prob in losses.items()}
    networks.load_state_dict(state)
    return {name: [round(value, 4) for value in values.tolist()] for name, values in change.items()}


def measure(
    data: Data, optimizer: str, surrogate: str, width: float, arm: str, seeds: int = SEEDS, steps: int = STEPS
) -> dict[str, Any]:
    """The fidelities at each mark, by seed."""
    found: dict[str, Any] = {}
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:BATCH]
    samples, labels = flat(data.train)[chosen], data.train_labels[chosen]

    def observe(networks: Networks, step: int) -> None:
        if step in MARKS:
            found[str(step)] = fidelity(networks, samples, labels)

    how = {"optimizer": optimizer, "rate": RATES[optimizer], "surrogate": surrogate}
    trained(data, Setting(width, steps=steps, **how, **ARMS[arm]), range(seeds), observe)
    return found


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the share of the predicted change by arm, and what noise adds to its distance from 1."""
    found = []
    for case, arms in report["runs"].items():
        for mark, quiet in arms["learned"].items():
            cells = [f"{statistics.fmean(by_mark[mark]['same noise']):.2f}" for by_mark in arms.values()]
            for name in ("same noise", "spiking"):
                noisy, without = ([abs(value - 1) for value in each[name]] for each in (arms[NOISY][mark], quiet))
                cells.append("{:+.2f} ± {:.2f}".format(*paired(noisy, without)))
            found.append([f"{case}, step {mark}", *cells])
    return ["", *ARMS, "distance from 1, by noise", "for the spiking network"], found


def main() -> int:
    """Trains and prints the table."""
    parser = parser_of("benchmarks.learning.gradients", __doc__, "json")
    parser.add_argument("--data", default="digits", choices=SOURCES)
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 5.0], help="at the start (default 1 5)")
    arguments = parser.parse_args()
    data = SOURCES[arguments.data].read(None)
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "data": arguments.data, "seeds": SEEDS}
    started = time.perf_counter()
    report["runs"] = {
        f"{optimizer}, {surrogate}, width {width:g}": {
            arm: measure(data, optimizer, surrogate, width, arm) for arm in ARMS
        }
        for optimizer, surrogate, width in itertools.product(RATES, SURROGATES, arguments.widths)
    }
    report["seconds"] = time.perf_counter() - started
    write_json(arguments.json, report)
    head, found = rows(report)
    print_table("Measured by predicted change of the loss", head, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
