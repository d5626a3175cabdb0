"""The arguments of a neuron's call by name, and the checks of those that are never tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from ..checks import accept_none, check_bool, check_finite, check_levels, check_not_nan
from ..layout import Features


class NeuronArguments(TypedDict, total=False):
    """The keyword arguments that the functions of spiking neurons have in common. `lif` documents them."""

    decay: Tensor | float
    v_threshold: Tensor | float
    v_reset: Tensor | float | None
    reset_amount: Tensor | float | None
    width: Tensor | float
    surrogate: str
    surrogate_gain: float
    analog_prob: Tensor | float
    residual: Tensor | None
    residual_gain: float
    rng_state: Tensor | None
    generator: torch.Generator | None
    v_rest: float
    strict_threshold: bool
    scale_output: bool
    detach_reset: bool
    levels: int | None
    multi_spike: bool
    v_min: float | None
    v_init: Tensor | None
    time_dim: int
    return_v_last: bool
    return_v_seq: bool
    return_h_seq: bool
    backend: str | None


class Arguments(NeuronArguments, total=False):
    """The record of a call: all arguments of `lif` except x_seq, or those of adaptive neurons.

    Layers pass a learned width as a Logarithm, and a learned decay as a Logit.
    """

    input_gain: Tensor | float
    input_bias: Tensor | float
    input_mean: Tensor | float
    # Only for neurons with an adaptation w: where w acts (bits IN_CURRENT, IN_THRESHOLD and IN_RESET), the initial w,
    # and the parameters of w.
    adaptation: int
    w_init: Tensor | None
    adapt_decay: Any
    adapt_potential: Any
    adapt_spike: Any
    features: Features  # only of layers whose parameters differ between channels or neurons


# Options that become flags of Rules, and options that ask for an additional result.
FLAGS = "multi_spike", "strict_threshold", "detach_reset", "scale_output"
RETURNS = "return_v_last", "return_v_seq", "return_h_seq"
# Options that are never tensors, with their checks. Two are checked elsewhere: `surrogate`, because it depends on
# multi_spike, and time_dim, because it depends on x_seq.
OPTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((*FLAGS, *RETURNS), check_bool),
    **dict.fromkeys(("surrogate_gain", "v_rest", "residual_gain"), check_not_nan),
    "v_min": accept_none(check_finite),
    "levels": accept_none(check_levels),
}
OPTION_NAMES = "surrogate", "time_dim", *OPTIONS
# The operators' parameters input_gain, input_bias and input_mean, each with the argument that is passed for it: INPUT
# without an adaptation, ADAPTATION with one.
INPUT = {"input_gain": "input_gain", "input_bias": "input_bias", "input_mean": "input_mean"}
ADAPTATION = {"input_gain": "adapt_decay", "input_bias": "adapt_potential", "input_mean": "adapt_spike"}
# Names of arguments that may be tensors. The key of a cached plan contains the arguments named in VALUES, or with an
# adaptation in ADAPTIVE_VALUES; of a tensor it contains shape, type and device.
_COMMON = "width", "decay", "v_threshold", "v_reset", "reset_amount"
VALUES = *_COMMON, *INPUT, "analog_prob", "residual"
ADAPTIVE_VALUES = *_COMMON, *ADAPTATION.values(), "analog_prob", "residual"
