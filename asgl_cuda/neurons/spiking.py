"""The fused neuron as a layer, without and with batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ..calls.plan import FLAGS, Arguments, LIFOutput, computed
from ..checks import (
    check_bool,
    check_finite,
    check_input,
    check_keywords,
    check_levels,
    check_options,
    check_rules,
    check_sizes,
    check_threshold,
    check_width,
    expected_shape,
    in_range,
    least_and_most,
    optional,
    read_finite,
    read_number,
    shown,
    warn_once,
)
from ..layout import channel_dim
from ..reference.learned import BOUND, Logarithm
from .base import Granularity, NeuronLayer, Noisy, Value, fill_parameter, give_dimension, values_shown
from .batch_norm_lif import check_process_group, module_batch_norm_lif
from .deferred import Pending, tensor_of

_LEAST_WIDTH, _LARGEST_WIDTH = math.exp(-BOUND), math.exp(BOUND)

_OF_RESET = "v_reset", "reset_amount"
_LEARNS = dict.fromkeys(("learn_width", "learn_decay", "learn_threshold"), check_bool)


class Neurons(NeuronLayer, Noisy):
    """A layer of spiking neurons: width, decay and threshold, constant or learned, the reset, and the noise.

    Layers add options to `_options`: without, neurons emit one spike a step, of height 1, and have no floor.
    """

    _potentials: ClassVar[tuple[str, ...]] = ("v", "v_seq")
    _constants: ClassVar[tuple[str, ...]] = (*NeuronLayer._constants, "_width", "_v_threshold", *_OF_RESET)
    _options: ClassVar[dict[str, Callable[..., Any]]] = {
        **NeuronLayer._options,
        "surrogate_gain": read_finite,
        **dict.fromkeys(("strict_threshold", "detach_reset", "store_v_seq"), check_bool),
    }
    v_seq: Tensor | None
    v_reset: Tensor | float | None
    reset_amount: Tensor | float | None
    surrogate_gain: float
    strict_threshold: bool
    detach_reset: bool
    scale_output: bool
    multi_spike: bool
    levels: int | None
    v_min: float | None

    def _set_up_neurons(self, given: Mapping[str, Any]) -> None:
        """Checks the constructor's arguments, keeps options and makes parameters."""
        self.scale_output, self.multi_spike, self.levels, self.v_min = False, False, None, None
        self._set_up(given)
        for name in _OF_RESET:
            setattr(self, name, None if given[name] is None else self._read(name, given[name]))
        self.surrogate: str = given["surrogate"]
        check_rules(given, self._caller, self.levels, self.multi_spike)
        self._set_analog_prob(given["analog_prob"])
        learns = check_options(given, _LEARNS, self._caller)
        # [1] for a whole layer: torch's fully_shard refuses parameters without a dimension.
        empty = partial(torch.empty, self.num_features or 1, device=given["device"], dtype=given["dtype"])
        self.log_width = nn.Parameter(empty()) if learns["learn_width"] and not self._counts else None
        self.logit_decay = nn.Parameter(empty()) if learns["learn_decay"] else None
        self.threshold = nn.Parameter(empty()) if learns["learn_threshold"] else None
        self._set_width(given["width"])
        self._set_decay(given["decay"])
        self._set_threshold(given["v_threshold"])
        if self.surrogate_gain == 0:
            warn_once("surrogate_gain", f"{self._caller}: surrogate_gain 0 lets no gradient through the spikes")

    def reset_parameters(self) -> None:
        """Resets the learned parameters to the values last set, and clears potentials.

        For layers created on the device "meta" and moved by `to_empty`.
        """
        self.width, self.decay = self._width, self._decay
        fill_parameter(self.threshold, self._v_threshold)
        self.reset()

    @property
    def width(self) -> Tensor | float:
        """The width, in units of the input: a tensor of the granularity's shape, `[]` for "layer", if learned.

        With levels, the threshold.
        """
        return self._shown(self._values()[2 if self._counts else 0])

    @width.setter
    def width(self, value: Tensor | float) -> None:
        self._set_width(value)

    @property
    def _counts(self) -> bool:
        """Whether spikes are rounded potentials."""
        return self.levels is not None and not self.multi_spike

    def _set_width(self, value: Any) -> None:
        learned = self.log_width is not None
        found = self._read("width", value, self.log_width, "learn_width")
        for each in least_and_most(found):
            check_width(each, self._caller)
            if self._counts and each != 1:
                raise ValueError(f"{self._caller}: with levels the threshold is the width, got width {each}")
            if learned and not _LEAST_WIDTH <= each <= _LARGEST_WIDTH:
                raise ValueError(
                    f"{self._caller}: a learned width must be in [{_LEAST_WIDTH:.3g}, {_LARGEST_WIDTH:.3g}], got {each}"
                )
        self._width = found
        fill_parameter(self.log_width, found.double().log() if isinstance(found, Tensor) else math.log(found))

    @property
    def v_threshold(self) -> Tensor | float:
        """The threshold, in units of the input: a tensor of the granularity's shape, `[]` for "layer", if learned."""
        return self._shown(self._values()[2])

    @v_threshold.setter
    def v_threshold(self, value: Tensor | float) -> None:
        self._set_threshold(value)

    def _set_threshold(self, value: Any) -> None:
        found = self._read("v_threshold", value, self.threshold, "learn_threshold")
        for each in least_and_most(found):
            check_finite("v_threshold", each, self._caller)
        self._check_threshold(found)
        self._v_threshold = found
        fill_parameter(self.threshold, found)

    def _check_threshold(self, value: Tensor | float) -> None:
        """Refuses thresholds at which neurons fire forever, and warns of unusual ones."""
        caller, v_rest = self._caller, self.v_rest
        for name in ("v_reset", "v_min"):
            after = getattr(self, name)
            # Thresholds up to v_rest only warn, below.
            fires_on = after is not None and (after > v_rest) & (after >= value)
            if fires_on.any() if isinstance(fires_on, Tensor) else fires_on:
                raise ValueError(
                    f"{caller}: {name} must be below v_threshold, or a neuron that has fired does so again, got {name} "
                    f"{shown(after)} and v_threshold {shown(value)}"
                )
        several = "multi_spike" if self.multi_spike else "levels" if self._counts else ""
        least, _ = least_and_most(value)
        if several:
            check_threshold(least, several, caller)
        if self._fires(v_rest - least):
            message = f"v_threshold {least:g} is not above v_rest {v_rest:g}: neurons at rest fire without any input"
            warn_once("v_threshold", f"{caller}: {message}")
        elif self.v_reset is None:
            amount, _ = least_and_most(value if self.reset_amount is None else self.reset_amount)
            if amount <= 0:
                message = f"a spike takes {amount:g} off the potential, which does not fall below v_threshold"
                warn_once("reset_amount", f"{caller}: {message}")

    def _fires(self, u: Any) -> Any:
        """Whether neurons whose potential is `u` above the threshold fire."""
        return u > 0 if self.strict_threshold else u >= 0

    def _values(self) -> tuple[Value, Value, Value]:
        """Width, decay and threshold: constants, or learned, in the shape of the parameters."""
        log_width, threshold = self.log_width, self.threshold  # 0.7 us each
        return (
            self._width if log_width is None else Logarithm(log_width),
            self._decay_value(),
            self._v_threshold if threshold is None else threshold,
        )

    def _given(
        self,
        x_seq: Tensor,
        input_gain: float = 1.0,
        v_init: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_v_last: bool = False,
        return_v_seq: bool = False,
        return_h_seq: bool = False,
        residual: Tensor | None = None,
    ) -> Arguments:
        """The arguments of `asgl_cuda.lif`: the layer's and the given ones."""
        values: Sequence[Any] = *self._values(), self.v_reset, self.reset_amount
        if self.num_features:
            time_dim = self._check_features(x_seq)
            values = [self._broadcast(value, x_seq, time_dim) for value in values]
        width, decay, v_threshold, v_reset, reset_amount = values
        return {
            "decay": decay, "v_threshold": v_threshold, "v_reset": v_reset, "reset_amount": reset_amount,
            "v_rest": self.v_rest, "width": width, "surrogate": self.surrogate, "surrogate_gain": self.surrogate_gain,
            "analog_prob": self.analog_prob_of_call(x_seq), "rng_state": None, "generator": generator,
            "input_gain": input_gain, "input_bias": 0.0, "input_mean": 0.0, "residual": residual,
            "residual_gain": 1.0 if residual is None else input_gain, "strict_threshold": self.strict_threshold,
            "scale_output": self.scale_output, "detach_reset": self.detach_reset, "levels": self.levels,
            "multi_spike": self.multi_spike, "v_min": self.v_min, "v_init": v_init, "time_dim": self.time_dim,
            "return_v_last": return_v_last, "return_v_seq": return_v_seq, "return_h_seq": return_h_seq,
            "backend": self.backend,
        }  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *options: Any) -> None:
        if not self.num_features:
            give_dimension(state_dict, prefix, "log_width", "logit_decay", "threshold")
        super()._load_from_state_dict(state_dict, prefix, *options)

    def extra_repr(self) -> str:
        learned = {"width": self.log_width, "decay": self.logit_decay, "v_threshold": self.threshold}
        surrogate = f"surrogate={self.surrogate}, "
        if self._counts:
            del learned["width"]
            surrogate = ""
        features = f"{list(self.num_features)}, " if self.num_features else ""
        parts = [f"{name}={values_shown(getattr(self, '_' + name), parameter)}" for name, parameter in learned.items()]
        v_reset = self.v_reset
        parts.append(f"v_reset={values_shown(v_reset) if isinstance(v_reset, Tensor) else v_reset}")
        parts.append(f"{surrogate}analog_prob={self.analog_prob:g}, granularity={self.granularity}")
        if self.reset_amount is not None:
            parts.append(f"reset_amount={values_shown(self.reset_amount)}")
        defaults = {"v_min": None, "v_rest": 0.0, "input_gain": 1.0, "surrogate_gain": 1.0}
        parts.extend(f"{name}={value:g}" for name in defaults if (value := getattr(self, name)) != defaults[name])
        if self.levels is not None:
            parts.append(f"levels={self.levels}")
        parts.extend(f"{flag}=True" for flag in (*FLAGS, "stateful", "store_v_seq") if getattr(self, flag))
        if self.time_dim:
            parts.append(f"time_dim={self.time_dim}")
        return features + ", ".join(parts)


class LIF(Neurons):
    """Leaky integrate-and-fire neurons with adaptive smoothing gradients, over all time steps in one call.

    Args:
        num_features: number of channels for granularity "channel"; number of neurons, or their shape `[C, H, W]`, for
            "neuron"; None for "layer".
        decay: fraction of the potential that is left after a step, in [0, 1]. A learned decay must be in (0, 1), and is
            stored as a logit. For long sequences with decay > 2 / 3 see `detach_reset`.
        v_threshold, v_rest: threshold and resting potential, in units of the input.
        v_reset: potential after a spike, below the threshold; or None to subtract `reset_amount` instead (soft reset).
        reset_amount: amount that a spike subtracts under the soft reset; default the threshold.
        input_gain: factor on the input.
        width: initial width of the surrogate, > 0. Its logarithm is stored.
        surrogate: the name of a surrogate, see `asgl_cuda.lif`.
        surrogate_gain: factor on the surrogate gradient.
        analog_prob: fraction of elements that emit the smooth value in training; in evaluation all spikes are hard. The
            default is 0.2, as in the paper, while it is 0 in the function `asgl_cuda.lif`.
        granularity: whether a learned parameter has one value per layer, per channel or per neuron.
        learn_width, learn_decay, learn_threshold: which of these are parameters; the others are constants.
        strict_threshold: fire above the threshold, not at it.
        detach_reset: stop the gradient that flows through the spike in the reset. Under the hard reset and with a
            rectangle, this path multiplies the gradient at each step with a spike by up to
            `decay * (v_threshold - v_reset + width / 2) / width`. If this is above 1, as for decay > 2 / 3 with the
            other defaults, gradients can explode over many steps. `Monitor` measures the growth.
        scale_output: emit `v_threshold` instead of 1 for a spike, and with levels `1 / levels`.
        levels: emit up to `levels` spikes per step, rounded (I-LIF). `v_reset` must be None. No width is learned,
            because the threshold takes its place. With multi_spike, levels only limits the number of spikes.
        multi_spike: emit several spikes per step. `v_reset` must be None, and `analog_prob` 0 at all times.
        v_min: lower bound of the potential after the reset, in units of the input; None for no bound.
        stateful: carry the potential from call to call, as `v`, until `reset()` or `asgl_cuda.reset(model)`. Not for
            activation checkpointing, which calls the layer twice. `step(x_t)`, one step without the time dimension,
            always carries `v`.
        store_v_seq: store the potentials after the reset of the last call as `v_seq`, in the shape of the input.
        time_dim: time dimension of inputs.
        backend: see `asgl_cuda.lif`.
        device, dtype: of the parameters.

    A float may also be given as a tensor of one value. With granularity "channel" or "neuron", `width`, `decay`,
    `v_threshold`, `v_reset` and `reset_amount` may be tensors of shape `num_features`, learned or not. A tensor that
    requires a gradient, such as a Parameter, is accepted only for a learned parameter, as its initial value. `width`,
    `decay` and `v_threshold` can be read and set at any time. A learned width or decay has the same bits in every
    backend; they equal those of `torch.exp` and `torch.sigmoid` up to the last bits.

    Shapes: input and output are `[T, N, ...]`, or have time at `time_dim`. After removing time, the second dimension is
    the channels, and the last dimensions are the neurons.

    `layer(x_seq, residual)` computes `layer(x_seq + residual)` without the sum in memory. `residual` must have the
    shape and type of x_seq.

    A state dict has only the learned parameters, `log_width`, `logit_decay` and `threshold`. As in torch's layers, it
    has no constants, flags, `analog_prob` or potentials, so it loads without a warning into a layer with another
    constant decay. `AnalogProbSchedule.state_dict()` has the noise.

    SpikingJelly's `LIFNode(tau=tau)` has `decay=1 - 1 / tau, input_gain=1 / tau`.

    Processes with the same seed draw the same noise. Call `torch.manual_seed(seed + rank)` after creating the model to
    give each process its own noise.

    Raises ValueError or TypeError for arguments out of range, and otherwise the errors of `asgl_cuda.lif`. Warns once
    per process if neurons fire at rest (`v_threshold` at `v_rest` or below), if a soft reset does not lower the
    potential, or if `surrogate_gain` is 0.

    Example::

        model = nn.Sequential(
            nn.Linear(64, 128),
            asgl_cuda.LIF(decay=0.9),  # one learned width
            nn.Linear(128, 128),
            asgl_cuda.LIF(128, granularity="channel", learn_decay=True),  # a width and a decay for each channel
        )
        s_seq = model(torch.randn(4, 32, 64))  # [T, B, 64] to [T, B, 128]

    The same in PyTorch: `asgl_cuda.lif(x_seq, width=log_width.exp(), ...)`, whose docstring has the loop.

    With torch's initial weights and without a normalisation, deeper layers are silent and learn nothing.
    :doc:`/tutorials/stalled-network` shows how `asgl_cuda.Monitor` finds them and `asgl_cuda.calibrate` helps.
    """

    _caller = "asgl_cuda.LIF"
    _function = "asgl_cuda.lif"
    _options: ClassVar[dict[str, Callable[..., Any]]] = {
        **dict.fromkeys(("multi_spike", "scale_output"), check_bool),
        "levels": optional(check_levels),
        "v_min": optional(read_finite),
        **Neurons._options,
    }

    def __init__(
        self,
        num_features: int | Sequence[int] | None = None,
        *,
        decay: Tensor | float = 0.5,
        v_threshold: Tensor | float = 1.0,
        v_reset: Tensor | float | None = 0.0,
        reset_amount: Tensor | float | None = None,
        v_rest: float = 0.0,
        input_gain: float = 1.0,
        width: Tensor | float = 1.0,
        surrogate: str = "rectangle",
        surrogate_gain: float = 1.0,
        analog_prob: float = 0.2,
        granularity: Granularity = "layer",
        learn_width: bool = True,
        learn_decay: bool = False,
        learn_threshold: bool = False,
        strict_threshold: bool = False,
        detach_reset: bool = False,
        scale_output: bool = False,
        levels: int | None = None,
        multi_spike: bool = False,
        v_min: float | None = None,
        stateful: bool = False,
        store_v_seq: bool = False,
        time_dim: int = 0,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        check_keywords(unknown, LIF.__init__.__kwdefaults__ or {}, self._caller)
        self._set_up_neurons(locals())

    def _inputs(self, x_seq: Tensor, residual: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        if residual is not None:
            residual = tensor_of(residual, type(self).__name__)
        if not isinstance(x_seq, Pending):
            return x_seq, {} if residual is None else {"residual": residual}
        name = type(self).__name__
        if residual is not None:
            if not isinstance(residual, Tensor) or (residual.shape, residual.dtype) != (x_seq.shape, x_seq.dtype):
                return x_seq.tensor(name), {"residual": residual}
            x_seq = x_seq + residual
        if isinstance(x_seq, Pending) and type(self)._compute is LIF._compute and type(self)._given is LIF._given:
            return x_seq.x, {"pending": x_seq}
        return tensor_of(x_seq, name), {}

    def _compute(
        self, x_seq: Tensor, update: bool = True, pending: Pending | None = None, **options: Any
    ) -> Tensor | LIFOutput:
        """Calls `asgl_cuda.lif`; without `update` the layer's state stays unchanged."""
        given = self._given(x_seq, self.input_gain, **options)
        caller = self._caller
        return computed(caller, x_seq, given) if pending is None else pending.lif(given, self, caller, update)


_NORM_OPTIONS = {
    "eps": in_range(read_finite, ">= 0", 0),
    "momentum": optional(in_range(read_number, "in [0, 1] or None", 0, 1)),
    "input_scale": read_finite,
    **dict.fromkeys(("affine", "track_running_stats"), check_bool),
}


def unknown_options(layer: NeuronLayer, known: Collection[str]) -> str:
    """The options in the layer's tables that are not `known` nor at their defaults, as `name=value`; "" without any.

    For all that represents a layer elsewhere, and would be silently wrong with an option of which it knows nothing.
    """
    names = {*layer._options, *(_NORM_OPTIONS if isinstance(layer, BatchNormLIF) else ())} - {*known}
    if not names:
        return ""
    parameters = {**signature(LIF.__init__).parameters, **signature(type(layer).__init__).parameters}
    found = []
    for name in sorted(names):
        default = parameters[name].default if name in parameters else None
        value = getattr(layer, name, default)
        if value is not default and (isinstance(value, Tensor) or value != default):
            found.append(f"{name}={shown(value)}")
    return ", ".join(found)


class BatchNormLIF(LIF):
    """Batch normalisation over time, batch and space, and the neurons of `LIF` after it: two layers in one.

    Args:
        num_features: number of channels; for granularity "neuron" the shape of the neurons, channels first.
        eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`.
        input_scale: factor on the normalised input; `alpha * v_threshold` for tdBN.
        process_group: the processes that share statistics in training, as in `torch.nn.SyncBatchNorm`; "world" means
            all processes that exist at each call. A layer with a group can't be copied or pickled; a layer with "world"
            can.
        device, dtype: of the parameters and the running statistics.
        lif_options: arguments of `LIF`, except `input_gain`.

    Parameters and buffers have the names of `torch.nn.BatchNorm2d` and `LIF`, so that
    `{**norm.state_dict(), **lif.state_dict()}` loads.

    The layer is not a subclass of torch's `_BatchNorm`, so functions for such layers skip it. Use
    `asgl_cuda.convert_sync_batchnorm` instead of `torch.nn.SyncBatchNorm.convert_sync_batchnorm`. Instead of
    `torch.optim.swa_utils.update_bn`, run the following, and then the batches in training mode without gradients::

        for layer in model.modules():
            if isinstance(layer, asgl_cuda.BatchNormLIF):
                layer.reset_running_stats()
                layer.momentum = None  # the average of all batches; restore it afterwards

    Shapes: input and output are `[T, B, C, ...]`, or have time at `time_dim`. Batch, channels and the rest keep their
    order.

    `layer(x_seq, residual)` adds the shortcut of a residual block between the normalisation and the neurons,
    `input_scale * y + residual`, without the sum in memory. `residual` must have the shape and type of x_seq.

    Inputs may be up to 1e15 in magnitude, 1e150 in float64. Larger inputs can give NaN or inaccurate gradients. With
    `eps=0` the deviation of a channel must be at least 1e-15, 1e-150 in float64.

    Raises the errors of `LIF` and of `asgl_cuda.batch_norm_lif`, whose docstring has the same in PyTorch.

    Example::

        block = nn.Sequential(nn.Linear(64, 128), asgl_cuda.BatchNormLIF(128, analog_prob=0.2))
        s_seq = block(torch.randn(4, 32, 64))  # [T, B, 64] to [T, B, 128]

        norm, neurons = nn.BatchNorm1d(128), asgl_cuda.LIF()  # as two layers; their checkpoint loads
        block[1].load_state_dict({**norm.state_dict(), **neurons.state_dict()})
    """

    _caller = "asgl_cuda.BatchNormLIF"
    _least_batch = 1
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
            raise TypeError(f"{caller}: input_gain is an argument of LIF; input_scale is the factor here")
        check_keywords(lif_options, {**(LIF.__init__.__kwdefaults__ or {}), "input_scale": 1.0}, caller)
        try:
            channels, *others = check_sizes("num_features", num_features, caller)
        except (TypeError, ValueError):
            raise ValueError(
                f"{caller}: num_features must be a number of channels or begin with it, got {shown(num_features)}"
            ) from None
        granularity = lif_options.get("granularity", "layer")
        in_layer = isinstance(granularity, str) and granularity == "layer"
        if in_layer and others:
            raise ValueError(f"{caller}: num_features must be one number for granularity 'layer', got {num_features}")
        own = dict(locals())
        super().__init__(None if in_layer else num_features, device=device, dtype=dtype, **lif_options)
        self.num_channels = channels
        self._keep(own, _NORM_OPTIONS)
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
        """Also resets the normalisation."""
        super().reset_parameters()
        self.reset_running_stats()
        fill_parameter(self.weight, 1.0)
        fill_parameter(self.bias, 0.0)

    def reset_running_stats(self) -> None:
        """Resets the running statistics, as `torch.nn.BatchNorm2d.reset_running_stats` does."""
        fill_parameter(self.running_mean, 0.0)
        fill_parameter(self.running_var, 1.0)
        fill_parameter(self.num_batches_tracked, 0)

    def _compute(
        self, x_seq: Tensor, update: bool = True, pending: Pending | None = None, **options: Any
    ) -> Tensor | LIFOutput:
        if self.weight is None and self.running_mean is None:
            self._check_channels(x_seq)
        return module_batch_norm_lif(
            self, x_seq, self._given(x_seq, **options), self.weight, self.bias, update, self.input_scale,
            self.process_group,
        )  # fmt: skip

    def _check_channels(self, x_seq: Tensor) -> None:
        """What `asgl_cuda.batch_norm_lif` does where it has tensors of the channels' size."""
        time_dim = check_input(x_seq, self.time_dim, self._caller)
        channel = channel_dim(time_dim)
        if x_seq.dim() > channel and x_seq.shape[channel] != self.num_channels:
            raise ValueError(
                f"{self._caller}: x_seq must have {self.num_channels} channels: "
                + expected_shape(x_seq, time_dim, (self.num_channels,), by_channel=True)
            )

    def extra_repr(self) -> str:
        parts = [f"{self.num_channels}", f"eps={self.eps:g}", f"momentum={self.momentum}"]
        parts += [f"{flag}=False" for flag in ("affine", "track_running_stats") if not getattr(self, flag)]
        if self.input_scale != 1:
            parts.append(f"input_scale={self.input_scale:g}")
        return ", ".join([*parts, super().extra_repr()])
