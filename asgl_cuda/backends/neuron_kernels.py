"""The operators of the neuron on CUDA kernels launched by a `Launcher`: csrc's operators in Python.

A launcher starts a kernel by name. As in the compiled launchers, kernel, neurons per thread and grid size are chosen
here. Arguments have been checked in `lif`; the checks repeated here keep kernels within bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import Structure
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layout import CHECKPOINT_STEPS, Layout, ParameterTensor, checkpoint_elements, real_type
from ..ops import BackwardResult, ForwardResult, empty_gradients, empty_outputs, with_gaps
from ..reference import BELOW_IN_STATE, DRAWS, Numbers, Parameters, Rules
from .structures import constant, structure

BY_OPTIONS = "asgl::LIFByOptions"  # the model of general kernels, and of neurons without settled ones
# Enumerators of csrc's Input.
GENERAL, NORMALISED, PLAIN, APART = "kGeneral", "kNormalised", "kPlain", "kApart"
GENERAL_RESIDUAL, NORMALISED_RESIDUAL = "kGeneralResidual", "kNormalisedResidual"
ANY_INPUT = GENERAL, GENERAL_RESIDUAL  # inputs of general kernels

SCALARS = {
    torch.float32: "float", torch.float64: "double", torch.float16: "asgl::Half", torch.bfloat16: "asgl::BFloat16",
}  # fmt: skip


class Launcher(Protocol):
    """Launches kernels on devices."""

    def resident_threads(self, device: torch.device) -> int:
        """Maximum resident threads."""

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: Structure) -> None:
        """Launches a kernel, named by a C++ expression, on the device's current stream."""


def as_bool(value: object) -> str:
    """A literal of C++."""
    return "true" if value else "false"


def model(rules: Rules) -> str:
    """The type in csrc for neurons with these rules, as with_model of csrc/launch.h chooses."""
    if rules.multi_spike or rules.floored or rules.adaptation:
        return BY_OPTIONS
    return f"asgl::LIF<(asgl::Surrogate){rules.surrogate}, {as_bool(rules.hard_reset)}>"


def forward_kernel(dtype: torch.dtype, model: str, lanes: int, input: str, steps: int = CHECKPOINT_STEPS) -> str:
    """`lanes`: neurons a thread; `input`: an enumerator of Input; `steps`: the length of the sequence."""
    input, exact = _compiled(lanes, input, steps)
    if input in ANY_INPUT:
        model = f"{BY_OPTIONS}<{SCALARS[real_type(dtype)]}>"
    return f"asgl::lif_forward_kernel<{SCALARS[dtype]}, {model}, {lanes}, {_input(input)}, {exact}>"


def backward_kernel(dtype: torch.dtype, model: str, lanes: int, input: str, steps: int = CHECKPOINT_STEPS) -> str:
    """Arguments as for `forward_kernel`."""
    input, exact = _compiled(lanes, input, steps)
    if input in ANY_INPUT:
        return f"asgl::lif_backward_kernel<{SCALARS[dtype]}, {lanes}, {_input(input)}>"
    return f"asgl::lif_backward_settled_kernel<{SCALARS[dtype]}, {model}, {lanes}, {_input(input)}, {exact}>"


def _compiled(lanes: int, input: str, steps: int) -> tuple[str, int]:
    """The input of a kernel, and steps if fixed, else 0.

    For one neuron per thread the normalised kernel computes plain input, and the general one input with a residual.
    """
    if lanes == 1:
        input = {PLAIN: NORMALISED, NORMALISED_RESIDUAL: GENERAL_RESIDUAL}.get(input, input)
    short = constant("kShortSequence")
    return input, short if steps == short and lanes == 4 and input not in ANY_INPUT else 0


def _input(input: str) -> str:
    return f"(asgl::Input){constant(f'Input::{input}')}"


def adaptive_kernel(dtype: torch.dtype, direction: str) -> str:
    """`direction`: forward or backward."""
    return f"asgl::adaptive_{direction}_kernel<{SCALARS[dtype]}>"


def gradient_sum_kernel(real: torch.dtype) -> str:
    return f"asgl::gradient_sum_kernel<{SCALARS[real]}>"


def blocks_for(work: int, per_block: int) -> int:
    return -(-work // per_block)


def largest_power(most: int) -> int:
    """The largest power of two up to `most`."""
    return 1 << (most.bit_length() - 1)


def _divisor(by: int) -> tuple[int, int, int]:
    """The fields of csrc's Divisor."""
    shift = 31 + (by - 1).bit_length()
    return by, (1 << shift) // by + 1, shift


def _differs(view: Structure) -> bool:
    """Whether a parameter differs within groups of four neurons."""
    return bool(view.data and view.inner % 4)


def repeats_in(view: Structure, tile: int) -> bool:
    """ParameterView::repeats_in of csrc: a tile stores one sum for each value."""
    return bool(view.inner == 1 and 2 * view.count <= tile)


def _division(view: Structure, values: int, tile: int, elements: int) -> tuple[int, ...]:
    """The fields of csrc's GradientPart from elements_each to blocks."""
    threads, runs = constant("kSumThreads"), values // (view.inner * view.count)
    slots = (view.inner + tile - 2) // tile + 1
    if slots >= constant("kManySlots"):
        elements_each, slots_each = 1, largest_power(min(slots, threads))
        runs_each = threads // slots_each
    else:
        enough = blocks_for(constant("kManyThreads"), elements)
        runs_each, slots_each = largest_power(min(runs, constant("kMostRunsEach"), enough)), 1
        elements_each = threads // runs_each
        several = constant("kElementsEach")
        few = view.inner == 1 and not view.step_stride and runs <= constant("kFewRuns")
        if few and view.count >= several * constant("kManyThreads"):
            elements_each = several * threads
    splits = blocks_for(runs, runs_each * constant("kSingleRuns" if view.inner == 1 else "kRuns"))
    splits = min(splits, constant("kMostSplits")) if splits > 2 else 1
    return elements_each, runs_each, slots_each, splits, blocks_for(elements, elements_each)


def address_of(tensor: Tensor | None) -> int:
    """The pointer to the elements; 0, null, if empty."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else 0


def filled(name: str, real: torch.dtype | None, **members: Any) -> Structure:
    """The structure `name`, with pointers to tensors; None is null."""
    for member, value in members.items():
        if value is None or isinstance(value, Tensor):
            members[member] = address_of(value)
    return structure(name, real)(**members)


def is_aligned(tensor: Tensor | None) -> bool:
    """Whether the pointer is aligned for four elements."""
    return tensor is None or address_of(tensor) % (4 * tensor.element_size()) == 0


def check_type(tensor: Tensor | None, dtype: torch.dtype, x_seq: Tensor, name: str) -> None:
    """Refuses a tensor of another type, or on another device than x_seq."""
    if tensor is not None and (tensor.dtype != dtype or tensor.device != x_seq.device):
        raise ValueError(f"asgl_cuda: {name} must be {dtype} on {x_seq.device}, got {tensor.dtype} on {tensor.device}")


class KernelOperators:
    """Operators on the kernels of one launcher."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def start(self, device: torch.device, kernel: str, blocks: int, params: Structure, threads: int = 0) -> None:
        """Starts a kernel, by default with kBlockThreads threads a block, unless its grid is too large."""
        most = constant("kMostBlocks")
        if blocks > most:
            raise RuntimeError(f"asgl_cuda: {kernel} would need {blocks} blocks, and a grid has at most {most}")
        self.launcher.launch(device, kernel, blocks, threads or constant("kBlockThreads"), params)


class Call:
    """Preparation shared by forward and backward."""

    def __init__(self, x_seq: Tensor, *others: Any) -> None:
        v_init, rng_state, (*parameters, residual), numbers, rules = others
        self.rules = Rules(*rules)
        self.model = model(self.rules)
        self.layout = layout = Layout(x_seq, self.rules.time_dim)
        self.real = real_type(x_seq.dtype)
        for tensor in (v_init, *parameters):
            check_type(tensor, self.real, x_seq, "v_init and parameters")
        check_type(residual, x_seq.dtype, x_seq, "residual")
        elements = 3 if self.rules.analog_below == BELOW_IN_STATE else 2
        if (rng_state is not None or self.rules.analog_below not in (0, DRAWS)) and (
            rng_state is None
            or rng_state.dtype != torch.int64
            or rng_state.numel() != elements
            or rng_state.device != x_seq.device
            or not rng_state.is_contiguous()
        ):
            raise ValueError(
                f"asgl_cuda: rng_state must be contiguous, int64, of {elements} elements on {x_seq.device}"
            )
        self.x_seq, self.rng_state = x_seq, rng_state
        self.v_init = None if v_init is None else layout.dense_state(v_init, self.rules.members())
        self.residual = None if residual is None else layout.dense_sequence(residual)
        tensors = (None if each is None else ParameterTensor(each, layout) for each in parameters)
        self.tensors = dict(zip(Parameters._fields, tensors, strict=False))
        for learned, tensor in (
            (self.rules.log_width, self.tensors["width"]), (self.rules.logit_decay, self.tensors["decay"])
        ):  # fmt: skip
            if learned and (tensor is None or tensor.step_stride):
                raise ValueError(
                    "asgl_cuda: a logarithm of the width and a logit of the decay are tensors without steps"
                )
        given = {**Numbers(*numbers)._asdict(), **self.rules._asdict()}
        self.residual_gain = given["residual_gain"]
        self.views = [self._view(tensor, given[name]) for name, tensor in self.tensors.items()]
        options = structure("LIFByOptions", self.real)
        self.options = options(**{name: given[name] for name, *_ in options._fields_})

    def _view(self, parameter: ParameterTensor | None, number: float) -> Structure:
        view = structure("ParameterView", self.real)
        if parameter is None:
            return view(constant=number, inner=self.layout.neurons, count=1)
        inner, count = parameter.inner, parameter.count
        return view(parameter.data.data_ptr(), step_stride=parameter.step_stride, inner=inner, count=count)

    def derivative(self, name: str) -> str:
        """The enumerator of csrc's Derivative: the factor between partial sums and the parameter's gradient."""
        if name == "width":
            return "kOfLogWidth" if self.rules.log_width else "kOfWidth"
        return "kOfLogitDecay" if name == "decay" and self.rules.logit_decay else "kNone"

    def params(self, name: str, tiles: tuple[int, int], **others: Any) -> Structure:
        """The structure `name`, with the fields common to all kernels and `others`."""
        noise = address_of(self.rng_state), self.rules.analog_below
        summary = self._summary(others.get("partials", ()))
        return filled(
            name, self.real, shape=self.layout.shape, parameters=tuple(self.views), options=self.options, noise=noise,
            tiles=tiles, summary=summary, v_init=self.v_init, residual=self.residual, residual_gain=self.residual_gain,
            **{"x_seq": self.x_seq, **others},
        )  # fmt: skip

    def _summary(self, partials: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
        """The fields of csrc's ParameterSummary."""

        def bits(those: Iterable[object]) -> int:
            return sum(1 << id for id, belongs in enumerate(those) if belongs)

        tensors, wanted = bits(view.data for view in self.views), bits(address for address, _ in partials)
        if self.layout.neurons >= constant("kDivisible"):
            return 0, wanted
        divided = [(view.inner, view.count) for view in self.views]
        ways = list(dict.fromkeys(each for each in divided if each[1] > 1)) or [(1, 1)]
        strides = tuple(int(view.count > 1) for view in self.views)
        alike = len(ways) == 1
        common, *own = (tuple(map(_divisor, each)) for each in (ways[0], *(() if alike else divided)))
        by_neuron = bits(view.count > 1 and view.inner == 1 for view in self.views)
        return tensors, wanted, alike, by_neuron, common, strides, tuple(own)

    def empty_gradients(self, wanted: Sequence[bool]) -> list[Any]:
        """Uninitialised gradients of x_seq, v_init, each parameter, laid out as `data`, and the residual.

        None: not wanted.
        """
        laid_out = [*(None if each is None else each.data for each in self.tensors.values()), self.residual]
        asked = *wanted[:2], *(wants and each is not None for wants, each in zip(wanted[2:], laid_out, strict=True))
        found = empty_gradients(self.x_seq, self.rules.time_dim, laid_out, wanted, self.rules.members())
        return with_gaps(found, asked)

    def results(self, gradients: Sequence[Tensor | None]) -> BackwardResult:
        """The wanted gradients, parameters' in their own shapes."""
        front, parameters, last = gradients[:2], gradients[2:-1], gradients[-1:]
        if not self.layout.neurons:
            for gradient in parameters:
                if gradient is not None:
                    gradient.zero_()
        return (
            [each for each in front if each is not None]
            + [
                tensor.gradient_in_own_shape(gradient)
                for tensor, gradient in zip(self.tensors.values(), parameters, strict=True)
                if tensor is not None and gradient is not None
            ]
            + [each for each in last if each is not None]
        )

    def plan_tiles(
        self, launcher: Launcher, input: str, *tensors: Tensor | None, apart: bool = False
    ) -> tuple[int, tuple[int, int]]:
        """Lanes, and NeuronTiles: four lanes if adjacent neurons' parameters allow it, and it pays.

        `tensors` are the sequences and states beside x_seq, v_init and the residual; `apart`: there are kernels for
        neurons with parameters of their own.
        """
        fours = (
            self.real != torch.float64
            and not self.rules.adaptation
            and self.layout.inner % 4 == 0
            and (self._share_parameters() or (apart and self._differ_adjacently(input)))
            and all(is_aligned(each) for each in (self.x_seq, self.v_init, self.residual, *tensors))
            and self._fours_pay(launcher.resident_threads(self.x_seq.device), input)
        )
        lanes = 4 if fours else 1
        tile = lanes * constant("kBlockThreads")
        return lanes, (tile, blocks_for(self.layout.neurons, tile))

    def kernel_input(self, lanes: int, input: str) -> str:
        """The input of the kernel, once it is known how many neurons a thread has."""
        return APART if lanes == 4 and not self._share_parameters() else input

    def _share_parameters(self) -> bool:
        """Whether groups of four neurons share all parameters."""
        return not any(map(_differs, self.views))

    def _differ_adjacently(self, input: str) -> bool:
        """Whether parameters that groups of four neurons do not share are the neuron's own, adjacent and aligned."""
        return input in (NORMALISED, PLAIN) and all(
            view.inner == 1 and view.count % 4 == 0 and view.data % (4 * self.real.itemsize) == 0
            for view in self.views
            if _differs(view)
        )

    def _fours_pay(self, resident: int, input: str) -> bool:
        if input in ANY_INPUT:
            return self.layout.neurons // 4 >= resident // 4
        few = constant("kFewSixteenths") * resident // 16
        return self.layout.steps <= CHECKPOINT_STEPS or self.layout.neurons > few

    def input(self, only_spikes: bool) -> str:
        """The input that a kernel may assume.

        Constants are compared as rounded by the structures.
        """
        input = self._own_input(only_spikes)
        if self.residual is None:
            return input
        return GENERAL_RESIDUAL if input == GENERAL else NORMALISED_RESIDUAL

    def _own_input(self, only_spikes: bool) -> str:
        """The same without a residual."""
        if not only_spikes or self.options.scale_output or self.options.v_rest != 0 or self.model == BY_OPTIONS:
            return GENERAL
        if any(view.data and view.step_stride for view in self.views) or self.layout.neurons >= constant("kDivisible"):
            return GENERAL
        gain, bias, mean = terms = self.views[4:]
        plain = not any(view.data for view in terms) and (gain.constant, bias.constant, mean.constant) == (1, 0, 0)
        return PLAIN if plain else NORMALISED


class NeuronKernelOperators(KernelOperators):
    """Operators whose backward kernels leave partial sums of the parameters' gradients."""

    def start_backward(
        self,
        call: Call,
        kernel: str,
        name: str,
        tiles: tuple[int, int],
        gradients: Sequence[Tensor | None],
        **members: Any,
    ) -> None:
        """Starts a backward kernel with the structure `name`, and reduces its partial sums to the gradients."""
        grad_x_seq, grad_v_init, *grad_parameters, _ = gradients
        tile, blocks = tiles
        rows = [call.layout.steps if view.step_stride else 1 for view in call.views]
        runs = [call.layout.neurons // view.inner + (blocks if view.inner > 1 else 0) for view in call.views]
        slots = [4 * blocks_for(each, 4) for each in runs]
        sums = [
            None if gradient is None else gradient.new_empty(size)
            for gradient, *size in zip(grad_parameters, rows, slots, strict=True)
        ]
        partials = tuple((address_of(each), 0 if each is None else each.shape[1]) for each in sums)
        params = call.params(name, tiles, grad_x_seq=grad_x_seq, grad_v_init=grad_v_init, partials=partials, **members)
        self.start(call.x_seq.device, kernel, blocks, params)
        self._sum(call, partials, tile, grad_parameters)

    def _sum(self, call: Call, partials: Sequence[Any], tile: int, gradients: Sequence[Tensor | None]) -> None:
        """Reduces partial sums to the gradients, by a second launch where runs are split."""
        part, row_of = structure("GradientPart", call.real), structure("ParameterView", call.real)
        first, second, totals = [], [], []
        for name, partial, view, gradient in zip(call.tensors, partials, call.views, gradients, strict=True):
            if gradient is None:
                continue
            to = constant(f"Derivative::{call.derivative(name)}"), address_of(gradient)
            values, elements = call.layout.neurons, gradient.numel()
            if repeats_in(view, tile):
                values = blocks_for(values, tile) * view.count
            first.append(part(partial, view, *to, values, *_division(view, values, tile, elements)))
            if first[-1].splits > 1:
                total = gradient.new_empty(first[-1].splits * elements)
                totals.append(total)
                first[-1].totals = address_of(total)
                row, values = row_of(view.data, inner=1, count=elements), total.numel()
                second.append(part((address_of(total), values), row, *to, values, *_division(row, values, 1, elements)))
        for parts, unit in ((first, tile), (second, 1)):
            if parts:
                params = filled(
                    "GradientSum", call.real, shape=call.layout.shape, tile=unit, count=len(parts), parts=tuple(parts)
                )
                blocks = sum(each.splits * each.blocks for each in parts)
                self.start(call.x_seq.device, gradient_sum_kernel(call.real), blocks, params, constant("kSumThreads"))


class NeuronOperators(NeuronKernelOperators):
    """The operators of the neuron."""

    def draw_rng_state(self, fresh: Tensor) -> Tensor:
        return torch.randint(2**63 - 1, (2,), dtype=fresh.dtype, device=fresh.device)

    def lif_forward(self, x_seq: Tensor, *others: Any) -> ForwardResult:
        *shared, wanted = others
        call = Call(x_seq, *shared)
        outputs = empty_outputs(x_seq, call.rules.time_dim, wanted, call.rules.members())
        s_seq, v_last, v_seq, h_seq, checkpoints = with_gaps(outputs, (True, *wanted))
        if call.layout.neurons:
            input = call.input(v_seq is None and h_seq is None)
            lanes, tiles = call.plan_tiles(self.launcher, input, *outputs, apart=True)
            zeros = 0
            if checkpoints is not None:
                zeros = address_of(checkpoints) + (checkpoints.numel() - 2) * checkpoints.element_size()
            params = call.params(
                "ForwardParams", tiles, s_seq=s_seq, v_last=v_last, v_seq=v_seq, h_seq=h_seq, checkpoints=checkpoints,
                zeros=zeros,
            )  # fmt: skip
            kernel = forward_kernel(x_seq.dtype, call.model, lanes, call.kernel_input(lanes, input), call.layout.steps)
            if call.rules.adaptation:
                kernel = adaptive_kernel(x_seq.dtype, "forward")
            self.start(x_seq.device, kernel, params.tiles.count, params)
        elif checkpoints is not None:
            checkpoints.zero_()
        return outputs

    def lif_backward(self, grads: Sequence[Tensor | None], x_seq: Tensor, *others: Any) -> BackwardResult:
        v_init, rng_state, checkpoints, *packed, wanted = others
        call = Call(x_seq, v_init, rng_state, *packed)
        layout, real, time_dim, members = call.layout, call.real, call.rules.time_dim, call.rules.members()
        check_type(checkpoints, real, x_seq, "checkpoints")
        if not checkpoints.is_contiguous() or checkpoints.numel() != checkpoint_elements(x_seq, time_dim, members):
            raise ValueError("asgl_cuda: checkpoints do not belong to this x_seq")

        def dense_state(tensor: Tensor) -> Tensor:
            return layout.dense_state(tensor, members)

        dense = layout.dense_sequence, dense_state, layout.dense_sequence, layout.dense_sequence
        for grad, dtype in zip(grads, (x_seq.dtype, real, real, real), strict=True):
            check_type(grad, dtype, x_seq, "a gradient")
        grad_s_seq, grad_v_last, grad_v_seq, grad_h_seq = grads = [
            None if grad is None else laid(grad) for grad, laid in zip(grads, dense, strict=True)
        ]
        gradients = grad_x_seq, grad_v_init, *grad_parameters, grad_residual = call.empty_gradients(wanted)
        if layout.neurons:
            both = grad_s_seq is not None and (grad_x_seq is not None or grad_residual is not None)
            *_, grad_input_mean = grad_parameters
            input = call.input(both and grad_v_seq is None and grad_h_seq is None and grad_input_mean is None)
            lanes, tiles = call.plan_tiles(
                self.launcher, input, *grads, checkpoints, grad_x_seq, grad_v_init, grad_residual, apart=True
            )  # fmt: skip
            kernel = backward_kernel(x_seq.dtype, call.model, lanes, call.kernel_input(lanes, input), layout.steps)
            if call.rules.adaptation:
                kernel = adaptive_kernel(x_seq.dtype, "backward")
            self.start_backward(
                call, kernel, "BackwardParams", tiles, gradients, grad_s_seq=grad_s_seq, grad_v_last=grad_v_last,
                grad_v_seq=grad_v_seq, grad_h_seq=grad_h_seq, checkpoints=checkpoints, grad_residual=grad_residual,
            )  # fmt: skip
        return call.results(gradients)
