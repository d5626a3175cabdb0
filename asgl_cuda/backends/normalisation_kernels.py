"""The operators of batch normalisation, on CUDA kernels as in neuron_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout, channel_dim, real_type
from ..ops import define_operators
from .integrator_kernels import IntegratorOperators
from .neuron_kernels import (
    SCALARS,
    KernelOperators,
    Launcher,
    NeuronOperators,
    as_bool,
    blocks_for,
    check_type,
    filled,
    is_aligned,
)
from .structures import constant, structure


def moments_kernel(dtype: torch.dtype, lanes: int) -> str:
    return f"asgl::batch_moments_kernel<{SCALARS[dtype]}, {lanes}>"


def coefficients_kernel(real: torch.dtype) -> str:
    return f"asgl::batch_norm_coefficients_kernel<{SCALARS[real]}>"


def running_kernel(real: torch.dtype) -> str:
    return f"asgl::batch_norm_running_kernel<{SCALARS[real]}>"


def adjoint_kernel(real: torch.dtype) -> str:
    return f"asgl::batch_norm_adjoint_kernel<{SCALARS[real]}>"


def input_gradient_kernel(dtype: torch.dtype, lanes: int, residual: bool) -> str:
    return f"asgl::batch_norm_input_gradient_kernel<{SCALARS[dtype]}, {lanes}, {as_bool(residual)}>"


def channel_shape(layout: Layout) -> tuple[int, int, int]:
    """Rows, channels, and the columns of a channel."""
    channel = channel_dim(layout.time_dim)
    if channel >= len(layout.sizes):
        raise ValueError(f"asgl_cuda: x_seq must have a dimension of channels, got shape {list(layout.sizes)}")
    return layout.around(channel)


def channel_tiles(shape: tuple[int, int, int], rows_each: int, x_seq: Tensor, *gradients: Tensor | None) -> Structure:
    """Tiles of x_seq: four columns per thread if in one channel and aligned for four elements."""
    rows, channels, inner = shape
    threads = constant("kBlockThreads")
    fours = x_seq.dtype != torch.float64 and inner % 4 == 0 and all(map(is_aligned, (x_seq, *gradients)))
    lanes = 4 if fours else 1
    units = inner // lanes
    tiles_per_channel = blocks_for(units, threads)
    channels_per_tile, width = 1, threads
    if tiles_per_channel == 1:
        channels_per_tile = min(threads // units, channels)
        width = channels_per_tile * units
    ways = threads // width
    rows_per_split = max(ways * (rows_each // lanes), blocks_for(rows, constant("kMostSplits")))
    return structure("ChannelTiles")(
        shape=shape, lanes=lanes, width=width, ways=ways, units_per_channel=units, channels_per_tile=channels_per_tile,
        tiles_per_channel=tiles_per_channel, rows_per_split=rows_per_split, splits=blocks_for(rows, rows_per_split),
    )  # fmt: skip


def _by_channel(x_seq: Tensor, channels: int, time_dim: int) -> list[int]:
    """The shape of a value per channel that broadcasts against x_seq."""
    return [channels] + [1] * (x_seq.dim() - 1 - channel_dim(time_dim))


def _slots(tiles: Structure) -> int:
    return int(tiles.splits * tiles.tiles_per_channel)


def _tasks(tiles: Structure) -> int:
    return _slots(tiles) * blocks_for(tiles.shape.channels, tiles.channels_per_tile)


class NormalisationOperators(KernelOperators):
    """The operators of batch normalisation."""

    def batch_norm_coefficients(self, x_seq: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        statistics, mean, variance, weight, bias, eps, input_scale, time_dim = others
        shape = rows, channels, inner = channel_shape(Layout(x_seq, time_dim))
        real = real_type(x_seq.dtype)
        if (mean is None) != (variance is None):
            raise ValueError("asgl_cuda: mean and variance come together")
        by_channel = _by_channel(x_seq, channels, time_dim)
        coefficients = x_seq.new_empty((constant("kNumCoefficients"), *by_channel), dtype=real)
        total = x_seq.new_empty((channels, 3), dtype=torch.float64)
        if channels == 0:
            return coefficients, total
        mean, variance, weight, bias = (
            _dense(each, [channels], real, x_seq) for each in (mean, variance, weight, bias)
        )
        moments = None
        if statistics is not None:
            moments = _dense(
                statistics, [max(len(statistics), 1) if statistics.dim() else 1, channels, 3], torch.float64, x_seq
            )
        elif mean is None and not rows * inner:
            moments = x_seq.new_zeros((1, channels, 3), dtype=torch.float64)
        elif mean is None:
            tiles = channel_tiles(shape, constant("kMomentsRowsEach"), x_seq)
            moments = x_seq.new_empty((_slots(tiles), channels, 3), dtype=torch.float64)
            own = filled("MomentsParams", real, tiles=tiles, x_seq=x_seq, moments=moments)
            self.start(x_seq.device, moments_kernel(x_seq.dtype, tiles.lanes), _tasks(tiles), own)
        params = filled(
            "CoefficientsParams", real, moments=moments, slots=0 if moments is None else moments.shape[0],
            channels=channels, mean=mean, variance=variance, weight=weight, bias=bias, options=(eps, input_scale),
            coefficients=coefficients, total=total,
        )  # fmt: skip
        self.start(x_seq.device, coefficients_kernel(real), channels, params)
        return coefficients, total

    def batch_norm_update(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor | None,
        coefficients: Tensor,
        momentum: float,
    ) -> None:
        real, device = coefficients.dtype, coefficients.device
        if real not in (torch.float32, torch.float64):
            raise TypeError(f"asgl_cuda: coefficients must be float32 or float64, got {real}")
        rows, channels, *_ = *coefficients.shape, 0, 0
        if rows != constant("kNumCoefficients") or coefficients.numel() != rows * channels:
            raise ValueError(
                f"asgl_cuda: coefficients must have shape [4, channels, 1, ...], got {list(coefficients.shape)}"
            )
        for running in (running_mean, running_var):
            if not running.is_contiguous():
                raise ValueError("asgl_cuda: running statistics must be contiguous")
            _dense(running, [channels], real, coefficients)
        if num_batches_tracked is not None:
            _dense(num_batches_tracked, [], torch.int64, coefficients)
        if channels == 0:
            return
        params = filled(
            "RunningParams", real, coefficients=coefficients.contiguous(), channels=channels, momentum=momentum,
            running_mean=running_mean, running_var=running_var, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
        self.start(device, running_kernel(real), blocks_for(channels, constant("kBlockThreads")), params)

    def batch_norm_backward(
        self, grad_x_seq: Tensor, grad_residual: Tensor | None, x_seq: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor]:
        coefficients, statistics, *sums, eps, input_scale, time_dim = others
        layout = Layout(x_seq, time_dim)
        shape = _, channels, _ = channel_shape(layout)
        real = real_type(x_seq.dtype)
        wanted = grad_x_seq.numel() > 0
        if not wanted:
            check_type(grad_x_seq, x_seq.dtype, x_seq, "grad_x_seq")
        gradients = [grad for grad in (grad_x_seq, grad_residual) if wanted and grad is not None]
        for grad in gradients:
            if (
                grad.shape != x_seq.shape
                or not grad.permute(layout.order).is_contiguous()
                or grad.dtype != x_seq.dtype
                or grad.device != x_seq.device
            ):
                raise ValueError("asgl_cuda: grad_x_seq and grad_residual must have the type and memory order of x_seq")
        grad_weight, grad_shift = (x_seq.new_empty(channels, dtype=real) for _ in range(2))
        if channels == 0:
            return grad_weight, grad_shift
        by_channel = _by_channel(x_seq, channels, time_dim)
        coefficients = _dense(coefficients, [constant("kNumCoefficients"), *by_channel], real, x_seq)
        moments = _dense(statistics, [channels, 3], torch.float64, x_seq)
        gain, bias, total_gain, total_bias = (_dense(each, by_channel, real, x_seq) for each in sums)
        adjoint = x_seq.new_empty((2, channels), dtype=real)
        params = filled(
            "AdjointParams", real, moments=moments, coefficients=coefficients, channels=channels, grad_gain=gain,
            grad_bias=bias, total_grad_gain=total_gain, total_grad_bias=total_bias, options=(eps, input_scale),
            grad_weight=grad_weight, grad_shift=grad_shift, adjoint=adjoint,
        )  # fmt: skip
        self.start(x_seq.device, adjoint_kernel(real), blocks_for(channels, constant("kBlockThreads")), params)
        if wanted:
            tiles = channel_tiles(shape, constant("kChannelRowsEach"), x_seq, *gradients)
            assert coefficients is not None
            gains = coefficients[constant("kCoefficientGain")]
            last = filled(
                "InputGradientParams", real, tiles=tiles, x_seq=x_seq, mean=coefficients, adjoint=adjoint,
                grad_x_seq=grad_x_seq, grad_residual=grad_residual, gain=gains,
            )  # fmt: skip
            kernel = input_gradient_kernel(x_seq.dtype, tiles.lanes, grad_residual is not None)
            self.start(x_seq.device, kernel, _tasks(tiles), last)
        return grad_weight, grad_shift


def _dense(tensor: Tensor | None, shape: list[int], dtype: torch.dtype, x_seq: Tensor) -> Tensor | None:
    """The tensor, checked and contiguous."""
    if tensor is None:
        return None
    if list(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x_seq.device:
        raise ValueError(
            f"asgl_cuda: expected shape {shape} and type {dtype} on {x_seq.device}, got {list(tensor.shape)}, "
            f"{tensor.dtype}, {tensor.device}"
        )
    return tensor.contiguous()


def operators_on(launcher: Launcher) -> dict[str, Callable[..., Any]]:
    """All operators by name, on the kernels of `launcher`."""
    neuron, normalisation = NeuronOperators(launcher), NormalisationOperators(launcher)
    integrator = IntegratorOperators(launcher)
    return {
        "draw_rng_state": neuron.draw_rng_state,
        "lif_forward": neuron.lif_forward,
        "lif_backward": neuron.lif_backward,
        "integrator_forward": integrator.integrator_forward,
        "integrator_backward": integrator.integrator_backward,
        "batch_norm_coefficients": normalisation.batch_norm_coefficients,
        "batch_norm_update": normalisation.batch_norm_update,
        "batch_norm_backward": normalisation.batch_norm_backward,
    }


def implement(namespace: str, dispatch_key: str, operators: dict[str, Callable[..., Any]]) -> None:
    """Defines these operators in this namespace."""
    library = define_operators(namespace)
    for name, operator in operators.items():
        library.impl(name, operator, dispatch_key)
