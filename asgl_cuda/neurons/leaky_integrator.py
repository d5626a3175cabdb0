"""The leaky integrator, a neuron without spikes, as a function and as a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..backends import BACKENDS, backend_of, choose_backend, operators_of
from ..backends.derivatives import DERIVATIVES
from ..backends.ops import ForwardResult, none_for_unwanted
from ..calls.plan import Plan, cached_by_signature, make_plan, parameter_sources, parameter_tensors
from ..checks import (
    check_bool,
    check_features,
    check_initial_state,
    check_input,
    check_keywords,
    check_not_nan,
    check_options,
    check_parameters,
)
from ..layout import to_dense_layout
from ..reference.learned import Logit
from ..reference.neurons import integrator_reference
from ..reference.records import Numbers, Rules
from ..torch_modes import (
    apply,
    apply_at_one_level,
    is_differentiated,
    needs_zero_gradients,
    once_differentiable,
    saved_tensors,
)
from .base import Granularity, NeuronLayer, format_values
from .deferred import tensor_of

_RULES = Rules(*[0] * len(Rules._fields))
_NUMBERS = dict.fromkeys(Numbers._fields, 0.0)


class IntegratorOutput(NamedTuple):
    """The result of `leaky_integrator` with return_v_last=True.

    `v_seq` has the shape and type of x_seq. `v_last` is the potential after the last step, in the shape of x_seq
    without time. `v_last` is float64 for a float64 input, and float32 otherwise.
    """

    v_seq: Tensor
    v_last: Tensor


# All arguments of `leaky_integrator` except x_seq, by name. A layer passes a learned decay as a Logit.
_Arguments = dict[str, Any]


_VALUES = "decay", "input_gain"
_OPTIONS: dict[str, Callable[..., Any]] = {"v_rest": check_not_nan, "delay": check_bool, "return_v_last": check_bool}


class IntegratorFunction(torch.autograd.Function):
    """integrator_forward as a differentiable function of x_seq, v_init, decay and input_gain.

    Takes an operator, or None for the operator of the backend, a plan, and these tensors.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, backend: str, plan: Plan, *tensors: Any) -> tuple[Tensor, ...]:
        """The sequence of potentials, and v_last if wanted."""
        if operator is None:
            operator = operators_of(backend, tensors).integrator_forward
        return tuple(operator(*tensors, *plan.packed, *plan.wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves the output and v_init if decay is learned, and x_seq if input_gain is."""
        _, ctx.backend, ctx.plan, *tensors = inputs
        x_seq, v_init, decay, input_gain = tensors
        *_, learns_decay, learns_gain = ctx.needs_input_grad
        ctx.shape, ctx.like = x_seq.shape, {"dtype": x_seq.dtype, "device": x_seq.device}
        kept = (output[0], v_init) if learns_decay else (None, None)
        ctx.save_for_backward(*kept, x_seq if learns_gain else None, decay, input_gain)
        ctx.set_materialize_grads(needs_zero_gradients())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """The gradients of all tensors, by integrator_backward."""
        plan, saved, wanted = ctx.plan, saved_tensors(ctx), ctx.needs_input_grad[3:]
        v_seq, v_init, x_seq, decay, input_gain = saved
        grad_v_seq, grad_v_last = none_for_unwanted(grads, (True, *plan.wanted))
        if grad_v_seq is None:
            grad_v_seq = torch.zeros(ctx.shape, **ctx.like)
        grad_v_seq = to_dense_layout(grad_v_seq, plan.rules.time_dim)
        found = operators_of(ctx.backend, (*saved, *grads)).integrator_backward(
            grad_v_seq, grad_v_last, v_seq, x_seq, v_init, decay, input_gain, *plan.packed, wanted
        )
        return None, None, None, *once_differentiable(none_for_unwanted(found, wanted), (*saved, *grads))


def _integrator_forward_with_graph(operator: Any, below: Any, *arguments: Any) -> ForwardResult:
    """An entry of DERIVATIVES: integrator_forward, called by `below`, with the graph of IntegratorFunction.

    `operator` only tells the backend.
    """
    *tensors, numbers, rules, delay, wants_v_last = arguments
    plan = make_plan(tensors[0], Rules(*rules), Numbers(*numbers), (wants_v_last,), options=(delay,))
    return list(apply_at_one_level(IntegratorFunction, below, backend_of(operator), plan, *tensors))


DERIVATIVES["integrator_forward"] = _integrator_forward_with_graph


def _checked_plan(caller: str, x_seq: Tensor, given: _Arguments) -> Plan:
    """The plan of a call, after checks of everything that does not depend on values of tensors."""
    time_dim = check_input(x_seq, given["time_dim"], caller)
    if (features := given.get("features")) is not None:
        check_features(features, x_seq, time_dim, caller)
    options = check_options(given, _OPTIONS, caller)
    constants = check_parameters(given, _VALUES, x_seq, caller, features)
    rules = _RULES.with_values(
        logit_decay=int(isinstance(given["decay"], Logit)),
        time_dim=time_dim,
        trailing=0 if features is None else features.trailing(x_seq, time_dim),
    )
    values = {name: 0.0 if constant is None else constant for name, constant in constants.items()}
    numbers = Numbers(**{**_NUMBERS, "v_rest": options["v_rest"], **values})
    sources = parameter_sources(_VALUES, constants, given, x_seq, time_dim)
    return make_plan(x_seq, rules, numbers, (options["return_v_last"],), sources, (options["delay"],))


_NAMES = *_VALUES, "time_dim", *_OPTIONS
# `_checked_plan` with one cache for calls without `features`, and one for calls with them, from layers whose decays
# differ between neurons.
_PLANS = {
    False: cached_by_signature(_NAMES)(_checked_plan),
    True: cached_by_signature((*_NAMES, "features"))(_checked_plan),
}


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
        x_seq: input, `[T, ...]`, or with time at `time_dim`; types and layouts are those of `lif`.
        decay: fraction of the potential, measured from v_rest, that is left after a step (no unit, per step). Any
            number is allowed; 1 sums up the input.
        input_gain: factor on the input. input_gain and decay are floats or tensors that broadcast against x_seq.
        v_rest: resting potential, in units of x_seq.
        v_init: potential before the first step, in the shape of x_seq without time; default `v_rest`.
        delay: return for each step the potential at the end of the step before. For the first step, return the initial
            potential.
        return_v_last: return the potential after the last step as well, see `IntegratorOutput`.
        backend: one of `available_backends()`; default the best for x_seq's device.

    For backward, x_seq is kept only if input_gain needs a gradient, and the output only if decay needs one.

    Returns:
        The potentials, in shape and type of x_seq; with return_v_last an `IntegratorOutput`. All outputs are
        differentiable once with respect to x_seq, v_init, and decay and input_gain if these are tensors. With the
        backend "reference", the outputs are differentiable any number of times.

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
    given: _Arguments = {
        "decay": decay, "input_gain": input_gain, "v_rest": v_rest, "v_init": v_init, "delay": delay,
        "time_dim": time_dim, "return_v_last": return_v_last, "backend": backend,
    }  # fmt: skip
    return _run_integrator(caller, tensor_of(x_seq, caller), given)


def _run_integrator(caller: str, x_seq: Tensor, given: _Arguments) -> Tensor | IntegratorOutput:
    """The result of `leaky_integrator` from a record of its arguments."""
    plan = _PLANS["features" in given](caller, x_seq, given)
    numbers, time_dim = plan.numbers, plan.rules.time_dim
    backend = choose_backend(given["backend"], x_seq.device, caller)
    v_init = given["v_init"]
    if v_init is not None:
        check_initial_state(v_init, x_seq, time_dim, caller)
        v_init = v_init.to(plan.real)
    fused = BACKENDS[backend].operators is not None
    decay, input_gain = parameter_tensors(plan, given, len(_VALUES), fused)
    if fused:
        x_seq = to_dense_layout(x_seq, time_dim)
        tensors = x_seq, v_init, decay, input_gain
        run = partial(apply, IntegratorFunction) if is_differentiated(tensors, caller) else IntegratorFunction.forward
        outputs = run(None, backend, plan, *tensors)
    else:
        outputs = integrator_reference(
            x_seq, v_init, numbers.decay if decay is None else decay,
            numbers.input_gain if input_gain is None else input_gain, numbers.v_rest, given["delay"], time_dim,
        )  # fmt: skip
    return IntegratorOutput(*outputs) if given["return_v_last"] else outputs[0]


class LeakyIntegrator(NeuronLayer):
    """Leaky integrators, over all time steps in one call: a synapse before `LIF`, or the read-out of a network.

    Args:
        num_features, granularity, time_dim, backend, device, dtype: as for `LIF`.
        decay: fraction of the potential, measured from v_rest, that is left after a step, in [0, 1]. A learned decay
            must be in [3.1e-7, 1 - 3.1e-7], and is stored as a logit.
        input_gain: factor on the input.
        v_rest: resting potential, in units of the input.
        delay: return for each step the potential at the end of the step before. For the first step, return the initial
            potential.
        learn_decay: whether the decay is a learned parameter or a constant.
        stateful: start each call from the potential `v` at the end of the call before, until `reset()` or
            `asgl_cuda.reset(model)`. Calls of `step(x_t)` always start from `v`.

    With granularity "channel" or "neuron", decay may also be a tensor of shape `num_features`. `decay` can also be read
    and set after construction. A state dict contains only a learned decay, as `logit_decay`.

    Raises ValueError or TypeError for wrong arguments, and the errors of `asgl_cuda.leaky_integrator`.

    Example::

        model = nn.Sequential(
            nn.Linear(64, 128),
            asgl_cuda.LeakyIntegrator(decay=0.8, input_gain=0.2),  # the synaptic current
            asgl_cuda.LIF(decay=0.9),
            nn.Linear(128, 10),
            asgl_cuda.LeakyIntegrator(decay=0.95),  # the read-out
        )
        scores = model(torch.randn(100, 32, 64))[-1]  # [T, B, 64] to [B, 10]: the read-out after the last step

    The layer computes `asgl_cuda.leaky_integrator(x_seq, decay, ...)`, whose docstring shows the computation as a loop
    in PyTorch.
    """

    _caller = "asgl_cuda.LeakyIntegrator"
    _function = "asgl_cuda.leaky_integrator"
    _options: ClassVar[dict[str, Callable[..., Any]]] = {**NeuronLayer._options, "delay": check_bool}
    delay: bool

    def __init__(
        self,
        num_features: int | Sequence[int] | None = None,
        *,
        decay: Tensor | float = 0.5,
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
        self._set_options(locals())
        empty = torch.empty(self.num_features or 1, device=device, dtype=dtype)
        self.logit_decay = nn.Parameter(empty) if check_bool("learn_decay", learn_decay, self._caller) else None
        self._set_decay(decay)

    def reset_parameters(self) -> None:
        """Resets a learned decay to the value last set, and clears the potential."""
        self.decay = self._decay
        self.reset()

    def _call_function(self, x_seq: Tensor, **options: Any) -> Tensor | IntegratorOutput:
        """Calls `leaky_integrator` with the layer's parameters."""
        decay = self._decay_value()
        given: _Arguments = {
            "decay": decay, "input_gain": self.input_gain, "v_rest": self.v_rest, "delay": self.delay,
            "v_init": None, "time_dim": self.time_dim, "return_v_last": False, "backend": self.backend,
            **options,
        }  # fmt: skip
        if self.num_features:
            (given["decay"],) = self._match_meta_device([decay], x_seq)
            given["features"] = self._features
        return _run_integrator(self._caller, x_seq, given)

    def extra_repr(self) -> str:
        features = f"{list(self.num_features)}, " if self.num_features else ""
        decay = f"decay={format_values(self._decay, self.logit_decay)}"
        others = f"input_gain={self.input_gain:g}, v_rest={self.v_rest:g}, granularity={self.granularity}"
        flags = "".join(f", {flag}=True" for flag in ("delay", "stateful") if getattr(self, flag))
        return f"{features}{decay}, {others}{flags}" + (f", time_dim={self.time_dim}" if self.time_dim else "")
