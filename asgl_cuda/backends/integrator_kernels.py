"""The operators of the leaky integrator, on CUDA kernels as in neuron_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import BackwardResult, ForwardResult, empty_outputs, with_gaps
from ..reference import Parameters
from .neuron_kernels import SCALARS, Call, NeuronKernelOperators, check_type
from .structures import constant


def integrator_kernel(dtype: torch.dtype, lanes: int, direction: str) -> str:
    """`direction`: an enumerator of csrc's Pass."""
    return f"asgl::integrator_kernel<{SCALARS[dtype]}, {lanes}, (asgl::Pass){constant(f'Pass::{direction}')}>"


class IntegratorOperators(NeuronKernelOperators):
    """The operators of the leaky integrator."""

    def integrator_forward(self, x_seq: Tensor, v_init: Tensor | None, *others: Any) -> ForwardResult:
        *packed, delay, wants_v_last = others
        call = Call(x_seq, v_init, None, *packed)
        outputs = empty_outputs(x_seq, call.rules.time_dim, (wants_v_last, False, False, False))
        if call.layout.neurons:
            v_seq, v_last = with_gaps(outputs, (True, wants_v_last))
            lanes, tiles = call.plan_tiles(self.launcher, call.input(True), *outputs)
            params = call.params("IntegratorParams", tiles, delay=delay, v_seq=v_seq, v_last=v_last)
            self.start(x_seq.device, integrator_kernel(x_seq.dtype, lanes, "kForward"), tiles[1], params)
        return outputs

    def integrator_backward(self, grad_v_seq: Tensor, *others: Any) -> BackwardResult:
        grad_v_last, *sequences, v_init, parameters, numbers, rules, delay, wanted = others
        call = Call(grad_v_seq, v_init, None, parameters, numbers, rules)
        asked = Parameters(*wanted[2:])
        for index, wants in enumerate((asked.decay, asked.input_gain)):
            given = sequences[index]
            if wants and given is None:
                raise ValueError(
                    "asgl_cuda: a gradient of decay needs v_seq and one of input_gain x_seq, like grad_v_seq"
                )
            check_type(given, grad_v_seq.dtype, grad_v_seq, "v_seq and x_seq")
            dense = None if given is None else call.layout.dense_sequence(given)
            sequences[index] = dense if wants else None
        v_seq, x_seq = sequences
        check_type(grad_v_last, call.real, grad_v_seq, "grad_v_last")
        grad_v_last = None if grad_v_last is None else call.layout.dense_state(grad_v_last)
        gradients = call.empty_gradients(wanted)
        if call.layout.neurons:
            lanes, tiles = call.plan_tiles(self.launcher, call.input(True), grad_v_last, *sequences, *gradients[:2])
            kernel = integrator_kernel(
                grad_v_seq.dtype, lanes, "kSums" if asked.decay or asked.input_gain else "kBackward"
            )
            self.start_backward(
                call, kernel, "IntegratorParams", tiles, gradients, delay=delay, grad_v_seq=grad_v_seq,
                grad_v_last=grad_v_last, v_seq=v_seq, x_seq=x_seq,
            )  # fmt: skip
        return call.results(gradients)
