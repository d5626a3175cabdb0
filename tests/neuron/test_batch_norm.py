"""batch_norm_lif against the reference, against nn.BatchNorm2d and lif, and with extreme values."""

import pytest
import torch
from batch_norm_cases import DTYPES, SHAPES, assert_same, make, relative
from comparison import random_input, real_of, rng_state, uniform
from torch import nn
from torch.nn.functional import batch_norm

import asgl_cuda
from asgl_cuda import batch_norm_lif
from asgl_cuda.backends import BACKENDS
from asgl_cuda.layout import channel_dim
from benchmarks.speed.clocks import saved_storages

# ---- against the reference ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_reference(backend, device, name, layout, dtype, training):
    """Half types store gain * dh and then dx: an ulp each, and in the sums a share of an ulp."""
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
    """One and several segments, full and partial, in the settled kernels."""
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


# ---- against the two layers that it replaces ----


def pair(x_seq, *, running_mean, running_var, weight, bias, training, input_scale, momentum=0.1, eps=1e-5, **options):
    """The normalisation of torch over the joint time and batch, in float64, then lif.

    Torch's float32 statistics are sums whose order depends on the number of threads.
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
    """PyTorch computes x * alpha + beta, which rounds otherwise: hence the wider tolerance."""
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
    """Without other gradients, the requested gradients are the same."""
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
def test_saved_for_backward(backend, device, dtype, bytes_an_element, steps):
    """x_seq, a few values a channel, and the potentials of every 16th step beyond the first 16."""
    x_seq = random_input(steps, 8, 4, 32, 32, dtype=dtype, device=device)
    storages = saved_storages(lambda: batch_norm_lif(x_seq, training=True, analog_prob=0.2, backend=backend))
    assert x_seq.untyped_storage().data_ptr() in storages
    assert sum(storages.values()) / x_seq.numel() <= bytes_an_element


# ---- extreme values ----


@pytest.mark.parametrize(("mean", "deviation"), [(100.0, 0.1), (-1e4, 1.0), (1e-3, 1e-4), (0.0, 1e3)])
@pytest.mark.parametrize("name", ["images", "large", "many rows"])
def test_means_that_are_large_against_the_deviation(backend, device, name, mean, deviation):
    """The normalised input is as exact as x_seq allows; torch's x * alpha + beta loses digits here."""
    x_seq, _, _ = make(name, torch.float32, device, mean=mean, deviation=deviation)
    dims = [0, 1, *range(3, x_seq.dim())]
    variance, average = torch.var_mean(x_seq.double(), dims, correction=0, keepdim=True)
    expected = (x_seq.double() - average) / variance.sqrt()
    for each in (backend, "reference"):
        h_seq = batch_norm_lif(x_seq, training=True, decay=0.0, eps=0.0, backend=each, return_h_seq=True).h_seq
        assert relative(h_seq, expected) < 1e-6


def outliers(order):
    """Values with few outliers, [N], in this order."""
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
    """In any order the error is at most torch's, or two float32 ulps."""
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
    """Sums of dh * x would have no correct digit in float32, unlike sums of dh * (x - mean)."""
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
    """Two classes that differ by one deviation: a threshold on the normalised input separates them."""
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
    """Against float64, the error is at most twice the error of torch's layers in this type."""
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
    """The gradient dx is small against its terms: its error may be at most twice the error of torch's layers."""
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
    """Deviation 0: the input becomes the bias, gradients are finite."""
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
    """The value's channel becomes NaN, other channels stay finite."""
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
    # Empty training leaves the statistics, as torch's normalisation does.
    x_seq.grad = weight.grad = None
    s_seq = batch_norm_lif(x_seq, *running, weight, training=True, backend=backend)
    s_seq.sum().backward()
    assert s_seq.shape == x_seq.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(channels, device=device))
    assert not running[0].any()
    assert (running[1] == 1).all()
