"""The optimizers of the studies, with the groups of `asgl_cuda.parameter_groups`."""

from __future__ import annotations

import torch
from torch import nn

import asgl_cuda

SGD, ADAM = "SGD", "Adam"
RATES = {SGD: 0.1, ADAM: 3e-3}  # of the weights, where a study has one
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of SGD


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay, or Adam, at the rate of RATES."""
    if name == ADAM:
        return torch.optim.Adam(asgl_cuda.parameter_groups(model, RATES[name]))
    groups = asgl_cuda.parameter_groups(model, RATES[name], weight_decay=WEIGHT_DECAY)
    return torch.optim.SGD(groups, momentum=MOMENTUM)
