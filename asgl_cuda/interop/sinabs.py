"""sinabs: `LIF`, `IAF` and `ExpLeak`, which emits h, and their Squeeze forms; `LIFRecurrent`, `IAFRecurrent`.

The input is [B, T, ...].

i = a (i + x)                               a = exp(-1 / tau_syn); x itself without tau_syn
h = alpha v + (1 - alpha) i                 alpha = exp(-1 / tau_mem); i itself without norm_input; IAF has alpha = 1
s = trunc(h / spike_threshold), h > 0       MultiSpike; MaxSpike(n) has at most n
  = h >= spike_threshold                    SingleSpike, MaxSpike(1)
v = h - subtract_value s                    MembraneSubtract; by default the threshold
  = h (1 - s), where s is detached          MembraneReset to 0
v = relu(v - min_v_mem) + min_v_mem         unless min_v_mem is None

In recurrent layers x[t] + rec_connect(s[t-1]) replaces x[t], except in the first step of each call.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from sinabs import layers
from sinabs.activation import (
    Gaussian,
    MaxSpike,
    MembraneReset,
    MembraneSubtract,
    MultiSpike,
    PeriodicExponential,
    SingleExponential,
    SingleSpike,
)
from sinabs.layers.alif import ALIFSqueeze
from sinabs.layers.reshape import SqueezeMixin
from torch import Tensor, nn

from ..checks import MOST_LEVELS
from ..neurons.over_time import placement_advice
from ..reference.surrogates import PERIODIC
from .converted import (
    Conversion,
    Converted,
    Settings,
    Streamed,
    Streaming,
    bare_class,
    float_if_scalar,
    known_class_or_reason,
)
from .identify import SpikeFunction
from .recurrent import Recurrent, feedback_reason


class ConvertedLayer(Converted):
    """A layer of which a call takes all steps. Stores `v_mem`, `recordings` and `firing_rate` as sinabs does."""

    v_mem: Any
    i_syn: Any
    surrogate_grad_fn: Any
    _least: float | None = None  # min_v_mem as a number, read once because reading synchronises

    def begin_conversion(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        """Stores the settings of a conversion and the number min_v_mem."""
        super().begin_conversion(settings, analog_prob, learn_width)
        self._least = None if self.min_v_mem is None else _common_value(self.min_v_mem)

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        """1 for [B, T, ...]; None for layers whose input has batch and time merged."""
        return None if isinstance(self, SqueezeMixin) else 1

    takes_one_step = False

    def forward(self, input_data: Tensor) -> Tensor:
        """The output for an input `[B, T, ...]`, or `[B * T, ...]` for a Squeeze layer."""
        if isinstance(self, SqueezeMixin):
            return self.squeeze_forward(input_data, self._run_sequence)  # type: ignore[no-any-return]
        return self._run_sequence(input_data)

    def _run_sequence(self, input_data: Tensor) -> Tensor:
        """The output for `[B, T, ...]`; updates the layer's states."""
        batch, _, *trailing = input_data.shape
        if not self.is_state_initialised() or not self.has_trailing_dimension(trailing):
            self.init_state_with_shape((batch, *trailing))
        elif self.v_mem.shape[0] != batch:
            self.handle_state_batch_size_mismatch(batch)
        # As in sinabs, the computation has the common type of input and state. States usually begin in float32, so half
        # inputs are then computed in float32.
        x_seq = input_data.to(torch.promote_types(input_data.dtype, self.v_mem.dtype))
        alpha, i_last = self.alpha_syn_calculated, None
        if alpha is not None:
            x_seq, i_last = self.integrate(x_seq, decay=alpha, input_gain=alpha, v_init=self.i_syn, time_dim=1)
        self.i_syn = i_last
        output, self.v_mem, v_seq = self._run_membrane(x_seq)
        recordings = {"v_mem": v_seq} if alpha is None else {"v_mem": v_seq, "i_syn": x_seq}
        self.recordings = recordings if self.record_states else {}
        self.firing_rate = output.mean()
        return output

    def _run_membrane(self, x_seq: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Computes the output, the last potential and, if the layer records them, all potentials."""
        several, limit = self.multi_spike, _spike_limit(self.spike_fn)
        output = self.lif(
            x_seq,
            decay=self.alpha_mem_calculated,
            input_gain=self._input_gain(),
            v_threshold=self.spike_threshold.detach(),  # in sinabs only the reset has its gradient
            multi_spike=several,
            levels=int(limit) if several and limit is not None else None,
            v_min=self._least,
            v_init=self.v_mem,
            time_dim=1,
            return_v_seq=self.record_states,
            **self._reset_options(),
        )
        return output.s_seq, output.v_last, output.v_seq

    def _reset_options(self) -> dict[str, Any]:
        """The options of `lif` for the reset."""
        if isinstance(self.reset_fn, MembraneReset):
            return {"v_reset": 0.0, "detach_reset": True}
        amount = self.reset_fn.subtract_value
        return {"v_reset": None, "reset_amount": self.spike_threshold if amount is None else amount}

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        surrogate, reset_fn = self.surrogate_grad_fn, self.reset_fn
        found = {
            "surrogate_grad_fn": surrogate,
            "spike_fn": self.spike_fn,
            "max_num_spikes_per_bin": _spike_limit(self.spike_fn),
            "reset_fn": type(reset_fn),
            "reset_value": getattr(reset_fn, "reset_value", None),
            "min_v_mem": self.min_v_mem,
        }
        if not (self.settings.asgl or type(surrogate) in _OWN_WIDTHS):
            found["spike_threshold"] = self.spike_threshold
        return found

    def _current_width(self) -> Tensor | float:
        """The width of the next call. A SingleExponential has it in units of the threshold."""
        surrogate = self.surrogate_grad_fn
        if self.settings.asgl or type(surrogate) is not SingleExponential:
            return super()._current_width()  # torch.compile can't trace a property of super()
        return surrogate.grad_width * float_if_scalar(self.spike_threshold.detach())  # type: ignore[no-any-return]

    @property
    def takes_input_directly(self) -> bool:  # type: ignore[override]
        """Whether `lif` gets the layer's own input: it has no synaptic current."""
        return self.alpha_syn_calculated is None

    def _input_gain(self) -> Tensor | float:
        """The factor on the input, `input_gain` of `lif`."""
        return 1 - self.alpha_mem_calculated if self.norm_input else 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The __deepcopy__ of sinabs would construct a new, unconverted layer.
        state = {**self.__dict__, "_buffers": {name: value.detach() for name, value in self.named_buffers()}}
        for name in ("recordings", "firing_rate"):  # may be non-leaf tensors
            state.pop(name, None)
        return _copy_layer(self, state, memo)

    def restore_original(self) -> None:
        """Restores the original layer."""
        self.__dict__.pop("_least", None)
        super().restore_original()


class ConvertedMultiSpike(ConvertedLayer):
    """A layer that may emit several spikes per step, by MultiSpike or MaxSpike."""

    multi_spike = True


class ConvertedExpLeak(ConvertedLayer):
    """A layer that does not fire: ExpLeak."""

    takes_input_directly = False

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        return {"function": None, "min_v_mem": self.min_v_mem}

    def _run_membrane(self, x_seq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the output, the last potential and all potentials, which are the output."""
        v_seq, v_last = self.integrate(
            x_seq, input_gain=self._input_gain(), decay=self.alpha_mem_calculated, v_init=self.v_mem, time_dim=1
        )
        return v_seq, v_last, v_seq


class ConvertedRecurrent(Recurrent, ConvertedLayer):
    """A recurrent layer whose `rec_connect` is a Linear."""

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        # `feedback` is None while rec_connect can be converted. After a change that prevents this, `feedback` is the
        # reason, which the next call raises as an error.
        feedback = feedback_reason(self.rec_connect)
        return {**super().dependencies(), "record_states": self.record_states, "rec_connect": feedback}

    def _run_sequence(self, input_data: Tensor) -> Tensor:
        """The output for `[B, T, ...]`, whose spikes are fed back through `rec_connect`."""
        self.check_unchanged()  # must come before the weight of rec_connect is read
        batch, steps, *trailing = input_data.shape
        if not self.is_state_initialised() or not self.state_has_shape((batch, *trailing)):
            self.init_state_with_shape((batch, *trailing))
        x_seq = input_data.to(torch.promote_types(input_data.dtype, self.v_mem.dtype))
        weight, bias, alpha = self.rec_connect.weight, self.rec_connect.bias, self.alpha_syn_calculated
        if bias is not None:
            after_first = torch.arange(steps, device=x_seq.device).reshape(-1, *[1] * len(trailing)) > 0
            x_seq = x_seq + torch.where(after_first, bias, 0.0)
        if alpha is not None:  # in sinabs a current decays in the step in which it arrives
            x_seq, weight = x_seq * alpha, weight * (alpha.unsqueeze(-1) if alpha.dim() else alpha)
        time_dim = 1 if len(trailing) == 1 else 0
        output = self.recurrent_lif(
            x_seq.movedim(1, time_dim), weight, self._input_gain(), syn_decay=alpha, time_dim=time_dim,
            decay=self.alpha_mem_calculated, v_threshold=self.spike_threshold.detach(), v_init=self.v_mem,
            i_init=None if alpha is None else self.i_syn, **self._reset_options(),
        )  # fmt: skip
        self.v_mem, self.i_syn, self.recordings = output.v_last, output.i_last, {}
        self.firing_rate = output.s_seq.mean()
        return output.s_seq.movedim(time_dim, 1)


def _common_value(value: Tensor) -> float:
    """The common value of all elements; NaN if they differ."""
    low, high = value.detach().double().aminmax()
    return float(low) if low == high else math.nan


# Surrogates with which thresholds may differ between neurons: their width does not depend on the threshold, or is read
# at each call.
_OWN_WIDTHS = (SingleExponential, Gaussian, PeriodicExponential)

_LEAKS = (layers.ExpLeak, layers.ExpLeakSqueeze)
_ADAPTIVE = (layers.ALIF, ALIFSqueeze)
_RECURRENT = (layers.LIFRecurrent, layers.IAFRecurrent)
_KNOWN = (layers.LIF, layers.LIFSqueeze, layers.IAF, layers.IAFSqueeze, *_LEAKS, *_RECURRENT)
_MIXING = (*_RECURRENT, layers.ALIFRecurrent)


def conversion_of(layer: nn.Module) -> Conversion:
    """How to convert a layer of sinabs, see `Conversion`."""
    kind_of_layer = known_class_or_reason(layer, (*_KNOWN, *_ADAPTIVE), _MIXING)
    if kind_of_layer in _ADAPTIVE:
        return "its threshold has no gradient where it fires; use asgl_cuda.AdaptiveLIF, whose gradient is complete"
    if isinstance(kind_of_layer, str):
        return kind_of_layer if isinstance(layer, layers.StatefulLayer) else None
    node: Any = layer
    if kind_of_layer in _LEAKS:
        if node.min_v_mem is not None:
            return "it has a lower limit of the potential (min_v_mem), which leaky_integrator does not have"
        return ConvertedExpLeak, None
    most, spike_fn = _most_spikes(node.spike_fn), node.spike_fn
    if most is None:
        name = getattr(spike_fn, "__name__", type(spike_fn).__name__)
        return f"its spike function is {name}; SingleSpike, MultiSpike and MaxSpike can be converted"
    returns = kind_of_layer in _RECURRENT
    if returns and (reason := _recurrence_reason(node, most)) is not None:
        return reason
    if node.min_v_mem is not None and math.isnan(_common_value(node.min_v_mem)):
        return "its lower limit of the potential (min_v_mem) differs between neurons"
    if type(node.reset_fn) not in (MembraneSubtract, MembraneReset):
        return f"it resets by {type(node.reset_fn).__name__}; MembraneSubtract and MembraneReset can be converted"
    surrogate = node.surrogate_grad_fn
    thresholds = node.spike_threshold.detach().double().cpu()
    if isinstance(node.reset_fn, MembraneReset) and node.reset_fn.reset_value != 0:
        return "it resets to a value that is not 0, which sinabs also adds to neurons that did not spike"
    several = most > 1
    if several and isinstance(node.reset_fn, MembraneReset):
        return "it resets to 0 after several spikes per step; with several spikes, MembraneSubtract can be converted"
    if most not in (math.inf, *range(1, MOST_LEVELS + 1)):
        return f"it emits at most {most} spikes per step, which must be an integer in [1, {MOST_LEVELS}] (MaxSpike)"
    if spike_fn is not SingleSpike and not (thresholds > 0).all():
        return "its threshold is not above 0"
    kind = ConvertedRecurrent if returns else ConvertedMultiSpike if several else ConvertedLayer
    if several and type(surrogate) is PeriodicExponential:
        width = surrogate.grad_width
        return kind, SpikeFunction(PERIODIC, width, 2 * width * surrogate.grad_scale, False)
    if math.isnan(_common_value(thresholds)) and not (type(surrogate) in _OWN_WIDTHS and (thresholds > 0).all()):
        return "its threshold differs between neurons, and its surrogate may depend on the threshold"
    at = thresholds.mean()  # where they differ, the width is read at each call or does not depend on them
    single: Any = SingleSpike  # MultiSpike has the same gradient
    return kind, lambda u: single.apply(u + at, at, surrogate)


def _recurrence_reason(node: Any, most: float) -> str | None:
    """Why `recurrent_lif` can't compute a recurrent layer that emits at most `most` spikes per step, or None."""
    if node.record_states:
        return "it records its states (record_states)"
    if most > 1:
        return "it may spike several times per step, which recurrent neurons do not support"
    if node.min_v_mem is not None:
        return "it has a lower limit of the potential (min_v_mem), which recurrent neurons do not support"
    return feedback_reason(node.rec_connect)


def _spike_limit(spike_fn: Any) -> float | None:
    """The limit of spikes per step of a MaxSpike, which may be None; None for SingleSpike and MultiSpike.

    These two are classes, and compiled code can't compare classes.
    """
    return spike_fn.max_num_spikes_per_bin if type(spike_fn) is MaxSpike else None


def _most_spikes(spike_fn: Any) -> float | None:
    """The largest number of spikes per step that a spike function emits; None for one that convert does not know."""
    limit = _spike_limit(spike_fn)
    if limit is not None:
        return limit
    return 1 if spike_fn is SingleSpike else math.inf if spike_fn is MultiSpike or type(spike_fn) is MaxSpike else None


def _copy_layer(layer: Any, state: dict[str, Any], memo: dict[int, Any]) -> Any:
    """A layer of the same class with a deep copy of `state`, made without its constructor and entered in `memo`."""
    kind: Any = type(layer)
    memo[id(layer)] = made = kind.__new__(kind)
    made.__dict__.update(copy.deepcopy(state, memo))
    return made


def copy_layers(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copies layers completely, see `imported_adapters`. Their own __deepcopy__ detaches parameters of the original."""
    for layer in model.modules():
        if isinstance(layer, layers.StatefulLayer) and not isinstance(layer, Converted) and id(layer) not in memo:
            _copy_layer(layer, layer.__dict__, memo)


def reset(module: nn.Module) -> None:
    """Resets the states of a layer of sinabs."""
    if isinstance(module, layers.StatefulLayer):
        module.reset_states()


def detach(module: nn.Module) -> None:
    """Detaches the states of a layer of sinabs."""
    if isinstance(module, layers.StatefulLayer):
        for name, state in module._buffers.items():
            module._buffers[name] = None if state is None else state.detach()


def placement_outside_over_time(module: nn.Module) -> str | None:
    """How to use a module that `OverTime` refuses, see `imported_adapters`; None for other modules."""
    if not isinstance(module, layers.StatefulLayer) or isinstance(module, SqueezeMixin):
        return None
    return f"{placement_advice(f'{bare_class(module).__name__}(...)')}, which takes [B, T, ...]"


def streaming_of(module: nn.Module) -> Streaming:
    """How a module takes a sequence one time step per call, see `Streaming`."""
    if not isinstance(module, layers.StatefulLayer):
        return None
    if isinstance(module, _MIXING):
        return "it does not carry its recurrent input from call to call"
    if isinstance(module, layers.ALIF) and module.alpha_syn_calculated is not None:
        return "it does not carry its current (tau_syn) from call to call"
    if isinstance(module, SqueezeMixin):
        if module.num_timesteps not in (1, -1):
            return f"it has num_timesteps={module.num_timesteps}; with batch_size instead it takes any number"
        return Streamed(None, "v_mem")
    return Streamed(1, "v_mem")
