"""The results of checks, kept for calls of the same signature."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch.compiler import is_compiling

from ..checks import PLAIN_TENSORS
from ..layout import Features
from ..reference.learned import Logarithm, Logit

Checked = TypeVar("Checked")
Check = Callable[[str, Any, Any], Checked]

_MOST_PLANS = 1000
_LEARNED = (Logarithm, Logit)
_CONSTANTS = (float, int, bool, str, type(None), Features)


def cached_by_signature(names: Sequence[str]) -> Callable[[Check[Checked]], Check[Checked]]:
    """A decorator that caches the result of `check(caller, x_seq, given)` for calls of the same signature.

    The check may depend on the caller, on x_seq, and on the `given` arguments of these names. Of tensors, x_seq among
    them, it may use type, shape, dtype and device, but no values.
    """
    values_of = itemgetter(*names)

    @functools.lru_cache
    def split_by_type(types: tuple[type, ...]) -> tuple[list[int], Callable[[Any], Any]]:
        """The positions of tensors, and a getter of other arguments. Raises TypeError for types that can't be keys."""
        others = [index for index, kind in enumerate(types) if kind in _CONSTANTS]
        tensors = [index for index, kind in enumerate(types) if kind in (*PLAIN_TENSORS, *_LEARNED)]
        if len(others) + len(tensors) < len(types):
            raise TypeError
        return tensors, itemgetter(*others)

    def decorate(check: Check[Checked]) -> Check[Checked]:
        """Gives this check a cache of its own."""
        plans: dict[Any, Checked] = {}

        @functools.wraps(check)
        def cached(caller: str, x_seq: Any, given: Any) -> Checked:
            """The cached result; calls the check while compiling, and for arguments that can't be keys."""
            if is_compiling():
                return check(caller, x_seq, given)
            try:
                values = values_of(given)
                types = tuple(map(type, values))  # part of the key, because True == 1 == 1.0
                tensors, others_of = split_by_type(types)
                kinds = [_tensor_signature(values[index]) for index in tensors]
                key = (caller, _tensor_signature(x_seq), types, others_of(values), *kinds)
                plan = plans.get(key)
            except TypeError:
                return check(caller, x_seq, given)
            if plan is None:
                plan = check(caller, x_seq, given)
                if len(plans) >= _MOST_PLANS:
                    plans.clear()
                plans[key] = plan
            return plan

        return cached

    return decorate


def _tensor_signature(value: Any) -> Any:
    """Shape, dtype and device. Raises TypeError for a value of which a check may use more, such as a sparse tensor."""
    tensor = value.stored if isinstance(value, _LEARNED) else value
    if type(tensor) not in PLAIN_TENSORS or tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError
    return tensor.shape, tensor.dtype, tensor.device
