"""A neuron's call up to the operator: arguments by name, checks, noise, autograd.

lif -> computed -> checked_call (a plan by checks, choose_backend, noise) -> run: the reference under autograd, or
operators_of(backend).lif_forward, inside LIFFunction if a gradient is needed. Backward draws the same noise again from
rng_state; no mask is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from . import recompute
from .backends import BACKENDS, Operators, backend_of, choose_backend, operators_of
from .checks import (
    cached_by_signature,
    check_analog_prob,
    check_analog_prob_tensor,
    check_bool,
    check_counting,
    check_finite,
    check_generator,
    check_input,
    check_levels,
    check_multi_spike,
    check_not_nan,
    check_options,
    check_residual,
    check_rng_state,
    check_surrogate,
    check_threshold,
    check_v_init,
    check_values,
    check_width,
    check_width_tensor,
    optional,
)
from .derivatives import DERIVATIVES
from .layout import in_memory_order, is_dense, real_type
from .learned import Logarithm, Logit
from .ops import BackwardResult, ForwardResult, with_gaps
from .reference import BELOW_IN_STATE, DRAWS, Numbers, Parameters, Rules, lif_reference
from .surrogate import INTEGER, PERIODIC, SURROGATES
from .transforms import (
    apply,
    apply_here,
    draw_under_transforms,
    grads_are_zeros,
    is_differentiated,
    once_differentiable,
    saved_tensors,
    transforming,
)


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
_INPUT = {"input_gain": "input_gain", "input_bias": "input_bias", "input_mean": "input_mean"}
_ADAPTATION = {"input_gain": "adapt_decay", "input_bias": "adapt_potential", "input_mean": "adapt_spike"}
_COMMON = "width", "decay", "v_threshold", "v_reset", "reset_amount"
VALUES = *_COMMON, *_INPUT, "analog_prob", "residual"
_ADAPTIVE_VALUES = *_COMMON, *_ADAPTATION.values(), "analog_prob", "residual"


class Plan(NamedTuple):
    """All of a call that does not depend on tensors' values."""

    real: torch.dtype
    rules: Rules
    numbers: Numbers
    packed: tuple[tuple[float, ...], tuple[int, ...]]  # numbers and rules, as operators take them
    wanted: Sequence[bool]  # v_last, v_seq, h_seq
    # The argument that is each of Parameters except the residual, None for a constant; empty if all are.
    sources: Sequence[str | None]


def make_plan(
    x_seq: Tensor, rules: Rules, numbers: Numbers, wanted: Sequence[bool], sources: Sequence[str | None] = ()
) -> Plan:
    """A plan for the type of x_seq."""
    return Plan(real_type(x_seq.dtype), rules, numbers, (tuple(numbers), tuple(rules)), tuple(wanted), sources)


class Gradients(NamedTuple):
    """The results of lif_backward, None where not wanted; or which are wanted."""

    x_seq: Any
    v_init: Any
    width: Any
    decay: Any
    v_threshold: Any
    reset: Any
    input_gain: Any
    input_bias: Any
    input_mean: Any
    residual: Any


_CONSTANT = Parameters(*[None] * len(Parameters._fields))


def in_type(value: Any, real: torch.dtype, fused: bool) -> Any:
    """A parameter in the type of the arithmetic; a learned one as it is stored where `fused`."""
    if isinstance(value, (Logarithm, Logit)):
        value = value.stored if fused else value.value()
    return value if value.dtype is real else value.to(real)


@dataclass
class Call:
    """The arguments of `lif`, checked and converted. Fields of a named tuple take longer to read."""

    backend: str
    plan: Plan
    rng_state: Tensor | None
    x_seq: Tensor
    v_init: Tensor | None
    parameters: Parameters  # None: a constant

    def operators(self, *more: Tensor | None) -> Operators:
        """The operators of a fused backend. Not a property: torch.compile can't trace one in torch 2.6."""
        return operators_of(self.backend, (self.x_seq, self.v_init, self.rng_state, *self.parameters, *more))

    def reference(self) -> list[Tensor]:
        """Runs the reference; returns the wanted results."""
        plan = self.plan
        s_seq, *potentials = lif_reference(
            self.x_seq, self.v_init, self.rng_state, self.parameters, plan.numbers, plan.rules
        )
        return [s_seq, *(each for each, asked in zip(potentials, plan.wanted, strict=True) if asked)]

    def forward(self, keep_checkpoints: bool, operator: Any = None) -> ForwardResult:
        """Runs lif_forward, or the operator given."""
        if operator is None:
            operator = self.operators().lif_forward
        plan = self.plan
        wanted = (*plan.wanted, keep_checkpoints)
        return operator(  # type: ignore[no-any-return]
            self.x_seq, self.v_init, self.rng_state, *self.parameters, *plan.packed, wanted
        )

    def backward(self, grads: Sequence[Tensor | None], checkpoints: Tensor, wanted: Sequence[bool]) -> BackwardResult:
        """Runs lif_backward for the gradients of the results of forward; those of `wanted`, as in Gradients."""
        plan = self.plan
        return self.operators(*grads).lif_backward(
            *with_gaps(grads, (True, *plan.wanted)), self.x_seq, self.v_init, self.rng_state, checkpoints,
            *self.parameters, *plan.packed, tuple(wanted),
        )  # fmt: skip

    def with_input(self, gain: Tensor, bias: Tensor, mean: Tensor) -> Call:
        """The call with other parameters of the input. Not by `_replace`, which torch 2.6 can't compile."""
        given = self.parameters
        parameters = Parameters(
            given.width, given.decay, given.v_threshold, given.reset, gain, bias, mean, given.residual
        )
        return Call(self.backend, self.plan, self.rng_state, self.x_seq, self.v_init, parameters)

    def adds(self) -> bool:
        """Whether the input current is x, or the sum of x and the residual."""
        given, constants = self.parameters, self.plan.numbers
        if given.input_gain is not None or given.input_bias is not None or given.input_mean is not None:
            return False
        values = constants.input_gain, constants.residual_gain, constants.input_bias, constants.input_mean
        return values == (1, 1, 0, 0)

    def remember(self, outputs: Sequence[Tensor]) -> None:
        """Has backward recompute the spikes, inside `recompute_spikes`."""
        backend = self.backend  # not self, which has the tensors
        plan = make_plan(self.x_seq, self.plan.rules, self.plan.numbers, (False, False, False))

        def spikes(*of_call: Tensor | None) -> Tensor:
            return call_of(backend, plan, *of_call).forward(keep_checkpoints=False)[0]

        # Copies: FSDP frees parameters before backward of the next layer needs the spikes.
        values = {
            name: value if value is None or name == "residual" else value.detach().clone()
            for name, value in self.parameters._asdict().items()
        }
        inputs = {"rng_state": self.rng_state, "x_seq": self.x_seq, "v_init": self.v_init}
        recompute.remember(outputs[0], spikes, {**inputs, **values})

    def output(self, outputs: Sequence[Tensor]) -> Tensor | LIFOutput:
        """The requested outputs, which come first."""
        wanted = self.plan.wanted
        if True not in wanted:
            return outputs[0]
        return LIFOutput(*with_gaps(outputs, (True, *wanted)))


def call_of(backend: str, plan: Plan, rng_state: Any, x_seq: Any, v_init: Any, *parameters: Any) -> Call:
    """A call of the tensors of an autograd function, which come one by one."""
    return Call(backend, plan, rng_state, x_seq, v_init, Parameters(*parameters))


class LIFFunction(torch.autograd.Function):
    """lif_forward as a differentiable function of x_seq, v_init and the parameters.

    Takes an operator, or None for the backend's, and the fields of a `Call`, the parameters one by one, since autograd
    ignores tensors in tuples. Returns the outputs and the checkpoints for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *of_call: Any) -> tuple[Tensor, ...]:
        return tuple(call_of(*of_call).forward(True, operator))

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
        call = call_of(ctx.backend, ctx.plan, *tensors)
        needed = Gradients(*ctx.needs_input_grad[4:])
        # The gradients of x_seq and of the residual may be the same tensor, as in a sum.
        shared = needed.residual and needed.x_seq and call.adds()
        wanted = *needed[:-1], needed.residual and not shared
        *grads_of_outputs, _ = grads
        found = call.backward(grads_of_outputs, checkpoints, wanted)
        gradients = with_gaps(once_differentiable(found, (*tensors, *grads)), wanted)
        if shared:
            gradients[-1] = gradients[0]
        return None, None, None, None, *gradients


def _differentiated(
    operator: Any, below: Any, x_seq: Tensor, v_init: Any, rng_state: Any, *others: Any
) -> ForwardResult:
    """A bare lif_forward with its derivative."""
    *parameters, numbers, rules, (*of_outputs, keeps_checkpoints) = others
    plan = make_plan(x_seq, Rules(*rules), Numbers(*numbers), of_outputs)
    inputs = below, backend_of(operator), plan, rng_state, x_seq, v_init, *parameters
    *outputs, checkpoints = apply_here(LIFFunction, *inputs)
    return [*outputs, checkpoints] if keeps_checkpoints else outputs


DERIVATIVES["lif_forward"] = _differentiated


def _check_combination(caller: str, x_seq: Tensor, given: Arguments, options: Mapping[str, Any], counts: bool) -> None:
    """Refuses options that exclude each other, or lack another."""
    surrogate, v_reset, residual = given["surrogate"], given["v_reset"], given["residual"]
    check_surrogate(surrogate, caller, options["multi_spike"])
    reset_amount = given["reset_amount"]
    if reset_amount is not None and v_reset is not None:
        raise ValueError(
            f"{caller}: reset_amount is for the soft reset and needs v_reset=None, got v_reset and reset_amount"
        )
    if options["multi_spike"]:
        check_multi_spike(v_reset, given["analog_prob"], caller)
    if counts:
        check_counting(v_reset, surrogate, caller)
    if residual is not None:
        check_residual(residual, x_seq, caller)
    elif options["residual_gain"] != 1:
        raise ValueError(f"{caller}: residual_gain needs a residual, got {given['residual_gain']} without one")


def _parameters(
    caller: str, x_seq: Tensor, given: Arguments, options: Mapping[str, Any], counts: bool
) -> tuple[dict[str, str], dict[str, float | None]]:
    """The argument that is each parameter of the operators; the arguments that are constants, None for tensors.

    With levels width is the threshold, and v_threshold the factor of scale_output.
    """
    soft = "v_threshold" if given["reset_amount"] is None else "reset_amount"
    reset = soft if given["v_reset"] is None else "v_reset"
    arguments = {"width": "width", "decay": "decay", "v_threshold": "v_threshold", "reset": reset}
    arguments.update(_ADAPTATION if given.get("adaptation", 0) else _INPUT)
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
    surrogate, analog_prob = given["surrogate"], given["analog_prob"]
    counts = options["levels"] is not None and not options["multi_spike"]
    _check_combination(caller, x_seq, given, options, counts)
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
    sources = [argument if constants[argument] is None else None for argument in arguments.values()]
    sources = sources if any(sources) else []
    return make_plan(x_seq, rules, numbers, [options[name] for name in RETURNS], sources)


_THRESHOLD_OF_LEVELS = "v_threshold with levels"
_HEIGHT = "height of a spike"  # the constant that levels put in the place of v_threshold
_plan_of = cached_by_signature(VALUES, OPTION_NAMES)(_checked)
_adaptive_plan_of = cached_by_signature(_ADAPTIVE_VALUES, (*OPTION_NAMES, "adaptation"))(_checked)


def checked_call(caller: str, x_seq: Tensor, given: Arguments, together: bool = True) -> Call:
    """Everything in `lif` before the computation, draws included; errors name `caller`.

    `together`: one call of an operator may compute all samples of a vmap.
    """
    plan = (_adaptive_plan_of if "adaptation" in given else _plan_of)(caller, x_seq, given)
    backend = choose_backend(given["backend"], x_seq.device, caller)
    fused = BACKENDS[backend].operators is not None
    real, rules, sources = plan.real, plan.rules, plan.sources
    if not fused and (rules.log_width or rules.logit_decay):
        rules = rules.changed(log_width=0, logit_decay=0)
        plan = make_plan(x_seq, rules, plan.numbers, plan.wanted, sources)
    v_init, rng_state, generator = given["v_init"], given["rng_state"], given["generator"]
    if v_init is not None:
        if not rules.adaptation:
            check_v_init(v_init, x_seq, rules.time_dim, caller)
        v_init = v_init.to(real)
    if not is_dense(x_seq, rules.time_dim):
        x_seq = x_seq.contiguous()
    parameters, residual = _CONSTANT, given["residual"]
    if sources or residual is not None:
        by_name: Any = given
        values = [name if name is None else in_type(by_name[name], real, fused) for name in sources] or _CONSTANT[:-1]
        if residual is not None:
            residual = in_memory_order(residual, x_seq, rules.time_dim)
        parameters = Parameters(*[*values, residual])
        if parameters.width is not None and not rules.log_width:
            name = _THRESHOLD_OF_LEVELS if rules.surrogate == INTEGER else "width"
            check_width_tensor(parameters.width, caller, name)
        if rules.multi_spike and parameters.v_threshold is not None:
            check_threshold(parameters.v_threshold, "multi_spike", caller)
    # Last: refused calls draw nothing.
    if rules.analog_below or rng_state is not None or generator is not None:
        rng_state = _noise(caller, x_seq, rules.analog_below, given, backend, together)
    return Call(backend, plan, rng_state, x_seq, v_init, parameters)


def _noise(
    caller: str, x_seq: Tensor, analog_below: int, given: Arguments, backend: str, together: bool
) -> Tensor | None:
    """The rng_state of the operators, drawn unless given; None where no element draws.

    analog_prob as data is rng_state's third element, marked by BELOW_IN_STATE in the rules: an extra tensor in the
    schemas would slow all calls.
    """
    rng_state, generator, analog_prob = given["rng_state"], given["generator"], given["analog_prob"]
    below = check_analog_prob_tensor(analog_prob, x_seq, caller) if isinstance(analog_prob, Tensor) else None
    if rng_state is not None:
        check_rng_state(rng_state, x_seq, caller)
        if generator is not None:
            raise ValueError(f"{caller}: rng_state and generator exclude each other, got both")
    if generator is not None:
        check_generator(generator, x_seq, caller)
    if analog_below in (0, DRAWS):
        return None
    if rng_state is None:
        rng_state = _draw_rng_state(x_seq, generator, backend, together and below is None)
    return rng_state.contiguous() if below is None else torch.cat([rng_state, below])


def _draw_rng_state(x_seq: Tensor, generator: torch.Generator | None, backend: str, together: bool) -> Tensor:
    operators = BACKENDS[backend].operators
    if operators is not None:
        if torch.compiler.is_compiling():
            if generator is None:
                return operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device=x_seq.device))
        elif together and transforming():
            return draw_under_transforms(x_seq.device, generator)
    return torch.randint(2**63 - 1, (2,), generator=generator, device=x_seq.device)


def computed(caller: str, x_seq: Tensor, given: Arguments) -> Tensor | LIFOutput:
    """The result of `lif`."""
    call = checked_call(caller, x_seq, given)
    if BACKENDS[call.backend].operators is None:
        return call.output(call.reference())
    if is_differentiated((call.x_seq, call.v_init, *call.parameters), caller):
        inputs = None, call.backend, call.plan, call.rng_state, call.x_seq, call.v_init, *call.parameters
        if recompute.open_contexts or recompute.traced_contexts:
            outputs = recompute.applied(apply, LIFFunction, inputs, call.remember)
        else:
            outputs = apply(LIFFunction, *inputs)
        return call.output(outputs)
    return call.output(call.forward(keep_checkpoints=False))
