"""Norse: `LIFBoxCell`, a step a call.

h = v + dt tau_mem_inv (x + v_leak - v)
spike = h > v_th;  v = v_reset or, with reset_subtract, h - v_th where it spiked; nothing is detached
"""

from __future__ import annotations

from typing import Any

import torch
from norse.torch.functional.reset import reset_subtract, reset_value
from norse.torch.functional.threshold import threshold
from norse.torch.module import coba_lif, leaky_integrator, lif_box, lif_correlation, sequential, snn
from torch import Tensor, nn

from .converted import Converted, Found, Wrapper, number, unknown


class ConvertedLIFBoxCell(Converted):
    """One step a call, with the states of `LIFBoxCell`."""

    time_dim = None

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        p = self.p
        state = self.initial_state(input_tensor) if state is None else state
        gain, bias = self.input_terms()
        v = state.v.to(input_tensor.device)
        output = self.lif(
            input_tensor.unsqueeze(0),
            decay=1 - gain,
            input_gain=gain,
            input_bias=bias,
            v_threshold=p.v_th,
            v_reset=p.v_reset if p.reset_method is reset_value else None,
            v_init=v if v.shape == input_tensor.shape else v.expand(input_tensor.shape),
        )
        return output.s_seq.squeeze(0), type(state)(v=output.v_last)

    def input_terms(self) -> tuple[Tensor | float, Tensor | float]:
        share = number(self.dt * self.p.tau_mem_inv)
        return share, share * number(self.p.v_leak)


_NEURONS = (
    snn.SNN,
    snn.SNNCell,
    snn.SNNRecurrent,
    snn.SNNRecurrentCell,
    coba_lif.CobaLIFCell,
    leaky_integrator.LILinearCell,
    lif_correlation.LIFCorrelation,
)


def find(layer: nn.Module) -> Found:
    if type(layer) is not lif_box.LIFBoxCell:
        return unknown(layer, (lif_box.LIFBoxCell,)) if isinstance(layer, _NEURONS) else None
    p: Any = layer.p
    if p.reset_method not in (reset_value, reset_subtract):
        return "it resets by a function of its own"
    alpha = torch.as_tensor(p.alpha)
    return ConvertedLIFBoxCell, lambda u: threshold(u, p.method, alpha)


def wrapped(module: nn.Module) -> Wrapper | None:
    if type(module) is not sequential.SequentialState or module.return_hidden:
        return None
    return Wrapper(list(module._modules), 0, None)
