"""The operators under vmap: the batching rules by which torch.func.vmap, jacrev and ensembles of models compute.

The mapped dimension joins the neurons: one call of an operator computes all samples, and parameters that differ from
sample to sample are parameters that differ from neuron to neuron. Where that would change a value the samples are
computed one by one: under noise whose rng_state was given, which numbers the neurons of each sample from 0, and in
batch normalisation, whose statistics are of each sample alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .layout import channel_dim, is_dense
from .reference import Rules

Operator = Callable[..., Any]
Rule = Callable[..., tuple[Any, Any]]  # takes info, in_dims and the operator's arguments; returns outputs and out_dims


def batching_rules(library: Any) -> dict[str, Rule]:
    """The rules by the names of the operators in `library`, such as torch.ops.asgl_cuda."""
    return {
        "lif_forward": partial(_rule_of_forward, library.lif_forward.default),
        "lif_backward": partial(_rule_of_backward, library.lif_backward.default),
        "integrator_forward": partial(_rule_of_integrator, library.integrator_forward.default),
        "integrator_backward": partial(_rule_of_integrator, library.integrator_backward.default),
        "batch_norm_coefficients": partial(_one_by_one, library.batch_norm_coefficients.default),
        "batch_norm_backward": partial(_one_by_one, partial(_write_back, library.batch_norm_backward.default)),
    }


def _rule_of_forward(operator: Operator, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    x_seq, v_init, rng_state, parameters, numbers, rules, wanted = arguments
    x_dim, v_dim, rng_dim, parameter_dims, *_ = in_dims
    rules = Rules(*rules)
    if not _are_numbered_in_one_row(rng_state, rng_dim):
        return _one_by_one(operator, info, in_dims, *arguments, time_dim=rules.time_dim)
    samples = _Samples(info.batch_size, x_seq, x_dim, rules.time_dim)
    outputs = operator(
        samples.x_seq, samples.front(v_init, v_dim), _of_all_samples(rng_state, rng_dim),
        [samples.parameter(value, dim) for value, dim in zip(parameters, parameter_dims, strict=True)],
        numbers, rules._replace(time_dim=rules.time_dim + 1), wanted,
    )  # fmt: skip
    *_, wants_checkpoints = wanted
    if wants_checkpoints:
        outputs[-1] = samples.apart(outputs[-1])
    return outputs, [0] * len(outputs)


def _rule_of_backward(operator: Operator, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    grads, x_seq, v_init, rng_state, checkpoints, parameters, numbers, rules, wanted = arguments
    grad_dims, x_dim, v_dim, rng_dim, checkpoint_dim, parameter_dims, *_ = in_dims
    rules = Rules(*rules)
    if not _are_numbered_in_one_row(rng_state, rng_dim):
        return _one_by_one(operator, info, in_dims, *arguments, time_dim=rules.time_dim)
    samples = _Samples(info.batch_size, x_seq, x_dim, rules.time_dim)
    of_parameters = list(zip(parameters, parameter_dims, wanted[2:], strict=True))
    gradients = operator(
        [samples.front(grad, dim) for grad, dim in zip(grads, grad_dims, strict=True)],
        samples.x_seq, samples.front(v_init, v_dim), _of_all_samples(rng_state, rng_dim),
        samples.together(checkpoints, checkpoint_dim),
        [samples.parameter(value, dim, apart=asked) for value, dim, asked in of_parameters],
        numbers, rules._replace(time_dim=rules.time_dim + 1), wanted,
    )  # fmt: skip
    return _in_own_shapes(gradients, of_parameters, info), [0] * len(gradients)


def _rule_of_integrator(operator: Operator, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """For both operators, whose last argument is a bool in forward."""
    sequence, *others, parameters, numbers, rules, delay, wanted = arguments
    dim, *other_dims, parameter_dims, _, _, _, _ = in_dims
    rules = Rules(*rules)
    samples = _Samples(info.batch_size, sequence, dim, rules.time_dim)
    asked = [False] * len(parameters) if isinstance(wanted, bool) else wanted[2:]
    of_parameters = list(zip(parameters, parameter_dims, asked, strict=True))
    results = operator(
        samples.x_seq, *map(samples.front, others, other_dims),
        [samples.parameter(value, dim, apart=wants) for value, dim, wants in of_parameters],
        numbers, rules._replace(time_dim=rules.time_dim + 1), delay, wanted,
    )  # fmt: skip
    return _in_own_shapes(results, of_parameters, info), [0] * len(results)


def _in_own_shapes(results: list[Tensor], of_parameters: Any, info: Any) -> list[Tensor]:
    """Gradients, the last ones of parameters, which get the shape that they have for each sample."""
    shapes = [_shape_of_one(value, dim) for value, dim, asked in of_parameters if asked and value is not None]
    first = len(results) - len(shapes)
    return results[:first] + [
        grad.reshape(info.batch_size, *shape) for grad, shape in zip(results[first:], shapes, strict=True)
    ]


def _are_numbered_in_one_row(rng_state: Tensor | None, dim: int | None) -> bool:
    """Whether the neurons of all samples are: without noise, or with noise that `draw_under_transforms` has mapped."""
    return rng_state is None or (dim is not None and rng_state.dim() == 3)


def _of_all_samples(rng_state: Tensor | None, dim: int | None) -> Tensor | None:
    if rng_state is None or dim is None:
        return None
    return rng_state.narrow(dim, 0, 1).squeeze(dim) if rng_state.shape[dim] else rng_state.new_zeros((1, 2))


def _shape_of_one(value: Tensor, dim: int | None) -> list[int]:
    return [size for place, size in enumerate(value.shape) if place != dim]


class _Samples:
    """The tensors of one call for all samples, which are the first dimension of each."""

    def __init__(self, count: int, x_seq: Tensor, dim: int | None, time_dim: int) -> None:
        self._count = count
        self._dims = len(_shape_of_one(x_seq, dim))
        self.x_seq = self.front(x_seq, dim).contiguous()
        steps = self.x_seq.shape[time_dim + 1]
        self._neurons = self.x_seq.numel() // max(count * steps, 1)

    def front(self, value: Any, dim: int | None) -> Any:
        """The value with the samples first, also where they share it."""
        if value is None:
            return None
        return value.expand(self._count, *value.shape) if dim is None else value.movedim(dim, 0)

    def parameter(self, value: Tensor | None, dim: int | None, apart: bool = False) -> Any:
        """Reshaped to broadcast against x_seq; with `apart` each sample gets a gradient, also where they share it."""
        if value is None or (dim is None and not apart):
            return value
        sizes = _shape_of_one(value, dim)
        return self.front(value, dim).reshape(self._count, *(1,) * (self._dims - len(sizes)), *sizes)

    def apart(self, checkpoints: Tensor) -> Tensor:
        """The checkpoints of each sample, from `[segments, samples, neurons]`; the two zeros behind go to each."""
        segments = (checkpoints.numel() - 2) // max(self._count * self._neurons, 1)
        each = checkpoints[:-2].reshape(segments, self._count, self._neurons).movedim(1, 0).flatten(1)
        return torch.cat([each, checkpoints[-2:].expand(self._count, 2)], 1)

    def together(self, checkpoints: Tensor, dim: int | None) -> Tensor:
        """The checkpoints that `apart` was given."""
        each = self.front(checkpoints, dim)
        segments = (each.shape[1] - 2) // max(self._neurons, 1)
        kept = each[:, :-2].reshape(self._count, segments, self._neurons).movedim(1, 0)
        return torch.cat([kept.flatten(), each.new_zeros(2)])


def _one_by_one(
    operator: Operator, info: Any, in_dims: tuple[Any, ...], *arguments: Any, time_dim: int | None = None
) -> tuple[Any, Any]:
    """A call for each sample. The operators of batch normalisation have time_dim as their last argument."""
    *_, last = arguments
    time_dim = last if time_dim is None else time_dim
    values, structure = pytree.tree_flatten(arguments)
    dims = pytree.tree_leaves(in_dims)

    def pick(value: Any, dim: int | None, index: int) -> Any:
        if dim is None:
            return value
        if info.batch_size == 0:  # one call that tells the shapes
            return value.new_zeros(_shape_of_one(value, dim))
        value = value.select(dim, index)
        return value if is_dense(value, time_dim) else value.contiguous()

    def sample(index: int) -> Any:
        picked = [pick(value, dim, index) for value, dim in zip(values, dims, strict=True)]
        return operator(*pytree.tree_unflatten(picked, structure))

    results = [sample(index) for index in range(max(info.batch_size, 1))]
    outputs = pytree.tree_map(lambda *each: torch.stack(each)[: info.batch_size], *results)
    return outputs, pytree.tree_map(lambda _: 0, outputs)


def _write_back(batch_norm_backward: Operator, grad_x_seq: Tensor, x_seq: Tensor, *others: Any) -> Any:
    """The same operator for a grad_x_seq that does not lie in memory as x_seq does."""
    if grad_x_seq.numel() == 0:
        return batch_norm_backward(grad_x_seq, x_seq, *others)
    *_, time_dim = others
    last = x_seq.dim() - 1
    channel = last if x_seq.is_contiguous() else channel_dim(time_dim)  # else channels_last
    changed = grad_x_seq.movedim(channel, last).clone(memory_format=torch.contiguous_format).movedim(last, channel)
    result = batch_norm_backward(changed, x_seq, *others)
    grad_x_seq.copy_(changed)
    return result
