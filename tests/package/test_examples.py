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
    """The loop has every bit, at values that round: an order of operations or a quotient would show."""
    function, state = getattr(asgl_cuda, name), torch.tensor([2023, 0])
    loop = (inspect.getdoc(function) or "").split("The same in PyTorch")[1].split("::\n\n")[1].split("\n\n")[0]
    x_seq = torch.randn(30, 8, 64, dtype=dtype)
    written = torch.empty_like(x_seq)
    values = {"x_seq": x_seq, "T": len(x_seq), "s": written, "out": written, "torch": torch, **options}
    noise = {"rng_state": state} if "analog_prob" in options else {}
    if noise:
        values["mask"] = asgl_cuda.analog_mask(x_seq, options["analog_prob"], state)
    exec(textwrap.dedent(loop), values)
    output = function(x_seq, **options, **noise, return_v_last=True)
    assert torch.equal(written, output[0])
    for potential in {"v", "w"} & values.keys():
        assert torch.equal(values[potential], getattr(output, f"{potential}_last")), potential


@pytest.mark.parametrize("name", sorted(set(asgl_cuda.__all__) - NO_EXAMPLE_NEEDED))
def test_there_is_an_example(name: str):
    assert examples_in(inspect.getdoc(getattr(asgl_cuda, name)) or ""), f"asgl_cuda.{name} has no example"


@pytest.mark.parametrize(("name", "printed"), [("asgl_layers", "1 2.0 0.2"), ("AnalogProbSchedule", "{'1': 0.0}")])
def test_example_prints_what_it_says(name: str, printed: str, capsys: pytest.CaptureFixture[str]):
    (code,) = examples_in(inspect.getdoc(getattr(asgl_cuda, name)) or "")
    assert f"# {printed}\n" in code
    exec(code, namespace())
    assert capsys.readouterr().out == f"{printed}\n"
