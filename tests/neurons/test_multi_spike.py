"""Several spikes a step, and a floor of the potential: extremes, and all backends against sinabs."""

import copy
import pickle

import pytest
import torch
from comparison import uniform

import asgl_cuda
from asgl_cuda import LIF
from asgl_cuda.reference.surrogates import PERIODIC

SEVERAL = {"multi_spike": True, "v_reset": None}


def currents(*shape, **options):
    """Up to five spikes in one step, and some potentials below any floor."""
    return uniform(*shape, low=-3, high=5, **options)


@pytest.mark.parametrize("v_min", [None, -0.5, 0.0])
def test_a_floor_of_0_is_one(backend, device, v_min):
    output = asgl_cuda.lif(-torch.ones(1, 3, device=device), v_min=v_min, return_v_last=True, backend=backend)
    assert (output.v_last == (-1.0 if v_min is None else v_min)).all()


@pytest.mark.parametrize("v_min", [-0.5, 0.0])
@pytest.mark.parametrize("options", [{}, {"v_reset": None}, SEVERAL], ids=["hard", "soft", "several"])
def test_no_gradient_comes_through_a_floor(backend, device, v_min, options):
    """Nor where the potential is exactly the floor, as after a reset to it."""
    x_seq = torch.tensor([[v_min - 0.25, v_min, v_min + 0.25]], device=device)
    for name in (backend, "reference"):
        x_seq = x_seq.detach().requires_grad_()
        output = asgl_cuda.lif(
            x_seq, v_min=v_min, surrogate="rectangle", **options, return_v_last=True, return_v_seq=True, backend=name
        )
        for v in (output.v_last, output.v_seq):
            (grad,) = torch.autograd.grad(v.sum(), x_seq, retain_graph=True)
            assert grad.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize("v_threshold", [1.0, 0.3])
@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid", PERIODIC])
@pytest.mark.parametrize("v_min", [None, -1.0])
def test_extreme_potentials(backend, device, v_threshold, surrogate, v_min):
    """The spike count equals PyTorch's expression, also for an invalid threshold."""
    extremes = [1e3, 1000.5, -1e3, 0.0, -0.0, 1e-40, 0.3, 0.6, 0.9, 3e38, *map(float, ("nan", "inf", "-inf"))]
    x_seq = torch.tensor(extremes, device=device).repeat(6, 4)
    x_seq[1::2] = 0.25
    x_seq.requires_grad_()
    options = {**SEVERAL, "v_threshold": v_threshold, "surrogate": surrogate, "v_min": v_min, "return_h_seq": True}
    found = {}
    for name in (backend, "reference"):
        out = asgl_cuda.lif(x_seq, **options, backend=name)
        found[name] = out.s_seq, out.h_seq, *torch.autograd.grad([out.s_seq, out.h_seq], x_seq, [x_seq.sign()] * 2)
    s_seq, h_seq, dx = found[backend]
    expected = (h_seq > 0) * torch.div(h_seq, torch.full_like(h_seq, v_threshold), rounding_mode="trunc")
    for ours, theirs in ((s_seq, expected), (s_seq, found["reference"][0]), (h_seq, found["reference"][1])):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(dx, found["reference"][2], equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", asgl_cuda.available_backends())
@pytest.mark.parametrize("v_min", [None, -0.3])
@pytest.mark.parametrize("function", ["SingleExponential", "PeriodicExponential"])
def test_sinabs(name, v_min, function):
    """Spikes and potentials are bit-identical to a loop with sinabs' functions; gradients agree."""
    activation = pytest.importorskip("sinabs.activation")
    device = (asgl_cuda.backends.BACKENDS[name].device_types or ("cpu",))[0]
    v_threshold, decay, grad_width, grad_scale = 1.1, 0.9, 0.4, 1.3
    surrogate = getattr(activation, function)(grad_width, grad_scale)
    x_seq, grad = currents(33, 50, device=device), torch.randn(33, 50, device=device)

    v, spikes, potentials = torch.zeros_like(x_seq[0]), [], []
    for x in x_seq:
        v = decay * v + x
        s = activation.MultiSpike.apply(v, v_threshold, surrogate)
        v = v - s * v_threshold
        if v_min is not None:
            v = torch.nn.functional.relu(v - v_min) + v_min
        spikes.append(s)
        potentials.append(v)
    spikes, potentials = torch.stack(spikes), torch.stack(potentials)
    expected = torch.autograd.grad([spikes, potentials], x_seq, [grad, grad])
    assert spikes.max() > 3

    ours = {
        "SingleExponential": {
            "surrogate": "laplace", "width": v_threshold * grad_width, "surrogate_gain": 2 * grad_scale,
        },
        "PeriodicExponential": {
            "surrogate": PERIODIC, "width": grad_width, "surrogate_gain": 2 * grad_width * grad_scale,
        },
    }[function]  # fmt: skip
    out = asgl_cuda.lif(
        x_seq, **SEVERAL, **ours, decay=decay, v_threshold=v_threshold, v_min=v_min, return_v_seq=True, backend=name
    )
    assert torch.equal(out.s_seq, spikes)
    assert torch.equal(out.v_seq, potentials)
    torch.testing.assert_close(torch.autograd.grad([out.s_seq, out.v_seq], x_seq, [grad, grad]), expected)


def test_layer(backend, device):
    options = {**SEVERAL, "surrogate": PERIODIC, "v_min": -0.5, "decay": 0.8}
    layer = LIF(**options, analog_prob=0.0, learn_decay=True, stateful=True, backend=backend, device=device)
    assert layer.state_dict().keys() == LIF(learn_decay=True).state_dict().keys()
    assert "v_min=-0.5, multi_spike=True" in repr(layer)
    assert LIF(**options, analog_prob=0.0, levels=2).log_width is not None  # a limit leaves the surrogate
    x_seq = currents(7, 3, 9, device=device).detach()
    whole = asgl_cuda.lif(x_seq, **{**options, "decay": layer.decay}, backend=backend)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.reset()
        s_seq = torch.cat([other(part) for part in x_seq.split(4)])
        torch.testing.assert_close(s_seq, whole)
        assert s_seq.max() > 2
        assert layer.v.min() == -0.5


def test_monitor():
    """`firing_rate` counts elements with any spikes; no quantity of smooth values is defined."""
    layer = LIF(**SEVERAL, surrogate=PERIODIC, v_min=-0.5, analog_prob=0.0, scale_output=True)
    layer.v_threshold = 0.4
    monitor = asgl_cuda.Monitor(layer)
    with monitor:
        s_seq = layer(currents(6, 3, 8))
    found = monitor.result()[""]
    assert found["firing_rate"] == pytest.approx((s_seq > 0).double().mean().item())
    assert found.keys() == {"width", "firing_rate", "inside", "growth", "dead", "saturated"}
