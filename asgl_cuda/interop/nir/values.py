"""Conversion of numbers, shapes and arrays between NIR and torch."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import check_number
from ...layout import real_type

_NEEDED = "nir 1.0.7 and nirtorch 2.6 or newer"  # as in pyproject.toml
INSTALL = 'pip install "nir>=1.0.7" "nirtorch>=2.6"'


def require(name: str, caller: str) -> Any:
    """Imports a module of nir or nirtorch."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{caller}: needs {_NEEDED}, got {installed()}: {INSTALL} ({error})") from error


def installed() -> str:
    """The versions of NIR's packages, for errors."""
    return " and ".join(f"{name} {_version(name)}" for name in ("nir", "nirtorch"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_dt(dt: float, caller: str) -> float:
    """The length of a step as a float, positive and finite."""
    dt = check_number("dt", dt, caller)
    if not 0 < dt < float("inf"):
        raise ValueError(f"{caller}: dt must be > 0 and finite, got {dt}")
    return dt


def as_array(value: Tensor) -> Any:
    return value.detach().to("cpu", real_type(value.dtype)).contiguous().numpy()


def as_double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def as_shape(sizes: Sequence[int]) -> Any:
    return torch.tensor(sizes, dtype=torch.int64).numpy()


def as_sizes(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in torch.as_tensor(value).reshape(-1))


def as_pair(value: Any) -> Any:
    """Two sizes; a single one is repeated."""
    sizes = as_sizes(value)
    return sizes * 2 if len(sizes) == 1 else sizes


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def range_of(value: Tensor) -> str:
    """The smallest and the largest value, for errors."""
    low, high = float(value.min()), float(value.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
