"""What the noise does: accuracies with shares of analog elements, less those of the same learned widths without noise.

Cells: data sets, one time step or several, 60 and 250 steps, a first width of 1 or 10; in each, weights by SGD with
momentum and by Adam, and two surrogates. Every arm has five learning rates, one of which is chosen by accuracy on
a fifth of the training samples, the mean over the seeds; the tables show accuracy on the test samples, and mark what
chose the least or the largest rate. Differences are paired by seed: weights and the order of the samples are the same.
One task has controls: a fixed width, all elements analog, a share that falls, and dropout of spikes. Widths take the
step of `asgl_cuda.parameter_groups`. Long sequences are halved.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sklearn.model_selection import train_test_split
from torch import Tensor

from asgl_cuda.training.groups import WIDTH_LR

from .. import palette
from ..common import parser_of
from .batched import Setting, flat, shortened, trained
from .data import SOURCES, Data
from .optimizers import ADAM, SGD
from .runs import add_jobs, begun, paired, result_file, train_all
from .tables import print_table, print_total

IMAGES = ("digits", "mnist")
RATES = {SGD: (0.03, 0.1, 0.3, 1.0, 3.0), ADAM: (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
SURROGATES = ("rectangle", "sigmoid")
SEEDS = 10
HOW = tuple(itertools.product(RATES, SURROGATES))
EDGE = " *"  # of a gain, where an arm chose the least or the largest rate
QUIET = "0"  # the arm that the others are compared with
SHARES: dict[str, dict[str, Any]] = {QUIET: {}, "0.2": {"analog_prob": 0.2}, "0.5": {"analog_prob": 0.5}}
CONTROLS: dict[str, dict[str, Any]] = {
    "1": {"analog_prob": 1.0},
    "0.5 to 0": {"analog_prob": 0.5, "annealed": True},
    "fixed width": {"learned": False},
    **{f"dropout {share:g}": {"dropout": share} for share in (0.02, 0.05, 0.1, 0.2, 0.5)},
}
ARMS = SHARES | CONTROLS


class Cell(NamedTuple):
    """The circumstances under which arms are compared."""

    data: str
    time_steps: int  # 0: those of the data
    steps: int
    width: float
    optimizer: str
    surrogate: str

    def __str__(self) -> str:
        return " ".join(map(str, self[:3])) + f" {self.width:g} {self.optimizer} {self.surrogate}"


class Run(NamedTuple):
    """The trainings of all seeds with one rate."""

    cell: Cell
    arm: str
    rate: float

    def __str__(self) -> str:
        return f"{self.cell} {self.rate:g} {self.arm}"


TASKS = (
    ("digits", 1, 60, 1.0), ("digits", 1, 250, 1.0), ("digits", 4, 60, 1.0), ("digits", 4, 250, 1.0),
    ("digits", 4, 250, 10.0), ("mnist", 1, 250, 1.0), ("tones", 0, 250, 1.0),
)  # fmt: skip
CONTROLLED = TASKS[1]


def cells() -> Iterator[Cell]:
    for task in TASKS:
        yield from (Cell(*task, *how) for how in HOW)


def arms_of(cell: Cell) -> dict[str, dict[str, Any]]:
    return ARMS if cell[:4] == CONTROLLED else SHARES


def all_runs() -> list[Run]:
    return [
        Run(cell, arm, rate)
        for cell in cells()
        for arm, rate in itertools.product(arms_of(cell), RATES[cell.optimizer])
    ]


@cache
def read(name: str) -> tuple[Data, Tensor, Tensor]:
    """The set without its samples for validation, and these."""
    data = shortened(SOURCES[name].read(None))
    train, validation, train_labels, validation_labels = train_test_split(
        data.train, data.train_labels, test_size=0.2, stratify=data.train_labels, random_state=0
    )
    return data._replace(train=train, train_labels=train_labels), validation, validation_labels


def train(run: Run, seeds: int = SEEDS) -> dict[str, Any]:
    """Mean accuracy in validation, accuracies in the test, and the final widths, means over the layers."""
    data, validation, validation_labels = read(run.cell.data)
    cell = run.cell
    setting = Setting(
        cell.width, steps=cell.steps, time_steps=cell.time_steps or data.train.shape[1], rate=run.rate,
        optimizer=cell.optimizer, surrogate=cell.surrogate, width_rate=WIDTH_LR, **ARMS[run.arm],
    )  # fmt: skip
    networks = trained(data, setting, range(seeds))
    return {
        "validation": statistics.fmean(networks.accuracies(flat(validation), validation_labels)),
        "test": networks.accuracies(flat(data.test), data.test_labels),
        "widths": [round(statistics.fmean(widths), 3) for widths in networks.widths()],
    }


class Chosen(NamedTuple):
    """An arm at the rate that validation chose: its accuracies, and its mean gain on the quiet arm with +- half."""

    rate: float
    at_edge: bool  # the rate is the least or the largest that was tried
    test: list[float]
    gain: float
    half: float


def chosen(report: dict[str, Any], cell: Cell, arm: str) -> Chosen | None:
    """None where it was not trained."""
    rates = RATES[cell.optimizer]

    def best(arm: str) -> tuple[float, list[float]] | None:
        found = {rate: report["runs"].get(str(Run(cell, arm, rate))) for rate in rates}
        if not all(found.values()):
            return None
        rate = max(rates, key=lambda rate: found[rate]["validation"])
        return rate, found[rate]["test"]

    this, quiet = best(arm), best(QUIET)
    if this is None or quiet is None:
        return None
    rate, test = this
    return Chosen(rate, rate in (rates[0], rates[-1]), test, *paired(test, quiet[1]))


def named(task: tuple[Any, ...]) -> str:
    """A task, or the task of a cell."""
    data, time_steps, steps, width, *_ = task
    time = f", T = {time_steps}" if time_steps else ""
    return f"{data}{time}, {steps} steps, width {width:g}"


def gain_of(report: dict[str, Any], cell: Cell, arm: str) -> str:
    """Empty where it was not trained."""
    this, quiet = chosen(report, cell, arm), chosen(report, cell, QUIET)
    if this is None or quiet is None:
        return ""
    return f"{this.gain:+.1f} ± {this.half:.1f}{EDGE if this.at_edge or quiet.at_edge else ''}"


def rows(report: dict[str, Any], arm: str) -> Iterator[list[str]]:
    """A row a task: accuracy without noise, and the gain of an arm, by optimizer and surrogate."""
    for task in TASKS:
        cells = [Cell(*task, *how) for how in HOW]
        quiet = [chosen(report, cell, QUIET) for cell in cells]
        if any(quiet):
            found = zip(cells, quiet, strict=True)
            gains = (
                each and f"{statistics.fmean(each.test):.1f}, {gain_of(report, cell, arm)}" for cell, each in found
            )
            yield [named(task), *(each or "" for each in gains)]


HEAD = ["", *map(", ".join, HOW)]


def control_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """A row an arm: its gain in each cell that has controls."""
    for arm in (*list(SHARES)[1:], *CONTROLS):
        yield [arm, *(gain_of(report, cell, arm) for cell in cells() if cell[:4] == CONTROLLED)]


def control_head() -> list[str]:
    cases = (cell for cell in cells() if cell[:4] == CONTROLLED)
    return ["", *(f"{cell.optimizer}, {cell.surrogate}" for cell in cases)]


@palette.styled
def plot(report: dict[str, Any], file: Path) -> None:
    """Gains of the shares in each task, by optimizer and surrogate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.2 + 0.42 * len(TASKS)))
    panels = figure.subplots(1, len(HOW), sharex=True, sharey=True)
    for panel, how in zip(panels, HOW, strict=True):
        panel.axvline(0, color=palette.BLACK, linewidth=0.8)
        for number, arm in enumerate(arm for arm in SHARES if arm != QUIET):
            found = [(row, each) for row, task in enumerate(TASKS) if (each := chosen(report, Cell(*task, *how), arm))]
            if found:
                places, arms = zip(*found, strict=True)
                places = [place + 0.24 * number - 0.12 for place in places]
                gains, halves = [each.gain for each in arms], [each.half for each in arms]
                style = palette.line(number) | {"linestyle": "none"}
                panel.errorbar(gains, places, xerr=halves, capsize=3, label=arm, **style)
        panel.set(title=f"{how[0]}, {how[1]}", xlabel="gain on no noise (points)")
    panels[0].set_yticks(range(len(TASKS)), map(named, TASKS))
    panels[0].invert_yaxis()
    drawn = max((panel.get_legend_handles_labels() for panel in panels), key=lambda each: len(each[0]))
    figure.legend(*drawn, title="analog_prob", loc="outside right upper")
    figure.savefig(file, dpi=80)


def main() -> int:
    """Trains missing runs, prints the table, draws the figure."""
    parser = parser_of("benchmarks.learning.noise", __doc__, "json", "plot")
    add_jobs(parser)
    arguments = parser.parse_args()
    file = result_file(arguments.json, "noise")
    report = begun(file, {"seeds": SEEDS, "base": Setting(1.0)._asdict()})
    train_all(all_runs(), train, report, file, arguments.jobs)
    for arm in list(SHARES)[1:]:
        title = f"Test accuracy in percent without noise, and the gain of {arm}, with 95 % intervals over the seeds"
        print_table(title, HEAD, rows(report, arm))
    print_table(f"Gains on {named(CONTROLLED)}", control_head(), control_rows(report))
    print_total(report, SEEDS, file)
    if arguments.plot:
        plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
