"""What adaptation is good for: LIF against adLIF and ALIF, on delayed recall and on vowels.

Recall: one of four groups of ten channels fires for ten steps, among noise; after a delay a cue asks which. Vowels are
29 steps of speech, centred and scaled. One and two layers of 64 neurons, decays and adaptations learned by neuron.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda

from ..common import parser_of
from .data import SOURCES
from .runs import add_jobs, begun, result_file, train_all
from .tables import print_table, print_total, spread

SEEDS, HIDDEN = 5, 64
STEPS = {"recall": 400, "vowels": 360}
TASKS = ("recall, 50 steps", "recall, 100 steps", "vowels")
PATTERNS, PATTERN_STEPS, CUE_STEPS = 4, 10, 5
# The decay at the start, and the adaptation; None for the ordinary neuron.
NEURONS: dict[str, tuple[float, dict[str, Any] | None]] = {
    "LIF, decay 0.9": (0.9, None),
    "LIF, decay 0.98": (0.98, None),
    "adLIF": (0.9, {}),
    "ALIF": (0.9, {"to_threshold": True}),
}


class Run(NamedTuple):
    """The trainings of one cell, of all seeds."""

    task: str
    neuron: str
    steps: int

    def __str__(self) -> str:
        return f"{self.task}: {self.neuron}"


def recall(samples: int, delay: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Events `[T, samples, 41]`, the last channel the cue's, and the patterns to recall."""
    labels = torch.randint(PATTERNS, (samples,), generator=generator)
    shape = PATTERN_STEPS + delay + CUE_STEPS, samples, 10 * PATTERNS + 1
    x_seq = (torch.rand(shape, generator=generator) < 0.02).float()
    fired = (torch.rand(PATTERN_STEPS, samples, 10, generator=generator) < 0.5).float()
    channels = 10 * labels[:, None] + torch.arange(10)
    x_seq[:PATTERN_STEPS].scatter_(2, channels.expand_as(fired), fired)
    x_seq[-CUE_STEPS:, :, -1] = 1
    return x_seq, labels


def network(features: int, classes: int, layers: int, neuron: str) -> nn.Sequential:
    decay, adaptation = NEURONS[neuron]
    options: dict[str, Any] = {"granularity": "neuron", "learn_decay": True, "decay": decay, "v_reset": None}
    made: list[nn.Module] = []
    for inputs in (features, *(HIDDEN,) * (layers - 1)):
        adapting = None if adaptation is None else {**options, **adaptation, "learn_adaptation": True}
        hidden = asgl_cuda.LIF(HIDDEN, **options) if adapting is None else asgl_cuda.AdaptiveLIF(HIDDEN, **adapting)
        made += [nn.Linear(inputs, HIDDEN), hidden]
    return nn.Sequential(*made, nn.Linear(HIDDEN, classes), asgl_cuda.LeakyIntegrator(decay=0.9, input_gain=0.1))


def train(run: Run) -> list[float]:
    """Test accuracies in percent, by seed."""
    return [_accuracy(run, seed) for seed in range(SEEDS)]


def _accuracy(run: Run, seed: int) -> float:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if run.task == "vowels":
        data = SOURCES["vowels"].read(None)
        mean, deviation = data.train.mean((0, 1)), data.train.std((0, 1)) + 1e-6
        train_set, test_set = (((each - mean) / deviation).movedim(1, 0) for each in (data.train, data.test))
        net = network(train_set.shape[2], data.classes, 2, run.neuron)
        asgl_cuda.calibrate(net, train_set[:, :128])
        read_out, rate = slice(None), 2e-3
    else:
        delay = int(run.task.split()[1])
        net = network(10 * PATTERNS + 1, PATTERNS, 1, run.neuron)
        read_out, rate = slice(-CUE_STEPS, None), 5e-3

    def scores(x_seq: Tensor) -> Tensor:
        return 5 * net(x_seq)[read_out].mean(0)

    optimizer = torch.optim.Adam(asgl_cuda.parameter_groups(net, lr=rate, width_lr=rate))
    for _ in range(run.steps):
        if run.task == "vowels":
            batch = torch.randint(train_set.shape[1], (32,), generator=generator)
            x_seq, labels = train_set[:, batch], data.train_labels[batch]
        else:
            x_seq, labels = recall(64, delay, generator)
        optimizer.zero_grad()
        functional.cross_entropy(scores(x_seq), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    net.eval()
    with torch.no_grad():
        x_seq, labels = (test_set, data.test_labels) if run.task == "vowels" else recall(1000, delay, generator)
        return round(100 * (scores(x_seq).argmax(1) == labels).float().mean().item(), 2)


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: mean accuracies, the least and the most."""
    tasks = list(dict.fromkeys(name.partition(": ")[0] for name in report["runs"]))
    found = []
    for neuron in NEURONS:
        values = [report["runs"][f"{task}: {neuron}"] for task in tasks]
        found.append([neuron, *map(spread, values)])
    return ["", *tasks], found


def main() -> int:
    """Trains all and prints the table."""
    parser = parser_of("benchmarks.learning.adaptation", __doc__, "json")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    add_jobs(parser)
    arguments = parser.parse_args()
    file = result_file(arguments.json, f"adaptation{'_quick' if arguments.quick else ''}")
    share = 10 if arguments.quick else 1
    steps = {kind: count // share for kind, count in STEPS.items()}
    report = begun(file, {"seeds": SEEDS, "hidden": HIDDEN, "steps": steps})
    runs = [Run(task, neuron, steps[task.split(",")[0]]) for task, neuron in itertools.product(TASKS, NEURONS)]
    train_all(runs, train, report, file, arguments.jobs)
    print_table("Test accuracy in percent, mean (least to most)", *rows(report))
    print_total(report, SEEDS, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
