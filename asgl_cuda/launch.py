"""The operators on CUDA kernels that something else compiles and starts: csrc/ops.h and csrc/lif_cuda.cuh in Python.

A launcher knows how to start a kernel by its name; what is decided here, as the compiled launchers decide it, is the
layout of the data, which kernel, how many neurons a thread, which grid. Arguments have been checked in `lif`; what is
checked here again would otherwise read or write out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import Structure
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .kernel_params import INPUT_BIAS, INPUT_GAIN, INPUT_MEAN, NUM_PARAMETERS, STRUCTURES, WIDTH
from .ops import BackwardResult, ForwardResult, checkpoint_elements, empty_state
from .reference import BELOW_IN_STATE, DRAWS, is_channels_last, memory_order, real_type

# As in csrc/lif_kernels.cuh and lif_cuda.cuh.
BLOCK_THREADS = 128
SUM_THREADS = 512
MANY_SLOTS = 256
MOST_BLOCKS = 0x7FFFFFFF
SEGMENT_STEPS = (4, 8, 16)

GENERAL, NORMALISED, PLAIN = range(3)  # Input of csrc/lif_math.h

SCALARS = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "asgl::Half",
    torch.bfloat16: "asgl::BFloat16",
}


class Launcher(Protocol):
    """What starts kernels."""

    def resident_threads(self, device: torch.device) -> int:
        """How many threads the device can hold."""

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: Structure) -> None:
        """Starts a kernel, named by a C++ expression, on the device's current stream."""


# ---- names of kernels ----


def _bool(value: bool) -> str:
    return "true" if value else "false"


def forward_kernel(dtype: torch.dtype, surrogate: int, hard_reset: bool, lanes: int, input: int) -> str:
    """`lanes`: neurons a thread; `input`: see csrc/lif_kernels.cuh."""
    kinds = f"{SCALARS[dtype]}, (asgl::Surrogate){surrogate}, {_bool(hard_reset)}"
    return f"asgl::lif_forward_kernel<{kinds}, {lanes}, (asgl::Input){input}>"


def backward_kernel(
    dtype: torch.dtype, surrogate: int, hard_reset: bool, lanes: int, input: int, steps: int = SEGMENT_STEPS[-1]
) -> str:
    """`steps`: of the sequence."""
    kinds = f"{SCALARS[dtype]}, (asgl::Surrogate){surrogate}, {_bool(hard_reset)}"
    if input == GENERAL:
        return f"asgl::lif_backward_kernel<{kinds}, {lanes}>"
    segment = next((each for each in SEGMENT_STEPS if steps <= each), SEGMENT_STEPS[-1])
    return f"asgl::lif_backward_plain_kernel<{kinds}, {segment}, (asgl::Input){input}>"


def gradient_sum_kernel(real: torch.dtype, whole_block: bool) -> str:
    return f"asgl::gradient_sum_kernel<{SCALARS[real]}, {_bool(whole_block)}>"


# ---- layout ----


class Layout:
    """Where x_seq's dimensions lie in memory, as (outer, steps, inner)."""

    def __init__(self, x_seq: Tensor, time_dim: int) -> None:
        self.time_dim = time_dim
        self.sizes = x_seq.shape
        self.order = list(range(x_seq.dim()))  # all dimensions, outermost first
        extents: Sequence[int] = self.sizes
        if not x_seq.is_contiguous():
            if not is_channels_last(x_seq, time_dim):
                raise ValueError("asgl_cuda: x_seq must be contiguous or channels_last")
            self.order = memory_order(x_seq, time_dim)
            extents = [self.sizes[dim] for dim in self.order]
        place = self.order.index(time_dim)
        self.shape = math.prod(extents[:place]), extents[place], math.prod(extents[place + 1 :])
        self.neurons = self.shape[0] * self.shape[2]

    @property
    def neuron_order(self) -> list[int]:
        """All dimensions but time, outermost first."""
        return [dim for dim in self.order if dim != self.time_dim]

    def dense_sequence(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of x_seq's shape in the order of x_seq's memory."""
        if tensor.shape != self.sizes:
            raise ValueError(f"asgl_cuda: expected shape {list(self.sizes)}, got {list(tensor.shape)}")
        return tensor.permute(self.order).contiguous()

    def dense_state(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of x_seq's shape without time in the order in which neurons are counted."""
        sizes = [size for dim, size in enumerate(self.sizes) if dim != self.time_dim]
        if list(tensor.shape) != sizes:
            raise ValueError(f"asgl_cuda: expected shape {sizes}, got {list(tensor.shape)}")
        return tensor.permute([dim - (dim > self.time_dim) for dim in self.neuron_order]).contiguous()


View = tuple[int, float, int, int, int]  # ParameterView: data, constant, step_stride, inner, count


class ParameterTensor:
    """A parameter laid out as [steps or 1, count], count running over a contiguous range of the neurons' dimensions.

    Dimensions inside that range in which the parameter is broadcast are expanded.
    """

    def __init__(self, tensor: Tensor, layout: Layout) -> None:
        if tensor.numel() == 1:
            self.data = tensor
            self.view: View = (tensor.data_ptr(), 0.0, 0, layout.neurons, 1)
            return
        dims = len(layout.sizes)
        self._sizes = tensor.shape
        full = tensor.reshape((1,) * (dims - tensor.dim()) + tuple(tensor.shape))
        order = layout.neuron_order
        varying = [place for place, dim in enumerate(order) if full.shape[dim] > 1]
        begin, end = (varying[0], varying[-1] + 1) if varying else (len(order), len(order))
        expanded = list(full.shape)
        count = inner = 1
        for place, dim in enumerate(order):
            if begin <= place < end:
                expanded[dim] = layout.sizes[dim]
                count *= layout.sizes[dim]
            elif place >= end:
                inner *= layout.sizes[dim]
        self._order = [layout.time_dim, *order]
        self.data = full.expand(expanded).permute(self._order).contiguous()
        per_step = full.shape[layout.time_dim] > 1
        self.view = (
            self.data.data_ptr(), 0.0, count if per_step else 0, inner if varying else layout.neurons, count,
        )  # fmt: skip

    def gradient_in_own_shape(self, gradient: Tensor) -> Tensor:
        """From the layout of `data` back to the parameter's own shape."""
        if gradient.numel() == 1:
            return gradient
        inverse = [self._order.index(dim) for dim in range(len(self._order))]
        return gradient.permute(inverse).sum_to_size(self._sizes).contiguous()


# ---- which kernel, which grid ----


def blocks_for(work: int, per_block: int) -> int:
    return -(-work // per_block)


def start(launcher: Launcher, device: torch.device, kernel: str, blocks: int, threads: int, params: Structure) -> None:
    """Starts a kernel, unless its grid is too large."""
    if blocks > MOST_BLOCKS:
        raise RuntimeError(f"asgl_cuda: {kernel} would need {blocks} blocks, and a grid has at most {MOST_BLOCKS}")
    launcher.launch(device, kernel, blocks, threads, params)


def address_of(tensor: Tensor | None) -> int:
    """Where its elements begin; 0, which is null, if there are none."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else 0


class _Call:
    """Everything that forward and backward prepare in the same way."""

    def __init__(
        self,
        x_seq: Tensor,
        v_init: Tensor | None,
        rng_state: Tensor | None,
        parameters: Sequence[Tensor | None],
        constants: Sequence[float],
        options: tuple[float, float, bool, bool, bool],  # NeuronOptions
        analog_below: int,
        time_dim: int,
    ) -> None:
        self.layout = layout = Layout(x_seq, time_dim)
        self.real = real_type(x_seq.dtype)
        for tensor in (v_init, *parameters):
            if tensor is not None and (tensor.dtype != self.real or tensor.device != x_seq.device):
                raise ValueError(
                    f"asgl_cuda: parameters and v_init must be {self.real} on {x_seq.device}, got {tensor.dtype} on "
                    f"{tensor.device}"
                )
        numbers = 3 if analog_below == BELOW_IN_STATE else 2
        if analog_below not in (0, DRAWS) and (
            rng_state is None
            or rng_state.dtype != torch.int64
            or rng_state.numel() != numbers
            or rng_state.device != x_seq.device
            or not rng_state.is_contiguous()
        ):
            raise ValueError(f"asgl_cuda: rng_state must be contiguous, int64, of {numbers} elements on {x_seq.device}")
        self.structures = STRUCTURES[self.real]
        self.scalar_bytes = x_seq.element_size()
        self.parameters = [None if each is None else ParameterTensor(each, layout) for each in parameters]
        self.views: list[View] = [
            (0, constant, 0, layout.neurons, 1) if parameter is None else parameter.view
            for constant, parameter in zip(constants, self.parameters, strict=True)
        ]
        self._v_init = None if v_init is None else layout.dense_state(v_init)
        self.common = (
            layout.shape, tuple(self.views), options, (address_of(rng_state), analog_below), address_of(x_seq),
            address_of(self._v_init),
        )  # fmt: skip

    def lanes(self, launcher: Launcher, device: torch.device, scalars: Sequence[int], reals: Sequence[int]) -> int:
        """Neurons a thread: four where these always lie side by side, share all parameters and fill the device.

        `scalars` and `reals` are addresses of sequences and states, by the type of their elements.
        """
        neurons, inner = self.layout.neurons, self.layout.shape[2]
        if self.real == torch.float64 or inner % 4 or any(view[0] and view[3] % 4 for view in self.views):
            return 1
        x_seq, v_init = self.common[-2:]
        if any(address % (4 * self.scalar_bytes) for address in (x_seq, *scalars)):
            return 1
        if any(address % (4 * self.real.itemsize) for address in (v_init, *reals)):
            return 1
        return 4 if neurons // 4 >= launcher.resident_threads(device) // 4 else 1

    def input(self, params: Structure, lanes: int) -> int:
        """As far as it is the same for forward and backward. Numbers are compared as the structure has rounded them."""
        if lanes != 4 or params.options.scale_output or params.options.v_rest != 0:
            return GENERAL
        of_input = self.views[INPUT_GAIN:]
        if any(view[0] and (view[4] != 1 or view[2]) for view in self.views[:INPUT_GAIN]):
            return GENERAL
        if any(view[0] and view[2] for view in of_input):
            return GENERAL
        constants = [params.parameters[id].constant for id in (INPUT_GAIN, INPUT_BIAS, INPUT_MEAN)]
        plain = not any(view[0] for view in of_input) and constants == [1, 0, 0]
        return PLAIN if plain else NORMALISED


class _Partials(NamedTuple):
    """Partial sums of one parameter's gradient."""

    id: int
    sums: Tensor
    slots: int
    gradient: Tensor


class KernelOperators:
    """The three operators, on the kernels of one launcher."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def draw_rng_state(self, fresh: Tensor) -> Tensor:
        return torch.randint(2**63 - 1, (2,), dtype=fresh.dtype, device=fresh.device)

    def lif_forward(
        self,
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
        options = (v_rest, surrogate_gain, strict_threshold, scale_output, False)
        call = _Call(x_seq, v_init, rng_state, parameters, constants, options, analog_below, time_dim)
        real, neurons = call.real, call.layout.neurons

        def none() -> Tensor:
            return x_seq.new_empty(0, dtype=real)

        s_seq = torch.empty_like(x_seq)
        v_last = empty_state(x_seq, time_dim) if return_v_last else none()
        v_seq = torch.empty_like(x_seq, dtype=real) if return_v_seq else none()
        h_seq = torch.empty_like(x_seq, dtype=real) if return_h_seq else none()
        checkpoints = none()
        if keep_checkpoints:
            count = checkpoint_elements(x_seq, time_dim)
            checkpoints = x_seq.new_empty(count, dtype=real)
            checkpoints.narrow(0, count - 2, 2).zero_()
        if neurons:
            outputs = (address_of(s_seq), *map(address_of, (v_last, v_seq, h_seq, checkpoints)))
            params = call.structures.ForwardParams(*call.common, *outputs)
            lanes = call.lanes(self._launcher, x_seq.device, outputs[:1], outputs[1:])
            input = GENERAL if return_v_seq or return_h_seq else call.input(params, lanes)
            kernel = forward_kernel(x_seq.dtype, surrogate, hard_reset, lanes, input)
            self._start(x_seq.device, kernel, blocks_for(neurons, lanes * BLOCK_THREADS), BLOCK_THREADS, params)
        return s_seq, v_last, v_seq, h_seq, checkpoints

    def lif_backward(
        self,
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
        options = (v_rest, surrogate_gain, strict_threshold, scale_output, detach_reset)
        call = _Call(x_seq, v_init, rng_state, parameters, constants, options, analog_below, time_dim)
        real, neurons, device = call.real, call.layout.neurons, x_seq.device
        if checkpoints.dtype != real or checkpoints.numel() != checkpoint_elements(x_seq, time_dim):
            raise ValueError("asgl_cuda: checkpoints do not belong to this x_seq")

        def sequence(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if grad is None else call.layout.dense_sequence(grad.to(dtype))

        s_grad = sequence(grad_s_seq, x_seq.dtype)
        v_grad = sequence(grad_v_seq, real)
        h_grad = sequence(grad_h_seq, real)
        v_last_grad = None if grad_v_last is None else call.layout.dense_state(grad_v_last.to(real))
        grad_x_seq = torch.empty_like(x_seq) if needs_x_seq else x_seq.new_empty(0)
        grad_v_init = empty_state(x_seq, time_dim) if needs_v_init else x_seq.new_empty(0, dtype=real)
        grad_parameters = [
            torch.empty_like(parameter.data) if needed and parameter is not None else x_seq.new_empty(0, dtype=real)
            for parameter, needed in zip(call.parameters, needs_parameters, strict=True)
        ]
        if neurons:
            inputs = [address_of(grad) for grad in (s_grad, v_last_grad, v_grad, h_grad)]
            outputs = [address_of(grad_x_seq), address_of(grad_v_init)]
            lanes = call.lanes(
                self._launcher, device, (inputs[0], outputs[0]), (*inputs[1:], address_of(checkpoints), outputs[1])
            )
            tile = lanes * BLOCK_THREADS
            tiles = blocks_for(neurons, tile)
            partials = []
            addresses = [(0, 0)] * NUM_PARAMETERS
            for id, gradient in enumerate(grad_parameters):
                if needs_parameters[id]:
                    _, _, step_stride, inner, _ = call.views[id]
                    slots = neurons // inner + tiles
                    sums = x_seq.new_empty((x_seq.shape[time_dim] if step_stride else 1, slots), dtype=real)
                    partials.append(_Partials(id, sums, slots, gradient))
                    addresses[id] = (sums.data_ptr(), slots)
            params = call.structures.BackwardParams(
                *call.common, *inputs, address_of(checkpoints), *outputs, tuple(addresses)
            )
            general = (
                v_grad is not None
                or h_grad is not None
                or any(each.id not in (WIDTH, INPUT_GAIN, INPUT_BIAS) for each in partials)
            )
            input = GENERAL if general else call.input(params, lanes)
            kernel = backward_kernel(x_seq.dtype, surrogate, hard_reset, lanes, input, x_seq.shape[time_dim])
            self._start(device, kernel, tiles, BLOCK_THREADS, params)
            for each in partials:
                self._launch_gradient_sum(device, call, each, tile)
        elif any(needs_parameters):
            for gradient in grad_parameters:
                gradient.zero_()
        grad_parameters = [
            parameter.gradient_in_own_shape(gradient) if needed and parameter is not None else gradient
            for parameter, needed, gradient in zip(call.parameters, needs_parameters, grad_parameters, strict=True)
        ]
        return grad_x_seq, grad_v_init, grad_parameters

    def _launch_gradient_sum(self, device: torch.device, call: _Call, partials: _Partials, tile: int) -> None:
        """From the partial sums to the gradient: a thread for each element, or a block where each has many slots."""
        id, sums, slots, gradient = partials
        view = call.views[id]
        _, _, _, inner, count = view
        params = call.structures.GradientSum(
            (sums.data_ptr(), slots), view, call.layout.shape, tile, id == WIDTH, gradient.data_ptr()
        )
        most_tiles = (inner + tile - 2) // tile + 1
        whole_block = call.layout.neurons // (inner * count) * most_tiles >= MANY_SLOTS
        elements = gradient.numel()
        blocks = elements if whole_block else blocks_for(elements, SUM_THREADS)
        self._start(device, gradient_sum_kernel(call.real, whole_block), blocks, SUM_THREADS, params)

    def _start(self, device: torch.device, kernel: str, blocks: int, threads: int, params: Structure) -> None:
        start(self._launcher, device, kernel, blocks, threads, params)
