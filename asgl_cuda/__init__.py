"""Fused spiking neurons for PyTorch: multi-step leaky integrate-and-fire with Adaptive Smoothing Gradient Learning."""

from ._version import __version__
from .backends import available_backends, unavailable_backends
from .functional import LIFOutput, analog_mask, lif
from .interop import convert, revert
from .neuron import LIF

__all__ = [
    "LIF",
    "LIFOutput",
    "__version__",
    "analog_mask",
    "available_backends",
    "convert",
    "lif",
    "revert",
    "unavailable_backends",
]
