"""Gradients checked in three ways beside the reference's autograd, and autograd's rules for users."""

import pytest
import torch
from comparison import random_input, rng_state, uniform

import asgl_cuda
from asgl_cuda.surrogate import SURROGATES
from benchmarks.speed.clocks import saved_storages

DOUBLE = torch.float64


def double(*shape, low, high, device):
    return uniform(*shape, low=low, high=high, dtype=DOUBLE, device=device)


@pytest.mark.parametrize("name", [*asgl_cuda.available_backends()])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("v_reset", ["hard", "soft"])
@pytest.mark.parametrize("scale_output", [False, True])
def test_gradcheck(name, surrogate, v_reset, scale_output):
    """With analog_prob = 1 the function is smooth (rectangle and triangle except for kinks, missed by 1e-6 here)."""
    device = torch.device((asgl_cuda.backends.BACKENDS[name].device_types or ("cpu",))[0])
    hard = v_reset == "hard"
    leaves = {
        "x_seq": double(5, 2, 3, low=-1, high=2, device=device),
        "v_init": double(2, 3, low=-1, high=1, device=device),
        "width": double(3, low=0.8, high=1.5, device=device),
        "decay": double(low=0.4, high=0.9, device=device),
        "v_threshold": double(5, 1, 1, low=0.8, high=1.2, device=device),
        "v_reset" if hard else "reset_amount": double(3, low=0.1, high=0.3, device=device),
        "input_gain": double(2, 1, low=0.8, high=1.2, device=device),
        "input_bias": double(2, 3, low=-0.1, high=0.1, device=device),
        "input_mean": double(5, 1, 3, low=-0.1, high=0.1, device=device),
    }

    def function(*values):
        options = dict(zip(leaves, values, strict=True))
        if not hard:
            options["v_reset"] = None
        return tuple(
            asgl_cuda.lif(
                options.pop("x_seq"), **options, surrogate=surrogate, analog_prob=1.0, v_rest=0.2, backend=name,
                scale_output=scale_output, return_v_last=True, return_v_seq=True, return_h_seq=True,
            )
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


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


@pytest.mark.parametrize("asked", ["s_seq", "v_last", "v_seq", "h_seq"])
def test_gradient_of_each_output_alone(backend, device, asked):
    """The gradients of the other outputs are None, not zeros."""
    x_seq = random_input(18, 3, 31, device=device)
    width = uniform(31, low=0.5, high=1.5, device=device)
    options = {"width": width, "analog_prob": 0.3, "rng_state": rng_state(device=device), "return_v_last": True,
               "return_v_seq": True, "return_h_seq": True}  # fmt: skip
    ours = getattr(asgl_cuda.lif(x_seq, **options, backend=backend), asked)
    theirs = getattr(asgl_cuda.lif(x_seq, **options, backend="reference"), asked)
    grad = torch.randn(ours.shape, device=device)
    dx, dwidth = torch.autograd.grad(ours, (x_seq, width), grad)
    expected_dx, expected_dwidth = torch.autograd.grad(theirs, (x_seq, width), grad)
    assert torch.equal(dx, expected_dx)
    torch.testing.assert_close(dwidth, expected_dwidth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", ["x_seq", "width", "decay", "v_init", "v_threshold", "input_bias", "input_mean"])
def test_only_needed_gradients_are_computed(backend, device, needed):
    leaves = {
        "x_seq": random_input(5, 7, 31, device=device),
        "width": uniform(31, low=0.5, high=1.5, device=device),
        "decay": uniform(low=0.4, high=0.9, device=device),
        "v_threshold": uniform(31, low=0.8, high=1.2, device=device),
        "input_bias": uniform(31, low=-0.1, high=0.1, device=device),
        "input_mean": uniform(31, low=-0.1, high=0.1, device=device),
        "v_init": uniform(7, 31, low=-1, high=1, device=device),
    }
    options = {"analog_prob": 0.3, "rng_state": rng_state(device=device), "backend": backend}
    full = dict(leaves)
    out = asgl_cuda.lif(full.pop("x_seq"), **full, **options)
    grad = torch.randn(out.shape, device=device)
    expected = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == needed)
    out = asgl_cuda.lif(leaves["x_seq"], **{k: v for k, v in leaves.items() if k != "x_seq"}, **options)
    out.backward(grad)
    assert torch.equal(leaves[needed].grad, expected[needed])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != needed)


def test_gradient_of_any_layout_comes_in(backend, device):
    """Expanded (from sum), transposed and sliced gradients."""
    x_seq = random_input(4, 6, 10, device=device)
    run = {"analog_prob": 0.3, "rng_state": rng_state(device=device), "backend": backend}
    (ones,) = torch.autograd.grad(asgl_cuda.lif(x_seq, **run), x_seq, torch.ones(4, 6, 10, device=device))
    (expanded,) = torch.autograd.grad(asgl_cuda.lif(x_seq, **run).sum(), x_seq)
    assert torch.equal(ones, expanded)
    weights = torch.randn(10, 12, 4, device=device)[:, ::2].permute(2, 1, 0)
    (strided,) = torch.autograd.grad(asgl_cuda.lif(x_seq, **run), x_seq, weights)
    (dense,) = torch.autograd.grad(asgl_cuda.lif(x_seq, **run), x_seq, weights.contiguous())
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-38, 1e-42])
def test_small_gradients_of_the_triangle(backend, device, size):
    """The bits of autograd's gradients; if subnormal, within a few times the smallest subnormal."""
    x_seq = random_input(4, 1000, device=device)
    grad = torch.rand(x_seq.shape, device=device) * size

    def dx(name):
        s_seq = asgl_cuda.lif(x_seq, surrogate="triangle", backend=name)
        return torch.autograd.grad(s_seq, x_seq, grad)[0].double()

    assert (dx(backend) - dx("reference")).abs().max() <= (0.0 if size >= 1e-30 else 8 * 2.0**-149)


def test_same_tensor_as_two_parameters(backend, device):
    """Soft reset by the threshold: the threshold's gradient is the sum of both parts."""
    x_seq = random_input(9, 31, device=device)
    v_threshold = uniform(31, low=0.8, high=1.2, device=device)
    twin = v_threshold.detach().clone().requires_grad_()
    grad = torch.randn(9, 31, device=device)
    s_seq = asgl_cuda.lif(x_seq, v_threshold=v_threshold, v_reset=None, backend=backend)
    (joint,) = torch.autograd.grad(s_seq, v_threshold, grad)
    s_seq = asgl_cuda.lif(x_seq, v_threshold=v_threshold, v_reset=None, reset_amount=twin, backend=backend)
    parts = torch.autograd.grad(s_seq, (v_threshold, twin), grad)
    torch.testing.assert_close(joint, sum(parts))


def test_second_derivative_is_refused(backend, device):
    x_seq = random_input(4, 9, device=device)
    width = uniform(low=0.5, high=1.5, device=device)
    s_seq = asgl_cuda.lif(x_seq, width=width, surrogate="sigmoid", backend=backend)
    dx, dwidth = torch.autograd.grad(s_seq.sum(), (x_seq, width), create_graph=True)
    for gradient in (dx, dwidth):
        with pytest.raises(RuntimeError, match=r"asgl_cuda: a second derivative .* backend='reference'"):
            gradient.sum().backward(retain_graph=True)
    assert torch.equal(dx, torch.autograd.grad(s_seq.sum(), x_seq)[0])


def test_reference_has_second_derivatives():
    x_seq = uniform(3, 4, low=-1, high=2, dtype=DOUBLE)
    width = uniform(low=0.8, high=1.5, dtype=DOUBLE)
    assert torch.autograd.gradgradcheck(
        lambda x, w: asgl_cuda.lif(x, width=w, surrogate="sigmoid", analog_prob=1.0, backend="reference"),
        (x_seq, width),
    )


def test_backward_twice_needs_retain_graph(backend, device):
    x_seq = random_input(4, 9, device=device)
    s_seq = asgl_cuda.lif(x_seq, backend=backend).sum()
    s_seq.backward(retain_graph=True)
    first = x_seq.grad.clone()
    s_seq.backward()
    assert torch.equal(x_seq.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        s_seq.backward()


def test_input_changed_in_place_before_backward_is_an_error(backend, device):
    x_seq = random_input(4, 9, device=device)
    doubled = x_seq * 2
    s_seq = asgl_cuda.lif(doubled, backend=backend)
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        s_seq.sum().backward()


@pytest.mark.parametrize(("dtype", "bytes_an_element"), [(torch.float32, 4.3), (torch.bfloat16, 2.3)])
def test_saved_for_backward(backend, device, dtype, bytes_an_element):
    """x, rng_state and parameters; checkpoints only beyond 16 steps."""

    def saved_bytes(steps):
        x_seq = random_input(steps, 4096, dtype=dtype, device=device)
        width = uniform(low=0.5, high=1.5, device=device)
        storages = saved_storages(lambda: asgl_cuda.lif(x_seq, width=width, analog_prob=0.2, backend=backend))
        return sum(storages.values()) / x_seq.numel()

    assert saved_bytes(4) <= bytes_an_element
    assert saved_bytes(16) <= bytes_an_element
    assert saved_bytes(128) <= dtype.itemsize + 4 / 16 + 0.01
