"""Kernels of the operators for tensors with lazy values: dispatch keys Negative and ZeroTensor.

torch's fallbacks ignore tensors in a `Tensor?[]` and support one mutated argument only. These kernels run only for lazy
tensors and cost other calls nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# The negative bit, as of the imaginary part of a conjugate, and zeros without memory, as in derivatives.
LAZY_KEYS = ("Negative", "ZeroTensor")


def on_memory(operator: Any) -> Callable[..., Any]:
    """The operator on materialised copies; mutated arguments are copied back."""
    changes = [each.alias_info is not None and each.alias_info.is_write for each in operator._schema.arguments]

    def kernel(*arguments: Any) -> Any:
        given = pytree.tree_map_only(Tensor, _with_memory, arguments)
        result = operator(*given)
        for argument, copy, changed in zip(arguments, given, changes, strict=True):
            if changed and copy is not argument:
                argument.copy_(copy)
        return result

    return kernel


def _with_memory(tensor: Tensor) -> Tensor:
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg()
