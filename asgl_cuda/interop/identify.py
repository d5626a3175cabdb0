"""`identify_spike_function` finds the surrogate of a library's spike function from its values and gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..reference.surrogates import SURROGATES

# Values of u / width at which the function's slope is compared with a surrogate's. u is the potential minus the
# threshold.
_PROBES = (0.05, 0.11, 0.23, 0.37, 0.61, 0.79, 0.93, 1.3, 1.9, 2.7, 4.1)
# If the slope is the same at all these values of u, it counts as constant. A rectangle of width FLAT contains all of
# them.
_BY_DECADE = tuple(sign * 10.0**power for power in range(-9, 18) for sign in (-1, 1))
# Values of u at which spikes are checked. There are many near the threshold, so that a function with random output does
# not pass by chance. Their mean is not 0, so that a function that compares u with the mean of its input does not pass.
_AROUND = (-1e3, *(-1e-9, 1e-9) * 32, 1e3, 1e3)
_FIRES = [float(u > 0) for u in _AROUND]
# The width of the rectangle that replaces a surrogate of constant slope. It is a power of two, so that gain and 1 /
# width are exact.
FLAT = 2.0**60
_NO_SPIKES = "its spike function emits something else than 0 below and 1 above the threshold"


class SpikeFunction(NamedTuple):
    """A spike function: 1 at u > 0 if `strict`, else at u >= 0, with the gradient `gain / width * f(u / width)`."""

    surrogate: str
    width: float
    gain: float
    strict: bool


def identify_spike_function(function: Callable[[Tensor], Tensor]) -> SpikeFunction | str:
    """The surrogate of asgl_cuda with the gradient of `function(u)`, u = h - v_threshold; or why there is none, a str.

    Width and gain follow from the peak and the half width of the slope. Then slopes are compared with the surrogate's
    on both sides of the threshold, to 1e-6 of the peak.
    """
    if _has_learned_values(function):
        return "its spike function has parameters that learn"
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return _match_surrogate(function) if _is_unit_step(function) else _NO_SPIKES
    except Exception as error:  # the function is the library's or the user's
        return f"its spike function fails with {type(error).__name__}: {error}"


def _has_learned_values(function: Any) -> bool:
    """Whether the function, or what its closure holds, has values that require a gradient."""
    values: list[Any] = []
    for held in (function, *closure_values(function)):
        values += held.parameters() if isinstance(held, nn.Module) else [held]
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def closure_values(function: Any) -> list[Any]:
    """The values of a function's closure variables."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def fires_strictly(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a spike function needs u > 0 to fire."""
    return not bool(function(torch.zeros(1, dtype=torch.float64)) > 0)


def spike_dtype(function: Any) -> torch.dtype | None:
    """The dtype of the spikes that the function returns; None if it is that of its argument, or if a call fails."""
    if not callable(function):
        return None
    try:
        dtype: torch.dtype = function(torch.zeros(1, dtype=torch.float64)).dtype
    except Exception:  # the function is the library's or the user's
        return None
    return None if dtype is torch.float64 else dtype


def is_spike_function(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether the function emits 0 below the threshold and 1 above, and has no parameter that learns.

    Its gradient does not matter, unlike in `identify_spike_function`. False if the function raises an error.
    """
    try:
        return not _has_learned_values(function) and _is_unit_step(function)
    except Exception:  # the function is the library's or the user's
        return False


def _is_unit_step(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether the function is 0 below the threshold and 1 above it, at all values in `_AROUND`."""
    return function(torch.tensor(_AROUND, dtype=torch.float64)).tolist() == _FIRES


def _match_surrogate(function: Callable[[Tensor], Tensor]) -> SpikeFunction | str:
    """The surrogate of asgl_cuda whose slope equals the function's gradient, or why there is none, a str."""
    leaf = torch.ones(1, dtype=torch.float64, requires_grad=True)
    if not function(leaf).requires_grad:
        return "its spike function has no gradient"
    peak, half = _peak_and_half_width(function)
    if not (math.isfinite(peak) and peak > 0):
        return f"its surrogate has the slope {peak:g} at the threshold, which must be finite and above 0"
    if math.isinf(half):
        if (_slopes(function, _BY_DECADE) == peak).all():
            return SpikeFunction("rectangle", FLAT, peak * FLAT, fires_strictly(function))
        return "the slope of its surrogate does not fall to 0"
    for name, (unit_peak, unit_half) in _unit_peaks_and_half_widths().items():
        width = half / unit_half
        u = [sign * probe * width for probe in _PROBES for sign in (-1, 1)]
        expected = _slopes(SURROGATES[name].cumulative, [value / width for value in u])
        if ((_slopes(function, u) / peak - expected / unit_peak).abs() < 1e-6).all():
            return SpikeFunction(name, width, peak * width / unit_peak, fires_strictly(function))
    name = getattr(function, "__qualname__", type(function).__name__)
    named = "" if "<lambda>" in name else f", {name.split('.')[0]},"
    return f"its surrogate{named} is not one that asgl_cuda has"


@functools.cache
def _unit_peaks_and_half_widths() -> dict[str, tuple[float, float]]:
    """`_peak_and_half_width` of each surrogate of asgl_cuda with the width 1."""
    return {name: _peak_and_half_width(surrogate.cumulative) for name, surrogate in SURROGATES.items()}


def _slopes(function: Callable[[Tensor], Tensor], u: Sequence[float]) -> Tensor:
    """The function's gradient at the points `u`."""
    with torch.enable_grad():
        leaf = torch.tensor(u, dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return slopes


def _peak_and_half_width(function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """The slope at the threshold, and the u at which it has fallen to half of that; infinity if none is below 1e4."""
    peak = float(_slopes(function, [1e-15]))  # at 0 itself some surrogates have another slope, or none
    grid: list[float] = [10 ** (power / 4) for power in range(-24, 17)]
    slopes = _slopes(function, grid).tolist()
    low, high = 0.0, next((u for u, slope in zip(grid, slopes, strict=True) if slope < peak / 2), math.inf)
    for _ in range(60 if high < math.inf else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if float(_slopes(function, [middle])) >= peak / 2 else (low, middle)
    return peak, high
