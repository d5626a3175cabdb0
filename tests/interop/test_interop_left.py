"""The authors' code, numbers that are whole, layers that are left and why, and which surrogate a function is."""

import re

import authors_code
import libraries  # noqa: F401
import norse.torch as norse
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from converted_layers import close, norse_run
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import asgl_cuda
from asgl_cuda.interop.identify import identify


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("kind", [authors_code.InvRectangle, authors_code.InvSigmoid])
@pytest.mark.parametrize("vreset", [None, 0.1])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_authors_code(p, vreset, kind, granularity):
    """All elements are hard, or all are smooth: between, the noise is another."""

    def make():
        spike = authors_code.EfficientNoisySpikeII(kind(2.0, granularity=granularity), p=p)
        layer = authors_code.LIFLayer(4, spike_fn=spike, decay=0.6, thresh=0.7, vreset=vreset)
        layer(torch.zeros(4, 3, 2, 5, 5))  # makes the widths
        return layer

    torch.manual_seed(0)
    x_seq = torch.randn(4, 3, 2, 5, 5)
    grad = torch.randn_like(x_seq)
    layer = make()
    fused, report = asgl_cuda.convert(layer)
    assert len(report.replaced) == 1
    results = []
    for each in (layer, fused):
        leaf = x_seq.clone().requires_grad_()
        out = each(leaf)
        results.append((out, each.vmem, torch.autograd.grad((out * grad).sum(), [leaf, *each.parameters()])))
    (theirs, their_v, their_grads), (ours, our_v, our_grads) = results
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_v, their_v)
    assert len(our_grads) == 3
    for our, their in zip(our_grads, their_grads, strict=True):
        assert their.abs().max() > 0
        assert close(our, their)


@pytest.mark.parametrize("learnable", [False, True])
def test_authors_code_before_the_widths_are_made(learnable):
    """The parameter is made at the first call, by whichever layer, with the authors' shape and name."""
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(2.0, learnable, "channel"), p=0.0)
    layer = authors_code.LIFLayer(3, spike_fn=spike)
    fused, _ = asgl_cuda.convert(layer)
    x_seq = torch.randn(5, 2, 6, 3, 3)
    torch.testing.assert_close(fused(x_seq), layer(x_seq))
    assert {name: value.shape for name, value in fused.named_parameters()} == {
        name: value.shape for name, value in layer.named_parameters()
    }
    assert torch.as_tensor(fused.width).mean().item() == pytest.approx(0.5)


def test_authors_code_noise_and_share():
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvRectangle(1.0), p=0.3)
    fused, _ = asgl_cuda.convert(authors_code.LIFLayer(1, spike_fn=spike, thresh=1.0))
    x_seq = torch.full((1, 20000), 1.25)  # analog elements are 3/4, spikes are 1
    assert abs((fused(x_seq) == 0.75).float().mean() - 0.3) < 0.02
    assert fused.analog_prob == 0.3
    fused.analog_prob = 0.1  # as a schedule sets it
    assert fused.cell.spike_fn.p == 0.1
    assert abs((fused(x_seq) == 0.75).float().mean() - 0.1) < 0.02
    assert (fused.eval()(x_seq) == 1).all()
    back, report = asgl_cuda.revert(fused)
    assert type(back) is authors_code.LIFLayer
    assert back.cell.spike_fn.p == 0.1
    assert not report.left


def sinabs_layer(kind, **options):
    return getattr(sinabs.layers, kind)(spike_fn=sinabs.activation.SingleSpike, **options)


def jelly_steps(layer, x_seq):
    return [torch.stack(values) for values in zip(*((layer(x), layer.v) for x in x_seq), strict=True)]


def leaky_steps(layer, x_seq):
    return [torch.stack(values) for values in zip(*(layer(x) for x in x_seq), strict=True)]


INTEGERS = {
    "SpikingJelly": (lambda: neuron.LIFNode(step_mode="m"), lambda layer, x: (layer(x), layer.v, layer(x), layer.v)),
    "SpikingJelly, a step a call": (lambda: neuron.ParametricLIFNode(v_reset=0.3), jelly_steps),
    "SpikingJelly, soft": (lambda: neuron.IFNode(v_reset=None), jelly_steps),
    "snnTorch": (lambda: snntorch.Leaky(beta=0.5, threshold=1), leaky_steps),
    "snnTorch, zero": (lambda: snntorch.Leaky(beta=1, threshold=2, reset_mechanism="zero"), leaky_steps),
    "SpikingJelly, current": (lambda: neuron.CUBALIFNode(v_reset=None), jelly_steps),
    "SpikingJelly, simple": (lambda: neuron.SimpleLIFNode(2.0, True, v_reset=0.3), jelly_steps),
    "snnTorch, current": (
        lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, threshold=2.0, init_hidden=True, output=True),
        leaky_steps,
    ),
    "Norse, current": (lambda: norse.LIF(), lambda layer, x: (layer(x)[0], *layer(x)[1])),
    "Norse, a step": (lambda: norse.IAFCell(), lambda layer, x: norse_run(layer, x)[:2]),
    "Norse": (
        lambda: norse.LIFBoxCell(norse.LIFBoxParameters(v_th=torch.tensor(1), tau_mem_inv=torch.tensor(400))),
        lambda layer, x: norse_run(layer, x)[:2],
    ),
    "sinabs LIF": (lambda: sinabs_layer("LIF", tau_mem=3, spike_threshold=1), lambda layer, x: (layer(x), layer.v_mem)),
    "sinabs IAF, several": (
        lambda: sinabs.layers.IAF(spike_threshold=50, min_v_mem=-1),
        lambda layer, x: (layer(x), layer.v_mem),
    ),
    "sinabs IAF": (lambda: sinabs_layer("IAF", spike_threshold=50), lambda layer, x: (layer(x), layer.v_mem)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name, dtype):
    """A threshold or an input of whole numbers, which PyTorch's operations take beside floats."""
    make, call = INTEGERS[name]
    torch.manual_seed(0)
    x = torch.randint(0, 60 if "IAF" in name else 4, (6, 4, 30)).to(dtype)
    layer, (fused, report) = make(), asgl_cuda.convert(make())
    assert len(report.replaced) == 1
    theirs = call(layer, x)
    assert 0 < theirs[0].float().mean() < 1
    torch.testing.assert_close(call(fused, x), theirs)


LEFT = {
    "a neuron that there is not": (lambda: neuron.QIFNode(), "asgl_cuda has no such neuron"),
    "a subclass": (
        lambda: type("Mine", (neuron.LIFNode,), {"__module__": "here"})(),
        "it is a subclass of LIFNode, which may compute something else; convert knows LIFNode itself",
    ),
    "a subclass of a subclass": (
        lambda: type("Mine", (sinabs.layers.IAFSqueeze,), {"__module__": "here"})(batch_size=1),
        "it is a subclass of IAFSqueeze",
    ),
    "a subclass of no known neuron": (
        lambda: type("Mine", (neuron.QIFNode,), {"__module__": "here"})(), "asgl_cuda has no such neuron",
    ),
    "smooth spikes": (
        lambda: neuron.IFNode(surrogate_function=surrogate.Sigmoid(spiking=False)),
        r"does not spike \(spiking=False\)",
    ),
    "another surrogate": (
        lambda: neuron.IFNode(surrogate_function=surrogate.PiecewiseLeakyReLU()),
        "its surrogate, PiecewiseLeakyReLU, is none of those of asgl_cuda",
    ),
    "inhibition": (lambda: snntorch.Leaky(beta=0.5, inhibition=True), "it has inhibition"),
    "quantised": (lambda: snntorch.Leaky(beta=0.5, state_quant=lambda mem: mem), "it quantises its state"),
    "graded": (lambda: snntorch.Leaky(beta=0.5, graded_spikes_factor=0.5), "its spikes are graded"),
    "no decay": (lambda: snntorch.Leaky(beta=0.0), r"nothing is left \(beta=0\)"),
    "no gradient": (lambda: snntorch.Leaky(beta=0.5, surrogate_disable=True), "its spike function has no gradient"),
    "straight through": (
        lambda: snntorch.Leaky(beta=0.5, spike_grad=snn_surrogate.straight_through_estimator()),
        "its surrogate does not fall off",
    ),
    "triangular of snnTorch": (
        lambda: snntorch.Leaky(beta=0.5, spike_grad=snn_surrogate.triangular()), "the slope -1 at the threshold",
    ),
    "a reset of the input": (
        lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, reset_mechanism="zero"), "the input of the next step",
    ),
    "a reset of Lapicque's input": (
        lambda: snntorch.Lapicque(beta=0.5, reset_mechanism="zero"), "the input of the next step",
    ),
    "a graph": (lambda: snntorch.Lapicque(beta=torch.tensor(0.5), learn_beta=True), r"graph that ends .*learn_beta"),
    "no decay of Lapicque": (lambda: snntorch.Lapicque(R=1, C=1), r"nothing is left \(beta=0\)"),
    "adjoint": (lambda: norse.LIF(norse.LIFParameters(method="adjoint")), "it steps by lif_feed_forward_adjoint_step"),
    "circ": (lambda: norse.LIFBoxCell(norse.LIFBoxParameters(method="circ")), "its surrogate, circ, is none"),
    "MaxSpike": (
        lambda: sinabs.layers.LIF(2.0, spike_fn=sinabs.activation.MaxSpike(3)),
        "its spikes are those of MaxSpike; SingleSpike and MultiSpike can be converted",
    ),
    "MultiSpike with a reset to 0": (
        lambda: sinabs.layers.LIF(2.0, reset_fn=sinabs.activation.MembraneReset()),
        r"resets to a value after several spikes \(MultiSpike\)",
    ),
    "least potentials": (
        lambda: sinabs.layers.IAF(min_v_mem=torch.tensor([-1.0, -2.0])), r"\(min_v_mem\) differs between neurons",
    ),
    "widths for each": (
        lambda: sinabs.layers.IAF(spike_threshold=torch.tensor([1.0, 2.0])), "as wide as each neuron's own threshold",
    ),
    "Heaviside": (
        lambda: sinabs.layers.IAF(surrogate_grad_fn=sinabs.activation.Heaviside()), "surrogate does not fall off",
    ),
    "MultiGaussian": (
        lambda: sinabs.layers.IAF(surrogate_grad_fn=sinabs.activation.MultiGaussian()), "its surrogate is none of",
    ),
    "periodic for a spike": (
        lambda: sinabs_layer("IAF", surrogate_grad_fn=sinabs.activation.PeriodicExponential()),
        "its surrogate is none of",
    ),
    "reset to a value": (
        lambda: sinabs.layers.LIF(
            2.0, spike_fn=sinabs.activation.SingleSpike, reset_fn=sinabs.activation.MembraneReset(0.5)
        ),
        "resets to a value that is not 0",
    ),
    "ExpLeak with a floor": (
        lambda: sinabs.layers.ExpLeak(2.0, min_v_mem=0.0), r"potential \(min_v_mem\), which it does not emit",
    ),
    "gate": (
        lambda: authors_code.LIFLayer(
            2, spike_fn=authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid()), use_gate=True
        ),
        "use_gate=True",
    ),
    "smooth evaluation": (
        lambda: authors_code.LIFLayer(
            2, spike_fn=authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(), spike=False)
        ),
        r"smooth values in evaluation \(spike=False\)",
    ),
    "InvTanh": (
        lambda: authors_code.LIFLayer(2, spike_fn=authors_code.EfficientNoisySpike(authors_code.InvTanh())),
        "its surrogate is InvTanh; known are InvRectangle and InvSigmoid",
    ),
}  # fmt: skip


ALSO_LEFT = {
    **{name: lambda name=name: getattr(neuron, name)() for name in (
        "DSRIFNode", "DSRLIFNode", "ActivationAwareIFNode", "ILIFNode",
    )},
    "GatedLIFNode": lambda: neuron.GatedLIFNode(4),
    "STBIFNode": lambda: neuron.STBIFNode(torch.tensor(1.0), 4, True),
    "FlexSN": lambda: neuron.FlexSN(lambda x, v: (x, v), num_states=1),
    "Alpha": lambda: snntorch.Alpha(alpha=0.9, beta=0.8),
    "ALIF": lambda: sinabs.layers.ALIF(3.0, 3.0),
}  # fmt: skip

MIXING = {
    "PSN": lambda: neuron.PSN(4),
    "MaskedPSN": lambda: neuron.MaskedPSN(2, 4),
    "SlidingPSN": lambda: neuron.SlidingPSN(2),
    "LIFRecurrent": lambda: norse.LIFRecurrent(2, 2),
    "LSNNRecurrentCell": lambda: norse.LSNNRecurrentCell(2, 2),
    "CobaLIFCell": lambda: norse.CobaLIFCell(2, 2),
    "LILinearCell": lambda: norse.LILinearCell(2, 2),
    "LIFCorrelation": lambda: norse.LIFCorrelation(2, 2),
    "LeakyParallel": lambda: snntorch.LeakyParallel(2, 2),
    "RLeaky": lambda: snntorch.RLeaky(beta=0.5, linear_features=2),
    "RSynaptic": lambda: snntorch.RSynaptic(alpha=0.5, beta=0.5, linear_features=2),
}


@pytest.mark.parametrize("name", [*ALSO_LEFT, *MIXING])
def test_neurons_of_the_libraries_are_left_with_a_reason(name):
    why = "it mixes neurons, or steps, by weights of its own" if name in MIXING else "asgl_cuda has no such neuron"
    _, report = asgl_cuda.convert(nn.Sequential({**ALSO_LEFT, **MIXING}[name]()))
    assert report == ([], [("0", name, why)])


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name):
    make, reason = LEFT[name]
    layer = make()
    before = type(layer)
    net, report = asgl_cuda.convert(nn.Sequential(nn.Linear(2, 2), layer), inplace=True)
    assert type(net[1]) is before
    assert not report.replaced
    ((path, kind, why),) = report.left
    assert (path, kind) == ("1", before.__name__)
    assert re.search(reason, why), why


@pytest.mark.parametrize("width", [1e-3, 0.3, 1.0, 7.0, 200.0])
@pytest.mark.parametrize("gain", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", asgl_cuda.surrogate.SURROGATES)
def test_surrogates_are_told_apart(name, gain, width):
    def function(u):
        smooth = asgl_cuda.surrogate.SURROGATES[name].cumulative(u / width) * gain
        return smooth + ((u > 0).to(u) - smooth).detach()

    found = identify(function)
    assert found.surrogate == name
    assert found.width == pytest.approx(width, rel=1e-6)
    assert found.gain == pytest.approx(gain, rel=1e-6)
    assert found.strict


def test_a_lopsided_surrogate_is_none_of_ours():
    def function(u):
        smooth = torch.sigmoid(torch.where(u < 0, u, 1.001 * u))
        return smooth + ((u >= 0).to(u) - smooth).detach()

    assert re.fullmatch("its surrogate, .*, is none of those of asgl_cuda", identify(function))
