"""The libraries whose layers are known, and their adapters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import authors

# Libraries, named like the adapters' files, and the modules that define neuron layers, the current one first.
LIBRARIES = {
    "spikingjelly": ("spikingjelly.activation_based", "spikingjelly.clock_driven"),
    "snntorch": ("snntorch",),
    "norse": ("norse.torch",),
    "sinabs": ("sinabs.layers",),
}


def libraries() -> Iterator[Any]:
    """The adapters of the imported libraries.

    Required: `find(layer)`, see `Found`; `streamed(module)`, see `InStream`; `outside(module)`: how a module that
    `OverTime` refuses is put outside of it, or None. Optional: `reset(module)` and `detach(module)`: clear or detach
    the module's state; `not_written(module)`: why `to_nir` can't write it, or None;
    `copy_layers(model, memo)`: fills deepcopy's memo with layers that their own __deepcopy__ would spoil;
    `enlist(model)`: registers a copy with the library; NORMALISATIONS: equivalents of torch.nn's classes; PLAIN:
    torch.nn's classes, keyed by the library's equivalents.
    """
    yield authors
    for name, modules in LIBRARIES.items():
        if any(sys.modules.get(module) is not None for module in modules):
            yield importlib.import_module(f".{name}", __package__)


def vendored_spikingjelly_reason(layer: nn.Module) -> str | None:
    """Why to leave a node from a vendored copy of SpikingJelly, or None. SpikingJelly itself may be missing."""
    for each in type(layer).__mro__:
        package, found, _ = each.__module__.partition(".spikingjelly.")
        if found and hasattr(layer, "neuronal_charge"):
            return (
                f"it is of {package}.spikingjelly, a copy of SpikingJelly that convert does not know; import "
                "spikingjelly itself instead, or pass its class in layers"
            )
    return None
