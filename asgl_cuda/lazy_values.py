"""The operators on tensors whose values are other than their memory says, by kernels for the dispatcher's keys.

The dispatcher's own kernels for them see neither the tensors in a `Tensor?[]` nor more than one that is changed. Those
here run where there is such a tensor, and cost nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Their dispatch keys: the negative bit, of the imaginary part of a conjugate, and zeros without memory, of derivatives.
LAZY_KEYS = ("Negative", "ZeroTensor")


def on_memory(operator: Any) -> Callable[..., Any]:
    """The operator, given copies whose memory has the values; what it changes is changed in the tensors themselves."""
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
