"""Studies: many training runs, several at a time. Each is written to a file when it ends, and is not repeated."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from scipy.stats import t as student

from ..common import machine, write_json

Report = dict[str, Any]


def text_of(run: tuple[Any, ...]) -> str:
    """The fields of a run."""
    return " ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in run)


class Study(NamedTuple):
    """Training runs that are compared.

    A report has the settings, `seconds` of all trainings, one after the other, and under `runs` the result of each run,
    by its text or, where runs are `listed`, beside its fields.
    """

    name: str
    settings: dict[str, Any]  # common to all trainings
    runs: Sequence[Any]  # named tuples
    train: Callable[[Any], Any]
    text: Callable[[Any], str] = text_of
    listed: bool = False

    def conduct(self, file: Path, jobs: int, only: str = "") -> Report:
        """Trains missing runs whose texts have `only` in them, `jobs` at a time."""
        report = self.begun(file)
        self.train_all(report, file, jobs, [run for run in self.runs if only in self.text(run)])
        return self.written(report)

    def begun(self, file: Path) -> Report:
        """The report in `file`, or a new one; its runs by their texts."""
        if not file.exists():
            return {"machine": machine(torch.device("cpu")), **self.settings, "seconds": 0.0, "runs": {}}
        report: Report = json.loads(file.read_text())
        found = {name: report.get(name) for name in self.settings}
        if found != self.settings:
            raise SystemExit(
                f"{file} holds trainings under other settings: expected {self.settings}, found {found}; "
                "name another file with --json"
            )
        if self.listed:
            kind = type(self.runs[0])
            names = [self.text(kind(*(each.pop(field) for field in kind._fields))) for each in report["runs"]]
            report["runs"] = dict(zip(names, report["runs"], strict=True))
        return report

    def written(self, report: Report) -> Report:
        """A report as it is written, its runs in their order."""
        runs, named = report["runs"], {self.text(run): run for run in self.runs}
        runs = {name: runs[name] for name in (*named, *runs) if name in runs}
        if not self.listed:
            return {**report, "runs": runs}
        return {**report, "runs": [{**named[name]._asdict(), **result} for name, result in runs.items()]}

    def train_all(self, report: Report, file: Path, jobs: int, runs: Sequence[Any]) -> None:
        """Trains the runs that `report` lacks, `jobs` at a time with one thread each; writes it after each.

        An error or Ctrl-C ends the trainings that have begun.
        """
        left = [run for run in runs if self.text(run) not in report["runs"]]
        columns = *Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes that start here
            waiting = {pool.submit(partial(timed, self.train), run): run for run in left}
            signal.signal(signal.SIGINT, before)
            try:
                with Progress(*columns) as progress:
                    task = progress.add_task("trainings", total=len(runs), completed=len(runs) - len(left))
                    for done in as_completed(waiting):
                        result, seconds = done.result()
                        report["runs"][self.text(waiting[done])] = result
                        report["seconds"] += seconds
                        write_json(file, self.written(report))
                        progress.advance(task)
            except BaseException as error:
                for process in multiprocessing.active_children():
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                if not isinstance(error, KeyboardInterrupt):
                    raise
                trained = sum(self.text(run) in report["runs"] for run in runs)
                words = f"the same command goes on: {file} has {trained} of {len(runs)} trainings"
                raise KeyboardInterrupt(words) from None


def timed(train: Callable[[Any], Any], run: Any) -> tuple[Any, float]:
    started = time.process_time()
    return train(run), time.process_time() - started


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean difference of pairs, and half of its 95 % interval by Student's t."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), float(student.ppf(0.975, len(differences) - 1)) * error


def spread(values: Sequence[float]) -> str:
    """The mean, the least and the most."""
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
