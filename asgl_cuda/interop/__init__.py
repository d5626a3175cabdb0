"""Models of other libraries on the fused neuron: one file for each library, imported only if that library is."""

from .conversion import Left, Replaced, Report, convert, revert
from .fusion import fuse, unfuse

__all__ = ["Left", "Replaced", "Report", "convert", "fuse", "revert", "unfuse"]
