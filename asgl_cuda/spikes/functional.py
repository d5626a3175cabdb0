"""Linear maps and convolutions of spikes, as functions.

The reference of a product is torch's own operator, which also computes what the kernels do not: see `has_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn import functional
from torch.overrides import has_torch_function

from ..backends import choose_backend, extension
from ..backends.derivatives import DERIVATIVES
from ..checks import check_dense, check_tensor
from ..neurons.deferred import tensor_of
from ..torch_modes import (
    apply,
    apply_at_one_level,
    is_differentiated,
    is_forward_mode_active,
    is_transform_active,
    once_differentiable,
    saved_tensors,
)

_TYPES = torch.float32, torch.float64


class _Operators(NamedTuple):
    """The operators of backends/ops.py for products of spikes."""

    spike_product: Callable[..., Tensor]
    spike_weight_gradient: Callable[..., Tensor]


_operators = _Operators(*(getattr(torch.ops.asgl_cuda, name).default for name in _Operators._fields))
_found: list[Any] = [getattr(extension.module, name, None) for name in _Operators._fields]
_direct = None if None in _found else _Operators(*_found)


def _operators_of(inputs: Sequence[Any]) -> _Operators:
    """As `backends.operators_of`: those of torch.ops if a compiler, function mode or subclass must see the call."""
    if torch.compiler.is_compiling() or _direct is None or has_torch_function(inputs):
        return _operators
    return _direct


def _pack_spikes(
    x: Tensor, weight_sizes: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor | None:
    """Packs x for backward: one bit per element, then the non-zero values, unless all of these are 1.

    None if the operators are to pack x, because in compiled or transformed code sizes must not depend on values.
    """
    if torch.compiler.is_compiling() or is_transform_active() or type(x) is not Tensor or not x.is_cpu:
        return None
    return extension.module.pack_spikes(x, weight_sizes, stride, padding)  # type: ignore[union-attr,no-any-return]


class SpikeProductFunction(torch.autograd.Function):
    """spike_product as a differentiable function of x, weight and bias.

    Takes an operator, or None for the one that is called directly.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        """The product."""
        if operator is None:
            operator = _operators_of((x, weight, *others)).spike_product
        return operator(x, weight, *others)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves x, packed if that takes less memory, for the gradient of weight, and weight for that of x."""
        _, x, weight, _, _, ctx.stride, ctx.padding, packed = inputs
        _, wants_x, wants_weight, *_ = ctx.needs_input_grad
        ctx.x_shape, ctx.x_format = x.shape, suggest_memory_format(x)
        ctx.is_packed = packed is not None and packed.nbytes < x.nbytes
        ctx.weight_shape = weight.shape
        ctx.channels_last = suggest_memory_format(weight) is torch.channels_last
        kept = packed if ctx.is_packed else x
        ctx.save_for_backward(kept if wants_weight else None, weight if wants_x else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradients of x by torch's operators, of weight by spike_weight_gradient, and of bias by a sum."""
        x, weight = saved_tensors(ctx)
        saved = x, weight, grad
        packed = x if ctx.is_packed else None
        if x is None or ctx.is_packed:
            # An empty tensor serves: only the sizes and the layout of x matter here.
            x = torch.empty(ctx.x_shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.x_format)
        _, wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        stride, padding, is_linear = ctx.stride, ctx.padding, len(ctx.weight_shape) == 2
        grad_x = grad_weight = grad_bias = None
        if wants_x and is_linear:
            grad_x = grad @ weight
        elif wants_x:
            ones, zeros = [1] * len(stride), [0] * len(stride)
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, ones, False, zeros, 1, [True, False, False]
            )
        if wants_weight:
            gradient = _operators_of((grad, x)).spike_weight_gradient
            grad_weight = gradient(grad, x, ctx.weight_shape, stride, padding, ctx.channels_last, packed)
        if wants_bias:
            others = range(grad.dim() - 1) if is_linear else (0, *range(2, grad.dim()))
            grad_bias = grad.sum(list(others)) if grad.dim() > 1 else grad
        return None, *once_differentiable((grad_x, grad_weight, grad_bias), saved), None, None, None, None


def _with_derivative(operator: Any, below: Any, *arguments: Any) -> Tensor:
    """Computes spike_product by `below`, its kernel below autograd, with SpikeProductFunction as its derivative.

    The signature is that of the functions in `DERIVATIVES`; `operator` is not needed.
    """
    return apply_at_one_level(SpikeProductFunction, below, *arguments)  # type: ignore[no-any-return]


DERIVATIVES["spike_product"] = _with_derivative


def has_kernel(x: Tensor, weight: Tensor, caller: str) -> bool:
    """Whether the kernels, which skip zeros, can compute the product; otherwise torch's own operator must.

    Raises TypeError if one of them is not a tensor, or if the weight is of a floating type and x of an integer type or
    bool. Does not check shapes.
    """
    check_tensor("input", x, caller)
    check_tensor("weight", weight, caller)
    dtype = x.dtype
    if weight.is_floating_point() and not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{caller}: input must have the dtype of weight, {weight.dtype}, got {dtype}; convert it by "
            "input.to(weight.dtype)"
        )
    return (
        dtype in _TYPES
        and weight.dtype is dtype
        and x.is_cpu
        and weight.is_cpu
        and x.layout is weight.layout is torch.strided
        and not (x.is_nested or is_forward_mode_active() or torch.is_autocast_enabled("cpu"))
        and choose_backend(None, x.device, caller) == "cpu"
    )


def product_by_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    caller: str = "",
) -> Tensor:
    """Computes a linear map or, if `weight` has more than two dimensions, a convolution by the kernels.

    `panels` is the weight in the kernels' order, if the caller has it.
    """
    if bias is not None:
        _check_bias(bias, x, weight, caller)
    arguments = x, weight, bias, panels, stride, padding
    if is_differentiated((x, weight, bias), caller):
        packed = _pack_spikes(x, weight.shape, stride, padding) if weight.requires_grad else None
        return apply(SpikeProductFunction, None, *arguments, packed)  # type: ignore[no-any-return]
    return _operators_of((x, weight, bias)).spike_product(*arguments, None)


def _check_bias(bias: Any, x: Tensor, weight: Tensor, caller: str) -> None:
    """Refuses all but a tensor of the input's dtype and device with one value for each output."""
    check_tensor("bias", bias, caller)
    check_dense("bias", bias, caller)
    if bias.dtype is not x.dtype or bias.device != x.device:
        wanted, got = f"{x.dtype} on {x.device}", f"{bias.dtype} on {bias.device}"
        raise TypeError(f"{caller}: bias must have the dtype and device of input, {wanted}, got {got}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{caller}: bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")


def convolution_by_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    caller: str,
) -> Tensor:
    """Checks shapes and computes a convolution, of a batch or one sample, by the kernels. Requires `has_kernel`."""
    channels, dims = weight.shape[1], weight.dim()
    if x.dim() not in (dims - 1, dims) or x.shape[1 - dims] != channels:
        sizes = ", ".join(("L",) if dims == 3 else ("H", "W"))
        raise ValueError(
            f"{caller}: the input must have shape [N, {channels}, {sizes}] or [{channels}, {sizes}], got "
            f"{list(x.shape)}"
        )
    if isinstance(padding, str):
        if padding not in ("same", "valid") or (padding == "same" and any(each != 1 for each in stride)):
            raise ValueError(
                f"{caller}: padding must be numbers, 'valid' or, with stride 1, 'same', got {padding!r} with stride "
                f"{list(stride)}"
            )
        both = [size - 1 if padding == "same" else 0 for size in weight.shape[2:]]  # the sum of both sides
        padding = [each // 2 for each in both]
        x = functional.pad(x, [pad for each in reversed(both) for pad in (0, each % 2)])
    if x.dim() == dims:
        return product_by_kernel(x, weight, bias, panels, stride, padding, caller)
    return product_by_kernel(x.unsqueeze(0), weight, bias, panels, stride, padding, caller).squeeze(0)


def linear_by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, panels: Tensor | None, caller: str) -> Tensor:
    """Checks shapes and computes a linear map by the kernels. Requires `has_kernel`."""
    if x.dim() == 0 or x.size(-1) != weight.size(-1):
        raise ValueError(f"{caller}: the input must have shape [..., {weight.shape[-1]}], got {list(x.shape)}")
    return product_by_kernel(x, weight, bias, panels, caller=caller)


def spike_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for inputs that are mostly zero, such as spikes.

    Args:
        input: `[..., in_features]`, with any values, also NaN and infinity.
        weight: `[out_features, in_features]`.
        bias: `[out_features]`.

    On the CPU, in float32 and float64, zero inputs are skipped. Each output is then a sum that begins with the bias and
    adds the products of non-zero inputs in their order. An output therefore has the same bits alone and in a batch, and
    for any number of threads. It also has the same bits on all processors with AVX2 or AVX-512. If a weight is not
    finite and its input is zero, the weight has no effect on the output, whereas torch's output is NaN.

    For other types, devices and layouts, under autocast, and in forward-mode differentiation,
    `torch.nn.functional.linear` computes the output, and zeros are not skipped.

    For the gradient of the weight, one bit per element is stored instead of the input. If a non-zero value is not 1,
    the non-zero values are also stored. The input itself is stored in compiled code, under torch.func, where torch's
    operator computes the output, and if it takes less memory than its packed form.

    Returns:
        `[..., out_features]`, differentiable once with respect to all arguments.

    Raises:
        TypeError: input or weight is not a tensor, or the weight is of a floating type and the input of an integer type
            or bool. If the kernels compute the output, also if the bias is not a tensor or differs from the input in
            dtype or device.
        ValueError: sizes do not fit.
        RuntimeError: sizes or dtypes do not fit, in the cases in which torch's operator computes the output.

    Example::

        spikes = (torch.rand(100, 32, 512) < 0.1).float()  # [T, B, N]
        weight = torch.randn(256, 512, requires_grad=True)
        current = asgl_cuda.spike_linear(spikes, weight)  # [T, B, 256]
        current.sum().backward()
    """
    caller = "asgl_cuda.spike_linear"
    x = tensor_of(input, caller)
    if has_kernel(x, weight, caller) and weight.dim() == 2:
        return linear_by_kernel(x, weight, bias, None, caller)
    return functional.linear(x, weight, bias)


def spike_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` for inputs that are mostly zero, such as spikes.

    Args:
        input: `[N, C, H, W]` or `[C, H, W]`, with any values, as in `spike_linear`. The channels_last layout is
            fastest.
        weight: `[out_channels, C // groups, kernel_height, kernel_width]`.
        bias: `[out_channels]`.
        stride, padding, dilation, groups: as in torch.

    See `spike_linear` for the order of the sums, for what is stored for backward, and for the cases in which torch's
    operator computes the output. torch's operator is also used if dilation or groups is not 1.

    Returns:
        `[N, out_channels, H', W']` or `[out_channels, H', W']`, differentiable once with respect to all tensors.

    Raises:
        TypeError: input or weight is not a tensor, or the weight is of a floating type and the input of an integer type
            or bool. If the kernels compute the output, also if the bias is not a tensor or differs from the input in
            dtype or device.
        ValueError: sizes do not fit.
        RuntimeError: sizes or dtypes do not fit, in the cases in which torch's operator computes the output.

    Example::

        spikes = (torch.rand(8, 16, 32, 32) < 0.1).float().to(memory_format=torch.channels_last)
        weight = torch.randn(32, 16, 3, 3, requires_grad=True)
        current = asgl_cuda.spike_conv2d(spikes, weight, padding=1)  # [8, 32, 32, 32]
    """
    caller = "asgl_cuda.spike_conv2d"
    x, pair = tensor_of(input, caller), nn.modules.utils._pair
    padded = padding if isinstance(padding, str) else pair(padding)
    if has_kernel(x, weight, caller) and weight.dim() == 4 and pair(dilation) == (1, 1) and groups == 1:
        return convolution_by_kernel(x, weight, bias, None, pair(stride), padded, caller)
    return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
