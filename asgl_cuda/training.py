"""Training under ASGL: schedules of the noise, parameter groups, monitors, hard spikes on request, and a reset.

They serve every ASGL layer: `asgl_cuda.LIF`, and layers of other libraries that `asgl_cuda.convert` has made such.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .checks import check_analog_prob, check_number
from .functional import LIFOutput
from .interop.conversion import libraries
from .neuron import LIF, BatchNormLIF
from .surrogate import SURROGATES
from .transforms import transforming

_SCHEDULE = "asgl_cuda.AnalogProbSchedule"


def asgl_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The ASGL layers of a model with their names, in the order of `named_modules`, each once.

    An ASGL layer is a module with a float `analog_prob`, a parameter or None `log_width`, and `width`. Those without
    noise are among them: they may get some, and can be monitored. Raises TypeError where `model` is no module.
    """
    _check_module(model, "asgl_cuda.asgl_layers")
    return ((name, module) for name, module in model.named_modules() if _is_asgl_layer(module))


def _is_asgl_layer(module: nn.Module) -> bool:
    # Statically: what torch.compile wraps a layer in answers for it, too, and would make it two.
    return inspect.getattr_static(module, "analog_prob", None) is not None and hasattr(module, "log_width")


def _check_module(model: Any, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")


def _some_asgl_layers(model: nn.Module, caller: str) -> dict[str, Any]:
    _check_module(model, caller)
    layers = dict(asgl_layers(model))
    if not layers:
        raise ValueError(f"{caller}: model must have an ASGL layer, got a {type(model).__name__} without")
    return layers


# ---- schedules of analog_prob ----


def _multi_step(start: float, epoch: int, milestones: Sequence[int], gamma: float) -> float:
    return start * gamma ** bisect_right(milestones, epoch)


def _between(start: float, final: float, share: float) -> float:
    # Not final + (start - final) * share, which need not give start back at 1.
    return start * share + final * (1 - share)


def _cosine(start: float, epoch: int, epochs: int, final: float) -> float:
    return _between(start, final, (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2)


def _linear(start: float, epoch: int, epochs: int, final: float) -> float:
    return _between(start, final, 1 - min(epoch / epochs, 1))


def _check_share(name: str, value: Any) -> None:
    if not 0 <= check_number(name, value, _SCHEDULE) <= 1:
        raise ValueError(f"{_SCHEDULE}: {name} must be in [0, 1], got {value}")


def _check_epochs(epochs: Any) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, int):
        raise TypeError(f"{_SCHEDULE}: epochs must be an int, got {type(epochs).__name__}")
    if epochs < 1:
        raise ValueError(f"{_SCHEDULE}: epochs must be >= 1, got {epochs}")


class AnalogProbSchedule:
    """Sets `analog_prob` of every ASGL layer over the epochs, each from its own value at the start.

    Args:
        model: its layers are set at once, for epoch 0. A layer that has neither noise nor a learned width is meant to
            be an ordinary neuron and stays one.
        prob_at: `analog_prob` (in [0, 1]) of a layer that started with `start`, at `epoch`: `prob_at(start, epoch)`.

    `multi_step`, `cosine` and `linear` are the usual ones. Call `step()` after each epoch. `epoch` is how often that
    was; `starts` are the values at the start, `probs` those of now, by the layers' names.

    Under torch.compile a new value is data of the graph: it compiles again only where noise begins or ends.

    Raises ValueError for a model without a layer to schedule and for a `prob_at` out of range, TypeError for arguments
    that are no module and no function.
    """

    def __init__(self, model: nn.Module, prob_at: Callable[[float, int], float]) -> None:
        self._layers = _some_asgl_layers(model, _SCHEDULE)
        if not callable(prob_at):
            raise TypeError(f"{_SCHEDULE}: prob_at must be a function of start and epoch, got {type(prob_at).__name__}")
        self._prob_at = prob_at
        self.epoch = 0
        self.starts: dict[str, float] = {
            name: layer.analog_prob
            for name, layer in self._layers.items()
            if layer.analog_prob > 0 or layer.log_width is not None
        }
        if not self.starts:
            raise ValueError(
                f"{_SCHEDULE}: model must have a layer with noise or a learned width, got analog_prob 0 and constant "
                f"widths in {', '.join(map(repr, self._layers))}"
            )
        self._set(self.starts, 0)

    @classmethod
    def multi_step(cls, model: nn.Module, milestones: Sequence[int], gamma: float = 0.1) -> AnalogProbSchedule:
        """Times `gamma` (in [0, 1]) at each of the epochs `milestones`, as torch's MultiStepLR."""
        if not isinstance(milestones, Sequence):
            raise TypeError(f"{_SCHEDULE}: milestones must be a sequence of ints, got {type(milestones).__name__}")
        if any(isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1 for epoch in milestones):
            raise ValueError(f"{_SCHEDULE}: milestones must be ints >= 1, got {list(milestones)}")
        _check_share("gamma", gamma)
        return cls(model, partial(_multi_step, milestones=sorted(milestones), gamma=gamma))

    @classmethod
    def cosine(cls, model: nn.Module, epochs: int, final: float = 0.0) -> AnalogProbSchedule:
        """Along half a cosine to `final` at epoch `epochs`; there it stays, where torch's CosineAnnealingLR returns."""
        _check_epochs(epochs)
        _check_share("final", final)
        return cls(model, partial(_cosine, epochs=epochs, final=final))

    @classmethod
    def linear(cls, model: nn.Module, epochs: int, final: float = 0.0) -> AnalogProbSchedule:
        """In equal steps to `final` at epoch `epochs`; there it stays."""
        _check_epochs(epochs)
        _check_share("final", final)
        return cls(model, partial(_linear, epochs=epochs, final=final))

    def _set(self, starts: Mapping[str, float], epoch: int) -> None:
        probs = {name: self._prob_at(start, epoch) for name, start in starts.items()}
        for name, prob in probs.items():
            check_analog_prob(prob, f"{_SCHEDULE}: layer {name!r} at epoch {epoch}")
        for name, prob in probs.items():
            self._layers[name].analog_prob = prob

    @property
    def probs(self) -> dict[str, float]:
        """`analog_prob` of each layer, as it is now."""
        return {name: self._layers[name].analog_prob for name in self.starts}

    def step(self) -> None:
        """Goes on to the next epoch."""
        self._set(self.starts, self.epoch + 1)
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the layers' values at the start; what was given to the constructor is given again."""
        return {"epoch": self.epoch, "starts": dict(self.starts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resumes there, and sets the layers, whose `analog_prob` is not part of a model's state dict.

        Raises ValueError for the state of other layers, or of something else; nothing has been changed then.
        """
        if not isinstance(state_dict, Mapping) or not {"epoch", "starts"} <= state_dict.keys():
            got = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"{_SCHEDULE}: the state must be a dict of 'epoch' and 'starts', got {got}")
        starts = dict(state_dict["starts"])
        # More than self.starts: a layer may have gone to 0 by now, and look like an ordinary neuron.
        if not self.starts.keys() <= starts.keys() <= self._layers.keys():
            raise ValueError(f"{_SCHEDULE}: the state must be of layers {list(self.starts)}, got {list(starts)}")
        self._set(starts, state_dict["epoch"])
        self.epoch, self.starts = state_dict["epoch"], starts


# ---- parameter groups ----


def parameter_groups(
    model: nn.Module, lr: float, width_lr: float = 3e-4, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The groups of a torch optimizer: "weights" with `lr` and `weight_decay`, "neurons" with `width_lr` and without.

    Neurons' are the parameters that ASGL layers hold themselves: width, decay, threshold. They are few, set the scale
    of all gradients behind them, and are stored as logarithm or logit, whose decay would pull to an arbitrary value.
    Parameters of modules inside an ASGL layer are weights, and so are those of the normalisation in `BatchNormLIF`.
    Every parameter is in one group, once, also where modules are shared; frozen ones, too, which optimizers pass over
    until they are thawed. An empty group is left out.

    Raises ValueError for a negative rate or decay, TypeError where `model` is no module.
    """
    _check_module(model, "asgl_cuda.parameter_groups")
    for name, value in (("lr", lr), ("width_lr", width_lr), ("weight_decay", weight_decay)):
        if not check_number(name, value, "asgl_cuda.parameter_groups") >= 0:
            raise ValueError(f"asgl_cuda.parameter_groups: {name} must be >= 0, got {value}")
    neurons = {
        id(each): each
        for _, layer in asgl_layers(model)
        for name, each in layer.named_parameters(recurse=False)
        if not (isinstance(layer, BatchNormLIF) and name in ("weight", "bias"))
    }
    weights = [each for each in model.parameters() if id(each) not in neurons]
    groups = [
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {"name": "neurons", "params": list(neurons.values()), "lr": width_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# ---- monitor ----

# What is measured, in the order of tables and figures: key, heading.
_QUANTITIES = {
    "width": "width",
    "firing_rate": "firing rate",
    "analog_share": "analog share",
    "inside": "inside window",
    "smoothing_error": "smoothing error",
    "dead": "dead",
    "saturated": "saturated",
}


class ScalarWriter(Protocol):
    """What `Monitor.write` needs of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


class _Before(NamedTuple):
    """What a call starts from and changes."""

    v: Tensor | None
    rng_state: Tensor | None


class _Tally:
    """Sums over all that a layer did, kept on its device: no call waits for them."""

    def __init__(self) -> None:
        self.elements = 0
        self.sums: dict[str, Tensor] = {}
        # By the neurons' shape, which differs from call to call where a layer is shared or images vary in size.
        self.spikes: dict[torch.Size, Tensor] = {}
        self.steps: dict[torch.Size, int] = {}

    def add(self, shares: Mapping[str, Tensor]) -> None:
        """One value for each element of the output."""
        self.elements += shares["firing_rate"].numel()
        for key, values in shares.items():
            total = values.sum(dtype=torch.float64)
            self.sums[key] = self.sums[key].to(total.device) + total if key in self.sums else total

    def add_neurons(self, spikes: Tensor, time_dim: int | None) -> None:
        """Spikes `[T, N, ...]`, or `[N, ...]` without time; without a dimension for the batch if there is only one."""
        if time_dim is not None:
            spikes = spikes.movedim(time_dim, 0)
        steps = 0 if time_dim is None else 1
        shape = spikes.shape[steps + (spikes.dim() > steps + 1) :]
        counts = spikes.reshape(-1, *shape).sum(0)
        self.spikes[shape] = self.spikes[shape].to(counts.device) + counts if shape in self.spikes else counts
        self.steps[shape] = self.steps.get(shape, 0) + spikes.numel() // shape.numel()

    def result(self) -> dict[str, float]:
        found = {key: total.item() / self.elements for key, total in self.sums.items()}
        neurons = sum(counts.numel() for counts in self.spikes.values())
        if neurons:
            dead = sum(int((counts == 0).sum()) for counts in self.spikes.values())
            saturated = sum(int((counts == self.steps[shape]).sum()) for shape, counts in self.spikes.items())
            found |= {"dead": dead / neurons, "saturated": saturated / neurons}
        return found


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("x_seq")


def _rng_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _shares_of_lif(layer: LIF, before: _Before, x_seq: Tensor, s_seq: Tensor) -> dict[str, Tensor]:
    """Computes the call again for its potentials, from the same state and with the same noise."""
    generator = None
    if before.rng_state is not None:
        generator = torch.Generator(x_seq.device)
        generator.set_state(before.rng_state)
    time_dim = layer.time_dim % x_seq.dim()
    width, v_threshold = (layer._broadcast(value, x_seq, time_dim) for value in (layer.width, layer.v_threshold))
    again = layer._lif_again(x_seq, time_dim, v_init=before.v, generator=generator, return_h_seq=True)
    assert isinstance(again, LIFOutput)
    assert again.h_seq is not None
    h_seq = again.h_seq
    # In the type of the arithmetic, so that a spike here is one there.
    threshold, inverse_width = (
        torch.as_tensor(value, dtype=h_seq.dtype, device=h_seq.device) for value in (v_threshold, width)
    )
    inverse_width = 1 / inverse_width
    u = h_seq - threshold
    spikes = u > 0 if layer.strict_threshold else u >= 0
    y = u * inverse_width
    smooth = SURROGATES[layer.surrogate].cumulative(y)
    hard = spikes * threshold if layer.scale_output else spikes
    return {
        "firing_rate": spikes,
        "analog_share": s_seq != hard.to(s_seq.dtype),
        "inside": y.abs() < 0.5,
        "smoothing_error": torch.where(spikes, 1 - smooth, smooth),
    }


def _shares_of_output(s_seq: Tensor) -> dict[str, Tensor]:
    # H rises through 1/2 at u = 0: a smooth value tells, too, whether its element would have spiked.
    return {"firing_rate": s_seq >= 0.5, "analog_share": s_seq != s_seq.round()}


def _is_hidden() -> bool:
    """Whether a call is one whose values can't be looked at."""
    return torch.compiler.is_compiling() or transforming()


class Monitor:
    """Watches the ASGL layers of a model, over all calls inside `with monitor:` or between `start()` and `stop()`.

    A `with monitor:` inside another, or after `start()`, does not end it.

    For each layer `result()` has, in [0, 1] but for the width:

    - `width`: mean of the widths as they are now, in units of the input.
    - `firing_rate`: share of elements whose potential reached the threshold, u >= 0 (with `strict_threshold` u > 0),
      whatever they emitted.
    - `analog_share`: share of elements that emitted something else than their hard spike. At most `analog_prob`, and
      less where the smooth value of a potential outside the window is the spike.
    - `inside`: share of elements inside the window of the surrogate, abs(u / width) < 1/2.
    - `smoothing_error`: E|H(u) - spike|, what the paper's argument wants to see vanish.
    - `dead`, `saturated`: share of neurons that never spiked, and that spiked at every step, in all samples. Neurons
      are the positions of an input `[T, N, ...]` without time and batch, or without time if there is nothing else.

    `asgl_cuda.LIF` computes each call twice while it is watched. Of a layer with another forward there is only what
    its output tells, taken as spikes of height 1 (the first, of a tuple): `inside` and `smoothing_error` are missing,
    and `dead` and `saturated` are unless the layer says where time is by `time_dim`, None for calls of one step. What
    was not seen is missing as well, so before the first call there are only widths.

    Watching changes no output, gradient, state or random number. Calls inside compiled code and under transforms of
    torch.func are not seen: watch the model before, on some batches.

    Raises ValueError for a model without ASGL layers, TypeError for what is no module.

    Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = _some_asgl_layers(model, "asgl_cuda.Monitor")
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._before: dict[nn.Module, _Before] = {}
        self._watched_before: list[bool] = []  # for each `with` that is entered: whether it watched already
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen."""
        self._tallies = {layer: _Tally() for layer in self._layers.values()}

    def start(self) -> None:
        """Watches from now on, in addition to what was seen; nothing new if it does already."""
        if self._handles:
            return
        for layer in self._layers.values():
            self._handles += [
                layer.register_forward_pre_hook(self._look_before, with_kwargs=True),
                # The first, so that it sees the layer's own output.
                layer.register_forward_hook(self._look, prepend=True, with_kwargs=True),
            ]

    def stop(self) -> None:
        """Watches no longer; what was seen is kept."""
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
        x_seq = _input_of(args, kwargs)
        if _is_hidden() or type(layer).forward is not LIF.forward or not isinstance(x_seq, Tensor):
            return
        draws = layer.training and layer.analog_prob > 0
        self._before[layer] = _Before(layer.v, _rng_state(x_seq.device) if draws else None)

    @torch.no_grad()
    def _look(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _is_hidden():
            return
        s_seq = output[0] if isinstance(output, tuple) else output
        if not isinstance(s_seq, Tensor) or s_seq.numel() == 0:
            return
        before = self._before.pop(layer, None)
        if before is None:
            shares = _shares_of_output(s_seq)
        else:
            shares = _shares_of_lif(layer, before, _input_of(args, kwargs), s_seq)
        self._tallies[layer].add(shares)
        if hasattr(layer, "time_dim"):
            self._tallies[layer].add_neurons(shares["firing_rate"], layer.time_dim)

    def result(self) -> dict[str, dict[str, float]]:
        """What was measured, by the layers' names."""
        return {
            name: {"width": torch.as_tensor(layer.width).mean().item(), **self._tallies[layer].result()}
            for name, layer in self._layers.items()
        }

    def scalars(self) -> dict[str, float]:
        """The same as one dict, `firing_rate/name` and so on, as loggers want it; a lone layer has no name."""
        found = self.result()
        return {
            f"{key}/{name}" if name else key: values[key]
            for key in _QUANTITIES
            for name, values in found.items()
            if key in values
        }

    def __str__(self) -> str:
        rows = [["layer", *_QUANTITIES.values()]]
        for name, values in self.result().items():
            cells = (f"{values[key]:.4f}" if key in values else "-" for key in _QUANTITIES)
            rows.append([name or "(the model)", *cells])
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))]
            )
            for row in rows
        )

    def write(self, writer: ScalarWriter, step: int) -> None:
        """To TensorBoard: `writer.add_scalar(tag, value, step)` for each of `scalars()`."""
        for tag, value in self.scalars().items():
            writer.add_scalar(tag, value, step)

    def plot(self, path: str | Path) -> None:
        """Draws a panel for each quantity with a bar for each layer, by matplotlib, into a file of any of its formats.

        Raises ImportError without matplotlib.
        """
        # Not pyplot, which would choose a backend for the whole process and keep the figure.
        figures = _first_of(["matplotlib.figure"], "matplotlib", "asgl_cuda.Monitor.plot")
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


def _first_of(modules: Sequence[str], package: str, caller: str) -> Any:
    """The first that can be imported of modules that are not required."""
    for module in modules:
        with suppress(ImportError):
            return importlib.import_module(module)
    raise ImportError(f"{caller}: needs {package}, which can't be imported: pip install {package}")


# ---- Lightning ----


def lightning_callback(schedule: AnalogProbSchedule | None = None, monitor: Monitor | None = None) -> Any:
    """A Lightning callback: steps `schedule` at the end of each training epoch and logs what `monitor` saw in it.

    The monitor watches training steps, not validation, and is reset at each epoch's start; its `scalars()` are logged
    by these names, as means over the processes. The schedule's state goes into the checkpoints and comes from them.

    Raises ValueError if both are None, TypeError if one is something else, ImportError without Lightning (`lightning`
    or `pytorch_lightning`).
    """
    if schedule is None and monitor is None:
        raise ValueError("asgl_cuda.lightning_callback: needs a schedule, a monitor or both, got None and None")
    for name, value, kind in (("schedule", schedule, AnalogProbSchedule), ("monitor", monitor, Monitor)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"asgl_cuda.lightning_callback: {name} must be an asgl_cuda.{kind.__name__}, got {type(value).__name__}"
            )
    # Both may be installed; that which the program has imported is that whose Trainer it uses.
    names = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    lightning = _first_of(names, "lightning", "asgl_cuda.lightning_callback")

    class ASGLCallback(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if monitor is not None:
                monitor.reset()

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if monitor is not None:
                monitor.start()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if monitor is not None:
                monitor.stop()

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            if monitor is not None:
                monitor.stop()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if monitor is not None:
                module.log_dict(monitor.scalars(), sync_dist=True)
            if schedule is not None:
                schedule.step()

        def state_dict(self) -> dict[str, Any]:
            return {} if schedule is None else schedule.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if schedule is not None:
                schedule.load_state_dict(state_dict)

    return ASGLCallback()


# ---- hard spikes ----


@contextmanager
def spiking_eval(model: nn.Module) -> Iterator[None]:
    """Inside, every ASGL layer emits hard spikes, and surrogate gradients flow: for attacks and fine-tuning.

    It sets `analog_prob` to 0 and gives each layer its own value back on leaving, also after an exception. Nothing else
    is touched: batch norm and dropout stay in training or evaluation mode as you chose, carried potentials and
    `requires_grad` as they are. An attack wants `model.eval()` as well, fine-tuning does not. Do not step an
    `AnalogProbSchedule` inside: what it sets is lost on leaving.

    Raises ValueError for a model without ASGL layers, TypeError for what is no module.
    """
    layers = _some_asgl_layers(model, "asgl_cuda.spiking_eval").values()
    before = [(layer, layer.analog_prob) for layer in layers]
    try:
        for layer in layers:
            layer.analog_prob = 0.0
        yield
    finally:
        for layer, analog_prob in before:
            layer.analog_prob = analog_prob


# ---- carried potentials ----


def reset(model: nn.Module) -> None:
    """Forgets the potentials that the model's layers carry: the next call of each starts at rest.

    These are `LIF` and `BatchNormLIF`, and the layers of SpikingJelly, snnTorch and sinabs, converted or not, which are
    reset as their library does it. Norse's layers carry nothing.

    Raises TypeError where `model` is no module.
    """
    _check_module(model, "asgl_cuda.reset")
    resets = [library.reset for library in libraries() if hasattr(library, "reset")]
    for module in model.modules():
        if isinstance(module, LIF):
            module.reset()
        for reset_layer in resets:
            reset_layer(module)
