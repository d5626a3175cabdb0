"""torch.func around the function and the layers: vmap, grad, vjp and jacrev give the results of a loop over samples.

Samples computed together have the bits of samples computed alone; sums of gradients may be in another order, and are
compared as in comparison.py.
"""

import copy
from functools import partial

import pytest
import torch
from comparison import rng_state
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import asgl_cuda

SAMPLES = 3


def inputs(steps, device, *shape):
    return torch.rand(SAMPLES, steps, *(shape or (5, 7)), device=device) * 3 - 1


def weights(like):
    """A different weight for each element of the output."""
    return torch.linspace(-1, 2, like.numel(), device=like.device).reshape(like.shape)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def looped(function, *arguments):
    """`function` on each sample; shared arguments are given as 1-tuples."""
    of_samples = (
        [each[0] if isinstance(each, tuple) else each[index] for each in arguments] for index in range(SAMPLES)
    )
    results = [function(*sample) for sample in of_samples]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results)
    return tuple(torch.stack(each) for each in zip(*results, strict=True))


def test_where_the_mapped_dimension_is(backend, device):
    x_seq = inputs(36, device)
    width = torch.rand(SAMPLES, device=device) + 0.5

    def function(x_seq, width):
        return asgl_cuda.lif(x_seq, width=width, analog_prob=1.0, backend=backend)

    expected = looped(function, x_seq, width)
    for dim in range(1, 4):
        assert torch.equal(vmap(function, (dim, 0))(x_seq.movedim(0, dim), width), expected)
        assert torch.equal(vmap(function, (dim, 0), dim)(x_seq.movedim(0, dim), width), expected.movedim(0, dim))
    assert torch.equal(vmap(function, (None, 0))(x_seq[0], width), looped(function, (x_seq[0],), width))
    batch_first = vmap(lambda x: asgl_cuda.lif(x, time_dim=1, backend=backend))(x_seq.transpose(1, 2))
    assert torch.equal(batch_first.transpose(1, 2), looped(lambda x: asgl_cuda.lif(x, backend=backend), x_seq))


def test_one_launch_serves_all_samples(emulation):
    def loss(x_seq):
        return asgl_cuda.lif(x_seq, analog_prob=0.5, backend="emulated").sum()

    vmap(grad(loss), randomness="different")(inputs(4, "cpu"))
    assert len(emulation.take_launches()) == 2  # forward and backward


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("name", [None, "reference"])
def test_noise(backend, device, name, generator):
    backend = name or backend
    x_seq = torch.full((SAMPLES, 20, 500), 0.8, device=device)
    source = torch.Generator(device).manual_seed(1) if generator else None

    def function(x_seq):
        return asgl_cuda.lif(x_seq, analog_prob=0.25, v_threshold=10.0, width=30.0, generator=source, backend=backend)

    def loss(x_seq):
        return function(x_seq).square().sum()

    same = vmap(function, randomness="same")(x_seq)
    assert torch.equal(same[0], same[1])
    assert (same > 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    different = vmap(function, randomness="different")(x_seq) > 0
    for i in range(SAMPLES):
        assert different[i].float().mean().item() == pytest.approx(0.25, abs=0.02)
        both = (different[i] & different[i - 1]).float().mean().item()
        assert both == pytest.approx(1 / 16, abs=0.01)  # independent
    gradients = vmap(grad(loss), randomness="different")(x_seq)
    assert not torch.equal(gradients[0], gradients[1])
    # The gradient flows where elements of the same call were analog.
    s_seq, pull = vjp(vmap(function, randomness="different"), x_seq)
    (gradient,) = pull(s_seq)
    assert torch.equal(gradient[:, -1] > 0, s_seq[:, -1] > 0)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(function)(x_seq)
    mixed = vmap(vmap(function, randomness="same"), randomness="different")(torch.stack([x_seq, x_seq]))
    assert torch.equal(mixed[0, 0], mixed[0, 1])
    assert not torch.equal(mixed[0, 0], mixed[1, 0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_noise_that_is_given_is_that_of_each_sample_alone(backend, device, layout):
    x_seq = inputs(4, device, 2, 3, 4, 5)
    if layout == "channels_last":
        x_seq = x_seq.movedim(3, -1).contiguous().movedim(-1, 3)
    states = torch.stack([rng_state(seed, device=device) for seed in range(SAMPLES)])

    def function(x_seq, state):
        return asgl_cuda.lif(x_seq, analog_prob=0.5, rng_state=state, width=5.0, backend=backend)

    def gradient(x_seq, state):
        return grad(lambda x: function(x, state).square().sum())(x_seq)

    for each in (function, gradient):
        assert torch.equal(vmap(each, (0, None))(x_seq, states[1]), looped(each, x_seq, (states[1],)))
        assert torch.equal(vmap(each)(x_seq, states), looped(each, x_seq, states))


MODELS = {
    "LIF": lambda **options: asgl_cuda.LIF(learn_decay=True, learn_threshold=True, **options),
    "by channel": lambda **options: asgl_cuda.LIF(8, granularity="channel", learn_decay=True, **options),
    "by channel of images": lambda **options: nn.Sequential(
        nn.Unflatten(-1, (4, 2)), asgl_cuda.LIF(4, granularity="channel", learn_decay=True, **options)
    ),
    "normalised": lambda **options: asgl_cuda.BatchNormLIF(8, granularity="channel", **options),
    "recurrent": lambda **options: asgl_cuda.RecurrentLIF(8, **options),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_ensembles_and_gradients_of_each_sample(backend, device, make):
    """Models by stack_module_state, with their running statistics; then one model in evaluation."""
    options = {"analog_prob": 0.0, "surrogate": "sigmoid", "backend": backend}
    ensemble = [nn.Sequential(nn.Linear(6, 8), make(**options)).to(device) for _ in range(SAMPLES)]
    state, base = stack_module_state(copy.deepcopy(ensemble)), copy.deepcopy(ensemble[0]).to("meta")
    x_seq = torch.randn(20, SAMPLES, 6, device=device)

    def loss(parameters, buffers, x_seq, model=base):
        s_seq = functional_call(model, (parameters, buffers), (x_seq,))
        return (s_seq * weights(s_seq)).sum()

    def assert_gradients(found, index, model, x_seq):
        s_seq = model(x_seq)
        expected = torch.autograd.grad((s_seq * weights(s_seq)).sum(), list(model.parameters()))
        for each, other in zip(found.values(), expected, strict=True):
            # Sums of some hundred float32 terms cancel: the tolerance is a share of the largest.
            atol = 1e-5 * other.abs().max().item() + 1e-5
            torch.testing.assert_close(each[index], other, rtol=1e-4, atol=atol)

    gradients = vmap(grad(loss), (0, 0, None))(*state, x_seq)
    for index, model in enumerate(ensemble):
        assert_gradients(gradients, index, model, x_seq)
    for name, buffer in state[1].items():
        close(buffer, torch.stack([dict(model.named_buffers())[name] for model in ensemble]))
    model = ensemble[0].eval()
    own = dict(model.named_parameters()), dict(model.named_buffers())
    gradients = vmap(grad(lambda *given: loss(*given, model=model)), (None, None, 1))(*own, x_seq[:, :, None])
    for index in range(SAMPLES):
        assert_gradients(gradients, index, model, x_seq[:, index, None])


# Those that traced code and derivatives of the reference treat apart.
RULES = {
    "single": {"surrogate": "sigmoid", "surrogate_gain": 0.6, "strict_threshold": True, "scale_output": True},
    "detached": {"surrogate": "arctan", "surrogate_gain": 1.7, "detach_reset": True, "v_min": 0.1, "v_threshold": 0.8},
    "several": {
        "surrogate": "periodic_exponential", "surrogate_gain": 0.6, "multi_spike": True, "v_reset": None,
        "v_threshold": 0.4, "reset_amount": 0.3,
    },
    "levels": {"levels": 3, "surrogate_gain": 0.6, "v_reset": None, "v_threshold": 0.4},
}  # fmt: skip


def forward_modes(function, x_seq):
    """Every way to ask for a forward derivative, also of a gradient and around vmap."""

    def dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x_seq, x_seq))).tangent

    return {
        "dual": dual,
        "jvp": lambda: jvp(function, (x_seq,), (x_seq,))[1],
        "jvp of vmap": lambda: jvp(vmap(function, 1, 1), (x_seq,), (x_seq,))[1],
        "vmap of jvp": lambda: vmap(lambda x: jvp(function, (x,), (x,))[1], 1, 1)(x_seq),
        "jacfwd": lambda: torch.einsum("abcdef,def->abc", jacfwd(function)(x_seq), x_seq),
        "hessian": lambda: hessian(lambda x: function(x).square().sum())(x_seq),
    }


def test_forward_mode(backend, device):
    """Refused with the remedy, and the remedy works: silent zeros would go unnoticed."""
    x_seq = torch.rand(4, 2, 3, device=device) * 2
    ours, function = (partial(asgl_cuda.lif, **RULES["single"], backend=name) for name in (backend, "reference"))
    for call in forward_modes(ours, x_seq).values():
        with pytest.raises(RuntimeError, match=r"forward-mode .* backend='reference', which has both"):
            call()
    expected = torch.einsum("abcdef,def->abc", jacrev(function)(x_seq), x_seq)
    assert expected.abs().max() > 0.1
    for name, call in forward_modes(function, x_seq).items():
        if name != "hessian" and "vmap" not in name:
            close(call(), expected)
    assert forward_modes(function, x_seq)["hessian"]().abs().max() > 0.01


@pytest.mark.parametrize(("name", "rules"), [(None, "single"), *(("reference", rules) for rules in RULES)], ids=str)
def test_compiled(backend, device, name, rules):
    """torch.compile around the transforms gives the same gradients, not zeros."""
    torch._dynamo.reset()
    x_seq = inputs(3, device, 2, 3)

    def loss(x_seq):
        return (asgl_cuda.lif(x_seq, **RULES[rules], backend=name or backend) * weights(x_seq)).sum()

    def function(x_seq):
        return torch.stack([vmap(grad(loss))(x_seq), grad(lambda x: vmap(loss)(x).sum())(x_seq)])

    expected = function(x_seq)
    assert expected.abs().max() > 0
    close(torch.compile(function, backend="aot_eager")(x_seq), expected)
    torch._dynamo.reset()


def test_what_is_not_kept_under_transforms():
    for kind, option in (("LIF", "stateful"), ("LIF", "store_v_seq"), ("LeakyIntegrator", "stateful")):
        layer = getattr(asgl_cuda, kind)(**{option: True})
        words = rf"asgl_cuda\.{kind}: .* a layer keeps potentials, which it can't do inside a transform"
        with pytest.raises(RuntimeError, match=words):
            vmap(layer, randomness="same")(torch.rand(3, 4, 5))
        assert layer.v is None
    layer = asgl_cuda.LIF(analog_prob=0.0)
    with asgl_cuda.Monitor(layer) as monitor:
        assert vmap(grad(lambda x: layer(x).sum()))(torch.rand(3, 4, 5)).shape == (3, 4, 5)
    assert list(monitor.result()[""]) == ["width"]


def noisy(backend, v_threshold):
    """The derivative with respect to the threshold is the output, under the same noise."""
    options = {"scale_output": True, "analog_prob": 0.5, "surrogate": "sigmoid", "width": 1e6, "decay": 0.0}
    return lambda a: asgl_cuda.lif(a, v_threshold=v_threshold, backend=backend, **options)


def test_backward_has_the_noise_of_forward_whatever_is_mapped_beside(backend, device):
    """Mapped cotangents must not renumber the neurons."""
    x_seq = torch.full((SAMPLES, 20, 9), 0.3, device=device)
    one = torch.ones((), device=device)

    def value_and_derivative(a):
        s_seq, pull = vjp(lambda v_threshold: noisy(backend, v_threshold)(a), one)
        basis = torch.eye(a.numel(), device=device).reshape(-1, *a.shape)
        return s_seq, vmap(pull)(basis)[0].reshape(a.shape)

    s_seq, derivative = vmap(value_and_derivative, randomness="different")(x_seq)
    assert 0.3 < (s_seq > 0).float().mean() < 0.7
    close(derivative, s_seq)
    outside, pull = vjp(lambda v: vmap(noisy(backend, v), randomness="different")(x_seq), one)
    basis = torch.eye(outside.numel(), device=device).reshape(-1, *outside.shape)
    close(vmap(pull)(basis)[0].reshape(outside.shape), outside)


def test_samples_differ_where_only_the_noise_is_mapped(backend, device):
    x_seq = torch.full((4, 200), 0.3, device=device)

    def function(a):
        return (
            asgl_cuda.lif(x_seq, analog_prob=0.5, width=1e6, v_threshold=10.0, surrogate="sigmoid", backend=backend) + a
        )

    found = vmap(vmap(function, randomness="different"), randomness="different")(torch.zeros(2, 3, device=device))
    rows = found.flatten(0, 1).flatten(1).unique(dim=0)
    assert len(rows) == 6


def test_statistics_where_the_cotangent_is_mapped_further(backend, device):
    x_seq = torch.rand(2, 4, 3, 2, device=device)

    def function(name):
        return lambda x: asgl_cuda.batch_norm_lif(x, training=True, surrogate="sigmoid", backend=name)

    expected = jacrev(vmap(function("reference")))(x_seq)
    torch.testing.assert_close(jacrev(vmap(function(backend)))(x_seq), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [None, "reference"])
def test_running_statistics_under_transforms(backend, device, name):
    """Updated where they are arguments; refused where a transform would lose the update."""
    x_seq = inputs(4, device, 3, 2)

    def function(x_seq, mean, variance):
        return asgl_cuda.batch_norm_lif(x_seq, mean, variance, training=True, backend=name or backend).sum()

    mean, variance = torch.zeros(SAMPLES, 2, device=device), torch.ones(SAMPLES, 2, device=device)
    for refused in (
        lambda: vmap(function, (0, None, None))(x_seq, mean[0], variance[0]),
        lambda: grad(lambda x_seq: function(x_seq, mean[0], variance[0]))(x_seq[0]),
        lambda: grad(lambda x_seq: vmap(function)(x_seq, mean, variance).sum())(x_seq),
    ):
        with pytest.raises(RuntimeError, match=r"asgl_cuda\.batch_norm_lif: running statistics are updated"):
            refused()
    expanded = (each[:1].expand(SAMPLES, 2) for each in (mean, variance))
    with pytest.raises(RuntimeError, match=r"asgl_cuda\.batch_norm_lif: .* Clone statistics that are expanded tensors"):
        vmap(function)(x_seq, *expanded)
    layer = asgl_cuda.BatchNormLIF(2, analog_prob=0.0, backend=name or backend).to(device)
    buffers = {name: each.expand(SAMPLES, *each.shape).clone() for name, each in layer.named_buffers()}
    buffers["num_batches_tracked"] = layer.num_batches_tracked.expand(SAMPLES)
    with pytest.raises(RuntimeError, match=r"asgl_cuda\.batch_norm_lif: .* Clone statistics that are expanded"):
        vmap(lambda *given: functional_call(layer, *given))(buffers, x_seq)
    assert not mean.any()
    grad(lambda *arguments: vmap(function)(*arguments).sum())(x_seq, mean, variance)
    expected = torch.zeros_like(mean), torch.ones_like(variance)
    looped(function, x_seq, *expected)
    close((mean, variance), expected)


@pytest.mark.parametrize("state", [False, True])
def test_no_samples(backend, device, state):
    options = {"analog_prob": 0.5, "rng_state": rng_state(device=device)} if state else {}
    function = lambda x: asgl_cuda.lif(x, backend=backend, **options)  # noqa: E731
    x_seq = torch.rand(0, 4, 3, device=device)
    assert vmap(function)(x_seq).shape == x_seq.shape
    assert vmap(grad(lambda x: function(x).sum()))(x_seq).shape == x_seq.shape


@pytest.mark.traced
def test_forward_mode_is_not_lost_in_compiled_code(backend, device):
    torch._dynamo.reset()
    x_seq = torch.rand(4, 3, device=device)

    def function(x, name="reference"):
        return asgl_cuda.lif(x, **RULES["detached"], backend=name)

    def tangents(function):
        """By jvp inside the compiled code, and by a dual tensor that enters it."""
        compiled = torch.compile(function, backend="aot_eager")

        def of_dual():
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(compiled(forward_ad.make_dual(x_seq, x_seq))).tangent

        inside = torch.compile(lambda x: jvp(function, (x,), (x,))[1], backend="aot_eager")
        return lambda: inside(x_seq), of_dual

    for tangent in tangents(function):
        close(tangent(), jvp(function, (x_seq,), (x_seq,))[1])
    for tangent in tangents(partial(function, name=backend)):
        with pytest.raises(RuntimeError, match=r"forward-mode"):
            tangent()
    torch._dynamo.reset()
