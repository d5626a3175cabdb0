"""Draws the figures of the page of measurements from benchmarks/results: `python -m docs.figures.measured`."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import palette
from benchmarks.learning.neurons import ARMS, EPOCHS, WIDTHS, by_seed
from benchmarks.learning.noise import HOW, LOSSES, OBSERVED, SHARES, SMOOTHED_ARMS, TASKS, case_of, gain_of, named
from benchmarks.learning.optimizers import RATES
from benchmarks.learning.widths import METHODS, by_width
from benchmarks.readme import RESULTS, Report, read_report
from benchmarks.speed.microbench import FLOOR, INTEGER

TITLES = ("learned width", "share inside the window", "smoothing error E|H(u) - spike|", "loss on the test images")


def layer_sweep(report: dict[str, Any], file: Path) -> None:
    """Nanoseconds an element over T and over N, each at the other's most frequent value; I-LIF takes as long as LIF."""
    measured = report["sizes"]
    names = dict.fromkeys(name for size in measured for name in size["seconds"] if not name.startswith(INTEGER))
    with palette.panels(file, 1, 2, (12, 5), sharey=True) as ((left, right),):
        for panel, along, fixed, label in ((left, "steps", "neurons", "T"), (right, "neurons", "steps", "N")):
            values = [size[fixed] for size in measured]
            chosen = max(sorted(set(values)), key=values.count)
            sizes = sorted((size for size in measured if size[fixed] == chosen), key=lambda size: size[along])
            for number, name in enumerate(names):
                points = [
                    (size[along], 1e9 * size["seconds"][name]["both"] / (size["steps"] * size["neurons"]))
                    for size in sizes
                    if name in size["seconds"]
                ]
                style = palette.line(number - 1, linewidth=2.4 if "asgl_cuda" in name else 1.2)
                if name == FLOOR:
                    style = {"color": palette.BLACK, "linewidth": 1.6}
                if points:
                    panel.plot(*zip(*points, strict=True), label="two multiplies" if name == FLOOR else name, **style)
            panel.set(yscale="log", xlabel=label, title=f"{fixed} = {chosen}")
            panel.set_xscale("log", base=2)
        left.set_ylabel("forward and backward, ns an element")
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=4)


def width_robustness(report: Report, file: Path) -> None:
    """Accuracy over width, a row for each surrogate and optimizer, a column for each data set."""
    found = by_width(report)
    names, trainings = (list(dict.fromkeys(each)) for each in zip(*((key[0], key[1:3]) for key in found), strict=True))
    size = 3.2 * len(names), 2.7 * len(trainings)
    with palette.panels(file, len(trainings), len(names), size, sharex=True, sharey="col") as grid:
        for (data, surrogate, optimizer, method), by in found.items():
            panel = grid[trainings.index((surrogate, optimizer)), names.index(data)]
            style = palette.line(METHODS[::-1].index(method), capsize=3)
            means, deviations = (list(map(each, by.values())) for each in (statistics.fmean, statistics.stdev))
            panel.errorbar(list(by), means, deviations, label=method, **style)
            panel.set(xscale="log", title=f"{data}, {surrogate}, {optimizer}", xlabel="width at the start")
            panel.set_xticks(list(by), [f"{width:g}" for width in by])
            panel.minorticks_off()
            panel.label_outer()
        for row in grid:
            row[0].set_ylabel("test accuracy (%)")
        grid[0, 0].legend(fontsize=8, handlelength=4)


def noise_gains(report: Report, file: Path) -> None:
    """Gains of the shares in each task, by optimizer and surrogate."""
    with palette.panels(file, 1, len(HOW), (12, 1.2 + 0.42 * len(TASKS)), sharex=True, sharey=True) as (row,):
        for panel, how in zip(row, HOW, strict=True):
            panel.axvline(0, color=palette.BLACK, linewidth=0.8)
            for number, arm in enumerate(list(SHARES)[1:]):
                style = palette.line(number, linestyle="none", capsize=3, label=arm)
                for place, task in enumerate(TASKS):
                    if gain := gain_of(report, (*task, *how), arm):
                        panel.errorbar(gain.mean, place + 0.24 * number - 0.12, xerr=gain.half, **style)
                        style["label"] = None
            panel.set(title=", ".join(how), xlabel="gain on no noise (points)")
        row[0].set_yticks(range(len(TASKS)), map(named, TASKS))
        row[0].invert_yaxis()
        row[-1].legend(title="analog_prob")


def smoothing(report: Report, file: Path) -> None:
    """A row for each optimizer, surrogate and width: widths, shares and errors, and the two losses, of both arms."""
    names = list(dict.fromkeys(case_of(each) for each in report["runs"]))
    with palette.panels(file, len(names), len(TITLES), (17, 3.4 * len(names))) as grid:
        for each in report["runs"]:
            row, number = grid[names.index(case_of(each))], list(SMOOTHED_ARMS).index(each["arm"])
            series = [(panel, key, each["arm"], number) for panel, key in zip(row, OBSERVED, strict=False)]
            series += [(row[3], key, f"{each['arm']}: {LOSSES[key]}", 2 * number + i) for i, key in enumerate(LOSSES)]
            for panel, key, label, style in series:
                mean, deviation = (torch.tensor(each["observed"][key][which]) for which in ("mean", "deviation"))
                panel.plot(mean, label=label, **palette.line(style, markevery=max(1, len(mean) // 8)))
                band = {"color": palette.CYCLE[style], "alpha": 0.2, "linewidth": 0}
                panel.fill_between(range(len(mean)), mean - deviation, mean + deviation, **band)
        for row, name in zip(grid, names, strict=True):
            row[0].set_ylabel(name)
            row[3].set_yscale("log")
            for panel, title in zip(row, TITLES, strict=True):
                panel.set(xlabel="epoch", title=title)
        for panel in (grid[0, 0], grid[0, 3]):
            panel.legend(title="trained with", fontsize=8, handlelength=4)


def residual_network(report: Report, file: Path) -> None:
    """Accuracies over the epochs, a panel for each optimizer and first width, all seeds and their mean."""
    cases = list(itertools.product(RATES, WIDTHS))
    with palette.panels(file, 1, len(cases), (3.1 * len(cases), 3.2), sharey=True) as (row,):
        for panel, case in zip(row, cases, strict=True):
            for number, arm in enumerate(ARMS):
                curves = [each["accuracies"] for each in by_seed(report, *case, arm)]
                for curve in curves:
                    panel.plot(range(1, EPOCHS + 1), curve, color=palette.CYCLE[number], alpha=0.3, linewidth=0.8)
                means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                panel.plot(range(1, len(means) + 1), means, label=arm, **palette.line(number))
            panel.set(title=f"{case[0]}, first width {case[1]:g}", xlabel="epoch")
        row[0].set_ylabel("test accuracy (%)")
        row[0].legend(handlelength=4)


FIGURES: dict[str, Callable[[Report, Path], None]] = {
    "microbench_sweep": layer_sweep,
    "noise": noise_gains,
    "residual_network": residual_network,
    "smoothing": smoothing,
    "width_robustness": width_robustness,
}


def main() -> int:
    """Draws each beside its results."""
    for name, draw in FIGURES.items():
        draw(read_report(name), RESULTS / f"{name}_cpu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
