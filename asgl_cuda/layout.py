"""Where the dimensions of a sequence, a state and a parameter lie in memory, and in which types."""

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
    """Whether x_seq lies in memory as kernels take it."""
    return x_seq.is_contiguous() or is_channels_last(x_seq, time_dim)


def memory_order(x_seq: Tensor, time_dim: int) -> list[int]:
    """The dimensions of x_seq, outermost first; a layout that is not dense is taken as contiguous."""
    order = list(range(x_seq.dim()))
    if not x_seq.is_contiguous() and is_channels_last(x_seq, time_dim):
        order.append(order.pop(channel_dim(time_dim)))
    return order


def empty_state(x_seq: Tensor, time_dim: int) -> Tensor:
    """A tensor of x_seq's shape and memory order without time. It is no view: csrc's Layout::empty says why."""
    order = [dim - (dim > time_dim) for dim in memory_order(x_seq, time_dim) if dim != time_dim]
    sizes = state_shape(x_seq, time_dim)
    strides = [1] * len(sizes)
    for inner, outer in zip(reversed(order), reversed(order[:-1]), strict=False):
        strides[outer] = strides[inner] * max(sizes[inner], 1)
    return x_seq.new_empty_strided(sizes, strides, dtype=real_type(x_seq.dtype))


def checkpoint_elements(x_seq: Tensor, time_dim: int) -> int:
    """The size of the checkpoints; csrc/ops/neuron.h says why there are two more than one would expect."""
    return (x_seq.shape[time_dim] - 1) // CHECKPOINT_STEPS * math.prod(state_shape(x_seq, time_dim)) + 2


def by_channel(value: Tensor, channel: int, x_seq: Tensor) -> Tensor:
    """One value a channel, reshaped to broadcast against x_seq, whose dimension `channel` has the channels."""
    return value.reshape([-1] + [1] * (x_seq.dim() - 1 - channel))


class Layout:
    """An x_seq in memory: its dimensions, outermost first, and its shape as kernels see it."""

    def __init__(self, x_seq: Tensor, time_dim: int) -> None:
        if not is_dense(x_seq, time_dim):
            raise ValueError("asgl_cuda: x_seq must be contiguous or channels_last")
        self.time_dim = time_dim
        self.sizes = x_seq.shape
        self.order = memory_order(x_seq, time_dim)
        self.shape = self.around(time_dim)  # outer, steps, inner
        outer, self.steps, self.inner = self.shape
        self.neurons = outer * self.inner

    def around(self, dim: int) -> tuple[int, int, int]:
        """The number of elements outside of this dimension, its size, and the number inside."""
        extents = [self.sizes[each] for each in self.order]
        place = self.order.index(dim)
        return math.prod(extents[:place]), extents[place], math.prod(extents[place + 1 :])

    @property
    def neuron_order(self) -> list[int]:
        """All dimensions except time, outermost first."""
        return [dim for dim in self.order if dim != self.time_dim]

    def dense_sequence(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of x_seq's shape in the order of x_seq's memory."""
        return _in_order(tensor, list(self.sizes), self.order)

    def dense_state(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of x_seq's shape without time in the order in which neurons are counted."""
        sizes = [size for dim, size in enumerate(self.sizes) if dim != self.time_dim]
        return _in_order(tensor, sizes, [dim - (dim > self.time_dim) for dim in self.neuron_order])


def _in_order(tensor: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    if list(tensor.shape) != sizes:
        raise ValueError(f"asgl_cuda: expected shape {sizes}, got {list(tensor.shape)}")
    return tensor.permute(order).contiguous()


class ParameterTensor:
    """A parameter laid out as [steps or 1, count], count running over a contiguous range of the neurons' dimensions.

    Dimensions inside that range in which the parameter is broadcast are expanded. The value at neuron n and step t is
    element `t * step_stride + n // inner % count` of `data`.
    """

    def __init__(self, tensor: Tensor, layout: Layout) -> None:
        self.data = tensor
        self._as_it_is = True  # [steps or 1, count] are the dimensions that it has, in their order
        self.step_stride, self.inner, self.count = 0, layout.neurons, 1
        if tensor.numel() == 1:
            return
        self._sizes = tensor.shape
        full = tensor.reshape((1,) * (len(layout.sizes) - tensor.dim()) + tuple(tensor.shape))
        order = layout.neuron_order
        varying = [place for place, dim in enumerate(order) if full.shape[dim] > 1]
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
        places = [dim for dim in self._order if expanded[dim] != 1]
        self._as_it_is = list(full.shape) == expanded and places == sorted(places)
        self.data = tensor.contiguous() if self._as_it_is else full.expand(expanded).permute(self._order).contiguous()

    def gradient_in_own_shape(self, gradient: Tensor) -> Tensor:
        """Brings a gradient in the layout of `data` back to the parameter's own shape."""
        if self._as_it_is:
            return gradient
        inverse = [self._order.index(dim) for dim in range(len(self._order))]
        return gradient.permute(inverse).sum_to_size(self._sizes).contiguous()
