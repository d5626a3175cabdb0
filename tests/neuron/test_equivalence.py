"""Every fused backend against the reference: outputs and gradients over products of options."""

import pytest
import torch
from comparison import assert_equals_reference, random_input, real_of, rng_state, uniform

import asgl_cuda
from asgl_cuda.surrogate import SURROGATES

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEPS = (1, 2, 4, 5, 16, 17, 33, 100)
NEURONS = (1, 7, 31, 257, 4096)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("neurons", NEURONS)
@pytest.mark.parametrize("v_reset", [0.1, None])
def test_sizes(backend, device, steps, neurons, v_reset):
    if steps * neurons > 150_000 and v_reset is None:
        pytest.skip("the largest size is run once")
    x_seq = random_input(steps, neurons, device=device)
    width = uniform(low=0.5, high=1.5, device=device)
    assert_equals_reference(
        x_seq, backend, width=width, v_reset=v_reset, analog_prob=0.2, rng_state=rng_state(device=device)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("v_reset", [0.1, None])
@pytest.mark.parametrize("steps", [3, 4, 7, 18, 35])
@pytest.mark.parametrize("neurons", [(4, 68), (5, 33)])
def test_nothing_but_spikes(backend, device, dtype, surrogate, v_reset, steps, neurons):
    """The common case in networks, served by the leanest kernels."""
    real = real_of(dtype)
    for options in (
        {"analog_prob": 0.3},
        {"analog_prob": 0.0, "detach_reset": True, "strict_threshold": True, "surrogate_gain": 1.7},
        {"analog_prob": 1.0, "v_init": uniform(*neurons, low=-1, high=1, dtype=real, device=device)},
    ):
        assert_equals_reference(
            random_input(steps, *neurons, dtype=dtype, device=device), backend,
            outputs=("s_seq", "v_last") if "v_init" in options else ("s_seq",), surrogate=surrogate,
            width=uniform(low=0.7, high=1.5, dtype=real, device=device), decay=0.6, v_threshold=0.9, v_reset=v_reset,
            rng_state=rng_state(device=device), **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("v_reset", [0.1, None])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_neuron(backend, device, dtype, surrogate, v_reset, detach_reset):
    real = real_of(dtype)
    assert_equals_reference(
        random_input(18, 5, 33, dtype=dtype, device=device), backend, surrogate=surrogate,
        width=uniform(low=0.7, high=1.5, dtype=real, device=device),
        decay=uniform(low=0.4, high=0.9, dtype=real, device=device),
        v_threshold=uniform(low=0.8, high=1.2, dtype=real, device=device), v_reset=v_reset, detach_reset=detach_reset,
        analog_prob=0.3, rng_state=rng_state(device=device),
    )  # fmt: skip


@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
@pytest.mark.parametrize("v_reset", [-0.2, None])
@pytest.mark.parametrize("strict_threshold", [False, True])
@pytest.mark.parametrize("scale_output", [False, True])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("analog_prob", [0.0, 0.5, 1.0])
def test_options(backend, device, surrogate, v_reset, strict_threshold, scale_output, detach_reset, analog_prob):
    steps, batch, channels = 6, 3, 10
    reset_amount = uniform(low=0.5, high=1.5, device=device) if v_reset is None else None
    assert_equals_reference(
        random_input(steps, batch, channels, device=device), backend, surrogate=surrogate, surrogate_gain=1.7,
        v_reset=v_reset, reset_amount=reset_amount, strict_threshold=strict_threshold, scale_output=scale_output,
        detach_reset=detach_reset, analog_prob=analog_prob, v_rest=0.25,
        v_init=uniform(batch, channels, low=-1, high=1, device=device), width=uniform(low=0.7, high=1.5, device=device),
        v_threshold=uniform(channels, low=0.8, high=1.2, device=device),
        input_gain=uniform(channels, low=0.8, high=1.2, device=device),
        input_bias=uniform(channels, low=-0.1, high=0.1, device=device),
        input_mean=uniform(channels, low=-0.1, high=0.1, device=device), rng_state=rng_state(device=device),
    )  # fmt: skip


SHAPES = {
    "scalar": (),
    "one": (1,),
    "channel": (8, 1, 1),
    "neuron": (8, 3, 5),
    "row": (5,),
    "gap": (8, 1, 5),
    "batch": (6, 1, 1, 1),
    "step": (19, 1, 1, 1, 1),
    "step and channel": (19, 1, 8, 1, 1),
    "all": (19, 6, 8, 3, 5),
}


@pytest.mark.parametrize("layout", ["time first", "batch first", "channels last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("v_reset", ["tensor", None])
def test_parameter_shapes(backend, device, layout, shape, v_reset):
    """All parameters are tensors of one shape, and so are the parameters' gradients."""
    sizes = SHAPES[shape]
    x_seq = random_input(19, 6, 8, 3, 5, device=device)
    time_dim = 0
    if layout == "batch first":
        time_dim = 1
        x_seq = x_seq.detach().transpose(0, 1).contiguous().requires_grad_()
        if len(sizes) == 5:
            sizes = (sizes[1], sizes[0], *sizes[2:])
        elif len(sizes) == 4:
            sizes = (6, 1, 1, 1, 1)
    elif layout == "channels last":
        x_seq = x_seq.detach().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3).requires_grad_()

    def parameter(low, high):
        return uniform(*sizes, low=low, high=high, device=device)

    reset = {"v_reset": parameter(-0.2, 0.2)} if v_reset else {"v_reset": None, "reset_amount": parameter(0.8, 1.2)}
    assert_equals_reference(
        x_seq, backend, width=parameter(0.5, 1.5), decay=parameter(0.4, 0.9), v_threshold=parameter(0.8, 1.2), **reset,
        input_gain=parameter(0.8, 1.2), input_bias=parameter(-0.1, 0.1), input_mean=parameter(-0.1, 0.1),
        analog_prob=0.2, time_dim=time_dim, rng_state=rng_state(device=device),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["width", "decay", "v_threshold", "v_reset", "input_gain", "input_bias", "input_mean"])
@pytest.mark.parametrize("sizes", [(), (33,), (17, 1, 1)])
def test_one_parameter_at_a_time(backend, device, name, sizes):
    """A single tensor, so that no other parameter's accumulator or row hides a missing one."""
    middle = {"decay": 0.5, "v_reset": 0.1, "input_bias": 0.0, "input_mean": 0.0}.get(name, 1.0)
    value = uniform(*sizes, low=middle - 0.1, high=middle + 0.1, device=device)
    for scale_output in (False, True):
        assert_equals_reference(
            random_input(17, 4, 33, device=device), backend, **{name: value}, scale_output=scale_output,
            analog_prob=0.2, rng_state=rng_state(device=device),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["width", "decay", "v_threshold", "reset_amount", "input_gain"])
def test_large_parameter_sums(backend, device, name):
    """Sums over many tiles, by layer, channel and neuron, within 1e-5 of the reference's float64 sum."""
    middle = {"width": 1.0, "decay": 0.5, "v_threshold": 1.0, "reset_amount": 1.0, "input_gain": 1.0}[name]
    reset = {"v_reset": None} if name == "reset_amount" else {}
    for sizes in ((), (16, 1), (16, 700)):
        assert_equals_reference(
            random_input(4, 3, 16, 700, device=device), backend, **reset,
            **{name: uniform(*sizes, low=middle, high=middle + 0.1, device=device)},
            analog_prob=0.2, rng_state=rng_state(device=device),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
def test_half_types_are_as_good_as_pytorch(backend, device, dtype, surrogate):
    """Against float32 throughout, the error is at most twice the error of a plain loop in the half type."""
    x_seq = random_input(4, 4096, dtype=dtype, device=device)
    exact_input = x_seq.detach().float().requires_grad_()

    def half_loop(x):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            h = 0.5 * v + x[t]
            u = h - 1.0
            a = asgl_cuda.surrogate.SURROGATES[surrogate].cumulative(u)
            out.append(a)
            v = h * (1 - a)
        return torch.stack(out)

    grad = torch.randn(4, 4096).to(device, dtype)

    def error(function, x):
        out = function(x)
        (dx,) = torch.autograd.grad(out, x, grad.to(out.dtype))
        return (out.float() - exact).abs().mean(), (dx.float() - exact_dx).abs().mean()

    exact = asgl_cuda.lif(exact_input, surrogate=surrogate, analog_prob=1.0, backend=backend)
    (exact_dx,) = torch.autograd.grad(exact, exact_input, grad.float())
    ours = error(lambda x: asgl_cuda.lif(x, surrogate=surrogate, analog_prob=1.0, backend=backend), x_seq)
    plain = error(half_loop, x_seq)
    for our, their in zip(ours, plain, strict=True):
        assert our <= 2 * their + 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_nan_and_infinity_go_through(backend, device, value, surrogate, v_reset):
    """Placed in the first, a middle and the last step: both passes have NaN where the reference has it."""
    for step in (0, 2, 5):
        x_seq = random_input(6, 24, device=device)
        with torch.no_grad():
            x_seq[step, ::3] = value
        for analog_prob in (0.0, 0.5, 1.0):
            for returned in ({}, {"return_v_last": True, "return_v_seq": True, "return_h_seq": True}):
                options = {"surrogate": surrogate, "v_reset": v_reset, "analog_prob": analog_prob, **returned,
                           "rng_state": rng_state(device=device)}  # fmt: skip
                results = []
                for name in (backend, "reference"):
                    out = asgl_cuda.lif(x_seq, **options, backend=name)
                    outputs = list(out) if returned else [out]
                    grads = [torch.ones_like(output) for output in outputs]
                    results.append((*outputs, *torch.autograd.grad(outputs, x_seq, grads)))
                for ours, theirs in zip(*results, strict=True):
                    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_neurons(backend, device, dtype):
    for shape, time_dim in (((3, 0), 0), ((0, 3), 1), ((3, 2, 0, 4), 0)):
        x_seq = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
        width = torch.ones((), device=device, dtype=real_of(dtype), requires_grad=True)
        out = asgl_cuda.lif(
            x_seq, width=width, analog_prob=0.2, time_dim=time_dim, return_v_last=True, return_v_seq=True,
            return_h_seq=True, backend=backend,
        )  # fmt: skip
        assert out.s_seq.shape == out.v_seq.shape == out.h_seq.shape == x_seq.shape
        assert out.v_last.numel() == 0
        dx, dwidth = torch.autograd.grad(out.s_seq.sum() + out.v_last.sum(), (x_seq, width))
        assert dx.shape == x_seq.shape
        assert dwidth == 0
    x_seq = torch.empty(3, 0, dtype=dtype, device=device)
    assert asgl_cuda.lif(x_seq, width=torch.ones(0, device=device), backend=backend).shape == (3, 0)


def test_same_bits_for_every_number_of_threads(backend, device):
    x_seq = random_input(20, 3, 16, 701, device=device)
    width = uniform(16, 1, low=0.5, high=1.5, device=device)
    grad = torch.randn(x_seq.shape, device=device)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            s_seq = asgl_cuda.lif(
                x_seq, width=width, analog_prob=0.2, rng_state=rng_state(device=device), backend=backend
            )
            results.append((s_seq, *torch.autograd.grad(s_seq, (x_seq, width), grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_number_of_threads_is_honoured():
    extension = asgl_cuda.extension.module
    if extension is None:
        pytest.skip("no compiled extension")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert extension.cpu_threads() == threads
    finally:
        torch.set_num_threads(before)
