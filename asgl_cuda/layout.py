"""Memory layouts, shapes and types of tensors. Dense layouts are contiguous or channels_last, the rest in order."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CHECKPOINT_STEPS = 16  # kCheckpointSteps of csrc


class Features(NamedTuple):
    """The dimensions of x_seq along which a layer has different parameters, and their sizes."""

    by_channel: bool  # along the second dimension, not counting time; otherwise along the last dimensions
    sizes: tuple[int, ...]
    least_batch: int = 0  # number of dimensions, besides time, that x_seq must have before these

    def dims(self, x_seq: Tensor, time_dim: int) -> list[int]:
        """The dimensions of x_seq along which parameters differ; fewer if x_seq does not have all of them."""
        others = [dim for dim in range(x_seq.dim()) if dim != time_dim]
        return others[1:2] if self.by_channel else others[-len(self.sizes) :]

    def broadcast_shape(self, x_seq: Tensor, time_dim: int) -> tuple[int, ...]:
        """The shape in which parameters of these sizes broadcast against an x_seq that passed `check_features`."""
        shape, dims = [1] * x_seq.dim(), self.dims(x_seq, time_dim)
        for dim, size in zip(dims, self.sizes, strict=True):
            shape[dim] = size
        # If there is only one size, the shape has no leading ones, so that a parameter along the last dimension is not
        # reshaped (calls/plan.py).
        return tuple(shape[dims[0] :] if len(dims) == 1 else shape)

    def trailing(self, x_seq: Tensor, time_dim: int) -> int:
        """`Rules.trailing`: the number of dimensions after the one along which parameters differ; 0 for several."""
        return x_seq.dim() - 1 - self.dims(x_seq, time_dim)[0] if len(self.sizes) == 1 else 0


def real_type(dtype: torch.dtype) -> torch.dtype:
    """The type of state, arithmetic and parameters for an input of type `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_shape(x_seq: Tensor, time_dim: int) -> list[int]:
    """The shape of a state: that of x_seq without time."""
    shape = list(x_seq.shape)
    del shape[time_dim]
    return shape


def channel_dim(time_dim: int) -> int:
    """The dimension of the channels: the second one, not counting time. `time_dim` is not negative."""
    return 2 if time_dim <= 1 else 1


def is_channels_last(x_seq: Tensor, time_dim: int) -> bool:
    """Whether the channels (the second dimension except time) are innermost in memory, all else in order."""
    return x_seq.dim() > 3 and x_seq.movedim(channel_dim(time_dim), -1).is_contiguous()


def to_dense_layout(x_seq: Tensor, time_dim: int) -> Tensor:
    """x_seq itself if it is contiguous or channels_last, as kernels need it; otherwise a contiguous copy."""
    return x_seq if x_seq.is_contiguous() or is_channels_last(x_seq, time_dim) else x_seq.contiguous()


def memory_order(x_seq: Tensor, time_dim: int) -> list[int]:
    """The dimensions of x_seq in the order of memory, outermost first; for any layout but channels_last 0, 1, 2, ..."""
    order = list(range(x_seq.dim()))
    if not x_seq.is_contiguous() and is_channels_last(x_seq, time_dim):
        order.append(order.pop(channel_dim(time_dim)))
    return order


def to_memory_order(tensor: Tensor, x_seq: Tensor, time_dim: int) -> Tensor:
    """`tensor` in the memory order of x_seq, copied only if needed. Both have one shape, and x_seq is dense."""
    order = memory_order(x_seq, time_dim)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def empty_state(x_seq: Tensor, time_dim: int, states: int = 1) -> Tensor:
    """An uninitialised tensor for a state: the shape and memory order of x_seq without time.

    Several `states`, such as v and w, are the first dimension of one tensor. It is made by its strides, not as a
    permuted view, because autograd refuses to change a view in place.
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
    """The number of elements of all checkpoints, plus 2, so that torch.compile does not specialise on the steps."""
    return (x_seq.shape[time_dim] - 1) // CHECKPOINT_STEPS * math.prod(state_shape(x_seq, time_dim)) * states + 2


def reshape_by_channel(value: Tensor, channel: int, x_seq: Tensor) -> Tensor:
    """One value per channel, reshaped to broadcast against x_seq with channels in dimension `channel`."""
    return value.reshape([-1] + [1] * (x_seq.dim() - 1 - channel))
