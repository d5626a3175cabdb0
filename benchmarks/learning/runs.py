"""Many trainings: several at a time, written as they end, and not repeated."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from scipy.stats import t as student

from ..common import machine, write_json

Run = TypeVar("Run")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time (default: one a core)"
    )


def result_file(given: Path | None, name: str) -> Path:
    """The file that was given, or one in `build`."""
    file = given or Path("build") / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    return file


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


@contextmanager
def trainings(train: Callable[[Run], Any], runs: Sequence[Run], jobs: int) -> Iterator[dict[Future[Any], Run]]:
    """All runs, `jobs` at a time with one thread each, which end with an error or Ctrl-C inside."""
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes that start here
        waiting = {pool.submit(train, run): run for run in runs}
        signal.signal(signal.SIGINT, before)
        try:
            yield waiting
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def train_all(runs: Sequence[Run], train: Callable[[Run], Any], report: dict[str, Any], file: Path, jobs: int) -> None:
    """Trains the runs missing in `report`, `jobs` at a time with one thread each; writes the report after each.

    `seconds` in the report are those of all trainings, one after the other.
    """
    left = [run for run in runs if str(run) not in report["runs"]]
    columns = *Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns) as progress, trainings(partial(timed, train), left, jobs) as waiting:
            task = progress.add_task("trainings", total=len(runs), completed=len(runs) - len(left))
            for done in as_completed(waiting):
                result, seconds = done.result()
                report["runs"][str(waiting[done])] = result
                report["seconds"] += seconds
                write_json(file, report)
                progress.advance(task)
    except KeyboardInterrupt:
        trained = sum(str(run) in report["runs"] for run in runs)
        raise KeyboardInterrupt(f"the same command goes on: {file} has {trained} of {len(runs)} trainings") from None


def timed(train: Callable[[Run], Any], run: Run) -> tuple[Any, float]:
    started = time.process_time()
    return train(run), time.process_time() - started


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean difference of pairs, and half of its 95 % interval by Student's t."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), float(student.ppf(0.975, len(differences) - 1)) * error
