"""`convert(layers=...)`: neurons of a user's own classes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda import LIF

# ---- neurons as code for publications writes them, in our words ----


class Spike(torch.autograd.Function):
    """A spike at u >= 0 with the slope of a triangle."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


class MemUpdate(nn.Module):
    """`mem = mem * decay * (1 - spike) + x`, without a gradient through the reset."""

    def forward(self, x_seq):
        mem, spike, out = 0.0, torch.zeros_like(x_seq[0]), []
        for x in x_seq:
            mem = mem * 0.25 * (1 - spike.detach()) + x
            spike = Spike.apply(mem - 0.5)
            out.append(spike)
        return torch.stack(out)


class SigmoidLIF(nn.Module):
    """A learned decay, `sigmoid(w)`, and a reset by subtraction."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x_seq):
        v, out = 0.0, []
        for x in x_seq:
            v = v * self.w.sigmoid() + x
            spike = Spike.apply(v - 1)
            v = v - spike
            out.append(spike)
        return torch.stack(out)


# ---- and ours ----


TRIANGLE = {"surrogate": "triangle", "width": 1.0, "learn_width": False, "analog_prob": 0.0}


def mem_update(module):
    return LIF(decay=0.25, v_threshold=0.5, v_reset=0.0, detach_reset=True, **TRIANGLE)


def sigmoid_lif(module):
    layer = LIF(v_reset=None, learn_decay=True, detach_reset=False, **TRIANGLE)

    def rename(layer, state_dict, prefix, *others):
        if prefix + "w" in state_dict:
            state_dict[prefix + "logit_decay"] = state_dict.pop(prefix + "w").reshape(1)

    layer.register_load_state_dict_pre_hook(rename)
    return layer


LAYERS = {MemUpdate: mem_update, SigmoidLIF: sigmoid_lif}
pytestmark = pytest.mark.usefixtures("in_double")


def results(model, x_seq):
    leaf = x_seq.clone().requires_grad_()
    out = model(leaf)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    return out.detach(), torch.autograd.grad((out * weights).sum(), [leaf, *model.parameters()])


@pytest.mark.parametrize("make", LAYERS)
def test_published_forms(make):
    model = nn.Sequential(nn.Flatten(0, 0), make())
    fast, report = asgl_cuda.convert(model, layers=LAYERS)
    assert [(row.path, row.layer) for row in report.replaced] == [("1", type(model[1]).__name__)]
    x_seq = 2 * torch.rand(7, 3, 5)
    for training in (True, False):
        theirs, ours = (results(each.train(training), x_seq) for each in (model, fast))
        assert 0.05 < theirs[0].mean() < 0.95
        assert torch.equal(ours[0], theirs[0])
        for our, their in zip(ours[1], theirs[1], strict=True):
            assert their.any()
            torch.testing.assert_close(our.reshape(their.shape), their, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(0.5)
    fast.load_state_dict(model.state_dict())  # a checkpoint of the original
    assert torch.equal(fast(x_seq), model(x_seq))


class Net(nn.Module):
    """One module under three names, another in a ModuleList."""

    def __init__(self):
        super().__init__()
        self.lif = MemUpdate()
        self.stem = nn.Sequential(nn.Linear(5, 5), self.lif)
        self.blocks = nn.ModuleList([self.lif, SigmoidLIF()])

    def forward(self, x_seq):
        x_seq = self.lif(self.stem(4 * x_seq)) + x_seq
        for block in self.blocks:
            x_seq = block(x_seq)
        return x_seq


@pytest.mark.parametrize("inplace", [False, True])
def test_places(inplace):
    net, x_seq = Net().eval(), 2 * torch.rand(6, 3, 5)
    expected, keys, lif = net(x_seq), list(net.state_dict()), net.lif
    fast, report = asgl_cuda.convert(net, layers=LAYERS, inplace=inplace)
    assert report.replaced == [("lif", "MemUpdate", "LIF"), ("blocks.1", "SigmoidLIF", "LIF")]
    assert (fast is net) == inplace
    assert isinstance(fast.lif, LIF)
    assert fast.lif is fast.stem[1] is fast.blocks[0]
    assert not any(module.training for module in fast.modules())
    for each in (fast, copy.deepcopy(fast)):
        assert torch.equal(each(x_seq), expected)
    with torch.no_grad():
        fast.stem[0].weight.mul_(0.5)
        fast.blocks[1].logit_decay.add_(1)
    back, report = asgl_cuda.revert(fast, inplace=inplace)
    assert [row.by for row in report.replaced] == ["MemUpdate", "SigmoidLIF"]
    assert report.left == [("blocks.1", "SigmoidLIF", "its logit_decay: SigmoidLIF has no such parameter")]
    assert list(back.state_dict()) == keys
    assert type(back.lif) is MemUpdate
    assert back.lif is back.stem[1] is back.blocks[0]
    assert (back.lif is lif) == inplace
    assert torch.equal(back.stem[0].weight, fast.stem[0].weight)


def test_values_of_the_same_names_come_back():
    model = nn.Sequential(nn.BatchNorm2d(3))
    fast, report = asgl_cuda.convert(model, layers={nn.BatchNorm2d: lambda norm: nn.InstanceNorm2d(3, affine=True)})
    assert report.replaced[0].by == "InstanceNorm2d, which has no running_mean, running_var, num_batches_tracked"
    with torch.no_grad():
        fast[0].weight.fill_(3.0)
    back, report = asgl_cuda.revert(pickle.loads(pickle.dumps(fast)))
    assert (back[0].weight == 3).all()
    assert not report.left


def test_values_of_other_shapes_do_not_come_back():
    """Which torch would broadcast, one value to all; the report has them."""

    def one_for_all(module):
        layer = nn.PReLU(1)

        def mean(layer, state_dict, prefix, *others):
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].mean().reshape(1)

        layer.register_load_state_dict_pre_hook(mean)
        return layer

    model = nn.Sequential(nn.PReLU(8))
    expected = nn.init.uniform_(model[0].weight).detach().clone()
    back, report = asgl_cuda.revert(asgl_cuda.convert(model, layers={nn.PReLU: one_for_all})[0])
    assert torch.equal(back[0].weight, expected)
    assert report.left == [("0", "PReLU", "its weight: PReLU has no such parameter")]


def test_what_is_left():
    """Subclasses, and modules for which the function returns None."""
    model = nn.Sequential(MemUpdate(), type("Mine", (MemUpdate,), {})(), SigmoidLIF())
    fast, report = asgl_cuda.convert(model, layers={**LAYERS, SigmoidLIF: lambda module: None})
    assert [type(module).__name__ for module in fast] == ["LIF", "Mine", "SigmoidLIF"]
    assert report.left == [("2", "SigmoidLIF", "layers[SigmoidLIF] returned None")]
    assert report.notes == []
    outer = {nn.Sequential: lambda module: nn.Identity(), **LAYERS}
    _, report = asgl_cuda.convert(nn.ModuleList([model]), layers=outer)
    assert [row.path for row in report.replaced] == ["0"]
    inside = "; 0.{} is inside of a module of another class in layers"
    unused = (("MemUpdate", 0), ("SigmoidLIF", 2))
    assert report.notes == [f"layers[{name}] was applied to no module{inside.format(path)}" for name, path in unused]


def failing(module):
    raise KeyError("tau")


ONE = LIF()
ERRORS = {
    "no mapping": ([MemUpdate], TypeError, r"layers must map classes to functions, such as \{TheirLIF: make\}, got "),
    "no class": ({"MemUpdate": mem_update}, TypeError, "keys of layers must be subclasses of .*, got 'MemUpdate'"),
    "a number": ({MemUpdate: 3}, TypeError, r"layers\[MemUpdate\] must be a function that takes a module, got 3"),
    "a layer": ({MemUpdate: LIF()}, TypeError, r"layers\[MemUpdate\] must be a function that takes a module, got LIF"),
    "another result": ({MemUpdate: lambda module: 3}, TypeError, r"for 0 \(MemUpdate\) must return another .* got 3"),
    "the same": ({MemUpdate: lambda module: module}, TypeError, "got the module itself"),
    "one again": ({MemUpdate: lambda module: ONE}, ValueError, "must return a new layer for each module, got for '1'"),
    "raises": ({MemUpdate: failing}, RuntimeError, r"layers for 0 \(MemUpdate\) raised KeyError: 'tau'"),
    "other sizes": (
        {nn.Linear: lambda module: nn.Linear(3, 3)}, RuntimeError, r"for 2 \(Linear\) returned a Linear into which",
    ),
    "the model": ({nn.Sequential: mem_update}, ValueError, "inside of model, got a Sequential as model"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    layers, error, message = ERRORS[name]
    model = nn.Sequential(MemUpdate(), MemUpdate(), nn.Linear(2, 2))
    with pytest.raises(error, match=rf"asgl_cuda\.convert: .*{message}"):
        asgl_cuda.convert(model, layers=layers, inplace=True)
    assert type(model[0]) is MemUpdate


def test_hooks_that_no_longer_fire():
    model = nn.Sequential(MemUpdate())
    model[0].register_forward_hook(lambda *given: None)
    _, report = asgl_cuda.convert(model, layers=LAYERS)
    hooks = "0: hooks of the module that it replaces are no longer called"
    assert report.notes == [hooks, "layers[SigmoidLIF] was applied to no module"]


def test_classes_that_no_module_has():
    """Another class of the same name, as a notebook's cell makes when it runs again; or only a subclass."""
    again = type("MemUpdate", (nn.Module,), {})
    _, report = asgl_cuda.convert(nn.Sequential(again(), type("Mine", (SigmoidLIF,), {})()), layers=LAYERS)
    assert report.notes[1:] == [
        "layers[MemUpdate] was applied to no module; 0 has another class of this name",
        "layers[SigmoidLIF] was applied to no module; 1 is a Mine, a subclass, and classes must match exactly",
    ]
