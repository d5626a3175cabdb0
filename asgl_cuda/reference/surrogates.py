"""The surrogates: names, ids shared with the kernels, F and its slope f = F' in plain PyTorch, and their gradient.

Each F is a unit-width cumulative function, F(-inf) = 0 and F(inf) = 1; a neuron of width w uses H(u) = F(u / w).
Autograd differentiates F; `slope` serves code without autograd, such as Monitor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_modes import apply, is_exporting, is_forward_mode_active, is_transform_active

# A surrogate for multi_spike: laplace as a function of `periodic_distance`.
PERIODIC = "periodic_exponential"


class Surrogate(NamedTuple):
    """A surrogate: `id` is its value of `enum class Surrogate` in csrc."""

    id: int
    cumulative: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def clamped(y: Tensor, most: float) -> Tensor:
    """Clamps y to [0, most]. The slope at both ends is 1; that of torch.clamp differs between versions of torch."""
    return torch.where((y >= 0) & (y <= most), y, y.detach().clamp(0, most))


def _triangle_tail(y: Tensor) -> Tensor:
    """F(-y) of the triangle for y >= 0."""
    inside = (1 - y).clamp(min=0)
    return 0.5 * inside * inside  # as in csrc; the last digit of pow depends on the device


def _mirrored(tail: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """F(y) = tail(|y|) for y < 0, otherwise 1 - tail(|y|). Without abs(), whose slope at 0 is 0 in autograd."""

    def cumulative(y: Tensor) -> Tensor:
        """F for any y."""
        below = tail(torch.where(y < 0, -y, y))
        return torch.where(y < 0, below, 1 - below)

    return cumulative


SURROGATES: dict[str, Surrogate] = {
    "rectangle": Surrogate(0, lambda y: clamped(y + 0.5, 1), lambda y: (y.abs() <= 0.5).to(y)),
    "triangle": Surrogate(1, _mirrored(_triangle_tail), lambda y: (1 - y.abs()).clamp(min=0)),
    "sigmoid": Surrogate(2, torch.sigmoid, lambda y: torch.sigmoid(y) * torch.sigmoid(-y)),
    "arctan": Surrogate(
        3,
        lambda y: torch.atan(y * (math.pi / 2)) * (1 / math.pi) + 0.5,
        lambda y: 0.5 / (1 + (y * (math.pi / 2)) ** 2),
    ),
    "erf": Surrogate(4, lambda y: (1 + torch.erf(y)) * 0.5, lambda y: torch.exp(-y * y) * (1 / math.sqrt(math.pi))),
    # y / (2 (1 + |y|)) + 1/2, in a form valid at infinity.
    "fast_sigmoid": Surrogate(5, _mirrored(lambda y: 0.5 / (1 + y)), lambda y: 0.5 / (1 + y.abs()) ** 2),
    "laplace": Surrogate(6, _mirrored(lambda y: 0.5 * torch.exp(-y)), lambda y: 0.5 * torch.exp(-y.abs())),
}

# The id of the surrogate of levels, F(y) = clamp(y, 0, levels). It is Surrogate::kInteger in csrc, which follows all
# others.
INTEGER = len(SURROGATES)

# Names of surrogates in other libraries, in lower case without underscores, with the names here. The parameter alpha of
# these libraries is 1 / width.
ELSEWHERE = {
    "atan": "arctan",
    "piecewiseexp": "laplace",
    "piecewisequadratic": "triangle",
    "rect": "rectangle",
    "softsign": "fast_sigmoid",
}


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer types by size in bytes


class GradientOf(torch.autograd.Function):
    """The value of `s` with the gradient of `a` times `gain`. For gain 1: a + stop_gradient(s - a) without rounding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, a: Tensor, gain: float) -> Tensor:
        """A copy of s."""
        return s.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the gain."""
        ctx.gain = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        """The gradient of a; s has none."""
        return None, grad * ctx.gain, None


class GradientAndTangentOf(GradientOf):
    """`GradientOf` with a forward-mode derivative, which torch.compile can't trace."""

    @staticmethod
    def jvp(ctx: Any, s: Tensor | None, a: Tensor, gain: None) -> Any:
        """The tangent of the result from `a`, the tangent of a. That of s has no effect."""
        return a * ctx.gain


def with_gradient_of(s: Tensor, a: Tensor, gain: float = 1.0) -> Tensor:
    """The value of `s` with the gradient of `a` times `gain`: `GradientOf` in all modes of torch."""
    compiling = torch.compiler.is_compiling()
    if compiling and (is_transform_active() or is_forward_mode_active()):  # both ignore the gradient of Functions
        scaled = a * gain
        return s.detach() + (scaled - scaled.detach())
    if compiling and is_exporting():  # an exported graph has only forward of a Function
        scaled = a * gain
        nothing = scaled - detached(scaled)
        return detached(s) + torch.where(nothing == 0, nothing, 0.0)  # not NaN, if a is not finite
    result: Tensor = apply(GradientOf if compiling else GradientAndTangentOf, s, a, gain)
    return result


def detached(value: Tensor) -> Tensor:
    """The value without its gradient, as by detach(), also in exported graphs, whose decomposition drops detach()."""
    if not is_exporting():
        return value.detach()
    return value.view(_INTEGERS[value.element_size()]).view(value.dtype)


def periodic_distance(h: Tensor, v_threshold: Tensor) -> Tensor:
    """Below the threshold h - v_threshold, above it twice the distance from its nearest multiple, with slope 1."""
    u = h - v_threshold
    turns = h / v_threshold - 0.5
    above = v_threshold * (2 * (turns - turns.floor()) - 1)
    return with_gradient_of(torch.where(h < v_threshold, u, above).detach(), u)
