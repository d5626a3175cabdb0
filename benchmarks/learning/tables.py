"""Results of trainings in the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def spread(values: Sequence[float]) -> str:
    """The mean, the least and the most."""
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_total(report: dict[str, Any], seeds: int, file: Path) -> None:
    """How many trainings a report of `runs.begun` has, and their time."""
    count, minutes = len(report["runs"]) * seeds, report["seconds"] / 60
    Console().print(f"{count} trainings in {minutes:.1f} minutes of a core, in {file}")
