"""Turns a page as a code host shows it, plain Markdown, into what Sphinx reads: MyST.

Four HTML comments are meant for the site and the tests; docs/README.md shows each:

- `<!-- notebook -->`, the first line: the site executes the page, and shows the output.
- `<!-- python`: Python that runs with the page's, and is not shown.
- `<!-- site`: Markdown for the site alone, with MyST's directives.
- `<!-- host -->` to `<!-- /host -->`: Markdown for code hosts alone.
"""

from __future__ import annotations

import re

from docs.search_terms import SEARCH_TERMS

NOTEBOOK = "<!-- notebook -->\n"
HEADER = "---\nfile_format: mystnb\nkernelspec: {name: python3, display_name: Python 3}\n---\n"
# docs/notebooks.py makes the file.
DOWNLOAD = '<p><a href="../notebooks/{}.ipynb" download>Download this page as a Jupyter notebook</a></p>\n'
# Python in comments, and in fences; one that has a <details> to itself is matched with it.
PYTHON = re.compile(
    r"^<!-- python\n(?P<hidden>.*?)^-->$"
    r"|^(?P<folded><details>\n<summary>[^\n]*</summary>\n\n)?```python\n(?P<shown>.*?)^```$(?(folded)\n\n</details>$)",
    re.MULTILINE | re.DOTALL,
)


def for_site(page: str, text: str) -> str:
    """The text of a page, named as `guides/convert`, in the Markdown of MyST."""
    text = re.sub(r"^<!-- host -->$.*?^<!-- /host -->$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^<!-- site\n(.*?)^-->$", r"\1", text, flags=re.MULTILINE | re.DOTALL)
    for heading, words in SEARCH_TERMS.get(page, {}).items():
        line = re.compile(rf"^#+ {re.escape(heading)}$", re.MULTILINE)
        if len(line.findall(text)) != 1:
            raise ValueError(f"docs/search_terms.py: {page} must have one heading {heading!r}")
        text = line.sub(lambda match, words=words: f"```{{index}} {words}\n```\n\n{match[0]}", text)
    if not text.startswith(NOTEBOOK):
        return PYTHON.sub(lambda match: "" if match["shown"] is None else match[0], text)
    text = re.sub(r"^# .*\n", rf"\g<0>\n{DOWNLOAD.format(page.rpartition('/')[2])}", text, count=1, flags=re.MULTILINE)
    return HEADER + PYTHON.sub(_cell, text.removeprefix(NOTEBOOK))


def _cell(match: re.Match[str]) -> str:
    tag = "remove-cell" if match["shown"] is None else "hide-input" if match["folded"] else None
    tags = f":tags: [{tag}]\n\n" if tag else ""
    return f"```{{code-cell}} python\n{tags}{match['hidden'] or match['shown']}```"
