"""BatchNormLIF under torch's features, and its errors."""

import copy
import itertools
import pickle

import pytest
import torch
from batch_norm_cases import assert_same, channels_last, make
from comparison import real_of
from torch import nn

import asgl_cuda
from asgl_cuda import batch_norm_lif
from asgl_cuda.backends import BACKENDS


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
    """Spikes and running statistics of the pair over several calls, then in evaluation."""
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
    """In evaluation, two parts of a sequence equal the whole."""
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
    """Half weights, as after .half(), are widened to float32."""
    layer = asgl_cuda.BatchNormLIF(3, backend=backend).to(device).half()
    x_seq = torch.randn(4, 2, 3, 5, device=device).half().requires_grad_()
    layer(x_seq).sum().backward()
    assert layer.weight.grad.dtype == torch.float16
    assert layer.running_mean.dtype == torch.float16
    assert x_seq.grad.dtype == torch.float16


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("sizes", "order"),
    [((1, 4, 3, 8), (1, 0, 2, 3)), ((4, 2, 1, 1, 3), (0, 1, 4, 2, 3))],
    ids=["batch of 1", "features of 1 x 1"],
)
def test_strides_of_dimensions_of_one_element(backend, device, sizes, order, compiled):
    """A gradient whose strides differ only in dimensions of one element has the layout of x_seq."""
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
    sums = [torch.rand_like(coefficients[0]) for _ in range(4)]
    gradients = (torch.zeros_like(x_seq), None), (x_seq.new_empty(0), None), (torch.zeros_like(x_seq), x_seq.clone())
    for pair in gradients:
        arguments = (*pair, x_seq, coefficients, total, *sums, 1e-5, 0.9, 0)
        torch.library.opcheck(operators.batch_norm_backward, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({5: torch.ones(4)}, "must have shape|expected shape"),
        ({4: torch.ones(3, dtype=torch.float64)}, "must have shape|expected shape"),
        ({2: None}, "mean and variance come together"),
        ({8: 9}, "time_dim must be in"),
    ],
)
def test_the_operator_checks_sizes(backend, device, change, message):
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
    sums = [torch.ones_like(coefficients[0])] * 4
    for wrong in (x_seq.half(), x_seq[:3].clone(), channels_last(x_seq, 0)):
        for gradients in ((wrong, None), (x_seq.clone(), wrong)):
            with pytest.raises((ValueError, RuntimeError), match="type and memory order of x_seq"):
                BACKENDS[backend].operators.batch_norm_backward(
                    *gradients, x_seq, coefficients, total, *sums, 1e-5, 1.0, 0
                )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_whole_block_is_one_graph(backend, device, fused, training):
    """A convolution, the normalisation and the neurons compile together: no call breaks the graph."""
    torch._dynamo.reset()
    neurons = {"learn_decay": True, "learn_threshold": True, "backend": backend}
    apart = [asgl_cuda.OverTime(nn.BatchNorm2d(3)), asgl_cuda.LIF(**neurons)]
    behind = [asgl_cuda.BatchNormLIF(3, **neurons)] if fused else apart
    block = nn.Sequential(asgl_cuda.OverTime(nn.Conv2d(2, 3, 3)), *behind).to(device).train(training)
    x_seq = torch.randn(4, 2, 2, 6, 6, device=device)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    expected = block(x_seq)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x_seq), expected)


def test_compile(backend, device):
    """One graph with the same spikes, gradients and running statistics; the second batch size makes it dynamic."""
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
        ({"training": True, "eps": -1.0}, ValueError, "batch_norm_lif: eps must be >= 0, got -1.0"),
        ({"training": True, "eps": float("inf")}, ValueError, "eps must be finite, got inf"),
        ({"training": True, "momentum": float("inf")}, ValueError, "momentum must be finite, got inf"),
        ({"training": True, "momentum": torch.tensor(float("nan"))}, ValueError, "momentum must be finite, got nan"),
        ({"training": True, "momentum": torch.ones(2)}, ValueError, r"momentum .* tensor of one value, .* shape \[2\]"),
        ({"training": True, "momentum": torch.ones(())[None][:0]}, ValueError, r"momentum .* shape \[0\]"),
        ({"training": True, "momentum": torch.tensor(1j)}, TypeError, "momentum must be of a floating type"),
        ({"training": True, "momentum": torch.ones((), device="meta")}, ValueError, "momentum must be on cpu .* meta"),
        ({"training": True, "weight": torch.ones(3).to_sparse()}, TypeError, "weight must be a dense tensor"),
        ({"training": True, "process_group": [1, 2]}, TypeError, r"process_group must be .*, got \[1, 2\]"),
    ],
)
def test_errors(arguments, error, message):
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        batch_norm_lif(torch.randn(4, 2, 3, 5, generator=torch.Generator()), **arguments, analog_prob=0.2)
    assert torch.equal(torch.get_rng_state(), before)


BOTH = torch.ones(6)
# Mean and variance of 3 channels, and words of the error.
RUNNING = {
    "an expanded mean": lambda: (torch.zeros(1).expand(3), torch.ones(3), "running_mean .* expanded"),
    "an expanded variance": lambda: (torch.zeros(3), torch.ones(1).expand(3), "running_var .* expanded"),
    "the same twice": lambda: (BOTH[:3], BOTH[:3], "running_mean and running_var .* must not share memory"),
    "one behind the other": lambda: (BOTH[:3], BOTH[2:5], "must not share memory"),
    "every second": lambda: (BOTH[:5:2], BOTH[:3], "must not share memory"),
    "a mean that learns": lambda: (torch.zeros(3).requires_grad_(), torch.ones(3), "running_mean has no gradient"),
    "a variance that learns": lambda: (torch.zeros(3), torch.ones(3).requires_grad_(), "running_var has no gradient"),
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


def test_running_statistics_of_one_memory(backend, device):
    """Rows and columns of one tensor are written independently."""
    x_seq = torch.randn(4, 2, 3, 5, device=device)
    expected = torch.zeros(3, device=device), torch.ones(3, device=device)
    batch_norm_lif(x_seq, *expected, training=True, backend=backend)
    rows = torch.tensor([[0.0] * 3, [1.0] * 3], device=device)
    columns = rows.T.contiguous()
    for mean, variance in (rows, columns.unbind(1)):
        batch_norm_lif(x_seq, mean, variance, training=True, backend=backend)
        assert torch.equal(mean, expected[0])
        assert torch.equal(variance, expected[1])


def test_layers_train_in_inference_mode(backend, device):
    with torch.inference_mode():
        layer = asgl_cuda.BatchNormLIF(3, backend=backend, device=device)
        layer(torch.randn(4, 2, 3, 5, device=device))
    assert layer.num_batches_tracked == 1
    assert layer.running_mean.abs().sum() > 0


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
