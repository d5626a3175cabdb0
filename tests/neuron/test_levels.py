"""Integer spikes, `levels`: against the reference, the published arithmetic, and binary spikes."""

import copy

import pytest
import torch
from comparison import assert_equals_reference, random_input, real_of, rng_state, uniform
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF, Monitor, batch_norm_lif, lif, unroll_levels

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 4, 7, 16, 18, 35])
@pytest.mark.parametrize("neurons", [(4, 68), (5, 33), (1, 1)])
def test_equals_reference(backend, device, dtype, steps, neurons):
    x_seq = (3 * random_input(steps, *neurons, dtype=dtype, device=device)).detach().requires_grad_()
    threshold = uniform(low=0.5, high=1.5, dtype=real_of(dtype), device=device)
    for options in (
        {"levels": 4},
        {"levels": 1, "analog_prob": 0.3},
        {"levels": 7, "detach_reset": True, "analog_prob": 1.0},
        {"levels": 256, "decay": 0.9},
    ):
        assert_equals_reference(
            x_seq, backend, outputs=("s_seq",), v_reset=None, v_threshold=threshold, rng_state=rng_state(device=device),
            **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"by_channel": ("v_threshold", "decay")},
        {"by_channel": ("input_gain", "input_bias"), "detach_reset": True},
        {"by_step": ("v_threshold", "input_gain")},
        {"by_channel": ("v_threshold",), "scale_output": True, "outputs": ("s_seq", "v_last", "v_seq", "h_seq")},
        {"by_channel": ("reset_amount",), "v_rest": 0.2, "outputs": ("s_seq", "h_seq")},
        {"v_min": -0.2, "surrogate_gain": 0.5},
        {"strict_threshold": True, "time_dim": 1},
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_equals_reference_with_the_options_of_lif(backend, device, dtype, options, residual):
    options = {"analog_prob": 0.3, "rng_state": rng_state(device=device), **SOFT, **options}
    x_seq = (3 * random_input(18, 3, 8, 2, 6, dtype=dtype, device=device)).detach().requires_grad_()
    real = {"low": 0.7, "high": 1.2, "dtype": real_of(dtype), "device": device}
    options |= {name: uniform(8, 1, 1, **real) for name in options.pop("by_channel", ())}
    options |= {name: uniform(18, 1, 1, 1, 1, **real) for name in options.pop("by_step", ())}
    if residual:
        options["residual"] = uniform(*x_seq.shape, low=-0.5, high=0.5, dtype=dtype, device=device)
    assert_equals_reference(x_seq, backend, **options)


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
@pytest.mark.parametrize("threshold", [1.0, 0.75, 2.0])
@pytest.mark.parametrize("levels", [1, 4, 6, 8])
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


def test_gradcheck(backend, device):
    """Every element analog: the function is smooth but for its kinks, which no potential is near."""
    real = {"dtype": torch.float64, "device": device}
    x_seq = uniform(6, 3, 4, low=0.3, high=0.8, **real)
    threshold, decay = uniform(4, low=0.9, high=1.1, **real), uniform(low=0.1, high=0.2, **real)

    def smooth(*inputs):
        x_seq, v_threshold, decay = inputs
        return lif(x_seq, v_threshold=v_threshold, decay=decay, analog_prob=1.0, backend=backend, **SOFT)

    assert torch.autograd.gradcheck(smooth, (x_seq, threshold, decay))


def test_noise_replaces_the_rounding():
    x_seq, state = 3 * torch.rand(8, 4, 256), rng_state()
    s_seq = lif(x_seq, analog_prob=0.25, rng_state=state, **SOFT)
    mask = asgl_cuda.analog_mask(x_seq, 0.25, state)
    h_seq = lif(x_seq, analog_prob=0.25, rng_state=state, return_h_seq=True, **SOFT).h_seq
    smooth = h_seq.clamp(0, 4)
    assert torch.equal(s_seq, torch.where(mask, smooth, smooth.round()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", ["laplace", "periodic_exponential"])
def test_limits_multi_spike(backend, device, dtype, surrogate):
    x_seq = (6 * random_input(18, 3, 40, dtype=dtype, device=device)).detach().requires_grad_()
    threshold = uniform(40, low=0.5, high=1.5, dtype=real_of(dtype), device=device)
    options = {**SOFT, "multi_spike": True, "surrogate": surrogate, "v_threshold": threshold}
    assert_equals_reference(x_seq, backend, width=1.3, **options)
    limited = lif(x_seq, backend=backend, **options)
    assert limited.max() == 4
    free = lif(x_seq, backend=backend, **{**options, "levels": None})
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"v_reset": 0.0, "levels": 4}, "levels is for the soft reset and needs v_reset=None, got v_reset 0.0"),
        ({"levels": 0}, r"levels must be None or an int in \[1, 256\], got 0"),
        ({"levels": 257}, r"levels must be None or an int in \[1, 256\], got 257"),
        ({"levels": 4.0}, r"levels must be None or an int in \[1, 256\], got 4.0"),
        ({"levels": True}, r"levels must be None or an int in \[1, 256\], got True"),
        ({"levels": 4, "surrogate": "sigmoid"}, "takes no other, got 'sigmoid'"),
        ({"levels": 4, "v_threshold": 0.0}, "v_threshold"),
        ({"levels": 4, "v_threshold": -1.0}, "v_threshold"),
    ],
)
@pytest.mark.parametrize("call", ["function", "layer"])
def test_refuses(options, message, call):
    options = {"v_reset": None, **options}
    with pytest.raises(ValueError, match=message):
        lif(torch.zeros(2, 3), **options) if call == "function" else LIF(**options)


@pytest.mark.parametrize("width", [2.0, torch.ones(()), torch.ones(3)])
def test_refuses_a_width(width):
    with pytest.raises(ValueError, match="with levels the threshold is the width"):
        lif(torch.zeros(2, 3), width=width, **SOFT)


def test_refuses_a_threshold_tensor_that_is_not_positive():
    with pytest.raises(ValueError, match=r"v_threshold with levels must be > 0, got 0\.0"):
        lif(torch.zeros(2, 3), v_threshold=torch.zeros(3), **SOFT)


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


def test_batch_norm(backend, device):
    x_seq = random_input(4, 6, 8, 3, 5, device=device)
    weight, bias = (uniform(8, low=0.5, high=2, device=device) for _ in range(2))
    found = batch_norm_lif(x_seq, None, None, weight, bias, training=True, backend=backend, **SOFT)
    expected = batch_norm_lif(x_seq, None, None, weight, bias, training=True, backend="reference", **SOFT)
    assert torch.equal(found, expected)
    norm = nn.BatchNorm2d(8, dtype=torch.float64)
    layer = BatchNormLIF(8, dtype=torch.float64, analog_prob=0.0, **SOFT)
    x_seq = random_input(4, 6, 8, 3, 5, dtype=torch.float64)
    assert torch.equal(layer(x_seq), lif(norm(x_seq.flatten(0, 1)).unflatten(0, (4, 6)), **SOFT))


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


def test_learns():
    """A network of integer spikes learns to tell two classes from each other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), LIF(**SOFT), nn.Linear(32, 2))
    x, target = torch.randn(128, 8), torch.arange(128) % 2
    x[target == 1, :4] += 1
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.expand(4, -1, -1)).mean(0), target)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(x.expand(4, -1, -1)).mean(0).argmax(1) == target).float().mean()
    assert accuracy > 0.9
