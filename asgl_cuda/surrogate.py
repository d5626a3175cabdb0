"""The surrogates: names, ids shared with the kernels, and F in plain PyTorch.

Each F is a unit-width cumulative function, F(-inf) = 0 and F(inf) = 1; a neuron of width w uses H(u) = F(u / w).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """A surrogate: `id` is its value of `enum class Surrogate` in csrc."""

    id: int
    cumulative: Callable[[Tensor], Tensor]


def _rectangle(y: Tensor) -> Tensor:
    ramp = y + 0.5
    # torch's versions differ in the gradient of clamp at its edges, where it is 1 here.
    return torch.where((ramp >= 0) & (ramp <= 1), ramp, ramp.detach().clamp(0, 1))


def _triangle(y: Tensor) -> Tensor:
    inside = torch.where(y < 0, y + 1, 1 - y).clamp(min=0)
    tail = 0.5 * inside * inside
    return torch.where(y < 0, tail, 1 - tail)


def _arctan(y: Tensor) -> Tensor:
    return torch.atan(y * (math.pi / 2)) * (1 / math.pi) + 0.5


def _erf(y: Tensor) -> Tensor:
    return (1 + torch.erf(y)) * 0.5


# The next two do without abs(), to which autograd gives the slope 0 at 0, where these surrogates are steepest.


def _fast_sigmoid(y: Tensor) -> Tensor:
    # y / (2 (1 + |y|)) + 1/2, in the form that is right at infinity, too.
    tail = 0.5 / (1 + torch.where(y < 0, -y, y))
    return torch.where(y < 0, tail, 1 - tail)


def _laplace(y: Tensor) -> Tensor:
    tail = 0.5 * torch.exp(-torch.where(y < 0, -y, y))
    return torch.where(y < 0, tail, 1 - tail)


SURROGATES: dict[str, Surrogate] = {
    "rectangle": Surrogate(0, _rectangle),
    "triangle": Surrogate(1, _triangle),
    "sigmoid": Surrogate(2, torch.sigmoid),
    "arctan": Surrogate(3, _arctan),
    "erf": Surrogate(4, _erf),
    "fast_sigmoid": Surrogate(5, _fast_sigmoid),
    "laplace": Surrogate(6, _laplace),
}
