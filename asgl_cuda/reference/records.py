"""The records that the reference and the operators take: parameters, constant numbers, and rules."""

from __future__ import annotations

from typing import Any, NamedTuple

IN_CURRENT, IN_THRESHOLD, IN_RESET = 1, 2, 4  # bits of Rules.adaptation, as in csrc
DRAWS = 65536  # an element draws an integer in [0, DRAWS)
BELOW_IN_STATE = DRAWS + 1  # analog_prob is a tensor: rng_state[2] is round(analog_prob * DRAWS)


class Parameters(NamedTuple):
    """Values that may have gradients, and may vary over neurons and steps, in the order of ParameterId in csrc."""

    width: Any
    decay: Any
    v_threshold: Any
    reset: Any  # v_reset for the hard reset, reset_amount for the soft one
    input_gain: Any
    input_bias: Any
    input_mean: Any
    residual: Any  # a sequence like x_seq


class Numbers(NamedTuple):
    """The argument `numbers` of operators: the parameters that are constants (0 for tensors), and other constants."""

    width: float
    decay: float
    v_threshold: float
    reset: float
    input_gain: float
    input_bias: float
    input_mean: float
    residual_gain: float
    v_rest: float
    surrogate_gain: float
    v_min: float  # 0 without a lower limit


class Rules(NamedTuple):
    """The argument `rules` of operators, in the order of struct Rules in csrc/ops/call.h."""

    surrogate: int  # its id, or INTEGER with levels and without multi_spike
    hard_reset: int  # 0 or 1, like all fields up to logit_decay
    strict_threshold: int
    scale_output: int
    detach_reset: int
    multi_spike: int
    periodic: int  # 1 if the surrogate is periodic_exponential, which has the id of laplace
    floored: int  # 1 if v_min is the lower limit of the potential
    log_width: int  # 1 if operators get the logarithm of the width; the reference gets the width itself
    logit_decay: int  # 1 if operators get the logit of the decay; the reference gets the decay itself
    analog_below: int  # round(analog_prob * DRAWS), or BELOW_IN_STATE
    # The largest number of spikes per step, for the surrogate INTEGER and for multi_spike. 0 if not given, which for
    # multi_spike means no limit. With INTEGER, operators take the threshold as the argument width, and the factor of
    # scale_output, 1 / levels, as the argument v_threshold.
    levels: int
    # Where the adaptation w acts, as bits; 0 without an adaptation. If neurons have an adaptation, w is a state, and
    # input_gain, input_bias and input_mean are the parameters of w.
    adaptation: int
    time_dim: int  # not negative
    # A one-dimensional parameter belongs to one dimension of x_seq. This is the number of dimensions after that one. 0
    # means the last dimension, as in torch's broadcasting.
    trailing: int

    def states(self) -> tuple[str, ...]:
        """Names of the neurons' states, v first. Operators take and return several as one tensor, `[states, ...]`."""
        return ("v", "w") if self.adaptation else ("v",)

    def with_values(self, **values: int) -> Rules:
        """A copy with these values. Not by `_replace`, which torch.compile can't trace in torch 2.6."""
        return Rules(*[values.get(name, value) for name, value in zip(Rules._fields, self, strict=True)])
