"""`convert` and `revert` on whole models: copies, names, noise, reports and errors."""

import copy
import inspect
import pickle
import re
import subprocess
import sys
from functools import partial

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from conversions import LAYERS, SINGLE, flat
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import asgl_cuda
from asgl_cuda.interop.converted import Converted
from asgl_cuda.interop.snntorch import MultiStep


def jelly(**options):
    return nn.Sequential(nn.Linear(4, 5), neuron.ParametricLIFNode(step_mode="m", **options), nn.Linear(5, 3))


def atan(**options):
    return jelly(surrogate_function=surrogate.ATan(4.0), **options)


def converted_node(net, **asgl):
    """The converted neurons of a model, and the report."""
    converted, report = asgl_cuda.convert(net, asgl=asgl)
    return converted[1], report


# ---- copies and back ----


@pytest.mark.parametrize("inplace", [False, True])
def test_a_copy_unless_inplace_is_said_and_back(inplace):
    net = jelly()
    keys, attributes = list(net.state_dict()), set(vars(net[1]))
    converted, _ = asgl_cuda.convert(net, inplace=inplace)
    assert (converted is net) == inplace
    assert isinstance(net[1], Converted) == inplace
    assert (converted[1].w is net[1].w) == inplace
    assert list(converted.state_dict()) == keys
    converted.load_state_dict({**jelly().state_dict(), "1.w": torch.tensor(0.3)})
    back, report = asgl_cuda.revert(converted, inplace=inplace)
    assert (back is converted) == inplace
    assert type(back[1]) is neuron.ParametricLIFNode
    assert set(vars(back[1])) == attributes
    assert back[1].w.item() == pytest.approx(0.3)
    assert report.replaced == [("1", "ConvertedParametricLIFNode", "ParametricLIFNode")]
    assert not report.left


OF_ALL_LIBRARIES = {
    **{name: LAYERS[name][0] for name in (
        "LIFNode", "CUBALIFNode", "Leaky, state inside", "norse LIF", "norse LIFCell", "norse LIFBoxCell", "sinabs LIF",
        "authors",
    )},
    "Synaptic": lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True),
    "sinabs LIF, a current": lambda: sinabs.layers.LIF(2.0, tau_syn=2.0, min_v_mem=-1.0, **SINGLE),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ALL_LIBRARIES)
def test_copies_after_a_call(name):
    """The state after a call is part of a graph, with which most libraries' layers can't be copied."""
    x = 3 * torch.rand(5, 4, 7, requires_grad=True)
    made = OF_ALL_LIBRARIES[name]()
    made(x)
    twin, report = asgl_cuda.convert(made)
    assert len(report.replaced) == 1
    states = (*vars(twin).values(), *twin._buffers.values(), *getattr(twin, "_memories", {}).values())
    assert not any(value.grad_fn for value in states if isinstance(value, torch.Tensor))
    torch.testing.assert_close(flat(twin(x)), flat(made(x)))
    if not name.startswith(("Leaky", "Synaptic", "norse")):  # else the library's own layer can't be pickled
        fresh, _ = asgl_cuda.convert(OF_ALL_LIBRARIES[name]())
        again = pickle.loads(pickle.dumps(fresh))
        assert (type(again), again.settings) == (type(fresh), fresh.settings)
        torch.testing.assert_close(flat(again(x)), flat(fresh(x)))


class Single(nn.Linear):
    """Has no copies."""

    def __deepcopy__(self, memo):
        raise ValueError("there is one")


def with_example(function, model, **options):
    return function(model, torch.rand(2, 3, 4), **options)


@pytest.mark.parametrize("name", ["convert", "revert", "fuse", "unfuse"])
def test_arguments_and_copies_of_all_four(name):
    function = getattr(asgl_cuda, name)
    text = inspect.getdoc(function)
    if name == "fuse":
        function = partial(with_example, function)
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{name}: model must be a torch\.nn\.Module, got list"):
        function([neuron.LIFNode()])
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{name}: inplace must be a bool, got str"):
        function(jelly(), inplace="no")
    if name != "fuse":  # whose positional arguments are those of a call
        with pytest.raises(TypeError, match="positional"):
            function(nn.Linear(2, 2), True)
    model = nn.Sequential(sinabs.layers.IAF(**SINGLE), nn.Sequential(Single(4, 4)))
    message = rf"asgl_cuda\.{name}: the model can't be copied \(ValueError: there is one\); .*inplace=True"
    with pytest.raises(RuntimeError, match=message):
        function(model)
    if name == "fuse":  # which calls copies
        with pytest.raises(RuntimeError, match=message):
            function(model, inplace=True)
    else:
        assert function(model, inplace=True)[0] is model
        assert isinstance(model[0], Converted) == (name == "convert")
    assert f", report = asgl_cuda.{name}(" in text.splitlines()[0]
    assert "\nReturns:\n" in text


@pytest.mark.parametrize("name", ["calibrate", "to_spike_layers", "to_nir"])
def test_models_without_copies(name):
    model = nn.Sequential(Single(4, 4), asgl_cuda.LIF())
    with pytest.raises(
        RuntimeError, match=rf"asgl_cuda\.{name}: the model can't be copied \(ValueError: there is one\)$"
    ):
        getattr(asgl_cuda, name)(model, torch.rand(2, 3, 4))


def test_a_layer_that_its_library_can_not_copy():
    """Left in a copy, which has states and weights of its own."""
    recurrent = sinabs.layers.LIFRecurrent(2.0, rec_connect=nn.Linear(4, 4))
    with pytest.raises(AttributeError):
        copy.deepcopy(recurrent)
    model = nn.Sequential(sinabs.layers.IAF(**SINGLE), recurrent)
    converted, report = asgl_cuda.convert(model)
    assert (len(report.replaced), type(converted[1])) == (1, type(recurrent))
    x_seq = 3 * torch.rand(2, 5, 4)
    torch.testing.assert_close(converted(x_seq), model(x_seq))
    assert converted[1].v_mem.data_ptr() != recurrent.v_mem.data_ptr()
    assert converted[1].rec_connect.weight.data_ptr() != recurrent.rec_connect.weight.data_ptr()


# ---- noise and the learned width ----


def test_asgl():
    converted, report = asgl_cuda.convert(jelly(), asgl={"width": 2.0, "analog_prob": 0.5, "surrogate": "rectangle"})
    assert report.replaced == [("1", "ParametricLIFNode", "rectangle, width 2, analog_prob 0.5, width learned")]
    node = converted[1]
    assert node.width.item() == pytest.approx(2.0)
    x_seq = 5 * torch.randn(20, 8, 4)
    s_seq = node(converted[0](x_seq))
    assert ((s_seq > 0) & (s_seq < 1)).any()
    s_seq.sum().backward()
    assert node.log_width.grad is not None
    assert set(converted.eval()[:2](x_seq).unique().tolist()) == {0.0, 1.0}
    saved = converted.state_dict()
    assert saved["1.log_width"].shape == (1,)


def test_asgl_takes_missing_options_from_the_layer():
    """But the gradient is that of the smooth value, without the surrogate's factor."""
    for given, spike in (
        ({}, ("arctan", 0.25, 1.0, False)), ({"width": 0.5}, ("arctan", 0.5, 1.0, False)),
        ({"surrogate": "sigmoid"}, ("sigmoid", 0.25, 1.0, False)),
    ):  # fmt: skip
        node, _ = converted_node(atan(), learn_width=False, **given)
        assert tuple(node.settings.spike) == pytest.approx(spike)
        assert (node.log_width, node.analog_prob) == (None, 0.5)
    super_spike = jelly(surrogate_function=surrogate.SuperSpike(3.0))
    assert asgl_cuda.convert(super_spike)[0][1].settings.spike.gain == pytest.approx(6.0)
    assert converted_node(super_spike)[0].settings.spike.gain == 1.0
    assert asgl_cuda.convert(snntorch.Leaky(0.8), asgl={"width": 0.5})[0].settings.spike.strict


def test_asgl_where_the_layers_own_surrogate_is_unknown():
    net = jelly(surrogate_function=surrogate.PiecewiseLeakyReLU())
    assert "PiecewiseLeakyReLU, is not one that" in asgl_cuda.convert(net)[1].left[0].reason
    leaky = snntorch.Leaky(beta=0.8, spike_grad=snntorch.surrogate.straight_through_estimator())
    for made in (net, leaky):
        for given, expected in (
            ({}, "sigmoid, width 1,"), ({"width": 2.0}, "sigmoid, width 2,"), ({"surrogate": "erf"}, "erf, width 1,")
        ):  # fmt: skip
            _, report = asgl_cuda.convert(made, asgl=given)
            assert not report.left
            assert report.replaced[0].by.startswith(expected)
    assert converted_node(net, width=1.0, surrogate="rectangle")[0].settings.spike == ("rectangle", 1.0, 1.0, False)


def half(u):
    return 0.5 * (u > 0).to(u)


def failing(u):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (half, "emits something else than 0 below and 1 above"),
        (failing, "fails with ZeroDivisionError"),
        (nn.PReLU(), "has parameters that learn"),
    ],
)
def test_asgl_leaves_layers_that_emit_no_spikes(function, reason):
    (left,) = asgl_cuda.convert(snntorch.Leaky(beta=0.8, spike_grad=function), asgl={})[1].left
    assert reason in left.reason
    assert left.reason.endswith("; to replace it, asgl needs both surrogate and width")


def test_no_noise_where_asgl_has_none():
    net = nn.Sequential(sinabs.layers.IAF(), sinabs.layers.IAF(**SINGLE))
    converted, report = asgl_cuda.convert(net, asgl={})
    assert [row.path for row in report.replaced] == ["1"]
    (left,) = report.left
    assert "may spike several times per step, which ASGL layers can't; without asgl it can be" in left.reason
    converted, report = asgl_cuda.convert(converted)
    assert [row.path for row in report.replaced] == ["0"]
    with pytest.raises(ValueError, match=r"multi_spike needs analog_prob=0, got 0\.1"):
        converted[0].analog_prob = 0.1


def test_a_learned_width_is_reported():
    converted, _ = asgl_cuda.convert(nn.Sequential(snntorch.Leaky(beta=0.5)), asgl={"width": 3.0})
    back, report = asgl_cuda.revert(converted)
    assert type(back[0]) is snntorch.Leaky
    assert report.left == [("0", "Leaky", "its learned width, 3, which is not its own surrogate's")]


@pytest.mark.parametrize("name", OF_ALL_LIBRARIES)
def test_the_training_kit_knows_converted_layers(name):
    model = nn.Sequential(asgl_cuda.convert(OF_ALL_LIBRARIES[name](), asgl={"width": 1.0, "analog_prob": 0.4})[0])
    model[0].analog_prob = 0.4
    schedule = asgl_cuda.AnalogProbSchedule.linear(model, 4)
    schedule.step()
    assert model[0].analog_prob == pytest.approx(0.3)
    with asgl_cuda.Monitor(model) as monitor:
        s = flat(model(3 * torch.rand(5, 4, 7)))[0]
    found = monitor.result()["0"]
    analog = ((s > 0) & (s < 1)).float().mean().item()
    assert found["analog_share"] == pytest.approx(analog, abs=1e-6)
    assert "dead" in found
    with asgl_cuda.spiking_eval(model):
        assert model[0].analog_prob == 0
    groups = {group["name"]: group["params"] for group in asgl_cuda.parameter_groups(model, 0.1)}
    if name != "authors":
        assert any(parameter is model[0].log_width for parameter in groups["widths"])


def test_weights_that_return_spikes_are_in_the_group_of_weights():
    from conversions import RECURRENT

    for name, weights in {
        "RLeaky, each": {"V"},
        "LIFRecurrent": {"input_weights", "recurrent_weights"},
        "container of a Linear": {"rc.weight", "rc.bias", "sub_module.0.weight", "sub_module.0.bias"},
    }.items():
        converted, _ = asgl_cuda.convert(RECURRENT[name].make(), asgl={})
        groups = {group["name"]: group["params"] for group in asgl_cuda.parameter_groups(converted, lr=0.1)}
        named = {id(value): key for key, value in converted.named_parameters()}
        assert {named[id(value)] for value in groups["weights"]} == weights
        assert [named[id(value)] for value in groups["widths"]] == ["log_width"]


ALL_FOUR = "spikingjelly, snntorch, norse, sinabs"
READ_OUTS = {"LI": norse.LI, "NonSpikingLIFNode": neuron.NonSpikingLIFNode}


@pytest.mark.parametrize("name", READ_OUTS)
def test_a_read_out_is_no_asgl_layer(name):
    made = READ_OUTS[name]()
    model, report = asgl_cuda.convert(nn.ModuleDict({"out": made, "lif": neuron.LIFNode()}), asgl={"analog_prob": 0.5})
    assert report.replaced[0] == ("out", name, "leaky_integrator")
    assert [path for path, _ in asgl_cuda.asgl_layers(model)] == ["lif"]
    assert list(model.state_dict()) == ["lif.log_width"]
    with asgl_cuda.spiking_eval(model):
        model["out"](torch.rand(3, 4, 5))
    back, report = asgl_cuda.revert(model)
    assert type(back["out"]) is type(made)
    assert report.replaced[0] == ("out", f"Converted{name}", name)


# ---- reports ----


def notes(*layers):
    return str(asgl_cuda.convert(nn.Sequential(*layers))[1]).splitlines()


def test_the_report():
    node = neuron.LIFNode(step_mode="m")
    _, report = asgl_cuda.convert(nn.Sequential(node, nn.Linear(2, 2), neuron.QIFNode()))
    assert str(report).splitlines() == [
        "1 replaced, 1 left",
        "0  LIFNode  sigmoid, width 0.25",
        "2  QIFNode  left: asgl_cuda has no such neuron",
    ]
    assert tuple(report) == (report.replaced, report.left) == report
    again = pickle.loads(pickle.dumps(report))
    assert (again, again.notes) == (report, report.notes)
    assert isinstance(report, asgl_cuda.interop.Report)
    assert "(the model)" in str(asgl_cuda.convert(node)[1])
    converted, report = asgl_cuda.convert(nn.ModuleDict({"a": node, "b": nn.Sequential(node)}))
    assert converted["a"] is converted["b"][0]
    assert len(report.replaced) == 1


def test_notes():
    model = nn.Sequential(nn.Linear(2, 2), neuron.LIFNode(), neuron.IFNode(), neuron.LIFNode(step_mode="m"))
    (note,) = asgl_cuda.convert(model)[1].notes
    assert note.startswith("1, 2: step mode 's' gains little; spikingjelly.activation_based.functional.set_st")
    assert note.endswith("set_step_mode(model, 'm') computes whole sequences, which takes several times less time")
    assert str(asgl_cuda.convert(model)[1]).endswith(note)
    functional.set_step_mode(model, "m")
    assert not asgl_cuda.convert(model)[1].notes
    report = notes(snntorch.Leaky(beta=0.5), norse.LIFCell(), norse.LIF(), norse.LIFBoxCell())
    first, other = report[5:]
    assert first.startswith("0: one step per call gains little; convert(model, sequences=True) computes all steps")
    assert other.startswith('1, 3: one step per call gains little; convert(model, sequences="loop") computes all steps')
    first, said = notes(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    assert first == "0 replaced, 0 left"
    known = f"it knows those of {ALL_FOUR} once these are imported; imported: {ALL_FOUR}"
    assert said == f"no neurons that convert knows among Linear, ReLU; {known}"
    function = surrogate.Sigmoid()
    function.register_forward_hook(lambda *given: None)
    _, report = asgl_cuda.convert(nn.Sequential(neuron.LIFNode(step_mode="m", surrogate_function=function)))
    assert report.notes == ["0: hooks of surrogate_function are no longer called"]


def test_a_second_conversion_leaves_the_node_of_a_recurrent_layer():
    model, _ = asgl_cuda.convert(nn.Sequential(layer.LinearRecurrentContainer(neuron.LIFNode(), 3, 3, step_mode="m")))
    again, report = asgl_cuda.convert(model)
    assert not report.replaced
    x_seq = torch.rand(4, 2, 3)
    assert torch.equal(again(x_seq), model(x_seq))


def test_layers_that_are_converted_already():
    converted, _ = asgl_cuda.convert(nn.Sequential(neuron.LIFNode(step_mode="m")))
    assert notes(converted, asgl_cuda.LIF(), asgl_cuda.LeakyIntegrator()) == [
        "0 replaced, 0 left", "0.0 is converted already", "1 is a layer of asgl_cuda", "2 is a layer of asgl_cuda",
    ]  # fmt: skip


SETTINGS = [{"asgl": {}}, {"asgl": {"width": 0.7}, "inplace": True}, {"backend": "reference"}]


@pytest.mark.parametrize("options", SETTINGS, ids=["asgl", "in place", "backend"])
@pytest.mark.parametrize("by", ["convert", "fuse", "MultiStep"])
def test_settings_of_layers_that_are_converted_already_are_refused(by, options):
    """Before anything changes; the remedy in the message works."""
    if by == "MultiStep":
        made = nn.Sequential(nn.Linear(4, 4), MultiStep(snntorch.Leaky(0.9)), neuron.LIFNode(step_mode="m"))
    else:
        norm, nodes = asgl_cuda.OverTime(nn.BatchNorm1d(4)), (neuron.LIFNode(step_mode="m") for _ in range(2))
        model = nn.Sequential(norm, *nodes)
        made = asgl_cuda.convert(model)[0] if by == "convert" else asgl_cuda.fuse(model, torch.rand(3, 2, 4))[0]
    types = [type(module) for module in made.modules()]
    remedy = re.escape("asgl_cuda.convert(asgl_cuda.revert(model)[0], ...)")
    with pytest.raises(ValueError, match=f"^asgl_cuda.convert: asgl and backend .* already, got '1.*; .*{remedy}$"):
        asgl_cuda.convert(made, **options)
    assert [type(module) for module in made.modules()] == types
    again, report = asgl_cuda.convert(asgl_cuda.revert(made)[0], **options)
    assert (len(report.replaced), report.left) == (2, [])
    layers = [module for module in again.modules() if isinstance(module, Converted)]
    assert [layer.analog_prob for layer in layers] == [0.5 * ("asgl" in options)] * 2
    assert {layer.settings.backend for layer in layers} == {options.get("backend")}


IMPORTS = """
import sys, types, torch, asgl_cuda
print(asgl_cuda.convert(torch.nn.Linear(2, 2))[1])
names = ("spikingjelly", "snntorch", "norse", "sinabs", "nir", "matplotlib")
print([name for name in names if name in sys.modules])
sys.modules["spikingjelly"] = types.ModuleType("empty")
print(asgl_cuda.convert(torch.nn.Linear(2, 2))[1])
"""


def test_no_library_is_imported():
    """A library's file is imported only after the library itself."""
    result = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    _, none, imported, _, empty = result.stdout.splitlines()
    assert none.endswith(f"of {ALL_FOUR} once these are imported; imported: none")
    assert imported == "[]"
    assert empty.endswith(f"of {ALL_FOUR} once these are imported; imported: spikingjelly")


# ---- backends and errors ----


def test_backend(monkeypatch):
    from asgl_cuda.interop import converted as module

    asked, lif = [], asgl_cuda.lif
    monkeypatch.setattr(module, "lif", lambda *args, **more: asked.append(more["backend"]) or lif(*args, **more))
    for backend in (None, "reference"):
        asgl_cuda.convert(jelly(), backend=backend)[0](torch.randn(6, 2, 4))
    assert asked == [None, "reference"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "gpu"}, ValueError, r"asgl_cuda\.convert: backend must be one of cuda, .*, got 'gpu'"),
        ({"asgl": {"widht": 1.0}}, TypeError, "asgl must be among surrogate, width, .* learn_width, got widht"),
        ({"asgl": {"width": 0.0}}, ValueError, r"asgl_cuda\.convert: width must be > 0, got 0\.0"),
        ({"asgl": {"width": "1"}}, TypeError, r"asgl_cuda\.convert: width must be a float, got str"),
        ({"asgl": {"analog_prob": 2}}, ValueError, r"asgl_cuda\.convert: analog_prob must be in \[0, 1\], got 2"),
        ({"asgl": {"surrogate": "step"}}, ValueError, "surrogate must be one of rectangle, .*, got 'step'"),
        ({"asgl": {"learn_width": 1}}, TypeError, r"asgl_cuda\.convert: learn_width must be a bool, got int"),
        ({"asgl": True}, TypeError, r'asgl must be None or a mapping such as \{"width": 1\.0, .*, got True'),
        ({"asgl": {1: 2}}, TypeError, "asgl must be among surrogate, width, analog_prob, learn_width, got 1"),
        ({"backend": []}, ValueError, r"asgl_cuda\.convert: backend must be one of cuda, .*, got \[\]"),
    ],
)
def test_invalid_arguments(arguments, error, message):
    net = jelly()
    with pytest.raises(error, match=message):
        asgl_cuda.convert(net, inplace=True, **arguments)
    assert type(net[1]) is neuron.ParametricLIFNode


class Counter(TorchDispatchMode):
    """Of operations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="the reference takes many")
@pytest.mark.parametrize(
    ("make", "most"),
    [(neuron.LIFNode, 8), (lambda: snntorch.Leaky(beta=0.5), 8), (norse.LIFBoxCell, 8), (norse.LIFCell, 14)],
    ids=["spikingjelly", "snntorch", "norse", "norse, a current"],
)
def test_a_step_a_call_takes_few_operations(make, most):
    """With few neurons, the number of operations is the cost of a call."""
    counts = []
    for made in (make(), asgl_cuda.convert(make(), backend="cpu")[0]):
        x = torch.rand(4, 5)
        _, state = out if isinstance(out := made(x), tuple) else (out, None)
        with Counter() as counter:
            made(x, state) if state is not None else made(x)
        counts.append(counter.count)
    assert counts[1] <= min(counts[0], most), counts
