"""Learned values as layers store them: a width as its logarithm, a decay as its logit.

Kernels clamp and convert stored values at each read (csrc/math/learned.h), with this file's operations for equal bits.
Derivatives are those of torch's exp and sigmoid; beyond the bound, they stay at their values there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import real_type
from .surrogates import with_gradient_of

BOUND = 15.0  # kLearnedBound of csrc


class Logarithm(NamedTuple):
    """A learned width, passed as the argument `width`: its logarithm, as the layer stores it."""

    stored: Tensor

    def value(self) -> Tensor:
        """The width itself, with a gradient for the stored logarithm."""
        log = to_real_type(self.stored)
        return with_gradient_of(_exp_within_bound(log.detach()), _bounded(log).exp())


class Logit(NamedTuple):
    """A learned decay, passed as the argument `decay`: its logit, as the layer stores it."""

    stored: Tensor

    def value(self) -> Tensor:
        """The decay itself, with a gradient for the stored logit."""
        logit = to_real_type(self.stored)
        return with_gradient_of(1 / (1 + _exp_within_bound(-logit.detach())), _bounded(logit).sigmoid())


def to_real_type(value: Tensor) -> Tensor:
    """The value in the type of the arithmetic, `real_type` of its own type."""
    return value.to(real_type(value.dtype))


def _bounded(value: Tensor) -> Tensor:
    """Clamps a stored value with slope 1, so that no optimizer step makes exp 0 or infinite, or sigmoid 0 or 1."""
    return with_gradient_of(value.detach().clamp(-BOUND, BOUND), value)


class _Exp(NamedTuple):
    """The constants of e^x in one type: 1 / ln 2, ln 2 in two parts, and coefficients, the highest first."""

    inverse_ln2: float
    ln2: tuple[float, float]
    coefficients: tuple[float, ...]


_EXP = {
    torch.float32: _Exp(
        1.44269504,
        (0.693145752, 1.42860677e-06),
        tuple(map(float.fromhex, ("0x1.6ab88cp-10", "0x1.12346p-7", "0x1.5556ecp-5", "0x1.555492p-3", "0x1p-1"))),
    ),
    torch.float64: _Exp(
        1.4426950408889634,
        (6.93147180369123816490e-01, 1.90821492927058770002e-10),
        tuple(1 / math.factorial(k) for k in range(13, 1, -1)),
    ),
}


def _exp_within_bound(value: Tensor) -> Tensor:
    """e^x for x in [-BOUND, BOUND], with the bits of the kernels."""
    inverse_ln2, (high, low), coefficients = _EXP[value.dtype]
    x = value.clamp(-BOUND, BOUND)
    n = (x * inverse_ln2).round()
    r = (x - n * high) - n * low
    q = torch.full_like(r, coefficients[0])
    for coefficient in coefficients[1:]:
        q = q * r + coefficient
    return (1 + (r + (r * r) * q)) * _power_of_two(n)


def _power_of_two(n: Tensor) -> Tensor:
    """2^n for whole n in (-32, 32), by a shift: exp2 of a GPU is not exact, and DTensor can't view floats as ints."""
    power = torch.bitwise_left_shift(1, n.abs().to(torch.int64)).to(n.dtype)
    return torch.where(n < 0, 1 / power, power)
