"""The optimisers and schedules of the authors of ASGL."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

import asgl_cuda


def optimizers_of(
    model: nn.Module, lr: float, width_lr: float, momentum: float = 0.9, weight_decay: float = 5e-4
) -> list[torch.optim.Optimizer]:
    """SGD for the weights, Adam without decay for the widths."""
    makers = {"weights": partial(torch.optim.SGD, momentum=momentum), "neurons": torch.optim.Adam}
    groups = asgl_cuda.parameter_groups(model, lr=lr, width_lr=width_lr, weight_decay=weight_decay)
    return [makers[group["name"]]([group]) for group in groups]


def cosine_schedules(optimizers: Iterable[torch.optim.Optimizer], steps: int) -> list[Any]:
    return [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
