"""sinabs: `LIF` and `IAF` with at most one spike a step, and their Squeeze forms; batch first.

h = alpha v + (1 - alpha) x                 alpha = exp(-1 / tau_mem); x itself without norm_input; IAF has alpha = 1
spike = h >= spike_threshold
v = h - subtract_value s                    MembraneSubtract; by default the threshold
  = h (1 - s), where s is detached          MembraneReset to 0
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sinabs import layers
from sinabs.activation import MembraneReset, MembraneSubtract, SingleExponential, SingleSpike
from sinabs.layers.reshape import SqueezeMixin
from torch import Tensor, nn

from .converted import Converted, Found, unknown


class ConvertedLayer(Converted):
    """All steps in one call; `v_mem`, `recordings` and `firing_rate` are kept as sinabs keeps them."""

    v_mem: Tensor
    surrogate_grad_fn: Any

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        return None if isinstance(self, SqueezeMixin) else 1

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
        reset: dict[str, Any] = {"v_reset": None, "reset_amount": self.spike_threshold}
        if isinstance(self.reset_fn, MembraneReset):
            reset = {"v_reset": 0.0, "detach_reset": True}
        elif self.reset_fn.subtract_value is not None:
            reset["reset_amount"] = self.reset_fn.subtract_value
        output = self.lif(
            input_data,
            decay=self.alpha_mem_calculated,
            input_gain=self.input_terms()[0],
            v_threshold=self.spike_threshold,
            v_init=self.v_mem,
            time_dim=1,
            return_v_seq=self.record_states,
            **reset,
        )
        assert output.v_last is not None
        self.v_mem = output.v_last
        self.recordings = {"v_mem": output.v_seq} if self.record_states else {}
        self.firing_rate = output.s_seq.mean()
        return output.s_seq

    def input_terms(self) -> tuple[Tensor | float, Tensor | float]:
        return 1 - self.alpha_mem_calculated if self.norm_input else 1.0, 0.0

    def hold_width(self) -> bool:
        if self.settings.spike.surrogate != "laplace" or not isinstance(self.surrogate_grad_fn, SingleExponential):
            return False
        width = float(torch.as_tensor(self.width).detach()) / float(self.spike_threshold)
        self.surrogate_grad_fn = copy.copy(self.surrogate_grad_fn)  # other layers may share it
        self.surrogate_grad_fn.grad_width = width
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # sinabs makes a new layer of the arguments, which knows nothing of the conversion.
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        state = {**self.__dict__, "_buffers": {name: self.v_mem.detach() for name in self._buffers}}
        for name in ("recordings", "firing_rate"):  # these may be inside a graph
            state.pop(name, None)
        made.__dict__.update(copy.deepcopy(state, memo))
        return made


PARTING = (layers.UnflattenTime,)

_KNOWN = (layers.LIF, layers.LIFSqueeze, layers.IAF, layers.IAFSqueeze)


def find(layer: nn.Module) -> Found:
    if type(layer) not in _KNOWN:
        return unknown(layer, _KNOWN) if isinstance(layer, layers.StatefulLayer) else None
    node: Any = layer
    if node.spike_fn is not SingleSpike:
        name = getattr(node.spike_fn, "__name__", type(node.spike_fn).__name__)
        return f"it may spike several times a step (spike_fn={name}; SingleSpike can be converted)"
    if node.min_v_mem is not None:
        return "it has a least potential (min_v_mem)"
    if node.alpha_syn_calculated is not None:
        return "it has a synaptic current (tau_syn)"
    if type(node.reset_fn) not in (MembraneSubtract, MembraneReset):
        return f"it resets by {type(node.reset_fn).__name__}"
    if isinstance(node.reset_fn, MembraneReset) and node.reset_fn.reset_value != 0:
        return "it resets to a value that is not 0, which sinabs adds to the neurons that did not spike, too"
    if node.spike_threshold.numel() != 1:
        return "its surrogate is as wide as each neuron's own threshold says"
    threshold = node.spike_threshold.detach().double().cpu()
    return ConvertedLayer, lambda u: node.spike_fn.apply(u + threshold, threshold, node.surrogate_grad_fn)


def reset(module: nn.Module) -> None:
    if isinstance(module, layers.StatefulLayer):
        module.reset_states()
