"""Batching rules of the operators, for torch.func.vmap, jacrev and ensembles of models.

The mapped dimension becomes a dimension of neurons: one call of an operator computes all samples, and parameters per
sample are parameters per neuron. Samples are computed one by one if one call would change results: with a given
rng_state, because the noise numbers the neurons of each sample from 0, and in batch normalisation, because each sample
has its own statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..layout import channel_dim, to_dense_layout
from ..reference.records import Parameters, Rules

Rule = Callable[..., tuple[Any, Any]]  # takes info, in_dims and the operator's arguments; returns outputs and out_dims


# Arguments of operators that are sequences, and arguments that are states, by name.
_SEQUENCES = "x_seq", "v_seq", "residual", "grad_s_seq", "grad_v_seq", "grad_h_seq"
_STATES = "v_init", "grad_v_last"


def batching_rules(library: Any) -> dict[str, Rule]:
    """Rules by operator name; `library` is a namespace such as torch.ops.asgl_cuda."""
    names = "lif_forward", "lif_backward", "integrator_forward", "integrator_backward"
    return {
        **{name: partial(_batch_in_one_call, getattr(library, name).default) for name in names},
        "recurrent_forward": partial(_batch_one_by_one, library.recurrent_forward.default, time_dim=0),
        "recurrent_backward": partial(_batch_one_by_one, library.recurrent_backward.default, time_dim=0),
        "spike_product": partial(_batch_spike_product, library.spike_product.default),
        "spike_weight_gradient": partial(_batch_one_by_one, library.spike_weight_gradient.default, time_dim=0),
        "batch_norm_coefficients": partial(_batch_one_by_one, library.batch_norm_coefficients.default),
        "batch_norm_backward": partial(
            _batch_one_by_one, partial(_batch_norm_backward_in_layout, library.batch_norm_backward.default)
        ),
    }


def _batch_in_one_call(operator: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Batching rule: one call of the operator for all samples, which become the first dimension of the neurons."""
    names, count = [each.name for each in operator._schema.arguments], info.batch_size
    given, dims = dict(zip(names, arguments, strict=True)), dict(zip(names, in_dims, strict=True))
    rules = Rules(*given["rules"])
    rng_state, rng_dim = given.get("rng_state"), dims.get("rng_state")
    # _draw_under_transforms (calls/noise.py) draws an rng_state of shape [1, 2]. If vmap maps it over the samples, it
    # is 3-D here, and the neurons of all samples are numbered consecutively. With any other rng_state, neurons are
    # numbered from 0 in each sample, so each sample needs a call of its own.
    if rng_state is not None and (rng_dim is None or rng_state.dim() != 3):
        return _batch_one_by_one(operator, info, in_dims, *arguments, time_dim=rules.time_dim)

    def samples_first(value: Any, dim: int | None) -> Any:
        """The value with the dimension of samples first. A value that samples share is expanded."""
        if value is None:
            return None
        return value.expand(count, *value.shape) if dim is None else value.movedim(dim, 0)

    def state_with_samples(value: Any, dim: int | None) -> Any:
        """Initial or last states with the samples first, or after the dimension of several states."""
        value = samples_first(value, dim)
        return value if value is None or len(rules.states()) == 1 else value.movedim(0, 1)

    def parameter_with_samples(value: Any, dim: int | None, apart: bool) -> Any:
        """The parameter, reshaped to broadcast against the sequence; `apart` expands it, for a gradient per sample."""
        if value is None or (dim is None and not apart):
            return value
        sizes = _sample_shape(value, dim)
        after = rules.trailing if len(sizes) == 1 else 0
        before = sequence.dim() - 1 - len(sizes) - after
        return samples_first(value, dim).reshape(count, *(1,) * before, *sizes, *(1,) * after)

    is_backward = "grad_v_seq" in given
    first = "grad_v_seq" if is_backward and "checkpoints" not in given else "x_seq"
    sequence = samples_first(given[first], dims[first]).contiguous()
    neurons = sequence.numel() // max(count * sequence.shape[rules.time_dim + 1], 1)
    parameters = [name for name in Parameters._fields if name in given]
    asked = dict(zip(parameters, given["wanted"][2:], strict=True)) if is_backward else dict.fromkeys(parameters, False)
    taken = {name: samples_first(given[name], dims[name]) for name in _SEQUENCES if name in given} | {first: sequence}
    taken |= {name: state_with_samples(given[name], dims[name]) for name in _STATES if name in given}
    taken |= {
        name: parameter_with_samples(given[name], dims[name], asked[name])
        for name in parameters
        if name not in _SEQUENCES
    }
    taken["rules"] = rules.with_values(time_dim=rules.time_dim + 1)
    if rng_state is not None:
        taken["rng_state"] = rng_state.narrow(rng_dim, 0, 1).squeeze(rng_dim) if count else rng_state.new_zeros((1, 2))
    if "checkpoints" in given:
        kept = samples_first(given["checkpoints"], dims["checkpoints"])
        segments = kept[:, :-2].reshape(count, (kept.shape[1] - 2) // max(neurons, 1), neurons).movedim(1, 0)
        taken["checkpoints"] = torch.cat([segments.flatten(), kept.new_zeros(2)])
    results, wants_state = operator(*{**given, **taken}.values()), False
    if is_backward:
        wants_x_seq, wants_state, *_ = given["wanted"]
        shapes = [
            _sample_shape(given[name], dims[name]) for name in parameters if asked[name] and given[name] is not None
        ]
        before = len(results) - len(shapes)
        results[before:] = [grad.reshape(count, *shape) for grad, shape in zip(results[before:], shapes, strict=True)]
    elif "wanted" in given:
        wants_x_seq, (wants_state, *_, wants_checkpoints) = True, given["wanted"]
        if wants_checkpoints:  # [segments, samples, neurons] and two zeros for all samples
            segments, zeros = results[-1][:-2], results[-1][-2:].expand(count, 2)
            each = segments.reshape(segments.numel() // max(count * neurons, 1), count, neurons).movedim(1, 0)
            results[-1] = torch.cat([each.flatten(1), zeros], 1)
    state_index = int(wants_x_seq) if wants_state and len(rules.states()) > 1 else -1
    return results, [int(index == state_index) for index in range(len(results))]


def _batch_spike_product(operator: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Batching rule of spike_product: one call if only x is mapped, because rows and images are independent."""
    dim, *others = pytree.tree_leaves(in_dims, is_leaf=lambda each: each is None)
    x, weight, *given = arguments
    if dim is None or any(each is not None for each in others):
        return _batch_one_by_one(operator, info, in_dims, *arguments, time_dim=0)
    x = x.movedim(dim, 0)
    if weight.dim() == 2:
        return operator(x, weight, *given), 0
    return operator(x.flatten(0, 1), weight, *given).unflatten(0, x.shape[:2]), 0


def _sample_shape(value: Tensor, dim: int | None) -> list[int]:
    """The shape of one sample of a value that is mapped over dimension `dim`, or over none."""
    return [size for index, size in enumerate(value.shape) if index != dim]


def _batch_one_by_one(
    operator: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any, time_dim: int | None = None
) -> tuple[Any, Any]:
    """Batching rule: one call of the operator per sample. If time_dim is None, it is the operator's last argument."""
    time_dim = arguments[-1] if time_dim is None else time_dim
    values, structure = pytree.tree_flatten(arguments)
    dims = pytree.tree_leaves(in_dims)

    def one_sample(value: Any, dim: int | None, index: int) -> Any:
        """One sample of a value, in a memory layout that kernels accept."""
        if dim is None:
            return value
        if info.batch_size == 0:  # the operator is called once, for the shapes of its results
            return value.new_zeros(_sample_shape(value, dim))
        return to_dense_layout(value.select(dim, index), time_dim)

    def results_of_sample(index: int) -> Any:
        """The results of the operator for one sample."""
        picked = [one_sample(value, dim, index) for value, dim in zip(values, dims, strict=True)]
        return operator(*pytree.tree_unflatten(picked, structure))

    results = [results_of_sample(index) for index in range(max(info.batch_size, 1))]
    outputs = pytree.tree_map(lambda *each: torch.stack(each)[: info.batch_size], *results)
    return outputs, pytree.tree_map(lambda _: 0, outputs)


def _batch_norm_backward_in_layout(
    operator: Any, grad_x_seq: Tensor, grad_residual: Tensor | None, x_seq: Tensor, *others: Any
) -> Any:
    """Calls batch_norm_backward with gradients in the memory layout of x_seq, which the operator requires.

    `_batch_one_by_one` makes each tensor dense on its own, so layouts may differ. The operator overwrites grad_x_seq,
    so its result is copied back. The last argument is time_dim.
    """
    if grad_x_seq.numel() == 0:
        return operator(grad_x_seq, grad_residual, x_seq, *others)
    last = x_seq.dim() - 1
    channel = last if x_seq.is_contiguous() else channel_dim(others[-1])  # otherwise it is channels_last

    def in_layout_of_x(grad: Tensor) -> Tensor:
        """A copy of the gradient in the memory layout of x_seq."""
        return grad.movedim(channel, last).clone(memory_format=torch.contiguous_format).movedim(last, channel)

    grad_in_layout = in_layout_of_x(grad_x_seq)
    result = operator(grad_in_layout, None if grad_residual is None else in_layout_of_x(grad_residual), x_seq, *others)
    grad_x_seq.copy_(grad_in_layout)
    return result
