"""The pairs that `fuse` leaves, and its reasons."""

import norse.torch as norse
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from comparison import Stack
from conversions import B, C, T, assert_alike, history, on, reasons, scattered
from spikingjelly.activation_based import layer, neuron
from torch import nn

import asgl_cuda
from asgl_cuda.over_time import OverTime

pytestmark = pytest.mark.usefixtures("in_double")


def block():
    """Convolutions and a shortcut; the sum is the next shortcut, too."""

    def forward(net, x_seq):
        y = net.bn1(net.conv1(x_seq.flatten(0, 1)))
        s_seq = net.lif1(y.unflatten(0, x_seq.shape[:2]))
        sum_ = net.conv2(s_seq) + x_seq
        return net.lif2(sum_) + sum_

    return Stack(
        forward, conv1=nn.Conv2d(C, C, 3, padding=1), bn1=nn.BatchNorm2d(C), lif1=asgl_cuda.LIF(),
        conv2=OverTime(nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C))), lif2=asgl_cuda.LIF(),
    )  # fmt: skip


def test_a_residual_block(backend):
    model = scattered(block())
    fused, report = asgl_cuda.fuse(model)
    assert report.replaced == [("lif1", "LIF", "normalises as well, instead of bn1")]
    reason = "the sum of its output and another is used 2 times, by LIF and add: it is also the next shortcut"
    assert report.left == [("conv2.layer.1", "BatchNorm2d", reason)]
    x_seq = torch.randn(T, B, C, 4, 4)
    torch.testing.assert_close(history(on(fused, backend), x_seq), history(on(model, backend), x_seq))
    assert str(report).splitlines() == [
        "1 replaced, 1 left",
        "lif1           LIF          normalises as well, instead of bn1",
        f"conv2.layer.1  BatchNorm2d  left: {reason}",
    ]


def norm_and_lif(function, **parts):
    return Stack(function, bn=OverTime(nn.BatchNorm1d(C)), lif=asgl_cuda.LIF(), **parts)


def tapped(net, x):
    y = net.bn(x)
    return net.lif(y) + y


def sometimes_tapped(net, x):
    y = net.bn(x)
    return (net.lif(y), y) if net.training else net.lif(y)


LEFT = {
    "used twice": (tapped, "its output is used 2 times, by LIF and add"),
    "used twice in training": (sometimes_tapped, "its output is used 2 times, by LIF and the caller of Stack"),
    "returned": (lambda net, x: net.bn(net.lif(x)), "its output is that of the model"),
    "returned with another": (lambda net, x: (net.bn(x), net.lif(x)), "its output goes to the caller of Stack"),
    "something between": (lambda net, x: net.lif(net.bn(x).relu()), "its output goes to relu"),
    "a module between": (lambda net, x: net.lif(nn.functional.relu(net.bn(x))), "its output goes to relu"),
    "no call": (lambda net, x: net.lif(x), "its output is that of OverTime, which nothing calls"),
    "unused": (lambda net, x: (net.bn(x), net.lif(x))[1], "nothing uses it"),
    "another input": (
        lambda net, x: net.lif(net.bn(x)) + net.lif(x),
        "its output goes to LIF, which is called with something else, too",
    ),
    "twice in one call": (lambda net, x: (lambda y: net.lif(y, y))(net.bn(x)), "its output goes to LIF"),
    "parted by another shape": (
        lambda net, x: net.lif(net.bn(x).unflatten(0, x.shape[1:3])),
        "its output goes to unflatten",
    ),
    "by keyword": (lambda net, x: net.lif(x_seq=net.bn(x)), "its output goes to LIF"),
    "not traced": (
        lambda net, x: net.lif(net.bn(x)) if x.sum() > 0 else x,
        "the forward of Stack can't be traced: TraceError: symbolically traced variables cannot be used as inputs",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_by_the_trace(name):
    function, reason = LEFT[name]
    found = reasons(norm_and_lif(function))
    assert list(found) == ["bn.layer"]
    assert found["bn.layer"].startswith(reason)


def guarded(net, x):
    if x.ndim != 3:
        raise ValueError(f"expected [T, B, C], got {x.shape}")
    assert x.shape[-1] == C
    return net.lif(net.bn(x))


def by_shape(net, x):
    y = net.bn(x)
    return net.lif(y) if x.shape[0] > 1 else net.lif(y) + y


def by_many_shapes(net, x):
    while x.shape[0] > 1:
        x = x[1:]
    return net.lif(net.bn(x))


def failing(net, x):
    if x.dim() == 4:
        x = torch.stack([x[step] for step in range(x.shape[0])])
    return net.lif(net.bn(x))


def test_a_forward_that_looks_at_shapes(backend):
    """Every path is traced, except those that end in an error of the forward itself."""
    assert_alike(norm_and_lif(guarded), torch.randn(T, B, C), 1, backend)
    assert reasons(norm_and_lif(by_shape)) == {"bn.layer": "its output is used 2 times, by LIF and add"}
    assert "shapes lead it more than 32 ways" in reasons(norm_and_lif(by_many_shapes))["bn.layer"]
    assert "can't be traced: TypeError: 'Proxy' object cannot be" in reasons(norm_and_lif(failing))["bn.layer"]


def test_an_attention_of_spikingjelly(backend):
    attention = pytest.importorskip("spikingjelly.activation_based.layer.attention")
    model = attention.SpikingSelfAttention(8, 2)
    for module in model.modules():
        if isinstance(module, neuron.LIFNode):
            module.v_threshold = 0.2
    assert_alike(model, 3 * torch.randn(T, B, 8, 6), 2, backend, lambda model, x: model(x))


def test_left_by_an_argument_that_may_be_absent():
    """Both paths of the forward are traced, with the argument and without."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.lif = OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF()

        def forward(self, x, shortcut=None):
            y = self.bn(x)
            return self.lif(y) + (y if shortcut is None else shortcut)

    assert reasons(Net()) == {"bn.layer": "its output is used 2 times, by LIF and add"}


def test_left_by_a_forward_of_its_own():
    """torch.fx traces the forward of the class, not the instance."""
    model = norm_and_lif(lambda net, x: net.lif(net.bn(x)))
    model.forward = lambda x: model.bn(x)
    assert "the forward of Stack can't be traced: TypeError: it is not that of its class" in reasons(model)["bn.layer"]
    model = norm_and_lif(lambda net, x: net.lif(net.bn(x)))
    model.lif.forward = lambda x: x
    assert reasons(model) == {"bn.layer": "LIF has a forward that is not of its class"}


@pytest.mark.parametrize("parted", [nn.Unflatten(1, (C, 1)), nn.Unflatten(0, (T, B, 1))])
def test_left_by_unflattening_other_dimensions(parted):
    model = nn.Sequential(nn.BatchNorm1d(C), parted, asgl_cuda.LIF())
    assert reasons(model) == {"0": "its output goes to Unflatten"}
    sizes = (parted.dim, parted.unflattened_size)
    model = Stack(lambda net, x: net.lif(net.bn(x).unflatten(*sizes)), bn=nn.BatchNorm1d(C), lif=asgl_cuda.LIF())
    assert reasons(model) == {"bn": "its output goes to unflatten"}


def test_left_by_the_neurons():
    class Louder(asgl_cuda.LIF):
        def forward(self, x_seq):
            return 2 * super().forward(x_seq)

    class Slower(asgl_cuda.LIF):
        def _lif(self, x_seq, time_dim, **options):
            return super()._lif(x_seq / 2, time_dim, **options)

    def before(*neurons):
        return nn.Sequential(OverTime(nn.BatchNorm2d(C)), *neurons)

    assert reasons(before(nn.ReLU())) == {"0.layer": "its output goes to ReLU"}
    assert reasons(before(Louder())) == {"0.layer": "its output goes to Louder, which computes something else than "
                                                    "asgl_cuda.LIF"}  # fmt: skip
    assert "Slower, which computes something else" in reasons(before(Slower()))["0.layer"]
    own = asgl_cuda.BatchNormLIF(C)
    assert "BatchNormLIF, which has a normalisation of its own" in reasons(before(own))["0.layer"]
    unknown = neuron.QIFNode(step_mode="m")
    assert reasons(before(unknown)) == {"0.layer": "its output goes to QIFNode: asgl_cuda has no such neuron"}
    many = sinabs.layers.LIF(2.0, spike_fn=sinabs.activation.MaxSpike(300))
    assert "its output goes to LIF: it has at most 300 spikes a step" in reasons(before(many))["0.layer"]
    assert type(many) is sinabs.layers.LIF
    for integrates in (sinabs.layers.LIF(2.0, tau_syn=3.0), sinabs.layers.ExpLeak(2.0)):
        name = type(integrates).__name__
        model = nn.Sequential(nn.BatchNorm2d(C), sinabs.layers.UnflattenTime(2), integrates)
        assert reasons(model) == {"0": f"its output goes to {name}, whose input no neuron takes as it is"}
        assert type(asgl_cuda.fuse(model)[0][2]) is type(integrates)


@pytest.mark.parametrize(
    "make", [norse.LIFCell, norse.LI, lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True)]
)
def test_left_by_neurons_that_filter_their_input(make):
    made = make()
    model = norse.SequentialState if isinstance(made, norse.LI | norse.LIFCell) else nn.Sequential
    fused, report = asgl_cuda.fuse(model(nn.BatchNorm1d(3), made))
    name = type(made).__name__
    assert [row.reason for row in report.left] == [f"its output goes to {name}, whose input no neuron takes as it is"]
    assert type(fused[1]) is type(made)


def test_left_by_the_channels():
    """A layer that fusion would have converted stays unchanged."""
    cases = {
        nn.Sequential(nn.BatchNorm2d(C), asgl_cuda.LIF()): ("1", "2"),
        nn.Sequential(nn.BatchNorm1d(C), asgl_cuda.LIF(time_dim=1)): ("1", "2"),
        nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(time_dim=-1)): ("2", "1"),
        nn.Sequential(layer.BatchNorm2d(C, step_mode="m"), neuron.LIFNode(step_mode="s")): ("2", "1"),
        nn.Sequential(layer.BatchNorm2d(C, step_mode="s"), neuron.LIFNode(step_mode="m")): ("1", "2"),
        nn.Sequential(OverTime(nn.BatchNorm2d(C)), snntorch.Leaky(beta=0.5, init_hidden=True)): ("2", "1"),
        nn.Sequential(OverTime(OverTime(nn.BatchNorm2d(C))), asgl_cuda.LIF()): ("3", "2"),
    }
    for model, (own, theirs) in cases.items():
        (reason,) = reasons(model).values()
        assert reason.startswith(f"its channels are dimension {own} of what goes to "), reason
        assert reason.endswith(f"whose channels are {theirs}"), reason
        fused, _ = asgl_cuda.fuse(model)
        assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]


def test_left_by_an_input_gain_of_each_neuron():
    p = norse.LIFBoxParameters(tau_mem_inv=torch.full((C, 2, 2), 400.0))
    model = norse.SequentialState(nn.BatchNorm2d(C), norse.LIFBoxCell(p))
    assert reasons(model) == {"0": "its output goes to LIFBoxCell, whose input gain or bias has shape [3, 2, 2]"}


def test_an_input_gain_not_by_channel_is_an_error_of_the_call():
    """A gain [3] is by channel for an input [B, C] and by position for [B, C, L]."""
    p = norse.LIFBoxParameters(tau_mem_inv=torch.full((C,), 400.0))
    fused, report = asgl_cuda.fuse(norse.SequentialState(nn.BatchNorm1d(C), norse.LIFBoxCell(p)))
    assert not report.left
    with pytest.raises(ValueError, match=r"LIFBoxCell has an input gain or bias of shape \[3\], .* for \[1, 4, 3, 3\]"):
        on(fused, "reference")(torch.randn(B, C, C))


def test_left_by_the_normalisation():
    class Doubled(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    def behind(norm):
        return nn.Sequential(OverTime(norm), asgl_cuda.LIF())

    assert reasons(behind(Doubled(C))) == {"0.layer": "Doubled computes something else than torch.nn's"}
    _, report = asgl_cuda.fuse(behind(nn.LazyBatchNorm1d()), inplace=True)  # torch can't copy it
    assert "before it was called" in report.left[0].reason
    jelly = nn.Sequential(layer.TemporalEffectiveBatchNorm1d(T, C), asgl_cuda.LIF())
    assert "TemporalEffectiveBatchNorm1d computes something else" in reasons(jelly)["0"]
    listed = Stack(lambda net, x: net.lif(x), parts=nn.ModuleList([nn.BatchNorm1d(C)]), lif=asgl_cuda.LIF())
    assert reasons(listed) == {"parts.0": "Stack does not call it"}
    through = Stack(lambda net, x: x, lif=asgl_cuda.LIF())
    model = nn.Sequential(OverTime(nn.BatchNorm1d(C)), through, asgl_cuda.LIF())
    assert reasons(model) == {"0.layer": "its output goes to Stack"}
    replaced = nn.BatchNorm1d(C)
    replaced.forward = lambda x: x
    assert reasons(behind(replaced)) == {"0.layer": "it has a forward that is not of its class"}
    shared = nn.BatchNorm1d(C)
    model = nn.Sequential(OverTime(shared), asgl_cuda.LIF(), OverTime(shared), asgl_cuda.LIF())
    assert reasons(model) == {"0.layer": "it is in the model 2 times"}
    assert reasons(nn.BatchNorm1d(C)) == {"": "it is the model itself"}


def test_left_by_hooks():
    def pair():
        return nn.Sequential(OverTime(nn.BatchNorm1d(C)), nn.Sequential(asgl_cuda.LIF()))

    def nothing(*_):
        return None

    for path in ("0.layer", "0"):
        for kind in ("forward_hook", "full_backward_hook", "full_backward_pre_hook"):
            model = pair()
            getattr(model.get_submodule(path), f"register_{kind}")(nothing)
            assert "has hooks, which would see" in reasons(model)["0.layer"], (path, kind)
    for path in ("1", "1.0"):
        model = pair()
        model.get_submodule(path).register_forward_pre_hook(nothing)
        assert "has hooks, which would see" in reasons(model)["0.layer"]
    model = pair()
    model[0].layer.register_forward_pre_hook(nothing)
    model[1][0].register_forward_hook(nothing)
    assert reasons(model) == {}


def test_left_by_shared_neurons():
    lif = asgl_cuda.LIF()
    model = nn.Sequential(OverTime(nn.BatchNorm1d(C)), lif, OverTime(nn.BatchNorm1d(C)), lif)
    assert set(reasons(model).values()) == {"its output goes to LIF, which is called with something else, too"}
    model = norm_and_lif(lambda net, x: net.lif(net.bn(x)))
    model.again = model.lif
    assert reasons(model) == {"bn.layer": "LIF is in the model 2 times"}


def test_a_head_that_is_called_twice():
    """One call of the neurons, in a Sequential that is called twice."""
    head = nn.Sequential(asgl_cuda.LIF(), nn.Linear(C, C))
    model = norm_and_lif(lambda net, x: net.head(net.bn(x)) + net.head(x), head=head)
    assert reasons(model) == {"bn.layer": "its output goes to Sequential, which is called with something else, too"}
    model = norm_and_lif(lambda net, x: net.head(net.bn(x)), head=head)
    assert reasons(model) == {}


def test_neurons_in_an_untraceable_module():
    """Untraced code may call the neurons with another input."""
    inner = Stack(lambda net, x: net.lif(x) if x.sum() > 0 else x, lif=asgl_cuda.LIF())
    model = Stack(lambda net, x: net.inner.lif(net.bn(x)), bn=OverTime(nn.BatchNorm1d(C)), inner=inner)
    (reason,) = reasons(model).values()
    assert reason.startswith("the forward of Stack can't be traced: TraceError")


def test_a_block_that_is_called_twice(backend):
    """The pair inside is fused."""
    model = Stack(
        lambda net, x: net.part(net.part(x)), part=nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF())
    )
    assert_alike(model, torch.randn(T, B, C), 1, backend)


def test_a_sequential_whose_parts_others_call():
    """Layers are called from a list or a slice: the calls in a trace count, not the order."""

    def features():
        return nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(), OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF())

    def loop(net, x):
        for part in net.features:
            x = part(x)
        return x

    def tapped_loop(net, x):
        taps = []
        for part in net.features:
            x = part(x)
            taps.append(x)
        return x + taps[2]

    def sliced(net, x):
        y = net.features[:3](x)
        return net.features[3](y) + y

    assert reasons(Stack(loop, features=features())) == {}
    model = Stack(lambda net, x: net.lif(loop(net, x)), features=features()[:3], lif=asgl_cuda.LIF())
    assert reasons(model) == {}
    assert list(reasons(Stack(tapped_loop, features=features()))) == ["features.2.layer"]
    assert list(reasons(Stack(sliced, features=features()))) == ["features.2.layer"]


def test_a_sequential_in_an_untraceable_module():
    """The order inside is known, unlike the layer that follows."""
    inner = nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(), OverTime(nn.BatchNorm1d(C)))
    model = Stack(lambda net, x: net.lif(net.inner(x)) if x.sum() > 0 else x, inner=inner, lif=asgl_cuda.LIF())
    _, report = asgl_cuda.fuse(model)
    assert [row.path for row in report.replaced] == ["inner.1"]
    assert [row.path for row in report.left] == ["inner.2.layer"]
    assert "the forward of Stack can't be traced" in report.left[0].reason


def test_a_trace_leaves_no_trace():
    """The forward is run with proxies for tensors, without side effects on the model."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.leaky = nn.BatchNorm1d(C), snntorch.Leaky(beta=0.5, init_hidden=True)
            self.register_buffer("calls", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.last = self.leaky(self.bn(x))
            self.seen.append(self.last)
            self.leaky.reset_mem()
            return self.last

    model = Counting()
    model.leaky.mem = torch.ones(2)
    fused, report = asgl_cuda.fuse(model, inplace=True)
    assert len(report.replaced) == 1
    assert (fused.calls.item(), fused.seen, hasattr(fused, "last")) == (0, [], False)
    assert fused.leaky.mem.tolist() == [1, 1]
    assert fused.training


def test_a_trace_copies_no_parameters(monkeypatch):
    model = norm_and_lif(lambda net, x: net.lif(net.bn(x)))
    copies = []
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda parameter, memo: copies.append(parameter) or parameter)
    assert len(asgl_cuda.fuse(model, inplace=True)[1].replaced) == 1
    assert not copies
