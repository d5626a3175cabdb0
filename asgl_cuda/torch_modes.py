"""The modes of torch in which a call may run: compiled, exported, under torch.func, differentiated, in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_FORWARD_MODE = (
    "forward-mode differentiation was asked for, and the fused backends have only reverse mode; "
    "use backend='reference', which has both"
)


# Whether torch.export traces. torch 2.6 can't tell export from compile, and this is then True for both.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_forward_mode_active() -> bool:
    """Whether forward-mode differentiation is active, so that tensors may have tangents."""
    return forward_ad._current_level >= 0


# Whether a transform of torch.func is active.
is_transform_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_in_function_forward() -> bool:
    """Whether forward of a torch.autograd.Function runs. Unlike torch.no_grad, it also disables forward mode."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    return not torch._C._is_fwd_grad_enabled()


def is_in_backward() -> bool:
    """Whether backward is running, as when activation checkpointing computes forward again."""
    return torch._C._current_graph_task_id() != -1


def active_saved_tensor_hooks() -> Any:
    """The innermost hooks on saved tensors; None if there are none, and before torch 2.7, which does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None or torch.compiler.is_compiling() else top(False)


def current_checkpoint() -> Any:
    """An object that identifies the activation checkpoint that is running; None without one, or if reentrant."""
    hooks = active_saved_tensor_hooks()
    return hooks[0] if hooks and hooks[0].__module__ == "torch.utils.checkpoint" else None


def needs_zero_gradients() -> bool:
    """Whether autograd must pass zeros, not None, to backward for unused outputs: vmap of torch 2.6 rejects None."""
    return is_transform_active() and not torch.compiler.is_compiling()


def is_differentiated(tensors: Sequence[Tensor | None], caller: str) -> bool:
    """Whether autograd must record a call with these inputs.

    Raises RuntimeError in forward mode, which operators without a forward derivative would ignore silently.
    """
    if is_transform_active():
        # Under vmap, requires_grad of an input does not show whether an outer transform differentiates. So every call
        # counts as differentiated, except for compiled calls under no_grad.
        return torch.is_grad_enabled() or not torch.compiler.is_compiling()
    if is_forward_mode_active():
        refuse_tangents(tensors, caller)
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def refuse_tangents(tensors: Sequence[Tensor | None], caller: str) -> None:
    """Raises RuntimeError if a tensor has a tangent. Call it only if forward mode is active."""
    given = (tensor for tensor in tensors if tensor is not None)
    # The compiler does not see tangents, so compiled code refuses forward mode in any case.
    if torch.compiler.is_compiling() or any(forward_ad.unpack_dual(each).tangent is not None for each in given):
        raise RuntimeError(f"{caller}: {_FORWARD_MODE}")


# `_unbound(function).apply` is `function.apply` without binding the arguments to the signature of forward, which only
# torch.func and the compiler need. Binding takes 9 us. Without it, a call of `lif` that records a graph takes 12 us.
_unbound: Callable[[type[torch.autograd.Function]], Any] = partial(super, torch.autograd.Function)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)` in eager mode, under compilers and exporters, and under transforms of torch.func."""
    if torch.compiler.is_compiling():
        if is_exporting() and not is_transform_active():
            # The exported graph contains the operator, which has a derivative of its own (backends/derivatives.py).
            return function.forward(*arguments)
        # The compiler refuses a tensor that is passed twice, for example as v_threshold and as reset_amount.
        once = [
            each.view_as(each)
            if isinstance(each, Tensor) and any(each is other for other in arguments[:index])
            else each
            for index, each in enumerate(arguments)
        ]
        return function.apply(*once)
    if not is_transform_active():
        return _unbound(function).apply(*arguments)
    try:
        return function.apply(*arguments)
    except Exception as error:
        if any(each.key() == TransformType.Jvp for each in torch._C._functorch.get_interpreter_stack()):
            raise RuntimeError(f"asgl_cuda: {_FORWARD_MODE}") from error
        raise


@cache
def _single_level(function: type[torch.autograd.Function]) -> Any:
    """The function as a `_SingleLevelFunction`. torch.func of torch 2.15 intercepts calls of any autograd.Function."""
    members = {name: staticmethod(getattr(function, name)) for name in ("forward", "setup_context", "backward")}
    return type(function.__name__, (_SingleLevelFunction,), members)


def apply_at_one_level(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` for an operator's autograd kernel, which torch calls once per level of differentiation."""
    with enable_single_level_autograd_function():
        return _single_level(function).apply(*arguments)


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """ctx.saved_tensors. Read it once per backward: non-reentrant checkpointing refuses to unpack a tensor twice."""
    if torch.compiler.is_compiling():
        return ctx.saved_tensors  # type: ignore[no-any-return]
    try:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            f"{error} In asgl_cuda, a layer that carries its potential continues the graph of its earlier calls. If "
            "backward has already run for these, call asgl_cuda.reset(model) between sequences, or "
            "asgl_cuda.detach(model) to keep the potentials without their graph, for truncated backpropagation through "
            "time."
        ) from error


class _OnceDifferentiable(torch.autograd.Function):
    """Returns the first `count` tensors unchanged, as functions of all tensors whose derivative raises an error.

    torch's once_differentiable detaches gradients if only inputs, not incoming gradients, require grad: a gradient
    penalty would silently have no effect.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count] if tensor is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """Refuses a second derivative."""
        raise RuntimeError(
            "asgl_cuda: a second derivative was asked for, but fused kernels compute only the first; make neurons with "
            "backend='reference', and turn SpikeLinear and SpikeConv into torch's layers by asgl_cuda.from_spike_layers"
        )


def once_differentiable(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], apply: Callable[..., Any] = apply
) -> Sequence[Any]:
    """Gives the gradients a graph in which a second derivative raises an error."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    found = iter(apply(_OnceDifferentiable, len(gradients), *gradients, *inputs))
    return [None if each is None else next(found) for each in gradients]
