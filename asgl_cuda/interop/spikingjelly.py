"""SpikingJelly: the nodes in `_KNOWN`, of version 2 and of the earlier versions 0.0.0.0.x.

    h = v + x                                   IFNode, SimpleIFNode, NonSpikingIFNode
    h = v - (v - v_reset) / tau + x             LIFNode, SimpleLIFNode
    h = v + (x - (v - v_reset)) / tau           the same with decay_input; NonSpikingLIFNode, where v_reset is 0
    1 / tau = sigmoid(w)                        ParametricLIFNode
    h = v_decay v + c;  c = c_decay c + x       CUBALIFNode, with the updated c

A spike at h >= v_threshold resets to v_reset or, if v_reset is None (0 in the equations), subtracts v_threshold.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from spikingjelly.activation_based import base, neuron, rnn
from spikingjelly.activation_based import layer as layers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..call import LIFOutput
from .converted import STATEFUL, Converted, Found, InStream, Streamed, Wrapper, bare_class, unknown


class ConvertedNode(Converted):
    """All steps in one call for step mode "m", one step for "s"; stores `v` and `v_seq` as SpikingJelly does."""

    v: Any
    surrogate_function: Any

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        return 0 if self.step_mode == "m" else None

    def known_by(self) -> tuple[Any, ...]:
        return self.surrogate_function, self.__dict__.get("_neuron_precision")

    def advice(self) -> str | None:
        if self.step_mode != "s":
            return None
        whole = "spikingjelly.activation_based.functional.set_step_mode(model, 'm')"
        return f"step mode 's' computes a step a call; {whole} computes whole sequences, 3 to 12 times faster"

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        output = self._steps(x_seq, whole=True)
        if output.v_seq is not None:
            self.v_seq = output.v_seq
        return output.s_seq

    def single_step_forward(self, x: Tensor) -> Tensor:
        if self.steps_as_before():
            return super().single_step_forward(x)  # type: ignore[misc,no-any-return]
        output = self._steps(x.unsqueeze(0), whole=False)
        if hasattr(self, "_append_v_seq") and self.store_v_seq:  # since version 2
            self._append_v_seq(output.v_last)
        return output.s_seq.squeeze(0)

    def _steps(self, x_seq: Tensor, whole: bool) -> LIFOutput:
        v_reset = 0.0 if self.v_reset is None else self.v_reset
        v_rest = v_reset if self.takes_input else 0.0
        output = self.lif(
            self._current(x_seq, whole),
            decay=self.v_decay if hasattr(self, "v_decay") else 1 - self._share(),
            input_gain=self.input_terms()[0],
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            v_rest=v_rest,
            v_init=self._kept(self.v, x_seq, v_reset, v_rest),
            detach_reset=self.detach_reset,
            return_v_seq=whole and getattr(self, "store_v_seq", False),
        )
        self.v = output.v_last
        return output

    def _kept(self, value: Any, x_seq: Tensor, at_start: float, at_rest: float | None) -> Any:
        """The state of the last call; None at rest."""
        whole, simple = not x_seq.is_floating_point(), isinstance(self, _SIMPLE)
        if isinstance(value, Tensor) and value.shape != x_seq.shape[1:] and not simple:
            value = at_start  # restarts, as in SpikingJelly
        if not isinstance(value, Tensor):
            return None if value == at_rest and not whole else torch.full_like(x_seq[0], value)
        # Since version 2, SpikingJelly stores states in the input's dtype.
        return value.to(x_seq.dtype) if whole and not simple and hasattr(self, "materialize_states") else value

    def _current(self, x_seq: Tensor, whole: bool) -> Tensor:
        return x_seq

    def input_terms(self) -> tuple[Tensor | float, Tensor | float]:
        return self._share() if getattr(self, "decay_input", False) else 1.0, 0.0

    def _share(self) -> Tensor | float:
        """The leak of the potential per step."""
        leak = 1 / self.tau if hasattr(self, "tau") else 0.0
        return self.w.sigmoid() if isinstance(self, neuron.ParametricLIFNode) else leak

    def hold_width(self) -> bool:
        function = self.surrogate_function
        kinds = {
            "rectangle": "Rect", "triangle": "PiecewiseQuadratic", "sigmoid": "Sigmoid", "arctan": "ATan", "erf": "Erf",
            "fast_sigmoid": "SoftSign",
        }  # fmt: skip
        if kinds.get(self.settings.spike.surrogate) != type(function).__name__:
            return False
        self.surrogate_function = copy.deepcopy(function)  # shared by default
        self.surrogate_function.alpha = 1 / float(torch.as_tensor(self.width).detach())
        return True


class ConvertedCUBALIFNode(ConvertedNode):
    """Charged by a leaky current, `c`; the potential leaks to 0, with any reset."""

    takes_input = False
    c: Any

    def _current(self, x_seq: Tensor, whole: bool) -> Tensor:
        c = self._kept(self.c, x_seq, 0.0, None)
        if not whole:  # cheaper than the integrator's call
            self.c = self.c_decay * c + x_seq.squeeze(0)
            return self.c.unsqueeze(0)  # type: ignore[no-any-return]
        c_seq, self.c = self.integrate(x_seq, decay=self.c_decay, v_init=c)
        return c_seq


class ConvertedNonSpikingNode(Converted):
    """All steps in one call, each time from 0, decoded as SpikingJelly does."""

    takes_input = False
    time_dim = 0

    def forward(self, x_seq: Tensor) -> Any:
        share, gain = (1 / self.tau, 1 / self.tau) if hasattr(self, "tau") else (0.0, 1.0)
        v_seq, self.v = self.integrate(x_seq, decay=1 - share, input_gain=gain)
        if self.decode == "max-mem":
            return v_seq.max(0).values
        if self.decode == "max-abs-mem":
            high, low = v_seq.max(0).values, v_seq.min(0).values
            return torch.where(high.abs() > low.abs(), high, low)
        if self.decode == "mean-mem":
            return v_seq.mean(0)
        return v_seq[-1] if self.decode == "last_mem" else list(v_seq)


# Equivalents of torch.nn's; in step mode "m" time and batch are apart. ThresholdDependent changes only the initial
# weight; before version 2 it joins time and batch twice.
NORMALISATIONS = tuple(
    getattr(layers, f"{kind}BatchNorm{dims}d")
    for kind in ("", "ThresholdDependent")
    for dims in (1, 2, 3)
    if not kind or "forward" not in vars(getattr(layers, f"{kind}BatchNorm{dims}d"))
)

# Equivalents of torch.nn's layers; in step mode "m" time and batch are apart.
PLAIN = {
    getattr(layers, name): getattr(nn, name)
    for name in ("Linear", "Conv1d", "Conv2d", "AvgPool2d", "Flatten", "Dropout", "Dropout2d")
    if hasattr(layers, name)
}


def _nodes(*names: str) -> tuple[type[nn.Module], ...]:
    """The classes of the installed version."""
    return tuple(getattr(neuron, name) for name in names if hasattr(neuron, name))


_SIMPLE = _nodes("SimpleIFNode", "SimpleLIFNode")
_CUBA, _NON_SPIKING = _nodes("CUBALIFNode"), _nodes("NonSpikingIFNode", "NonSpikingLIFNode")
_KNOWN = (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode, *_SIMPLE, *_CUBA, *_NON_SPIKING)
_DROPOUTS = tuple(  # carry a mask, not a state
    getattr(layers, name) for name in ("Dropout", "Dropout2d", "DropConnectLinear") if hasattr(layers, name)
)
_MIXING = _nodes("PSN", "MaskedPSN", "SlidingPSN", "ILCBaseNode")

_CONTAINERS = {  # class: time_dim
    getattr(layers, name): time_dim
    for name, time_dim in {
        "SeqToANNContainer": 0, "MultiStepContainer": 0, "TLastSeqToANNContainer": -1, "TLastMultiStepContainer": -1,
    }.items()
    if hasattr(layers, name)
}  # fmt: skip


_RECURRENT = (rnn.SpikingRNNBase, rnn.SpikingRNNCellBase)


def _is_neuron(layer: nn.Module) -> bool:
    in_file = any(base.__module__.startswith(neuron.__name__) for base in type(layer).__mro__)
    return in_file or hasattr(layer, "neuronal_charge")


def find(layer: nn.Module) -> Found:
    kind = bare_class(layer)
    if kind not in _KNOWN:
        if _is_neuron(layer):
            return unknown(layer, _KNOWN, _MIXING)
        return STATEFUL if _carries(layer) else None
    if kind in _NON_SPIKING:
        return ConvertedNonSpikingNode, None
    node: Any = layer
    if not getattr(node.surrogate_function, "spiking", True):
        return "its surrogate function does not spike (spiking=False)"
    if getattr(node, "_neuron_precision", None) is not None:
        return "it has a precision of its own"
    return ConvertedCUBALIFNode if kind in _CUBA else ConvertedNode, node.surrogate_function


def _carries(layer: nn.Module) -> bool:
    """Whether the layer carries state other than dropout masks between calls, or is a recurrent spiking network."""
    if isinstance(layer, _RECURRENT):
        return True
    return isinstance(layer, base.MemoryModule) and bool(layer._memories) and not isinstance(layer, _DROPOUTS)


def wrapped(module: nn.Module) -> Wrapper | None:
    if type(module) is layers.SeqToANNContainer:
        return Wrapper(list(module._modules), -1, 1)
    if type(module) is layers.MultiStepContainer:
        return Wrapper(list(module._modules), None, None)
    return None


def reset(module: nn.Module) -> None:
    if isinstance(module, base.MemoryModule):
        module.reset()


def detach(module: nn.Module) -> None:
    if isinstance(module, base.MemoryModule):
        memories = module._memories
        memories.update((name, _detached(value)) for name, value in memories.items())


def _detached(value: Any) -> Any:
    """Supports views and lists, unlike `Tensor.detach_` as called by `functional.detach_net`."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_detached, value))
    return value.detach() if isinstance(value, Tensor) else value


def knows_time(module: nn.Module) -> bool:
    if isinstance(module, _RECURRENT):
        return True
    if isinstance(module, base.MultiStepModule):
        return not isinstance(module, (_BatchNorm, *_CONTAINERS))
    return hasattr(module, "neuronal_charge") or (
        isinstance(module, base.MemoryModule) and not isinstance(module, _DROPOUTS)
    )


def streamed(module: nn.Module) -> InStream:
    if type(module) in _CONTAINERS:
        return Streamed(_CONTAINERS[type(module)], None)
    if not knows_time(module):
        return None
    memories = getattr(module, "_memories", {})
    if "v" in memories or (memories and (module.step_mode == "s" or not _is_neuron(module))):
        return Streamed(0 if module.step_mode == "m" else None, "v" if "v" in memories else None)
    return "it carries no potential from call to call"
