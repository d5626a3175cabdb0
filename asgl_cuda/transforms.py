"""How autograd functions are called such that torch.func and forward mode see them, and noise under vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

_FORWARD_MODE = (
    "forward-mode differentiation was asked for, and the fused backends have reverse mode alone; "
    "backend='reference' has both"
)


def transforming() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def is_differentiated(tensors: Sequence[Tensor | None], caller: str) -> bool:
    """Whether autograd must see a call with these inputs.

    Raises RuntimeError in forward mode, which an operator without a forward derivative would pass over in silence.
    """
    if transforming():
        # An input that is mapped does not tell whether it is differentiated further out.
        return torch.is_grad_enabled() or not torch.compiler.is_compiling()
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        given = (tensor for tensor in tensors if tensor is not None)
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
            raise RuntimeError(f"{caller}: {_FORWARD_MODE}")
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`.

    That binds the arguments to the signature of forward, which takes longer than all the rest, and which only
    torch.func and the compiler need.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if not transforming():
        return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
    try:
        return function.apply(*arguments)
    except Exception as error:
        if any(each.key() == TransformType.Jvp for each in torch._C._functorch.get_interpreter_stack()):
            raise RuntimeError(f"asgl_cuda: {_FORWARD_MODE}") from error
        raise


def draw_under_transforms(device: torch.device, generator: torch.Generator | None, together: bool) -> Tensor:
    """A random rng_state by the rules of vmap's `randomness`.

    Where every vmap wants different numbers for each sample, and with `together`, it is `[1, 2]`, one for all samples:
    the first dimension tells the batching rules that the neurons of all samples are numbered in one row.
    """
    from torch._functorch.pyfunctorch import (
        VmapInterpreter,
        retrieve_all_functorch_interpreters,
        temporarily_clear_interpreter_stack,
    )

    maps = [each for each in retrieve_all_functorch_interpreters() if isinstance(each, VmapInterpreter)]
    if together and maps and all(each.randomness() == "different" for each in maps):
        with temporarily_clear_interpreter_stack():
            return torch.randint(2**63 - 1, (1, 2), generator=generator, device=device)
    return torch.randint(2**63 - 1, (2,), generator=generator, device=device)
