"""A normalisation in front of an addition: neither is computed before the neurons, which compute both.

`fuse` has seen in the graph that nothing but the addition, and nothing but the neurons behind, uses the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .converted import bare_class, version_of

_IN_PLACE = ("add_", "iadd", "__iadd__")
_ADDITIONS = ("add", "__add__", "__radd__", *_IN_PLACE)
_VIEWS = {"unflatten": "unflatten", "flatten": "flatten", "view": "reshape", "reshape": "reshape"}
_QUERIES = ("shape", "ndim", "dtype", "device", "size", "dim")


class Pending:
    """`norm(x)`, or `norm(x) + residual`; without `norm` a value, `x`.

    An addition that `asgl_cuda.batch_norm_lif` does not take, of other shapes or types or in place of the shortcut, is
    computed at once, as by the layers that were there.
    """

    def __init__(self, norm: Any, x: Tensor, residual: Tensor | None = None, shape: Sequence[int] = ()) -> None:
        self.norm, self.x, self.residual = norm, x, residual
        self._shape = shape or x.shape  # of the input of the normalisation
        self._versions = _versions(x, residual)
        self._has_graph = torch.is_grad_enabled()

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """The values of both, which must not have changed since the normalisation and the addition."""
        if self.norm is not None and torch.is_grad_enabled() and not self._has_graph:
            raise RuntimeError(
                f"asgl_cuda.fuse: {bare_class(self.norm).__name__} was called without gradients, by torch.no_grad or "
                "a reentrant checkpoint, and the neurons that compute it have gradients: asgl_cuda.unfuse takes the "
                "pair apart"
            )
        if self.norm is not None and self._versions != _versions(self.x, self.residual):
            raise RuntimeError(
                f"asgl_cuda.fuse: the input of {bare_class(self.norm).__name__}, or the shortcut added to its output, "
                "has been modified by an inplace operation before the neurons that compute both: asgl_cuda.unfuse "
                "takes the pair apart"
            )
        return self.x, self.residual

    def _computed(self) -> Tensor:
        x, residual = self.operands()
        if self.norm is None:
            return x
        y: Tensor = type(self.norm).original.forward(self.norm, x.reshape(self._shape)).reshape(x.shape)
        return y if residual is None else y + residual

    def _with(self, other: Any, alpha: float = 1, **more: Any) -> Pending | None:
        """The sum for the neurons, or None."""
        x, residual = self.operands()
        if self.norm is None or residual is not None or not isinstance(other, Tensor) or alpha != 1 or more:
            return None
        is_alike = (other.shape, other.dtype, other.device) == (x.shape, x.dtype, x.device)
        return Pending(self.norm, x, other, self._shape) if is_alike else None

    def add(self, other: Any, **alpha: float) -> Pending:
        made = self._with(other, **alpha)
        return _by_torch(torch.add, self, other, **alpha) if made is None else made

    def add_(self, other: Any, **alpha: float) -> Pending:
        made = self._with(other, **alpha)
        return _by_torch(Tensor.add_, self, other, **alpha) if made is None else made

    __add__ = __radd__ = add
    __iadd__ = add_

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Pending:
        name, kwargs = function.__name__, kwargs or {}
        first = next((each for each in args if isinstance(each, Pending)), None)
        if first is None:  # by keyword, or in a list
            first = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, Pending))
            first._refuse()
        if name in _VIEWS:
            return first._viewed(name, *args[1:], **kwargs)
        if name not in _ADDITIONS:
            first._refuse()
        # In place of the shortcut: others may read it.
        is_new = first is args[0] or name not in _IN_PLACE
        made = first._with(args[first is args[0]], **kwargs) if is_new else None
        return _by_torch(function, *args, **kwargs) if made is None else made

    def _viewed(self, name: str, *sizes: Any, **named: Any) -> Pending:
        x, residual = self.operands()
        residual = None if residual is None else getattr(residual, name)(*sizes, **named)
        return Pending(self.norm, getattr(x, name)(*sizes, **named), residual, self._shape)

    def __getattr__(self, name: str) -> Any:
        if name in _VIEWS:
            return partial(self._viewed, _VIEWS[name])
        if name in _QUERIES:
            return getattr(self.x, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    def _refuse(self, *others: Any) -> NoReturn:
        raise RuntimeError(
            f"asgl_cuda.fuse: the output of {bare_class(self.norm).__name__}, which the neurons behind an addition "
            "compute, is used otherwise than when it was fused: asgl_cuda.unfuse takes the pair apart"
        )

    __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = _refuse
    __rpow__ = __matmul__ = __rmatmul__ = __getitem__ = __setitem__ = __neg__ = __abs__ = __len__ = __bool__ = _refuse


def _by_torch(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Pending:
    """The addition, of values."""
    values = [each._computed() if isinstance(each, Pending) else each for each in args]
    return Pending(None, function(*values, **kwargs))


def _versions(*tensors: Tensor | None) -> list[int]:
    return [] if torch.compiler.is_compiling() else [version_of(each) for each in tensors if each is not None]
