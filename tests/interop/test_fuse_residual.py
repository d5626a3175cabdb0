"""Residual blocks: normalisation, addition and neurons in one."""

import copy
import operator
import pickle

import authors_code
import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from comparison import Stack
from conversions import (
    B,
    C,
    T,
    assert_alike,
    assert_same_sums,
    authors_layer,
    history,
    monitored,
    on,
    reasons,
    reset,
    scattered,
)
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.model import spiking_resnet
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import recompute
from asgl_cuda.interop import pending
from asgl_cuda.interop.snntorch import MultiStep
from asgl_cuda.over_time import OverTime

pytestmark = pytest.mark.usefixtures("in_double")

SHAPE = (T, B, C, 4, 4)


@pytest.fixture
def by_torch(monkeypatch):
    """Additions that are computed apart."""
    found, original = [], pending._by_torch
    monkeypatch.setattr(pending, "_by_torch", lambda *args, **kwargs: found.append(1) or original(*args, **kwargs))
    return found


def conv_bn():
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C))


def block(form=operator.add, lif=None, **parts):
    """`form` of the normalised value and the input, then neurons."""
    parts = {"branch": OverTime(conv_bn()), "lif": asgl_cuda.LIF() if lif is None else lif} | parts
    return Stack(lambda net, x: net.lif(form(net.branch(x), x)), **parts)


# ---- the addition ----


def in_place(y, x):
    y += x
    return y


def of_the_shortcut(y, x):
    shortcut = x * 1
    shortcut += y
    return shortcut


# A sum, and whether torch computes it.
FORMS = {
    "y + x": (operator.add, False),
    "x + y": (lambda y, x: x + y, False),
    "y += x": (in_place, False),
    "torch.add(y, x)": (torch.add, False),
    "torch.add(x, y)": (lambda y, x: torch.add(x, y), False),
    "y.add(x)": (lambda y, x: y.add(x), False),
    "x.add(y)": (lambda y, x: x.add(y), False),
    "y.add_(x)": (lambda y, x: y.add_(x), False),
    "alpha 1": (lambda y, x: torch.add(y, x, alpha=1), False),
    "x += y": (of_the_shortcut, True),
    "one step": (lambda y, x: y + x[:1], True),
    "one step first": (lambda y, x: x[:1] + y, True),
    "expanded": (lambda y, x: y + x[:1].expand_as(x), False),
    "in another layout": (lambda y, x: y + x.transpose(3, 4).contiguous().transpose(3, 4), False),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, backend, by_torch):
    function, computed = FORMS[form]
    assert_alike(block(function), torch.randn(SHAPE), 1, backend)
    assert bool(by_torch) == computed


def with_shortcut(net, x):
    return net.lif(net.branch(x) + net.shortcut(x))


@pytest.mark.parametrize("first", ["branch", "shortcut"])
def test_two_normalisations(first, backend, by_torch):
    """The first operand is fused, in whatever order the modules are."""
    parts = {"branch": OverTime(conv_bn()), "shortcut": OverTime(conv_bn())}
    parts = dict(sorted(parts.items(), reverse=first == "shortcut"))
    model = scattered(Stack(with_shortcut, **parts, lif=asgl_cuda.LIF()))
    fused, report = asgl_cuda.fuse(model)
    assert report.replaced == [("lif", "LIF", "normalises as well, instead of branch.layer.1")]
    assert reasons(model) == {
        "shortcut.layer.1": "the sum of its output and another goes to NormalisedLIF, which has a normalisation of its "
        "own"
    }
    x_seq = torch.randn(SHAPE)
    torch.testing.assert_close(history(on(fused, backend), x_seq), history(on(model, backend), x_seq))
    assert not by_torch


def test_the_shortcut_changes_in_place(backend):
    """Whatever else reads the shortcut sees the sum, and changes it."""

    def forward(net, x):
        shortcut = x * 1
        alias = shortcut.view_as(shortcut)
        shortcut += net.branch(x)
        alias.mul_(1.5)
        return net.lif(shortcut) + alias

    model = scattered(Stack(forward, branch=OverTime(conv_bn()), lif=asgl_cuda.LIF()))
    fused, report = asgl_cuda.fuse(model)
    assert len(report.replaced) == 1
    x_seq = torch.randn(SHAPE)
    torch.testing.assert_close(history(on(fused, backend), x_seq), history(on(model, backend), x_seq))


CHANGES = {
    "x": (lambda h, x: h.mul_(2), "the input of BatchNorm2d, or the shortcut added"),
    "the shortcut": (lambda h, x: x.mul_(2), "the input of BatchNorm2d, or the shortcut added"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_before_the_neurons_is_an_error(name):
    change, message = CHANGES[name]

    def forward(net, x):
        h = net.conv(x.flatten(0, 1))
        x = x * 1
        sum_ = net.bn(h).unflatten(0, x.shape[:2]) + x
        change(h, x)
        return net.lif(sum_)

    model = Stack(forward, conv=nn.Conv2d(C, C, 1), bn=nn.BatchNorm2d(C), lif=asgl_cuda.LIF())
    fused, report = asgl_cuda.fuse(model)
    assert len(report.replaced) == 1
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        fused(torch.randn(SHAPE))
    with torch.inference_mode():  # counts no changes
        fused(torch.randn(SHAPE))


def test_a_change_behind_the_neurons_is_an_error_of_backward():
    def forward(net, x):
        shortcut = x * 1
        s_seq = net.lif(net.branch(x) + shortcut)
        shortcut.mul_(2)
        return s_seq

    fused, report = asgl_cuda.fuse(Stack(forward, branch=OverTime(conv_bn()), lif=asgl_cuda.LIF()))
    assert len(report.replaced) == 1
    out = on(fused, "cpu")(torch.randn(SHAPE, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- places ----


def parted_behind(net, x):
    y = net.bn(net.conv(x.flatten(0, 1))) + x.flatten(0, 1)
    return net.lif(torch.unflatten(y, 0, x.shape[:2]))


def parted_before(net, x):
    return net.lif(net.bn(net.conv(x.flatten(0, 1))).unflatten(dim=0, sizes=x.shape[:2]) + x)


def parted_by_torch(net, x):
    return net.lif(torch.unflatten(net.bn(net.conv(x.flatten(0, 1))), 0, x.shape[:2]) + x)


def asking(net, x):
    y = net.bn(net.conv(x.flatten(0, 1)))
    y = y.unflatten(0, (y.size(0) // B, y.shape[0] // T)) + x
    assert y.ndim == y.dim() == 5
    assert y.dtype == x.dtype
    return net.lif(y)


PLACES = [parted_behind, parted_before, parted_by_torch, asking]


@pytest.mark.parametrize("forward", PLACES, ids=lambda forward: forward.__name__)
def test_places(forward, backend, by_torch):
    parts = {"conv": nn.Conv2d(C, C, 1), "bn": nn.BatchNorm2d(C), "lif": asgl_cuda.LIF()}
    assert_alike(Stack(forward, **parts), torch.randn(SHAPE), 1, backend)
    assert not by_torch


def wrapped():
    node = neuron.LIFNode(step_mode="m")
    jelly = layer.BatchNorm2d(C, step_mode="m")
    return {
        "SeqToANNContainer": block(branch=layer.SeqToANNContainer(*conv_bn())),
        "around the neurons": block(branch=layer.SeqToANNContainer(*conv_bn()), lif=nn.Sequential(node)),
        "tdLayer": block(branch=authors_code.tdLayer(conv_bn(), T)),
        "BatchNorm of SpikingJelly": block(branch=nn.Sequential(layer.Conv2d(C, C, 1, step_mode="m"), jelly)),
        "SyncBatchNorm": block(branch=OverTime(nn.Sequential(nn.Conv2d(C, C, 1), nn.SyncBatchNorm(C)))),
    }


@pytest.mark.parametrize("name", ["SeqToANNContainer", "around the neurons", "tdLayer", "BatchNorm of SpikingJelly",
                                  "SyncBatchNorm"])  # fmt: skip
def test_wrappers(name, backend, by_torch):
    assert_alike(wrapped()[name], torch.randn(SHAPE), 1, backend, lambda model, x: model(x))
    assert not by_torch


# ---- neurons ----


OURS = {
    "a gain": {"input_gain": 0.7, "v_rest": 0.2},
    "by channel": {"num_features": C, "granularity": "channel", "learn_decay": True},
    "stateful": {"stateful": True, "detach_reset": True},
    "batch first": {"time_dim": 1},
}


@pytest.mark.parametrize("name", OURS)
def test_our_neurons(name, backend):
    def call(model, x_seq):
        out = model(x_seq)
        model.lif.detach_()
        return out

    assert_alike(block(lif=asgl_cuda.LIF(**OURS[name])), torch.randn(SHAPE), 1, backend, call)


def jelly(node, mode="m"):
    node.step_mode = mode
    return node


NODES = {
    "LIFNode": lambda: neuron.LIFNode(tau=1.5),
    "LIFNode, x undecayed": lambda: neuron.LIFNode(decay_input=False, v_reset=None),
    "ParametricLIFNode": lambda: neuron.ParametricLIFNode(v_reset=0.1),
    "IFNode": neuron.IFNode,
}


@pytest.mark.parametrize("name", NODES)
def test_spikingjelly(name, backend, by_torch):
    model = block(lif=jelly(NODES[name]()))
    assert_alike(model, 2 * torch.randn(SHAPE), 1, backend, lambda model, x: model(x))
    assert not by_torch


def test_spikingjelly_a_step_a_call(backend):
    def steps(model, x_seq):
        return torch.stack([model(x) for x in x_seq])

    model = block(branch=nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)), lif=neuron.LIFNode(tau=1.5))
    assert_alike(model, 3 * torch.randn(T, B, C), 1, backend, steps)


@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero"])
def test_snntorch(reset_mechanism, backend):
    def forward(net, x):
        return net.leaky(net.bn(net.fc(x)) + x)

    leaky = snntorch.Leaky(beta=0.9, init_hidden=True, learn_beta=True, reset_mechanism=reset_mechanism)
    model = Stack(forward, fc=nn.Linear(C, C), bn=nn.BatchNorm1d(C), leaky=leaky)
    assert_alike(model, 2 * torch.randn(T, B, C), 1, backend, lambda model, x: torch.stack([model(each) for each in x]))


def test_multi_step(backend):
    lif = MultiStep(snntorch.Leaky(beta=0.9, init_hidden=True))
    model = block(branch=OverTime(nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))), lif=lif)
    assert_alike(on(model, backend), 2 * torch.randn(T, B, C), 1, backend, lambda model, x: model(x))


@pytest.mark.parametrize("tau", [torch.tensor(400.0), torch.tensor([300.0, 400.0, 500.0])])
def test_norse(tau, backend):
    """An input gain and bias, also one a channel."""
    p = norse.LIFBoxParameters(tau_mem_inv=tau, v_leak=torch.tensor(0.4), v_th=torch.tensor(0.8))

    def forward(net, x):
        return net.lif(net.bn(x) + x)

    def call(model, x_seq):
        model.state = None
        return torch.stack([model(x)[0] for x in x_seq])

    model = Stack(forward, bn=nn.BatchNorm1d(C), lif=norse.LIFBoxCell(p))
    assert_alike(model, 2 * torch.randn(T, B, C), 1, backend, call)


@pytest.mark.parametrize("squeeze", [False, True])
def test_sinabs(squeeze, backend):
    options = {"spike_threshold": torch.tensor(0.3), "spike_fn": sinabs.activation.SingleSpike}
    lif = (
        sinabs.layers.LIFSqueeze(tau_mem=3.0, batch_size=B, **options)
        if squeeze
        else nn.Sequential(sinabs.layers.UnflattenTime(B), sinabs.layers.LIF(3.0, norm_input=True, **options))
    )
    model = block(branch=conv_bn(), lif=lif).double()  # tau_mem, too
    assert_alike(model, 2 * torch.randn(B * T, C, 2, 2), 1, backend, lambda model, x: model(x))


def test_the_authors_code(backend):
    model = block(branch=authors_code.tdLayer(conv_bn(), T), lif=authors_layer(T, retain_v=False))
    model(torch.randn(SHAPE))  # the width becomes a parameter
    assert_alike(model, torch.randn(SHAPE), 1, backend)


# ---- models ----


def resnet(name):
    model = getattr(spiking_resnet, name)(spiking_neuron=neuron.LIFNode, num_classes=4)
    functional.set_step_mode(model, "m")
    return model


@pytest.mark.parametrize(("name", "fused", "norms"), [("18", 17, 20), ("34", 33, 36), ("50", 49, 53)])
def test_spiking_resnets(name, fused, norms, monkeypatch):
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda weight, **_: weight)
    with torch.device("meta"):
        model = resnet(f"spiking_resnet{name}")
    _, report = asgl_cuda.fuse(model, inplace=True)
    assert (len(report.replaced), len(report.left)) == (fused, norms - fused)
    assert all("downsample" in row.path for row in report.left)


def test_a_spiking_resnet(by_torch):
    model = asgl_cuda.convert(scattered(resnet("spiking_resnet18")))[0]
    fused, _ = asgl_cuda.fuse(model)
    assert_equal = torch.testing.assert_close
    x_seq, fired = torch.randn(2, 2, 3, 32, 32), []
    for made in (model, fused):
        spikes = []
        for module in made.modules():
            if isinstance(module, neuron.LIFNode):
                module.register_forward_hook(lambda _, args, out, spikes=spikes: spikes.append(out.detach()))
        fired.append(spikes)
    found, expected = (history(made, x_seq, lambda model, x: model(x)) for made in (fused, model))
    assert len(fired[0]) == len(fired[1]) == 3 * 17
    assert all(torch.equal(*each) for each in zip(*fired, strict=True))
    assert 0.02 < sum(each.mean() for each in fired[0]) / len(fired[0]) < 0.9
    assert_equal(found, expected, rtol=1e-9, atol=1e-10)
    assert not by_torch


def test_float32(backend):
    """With analog_prob 1 nothing is rounded to a spike."""
    model = scattered(block(lif=asgl_cuda.LIF(analog_prob=1.0))).float()
    x_seq = torch.randn(SHAPE, dtype=torch.float32)
    fused = on(asgl_cuda.fuse(model)[0], backend)
    assert_same_sums(history(fused, x_seq), history(model, x_seq))


# ---- types ----

TYPES = {
    "bfloat16": (operator.add, torch.bfloat16, False),
    "bfloat16 and float32": (operator.add, torch.float32, True),
    "float32 and bfloat16": (lambda y, x: x + y, torch.float32, True),
    "float32 in place": (in_place, torch.float32, True),
    "spikes": (operator.add, torch.bool, True),
}


@pytest.mark.parametrize("name", TYPES)
def test_types_under_autocast(name, backend, by_torch):
    """The convolution gives bfloat16."""
    form, dtype, computed = TYPES[name]
    model = scattered(block(lambda y, x: form(y, x.to(dtype)), asgl_cuda.LIF(analog_prob=1.0))).float()
    fused = on(asgl_cuda.fuse(model)[0], backend)
    x_seq, found = torch.randn(SHAPE, dtype=torch.float32), []
    for made in (fused, model):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(made(x_seq))
    assert found[0].dtype == found[1].dtype == (torch.bfloat16 if form is in_place else found[1].dtype)
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.04)
    assert bool(by_torch) == computed


# ---- reasons ----


def next_shortcut(net, x):
    shortcut = net.branch(x) + x
    return net.lif(shortcut) + shortcut


LEFT = {
    "the next shortcut": (
        next_shortcut,
        "the sum of its output and another is used 2 times, by LIF and add: it is also the next shortcut",
    ),
    "the sum is returned, too": (
        lambda net, x: (lambda y: (net.lif(y), y))(net.branch(x) + x),
        "the sum of its output and another is used 2 times, by LIF and the caller of Stack",
    ),
    "the sum is the output": (
        lambda net, x: net.branch(net.lif(x)) + x,
        "the sum of its output and another is that of the model",
    ),
    "nothing uses the sum": (lambda net, x: (net.branch(x) + x, net.lif(x))[1], "nothing uses it"),
    "used twice": (
        lambda net, x: (lambda y: net.lif(y + x) + y)(net.branch(x)),
        "its output is used 2 times, by add",
    ),
    "alpha": (lambda net, x: net.lif(torch.add(net.branch(x), x, alpha=2)), "its output goes to add"),
    "a number": (lambda net, x: net.lif(net.branch(x) + 1), "its output goes to add"),
    "itself": (lambda net, x: net.lif((lambda y: y + y)(net.branch(x))), "its output goes to add"),
    "in place of the shortcut": (lambda net, x: net.lif((1 * x).add_(net.branch(x))), "its output goes to add_"),
    "two": (lambda net, x: net.lif(net.branch(x) + x + x), "the sum of its output and another goes to add"),
    "a difference": (lambda net, x: net.lif(net.branch(x) - x), "its output goes to sub"),
    "ReLU behind": (lambda net, x: net.lif((net.branch(x) + x).relu()), "the sum of its output and another goes to "
                                                                         "relu"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    forward, reason = LEFT[name]
    (found,) = reasons(Stack(forward, branch=OverTime(conv_bn()), lif=asgl_cuda.LIF())).values()
    assert found == reason


def test_a_use_that_was_not_traced():
    """A forward that an attribute leads another way after fusing."""

    def lead(net, x):
        y = net.branch(x)
        if net.way == "sum":
            y = y + x
        elif net.way == "relu":
            y = y.relu()
        elif net.way == "sigmoid":
            y = torch.sigmoid(y)
        elif net.way == "product":
            y = x * y
        elif net.way == "double":
            y = 2 * y
        elif net.way == "alpha":
            y = torch.add(x, y, alpha=2)
        return net.lif(y)

    model = scattered(Stack(lead, branch=OverTime(conv_bn()), lif=asgl_cuda.LIF(analog_prob=0.0)))
    model.way = "sum"
    fused, report = asgl_cuda.fuse(model)
    assert len(report.replaced) == 1
    x_seq = torch.randn(SHAPE)
    for fused.way in ("relu", "sigmoid", "product", "double"):
        with pytest.raises(RuntimeError, match=r"BatchNorm2d.* is used otherwise than .* asgl_cuda\.unfuse takes"):
            fused(x_seq)
    for model.way in ("alone", "alpha"):
        fused.way = model.way
        assert torch.equal(fused(x_seq), model(x_seq))


# ---- the rest of the kit ----


def test_a_residual_given_to_the_neurons(backend):
    """The addition is the layer's own; behind another one, the first is computed apart."""
    for forward in (lambda net, x: net.lif(net.branch(x), x), lambda net, x: net.lif(net.branch(x) + x, residual=x)):
        model = Stack(forward, branch=OverTime(conv_bn()), lif=asgl_cuda.LIF(input_gain=0.7))
        assert_alike(model, torch.randn(SHAPE), 1, backend)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("lif", [asgl_cuda.LIF, lambda: neuron.LIFNode(step_mode="m")])
def test_copies(copied, lif):
    model = Chain(lif())
    fused, report = asgl_cuda.fuse(model)
    assert len(report.replaced) == 1
    x_seq = 2 * torch.randn(SHAPE)
    fused(x_seq)
    functional.reset_net(fused)
    twin = copied(fused)
    assert twin.lif.normalisation.norm is twin.branch.layer[1]
    call = lambda model, x: model(x)  # noqa: E731
    torch.testing.assert_close(history(twin, x_seq, call), history(fused, x_seq, call))
    back, _ = asgl_cuda.unfuse(twin)
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert vars(back.lif).keys() == vars(model.lif).keys()


class Chain(nn.Module):
    """Has a name, for pickle."""

    def __init__(self, lif):
        super().__init__()
        self.branch, self.lif = OverTime(conv_bn()), lif

    def forward(self, x):
        return self.lif(self.branch(x) + x)


@pytest.mark.parametrize("form", ["y + x", "x + y", "y += x", "torch.add(x, y)", "x += y", "one step"])
@pytest.mark.parametrize("lif", [lambda: asgl_cuda.LIF(analog_prob=0.0), lambda: neuron.LIFNode(step_mode="m")])
def test_compiled(form, lif):
    torch._dynamo.reset()
    function, computed = FORMS[form]
    model = on(asgl_cuda.convert(block(function, lif()))[0], "cpu")
    fused, report = asgl_cuda.fuse(scattered(model))
    assert len(report.replaced) == 1
    seen = []

    def look(graph, example_inputs):
        seen.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(fused, backend=look, fullgraph=True)
    x_seq = 2 * torch.randn(SHAPE)
    twin = copy.deepcopy(fused)
    found, expected = (history(made, x_seq, lambda model, x: model(x)) for made in (compiled, twin))
    found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    torch.testing.assert_close(found, expected)
    assert all(("batch_norm " in names) == computed for names in seen), seen
    torch._dynamo.reset()


def test_exported():
    model = on(scattered(block(lif=asgl_cuda.LIF(analog_prob=0.0))), "cpu").eval()
    fused, _ = asgl_cuda.fuse(model)
    x_seq = torch.randn(SHAPE)
    exported = torch.export.export(fused, (x_seq,))
    assert torch.equal(exported.module()(x_seq), model(x_seq))


def test_checkpointed(backend):
    """In evaluation: in training, recomputation updates running statistics once more, unless it ends before."""
    model = on(scattered(block(lif=asgl_cuda.LIF(analog_prob=0.3))), backend)
    model.branch.eval()
    fused, _ = asgl_cuda.fuse(model)
    x_seq, found = torch.randn(SHAPE), []
    for made in (fused, model):
        torch.manual_seed(0)
        out = checkpoint(made, x_seq.requires_grad_(), use_reentrant=False)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x_seq, *made.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_step_by_step(backend):
    model = on(scattered(nn.Sequential(block(), block())), backend).eval()
    fused, report = asgl_cuda.fuse(model)
    assert len(report.replaced) == 2
    x_seq = torch.randn(SHAPE)
    stepped = torch.stack([asgl_cuda.step(fused, x_t) for x_t in x_seq])
    assert torch.equal(stepped, model(x_seq))
    asgl_cuda.reset(fused)
    with asgl_cuda.spiking_eval(model.train()), asgl_cuda.spiking_eval(fused.train()):
        assert torch.equal(fused(x_seq), model(x_seq))


def test_steps_with_a_residual_given_to_the_neurons():
    model = scattered(Stack(lambda net, x: net.lif(net.branch(x), x), branch=OverTime(conv_bn()), lif=asgl_cuda.LIF()))
    x_seq = torch.randn(SHAPE)
    stepped = torch.stack([asgl_cuda.step(model.eval(), x_t) for x_t in x_seq])
    asgl_cuda.reset(model)
    assert torch.equal(stepped, model(x_seq))


@pytest.mark.parametrize("given", ["the sum", "by position", "by keyword"])
def test_monitored(given, backend):
    """The call that Monitor repeats has the residual; the sum in place of two arguments is the expectation."""
    forms = {
        "the sum": lambda net, x: net.lif(net.branch(x) + x), "by position": lambda net, x: net.lif(net.branch(x), x),
        "by keyword": lambda net, x: net.lif(net.branch(x), residual=x),
    }  # fmt: skip
    torch.manual_seed(0)
    model = Stack(forms["the sum"], branch=OverTime(conv_bn()), lif=asgl_cuda.LIF(analog_prob=0.5, backend=backend))
    fused = asgl_cuda.fuse(scattered(model))[0] if given == "the sum" else copy.deepcopy(model)
    fused.function = forms[given]
    x_seq = torch.randn(SHAPE)
    found = [monitored(made, x_seq, "lif") for made in (model, fused)]
    assert found[1].pop("constant", None) == (0 if given == "the sum" else None)  # of the normalisation's channels
    assert found[1] == pytest.approx(found[0])
    assert found[0]["analog_share"] > 0
    assert 0 < found[0]["smoothing_error"] < 0.5
    assert fused.branch.layer[1].num_batches_tracked == 1


def test_spikes_recomputed(monkeypatch):
    """A shortcut of spikes is recomputed, too."""
    computed, original = [], recompute._Spikes._computed
    monkeypatch.setattr(recompute._Spikes, "_computed", lambda self: computed.append(self) or original(self))
    first = nn.Sequential(OverTime(nn.Conv2d(C, C, 1)), asgl_cuda.LIF())
    model = on(scattered(nn.Sequential(first, block(), block(), OverTime(nn.Conv2d(C, C, 1)))), "cpu")
    fused, report = asgl_cuda.fuse(model)
    assert len(report.replaced) == 2
    x_seq = torch.randn(SHAPE)
    expected = history(fused, x_seq, lambda model, x: model(x))
    with asgl_cuda.recompute_spikes():
        found = history(copy.deepcopy(asgl_cuda.fuse(model)[0]), x_seq, lambda model, x: model(x))
    assert len(computed) == 3 * 3
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_sync_batch_norm():
    model = scattered(block(lif=asgl_cuda.LIF(analog_prob=0.0)))
    fused, _ = asgl_cuda.fuse(model)
    x_seq = torch.randn(SHAPE)
    expected = model(x_seq)
    converted = asgl_cuda.convert_sync_batchnorm(fused)
    assert type(converted.branch.layer[1]).__name__ == "PassedSyncBatchNorm"
    assert torch.equal(converted(x_seq), expected)


def test_calibrate_refuses_sums():
    for form in ("fused", "given"):
        model = block() if form == "fused" else Stack(
            lambda net, x: net.lif(net.branch(x), x), branch=OverTime(conv_bn()), lif=asgl_cuda.LIF()
        )  # fmt: skip
        made = asgl_cuda.fuse(model)[0] if form == "fused" else model
        with pytest.raises(ValueError, match="its input must have one weight, got several paths"):
            asgl_cuda.calibrate(made, torch.randn(SHAPE))


def test_traced_by_fx():
    """The graph has calls of both layers and the addition."""
    for lif in (asgl_cuda.LIF(analog_prob=0.0), neuron.LIFNode(step_mode="m")):
        model = scattered(block(lif=lif)).eval()
        fused, _ = asgl_cuda.fuse(model)
        traced = torch.fx.symbolic_trace(fused)
        x_seq = 2 * torch.randn(SHAPE)
        found = traced(x_seq)
        reset(fused)
        assert torch.equal(found, fused(x_seq))
        assert "lif" in [node.target for node in traced.graph.find_nodes(op="call_module", target="lif")]


@pytest.mark.parametrize("lif", [asgl_cuda.LIF, lambda: neuron.LIFNode(step_mode="m")])
def test_to_nir(lif):
    """The graph of the unfused model."""
    pytest.importorskip("nir")
    first = nn.Sequential(OverTime(nn.Conv2d(C, C, 1)), lif())
    model = scattered(nn.Sequential(first, block(lif=lif()))).eval()
    fused, report = asgl_cuda.fuse(model)
    assert len(report.replaced) == 1
    x_seq = torch.randn(SHAPE)
    graph, expected = (asgl_cuda.to_nir(asgl_cuda.convert(made)[0], x_seq) for made in (fused, model))
    assert sorted(graph.edges) == sorted(expected.edges)
    for name, node in expected.nodes.items():
        for key in ("weight", "bias"):
            values = [getattr(each, key, ()) for each in (graph.nodes[name], node)]
            assert torch.equal(*map(torch.as_tensor, values))


class Around(nn.Module):
    """A branch called by a function, a shortcut, neurons."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.branch = asgl_cuda.OverTime(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)))
        self.lif = asgl_cuda.LIF(analog_prob=0.0)

    def forward(self, x_seq):
        return self.lif(self.call(self.branch, x_seq) + x_seq)


def without_gradients(branch, x_seq):
    with torch.no_grad():
        return branch(x_seq)


def checkpointed(branch, x_seq):
    return torch.utils.checkpoint.checkpoint(branch, x_seq, use_reentrant=True)


@pytest.mark.parametrize("call", [without_gradients, checkpointed])
def test_a_branch_without_gradients_is_an_error(call):
    """Otherwise the convolution would get none, or the normalisation some."""
    fused, _ = asgl_cuda.fuse(Around(call))
    x_seq = torch.rand(3, 2, 4, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"called without gradients.*asgl_cuda\.unfuse"):
        fused(x_seq)
    with torch.no_grad():
        fused(x_seq)


@pytest.mark.parametrize(
    "use",
    [
        lambda value, x: torch.cat([value, x]),
        lambda value, x: torch.add(x, other=value),
        lambda value, x: bool(value),
        lambda value, x: len(value),
        lambda value, x: value**2,
    ],
)
def test_other_uses_say_so(use):
    fused, _ = asgl_cuda.fuse(Around(lambda branch, x_seq: branch(x_seq)))
    x_seq = torch.rand(3, 2, 4, 5, 5)
    with pytest.raises(RuntimeError, match="used otherwise than when it was fused"):
        use(fused.branch(x_seq), x_seq)
