"""sinabs: `LIF`, `IAF`, `ALIF` and `ExpLeak`, which emits h, and their Squeeze forms; `LIFRecurrent`, `IAFRecurrent`.

Batch first.

i = a (i + x)                               a = exp(-1 / tau_syn); x itself without tau_syn
h = alpha v + (1 - alpha) i                 alpha = exp(-1 / tau_mem); i itself without norm_input; IAF has alpha = 1
s = trunc(h / spike_threshold), h > 0       MultiSpike; MaxSpike(n) has at most n
  = h >= spike_threshold                    SingleSpike, MaxSpike(1)
v = h - subtract_value s                    MembraneSubtract; by default the threshold
  = h (1 - s), where s is detached          MembraneReset to 0
v = relu(v - min_v_mem) + min_v_mem         unless min_v_mem is None

ALIF fires where h >= b0 + adapt_scale b, a threshold that has a gradient only in the reset of MembraneSubtract(), and
starts each call with the same i:

i = (1 - alpha) a (i + x)                   (1 - alpha) x without tau_syn; no factor 1 - alpha without norm_input
b = rho b + (1 - rho) s                     rho = exp(-1 / tau_adapt)

Recurrent layers have x[t] + rec_connect(s[t-1]) for x[t], but x alone in the first step of each call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
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
from ..surrogate import PERIODIC
from .converted import Converted, Found, InStream, Settings, Streamed, known_class, number
from .identify import SpikeFunction, own_spikes
from .recurrent import Recurrent, lacking


class ConvertedLayer(Converted):
    """All steps in one call; stores `v_mem`, `recordings` and `firing_rate` as sinabs does."""

    v_mem: Any
    i_syn: Any
    surrogate_grad_fn: Any
    _least: tuple[float, Any] = math.nan, ()  # min_v_mem, its id and version

    def begin(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        super().begin(settings, analog_prob, learn_width)
        self._least_potential()

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        return None if isinstance(self, SqueezeMixin) else 1

    takes_steps = False

    def forward(self, input_data: Tensor) -> Tensor:
        if isinstance(self, SqueezeMixin):
            return self.squeeze_forward(input_data, self._steps)  # type: ignore[no-any-return]
        return self._steps(input_data)

    def _steps(self, input_data: Tensor) -> Tensor:
        batch, _, *trailing = input_data.shape
        if not self.is_state_initialised() or not self.has_trailing_dimension(trailing):
            self.init_state_with_shape((batch, *trailing))
        elif self.v_mem.shape[0] != batch:
            self.handle_state_batch_size_mismatch(batch)
        # Steps and potentials are promoted with the state, which is float32.
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
        several, limit = self.multi_spike and not self.settings.spike.own, _limit(self.spike_fn)
        output = self.lif(
            x_seq,
            decay=self.alpha_mem_calculated,
            input_gain=self.input_terms()[0],
            v_threshold=self.spike_threshold.detach(),  # in sinabs only the reset has its gradient
            multi_spike=several,
            levels=int(limit) if several and limit is not None else None,
            v_min=self._least_potential(),
            v_init=self.v_mem,
            time_dim=1,
            return_v_seq=self.record_states,
            **self._reset(),
        )
        return output.s_seq, output.v_last, output.v_seq

    def _reset(self) -> dict[str, Any]:
        if isinstance(self.reset_fn, MembraneReset):
            return {"v_reset": 0.0, "detach_reset": True}
        amount = self.reset_fn.subtract_value
        return {"v_reset": None, "reset_amount": self.spike_threshold if amount is None else amount}

    def read_from(self) -> dict[str, Any]:
        surrogate, reset_fn = self.surrogate_grad_fn, self.reset_fn
        found = {
            "surrogate_grad_fn": surrogate,
            "spike_fn": self.spike_fn,
            "max_num_spikes_per_bin": _limit(self.spike_fn),
            "reset_fn": type(reset_fn),
            "reset_value": getattr(reset_fn, "reset_value", None),
        }
        if not (self.adapts or self.settings.asgl or type(surrogate) in _OWN_WIDTHS):
            found["spike_threshold"] = self.spike_threshold
        return found

    @staticmethod
    def detaches(layer: Any) -> bool:
        return isinstance(layer.reset_fn, MembraneReset)

    def spikes_of(self, h_seq: Tensor, v_threshold: Tensor | float) -> Tensor:
        spikes: Tensor = self.spike_fn.apply(h_seq, v_threshold, self.surrogate_grad_fn)
        return spikes

    def _width_of_call(self) -> Tensor | float:
        surrogate = self.surrogate_grad_fn
        if self.settings.asgl or type(surrogate) is not SingleExponential:
            return super()._width_of_call()  # torch.compile can't trace a property of super()
        return surrogate.grad_width * number(self.spike_threshold.detach())  # type: ignore[no-any-return]

    @property
    def takes_input(self) -> bool:  # type: ignore[override]
        return self.alpha_syn_calculated is None

    def input_terms(self) -> tuple[Tensor | float, Tensor | float]:
        return 1 - self.alpha_mem_calculated if self.norm_input else 1.0, 0.0

    def _least_potential(self) -> float | None:
        """`min_v_mem` as a float; on a GPU, read only after changes: reading synchronises."""
        least = self.min_v_mem
        if least is None:
            return None
        mark = None if least.device.type == "cpu" else (id(least), least._version)
        if not torch.compiler.is_compiling() and (mark is None or self._least[1] != mark):
            self._least = _only(least), mark
        return self._least[0]

    def hold_width(self) -> bool:
        if self.settings.spike.surrogate != "laplace" or not isinstance(self.surrogate_grad_fn, SingleExponential):
            return False
        width = float(torch.as_tensor(self.width).detach()) / _only(self.spike_threshold)
        if math.isnan(width):
            return False
        self.surrogate_grad_fn = copy.copy(self.surrogate_grad_fn)  # may be shared
        self.surrogate_grad_fn.grad_width = width
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # sinabs' own constructs a new, unconverted layer.
        state = {**self.__dict__, "_buffers": {name: value.detach() for name, value in self.named_buffers()}}
        for name in ("recordings", "firing_rate"):  # perhaps non-leaf tensors
            state.pop(name, None)
        return _copy(self, state, memo)

    def end(self) -> None:
        self.__dict__.pop("_least", None)
        super().end()


class ConvertedMultiSpike(ConvertedLayer):
    """A layer with MultiSpike, or MaxSpike of more than one."""

    multi_spike = True


class ConvertedALIF(ConvertedLayer):
    """An ALIF: neurons with the threshold of each step, which `adaptive_lif` finds without gradient."""

    adapts, takes_input = True, False
    b: Any

    def forward(self, input_data: Tensor) -> Tensor:
        """Without gradients sinabs' own, since the kernels run twice: up to 1.7 times as fast in large layers."""
        own = self.is_plain() and self.settings.backend is None and not torch.compiler.is_compiling()
        if own and not torch.is_grad_enabled():
            return super(ConvertedLayer, self).forward(input_data)  # type: ignore[no-any-return]
        return super().forward(input_data)

    def read_from(self) -> dict[str, Any]:
        return {**super().read_from(), "min_v_mem": self.min_v_mem}

    def _reset(self) -> dict[str, Any]:
        own = super()._reset()
        return own if own["v_reset"] is not None else {**own, "reset_amount": self.reset_fn.subtract_value}

    @classmethod
    def identified(cls, layer: Any, function: Callable[[Tensor], Tensor]) -> SpikeFunction | str:
        if type(layer.surrogate_grad_fn) in _OWN_WIDTHS and (torch.as_tensor(layer.b0) > 0).all():
            return super().identified(layer, function)
        own = own_spikes(function, False) if cls.detaches(layer) else None
        return own or "its surrogate may be another for each threshold"

    def _steps(self, input_data: Tensor) -> Tensor:
        batch, _, *trailing = input_data.shape
        if not self.is_state_initialised() or not self.state_has_shape((batch, *trailing)):
            self.init_state_with_shape((batch, *trailing))
        x_seq = input_data.to(torch.promote_types(input_data.dtype, self.v_mem.dtype))
        gain, alpha = self.input_terms()[0], self.alpha_syn_calculated
        if alpha is None:
            x_seq = x_seq * gain
        else:
            decay = alpha * gain
            x_seq, _ = self.integrate(x_seq, decay=decay, input_gain=decay, v_init=self.i_syn, time_dim=1)
        common = {"decay": self.alpha_mem_calculated, "v_init": self.v_mem, "time_dim": 1, **self._reset()}
        if self._has_noise:
            common["rng_state"] = torch.randint(2**62, (2,), device=x_seq.device)
        rho = self.alpha_adapt_calculated
        adapt_spike, w_init = self.adapt_scale * (1 - rho), self.adapt_scale * self.b
        adaptation: dict[str, Any] = {"adapt_decay": rho, "adapt_spike": adapt_spike, "w_init": w_init}
        threshold = self._thresholds(x_seq, adaptation, common)
        options: dict[str, Any] = {**common, "v_threshold": threshold, "return_h_seq": self.record_states}
        if not (self.settings.asgl or self.settings.spike.own):
            options["width"] = self._width_at(threshold)
        if common["v_reset"] is None and common["reset_amount"] is None:
            options["reset_amount"] = self.b0
            output = self.adaptive_in_reset(x_seq, **adaptation, **options)
        else:
            output = self.lif(x_seq, **options)
        s_seq = output.s_seq
        b_seq, self.b = self.integrate(
            s_seq.to(torch.promote_types(s_seq.dtype, self.b.dtype)), decay=rho, input_gain=1 - rho, v_init=self.b,
            time_dim=1,
        )  # fmt: skip
        self.recordings = {}
        if self.record_states:  # sinabs' of v_mem and i_syn are those of the next step, before its reset
            assert output.h_seq is not None
            assert output.v_last is not None
            v_seq = torch.cat([output.h_seq[:, 1:], output.v_last[:, None]], 1)
            current = {} if alpha is None else {"i_syn": torch.cat([x_seq[:, 1:], x_seq[:, -1:]], 1)}
            thresholds = self.b0 + self.adapt_scale * b_seq
            self.recordings = {"v_mem": v_seq, **current, "b": b_seq, "spike_threshold": thresholds}
        self.v_mem, self.spike_threshold = output.v_last, self.b0 + self.adapt_scale * self.b
        self.firing_rate = s_seq.mean()
        return s_seq

    @torch.no_grad()
    def _thresholds(self, x_seq: Tensor, adaptation: dict[str, Any], common: dict[str, Any]) -> Tensor:
        """The threshold of each step, in the memory order of `lif`'s parameters, time first."""
        output = self.adaptive_lif(x_seq, v_threshold=self.b0, to_threshold=True, **adaptation, **common)
        s_seq = output.s_seq.transpose(0, 1).contiguous()
        rho, gain, w_init = adaptation.values()
        w_seq, _ = self.integrate(s_seq, decay=rho, input_gain=gain, v_init=w_init, delay=True)
        thresholds: Tensor = w_seq + self.b0
        return thresholds.transpose(0, 1)

    def _width_at(self, threshold: Tensor) -> Tensor | float:
        surrogate = self.surrogate_grad_fn
        own = type(surrogate) is SingleExponential
        return surrogate.grad_width * threshold if own else self.settings.spike.width  # type: ignore[no-any-return]

    def _width_of_call(self) -> Tensor | float:
        if self.settings.asgl:
            return super()._width_of_call()
        return self._width_at(torch.as_tensor(self.b0).detach())

    def hold_width(self) -> bool:
        return False  # sinabs' follows the threshold


class ConvertedExpLeak(ConvertedLayer):
    """A layer without spikes."""

    takes_input = False

    def read_from(self) -> dict[str, Any]:
        return {"function": None, "min_v_mem": self.min_v_mem}

    def _membrane(self, x_seq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gain, _ = self.input_terms()
        v_seq, v_last = self.integrate(
            x_seq, decay=self.alpha_mem_calculated, input_gain=gain, v_init=self.v_mem, time_dim=1
        )
        return v_seq, v_last, v_seq


class ConvertedRecurrent(Recurrent, ConvertedLayer):
    """A recurrent layer whose `rec_connect` is a Linear."""

    def read_from(self) -> dict[str, Any]:
        others = {"record_states": self.record_states, "min_v_mem": self.min_v_mem}
        return {**super().read_from(), **others, "rec_connect": lacking(self.rec_connect)}

    def _steps(self, input_data: Tensor) -> Tensor:
        batch, steps, *trailing = input_data.shape
        if not self.is_state_initialised() or not self.state_has_shape((batch, *trailing)):
            self.init_state_with_shape((batch, *trailing))
        x_seq = input_data.to(torch.promote_types(input_data.dtype, self.v_mem.dtype))
        weight, bias, alpha = self.rec_connect.weight, self.rec_connect.bias, self.alpha_syn_calculated
        if bias is not None:
            after_first = torch.arange(steps, device=x_seq.device).reshape(-1, *[1] * len(trailing)) > 0
            x_seq = x_seq + torch.where(after_first, bias, 0.0)
        if alpha is not None:  # a current decays in the step in which it comes
            x_seq, weight = x_seq * alpha, weight * (alpha.unsqueeze(-1) if alpha.dim() else alpha)
        time_dim = 1 if len(trailing) == 1 else 0
        output = self.recurrent_lif(
            x_seq.movedim(1, time_dim), weight, self.input_terms()[0], syn_decay=alpha, time_dim=time_dim,
            decay=self.alpha_mem_calculated, v_threshold=self.spike_threshold.detach(), v_init=self.v_mem,
            i_init=None if alpha is None else self.i_syn, **self._reset(),
        )  # fmt: skip
        self.v_mem, self.i_syn, self.recordings = output.v_last, output.i_last, {}
        self.firing_rate = output.s_seq.mean()
        return output.s_seq.movedim(time_dim, 1)


def _only(value: Tensor) -> float:
    """The common value of all elements; NaN where they differ."""
    low, high = value.detach().double().aminmax()
    return float(low) if low == high else math.nan


# Widths read at each call or independent of the threshold, which other functions may depend on.
_OWN_WIDTHS = (SingleExponential, Gaussian, PeriodicExponential)

PARTING = (layers.UnflattenTime,)

_LEAKS = (layers.ExpLeak, layers.ExpLeakSqueeze)
_ADAPTIVE = (layers.ALIF, ALIFSqueeze)
_RECURRENT = (layers.LIFRecurrent, layers.IAFRecurrent)
_KNOWN = (layers.LIF, layers.LIFSqueeze, layers.IAF, layers.IAFSqueeze, *_ADAPTIVE, *_LEAKS, *_RECURRENT)
_MIXING = (*_RECURRENT, layers.ALIFRecurrent)


def find(layer: nn.Module) -> Found:
    kind_of_layer = known_class(layer, _KNOWN, _MIXING)
    if isinstance(kind_of_layer, str):
        return kind_of_layer if isinstance(layer, layers.StatefulLayer) else None
    node: Any = layer
    if kind_of_layer in _LEAKS:
        if node.min_v_mem is not None:
            return "it has a least potential (min_v_mem), which it does not emit"
        return ConvertedExpLeak, None
    most, spike_fn, adapts = _most(node.spike_fn), node.spike_fn, kind_of_layer in _ADAPTIVE
    if most is None:
        name = getattr(spike_fn, "__name__", type(spike_fn).__name__)
        return f"its spikes are those of {name}; SingleSpike, MultiSpike and MaxSpike can be converted"
    returns = kind_of_layer in _RECURRENT
    if returns and (reason := lacking(node.rec_connect)) is not None:
        return reason
    if returns and node.record_states:
        return "it records its states (record_states)"
    if (adapts or returns) and (reason := _lacking(node, most, adapts)) is not None:
        return reason
    if node.min_v_mem is not None and math.isnan(_only(node.min_v_mem)):
        return "its least potential (min_v_mem) differs between neurons"
    if type(node.reset_fn) not in (MembraneSubtract, MembraneReset):
        return f"it resets by {type(node.reset_fn).__name__}"
    surrogate = node.surrogate_grad_fn
    thresholds = torch.as_tensor(node.b0 if adapts else node.spike_threshold).detach().double().cpu()
    if isinstance(node.reset_fn, MembraneReset) and node.reset_fn.reset_value != 0:
        return "it resets to a value that is not 0, which sinabs adds to the neurons that did not spike, too"
    several, detached = most > 1, ConvertedLayer.detaches(layer)
    if most not in (math.inf, *range(1, MOST_LEVELS + 1)) and not detached:
        return f"it has at most {most} spikes a step, which must be a whole number in [1, {MOST_LEVELS}] (MaxSpike)"
    if spike_fn is not SingleSpike and not (thresholds > 0).all():
        return "its threshold is not above 0"
    plain = ConvertedRecurrent if returns else ConvertedMultiSpike if several else ConvertedLayer
    kind = ConvertedALIF if adapts else plain
    if several and not detached and type(surrogate) is PeriodicExponential:
        width = surrogate.grad_width
        return kind, SpikeFunction(PERIODIC, width, 2 * width * surrogate.grad_scale, False)
    if math.isnan(_only(thresholds)) and not (adapts or (type(surrogate) in _OWN_WIDTHS and (thresholds > 0).all())):
        return "its surrogate may be another for each neuron's own threshold"
    at = thresholds.mean()  # `width` has each neuron's
    # After a detached reset, all spikes of a step are those of `spikes_of`; else MultiSpike has the same gradient.
    function: Any = spike_fn if detached else SingleSpike
    return kind, lambda u: function.apply(u + at, at, surrogate)


def _lacking(node: Any, most: float, adapts: bool) -> str | None:
    """What adaptive and recurrent neurons lack of a layer."""
    kind = "adaptive" if adapts else "recurrent"
    if most > 1:
        return f"it may spike several times a step, which {kind} neurons do not"
    if node.min_v_mem is not None:
        return f"it has a least potential (min_v_mem), which {kind} neurons lack"
    if adapts and (torch.as_tensor(node.adapt_scale) < 0).any():
        return "its spikes lower the threshold (adapt_scale)"
    return None


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
    if isinstance(module, layers.StatefulLayer):
        module.reset_states()


def detach(module: nn.Module) -> None:
    if isinstance(module, layers.StatefulLayer):
        for name, state in module._buffers.items():
            module._buffers[name] = None if state is None else state.detach()


def knows_time(module: nn.Module) -> bool:
    return isinstance(module, layers.StatefulLayer) and not isinstance(module, SqueezeMixin)


def streamed(module: nn.Module) -> InStream:
    if not isinstance(module, layers.StatefulLayer):
        return None
    if hasattr(module, "rec_connect"):
        return "it does not carry its recurrent input from call to call"
    if isinstance(module, layers.ALIF) and module.alpha_syn_calculated is not None:
        return "it does not carry its current (tau_syn) from call to call"
    if isinstance(module, SqueezeMixin):
        if module.num_timesteps not in (1, -1):
            return f"it has num_timesteps={module.num_timesteps}; with batch_size instead it takes any number"
        return Streamed(None, "v_mem")
    return Streamed(1, "v_mem")
