"""Batch normalisation and the neurons after it, in one: `batch_norm_lif`, its derivative, and the layer `BatchNormLIF`.

Forward reads x for the statistics, then reads it once more and writes s. Backward reads x and the gradient and writes
dh (lif_backward), then reads dh and x and writes dx, in place (batch_norm_backward): 36 bytes per element in float32.
Saved for backward: x, checkpoints, and 7 values per channel. With a residual both passes read one element more, and dx
gets memory of its own where dh is the residual's gradient; else backward writes both, and the last pass works in place.

With dh the gradient of the normalised input c = gain (x - mean) + shift, sums over the M elements of a channel
and xhat = (x - mean) / sqrt(variance + eps):

    S = sum dh xhat,   d weight = input_scale S,   d bias = input_scale sum dh
    dx = gain dh                                          evaluation
       = gain (dh - sum dh / M - xhat S / M)              training
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..backends import BACKENDS, backend_of, operators_of
from ..backends.derivatives import DERIVATIVES
from ..backends.ops import ForwardResult
from ..calls import recompute
from ..calls.arguments import Arguments, NeuronArguments
from ..calls.plan import Call, Inputs, Plan, cached_by_signature, checked_call
from ..checks import (
    HALF_TYPES,
    PLAIN_TENSORS,
    accept_none,
    check_bool,
    check_finite,
    check_floating,
    check_input,
    check_keywords,
    check_not_nan,
    check_options,
    check_sizes,
    describe_array,
    describe_shape_mismatch,
    format_value,
    has_readable_values,
    read_finite,
    read_number,
    require_range,
)
from ..layout import Features, channel_dim, real_type, reshape_by_channel
from ..reference.normalisation import batch_statistics, normalisation_coefficients
from ..reference.surrogates import detached
from ..torch_modes import (
    apply,
    apply_at_one_level,
    is_differentiated,
    is_transform_active,
    needs_zero_gradients,
    once_differentiable,
    saved_tensors,
)
from .base import fill_parameter
from .deferred import Pending, tensor_of
from .lif import LIF, LIF_DEFAULTS, LIFOutput, remember_call, requested_output, run_backward, run_forward, run_reference

_CALLER = "asgl_cuda.batch_norm_lif"

# If a channel has at most this many values in training, half inputs are converted to float32. With so few values, dx is
# a small difference of large terms, for which a dh rounded to the half type would be too inaccurate.
_FEW = 4


class _Settings(NamedTuple):
    """The arguments of the normalisation that are no tensors, checked."""

    channel: int  # the dimension of x_seq that has the channels
    eps: float
    input_scale: float
    group: Any  # processes that share the statistics; None for only this one


# The arguments of the normalisation and time_dim, by name. "count" is num_batches_tracked or None.
_Normalisation = dict[str, Any]


class _Running(NamedTuple):
    """The running statistics that a call in training updates."""

    mean: Tensor
    variance: Tensor
    batches: Tensor | None  # num_batches_tracked
    momentum: float | Tensor


# mean, variance, weight and bias, each of shape [C] or None. mean and variance are None if those of the batch are used.
_ByChannel = Sequence[Tensor | None]


class BatchNormLIFFunction(torch.autograd.Function):
    """The fused operators as a differentiable function of weight, bias, and the neuron's tensors.

    Takes `_Settings`, `_Running` or None, the backend, the plan, the tensors of `_ByChannel`, and the fields of
    `Inputs`. Returns the results of `LIFFunction`, the coefficients and the statistics.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        settings: _Settings, running: _Running | None, backend: str, plan: Plan, mean: Any, variance: Any,
        weight: Any, bias: Any, *inputs: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The wanted outputs, then checkpoints, coefficients and statistics."""
        call = Call(backend, plan, Inputs(*inputs))
        outputs, *others = _run_fused(settings, running, call, (mean, variance, weight, bias), True)
        return *outputs, *others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves checkpoints, coefficients, statistics, and all tensors except mean and variance."""
        ctx.settings, _, ctx.backend, ctx.plan, *tensors = inputs
        mean, _, *kept = tensors  # weight and bias are only for once_differentiable; backward uses their coefficients
        ctx.training = mean is None
        not_differentiable = output[-3:]  # checkpoints, coefficients, statistics
        ctx.save_for_backward(*not_differentiable, *kept)
        ctx.set_materialize_grads(needs_zero_gradients())
        ctx.mark_non_differentiable(*not_differentiable)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """The gradients of the neurons by lif_backward, then those of the normalisation by batch_norm_backward."""
        saved, settings, backend, plan = saved_tensors(ctx), ctx.settings, ctx.backend, ctx.plan
        checkpoints, coefficients, statistics, weight, bias, *tensors = saved
        inputs, x_seq = Inputs(*tensors), tensors[0]
        wants_weight, wants_bias, *others = ctx.needs_input_grad[6:]
        needed = Inputs(*others)
        through_batch = needed.x_seq and ctx.training
        wants_sums = wants_weight or wants_bias or through_batch
        # If residual_gain is 1, the residual's gradient is dh, the gradient of the potential before reset. lif_backward
        # then writes only dh, from which batch_norm_backward computes gain * dh and dx. In float16, dh may overflow
        # where gain * dh does not, so lif_backward writes both gradients.
        shared = through_batch and needed.residual and x_seq.dtype != torch.float16
        shared = shared and plan.numbers.residual_gain == 1
        wanted = needed.with_input_parameters(wants_sums, wants_sums, False)
        if shared:
            wanted = Inputs(False, *wanted[1:])
        found = run_backward(backend, plan, _normalised_inputs(inputs, coefficients), grads[:-3], checkpoints, wanted)
        grad_x_seq, grad_weight, grad_bias = found.x_seq, None, None
        if shared:
            grad_x_seq = torch.empty_like(found.residual)
        elif through_batch and is_transform_active():
            # Under transforms, grad_x_seq is a view that a torch.autograd.Function has made (see
            # `once_differentiable`). Autograd refuses to modify such a view in place, as batch_norm_backward does.
            grad_x_seq = grad_x_seq.clone()
        if wants_sums:
            sums = found.input_gain, found.input_bias
            grad_input = grad_x_seq if through_batch else x_seq.new_empty(0)
            grad_weight, grad_bias = operators_of(backend, inputs).batch_norm_backward(
                grad_input, found.residual if shared else None, x_seq, coefficients, statistics, *sums,
                *_sum_over_processes(sums, settings.group), settings.eps, settings.input_scale, plan.rules.time_dim,
            )  # fmt: skip
        _, *others = found.with_input_parameters(None, None, None)
        gradients = grad_weight if wants_weight else None, grad_bias if wants_bias else None, grad_x_seq, *others
        return *[None] * 6, *once_differentiable(gradients, (weight, bias, *tensors, *grads))


class _CoefficientsFunction(torch.autograd.Function):
    """The operator batch_norm_coefficients as a differentiable function of x_seq, weight and bias.

    Its coefficients are mean, gain, shift and variance. Backward uses the gradients of gain and shift. The rounded mean
    counts as a constant, because its effects through the shift and through the neurons cancel. The variance is only for
    running statistics.
    """

    @staticmethod
    def forward(operator: Any, backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The coefficients and the statistics."""
        coefficients, total = operator(*arguments)
        return coefficients, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves x_seq, the coefficients and the statistics."""
        _, ctx.backend, x_seq, _, mean, _, _, _, *ctx.options = inputs
        ctx.training = mean is None
        ctx.save_for_backward(x_seq, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of x_seq, weight and bias, by batch_norm_backward."""
        x_seq, coefficients, total = saved_tensors(ctx)
        _, _, wants_x_seq, _, _, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        through_batch = wants_x_seq and ctx.training
        _, grad_gain, grad_shift, _ = grads[0].unbind()
        grad_x_seq = torch.zeros_like(x_seq) if through_batch else x_seq.new_empty(0)
        sums = grad_gain, grad_shift
        grad_weight, grad_bias = operators_of(ctx.backend, (x_seq, coefficients, *sums)).batch_norm_backward(
            grad_x_seq, None, x_seq, coefficients, total, *sums, *sums, *ctx.options
        )
        found = (
            grad_x_seq if through_batch else None,
            grad_weight if wants_weight else None,
            grad_bias if wants_bias else None,
        )
        grad_x_seq, grad_weight, grad_bias = once_differentiable(found, (x_seq, coefficients, *grads))
        return None, None, grad_x_seq, None, None, None, grad_weight, grad_bias, None, None, None


def _coefficients_with_graph(operator: Any, below: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """An entry of DERIVATIVES: batch_norm_coefficients, called by `below`, with the graph of _CoefficientsFunction.

    `operator` only tells the backend. Raises RuntimeError for statistics of several processes.
    """
    _, statistics, *_ = arguments
    if statistics is not None:
        raise RuntimeError(
            "asgl_cuda.batch_norm_coefficients: an exported graph can't be trained with statistics shared by several "
            "processes; train the original model, and export it afterwards"
        )
    coefficients, total = apply_at_one_level(_CoefficientsFunction, below, backend_of(operator), *arguments)
    return coefficients, total


def _update_with_graph(operator: Any, below: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The same for batch_norm_update, whose arguments begin with the three running statistics and the momentum."""
    return _coefficients_with_graph(operator, partial(below, *arguments[:4]), *arguments[4:])


DERIVATIVES.update(batch_norm_coefficients=_coefficients_with_graph, batch_norm_update=_update_with_graph)


def _run_fused(
    settings: _Settings, running: _Running | None, call: Call, norm: _ByChannel, keep_checkpoints: bool
) -> tuple[ForwardResult, Tensor, Tensor]:
    """Runs the fused operators. Returns the outputs, the coefficients, and count, mean and variance of each channel.

    Updates running statistics before autograd saves a tensor, because activation checkpointing may end its second run
    as soon as all tensors are saved.
    """
    backend, plan, inputs = call

    def coefficients_of(statistics: Tensor | None, updated: Sequence[Any] = ()) -> tuple[Tensor, Tensor]:
        """Coefficients and statistics, of x_seq or from those of all processes. Updates running ones if given."""
        operators = operators_of(backend, inputs)
        operator = operators.batch_norm_update if updated else operators.batch_norm_coefficients
        return operator(
            *updated, inputs.x_seq, statistics, *norm, settings.eps, settings.input_scale, plan.rules.time_dim
        )

    all_statistics = None
    if settings.group is not None:
        _, own = coefficients_of(None)
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(settings.group))]
        torch.distributed.all_gather(parts, own, group=settings.group)
        all_statistics = torch.stack(parts)
        _check_shared_count(all_statistics[:, :1, 0], settings, inputs.x_seq)
    if running is not None and _operator_can_update(running, plan.real):
        mean, variance, batches, momentum = running
        if batches is not None and (batches.dtype is not torch.int64 or batches.device != mean.device):
            batches.add_(1)  # the count was cast by the user, or is from a checkpoint that was cast
            batches = None
        kept: list[Tensor | None] = [mean, variance, batches]
        # torch's fallback for the negative bit does not support operators that change several arguments.
        dense = [each.resolve_neg() if each is not None and each.is_neg() else each for each in kept]
        # The operator itself does not increment the version counters of the tensors that it changes.
        torch.autograd.graph.increment_version([each for each in kept if each is not None])
        coefficients, statistics = coefficients_of(all_statistics, (*dense, momentum))
        for each, changed in zip(kept, dense, strict=True):
            if each is not None and changed is not None and changed is not each:
                each.copy_(changed)
    else:
        coefficients, statistics = coefficients_of(all_statistics)
        if running is not None:
            _update_running_statistics(running, coefficients[0], coefficients[3])
    outputs = run_forward(backend, plan, _normalised_inputs(inputs, coefficients), keep_checkpoints)
    return outputs, coefficients, statistics


def _normalised_inputs(inputs: Inputs, coefficients: Tensor) -> Inputs:
    """The inputs with the coefficients as input_gain, input_bias and input_mean, so that neurons normalise x_seq."""
    mean, gain, shift, _ = coefficients.unbind()
    return inputs.with_input_parameters(gain, shift, mean)


def _remember_norm_call(call: Call, results: Sequence[Tensor]) -> None:
    """`remember_call` for a call of BatchNormLIFFunction, from its results."""
    *outputs, coefficients, _ = results
    remember_call(call, _normalised_inputs(call.inputs, coefficients), outputs)


def _check_shared_count(counts: Tensor, settings: _Settings, x_seq: Tensor) -> None:
    """Refuses one value per channel over all processes. Reads `counts` only if this process has at most one."""
    if x_seq.numel() <= x_seq.shape[settings.channel] and bool((counts.sum(0) <= 1).any()):
        raise ValueError(
            f"{_CALLER}: the statistics of a batch need more than one value per channel over all processes, got x_seq "
            f"of shape {list(x_seq.shape)} in this process; use a larger batch"
        )


def check_process_group(process_group: Any, caller: str) -> None:
    """Refuses all but a process group, "world" and None. Accepts torch's NON_GROUP_MEMBER, to create layers with it."""
    if process_group is None or (isinstance(process_group, str) and process_group == "world"):
        return
    if torch.distributed.is_available():
        outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
        if isinstance(process_group, torch.distributed.ProcessGroup) or process_group is outside:
            return
    raise _process_group_error(process_group, caller)


def _process_group_error(process_group: Any, caller: str) -> TypeError:
    """The error for an argument process_group that is no process group."""
    expected = 'process_group must be a process group that this process is in, "world" or None'
    return TypeError(f"{caller}: {expected}, got {format_value(process_group)}")


def sharing_group(process_group: Any, caller: str) -> Any:
    """The processes to share values with: a given group, or all processes for "world".

    None if nothing is shared: for None, for a group of one process, and for "world" if torch.distributed is not
    initialised. Raises TypeError for other values.
    """
    if process_group is None:
        return None
    if isinstance(process_group, str) and process_group == "world":
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        process_group = torch.distributed.group.WORLD
    elif not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise _process_group_error(process_group, caller)
    return process_group if torch.distributed.get_world_size(process_group) > 1 else None


def _sum_over_processes(sums: Sequence[Tensor], group: Any) -> Sequence[Tensor]:
    """The gradients of gain and bias, summed over all processes of the group."""
    if group is None:
        return sums
    total = torch.stack(list(sums))
    torch.distributed.all_reduce(total, group=group)
    return total.unbind()


def batch_norm_lif(
    x_seq: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    input_scale: float = 1.0,
    process_group: Any = None,
    **neuron: Unpack[NeuronArguments],
) -> Tensor | LIFOutput:
    """Batch normalisation over time, batch and space, then leaky integrate-and-fire neurons: two layers in one.

    `torch.nn.BatchNorm2d` followed by `asgl_cuda.lif` stores the normalised input for backward. This function does not,
    except with the backend "reference".

    Args:
        x_seq: `[T, B, C, ...]` (or time at `time_dim`), float16, bfloat16, float32 or float64; the channels are the
            second dimension, not counting time.
        running_mean, running_var: running statistics, `[C]`, in units of x_seq and of its square. Without `training`,
            x_seq is normalised by them. With `training`, they are updated if given. They are not differentiable.
        weight, bias: `[C]`; default 1 and 0.
        training: normalise by mean and variance of x_seq, each over all dimensions except the channels, instead of
            running_mean and running_var.
        momentum: fraction of the running statistics that a call in training replaces; a float, or a tensor of one
            value.
        eps: added to the variance, >= 0.
        input_scale: factor on the normalised input; `alpha * v_threshold` for the tdBN of Zheng et al., AAAI 2021.
        process_group: the processes that share statistics in training. Each of them must make the call. "world" means
            all processes, or only this one if torch.distributed is not initialised. None means only this one.

    The other arguments are those of `asgl_cuda.lif`, except `input_gain`, `input_bias` and `input_mean`. Returns what
    `lif` returns, also differentiable with respect to weight and bias. Raises the errors of `lif`, and errors for wrong
    arguments of the normalisation. If statistics of the batch are used, a single value per channel raises ValueError.
    Mean and variance are accurate even if the mean is much larger than the standard deviation. The normalised value is
    not rounded to the type of x_seq. Inputs may be up to 1e15 in magnitude, or 1e150 in float64. With larger inputs,
    gradients can be NaN or inaccurate, and the running variance infinite. With `eps=0` the standard deviation of a
    channel must be at least 1e-15, or 1e-150 in float64.

    Example::

        x_seq = torch.randn(4, 32, 16, 8, 8)  # [T, B, C, H, W]
        mean, variance = torch.zeros(16), torch.ones(16)
        s_seq = asgl_cuda.batch_norm_lif(x_seq, mean, variance, training=True)  # updates mean and variance
        s_seq = asgl_cuda.batch_norm_lif(x_seq, mean, variance)  # normalises by them

    Source of the normalisation: Ioffe, Szegedy: Batch Normalization, ICML 2015.

    The same in PyTorch, time first::

        y = torch.nn.functional.batch_norm(
            x_seq.flatten(0, 1), running_mean, running_var, weight, bias, training, momentum, eps)
        s_seq = asgl_cuda.lif(input_scale * y.unflatten(0, x_seq.shape[:2]), ...)
    """
    check_keywords(neuron, (*NeuronArguments.__annotations__, "input_scale"), _CALLER)
    given: Arguments = {**LIF_DEFAULTS, **neuron}
    norm: _Normalisation = {
        "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias, "count": None,
        "training": training, "momentum": momentum, "eps": eps, "input_scale": input_scale,
        "process_group": process_group, "time_dim": given["time_dim"],
    }  # fmt: skip
    return _run_batch_norm_lif(tensor_of(x_seq, _CALLER), norm, given)


def _check_momentum_value(momentum: Any) -> None:
    """Checks that momentum is finite. Reads a tensor only if it `has_readable_values`."""
    seen = isinstance(momentum, Tensor) and has_readable_values(momentum)
    if seen and momentum.numel() == 1 and momentum.is_floating_point():
        check_finite("momentum", momentum.item(), _CALLER, "a float or a tensor")


def _run_batch_norm_lif(x_seq: Tensor, norm: _Normalisation, given: Arguments) -> Tensor | LIFOutput:
    """The result of `batch_norm_lif` from records of its arguments. Counts the batch if `count` is given."""
    settings = _checked_settings(_CALLER, x_seq, norm)
    training, momentum, count = norm["training"], norm["momentum"], norm["count"]
    _check_momentum_value(momentum)
    running_mean, running_var = norm["running_mean"], norm["running_var"]
    group = sharing_group(norm["process_group"], _CALLER) if training else None
    if group is not None:
        settings = _Settings(settings.channel, settings.eps, settings.input_scale, group)
    scalar, real = x_seq.dtype, real_type(x_seq.dtype)
    running = None
    if running_mean is not None and running_var is not None:
        if training:
            running = _Running(running_mean, running_var, count, momentum)
        _check_running_statistics(running_mean, running_var, training)
    if training and group is None and x_seq.numel() == 0:  # as in torch, counted but without statistics
        training, running, running_mean = False, None, x_seq.new_zeros(x_seq.shape[settings.channel], dtype=real)
        running_var = torch.ones_like(running_mean)
        if count is not None:
            count.add_(1)
    if training:
        channels = x_seq.shape[settings.channel]
        if group is None and x_seq.numel() <= channels:
            raise ValueError(
                f"{_CALLER}: the statistics of a batch need more than one value per channel, got x_seq of shape "
                f"{list(x_seq.shape)}; use a larger batch. With running statistics, model.eval() or "
                "training=False allows single samples and steps"
            )
        if scalar in HALF_TYPES and x_seq.numel() <= _FEW * channels:
            x_seq = x_seq.to(torch.float32)
            residual = given["residual"]
            if isinstance(residual, Tensor) and residual.dtype == scalar:
                given = {**given, "residual": residual.to(torch.float32)}
    call = checked_call(_CALLER, x_seq, given)
    mean, variance = (None, None) if training else (running_mean, running_var)
    values: _ByChannel = [
        value if value is None or value.dtype is real else value.to(real)
        for value in (mean, variance, norm["weight"], norm["bias"])
    ]
    outputs: Sequence[Tensor]
    if BACKENDS[call.backend].operators is None:
        outputs = _run_reference(settings, running, call, values)
    else:
        # Under transforms and compilers, torch's own operations update the running statistics below: transforms must
        # see the update, and compilers fuse these operations better than the operator.
        traced = torch.compiler.is_compiling() or is_transform_active()
        inside = None if traced else running
        if is_differentiated((*values, *call.inputs), _CALLER):
            arguments = settings, inside, call.backend, call.plan, *values, *call.inputs
            if recompute.open_contexts or recompute.traced_contexts:
                found = recompute.apply_and_remember(
                    apply, BatchNormLIFFunction, arguments, partial(_remember_norm_call, call)
                )
            else:
                found = apply(BatchNormLIFFunction, *arguments)
            *outputs, coefficients, _ = found
        else:
            outputs, coefficients, _ = _run_fused(settings, inside, call, values, False)
        if running is not None and traced:
            _update_running_statistics(running, coefficients[0], coefficients[3])
    output = requested_output(call.plan, outputs)
    if scalar == x_seq.dtype:
        return output
    return LIFOutput(output[0].to(scalar), *output[1:]) if isinstance(output, LIFOutput) else output.to(scalar)


@cached_by_signature(
    ("running_mean", "running_var", "weight", "bias", "momentum", "training", "eps", "input_scale", "time_dim")
)
def _checked_settings(caller: str, x_seq: Tensor, norm: _Normalisation) -> _Settings:
    """Checks the arguments of the normalisation. Returns the settings, without a group."""
    time_dim, training, momentum = norm["time_dim"], norm["training"], norm["momentum"]
    time_dim = check_input(x_seq, time_dim, caller)
    check_bool("training", training, caller)
    channel = channel_dim(time_dim)
    if channel >= x_seq.dim():
        raise ValueError(
            f"{caller}: x_seq must have a dimension of channels after time and batch, got shape {list(x_seq.shape)} "
            f"with time_dim {time_dim}; is time or the batch missing?"
        )
    channels = x_seq.shape[channel]
    if (norm["running_mean"] is None) != (norm["running_var"] is None):
        given = "running_var" if norm["running_mean"] is None else "running_mean"
        raise ValueError(f"{caller}: running_mean and running_var must both be given or both be None, got only {given}")
    if not training and norm["running_mean"] is None:
        raise ValueError(f"{caller}: evaluation (training=False) needs running_mean and running_var, got None")
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = norm[name]
        if value is None:
            continue
        check_floating(name, value, x_seq, caller)
        if list(value.shape) != [channels]:
            hint = "; is time or the batch missing?" if x_seq.shape[1:2] == value.shape else ""
            if x_seq.shape[time_dim] == 1 and x_seq.shape[channel + 1 : channel + 2] == value.shape:
                hint = "; if step got a sequence, call the model itself instead"
            raise ValueError(
                f"{caller}: {name} must have shape {[channels]}, with a value for each channel (dimension {channel}) "
                f"of x_seq of shape {list(x_seq.shape)}, got {list(value.shape)}{hint}"
            )
    if isinstance(momentum, Tensor):
        check_floating("momentum", momentum, x_seq, caller)
        if momentum.numel() != 1:
            raise ValueError(
                f"{caller}: momentum must be a float or a tensor of one value, got a tensor of shape "
                f"{list(momentum.shape)}"
            )
    else:
        check_finite("momentum", momentum, caller, "a float or a tensor")
    return _Settings(channel, **check_options(norm, _OPTIONS, caller), group=None)


_OPTIONS = {"eps": require_range(check_finite, ">= 0", 0), "input_scale": check_not_nan}


def _check_running_statistics(mean: Tensor, variance: Tensor, training: bool) -> None:
    """Refuses running statistics that require a gradient or share memory."""
    if (mean.requires_grad or variance.requires_grad) and torch.is_grad_enabled():
        name = "running_mean" if mean.requires_grad else "running_var"
        raise ValueError(f"{_CALLER}: {name} gets no gradient, so it must not require one; pass {name}.detach()")
    if not training or torch.compiler.is_compiling() or is_transform_active() or type(mean) not in PLAIN_TENSORS:
        return
    apart = abs(mean.data_ptr() - variance.data_ptr())
    if mean.is_contiguous() and variance.is_contiguous() and apart >= max(mean.nbytes, variance.nbytes):
        return
    addresses = []
    for name, value in (("running_mean", mean), ("running_var", variance)):
        step = value.stride(0) * value.element_size()
        if step == 0 and value.numel() > 1:
            raise ValueError(
                f"{_CALLER}: {name} is updated in training, so it must have memory for each channel, got an expanded "
                f"tensor; make it a tensor of its own once, before training: {name} = {name}.clone()"
            )
        start = value.data_ptr()
        addresses.append({start + step * index for index in range(value.numel() if start else 0)})
    if not addresses[0].isdisjoint(addresses[1]):
        raise ValueError(
            f"{_CALLER}: running_mean and running_var are updated in training, so they must not share memory; "
            "make running_var a tensor of its own once, before training: running_var = running_var.clone()"
        )


def _operator_can_update(running: _Running, real: torch.dtype) -> bool:
    """Whether the operator batch_norm_update can update these statistics. Otherwise torch's operations do."""
    mean, variance, _, momentum = running
    return (
        not isinstance(momentum, Tensor)
        and mean.dtype == variance.dtype == real
        and mean.is_contiguous()
        and variance.is_contiguous()
    )


@torch.no_grad()
def _update_running_statistics(running: _Running, *statistics: Tensor) -> None:
    """Replaces a fraction `momentum` of running mean and variance by those of a batch, and counts the batch."""
    mean, variance, batches, momentum = running
    in_inference = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    if not in_inference and (mean.is_inference() or variance.is_inference()):
        raise ValueError(
            f"{_CALLER}: running statistics that were made in inference mode can't be updated outside of it; "
            "replace them by their clone()"
        )
    if isinstance(momentum, Tensor) and momentum.dim():
        momentum = momentum.reshape(())
    try:
        for each, value in zip((mean, variance), statistics, strict=True):
            fraction = momentum.to(each.dtype) if isinstance(momentum, Tensor) else momentum
            value = detached(value).to(each.dtype).reshape(each.shape)
            if not is_transform_active():
                each.lerp_(value, fraction)
            else:
                each.copy_(each.lerp(value, fraction))  # vmap does not support lerp_
        if batches is not None:
            batches.add_(1)
    except RuntimeError as error:
        if not is_transform_active():
            raise
        raise RuntimeError(
            f"{_CALLER}: running statistics are updated in training, so under torch.func they must be arguments of "
            "the transformed function. They must be mapped if x_seq is mapped. Clone statistics that are expanded "
            "tensors. torch.func.functional_call passes those of a layer, and torch.func.stack_module_state stacks "
            "those of several layers; or use track_running_stats=False"
        ) from error


def _run_reference(settings: _Settings, running: _Running | None, call: Call, norm: _ByChannel) -> Sequence[Tensor]:
    """The outputs of normalisation and neurons, computed by the reference."""
    channel, x_seq = settings.channel, call.inputs.x_seq
    mean, variance, weight, bias = norm
    if mean is None or variance is None:
        count, mean, variance = batch_statistics(x_seq, channel, settings.group)
        _check_shared_count(count, settings, x_seq)
        if running is not None:
            _update_running_statistics(running, mean, variance * (count / (count - 1)))
    real, eps, input_scale = real_type(x_seq.dtype), settings.eps, settings.input_scale
    coefficients = normalisation_coefficients(mean, variance, weight, bias, eps, input_scale, real)
    gain, shift, rounded = (reshape_by_channel(value, channel, x_seq) for value in coefficients)
    return run_reference(call.plan, call.inputs.with_input_parameters(gain, shift, rounded))


def module_batch_norm_lif(
    norm: Any,
    x_seq: Tensor,
    given: Arguments,
    weight: Tensor | None,
    bias: Tensor | None,
    update: bool = True,
    input_scale: float = 1.0,
    process_group: Any = None,
) -> Tensor | LIFOutput:
    """`batch_norm_lif` for the module `norm`, with the attributes and the rules of `torch.nn.BatchNorm2d`.

    `weight` and `bias` are those of the module, or computed from them. Without `update` the running statistics stay
    unchanged.
    """
    training, running_mean = norm.training, norm.running_mean
    uses_batch = training or running_mean is None
    update = update and training and norm.track_running_stats
    momentum, count = norm.momentum, norm.num_batches_tracked if update else None
    if momentum is None:  # momentum None means a cumulative average
        real = torch.promote_types(norm.running_mean.dtype, torch.float32) if update else None
        momentum = 1 / (norm.num_batches_tracked.to(real) + 1) if update else 0.0
    running_var = norm.running_var
    if uses_batch and not update:
        running_mean = running_var = count = None
    arguments: _Normalisation = {
        "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias, "count": count,
        "training": uses_batch, "momentum": momentum, "eps": norm.eps, "input_scale": input_scale,
        "process_group": process_group, "time_dim": given["time_dim"],
    }  # fmt: skip
    return _run_batch_norm_lif(x_seq, arguments, given)


class BatchNormLIF(LIF):
    """Batch normalisation over time, batch and space, and the neurons of `LIF` after it: two layers in one.

    Args:
        num_features: number of channels; for granularity "neuron" the shape of the neurons, channels first.
        eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`.
        input_scale: factor on the normalised input; `alpha * v_threshold` for tdBN.
        process_group: the processes that share statistics in training. It is a process group of torch.distributed,
            "world" for all processes that exist at each call, or None for this process alone. A layer with a process
            group can't be copied or pickled; a layer with "world" can.
        device, dtype: of the parameters and the running statistics.
        lif_options: arguments of `LIF`, except `input_gain`.

    Parameters and buffers have the names that they have in `torch.nn.BatchNorm2d` and `LIF`, so the layer can load
    `{**norm.state_dict(), **lif.state_dict()}`.

    This layer is not a subclass of torch's `_BatchNorm`, so functions that look for that class skip it. Instead of
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` use `asgl_cuda.convert_sync_batchnorm`. To compute the running
    statistics anew, as `torch.optim.swa_utils.update_bn` does, first run these lines::

        for layer in model.modules():
            if isinstance(layer, asgl_cuda.BatchNormLIF):
                layer.reset_running_stats()
                layer.momentum = None  # the average of all batches; restore it afterwards

    Then call the model with all batches, in training mode and without gradients. `update_bn` makes these calls, but
    only if the model also has batch normalisations of torch.

    Shapes: input and output are `[T, B, C, ...]`, or have time at `time_dim`.

    `layer(x_seq, residual)` adds the shortcut of a residual block between the normalisation and the neurons: the
    neurons get `input_scale * y + residual`, where y is the normalised input. `residual` must have the shape and type
    of x_seq.

    Raises the errors of `LIF` and of `asgl_cuda.batch_norm_lif`. The docstring of `batch_norm_lif` gives the range of
    inputs, and shows how PyTorch computes the same.

    Example::

        block = nn.Sequential(nn.Linear(64, 128), asgl_cuda.BatchNormLIF(128, analog_prob=0.2))
        s_seq = block(torch.randn(4, 32, 64))  # [T, B, 64] to [T, B, 128]

        norm, neurons = nn.BatchNorm1d(128), asgl_cuda.LIF()  # as two layers; their checkpoint loads
        block[1].load_state_dict({**norm.state_dict(), **neurons.state_dict()})
    """

    _caller = "asgl_cuda.BatchNormLIF"
    _function = _CALLER
    _least_batch = 1
    _norm_options: ClassVar[dict[str, Callable[..., Any]]] = {
        "eps": require_range(read_finite, ">= 0", 0),
        "momentum": accept_none(require_range(read_number, "in [0, 1] or None", 0, 1)),
        "input_scale": read_finite,
        **dict.fromkeys(("affine", "track_running_stats"), check_bool),
    }
    _weights = ("weight", "bias")
    eps: float
    momentum: float | None
    input_scale: float
    affine: bool
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int | Sequence[int],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        input_scale: float = 1.0,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **lif_options: Any,
    ) -> None:
        caller = self._caller
        if "input_gain" in lif_options:
            raise TypeError(f"{caller}: takes no input_gain; use input_scale, the factor on the normalised input")
        check_keywords(lif_options, {**(LIF.__init__.__kwdefaults__ or {}), "input_scale": 1.0}, caller)
        try:
            channels, *others = check_sizes("num_features", num_features, caller)
        except (TypeError, ValueError):
            got = describe_array("num_features", num_features) or format_value(num_features)
            raise ValueError(
                f"{caller}: num_features must be a positive int, the number of channels C, or a sequence of positive "
                f"ints such as [C, H, W], got {got}"
            ) from None
        granularity = lif_options.get("granularity", "layer")
        in_layer = isinstance(granularity, str) and granularity == "layer"
        if in_layer and others:
            raise ValueError(
                f"{caller}: num_features must be one number for granularity 'layer', got {format_value(num_features)}; "
                "granularity 'neuron' takes the sizes of all dimensions"
            )
        own = dict(locals())
        super().__init__(None if in_layer else num_features, device=device, dtype=dtype, **lif_options)
        self.num_channels = channels
        self._set_checked_options(own, self._norm_options)
        check_process_group(process_group, caller)
        self.process_group = process_group
        empty = partial(torch.empty, channels, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty()) if self.affine else None
        self.bias = nn.Parameter(empty()) if self.affine else None
        self.register_buffer("running_mean", empty() if track_running_stats else None)
        self.register_buffer("running_var", empty() if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device) if track_running_stats else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets parameters and running statistics, and clears potentials."""
        super().reset_parameters()
        self.reset_running_stats()
        fill_parameter(self.weight, 1.0)
        fill_parameter(self.bias, 0.0)

    def reset_running_stats(self) -> None:
        """Resets the running statistics, as `torch.nn.BatchNorm2d.reset_running_stats` does."""
        fill_parameter(self.running_mean, 0.0)
        fill_parameter(self.running_var, 1.0)
        fill_parameter(self.num_batches_tracked, 0)

    def _call_function(
        self, x_seq: Tensor, update: bool = True, pending: Pending | None = None, **options: Any
    ) -> Tensor | LIFOutput:
        """Calls `asgl_cuda.batch_norm_lif`. Without `update` the running statistics stay unchanged.

        `pending` is always None, because `_inputs_of_call` passes one only to LIF's own `_call_function`.
        """
        if self.weight is None and self.running_mean is None:
            self._check_channels(x_seq)
        return module_batch_norm_lif(
            self, x_seq, self._arguments_of_call(x_seq, **options), self.weight, self.bias, update, self.input_scale,
            self.process_group,
        )  # fmt: skip

    def _check_channels(self, x_seq: Tensor) -> None:
        """Refuses another number of channels, which `batch_norm_lif` would accept without weight and statistics."""
        time_dim = check_input(x_seq, self.time_dim, self._caller)
        channel = channel_dim(time_dim)
        if x_seq.dim() > channel and x_seq.shape[channel] != self.num_channels:
            raise ValueError(
                f"{self._caller}: x_seq must have "
                + describe_shape_mismatch(x_seq, time_dim, Features(True, (self.num_channels,)))
            )

    def extra_repr(self) -> str:
        parts = [f"{self.num_channels}", f"eps={self.eps:g}", f"momentum={self.momentum}"]
        parts += [f"{flag}=False" for flag in ("affine", "track_running_stats") if not getattr(self, flag)]
        if self.input_scale != 1:
            parts.append(f"input_scale={self.input_scale:g}")
        return ", ".join([*parts, super().extra_repr()])
