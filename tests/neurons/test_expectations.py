"""Averages over the noise against closed forms: the outputs, the gradient of the width, and its limits.

One step of one layer, squared loss. A spike is s = z + m (a - z), m Bernoulli with probability p; a_w is the derivative
of a by the width. Backward's gradient has the mean 2 (z + p (a - z) - y) a_w. The expected loss is
(z - y)^2 + 2 p (z - y) (a - z) + p (a - z)^2, with the derivative 2 p (a - y) a_w: p times the first, and
2 p (1 - p) (a - z) a_w from the variance, which backward leaves out. At p = 1 both are the same.

Tolerance: 6 standard errors, exceeded by one average in 5e8.
"""

import pytest
import torch

import asgl_cuda

COPIES = 2**14  # per potential; each copy draws its own noise
POTENTIALS = torch.tensor([0.2, 0.7, 0.95, 1.0, 1.1, 1.6], dtype=torch.float64)
TARGET = 0.3
PROBS = (0.2, 0.5, 1.0)
WIDTHS = (0.5, 3.0)


class Sampled:
    """Outputs, and the gradients of the width by element, with the noise; the closed forms by potential."""

    def __init__(self, backend, device, surrogate, width, p):
        x = POTENTIALS[:, None].expand(-1, COPIES).contiguous()[None].to(device)
        options = {"surrogate": surrogate, "backend": backend}
        widths = torch.full(x.shape[1:], width, dtype=torch.float64, device=device, requires_grad=True)
        state = torch.tensor([7, 5], device=device)
        self.s = asgl_cuda.lif(x, width=widths, analog_prob=p, rng_state=state, **options)
        (self.grad,) = torch.autograd.grad((self.s - TARGET).square().sum(), widths)
        self.s = self.s[0].detach()
        self.mask = asgl_cuda.analog_mask(x, p, state)[0]
        few = POTENTIALS[None].to(device)
        each = torch.full(few.shape[1:], width, dtype=torch.float64, device=device, requires_grad=True)
        a = asgl_cuda.lif(few, width=each, analog_prob=1.0, **options)
        (self.a_w,) = torch.autograd.grad(a.sum(), each)
        self.a = a[0].detach()
        self.z = (few[0] >= 1).double()


def assert_mean(samples, expected, spread):
    """`spread` is the standard deviation of a sample."""
    error = (samples.mean(1) - expected).abs()
    assert (error <= 6 * spread / COPIES**0.5 + 1e-13).all(), (error, spread / COPIES**0.5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("p", PROBS)
@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid", "triangle"])
def test_outputs_and_gradient_of_the_width(backend, device, surrogate, p, width):
    sampled = Sampled(backend, device, surrogate, width, p)
    gap, a_w = sampled.a - sampled.z, sampled.a_w
    mean, deviation = sampled.z + p * gap, (p * (1 - p)) ** 0.5 * gap.abs()
    assert_mean(sampled.s, mean, deviation)
    # Variance of (s - mean)^2: a Bernoulli variable's fourth central moment less the squared variance.
    spread = gap.square() * (p * (1 - p)) ** 0.5 * abs(1 - 2 * p)
    assert_mean((sampled.s - mean[:, None]).square(), deviation.square(), spread)

    formula = 2 * (mean - TARGET) * a_w
    assert_mean(sampled.grad, formula, 2 * deviation * a_w.abs())
    true = 2 * p * (sampled.a - TARGET) * a_w
    torch.testing.assert_close(true - p * formula, 2 * p * (1 - p) * gap * a_w, rtol=1e-12, atol=1e-15)
    # The pathwise estimate, by analog elements alone, is the expected loss's: hard ones do not depend on the width.
    assert_mean(sampled.grad * sampled.mask, true, (p * (1 - p)) ** 0.5 * (true / p).abs())


def test_gradient_may_have_the_other_sign(backend, device):
    """Under the threshold, with a wide window and little noise: the gradient widens, the expected loss would narrow."""
    options = {"surrogate": "rectangle", "p": 0.2}
    under = 2  # index of the potential 0.95
    assert Sampled(backend, device, width=3.0, **options).grad[under].mean() < 0
    # The same masks, since the noise does not depend on the width.
    wider, narrower = (Sampled(backend, device, width=width, **options).s[under] for width in (3.01, 2.99))
    assert (wider - TARGET).square().mean() > (narrower - TARGET).square().mean()


@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
def test_limits(backend, device, surrogate):
    """Outputs are hard without noise and at width 0."""
    none = Sampled(backend, device, surrogate, 0.5, 0.0)
    assert not none.mask.any()
    assert torch.equal(none.s, none.z[:, None].expand_as(none.s))
    torch.testing.assert_close(none.grad.mean(1), 2 * (none.z - TARGET) * none.a_w)
    narrow = Sampled(backend, device, surrogate, 1e-6, 0.5)
    away = POTENTIALS.to(device) != 1
    torch.testing.assert_close(narrow.a[away], narrow.z[away])
    assert not narrow.a_w[away].any()
