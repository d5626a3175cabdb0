"""The ASGL layers of a model, also those of converted neurons."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..neurons.base import check_module


def asgl_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the name and the module of each ASGL layer, in the order of `named_modules`.

    The ASGL layers are the spiking neurons of asgl_cuda, and the spiking neurons that `asgl_cuda.convert` has
    converted, even if their `analog_prob` is 0. Such a layer has the attributes `analog_prob` (a float), `log_width` (a
    parameter or None) and `width`. Raises TypeError if `model` is not a module.

    Example::

        model = nn.Sequential(nn.Linear(64, 128), asgl_cuda.LIF(width=2.0))
        for name, layer in asgl_cuda.asgl_layers(model):
            print(name, layer.width.item(), layer.analog_prob)  # 1 2.0 0.5
    """
    check_module(model, "asgl_cuda.asgl_layers")
    # torch.compile's wrapper forwards attributes. getattr_static does not see these, so that the wrapper does not count
    # as a second layer.
    return (
        (name, module)
        for name, module in model.named_modules()
        if inspect.getattr_static(module, "analog_prob", None) is not None and hasattr(module, "log_width")
    )


def require_asgl_layers(model: nn.Module, caller: str) -> dict[str, Any]:
    """The ASGL layers of a model by name. Raises ValueError if it has none."""
    check_module(model, caller)
    layers = dict(asgl_layers(model))
    if not layers:
        raise ValueError(
            f"{caller}: model must have an ASGL layer, got a {type(model).__name__} without one; "
            "add an asgl_cuda.LIF, or turn neurons of other libraries into such layers by asgl_cuda.convert"
        )
    return layers
