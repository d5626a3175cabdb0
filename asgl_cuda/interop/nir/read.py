"""`from_nir`: a graph of NIR as a module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ...neuron import LIF
from ...over_time import OverTime
from .neurons import Scale, per_neuron, read_node
from .values import as_double, as_pair, as_sizes, check_dt, require

if TYPE_CHECKING:
    import nir


def from_nir(graph: nir.NIRGraph, dt: float | None = None, *, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """The graph as a module in evaluation mode, `[T, B, ...]` to `[T, B, ...]`, whose submodules have the nodes' names.

    Args:
        graph: one Input, one Output, between them LIF, IF, CubaLIF, LI, I, CubaLI, Affine, Linear, Conv1d, Conv2d,
            AvgPool2d, SumPool2d, Flatten and Scale, without cycles; edges into the same node are added.
        dt: length of a step, in seconds, or in the unit that the graph has tau in; default the step that `to_nir` wrote
            the node with, else 1e-4.
        dtype: type of all weights and parameters, whatever the graph has; default `torch.get_default_dtype()`.

    LIF and IF become asgl_cuda.LIF, LI and I asgl_cuda.LeakyIntegrator, CubaLIF and CubaLI a Sequential of two of
    these, the current first. A gain of an integrator that differs between neurons becomes a Scale in front of it. A
    node that `to_nir` wrote becomes the same layer again, parameters included, but with time first. For others,
    whatever NIR does not know is the default of the layer; decay and threshold are parameters that require no gradient
    where they differ between neurons, else constants.

    Raises:
        ImportError: nir is not installed.
        TypeError: an argument is of another type.
        ValueError: a node can't be represented, or its numbers are not those that its metadata says; the message names
            it.
    """
    nir = require("nir", "asgl_cuda.from_nir")
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(
            f"asgl_cuda.from_nir: graph must be a nir.NIRGraph, as nir.read gives it of a file, "
            f"got {type(graph).__name__}"
        )
    if dt is not None:
        dt = check_dt(dt, "asgl_cuda.from_nir")
    nodes = graph.nodes
    for kind in ("Input", "Output"):
        names = [name for name, node in nodes.items() if type(node).__name__ == kind]
        if len(names) != 1:
            raise ValueError(f"asgl_cuda.from_nir: the graph must have one {kind} node, got {names}")
    sources: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target in dict.fromkeys(map(tuple, graph.edges)):  # some exporters write an edge twice
        if source not in nodes or target not in nodes:
            raise ValueError(f"asgl_cuda.from_nir: the edge {source} -> {target} is between nodes that are not there")
        sources[target].append(source)
    try:
        order = list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise ValueError(f"asgl_cuda.from_nir: recurrent graphs are not supported, got the cycle {cycle}") from None

    modules: dict[str, nn.Module] = {}
    result = fx.Graph()
    values: dict[str, Any] = {}
    for name in order:
        node, kind = nodes[name], type(nodes[name]).__name__
        where = f"asgl_cuda.from_nir: node {name!r} ({kind})"
        if kind == "Input":
            values[name] = result.placeholder("x_seq")
            continue
        if not sources[name]:
            raise ValueError(f"{where} has no input")
        value = values[sources[name][0]]
        for source in sources[name][1:]:
            value = result.call_function(operator.add, (value, values[source]))
        if kind == "Output":
            output = value
            continue
        if kind == "Scale" and _is_scale_of(node, [modules.get(source) for source in sources[name]]):
            values[name] = value  # the layer before does it itself
            continue
        if kind in _NEURONS:
            modules[name] = layer = read_node(node, dt, where)
            followers = [nodes[target] for target, before in sources.items() if name in before]
            scales = getattr(layer, "scale_output", False)
            if scales and not all(_is_scale_of(follower, [layer]) for follower in followers):
                raise ValueError(f"{where} has scale_output in its metadata, but no Scale node by v_threshold after it")
        elif kind in _IMPORTS:
            modules[name] = _IMPORTS[kind](node)
        else:
            raise ValueError(f"{where} can't be represented; what can be: {', '.join((*_NEURONS, *_IMPORTS))}")
        values[name] = result.call_module(name, (value,))
    result.output(output)
    return fx.GraphModule(modules, result).to(dtype or torch.get_default_dtype()).eval()


def _is_scale_of(node: Any, layers: Sequence[nn.Module | None]) -> bool:
    """Whether the node is the Scale that `to_nir` writes after the layer because it has scale_output."""
    if type(node).__name__ != "Scale" or len(layers) != 1 or not isinstance(layers[0], LIF):
        return False
    layer, scale = layers[0], as_double(node.scale)
    return layer.scale_output and torch.allclose(scale, per_neuron(layer, layer.v_threshold, scale.shape))


def _weights(module: nn.Module, node: Any) -> nn.Module:
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            setattr(module, name, nn.Parameter(torch.as_tensor(getattr(node, name)).detach().clone()))
    return module


def _linear_from(node: Any) -> nn.Module:
    outputs, inputs = node.weight.shape
    return _weights(nn.Linear(inputs, outputs, bias=hasattr(node, "bias")), node)


def _conv_from(node: Any) -> nn.Module:
    outputs, inputs, *kernel_size = node.weight.shape
    groups = int(node.groups)
    kind = nn.Conv1d if len(kernel_size) == 1 else nn.Conv2d
    padding = node.padding if isinstance(node.padding, str) else as_sizes(node.padding)
    sizes: Any = {"stride": as_sizes(node.stride), "padding": padding, "dilation": as_sizes(node.dilation)}
    return OverTime(_weights(kind(inputs * groups, outputs, tuple(kernel_size), groups=groups, **sizes), node))


def _pool_from(node: Any) -> nn.Module:
    kernel_size, stride, padding = map(as_pair, (node.kernel_size, node.stride, node.padding))
    divisor = 1 if type(node).__name__ == "SumPool2d" else None
    return OverTime(nn.AvgPool2d(kernel_size, stride, padding, divisor_override=divisor))


def _flatten_from(node: Any) -> nn.Module:
    start, end = (int(dim) + 2 if dim >= 0 else int(dim) for dim in (node.start_dim, node.end_dim))
    return nn.Flatten(start, end)


_NEURONS = ("LIF", "IF", "CubaLIF", "LI", "I", "CubaLI")
_IMPORTS: dict[str, Callable[[Any], nn.Module]] = {
    "Affine": _linear_from,
    "Linear": _linear_from,
    "Conv1d": _conv_from,
    "Conv2d": _conv_from,
    "AvgPool2d": _pool_from,
    "SumPool2d": _pool_from,
    "Flatten": _flatten_from,
    "Scale": lambda node: Scale(torch.as_tensor(node.scale).detach().clone()),
}
