"""Integer spikes, `levels`: values, the published arithmetic, and binary spikes."""

import copy

import pytest
import torch
from comparison import random_input, rng_state
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import asgl_cuda
from asgl_cuda import LIF, Monitor, lif, unroll_levels

SOFT = {"v_reset": None, "levels": 4}


def published(x_seq, decay, levels, threshold=1.0, detach=True):
    """I-LIF as in the networks that train with it: a quantised membrane, and a reset by what it emitted."""
    membrane, outputs = torch.zeros_like(x_seq[0]), []
    for x in x_seq:
        membrane = decay * membrane + x
        scaled = membrane / threshold
        clamped = torch.where((scaled >= 0) & (scaled <= levels), scaled, scaled.detach().clamp(0, levels))
        spikes = clamped + (clamped.round() - clamped).detach()
        outputs.append(spikes)
        membrane = membrane - threshold * (spikes.detach() if detach else spikes)
    return torch.stack(outputs)


def test_ties_and_edges(backend, device):
    h = torch.tensor([-1, -0.0, 0, 0.49999997, 0.5, 0.50000006, 1.5, 2.5, 3.5, 3.9, 4, 4.5, 1e9, torch.inf, -torch.inf])
    x_seq = torch.cat([h, torch.tensor([torch.nan])])[None].to(device).requires_grad_()
    for name in (backend, "reference"):
        s_seq = lif(x_seq, backend=name, **SOFT)
        expected = x_seq.detach().clamp(0, 4).round()
        torch.testing.assert_close(s_seq, expected, rtol=0, atol=0, equal_nan=True)
        (grad,) = torch.autograd.grad(s_seq.nansum(), x_seq)
        inside = (x_seq.detach() >= 0) & (x_seq.detach() <= 4)
        assert torch.equal(grad, inside.to(grad))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("levels", "threshold"), [(1, 1.0), (4, 0.75), (8, 2.0)])
def test_equals_published_arithmetic(backend, device, detach, threshold, levels):
    x_seq = (2 * threshold * random_input(6, 5, 33, dtype=torch.float64, device=device)).detach().requires_grad_()
    found = lif(
        x_seq, decay=0.25, levels=levels, v_threshold=threshold, v_reset=None, detach_reset=detach, backend=backend
    )
    expected = published(x_seq, 0.25, levels, threshold, detach)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, x_seq, grad), torch.autograd.grad(expected, x_seq, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_noise_replaces_the_rounding():
    x_seq, state = 3 * torch.rand(8, 4, 256), rng_state()
    s_seq = lif(x_seq, analog_prob=0.25, rng_state=state, **SOFT)
    mask = asgl_cuda.analog_mask(x_seq, 0.25, state)
    h_seq = lif(x_seq, analog_prob=0.25, rng_state=state, return_h_seq=True, **SOFT).h_seq
    smooth = h_seq.clamp(0, 4)
    assert torch.equal(s_seq, torch.where(mask, smooth, smooth.round()))


def test_a_limit_to_several_spikes(backend, device):
    options = {"v_reset": None, "multi_spike": True, "surrogate": "laplace", "backend": backend}
    x_seq = 6 * random_input(18, 3, 40, device=device)
    limited, free = lif(x_seq, levels=4, **options), lif(x_seq, **options)
    assert limited.max() == 4
    assert torch.equal(limited[0], free[0].clamp(max=4))


def test_output_of_unit_height():
    x_seq = 3 * torch.rand(4, 2, 33)
    assert torch.equal(lif(x_seq, scale_output=True, **SOFT), lif(x_seq, **SOFT) / 4)


@pytest.mark.parametrize("time_dim", [0, 1, -1])
def test_unrolled_network_has_equal_sums(time_dim):
    levels, weight = 4, torch.randn(7, 12, dtype=torch.float64)
    x_seq = (3 * torch.rand(3, 5, 12, dtype=torch.float64)).movedim(0, time_dim)
    s_seq = lif(x_seq, time_dim=time_dim, **SOFT)
    binary = unroll_levels(s_seq, levels, time_dim)
    assert binary.shape[time_dim] == 3 * levels
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    first, whole = binary.movedim(time_dim, 0), s_seq.movedim(time_dim, 0)
    assert torch.equal(first.unflatten(0, (3, levels)).sum(1), whole)
    if time_dim == 0:
        sums = nn.functional.linear(first, weight).unflatten(0, (3, levels)).sum(1)
        torch.testing.assert_close(sums, nn.functional.linear(whole, weight), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("wrong", [0.5, -1.0, 5.0, torch.nan])
def test_unrolling_refuses_others(wrong):
    with pytest.raises(ValueError, match=r"unroll_levels: s_seq must have whole numbers in \[0, 4\], got"):
        unroll_levels(torch.tensor([[1.0, wrong]]), 4)


def test_unrolled_tensors_without_values():
    assert unroll_levels(torch.rand(3, 2, device="meta"), 4).shape == (12, 2)
    with FakeTensorMode():
        assert unroll_levels(torch.rand(3, 2), 4).shape == (12, 2)


@pytest.mark.parametrize(
    "given", [[1.0], torch.tensor(1.0), torch.ones(2, dtype=torch.int64), torch.ones(2).to_sparse()]
)
def test_errors_of_unrolling_name_its_argument(given):
    with pytest.raises((TypeError, ValueError), match=r"asgl_cuda\.unroll_levels: s_seq must"):
        unroll_levels(given, 4)


def test_unrolling_compiles_without_the_check():
    s_seq = lif(3 * torch.rand(2, 3, 4), **SOFT)
    compiled = torch.compile(unroll_levels, backend="eager", fullgraph=True)
    assert torch.equal(compiled(s_seq, 4), unroll_levels(s_seq, 4))


def test_layer():
    layer = LIF(12, granularity="channel", learn_threshold=True, analog_prob=0.0, **SOFT)
    assert layer.log_width is None
    assert "levels=4" in repr(layer)
    x_seq = (3 * torch.rand(4, 5, 12)).requires_grad_()
    s_seq = layer(x_seq)
    assert torch.equal(s_seq, lif(x_seq, v_threshold=layer.threshold, **SOFT))
    s_seq.sum().backward()
    assert layer.threshold.grad.abs().sum() > 0
    assert torch.equal(copy.deepcopy(layer)(x_seq), s_seq)
    stepwise = torch.stack([layer.step(x) for x in x_seq])
    assert torch.equal(stepwise, s_seq)


def test_monitor():
    model = nn.Sequential(LIF(v_threshold=0.5, analog_prob=0.25, **SOFT))
    x_seq = 3 * torch.rand(6, 4, 100) - 0.5
    with Monitor(model) as monitor:
        torch.manual_seed(1)
        s_seq = model(x_seq)
    (values,) = monitor.result().values()
    torch.manual_seed(1)
    output = lif(x_seq, v_threshold=0.5, analog_prob=0.25, return_h_seq=True, **SOFT)
    smooth = (output.h_seq * 2).clamp(0, 4)
    assert torch.equal(output.s_seq, s_seq)
    assert values["firing_rate"] == pytest.approx((smooth.round() > 0).float().mean().item(), abs=1e-6)
    assert values["smoothing_error"] == pytest.approx((smooth - smooth.round()).abs().mean().item(), abs=1e-6)
    assert values["analog_share"] == pytest.approx((s_seq != smooth.round()).float().mean().item(), abs=1e-6)
    inside = (output.h_seq >= 0) & (output.h_seq <= 2)
    assert values["inside"] == pytest.approx(inside.float().mean().item(), abs=1e-6)
    assert values["width"] == 0.5
