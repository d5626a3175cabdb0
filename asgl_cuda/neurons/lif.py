"""Leaky integrate-and-fire neurons: `lif`, its derivative, and the layer `LIF`.

`lif` calls `run_lif`. `checked_call` (calls/plan.py) checks the arguments, makes a plan, chooses the backend and draws
rng_state. Then `run_reference` computes under autograd, or `run_forward` calls the backend's operator, inside
LIFFunction if a gradient is needed. Backward draws the same noise again from rng_state, so no mask is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from inspect import signature
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..backends import BACKENDS, backend_of, operators_of
from ..backends.derivatives import DERIVATIVES
from ..backends.ops import ForwardResult, none_for_unwanted
from ..calls import recompute
from ..calls.arguments import Arguments
from ..calls.plan import Call, Inputs, Plan, checked_call, last_states, make_plan
from ..checks import (
    PLAIN_TENSORS,
    accept_none,
    check_analog_prob,
    check_bool,
    check_input,
    check_keywords,
    check_levels,
    check_rng_state,
    format_value,
    read_finite,
)
from ..reference.neurons import lif_reference
from ..reference.noise import analog_mask_below
from ..reference.records import Numbers, Parameters, Rules
from ..torch_modes import (
    apply,
    apply_at_one_level,
    is_differentiated,
    is_transform_active,
    needs_zero_gradients,
    once_differentiable,
    saved_tensors,
)
from .base import Granularity, NeuronLayer
from .deferred import Pending, tensor_of
from .spiking import Neurons

_CALLER = "asgl_cuda.lif"


class LIFOutput(NamedTuple):
    """The result of `lif` if potentials are asked for. Fields that were not asked for are None.

    `s_seq` (spikes), `v_seq` (potential after the reset of each step) and `h_seq` (potential before the reset) have the
    shape of x_seq. `v_last`, the potential after the last step, has the shape of x_seq without time. Potentials are
    float64 for a float64 input, and float32 otherwise.
    """

    s_seq: Tensor
    v_last: Tensor | None
    v_seq: Tensor | None
    h_seq: Tensor | None


def lif(
    x_seq: Tensor,
    *,
    decay: Tensor | float = 0.5,
    v_threshold: Tensor | float = 1.0,
    v_reset: Tensor | float | None = 0.0,
    reset_amount: Tensor | float | None = None,
    width: Tensor | float = 1.0,
    surrogate: str = "sigmoid",
    surrogate_gain: float = 1.0,
    analog_prob: Tensor | float = 0.0,
    rng_state: Tensor | None = None,
    generator: torch.Generator | None = None,
    v_rest: float = 0.0,
    input_gain: Tensor | float = 1.0,
    input_bias: Tensor | float = 0.0,
    input_mean: Tensor | float = 0.0,
    residual: Tensor | None = None,
    residual_gain: float = 1.0,
    strict_threshold: bool = False,
    scale_output: bool = False,
    detach_reset: bool = False,
    levels: int | None = None,
    multi_spike: bool = False,
    v_min: float | None = None,
    v_init: Tensor | None = None,
    time_dim: int = 0,
    return_v_last: bool = False,
    return_v_seq: bool = False,
    return_h_seq: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | LIFOutput:
    """Leaky integrate-and-fire neurons with adaptive smoothing gradients (ASGL), over a whole sequence.

    Args:
        x_seq: input, `[T, ...]`, or with time at `time_dim`; float16, bfloat16, float32 or float64. An input that is
            neither contiguous nor channels_last is copied once.
        decay: fraction of the potential, measured from v_rest, that is left after a step (no unit, per step). Any
            number is allowed.
        v_threshold, v_rest: threshold and resting potential, in units of x_seq.
        v_reset: potential after a spike (hard reset), or None for the soft reset.
        reset_amount: amount that a spike subtracts under the soft reset; default `v_threshold`.
        width: width of the surrogate, > 0 (in float32 at least 1.1e-19), in units of x_seq. Values of a tensor are not
            checked if the tensor is on a GPU, because a check would synchronise the device. Values are also not checked
            in compiled code, or if torch.func transforms the tensor. A width < 0 that is not checked gives gradients of
            x_seq with the wrong sign, and a width of 0 gives gradients that are NaN.
        surrogate: the name of the surrogate F, a function that rises from 0 to 1: rectangle, triangle, sigmoid, arctan,
            erf, fast_sigmoid or laplace. In backward, the derivative of F(u / width) replaces the derivative of the
            spike. Here u is the potential before the reset minus the threshold. With `multi_spike` the name may also be
            periodic_exponential, whose slope peaks at the threshold and at the multiples of the threshold above it.
            With levels and without multi_spike, the surrogate must be sigmoid or rectangle, and has no effect.
        surrogate_gain: factor on the surrogate gradient.
        analog_prob: random fraction of elements that emit the smooth value F(u / width) instead of 0 or 1. These
            elements are called analog. An element is one neuron at one time step. The fraction is rounded to a multiple
            of 1 / 65536. Default 0; the default of the layer `LIF` is 0.5. analog_prob may also be a tensor of one
            value on x_seq's device, which gets no gradient. A compiled graph is not compiled again if this value
            changes. A tensor that is not checked (see width) is clamped to [0, 1], and NaN counts as 0.
        rng_state: int64 tensor `[seed, offset]` on x_seq's device. It determines which elements are analog.
        generator: generator that draws rng_state if rng_state is not given; default the device's default generator.
            With activation checkpointing, pass rng_state instead, because checkpointing restores only default
            generators.
        input_gain, input_bias, input_mean: the input current is `input_gain * (x_seq - input_mean) + input_bias`.
        residual: shortcut of a residual block, in shape and type of x_seq. `residual_gain * residual` is added to the
            input current, and the sum is not stored in memory. A residual whose memory order is not that of x_seq is
            copied once.
        residual_gain: factor on the residual, a number.
        strict_threshold: fire at u > 0 instead of u >= 0. This has no effect with levels or multi_spike.
        scale_output: multiply the output by `v_threshold`. With levels and without multi_spike, divide it by `levels`
            instead.
        detach_reset: stop the gradient that flows through the spike in the reset. Default False; the default of the
            layers is True. If this gradient is not stopped, gradients can explode over many steps: see the guide
            "Choosing width, surrogate and noise".
        levels: emit an integer number of spikes per step (I-LIF), `round(clamp(h / v_threshold, 0, levels))` with ties
            to even, where h is the potential before the reset. `levels` is at most 256. An analog element (see
            `analog_prob`) emits `clamp(h / v_threshold, 0, levels)` without rounding. In backward the slope is
            `1 / v_threshold` where `0 <= h <= levels * v_threshold`, and 0 elsewhere. `width` must be 1. Each spike
            subtracts `reset_amount`, so `v_reset` must be None. `v_threshold` must be > 0. `unroll_levels` turns
            integer spikes into binary spikes. With multi_spike, levels only limits the number of spikes.
        multi_spike: emit `trunc(h / v_threshold)` spikes per step where h > 0. Each spike subtracts `reset_amount`, so
            `v_reset` must be None. `v_threshold` must be > 0; a tensor of thresholds is checked in the same cases as a
            tensor of widths. `analog_prob` must be 0.
        v_min: lower bound of the potential after the reset, in units of x_seq, `v = relu(v - v_min) + v_min`. If v is
            at `v_min` after a step, no gradient flows back through this v. The bound does not apply to v_init.
        v_init: potential before the first step, in the shape of x_seq without time; default `v_rest`.
        return_v_last, return_v_seq, return_h_seq: return potentials as well, see `LIFOutput`.
        backend: one of `available_backends()`; default the best for x_seq's device.

    `width`, `decay`, `v_threshold`, `v_reset`, `reset_amount` and `input_*` are floats or tensors that broadcast
    against x_seq. For an x_seq of shape `[T, B, C, H, W]`, such a tensor may have one value, or the shape `[C, 1, 1]`,
    `[C, H, W]` or `[T, 1, 1, 1, 1]`, for example. These parameters and `v_init` are converted to the type of the
    arithmetic, which is float64 for a float64 x_seq and float32 otherwise.

    If the potential of an element is NaN, the element emits NaN with `levels` or `multi_spike`, or if it is analog.
    Otherwise the element emits 0.

    Returns:
        The spikes, in shape and type of x_seq, or a `LIFOutput` if a potential was asked for. All outputs are
        differentiable once with respect to x_seq, residual, v_init and every parameter that is a tensor, except
        analog_prob.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or range.
        RuntimeError: the requested backend does not work here. Also raised for forward-mode differentiation and, in
            backward, for a second derivative, unless the backend is "reference".

    Example::

        x_seq = torch.randn(4, 32, 128, requires_grad=True)  # [T, B, N]
        width = torch.ones(128, requires_grad=True)  # one for each neuron
        s_seq = asgl_cuda.lif(x_seq, width=width, analog_prob=0.2)  # [4, 32, 128]
        s_seq.mean().backward()  # x_seq.grad [4, 32, 128], width.grad [128]

        output = asgl_cuda.lif(x_seq, return_v_last=True)
        more = asgl_cuda.lif(x_seq, v_init=output.v_last)  # continues from the end of the first call

    Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023.
    periodic_exponential: Weidel, Sheik: WaveSense, arXiv 2111.01456. levels: Luo, Yao, Chou, Xu, Li: Integer-Valued
    Training and Spike-Driven Inference Spiking Neural Network for High-performance and Energy-efficient Object
    Detection, ECCV 2024. Analog elements with levels: Fan et al.: Quant-Noise, ICLR 2021.

    The same in PyTorch, for the defaults and a mask of analog elements::

        v = torch.zeros_like(x_seq[0])
        slope = 1 / torch.as_tensor(width, dtype=x_seq.dtype)
        for t in range(T):
            h = decay * v + x_seq[t]
            a = ((h - v_threshold) * slope).sigmoid()
            z = (h >= v_threshold).to(h)
            s[t] = a + torch.where(mask[t], 0, z - a).detach()
            v = h * (1 - s[t]) + v_reset * s[t]

    With the surrogate rectangle, `a = ((h - v_threshold) * slope + 0.5).clamp(0, 1)`. In float32, spikes and input
    gradients are then bit-identical to this loop. With levels, `a = (h * (1 / v_threshold)).clamp(0, levels)`,
    `z = a.round()` and `v = h - reset_amount * s[t]`. With multi_spike, v is computed as with levels, and
    `z = (h > 0) * (h / v_threshold).trunc()`, at most `levels` if given. The surrogate periodic_exponential is laplace,
    but where `h >= v_threshold`, it is applied to `v_threshold * (2 * (h / v_threshold - 0.5).remainder(1) - 1)`
    instead of `h - v_threshold`. In backward, both have the derivatives of `h - v_threshold`.
    """
    if unknown:
        check_keywords(unknown, LIF_DEFAULTS, _CALLER)
    given: Arguments = {
        "decay": decay, "v_threshold": v_threshold, "v_reset": v_reset, "reset_amount": reset_amount, "v_rest": v_rest,
        "width": width, "surrogate": surrogate, "surrogate_gain": surrogate_gain, "analog_prob": analog_prob,
        "rng_state": rng_state, "generator": generator, "input_gain": input_gain, "input_bias": input_bias,
        "input_mean": input_mean, "residual": None if residual is None else tensor_of(residual, _CALLER),
        "residual_gain": residual_gain, "strict_threshold": strict_threshold, "scale_output": scale_output,
        "detach_reset": detach_reset, "levels": levels, "multi_spike": multi_spike, "v_min": v_min, "v_init": v_init,
        "time_dim": time_dim, "return_v_last": return_v_last, "return_v_seq": return_v_seq,
        "return_h_seq": return_h_seq, "backend": backend,
    }  # fmt: skip
    return run_lif(_CALLER, tensor_of(x_seq, _CALLER), given)


LIF_DEFAULTS: Arguments = lif.__kwdefaults__ or {}  # type: ignore[assignment]


def run_lif(caller: str, x_seq: Tensor, given: Arguments, output_type: Any = LIFOutput) -> Tensor | Any:
    """The result of `lif`, or of neurons with more states: the spikes, or an `output_type` with the potentials."""
    backend, plan, inputs = call = checked_call(caller, x_seq, given)
    if BACKENDS[backend].operators is None:
        outputs = run_reference(plan, inputs)
    elif not is_differentiated(inputs, caller):
        outputs = run_forward(backend, plan, inputs, keep_checkpoints=False)
    elif recompute.open_contexts or recompute.traced_contexts:
        take = partial(remember_call, call, inputs)
        outputs = recompute.apply_and_remember(apply, LIFFunction, (None, backend, plan, *inputs), take)
    else:
        outputs = apply(LIFFunction, None, backend, plan, *inputs)
    return requested_output(plan, outputs, output_type)


def run_lif_after_norm(
    pending: Pending, layer: Any, caller: str, given: Arguments, update: bool = True
) -> Tensor | LIFOutput:
    """Computes `lif` for `layer` after a normalisation: both in one call if possible, otherwise one after the other."""
    value = pending.value_unless_merged(layer, given, update)
    if value is None:
        return pending.run_merged(layer, given, update)  # type: ignore[no-any-return]
    return run_lif(caller, value, given)


def requested_output(plan: Plan, outputs: Sequence[Tensor], output_type: Any = LIFOutput) -> Tensor | Any:
    """The spikes, the first of `outputs`, or if others are wanted, an `output_type` with all of them by name."""
    if True not in plan.wanted:
        return outputs[0]
    found = none_for_unwanted(outputs, (True, *plan.wanted))
    if len(plan.states) == 1:  # by position, as names take 0.6 us
        return LIFOutput(*found)
    s_seq, last, v_seq, h_seq = found
    return output_type(s_seq=s_seq, v_seq=v_seq, h_seq=h_seq, **last_states(plan, last))


def run_reference(plan: Plan, inputs: Inputs) -> list[Tensor]:
    """Runs the reference. Returns the spikes and the wanted potentials."""
    x_seq, v_init, rng_state, *parameters = inputs
    s_seq, *potentials = lif_reference(x_seq, v_init, rng_state, Parameters(*parameters), plan.numbers, plan.rules)
    return [s_seq, *(each for each, asked in zip(potentials, plan.wanted, strict=True) if asked)]


def run_forward(
    backend: str, plan: Plan, inputs: Sequence[Any], keep_checkpoints: bool, operator: Any = None
) -> ForwardResult:
    """Runs lif_forward of a fused backend, or `operator` in its place. Returns the wanted outputs."""
    if operator is None:
        operator = operators_of(backend, inputs).lif_forward
    return operator(*inputs, *plan.packed, (*plan.wanted, keep_checkpoints))  # type: ignore[no-any-return]


def run_backward(
    backend: str, plan: Plan, inputs: Inputs, grads: Sequence[Tensor | None], checkpoints: Tensor, wanted: Inputs
) -> Inputs:
    """Runs lif_backward: the `wanted` gradients of the inputs, from `grads`, those of the outputs of forward."""
    x_seq, v_init, rng_state, *parameters = inputs
    found = operators_of(backend, (*inputs, *grads)).lif_backward(
        *none_for_unwanted(grads, (True, *plan.wanted)), x_seq, v_init, rng_state, checkpoints, *parameters,
        *plan.packed, (wanted.x_seq, wanted.v_init, *wanted[3:]),
    )  # fmt: skip
    return Inputs(*none_for_unwanted(found, wanted))


class LIFFunction(torch.autograd.Function):
    """lif_forward as a differentiable function of its tensors.

    Takes an operator, or None for the operator of the backend, a plan, and the fields of `Inputs` one by one, because
    autograd does not see tensors in tuples. Returns the outputs, and the checkpoints for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, backend: str, plan: Plan, *inputs: Any) -> tuple[Tensor, ...]:
        """The wanted outputs, then the checkpoints."""
        return tuple(run_forward(backend, plan, inputs, True, operator))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the checkpoints and all inputs."""
        _, ctx.backend, ctx.plan, *tensors = inputs
        checkpoints = output[-1]
        ctx.save_for_backward(checkpoints, *tensors)
        ctx.set_materialize_grads(needs_zero_gradients())
        ctx.mark_non_differentiable(checkpoints)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """The gradients of all inputs, by lif_backward; None for the operator, the backend and the plan."""
        checkpoints, *tensors = saved_tensors(ctx)
        inputs, plan, wanted = Inputs(*tensors), ctx.plan, Inputs(*ctx.needs_input_grad[3:])
        # The gradients of x_seq and residual are input_gain * dh and residual_gain * dh. If both gains are the same
        # number, one tensor is returned for both.
        shared = wanted.residual and wanted.x_seq and inputs.input_gain is None
        shared = shared and plan.numbers.input_gain == plan.numbers.residual_gain
        if shared:
            asked = [*wanted[:-1], False]
            wanted = Inputs(*asked)
        *grads_of_outputs, _ = grads
        found = run_backward(ctx.backend, plan, inputs, grads_of_outputs, checkpoints, wanted)
        gradients = once_differentiable(found, (*tensors, *grads))
        return None, None, None, *gradients[:-1], gradients[0] if shared else gradients[-1]


def _lif_forward_with_graph(operator: Any, below: Any, *arguments: Any) -> ForwardResult:
    """An entry of DERIVATIVES: lif_forward, called by `below`, with the graph of LIFFunction.

    `operator` only tells the backend. Checkpoints are always computed, and returned if wanted.
    """
    *inputs, numbers, rules, (*output_options, keeps_checkpoints) = arguments
    plan = make_plan(inputs[0], Rules(*rules), Numbers(*numbers), output_options)
    *outputs, checkpoints = apply_at_one_level(LIFFunction, below, backend_of(operator), plan, *inputs)
    return [*outputs, checkpoints] if keeps_checkpoints else outputs


DERIVATIVES["lif_forward"] = _lif_forward_with_graph


def remember_call(call: Call, inputs: Inputs, outputs: Sequence[Tensor]) -> None:
    """Makes backward recompute the spikes of this call, which was made inside of `recompute_spikes`."""
    backend = call.backend  # compute_spikes must not keep the call alive, which has tensors
    plan = make_plan(inputs.x_seq, call.plan.rules, call.plan.numbers, (False, False, False))

    def compute_spikes(*inputs: Tensor | None) -> Tensor:
        """The spikes, computed again from the inputs of the call."""
        return run_forward(backend, plan, inputs, keep_checkpoints=False)[0]

    # Parameters are copied, because FSDP frees them before backward of the next layer needs the spikes. They are small.
    sequences = "x_seq", "v_init", "rng_state", "residual"
    values = {
        name: value if value is None or name in sequences else value.detach().clone()
        for name, value in inputs._asdict().items()
    }
    recompute.remember_spikes(outputs[0], compute_spikes, values)


def analog_mask(x_seq: Tensor, analog_prob: float, rng_state: Tensor, time_dim: int = 0) -> Tensor:
    """Which elements are analog in a call of `lif` with these arguments, as a bool tensor in the shape of `x_seq`.

    An analog element is one neuron at one time step that emits the smooth value instead of a spike. Only the shape,
    memory layout and device of x_seq matter. The mask is not that of `recurrent_lif`, which draws other noise. Raises
    the errors that `lif` raises for these arguments.

    Example::

        x_seq, rng_state = torch.randn(4, 32, 128), torch.tensor([2023, 0])
        s_seq = asgl_cuda.lif(x_seq, analog_prob=0.2, rng_state=rng_state)
        mask = asgl_cuda.analog_mask(x_seq, 0.2, rng_state)  # those that emitted the smooth value
        assert set(s_seq[~mask].tolist()) == {0.0, 1.0}
    """
    time_dim = check_input(x_seq, time_dim, "asgl_cuda.analog_mask")
    check_rng_state(rng_state, x_seq, "asgl_cuda.analog_mask")
    return analog_mask_below(x_seq, check_analog_prob(analog_prob, "asgl_cuda.analog_mask"), rng_state, time_dim)


def unroll_levels(s_seq: Tensor, levels: int, time_dim: int = 0) -> Tensor:
    """Turns integer spikes into binary ones, with `levels` sub-steps for each time step.

    A neuron with s spikes in a step emits 1 in the first s sub-steps, and 0 in the others. The outputs of a linear
    layer for these sub-steps add up to its output for the integer spikes, if it has no bias. This also holds for a
    convolution.

    Args:
        s_seq: `[T, ...]`, or with time at `time_dim`; integers in [0, levels], as `asgl_cuda.lif` emits with levels and
            without noise. If `lif` was called with scale_output, but without multi_spike, pass
            `(levels * s_seq).round()`.
        levels: number of sub-steps, as in `asgl_cuda.lif`.

    Returns:
        `[T * levels, ...]`, or with time at `time_dim`, of zeros and ones, in the type of s_seq. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has a wrong type or range, or s_seq has a value that is not a whole number in
            [0, levels]. The check of values synchronises the device. It is omitted in compiled code and under
            torch.func.

    Example::

        s_seq = asgl_cuda.lif(4 * torch.rand(2, 32, 64), levels=4, v_reset=None)  # [T, B, N]
        weight = torch.randn(10, 64)
        sums = (asgl_cuda.unroll_levels(s_seq, 4) @ weight.T).unflatten(0, (2, 4)).sum(1)
        torch.testing.assert_close(sums, s_seq @ weight.T)

    Source: Luo et al., ECCV 2024, see `asgl_cuda.lif`.
    """
    caller = "asgl_cuda.unroll_levels"
    time_dim = check_input(s_seq, time_dim, caller, "s_seq")
    levels = check_levels("levels", levels, caller)
    with torch.no_grad():
        has_values = type(s_seq) in PLAIN_TENSORS and not s_seq.is_meta
        if has_values and not torch.compiler.is_compiling() and not is_transform_active():
            others = s_seq[~((s_seq == s_seq.round()) & (s_seq >= 0) & (s_seq <= levels))]
            if others.numel():
                raise ValueError(
                    f"{caller}: s_seq must have whole numbers in [0, {levels}], got {others[0].item():g}; "
                    f"neurons with levels={levels} emit them in evaluation or with analog_prob=0, and without "
                    "scale_output"
                )
        below = torch.arange(levels, device=s_seq.device)[(slice(None), *(None,) * (s_seq.dim() - time_dim - 1))]
        return (s_seq.unsqueeze(time_dim + 1) > below).to(s_seq.dtype).flatten(time_dim, time_dim + 1)


class LIF(Neurons):
    """Leaky integrate-and-fire neurons with adaptive smoothing gradients, over all time steps in one call.

    Args:
        num_features: number of channels for granularity "channel"; number of neurons, or their shape `[C, H, W]`, for
            "neuron"; None for "layer".
        decay: fraction of the potential, measured from v_rest, that is left after a step, in [0, 1]. A learned decay
            must be in [3.1e-7, 1 - 3.1e-7], and is stored as a logit.
        v_threshold, v_rest: threshold and resting potential, in units of the input.
        v_reset: potential after a spike, below the threshold. If it is None, a spike subtracts `reset_amount` instead
            (soft reset).
        reset_amount: amount that a spike subtracts under the soft reset; default the threshold.
        input_gain: factor on the input.
        width: width of the surrogate, > 0, in units of the input. If the width is learned, this is its initial value. A
            learned width must be in [3.1e-7, 3.2e6], and its logarithm is stored.
        surrogate: the name of a surrogate, see `asgl_cuda.lif`.
        surrogate_gain: factor on the surrogate gradient.
        analog_prob: random fraction of elements that in training emit a smooth value instead of 0 or 1. These elements
            are called analog, see `asgl_cuda.lif`. An element is one neuron at one time step. In evaluation no element
            is analog. The default is 0 in `asgl_cuda.lif`. The authors' published commands use 0.1 and 0.2.
        granularity: whether a learned parameter has one value per layer, per channel or per neuron.
        learn_width, learn_decay, learn_threshold: whether width, decay and threshold are learned parameters or
            constants.
        strict_threshold: fire only if the potential is above the threshold, not if it is equal.
        detach_reset: stop the gradient that flows through the spike in the reset. If this gradient is not stopped,
            gradients can explode over many steps. `Monitor` measures how much they grow. The default is False in
            `asgl_cuda.lif`.
        scale_output: multiply the output by `v_threshold`. With levels and without multi_spike, divide it by `levels`
            instead.
        levels: emit a whole number of spikes per step, from 0 to `levels`: the potential divided by the threshold,
            clamped to this range and rounded (I-LIF). Analog elements (see `analog_prob`) are not rounded. `v_reset`
            must be None. The threshold acts as the width, so no width is learned, and `width` must be 1. With
            multi_spike, levels only limits the number of spikes.
        multi_spike: emit as many spikes per step as thresholds fit into the potential. `v_reset` must be None, and
            `analog_prob` must be 0.
        v_min: lower bound of the potential after the reset, in units of the input, or None.
        stateful: start each call from the potential `v` at the end of the call before, until `reset()` or
            `asgl_cuda.reset(model)`. Do not use stateful layers with activation checkpointing, which calls the layer
            twice. Calls of `step(x_t)` always start from `v`.
        store_v_seq: store the potentials of the last call, after the reset of each step, as the attribute `v_seq`, in
            the shape of the input.
        time_dim: time dimension of inputs.
        backend: see `asgl_cuda.lif`.
        device, dtype: of the parameters.

    A float may also be given as a tensor of one value. With granularity "channel" or "neuron", `width`, `decay`,
    `v_threshold`, `v_reset` and `reset_amount` may be tensors of shape `num_features`, learned or not. A tensor that
    requires a gradient, such as a Parameter, is accepted only for a learned parameter, as its initial value. `width`,
    `decay` and `v_threshold` can also be read and set after construction.

    Shapes: input and output have the same shape, `[T, B, ...]`, or with time at `time_dim`. For granularity "channel",
    the channels are the dimension after the batch. For "neuron", the last dimensions must have the sizes
    `num_features`. The batch can be left out, except for "channel".

    `layer(x_seq, residual)` computes `layer(x_seq + residual)` without storing the sum. `residual` must have the shape
    and type of x_seq.

    A state dict has only the learned parameters, `log_width`, `logit_decay` and `threshold`. It has no constants,
    `analog_prob` or potentials, so it also loads into a layer whose constant decay is different, without a warning.

    In distributed training, processes with the same seed draw the same noise, see the guide "Several GPUs".

    Raises ValueError or TypeError for wrong arguments, and the errors of `asgl_cuda.lif`. Warns once per process if
    neurons fire at rest (`v_threshold` at `v_rest` or below), if a soft reset does not lower the potential, or if
    `surrogate_gain` is 0.

    Example::

        model = nn.Sequential(
            nn.Linear(64, 128),
            asgl_cuda.LIF(decay=0.9),  # one learned width
            nn.Linear(128, 128),
            asgl_cuda.LIF(128, granularity="channel", learn_decay=True),  # a width and a decay for each channel
        )
        s_seq = model(torch.randn(4, 32, 64))  # [T, B, 64] to [T, B, 128]

    The layer computes `asgl_cuda.lif(x_seq, width=width, ...)`, whose docstring shows the computation as a loop in
    PyTorch. For `detach_reset=True`, use `s[t].detach()` in the last line of the loop.

    With torch's initial weights and without a normalisation, deeper layers often do not spike at first, and then learn
    late or not at all. The tutorial "A network that does not learn" shows how to find such layers with
    `asgl_cuda.Monitor`, and how to make them spike with `asgl_cuda.calibrate`.
    """

    _caller = "asgl_cuda.LIF"
    _function = _CALLER
    _options: ClassVar[dict[str, Callable[..., Any]]] = {
        **dict.fromkeys(("multi_spike", "scale_output"), check_bool),
        "levels": accept_none(check_levels),
        "v_min": accept_none(read_finite),
        **Neurons._options,
    }

    def __init__(
        self,
        num_features: int | Sequence[int] | None = None,
        *,
        decay: Tensor | float = 0.5,
        v_threshold: Tensor | float = 1.0,
        v_reset: Tensor | float | None = 0.0,
        reset_amount: Tensor | float | None = None,
        v_rest: float = 0.0,
        input_gain: float = 1.0,
        width: Tensor | float = 1.0,
        surrogate: str = "sigmoid",
        surrogate_gain: float = 1.0,
        analog_prob: float = 0.5,
        granularity: Granularity = "layer",
        learn_width: bool = True,
        learn_decay: bool = False,
        learn_threshold: bool = False,
        strict_threshold: bool = False,
        detach_reset: bool = True,
        scale_output: bool = False,
        levels: int | None = None,
        multi_spike: bool = False,
        v_min: float | None = None,
        stateful: bool = False,
        store_v_seq: bool = False,
        time_dim: int = 0,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        check_keywords(unknown, LIF.__init__.__kwdefaults__ or {}, self._caller)
        self._set_up_neurons(locals())

    def _inputs_of_call(self, x_seq: Tensor, residual: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """The input and options of a call. A `Pending` that the neurons can compute becomes the option `pending`."""
        name = type(self).__name__
        if isinstance(residual, Pending):
            residual = residual.value_for(name)
        if not isinstance(x_seq, Pending):
            return x_seq, {} if residual is None else {"residual": residual}
        if residual is not None:
            if not isinstance(residual, Tensor) or (residual.shape, residual.dtype) != (x_seq.shape, x_seq.dtype):
                return x_seq.value_for(name), {"residual": residual}
            x_seq = x_seq + residual
        if (
            isinstance(x_seq, Pending)
            and type(self)._call_function is LIF._call_function
            and type(self)._arguments_of_call is LIF._arguments_of_call
        ):
            return x_seq.x, {"pending": x_seq}
        return tensor_of(x_seq, name), {}

    def _call_function(
        self, x_seq: Tensor, update: bool = True, pending: Pending | None = None, **options: Any
    ) -> Tensor | LIFOutput:
        """Calls `asgl_cuda.lif`. Without `update` a normalisation that `pending` stands for keeps its statistics."""
        given = self._arguments_of_call(x_seq, self.input_gain, **options)
        if pending is None:
            return run_lif(self._caller, x_seq, given)
        return run_lif_after_norm(pending, self, self._caller, given, update)


def lacking_options(layer: type[Neurons], *arguments: str) -> set[str]:
    """Names of the options of `lif` and `LIF` that another neuron does not have.

    These are `arguments`, a residual, and those of the options and states of `LIF` that its `_options` and `_states` do
    not have.
    """
    states = {f"{name}_init" for name in LIF._states if name not in layer._states}
    return {"residual", "residual_gain", *arguments, *(LIF._options.keys() - layer._options.keys()), *states}


def unknown_options(layer: NeuronLayer, known: Collection[str]) -> str:
    """The options of the layer that are neither `known` nor at their defaults, as `name=value`; "" if there are none.

    `Monitor` and `to_nir` refuse these, because they would be silently wrong with an option that they do not know.
    """
    names = {*layer._options, *layer._norm_options} - {*known}
    if not names:
        return ""
    parameters = {**signature(LIF.__init__).parameters, **signature(type(layer).__init__).parameters}
    found = []
    for name in sorted(names):
        default = parameters[name].default if name in parameters else None
        value = getattr(layer, name, default)
        if value is not default and (isinstance(value, Tensor) or value != default):
            found.append(f"{name}={format_value(value)}")
    return ", ".join(found)
