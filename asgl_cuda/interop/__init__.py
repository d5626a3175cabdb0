"""Models of other libraries on the fused neuron.

One file a library, imported only if the library is: spikingjelly, snntorch, norse, sinabs; authors for the authors'
code. The others serve all: convert (whose `libraries` says what a library's file has), converted, identify, snapshot,
steps; fuse, graphs, normalised; nir.
"""

from .convert import Left, Replaced, Report, convert, revert
from .fuse import fuse, unfuse
from .nir import from_nir, to_nir

# `convert`, `fuse` and `nir` are submodules, too; the first two names are the functions from here on.
__all__ = ["Left", "Replaced", "Report", "convert", "from_nir", "fuse", "revert", "to_nir", "unfuse"]
