"""What the noise does: accuracies with shares of analog elements, less those of the same learned widths without noise.

Base: 250 steps, first width 1, the time steps of the data, 4 for images. One factor at a time: 60 and 1,000 steps;
first widths 10 and 30, for images also 0.4 and 5. Images are trained with one time step, too, over all steps. In each
cell every arm has three learning rates (a tenth for the widths), one of which is chosen by accuracy on a fifth of the
training samples, the mean over the seeds; the tables show accuracy on the test samples. Differences are paired by seed:
weights and the order of the samples are the same. Controls: a fixed width, at each first width, and, from width 1,
dropout of spikes. Long sequences are halved.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sklearn.model_selection import train_test_split
from torch import Tensor

from .. import palette
from ..common import parser_of
from .batched import Setting, flat, shortened, trained
from .data import SOURCES, Data
from .runs import begun, paired, train_all
from .tables import print_table, print_total

IMAGES = ("digits", "mnist")
SETS = (*IMAGES, "vowels", "tones")
STEPS = (60, 250, 1000)
WIDTHS, WIDE = (0.4, 5.0, 10.0, 30.0), (10.0, 30.0)
RATES = (0.03, 0.1, 0.3)
SEEDS = 10
QUIET = "0"  # the arm that the others are compared with
SHARES = ("0.2", "0.5")
ARMS: dict[str, dict[str, Any]] = {
    QUIET: {},
    "0.2": {"analog_prob": 0.2},
    "0.5": {"analog_prob": 0.5},
    "1": {"analog_prob": 1.0},
    "0.5 to 0": {"analog_prob": 0.5, "annealed": True},
    "dropout 0.1": {"dropout": 0.1},
    "fixed": {"learned": False},
}


class Cell(NamedTuple):
    """The circumstances under which arms are compared."""

    data: str
    time_steps: int  # 0: those of the data
    steps: int
    width: float

    def __str__(self) -> str:
        return f"{self.data} {self.time_steps} {self.steps} {self.width:g}"


class Run(NamedTuple):
    """The trainings of all seeds with one rate."""

    cell: Cell
    arm: str
    rate: float

    def __str__(self) -> str:
        return f"{self.cell} {self.rate:g} {self.arm}"


def cells() -> Iterator[Cell]:
    for data in SETS:
        lengths, widths = ((1, 4), WIDTHS) if data in IMAGES else ((0,), WIDE)
        for time_steps in lengths:
            yield from (Cell(data, time_steps, steps, 1.0) for steps in STEPS)
        yield from (Cell(data, lengths[-1], 250, width) for width in widths)


def all_runs() -> list[Run]:
    """Images, which are quick, and short trainings first."""
    runs = [
        Run(cell, arm, rate)
        for cell, arm, rate in itertools.product(cells(), ARMS, RATES)
        if "dropout" not in arm or cell.width == 1
    ]
    return sorted(runs, key=lambda run: (run.cell.data not in IMAGES, run.cell.steps, run.cell.width))


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
    setting = Setting(
        run.cell.width, steps=run.cell.steps, time_steps=run.cell.time_steps or data.train.shape[1], rate=run.rate,
        width_rate=run.rate / 10, **ARMS[run.arm],
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
    test: list[float]
    gain: float
    half: float


def chosen(report: dict[str, Any], cell: Cell, arm: str) -> Chosen | None:
    """None where it was not trained."""

    def best(arm: str) -> tuple[float, list[float]] | None:
        found = {rate: report["runs"].get(str(Run(cell, arm, rate))) for rate in RATES}
        if not all(found.values()):
            return None
        rate = max(RATES, key=lambda rate: found[rate]["validation"])
        return rate, found[rate]["test"]

    this, quiet = best(arm), best(QUIET)
    return this and quiet and Chosen(*this, *paired(this[1], quiet[1]))


def named(cell: Cell) -> str:
    time = f", T = {cell.time_steps}" if cell.time_steps else ""
    return f"{cell.data}{time}, {cell.steps} steps, width {cell.width:g}"


def rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """A row a cell: accuracy without noise, and gains."""
    for cell in cells():
        found = {arm: chosen(report, cell, arm) for arm in ARMS}
        if (quiet := found.pop(QUIET)) is None:
            continue
        gains = ("" if each is None else f"{each.gain:+.1f} ± {each.half:.1f}" for each in found.values())
        yield [named(cell), f"{statistics.fmean(quiet.test):.1f}", *gains]


def rows_by_rate(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of the gains of constant shares, compared at each rate."""
    found = []
    for cell in cells():
        gains = []
        for arm, rate in itertools.product(SHARES, RATES):
            noisy, quiet = (report["runs"].get(str(Run(cell, name, rate))) for name in (arm, QUIET))
            gains.append("{:+.1f} ± {:.1f}".format(*paired(noisy["test"], quiet["test"])) if noisy and quiet else "")
        if any(gains):
            found.append([named(cell), *gains])
    return ["", *(f"{arm} at {rate:g}" for arm, rate in itertools.product(SHARES, RATES))], found


HEAD = ["", "no noise", *(arm for arm in ARMS if arm != QUIET)]


@palette.styled
def plot(report: dict[str, Any], file: Path) -> None:
    """Gains over the steps, with one time step and with several, and over the first width, by data set."""
    from matplotlib.figure import Figure

    shown = [arm for arm in ARMS if arm not in (QUIET, "dropout 0.1")]
    every = list(cells())
    figure = Figure(figsize=(15, 9))
    panels = figure.subplots(3, len(SETS), sharey="row")
    for column, name in enumerate(SETS):
        of_set = [cell for cell in every if cell.data == name]
        lines = (
            ("steps", [cell for cell in of_set if cell.time_steps == 1]),
            ("steps", [cell for cell in of_set if cell.time_steps != 1 and cell.width == 1]),
            ("width", sorted(cell for cell in of_set if cell.time_steps != 1 and cell.steps == 250)),
        )
        for panel, (factor, points), title in zip(
            panels[:, column], lines, ("T = 1, width 1", "width 1", "250 steps"), strict=True
        ):
            if not points:
                panel.remove()
                continue
            panel.axhline(0, color=palette.BLACK, linewidth=0.8)
            for number, arm in enumerate(shown):
                found = [(getattr(cell, factor), each) for cell in points if (each := chosen(report, cell, arm))]
                if found:
                    x, arms = zip(*found, strict=True)
                    x = [value * 1.06 ** (number - 2) for value in x]  # side by side
                    gains, halves = [each.gain for each in arms], [each.half for each in arms]
                    panel.errorbar(x, gains, halves, capsize=3, label=arm, **palette.line(number))
            ticks = [getattr(cell, factor) for cell in points]
            panel.set(xscale="log", title=f"{name}, {title}", xlabel="steps" if factor == "steps" else "first width")
            panel.set_yscale("symlog", linthresh=3)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.set_xlim(0.8 * ticks[0], 1.35 * ticks[-1])
            marks = (-30, -10, -3, 0, 3, 10)
            panel.set_yticks(marks, [f"{mark:+d}" if mark else "0" for mark in marks])
            panel.minorticks_off()
    for row in panels:
        row[0].set_ylabel("gain on no noise (points)")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="upper right", title="analog_prob", ncols=2, handlelength=4
    )
    figure.savefig(file, dpi=80)


def main() -> int:
    """Trains missing runs, prints the table, draws the figure."""
    parser = parser_of("benchmarks.learning.noise", __doc__, "json", "plot")
    parser.add_argument("--data", nargs="+", choices=SETS, default=SETS, help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time (default: one a core)")
    arguments = parser.parse_args()
    file = arguments.json or Path("build") / "noise.json"
    file.parent.mkdir(exist_ok=True)
    report = begun(file, {"seeds": SEEDS, "rates": list(RATES), "base": Setting(1.0)._asdict()})
    train_all([run for run in all_runs() if run.cell.data in arguments.data], train, report, file, arguments.jobs)
    title = "Test accuracy in percent without noise, and gains, with 95 % intervals over the seeds"
    print_table(title, HEAD, rows(report))
    print_total(report, SEEDS, file)
    if arguments.plot:
        plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
