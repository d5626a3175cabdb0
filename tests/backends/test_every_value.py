"""Half types are widened and rounded as by torch, value by value; slopes at the edges of surrogates."""

import pytest
import torch

from asgl_cuda import lif

halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def every(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@halves
def test_widened(backend, device, dtype):
    """A first potential is the current."""
    x_seq = every(dtype).to(device)
    h_seq = lif(x_seq[None], return_h_seq=True, backend=backend).h_seq
    torch.testing.assert_close(h_seq[0], x_seq.float(), rtol=0, atol=0, equal_nan=True)


@halves
def test_rounded_to_nearest_even(backend, device, dtype):
    """The gradient of a current at a slope of 1/4 is the input's gain: numbers, ties between them, and neighbours."""
    numbers = every(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    largest = torch.finfo(torch.float32).max
    ties = torch.cat([numbers[:-1] + (numbers[1:] - numbers[:-1]) / 2, torch.tensor([65520.0, -65520.0])])
    drawn = torch.randint(-(2**31), 2**31, (100_000,)).int().view(torch.float32)
    gain = torch.cat([numbers, ties, drawn[drawn.isfinite()], torch.tensor([largest, -largest])])
    gain = torch.cat([gain, *(torch.nextafter(gain, torch.tensor(end)) for end in (-largest, largest))]).to(device)
    x_seq = torch.zeros(1, len(gain), dtype=dtype, device=device, requires_grad=True)
    s_seq = lif(x_seq, input_gain=gain, surrogate="rectangle", width=4.0, backend=backend)
    (grad,) = torch.autograd.grad(s_seq, x_seq, torch.full_like(s_seq, 4.0))
    assert torch.equal(grad[0], gain.to(dtype))


SLOPES = {
    "rectangle": lambda u: (u.abs() <= 0.5).to(u),
    "triangle": lambda u: (1 - u.abs()).clamp(min=0),
    "laplace": lambda u: 0.5 * (-u.abs()).exp(),
    "fast_sigmoid": lambda u: 0.5 / (1 + u.abs()) ** 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", SLOPES)
def test_slopes_at_edges_and_peaks(backend, device, surrogate, dtype):
    u = torch.arange(-16, 17, dtype=dtype, device=device) / 8
    for name in (backend, "reference"):
        x_seq = (u + 1)[None].requires_grad_()
        (grad,) = torch.autograd.grad(lif(x_seq, surrogate=surrogate, backend=name).sum(), x_seq)
        torch.testing.assert_close(grad[0], SLOPES[surrogate](u), rtol=1e-6, atol=0)
