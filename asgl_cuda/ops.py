"""The operators: their schemas and their fake versions for tracing.

A backend implements them in a namespace of its own; C++ and CUDA kernels share `torch.ops.asgl_cuda`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batching import batching_rules
from .reference import channel_dim, memory_order, real_type, state_shape

CHECKPOINT_STEPS = 16  # kCheckpointSteps of csrc/lif_params.h

ForwardResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
BackwardResult = tuple[Tensor, Tensor, list[Tensor]]


def checkpoint_elements(x_seq: Tensor, time_dim: int) -> int:
    """As in csrc/ops.h, which says why there are two more than one would expect."""
    return (x_seq.shape[time_dim] - 1) // CHECKPOINT_STEPS * math.prod(state_shape(x_seq, time_dim)) + 2


def empty_state(x_seq: Tensor, time_dim: int) -> Tensor:
    """As Layout::empty_state of csrc/ops.h: x_seq's shape and memory order without time."""
    order = [dim - (dim > time_dim) for dim in memory_order(x_seq, time_dim) if dim != time_dim]
    sizes = state_shape(x_seq, time_dim)
    strides = [1] * len(sizes)
    for inner, outer in zip(reversed(order), reversed(order[:-1]), strict=False):
        strides[outer] = strides[inner] * max(sizes[inner], 1)
    return x_seq.new_empty_strided(sizes, strides, dtype=real_type(x_seq.dtype))  # no view: see csrc/ops.h


def _fake_draw_rng_state(fresh: Tensor) -> Tensor:
    return torch.empty_like(fresh)


def _fake_lif_forward(
    x_seq: Tensor,
    v_init: Tensor | None,
    rng_state: Tensor | None,
    parameters: Sequence[Tensor | None],
    constants: Sequence[float],
    surrogate: int,
    surrogate_gain: float,
    v_rest: float,
    hard_reset: bool,
    strict_threshold: bool,
    scale_output: bool,
    analog_below: int,
    time_dim: int,
    return_v_last: bool,
    return_v_seq: bool,
    return_h_seq: bool,
    keep_checkpoints: bool,
) -> ForwardResult:
    real = real_type(x_seq.dtype)
    kept = checkpoint_elements(x_seq, time_dim) if keep_checkpoints else 0

    def sequence(wanted: bool) -> Tensor:
        return torch.empty_like(x_seq, dtype=real) if wanted else x_seq.new_empty(0, dtype=real)

    return (
        torch.empty_like(x_seq),
        empty_state(x_seq, time_dim) if return_v_last else x_seq.new_empty(0, dtype=real),
        sequence(return_v_seq),
        sequence(return_h_seq),
        x_seq.new_empty((kept,), dtype=real),
    )


def _fake_lif_backward(
    grad_s_seq: Tensor | None,
    grad_v_last: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_h_seq: Tensor | None,
    x_seq: Tensor,
    v_init: Tensor | None,
    rng_state: Tensor | None,
    checkpoints: Tensor,
    parameters: Sequence[Tensor | None],
    constants: Sequence[float],
    surrogate: int,
    surrogate_gain: float,
    v_rest: float,
    hard_reset: bool,
    strict_threshold: bool,
    scale_output: bool,
    detach_reset: bool,
    analog_below: int,
    time_dim: int,
    needs_x_seq: bool,
    needs_v_init: bool,
    needs_parameters: Sequence[bool],
) -> BackwardResult:
    real = real_type(x_seq.dtype)
    return (
        torch.empty_like(x_seq) if needs_x_seq else x_seq.new_empty(0),
        empty_state(x_seq, time_dim) if needs_v_init else x_seq.new_empty(0, dtype=real),
        [
            x_seq.new_empty(parameter.shape if needed and parameter is not None else (0,), dtype=real)
            for parameter, needed in zip(parameters, needs_parameters, strict=True)
        ],
    )


def _fake_batch_norm_coefficients(
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
    channels = x_seq.shape[channel_dim(time_dim)]
    real = real_type(x_seq.dtype)
    return x_seq.new_empty((4, channels), dtype=real), x_seq.new_empty((channels, 3), dtype=torch.float64)


def _fake_batch_norm_backward(
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
    return torch.empty_like(grad_gain), torch.empty_like(grad_bias)


_SCHEMAS = (
    "draw_rng_state(Tensor fresh) -> Tensor",
    "lif_forward(Tensor x_seq, Tensor? v_init, Tensor? rng_state, Tensor?[] parameters, float[] constants, "
    "int surrogate, float surrogate_gain, float v_rest, bool hard_reset, bool strict_threshold, bool scale_output, "
    "int analog_below, int time_dim, bool return_v_last, bool return_v_seq, bool return_h_seq, bool keep_checkpoints) "
    "-> (Tensor s_seq, Tensor v_last, Tensor v_seq, Tensor h_seq, Tensor checkpoints)",
    "lif_backward(Tensor? grad_s_seq, Tensor? grad_v_last, Tensor? grad_v_seq, Tensor? grad_h_seq, Tensor x_seq, "
    "Tensor? v_init, Tensor? rng_state, Tensor checkpoints, Tensor?[] parameters, float[] constants, int surrogate, "
    "float surrogate_gain, float v_rest, bool hard_reset, bool strict_threshold, bool scale_output, bool detach_reset, "
    "int analog_below, int time_dim, bool needs_x_seq, bool needs_v_init, bool[7] needs_parameters) "
    "-> (Tensor grad_x_seq, Tensor grad_v_init, Tensor[] grad_parameters)",
    # Of statistics: number, mean and biased variance of each channel in each process, [processes, C, 3] in float64; or
    # of mean and variance; or else of x_seq. The coefficients are [4, C]: input_mean, input_gain and input_bias of the
    # neuron, and the unbiased variance. The total is [C, 3], the statistics of all processes.
    "batch_norm_coefficients(Tensor x_seq, Tensor? statistics, Tensor? mean, Tensor? variance, Tensor? weight, "
    "Tensor? bias, float eps, float input_scale, int time_dim) -> (Tensor coefficients, Tensor total)",
    # The gradients of weight and bias, and in place that of x_seq, if not empty: the total sums are of all processes.
    "batch_norm_backward(Tensor(a!) grad_x_seq, Tensor x_seq, Tensor coefficients, Tensor statistics, "
    "Tensor grad_gain, Tensor grad_bias, Tensor total_grad_gain, Tensor total_grad_bias, float eps, float input_scale, "
    "int time_dim) -> (Tensor grad_weight, Tensor grad_bias)",
)
_FAKES: dict[str, Callable[..., Any]] = {
    "draw_rng_state": _fake_draw_rng_state,
    "lif_forward": _fake_lif_forward,
    "lif_backward": _fake_lif_backward,
    "batch_norm_coefficients": _fake_batch_norm_coefficients,
    "batch_norm_backward": _fake_batch_norm_backward,
}
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library that defines it


def define_operators(namespace: str) -> torch.library.Library:
    """The operators without kernels, but with shapes and types for torch.compile and fake tensors, and with vmap.

    Kernels in C++ are checked against the schemas when they are loaded.
    """
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        tag = torch.Tag.nondeterministic_seeded if name == "draw_rng_state" else torch.Tag.pt2_compliant_tag
        library.define(schema, tags=(tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    for name, rule in batching_rules(getattr(torch.ops, namespace)).items():
        torch.library.register_vmap(f"{namespace}::{name}", rule, lib=library)
    return library


define_operators("asgl_cuda")
