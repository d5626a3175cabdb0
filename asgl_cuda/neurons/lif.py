"""The fused neuron as a function, `lif`, with the defaults of its options, and functions of its noise and spikes."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..calls.plan import Arguments, LIFOutput, computed
from ..checks import PLAIN_TENSORS, check_analog_prob, check_input, check_keywords, check_levels, check_rng_state
from ..reference.neurons import analog_mask_below
from ..torch_modes import transforming
from .deferred import tensor_of

_CALLER = "asgl_cuda.lif"


def lif(
    x_seq: Tensor,
    *,
    decay: Tensor | float = 0.5,
    v_threshold: Tensor | float = 1.0,
    v_reset: Tensor | float | None = 0.0,
    reset_amount: Tensor | float | None = None,
    width: Tensor | float = 1.0,
    surrogate: str = "rectangle",
    surrogate_gain: float = 1.0,
    analog_prob: Tensor | float = 0.0,
    rng_state: Tensor | None = None,
    generator: torch.Generator | None = None,
    v_rest: float = 0.0,
    input_gain: Tensor | float = 1.0,
    input_bias: Tensor | float = 0.0,
    input_mean: Tensor | float = 0.0,
    residual: Tensor | None = None,
    residual_gain: float = 1.0,
    strict_threshold: bool = False,
    scale_output: bool = False,
    detach_reset: bool = False,
    levels: int | None = None,
    multi_spike: bool = False,
    v_min: float | None = None,
    v_init: Tensor | None = None,
    time_dim: int = 0,
    return_v_last: bool = False,
    return_v_seq: bool = False,
    return_h_seq: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | LIFOutput:
    """Leaky integrate-and-fire neurons over a whole sequence, with the noise and the learned width of ASGL.

    Args:
        x_seq: input current, `[T, ...]`, or with time at `time_dim`; float16, bfloat16, float32 or float64. Contiguous
            and channels_last layouts are used as they are. An input of any other layout is copied once.
        decay: fraction of the potential that is left after a step (no unit, per step). Any value is allowed, also
            outside of [0, 1].
        v_threshold, v_rest: threshold and resting potential, in units of x_seq.
        v_reset: potential after a spike (hard reset), or None for the soft reset.
        reset_amount: amount that a spike subtracts under the soft reset; default `v_threshold`.
        width: width of the surrogate, in units of x_seq. In float32 it must be at least 1.1e-19, so that 1 / width^2 is
            finite. fast_sigmoid and arctan square u / width, and have no gradient for abs(u) > 1e19 width, where the
            square overflows. To avoid a device synchronisation, a tensor is checked only on the CPU, and not under
            torch.compile and torch.func. Where it is not checked, a width < 0 gives gradients of the wrong sign, and a
            width of 0 gives NaN.
        surrogate: rectangle, triangle, sigmoid, arctan, erf, fast_sigmoid or laplace; with `multi_spike` also
            periodic_exponential, whose slope peaks at every multiple of the threshold.
        surrogate_gain: factor on the surrogate gradient.
        analog_prob: fraction of elements that emit F(u / width) instead of a spike, in steps of 1 / 65536. Default 0;
            the default of the layer `LIF` is 0.2. A tensor of one value on x_seq's device can change without
            recompiling a compiled graph; it gets no gradient. Its range is checked only on the CPU; on a GPU values are
            clamped to [0, 1], and NaN counts as 0.
        rng_state: int64 tensor `[seed, offset]` on x_seq's device, which determines the noise. Neurons are numbered in
            memory order, so a channels_last x_seq gets other noise than its contiguous copy.
        generator: generator that draws rng_state if rng_state is not given; default the device's default generator.
            Activation checkpointing restores only the default generator, and the recomputation would draw new noise
            from any other. Give rng_state there.
        input_gain, input_bias, input_mean: the input current is `input_gain * (x_seq - input_mean) + input_bias`.
        residual: shortcut of a residual block, in shape and type of x_seq. `residual_gain * residual` is added to the
            input current, without a sum in memory. If its memory order is not that of x_seq, it is copied once.
        residual_gain: a number, only with a residual. Apply a learned factor to the residual itself.
        strict_threshold: fire at u > 0 instead of u >= 0. No effect with levels and multi_spike.
        scale_output: emit `v_threshold * s`, and with levels `s / levels`.
        detach_reset: stop the gradient that flows through the spike in the reset. Under the hard reset and with a
            rectangle, this path multiplies the gradient at each step with a spike by up to
            `decay * (v_threshold - v_reset + width / 2) / width`. If this is above 1, as for decay > 2 / 3 with the
            other defaults, gradients can explode over many steps.
        levels: emit an integer number of spikes per step (I-LIF), `round(clamp(h / v_threshold, 0, levels))` with ties
            to even; at most 256. The quotient is computed as h times the rounded `1 / v_threshold`. Analog elements are
            not rounded. The gradient is the gradient of the clamp, 1 at its edges, and the threshold acts as the width.
            Each spike subtracts `reset_amount`, so `v_reset` must be None. A NaN potential emits NaN. `unroll_levels`
            turns the output into binary spikes. With multi_spike, levels only limits the number of spikes.
        multi_spike: emit `trunc(h / v_threshold)` spikes per step where h > 0. Each spike subtracts `reset_amount`, so
            `v_reset` must be None. `v_threshold` must be > 0, and is checked like the width. `analog_prob` must be 0,
            because no smooth function that counts spikes has these surrogates as its slope.
        v_min: lower bound of the potential after the reset, in units of x_seq, `v = relu(v - v_min) + v_min`. No
            gradient flows at the bound. It does not apply to v_init.
        v_init: potential before the first step, in the shape of x_seq without time; default `v_rest`.
        return_v_last, return_v_seq, return_h_seq: return potentials as well, see `LIFOutput`.
        backend: one of `available_backends()`; default the best for x_seq's device.

    `width`, `decay`, `v_threshold`, `v_reset`, `reset_amount` and `input_*` are floats or tensors that broadcast
    against x_seq: one value, `[C, 1, 1]`, `[C, H, W]`, `[T, 1, 1, 1, 1]`, and so on. Parameters and `v_init` are
    converted to the type of the arithmetic, which is float64 for a float64 x_seq and float32 otherwise.

    A NaN potential emits no spike, and makes the gradients of parameters NaN, as in any layer that multiplies.

    Returns:
        The spikes, in shape and type of x_seq, or a `LIFOutput` if a potential was asked for. All outputs are
        differentiable once with respect to x_seq, residual, v_init and every tensor parameter.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or range. Nothing is computed then.
        RuntimeError: the requested backend does not work here.

    Example::

        x_seq = torch.randn(4, 32, 128, requires_grad=True)  # [T, B, N]
        width = torch.ones(128, requires_grad=True)  # one for each neuron
        s_seq = asgl_cuda.lif(x_seq, width=width, analog_prob=0.2)  # [4, 32, 128]
        s_seq.mean().backward()  # x_seq.grad [4, 32, 128], width.grad [128]

        output = asgl_cuda.lif(x_seq, return_v_last=True)
        more = asgl_cuda.lif(x_seq, v_init=output.v_last)  # continues from the end of the first call

    Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023.
    periodic_exponential: Weidel, Sheik: WaveSense, arXiv 2111.01456. levels: Luo, Yao, Chou, Xu, Li: Integer-Valued
    Training and Spike-Driven Inference Spiking Neural Network for High-performance and Energy-efficient Object
    Detection, ECCV 2024; analog elements there as in Quant-Noise, Fan et al., ICLR 2021.

    The same in PyTorch, for the defaults and a mask of analog elements::

        v = torch.zeros_like(x_seq[0])
        slope = 1 / torch.as_tensor(width, dtype=x_seq.dtype)
        for t in range(T):
            h = decay * v + x_seq[t]
            a = ((h - v_threshold) * slope + 0.5).clamp(0, 1)
            z = (h >= v_threshold).to(h)
            s[t] = a + torch.where(mask[t], 0, z - a).detach()
            v = h * (1 - s[t]) + v_reset * s[t]

    With levels, `a = (h * (1 / v_threshold)).clamp(0, levels)` and `z = a.round()`. With multi_spike,
    `z = (h > 0) * (h / v_threshold).trunc()`. periodic_exponential is laplace; where h >= v_threshold, the distance u
    is replaced by `v_threshold * (2 * (h / v_threshold - 0.5).remainder(1) - 1)`, with a slope of 1.
    """
    if unknown:
        check_keywords(unknown, LIF_DEFAULTS, _CALLER)
    given: Arguments = {
        "decay": decay, "v_threshold": v_threshold, "v_reset": v_reset, "reset_amount": reset_amount, "v_rest": v_rest,
        "width": width, "surrogate": surrogate, "surrogate_gain": surrogate_gain, "analog_prob": analog_prob,
        "rng_state": rng_state, "generator": generator, "input_gain": input_gain, "input_bias": input_bias,
        "input_mean": input_mean, "residual": None if residual is None else tensor_of(residual, _CALLER),
        "residual_gain": residual_gain, "strict_threshold": strict_threshold, "scale_output": scale_output,
        "detach_reset": detach_reset, "levels": levels, "multi_spike": multi_spike, "v_min": v_min, "v_init": v_init,
        "time_dim": time_dim, "return_v_last": return_v_last, "return_v_seq": return_v_seq,
        "return_h_seq": return_h_seq, "backend": backend,
    }  # fmt: skip
    return computed(_CALLER, tensor_of(x_seq, _CALLER), given)


def unroll_levels(s_seq: Tensor, levels: int, time_dim: int = 0) -> Tensor:
    """Whole numbers of spikes as binary spikes, each step in `levels` sub-steps: `s` ones, then zeros.

    A layer without a bias gives the same result, summed over the sub-steps of each step, for these spikes as for the
    numbers: inference of a network trained with `levels` then needs only additions, and no products.

    Args:
        s_seq: `[T, ...]` (or time at `time_dim`), whole numbers in [0, levels], as `asgl_cuda.lif` emits with levels
            and without noise.
        levels: number of sub-steps, as in `asgl_cuda.lif`.

    Returns:
        `[T * levels, ...]` of zeros and ones, in the type of s_seq. Not differentiable.

    Raises:
        ValueError: s_seq has a value that is not a whole number in [0, levels]. The check synchronises the device, and
            is omitted in compiled code and for tensors without values.

    Example::

        s_seq = asgl_cuda.lif(4 * torch.rand(2, 32, 64), levels=4, v_reset=None)  # [T, B, N]
        weight = torch.randn(10, 64)
        sums = (asgl_cuda.unroll_levels(s_seq, 4) @ weight.T).unflatten(0, (2, 4)).sum(1)
        torch.testing.assert_close(sums, s_seq @ weight.T)

    Source: Luo et al., ECCV 2024, as in `asgl_cuda.lif`.
    """
    caller = "asgl_cuda.unroll_levels"
    time_dim = check_input(s_seq, time_dim, caller, "s_seq")
    if levels is None:
        raise ValueError(f"{caller}: levels must be an int, got None")
    levels = check_levels("levels", levels, caller)
    with torch.no_grad():
        has_values = type(s_seq) in PLAIN_TENSORS and not s_seq.is_meta
        if has_values and not torch.compiler.is_compiling() and not transforming():
            others = s_seq[~((s_seq == s_seq.round()) & (s_seq >= 0) & (s_seq <= levels))]
            if others.numel():
                raise ValueError(
                    f"{caller}: s_seq must have whole numbers in [0, {levels}], got {others[0].item():g}; spikes are "
                    "whole in evaluation or with analog_prob=0, without scale_output"
                )
        below = torch.arange(levels, device=s_seq.device)[(slice(None), *(None,) * (s_seq.dim() - time_dim - 1))]
        return (s_seq.unsqueeze(time_dim + 1) > below).to(s_seq.dtype).flatten(time_dim, time_dim + 1)


LIF_DEFAULTS: Arguments = lif.__kwdefaults__ or {}  # type: ignore[assignment]


def analog_mask(x_seq: Tensor, analog_prob: float, rng_state: Tensor, time_dim: int = 0) -> Tensor:
    """Which elements of `x_seq` are analog under the noise of `rng_state`: a bool tensor of x_seq's shape.

    Only shape, memory layout and device of x_seq count; `analog_prob` acts in steps of 1 / 65536. Raises TypeError and
    ValueError as `lif` does.

    Example::

        x_seq, rng_state = torch.randn(4, 32, 128), torch.tensor([2023, 0])
        s_seq = asgl_cuda.lif(x_seq, analog_prob=0.2, rng_state=rng_state)
        mask = asgl_cuda.analog_mask(x_seq, 0.2, rng_state)  # those that emitted the smooth value
        assert set(s_seq[~mask].tolist()) == {0.0, 1.0}
    """
    time_dim = check_input(x_seq, time_dim, "asgl_cuda.analog_mask")
    check_rng_state(rng_state, x_seq, "asgl_cuda.analog_mask")
    return analog_mask_below(x_seq, check_analog_prob(analog_prob, "asgl_cuda.analog_mask"), rng_state, time_dim)
