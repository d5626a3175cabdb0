"""The fused neuron as a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .functional import LIFOutput, lif
from .surrogate import SURROGATES

Granularity = Literal["layer", "channel", "neuron"]


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
        stateful: carry the potential from call to call until `reset()`.
        time_dim: where time is in the input.
        backend: see `asgl_cuda.lif`.

    Shapes: input and output `[T, N, ...]`, or with time at `time_dim`; the channels are the second dimension but time.
    Neurons are the last dimensions but time.

    Raises ValueError or TypeError for arguments out of range, and what `asgl_cuda.lif` raises.

    The same in PyTorch: `asgl_cuda.lif(x_seq, width=log_width.exp(), ...)`, whose docstring has the loop.
    """

    v: Tensor | None

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
        if surrogate not in SURROGATES:
            raise ValueError(f"asgl_cuda.LIF: surrogate must be one of {', '.join(SURROGATES)}, got {surrogate!r}")
        if not width > 0:
            raise ValueError(f"asgl_cuda.LIF: width must be > 0, got {width}")
        if learn_decay and not 0 < decay < 1:
            raise ValueError(f"asgl_cuda.LIF: a learned decay must be in (0, 1), got {decay}")
        if not 0 <= analog_prob <= 1:
            raise ValueError(f"asgl_cuda.LIF: analog_prob must be in [0, 1], got {analog_prob}")
        self.num_features = self._features(num_features, granularity)
        self.granularity = granularity
        self.v_reset = v_reset
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
        self.register_buffer("v", None, persistent=False)

    @staticmethod
    def _features(num_features: int | Sequence[int] | None, granularity: Granularity) -> tuple[int, ...]:
        if granularity == "layer":
            return ()
        sizes = (num_features,) if isinstance(num_features, int) else num_features
        if sizes is None or granularity == "channel" and len(sizes) != 1:
            wanted = "the number of channels" if granularity == "channel" else "the shape of the neurons"
            raise ValueError(f"asgl_cuda.LIF: granularity {granularity!r} needs num_features, {wanted}, got {num_features}")
        return tuple(sizes)

    def _parameter(self, value: float, learned: bool) -> nn.Parameter | None:
        return nn.Parameter(torch.full(self.num_features, float(value))) if learned else None

    @property
    def width(self) -> Tensor | float:
        """The width, in units of the input: a tensor of the granularity's shape if learned."""
        return self._width if self.log_width is None else self.log_width.exp()

    @property
    def decay(self) -> Tensor | float:
        """The decay per step: a tensor of the granularity's shape if learned."""
        return self._decay if self.logit_decay is None else self.logit_decay.sigmoid()

    @property
    def v_threshold(self) -> Tensor | float:
        """The threshold, in units of the input: a tensor of the granularity's shape if learned."""
        return self._v_threshold if self.threshold is None else self.threshold

    def forward(self, x_seq: Tensor) -> Tensor:
        time_dim = self.time_dim % x_seq.dim() if x_seq.dim() else 0
        if self.v is not None:
            shape = [size for dim, size in enumerate(x_seq.shape) if dim != time_dim]
            if list(self.v.shape) != shape:
                raise ValueError(
                    f"asgl_cuda.LIF: the carried potential has shape {list(self.v.shape)} and the input, without time, "
                    f"{shape}; call reset() before a batch of another shape"
                )
        result = lif(
            x_seq,
            decay=self._broadcast(self.decay, x_seq, time_dim),
            v_threshold=self._broadcast(self.v_threshold, x_seq, time_dim),
            v_reset=self.v_reset,
            width=self._broadcast(self.width, x_seq, time_dim),
            surrogate=self.surrogate,
            analog_prob=self.analog_prob if self.training else 0.0,
            scale_output=self.scale_output,
            detach_reset=self.detach_reset,
            v_init=self.v,
            time_dim=self.time_dim,
            return_v_last=self.stateful,
            backend=self.backend,
        )
        if isinstance(result, LIFOutput):
            self.v = result.v_last
            return result.s_seq
        return result

    def _broadcast(self, value: Tensor | float, x_seq: Tensor, time_dim: int) -> Tensor | float:
        """A parameter of the granularity's shape, reshaped to broadcast against x_seq."""
        if isinstance(value, float) or value.dim() == 0:
            return value
        neuron_dims = [dim for dim in range(x_seq.dim()) if dim != time_dim]
        dims = neuron_dims[1:2] if self.granularity == "channel" else neuron_dims[-value.dim() :]
        if [x_seq.shape[dim] for dim in dims] != list(self.num_features):
            raise ValueError(
                f"asgl_cuda.LIF: granularity {self.granularity!r} with num_features {list(self.num_features)} does not fit "
                f"an input of shape {list(x_seq.shape)} with time_dim {self.time_dim}"
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

    def __getstate__(self) -> dict[str, Any]:
        # A potential inside a graph can be neither copied nor pickled.
        state = self.__dict__.copy()
        state["_buffers"] = {name: None if buffer is None else buffer.detach() for name, buffer in self._buffers.items()}
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
        for flag in ("detach_reset", "scale_output", "stateful"):
            if getattr(self, flag):
                parts.append(f"{flag}=True")
        if self.time_dim:
            parts.append(f"time_dim={self.time_dim}")
        return features + ", ".join(parts)
