"""The libraries whose layers `convert` knows, and their adapters: `authors`, and modules with a library's name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import authors

# The modules that define a library's neuron layers, the newest first, by the name of the library's adapter. A library
# counts as imported if one of these modules is imported.
LIBRARIES = {
    "spikingjelly": ("spikingjelly.activation_based", "spikingjelly.clock_driven"),
    "snntorch": ("snntorch",),
    "norse": ("norse.torch",),
    "sinabs": ("sinabs.layers",),
}


def imported_adapters() -> Iterator[Any]:
    """The module `authors`, whose layers are recognised without an import, then the adapters of imported libraries.

    Adapters are modules of this folder. Each has these functions:

    - `conversion_of(layer)`: how to convert a layer, see `Conversion`.
    - `streaming_of(module)`: how a module takes a sequence one time step per call, see `Streaming`.
    - `placement_outside_over_time(module)`: how to use a module that `OverTime` refuses, as the end of the error's
      sentence "put it outside, ..."; None for other modules.

    An adapter may have these as well:

    - `conversion_in_loop(layer)`: replaces `conversion_of` for `convert(model, sequences=...)`.
    - `reset(module)`, `detach(module)`: reset or detach the states of one module.
    - `reason_not_written(module)`: why `to_nir` can't write a module, or None.
    - `copy_layers(model, memo)`: copies layers whose own __deepcopy__ would not copy them completely, and enters the
      copies in deepcopy's memo.
    - `register_with_library(model)`: registers a copied model where the library looks for its layers.
    - NORMALISATIONS: the library's equivalents of torch.nn's normalisations.
    - PLAIN: classes of torch.nn by the library's classes that compute the same in evaluation.
    """
    yield authors
    for name, modules in LIBRARIES.items():
        if any(sys.modules.get(module) is not None for module in modules):
            yield importlib.import_module(f".{name}", __package__)


def vendored_spikingjelly_reason(layer: nn.Module) -> str | None:
    """Why a node of a vendored copy of SpikingJelly can't be converted; None for others. Imports nothing."""
    for each in type(layer).__mro__:
        package, found, inside = each.__module__.rpartition(".spikingjelly.")
        if found and inside.partition(".")[2].split(".")[0] == "neuron":  # as in activation_based.neuron.lif
            return (
                f"it is of {package}.spikingjelly, a copy of SpikingJelly that convert does not know; import "
                "spikingjelly itself instead, or pass its class in layers"
            )
    return None
