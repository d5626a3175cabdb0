"""sinabs: `LIF`, `IAF` and `ExpLeak`, which emits h, and their Squeeze forms; `LIFRecurrent`, `IAFRecurrent`.

Batch first.

i = a (i + x)                               a = exp(-1 / tau_syn); x itself without tau_syn
h = alpha v + (1 - alpha) i                 alpha = exp(-1 / tau_mem); i itself without norm_input; IAF has alpha = 1
s = trunc(h / spike_threshold), h > 0       MultiSpike; MaxSpike(n) has at most n
  = h >= spike_threshold                    SingleSpike, MaxSpike(1)
v = h - subtract_value s                    MembraneSubtract; by default the threshold
  = h (1 - s), where s is detached          MembraneReset to 0
v = relu(v - min_v_mem) + min_v_mem         unless min_v_mem is None

Recurrent layers have x[t] + rec_connect(s[t-1]) for x[t], but x alone in the first step of each call.
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
from .converted import Converted, Found, InStream, Settings, Streamed, bare_class, known_class, number
from .identify import SpikeFunction
from .recurrent import Recurrent, lacking


class ConvertedLayer(Converted):
    """All steps in one call; stores `v_mem`, `recordings` and `firing_rate` as sinabs does."""

    v_mem: Any
    i_syn: Any
    surrogate_grad_fn: Any
    _least: float | None = None  # min_v_mem, read once: reading synchronises

    def begin(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        """Applies the settings of a conversion, and reads min_v_mem once."""
        super().begin(settings, analog_prob, learn_width)
        self._least = None if self.min_v_mem is None else _only(self.min_v_mem)

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        """1 for [B, T, ...]; None for layers whose input has batch and time merged."""
        return None if isinstance(self, SqueezeMixin) else 1

    takes_steps = False

    def forward(self, input_data: Tensor) -> Tensor:
        """The output for `[B, T, ...]`, or with batch and time merged."""
        if isinstance(self, SqueezeMixin):
            return self.squeeze_forward(input_data, self._steps)  # type: ignore[no-any-return]
        return self._steps(input_data)

    def _steps(self, input_data: Tensor) -> Tensor:
        """The output for `[B, T, ...]`, from the layer's states, which are updated."""
        batch, _, *trailing = input_data.shape
        if not self.is_state_initialised() or not self.has_trailing_dimension(trailing):
            self.init_state_with_shape((batch, *trailing))
        elif self.v_mem.shape[0] != batch:
            self.handle_state_batch_size_mismatch(batch)
        # sinabs promotes input and potentials to the type of the state, which is float32.
        x_seq = input_data.to(torch.promote_types(input_data.dtype, self.v_mem.dtype))
        alpha, i_last = self.alpha_syn_calculated, None
        if alpha is not None:
            x_seq, i_last = self.integrate(x_seq, decay=alpha, input_gain=alpha, v_init=self.i_syn, time_dim=1)
        self.i_syn = i_last
        output, self.v_mem, v_seq = self._membrane(x_seq)
        recordings = {"v_mem": v_seq} if alpha is None else {"v_mem": v_seq, "i_syn": x_seq}
        self.recordings = recordings if self.record_states else {}
        self.firing_rate = output.mean()
        return output

    def _membrane(self, x_seq: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output, the last potential and, if recorded, all potentials."""
        several, limit = self.multi_spike, _limit(self.spike_fn)
        output = self.lif(
            x_seq,
            decay=self.alpha_mem_calculated,
            input_gain=self._gain(),
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
        """What a call must find as it was at the conversion, see `Converted.dependencies`."""
        surrogate, reset_fn = self.surrogate_grad_fn, self.reset_fn
        found = {
            "surrogate_grad_fn": surrogate,
            "spike_fn": self.spike_fn,
            "max_num_spikes_per_bin": _limit(self.spike_fn),
            "reset_fn": type(reset_fn),
            "reset_value": getattr(reset_fn, "reset_value", None),
            "min_v_mem": self.min_v_mem,
        }
        if not (self.settings.asgl or type(surrogate) in _OWN_WIDTHS):
            found["spike_threshold"] = self.spike_threshold
        return found

    def _width_of_call(self) -> Tensor | float:
        """The width that `lif` gets; of a SingleExponential in units of the threshold."""
        surrogate = self.surrogate_grad_fn
        if self.settings.asgl or type(surrogate) is not SingleExponential:
            return super()._width_of_call()  # torch.compile can't trace a property of super()
        return surrogate.grad_width * number(self.spike_threshold.detach())  # type: ignore[no-any-return]

    @property
    def takes_input(self) -> bool:  # type: ignore[override]
        """Whether the input goes to the potential as it is, without a synaptic current."""
        return self.alpha_syn_calculated is None

    def _gain(self) -> Tensor | float:
        """The factor of the input."""
        return 1 - self.alpha_mem_calculated if self.norm_input else 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The __deepcopy__ of sinabs would construct a new, unconverted layer.
        state = {**self.__dict__, "_buffers": {name: value.detach() for name, value in self.named_buffers()}}
        for name in ("recordings", "firing_rate"):  # may be non-leaf tensors
            state.pop(name, None)
        return _copy(self, state, memo)

    def end(self) -> None:
        """Undoes the conversion."""
        self.__dict__.pop("_least", None)
        super().end()


class ConvertedMultiSpike(ConvertedLayer):
    """A layer with MultiSpike, or MaxSpike of more than one."""

    multi_spike = True


class ConvertedExpLeak(ConvertedLayer):
    """A layer without spikes."""

    takes_input = False

    def dependencies(self) -> dict[str, Any]:
        """What a call must find as it was at the conversion, see `Converted.dependencies`."""
        return {"function": None, "min_v_mem": self.min_v_mem}

    def _membrane(self, x_seq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, last potential and all potentials; the output is the potentials."""
        v_seq, v_last = self.integrate(
            x_seq, input_gain=self._gain(), decay=self.alpha_mem_calculated, v_init=self.v_mem, time_dim=1
        )
        return v_seq, v_last, v_seq


class ConvertedRecurrent(Recurrent, ConvertedLayer):
    """A recurrent layer whose `rec_connect` is a Linear."""

    def dependencies(self) -> dict[str, Any]:
        """What a call must find as it was at the conversion, see `Converted.dependencies`."""
        feedback = lacking(self.rec_connect)
        return {**super().dependencies(), "record_states": self.record_states, "rec_connect": feedback}

    def _steps(self, input_data: Tensor) -> Tensor:
        """The output for `[B, T, ...]`, whose spikes are fed back through `rec_connect`."""
        self.check()  # must come before the weight of rec_connect is read
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
            x_seq.movedim(1, time_dim), weight, self._gain(), syn_decay=alpha, time_dim=time_dim,
            decay=self.alpha_mem_calculated, v_threshold=self.spike_threshold.detach(), v_init=self.v_mem,
            i_init=None if alpha is None else self.i_syn, **self._reset_options(),
        )  # fmt: skip
        self.v_mem, self.i_syn, self.recordings = output.v_last, output.i_last, {}
        self.firing_rate = output.s_seq.mean()
        return output.s_seq.movedim(time_dim, 1)


def _only(value: Tensor) -> float:
    """The common value of all elements; NaN where they differ."""
    low, high = value.detach().double().aminmax()
    return float(low) if low == high else math.nan


# Surrogates whose width is read at each call or does not depend on the threshold; other functions may depend on it.
_OWN_WIDTHS = (SingleExponential, Gaussian, PeriodicExponential)

_LEAKS = (layers.ExpLeak, layers.ExpLeakSqueeze)
_ADAPTIVE = (layers.ALIF, ALIFSqueeze)
_RECURRENT = (layers.LIFRecurrent, layers.IAFRecurrent)
_KNOWN = (layers.LIF, layers.LIFSqueeze, layers.IAF, layers.IAFSqueeze, *_LEAKS, *_RECURRENT)
_MIXING = (*_RECURRENT, layers.ALIFRecurrent)


def find(layer: nn.Module) -> Found:
    """The answer for a layer of sinabs, see `Found`."""
    kind_of_layer = known_class(layer, (*_KNOWN, *_ADAPTIVE), _MIXING)
    if kind_of_layer in _ADAPTIVE:
        return "its threshold has no gradient where it fires; use asgl_cuda.AdaptiveLIF, whose gradient is complete"
    if isinstance(kind_of_layer, str):
        return kind_of_layer if isinstance(layer, layers.StatefulLayer) else None
    node: Any = layer
    if kind_of_layer in _LEAKS:
        if node.min_v_mem is not None:
            return "it has a lower limit of the potential (min_v_mem), which leaky_integrator does not have"
        return ConvertedExpLeak, None
    most, spike_fn = _most(node.spike_fn), node.spike_fn
    if most is None:
        name = getattr(spike_fn, "__name__", type(spike_fn).__name__)
        return f"its spike function is {name}; SingleSpike, MultiSpike and MaxSpike can be converted"
    returns = kind_of_layer in _RECURRENT
    if returns and (reason := _lacking(node, most)) is not None:
        return reason
    if node.min_v_mem is not None and math.isnan(_only(node.min_v_mem)):
        return "its lower limit of the potential (min_v_mem) differs between neurons"
    if type(node.reset_fn) not in (MembraneSubtract, MembraneReset):
        return f"it resets by {type(node.reset_fn).__name__}"
    surrogate = node.surrogate_grad_fn
    thresholds = node.spike_threshold.detach().double().cpu()
    if isinstance(node.reset_fn, MembraneReset) and node.reset_fn.reset_value != 0:
        return "it resets to a value that is not 0, which sinabs also adds to neurons that did not spike"
    several = most > 1
    if several and isinstance(node.reset_fn, MembraneReset):
        return "it resets to 0 after several spikes per step"
    if most not in (math.inf, *range(1, MOST_LEVELS + 1)):
        return f"it emits at most {most} spikes per step, which must be an integer in [1, {MOST_LEVELS}] (MaxSpike)"
    if spike_fn is not SingleSpike and not (thresholds > 0).all():
        return "its threshold is not above 0"
    kind = ConvertedRecurrent if returns else ConvertedMultiSpike if several else ConvertedLayer
    if several and type(surrogate) is PeriodicExponential:
        width = surrogate.grad_width
        return kind, SpikeFunction(PERIODIC, width, 2 * width * surrogate.grad_scale, False)
    if math.isnan(_only(thresholds)) and not (type(surrogate) in _OWN_WIDTHS and (thresholds > 0).all()):
        return "its threshold differs between neurons, and its surrogate may depend on the threshold"
    at = thresholds.mean()  # `width` has one value per neuron
    single: Any = SingleSpike  # MultiSpike has the same gradient
    return kind, lambda u: single.apply(u + at, at, surrogate)


def _lacking(node: Any, most: float) -> str | None:
    """Why `recurrent_lif` can't compute a layer, or None."""
    if node.record_states:
        return "it records its states (record_states)"
    if most > 1:
        return "it may spike several times per step, which recurrent neurons do not support"
    if node.min_v_mem is not None:
        return "it has a lower limit of the potential (min_v_mem), which recurrent neurons do not support"
    return lacking(node.rec_connect)


def _limit(spike_fn: Any) -> float | None:
    """The limit of MaxSpike, if any; a comparison of the other classes can't be compiled."""
    return spike_fn.max_num_spikes_per_bin if type(spike_fn) is MaxSpike else None


def _most(spike_fn: Any) -> float | None:
    """The largest number of spikes a step; None for another function."""
    limit = _limit(spike_fn)
    if limit is not None:
        return limit
    return 1 if spike_fn is SingleSpike else math.inf if spike_fn is MultiSpike or type(spike_fn) is MaxSpike else None


def _copy(layer: Any, state: dict[str, Any], memo: dict[int, Any]) -> Any:
    """A layer of the same class, which no constructor runs for, with a deep copy of `state`."""
    kind: Any = type(layer)
    memo[id(layer)] = made = kind.__new__(kind)
    made.__dict__.update(copy.deepcopy(state, memo))
    return made


def copy_layers(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copies layers whole: their own __deepcopy__ makes new ones, and detaches parameters of the original."""
    for layer in model.modules():
        if isinstance(layer, layers.StatefulLayer) and not isinstance(layer, Converted) and id(layer) not in memo:
            _copy(layer, layer.__dict__, memo)


def reset(module: nn.Module) -> None:
    """Resets the states of a layer of sinabs."""
    if isinstance(module, layers.StatefulLayer):
        module.reset_states()


def detach(module: nn.Module) -> None:
    """Detaches the states of a layer of sinabs."""
    if isinstance(module, layers.StatefulLayer):
        for name, state in module._buffers.items():
            module._buffers[name] = None if state is None else state.detach()


def outside(module: nn.Module) -> str | None:
    """Where a module that takes time as a dimension of its own belongs instead of `OverTime`; None for others."""
    if not isinstance(module, layers.StatefulLayer) or isinstance(module, SqueezeMixin):
        return None
    return f"{placement_advice(f'{bare_class(module).__name__}(...)')}, which takes [B, T, ...]"


def streamed(module: nn.Module) -> InStream:
    """How a layer takes single steps, see `InStream`."""
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
