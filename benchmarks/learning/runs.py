"""Many trainings: several at a time, written as they end, and not repeated."""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from scipy.stats import t as student

from ..common import machine, write_json

Run = TypeVar("Run")


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


def train_all(runs: Sequence[Run], train: Callable[[Run], Any], report: dict[str, Any], file: Path, jobs: int) -> None:
    """Trains the runs missing in `report`, `jobs` at a time with one thread each; writes the report after each.

    `seconds` in the report are those of all trainings, one after the other.
    """
    left = [run for run in runs if str(run) not in report["runs"]]
    columns = *Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        task = progress.add_task("trainings", total=len(runs), completed=len(runs) - len(left))
        waiting = {pool.submit(timed, train, run): run for run in left}
        try:
            for done in as_completed(waiting):
                result, seconds = done.result()
                report["runs"][str(waiting[done])] = result
                report["seconds"] += seconds
                write_json(file, report)
                progress.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def timed(train: Callable[[Run], Any], run: Run) -> tuple[Any, float]:
    started = time.process_time()
    return train(run), time.process_time() - started


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean difference of pairs, and half of its 95 % interval by Student's t."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), float(student.ppf(0.975, len(differences) - 1)) * error
