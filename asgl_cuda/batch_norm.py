"""Batch normalisation and the fused neuron in one: autograd wiring, and `batch_norm_lif`.

Forward reads x for the statistics, then reads it once more and writes s; backward reads x and the gradient and writes
dh, then reads dh and x and writes dx, in place: 36 bytes an element in float32. Backward needs x, and of the
normalisation a few numbers a channel.

With dh the gradient of the normalised input c = gain (x - mean) + shift, sums over all elements of a channel, M their
number and xhat = (x - mean) / sqrt(variance + eps):

    S = sum dh xhat,   d weight = input_scale S,   d bias = input_scale sum dh
    dx = gain dh                                          evaluation
       = gain (dh - sum dh / M - xhat S / M)              training
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from .backends import BACKENDS, backend_of, operators_of
from .checks import (
    HALF_TYPES,
    PLAIN_TENSORS,
    can_be_seen,
    check_bool,
    check_dense,
    check_device,
    check_finite,
    check_floating,
    check_input,
    check_keywords,
    check_not_nan,
    expected_shape,
    once_a_kind,
    shown,
)
from .derivatives import DERIVATIVES
from .functional import Arguments, Call, LIFOutput, NeuronArguments, checked_call, lif
from .layout import by_channel, channel_dim, real_type
from .ops import ForwardResult, in_their_places
from .reference import Parameters, batch_statistics, detached, normalisation
from .transforms import apply, apply_here, is_differentiated, once_differentiable, saved_tensors, transforming

_CALLER = "asgl_cuda.batch_norm_lif"
NEURON_DEFAULTS = lif.__kwdefaults__ or {}

# With so few values a channel dx is the small difference of terms that half types round, so it is computed in float32.
_FEW = 4


class _Settings(NamedTuple):
    """The settings that all channels of a call share."""

    channel: int  # dimension of x_seq
    eps: float
    input_scale: float
    group: Any  # processes that share the statistics, None for this one alone


class BatchNormLIFFunction(torch.autograd.Function):
    """The fused operators as a differentiable function of x_seq, v_init, weight, bias and the neuron's parameters.

    `mean` and `variance` are None in training, where they are taken from x_seq.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(settings: _Settings, *inputs: Any) -> tuple[Tensor, ...]:
        result, coefficients, statistics = _forward(settings, Call.of(*inputs[4:]), inputs[:4], True)
        return *result, coefficients, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, ctx.training, ctx.options = inputs[0], inputs[3] is None, inputs[5:9]
        kept = output[-3:]  # checkpoints, coefficients, statistics
        ctx.save_for_backward(*kept, *inputs[9:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        checkpoints, coefficients, statistics, *tensors = saved_tensors(ctx)
        settings, grads = ctx.settings, grads[:-3]
        call = Call.of(*ctx.options, *tensors)
        _, wants_weight, wants_bias, _, _, _, _, _, _, wants_x_seq, wants_v_init, _, *needed = ctx.needs_input_grad
        wants_sums = wants_weight or wants_bias or (wants_x_seq and ctx.training)
        of_neuron = Parameters(*needed)._replace(input_gain=wants_sums, input_bias=wants_sums)
        wanted = (wants_x_seq, wants_v_init, *of_neuron)
        found = _normalised(call, coefficients.unbind()).backward(grads, checkpoints, wanted)
        of_x_seq, of_v_init, *of_parameters = in_their_places(found, wanted)
        of_weight = of_bias = None
        if wants_sums:
            of_input = Parameters(*of_parameters)
            sums = of_input.input_gain, of_input.input_bias
            of_weight, of_bias = call.operators.batch_norm_backward(
                of_x_seq if wants_x_seq and ctx.training else call.x_seq.new_empty(0), call.x_seq, coefficients,
                statistics, *sums, *_summed(sums, settings.group), settings.eps, settings.input_scale, call.time_dim,
            )  # fmt: skip
        asked = (wants_weight, wants_bias, wants_x_seq, wants_v_init, *needed)
        gradients = [
            grad
            for grad, wants in zip((of_weight, of_bias, of_x_seq, of_v_init, *of_parameters), asked, strict=True)
            if wants
        ]
        checked = once_differentiable(gradients, (*tensors, *grads))
        grad_weight, grad_bias, grad_x_seq, grad_v_init, *grad_parameters = in_their_places(checked, asked)
        nothing = (None,) * 6
        return None, grad_weight, grad_bias, *nothing, grad_x_seq, grad_v_init, None, *grad_parameters


class _CoefficientsFunction(torch.autograd.Function):
    """The operator batch_norm_coefficients, alone in a graph, as a function of x_seq, weight and bias.

    The neuron has the gradients of gain and shift; the rounded mean counts as a constant, whose share in shift cancels
    its share in the neuron. The variance is for the running statistics alone.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        (_, below), *arguments = inputs
        coefficients, total = below(*arguments)
        return coefficients, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (backend, _), x_seq, _, mean, _, _, _, *options = inputs
        ctx.training, ctx.options = mean is None, (backend, *options)
        ctx.save_for_backward(x_seq, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved: tuple[Any, ...] = saved_tensors(ctx)
        x_seq, coefficients, total = saved
        backend, eps, input_scale, time_dim = ctx.options
        _, wants_x_seq, _, _, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        through_batch = wants_x_seq and ctx.training
        _, of_gain, of_shift, _ = grads[0].unbind()
        of_x_seq = torch.zeros_like(x_seq) if through_batch else x_seq.new_empty(0)
        sums = of_gain, of_shift
        of_weight, of_bias = operators_of(backend, (x_seq, coefficients, *sums)).batch_norm_backward(
            of_x_seq, x_seq, coefficients, total, *sums, *sums, eps, input_scale, time_dim
        )
        asked = through_batch, False, False, False, wants_weight, wants_bias
        all_found = of_x_seq, None, None, None, of_weight, of_bias
        found = [grad for grad, wants in zip(all_found, asked, strict=True) if wants and grad is not None]
        gradients = in_their_places(once_differentiable(found, (x_seq, coefficients, *grads)), asked)
        return None, *gradients, None, None, None


def _differentiated(operator: Any, below: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator batch_norm_coefficients with its derivative."""
    _, statistics, *_ = arguments
    if statistics is not None:
        raise RuntimeError(
            "asgl_cuda.batch_norm_coefficients: statistics of several processes can't be differentiated in a graph; "
            "train the model that it was made of"
        )
    coefficients, total = apply_here(_CoefficientsFunction, (backend_of(operator), below), *arguments)
    return coefficients, total


DERIVATIVES["batch_norm_coefficients"] = _differentiated


def _forward(
    settings: _Settings, call: Call, of_norm: Sequence[Tensor | None], keep_checkpoints: bool
) -> tuple[ForwardResult, Tensor, Tensor]:
    """The result of the neuron, the coefficients, and number, mean and variance of each channel."""
    weight, bias, mean, variance = of_norm

    def coefficients_of(statistics: Tensor | None) -> tuple[Tensor, Tensor]:
        return call.operators.batch_norm_coefficients(
            call.x_seq, statistics, mean, variance, weight, bias, settings.eps, settings.input_scale, call.time_dim
        )

    coefficients, statistics = coefficients_of(None)
    if settings.group is not None:
        parts = [torch.empty_like(statistics) for _ in range(torch.distributed.get_world_size(settings.group))]
        torch.distributed.all_gather(parts, statistics, group=settings.group)
        coefficients, statistics = coefficients_of(torch.stack(parts))
        _check_shared_count(statistics[:1, 0], settings, call.x_seq)
    normalised = _normalised(call, coefficients.unbind())
    return normalised.forward(keep_checkpoints), coefficients, statistics


def _normalised(call: Call, coefficients: Sequence[Tensor]) -> Call:
    """The call for neurons whose input is normalised by these, of which mean, gain and bias come first."""
    mean, gain, bias, *_ = coefficients
    return call._replace(parameters=(*call.parameters[:4], gain, bias, mean))


def _check_shared_count(count: Tensor, settings: _Settings, x_seq: Tensor) -> None:
    """Raises where all processes together have one value a channel, which is looked up only where it may be so."""
    if x_seq.numel() <= x_seq.shape[settings.channel] and bool((count <= 1).any()):
        raise ValueError(
            f"{_CALLER}: training needs more than one value a channel, got one in all processes, here x_seq of shape "
            f"{list(x_seq.shape)}"
        )


def check_process_group(process_group: Any, caller: str) -> None:
    """A group, "world" or None; a process that is not in the group may make a layer with it, and not call that."""
    if process_group is None or (isinstance(process_group, str) and process_group == "world"):
        return
    if torch.distributed.is_available():
        outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
        if isinstance(process_group, torch.distributed.ProcessGroup) or process_group is outside:
            return
    raise _no_group(process_group, caller)


def _no_group(process_group: Any, caller: str) -> TypeError:
    expected = 'process_group must be a process group that this process is in, "world" or None'
    return TypeError(f"{caller}: {expected}, got {shown(process_group)}")


def _sharing(process_group: Any) -> Any:
    """The group if there is more than one process in it, else None."""
    if process_group is None:
        return None
    if isinstance(process_group, str) and process_group == "world":
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        process_group = torch.distributed.group.WORLD
    elif not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise _no_group(process_group, _CALLER)
    return process_group if torch.distributed.get_world_size(process_group) > 1 else None


def _summed(sums: Sequence[Tensor], group: Any) -> Sequence[Tensor]:
    """The sums over all processes."""
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

    Where a layer of `torch.nn.BatchNorm2d` and one of `asgl_cuda.lif` move 52 bytes an element in a step of training in
    float32 and keep two tensors for backward, this moves 36 and keeps x_seq.

    Args:
        x_seq: `[T, B, C, ...]` (or time at `time_dim`), float16, bfloat16, float32 or float64; the channels are the
            second dimension except time.
        running_mean, running_var: `[C]`, in units of x_seq and their square; used in evaluation, updated in training if
            they are given, which they can't be where they share memory. They have no gradient.
        weight, bias: `[C]`; default 1 and 0.
        training: normalise by mean and variance of x_seq, each over all dimensions except the channels, instead of
            running_mean and running_var.
        momentum: how much of the running statistics a call in training replaces: a float, or a tensor of one value.
        eps: added to the variance, >= 0.
        input_scale: factor on the normalised input; `alpha * v_threshold` for the tdBN of Zheng et al., AAAI 2021.
        process_group: in training, share the statistics with these processes, as `torch.nn.SyncBatchNorm` does; all
            must call. "world": with all there are, none where torch.distributed is not initialised.

    The other arguments, what is returned and what is raised are as in `asgl_cuda.lif`. Differentiable once, also
    with respect to weight and bias. Statistics are of float64, from sums that do not cancel, and nothing is rounded
    between the two layers: a float16 input of mean 100 and deviation 0.1 is normalised as its values say.

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
    check_keywords(neuron, NeuronArguments.__annotations__, _CALLER)
    if isinstance(momentum, Tensor) and momentum.is_floating_point() and momentum.dim() == 0 and can_be_seen(momentum):
        check_finite("momentum", momentum.item(), _CALLER, "a float or a tensor")
    running = running_mean, running_var, None
    options = training, momentum, eps, input_scale, process_group
    return _batch_norm_lif(x_seq, running, weight, bias, *options, Arguments(**{**NEURON_DEFAULTS, **neuron}))


def _batch_norm_lif(
    x_seq: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    input_scale: float,
    process_group: Any,
    given: Arguments,
) -> Tensor | LIFOutput:
    """The same; `running` has the number of batches as well, None where it is not counted."""
    running_mean, running_var, count = running
    values = (x_seq, running_mean, running_var, weight, bias, momentum)
    channel, eps, input_scale = _norm_plan_of(_CALLER, values, (training, eps, input_scale, given.time_dim))
    group = _sharing(process_group) if training else None
    scalar, real = x_seq.dtype, real_type(x_seq.dtype)
    in_one_launch = False
    if running_mean is not None and running_var is not None:
        in_one_launch = training and _in_one_launch(running, momentum, real)
        _check_running(running_mean, running_var, training, in_one_launch)
    if training and group is None and x_seq.numel() == 0:  # counts as a batch, and leaves the statistics, as in torch
        training, in_one_launch, running_mean = False, False, x_seq.new_zeros(x_seq.shape[channel], dtype=real)
        running_var = torch.ones_like(running_mean)
        if count is not None:
            count.add_(1)
    if training:
        channels = x_seq.shape[channel]
        if group is None and x_seq.numel() <= channels:
            raise ValueError(
                f"{_CALLER}: training needs more than one value a channel, got x_seq of shape {list(x_seq.shape)}"
            )
        if scalar in HALF_TYPES and x_seq.numel() <= _FEW * channels:
            x_seq = x_seq.to(torch.float32)
    call = checked_call(_CALLER, x_seq, given)
    settings = _Settings(channel, eps, input_scale, group)
    mean, variance = (None, None) if training else (running_mean, running_var)
    of_norm = [
        value if value is None or value.dtype is real else value.to(real) for value in (weight, bias, mean, variance)
    ]
    outputs: Sequence[Tensor]
    if BACKENDS[call.backend].operators is None:
        outputs, *statistics = _reference(settings, call, of_norm)
    else:
        options, tensors = call[:4], (*call[4:7], *call.parameters)
        if is_differentiated((*tensors, *of_norm), _CALLER):
            *outputs, coefficients, _ = apply(BatchNormLIFFunction, settings, *of_norm, *options, *tensors)
        else:
            outputs, coefficients, _ = _forward(settings, call, of_norm, False)
        if in_one_launch:
            call.operators.batch_norm_update(*running, coefficients, momentum)
            # torch does it for its own operations alone.
            torch.autograd.graph.increment_version([each for each in running if each is not None])
            statistics = []
        else:
            statistics = [coefficients[0], coefficients[3]]
    if training and running_mean is not None and statistics:
        _update(running, statistics, momentum)
    output = call.output(outputs)
    if scalar == x_seq.dtype:
        return output
    return output._replace(s_seq=output.s_seq.to(scalar)) if isinstance(output, LIFOutput) else output.to(scalar)


@once_a_kind
def _norm_plan_of(caller: str, values: Sequence[Any], options: Sequence[Any]) -> tuple[int, float, float]:
    """Checks the arguments of the normalisation; gives the dimension of the channels, eps and input_scale."""
    x_seq, running_mean, running_var, weight, bias, momentum = values
    training, eps, input_scale, time_dim = options
    time_dim = check_input(x_seq, time_dim, caller)
    check_bool("training", training, caller)
    channel = channel_dim(time_dim)
    if channel >= x_seq.dim():
        raise ValueError(
            f"{caller}: x_seq must have a dimension of channels, the second but time, got shape {list(x_seq.shape)} "
            f"with time_dim {time_dim}; is time missing?"
        )
    channels = x_seq.shape[channel]
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{caller}: running_mean and running_var must both be given or both be None, got one of them")
    if not training and running_mean is None:
        raise ValueError(f"{caller}: evaluation (training=False) needs running_mean and running_var, got None")
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, value in named.items():
        if value is None:
            continue
        check_floating(name, value, caller)
        check_dense(name, value, caller)
        if list(value.shape) != [channels]:
            raise ValueError(
                f"{caller}: {name} must have shape {[channels]} for x_seq of shape {list(x_seq.shape)}, "
                f"got {list(value.shape)}: {expected_shape(x_seq, time_dim, value.shape or (1,), True)}"
            )
        check_device(name, value, x_seq, caller)
    if isinstance(momentum, Tensor):
        check_floating("momentum", momentum, caller)
        check_dense("momentum", momentum, caller)
        if momentum.numel() != 1:
            raise ValueError(
                f"{caller}: momentum must be a float or a tensor of one value, got a tensor of shape "
                f"{list(momentum.shape)}"
            )
        check_device("momentum", momentum, x_seq, caller)
    else:
        check_finite("momentum", momentum, caller, "a float or a tensor")
    eps = check_finite("eps", eps, caller)
    if eps < 0:
        raise ValueError(f"{caller}: eps must be >= 0, got {eps}")
    return channel, eps, check_not_nan("input_scale", input_scale, caller)


def _check_running(mean: Tensor, variance: Tensor, training: bool, in_one_launch: bool) -> None:
    """Refuses running statistics whose gradient would be missing, or that can't be written one after the other."""
    if (mean.requires_grad or variance.requires_grad) and torch.is_grad_enabled():
        name = "running_mean" if mean.requires_grad else "running_var"
        raise ValueError(f"{_CALLER}: {name} has no gradient and must not require one; {name}.detach() can be taken")
    if not training or torch.compiler.is_compiling() or transforming() or type(mean) not in PLAIN_TENSORS:
        return
    if in_one_launch and abs(mean.data_ptr() - variance.data_ptr()) >= mean.numel() * mean.element_size():
        return
    addresses = []
    for name, value in (("running_mean", mean), ("running_var", variance)):
        step = value.stride(0) * value.element_size()
        if step == 0 and value.numel() > 1:
            raise ValueError(
                f"{_CALLER}: {name} is written in training and must have memory for each channel, got an expanded "
                f"tensor; {name}.clone() has it"
            )
        start = value.data_ptr()
        addresses.append({start + step * place for place in range(value.numel() if start else 0)})
    if not addresses[0].isdisjoint(addresses[1]):
        raise ValueError(
            f"{_CALLER}: running_mean and running_var are written in training and must not share memory; "
            "running_var.clone() has its own"
        )


def _in_one_launch(
    running: tuple[Tensor | None, Tensor | None, Tensor | None], momentum: float | Tensor, real: torch.dtype
) -> bool:
    """Whether the operator takes the running statistics. A compiler does better with torch's own operations."""
    mean, variance, _ = running
    assert mean is not None
    assert variance is not None
    return (
        not isinstance(momentum, Tensor)
        and not torch.compiler.is_compiling()
        and not transforming()
        and mean.dtype == variance.dtype == real
        and mean.is_contiguous()
        and variance.is_contiguous()
    )


@torch.no_grad()
def _update(
    running: tuple[Tensor | None, Tensor | None, Tensor | None], values: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """Replaces a share of the running mean and variance, and counts the batch."""
    *statistics, count = running
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        mean, variance, _ = running
        if (mean is not None and mean.is_inference()) or (variance is not None and variance.is_inference()):
            raise ValueError(
                f"{_CALLER}: running statistics that were made in inference mode can't be updated outside of it; "
                "their clone() can"
            )
    if isinstance(momentum, Tensor) and momentum.dim():
        momentum = momentum.reshape(())
    for each, value in zip(statistics, values, strict=True):
        assert each is not None
        share = momentum.to(each.dtype) if isinstance(momentum, Tensor) else momentum
        value = detached(value).to(each.dtype).reshape(each.shape)
        if transforming():  # vmap knows lerp alone
            each.copy_(each.lerp(value, share))
        else:
            each.lerp_(value, share)
    if count is not None:
        count.add_(1)


def _reference(
    settings: _Settings, call: Call, of_norm: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """The outputs of the neuron, and mean and unbiased variance of each channel."""
    weight, bias, mean, variance = of_norm
    real = real_type(call.x_seq.dtype)
    unbiased = variance
    if mean is None or variance is None:
        count, mean, variance = batch_statistics(call.x_seq, settings.channel, settings.group)
        _check_shared_count(count, settings, call.x_seq)
        unbiased = variance * (count / (count - 1))
    assert unbiased is not None
    gain, shift, rounded = normalisation(mean, variance, weight, bias, settings.eps, settings.input_scale, real)
    coefficients = (by_channel(value, settings.channel, call.x_seq) for value in (rounded, gain, shift))
    return _normalised(call, tuple(coefficients)).reference(), mean, unbiased


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
    """`batch_norm_lif` with what a module holds that has the attributes and the rules of `torch.nn.BatchNorm2d`.

    `weight` and `bias` are the module's, or made of them. Without `update` the running statistics stay.
    """
    training, running_mean = norm.training, norm.running_mean
    uses_batch = training or running_mean is None
    update = update and training and norm.track_running_stats
    momentum, count = norm.momentum, norm.num_batches_tracked if update else None
    if momentum is None:  # the average of all batches
        momentum = 1 / (norm.num_batches_tracked + 1) if update else 0.0
    running = (running_mean, norm.running_var, count) if update or not uses_batch else (None, None, None)
    return _batch_norm_lif(
        x_seq, running, weight, bias, uses_batch, momentum, norm.eps, input_scale, process_group, given
    )
