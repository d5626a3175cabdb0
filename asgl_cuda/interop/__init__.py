"""Models of other libraries on the fused neuron: one file for each library, imported only if the library is."""

from .convert import Left, Replaced, Report, convert, revert
from .fuse import fuse, unfuse
from .nir import from_nir, to_nir

# `convert`, `fuse` and `nir` are submodules, too; the first two names are the functions from here on.
__all__ = ["Left", "Replaced", "Report", "convert", "from_nir", "fuse", "revert", "to_nir", "unfuse"]
