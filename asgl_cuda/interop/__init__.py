"""Models of other libraries on the fused neuron.

Each library has an adapter, a module with its name that is imported only if the library is: spikingjelly, snntorch,
norse, sinabs. The adapter authors is for the code of ASGL's authors. `libraries.imported_adapters` says which functions
an adapter has. spike_layers converts torch's own layers.
"""

from .convert import Left, Replaced, Report, convert, revert
from .fuse import fuse, unfuse
from .nir import from_nir, to_nir
from .spike_layers import from_spike_layers, to_spike_layers

# The functions `convert` and `fuse` shadow the submodules of these names.
__all__ = [
    "Left",
    "Replaced",
    "Report",
    "convert",
    "from_nir",
    "from_spike_layers",
    "fuse",
    "revert",
    "to_nir",
    "to_spike_layers",
    "unfuse",
]
