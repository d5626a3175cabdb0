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

from .backends import BACKENDS
from .checks import HALF_TYPES, check_bool, check_device, check_floating, check_input, check_not_nan
from .functional import Call, LIFOutput, NeuronArguments, checked_call, lif, once_differentiable, unasked
from .layout import by_channel, channel_dim, real_type
from .ops import ForwardResult
from .reference import Parameters, batch_statistics, normalisation
from .transforms import apply, is_differentiated, transforming

_CALLER = "asgl_cuda.batch_norm_lif"
_NEURON_DEFAULTS = lif.__kwdefaults__ or {}

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
        weight, bias, mean, variance, *call = inputs
        result, coefficients, statistics = _forward(settings, Call.of(*call), (weight, bias, mean, variance), True)
        return *result, coefficients, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, _, _, mean, _, ctx.backend, ctx.numbers, ctx.rules, ctx.wanted, *tensors = inputs
        *_, checkpoints, coefficients, statistics = output
        ctx.training = mean is None
        ctx.save_for_backward(checkpoints, coefficients, statistics, *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*unasked(output, ctx.wanted), checkpoints, coefficients, statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        checkpoints, coefficients, statistics, *tensors = ctx.saved_tensors
        settings, grads = ctx.settings, grads[:4]
        call = Call.of(ctx.backend, ctx.numbers, ctx.rules, ctx.wanted, *tensors)
        _, wants_weight, wants_bias, _, _, _, _, _, _, wants_x_seq, wants_v_init, _, *needed = ctx.needs_input_grad
        wants_sums = wants_weight or wants_bias or (wants_x_seq and ctx.training)
        wanted = Parameters(*needed)._replace(input_gain=wants_sums, input_bias=wants_sums)
        of_x_seq, of_v_init, of_parameters = _normalised(call, settings.channel, coefficients.unbind()).backward(
            grads, checkpoints, (wants_x_seq, wants_v_init, *wanted)
        )
        of_weight = of_bias = call.x_seq.new_empty(0)
        if wants_sums:
            of_input = Parameters(*of_parameters)
            sums = of_input.input_gain.flatten(), of_input.input_bias.flatten()
            of_weight, of_bias = call.operators.batch_norm_backward(
                of_x_seq if wants_x_seq and ctx.training else call.x_seq.new_empty(0), call.x_seq, coefficients,
                statistics, *sums, *_summed(sums, settings.group), settings.eps, settings.input_scale,
                call.rules.time_dim,
            )  # fmt: skip
        gradients = once_differentiable(
            (of_weight, of_bias, of_x_seq, of_v_init, *of_parameters),
            (call.x_seq, call.v_init, *call.parameters, *grads),
        )
        asked = (wants_weight, wants_bias, wants_x_seq, wants_v_init, *needed)
        grad_weight, grad_bias, grad_x_seq, grad_v_init, *grad_parameters = (
            grad if wants else None for grad, wants in zip(gradients, asked, strict=True)
        )
        nothing = (None,) * 4
        return None, grad_weight, grad_bias, None, None, *nothing, grad_x_seq, grad_v_init, None, *grad_parameters


def _forward(
    settings: _Settings, call: Call, of_norm: Sequence[Tensor | None], keep_checkpoints: bool
) -> tuple[ForwardResult, Tensor, Tensor]:
    """The result of the neuron, the coefficients, and number, mean and variance of each channel."""
    weight, bias, mean, variance = of_norm

    def coefficients_of(statistics: Tensor | None) -> tuple[Tensor, Tensor]:
        return call.operators.batch_norm_coefficients(
            call.x_seq, statistics, mean, variance, weight, bias, settings.eps, settings.input_scale,
            call.rules.time_dim,
        )  # fmt: skip

    coefficients, statistics = coefficients_of(None)
    if settings.group is not None:
        parts = [torch.empty_like(statistics) for _ in range(torch.distributed.get_world_size(settings.group))]
        torch.distributed.all_gather(parts, statistics, group=settings.group)
        coefficients, statistics = coefficients_of(torch.stack(parts))
        _check_shared_count(statistics[:1, 0], settings, call.x_seq)
    normalised = _normalised(call, settings.channel, coefficients.unbind())
    return normalised.forward(keep_checkpoints), coefficients, statistics


def _normalised(call: Call, channel: int, coefficients: Sequence[Tensor]) -> Call:
    """The call for neurons whose input is normalised by these, of which mean, gain and bias come first."""
    mean, gain, bias = (by_channel(value, channel, call.x_seq) for value in coefficients[:3])
    return call._replace(parameters=call.parameters._replace(input_gain=gain, input_bias=bias, input_mean=mean))


def _check_shared_count(count: Tensor, settings: _Settings, x_seq: Tensor) -> None:
    """Raises where all processes together have one value a channel, which is looked up only where it may be so."""
    if x_seq.numel() <= x_seq.shape[settings.channel] and bool((count <= 1).any()):
        raise ValueError(
            f"{_CALLER}: training needs more than one value a channel, got one in all processes, here x_seq of shape "
            f"{list(x_seq.shape)}"
        )


def _sharing(process_group: Any) -> Any:
    """The group if there is more than one process in it, else None."""
    if process_group is None:
        return None
    if process_group == "world":
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        process_group = torch.distributed.group.WORLD
    elif not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f'{_CALLER}: process_group must be a process group that this process is in, "world" or None, '
            f"got {process_group!r}"
        )
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
            they are given.
        weight, bias: `[C]`; default 1 and 0.
        training: normalise by mean and variance of x_seq, each over all dimensions except the channels, instead of
            running_mean and running_var.
        momentum: how much of the running statistics a call in training replaces: a float, or a tensor of one value.
        eps: added to the variance.
        input_scale: factor on the normalised input; `alpha * v_threshold` for the tdBN of Zheng et al., AAAI 2021.
        process_group: in training, share the statistics with these processes, as `torch.nn.SyncBatchNorm` does; all
            must call. "world": with all there are, none where torch.distributed is not initialised.

    The other arguments, what is returned and what is raised are as in `asgl_cuda.lif`. Differentiable once, also
    with respect to weight and bias. Statistics are of float64, from sums that do not cancel, and nothing is rounded
    between the two layers: a float16 input of mean 100 and deviation 0.1 is normalised as its values say.

    Source of the normalisation: Ioffe, Szegedy: Batch Normalization, ICML 2015.

    The same in PyTorch, time first::

        y = torch.nn.functional.batch_norm(
            x_seq.flatten(0, 1), running_mean, running_var, weight, bias, training, momentum, eps)
        s_seq = asgl_cuda.lif(input_scale * y.unflatten(0, x_seq.shape[:2]), ...)
    """
    for name in neuron:
        if name not in NeuronArguments.__annotations__:
            raise TypeError(f"{_CALLER}() got an unexpected keyword argument {name!r}")
    arguments: dict[str, Any] = {**_NEURON_DEFAULTS, **neuron}
    time_dim = check_input(x_seq, arguments["time_dim"], _CALLER)
    check_bool("training", training, _CALLER)
    channel = channel_dim(time_dim)
    if channel >= x_seq.dim():
        raise ValueError(
            f"{_CALLER}: x_seq must have a dimension of channels, the second but time, got shape {list(x_seq.shape)} "
            f"with time_dim {time_dim}"
        )
    channels = x_seq.shape[channel]
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{_CALLER}: running_mean and running_var must both be given or both be None, got one of them")
    if not training and running_mean is None:
        raise ValueError(f"{_CALLER}: evaluation (training=False) needs running_mean and running_var, got None")
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, value in named.items():
        if value is None:
            continue
        check_floating(name, value, _CALLER)
        if list(value.shape) != [channels]:
            raise ValueError(
                f"{_CALLER}: {name} must have shape {[channels]} for x_seq of shape {list(x_seq.shape)}, "
                f"got {list(value.shape)}"
            )
        check_device(name, value, x_seq, _CALLER)
    if not isinstance(momentum, Tensor):
        check_not_nan("momentum", momentum, _CALLER, "a float or a tensor")
    eps = check_not_nan("eps", eps, _CALLER)
    input_scale = check_not_nan("input_scale", input_scale, _CALLER)
    group = _sharing(process_group) if training else None
    if training and group is None and x_seq.numel() <= channels:
        raise ValueError(
            f"{_CALLER}: training needs more than one value a channel, got x_seq of shape {list(x_seq.shape)}"
        )
    scalar = x_seq.dtype
    if training and scalar in HALF_TYPES and x_seq.numel() <= _FEW * channels:
        x_seq = x_seq.to(torch.float32)
    call = checked_call(_CALLER, x_seq, **arguments)
    settings = _Settings(channel, eps, input_scale, group)
    real = real_type(x_seq.dtype)
    weight, bias = (None if value is None else value.to(real) for value in (weight, bias))
    mean = variance = None
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, variance = running_mean.to(real), running_var.to(real)

    of_norm = weight, bias, mean, variance
    outputs: Sequence[Tensor]
    if BACKENDS[call.backend].operators is None:
        outputs, batch_mean, batch_variance = _reference(settings, call, of_norm)
    else:
        *others, parameters = call
        if is_differentiated((call.x_seq, call.v_init, call.rng_state, *of_norm, *parameters), _CALLER):
            outputs = apply(BatchNormLIFFunction, settings, *of_norm, *others, *parameters)
            *_, coefficients, _ = outputs
        else:
            outputs, coefficients, _ = _forward(settings, call, of_norm, False)
        batch_mean, _, _, batch_variance = coefficients.unbind()
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            for running, value in ((running_mean, batch_mean), (running_var, batch_variance)):
                share = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
                value = value.detach().to(running.dtype)
                if transforming():  # vmap knows lerp alone
                    running.copy_(running.lerp(value, share))
                else:
                    running.lerp_(value, share)
    return call.output((outputs[0].to(scalar), *outputs[1:]))


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
    return _normalised(call, settings.channel, (rounded, gain, shift)).reference(), mean, unbiased


def module_batch_norm_lif(
    norm: Any, x_seq: Tensor, *, weight: Tensor | None, bias: Tensor | None, update: bool = True, **options: Any
) -> Tensor | LIFOutput:
    """`batch_norm_lif` with what a module holds that has the attributes and the rules of `torch.nn.BatchNorm2d`.

    `weight` and `bias` are the module's, or made of them. Without `update` the running statistics stay.
    """
    uses_batch = norm.training or norm.running_mean is None
    update = update and norm.training and norm.track_running_stats
    momentum = norm.momentum
    if update and momentum is None:  # the average of all batches
        momentum = 1 / (norm.num_batches_tracked + 1)
    running = update or not uses_batch
    result = batch_norm_lif(
        x_seq,
        norm.running_mean if running else None,
        norm.running_var if running else None,
        weight,
        bias,
        training=uses_batch,
        momentum=0.0 if momentum is None else momentum,
        eps=norm.eps,
        **options,
    )
    if update and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return result
