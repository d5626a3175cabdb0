"""A layer stays an instance of its class and computes something else: a class is put before the one that it has.

Parameters, buffers, state, hooks and names are still the layer's, the library's own functions that reset, detach or
copy it go on working, and to give the layer back is to take the class away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn


class Overlay(nn.Module):
    """The base of the classes that are put before a layer's class."""

    prefix: str  # begins the name of a class that `overlaid` makes

    # `overlaid` sets these in the class that it makes.
    overlay: type[Overlay]
    original: type[nn.Module]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Whatever the layer's class has."""

    def take_off(self) -> None:
        """Gives the layer the class back that it had before."""
        self.__class__ = self.original  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds no such class by its name: it is made again.
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return _new, _parts(type(self)), *rest


_made: dict[tuple[type[Overlay], type[nn.Module]], Any] = {}


def overlaid(overlay: type[Overlay], original: type[nn.Module]) -> Any:
    """`original` with `overlay` before it: one class, however often it is asked for."""
    if (overlay, original) not in _made:
        names = {"overlay": overlay, "original": original, "__module__": overlay.__module__}
        _made[overlay, original] = type(f"{overlay.prefix}{original.__name__}", (overlay, original), names)
    return _made[overlay, original]


def bare_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class without the classes before it."""
    bare: type[nn.Module] = _parts(type(layer))[-1]
    return bare


def _parts(made: type[nn.Module]) -> tuple[Any, ...]:
    """The classes that are before another one, the first one first, and that one."""
    return (made.overlay, *_parts(made.original)) if issubclass(made, Overlay) else (made,)


def _new(*parts: Any) -> nn.Module:
    *overlays, made = parts
    for overlay in reversed(overlays):
        made = overlaid(overlay, made)
    new: nn.Module = made.__new__(made)
    return new
