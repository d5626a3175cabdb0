"""Normalised neurons: statistics, extreme values, running statistics and the layer, beside test_features.py."""

import copy

import pytest
import torch
from comparison import real_of, rng_state, uniform
from features import FEATURES, Case, assert_equals_reference
from torch import nn
from torch.nn.functional import batch_norm
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import batch_norm_lif
from asgl_cuda.backends import BACKENDS

SMOOTH = {"surrogate": "sigmoid", "analog_prob": 1.0, "width": 3.0}

# [B, C, H, W] by name. A channel is stored in runs of 35, 1, 1024, 23, 2 and 1 values.
SIZES = {
    "images": (2, 3, 5, 7),
    "vectors": (40, 21, 1, 1),
    "large": (2, 3, 32, 32),
    "long": (1, 2, 23, 1),
    "many channels": (2, 700, 2, 1),
    "many rows": (700, 3, 1, 1),
}


@pytest.mark.parametrize("layout", ["time first", "channels last", "sliced"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_sizes(backend, device, sizes, layout):
    """Of sums, and of the neurons behind these."""
    for name, dtype, steps in (("normalised", torch.float32, 4), ("normalised in evaluation", torch.bfloat16, 3)):
        case = Case(dtype, steps, "sigmoid", layout=layout, shape="channel", sizes=sizes, noise=0.3, asked="states")
        assert_equals_reference(FEATURES[name], case, backend, device)


def make(sizes, device, dtype=torch.float32, mean=0.3, deviation=0.8):
    """x_seq of four steps, weight and bias."""
    x_seq = (torch.randn(4, *SIZES[sizes], dtype=torch.float64) * deviation + mean).to(device, dtype)
    channels, real = x_seq.shape[2], real_of(dtype)
    weight, bias = (uniform(channels, low=low, high=1.5, dtype=real, device=device) for low in (0.5, -0.5))
    return x_seq, weight, bias


def relative(actual, expected):
    """The largest difference as a share of the largest value; NaN equals NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (actual - expected).abs().nan_to_num(nan=float("inf")))
    size = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else torch.ones(())
    return float(gap.max() / size.clamp(min=1e-30)) if gap.numel() else 0.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", ["images", "many rows"])
@pytest.mark.parametrize("residual_gain", [None, 0.7])
def test_equals_batch_norm_and_lif(backend, device, sizes, training, residual_gain):
    """The normalisation of torch over the joint time and batch, then a sum, then lif."""
    x_seq, weight, bias = make(sizes, device, torch.float64)
    leaves = [x_seq.requires_grad_(), weight, bias]
    more = {"residual": torch.rand_like(x_seq), "residual_gain": residual_gain} if residual_gain else {}
    options = {"analog_prob": 0.3, "rng_state": rng_state(device=device), "backend": backend}
    ours, theirs = ([torch.zeros_like(weight), torch.ones_like(weight)] for _ in range(2))
    y = batch_norm(x_seq.flatten(0, 1), *theirs, weight, bias, training).view_as(x_seq) * 0.8
    expected = asgl_cuda.lif(y + residual_gain * more["residual"] if more else y, **options)
    s_seq = batch_norm_lif(x_seq, *ours, weight, bias, training=training, input_scale=0.8, **more, **options)
    torch.testing.assert_close((s_seq, *ours), (expected, *theirs))
    grad = torch.randn_like(s_seq)
    torch.testing.assert_close(*(torch.autograd.grad(each, leaves, grad) for each in (s_seq, expected)))


@pytest.mark.parametrize("options", [{"multi_spike": True, "v_min": -0.5}, {"levels": 4}], ids=["spikes", "levels"])
def test_several_spikes_a_step(backend, device, options):
    """No rounding flips a spike here."""
    x_seq, weight, bias = make("images", device, torch.float64)
    leaves, grad, results = [x_seq.requires_grad_(), weight, bias], torch.randn_like(x_seq), []
    for name in (backend, "reference"):
        options |= {"training": True, "v_reset": None, "input_scale": 3.0, "backend": name}
        s_seq = batch_norm_lif(x_seq, None, None, weight, bias, **options)
        results.append((s_seq, *torch.autograd.grad(s_seq, leaves, grad)))
    assert results[0][0].max() > 2
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("mean", "deviation"), [(100.0, 0.1), (-1e4, 1.0), (1e-3, 1e-4), (0.0, 1e3)])
@pytest.mark.parametrize("name", ["images", "large", "many rows"])
def test_means_that_are_large_against_the_deviation(backend, device, name, mean, deviation):
    """The normalised input is as exact as x_seq allows; torch's x * alpha + beta loses digits here."""
    x_seq, _, _ = make(name, device, mean=mean, deviation=deviation)
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


def smooth_gradients(function, leaves):
    s_seq = function(*leaves)
    grad = torch.randn(s_seq.shape, generator=torch.Generator().manual_seed(0)).bfloat16()  # a value of any type
    return torch.autograd.grad(s_seq, leaves, grad.to(s_seq))


def fused(backend):
    def function(x_seq, weight, bias):
        return batch_norm_lif(x_seq, None, None, weight, bias, training=True, backend=backend, **SMOOTH)

    return function


def pair(x_seq, weight, bias):
    """Torch's normalisation, and lif."""
    y = batch_norm(x_seq.flatten(0, 1), None, None, weight, bias, training=True).view_as(x_seq)
    return asgl_cuda.lif(y, **SMOOTH)


def doubled(leaves):
    return [each.detach().double().requires_grad_() for each in leaves]


def test_gradients_where_the_mean_is_large(backend, device):
    """Sums of dh * x would have no correct digit in float32, unlike sums of dh * (x - mean)."""
    x_seq, *others = make("large", device, mean=1e4, deviation=1.0)
    leaves = [x_seq.requires_grad_(), *others]
    expected = smooth_gradients(fused("reference"), doubled(leaves))
    for actual, exact in zip(smooth_gradients(fused(backend), leaves), expected, strict=True):
        assert relative(actual, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_as_good_as_torch_computes_them(backend, device, dtype):
    """Against float64: the norm of the error, since its largest value varies by a factor of two from draw to draw."""
    x_seq, *others = make("large", device, dtype)
    leaves = [x_seq.requires_grad_(), *others]
    exact = smooth_gradients(pair, doubled(leaves))
    ours, theirs = (smooth_gradients(each, leaves) for each in (fused(backend), pair))
    assert [each.dtype for each in ours] == [dtype, torch.float32, torch.float32]
    for actual, pair_of_layers, expected in zip(ours, theirs, exact, strict=True):
        assert (actual - expected).norm() <= 1.2 * (pair_of_layers - expected).norm()


@pytest.mark.parametrize("values", [2, 4])
def test_few_half_values_a_channel(backend, device, values):
    """Computed in float32 and rounded once, since the gradient is small against its terms."""
    x_seq, residual = (torch.randn(values, 1, 256, device=device).half() for _ in range(2))
    results = []
    for dtype in (torch.float16, torch.float32):
        leaves = [each.to(dtype).requires_grad_() for each in (x_seq, residual)]
        s_seq = batch_norm_lif(leaves[0], training=True, residual=leaves[1], backend=backend, **SMOOTH)
        grads = torch.autograd.grad(s_seq, leaves, residual.to(dtype))
        assert {each.dtype for each in (s_seq, *grads)} == {dtype}
        results.append([each.half() for each in (s_seq, *grads)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_constant_channels(backend, device):
    """Deviation 0: the input becomes the bias, gradients are finite."""
    x_seq = torch.full((3, 4, 5, 2, 2), 7.25, device=device, requires_grad=True)
    bias = torch.linspace(-1, 1, 5, device=device).requires_grad_()
    output = batch_norm_lif(x_seq, bias=bias, training=True, decay=0.0, backend=backend, return_h_seq=True)
    assert torch.equal(output.h_seq, bias[:, None, None].expand_as(x_seq))
    output.h_seq.square().sum().backward()
    assert x_seq.grad.abs().max() < 1e-3  # the sums that cancel are divided by sqrt(eps)
    torch.testing.assert_close(bias.grad, 2 * bias.detach() * 48)


def test_one_and_two_values_a_channel(backend, device):
    mean, variance = torch.zeros(4, device=device), torch.ones(4, device=device)
    batch_norm_lif(torch.randn(1, 1, 4, device=device), mean, variance, backend=backend)  # evaluation needs one
    x_seq = torch.tensor([[[1.0, 5.0]], [[3.0, 5.5]]], device=device)
    output = batch_norm_lif(x_seq, training=True, eps=0.0, decay=0.0, backend=backend, return_h_seq=True)
    assert torch.equal(output.h_seq, torch.tensor([[[-1.0, -1.0]], [[1.0, 1.0]]], device=device))


def test_empty_training_leaves_the_statistics(backend, device):
    """As torch's normalisation does."""
    x_seq = torch.zeros(3, 0, 4, 2, device=device, requires_grad=True)
    running = torch.zeros(4, device=device), torch.ones(4, device=device)
    batch_norm_lif(x_seq, *running, training=True, backend=backend).sum().backward()
    assert x_seq.grad.shape == x_seq.shape
    assert not running[0].any()
    assert (running[1] == 1).all()


BOTH = torch.ones(6)
OWN = r"of its own once, before training: running_var = running_var\.clone\(\)"
# Mean and variance of 3 channels, and words of the error.
RUNNING = {
    "an expanded mean": lambda: (torch.zeros(1).expand(3), torch.ones(3), "running_mean .* expanded .*running_mean = "),
    "an expanded variance": lambda: (torch.zeros(3), torch.ones(1).expand(3), f"running_var .* expanded .*{OWN}"),
    "the same twice": lambda: (BOTH[:3], BOTH[:3], f"running_mean and .* must not share memory; .*{OWN}"),
    "one behind the other": lambda: (BOTH[:3], BOTH[2:5], "must not share memory"),
    "every second": lambda: (BOTH[:5:2], BOTH[:3], "must not share memory"),
    "a mean that learns": lambda: (torch.zeros(3).requires_grad_(), torch.ones(3), "running_mean gets no gradient"),
    "a variance that learns": lambda: (torch.zeros(3), torch.ones(3).requires_grad_(), "running_var gets no gradient"),
    "a variance of inference mode": lambda: (
        torch.zeros(3).double(), torch.inference_mode()(torch.ones)(3), "made in inference mode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNNING)
def test_running_statistics_that_cannot_be_kept(backend, kind):
    """Refused before any write."""
    mean, variance, words = RUNNING[kind]()
    before = mean.detach().clone(), variance.detach().clone()
    with pytest.raises(ValueError, match=f"asgl_cuda.batch_norm_lif: .*{words}"):
        batch_norm_lif(torch.randn(4, 2, 3, 5), mean, variance, training=True, backend=backend)
    assert torch.equal(mean, before[0])
    assert torch.equal(variance, before[1])
    if "learns" in kind:
        with pytest.raises(ValueError, match=words):
            batch_norm_lif(torch.randn(4, 2, 3, 5), mean, variance, backend=backend)
        with torch.no_grad():
            batch_norm_lif(torch.randn(4, 2, 3, 5), mean, variance, training=True, backend=backend)
            batch_norm_lif(torch.randn(4, 2, 3, 5), mean, variance, backend=backend)
    else:
        batch_norm_lif(torch.randn(4, 2, 3, 5), mean, variance, backend=backend)  # which only reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_columns", [(), (0,), (1,), (0, 1)], ids=["rows", "mean", "variance", "columns"])
def test_running_statistics_of_one_memory(backend, device, dtype, in_columns):
    """Rows and columns of one tensor are written independently, and one of the two statistics may be a column.

    Columns are updated by torch.lerp, which may fuse the product with the sum. The product's rounding is at most
    2^-24 of the result, as are those of the two results.
    """
    x_seq = torch.randn(4, 2, 3, 5, device=device).to(dtype)
    expected = torch.zeros(3, device=device), torch.ones(3, device=device)
    batch_norm_lif(x_seq, *expected, training=True, backend=backend)
    rows = torch.tensor([[0.0] * 3, [1.0] * 3], device=device)
    columns = rows.T.contiguous()
    running = tuple(columns[:, k] if k in in_columns else rows[k] for k in range(2))
    batch_norm_lif(x_seq, *running, training=True, backend=backend)
    torch.testing.assert_close(running, expected, rtol=3 * 2**-24 if in_columns else 0.0, atol=0)


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_running_statistics_of_two_types(backend, device, types):
    """Each keeps its type, and differs by some ten roundings."""
    x_seq = torch.randn(4, 2, 3, 5, device=device)
    expected = torch.zeros(3, device=device), torch.ones(3, device=device)
    running = tuple(each.to(dtype, copy=True) for each, dtype in zip(expected, types, strict=True))
    for each in (expected, running):
        batch_norm_lif(x_seq, *each, training=True, backend=backend)
    expected = tuple(each.to(dtype) for each, dtype in zip(expected, types, strict=True))
    torch.testing.assert_close(running, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "magnitude", "eps"),
    [
        (torch.float32, 1e15, 1e-5), (torch.bfloat16, 1e15, 1e-5), (torch.float64, 1e150, 1e-5),
        (torch.float32, 1e-15, 0.0), (torch.bfloat16, 1e-15, 0.0), (torch.float64, 1e-150, 0.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sizes", ["large", "many rows"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_ends_of_the_documented_range(backend, device, dtype, magnitude, eps, sizes, mean):
    """Outputs, gradients and statistics are the reference's, to the roundings of a sum."""
    steps = torch.randn(4, *SIZES[sizes], dtype=torch.float64).clamp(-3, 3) / 4 + mean * 0.25
    x_seq = (steps * magnitude).to(device, dtype)
    grad, found = torch.randn(x_seq.shape).to(x_seq), []
    for name in (backend, "reference"):
        leaf = x_seq.clone().requires_grad_()
        running = [torch.zeros(x_seq.shape[2], dtype=real_of(dtype), device=device) for _ in "12"]
        weight = torch.ones_like(running[0], requires_grad=True)
        s_seq = batch_norm_lif(leaf, *running, weight, training=True, eps=eps, **SMOOTH, backend=name)
        found.append([s_seq, *torch.autograd.grad(s_seq, [leaf, weight], grad), *running])
    place = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for ours, theirs in zip(*found, strict=True):
        assert theirs.isfinite().all()
        assert relative(ours, theirs) <= place


@pytest.mark.parametrize("options", [{"momentum": None}, {}, {"dtype": torch.float64}, {"track_running_stats": False}])
@pytest.mark.parametrize("by_reference", [False, True])
def test_checkpoint_counts_as_for_torch(backend, device, options, by_reference):
    """The last layer of a checkpoint that stops early, behind the update of running statistics."""
    norm, layer = nn.BatchNorm2d(3, **options), asgl_cuda.BatchNormLIF(3, **options)
    layer.backend = "reference" if by_reference else backend
    for each in (norm, layer):
        each.to(device)
    for _ in range(3):
        x_seq = torch.randn(4, 2, 3, 3, 3, device=device, requires_grad=True)
        checkpoint(layer, x_seq, use_reentrant=False).sum().backward()
        checkpoint(
            norm, x_seq.flatten(0, 1).to(options.get("dtype", torch.float32)), use_reentrant=False
        ).sum().backward()
    if options.get("track_running_stats", True):
        assert layer.num_batches_tracked == norm.num_batches_tracked == 6
        torch.testing.assert_close(layer.running_mean, norm.running_mean)
        torch.testing.assert_close(layer.running_var, norm.running_var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.uint8])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_number_of_batches_of_any_type(backend, device, dtype, momentum):
    """As torch takes it, and with the same statistics."""
    found = []
    for kind in (torch.int64, dtype):
        torch.manual_seed(0)
        layer = asgl_cuda.BatchNormLIF(3, momentum=momentum, backend=backend).to(device)
        state = layer.state_dict()
        layer.load_state_dict({**state, "num_batches_tracked": state["num_batches_tracked"].to(kind)}, assign=True)
        for _ in range(3):
            layer(torch.randn(4, 2, 3, device=device))
        assert layer.num_batches_tracked.dtype == kind
        assert layer.num_batches_tracked == 3
        found.append((layer.running_mean, layer.running_var))
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


def test_momentum_is_one_value_of_any_shape(backend, device):
    x_seq = torch.randn(4, 2, 3, 5, device=device)
    found = []
    for momentum in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.full((1, 1), 0.25, dtype=torch.float64)):
        mean, variance = torch.zeros(3, device=device), torch.ones(3, device=device)
        momentum = momentum.to(device) if isinstance(momentum, torch.Tensor) else momentum
        batch_norm_lif(x_seq, mean, variance, training=True, momentum=momentum, backend=backend)
        found.append((mean, variance))
    for mean, variance in found[1:]:
        torch.testing.assert_close((mean, variance), found[0])


# ---- the layer ----


def layers(backend, device, channels=3, dtype=torch.float64, **options):
    norm = nn.BatchNorm2d(channels, **options).to(device, dtype)
    lif = asgl_cuda.LIF(backend=backend, analog_prob=0.0).to(device, dtype)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.0, 1.0)
    layer = asgl_cuda.BatchNormLIF(channels, **options, backend=backend, analog_prob=0.0).to(device, dtype)
    layer.load_state_dict({**norm.state_dict(), **lif.state_dict()})
    return layer, lambda x_seq: lif(norm(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])), norm


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}, {"affine": False},
                                     {"track_running_stats": False}], ids=str)  # fmt: skip
def test_layer_in_training_and_evaluation(backend, device, options):
    """Spikes and running statistics of the pair over several calls, then in evaluation."""
    layer, unfused, norm = layers(backend, device, **options)
    for _ in range(4):
        x_seq = torch.randn(4, 5, 3, 4, 2, dtype=torch.float64, device=device) * 2 + 1
        assert torch.equal(layer(x_seq), unfused(x_seq))
    assert list(layer.state_dict()) == [*(["log_width"]), *norm.state_dict()]
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)
    layer.eval()
    norm.eval()
    x_seq = torch.randn(4, 5, 3, 4, 2, dtype=torch.float64, device=device) * 2 + 1
    assert torch.equal(layer(x_seq), unfused(x_seq))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


def test_updates_count_as_batches_and_as_writes(backend, device):
    layer = asgl_cuda.BatchNormLIF(3, backend=backend).to(device)
    buffers = layer.running_mean, layer.running_var, layer.num_batches_tracked
    versions = [each._version for each in buffers]
    layer(torch.rand(4, 2, 3, device=device))
    assert all(each._version > version for each, version in zip(buffers, versions, strict=True))
    running = layer.running_mean.clone()
    layer(torch.rand(4, 0, 3, device=device))
    assert layer.num_batches_tracked == 2
    layer.track_running_stats = False  # as in torch, from then on
    layer(torch.rand(4, 2, 3, device=device))
    assert torch.equal(layer.running_mean, running)
    assert layer.num_batches_tracked == 2
    layer.reset_running_stats()
    assert (layer.running_mean == 0).all()
    assert (layer.running_var == 1).all()
    assert layer.num_batches_tracked == 0


def test_tdbn(backend, device):
    """Zheng et al. multiply the normalised input by alpha * v_threshold."""
    layer = asgl_cuda.BatchNormLIF(3, v_threshold=0.8, input_scale=0.5 * 0.8, decay=0.0, backend=backend).to(device)
    x_seq = torch.randn(4, 2, 3, 5, device=device)
    output = layer._call_function(x_seq, 0, return_h_seq=True)
    h_seq = output.h_seq.movedim(2, 0).flatten(1)
    torch.testing.assert_close(h_seq.std(dim=1, correction=0), torch.full((3,), 0.4, device=device), rtol=1e-4, atol=0)


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


def test_layers_train_in_inference_mode(backend, device):
    with torch.inference_mode():
        layer = asgl_cuda.BatchNormLIF(3, backend=backend, device=device)
        layer(torch.randn(4, 2, 3, 5, device=device))
    assert layer.num_batches_tracked == 1
    assert layer.running_mean.abs().sum() > 0


def coefficients_arguments(x_seq, source, real):
    channels = x_seq.shape[2]

    def ones():
        return torch.ones(channels, dtype=real, device=x_seq.device)

    statistics = (
        torch.rand(3, channels, 3, dtype=torch.float64, device=x_seq.device) if source == "statistics" else None
    )
    running = (ones(), ones()) if source == "running" else (None, None)
    return (x_seq, statistics, *running, ones(), None, 1e-5, 0.9, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: torch.ones(4)}, "must have shape|expected shape"),
        ({4: torch.ones(3, dtype=torch.float64)}, "must have shape|expected shape"),
        ({2: None}, "mean and variance must be given together"),
        ({8: 9}, "time_dim must be in"),
    ],
)
def test_the_operator_checks_sizes(backend, device, change, message):
    arguments = list(coefficients_arguments(torch.randn(4, 2, 3, 5, device=device), "running", torch.float32))
    for place, value in change.items():
        arguments[place] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises((ValueError, RuntimeError, IndexError), match=message):
        BACKENDS[backend].operators.batch_norm_coefficients(*arguments)


def test_the_operator_that_updates_running_statistics(backend, device):
    """The results and gradients of the one that does not; others' statistics are refused before a write."""
    operators = BACKENDS[backend].operators
    x_seq = torch.randn(4, 2, 3, 5, device=device, requires_grad=True)
    given = coefficients_arguments(x_seq, "x_seq", torch.float32)
    mean, variance = torch.zeros(3, device=device), torch.ones(3, device=device)
    count = torch.tensor(4, device=device)
    results = (
        operators.batch_norm_update(mean, variance, count, 0.25, *given),
        operators.batch_norm_coefficients(*given),
    )
    grads = [torch.autograd.grad(coefficients.square().sum(), x_seq) for coefficients, _ in results]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    (coefficients, _), _ = results
    torch.testing.assert_close(mean, 0.25 * coefficients[0].flatten())
    torch.testing.assert_close(variance, 0.75 + 0.25 * coefficients[3].flatten())
    assert count == 5
    before = mean.clone(), variance.clone()
    for wrong in (variance.double(), torch.ones(4, device=device), torch.ones(6, device=device)[::2]):
        for running in ((mean, wrong), (wrong, variance)):
            with pytest.raises((ValueError, RuntimeError), match="running statistics must be contiguous"):
                operators.batch_norm_update(*running, None, 0.25, *given)
    with pytest.raises((ValueError, RuntimeError), match="num_batches_tracked must be an int64 tensor of one element"):
        operators.batch_norm_update(mean, variance, count.float(), 0.25, *given)
    torch.testing.assert_close((mean, variance), before, rtol=0, atol=0)


def test_the_operator_checks_the_gradient_that_it_writes(backend, device):
    x_seq = torch.randn(4, 2, 3, 5, device=device)
    coefficients, total = BACKENDS[backend].operators.batch_norm_coefficients(
        *coefficients_arguments(x_seq, "x_seq", torch.float32)
    )
    sums = [torch.ones_like(coefficients[0])] * 4
    for wrong in (x_seq.half(), x_seq[:3].clone(), x_seq.movedim(2, -1).contiguous().movedim(-1, 2)):
        for gradients in ((wrong, None), (x_seq.clone(), wrong)):
            with pytest.raises((ValueError, RuntimeError), match="type and memory order of x_seq"):
                BACKENDS[backend].operators.batch_norm_backward(
                    *gradients, x_seq, coefficients, total, *sums, 1e-5, 1.0, 0
                )
