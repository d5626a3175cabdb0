"""Schedules of `analog_prob` over the epochs."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..checks import check_int, describe_array, format_value, read_number, require_range
from .layers import require_asgl_layers

_CALLER = "asgl_cuda.AnalogProbSchedule"

_checked_fraction = require_range(read_number, "in [0, 1]", 0, 1)


class AnalogProbSchedule:
    """Changes `analog_prob` of ASGL layers from epoch to epoch, starting at the value that each layer has.

    Args:
        model: a module with ASGL layers (see `asgl_cuda.asgl_layers`). Their `analog_prob` is set immediately, for
            epoch 0. Layers with `multi_spike`, and layers with `analog_prob=0` and a constant width, are not changed.
        prob_at: a function `prob_at(start, epoch)` that returns `analog_prob`, in [0, 1]. `start` is the initial value
            of a layer, and `epoch` counts from 0.

    `multi_step`, `cosine` and `linear` make common schedules. Call `step()` after each epoch. The attribute `epoch`
    counts the steps. `starts` has the initial values and `probs` the current values, by layer name.

    A new value makes torch.compile compile the model again only if the value becomes 0 or stops being 0.

    Raises ValueError if the model has no layer to schedule or if `prob_at` returns a value out of range, and TypeError
    if the arguments are not a module and a function.

    Example::

        model = nn.Sequential(nn.Linear(64, 128), asgl_cuda.LIF(analog_prob=0.2))
        schedule = asgl_cuda.AnalogProbSchedule.cosine(model, epochs=10)
        for epoch in range(10):
            ...  # train
            schedule.step()
        print(schedule.probs)  # {'1': 0.0}
    """

    def __init__(self, model: nn.Module, prob_at: Callable[[float, int], float]) -> None:
        layers = require_asgl_layers(model, _CALLER)
        if not callable(prob_at):
            raise TypeError(
                f"{_CALLER}: prob_at must be a function of start and epoch, got {type(prob_at).__name__}; linear, "
                "cosine and multi_step make a schedule from numbers, as in AnalogProbSchedule.linear(model, epochs=10)"
            )
        self._layers = {name: layer for name, layer in layers.items() if not getattr(layer, "multi_spike", False)}
        self._prob_at = prob_at
        self.epoch = 0
        self.starts: dict[str, float] = {
            name: layer.analog_prob
            for name, layer in self._layers.items()
            if layer.analog_prob > 0 or layer.log_width is not None
        }
        if not self.starts:
            got = ", ".join(repr(name) if name else "the model itself" for name in layers)
            raise ValueError(
                f"{_CALLER}: model must have a layer without multi_spike that has analog_prob > 0 or a learned width, "
                f"got none in {got}; use, for example, asgl_cuda.LIF(analog_prob=0.5)"
            )
        self._set_probs(self.starts, 0)

    @classmethod
    def multi_step(cls, model: nn.Module, milestones: Sequence[int], gamma: float = 0.1) -> AnalogProbSchedule:
        """Multiplies `analog_prob` by `gamma`, in [0, 1], at each epoch in `milestones`, as torch's MultiStepLR."""
        if not isinstance(milestones, Sequence) or isinstance(milestones, (str, bytes)):
            got = describe_array("milestones", milestones) or type(milestones).__name__
            raise TypeError(f"{_CALLER}: milestones must be a sequence of ints, got {got}")
        epochs, gamma = (
            sorted(_checked_count("milestones", epoch, 1) for epoch in milestones),
            _checked_fraction("gamma", gamma, _CALLER),
        )
        return cls(model, partial(_multi_step, epochs=epochs, gamma=gamma))

    @classmethod
    def cosine(cls, model: nn.Module, epochs: int, final: float = 0.0) -> AnalogProbSchedule:
        """Moves `analog_prob` along half a cosine to `final` at epoch `epochs`, and then keeps it."""
        return cls(
            model,
            partial(
                _cosine, epochs=_checked_count("epochs", epochs, 1), final=_checked_fraction("final", final, _CALLER)
            ),
        )

    @classmethod
    def linear(cls, model: nn.Module, epochs: int, final: float = 0.0) -> AnalogProbSchedule:
        """Moves `analog_prob` in equal steps to `final` at epoch `epochs`, and then keeps it."""
        return cls(
            model,
            partial(
                _linear, epochs=_checked_count("epochs", epochs, 1), final=_checked_fraction("final", final, _CALLER)
            ),
        )

    def _set_probs(self, starts: Mapping[str, float], epoch: int) -> None:
        """Sets `analog_prob` of all layers to the values of this epoch, after checking all values."""
        probs: dict[str, float] = {}
        for name, start in starts.items():
            probs[name] = _checked_fraction(
                "analog_prob", self._prob_at(start, epoch), f"{_CALLER}: layer {name!r} at epoch {epoch}"
            )
        for name, prob in probs.items():
            self._layers[name].analog_prob = prob

    @property
    def probs(self) -> dict[str, float]:
        """The current `analog_prob` of each scheduled layer."""
        return {name: self._layers[name].analog_prob for name in self.starts}

    def step(self) -> None:
        """Advances to the next epoch, and sets `analog_prob` of the layers to the values of this epoch."""
        self._set_probs(self.starts, self.epoch + 1)
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """A dict with the epoch and the layers' initial values. It does not contain the constructor's arguments."""
        return {"epoch": self.epoch, "starts": dict(self.starts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the epoch and the initial values that `state_dict` returned, and sets `analog_prob` of the layers.

        Raises ValueError or TypeError, and changes nothing, for a state of other layers or objects.
        """
        if not isinstance(state_dict, Mapping) or not {"epoch", "starts"} <= state_dict.keys():
            raise ValueError(
                f"{_CALLER}: the state must be a dict of 'epoch' and 'starts', got {format_value(state_dict)}"
            )
        epoch, starts = _checked_count("epoch", state_dict["epoch"], 0), state_dict["starts"]
        # self.starts leaves out layers of constant width whose analog_prob began at 0. In the model of the state, these
        # layers may have begun with another analog_prob.
        if not isinstance(starts, Mapping) or not self.starts.keys() <= starts.keys() <= self._layers.keys():
            got = list(starts) if isinstance(starts, Mapping) else format_value(starts)
            raise ValueError(
                f"{_CALLER}: the state must be of layers {list(self.starts)}, got {got}; save it from a schedule of a "
                "model whose layers have the same names and options"
            )
        starts = {
            name: _checked_fraction(f"the start of layer {name!r}", start, _CALLER) for name, start in starts.items()
        }
        self._set_probs(starts, epoch)
        self.epoch, self.starts = epoch, starts


def _multi_step(start: float, epoch: int, epochs: Sequence[int], gamma: float) -> float:
    """`start`, multiplied by gamma for each of the milestones `epochs` that `epoch` has reached."""
    return start * gamma ** bisect_right(epochs, epoch)


def _cosine(start: float, epoch: int, epochs: int, final: float) -> float:
    """The value at `epoch` of half a cosine from `start` to `final` at `epochs`."""
    return _interpolate(start, final, (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2)


def _linear(start: float, epoch: int, epochs: int, final: float) -> float:
    """The value at `epoch` of a line from `start` to `final` at `epochs`."""
    return _interpolate(start, final, 1 - min(epoch / epochs, 1))


def _interpolate(start: float, final: float, weight: float) -> float:
    """The mean of `start`, with this weight, and `final`."""
    return start * weight + final * (1 - weight)  # unlike final + (start - final) * weight, exact at weight 1


def _checked_count(name: str, value: Any, least: int) -> int:
    """Checks a number of epochs: an int from `least` to sys.maxsize."""
    count = check_int(name, value, _CALLER)
    if not least <= count <= sys.maxsize:
        limit = f"at least {least}" if count < least else f"at most {sys.maxsize}"
        raise ValueError(f"{_CALLER}: {name} must be {limit}, got {format_value(count)}")
    return count
