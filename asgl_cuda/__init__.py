"""Fused spiking neurons for PyTorch: multi-step leaky integrate-and-fire with Adaptive Smoothing Gradient Learning."""

# ruff: noqa: E402  # torch is not imported before
import warnings

# torch warns of it when it is imported, and works without it, as this package does.
warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named 'numpy'")

from ._version import __version__
from .backends import available_backends, unavailable_backends
from .batch_norm import batch_norm_lif
from .calibration import calibrate
from .functional import LIFOutput, analog_mask, lif
from .integrator import IntegratorOutput, LeakyIntegrator, leaky_integrator
from .interop import convert, from_nir, fuse, revert, to_nir, unfuse
from .layer import asgl_layers
from .monitor import Monitor
from .neuron import LIF, BatchNormLIF
from .over_time import OverTime
from .schedule import AnalogProbSchedule
from .training import lightning_callback, parameter_groups, reset, spiking_eval

__all__ = [
    "LIF",
    "AnalogProbSchedule",
    "BatchNormLIF",
    "IntegratorOutput",
    "LIFOutput",
    "LeakyIntegrator",
    "Monitor",
    "OverTime",
    "__version__",
    "analog_mask",
    "asgl_layers",
    "available_backends",
    "batch_norm_lif",
    "calibrate",
    "convert",
    "from_nir",
    "fuse",
    "leaky_integrator",
    "lif",
    "lightning_callback",
    "parameter_groups",
    "reset",
    "revert",
    "spiking_eval",
    "to_nir",
    "unavailable_backends",
    "unfuse",
]
