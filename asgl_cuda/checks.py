"""Checks of arguments: errors name the caller, the expected and the given value."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from .layout import Features, real_type, state_shape
from .reference.learned import Logarithm, Logit
from .reference.records import DRAWS
from .reference.surrogates import ELSEWHERE, PERIODIC, SURROGATES

HALF_TYPES = (torch.float16, torch.bfloat16)
PLAIN_TENSORS = (Tensor, Parameter)
FLOATING_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FLOATING = "float16, bfloat16, float32 or float64"


def format_type(value: Any) -> str:
    """The type of a value for errors. If the value is a class instead of an instance, the text says so, with advice."""
    return f"the class {value.__name__}; pass an instance" if isinstance(value, type) else type(value).__name__


def check_tensor(name: str, value: Any, caller: str) -> None:
    """Refuses all but tensors."""
    if not isinstance(value, Tensor):
        kind, hint = type(value).__name__, ""
        if kind == "list" and value and all(isinstance(each, Tensor) for each in value):
            hint = f"; torch.stack({name}) joins its tensors"
        elif kind == "ndarray":
            hint = f"; torch.tensor({name}) converts it"
        raise TypeError(f"{caller}: {name} must be a tensor, got {kind}{hint}")


def _conversion_hint(name: str, value: Tensor) -> str:
    """Suffix of an error for a tensor of another type: how to convert it; "" for complex numbers."""
    return "" if value.is_complex() else f"; convert it by {name}.float()"


def check_input(x_seq: Tensor, time_dim: int, caller: str, name: str = "x_seq") -> int:
    """Refuses inputs of the wrong type or shape; returns time_dim, made non-negative."""
    check_tensor(name, x_seq, caller)
    check_dense(name, x_seq, caller)
    if x_seq.dtype not in FLOATING_TYPES:
        hint = _conversion_hint(name, x_seq)
        raise TypeError(f"{caller}: {name} must be {_FLOATING}, got {x_seq.dtype}{hint}")
    dims = x_seq.dim()
    if dims < 1:
        raise ValueError(f"{caller}: {name} must have at least one dimension, got a scalar")
    time_dim = check_int("time_dim", time_dim, caller)
    if not -dims <= time_dim < dims:
        raise ValueError(
            f"{caller}: time_dim must be in [{-dims}, {dims - 1}] for {name} of shape {list(x_seq.shape)}, "
            f"got {format_value(time_dim)}{'; is time or the batch missing?' if time_dim in (dims, -dims - 1) else ''}"
        )
    time_dim %= dims
    if x_seq.shape[time_dim] == 0:
        raise ValueError(
            f"{caller}: {name} must have at least one time step, got shape {list(x_seq.shape)} with time_dim {time_dim}"
        )
    return time_dim


def check_step(x_t: Any, time_dim: int, caller: str) -> None:
    """Refuses all but tensors of one time step, without time, that have enough dimensions to add time at `time_dim`."""
    check_tensor("x_t", x_t, caller)
    check_dense("x_t", x_t, caller)
    if not -x_t.dim() - 1 <= time_dim <= x_t.dim():
        raise ValueError(
            f"{caller}: x_t is one step without time and must have at least "
            f"{format_value(max(time_dim, -time_dim - 1))} dimensions for time_dim {format_value(time_dim)}, got shape "
            f"{list(x_t.shape)}"
        )


def describe_shape_mismatch(x_seq: Tensor, time_dim: int, features: Features) -> str:
    """The end of an error, after "x_seq must have": the expected and the given shape. time_dim is not negative."""
    sizes, missing = list(features.sizes), "time or the batch"
    if features.by_channel:
        names, note = ["B", "C", "..."], f" with C = {sizes[0]}"
        without_time = list(x_seq.shape[1:2]) == sizes
    else:
        names, note = ["B", *map(str, sizes)], ""
        without_time = list(x_seq.shape[-len(sizes) :]) == sizes
        if time_dim == 0:  # time stays there in batches of any number of dimensions
            optional = features.least_batch == 0
            note = f" (B may be {'missing or ' if optional else ''}several dimensions)"
            missing = "time" if optional else missing
    names.insert(min(time_dim, len(names)), "T")
    question = f"; is {missing} missing?" if without_time else ""
    return f"shape [{', '.join(names)}]{note}, got {list(x_seq.shape)}{question}"


def check_dense(name: str, value: Tensor, caller: str) -> None:
    """Refuses all but strided tensors in the memory of this process."""
    if value.is_nested or value.layout is not torch.strided:
        kind, remedy = f"one of layout {value.layout}", f"{name}.to_dense() converts it"
        if value.is_nested:
            kind, remedy = "a nested tensor", f"torch.nested.to_padded_tensor({name}, 0.0) pads it"
        raise TypeError(f"{caller}: {name} must be a dense tensor, got {kind}; {remedy}")
    if hasattr(value, "to_local"):
        raise TypeError(
            f"{caller}: {name} must be a local tensor, got a {type(value).__name__}; pass {name}.full_tensor(), or "
            f"{name}.to_local() if only the batch is sharded. With to_local(), a batch normalisation in training needs "
            "process_group"
        )


def format_value(value: Any) -> str:
    """Any value as text for errors, short and on one line; a tensor as its shape."""
    try:
        if isinstance(value, Tensor) and value.dim() > 0:
            return f"a tensor of shape {list(value.shape)}"
        text = " ".join((f"{value}" if isinstance(value, Tensor) else repr(value)).split())
    except Exception:  # repr raises for ints beyond 4300 digits, and may raise for a user's class
        text = type(value).__name__
    return text if len(text) <= 100 else f"{text[:97]}..."


_NEAR = 0.75  # ratio of difflib for one letter changed, added or moved in a short name; gpu and cpu have 0.67


def did_you_mean(given: Any, names: Iterable[str]) -> str:
    """Suffix of an error for an unknown name: the nearest of `names`, if any."""
    near = difflib.get_close_matches(given.lower(), names, n=1, cutoff=_NEAR) if isinstance(given, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def check_name(name: str, value: Any, names: Iterable[str], caller: str, hint: str = "", otherwise: str = "") -> None:
    """Refuses a value that is none of `names`. The error ends with `hint`, or the nearest name, or `otherwise`."""
    names = tuple(names)
    if not isinstance(value, str) or value not in names:
        hint = hint or did_you_mean(value, names) or otherwise
        raise ValueError(f"{caller}: {name} must be one of {', '.join(names)}, got {format_value(value)}{hint}")


# Hints for arguments of other libraries' neurons. A key has the argument's name there, and the argument of asgl_cuda
# that takes its place. If a name has several hints, the error has the first one whose argument of asgl_cuda is accepted
# by the function or layer that was called.
_ELSEWHERE = {
    ("tau", "decay"): "SpikingJelly's tau{value} is {decay} and divides the input by tau{gain}",
    ("init_tau", "decay"): "SpikingJelly's init_tau{value} is {decay} and divides the input by tau{gain}",
    ("surrogate_function", "surrogate"): "SpikingJelly's ATan(alpha) is surrogate='arctan', width=1 / alpha",
    ("beta", "decay"): "snnTorch's beta{value} is decay{value}",
    ("alpha", "syn_decay"): "snnTorch's alpha{value} is syn_decay{value}, SpikingJelly's alpha is width=1 / alpha",
    ("alpha", "width"): (
        "snnTorch's alpha{value} is the decay of a LeakyIntegrator before the layer, SpikingJelly's alpha is "
        "width=1 / alpha"
    ),
    ("alpha", "decay"): "snnTorch's alpha{value} is decay{value}",
    ("input_size", "recurrent"): (
        "for inputs of another size put torch.nn.Linear(input_size, hidden_size) before the layer"
    ),
    ("num_layers", "recurrent"): "for several layers put several RecurrentLIF into a torch.nn.Sequential",
    ("learn_beta", "learn_decay"): "snnTorch's learn_beta is learn_decay",
    ("threshold", "v_threshold"): "snnTorch's threshold{value} is v_threshold{value}, strict_threshold=True",
    ("reset_mechanism", "v_reset"): "snnTorch's 'subtract' is v_reset=None, 'zero' is v_reset=0",
    ("spike_grad", "surrogate"): "snnTorch's atan(alpha) is surrogate='arctan', width=1 / alpha",
    ("slope", "surrogate"): (
        "snnTorch's fast_sigmoid(slope) is surrogate='fast_sigmoid', width=1 / slope, surrogate_gain=2 / slope"
    ),
    ("init_hidden", "stateful"): "asgl_cuda.step(model, x_t) carries states from step to step",
    ("tau_mem_inv", "decay"): (
        "Norse's tau_mem_inv is decay=1 - dt * tau_mem_inv and multiplies the input by dt * tau_mem_inv"
    ),
    ("v_th", "v_threshold"): "Norse's v_th{value} is v_threshold{value}, strict_threshold=True",
    ("tau_syn", "syn_decay"): (
        "sinabs' tau_syn is syn_decay=exp(-1 / tau_syn) and multiplies input, weight and bias by syn_decay"
    ),
    ("tau_syn", "width"): (
        "sinabs' tau_syn is decay=exp(-1 / tau_syn) of a LeakyIntegrator before the layer, and multiplies its input by "
        "decay"
    ),
    ("tau_syn", "decay"): "sinabs' tau_syn is decay=exp(-1 / tau_syn) and multiplies the input by decay",
    ("v_leak", "v_rest"): "Norse's v_leak{value} is v_rest{value}",
    ("tau_mem", "decay"): "sinabs' tau_mem is decay=exp(-1 / tau_mem) and multiplies the input by 1 - decay",
    ("spike_threshold", "v_threshold"): "sinabs' spike_threshold{value} is v_threshold{value}",
    ("min_v_mem", "v_min"): "sinabs' min_v_mem{value} is v_min{value}",
    ("batch_first", "time_dim"): "batch_first=True of torch.nn.RNN is time_dim=1",
    ("step_mode", "stateful"): "layer(x_seq) computes as in SpikingJelly's step mode 'm', layer.step(x_t) as in 's'",
    ("step_mode", "time_dim"): "x_seq has all time steps, as in SpikingJelly's step mode 'm'",
}


_DECAYS = {"alpha", "beta"}  # the hint only repeats values in [0, 1], because others are no decays


def _hint_for_other_library(name: str, given: Any, known: Collection[str]) -> str:
    """Suffix of an error for an argument of another library: what replaces it in asgl_cuda; "" if nothing does."""
    text = next((text for (theirs, ours), text in _ELSEWHERE.items() if theirs == name and ours in known), "")
    if not text:
        return ""
    gain = next((f", as {each}=1 / tau does" for each in ("input_scale", "input_gain") if each in known), "")
    value, decay = "", "decay=1 - 1 / tau"
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if is_number and (name not in _DECAYS or 0 <= given <= 1):
        value = f"={format_value(given)}"
        if 1 <= given < math.inf:
            decay, gain = f"decay={1 - 1 / given:g}", gain.replace("1 / tau", f"{1 / given:g}")
    return f"; {text.format(value=value, decay=decay, gain=gain)}"


def check_keywords(
    given: Mapping[str, Any], known: Collection[str], caller: str, lacking: Collection[str] = ()
) -> None:
    """Refuses unknown keyword arguments. Those in `lacking` are options of `lif` and `LIF`, as the error then says."""
    for name, value in given.items():
        if name not in known:
            is_theirs = any(theirs == name for theirs, _ in _ELSEWHERE)  # and so no misspelling
            hint = _hint_for_other_library(name, value, known) if is_theirs else did_you_mean(name, known)
            hint = ", an option of asgl_cuda.lif or LIF that these neurons do not have" if name in lacking else hint
            raise TypeError(f"{caller}: got an unexpected keyword argument {name!r}{hint}")


def check_reset_and_surrogate(given: Mapping[str, Any], caller: str, levels: int | None, multi_spike: bool) -> None:
    """Refuses a reset or a surrogate that other options exclude. levels and multi_spike have been checked before."""
    v_reset, surrogate = given["v_reset"], given["surrogate"]
    if given["reset_amount"] is not None and v_reset is not None:
        raise ValueError(
            f"{caller}: reset_amount is for the soft reset and needs v_reset=None, got v_reset {format_value(v_reset)}"
        )
    check_surrogate(surrogate, caller, multi_spike)
    if levels is None or multi_spike:
        return
    if v_reset is not None:
        raise ValueError(
            f"{caller}: levels is for the soft reset and needs v_reset=None, got v_reset {format_value(v_reset)}"
        )
    if surrogate not in ("sigmoid", "rectangle"):  # the default, and the surrogate that clamps
        raise ValueError(
            f"{caller}: levels has its own surrogate, a clamp of potentials, and takes no other, got "
            f"{format_value(surrogate)}; leave out surrogate"
        )


def check_surrogate(surrogate: Any, caller: str, multi_spike: bool = False) -> None:
    """Refuses all but the names in SURROGATES and, with multi_spike, PERIODIC."""
    ours = ELSEWHERE.get(surrogate.lower().replace("_", "")) if isinstance(surrogate, str) else None
    hint = f"; did you mean {ours}, with width=1 / alpha?" if ours else ""
    if callable(surrogate):
        hint = f"; pass a name: {_ELSEWHERE['slope', 'surrogate']}, and {_ELSEWHERE['surrogate_function', 'surrogate']}"
    if isinstance(surrogate, str) and surrogate == PERIODIC and not multi_spike:
        raise ValueError(
            f"{caller}: surrogate {PERIODIC!r} needs multi_spike=True, which only LIF, BatchNormLIF and their "
            f"functions take; the surrogates without multi_spike are {', '.join(SURROGATES)}"
        )
    check_name("surrogate", surrogate, (*SURROGATES, PERIODIC) if multi_spike else SURROGATES, caller, hint)


def check_multi_spike(v_reset: Any, analog_prob: Any, caller: str) -> None:
    """Refuses a hard reset and noise, which multi_spike excludes."""
    if v_reset is not None:
        raise ValueError(
            f"{caller}: multi_spike is for the soft reset and needs v_reset=None, got v_reset {format_value(v_reset)}"
        )
    if isinstance(analog_prob, Tensor) or check_number("analog_prob", analog_prob, caller) != 0:
        got = " as a number, got a tensor" if isinstance(analog_prob, Tensor) else f", got {format_value(analog_prob)}"
        raise ValueError(
            f"{caller}: multi_spike needs analog_prob=0{got}; with noise some elements emit a smooth value instead of "
            "spikes, and none is defined for several spikes"
        )


MOST_LEVELS = 256  # bfloat16 represents all integers up to this


def check_levels(name: str, value: Any, caller: str) -> int:
    """The largest number of spikes per step as an int. Refuses values outside of [1, MOST_LEVELS]."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= MOST_LEVELS:
        raise ValueError(f"{caller}: {name} must be an int in [1, {MOST_LEVELS}], got {format_value(value)}")
    return int(value)


def check_positive_threshold(value: Any, option: str, caller: str) -> None:
    """Refuses thresholds <= 0, which `option` excludes. Reads a tensor only if it `has_readable_values`."""
    if isinstance(value, Tensor):
        if not has_readable_values(value) or bool((value.detach() > 0).all()):
            return
        value = torch.aminmax(value.detach()).min.item()
    if not value > 0:
        raise ValueError(f"{caller}: {option} needs v_threshold > 0, got {value}")


_LEAST_WIDTH = {real: math.sqrt(torch.finfo(real).tiny) for real in (torch.float32, torch.float64)}


def check_width(width: float, caller: str, real: torch.dtype = torch.float32, name: str = "width") -> None:
    """Refuses all but positive widths for which 1 / width^2, a factor of the gradient, is finite in the type `real`."""
    least = _LEAST_WIDTH[real]
    if not least <= width < math.inf:
        expected = "> 0" if not width > 0 else "finite" if width > 1 else f">= {least} in {real}"
        raise ValueError(f"{caller}: {name} must be {expected}, got {width}")


def check_width_tensor(width: Tensor, caller: str, name: str = "width") -> None:
    """`check_width` for all values of a tensor. Does nothing unless the tensor `has_readable_values`."""
    if has_readable_values(width):
        ends = (width,) if width.numel() == 1 else torch.aminmax(width.detach())
        for value in ends:
            number = value.item()
            if not _LEAST_WIDTH[width.dtype] <= number < math.inf:
                check_width(number, caller, width.dtype, name)


def has_readable_values(value: Tensor) -> bool:
    """Whether values can be read: without synchronising a GPU, not while compiling, not transformed by torch.func."""
    return (
        type(value) in PLAIN_TENSORS
        and value.is_cpu
        and value.numel() > 0
        and not is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def check_number(name: str, value: Any, caller: str, expected: str = "a float") -> float:
    """The value as a float. Refuses all but numbers of Python and numpy."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"{caller}: {name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{caller}: {name} must be {expected}, got a number beyond the range of a float") from None


def read_number(name: str, value: Any, caller: str, learned: bool = False, option: str = "") -> float:
    """A layer's constant as a float, also from a tensor or array of one value.

    A tensor that requires a gradient is refused, because constants are not trained, unless it initialises a `learned`
    parameter. `option` names the argument that makes the value learned.
    """
    if isinstance(value, Tensor):
        value = _checked_first_value(name, value, caller, learned, option)
    elif getattr(value, "size", None) == 1 and hasattr(value, "item"):  # a NumPy array or scalar
        value = value.item()
    return check_number(name, value, caller)


_GRANULARITIES = "granularity 'channel' or 'neuron' takes a value for each channel or neuron"


def read_values(
    name: str, value: Any, caller: str, shape: Sequence[int], learned: bool = False, option: str = ""
) -> Tensor | float:
    """A layer's constant: a float as by `read_number`, or from a tensor of this shape a copy in `real_type`."""
    if not isinstance(value, Tensor):
        is_array = hasattr(value, "__array__") and isinstance(getattr(value, "size", None), int)
        if isinstance(value, (list, tuple)) or (is_array and value.size != 1):
            several = not shape and len(value) != 1
            hint = _GRANULARITIES if several else f"torch.as_tensor({name}) makes a tensor of it"
            raise TypeError(f"{caller}: {name} must be {_describe_constant(shape)}, got {type(value).__name__}; {hint}")
        return read_number(name, value, caller, learned, option)
    if value.numel() == 1:
        return read_number(name, value, caller, learned, option)
    _checked_first_value(name, value, caller, learned, option, shape)
    return value.detach().to(real_type(value.dtype), copy=True)


def min_and_max(value: Tensor | float) -> tuple[float, float]:
    """The least and the largest of the values; NaN if a value is NaN."""
    if not isinstance(value, Tensor):
        return value, value
    least, most = torch.aminmax(value)
    return least.item(), most.item()


def _checked_first_value(
    name: str, value: Tensor, caller: str, learned: bool, option: str, shape: Sequence[int] | None = None
) -> Any:
    """Checks that a tensor has one value or this shape and may be a layer's constant. Returns its first value."""
    check_dense(name, value, caller)
    expected = f"{caller}: {name} must be {_describe_constant(shape)}"
    if value.numel() != 1 and (not shape or value.shape != tuple(shape)):
        hint = "" if shape is None or shape else f"; {_GRANULARITIES}"
        raise ValueError(f"{expected}, got a tensor of shape {list(value.shape)}{hint}")
    if value.dtype is torch.bool or value.is_complex():
        raise TypeError(f"{expected}, got {value.dtype}")
    if value.requires_grad and not learned:
        remedy = f"set {option}=True to learn it, or " if option else ""
        raise ValueError(
            f"{caller}: {name} is a constant and would not be trained, got a tensor that requires a "
            f"gradient; {remedy}pass {name}.{'item()' if value.numel() == 1 else 'detach()'} for a constant"
        )
    try:
        return value.flatten()[0].item()
    except Exception:  # tensors without values, as in traces, raise various types
        raise ValueError(f"{expected}, got a tensor on {value.device} whose values can't be read") from None


def _describe_constant(shape: Sequence[int] | None) -> str:
    """What a layer's constant may be, in words for errors."""
    return f"a float or a tensor of one value{f', or of shape {list(shape)}' if shape else ''}"


def read_finite(name: str, value: Any, caller: str) -> float:
    """A layer's constant as by `read_number`, which must be finite."""
    return check_finite(name, read_number(name, value, caller), caller)


def check_int(name: str, value: Any, caller: str) -> int:
    """The value as an int. Refuses all but ints of Python and numpy."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{caller}: {name} must be an int, got {type(value).__name__}")
    return int(value)


def check_not_nan(name: str, value: Any, caller: str, expected: str = "a float") -> float:
    """The value as a float. Refuses NaN."""
    number = value if type(value) is float else check_number(name, value, caller, expected)
    if number != number:  # torch.compile cannot trace math.isnan of a dynamic float
        raise ValueError(f"{caller}: {name} must be a number, got nan")
    return number


def accept_none(check: Callable[..., Any]) -> Callable[..., Any]:
    """Turns the check of a value into one that also accepts None."""
    return lambda name, value, caller: None if value is None else check(name, value, caller)


def require_range(
    check: Callable[..., float], expected: str, least: float, most: float = math.inf
) -> Callable[..., float]:
    """Turns the check of a number into one that also requires [least, most], which `expected` states in words."""

    def checked(name: str, value: Any, caller: str) -> float:
        """The number, after both checks."""
        number = check(name, value, caller)
        if not least <= number <= most:
            raise ValueError(f"{caller}: {name} must be {expected}, got {number}")
        return number

    return checked


def check_options(given: Any, checks: Mapping[str, Callable[..., Any]], caller: str) -> dict[str, Any]:
    """Checks the options that are in `checks`. Returns by name what each `check(name, value, caller)` returns."""
    return {name: check(name, given[name], caller) for name, check in checks.items()}


def check_features(features: Features, x_seq: Tensor, time_dim: int, caller: str) -> None:
    """Refuses inputs without the dimensions of a layer's `features`, even if all its parameters are floats."""
    sizes = [x_seq.shape[dim] for dim in features.dims(x_seq, time_dim)]
    if sizes != list(features.sizes) or x_seq.dim() < 1 + features.least_batch + len(sizes):
        raise ValueError(
            f"{caller}: for granularity {'channel' if features.by_channel else 'neuron'!r}, num_features "
            f"{list(features.sizes)} and time_dim {time_dim}, x_seq must have "
            + describe_shape_mismatch(x_seq, time_dim, features)
        )


def check_parameters(
    given: Any, names: Iterable[str], x_seq: Tensor, caller: str, features: Features | None = None
) -> dict[str, float | None]:
    """Checks parameters of neurons, floats or tensors. Returns the floats by name, and None for each tensor.

    Tensors must broadcast against x_seq, or have the sizes of `features`, which `check_features` has checked.
    """
    constants: dict[str, float | None] = {}
    for name in names:
        value = given[name]
        tensor = value.stored if isinstance(value, (Logarithm, Logit)) else value
        if isinstance(tensor, Tensor):
            if features is None or tensor.shape != features.sizes:
                check_parameter(name, tensor, x_seq, caller)
            else:
                check_floating(name, tensor, x_seq, caller)
            constants[name] = None
        else:
            check = check_number if name == "width" else check_not_nan
            constants[name] = check(name, value, caller, "a float or a tensor")
    return constants


def check_device(name: str, value: Tensor, x_seq: Tensor, caller: str) -> None:
    """Refuses tensors on another device than x_seq."""
    if value.device != x_seq.device:
        raise ValueError(f"{caller}: {name} must be on {x_seq.device} as x_seq, got {value.device}")


def check_floating(name: str, value: Any, x_seq: Tensor, caller: str) -> None:
    """Refuses all but dense tensors of a floating type on the device of x_seq."""
    check_tensor(name, value, caller)
    check_dense(name, value, caller)
    if value.dtype not in FLOATING_TYPES:
        hint = _conversion_hint(name, value)
        raise TypeError(f"{caller}: {name} must be {_FLOATING}, got {value.dtype}{hint}")
    check_device(name, value, x_seq, caller)


def check_parameter(name: str, value: Tensor, x_seq: Tensor, caller: str) -> None:
    """As `check_floating`; also refuses shapes that do not broadcast to the shape of x_seq."""
    check_floating(name, value, x_seq, caller)
    extra = x_seq.dim() - value.dim()
    if extra < 0 or any(size != 1 and size != x_seq.shape[extra + dim] for dim, size in enumerate(value.shape)):
        raise ValueError(
            f"{caller}: {name} must broadcast to the shape of x_seq, {list(x_seq.shape)}, got shape {list(value.shape)}"
        )


def check_initial_state(v_init: Tensor, x_seq: Tensor, time_dim: int, caller: str, name: str = "v_init") -> None:
    """As `check_floating`; also refuses shapes other than that of x_seq without time. time_dim is not negative."""
    if isinstance(v_init, (int, float)):
        value = f"torch.full_like(x_seq[{':, ' * time_dim}0], {format_value(v_init)})"
        raise TypeError(f"{caller}: {name} must be a tensor, got {type(v_init).__name__}; use {value}")
    check_floating(name, v_init, x_seq, caller)
    shape = state_shape(x_seq, time_dim)
    if v_init.shape != torch.Size(shape):
        raise ValueError(f"{caller}: {name} must have shape {shape}, got {list(v_init.shape)}")


def check_residual(residual: Any, x_seq: Tensor, caller: str) -> None:
    """Refuses residuals of another shape, type or device than x_seq."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"{caller}: residual must be a tensor or None, got {type(residual).__name__}")
    check_dense("residual", residual, caller)
    if residual.shape != x_seq.shape:
        extra = x_seq.dim() - residual.dim()
        fits = extra >= 0 and all(size in (1, x_seq.shape[extra + dim]) for dim, size in enumerate(residual.shape))
        state = "; if it is a state, pass none to a layer, and v_init to a function" * (extra == 1)
        raise ValueError(
            f"{caller}: residual must have x_seq's shape {list(x_seq.shape)}, got {list(residual.shape)}"
            f"{state}{'; residual.expand_as(x_seq) broadcasts it' if fits else ''}"
        )
    if residual.dtype != x_seq.dtype:
        raise TypeError(
            f"{caller}: residual must have x_seq's type {x_seq.dtype}, got {residual.dtype}; residual.to(x_seq.dtype) "
            "converts it"
        )
    check_device("residual", residual, x_seq, caller)


def check_analog_prob(analog_prob: float, caller: str) -> int:
    """Checks that analog_prob is in [0, 1]; returns the limit for draws, round(analog_prob * DRAWS)."""
    return round(require_range(check_number, "in [0, 1]", 0, 1)("analog_prob", analog_prob, caller) * DRAWS)


def check_analog_prob_tensor(analog_prob: Tensor, x_seq: Tensor, caller: str) -> Tensor:
    """Checks analog_prob, a tensor of one value on the device of x_seq; returns the limit for draws, int64 `[1]`.

    A value that can't be read (`has_readable_values`) is not checked but clamped to [0, 1].
    """
    check_dense("analog_prob", analog_prob, caller)
    if analog_prob.dtype not in FLOATING_TYPES or analog_prob.numel() != 1:
        raise TypeError(
            f"{caller}: analog_prob must be a float or a floating-point tensor of one value, got a tensor of shape "
            f"{list(analog_prob.shape)} and type {analog_prob.dtype}"
        )
    check_device("analog_prob", analog_prob, x_seq, caller)
    if has_readable_values(analog_prob):
        check_analog_prob(analog_prob.item(), caller)
    return (analog_prob.detach().double() * DRAWS).round().clamp(0, DRAWS).to(torch.int64).reshape(1)


def check_rng_state(rng_state: Tensor, x_seq: Tensor, caller: str) -> None:
    """Refuses all but int64 tensors of shape [2] on the device of x_seq."""
    if not isinstance(rng_state, Tensor):
        raise TypeError(f"{caller}: rng_state must be an int64 tensor of shape [2], got {type(rng_state).__name__}")
    check_dense("rng_state", rng_state, caller)
    if rng_state.dtype != torch.int64:
        raise TypeError(f"{caller}: rng_state must be of type torch.int64, got {rng_state.dtype}")
    if rng_state.shape != (2,):
        raise ValueError(f"{caller}: rng_state must have shape [2], got {list(rng_state.shape)}")
    check_device("rng_state", rng_state, x_seq, caller)


def check_generator(generator: Any, x_seq: Tensor, caller: str) -> None:
    """Refuses generators of another device than x_seq's."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{caller}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != x_seq.device.type:
        raise ValueError(f"{caller}: generator must be on {x_seq.device} as x_seq, got {generator.device}")


def check_finite(name: str, value: Any, caller: str, expected: str = "a float") -> float:
    """The value as a float. Refuses NaN and infinite values."""
    number = check_number(name, value, caller, expected)
    if not -math.inf < number < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{caller}: {name} must be finite, got {number}")
    return number


def check_bool(name: str, value: Any, caller: str) -> bool:
    """The value as a bool. Refuses all but bools of Python and numpy."""
    if isinstance(value, bool):
        return value
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.bool_):
        raise TypeError(f"{caller}: {name} must be a bool, got {type(value).__name__}")
    return bool(value)


def arguments_of(example: Any) -> tuple[Any, ...]:
    """The positional arguments of a call: a tuple has them, anything else, also a named tuple, is the only one."""
    return example if type(example) is tuple else (example,)


def raise_explained(error: Exception, expected: str, given: Sequence[Any], when: str = "", hint: str = "") -> NoReturn:
    """Raises a ValueError for an error of the user's model, which says what was `expected` and what was given.

    Raises an error of asgl_cuda, which says that itself, or of memory again as it is.
    """
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, torch.OutOfMemoryError) or first.startswith("asgl_cuda."):
        raise error
    got = ", ".join(format_value(each) if isinstance(each, Tensor) else f"a {type(each).__name__}" for each in given)
    got = got or "no arguments"
    raise ValueError(
        f"{expected}, got {got}, with which the model raises{when} {type(error).__name__}: {first}{hint}"
    ) from error


def describe_array(name: str, value: Any) -> str:
    """For errors that expect ints, an array or tensor of them with the advice to call tolist(); "" for other values."""
    if getattr(value, "ndim", 2) > 1 or "int" not in str(getattr(value, "dtype", "")):
        return ""
    return f"{type(value).__name__}; {name}.tolist() converts it"


def check_sizes(name: str, value: Any, caller: str) -> tuple[int, ...]:
    """The value as a tuple of ints. Refuses all but a positive int or a sequence of positive ints."""
    sizes = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
    if any(isinstance(size, bool) or not isinstance(size, (int, Integral)) for size in sizes):
        got = describe_array(name, value) or format_value(value)
        raise TypeError(f"{caller}: {name} must be an int or a sequence of ints, got {got}")
    if not all(1 <= size < 2**63 for size in sizes):
        raise ValueError(f"{caller}: {name} must be positive and less than 2^63, got {format_value(value)}")
    return tuple(map(int, sizes))


def check_device_and_dtype(device: Any, dtype: Any, caller: str) -> None:
    """Refuses all but a device, its name or its index, and a floating type. None means the default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATING_TYPES):
        raise TypeError(
            f"{caller}: dtype must be float16, bfloat16, float32, float64 or None, got {format_value(dtype)}"
        )
    if device is None or isinstance(device, torch.device):
        return
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"{caller}: device must be a torch.device, its name or its index, got {type(device).__name__}")
    try:
        torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{caller}: device must be a torch.device, its name or its index, got {format_value(device)} ({said})"
        ) from None


_warned: set[str] = set()
# Packages whose frames are skipped in the search for the user's line that caused a warning.
_NOT_THE_USERS = ("asgl_cuda", "torch", "spikingjelly", "snntorch", "norse", "sinabs")


def warn_once(key: str, message: str) -> None:
    """Warns at the user's line, once per process for each `key`."""
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, stacklevel=user_stacklevel())


def user_stacklevel() -> int:
    """The `stacklevel` with which a warning by the calling function shows a line of the user's code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    return level
