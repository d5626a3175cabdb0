"""The fused neuron as a function: autograd wiring, `lif` and `analog_mask`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from .backends import BACKENDS, Operators, choose_backend
from .checks import (
    check_analog_prob,
    check_analog_prob_tensor,
    check_bool,
    check_generator,
    check_input,
    check_not_nan,
    check_number,
    check_parameter,
    check_rng_state,
    check_surrogate,
    check_v_init,
    check_width,
    check_width_tensor,
)
from .layout import is_dense, real_type
from .ops import BackwardResult, ForwardResult
from .reference import BELOW_IN_STATE, DRAWS, Numbers, Parameters, Rules, analog_mask_below, lif_reference
from .surrogate import SURROGATES
from .transforms import apply, draw_under_transforms, is_differentiated, transforming

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


class Call(NamedTuple):
    """The arguments of `lif`, checked and converted."""

    backend: str
    numbers: Numbers
    rules: Rules
    wanted: tuple[bool, bool, bool]  # v_last, v_seq, h_seq
    x_seq: Tensor
    v_init: Tensor | None
    rng_state: Tensor | None
    parameters: Parameters  # None: a constant

    @classmethod
    def of(cls, *inputs: Any) -> Call:
        """Makes a call of its fields, with the parameters one by one, as autograd takes tensors."""
        backend, numbers, rules, wanted, x_seq, v_init, rng_state, *parameters = inputs
        return cls(backend, numbers, rules, wanted, x_seq, v_init, rng_state, Parameters(*parameters))

    @property
    def operators(self) -> Operators:
        """The operators of a fused backend."""
        operators = BACKENDS[self.backend].operators
        assert operators is not None  # the reference is differentiated by autograd and does not come here
        return operators

    @property
    def _packed(self) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        # torch takes 3 us longer for named tuples.
        return tuple(self.parameters), tuple(self.numbers), tuple(self.rules)

    def reference(self) -> tuple[Tensor, ...]:
        """Runs the reference."""
        return lif_reference(self.x_seq, self.v_init, self.rng_state, self.parameters, self.numbers, self.rules)

    def forward(self, keep_checkpoints: bool) -> ForwardResult:
        """Runs the operator lif_forward."""
        return self.operators.lif_forward(
            self.x_seq, self.v_init, self.rng_state, *self._packed, (*self.wanted, keep_checkpoints)
        )

    def backward(self, grads: Sequence[Tensor | None], checkpoints: Tensor, wanted: Sequence[bool]) -> BackwardResult:
        """Runs the operator lif_backward for the gradients of s_seq, v_last, v_seq and h_seq."""
        # A compiled graph passes empty gradients for the empty outputs.
        asked = [grad if asked else None for grad, asked in zip(grads, (True, *self.wanted), strict=True)]
        return self.operators.lif_backward(
            asked, self.x_seq, self.v_init, self.rng_state, checkpoints, *self._packed, wanted
        )

    def output(self, outputs: Sequence[Tensor]) -> Tensor | LIFOutput:
        """Picks the outputs that were asked for."""
        if not any(self.wanted):
            return outputs[0]
        return LIFOutput(
            outputs[0],
            *(output if asked else None for output, asked in zip(outputs[1:4], self.wanted, strict=True)),
        )


class LIFFunction(torch.autograd.Function):
    """The fused operators of one backend as a differentiable function of x_seq, v_init and the parameters.

    It takes the arguments of `Call.of`. Beside the outputs it returns the checkpoints, which backward needs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> ForwardResult:
        return Call.of(*inputs).forward(keep_checkpoints=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: ForwardResult) -> None:
        ctx.backend, ctx.numbers, ctx.rules, ctx.wanted, *tensors = inputs
        *_, checkpoints = output
        ctx.save_for_backward(checkpoints, *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*unasked(output, ctx.wanted), checkpoints)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        checkpoints, *tensors = ctx.saved_tensors
        call = Call.of(ctx.backend, ctx.numbers, ctx.rules, ctx.wanted, *tensors)
        _, _, _, _, wants_x_seq, wants_v_init, _, *wants_parameters = ctx.needs_input_grad
        wanted = (wants_x_seq, wants_v_init, *wants_parameters)
        of_x_seq, of_v_init, of_parameters = call.backward(grads[:4], checkpoints, wanted)
        gradients = once_differentiable(
            (of_x_seq, of_v_init, *of_parameters), (call.x_seq, call.v_init, *call.parameters, *grads[:4])
        )
        grad_x_seq, grad_v_init, *grad_parameters = (
            grad if asked else None for grad, asked in zip(gradients, wanted, strict=True)
        )
        return None, None, None, None, grad_x_seq, grad_v_init, None, *grad_parameters


def unasked(outputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """The potentials that are empty because they were not asked for."""
    return [output for output, asked in zip(outputs[1:4], wanted, strict=True) if not asked]


class _OnceDifferentiable(torch.autograd.Function):
    """The first `count` tensors unchanged, as functions of the others that can't be differentiated.

    torch's own once_differentiable cuts the graph where only the inputs, not the incoming gradients, require one: a
    gradient penalty would then train on without its penalty.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count] if tensor is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "asgl_cuda: a second derivative was asked for, and the fused backends have only the first; "
            "backend='reference' has all"
        )


def once_differentiable(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """The gradients; a graph that is to be differentiated again then says that it can't be."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return apply(_OnceDifferentiable, len(gradients), *gradients, *inputs)  # type: ignore[no-any-return]


def checked_call(caller: str, x_seq: Tensor, /, **neuron: Unpack[LIFArguments]) -> Call:
    """Does everything that `lif` does before it computes, draws included; errors name `caller`.

    No argument has a default. Names before the `/` would be compared with each of the others, which takes 3 us.
    """
    time_dim = check_input(x_seq, neuron["time_dim"], caller)
    check_surrogate(neuron["surrogate"], caller)
    for name in ("strict_threshold", "scale_output", "detach_reset", "return_v_last", "return_v_seq", "return_h_seq"):
        check_bool(name, neuron[name], caller)
    v_reset, reset_amount, v_threshold = neuron["v_reset"], neuron["reset_amount"], neuron["v_threshold"]
    if reset_amount is not None and v_reset is not None:
        raise ValueError(
            f"{caller}: reset_amount is for the soft reset and needs v_reset=None, got v_reset and reset_amount"
        )
    real = real_type(x_seq.dtype)
    reset = v_reset if v_reset is not None else v_threshold if reset_amount is None else reset_amount
    named = {
        "width": neuron["width"],
        "decay": neuron["decay"],
        "v_threshold": v_threshold,
        "v_reset" if v_reset is not None else "reset_amount": reset,
        "input_gain": neuron["input_gain"],
        "input_bias": neuron["input_bias"],
        "input_mean": neuron["input_mean"],
    }
    constants: list[float] = []
    tensors: list[Tensor | None] = []
    for name, value in named.items():
        if isinstance(value, Tensor):
            check_parameter(name, value, x_seq, caller)
            if torch.compiler.is_compiling() and any(value is other for other in [*named.values()][: len(tensors)]):
                value = value.view_as(value)  # the compiler takes no tensor twice, as the threshold that is subtracted
            constants.append(0.0)
            tensors.append(value.to(real))
        else:
            check = check_number if name == "width" else check_not_nan
            constants.append(check(name, value, caller, "a float or a tensor"))
            tensors.append(None)
    parameters = Parameters(*tensors)
    if parameters.width is None:
        check_width(float(neuron["width"]), caller, real)
    else:
        check_width_tensor(parameters.width, caller)
    v_init = neuron["v_init"]
    if v_init is not None:
        check_v_init(v_init, x_seq, time_dim, caller)
        v_init = v_init.to(real)
    surrogate_gain = check_not_nan("surrogate_gain", neuron["surrogate_gain"], caller)
    v_rest = check_not_nan("v_rest", neuron["v_rest"], caller)
    numbers = Numbers(*constants, v_rest, surrogate_gain)  # type: ignore[call-arg]
    analog_prob, below_as_data = neuron["analog_prob"], None
    if isinstance(analog_prob, Tensor):
        analog_below, below_as_data = BELOW_IN_STATE, check_analog_prob_tensor(analog_prob, x_seq, caller)
    else:
        analog_below = check_analog_prob(analog_prob, caller)
    rules = Rules(
        SURROGATES[neuron["surrogate"]].id,
        int(v_reset is not None),
        int(neuron["strict_threshold"]),
        int(neuron["scale_output"]),
        int(neuron["detach_reset"]),
        analog_below,
        time_dim,
    )
    backend = choose_backend(neuron["backend"], x_seq.device, caller)
    rng_state, generator = neuron["rng_state"], neuron["generator"]
    if rng_state is not None:
        check_rng_state(rng_state, x_seq, caller)
        if generator is not None:
            raise ValueError(f"{caller}: rng_state and generator exclude each other, got both")
    check_generator(generator, x_seq, caller)
    if not is_dense(x_seq, time_dim):
        x_seq = x_seq.contiguous()
    if analog_below in (0, DRAWS):
        rng_state = None
    else:
        if rng_state is None:
            rng_state = _draw_rng_state(x_seq, generator, backend, together=below_as_data is None)
        rng_state = rng_state.contiguous() if below_as_data is None else torch.cat([rng_state, below_as_data])
    wanted = neuron["return_v_last"], neuron["return_v_seq"], neuron["return_h_seq"]
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
        decay: share of the potential that is left after a step (no unit, per step).
        v_threshold, v_rest: threshold and resting potential, in units of x_seq.
        v_reset: potential after a spike (hard reset), or None for the soft reset.
        reset_amount: what a spike takes off the potential under the soft reset; default `v_threshold`.
        width: width of the surrogate, in units of x_seq, at least 1.1e-19 in float32, where 1 / width^2 is still
            finite. A tensor is checked on the CPU alone, outside of torch.compile and torch.func, since a GPU would
            have to be waited for: elsewhere the gradients of a width < 0 have the wrong sign, those of 0 are NaN.
        surrogate: rectangle, triangle, sigmoid, arctan, erf, fast_sigmoid or laplace.
        surrogate_gain: factor on the surrogate gradient.
        analog_prob: share of elements and steps that emit F(u / width) instead of a spike, in steps of 1 / 65536. As a
            tensor of one value on x_seq's device it is data, which a compiled graph does not fix. No gradient flows to
            it. Its range is checked on the CPU alone: on a GPU a value outside of [0, 1] is the nearest inside, NaN 0.
        rng_state: int64 `[seed, offset]` on x_seq's device, which fixes the noise. Neurons are counted in memory order:
            a channels_last x_seq gets other noise than its contiguous copy.
        generator: what rng_state is drawn from by default; without it, the default generator of the device. Activation
            checkpointing restores the default generator alone: inside of it a generator would draw other noise when the
            call is repeated, so give rng_state there.
        input_gain, input_bias, input_mean: the input current is `input_gain * (x_seq - input_mean) + input_bias`.
        strict_threshold: fire at u > 0 instead of u >= 0.
        scale_output: emit `v_threshold * s`.
        detach_reset: let no gradient flow through the spike inside the reset.
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

    Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023.

    The same in PyTorch, for the defaults and a mask of analog elements::

        v = torch.zeros_like(x_seq[0])
        for t in range(T):
            h = decay * v + x_seq[t]
            a = ((h - v_threshold) / width + 0.5).clamp(0, 1)
            z = (h >= v_threshold).to(h)
            s[t] = a + torch.where(mask[t], 0, z - a).detach()
            v = h * (1 - s[t]) + v_reset * s[t]
    """
    call = checked_call(
        _CALLER,
        x_seq,
        decay=decay,
        v_threshold=v_threshold,
        v_reset=v_reset,
        reset_amount=reset_amount,
        width=width,
        surrogate=surrogate,
        surrogate_gain=surrogate_gain,
        analog_prob=analog_prob,
        rng_state=rng_state,
        generator=generator,
        v_rest=v_rest,
        input_gain=input_gain,
        input_bias=input_bias,
        input_mean=input_mean,
        strict_threshold=strict_threshold,
        scale_output=scale_output,
        detach_reset=detach_reset,
        v_init=v_init,
        time_dim=time_dim,
        return_v_last=return_v_last,
        return_v_seq=return_v_seq,
        return_h_seq=return_h_seq,
        backend=backend,
    )
    if BACKENDS[call.backend].operators is None:
        return call.output(call.reference())
    if is_differentiated((call.x_seq, call.v_init, *call.parameters), _CALLER):
        *others, parameters = call
        return call.output(apply(LIFFunction, *others, *parameters))
    return call.output(call.forward(keep_checkpoints=False))


def analog_mask(x_seq: Tensor, analog_prob: float, rng_state: Tensor, time_dim: int = 0) -> Tensor:
    """Which elements of `x_seq` are analog under the noise of `rng_state`: a bool tensor of x_seq's shape.

    Only shape, memory layout and device of x_seq count; `analog_prob` acts in steps of 1 / 65536. Raises TypeError and
    ValueError as `lif` does.
    """
    time_dim = check_input(x_seq, time_dim, "asgl_cuda.analog_mask")
    check_rng_state(rng_state, x_seq, "asgl_cuda.analog_mask")
    return analog_mask_below(x_seq, check_analog_prob(analog_prob, "asgl_cuda.analog_mask"), rng_state, time_dim)


def _draw_rng_state(x_seq: Tensor, generator: torch.Generator | None, backend: str, together: bool) -> Tensor:
    """`together`: the samples of a vmap can be computed together."""
    operators = BACKENDS[backend].operators
    under_transforms = not torch.compiler.is_compiling() and transforming()
    if together and operators is not None and under_transforms:
        return draw_under_transforms(x_seq.device, generator)
    if generator is None and operators is not None and not under_transforms:
        return operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device=x_seq.device))
    return torch.randint(2**63 - 1, (2,), generator=generator, device=x_seq.device)
