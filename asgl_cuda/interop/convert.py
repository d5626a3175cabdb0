"""`convert` and `revert`: other libraries' neuron layers on the fused neuron, and back."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..backends import BACKENDS
from ..checks import check_analog_prob, check_bool, check_name, check_surrogate, check_width, read_number, shown
from ..layer import NeuronLayer, check_module
from ..over_time import KNOWS_TIME
from . import authors
from .converted import Converted, Settings, bare_class, exchanged, overlaid
from .identify import SpikeFunction, fires_strictly, identify, type_of_spikes
from .normalised import Normalised

_CALLER = "asgl_cuda.convert"

# Libraries, whose names files of this folder have, and the modules without which there are no layers of theirs.
LIBRARIES = {
    "spikingjelly": "spikingjelly.activation_based",
    "snntorch": "snntorch",
    "norse": "norse.torch",
    "sinabs": "sinabs.layers",
}


class Replaced(NamedTuple):
    """A converted layer: its path, its class, and its computation now."""

    path: str
    layer: str
    by: str


class Left(NamedTuple):
    """A neuron layer, or a value, that was not converted: its path, its class, and the reason."""

    path: str
    layer: str
    reason: str


class _Rows(NamedTuple):
    replaced: list[Replaced]
    left: list[Left]


class Report(_Rows):
    """The layers that `convert`, `fuse` and their inverses changed and left: `replaced, left = report`.

    `print` shows it as a table, with `notes` under it: what would be faster, or why nothing was found.
    """

    notes: Sequence[str] = ()

    def __str__(self) -> str:
        rows = [(row.path or "(the model)", row.layer, row.by) for row in self.replaced]
        rows += [(row.path or "(the model)", row.layer, f"left: {row.reason}") for row in self.left]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        lines = [f"{path:<{widths[0]}}  {layer:<{widths[1]}}  {text}" for path, layer, text in rows]
        return "\n".join([f"{len(self.replaced)} replaced, {len(self.left)} left", *lines, *self.notes])


class _ASGL(NamedTuple):
    """The argument `asgl` of `convert`, and its defaults."""

    surrogate: str | None = None
    width: float | None = None
    analog_prob: float = 0.2
    learn_width: bool = True


def _checked(asgl: Mapping[str, Any] | None) -> _ASGL | None:
    if asgl is None:
        return None
    if not isinstance(asgl, Mapping):
        raise TypeError(
            f'{_CALLER}: asgl must be None or a mapping such as {{"width": 1.0, "analog_prob": 0.2}}, {{}} for the '
            f"defaults, got {shown(asgl)}"
        )
    if unknown := set(asgl) - set(_ASGL._fields):
        known, got = ", ".join(_ASGL._fields), ", ".join(sorted(map(str, unknown)))
        raise TypeError(f"{_CALLER}: asgl may have {known}, got {got}")
    surrogate, width, analog_prob, learn_width = _ASGL(**asgl)
    learn_width = check_bool("learn_width", learn_width, _CALLER)
    if width is not None:
        width = read_number("width", width, _CALLER, learn_width, "learn_width")
        check_width(width, _CALLER)
    analog_prob = read_number("analog_prob", analog_prob, _CALLER)
    check_analog_prob(analog_prob, _CALLER)
    if surrogate is not None:
        check_surrogate(surrogate, _CALLER)
    return _ASGL(surrogate, width, analog_prob, learn_width)


def libraries() -> Iterator[Any]:
    """The adapters of this folder for the imported libraries.

    Each has `find(layer)`: see `Found`; `streamed(module)`: see `InStream`; `knows_time(module)`: whether the module
    carries state from step to step, and is refused by `OverTime`. Optional are `wrapped(module)`: the module as a
    Wrapper, or None; `reset(module)` and `detach(module)`: clear or detach the module's state; `enlist(model)`:
    registers a copy with the library; NORMALISATIONS: classes that compute the same as torch.nn's; PARTING: classes
    that unflatten time and batch; PLAIN: torch.nn's classes by the library's forms of them.
    """
    yield authors
    for name, module in LIBRARIES.items():
        if sys.modules.get(module) is not None:
            yield importlib.import_module(f".{name}", __package__)


KNOWS_TIME.append(lambda module: any(library.knows_time(module) for library in libraries()))


def convert(
    model: nn.Module, *, asgl: Mapping[str, Any] | None = None, inplace: bool = False, backend: str | None = None
) -> tuple[nn.Module, Report]:
    """Computes the neuron layers of a model by the fused neuron: ``fast, report = asgl_cuda.convert(model)``.

    Two results: the model, a copy unless `inplace`, and what became of its layers.

    Known are SpikingJelly's `IFNode` and `LIFNode` with their Simple and NonSpiking forms, `ParametricLIFNode` and
    `CUBALIFNode`, snnTorch's `Leaky`, `Lapicque` and `Synaptic`, Norse's `LIF`, `IAF` and `LI`, `LIFCell`, `IAFCell`
    and `LIFBoxCell`, sinabs' `LIF`, `IAF` and `ExpLeak` with their Squeeze forms, and `LIFLayer` of the code that the
    authors of ASGL published. Synaptic currents and layers that do not fire are computed by `leaky_integrator`. A
    converted layer gives the same spikes, states and gradients as before, up to rounding: a potential that lands on the
    threshold but for the last place, as with quantised inputs, may fire where it did not. It keeps its parameters, with
    their names, its state and its place among the library's classes, so that an optimizer, a state dict and functions
    like SpikingJelly's `reset_net` go on working. Its values are read at each call; where its surrogate, or anything
    else that decides how it is computed, is another than at the last call, the surrogate is determined anew, in some
    milliseconds, or RuntimeError says why it can't be computed any more. A compiled graph sees attributes that are set,
    but no writes to tensors that a surrogate depends on, as Norse's `alpha`. SpikingJelly's own `backend` is without
    effect on it. Layers that can't be represented exactly are left as they are, and so are those of which a method was
    exchanged, as by `layer.fire = ...`; the report says why.

    Outputs have the types that the library gives them, under autocast as well. `torch.jit.trace` records the library's
    own operations, which compute the same, except noise; `torch.jit.script` takes no converted layer. In a copy, hooks
    of tensors are registered again.

    A converted layer is an instance of its class, but its type is another: code that compares types, as
    `sinabs.nir.to_nir`, `sinabs.conversion.replace_module` and some counters of SpikingJelly do, does not know it;
    `revert` comes first there. Where a layer can't be copied, as sinabs' recurrent ones, `inplace=True` works.

    Args:
        model: any module, also a neuron layer itself.
        asgl: makes the replaced layers ASGL layers: a mapping with `surrogate` and `width` at the start (default: the
            layer's own), `analog_prob` (default 0.2) and `learn_width` (default True). The width is then a new
            parameter `log_width` of each layer, for the optimizer to know. Layers of the authors' code are ASGL layers
            as they are; they keep their own width and share of analog elements. Layers that do not fire become none,
            and those that may spike several times a step are left.
        inplace: convert the model itself and not a copy; optimizers then hold its parameters already.
        backend: of all layers, see `asgl_cuda.lif`.

    Returns:
        The model, and a `Report` with the lists `replaced` and `left`; `print` shows it, with what would be faster.

    Raises TypeError or ValueError for arguments that are not as described, and RuntimeError where the model can't be
    copied; it is then unchanged.

    Example::

        import snntorch

        model = torch.nn.Sequential(torch.nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
        fast, report = asgl_cuda.convert(model)
        print(report)
        spikes = fast(torch.rand(2, 4))
    """
    wanted = _checked(asgl)
    if backend is not None:
        check_name("backend", backend, BACKENDS, _CALLER)
    model = taken(model, inplace, _CALLER)
    known = list(libraries())
    report = Report([], [])
    inside: list[str] = []  # path prefixes of replaced layers, whose submodules are not reported
    for path, layer in list(model.named_modules()):
        if path.startswith(tuple(inside)):
            continue
        name = type(layer).__name__
        if isinstance(layer, Converted):
            if wanted is not None or backend is not None:
                fused = isinstance(layer, Normalised)
                first = "asgl_cuda.unfuse and revert come" if fused else "asgl_cuda.revert comes"
                report.left.append(Left(path, name, f"it is converted already, with its own settings: {first} first"))
            continue
        found = next((answer for library in known if (answer := library.find(layer)) is not None), None)
        if found is None:
            continue
        found = found if isinstance(found, str) else exchanged(layer) or found
        spike = found if isinstance(found, str) else _spike_function(found[0], found[1], wanted)
        if isinstance(found, str) or isinstance(spike, str):
            report.left.append(Left(path, name, found if isinstance(found, str) else str(spike)))
            continue
        layer.__class__ = overlaid(found[0], type(layer))
        assert isinstance(layer, Converted)
        analog_prob, learn_width = (0.0, False) if wanted is None else (wanted.analog_prob, wanted.learn_width)
        settings = Settings(spike, backend, type_of_spikes(found[1]), wanted is not None)
        layer.begin(settings, analog_prob, learn_width)
        layer.take_snapshot()
        report.replaced.append(Replaced(path, name, layer.description()))
        inside.append(f"{path}." if path else "")
    report.notes = _notes(model, report)
    return model, report


def _notes(model: nn.Module, report: Report) -> list[str]:
    """What would be faster, or why nothing was found."""
    advice: dict[str, list[str]] = {}  # the paths of each
    for path, *_ in report.replaced:
        layer: Any = model.get_submodule(path)
        if (text := layer.advice()) is not None:
            advice.setdefault(text, []).append(path or "(the model)")
    notes = [f"{', '.join(paths)}: {text}" for text, paths in advice.items()]
    if report.replaced or report.left:
        return notes
    ready = [
        f"{path or '(the model)'} is {'converted already' if isinstance(layer, Converted) else 'a layer of asgl_cuda'}"
        for path, layer in model.named_modules()
        if isinstance(layer, Converted | NeuronLayer)
    ]
    if ready:
        return ready
    kinds = {type(module).__name__ for module in model.modules() if next(module.children(), None) is None}
    return [f"no neurons that are known among {', '.join(sorted(kinds))}; {_imported()}"]


def _imported() -> str:
    """The imported libraries, as a note."""
    parts = []
    for package, module in LIBRARIES.items():
        if package in sys.modules:
            lacking = "" if module in sys.modules else f", but not {module}, which has the neurons that are known"
            parts.append(f"{package} {_version_of(package)}{lacking}")
    if not parts:
        *others, last = LIBRARIES.values()
        return f"no library of neurons is imported; known are {', '.join(others)} and {last}"
    return f"imported: {'; '.join(parts)}"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def taken(model: nn.Module, inplace: bool, caller: str) -> nn.Module:
    """The model or a copy, registered with the libraries as the model is; checks both arguments."""
    check_module(model, caller)
    if check_bool("inplace", inplace, caller):
        return model
    try:
        made = copied(model)
    except Exception as error:  # by a __deepcopy__ of the user
        path, layer = next(row for row in reversed(list(model.named_modules())) if not _can_be_copied(row[1]))
        raise RuntimeError(
            f"{caller}: {path or 'the model'} ({type(layer).__name__}) can't be copied, not by copy.deepcopy either "
            f"({type(error).__name__}: {error}); inplace=True changes the model itself"
        ) from error
    for library in libraries():
        getattr(library, "enlist", lambda model: None)(made)
    return made


def _can_be_copied(layer: nn.Module) -> bool:
    try:
        copied(layer)
    except Exception:
        return False
    return True


def copied(model: nn.Module, share: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy of all except `share`. Potentials in a graph, as after a call, are copied without it."""
    memo: dict[int, Any] = {id(value): value for value in share}
    for module in model.modules():
        attributes = vars(module)
        for values in (attributes, *(value for value in attributes.values() if isinstance(value, dict))):
            graphs = (value for value in values.values() if isinstance(value, Tensor) and not value.is_leaf)
            memo.update((id(value), value.detach().clone()) for value in graphs)
    made = copy.deepcopy(model, memo)
    _carry_over(model, made, memo)
    return made


# Attributes with hooks of tensors, and functions that register a hook.
_REGISTER: dict[str, Callable[..., Any]] = {
    "_backward_hooks": Tensor.register_hook,
    "_post_accumulate_grad_hooks": Tensor.register_post_accumulate_grad_hook,
}
_MODULE_ATTRIBUTES = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}


def _carry_over(model: nn.Module, made: nn.Module, memo: dict[int, Any]) -> None:
    """Copies what deepcopy drops: hooks of tensors, and attributes ignored by a layer's own __deepcopy__."""
    twins = dict(made.named_modules())
    for path, module in model.named_modules():
        twin = twins.get(path)
        if twin is None or not hasattr(type(module), "__deepcopy__") or type(module).__module__.startswith("torch."):
            continue
        for name, value in vars(module).items():
            if name in _MODULE_ATTRIBUTES or name not in vars(twin):
                twin.__dict__[name] = copy.deepcopy(value, memo)
    tensors = dict(made.named_parameters(remove_duplicate=False)) | dict(made.named_buffers(remove_duplicate=False))
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    pairs = [(value, tensors[name]) for name, value in named if name in tensors]
    # Attributes that are tensors: deepcopy lists the copied objects at memo[id(memo)].
    pairs += [(value, memo[id(value)]) for value in memo.get(id(memo), ()) if isinstance(value, Tensor)]
    done: set[int] = set()
    for value, duplicate in pairs:
        if duplicate is value or id(duplicate) in done or not value.is_leaf:
            continue
        done.add(id(duplicate))
        if not is_lazy(value):
            duplicate.requires_grad_(value.requires_grad)
        for kind, register in _REGISTER.items():
            for hook in (getattr(value, kind) or {}).values():
                register(duplicate, copy.deepcopy(hook, memo))


def _spike_function(
    kind: type[Converted], function: Callable[[Tensor], Tensor] | SpikeFunction | None, wanted: _ASGL | None
) -> SpikeFunction | str | None:
    if wanted is not None and kind.multi_spike:
        return "it may spike several times a step, for which ASGL has no noise; without asgl it can be converted"
    if function is None or isinstance(function, SpikeFunction):
        return function
    if wanted is None:
        return identify(function)
    surrogate, width = wanted.surrogate, wanted.width
    if surrogate is None or width is None:
        own = identify(function)
        if isinstance(own, str):
            return f"{own}; asgl needs a surrogate and a width"
        surrogate, width = surrogate or own.surrogate, width or own.width
    return SpikeFunction(surrogate, width, 1.0, fires_strictly(function))


def revert(model: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Gives a model its original neuron layers back: ``original, report = asgl_cuda.revert(fast)``.

    Their parameters keep the values that training gave them.

    A learned width goes into the layer's own surrogate where that has one of the same kind (SpikingJelly's `alpha`,
    sinabs' `grad_width`); otherwise the report tells that it is lost. No library has a share of analog elements.

    Args:
        model: a module that `convert` returned.
        inplace: revert the model itself and not a copy.

    Returns:
        The model, and a `Report` of the layers.

    Raises TypeError where it is no module.

    Example::

        import snntorch

        fast, _ = asgl_cuda.convert(torch.nn.Sequential(torch.nn.Linear(4, 3), snntorch.Leaky(beta=0.9)))
        original, report = asgl_cuda.revert(fast)
        print(report)
    """
    model = taken(model, inplace, "asgl_cuda.revert")
    report = Report([], [])
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, Converted):
            continue
        name, made = bare_class(layer).__name__, type(layer).__name__
        if isinstance(layer, Normalised):
            report.left.append(Left(path, name, "it is fused with a normalisation: asgl_cuda.unfuse comes first"))
            continue
        if layer.settings.spike is not None and layer.log_width is not None and not layer.hold_width():
            width = float(torch.as_tensor(layer.width).detach())
            report.left.append(Left(path, name, f"its learned width, {width:.4g}: its own surrogate can't hold it"))
        layer.end()
        report.replaced.append(Replaced(path, made, name))
    return model, report
