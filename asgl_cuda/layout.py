"""Memory layouts and types of sequences, states and parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CHECKPOINT_STEPS = 16  # kCheckpointSteps of csrc


class Features(NamedTuple):
    """The dimensions of x_seq in which a layer's parameters differ, of these sizes."""

    by_channel: bool  # parameters differ along the second dimension without time; else along the last dimensions
    sizes: tuple[int, ...]
    least_batch: int = 0  # number of dimensions besides time that x_seq must have before them

    def dims(self, x_seq: Tensor, time_dim: int) -> list[int]:
        """The dimensions of x_seq in which parameters differ; fewer if x_seq does not have all of them."""
        others = [dim for dim in range(x_seq.dim()) if dim != time_dim]
        return others[1:2] if self.by_channel else others[-len(self.sizes) :]

    def shape(self, x_seq: Tensor, time_dim: int) -> tuple[int, ...]:
        """The shape in which parameters of these sizes broadcast against x_seq, which `check_features` has accepted."""
        shape, dims = [1] * x_seq.dim(), self.dims(x_seq, time_dim)
        for dim, size in zip(dims, self.sizes, strict=True):
            shape[dim] = size
        return tuple(shape[dims[0] :] if len(dims) == 1 else shape)

    def trailing(self, x_seq: Tensor, time_dim: int) -> int:
        """The number of dimensions of x_seq after the one in which parameters differ; 0 if they differ in several."""
        return x_seq.dim() - 1 - self.dims(x_seq, time_dim)[0] if len(self.sizes) == 1 else 0


def real_type(dtype: torch.dtype) -> torch.dtype:
    """The type of state, arithmetic and parameters for an input of type `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_shape(x_seq: Tensor, time_dim: int) -> list[int]:
    """The shape of a potential: x_seq's without time."""
    shape = list(x_seq.shape)
    del shape[time_dim]
    return shape


def channel_dim(time_dim: int) -> int:
    """The dimension of the channels: the second one, not counting time. `time_dim` is not negative."""
    return 2 if time_dim <= 1 else 1


def is_channels_last(x_seq: Tensor, time_dim: int) -> bool:
    """Whether the channels (the second dimension except time) are innermost in memory, all else in order."""
    return x_seq.dim() > 3 and x_seq.movedim(channel_dim(time_dim), -1).is_contiguous()


def dense(x_seq: Tensor, time_dim: int) -> Tensor:
    """x_seq in a layout that kernels accept, copied only if needed."""
    return x_seq if x_seq.is_contiguous() or is_channels_last(x_seq, time_dim) else x_seq.contiguous()


def memory_order(x_seq: Tensor, time_dim: int) -> list[int]:
    """The dimensions of x_seq, outermost first; contiguous order for a layout that is not dense."""
    order = list(range(x_seq.dim()))
    if not x_seq.is_contiguous() and is_channels_last(x_seq, time_dim):
        order.append(order.pop(channel_dim(time_dim)))
    return order


def to_memory_order(tensor: Tensor, x_seq: Tensor, time_dim: int) -> Tensor:
    """`tensor` in the memory order of x_seq, copied only if needed. Both have the same shape; x_seq is dense."""
    order = memory_order(x_seq, time_dim)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def empty_state(x_seq: Tensor, time_dim: int, states: int = 1) -> Tensor:
    """A tensor of x_seq's shape and memory order without time; not a view, see csrc's Layout::empty.

    A state of several `states`, such as v and w, has them as its first dimension.
    """
    order = [dim - (dim > time_dim) for dim in memory_order(x_seq, time_dim) if dim != time_dim]
    sizes = state_shape(x_seq, time_dim)
    if states > 1:
        sizes, order = [states, *sizes], [0, *(dim + 1 for dim in order)]
    strides = [1] * len(sizes)
    for inner, outer in zip(reversed(order), reversed(order[:-1]), strict=False):
        strides[outer] = strides[inner] * max(sizes[inner], 1)
    return x_seq.new_empty_strided(sizes, strides, dtype=real_type(x_seq.dtype))


def checkpoint_elements(x_seq: Tensor, time_dim: int, states: int = 1) -> int:
    """The number of elements of the checkpoints, with the 2 more that csrc/ops/call.h explains."""
    return (x_seq.shape[time_dim] - 1) // CHECKPOINT_STEPS * math.prod(state_shape(x_seq, time_dim)) * states + 2


def reshape_by_channel(value: Tensor, channel: int, x_seq: Tensor) -> Tensor:
    """One value per channel, reshaped to broadcast against x_seq with channels in dimension `channel`."""
    return value.reshape([-1] + [1] * (x_seq.dim() - 1 - channel))
