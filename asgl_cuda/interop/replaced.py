"""`convert(model, layers={TheirLIF: make})`: neurons of a user's own classes, replaced by layers that `make` returns.

The layer takes the module's place under all its paths, loads the module's state dict where names agree or a hook of the
layer maps them, and keeps the module for `revert`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..checks import format_value

_KEPT = "_asgl_cuda_replaced"  # attribute of a layer that holds the module that it has replaced


def make_replacements(
    model: nn.Module, layers: Mapping[type[nn.Module], Callable[[Any], Any]] | None, caller: str
) -> dict[nn.Module, tuple[nn.Module | None, str]]:
    """Makes the new layers by the functions in `layers`, without changing the model.

    Returns a pair for each module whose class is in `layers`: the new layer and its description; or, if the function
    returned None, None and a text that says so.
    """
    layers = _checked_layers(layers, caller)
    if type(model) in layers:
        name = type(model).__name__
        raise ValueError(
            f"{caller}: layers can only replace modules inside of model, got a {name} as model; pass "
            "torch.nn.Sequential(model)"
        )
    found: dict[nn.Module, tuple[nn.Module | None, str]] = {}
    inside: list[str] = []  # path prefixes of modules that are replaced as a whole
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) not in layers or path.startswith(tuple(inside)):
            continue
        inside.append(f"{path}.")
        if module in found:
            continue
        layer, text = _make_replacement(module, layers[type(module)], f"{caller}: the function in layers for {path}")
        if layer is not None and any(layer is each for each, _ in found.values()):
            raise ValueError(
                f"{caller}: layers[{type(module).__name__}] must return a new layer for each module, got for {path!r} "
                "a layer that replaces another module already"
            )
        found[module] = layer, text
    return found


def notes_on_unused(
    model: nn.Module, layers: Mapping[type[nn.Module], Any] | None, replaced: Iterable[nn.Module]
) -> list[str]:
    """A note for each class in `layers` that was applied to no module. It names a module that may have been meant."""
    used = {type(module) for module in replaced}
    notes = []
    for kind in layers or {}:
        if kind not in used:
            others = [
                (path, type(module)) for path, module in model.named_modules() if path and type(module) not in used
            ]
            hints = (_reason_unused(path, found, kind) for path, found in others)
            notes.append(f"layers[{kind.__name__}] was applied to no module" + next(filter(None, hints), ""))
    return notes


def _reason_unused(path: str, found: type[nn.Module], kind: type[nn.Module]) -> str:
    """Why the class `kind` was not applied to a module of the class `found`, or "" if the two are not alike."""
    if found is kind:
        return f"; {path} is inside of a module of another class in layers"
    if issubclass(found, kind):
        return f"; {path} is a {found.__name__}, a subclass, and classes must match exactly"
    return f"; {path} has another class of this name" if found.__name__ == kind.__name__ else ""


def _checked_layers(layers: Any, caller: str) -> Mapping[type[nn.Module], Callable[[Any], Any]]:
    """Checks the argument `layers` of `convert`. Returns {} for None."""
    if layers is None:
        return {}
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"{caller}: layers must map classes to functions, such as {{TheirLIF: make}}, got {format_value(layers)}"
        )
    for kind, make in layers.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"{caller}: keys of layers must be subclasses of torch.nn.Module, got {format_value(kind)}")
        if not callable(make) or isinstance(make, nn.Module):
            raise TypeError(
                f"{caller}: layers[{kind.__name__}] must be a function that takes a module, got {format_value(make)}"
            )
    return layers


def _make_replacement(module: nn.Module, make: Callable[[Any], Any], where: str) -> tuple[nn.Module | None, str]:
    """Calls `make` for a module. Returns the new layer and its description, or None and a text that says so."""
    name = type(module).__name__
    try:
        layer = make(module)
    except Exception as error:  # functions of users may raise anything
        raise RuntimeError(f"{where} ({name}) raised {type(error).__name__}: {error}") from error
    if layer is None:
        return None, f"layers[{name}] returned None"
    if not isinstance(layer, nn.Module) or layer is module:
        given = "the module itself" if layer is module else format_value(layer)
        raise TypeError(f"{where} ({name}) must return another torch.nn.Module or None, got {given}")
    try:
        lacking = layer.load_state_dict(module.state_dict(), strict=False).unexpected_keys
    except RuntimeError as error:
        raise RuntimeError(
            f"{where} ({name}) returned a {type(layer).__name__} into which the module's state dict does not load: "
            f"{error}"
        ) from error
    return layer, f"{type(layer).__name__}{', which has no ' if lacking else ''}{', '.join(lacking)}"


def replace_module(model: nn.Module, module: nn.Module, layer: nn.Module) -> None:
    """Puts the layer in the module's place under all paths, and keeps the module for `revert`."""
    _replace_in_parents(model, module, layer)
    layer.__dict__[_KEPT] = module


def _replace_in_parents(model: nn.Module, module: nn.Module, layer: nn.Module) -> None:
    """Makes the layer a child of each parent of the module, instead of the module."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = layer
    layer.train(module.training)


def replaced_module(layer: nn.Module) -> nn.Module | None:
    """The module that the layer has replaced by `convert(model, layers=...)`, or None."""
    return layer.__dict__.get(_KEPT)


def restore_module(model: nn.Module, layer: nn.Module) -> tuple[nn.Module, list[str]]:
    """Puts the module that `layer` has replaced back, with the layer's values of the same names and shapes.

    Returns the module, and the names of those parameters of the layer that the module does not have.
    """
    module: nn.Module = layer.__dict__.pop(_KEPT)
    _replace_in_parents(model, layer, module)
    tensor = next(chain(layer.parameters(), layer.buffers()), None)
    if tensor is not None:
        module.to(tensor.device)
    values, own = layer.state_dict(), module.state_dict()
    same = {name for name, value in own.items() if name in values and values[name].shape == value.shape}
    with torch.no_grad():
        for name in same:
            own[name].copy_(values[name])
    shared = {id(parameter) for parameter in module.parameters()}
    named = layer.named_parameters()
    return module, [name for name, value in named if name not in same and id(value) not in shared]
