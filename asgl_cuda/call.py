"""A neuron's call up to the operator: arguments by name, checks, noise, autograd.

lif -> computed -> checked_call (checks, choose_backend, noise) -> run: the reference under autograd, or
operators_of(backend).lif_forward, inside LIFFunction if a gradient is needed. Backward draws the same noise again from
rng_state; no mask is stored.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    check_number,
    check_parameter,
    check_residual,
    check_rng_state,
    check_surrogate,
    check_threshold,
    check_v_init,
    check_width,
    check_width_tensor,
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


# The arguments of `lif` that are floats, tensors or None.
Values = namedtuple(
    "Values", "width decay v_threshold v_reset reset_amount input_gain input_bias input_mean analog_prob residual"
)
# The arguments of `lif` that are never tensors, unchecked, except generator and backend.
Options = namedtuple(
    "Options",
    "surrogate surrogate_gain v_rest v_min levels multi_spike strict_threshold detach_reset scale_output time_dim "
    "return_v_last return_v_seq return_h_seq residual_gain adaptation",
    defaults=(0,),
)
# The names of the parameters of the input where they are those of adaptive neurons.
ADAPTATION = {"input_gain": "adapt_decay", "input_bias": "adapt_potential", "input_mean": "adapt_spike"}
# The flags among the options, 0 or 1 in Rules.
_NO_FLAGS = "surrogate", "levels", "adaptation", "time_dim"
FLAGS = tuple(name for name in Options._fields if name in Rules._fields and name not in _NO_FLAGS)
# All arguments of `lif` except x_seq.
Arguments = namedtuple("Arguments", "values options v_init rng_state generator backend")


def grouped(given: Mapping[str, Any]) -> Arguments:
    """All keyword arguments of `lif`."""
    values = Values(*[given[name] for name in Values._fields])
    options = Options(*[given[name] for name in Options._fields if name in given])
    return Arguments(values, options, given["v_init"], given["rng_state"], given["generator"], given["backend"])


class Plan(NamedTuple):
    """The results of all checks of a call that do not depend on the values in tensors."""

    real: torch.dtype
    rules: Rules
    wanted: tuple[bool, bool, bool]  # v_last, v_seq, h_seq


class Call(NamedTuple):
    """The arguments of `lif`, checked and converted."""

    backend: str
    plan: Plan
    numbers: Sequence[float]  # Numbers, flat for the operators
    x_seq: Tensor
    v_init: Tensor | None
    rng_state: Tensor | None
    parameters: Sequence[Tensor | None]  # Parameters, flat; None: a constant

    def operators(self) -> Operators:
        """The operators of a fused backend. Not a property: torch.compile can't trace one in torch 2.6."""
        return operators_of(self.backend, (self.x_seq, self.v_init, self.rng_state, *self.parameters))

    def reference(self) -> list[Tensor]:
        """Runs the reference; returns the wanted results."""
        _, rules, wanted = self.plan
        named = Parameters(*self.parameters), Numbers(*self.numbers), rules
        s_seq, *potentials = lif_reference(self.x_seq, self.v_init, self.rng_state, *named)
        return [s_seq, *(each for each, asked in zip(potentials, wanted, strict=True) if asked)]

    def forward(self, keep_checkpoints: bool) -> ForwardResult:
        """Runs the operator lif_forward."""
        backend, plan, numbers, x_seq, v_init, rng_state, parameters = self
        operator = operators_of(backend, (x_seq, v_init, rng_state, *parameters)).lif_forward
        wanted = *plan.wanted, keep_checkpoints
        return operator(x_seq, v_init, rng_state, parameters, numbers, tuple(plan.rules), wanted)

    def remember(self, outputs: Sequence[Tensor]) -> None:
        """Has backward recompute the spikes, inside `recompute_spikes`."""
        backend, plan, numbers, x_seq, v_init, rng_state, parameters = self
        only_spikes = plan._replace(wanted=(False, False, False))

        def spikes(
            x_seq: Tensor, v_init: Tensor | None, rng_state: Tensor | None, *parameters: Tensor | None
        ) -> Tensor:
            return Call(backend, only_spikes, numbers, x_seq, v_init, rng_state, parameters).forward(False)[0]

        # Copies: FSDP frees parameters before backward of the next layer needs the spikes.
        *values, residual = parameters
        copies = [None if each is None else each.detach().clone() for each in values]
        inputs = {"x_seq": x_seq, "v_init": v_init, "rng_state": rng_state}
        named = dict(zip(Parameters._fields, (*copies, residual), strict=True))
        recompute.remember(outputs[0], spikes, {**inputs, **named})

    def backward(self, grads: Sequence[Tensor | None], checkpoints: Tensor, wanted: Sequence[bool]) -> BackwardResult:
        """Runs the operator lif_backward for the gradients of the results of forward."""
        _, plan, numbers, x_seq, v_init, rng_state, parameters = self
        return self.operators().lif_backward(
            with_gaps(grads, (True, *plan.wanted)), x_seq, v_init, rng_state, checkpoints, parameters, numbers,
            tuple(plan.rules), wanted,
        )  # fmt: skip

    def output(self, outputs: Sequence[Tensor]) -> Tensor | LIFOutput:
        """The requested outputs, which come first."""
        wanted = self.plan.wanted
        if True not in wanted:
            return outputs[0]
        return LIFOutput(*with_gaps(outputs, (True, *wanted)))


class LIFFunction(torch.autograd.Function):
    """The fused operators of one backend as a differentiable function of x_seq, v_init and the parameters.

    Takes the fields of a `Call`, the parameters one by one, since autograd ignores tensors in tuples. Returns the
    outputs and the checkpoints for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        backend, plan, numbers, x_seq, v_init, rng_state, *parameters = inputs
        operator = operators_of(backend, (x_seq, v_init, rng_state, *parameters)).lif_forward
        return tuple(operator(x_seq, v_init, rng_state, parameters, numbers, tuple(plan.rules), (*plan.wanted, True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.plan, ctx.numbers, *tensors = inputs
        checkpoints = output[-1]
        ctx.save_for_backward(checkpoints, *tensors)
        ctx.set_materialize_grads(grads_are_zeros())
        ctx.mark_non_differentiable(checkpoints)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        checkpoints, x_seq, v_init, rng_state, *parameters = saved_tensors(ctx)
        *grads_of_outputs, _ = grads
        _, _, _, wants_x_seq, wants_v_init, _, *wants_parameters, wants_residual = ctx.needs_input_grad
        plan = ctx.plan
        # The gradients of x_seq and of the residual may be the same tensor, as in a sum.
        shared = wants_residual and wants_x_seq and is_sum(ctx.numbers, parameters)
        wanted = wants_x_seq, wants_v_init, *wants_parameters, wants_residual and not shared
        found = operators_of(ctx.backend, (x_seq, v_init, rng_state, *parameters, *grads)).lif_backward(
            with_gaps(grads_of_outputs, (True, *plan.wanted)), x_seq, v_init, rng_state, checkpoints, parameters,
            ctx.numbers, tuple(plan.rules), wanted,
        )  # fmt: skip
        gradients = once_differentiable(found, (x_seq, v_init, *parameters, *grads))
        grad_x_seq, grad_v_init, *grad_parameters, grad_residual = with_gaps(gradients, wanted)
        if shared:
            grad_residual = grad_x_seq
        return None, None, None, grad_x_seq, grad_v_init, None, *grad_parameters, grad_residual


def is_sum(numbers: Sequence[float], parameters: Sequence[Tensor | None]) -> bool:
    """Whether the input current is x, or the sum of x and the residual."""
    given, constants = Parameters(*parameters), Numbers(*numbers)
    tensors = given.input_gain, given.input_bias, given.input_mean
    is_constant = all(each is None for each in tensors)
    values = constants.input_gain, constants.residual_gain, constants.input_bias, constants.input_mean
    return is_constant and values == (1, 1, 0, 0)


class _OperatorFunction(LIFFunction):
    """`LIFFunction` for a bare operator below autograd, paired with its backend."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        (_, below), plan, numbers, x_seq, v_init, rng_state, *parameters = inputs
        return tuple(below(x_seq, v_init, rng_state, parameters, numbers, tuple(plan.rules), (*plan.wanted, True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (backend, _), *others = inputs
        LIFFunction.setup_context(ctx, (backend, *others), output)


def _differentiated(operator: Any, below: Any, *arguments: Any) -> ForwardResult:
    """The operator lif_forward with its derivative, with or without checkpoints."""
    x_seq, v_init, rng_state, parameters, numbers, rules, (*wanted, keeps_checkpoints) = arguments
    plan = Plan(real_type(x_seq.dtype), Rules(*rules), tuple(wanted))
    inputs = (backend_of(operator), below), plan, numbers, x_seq, v_init, rng_state, *parameters
    *outputs, checkpoints = apply_here(_OperatorFunction, *inputs)
    return [*outputs, checkpoints] if keeps_checkpoints else outputs


DERIVATIVES["lif_forward"] = _differentiated


@cached_by_signature
def _plan_of(caller: str, x_seq: Any, values: Values, options: Options) -> Plan:
    """Checks everything independent of tensor values."""
    time_dim = check_input(x_seq, options.time_dim, caller)
    flags = {name: check_bool(name, getattr(options, name), caller) for name in FLAGS}
    v_last = check_bool("return_v_last", options.return_v_last, caller)
    v_seq = check_bool("return_v_seq", options.return_v_seq, caller)
    h_seq = check_bool("return_h_seq", options.return_h_seq, caller)
    check_surrogate(options.surrogate, caller, flags["multi_spike"])
    hard = values.v_reset is not None
    if values.reset_amount is not None and hard:
        raise ValueError(
            f"{caller}: reset_amount is for the soft reset and needs v_reset=None, got v_reset and reset_amount"
        )
    if flags["multi_spike"]:
        check_multi_spike(values.v_reset, values.analog_prob, caller)
    levels = 0 if options.levels is None else check_levels(options.levels, caller)
    counts = levels > 0 and not flags["multi_spike"]
    if counts:
        check_counting(values.v_reset, options.surrogate, caller)
    real = real_type(x_seq.dtype)
    for name in Values._fields:
        value = getattr(values, name)
        if isinstance(value, (Logarithm, Logit)):
            value = value.stored
        if name == "analog_prob":
            continue
        if name == "residual":
            if value is not None:
                check_residual(value, x_seq, caller)
            continue
        if options.adaptation:
            name = ADAPTATION.get(name, name)
        if isinstance(value, Tensor):
            check_parameter(name, value, x_seq, caller)
        elif name == "width":
            check_width(check_number(name, value, caller, "a float or a tensor"), caller, real)
        elif value is not None or name not in ("v_reset", "reset_amount"):
            check_not_nan(name, value, caller, "a float or a tensor")
    if counts:
        _check_with_levels(values, caller, real)
    if flags["multi_spike"] and not isinstance(values.v_threshold, Tensor):
        check_threshold(values.v_threshold, "multi_spike", caller)
    check_not_nan("surrogate_gain", options.surrogate_gain, caller)
    check_not_nan("v_rest", options.v_rest, caller)
    if check_not_nan("residual_gain", options.residual_gain, caller) != 1 and values.residual is None:
        raise ValueError(f"{caller}: residual_gain needs a residual, got {options.residual_gain} without one")
    if options.v_min is not None:
        check_finite("v_min", options.v_min, caller)
    as_data = isinstance(values.analog_prob, Tensor)
    periodic = options.surrogate == PERIODIC
    rules = Rules(
        surrogate=INTEGER if counts else SURROGATES["laplace" if periodic else options.surrogate].id,
        hard_reset=int(hard),
        periodic=int(periodic),
        floored=int(options.v_min is not None),
        log_width=int(isinstance(values.width, Logarithm)),
        logit_decay=int(isinstance(values.decay, Logit)),
        analog_below=BELOW_IN_STATE if as_data else check_analog_prob(values.analog_prob, caller),
        levels=levels,
        adaptation=options.adaptation,
        time_dim=time_dim,
        **{name: int(flag) for name, flag in flags.items()},
    )
    return Plan(real, rules, (v_last, v_seq, h_seq))


_THRESHOLD_OF_LEVELS = "v_threshold with levels"


def _check_with_levels(values: Values, caller: str, real: torch.dtype) -> None:
    """A threshold that the potential can be divided by, and no width."""
    if isinstance(values.width, (Tensor, Logarithm)) or values.width != 1:
        raise ValueError(f"{caller}: with levels the threshold is the width: width must be left at 1, got another")
    if not isinstance(values.v_threshold, Tensor):
        check_width(values.v_threshold, caller, real, _THRESHOLD_OF_LEVELS)


def checked_call(caller: str, x_seq: Tensor, given: Arguments, together: bool = True) -> Call:
    """Everything in `lif` before the computation, draws included; errors name `caller`.

    `together`: one call of an operator may compute all samples of a vmap.
    """
    values, options, v_init, rng_state, generator, backend = given
    plan = _plan_of(caller, x_seq, values, options)
    real, rules, _ = plan
    backend = choose_backend(backend, x_seq.device, caller)
    width, decay, v_threshold, v_reset, reset_amount, input_gain, input_bias, input_mean, analog_prob, residual = values
    if rules.log_width or rules.logit_decay:
        by_value = BACKENDS[backend].operators is None  # the reference
        if rules.log_width:
            width = width.value() if by_value else width.stored
        if rules.logit_decay:
            decay = decay.value() if by_value else decay.stored
        if by_value:
            plan = Plan(real, rules.changed(log_width=0, logit_decay=0), plan.wanted)
    reset = v_reset if v_reset is not None else v_threshold if reset_amount is None else reset_amount
    levels, counts = options.levels, rules.surrogate == INTEGER
    if counts:
        width, v_threshold = v_threshold, 1 / levels
    numbers: list[float] = []
    parameters: list[Tensor | None] = []
    for value in (width, decay, v_threshold, reset, input_gain, input_bias, input_mean):
        if type(value) is float:
            numbers.append(value)
            parameters.append(None)
        elif isinstance(value, Tensor):
            numbers.append(0.0)
            parameters.append(value if value.dtype is real else value.to(real))
        else:
            numbers.append(float(value))
            parameters.append(None)
    if parameters[0] is not None and not rules.log_width:
        check_width_tensor(parameters[0], caller, _THRESHOLD_OF_LEVELS if counts else "width")
    if rules.multi_spike and parameters[2] is not None:
        check_threshold(parameters[2], "multi_spike", caller)
    if v_init is not None:
        if not rules.adaptation:
            check_v_init(v_init, x_seq, rules.time_dim, caller)
        v_init = v_init.to(real)
    numbers += float(options.residual_gain), float(options.v_rest), float(options.surrogate_gain)
    numbers.append(float(options.v_min or 0))
    if rules.analog_below or rng_state is not None or generator is not None:
        rng_state = _noise(caller, x_seq, rules.analog_below, analog_prob, rng_state, generator, backend, together)
    if not is_dense(x_seq, rules.time_dim):
        x_seq = x_seq.contiguous()
    parameters.append(None if residual is None else in_memory_order(residual, x_seq, rules.time_dim))
    return Call(backend, plan, numbers, x_seq, v_init, rng_state, parameters)


def _noise(
    caller: str,
    x_seq: Tensor,
    analog_below: int,
    analog_prob: Any,
    rng_state: Any,
    generator: Any,
    backend: str,
    together: bool,
) -> Tensor | None:
    """The rng_state of the operators, drawn unless given; None where no element draws.

    analog_prob as data is rng_state's third element, marked by BELOW_IN_STATE in the rules: an extra tensor in the
    schemas would slow all calls.
    """
    below = check_analog_prob_tensor(analog_prob, x_seq, caller) if analog_below == BELOW_IN_STATE else None
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
    return run(checked_call(caller, x_seq, given), caller)


def run(call: Call, caller: str) -> Tensor | LIFOutput:
    """The result of a call."""
    backend, plan, numbers, x_seq, v_init, rng_state, parameters = call
    if BACKENDS[backend].operators is None:
        return call.output(call.reference())
    if is_differentiated((x_seq, v_init, *parameters), caller):
        inputs = backend, plan, numbers, x_seq, v_init, rng_state, *parameters
        if recompute.open_contexts or recompute.traced_contexts:
            outputs = recompute.applied(apply, LIFFunction, inputs, call.remember)
        else:
            outputs = apply(LIFFunction, *inputs)
        return call.output(outputs)
    return call.output(call.forward(keep_checkpoints=False))
