"""Norse: `LIF`, `IAF`, `LI` and `LIFRecurrent`, their cells, and `LIFBoxCell`.

j = i + x                                   without i, as in Box and IAF: j = x
h = v + dt tau_mem_inv (j + v_leak - v)     IAF: v + x
i = j - dt tau_syn_inv j
spike = h > v_th;  v = v_reset or, with reset_subtract, h - v_th where it spiked; no gradient is detached

LIFRecurrent: input_weights x + recurrent_weights spike[t-1] replaces x, and the spike in the reset is detached
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
from .converted import Conversion, Converted, Streaming, bare_class, float_if_scalar, known_class_or_reason
from .recording import SPIKES, Recording
from .recurrent import Recurrent, synaptic_inputs

# The step function of each class that can be converted. A layer has it as its attribute `activation`.
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
# The same for layers that do not fire and are converted only for `convert(model, sequences=...)`.
_READ_OUTS = {norse.LICell: norse.li_feed_forward_step, norse.LIBoxCell: norse.li_box_feed_forward_step}
_STATES: dict[Any, Any] = {  # the state's class, by class of cell
    norse.LIFCell: norse.LIFFeedForwardState,
    norse.LIFBoxCell: norse.LIFBoxFeedForwardState,
    norse.IAFCell: norse.IAFFeedForwardState,
    norse.LIFRecurrentCell: norse.LIFState,
    norse.LICell: norse.LIState,
    norse.LIBoxCell: norse.LIBoxState,
}
_FASTER = "its few operations per step are faster than the call of a kernel"
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
    """A layer of which a call takes a sequence, or a cell of which a call takes one step, with Norse's states."""

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        """0 for layers of sequences, None for cells, which take one step."""
        return 0 if isinstance(self, (snn.SNN, snn.SNNRecurrent)) else None

    @property
    def takes_input_directly(self) -> bool:  # type: ignore[override]
        """Whether `lif` gets the layer's own input: the layer fires, and has no synaptic current."""
        return self.settings.spike is not None and not hasattr(self.p, "tau_syn_inv")

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        p, found = self.p, {"function": None, "activation": self.activation}
        found["state_fallback"] = getattr(self.state_fallback, "__func__", self.state_fallback)
        if self.settings.spike is not None:
            found |= {"method": p.method, "alpha": p.alpha, "reset_method": getattr(p, "reset_method", None)}
        return found

    def prefers_original_step(self) -> bool:
        """Whether to run Norse's own step: also if the cell does not fire, because its few operations are fast."""
        return self.settings.spike is None or super().prefers_original_step()

    def speed_advice(self) -> str | None:
        """Advice to convert a module with the loop over the steps, which passes the states; None for a sequence."""
        if self.time_dim is not None:
            return None
        return (
            'one step per call gains little; convert(model, sequences="loop") computes all steps at once if the '
            "model's forward contains the loop over the steps, as that of norse.torch.Lift does"
        )

    def record_step(self, recording: Recording, input_tensor: Any, state: Any = None) -> Any:
        """Records a step of a cell. Returns its spikes and its next state."""
        if self.time_dim is not None:
            return super().record_step(recording, input_tensor, state)
        kind = _STATES[known_class_or_reason(self, _STATES)]
        results = recording.add_layer_step(
            self, input_tensor, {name: getattr(state, name, None) for name in kind._fields}
        )
        return results[SPIKES], kind(**{name: results[name] for name in kind._fields})

    def compute_steps(self, x_seq: Tensor, states: dict[str, Any], wanted: set[str]) -> tuple[Any, Any]:
        """Computes all steps from these states, see `Converted.compute_steps`."""
        at_rest = all(each is None for each in states.values())
        state = None if at_rest else _STATES[known_class_or_reason(self, _STATES)](**states)
        out, last = self.compute_output_and_state(x_seq, state, a_step=False, records=bool(wanted & {*states}))
        if not wanted & {*states}:
            return {SPIKES: out}, last._asdict()
        return {SPIKES: out, **last._asdict()}, {}

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The output and the next state, as the layer returns them in Norse."""
        a_step = self.time_dim is None
        if self.runs_original(input_tensor, a_step):
            return super().forward(input_tensor, state)  # type: ignore[no-any-return]
        return self.compute_output_and_state(input_tensor, state, a_step, not a_step and self.record_states)

    def runs_original(self, input_tensor: Tensor, a_step: bool) -> bool:
        """Whether Norse's own forward computes this call. Only it takes sparse inputs."""
        if not input_tensor.is_sparse:
            return a_step and self.prefers_original_step()
        if self.settings.spike is not None and not self.can_run_original():
            raise ValueError(
                f"asgl_cuda.convert: {bare_class(self).__name__} converted with asgl or backend takes dense inputs, "
                "got a sparse one; pass input.to_dense()"
            )
        return True

    def compute_output_and_state(
        self, input_tensor: Tensor, state: Any, a_step: bool, records: bool
    ) -> tuple[Tensor, Any]:
        """Output and state of a step or a sequence. With `records`, the state contains the values of all steps."""
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
        return out, _next_state(first, found, input_tensor)

    def state_at_rest(self, input_tensor: Tensor, a_step: bool) -> Any:
        """The state that Norse begins with for this input."""
        is_sequence_of_cell = self.time_dim is None and not a_step  # a cell's own state has no time dimension
        return self.initial_state(input_tensor[0] if is_sequence_of_cell else input_tensor)

    def _neuron_options(self) -> tuple[dict[str, Any], Any]:
        """The options of `lif` that follow from p, and the decay of the synaptic current, or None without one."""
        p, gain, bias, decay = self.p, 1.0, 0.0, 1.0
        if hasattr(p, "tau_mem_inv"):
            gain = float_if_scalar(self.dt * p.tau_mem_inv)
            bias, decay = gain * float_if_scalar(p.v_leak), 1 - gain
        options: dict[str, Any] = {"decay": decay, "input_gain": gain, "input_bias": bias}
        if hasattr(p, "v_th"):
            options["v_threshold"] = threshold = float_if_scalar(p.v_th)
            if getattr(p, "reset_method", reset_value) is reset_value:
                options["v_reset"] = float_if_scalar(p.v_reset)
            else:
                options |= {"v_reset": None, "reset_amount": threshold}
        return options, 1 - float_if_scalar(self.dt * p.tau_syn_inv) if hasattr(p, "tau_syn_inv") else None


class ConvertedRecurrent(Recurrent, ConvertedSNN):
    """A recurrent layer. `recurrent_lif` gets potentials as differences from v_leak, which may be a tensor."""

    _weights = ("input_weights", "recurrent_weights")

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The output and the next state, as the layer returns them in Norse."""
        if self.runs_original(input_tensor, self.time_dim is None):
            return super(ConvertedSNN, self).forward(input_tensor, state)  # type: ignore[no-any-return]
        return super().forward(input_tensor, state)

    def compute_output_and_state(
        self, input_tensor: Tensor, state: Any, a_step: bool, records: bool
    ) -> tuple[Tensor, Any]:
        """Output and state of a step or a sequence, see `ConvertedSNN`."""
        p = self.p
        first = self.state_at_rest(input_tensor, a_step) if state is None else state
        options, decay = self._neuron_options()
        leak = float_if_scalar(p.v_leak)
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
            i_seq, _ = self.integrate(synaptic_inputs(x_seq, spikes, z, weight), decay=decay)
            found = {"z": spikes, "v": output.v_seq, "i": i_seq}
        found |= {"v": found["v"] + leak, "i": decay * found["i"]}
        return spikes.squeeze(0) if a_step else spikes, _next_state(first, found, x_seq)


def _next_state(first: Any, found: dict[str, Any], input_tensor: Tensor) -> Any:
    """The state after a call, with values in Norse's dtypes. For inputs of half types they are computed in float32."""
    if input_tensor.dtype in HALF_TYPES:
        found = {name: value.to(torch.result_type(input_tensor, getattr(first, name))) for name, value in found.items()}
    return type(first)(**found)


def conversion_in_loop(layer: nn.Module) -> Conversion:
    """How to convert a layer for `convert(model, sequences=...)`, which also supports cells that do not fire."""
    kind = known_class_or_reason(layer, _READ_OUTS)
    if kind not in _READ_OUTS:
        return conversion_of(layer)
    return _conversion_of_class(layer, kind, _READ_OUTS[kind])


def conversion_of(layer: nn.Module) -> Conversion:
    """How to convert a layer of Norse, see `Conversion`."""
    kind = known_class_or_reason(layer, (*_STEPS, *_LEFT), _MIXING)
    if isinstance(kind, str):
        return kind if isinstance(layer, _NEURONS) else None
    if kind in _LEFT:
        return _LEFT[kind]
    return _conversion_of_class(layer, kind, _STEPS[kind])


def _conversion_of_class(layer: Any, kind: Any, step: Any) -> Conversion:
    """How to convert a layer that computes the same as `kind`, whose own step function is `step`."""
    p: Any = layer.p
    if getattr(layer.state_fallback, "__func__", None) is not kind.initial_state:
        return "its initial state is not Norse's own (state_fallback)"
    if layer.activation is not step:
        return f"its step function is {getattr(layer.activation, '__name__', layer.activation)}, not {step.__name__}"
    if getattr(p, "reset_method", reset_value) not in (reset_value, reset_subtract):
        return "its reset_method is neither reset_value nor reset_subtract of Norse"
    if not hasattr(p, "v_th"):
        return ConvertedSNN, None

    def spike(u: Tensor) -> Tensor:
        """Norse's spike function of this layer."""
        return spikes_of(u, p.method, torch.as_tensor(p.alpha))  # type: ignore[no-any-return]

    spike.__qualname__ = p.method
    if isinstance(layer, (snn.SNNRecurrent, snn.SNNRecurrentCell)):
        return ConvertedRecurrent, spike
    return ConvertedSNN, spike


def reason_not_written(module: nn.Module) -> str | None:
    """Why `to_nir` can't write the module, or None for one that is not Norse's."""
    if not isinstance(module, (*_NEURONS, norse.SequentialState, norse.RecurrentSequential)):
        return None
    return "it returns a state with its output; norse.torch.to_nir writes models of Norse's cells, if not converted"


def placement_outside_over_time(module: nn.Module) -> str | None:
    """How to use a module that `OverTime` refuses, see `imported_adapters`; None for other modules."""
    if not isinstance(module, _NEURONS):
        return None
    name = bare_class(module).__name__
    if name.endswith("Cell"):
        return f"{placement_advice(f'norse.torch.Lift({name}(...))', in_place=True)}, which also returns the state"
    return f"as in norse.torch.SequentialState(OverTime(...), {name}(...))"


def streaming_of(module: nn.Module) -> Streaming:
    """Why a module can't take one time step per call, see `Streaming`: callers of Norse's layers pass the state."""
    if not isinstance(module, _NEURONS):
        return None
    return (
        "in Norse the caller passes the state; compute a step by output, state = model(x_t, state), and pass x_t[None] "
        "to LIF and LI"
    )
