"""What layers of spiking neurons have in common: width, decay, threshold and reset."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calls.arguments import FLAGS, Arguments
from ..checks import (
    check_bool,
    check_finite,
    check_options,
    check_positive_threshold,
    check_reset_and_surrogate,
    check_width,
    min_and_max,
    read_finite,
    warn_once,
)
from ..reference.learned import BOUND, Logarithm
from ..reference.neurons import fires
from .base import NeuronLayer, Noisy, Value, fill_parameter, format_values

_LEAST_WIDTH, _LARGEST_WIDTH = math.exp(-BOUND), math.exp(BOUND)

_RESET_VALUES = "v_reset", "reset_amount"
_LEARNS = dict.fromkeys(("learn_width", "learn_decay", "learn_threshold"), check_bool)


class Neurons(NeuronLayer, Noisy):
    """A layer of spiking neurons: width, decay and threshold, constant or learned, the reset, and the noise.

    Subclasses add options to `_options`. Without them, neurons emit at most one spike of height 1 per step, and their
    potential has no lower bound.
    """

    _constants: ClassVar[tuple[str, ...]] = (*NeuronLayer._constants, "_width", "_v_threshold", *_RESET_VALUES)
    _options: ClassVar[dict[str, Callable[..., Any]]] = {
        **NeuronLayer._options,
        "surrogate_gain": read_finite,
        **dict.fromkeys(("strict_threshold", "detach_reset", "store_v_seq"), check_bool),
    }
    v_seq: Tensor | None
    v_reset: Tensor | float | None
    reset_amount: Tensor | float | None
    surrogate_gain: float
    strict_threshold: bool
    detach_reset: bool
    scale_output: bool
    multi_spike: bool
    levels: int | None
    v_min: float | None

    def _set_up_neurons(self, given: Mapping[str, Any]) -> None:
        """Checks the arguments of the constructor, sets the options, and makes the parameters."""
        self.scale_output, self.multi_spike, self.levels, self.v_min = False, False, None, None
        self._set_options(given)
        for name in _RESET_VALUES:
            setattr(self, name, None if given[name] is None else self._checked_value(name, given[name]))
        self.surrogate: str = given["surrogate"]
        check_reset_and_surrogate(given, self._caller, self.levels, self.multi_spike)
        self._set_analog_prob(given["analog_prob"])
        learns = check_options(given, _LEARNS, self._caller)
        # A value for the whole layer has shape [1], because torch's fully_shard refuses parameters of shape [].
        empty = partial(torch.empty, self.num_features or 1, device=given["device"], dtype=given["dtype"])
        self.log_width = nn.Parameter(empty()) if learns["learn_width"] and not self._emits_levels else None
        self.logit_decay = nn.Parameter(empty()) if learns["learn_decay"] else None
        self.threshold = nn.Parameter(empty()) if learns["learn_threshold"] else None
        self._set_width(given["width"])
        self._set_decay(given["decay"])
        self._set_threshold(given["v_threshold"])
        if self.surrogate_gain == 0:
            message = "surrogate_gain is 0, so no gradient passes through the spikes; its default is 1"
            warn_once("surrogate_gain", f"{self._caller}: {message}")

    def reset_parameters(self) -> None:
        """Resets the learned parameters to the values that the constructor or a property set last. Clears states.

        Call it after ``to_empty()``, which leaves the parameters without values.
        """
        self.width, self.decay = self._width, self._decay
        fill_parameter(self.threshold, self._v_threshold)
        self.reset()

    @property
    def width(self) -> Tensor | float:
        """The width, in units of the input. With `levels` and without `multi_spike`, this is the threshold.

        A learned width is a tensor: of shape `[]` for granularity "layer", else `num_features`.
        """
        return self._property_value(self._current_values()[2 if self._emits_levels else 0])

    @width.setter
    def width(self, value: Tensor | float) -> None:
        self._set_width(value)

    @property
    def _emits_levels(self) -> bool:
        """Whether neurons emit rounded potentials: with `levels` and without `multi_spike`."""
        return self.levels is not None and not self.multi_spike

    def _set_width(self, value: Any) -> None:
        """Checks the width and keeps it as the value last set. If it is learned, also stores it in the parameter."""
        learned = self.log_width is not None
        found = self._checked_value("width", value, self.log_width, "learn_width")
        for each in min_and_max(found):
            check_width(each, self._caller)
            if self._emits_levels and each != 1:
                raise ValueError(
                    f"{self._caller}: levels use v_threshold as the width, so width must keep its default, 1.0, got "
                    f"{each}; leave out width"
                )
            if learned and not _LEAST_WIDTH <= each <= _LARGEST_WIDTH:
                raise ValueError(
                    f"{self._caller}: a learned width must be in [{_LEAST_WIDTH}, {_LARGEST_WIDTH}], got {each}"
                )
        self._width = found
        fill_parameter(self.log_width, found.double().log() if isinstance(found, Tensor) else math.log(found))

    @property
    def v_threshold(self) -> Tensor | float:
        """The threshold, in units of the input.

        A learned threshold is a tensor: of shape `[]` for granularity "layer", else `num_features`.
        """
        return self._property_value(self._current_values()[2])

    @v_threshold.setter
    def v_threshold(self, value: Tensor | float) -> None:
        self._set_threshold(value)

    def _set_threshold(self, value: Any) -> None:
        """Checks the threshold and keeps it as the value last set. If learned, also stores it in the parameter."""
        found = self._checked_value("v_threshold", value, self.threshold, "learn_threshold")
        for each in min_and_max(found):
            check_finite("v_threshold", each, self._caller)
        self._check_threshold(found)
        self._v_threshold = found
        fill_parameter(self.threshold, found)

    def _check_threshold(self, value: Tensor | float) -> None:
        """Refuses thresholds that a reset does not leave, and warns if neurons at rest fire."""
        caller, v_rest = self._caller, self.v_rest
        for name in ("v_reset", "v_min"):
            after = getattr(self, name)
            # Without input, a neuron whose reset is to v_rest or below fires again only if neurons at rest fire: see
            # the warning below.
            fires_on = after is not None and (after > v_rest) & (after >= value)
            if fires_on.any() if isinstance(fires_on, Tensor) else fires_on:
                raise ValueError(
                    f"{caller}: {name} must be below v_threshold, or a neuron that has fired may fire again without "
                    f"input, got {name} {format_values(after)} and v_threshold {format_values(value)}"
                )
        several = "multi_spike" if self.multi_spike else "levels" if self._emits_levels else ""
        least, _ = min_and_max(value)
        if several:
            check_positive_threshold(least, several, caller)
        if fires(v_rest - least, self.strict_threshold):
            message = f"v_threshold {least:g} is not above v_rest {v_rest:g}: neurons at rest fire without any input"
            warn_once("v_threshold", f"{caller}: {message}")
        elif self.v_reset is None:
            amount, _ = min_and_max(value if self.reset_amount is None else self.reset_amount)
            if amount <= 0:
                message = (
                    f"a spike subtracts {amount:g} from the potential, so it does not lower it; use a reset_amount > 0"
                )
                warn_once("reset_amount", f"{caller}: {message}")

    def _current_values(self) -> tuple[Value, Value, Value]:
        """Width, decay and threshold for a call: constants, or learned values as they are stored."""
        log_width, threshold = self.log_width, self.threshold  # read once, because each access takes 0.7 us
        return (
            self._width if log_width is None else Logarithm(log_width),
            self._decay_value(),
            self._v_threshold if threshold is None else threshold,
        )

    def _arguments_of_call(
        self,
        x_seq: Tensor,
        input_gain: float = 1.0,
        v_init: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_v_last: bool = False,
        return_v_seq: bool = False,
        return_h_seq: bool = False,
        residual: Tensor | None = None,
    ) -> Arguments:
        """The record of a call of `asgl_cuda.lif`, from the layer's options and values and from these arguments."""
        values: Sequence[Any] = *self._current_values(), self.v_reset, self.reset_amount
        if self.num_features:
            values = self._match_meta_device(values, x_seq)
        width, decay, v_threshold, v_reset, reset_amount = values
        given: Arguments = {
            "decay": decay, "v_threshold": v_threshold, "v_reset": v_reset, "reset_amount": reset_amount,
            "v_rest": self.v_rest, "width": width, "surrogate": self.surrogate, "surrogate_gain": self.surrogate_gain,
            "analog_prob": self.analog_prob_of_call(x_seq), "rng_state": None, "generator": generator,
            "input_gain": input_gain, "input_bias": 0.0, "input_mean": 0.0, "residual": residual,
            "residual_gain": 1.0 if residual is None else input_gain, "strict_threshold": self.strict_threshold,
            "scale_output": self.scale_output, "detach_reset": self.detach_reset, "levels": self.levels,
            "multi_spike": self.multi_spike, "v_min": self.v_min, "v_init": v_init, "time_dim": self.time_dim,
            "return_v_last": return_v_last, "return_v_seq": return_v_seq, "return_h_seq": return_h_seq,
            "backend": self.backend,
        }  # fmt: skip
        if self.num_features:
            given["features"] = self._features
        return given

    def extra_repr(self) -> str:
        learned = {"width": self.log_width, "decay": self.logit_decay, "v_threshold": self.threshold}
        surrogate = f"surrogate={self.surrogate}, "
        if self._emits_levels:
            del learned["width"]
            surrogate = ""
        features = f"{list(self.num_features)}, " if self.num_features else ""
        parts = [f"{name}={format_values(getattr(self, '_' + name), parameter)}" for name, parameter in learned.items()]
        v_reset = self.v_reset
        parts.append(f"v_reset={format_values(v_reset) if isinstance(v_reset, Tensor) else v_reset}")
        parts.append(f"{surrogate}analog_prob={self.analog_prob:g}, granularity={self.granularity}")
        if self.reset_amount is not None:
            parts.append(f"reset_amount={format_values(self.reset_amount)}")
        defaults = {"v_min": None, "v_rest": 0.0, "input_gain": 1.0, "surrogate_gain": 1.0}
        parts.extend(f"{name}={value:g}" for name in defaults if (value := getattr(self, name)) != defaults[name])
        if self.levels is not None:
            parts.append(f"levels={self.levels}")
        flags = {**dict.fromkeys((*FLAGS, "stateful", "store_v_seq"), False), "detach_reset": True}
        parts.extend(f"{name}={value}" for name in flags if (value := getattr(self, name)) != flags[name])
        if self.time_dim:
            parts.append(f"time_dim={self.time_dim}")
        return features + ", ".join(parts)
