"""Helpers of studies that train one network: optimizers with `asgl_cuda.parameter_groups`, training steps, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import asgl_cuda

SGD, ADAM, ADAMW = "SGD", "Adam", "AdamW"
RATES = {SGD: 0.1, ADAM: 3e-3}  # of the weights, where a study has one
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of SGD


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay, or Adam, with the learning rate in RATES."""
    if name == ADAM:
        return torch.optim.Adam(asgl_cuda.parameter_groups(model, RATES[name]))
    groups = asgl_cuda.parameter_groups(model, RATES[name], weight_decay=WEIGHT_DECAY)
    return torch.optim.SGD(groups, momentum=MOMENTUM)


def fit(loss_of: Callable[[Any], Tensor], batches: Iterable[Any], optimizer: Any, *schedules: Any) -> list[float]:
    """Takes a training step on each batch, and returns the losses."""
    losses = []
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        for stepper in (optimizer, *schedules):
            stepper.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy_of(
    model: nn.Module, scores_of: Callable[[Tensor], Tensor], samples: Tensor, labels: Tensor, dim: int = 0
) -> float:
    """The percentage of samples, along `dim`, that a network classifies correctly with hard spikes."""
    model.eval()
    parts = zip(samples.split(256, dim), labels.split(256), strict=True)
    right = torch.cat([scores_of(part).argmax(1) == wanted for part, wanted in parts])
    model.train()
    return 100 * right.float().mean().item()
