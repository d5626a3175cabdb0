"""Pages that are drawn from JSON files: `NAME.md` from `name.json`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import write_json


class Page(NamedTuple):
    """A page, and the function that makes its text from its figures."""

    path: Path
    text: Callable[[Any], str]

    @property
    def figures(self) -> Any:
        return json.loads(self._json.read_text())

    @property
    def _json(self) -> Path:
        return self.path.with_name(f"{self.path.stem.lower()}.json")

    def write(self, figures: Any = None) -> None:
        """Writes figures and page, or draws the page again from the committed figures."""
        if figures is not None:
            write_json(self._json, figures)
        self.path.write_text(self.text(self.figures))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown with aligned columns, the first `left` of them flush left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - (i >= left)) + ":" * (i >= left) for i, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines) + "\n"


def prose(text: str) -> str:
    """Refills paragraphs to 120 columns."""
    filled = (textwrap.fill(each, 120, break_long_words=False, break_on_hyphens=False) for each in text.split("\n\n"))
    return "\n\n".join(filled) + "\n"
