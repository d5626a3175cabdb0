"""Users' subclasses of neurons: converted, unless they override what the library's forward uses."""

import abc
import copy
import re

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from conversions import LAYERS, authors_layer, flat
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import asgl_cuda


class Described:
    """Methods and properties that no library's class has."""

    def describe(self):
        return f"a {type(self).__name__}"

    @property
    def purpose(self):
        return "to fire"


def subclass_of(base, **names):
    """A subclass of a subclass."""
    empty = type("Empty", (base,), {})
    return type("Mine", (Described, empty), {"__doc__": "Mine.", "__module__": __name__, **names})


KINDS = {name: row for name, row in LAYERS.items() if "each" not in name} | {
    "the authors' layer": (lambda: authors_layer(3), (3, 2, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_one_that_changes_no_result(name, in_double):
    make, shape = KINDS[name]
    calls = []
    mine = {"extra_repr": lambda self: "mine", "reset": lambda self: calls.append("reset")}
    layer, twin = make(), make()
    layer.__class__ = twin.__class__ = subclass_of(type(layer), **mine)
    expected = asgl_cuda.convert(make())[1].replaced
    converted, report = asgl_cuda.convert(nn.Sequential(twin), inplace=True)
    assert [(row.layer, row.by) for row in report.replaced] == [("Mine", row.by) for row in expected]
    assert isinstance(converted[0], type(layer))
    assert (converted[0].describe(), converted[0].purpose) == (f"a {type(twin).__name__}", "to fire")
    if not name.startswith("sinabs"):  # has no extra_repr
        assert "mine, computed by asgl_cuda" in repr(converted)
    x = [3 * torch.rand(shape) for _ in range(2)]
    found = []
    for each in (layer, converted[0]):
        leaves = [value.clone().requires_grad_() for value in x]
        outputs = [out for leaf in leaves for out in flat(each(leaf))]
        loss = sum((out * torch.arange(1.0, 1 + out.numel()).reshape(out.shape).cos()).sum() for out in outputs)
        learned = [value for value in each.parameters() if value.requires_grad]
        gradients = torch.autograd.grad(loss, [*leaves, *learned], allow_unused=True)
        found.append([*outputs, *gradients])
    assert any(out.any() for out in found[0])
    rtol = 1e-5 if name.startswith("sinabs") else 1e-12  # whose spikes are float32, and so are their gradients
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=1e-2 * rtol)
    if name != "the authors' layer" and "reset" not in vars(layer):
        layer.reset(), converted[0].reset()
        assert calls == ["reset", "reset"]
    assert type(asgl_cuda.revert(converted, inplace=True)[0][0]) is type(twin)


class Slow(neuron.LIFNode):
    """Changes only __init__."""

    def __init__(self, channels):
        super().__init__(tau=8.0, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")
        self.channels = channels
        self.register_buffer("seen", torch.zeros(channels))
        self.gain = nn.Parameter(torch.ones(channels))
        self.projection = nn.Linear(channels, 2)


def test_what_is_a_subclasss_own_stays(in_double):
    layer = Slow(5)
    converted, report = asgl_cuda.convert(nn.Sequential(layer))
    assert [row.layer for row in report.replaced] == ["Slow"]
    assert list(converted.state_dict()) == list(nn.Sequential(layer).state_dict())
    assert (converted[0].channels, isinstance(converted[0], Slow)) == (5, True)
    hooked = []
    for each in (layer, converted[0]):
        each.register_forward_hook(lambda module, given, out: hooked.append(out))
    x_seq = 9 * torch.rand(6, 2, 5)
    assert torch.equal(converted(x_seq), layer(x_seq))
    assert torch.equal(*hooked)
    assert hooked[0].any()
    assert torch.equal(copy.deepcopy(converted)[0].projection.weight, layer.projection.weight)
    back, _ = asgl_cuda.revert(converted)
    assert list(back.state_dict()) == list(converted.state_dict())


class Learning(neuron.LIFNode):
    """Learns its threshold, which the library computes with as well."""

    def __init__(self):
        super().__init__(step_mode="m")
        self.v_threshold = nn.Parameter(torch.tensor(0.8))


def test_a_parameter_in_the_place_of_a_number(in_double):
    layer = Learning()
    converted, _ = asgl_cuda.convert(layer)
    x_seq = 3 * torch.rand(6, 2, 5)
    for each in (layer, converted):
        (each(x_seq) * x_seq).sum().backward()
    torch.testing.assert_close(converted.v_threshold.grad, layer.v_threshold.grad, rtol=1e-12, atol=0)


def test_mixins_and_abstract_classes():
    for bases in ((Described, neuron.LIFNode), (neuron.LIFNode, Described), (neuron.LIFNode, abc.ABC)):
        assert asgl_cuda.convert(type("Mine", bases, {})())[1].left == []
    behind = type("Behind", (), {"forward": do})  # overrides nothing
    assert asgl_cuda.convert(type("Mine", (neuron.LIFNode, behind), {})())[1].left == []


def do(self, *arguments):
    raise AssertionError("not called by convert")


LEAKY, LIF = {"beta": 0.5}, {"tau_mem": 2.0}
CHANGED = [
    *((neuron.LIFNode, {}, name) for name in (
        "forward", "single_step_forward", "multi_step_forward", "single_step_functional_forward", "materialize_states",
        "__call__", "__getattr__", "__setattr__",
    )),
    *((neuron.SimpleIFNode, {}, name) for name in ("neuronal_charge", "neuronal_fire", "neuronal_reset")),
    (neuron.CUBALIFNode, {}, "single_step_functional_forward"), (neuron.NonSpikingLIFNode, {}, "neuronal_charge"),
    *((snntorch.Leaky, LEAKY, name) for name in ("forward", "fire", "mem_reset", "_base_state_function", "_base_sub")),
    (snntorch.Synaptic, {"alpha": 0.5, **LEAKY}, "forward"), (norse.LIF, {}, "initial_state"),
    (norse.LIFCell, {}, "forward"), (sinabs.layers.LIF, LIF, "forward"),
    (sinabs.layers.IAFSqueeze, {"batch_size": 1}, "init_state_with_shape"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "options", "name"), CHANGED)
def test_one_that_overrides_a_method(base, options, name):
    layer = base(**options)
    layer.__class__ = subclass_of(base, **{name: lambda *given, **named: getattr(base, name)(*given, **named)})
    model, report = asgl_cuda.convert(nn.Sequential(layer), inplace=True)
    reason = f"its {name} is not that of {base.__name__}, which convert knows, but of Mine"
    assert report == ([], [("0", "Mine", reason)])
    assert model[0] is layer


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
        assert row.reason == f"its {name} is not that of LIFNode, which convert knows, but of {where}"
    layer = authors_layer(2)
    layer.__class__ = type("LIFLayer", (type(layer),), {"forward": do})
    (row,) = asgl_cuda.convert(layer)[1].left
    assert row.reason == "its forward is not that of LIFLayer, which convert knows, but of LIFLayer"
    layer = subclass_of(neuron.LIFNode)()
    layer.forward = lambda x: x
    (row,) = asgl_cuda.convert(layer)[1].left
    assert row.reason == "its forward is not that of Mine, but an attribute of this layer"


@pytest.mark.parametrize("read_out", [norse.LICell, norse.LIBoxCell])
def test_one_of_a_neuron_that_is_left(read_out):
    (row,) = asgl_cuda.convert(subclass_of(read_out)())[1].left
    assert row.reason.startswith("its few operations a step")


@pytest.mark.parametrize(
    ("base", "options", "name"),
    [(snntorch.Leaky, LEAKY, "step"), (neuron.LIFNode, {}, "width"), (sinabs.layers.LIF, LIF, "settings"),
     (neuron.LIFNode, {}, "multi_spike"), (snntorch.Leaky, LEAKY, "_after"), (neuron.LIFNode, {}, "_analog_prob"),
     (neuron.LIFNode, {}, "_analog_prob_data"), (neuron.LIFNode, {}, "original"), (sinabs.layers.LIF, LIF, "_least")],
)  # fmt: skip
def test_one_with_a_name_of_converted_layers(base, options, name):
    reason = f"its {name} has the name of one that converted layers have"
    layer = subclass_of(base)(**options)
    setattr(layer, name, 3)
    for each in (layer, subclass_of(base, **{name: do})(**options)):
        assert [row.reason for row in asgl_cuda.convert(each, inplace=True)[1].left] == [reason]
    registered = subclass_of(base)(**options)
    registered.register_module(name, nn.Linear(2, 2))
    assert re.fullmatch(reason, asgl_cuda.convert(registered, inplace=True)[1].left[0].reason)
