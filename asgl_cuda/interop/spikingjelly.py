"""SpikingJelly: `IFNode`, `LIFNode` and `ParametricLIFNode`, of version 2 and of the versions 0.0.0.0.x before it.

    h = v + x                                   IFNode
    h = v - (v - v_reset) / tau + x             LIFNode; (x - (v - v_reset)) / tau is added with decay_input
    1 / tau = sigmoid(w)                        ParametricLIFNode

A spike at h >= v_threshold resets to v_reset or, where that is None (and 0 in the equations), takes v_threshold away.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from spikingjelly.activation_based import base, neuron
from spikingjelly.activation_based import layer as layers
from torch import Tensor, nn

from ..functional import LIFOutput
from .converted import Converted, Found, Wrapper, unknown


class ConvertedNode(Converted):
    """All steps in one call for step mode "m", one step for "s"; `v` and `v_seq` are kept as SpikingJelly does."""

    v: Any
    surrogate_function: Any

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        return 0 if self.step_mode == "m" else None

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        output = self._steps(x_seq)
        if self.store_v_seq:
            self.v_seq = output.v_seq
        return output.s_seq

    def single_step_forward(self, x: Tensor) -> Tensor:
        output = self._steps(x.unsqueeze(0))
        if self.store_v_seq and hasattr(self, "_append_v_seq"):  # since version 2
            self._append_v_seq(output.v_last)
        return output.s_seq.squeeze(0)

    def _steps(self, x_seq: Tensor) -> LIFOutput:
        v_rest = 0.0 if self.v_reset is None else self.v_reset
        v, whole = self.v, not x_seq.is_floating_point()
        if isinstance(v, Tensor) and v.shape != x_seq.shape[1:]:  # it begins anew, as in SpikingJelly
            v = v_rest
        if not isinstance(v, Tensor):
            v_init = None if v == v_rest and not whole else torch.full_like(x_seq[0], v)
        else:  # since version 2, SpikingJelly keeps it from call to call in the type of its input
            v_init = v.to(x_seq.dtype) if whole and hasattr(self, "materialize_states") else v
        output = self.lif(
            x_seq,
            decay=1 - self._share(),
            input_gain=self.input_terms()[0],
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            v_rest=v_rest,
            v_init=v_init,
            detach_reset=self.detach_reset,
            return_v_seq=self.store_v_seq and self.step_mode == "m",
        )
        self.v = output.v_last
        return output

    def input_terms(self) -> tuple[Tensor | float, Tensor | float]:
        decays = not isinstance(self, neuron.IFNode) and self.decay_input
        return self._share() if decays else 1.0, 0.0

    def _share(self) -> Tensor | float:
        """How much of the potential leaks in a step."""
        if isinstance(self, neuron.IFNode):
            return 0.0
        return self.w.sigmoid() if isinstance(self, neuron.ParametricLIFNode) else 1 / self.tau  # type: ignore[no-any-return]

    def hold_width(self) -> bool:
        function = self.surrogate_function
        kinds = {
            "rectangle": "Rect", "triangle": "PiecewiseQuadratic", "sigmoid": "Sigmoid", "arctan": "ATan", "erf": "Erf",
            "fast_sigmoid": "SoftSign",
        }  # fmt: skip
        if kinds.get(self.settings.spike.surrogate) != type(function).__name__:
            return False
        self.surrogate_function = copy.deepcopy(function)  # by default all layers share it
        self.surrogate_function.alpha = 1 / float(torch.as_tensor(self.width).detach())
        return True


# These normalise as torch.nn's do; in step mode "m" time and batch are apart. ThresholdDependent changes only the first
# weight; before version 2 it joins time and batch twice.
NORMALISATIONS = tuple(
    getattr(layers, f"{kind}BatchNorm{dims}d")
    for kind in ("", "ThresholdDependent")
    for dims in (1, 2, 3)
    if not kind or "forward" not in vars(getattr(layers, f"{kind}BatchNorm{dims}d"))
)

_KNOWN = (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode)


def find(layer: nn.Module) -> Found:
    if type(layer) not in _KNOWN:
        is_neuron = any(base.__module__.startswith(neuron.__name__) for base in type(layer).__mro__)
        return unknown(layer, _KNOWN) if is_neuron or hasattr(layer, "neuronal_charge") else None
    node: Any = layer
    if not getattr(node.surrogate_function, "spiking", True):
        return "its surrogate function does not spike (spiking=False)"
    if getattr(node, "_neuron_precision", None) is not None:
        return "it has a precision of its own"
    return ConvertedNode, node.surrogate_function


def wrapped(module: nn.Module) -> Wrapper | None:
    if type(module) is layers.SeqToANNContainer:
        return Wrapper(list(module._modules), -1, 1)
    if type(module) is layers.MultiStepContainer:
        return Wrapper(list(module._modules), None, None)
    return None


def reset(module: nn.Module) -> None:
    if isinstance(module, base.MemoryModule):
        module.reset()
