"""asgl_cuda.LIF and LeakyIntegrator, and the neurons of NIR: the same equations in other units.

    tau v' = v_leak - v + r x                                NIR's LIF and LI, time in seconds
    v[t] = v[t-1] + dt / tau (v_leak - v[t-1] + r x[t])      their Euler step of length dt
    h[t] = v_rest + decay (v[t-1] - v_rest) + g x[t]         asgl_cuda.LIF with input_gain g, and LeakyIntegrator

The last two are equal for decay = 1 - dt / tau, r = g tau / dt and v_leak = v_rest; for decay = 1, NIR's IF and I have
v' = r x and r = g / dt. Spikes of a LIF are invariant under scale and shift of its potential: v_threshold and v_reset
become (v_threshold - v_leak) / g and (v_reset - v_leak) / g, with g = 1 and v_leak = 0. A node is read in this scale,
and written with the gain in r and v_leak = 0, because other readers start potentials at 0. A LeakyIntegrator emits its
potential, and keeps gain and v_leak.

    tau_syn i' = -i + w_in x;   tau_mem v' = v_leak - v + r i      CubaLIF and CubaLI

are an LI and, with i[t] for x[t], a LIF or another LI: `nn.Sequential(LeakyIntegrator(...), LIF(...))`. A Threshold,
1 where x > threshold, is a LIF without memory: decay 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...integrator import LeakyIntegrator
from ...layer import Granularity
from ...neuron import LIF
from ...over_time import KNOWS_TIME
from .nodes import KEY
from .values import as_array, as_double, as_shape, first_line, range_of

DT = 1e-4  # seconds; other libraries assume the same step
_OF_BOTH = ("v_rest", "input_gain", "granularity", "stateful")
_OF_LIF = (
    "surrogate", "surrogate_gain", "analog_prob", "strict_threshold", "detach_reset", "multi_spike", "scale_output",
    "store_v_seq",
)  # fmt: skip
_PARAMETERS = ("log_width", "logit_decay", "threshold")  # unlike BatchNormLIF's
_MAYBE_OF_LIF = ("v_reset", "reset_amount", "v_min", "levels")
_OF_LIF_ALL = (*_OF_LIF, *_MAYBE_OF_LIF, "v_threshold", "width", "learn_width", "learn_threshold")


class Neurons(NamedTuple):
    """Neurons of NIR for a given dt, in units of asgl_cuda.LIF: float64, in the neurons' shape."""

    decay: Tensor
    v_threshold: Tensor
    v_reset: Tensor


class Scale(nn.Module):
    """NIR's Scale: the input times a constant of the shape of the neurons."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x_seq: Tensor) -> Tensor:
        return x_seq * self.scale


class Delay(nn.Module):
    """NIR's Delay: the input of as many time steps before, for all neurons or each; 0 at first."""

    steps: Tensor

    def __init__(self, steps: Tensor) -> None:
        super().__init__()
        self.register_buffer("steps", steps)

    def forward(self, x_seq: Tensor) -> Tensor:
        time = torch.arange(len(x_seq), device=x_seq.device).reshape(-1, *[1] * (x_seq.dim() - 1)) - self.steps
        return x_seq.gather(0, time.clamp(min=0).expand(x_seq.shape)).masked_fill(time < 0, 0.0)


KNOWS_TIME.append(lambda module: isinstance(module, Delay))


def _read_delay(node: Any, dt: float, where: str) -> Delay:
    delay = as_double(node.delay)
    steps = (delay / dt).round()
    if not ((delay >= 0) & ((delay - steps * dt).abs() < 1e-3 * dt)).all():
        raise ValueError(f"{where}: delay must be a whole number of steps, dt = {dt}, got {range_of(delay)}")
    return Delay(steps.long())


def _step(node: Any, dt: float, where: str, tau: str = "tau", r: str = "r") -> tuple[Tensor, Tensor]:
    """Decay and gain of the equations above; `write` has the inverse."""
    gain, time = as_double(getattr(node, r)), getattr(node, tau, None)
    if time is None:  # IF and I
        decay, gain = torch.ones_like(gain), gain * dt
    else:
        rate = dt / as_double(time)
        decay, gain = 1 - rate, gain * rate
        # tau = dt may have been rounded.
        decay = torch.where(decay.abs() < 1e-6, 0.0, decay)
        if not ((decay >= 0) & (decay <= 1)).all():
            raise ValueError(f"{where}: {tau} must be at least dt = {dt}, got {range_of(as_double(time))}")
    # r = tau / dt may have been rounded, which would change the threshold.
    return decay, torch.where((gain - 1).abs() < 1e-6, 1.0, gain)


def read_neurons(node: Any, dt: float, where: str, tau: str = "tau") -> Neurons:
    """The parameters of a firing node."""
    v_threshold, v_leak = as_double(node.v_threshold), as_double(getattr(node, "v_leak", 0.0))
    v_reset = as_double(0.0 if getattr(node, "v_reset", None) is None else node.v_reset)
    decay, gain = _step(node, dt, where, tau)
    if not (gain > 0).all():
        raise ValueError(f"{where}: r must be > 0, got {range_of(as_double(node.r))}")
    return Neurons(*torch.broadcast_tensors(decay, (v_threshold - v_leak) / gain, (v_reset - v_leak) / gain))


def per_neuron(layer: LIF | LeakyIntegrator, value: Tensor | float, shape: Sequence[int]) -> Tensor:
    """A parameter, broadcast from the granularity to the neurons' shape, float64."""
    value = as_double(value)
    if layer.granularity == "channel" and value.dim():
        value = value.reshape(-1, *[1] * (len(shape) - 1))
    return value.expand(tuple(shape))


def spike_height(layer: LIF) -> Tensor | float:
    """The factor of scale_output."""
    return layer.v_threshold if layer.levels is None or layer.multi_spike else 1 / layer.levels


def add_metadata(node: Any, layer: LIF | LeakyIntegrator, dt: float) -> Any:
    """Adds metadata to restore the layer in `read_node`; files support numbers, strings, arrays and dicts."""
    options = {"decay": layer._decay, "learn_decay": layer.logit_decay is not None}
    options |= {name: getattr(layer, name) for name in _OF_BOTH}
    ours: dict[str, Any] = {"dt": dt}
    if isinstance(layer, LIF):
        options |= {name: getattr(layer, f"_{name}") for name in ("v_threshold", "width")}
        options |= {name: getattr(layer, name) for name in _OF_LIF}
        options |= {"learn_width": layer.log_width is not None, "learn_threshold": layer.threshold is not None}
        options |= {name: value for name in _MAYBE_OF_LIF if (value := getattr(layer, name)) is not None}
        ours["reset"] = "soft" if layer.v_reset is None else "hard"
        ours["strict_threshold"] = layer.strict_threshold
        ours["width"] = as_array(torch.as_tensor(layer.width).reshape(-1))
    # A file can't compress scalars.
    parameters = {name: as_array(parameter.reshape(-1)) for name, parameter in layer.named_parameters()
                  if name in _PARAMETERS}  # fmt: skip
    ours |= {"options": options, "num_features": as_shape(layer.num_features), "parameters": parameters}
    node.metadata = {KEY: ours}
    return node


def read_node(node: Any, dt: float | None, where: str) -> nn.Module:
    """The layer that `to_nir` wrote, if the node has metadata; else layers from the node's values."""
    kind, ours = type(node).__name__, node.metadata.get(KEY)
    dt = dt if dt is not None else ours["dt"] if ours else DT
    if kind == "Delay":
        return _read_delay(node, dt, where)
    if kind == "Threshold":
        zero = torch.zeros_like(as_double(node.threshold))
        return new_lif(Neurons(zero, as_double(node.threshold), zero), where, strict_threshold=True)
    if kind.startswith("Cuba"):
        synapse = _new_integrators(*_step(node, dt, where, "tau_syn", "w_in"), torch.zeros(()), where)
        if kind == "CubaLIF":
            return nn.Sequential(*synapse, new_lif(read_neurons(node, dt, where, "tau_mem"), where))
        decay, gain = _step(node, dt, where, "tau_mem")
        return nn.Sequential(*synapse, *_new_integrators(decay, gain, as_double(node.v_leak), where))
    fires = kind in ("LIF", "IF")
    if fires:
        said = read_neurons(node, dt, where)._asdict()
    else:
        leak = as_double(getattr(node, "v_leak", 0.0))
        said = dict(zip(("decay", "input_gain", "v_rest"), (*_step(node, dt, where), leak), strict=True))
    if ours is None and fires:
        return new_lif(Neurons(**said), where)
    if ours is None:
        layers = _new_integrators(said["decay"], said["input_gain"], said["v_rest"], where)
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    layer: LIF | LeakyIntegrator = _written(ours, LIF if fires else LeakyIntegrator, where)
    for name, number in said.items():
        if name == "v_reset" and layer.v_reset is None:
            continue
        try:
            value = per_neuron(layer, getattr(layer, name), number.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{where}: metadata[{KEY!r}]['num_features'] must be the shape of its neurons, "
                f"{list(number.shape)}, got {list(layer.num_features)}"
            ) from error
        if name in ("v_threshold", "v_reset"):
            value = (value - layer.v_rest) / layer.input_gain
        if not torch.allclose(number, value, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"{where}: its numbers say {name} {range_of(number)} and metadata[{KEY!r}] says {range_of(value)}, "
                f"written with dt = {ours['dt']}; without metadata[{KEY!r}] the numbers alone are read"
            )
    return layer


def _written(ours: dict[str, Any], kind: type[Any], where: str) -> Any:
    """The layer with the given options and parameters."""
    options, known = dict(ours["options"]), {*_OF_BOTH, "decay", "learn_decay", *(_OF_LIF_ALL if kind is LIF else ())}
    if ours.get("reset") == "soft":
        options["v_reset"] = None
    try:
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown options {', '.join(unknown)}")
        layer = kind(ours["num_features"], **options)
        for name, value in ours["parameters"].items():
            parameter = layer.get_parameter(name)
            parameter.data = value.reshape(parameter.shape)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: metadata[{KEY!r}] can't be read ({first_line(error)}); without it the numbers alone are read"
        ) from error
    return layer


def new_lif(neurons: Neurons, where: str, strict_threshold: bool = False) -> LIF:
    """A layer whose decay and threshold are parameters without gradient where they differ between neurons."""
    decay, v_threshold, v_reset = neurons
    if v_reset.min() != v_reset.max():
        raise ValueError(f"{where}: v_reset must be the same for all neurons, got {range_of(v_reset)}")
    granularity, num_features, (decay, v_threshold) = _by_granularity(decay, v_threshold)
    layer = LIF(
        num_features,
        granularity=granularity,
        decay=float(decay.flatten()[0]),
        v_threshold=float(v_threshold.flatten()[0]),
        learn_decay=_varies(decay, where),
        learn_threshold=_varies(v_threshold),
        strict_threshold=strict_threshold,
    )
    layer.v_reset = float(v_reset.flatten()[0])  # a graph may have one above the threshold, which LIF refuses
    _fill(layer.logit_decay, decay.logit())
    _fill(layer.threshold, v_threshold)
    return layer


def _new_integrators(decay: Tensor, gain: Tensor, v_leak: Tensor, where: str) -> list[nn.Module]:
    """An integrator, behind a Scale if the gain differs between neurons."""
    if _varies(v_leak):
        raise ValueError(f"{where}: v_leak must be the same for all neurons, got {range_of(v_leak)}")
    first: list[nn.Module] = [Scale(gain)] if _varies(gain) else []
    granularity, num_features, (decay,) = _by_granularity(decay)
    layer = LeakyIntegrator(
        num_features,
        granularity=granularity,
        decay=float(decay.flatten()[0]),
        input_gain=1.0 if first else float(gain.flatten()[0]),
        v_rest=float(v_leak.flatten()[0]),
        learn_decay=_varies(decay, where),
    )
    _fill(layer.logit_decay, decay.logit())
    return [*first, layer]


def _by_granularity(*values: Tensor) -> tuple[Granularity, tuple[int, ...] | None, Sequence[Tensor]]:
    """The coarsest granularity for the values, num_features, and the values in that granularity's shape."""
    if not any(map(_varies, values)):
        return "layer", None, values
    shape = values[0].shape
    rows = torch.stack(values).flatten(2) if len(shape) > 1 else torch.stack(values)[..., None]
    if (rows == rows[..., :1]).all():  # [values, C, neurons of the channel]
        return "channel", tuple(shape[:1]), list(rows[..., 0])
    return "neuron", tuple(shape), values


def _varies(value: Tensor, decay_of: str = "") -> bool:
    """Whether neurons differ; a decay is a parameter then."""
    varies = bool(value.min() != value.max())
    if varies and decay_of and not ((value > 3.1e-7) & (value < 1 - 3.1e-7)).all():
        raise ValueError(f"{decay_of}: a decay that differs between neurons must be in (0, 1), got {range_of(value)}")
    return varies


def _fill(parameter: nn.Parameter | None, value: Tensor) -> None:
    """Fills and freezes a parameter that differs between neurons."""
    if parameter is not None:
        parameter.data = value.to(parameter.dtype, copy=True)
        parameter.requires_grad_(False)
