"""`OverTime`, which applies a layer without time to a sequence, and refuses layers that have state over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..checks import format_type
from .base import NeuronLayer

_CALLER = "asgl_cuda.OverTime"


def placement_advice(layer: str, in_place: bool = False) -> str:
    """The end of an error: where to put `layer` instead. With `in_place`, `layer` is a form of it for sequences."""
    return f"{'in a form that takes [T, B, ...]:' if in_place else 'as in'} nn.Sequential(OverTime(...), {layer})"


def _describe_neurons(module: nn.Module) -> tuple[str, str] | None:
    """For a layer of neurons, the name of its class and the advice where to put it; None for other modules."""
    name = type(module).__name__
    return (name, placement_advice(f"{name}(...)")) if isinstance(module, NeuronLayer) else None


# Functions of a module. For a module with state over time, they return the name of its class and advice where to put
# it, and None for others. `interop` adds functions for other libraries.
KNOWS_TIME: list[Callable[[nn.Module], tuple[str, str] | None]] = [_describe_neurons]


class OverTime(nn.Module):
    """Applies a layer that takes no time dimension, such as a convolution, to all steps of a sequence at once.

    Args:
        layer: a module without a state over time, so without neurons. Pass several as an `nn.Sequential`. The module
            gets time and batch merged into one dimension.

    Shapes: `[T, B, ...]` to `[T, B, ...]`, or `[B, T, ...]` to `[B, T, ...]`. `layer` gets `[T * B, ...]`.

    Raises TypeError if `layer` is not a module, is one of torch's recurrent layers, or contains a layer with state over
    time, of asgl_cuda or of a library that `asgl_cuda.convert` knows. If a layer with state is added later, the next
    call in eager mode raises the error. A call raises TypeError if its input is not a tensor, and ValueError if its
    input has fewer than two dimensions. If `layer` is or begins with a convolution, `Linear`, `LayerNorm` or `RMSNorm`
    of torch, a call also raises ValueError for an input with fewer dimensions than this module needs.

    Example::

        model = nn.Sequential(asgl_cuda.OverTime(nn.Conv2d(1, 16, 3)), asgl_cuda.BatchNormLIF(16))
        s_seq = model(torch.randn(4, 32, 1, 8, 8))  # [T, B, 1, 8, 8] to [T, B, 16, 6, 6]

    The same in PyTorch::

        layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{_CALLER}: layer must be a torch.nn.Module, got {format_type(layer)}")
        _refuse_time_inside(layer)
        self.layer = layer

    def forward(self, x_seq: Tensor) -> Tensor:
        """The layer's output for all steps of `x_seq` `[T, B, ...]`, as `[T, B, ...]`."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            _check_sequence(x_seq, self.layer)
            if not torch.compiler.is_compiling():
                _refuse_time_inside(self.layer)
        return self.layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])  # type: ignore[no-any-return]


def _check_sequence(x_seq: Any, layer: nn.Module) -> None:
    """Refuses an input without time and batch, or with fewer dimensions than the samples of the first layer have."""
    if isinstance(x_seq, fx.Proxy):
        return
    if not hasattr(type(x_seq), "__torch_function__"):  # placeholders of tensors have it as well
        raise TypeError(f"{_CALLER}: x_seq must be a tensor, got {type(x_seq).__name__}")
    if x_seq.is_nested or x_seq.dim() < 2:
        got = "a nested tensor" if x_seq.is_nested else f"shape {list(x_seq.shape)}"
        raise ValueError(f"{_CALLER}: x_seq must have time and batch, [T, B, ...], got {got}")
    name, sizes = _describe_first_layer(layer)
    if x_seq.dim() < 2 + len(sizes):
        hint = "; x_seq.unsqueeze(1) adds a batch of size 1, x_seq.unsqueeze(0) a single time step"
        raise ValueError(
            f"{_CALLER}: x_seq must be [T, B, {', '.join(sizes)}] for {name}, got shape {list(x_seq.shape)}"
            f"{hint if x_seq.dim() == 1 + len(sizes) else ''}"
        )


def _describe_first_layer(layer: nn.Module) -> tuple[str, Sequence[str]]:
    """The class of the first layer, and the sizes of its samples if it would take time or batch for one of them."""
    while type(layer).forward is nn.Sequential.forward and layer._modules:
        layer = next(layer.children())
    sizes: Sequence[str] = ()
    hooked = layer._forward_pre_hooks and not isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    if hooked or not type(layer).forward.__module__.startswith(("torch.nn.", "asgl_cuda.spikes.")):
        return type(layer).__name__, sizes  # such a layer may add a dimension itself
    if isinstance(layer, nn.modules.conv._ConvNd):  # a convolution would take time and batch for channels
        sizes = f"{layer.in_channels or 'C'}", *("L", "HW", "DHW")[len(layer.kernel_size) - 1]
    elif isinstance(layer, nn.Linear):  # a linear layer would take them for features
        sizes = (f"{layer.in_features or 'N'}",)
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        sizes = [f"{size}" for size in layer.normalized_shape]
    return type(layer).__name__, sizes


_timeless: set[type[nn.Module]] = set()  # classes that were found to have no state over time


def _refuse_time_inside(layer: nn.Module) -> None:
    """Refuses a layer that contains one with state over time. Takes 0.2 us per module; modules() would take 0.7."""
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):  # inside another module it may not run over time
        remedy = "put it outside of OverTime"
        if isinstance(layer, nn.RNNCellBase):  # outside it would take the steps for its batch, or refuse them
            remedy = "call it in a loop over the steps, or put torch.nn.RNN, LSTM or GRU outside of OverTime instead"
        raise TypeError(
            f"{_CALLER}: layer must not use time, got {type(layer).__name__}, which would get time and batch merged; "
            f"{remedy}"
        )
    found, modules = {layer}, [layer]
    for module in modules:  # the loop appends to it
        if type(module) not in _timeless:
            if found_by := next((each for knows in KNOWS_TIME if (each := knows(module))), None):
                path = next(path for path, each in layer.named_modules() if each is module)
                (name, outside), at = found_by, f" at {path!r}" if path else ""
                raise TypeError(
                    f"{_CALLER}: layer must not use time, got {name}{at}, which would get time and batch merged; put "
                    f"it outside, {outside}"
                )
            _timeless.add(type(module))
        for child in module._modules.values():
            if child is not None and child not in found:
                found.add(child)
                modules.append(child)
