"""Layers that `convert` leaves, and its reasons: one table."""

import abc
import copy
import re

import authors_code
import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from conversions import (
    ALL,
    LAYERS,
    SINGLE,
    ElementWise,
    Linear,
    N,
    authors_layer,
    calling,
    exchange,
    flat,
    gradients,
    norse_values,
)  # fmt: skip
from norse.torch.module.exp_filter import ExpFilter
from sinabs import activation, layers
from snntorch import surrogate as slopes
from snntorch._neurons.leakykernel import LeakyKernel
from spikingjelly.activation_based import encoding, layer, neuron, rnn, surrogate
from torch import nn

import asgl_cuda


def leaky(**options):
    return lambda: snntorch.Leaky(**{"beta": 0.5, **options})


def fires_by(function, **options):
    return lambda: neuron.LIFNode(surrogate_function=function, **options)


def iaf(**options):
    return lambda: layers.IAF(**options)


def lif(**options):
    return lambda: layers.LIF(2.0, **options)


def recurrent(connection, **options):
    return lambda: sinabs.layers.LIFRecurrent(2.0, connection, **options)


def set_to(made, **attributes):
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def hooked(made, path):
    made.get_submodule(path).register_forward_hook(lambda module, args, output: output)
    return made


def exchanged(made, name):
    exchange(made, name)
    return made


def subclass(base, **names):
    return type("Mine", (base,), {"__module__": "here", **names})


def learning(u, slope=nn.Parameter(torch.tensor(2.0))):  # noqa: B008
    smooth = torch.sigmoid(slope * u)
    return (u > 0).to(u) + smooth - smooth.detach()


def learning_closure():
    slope = nn.Parameter(torch.tensor(2.0))
    return lambda u: learning(u, slope)


def above_the_mean(u):
    return (u > u.mean()).to(u) + torch.sigmoid(u) - torch.sigmoid(u).detach()


class Learning(nn.Module):
    """A user's surrogate with a parameter."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))

    def forward(self, u):
        return learning(u, self.slope)


def as_module(function):
    made = nn.Linear(1, 1)
    made.forward = function
    return made


MAX, ESCAPE = activation.MaxSpike, slopes.spike_rate_escape()
HEAVISIDE = {"surrogate_grad_fn": activation.Heaviside()}
NO_SUCH, MIXES, STATEFUL = (
    "^asgl_cuda has no such neuron$", "^it has weights between its neurons or time steps$",
    "^it is not a neuron that convert knows, but carries a state$",
)  # fmt: skip
SUM = r"x \+ w y with a number w"
LEFT = {
    "a subclass of no known neuron": (lambda: subclass(neuron.QIFNode)(), NO_SUCH),
    "smooth spikes": (fires_by(surrogate.Sigmoid(spiking=False)), r"does not spike \(spiking=False\)"),
    "another surrogate": (fires_by(surrogate.S2NN(), detach_reset=True), "its surrogate, S2NN, is not one that"),
    "a learning closure": (fires_by(learning_closure()), "parameters that learn"),
    "a learning module": (fires_by(Learning()), "its spike function has parameters that learn"),
    "beyond an element": (fires_by(above_the_mean), "something else than 0 below and 1 above"),
    "a window": (
        lambda: neuron.ILIFNode(surrogate_function=surrogate.MultiLevelSpikeCount(4, grad_window=(0.0, 2.0))),
        r"its gradient's window is \[0.0, 2.0\], not",
    ),
    "many levels": (
        lambda: neuron.ILIFNode(surrogate_function=surrogate.MultiLevelSpikeCount(300)),
        "it counts up to 300 spikes, more than 256",
    ),
    "a reset by a tensor": (lambda: set_to(neuron.LIFNode(), v_reset=torch.zeros(3)), "its v_reset is a tensor"),
    "inhibition": (leaky(inhibition=True), "it has inhibition"),
    "quantised": (leaky(state_quant=lambda mem: mem), "it quantises its state"),
    "graded": (leaky(graded_spikes_factor=0.5), "its spikes are graded"),
    "graded by what learns": (leaky(learn_graded_spikes_factor=True), "its spikes are graded"),
    "no gradient": (leaky(surrogate_disable=True), "its spike function has no gradient"),
    "heaviside": (leaky(spike_grad=slopes.heaviside(), reset_delay=False), "surrogate does not fall to 0"),
    "triangular": (leaky(spike_grad=slopes.triangular(), reset_delay=False), "the slope -1 at the threshold"),
    "a reset with gradient": (leaky(spike_grad=ESCAPE, reset_delay=False), "is not one that asgl_cuda has"),
    "random": (leaky(spike_grad=slopes.SSO()), "the slope of its surrogate does not fall to 0"),
    "a mean in the gradient": (
        leaky(spike_grad=slopes.custom_surrogate(lambda u, grad, s: grad * u.mean())), "its surrogate",
    ),
    "a module's forward": (leaky(spike_grad=as_module(ESCAPE)), "parameters that learn"),
    "a reset of the input": (
        lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, reset_mechanism="zero"), "the input of the next step",
    ),
    "a graph": (lambda: snntorch.Lapicque(beta=torch.tensor(0.5), learn_beta=True), r"graph that ends .*learn_beta"),
    "adjoint": (
        lambda: norse.LIF(norse.LIFParameters(method="adjoint")), "step function is lif_feed_forward_adjoint_step",
    ),
    "circ": (lambda: norse.LIFBoxCell(norse.LIFBoxParameters(method="circ")), "its surrogate, circ, is not one"),
    "a reset of a user": (
        lambda: norse.LIFBoxCell(norse.LIFBoxParameters(reset_method=lambda z, v, p: v - z)),
        "its reset_method is neither",
    ),
    "LSNN": (norse.LSNN, "asgl_cuda.AdaptiveLIF is its counterpart"),
    "MaxSpike": (
        lif(spike_fn=MAX(300)), "at most 300 spikes per step, which must be an integer in .1, 256.",
    ),
    "no spikes": (lif(spike_fn=MAX(0)), "it emits at most 0 spikes per step"),
    "spikes of a user": (
        lif(spike_fn=type("Mine", (activation.MultiSpike,), {})),
        "its spike function is Mine; SingleSpike, MultiSpike and MaxSpike can be converted",
    ),
    "no threshold": (iaf(spike_threshold=torch.tensor(0.0), spike_fn=MAX(1)), "^its threshold is not above 0$"),
    "some thresholds": (iaf(spike_threshold=torch.tensor([0.5, -0.5])), "^its threshold is not above 0$"),
    "least potentials": (iaf(min_v_mem=torch.tensor([-1.0, -2.0])), r"\(min_v_mem\) differs between neurons"),
    "surrogates for each": (
        iaf(spike_threshold=torch.tensor([1.0, 2.0]), **HEAVISIDE), "its threshold differs between neurons, and its",
    ),
    "Heaviside": (iaf(**HEAVISIDE), "surrogate does not fall to 0"),
    "MultiGaussian": (iaf(surrogate_grad_fn=activation.MultiGaussian()), "its surrogate is not one that"),
    "several spikes to 0": (iaf(reset_fn=activation.MembraneReset()), "it resets to 0 after several spikes per step"),
    "reset to a value": (lif(reset_fn=activation.MembraneReset(0.5), **SINGLE), "resets to a value that is not 0"),
    "ALIF": (lambda: layers.ALIF(3.0, 3.0), "asgl_cuda.AdaptiveLIF"),
    "ExpLeak with a floor": (lambda: layers.ExpLeak(2.0, min_v_mem=0.0), "which leaky_integrator does not have"),
    "gate": (lambda: authors_layer(made=False, use_gate=True), "use_gate=True"),
    "smooth evaluation": (
        lambda: authors_code.LIFLayer(
            2, spike_fn=authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(), spike=False)
        ), r"smooth values in evaluation \(spike=False\)",
    ),
    "another spike function": (
        lambda: authors_code.LIFLayer(2, spike_fn=nn.ReLU()), "its spike function is not EfficientNoisySpike but ReLU",
    ),
    "InvTanh": (
        lambda: authors_layer(authors_code.InvTanh, made=False),
        "its surrogate is InvTanh; convert knows InvRectangle and InvSigmoid",
    ),
    # ---- spikes that return ----
    "convolution": (
        lambda: snntorch.RLeaky(0.9, conv2d_channels=2, kernel_size=3), "its spikes return through a Conv2d; a Linear",
    ),
    "hooks": (lambda: hooked(snntorch.RLeaky(0.9, **ALL), "recurrent"), "a Linear with hooks, which would no longer"),
    "reset to 0": (
        lambda: snntorch.RLeaky(0.9, reset_mechanism="zero", **ALL), "it resets the input of the next step to 0",
    ),
    "a reset that fails": (
        lambda: snntorch.RSynaptic(0.9, 0.9, reset_delay=False, **ALL), r"fails in snnTorch \(reset_delay=False\)",
    ),
    "an own surrogate": (
        lambda: snntorch.RLeaky(0.9, linear_features=N, spike_grad=slopes.SFS()), "its surrogate",
    ),
    "a Sequential": (recurrent(nn.Sequential(nn.Flatten()), **SINGLE), "return through a Sequential; a Linear"),
    "several spikes": (recurrent(nn.Linear(N, N)), "times per step, which recurrent neurons do not"),
    "least potential": (recurrent(nn.Linear(N, N), min_v_mem=-1.0, **SINGLE), "recurrent neurons do not support"),
    "recorded": (recurrent(nn.Linear(N, N), record_states=True, **SINGLE), r"\(record_states\)"),
    "adaptive": (lambda: sinabs.layers.ALIFRecurrent(2.0, 2.0, rec_connect=nn.Linear(N, N)), MIXES),
    "adjoint, recurrent": (
        lambda: norse.LIFRecurrent(4, N, norse.LIFParameters(method="adjoint")), "step function is lif_adjoint_step",
    ),
    "a product": (
        lambda: ElementWise(neuron.IFNode(), lambda y, x: y * x), rf"return by <lambda>\(y, x\); only functions {SUM}",
    ),
    "a root": (lambda: ElementWise(neuron.IFNode(), lambda y, x: x + y.abs().sqrt()), SUM),
    "of a tensor": (lambda: ElementWise(neuron.IFNode(), (lambda w: lambda y, x: x + w * y)(torch.ones(1))), SUM),
    "a module": (lambda: ElementWise(neuron.IFNode(), nn.Bilinear(N, N, N)), r"return by Bilinear\(y, x\)"),
    "an error": (lambda: ElementWise(neuron.IFNode(), lambda y, x: y.nothing), SUM),
    "integer spikes": (lambda: Linear(neuron.ILIFNode(), N, N), "its ILIFNode is not a neuron that"),
    "an unknown node": (lambda: Linear(neuron.QIFNode(), N, N), "its QIFNode: asgl_cuda has no such neuron"),
    "no node": (lambda: Linear(nn.ReLU(), N, N), "its ReLU is not a neuron that"),
    "kept potentials": (
        lambda: Linear(neuron.LIFNode(store_v_seq=True), N, N), r"its LIFNode stores its potentials \(store_v_seq\)",
    ),
    "weights in between": (
        lambda: Linear(nn.Sequential(nn.Linear(N, N), nn.ReLU(), neuron.IFNode()), N, N), "its Sequential is not",
    ),
    "an exchanged method of the node": (
        lambda: Linear(exchanged(neuron.SimpleLIFNode(2.0, True), "neuronal_fire"), N, N),
        "its SimpleLIFNode: its neuronal_fire is an attribute of this layer, not the method of SimpleLIFNode",
    ),
    "an exchanged method of a Linear": (
        lambda: Linear(nn.Sequential(exchanged(nn.Linear(N, N), "forward"), neuron.IFNode()), N, N),
        "its spikes return through a Linear",
    ),
    # ---- other kinds: no neuron of a known library is overlooked ----
    **{
        f"{reason[:20]}, {number}": (make, reason)
        for reason, makes in {
            NO_SUCH: (
                neuron.DSRIFNode, neuron.DSRLIFNode, neuron.ActivationAwareIFNode, lambda: neuron.GatedLIFNode(4),
                lambda: neuron.STBIFNode(torch.tensor(1.0), 4, True),
                lambda: neuron.FlexSN(lambda x, v: (x, v), num_states=1), lambda: snntorch.Alpha(alpha=0.9, beta=0.8),
                norse.LIFAdEx, lambda: LeakyKernel(2, 2), lambda: norse.ConstantCurrentLIFEncoder(3),
                lambda: ExpFilter(2, 2),
            ),
            MIXES: (
                lambda: neuron.PSN(4), lambda: neuron.MaskedPSN(2, 4), lambda: neuron.SlidingPSN(2),
                *(lambda name=name: getattr(norse, name)(2, 2) for name in (
                    "LSNNRecurrent", "LSNNRecurrentCell", "CobaLIFCell", "LILinearCell", "LIFCorrelation",
                )),
                lambda: snntorch.LeakyParallel(2, 2),
            ),
            STATEFUL: (
                lambda: layer.SynapseFilter(2.0), lambda: layer.Delay(1), lambda: encoding.LatencyEncoder(3),
                lambda: rnn.SpikingLSTMCell(2, 2), lambda: layer.NeuNorm(2, 2, 2),
            ),
            "^its few operations per step are faster than the call of a kernel; LI, which takes a whole seq": (
                norse.LICell, lambda: subclass(norse.LICell)(),
            ),
            "^its few operations .* there is asgl_cuda.LeakyIntegrator$": (norse.LIBoxCell,),
            "^it is of src.spikingjelly, a copy of SpikingJelly that convert does not": (
                lambda: subclass(nn.Module, __module__="src.spikingjelly.activation_based.neuron.lif")(),
                lambda: subclass(nn.Module, __module__="src.spikingjelly.clock_driven.neuron")(),
            ),
            "^it is of src.spikingjelly.spikingjelly, a copy": (
                lambda: subclass(nn.Module, __module__="src.spikingjelly.spikingjelly.activation_based.neuron.lif")(),
            ),
        }.items()
        for number, make in enumerate(makes)
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    make, reason = LEFT[name]
    made = make()
    before = type(made)
    net, report = asgl_cuda.convert(nn.Sequential(nn.Linear(2, 2), made), inplace=True)
    assert type(net[1]) is before
    (row,) = (row for row in report.left if row.path == "1")
    assert row.layer == before.__name__
    assert re.search(reason, row.reason), row.reason
    if not isinstance(made, (rnn.SpikingLSTMCell, Linear, ElementWise)):  # which contain neurons
        assert (report.replaced, len(report.left)) == ([], 1)
    asgl = {"surrogate": "sigmoid"} if "few operations" in reason else None
    assert asgl is None or asgl_cuda.convert(made, asgl=asgl)[1].left[0].reason == row.reason


def test_layers_without_a_state_are_not_named():
    assert asgl_cuda.convert(nn.Sequential(layer.Dropout(0.5), layer.Linear(2, 2)))[1] == ([], [])


def test_random_functions():
    """None of many seeds passes."""

    def spikes(u):
        smooth = u.abs().clamp(max=1) * u
        return (torch.rand_like(u) < torch.sigmoid(u)).to(u) + smooth - smooth.detach()

    for seed in range(30):
        torch.manual_seed(seed)
        assert asgl_cuda.convert(fires_by(spikes, detach_reset=True)())[1].left


# ---- users' subclasses ----


class Described:
    """Methods and properties that no library's class has."""

    def describe(self):
        return f"a {type(self).__name__}"

    @property
    def purpose(self):
        return "to fire"


def subclass_of(base, **names):
    """A subclass of a subclass."""
    return type("Mine", (Described, type("Empty", (base,), {})), {"__doc__": "Mine.", "__module__": __name__, **names})


@pytest.mark.usefixtures("in_double", "spikes_in_double")
@pytest.mark.parametrize("name", [name for name in LAYERS if "each" not in name])
def test_one_that_changes_no_result(name):
    make, shape = LAYERS[name]
    calls = []
    mine = {"extra_repr": lambda self: "mine", "reset": lambda self: calls.append("reset")}
    made, twin = make(), make()
    made.__class__ = twin.__class__ = subclass_of(type(made), **mine)
    expected = asgl_cuda.convert(make())[1].replaced
    converted, report = asgl_cuda.convert(nn.Sequential(twin), inplace=True)
    assert [(row.layer, row.by) for row in report.replaced] == [("Mine", row.by) for row in expected]
    assert isinstance(converted[0], type(made))
    assert (converted[0].describe(), converted[0].purpose) == (f"a {type(twin).__name__}", "to fire")
    if not name.startswith("sinabs"):  # has no extra_repr
        assert "mine, computed by asgl_cuda" in repr(converted)
    x = (1 + 3 * torch.rand(shape)).requires_grad_()  # some neuron fires in a single step
    outputs = [flat(each(x)) for each in (made, converted[0])]
    assert any(out.any() for out in outputs[0])
    grads = [gradients(*pair, x) for pair in zip(outputs, (made, converted[0]), strict=True)]
    rtol = 1e-5 if name.startswith(("sinabs", "norse IAF")) else 1e-12  # whose parameters are float32
    torch.testing.assert_close((outputs[1], grads[1]), (outputs[0], grads[0]), rtol=rtol, atol=1e-2 * rtol)
    if name != "authors" and "reset" not in vars(made):
        made.reset(), converted[0].reset()
        assert calls == ["reset", "reset"]
    assert type(asgl_cuda.revert(converted, inplace=True)[0][0]) is type(twin)


OWN = {
    "LIFCell": (norse.LIFCell, {"record_states": True}),
    "LIFRecurrentCell": (lambda: norse.LIFRecurrentCell(N, N, norse_values()), {"record_states": True}),
    "Leaky": (lambda: snntorch.Leaky(0.5), {"recurrent": nn.ReLU()}),
    "element-wise": (lambda: ElementWise(neuron.IFNode(), torch.add, step_mode="m"), {"rc": nn.ReLU()}),
    "sinabs": (lambda: layers.LIF(2.0), {"rec_connect": nn.ReLU()}),
}


@pytest.mark.parametrize("name", OWN)
def test_attributes_that_other_classes_of_the_library_have(name):
    """They are the user's own in this class, and change no output, state or step."""
    torch.manual_seed(0)
    make, attributes = OWN[name]
    made = set_to(make(), **attributes)
    if "Recurrent" not in name:  # whose subclasses are left
        made.__class__ = subclass_of(type(made))
    model, report = asgl_cuda.convert(nn.Sequential(made), backend="reference")
    assert [row.layer for row in report.replaced] == [type(made).__name__]
    x = 20 * torch.rand(6, 4, N)
    outputs = [flat(each(x[0] if "Cell" in name else x)) for each in (made, model[0])]
    assert any(out.any() for out in outputs[0])
    torch.testing.assert_close(outputs[1], outputs[0])
    if name == "sinabs":
        torch.testing.assert_close(asgl_cuda.step(model, x[:, 0]), made(x[:, :1])[:, 0])


class Slow(neuron.LIFNode):
    """Changes only __init__."""

    def __init__(self, channels):
        super().__init__(tau=8.0, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")
        self.channels = channels
        self.register_buffer("seen", torch.zeros(channels))
        self.v_threshold = nn.Parameter(torch.tensor(0.8))  # in the place of a number
        self.projection = nn.Linear(channels, 2)


def test_what_is_a_subclasss_own_stays(in_double):
    made = Slow(5)
    converted, report = asgl_cuda.convert(nn.Sequential(made))
    assert [row.layer for row in report.replaced] == ["Slow"]
    assert list(converted.state_dict()) == list(nn.Sequential(made).state_dict())
    assert (converted[0].channels, isinstance(converted[0], Slow)) == (5, True)
    x_seq = 9 * torch.rand(6, 2, 5)
    hooked = []
    for each in (made, converted[0]):
        each.register_forward_hook(lambda module, given, out: hooked.append(out))
        (each(x_seq) * x_seq).sum().backward()
    assert torch.equal(*hooked)
    assert hooked[0].any()
    torch.testing.assert_close(converted[0].v_threshold.grad, made.v_threshold.grad, rtol=1e-12, atol=0)
    asgl_cuda.detach(converted)
    assert torch.equal(copy.deepcopy(converted)[0].projection.weight, made.projection.weight)
    assert list(asgl_cuda.revert(converted)[0].state_dict()) == list(converted.state_dict())


def do(self, *arguments):
    raise AssertionError("not called by convert")


def test_mixins_and_abstract_classes():
    behind = type("Behind", (), {"forward": do})  # overrides nothing
    for bases in ((Described, neuron.LIFNode), (neuron.LIFNode, abc.ABC), (neuron.LIFNode, behind)):
        assert asgl_cuda.convert(type("Mine", bases, {})())[1].left == []


METHODS = {
    neuron.LIFNode: (
        "forward", "single_step_forward", "single_step_functional_forward", "materialize_states", "__call__",
        "__getattr__", "__setattr__",
    ),
    neuron.SimpleIFNode: ("neuronal_charge", "neuronal_fire", "neuronal_reset"),
    neuron.CUBALIFNode: ("single_step_functional_forward",), neuron.NonSpikingLIFNode: ("neuronal_charge",),
    snntorch.Leaky: ("forward", "fire", "mem_reset", "_base_state_function", "_base_sub"),
    snntorch.Synaptic: ("forward",), norse.LIF: ("initial_state",), norse.LIFCell: ("forward",),
    layers.LIF: ("forward",), layers.IAFSqueeze: ("init_state_with_shape",),
}  # fmt: skip
OPTIONS = {
    snntorch.Leaky: {"beta": 0.5}, snntorch.Synaptic: {"alpha": 0.5, "beta": 0.5}, layers.LIF: {"tau_mem": 2.0},
    layers.IAFSqueeze: {"batch_size": 1},
}  # fmt: skip


@pytest.mark.parametrize("base", METHODS, ids=lambda base: base.__name__)
def test_one_that_overrides_or_exchanges_a_method(base):
    for name in METHODS[base]:
        made = base(**OPTIONS.get(base, {}))
        made.__class__ = subclass_of(base, **{name: calling(base, name)})
        model, report = asgl_cuda.convert(nn.Sequential(made), inplace=True)
        reason = f"its {name} is defined by Mine, not by {base.__name__}, which convert knows"
        assert report == ([], [("0", "Mine", reason)])
        assert model[0] is made
        for inplace in (False, True) if not name.startswith("__") else ():
            made = base(**OPTIONS.get(base, {}))
            exchange(made, name)
            model, report = asgl_cuda.convert(nn.Sequential(made), inplace=inplace)
            assert type(model[0]) is base
            reason = f"its {name} is an attribute of this layer, not the method of {base.__name__}"
            assert [row.reason for row in report.left] == [reason]


def test_one_that_overrides_in_other_ways():
    mixin = type("Mixin", (), {"materialize_states": do})
    constant = property(lambda self: 3.0, lambda self, value: None)
    for kind, name, where in (
        (type("Mine", (mixin, neuron.LIFNode), {}), "materialize_states", "Mixin"),
        (type("Again", (subclass_of(neuron.LIFNode, forward=do),), {}), "forward", "Mine"),
        (subclass_of(neuron.LIFNode, tau=constant), "tau", "Mine"),
        (subclass_of(neuron.LIFNode, store_v_seq=constant), "store_v_seq", "Mine"),
        (subclass_of(neuron.LIFNode, apply_soft_reset=nn.Identity()), "apply_soft_reset", "Mine"),
    ):
        (row,) = asgl_cuda.convert(kind())[1].left
        assert row.reason == f"its {name} is defined by {where}, not by LIFNode, which convert knows"
    made = authors_layer(made=False)
    made.__class__ = type("LIFLayer", (type(made),), {"forward": do})
    inside = authors_layer(made=False)
    exchange(inside.cell, "forward")
    functions = [snntorch.Leaky(0.5), norse.LIF()]
    for each, name in zip(functions, ("state_function", "state_fallback"), strict=True):
        exchange(each, name)
    for each, reason in (
        (made, "its forward is defined by LIFLayer, not by LIFLayer, which convert knows"),
        (inside, "its forward is an attribute of this layer, not the method of LIFCell"),
        (functions[0], "state_function"), (functions[1], "state_fallback"),
    ):  # fmt: skip
        assert reason in asgl_cuda.convert(each)[1].left[0].reason


@pytest.mark.parametrize(
    ("base", "name"),
    [(snntorch.Leaky, "compute_step"), (neuron.LIFNode, "width"), (layers.LIF, "settings"),
     (neuron.LIFNode, "multi_spike"), (snntorch.Leaky, "_last"), (neuron.LIFNode, "_analog_prob"),
     (neuron.LIFNode, "_analog_prob_data"),
     (neuron.LIFNode, "original"), (layers.LIF, "_least")],
)  # fmt: skip
def test_one_with_a_name_of_converted_layers(base, name):
    options = OPTIONS.get(base, {})
    set_, registered = set_to(subclass_of(base)(**options), **{name: 3}), subclass_of(base)(**options)
    registered.register_module(name, nn.Linear(2, 2))
    for each in (set_, registered, subclass_of(base, **{name: do})(**options)):
        (row,) = asgl_cuda.convert(each, inplace=True)[1].left
        assert (
            row.reason == f"its attribute {name} has a name that converted layers use themselves; rename the attribute"
        )
