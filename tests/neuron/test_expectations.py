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


@pytest.fixture(params=WIDTHS)
def width(request):
    return request.param


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


@pytest.fixture(params=PROBS)
def p(request):
    return request.param


@pytest.fixture(params=("rectangle", "sigmoid", "triangle"))
def sampled(backend, device, request, width, p):
    return Sampled(backend, device, request.param, width, p)


def test_outputs(sampled, p):
    gap = sampled.a - sampled.z
    mean, deviation = sampled.z + p * gap, (p * (1 - p)) ** 0.5 * gap.abs()
    assert_mean(sampled.s, mean, deviation)
    # Variance of (s - mean)^2: a Bernoulli variable's fourth central moment less the squared variance.
    variance = deviation.square()
    assert_mean((sampled.s - mean[:, None]).square(), variance, gap.square() * (p * (1 - p)) ** 0.5 * abs(1 - 2 * p))


def test_gradient_of_the_width(sampled, p):
    gap, a_w = sampled.a - sampled.z, sampled.a_w
    deviation = 2 * (p * (1 - p)) ** 0.5 * (gap * a_w).abs()
    formula = 2 * (sampled.z + p * gap - TARGET) * a_w
    assert_mean(sampled.grad, formula, deviation)
    true = 2 * p * (sampled.a - TARGET) * a_w
    torch.testing.assert_close(true - p * formula, 2 * p * (1 - p) * gap * a_w, rtol=1e-12, atol=1e-15)


def test_analog_elements_alone_give_the_gradient_of_the_expected_loss(sampled, p):
    """The pathwise estimate: hard elements do not depend on the width."""
    each = 2 * (sampled.a - TARGET) * sampled.a_w
    assert_mean(sampled.grad * sampled.mask, p * each, (p * (1 - p)) ** 0.5 * each.abs())


def test_analog_elements_alone_for_any_smooth_loss(backend, device, width, p):
    """A loss that couples six elements, its expectation a sum over all 64 masks."""
    surrogate, x = "sigmoid", POTENTIALS.to(device).expand(1, COPIES, -1).contiguous()
    weights = torch.tensor([0.5, -0.3, 0.8, 0.9, -0.6, 0.3], dtype=torch.float64, device=device)

    def loss(s):
        return (s @ weights).exp() + (s @ weights.flip(0)).square()

    few = Sampled(backend, device, surrogate, width, p)
    leaf = torch.tensor(width, dtype=torch.float64, device=device, requires_grad=True)
    a = asgl_cuda.lif(POTENTIALS[None].to(device), width=leaf, analog_prob=1.0, surrogate=surrogate, backend=backend)[0]
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)] * len(POTENTIALS))
    chances = (masks * p + (1 - masks) * (1 - p)).prod(1)
    (true,) = torch.autograd.grad(chances @ loss(few.z + masks * (a - few.z)), leaf)
    s = (few.z + masks * (few.a - few.z)).requires_grad_()
    (ds,) = torch.autograd.grad(loss(s).sum(), s)
    pathwise = (masks * ds * few.a_w).sum(1)  # by mask
    torch.testing.assert_close(chances @ pathwise, true)

    widths = torch.full(x.shape[1:], width, dtype=torch.float64, device=device, requires_grad=True)
    state = torch.tensor([3, 8], device=device)
    s = asgl_cuda.lif(x, width=widths, analog_prob=p, rng_state=state, surrogate=surrogate, backend=backend)
    (grad,) = torch.autograd.grad(loss(s).sum(), widths)
    sampled = (grad * asgl_cuda.analog_mask(x, p, state)[0]).sum(1)
    spread = (chances @ (pathwise - true).square()).sqrt()
    assert_mean(sampled[None], true, spread)


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
    """Outputs are hard without noise and at width 0; where every element is analog the gradient is exact."""
    none = Sampled(backend, device, surrogate, 0.5, 0.0)
    assert not none.mask.any()
    assert torch.equal(none.s, none.z[:, None].expand_as(none.s))
    torch.testing.assert_close(none.grad.mean(1), 2 * (none.z - TARGET) * none.a_w)
    leaf = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    x = POTENTIALS[None].to(device)
    torch.autograd.gradcheck(
        lambda leaf: asgl_cuda.lif(x, width=leaf, analog_prob=1.0, surrogate=surrogate, backend=backend), leaf
    )
    narrow = Sampled(backend, device, surrogate, 1e-6, 0.5)
    away = POTENTIALS.to(device) != 1
    torch.testing.assert_close(narrow.a[away], narrow.z[away])
    assert not narrow.a_w[away].any()
