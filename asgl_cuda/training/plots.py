"""Pictures of a training run: spikes, quantities of layers, gradients over time. matplotlib is imported at the call."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import format_value
from .monitor import Monitor

_Result = Mapping[str, Mapping[str, float]]


def plot_spikes(s_seq: Tensor, *, ax: Any = None) -> Any:
    """Draws a raster: a mark for each spike, by time step and neuron.

    Args:
        s_seq: the spikes of one sample, `[T, ...]`, for example `out[:, 0]` of an output `[T, B, ...]`. The dimensions
            after time are flattened to one list of neurons. Every value other than 0 is drawn as a spike.
        ax: the matplotlib axes to draw into; default: the current axes.

    Returns:
        The axes.

    Raises TypeError if `s_seq` is not a tensor, ValueError if it has fewer than two dimensions or no element, and
    ImportError if matplotlib is not installed.

    Example::

        s_seq = asgl_cuda.lif(torch.rand(50, 20))  # [T, N]
        asgl_cuda.plot_spikes(s_seq)
    """
    caller = "asgl_cuda.plot_spikes"
    marks = _time_by_neuron(s_seq, "s_seq", caller).nonzero()
    ax = _axes(ax, caller)
    steps, neurons = s_seq.shape[0], s_seq[0].numel()
    ax.scatter(*marks.T.cpu().numpy(), s=max(2.0, 90.0 / neurons), marker="|" if neurons < 100 else ".", color="black")
    ax.set(xlabel="time step", ylabel="neuron", xlim=(-0.5, steps - 0.5), ylim=(-0.5, neurons - 0.5))
    return ax


def plot_layers(results: _Result | Sequence[_Result], quantity: str = "firing_rate", *, ax: Any = None) -> Any:
    """Draws a quantity that `Monitor` measured in each layer: as bars for one result, as lines for several results.

    Args:
        results: what `monitor.result()` returned, or a list of such results, for example one per epoch.
        quantity: the name of a quantity of `Monitor`, such as "firing_rate", "width" or "dead". Layers that do
            not have it in any of the results are left out.
        ax: the matplotlib axes to draw into; default: the current axes.

    Returns:
        The axes.

    Raises TypeError if `results` is not a result or a list of results, ValueError if no layer has the quantity, and
    ImportError if matplotlib is not installed.

    Example::

        model = nn.Sequential(nn.Linear(4, 8), asgl_cuda.LIF(), nn.Linear(8, 2), asgl_cuda.LIF())
        results = []
        for epoch in range(3):
            with asgl_cuda.Monitor(model) as monitor:
                model(torch.rand(10, 32, 4))
            results.append(monitor.result())
        asgl_cuda.plot_layers(results, "width")
        asgl_cuda.plot_layers(results[-1])
    """
    caller = "asgl_cuda.plot_layers"
    history = [results] if isinstance(results, Mapping) else results
    if not isinstance(history, Sequence) or not all(isinstance(each, Mapping) for each in history) or not history:
        hint = "; call result() of the Monitor" if isinstance(results, Monitor) else ""
        raise TypeError(
            f"{caller}: results must be what monitor.result() returns, or a list of these, got "
            f"{format_value(results)}{hint}"
        )
    layers = list(dict.fromkeys(name for each in history for name, values in each.items() if quantity in values))
    if not layers:
        known = sorted({key for each in history for values in each.values() for key in values})
        why = (
            "; it is missing if the Monitor saw no call of the model in eager mode" if quantity == "firing_rate" else ""
        )
        raise ValueError(
            f"{caller}: quantity must be one of those in results ({', '.join(known) or 'none'}), got "
            f"{format_value(quantity)}{why}"
        )
    ax = _axes(ax, caller)
    names = [name or "(the model)" for name in layers]
    if isinstance(results, Mapping):
        ax.bar(names, [results[name][quantity] for name in layers])
        ax.set(xlabel="layer")
    else:
        for name, layer in zip(names, layers, strict=True):
            values = [each.get(layer, {}).get(quantity, float("nan")) for each in history]
            ax.plot(range(1, len(history) + 1), values, marker="o", markersize=3, label=name)
        ax.set(xlabel="result")
        ax.legend(title="layer")
    ax.set(ylabel=quantity.replace("_", " "))
    return ax


def plot_gradient_norms(gradients: Tensor | Mapping[str, Tensor], *, ax: Any = None) -> Any:
    """Draws the norm of a gradient at each time step, on a logarithmic axis, to show whether it vanishes or explodes.

    Args:
        gradients: the gradient of a sequence, `[T, ...]`, such as `x_seq.grad`; or a dict from names to such gradients.
        ax: the matplotlib axes to draw into; default: the current axes.

    Returns:
        The axes. Time steps at which the norm is 0 have no mark.

    Raises TypeError if a gradient is not a tensor, for example None because it was not computed, ValueError if it has
    fewer than two dimensions or no element, and ImportError if matplotlib is not installed.

    Example::

        x_seq = torch.randn(30, 16, 8, requires_grad=True)
        asgl_cuda.lif(x_seq, decay=0.9)[-1].sum().backward()
        asgl_cuda.plot_gradient_norms(x_seq.grad)
    """
    caller = "asgl_cuda.plot_gradient_norms"
    named = gradients if isinstance(gradients, Mapping) else {"": gradients}
    norms = {
        name: _time_by_neuron(each, name or "gradients", caller).double().norm(dim=1) for name, each in named.items()
    }
    ax = _axes(ax, caller)
    for name, each in norms.items():
        values = torch.where(each > 0, each, float("nan"))
        ax.plot(range(len(each)), values.cpu().numpy(), marker="o", markersize=3, label=name or None)
    ax.set(xlabel="time step", ylabel="norm of the gradient", yscale="log")
    if isinstance(gradients, Mapping):
        ax.legend()
    return ax


def _time_by_neuron(value: Any, name: str, caller: str) -> Tensor:
    """The values as `[T, N]`: all dimensions after time are flattened."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {format_value(value)}")
    if value.dim() < 2 or value.numel() == 0:
        raise ValueError(f"{caller}: {name} must have shape [T, N, ...], without a size 0, got {list(value.shape)}")
    return value.detach().flatten(1)


def _axes(ax: Any, caller: str) -> Any:
    """The given axes, or matplotlib's current ones."""
    if ax is not None:
        return ax
    try:
        return importlib.import_module("matplotlib.pyplot").gca()
    except ModuleNotFoundError as error:
        raise ImportError(f"{caller} draws with matplotlib: pip install matplotlib") from error
