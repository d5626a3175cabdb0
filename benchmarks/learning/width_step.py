"""Which step a learned width should take: accuracies over the first width, by rule, by optimizer of the weights.

Rules: the weights' optimizer with a small rate or a tenth of theirs; Adam for the widths alone, at a constant rate or
at one that follows from the number of steps; all along half a cosine. No noise. What a first width of 5, 10 or 30 loses
against one of 1 is paired by seed. Then the same with a width for each channel, and with learned decays and thresholds,
whose rate is the arm.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

from ..common import parser_of
from .batched import Setting, flat, shortened, trained
from .data import SOURCES, Data
from .optimizers import ADAM, SGD
from .runs import add_jobs, begun, paired, result_file, train_all
from .tables import print_table, print_total

SEEDS = 10
WIDTHS = (1.0, 5.0, 10.0, 30.0)
FALL = 7.0  # a rate times the steps: 30 to 0.03
RULES: dict[str, dict[str, Any]] = {
    "fixed": {"learned": False},
    "3e-4": {"width_rate": 3e-4, "width_by_weights": True},
    "lr / 10": {"width_by_weights": True},  # the rate is set from the weights'
    "Adam 0.01": {"width_rate": 0.01},
    "Adam 0.03": {"width_rate": 0.03},
    "Adam 0.1": {"width_rate": 0.1},
    "Adam 7 / steps": {},  # the rate is set from the steps
}
# Decays and thresholds are learned by Adam at this rate, widths at 0.03.
DECAY_RULES: dict[str, dict[str, Any]] = {
    "constant": {}, "3e-4": {"decay_rate": 3e-4}, "3e-3": {"decay_rate": 3e-3}, "0.03": {"decay_rate": 0.03}
}  # fmt: skip
TRAININGS = ((SGD, 0.05), (SGD, 0.2), (ADAM, 1e-3), (ADAM, 3e-3))
FASTEST = ((SGD, 0.2), (ADAM, 3e-3))


class Cell(NamedTuple):
    """The circumstances under which rules are compared."""

    data: str
    surrogate: str = "rectangle"
    layers: int = 6
    steps: int = 250
    learned: str = "width"  # "channels": a width for each; "decays": decays and thresholds, too


class Run(NamedTuple):
    """The trainings of all seeds."""

    cell: Cell
    optimizer: str
    rate: float
    rule: str
    width: float

    def __str__(self) -> str:
        cell = " ".join(map(str, self.cell))
        return f"{cell} {self.optimizer} {self.rate:g} {self.width:g} {self.rule}"


BASE = Cell("digits")
CELLS: dict[Cell, tuple[tuple[str, float], ...]] = {
    BASE: TRAININGS,
    BASE._replace(surrogate="sigmoid"): FASTEST,
    BASE._replace(layers=3): FASTEST,
    BASE._replace(learned="channels"): FASTEST,
    BASE._replace(steps=60): FASTEST,
    Cell("mnist"): FASTEST,
    Cell("tones"): FASTEST,
    Cell("vowels"): FASTEST,
    BASE._replace(learned="decays"): FASTEST,
    Cell("vowels", learned="decays"): FASTEST,
}


def rules_of(cell: Cell) -> dict[str, dict[str, Any]]:
    if cell.learned == "decays":
        return DECAY_RULES
    # 250 steps make it 0.028.
    return {name: rule for name, rule in RULES.items() if "steps" not in name or cell.steps != BASE.steps}


def widths_of(cell: Cell) -> tuple[float, ...]:
    return WIDTHS if cell == BASE else (1.0, 10.0, 30.0)


def all_runs() -> list[Run]:
    return [
        Run(cell, *training, rule, width)
        for cell, trainings in CELLS.items()
        for training, rule, width in itertools.product(trainings, rules_of(cell), widths_of(cell))
    ]


@cache
def read(name: str) -> Data:
    return shortened(SOURCES[name].read(None))


def train(run: Run, seeds: int = SEEDS) -> dict[str, Any]:
    """Accuracies on the test samples, and the final widths, means over the layers, of each seed."""
    data, cell = read(run.cell.data), run.cell
    rates = {"lr / 10": run.rate / 10, "Adam 7 / steps": FALL / cell.steps}
    rule = {**({"width_rate": rates[run.rule]} if run.rule in rates else {}), **rules_of(cell)[run.rule]}
    setting = Setting(
        run.width, layers=cell.layers, by_channel=cell.learned == "channels", surrogate=cell.surrogate,
        steps=cell.steps, optimizer=run.optimizer, rate=run.rate, **rule,
    )  # fmt: skip
    networks = trained(data, setting, range(seeds))
    widths = [round(statistics.fmean(widths), 3) for widths in networks.widths()]
    return {"test": networks.accuracies(flat(data.test), data.test_labels), "widths": widths}


def rows(report: dict[str, Any], cells: Iterable[Cell] = CELLS) -> Iterator[list[str]]:
    """A row for each cell, optimizer and rule: accuracy from width 1, and what other first widths lose."""
    for cell in cells:
        for (optimizer, rate), rule in itertools.product(CELLS[cell], rules_of(cell)):
            found = {width: report["runs"].get(str(Run(cell, optimizer, rate, rule, width))) for width in WIDTHS}
            first = found.pop(WIDTHS[0])
            if first is None:
                continue
            losses = [
                "" if each is None else "{:.1f} ± {:.1f}".format(*paired(first["test"], each["test"]))
                for each in found.values()
            ]
            yield [named(cell), f"{optimizer} {rate:g}", rule, f"{statistics.fmean(first['test']):.1f}", *losses]


def named(cell: Cell) -> str:
    more = {"channels": ", widths by channel", "decays": ", learned decays and thresholds"}.get(cell.learned, "")
    return f"{cell.data}, {cell.surrogate}, {cell.layers} layers, {cell.steps} steps{more}"


HEAD = ["", "weights", "rule", "from 1", *(f"loss from {width:g}" for width in WIDTHS[1:])]


def main() -> int:
    """Trains missing runs and prints the table."""
    parser = parser_of("benchmarks.learning.width_step", __doc__, "json")
    add_jobs(parser)
    arguments = parser.parse_args()
    file = result_file(arguments.json, "width_step")
    report = begun(file, {"seeds": SEEDS, "base": Setting(1.0)._asdict()})
    train_all(all_runs(), train, report, file, arguments.jobs)
    print_table(
        "Test accuracy in percent from width 1, and loss, with 95 % intervals over the seeds", HEAD, rows(report)
    )
    print_total(report, SEEDS, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
