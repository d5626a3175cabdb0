"""Normalisations go into the weights before them, and layers of SpikingJelly are written as torch's."""

import copy

import pytest
import torch
from nir_graphs import fires, nir, rewritten
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF, LeakyIntegrator
from asgl_cuda.interop.nir import from_nir, to_nir
from asgl_cuda.over_time import OverTime


class Branches(nn.Module):
    """A convolution whose output is both normalised and added."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.lif = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), LIF(v_threshold=0.4)

    def forward(self, x_seq):
        y = self.conv(x_seq.flatten(0, 1))
        return self.lif((self.norm(y) + y).unflatten(0, x_seq.shape[:2]))


class OwnBatchNorm(nn.BatchNorm1d):
    """A user's subclass that computes the same."""


def normalised_lif(*features, **options):
    return BatchNormLIF(*features, v_threshold=0.4, **options)


def fused(*layers):
    return asgl_cuda.fuse(nn.Sequential(*layers))[0]


IMAGE, LINE, ROW = (2, 6, 5), (4, 9), (6,)
FOLDED = {
    "Linear": (lambda: [nn.Linear(6, 5), OverTime(nn.BatchNorm1d(5)), LIF(v_threshold=0.4)], ROW),
    "Linear without bias": (lambda: [nn.Linear(6, 5, bias=False), normalised_lif(5)], ROW),
    "a subclass": (lambda: [nn.Linear(6, 5), OverTime(OwnBatchNorm(5)), LIF(v_threshold=0.4)], ROW),
    "Conv1d": (lambda: [OverTime(nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5))), LIF(v_threshold=0.4)], LINE),
    "Conv2d in groups": (
        lambda: [OverTime(nn.Conv2d(2, 4, 3, groups=2, bias=False)), normalised_lif(4, input_scale=1.3)], IMAGE,
    ),
    "without weight and bias": (lambda: [OverTime(nn.Conv2d(2, 4, 3)), normalised_lif(4, affine=False)], IMAGE),
    "neurons that differ": (
        lambda: [OverTime(nn.Conv2d(2, 4, 3)), normalised_lif((4, 4, 3), granularity="neuron", learn_decay=True)],
        IMAGE,
    ),
    "scaled output": (lambda: [nn.Linear(6, 5), normalised_lif(5, scale_output=True)], ROW),
    "two of them": (
        lambda: [OverTime(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))), normalised_lif(4)],
        IMAGE,
    ),
    "an integrator behind it": (lambda: [nn.Linear(6, 5), OverTime(nn.BatchNorm1d(5)), LeakyIntegrator(), LIF()], ROW),
    "fused": (lambda: [fused(OverTime(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))), LIF())], IMAGE),
    "SyncBatchNorm": (lambda: [OverTime(nn.Sequential(nn.Conv2d(2, 4, 3), nn.SyncBatchNorm(4))), LIF()], IMAGE),
}  # fmt: skip


# Not folded, with the resulting kind of node.
ALONE = {
    "at the input": (lambda: [normalised_lif(6)], ROW, nir.Affine),
    "behind a pooling": (
        lambda: [OverTime(nn.Conv2d(2, 4, 3)), OverTime(nn.AvgPool2d(2)), normalised_lif(4)], IMAGE, nir.Conv2d,
    ),
    "between others": (lambda: [Branches()], IMAGE, nir.Conv2d),
    "of a line": (lambda: [OverTime(nn.BatchNorm1d(4)), LIF()], LINE, nir.Conv1d),
    "twice": (lambda: [OverTime(nn.BatchNorm1d(6)), normalised_lif(6)], ROW, nir.Affine),
    "fused alone": (lambda: [fused(OverTime(nn.BatchNorm2d(2)), LIF())], IMAGE, nir.Conv2d),
}  # fmt: skip


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


def made(layers):
    torch.manual_seed(0)
    return scattered(nn.Sequential(*layers()))


def counted(graph):
    kinds = (nir.Affine, nir.Linear, nir.Conv1d, nir.Conv2d)
    return [type(node) for node in graph.nodes.values() if isinstance(node, kinds)]


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("name", [*FOLDED, *ALONE])
def test_normalisations(name, written, tmp_path):
    """Folded into preceding weights or, without these, written as nodes."""
    make, shape, *kind = (FOLDED | ALONE)[name]
    model, x_seq = made(make), torch.randn(7, 3, *shape)
    before = copy.deepcopy(model.state_dict())
    graph = to_nir(model, x_seq)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if kind:
        others = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
        assert counted(graph).count(*kind) == others + 1
    else:
        assert len(counted(graph)) == 1
    graph = rewritten(graph, tmp_path / "model.nir", type_check="groups" not in name) if written else graph
    expected = model(x_seq)
    assert fires(expected)
    torch.testing.assert_close(from_nir(graph)(x_seq), expected)


def test_a_part_of_a_fused_model():
    """A fused normalisation is a node of its own."""
    whole = made(lambda: fused(OverTime(nn.BatchNorm1d(6)), LIF(v_threshold=0.4)))
    x_seq = torch.randn(7, 3, 6)
    for part in (whole[1:], whole[:1]):
        torch.testing.assert_close(from_nir(to_nir(part, x_seq))(x_seq), part(x_seq) + 0)


def test_a_volume_has_no_layer_in_nir():
    with pytest.raises(ValueError, match=r"0\.layer \(BatchNorm3d\): NIR has no convolution for .*\[2, 3, 4, 5\]"):
        to_nir(nn.Sequential(OverTime(nn.BatchNorm3d(2)), LIF()), torch.rand(2, 2, 2, 3, 4, 5))


def test_names_of_additional_nodes_are_unique():
    """A layer's additional node is renamed where another layer of the model has the name."""
    layers = {"0": LIF(scale_output=True, v_threshold=0.4), "0_scale": nn.Linear(6, 6), "1": LIF(), "1_norm": LIF()}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    x_seq = torch.randn(7, 3, 6)
    graph = to_nir(model, x_seq)
    assert len(graph.nodes) == 7
    assert torch.equal(from_nir(graph)(x_seq), model.eval()(x_seq))


def jelly(name):
    """A network `[T, B, 2, 6, 5]` to `[T, B, 12]` of SpikingJelly's layers, whose neurons are converted."""
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

    flat = [layer.Flatten(), layer.Dropout(0.3), layer.Linear(24, 12), neuron.LIFNode(v_threshold=0.2)]
    made = {
        "Conv2d": lambda: [layer.Conv2d(2, 4, 3, bias=False), layer.BatchNorm2d(4), neuron.LIFNode(tau=1.5)],
        "Conv1d": lambda: [
            layer.Flatten(2), layer.Conv1d(2, 4, 3, stride=3, padding=1), neuron.IFNode(), layer.Conv1d(4, 4, 5),
        ],
        "tdBN": lambda: [layer.Conv2d(2, 4, 3), layer.ThresholdDependentBatchNorm2d(1.0, 0.5, 4), neuron.IFNode()],
        "SeqToANNContainer": lambda: [
            layer.SeqToANNContainer(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Identity()), neuron.IFNode(),
        ],
    }[name]  # fmt: skip
    torch.manual_seed(0)
    last = [] if name == "Conv1d" else [layer.AvgPool2d(2, 2, padding=1)]
    model = nn.Sequential(*made(), *last, *flat)
    functional.set_step_mode(model, "m")
    if name == "SeqToANNContainer":
        functional.set_step_mode(model[0], "s")
    return scattered(model)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("with_fuse", [False, True])
@pytest.mark.parametrize("name", ["Conv2d", "Conv1d", "tdBN", "SeqToANNContainer"])
def test_layers_of_spikingjelly(name, with_fuse):
    model = jelly(name)
    x_seq = 2 * torch.randn(9, 3, 2, 6, 5)
    expected = model(x_seq)
    converted = asgl_cuda.convert(asgl_cuda.fuse(model, x_seq)[0] if with_fuse else model)[0]
    graph = to_nir(converted, x_seq)
    assert 0.02 < (expected > 0).double().mean() < 0.98
    assert torch.equal(from_nir(graph)(x_seq), expected)


def test_steps_of_spikingjelly():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import layer, neuron

    alone = to_nir(nn.Sequential(layer.Linear(6, 5), LIF()), torch.rand(3, 3, 6))
    assert counted(alone) == [nir.Affine]
    inside = to_nir(nn.Sequential(OverTime(layer.Conv2d(2, 3, 3)), LIF()), torch.rand(3, 3, 2, 6, 5))
    assert counted(inside) == [nir.Conv2d]
    of_library = "of spikingjelly) can't be"
    for made, words in (
        (layer.Conv2d(2, 3, 3), "0 (Conv2d of spikingjelly): step_mode must be 'm' where time"),
        (layer.BatchNorm2d(2), "0 (BatchNorm2d of spikingjelly): step_mode must be 'm'"),
        (
            OverTime(layer.Conv2d(2, 3, 3, step_mode="m")),
            "layer (Conv2d of spikingjelly): step_mode 'm' takes time and batch apart",
        ),
        (layer.MaxPool2d(2), f"0 (MaxPool2d {of_library} represented in NIR; what can be:"),
        (layer.WSConv2d(2, 3, 3), f"0 (WSConv2d {of_library} represented in NIR"),
        (layer.MultiStepContainer(layer.Conv2d(2, 3, 3)), f"0 (MultiStepContainer {of_library} traced"),
        (neuron.LIFNode(step_mode="m"), f"0 (LIFNode {of_library} represented in NIR; it must be converted first, by "),
        (neuron.LIFNode(), "by asgl_cuda.convert, in step mode 'm'"),
        (neuron.QIFNode(step_mode="m"), f"0 (QIFNode {of_library} represented in NIR; asgl_cuda.convert leaves it: "),
    ):
        with pytest.raises(ValueError, match=r"^asgl_cuda\.to_nir: ") as found:
            to_nir(nn.Sequential(made), torch.rand(3, 3, 2, 6, 5))
        assert words in str(found.value)


def test_neurons_of_other_libraries_by_name():
    snntorch = pytest.importorskip("snntorch")
    sinabs = pytest.importorskip("sinabs.layers")
    for made, name in ((snntorch.Leaky(0.5, init_hidden=True), "Leaky of snntorch"), (sinabs.IAF(), "IAF of sinabs")):
        with pytest.raises(ValueError, match=rf"to_nir: 0 \({name}\) can't .* must be converted first, by asgl_cuda"):
            to_nir(nn.Sequential(made), torch.rand(3, 2, 4))


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_spikingjelly_reads_folded_normalisations(step_mode):
    module = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    x_seq = torch.randn(9, 3, 2, 6, 5, dtype=torch.float64)
    model = made(lambda: [
        OverTime(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))), LIF(v_threshold=0.4),
        OverTime(nn.AvgPool2d(2)), normalised_lif(4), nn.Flatten(2), nn.Linear(8, 3), normalised_lif(3),
    ]).double()  # fmt: skip
    graph = to_nir(model, x_seq)
    other = module.import_from_nir(graph, step_mode=step_mode, dtype=torch.float64)
    with torch.no_grad():
        if step_mode == "m":
            s_seq = other(x_seq)[0]
        else:
            state, steps = None, []
            for x in x_seq:
                s, state = other(x, state)
                steps.append(s)
            s_seq = torch.stack(steps)
        expected = model(x_seq)
    assert fires(expected)
    assert torch.equal(s_seq, expected)
