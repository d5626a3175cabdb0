"""A normalisation and the neurons behind it that are computed as one.

Both stay where they are, with their parameters, buffers and names: `fuse` puts a class before the class of each. The
normalisation then returns its input, and the neurons call `asgl_cuda.batch_norm_lif` with the values of both.

Where one of the two is exchanged, as `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does, the other would normalise a
second time, or not at all. So each looks at every call whether the other is where it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch_norm import NEURON_DEFAULTS, module_batch_norm_lif
from ..functional import Arguments, LIFOutput
from ..layout import channel_dim, real_type
from .converted import Overlay, bare_class, overlaid


class Place:
    """Where a module is below another one, which is neither kept alive nor copied by whoever knows the place."""

    def __init__(self, owner: nn.Module | None, path: str) -> None:
        self._owner: Callable[[], nn.Module | None] = (lambda: None) if owner is None else weakref.ref(owner)
        self.path = path

    def holds(self, sought: Callable[[Any], bool]) -> bool:
        """Whether it is there, or elsewhere in the owner, where it was moved or wrapped; True if the owner is gone."""
        owner = self._owner()
        if owner is None:
            return True
        found: nn.Module | None = owner
        for name in self.path.split("."):
            found = None if found is None else found._modules.get(name)
        return sought(found) or any(sought(module) for module in owner.modules())

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        return Place(memo.get(id(self._owner())), self.path)

    def __reduce__(self) -> Any:
        return Place, (self._owner(), self.path)


_REMEDY = "asgl_cuda.unfuse takes the pair apart, then asgl_cuda.fuse joins what is there"


class PassedThrough(Overlay):
    """A normalisation that the neurons behind it compute: it returns its input."""

    prefix = "Passed"

    neurons: Place

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_computed():
            raise RuntimeError(
                f"asgl_cuda.fuse: {self.original.__name__} is computed by the neurons that were at "
                f"{self.neurons.path}, which are not there any more: {_REMEDY}"
            )
        return input

    def is_computed(self) -> bool:
        """Whether the neurons are where they were."""
        return self.neurons.holds(lambda module: isinstance(module, Normalised) and module.normalisation.norm is self)

    def end_passing(self) -> None:
        """Becomes what it was before, with the values that it has now."""
        del self.neurons
        self.take_off()


class Normalisation(NamedTuple):
    """The normalisation that a layer of neurons computes. It is no module, so that the layer does not own it."""

    norm: Any
    place: Place
    converted: bool  # whether `fuse` converted the layer


class Normalised(Overlay):
    """Neurons that normalise their input: `asgl_cuda.LIF`, which calls `_lif`, or converted, which call `compute`."""

    prefix = "Normalised"

    normalisation: Normalisation

    def end_normalised(self) -> None:
        """Both become what they were before, with the values that they have now."""
        norm, _, converted = self.normalisation
        del self.normalisation
        if isinstance(norm, PassedThrough):
            norm.end_passing()
        self.take_off()
        if converted:
            self.end()

    def is_plain(self) -> bool:
        """It normalises."""
        return False

    def compute(
        self,
        x_seq: Tensor,
        time_dim: int = 0,
        input_gain: Tensor | float = 1.0,
        input_bias: Tensor | float = 0.0,
        update: bool = True,
        **options: Any,
    ) -> Tensor | LIFOutput:
        """`asgl_cuda.batch_norm_lif` of input_gain y + input_bias, with y the normalised input."""
        norm, at_norm, _ = self.normalisation
        if not at_norm.holds(lambda module: module is norm and isinstance(norm, PassedThrough)):
            raise RuntimeError(
                f"asgl_cuda.fuse: {self.original.__name__} computes the {bare_class(norm).__name__} that was at "
                f"{at_norm.path}, which is not there any more, and would normalise a second time: {_REMEDY}"
            )
        weight, bias, input_scale = norm.weight, norm.bias, 1.0
        if isinstance(input_gain, float) and input_bias == 0.0:
            input_scale = input_gain
        else:
            place = x_seq.dim() - channel_dim(time_dim % x_seq.dim())
            gain, shift = (self._of_channels(value, place, x_seq) for value in (input_gain, input_bias))
            weight = gain if weight is None else gain * weight.to(gain.dtype)
            bias = shift if bias is None else gain * bias.to(gain.dtype) + shift
        # None: this process alone.
        group = (norm.process_group or "world") if isinstance(norm, nn.SyncBatchNorm) else None
        given = Arguments(**{**NEURON_DEFAULTS, "time_dim": time_dim, **options})
        return module_batch_norm_lif(
            norm, x_seq, given=given, weight=weight, bias=bias, update=update, input_scale=input_scale,
            process_group=group,
        )  # fmt: skip

    def _lif(self, x_seq: Tensor, update: bool = True, **options: Any) -> Tensor | LIFOutput:
        return self.compute(x_seq, update=update, **self._given(x_seq, self.input_gain, **options)._asdict())

    def _of_channels(self, value: Tensor | float, place: int, x_seq: Tensor) -> Tensor:
        """The value as `[C]`; the channels are the dimension `place` from the last."""
        value = torch.as_tensor(value, dtype=real_type(x_seq.dtype), device=x_seq.device)
        if not varies_by_channel(value, place):
            raise ValueError(
                f"asgl_cuda.fuse: {self.original.__name__} has an input gain or bias of shape {list(value.shape)}, "
                f"which must be one value or one a channel to be fused with a normalisation, for {list(x_seq.shape)}"
            )
        return value.reshape(-1) if value.numel() > 1 else value.reshape(1).expand(self.normalisation.norm.num_features)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}normalised by {bare_class(self.normalisation.norm).__name__}"


def varies_by_channel(value: Tensor, place: int) -> bool:
    """Whether it is one value, or one for each index of the dimension `place` from the last."""
    varying = [value.dim() - dim for dim, size in enumerate(value.shape) if size != 1]
    return varying in ([], [place])


def join(layer: Any, place: Place, normalisation: Normalisation) -> None:
    """The layer, a LIF or converted, at `place` computes the normalisation, which returns its input from now on."""
    norm = normalisation.norm
    layer.__class__ = overlaid(Normalised, type(layer))
    layer.normalisation = normalisation
    norm.__class__ = overlaid(PassedThrough, type(norm))
    norm.neurons = place
