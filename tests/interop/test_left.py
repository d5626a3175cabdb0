"""Layers that `convert` leaves, and its reasons."""

import re

import authors_code
import norse.torch as norse
import pytest
import snntorch
import torch
from conversions import SINGLE, authors_layer
from norse.torch.module.exp_filter import ExpFilter
from sinabs import activation, layers
from snntorch import surrogate as snn_surrogate
from snntorch._neurons.leakykernel import LeakyKernel
from spikingjelly.activation_based import encoding, layer, neuron, rnn, surrogate
from torch import nn

import asgl_cuda


def subclass(base):
    return type("Mine", (base,), {"__module__": "here"})


def leaky(**options):
    return snntorch.Leaky(**{"beta": 0.5, **options})


def fires_by(function):
    return neuron.IFNode(surrogate_function=function)


RESET = {"reset_fn": activation.MembraneReset()}
LEFT = {
    "a subclass of no known neuron": (lambda: subclass(neuron.QIFNode)(), "asgl_cuda has no such neuron"),
    "smooth spikes": (lambda: fires_by(surrogate.Sigmoid(spiking=False)), r"does not spike \(spiking=False\)"),
    "another surrogate": (
        lambda: fires_by(surrogate.S2NN()),
        "its surrogate, S2NN, is none of those of asgl_cuda",
    ),
    "inhibition": (lambda: leaky(inhibition=True), "it has inhibition"),
    "quantised": (lambda: leaky(state_quant=lambda mem: mem), "it quantises its state"),
    "graded": (lambda: leaky(graded_spikes_factor=0.5), "its spikes are graded"),
    "no decay": (lambda: leaky(beta=0.0), r"nothing is left \(beta=0\)"),
    "no gradient": (lambda: leaky(surrogate_disable=True), "its spike function has no gradient"),
    "heaviside": (
        lambda: leaky(spike_grad=snn_surrogate.heaviside(), reset_delay=False), "its surrogate does not fall off",
    ),
    "triangular": (
        lambda: leaky(spike_grad=snn_surrogate.triangular(), reset_delay=False), "the slope -1 at the threshold",
    ),
    "random": (lambda: leaky(spike_grad=snn_surrogate.SSO()), "its surrogate does not fall off"),
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
        lambda: layers.LIF(2.0, spike_fn=activation.MaxSpike(300)),
        "at most 300 spikes a step, which must be a whole number in .1, 256.",
    ),
    "no spikes": (lambda: layers.LIF(2.0, spike_fn=activation.MaxSpike(0)), "it has at most 0 spikes a step"),
    "no spikes to reset": (
        lambda: layers.LIF(2.0, spike_fn=activation.MaxSpike(0), reset_fn=activation.MembraneReset()),
        "emits something else than 0 below and 1 above the threshold",
    ),
    "spikes of a user": (
        lambda: layers.LIF(2.0, spike_fn=type("Mine", (activation.MultiSpike,), {})),
        "its spikes are those of Mine; SingleSpike, MultiSpike and MaxSpike can be converted",
    ),
    "least potentials": (
        lambda: layers.IAF(min_v_mem=torch.tensor([-1.0, -2.0])), r"\(min_v_mem\) differs between neurons",
    ),
    "surrogates for each": (
        lambda: layers.IAF(spike_threshold=torch.tensor([1.0, 2.0]), surrogate_grad_fn=activation.Heaviside()),
        "another for each neuron's own threshold",
    ),
    "Heaviside": (lambda: layers.IAF(surrogate_grad_fn=activation.Heaviside()), "surrogate does not fall off"),
    "MultiGaussian": (lambda: layers.IAF(surrogate_grad_fn=activation.MultiGaussian()), "its surrogate is none of"),
    "periodic for a spike": (
        lambda: layers.IAF(surrogate_grad_fn=activation.PeriodicExponential(), **SINGLE), "its surrogate is none of",
    ),
    "reset to a value": (
        lambda: layers.LIF(2.0, reset_fn=activation.MembraneReset(0.5), **SINGLE), "resets to a value that is not 0",
    ),
    "several spikes that adapt": (
        lambda: layers.ALIF(3.0, 3.0, spike_fn=activation.MultiSpike), "several times a step, which adaptive neurons",
    ),
    "a floor that adapts": (
        lambda: layers.ALIF(3.0, 3.0, min_v_mem=-1.0), r"potential \(min_v_mem\), which adaptive neurons lack",
    ),
    "a threshold that falls": (
        lambda: layers.ALIF(3.0, 3.0, adapt_scale=-1.0, **RESET), r"its spikes lower the threshold \(adapt_scale\)",
    ),
    "a surrogate that adapts": (
        lambda: layers.ALIF(
            3.0, 3.0, reset_fn=activation.MembraneSubtract(0.5), surrogate_grad_fn=activation.Heaviside()
        ), "its surrogate may be another for each threshold",
    ),
    "adjoint adaptation": (lambda: norse.LSNN(adjoint=True), "it steps by lsnn_feed_forward_adjoint_step"),
    "ExpLeak with a floor": (
        lambda: layers.ExpLeak(2.0, min_v_mem=0.0), r"potential \(min_v_mem\), which it does not emit",
    ),
    "gate": (lambda: authors_layer(2, use_gate=True), "use_gate=True"),
    "smooth evaluation": (
        lambda: authors_code.LIFLayer(
            2, spike_fn=authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(), spike=False)
        ), r"smooth values in evaluation \(spike=False\)",
    ),
    "InvTanh": (
        lambda: authors_layer(2, surrogate=authors_code.InvTanh),
        "its surrogate is InvTanh; known are InvRectangle and InvSigmoid",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("name", LEFT)
def test_options(name):
    make, reason = LEFT[name]
    made = make()
    before = type(made)
    net, report = asgl_cuda.convert(nn.Sequential(nn.Linear(2, 2), made), inplace=True)
    assert type(net[1]) is before
    assert not report.replaced
    ((path, kind, why),) = report.left
    assert (path, kind) == ("1", before.__name__)
    assert re.search(reason, why), why


KINDS = {
    "asgl_cuda has no such neuron": [
        *(getattr(neuron, name) for name in (
            "QIFNode", "DSRIFNode", "DSRLIFNode", "ActivationAwareIFNode",
        )),
        lambda: neuron.GatedLIFNode(4), lambda: neuron.STBIFNode(torch.tensor(1.0), 4, True),
        lambda: neuron.FlexSN(lambda x, v: (x, v), num_states=1), lambda: snntorch.Alpha(alpha=0.9, beta=0.8),
        lambda: norse.LIFAdEx(), lambda: LeakyKernel(2, 2), lambda: norse.ConstantCurrentLIFEncoder(3),
        lambda: ExpFilter(2, 2),
    ],
    "it mixes neurons, or steps, by weights of its own": [
        lambda: neuron.PSN(4), lambda: neuron.MaskedPSN(2, 4), lambda: neuron.SlidingPSN(2),
        *(lambda name=name: getattr(norse, name)(2, 2) for name in (
            "LSNNRecurrent", "LSNNRecurrentCell", "CobaLIFCell", "LILinearCell", "LIFCorrelation",
        )),
        lambda: snntorch.LeakyParallel(2, 2),
    ],
    "it is no neuron that convert knows, but carries a state": [
        lambda: layer.SynapseFilter(2.0), lambda: layer.Delay(1), lambda: encoding.LatencyEncoder(3),
        lambda: rnn.SpikingLSTMCell(2, 2), lambda: layer.NeuNorm(2, 2, 2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", KINDS)
def test_kinds(reason):
    """No neuron of a known library is overlooked."""
    for make in KINDS[reason]:
        made = make()
        _, report = asgl_cuda.convert(nn.Sequential(made))
        expected = ("0", type(made).__name__, reason)
        # SpikingLSTMCell contains neurons.
        assert report == ([], [expected]) or (isinstance(made, rnn.SpikingLSTMCell) and expected in report.left)


FAST = "its few operations a step are faster than a kernel's call; "
READ_OUTS = {
    norse.LICell: f"{FAST}LI, which takes a whole sequence, can be converted",
    norse.LIBoxCell: f"{FAST}for a whole sequence there is asgl_cuda.LeakyIntegrator",
}


@pytest.mark.parametrize("asgl", [None, {}])
@pytest.mark.parametrize("make", READ_OUTS)
def test_read_outs_that_no_kernel_makes_faster(make, asgl):
    model, report = asgl_cuda.convert(norse.SequentialState(nn.Linear(3, 5), norse.LIFCell(), make()), asgl=asgl)
    assert [row.path for row in report.replaced] == ["1"]
    assert report.left == [("2", make.__name__, READ_OUTS[make])]
    assert type(model[2]) is make


def test_layers_without_a_state_are_not_named():
    assert asgl_cuda.convert(nn.Sequential(layer.Dropout(0.5), layer.Linear(2, 2)))[1] == ([], [])
