"""The leaky integrator, a neuron without spikes, as a function and as a layer."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .backends import BACKENDS, backend_of, choose_backend, operators_of
from .checks import (
    cached_by_signature,
    check_bool,
    check_input,
    check_keywords,
    check_not_nan,
    check_parameter,
    check_v_init,
)
from .derivatives import DERIVATIVES
from .layer import Granularity, NeuronLayer
from .layout import is_dense, real_type
from .learned import Logit
from .ops import ForwardResult, with_gaps
from .pending import tensor_of
from .reference import Numbers, Parameters, Rules, integrator_reference
from .transforms import apply, apply_here, grads_are_zeros, is_differentiated, once_differentiable, saved_tensors

_RULES = Rules(*[0] * len(Rules._fields))


class IntegratorOutput(NamedTuple):
    """The result of `leaky_integrator` with return_v_last.

    `v_seq` has shape and type of x_seq; `v_last`, the potential after the last step, has the same shape without time,
    in float32, or float64 for a float64 input.
    """

    v_seq: Tensor
    v_last: Tensor


# The options of `leaky_integrator`, unchecked, except backend.
_Options = namedtuple("_Options", "v_rest delay time_dim return_v_last")


def _all_parameters(decay: Any, input_gain: Any, others: Any = None) -> tuple[Any, ...]:
    """The neuron's parameters, as operators take them."""
    return others, decay, others, others, input_gain, others, others, others


class IntegratorFunction(torch.autograd.Function):
    """The fused operators of one backend as a differentiable function of x_seq, v_init, decay and input_gain."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        backend, numbers, rules, *options, x_seq, v_init, decay, input_gain = inputs
        operator = operators_of(backend, (x_seq, v_init, decay, input_gain)).integrator_forward
        parameters = _all_parameters(decay, input_gain)
        return tuple(operator(x_seq, v_init, parameters, tuple(numbers), tuple(rules), *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *ctx.options, x_seq, v_init, decay, input_gain = inputs
        *_, learns_decay, learns_gain = ctx.needs_input_grad
        ctx.shape, ctx.like = x_seq.shape, {"dtype": x_seq.dtype, "device": x_seq.device}
        kept = (output[0], v_init) if learns_decay else (None, None)
        ctx.save_for_backward(*kept, x_seq if learns_gain else None, decay, input_gain)
        ctx.set_materialize_grads(grads_are_zeros())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        backend, numbers, rules, delay, wants_v_last = ctx.options
        saved = saved_tensors(ctx)
        v_seq, v_init, x_seq, decay, input_gain = saved
        _, _, _, _, _, wants_x_seq, wants_v_init, wants_decay, wants_gain = ctx.needs_input_grad
        grad_v_seq, grad_v_last = with_gaps(grads, (True, wants_v_last))
        if grad_v_seq is None:
            grad_v_seq = torch.zeros(ctx.shape, **ctx.like)
        if not is_dense(grad_v_seq, rules.time_dim):
            grad_v_seq = grad_v_seq.contiguous()
        found = operators_of(backend, (*saved, *grads)).integrator_backward(
            grad_v_seq, grad_v_last, v_seq, x_seq, v_init, _all_parameters(decay, input_gain), tuple(numbers),
            tuple(rules), delay, (wants_x_seq, wants_v_init, *_all_parameters(wants_decay, wants_gain, False)),
        )  # fmt: skip
        gradients = once_differentiable(found, (*saved, *grads))
        asked = wants_x_seq, wants_v_init, wants_decay, wants_gain
        return None, None, None, None, None, *with_gaps(gradients, asked)


class _OperatorFunction(IntegratorFunction):
    """`IntegratorFunction` for a bare operator below autograd, paired with its backend."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        (_, below), numbers, rules, *options, x_seq, v_init, decay, input_gain = inputs
        parameters = _all_parameters(decay, input_gain)
        return tuple(below(x_seq, v_init, parameters, tuple(numbers), tuple(rules), *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (backend, _), *others = inputs
        IntegratorFunction.setup_context(ctx, (backend, *others), output)


def _differentiated(operator: Any, below: Any, *arguments: Any) -> ForwardResult:
    """The operator integrator_forward with its derivative."""
    x_seq, v_init, parameters, numbers, rules, *options = arguments
    given = Parameters(*parameters)
    named = Numbers(*numbers), Rules(*rules)
    tensors = x_seq, v_init, given.decay, given.input_gain
    return list(apply_here(_OperatorFunction, (backend_of(operator), below), *named, *options, *tensors))


DERIVATIVES["integrator_forward"] = _differentiated


@cached_by_signature
def _rules_of(caller: str, x_seq: Tensor, values: tuple[Any, Any], options: _Options) -> Rules:
    """Checks everything independent of tensor values."""
    decay, input_gain = values
    v_rest, delay, time_dim, return_v_last = options
    time_dim = check_input(x_seq, time_dim, caller)
    check_bool("delay", delay, caller)
    check_bool("return_v_last", return_v_last, caller)
    for name, value in (("decay", decay), ("input_gain", input_gain)):
        tensor = value.stored if isinstance(value, Logit) else value
        if isinstance(tensor, Tensor):
            check_parameter(name, tensor, x_seq, caller)
        else:
            check_not_nan(name, tensor, caller, "a float or a tensor")
    check_not_nan("v_rest", v_rest, caller)
    return _RULES.changed(logit_decay=int(isinstance(decay, Logit)), time_dim=time_dim)


def leaky_integrator(
    x_seq: Tensor,
    decay: Tensor | float = 0.5,
    *,
    input_gain: Tensor | float = 1.0,
    v_rest: float = 0.0,
    v_init: Tensor | None = None,
    delay: bool = False,
    time_dim: int = 0,
    return_v_last: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | IntegratorOutput:
    """Leaky integrators over a whole sequence: synaptic currents, or the read-out of a network.

    Args:
        x_seq: input, `[T, ...]` (or time at `time_dim`); types and layouts are those of `lif`.
        decay: share of the potential left after a step (no unit, per step), any value; 1 sums up the input.
        input_gain: factor on the input; like decay a float or a tensor that broadcasts against x_seq.
        v_rest: resting potential, in units of x_seq.
        v_init: potential before the first step, shape of x_seq without time; default `v_rest`.
        delay: emit the potential before the input of a step, not after.
        return_v_last: return the potential after the last step as well, see `IntegratorOutput`.
        backend: one of `available_backends()`; default the best for x_seq's device.

    Sequences saved for backward: x_seq if input_gain requires a gradient, the output if decay does; in half types the
    gradient of decay uses rounded potentials.

    Returns:
        The potentials, in shape and type of x_seq; or an `IntegratorOutput`. Both are differentiable once with respect
        to x_seq, v_init, and decay and input_gain if given as tensors.

    Raises TypeError, ValueError and RuntimeError as `lif` does.

    Example::

        current = asgl_cuda.leaky_integrator(torch.randn(4, 32, 128), 0.8, input_gain=0.2)  # [T, B, N]
        s_seq = asgl_cuda.lif(current)

    The same in PyTorch::

        v = torch.full_like(x_seq[0], v_rest)
        for t in range(T):
            before, v = v, v_rest + decay * (v - v_rest) + input_gain * x_seq[t]
            out[t] = before if delay else v
    """
    caller = "asgl_cuda.leaky_integrator"
    if unknown:
        check_keywords(unknown, ("decay", *(leaky_integrator.__kwdefaults__ or {})), caller)
    options = _Options(v_rest, delay, time_dim, return_v_last)
    return _computed(caller, tensor_of(x_seq, caller), decay, input_gain, v_init, options, backend)


def _computed(
    caller: str, x_seq: Tensor, decay: Any, input_gain: Any, v_init: Any, options: _Options, backend: str | None
) -> Tensor | IntegratorOutput:
    """The result of `leaky_integrator`; decay may be a Logit."""
    rules = _rules_of(caller, x_seq, (decay, input_gain), options)
    v_rest, delay, wants_v_last = float(options.v_rest), bool(options.delay), bool(options.return_v_last)
    time_dim, real = rules.time_dim, real_type(x_seq.dtype)
    backend = choose_backend(backend, x_seq.device, caller)
    if v_init is not None:
        check_v_init(v_init, x_seq, time_dim, caller)
        v_init = v_init.to(real)
    if BACKENDS[backend].operators is None:
        decay = decay.value() if isinstance(decay, Logit) else decay
        outputs: Any = integrator_reference(x_seq, v_init, decay, input_gain, v_rest, delay, time_dim)
    else:
        decay = decay.stored if isinstance(decay, Logit) else decay
        constants = [0.0 if isinstance(each, Tensor) else float(each) for each in (decay, input_gain)]
        values = 1.0, constants[0], 1.0, 0.0, constants[1], 0.0, 0.0
        numbers = Numbers(*values, residual_gain=1.0, v_rest=v_rest, surrogate_gain=1.0, v_min=0.0)
        decay, input_gain = (each.to(real) if isinstance(each, Tensor) else None for each in (decay, input_gain))
        tensors = x_seq if is_dense(x_seq, time_dim) else x_seq.contiguous(), v_init, decay, input_gain
        inputs = backend, numbers, rules, delay, wants_v_last, *tensors
        differentiated = is_differentiated(tensors, caller)
        outputs = apply(IntegratorFunction, *inputs) if differentiated else IntegratorFunction.forward(*inputs)
    return IntegratorOutput(*outputs) if wants_v_last else outputs[0]


class LeakyIntegrator(NeuronLayer):
    """Leaky integrators, over all time steps in one call: a synapse in front of `LIF`, or the read-out of a network.

    Args:
        num_features, granularity, time_dim, backend, device, dtype: as for `LIF`.
        decay: share of the potential left after a step, in [0, 1], in (0, 1) if learned (stored as a logit).
        input_gain: factor on the input.
        v_rest: resting potential, in units of the input.
        delay: emit the potential before the input of a step, not after.
        learn_decay: whether the decay is a parameter; else it stays constant.
        stateful: carry the potential from call to call, as `v`, until `reset()` or `asgl_cuda.reset(model)`.
            `step(x_t)`, one step without time, always carries `v`.

    Floats may also be tensors of one value, as for `LIF`. `decay` can be read at any time, and set to one value for all
    neurons. A state dict holds only a learned decay, as `logit_decay`.

    Neurons with a synaptic current are `nn.Sequential(LeakyIntegrator(decay=a), LIF(decay=b))`. Per neuron and step the
    two layers move 4 elements forward, 5 backward: the current and its gradient go through memory. A single kernel
    would move 2 and 3.

    Raises ValueError or TypeError for arguments out of range, otherwise as `asgl_cuda.leaky_integrator`.

    Example::

        model = nn.Sequential(
            nn.Linear(64, 128),
            asgl_cuda.LeakyIntegrator(decay=0.8, input_gain=0.2),  # the synaptic current
            asgl_cuda.LIF(decay=0.9),
            nn.Linear(128, 10),
            asgl_cuda.LeakyIntegrator(decay=0.95),  # the read-out
        )
        scores = model(torch.randn(100, 32, 64))[-1]  # [T, B, 64] to [B, 10]: its value after the last step

    The same in PyTorch: `asgl_cuda.leaky_integrator(x_seq, logit_decay.sigmoid(), ...)`, whose docstring has the loop.
    """

    _caller = "asgl_cuda.LeakyIntegrator"
    _function = "asgl_cuda.leaky_integrator"

    def __init__(
        self,
        num_features: int | Sequence[int] | None = None,
        *,
        decay: float = 0.5,
        input_gain: float = 1.0,
        v_rest: float = 0.0,
        delay: bool = False,
        granularity: Granularity = "layer",
        learn_decay: bool = False,
        stateful: bool = False,
        time_dim: int = 0,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        check_keywords(unknown, LeakyIntegrator.__init__.__kwdefaults__ or {}, self._caller)
        self._set_up(num_features, granularity, v_rest, input_gain, stateful, time_dim, backend, device, dtype)
        self.delay = check_bool("delay", delay, self._caller)
        empty = torch.empty(self.num_features or 1, device=device, dtype=dtype)
        self.logit_decay = nn.Parameter(empty) if check_bool("learn_decay", learn_decay, self._caller) else None
        self._set_decay(decay)

    def reset_parameters(self) -> None:
        """Resets a learned decay to the value last set, and clears the potential."""
        self.decay = self._decay
        self.reset()

    def _run(self, x_seq: Tensor, with_state: bool, **more: Any) -> Tensor:
        decay = self._decay_value()
        if self.num_features:
            decay = self._broadcast(decay, x_seq, check_input(x_seq, self.time_dim, self._caller))
        options = _Options(self.v_rest, self.delay, self.time_dim, self.stateful)
        v_init = self._carried() if with_state else None
        result = _computed(self._caller, x_seq, decay, self.input_gain, v_init, options, self.backend)
        if isinstance(result, IntegratorOutput):
            result, self.v = result
        return result

    def extra_repr(self) -> str:
        features = f"{list(self.num_features)}, " if self.num_features else ""
        decay = f"decay={self._decay:g}{'' if self.logit_decay is None else ' (learned)'}"
        others = f"input_gain={self.input_gain:g}, v_rest={self.v_rest:g}, granularity={self.granularity}"
        flags = "".join(f", {flag}=True" for flag in ("delay", "stateful") if getattr(self, flag))
        return f"{features}{decay}, {others}{flags}" + (f", time_dim={self.time_dim}" if self.time_dim else "")
