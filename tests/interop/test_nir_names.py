"""Any name of a node becomes the name of a module."""

import copy
import pickle

import pytest
import torch
from nir_graphs import chain, cuba, euler, fires, nir_lif
from torch import nn

from asgl_cuda import LIF
from asgl_cuda.interop.nir import from_nir, to_nir

AVOIDED = (
    "forward", "training", "class", "None", "_modules", "modules", "parameters", "call_super_init", "graph", "code",
    "meta", "T_destination", "block.forward",
)  # fmt: skip
KEPT = (
    "0", "_0", "conv-1", "block/0 (LIF)", "block.0", "x_seq", "self", "torch", "add", "中", "print", "v", "node" * 100,
)  # fmt: skip
NAMES = {
    **{name: f"{name}_" for name in AVOIDED},
    **{f"__{name}__": f"_{name}__" for name in ("class", "dict", "deepcopy")},
    **{name: name for name in KEPT},
    "": "_",
    ".": "_._",
    "a..b": "a._.b",
    "forward.0": "forward_.0",
    '"); raise SystemExit; ("': "_); raise SystemExit; (_",
    "back\\slash": "back_slash",
    "two\nlines": "two_lines",
    "\x00": "_",
    "ﬁre": "fire",  # Python's own identifiers lose the ligature, too
}


@pytest.mark.parametrize("name", NAMES, ids=[f"{name!a:.20}" for name in NAMES])
def test_any_name_is_that_of_a_module(name):
    x_seq = torch.randn(20, 5, 6)
    graph = chain([name])
    model = from_nir(graph)
    assert isinstance(model.get_submodule(NAMES[name]), LIF)
    expected = euler(graph.nodes[name], x_seq)
    assert fires(expected)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(x_seq), expected)
    assert list(model.state_dict()) == [f"{NAMES[name]}.log_width"]
    again = to_nir(model, x_seq)
    assert torch.equal(from_nir(again)(x_seq), expected)
    assert all(other.isidentifier() for other in again.nodes)


MEETING = {
    "one inside of the other": (["a", "a.weight", "a.b.c"], ["a", "a_weight", "a_b_c"]),
    "after the change": (["class", "class_", "class__"], ["class___", "class_", "class__"]),
    "with those of a current": (["a", "a.0", "a_0"], ["a", "a_0_", "a_0"]),
    "variables of the code": (["self", "Self", "self_", "x_seq", "getattr", "add"],) * 2,
    "an attribute after the change": (["call", "call.super_init"], ["call", "call_super_init_"]),
    "all that are alike": (["", ".", "..", "_", "\n", "\t"], ["___", "__.__", None, "_", None, None]),
}


def lif():
    return nir_lif(v_threshold=0.9)  # no potential at the threshold itself, where NIR has another rule


def cuba_lif():
    return cuba(v_threshold=0.9)


@pytest.mark.parametrize("kind", [lif, cuba_lif])
@pytest.mark.parametrize("meeting", MEETING)
def test_names_that_collide(meeting, kind):
    names, paths = MEETING[meeting]
    x_seq = torch.randn(20, 5, 6)
    model = from_nir(chain(names, kind))
    expected = x_seq
    for _ in names:
        expected = euler(kind(), expected)
    assert fires(expected)
    assert torch.equal(model(x_seq), expected)
    if meeting != "all that are alike":
        assert {type(model.get_submodule(path)) for path in paths} == {LIF if kind is lif else nn.Sequential}
    paths = {path for path, module in model.named_modules() if isinstance(module, LIF)}
    assert len(paths) == len(names)
    again = from_nir(chain(names[::-1], kind))
    assert {path for path, module in again.named_modules() if isinstance(module, LIF)} == paths, "whatever the order"
