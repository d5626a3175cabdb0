"""What a report holds, beside names of rows, sizes and runs."""

from collections.abc import Iterator
from typing import Any


def paths(report: Any, start: str = "") -> Iterator[str]:
    """The keys of a report at all depths; * for a name, such as "LIF: snnTorch", and for an index."""
    if isinstance(report, dict):
        for key, value in report.items():
            name = key if key.isidentifier() and key.islower() else "*"
            yield f"{start}.{name}"
            yield from paths(value, f"{start}.{name}")
    elif isinstance(report, list):
        for value in report:
            yield from paths(value, f"{start}.*")
