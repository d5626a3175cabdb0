"""From a call's arguments to the tensors, numbers and rules of an operator: checks, a plan with its cache, noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import BACKENDS, choose_backend
from ..checks import (
    PLAIN_TENSORS,
    check_analog_prob,
    check_features,
    check_initial_state,
    check_input,
    check_multi_spike,
    check_options,
    check_parameters,
    check_positive_threshold,
    check_reset_and_surrogate,
    check_residual,
    check_width,
    check_width_tensor,
)
from ..layout import Features, real_type, to_dense_layout, to_memory_order
from ..reference.learned import Logarithm, Logit
from ..reference.records import BELOW_IN_STATE, Numbers, Parameters, Rules
from ..reference.surrogates import INTEGER, PERIODIC, SURROGATES
from .arguments import ADAPTATION, ADAPTIVE_VALUES, FLAGS, INPUT, OPTION_NAMES, OPTIONS, RETURNS, VALUES, Arguments
from .noise import rng_state_of_call

Checked = TypeVar("Checked")
Check = Callable[[str, Any, Any], Checked]

_MOST_PLANS = 1000
_LEARNED = (Logarithm, Logit)
_CONSTANTS = (float, int, bool, str, type(None), Features)


class ParameterSource(NamedTuple):
    """The argument from which an operator's parameter comes, for a parameter that is a tensor."""

    place: int  # index of the parameter among the operator's parameters
    argument: str
    shape: tuple[int, ...] | None  # in this shape it broadcasts against x_seq; None: it need not be reshaped


class Plan(NamedTuple):
    """Everything about a call that does not depend on the values of tensors."""

    real: torch.dtype
    rules: Rules
    numbers: Numbers
    wanted: tuple[bool, ...]  # results after the first: for `lif` v_last, v_seq and h_seq
    packed: tuple[Any, ...]  # the arguments of operators after the tensors: numbers, rules, and their own options
    sources: Sequence[ParameterSource]
    states: tuple[str, ...]  # names of the states


def make_plan(
    x_seq: Tensor, rules: Rules, numbers: Numbers, wanted: Sequence[bool], sources: Sequence[ParameterSource] = (),
    options: Sequence[bool] = (),
) -> Plan:  # fmt: skip
    """Makes the plan of a call with this x_seq: packs numbers, rules and `options` for the operator."""
    packed = tuple(numbers), tuple(rules), *options
    return Plan(real_type(x_seq.dtype), rules, numbers, tuple(wanted), packed, sources, rules.states())


def parameter_sources(
    arguments: Iterable[str], constants: Mapping[str, float | None], given: Any, x_seq: Tensor, time_dim: int
) -> list[ParameterSource]:
    """The sources of the parameters that are tensors, whose `constants` are None, in the order of `arguments`."""
    features: Features | None = given.get("features")
    found = []
    for place, name in enumerate(arguments):
        if constants[name] is not None:
            continue
        shape, stored = None, getattr(given[name], "stored", given[name])
        if features is not None and stored.shape == features.sizes:
            shape = features.broadcast_shape(x_seq, time_dim)
            shape = None if shape == features.sizes else shape
        found.append(ParameterSource(place, name, shape))
    return found


class Inputs(NamedTuple):
    """For each tensor of lif_forward, in order: itself (None for a constant), its gradient, or if that is wanted."""

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

    def with_input_parameters(self, gain: Any, bias: Any, mean: Any) -> Inputs:
        """A copy with other input_gain, input_bias and input_mean. Not by `_replace`, which torch 2.6 can't compile."""
        return Inputs(*self[:-4], gain, bias, mean, self.residual)


PARAMETERS = Parameters._fields[:-1]  # without the residual, which is never a constant


def parameter_tensors(plan: Plan, given: Any, count: int, fused: bool) -> list[Any]:
    """A call's parameters, each in the type of the arithmetic, and None for constants.

    With `fused`, a learned parameter stays the stored logarithm or logit, and one of one dimension is not reshaped:
    `Rules.trailing` tells the operators to which dimension of x_seq it belongs.
    """
    real, found = plan.real, [None] * count
    for place, name, shape in plan.sources:
        value = given[name]
        if isinstance(value, (Logarithm, Logit)):
            value = value.stored if fused else value.value()
        if shape is not None and not (fused and value.dim() == 1):
            value = value.view(shape)
        found[place] = value if value.dtype is real else value.to(real)
    return found


def stack_of_states(caller: str, x_seq: Tensor, given: Arguments, plan: Plan) -> Tensor | None:
    """Checks the initial states `{name}_init`, and stacks them for an operator; None if all states are at rest."""
    found: dict[str, Tensor | None] = {name: given.get(f"{name}_init") for name in plan.states}  # type: ignore[misc]
    time_dim, real = plan.rules.time_dim, plan.real
    for name, state in found.items():
        if state is not None:
            check_initial_state(state, x_seq, time_dim, caller, f"{name}_init")
    if all(state is None for state in found.values()):
        return None
    like, rest = x_seq.select(time_dim, 0), {"v": plan.numbers.v_rest}
    return torch.stack(
        [
            torch.full_like(like, rest.get(name, 0.0), dtype=real) if state is None else state.to(real)
            for name, state in found.items()
        ]
    )


def last_states(plan: Plan, stack: Tensor | None) -> dict[str, Tensor | None]:
    """The states after the last step as `{name}_last`, from the operator's stack of them, None if not wanted."""
    if len(plan.states) == 1:
        return {"v_last": stack}
    return {f"{name}_last": None if stack is None else stack[k] for k, name in enumerate(plan.states)}


class Call(NamedTuple):
    """A checked call: its backend, its plan, and the tensors of the operator."""

    backend: str
    plan: Plan
    inputs: Inputs


def _arguments_and_constants(
    caller: str, x_seq: Tensor, given: Arguments, options: Mapping[str, Any], counts: bool
) -> tuple[dict[str, str], dict[str, float | None]]:
    """Checks the parameters. Returns, by parameter of the operator, its argument, and by argument its constant value.

    The value of a tensor is None. With `counts` (levels without multi_spike) an operator takes the threshold as its
    width, and 1 / levels, the height of a spike, as its v_threshold.
    """
    soft = "v_threshold" if given["reset_amount"] is None else "reset_amount"
    reset = soft if given["v_reset"] is None else "v_reset"
    arguments = {"width": "width", "decay": "decay", "v_threshold": "v_threshold", "reset": reset}
    arguments.update(ADAPTATION if given.get("adaptation", 0) else INPUT)
    features = given.get("features")
    constants, real = check_parameters(given, arguments.values(), x_seq, caller, features), real_type(x_seq.dtype)
    if constants["width"] is not None:
        check_width(constants["width"], caller, real)
    threshold = constants["v_threshold"]
    if options["multi_spike"] and threshold is not None:
        check_positive_threshold(threshold, "multi_spike", caller)
    if counts:
        if constants["width"] != 1:
            got = "a tensor" if constants["width"] is None else constants["width"]
            raise ValueError(
                f"{caller}: levels use v_threshold as the width, so width must keep its default, 1.0, got {got}; leave "
                "out width"
            )
        if threshold is not None:
            check_width(threshold, caller, real, _THRESHOLD_OF_LEVELS)
        arguments["width"], arguments["v_threshold"] = "v_threshold", _HEIGHT
        constants[_HEIGHT] = 1 / options["levels"]
    return arguments, constants


def _checked_plan(caller: str, x_seq: Any, given: Arguments) -> Plan:
    """The plan of a call, after checks of everything that does not depend on values of tensors."""
    time_dim = check_input(x_seq, given["time_dim"], caller)
    if (features := given.get("features")) is not None:
        check_features(features, x_seq, time_dim, caller)
    options = check_options(given, OPTIONS, caller)
    surrogate, analog_prob, residual = given["surrogate"], given["analog_prob"], given["residual"]
    counts = options["levels"] is not None and not options["multi_spike"]
    check_reset_and_surrogate(given, caller, options["levels"], options["multi_spike"])
    if options["multi_spike"]:
        check_multi_spike(given["v_reset"], analog_prob, caller)
    if residual is not None:
        check_residual(residual, x_seq, caller)
    elif options["residual_gain"] != 1:
        gain = given["residual_gain"]
        raise ValueError(f"{caller}: residual_gain needs a residual, got {gain} without one; leave out residual_gain")
    arguments, constants = _arguments_and_constants(caller, x_seq, given, options, counts)
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
        trailing=0 if features is None else features.trailing(x_seq, time_dim),
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
    sources = parameter_sources(arguments.values(), constants, given, x_seq, time_dim)
    return make_plan(x_seq, rules, numbers, [options[name] for name in RETURNS], sources)


def cached_by_signature(names: Sequence[str]) -> Callable[[Check[Checked]], Check[Checked]]:
    """A decorator that caches the result of `check(caller, x_seq, given)` for calls of the same signature.

    The check may depend on the caller, on x_seq, and on the `given` arguments of these names. Of tensors, x_seq among
    them, it may use type, shape, dtype and device, but no values.
    """
    values_of = itemgetter(*names)

    @functools.lru_cache
    def split_by_type(types: tuple[type, ...]) -> tuple[list[int], Callable[[Any], Any]]:
        """The positions of tensors, and a getter of other arguments. Raises TypeError for types that can't be keys."""
        others = [index for index, kind in enumerate(types) if kind in _CONSTANTS]
        tensors = [index for index, kind in enumerate(types) if kind in (*PLAIN_TENSORS, *_LEARNED)]
        if len(others) + len(tensors) < len(types):
            raise TypeError
        return tensors, itemgetter(*others)

    def decorate(check: Check[Checked]) -> Check[Checked]:
        """Gives this check a cache of its own."""
        plans: dict[Any, Checked] = {}

        @functools.wraps(check)
        def cached(caller: str, x_seq: Any, given: Any) -> Checked:
            """The cached result; calls the check while compiling, and for arguments that can't be keys."""
            if is_compiling():
                return check(caller, x_seq, given)
            try:
                values = values_of(given)
                types = tuple(map(type, values))  # part of the key, because True == 1 == 1.0
                tensors, others_of = split_by_type(types)
                kinds = [_tensor_signature(values[index]) for index in tensors]
                key = (caller, _tensor_signature(x_seq), types, others_of(values), *kinds)
                plan = plans.get(key)
            except TypeError:
                return check(caller, x_seq, given)
            if plan is None:
                plan = check(caller, x_seq, given)
                if len(plans) >= _MOST_PLANS:
                    plans.clear()
                plans[key] = plan
            return plan

        return cached

    return decorate


def _tensor_signature(value: Any) -> Any:
    """Shape, dtype and device. Raises TypeError for a value of which a check may use more, such as a sparse tensor."""
    tensor = value.stored if isinstance(value, _LEARNED) else value
    if type(tensor) not in PLAIN_TENSORS or tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError
    return tensor.shape, tensor.dtype, tensor.device


_THRESHOLD_OF_LEVELS = "v_threshold with levels"
_HEIGHT = "height of a spike"  # the constant that replaces v_threshold with levels
_NAMES = {False: (*VALUES, *OPTION_NAMES), True: (*ADAPTIVE_VALUES, *OPTION_NAMES, "adaptation")}
# `_checked_plan` with four caches, by the names of the arguments: with or without an adaptation, and with or without
# `features`. Only layers whose parameters differ between channels or neurons pass `features`.
_PLANS = {
    (adapts, differ): cached_by_signature((*names, "features") if differ else names)(_checked_plan)
    for adapts, names in _NAMES.items()
    for differ in (False, True)
}


def checked_call(caller: str, x_seq: Tensor, given: Arguments, together: bool = True) -> Call:
    """Checks a call of spiking neurons, plans it, chooses its backend and draws its noise. Errors name `caller`.

    The tensors of the result are in the layout that operators take.

    With `together`, one call of an operator may compute all samples of a vmap.
    """
    plan = _PLANS["adaptation" in given, "features" in given](caller, x_seq, given)
    backend = choose_backend(given["backend"], x_seq.device, caller)
    rules = plan.rules
    v_init, rng_state, residual = given["v_init"], given["rng_state"], given["residual"]
    if len(plan.states) > 1:
        v_init = stack_of_states(caller, x_seq, given, plan)
    elif v_init is not None:
        check_initial_state(v_init, x_seq, rules.time_dim, caller)
        v_init = v_init.to(plan.real)
    if not x_seq.is_contiguous():
        x_seq = to_dense_layout(x_seq, rules.time_dim)
    if residual is not None and residual.stride() != x_seq.stride():
        residual = to_memory_order(residual, x_seq, rules.time_dim)
    parameters = parameter_tensors(plan, given, len(PARAMETERS), BACKENDS[backend].operators is not None)
    if plan.sources:
        width, _, v_threshold, *_ = parameters
        if width is not None and not rules.log_width:
            check_width_tensor(width, caller, _THRESHOLD_OF_LEVELS if rules.surrogate == INTEGER else "width")
        if rules.multi_spike and v_threshold is not None:
            check_positive_threshold(v_threshold, "multi_spike", caller)
    # Noise is drawn after all checks, so that a call that they refuse does not advance the generator.
    if rules.analog_below or rng_state is not None or given["generator"] is not None:
        rng_state = rng_state_of_call(caller, x_seq, rules.analog_below, given, backend, together)
    return Call(backend, plan, Inputs(*[x_seq, v_init, rng_state, *parameters, residual]))
