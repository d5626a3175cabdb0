"""The documentation's sources: the Python of its pages runs, the Reference is complete, its figure can be drawn."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import asgl_cuda

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page != DOCS / "README.md"]
IMPORTS = ("matplotlib", "sklearn", "spikingjelly", "snntorch", "norse", "sinabs", "nir", "mlxtend", "tonic")


def python_of(page: Path) -> list[str]:
    """Runnable blocks, each after as many empty lines as precede it: setups in comments, `python` fences.

    Tutorials have none: they are executed when the documentation is built.
    """
    text = page.read_text()
    found = []
    for match in re.finditer(r"^% setup:\n((?:%[^\n]*\n)+)|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        setup, block = match.groups()
        lines_before = text.count("\n", 0, match.start()) + 1
        found.append("\n" * lines_before + (block or re.sub("^% ?", "", setup, flags=re.MULTILINE)))
    return found


WITH_PYTHON = [page for page in PAGES if python_of(page)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=[str(page.relative_to(DOCS)) for page in WITH_PYTHON])
def test_python_of_page_runs(page: Path, capsys: pytest.CaptureFixture[str]):
    code = python_of(page)
    for library in IMPORTS:
        if re.search(rf"^(?:import|from) {library}\b", "\n".join(code), re.MULTILINE):
            pytest.importorskip(library)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in code:
        exec(compile(block, page, "exec"), namespace)
    if page == DOCS / "index.md":  # states about 98 percent
        assert "% of the test images" in capsys.readouterr().out
        accuracy = namespace["accuracy"]
        assert isinstance(accuracy, float)
        assert accuracy > 0.965


def test_first_network_is_the_program_of_the_readme():
    """On the front page as it stands; in the first tutorial line by line, among lines that look at it."""
    program = python_of(DOCS.parent / "README.md")[0].strip("\n").splitlines()
    assert python_of(DOCS / "index.md")[0].strip("\n").splitlines() == program
    tutorial = (DOCS / "start" / "first-network.md").read_text()
    cells = re.findall(r"^```{code-cell} python\n(.*?)^```$", tutorial, re.MULTILINE | re.DOTALL)
    missing = {*program} - {*"".join(cells).splitlines()}
    assert not missing


@pytest.mark.parametrize(
    "word",
    [
        "batch first", "dataset", "energy", "firing rate regularization", "freeze width", "gpu", "lifrecurrent",
        "membrane potential", "nan", "onnx", "padding", "poisson", "recurrent", "rleaky", "rlif", "rsnn", "shd", "tau",
        "tensorboard", "variable length",
    ],
)  # fmt: skip
def test_search_finds(word: str):
    """The site's search puts main index entries first."""
    entries = re.findall(r"^```\{index\} (.*)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
    assert [each.strip().lower() for line in entries for each in line.split(",")].count(f"!{word}") == 1


@pytest.mark.parametrize(
    "layer", [each for each in vars(asgl_cuda).values() if isinstance(each, type) and issubclass(each, torch.nn.Module)]
)
def test_help_of_a_call(layer: type[torch.nn.Module]):
    """A method without a docstring shows torch's: to be overridden by all subclasses."""
    assert "x_seq" in (inspect.getdoc(layer.forward) or "")


@pytest.mark.parametrize("name", [*asgl_cuda.__all__, "interop.snntorch.MultiStep"])
def test_reference_has(name: str):
    reference = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    assert re.search(
        rf"^\.\. (?:autofunction|autoclass|py:data):: (?:asgl_cuda\.)?{re.escape(name)}$", reference, re.MULTILINE
    )


def test_figure_of_the_method(tmp_path: Path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    from docs.figures import method

    neuron = method.one_neuron()
    hard, analog = neuron.s_seq[~neuron.analog], neuron.s_seq[neuron.analog]
    assert set(hard.tolist()) == {0.0, 1.0}
    assert ((analog > 0.2) & (analog < 0.8)).sum() >= 3  # enough that the figure shows smooth values
    method.draw(neuron, [[5.0, 5.0, 5.0], [2.0, 2.5, 3.0]], tmp_path / "method.png")
    assert (tmp_path / "method.png").stat().st_size > 10_000


def test_palette_is_a_style_of_matplotlib(tmp_path: Path):
    matplotlib = pytest.importorskip("matplotlib")
    from benchmarks import palette

    style = matplotlib.rc_params_from_file(palette.write_matplotlibrc(tmp_path / "style"))
    assert [each["color"] for each in style["axes.prop_cycle"]] == list(palette.CYCLE)
    assert len(palette.CYCLE) == len(palette.LINES) == len(palette.MARKERS)
