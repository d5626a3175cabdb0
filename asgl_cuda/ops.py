"""The operators: their schemas, their fake versions for tracing, and the memory of their results.

A backend implements them in a namespace of its own; C++ and CUDA kernels share `torch.ops.asgl_cuda`.

lif_forward and lif_backward take `parameters` in the order of Parameters in reference.py, None where one is a number;
`numbers` and `rules` are its Numbers and Rules. `wanted` says which results there are: in forward, beside s_seq,
v_last, v_seq, h_seq and checkpoints, in backward the gradients of x_seq, v_init and each parameter that is a tensor.
`grads` has the gradients of s_seq, v_last, v_seq and h_seq, None for zero.

integrator_forward returns v_seq, and v_last where it is wanted, integrator_backward as lif_backward. Of parameters,
numbers and rules decay, input_gain, v_rest, logit_decay and time_dim count. Only a gradient of decay needs v_seq and
v_init, and one of input_gain x_seq.

batch_norm_coefficients returns `coefficients`, [4, C, 1, ...], which broadcast against x_seq: input_mean, input_gain
and input_bias of the neuron, and the unbiased variance; and `total`, [C, 3] in float64: number, mean and biased
variance of each channel. They come from mean and variance where these are given, or from `statistics`, the totals of
all processes, [processes, C, 3], or from x_seq.

batch_norm_update replaces a share of the running statistics, and counts the batch.

batch_norm_backward returns the gradients of weight and bias, from sums of this process and of all. A grad_x_seq that is
not empty holds input_gain times the gradient of the normalised input, and is turned into the gradient of x_seq.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batching import batching_rules
from .derivatives import at_autograd
from .layout import channel_dim, checkpoint_elements, empty_state, real_type
from .lazy_values import LAZY_KEYS, on_memory
from .reference import Rules

ForwardResult = list[Tensor]  # s_seq, and v_last, v_seq, h_seq, checkpoints as far as they are wanted
BackwardResult = list[Tensor]  # the gradients of x_seq, v_init and the parameters, as far as they are wanted


def in_their_places(results: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """The results that there are, and None in the place of each that is not wanted."""
    given = iter(results)
    return [next(given) if asked else None for asked in wanted]


def empty_outputs(x_seq: Tensor, time_dim: int, wanted: Sequence[bool]) -> ForwardResult:
    """The results of lif_forward, not yet computed."""
    real = real_type(x_seq.dtype)
    wants_v_last, wants_v_seq, wants_h_seq, wants_checkpoints = wanted
    results = [torch.empty_like(x_seq)]
    if wants_v_last:
        results.append(empty_state(x_seq, time_dim))
    results += (torch.empty_like(x_seq, dtype=real) for asked in (wants_v_seq, wants_h_seq) if asked)
    if wants_checkpoints:
        results.append(x_seq.new_empty(checkpoint_elements(x_seq, time_dim), dtype=real))
    return results


def empty_gradients(
    x_seq: Tensor, time_dim: int, parameters: Sequence[Tensor | None], wanted: Sequence[bool]
) -> BackwardResult:
    """The results of lif_backward, not yet computed."""
    real = real_type(x_seq.dtype)
    wants_x_seq, wants_v_init, *wants_parameters = wanted
    results = [torch.empty_like(x_seq)] if wants_x_seq else []
    if wants_v_init:
        results.append(empty_state(x_seq, time_dim))
    for parameter, asked in zip(parameters, wants_parameters, strict=True):
        if asked and parameter is not None:
            results.append(x_seq.new_empty(parameter.shape, dtype=real))
    return results


def _fake_lif_forward(x_seq: Tensor, *others: Any) -> ForwardResult:
    *_, rules, wanted = others
    return empty_outputs(x_seq, Rules(*rules).time_dim, wanted)


def _fake_lif_backward(grads: Sequence[Tensor | None], x_seq: Tensor, *others: Any) -> BackwardResult:
    *_, parameters, _, rules, wanted = others
    return empty_gradients(x_seq, Rules(*rules).time_dim, parameters, wanted)


def _fake_integrator_forward(x_seq: Tensor, *others: Any) -> ForwardResult:
    *_, rules, _, wants_v_last = others
    return empty_outputs(x_seq, Rules(*rules).time_dim, (wants_v_last, False, False, False))


def _fake_integrator_backward(grad_v_seq: Tensor, *others: Any) -> BackwardResult:
    *_, parameters, _, rules, _, wanted = others
    return empty_gradients(grad_v_seq, Rules(*rules).time_dim, parameters, wanted)


def _fake_batch_norm_coefficients(x_seq: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, time_dim = others
    channel = channel_dim(time_dim)
    channels, *rest = x_seq.shape[channel:]
    coefficients = x_seq.new_empty((4, channels, *(1 for _ in rest)), dtype=real_type(x_seq.dtype))
    return coefficients, x_seq.new_empty((channels, 3), dtype=torch.float64)


def _fake_batch_norm_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, _, _, grad_gain, grad_bias, *_ = arguments
    return grad_gain.new_empty(grad_gain.shape[:1]), grad_bias.new_empty(grad_bias.shape[:1])


_OPERATORS: dict[str, Callable[..., Any]] = {  # schemas and fake versions
    "draw_rng_state(Tensor fresh) -> Tensor": torch.empty_like,
    "lif_forward(Tensor x_seq, Tensor? v_init, Tensor? rng_state, Tensor?[] parameters, float[] numbers, int[] rules, "
    "bool[] wanted) -> Tensor[]": _fake_lif_forward,
    "lif_backward(Tensor?[] grads, Tensor x_seq, Tensor? v_init, Tensor? rng_state, Tensor checkpoints, "
    "Tensor?[] parameters, float[] numbers, int[] rules, bool[] wanted) -> Tensor[]": _fake_lif_backward,
    "integrator_forward(Tensor x_seq, Tensor? v_init, Tensor?[] parameters, float[] numbers, int[] rules, bool delay, "
    "bool wants_v_last) -> Tensor[]": _fake_integrator_forward,
    "integrator_backward(Tensor grad_v_seq, Tensor? grad_v_last, Tensor? v_seq, Tensor? x_seq, Tensor? v_init, "
    "Tensor?[] parameters, float[] numbers, int[] rules, bool delay, bool[] wanted) -> Tensor[]":
        _fake_integrator_backward,
    "batch_norm_coefficients(Tensor x_seq, Tensor? statistics, Tensor? mean, Tensor? variance, Tensor? weight, "
    "Tensor? bias, float eps, float input_scale, int time_dim) -> (Tensor coefficients, Tensor total)":
        _fake_batch_norm_coefficients,
    "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor coefficients, float momentum) -> ()": lambda *arguments: None,
    "batch_norm_backward(Tensor(a!) grad_x_seq, Tensor x_seq, Tensor coefficients, Tensor statistics, "
    "Tensor grad_gain, Tensor grad_bias, Tensor total_grad_gain, Tensor total_grad_bias, float eps, float input_scale, "
    "int time_dim) -> (Tensor grad_weight, Tensor grad_bias)": _fake_batch_norm_backward,
}  # fmt: skip
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library that defines it


def define_operators(namespace: str) -> torch.library.Library:
    """Defines the operators without kernels, with fake versions for torch.compile, derivatives, and rules for vmap.

    Kernels in C++ are checked against the schemas when they are loaded.
    """
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    for schema, fake in _OPERATORS.items():
        name = schema.partition("(")[0]
        tag = torch.Tag.nondeterministic_seeded if name == "draw_rng_state" else torch.Tag.pt2_compliant_tag
        library.define(schema, tags=(tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        operator = getattr(getattr(torch.ops, namespace), name).default
        library.impl(name, at_autograd(operator, name), "Autograd", with_keyset=True)
        for key in LAZY_KEYS:
            library.impl(name, on_memory(operator), key)
    for name, rule in batching_rules(getattr(torch.ops, namespace)).items():
        torch.library.register_vmap(f"{namespace}::{name}", rule, lib=library)
    return library


define_operators("asgl_cuda")
