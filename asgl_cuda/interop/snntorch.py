"""snnTorch: `Leaky`, `Lapicque` and `Synaptic`, a step a call, and `MultiStep` for a whole sequence.

    m[t] = clamp(beta, 0, 1) m[t-1] + x[t] - threshold [m[t-1] > threshold]        "subtract"; the reset is detached
    m[t] = clamp(beta, 0, 1) m[t-1] (1 - [m[t-1] > threshold]) + x[t]              "zero";     and "none" has none
    spike = m[t] > threshold

Lapicque has 1 - time_step / (R C) for clamp(beta, 0, 1), and time_step / C x[t] for x[t]. Synaptic has a current for
x[t], syn[t] = clamp(alpha, 0, 1) syn[t-1] + x[t]. In both "zero" takes the input of the step away as well.

The reset comes a step late, so m is h, the potential before reset, and v[t] = h[t] - threshold / beta s[t] follows it.
With reset_delay=False m is returned after a reset that is not detached, and is not reset again. An ASGL layer resets by
the value that it emitted, and a potential from elsewhere by comparing it with the threshold.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any, NamedTuple

import snntorch
import torch
from torch import Tensor, nn

from ..functional import LIFOutput
from .converted import Converted, Found, InStream, Settings, Streamed, Wrapper, number, unknown

# A learned beta of 0 is taken for this much, since threshold / beta must exist; the change is below the resolution of
# float32 at the threshold.
_LEAST_BETA = 1e-6

_MULTI_STEP = "asgl_cuda.interop.snntorch.MultiStep"
_NAMES = "a Leaky, Lapicque or Synaptic"


class _After(NamedTuple):
    """The potential after reset that belongs to a `mem` as it was returned, which spares the next call the reset."""

    mem: Tensor
    v: Tensor
    mark: tuple[Any, ...]


class ConvertedLeaky(Converted):
    """One step a call, with arguments and results of `Leaky`; `Lapicque` has the same."""

    time_dim = None
    reset_delay = True  # Lapicque's always is
    _after: _After | None = None

    def begin(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        super().begin(settings, analog_prob, learn_width)
        enlist(self)

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        return self.results(*self.step(input_.unsqueeze(0), mem))

    def step(self, x_seq: Tensor, mem: Tensor | None) -> tuple[Tensor, ...]:
        """Spikes and states after the one step that there is."""
        output = self._steps(x_seq, mem)
        assert output.h_seq is not None
        assert output.v_last is not None
        # squeeze has a cheaper gradient than indexing; the potential must be no view, to be detached in place.
        spk, mem = output.s_seq.squeeze(0), output.h_seq.squeeze(0).clone()
        if self.reset_delay:
            object.__setattr__(self, "_after", _After(mem, output.v_last, self._mark(mem)))  # Module's takes longer
        elif self.reset_mechanism == "subtract":
            mem = mem - (spk - self.reset) * self.threshold
        elif self.reset_mechanism == "zero":
            mem = mem - (spk - self.reset) * mem
        self.mem = mem
        return spk, mem

    def sequence(self, x_seq: Tensor, mem: Tensor | None = None) -> tuple[Tensor, ...]:
        """Spikes and states of all steps."""
        if self.reset_delay or self.reset_mechanism == "none":
            output = self._steps(x_seq, mem)
            mem_seq = output.h_seq
        else:
            output = self._steps(x_seq, mem, detach_reset=False, return_h_seq=False, return_v_seq=True)
            mem_seq = output.v_seq
        assert mem_seq is not None
        self.mem = mem_seq[-1].clone()
        return output.s_seq, mem_seq

    def results(self, spk: Tensor, *states: Tensor) -> Any:
        return spk if self.init_hidden and not self.output else (spk, *states)

    def _steps(self, x_seq: Tensor, mem: Tensor | None, **options: Any) -> LIFOutput:
        """Computes steps from the potential that is given or kept."""
        if mem is None:
            mem = self.mem
        elif self.init_hidden:
            raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
        if mem.shape != x_seq.shape[1:]:
            mem = torch.zeros_like(x_seq[0])
        mechanism = self.reset_mechanism
        threshold, decay = number(self.threshold), self._decay()
        amount = threshold / decay if mechanism == "subtract" else 0.0
        options = {"detach_reset": True, "return_h_seq": True} | options
        options |= {"v_reset": 0.0} if mechanism == "zero" else {"v_reset": None, "reset_amount": amount}
        v_init, gain = self._reset(mem, amount), self.input_terms()[0]
        return self.lif(x_seq, decay=decay, input_gain=gain, v_threshold=threshold, v_init=v_init, **options)

    def _decay(self) -> Tensor | float:
        if isinstance(self, snntorch.Lapicque):
            return number(1 - self.time_step / (self.R * self.C))  # type: ignore[no-any-return]
        return _clamped(self.beta, _LEAST_BETA if self.reset_mechanism == "subtract" else 0.0)

    def input_terms(self) -> tuple[Tensor | float, Tensor | float]:
        is_lapicque = isinstance(self, snntorch.Lapicque)
        return number(self.R * (1 / (self.R * self.C)) * self.time_step) if is_lapicque else 1.0, 0.0

    def _mark(self, mem: Tensor) -> tuple[Any, ...]:
        """Differs when `mem` was changed or detached in place, a parameter changed, or gradients switched on or off."""
        leak = (self.R, self.C, self.time_step) if isinstance(self, snntorch.Lapicque) else (self.beta,)
        used = [(id(value), value._version) for value in (mem, self.threshold, *leak)]
        return mem.grad_fn, torch.is_grad_enabled(), *used

    def _reset(self, mem: Tensor, amount: Tensor | float) -> Tensor:
        """The potential after the reset that is due."""
        after: _After | None = self.__dict__.pop("_after", None)
        if after is not None and mem is after.mem and self._mark(mem) == after.mark:
            return after.v
        self.reset = reset = (mem - self.threshold > 0).to(mem.dtype).detach()
        v: Tensor = (1 - reset) * mem if self.reset_mechanism == "zero" else mem - reset * amount
        return v

    def end(self) -> None:
        self.__dict__.pop("_after", None)
        super().end()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_after"}  # that has parts of a graph


class ConvertedSynaptic(ConvertedLeaky):
    """One step a call, with arguments and results of `Synaptic`."""

    takes_input = False
    syn: Tensor

    def forward(self, input_: Tensor, syn: Any = None, mem: Any = None) -> Any:  # type: ignore[override]
        self.syn = _clamped(self.alpha, 0.0) * self._before(input_, syn, mem) + input_
        spk, mem = self.step(self.syn.unsqueeze(0), mem)
        return self.results(spk, self.syn, mem)

    def sequence(self, x_seq: Tensor, syn: Any = None, mem: Any = None) -> Any:  # type: ignore[override]
        syn = self._before(x_seq[0], syn, mem)
        syn_seq, self.syn = self.integrate(x_seq, decay=_clamped(self.alpha, 0.0), v_init=syn)
        s_seq, mem_seq = super().sequence(syn_seq, mem)
        return s_seq, syn_seq, mem_seq

    def _before(self, x: Tensor, syn: Tensor | None, mem: Tensor | None) -> Tensor:
        if self.init_hidden and (syn is not None or mem is not None):
            raise TypeError("`mem` or `syn` should not be passed as an argument while `init_hidden=True`")
        syn = self.syn if syn is None else syn
        return syn if syn.shape == x.shape else torch.zeros_like(x)


def _clamped(value: Tensor, least: float) -> Tensor | float:
    value = number(value)
    return min(max(value, least), 1.0) if isinstance(value, float) else value.clamp(least, 1.0)


class MultiStep(nn.Module):
    """`Leaky`, `Lapicque` or `Synaptic` over a whole sequence in one call.

    Args:
        layer: such a layer of snnTorch, converted or not; it is converted here, in place.

    Called with `x_seq` `[T, ...]` and, unless the layer has init_hidden, optionally the first states, it returns what
    the layer returns at each step, stacked: spikes, or spikes and states.

    Raises ValueError for a layer that can't be represented, or whose reset takes the threshold away without delay.

    The same with snnTorch::

        for x in x_seq:
            spk, mem = layer(x, mem)  # spk, syn, mem = layer(x, syn, mem) for Synaptic
    """

    def __init__(self, layer: nn.Module) -> None:
        from .convert import convert

        super().__init__()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{_MULTI_STEP}: layer must be {_NAMES} of snnTorch, got {type(layer).__name__}")
        converted, report = convert(layer, inplace=True)
        if not isinstance(converted, ConvertedLeaky):
            reason = report.left[0].reason if report.left else f"it is a {type(layer).__name__}"
            raise ValueError(f"{_MULTI_STEP}: layer must be {_NAMES} of snnTorch: {reason}")
        if not converted.reset_delay and converted.reset_mechanism == "subtract":
            raise ValueError(f"{_MULTI_STEP}: a reset by subtraction needs reset_delay=True, got False")
        self.layer = converted

    def forward(self, x_seq: Tensor, *states: Tensor | None, **named: Tensor | None) -> Any:
        for name, value in (("x_seq", x_seq), *(("a state", state) for state in (*states, *named.values()))):
            if not isinstance(value, Tensor) and not (name == "a state" and value is None):
                raise TypeError(f"{_MULTI_STEP}: {name} must be a tensor, got {type(value).__name__}")
        if not isinstance(self.layer, ConvertedLeaky):
            raise RuntimeError(
                f"{_MULTI_STEP}: layer must be converted, got one that was reverted: "
                "asgl_cuda.convert(model, inplace=True) converts it again"
            )
        return self.layer.results(*self.layer.sequence(x_seq, *states, **named))


_KNOWN = (snntorch.Leaky, snntorch.Lapicque, snntorch.Synaptic)
_MIXING = (snntorch.RLeaky, snntorch.RSynaptic, snntorch.SLSTM, snntorch.SConv2dLSTM, snntorch.LeakyParallel)
_NEURONS = (snntorch.SpikingNeuron, *_MIXING)


def find(layer: nn.Module) -> Found:
    if type(layer) not in _KNOWN:
        return unknown(layer, _KNOWN, _MIXING) if isinstance(layer, _NEURONS) else None
    leaky: Any = layer
    if importlib.metadata.version("snntorch").split(".")[0] != "1":
        return f"of snnTorch {importlib.metadata.version('snntorch')}; known is the reset of version 1"
    if leaky.inhibition:
        return "it has inhibition"
    if leaky.state_quant:
        return "it quantises its state"
    if isinstance(leaky.graded_spikes_factor, nn.Parameter) or bool((leaky.graded_spikes_factor != 1).any()):
        return "its spikes are graded"
    if leaky.reset_mechanism == "zero" and type(layer) is not snntorch.Leaky:
        return 'it resets the input of the next step to 0 as well (reset_mechanism="zero")'
    decay = leaky.beta
    if type(layer) is snntorch.Lapicque:
        decay = 1 - leaky.time_step / (leaky.R * leaky.C)
        if decay.requires_grad:
            return "it learns by a graph that ends with the first backward (learn_beta)"
    constant = not isinstance(decay, nn.Parameter)
    if leaky.reset_mechanism == "subtract" and constant and bool((decay.abs() < _LEAST_BETA).any()):
        return "it subtracts the threshold from a potential of which nothing is left (beta=0)"
    return ConvertedSynaptic if type(layer) is snntorch.Synaptic else ConvertedLeaky, leaky.spike_grad


def enlist(model: nn.Module) -> None:
    """Adds a copy's layers to the list by which snnTorch finds those to reset and to detach."""
    instances: list[Any] = snntorch.SpikingNeuron.instances
    known = {id(layer) for layer in instances}
    instances.extend(
        layer for layer in model.modules() if isinstance(layer, snntorch.SpikingNeuron) and id(layer) not in known
    )


def wrapped(module: nn.Module) -> Wrapper | None:
    return Wrapper(["layer"], -1, None) if type(module) is MultiStep else None


def reset(module: nn.Module) -> None:
    if isinstance(module, snntorch.SpikingNeuron) and hasattr(module, "reset_mem"):
        module.reset_mem()


def detach(module: nn.Module) -> None:
    if isinstance(module, _NEURONS):
        for name in module._non_persistent_buffers_set:  # its states
            state = module._buffers[name]
            module._buffers[name] = None if state is None else state.detach()


def knows_time(module: nn.Module) -> bool:
    return isinstance(module, _NEURONS)


def streamed(module: nn.Module) -> InStream:
    if isinstance(module, MultiStep):
        return Streamed(0, None)
    if not isinstance(module, _NEURONS):
        return None
    return Streamed(None, "mem") if hasattr(module, "mem") else "it carries no potential from call to call"
