"""Autograd of operators in exported graphs and torch.ops. Files in neurons/ and spikes/ register the derivatives.

| who differentiates | by |
|---|---|
| eager mode, torch.func | the function, around pybind11 functions that call the operator below autograd |
| torch.compile | the same, traced around torch.ops |
| a graph of torch.export, torch.ops | the operator's `autograd_kernel`, which looks the function up in DERIVATIVES |
| a backward operator | nobody: a second derivative raises an error |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_modes import apply_at_one_level, is_forward_mode_active, once_differentiable, refuse_tangents

Derivative = Callable[..., Any]
# By the name of an operator, a function that calls the operator so that autograd can differentiate the results. The
# function takes the operator, a callable that runs the operator without its autograd kernel, and the arguments.
# Operators that are not in this dict have no derivative.
DERIVATIVES: dict[str, Derivative] = {}


def autograd_kernel(operator: Any, name: str) -> Callable[..., Any]:
    """The operator's autograd kernel; csrc/ops/autograd.h is a faster one for calls without gradients."""

    def kernel(keyset: Any, *arguments: Any) -> Any:
        """Calls the operator, with its derivative if a tensor requires a gradient."""
        tensors = tensors_in(arguments)
        if is_forward_mode_active():
            refuse_tangents(tensors, f"asgl_cuda.{name}")

        enabled = torch.is_grad_enabled()

        def below(*arguments: Any) -> Any:
            """The operator without its autograd kernel."""
            # A derivative calls this in forward of a torch.autograd.Function, which disables gradients. An outer
            # transform of torch.func needs the grad mode of the caller.
            with torch.set_grad_enabled(enabled), torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

        if not enabled or not any(each.requires_grad for each in tensors):
            return below(*arguments)
        derivative: Derivative = DERIVATIVES.get(name, _call_without_derivative)
        return derivative(operator, below, *arguments)

    return kernel


def _call_without_derivative(operator: Any, below: Callable[..., Any], *arguments: Any) -> Any:
    """Calls an operator that has no derivative. A backward pass through its results raises an error."""
    results = below(*arguments)
    if isinstance(results, Tensor):
        return once_differentiable((results,), tensors_in(arguments), apply_at_one_level)[0]
    return type(results)(once_differentiable(results, tensors_in(arguments), apply_at_one_level))


def tensors_in(arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The tensors among the arguments."""
    return tuple(each for each in arguments if isinstance(each, Tensor))
