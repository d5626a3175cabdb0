"""Recurrent neurons, whose spikes enter the next step's current through a weight, as a function and as a layer.

They carry v and s, with a synapse also i, and with an adaptation w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..backends import BACKENDS, backend_of, operators_of
from ..backends.derivatives import DERIVATIVES
from ..backends.ops import ForwardResult, none_for_unwanted
from ..calls.arguments import Arguments, NeuronArguments
from ..calls.plan import Call, Plan, checked_call, last_states, make_plan
from ..checks import (
    check_bool,
    check_dense,
    check_finite,
    check_floating,
    check_initial_state,
    check_input,
    check_int,
    check_keywords,
    check_name,
    check_parameters,
    check_sizes,
    format_value,
)
from ..reference.learned import Logit
from ..reference.neurons import recurrent_reference
from ..reference.records import IN_CURRENT, Numbers, Rules
from ..torch_modes import (
    apply,
    apply_at_one_level,
    is_differentiated,
    needs_zero_gradients,
    once_differentiable,
    saved_tensors,
)
from .adaptive_lif import Adapting, AdaptiveLIF, adaptation_bits
from .base import format_values
from .deferred import tensor_of
from .lif import LIF_DEFAULTS, lacking_options
from .spiking import Neurons

_CALLER = "asgl_cuda.recurrent_lif"
# Arguments of the neuron that may be a tensor of one value or of shape [N]. The operators take them as rows of one
# tensor, [9, N], in which v_reset and reset_amount share a row. bias and syn_decay are the last two rows.
_ROWS = "width", "decay", "v_threshold", "v_reset", "reset_amount", "adapt_decay", "adapt_potential", "adapt_spike"


class RecurrentLIFOutput(NamedTuple):
    """The result of `recurrent_lif` if states are asked for. Fields that were not asked for are None.

    `s_seq`, `v_seq` and `h_seq` are those of `LIFOutput`, or of `AdaptiveLIFOutput` if there is an adaptation.

    `return_v_last` asks for all states after the last step: the potential `v_last`, the spikes `s_last`, the current
    `i_last` of a synapse, and the adaptation `w_last`. `i_last` is None without a synapse, and `w_last` is None without
    an adaptation. `s_last` is not multiplied by the threshold, even with scale_output. States have the shape of x_seq
    without time. They are float64 for a float64 input, and float32 otherwise.
    """

    s_seq: Tensor
    v_last: Tensor | None
    s_last: Tensor | None
    i_last: Tensor | None
    w_last: Tensor | None
    v_seq: Tensor | None
    h_seq: Tensor | None


class RecurrentFunction(torch.autograd.Function):
    """recurrent_forward as a differentiable function of all tensors but rng_state.

    Takes an operator, or None for the operator of the backend, a plan, and the tensors of the operator.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, backend: str, plan: Plan, *tensors: Any) -> tuple[Tensor, ...]:
        """The spikes and the wanted outputs."""
        if operator is None:
            operator = operators_of(backend, tensors).recurrent_forward
        return tuple(operator(*tensors, *plan.packed, plan.wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves h_seq, the emitted spikes, i_seq and w_seq where they are needed, and all inputs but x_seq."""
        _, ctx.backend, ctx.plan, x_seq, *tensors = inputs
        ctx.dtype = x_seq.dtype
        s_seq, *others = output
        emitted, h_seq, _, i_seq, w_seq, *_ = none_for_unwanted(others, ctx.plan.wanted)
        ctx.save_for_backward(h_seq, s_seq if emitted is None else emitted, i_seq, w_seq, *tensors)
        ctx.set_materialize_grads(needs_zero_gradients())
        ctx.mark_non_differentiable(*(each for each in (emitted, i_seq, w_seq) if each is not None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """The gradients of all tensors but rng_state, by recurrent_backward."""
        plan, saved, wanted = ctx.plan, saved_tensors(ctx), ctx.needs_input_grad[3:-1]
        grad_s_seq, _, grad_h_seq, grad_v_seq, _, _, *grads_last = none_for_unwanted(grads, (True, *plan.wanted))
        inputs = (*saved, *grads)
        found = operators_of(ctx.backend, inputs).recurrent_backward(
            grad_s_seq, grad_v_seq, grad_h_seq, *grads_last, *saved, *plan.packed, wanted
        )
        grad_x_seq, *gradients = once_differentiable(none_for_unwanted(found, wanted), inputs)
        return None, None, None, None if grad_x_seq is None else grad_x_seq.to(ctx.dtype), *gradients, None


def _recurrent_forward_with_graph(operator: Any, below: Any, *arguments: Any) -> ForwardResult:
    """An entry of DERIVATIVES: recurrent_forward, called by `below`, with the graph of RecurrentFunction.

    `operator` only tells the backend. The sequences that backward needs are always computed, and returned if wanted.
    """
    *tensors, numbers, rules, has_synapse, detach_recurrent, wanted = arguments
    _, _, wants_v_seq, _, _, *wants_last = wanted
    kept = True, True, wants_v_seq, has_synapse, Rules(*rules).adaptation != 0, *wants_last
    options = has_synapse, detach_recurrent
    plan = make_plan(tensors[0], Rules(*rules), Numbers(*numbers), kept, options=options)
    s_seq, *outputs = apply_at_one_level(RecurrentFunction, below, backend_of(operator), plan, *tensors)
    named = none_for_unwanted(outputs, kept)
    return [s_seq, *(each for each, asked in zip(named, wanted, strict=True) if asked)]


DERIVATIVES["recurrent_forward"] = _recurrent_forward_with_graph


def recurrent_lif(
    x_seq: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    syn_decay: Tensor | float | None = None,
    input_gain: float = 1.0,
    adapt_decay: Tensor | float | None = None,
    adapt_potential: Tensor | float = 0.0,
    adapt_spike: Tensor | float = 0.0,
    to_threshold: bool = False,
    s_init: Tensor | None = None,
    i_init: Tensor | None = None,
    w_init: Tensor | None = None,
    detach_recurrent: bool = False,
    **neuron: Unpack[NeuronArguments],
) -> Tensor | RecurrentLIFOutput:
    """Recurrent leaky integrate-and-fire neurons over a whole sequence.

    Args:
        x_seq: input current, `[T, B, N]`, or `[B, T, N]` with time_dim=1; types as for `lif`. An input that is not
            contiguous is copied once.
        weight: `[N, N]`, with a row for each receiving neuron, as in `torch.nn.Linear`; or `[N]`, from each neuron to
            itself.
        bias: `[N]`, added to x_seq at each step, also at the first.
        syn_decay: fraction of the synaptic current that is left after a step: a float, or a tensor of one value or
            `[N]`; None for no synapse.
        input_gain: a number, the factor on the current after the synapse; must be 1 with an adaptation.
        adapt_decay, adapt_potential, adapt_spike, to_threshold: the adaptation, as in `adaptive_lif`; adapt_decay None
            for no adaptation.
        s_init: spikes before the first step, `[B, N]`; default 0.
        i_init: synaptic current before the first step, `[B, N]`, only with syn_decay; default 0.
        w_init: adaptation in the first step, `[B, N]`, only with adapt_decay; default 0.
        detach_recurrent: stop the gradient that flows through the weight to earlier spikes and s_init. The weight still
            gets its gradient.
        neuron: arguments of `lif` except `input_bias`, `input_mean`, `residual`, `residual_gain`, `levels`,
            `multi_spike` and `v_min`. A parameter that is a tensor has one value or the shape `[N]`.

    The weight, the bias and all tensor parameters are converted to the type of the arithmetic, also under autocast.
    This type is float64 for a float64 x_seq and float32 otherwise.

    Step t draws the noise that `lif` would draw for a sequence of this one step with the rng_state
    `[seed + 0x61C8864680B583EB * t, offset]`, where the sum is taken modulo 2^64. Calls whose offsets differ modulo
    2^32 share no noise. The smooth values of analog elements (see `lif`) are fed back like spikes.

    For backward, the spikes and the potentials before the reset are stored. The potentials take 4 bytes per neuron and
    time step, or 8 in float64. The guide "Recurrent neurons" says what else is stored, and how the backends compute.

    Returns:
        The spikes, or a `RecurrentLIFOutput` if a state or potential was asked for. All outputs are differentiable once
        with respect to x_seq, weight, bias, the initial states and every tensor parameter.

    Raises TypeError, ValueError and RuntimeError as `lif` does.

    Example::

        x_seq = torch.randn(100, 32, 128)  # [T, B, N]
        weight = torch.nn.init.orthogonal_(torch.empty(128, 128)).requires_grad_()
        s_seq = asgl_cuda.recurrent_lif(x_seq, weight, decay=0.9, syn_decay=0.8)
        s_seq.mean().backward()  # weight.grad [128, 128]

    The same in PyTorch, for a dense weight and the defaults of `lif`, without an adaptation::

        s, i, v = (torch.zeros_like(x_seq[0]) for _ in range(3))
        for t in range(T):
            j = x_seq[t] + s @ weight.T + bias
            i = syn_decay * i + j  # with a synapse, else j
            h = decay * v + input_gain * i
            s = s_seq[t] = (h >= v_threshold).to(h)
            v = h * (1 - s)

    Sources: as for `lif`. Networks of such neurons: Bellec, Salaj, Subramoney, Legenstein, Maass: Long short-term
    memory and learning-to-learn in networks of spiking neurons, NeurIPS 2018; Cramer, Stradmann, Schemmel, Zenke: The
    Heidelberg spiking data sets for the systematic evaluation of spiking neural networks, IEEE TNNLS 2022.
    """
    check_keywords(neuron, _KNOWN, _CALLER, _WITHOUT)
    recurrence = _Recurrence(weight, bias, syn_decay, s_init, i_init, detach_recurrent)
    given: Arguments = {**LIF_DEFAULTS, **neuron, "input_gain": input_gain, "w_init": w_init}
    adaptation = {"adapt_potential": adapt_potential, "adapt_spike": adapt_spike, "to_threshold": to_threshold}
    if adapt_decay is None:
        _check_no_adaptation(adaptation, recurrent_lif.__kwdefaults__, _CALLER)
    else:
        place = adaptation_bits(
            given["v_reset"], given["reset_amount"], check_bool("to_threshold", to_threshold, _CALLER)
        )
        given |= {
            "adapt_decay": adapt_decay, "adapt_potential": adapt_potential, "adapt_spike": adapt_spike,
            "adaptation": place,
        }  # fmt: skip
    return _run_recurrent(tensor_of(x_seq, _CALLER), recurrence, given)


class _Recurrence(NamedTuple):
    """The arguments of `recurrent_lif` that `lif` does not have."""

    weight: Tensor
    bias: Tensor | None
    syn_decay: Tensor | float | None
    s_init: Tensor | None
    i_init: Tensor | None
    detach_recurrent: bool


def _check_no_adaptation(given: Mapping[str, Any], defaults: Any, caller: str) -> None:
    """Refuses options of an adaptation that are not at their defaults, for neurons without an adaptation."""
    for name, value in given.items():
        is_number = isinstance(value, (int, float))  # arrays and tensors have no single truth value
        if value is not defaults[name] and not (is_number and value == defaults[name]):
            raise ValueError(f"{caller}: {name} needs adapt_decay, got {format_value(value)} without an adaptation")


def _check_gain_with_adaptation(input_gain: Any, caller: str) -> None:
    """Refuses an input_gain other than 1, for neurons with an adaptation."""
    if input_gain != 1:
        raise ValueError(f"{caller}: input_gain must be 1 with an adaptation, got {format_value(input_gain)}")


# Suffixes of an error for an input with this number of dimensions.
_DIMENSION_HINTS = {2: "; is time or the batch missing?", 4: "; if step got a sequence, call the model itself instead"}


def _check_recurrence(x_seq: Tensor, given: _Recurrence, neuron: Any) -> float:
    """Refuses arguments that do not fit x_seq. Returns syn_decay if it is a constant, otherwise 0."""
    time_dim = check_input(x_seq, neuron["time_dim"], _CALLER)
    if x_seq.dim() != 3 or time_dim > 1:
        raise ValueError(
            f"{_CALLER}: x_seq must have shape [T, B, N], or [B, T, N] with time_dim=1, got {list(x_seq.shape)} with "
            f"time_dim={time_dim}{_DIMENSION_HINTS.get(x_seq.dim(), '')}"
        )
    count = x_seq.shape[2]
    _check_shape("weight", given.weight, x_seq, [count, count], [count])
    if given.bias is not None:
        _check_shape("bias", given.bias, x_seq, [count])
    rows = {**{name: neuron[name] for name in _ROWS if name in neuron}, "syn_decay": given.syn_decay}
    for name, value in rows.items():
        if not isinstance(value, Tensor):
            continue
        check_dense(name, value, _CALLER)
        if value.numel() != 1 and (value.shape[-1] != count or value.numel() != count):
            raise ValueError(f"{_CALLER}: {name} must have one value or shape [{count}], got {list(value.shape)}")
    check_bool("detach_recurrent", given.detach_recurrent, _CALLER)
    check_finite("input_gain", neuron["input_gain"], _CALLER)
    if "adaptation" in neuron:
        _check_gain_with_adaptation(neuron["input_gain"], _CALLER)
    else:
        _check_no_adaptation({"w_init": neuron["w_init"]}, {"w_init": None}, _CALLER)
    if given.i_init is not None and given.syn_decay is None:
        raise ValueError(f"{_CALLER}: i_init needs syn_decay, got syn_decay=None, which means no synapse")
    for name, state in (("s_init", given.s_init), ("i_init", given.i_init)):
        if state is not None:
            check_initial_state(state, x_seq, time_dim, _CALLER, name)
    if given.syn_decay is None:
        return 0.0
    return check_parameters(rows, ["syn_decay"], x_seq, _CALLER)["syn_decay"] or 0.0


def _check_shape(name: str, value: Tensor, x_seq: Tensor, *shapes: list[int]) -> None:
    """Refuses a tensor that has none of these shapes, or does not fit x_seq in type and device."""
    check_floating(name, value, x_seq, _CALLER)
    if not any(value.shape == torch.Size(shape) for shape in shapes):
        expected = f"shape {' or '.join(map(str, shapes))} for x_seq of shape {list(x_seq.shape)}"
        raise ValueError(f"{_CALLER}: {name} must have {expected}, got {list(value.shape)}")


def _stacked_parameters(x_seq: Tensor, given: _Recurrence, call: Call, syn_decay: float) -> Tensor:
    """The argument `parameters` of the operators, `[9, N]`, which has a value for each neuron, also of constants."""
    count, real = x_seq.shape[2], call.plan.real
    _, _, _, *neuron_values, _ = call.inputs
    synapse_value = given.syn_decay.value() if isinstance(given.syn_decay, Logit) else given.syn_decay
    constants = *call.plan.numbers[: len(neuron_values)], 0.0, syn_decay
    return torch.stack(
        [
            value.to(real).reshape(-1).expand(count)
            if isinstance(value, Tensor)
            else torch.full((count,), constant, dtype=real, device=x_seq.device)
            for value, constant in zip((*neuron_values, given.bias, synapse_value), constants, strict=True)
        ]
    )


def _run_recurrent(x_seq: Tensor, given: _Recurrence, neuron: Arguments) -> Tensor | RecurrentLIFOutput:
    """The result of `recurrent_lif` from records of its arguments."""
    syn_decay = _check_recurrence(x_seq, given, neuron)
    call = checked_call(_CALLER, x_seq, neuron, together=False)
    real, has_synapse = call.plan.real, given.syn_decay is not None
    parameters, rules = _stacked_parameters(x_seq, given, call, syn_decay), call.plan.rules
    wants_v_last, wants_v_seq, wants_h_seq = call.plan.wanted
    v_init, rng_state = call.inputs.v_init, call.inputs.rng_state
    states = [None if state is None else state.to(real) for state in (v_init, given.s_init, given.i_init)]
    tensors: list[Any] = [x_seq.contiguous(), given.weight.to(real), parameters, *states, rng_state]
    if BACKENDS[call.backend].operators is None:
        arguments: list[Any] = [*tensors, call.plan.numbers, rules, has_synapse, given.detach_recurrent]
        s_seq, h_seq, v_seq, *last = recurrent_reference(*arguments)
        outputs: Any = s_seq, None, h_seq, v_seq, None, None, *last
    else:
        differentiated = is_differentiated(tensors, _CALLER)
        # If autograd records the call, whether the operator returns each of these sequences: emitted (the spikes of
        # dtype `real`, before scale_output scales them), h_seq, v_seq, i_seq for the gradient of syn_decay, and w_seq
        # for the gradients of an adaptation.
        keeps = (
            bool(rules.scale_output) or real != x_seq.dtype,
            True,
            wants_v_seq,
            isinstance(given.syn_decay, (Tensor, Logit)),
            rules.adaptation > IN_CURRENT or isinstance(neuron.get("adapt_decay"), Tensor),
        )
        sequences = keeps if differentiated else (False, wants_h_seq, wants_v_seq, False, False)
        wanted = *sequences, wants_v_last, wants_v_last, wants_v_last and has_synapse
        options = has_synapse, given.detach_recurrent
        plan = make_plan(x_seq, rules, call.plan.numbers, wanted, options=options)
        run = partial(apply, RecurrentFunction) if differentiated else RecurrentFunction.forward
        outputs = none_for_unwanted(run(None, call.backend, plan, *tensors), (True, *wanted))
    if not (wants_v_last or wants_v_seq or wants_h_seq):
        return outputs[0]  # type: ignore[no-any-return]
    s_seq, _, h_seq, v_seq, _, _, v_last, s_last, i_last = outputs
    last_of_neuron = last_states(call.plan, v_last) if wants_v_last else {}
    return RecurrentLIFOutput(
        s_seq,
        last_of_neuron.get("v_last"),
        s_last if wants_v_last else None,
        i_last if wants_v_last and has_synapse else None,
        last_of_neuron.get("w_last"),
        v_seq if wants_v_seq else None,
        h_seq if wants_h_seq else None,
    )


class RecurrentLIF(Adapting):
    """Recurrent leaky integrate-and-fire neurons: `LIF` whose spikes are fed back to the next step through a weight.

    Args:
        hidden_size: number of neurons, N.
        recurrent: "dense" for a weight `[N, N]` from each neuron to all neurons, or "elementwise" for a weight `[N]`
            from each neuron to itself.
        bias: whether the recurrent current has a bias.
        autapses: whether neurons are connected to themselves; if not, the diagonal of the weight has no effect.
        syn_decay: fraction of the synaptic current that is left after a step, in [0, 1], a float or a tensor like
            `decay` of `LIF`; None for no synapse. If learned it must be in [3.1e-7, 1 - 3.1e-7], and is stored as a
            logit.
        learn_syn_decay: whether syn_decay is a parameter, with one value per layer or neuron as `granularity` says.
        detach_recurrent: stop the gradient that flows through the weight to the spikes of the step before.
        adapt_decay, adapt_potential, adapt_spike, to_threshold, learn_adaptation: arguments of `AdaptiveLIF`, for
            recurrent neurons with an adaptation (RadLIF, LSNN). Without adapt_decay there is no adaptation. With
            adapt_decay, the other arguments have the defaults of `AdaptiveLIF`, and input_gain must be 1.
        device, dtype: of the parameters.
        lif_options: arguments of `LIF` except `num_features`, `levels`, `multi_spike` and `v_min`. The granularity
            "channel" is the same as "neuron" here.

    Shapes: input and output are `[T, B, N]`, or `[B, T, N]` with time_dim=1.

    Weight and bias are initialised as in `torch.nn.RNN`, uniformly from `[-1 / sqrt(N), 1 / sqrt(N)]`. In addition to
    the parameters of `LIF`, a state dict has `recurrent_weight` and `recurrent_bias`. A learned syn_decay adds
    `logit_syn_decay`, and a learned adaptation adds the parameters of `AdaptiveLIF`. A stateful layer carries the
    potential `v` and the last spikes `s` from call to call. It also carries the current `i` of a synapse and the
    adaptation `w`.

    `asgl_cuda.recompute_spikes` has no effect on this layer, because the backward of this layer needs the spikes.
    Raises the errors of `LIF`.

    Example::

        model = nn.Sequential(
            nn.Linear(40, 128),
            asgl_cuda.RecurrentLIF(128, decay=0.95, syn_decay=0.8, granularity="neuron", learn_decay=True),
            nn.Linear(128, 12),
            asgl_cuda.LeakyIntegrator(decay=0.95),
        )
        scores = model(torch.randn(100, 32, 40)).mean(0)  # [T, B, 40] to [B, 12]

    The layer computes `asgl_cuda.recurrent_lif(x_seq, layer.recurrent_weight, ...)`, whose docstring shows the forward
    computation as a loop in PyTorch, without noise and adaptation. To train with such a loop, give s the gradient of a
    surrogate, and for `detach_reset=True` use `s.detach()` in the last line.
    """

    _caller = "asgl_cuda.RecurrentLIF"
    _function = _CALLER
    _states = ("v", "s", "i", "w")
    _weights = ("recurrent_weight", "recurrent_bias")
    _constants = (*Adapting._constants, "_syn_decay")
    _options: ClassVar[dict[str, Any]] = {"scale_output": check_bool, **Neurons._options}
    s: Tensor | None
    i: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        *others: NoReturn,
        recurrent: Literal["dense", "elementwise"] = "dense",
        bias: bool = True,
        autapses: bool = True,
        syn_decay: Tensor | float | None = None,
        learn_syn_decay: bool = False,
        detach_recurrent: bool = False,
        adapt_decay: Tensor | float | None = None,
        adapt_potential: Tensor | float | None = None,
        adapt_spike: Tensor | float | None = None,
        to_threshold: bool = False,
        learn_adaptation: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **lif_options: Any,
    ) -> None:
        super().__init__()
        caller = self._caller
        if others:
            raise TypeError(
                f"{caller}: takes only hidden_size as a positional argument, got "
                f"{format_value((hidden_size, *others))}; for inputs of another size put "
                "torch.nn.Linear(input_size, hidden_size) before the layer"
            )
        (count,) = check_sizes("hidden_size", check_int("hidden_size", hidden_size, caller), caller)
        granularity = lif_options.get("granularity", "layer")
        features = None if isinstance(granularity, str) and granularity == "layer" else count
        own: dict[str, Any] = {"num_features": features, "device": device, "dtype": dtype}
        self._set_up_lif(lif_options, RecurrentLIF.__init__, _WITHOUT, **own)
        check_name("recurrent", recurrent, ("dense", "elementwise"), caller)
        self.hidden_size = count
        self.autapses = check_bool("autapses", autapses, caller)
        if not autapses and recurrent == "elementwise":
            raise ValueError(
                f"{caller}: recurrent='elementwise' is made of autapses and needs autapses=True, got False"
            )
        self.detach_recurrent = check_bool("detach_recurrent", detach_recurrent, caller)
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.recurrent_weight = nn.Parameter(empty((count,) if recurrent == "elementwise" else (count, count)))
        self.recurrent_bias = nn.Parameter(empty(count)) if check_bool("bias", bias, caller) else None
        learned = check_bool("learn_syn_decay", learn_syn_decay, caller)
        if learned and syn_decay is None:
            raise ValueError(f"{caller}: learn_syn_decay needs syn_decay as initial value, got None")
        self.logit_syn_decay = nn.Parameter(empty(self.num_features or 1)) if learned else None
        self._initialise_recurrence(syn_decay)
        adaptation: dict[str, Any] = {
            "adapt_potential": adapt_potential, "adapt_spike": adapt_spike, "to_threshold": to_threshold,
            "learn_adaptation": learn_adaptation,
        }  # fmt: skip
        if adapt_decay is None:
            _check_no_adaptation(adaptation, RecurrentLIF.__init__.__kwdefaults__, caller)
            return
        _check_gain_with_adaptation(self.input_gain, caller)
        like = AdaptiveLIF.__init__.__kwdefaults__ or {}
        adaptation = {name: like[name] if value is None else value for name, value in adaptation.items()}
        self._set_up_adaptation(adapt_decay, **adaptation, device=device, dtype=dtype)

    def _initialise_recurrence(self, syn_decay: Any) -> None:
        """Draws the recurrent weight and bias. Keeps syn_decay as the value last set; if learned, also its logit."""
        bound = 1 / math.sqrt(self.hidden_size)
        with torch.no_grad():
            self.recurrent_weight.uniform_(-bound, bound)
            if self.recurrent_bias is not None:
                self.recurrent_bias.uniform_(-bound, bound)
        if syn_decay is not None:
            syn_decay = self._store_decay(self.logit_syn_decay, "syn_decay", syn_decay, "learn_syn_decay")
        # The checked value is no Parameter. nn.Module would register a Parameter that the user gave as one more
        # parameter.
        self._syn_decay: Tensor | float | None = syn_decay

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, resets other parameters to the values that were set last, and clears states."""
        self._initialise_recurrence(self._syn_decay)
        super().reset_parameters()

    @property
    def recurrent(self) -> str:
        """The form of `recurrent_weight`: "dense" for `[N, N]`, "elementwise" for `[N]`."""
        return "dense" if self.recurrent_weight.dim() == 2 else "elementwise"

    @recurrent.setter
    def recurrent(self, value: str) -> None:
        raise AttributeError(
            f"{self._caller}: recurrent decides the shape of the weight and can't be changed; make another layer"
        )

    @property
    def syn_decay(self) -> Tensor | float | None:
        """The decay of the synapse per step, a tensor if learned; None without a synapse."""
        return self._syn_decay if self.logit_syn_decay is None else Logit(self.logit_syn_decay).value()

    def _call_function(
        self,
        x_seq: Tensor,
        s_init: Tensor | None = None,
        i_init: Tensor | None = None,
        w_init: Tensor | None = None,
        **options: Any,
    ) -> Tensor | RecurrentLIFOutput:
        """Calls `asgl_cuda.recurrent_lif`."""
        if x_seq.dim() == 3 and x_seq.shape[2] != self.hidden_size:
            raise ValueError(
                f"{self._caller}: the last dimension of x_seq must be hidden_size, {self.hidden_size}, got shape "
                f"{list(x_seq.shape)}"
            )
        weight: Tensor = self.recurrent_weight
        if not self.autapses:
            weight = weight.masked_fill(torch.eye(self.hidden_size, dtype=torch.bool, device=weight.device), 0.0)
        syn_decay: Any = self.syn_decay
        if self.num_features:
            (syn_decay,) = self._match_meta_device([syn_decay], x_seq)
        recurrence = _Recurrence(weight, self.recurrent_bias, syn_decay, s_init, i_init, self.detach_recurrent)
        given = self._arguments_of_call(x_seq, self.input_gain, **options)
        given["w_init"] = w_init
        return _run_recurrent(x_seq, recurrence, given)

    def extra_repr(self) -> str:
        parts = [f"{self.hidden_size}", f"recurrent={self.recurrent}"]
        parts += [f"{name}=False" for name in ("bias", "autapses") if not self._has_part(name)]
        if self._syn_decay is not None:
            parts.append(f"syn_decay={format_values(self._syn_decay, self.logit_syn_decay)}")
        parts += ["detach_recurrent=True"] if self.detach_recurrent else []
        return ", ".join([*parts, super().extra_repr()])

    def _has_part(self, name: str) -> bool:
        """Whether the layer has a recurrent bias ("bias"), or weights of neurons to themselves ("autapses")."""
        return self.recurrent_bias is not None if name == "bias" else self.autapses


# Options of `lif` and `LIF` that recurrent neurons do not have, and the keyword arguments that they have, for errors
# and hints.
_WITHOUT = lacking_options(RecurrentLIF, "input_bias", "input_mean")
_NEURON = [name for name in LIF_DEFAULTS if name not in _WITHOUT]
_KNOWN = *_NEURON, *(recurrent_lif.__kwdefaults__ or {})
