"""asgl_cuda.LIF and LeakyIntegrator, and the neurons of NIR: the same equations in other units.

    tau v' = v_leak - v + r x                                NIR's LIF and LI, time in seconds
    v[t] = v[t-1] + dt / tau (v_leak - v[t-1] + r x[t])      their Euler step of length dt
    h[t] = v_rest + decay (v[t-1] - v_rest) + g x[t]         asgl_cuda.LIF with input_gain g, and LeakyIntegrator

The last two are equal for decay = 1 - dt / tau, r = g tau / dt and v_leak = v_rest; for decay = 1, NIR's IF and I have
v' = r x and r = g / dt. Spikes of a LIF are invariant under scale and shift of its potential, and readers differ in r
and in the first potential. So a LIF is written with r = 1 and v_leak = 0, an IF with r = 1 / dt: v_threshold and
v_reset become (v - v_rest) (1 - decay) / g, or (v - v_rest) / g. Foreign nodes are read with g = 1 and v_rest = 0. A
LeakyIntegrator emits its potential, and keeps both.

    tau_syn i' = -i + w_in x;   tau_mem v' = v_leak - v + r i      CubaLIF and CubaLI

are an LI and, with i[t] for x[t], a LIF or another LI. A Threshold, 1 where x > threshold, is a LIF with decay 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_number, check_width
from ...neurons.leaky_integrator import LeakyIntegrator
from ...neurons.lif import LIF
from ...neurons.over_time import KNOWS_TIME, placement_advice

INSTALL = 'pip install "nir>=1.0.7" "nirtorch>=2.6"'  # as in pyproject.toml
KEY = "asgl_cuda"  # key in the metadata of nodes, for options that NIR does not have
DT = 1e-4  # seconds; other libraries assume the same step
RECURRENCE = "NIR does not say when a spike that returns to its neuron arrives"

# Arguments of layers that are not written into metadata. `delay` is a node of its own, and the others do not belong to
# the network.
_ELSEWHERE = {"time_dim", "backend", "device", "dtype", "delay"}
# Arguments that make a value learned, each with the parameter that it adds to the layer.
_LEARNED = {"learn_width": "log_width", "learn_decay": "logit_decay", "learn_threshold": "threshold"}


def import_and_check_dt(name: str, dt: Any, caller: str) -> Any:
    """Imports a module of nir or nirtorch, and checks the length of a step."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{caller}: needs {name.partition('.')[0]}: {INSTALL} ({error})") from error
    check_width(check_number("dt", dt, caller), caller, torch.float64, "dt")
    return module


@contextmanager
def prefixed_errors(where: str, remedy: str = "") -> Iterator[None]:
    """A context that turns errors of a layer or of torch into a ValueError: one line from `where` to `remedy`."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(where.partition(":")[0]):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{where}: {first}{remedy}") from error


def as_double(value: Any) -> Tensor:
    """A value of a NIR node or a layer as a float64 tensor on the CPU."""
    if torch.as_tensor(value).is_complex():  # torch would drop the imaginary part
        raise ValueError("must have real numbers, got complex ones")
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def as_nir_shape(sizes: Sequence[int]) -> Any:
    """Sizes in the type of NIR's graphs, an array of int64."""
    return torch.tensor(sizes, dtype=torch.int64).numpy()


def range_of(value: Tensor) -> str:
    """The smallest and the largest value, for errors."""
    low, high = float(value.min()), float(value.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def first_wrong(values: Tensor, is_wrong: Tensor) -> str:
    """The first value that is wrong, and its neuron, for errors."""
    index = is_wrong.expand(values.shape).nonzero()[0].tolist()
    return f"{values[tuple(index)].item():g}{f' for neuron {index}' if index else ''}"


def finite_value(node: Any, name: str) -> Tensor:
    """The values of this name of a NIR node, as by `as_double`; 0 without any. Refuses infinite values and NaN."""
    given = getattr(node, name, None)
    value = as_double(0.0 if given is None else given)
    if (is_wrong := ~value.isfinite()).any():
        raise ValueError(f"{name} must be finite, got {first_wrong(value, is_wrong)}")
    return value


class Scale(nn.Module):
    """NIR's Scale: the input times a constant of the shape of the neurons."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x_seq: Tensor) -> Tensor:
        """The input times the scale."""
        return x_seq * self.scale


class Delay(nn.Module):
    """NIR's Delay: the input of `steps` steps earlier, one number for all neurons or one per neuron; 0 at first."""

    steps: Tensor

    def __init__(self, steps: Tensor) -> None:
        super().__init__()
        self.register_buffer("steps", steps)

    def forward(self, x_seq: Tensor) -> Tensor:
        """The input of `self.steps` time steps earlier, neuron by neuron; 0 before the first step."""
        time = torch.arange(len(x_seq), device=x_seq.device).reshape(-1, *[1] * (x_seq.dim() - 1)) - self.steps
        return x_seq.gather(0, time.clamp(min=0).expand(x_seq.shape)).masked_fill(time < 0, 0.0)


KNOWS_TIME.append(lambda module: ("Delay", placement_advice("Delay(...)")) if isinstance(module, Delay) else None)


def per_neuron(layer: LIF | LeakyIntegrator, value: Tensor | float, shape: Sequence[int]) -> Tensor:
    """A parameter of the layer, expanded to one value per neuron, float64."""
    value = as_double(value)
    if layer.granularity == "channel" and value.dim():
        value = value.reshape(-1, *[1] * (len(shape) - 1))
    return value.expand(tuple(shape))


def constants_of_layer(layer: Any, shape: Sequence[int]) -> dict[str, Tensor]:
    """A layer's parameters by name, one value per neuron. Those of a LIF are scaled to input_gain 1 and v_rest 0."""
    numbers = {"decay": layer.decay, "input_gain": layer.input_gain, "v_rest": layer.v_rest}
    if isinstance(layer, LIF):
        v_reset = layer.v_rest if layer.v_reset is None else layer.v_reset
        numbers = {"decay": layer.decay, "v_threshold": layer.v_threshold, "v_reset": v_reset}
    numbers = {name: per_neuron(layer, value, shape) for name, value in numbers.items()}
    for name in numbers.keys() & {"v_threshold", "v_reset"}:
        numbers[name] = (numbers[name] - layer.v_rest) / layer.input_gain
    return numbers


def spike_heights(layer: LIF, shape: Sequence[int]) -> Tensor:
    """The height of a spike of each neuron: the factor of scale_output."""
    height = layer.v_threshold if layer.levels is None or layer.multi_spike else 1 / layer.levels
    return per_neuron(layer, height, shape)


def metadata_of(layer: LIF | LeakyIntegrator, dt: float) -> dict[str, Any]:
    """The metadata from which `layer_from_metadata` restores the layer, in types that NIR's files can store."""
    kind: Any = LIF if isinstance(layer, LIF) else LeakyIntegrator
    options: dict[str, Any] = {}
    for name in kind.__init__.__kwdefaults__.keys() - _ELSEWHERE:
        if name in _LEARNED:
            options[name] = getattr(layer, _LEARNED[name]) is not None
        elif (value := getattr(layer, f"_{name}", getattr(layer, name, None))) is not None:  # _name: as last set
            options[name] = as_double(value).numpy() if isinstance(value, Tensor) else value
    learned = {name: as_double(value).numpy() for name, value in layer.named_parameters() if name in _LEARNED.values()}
    ours = {"dt": dt, "options": options, "num_features": as_nir_shape(layer.num_features), "parameters": learned}
    if isinstance(layer, LIF):
        ours |= {"reset": "soft" if layer.v_reset is None else "hard", "strict_threshold": layer.strict_threshold}
        ours["width"] = as_double(layer.width).reshape(-1).numpy()
    return ours


def layer_from_metadata(ours: Any, kind: Any, said: dict[str, Tensor]) -> Any:
    """Restores a layer from the metadata of its node. They must agree with `said`, which follows from its numbers."""
    remedy = "; delete this entry of the metadata to read the numbers of the node alone"
    with prefixed_errors(f"metadata[{KEY!r}] can't be used", remedy):
        # A graph that was read from a file contains NumPy scalars, and arrays for values that differ between neurons.
        options = {
            name: as_double(value) if getattr(value, "ndim", 0) else value.item() if hasattr(value, "item") else value
            for name, value in ours["options"].items()
        }
        options |= {"v_reset": None} if ours.get("reset") == "soft" else {}
        layer = kind([int(size) for size in ours["num_features"]] or None, **options, dtype=torch.float64)
        layer.load_state_dict({name: as_double(value) for name, value in ours["parameters"].items()})
        for name, number in said.items():
            value = constants_of_layer(layer, number.shape)[name]
            if (differs := ~torch.isclose(number, value, rtol=1e-5, atol=1e-6)).any():
                one, other = (first_wrong(each, differs) for each in (number, value))
                scaled = ", both scaled to input_gain = 1 and v_rest = 0" * (kind is LIF and name != "decay")
                raise ValueError(f"{name} is {other} there, but {one} by the node, for dt = {ours['dt']}{scaled}")
    return layer


def decay_and_gain_of_node(node: Any, dt: float, tau: str = "tau", r: str = "r") -> tuple[Tensor, Tensor]:
    """Decay and gain per step of length dt. `tau` and `r` name the node's time constant, if any, and its resistance."""
    gain, time = finite_value(node, r), getattr(node, tau, None)
    if time is None:  # IF and I
        decay, gain = torch.ones_like(gain), gain * dt
    else:
        rate = dt / finite_value(node, tau)
        decay, gain = torch.where((rate - 1).abs() < 1e-6, 0.0, 1 - rate), gain * rate  # tau is dt, rounded
        if (is_wrong := ~((decay >= 0) & (decay <= 1))).any():
            hint = "if the graph was written for a shorter step, pass it as from_nir(graph, dt=...)"
            raise ValueError(f"{tau} must be at least dt = {dt}, got {first_wrong(as_double(time), is_wrong)}; {hint}")
    # r may be tau / dt, rounded in the file. The gain is then meant to be 1, and any other value would change the
    # threshold.
    return decay, torch.where((gain - 1).abs() < 1e-6, 1.0, gain)


def constants_of_node(node: Any, dt: float, tau: str = "tau") -> dict[str, Tensor]:
    """The parameters of a node that fires, by name, of one shape and in the units of `constants_of_layer`."""
    decay, gain = decay_and_gain_of_node(node, dt, tau)
    if (is_wrong := ~(gain > 0)).any():
        raise ValueError(f"r must be > 0, got {first_wrong(as_double(node.r).expand(gain.shape), is_wrong)}")
    v_threshold, v_reset, v_leak = (finite_value(node, name) for name in ("v_threshold", "v_reset", "v_leak"))
    found = torch.broadcast_tensors(decay, (v_threshold - v_leak) / gain, (v_reset - v_leak) / gain)
    return dict(zip(("decay", "v_threshold", "v_reset"), found, strict=True))


def integrator_of_node(node: Any, dt: float, tau: str = "tau", r: str = "r") -> nn.Module:
    """The LeakyIntegrator that computes a node, after a Scale if the gain differs between neurons.

    `tau` and `r` are the names of the node's attributes for time constant and gain. If the gain has another name than
    "r", the result is the synaptic current of the node, which rests at 0.
    """
    decay, gain = decay_and_gain_of_node(node, dt, tau, r)
    scales = bool((gain != gain.max()).any())
    rest = finite_value(node, "v_leak") if r == "r" else torch.zeros(())
    if rest.min() != rest.max():
        raise ValueError(
            "v_leak must be the same for all neurons, because it becomes v_rest of asgl_cuda.LeakyIntegrator, a single "
            f"number; got {range_of(rest)}"
        )
    numbers = {"decay": decay, "input_gain": torch.ones(()) if scales else gain, "v_rest": rest}
    layer = layer_with_constants(LeakyIntegrator, numbers)
    return nn.Sequential(Scale(gain), layer) if scales else layer


def layer_with_constants(kind: Any, numbers: dict[str, Tensor], **options: Any) -> Any:
    """A layer of class `kind` with these parameters, each as one number if its values are equal, else as a tensor."""
    values: dict[str, Any] = {name: float(value.flatten()[0]) for name, value in numbers.items()}
    for name, value in numbers.items():
        if value.min() == value.max():
            continue
        values[name] = value
        granularity = "channel" if value.dim() == 1 else "neuron"  # in a graph with images, one value per channel
        options |= {"granularity": granularity, "num_features": value.shape}
    return kind(**values, **options)
