"""`to_spike_layers` and `from_spike_layers`: torch's layers of a model as spike layers, and back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..backends import available_backends
from ..checks import arguments_of, raise_explained
from ..neurons.base import check_module
from ..neurons.deferred import tensor_of
from ..spikes.functional import has_kernel
from ..spikes.layers import SPIKE_LAYERS, expected_speedup
from .convert import Left, Replaced, Report, copy_model
from .converted import Overlay, overlaid_class
from .libraries import imported_adapters
from .recording import Recorded

_DENSE = {ours: theirs for theirs, ours in SPIKE_LAYERS.items()}
_FEW = 32  # with fewer channels or outputs, lists of non-zero inputs cost more than they save
_LEAST_GAIN = 1.3  # a layer is replaced if its evaluation is estimated to be this many times as fast


class _SpikeOverlay(Overlay):
    """The overlay of SpikingJelly's Linear and convolutions, whose own forward handles time.

    This forward then calls that of its base class, which the overlay makes the spike layer's.
    """

    prefix = "Spike"

    @classmethod
    def bases_and_namespace(cls, original: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
        """The overlay, the library's class, and then the spike layer of the torch class from which that derives."""
        return (cls, original, next(SPIKE_LAYERS[base] for base in original.__mro__ if base in SPIKE_LAYERS)), {}


def _spike_class(kind: type[nn.Module]) -> Any:
    """The class of spike layers that replaces the class `kind`; None if `kind` may compute something else."""
    if kind in SPIKE_LAYERS:
        return SPIKE_LAYERS[kind]
    known = (library.PLAIN[kind] for library in imported_adapters() if kind in getattr(library, "PLAIN", ()))
    return overlaid_class(_SpikeOverlay, kind) if next(known, None) in SPIKE_LAYERS else None


def _reason_of_code(layer: Any) -> str:
    """Why a layer may compute something else than torch's layer; "" if it does not."""
    if _spike_class(type(layer)) is None:
        return "its class is a subclass of torch's layer, which may compute something else"
    if "forward" in vars(layer):
        return "its forward is an attribute of the layer, not the method of its class"
    return ""


def _reason_to_leave(layer: Any, shares: list[tuple[int, int]], kernels: bool) -> str:
    """Why a layer does not become a spike layer; "" if it does.

    `shares` has, for each call with the example, the numbers of non-zero inputs and of all inputs; `kernels` says
    whether kernels support these inputs.
    """
    if reason := _reason_of_code(layer):
        return reason
    outputs, inputs, *_ = layer.weight.shape
    if getattr(layer, "groups", 1) != 1 or any(each != 1 for each in getattr(layer, "dilation", ())):
        return "its groups or its dilation are not 1, for which spike layers have no kernel"
    if not shares:
        return "the example does not reach it"
    if not kernels and "cpu" not in available_backends():
        return "spike layers need the backend cpu, which is not available here; `python -m asgl_cuda info` says why"
    if not kernels:
        return "there are kernels only for float32 and float64 on the CPU"
    if outputs < _FEW or (inputs < _FEW and not isinstance(layer, nn.Linear)):
        return f"too small to gain: it has fewer than {_FEW} {'outputs' if outputs < _FEW else 'channels'}"
    if expected_speedup(layer, 0.0) < _LEAST_GAIN:
        return f"too small to gain: it has {inputs} inputs and {outputs} outputs"
    share = _nonzero_fraction(shares)
    gains = expected_speedup(layer, share) >= _LEAST_GAIN
    return "" if gains else f"its input is too dense: {share:.2f} of it is not zero"


def _weight_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers and convolutions of a model that are not spike layers, with their paths."""
    for name, layer in model.named_modules():
        if isinstance(layer, tuple(SPIKE_LAYERS)) and not isinstance(layer, tuple(_DENSE)):
            yield name, layer


def _nonzero_fraction(shares: list[tuple[int, int]]) -> float:
    """The fraction of non-zero inputs, from pairs of their number and the number of all inputs."""
    nonzero, elements = map(sum, zip(*shares, strict=True))
    return nonzero / max(elements, 1)


def to_spike_layers(model: nn.Module, example: Any) -> tuple[nn.Module, Report]:
    """Turns linear layers and convolutions whose inputs are mostly zero into spike layers.

    Args:
        model: any module, with neurons of any library. `to_spike_layers` changes the class of Linear, Conv1d and
            Conv2d, of torch and of SpikingJelly, in place. Parameters, hooks and optimizers stay valid. If the model is
            compiled, call torch.compile again.
        example: an input of the model, or a tuple of its positional arguments. A copy of the model is called once with
            the example, in evaluation mode, and the non-zero inputs of each layer are counted. Use a trained model,
            because firing rates change during training.

    Returns the model and a report. For each replaced layer the report gives the fraction of non-zero inputs, and
    estimates how many times as fast an evaluation of the layer becomes. The following layers are not replaced:

    - layers for which this estimate is less than 1.3, usually because their inputs are too dense, as in most first
      layers
    - layers with fewer than 32 outputs, and convolutions with fewer than 32 input channels
    - layers that the example does not reach
    - all layers, if the backend `cpu` is not available
    - layers whose class is a subclass of Linear, Conv1d or Conv2d, except SpikingJelly's
    - convolutions whose groups or dilation is not 1
    - layers whose inputs are in a half type or on a GPU, for which there is no kernel

    A replaced layer remains a spike layer if its inputs become dense later, and is then slower than torch's layer.

    Raises TypeError if the model is not a module, RuntimeError if it can't be copied, and ValueError if it raises an
    error when it is called with `example`. Errors of asgl_cuda and OutOfMemoryError are raised unchanged.

    Example::

        net = nn.Sequential(nn.Linear(40, 256), asgl_cuda.LIF(), nn.Linear(256, 256), asgl_cuda.LIF())
        net, report = asgl_cuda.to_spike_layers(net, torch.randn(20, 32, 40))
        print(report)
    """
    caller = "asgl_cuda.to_spike_layers"
    check_module(model, caller)
    counted: dict[str, tuple[list[tuple[int, int]], list[bool]]] = {}

    def count_nonzero_inputs(name: str, layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Counts the non-zero inputs of a call, and notes whether kernels compute it."""
        given = inputs[0] if inputs else next(iter(named.values()), None)
        if isinstance(given, Recorded):
            given.call_after_recording(lambda x: count_nonzero_inputs(name, layer, (x,), {}))
            return
        x = tensor_of(given, caller)
        shares, kernels = counted.setdefault(name, ([], []))
        kernels.append(has_kernel(x, layer.weight, caller))  # raises for an input that is no tensor of a floating type
        shares.append((int(x.count_nonzero()), x.numel()))

    trial = copy_model(model, caller).eval()
    for name, layer in _weight_layers(trial):
        if not _reason_of_code(layer):
            layer.register_forward_pre_hook(partial(count_nonzero_inputs, name), with_kwargs=True)
    given = arguments_of(example)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            trial(*given)
    except Exception as error:
        raise_explained(error, f"{caller}: example must be an input of the model or a tuple of its arguments", given)
    report = Report([], [])
    for name, layer in _weight_layers(model):
        shares, kernels = counted.get(name, ([], [True]))
        if reason := _reason_to_leave(layer, shares, all(kernels)):
            report.left.append(Left(name, type(layer).__name__, reason))
            continue
        kind, share = _spike_class(type(layer)), _nonzero_fraction(shares)
        gain = f"evaluation about {expected_speedup(layer, share):.1f} times as fast"
        report.replaced.append(
            Replaced(name, type(layer).__name__, f"{kind.__name__}, {share:.2f} of its input is not zero: {gain}")
        )
        layer.__class__ = kind
    return model, report


def from_spike_layers(model: nn.Module) -> tuple[nn.Module, Report]:
    """Turns the spike layers of a model back into torch's or SpikingJelly's layers, in place.

    Returns the model, and a report that lists these layers. Raises TypeError if the model is not a module.

    Example::

        net, _ = asgl_cuda.from_spike_layers(nn.Sequential(asgl_cuda.SpikeLinear(64, 64)))  # nn.Linear
    """
    check_module(model, "asgl_cuda.from_spike_layers")
    report = Report([], [])
    for name, layer in model.named_modules():
        if type(layer) in _DENSE or isinstance(layer, _SpikeOverlay):
            kind = layer.original if isinstance(layer, _SpikeOverlay) else _DENSE[type(layer)]
            report.replaced.append(Replaced(name, type(layer).__name__, kind.__name__))
            vars(layer).pop("_copy", None)
            layer.__class__ = kind
    return model, report
