"""Layers that change after their conversion: values are followed, what decides the computation is refused."""

import copy
import functools
import pickle

import norse.torch as norse
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from conversions import SINGLE, ElementWise, Linear, N, authors_layer, close, exchange, reset, run, sinabs_recurrent
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import asgl_cuda
from asgl_cuda.interop import converted as module
from asgl_cuda.interop.identify import closure_values
from asgl_cuda.interop.snntorch import MultiStep

SHAPE = (6, 4, N)


def jelly():
    return neuron.LIFNode(step_mode="m", surrogate_function=surrogate.Sigmoid(3.0))


def leaky(kind="Leaky", **options):
    more = {"beta": 0.7, "init_hidden": True, "spike_grad": snn_surrogate.atan(2.0), **options}
    return getattr(snntorch, kind)(**more)


def box(method="tanh"):
    return norse.LIFBoxCell(
        norse.LIFBoxParameters(tau_mem_inv=torch.tensor(400.0), method=method, alpha=torch.tensor(5.0))
    )


def iaf(**options):
    return sinabs.layers.IAF(**SINGLE, **options)


def exponential():
    return iaf(surrogate_grad_fn=sinabs.activation.SingleExponential())


def output_of(layer, x_seq):
    return run(layer, x_seq)[0][0]


def written(name, value):
    """Loads a state dict, which writes to the existing tensors."""
    return lambda layer: layer.load_state_dict({**layer.state_dict(), name: torch.tensor(value)})


def given(part=None, **attributes):
    def change(layer):
        for name, value in attributes.items():
            setattr(getattr(layer, part) if part else layer, name, value)

    return change


def parameters(**values):
    return lambda layer: setattr(layer, "p", layer.p._replace(**values))


def own_threshold(**options):
    """The default threshold is one object for all layers of sinabs."""
    return {"spike_threshold": torch.tensor(1.0), **options}


class Widened(nn.Module):
    """A user's surrogate with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slope", torch.tensor(3.0))

    def forward(self, u):
        smooth = (self.slope * u).sigmoid()
        return smooth + ((u >= 0).to(u) - smooth).detach()


class Inside(nn.Module):
    """A user's surrogate that calls another module, and has a slope of its class and one that does not learn."""

    gain = 1.0

    def __init__(self):
        super().__init__()
        self.inner = Widened()
        self.inner.scale = 1.0
        self.factor = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, u):
        return self.inner(self.gain * self.factor * self.inner.scale * u)


class Called:
    """A user's surrogate that is no module."""

    slope = 3.0

    def __call__(self, u):
        smooth = (self.slope * u).sigmoid()
        return smooth + ((u > 0).to(u) - smooth).detach()


def closing_over(slope):
    """A surrogate whose number can be changed, as by a schedule."""

    def function(u):
        smooth = (slope * u).sigmoid()
        return smooth + ((u > 0).to(u) - smooth).detach()

    def change(value):
        nonlocal slope
        slope = value

    function.change = change
    return function


def closing_over_a_module():
    module = Widened()
    return lambda u: module(u)


def users_surrogate(v_mem, spike_threshold):
    return torch.exp(-torch.abs(v_mem - spike_threshold) / spike_threshold)


def quantised(mem):
    return mem


def authors():
    return authors_layer(steps=SHAPE[0], made=False)


def nodes(function, step_mode="m", kind="LIFNode"):
    return getattr(neuron, kind)(step_mode=step_mode, surrogate_function=function)


def container(*before):
    node = neuron.LIFNode()
    return Linear(nn.Sequential(*before, node) if before else node, N, N, step_mode="m")


CURRENT = ("tau_mem_inv", "tau_syn_inv", "v_th", "v_leak", "v_reset")
alpha_in_closure = torch.tensor(2.0)
FOLLOWED = {
    "sinabs, threshold loaded": (
        lambda: sinabs.layers.LIF(3.0, **SINGLE, **own_threshold()), written("spike_threshold", 0.3),
    ),
    "sinabs, threshold loaded, several": (
        lambda: sinabs.layers.LIF(3.0, **own_threshold()), written("spike_threshold", 0.4),
    ),
    "sinabs, threshold set": (iaf, given(spike_threshold=nn.Parameter(torch.tensor(2.5), requires_grad=False))),
    "sinabs, reset by another amount": (
        lambda: iaf(reset_fn=sinabs.activation.MembraneSubtract()), given("reset_fn", subtract_value=0.4),
    ),
    "spikingjelly, values": (jelly, given(tau=3.0, v_threshold=0.6, v_reset=-0.2)),
    "spikingjelly, soft": (jelly, given(v_reset=None)),
    "snntorch, beta": (leaky, written("beta", 0.3)),
    "snntorch, threshold": (leaky, given(threshold=torch.tensor(0.4))),
    "snntorch, Lapicque": (
        lambda: leaky(kind="Lapicque", beta=False, R=0.5, C=3.0, time_step=0.8),
        given(R=torch.tensor(0.9), C=torch.tensor(1.5), time_step=torch.tensor(1.0)),
    ),
    "snntorch, Synaptic": (lambda: leaky(kind="Synaptic", alpha=0.7), given(alpha=torch.tensor(0.3))),
    "norse, values": (box, parameters(v_th=torch.tensor(0.4), tau_mem_inv=torch.tensor(200.0))),
    "norse, values of a cell with a current": (
        norse.LIFCell, parameters(**dict(zip(CURRENT, torch.tensor([400.0, 300.0, 0.6, 0.1, -0.2]), strict=True))),
    ),
}  # fmt: skip


def gradient(layer, x_seq):
    leaf = x_seq.clone().requires_grad_()
    s_seq = output_of(layer, leaf)
    (s_seq * torch.arange(1.0, 1 + s_seq.numel()).reshape(s_seq.shape).cos()).sum().backward()
    return s_seq.detach(), leaf.grad


@pytest.mark.parametrize("name", FOLLOWED)
def test_values_are_followed(name):
    make, change = FOLLOWED[name]
    torch.manual_seed(0)
    x_seq, layer = 2 * torch.rand(SHAPE), make()
    converted, _ = asgl_cuda.convert(make())
    before = gradient(converted, x_seq)
    reset(converted)
    change(layer), change(converted)
    found, expected = gradient(converted, x_seq), gradient(layer, x_seq)
    assert torch.equal(found[0], expected[0])
    assert close(found[1], expected[1])
    assert not close(before[1], expected[1])


REFUSED = {
    "alpha": (jelly, given("surrogate_function", alpha=0.7), "surrogate_function.alpha is 0.7, and was 3.0"),
    "spiking mode": (jelly, lambda layer: layer.surrogate_function.set_spiking_mode(False), "spiking is False"),
    "another surrogate": (
        jelly, given(surrogate_function=surrogate.S2NN()), "surrogate_function is S2NN, and was Sigmoid",
    ),
    "a buffer": (
        lambda: neuron.LIFNode(step_mode="m", surrogate_function=Widened()),
        written("surrogate_function.slope", 0.7), "surrogate_function.slope is ",
    ),
    "levels": (
        lambda: neuron.ILIFNode(step_mode="m"), given("surrogate_function", max_spike_count=6), "max_spike_count is 6",
    ),
    "levels of another": (
        lambda: neuron.ILIFNode(step_mode="m"), given(surrogate_function=surrogate.ATan()),
        "surrogate_function is ATan, and was MultiLevelSpikeCount",
    ),
    "detached": (jelly, given(detach_reset=True), "detach_reset is True, and was False"),
    "a precision": (jelly, given(_neuron_precision=("fp16", "fp32", "fp32")), "precision is "),
    "spike_grad": (leaky, given(spike_grad=snn_surrogate.fast_sigmoid(3.0)), "spike_grad is "),
    "a tensor of a closure": (
        lambda: leaky(spike_grad=snn_surrogate.atan(alpha_in_closure)), lambda layer: alpha_in_closure.fill_(5.0),
        "alpha of spike_grad is ",
    ),
    "a number of a closure": (
        lambda: leaky(spike_grad=closing_over(3.0)), lambda layer: layer.spike_grad.change(2.0),
        "slope of spike_grad is 2.0, and was 3.0",
    ),
    "a module of a closure": (
        lambda: leaky(spike_grad=closing_over_a_module()),
        lambda layer: closure_values(layer.spike_grad)[0].slope.fill_(2.0),
        "module of spike_grad.slope is ",
    ),
    "an attribute inside": (
        lambda: nodes(Inside()), lambda layer: setattr(layer.surrogate_function.inner, "scale", 2.0),
        "surrogate_function.inner.scale is 2.0, and was 1.0",
    ),
    "a buffer inside": (
        lambda: nodes(Inside()), written("surrogate_function.inner.slope", 2.0), "surrogate_function.inner.slope is ",
    ),
    "a parameter that does not learn": (
        lambda: nodes(Inside()), written("surrogate_function.factor", 2.0), "surrogate_function.factor is ",
    ),
    "an attribute over that of the class": (
        lambda: nodes(Inside()), given("surrogate_function", gain=2.0),
        "surrogate_function.gain is an attribute, not the method of Inside",
    ),
    "an attribute over that of a class that is no module": (
        lambda: leaky(spike_grad=Called()), given("spike_grad", slope=2.0),
        "spike_grad.slope is an attribute, not the method of Called",
    ),
    "inhibition": (leaky, given(inhibition=True), "inhibition is True"),
    "quantised": (leaky, given(state_quant=quantised), "state_quant is quantised, and was False"),
    "graded": (leaky, written("graded_spikes_factor", 0.5), "graded_spikes_factor is "),
    "reset": (leaky, given(reset_mechanism="zero"), "reset_mechanism is "),
    "state": (leaky, given(state_function=quantised), "state_function is quantised, and was "),
    "no delay": (leaky, given(reset_delay=False), "reset_delay is False, and was True"),
    "activation": (box, given(activation=norse.iaf_feed_forward_step), "activation is iaf_feed_forward_step"),
    "a first state": (box, given(state_fallback=quantised), "state_fallback is quantised, and was initial_state"),
    "alpha of Norse": (box, parameters(alpha=torch.tensor(1.0)), "alpha is "),
    "a write": (box, lambda layer: layer.p.alpha.fill_(1.0), "alpha is "),
    "method": (box, parameters(method="super"), "method is 'super', and was 'tanh'"),
    "reset of Norse": (box, parameters(reset_method=quantised), "reset_method is quantised, and was reset_value"),
    "LI": (norse.LI, given(activation=norse.iaf_feed_forward_step), "activation is iaf_feed_forward_step"),
    "spikes of another kind": (iaf, given(spike_fn=sinabs.activation.MaxSpike(2)), "spike_fn is "),
    "a largest number": (
        lambda: sinabs.layers.IAF(spike_fn=sinabs.activation.MaxSpike(2)), given("spike_fn", max_num_spikes_per_bin=3),
        "max_num_spikes_per_bin is 3, and was 2",
    ),
    "grad_width": (iaf, given("surrogate_grad_fn", grad_width=1.5), "surrogate_grad_fn.grad_width is 1.5, and was 0.5"),
    "sinabs, surrogate": (iaf, given(surrogate_grad_fn=sinabs.activation.Gaussian(0.0, 0.3)), "surrogate_grad_fn is "),
    "a threshold in a user's surrogate": (
        lambda: iaf(surrogate_grad_fn=users_surrogate, **own_threshold()),
        written("spike_threshold", 2.5),
        "threshold is ",
    ),
    "sinabs, reset": (iaf, given(reset_fn=sinabs.activation.MembraneReset()), "reset_fn is MembraneReset"),
    "sinabs, floor": (lambda: sinabs.layers.IAF(min_v_mem=-1.0), written("min_v_mem", -2.0), "min_v_mem is "),
    "ExpLeak, floor": (
        lambda: sinabs.layers.ExpLeak(2.0), given(min_v_mem=nn.Parameter(torch.tensor(0.0))), "min_v_mem is ",
    ),
    "authors": (
        authors, lambda layer: setattr(layer.cell.spike_fn, "spike", False), "spike is False",
    ),
    "another connection": (
        lambda: snntorch.RLeaky(0.8, linear_features=N), given(recurrent=nn.Identity()), "through a Identity",
    ),
    "a hook of a connection": (
        lambda: sinabs_recurrent(3.0), lambda layer: layer.rec_connect.register_forward_hook(print), "with hooks",
    ),
    "another connection of sinabs": (
        lambda: sinabs_recurrent(3.0), given(rec_connect=nn.Identity()),
        "spikes return through a Identity; a Linear can be converted; ",
    ),
    "recorded": (lambda: sinabs_recurrent(3.0), given(record_states=True), "record_states is True"),
    "another node": (lambda: container(), given(sub_module=neuron.QIFNode()), "sub_module is QIFNode"),
    "another connection of a container": (
        lambda: container(), given(rc=nn.Identity()), "spikes return through a Identity; a Linear can be converted; ",
    ),
    "another module": (lambda: container(), given(sub_module=nn.ReLU()), "surrogate_function is None, and was Sigmoid"),
    "more modules": (
        lambda: container(nn.Linear(N, N)), lambda layer: layer.sub_module.append(nn.ReLU()),
        "surrogate_function is None, and was Sigmoid",
    ),
    "potentials": (lambda: container(), given("sub_module", store_v_seq=True), "store_v_seq is True"),
    "another function": (
        lambda: ElementWise(neuron.IFNode(), torch.add, step_mode="m"), given(element_wise_function=torch.mul),
        "element_wise_function is mul",
    ),
    "a gate": (authors, given("cell", use_gate=True), "use_gate is True, and was False"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_changes_are_refused(name):
    make, change, reason = REFUSED[name]
    alpha_in_closure.fill_(2.0)
    converted, report = asgl_cuda.convert(make())
    assert len(report.replaced) == 1, report
    call = functools.partial(output_of, converted)
    x_seq = torch.rand(SHAPE)
    call(x_seq)
    change(converted)
    for _ in range(2):  # a refusal is no acceptance
        words = f"was changed after its conversion: its .*{reason}.*convert again with the same arguments: "
        with pytest.raises(RuntimeError, match=words):
            call(x_seq)
    assert type(asgl_cuda.revert(converted, inplace=True)[0]) is type(make())


# Layers, and the modules that the kernel computes in place of.
NOT_CALLED = {
    "LIFNode": (jelly, "surrogate_function"),
    "LIFNode, a step": (lambda: neuron.LIFNode(), "surrogate_function"),
    "CUBALIFNode": (lambda: neuron.CUBALIFNode(), "surrogate_function"),
    "ILIFNode, a step": (lambda: neuron.ILIFNode(), "surrogate_function"),
    "a surrogate inside of a surrogate": (lambda: nodes(Inside()), "surrogate_function.inner"),
    "snnTorch": (lambda: leaky(spike_grad=Widened()), "spike_grad"),
    "snnTorch, whole": (lambda: MultiStep(leaky(spike_grad=Widened())), "layer.spike_grad"),
    "a container's node": (container, "sub_module"),
    "a container's surrogate": (container, "sub_module.surrogate_function"),
    "a container's Linear": (lambda: container(nn.Linear(N, N)), "sub_module.0"),
    "authors, cell": (authors, "cell"),
    "authors, spikes": (authors, "cell.spike_fn"),
    "authors, surrogate": (authors, "cell.spike_fn.inv_sg"),
}
HIDDEN = {
    "forward": lambda module: exchange(module, "forward"),
    "hook": lambda module: module.register_forward_hook(lambda module, inputs, output: 2 * output),
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda module, inputs: inputs),
    "backward hook": lambda module: module.register_full_backward_hook(lambda *given: None),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda *given: None),
}


@pytest.mark.parametrize("change", HIDDEN)
@pytest.mark.parametrize("name", NOT_CALLED)
def test_methods_and_hooks_of_what_is_not_called_are_refused(name, change):
    """Of a copy as well; without the change the layer works again."""
    make, path = NOT_CALLED[name]
    made = make()
    for converted in (made, copy.deepcopy(made)) if isinstance(made, MultiStep) else (asgl_cuda.convert(made)[0],):
        x_seq = torch.rand(SHAPE)
        before = output_of(converted, x_seq)
        module = converted.get_submodule(path)
        hook = HIDDEN[change](module)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"after its conversion: its .*({path.split('.')[-1]}|feedback)"):
                output_of(converted, x_seq)
        module.__dict__.pop("forward") if hook is None else hook.remove()
        reset(converted)
        assert torch.equal(output_of(converted, x_seq), before)


def test_hooks_from_before_stay_accepted():
    """Which are in the report, in copies as well; a second one is not."""
    made = jelly()
    made.surrogate_function.register_forward_hook(lambda module, inputs, output: output)
    converted, report = asgl_cuda.convert(made)
    assert report.notes == ["(the model): hooks of surrogate_function are no longer called"]
    for each in (converted, copy.deepcopy(converted)):
        each(torch.rand(SHAPE))
        each.surrogate_function.register_forward_hook(lambda module, inputs, output: output)
        with pytest.raises(RuntimeError, match="its surrogate_function has other hooks than before, which would not"):
            each(torch.rand(SHAPE))


def test_a_change_is_refused_in_a_compiled_graph():
    converted, _ = asgl_cuda.convert(jelly())
    compiled = torch.compile(converted, backend="eager")
    compiled(torch.rand(SHAPE))
    converted.surrogate_function.alpha = 0.7
    with pytest.raises(RuntimeError, match=r"surrogate_function\.alpha is 0\.7, and was 3\.0"):
        compiled(torch.rand(SHAPE))


def test_an_asgl_layer_keeps_its_own_surrogate():
    converted, _ = asgl_cuda.convert(jelly(), asgl={"surrogate": "rectangle", "width": 2.0, "learn_width": False})
    converted.eval().surrogate_function.alpha = 0.5
    converted(torch.rand(SHAPE))
    converted.surrogate_function = surrogate.ATan()
    converted(torch.rand(SHAPE))
    assert converted.settings.spike[:3] == ("rectangle", 2.0, 1.0)
    made = sinabs.layers.LIF(3.0, **SINGLE, **own_threshold(), surrogate_grad_fn=users_surrogate)
    converted, _ = asgl_cuda.convert(made, asgl={"width": 2.0, "learn_width": False})
    written("spike_threshold", 0.3)(converted)
    converted.eval()(torch.rand(SHAPE))
    assert converted.width == 2.0


def test_what_is_no_change(monkeypatch):
    """Another mode, copies, and a load of equal values; values are compared once."""
    made = [asgl_cuda.convert(make())[0] for make in (jelly, leaky, box, iaf)]
    made += [copy.deepcopy(made[0]), pickle.loads(pickle.dumps(made[0]))]
    made.append(asgl_cuda.convert(neuron.LIFNode(step_mode="m", surrogate_function=Widened()))[0])
    for converted in made:
        converted.load_state_dict(copy.deepcopy(converted.state_dict()))
        output_of(converted.eval(), torch.rand(SHAPE))
        monkeypatch.setattr(module, "_is_equal", lambda one, other: pytest.fail("it was compared again"))
        output_of(converted.train(), torch.rand(SHAPE))
        monkeypatch.undo()


# ---- exchanged methods ----


@pytest.mark.parametrize(("name", "make"), [
    ("fire", leaky), ("neuronal_charge", lambda: neuron.SimpleLIFNode(2.0, True)), ("init_state_with_shape", iaf),
])  # fmt: skip
def test_a_method_that_is_exchanged_after_the_conversion_is_named(name, make):
    converted, _ = asgl_cuda.convert(make())
    x_seq = torch.rand(SHAPE)
    converted(x_seq)
    exchange(converted, name)
    kind = type(make()).__name__
    with pytest.raises(
        RuntimeError, match=f"conversion: its {name} is an attribute of this layer, not the method of {kind}"
    ):
        converted(x_seq)
    delattr(converted, name)
    converted(x_seq)


# ---- hooks ----


class Net(nn.Module):
    """A Norse, a torch and a sinabs layer, with hooks on tensors and modules."""

    def __init__(self):
        super().__init__()
        self.recurrent = norse.LIFRecurrentCell(3, 3, norse.LIFParameters(alpha=torch.tensor(1.0)))
        self.linear = nn.Linear(3, 3)
        self.sinabs = sinabs.layers.LIF(3.0, norm_input=False, **SINGLE)
        self.sinabs.name = "hidden"
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
    x = 20 * torch.rand(4, 3)
    made, report = getattr(asgl_cuda, function)(model, *[x] * (function == "fuse"))
    assert len(report.replaced) == 2 * (function == "convert")
    assert (made.sinabs.name, made.sinabs.training) == ("hidden", False)
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
