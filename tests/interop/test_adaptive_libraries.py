"""Adaptation as published and in Norse, in float64: spikes equal, gradients within 1e-12."""

import norse.torch as norse
import pytest
import torch

import asgl_cuda

SHAPE = (12, 3, 7)
pytestmark = pytest.mark.usefixtures("in_double")


def leaf(*shape, low=0.0, high=1.0):
    return (torch.rand(shape) * (high - low) + low).requires_grad_()


def assert_same(ours, theirs, leaves):
    """Spikes, and the gradients of all leaves."""
    assert theirs.sum() > 10
    assert torch.equal(ours, theirs)
    weights = torch.rand_like(theirs)
    found, expected = (torch.autograd.grad((s * weights).sum(), leaves, retain_graph=True) for s in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Boxcar(torch.autograd.Function):
    """A spike with the slope of a rectangle of width 1."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad * (u.abs() <= 0.5)


def bittar_garner(x, alpha, beta, a, b, u, w, s):
    """AdLIF of Bittar and Garner 2022: w follows the potential before the reset, which comes a step later."""
    spikes = []
    for x_t in x:
        w = beta * w + a * u + b * s
        u = alpha * (u - s) + (1 - alpha) * (x_t - w)
        s = Boxcar.apply(u - 1)
        spikes.append(s)
    return torch.stack(spikes)


@pytest.mark.parametrize("starts_at_rest", [True, False])
@pytest.mark.parametrize("per_neuron", [True, False])
def test_bittar_and_garner(starts_at_rest, per_neuron):
    for seed in range(3):
        torch.manual_seed(seed)
        shape = SHAPE[-1:] if per_neuron else ()
        x = leaf(*SHAPE, low=-4, high=12)
        alpha, beta = leaf(*shape, low=0.82, high=0.96), leaf(*shape, low=0.97, high=0.99)
        a, b = leaf(*shape), leaf(*shape)
        u, w, s = (torch.zeros(SHAPE[1:]) if starts_at_rest else leaf(*SHAPE[1:]) for _ in range(3))
        gain = 1 - alpha
        ours = asgl_cuda.adaptive_lif(
            gain * x, decay=alpha, adapt_decay=beta, adapt_potential=gain * a, adapt_spike=gain * (a + b), v_reset=None,
            strict_threshold=True, surrogate="rectangle", v_init=u - s, w_init=gain * (beta * w + a * u + b * s),
        )  # fmt: skip
        leaves = [x, alpha, beta, a, b] + ([] if starts_at_rest else [u, w, s])
        assert_same(ours, bittar_garner(x, alpha, beta, a, b, u, w, s), leaves)


@pytest.mark.parametrize("seed", range(3))
def test_lsnn(seed):
    """The threshold of Norse's LSNN adapts."""
    torch.manual_seed(seed)
    x, syn, mem, adapt = leaf(*SHAPE, high=8.0), *(leaf(low=low, high=2 * low) for low in (300.0, 300.0, 50.0))
    beta, v_th = leaf(low=0.3), leaf(low=0.3)
    parameters = norse.LSNNParameters(
        tau_syn_inv=syn, tau_mem_inv=mem, tau_adapt_inv=adapt, beta=beta, v_th=v_th, method="triangle", alpha=2.0
    )
    theirs, _ = norse.LSNN(parameters)(x)
    gain, rho = 0.001 * mem, 1 - 0.001 * adapt
    current = asgl_cuda.leaky_integrator(x, decay=1 - 0.001 * syn, delay=True)
    ours = asgl_cuda.adaptive_lif(
        gain * current, decay=1 - gain, adapt_decay=rho, adapt_spike=rho * beta, to_threshold=True, v_threshold=v_th,
        v_reset=0.0, strict_threshold=True, surrogate="triangle", width=1.0, surrogate_gain=2.0,
        w_init=(rho * (v_th.detach() - v_th)).expand(SHAPE[1:]),  # Norse starts at a constant
    )  # fmt: skip
    assert_same(ours, theirs, [x, syn, mem, adapt, beta, v_th])
