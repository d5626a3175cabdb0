"""The README's Python runs as it stands, top to bottom, and its signature agrees with the code."""

import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch

import asgl_cuda
from benchmarks import readme

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    """Its code blocks, each behind as many empty lines as precede it, so that a traceback names the README's line."""
    text = README.read_text()
    return [
        "\n" * text.count("\n", 0, match.start(1)) + match[1]
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def test_python_blocks_run():
    for library in ("nir", "nirtorch", "spikingjelly"):
        pytest.importorskip(library)
    python = blocks("python")
    assert len(python) == 9
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in python:
        exec(compile(block, README, "exec"), namespace)
    x_seq, width, mask, lif, fused = (namespace[name] for name in ("x_seq", "width", "mask", "lif", "fused"))
    grad = torch.randn_like(x_seq)
    ours = torch.autograd.grad(fused, (x_seq, width), grad)
    theirs = torch.autograd.grad(lif(x_seq, mask, width=width), (x_seq, width), grad)
    torch.testing.assert_close(ours, theirs)


def test_signature_is_that_of_lif():
    (block,) = blocks("text")
    code = re.sub(r"#.*", "", block)
    written = dict(re.findall(r"(\w+)=([^,\s]+)", code))
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(asgl_cuda.lif).parameters.items()
        if parameter.default is not parameter.empty
    }
    assert {name: eval(value) for name, value in written.items()} == defaults


def test_figures_are_those_of_the_results():
    """`python -m benchmarks.readme` writes them."""
    text = README.read_text()
    assert readme.with_sections(text) == text


def test_a_figure_that_was_changed_by_hand_is_found():
    text = README.read_text()
    for name in readme.sections():
        begin = text.index("--: |\n", text.index(f"<!-- {name} -->"))
        figure = re.compile(r"\| [^|]*(\d)[^|\d]*\|\n").search(text, begin)
        assert figure.end() < text.index(f"<!-- /{name} -->")
        changed = text[: figure.start(1)] + str((int(figure[1]) + 1) % 10) + text[figure.end(1) :]
        assert readme.with_sections(changed) == text


def test_table_of_blocks():
    def row(seconds, saved):
        return {"both": seconds}, {"saved_bytes": saved}

    rows = {
        "multiply": row(2e-6, None),
        "asgl_cuda cpu": row(3e-6, 4100),
        "pair: asgl_cuda cpu": row(6e-6, 8200),
        "pair: reference": row(45e-6, 18000),
    }
    block = {"shape": [2, 5, 4, 5, 5], "dtype": "float32", "layout": "channels_last"}
    block |= {"seconds": {name: each[0] for name, each in rows.items()}}
    block |= {"rows": {name: each[1] for name, each in rows.items()}}
    text = readme.block({"blocks": [block]})
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    times, ratios, kept = ["2.00", "3.00", "6.00", "", "45.0"], ["1.50", "2.00", "15.0"], ["4.10", "8.20"]
    assert cells == ["float32, channels_last", *times, *ratios, *kept]
    assert "`[2, 5, 4, 5, 5]`" in text
