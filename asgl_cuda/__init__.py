"""Fused spiking neurons for PyTorch: multi-step leaky integrate-and-fire with Adaptive Smoothing Gradient Learning.

Layers:
    LIF                     leaky integrate-and-fire neurons that learn the width of their surrogate
    BatchNormLIF            a batch normalisation and the neurons after it, in one
    AdaptiveLIF             LIF neurons that adapt: adLIF and ALIF
    RecurrentLIF            LIF neurons whose spikes are fed back through a weight: RLIF
    LeakyIntegrator         neurons that do not fire: a synaptic current, or a read-out
    OverTime                applies a layer without time to a whole sequence
    SpikeLinear, SpikeConv1d, SpikeConv2d
                            torch's layers for inputs that are mostly zero

Functions:
    lif, LIFOutput          LIF as a function
    batch_norm_lif          BatchNormLIF as a function
    adaptive_lif, AdaptiveLIFOutput
                            AdaptiveLIF as a function
    recurrent_lif, RecurrentLIFOutput
                            RecurrentLIF as a function
    leaky_integrator, IntegratorOutput
                            LeakyIntegrator as a function
    spike_linear, spike_conv2d
                            SpikeLinear and SpikeConv2d as functions
    analog_mask             mask of analog elements
    unroll_levels           integer spikes as binary ones

States:
    step                    calls a model for one time step
    reset, detach           clear or detach the states of layers

Training:
    parameter_groups        groups of parameters for an optimizer
    calibrate               scales weights to a target firing rate
    AnalogProbSchedule      lowers the noise over the epochs
    Monitor                 firing rates, widths, dead neurons
    FiringRates             differentiable firing rates, and a penalty on them
    recompute_spikes        backward recomputes spikes instead of storing them
    spiking_eval            hard spikes with surrogate gradients
    lightning_callback      schedule and monitor in a Lightning Trainer
    convert_sync_batchnorm  statistics shared by processes
    asgl_layers             the ASGL layers of a model
    plot_spikes, plot_layers, plot_gradient_norms
                            pictures, with matplotlib

Models of other libraries:
    convert, revert         neurons of SpikingJelly, snnTorch, Norse and sinabs as fused neurons, and back
    fuse, unfuse            normalisations merged into the neurons after them, and back
    to_nir, from_nir        write and read the exchange format NIR
    interop                 one module for each library

Spike layers:
    to_spike_layers, from_spike_layers
                            turn torch's layers with sparse inputs into SpikeLinear and so on, and back

Backends:
    available_backends, unavailable_backends
                            the backends that work here, and why others do not

Details: `help(asgl_cuda.LIF)` and so on.
"""

from ._version import __version__
from .backends import available_backends, unavailable_backends
from .calls.recompute import recompute_spikes
from .interop import convert, from_nir, from_spike_layers, fuse, revert, to_nir, to_spike_layers, unfuse
from .neurons.adaptive_lif import AdaptiveLIF, AdaptiveLIFOutput, adaptive_lif
from .neurons.batch_norm_lif import BatchNormLIF, batch_norm_lif
from .neurons.leaky_integrator import IntegratorOutput, LeakyIntegrator, leaky_integrator
from .neurons.lif import LIF, LIFOutput, analog_mask, lif, unroll_levels
from .neurons.over_time import OverTime
from .neurons.recurrent_lif import RecurrentLIF, RecurrentLIFOutput, recurrent_lif
from .spikes import SpikeConv1d, SpikeConv2d, SpikeLinear, spike_conv2d, spike_linear
from .states import detach, reset, step
from .training.calibration import calibrate
from .training.evaluation import spiking_eval
from .training.groups import parameter_groups
from .training.layers import asgl_layers
from .training.lightning import lightning_callback
from .training.monitor import Monitor
from .training.plots import plot_gradient_norms, plot_layers, plot_spikes
from .training.rates import FiringRates
from .training.schedule import AnalogProbSchedule
from .training.sync_batch_norm import convert_sync_batchnorm

__all__ = [
    "LIF",
    "AdaptiveLIF",
    "AdaptiveLIFOutput",
    "AnalogProbSchedule",
    "BatchNormLIF",
    "FiringRates",
    "IntegratorOutput",
    "LIFOutput",
    "LeakyIntegrator",
    "Monitor",
    "OverTime",
    "RecurrentLIF",
    "RecurrentLIFOutput",
    "SpikeConv1d",
    "SpikeConv2d",
    "SpikeLinear",
    "__version__",
    "adaptive_lif",
    "analog_mask",
    "asgl_layers",
    "available_backends",
    "batch_norm_lif",
    "calibrate",
    "convert",
    "convert_sync_batchnorm",
    "detach",
    "from_nir",
    "from_spike_layers",
    "fuse",
    "leaky_integrator",
    "lif",
    "lightning_callback",
    "parameter_groups",
    "plot_gradient_norms",
    "plot_layers",
    "plot_spikes",
    "recompute_spikes",
    "recurrent_lif",
    "reset",
    "revert",
    "spike_conv2d",
    "spike_linear",
    "spiking_eval",
    "step",
    "to_nir",
    "to_spike_layers",
    "unavailable_backends",
    "unfuse",
    "unroll_levels",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*__all__, "interop"})
