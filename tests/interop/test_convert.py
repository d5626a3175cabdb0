"""`convert` and `revert` on whole models: copies, names, reports and errors."""

import copy
import pickle
import subprocess
import sys

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from conversions import LAYERS, SINGLE, authors_layer, flat
from spikingjelly.activation_based import neuron, surrogate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import asgl_cuda
from asgl_cuda.interop.converted import Converted


def jelly(**options):
    return nn.Sequential(nn.Linear(4, 5), neuron.ParametricLIFNode(step_mode="m", **options), nn.Linear(5, 3))


def test_a_copy_is_converted_unless_inplace_is_said():
    net = jelly()
    converted, _ = asgl_cuda.convert(net)
    assert type(net[1]) is neuron.ParametricLIFNode
    assert isinstance(converted[1], Converted)
    assert converted[1].w is not net[1].w
    same, _ = asgl_cuda.convert(net, inplace=True)
    assert same is net
    assert isinstance(net[1], Converted)


def test_parameters_keep_names_values_and_their_optimizer():
    net = jelly()
    names = [name for name, _ in net.named_parameters()]
    keys = list(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net[1].w.item()
    asgl_cuda.convert(net, inplace=True)
    assert [name for name, _ in net.named_parameters()] == names
    assert list(net.state_dict()) == keys
    net(10 * torch.rand(6, 2, 4)).sum().backward()
    optimizer.step()
    assert net[1].w.item() != before
    net.load_state_dict(jelly().state_dict())
    assert net[1].w.item() == before


@pytest.mark.parametrize("inplace", [False, True])
def test_revert(inplace):
    net = jelly()
    converted, _ = asgl_cuda.convert(net)
    with torch.no_grad():
        converted[1].w.fill_(0.3)
    back, report = asgl_cuda.revert(converted, inplace=inplace)
    assert (back is converted) == inplace
    assert type(back[1]) is neuron.ParametricLIFNode
    assert set(vars(back[1])) == set(vars(net[1]))
    assert back[1].w.item() == pytest.approx(0.3)
    assert report.replaced == [("1", "ConvertedParametricLIFNode", "ParametricLIFNode")]
    assert not report.left
    x_seq = torch.randn(6, 2, 4)
    net[1].w = back[1].w
    assert torch.equal(back(x_seq), net(x_seq))


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
    assert "1.log_width" in converted.state_dict()


def test_asgl_takes_missing_options_from_the_layer():
    converted, _ = asgl_cuda.convert(jelly(surrogate_function=surrogate.ATan(4.0)), asgl={"learn_width": False})
    assert converted[1].settings.spike[:3] == ("arctan", pytest.approx(0.25), 1.0)
    assert converted[1].log_width is None
    assert converted[1].analog_prob == 0.2
    for asgl, expected in (({"width": 0.5}, ("arctan", 0.5)), ({"surrogate": "sigmoid"}, ("sigmoid", 0.25))):
        converted, _ = asgl_cuda.convert(jelly(surrogate_function=surrogate.ATan(4.0)), asgl=asgl)
        assert converted[1].settings.spike[:2] == (expected[0], pytest.approx(expected[1]))
        assert not converted[1].settings.spike.strict
    assert asgl_cuda.convert(snntorch.Leaky(0.8), asgl={"width": 0.5})[0].settings.spike.strict


def test_asgl_where_the_layers_own_surrogate_is_unknown():
    net = jelly(surrogate_function=surrogate.PiecewiseLeakyReLU())
    assert "PiecewiseLeakyReLU, is none of those" in asgl_cuda.convert(net)[1].left[0].reason
    assert "asgl needs a surrogate and a width" in asgl_cuda.convert(net, asgl={"width": 1.0})[1].left[0].reason
    converted, report = asgl_cuda.convert(net, asgl={"width": 1.0, "surrogate": "sigmoid"})
    assert not report.left
    assert converted[1].settings.spike == ("sigmoid", 1.0, 1.0, False, False)


def test_the_gradient_of_asgl_is_that_of_the_smooth_value():
    """The surrogate's factor of the gradient is left out."""
    converted, _ = asgl_cuda.convert(jelly(surrogate_function=surrogate.SuperSpike(3.0)))
    assert converted[1].settings.spike.gain == pytest.approx(6.0)
    converted, _ = asgl_cuda.convert(jelly(surrogate_function=surrogate.SuperSpike(3.0)), asgl={})
    assert converted[1].settings.spike.gain == 1.0


@pytest.mark.parametrize("function", [surrogate.Sigmoid(4.0), surrogate.Rect(1.0), surrogate.SoftSign(2.0)])
def test_a_learned_width_goes_back_into_the_surrogate(function):
    net = nn.Sequential(*(neuron.LIFNode(step_mode="m", surrogate_function=function) for _ in range(2)))
    alpha = function.alpha
    converted, _ = asgl_cuda.convert(net, asgl={})
    with torch.no_grad():
        converted[0].log_width += 1
    back, report = asgl_cuda.revert(converted)
    assert not report.left
    assert back[0].surrogate_function.alpha == pytest.approx(alpha / torch.e, rel=1e-5)
    assert back[1].surrogate_function.alpha == pytest.approx(alpha, rel=1e-5)
    assert net[0].surrogate_function.alpha == alpha


def test_a_learned_width_without_a_surrogate_to_hold_it():
    converted, _ = asgl_cuda.convert(nn.Sequential(snntorch.Leaky(beta=0.5)), asgl={"width": 3.0})
    back, report = asgl_cuda.revert(converted)
    assert type(back[0]) is snntorch.Leaky
    assert report.left == [("0", "Leaky", "its learned width, 3: its own surrogate can't hold it")]
    made = sinabs.layers.LIF(2.0, spike_threshold=torch.tensor(0.5), **SINGLE)
    converted, _ = asgl_cuda.convert(made, asgl={"width": 3.0})
    back, report = asgl_cuda.revert(converted)
    assert not report.left
    assert back.surrogate_grad_fn.grad_width == pytest.approx(6.0)


def test_a_neuron_alone_and_one_that_is_used_twice():
    node = neuron.IFNode(step_mode="m")
    converted, report = asgl_cuda.convert(node)
    assert isinstance(converted, Converted)
    assert "(the model)" in str(report)
    net = nn.ModuleDict({"a": node, "b": nn.Sequential(node)})
    converted, report = asgl_cuda.convert(net)
    assert converted["a"] is converted["b"][0]
    assert len(report.replaced) == 1


def test_the_report_is_a_table():
    node = neuron.LIFNode(step_mode="m")
    _, report = asgl_cuda.convert(nn.Sequential(node, nn.Linear(2, 2), neuron.QIFNode()))
    assert str(report).splitlines() == [
        "1 replaced, 1 left",
        "0  LIFNode  sigmoid, width 0.25",
        "2  QIFNode  left: asgl_cuda has no such neuron",
    ]


OF_ALL_LIBRARIES = {
    **{name: LAYERS[name][0] for name in (
        "LIFNode", "CUBALIFNode", "Leaky, state inside", "norse LIF", "norse LIFCell", "norse LIFBoxCell", "sinabs LIF",
    )},
    "Synaptic": lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True),
    "sinabs LIF, a current": lambda: sinabs.layers.LIF(2.0, tau_syn=2.0, min_v_mem=-1.0, **SINGLE),
    "authors": lambda: authors_layer(3),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ALL_LIBRARIES)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "convert a model that has run"])
def test_copies_after_a_call(name, how):
    """The state after a call is part of a graph, with which most libraries' layers can't be copied."""
    if how == "pickle" and name.split()[0].rstrip(",") in ("Leaky", "Synaptic", "norse"):
        pytest.skip("the library's own layer can't be pickled")
    x = 3 * torch.rand(3, 4, 5, requires_grad=True)
    if how == "convert a model that has run":
        made = OF_ALL_LIBRARIES[name]()
        made(x)
        twin, report = asgl_cuda.convert(made)
        assert len(report.replaced) == 1
        states = (*vars(twin).values(), *twin._buffers.values(), *getattr(twin, "_memories", {}).values())
        assert not any(value.grad_fn for value in states if isinstance(value, torch.Tensor))
    else:
        made, _ = asgl_cuda.convert(OF_ALL_LIBRARIES[name]())
        twin = pickle.loads(pickle.dumps(made)) if how == "pickle" else copy.deepcopy(made)
        assert twin.settings == made.settings
    assert isinstance(twin, Converted)
    torch.testing.assert_close(flat(twin(x)), flat(made(x)))
    assert type(asgl_cuda.revert(twin)[0]) is type(OF_ALL_LIBRARIES[name]())


def test_backend(monkeypatch):
    from asgl_cuda.interop import converted as module

    asked = []
    monkeypatch.setattr(
        module, "lif", lambda *args, **options: asked.append(options["backend"]) or lif(*args, **options)
    )
    lif = asgl_cuda.lif
    for backend in (None, "reference"):
        asgl_cuda.convert(jelly(), backend=backend)[0](torch.randn(6, 2, 4))
    assert asked == [None, "reference"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "gpu"}, ValueError, r"asgl_cuda\.convert: backend must be one of cuda, .*, got 'gpu'"),
        ({"asgl": {"widht": 1.0}}, TypeError, "asgl may have surrogate, width, analog_prob, learn_width, got widht"),
        ({"asgl": {"width": 0.0}}, ValueError, r"asgl_cuda\.convert: width must be > 0, got 0\.0"),
        ({"asgl": {"width": "1"}}, TypeError, r"asgl_cuda\.convert: width must be a float, got str"),
        ({"asgl": {"analog_prob": 2}}, ValueError, r"asgl_cuda\.convert: analog_prob must be in \[0, 1\], got 2"),
        ({"asgl": {"surrogate": "step"}}, ValueError, "surrogate must be one of rectangle, .*, got 'step'"),
        ({"asgl": {"learn_width": 1}}, TypeError, r"asgl_cuda\.convert: learn_width must be a bool, got int"),
        ({"asgl": True}, TypeError, r'asgl must be None or a mapping such as \{"width": 1\.0, .*, got True'),
        ({"asgl": "yes"}, TypeError, r"asgl_cuda\.convert: asgl must be None or a mapping .*, got 'yes'"),
        ({"asgl": {1: 2}}, TypeError, "asgl may have surrogate, width, analog_prob, learn_width, got 1"),
        ({"backend": []}, ValueError, r"asgl_cuda\.convert: backend must be one of cuda, .*, got \[\]"),
    ],
)
def test_invalid_arguments(arguments, error, message):
    net = jelly()
    with pytest.raises(error, match=message):
        asgl_cuda.convert(net, inplace=True, **arguments)
    assert type(net[1]) is neuron.ParametricLIFNode


@pytest.mark.parametrize("name", ["convert", "revert", "fuse", "unfuse"])
def test_arguments_of_all_four(name):
    function = getattr(asgl_cuda, name)
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{name}: model must be a torch\.nn\.Module, got list"):
        function([neuron.LIFNode()])
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{name}: inplace must be a bool, got str"):
        function(jelly(), inplace="no")
    if name != "fuse":  # whose positional arguments are those of a call
        with pytest.raises(TypeError, match="positional"):
            function(nn.Linear(2, 2), True)


@pytest.mark.parametrize("name", ["convert", "revert", "fuse", "unfuse"])
def test_a_layer_that_can_not_be_copied(name):
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            raise ValueError("there is one")

    model = nn.Sequential(sinabs.layers.IAF(**SINGLE), nn.Sequential(Single(4, 4)))
    message = rf"asgl_cuda\.{name}: 1\.0 \(Single\) can't be copied, .* \(ValueError: there is one\); inplace=True"
    with pytest.raises(RuntimeError, match=message):
        getattr(asgl_cuda, name)(model)
    assert getattr(asgl_cuda, name)(model, inplace=True)[0] is model
    # Without an example `fuse` converts all neurons: the first calls decide.
    assert isinstance(model[0], Converted) == (name in ("convert", "fuse"))


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


@pytest.mark.parametrize("name", OF_ALL_LIBRARIES)
def test_torch_fx_sees_one_call(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.neurons, _ = asgl_cuda.convert(OF_ALL_LIBRARIES[name]())

        def forward(self, x):
            return self.neurons(2 * x)

    graph = torch.fx.symbolic_trace(Net())
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["neurons"]
    expected = asgl_cuda.convert(OF_ALL_LIBRARIES[name]())[0](torch.full((3, 4, 5), 2.0))
    torch.testing.assert_close(graph(torch.ones(3, 4, 5)), expected)


def test_a_learned_width_has_a_dimension_and_loads_from_one_that_has_none():
    converted, _ = asgl_cuda.convert(jelly(), asgl={})
    assert converted[1].log_width.shape == (1,)
    saved = converted.state_dict()
    converted.load_state_dict({**saved, "1.log_width": torch.tensor(0.5)})
    assert converted[1].log_width.tolist() == [0.5]
    converted.load_state_dict(saved)
    assert torch.equal(converted.state_dict()["1.log_width"], saved["1.log_width"])


@pytest.mark.parametrize("name", OF_ALL_LIBRARIES)
def test_the_training_kit_knows_converted_layers(name):
    model = nn.Sequential(asgl_cuda.convert(OF_ALL_LIBRARIES[name](), asgl={"width": 1.0, "analog_prob": 0.4})[0])
    if name == "authors":
        model[0].analog_prob = 0.4
    schedule = asgl_cuda.AnalogProbSchedule.linear(model, 4)
    schedule.step()
    assert model[0].analog_prob == pytest.approx(0.3)
    with asgl_cuda.Monitor(model) as monitor:
        out = model(3 * torch.rand(3, 4, 5))
    found = monitor.result()["0"]
    s = out[0] if isinstance(out, tuple) else out
    assert found["analog_share"] == pytest.approx(((s > 0) & (s < 1)).float().mean().item(), abs=1e-6)
    assert "dead" in found
    with asgl_cuda.spiking_eval(model):
        assert model[0].analog_prob == 0
    groups = {group["name"]: group["params"] for group in asgl_cuda.parameter_groups(model, 0.1)}
    if name != "authors":
        assert any(parameter is model[0].log_width for parameter in groups["widths"])


@pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="the reference takes many")
@pytest.mark.parametrize(
    ("make", "most"),
    [(neuron.LIFNode, 8), (lambda: snntorch.Leaky(beta=0.5), 8), (norse.LIFBoxCell, 8), (norse.LIFCell, 14)],
    ids=["spikingjelly", "snntorch", "norse", "norse, a current"],
)
def test_a_step_a_call_takes_few_operations(make, most):
    """With few neurons, the number of operations is the cost of a call."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for made in (make(), asgl_cuda.convert(make(), backend="cpu")[0]):
        x = torch.rand(4, 5)
        _, state = out if isinstance(out := made(x), tuple) else (out, None)
        with Counter() as counter:
            made(x, state) if state is not None else made(x)
        counts.append(counter.count)
    assert counts[1] <= min(counts[0], most), counts


def test_no_library_is_imported():
    """A library's file is imported only after the library itself."""
    code = (
        "import sys, torch, asgl_cuda\n"
        "asgl_cuda.convert(torch.nn.Linear(2, 2))\n"
        "names = ('spikingjelly', 'snntorch', 'norse', 'sinabs', 'nir', 'matplotlib')\n"
        "assert not any(name in sys.modules for name in names), [n for n in names if n in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_of_a_converted_layer_are_not_changed_in_silence():
    model, _ = asgl_cuda.convert(nn.Sequential(neuron.LIFNode(step_mode="m")))
    assert asgl_cuda.convert(model)[1] == ([], [])
    for options in ({"asgl": {}}, {"backend": "reference"}):
        again, report = asgl_cuda.convert(model, **options)
        (left,) = report.left
        assert left.path == "0"
        assert "converted already" in left.reason
        assert "asgl_cuda.revert comes first" in left.reason
        assert not list(again.parameters())


READ_OUTS = {"LI": lambda: norse.LI(), "NonSpikingLIFNode": lambda: neuron.NonSpikingLIFNode()}


@pytest.mark.parametrize("name", READ_OUTS)
def test_a_read_out_is_no_asgl_layer(name):
    made = READ_OUTS[name]()
    keys = set(vars(made))
    model, report = asgl_cuda.convert(nn.ModuleDict({"out": made, "lif": neuron.LIFNode()}), asgl={"analog_prob": 0.5})
    assert report.replaced[0] == ("out", name, "leaky_integrator")
    assert [path for path, _ in asgl_cuda.asgl_layers(model)] == ["lif"]
    assert list(model.state_dict()) == ["lif.log_width"]
    assert not hasattr(model["out"], "log_width")
    with asgl_cuda.spiking_eval(model):
        model["out"](torch.rand(3, 4, 5))
    back, report = asgl_cuda.revert(model)
    assert type(back["out"]) is type(made)
    assert report.replaced[0] == ("out", f"Converted{name}", name)
    assert [row.path for row in report.left] == ["lif"] or not report.left
    assert set(vars(asgl_cuda.revert(asgl_cuda.convert(made)[0])[0])) == keys
