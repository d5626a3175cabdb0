"""The operators of batch normalisation on CUDA kernels that something else compiles and starts, as in launch.py.

csrc/batch_norm_ops.h and csrc/batch_norm_cuda.cu in Python.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernel_params import (
    AdjointParams,
    ChannelShape,
    ChannelTiles,
    CoefficientsParams,
    InputGradientParams,
    MomentsParams,
)
from .launch import BLOCK_THREADS, SCALARS, KernelOperators, Launcher, Layout, address_of, blocks_for, start
from .ops import define_operators
from .reference import channel_dim, real_type

# As in csrc/batch_norm_params.h and batch_norm_kernels.cuh.
MOST_SPLITS = 2048
ROWS_EACH = 64
COEFFICIENTS = 4  # rows, the first the mean


# ---- names of kernels ----


def moments_kernel(dtype: torch.dtype, lanes: int) -> str:
    return f"asgl::batch_moments_kernel<{SCALARS[dtype]}, {lanes}>"


def coefficients_kernel(real: torch.dtype) -> str:
    return f"asgl::batch_norm_coefficients_kernel<{SCALARS[real]}>"


def adjoint_kernel(real: torch.dtype) -> str:
    return f"asgl::batch_norm_adjoint_kernel<{SCALARS[real]}>"


def input_gradient_kernel(dtype: torch.dtype, lanes: int) -> str:
    return f"asgl::batch_norm_input_gradient_kernel<{SCALARS[dtype]}, {lanes}>"


# ---- layout ----


def channel_shape(layout: Layout) -> tuple[int, int, int]:
    """Rows, channels, and the columns of a channel."""
    channel = channel_dim(layout.time_dim)
    if channel >= len(layout.sizes):
        raise ValueError(f"asgl_cuda: x_seq must have a dimension of channels, got shape {list(layout.sizes)}")
    extents = [layout.sizes[dim] for dim in layout.order]
    place = layout.order.index(channel)
    return math.prod(extents[:place]), extents[place], math.prod(extents[place + 1 :])


def channel_tiles(shape: tuple[int, int, int], x_seq: Tensor, grad_x_seq: Tensor | None) -> ChannelTiles:
    """How the values are cut: four columns a thread where these are of one channel, at a multiple of 16 bytes."""
    rows, channels, inner = shape
    together = 4 * x_seq.element_size()
    fours = (
        x_seq.dtype != torch.float64
        and inner % 4 == 0
        and address_of(x_seq) % together == 0
        and address_of(grad_x_seq) % together == 0
    )
    lanes = 4 if fours else 1
    units = inner // lanes
    tiles_per_channel = blocks_for(units, BLOCK_THREADS)
    if tiles_per_channel > 1:
        channels_per_tile, width = 1, BLOCK_THREADS
    else:
        channels_per_tile = min(BLOCK_THREADS // units, channels)
        width = channels_per_tile * units
    ways = BLOCK_THREADS // width
    rows_per_split = max(ways * (ROWS_EACH // lanes), blocks_for(rows, MOST_SPLITS))
    return ChannelTiles(
        ChannelShape(*shape), lanes, width, ways, units, channels_per_tile, tiles_per_channel, rows_per_split,
        blocks_for(rows, rows_per_split),
    )  # fmt: skip


def _slots(tiles: ChannelTiles) -> int:
    return int(tiles.splits * tiles.tiles_per_channel)


def _tasks(tiles: ChannelTiles) -> int:
    return _slots(tiles) * blocks_for(tiles.shape.channels, tiles.channels_per_tile)


class BatchNormOperators:
    """The operators, as a launcher's device computes them."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def batch_norm_coefficients(
        self,
        x_seq: Tensor,
        statistics: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        input_scale: float,
        time_dim: int,
    ) -> tuple[Tensor, Tensor]:
        shape = rows, channels, inner = channel_shape(Layout(x_seq, time_dim))
        real = real_type(x_seq.dtype)
        if (mean is None) != (variance is None):
            raise ValueError("asgl_cuda: mean and variance come together")
        coefficients = x_seq.new_empty((COEFFICIENTS, channels), dtype=real)
        total = x_seq.new_empty((channels, 3), dtype=torch.float64)
        if channels == 0:
            return coefficients, total
        by_channel = [_dense(each, [channels], real, x_seq) for each in (mean, variance, weight, bias)]
        moments = None
        if statistics is not None:
            moments = _dense(statistics, [statistics.shape[0], channels, 3], torch.float64, x_seq)
        elif mean is None and not rows * inner:
            moments = x_seq.new_zeros((1, channels, 3), dtype=torch.float64)
        elif mean is None:
            tiles = channel_tiles(shape, x_seq, None)
            moments = x_seq.new_empty((_slots(tiles), channels, 3), dtype=torch.float64)
            start(
                self._launcher, x_seq.device, moments_kernel(x_seq.dtype, tiles.lanes), _tasks(tiles), BLOCK_THREADS,
                MomentsParams(tiles, address_of(x_seq), address_of(moments)),
            )  # fmt: skip
        params = CoefficientsParams(
            address_of(moments), 0 if moments is None else moments.shape[0], channels, *map(address_of, by_channel),
            (eps, input_scale), address_of(coefficients), address_of(total),
        )  # fmt: skip
        start(self._launcher, x_seq.device, coefficients_kernel(real), channels, BLOCK_THREADS, params)
        return coefficients, total

    def batch_norm_backward(
        self,
        grad_x_seq: Tensor,
        x_seq: Tensor,
        coefficients: Tensor,
        statistics: Tensor,
        grad_gain: Tensor,
        grad_bias: Tensor,
        total_grad_gain: Tensor,
        total_grad_bias: Tensor,
        eps: float,
        input_scale: float,
        time_dim: int,
    ) -> tuple[Tensor, Tensor]:
        layout = Layout(x_seq, time_dim)
        shape = _, channels, _ = channel_shape(layout)
        real = real_type(x_seq.dtype)
        wanted = grad_x_seq.numel() > 0
        if wanted and (
            grad_x_seq.shape != x_seq.shape
            or not grad_x_seq.permute(layout.order).is_contiguous()
            or grad_x_seq.dtype != x_seq.dtype
            or grad_x_seq.device != x_seq.device
        ):
            raise ValueError("asgl_cuda: grad_x_seq must lie in memory as x_seq does")
        grad_weight, grad_shift = (x_seq.new_empty(channels, dtype=real) for _ in range(2))
        if channels == 0:
            return grad_weight, grad_shift
        known = _dense(coefficients, [COEFFICIENTS, channels], real, x_seq)
        moments = _dense(statistics, [channels, 3], torch.float64, x_seq)
        sums = [
            _dense(each, [channels], real, x_seq) for each in (grad_gain, grad_bias, total_grad_gain, total_grad_bias)
        ]
        adjoint = x_seq.new_empty((2, channels), dtype=real)
        params = AdjointParams(
            address_of(moments), address_of(known), channels, *map(address_of, sums), (eps, input_scale),
            *map(address_of, (grad_weight, grad_shift, adjoint)),
        )  # fmt: skip
        blocks = blocks_for(channels, BLOCK_THREADS)
        start(self._launcher, x_seq.device, adjoint_kernel(real), blocks, BLOCK_THREADS, params)
        if wanted:
            tiles = channel_tiles(shape, x_seq, grad_x_seq)
            addresses = map(address_of, (x_seq, known, adjoint, grad_x_seq))
            start(
                self._launcher, x_seq.device, input_gradient_kernel(x_seq.dtype, tiles.lanes), _tasks(tiles),
                BLOCK_THREADS, InputGradientParams(tiles, *addresses),
            )  # fmt: skip
        return grad_weight, grad_shift


def _dense(tensor: Tensor | None, shape: list[int], dtype: torch.dtype, x_seq: Tensor) -> Tensor | None:
    """The tensor, checked, its elements side by side."""
    if tensor is None:
        return None
    if list(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x_seq.device:
        raise ValueError(
            f"asgl_cuda: expected shape {shape} and type {dtype} on {x_seq.device}, got {list(tensor.shape)}, "
            f"{tensor.dtype}, {tensor.device}"
        )
    return tensor.contiguous()


def implement(namespace: str, dispatch_key: str, launcher: Launcher) -> None:
    """Defines all operators in this namespace, on the kernels of `launcher`."""
    library = define_operators(namespace)
    for operators, names in (
        (KernelOperators(launcher), ("draw_rng_state", "lif_forward", "lif_backward")),
        (BatchNormOperators(launcher), ("batch_norm_coefficients", "batch_norm_backward")),
    ):
        for name in names:
            library.impl(name, getattr(operators, name), dispatch_key)
