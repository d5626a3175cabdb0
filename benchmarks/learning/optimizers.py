"""The optimisers and schedules of the authors of ASGL."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import asgl_cuda


def optimizers_of(
    model: nn.Module,
    lr: float,
    width_lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    norm_weight_decay: float | None = None,
) -> list[torch.optim.Optimizer]:
    """SGD for the weights, Adam without decay for the widths."""
    groups = asgl_cuda.parameter_groups(model, lr, width_lr, weight_decay, norm_weight_decay)
    neurons = [group for group in groups if group["name"] == "neurons"]
    weights = [group for group in groups if group["name"] != "neurons"]
    return [torch.optim.SGD(weights, momentum=momentum), *([torch.optim.Adam(neurons)] if neurons else [])]


def cosine_schedules(optimizers: Iterable[torch.optim.Optimizer], steps: int) -> list[Any]:
    return [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
