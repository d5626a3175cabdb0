"""`convert` and `revert` on whole models: copies, names, reports, errors; and trainings that are alike."""

import copy
import pickle

import authors_code
import libraries  # noqa: F401
import norse.torch as norse
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import asgl_cuda
from asgl_cuda.interop.converted import Converted
from asgl_cuda.interop.snntorch import MultiStep


def jelly(**options):
    return nn.Sequential(nn.Linear(4, 5), neuron.ParametricLIFNode(step_mode="m", **options), nn.Linear(5, 3))


def test_a_copy_is_converted_unless_inplace_is_said():
    net = jelly()
    fused, _ = asgl_cuda.convert(net)
    assert type(net[1]) is neuron.ParametricLIFNode
    assert isinstance(fused[1], Converted)
    assert fused[1].w is not net[1].w
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
    fused, _ = asgl_cuda.convert(net)
    with torch.no_grad():
        fused[1].w.fill_(0.3)
    back, report = asgl_cuda.revert(fused, inplace=inplace)
    assert (back is fused) == inplace
    assert type(back[1]) is neuron.ParametricLIFNode
    assert set(vars(back[1])) == set(vars(net[1]))
    assert back[1].w.item() == pytest.approx(0.3)
    assert report.replaced == [("1", "ConvertedParametricLIFNode", "ParametricLIFNode")]
    assert not report.left
    x_seq = torch.randn(6, 2, 4)
    net[1].w = back[1].w
    assert torch.equal(back(x_seq), net(x_seq))


def test_asgl():
    fused, report = asgl_cuda.convert(jelly(), asgl={"width": 2.0, "analog_prob": 0.5, "surrogate": "rectangle"})
    assert report.replaced == [("1", "ParametricLIFNode", "rectangle, width 2, analog_prob 0.5, width learned")]
    node = fused[1]
    assert node.width.item() == pytest.approx(2.0)
    x_seq = 5 * torch.randn(20, 8, 4)
    s_seq = node(fused[0](x_seq))
    assert ((s_seq > 0) & (s_seq < 1)).any()
    s_seq.sum().backward()
    assert node.log_width.grad is not None
    assert set(fused.eval()[:2](x_seq).unique().tolist()) == {0.0, 1.0}
    assert "1.log_width" in fused.state_dict()


def test_asgl_with_what_is_not_said_taken_from_the_layer():
    fused, _ = asgl_cuda.convert(jelly(surrogate_function=surrogate.ATan(4.0)), asgl={"learn_width": False})
    assert fused[1].settings.spike[:3] == ("arctan", pytest.approx(0.25), 1.0)
    assert fused[1].log_width is None
    assert fused[1].analog_prob == 0.2


def test_asgl_where_the_layers_own_surrogate_is_unknown():
    net = jelly(surrogate_function=surrogate.PiecewiseLeakyReLU())
    assert "PiecewiseLeakyReLU, is none of those" in asgl_cuda.convert(net)[1].left[0].reason
    assert "asgl needs a surrogate and a width" in asgl_cuda.convert(net, asgl={"width": 1.0})[1].left[0].reason
    fused, report = asgl_cuda.convert(net, asgl={"width": 1.0, "surrogate": "sigmoid"})
    assert not report.left
    assert fused[1].settings.spike == ("sigmoid", 1.0, 1.0, False)


def test_the_gradient_of_asgl_is_that_of_the_smooth_value():
    """Another library's factor of the gradient would make it another's."""
    fused, _ = asgl_cuda.convert(jelly(surrogate_function=surrogate.SuperSpike(3.0)))
    assert fused[1].settings.spike.gain == pytest.approx(6.0)
    fused, _ = asgl_cuda.convert(jelly(surrogate_function=surrogate.SuperSpike(3.0)), asgl={})
    assert fused[1].settings.spike.gain == 1.0


@pytest.mark.parametrize("function", [surrogate.Sigmoid(4.0), surrogate.Rect(1.0), surrogate.SoftSign(2.0)])
def test_a_learned_width_goes_back_into_the_surrogate(function):
    net = nn.Sequential(*(neuron.LIFNode(step_mode="m", surrogate_function=function) for _ in range(2)))
    alpha = function.alpha
    fused, _ = asgl_cuda.convert(net, asgl={})
    with torch.no_grad():
        fused[0].log_width += 1
    back, report = asgl_cuda.revert(fused)
    assert not report.left
    assert back[0].surrogate_function.alpha == pytest.approx(alpha / torch.e, rel=1e-5)
    assert back[1].surrogate_function.alpha == pytest.approx(alpha, rel=1e-5)
    assert net[0].surrogate_function.alpha == alpha


def test_a_learned_width_that_nothing_can_hold():
    fused, _ = asgl_cuda.convert(nn.Sequential(snntorch.Leaky(beta=0.5)), asgl={"width": 3.0})
    back, report = asgl_cuda.revert(fused)
    assert type(back[0]) is snntorch.Leaky
    assert report.left == [("0", "Leaky", "its learned width, 3: its own surrogate can't hold it")]
    made = sinabs.layers.LIF(2.0, spike_threshold=torch.tensor(0.5), spike_fn=sinabs.activation.SingleSpike)
    fused, _ = asgl_cuda.convert(made, asgl={"width": 3.0})
    back, report = asgl_cuda.revert(fused)
    assert not report.left
    assert back.surrogate_grad_fn.grad_width == pytest.approx(6.0)


def test_a_neuron_alone_and_one_that_is_used_twice():
    node = neuron.IFNode(step_mode="m")
    fused, report = asgl_cuda.convert(node)
    assert isinstance(fused, Converted)
    assert "(the model)" in str(report)
    net = nn.ModuleDict({"a": node, "b": nn.Sequential(node)})
    fused, report = asgl_cuda.convert(net)
    assert fused["a"] is fused["b"][0]
    assert len(report.replaced) == 1


def test_converting_again_changes_nothing():
    fused, _ = asgl_cuda.convert(jelly())
    again, report = asgl_cuda.convert(fused, inplace=True)
    assert again is fused
    assert report == ([], [])


def test_parts_of_a_madethat_is_replaced_are_not_reported():
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid())
    net = nn.Sequential(authors_code.LIFLayer(2, spike_fn=spike), neuron.QIFNode())
    _, report = asgl_cuda.convert(net)
    assert [row.path for row in report.replaced] == ["0"]
    assert [row.path for row in report.left] == ["1"]


def test_the_report_is_a_table():
    node = neuron.LIFNode(step_mode="m")
    _, report = asgl_cuda.convert(nn.Sequential(node, nn.Linear(2, 2), neuron.QIFNode()))
    assert str(report).splitlines() == [
        "1 replaced, 1 left",
        "0  LIFNode  sigmoid, width 0.25",
        "2  QIFNode  left: asgl_cuda has no such neuron",
    ]


def set_whole(node):
    node.step_mode = "m"  # CUBALIFNode's __init__ does not take it
    return node


LAYERS = {
    "spikingjelly": lambda: neuron.LIFNode(step_mode="m"),
    "snntorch": lambda: snntorch.Leaky(beta=0.5, init_hidden=True),
    "norse": lambda: norse.LIFBoxCell(),
    "sinabs": lambda: sinabs.layers.LIF(2.0, spike_fn=sinabs.activation.SingleSpike),
    "spikingjelly, current": lambda: set_whole(neuron.CUBALIFNode()),
    "snntorch, current": lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True),
    "norse, current": lambda: norse.LIF(),
    "norse, a step": lambda: norse.LIFCell(),
    "sinabs with a current": lambda: sinabs.layers.LIF(
        2.0, tau_syn=2.0, min_v_mem=-1.0, spike_fn=sinabs.activation.SingleSpike
    ),
    "authors": lambda: authors_code.LIFLayer(
        3, spike_fn=authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(), p=0.0)
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "convert a model that has run"])
def test_copies_after_a_call(name, how):
    """The state that a call leaves is inside a graph, which most libraries' layers can't be copied with."""
    if how == "pickle" and name.split(",")[0] in ("snntorch", "norse"):
        pytest.skip("the library's own layer can't be pickled")
    x = 3 * torch.rand(3, 4, 5, requires_grad=True)
    if how == "convert a model that has run":
        made = LAYERS[name]()
        made(x)
        twin, report = asgl_cuda.convert(made)
        assert len(report.replaced) == 1
    else:
        made, _ = asgl_cuda.convert(LAYERS[name]())
        twin = pickle.loads(pickle.dumps(made)) if how == "pickle" else copy.deepcopy(made)
        assert twin.settings == made.settings
    assert isinstance(twin, Converted)
    first = (lambda value: value[0] if isinstance(value, tuple) else value)(made(x))
    second = (lambda value: value[0] if isinstance(value, tuple) else value)(twin(x))
    torch.testing.assert_close(second, first)
    assert type(asgl_cuda.revert(twin)[0]) is type(LAYERS[name]())


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
def test_arguments_that_make_no_sense(arguments, error, message):
    net = jelly()
    with pytest.raises(error, match=message):
        asgl_cuda.convert(net, inplace=True, **arguments)
    assert type(net[1]) is neuron.ParametricLIFNode


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"asgl_cuda\.convert: model must be a torch\.nn\.Module, got list"):
        asgl_cuda.convert([neuron.LIFNode()])
    with pytest.raises(TypeError, match=r"asgl_cuda\.revert: model must be a torch\.nn\.Module, got list"):
        asgl_cuda.revert([])


@pytest.mark.parametrize("name", ["convert", "revert", "fuse", "unfuse"])
def test_a_layer_that_can_not_be_copied(name):
    single = sinabs.layers.IAF(spike_fn=sinabs.activation.SingleSpike)
    recurrent = sinabs.layers.LIFRecurrent(2.0, rec_connect=nn.Linear(4, 4))
    model = nn.Sequential(single, nn.Sequential(recurrent))
    message = rf"asgl_cuda\.{name}: 1\.0 \(LIFRecurrent\) can't be copied, not by copy\.deepcopy either .*inplace=True"
    with pytest.raises(RuntimeError, match=message):
        getattr(asgl_cuda, name)(model)
    assert getattr(asgl_cuda, name)(model, inplace=True)[0] is model
    assert isinstance(model[0], Converted) == (name == "convert")


@pytest.mark.parametrize("name", ["convert", "revert", "fuse", "unfuse"])
def test_inplace_is_said_by_true_or_false(name):
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{name}: inplace must be a bool, got str"):
        getattr(asgl_cuda, name)(jelly(), inplace="no")


@pytest.mark.parametrize("name", LAYERS)
def test_torch_fx_sees_one_call(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.neurons, _ = asgl_cuda.convert(LAYERS[name]())

        def forward(self, x):
            return self.neurons(2 * x)

    graph = torch.fx.symbolic_trace(Net())
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["neurons"]
    out, expected = graph(torch.ones(3, 4, 5)), asgl_cuda.convert(LAYERS[name]())[0](torch.full((3, 4, 5), 2.0))
    torch.testing.assert_close(out, expected)


def test_a_learned_width_has_a_dimension_and_loads_from_one_that_has_none():
    fused, _ = asgl_cuda.convert(jelly(), asgl={})
    assert fused[1].log_width.shape == (1,)
    saved = fused.state_dict()
    fused.load_state_dict({**saved, "1.log_width": torch.tensor(0.5)})
    assert fused[1].log_width.tolist() == [0.5]
    fused.load_state_dict(saved)
    assert torch.equal(fused.state_dict()["1.log_width"], saved["1.log_width"])


@pytest.mark.parametrize("name", LAYERS)
def test_the_training_kit_knows_converted_layers(name):
    model = nn.Sequential(asgl_cuda.convert(LAYERS[name](), asgl={"width": 1.0, "analog_prob": 0.4})[0])
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
        assert any(parameter is model[0].log_width for parameter in groups["neurons"])


@pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="the reference takes many")
@pytest.mark.parametrize("name", ["spikingjelly", "snntorch", "norse", "norse, current"])
def test_a_step_a_call_takes_few_operations(name):
    """Where neurons are few, the number of operations is the cost of a call."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    make = {
        "spikingjelly": neuron.LIFNode, "snntorch": lambda: snntorch.Leaky(beta=0.5), "norse": norse.LIFBoxCell,
        "norse, current": norse.LIFCell,
    }  # fmt: skip
    counts = []
    for made in (make[name](), asgl_cuda.convert(make[name](), backend="cpu")[0]):
        x = torch.rand(4, 5)
        _, state = out if isinstance(out := made(x), tuple) else (out, None)
        with Counter() as counter:
            made(x, state) if state is not None else made(x)
        counts.append(counter.count)
    assert counts[1] <= min(counts[0], 14 if "current" in name else 8), counts


def losses(model, scores_of, steps=4):
    """The losses of a short training on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(scores_of(model), torch.arange(6) % 3)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    assert found[-1] != found[0]
    return torch.stack(found)


def train_alike(model, scores_of, layers, left=()):
    """The losses agree until rounding flips a spike, which these seeds do not show."""
    fused, report = asgl_cuda.convert(model)
    assert (len(report.replaced), [row.layer for row in report.left]) == (layers, list(left))
    torch.testing.assert_close(losses(fused, scores_of), losses(model, scores_of), rtol=1e-4, atol=1e-5)


def test_a_convolutional_net_of_spikingjelly():
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode(),
        layer.AvgPool2d(2), layer.Conv2d(4, 6, 3, padding=1), layer.BatchNorm2d(6), neuron.ParametricLIFNode(),
        layer.Flatten(), layer.Linear(6 * 16, 3), neuron.IFNode(v_threshold=0.2, surrogate_function=surrogate.ATan()),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    x_seq = 4 * torch.rand(5, 6, 1, 8, 8)

    def scores_of(net):
        functional.reset_net(net)
        return net(x_seq).mean(0)

    train_alike(model, scores_of, 3)


def test_a_training_loop_of_snntorch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 10), snntorch.Leaky(beta=0.9, init_hidden=True, learn_beta=True),
        nn.Linear(10, 3), snntorch.Leaky(beta=0.8, init_hidden=True, output=True),
    )  # fmt: skip
    x_seq = 2 * torch.rand(7, 6, 8)

    def scores_of(net):
        utils.reset(net)
        spikes, potentials = zip(*(net(x) for x in x_seq), strict=True)
        return (torch.stack(spikes) + torch.stack(potentials)).mean(0)

    train_alike(model, scores_of, 2)


def test_a_sequential_state_of_norse():
    torch.manual_seed(0)
    p = norse.LIFBoxParameters(tau_mem_inv=torch.tensor(400.0))
    model = norse.SequentialState(nn.Linear(8, 10), norse.LIFBoxCell(p), nn.Linear(10, 3), norse.LIFBoxCell(p))
    x_seq = 6 * torch.rand(7, 6, 8)

    def scores_of(net):
        state, out = None, []
        for x in x_seq:
            spikes, state = net(x, state)
            out.append(spikes + state[-1].v)
        return torch.stack(out).mean(0)

    train_alike(model, scores_of, 2)


def test_a_network_of_sinabs():
    torch.manual_seed(0)
    single = {"spike_fn": sinabs.activation.SingleSpike, "spike_threshold": torch.tensor(0.1)}
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), sinabs.layers.IAFSqueeze(batch_size=6, **single), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(4 * 16, 3), sinabs.layers.LIFSqueeze(batch_size=6, tau_mem=3.0, **single),
    )  # fmt: skip
    x = torch.rand(6 * 5, 1, 8, 8)

    def scores_of(net):
        for each in net:
            if isinstance(each, sinabs.layers.StatefulLayer):
                each.reset_states()
        return net(3 * x).unflatten(0, (6, 5)).mean(1)

    train_alike(model, scores_of, 2)


def test_no_library_is_imported():
    """A library's file is imported only where the library is."""
    import subprocess
    import sys

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


def test_multi_step_without_its_layer_says_so():
    made = MultiStep(snntorch.Leaky(beta=0.9))
    reverted, _ = asgl_cuda.revert(made)
    with pytest.raises(RuntimeError, match=r"got one that was reverted: asgl_cuda\.convert"):
        reverted(torch.rand(3, 2))
    x_seq = torch.rand(3, 2)
    assert torch.equal(asgl_cuda.convert(reverted)[0](x_seq)[0], made(x_seq)[0])
