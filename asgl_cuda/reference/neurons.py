"""The neuron, its noise, the integrator and the normalisation in plain PyTorch: the definition of every other backend.

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
[seed + SEED_OF_STEP * t, offset]:

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import by_channel, memory_order, real_type
from ..torch_modes import apply, exporting, in_forward_mode, transforming
from .surrogates import INTEGER, SURROGATES, clamped

DRAWS = 65536  # an element draws an integer in [0, DRAWS)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
IN_CURRENT, IN_THRESHOLD, IN_RESET = 1, 2, 4  # bits of Rules.adaptation, as in csrc
SEED_OF_STEP = 0x61C8864680B583EB  # kSeedOfStep of csrc/params/recurrent.h
BELOW_IN_STATE = DRAWS + 1  # analog_prob is data: rng_state[2] is round(analog_prob * DRAWS)


class Parameters(NamedTuple):
    """Values with gradients that may vary over neurons and steps, in the order of ParameterId in csrc."""

    width: Any
    decay: Any
    v_threshold: Any
    reset: Any  # v_reset for the hard reset, reset_amount for the soft one
    input_gain: Any
    input_bias: Any
    input_mean: Any
    residual: Any  # a sequence like x_seq


class Numbers(NamedTuple):
    """The argument `numbers` of operators: constant parameters (0 for tensors), and other constants."""

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
    v_min: float  # 0 without a floor


class Rules(NamedTuple):
    """The argument `rules` of operators, in the order of struct Rules in csrc/ops/call.h."""

    surrogate: int  # its id, or INTEGER with levels
    hard_reset: int  # 0 or 1, as all up to logit_decay
    strict_threshold: int
    scale_output: int
    detach_reset: int
    multi_spike: int
    periodic: int  # 1: the surrogate, laplace, is periodic_exponential
    floored: int  # 1: v_min is the floor of the potential
    log_width: int  # 1: the width is given as its logarithm, within the bound of learned.py; 0 for the reference
    logit_decay: int  # 1: the decay is given as its logit
    analog_below: int  # round(analog_prob * DRAWS), or BELOW_IN_STATE
    # The most spikes a step, 0 for no limit. With INTEGER width is the threshold, v_threshold the factor of
    # scale_output.
    levels: int
    # Where w is. If not 0, states are pairs, [2, ...], and the input's parameters are the adaptation's.
    adaptation: int
    time_dim: int  # not negative

    def members(self) -> int:
        """Those of the state."""
        return 2 if self.adaptation else 1

    def changed(self, **values: int) -> Rules:
        """As `_replace`, which torch.compile could not trace in torch 2.6."""
        return Rules(*[values.get(name, value) for name, value in zip(Rules._fields, self, strict=True)])


class GradientOf(torch.autograd.Function):
    """The value of `s` with the gradient of `a`, times `gain`: a + stop_gradient(s - a), but exact."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, a: Tensor, gain: float) -> Tensor:
        return s.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gain = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, grad * ctx.gain, None


class GradientAndTangentOf(GradientOf):
    """Adds a forward-mode derivative, which torch.compile cannot trace."""

    @staticmethod
    def jvp(ctx: Any, s: Tensor | None, a: Tensor, gain: None) -> Any:
        return a * ctx.gain


def with_gradient_of(s: Tensor, a: Tensor, gain: float = 1.0) -> Tensor:
    """Applies `GradientOf`."""
    compiling = torch.compiler.is_compiling()
    if compiling and (transforming() or in_forward_mode()):  # both drop autograd functions silently
        scaled = a * gain
        return s.detach() + (scaled - scaled.detach())
    if compiling and exporting():  # exported, autograd functions are clones
        scaled = a * gain
        nothing = scaled - detached(scaled)
        return detached(s) + torch.where(nothing == 0, nothing, 0.0)  # without a NaN
    result: Tensor = apply(GradientOf if compiling else GradientAndTangentOf, s, a, gain)
    return result


def detached(value: Tensor) -> Tensor:
    """The value as a constant, also in decomposed exported graphs, which drop detach()."""
    if not exporting():
        return value.detach()
    return value.view(_INTEGERS[value.element_size()]).view(value.dtype)


def periodic_distance(h: Tensor, v_threshold: Tensor) -> Tensor:
    """Distance from the threshold; above it, twice the distance from its nearest multiple, with slope 1."""
    u = h - v_threshold
    turns = h / v_threshold - 0.5
    above = v_threshold * (2 * (turns - turns.floor()) - 1)
    return with_gradient_of(torch.where(h < v_threshold, u, above).detach(), u)


def lif_reference(
    x_seq: Tensor,
    v_init: Tensor | None,
    rng_state: Tensor | None,
    parameters: Parameters,
    numbers: Numbers,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loop over the steps: s_seq, v_last, v_seq and h_seq. A parameter None has its value in `numbers`."""
    real = real_type(x_seq.dtype)
    time_dim, v_rest = rules.time_dim, numbers.v_rest
    counts = rules.surrogate == INTEGER
    cumulative: Callable[[Tensor], Tensor] = partial(clamped, most=rules.levels)
    if not counts:
        cumulative = next(each.cumulative for each in SURROGATES.values() if each.id == rules.surrogate)

    def by_step(name: str) -> Tensor:
        value = getattr(parameters, name)
        if value is None:
            value = getattr(numbers, name)
        tensor = torch.as_tensor(value, dtype=real, device=x_seq.device)
        return tensor[(None,) * (x_seq.dim() - tensor.dim())].movedim(time_dim, 0)

    *names, _ = Parameters._fields
    width, decay, v_threshold, reset, input_gain, input_bias, input_mean = map(by_step, names)
    inverse_width = 1 / width
    x = x_seq.to(real).movedim(time_dim, 0)
    r = None if parameters.residual is None else parameters.residual.to(real).movedim(time_dim, 0)
    analog = analog_mask_below(x_seq, rules.analog_below, rng_state, time_dim).movedim(time_dim, 0)

    def at(value: Tensor, t: int) -> Tensor:
        return value[t if value.shape[0] > 1 else 0]

    adapts = rules.adaptation != 0
    in_current, in_threshold, in_reset = (rules.adaptation & bit for bit in (IN_CURRENT, IN_THRESHOLD, IN_RESET))
    v = torch.full_like(x[0], v_rest) if v_init is None else v_init
    w = torch.zeros_like(v)
    if adapts and v_init is not None:
        v, w = v_init.unbind()
    s_seq, v_seq, h_seq = [], [], []
    for t in range(x.shape[0]):
        if adapts:
            c = x[t] - w if in_current else x[t]
        else:
            c = at(input_gain, t) * (x[t] - at(input_mean, t)) + at(input_bias, t)
        if r is not None:
            c = c + numbers.residual_gain * r[t]
        charged = v_rest + at(decay, t) * (v - v_rest) + c
        # h_seq has an addition of its own, the last: autograd then adds gradients in the kernels' order.
        minus_w = -w if in_threshold else None
        h = charged if minus_w is None else charged + minus_w
        u = h if counts else h - at(v_threshold, t)
        d = periodic_distance(h, at(v_threshold, t)) if rules.periodic else u
        a = cumulative(d * at(inverse_width, t))
        z = (u > 0 if rules.strict_threshold else u >= 0).to(real)
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
    return out.to(x_seq.dtype), torch.stack([v, w]) if adapts else v, v_out, h_out


def states_of_steps(rng_state: Tensor | None, steps: int) -> Tensor | list[None]:
    """The rng_state of each step of recurrent neurons: [seed + SEED_OF_STEP * t, offset]."""
    if rng_state is None:
        return [None] * steps
    is_seed = torch.arange(rng_state.shape[0], device=rng_state.device) == 0
    return rng_state + torch.arange(steps, device=rng_state.device)[:, None] * SEED_OF_STEP * is_seed


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
    """The loop over the steps: s_seq, h_seq, v_seq, v_last, s_last, i_last.

    `parameters`, [9, N]: those of Parameters but the residual, bias, syn_decay.
    """
    real, time_dim = real_type(x_seq.dtype), rules.time_dim
    width, decay, v_threshold, reset, *of_input, bias, syn_decay = parameters
    adapts = rules.adaptation != 0
    of_input = [*of_input, None] if adapts else [None] * 4
    neuron = Parameters(width, decay, v_threshold, reset, *of_input)
    rules_of_step = rules.changed(time_dim=0, scale_output=0)
    x = x_seq.to(real).movedim(time_dim, 0)
    states = states_of_steps(rng_state, x.shape[0])
    v = torch.full_like(x[0], numbers.v_rest) if v_init is None else v_init
    if adapts and v_init is None:
        v = torch.stack([v, torch.zeros_like(v)])
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
            v_seq.append(v[0] if adapts else v)
    s_seq, *potentials = (torch.stack(each).movedim(0, time_dim) for each in (emitted, h_seq, v_seq))
    s_seq = v_threshold * s_seq if rules.scale_output else s_seq
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

    v[t] = v_rest + decay * (v[t-1] - v_rest) + input_gain * x[t];  out[t] = v[t], or v[t-1] with delay
    """
    real = real_type(x_seq.dtype)
    x = x_seq.to(real).movedim(time_dim, 0)

    def by_step(value: Tensor | float) -> Sequence[Tensor]:
        tensor = torch.as_tensor(value, dtype=real, device=x_seq.device)
        steps = tensor[(None,) * (x_seq.dim() - tensor.dim())].movedim(time_dim, 0)
        return [steps[0]] * len(x) if len(steps) == 1 else list(steps)

    v = torch.full_like(x[0], v_rest) if v_init is None else v_init
    v_seq = [v]
    for x_t, decay_t, gain_t in zip(x, by_step(decay), by_step(input_gain), strict=True):
        v = (v_rest + decay_t * (v - v_rest)) + gain_t * x_t
        v_seq.append(v)
    return torch.stack(v_seq[:-1] if delay else v_seq[1:]).movedim(0, time_dim).to(x_seq.dtype), v


def batch_statistics(x_seq: Tensor, channel: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance (biased, both [C]) of each channel, over all processes of `group` if any.

    In float64, whatever the type of x_seq.
    """
    dims = [dim for dim in range(x_seq.dim()) if dim != channel]
    x = x_seq.double()
    # torch.tensor would copy from the host, and wait for the GPU.
    count = torch.scalar_tensor(x.numel() // x.shape[channel], dtype=x.dtype, device=x.device)
    if group is None:
        variance, mean = torch.var_mean(x, dims, correction=0)
        return count, mean, variance
    from torch.distributed.nn.functional import all_reduce

    count = all_reduce(count, group=group)
    mean = all_reduce(x.sum(dims), group=group) / count
    squares = (x - by_channel(mean, channel, x)).square().sum(dims)
    return count, mean, all_reduce(squares, group=group) / count


def normalisation(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    input_scale: float,
    real: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """input_gain, input_bias and input_mean, each [C] in the type of the arithmetic, of a normalised input.

        c = input_scale * (weight * (x - mean) / sqrt(variance + eps) + bias)
          = input_gain * (x - input_mean) + input_bias

    input_mean is rounded; the rest of the mean is in the bias. With the whole mean in the bias, two large terms would
    cancel for a mean large against the deviation.
    """
    mean, variance = mean.double(), variance.double()
    gain = input_scale / (variance + eps).sqrt()
    if weight is not None:
        gain = gain * weight.double()
    input_mean = mean.to(real)
    shift = -gain * (mean - input_mean.double())
    if bias is not None:
        shift = shift + input_scale * bias.double()
    return gain.to(real), shift.to(real), input_mean


def _philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on 32-bit words in int64 tensors."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap modulo 2^64: the bits are correct with either sign.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32 & low) ^ c1 ^ k0, product1 & low
        c2, c3 = (product0 >> 32 & low) ^ c3 ^ k1, product0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def _draws(neurons: int, steps: int, rng_state: Tensor) -> Tensor:
    """16 random bits for each step and neuron, [steps, neurons]: one Philox block serves 4 neurons and 2 steps."""
    low = 0xFFFFFFFF
    device = rng_state.device
    group = torch.arange((neurons + 3) // 4, device=device)
    pair = torch.arange((steps + 1) // 2, device=device)[:, None]
    seed, offset = rng_state[0], rng_state[1]
    words = _philox4x32((group & low, group >> 32, pair, offset & low), (seed & low, seed >> 32 & low))
    lanes = [bits for word in torch.broadcast_tensors(*words) for bits in (word & 0xFFFF, word >> 16)]
    draws: Tensor = torch.stack(lanes, dim=-1).unflatten(-1, (2, 4))  # pair, group, step in pair, neuron in group
    return draws.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:steps, :neurons]


def analog_mask_below(x_seq: Tensor, analog_below: int, rng_state: Tensor | None, time_dim: int) -> Tensor:
    """Whether each element of x_seq is analog: its draw is below `analog_below`."""
    if analog_below in (0, DRAWS):
        return torch.full(x_seq.shape, analog_below > 0, dtype=torch.bool, device=x_seq.device)
    assert rng_state is not None
    below = rng_state[2] if analog_below == BELOW_IN_STATE else analog_below
    order = memory_order(x_seq, time_dim)
    sizes = [x_seq.shape[dim] for dim in order if dim != time_dim]
    steps = x_seq.shape[time_dim]
    mask = _draws(x_seq.numel() // steps, steps, rng_state) < below
    # From [time, neurons] to memory order, then to the order of the dimensions.
    mask = mask.unflatten(1, sizes).movedim(0, order.index(time_dim)) if sizes else mask[:, 0]
    return mask.permute([order.index(dim) for dim in range(x_seq.dim())])
