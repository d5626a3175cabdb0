"""Batching rules of the operators, for torch.func.vmap, jacrev and ensembles of models.

The mapped dimension joins the neurons: one call of an operator computes all samples, and parameters per sample are
parameters per neuron. Samples are computed singly where one call would change results: with a given rng_state, which
counts the neurons of each sample from 0, and in batch normalisation, with statistics per sample.
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
    """Rules by operator name; `library` is a namespace such as torch.ops.asgl_cuda."""
    return {
        "lif_forward": partial(_rule_of_forward, library.lif_forward.default),
        "lif_backward": partial(_rule_of_backward, library.lif_backward.default),
        "integrator_forward": partial(_rule_of_integrator, library.integrator_forward.default),
        "integrator_backward": partial(_rule_of_integrator, library.integrator_backward.default),
        "recurrent_forward": partial(_one_by_one, library.recurrent_forward.default, time_dim=0),
        "recurrent_backward": partial(_one_by_one, library.recurrent_backward.default, time_dim=0),
        "batch_norm_coefficients": partial(_one_by_one, library.batch_norm_coefficients.default),
        "batch_norm_backward": partial(_one_by_one, partial(_write_back, library.batch_norm_backward.default)),
    }


def _rule_of_forward(operator: Operator, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    x_seq, v_init, rng_state, parameters, numbers, rules, wanted = arguments
    x_dim, v_dim, rng_dim, parameter_dims, *_ = in_dims
    rules = Rules(*rules)
    if not _are_numbered_consecutively(rng_state, rng_dim):
        return _one_by_one(operator, info, in_dims, *arguments, time_dim=rules.time_dim)
    samples = _Samples(info.batch_size, x_seq, x_dim, rules.time_dim)
    outputs = operator(
        samples.x_seq, samples.state(v_init, v_dim, rules), _shared_state(rng_state, rng_dim),
        samples.parameters(parameters, parameter_dims), numbers, rules.changed(time_dim=rules.time_dim + 1), wanted,
    )  # fmt: skip
    wants_v_last, *_, wants_checkpoints = wanted
    if wants_checkpoints:
        outputs[-1] = samples.apart(outputs[-1])
    return outputs, _dims_of(outputs, rules, 1 if wants_v_last else None)


def _rule_of_backward(operator: Operator, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    grads, x_seq, v_init, rng_state, checkpoints, parameters, numbers, rules, wanted = arguments
    grad_dims, x_dim, v_dim, rng_dim, checkpoint_dim, parameter_dims, *_ = in_dims
    rules = Rules(*rules)
    if not _are_numbered_consecutively(rng_state, rng_dim):
        return _one_by_one(operator, info, in_dims, *arguments, time_dim=rules.time_dim)
    samples = _Samples(info.batch_size, x_seq, x_dim, rules.time_dim)
    parameter_dims_asked = list(zip(parameters, parameter_dims, wanted[2:], strict=True))
    gradients = operator(
        [
            samples.state(grad, dim, rules) if index == 1 else samples.front(grad, dim)
            for index, (grad, dim) in enumerate(zip(grads, grad_dims, strict=True))
        ],
        samples.x_seq, samples.state(v_init, v_dim, rules), _shared_state(rng_state, rng_dim),
        samples.together(checkpoints, checkpoint_dim),
        samples.parameters(parameters, parameter_dims, wanted[2:]), numbers,
        rules.changed(time_dim=rules.time_dim + 1), wanted,
    )  # fmt: skip
    return _in_own_shapes(gradients, parameter_dims_asked, info), _dims_of(
        gradients, rules, wanted[0] if wanted[1] else None
    )


def _dims_of(results: list[Tensor], rules: Rules, state: int | None) -> list[int]:
    """The dimension of the samples in each result; `state`: the index of one like v_init."""
    return [int(index == state and rules.members() > 1) for index in range(len(results))]


def _rule_of_integrator(operator: Operator, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """For forward, whose last argument is a bool, and backward."""
    sequence, *others, parameters, numbers, rules, delay, wanted = arguments
    dim, *other_dims, parameter_dims, _, _, _, _ = in_dims
    rules = Rules(*rules)
    samples = _Samples(info.batch_size, sequence, dim, rules.time_dim)
    asked = [False] * len(parameters) if isinstance(wanted, bool) else wanted[2:]
    parameter_dims_asked = list(zip(parameters, parameter_dims, asked, strict=True))
    results = operator(
        samples.x_seq, *map(samples.front, others, other_dims),
        samples.parameters(parameters, parameter_dims, asked), numbers, rules.changed(time_dim=rules.time_dim + 1),
        delay, wanted,
    )  # fmt: skip
    return _in_own_shapes(results, parameter_dims_asked, info), [0] * len(results)


def _in_own_shapes(results: list[Tensor], parameter_dims_asked: Any, info: Any) -> list[Tensor]:
    """Results; trailing parameter gradients get the parameters' shapes per sample."""
    shapes = [_shape_of_one(value, dim) for value, dim, asked in parameter_dims_asked if asked and value is not None]
    first = len(results) - len(shapes)
    return results[:first] + [
        grad.reshape(info.batch_size, *shape) for grad, shape in zip(results[first:], shapes, strict=True)
    ]


def _are_numbered_consecutively(rng_state: Tensor | None, dim: int | None) -> bool:
    """Whether neuron indices span samples: without noise, or with noise mapped by `draw_under_transforms`."""
    return rng_state is None or (dim is not None and rng_state.dim() == 3)


def _shared_state(rng_state: Tensor | None, dim: int | None) -> Tensor | None:
    if rng_state is None or dim is None:
        return None
    return rng_state.narrow(dim, 0, 1).squeeze(dim) if rng_state.shape[dim] else rng_state.new_zeros((1, 2))


def _shape_of_one(value: Tensor, dim: int | None) -> list[int]:
    return [size for index, size in enumerate(value.shape) if index != dim]


class _Samples:
    """Tensors of one call for all samples, which are the first dimension."""

    def __init__(self, count: int, x_seq: Tensor, dim: int | None, time_dim: int) -> None:
        self._count = count
        self._dims = len(_shape_of_one(x_seq, dim))
        self.x_seq = self.front(x_seq, dim).contiguous()
        steps = self.x_seq.shape[time_dim + 1]
        self._neurons = self.x_seq.numel() // max(count * steps, 1)

    def front(self, value: Any, dim: int | None) -> Any:
        """The value with the samples first, expanded where shared."""
        if value is None:
            return None
        return value.expand(self._count, *value.shape) if dim is None else value.movedim(dim, 0)

    def state(self, value: Any, dim: int | None, rules: Rules) -> Any:
        """The same for a state, with its members, if several, before the samples."""
        value = self.front(value, dim)
        return value if value is None or rules.members() == 1 else value.movedim(0, 1)

    def parameters(self, values: Any, dims: Any, asked: Any = ()) -> list[Any]:
        """Parameters of an operator; those `asked` for get a gradient per sample. The residual is like x_seq."""
        *apart, _ = [*asked] or [False] * len(values)
        return [self._parameter(*each) for each in zip(values, dims, (*apart, True), strict=True)]

    def _parameter(self, value: Tensor | None, dim: int | None, apart: bool) -> Any:
        """Reshaped to broadcast against x_seq; `apart` expands to every sample."""
        if value is None or (dim is None and not apart):
            return value
        sizes = _shape_of_one(value, dim)
        return self.front(value, dim).reshape(self._count, *(1,) * (self._dims - len(sizes)), *sizes)

    def apart(self, checkpoints: Tensor) -> Tensor:
        """The checkpoints of each sample, from `[segments, samples, neurons]` and 2 zeros, repeated."""
        segments = (checkpoints.numel() - 2) // max(self._count * self._neurons, 1)
        each = checkpoints[:-2].reshape(segments, self._count, self._neurons).movedim(1, 0).flatten(1)
        return torch.cat([each, checkpoints[-2:].expand(self._count, 2)], 1)

    def together(self, checkpoints: Tensor, dim: int | None) -> Tensor:
        """The inverse of `apart`."""
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
        if info.batch_size == 0:  # one call, for the shapes
            return value.new_zeros(_shape_of_one(value, dim))
        value = value.select(dim, index)
        return value if is_dense(value, time_dim) else value.contiguous()

    def sample(index: int) -> Any:
        picked = [pick(value, dim, index) for value, dim in zip(values, dims, strict=True)]
        return operator(*pytree.tree_unflatten(picked, structure))

    results = [sample(index) for index in range(max(info.batch_size, 1))]
    outputs = pytree.tree_map(lambda *each: torch.stack(each)[: info.batch_size], *results)
    return outputs, pytree.tree_map(lambda _: 0, outputs)


def _write_back(
    batch_norm_backward: Operator, grad_x_seq: Tensor, grad_residual: Tensor | None, x_seq: Tensor, *others: Any
) -> Any:
    """The operator for gradients in another memory layout than x_seq."""
    if grad_x_seq.numel() == 0:
        return batch_norm_backward(grad_x_seq, grad_residual, x_seq, *others)
    *_, time_dim = others
    last = x_seq.dim() - 1
    channel = last if x_seq.is_contiguous() else channel_dim(time_dim)  # else channels_last

    def laid_out(grad: Tensor) -> Tensor:
        return grad.movedim(channel, last).clone(memory_format=torch.contiguous_format).movedim(last, channel)

    changed = laid_out(grad_x_seq)
    read = None if grad_residual is None else laid_out(grad_residual)
    result = batch_norm_backward(changed, read, x_seq, *others)
    grad_x_seq.copy_(changed)
    return result
