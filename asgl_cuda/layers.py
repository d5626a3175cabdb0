"""The ASGL layers of a model: `asgl_cuda.LIF`, and layers of other libraries that `asgl_cuda.convert` has made such."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn


def asgl_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The ASGL layers of a model with their names, in the order of `named_modules`, each once.

    An ASGL layer is a module with a float `analog_prob`, a parameter or None `log_width`, and `width`. Those without
    noise are among them: they may get some, and can be monitored. Raises TypeError where `model` is no module.
    """
    check_module(model, "asgl_cuda.asgl_layers")
    return ((name, module) for name, module in model.named_modules() if _is_asgl_layer(module))


def _is_asgl_layer(module: nn.Module) -> bool:
    # torch.compile's wrapper of a layer passes attributes on, and would count as a second layer, hence getattr_static.
    return inspect.getattr_static(module, "analog_prob", None) is not None and hasattr(module, "log_width")


def some_asgl_layers(model: nn.Module, caller: str) -> dict[str, Any]:
    """The same as a dict; refuses a model that has none."""
    check_module(model, caller)
    layers = dict(asgl_layers(model))
    if not layers:
        raise ValueError(f"{caller}: model must have an ASGL layer, got a {type(model).__name__} without")
    return layers


def check_module(model: Any, caller: str) -> None:
    """Refuses anything that is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
