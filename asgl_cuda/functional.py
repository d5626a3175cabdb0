"""The fused neuron as a function: checks, autograd wiring, `lif` and `analog_mask`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS, choose_backend
from .reference import NeuronOptions, analog_mask_below, is_channels_last, lif_reference, real_type
from .surrogate import SURROGATES

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DRAWS = 65536  # noise is compared in steps of 1 / 65536


class LIFOutput(NamedTuple):
    """What `lif` returns when more than the spikes is asked for; None where not asked for.

    `s_seq`, `v_seq` (potential after reset) and `h_seq` (before reset) have the shape of x_seq, `v_last` that without
    time. Potentials are float32, float64 for a float64 input.
    """

    s_seq: Tensor
    v_last: Tensor | None
    v_seq: Tensor | None
    h_seq: Tensor | None


class LIFFunction(torch.autograd.Function):
    """The fused operators of one backend as a differentiable function of x_seq, v_init and the six parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        options: NeuronOptions,
        constants: tuple[float, ...],
        wanted: tuple[bool, bool, bool],
        x_seq: Tensor,
        v_init: Tensor | None,
        rng_state: Tensor | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *outputs, checkpoints = _forward(backend, options, constants, wanted, x_seq, v_init, rng_state, parameters, True)
        ctx.save_for_backward(x_seq, v_init, rng_state, checkpoints, *parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output for output, asked in zip(outputs[1:], wanted, strict=True) if not asked))
        ctx.backend, ctx.options, ctx.constants, ctx.wanted = backend, options, constants, wanted
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x_seq, v_init, rng_state, checkpoints, *parameters = ctx.saved_tensors
        needs_x_seq, needs_v_init, _, *needs_parameters = ctx.needs_input_grad[4:]
        # A compiled graph passes empty gradients for the empty outputs.
        grads = tuple(grad if asked else None for grad, asked in zip(grads, (True, *ctx.wanted), strict=True))
        options = ctx.options
        operators = BACKENDS[ctx.backend].operators
        grad_x_seq, grad_v_init, grad_parameters = operators.lif_backward(
            *grads, x_seq, v_init, rng_state, checkpoints, parameters, ctx.constants, options.surrogate.id,
            options.surrogate_gain, options.v_rest, options.hard_reset, options.strict_threshold, options.scale_output,
            options.detach_reset, options.analog_below, options.time_dim, needs_x_seq, needs_v_init, needs_parameters,
        )  # fmt: skip
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = (x_seq, v_init, *parameters, *grads)
            grad_x_seq, grad_v_init, *grad_parameters = _OnceDifferentiable.apply(
                2 + len(parameters), grad_x_seq, grad_v_init, *grad_parameters, *inputs
            )
        return (
            *(None,) * 4,
            grad_x_seq if needs_x_seq else None,
            grad_v_init if needs_v_init else None,
            None,
            *(grad if needed else None for grad, needed in zip(grad_parameters, needs_parameters, strict=True)),
        )


class _OnceDifferentiable(torch.autograd.Function):
    """The first `count` tensors unchanged, as functions of the others that can't be differentiated.

    torch's own once_differentiable cuts the graph where only the inputs, not the incoming gradients, require one: a
    gradient penalty would then train on without its penalty.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(
            "asgl_cuda.lif: a second derivative was asked for, and the fused backends have only the first; "
            "backend='reference' has all"
        )


def _forward(
    backend: str,
    options: NeuronOptions,
    constants: tuple[float, ...],
    wanted: tuple[bool, bool, bool],
    x_seq: Tensor,
    v_init: Tensor | None,
    rng_state: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    keep_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return BACKENDS[backend].operators.lif_forward(
        x_seq, v_init, rng_state, parameters, constants, options.surrogate.id, options.surrogate_gain, options.v_rest,
        options.hard_reset, options.strict_threshold, options.scale_output, options.analog_below, options.time_dim,
        *wanted, keep_checkpoints,
    )  # fmt: skip


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
    analog_prob: float = 0.0,
    rng_state: Tensor | None = None,
    generator: torch.Generator | None = None,
    v_rest: float = 0.0,
    input_gain: Tensor | float = 1.0,
    input_bias: Tensor | float = 0.0,
    strict_threshold: bool = False,
    scale_output: bool = False,
    detach_reset: bool = False,
    v_init: Tensor | None = None,
    time_dim: int = 0,
    return_v_last: bool = False,
    return_v_seq: bool = False,
    return_h_seq: bool = False,
    backend: str | None = None,
) -> Tensor | LIFOutput:
    """Leaky integrate-and-fire neurons over a whole sequence, with the noise and the learned width of ASGL.

    Args:
        x_seq: input current, `[T, ...]` (or time at `time_dim`), float16, bfloat16, float32 or float64. Contiguous and
            channels_last layouts are used as they are, any other is copied once.
        decay: share of the potential that is left after a step (no unit, per step).
        v_threshold, v_rest: threshold and resting potential, in units of x_seq.
        v_reset: potential after a spike (hard reset), or None for the soft reset.
        reset_amount: what a spike takes off the potential under the soft reset; default `v_threshold`.
        width: width of the surrogate, in units of x_seq.
        surrogate: rectangle, triangle, sigmoid, arctan, erf, fast_sigmoid or laplace.
        surrogate_gain: factor on the surrogate gradient.
        analog_prob: share of elements and steps that emit F(u / width) instead of a spike, in steps of 1 / 65536.
        rng_state: int64 `[seed, offset]` on x_seq's device, which fixes the noise. By default drawn from `generator`, or
            from the default generator of the device. Neurons are counted in memory order: a channels_last x_seq gets
            other noise than its contiguous copy.
        input_gain, input_bias: the input current is `input_gain * x_seq + input_bias`.
        strict_threshold: fire at u > 0 instead of u >= 0.
        scale_output: emit `v_threshold * s`.
        detach_reset: let no gradient flow through the spike inside the reset.
        v_init: potential before the first step, shape of x_seq without time; default `v_rest`.
        return_v_last, return_v_seq, return_h_seq: return potentials as well, see `LIFOutput`.
        backend: one of `available_backends()`; default the best for x_seq's device.

    `width`, `decay`, `v_threshold`, `v_reset`, `reset_amount`, `input_gain` and `input_bias` are floats or tensors that
    broadcast against x_seq: one value, `[C, 1, 1]`, `[C, H, W]`, `[T, 1, 1, 1, 1]`, and so on. They and `v_init` are
    converted to the type of the arithmetic: float32, or float64 for a float64 x_seq.

    Returns:
        The spikes, in shape and type of x_seq; or a `LIFOutput` as soon as a potential is asked for. All are
        differentiable once with respect to x_seq, v_init and every parameter that is a tensor.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; nothing has been computed then.
        RuntimeError: the backend asked for does not work here.

    Source: Wang, Jiang, Lian, Yan, Tang: Adaptive Smoothing Gradient Learning for Spiking Neural Networks, ICML 2023.

    The same in PyTorch, for the defaults and a mask of analog elements::

        v = torch.zeros_like(x_seq[0])
        for t in range(T):
            h = decay * v + x_seq[t]
            a = ((h - v_threshold) / width + 0.5).clamp(0, 1)
            z = (h >= v_threshold).to(h)
            s[t] = a + torch.where(mask[t], 0, z - a).detach()
            v = h * (1 - s[t]) + v_reset * s[t]
    """
    time_dim = _check_input(x_seq, time_dim, "asgl_cuda.lif")
    if surrogate not in SURROGATES:
        raise ValueError(f"asgl_cuda.lif: surrogate must be one of {', '.join(SURROGATES)}, got {surrogate!r}")
    if reset_amount is not None and v_reset is not None:
        raise ValueError("asgl_cuda.lif: reset_amount is for the soft reset and needs v_reset=None, got v_reset and reset_amount")
    real = real_type(x_seq.dtype)
    reset = v_reset if v_reset is not None else v_threshold if reset_amount is None else reset_amount
    named = (
        ("width", width),
        ("decay", decay),
        ("v_threshold", v_threshold),
        ("v_reset" if v_reset is not None else "reset_amount", reset),
        ("input_gain", input_gain),
        ("input_bias", input_bias),
    )
    constants = []
    parameters: list[Tensor | None] = []
    for name, value in named:
        if isinstance(value, Tensor):
            _check_parameter(name, value, x_seq)
            constants.append(0.0)
            parameters.append(value.to(real))
        else:
            constants.append(_check_float(name, value))
            parameters.append(None)
    if parameters[0] is None and not constants[0] > 0:
        raise ValueError(f"asgl_cuda.lif: width must be > 0, got {constants[0]}")
    if v_init is not None:
        _check_v_init(v_init, x_seq, time_dim)
        v_init = v_init.to(real)
    options = NeuronOptions(
        SURROGATES[surrogate],
        _check_float("surrogate_gain", surrogate_gain),
        _check_float("v_rest", v_rest),
        v_reset is not None,
        strict_threshold,
        scale_output,
        detach_reset,
        _check_analog_prob(analog_prob, "asgl_cuda.lif"),
        time_dim,
    )
    backend = choose_backend(backend, x_seq.device, "asgl_cuda.lif")
    if rng_state is not None:
        _check_rng_state(rng_state, x_seq, "asgl_cuda.lif")
        if generator is not None:
            raise ValueError("asgl_cuda.lif: rng_state and generator exclude each other, got both")
    if not x_seq.is_contiguous() and not is_channels_last(x_seq, time_dim):
        x_seq = x_seq.contiguous()
    if 0 < options.analog_below < _DRAWS:
        rng_state = _draw_rng_state(x_seq, generator, backend) if rng_state is None else rng_state.contiguous()
    else:
        rng_state = None

    wanted = (return_v_last, return_v_seq, return_h_seq)
    if BACKENDS[backend].operators is None:
        values = [constant if tensor is None else tensor for constant, tensor in zip(constants, parameters, strict=True)]
        outputs = lif_reference(x_seq, v_init, rng_state, values, options)
    elif torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_seq, v_init, *parameters)
    ):
        outputs = LIFFunction.apply(backend, options, tuple(constants), wanted, x_seq, v_init, rng_state, *parameters)
    else:
        *outputs, _ = _forward(
            backend, options, tuple(constants), wanted, x_seq, v_init, rng_state, tuple(parameters), False
        )
    if not any(wanted):
        return outputs[0]
    return LIFOutput(outputs[0], *(output if asked else None for output, asked in zip(outputs[1:], wanted, strict=True)))


def analog_mask(x_seq: Tensor, analog_prob: float, rng_state: Tensor, time_dim: int = 0) -> Tensor:
    """Which elements of `x_seq` are analog under the noise of `rng_state`: a bool tensor of x_seq's shape.

    Only shape, memory layout and device of x_seq count; `analog_prob` acts in steps of 1 / 65536. Raises TypeError and
    ValueError as `lif` does.
    """
    time_dim = _check_input(x_seq, time_dim, "asgl_cuda.analog_mask")
    _check_rng_state(rng_state, x_seq, "asgl_cuda.analog_mask")
    return analog_mask_below(x_seq, _check_analog_prob(analog_prob, "asgl_cuda.analog_mask"), rng_state, time_dim)


def _draw_rng_state(x_seq: Tensor, generator: torch.Generator | None, backend: str) -> Tensor:
    operators = BACKENDS[backend].operators
    if generator is None and operators is not None:
        return operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device=x_seq.device))
    return torch.randint(2**63 - 1, (2,), generator=generator, device=x_seq.device)


def _check_input(x_seq: Tensor, time_dim: int, caller: str) -> int:
    if not isinstance(x_seq, Tensor):
        raise TypeError(f"{caller}: x_seq must be a tensor, got {type(x_seq).__name__}")
    if x_seq.dtype not in _TYPES:
        raise TypeError(f"{caller}: x_seq must be float16, bfloat16, float32 or float64, got {x_seq.dtype}")
    dims = x_seq.dim()
    if dims < 1:
        raise ValueError(f"{caller}: x_seq must have at least one dimension, got a scalar")
    if isinstance(time_dim, bool) or not isinstance(time_dim, int):
        raise TypeError(f"{caller}: time_dim must be an int, got {type(time_dim).__name__}")
    if not -dims <= time_dim < dims:
        raise ValueError(f"{caller}: time_dim must be in [{-dims}, {dims - 1}] for x_seq of shape {list(x_seq.shape)}, got {time_dim}")
    time_dim %= dims
    if x_seq.shape[time_dim] == 0:
        raise ValueError(f"{caller}: x_seq must have at least one time step, got shape {list(x_seq.shape)} with time_dim {time_dim}")
    return time_dim


def _check_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"asgl_cuda.lif: {name} must be a float or a tensor, got {type(value).__name__}")
    return float(value)


def _check_parameter(name: str, value: Tensor, x_seq: Tensor) -> None:
    if value.dtype not in _TYPES:
        raise TypeError(f"asgl_cuda.lif: {name} must be of a floating type, got {value.dtype}")
    if value.device != x_seq.device:
        raise ValueError(f"asgl_cuda.lif: {name} must be on {x_seq.device} as x_seq, got {value.device}")
    extra = x_seq.dim() - value.dim()
    if extra < 0 or any(size != 1 and size != x_seq.shape[extra + dim] for dim, size in enumerate(value.shape)):
        raise ValueError(
            f"asgl_cuda.lif: {name} must broadcast against x_seq of shape {list(x_seq.shape)}, got shape {list(value.shape)}"
        )


def _check_v_init(v_init: Tensor, x_seq: Tensor, time_dim: int) -> None:
    if not isinstance(v_init, Tensor):
        raise TypeError(f"asgl_cuda.lif: v_init must be a tensor, got {type(v_init).__name__}")
    if v_init.dtype not in _TYPES:
        raise TypeError(f"asgl_cuda.lif: v_init must be of a floating type, got {v_init.dtype}")
    shape = [size for dim, size in enumerate(x_seq.shape) if dim != time_dim]
    if list(v_init.shape) != shape:
        raise ValueError(f"asgl_cuda.lif: v_init must have shape {shape}, got {list(v_init.shape)}")
    if v_init.device != x_seq.device:
        raise ValueError(f"asgl_cuda.lif: v_init must be on {x_seq.device} as x_seq, got {v_init.device}")


def _check_analog_prob(analog_prob: float, caller: str) -> int:
    """round(analog_prob * 65536), the number that draws are compared with."""
    if isinstance(analog_prob, bool) or not isinstance(analog_prob, (float, int)):
        raise TypeError(f"{caller}: analog_prob must be a float, got {type(analog_prob).__name__}")
    if math.isnan(analog_prob) or not 0 <= analog_prob <= 1:
        raise ValueError(f"{caller}: analog_prob must be in [0, 1], got {analog_prob}")
    return round(analog_prob * _DRAWS)


def _check_rng_state(rng_state: Tensor, x_seq: Tensor, caller: str) -> None:
    if not isinstance(rng_state, Tensor):
        raise TypeError(f"{caller}: rng_state must be an int64 tensor, got {type(rng_state).__name__}")
    if rng_state.dtype != torch.int64:
        raise TypeError(f"{caller}: rng_state must be of type torch.int64, got {rng_state.dtype}")
    if rng_state.shape != (2,):
        raise ValueError(f"{caller}: rng_state must have shape [2], got {list(rng_state.shape)}")
    if rng_state.device != x_seq.device:
        raise ValueError(f"{caller}: rng_state must be on {x_seq.device} as x_seq, got {rng_state.device}")
