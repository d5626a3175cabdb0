"""The operators of the leaky integrator, on CUDA kernels as in neuron_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import empty_state
from ..ops import BackwardResult
from ..reference import Parameters
from .neuron_kernels import SCALARS, Call, NeuronKernelOperators, boolean


def integrator_forward_kernel(dtype: torch.dtype, lanes: int) -> str:
    return f"asgl::integrator_forward_kernel<{SCALARS[dtype]}, {lanes}>"


def integrator_backward_kernel(dtype: torch.dtype, lanes: int, learns: bool) -> str:
    """`learns`: decay or input_gain wants a gradient."""
    return f"asgl::integrator_backward_kernel<{SCALARS[dtype]}, {lanes}, {boolean(learns)}>"


class IntegratorOperators(NeuronKernelOperators):
    """The operators of the leaky integrator."""

    def integrator_forward(self, x_seq: Tensor, v_init: Tensor | None, *others: Any) -> list[Tensor]:
        *packed, delay, wants_v_last = others
        call = Call(x_seq, v_init, None, *packed)
        v_seq = torch.empty_like(x_seq)
        v_last = empty_state(x_seq, call.rules.time_dim) if wants_v_last else None
        if call.layout.neurons:
            lanes, tiles = call.cut(self.launcher, call.input(True), v_seq, v_last)
            params = call.params("IntegratorForwardParams", tiles, delay=delay, v_seq=v_seq, last=v_last)
            self.start(x_seq.device, integrator_forward_kernel(x_seq.dtype, lanes), tiles[1], params)
        return [v_seq] if v_last is None else [v_seq, v_last]

    def integrator_backward(self, grad_v_seq: Tensor, *others: Any) -> BackwardResult:
        grad_v_last, v_seq, x_seq, v_init, *packed, delay, wanted = others
        call = Call(grad_v_seq, v_init, None, *packed)
        layout = call.layout
        gradients = grad_x_seq, grad_v_init, *of_parameters = call.empty_gradients(wanted)
        asked = Parameters(*(each is not None for each in of_parameters))
        for given, wants in ((v_seq, asked.decay), (x_seq, asked.input_gain)):
            if wants and (given is None or given.dtype != grad_v_seq.dtype or given.device != grad_v_seq.device):
                raise ValueError(
                    "asgl_cuda: a gradient of decay needs v_seq and one of input_gain x_seq, like grad_v_seq"
                )
        v_seq = layout.dense_sequence(v_seq) if asked.decay else None
        x_seq = layout.dense_sequence(x_seq) if asked.input_gain else None
        grad_v_last = None if grad_v_last is None else layout.dense_state(grad_v_last.to(call.real))
        if layout.neurons:
            lanes, tiles = call.cut(self.launcher, call.input(True), grad_v_last, v_seq, x_seq, grad_x_seq, grad_v_init)
            kernel = integrator_backward_kernel(grad_v_seq.dtype, lanes, asked.decay or asked.input_gain)
            self.start_backward(
                call, kernel, "IntegratorBackwardParams", tiles, gradients, delay=delay, grad_v_seq=grad_v_seq,
                grad_last=grad_v_last, v_seq=v_seq, x_seq=x_seq,
            )  # fmt: skip
        return call.results(gradients)
