"""The operators under vmap: batching rules, by which torch.func.vmap, jacrev and ensembles of models compute.

The mapped dimension joins the neurons: one call of an operator computes all samples, and parameters that differ from
sample to sample are parameters that differ from neuron to neuron. Where that would change a value the samples are
computed one by one: under noise whose rng_state was given, which numbers the neurons of each sample from 0, and in
batch normalisation, whose statistics are of each sample alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .reference import channel_dim, is_channels_last

Rule = Callable[..., tuple[Any, Any]]  # of info, in_dims and the operator's arguments; returns outputs and out_dims


def batching_rules(library: Any) -> dict[str, Rule]:
    """By the names of the operators in `library`, such as torch.ops.asgl_cuda."""
    return {
        "lif_forward": _rule_of_forward(library.lif_forward.default),
        "lif_backward": _rule_of_backward(library.lif_backward.default),
        "batch_norm_coefficients": _one_by_one(library.batch_norm_coefficients.default, -1),
        "batch_norm_backward": _one_by_one(_writing_back(library.batch_norm_backward.default), -1),
    }


def _rule_of_forward(operator: Callable[..., Any]) -> Rule:
    one_by_one = _one_by_one(operator, -5)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        (x_seq, v_init, rng_state, parameters, *middle, time_dim), wanted = arguments[:-4], arguments[-4:]
        if not _are_numbered_in_one_row(rng_state, in_dims[2]):
            return one_by_one(info, in_dims, *arguments)
        samples = _Samples(info.batch_size, x_seq, in_dims[0], time_dim)
        rng_state = _of_all_samples(rng_state, in_dims[2])
        *outputs, checkpoints = operator(
            samples.x_seq, samples.front(v_init, in_dims[1]), rng_state,
            [samples.parameter(value, dim) for value, dim in zip(parameters, in_dims[3], strict=True)],
            *middle, time_dim + 1, *wanted,
        )  # fmt: skip
        if wanted[-1]:
            checkpoints = samples.apart(checkpoints)
        return (*outputs, checkpoints), tuple(0 if each else None for each in (True, *wanted))

    return rule


def _rule_of_backward(operator: Callable[..., Any]) -> Rule:
    one_by_one = _one_by_one(operator, -4)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        grads, (x_seq, v_init, rng_state, checkpoints, parameters, *middle, time_dim) = arguments[:4], arguments[4:-3]
        needs_x_seq, needs_v_init, needs_parameters = needs = arguments[-3:]
        if not _are_numbered_in_one_row(rng_state, in_dims[6]):
            return one_by_one(info, in_dims, *arguments)
        samples = _Samples(info.batch_size, x_seq, in_dims[4], time_dim)
        rng_state = _of_all_samples(rng_state, in_dims[6])
        of_parameters = list(zip(parameters, in_dims[8], needs_parameters, strict=True))
        grad_x_seq, grad_v_init, grad_parameters = operator(
            *(samples.front(grad, dim) for grad, dim in zip(grads, in_dims[:4], strict=True)),
            samples.x_seq, samples.front(v_init, in_dims[5]), rng_state, samples.together(checkpoints, in_dims[7]),
            [samples.parameter(value, dim, apart=needed) for value, dim, needed in of_parameters],
            *middle, time_dim + 1, *needs,
        )  # fmt: skip
        grad_parameters = [
            grad.reshape(info.batch_size, *_shape_of_one(value, dim)) if needed else grad
            for grad, (value, dim, needed) in zip(grad_parameters, of_parameters, strict=True)
        ]
        x_dim, v_dim, *dims = (0 if needed else None for needed in (needs_x_seq, needs_v_init, *needs_parameters))
        return (grad_x_seq, grad_v_init, grad_parameters), (x_dim, v_dim, dims)

    return rule


def _are_numbered_in_one_row(rng_state: Tensor | None, dim: int | None) -> bool:
    """Whether the neurons of all samples are: without noise, or with that which `draw_under_transforms` has mapped."""
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
        """With the samples first, also where they share it."""
        if value is None:
            return None
        return value.expand(self._count, *value.shape) if dim is None else value.movedim(dim, 0)

    def parameter(self, value: Tensor | None, dim: int | None, apart: bool = False) -> Any:
        """Such that it broadcasts against x_seq; `apart`: with a gradient for each sample, also where they share it."""
        if value is None or (dim is None and not apart):
            return value
        sizes = _shape_of_one(value, dim)
        return self.front(value, dim).reshape(self._count, *(1,) * (self._dims - len(sizes)), *sizes)

    def apart(self, checkpoints: Tensor) -> Tensor:
        """Those of each sample, from `[segments, samples, neurons]`; the two zeros behind go to each."""
        segments = (checkpoints.numel() - 2) // max(self._count * self._neurons, 1)
        each = checkpoints[:-2].reshape(segments, self._count, self._neurons).movedim(1, 0).flatten(1)
        return torch.cat([each, checkpoints[-2:].expand(self._count, 2)], 1)

    def together(self, checkpoints: Tensor, dim: int | None) -> Tensor:
        """What `apart` was given."""
        each = self.front(checkpoints, dim)
        segments = (each.shape[1] - 2) // max(self._neurons, 1)
        kept = each[:, :-2].reshape(self._count, segments, self._neurons).movedim(1, 0)
        return torch.cat([kept.flatten(), each.new_zeros(2)])


def _one_by_one(operator: Callable[..., Any], place: int) -> Rule:
    """A call for each sample; `place` is that of time_dim among the arguments."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        values, structure = pytree.tree_flatten(arguments)
        dims = pytree.tree_leaves(in_dims)

        def pick(value: Any, dim: int | None, index: int) -> Any:
            if dim is None:
                return value
            if info.batch_size == 0:  # one that tells the shapes
                return value.new_zeros(_shape_of_one(value, dim))
            return _dense(value.select(dim, index), arguments[place])

        def sample(index: int) -> Any:
            picked = [pick(value, dim, index) for value, dim in zip(values, dims, strict=True)]
            return operator(*pytree.tree_unflatten(picked, structure))

        results = [sample(index) for index in range(max(info.batch_size, 1))]
        outputs = pytree.tree_map(lambda *each: torch.stack(each)[: info.batch_size], *results)
        return outputs, pytree.tree_map(lambda _: 0, outputs)

    return rule


def _dense(value: Tensor, time_dim: int) -> Tensor:
    return value if value.is_contiguous() or is_channels_last(value, time_dim) else value.contiguous()


def _writing_back(batch_norm_backward: Callable[..., Any]) -> Callable[..., Any]:
    """It changes its first argument, which must lie in memory as the second does."""

    def operator(grad_x_seq: Tensor, x_seq: Tensor, *others: Any) -> Any:
        if grad_x_seq.numel() == 0:
            return batch_norm_backward(grad_x_seq, x_seq, *others)
        last = x_seq.dim() - 1
        channel = last if x_seq.is_contiguous() else channel_dim(others[-1])  # else channels_last
        changed = grad_x_seq.movedim(channel, last).clone(memory_format=torch.contiguous_format).movedim(last, channel)
        result = batch_norm_backward(changed, x_seq, *others)
        grad_x_seq.copy_(changed)
        return result

    return operator
