"""Changes of a layer after its conversion are followed or refused; exchanged methods are left."""

import copy
import functools
import pickle

import authors_code
import norse.torch as norse
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from conversions import SINGLE, authors_layer, close, reset
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import asgl_cuda
from asgl_cuda.interop.converted import Converted


def own_threshold():
    """The default threshold is one object for all layers of sinabs."""
    return {"spike_threshold": torch.tensor(1.0)}


SHAPE = (6, 4, 30)


def jelly():
    return neuron.LIFNode(step_mode="m", surrogate_function=surrogate.Sigmoid(3.0))


def leaky(**options):
    return snntorch.Leaky(**{"beta": 0.7, "init_hidden": True, "spike_grad": snn_surrogate.atan(2.0), **options})


def box(method="tanh"):
    return norse.LIFBoxCell(
        norse.LIFBoxParameters(tau_mem_inv=torch.tensor(400.0), method=method, alpha=torch.tensor(5.0))
    )


def iaf(**options):
    return sinabs.layers.IAF(**SINGLE, **options)


def exponential():
    return iaf(surrogate_grad_fn=sinabs.activation.SingleExponential())


def output_of(layer, x_seq):
    if isinstance(layer, (sinabs.layers.StatefulLayer, neuron.BaseNode, neuron.SimpleIFNode)):
        return layer(x_seq)
    out, state = [], None
    for x in x_seq:
        if isinstance(layer, snntorch.SpikingNeuron):
            out.append(layer(x))
        else:
            spikes, state = layer(x, state)
            out.append(spikes)
    return torch.stack(out)


def gradient(layer, x_seq):
    leaf = x_seq.clone().requires_grad_()
    s_seq = output_of(layer, leaf)
    (s_seq * torch.arange(1.0, 1 + s_seq.numel()).reshape(s_seq.shape).cos()).sum().backward()
    return s_seq.detach(), leaf.grad


def written(name, value):
    """Loads a state dict, which writes to the existing tensors."""

    def change(layer):
        layer.load_state_dict({**layer.state_dict(), name: torch.tensor(value)})

    return change


def given(**attributes):
    def change(layer):
        for name, value in attributes.items():
            setattr(layer, name, value)

    return change


def parameters(**values):
    return lambda layer: setattr(layer, "p", layer.p._replace(**values))


def surrogate_with(name, **values):
    def change(layer):
        for attribute, value in values.items():
            setattr(getattr(layer, name), attribute, value)

    return change


class OwnExponential:
    """A user's surrogate with the threshold as width."""

    def __call__(self, v_mem, spike_threshold):
        return torch.exp(-torch.abs(v_mem - spike_threshold) / spike_threshold)


class Widened(nn.Module):
    """A user's surrogate with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slope", torch.tensor(3.0))

    def forward(self, u):
        smooth = (self.slope * u).sigmoid()
        return smooth + ((u >= 0).to(u) - smooth).detach()


alpha_in_closure = torch.tensor(2.0)

FOLLOWED = {
    "sinabs, threshold loaded": (
        lambda: sinabs.layers.LIF(3.0, **SINGLE, **own_threshold()), written("spike_threshold", 0.3),
    ),
    "sinabs, threshold loaded, several": (
        lambda: sinabs.layers.LIF(3.0, **own_threshold()), written("spike_threshold", 0.4),
    ),
    "sinabs, threshold set": (
        iaf, given(spike_threshold=nn.Parameter(torch.tensor(2.5), requires_grad=False)),
    ),
    "sinabs, threshold and surrogate of a user": (
        lambda: iaf(surrogate_grad_fn=OwnExponential(), **own_threshold()), written("spike_threshold", 2.5),
    ),
    "sinabs, grad_width": (exponential, surrogate_with("surrogate_grad_fn", grad_width=1.5)),
    "sinabs, grad_scale": (exponential, surrogate_with("surrogate_grad_fn", grad_scale=1.5)),
    "sinabs, periodic": (
        lambda: sinabs.layers.IAF(surrogate_grad_fn=sinabs.activation.PeriodicExponential()),
        surrogate_with("surrogate_grad_fn", grad_width=0.2, grad_scale=3.0),
    ),
    "sinabs, another": (iaf, given(surrogate_grad_fn=sinabs.activation.Gaussian(0.0, 0.3))),
    "spikingjelly, alpha": (jelly, surrogate_with("surrogate_function", alpha=0.7)),
    "spikingjelly, another": (jelly, given(surrogate_function=surrogate.ATan(2.5))),
    "spikingjelly, a buffer": (
        lambda: neuron.LIFNode(step_mode="m", surrogate_function=Widened()),
        written("surrogate_function.slope", 0.7),
    ),
    "snntorch, another": (leaky, given(spike_grad=snn_surrogate.fast_sigmoid(3.0))),
    "snntorch, a tensor of a closure": (
        lambda: leaky(spike_grad=snn_surrogate.atan(alpha_in_closure)), lambda layer: alpha_in_closure.fill_(5.0),
    ),
    "norse, parameters": (box, parameters(alpha=torch.tensor(1.0))),
    "norse, a write": (box, lambda layer: layer.p.alpha.fill_(1.0)),
    "norse, method": (box, parameters(method="super")),
}  # fmt: skip


@pytest.mark.parametrize("how", ["convert", "copy", "inference"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_surrogate_that_is_changed_is_followed(name, how):
    make, change = FOLLOWED[name]
    torch.manual_seed(0)
    x_seq = 2 * torch.rand(SHAPE)
    alpha_in_closure.fill_(2.0)
    converted, _ = asgl_cuda.convert(make())
    converted = copy.deepcopy(converted) if how == "copy" else converted
    _, before = gradient(converted, x_seq)
    alpha_in_closure.fill_(2.0)
    layer = make()
    change(layer)
    expected = gradient(layer, x_seq)
    alpha_in_closure.fill_(2.0)
    reset(converted)
    change(converted)
    twin = copy.deepcopy(converted)
    if how == "inference":  # without gradients by which a surrogate could be identified
        with torch.inference_mode():
            output_of(twin, x_seq)
    found = gradient(converted, x_seq)
    assert torch.equal(found[0], expected[0])
    assert close(found[1], expected[1])
    assert not close(before, expected[1])


def quantised(mem):
    return mem


REFUSED = {
    "spiking mode": (jelly, lambda layer: layer.surrogate_function.set_spiking_mode(False), "does not spike"),
    "spikingjelly, no surrogate": (
        jelly, given(surrogate_function=surrogate.S2NN()), "its surrogate, S2NN, is none",
    ),
    "a precision": (jelly, given(_neuron_precision=("fp16", "fp32", "fp32")), "a precision of its own"),
    "inhibition": (leaky, given(inhibition=True), "it has inhibition"),
    "quantised": (leaky, given(state_quant=quantised), "it quantises its state"),
    "graded": (leaky, written("graded_spikes_factor", 0.5), "its spikes are graded"),
    "reset": (leaky, given(reset_mechanism="zero"), "its state_function is not that of its reset_mechanism"),
    "state": (leaky, given(state_function=lambda x: x), "its state_function is not that of its reset_mechanism"),
    "norse, activation": (box, given(activation=norse.iaf_feed_forward_step), "it steps by iaf_feed_forward_step"),
    "norse, reset": (box, parameters(reset_method=quantised), "a function of its own"),
    "norse, LI": (norse.LI, given(activation=norse.iaf_feed_forward_step), "it steps by iaf_feed_forward_step"),
    "spikes of another kind": (iaf, given(spike_fn=sinabs.activation.MaxSpike(2)), "it fires in another way"),
    "several spikes": (iaf, given(spike_fn=sinabs.activation.MultiSpike), "it fires in another way"),
    "sinabs, reset": (
        iaf, given(reset_fn=sinabs.activation.MembraneReset(0.5)), "resets to a value that is not 0",
    ),
    "sinabs, floor": (
        lambda: sinabs.layers.ExpLeak(2.0), given(min_v_mem=nn.Parameter(torch.tensor(0.0))), "a least potential",
    ),
    "authors": (
        lambda: authors_layer(SHAPE[0]),
        lambda layer: setattr(layer.cell.spike_fn, "spike", False),
        "it emits smooth values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_changes_are_refused(name):
    make, change, reason = REFUSED[name]
    converted, report = asgl_cuda.convert(make())
    assert len(report.replaced) == 1, report
    x_seq = torch.rand(SHAPE)
    call = (
        converted
        if isinstance(converted, (norse.LI, authors_code.LIFLayer))
        else functools.partial(output_of, converted)
    )
    call(x_seq)
    change(converted)
    with pytest.raises(RuntimeError, match=f"was changed after its conversion: .*{reason}.*asgl_cuda.revert"):
        call(x_seq)
    assert type(asgl_cuda.revert(converted)[0]) is type(make())


def test_an_asgl_layer_keeps_its_own_surrogate():
    converted, _ = asgl_cuda.convert(jelly(), asgl={"surrogate": "rectangle", "width": 2.0, "learn_width": False})
    converted.eval().surrogate_function.alpha = 0.5
    x_seq = torch.rand(SHAPE)
    converted(x_seq)
    assert converted.settings.spike[:3] == ("rectangle", 2.0, 1.0)
    made = sinabs.layers.LIF(3.0, **SINGLE, **own_threshold())
    converted, _ = asgl_cuda.convert(made, asgl={"width": 2.0, "learn_width": False})
    written("spike_threshold", 0.3)(converted)
    converted.eval()(x_seq)
    assert converted.width == 2.0


def test_a_surrogate_that_did_not_change_is_not_looked_at_again(monkeypatch):
    """Switching between training and evaluation, and moving the layer, is no change."""
    made = [asgl_cuda.convert(make())[0] for make in (jelly, leaky, box, iaf)]
    made.append(copy.deepcopy(made[0]))
    made.append(pickle.loads(pickle.dumps(made[0])))
    monkeypatch.setattr(Converted, "_look_again", lambda self: pytest.fail("it looked again"))
    for converted in made:
        for _ in range(2):
            output_of(converted.eval(), torch.rand(SHAPE))
            converted.train()


def test_a_compiled_graph_follows_an_attribute():
    layer = jelly()
    converted, _ = asgl_cuda.convert(layer)
    compiled = torch.compile(converted, backend="eager")
    x_seq = 2 * torch.rand(SHAPE)

    def gradient_of(module, node):
        node.reset()
        leaf = x_seq.clone().requires_grad_()
        module(leaf).sum().backward()
        return leaf.grad

    gradient_of(compiled, converted)
    for each in (layer, converted):
        each.surrogate_function.alpha = 0.7
    for _ in range(2):
        assert close(gradient_of(compiled, converted), gradient_of(layer, layer))


def test_a_surrogate_with_parameters_is_left():
    made = Widened()
    made.slope = nn.Parameter(torch.tensor(3.0)) if made._buffers.pop("slope") is not None else None
    _, report = asgl_cuda.convert(neuron.LIFNode(surrogate_function=made))
    assert "its spike function has parameters that learn" in report.left[0].reason


# ---- exchanged methods ----


def exchange(part, name):
    """Shadows a method by an instance attribute that calls the method."""
    method = getattr(part, name)
    setattr(part, name, lambda *arguments, **named: method(*arguments, **named))


METHODS = {
    "fire": leaky, "mem_reset": leaky, "_base_state_function": leaky, "forward": box, "initial_state": norse.LIF,
    "single_step_forward": neuron.LIFNode, "single_step_functional_forward": neuron.LIFNode,
    "neuronal_charge": lambda: neuron.SimpleLIFNode(2.0, True), "neuronal_fire": lambda: neuron.SimpleIFNode(),
    "neuronal_reset": lambda: neuron.SimpleIFNode(), "init_state_with_shape": iaf,
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_was_exchanged_in_the_layer_is_named(name, inplace):
    layer = METHODS[name]()
    exchange(layer, name)
    model, report = asgl_cuda.convert(nn.Sequential(layer), inplace=inplace)
    assert type(model[0]) is type(layer)
    ((_, _, reason),) = report.left
    assert reason == f"its {name} is not that of {type(layer).__name__}, but an attribute of this layer"


@pytest.mark.parametrize("name", ["fire", "neuronal_charge", "init_state_with_shape"])
def test_a_method_that_is_exchanged_after_the_conversion_is_named(name):
    make = METHODS[name]
    converted, _ = asgl_cuda.convert(make())
    x_seq = torch.rand(SHAPE)
    converted(x_seq)
    exchange(converted, name)
    with pytest.raises(RuntimeError, match=f"after its conversion: its {name} is not that of {type(make()).__name__}"):
        converted(x_seq)
    delattr(converted, name)
    converted(x_seq)


def test_other_functions_that_were_exchanged():
    for make, name in ((leaky, "state_function"), (norse.LIF, "state_fallback")):
        layer = make()
        exchange(layer, name)
        assert name in asgl_cuda.convert(layer)[1].left[0].reason
    layer = authors_layer(2)
    exchange(layer.cell, "forward")
    _, report = asgl_cuda.convert(layer)
    assert report.left[0].reason == "its forward is not that of LIFCell, but an attribute of this layer"


# ---- hooks ----


class Net(nn.Module):
    """A Norse, a torch and a sinabs layer, with hooks on tensors and modules."""

    def __init__(self):
        super().__init__()
        self.recurrent = norse.LIFRecurrentCell(3, 3, norse.LIFParameters(alpha=torch.tensor(1.0)))
        self.linear = nn.Linear(3, 3)
        self.sinabs = sinabs.layers.LIF(3.0, norm_input=False, **SINGLE)
        self.own = torch.ones(3, requires_grad=True)  # no parameter, like weights given to Norse's cells
        self.calls = []
        self.linear.weight.register_hook(self.doubled)
        self.linear.bias.register_post_accumulate_grad_hook(functools.partial(self.seen, "bias"))
        self.sinabs.tau_mem.register_hook(torch.zeros_like)
        self.sinabs.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        self.sinabs.register_forward_hook(lambda module, inputs, output: 3 * output)
        self.own.register_hook(torch.neg)

    def doubled(self, grad):
        self.calls.append("weight")
        return 2 * grad

    def seen(self, name, parameter):
        self.calls.append(name)
        parameter.grad.zero_()

    def forward(self, x):
        s, state = self.recurrent(self.linear(x) * self.own)
        s, _ = self.recurrent(2 * s + 3 * x, state)
        return self.sinabs((s + self.linear(x).abs()).unsqueeze(1))


@pytest.mark.parametrize("function", ["convert", "revert", "fuse"])
def test_hooks_of_tensors_and_of_modules_are_copied(function):
    torch.manual_seed(0)
    model = Net().eval()
    model.linear.bias.requires_grad_()
    made, report = getattr(asgl_cuda, function)(model)
    assert len(report.replaced) == int(function == "convert")
    x = 20 * torch.rand(4, 3)
    results = []
    for net in (model, made):
        net.zero_grad()
        net.sinabs.reset_states()
        out = net(x)
        out.sum().backward()
        results.append((out.detach(), net.own.grad, *(each.grad for each in net.parameters() if each.requires_grad)))
        assert net.calls == ["weight", "bias"] or net.calls == ["bias", "weight"]
    assert made.recurrent.recurrent_weights.grad.any()
    assert not made.recurrent.recurrent_weights.grad.diagonal().any()
    assert not made.linear.bias.grad.any()
    for ours, theirs in zip(*results[::-1], strict=True):
        assert close(ours, theirs)


def test_attributes_that_the_library_does_not_copy():
    layer = sinabs.layers.LIF(3.0, **SINGLE).eval()
    layer.tau_mem.requires_grad_(False)
    layer.name = "hidden"
    made, _ = asgl_cuda.convert(nn.Sequential(layer))
    assert not made[0].training
    assert not made[0].tau_mem.requires_grad
    assert made[0].name == "hidden"


def test_hooks_of_a_layer_that_is_converted_in_place_stay():
    layer = neuron.LIFNode(step_mode="m")
    layer.register_forward_pre_hook(lambda module, inputs: (5 * inputs[0],))
    layer.register_forward_hook(lambda module, inputs, output: 7 * output)
    x_seq = torch.rand(SHAPE)
    expected = layer(x_seq)
    layer.reset()
    converted, report = asgl_cuda.convert(layer, inplace=True)
    assert len(report.replaced) == 1
    assert torch.equal(converted(x_seq), expected)
    assert 7 in expected
