"""Spikes and gradients of plain neurons, beside the questions to all features: finite differences, sums, half types."""

import pytest
import torch
from comparison import assert_equals_reference, random_input, rng_state, uniform

import asgl_cuda
from asgl_cuda.reference.surrogates import SURROGATES

DOUBLE = torch.float64


def double(*shape, low, high, device):
    return uniform(*shape, low=low, high=high, dtype=DOUBLE, device=device)


def residual_frozen_loop(x_seq, residual, surrogate, hard, width, decay, v_threshold, reset):
    """The neuron with s = F(u / width) + residual, a smooth function whose gradient the kernels claim to compute."""
    v, out = torch.zeros_like(x_seq[0]), []
    for t in range(x_seq.shape[0]):
        h = decay * v + x_seq[t]
        s = SURROGATES[surrogate].cumulative((h - v_threshold) / width) + residual[t]
        v = h * (1 - s) + reset * s if hard else h - reset * s
        out.append(s)
    return torch.stack(out)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("analog_prob", [0.0, 0.4])
def test_finite_differences_with_frozen_residual(backend, device, surrogate, hard, analog_prob):
    """Hard spikes are a constant plus F: with that constant held, central differences must give the gradient."""
    steps, neurons = 6, 40
    x_seq = double(steps, neurons, low=-1, high=2, device=device)
    parameters = [
        double(low=0.8, high=1.5, device=device),
        double(low=0.4, high=0.9, device=device),
        double(neurons, low=0.8, high=1.2, device=device),
        double(low=0.1, high=0.3, device=device),
    ]
    names = ("width", "decay", "v_threshold", "v_reset" if hard else "reset_amount")
    options = dict(zip(names, parameters, strict=True)) | ({} if hard else {"v_reset": None})
    out = asgl_cuda.lif(
        x_seq, **options, surrogate=surrogate, analog_prob=analog_prob, rng_state=rng_state(device=device),
        return_h_seq=True, backend=backend,
    )  # fmt: skip
    weights = torch.randn(steps, neurons, dtype=DOUBLE).to(device)
    grads = torch.autograd.grad(out.s_seq, [x_seq, *parameters], weights)
    leaves = [leaf.detach() for leaf in (x_seq, *parameters)]
    width, _, v_threshold, _ = leaves[1:]
    residual = (out.s_seq - SURROGATES[surrogate].cumulative((out.h_seq - v_threshold) / width)).detach()

    def loss(values):
        return (residual_frozen_loop(values[0], residual, surrogate, hard, *values[1:]) * weights).sum()

    step = 1e-6
    for _ in range(3):
        directions = [torch.randn_like(leaf) for leaf in leaves]
        ahead = loss([leaf + step * d for leaf, d in zip(leaves, directions, strict=True)])
        behind = loss([leaf - step * d for leaf, d in zip(leaves, directions, strict=True)])
        slope = ((ahead - behind) / (2 * step)).item()
        expected = sum((grad * d).sum().item() for grad, d in zip(grads, directions, strict=True))
        # Central differences leave step^2 and roundings / step: 1e-7 of sums of some hundred terms.
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-38, 1e-42])
def test_small_gradients_of_the_triangle(backend, device, size):
    """The bits of autograd's gradients; if subnormal, within a few times the smallest subnormal."""
    x_seq = random_input(4, 1000, device=device)
    grad = torch.rand(x_seq.shape, device=device) * size

    def dx(name):
        s_seq = asgl_cuda.lif(x_seq, surrogate="triangle", backend=name)
        return torch.autograd.grad(s_seq, x_seq, grad)[0].double()

    assert (dx(backend) - dx("reference")).abs().max() <= (0.0 if size >= 1e-30 else 8 * 2.0**-149)


def test_reference_has_second_derivatives():
    x_seq = uniform(3, 4, low=-1, high=2, dtype=DOUBLE)
    width = uniform(low=0.8, high=1.5, dtype=DOUBLE)
    assert torch.autograd.gradgradcheck(
        lambda x, w: asgl_cuda.lif(x, width=w, surrogate="sigmoid", analog_prob=1.0, backend="reference"),
        (x_seq, width),
    )


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


# The input, and the shape of the parameters: of more than 256 blocks of one neuron a thread, and of four, and of more
# than 256 tiles of the CPU, by layer, run of neurons and neuron, repeated in a block or not; and of many by step.
BLOCKS = [
    ((2, 3, 16, 701), ()), ((2, 3, 16, 701), (16, 1)), ((2, 3, 1600, 7), (7,)), ((1, 7, 8, 5000), ()),
    ((1, 7, 8, 5000), (8, 1)), ((1, 7, 3400, 12), (12,)), ((1, 5, 10, 5461), (10, 5461)), ((2, 1, 524292), (524292,)),
    ((2, 1, 524292), (2, 1, 524292)),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "sizes"), BLOCKS, ids=str)
def test_sums_of_many_blocks(backend, device, shape, sizes):
    given = {name: uniform(*sizes, low=low, high=low + 0.2, device=device)
             for name, low in (("width", 0.9), ("decay", 0.4), ("input_gain", 0.9))}  # fmt: skip
    assert_equals_reference(random_input(*shape, device=device), backend, outputs=("s_seq",), **given)


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
            a = asgl_cuda.reference.surrogates.SURROGATES[surrogate].cumulative(u)
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


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [4, 17])
def test_a_threshold_is_exceeded_by_a_subnormal_number(backend, device, steps, dtype, strict):
    """The difference from the threshold is subnormal, which processors may flush to zero."""
    least = torch.finfo(dtype).tiny
    above = torch.tensor([0, 2**9, 1, -1], dtype=dtype, device=device) * torch.finfo(dtype).smallest_normal
    above = above * torch.finfo(dtype).eps
    x_seq = (least + above).repeat(steps, 31).requires_grad_()
    options = {"v_threshold": least, "strict_threshold": strict, "decay": 0.0}
    s_seq = asgl_cuda.lif(x_seq, **options, backend=backend)
    assert torch.equal(s_seq, (above > 0 if strict else above >= 0).to(dtype).expand(steps, 4).repeat(1, 31))
    assert_equals_reference(x_seq, backend, **options)


# 16 MiB and more, with a last block that is not whole, with checkpoints, and batch first.
LONG = [((4, 2**20 + 48), 0), ((17, 2**18), 0), ((3, 4, 2**19), 1)]


@pytest.mark.parametrize(("input_gain", "residual_gain"), [(0.6, 0.6), (0.6, 0.3), ("tensor", 0.0)])
def test_gradients_of_a_residual(backend, device, input_gain, residual_gain):
    """Stand to those of x_seq as the gains do: one tensor for both if the gains are equal, and not otherwise."""
    x_seq, residual = (random_input(5, 2, 7, device=device) for _ in range(2))
    gain = torch.tensor(0.6, device=device, requires_grad=True) if input_gain == "tensor" else input_gain
    options = {"residual": residual, "input_gain": gain, "residual_gain": residual_gain, "backend": backend}
    spikes = asgl_cuda.lif(x_seq, **options)
    grad_x_seq, grad_residual = torch.autograd.grad(spikes.sum(), (x_seq, residual))
    assert grad_x_seq.all()
    torch.testing.assert_close(grad_residual, grad_x_seq * (residual_gain / 0.6))


@pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="no CPU kernels")
@pytest.mark.parametrize("analog_prob", [0.0, 0.25])
@pytest.mark.parametrize(("shape", "time_dim"), LONG, ids=str)
def test_results_that_are_stored_past_the_cache(shape, time_dim, analog_prob):
    x_seq = random_input(*shape)
    assert_equals_reference(
        x_seq,
        "cpu",
        outputs=("s_seq",),
        time_dim=time_dim,
        analog_prob=analog_prob,
        rng_state=rng_state(),
        surrogate="rectangle",
    )


def test_number_of_threads_is_honoured():
    extension = asgl_cuda.backends.extension.module
    if extension is None:
        pytest.skip("no compiled extension")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert extension.cpu_threads() == threads
    finally:
        torch.set_num_threads(before)
