"""The published code of ASGL's authors: `LIFLayer` with a `LIFCell` and an `EfficientNoisySpikeII`.

    h = sigmoid(decay) v + x;  u = h - thresh;  v = h - thresh s, or h (1 - s) + vreset s;  the output is thresh s
    InvRectangle: 1 / width = exp(alpha);  InvSigmoid: 1 / width = alpha;  p is the fraction of analog elements

The code is not a package, so layers are recognised by the names of their classes. asgl_cuda draws its own noise: the
elements that are analog differ from the original's, with the same probability.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..neurons.over_time import placement_advice
from .converted import (
    Conversion,
    Converted,
    Settings,
    Snapshot,
    Streaming,
    bare_class,
    override_reason,
    replaced_method_reason,
)
from .identify import SpikeFunction

_SURROGATES = {"InvRectangle": "rectangle", "InvSigmoid": "sigmoid"}


class ConvertedLIFLayer(Converted):
    """A `LIFLayer`: a call takes all steps. Its width and `analog_prob` are read from the authors' attributes."""

    time_dim = 0

    def begin_conversion(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        """Stores the settings of a conversion. Width and noise stay those of the layer, whatever the arguments say."""
        self.settings = settings
        self._snapshot = Snapshot(self)
        self.log_width = None

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        spike, cell = self.cell.spike_fn, self.cell
        flags = {flag: getattr(cell, flag, False) for flag in ("use_gate", "return_noreset_v")}
        parts = {"cell": cell, "spike_fn": spike, "inv_sg": spike.inv_sg, "spike": getattr(spike, "spike", True)}
        # As `function` is None, the only attributes of the spike function that are compared are those in `parts`. p,
        # alpha and others are read at each call and may change.
        return {"function": None, **parts, **flags}

    @property
    def analog_prob(self) -> float:
        """`p` of the noisy spike; 0 for `EfficientNoisySpike`, which has none."""
        return float(getattr(self.cell.spike_fn, "p", 0.0))

    @analog_prob.setter
    def analog_prob(self, value: float) -> None:
        self.cell.spike_fn.p = value

    def analog_prob_of_call(self, x_seq: Tensor) -> float:
        """The layer's own fraction of analog elements; 0 in evaluation. Unlike in other layers, x_seq is not needed."""
        return self.analog_prob if self.training else 0.0

    @property
    def width(self) -> Tensor | float:
        """The width that follows from the layer's own alpha, by the equations above."""
        alpha = self.cell.spike_fn.inv_sg.alpha
        if self.settings.spike.surrogate == "rectangle":
            return torch.as_tensor(-alpha).exp()
        return 1 / torch.as_tensor(alpha)

    def forward(self, x: Tensor) -> Tensor:
        """The spikes of a sequence `[T, ...]`, which starts at rest."""
        cell = self.cell
        for name in ("reset", "reset2"):  # the name of this method differs between versions of the code
            getattr(cell, name, lambda: None)()
        surrogate = cell.spike_fn.inv_sg
        if surrogate.learnable and not isinstance(surrogate.alpha, nn.Parameter):
            surrogate(torch.zeros_like(x[0]))  # alpha becomes a parameter in the first call
        output = self.lif(
            x if x.shape[0] == self.nb_steps else x[: self.nb_steps],
            decay=torch.as_tensor(cell.decay).sigmoid(),
            v_threshold=cell.thresh,
            v_reset=cell.vreset,
            scale_output=True,
        )
        if getattr(self, "retain_v", False):
            self.vmem = output.v_last
        return output.s_seq


def conversion_of(layer: nn.Module) -> Conversion:
    """How to convert a layer of the authors' code, see `Conversion`."""
    cell: Any = getattr(layer, "cell", None)
    kind = bare_class(layer)
    base = next((each for each in reversed(kind.__mro__) if each.__name__ == "LIFLayer"), None)
    if base is None or type(cell).__name__ != "LIFCell" or not hasattr(cell, "spike_fn"):
        return None
    if reason := override_reason(kind, base):
        return reason
    spike = cell.spike_fn
    if type(spike).__name__ not in ("EfficientNoisySpike", "EfficientNoisySpikeII"):
        return (
            f"its spike function is not EfficientNoisySpike but {getattr(spike, '__qualname__', type(spike).__name__)}"
        )
    if type(spike.inv_sg).__name__ not in _SURROGATES:
        return f"its surrogate is {type(spike.inv_sg).__name__}; convert knows {' and '.join(_SURROGATES)}"
    if not getattr(spike, "spike", True):
        return "it emits smooth values in evaluation (spike=False)"
    for part in (cell, spike, spike.inv_sg):
        if isinstance(part, nn.Module) and (reason := replaced_method_reason(part)):
            return reason
    for flag in ("use_gate", "return_noreset_v"):
        if getattr(cell, flag, False):
            return f"it has {flag}=True"
    return ConvertedLIFLayer, SpikeFunction(_SURROGATES[type(spike.inv_sg).__name__], 1.0, 1.0, False)


def placement_outside_over_time(module: nn.Module) -> str | None:
    """How to use a layer that `OverTime` refuses, see `imported_adapters`; None for other modules."""
    return placement_advice(f"{bare_class(module).__name__}(...)") if streaming_of(module) else None


def streaming_of(module: nn.Module) -> Streaming:
    """Why a layer of this code can't take one time step per call, see `Streaming`; None for other modules."""
    is_one = isinstance(module, ConvertedLIFLayer) or conversion_of(module) is not None
    return "it starts each call at rest" if is_one else None
