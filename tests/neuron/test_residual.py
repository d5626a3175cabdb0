"""The residual of `lif`, `batch_norm_lif` and their layers: against the reference, and against a sum of tensors."""

import copy

import pytest
import torch
from batch_norm_cases import assert_same, channels_last, make
from comparison import assert_equals_reference, random_input, real_of, rng_state, uniform
from torch import fx, nn

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF, batch_norm_lif, lif

HALF_TYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_TYPES, torch.float32, torch.float64)
SMOOTH = {"surrogate": "sigmoid", "analog_prob": 1.0}
DETACHED = {**SMOOTH, "detach_reset": True}


def like(x_seq, low=-0.5, high=0.5):
    return uniform(*x_seq.shape, low=low, high=high, dtype=x_seq.dtype, device=x_seq.device)


# ---- lif ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_reset", [0.1, None])
@pytest.mark.parametrize("steps", [1, 4, 7, 16, 18, 35])
@pytest.mark.parametrize("neurons", [(4, 68), (5, 33), (1, 1)])
def test_equals_reference(backend, device, dtype, v_reset, steps, neurons):
    x_seq = random_input(steps, *neurons, dtype=dtype, device=device)
    real = real_of(dtype)
    for options in ({"analog_prob": 0.3}, {"residual_gain": 0.3, "detach_reset": True}, {"analog_prob": 1.0}):
        assert_equals_reference(
            x_seq, backend, outputs=("s_seq",), residual=like(x_seq), v_reset=v_reset,
            width=uniform(low=0.7, high=1.5, dtype=real, device=device), rng_state=rng_state(device=device), **options,
        )  # fmt: skip


@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"by_channel": ("input_gain", "input_bias")},
        {"by_channel": ("input_gain", "input_bias", "width", "decay")},
        {"by_channel": ("v_threshold", "width", "decay")},
        {"by_step": ("width", "input_gain")},
        {"by_channel": ("v_threshold",), "scale_output": True, "outputs": ("s_seq", "v_last", "v_seq", "h_seq")},
        {"v_rest": 0.2, "strict_threshold": True, "outputs": ("s_seq", "h_seq")},
        {"v_reset": None, "v_min": -0.2, "by_channel": ("reset_amount",)},
        {"v_reset": None, "multi_spike": True, "analog_prob": 0.0},
    ],
)
def test_equals_reference_with_the_options_of_lif(backend, device, dtype, surrogate, options):
    options = {"analog_prob": 0.3, "rng_state": rng_state(device=device), "residual_gain": 0.5, **options}
    x_seq = random_input(18, 3, 8, 2, 6, dtype=dtype, device=device)
    real = {"low": 0.7, "high": 1.2, "dtype": real_of(dtype), "device": device}
    options |= {name: uniform(8, 1, 1, **real) for name in options.pop("by_channel", ())}
    options |= {name: uniform(18, 1, 1, 1, 1, **real) for name in options.pop("by_step", ())}
    for layout in (x_seq, channels_last(x_seq.detach(), 0).requires_grad_()):
        assert_equals_reference(layout, backend, surrogate=surrogate, residual=like(x_seq), **options)


def test_reference_is_a_sum():
    x_seq = random_input(5, 3, 8, dtype=torch.float64)
    residual, gain = like(x_seq), uniform(8, low=0.5, high=1.5, dtype=torch.float64)
    for residual_gain in (1.0, 0.3, 0.0, -2.0):
        one = lif(x_seq, residual=residual, residual_gain=residual_gain, input_gain=gain, backend="reference", **SMOOTH)
        two = lif(gain * x_seq + residual_gain * residual, backend="reference", **SMOOTH)
        assert torch.equal(one, two)
        leaves, grad = [x_seq, residual, gain], torch.randn_like(one)
        for found, expected in zip(
            torch.autograd.grad(one, leaves, grad), torch.autograd.grad(two, leaves, grad), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wanted", [("x",), ("r",), ("x", "r")])
@pytest.mark.parametrize("input_gain", [1.0, 0.7])
def test_only_wanted_gradients(backend, device, wanted, input_gain):
    x_seq, residual = random_input(4, 3, 8, device=device), random_input(4, 3, 8, device=device)
    options = {"residual_gain": 0.7, "input_gain": input_gain}
    found = {}
    for name in (backend, "reference"):
        x, r = x_seq.detach().clone(), residual.detach().clone()
        leaves = {"x": x, "r": r}
        for each in wanted:
            leaves[each].requires_grad_()
        lif(x, residual=r, **options, backend=name).square().sum().backward()
        found[name] = leaves
    for each, leaf in found[backend].items():
        expected = found["reference"][each].grad
        assert leaf.grad is None if each not in wanted else torch.equal(leaf.grad, expected)


def test_one_gradient_serves_both(backend, device):
    x_seq, residual = random_input(4, 3, 8, device=device), random_input(4, 3, 8, device=device)
    s_seq = lif(x_seq, residual=residual, backend=backend)
    grad_x_seq, grad_residual = torch.autograd.grad(s_seq, [x_seq, residual], torch.ones_like(s_seq))
    assert grad_x_seq.data_ptr() == grad_residual.data_ptr()


# Gradients of the current that float16 can't hold, where it can the result of `residual_gain`: 1e6 and 2e-8.
@pytest.mark.parametrize(("residual_gain", "surrogate_gain"), [(1e-3, 4e6), (1e3, 8e-8)])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("wanted", [("x_seq",), ("residual",), ("x_seq", "residual")])
@pytest.mark.parametrize("options", [{}, {"input_gain": 0.5}, {"v_rest": 0.1}])
def test_the_gradient_is_rounded_after_the_gain(backend, device, dtype, wanted, residual_gain, surrogate_gain, options):
    options = {"residual_gain": residual_gain, "surrogate_gain": surrogate_gain, **options, **DETACHED}
    for steps in (4, 17):
        x_seq = random_input(steps, 4, 68, dtype=dtype, device=device)
        tensors = {"x_seq": x_seq, "residual": like(x_seq) / residual_gain}
        expected = gradients_of(lif, tensors, wanted, torch.float64, backend="reference", **options)
        for name in ("reference", backend):
            found = gradients_of(lif, tensors, wanted, dtype, backend=name, **options)
            for each, right in zip(found, expected, strict=True):
                assert_rounded_once(each, right)


def gradients_of(function, tensors, wanted, dtype, **options):
    """The wanted gradients of the sum of the spikes, computed in `dtype`."""
    given = {name: value.detach().to(dtype).requires_grad_(name in wanted) for name, value in tensors.items()}
    return torch.autograd.grad(function(**given, **options).sum(), [given[name] for name in wanted])


def assert_rounded_once(found, right):
    place, smallest = {torch.float16: (2**-10, 2**-24), torch.bfloat16: (2**-7, 0.0)}[found.dtype]
    torch.testing.assert_close(found.double(), right.to(found.dtype).double(), rtol=place, atol=smallest)


def test_residual_is_x_seq_or_a_view(backend, device):
    x_seq = random_input(4, 3, 8, dtype=torch.float64, device=device)
    for residual in (x_seq, x_seq.flip(0), x_seq.mT.contiguous().mT, x_seq[:1].expand_as(x_seq)):
        one, two = (lif(x_seq, residual=residual, **SMOOTH, backend=backend), lif(x_seq + residual, **SMOOTH))
        torch.testing.assert_close(one, two.to(one.device))
        for found, expected in zip(
            torch.autograd.grad(one.sum(), x_seq, retain_graph=True),
            torch.autograd.grad(two.sum(), x_seq, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("function", [lif, batch_norm_lif])
@pytest.mark.parametrize("residual_gain", [1.0, 0.7])
def test_gradcheck(function, residual_gain):
    x_seq = random_input(3, 2, 2, 3, dtype=torch.float64)
    options = {"training": True} if function is batch_norm_lif else {"input_gain": 0.8}

    def spikes(x_seq, residual):
        return function(x_seq, residual=residual, residual_gain=residual_gain, width=2.0, **options, **SMOOTH)

    assert torch.autograd.gradcheck(spikes, (x_seq, like(x_seq)))
    assert torch.autograd.gradcheck(lambda x_seq: spikes(x_seq, x_seq), (x_seq,))


def test_residual_changed_in_place_before_backward_is_an_error(backend, device):
    x_seq, residual = random_input(4, 3, 8, device=device), torch.zeros(4, 3, 8, device=device)
    s_seq = lif(x_seq, residual=residual, backend=backend)
    residual += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        s_seq.sum().backward()


def test_empty_batch(backend, device):
    x_seq, residual = (torch.zeros(4, 0, 3, device=device, requires_grad=True) for _ in range(2))
    for function, options in ((lif, {}), (batch_norm_lif, {"training": True, "residual_gain": 0.5})):
        s_seq = function(x_seq, residual=residual, **options, backend=backend)
        grads = torch.autograd.grad(s_seq.sum(), [x_seq, residual])
        assert [list(grad.shape) for grad in grads] == [[4, 0, 3]] * 2


X = torch.zeros(4, 3, 8)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"residual must have x_seq's shape \[4, 3, 8\], got \[3, 8\]", {"residual": X[0]}),
        (ValueError, r"got \[4, 1, 8\]; residual.expand_as\(x_seq\)", {"residual": X[:, :1]}),
        (TypeError, "residual must have x_seq's type torch.float32, got torch.float16", {"residual": X.half()}),
        (TypeError, "residual must be a tensor or None, got float", {"residual": 1.0}),
        (TypeError, "residual must be a dense tensor", {"residual": X.to_sparse()}),
        (ValueError, "residual must be on cpu as x_seq, got meta", {"residual": X.to("meta")}),
        (TypeError, "residual_gain must be a float", {"residual": X, "residual_gain": "one"}),
        (ValueError, "residual_gain must be a number", {"residual": X, "residual_gain": float("nan")}),
    ],
)
def test_errors(error, message, options):
    for call in (lambda: lif(X, **options), lambda: batch_norm_lif(X, training=True, **options)):
        with pytest.raises(error, match=message):
            call()


# ---- batch_norm_lif ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", ["images", "vectors", "large", "batch first", "time last", "many channels"])
def test_normalised_equals_reference(backend, device, name, layout, dtype, training):
    x_seq, time_dim, arguments = make(name, dtype, device, layout)
    for residual_gain in (1.0, 0.7):
        assert_same(
            x_seq, time_dim, arguments, backend, training=training, analog_prob=0.3, residual=like(x_seq),
            residual_gain=residual_gain, width=1.3,
        )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_equals_batch_norm_a_sum_and_lif(backend, device, dtype, training):
    x_seq, time_dim, arguments = make("images", dtype, device)

    def apart(x_seq, running_mean, running_var, weight, bias, residual, residual_gain, training, **options):
        normalised = nn.functional.batch_norm(
            x_seq.flatten(0, 1), running_mean, running_var, weight, bias, training, 0.1
        )
        return lif(normalised.view_as(x_seq) + residual_gain * residual, **options)

    assert_same(
        x_seq, time_dim, arguments, backend, apart, training=training, residual=like(x_seq), residual_gain=0.7,
        same=1e-5 if dtype is torch.float32 else 1e-12, analog_prob=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "wanted", [("x_seq",), ("residual",), ("weight",), ("x_seq", "residual"), ("residual", "bias")]
)
def test_any_gradients_alone(backend, device, training, wanted):
    x_seq, _, arguments = make("images", torch.float64, device)
    tensors = {"x_seq": x_seq, "residual": like(x_seq), **arguments}

    def gradients(names, backend):
        given = {name: value.detach().clone().requires_grad_(name in names) for name, value in tensors.items()}
        s_seq = batch_norm_lif(**given, residual_gain=0.7, training=training, backend=backend, **SMOOTH)
        return torch.autograd.grad(s_seq.square().sum(), [given[name] for name in wanted])

    everything = gradients(("x_seq", "residual", "weight", "bias"), "reference")
    for found, expected in zip(gradients(wanted, backend), everything, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("values", [2, 3, 5])
def test_half_types_with_few_values_a_channel(backend, device, values):
    x_seq = torch.randn(values, 1, 3, device=device).half().requires_grad_()
    residual = like(x_seq)
    s_seq = batch_norm_lif(x_seq, training=True, residual=residual, residual_gain=0.5, backend=backend, **SMOOTH)
    grads = torch.autograd.grad(s_seq.sum(), [x_seq, residual])
    assert {value.dtype for value in (s_seq, *grads)} == {torch.float16}


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("wanted", [("x_seq",), ("residual",), ("x_seq", "residual")])
@pytest.mark.parametrize(
    ("deviation", "surrogate_gain", "residual_gain"),
    [(1e-3, 1e-8, 1), (1e-3, 1e-8, 1e3), (100, 1e6, 1), (100, 1e6, 1e-3)],
)
def test_half_gradients_are_as_without_a_residual(
    backend, device, dtype, wanted, deviation, surrogate_gain, residual_gain
):
    x_seq = deviation * torch.randn(4, 8, 3, 5, 4, device=device)
    tensors = {"x_seq": x_seq.to(dtype), "residual": torch.zeros_like(x_seq, dtype=dtype)}
    options = {"training": True, "surrogate_gain": surrogate_gain, **DETACHED}
    right = {"backend": "reference", "residual_gain": residual_gain}
    expected = dict(
        zip(wanted, gradients_of(batch_norm_lif, tensors, wanted, torch.float64, **right, **options), strict=True)
    )
    for name in ("reference", backend):
        gained = {"backend": name, "residual_gain": residual_gain, **options}
        found = dict(zip(wanted, gradients_of(batch_norm_lif, tensors, wanted, dtype, **gained), strict=True))
        if "residual" in wanted:
            assert_rounded_once(found["residual"], expected["residual"])
        if "x_seq" in wanted:
            alone = {"x_seq": tensors["x_seq"]}
            (without,) = gradients_of(batch_norm_lif, alone, ["x_seq"], dtype, backend=name, **options)
            error, allowed = (float((each.double() - expected["x_seq"]).norm()) for each in (found["x_seq"], without))
            assert error <= 1.5 * allowed


def test_bytes_kept_for_backward(backend, device):
    """Inputs and residual, no sum and no normalised tensor."""
    x_seq = torch.randn(4, 2, 3, 32, 32, device=device, requires_grad=True)
    residual = torch.randn_like(x_seq)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        batch_norm_lif(x_seq, training=True, residual=residual, backend=backend)
    assert sum(each.numel() for each in kept if each.numel() >= x_seq.numel()) == 2 * x_seq.numel()


# ---- layers and transforms ----


@pytest.mark.parametrize(
    "layer", [LIF(input_gain=0.5), BatchNormLIF(3), BatchNormLIF(3, input_scale=0.5), LIF(stateful=True)]
)
def test_layer(layer):
    layer = copy.deepcopy(layer).double().eval()
    x_seq, residual = random_input(4, 2, 3, 5, dtype=torch.float64), random_input(4, 2, 3, 5, dtype=torch.float64)
    if isinstance(layer, BatchNormLIF):
        apart = LIF().double().eval()
        expected = apart(layer.input_scale * x_seq / (1 + layer.eps) ** 0.5 + residual)
    else:
        expected = copy.deepcopy(layer)(x_seq + residual)
    torch.testing.assert_close(layer(x_seq, residual), expected)
    if layer.stateful:
        assert layer.v is not None
    assert torch.equal(copy.deepcopy(layer)(x_seq, residual=residual), copy.deepcopy(layer)(x_seq, residual))


class Block(nn.Module):
    """Two layers and a shortcut."""

    def __init__(self):
        super().__init__()
        self.first, self.second = BatchNormLIF(3, analog_prob=0.0), BatchNormLIF(3, analog_prob=0.0)

    def forward(self, x_seq):
        return self.second(self.first(x_seq), x_seq)


def test_recorded_by_fx():
    block, x_seq = Block(), torch.randn(4, 2, 3, 5)
    tracer = type("Tracer", (fx.Tracer,), {"is_leaf_module": lambda self, module, name: isinstance(module, LIF)})()
    graph = fx.GraphModule(block, tracer.trace(block))
    assert torch.equal(graph(x_seq), block(x_seq))


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    block, x_seq = Block().train(training), torch.randn(4, 2, 3, 5, requires_grad=True)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    grads = []
    for model in (block, compiled):
        s_seq = model(x_seq)
        grads.append((s_seq, torch.autograd.grad(s_seq.sum(), x_seq)[0]))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("function", [lif, batch_norm_lif])
def test_vmap(backend, device, function, dims):
    samples = random_input(5, 4, 2, 3, dtype=torch.float64, device=device).detach()
    others = like(samples).detach()
    x_seq, residual = (value if dim == 0 else value[0] for value, dim in zip((samples, others), dims, strict=True))
    options = {"training": True} if function is batch_norm_lif else {"input_gain": 0.7}

    def gradients(x_seq, residual):
        def spikes(x_seq, residual):
            return function(x_seq, residual=residual, residual_gain=0.5, backend=backend, **options, **SMOOTH).sum()

        return torch.func.grad(spikes, (0, 1))(x_seq, residual)

    mapped = torch.func.vmap(gradients, dims)(x_seq, residual)
    for index in range(5):
        one = gradients(
            *(value[index] if dim == 0 else value for value, dim in zip((x_seq, residual), dims, strict=True))
        )
        for found, expected in zip(mapped, one, strict=True):
            torch.testing.assert_close(found[index], expected)


def test_a_network_of_residual_blocks_learns():
    torch.manual_seed(0)
    images = torch.rand(64, 16)
    labels = (images[:, :8].sum(1) > images[:, 8:].sum(1)).long()
    weights = [nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 2)]
    neurons = [asgl_cuda.BatchNormLIF(32), asgl_cuda.BatchNormLIF(32)]
    model = nn.ModuleList([*weights, *neurons])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        h = neurons[0](weights[0](images.expand(4, 64, 16)))
        h = neurons[1](weights[1](h), h)
        loss = nn.functional.cross_entropy(weights[2](h).mean(0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
