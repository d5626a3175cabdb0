"""`convert` and `revert`: replace neuron layers of other libraries by fused ones, and restore them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import BACKENDS
from ..checks import check_analog_prob, check_bool, check_name, check_surrogate, check_width, format_value, read_number
from ..neurons.base import NeuronLayer, check_module
from ..neurons.lif import LIF_DEFAULTS
from ..neurons.over_time import KNOWS_TIME
from .converted import HOOKS, Converted, Settings, bare_class, name_clash_reason, overlaid_class, replaced_method_reason
from .identify import FLAT, SpikeFunction, fires_strictly, identify_spike_function, is_spike_function, spike_dtype
from .libraries import LIBRARIES, imported_adapters, vendored_spikingjelly_reason
from .replaced import make_replacements, notes_on_unused, replace_module, replaced_module, restore_module
from .sequences import InSequences, checked_sequences, overlay_model, refusal_reason

_CALLER = "asgl_cuda.convert"


class Replaced(NamedTuple):
    """A replaced layer: its path, its class and what computes it now."""

    path: str
    layer: str
    by: str


class Left(NamedTuple):
    """A layer that was not changed, or a value that `revert` could not keep: path, class and reason."""

    path: str
    layer: str
    reason: str


class _Rows(NamedTuple):
    """The fields of `Report`, which is a subclass because a NamedTuple can't have other attributes."""

    replaced: list[Replaced]
    left: list[Left]


class Report(_Rows):
    """The layers that a function such as `convert` has changed, and those that it left: `replaced, left = report`.

    `print(report)` shows both lists as a table, and then `notes`, such as advice on speed, or why nothing was found.
    """

    notes: Sequence[str] = ()

    def __str__(self) -> str:
        rows = [(row.path or "(the model)", row.layer, row.by) for row in self.replaced]
        rows += [(row.path or "(the model)", row.layer, f"left: {row.reason}") for row in self.left]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        lines = [f"{path:<{widths[0]}}  {layer:<{widths[1]}}  {text}" for path, layer, text in rows]
        return "\n".join([f"{len(self.replaced)} replaced, {len(self.left)} left", *lines, *self.notes])


class _ASGL(NamedTuple):
    """The argument `asgl` of `convert`, with defaults."""

    surrogate: str | None = None
    width: float | None = None
    analog_prob: float = 0.5
    learn_width: bool = True


def _checked_asgl(asgl: Mapping[str, Any] | None) -> _ASGL | None:
    """Checks the argument `asgl` and fills in its defaults. Returns None if it is None."""
    if asgl is None:
        return None
    if not isinstance(asgl, Mapping):
        raise TypeError(
            f'{_CALLER}: asgl must be None or a mapping such as {{"width": 1.0, "analog_prob": 0.2}} ({{}} for the '
            f"defaults), got {format_value(asgl)}"
        )
    if unknown := set(asgl) - set(_ASGL._fields):
        known, got = ", ".join(_ASGL._fields), ", ".join(sorted(map(str, unknown)))
        raise TypeError(f"{_CALLER}: the keys of asgl must be among {known}, got {got}")
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


def _class_and_placement(module: nn.Module) -> tuple[str, str] | None:
    """For errors of `OverTime`: the class of a library's layer that it refuses, and how to use this layer; or None."""
    outside = next((text for each in imported_adapters() if (text := each.placement_outside_over_time(module))), None)
    return None if outside is None else (bare_class(module).__name__, outside)


KNOWS_TIME.append(_class_and_placement)


def convert(
    model: nn.Module,
    *,
    asgl: Mapping[str, Any] | None = None,
    layers: Mapping[type[nn.Module], Callable[[Any], nn.Module | None]] | None = None,
    inplace: bool = False,
    sequences: bool | str = False,
    backend: str | None = None,
) -> tuple[nn.Module, Report]:
    """Replaces the neurons of a model by fused ones: ``fast, report = asgl_cuda.convert(model)``.

    These layers are converted:

    - SpikingJelly's `IFNode` and `LIFNode` with their Simple and NonSpiking forms, `ParametricLIFNode`, `CUBALIFNode`,
      `ILIFNode`, the MultiStep forms of `clock_driven`, `LinearRecurrentContainer` and `ElementWiseRecurrentContainer`.
    - snnTorch's `Leaky`, `Lapicque`, `Synaptic`, `RLeaky` and `RSynaptic`.
    - Norse's `LIF`, `IAF`, `LI` and `LIFRecurrent`, and `LIFCell`, `IAFCell`, `LIFBoxCell` and `LIFRecurrentCell`; with
      `sequences="loop"` also `LICell` and `LIBoxCell`.
    - sinabs' `LIF`, `IAF` and `ExpLeak` with their Squeeze forms, `LIFRecurrent` and `IAFRecurrent`.
    - `LIFLayer` of the code published by the authors of ASGL.

    Recurrent layers are converted if their spikes return through a Linear, through one weight per neuron, or multiplied
    by a number. A subclass of a layer without recurrent weights is also converted, if it overrides no method except
    `__init__`, `train`, `extra_repr` and the reset. The guide "Models of other libraries" lists what is not converted.

    Without `asgl`, spikes, states and gradients stay the same up to rounding, but layers of the authors' code draw
    other random numbers for their noise in training. A spike can change if the potential differs from the threshold by
    no more than a rounding error, and then later spikes can change as well. The parameters of a layer, their names, its
    state and its base classes also stay the same. State dicts and functions such as SpikingJelly's `reset_net`
    therefore still work. With `asgl`, each learned width adds an entry `log_width` to the state dict. SpikingJelly's
    `backend` has no effect on converted layers.

    Decays and thresholds are read at each call. The following are read only once, at the conversion: the surrogate; the
    methods that the layer's forward calls; in snnTorch, Norse and sinabs the kind of reset; and in sinabs a threshold
    on which the surrogate may depend. If one of these changes later, the next call in eager mode that runs a kernel
    raises a RuntimeError that names the difference. After a conversion with `asgl`, the library's surrogate is no
    longer used. If you change it, only Norse's layers still raise this error.

    A layer is left as it is, and the report gives the reason, if no fused layer computes the same, or if the layer has
    one of these: a surrogate unknown to asgl_cuda (which `asgl` replaces), a replaced method (`layer.fire = ...`), or
    an attribute with a name that converted layers use.

    Outputs have the same dtypes as those of the original layers, also under autocast. `torch.jit.trace` and
    `torch.jit.script` raise a RuntimeError for converted layers.

    The class of a converted layer is a subclass of its original class. Call `revert` before you use code that compares
    types for equality, such as `sinabs.nir.to_nir`.

    With `sequences` the model's own code runs step by step, but on placeholders for values that are computed later.
    After the last step each layer computes all steps in one call, and so does each other operation that every step
    repeats, such as a linear layer or a convolution. Outputs, gradients and the states that layers keep are those of
    the original model, up to rounding, but random numbers are drawn in another order. `convert` then refuses a model if
    one of its neuron layers can't be converted. A call raises a RuntimeError that names the layer or function if, for
    example, spikes return to an earlier layer, or if the code needs the value of spikes between two steps, as in
    `if spikes.sum() > 0`. The guide lists further cases.

    Args:
        model: any module, or a neuron layer.
        asgl: turns the replaced layers into ASGL layers. A mapping with `surrogate` and initial `width` (default: those
            of the layer, or of `LIF` if the layer has no surrogate that asgl_cuda knows), `analog_prob` (default 0.5)
            and `learn_width` (default True). A learned width is a new parameter `log_width` of each layer, which must
            be passed to the optimizer. Layers of the authors' code are ASGL layers already. They keep their own
            surrogate, width and `analog_prob`. Layers that do not fire get no width, and layers with several spikes per
            step are not converted.
        layers: for neurons of your own, functions by class, `{Class: make}`. `make(module)` returns a layer, such as
            `asgl_cuda.LIF`, that replaces the module under all its paths, or None to leave the module. Classes match
            exactly, so a subclass needs a key of its own. The new layer loads the state dict of the replaced module,
            whose entries are matched by name. The guide shows how to rename them. The parameters of the new layer are
            new objects. Pass all of them to the optimizer, also with `inplace=True`.
        inplace: convert the model instead of a copy. Existing optimizers stay valid, but lack two kinds of new
            parameters: those of layers made by the functions in `layers`, and the widths learned with `asgl`.
        sequences: for a model whose layers take one step per call, compute all time steps at once, as described above.
            With True, a call of the result takes `x_seq` `[T, ...]`, starts at rest, and returns what the model returns
            for each step, stacked to `[T, ...]`. If `fast.stateful = True` is set, a call continues from the states of
            the call before, if this was stateful too. Give "loop" if the forward of the model contains the loop over
            the steps; the result is then called as the model is. Default False: calls stay as they are.
        backend: backend of all layers, see `asgl_cuda.lif`.

    Returns:
        The model, which is a copy unless `inplace=True`, and a `Report` with the lists `replaced` and `left`. `print`
        shows both, with advice on speed.

    Raises:
        TypeError, ValueError: an argument is invalid.
        TypeError: a function in `layers` returns neither another module nor None.
        ValueError: `asgl` or `backend` is given and the model already contains a converted layer, or `sequences`
            refuses the model.
        RuntimeError: the model can't be copied, or a tensor in the state dict of a module has another shape than in the
            state dict of its replacement, or a function in `layers` raises an error, which becomes the `__cause__`.

    After an error the model is unchanged.

    Example::

        import snntorch

        model = torch.nn.Sequential(torch.nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
        fast, report = asgl_cuda.convert(model)
        print(report)
        spikes = fast(torch.rand(2, 4))

        fast, report = asgl_cuda.convert(model, sequences=True)
        spikes = fast(torch.rand(10, 2, 4))  # [T, B, 3]
    """
    wanted = _checked_asgl(asgl)
    kind = checked_sequences(sequences)
    if backend is not None:
        check_name("backend", backend, BACKENDS, _CALLER)
    model = model_or_copy(model, inplace, _CALLER)
    if wanted is not None or backend is not None:
        _check_unconverted(model)
    made = make_replacements(model, layers, _CALLER)
    unused = notes_on_unused(model, layers, made)
    name_of_function = "conversion_in_loop" if kind else "conversion_of"
    adapters = [getattr(library, name_of_function, library.conversion_of) for library in imported_adapters()]
    report = Report([], [])
    new: list[Converted] = []
    inside: list[str] = []  # path prefixes of replaced layers, whose submodules are not reported
    for path, layer in list(model.named_modules()):
        if path.startswith(tuple(inside)):
            continue
        name = type(layer).__name__
        if layer in made:
            replacement, text = made[layer]
            if replacement is None:
                report.left.append(Left(path, name, text))
            else:
                replace_module(model, layer, replacement)
                report.replaced.append(Replaced(path, name, text))
            inside.append(f"{path}.")
            continue
        if isinstance(layer, Converted):
            inside.append(f"{path}." if path else "")
            continue
        answers = (conversion_of(layer) for conversion_of in adapters)
        found = vendored_spikingjelly_reason(layer) or next((each for each in answers if each is not None), None)
        if found is None:
            continue
        if not isinstance(found, str):
            found = replaced_method_reason(layer) or name_clash_reason(layer, found[0]) or found
        spike = found if isinstance(found, str) else _spike_function(found[0], found[1], wanted)
        if isinstance(found, str) or isinstance(spike, str):
            report.left.append(Left(path, name, found if isinstance(found, str) else str(spike)))
            continue
        layer.__class__ = overlaid_class(found[0], type(layer))
        assert isinstance(layer, Converted)
        analog_prob, learn_width = (0.0, False) if wanted is None else (wanted.analog_prob, wanted.learn_width)
        settings = Settings(spike, backend, spike_dtype(found[1]), wanted is not None)
        layer.begin_conversion(settings, analog_prob, learn_width)
        new.append(layer)
        report.replaced.append(Replaced(path, name, layer.description()))
        inside.append(f"{path}." if path else "")
    if kind is not None:
        if reason := refusal_reason(model, report.left, kind):
            for layer in new:
                layer.restore_original()
            for layer, _ in made.values():
                if layer is not None:
                    restore_module(model, layer)
            raise ValueError(f"{_CALLER}: with sequences, {reason}")
        report.replaced.insert(0, Replaced("", bare_class(model).__name__, overlay_model(model, kind)))
    report.notes = _report_notes(model, report) + unused
    return model, report


def _check_unconverted(model: nn.Module) -> None:
    """Raises ValueError if a layer is converted already, because it would keep the settings that it has."""
    paths = [path or "(the model)" for path, layer in model.named_modules() if isinstance(layer, Converted)]
    if paths:
        names = ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        raise ValueError(
            f"{_CALLER}: asgl and backend can't be applied to layers that are converted already, got {names}; convert "
            "the original layers, with asgl_cuda.convert(asgl_cuda.revert(model)[0], ...)"
        )


def _report_notes(model: nn.Module, report: Report) -> list[str]:
    """The notes of a report: advice on speed, hooks that are no longer called, or why `convert` changed nothing."""
    advice: dict[str, list[str]] = {}  # the paths of the layers for each advice
    for path, *_ in report.replaced:
        layer: Any = model.get_submodule(path)
        for text in _notes_on_layer(layer, isinstance(model, InSequences)):
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
    imported = ", ".join(name for name in LIBRARIES if name in sys.modules) or "none"
    known = ", ".join(LIBRARIES)
    return [
        f"no neurons that convert knows among {', '.join(sorted(kinds))}; it knows those of {known} once these are "
        f"imported; imported: {imported}"
    ]


def _notes_on_layer(layer: Any, in_sequences: bool) -> Iterator[str]:
    """The notes on one replaced layer: advice on speed, and parts whose hooks are no longer called."""
    uncalled = {"the module that it replaces": replaced_module(layer)}
    if isinstance(layer, Converted):
        if not in_sequences and (text := layer.speed_advice()) is not None:
            yield text
        uncalled = layer.dependencies()
    for name, part in uncalled.items():
        modules = part.modules() if isinstance(part, nn.Module) else ()
        if any(getattr(module, hooks) for module in modules for hooks in HOOKS):
            yield f"hooks of {name} are no longer called"


def model_or_copy(
    model: nn.Module, inplace: bool, caller: str, remedy: str = "pass inplace=True to change the model itself"
) -> nn.Module:
    """The model if `inplace`, otherwise a copy that is registered with its library. Checks both arguments."""
    check_module(model, caller)
    if check_bool("inplace", inplace, caller):
        return model
    made = copy_model(model, caller, remedy)
    for library in imported_adapters():
        getattr(library, "register_with_library", lambda model: None)(made)
    return made


def copy_model(model: nn.Module, caller: str, remedy: str = "", share: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy that shares the tensors in `share`. Non-leaf tensors, such as potentials, are detached.

    Raises RuntimeError, with `remedy` at its end, for a model that can't be copied.
    """
    memo: dict[int, Any] = {id(value): value for value in share}
    for module in model.modules():
        attributes = vars(module)
        for values in (attributes, *(value for value in attributes.values() if isinstance(value, dict))):
            graphs = (value for value in values.values() if isinstance(value, Tensor) and not value.is_leaf)
            memo.update((id(value), value.detach().clone()) for value in graphs)
    for library in imported_adapters():
        getattr(library, "copy_layers", lambda model, memo: None)(model, memo)
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # raised by a user's __deepcopy__, among others
        end = remedy and f"; {remedy}"
        raise RuntimeError(f"{caller}: the model can't be copied ({type(error).__name__}: {error}){end}") from error
    _copy_hooks(memo)
    return made


def _copy_hooks(memo: dict[int, Any]) -> None:
    """Registers the hooks of the original tensors on their copies, because deepcopy drops hooks."""
    for value in memo.get(id(memo), ()):  # where deepcopy keeps the originals
        if not isinstance(value, Tensor) or not value.is_leaf or memo[id(value)] is value:
            continue
        for hook in (value._backward_hooks or {}).values():
            memo[id(value)].register_hook(copy.deepcopy(hook, memo))
        for hook in (value._post_accumulate_grad_hooks or {}).values():
            memo[id(value)].register_post_accumulate_grad_hook(copy.deepcopy(hook, memo))


def _spike_function(
    kind: type[Converted],
    function: Callable[[Tensor], Tensor] | SpikeFunction | None,
    wanted: _ASGL | None,
) -> SpikeFunction | str | None:
    """The spike function with which a layer is converted; why it can't be, a str; None if the layer does not fire."""
    if wanted is not None and kind.multi_spike:
        return "it may spike several times per step, which ASGL layers can't; without asgl it can be converted"
    if function is None or isinstance(function, SpikeFunction):
        return function
    if wanted is None:
        return identify_spike_function(function)
    surrogate, width = wanted.surrogate, wanted.width
    if surrogate is None or width is None:
        own = identify_spike_function(function)
        if isinstance(own, str) and not is_spike_function(function):
            return f"{own}; to replace it, asgl needs both surrogate and width"
        if isinstance(own, str) or own.width == FLAT:
            own = SpikeFunction(LIF_DEFAULTS["surrogate"], float(LIF_DEFAULTS["width"]), 1.0, False)
        surrogate, width = surrogate or own.surrogate, width or own.width
    return SpikeFunction(surrogate, width, 1.0, fires_strictly(function))


def revert(model: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Restores a model's original neuron layers: ``original, report = asgl_cuda.revert(fast)``.

    Parameters and buffers keep their values. If a function in the argument `layers` of `convert` has replaced a module,
    `revert` restores the module. The module then gets the new layer's values of those parameters and buffers that have
    the same names and shapes in both.

    If `convert` was called with `asgl`, learned widths and `analog_prob` are lost, because the layers of the libraries
    do not have them. In evaluation, the restored layers emit the same spikes as the ASGL layers, up to rounding, but
    have other gradients.

    Args:
        model: a module returned by `convert`.
        inplace: revert the model instead of a copy.

    Returns:
        The model, and a `Report`. Its `replaced` lists the restored layers, and its `left` the learned widths and other
        parameters that are lost.

    Raises TypeError if `model` is not a module, and RuntimeError if it can't be copied.

    Example::

        import snntorch

        fast, _ = asgl_cuda.convert(torch.nn.Sequential(torch.nn.Linear(4, 3), snntorch.Leaky(beta=0.9)))
        original, report = asgl_cuda.revert(fast)
        print(report)
    """
    model = model_or_copy(model, inplace, "asgl_cuda.revert")
    report = Report([], [])
    if isinstance(model, InSequences):
        model.end_sequences()
    for path, layer in list(model.named_modules()):
        if replaced_module(layer) is not None:
            module, lost = restore_module(model, layer)
            name = type(module).__name__
            report.replaced.append(Replaced(path, type(layer).__name__, name))
            report.left.extend(Left(path, name, f"its {each}: {name} has no such parameter") for each in lost)
        if not isinstance(layer, Converted):
            continue
        name, made = bare_class(layer).__name__, type(layer).__name__
        if layer.settings.spike is not None and layer.log_width is not None:
            width = float(torch.as_tensor(layer.width).detach())
            report.left.append(Left(path, name, f"its learned width, {width:.4g}, which is not its own surrogate's"))
        layer.restore_original()
        report.replaced.append(Replaced(path, made, name))
    return model, report
