"""`from_nir`: a graph of NIR as a module."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ...checks import check_device_and_dtype
from ...neurons.leaky_integrator import LeakyIntegrator
from ...neurons.lif import LIF
from ...neurons.over_time import OverTime
from . import neurons as units
from .neurons import KEY, RECURRENCE, Delay, Scale, as_double, first_wrong, prefixed_errors

if TYPE_CHECKING:
    import nir

_CALLER = "asgl_cuda.from_nir"


def from_nir(graph: nir.NIRGraph, dt: float | None = None, *, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """Makes a torch module from a graph of NIR. The module maps `[T, B, ...]` to `[T, B, ...]`.

    The module is in evaluation mode. Its submodules are named after the nodes. A dot in a name separates levels of
    modules, as in `get_submodule`. Characters other than letters, digits and `_` become `_`. If a name is in use, such
    as `forward` or `class`, an `_` is added at its end.

    Args:
        graph: a graph without cycles that has one Input and one Output. Between these there may be LIF, IF, CubaLIF,
            LI, I, CubaLI, Affine, Linear, Conv1d, Conv2d, AvgPool2d, SumPool2d, Flatten, Scale, Threshold and Delay. If
            several edges lead to a node, their values are added.
        dt: length of a time step, in the unit of the graph's time constants, usually seconds. Neurons that `to_nir`
            wrote contain their own `dt`, so leave this argument out for them. For other nodes the default is 1e-4.
        dtype: dtype of all weights and parameters; default `torch.get_default_dtype()`.

    LIF and IF become asgl_cuda.LIF, and LI and I become asgl_cuda.LeakyIntegrator. CubaLIF becomes a Sequential of a
    LeakyIntegrator, which computes the synaptic current, and a LIF. CubaLI becomes a Sequential of two
    LeakyIntegrators. Threshold becomes a LIF with decay 0, and Delay a module that takes whole sequences. If the gain
    of an integrator differs between neurons, a module before it multiplies by the gains. If `to_nir` wrote a LIF or
    LeakyIntegrator of asgl_cuda, `from_nir` restores its options and parameters, but time is the first dimension. A
    BatchNormLIF becomes a LIF after weights that contain the normalisation. Spike layers become Linear or convolutions.
    If `to_nir` wrote a neuron of another library, it becomes a LIF with the default surrogate and width. For neurons of
    other programs, options that NIR does not have take their default values. Decay, threshold and reset are then
    constants, which may differ between neurons.

    Raises:
        ImportError: nir is not installed.
        TypeError: an argument is of another type.
        ValueError: a node can't be represented, or contradicts its metadata. The message names the node. The error is
            also raised if the graph has a cycle, if it does not have exactly one Input and one Output, or if dt is not
            positive and finite.
    """
    nir = units.import_and_check_dt("nir", units.DT if dt is None else dt, _CALLER)
    check_device_and_dtype(None, dtype, _CALLER)
    if not isinstance(graph, nir.NIRGraph):
        got = type(graph).__name__
        raise TypeError(f"{_CALLER}: graph must be a nir.NIRGraph, as nir.read returns it, got {got}")
    nodes: dict[str, Any] = graph.nodes
    edges = list(dict.fromkeys(map(tuple, graph.edges)))  # some exporters write an edge twice
    for kind in (nir.Input, nir.Output):
        if len(names := [name for name, node in nodes.items() if isinstance(node, kind)]) != 1:
            raise ValueError(f"{_CALLER}: the graph must have one {kind.__name__} node, got {names}")
    sources = {name: [source for source, target in edges if target == name] for name in nodes}
    try:
        order = list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        remedy = "write the recurrent layer with asgl_cuda.RecurrentLIF"
        raise ValueError(f"{_CALLER}: can't read the cycle {cycle}; {RECURRENCE}; {remedy}") from None

    paths, result = _module_paths(nodes), fx.Graph()
    modules: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name in order:
        node, before = nodes[name], sources[name]
        with prefixed_errors(f"{_CALLER}: node {name!r} ({type(node).__name__})"):
            if isinstance(node, nir.Input):
                values[name] = result.placeholder("x_seq")
                continue
            value = values[before[0]]
            for source in before[1:]:
                value = result.call_function(operator.add, (value, values[source]))
            layers = [modules.get(paths[source]) for source in before]
            scaled: Any = next((each for each in layers if getattr(each, "scale_output", False)), None)
            if scaled is not None:  # the Scale after a layer that scales its output itself: left out
                lif = next(source for source, each in zip(before, layers, strict=True) if each is scaled)
                without = f"delete graph.nodes[{lif!r}].metadata[{KEY!r}] to read that LIF without its metadata"
                if len(before) != 1 or not isinstance(node, nir.Scale):
                    raise ValueError(
                        f"must be a Scale with one input, because the LIF {lif!r} before it has scale_output=True in "
                        f"its metadata, got {type(node).__name__} with input {' and '.join(map(repr, before))}; insert "
                        f"a Scale directly after this LIF, or {without}"
                    )
                scale = as_double(node.scale)
                if not torch.allclose(scale, wanted := units.spike_heights(scaled, scale.shape)):
                    raise ValueError(
                        f"scale must equal the spike heights of the LIF {lif!r} before it, neuron by neuron, because "
                        f"this LIF has scale_output=True in its metadata: expected {_first_difference(wanted, scale)}; "
                        f"correct the scale, or {without}"
                    )
            elif isinstance(node, nir.Output):
                result.output(value)
            else:
                modules[paths[name]] = _module_of_node(node, dt)
                value = result.call_module(paths[name], (value,))
            values[name] = value
    return fx.GraphModule(modules, result).to(dtype or torch.get_default_dtype()).eval()


def _first_difference(wanted: Tensor, given: Tensor) -> str:
    """The first neuron for which the values differ, and both values, for errors."""
    shape = torch.broadcast_shapes(wanted.shape, given.shape)
    wanted, given = wanted.expand(shape), given.expand(shape)
    index = (~torch.isclose(given, wanted)).nonzero()[0].tolist()
    where = f" for neuron {index}" if index else ""
    return f"{wanted[tuple(index)].item():g}{where}, got {given[tuple(index)].item():g}"


def _module_paths(names: Iterable[str]) -> dict[str, str]:
    """The path of each node's module in the result, by name of the node: valid names that are no attributes yet."""
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    paths: dict[str, str] = {}
    for name in sorted(names):
        path = ""
        for part in re.sub(r"[^\w.]", "_", name, flags=re.ASCII).split("."):
            free = part and not keyword.iskeyword(part) and not hasattr(empty, part) and part.lower() != "self"
            path += f".{part}" if free else f".{part}_"
        path = path[1:]
        # The module of one node must not contain that of another, as "a" would contain "a.b".
        while any(f"{path}.".startswith(f"{each}.") or f"{each}.".startswith(f"{path}.") for each in paths.values()):
            path = f"{path.replace('.', '_')}_"
        paths[name] = path
    return paths


def _module_of_node(node: Any, dt: float | None) -> Any:
    """The module that computes a node, which `to_nir` may have written."""
    kind, ours = (
        type(node).__name__,
        (getattr(node, "metadata", None) or {}).get(KEY, {}),
    )
    written, is_dt_known = float(ours.get("dt", dt or units.DT)), "dt" in ours or dt is not None
    if dt is not None and abs(dt - written) > 1e-6 * written:
        raise ValueError(f"to_nir wrote this node with dt = {written}, got dt = {dt}; leave out the argument dt")
    dt = written
    if kind in ("Affine", "Linear", "Conv1d", "Conv2d"):
        return _weight_layer_of_node(node, ours)
    if kind in ("AvgPool2d", "SumPool2d"):
        size, stride, padding = (_repeated_sizes(each, 2) for each in (node.kernel_size, node.stride, node.padding))
        return OverTime(nn.AvgPool2d(size, stride, padding, divisor_override=1 if kind == "SumPool2d" else None))
    if kind == "Flatten":
        return nn.Flatten(*(dim + 2 if dim >= 0 else dim for dim in (int(node.start_dim), int(node.end_dim))))
    if kind == "Scale":
        return Scale(as_double(node.scale))
    if kind == "Threshold":
        v_threshold = units.finite_value(node, "threshold")
        constants = {"decay": 0 * v_threshold, "v_threshold": v_threshold}
        return units.layer_with_constants(LIF, constants, strict_threshold=True)
    if kind == "Delay":
        delay = as_double(node.delay)
        steps = (delay / dt).round()
        rounding = 2**-24 * delay  # a file may have rounded the delay to float32, unless that would change the step
        tolerance = 1e-3 * dt + torch.where(rounding < dt / 4, rounding, 0.0)
        if (is_wrong := ~(delay >= 0)).any():
            raise ValueError(f"delay must be at least 0, got {first_wrong(delay, is_wrong)}")
        if (is_wrong := ~((delay - steps * dt).abs() < tolerance)).any():
            got, hint = first_wrong(delay, is_wrong), "pass the time step of the graph, from_nir(graph, dt=...)"
            raise ValueError(f"delay must be a multiple of dt = {dt}, got {got}{'' if is_dt_known else f'; {hint}'}")
        return Delay(steps.long())
    if kind in ("CubaLIF", "CubaLI"):
        if kind == "CubaLIF":
            neurons = units.layer_with_constants(LIF, units.constants_of_node(node, dt, "tau_mem"))
        else:
            neurons = units.integrator_of_node(node, dt, "tau_mem")
        return nn.Sequential(units.integrator_of_node(node, dt, "tau_syn", "w_in"), neurons)
    if kind in ("LIF", "IF"):
        numbers = units.constants_of_node(node, dt)
        return units.layer_from_metadata(ours, LIF, numbers) if ours else units.layer_with_constants(LIF, numbers)
    if kind in ("LI", "I"):
        numbers = dict(zip(("decay", "input_gain"), units.decay_and_gain_of_node(node, dt), strict=True))
        numbers["v_rest"] = as_double(getattr(node, "v_leak", 0.0))
        return units.layer_from_metadata(ours, LeakyIntegrator, numbers) if ours else units.integrator_of_node(node, dt)
    raise ValueError("can't be read; the documentation of asgl_cuda.from_nir lists the nodes that can be read")


def _weight_layer_of_node(node: Any, ours: Any) -> nn.Module:
    """The linear layer or convolution that computes a node with a weight."""
    weight = as_double(node.weight)
    bias = None if getattr(node, "bias", None) is None else as_double(node.bias)
    bias = None if bias is None or ("bias" in ours and not bias.any()) else bias
    outputs, inputs, *kernel_size = weight.shape
    layer: Any = nn.Linear(inputs, outputs)
    if kernel_size:
        dims = len(kernel_size)
        padding: Any = node.padding if isinstance(node.padding, str) else _repeated_sizes(node.padding, dims)
        stride, dilation, groups = (
            _repeated_sizes(node.stride, dims),
            _repeated_sizes(node.dilation, dims),
            int(node.groups),
        )
        kind: Any = nn.Conv1d if dims == 1 else nn.Conv2d
        layer = kind(inputs * groups, outputs, tuple(kernel_size), stride, padding, dilation, groups)
    layer.weight, layer.bias = nn.Parameter(weight.clone()), None if bias is None else nn.Parameter(bias.clone())
    return OverTime(layer) if kernel_size else layer


def _repeated_sizes(value: Any, dims: int) -> Any:
    """A list of one size per dimension; a single size is repeated."""
    return torch.as_tensor(value).expand(dims).tolist()
