"""asgl_cuda.LIF and NIR's neurons LIF and IF: the same equations in other units.

    tau v' = v_leak - v + r x                                NIR's LIF, time in seconds
    v[t] = v[t-1] + dt / tau (v_leak - v[t-1] + r x[t])      its Euler step of length dt
    h[t] = v_rest + decay (v[t-1] - v_rest) + g x[t]         asgl_cuda.LIF with input_gain g

They are the same for decay = 1 - dt / tau, r = g tau / dt and v_leak = v_rest; for decay = 1, NIR's IF with v' = r x
and r = g / dt. Gain and v_leak only move the scale of the potential: v_threshold and v_reset become
(v_threshold - v_leak) / g and (v_reset - v_leak) / g, with g = 1 and v_leak = 0. A node is read in this scale, and
written with its gain in r and with v_leak = 0, because a potential starts at 0 for whoever else reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layer import Granularity
from ...neuron import LIF
from .values import as_array, as_double, as_shape, range_of

DT = 1e-4  # seconds; the step that the other libraries assume as well
_KEY = "asgl_cuda"  # under it a node's metadata have all that asgl_cuda.LIF has and NIR has not
_OPTIONS = (
    "v_rest", "input_gain", "surrogate", "surrogate_gain", "analog_prob", "granularity", "strict_threshold",
    "detach_reset", "scale_output", "stateful", "store_v_seq",
)  # fmt: skip


class Neurons(NamedTuple):
    """Neurons of NIR at a step, in the units of asgl_cuda.LIF: float64, in the shape of the neurons."""

    decay: Tensor
    v_threshold: Tensor
    v_reset: Tensor


def read_neurons(node: Any, dt: float, where: str) -> Neurons:
    """The node in the equations above; `write` has the inverse."""
    r, v_threshold = as_double(node.r), as_double(node.v_threshold)
    v_reset = as_double(0.0 if getattr(node, "v_reset", None) is None else node.v_reset)
    if type(node).__name__ == "IF":
        decay, gain, v_leak = torch.ones_like(r), r * dt, as_double(0.0)
    else:
        rate = dt / as_double(node.tau)
        decay, gain, v_leak = 1 - rate, r * rate, as_double(node.v_leak)
        # tau = dt may have been rounded.
        decay = torch.where(decay.abs() < 1e-6, 0.0, decay)
        if not ((decay >= 0) & (decay <= 1)).all():
            raise ValueError(f"{where}: tau must be at least dt = {dt}, got {range_of(as_double(node.tau))}")
    if not (gain > 0).all():
        raise ValueError(f"{where}: r must be > 0, got {range_of(r)}")
    # r = tau / dt may have been rounded, and would take the threshold along.
    gain = torch.where((gain - 1).abs() < 1e-6, 1.0, gain)
    return Neurons(*torch.broadcast_tensors(decay, (v_threshold - v_leak) / gain, (v_reset - v_leak) / gain))


def per_neuron(layer: LIF, value: Tensor | float, shape: Sequence[int]) -> Tensor:
    """A parameter of the granularity's shape, float64 in the shape of the neurons."""
    value = as_double(value)
    if layer.granularity == "channel" and value.dim():
        value = value.reshape(-1, *[1] * (len(shape) - 1))
    return value.expand(tuple(shape))


def add_metadata(node: Any, layer: LIF, dt: float) -> Any:
    """The node, from which `read_lif` makes the same layer: a file holds numbers, strings, arrays and dictionaries."""
    options = {name: getattr(layer, f"_{name}") for name in ("decay", "v_threshold", "width")}
    options |= {name: getattr(layer, name) for name in _OPTIONS}
    options |= {
        "learn_width": layer.log_width is not None,
        "learn_decay": layer.logit_decay is not None,
        "learn_threshold": layer.threshold is not None,
    }
    options |= {name: value for name in ("v_reset", "reset_amount") if (value := getattr(layer, name)) is not None}
    node.metadata = {
        _KEY: {
            "dt": dt,
            "reset": "soft" if layer.v_reset is None else "hard",
            "strict_threshold": layer.strict_threshold,
            "width": as_array(torch.as_tensor(layer.width).reshape(-1)),
            "options": options,
            "num_features": as_shape(layer.num_features),
            # A file can't compress scalars.
            "parameters": {name: as_array(parameter.reshape(-1)) for name, parameter in layer.named_parameters()},
        }
    }
    return node


def read_lif(node: Any, dt: float | None, where: str) -> LIF:
    """The layer that `to_nir` wrote, where the node has its metadata; else a layer of the node's numbers."""
    ours = node.metadata.get(_KEY)
    neurons = read_neurons(node, dt if dt is not None else float(ours["dt"]) if ours else DT, where)
    if ours is None:
        return new_lif(neurons, where)
    # A file gives numpy's numbers; the layer had Python's, and gets these again.
    options = {name: value.item() if hasattr(value, "item") else value for name, value in ours["options"].items()}
    if ours["reset"] == "soft":
        options["v_reset"] = None
    layer = LIF([int(size) for size in ours["num_features"]], **options)
    for name, value in ours.get("parameters", {}).items():
        parameter = layer.get_parameter(name)
        parameter.data = torch.as_tensor(value).reshape(parameter.shape).clone()
    for name, said in neurons._asdict().items():
        if name == "v_reset" and layer.v_reset is None:
            continue
        value = per_neuron(layer, getattr(layer, name), said.shape)
        if name != "decay":
            value = (value - layer.v_rest) / layer.input_gain
        if not torch.allclose(said, value, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"{where}: its numbers say {name} {range_of(said)} and metadata[{_KEY!r}] says {range_of(value)}, "
                f"written with dt = {float(ours['dt'])}; without metadata[{_KEY!r}] the numbers alone are read"
            )
    return layer


def new_lif(neurons: Neurons, where: str) -> LIF:
    """A layer whose decay and threshold are parameters without gradient where they differ between neurons."""
    decay, v_threshold, v_reset = neurons
    if v_reset.min() != v_reset.max():
        raise ValueError(f"{where}: v_reset must be the same for all neurons, got {range_of(v_reset)}")
    varies = {name: bool(value.min() != value.max()) for name, value in neurons._asdict().items()}
    if varies["decay"] and not ((decay > 3.1e-7) & (decay < 1 - 3.1e-7)).all():
        raise ValueError(f"{where}: a decay that differs between neurons must be in (0, 1), got {range_of(decay)}")
    granularity: Granularity = "layer"
    num_features: tuple[int, ...] | None = None
    if any(varies.values()):
        rows = torch.stack((decay, v_threshold)).reshape(2, len(decay), -1)  # [2, C, neurons of the channel]
        granularity, num_features = "neuron", tuple(decay.shape)
        if (rows == rows[..., :1]).all():
            granularity, num_features = "channel", num_features[:1]
            decay, v_threshold = rows[..., 0]
    layer = LIF(
        num_features,
        granularity=granularity,
        decay=float(decay.flatten()[0]),
        v_threshold=float(v_threshold.flatten()[0]),
        v_reset=float(v_reset.flatten()[0]),
        learn_decay=varies["decay"],
        learn_threshold=varies["v_threshold"],
    )
    for parameter, value in ((layer.logit_decay, decay.logit()), (layer.threshold, v_threshold)):
        if parameter is not None:
            parameter.data = value.to(parameter.dtype, copy=True)
            parameter.requires_grad_(False)
    return layer
