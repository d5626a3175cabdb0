"""Parameter groups of an optimizer, and Adam's step for learned widths, whatever the optimizer of the weights is.

The gradient of a width is smaller by orders of magnitude if the width is large and the network deep. SGD's step is in
proportion to it, so one learning rate is either too small for large widths or too large for others. Adam's step in
log_width has the size of its learning rate. For optimizers that are not of Adam's family, hooks around their step take
Adam's step for these parameters. They see gradients as the optimizer would: accumulated, unscaled, clipped. The hooks
are registered when a model first has such parameters.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..checks import accept_none, read_number, require_range, warn_once
from ..neurons.base import Settable, check_module
from ..neurons.leaky_integrator import LeakyIntegrator
from ..neurons.lif import LIF
from .calibration import NORMALISATIONS
from .layers import asgl_layers

WIDTH_LR = 0.03
NEURON_LR = 3e-3  # learning rate of decays, thresholds and adaptations, which leave their range at 0.03
_BY_ADAM = "by_adam"  # the key of a group whose step is Adam's
_ADAM = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam)


def parameter_groups(
    model: nn.Module,
    lr: float,
    width_lr: float | None = None,
    weight_decay: float | None = None,
    norm_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups: "weights" with `lr` and `weight_decay`; "widths" and "neurons" with other learning rates.

    Weights get the weight decay of the optimizer unless `weight_decay` gives them another. The `lr` of the optimizer
    has no effect, because each group has its own.

    "widths" are the learned widths of ASGL layers (see `asgl_cuda.asgl_layers`). "neurons" are the other parameters of
    these layers and of `LeakyIntegrator`, such as decays, thresholds and adaptations. Neither group gets weight decay.

    The default learning rates are 0.03 for "widths" and 3e-3 for "neurons". At 0.03 a step of Adam usually changes a
    width by at most about 3 %, because layers store the logarithm of the width. If the optimizer is torch's `Adam`,
    `AdamW`, `Adamax`, `NAdam` or `RAdam`, it also updates these two groups. For any other `torch.optim.Optimizer`,
    hooks around its `step` update them as Adam does. The options of that optimizer, such as momentum, then do not apply
    to the two groups, except `maximize`. You may accumulate gradients, unscale them by a GradScaler and clip them as
    usual. Adam's averages are in the state dict of the optimizer. Most schedulers scale the learning rates of all
    groups together. `OneCycleLR` and `CyclicLR` set the learning rates themselves, so give them a list with one value
    per group.

    The hooks do not work if the optimizer is not a `torch.optim.Optimizer`, if it calls its closure several times, or
    if a CUDA graph captures its step. In these cases give `width_lr`. The parameters of both groups are then in
    "neurons", which the optimizer updates as any other group, with the learning rate `width_lr`.

    If `norm_weight_decay` is given, usually as 0, there is also a group "norms" with `lr` and this weight decay. It
    contains all parameters of `LayerNorm` and `RMSNorm`, and other parameters with at most one dimension, such as
    biases and the weights of batch normalisations. It contains no parameter of "neurons" or "widths". Without
    `norm_weight_decay`, the parameters of "norms" are in "weights".

    The weight and bias of the normalisation in `BatchNormLIF`, and those of recurrent connections, do not belong to
    "neurons". Every parameter is in one group, once, even if it is shared or frozen.

    Returns a list of dicts, each with its "name", in the order "weights", "norms", "neurons", "widths". Empty groups
    are omitted.

    Raises ValueError for a learning rate or decay that is negative or NaN, and TypeError for arguments of a wrong type.
    Warns once per process if a model has several layers of `LIF`, torch's initial weights, and no normalisation of
    torch or asgl_cuda. The deeper layers of such a model are likely silent at first.

    Example::

        model = nn.Sequential(nn.Linear(64, 128), asgl_cuda.LIF(), nn.Linear(128, 10))
        groups = asgl_cuda.parameter_groups(model, lr=0.1, weight_decay=5e-4, norm_weight_decay=0.0)
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    """
    caller = "asgl_cuda.parameter_groups"
    check_module(model, caller)
    rates = {"lr": lr, "width_lr": width_lr, "weight_decay": weight_decay, "norm_weight_decay": norm_weight_decay}
    check = require_range(read_number, ">= 0", 0)
    for name, value in rates.items():
        (check if name == "lr" else accept_none(check))(name, value, caller)
    layers = [layer for _, layer in asgl_layers(model)]
    if sum(isinstance(layer, LIF) for layer in layers) > 1 and _is_likely_silent(model):
        warn_once(
            "silent",
            f"{caller}: the model has several layers of LIF, no normalisation of torch or asgl_cuda, and weights as "
            "torch draws them, so deeper layers are likely silent at first, and then learn late or not at all. Use "
            "BatchNormLIF, or call asgl_cuda.calibrate(model, x_seq) before training; asgl_cuda.Monitor shows the "
            "firing rates. If another module normalises their input, ignore this warning",
        )
    layers += (module for module in model.modules() if isinstance(module, LeakyIntegrator))
    neurons: dict[int, tuple[str, nn.Parameter]] = {}
    for layer in layers:  # all parameters of an ASGL layer that is not asgl_cuda's own
        own = layer._neuron_parameters() if isinstance(layer, Settable) else layer.named_parameters(recurse=False)
        neurons |= {id(each): (name, each) for name, each in own}
    norms: dict[int, nn.Parameter] = {}
    if norm_weight_decay is not None:
        norms = {
            id(each): each
            for module in model.modules()
            for each in module.parameters(recurse=False)
            if (each.dim() <= 1 or isinstance(module, nn.LayerNorm | nn.RMSNorm)) and id(each) not in neurons
        }
    weights = [each for each in model.parameters() if id(each) not in neurons and id(each) not in norms]
    by_adam = width_lr is None
    widths = [each for name, each in neurons.values() if by_adam and name == "log_width"]
    others = [each for name, each in neurons.values() if not (by_adam and name == "log_width")]
    # A key in a group takes precedence over the option of the optimizer, so the key is set only if weight_decay was
    # given.
    decayed = {} if weight_decay is None else {"weight_decay": weight_decay}
    if by_adam and neurons:
        _register_step_hooks()
    more = {"weight_decay": 0.0, **({_BY_ADAM: True} if by_adam else {})}
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": weights, "lr": lr, **decayed},
        {"name": "norms", "params": list(norms.values()), "lr": lr, "weight_decay": norm_weight_decay},
        {"name": "neurons", "params": others, "lr": NEURON_LR if by_adam else width_lr, **more},
        {"name": "widths", "params": widths, "lr": WIDTH_LR, **more},
    ]
    return [group for group in groups if group["params"]]


def _is_likely_silent(model: nn.Module) -> bool:
    """Whether all weights are as torch draws them, uniform, up to 1 / sqrt(inputs), and no layer is of NORMALISATIONS.

    The largest of at least 256 such values is close to this bound. That of calibrated or trained weights is usually
    not.
    """
    weights = [each.weight for each in model.modules() if isinstance(each, nn.Linear | nn.modules.conv._ConvNd)]
    weights = [each for each in weights if type(each) is nn.Parameter and not each.is_meta and each.numel() >= 256]
    if not weights or any(isinstance(each, NORMALISATIONS) for each in model.modules()):
        return False
    with torch.no_grad():
        return all(0.95 < float(each.abs().max()) * each.shape[1:].numel() ** 0.5 < 1.01 for each in weights)


def _hook_before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """A hook that takes Adam's step for the groups with `_BY_ADAM`, before the optimizer's or at its closure's end."""
    groups = [] if isinstance(optimizer, _ADAM) else [each for each in optimizer.param_groups if each.get(_BY_ADAM)]
    if not groups:
        return None
    named = "closure" in kwargs
    closure = kwargs["closure"] if named else (*args[1:], None)[0]
    if closure is None:
        _step_by_adam(optimizer, groups)
        return None

    def closure_and_adam_step() -> Any:
        """The closure, followed by Adam's step."""
        loss = closure()
        _step_by_adam(optimizer, groups)
        return loss

    return (
        (args, {**kwargs, "closure": closure_and_adam_step})
        if named
        else ((args[0], closure_and_adam_step, *args[2:]), kwargs)
    )


def _step_by_adam(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Does Adam's step for these groups, whose gradients are then hidden until the optimizer's own step ends."""
    scaled = getattr(optimizer, "found_inf", None) is not None  # by a GradScaler, for optimizers that unscale and skip
    for group in groups:
        for value in group["params"]:
            if "exp_avg" not in optimizer.state.get(value, {}):
                optimizer.state.pop(value, None)  # Adagrad's, which it makes at its construction
        maximize = bool(group.get("maximize"))
        adam: Any = torch.optim.Adam(group["params"], lr=group["lr"], maximize=maximize, fused=scaled or None)
        adam.state = optimizer.state
        if scaled:
            adam.grad_scale, adam.found_inf = optimizer.grad_scale, optimizer.found_inf
        adam.step()
    hidden = [(value, value.grad) for group in groups for value in group["params"]]
    for value, _ in hidden:
        value.grad = None
    optimizer._asgl_hidden = hidden


def _hook_after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook that restores the gradients that `_step_by_adam` has hidden from the optimizer."""
    for value, grad in optimizer.__dict__.pop("_asgl_hidden", ()):
        value.grad = grad


@cache
def _register_step_hooks() -> None:
    """Registers the hooks, once per process. They act only on groups with the key `_BY_ADAM`."""
    register_optimizer_step_pre_hook(_hook_before_step)
    register_optimizer_step_post_hook(_hook_after_step)
