"""Markdown pages as a code host shows them: nothing of the site's own syntax, and links that lead somewhere."""

from __future__ import annotations

import ast
import builtins
import functools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from docs import notebooks, pages

markdown_it = pytest.importorskip("markdown_it")

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for room in ("docs", "benchmarks", "tools") for page in (ROOT / room).rglob("*.md"))]
)
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
HTML = {"a", "details", "summary", "picture", "source", "img"}
# Those of docs/pages.py, and what benchmarks/readme.py writes between.
COMMENT = re.compile(r"<!-- (?:notebook -->|(?:python|site)\n|/?\w+ -->)")
SITE_SYNTAX = {
    "role": r"\{[\w:+.-]+\}`",
    "directive": r"^:::|^\{[\w-]+\}",
    "label": r"^\([\w-]+\)=",
    "comment": r"^%",
    "definition": r"^: ",
    "attributes": r"\{[.#][\w-]+",
    "escape in an equation, where code hosts drop it": r"\$[^$\n]*\\[^\w\s$][^$\n]*\$",
    "equation over several lines": r"^[^$\n]*\$[^$\n]*$(?=[^$]*\$)",
}


@functools.cache
def tokens_of(page: Path) -> list[Any]:
    return markdown_it.MarkdownIt("commonmark").enable("table").parse(page.read_text())


def inline(tokens: list[Any]) -> Iterator[Any]:
    for token in tokens:
        yield from token.children or ()


def html_of(page: Path) -> Iterator[str]:
    for token in (*tokens_of(page), *inline(tokens_of(page))):
        if token.type in ("html_block", "html_inline"):
            yield token.content


def lines_of(page: Path) -> Iterator[str]:
    """The text of each paragraph, heading and cell, code in it as two backticks."""
    for token in tokens_of(page):
        if token.type == "inline":
            yield re.sub(r"(`+).*?\1", "``", token.content, flags=re.DOTALL)


@functools.cache
def anchors_of(page: Path) -> set[str]:
    """Anchors of headings, as code hosts make them."""
    found: set[str] = set()
    for opening, heading in pairwise(tokens_of(page)):
        if opening.type == "heading_open":
            text = "".join(each.content for each in heading.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            numbered = (f"{slug}-{number}" if number else slug for number in range(len(found) + 1))
            found.add(next(each for each in numbered if each not in found))
    return found


def links_of(page: Path) -> Iterator[str]:
    for token in inline(tokens_of(page)):
        yield from (str(token.attrs[name]) for name in ("href", "src") if name in token.attrs)
    parser = HTMLParser()
    tags: list[str | None] = []
    parser.handle_starttag = lambda _, attributes: tags.extend(
        value for name, value in attributes if name in ("href", "src", "srcset")
    )
    parser.feed("".join(html_of(page)))
    yield from filter(None, tags)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_shows_nothing_of_the_site(page: Path):
    assert not page.read_text().startswith("---"), "front matter, which is shown as a table"
    assert [token.info for token in tokens_of(page) if token.type == "fence" and token.info.startswith("{")] == []
    shown = list(lines_of(page))
    for what, pattern in SITE_SYNTAX.items():
        assert [line for line in shown if re.search(pattern, line, re.MULTILINE)] == [], what


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_html_is_known(page: Path):
    """Another comment would hide its text on the site as well."""
    for html in html_of(page):
        assert {*re.findall(r"</?(\w+)", re.sub("<!--.*?-->", "", html, flags=re.DOTALL))} <= HTML
        assert html.count("<!--") == len(COMMENT.findall(html)) == html.count("-->")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


ON_THE_SITE = {
    "plain": ("Text.\n\n<!-- python\nx = 1\n-->\n\n```python\nx\n```\n", "Text.\n\n\n\n```python\nx\n```\n"),
    "site": ("<!-- site\n```{toctree}\na\n```\n-->\n", "```{toctree}\na\n```\n\n"),
    "host": ("<!-- host -->\n## `lif`\n\n[Source](lif.py)\n<!-- /host -->\n", "\n"),
    "cells": (
        "<!-- notebook -->\n# A\n\n<!-- python\nassert x\n-->\n\n```python\nx\n```\n\n```sh\nls\n```\n",
        f"{pages.HEADER}# A\n\n{pages.DOWNLOAD.format('a')}\n"
        "```{code-cell} python\n:tags: [remove-cell]\n\nassert x\n```\n\n"
        "```{code-cell} python\nx\n```\n\n```sh\nls\n```\n",
    ),
    "folded": (
        "<!-- notebook -->\n<details>\n<summary>Code</summary>\n\n```python\nx\n```\n\n</details>\n",
        f"{pages.HEADER}```{{code-cell}} python\n:tags: [hide-input]\n\nx\n```\n",
    ),
}


@pytest.mark.parametrize(("text", "expected"), ON_THE_SITE.values(), ids=ON_THE_SITE)
def test_page_on_the_site(text: str, expected: str):
    assert pages.for_site("a", text) == expected


def test_search_terms_stand_before_their_headings(monkeypatch: pytest.MonkeyPatch):
    for page, terms in pages.SEARCH_TERMS.items():
        text = pages.for_site(page, (ROOT / "docs" / f"{page}.md").read_text())
        found = re.findall(r"^```\{index\} (.*)\n```\n\n#+ (.*)$", text, re.MULTILINE)
        assert {heading: words for words, heading in found} == terms
    monkeypatch.setitem(pages.SEARCH_TERMS, "a", {"Gone": "!word"})
    with pytest.raises(ValueError, match=r"a must have one heading 'Gone'"):
        pages.for_site("a", "# A\n")


TUTORIALS = notebooks.tutorials(ROOT / "docs")


@pytest.mark.parametrize("page", TUTORIALS)
def test_notebooks(page: str):
    """Each has the code that the page shows and what this code needs, and no markup of the page."""
    made = json.loads(notebooks.notebook(TUTORIALS[page]))
    assert (made["nbformat"], made["cells"][0]["source"].partition("\n")[0][:2]) == (4, "# ")
    code = [cell["source"] for cell in made["cells"] if cell["cell_type"] == "code"]
    shown = [match["shown"].strip("\n") for match in pages.PYTHON.finditer(TUTORIALS[page]) if match["shown"]]
    assert [cell for cell in code if cell in shown] == shown
    text = "\n".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "markdown")
    assert not re.search(r"<!--|-->|details>|\.md\)|```\{", text)
    trees = [ast.parse(cell) for cell in code]
    bound = set(dir(builtins)) | {each.arg for tree in trees for each in ast.walk(tree) if isinstance(each, ast.arg)}
    for cell in code:
        bound |= notebooks.names_in(cell, ast.Store)
        assert notebooks.names_in(cell, ast.Load) <= bound


def test_notebook_keeps_hidden_code_that_is_needed():
    text = "<!-- notebook -->\n# A\n\n<!-- python\ny = 1\n-->\n\n```python\nx = y\n```\n\n<!-- python\nassert x\n-->\n"
    cells = json.loads(notebooks.notebook(text))["cells"]
    assert [cell["source"] for cell in cells] == ["# A", "y = 1", "x = y"]
