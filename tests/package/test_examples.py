"""The examples in public docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import asgl_cuda

# Returned tuples and a version; examples of functions that convert models need libraries, which may be
# missing.
NO_EXAMPLE_NEEDED = {
    "AdaptiveLIFOutput", "IntegratorOutput", "LIFOutput", "__version__", "convert", "from_nir", "fuse",
    "lightning_callback", "revert", "to_nir", "unfuse",
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


def namespace() -> dict[str, Any]:
    """Names available to every example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), asgl_cuda.LIF(), nn.Linear(32, 10))
    public = {name: getattr(asgl_cuda, name) for name in asgl_cuda.__all__}
    return {**public, "asgl_cuda": asgl_cuda, "model": model, "nn": nn, "torch": torch, "x_seq": torch.rand(4, 8, 64)}


EXAMPLES = [(name, code) for name, docstring in public_docstrings() for code in examples_in(docstring)]


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example_runs(name: str, code: str):
    if name.split(".")[0] in NO_EXAMPLE_NEEDED:
        for library in ("spikingjelly", "nir", "nirtorch"):
            pytest.importorskip(library)
    if ">>>" in code:
        found = doctest.DocTestParser().get_doctest(code, namespace(), name, None, 0)
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found).failed == 0
        return
    exec(compile(code, f"the docstring of {name}", "exec"), namespace())


@pytest.mark.parametrize("name", sorted(set(asgl_cuda.__all__) - NO_EXAMPLE_NEEDED))
def test_there_is_an_example(name: str):
    assert examples_in(inspect.getdoc(getattr(asgl_cuda, name)) or ""), f"asgl_cuda.{name} has no example"


@pytest.mark.parametrize(("name", "printed"), [("asgl_layers", "1 2.0 0.2"), ("AnalogProbSchedule", "{'1': 0.0}")])
def test_example_prints_what_it_says(name: str, printed: str, capsys: pytest.CaptureFixture[str]):
    (code,) = examples_in(inspect.getdoc(getattr(asgl_cuda, name)) or "")
    assert f"# {printed}\n" in code
    exec(code, namespace())
    assert capsys.readouterr().out == f"{printed}\n"
