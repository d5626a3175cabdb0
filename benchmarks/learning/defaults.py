"""Study of the layers' defaults: surrogate, initial width, noise and a detached reset against fixed surrogates.

Every task is a data set with a number of layers, time steps, a decay and a number of training steps. *Fixed* arms are
ordinary LIF neurons with the surrogates of other libraries: the width is fixed, and there is no noise. *Learned* arms
learn the width, by the step of `asgl_cuda.parameter_groups`. Each arm has its own learning rate of the weights, that of
three with the best mean accuracy of three seeds on a fifth of the training samples. At that rate ten seeds are trained,
and tested by hard spikes; differences between arms are paired by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from asgl_cuda.training.groups import WIDTH_LR

from .batched import Networks, Setting, flat, trained
from .noise import read_with_validation
from .optimizers import ADAM, ADAMW, SGD
from .studies import Report, Study, paired

SEEDS, CHOOSING = 10, 3  # of an arm at its rate; of each rate, to choose it
RATES = {SGD: [0.03, 0.1, 0.3], ADAM: [1e-3, 3e-3, 1e-2], ADAMW: [1e-3, 3e-3, 1e-2]}
FIXED: dict[str, dict[str, Any]] = {
    f"{surrogate} {width:g}": {"surrogate": surrogate, "width": width, "learned": False}
    for surrogate, width in (
        ("rectangle", 1.0), ("triangle", 1.0), ("arctan", 0.5), ("sigmoid", 0.25), ("sigmoid", 0.5)
    )
}  # fmt: skip


def learned(surrogate: str, width: float, noise: float, detached: bool) -> tuple[str, dict[str, Any]]:
    about = {"surrogate": surrogate, "width": width, "analog_prob": noise, "detach_reset": detached}
    return f"{surrogate} {width:g}, noise {noise:g}{', detached' if detached else ''}", about


LEARNED = dict(
    learned(*each)
    for each in (
        ("sigmoid", 1.0, 0.5, True), ("sigmoid", 1.0, 0.2, True), ("sigmoid", 1.0, 0.0, True),
        ("sigmoid", 0.5, 0.2, True), ("sigmoid", 0.5, 0.5, True), ("sigmoid", 1.0, 0.2, False),
        ("rectangle", 1.0, 0.2, False),
    )
)  # fmt: skip
ARMS = LEARNED | FIXED
DEFAULT = next(iter(LEARNED))  # of the layers


class Task(NamedTuple):
    """A task on which arms are compared: data set, layers, time steps, decay and training steps."""

    data: str = "digits"
    layers: int = 6
    time_steps: int = 4  # 0: those of the data
    decay: float = 0.5
    steps: int = 250


TASKS = (Task("tones", time_steps=0), Task(layers=10), Task(time_steps=1), Task(steps=60), Task())
CELLS = [
    *((task, optimizer) for task in TASKS for optimizer in (SGD, ADAM)),
    (Task(layers=10), ADAMW), (Task("mnist"), ADAM),
    (Task("digit_saccades", time_steps=0), ADAM), (Task(layers=2), ADAM),
    (Task("tones", time_steps=0, decay=0.9), ADAM), (Task(), ADAMW),
    (Task(layers=2, time_steps=20, decay=0.95), SGD), (Task(layers=2, time_steps=100, decay=0.9, steps=60), ADAM),
    (Task("tones", time_steps=0), ADAMW), (Task("mnist"), SGD), (Task(layers=2, time_steps=20, decay=0.95), ADAM),
]  # fmt: skip


class Run(NamedTuple):
    """The training runs of an arm, for all seeds. The first fields are those of a Task."""

    data: str
    layers: int
    time_steps: int
    decay: float
    steps: int
    optimizer: str
    arm: str


RUNS = [Run(*task, optimizer, arm) for task, optimizer in CELLS for arm in ARMS]


def train_run(run: Run, seeds: int = SEEDS, choosing: int = CHOOSING) -> dict[str, Any]:
    """Trains an arm: mean validation and test accuracies by learning rate, and all accuracies at the best rate."""
    data, validation, validation_labels = read_with_validation(run.data)
    setting = Setting(
        **ARMS[run.arm], layers=run.layers, time_steps=run.time_steps or data.train.shape[1], decay=run.decay,
        steps=run.steps, optimizer=run.optimizer, width_rate=WIDTH_LR,
    )  # fmt: skip

    def networks(rate: float, seeds: range) -> Networks:
        return trained(data, setting._replace(rate=rate), seeds)

    def test(networks: Networks) -> list[float]:
        return [round(each, 1) for each in networks.accuracies(flat(data.test), data.test_labels)]

    def validated(networks: Networks) -> float:
        return statistics.fmean(networks.accuracies(flat(validation), validation_labels))

    tried = {rate: networks(rate, range(choosing)) for rate in RATES[run.optimizer]}
    valid = {rate: validated(each) for rate, each in tried.items()}
    rate = max(valid, key=lambda rate: valid[rate])
    found = [tried[rate], networks(rate, range(choosing, seeds))]
    widths = [statistics.fmean(each) for networks in found for each in networks.widths()]
    return {
        "by_rate": [[round(valid[rate], 1), round(statistics.fmean(test(each)), 1)] for rate, each in tried.items()],
        "rate": rate,
        "test": [accuracy for each in found for accuracy in test(each)],
        "width": round(statistics.fmean(widths), 3),
    }


def accuracies(report: Report) -> Iterator[tuple[Task, str, dict[str, list[float]]]]:
    """For each cell whose arms have all been trained: the task, the optimizer and the accuracies by arm."""
    found = {Run(*(each[field] for field in Run._fields)): each["test"] for each in report["runs"]}
    for task, optimizer in CELLS:
        runs = {arm: found.get(Run(*task, optimizer, arm)) for arm in ARMS}
        cell = {arm: test for arm, test in runs.items() if test is not None}
        if len(cell) == len(runs):
            yield task, optimizer, cell


def named(task: Task) -> str:
    time = f", T = {task.time_steps}" if task.time_steps else ""
    return f"{task.data}, {task.layers} layers{time}, decay {task.decay:g}, {task.steps} steps"


def gains(cell: dict[str, list[float]]) -> tuple[str, dict[str, tuple[float, float]]]:
    """The fixed arm with the best mean test accuracy, and each learned arm's gain over it, +- half its interval."""
    best = max(FIXED, key=lambda arm: statistics.fmean(cell[arm]))
    return best, {arm: paired(cell[arm], cell[best]) for arm in LEARNED}


def lost(report: Report) -> dict[str, Any]:
    """The number of cells in which each learned arm loses to the best fixed one by more than its interval.

    For arms other than the default, the range of these numbers, and the surrogate with the largest. Also the number of
    cells in which the best fixed arm has the highest of its learning rates.
    """
    found = [gains(cell)[1] for _, _, cell in accuracies(report)]
    by_arm = {arm: sum(gain[arm][0] < -gain[arm][1] for gain in found) for arm in LEARNED}
    others = {arm: count for arm, count in by_arm.items() if arm != DEFAULT}
    rates = {Run(*(each[field] for field in Run._fields)): each["rate"] for each in report["runs"]}
    highest = sum(
        rates[Run(*task, optimizer, gains(cell)[0])] == max(RATES[optimizer])
        for task, optimizer, cell in accuracies(report)
    )
    most = max(others, key=lambda arm: others[arm]).partition(" ")[0]
    between = f"{min(others.values())} to {max(others.values())}"
    return {"cells": len(found), "lost": by_arm[DEFAULT], "others": between, "most": most, "highest": highest}


def rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: each cell's best fixed arm, and the gains of learned arms with 95 % intervals."""
    table = []
    for task, optimizer, cell in accuracies(report):
        best, found = gains(cell)
        cells = ("{:+.1f} ± {:.1f}".format(*gain) for gain in found.values())
        table.append([named(task), optimizer, f"{best}: {statistics.fmean(cell[best]):.1f}", *cells])
    return ["", "weights", "best fixed", *LEARNED], table


SETTINGS = {"settings": {"seeds": SEEDS, "choosing": CHOOSING, "rates": RATES, "base": Setting(1.0)._asdict()}}
DEFAULTS = Study("defaults", SETTINGS, RUNS, train_run, listed=True)
