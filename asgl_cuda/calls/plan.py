"""A neuron's call up to the operator: arguments by name, checks, noise, autograd.

lif -> computed -> checked_call (a plan by checks, choose_backend, state_of_noise) -> run_reference under autograd, or
run_forward, the backend's operator, inside LIFFunction if a gradient is needed. Backward draws the same noise again
from rng_state; no mask is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..backends import BACKENDS, backend_of, choose_backend, operators_of
from ..backends.derivatives import DERIVATIVES
from ..backends.ops import ForwardResult, with_gaps
from ..checks import (
    cached_by_signature,
    check_analog_prob,
    check_bool,
    check_finite,
    check_input,
    check_levels,
    check_multi_spike,
    check_not_nan,
    check_options,
    check_residual,
    check_rules,
    check_threshold,
    check_v_init,
    check_values,
    check_width,
    check_width_tensor,
    optional,
)
from ..layout import in_memory_order, is_dense, real_type
from ..reference.learned import Logarithm, Logit
from ..reference.neurons import BELOW_IN_STATE, Numbers, Parameters, Rules, lif_reference
from ..reference.surrogates import INTEGER, PERIODIC, SURROGATES
from ..torch_modes import (
    apply,
    apply_here,
    grads_are_zeros,
    is_differentiated,
    once_differentiable,
    saved_tensors,
)
from . import recompute
from .noise import state_of_noise


class LIFOutput(NamedTuple):
    """The result of `lif` with potentials; a field is None unless requested.

    `s_seq`, `v_seq` (potential after reset) and `h_seq` (before reset) have the shape of x_seq, `v_last` the same
    without time. Potentials are float32, float64 for a float64 input.
    """

    s_seq: Tensor
    v_last: Tensor | None
    v_seq: Tensor | None
    h_seq: Tensor | None


class NeuronArguments(TypedDict, total=False):
    """Common arguments of `lif` and `batch_norm_lif`, documented in `lif`."""

    decay: Tensor | float
    v_threshold: Tensor | float
    v_reset: Tensor | float | None
    reset_amount: Tensor | float | None
    width: Tensor | float
    surrogate: str
    surrogate_gain: float
    analog_prob: Tensor | float
    residual: Tensor | None
    residual_gain: float
    rng_state: Tensor | None
    generator: torch.Generator | None
    v_rest: float
    strict_threshold: bool
    scale_output: bool
    detach_reset: bool
    levels: int | None
    multi_spike: bool
    v_min: float | None
    v_init: Tensor | None
    time_dim: int
    return_v_last: bool
    return_v_seq: bool
    return_h_seq: bool
    backend: str | None


class Arguments(NeuronArguments, total=False):
    """All arguments of `lif` except x_seq, or of adaptive neurons: the record that a call is made of.

    From layers, width and decay may be a Logarithm and a Logit.
    """

    input_gain: Tensor | float
    input_bias: Tensor | float
    input_mean: Tensor | float
    # Only of adaptive neurons: where w is, bits IN_CURRENT and others, and its parameters.
    adaptation: int
    adapt_decay: Any
    adapt_potential: Any
    adapt_spike: Any


# Options that are flags of Rules, and those that ask for a result.
FLAGS = "multi_spike", "strict_threshold", "detach_reset", "scale_output"
RETURNS = "return_v_last", "return_v_seq", "return_h_seq"
# Options that are never tensors, with their checks. `surrogate` depends on another, time_dim on x_seq.
OPTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((*FLAGS, *RETURNS), check_bool),
    **dict.fromkeys(("surrogate_gain", "v_rest", "residual_gain"), check_not_nan),
    "v_min": optional(check_finite),
    "levels": optional(check_levels),
}
OPTION_NAMES = "surrogate", "time_dim", *OPTIONS
# Where the parameters of operators come from, `reset` aside; adaptive neurons have others instead of the input's.
INPUT = {"input_gain": "input_gain", "input_bias": "input_bias", "input_mean": "input_mean"}
_ADAPTATION = {"input_gain": "adapt_decay", "input_bias": "adapt_potential", "input_mean": "adapt_spike"}
_COMMON = "width", "decay", "v_threshold", "v_reset", "reset_amount"
VALUES = *_COMMON, *INPUT, "analog_prob", "residual"
_ADAPTIVE_VALUES = *_COMMON, *_ADAPTATION.values(), "analog_prob", "residual"


class Plan(NamedTuple):
    """All of a call that does not depend on tensors' values."""

    real: torch.dtype
    rules: Rules
    numbers: Numbers
    wanted: tuple[bool, ...]  # results beside the first: of `lif` v_last, v_seq and h_seq
    packed: tuple[Any, ...]  # what operators take behind the tensors: numbers, rules, and options of their own
    sources: Sequence[tuple[int, str]]  # the indices of parameters that are tensors, and the arguments they come from


def make_plan(
    x_seq: Tensor, rules: Rules, numbers: Numbers, wanted: Sequence[bool], sources: Sequence[tuple[int, str]] = (),
    options: Sequence[bool] = (),
) -> Plan:  # fmt: skip
    """A plan for the type of x_seq."""
    packed = tuple(numbers), tuple(rules), *options
    return Plan(real_type(x_seq.dtype), rules, numbers, tuple(wanted), packed, sources)


class Inputs(NamedTuple):
    """The tensors of lif_forward in their order, None for a constant; or their gradients, or which are wanted."""

    x_seq: Any
    v_init: Any
    rng_state: Any
    width: Any
    decay: Any
    v_threshold: Any
    reset: Any
    input_gain: Any
    input_bias: Any
    input_mean: Any
    residual: Any

    def with_input(self, gain: Any, bias: Any, mean: Any) -> Inputs:
        """With other parameters of the input. Not by `_replace`, which torch 2.6 can't compile."""
        x_seq, v_init, rng_state, width, decay, v_threshold, reset, _, _, _, residual = self
        return Inputs(x_seq, v_init, rng_state, width, decay, v_threshold, reset, gain, bias, mean, residual)


PARAMETERS = Parameters._fields[:-1]  # without the residual, which is never a constant


def tensors_of(plan: Plan, given: Any, count: int, fused: bool) -> list[Any]:
    """A call's parameters in the type of the arithmetic, None for constants; learned ones as stored where `fused`."""
    real, found = plan.real, [None] * count
    for index, name in plan.sources:
        value = given[name]
        if isinstance(value, (Logarithm, Logit)):
            value = value.stored if fused else value.value()
        found[index] = value if value.dtype is real else value.to(real)
    return found


class Call(NamedTuple):
    """The arguments of `lif`, checked and converted."""

    backend: str
    plan: Plan
    inputs: Inputs


def run_forward(
    backend: str, plan: Plan, inputs: Sequence[Any], keep_checkpoints: bool, operator: Any = None
) -> ForwardResult:
    """Runs lif_forward of a fused backend, or the operator given."""
    if operator is None:
        operator = operators_of(backend, inputs).lif_forward
    return operator(*inputs, *plan.packed, (*plan.wanted, keep_checkpoints))  # type: ignore[no-any-return]


def run_backward(
    backend: str, plan: Plan, inputs: Inputs, grads: Sequence[Tensor | None], checkpoints: Tensor, wanted: Inputs
) -> Inputs:
    """The `wanted` gradients, for those of the results of forward."""
    x_seq, v_init, rng_state, *parameters = inputs
    found = operators_of(backend, (*inputs, *grads)).lif_backward(
        *with_gaps(grads, (True, *plan.wanted)), x_seq, v_init, rng_state, checkpoints, *parameters, *plan.packed,
        (wanted.x_seq, wanted.v_init, *wanted[3:]),
    )  # fmt: skip
    return Inputs(*with_gaps(found, wanted))


def run_reference(plan: Plan, inputs: Inputs) -> list[Tensor]:
    """Runs the reference; returns the wanted results."""
    x_seq, v_init, rng_state, *parameters = inputs
    s_seq, *potentials = lif_reference(x_seq, v_init, rng_state, Parameters(*parameters), plan.numbers, plan.rules)
    return [s_seq, *(each for each, asked in zip(potentials, plan.wanted, strict=True) if asked)]


def remember(call: Call, inputs: Inputs, outputs: Sequence[Tensor]) -> None:
    """Has backward recompute the spikes of a call with these inputs, inside `recompute_spikes`."""
    backend = call.backend  # not the call, which has the tensors
    plan = make_plan(inputs.x_seq, call.plan.rules, call.plan.numbers, (False, False, False))

    def spikes(*inputs: Tensor | None) -> Tensor:
        return run_forward(backend, plan, inputs, keep_checkpoints=False)[0]

    # Copies of parameters: FSDP frees them before backward of the next layer needs the spikes.
    sequences = "x_seq", "v_init", "rng_state", "residual"
    values = {
        name: value if value is None or name in sequences else value.detach().clone()
        for name, value in inputs._asdict().items()
    }
    recompute.remember(outputs[0], spikes, values)


def output_of(plan: Plan, outputs: Sequence[Tensor]) -> Tensor | LIFOutput:
    """The requested outputs, which come first."""
    return LIFOutput(*with_gaps(outputs, (True, *plan.wanted))) if True in plan.wanted else outputs[0]


class LIFFunction(torch.autograd.Function):
    """lif_forward as a differentiable function of its tensors.

    Takes an operator, or None for the backend's, a plan, and `Inputs` one by one, since autograd ignores tensors in
    tuples. Returns the outputs and the checkpoints for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, backend: str, plan: Plan, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(run_forward(backend, plan, inputs, True, operator))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.backend, ctx.plan, *tensors = inputs
        checkpoints = output[-1]
        ctx.save_for_backward(checkpoints, *tensors)
        ctx.set_materialize_grads(grads_are_zeros())
        ctx.mark_non_differentiable(checkpoints)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        checkpoints, *tensors = saved_tensors(ctx)
        inputs, plan, wanted = Inputs(*tensors), ctx.plan, Inputs(*ctx.needs_input_grad[3:])
        # The gradients of x_seq and of the residual may be the same tensor, as in a sum.
        shared = wanted.residual and wanted.x_seq and _adds(plan.numbers, inputs)
        if shared:
            asked = [*wanted[:-1], False]
            wanted = Inputs(*asked)
        *grads_of_outputs, _ = grads
        found = run_backward(ctx.backend, plan, inputs, grads_of_outputs, checkpoints, wanted)
        gradients = once_differentiable(found, (*tensors, *grads))
        return None, None, None, *gradients[:-1], gradients[0] if shared else gradients[-1]


def _adds(constants: Numbers, inputs: Inputs) -> bool:
    """Whether the input current is x, or the sum of x and the residual."""
    if inputs.input_gain is not None or inputs.input_bias is not None or inputs.input_mean is not None:
        return False
    values = constants.input_gain, constants.residual_gain, constants.input_bias, constants.input_mean
    return values == (1, 1, 0, 0)


def _differentiated(operator: Any, below: Any, *arguments: Any) -> ForwardResult:
    """A bare lif_forward with its derivative."""
    *inputs, numbers, rules, (*of_outputs, keeps_checkpoints) = arguments
    plan = make_plan(inputs[0], Rules(*rules), Numbers(*numbers), of_outputs)
    *outputs, checkpoints = apply_here(LIFFunction, below, backend_of(operator), plan, *inputs)
    return [*outputs, checkpoints] if keeps_checkpoints else outputs


DERIVATIVES["lif_forward"] = _differentiated


def _parameters(
    caller: str, x_seq: Tensor, given: Arguments, options: Mapping[str, Any], counts: bool
) -> tuple[dict[str, str], dict[str, float | None]]:
    """The argument that is each parameter of the operators; the arguments that are constants, None for tensors.

    With levels width is the threshold, and v_threshold the factor of scale_output.
    """
    soft = "v_threshold" if given["reset_amount"] is None else "reset_amount"
    reset = soft if given["v_reset"] is None else "v_reset"
    arguments = {"width": "width", "decay": "decay", "v_threshold": "v_threshold", "reset": reset}
    arguments.update(_ADAPTATION if given.get("adaptation", 0) else INPUT)
    constants, real = check_values(given, arguments.values(), x_seq, caller), real_type(x_seq.dtype)
    if constants["width"] is not None:
        check_width(constants["width"], caller, real)
    threshold = constants["v_threshold"]
    if options["multi_spike"] and threshold is not None:
        check_threshold(threshold, "multi_spike", caller)
    if counts:
        if constants["width"] != 1:
            raise ValueError(f"{caller}: with levels the threshold is the width: width must be left at 1, got another")
        if threshold is not None:
            check_width(threshold, caller, real, _THRESHOLD_OF_LEVELS)
        arguments["width"], arguments["v_threshold"] = "v_threshold", _HEIGHT
        constants[_HEIGHT] = 1 / options["levels"]
    return arguments, constants


def _checked(caller: str, x_seq: Any, given: Arguments) -> Plan:
    """Checks everything independent of tensor values."""
    time_dim = check_input(x_seq, given["time_dim"], caller)
    options = check_options(given, OPTIONS, caller)
    surrogate, analog_prob, residual = given["surrogate"], given["analog_prob"], given["residual"]
    counts = options["levels"] is not None and not options["multi_spike"]
    check_rules(given, caller, options["levels"], options["multi_spike"])
    if options["multi_spike"]:
        check_multi_spike(given["v_reset"], analog_prob, caller)
    if residual is not None:
        check_residual(residual, x_seq, caller)
    elif options["residual_gain"] != 1:
        raise ValueError(f"{caller}: residual_gain needs a residual, got {given['residual_gain']} without one")
    arguments, constants = _parameters(caller, x_seq, given, options, counts)
    rules = Rules(
        surrogate=INTEGER if counts else SURROGATES["laplace" if surrogate == PERIODIC else surrogate].id,
        hard_reset=int(given["v_reset"] is not None),
        periodic=int(surrogate == PERIODIC),
        floored=int(options["v_min"] is not None),
        log_width=int(isinstance(given["width"], Logarithm)),
        logit_decay=int(isinstance(given["decay"], Logit)),
        analog_below=BELOW_IN_STATE if isinstance(analog_prob, Tensor) else check_analog_prob(analog_prob, caller),
        levels=options["levels"] or 0,
        adaptation=given.get("adaptation", 0),
        time_dim=time_dim,
        **{name: int(options[name]) for name in FLAGS},
    )
    found = {name: constants[argument] for name, argument in arguments.items()}
    values = {name: 0.0 if number is None else number for name, number in found.items()}
    numbers = Numbers(
        residual_gain=options["residual_gain"],
        v_rest=options["v_rest"],
        surrogate_gain=options["surrogate_gain"],
        v_min=options["v_min"] or 0.0,
        **values,
    )
    sources = [(index, name) for index, name in enumerate(arguments.values()) if constants[name] is None]
    return make_plan(x_seq, rules, numbers, [options[name] for name in RETURNS], sources)


_THRESHOLD_OF_LEVELS = "v_threshold with levels"
_HEIGHT = "height of a spike"  # the constant that levels put in the place of v_threshold
_plan_of = cached_by_signature((*VALUES, *OPTION_NAMES))(_checked)
_adaptive_plan_of = cached_by_signature((*_ADAPTIVE_VALUES, *OPTION_NAMES, "adaptation"))(_checked)


def checked_call(caller: str, x_seq: Tensor, given: Arguments, together: bool = True) -> Call:
    """Everything in `lif` before the computation, draws included; errors name `caller`.

    `together`: one call of an operator may compute all samples of a vmap.
    """
    plan = (_adaptive_plan_of if "adaptation" in given else _plan_of)(caller, x_seq, given)
    backend = choose_backend(given["backend"], x_seq.device, caller)
    rules = plan.rules
    v_init, rng_state, residual = given["v_init"], given["rng_state"], given["residual"]
    if v_init is not None:
        if not rules.adaptation:
            check_v_init(v_init, x_seq, rules.time_dim, caller)
        v_init = v_init.to(plan.real)
    if not is_dense(x_seq, rules.time_dim):
        x_seq = x_seq.contiguous()
    if residual is not None:
        residual = in_memory_order(residual, x_seq, rules.time_dim)
    parameters = tensors_of(plan, given, len(PARAMETERS), BACKENDS[backend].operators is not None)
    if plan.sources:
        width, _, v_threshold, *_ = parameters
        if width is not None and not rules.log_width:
            check_width_tensor(width, caller, _THRESHOLD_OF_LEVELS if rules.surrogate == INTEGER else "width")
        if rules.multi_spike and v_threshold is not None:
            check_threshold(v_threshold, "multi_spike", caller)
    # Last: refused calls draw nothing.
    if rules.analog_below or rng_state is not None or given["generator"] is not None:
        rng_state = state_of_noise(caller, x_seq, rules.analog_below, given, backend, together)
    return Call(backend, plan, Inputs(*[x_seq, v_init, rng_state, *parameters, residual]))


def computed(caller: str, x_seq: Tensor, given: Arguments) -> Tensor | LIFOutput:
    """The result of `lif`."""
    backend, plan, inputs = call = checked_call(caller, x_seq, given)
    if BACKENDS[backend].operators is None:
        outputs = run_reference(plan, inputs)
    elif not is_differentiated(inputs, caller):
        outputs = run_forward(backend, plan, inputs, keep_checkpoints=False)
    elif recompute.open_contexts or recompute.traced_contexts:
        take = partial(remember, call, inputs)
        outputs = recompute.applied(apply, LIFFunction, (None, backend, plan, *inputs), take)
    else:
        outputs = apply(LIFFunction, None, backend, plan, *inputs)
    return output_of(plan, outputs)
