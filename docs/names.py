"""Writes the names on the pages of docs/reference as a code host shows them: `python -m docs.names`.

The site has docstrings in their place, by the directives of the same page.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
ABOVE = """\
This page lists each name with the first line of its docstring. For the whole docstring call `help(asgl_cuda.{name})`,
follow the link to the source, or build the [site](../README.md)."""


def names_in(text: str) -> list[str]:
    """Functions and classes that the directives of a page name, without `asgl_cuda.`."""
    return re.findall(r"^\.\. auto(?:function|class):: (?:asgl_cuda\.)?(.*)$", text, re.MULTILINE)


def entry(name: str) -> str:
    """A heading, to which links lead, with the first line of the docstring and a link to the source."""
    module, _, attribute = f"asgl_cuda.{name}".rpartition(".")
    thing: Any = inspect.unwrap(getattr(importlib.import_module(module), attribute))
    line = (inspect.getdoc(thing) or "").splitlines()[0].replace("``", "`")
    source = Path(inspect.getfile(thing)).relative_to(ROOT).as_posix()
    return f"## `{thing.__name__}`\n\n{line} [Source](../../{source})"


def written(text: str) -> str:
    """The page with its names between `<!-- host -->` and `<!-- /host -->`."""
    names = names_in(text)
    listed = "\n\n".join([ABOVE.format(name=names[0]), *map(entry, names)])
    before, _, rest = text.partition("<!-- host -->\n")
    return f"{before}<!-- host -->\n{listed}\n<!-- /host -->{rest.partition('<!-- /host -->')[2]}"


def main() -> int:
    """Writes the pages."""
    for page in PAGES:
        page.write_text(written(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
