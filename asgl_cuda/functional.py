"""The fused neuron as a function: autograd wiring, `lif` and `analog_mask`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from .backends import BACKENDS, Operators, backend_of, choose_backend, operators_of
from .checks import (
    check_analog_prob,
    check_analog_prob_tensor,
    check_bool,
    check_finite,
    check_generator,
    check_input,
    check_multi_spike,
    check_not_nan,
    check_number,
    check_parameter,
    check_rng_state,
    check_surrogate,
    check_v_init,
    check_width,
    check_width_tensor,
    once_a_kind,
)
from .derivatives import DERIVATIVES
from .layout import is_dense, real_type
from .learned import Logarithm, Logit
from .ops import BackwardResult, ForwardResult, in_their_places
from .reference import BELOW_IN_STATE, DRAWS, Numbers, Parameters, Rules, analog_mask_below, lif_reference
from .surrogate import PERIODIC, SURROGATES
from .transforms import (
    apply,
    apply_here,
    draw_under_transforms,
    is_differentiated,
    once_differentiable,
    saved_tensors,
    transforming,
)

_CALLER = "asgl_cuda.lif"


class NeuronArguments(TypedDict, total=False):
    """The arguments that `lif` and `batch_norm_lif` have in common; the docstring of `lif` says what they are."""

    decay: Tensor | float
    v_threshold: Tensor | float
    v_reset: Tensor | float | None
    reset_amount: Tensor | float | None
    width: Tensor | float
    surrogate: str
    surrogate_gain: float
    analog_prob: Tensor | float
    rng_state: Tensor | None
    generator: torch.Generator | None
    v_rest: float
    strict_threshold: bool
    scale_output: bool
    detach_reset: bool
    multi_spike: bool
    v_min: float | None
    v_init: Tensor | None
    time_dim: int
    return_v_last: bool
    return_v_seq: bool
    return_h_seq: bool
    backend: str | None


class LIFArguments(NeuronArguments, total=False):
    """All arguments of `lif` except x_seq."""

    input_gain: Tensor | float
    input_bias: Tensor | float
    input_mean: Tensor | float


class LIFOutput(NamedTuple):
    """What `lif` returns when more than the spikes is asked for; a field is None where it is not asked for.

    `s_seq`, `v_seq` (potential after reset) and `h_seq` (before reset) have the shape of x_seq, and `v_last` has it
    without time. Potentials are float32, float64 for a float64 input.
    """

    s_seq: Tensor
    v_last: Tensor | None
    v_seq: Tensor | None
    h_seq: Tensor | None


class Arguments(NamedTuple):
    """All arguments of `lif` except x_seq: those that may be tensors first, then those that never are."""

    width: Any
    decay: Any
    v_threshold: Any
    v_reset: Any
    reset_amount: Any
    input_gain: Any
    input_bias: Any
    input_mean: Any
    analog_prob: Any
    v_init: Any
    rng_state: Any
    generator: Any
    surrogate: Any
    surrogate_gain: Any
    v_rest: Any
    strict_threshold: Any
    scale_output: Any
    detach_reset: Any
    multi_spike: Any
    v_min: Any
    time_dim: Any
    return_v_last: Any
    return_v_seq: Any
    return_h_seq: Any
    backend: Any


class Call(NamedTuple):
    """The arguments of `lif`, checked and converted. Tuples are plain, since torch takes 3 us longer for named ones."""

    backend: str
    numbers: Sequence[float]  # of Numbers
    rules: Sequence[int]  # of Rules
    wanted: tuple[bool, bool, bool]  # v_last, v_seq, h_seq
    x_seq: Tensor
    v_init: Tensor | None
    rng_state: Tensor | None
    parameters: Sequence[Tensor | None]  # of Parameters; None: a constant

    @classmethod
    def of(cls, *inputs: Any) -> Call:
        """Makes a call of its fields, with the parameters one by one, as autograd takes tensors."""
        backend, numbers, rules, wanted, x_seq, v_init, rng_state, *parameters = inputs
        return cls(backend, numbers, rules, wanted, x_seq, v_init, rng_state, parameters)

    @property
    def time_dim(self) -> int:
        return self.rules[-1]

    @property
    def operators(self) -> Operators:
        """The operators of a fused backend."""
        return operators_of(self.backend, (self.x_seq, self.v_init, self.rng_state, *self.parameters))

    def reference(self) -> list[Tensor]:
        """Runs the reference, for what is wanted."""
        options = Parameters(*self.parameters), Numbers(*self.numbers), Rules(*self.rules)
        s_seq, *potentials = lif_reference(self.x_seq, self.v_init, self.rng_state, *options)
        return [s_seq, *(each for each, asked in zip(potentials, self.wanted, strict=True) if asked)]

    def forward(self, keep_checkpoints: bool) -> ForwardResult:
        """Runs the operator lif_forward."""
        return self.operators.lif_forward(
            self.x_seq, self.v_init, self.rng_state, self.parameters, self.numbers, self.rules,
            (*self.wanted, keep_checkpoints),
        )  # fmt: skip

    def backward(self, grads: Sequence[Tensor | None], checkpoints: Tensor, wanted: Sequence[bool]) -> BackwardResult:
        """Runs the operator lif_backward for the gradients of what forward has returned."""
        in_places = in_their_places(grads, (True, *self.wanted))
        return self.operators.lif_backward(
            in_places, self.x_seq, self.v_init, self.rng_state, checkpoints, self.parameters, self.numbers, self.rules,
            wanted,
        )  # fmt: skip

    def output(self, outputs: Sequence[Tensor]) -> Tensor | LIFOutput:
        """The outputs that were asked for, which come first."""
        if True not in self.wanted:
            return outputs[0]
        return LIFOutput(*in_their_places(outputs, (True, *self.wanted)))


class LIFFunction(torch.autograd.Function):
    """The fused operators of one backend as a differentiable function of x_seq, v_init and the parameters.

    It takes the fields of a `Call`, with the parameters one by one, as autograd takes tensors. Beside the outputs it
    returns the checkpoints, which backward needs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        backend, numbers, rules, wanted, *tensors = inputs
        x_seq, v_init, rng_state, *parameters = tensors
        forward = operators_of(backend, tensors).lif_forward
        return tuple(forward(x_seq, v_init, rng_state, parameters, numbers, rules, (*wanted, True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[:4]
        checkpoints = output[-1]
        ctx.save_for_backward(checkpoints, *inputs[4:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(checkpoints)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        checkpoints, *tensors = saved_tensors(ctx)
        x_seq, v_init, rng_state, *parameters = tensors
        backend, numbers, rules, wanted = ctx.options
        grads, needed = grads[:-1], ctx.needs_input_grad[4:]
        found = operators_of(backend, (*tensors, *grads)).lif_backward(
            in_their_places(grads, (True, *wanted)), x_seq, v_init, rng_state, checkpoints, parameters, numbers, rules,
            (*needed[:2], *needed[3:]),
        )  # fmt: skip
        gradients = once_differentiable(found, (*tensors, *grads))
        return None, None, None, None, *in_their_places(gradients, needed)


class _OperatorFunction(LIFFunction):
    """The same for the operator by itself; the backend comes with the operator below autograd."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        (_, below), numbers, rules, wanted, *tensors, parameters = (*inputs[:7], inputs[7:])
        return tuple(below(*tensors, parameters, numbers, rules, (*wanted, True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (backend, _), *others = inputs
        LIFFunction.setup_context(ctx, (backend, *others), output)


def _differentiated(operator: Any, below: Any, *arguments: Any) -> ForwardResult:
    """The operator lif_forward with its derivative, whether its checkpoints are wanted or not."""
    *tensors, parameters, numbers, rules, (*wanted, keeps_checkpoints) = arguments
    inputs = (backend_of(operator), below), numbers, rules, tuple(wanted), *tensors, *parameters
    outputs = apply_here(_OperatorFunction, *inputs)
    return list(outputs if keeps_checkpoints else outputs[:-1])


DERIVATIVES["lif_forward"] = _differentiated


class _Plan(NamedTuple):
    """What a call's types, shapes and options come to, which is the same at the next call of this kind."""

    real: torch.dtype
    rules: tuple[int, ...]  # of Rules
    wanted: tuple[bool, bool, bool]  # v_last, v_seq, h_seq


@once_a_kind
def _plan_of(caller: str, values: Sequence[Any], others: Sequence[Any]) -> _Plan:
    """Checks all that does not depend on the numbers in tensors. `values` are x_seq and the first of Arguments."""
    x_seq, *front = values
    given = Arguments._make((*front, None, None, None, *others))
    time_dim = check_input(x_seq, given.time_dim, caller)
    for name in ("strict_threshold", "scale_output", "detach_reset", "return_v_last", "return_v_seq", "return_h_seq"):
        check_bool(name, getattr(given, name), caller)
    check_surrogate(given.surrogate, caller, check_bool("multi_spike", given.multi_spike, caller))
    hard = given.v_reset is not None
    if given.reset_amount is not None and hard:
        raise ValueError(
            f"{caller}: reset_amount is for the soft reset and needs v_reset=None, got v_reset and reset_amount"
        )
    if given.multi_spike:
        check_multi_spike(given.v_reset, given.analog_prob, caller)
    real = real_type(x_seq.dtype)
    for name in ("width", "decay", "v_threshold", "v_reset", "reset_amount", "input_gain", "input_bias", "input_mean"):
        value = getattr(given, name)
        if isinstance(value, (Logarithm, Logit)):
            value = value.of_value
        if isinstance(value, Tensor):
            check_parameter(name, value, x_seq, caller)
        elif name == "width":
            check_width(check_number(name, value, caller, "a float or a tensor"), caller, real)
        elif value is not None or name not in ("v_reset", "reset_amount"):
            check_not_nan(name, value, caller, "a float or a tensor")
    check_not_nan("surrogate_gain", given.surrogate_gain, caller)
    check_not_nan("v_rest", given.v_rest, caller)
    if given.v_min is not None:
        check_finite("v_min", given.v_min, caller)
    as_data = isinstance(given.analog_prob, Tensor)
    periodic = given.surrogate == PERIODIC
    rules = (
        SURROGATES["laplace" if periodic else given.surrogate].id,
        int(hard),
        int(given.strict_threshold),
        int(given.scale_output),
        int(given.detach_reset),
        int(given.multi_spike),
        int(periodic),
        int(given.v_min is not None),
        int(isinstance(given.width, Logarithm)),
        int(isinstance(given.decay, Logit)),
        BELOW_IN_STATE if as_data else check_analog_prob(given.analog_prob, caller),
        time_dim,
    )
    return _Plan(real, rules, (bool(given.return_v_last), bool(given.return_v_seq), bool(given.return_h_seq)))


def checked_call(caller: str, x_seq: Tensor, given: Arguments) -> Call:
    """Does everything that `lif` does before it computes, draws included; errors name `caller`."""
    real, rules, wanted = _plan_of(caller, (x_seq, *given[:9]), given[12:])
    width, decay, v_threshold, v_reset, reset_amount, *of_input, analog_prob, v_init, rng_state, generator = given[:12]
    *_, log_width, logit_decay, analog_below, time_dim = rules
    backend = choose_backend(given.backend, x_seq.device, caller)
    if log_width or logit_decay:
        if BACKENDS[backend].operators is None:  # the reference computes with values
            *front, _, _, _, _ = rules
            rules = (*front, 0, 0, analog_below, time_dim)
            width = width.value() if log_width else width
            decay = decay.value() if logit_decay else decay
        else:
            width = width.of_value if log_width else width
            decay = decay.of_value if logit_decay else decay
    reset = v_reset if v_reset is not None else v_threshold if reset_amount is None else reset_amount
    values = (width, decay, v_threshold, reset, *of_input)
    numbers: list[float] = []
    parameters: list[Tensor | None] = []
    for value in values:
        if type(value) is float:
            numbers.append(value)
            parameters.append(None)
        elif isinstance(value, Tensor):
            numbers.append(0.0)
            parameters.append(value if value.dtype is real else value.to(real))
        else:
            numbers.append(float(value))
            parameters.append(None)
    if parameters[0] is not None and not log_width:
        check_width_tensor(parameters[0], caller)
    if v_init is not None:
        check_v_init(v_init, x_seq, time_dim, caller)
        v_init = v_init.to(real)
    numbers += float(given.v_rest), float(given.surrogate_gain), float(given.v_min or 0)
    below_as_data = None
    if analog_below == BELOW_IN_STATE:
        below_as_data = check_analog_prob_tensor(analog_prob, x_seq, caller)
    if rng_state is not None:
        check_rng_state(rng_state, x_seq, caller)
        if generator is not None:
            raise ValueError(f"{caller}: rng_state and generator exclude each other, got both")
    if generator is not None:
        check_generator(generator, x_seq, caller)
    if not is_dense(x_seq, time_dim):
        x_seq = x_seq.contiguous()
    if analog_below in (0, DRAWS):
        rng_state = None
    else:
        if rng_state is None:
            rng_state = _draw_rng_state(x_seq, generator, backend, together=below_as_data is None)
        rng_state = rng_state.contiguous() if below_as_data is None else torch.cat([rng_state, below_as_data])
    return Call(backend, numbers, rules, wanted, x_seq, v_init, rng_state, parameters)


def lif(
    x_seq: Tensor,
    *,
    decay: Tensor | float = 0.5,
    v_threshold: Tensor | float = 1.0,
    v_reset: Tensor | float | None = 0.0,
    reset_amount: Tensor | float | None = None,
    width: Tensor | float = 1.0,
    surrogate: str = "rectangle",
    surrogate_gain: float = 1.0,
    analog_prob: Tensor | float = 0.0,
    rng_state: Tensor | None = None,
    generator: torch.Generator | None = None,
    v_rest: float = 0.0,
    input_gain: Tensor | float = 1.0,
    input_bias: Tensor | float = 0.0,
    input_mean: Tensor | float = 0.0,
    strict_threshold: bool = False,
    scale_output: bool = False,
    detach_reset: bool = False,
    multi_spike: bool = False,
    v_min: float | None = None,
    v_init: Tensor | None = None,
    time_dim: int = 0,
    return_v_last: bool = False,
    return_v_seq: bool = False,
    return_h_seq: bool = False,
    backend: str | None = None,
) -> Tensor | LIFOutput:
    """Leaky integrate-and-fire neurons over a whole sequence, with the noise and the learned width of ASGL.

    Args:
        x_seq: input current, `[T, ...]` (or time at `time_dim`), float16, bfloat16, float32 or float64. Contiguous and
            channels_last layouts are used as they are, any other is copied once.
        decay: share of the potential that is left after a step (no unit, per step); any number, also beyond [0, 1].
        v_threshold, v_rest: threshold and resting potential, in units of x_seq.
        v_reset: potential after a spike (hard reset), or None for the soft reset.
        reset_amount: what a spike takes off the potential under the soft reset; default `v_threshold`.
        width: width of the surrogate, in units of x_seq, at least 1.1e-19 in float32, where 1 / width^2 is still
            finite. A tensor is checked on the CPU alone, outside of torch.compile and torch.func, since a GPU would
            have to be waited for: elsewhere the gradients of a width < 0 have the wrong sign, those of 0 are NaN.
        surrogate: rectangle, triangle, sigmoid, arctan, erf, fast_sigmoid or laplace; with `multi_spike` also
            periodic_exponential, whose slope returns at every multiple of the threshold.
        surrogate_gain: factor on the surrogate gradient.
        analog_prob: share of elements and steps that emit F(u / width) instead of a spike, in steps of 1 / 65536. As a
            tensor of one value on x_seq's device it is data, which a compiled graph does not fix. No gradient flows to
            it. Its range is checked on the CPU alone: on a GPU a value outside of [0, 1] is the nearest inside, NaN 0.
            The default is 0, where the layer `LIF` has 0.2.
        rng_state: int64 `[seed, offset]` on x_seq's device, which fixes the noise. Neurons are counted in memory order:
            a channels_last x_seq gets other noise than its contiguous copy.
        generator: what rng_state is drawn from by default; without it, the default generator of the device. Activation
            checkpointing restores the default generator alone: inside of it a generator would draw other noise when the
            call is repeated, so give rng_state there.
        input_gain, input_bias, input_mean: the input current is `input_gain * (x_seq - input_mean) + input_bias`.
        strict_threshold: fire at u > 0 instead of u >= 0.
        scale_output: emit `v_threshold * s`.
        detach_reset: let no gradient flow through the spike inside the reset.
        multi_spike: emit as many spikes in a step as there are thresholds in the potential, `trunc(h / v_threshold)`
            where h > 0. Each takes `reset_amount` off: it needs `v_reset=None`. It has no noise, since its surrogates
            are the slope of no smooth number of spikes that an element could emit. strict_threshold has no effect.
        v_min: floor of the potential after reset, in units of x_seq, `v = relu(v - v_min) + v_min`; no gradient flows
            where it holds. It is not applied to v_init.
        v_init: potential before the first step, shape of x_seq without time; default `v_rest`.
        return_v_last, return_v_seq, return_h_seq: return potentials as well, see `LIFOutput`.
        backend: one of `available_backends()`; default the best for x_seq's device.

    `width`, `decay`, `v_threshold`, `v_reset`, `reset_amount` and those of the input are floats or tensors that
    broadcast against x_seq: one value, `[C, 1, 1]`, `[C, H, W]`, `[T, 1, 1, 1, 1]`, and so on. They and `v_init` are
    converted to the type of the arithmetic: float32, or float64 for a float64 x_seq.

    A potential that is NaN emits no spike. It makes the gradients of parameters NaN, as in any layer that multiplies.

    Returns:
        The spikes, in shape and type of x_seq; or a `LIFOutput` as soon as a potential is asked for. All are
        differentiable once with respect to x_seq, v_init and every parameter that is a tensor.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; nothing has been computed then.
        RuntimeError: the backend asked for does not work here.

    Example::

        x_seq = torch.randn(4, 32, 128, requires_grad=True)  # [T, B, N]
        width = torch.ones(128, requires_grad=True)  # one for each neuron
        s_seq = asgl_cuda.lif(x_seq, width=width, analog_prob=0.2)  # [4, 32, 128]
        s_seq.mean().backward()  # x_seq.grad [4, 32, 128], width.grad [128]

        output = asgl_cuda.lif(x_seq, return_v_last=True)
        more = asgl_cuda.lif(x_seq, v_init=output.v_last)  # goes on where the first call ended

    Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023.
    periodic_exponential: Weidel, Sheik: WaveSense, arXiv 2111.01456.

    The same in PyTorch, for the defaults and a mask of analog elements::

        v = torch.zeros_like(x_seq[0])
        for t in range(T):
            h = decay * v + x_seq[t]
            a = ((h - v_threshold) / width + 0.5).clamp(0, 1)
            z = (h >= v_threshold).to(h)
            s[t] = a + torch.where(mask[t], 0, z - a).detach()
            v = h * (1 - s[t]) + v_reset * s[t]

    With multi_spike `z = (h > 0) * (h / v_threshold).trunc()`. periodic_exponential is laplace of another distance than
    h - v_threshold where h >= v_threshold: `v_threshold * (2 * (h / v_threshold - 0.5).remainder(1) - 1)`, of slope 1.
    """
    given = Arguments(
        width, decay, v_threshold, v_reset, reset_amount, input_gain, input_bias, input_mean, analog_prob, v_init,
        rng_state, generator, surrogate, surrogate_gain, v_rest, strict_threshold, scale_output, detach_reset,
        multi_spike, v_min, time_dim, return_v_last, return_v_seq, return_h_seq, backend,
    )  # fmt: skip
    return computed(_CALLER, x_seq, given)


def call_of(x_seq: Tensor, **options: Any) -> Call:
    """The call that `lif` makes."""
    return checked_call(_CALLER, x_seq, Arguments(**{**(lif.__kwdefaults__ or {}), **options}))


def computed(caller: str, x_seq: Tensor, given: Arguments) -> Tensor | LIFOutput:
    """Does what `lif` does."""
    return run(checked_call(caller, x_seq, given), caller)


def run(call: Call, caller: str = _CALLER) -> Tensor | LIFOutput:
    """Computes a call."""
    if BACKENDS[call.backend].operators is None:
        return call.output(call.reference())
    parameters = call.parameters
    if is_differentiated((call.x_seq, call.v_init, *parameters), caller):
        return call.output(apply(LIFFunction, *call[:7], *parameters))
    return call.output(call.forward(keep_checkpoints=False))


def analog_mask(x_seq: Tensor, analog_prob: float, rng_state: Tensor, time_dim: int = 0) -> Tensor:
    """Which elements of `x_seq` are analog under the noise of `rng_state`: a bool tensor of x_seq's shape.

    Only shape, memory layout and device of x_seq count; `analog_prob` acts in steps of 1 / 65536. Raises TypeError and
    ValueError as `lif` does.

    Example::

        x_seq, rng_state = torch.randn(4, 32, 128), torch.tensor([2023, 0])
        s_seq = asgl_cuda.lif(x_seq, analog_prob=0.2, rng_state=rng_state)
        mask = asgl_cuda.analog_mask(x_seq, 0.2, rng_state)  # those that emitted the smooth value
        assert set(s_seq[~mask].tolist()) == {0.0, 1.0}
    """
    time_dim = check_input(x_seq, time_dim, "asgl_cuda.analog_mask")
    check_rng_state(rng_state, x_seq, "asgl_cuda.analog_mask")
    return analog_mask_below(x_seq, check_analog_prob(analog_prob, "asgl_cuda.analog_mask"), rng_state, time_dim)


def _draw_rng_state(x_seq: Tensor, generator: torch.Generator | None, backend: str, together: bool) -> Tensor:
    """`together`: the samples of a vmap can be computed together."""
    operators = BACKENDS[backend].operators
    if operators is not None:
        if torch.compiler.is_compiling():
            if generator is None:
                return operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device=x_seq.device))
        elif together and transforming():
            return draw_under_transforms(x_seq.device, generator)
    return torch.randint(2**63 - 1, (2,), generator=generator, device=x_seq.device)
