"""Norse: `LIF`, `IAF`, `LI` and `LIFRecurrent`, their cells, and `LIFBoxCell`.

j = i + x                                   without i, as in Box and IAF: j = x
h = v + dt tau_mem_inv (j + v_leak - v)     IAF: v + x
i = j - dt tau_syn_inv j
spike = h > v_th;  v = v_reset or, with reset_subtract, h - v_th where it spiked; nothing is detached

LIFRecurrent: x is input_weights x + recurrent_weights spike[t-1], and the spike in the reset is detached
"""

from __future__ import annotations

from typing import Any

import norse.torch as norse
import torch
from norse.torch.functional.lif import lif_step
from norse.torch.functional.reset import reset_subtract, reset_value
from norse.torch.functional.threshold import threshold as spikes_of
from norse.torch.module import snn
from norse.torch.module.exp_filter import ExpFilter
from torch import Tensor, nn

from ..checks import HALF_TYPES
from ..neurons.over_time import placement_advice
from .converted import Converted, Found, InStream, bare_class, known_class, number
from .recording import SPIKES, Recording
from .recurrent import Recurrent, currents

# Default step function, `activation`, of each convertible layer.
_STEPS = {
    norse.LIF: norse.lif_feed_forward_step,
    norse.LIFCell: norse.lif_feed_forward_step,
    norse.LIFBoxCell: norse.lif_box_feed_forward_step,
    norse.IAF: norse.iaf_feed_forward_step,
    norse.IAFCell: norse.iaf_feed_forward_step,
    norse.LI: norse.li_feed_forward_step,
    norse.LIFRecurrent: lif_step,
    norse.LIFRecurrentCell: lif_step,
}
# Layers that do not fire, converted for whole sequences alone, and the states of cells.
_READ_OUTS = {norse.LICell: norse.li_feed_forward_step, norse.LIBoxCell: norse.li_box_feed_forward_step}
_STATES: dict[Any, Any] = {
    norse.LIFCell: norse.LIFFeedForwardState,
    norse.LIFBoxCell: norse.LIFBoxFeedForwardState,
    norse.IAFCell: norse.IAFFeedForwardState,
    norse.LIFRecurrentCell: norse.LIFState,
    norse.LICell: norse.LIState,
    norse.LIBoxCell: norse.LIBoxState,
}
_FASTER = "its few operations a step are faster than a kernel's call"
_ADAPTIVE = "its threshold adapts; asgl_cuda.AdaptiveLIF is its counterpart"
_LEFT = {
    norse.LSNN: _ADAPTIVE,
    norse.LSNNCell: _ADAPTIVE,
    norse.LICell: f"{_FASTER}; LI, which takes a whole sequence, can be converted",
    norse.LIBoxCell: f"{_FASTER}; for a whole sequence there is asgl_cuda.LeakyIntegrator",
}
_MIXING = (snn.SNNRecurrent, snn.SNNRecurrentCell, norse.CobaLIFCell, norse.LILinearCell, norse.LIFCorrelation)
_NEURONS = (snn.SNN, snn.SNNCell, norse.ConstantCurrentLIFEncoder, ExpFilter, *_MIXING)


class ConvertedSNN(Converted):
    """A sequence per call, or a step for a cell, with Norse's states."""

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        """0 for layers of sequences, None for cells, which take one step."""
        return 0 if isinstance(self, (snn.SNN, snn.SNNRecurrent)) else None

    @property
    def takes_input(self) -> bool:  # type: ignore[override]
        """Whether spiking neurons get the input as it is, without a synaptic current."""
        return self.settings.spike is not None and not hasattr(self.p, "tau_syn_inv")

    def dependencies(self) -> dict[str, Any]:
        """What a call must find as it was at the conversion, see `Converted.dependencies`."""
        p, found = self.p, {"function": None, "activation": self.activation}
        found["state_fallback"] = getattr(self.state_fallback, "__func__", self.state_fallback)
        if self.settings.spike is not None:
            found |= {"method": p.method, "alpha": p.alpha, "reset_method": getattr(p, "reset_method", None)}
        return found

    def steps_as_before(self) -> bool:
        """Whether the library's own step runs: also for neurons that do not fire, whose steps are fast."""
        return self.settings.spike is None or super().steps_as_before()

    def record_step(self, recording: Recording, input_tensor: Any, state: Any = None) -> Any:
        """A step of a cell, recorded: spikes and the next state."""
        if self.time_dim is not None:
            return super().record_step(recording, input_tensor, state)
        kind = _STATES[known_class(self, _STATES)]
        results = recording.step(self, input_tensor, {name: getattr(state, name, None) for name in kind._fields})
        return results[SPIKES], kind(**{name: results[name] for name in kind._fields})

    def steps_from(self, x_seq: Tensor, states: dict[str, Any], wanted: set[str]) -> tuple[Any, Any]:
        """All steps from these states, see `Converted.steps_from`."""
        at_rest = all(each is None for each in states.values())
        state = None if at_rest else _STATES[known_class(self, _STATES)](**states)
        out, last = self.compute(x_seq, state, a_step=False, records=bool(wanted & {*states}))
        if not wanted & {*states}:
            return {SPIKES: out}, last._asdict()
        return {SPIKES: out, **last._asdict()}, {}

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        a_step = self.time_dim is None
        if input_tensor.is_sparse or (a_step and self.steps_as_before()):
            return super().forward(input_tensor, state)  # type: ignore[no-any-return]
        return self.compute(input_tensor, state, a_step, not a_step and self.record_states)

    def compute(self, input_tensor: Tensor, state: Any, a_step: bool, records: bool) -> tuple[Tensor, Any]:
        """Output and state of a step or a sequence, with the states of all steps if it `records` them."""
        found: dict[str, Any] = {}
        first = self.state_at_rest(input_tensor, a_step) if state is None else state
        options, decay_of_current = self._neuron_options()
        if decay_of_current is not None:
            if a_step:
                input_tensor = last = input_tensor + first.i
            else:
                x = input_tensor.to(torch.result_type(input_tensor, first.i))
                x = x if state is None else torch.cat([x[:1] + first.i, x[1:]])
                input_tensor, last = self.integrate(x, decay=decay_of_current)
            found["i"] = decay_of_current * (input_tensor if records else last)
        x_seq = input_tensor.unsqueeze(0) if a_step else input_tensor
        v = first.v.to(x_seq.device)
        v = v if v.shape == x_seq.shape[1:] else v.expand(x_seq.shape[1:])
        if self.settings.spike is None:
            bias = options["input_bias"]
            x_seq = x_seq if isinstance(bias, float) and bias == 0 else x_seq + self.p.v_leak
            out, last = self.integrate(x_seq, decay=options["decay"], input_gain=options["input_gain"], v_init=v)
            found["v"] = out if records else last
        else:
            output = self.lif(x_seq, v_init=v, return_v_seq=records, **options)
            out = output.s_seq.squeeze(0) if a_step else output.s_seq
            found["v"] = output.v_seq if records else output.v_last
        return out, _state(first, found, input_tensor)

    def state_at_rest(self, input_tensor: Tensor, a_step: bool) -> Any:
        """The state that Norse begins with for this input."""
        of_step = self.time_dim is None and not a_step  # a cell knows no time
        return self.initial_state(input_tensor[0] if of_step else input_tensor)

    def _neuron_options(self) -> tuple[dict[str, Any], Any]:
        """The options of `lif`, and the decay of the current, or None."""
        p, gain, bias, decay = self.p, 1.0, 0.0, 1.0
        if hasattr(p, "tau_mem_inv"):
            gain = number(self.dt * p.tau_mem_inv)
            bias, decay = gain * number(p.v_leak), 1 - gain
        options: dict[str, Any] = {"decay": decay, "input_gain": gain, "input_bias": bias}
        if hasattr(p, "v_th"):
            options["v_threshold"] = threshold = number(p.v_th)
            if getattr(p, "reset_method", reset_value) is reset_value:
                options["v_reset"] = number(p.v_reset)
            else:
                options |= {"v_reset": None, "reset_amount": threshold}
        return options, 1 - number(self.dt * p.tau_syn_inv) if hasattr(p, "tau_syn_inv") else None


class ConvertedRecurrent(Recurrent, ConvertedSNN):
    """Potentials are measured from v_leak, which may be a tensor."""

    _weights = ("input_weights", "recurrent_weights")

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if input_tensor.is_sparse or (self.time_dim is None and self.steps_as_before()):
            return super(ConvertedSNN, self).forward(input_tensor, state)  # type: ignore[no-any-return]
        return super().forward(input_tensor, state)

    def compute(self, input_tensor: Tensor, state: Any, a_step: bool, records: bool) -> tuple[Tensor, Any]:
        """Output and state of a step or a sequence, see `ConvertedSNN.compute`."""
        p = self.p
        first = self.state_at_rest(input_tensor, a_step) if state is None else state
        options, decay = self._neuron_options()
        leak = number(p.v_leak)
        x_seq = nn.functional.linear(input_tensor[None] if a_step else input_tensor, self.input_weights)
        z, v, i = [each if each.shape == x_seq.shape[1:] else each.expand(x_seq.shape[1:]) for each in first]
        x_seq = x_seq.to(torch.promote_types(x_seq.dtype, i.dtype))
        if state is not None:
            x_seq = torch.cat([x_seq[:1] + i, x_seq[1:]])
        weight: Tensor = self.recurrent_weights
        output = self.recurrent_lif(
            x_seq, weight, options["input_gain"], syn_decay=decay, decay=options["decay"], detach_reset=True,
            v_threshold=options["v_threshold"] - leak, v_reset=options["v_reset"] - leak, v_init=v - leak, s_init=z,
            return_v_seq=records,
        )  # fmt: skip
        spikes, found = output.s_seq, {"z": output.s_seq[-1], "v": output.v_last, "i": output.i_last}
        if records:
            i_seq, _ = self.integrate(currents(x_seq, spikes, z, weight), decay=decay)
            found = {"z": spikes, "v": output.v_seq, "i": i_seq}
        found |= {"v": found["v"] + leak, "i": decay * found["i"]}
        return spikes.squeeze(0) if a_step else spikes, _state(first, found, x_seq)


def _state(first: Any, found: dict[str, Any], input_tensor: Tensor) -> Any:
    """The state after a call, whose values are float32 inside of a call also for half types."""
    if input_tensor.dtype in HALF_TYPES:
        found = {name: value.to(torch.result_type(input_tensor, getattr(first, name))) for name, value in found.items()}
    return type(first)(**found)


def find_in_loop(layer: nn.Module) -> Found:
    """The answer of `find` for a layer whose steps are computed together."""
    kind = known_class(layer, _READ_OUTS)
    if kind not in _READ_OUTS:
        return find(layer)
    return _found(layer, kind, _READ_OUTS[kind])


def find(layer: nn.Module) -> Found:
    """The answer for a layer of Norse, see `Found`."""
    kind = known_class(layer, (*_STEPS, *_LEFT), _MIXING)
    if isinstance(kind, str):
        return kind if isinstance(layer, _NEURONS) else None
    if kind in _LEFT:
        return _LEFT[kind]
    return _found(layer, kind, _STEPS[kind])


def _found(layer: Any, kind: Any, step: Any) -> Found:
    """The answer for a layer of a known class, whose own step function is `step`."""
    p: Any = layer.p
    if getattr(layer.state_fallback, "__func__", None) is not kind.initial_state:
        return "it starts from a state of its own (state_fallback)"
    if layer.activation is not step:
        return f"it steps by {getattr(layer.activation, '__name__', layer.activation)}"
    if getattr(p, "reset_method", reset_value) not in (reset_value, reset_subtract):
        return "it resets by a function of its own"
    if not hasattr(p, "v_th"):
        return ConvertedSNN, None

    def spike(u: Tensor) -> Tensor:
        """Norse's spike function of this layer."""
        return spikes_of(u, p.method, torch.as_tensor(p.alpha))  # type: ignore[no-any-return]

    spike.__qualname__ = p.method
    if isinstance(layer, (snn.SNNRecurrent, snn.SNNRecurrentCell)):
        return ConvertedRecurrent, spike
    return ConvertedSNN, spike


def not_written(module: nn.Module) -> str | None:
    """Why `to_nir` can't write the module, or None for one that is not Norse's."""
    if not isinstance(module, (*_NEURONS, norse.SequentialState, norse.RecurrentSequential)):
        return None
    return "it returns a state with its output; norse.torch.to_nir writes models of Norse's cells, if not converted"


def outside(module: nn.Module) -> str | None:
    if not isinstance(module, _NEURONS):
        return None
    name = bare_class(module).__name__
    if name.endswith("Cell"):
        return f"{placement_advice(f'norse.torch.Lift({name}(...))', in_place=True)}, which also returns the state"
    return f"as in norse.torch.SequentialState(OverTime(...), {name}(...))"


def streamed(module: nn.Module) -> InStream:
    """How a module takes single steps, see `InStream`: the caller of Norse's layers passes the state."""
    if not isinstance(module, _NEURONS):
        return None
    return "Norse's caller passes the state: a step is output, state = model(x_t, state), for LIF and LI with x_t[None]"
