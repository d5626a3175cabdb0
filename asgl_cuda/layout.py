"""Memory layouts and types of sequences, states and parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHECKPOINT_STEPS = 16  # kCheckpointSteps of csrc


def real_type(dtype: torch.dtype) -> torch.dtype:
    """The type of state, arithmetic and parameters for an input of type `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_shape(x_seq: Tensor, time_dim: int) -> list[int]:
    """The shape of a potential: x_seq's without time."""
    return [size for dim, size in enumerate(x_seq.shape) if dim != time_dim]


def channel_dim(time_dim: int) -> int:
    """The second dimension except time."""
    return 2 if time_dim <= 1 else 1


def is_channels_last(x_seq: Tensor, time_dim: int) -> bool:
    """Whether the channels (the second dimension except time) are innermost in memory, all else in order."""
    return x_seq.dim() > 3 and x_seq.movedim(channel_dim(time_dim), -1).is_contiguous()


def is_dense(x_seq: Tensor, time_dim: int) -> bool:
    """Whether kernels accept the layout of x_seq."""
    return x_seq.is_contiguous() or is_channels_last(x_seq, time_dim)


def memory_order(x_seq: Tensor, time_dim: int) -> list[int]:
    """The dimensions of x_seq, outermost first; contiguous order for a layout that is not dense."""
    order = list(range(x_seq.dim()))
    if not x_seq.is_contiguous() and is_channels_last(x_seq, time_dim):
        order.append(order.pop(channel_dim(time_dim)))
    return order


def in_memory_order(tensor: Tensor, x_seq: Tensor, time_dim: int) -> Tensor:
    """A tensor of x_seq's shape, copied unless its memory order is that of x_seq, which is dense."""
    if tensor.stride() == x_seq.stride():
        return tensor
    order = memory_order(x_seq, time_dim)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def empty_state(x_seq: Tensor, time_dim: int, members: int = 1) -> Tensor:
    """A tensor of x_seq's shape and memory order without time; not a view, see csrc's Layout::empty.

    Several `members` of the state are in front.
    """
    order = [dim - (dim > time_dim) for dim in memory_order(x_seq, time_dim) if dim != time_dim]
    sizes = state_shape(x_seq, time_dim)
    if members > 1:
        sizes, order = [members, *sizes], [0, *(dim + 1 for dim in order)]
    strides = [1] * len(sizes)
    for inner, outer in zip(reversed(order), reversed(order[:-1]), strict=False):
        strides[outer] = strides[inner] * max(sizes[inner], 1)
    return x_seq.new_empty_strided(sizes, strides, dtype=real_type(x_seq.dtype))


def checkpoint_elements(x_seq: Tensor, time_dim: int, members: int = 1) -> int:
    """The size of the checkpoints; see csrc/ops/call.h for the 2 additional elements."""
    return (x_seq.shape[time_dim] - 1) // CHECKPOINT_STEPS * math.prod(state_shape(x_seq, time_dim)) * members + 2


def by_channel(value: Tensor, channel: int, x_seq: Tensor) -> Tensor:
    """One value per channel, reshaped to broadcast against x_seq with channels in dimension `channel`."""
    return value.reshape([-1] + [1] * (x_seq.dim() - 1 - channel))


class Layout:
    """The layout of x_seq: dimensions, outermost first, and the shape [outer, steps, inner] of kernels."""

    def __init__(self, x_seq: Tensor, time_dim: int) -> None:
        if not 0 <= time_dim < x_seq.dim():
            raise ValueError(f"asgl_cuda: time_dim must be in [0, {x_seq.dim()}), got {time_dim}")
        if not is_dense(x_seq, time_dim):
            raise ValueError("asgl_cuda: x_seq must be contiguous or channels_last")
        self.time_dim = time_dim
        self.sizes = x_seq.shape
        self.order = memory_order(x_seq, time_dim)
        self.shape = self.around(time_dim)  # outer, steps, inner
        outer, self.steps, self.inner = self.shape
        self.neurons = outer * self.inner

    def around(self, dim: int) -> tuple[int, int, int]:
        """Number of elements outside the dimension, size of the dimension, number of elements inside."""
        extents = [self.sizes[each] for each in self.order]
        index = self.order.index(dim)
        return math.prod(extents[:index]), extents[index], math.prod(extents[index + 1 :])

    @property
    def neuron_order(self) -> list[int]:
        """All dimensions except time, outermost first."""
        return [dim for dim in self.order if dim != self.time_dim]

    def dense_sequence(self, tensor: Tensor) -> Tensor:
        """A tensor of x_seq's shape, copied to the memory order of x_seq."""
        return _in_order(tensor, list(self.sizes), self.order)

    def dense_state(self, tensor: Tensor, members: int = 1) -> Tensor:
        """A tensor of x_seq's shape without time, behind `members` if several, copied to the order of the neurons."""
        sizes = [size for dim, size in enumerate(self.sizes) if dim != self.time_dim]
        order = [dim - (dim > self.time_dim) for dim in self.neuron_order]
        if members > 1:
            sizes, order = [members, *sizes], [0, *(dim + 1 for dim in order)]
        return _in_order(tensor, sizes, order)


def _in_order(tensor: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    if list(tensor.shape) != sizes:
        raise ValueError(f"asgl_cuda: expected shape {sizes}, got {list(tensor.shape)}")
    return tensor.permute(order).contiguous()


class ParameterTensor:
    """A parameter as [steps or 1, count], with count over a contiguous range of the neurons' dimensions.

    Broadcast dimensions inside the range are expanded. The value at neuron n and step t is element
    `t * step_stride + n // inner % count` of `data`.
    """

    def __init__(self, tensor: Tensor, layout: Layout) -> None:
        self.data = tensor
        self._as_it_is = True  # the tensor is [steps or 1, count]
        self.step_stride, self.inner, self.count = 0, layout.neurons, 1
        if tensor.numel() == 1:
            return
        self._sizes = tensor.shape
        full = tensor.reshape((1,) * (len(layout.sizes) - tensor.dim()) + tuple(tensor.shape))
        if len(full.shape) > len(layout.sizes) or any(
            size not in (1, whole) for size, whole in zip(full.shape, layout.sizes, strict=True)
        ):
            raise ValueError(
                f"asgl_cuda: a parameter of shape {list(tensor.shape)} does not broadcast against x_seq of shape "
                f"{list(layout.sizes)}"
            )
        order = layout.neuron_order
        varying = [index for index, dim in enumerate(order) if full.shape[dim] > 1]
        expanded = list(full.shape)
        if varying:
            begin, end = varying[0], varying[-1] + 1
            for dim in order[begin:end]:
                expanded[dim] = layout.sizes[dim]
            self.count = math.prod(layout.sizes[dim] for dim in order[begin:end])
            self.inner = math.prod(layout.sizes[dim] for dim in order[end:])
        if full.shape[layout.time_dim] > 1:
            self.step_stride = self.count
        self._order = [layout.time_dim, *order]
        kept = [dim for dim in self._order if expanded[dim] != 1]
        self._as_it_is = list(full.shape) == expanded and kept == sorted(kept)
        self.data = tensor.contiguous() if self._as_it_is else full.expand(expanded).permute(self._order).contiguous()

    def gradient_in_own_shape(self, gradient: Tensor) -> Tensor:
        """Reshapes a gradient in the layout of `data` to the shape of the parameter."""
        if self._as_it_is:
            return gradient
        inverse = [self._order.index(dim) for dim in range(len(self._order))]
        return gradient.permute(inverse).sum_to_size(self._sizes).contiguous()
