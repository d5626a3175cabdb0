"""The paper's main table: accuracy over the surrogate's first width, with the width fixed (SG) and learned (ASGL).

For every set, surrogate, method, width and seed a network is trained as by the authors: SGD with momentum for the
weights, Adam without decay for the widths, both under a cosine schedule. SG is the same network without noise, with its
first width. In the test all spikes are hard. The result file is written after every training; its trainings are not
repeated.

The paper reports CIFAR-10 and CIFAR-100 with ResNet-18; the table shows its figures beside ours.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import OverTime

from .. import palette
from ..common import machine, parser_of, write_json
from .data import SOURCES, Data, available
from .optimizers import cosine_schedules, optimizers_of

SG, ASGL = METHODS = ("SG", "ASGL")
SURROGATES = ("rectangle", "sigmoid")
WIDTHS = (0.5, 1.0, 2.5, 5.0, 10.0)
SEEDS = 5
QUICK_SEEDS, QUICK_WIDTHS = 1, (1.0, 10.0)
QUICKER = 3  # divides the steps, multiplies the rate of the widths

# Settings of all runs. The epochs make some 700 steps of the small sets.
SETTINGS: dict[str, Any] = {
    "steps_of_an_image": 4,
    "batch": 64,
    "analog_prob": 0.2,
    "decay": 0.5,
    "rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "width_rate": 0.01,
    "hidden": {"vowels": 128, "tones": 128, "otherwise": 256},
    "epochs": {"digits": 30, "digit_saccades": 30, "vowels": 140, "tones": 30, "otherwise": 100},
}
SPIKING_LAYERS = 6

# The paper's ResNet-18 over WIDTHS.
PAPER = {
    "cifar10": {SG: (93.19, 93.78, 90.68, 62.34, 30.85), ASGL: (94.11, 94.30, 94.09, 93.61, 93.53)},
    "cifar100": {SG: (75.76, 65.19, 15.12, 8.04, 6.14), ASGL: (76.54, 76.09, 76.18, 76.68, 76.00)},
}


class Run(NamedTuple):
    """One training."""

    data: str
    surrogate: str
    method: str
    width: float
    seed: int

    def __str__(self) -> str:
        return f"{self.data} {self.surrogate} {self.method} {self.width:g} {self.seed}"


def setting_for(setting: dict[str, int], name: str) -> int:
    return setting.get(name, setting["otherwise"])


# ---- a training ----


def network(sample_shape: torch.Size, classes: int, run: Run) -> nn.Sequential:
    """Six spiking layers: convolutions where a sample is an image of 24 x 24 or more, else linear."""

    def neuron() -> nn.Module:
        noise = SETTINGS["analog_prob"] if run.method == ASGL else 0.0
        return asgl_cuda.LIF(
            decay=SETTINGS["decay"], width=run.width, surrogate=run.surrogate, analog_prob=noise,
            learn_width=run.method == ASGL,
        )  # fmt: skip

    layers: list[nn.Module] = []
    if len(sample_shape) == 4 and sample_shape[-1] >= 24:
        channels = (sample_shape[1], 64, 64, 128, 128, 256, 256)
        for inputs, outputs in itertools.pairwise(channels):
            if inputs in (64, 128) and inputs != outputs:
                layers.append(OverTime(nn.AvgPool2d(2)))
            layers.append(OverTime(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)))
            layers += [OverTime(nn.BatchNorm2d(outputs)), neuron()]
        layers += [OverTime(nn.AdaptiveAvgPool2d(1)), OverTime(nn.Flatten())]
    else:
        channels = (sample_shape[1:].numel(), *(setting_for(SETTINGS["hidden"], run.data),) * SPIKING_LAYERS)
        layers.append(nn.Flatten(start_dim=2))
        for inputs, outputs in itertools.pairwise(channels):
            layers.append(OverTime(nn.Linear(inputs, outputs, bias=False)))
            layers += [OverTime(nn.BatchNorm1d(outputs)), neuron()]
    return nn.Sequential(*layers, nn.Linear(channels[-1], classes))


def scores_of(model: nn.Module, samples: Tensor, device: torch.device) -> Tensor:
    """`[B, classes]`, means over time."""
    x_seq = samples.to(device, torch.float32).transpose(0, 1)
    if x_seq.shape[0] == 1:
        x_seq = x_seq.expand(SETTINGS["steps_of_an_image"], *x_seq.shape[1:])
    scores: Tensor = model(x_seq).mean(0)
    return scores


@torch.no_grad()
def accuracy_of(model: nn.Module, samples: Tensor, labels: Tensor, device: torch.device) -> float:
    """The accuracy in percent, with hard spikes."""
    model.eval()
    right = sum(
        int((scores_of(model, batch, device).argmax(1).cpu() == wanted).sum())
        for batch, wanted in zip(samples.split(256), labels.split(256), strict=True)
    )
    return 100 * right / len(labels)


def train(run: Run, data: Data, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Accuracy on the test samples, the final widths by layer, and seconds."""
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    model = network(data.train.shape[1:], data.classes, run).to(device)
    optimizers = optimizers_of(
        model, SETTINGS["rate"], settings["width_rate"], SETTINGS["momentum"], SETTINGS["weight_decay"]
    )
    epochs = setting_for(settings["epochs"], run.data)
    steps = epochs * math.ceil(len(data.train) / SETTINGS["batch"])
    steppers = [*optimizers, *cosine_schedules(optimizers, steps)]
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(data.train)).split(SETTINGS["batch"]):
            samples, labels = data.train[batch], data.train_labels[batch].to(device)
            if data.augment is not None:
                samples = torch.stack([data.augment(sample) for sample in samples])
            model.zero_grad()
            functional.cross_entropy(scores_of(model, samples, device), labels).backward()
            for stepper in steppers:
                stepper.step()
    neurons = [layer for layer in model if isinstance(layer, asgl_cuda.LIF)]
    return {
        "accuracy": accuracy_of(model, data.test, data.test_labels, device),
        "widths": [float(torch.as_tensor(neuron.width).detach()) for neuron in neurons],
        "seconds": time.perf_counter() - started,
    }


# ---- all of them ----


@cache
def read(name: str, root: Path | None) -> Data:
    """The data set, read once a process."""
    return SOURCES[name].read(root)


def work(run: Run, root: Path | None, settings: dict[str, Any], device: str) -> dict[str, Any]:
    return train(run, read(run.data, root), settings, torch.device(device))


def begun(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The report in `file`, or a new one."""
    if not file.exists():
        return {"machine": machine(torch.device("cpu")), "settings": settings, "seconds": 0.0, "runs": {}}
    report: dict[str, Any] = json.loads(file.read_text())
    if report["settings"] != settings:
        raise SystemExit(
            f"{file} holds trainings under other settings: expected {settings}, found {report['settings']}; "
            "name another file with --json"
        )
    return report


def train_all(runs: list[Run], report: dict[str, Any], file: Path, jobs: int, root: Path | None, device: str) -> None:
    """Trains the runs missing in `report`, `jobs` at a time with one thread each; writes the report after each."""
    left = [run for run in runs if str(run) not in report["runs"]]
    spent, started = report["seconds"], time.perf_counter()
    report["jobs"] = jobs
    columns = *Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        tasks = {
            name: progress.add_task(name, total=sum(run.data == name for run in runs))
            for name in {r.data: 0 for r in runs}
        }
        for run in runs:
            progress.advance(tasks[run.data], str(run) in report["runs"])
        waiting = {pool.submit(work, run, root, report["settings"], device): run for run in left}
        try:
            for done in as_completed(waiting):
                run = waiting[done]
                report["runs"][str(run)] = done.result()
                report["seconds"] = spent + time.perf_counter() - started
                write_json(file, report)
                progress.advance(tasks[run.data])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class Series(NamedTuple):
    """Mean accuracy and standard deviation over the seeds (NaN for one seed), by width."""

    data: str
    surrogate: str
    method: str
    widths: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    @property
    def drop(self) -> float:
        """Best accuracy less worst over the widths, in percentage points."""
        return max(self.means) - min(self.means)


def series(report: dict[str, Any]) -> Iterator[Series]:
    """The series of every set, surrogate and method, in that order."""
    found: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for key, result in report["runs"].items():
        data, surrogate, method, width, _ = key.split()
        found.setdefault((data, surrogate, method), {}).setdefault(float(width), []).append(result["accuracy"])
    order = [*itertools.product(SOURCES, SURROGATES, METHODS)]
    for name in sorted(found, key=order.index):
        by_width = sorted(found[name].items())
        yield Series(
            *name,
            tuple(width for width, _ in by_width),
            tuple(statistics.fmean(values) for _, values in by_width),
            tuple(statistics.stdev(values) if len(values) > 1 else math.nan for _, values in by_width),
        )


def table(report: dict[str, Any]) -> Table:
    """The accuracies as a table."""
    result = Table(title="Accuracy in percent over the first width, mean ± standard deviation over the seeds")
    every = list(series(report))
    widths = sorted({width for each in every for width in each.widths})
    for head in ("data", "surrogate", "method"):
        result.add_column(head)
    for head in (*(f"{width:g}" for width in widths), "best - worst"):
        result.add_column(head, justify="right")
    for each in every:
        cells = {
            width: f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"
            for width, mean, deviation in zip(each.widths, each.means, each.deviations, strict=True)
        }
        result.add_row(
            each.data, each.surrogate, each.method, *(cells.get(width, "") for width in widths), f"{each.drop:.1f}",
            end_section=each.method == ASGL,
        )  # fmt: skip
    for data in {each.data: 0 for each in every if each.data in PAPER}:
        for method, accuracies in PAPER[data].items():
            paper = dict(zip(WIDTHS, accuracies, strict=True))
            cells_of_paper = (f"{paper[width]:.2f}" if width in paper else "" for width in widths)
            drop = max(accuracies) - min(accuracies)
            result.add_row(data, "the paper's", method, *cells_of_paper, f"{drop:.1f}")
    return result


@palette.styled
def plot(report: dict[str, Any], file: Path) -> None:
    """Accuracy over width, a panel for each data set, as in the paper's figure."""
    from matplotlib.figure import Figure

    every = list(series(report))
    names = list(dict.fromkeys(each.data for each in every))
    columns = min(len(names), 4)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.8 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        for each in every:
            if each.data != name:
                continue
            style = palette.line(2 * METHODS[::-1].index(each.method) + SURROGATES.index(each.surrogate), capsize=3)
            label = f"{each.method}, {each.surrogate}"
            panel.errorbar(each.widths, each.means, each.deviations, label=label, **style)
        panel.set(xscale="log", title=f"{name} ({SOURCES[name].kind})", xlabel="width at the start")
        panel.set_xticks(WIDTHS, [f"{width:g}" for width in WIDTHS])
        panel.minorticks_off()
    for panel in panels[len(names) :]:
        panel.remove()
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].legend(fontsize=8, handlelength=4)
    figure.savefig(file, dpi=100)


def main() -> int:
    """Trains missing runs, prints the table, draws the figure."""
    parser = parser_of("benchmarks.learning.width_robustness", __doc__, "json", "plot")
    parser.add_argument("--data", nargs="+", choices=SOURCES, help="default: all available")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="the folder of real data sets")
    parser.add_argument("--surrogates", nargs="+", choices=SURROGATES, default=SURROGATES)
    parser.add_argument("--widths", nargs="+", type=float, help=f"default: {' '.join(f'{w:g}' for w in WIDTHS)}")
    parser.add_argument("--seeds", type=int, help=f"how many (default: {SEEDS})")
    parser.add_argument("--quick", action="store_true", help="one seed, two widths, a third of the epochs")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--jobs", type=int, help="trainings at a time (default: one a core; on a GPU, one)")
    arguments = parser.parse_args()
    root = arguments.data_root
    if root is not None and not root.is_dir():
        parser.error(f"--data-root must be a folder that exists, got {root}")
    names = arguments.data or list(available(root))
    if missing := [name for name in names if name not in available(root)]:
        folders = ", ".join(str(SOURCES[name].folder) for name in missing)
        parser.error(f"{', '.join(missing)}: expected {folders} in --data-root, which is {root}")
    widths = arguments.widths or (QUICK_WIDTHS if arguments.quick else WIDTHS)
    seeds = (QUICK_SEEDS if arguments.quick else SEEDS) if arguments.seeds is None else arguments.seeds
    jobs = (os.cpu_count() or 1 if arguments.device == "cpu" else 1) if arguments.jobs is None else arguments.jobs
    for option, values in (("--seeds", [seeds]), ("--jobs", [jobs]), ("--widths", widths)):
        if not all(value > 0 for value in values):
            parser.error(f"{option} must be positive, got {' '.join(f'{value:g}' for value in values)}")
    settings = SETTINGS
    if arguments.quick:
        epochs = {name: count // QUICKER for name, count in SETTINGS["epochs"].items()}
        settings = {**SETTINGS, "epochs": epochs, "width_rate": SETTINGS["width_rate"] * QUICKER}
    file = arguments.json or Path("build") / f"width_robustness{'_quick' if arguments.quick else ''}.json"
    file.parent.mkdir(exist_ok=True)

    runs = [Run(*each) for each in itertools.product(names, arguments.surrogates, METHODS, widths, range(seeds))]
    report = begun(file, settings)
    train_all(runs, report, file, jobs, root, arguments.device)
    console = Console()
    console.print(table(report))
    console.print(f"{len(report['runs'])} trainings in {report['seconds'] / 60:.1f} minutes, in {file}")
    if arguments.plot:
        plot(report, arguments.plot)
        console.print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
