"""Surrogates that are none of asgl_cuda's, and several spikes a step, in float64 against the libraries' own layers."""

import copy
import itertools
import pickle

import pytest
import snntorch
import torch
from conversions import CALLS, SHAPE, assert_alike, reset, steps
from sinabs import activation, layers
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import layer as jelly
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import asgl_cuda
from asgl_cuda.interop.snntorch import MultiStep

OWN, FLAT = "its own surrogate, outside of the kernel", "slope 1 everywhere"


@pytest.fixture
def spikes_in_float64(monkeypatch):
    """Spikes of snnTorch and sinabs are float32, and round gradients that pass through them."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def results(layer, run, x, weights, training):
    """Outputs of several calls with states carried over, and all gradients."""
    layer.double().train(training)
    leaves = [each.clone().requires_grad_() for each in x]
    outputs = [output for leaf in leaves for output in run(layer, leaf)]
    loss = sum((output * weight).sum() for output, weight in zip(outputs, itertools.cycle(weights), strict=False))
    leaves += [value for _, value in sorted(layer.named_parameters()) if value.requires_grad]
    return outputs, torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_equal(make, run, by, training=True, scale=2.0, wrap=lambda layer: layer):
    """The layer converts, described as `by`, with spikes equal and states and gradients within 1e-12."""
    layer, (converted, report) = make(), asgl_cuda.convert(make(), inplace=True)
    assert [row.by for row in report.replaced] == [by], report
    torch.manual_seed(0)
    x = [scale * torch.randn(SHAPE, dtype=torch.float64) for _ in range(CALLS)]
    weights = torch.randn(3, *SHAPE, dtype=torch.float64)
    expected, gradients = results(layer, run, x, weights, training)
    found, ours = results(wrap(converted), run, x, weights, training)
    spikes = expected[0]
    assert 0.02 < (spikes != 0).double().mean() < 0.98
    assert torch.equal(found[0], spikes)
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, gradients, rtol=1e-12, atol=1e-12)
    assert all(gradient is None or gradient.any() for gradient in gradients[:CALLS])
    reset(layer), reset(converted)
    return converted


# ---- snnTorch, whose resets are detached ----

SPIKE_GRADS = {
    "straight through": (snn_surrogate.straight_through_estimator(), FLAT),
    "spike rate escape": (snn_surrogate.spike_rate_escape(beta=1.3, slope=2.0), OWN),
    "triangular": (snn_surrogate.triangular(threshold=0.7), OWN),
    "heaviside": (snn_surrogate.heaviside(), OWN),
    "sparse": (snn_surrogate.SFS(slope=3, B=-0.4), OWN),
    "custom": (snn_surrogate.custom_surrogate(lambda u, grad, spikes: grad * (1 - u.tanh() ** 2) * u.cos()), OWN),
}
LEAKY = {
    "subtract": lambda **more: snntorch.Leaky(beta=0.8, threshold=0.9, **more),
    "learned": lambda **more: snntorch.Leaky(beta=0.8, learn_beta=True, learn_threshold=True, **more),
    "zero": lambda **more: snntorch.Leaky(beta=0.7, reset_mechanism="zero", **more),
    "none": lambda **more: snntorch.Leaky(beta=0.7, reset_mechanism="none", learn_threshold=True, **more),
    "Synaptic": lambda **more: snntorch.Synaptic(alpha=0.6, beta=0.7, learn_alpha=True, **more),
    "Lapicque": lambda **more: snntorch.Lapicque(beta=0.8, threshold=0.9, **more),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", LEAKY)
@pytest.mark.parametrize("name", SPIKE_GRADS)
@pytest.mark.usefixtures("spikes_in_float64")
def test_snntorch(name, kind, whole):
    function, by = SPIKE_GRADS[name]

    def run(layer, x_seq):
        return layer(x_seq) if isinstance(layer, MultiStep) else steps(layer, x_seq, hand_on=False)

    def make():
        return LEAKY[kind](spike_grad=function, init_hidden=True, output=True)

    assert_equal(make, run, by, training=name != "custom", wrap=MultiStep if whole else lambda layer: layer)


def test_a_reset_with_gradient_needs_a_surrogate_of_asgl_cuda():
    options = {"beta": 0.8, "reset_delay": False, "spike_grad": snn_surrogate.spike_rate_escape()}
    _, report = asgl_cuda.convert(snntorch.Leaky(**options))
    assert "is none of those of asgl_cuda" in report.left[0].reason
    converted, _ = asgl_cuda.convert(snntorch.Leaky(**{**options, "reset_delay": True}, init_hidden=True))
    x = torch.ones(2, 3)
    converted(x)
    converted.reset_delay = False
    with pytest.raises(RuntimeError, match="is none of those of asgl_cuda"):
        converted(x)


def test_functions_that_look_beyond_an_element_or_learn_are_left():
    escape = snn_surrogate.spike_rate_escape()
    learned = nn.Linear(1, 1)
    learned.forward = escape
    for function in (
        snn_surrogate.SSO(),
        snn_surrogate.custom_surrogate(lambda u, grad, spikes: grad * u.mean()),
        learned,
        lambda u: 2 * escape(u),
    ):
        _, report = asgl_cuda.convert(snntorch.Leaky(beta=0.8, spike_grad=function))
        assert len(report.left) == 1, report


def test_no_noise_without_a_surrogate_of_asgl_cuda():
    function = snn_surrogate.spike_rate_escape()
    converted, _ = asgl_cuda.convert(snntorch.Leaky(beta=0.8, spike_grad=function, init_hidden=True))
    with pytest.raises(ValueError, match=r"analog_prob must be 0, got 0\.1: Leaky keeps a surrogate of its own"):
        converted.analog_prob = 0.1
    for given in (function, snn_surrogate.straight_through_estimator()):
        layer = snntorch.Leaky(beta=0.8, spike_grad=given, init_hidden=True)
        _, report = asgl_cuda.convert(layer, asgl={})
        assert report.left[0].reason.endswith("; asgl needs a surrogate and a width")
        _, report = asgl_cuda.convert(layer, asgl={"surrogate": "sigmoid", "width": 0.5})
        assert len(report.replaced) == 1
    converted, _ = asgl_cuda.convert(snntorch.Leaky(beta=0.8, init_hidden=True))
    converted.analog_prob = 0.1
    converted.spike_grad = function
    with pytest.raises(RuntimeError, match="it has noise"):
        converted(torch.ones(2, 3))


# ---- SpikingJelly ----

FUNCTIONS = {
    "LeakyKReLU, flat": (surrogate.LeakyKReLU(0.7, 0.7), "slope 0.7 everywhere"),
    "LeakyKReLU": (surrogate.LeakyKReLU(0.3, 0.8), OWN),
    "PiecewiseLeakyReLU": (surrogate.PiecewiseLeakyReLU(0.7, 0.02), OWN),
    "PiecewiseLeakyReLU, a rectangle": (surrogate.PiecewiseLeakyReLU(0.7, 0.0), "rectangle, width 1.4"),
    "S2NN": (surrogate.S2NN(3.0, 0.9), OWN),
    "QPseudoSpike": (surrogate.QPseudoSpike(1.7), OWN),
    "LogTailedReLU": (surrogate.LogTailedReLU(0.1), OWN),
    "SquarewaveFourierSeries": (surrogate.SquarewaveFourierSeries(3, 6.0), OWN),
}
NODES = {
    "IF": lambda **more: neuron.IFNode(v_threshold=0.9, **more),
    "LIF": lambda **more: neuron.LIFNode(tau=1.6, **more),
    "LIF, soft": lambda **more: neuron.LIFNode(tau=2.5, decay_input=False, v_reset=None, **more),
    "PLIF": lambda **more: neuron.ParametricLIFNode(init_tau=1.6, v_reset=-0.3, **more),
}


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("spikes_in_float64")
def test_spikingjelly(name, kind, step_mode):
    function, by = FUNCTIONS[name]

    def run(node, x_seq):
        return (node(x_seq) if step_mode == "m" else torch.stack([node(x) for x in x_seq]), node.v)

    def make(**more):
        return NODES[kind](surrogate_function=function, step_mode=step_mode, detach_reset=True, **more)

    assert_equal(make, run, by, training=step_mode == "s", scale=3.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_spikingjelly_with_a_gradient_through_the_reset(name):
    function, by = FUNCTIONS[name]

    def make():
        return neuron.LIFNode(surrogate_function=function, step_mode="m", tau=1.6)

    if by is OWN:
        _, report = asgl_cuda.convert(make())
        assert report.left[0].reason.startswith("its surrogate")
        return
    assert_equal(make, lambda node, x_seq: (node(x_seq), node.v), by, scale=3.0)


def test_a_gradient_through_the_reset_that_is_switched_on():
    node = neuron.LIFNode(surrogate_function=surrogate.S2NN(), step_mode="m", detach_reset=True)
    converted, _ = asgl_cuda.convert(node)
    converted.detach_reset = False
    with pytest.raises(RuntimeError, match="its surrogate, S2NN, is none of those of asgl_cuda"):
        converted(torch.ones(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(dtype):
    node = neuron.LIFNode(surrogate_function=surrogate.S2NN(), step_mode="m", detach_reset=True)
    leaky = snntorch.Leaky(beta=0.8, spike_grad=snn_surrogate.spike_rate_escape(), init_hidden=True)
    several = layers.IAF(reset_fn=activation.MembraneReset())
    x_seq = torch.randn(SHAPE).to(dtype)
    for layer in (node, leaky, several):
        converted, _ = asgl_cuda.convert(layer)
        expected = layer(x_seq)
        assert converted(x_seq).dtype is expected.dtype
        assert torch.equal(converted(x_seq), layer(x_seq))


# ---- sinabs ----

MAX, NO_SLOPE = activation.MaxSpike, activation.MembraneReset()
TO_ZERO = {
    "MaxSpike(3)": {"spike_fn": MAX(3)},
    "MaxSpike()": {"spike_fn": MAX()},
    "MultiSpike": {"spike_fn": activation.MultiSpike},
    "MultiSpike, periodic": {"surrogate_grad_fn": activation.PeriodicExponential(0.4, 1.7)},
    "MaxSpike(2), Heaviside": {"spike_fn": MAX(2), "surrogate_grad_fn": activation.Heaviside(0.5)},
    "MaxSpike(1), Heaviside": {"spike_fn": MAX(1), "surrogate_grad_fn": activation.Heaviside(0.5)},
    "SingleSpike, MultiGaussian": {
        "spike_fn": activation.SingleSpike, "surrogate_grad_fn": activation.MultiGaussian(0.0, 0.6),
    },
    "MaxSpike(1), MultiGaussian": {"spike_fn": MAX(1), "surrogate_grad_fn": activation.MultiGaussian(0.0, 0.6)},
}  # fmt: skip
EACH = torch.linspace(0.5, 1.2, SHAPE[-1])
SUBTRACTED = {
    "MaxSpike(1)": {"spike_fn": MAX(1)},
    "MaxSpike(1), Gaussian": {"spike_fn": MAX(1), "surrogate_grad_fn": activation.Gaussian(0.0, 0.6, 0.8)},
    "MaxSpike(1), to 0": {"spike_fn": MAX(1), "reset_fn": NO_SLOPE},
    "MaxSpike(1), 0.4": {"spike_fn": MAX(1), "reset_fn": activation.MembraneSubtract(0.4)},
    "MaxSpike(2)": {"spike_fn": MAX(2)},
    "MaxSpike(3), 0.4": {"spike_fn": MAX(3), "reset_fn": activation.MembraneSubtract(0.4)},
    "MaxSpike(2), periodic": {"spike_fn": MAX(2), "surrogate_grad_fn": activation.PeriodicExponential(0.4, 1.7)},
    "MaxSpike()": {"spike_fn": MAX()},
    "MaxSpike(), periodic": {"spike_fn": MAX(), "surrogate_grad_fn": activation.PeriodicExponential(0.4, 1.7)},
    "SingleSpike": {"spike_fn": activation.SingleSpike},
    "MultiSpike": {},
}
MORE = {
    "LIF": {"tau_mem": 3.0, "norm_input": False},
    "LIF, floor": {"tau_mem": 3.0, "min_v_mem": -0.3, "train_alphas": True},
    "IAF": {},
    "LIF, current": {"tau_mem": 3.0, "tau_syn": 2.0, "norm_input": False},
}


def run_sinabs(layer, x_seq):
    out = layer(x_seq.transpose(0, 1)).transpose(0, 1)
    return out, layer.v_mem, layer.recordings["v_mem"].transpose(0, 1)


def sinabs_layer(kind, options):
    options = {"record_states": True, **MORE[kind], **options}
    return getattr(layers, kind[:3])(**options)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("name", TO_ZERO)
@pytest.mark.usefixtures("spikes_in_float64")
def test_sinabs_with_a_reset_to_0(name, kind, each):
    """Several spikes, or any surrogate: the reset is one spike's, and detached."""
    options = {"reset_fn": NO_SLOPE, "spike_threshold": torch.tensor(0.8), **TO_ZERO[name]}
    if each:
        if "surrogate_grad_fn" in options and "periodic" not in name:
            pytest.skip("each neuron may have another surrogate")
        options["spike_threshold"] = EACH
    assert_equal(lambda: sinabs_layer(kind, options), run_sinabs, OWN, scale=4.0)


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("name", SUBTRACTED)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.usefixtures("spikes_in_float64")
def test_sinabs(name, kind, each):
    """With thresholds for each neuron, SingleExponential is as wide as each says."""
    options = {"spike_threshold": EACH if each else torch.tensor(0.8), **SUBTRACTED[name]}
    by = {
        "MaxSpike(1), Gaussian": f"erf, width {0.6 * 2**0.5:.4g}, gradient times 0.8",
        "MaxSpike(2), periodic": "periodic_exponential, width 0.4, gradient times 1.36",
        "MaxSpike(), periodic": "periodic_exponential, width 0.4, gradient times 1.36",
    }.get(name, f"laplace, width {float(0.5 * options['spike_threshold'].mean()):.4g}, gradient times 2")
    assert_equal(lambda: sinabs_layer(kind, options), run_sinabs, by, scale=4.0)


def test_a_largest_number_that_is_changed():
    layer = layers.IAF(spike_fn=MAX())
    converted, _ = asgl_cuda.convert(layer)
    x = 8 * torch.rand(2, 3, 4)
    for most in (2, None, 4.0):
        converted.spike_fn.max_num_spikes_per_bin = layer.spike_fn.max_num_spikes_per_bin = most
        assert torch.equal(converted(x), layer(x))
    for most, reason in (
        (257, "it has at most 257 spikes a step"),
        (2.5, "at most 2.5"),
        (1, "it fires in another way"),
    ):
        converted.spike_fn.max_num_spikes_per_bin = most
        with pytest.raises(RuntimeError, match=reason):
            converted(x)


def test_a_large_threshold():
    """Where the probes give one spike at most, there may be more."""
    layer = layers.IAF(spike_threshold=torch.tensor(5e3), reset_fn=NO_SLOPE)
    converted, _ = asgl_cuda.convert(layer)
    x = 1e4 * torch.rand(2, 8, 5)
    assert layer(x).max() > 1
    layer.reset_states()
    assert torch.equal(converted(x), layer(x))


def test_widths_of_each_neuron_and_asgl():
    layer = layers.IAF(spike_threshold=EACH, spike_fn=activation.SingleSpike)
    converted, _ = asgl_cuda.convert(layer, asgl={})
    assert float(converted.width.detach()) == pytest.approx(0.5 * float(EACH.mean()))
    back, report = asgl_cuda.revert(converted)
    assert "its own surrogate can't hold it" in report.left[0].reason
    assert type(back) is layers.IAF


@pytest.mark.parametrize("threshold", [0.0, -0.5, torch.tensor([0.5, -0.5])])
def test_several_spikes_need_a_threshold_above_0(threshold):
    for spike_fn in (MAX(1), activation.MultiSpike):
        model = nn.Sequential(layers.IAF(spike_threshold=torch.as_tensor(threshold), spike_fn=spike_fn))
        _, report = asgl_cuda.convert(model)
        assert report.left == [("0", "IAF", "its threshold is not above 0")]


# ---- what else knows a converted layer ----


def network():
    torch.manual_seed(0)
    options = {"step_mode": "m", "detach_reset": True}
    return nn.Sequential(
        jelly.Conv2d(2, 3, 3, step_mode="m"), jelly.BatchNorm2d(3, step_mode="m"),
        neuron.LIFNode(surrogate_function=surrogate.S2NN(), **options),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fuse(backend):
    x_seq = torch.randn(5, 4, 2, 7, 7, dtype=torch.float64)
    assert_alike(network().double(), x_seq, 1, backend, lambda model, x: model(x))


def test_recompute_compile_and_copies():
    model, x_seq = network(), torch.randn(5, 4, 2, 7, 7)
    converted, _ = asgl_cuda.convert(model)
    expected = model(x_seq)
    reset(model)
    with asgl_cuda.recompute_spikes():
        assert torch.equal(converted(x_seq), expected)
    reset(converted)
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(twin(x_seq), expected)
    assert torch.equal(torch.compile(converted, backend="eager")(x_seq), expected)
    back, _ = asgl_cuda.revert(converted)
    assert type(back[2]) is neuron.LIFNode


def test_nir_has_no_several_spikes():
    pytest.importorskip("nirtorch", minversion="2.6")
    x_seq = torch.randn(2, 5, 6)
    for spike_fn, most in ((MAX(3), 3), (MAX(1), 1)):
        layer_ = layers.IAF(spike_fn=spike_fn, reset_fn=NO_SLOPE, surrogate_grad_fn=activation.Heaviside())
        converted, _ = asgl_cuda.convert(nn.Sequential(nn.Linear(6, 6), layer_))
        if most > 1:
            with pytest.raises(ValueError, match="several spikes a step"):
                asgl_cuda.to_nir(converted, x_seq)
            continue
        graph = asgl_cuda.to_nir(converted, x_seq)
        expected = converted(x_seq).transpose(0, 1)
        assert torch.equal(asgl_cuda.from_nir(graph)(x_seq.transpose(0, 1)), expected)


@pytest.mark.parametrize("spike_fn", [MAX(1), MAX(3), MAX(), activation.MultiSpike, activation.SingleSpike], ids=str)
def test_compiled_sinabs(spike_fn):
    options = {"spike_fn": spike_fn, "shape": (3, 5), "surrogate_grad_fn": activation.Heaviside()}
    x = 2 * torch.randn(3, 8, 5)
    for layer in (layers.IAF(reset_fn=NO_SLOPE, **options), layers.IAF(spike_fn=spike_fn, shape=(3, 5))):
        converted, _ = asgl_cuda.convert(layer)
        torch.compiler.reset()
        assert torch.equal(torch.compile(converted, backend="eager", fullgraph=True)(x), layer(x))


def learning_closure():
    slope = nn.Parameter(torch.tensor(2.0))

    def spikes(u):
        smooth = torch.sigmoid(slope * u)
        return (u > 0).to(u) + smooth - smooth.detach()

    return spikes


def above_the_mean(u):
    smooth = torch.sigmoid(u)
    return (u > u.mean()).to(u) + smooth - smooth.detach()


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize(
    ("function", "reason"),
    [(learning_closure, "parameters that learn"), (lambda: above_the_mean, "something else than 0 below and 1 above")],
)
def test_functions_of_more_than_an_element(function, reason, detach_reset):
    node = neuron.LIFNode(surrogate_function=function(), detach_reset=detach_reset, step_mode="m")
    (left,) = asgl_cuda.convert(nn.Sequential(node))[1].left
    assert reason in left.reason


def test_random_functions():
    """None of many seeds passes."""

    def spikes(u):
        smooth = u.abs().clamp(max=1) * u
        return (torch.rand_like(u) < torch.sigmoid(u)).to(u) + smooth - smooth.detach()

    for seed in range(30):
        torch.manual_seed(seed)
        node = neuron.LIFNode(surrogate_function=spikes, detach_reset=True, step_mode="m")
        assert asgl_cuda.convert(nn.Sequential(node))[1].left
