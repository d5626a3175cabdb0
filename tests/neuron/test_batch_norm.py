"""batch_norm_lif and BatchNormLIF, against the reference, against nn.BatchNorm2d and lif, and with hard numbers."""

import copy
import itertools
import pickle

import pytest
import torch
from comparison import random_input, real_of, rng_state, uniform
from torch import nn
from torch.nn.functional import batch_norm

import asgl_cuda
from asgl_cuda import batch_norm_lif
from asgl_cuda.backends import BACKENDS
from asgl_cuda.layout import channel_dim, is_channels_last
from asgl_cuda.selfcheck import THRESHOLD_BAND
from benchmarks.clocks import saved_storages

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Two computations of a sum in float64, or in float32 of up to 64 terms and then in float64.
SUMS = {torch.float64: 1e-12}
SAME = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

# Name: shape, time_dim. A channel lies in stretches of 35, 1, 1024, 9, 4, 23, 2 and 1 values.
SHAPES = {
    "images": ((5, 2, 3, 5, 7), 0),
    "vectors": ((3, 40, 21), 0),
    "large": ((4, 2, 3, 32, 32), 0),
    "batch first": ((3, 6, 5, 3, 3), 1),
    "time last": ((4, 6, 4), 2),
    "long": ((33, 1, 2, 23), 0),
    "many channels": ((2, 2, 700, 2), 0),
    "many rows": ((4, 700, 3), 0),
}


def channels_last(x_seq, time_dim):
    channel = 2 if time_dim <= 1 else 1
    return x_seq.movedim(channel, -1).contiguous().movedim(-1, channel)


def make(name, dtype, device, layout="contiguous", mean=0.3, deviation=0.8):
    """x_seq, time_dim, and the arguments by channel."""
    shape, time_dim = SHAPES[name]
    x_seq = (torch.randn(shape, dtype=torch.float64) * deviation + mean).to(device, dtype)
    if layout == "channels_last":
        x_seq = channels_last(x_seq, time_dim)
    elif layout == "sliced":
        x_seq = torch.stack([x_seq, -x_seq], dim=-1)[..., 0]
    channels = shape[2 if time_dim <= 1 else 1]
    real = real_of(dtype)
    arguments = {
        "weight": uniform(channels, low=0.5, high=1.5, dtype=real, device=device),
        "bias": uniform(channels, low=-0.5, high=1.0, dtype=real, device=device),
        "running_mean": uniform(channels, low=-0.5, high=0.5, dtype=real, device=device).detach(),
        "running_var": uniform(channels, low=0.5, high=1.5, dtype=real, device=device).detach(),
    }
    return x_seq, time_dim, arguments


def differentiated(function, x_seq, leaves, keep, arguments, **options):
    """Outputs and gradients of a function of x_seq: the gradients that come in are 0 where `keep` is."""
    x_seq = x_seq.detach().requires_grad_()
    running = {name: arguments[name].clone() for name in ("running_mean", "running_var") if name in arguments}
    output = function(x_seq, **{**arguments, **running}, **options)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(output.s_seq.shape, generator=generator).to(output.s_seq) * keep
    grads = torch.autograd.grad(output.s_seq, [x_seq, *leaves.values()], grad)
    named = zip(["x_seq", *leaves], grads, strict=True)
    return output, {**{f"grad_{name}": value for name, value in named}, **running}


def relative(actual, expected):
    """The largest difference as a share of the largest value; NaN equals NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (actual - expected).abs().nan_to_num(nan=float("inf")))
    size = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.ones(())
    return float(gap.max() / size.clamp(min=1e-30)) if gap.numel() else 0.0


def far_from_threshold(h_seq, v_threshold, time_dim, band=THRESHOLD_BAND):
    """Neurons in which no rounding can make or unmake a spike."""
    near = ((h_seq.detach() - v_threshold).abs() < band).any(dim=time_dim, keepdim=True)
    return (~near).expand_as(h_seq)


def assert_same(x_seq, time_dim, arguments, backend, other="reference", sums=1e-5, same=None, **options):
    """`backend` against `other`, a backend or a function, in outputs, gradients and running statistics."""
    dtype = x_seq.dtype
    leaves = {name: value for name, value in {**arguments, **options}.items() if getattr(value, "requires_grad", False)}
    options = {"time_dim": time_dim, "rng_state": rng_state(device=x_seq.device), "return_h_seq": True, **options}

    def by(name):
        if callable(name):
            return name
        return lambda x, **others: batch_norm_lif(x, **others, backend=name)

    every = torch.ones((), device=x_seq.device)
    expected, _ = differentiated(by(other), x_seq, leaves, every, arguments, **options)
    v_threshold = options.get("v_threshold", 1.0)
    keep = far_from_threshold(expected.h_seq, v_threshold, time_dim % x_seq.dim())
    assert keep.float().mean() > 0.9
    expected, expected_grads = differentiated(by(other), x_seq, leaves, keep, arguments, **options)
    actual, actual_grads = differentiated(by(backend), x_seq, leaves, keep, arguments, **options)
    same = SAME[dtype] if same is None else same
    assert relative(actual.s_seq * keep, expected.s_seq * keep) <= same
    assert relative(actual.h_seq * keep, expected.h_seq * keep) <= max(
        SAME[real_of(dtype)], same if callable(other) else 0
    )
    if x_seq.is_contiguous() or is_channels_last(x_seq, time_dim % x_seq.dim()):
        assert actual.s_seq.stride() == x_seq.stride()
    for name, value in expected_grads.items():
        sized = name == "grad_x_seq" and dtype in (torch.float16, torch.bfloat16)
        allowed = 4 * SAME[dtype] if sized else SUMS.get(dtype, sums)
        assert relative(actual_grads[name], value) <= allowed, name


# ---- against the reference ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_reference(backend, device, name, layout, dtype, training):
    """Half types store gain * dh and then dx: a last place each, and what that is of the sums."""
    x_seq, time_dim, arguments = make(name, dtype, device, layout)
    weight = arguments["weight"]
    of_channels = [-1] + [1] * (x_seq.dim() - 1 - channel_dim(time_dim))
    width = uniform(len(weight), low=0.8, high=1.2, dtype=weight.dtype, device=device).detach().reshape(of_channels)
    width.requires_grad_()
    assert_same(x_seq, time_dim, arguments, backend, training=training, width=width, analog_prob=0.3, input_scale=1.2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 5, 8, 16, 17, 40])
@pytest.mark.parametrize("v_reset", [0.1, None])
@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
def test_equals_reference_over_steps(backend, device, steps, v_reset, surrogate, training):
    """Segments of every length, in the loops of the common case."""
    x_seq = torch.randn(steps, 2, 2, 12, 11, device=device)
    arguments = {
        "weight": uniform(2, low=0.5, high=1.5, device=device),
        "running_mean": torch.zeros(2, device=device),
        "running_var": torch.ones(2, device=device),
    }
    options = {"v_reset": v_reset, "surrogate": surrogate, "analog_prob": 0.2}
    assert_same(x_seq, 0, arguments, backend, training=training, **options)


@pytest.mark.parametrize(
    "options",
    [{"scale_output": True}, {"v_rest": 0.2}, {"detach_reset": True}, {"strict_threshold": True}, {"decay": "channel"},
     {"width": "neuron"}, {"v_threshold": "channel"}, {"return_v_last": True, "return_v_seq": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_reference_with_the_options_of_lif(backend, device, dtype, options):
    x_seq, time_dim, arguments = make("images", dtype, device)
    shapes = {"channel": (3, 1, 1), "neuron": (3, 5, 7)}
    made = {
        key: uniform(*shapes[value], low=0.6, high=0.9, dtype=dtype, device=device) if isinstance(value, str) else value
        for key, value in options.items()
    }
    assert_same(x_seq, time_dim, arguments, backend, training=True, analog_prob=0.3, **made)


def test_v_init_and_its_gradient(backend, device):
    x_seq, _, arguments = make("images", torch.float64, device)
    v_init = uniform(2, 3, 5, 7, low=-0.5, high=0.5, dtype=torch.float64, device=device)
    assert_same(x_seq, 0, arguments, backend, training=True, analog_prob=0.5, v_init=v_init)


# ---- against the two layers that it stands for ----


def pair(x_seq, *, running_mean, running_var, weight, bias, training, input_scale, momentum=0.1, eps=1e-5, **options):
    """The normalisation of torch over the joint time and batch, in float64, then lif.

    Of float32, torch's own statistics are sums in an order that depends on the number of threads.
    """
    real = running_mean.dtype
    running = [running_mean.double().clone(), running_var.double().clone()]
    y = batch_norm(x_seq.double().flatten(0, 1), *running, weight.double(), bias.double(), training, momentum, eps)
    running_mean.copy_(running[0])
    running_var.copy_(running[1])
    return asgl_cuda.lif((input_scale * y.unflatten(0, x_seq.shape[:2])).to(real), **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["images", "large", "vectors", "many rows"])
def test_equals_batch_norm_and_lif(backend, device, name, dtype, training):
    """There it is x * alpha + beta, which rounds otherwise: some places more than between backends."""
    x_seq, time_dim, arguments = make(name, dtype, device)
    assert_same(
        x_seq, time_dim, arguments, backend, other=pair, training=training, analog_prob=0.3, input_scale=0.8,
        same=1e-12 if dtype == torch.float64 else 1e-6,
    )  # fmt: skip


# ---- gradients ----


@pytest.mark.parametrize("name", [*asgl_cuda.available_backends()])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("input_scale", [1.0, 0.7])
def test_gradcheck(name, training, input_scale):
    device = torch.device((BACKENDS[name].device_types or ("cpu",))[0])

    def leaf(*shape, low=-1.0, high=2.0):
        return uniform(*shape, low=low, high=high, dtype=torch.float64, device=device)

    leaves = {
        "x_seq": leaf(4, 2, 3, 2),
        "weight": leaf(3, low=0.5, high=1.5),
        "bias": leaf(3, low=0.0, high=1.0),
        "v_init": leaf(2, 3, 2),
        "width": leaf(3, 1, low=0.8, high=1.2),
        "decay": leaf(low=0.5, high=0.9),
    }
    mean, variance = torch.zeros(3, device=device), torch.ones(3, device=device)

    def function(*values):
        options = dict(zip(leaves, values, strict=True))
        running = {} if training else {"running_mean": mean, "running_var": variance}
        return tuple(
            batch_norm_lif(
                options.pop("x_seq"), **running, **options, training=training, surrogate="sigmoid", analog_prob=1.0,
                input_scale=input_scale, backend=name, return_v_last=True, return_v_seq=True, return_h_seq=True,
            )
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("wanted", [["x_seq"], ["weight"], ["bias"], ["width"], ["bias", "v_init"], []], ids=str)
def test_any_gradient_alone(backend, device, wanted):
    """What is not asked for is not computed, and changes nothing in what is."""
    x_seq, _, arguments = make("images", torch.float64, device)
    leaves = {
        "x_seq": x_seq,
        "weight": arguments["weight"],
        "bias": arguments["bias"],
        "width": torch.tensor(1.1, dtype=torch.float64, device=device),
        "v_init": torch.zeros(2, 3, 5, 7, dtype=torch.float64, device=device),
    }
    found = {}
    for names in (list(leaves), wanted):
        values = {name: value.detach().clone().requires_grad_(name in names) for name, value in leaves.items()}
        options = {"training": True, "analog_prob": 0.4, "rng_state": rng_state(device=device), "backend": backend}
        s_seq = batch_norm_lif(**values, **options)
        assert s_seq.requires_grad == bool(names)
        grads = torch.autograd.grad(s_seq.square().sum(), [values[name] for name in names]) if names else []
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(found.setdefault(name, grad), grad)


def test_no_second_derivative(backend, device):
    x_seq = random_input(3, 2, 4, device=device)
    s_seq = batch_norm_lif(x_seq, training=True, backend=backend)
    (grad,) = torch.autograd.grad(s_seq.sum(), x_seq, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(("dtype", "bytes_an_element"), [(torch.float32, 4.3), (torch.bfloat16, 2.3)])
@pytest.mark.parametrize("steps", [4, 16, 64])
def test_what_is_saved_for_backward(backend, device, dtype, bytes_an_element, steps):
    """x_seq alone, and a few numbers a channel; the potentials of every 16th step beyond the first 16."""
    x_seq = random_input(steps, 8, 4, 32, 32, dtype=dtype, device=device)
    storages = saved_storages(lambda: batch_norm_lif(x_seq, training=True, analog_prob=0.2, backend=backend))
    assert x_seq.untyped_storage().data_ptr() in storages
    assert sum(storages.values()) / x_seq.numel() <= bytes_an_element


# ---- numbers that are hard ----


@pytest.mark.parametrize(("mean", "deviation"), [(100.0, 0.1), (-1e4, 1.0), (1e-3, 1e-4), (0.0, 1e3)])
@pytest.mark.parametrize("name", ["images", "large", "many rows"])
def test_means_that_are_large_against_the_deviation(backend, device, name, mean, deviation):
    """The normalised input is as exact as x_seq says: torch's own computation, x * alpha + beta, loses places here."""
    x_seq, _, _ = make(name, torch.float32, device, mean=mean, deviation=deviation)
    h_seq = batch_norm_lif(x_seq, training=True, decay=0.0, eps=0.0, backend=backend, return_h_seq=True).h_seq
    dims = [0, 1, *range(3, x_seq.dim())]
    variance, average = torch.var_mean(x_seq.double(), dims, correction=0, keepdim=True)
    expected = (x_seq.double() - average) / variance.sqrt()
    assert relative(h_seq, expected) < 1e-6


def outliers(order):
    """Values of which few are far from the others, [N], in this order."""
    values = torch.zeros(8 * 4096)
    if order == "one":
        values[0] = 0.3
    elif order == "a thousand":
        values[:1000] = 0.3
    elif order == "over two":
        values[::2] = 1e-3 * 2**0.5
        values[0] = 1.0
    elif order == "over noise":
        values = 1.0 + 1e-3 * torch.randn(values.shape)
        values[0] = 3.0
    else:
        values[torch.randperm(len(values))[:30]] = 1.0
    return values


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("order", ["one", "a thousand", "over two", "over noise", "events"])
def test_variance_where_outliers_come_first(backend, device, order, reverse, layout):
    """In any order it is as torch has it, or within two places of float32."""
    values = outliers(order).flip(0) if reverse else outliers(order)
    x_seq = torch.stack([values, values / 3], dim=-1).view(4, 2, 64, 64, 2).movedim(-1, 2)
    x_seq = (x_seq if layout == "channels_last" else x_seq.contiguous()).to(device)
    expected = x_seq.double().var((0, 1, 3, 4))

    def error(function):
        found = torch.ones(2, device=device)
        function(x_seq, torch.zeros(2, device=device), found, training=True, momentum=1.0)
        return relative(found / expected, torch.ones(2))

    def torch_batch_norm(x_seq, *running, **options):
        batch_norm(x_seq.flatten(0, 1), *running, **options)

    assert error(lambda *args, **options: batch_norm_lif(*args, **options, backend=backend)) <= max(
        error(torch_batch_norm), 2**-22
    )


def test_gradients_where_the_mean_is_large(backend, device):
    """Sums of dh * x would have no correct place in float32; those of dh * (x - mean) have."""
    x_seq, _, arguments = make("large", torch.float32, device, mean=1e4, deviation=1.0)
    expected = [t.double() for t in _smooth_gradients(x_seq.double(), arguments, "reference")]
    for actual, exact in zip(_smooth_gradients(x_seq, arguments, backend), expected, strict=True):
        assert relative(actual, exact) < 1e-5


def _smooth_gradients(x_seq, arguments, backend):
    x_seq = x_seq.detach().requires_grad_()
    weight, bias = (arguments[name].detach().to(real_of(x_seq.dtype)).requires_grad_() for name in ("weight", "bias"))
    s_seq = batch_norm_lif(
        x_seq, None, None, weight, bias, training=True, surrogate="sigmoid", analog_prob=1.0, backend=backend
    )
    grad = torch.linspace(-1, 1, s_seq.numel(), dtype=s_seq.dtype, device=s_seq.device).sin().view_as(s_seq)
    return torch.autograd.grad(s_seq, [x_seq, weight, bias], grad)


def test_float16_trains_at_mean_100_and_deviation_a_tenth(backend, device):
    """Two classes that differ by one deviation: a threshold on the normalised input tells them apart."""
    torch.manual_seed(3)
    layer = asgl_cuda.BatchNormLIF(4, analog_prob=0.2, backend=backend).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    labels = (torch.arange(64, device=device) % 2).float()
    losses = []
    for _ in range(40):
        values = 100 + 0.1 * (torch.randn(4, 64, 4, 3, device=device) + 2 * labels[:, None, None] - 1)
        rate = layer(values.half()).float().mean(dim=(0, 2, 3))
        loss = (rate - labels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert (layer.running_mean - 100).abs().max() < 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_as_good_as_torch_computes_them(backend, device, dtype):
    """At most twice the error of torch's layers in this type, against float64."""
    x_seq, _, arguments = make("large", dtype, device)
    exact = [t.double() for t in _smooth_gradients(x_seq.double(), arguments, "reference")]
    ours = _smooth_gradients(x_seq, {k: v.float() for k, v in arguments.items()}, backend)

    leaf = x_seq.detach().requires_grad_()
    norm = nn.BatchNorm2d(3).to(device)
    with torch.no_grad():
        norm.weight.copy_(arguments["weight"])
        norm.bias.copy_(arguments["bias"])
    y = norm(leaf.flatten(0, 1)).unflatten(0, x_seq.shape[:2])
    s_seq = asgl_cuda.lif(y, surrogate="sigmoid", analog_prob=1.0, backend=backend)
    grad = torch.linspace(-1, 1, s_seq.numel(), dtype=s_seq.dtype, device=device).sin().view_as(s_seq)
    theirs = torch.autograd.grad(s_seq, [leaf, norm.weight, norm.bias], grad)
    for actual, pair_of_layers, expected in zip(ours, theirs, exact, strict=True):
        assert relative(actual, expected) <= 2 * relative(pair_of_layers, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [2, 4])
def test_half_types_with_few_values_a_channel(backend, device, dtype, values):
    """What is left of dx is small against its terms: it may be no worse than that of torch's layers, twice at most."""
    x_seq = (torch.randn(2, values // 2, 256, dtype=torch.float64, device=device) * 2 + 1).to(dtype)
    grad = torch.randn(x_seq.shape, device=device).to(dtype)
    options = {"surrogate": "sigmoid", "analog_prob": 1.0, "width": 3.0, "return_v_last": True, "backend": backend}

    def of_pair(x_seq):
        leaf = x_seq.detach().clone().requires_grad_()
        real = real_of(leaf.dtype)
        norm = nn.BatchNorm1d(256, device=device, dtype=real)
        out = asgl_cuda.lif(norm(leaf.flatten(0, 1)).view_as(leaf), **options)
        return torch.autograd.grad(out.s_seq, leaf, grad.to(leaf.dtype))[0].double()

    leaf = x_seq.clone().requires_grad_()
    out = batch_norm_lif(leaf, training=True, **options)
    assert (out.s_seq.dtype, out.v_last.dtype) == (dtype, torch.float32)
    (ours,) = torch.autograd.grad(out.s_seq, leaf, grad)
    assert ours.dtype == dtype
    exact = of_pair(x_seq.double())
    assert relative(ours.double(), exact) <= 2 * relative(of_pair(x_seq), exact)


def test_constant_channels(backend, device):
    """Their deviation is 0: what is left is the bias, and a gradient that is finite."""
    x_seq = torch.full((3, 4, 5, 2, 2), 7.25, device=device, requires_grad=True)
    bias = torch.linspace(-1, 1, 5, device=device).requires_grad_()
    output = batch_norm_lif(x_seq, bias=bias, training=True, decay=0.0, backend=backend, return_h_seq=True)
    assert torch.equal(output.h_seq, bias[:, None, None].expand_as(x_seq))
    output.h_seq.square().sum().backward()
    assert x_seq.grad.abs().max() < 1e-3  # the sums that cancel are divided by sqrt(eps)
    torch.testing.assert_close(bias.grad, 2 * bias.detach() * 48)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["images", "vectors", "large"])
def test_one_value_that_is_no_number(backend, device, name, value):
    """Its channel is none any more, the others are as before."""
    x_seq, _, arguments = make(name, torch.float32, device)
    x_seq[1, 1, 1].view(-1)[0] = value
    leaf = x_seq.clone().requires_grad_()
    output = batch_norm_lif(leaf, None, None, arguments["weight"], training=True, backend=backend, return_h_seq=True)
    channels = output.h_seq.movedim(2, 0).flatten(1)
    assert channels[1].isnan().all()
    assert channels[0].isfinite().all()
    (grad,) = torch.autograd.grad(output.s_seq.sum(), leaf)
    assert grad.movedim(2, 0)[0].isfinite().all()


def test_one_value_a_channel(backend, device):
    x_seq = torch.randn(1, 1, 4, device=device)
    with pytest.raises(ValueError, match=r"more than one value a channel, got x_seq of shape \[1, 1, 4\]"):
        batch_norm_lif(x_seq, training=True, backend=backend)
    mean, variance = torch.zeros(4, device=device), torch.ones(4, device=device)
    batch_norm_lif(x_seq, mean, variance, backend=backend)  # evaluation needs none


def test_two_values_a_channel(backend, device):
    x_seq = torch.tensor([[[1.0, 5.0]], [[3.0, 5.5]]], device=device)
    output = batch_norm_lif(x_seq, training=True, eps=0.0, decay=0.0, backend=backend, return_h_seq=True)
    assert torch.equal(output.h_seq, torch.tensor([[[-1.0, -1.0]], [[1.0, 1.0]]], device=device))


@pytest.mark.parametrize("shape", [(3, 0, 4, 2), (3, 2, 4, 0), (3, 2, 0, 4)])
def test_empty(backend, device, shape):
    x_seq = torch.zeros(shape, device=device, requires_grad=True)
    channels = shape[2]
    running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    weight = torch.ones(channels, device=device, requires_grad=True)
    s_seq = batch_norm_lif(x_seq, *running, weight, backend=backend)
    assert s_seq.shape == shape
    s_seq.sum().backward()
    assert x_seq.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(channels, device=device))
    with pytest.raises(ValueError, match="more than one value a channel"):
        batch_norm_lif(x_seq, *running, weight, training=True, backend=backend)


# ---- the layer ----


def fused_and_pair(backend, device, channels=3, dtype=torch.float64, **options):
    norm = nn.BatchNorm2d(channels, **options).to(device, dtype)
    lif = asgl_cuda.LIF(backend=backend, analog_prob=0.0).to(device, dtype)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.0, 1.0)
    fused = asgl_cuda.BatchNormLIF(channels, **options, backend=backend, analog_prob=0.0).to(device, dtype)
    fused.load_state_dict({**norm.state_dict(), **lif.state_dict()})
    return fused, lambda x_seq: lif(norm(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])), norm


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}, {"affine": False},
                                     {"track_running_stats": False}], ids=str)  # fmt: skip
def test_layer_in_training_and_evaluation(backend, device, options):
    """The same spikes as the pair over several calls, the same running statistics, and then in evaluation."""
    fused, unfused, norm = fused_and_pair(backend, device, **options)
    for _ in range(4):
        x_seq = torch.randn(4, 5, 3, 4, 2, dtype=torch.float64, device=device) * 2 + 1
        assert torch.equal(fused(x_seq), unfused(x_seq))
    assert list(fused.state_dict()) == [*(["log_width"]), *norm.state_dict()]
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value)
    fused.eval()
    norm.eval()
    x_seq = torch.randn(4, 5, 3, 4, 2, dtype=torch.float64, device=device) * 2 + 1
    assert torch.equal(fused(x_seq), unfused(x_seq))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value)


def test_tdbn(backend, device):
    """Zheng et al.: the normalised input times alpha * v_threshold."""
    layer = asgl_cuda.BatchNormLIF(3, v_threshold=0.8, input_scale=0.5 * 0.8, decay=0.0, backend=backend).to(device)
    x_seq = torch.randn(4, 2, 3, 5, device=device)
    output = layer._lif(x_seq, 0, return_h_seq=True)
    h_seq = output.h_seq.movedim(2, 0).flatten(1)
    torch.testing.assert_close(h_seq.std(dim=1, correction=0), torch.full((3,), 0.4, device=device), rtol=1e-4, atol=0)


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
def test_layer_learns_what_lif_learns(backend, device, granularity):
    features = [3, 4, 2] if granularity == "neuron" else 3
    layer = asgl_cuda.BatchNormLIF(
        features, granularity=granularity, learn_decay=True, learn_threshold=True, backend=backend
    ).to(device)
    layer(torch.randn(5, 2, 3, 4, 2, device=device)).sum().backward()
    assert {name for name, value in layer.named_parameters() if value.grad is not None} == {
        "log_width", "logit_decay", "threshold", "weight", "bias"
    }  # fmt: skip


def test_stateful_layer(backend, device):
    """Two halves of a sequence in evaluation are the whole of it."""
    layer = asgl_cuda.BatchNormLIF(3, stateful=True, backend=backend).to(device).eval()
    x_seq = torch.randn(8, 2, 3, 5, device=device)
    whole = layer(x_seq)
    layer.reset()
    assert torch.equal(torch.cat([layer(x_seq[:3]), layer(x_seq[3:])]), whole)


def test_copies_and_pickles(backend, device):
    layer = asgl_cuda.BatchNormLIF(3, backend=backend).to(device)
    layer(torch.randn(4, 2, 3, device=device))
    x_seq = torch.randn(4, 2, 3, device=device)
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x_seq), layer(x_seq))
    assert "BatchNormLIF(3, eps=1e-05, momentum=0.1, width=1 (learned)" in str(layer)


def test_a_monitor_changes_no_statistics(backend, device):
    layer = asgl_cuda.BatchNormLIF(3, backend=backend).to(device)
    other = copy.deepcopy(layer)
    x_seq = torch.randn(4, 2, 3, 5, device=device)
    torch.manual_seed(0)
    with asgl_cuda.Monitor(layer):
        layer(x_seq)
    torch.manual_seed(0)
    other(x_seq)
    for key, value in other.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


def test_autocast_and_module_types(backend, device):
    """Half weights, as after .half(), are computed with in float32."""
    layer = asgl_cuda.BatchNormLIF(3, backend=backend).to(device).half()
    x_seq = torch.randn(4, 2, 3, 5, device=device).half().requires_grad_()
    layer(x_seq).sum().backward()
    assert layer.weight.grad.dtype == torch.float16
    assert layer.running_mean.dtype == torch.float16
    assert x_seq.grad.dtype == torch.float16


# ---- torch's features ----


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("sizes", "order"),
    [((1, 4, 3, 8), (1, 0, 2, 3)), ((4, 2, 1, 1, 3), (0, 1, 4, 2, 3))],
    ids=["batch of 1", "features of 1 x 1"],
)
def test_strides_of_dimensions_of_one_element(backend, device, sizes, order, compiled):
    """They mean nothing: a gradient that has others lies in memory as x_seq does."""
    torch._dynamo.reset()
    x_seq = torch.randn(sizes, device=device).permute(order).requires_grad_()

    def function(x_seq, backend=backend):
        return batch_norm_lif(x_seq, training=True, surrogate="sigmoid", analog_prob=1.0, backend=backend).square()

    tested = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    actual, expected = (torch.autograd.grad(s.sum(), x_seq)[0] for s in (tested(x_seq), function(x_seq, "reference")))
    torch.testing.assert_close(actual, expected)


def coefficients_arguments(x_seq, source, real):
    channels = x_seq.shape[2]

    def ones():
        return torch.ones(channels, dtype=real, device=x_seq.device)

    statistics = (
        torch.rand(3, channels, 3, dtype=torch.float64, device=x_seq.device) if source == "statistics" else None
    )
    running = (ones(), ones()) if source == "running" else (None, None)
    return (x_seq, statistics, *running, ones(), None, 1e-5, 0.9, 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_opcheck(backend, device, layout, dtype):
    operators = BACKENDS[backend].operators
    x_seq, _, _ = make("images", dtype, device, layout)
    real = real_of(dtype)
    for source in ("x_seq", "running", "statistics"):
        arguments = coefficients_arguments(x_seq, source, real)
        torch.library.opcheck(operators.batch_norm_coefficients, arguments)
        coefficients, total = operators.batch_norm_coefficients(*arguments)
    sums = [torch.rand(3, dtype=real, device=device) for _ in range(4)]
    for grad_x_seq in (torch.zeros_like(x_seq), x_seq.new_empty(0)):
        arguments = (grad_x_seq, x_seq, coefficients, total, *sums, 1e-5, 0.9, 0)
        torch.library.opcheck(operators.batch_norm_backward, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: torch.ones(4)}, "must have shape|expected shape"),
        ({4: torch.ones(3, dtype=torch.float64)}, "must have shape|expected shape"),
        ({2: None}, "mean and variance come together"),
        ({8: 9}, "time_dim|in list"),
    ],
)
def test_the_operator_checks_what_would_be_read_beyond_the_end(backend, device, change, message):
    arguments = list(coefficients_arguments(torch.randn(4, 2, 3, 5, device=device), "running", torch.float32))
    for place, value in change.items():
        arguments[place] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises((ValueError, RuntimeError, IndexError), match=message):
        BACKENDS[backend].operators.batch_norm_coefficients(*arguments)


def test_the_operator_checks_the_gradient_that_it_writes(backend, device):
    x_seq = torch.randn(4, 2, 3, 5, device=device)
    coefficients, total = BACKENDS[backend].operators.batch_norm_coefficients(
        *coefficients_arguments(x_seq, "x_seq", torch.float32)
    )
    sums = [torch.ones(3, device=device)] * 4
    for wrong in (x_seq.half(), x_seq[:3].clone(), channels_last(x_seq, 0)):
        with pytest.raises((ValueError, RuntimeError), match="as x_seq does"):
            BACKENDS[backend].operators.batch_norm_backward(wrong, x_seq, coefficients, total, *sums, 1e-5, 1.0, 0)


def test_compile(backend, device):
    """One graph, the same spikes, gradients and running statistics; for the second batch size a graph for any."""
    torch._dynamo.reset()
    layer = asgl_cuda.BatchNormLIF(3, analog_prob=0.0, backend=backend).to(device)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for batch in (2, 3):
        x_seq = torch.randn(4, batch, 3, 5, device=device)
        leaves = [x_seq.clone().requires_grad_() for _ in range(2)]
        expected, actual = layer(leaves[0]), compiled(leaves[1])
        torch.testing.assert_close(actual, expected)
        expected.square().sum().backward()
        actual.square().sum().backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(compiled._orig_mod.state_dict()[key], value)
    layer.eval()
    compiled.eval()
    torch.testing.assert_close(compiled(x_seq), layer(x_seq))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "evaluation .* needs running_mean and running_var"),
        ({"running_mean": torch.zeros(3)}, ValueError, "must both be given"),
        ({"training": True, "weight": torch.ones(4)}, ValueError, r"weight must have shape \[3\] .* got \[4\]"),
        ({"training": True, "bias": torch.ones(1, 3)}, ValueError, r"bias must have shape \[3\] .* got \[1, 3\]"),
        ({"training": True, "weight": torch.ones(3).int()}, TypeError, "weight must be of a floating type"),
        ({"training": True, "weight": 1.0}, TypeError, "weight must be a tensor, got float"),
        ({"training": True, "weight": torch.ones(3, device="meta")}, ValueError, "weight must be on cpu .* got meta"),
        ({"training": True, "eps": "small"}, TypeError, "eps must be a float, got str"),
        ({"training": True, "input_scale": None}, TypeError, "input_scale must be a float, got NoneType"),
        ({"training": True, "momentum": None}, TypeError, "momentum must be a float or a tensor, got NoneType"),
        ({"training": True, "time_dim": 7}, ValueError, "batch_norm_lif: time_dim must be in"),
        ({"training": True, "surrogate": "step"}, ValueError, "batch_norm_lif: surrogate must be one of"),
        ({"training": True, "width": 0.0}, ValueError, "batch_norm_lif: width must be > 0"),
        ({"training": True, "input_gain": 2.0}, TypeError, "asgl_cuda.batch_norm_lif.* argument 'input_gain'"),
        ({"training": True, "tau": 2.0}, TypeError, "asgl_cuda.batch_norm_lif.* argument 'tau'"),
    ],
)
def test_errors(arguments, error, message):
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        batch_norm_lif(torch.randn(4, 2, 3, 5, generator=torch.Generator()), **arguments, analog_prob=0.2)
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_of_shapes():
    with pytest.raises(ValueError, match=r"must have a dimension of channels, .* got shape \[4, 3\] with time_dim 0"):
        batch_norm_lif(torch.randn(4, 3), training=True)
    layer = asgl_cuda.BatchNormLIF(5)
    with pytest.raises(ValueError, match=r"running_mean must have shape \[3\] .* got \[5\]"):
        layer(torch.randn(4, 2, 3, 6))
    assert int(layer.num_batches_tracked) == 0
    for wrong in (0, [], "3", True):
        with pytest.raises(ValueError, match="num_features must be a number of channels or begin with it"):
            asgl_cuda.BatchNormLIF(wrong)


def test_every_combination_of_missing_parameters(backend, device):
    x_seq, _, arguments = make("vectors", torch.float32, device)
    for present in itertools.product([False, True], repeat=2):
        chosen = {name: arguments[name] for name, there in zip(("weight", "bias"), present, strict=True) if there}
        assert_same(x_seq, 0, chosen, backend, training=True, analog_prob=0.3)
