"""`Snapshot`: the basis of a conversion, compared with the layer at each call."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class Snapshot:
    """A spike function, its attributes, and other values of a layer.

    Tensors are compared by identity and version. Compiled graphs compare neither versions nor classes.
    """

    def __init__(self, function: Any, *others: Any) -> None:
        self.function, self.others = function, others
        names: list[str] = []
        if not isinstance(function, FunctionType):
            names += [name for name in getattr(function, "__dict__", ()) if name not in _MODULE_ATTRIBUTES]
        if isinstance(function, nn.Module):
            names += [name for name, _ in (*function.named_parameters(), *function.named_buffers())]
        self.names = tuple(names)
        self.values = self._values_of(function)
        # torch.compile can't compare classes.
        self.traced = tuple(index for index, value in enumerate(others) if not isinstance(value, type))
        held = captured(function)
        # Only closures with tensors are compared at each call.
        self.captured = held if any(isinstance(value, Tensor) for value in held) else []
        found = (*others, *self.values, *held)
        self.tensors = [value for value in found if isinstance(value, Tensor) and not value.is_inference()]
        self.versions = self._versions()
        self.size = -1  # number of the layer's attributes at the last check

    def holds(self, function: Any, *others: Any) -> bool:
        """Whether all are unchanged."""
        if function is not self.function and not (self.names and _is_kind_of(function, self.function)):
            return False
        values = self._values_of(function) if self.names else ()
        if torch.compiler.is_compiling():
            traced = [(others[index], self.others[index]) for index in self.traced]
            return _alike([*traced, *zip(values, self.values, strict=True)])
        if not all(map(operator.is_, others, self.others)) and not _alike(zip(others, self.others, strict=True)):
            return False
        if not all(map(operator.is_, values, self.values)) and not _alike(zip(values, self.values, strict=True)):
            return False
        if self.captured and not all(map(operator.is_, captured(function), self.captured)):
            return False
        return not self.tensors or self._versions() == self.versions

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self.tensors]

    def _values_of(self, function: Any) -> tuple[Any, ...]:
        return tuple([_attribute(function, name) for name in self.names])


def _is_kind_of(function: Any, other: Any) -> bool:
    """Whether the classes are equal; torch.export wraps shared modules in subclasses."""
    return type(function) is type(other) or (torch.compiler.is_compiling() and isinstance(function, type(other)))


def _attribute(function: Any, path: str) -> Any:
    if "." not in path:
        return getattr(function, path, None)
    for name in path.split("."):
        function = getattr(function, name, None)
    return function


def version_of(tensor: Tensor) -> int:
    """The number of writes to the tensor; not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def captured(function: Any) -> list[Any]:
    """The variables of a closure."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def _alike(pairs: Iterable[tuple[Any, Any]]) -> bool:
    for one, other in pairs:
        if one is not other and (isinstance(one, Tensor) or isinstance(other, Tensor) or not bool(one == other)):
            return False
    return True
