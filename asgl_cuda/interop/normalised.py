"""A normalisation fused with the neurons behind it.

Both modules keep their paths, parameters, buffers and names: `fuse` puts a class before both classes. The
normalisation then returns its input, and the neurons call `asgl_cuda.batch_norm_lif` with both modules' values.

With one module replaced, as by `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, the pair would normalise twice or not
at all: each module checks in every call that its partner is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch_norm import module_batch_norm_lif
from ..call import Arguments, LIFOutput, grouped
from ..functional import LIF_DEFAULTS
from ..layout import channel_dim, real_type
from .converted import Overlay, bare_class, overlaid


class Place:
    """The path of a module below a weakly referenced owner, which is not copied."""

    def __init__(self, owner: nn.Module | None, path: str) -> None:
        self._owner: Callable[[], nn.Module | None] = (lambda: None) if owner is None else weakref.ref(owner)
        self.path = path

    def holds(self, sought: Callable[[Any], bool]) -> bool:
        """Whether the module is at the path or elsewhere in the owner; True if the owner is gone."""
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
    """A normalisation computed by the neurons behind it: returns its input."""

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
        """Whether the neurons still exist."""
        return self.neurons.holds(lambda module: isinstance(module, Normalised) and module.normalisation.norm is self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, computed by the neurons at {self.neurons.path}"

    def end_passing(self) -> None:
        """Restores the original layer, with its current values."""
        del self.neurons
        self.take_off()


class Normalisation(NamedTuple):
    """The normalisation computed by a layer of neurons; not a module, so that the layer does not own it."""

    norm: Any
    place: Place
    converted: bool  # whether `fuse` converted the layer


class Normalised(Overlay):
    """Neurons that normalise their input: `asgl_cuda.LIF`, by `_lif`, or converted layers, by `compute`."""

    prefix = "Normalised"

    normalisation: Normalisation

    def end_normalised(self) -> None:
        """Restores both layers, with their current values."""
        norm, _, converted = self.normalisation
        del self.normalisation
        if isinstance(norm, PassedThrough):
            norm.end_passing()
        self.take_off()
        if converted:
            self.end()

    def is_plain(self) -> bool:
        """False due to normalisation."""
        return False

    def compute(self, x_seq: Tensor, **options: Any) -> Tensor | LIFOutput:
        """`asgl_cuda.batch_norm_lif` with these arguments of `asgl_cuda.lif`."""
        return self._normalised(x_seq, grouped({**LIF_DEFAULTS, **options}))

    def _lif(self, x_seq: Tensor, update: bool = True, **options: Any) -> Tensor | LIFOutput:
        return self._normalised(x_seq, self._given(x_seq, self.input_gain, **options), update)

    def _normalised(self, x_seq: Tensor, given: Arguments, update: bool = True) -> Tensor | LIFOutput:
        """`asgl_cuda.batch_norm_lif` of input_gain y + input_bias, with y the normalised input."""
        norm, at_norm, _ = self.normalisation
        if not at_norm.holds(lambda module: module is norm and isinstance(norm, PassedThrough)):
            raise RuntimeError(
                f"asgl_cuda.fuse: {self.original.__name__} computes the {bare_class(norm).__name__} that was at "
                f"{at_norm.path}, which is not there any more, and would normalise a second time: {_REMEDY}"
            )
        weight, bias, scale = norm.weight, norm.bias, 1.0
        input_gain, input_bias, time_dim = given.values.input_gain, given.values.input_bias, given.options.time_dim
        if isinstance(input_gain, float) and input_bias == 0.0:
            scale = input_gain
        else:
            back = x_seq.dim() - channel_dim(time_dim % x_seq.dim())
            gain, shift = (self._by_channel(value, back, x_seq) for value in (input_gain, input_bias))
            weight = gain if weight is None else gain * weight.to(gain.dtype)
            bias = shift if bias is None else gain * bias.to(gain.dtype) + shift
        # None: this process alone.
        group = (norm.process_group or "world") if isinstance(norm, nn.SyncBatchNorm) else None
        given = given._replace(values=given.values._replace(input_gain=1.0, input_bias=0.0))
        return module_batch_norm_lif(
            norm, x_seq, given=given, weight=weight, bias=bias, update=update, input_scale=scale, process_group=group
        )

    def _by_channel(self, value: Tensor | float, back: int, x_seq: Tensor) -> Tensor:
        """The value as `[C]`; the channels are dimension -`back`."""
        value = torch.as_tensor(value, dtype=real_type(x_seq.dtype), device=x_seq.device)
        if not varies_by_channel(value, back):
            raise ValueError(
                f"asgl_cuda.fuse: {self.original.__name__} has an input gain or bias of shape {list(value.shape)}, "
                f"which must be one value or one a channel to be fused with a normalisation, for {list(x_seq.shape)}"
            )
        return value.reshape(-1) if value.numel() > 1 else value.reshape(1).expand(self.normalisation.norm.num_features)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}normalised by {bare_class(self.normalisation.norm).__name__}"


def varies_by_channel(value: Tensor, back: int) -> bool:
    """Whether there is one value, or one per index of dimension -`back`."""
    varying = [value.dim() - dim for dim, size in enumerate(value.shape) if size != 1]
    return varying in ([], [back])


def join(layer: Any, place: Place, normalisation: Normalisation) -> None:
    """Lets the layer, a LIF or converted, at `place` compute the normalisation, which then returns its input."""
    norm = normalisation.norm
    layer.__class__ = overlaid(Normalised, type(layer))
    layer.normalisation = normalisation
    norm.__class__ = overlaid(PassedThrough, type(norm))
    norm.neurons = place
