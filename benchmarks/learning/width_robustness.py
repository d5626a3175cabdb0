"""The paper's main table: accuracy over the surrogate's first width, with the width fixed (SG) and learned (ASGL).

Between the two: a learned width without noise, which SG lacks as well. For every set, surrogate, optimizer, method and
width the networks of all seeds, six spiking layers, fully connected, are trained: the weights by SGD with momentum or
Adam, the widths by the step of `asgl_cuda.parameter_groups`, all along half a cosine. In the test all spikes are hard.
The result file is written after every training; its trainings are not repeated.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from asgl_cuda.training.groups import WIDTH_LR

from .. import palette
from ..common import parser_of
from .batched import Setting, flat, shortened, trained
from .data import SOURCES, Data, available
from .optimizers import RATES
from .runs import add_jobs, begun, result_file, train_all
from .tables import print_table, print_total

SG, LEARNED, ASGL = METHODS = ("SG", "learned", "ASGL")
SURROGATES = ("rectangle", "sigmoid")
WIDTHS = (0.5, 1.0, 5.0, 10.0, 30.0)
SETTINGS: dict[str, Any] = {"seeds": 5, "steps": 250, "analog_prob": 0.2, "width_rate": WIDTH_LR, "rates": RATES}
QUICK_SETTINGS = {**SETTINGS, "seeds": 2, "steps": 100}
QUICK_WIDTHS = (1.0, 10.0)


class Run(NamedTuple):
    """The trainings of all seeds."""

    data: str
    surrogate: str
    optimizer: str
    method: str
    width: float

    def __str__(self) -> str:
        return f"{self.data} {self.surrogate} {self.optimizer} {self.method} {self.width:g}"


@cache
def read(name: str, root: Path | None) -> Data:
    """The data set, read once a process."""
    return SOURCES[name].read(root)


def train(run: Run, root: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Accuracies on the test samples, and the final widths by layer, of each seed."""
    data = shortened(read(run.data, root))
    setting = Setting(
        run.width, learned=run.method != SG, analog_prob=settings["analog_prob"] if run.method == ASGL else 0.0,
        surrogate=run.surrogate, optimizer=run.optimizer, rate=settings["rates"][run.optimizer],
        **{key: settings[key] for key in ("steps", "width_rate")},
    )  # fmt: skip
    networks = trained(data, setting, range(settings["seeds"]))
    return {"accuracies": networks.accuracies(flat(data.test), data.test_labels), "widths": networks.widths()}


class Series(NamedTuple):
    """Mean accuracy and standard deviation over the seeds, by width."""

    data: str
    surrogate: str
    optimizer: str
    method: str
    widths: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    @property
    def drop(self) -> float:
        """Best accuracy less worst over the widths, in percentage points."""
        return max(self.means) - min(self.means)


def series(report: dict[str, Any]) -> Iterator[Series]:
    """The series of every set, surrogate, optimizer and method, in that order."""
    found: dict[tuple[str, str, str, str], dict[float, list[float]]] = {}
    for key, result in report["runs"].items():
        data, surrogate, optimizer, method, width = key.split()
        found.setdefault((data, surrogate, optimizer, method), {})[float(width)] = result["accuracies"]
    order = [*itertools.product(SOURCES, SURROGATES, RATES, METHODS)]
    for name in sorted(found, key=order.index):
        widths, accuracies = zip(*sorted(found[name].items()), strict=True)
        yield Series(*name, widths, tuple(map(statistics.fmean, accuracies)), tuple(map(statistics.stdev, accuracies)))


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: mean ± standard deviation over the seeds, by width, and the drop."""
    every = list(series(report))
    widths = sorted({width for each in every for width in each.widths})
    found = []
    for each in every:
        cells = {
            width: f"{mean:.1f} ± {deviation:.1f}"
            for width, mean, deviation in zip(each.widths, each.means, each.deviations, strict=True)
        }
        name = f"{each.data}, {each.surrogate}, {each.optimizer}, {each.method}"
        found.append([name, *(cells.get(width, "") for width in widths), f"{each.drop:.1f}"])
    return ["", *(f"{width:g}" for width in widths), "best - worst"], found


def summary(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the mean accuracy of all sets, by width."""
    every = list(series(report))
    widths = sorted({width for each in every for width in each.widths})
    found = []
    for optimizer, surrogate, method in itertools.product(RATES, SURROGATES, METHODS):
        chosen = [
            each for each in every if (each.optimizer, each.surrogate, each.method) == (optimizer, surrogate, method)
        ]
        if chosen:
            means = [statistics.fmean(values) for values in zip(*(each.means for each in chosen), strict=True)]
            found.append([f"{optimizer}, {surrogate}, {method}", *(f"{mean:.1f}" for mean in means)])
    return ["", *(f"{width:g}" for width in widths)], found


@palette.styled
def plot(report: dict[str, Any], file: Path) -> None:
    """Accuracy over width, a row for each surrogate and optimizer, a column for each data set."""
    from matplotlib.figure import Figure

    every = list(series(report))
    names = list(dict.fromkeys(each.data for each in every))
    trainings = list(dict.fromkeys((each.surrogate, each.optimizer) for each in every))
    figure = Figure(figsize=(3.2 * len(names), 2.7 * len(trainings)))
    panels = figure.subplots(len(trainings), len(names), squeeze=False, sharex=True, sharey="col")
    for each in every:
        panel = panels[trainings.index((each.surrogate, each.optimizer)), names.index(each.data)]
        style = palette.line(METHODS[::-1].index(each.method), capsize=3)
        panel.errorbar(each.widths, each.means, each.deviations, label=each.method, **style)
        panel.set(xscale="log", title=f"{each.data}, {each.surrogate}, {each.optimizer}")
        panel.set_xticks(each.widths, [f"{width:g}" for width in each.widths])
        panel.minorticks_off()
    for panel in panels[-1]:
        panel.set_xlabel("width at the start")
    for row in panels:
        row[0].set_ylabel("test accuracy (%)")
    panels[0, 0].legend(fontsize=8, handlelength=4)
    figure.savefig(file, dpi=80)


def main() -> int:
    """Trains missing runs, prints the table, draws the figure."""
    parser = parser_of("benchmarks.learning.width_robustness", __doc__, "json", "plot")
    parser.add_argument("--data", nargs="+", choices=SOURCES, help="default: all available")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="the folder of real data sets")
    parser.add_argument("--quick", action="store_true", help="two seeds, two widths, 100 steps")
    add_jobs(parser)
    arguments = parser.parse_args()
    root = arguments.data_root
    if root is not None and not root.is_dir():
        parser.error(f"--data-root must be a folder that exists, got {root}")
    names = arguments.data or list(available(root))
    if missing := [name for name in names if name not in available(root)]:
        folders = ", ".join(str(SOURCES[name].folder) for name in missing)
        parser.error(f"{', '.join(missing)}: expected {folders} in --data-root, which is {root}")
    settings, widths = (QUICK_SETTINGS, QUICK_WIDTHS) if arguments.quick else (SETTINGS, WIDTHS)
    file = result_file(arguments.json, f"width_robustness{'_quick' if arguments.quick else ''}")

    runs = [Run(*each) for each in itertools.product(names, SURROGATES, RATES, METHODS, widths)]
    report = begun(file, settings)
    train_all(runs, partial(train, root=root, settings=settings), report, file, arguments.jobs)
    head, found = rows(report)
    title = "Accuracy in percent over the first width, mean ± standard deviation over the seeds"
    print_table(title, head, found)
    print_total(report, settings["seeds"], file)
    if arguments.plot:
        plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
