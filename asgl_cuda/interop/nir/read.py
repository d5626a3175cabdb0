"""`from_nir`: a graph of NIR as a module."""

from __future__ import annotations

import keyword
import operator
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ...checks import FLOATING_TYPES, shown
from ...neuron import LIF
from ...over_time import OverTime
from .neurons import Scale, per_neuron, read_node, spike_height
from .nodes import Shape, checked_node, shape_after
from .values import as_double, check_dt, first_line, require

if TYPE_CHECKING:
    import nir

_CALLER = "asgl_cuda.from_nir"


def from_nir(graph: nir.NIRGraph, dt: float | None = None, *, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """The graph as a module in evaluation mode, `[T, B, ...]` to `[T, B, ...]`, whose submodules have the nodes' names.

    A dot in a name separates levels of modules, as in `get_submodule`. Invalid names are changed, independent of the
    nodes' order: characters that Python can't quote become `_`, and `_` is appended until the name is free, as in
    `forward_` for `forward`, `class_` for `class` and `_` for an empty name.

    Args:
        graph: one Input, one Output, between them LIF, IF, CubaLIF, LI, I, CubaLI, Affine, Linear, Conv1d, Conv2d,
            AvgPool2d, SumPool2d, Flatten, Scale, Threshold and Delay, without cycles; edges into the same node are
            added.
        dt: length of a step, in seconds, or in the graph's unit of tau; default the node's step in `to_nir`, else 1e-4.
        dtype: dtype of all weights and parameters; default `torch.get_default_dtype()`.

    LIF and IF become asgl_cuda.LIF, LI and I asgl_cuda.LeakyIntegrator, CubaLIF and CubaLI a Sequential of two of
    these, the current first, Threshold a LIF with decay 0, and Delay a module that takes whole sequences. A gain of an
    integrator that differs between neurons becomes a preceding Scale. A node written by `to_nir` becomes the same layer
    again, parameters included, but with time first. In other nodes, options unknown to NIR take the layer's defaults; a
    decay or threshold is a parameter without gradient if different between neurons, else a constant.

    Raises:
        ImportError: nir is not installed.
        TypeError: an argument is of another type.
        ValueError: a node can't be represented, or contradicts its metadata; the message names the node.
    """
    nir = require("nir", _CALLER)
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(
            f"{_CALLER}: graph must be a nir.NIRGraph, as nir.read gives it of a file, got {type(graph).__name__}"
        )
    if dt is not None:
        dt = check_dt(dt, _CALLER)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in FLOATING_TYPES:
        raise TypeError(f"{_CALLER}: dtype must be float16, bfloat16, float32 or float64, got {shown(dtype)}")
    nodes, sources = _checked(graph, dtype)
    order = _order(nodes, sources)
    _check_shapes(nodes, sources, order)

    modules: dict[str, nn.Module] = {}
    paths = module_paths(name for name, node in nodes.items() if type(node).__name__ not in ("Input", "Output"))
    result = fx.Graph()
    values: dict[str, Any] = {}
    for name in order:
        node, kind = nodes[name], type(nodes[name]).__name__
        where = _at(name, node)
        if kind == "Input":
            values[name] = result.placeholder("x_seq")
            continue
        value = values[sources[name][0]]
        for source in sources[name][1:]:
            value = result.call_function(operator.add, (value, values[source]))
        if kind == "Output":
            output = value
            continue
        if kind == "Scale" and _is_scale_of(node, [modules.get(source) for source in sources[name]]):
            values[name] = value  # done by the layer before
            continue
        try:
            modules[name] = layer = read_node(node, dt, where) if kind in _NEURONS else _IMPORTS[kind](node)
        except Exception as error:  # a layer's own checks don't name the node
            if str(error).startswith(where):
                raise
            raise ValueError(f"{where} can't be represented: {first_line(error)}") from error
        if getattr(layer, "scale_output", False):
            followers = [nodes[target] for target, before in sources.items() if name in before]
            if not all(_is_scale_of(follower, [layer]) for follower in followers):
                raise ValueError(f"{where} has scale_output in its metadata, but no Scale node by v_threshold after it")
        path = paths[name]
        variable = f"{path}_" if path.lower() == "self" else None  # no variable `self`
        values[name] = result.create_node("call_module", path, (value,), name=variable)
    result.output(output)
    made = fx.GraphModule({paths[name]: module for name, module in modules.items()}, result)
    return made.to(dtype).eval()


def module_paths(names: Iterable[str]) -> dict[str, str]:
    """The path of a module for each name: the name itself if valid."""
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    wanted = {name: ".".join(_attribute(part, empty) for part in name.split(".")) for name in names}
    paths: dict[str, str] = {}
    inner: set[str] = set()  # used paths
    outer: set[str] = set()  # used paths and prefixes

    def meets(path: str) -> bool:
        """Whether the path equals, contains or is inside a used path."""
        return path in outer or not inner.isdisjoint(_prefixes(path))

    # Unchanged names come first, and outer modules before inner ones.
    for name in sorted(wanted, key=lambda name: (wanted[name] != name, name.count("."), name)):
        path = wanted[name]
        if meets(path):
            path = path.replace(".", "_")
        while meets(path) or hasattr(empty, path):
            path += "_"
        paths[name] = path
        inner.add(path)
        outer.update(_prefixes(path))
    return paths


def _prefixes(path: str) -> list[str]:
    """The path and its prefixes."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _attribute(part: str, empty: nn.Module) -> str:
    """The part of a name, valid in Python code by fx: unquoted, or quoted without escapes."""
    part = unicodedata.normalize("NFKC", part)  # as Python does with identifiers
    part = "".join("_" if each in '."\\' or not each.isprintable() else each for each in part)
    if part.startswith("__"):
        part = f"_{part.lstrip('_')}"
    while not part or keyword.iskeyword(part) or hasattr(empty, part):
        part += "_"
    return part


def _at(name: str, node: Any) -> str:
    return f"{_CALLER}: node {name!r} ({type(node).__name__})"


def _checked(graph: nir.NIRGraph, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The checked nodes, and the sources of each."""
    if not isinstance(graph.nodes, Mapping):
        raise ValueError(f"{_CALLER}: the nodes of the graph must be a dict, got {type(graph.nodes).__name__}")
    for name in graph.nodes:
        if not isinstance(name, str):
            raise ValueError(f"{_CALLER}: the names of nodes must be strings, got {shown(name)}")
    for kind in ("Input", "Output"):
        names = [name for name, node in graph.nodes.items() if type(node).__name__ == kind]
        if len(names) != 1:
            raise ValueError(f"{_CALLER}: the graph must have one {kind} node, got {names}")
    sources = _sources(graph)
    for name, before in sources.items():
        node = graph.nodes[name]
        first = type(node).__name__ == "Input"
        if first == bool(before):
            raise ValueError(f"{_at(name, node)} has {'an input, ' + repr(before[0]) if first else 'no input'}")
        ends = [source for source in before if type(graph.nodes[source]).__name__ == "Output"]
        if ends:
            raise ValueError(f"{_at(ends[0], graph.nodes[ends[0]])} must be the last node, got {name!r} after it")
    return {name: checked_node(node, _at(name, node), dtype) for name, node in graph.nodes.items()}, sources


def _sources(graph: nir.NIRGraph) -> dict[str, list[str]]:
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    try:
        edges = list(dict.fromkeys((str(source), str(target)) for source, target in graph.edges))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{_CALLER}: the edges of the graph must be pairs of names, got {shown(graph.edges)}"
        ) from error
    for source, target in edges:  # some exporters write an edge twice
        if source not in sources or target not in sources:
            raise ValueError(f"{_CALLER}: the edge {_path((source, target))} is between nodes that are not there")
        sources[target].append(source)
    return sources


def _order(nodes: Mapping[str, Any], sources: Mapping[str, Sequence[str]]) -> list[str]:
    try:
        return list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        cycle = _path(reversed(error.args[1]))
        raise ValueError(f"{_CALLER}: recurrent graphs are not supported, got the cycle {cycle}") from None


def _path(names: Iterable[str]) -> str:
    return " -> ".join(name if name.isprintable() else repr(name) for name in names)


def _check_shapes(nodes: Mapping[str, Any], sources: Mapping[str, Sequence[str]], order: Sequence[str]) -> None:
    """Checks shapes between nodes as far as known from arrays; many exporters write no shape of the Input."""
    shapes: dict[str, Shape | None] = {}
    for name in order:
        where = _at(name, nodes[name])
        known = {source: shape for source in sources[name] if (shape := shapes[source]) is not None}
        if len(set(known.values())) > 1:
            said = ", ".join(f"{list(shape)} of {source!r}" for source, shape in known.items())
            raise ValueError(f"{where}: all its inputs must have one shape, got {said}")
        shape = next(iter(known.values()), None)
        shapes[name] = shape_after(nodes[name], shape, where)


def _is_scale_of(node: Any, layers: Sequence[nn.Module | None]) -> bool:
    """Whether the node is the Scale that `to_nir` writes after a layer with scale_output."""
    if type(node).__name__ != "Scale" or len(layers) != 1 or not isinstance(layers[0], LIF):
        return False
    layer, scale = layers[0], as_double(node.scale)
    return layer.scale_output and torch.allclose(scale, per_neuron(layer, spike_height(layer), scale.shape))


def _weights(module: nn.Module, node: Any) -> nn.Module:
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            setattr(module, name, nn.Parameter(getattr(node, name)))
    return module


def _linear_from(node: Any) -> nn.Module:
    outputs, inputs = node.weight.shape
    return _weights(nn.Linear(inputs, outputs, bias=hasattr(node, "bias")), node)


def _conv_from(node: Any) -> nn.Module:
    outputs, inputs, *kernel_size = node.weight.shape
    kind = nn.Conv1d if len(kernel_size) == 1 else nn.Conv2d
    sizes: Any = {name: getattr(node, name) for name in ("stride", "padding", "dilation", "groups")}
    return OverTime(_weights(kind(inputs * node.groups, outputs, tuple(kernel_size), **sizes), node))


def _pool_from(node: Any) -> nn.Module:
    divisor = 1 if type(node).__name__ == "SumPool2d" else None
    return OverTime(nn.AvgPool2d(node.kernel_size, node.stride, node.padding, divisor_override=divisor))


def _flatten_from(node: Any) -> nn.Module:
    start, end = (dim + 2 if dim >= 0 else dim for dim in (node.start_dim, node.end_dim))
    return nn.Flatten(start, end)


_NEURONS = ("LIF", "IF", "CubaLIF", "LI", "I", "CubaLI", "Threshold", "Delay")
_IMPORTS: dict[str, Callable[[Any], nn.Module]] = {
    "Affine": _linear_from,
    "Linear": _linear_from,
    "Conv1d": _conv_from,
    "Conv2d": _conv_from,
    "AvgPool2d": _pool_from,
    "SumPool2d": _pool_from,
    "Flatten": _flatten_from,
    "Scale": lambda node: Scale(node.scale),
}
