"""Models written to NIR: one table comes back from a file as it was, one is refused by name."""

import copy
import re
import sys
from collections import OrderedDict
from functools import partial

import authors_code
import pytest
import torch
from comparison import LEARN_ALL, Stack, random_input, randomized
from nir_graphs import euler, fires, graph_of, nir, nir_lif, np, rewritten
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF, LeakyIntegrator
from asgl_cuda.interop.nir import from_nir, to_nir, write
from asgl_cuda.neurons.over_time import OverTime

# ---- models that come back ----


def behind_a_convolution(layer):
    """The layer has 4 channels of 6 x 5 neurons."""
    return nn.Sequential(OverTime(nn.Conv2d(2, 4, 3, padding=1)), layer, nn.Flatten(2), nn.Linear(120, 7))


IMAGE, LINE, ROW = (2, 6, 5), (4, 9), (6,)
SOFT, CHANNEL, NEURON = (
    {"allow_soft_reset": True}, {"num_features": 4, "granularity": "channel"},
    {"num_features": (4, 6, 5), "granularity": "neuron"},
)  # fmt: skip
LAYERS = {
    "hard reset": ({}, {}),
    "soft reset": ({"v_reset": None, **LEARN_ALL}, SOFT),
    "learned": (LEARN_ALL, {}),
    "channel": ({**CHANNEL, **LEARN_ALL}, {}),
    "neuron": ({**NEURON, **LEARN_ALL}, {}),
    "constants of each": (
        {**CHANNEL, **dict.fromkeys(("decay", "v_threshold", "width"), torch.linspace(0.2, 0.6, 4)), "v_rest": -0.25,
         "v_reset": torch.linspace(-0.5, 0.1, 4)}, {},
    ),
    "no leak": ({"decay": 1.0, "v_threshold": 1.5}, {}),
    "scaled output": ({**CHANNEL, "scale_output": True, "v_threshold": 0.6, **LEARN_ALL}, {}),
    "another step": (LEARN_ALL, {"dt": 1e-3}),
    "v_reset": ({"v_reset": -0.25}, {}),
    "gain and rest": (
        {**CHANNEL, "input_gain": 0.7, "v_rest": 0.2, "v_reset": 0.2, "scale_output": True, **LEARN_ALL}, {},
    ),
    "gain and rest without leak": ({"decay": 1.0, "input_gain": 0.7, "v_rest": -0.2, "v_reset": -0.2}, {}),
    "several spikes": (
        {"v_reset": None, "multi_spike": True, "v_min": -0.5, "surrogate": "periodic_exponential", "analog_prob": 0,
         "v_threshold": 0.3}, SOFT,
    ),
    "integer spikes": (
        {"v_reset": None, "levels": 4, "scale_output": True, "v_threshold": 0.3, "learn_threshold": True}, SOFT,
    ),
    "a floor": ({"v_min": -0.25}, SOFT),
    "reset amount": (
        {"v_reset": None, "reset_amount": 0.5, "strict_threshold": True, "surrogate_gain": 0.5, "store_v_seq": True},
        SOFT,
    ),
}  # fmt: skip
INTEGRATORS = {
    "learned": ({"learn_decay": True}, {}),
    "channel": ({**CHANNEL, "learn_decay": True}, {"dt": 1e-3}),
    "neuron": ({**NEURON, "learn_decay": True, "input_gain": 0.3}, {}),
    "no decay": ({"decay": 0.0}, {}),
    "constants of each": ({**CHANNEL, "decay": torch.linspace(0.0, 0.9, 4)}, {}),
    "no leak": ({"decay": 1.0, "input_gain": -0.7}, {}),
    "gain and rest": ({"decay": 0.9, "input_gain": 0.1, "v_rest": -0.3, "stateful": True}, {}),
}
# As the neuron of the node's numbers: NIR's equations give the spikes. Norse ignores r, so it is 1 where there is leak.
IN_NUMBERS = ("hard reset", "learned", "channel", "neuron", "no leak", "another step", "v_reset",
              "gain and rest without leak")  # fmt: skip


def public_types(layer):
    return {name: type(value) for name, value in vars(layer).items() if not name.startswith("_")}


def assert_the_same_layers(model, back, kind):
    before, after = ([made for made in each.modules() if isinstance(made, kind)] for each in (model, back))
    for ours, theirs in zip(before, after, strict=True):
        assert repr(ours) == repr(theirs)
        assert public_types(ours) == public_types(theirs)
        torch.testing.assert_close(dict(theirs.named_parameters()), dict(ours.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_layer_comes_back(name, tmp_path):
    given, options = LAYERS[name]
    model = randomized(behind_a_convolution(LIF(**given)))
    x_seq = 3 * random_input(6, 3, *IMAGE).detach()
    graph = rewritten(to_nir(model, x_seq, **options), tmp_path / "model.nir")
    back = from_nir(graph)
    assert not back.training
    assert_the_same_layers(model, back, LIF)
    assert all(parameter.requires_grad for parameter in back.parameters())
    assert torch.equal(back(x_seq), model.eval()(x_seq))
    current = model[0](x_seq)
    assert fires(model[1](current))
    if name in IN_NUMBERS:
        node = next(node for node in graph.nodes.values() if isinstance(node, (nir.LIF, nir.IF)))
        assert isinstance(node, nir.IF) == name.endswith(("no leak", "without leak"))
        assert (node.r.shape, node.r.dtype) == ((4, 6, 5), np.float32)
        assert isinstance(node, nir.IF) or (node.r == 1).all()
        # Float32 against float64: no potential is so near the threshold that rounding matters.
        current = 2 * random_input(12, 3, 4, 6, 5).detach()
        assert torch.equal(euler(node, current, **options), model[1](current))


@pytest.mark.parametrize("name", INTEGRATORS)
def test_the_same_integrators_come_back(name, tmp_path):
    """As neurons' current, in a node of its own, and as a read-out; NIR's equations give the outputs."""
    given, options = INTEGRATORS[name]
    layers = nn.Sequential(LeakyIntegrator(**given), LIF(v_threshold=0.2))
    model = randomized(behind_a_convolution(layers)).append(LeakyIntegrator(decay=0.9))
    x_seq = random_input(6, 3, *IMAGE).detach()
    graph = rewritten(to_nir(model, x_seq, **options), tmp_path / "model.nir")
    kind, current = nir.I if name == "no leak" else nir.LI, model[0](x_seq)
    (node,) = [node for node in graph.nodes.values() if isinstance(node, kind) and node.r.shape == (4, 6, 5)]
    expected = layers[0](current)
    layers[0].reset()
    torch.testing.assert_close(euler(node, current, **options), expected, rtol=1e-5, atol=1e-5)
    back = from_nir(graph)
    assert_the_same_layers(model, back, LeakyIntegrator)
    assert torch.equal(back(x_seq), model.eval()(x_seq))


def test_float64_and_what_the_metadata_says(tmp_path):
    layer = randomized(LIF(3, granularity="channel", v_threshold=0.3, decay=0.7)).double()
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2), LeakyIntegrator(decay=0.9)).double().eval()
    x_seq = random_input(8, 4, 3, dtype=torch.float64).detach()
    graph = rewritten(to_nir(model, x_seq), tmp_path / "model.nir")
    node = next(node for node in graph.nodes.values() if isinstance(node, nir.LIF))
    assert node.tau.dtype == np.float64
    ours = node.metadata["asgl_cuda"]
    assert (ours["reset"], bool(ours["strict_threshold"])) == ("hard", False)
    assert torch.equal(torch.as_tensor(ours["width"]), layer.width.detach())
    assert torch.equal(from_nir(graph, dtype=torch.float64)(x_seq), model(x_seq)), "through a file"
    assert {value.dtype for value in from_nir(graph).parameters()} == {torch.float32}


class Skip(nn.Module):
    """A residual block of one layer, with an addition in two ways."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.lif = LIF()

    def forward(self, x_seq):
        s_seq = self.lif(self.inner(x_seq) + x_seq)
        return torch.add(self.outer(s_seq), s_seq)


def branches():
    """A convolution whose output is both normalised and added."""

    def forward(net, x_seq):
        y = net.conv(x_seq.flatten(0, 1))
        return net.lif((net.norm(y) + y).unflatten(0, x_seq.shape[:2]))

    return Stack(forward, conv=nn.Conv2d(2, 4, 3, padding=1), norm=nn.BatchNorm2d(4), lif=LIF(v_threshold=0.4))


def summed():
    def forward(net, x_seq):
        return net.lif(net.norm(net.first(x_seq) + net.second(x_seq)))

    weights = {"first": nn.Linear(6, 5), "second": nn.Linear(6, 5)}
    return Stack(forward, **weights, norm=OverTime(nn.BatchNorm1d(5)), lif=LIF(v_threshold=0.4))


def dropped():
    """A weight whose output is normalised behind a dropout, and used without."""

    def forward(net, x_seq):
        y = net.linear(x_seq)
        return net.lif(net.norm(net.dropout(y))) + net.other(y)

    layers = {"norm": OverTime(nn.BatchNorm1d(5)), "lif": LIF(v_threshold=0.4), "other": LIF(v_threshold=0.4)}
    return Stack(forward, linear=nn.Linear(6, 5), dropout=nn.Dropout(), **layers)


def normalised(*features, **options):
    return BatchNormLIF(*features, v_threshold=0.4, **options)


def fused(shape, *layers):
    model, report = asgl_cuda.fuse(nn.Sequential(*layers), torch.rand(2, 3, *shape))
    assert len(report.replaced) == 1
    return model


def conv(*arguments, dims=2, **options):
    return OverTime((nn.Conv1d if dims == 1 else nn.Conv2d)(*arguments, **options))


def normed(dims, *arguments, norm=None, **options):
    """A convolution and a normalisation over time."""
    made = conv(*arguments, dims=dims, **options)
    norm = norm or (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)
    return OverTime(nn.Sequential(made.layer, norm(arguments[1])))


# Layers, the shape of their input, and the kinds of nodes with weights that are written.
AFFINE, CONV1D, CONV2D = nir.Affine, nir.Conv1d, nir.Conv2d
OTHERS = {
    "Linear": (lambda: [nn.Linear(6, 3), LIF()], ROW, [AFFINE]),
    "Linear without bias": (lambda: [nn.Linear(6, 3, bias=False), LIF()], ROW, [AFFINE]),
    "Conv1d": (lambda: [conv(4, 6, 3, stride=2, padding=2, dilation=2, dims=1), LIF()], LINE, [CONV1D]),
    "Conv1d same": (lambda: [conv(4, 6, 3, padding="same", dims=1), LIF()], LINE, [CONV1D]),
    "Conv2d": (lambda: [conv(2, 4, 3, stride=2, padding=1, bias=False), LIF()], IMAGE, [CONV2D]),
    "Conv2d in groups": (lambda: [conv(2, 6, 3, groups=2), LIF()], IMAGE, [CONV2D]),
    "Conv2d oblong": (lambda: [conv(2, 6, (3, 5), padding=(1, 0), stride=(1, 2)), LIF()], IMAGE, [CONV2D]),
    "AvgPool2d": (lambda: [OverTime(nn.AvgPool2d(3, 2, padding=1)), LIF(v_threshold=0.2)], IMAGE, []),
    "SumPool2d": (lambda: [OverTime(nn.AvgPool2d((2, 3), divisor_override=1)), LIF()], IMAGE, []),
    "Flatten": (lambda: [nn.Flatten(2), LIF()], IMAGE, []),
    "Flatten of some": (lambda: [nn.Flatten(2, 3), LIF()], IMAGE, []),
    "Dropout": (lambda: [nn.Dropout(), nn.Identity(), LIF()], ROW, []),
    "additions": (lambda: [Skip(), Skip(), LIF()], ROW, [AFFINE] * 4),
    "names of additional nodes": (
        lambda: {"0": LIF(scale_output=True, v_threshold=0.4), "0_scale": nn.Linear(6, 6), "1": LIF(v_threshold=0.3),
                 "1_norm": LIF(v_threshold=0.3)},
        ROW, [AFFINE],
    ),
}  # fmt: skip
NORMALISED = {
    "Linear": (lambda: [nn.Linear(6, 5), OverTime(nn.BatchNorm1d(5)), LIF(v_threshold=0.4)], ROW, [AFFINE]),
    "Linear without bias": (lambda: [nn.Linear(6, 5, bias=False), normalised(5)], ROW, [AFFINE]),
    "Conv1d": (lambda: [normed(1, 4, 5, 3), LIF(v_threshold=0.4)], LINE, [CONV1D]),
    "Conv2d in groups": (
        lambda: [conv(2, 4, 3, groups=2, bias=False), normalised(4, input_scale=1.3)], IMAGE, [CONV2D],
    ),
    "neurons that differ": (
        lambda: [conv(2, 4, 3), normalised((4, 4, 3), granularity="neuron", learn_decay=True)], IMAGE, [CONV2D],
    ),
    "scaled output": (lambda: [nn.Linear(6, 5), normalised(5, scale_output=True)], ROW, [AFFINE]),
    "an integrator behind it": (
        lambda: [nn.Linear(6, 5), OverTime(nn.BatchNorm1d(5)), LeakyIntegrator(), LIF()], ROW, [AFFINE],
    ),
    "fused": (lambda: [fused(IMAGE, normed(2, 2, 4, 3), LIF())], IMAGE, [CONV2D]),
    "SyncBatchNorm": (lambda: [normed(2, 2, 4, 3, norm=nn.SyncBatchNorm), LIF()], IMAGE, [CONV2D]),
    # Not folded: a node of its own.
    "at the input": (lambda: [normalised(6)], ROW, [AFFINE]),
    "behind a pooling": (
        lambda: [conv(2, 4, 3), OverTime(nn.AvgPool2d(2)), normalised(4)], IMAGE, [CONV2D, CONV2D],
    ),
    "between others": (lambda: [branches()], IMAGE, [CONV2D, CONV2D]),
    "behind a sum": (lambda: [summed()], ROW, [AFFINE, AFFINE, AFFINE]),
    "behind a dropout, and without": (lambda: [dropped()], ROW, [AFFINE, AFFINE]),
    "of a line": (lambda: [OverTime(nn.BatchNorm1d(4)), LIF()], LINE, [CONV1D]),
    "twice": (lambda: [OverTime(nn.BatchNorm1d(6)), normalised(6)], ROW, [AFFINE]),
    "fused alone": (lambda: [fused(IMAGE, OverTime(nn.BatchNorm2d(2)), LIF())], IMAGE, [CONV2D]),
}  # fmt: skip


WRITTEN = {**OTHERS, **{f"normalised: {name}": row for name, row in NORMALISED.items()}}


def scattered(model):
    """The model in evaluation, with normalisations that are not the identity and weights that make every layer fire."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.weight.data *= 3
        if getattr(module, "running_mean", None) is not None:
            for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.3), ("running_var", 0.5)):
                if (value := getattr(module, name)) is not None:
                    value.data.uniform_(low, low + 1)
    return model.eval()


def with_weights(graph):
    kinds = (AFFINE, nir.Linear, CONV1D, CONV2D)
    return [type(node) for node in graph.nodes.values() if isinstance(node, kinds)]


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("name", WRITTEN)
def test_written_and_read(name, tmp_path):
    """Normalisations are folded into preceding weights or, without these, written as nodes."""
    make, shape, kinds = WRITTEN[name]
    torch.manual_seed(0)
    layers = make()
    model = nn.Sequential(OrderedDict(layers)) if isinstance(layers, dict) else nn.Sequential(*layers)
    model, x_seq = scattered(model), torch.randn(7, 3, *shape)
    before = copy.deepcopy(model.state_dict())
    graph = to_nir(model, x_seq)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert with_weights(graph) == kinds
    # nir's own inference of shapes refuses some.
    graph = rewritten(graph, tmp_path / "model.nir", type_check="groups" not in name and "oblong" not in name)
    expected = model(x_seq)
    assert fires(expected)
    back = from_nir(graph, dtype=torch.float64)
    torch.testing.assert_close(back(x_seq), expected)
    if name in OTHERS:
        without_bias = [[getattr(each, "bias", None) is None for each in made.modules() if hasattr(each, "weight")]
                        for made in (model, back)]  # fmt: skip
        assert without_bias[0] == without_bias[1]


def test_every_option_of_the_layer_is_written():
    (node,) = [node for node in to_nir(LIF(), torch.rand(2, 3, 4)).nodes.values() if isinstance(node, nir.LIF)]
    not_of_the_neuron = {"time_dim", "backend", "device", "dtype"}
    options = set(LIF.__init__.__kwdefaults__) - not_of_the_neuron - {"reset_amount", "v_min", "levels"}
    assert set(node.metadata["asgl_cuda"]["options"]) == options
    node = to_nir(LeakyIntegrator(), torch.rand(2, 3, 4)).nodes["_0"]
    options = set(LeakyIntegrator.__init__.__kwdefaults__) - not_of_the_neuron - {"delay"}
    assert set(node.metadata["asgl_cuda"]["options"]) == options


@pytest.mark.parametrize("kind", [LIF, LeakyIntegrator])
def test_an_option_that_is_not_known_is_refused(monkeypatch, kind):
    """Where it is in use: a reader would not know of it."""
    model = nn.Sequential(nn.Linear(3, 3), kind())
    monkeypatch.setitem(kind._options, "refractory", None)
    to_nir(model, torch.rand(2, 1, 3))
    model[1].refractory = 2
    with pytest.raises(ValueError, match=rf"1 \({kind.__name__}\): has refractory=2, which to_nir can't write"):
        to_nir(model, torch.rand(2, 1, 3))


def test_an_option_of_a_converted_layer_that_is_not_known_is_refused(monkeypatch):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    monkeypatch.setattr(write, "_KNOWN_OF_CALLS", write._KNOWN_OF_CALLS - {"decay"})
    with pytest.raises(ValueError, match=r"0 \(LIFNode\): has decay, which to_nir can't write"):
        to_nir(nn.Sequential(neuron.LIFNode(step_mode="m")), torch.rand(2, 1, 3))


def test_time_in_the_second_dimension_is_first_afterwards():
    model = nn.Sequential(nn.Linear(5, 4), LIF(time_dim=1)).eval()
    x_seq = random_input(3, 6, 5).detach()  # [B, T, ...]
    back = from_nir(to_nir(model, x_seq))
    assert torch.equal(back(x_seq.transpose(0, 1)), model(x_seq).transpose(0, 1))


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(5, 4), LIF(stateful=True, analog_prob=0.0), LeakyIntegrator(stateful=True))
    model(random_input(6, 3, 5).detach())
    potential = model[1].v
    to_nir(model, torch.zeros(2, 7, 5))
    assert model.training
    assert model[1].v is potential


def test_unused_layers_are_not_written():
    """Each node that nothing follows gets an Output of its own from nir."""
    layers = {"linear": nn.Linear(4, 4), "lif": LIF(), "head": nn.Linear(4, 2), "last": LIF()}
    model = Stack(lambda m, x: (m.lif(m.head(m.linear(x))), m.last(m.linear(x)))[1], **layers).eval()
    x_seq = random_input(6, 3, 4).detach()
    graph = to_nir(model, x_seq)
    assert list(graph.nodes) == ["x_seq", "linear_1", "last", "output"]
    assert torch.equal(from_nir(graph)(x_seq), model(x_seq))


# ---- what is refused ----


def decaying(layer, decay):
    """The layer with an invalid decay."""
    layer._decay = decay
    return layer


def stack(forward):
    return lambda: Stack(forward, linear=nn.Linear(4, 4), lif=LIF())


def over_time(layer, message):
    return lambda: OverTime(layer), rf"layer \({type(layer).__name__}\).*{message}", (2, 3, 2, 5, 6)


NOT_REPRESENTED = {
    "soft reset": (
        lambda: nn.Sequential(LIF(v_reset=None)),
        r"0 \(LIF\): has a soft reset \(v_reset=None\).*allow_soft_reset.* most other readers then reset .* to v_rest$",
    ),
    "floor": (
        lambda: nn.Sequential(LIF(v_min=-1.0)),
        r"0 \(LIF\): has v_min=-1\.0.*allow_soft_reset=True.* most other readers then ignore v_min=-1\.0$",
    ),
    "soft reset, floor and levels": (
        lambda: nn.Sequential(LIF(v_reset=None, v_min=-0.1, levels=4)),
        r"other readers then reset the potential to v_rest, ignore v_min=-0\.1 and emit at most one spike per step$",
    ),
    "levels": (
        lambda: nn.Sequential(LIF(v_reset=None, levels=2)),
        r"other readers then reset the potential to v_rest and emit at most one spike per step$",
    ),
    "one level": (
        lambda: nn.Sequential(LIF(v_reset=None, levels=1)), r"other readers then reset the potential to v_rest$",
    ),
    "delay": (lambda: LeakyIntegrator(delay=True, v_rest=0.1), r"LeakyIntegrator.: has v_rest and delay"),
    "states and delay": (lambda: LeakyIntegrator(delay=True, stateful=True), "has stateful=True and delay=True, which"),
    "a start that is not 0": (lambda: LeakyIntegrator(decay=1.0, v_rest=0.5), r"has v_rest and no leak \(decay 1\)"),
    "batch norm": (
        lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(3))),
        r"0\.0 \(BatchNorm1d\): its input must have .*, \[T·B, \.\.\.\], and 1 more dimension, got them separate and 1 "
        r"more, \[T, B, 4\]; wrap the layer in asgl_cuda\.OverTime$",
    ),
    "statistics of the batch": (
        lambda: OverTime(nn.BatchNorm1d(4, track_running_stats=False)), "must have running statistics, .* got track_r",
    ),
    "shapes that are not known": (lambda: nn.Sequential(nn.LazyLinear(3)), r"0 \(LazyLinear\): can't be represented"),
    "another layer": (lambda: nn.Sequential(nn.ReLU()), r"\(ReLU\): can't be .* in NIR; layers that can be: .*LIF"),
    "adaptation": (lambda: asgl_cuda.AdaptiveLIF(), r"0 \(AdaptiveLIF\): can't be represented in NIR"),
    "a volume": (
        lambda: OverTime(nn.BatchNorm3d(2)),
        r"BatchNorm3d\): its input must have at most 2 dimensions after the channels, got 3 in shape \[2, 3, 4, 5\]",
        (2, 2, 2, 3, 4, 5),
    ),
    "mean": (stack(lambda m, x: m.lif(x).mean(0)), "mean in the model itself: can't be represented"),
    "a constant added": (stack(lambda m, x: m.linear(x) + 1), "add in the model itself"),
    "sums of unlike shapes": (
        lambda: Stack(lambda m, x: m.linear(x) + m.lif(x), linear=nn.Linear(4, 1), lif=LIF()),
        r"add in the model itself: can't be .*, which has no broadcasting; got \[2, 3, 1\] and \[2, 3, 4\]$",
    ),
    "a factor": (
        stack(lambda m, x: torch.add(x, m.lif(x), alpha=2)),
        r"add in the model itself: can't be .*, which adds without a factor; got alpha=2$",
    ),
    "a flatten": (stack(lambda m, x: m.lif(x).flatten(2)), r"flatten in .*use layers .*, such as nn\.Flatten\(2\) for"),
    "twice the same": (stack(lambda m, x: m.linear(x) + x + x), "add in the model itself"),
    "two arguments": (stack(lambda m, x: m.lif(x, m.linear(x))), r"lif \(LIF\): must have one argument, the output"),
    "unflatten": (stack(lambda m, x: m.lif(x.unflatten(2, (2, 2)))), "unflatten in the model"),
    "batch first": (stack(lambda m, x: m.linear(x.flatten(0, 1)).unflatten(0, (3, 2))), "unflatten in the model"),
    "batch as channels": (
        lambda: nn.Sequential(nn.Conv1d(3, 3, 1)),
        r"0 \(Conv1d\): its input .* and 2 more dimensions, got them separate and 1 more, \[T, B, 4\]; wrap the layer",
    ),
    "no way for fx": (stack(lambda m, x: m.lif(x) if x.sum() > 0 else x), "Stack can't be traced"),
    "two outputs": (stack(lambda m, x: (m.lif(x), x)), r"must return one tensor \[T, B, ...\]"),
    "neurons without time": (
        stack(lambda m, x: m.lif(x.flatten(0, 1)).unflatten(0, x.shape[:2])),
        r"lif \(LIF\): must take time and batch as two dimensions",
    ),
    "batch flattened": (lambda: nn.Sequential(nn.Flatten()), r"0 \(Flatten\): must not flatten time or batch.*got 1"),
    "time last": (lambda: nn.Sequential(LIF(time_dim=-1)), r"0 \(LIF\): time must be dimension 0 .*got time_dim -1"),
    "time elsewhere": (lambda: nn.Sequential(LIF(), LIF(time_dim=1)), "1 .*: time must be dimension 0, as in the"),
    "time last and elsewhere": (lambda: nn.Sequential(LIF(), LIF(time_dim=2)), "time must be dimension 0, as in the"),
    "input gain": (lambda: nn.Sequential(LIF(input_gain=-1)), r"0 \(LIF\): input_gain must be > 0, got -1\.0"),
    "decay": (lambda: nn.Sequential(decaying(LIF(), 1.5)), r"0 \(LIF\): decay must be in \[0, 1\], got 1.5"),
    "leak of some": (
        lambda: nn.Sequential(LIF(4, granularity="neuron", decay=torch.linspace(0.4, 1.0, 4))),
        r"0 \(LIF\): decay must be 1 for all neurons or for none, got 0.4 to 1",
    ),
    "padding mode": over_time(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode must be zeros, got circular"
    ),
    "ceil_mode": over_time(nn.AvgPool2d(2, ceil_mode=True), r"has ceil_mode=True, which"),
    "divisor_override": over_time(nn.AvgPool2d(2, divisor_override=3), "divisor_override must be None or 1, got 3"),
    "count_include_pad": over_time(nn.AvgPool2d(3, padding=1, count_include_pad=False), "count_include_pad=False"),
    "weights over some dimensions": over_time(nn.Linear(6, 3), r"one dimension .* got 3 in shape \[2, 5, 6\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_REPRESENTED)
def test_errors_name_the_unsupported_layer(name):
    make, message, *shape = NOT_REPRESENTED[name]
    with pytest.raises(ValueError, match=f"asgl_cuda.to_nir: .*{message}") as error:
        to_nir(make(), torch.rand(*(shape or [(2, 3, 4)])[0]))
    assert "\n" not in str(error.value)  # fx's account of the traced graph


@pytest.mark.parametrize(("missing", "call"), [("nir", from_nir), ("nirtorch", to_nir)])
def test_without_nir_the_error_says_what_to_install(missing, call, monkeypatch):
    for name in (missing, "nirtorch.torch_tracer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf'{call.__name__}: needs {missing}: pip install "nir>=1.0.7" "nirtorch>=2.6"'
    ):
        call(LIF(), torch.rand(2, 3, 4)) if call is to_nir else call(None)


X = torch.ones(2, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: to_nir(None, X), TypeError, r"to_nir: model must be a torch\.nn\.Module, got NoneType"),
        (lambda: to_nir(LIF, X), TypeError, r"to_nir: model must be .*, got the class LIF; pass an instance$"),
        (lambda: to_nir(LIF(), [1.0]), TypeError, "to_nir: example_input must be a tensor, got list"),
        (lambda: to_nir(LIF(), X[0]), ValueError, r"to_nir: example_input .* batch and neurons.*got shape \[2, 2\]"),
        (lambda: to_nir(LIF(), X, "1"), TypeError, "to_nir: dt must be a float, got str"),
        (lambda: to_nir(LIF(), X, dt=0), ValueError, "to_nir: dt must be > 0, got 0.0"),
        (lambda: from_nir(graph_of(nir_lif()), dt=-1), ValueError, "from_nir: dt must be > 0, got -1.0"),
        (
            lambda: from_nir(to_nir(LIF(), X), dt=1e-3),
            ValueError,
            r"from_nir: node '_0' \(LIF\): to_nir wrote this node with dt = 0.0001, got dt = 0.001; leave out",
        ),
        (
            lambda: from_nir(to_nir(LeakyIntegrator(delay=True), X, dt=1e-3), dt=1e-4),
            ValueError,
            r"from_nir: node '_0' \(LI\): to_nir wrote this node with dt = 0.001, got dt = 0.0001",
        ),
        (
            lambda: from_nir(graph_of(nir_lif()), dtype=-1),
            TypeError,
            "from_nir: dtype must be float16, bfloat16, float32, float64 or None, got -1",
        ),
        (lambda: to_nir(LIF(), X, allow_soft_reset=1), TypeError, "to_nir: allow_soft_reset must be a bool, got int"),
        (lambda: from_nir("model.nir"), TypeError, r"from_nir: graph must be a nir\.NIRGraph, .*, got str"),
    ],
)
def test_arguments(call, error, message):
    with pytest.raises(error, match=rf"asgl_cuda\.{message}"):
        call()


@pytest.mark.parametrize("dt", [1e-4, 1e-3, 0.3])
def test_the_step_that_was_given_is_the_step_that_is_read(dt):
    """Named again or not."""
    model = nn.Sequential(nn.Linear(4, 5), LIF(v_threshold=0.2), nn.Linear(5, 3), LeakyIntegrator(delay=True)).eval()
    x_seq = random_input(6, 3, 4).detach()
    graph = to_nir(model, x_seq, dt=dt)
    for back in (from_nir(graph), from_nir(graph, dt=dt)):
        assert torch.equal(back(x_seq), model(x_seq))


# ---- layers of other libraries ----


def neurons_of_libraries():
    """By name: neurons of other libraries, and the error where NIR has no such node."""
    jelly = pytest.importorskip("spikingjelly.activation_based.neuron")
    jelly_layer = pytest.importorskip("spikingjelly.activation_based.layer")
    layers, activation = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.activation")
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(), p=0.0)
    tau = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0])
    single = {"spike_fn": activation.SingleSpike, "spike_threshold": torch.tensor(0.3)}
    amount = {"reset_fn": activation.MembraneSubtract(0.4)}
    return {
        "LIFNode": (jelly.LIFNode(tau=1.7, step_mode="m"), None),
        "PLIFNode": (jelly.ParametricLIFNode(v_threshold=0.7, decay_input=False, step_mode="m"), None),
        "IFNode": (jelly.IFNode(step_mode="m"), None),
        "soft": (jelly.LIFNode(v_reset=None, step_mode="m"), None),
        "LIF of sinabs": (layers.LIF(tau, reset_fn=activation.MembraneReset(), **single), None),
        "IAF of sinabs": (layers.IAF(**single), None),
        "MaxSpike(1) of sinabs": (layers.IAF(spike_fn=activation.MaxSpike(1)), None),
        "LIFLayer": (authors_code.LIFLayer(6, spike_fn=spike, thresh=0.8), None),
        "soft, not allowed": (jelly.LIFNode(v_reset=None, step_mode="m"), r"1 \(LIFNode\): has a soft reset"),
        "floor": (
            layers.IAF(min_v_mem=-1.0, **single),
            r"1 \(IAF\): has a lower limit of the potential, which to_nir.* use asgl_cuda\.LIF in",
        ),
        "several": (layers.IAF(), r"1 \(IAF\): has several spikes per step, which to_nir.* use asgl_cuda\.LIF in its"),
        "current": (
            layers.IAF(tau_syn=3.0, **single),
            r"1 \(IAF\): has a synaptic current, which .* use asgl_cuda\.LeakyIntegrator before",
        ),
        "ExpLeak": (layers.ExpLeak(2.0), r"1 \(ExpLeak\): does not fire, and .* use asgl_cuda\.LeakyIntegrator in its"),
        "recurrent": (
            jelly_layer.LinearRecurrentContainer(jelly.LIFNode(), 5, 5, step_mode="m"),
            r"1 \(LinearRecurrentContainer\): can't be represented in NIR; NIR does not say when a spike that returns",
        ),
        "amount of sinabs": (layers.IAF(**amount, **single), None),
        "a step a call": (jelly.LIFNode(), r"1 \(LIFNode\): must take .* but takes one step per call"),
        "squeezed": (
            layers.IAFSqueeze(batch_size=3, **single),
            r"1 \(IAFSqueeze\): must take whole sequences, .* but takes one step per call",
        ),
    }


CONVERTED = (
    "LIFNode", "PLIFNode", "IFNode", "soft", "LIF of sinabs", "IAF of sinabs", "MaxSpike(1) of sinabs", "LIFLayer",
    "soft, not allowed", "floor", "several", "current", "ExpLeak", "recurrent", "amount of sinabs", "a step a call",
    "squeezed",
)  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_layers(name):
    """NIR has neither strict thresholds nor surrogates, so spikes are compared away from the threshold."""
    made, error = neurons_of_libraries()[name]
    torch.manual_seed(0)
    model = asgl_cuda.convert(nn.Sequential(nn.Linear(4, 5), made))[0].eval()
    x_seq = 3 * torch.randn(6, 6, 4)
    if error is not None:
        with pytest.raises(ValueError, match=rf"asgl_cuda\.to_nir: {error}"):
            to_nir(model, x_seq, allow_soft_reset=name != "soft, not allowed")
        return
    graph = to_nir(model, x_seq, allow_soft_reset=True)
    s_seq = from_nir(graph)(x_seq.transpose(0, 1) if "sinabs" in name else x_seq)
    expected = model(x_seq)
    assert 0.02 < (expected > 0).float().mean() < 0.98
    torch.testing.assert_close(s_seq.transpose(0, 1) if "sinabs" in name else s_seq, expected)


def test_models_of_snntorch_that_take_sequences_are_refused_with_a_remedy():
    snntorch = pytest.importorskip("snntorch")
    from asgl_cuda.interop.snntorch import MultiStep

    steps = nn.Sequential(nn.Linear(4, 4), snntorch.Leaky(0.9, init_hidden=True))
    for model, where in (
        (nn.Sequential(nn.Linear(4, 4), MultiStep(snntorch.Leaky(0.9))), r"1 \(MultiStep\)"),
        (asgl_cuda.convert(steps, sequences=True)[0], r"0 \(Sequential\)"),
    ):
        with pytest.raises(ValueError, match=rf"^asgl_cuda\.to_nir: {where}: can't be .* asgl_cuda\.LIF in "):
            to_nir(model, torch.rand(5, 2, 4))


@pytest.mark.parametrize(
    ("kind", "arguments", "instead"),
    [("Leaky", (0.9,), "LIF"), ("Synaptic", (0.5, 0.9), r"LeakyIntegrator before asgl_cuda\.LIF")],
)
def test_layers_that_return_a_tuple_are_refused_with_a_remedy(kind, arguments, instead):
    layer = getattr(pytest.importorskip("snntorch"), kind)(*arguments)
    words = rf"1 \({kind}\): must return one tensor, got tuple; use asgl_cuda\.{instead} in its place"
    with pytest.raises(ValueError, match=rf"^asgl_cuda\.to_nir: {words}"):
        to_nir(nn.Sequential(nn.Linear(4, 4), layer), torch.rand(5, 2, 4))


def test_norses_layers_are_refused_by_name():
    """They return their state with their output, alone, in a Sequential and in Norse's containers."""
    norse = pytest.importorskip("norse.torch")
    reason = "can't be written; it returns a state with its output; norse.torch.to_nir writes models"
    cells = norse.LIFBoxCell, norse.LIFCell, norse.IAF, norse.LIF, norse.LICell, partial(norse.LIFRecurrent, 4, 4)
    for make in cells:
        name = type(make()).__name__
        containers = norse.SequentialState(nn.Linear(4, 4), make()), norse.RecurrentSequential(make(), nn.Linear(4, 4))
        models = [make(), nn.Sequential(make()), nn.Sequential(nn.Linear(4, 4), make())]
        models += [*containers, *map(nn.Sequential, containers)]
        named = [(name, 0), (name, 0), (name, 1), *[(type(each).__name__, 0) for each in containers] * 2]
        for model, (kind, place) in zip(models, named, strict=True):
            said = (
                reason
                if "LICell" not in kind
                else "can't be written; asgl_cuda.convert leaves it, because its few operations"
            )
            with pytest.raises(ValueError, match=rf"^asgl_cuda\.to_nir: {place} \({kind}\): {re.escape(said)}"):
                to_nir(model, torch.rand(2, 3, 4))


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("norm", ["BatchNorm2d", "ThresholdDependentBatchNorm2d"])
def test_layers_of_spikingjelly(norm):
    """Written as torch's, whether converted before or on the way."""
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    arguments = (4,) if norm == "BatchNorm2d" else (1.0, 0.5, 4)
    model = nn.Sequential(
        layer.SeqToANNContainer(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Identity()),
        layer.Conv2d(2, 4, 3, bias=False),
        getattr(layer, norm)(*arguments), neuron.LIFNode(tau=1.5), layer.AvgPool2d(2, 2, padding=1), layer.Flatten(),
        layer.Dropout(0.3), layer.Linear(24, 12), neuron.LIFNode(v_threshold=0.2),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    functional.set_step_mode(model[0], "s")
    scattered(model)
    x_seq = 2 * torch.randn(9, 3, 2, 6, 5)
    expected = model(x_seq)
    assert fires(expected)
    for made in (asgl_cuda.fuse(model, x_seq)[0], model, asgl_cuda.convert(model)[0]):
        assert torch.equal(from_nir(to_nir(made, x_seq))(x_seq), expected)


def test_what_is_refused_of_spikingjelly():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import layer, neuron

    for made, words in (
        (layer.Conv2d(2, 3, 3), "0 (Conv2d): its input must have time and batch merged"),
        (OverTime(layer.Conv2d(2, 3, 3, step_mode="m")), "layer (Conv2d): "),
        (layer.MaxPool2d(2), "0 (MaxPool2d): can't be represented in NIR; layers that can be:"),
        (layer.WSConv2d(2, 3, 3), "0 (WSConv2d): can't be represented in NIR"),
        (neuron.QIFNode(step_mode="m"), "0 (QIFNode): can't be written; asgl_cuda.convert leaves it, because "),
    ):
        with pytest.raises(ValueError, match=f"^asgl_cuda.to_nir: .*{re.escape(words)}"):
            to_nir(nn.Sequential(made), torch.rand(3, 3, 2, 6, 5))
