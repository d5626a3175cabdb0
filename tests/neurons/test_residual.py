"""The residual of `lif`, `batch_norm_lif` and their layers: a sum of tensors, and gradients of half types."""

import copy
import re

import pytest
import torch
from comparison import random_input, uniform

from asgl_cuda import LIF, BatchNormLIF, batch_norm_lif, lif

HALF_TYPES = (torch.float16, torch.bfloat16)
SMOOTH = {"surrogate": "sigmoid", "analog_prob": 1.0}
DETACHED = {**SMOOTH, "detach_reset": True}


def like(x_seq, low=-0.5, high=0.5):
    return uniform(*x_seq.shape, low=low, high=high, dtype=x_seq.dtype, device=x_seq.device)


def test_reference_is_a_sum():
    x_seq = random_input(5, 3, 8, dtype=torch.float64)
    residual, gain = like(x_seq), uniform(8, low=0.5, high=1.5, dtype=torch.float64)
    for residual_gain in (1.0, 0.3, 0.0, -2.0):
        one = lif(x_seq, residual=residual, residual_gain=residual_gain, input_gain=gain, backend="reference", **SMOOTH)
        two = lif(gain * x_seq + residual_gain * residual, backend="reference", **SMOOTH)
        assert torch.equal(one, two)
        leaves, grad = [x_seq, residual, gain], torch.randn_like(one)
        for found, expected in zip(
            torch.autograd.grad(one, leaves, grad), torch.autograd.grad(two, leaves, grad), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_one_gradient_serves_both(backend, device):
    x_seq, residual = random_input(4, 3, 8, device=device), random_input(4, 3, 8, device=device)
    s_seq = lif(x_seq, residual=residual, backend=backend)
    grad_x_seq, grad_residual = torch.autograd.grad(s_seq, [x_seq, residual], torch.ones_like(s_seq))
    assert grad_x_seq.data_ptr() == grad_residual.data_ptr()


# Gradients of the current that float16 can't hold, where it can the result of `residual_gain`: 1e6 and 2e-8.
@pytest.mark.parametrize(("residual_gain", "surrogate_gain"), [(1e-3, 4e6), (1e3, 8e-8)])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("wanted", [("x_seq",), ("residual",), ("x_seq", "residual")])
@pytest.mark.parametrize("options", [{}, {"input_gain": 0.5}, {"v_rest": 0.1}])
def test_the_gradient_is_rounded_after_the_gain(backend, device, dtype, wanted, residual_gain, surrogate_gain, options):
    options = {"residual_gain": residual_gain, "surrogate_gain": surrogate_gain, **options, **DETACHED}
    for steps in (4, 17):
        x_seq = random_input(steps, 4, 68, dtype=dtype, device=device)
        tensors = {"x_seq": x_seq, "residual": like(x_seq) / residual_gain}
        expected = gradients_of(lif, tensors, wanted, torch.float64, backend="reference", **options)
        for name in ("reference", backend):
            found = gradients_of(lif, tensors, wanted, dtype, backend=name, **options)
            for each, right in zip(found, expected, strict=True):
                assert_rounded_once(each, right)


def gradients_of(function, tensors, wanted, dtype, **options):
    """The wanted gradients of the sum of the spikes, computed in `dtype`."""
    given = {name: value.detach().to(dtype).requires_grad_(name in wanted) for name, value in tensors.items()}
    return torch.autograd.grad(function(**given, **options).sum(), [given[name] for name in wanted])


def assert_rounded_once(found, right):
    place, smallest = {torch.float16: (2**-10, 2**-24), torch.bfloat16: (2**-7, 0.0)}[found.dtype]
    torch.testing.assert_close(found.double(), right.to(found.dtype).double(), rtol=place, atol=smallest)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("wanted", [("x_seq",), ("residual",), ("x_seq", "residual")])
@pytest.mark.parametrize(
    ("deviation", "surrogate_gain", "residual_gain"),
    [(1e-3, 1e-8, 1), (1e-3, 1e-8, 1e3), (100, 1e6, 1), (100, 1e6, 1e-3)],
)
def test_half_gradients_are_as_without_a_residual(
    backend, device, dtype, wanted, deviation, surrogate_gain, residual_gain
):
    x_seq = deviation * torch.randn(4, 8, 3, 5, 4, device=device)
    tensors = {"x_seq": x_seq.to(dtype), "residual": torch.zeros_like(x_seq, dtype=dtype)}
    options = {"training": True, "surrogate_gain": surrogate_gain, **DETACHED}
    right = {"backend": "reference", "residual_gain": residual_gain}
    expected = dict(
        zip(wanted, gradients_of(batch_norm_lif, tensors, wanted, torch.float64, **right, **options), strict=True)
    )
    for name in ("reference", backend):
        gained = {"backend": name, "residual_gain": residual_gain, **options}
        found = dict(zip(wanted, gradients_of(batch_norm_lif, tensors, wanted, dtype, **gained), strict=True))
        if "residual" in wanted:
            assert_rounded_once(found["residual"], expected["residual"])
        if "x_seq" in wanted:
            alone = {"x_seq": tensors["x_seq"]}
            (without,) = gradients_of(batch_norm_lif, alone, ["x_seq"], dtype, backend=name, **options)
            error, allowed = (float((each.double() - expected["x_seq"]).norm()) for each in (found["x_seq"], without))
            assert error <= 1.5 * allowed


@pytest.mark.parametrize(
    "layer", [LIF(input_gain=0.5), BatchNormLIF(3), BatchNormLIF(3, input_scale=0.5), LIF(stateful=True)]
)
def test_layer(layer):
    layer = copy.deepcopy(layer).double().eval()
    x_seq, residual = random_input(4, 2, 3, 5, dtype=torch.float64), random_input(4, 2, 3, 5, dtype=torch.float64)
    if isinstance(layer, BatchNormLIF):
        apart = LIF().double().eval()
        expected = apart(layer.input_scale * x_seq / (1 + layer.eps) ** 0.5 + residual)
    else:
        expected = copy.deepcopy(layer)(x_seq + residual)
    torch.testing.assert_close(layer(x_seq, residual), expected)
    if layer.stateful:
        assert layer.v is not None
    assert torch.equal(copy.deepcopy(layer)(x_seq, residual=residual), copy.deepcopy(layer)(x_seq, residual))


def test_expand_as_is_advised_only_where_it_works():
    x_seq = torch.zeros(4, 6, 3)
    for shape in ((4, 6, 2), (4, 2, 3), (1, 4, 6, 3), (0,)):
        with pytest.raises(ValueError, match=rf"got {re.escape(str([*shape]))}$"):
            lif(x_seq, residual=torch.zeros(shape))
    for shape in ((), (3,), (6, 1), (1, 6, 3)):
        residual = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"; residual\.expand_as\(x_seq\) broadcasts it$"):
            lif(x_seq, residual=residual)
        lif(x_seq, residual=residual.expand_as(x_seq))
