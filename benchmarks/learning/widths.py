"""Studies of the surrogate's first width: what a badly chosen one costs, and which step a learned one should take.

`width_robustness`, the paper's main table: accuracy over the first width, with the width fixed (SG) and learned (ASGL),
and between the two a learned width without noise, which SG lacks as well. For every set, surrogate, optimizer, method
and width the networks of all seeds, six spiking layers, fully connected, are trained: the weights by SGD with momentum
or Adam, the widths by the step of `asgl_cuda.parameter_groups`, all along half a cosine. In the test all spikes are
hard. The sets are those that need no download, and those in the data root.

`width_step`: the weights' optimizer with a small rate or a tenth of theirs; Adam for the widths alone, at a constant
rate or at one that follows from the number of steps; all along half a cosine. No noise. What a first width of 5, 10 or
30 loses against one of 1 is paired by seed. Then the same with a width for each channel, and with learned decays and
thresholds, whose rate is the arm.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from asgl_cuda.training.groups import WIDTH_LR

from .batched import Setting, flat, read, trained
from .data import SOURCES, available
from .optimizers import ADAM, RATES, SGD
from .studies import Report, Study, paired, text_of

# ---- width_robustness ----

SG, LEARNED, ASGL = METHODS = ("SG", "learned", "ASGL")
SURROGATES = ("rectangle", "sigmoid")
FIRST_WIDTHS = (0.5, 1.0, 5.0, 10.0, 30.0)
SETTINGS: dict[str, Any] = {"seeds": 5, "steps": 250, "analog_prob": 0.2, "width_rate": WIDTH_LR, "rates": RATES}


class Training(NamedTuple):
    """The training runs of all seeds."""

    data: str
    surrogate: str
    optimizer: str
    method: str
    width: float


def train_from_width(run: Training, root: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Accuracies on the test samples, and the final widths by layer, of each seed."""
    data = read(run.data, root)
    setting = Setting(
        run.width, learned=run.method != SG, analog_prob=settings["analog_prob"] if run.method == ASGL else 0.0,
        surrogate=run.surrogate, optimizer=run.optimizer, rate=settings["rates"][run.optimizer],
        **{key: settings[key] for key in ("steps", "width_rate")},
    )  # fmt: skip
    networks = trained(data, setting, range(settings["seeds"]))
    return {"accuracies": networks.accuracies(flat(data.test), data.test_labels), "widths": networks.widths()}


def by_width(report: Report) -> dict[tuple[str, str, str, str], dict[float, list[float]]]:
    """The accuracies of every set, surrogate, optimizer and method, in that order, by width."""
    found: dict[Any, dict[float, list[float]]] = {}
    for key, result in report["runs"].items():
        *name, width = key.split()
        found.setdefault(tuple(name), {})[float(width)] = result["accuracies"]
    order = [*itertools.product(SOURCES, SURROGATES, RATES, METHODS)]
    return {name: dict(sorted(found[name].items())) for name in sorted(found, key=order.index)}


def head_of(report: Report) -> list[str]:
    return ["", *(f"{width:g}" for width in sorted({width for each in by_width(report).values() for width in each}))]


def robustness_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: mean ± standard deviation over the seeds, by width, and the best less the worst."""
    head, table = head_of(report), []
    for (data, *how), by in by_width(report).items():
        means = [statistics.fmean(values) for values in by.values()]
        found = zip(by, means, map(statistics.stdev, by.values()), strict=True)
        cells = {f"{width:g}": f"{mean:.1f} ± {deviation:.1f}" for width, mean, deviation in found}
        drop = f"{max(means) - min(means):.1f}"
        table.append([", ".join((data, *how)), *(cells.get(width, "") for width in head[1:]), drop])
    return [*head, "best - worst"], table


def robustness_summary(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: the mean accuracy over all data sets, by width."""
    table = []
    for optimizer, surrogate, method in itertools.product(RATES, SURROGATES, METHODS):
        how = [surrogate, optimizer, method]
        sets = [map(statistics.fmean, by.values()) for (_, *each), by in by_width(report).items() if each == how]
        if sets:
            means = (f"{statistics.fmean(values):.1f}" for values in zip(*sets, strict=True))
            table.append([f"{optimizer}, {surrogate}, {method}", *means])
    return head_of(report), table


def width_robustness(root: Path | None = None) -> Study:
    """The study with the sets in a data root."""
    runs = [Training(*each) for each in itertools.product(available(root), SURROGATES, RATES, METHODS, FIRST_WIDTHS)]
    train = partial(train_from_width, root=root, settings=SETTINGS)
    settings = {"settings": SETTINGS}
    return Study("width_robustness", settings, runs, train)


# ---- width_step ----

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
    """A network and a data set on which rules for the widths' step are compared."""

    data: str
    surrogate: str = "rectangle"
    layers: int = 6
    steps: int = 250
    learned: str = "width"  # "channels": a width for each; "decays": decays and thresholds, too


class Step(NamedTuple):
    """The training runs of all seeds. The first fields are those of a Cell."""

    data: str
    surrogate: str
    layers: int
    steps: int
    learned: str
    optimizer: str
    rate: float
    width: float
    rule: str


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


STEPPED = [
    Step(*cell, *training, width, rule)
    for cell, trainings in CELLS.items()
    for training, rule, width in itertools.product(trainings, rules_of(cell), widths_of(cell))
]


def train_by_rule(run: Step, seeds: int = SEEDS) -> dict[str, Any]:
    """Accuracies on the test samples, and the final widths, means over the layers, of each seed."""
    data, rule = read(run.data), rules_of(Cell(*run[:5]))[run.rule]
    rates = {"lr / 10": run.rate / 10, "Adam 7 / steps": FALL / run.steps}
    if run.rule in rates:
        rule = {**rule, "width_rate": rates[run.rule]}
    setting = Setting(
        run.width, layers=run.layers, by_channel=run.learned == "channels", surrogate=run.surrogate, steps=run.steps,
        optimizer=run.optimizer, rate=run.rate, **rule,
    )  # fmt: skip
    networks = trained(data, setting, range(seeds))
    widths = [round(statistics.fmean(widths), 3) for widths in networks.widths()]
    return {"test": networks.accuracies(flat(data.test), data.test_labels), "widths": widths}


def step_rows(report: Report, cells: Iterable[Cell] = CELLS) -> Iterator[list[str]]:
    """A row per cell, optimizer and rule: the accuracy with the initial width 1, and the losses with others."""
    for cell in cells:
        for (optimizer, rate), rule in itertools.product(CELLS[cell], rules_of(cell)):
            found = {width: report["runs"].get(text_of((*cell, optimizer, rate, width, rule))) for width in WIDTHS}
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


STEP_HEAD = ["", "weights", "rule", "from 1", *(f"loss from {width:g}" for width in WIDTHS[1:])]


STEP_SETTINGS = {"settings": {"seeds": SEEDS, "base": Setting(1.0)._asdict()}}
WIDTH_STEP = Study("width_step", STEP_SETTINGS, STEPPED, train_by_rule)
