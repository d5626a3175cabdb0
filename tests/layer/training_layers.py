"""Layers that the tests of the training kit share."""

import math

import torch
import torch._dynamo.testing
from torch import nn

from asgl_cuda import LIF


def network(**options):
    """Layers "1" and "3" start with different noise."""
    return nn.Sequential(nn.Linear(7, 5), LIF(analog_prob=0.2, **options), nn.Linear(5, 3), LIF(analog_prob=0.8))


class Foreign(nn.Module):
    """Mimics a converted neuron of another library: the attributes of LIF, but not the class."""

    def __init__(self, output=None, **attributes):
        super().__init__()
        self.analog_prob = 0.3
        self.log_width = nn.Parameter(torch.tensor([0.0, math.log(3.0)]))
        self.beta = nn.Parameter(torch.tensor(0.9))
        self.recurrent = nn.Linear(2, 2)
        self.output = output
        for name, value in attributes.items():
            setattr(self, name, value)

    @property
    def width(self):
        return self.log_width.exp()

    def forward(self, x_seq):
        return x_seq if self.output is None else self.output
