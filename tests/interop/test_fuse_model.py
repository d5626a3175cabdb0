"""State, copies, compilation and the rest of the kit with models under `fuse` and `unfuse`."""

import copy
import gc
import operator
import pickle
import sys
import weakref

import pytest
import snntorch
import torch
from comparison import Stack
from conversions import B, C, T, history, on, reset, scattered
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda.calls import recompute
from asgl_cuda.interop.fuse import Fused
from asgl_cuda.neurons.over_time import OverTime

pytestmark = pytest.mark.usefixtures("in_double")

SHAPE = (T, B, C, 4, 4)


class Block(nn.Module):
    """A residual block; has a name, for pickle."""

    def __init__(self, lif=None, form=operator.add):
        super().__init__()
        self.branch = OverTime(nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)))
        self.lif = lif or asgl_cuda.LIF(analog_prob=0.0)
        self.form = form

    def forward(self, x):
        return self.lif(self.form(self.branch(x), x))


def net():
    """A pair of ours, one of SpikingJelly's."""
    made = nn.Sequential(
        OverTime(nn.Sequential(nn.Linear(6, C), nn.BatchNorm1d(C))),
        asgl_cuda.LIF(C, granularity="channel", analog_prob=0.0),
        layer.BatchNorm1d(C, step_mode="m"),
        neuron.ParametricLIFNode(step_mode="m"),
    )
    return scattered(made)


def joined(model, example=None):
    fused, report = asgl_cuda.fuse(model, example)
    assert not report.left, report
    return fused


X = torch.randn(T, B, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_copy_unless_inplace_is_said_and_back():
    """Neurons are converted and given back; names, parameters and an optimizer's values stay."""
    model = net()
    classes = [type(module) for module in model.modules()]
    parameters, names, attributes = list(model.parameters()), list(model.state_dict()), set(vars(model[3]))
    fused, report = asgl_cuda.fuse(model, X)
    assert report.replaced == [
        ("1", "LIF", "normalises as well, instead of 0.layer.1"),
        ("3", "ParametricLIFNode", "normalises as well, instead of 2"),
    ]
    assert [type(module) for module in model.modules()] == classes
    same, _ = asgl_cuda.fuse(model, X, inplace=True)
    assert same is model
    for made in (fused, same):
        assert [type(module).__name__ for module in (made[0].layer[1], *made[1:])] == [
            "FusedBatchNorm1d", "LIF", "FusedBatchNorm1d", "ConvertedParametricLIFNode",
        ]  # fmt: skip
        assert isinstance(made[2], layer.BatchNorm1d)
        assert list(made.state_dict()) == names
        assert "computed by the neurons after it" in repr(made)
    assert all(ours is theirs for ours, theirs in zip(same.parameters(), parameters, strict=True))
    _, report = asgl_cuda.unfuse(same, inplace=True)
    assert [row[1:] for row in report.replaced] == [
        ("FusedBatchNorm1d", "BatchNorm1d"), ("FusedBatchNorm1d", "BatchNorm1d"),
        ("ConvertedParametricLIFNode", "ParametricLIFNode"),
    ]  # fmt: skip
    assert [type(module) for module in model.modules()] == classes
    assert set(vars(model[3])) == attributes
    kept, _ = asgl_cuda.unfuse(asgl_cuda.fuse(asgl_cuda.convert(model)[0], X)[0])
    assert type(kept[3]).__name__ == "ConvertedParametricLIFNode"
    assert asgl_cuda.fuse(nn.Sequential(nn.Linear(6, 2), asgl_cuda.LIF()), X)[1] == ([], [])
    replaced, left = asgl_cuda.fuse(fused, X)[1]
    assert not replaced
    assert {row.reason for row in left} == {"an earlier fuse has merged it already"}


class Counting(nn.Module):
    """With side effects."""

    def __init__(self):
        super().__init__()
        self.bn, self.lif = OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(stateful=True)
        self.leaky, self.drop = snntorch.Leaky(beta=0.5, init_hidden=True), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.lif(self.bn(x.add_(1))))
        return self.drop(self.leaky(self.seen[-1][0]))


def test_the_example_leaves_no_trace():
    model, x_seq = Counting().eval(), torch.randn(T, B, C)
    given, random, layers = x_seq.clone(), torch.get_rng_state(), len(snntorch.SpikingNeuron.instances)
    fused, report = asgl_cuda.fuse(model, x_seq, inplace=True)
    assert len(report.replaced) == 1
    assert (fused.calls.item(), fused.seen, fused.lif.v, fused.training) == (0, [], None, False)
    assert int(fused.bn.layer.num_batches_tracked) == 0
    assert torch.equal(x_seq, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(snntorch.SpikingNeuron.instances) == layers
    assert type(fused.leaky) is snntorch.Leaky


def test_a_tuple_is_the_arguments():
    x_seq, wrong = torch.rand(5, 2, 3), torch.rand(5, 2, 7)
    model = nn.Sequential(nn.Linear(3, C), OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF())
    assert not asgl_cuda.fuse(model, (x_seq,))[1].left
    for example, got in (((x_seq, 3), r"\[5, 2, 3\], a int"), (wrong, r"\[5, 2, 7\]")):
        expected = r"asgl_cuda\.fuse: example must be an input of the model or a tuple of its arguments"
        error = rf"{expected}, got a tensor of shape {got}.*, with which the model raises"
        with pytest.raises(ValueError, match=error):
            asgl_cuda.fuse(model, example)


def test_without_an_example():
    """The first calls decide and complete the report; what is left gets its class back."""
    model = nn.Sequential(*net(), layer.BatchNorm1d(C, step_mode="m"), nn.Flatten(2))
    fused, report = asgl_cuda.fuse(model)
    assert report == ([], [])
    assert str(report).endswith("fuse(model, example) decides at once")
    assert torch.equal(fused(X) + 0, model(X))
    assert [row.path for row in report.replaced] == ["1", "3"]
    assert report.left == [("4", "BatchNorm1d", "its output goes to add")]
    for made in (model, fused):
        functional.reset_net(made)
    assert torch.equal(fused(X), model(X))
    assert type(fused[4]) is layer.BatchNorm1d
    assert isinstance(copy.deepcopy(asgl_cuda.fuse(model)[0])[4], Fused)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    x_seq = 2 * torch.randn(SHAPE)
    fused = joined(scattered(Block(neuron.LIFNode(step_mode="m"))), x_seq)
    fused(x_seq)  # potentials are inside a graph now
    functional.reset_net(fused)
    twin = copied(fused)
    torch.testing.assert_close(history(twin, x_seq), history(fused, x_seq))
    assert type(asgl_cuda.unfuse(twin)[0].lif) is neuron.LIFNode


def test_convert_and_revert_know_fused_layers():
    fused = joined(net(), X)
    assert asgl_cuda.convert(fused)[1] == ([], [])
    plain, report = asgl_cuda.revert(fused)
    assert (type(plain[3]), report.left) == (neuron.ParametricLIFNode, [])
    functional.reset_net(fused)
    torch.testing.assert_close(plain(X), fused(X))  # the library's own neurons get the value
    part, report = asgl_cuda.unfuse(fused[:1])
    assert (type(part[0].layer[1]), len(report.replaced)) == (nn.BatchNorm1d, 1)


def test_models_are_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        for example in (X, None):
            model = asgl_cuda.fuse(net(), example)[0]
            for _ in range(2):
                model(X).sum().backward()
                functional.reset_net(model)
            found = [weakref.ref(module) for module in model.modules()]
            del model
            assert not [each for each in found if each() is not None]
    finally:
        gc.enable()


FORMS = {
    "x + y": lambda y, x: x + y,
    "views": lambda y, x: (y.flatten(0, 1) + x.flatten(0, 1)).view(T, B, C, 16).transpose(2, 3),
    "one step": lambda y, x: y + x[:1],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_compiled(form):
    torch._dynamo.reset()
    own = form == "views"
    lif = (lambda: asgl_cuda.LIF(analog_prob=0.0)) if own else lambda: neuron.LIFNode(step_mode="m")
    x_seq, seen = 2 * torch.randn(SHAPE), []
    model = scattered(on(asgl_cuda.convert(Block(lif(), FORMS[form]))[0], "cpu"))
    fused = joined(scattered(on(asgl_cuda.convert(Block(lif()))[0], "cpu")), x_seq)
    fused.load_state_dict(model.state_dict())
    fused.form = FORMS[form]

    def look(graph, example_inputs):
        seen.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    found = history(torch.compile(fused, backend=look, fullgraph=True), x_seq)
    found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    torch.testing.assert_close(found, history(model, x_seq), rtol=1e-9, atol=1e-11)
    assert all(("batch_norm " in names) == (form == "one step") for names in seen), seen
    torch._dynamo.reset()


@pytest.mark.parametrize("lif", [lambda: asgl_cuda.LIF(analog_prob=0.0), lambda: neuron.LIFNode(step_mode="m")])
def test_exported_and_traced(lif):
    """torch.export and torch.fx."""
    x_seq = 2 * torch.randn(SHAPE)
    model = scattered(on(asgl_cuda.convert(Block(lif()))[0], "cpu")).eval()
    fused = joined(model, x_seq).eval()
    expected = model(x_seq)
    for strict in (False, True):
        reset(fused)
        exported = torch.export.export(fused, (x_seq,), strict=strict)
        assert torch.equal(exported.module()(x_seq), expected)
        assert "batch_norm_coefficients" in str(exported.graph)
    reset(fused)
    traced = torch.fx.symbolic_trace(fused)
    assert torch.equal(traced(x_seq), expected)
    assert "lif" in [node.target for node in traced.graph.find_nodes(op="call_module")]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointed(backend, momentum):
    """The repeated call counts its batch as well, by the operator or by operations of torch."""
    model, x_seq = on(scattered(Block(asgl_cuda.LIF(analog_prob=0.3))), backend), torch.randn(SHAPE)
    for made in model.modules():
        if isinstance(made, nn.BatchNorm2d):
            made.momentum = momentum
    fused, found = joined(model, x_seq), []
    for made in (fused, model):
        torch.manual_seed(0)
        out = checkpoint(made, x_seq.requires_grad_(), use_reentrant=False)
        grads = torch.autograd.grad(out.square().sum(), [x_seq, *made.parameters()])
        found.append([out, *grads, *(value.clone() for value in made.buffers())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_first_calls_in_a_checkpoint():
    """A normalisation that is left in the first call is computed again as it was computed there."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lif = OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.0)

        def forward(self, x_seq):
            y = self.norm(x_seq)
            return self.lif(y) * y.mean()

    model, x_seq = Twice(), torch.randn(5, 4, C, requires_grad=True)
    fused, report = asgl_cuda.fuse(model)
    for _ in range(2):
        found = [torch.autograd.grad(checkpoint(each, x_seq, use_reentrant=False).sum(), x_seq)
                 for each in (fused, model)]  # fmt: skip
        torch.testing.assert_close(*found)
        assert torch.equal(fused.norm.layer.num_batches_tracked, model.norm.layer.num_batches_tracked)
    assert [row.path for row in report.left] == ["norm.layer"]


def test_steps_and_streams(backend):
    x_seq = torch.randn(SHAPE)
    model = on(scattered(nn.Sequential(Block(), Block())), backend).eval()
    fused = joined(model, x_seq)
    stepped = torch.stack([asgl_cuda.step(fused, x_t) for x_t in x_seq])
    assert torch.equal(stepped, model(x_seq))
    asgl_cuda.reset(fused)
    with asgl_cuda.spiking_eval(model.train()), asgl_cuda.spiking_eval(fused.train()):
        assert torch.equal(fused(x_seq), model(x_seq))
    given = scattered(Stack(lambda net, x: net.lif(net.branch(x), x), branch=Block().branch, lif=model[0].lif)).eval()
    stepped = torch.stack([asgl_cuda.step(given, x_t) for x_t in x_seq])
    asgl_cuda.reset(given)
    assert torch.equal(stepped, given(x_seq))
    stateful = scattered(Block(asgl_cuda.LIF(analog_prob=0.0, stateful=True, backend=backend)))
    fused = joined(stateful, x_seq)
    for _ in range(2):
        torch.testing.assert_close(fused(x_seq), stateful(x_seq))
        torch.testing.assert_close(fused.lif.v, stateful.lif.v)


def test_states_in_another_order(backend):
    """Channels last: initial and returned potentials are in the order of the input."""
    model = Stack(
        lambda net, x: net.lif(net.bn(x.flatten(0, 1)).view_as(x).movedim(2, -1)), bn=nn.BatchNorm2d(C),
        lif=asgl_cuda.LIF(analog_prob=0.0, stateful=True, store_v_seq=True, backend=backend),
    )  # fmt: skip
    x_seq = torch.randn(SHAPE)
    fused = joined(scattered(model), x_seq)
    for _ in range(2):
        torch.testing.assert_close(fused(x_seq), model(x_seq))
        torch.testing.assert_close((fused.lif.v, fused.lif.v_seq), (model.lif.v, model.lif.v_seq))


def test_monitored(backend):
    """The repeated call has the residual, and changes no statistics."""
    model, x_seq = scattered(Block(asgl_cuda.LIF(analog_prob=0.5, backend=backend))), torch.randn(SHAPE)
    fused = joined(model, x_seq)
    found = []
    for made in (model, fused):
        torch.manual_seed(0)
        with asgl_cuda.Monitor(made) as monitor:
            made(x_seq)
        found.append(monitor.result()["lif"])
    assert found[1].pop("constant") == 0  # of the normalisation's channels
    assert found[1] == pytest.approx(found[0])
    assert found[0]["analog_share"] > 0
    torch.testing.assert_close(list(fused.buffers()), list(model.buffers()))


def test_spikes_recomputed(monkeypatch):
    """A shortcut of spikes is recomputed, too."""
    computed, original = [], recompute._SpikesOfCall._compute_again
    monkeypatch.setattr(recompute._SpikesOfCall, "_compute_again", lambda self: computed.append(self) or original(self))
    first, x_seq = nn.Sequential(OverTime(nn.Conv2d(C, C, 1)), asgl_cuda.LIF()), torch.randn(SHAPE)
    model = on(scattered(nn.Sequential(first, Block(), Block(), OverTime(nn.Conv2d(C, C, 1)))), "cpu")
    fused = joined(model, x_seq)
    expected = history(copy.deepcopy(fused), x_seq)
    with asgl_cuda.recompute_spikes():
        found = history(fused, x_seq)
    assert len(computed) == 3 * 3
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_sync_batch_norm(monkeypatch):
    """Fused layers stay so, and name their processes, by default all; training/test_distributed.py runs two."""
    x_seq, asked = torch.randn(SHAPE), []
    model = scattered(Block())
    converted = asgl_cuda.convert_sync_batchnorm(joined(model, x_seq))
    assert type(converted.branch.layer[1]).__name__ == "FusedSyncBatchNorm"
    assert torch.equal(converted(x_seq), model(x_seq))
    fuse = sys.modules["asgl_cuda.interop.fuse"]
    monkeypatch.setattr(fuse, "module_batch_norm_lif", lambda norm, x, **more: asked.append(more["process_group"]) or x)
    for norm in (nn.SyncBatchNorm(C), nn.SyncBatchNorm(C, process_group="some"), nn.BatchNorm1d(C)):
        asgl_cuda.fuse(nn.Sequential(OverTime(norm), asgl_cuda.LIF()))[0](torch.randn(T, B, C))
    assert asked == ["world", "some", None]


def test_calibrate_and_to_nir():
    """A sum is refused, or a node of its own."""
    x_seq = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="one weight that calibrate can scale must determine its input, got"):
        asgl_cuda.calibrate(joined(Block(), x_seq), x_seq)
    pytest.importorskip("nir")
    first = nn.Sequential(OverTime(nn.Conv2d(C, C, 1)), asgl_cuda.LIF())
    model = scattered(nn.Sequential(first, Block(neuron.LIFNode(step_mode="m")))).eval()
    graph, expected = (asgl_cuda.to_nir(asgl_cuda.convert(made)[0], x_seq) for made in (joined(model, x_seq), model))
    assert sorted(graph.edges) == sorted(expected.edges)
    for name, node in expected.nodes.items():
        for key in ("weight", "bias"):
            assert torch.equal(*(torch.as_tensor(getattr(each, key, ())) for each in (graph.nodes[name], node)))
