"""Batch normalisation as an input gain, bias and mean of the neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import reshape_by_channel


def batch_statistics(x_seq: Tensor, channel: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance (biased, both [C]) of each channel, over all processes of `group` if any.

    All three are float64, whatever the type of x_seq.
    """
    dims = [dim for dim in range(x_seq.dim()) if dim != channel]
    x = x_seq.double()
    # torch.tensor would copy from the host and wait for the GPU.
    count = torch.scalar_tensor(x.numel() // x.shape[channel], dtype=x.dtype, device=x.device)
    if group is None:
        variance, mean = torch.var_mean(x, dims, correction=0)
        return count, mean, variance
    from torch.distributed.nn.functional import all_reduce

    count = all_reduce(count, group=group)
    mean = all_reduce(x.sum(dims), group=group) / count
    squares = (x - reshape_by_channel(mean, channel, x)).square().sum(dims)
    return count, mean, all_reduce(squares, group=group) / count


def normalisation_coefficients(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    input_scale: float,
    real: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """input_gain, input_bias and input_mean that normalise the input, each [C] in the type of the arithmetic.

        c = input_scale * (weight * (x - mean) / sqrt(variance + eps) + bias)
          = input_gain * (x - input_mean) + input_bias

    input_mean is the rounded mean; input_bias has the rest of it. With the whole mean in input_bias, two large terms
    would cancel where the mean is large compared to the standard deviation.
    """
    mean, variance = mean.double(), variance.double()
    gain = input_scale / (variance + eps).sqrt()
    if weight is not None:
        gain = gain * weight.double()
    input_mean = mean.to(real)
    shift = -gain * (mean - input_mean.double())
    if bias is not None:
        shift = shift + input_scale * bias.double()
    return gain.to(real), shift.to(real), input_mean
