"""Inputs of batch_norm_lif by name, and its comparison with the reference."""

import torch
from comparison import real_of, rng_state, uniform

from asgl_cuda import batch_norm_lif
from asgl_cuda.layout import is_channels_last
from asgl_cuda.selfcheck import THRESHOLD_BAND

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Relative tolerances of sums in float64, or in float32 for up to 64 terms and then in float64.
SUMS = {torch.float64: 1e-12}
SAME = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

# Shape and time_dim by name. A channel is stored in runs of 35, 1, 1024, 9, 4, 23, 2 and 1 values.
SHAPES = {
    "images": ((5, 2, 3, 5, 7), 0),
    "vectors": ((3, 40, 21), 0),
    "large": ((4, 2, 3, 32, 32), 0),
    "batch first": ((3, 6, 5, 3, 3), 1),
    "time last": ((4, 6, 4), 2),
    "long": ((33, 1, 2, 23), 0),
    "many channels": ((2, 2, 700, 2), 0),
    "many rows": ((4, 700, 3), 0),
}


def channels_last(x_seq, time_dim):
    channel = 2 if time_dim <= 1 else 1
    return x_seq.movedim(channel, -1).contiguous().movedim(-1, channel)


def make(name, dtype, device, layout="contiguous", mean=0.3, deviation=0.8):
    """x_seq, time_dim, and the arguments by channel."""
    shape, time_dim = SHAPES[name]
    x_seq = (torch.randn(shape, dtype=torch.float64) * deviation + mean).to(device, dtype)
    if layout == "channels_last":
        x_seq = channels_last(x_seq, time_dim)
    elif layout == "sliced":
        x_seq = torch.stack([x_seq, -x_seq], dim=-1)[..., 0]
    channels = shape[2 if time_dim <= 1 else 1]
    real = real_of(dtype)
    arguments = {
        "weight": uniform(channels, low=0.5, high=1.5, dtype=real, device=device),
        "bias": uniform(channels, low=-0.5, high=1.0, dtype=real, device=device),
        "running_mean": uniform(channels, low=-0.5, high=0.5, dtype=real, device=device).detach(),
        "running_var": uniform(channels, low=0.5, high=1.5, dtype=real, device=device).detach(),
    }
    return x_seq, time_dim, arguments


def differentiated(function, x_seq, leaves, keep, arguments, **options):
    """Outputs and gradients of a function of x_seq; the incoming gradients are 0 where `keep` is."""
    x_seq = x_seq.detach().requires_grad_()
    running = {name: arguments[name].clone() for name in ("running_mean", "running_var") if name in arguments}
    output = function(x_seq, **{**arguments, **running}, **options)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(output.s_seq.shape, generator=generator).to(output.s_seq) * keep
    grads = torch.autograd.grad(output.s_seq, [x_seq, *leaves.values()], grad)
    named = zip(["x_seq", *leaves], grads, strict=True)
    return output, {**{f"grad_{name}": value for name, value in named}, **running}


def relative(actual, expected):
    """The largest difference as a share of the largest value; NaN equals NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (actual - expected).abs().nan_to_num(nan=float("inf")))
    size = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.ones(())
    return float(gap.max() / size.clamp(min=1e-30)) if gap.numel() else 0.0


def far_from_threshold(h_seq, v_threshold, time_dim, band=THRESHOLD_BAND):
    """Neurons in which no rounding can flip a spike."""
    near = ((h_seq.detach() - v_threshold).abs() < band).any(dim=time_dim, keepdim=True)
    return (~near).expand_as(h_seq)


def assert_same(x_seq, time_dim, arguments, backend, other="reference", sums=1e-5, same=None, **options):
    """`backend` against `other`, a backend or a function, in outputs, gradients and running statistics."""
    dtype = x_seq.dtype
    leaves = {name: value for name, value in {**arguments, **options}.items() if getattr(value, "requires_grad", False)}
    options = {"time_dim": time_dim, "rng_state": rng_state(device=x_seq.device), "return_h_seq": True, **options}

    def by(name):
        if callable(name):
            return name
        return lambda x, **others: batch_norm_lif(x, **others, backend=name)

    every = torch.ones((), device=x_seq.device)
    expected, _ = differentiated(by(other), x_seq, leaves, every, arguments, **options)
    v_threshold = options.get("v_threshold", 1.0)
    keep = far_from_threshold(expected.h_seq, v_threshold, time_dim % x_seq.dim())
    assert keep.float().mean() > 0.9
    expected, expected_grads = differentiated(by(other), x_seq, leaves, keep, arguments, **options)
    actual, actual_grads = differentiated(by(backend), x_seq, leaves, keep, arguments, **options)
    same = SAME[dtype] if same is None else same
    assert relative(actual.s_seq * keep, expected.s_seq * keep) <= same
    assert relative(actual.h_seq * keep, expected.h_seq * keep) <= max(
        SAME[real_of(dtype)], same if callable(other) else 0
    )
    if x_seq.is_contiguous() or is_channels_last(x_seq, time_dim % x_seq.dim()):
        assert actual.s_seq.stride() == x_seq.stride()
    for name, value in expected_grads.items():
        sized = name in ("grad_x_seq", "grad_residual") and dtype in (torch.float16, torch.bfloat16)
        allowed = 4 * SAME[dtype] if sized else SUMS.get(dtype, sums)
        assert relative(actual_grads[name], value) <= allowed, name
