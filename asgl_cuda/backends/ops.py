"""The operators: schemas, fake implementations for tracing, and allocation of results.

Each backend has its own namespace; C++ and CUDA kernels share `torch.ops.asgl_cuda`.

Parameters, from width to residual, are tensors, or None for a constant. `numbers` and `rules` are Numbers and Rules of
reference/records.py, as lists: numbers one by one would cost each call 7 us. `wanted` selects the results: in forward
v_last, v_seq, h_seq and checkpoints, which follow s_seq, and in backward the gradients of x_seq, v_init and each
parameter that is a tensor. A gradient of a result is None if it is zero. Several states are one tensor,
`[states, ...]`, in the order of `Rules.states`: v, and for adaptive neurons w.

integrator_forward returns v_seq, the potentials after each step or with `delay` before it, and v_last if wanted.
integrator_backward returns the wanted gradients of x_seq, v_init, decay and input_gain. Both read decay, input_gain,
v_rest, logit_decay and time_dim from numbers and rules. v_seq and v_init are needed for the gradient of decay, x_seq
for the gradient of input_gain.

recurrent_forward takes `parameters`, [9, N]: the parameters of the neuron, from width to input_mean, stored as the
rules say, then bias and syn_decay, which is unused without a synapse. With detach_recurrent no gradient flows through
the weight to earlier spikes. Numbers and rules are those of the neuron. It returns s_seq, and if wanted `emitted` (s in
the type of the arithmetic, before scale_output), h_seq, v_seq, i_seq, w_seq, v_last, s_last and i_last.
recurrent_backward returns the wanted gradients of x_seq (in the type of the arithmetic), weight, parameters, v_init,
s_init and i_init. It needs i_seq for the gradient of syn_decay, and w_seq, w before each step, for the gradient of
adapt_decay and if w does not act on the current.

spike_product, on the CPU alone, is torch's linear, conv1d or conv2d, for a weight of 2, 3 or 4 dimensions, as a sum
over the elements of x that are not zero. `panels` is a copy of the weight in the kernel's order, or None.
spike_weight_gradient is the gradient of a weight with the sizes `weight_sizes`. `packed` is a copy of x with
one bit per element and the non-zero values, unless all are 1, in the kernel's order, or None. If it is given, the
elements of x are not read.

batch_norm_coefficients returns `coefficients`, [4, C, 1, ...], which broadcast against x_seq: input_mean, input_gain
and input_bias of the neuron, and the unbiased variance; and `total`, [C, 3] in float64: count, mean and biased
variance of each channel. They follow from `statistics`, the totals of all processes, [processes, C, 3], or from mean
and variance, or if neither is given from x_seq.

batch_norm_update does the same, replaces a fraction of the running statistics, and counts the batch. Compiled graphs
have batch_norm_coefficients, which changes nothing.

batch_norm_backward returns the gradients of weight and bias, from sums of this process and of all. A non-empty
grad_x_seq holds input_gain times the gradient of the input current, and is overwritten by the gradient of x_seq. With
grad_residual, the gradient of the input current itself, it is only written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._prims_common import suggest_memory_format

from ..layout import channel_dim, checkpoint_elements, empty_state, real_type, state_shape
from ..reference.records import Parameters, Rules
from .batching import batching_rules
from .derivatives import autograd_kernel, tensors_in

ForwardResult = list[Tensor]  # s_seq, then v_last, v_seq, h_seq and checkpoints, if wanted
BackwardResult = list[Tensor]  # gradients of x_seq, v_init and the parameters, if wanted


def none_for_unwanted(results: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """The results by position, with None for each one that is not wanted."""
    given = iter(results)
    return [next(given) if asked else None for asked in wanted]


def empty_outputs(x_seq: Tensor, time_dim: int, wanted: Sequence[bool], states: int = 1) -> ForwardResult:
    """Uninitialised results of lif_forward."""
    real = real_type(x_seq.dtype)
    wants_v_last, wants_v_seq, wants_h_seq, wants_checkpoints = wanted
    results = [torch.empty_like(x_seq)]
    if wants_v_last:
        results.append(empty_state(x_seq, time_dim, states))
    results += (torch.empty_like(x_seq, dtype=real) for asked in (wants_v_seq, wants_h_seq) if asked)
    if wants_checkpoints:
        results.append(x_seq.new_empty(checkpoint_elements(x_seq, time_dim, states), dtype=real))
    return results


def empty_gradients(
    x_seq: Tensor, time_dim: int, parameters: Sequence[Tensor | None], wanted: Sequence[bool], states: int = 1
) -> BackwardResult:
    """Uninitialised gradients of x_seq, the initial state and parameters."""
    real = real_type(x_seq.dtype)
    wants_x_seq, wants_v_init, *wants_parameters = wanted
    results = [torch.empty_like(x_seq)] if wants_x_seq else []
    if wants_v_init:
        results.append(empty_state(x_seq, time_dim, states))
    for parameter, asked in zip(parameters, wants_parameters, strict=True):
        if asked and parameter is not None:
            results.append(x_seq.new_empty(parameter.shape, dtype=real))
    return results


def _with_device_check(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake` with a check of devices. Torch calls it even if only one of several tensors is on the device meta."""

    def checked(*arguments: Any) -> Any:
        """The results of `fake`, after a check that all tensors are on one device."""
        devices = list(dict.fromkeys(str(each.device) for each in tensors_in(arguments)))
        if len(devices) > 1:
            raise ValueError(f"asgl_cuda.{name}: all tensors must be on one device, got {' and '.join(devices)}")
        return fake(*arguments)

    return checked


def _fake_draw_rng_state(fresh: Tensor) -> Tensor:
    """An rng_state without values; refuses compilers that would draw it again in backward."""
    # With a budget below 1, backward would draw noise again, and get other noise than forward.
    if torch.is_grad_enabled() and functorch_config.activation_memory_budget < 1:
        raise RuntimeError(
            "asgl_cuda: torch._functorch.config.activation_memory_budget must be 1 if neurons draw noise, got "
            f"{functorch_config.activation_memory_budget}; with less, backward would draw other noise than forward. To "
            "save memory, use asgl_cuda.recompute_spikes, which also works in compiled models"
        )
    return torch.empty_like(fresh)


def _fake_lif_forward(x_seq: Tensor, *others: Any) -> ForwardResult:
    """Uninitialised results of lif_forward."""
    *_, rules, wanted = others
    rules = Rules(*rules)
    return empty_outputs(x_seq, rules.time_dim, wanted, len(rules.states()))


def _fake_lif_backward(*arguments: Any) -> BackwardResult:
    """Uninitialised results of lif_backward: the wanted gradients."""
    _, _, _, _, x_seq, _, _, _, *parameters, residual, _, rules, (*wanted, wants_residual) = arguments
    rules = Rules(*rules)
    results = empty_gradients(x_seq, rules.time_dim, parameters, wanted, len(rules.states()))
    return [*results, torch.empty_like(x_seq)] if wants_residual and residual is not None else results


def _fake_integrator_forward(x_seq: Tensor, *others: Any) -> ForwardResult:
    """Uninitialised results of integrator_forward."""
    *_, rules, _, wants_v_last = others
    return empty_outputs(x_seq, Rules(*rules).time_dim, (wants_v_last, False, False, False))


def _fake_integrator_backward(grad_v_seq: Tensor, *others: Any) -> BackwardResult:
    """Uninitialised results of integrator_backward: the wanted gradients."""
    *_, decay, input_gain, _, rules, _, wanted = others
    return empty_gradients(grad_v_seq, Rules(*rules).time_dim, (decay, input_gain), wanted)


def _state_shapes(x_seq: Tensor, rules: Rules) -> list[list[int]]:
    """The shapes of the states v, s and i of recurrent neurons."""
    state = state_shape(x_seq, rules.time_dim)
    count = len(rules.states())
    return [[count, *state] if count > 1 else state, state, state]


def _fake_recurrent_forward(x_seq: Tensor, weight: Tensor, *others: Any) -> ForwardResult:
    """Uninitialised results of recurrent_forward."""
    *_, rules, _, _, wanted = others
    states = _state_shapes(x_seq, Rules(*rules))
    shapes = [x_seq.shape] * 5 + states
    return [x_seq.new_empty(x_seq.shape)] + [
        weight.new_empty(shape) for shape, asked in zip(shapes, wanted, strict=True) if asked
    ]


def _fake_recurrent_backward(*arguments: Any) -> BackwardResult:
    """Uninitialised results of recurrent_backward: the wanted gradients."""
    *_, h_seq, _, _, _, weight, parameters, _, _, _, _, _, rules, _, _, wanted = arguments
    shapes = [h_seq.shape, weight.shape, parameters.shape, *_state_shapes(h_seq, Rules(*rules))]
    return [h_seq.new_empty(shape) for shape, asked in zip(shapes, wanted, strict=True) if asked]


def _empty_in_memory_format_of(like: Sequence[Tensor], sizes: Sequence[Any]) -> Tensor:
    """An uninitialised tensor, channels_last if one of the tensors in `like` is, as in torch's convolutions."""
    formats = [suggest_memory_format(each) for each in like if each.dim() == 4]
    last = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    return torch.empty(sizes, dtype=like[0].dtype, device=like[0].device, memory_format=last)


def _fake_spike_product(
    x: Tensor, weight: Tensor, bias: Any, panels: Any, stride: Sequence[int], padding: Sequence[int], packed: Any
) -> Tensor:
    """An uninitialised result of spike_product, in the memory format of the operator's."""
    if weight.dim() == 2:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    windows = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    sizes = [(size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in windows]
    return _empty_in_memory_format_of((x, weight), (x.shape[0], weight.shape[0], *sizes))


def _fake_spike_weight_gradient(grad: Tensor, x: Tensor, weight_sizes: Sequence[int], *others: Any) -> Tensor:
    """An uninitialised result of spike_weight_gradient."""
    _, _, channels_last, _ = others
    return torch.empty(
        weight_sizes, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if channels_last and len(weight_sizes) == 4 else torch.contiguous_format,
    )  # fmt: skip


def _fake_batch_norm_coefficients(x_seq: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised results of batch_norm_coefficients."""
    *_, time_dim = others
    channel = channel_dim(time_dim)
    channels, *rest = x_seq.shape[channel:]
    coefficients = x_seq.new_empty((4, channels, *(1 for _ in rest)), dtype=real_type(x_seq.dtype))
    return coefficients, x_seq.new_empty((channels, 3), dtype=torch.float64)


def _fake_batch_norm_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised results of batch_norm_backward: gradients of the normalisation's weight and bias."""
    _, _, _, _, _, grad_gain, grad_bias, *_ = arguments
    return grad_gain.new_empty(grad_gain.shape[:1]), grad_bias.new_empty(grad_bias.shape[:1])


# Parts of schemas.
_PARAMETERS = ", ".join(f"Tensor? {name}" for name in Parameters._fields)
_CONSTANTS = "float[] numbers, int[] rules"
_COEFFICIENTS = (
    "Tensor x_seq, Tensor? statistics, Tensor? mean, Tensor? variance, Tensor? weight, Tensor? bias, float eps, "
    "float input_scale, int time_dim) -> (Tensor coefficients, Tensor total)"
)
_OPERATORS: dict[str, Callable[..., Any]] = {  # schemas and fake implementations
    "draw_rng_state(Tensor fresh) -> Tensor": _fake_draw_rng_state,
    f"lif_forward(Tensor x_seq, Tensor? v_init, Tensor? rng_state, {_PARAMETERS}, {_CONSTANTS}, bool[] wanted) -> "
    "Tensor[]":
        _fake_lif_forward,
    "lif_backward(Tensor? grad_s_seq, Tensor? grad_v_last, Tensor? grad_v_seq, Tensor? grad_h_seq, Tensor x_seq, "
    f"Tensor? v_init, Tensor? rng_state, Tensor checkpoints, {_PARAMETERS}, {_CONSTANTS}, bool[] wanted) -> Tensor[]":
        _fake_lif_backward,
    f"integrator_forward(Tensor x_seq, Tensor? v_init, Tensor? decay, Tensor? input_gain, {_CONSTANTS}, bool delay, "
    "bool wants_v_last) -> Tensor[]":
        _fake_integrator_forward,
    "integrator_backward(Tensor grad_v_seq, Tensor? grad_v_last, Tensor? v_seq, Tensor? x_seq, Tensor? v_init, "
    f"Tensor? decay, Tensor? input_gain, {_CONSTANTS}, bool delay, bool[] wanted) -> Tensor[]":
        _fake_integrator_backward,
    "recurrent_forward(Tensor x_seq, Tensor weight, Tensor parameters, Tensor? v_init, Tensor? s_init, Tensor? i_init, "
    f"Tensor? rng_state, {_CONSTANTS}, bool has_synapse, bool detach_recurrent, bool[] wanted) -> Tensor[]":
        _fake_recurrent_forward,
    "recurrent_backward(Tensor? grad_s_seq, Tensor? grad_v_seq, Tensor? grad_h_seq, Tensor? grad_v_last, "
    "Tensor? grad_s_last, Tensor? grad_i_last, Tensor h_seq, Tensor emitted, Tensor? i_seq, "
    "Tensor? w_seq, Tensor weight, Tensor parameters, Tensor? v_init, Tensor? s_init, Tensor? i_init, "
    f"Tensor? rng_state, {_CONSTANTS}, bool has_synapse, bool detach_recurrent, bool[] wanted) -> Tensor[]":
        _fake_recurrent_backward,
    "spike_product(Tensor x, Tensor weight, Tensor? bias, Tensor? panels, int[] stride, int[] padding, "
    "Tensor? packed) -> Tensor":
        _fake_spike_product,
    "spike_weight_gradient(Tensor grad, Tensor x, int[] weight_sizes, int[] stride, int[] padding, "
    "bool channels_last, Tensor? packed) -> Tensor":
        _fake_spike_weight_gradient,
    f"batch_norm_coefficients({_COEFFICIENTS}": _fake_batch_norm_coefficients,
    "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
    f"float momentum, {_COEFFICIENTS}": lambda *arguments: _fake_batch_norm_coefficients(*arguments[4:]),
    "batch_norm_backward(Tensor(a!) grad_x_seq, Tensor? grad_residual, Tensor x_seq, Tensor coefficients, "
    "Tensor statistics, Tensor grad_gain, Tensor grad_bias, Tensor total_grad_gain, Tensor total_grad_bias, float eps, "
    "float input_scale, int time_dim) -> (Tensor grad_weight, Tensor grad_bias)":
        _fake_batch_norm_backward,
}  # fmt: skip
_libraries: list[torch.library.Library] = []  # operators exist as long as their library


def define_operators(namespace: str) -> torch.library.Library:
    """Defines the operators: schemas, fake implementations, derivatives and batching rules, without kernels.

    Kernels in C++ are checked against the schemas at load time.
    """
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    for schema, fake in _OPERATORS.items():
        name = schema.partition("(")[0]
        tag = torch.Tag.nondeterministic_seeded if name == "draw_rng_state" else torch.Tag.pt2_compliant_tag
        library.define(schema, tags=(tag,))
        torch.library.register_fake(f"{namespace}::{name}", _with_device_check(name, fake), lib=library)
        operator = getattr(getattr(torch.ops, namespace), name).default
        library.impl(name, autograd_kernel(operator, name), "Autograd", with_keyset=True)
    for name, rule in batching_rules(getattr(torch.ops, namespace)).items():
        torch.library.register_vmap(f"{namespace}::{name}", rule, lib=library)
    return library


define_operators("asgl_cuda")
