"""Adaptive neurons against other implementations, in float64: spikes equal, gradients within 1e-12.

Only spikes of sinabs are compared: its threshold gets no gradient.
"""

import pytest
import torch

import asgl_cuda

SHAPE = (12, 3, 7)


def leaf(*shape, low=0.0, high=1.0):
    return (torch.rand(shape, dtype=torch.float64) * (high - low) + low).requires_grad_()


def assert_same(ours, theirs, leaves):
    """Spikes, and the gradients of all leaves."""
    assert theirs.sum() > 10
    assert torch.equal(ours, theirs)
    weights = torch.rand_like(theirs)
    found, expected = (
        torch.autograd.grad((each * weights).sum(), leaves, retain_graph=True) for each in (ours, theirs)
    )
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("starts_at_rest", [True, False])
@pytest.mark.parametrize("per_neuron", [True, False])
def test_bittar_and_garner(seed, starts_at_rest, per_neuron):
    torch.manual_seed(seed)
    shape = SHAPE[-1:] if per_neuron else ()
    x = leaf(*SHAPE, low=-4, high=12)
    alpha, beta, a, b = leaf(*shape, low=0.82, high=0.96), leaf(*shape, low=0.97, high=0.99), leaf(*shape), leaf(*shape)
    u, w, s = (torch.zeros(SHAPE[1:], dtype=torch.float64) if starts_at_rest else leaf(*SHAPE[1:]) for _ in range(3))
    theirs = bittar_garner(x, alpha, beta, a, b, u, w, s)
    gain = 1 - alpha
    ours = asgl_cuda.adaptive_lif(
        gain * x, decay=alpha, adapt_decay=beta, adapt_potential=gain * a, adapt_spike=gain * (a + b), v_reset=None,
        strict_threshold=True, v_init=u - s, w_init=gain * (beta * w + a * u + b * s),
    )  # fmt: skip
    assert_same(ours, theirs, [x, alpha, beta, a, b] + ([] if starts_at_rest else [u, w, s]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["current", "threshold"])
@pytest.mark.parametrize("method", ["super", "triangle"])
def test_norse(seed, form, method):
    """LSNN and its adaptation in the current, without recurrence: the synapse is a LeakyIntegrator with delay."""
    norse = pytest.importorskip("norse.torch.functional.lsnn")
    torch.manual_seed(seed)
    dt, steps = 0.001, SHAPE[0]
    values = {"tau_syn_inv": 300.0, "tau_mem_inv": 400.0, "tau_adapt_inv": 60.0, "v_leak": 0.1, "v_th": 0.6,
              "v_reset": -0.2, "beta": 0.7}  # fmt: skip
    p = norse.LSNNParameters(
        **{name: torch.tensor(each, dtype=torch.float64) for name, each in values.items()}, method=method, alpha=2.0
    )
    x = leaf(*SHAPE, low=-1, high=4)
    rest, zeros = torch.full(SHAPE[1:], 0.1, dtype=torch.float64), torch.zeros(SHAPE[1:], dtype=torch.float64)
    k, rho = dt * values["tau_mem_inv"], 1 - dt * values["tau_adapt_inv"]
    current = asgl_cuda.leaky_integrator(x, 1 - dt * values["tau_syn_inv"], delay=True)
    surrogate = {"super": "fast_sigmoid", "triangle": "triangle"}[method]
    common = {"decay": 1 - k, "v_rest": 0.1, "v_threshold": 0.6, "adapt_decay": rho, "strict_threshold": True,
              "surrogate": surrogate, "surrogate_gain": 2.0}  # fmt: skip
    spikes = []
    if form == "threshold":
        state = norse.LSNNFeedForwardState(v=rest, i=zeros, b=torch.full_like(rest, 0.6))
        for t in range(steps):
            z, state = norse.lsnn_feed_forward_step(x[t], state, p, dt)
            spikes.append(z)
        ours = asgl_cuda.adaptive_lif(
            k * current, **common, adapt_spike=rho * values["beta"], to_threshold=True, v_reset=-0.2
        )
    else:
        state, eye, nothing = (
            norse.LSNNState(z=zeros, v=rest, i=zeros, b=zeros),
            torch.eye(7).double(),
            torch.zeros(7, 7),
        )
        for t in range(steps):
            z, state = norse.ada_lif_step(x[t], state, eye, nothing.double(), p, dt)
            spikes.append(z)
        ours = asgl_cuda.adaptive_lif(
            k * current, **common, adapt_spike=k * values["beta"], v_reset=None, reset_amount=0.8
        )
    assert_same(ours, torch.stack(spikes), [x])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("subtracts", ["threshold", "amount", "reset"])
@pytest.mark.parametrize("norm_input", [True, False])
@pytest.mark.parametrize("starts_at_rest", [True, False])
def test_sinabs(seed, subtracts, norm_input, starts_at_rest):
    layers, activation = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.activation")
    torch.manual_seed(seed)
    reset = {"threshold": activation.MembraneSubtract(), "amount": activation.MembraneSubtract(0.7),
             "reset": activation.MembraneReset()}[subtracts]  # fmt: skip
    tau_mem, tau_adapt = (torch.tensor(value, dtype=torch.float64) for value in (8.0, 12.0))
    theirs = layers.ALIF(
        tau_mem=tau_mem, tau_adapt=tau_adapt, adapt_scale=0.8, spike_threshold=torch.tensor(0.9, dtype=torch.float64),
        reset_fn=reset, surrogate_grad_fn=lambda v, threshold: ((v - threshold).abs() <= 0.5).to(v),
        norm_input=norm_input,
    )  # fmt: skip
    x = leaf(*SHAPE, low=-1, high=8 if norm_input else 1.5)
    theirs.init_state_with_shape(SHAPE[1:])
    for name, buffer in theirs.named_buffers():
        start = torch.zeros(SHAPE[1:], dtype=torch.float64) if starts_at_rest else leaf(*SHAPE[1:]).detach()
        setattr(theirs, name, start.to(torch.float64) if buffer.dtype != torch.bool else buffer)
    v, b = theirs.v_mem.clone(), theirs.b.clone()
    expected = theirs(x.transpose(0, 1)).transpose(0, 1)
    alpha, rho = theirs.alpha_mem_calculated, theirs.alpha_adapt_calculated
    ours = asgl_cuda.adaptive_lif(
        (1 - alpha) * x if norm_input else x, decay=alpha, v_threshold=0.9, adapt_decay=rho,
        adapt_spike=0.8 * (1 - rho), to_threshold=True, v_init=v, w_init=0.8 * b, detach_reset=False,
        **({"v_reset": 0.0} if subtracts == "reset" else {"v_reset": None}),
        **({"reset_amount": 0.7} if subtracts == "amount" else {}),
    )  # fmt: skip
    assert torch.equal(ours, expected.to(ours))
    assert expected.sum() > 10
