"""Models to and from NIR, the Neuromorphic Intermediate Representation that other libraries and chips read.

`neurons` has the equations of both. `write` and `read` have one function for each kind of layer.

Source: Pedersen et al.: Neuromorphic intermediate representation: A unified instruction set for interoperable
brain-inspired computing, Nature Communications 15, 8122 (2024).
"""

from .read import from_nir
from .write import to_nir

__all__ = ["from_nir", "to_nir"]
