"""`Monitor` watches ASGL layers: widths, firing rates, shares of analog elements, dead neurons."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batch_norm import sharing
from ..call import LIFOutput
from ..checks import level_of_user
from ..layer import some_asgl_layers
from ..layout import channel_dim
from ..neuron import LIF, BatchNormLIF
from ..reference import batch_statistics
from ..surrogate import SURROGATES
from ..transforms import transforming

# Measured quantities, in the order of tables and figures: key, heading.
_QUANTITIES = {
    "width": "width",
    "firing_rate": "firing rate",
    "analog_share": "analog share",
    "inside": "inside window",
    "smoothing_error": "smoothing error",
    "dead": "dead",
    "saturated": "saturated",
}

# Shares at which `Monitor.problems` reports a layer.
_MANY = 0.5  # of the neurons dead, or saturated; of the channels constant
_RARE = 0.05  # a rate below which larger weights help where most neurons are dead
_FEW_INSIDE = 0.01  # of the potentials inside the window

_LITTLE = 0.01  # of eps: with less variance a channel is normalised to less than a tenth around its bias

_CALIBRATE = "asgl_cuda.calibrate(model, x_seq)"
# Potentials that should be larger, smaller or just others: the weights in front, the weight of a normalisation, the
# threshold.
_SCALES = {
    "larger": ("larger weights", "a larger weight", "a lower threshold"),
    "smaller": ("smaller weights", "a smaller weight", "a higher threshold"),
    "other": ("weights of another scale", "a weight of another scale", "another threshold"),
}


class ScalarWriter(Protocol):
    """The part of TensorBoard's SummaryWriter that `Monitor.write` needs."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


class _Tally:
    """Sums over the calls of a layer, on its device without synchronisation."""

    def __init__(self) -> None:
        self.elements: dict[str, int] = {}
        self.sums: dict[str, Tensor] = {}
        # By shape of the neurons, which may vary between calls.
        self.spikes: dict[torch.Size, Tensor] = {}
        self.steps: dict[torch.Size, int] = {}

    def add(self, shares: Mapping[str, Tensor]) -> None:
        """Adds shares with one value per element of the output, or per channel."""
        for key, values in shares.items():
            self.elements[key] = self.elements.get(key, 0) + values.numel()
            total = values.sum(dtype=torch.float64)
            self.sums[key] = self.sums[key].to(total.device) + total if key in self.sums else total

    def add_neurons(self, spikes: Tensor, time_dim: int | None) -> None:
        """Adds spikes `[T, N, ...]`, or `[N, ...]` without time; a lone dimension beside time is neurons, no batch."""
        if time_dim is not None:
            spikes = spikes.movedim(time_dim, 0)
        steps = 0 if time_dim is None else 1
        shape = spikes.shape[steps + (spikes.dim() > steps + 1) :]
        counts = spikes.reshape(-1, *shape).sum(0)
        self.spikes[shape] = self.spikes[shape].to(counts.device) + counts if shape in self.spikes else counts
        self.steps[shape] = self.steps.get(shape, 0) + spikes.numel() // shape.numel()

    def result(self) -> dict[str, float]:
        found = {key: total.item() / self.elements[key] for key, total in self.sums.items()}
        neurons = sum(counts.numel() for counts in self.spikes.values())
        if neurons:
            dead = sum(int((counts == 0).sum()) for counts in self.spikes.values())
            saturated = sum(int((counts == self.steps[shape]).sum()) for shape, counts in self.spikes.items())
            found |= {"dead": dead / neurons, "saturated": saturated / neurons}
        return found


def _shares_of_lif(
    layer: LIF,
    x_seq: Tensor,
    more: dict[str, Any],
    v_init: Tensor | None,
    rng_state: Tensor | None,
    s_seq: Tensor,
) -> dict[str, Tensor]:
    """Repeats the call for its potentials, with the same state and noise."""
    generator = None if rng_state is None else torch.Generator(x_seq.device).set_state(rng_state)
    time_dim = layer.time_dim % x_seq.dim()
    again = layer._lif(x_seq, update=False, v_init=v_init, generator=generator, return_h_seq=True, **more)
    assert isinstance(again, LIFOutput)
    assert again.h_seq is not None
    h_seq = again.h_seq
    values: list[Any] = [layer._broadcast(each, x_seq, time_dim) for each in (layer.width, layer.v_threshold)]
    # In the dtype of the computation, for equal spikes.
    width, threshold = (
        value.to(h_seq)
        if isinstance(value, Tensor)
        else torch.scalar_tensor(value, dtype=h_seq.dtype, device=h_seq.device)  # no copy, which would wait for a GPU
        for value in values
    )
    if layer._counts:
        assert layer.levels is not None
        y = h_seq * (1 / threshold)
        smooth = y.clamp(0, layer.levels)
        whole = smooth.round()
        hard = whole / layer.levels if layer.scale_output else whole
        return {
            "firing_rate": whole > 0,
            "analog_share": s_seq != hard.to(s_seq.dtype),
            "inside": smooth == y,
            "smoothing_error": (smooth - whole).abs(),
        }
    u = h_seq - threshold
    spikes = layer._fires(u)
    y = u * (1 / width)
    if layer.multi_spike:
        return {"firing_rate": spikes, "inside": y.abs() < 0.5}
    smooth = SURROGATES[layer.surrogate].cumulative(y)
    hard = spikes * threshold if layer.scale_output else spikes
    return {
        "firing_rate": spikes,
        "analog_share": s_seq != hard.to(s_seq.dtype),
        "inside": y.abs() < 0.5,
        "smoothing_error": torch.where(spikes, 1 - smooth, smooth),
    }


def _uses_batch(norm: Any) -> bool:
    return norm.training or norm.running_mean is None


def _constant_channels(norm: Any, x_seq: Tensor, channel: int) -> dict[str, Tensor]:
    """Which channels vary too little to be normalised by their own statistics."""
    if norm is None or not _uses_batch(norm):
        return {}
    group = getattr(norm, "process_group", None)
    if isinstance(norm, nn.SyncBatchNorm):
        group = group or "world"
    *_, variance = batch_statistics(x_seq, channel, sharing(group))
    return {"constant": variance <= _LITTLE * norm.eps}


def _remedy(norm: Any, scale: str) -> str:
    """The remedy for potentials of the wrong scale: neither what the layer is already, nor what `calibrate` refuses."""
    weights, weight, threshold = _SCALES[scale]
    if norm is None:
        return f"{weights}: {_CALIBRATE}, or a normalisation in front, as in asgl_cuda.BatchNormLIF"
    learns = norm.weight is not None and norm.weight.requires_grad
    own = f"{weight} of its normalisation: {_CALIBRATE}" if learns else threshold
    return own if _uses_batch(norm) else f"running statistics of such inputs, by batches in training mode; or {own}"


def _problem(values: Mapping[str, float], layer: Any, norm: Any) -> str | None:
    """The problem of a layer with these quantities, and a remedy."""
    rate, inside = values.get("firing_rate"), values.get("inside", 1.0)
    if rate is None:
        return None
    if values.get("constant", 0.0) > _MANY:
        return (
            f"{values['constant']:.0%} of the channels do not vary over time and batch: its normalisation leaves "
            "nothing of them but its bias, and passes no gradient. What helps: a larger batch, an input that varies "
            "over time, or asgl_cuda.LIF, without a normalisation"
        )
    if math.isnan(values["width"]) or math.isnan(values.get("smoothing_error", 0.0)):
        return "its potentials or its width are NaN: a smaller learning rate, or clipped gradients"
    seen, helps = [], _remedy(norm, "other")
    if rate == 0 or values.get("dead", 0.0) > _MANY:
        seen.append("no neuron ever fired" if rate == 0 else f"{values['dead']:.0%} of the neurons never fired (dead)")
        helps = "other inputs" if norm is not None else "a normalisation in front, or other inputs"
        if rate < _RARE:
            helps = _remedy(norm, "larger")
    elif values.get("saturated", 0.0) > _MANY:
        seen.append(f"{values['saturated']:.0%} of the neurons fired at every step (saturated)")
        helps = _remedy(norm, "smaller")
    if inside < _FEW_INSIDE:
        counts = getattr(layer, "_counts", False)  # no width is there to be larger
        passes = "no" if inside == 0 and getattr(layer, "surrogate", None) == "rectangle" else "hardly any"
        window = (
            "between 0 and levels thresholds" if counts else "inside the window of the surrogate, abs(u) < width / 2"
        )
        seen.append(f"{inside:.1%} of the potentials are {window}: {passes} gradient passes to the layers before")
        helps += "" if counts else "; or a larger width"
    return f"{', and '.join(seen)}. What helps: {helps}" if seen else None


def _is_hidden() -> bool:
    """Whether the values of a call can't be read."""
    return torch.compiler.is_compiling() or transforming()


class Monitor:
    """Watches the ASGL layers of a model, over all calls inside `with monitor:` or between `start()` and `stop()`.

    A nested `with monitor:`, or after `start()`, does not end watching.

    For each layer `result()` has, in [0, 1] except the width:

    - `width`: mean of the current widths, in units of the input.
    - `firing_rate`: share of elements whose potential reached the threshold, u >= 0 (u > 0 if strict), regardless of
      the output; with levels, of elements that emit a spike.
    - `analog_share`: share of elements with an output other than the hard spike: at most `analog_prob`, less if smooth
      values outside the window equal the spike.
    - `inside`: share of elements inside the window of the surrogate, abs(u / width) < 1/2; with levels, those not
      clamped.
    - `smoothing_error`: E|H(u) - spike|, which should vanish by the paper's argument. `multi_spike` has no H, and so
      neither `smoothing_error` nor `analog_share`.
    - `constant`, of a layer that normalises by the statistics of each call, as BatchNormLIF in training: share of
      channels with a variance of less than `eps / 100`, of which nothing but the bias is left. Not in the table.
    - `dead`, `saturated`: share of neurons that never spiked, and that spiked at every step, in all samples. Neurons
      are the positions of an input `[T, N, ...]` without time and batch, or without time if one dimension remains.

    `asgl_cuda.LIF` computes each watched call twice. Of a layer with another forward only the output (a tuple's first)
    is used, as spikes of height 1: `inside` and `smoothing_error` are missing, as are `dead` and `saturated` unless the
    layer has `time_dim`, None for calls of one step. Quantities not seen yet are missing as well: before the first
    call, all but the widths.

    `print(monitor)` shows a table, then `problems()`: layers that are dead, saturated, without gradient, or normalise
    channels that do not vary, and remedies.

    Watching changes no output, gradient, state or random number. Calls in compiled code and under transforms of
    torch.func are not seen: watch the uncompiled model, on some batches. A monitor that was never started warns when
    asked for results.

    Example::

        with asgl_cuda.Monitor(model) as monitor:
            model(x_seq)
        print(monitor)

    Raises ValueError for a model without ASGL layers, TypeError where it is no module.

    Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = some_asgl_layers(model, "asgl_cuda.Monitor")
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Input, potential and random state before a call.
        self._before: dict[nn.Module, tuple[Tensor, dict[str, Any], Tensor | None, Tensor | None]] = {}
        self._norms: dict[nn.Module, Any] = {}  # normalisations that the layers compute
        self._watched_before: list[bool] = []  # by nested `with`: whether already watching
        self._was_started = self._has_warned = False
        self.reset()

    def reset(self) -> None:
        """Clears all counts."""
        self._tallies = {layer: _Tally() for layer in self._layers.values()}

    def start(self) -> None:
        """Starts watching, adding to earlier counts; no effect if already started."""
        if self._handles:
            return
        self._was_started = True
        for layer in self._layers.values():
            self._handles += [
                layer.register_forward_pre_hook(self._look_before, with_kwargs=True),
                # First, to see the layer's own output.
                layer.register_forward_hook(self._look, prepend=True, with_kwargs=True),
            ]

    def stop(self) -> None:
        """Stops watching, and keeps the counts."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()

    def __enter__(self) -> Monitor:
        self._watched_before.append(bool(self._handles))
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._watched_before.pop():
            self.stop()

    def _look_before(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_hidden() or type(layer).forward is not LIF.forward:
            return
        try:
            x_seq, more = layer._inputs(*args, **kwargs)
        except TypeError:  # the layer's own to raise
            return
        if not isinstance(x_seq, Tensor):
            return
        own = layer if isinstance(layer, BatchNormLIF) else None
        self._norms[layer] = more["pending"].norm if "pending" in more else own
        device, rng_state = x_seq.device, None
        if layer.training and layer.analog_prob > 0:
            cpu = device.type == "cpu"  # torch.cpu has no get_rng_state
            rng_state = torch.get_rng_state() if cpu else torch.get_device_module(device).get_rng_state(device)
        self._before[layer] = x_seq, more, layer._carried(), rng_state

    @torch.no_grad()
    def _look(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _is_hidden():
            return
        s_seq = output[0] if isinstance(output, tuple) else output
        if not isinstance(s_seq, Tensor) or s_seq.numel() == 0:
            return
        if before := self._before.pop(layer, None):
            shares = _shares_of_lif(layer, *before, s_seq)
            x_seq, more, *_ = before
            channel = more["pending"].channel if "pending" in more else channel_dim(layer.time_dim % x_seq.dim())
            shares |= _constant_channels(self._norms.get(layer), x_seq, channel)
        else:
            # H(0) = 1/2, so smooth values show the hard spike, too.
            shares = {"firing_rate": s_seq >= 0.5, "analog_share": s_seq != s_seq.round()}
        self._tallies[layer].add(shares)
        if hasattr(layer, "time_dim"):
            self._tallies[layer].add_neurons(shares["firing_rate"], layer.time_dim)

    def result(self) -> dict[str, dict[str, float]]:
        """The measured quantities, by the layers' names."""
        if not (self._was_started or self._has_warned):
            self._has_warned = True
            warnings.warn(
                "asgl_cuda.Monitor: it was never started, so it saw nothing: call the model inside `with monitor:`, or "
                "between monitor.start() and monitor.stop()",
                stacklevel=level_of_user(),
            )
        return {
            name: {"width": torch.as_tensor(layer.width).mean().item(), **self._tallies[layer].result()}
            for name, layer in self._layers.items()
        }

    def problems(self) -> list[str]:
        """Problems of layers that may not learn, a line each: layer, observation, remedy. Empty without any."""
        return self._problems_in(self.result())

    def _problems_in(self, found: Mapping[str, Mapping[str, float]]) -> list[str]:
        if all("firing_rate" not in values for values in found.values()):
            return ["nothing was seen: the model was not called, or only in compiled code or under torch.func"]
        lines = []
        for name, values in found.items():
            what = _problem(values, self._layers[name], self._norms.get(self._layers[name]))
            if what is not None:
                lines.append(f"{name or '(the model)'}: {what}")
        return lines

    def scalars(self) -> dict[str, float]:
        """The quantities as one dict for loggers, `firing_rate/name` and so on; a lone layer has no name."""
        found = self.result()
        return {
            f"{key}/{name}" if name else key: values[key]
            for key in _QUANTITIES
            for name, values in found.items()
            if key in values
        }

    def __str__(self) -> str:
        found = self.result()
        rows = [["layer", *_QUANTITIES.values()]]
        for name, values in found.items():
            cells = (f"{values[key]:.4f}" if key in values else "-" for key in _QUANTITIES)
            rows.append([name or "(the model)", *cells])
        lines = aligned(rows, "<" + ">" * len(_QUANTITIES))
        problems = self._problems_in(found)
        return "\n".join([*lines, "", *problems] if problems else lines)

    def write(self, writer: ScalarWriter, step: int) -> None:
        """Writes to TensorBoard: `writer.add_scalar(tag, value, step)` for each of `scalars()`."""
        for tag, value in self.scalars().items():
            writer.add_scalar(tag, value, step)

    def plot(self, path: str | Path) -> None:
        """Draws a panel per quantity with a bar per layer, by matplotlib, into a file of a supported format.

        Raises ImportError without matplotlib.
        """
        # Not pyplot, which sets a backend for the process and keeps figures.
        figures = first_of(["matplotlib.figure"], "matplotlib", "asgl_cuda.Monitor.plot")
        found = self.result()
        height = 1.2 + 0.3 * len(found)
        figure = figures.Figure(figsize=(2.2 * len(_QUANTITIES), height), layout="constrained")
        panels = figure.subplots(1, len(_QUANTITIES), sharey=True)
        for panel, (key, heading) in zip(panels, _QUANTITIES.items(), strict=True):
            panel.barh(
                [name or "(the model)" for name in found], [values.get(key, math.nan) for values in found.values()]
            )
            panel.set_title(heading)
            panel.grid(axis="x", alpha=0.3)
        panels[0].invert_yaxis()  # the first layer on top
        figure.savefig(path)


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """The rows of a table with padded columns, aligned to the left (<) or right (>)."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map("{:{}{}}".format, row, sides, sizes)) for row in rows]


def first_of(modules: Sequence[str], package: str, caller: str) -> Any:
    """The first module that can be imported."""
    for module in modules:
        with suppress(ImportError):
            return importlib.import_module(module)
    raise ImportError(f"{caller}: needs {package}, which can't be imported: pip install {package}")
