"""What users read: Python in pages and docstrings runs, the Reference is complete; names, hints and figures."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda.backends import cupy
from asgl_cuda.interop.nir import neurons
from docs import names, pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page != DOCS / "README.md"]
IMPORTS = ("matplotlib", "sklearn", "spikingjelly", "snntorch", "norse", "sinabs", "nir", "mlxtend", "tonic")

# ---- pages ----


def python_of(page: Path) -> list[str]:
    """Runnable blocks, shown and hidden, each after as many empty lines as precede it."""
    text = page.read_text()
    code = [(match["hidden"] or match["shown"], match.end()) for match in pages.PYTHON.finditer(text)]
    return ["\n" * (text.count("\n", 0, end) - block.count("\n")) + block for block, end in code]


# Notebooks are executed when the documentation is built.
WITH_PYTHON = [page for page in PAGES if python_of(page) and not page.read_text().startswith(pages.NOTEBOOK)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=[str(page.relative_to(DOCS)) for page in WITH_PYTHON])
def test_python_of_page_runs(page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    code = python_of(page)
    for library in IMPORTS:
        if re.search(rf"^(?:import|from) {library}\b", "\n".join(code), re.MULTILINE):
            pytest.importorskip(library)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # C++ takes half a minute
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in code:
        exec(compile(block, page, "exec"), namespace)
    if page == DOCS / "index.md":  # says about 98 %
        assert "% of the test images" in capsys.readouterr().out
        accuracy = namespace["accuracy"]
        assert isinstance(accuracy, float)
        assert accuracy > 0.965


def statements(code: str) -> list[str]:
    """The statements of a program, without comments and line breaks."""
    return [ast.unparse(statement) for statement in ast.parse(code).body]


def test_first_network_is_the_program_of_the_readme():
    """On the front page, formatted anew; in the first tutorial line by line, among others that look at it."""
    (program,) = (code for code in python_of(ROOT / "README.md") if "load_digits" in code)
    assert sorted(statements(python_of(DOCS / "index.md")[0])) == sorted(statements(program))
    tutorial = "".join(python_of(DOCS / "start" / "first-network.md"))
    program, tutorial = (ast.unparse(ast.parse(code)).splitlines() for code in (program, tutorial))
    assert not {*program} - {*tutorial}


def test_reference_is_complete():
    """And a method without a docstring would show torch's: to be overridden by all subclasses."""
    listed = [name for page in names.PAGES for name in names.names_in(page.read_text())]
    assert {*asgl_cuda.__all__, "interop.snntorch.MultiStep"} - {*listed} == {"__version__"}
    layers = [each for each in vars(asgl_cuda).values() if isinstance(each, type) and issubclass(each, nn.Module)]
    assert [layer for layer in layers if not re.search("x_seq|`input`", inspect.getdoc(layer.forward) or "")] == []


@pytest.mark.parametrize("page", names.PAGES, ids=[page.stem for page in names.PAGES])
def test_reference_on_a_code_host_has_the_names(page: Path):
    """As `python -m docs.names` writes them."""
    pytest.importorskip("snntorch")
    assert names.written(page.read_text()) == page.read_text()


# ---- docstrings ----

# Returned tuples and a version; examples of functions that convert models need libraries, which may be missing.
NO_EXAMPLE_NEEDED = {
    "AdaptiveLIFOutput", "IntegratorOutput", "LIFOutput", "RecurrentLIFOutput", "__version__", "convert", "from_nir",
    "fuse", "lightning_callback", "revert", "to_nir", "unfuse",
}  # fmt: skip


def public_docstrings() -> Iterator[tuple[str, str]]:
    """Names and docstrings of exports, and of the public members of exported classes."""
    for name in asgl_cuda.__all__:
        thing = getattr(asgl_cuda, name)
        if not callable(thing):
            continue
        yield name, inspect.getdoc(thing) or ""
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            if not member.startswith("_"):
                yield f"{name}.{member}", inspect.getdoc(value) or ""


def examples_in(docstring: str) -> list[str]:
    """The code of each `Example::`, and of lines that begin with >>>, with their output."""
    blocks = re.findall(r"^Examples?:+\n\n?((?:(?: .*)?\n)+)", docstring + "\n", re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


EXAMPLES = [(name, code) for name, docstring in public_docstrings() for code in examples_in(docstring)]
PRINTED = {"asgl_layers": "1 2.0 0.5", "AnalogProbSchedule": "{'1': 0.0}"}


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example_runs(name: str, code: str, capsys: pytest.CaptureFixture[str]):
    if name.split(".")[0] in NO_EXAMPLE_NEEDED:
        for library in ("spikingjelly", "nir", "nirtorch"):
            pytest.importorskip(library)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), asgl_cuda.LIF(), nn.Linear(32, 10))
    known: dict[str, Any] = {each: getattr(asgl_cuda, each) for each in asgl_cuda.__all__}
    known |= {"asgl_cuda": asgl_cuda, "model": model, "nn": nn, "torch": torch, "x_seq": torch.rand(4, 8, 64)}
    if ">>>" in code:
        found = doctest.DocTestParser().get_doctest(code, known, name, None, 0)
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found).failed == 0
        return
    exec(compile(code, f"the docstring of {name}", "exec"), known)
    if name in PRINTED:
        assert f"# {PRINTED[name]}\n" in code
        assert capsys.readouterr().out == f"{PRINTED[name]}\n"


def test_every_public_name_has_an_example():
    assert set(asgl_cuda.__all__) - NO_EXAMPLE_NEEDED - {name for name, _ in EXAMPLES} == set()


NEURON = {"decay": 0.9, "v_threshold": 0.8}
ADAPTATION = {"adapt_decay": 0.97, "adapt_potential": 0.1, "adapt_spike": 0.3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lif", {**NEURON, "v_reset": -0.1, "width": 1.1, "analog_prob": 0.5}),
        ("adaptive_lif", {**NEURON, **ADAPTATION, "to_threshold": False}),
        ("adaptive_lif", {**NEURON, **ADAPTATION, "to_threshold": True}),
        ("leaky_integrator", {"decay": 0.9, "input_gain": 0.7, "v_rest": 0.1, "delay": False}),
        ("leaky_integrator", {"decay": 0.9, "input_gain": 0.7, "v_rest": 0.1, "delay": True}),
    ],
)
def test_the_same_in_pytorch_is_the_same(name: str, options: dict[str, Any], dtype: torch.dtype):
    """The loop has every bit, at values that round: an order of operations or a quotient would show.

    That of `lif` with the smooth value of a rectangle, which its docstring has below the loop.
    """
    function, state = getattr(asgl_cuda, name), torch.tensor([2023, 0])
    loop = (inspect.getdoc(function) or "").split("The same in PyTorch")[1].split("::\n\n")[1].split("\n\n")[0]
    x_seq = torch.randn(30, 8, 64, dtype=dtype)
    written = torch.empty_like(x_seq)
    values = {"x_seq": x_seq, "T": len(x_seq), "s": written, "out": written, "torch": torch, **options}
    noise = {"rng_state": state} if "analog_prob" in options else {}
    if noise:
        values["mask"] = asgl_cuda.analog_mask(x_seq, options["analog_prob"], state)
    smooth, exact = (f"((h - v_threshold) * slope{end}" for end in (").sigmoid()", " + 0.5).clamp(0, 1)"))
    if name == "lif":
        assert f"`a = {exact}`" in (inspect.getdoc(function) or "")
        exec(textwrap.dedent(loop), values)
        torch.testing.assert_close(written, function(x_seq, **options, **noise))
        assert smooth in loop
        loop, options = loop.replace(smooth, exact), {**options, "surrogate": "rectangle"}
    exec(textwrap.dedent(loop), values)
    output = function(x_seq, **options, **noise, return_v_last=True)
    assert torch.equal(written, output[0])
    for potential in {"v", "w"} & values.keys():
        assert torch.equal(values[potential], getattr(output, f"{potential}_last")), potential


# ---- names and hints ----


def test_names():
    """`dir` has the public names, and the docstring lists them all."""
    public = sorted({*asgl_cuda.__all__, "interop"})
    assert dir(asgl_cuda) == public
    assert [name for name in public if isinstance(getattr(asgl_cuda, name), types.ModuleType)] == ["interop"]
    words = (asgl_cuda.__doc__ or "").replace(",", " ").split()
    assert {name for name in public if not name.startswith("__")} - {*words} == set()


@pytest.mark.parametrize("name", ["nir", "cupy", "cupy12"])
def test_install_commands_name_what_the_extra_has(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cupy.torch.version, "cuda", "12.8" if name == "cupy12" else "13.0")
    (listed,) = re.findall(rf"^{name} = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    command = neurons.INSTALL if name == "nir" else cupy.install_command()
    assert command == "pip install " + " ".join(re.findall(r'"[^"]+"', listed))


def test_nothing_says_to_install_this_package_from_an_index():
    lines = (line for path in (ROOT / "asgl_cuda").rglob("*.py") for line in path.read_text().splitlines())
    assert [line for line in lines if re.search(r"pip install.*\basgl_cuda\b", line)] == []


# ---- figures ----


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The method's, and those of the measurements from their results."""
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    matplotlib = pytest.importorskip("matplotlib")
    from benchmarks import palette
    from docs.figures import measured, method

    neuron = method.one_neuron()
    hard, analog = neuron.s_seq[~neuron.analog], neuron.s_seq[neuron.analog]
    assert set(hard.tolist()) == {0.0, 1.0}
    assert ((analog > 0.2) & (analog < 0.8)).sum() >= 3  # enough that the figure shows smooth values
    method.draw(neuron, [[5.0, 5.0, 5.0], [2.0, 2.5, 3.0]], tmp_path / "method.png")
    committed = {file.name for file in measured.RESULTS.glob("*.png")}
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    monkeypatch.setitem(palette.STYLE, "figure.constrained_layout.use", False)  # takes ten seconds
    smoothing = measured.read_report("smoothing")
    monkeypatch.setitem(measured.FIGURES, "smoothing", lambda _, file: measured.smoothing(two_runs, file))
    two_runs = {**smoothing, "runs": smoothing["runs"][:2]}
    measured.main()
    drawn = {file.name for file in tmp_path.glob("*.png") if file.stat().st_size > 10_000}
    assert drawn == {*committed, "method.png"}
    style = matplotlib.rc_params_from_file(palette.write_matplotlibrc(tmp_path / "style"))
    assert [each["color"] for each in style["axes.prop_cycle"]] == list(palette.CYCLE)
    assert len(palette.CYCLE) == len(palette.LINES) == len(palette.MARKERS)
