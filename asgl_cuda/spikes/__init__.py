"""Products that only spikes cost: linear layers and convolutions that add up the elements that are not zero."""

from .functional import spike_conv2d, spike_linear
from .layers import SpikeConv1d, SpikeConv2d, SpikeLinear

__all__ = ["SpikeConv1d", "SpikeConv2d", "SpikeLinear", "spike_conv2d", "spike_linear"]
