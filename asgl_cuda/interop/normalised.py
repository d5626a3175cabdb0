"""A normalisation and the neurons behind it that are computed as one.

Both stay where they are, with their parameters, buffers and names: `fuse` puts a class before the class of each. That
of the normalisation returns its input, that of the neurons calls `asgl_cuda.batch_norm_lif` with what both hold.

Where one of the two is exchanged, as `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does, the other would normalise a
second time, or not at all. So each looks at every call whether the other is where it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch_norm import module_batch_norm_lif
from ..functional import LIFOutput
from ..layout import channel_dim, real_type
from ..neuron import LIF
from .fused import Fused, fused_class


class Placed(nn.Module):
    """What stands before a layer's class."""

    # Of the class that `placed_class` makes of it.
    front: type[Placed]
    behind: type[nn.Module]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What the layer's class has."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name to be found by, nor has that of a converted layer: they are made again.
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        behind = self.behind
        parts = (behind.fused_forward, behind.original) if issubclass(behind, Fused) else (behind,)
        return _new, (self.front, *parts), *rest


class Place:
    """Where a module is below another one. The latter is not kept alive, nor copied with what knows the place."""

    def __init__(self, owner: nn.Module | None, path: str) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self.path = path
        self._names = path.split(".")

    def holds(self, sought: Callable[[Any], bool]) -> bool:
        """Whether it is there, or elsewhere in the owner, where it was moved or wrapped; True if the owner is gone."""
        owner = None if self._owner is None else self._owner()
        if owner is None:
            return True
        found: nn.Module | None = owner
        for name in self._names:
            found = None if found is None else found._modules.get(name)
        return sought(found) or any(sought(module) for module in owner.modules())

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        owner = None if self._owner is None else self._owner()
        return Place(memo.get(id(owner)), self.path)

    def __reduce__(self) -> Any:
        return Place, (None if self._owner is None else self._owner(), self.path)


_REMEDY = "asgl_cuda.unfuse takes the pair apart, then asgl_cuda.fuse joins what is there"


class PassedThrough(Placed):
    """A normalisation that the neurons behind it compute: it returns its input."""

    neurons: Place

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_computed():
            raise RuntimeError(
                f"asgl_cuda.fuse: {self.behind.__name__} is computed by the neurons that were at {self.neurons.path}, "
                f"which are not there any more: {_REMEDY}"
            )
        return input

    def is_computed(self) -> bool:
        """Whether the neurons are where they were."""
        return self.neurons.holds(lambda module: isinstance(module, Normalised) and module.normalisation.norm is self)

    def end_passing(self) -> None:
        """Becomes what it was before, with the values that it has now."""
        del self.neurons
        self.__class__ = self.behind  # type: ignore[assignment]


class Normalisation(NamedTuple):
    """What a layer of neurons computes as well. No module itself, so that the layer does not take it for its part."""

    norm: Any
    place: Place
    converted: bool  # whether `fuse` converted the layer


class Normalised(Placed):
    """Neurons that normalise their input."""

    normalisation: Normalisation

    def begin_normalised(self, normalisation: Normalisation, place: Place) -> None:
        """The normalisation returns its input from now on; `place` is that of the neurons."""
        self.normalisation = normalisation
        norm = normalisation.norm
        norm.__class__ = placed_class(PassedThrough, type(norm))
        norm.neurons = place

    def end_normalised(self) -> None:
        """Both become what they were before, with the values that they have now."""
        norm, _, converted = self.normalisation
        del self.normalisation
        if isinstance(norm, PassedThrough):
            norm.end_passing()
        self.__class__ = self.behind  # type: ignore[assignment]
        if converted:
            self.end()

    def normalised(
        self,
        x_seq: Tensor,
        time_dim: int,
        gain: Tensor | float = 1.0,
        shift: Tensor | float = 0.0,
        **options: Any,
    ) -> Tensor | LIFOutput:
        """`asgl_cuda.batch_norm_lif` of gain y + shift, with y the normalised input."""
        norm, at_norm, _ = self.normalisation
        if not at_norm.holds(lambda module: module is norm and isinstance(norm, PassedThrough)):
            raise RuntimeError(
                f"asgl_cuda.fuse: {self.behind.__name__} computes the {_name_of(norm)} that was at {at_norm.path}, "
                f"which is not there any more, and would normalise a second time: {_REMEDY}"
            )
        weight, bias = norm.weight, norm.bias
        if isinstance(gain, float) and shift == 0.0:
            options["input_scale"] = gain
        else:
            place = x_seq.dim() - channel_dim(time_dim % x_seq.dim())
            gain, shift = (self._of_channels(value, place, x_seq) for value in (gain, shift))
            weight = gain if weight is None else gain * weight.to(gain.dtype)
            bias = shift if bias is None else gain * bias.to(gain.dtype) + shift
        return module_batch_norm_lif(
            norm,
            x_seq,
            weight=weight,
            bias=bias,
            process_group=_group_of(norm),
            time_dim=time_dim,
            **options,
        )

    def _of_channels(self, value: Tensor | float, place: int, x_seq: Tensor) -> Tensor:
        """[C]; the channels are the dimension `place` from the last."""
        value = torch.as_tensor(value, dtype=real_type(x_seq.dtype), device=x_seq.device)
        if not varies_by_channel(value, place):
            raise ValueError(
                f"asgl_cuda.fuse: {self.behind.__name__} has an input gain or bias of shape {list(value.shape)}, which "
                f"must be one value or one a channel to be fused with a normalisation, for {list(x_seq.shape)}"
            )
        return value.reshape(-1) if value.numel() > 1 else value.reshape(1).expand(self.normalisation.norm.num_features)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}normalised by {_name_of(self.normalisation.norm)}"


class NormalisedLIF(Normalised):
    """`asgl_cuda.LIF`."""

    def _lif(self, x_seq: Tensor, time_dim: int, **options: Any) -> Tensor | LIFOutput:
        return self.normalised(x_seq, gain=self.input_gain, **self._held(x_seq, time_dim), **options)

    def _lif_again(self, x_seq: Tensor, time_dim: int, **options: Any) -> Tensor | LIFOutput:
        return self._lif(x_seq, time_dim, update=False, **options)


class NormalisedFused(Normalised):
    """A converted layer."""

    def compute(
        self,
        x_seq: Tensor,
        time_dim: int = 0,
        input_gain: Tensor | float = 1.0,
        input_bias: Tensor | float = 0.0,
        **options: Any,
    ) -> Tensor | LIFOutput:
        return self.normalised(x_seq, time_dim, input_gain, input_bias, **options)


def _name_of(norm: Any) -> str:
    return norm.behind.__name__ if isinstance(norm, PassedThrough) else type(norm).__name__


def _group_of(norm: Any) -> Any:
    """The processes that share the statistics, None for this one alone."""
    return (norm.process_group or "world") if isinstance(norm, nn.SyncBatchNorm) else None


def varies_by_channel(value: Tensor, place: int) -> bool:
    """Whether it is one value, or one for each of the dimension `place` from the last."""
    varying = [value.dim() - dim for dim, size in enumerate(value.shape) if size != 1]
    return varying in ([], [place])


_classes: dict[tuple[type[Placed], type[nn.Module]], type[Placed]] = {}


def placed_class(front: type[Placed], behind: type[nn.Module]) -> type[Placed]:
    """`behind` with `front` before it: one class, however often it is asked for."""
    if (front, behind) not in _classes:
        names = {"front": front, "behind": behind, "__module__": __name__}
        prefix = "Fused" if front is PassedThrough else "Normalised"
        _classes[front, behind] = type(f"{prefix}{behind.__name__}", (front, behind), names)
    return _classes[front, behind]


def normalised_class(layer: nn.Module) -> type[Placed]:
    """What a layer, of LIF or converted, becomes with a normalisation."""
    return placed_class(NormalisedLIF if isinstance(layer, LIF) else NormalisedFused, type(layer))


def _new(front: type[Placed], *behind: Any) -> Placed:
    made = placed_class(front, fused_class(*behind) if len(behind) == 2 else behind[0])
    return made.__new__(made)
