"""`Monitor` watches ASGL layers: widths, firing rates, fractions of analog elements, dead neurons; and spike layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..interop.recording import Recorded
from ..layout import channel_dim
from ..neurons.base import NeuronLayer
from ..neurons.batch_norm_lif import BatchNormLIF, sharing_group
from ..neurons.lif import LIF, unknown_options
from ..neurons.recurrent_lif import RecurrentLIF
from ..neurons.spiking import Neurons
from ..reference.neurons import fires
from ..reference.normalisation import batch_statistics
from ..reference.surrogates import PERIODIC, SURROGATES, periodic_distance
from ..spikes.layers import SPIKE_LAYERS, expected_speedup
from ..torch_modes import is_transform_active
from .layers import require_asgl_layers

_CALLER = "asgl_cuda.Monitor"
# The quantities of Monitor's table and of `scalars`, in order. Monitor also measures "constant", for `problems`.
_QUANTITIES = (
    "width", "firing_rate", "analog_share", "inside", "smoothing_error", "growth", "dead", "saturated", "nonzero_inputs"
)  # fmt: skip

# Limits by which `Monitor.problems` reports a layer or chooses the remedy.
_MANY = 0.5  # fraction of dead or saturated neurons, or of constant channels, above which it is reported
_RARE = 0.05  # firing rate below which the advice is larger weights if most neurons are dead
_FEW_INSIDE = 0.01  # fraction of potentials inside the window below which it is reported
_EXPLODES = 1000.0  # growth of gradients above which it is reported; a growth of 30 did not lower accuracies

# The options that Monitor supports, of those that layers list in `_options` and `_norm_options`. Monitor refuses a
# layer that has another option which is not at its default, because spikes or outputs might then mean something else.
_KNOWN = {
    "v_rest", "input_gain", "v_min", "strict_threshold", "scale_output", "levels",
    "multi_spike", "surrogate_gain", "detach_reset", "delay", "stateful", "store_v_seq", "time_dim", "backend",
    "eps", "momentum", "input_scale", "affine", "track_running_stats",
}  # fmt: skip

_LITTLE = 0.01  # fraction of eps; a channel with less variance has a deviation below 0.1 after normalisation


class _Tally:
    """Sums over the calls of a layer, on its device without synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, int]] = {}  # by quantity: sum and number of elements
        self._neurons: dict[torch.Size, tuple[Any, int]] = {}  # by shape of a sample: spikes and steps

    def add_values(self, quantities: Mapping[str, Tensor]) -> None:
        """Adds the quantities of a call, each a tensor with one value per element of the output, or per channel."""
        for key, values in quantities.items():
            total, elements = self._sums.get(key, (0, 0))
            self._sums[key] = total + values.sum(dtype=torch.float64), elements + values.numel()

    def add_spikes(self, spikes: Tensor, time_dim: int | None) -> None:
        """Counts the spikes of each neuron in a call. Time is at `time_dim`; None if the call is a single step.

        The first other dimension is the batch, unless it is the only one.
        """
        before = 0 if time_dim is None else 1
        spikes = spikes if time_dim is None else spikes.movedim(time_dim, 0)
        shape = spikes.shape[before + (spikes.dim() > before + 1) :]
        counts, steps = self._neurons.get(shape, (0, 0))
        self._neurons[shape] = counts + spikes.reshape(-1, *shape).sum(0), steps + spikes.numel() // shape.numel()

    def result(self) -> dict[str, float]:
        """Means over all calls, and the fractions of neurons that never or always fired."""
        found = {key: total.item() / elements for key, (total, elements) in self._sums.items()}
        if neurons := sum(shape.numel() for shape in self._neurons):
            dead = sum(int((counts == 0).sum()) for counts, _ in self._neurons.values())
            saturated = sum(int((counts == steps).sum()) for counts, steps in self._neurons.values())
            found |= {"dead": dead / neurons, "saturated": saturated / neurons}
        return found


def _quantities_of_lif(
    layer: Neurons, x_seq: Tensor, more: dict[str, Any], states: dict[str, Any], rng_state: Tensor | None, s_seq: Tensor
) -> dict[str, Tensor]:
    """The quantities of a call, element by element. Repeats it, with the same states and noise, for its potentials."""
    generator = None if rng_state is None else torch.Generator(x_seq.device).set_state(rng_state)
    time_dim = layer.time_dim % x_seq.dim()
    if isinstance(layer, LIF):  # the repeated call must not update running statistics
        more = {**more, "update": False}
    potentials = {"return_h_seq": True, "return_v_seq": layer.v_min is not None}
    again: Any = layer._call_function(x_seq, generator=generator, **potentials, **states, **more)
    h_seq = again.h_seq
    given: Any = (layer.width, layer.v_threshold, layer.decay, layer.v_reset, layer.reset_amount)
    values: list[Any] = [layer._broadcast(each, x_seq) for each in given]
    # The values are converted to the dtype of the computation, so that spikes are equal to those of the layer.
    width, threshold, decay, v_reset, amount = (
        value.to(h_seq) if isinstance(value, Tensor) else value for value in values
    )
    if layer._emits_levels:
        y = h_seq * (1 / threshold)
        smooth = y.clamp(0, layer.levels)
        hard = smooth.round()
        quantities = {"firing_rate": hard > 0, "inside": smooth == y}
        slope = quantities["inside"].to(h_seq) / threshold
        emitted = hard / layer.levels if layer.scale_output else hard
    else:
        periodic = layer.surrogate == PERIODIC
        surrogate = SURROGATES["laplace" if periodic else layer.surrogate]
        u = h_seq - threshold
        y = u * (1 / width)
        hard = fires(u, layer.strict_threshold)
        quantities = {"firing_rate": hard, "inside": y.abs() < 0.5}
        distance = periodic_distance(h_seq, torch.as_tensor(threshold).to(h_seq)) if periodic else u
        slope = surrogate.slope(distance * (1 / width)) / width
        smooth = surrogate.cumulative(y)
        emitted = hard.to(h_seq) * threshold if layer.scale_output else hard
    analog = s_seq != emitted.to(s_seq.dtype)
    if getattr(layer, "adapt_decay", None) is None:
        slope = slope * (0.0 if layer.detach_reset else layer.surrogate_gain)
        if v_reset is None:
            passed = 1 - (threshold if amount is None else amount) * slope
        else:
            passed = 1 - smooth.where(analog, hard.to(smooth)) + (v_reset - h_seq) * slope
        passed = passed if layer.v_min is None else passed * (again.v_seq > layer.v_min)
        quantities["growth"] = _gradient_growth(decay * passed, time_dim)
    if not layer.multi_spike:
        quantities |= {"analog_share": analog, "smoothing_error": (smooth - hard.to(smooth)).abs()}
    return quantities


def _gradient_growth(factors: Tensor, time_dim: int) -> Tensor:
    """For each neuron the largest product of factors of consecutive steps, without the last step; at least 1.

    With the factors decay * dv[t]/dh[t], the gradient of the potentials

        dL/dh[t] = dL/ds[t] * ds[t]/dh[t] + decay * dv[t]/dh[t] * dL/dh[t+1]

    grows by such a product on its way to an earlier step.
    """
    steps = factors.movedim(time_dim, 0)
    growth = largest = torch.zeros_like(steps[0], dtype=torch.float64)  # logarithms, because the product may overflow
    for factor in reversed(steps[:-1].unbind()):
        growth = factor.double().abs().log() + growth.clamp(min=0)
        largest = torch.maximum(largest, growth)
    return largest.exp()


def _uses_batch_statistics(norm: Any) -> bool:
    """Whether the normalisation uses the statistics of the batch."""
    return norm.training or norm.running_mean is None


def _constant_channels(norm: Any, x_seq: Tensor, channel: int) -> dict[str, Tensor]:
    """For each channel that batch statistics normalise, whether it varies too little, as the quantity "constant"."""
    if norm is None or not _uses_batch_statistics(norm):
        return {}
    group = getattr(norm, "process_group", None)
    if isinstance(norm, nn.SyncBatchNorm):
        group = group or "world"
    *_, variance = batch_statistics(x_seq, channel, sharing_group(group, _CALLER))
    return {"constant": variance <= _LITTLE * norm.eps}


def _scale_remedy(norm: Any, size: str, threshold: str) -> str:
    """The advice for potentials of the wrong scale: `size` weights or a `threshold` threshold, as the layer allows."""
    if norm is None:
        return (
            f"{size} weights before the neurons, which asgl_cuda.calibrate(model, x_seq) sets if they are learned, or "
            "a normalisation before the neurons, as in asgl_cuda.BatchNormLIF"
        )
    own = f"a {threshold} threshold"
    if norm.weight is not None and norm.weight.requires_grad:
        own = f"a {size} weight of its normalisation: asgl_cuda.calibrate(model, x_seq)"
    return (
        own
        if _uses_batch_statistics(norm)
        else f"running statistics of such inputs, from batches in training mode; or {own}"
    )


def _problem_of_layer(values: Mapping[str, float], layer: Any, norm: Any, diverged: bool) -> str | None:
    """The problem of a layer with these quantities, and a remedy. None if it has no problem.

    `norm` is the normalisation that the layer computes, or None. `diverged`: the model has a NaN weight.
    """
    rate, inside, dead = values.get("firing_rate"), values.get("inside", 1.0), values.get("dead", 0.0)
    if (fraction := values.get("nonzero_inputs")) is not None and (gain := expected_speedup(layer, fraction)) < 1:
        return (
            f"{fraction:.0%} of its inputs are not zero, with which its evaluation takes about {1 / gain:.1f} times as "
            "long as that of torch's layer. What helps: asgl_cuda.from_spike_layers; or sparser spikes before it, by a "
            "penalty on firing rates (asgl_cuda.FiringRates)"
        )
    if rate is None:
        return None
    if values.get("constant", 0.0) > _MANY:
        return (
            f"{values['constant']:.0%} of the channels do not vary over time and batch, so its normalisation leaves "
            "only its bias, and passes no gradient. What helps: a larger batch, an input that varies over time, or "
            "asgl_cuda.LIF, without a normalisation"
        )
    if math.isnan(values["width"]) or math.isnan(values.get("smoothing_error", 0.0)):
        if diverged:
            return (
                "its potentials or its width are NaN, as is a weight of the model. What helps: a smaller learning "
                "rate, clipped gradients, or data without NaN"
            )
        return (
            "its potentials are NaN, and no weight of the model is. What helps: look for NaN or infinity in the data, "
            "and in float16 for currents beyond 65504"
        )
    if values.get("growth", 1.0) > _EXPLODES:
        return (
            f"gradients grow by a factor of {values['growth']:.1e} on their way back through its resets. What helps: "
            "detach_reset=True"
        )
    seen, helps = [], _scale_remedy(norm, "differently scaled", "different")
    if rate == 0 or dead > _MANY:
        seen.append("no neuron ever fired" if rate == 0 else f"{dead:.0%} of the neurons never fired (dead)")
        helps = "other inputs" if norm is not None else "a normalisation before the neurons, or other inputs"
        helps = _scale_remedy(norm, "larger", "lower") if rate < _RARE else helps
    elif values.get("saturated", 0.0) > _MANY:
        seen.append(f"{values['saturated']:.0%} of the neurons fired at every step (saturated)")
        helps = _scale_remedy(norm, "smaller", "higher")
    if inside < _FEW_INSIDE:
        counts = getattr(layer, "_emits_levels", False)
        window, width = "inside the window of the surrogate, abs(u) < width / 2", "; or a larger width"
        if counts:
            window, width = "between 0 and levels thresholds", ""
        passes = "outside of it the slope is smaller, so gradients shrink on their way"
        if counts or getattr(layer, "surrogate", None) == "rectangle":  # whose slope is 0 outside
            passes = f"{'no' if inside == 0 else 'hardly any'} gradient passes"
        seen.append(f"{inside:.1%} of the potentials are {window}: {passes} to the layers before")
        helps += width
    return f"{', and '.join(seen)}. What helps: {helps}" if seen else None


class Monitor:
    """Measures the ASGL and spike layers of a model, over all calls in `with monitor:` or from `start()` to `stop()`.

    `result()` returns these quantities for each layer. All but the width and the growth are in [0, 1]. An element is
    one neuron at one time step, and u is its potential minus the threshold. In training, a fraction `analog_prob` of
    the elements emits a smooth value H(u) instead of a spike.

    - `width`: mean of the widths when the result is asked for, in units of the potential.
    - `firing_rate`: fraction of elements whose potential reached the threshold, even if they emitted a smooth value.
      With `levels`, fraction of elements that emitted at least one spike.
    - `analog_share`: fraction of elements that emitted a smooth value other than the 0 or 1 of their hard spike.
    - `inside`: fraction of elements inside the window of the surrogate, abs(u / width) < 1/2. With `levels`, fraction
      of elements whose potential is between 0 and `levels` times the threshold.
    - `smoothing_error`: mean of abs(H(u) - spike) over all elements. With `multi_spike`, `smoothing_error` and
      `analog_share` are missing.
    - `growth`: the largest factor by which the gradient of a neuron's potential grows on its way back from any time
      step to any earlier one, 1 if the gradient never grows, as the mean over neurons and samples. The factor between
      two steps is the product of `decay * dv[t]/dh[t]` over the steps between them, where h is the potential before the
      reset and v the potential after it. Gradients through recurrent weights and from layer to layer are not included.
      Missing with an adaptation.
    - `constant`: fraction of channels whose variance is less than `eps / 100`, so that after normalisation little more
      than the bias is left. Only for layers that normalise by the statistics of each call, such as BatchNormLIF in
      training.
    - `dead`: fraction of neurons that never spiked in any sample. `saturated`: fraction of neurons that spiked at every
      step of all samples. In an input `[T, B, ...]`, the dimensions after the batch have the neurons.
    - `nonzero_inputs`: fraction of inputs that are not 0. Only for spike layers (`SpikeLinear` and others), which have
      none of the other quantities. `problems()` names the spike layers that are likely slower than torch's layers.

    Watching changes no output, gradient, state or random number. `LIF`, `RecurrentLIF` and their subclasses compute
    each watched call twice, unless a subclass has a `forward` of its own. For such subclasses and all other layers, the
    output is taken for spikes of height 1, and `inside`, `smoothing_error` and `growth` are missing. `dead` and
    `saturated` are then known only if the layer has an attribute `time_dim`: the time dimension, or None if each call
    is a single step. Calls in compiled code and under transforms of torch.func are not seen.

    `print(monitor)` prints a table of the quantities, and then the lines of `problems()`.

    Example::

        with asgl_cuda.Monitor(model) as monitor:
            model(x_seq)
        print(monitor)

    Raises ValueError for a model without ASGL layers, and TypeError if the model is not a module. `start()` and `with`
    raise ValueError if a layer has an option that Monitor does not know.

    Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = require_asgl_layers(model, _CALLER)
        self._model = model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # For each layer, what its current call began with: x_seq, the other arguments, the carried states, and the
        # state of the random number generator, or None if the call draws no noise.
        self._before: dict[nn.Module, tuple[Tensor, dict[str, Any], dict[str, Any], Tensor | None]] = {}
        self._norms: dict[nn.Module, Any] = {}  # normalisations that the layers compute
        spiking = tuple(SPIKE_LAYERS.values())
        self._products = {name: each for name, each in model.named_modules() if isinstance(each, spiking)}
        order = {name: index for index, (name, _) in enumerate(model.named_modules())}
        both = self._layers | self._products
        self._watched = {name: both[name] for name in sorted(both, key=order.__getitem__)}
        self.reset()

    def reset(self) -> None:
        """Clears all counts."""
        self._tallies = {layer: _Tally() for layer in self._watched.values()}

    def start(self) -> None:
        """Starts watching, and adds to earlier counts. It has no effect if the monitor watches already.

        Raises ValueError if a layer has an option that Monitor does not know.
        """
        for name, layer in self._layers.items():
            if isinstance(layer, NeuronLayer) and (options := unknown_options(layer, _KNOWN)):
                raise ValueError(
                    f"{_CALLER}: {name or 'the model'} ({type(layer).__name__}) has {options}, which Monitor does not "
                    "support; watch the parts of the model without this layer"
                )
        if self._handles:
            return
        for layer in self._products.values():
            self._handles.append(layer.register_forward_pre_hook(self._count_nonzero_inputs))
        for layer in self._layers.values():
            self._handles += [
                layer.register_forward_pre_hook(self._save_inputs, with_kwargs=True),
                # This hook must run before other forward hooks, which may replace the layer's output.
                layer.register_forward_hook(self._count_output, prepend=True),
            ]

    def stop(self) -> None:
        """Stops watching, and keeps the counts."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _save_inputs(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Saves, before a call, what its repetition needs: inputs, states and the state of the generator."""
        known = isinstance(layer, (LIF, RecurrentLIF)) and type(layer).forward is LIF.forward
        if torch.compiler.is_compiling() or is_transform_active() or not known:
            return
        try:
            x_seq, more = layer._inputs_of_call(*args, **kwargs)
        except TypeError:  # the layer itself raises the error
            return
        if not isinstance(x_seq, Tensor):
            return
        own = layer if isinstance(layer, BatchNormLIF) else None
        self._norms[layer] = more["pending"].norm if "pending" in more else own
        device, rng_state = x_seq.device, None
        if layer.training and layer.analog_prob > 0:
            cpu = device.type == "cpu"  # torch.cpu has no get_rng_state
            rng_state = torch.get_rng_state() if cpu else torch.get_device_module(device).get_rng_state(device)
        states = {f"{name}_init": layer._carried_state(name) for name in layer._states if layer.stateful}
        self._before[layer] = x_seq, more, states, rng_state

    @torch.no_grad()
    def _count_nonzero_inputs(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Counts the non-zero inputs of a spike layer."""
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.numel() > 0 and not torch.compiler.is_compiling() and not is_transform_active():
            self._tallies[layer].add_values({"nonzero_inputs": x != 0})

    @torch.no_grad()
    def _count_output(self, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        """Adds the output of a call to the layer's sums."""
        s_seq = output[0] if isinstance(output, tuple) else output
        if isinstance(s_seq, Recorded):
            s_seq.call_after_recording(lambda value: self._count_output(layer, args, value))
            return
        traced = torch.compiler.is_compiling() or is_transform_active()
        if traced or not isinstance(s_seq, Tensor) or s_seq.numel() == 0:
            return
        if before := self._before.pop(layer, None):
            quantities = _quantities_of_lif(layer, *before, s_seq)
            x_seq, more, *_ = before
            channel = more["pending"].channel if "pending" in more else channel_dim(layer.time_dim % x_seq.dim())
            quantities |= _constant_channels(self._norms.get(layer), x_seq, channel)
        else:
            # H(0) = 1/2, so a smooth value of at least 1/2 shows that the potential has reached the threshold.
            quantities = {"firing_rate": s_seq >= 0.5, "analog_share": s_seq != s_seq.round()}
        self._tallies[layer].add_values(quantities)
        if hasattr(layer, "time_dim"):
            self._tallies[layer].add_spikes(quantities["firing_rate"], layer.time_dim)

    def result(self) -> dict[str, dict[str, float]]:
        """The quantities of each layer, by name of the layer and name of the quantity."""
        found = {name: self._tallies[layer].result() for name, layer in self._watched.items()}
        widths = {name: {"width": torch.as_tensor(each.width).mean().item()} for name, each in self._layers.items()}
        return {name: widths.get(name, {}) | values for name, values in found.items()}

    def problems(self) -> list[str]:
        """Problems of layers that may not learn, and of spike layers that are likely slower than torch's layers.

        Each is one line with the layer, the observation and a remedy. If the monitor saw no call of a layer, the only
        line says so. Problems of layers that may not learn do not matter if the network learns well.
        """
        found = self.result()
        if all("firing_rate" not in values for values in found.values()):
            return [
                "nothing was seen: no call of the model inside `with monitor:`, apart from those in compiled code and "
                "under transforms of torch.func, which Monitor can't see"
            ]
        weights = [each for each in self._model.parameters() if each.is_floating_point() and not each.is_meta]
        diverged = any(bool(each.isnan().any()) for each in weights)
        problems = {
            name: _problem_of_layer(values, self._watched[name], self._norms.get(self._watched[name]), diverged)
            for name, values in found.items()
        }
        return [f"{name or '(the model)'}: {problem}" for name, problem in problems.items() if problem is not None]

    def scalars(self) -> dict[str, float]:
        """The quantities as one dict for loggers, such as TensorBoard's `writer.add_scalar(name, value, step)`.

        A name has the quantity and the layer, as in `firing_rate/1`. The quantity `constant` is not included.
        """
        found = self.result()
        return {
            f"{key}/{name}" if name else key: values[key]
            for key in _QUANTITIES
            for name, values in found.items()
            if key in values
        }

    def __str__(self) -> str:
        keys = _QUANTITIES if self._products else _QUANTITIES[:-1]
        rows = [["layer", *(key.replace("_", " ") for key in keys)]]
        for name, values in self.result().items():
            cells = (_format_quantity(values[key]) if key in values else "-" for key in keys)
            rows.append([name or "(the model)", *cells])
        problems = self.problems()
        return "\n".join([*table_lines(rows, "<" + ">" * len(keys)), *([""] if problems else []), *problems])


def _format_quantity(value: float) -> str:
    """A quantity as text, for the table."""
    return f"{value:.4f}" if value < 1000 else f"{value:.1e}"


def table_lines(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """The lines of a text table. `sides` has a character per column: "<" aligns it left, ">" right."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map("{:{}{}}".format, row, sides, sizes)) for row in rows]
