"""The fused neuron as a layer, without and with batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batch_norm import module_batch_norm_lif
from .checks import check_analog_prob, check_input, check_number, check_surrogate, check_time_dim, check_width
from .functional import LIFOutput, lif
from .reference import real_type, state_shape, with_gradient_of

_CALLER = "asgl_cuda.LIF"

Granularity = Literal["layer", "channel", "neuron"]


def bounded(value: Tensor) -> Tensor:
    """The value in float32, kept within 15 of 0 without stopping its gradient.

    exp and sigmoid then stay positive, finite and below 1, whatever an optimizer's step has done.
    """
    value = value.to(real_type(value.dtype))
    return with_gradient_of(value.detach().clamp(-15.0, 15.0), value)


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons with adaptive smoothing gradients, over all time steps in one call.

    Args:
        num_features: number of channels for granularity "channel", number of neurons or their shape `[C, H, W]` for
            "neuron"; not needed for "layer".
        decay: share of the potential that is left after a step, in (0, 1) if learned (kept as a logit).
        v_threshold: threshold, in units of the input.
        v_reset: potential after a spike, or None to subtract the threshold instead (soft reset).
        width: initial width of the surrogate, > 0 (kept as its logarithm).
        surrogate: rectangle, triangle, sigmoid, arctan, erf, fast_sigmoid or laplace.
        analog_prob: share of elements that emit the smooth value in training. In evaluation every element spikes hard.
        granularity: whether the learned parameters are one for the layer, one a channel or one a neuron.
        learn_width, learn_decay, learn_threshold: which of them are parameters; the others stay constants.
        detach_reset: let no gradient flow through the spike inside the reset.
        scale_output: emit `v_threshold` instead of 1 for a spike.
        stateful: carry the potential from call to call until `reset()`. Not for activation checkpointing, which calls
            twice.
        time_dim: where time is in the input.
        backend: see `asgl_cuda.lif`.

    Shapes: input and output `[T, N, ...]`, or with time at `time_dim`; the channels are the second dimension but time.
    Neurons are the last dimensions but time.

    Raises ValueError or TypeError for arguments out of range, and what `asgl_cuda.lif` raises.

    The same in PyTorch: `asgl_cuda.lif(x_seq, width=log_width.exp(), ...)`, whose docstring has the loop.
    """

    def __init__(
        self,
        num_features: int | Sequence[int] | None = None,
        *,
        decay: float = 0.5,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        width: float = 1.0,
        surrogate: str = "rectangle",
        analog_prob: float = 0.2,
        granularity: Granularity = "layer",
        learn_width: bool = True,
        learn_decay: bool = False,
        learn_threshold: bool = False,
        detach_reset: bool = False,
        scale_output: bool = False,
        stateful: bool = False,
        time_dim: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if granularity not in ("layer", "channel", "neuron"):
            raise ValueError(f"asgl_cuda.LIF: granularity must be layer, channel or neuron, got {granularity!r}")
        check_surrogate(surrogate, _CALLER)
        check_time_dim(time_dim, _CALLER)
        check_analog_prob(analog_prob, _CALLER)
        width = check_number("width", width, _CALLER)
        check_width(width, _CALLER)
        decay = check_number("decay", decay, _CALLER)
        if learn_decay and not 0 < decay < 1:
            raise ValueError(f"asgl_cuda.LIF: a learned decay must be in (0, 1), got {decay}")
        v_threshold = check_number("v_threshold", v_threshold, _CALLER)
        self.num_features = self._features(num_features, granularity)
        self.granularity = granularity
        self.v_reset = None if v_reset is None else check_number("v_reset", v_reset, _CALLER)
        self.surrogate = surrogate
        self.analog_prob = analog_prob
        self.detach_reset = detach_reset
        self.scale_output = scale_output
        self.stateful = stateful
        self.time_dim = time_dim
        self.backend = backend
        self._width, self._decay, self._v_threshold = width, decay, v_threshold
        self.log_width = self._parameter(math.log(width), learn_width)
        self.logit_decay = self._parameter(math.log(decay / (1 - decay)) if learn_decay else 0.0, learn_decay)
        self.threshold = self._parameter(v_threshold, learn_threshold)
        # Not a buffer: DistributedDataParallel would give every process the potentials of the first.
        self.v: Tensor | None = None

    @staticmethod
    def _features(num_features: int | Sequence[int] | None, granularity: Granularity) -> tuple[int, ...]:
        if granularity == "layer":
            return ()
        sizes = (num_features,) if isinstance(num_features, int) else num_features
        if sizes is not None and (not isinstance(sizes, Sequence) or any(not isinstance(size, int) for size in sizes)):
            raise TypeError(
                f"asgl_cuda.LIF: num_features must be an int or a sequence of ints, got {type(num_features).__name__}"
            )
        if sizes is not None and any(size < 1 for size in sizes):
            raise ValueError(f"asgl_cuda.LIF: num_features must be positive, got {num_features}")
        if sizes is None or (granularity == "channel" and len(sizes) != 1):
            wanted = "the number of channels" if granularity == "channel" else "the shape of the neurons"
            raise ValueError(
                f"asgl_cuda.LIF: granularity {granularity!r} needs num_features, {wanted}, got {num_features}"
            )
        return tuple(sizes)

    def _parameter(self, value: float, learned: bool) -> nn.Parameter | None:
        return nn.Parameter(torch.full(self.num_features, float(value))) if learned else None

    @property
    def width(self) -> Tensor | float:
        """The width, in units of the input: a tensor of the granularity's shape if learned."""
        return self._width if self.log_width is None else bounded(self.log_width).exp()

    @property
    def decay(self) -> Tensor | float:
        """The decay per step: a tensor of the granularity's shape if learned."""
        return self._decay if self.logit_decay is None else bounded(self.logit_decay).sigmoid()

    @property
    def v_threshold(self) -> Tensor | float:
        """The threshold, in units of the input: a tensor of the granularity's shape if learned."""
        return self._v_threshold if self.threshold is None else self.threshold

    def forward(self, x_seq: Tensor) -> Tensor:
        time_dim = check_input(x_seq, self.time_dim, _CALLER)
        if self.v is not None:
            shape = state_shape(x_seq, time_dim)
            if list(self.v.shape) != shape:
                raise ValueError(
                    f"asgl_cuda.LIF: the carried potential has shape {list(self.v.shape)} and the input, without time, "
                    f"{shape}; call reset() before a batch of another shape"
                )
        result = self._lif(x_seq, time_dim, v_init=self._carried(), return_v_last=self.stateful)
        if isinstance(result, LIFOutput):
            self.v = result.v_last
            return result.s_seq
        return result

    def _lif(self, x_seq: Tensor, time_dim: int, **options: Any) -> Tensor | LIFOutput:
        """`asgl_cuda.lif` with what the layer holds, but for the carried potential."""
        return lif(x_seq, **self._held(x_seq, time_dim), **options)

    def _lif_again(self, x_seq: Tensor, time_dim: int, **options: Any) -> Tensor | LIFOutput:
        """The same for a look at what a call did: changes nothing in the layer."""
        return self._lif(x_seq, time_dim, **options)

    def _held(self, x_seq: Tensor, time_dim: int) -> dict[str, Any]:
        """The arguments of `asgl_cuda.lif` that the layer holds."""
        return {
            "decay": self._broadcast(self.decay, x_seq, time_dim),
            "v_threshold": self._broadcast(self.v_threshold, x_seq, time_dim),
            "v_reset": self.v_reset,
            "width": self._broadcast(self.width, x_seq, time_dim),
            "surrogate": self.surrogate,
            "analog_prob": self.analog_prob if self.training else 0.0,
            "scale_output": self.scale_output,
            "detach_reset": self.detach_reset,
            "time_dim": self.time_dim,
            "backend": self.backend,
        }

    def _carried(self) -> Tensor | None:
        # A potential computed in inference mode can't take part in training; its copy can.
        if self.v is not None and not torch.compiler.is_compiling() and self.v.is_inference():
            return self.v if torch.is_inference_mode_enabled() else self.v.clone()
        return self.v

    def _broadcast(self, value: Tensor | float, x_seq: Tensor, time_dim: int) -> Tensor | float:
        """A parameter of the granularity's shape, reshaped to broadcast against x_seq."""
        if isinstance(value, float) or value.dim() == 0:
            return value
        neuron_dims = [dim for dim in range(x_seq.dim()) if dim != time_dim]
        dims = neuron_dims[1:2] if self.granularity == "channel" else neuron_dims[-value.dim() :]
        if [x_seq.shape[dim] for dim in dims] != list(self.num_features):
            raise ValueError(
                f"asgl_cuda.LIF: granularity {self.granularity!r} with num_features {list(self.num_features)} does not "
                f"fit an input of shape {list(x_seq.shape)} with time_dim {self.time_dim}"
            )
        shape = [1] * x_seq.dim()
        for dim, size in zip(dims, self.num_features, strict=True):
            shape[dim] = size
        return value.reshape(shape)

    def reset(self) -> None:
        """Forgets the carried potential: the next call starts at rest."""
        self.v = None

    def detach_(self) -> LIF:
        """Cuts the carried potential off its graph, for truncated backpropagation through time."""
        if self.v is not None:
            self.v = self.v.detach()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LIF:
        # .to(), .half() and the like move the carried potential as well.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.v is not None:
            self.v = fn(self.v)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A potential inside a graph can be neither copied nor pickled.
        state = self.__dict__.copy()
        state["v"] = None if self.v is None else self.v.detach()
        return state

    def extra_repr(self) -> str:
        learned = {"width": self.log_width, "decay": self.logit_decay, "v_threshold": self.threshold}
        features = f"{list(self.num_features)}, " if self.num_features else ""
        parts = [
            f"{name}={getattr(self, '_' + name):g}{' (learned)' if parameter is not None else ''}"
            for name, parameter in learned.items()
        ]
        parts.append(f"v_reset={self.v_reset}")
        parts.append(f"surrogate={self.surrogate}, analog_prob={self.analog_prob:g}, granularity={self.granularity}")
        parts.extend(f"{flag}=True" for flag in ("detach_reset", "scale_output", "stateful") if getattr(self, flag))
        if self.time_dim:
            parts.append(f"time_dim={self.time_dim}")
        return features + ", ".join(parts)


class BatchNormLIF(LIF):
    """Batch normalisation over time, batch and space, and the neurons of `LIF` behind it: two layers in one.

    Args:
        num_features: number of channels; for granularity "neuron" the shape of the neurons, channels first.
        eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`.
        input_scale: factor on the normalised input; `alpha * v_threshold` for tdBN.
        process_group: share the statistics of training with these processes, as `torch.nn.SyncBatchNorm` does; "world":
            with all there are when it is called. A layer with a group can't be copied or pickled, one with "world" can.
        lif_options: those of `LIF`.

    The parameters and buffers of the normalisation have the names that `torch.nn.BatchNorm2d` gives them, those of the
    neurons the names of `LIF`: `{**norm.state_dict(), **lif.state_dict()}` loads.

    Shapes: input and output `[T, B, C, ...]`, or with time at `time_dim`; the channels are the second dimension but
    time.

    Raises what `LIF` and `asgl_cuda.batch_norm_lif` raise; the docstring of the latter has the same in PyTorch.
    """

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
        **lif_options: Any,
    ) -> None:
        caller = "asgl_cuda.BatchNormLIF"
        channels = num_features if isinstance(num_features, int) else next(iter(num_features), 0)
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(
                f"{caller}: num_features must be a number of channels or begin with it, got {num_features!r}"
            )
        eps = check_number("eps", eps, caller)
        momentum = None if momentum is None else check_number("momentum", momentum, caller, "a float or None")
        input_scale = check_number("input_scale", input_scale, caller)
        super().__init__(num_features, **lif_options)
        self.num_channels = channels
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.input_scale = input_scale
        self.process_group = process_group
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(channels) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if track_running_stats else None)

    def _lif(self, x_seq: Tensor, time_dim: int, **options: Any) -> Tensor | LIFOutput:
        return module_batch_norm_lif(
            self,
            x_seq,
            weight=self.weight,
            bias=self.bias,
            input_scale=self.input_scale,
            process_group=self.process_group,
            **self._held(x_seq, time_dim),
            **options,
        )

    def _lif_again(self, x_seq: Tensor, time_dim: int, **options: Any) -> Tensor | LIFOutput:
        return self._lif(x_seq, time_dim, update=False, **options)

    def extra_repr(self) -> str:
        parts = [f"{self.num_channels}", f"eps={self.eps:g}", f"momentum={self.momentum}"]
        parts += [f"{flag}=False" for flag in ("affine", "track_running_stats") if not getattr(self, flag)]
        if self.input_scale != 1:
            parts.append(f"input_scale={self.input_scale:g}")
        return ", ".join([*parts, super().extra_repr()])
