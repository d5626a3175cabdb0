"""A normalisation fused with the neurons behind it.

Both modules keep their paths, parameters, buffers and names: `fuse` puts a class before both classes. The
normalisation then returns its input, in front of an addition as `Pending`, and the neurons call
`asgl_cuda.batch_norm_lif` with both modules' values.

With one module replaced, as by `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, the pair would normalise twice or not
at all: each module checks in every call that its partner is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..batch_norm import module_batch_norm_lif
from ..call import Arguments, LIFOutput, grouped
from ..functional import LIF_DEFAULTS
from ..layout import channel_dim, real_type
from ..neuron import LIF
from .converted import Overlay, bare_class, overlaid
from .pending import Pending


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


class Awaited(PassedThrough):
    """A normalisation in front of an addition, computed by the neurons behind."""

    def forward(self, input: Any) -> Any:
        if isinstance(input, fx.Proxy):  # a leaf, whose result is no tensor
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        return Pending(self, super().forward(input))


class Normalisation(NamedTuple):
    """The normalisation computed by a layer of neurons; not a module, so that the layer does not own it."""

    norm: Any
    place: Place
    converted: bool  # whether `fuse` converted the layer


class Normalised(Overlay):
    """Neurons that normalise their input and, in a residual block, add the shortcut."""

    prefix = "Normalised"

    normalisation: Normalisation

    def end_normalised(self, converted_stays: bool = False) -> None:
        """Restores both layers, with their current values."""
        norm, _, converted = self.normalisation
        del self.normalisation
        if isinstance(norm, PassedThrough):
            norm.end_passing()
        self.take_off()
        if converted and not converted_stays:
            self.end()

    def _normalised(self, x_seq: Tensor, given: Arguments, update: bool = True) -> Tensor | LIFOutput:
        """`asgl_cuda.batch_norm_lif` of input_gain (y + residual) + input_bias, with y the normalised input."""
        norm, at_norm, _ = self.normalisation
        if not at_norm.holds(lambda module: module is norm and isinstance(norm, PassedThrough)):
            raise RuntimeError(
                f"asgl_cuda.fuse: {self.original.__name__} computes the {bare_class(norm).__name__} that was at "
                f"{at_norm.path}, which is not there any more, and would normalise a second time: {_REMEDY}"
            )
        weight, bias, scale = norm.weight, norm.bias, 1.0
        input_gain, input_bias, time_dim = given.values.input_gain, given.values.input_bias, given.options.time_dim
        residual, residual_gain = given.values.residual, input_gain
        if isinstance(input_gain, float) and input_bias == 0.0:
            scale = input_gain
        else:
            back = x_seq.dim() - channel_dim(time_dim % x_seq.dim())
            gain, shift = (self._by_channel(value, back, x_seq) for value in (input_gain, input_bias))
            weight = gain if weight is None else gain * weight.to(gain.dtype)
            bias = shift if bias is None else gain * bias.to(gain.dtype) + shift
        if residual is not None and not isinstance(input_gain, float):
            residual, residual_gain = (residual * input_gain).to(x_seq.dtype), 1.0
        # None: this process alone.
        group = (norm.process_group or "world") if isinstance(norm, nn.SyncBatchNorm) else None
        given = given._replace(
            values=given.values._replace(input_gain=1.0, input_bias=0.0, residual=residual),
            options=given.options._replace(residual_gain=1.0 if residual is None else residual_gain),
        )
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


class NormalisedLIF(Normalised):
    """`asgl_cuda.LIF`."""

    def _inputs(self, x_seq: Any, residual: Tensor | None = None) -> tuple[Any, dict[str, Any]]:
        if isinstance(x_seq, Pending):
            pending = x_seq if residual is None else x_seq + residual
            return pending.x, {"pending": pending}
        inputs: tuple[Any, dict[str, Any]] = super()._inputs(x_seq, residual)  # type: ignore[misc]
        return inputs

    def _lif(self, x_seq: Tensor, update: bool = True, pending: Pending | None = None, **options: Any) -> Any:
        if pending is not None:
            x_seq, options["residual"] = pending.operands()
            if pending.norm is None:
                return super()._lif(x_seq, update, **options)  # type: ignore[misc]
        return self._normalised(x_seq, self._given(x_seq, self.input_gain, **options), update)


class NormalisedConverted(Normalised):
    """A converted layer; `forward` and `sequence` take the input apart, which `compute` joins."""

    _pending: Pending | None

    def is_plain(self) -> bool:
        """False due to normalisation."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*self._apart(args), **kwargs)
        finally:
            self._pending = None  # after an error, too

    def sequence(self, *args: Any, **kwargs: Any) -> Any:
        """The call of `MultiStep`, for snnTorch's layers."""
        try:
            return super().sequence(*self._apart(args), **kwargs)  # type: ignore[misc]
        finally:
            self._pending = None

    def _apart(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._pending = args[0] if args and isinstance(args[0], Pending) else None
        return args if self._pending is None else (self._pending.x, *args[1:])

    def compute(self, x_seq: Tensor, **options: Any) -> Tensor | LIFOutput:
        """`asgl_cuda.batch_norm_lif` with these arguments of `asgl_cuda.lif`."""
        pending = self._pending
        if pending is not None:
            _, residual = pending.operands()
            if pending.norm is None:
                return super().compute(x_seq, **options)  # type: ignore[misc,no-any-return]
            if residual is not None:  # in the shape and type that the layer gave to x
                options["residual"] = residual.reshape(x_seq.shape).to(x_seq.dtype)
        return self._normalised(x_seq, grouped({**LIF_DEFAULTS, **options}))

    def end_normalised(self, converted_stays: bool = False) -> None:
        del self._pending
        super().end_normalised(converted_stays)


def varies_by_channel(value: Tensor, back: int) -> bool:
    """Whether there is one value, or one per index of dimension -`back`."""
    varying = [value.dim() - dim for dim, size in enumerate(value.shape) if size != 1]
    return varying in ([], [back])


def join(layer: Any, place: Place, normalisation: Normalisation, added: bool) -> None:
    """Lets the layer, a LIF or converted, at `place` compute the normalisation and, if `added`, the sum behind it."""
    norm, is_ours = normalisation.norm, isinstance(layer, LIF)
    layer.__class__ = overlaid(NormalisedLIF if is_ours else NormalisedConverted, type(layer))
    layer.normalisation = normalisation
    if not is_ours:
        layer._pending = None
    norm.__class__ = overlaid(Awaited if added else PassedThrough, type(norm))
    norm.neurons = place
