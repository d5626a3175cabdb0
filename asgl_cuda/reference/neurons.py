"""The neurons and the integrator in plain PyTorch: the definition of every other backend.

    c    = input_gain * (x[t] - input_mean) + input_bias (+ residual_gain * residual[t])
    h[t] = v_rest + decay * (v[t-1] - v_rest) + c
    u    = h[t] - v_threshold
    a    = F(u * (1 / width))                               analog value
    z    = 1 if u >= 0 else 0                               hard spike (strict: u > 0)
    s    = a where the element is analog at t, else z       value, always with the gradient of a
    v[t] = h[t] * (1 - s) + v_reset * s                     hard reset
         = h[t] - reset_amount * s                          soft reset
    out  = s, or v_threshold * s with scale_output

With levels (soft reset) z is a number of spikes of height 1, and s is scaled by 1 / levels with scale_output:

    a    = clamp(h[t] * (1 / v_threshold), 0, levels)
    z    = round(a), ties to even

With multi_spike (soft reset, no noise) z is a number of spikes; v_min is a floor of the potential:

    z    = trunc(h[t] / v_threshold) where h[t] > 0, else 0; at most levels, if given
    a    = F(d * (1 / width)),   d = u; for periodic_exponential F is laplace's, and, with slope 1,
    d    = u where h[t] < v_threshold, else v_threshold * (2 (r - floor(r)) - 1),   r = h[t] / v_threshold - 1/2
    v[t] = relu(v - v_min) + v_min,   v from above

Adaptive neurons have a second state w, and c = x[t]:

    w[t+1] = adapt_decay * w[t] + (adapt_potential * (v[t] - v_rest) + adapt_spike * s[t])
    c    = x[t] - w[t]                                      in the current
    u    = (h[t] - w[t]) - v_threshold                      in the threshold
    v[t] = h[t] - (reset_amount + w[t]) * s                 in a soft reset: by default with the threshold, or alone

Recurrent neurons, whose c is input_gain * i[t], adaptive ones with x[t] = i[t], take a step at a time, with rng_state
[seed + SEED_PER_STEP * t, offset]:

    j[t] = x[t] + (s[t-1] W^T + bias)
    i[t] = syn_decay * i[t-1] + j[t]                        with a synapse, else j[t]

Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023, with
the forward pass s = m z + (1 - m) a, m = 0 where analog, and m hidden from the gradient. Periodic surrogate: Weidel,
Sheik: WaveSense, arXiv 2111.01456. Levels: Luo, Yao, Chou, Xu, Li: Integer-Valued Training and Spike-Driven Inference
Spiking Neural Network, ECCV 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..layout import real_type
from .noise import analog_mask_below, rng_states_of_steps
from .records import IN_CURRENT, IN_RESET, IN_THRESHOLD, Numbers, Parameters, Rules
from .surrogates import INTEGER, SURROGATES, clamped, detached, periodic_distance, with_gradient_of


def _time_first(value: Any, x_seq: Tensor, time_dim: int) -> Tensor:
    """A parameter that broadcasts against x_seq, with all dimensions of x_seq, time first."""
    tensor = torch.as_tensor(value, dtype=real_type(x_seq.dtype), device=x_seq.device)
    return tensor[(None,) * (x_seq.dim() - tensor.dim())].movedim(time_dim, 0)


def fires(u: Any, strict_threshold: Any) -> Any:
    """Whether neurons fire, if `u` is their potential minus the threshold."""
    return u > 0 if strict_threshold else u >= 0


def lif_reference(
    x_seq: Tensor,
    v_init: Tensor | None,
    rng_state: Tensor | None,
    parameters: Parameters,
    numbers: Numbers,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loop over the steps: s_seq, v_last, v_seq and h_seq. If a parameter is None, `numbers` has its value."""
    real = real_type(x_seq.dtype)
    time_dim, v_rest = rules.time_dim, numbers.v_rest
    counts = rules.surrogate == INTEGER
    cumulative: Callable[[Tensor], Tensor] = partial(clamped, most=rules.levels)
    if not counts:
        cumulative = next(each.cumulative for each in SURROGATES.values() if each.id == rules.surrogate)

    *names, _ = Parameters._fields
    given = (getattr(parameters, name) for name in names)
    values = (getattr(numbers, name) if value is None else value for name, value in zip(names, given, strict=True))
    width, decay, v_threshold, reset, input_gain, input_bias, input_mean = (
        _time_first(value, x_seq, time_dim) for value in values
    )
    inverse_width = 1 / width
    x = x_seq.to(real).movedim(time_dim, 0)
    r = None if parameters.residual is None else parameters.residual.to(real).movedim(time_dim, 0)
    analog = analog_mask_below(x_seq, rules.analog_below, rng_state, time_dim).movedim(time_dim, 0)

    def at(value: Tensor, t: int) -> Tensor:
        """The value in step t of a parameter, which may be the same in all steps."""
        return value[t if value.shape[0] > 1 else 0]

    adapts = rules.adaptation != 0
    in_current, in_threshold, in_reset = (rules.adaptation & bit for bit in (IN_CURRENT, IN_THRESHOLD, IN_RESET))
    states = rules.states()
    state = {"v": torch.full_like(x[0], v_rest), "w": torch.zeros_like(x[0])}  # at rest
    if v_init is not None:
        state.update(zip(states, v_init.unbind() if len(states) > 1 else [v_init], strict=True))
    v, w = state["v"], state["w"]
    s_seq, v_seq, h_seq = [], [], []
    for t in range(x.shape[0]):
        if adapts:
            c = x[t] - w if in_current else x[t]
        else:
            c = at(input_gain, t) * (x[t] - at(input_mean, t)) + at(input_bias, t)
        if r is not None:
            c = c + numbers.residual_gain * r[t]
        charged = v_rest + at(decay, t) * (v - v_rest) + c
        # With an adaptation of the threshold, the h of h_seq is computed once more at the end of the step, so that
        # autograd adds up gradients in the order of the kernels.
        minus_w = -w if in_threshold else None
        h = charged if minus_w is None else charged + minus_w
        u = h if counts else h - at(v_threshold, t)
        d = periodic_distance(h, at(v_threshold, t)) if rules.periodic else u
        a = cumulative(d * at(inverse_width, t))
        z = fires(u, rules.strict_threshold).to(real)
        if rules.multi_spike:
            z = (h > 0) * torch.div(h, at(v_threshold, t), rounding_mode="trunc")
            z = z.clamp(max=rules.levels) if rules.levels else z
        if counts:
            z = a.round()
        hard_or_analog = torch.where(analog[t], a, z).detach()
        s = with_gradient_of(hard_or_analog, a, numbers.surrogate_gain)
        s_reset = detached(s) if rules.detach_reset else s
        amount = at(reset, t) + w if in_reset else at(reset, t)
        v = charged * (1 - s_reset) + amount * s_reset if rules.hard_reset else charged - amount * s_reset
        if rules.floored:
            v = torch.relu(v - numbers.v_min) + numbers.v_min
        if adapts:
            w = at(input_gain, t) * w + (at(input_bias, t) * (v - v_rest) + at(input_mean, t) * s)
        s_seq.append(s)
        v_seq.append(v)
        h_seq.append(h if minus_w is None else charged + minus_w)

    s_out = torch.stack(s_seq)
    if rules.scale_output:
        s_out = v_threshold * s_out
    out, v_out, h_out = (seq.movedim(0, time_dim) for seq in (s_out, torch.stack(v_seq), torch.stack(h_seq)))
    state = {"v": v, "w": w}
    last = torch.stack([state[name] for name in states]) if len(states) > 1 else v
    return out.to(x_seq.dtype), last, v_out, h_out


def recurrent_reference(
    x_seq: Tensor,
    weight: Tensor,
    parameters: Tensor,
    v_init: Tensor | None,
    s_init: Tensor | None,
    i_init: Tensor | None,
    rng_state: Tensor | None,
    numbers: Numbers,
    rules: Rules,
    has_synapse: bool,
    detach_recurrent: bool,
) -> tuple[Tensor, ...]:
    """The loop over the steps of recurrent neurons: s_seq, h_seq, v_seq, v_last, s_last, i_last.

    `parameters`, [9, N], are those of Parameters except the residual, then bias and syn_decay.
    """
    real, time_dim = real_type(x_seq.dtype), rules.time_dim
    width, decay, v_threshold, reset, *input_values, bias, syn_decay = parameters
    adapts = rules.adaptation != 0
    input_values = [*input_values, None] if adapts else [None] * 4
    neuron = Parameters(width, decay, v_threshold, reset, *input_values)
    rules_of_step = rules.with_values(time_dim=0, scale_output=0)
    x = x_seq.to(real).movedim(time_dim, 0)
    states = rng_states_of_steps(rng_state, x.shape[0])
    v = v_init
    s = torch.zeros_like(x[0]) if s_init is None else s_init
    i = torch.zeros_like(x[0]) if i_init is None else i_init
    emitted, h_seq, v_seq = [], [], []
    device = x.device.type  # "meta" has no autocast
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        for t in range(x.shape[0]):
            fed = detached(s) if detach_recurrent else s
            j = x[t] + ((fed * weight if weight.dim() == 1 else fed @ weight.T) + bias)
            i = syn_decay * i + j if has_synapse else j
            (s,), v, _, (h,) = lif_reference(i[None], v, states[t], neuron, numbers, rules_of_step)
            emitted.append(s)
            h_seq.append(h)
            v_seq.append(v[0] if len(rules.states()) > 1 else v)
    s_seq, *potentials = (torch.stack(each).movedim(0, time_dim) for each in (emitted, h_seq, v_seq))
    s_seq = v_threshold * s_seq if rules.scale_output else s_seq
    assert v is not None  # there is a step
    return s_seq.to(x_seq.dtype), *potentials, v, s, i


def integrator_reference(
    x_seq: Tensor,
    v_init: Tensor | None,
    decay: Tensor | float,
    input_gain: Tensor | float,
    v_rest: float,
    delay: bool,
    time_dim: int,
) -> tuple[Tensor, Tensor]:
    """The loop over the steps of the leaky integrator: v_seq, in the type of x_seq, and v_last.

    v[t] = v_rest + decay * (v[t-1] - v_rest) + input_gain * x[t];  v_seq[t] = v[t], or v[t-1] with delay
    """
    real = real_type(x_seq.dtype)
    x = x_seq.to(real).movedim(time_dim, 0)

    def per_step(value: Tensor | float) -> Sequence[Tensor]:
        """A parameter's value at each step."""
        steps = _time_first(value, x_seq, time_dim)
        return [steps[0]] * len(x) if len(steps) == 1 else list(steps)

    v = torch.full_like(x[0], v_rest) if v_init is None else v_init
    v_seq = [v]
    for x_t, decay_t, gain_t in zip(x, per_step(decay), per_step(input_gain), strict=True):
        v = (v_rest + decay_t * (v - v_rest)) + gain_t * x_t
        v_seq.append(v)
    return torch.stack(v_seq[:-1] if delay else v_seq[1:]).movedim(0, time_dim).to(x_seq.dtype), v
