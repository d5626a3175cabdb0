"""The README's Python runs, and the figures on pages are the measured ones."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch

import asgl_cuda
from benchmarks import readme

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def blocks(language: str, page: Path = README) -> list[str]:
    """Code blocks, each after as many empty lines as precede it, so that tracebacks name the page's line."""
    text = page.read_text()
    return [
        "\n" * text.count("\n", 0, match.start(1)) + match[1]
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


LIBRARIES = ("snntorch", "spikingjelly")
PYTHON = blocks("python")
LOOP = ROOT / "docs" / "design" / "equations.md"
# Code hosts show 95 columns without a scroll bar.
MOST_LINES, MOST_COLUMNS = 150, 95


@pytest.mark.parametrize("block", PYTHON, ids=[block.strip().splitlines()[-1] for block in PYTHON])
def test_python_block_runs_alone(block, tmp_path):
    """In an empty folder; what it prints is what README says, the accuracy within 1.5 points."""
    for library in LIBRARIES:
        if library in block:
            pytest.importorskip(library)
    (tmp_path / "block.py").write_text(block)
    command = [sys.executable, tmp_path / "block.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if "report" in block:
        (promised,) = re.findall(r"print\(report\)  # (\d+ replaced, \d+ left)", block)
        assert result.stdout.startswith(promised)
    if "accuracy" in block:
        (promised,) = re.findall(r"the program prints `(.*)% of the test images`", README.read_text())
        assert abs(float(result.stdout.split("%")[0]) - float(promised)) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("analog_prob", "options"), [(1.0, {}), (0.2, {"decay": 0.9, "v_threshold": 0.8, "v_reset": -0.1})]
)
def test_the_loop_has_the_bits_of_the_kernels(backend, device, dtype, analog_prob, options):
    """That of the page Equations, with a rectangle: spikes and input gradients, at widths with rounded reciprocals.

    With a sigmoid, its default and that of the kernels, they are as close as roundings are.
    """
    (block,) = blocks("python", LOOP)
    namespace: dict[str, Any] = {}
    exec(compile(block, LOOP, "exec"), namespace)
    noise = torch.tensor([2023, 0], device=device)
    x_seq = torch.randn(9, 8, 64, dtype=dtype, device=device, requires_grad=True)
    mask = asgl_cuda.analog_mask(x_seq, analog_prob, noise)
    for value in (1.0, 3.0, 0.7, 1.1):
        for width in (value, torch.full((64,), value, dtype=dtype, device=device, requires_grad=True)):
            kernels = partial(
                asgl_cuda.lif, x_seq, width=width, analog_prob=analog_prob, rng_state=noise, backend=backend, **options
            )
            loop = partial(namespace["lif"], x_seq, mask, width=width, **options)
            torch.testing.assert_close(kernels(), loop())
            fused, plain = kernels(surrogate="rectangle"), loop(smooth=lambda y: (y + 0.5).clamp(0, 1))
            assert torch.equal(fused, plain), width
            leaves = [each for each in (x_seq, width) if isinstance(each, torch.Tensor)]
            (ours, *sums), (theirs, *expected) = (
                torch.autograd.grad(each, leaves, torch.ones_like(x_seq)) for each in (fused, plain)
            )
            assert torch.equal(ours, theirs), width
            torch.testing.assert_close(sums, expected)


def test_readme_is_two_screens():
    assert len(README.read_text().splitlines()) <= MOST_LINES
    for language in ("python", "sh", "text", "bibtex"):
        assert [line for block in blocks(language) for line in block.splitlines() if len(line) > MOST_COLUMNS] == []


def anchors(page: Path) -> set[str]:
    """The names under which code hosts find the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_exist():
    for page in readme.PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def test_figures_are_those_of_the_results():
    """Written by `python -m benchmarks.readme`, which finds a figure of each section that was changed by hand."""
    texts = readme.read()
    changed = dict(texts)
    for name in readme.SECTIONS:
        (page,) = (page for page, text in texts.items() if f"<!-- {name} -->" in text)
        text = changed[page]
        begin, end = text.index(f"<!-- {name} -->"), text.index(f"<!-- /{name} -->")
        figure = begin + [*re.finditer(r"\d", text[begin:end])][-1].start()
        changed[page] = text[:figure] + str((int(text[figure]) + 1) % 10) + text[figure + 1 :]
    assert changed != texts == readme.pages(changed)


def test_every_file_of_results_has_a_command():
    """The page names the files, how each is made, and those of trees with changes that were not committed."""
    page = (readme.RESULTS / "README.md").read_text()
    commands = dict(re.findall(r"^\| `(\w+\.json)`.*\| (.+) \|$", page, re.MULTILINE))
    assert sorted(commands) == sorted(file.name for file in readme.RESULTS.glob("*_cpu.json"))
    reports = {name: json.loads((readme.RESULTS / name).read_text()) for name in commands}
    dirty = [name for name, report in sorted(reports.items()) if report["machine"]["commit"].endswith("-dirty")]
    assert " and ".join(f"`{name}`" for name in dirty) in page.split("`-dirty`:")[-1].split(". ")[0]
