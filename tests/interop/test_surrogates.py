"""Surrogates that are none of asgl_cuda's, and several spikes a step, in float64 against the libraries' own layers."""

import copy
import pickle

import pytest
import snntorch
import torch
from conversions import SHAPE, assert_alike, reset
from sinabs import activation, layers
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import layer as jelly
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import asgl_cuda

OWN, FLAT = "its own surrogate, outside of the kernel", "slope 1 everywhere"


# ---- snnTorch, whose resets are detached ----


def test_a_reset_with_gradient_needs_a_surrogate_of_asgl_cuda():
    options = {"beta": 0.8, "reset_delay": False, "spike_grad": snn_surrogate.spike_rate_escape()}
    _, report = asgl_cuda.convert(snntorch.Leaky(**options))
    assert "is none of those of asgl_cuda" in report.left[0].reason
    converted, _ = asgl_cuda.convert(snntorch.Leaky(**{**options, "reset_delay": True}, init_hidden=True))
    x = torch.ones(2, 3)
    converted(x)
    converted.reset_delay = False
    with pytest.raises(RuntimeError, match="its reset_delay is False, and was True"):
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
    with pytest.raises(RuntimeError, match="its spike_grad is another inner"):
        converted(torch.ones(2, 3))


# ---- SpikingJelly ----


# ---- sinabs ----

MAX, NO_SLOPE = activation.MaxSpike, activation.MembraneReset()
EACH = torch.linspace(0.5, 1.2, SHAPE[-1])


def test_a_large_threshold():
    """Where the probes give one spike at most, there may be more."""
    layer = layers.IAF(spike_threshold=torch.tensor(5e3), reset_fn=NO_SLOPE)
    converted, _ = asgl_cuda.convert(layer)
    x = 1e4 * torch.rand(2, 8, 5)
    assert layer(x).max() > 1
    layer.reset_states()
    assert torch.equal(converted(x), layer(x))


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
