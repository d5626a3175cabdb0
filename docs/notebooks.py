"""Makes a Jupyter notebook of a tutorial's page, for download from the site.

Text and code are those of the page, which `make docs` executes. Links to other pages become plain text, since those are
not where the notebook is. Of the Python that the page does not show only what later code needs is kept.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from docs import pages


def tutorials(docs: Path) -> dict[str, str]:
    """The texts of all tutorials, by the name of the page, as `tutorials/images`."""
    texts = {file.relative_to(docs).with_suffix("").as_posix(): file.read_text() for file in sorted(docs.rglob("*.md"))}
    return {name: text for name, text in texts.items() if text.startswith(pages.NOTEBOOK)}


def notebook(text: str) -> str:
    """The notebook, as JSON, of the text of a page."""
    text = re.sub(r"^<!-- (host -->$.*?^<!-- /host |site$.*?)-->$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = text.removeprefix(pages.NOTEBOOK)
    found = list(pages.PYTHON.finditer(text))
    cells, end = [], 0
    for match in found:
        cells.append(_cell("markdown", text[end : match.start()]))
        end = match.end()
        later = "\n".join(other["shown"] or "" for other in found if other.start() > end)
        if match["shown"] is not None or names_in(match["hidden"], ast.Store) & names_in(later, ast.Load):
            cells.append(_cell("code", match["hidden"] or match["shown"]))
    cells.append(_cell("markdown", text[end:]))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    kept = [{**cell, "id": f"cell-{number}"} for number, cell in enumerate(cell for cell in cells if cell["source"])]
    return json.dumps({"cells": kept, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, indent=1)


def _cell(kind: str, source: str) -> dict[str, object]:
    if kind == "markdown":
        source = re.sub(r"\[([^\]]+)\]\([^)]*\.md[^)]*\)", r"\1", source)
        source = re.sub(r"</?details>|<summary>.*?</summary>", "", source)
        source = re.sub(r"^```math\n(.*?)^```$", r"$$\n\1$$", source, flags=re.MULTILINE | re.DOTALL)
        source = re.sub(r"\n{3,}", "\n\n", source)
    source = source.strip("\n")
    made: dict[str, object] = {"cell_type": kind, "metadata": {}, "source": source}
    return {**made, "execution_count": None, "outputs": []} if kind == "code" else made


def names_in(code: str, use: type[ast.expr_context]) -> set[str]:
    """The names that code binds or reads."""
    tree = ast.parse(code)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, use)}
    if use is ast.Store:
        names |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        imports = (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
        names |= {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    return names
