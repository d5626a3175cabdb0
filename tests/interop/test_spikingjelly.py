"""Neurons of SpikingJelly: spikes, potentials and gradients before and after conversion."""

import copy
import pickle

import pytest
import torch
from conversions import SHAPE, WHOLE, assert_same, check, in_sequences, train_alike
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import asgl_cuda


def run(node, x_seq):
    """Spikes, potentials after reset (plus the current, if any) and, by the node's equation, before reset."""
    before = torch.as_tensor(node.v).expand(x_seq.shape[1:])
    if node.step_mode == "m":
        s, v, c = node(x_seq), node.v_seq, 0.0
    else:
        rows = [(node(x), node.v, getattr(node, "c", torch.zeros(()))) for x in x_seq]
        s, v, c = map(torch.stack, zip(*rows, strict=True))
    previous = torch.cat([before[None], v[:-1]])
    if hasattr(node, "c"):
        return s, v + c, (node.v_decay * previous + c).detach()
    share = node.w.sigmoid() if hasattr(node, "w") else 1 / node.tau if hasattr(node, "tau") else 0.0
    gain = share if getattr(node, "decay_input", False) else 1.0
    return s, v, (previous - (previous - (node.v_reset or 0.0)) * share + gain * x_seq).detach()


MULTI = {"step_mode": "m", "store_v_seq": True}
NODES = {
    "IF": lambda **options: neuron.IFNode(**MULTI, **options),
    "LIF": lambda **options: neuron.LIFNode(tau=2.5, decay_input=False, **MULTI, **options),
    "LIF decay_input": lambda **options: neuron.LIFNode(tau=1.6, decay_input=True, **MULTI, **options),
    "PLIF": lambda **options: neuron.ParametricLIFNode(init_tau=2.5, decay_input=False, **MULTI, **options),
    "PLIF decay_input": lambda **options: neuron.ParametricLIFNode(init_tau=1.6, decay_input=True, **MULTI, **options),
    "LIF, a step a call": lambda **options: neuron.LIFNode(decay_input=False, step_mode="s", **options),
    "simple IF": lambda **options: neuron.SimpleIFNode(**options),
    "simple LIF": lambda **options: neuron.SimpleLIFNode(1.6, False, **options),
    "simple LIF decay_input": lambda **options: neuron.SimpleLIFNode(1.6, True, **options),
    "CUBA": lambda detach_reset, **options: neuron.CUBALIFNode(**options),
}


@pytest.mark.parametrize(("v_threshold", "v_reset"), [(1.0, 0.0), (0.7, -0.3), (0.8, None)])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("name", NODES)
def test_nodes(name, detach_reset, v_threshold, v_reset):
    if ("simple LIF" in name and v_reset is None) or (name == "CUBA" and detach_reset):
        pytest.skip("no such node in SpikingJelly")
    if name == "CUBA":
        v_threshold = 0.5
    options = {"v_threshold": v_threshold, "v_reset": v_reset, "detach_reset": detach_reset}
    check(lambda: NODES[name](**options), run, threshold=v_threshold)


SURROGATES = (
    surrogate.Sigmoid(4.0), surrogate.ATan(2.0), surrogate.PiecewiseQuadratic(1.5), surrogate.SoftSign(2.0),
    surrogate.SuperSpike(1.5), surrogate.Erf(2.0), surrogate.Rect(1.3), surrogate.Sigmoid(0.5),
)  # fmt: skip


@pytest.mark.parametrize("function", SURROGATES, ids=lambda function: f"{type(function).__name__} {function.alpha}")
def test_surrogates(function):
    check(lambda: neuron.LIFNode(surrogate_function=function, **MULTI), run)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("kind", ["LIFNode", "ParametricLIFNode", "CUBALIFNode", "IFNode"])
def test_the_method_that_is_called_decides_between_a_step_and_a_sequence(kind, step_mode):
    torch.manual_seed(0)
    node = in_sequences(getattr(neuron, kind)())
    node.step_mode = step_mode
    converted, report = asgl_cuda.convert(node)
    assert len(report.replaced) == 1
    x_seq = 3 * torch.rand(WHOLE)
    theirs, ours = node.multi_step_forward(x_seq), converted.multi_step_forward(x_seq)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(converted.v_seq, node.v_seq)
    torch.testing.assert_close(converted.v, node.v)
    node.reset(), converted.reset()
    for x in x_seq:
        theirs, ours = node.single_step_forward(x), converted.single_step_forward(x)
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(converted.v_seq, node.v_seq)
    if kind == "CUBALIFNode":
        torch.testing.assert_close(converted.c, node.c)


def test_state():
    """reset_net, detach_net and set_step_mode reach the converted layer; another batch size begins anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), neuron.LIFNode(step_mode="m"))
    converted, _ = asgl_cuda.convert(net)
    x = torch.randn(5, 3, 4)
    first, v = converted(x), converted[1].v
    converted(x)
    assert not torch.equal(converted[1].v, v)
    net(x), net(x)
    torch.testing.assert_close(converted[1].v, net[1].v)
    functional.detach_net(converted)
    assert not converted[1].v.requires_grad
    functional.reset_net(converted)
    assert torch.equal(converted(x), first)
    assert torch.equal(converted(x[:, :2]), net(x[:, :2]))
    functional.set_step_mode(converted, "s")
    functional.reset_net(converted)
    assert torch.equal(torch.stack([converted(each) for each in x]), first)


def test_half_types():
    torch.manual_seed(0)
    node = neuron.LIFNode(step_mode="m")
    converted, _ = asgl_cuda.convert(node)
    x_seq = torch.randn(6, 4, 5).bfloat16()
    for _ in range(2):
        assert converted(x_seq).dtype == torch.bfloat16
        assert (converted(x_seq) != node(x_seq)).float().mean() < 0.1
        functional.reset_net(node), functional.reset_net(converted)


def test_a_simple_node_does_not_begin_anew_by_itself():
    converted, _ = asgl_cuda.convert(neuron.SimpleIFNode())
    converted(torch.rand(4, 5))
    with pytest.raises(ValueError, match=r"v_init must have shape \[3, 5\], got \[4, 5\]"):
        converted(torch.rand(3, 5))


@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
def test_sequences_of_a_node_with_a_current(v_reset):
    node = in_sequences(neuron.CUBALIFNode(v_reset=v_reset))
    converted, _ = asgl_cuda.convert(node)
    x_seq = torch.randn(SHAPE)
    for part in (x_seq, x_seq, x_seq[:, :2]):  # with another batch size both states begin anew
        torch.testing.assert_close([converted(part), converted.v_seq, converted.c], [node(part), node.v_seq, node.c])
    functional.reset_net(converted)
    assert converted.c == 0.0


def read_out(node, x_seq):
    out = node(x_seq)
    return [*out, node.v] if isinstance(out, list) else [out, node.v]


@pytest.mark.parametrize("decode", [None, "max-mem", "max-abs-mem", "mean-mem", "last_mem"])
@pytest.mark.parametrize("asgl", [None, {}])
@pytest.mark.parametrize("kind", ["NonSpikingIFNode", "NonSpikingLIFNode"])
def test_read_outs(kind, asgl, decode):
    converted = assert_same(lambda: getattr(neuron, kind)(decode=decode), read_out, torch.randn(SHAPE), {"asgl": asgl})
    twin = pickle.loads(pickle.dumps(asgl_cuda.convert(getattr(neuron, kind)())[0]))
    assert type(copy.deepcopy(twin)) is type(converted)


NETS = {
    "normalised": lambda: [
        layer.Conv2d(1, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode(),
        layer.AvgPool2d(2), layer.Conv2d(4, 6, 3, padding=1), layer.BatchNorm2d(6), neuron.ParametricLIFNode(),
        layer.Flatten(), layer.Linear(6 * 16, 3), neuron.IFNode(v_threshold=0.2, surrogate_function=surrogate.ATan()),
    ],
    "with a current and a read-out": lambda: [
        layer.Conv2d(1, 4, 3, padding=1), neuron.CUBALIFNode(), layer.AvgPool2d(2),
        layer.Conv2d(4, 6, 3, padding=1), neuron.SimpleLIFNode(2.0, False), layer.Flatten(),
        layer.Linear(6 * 16, 3), neuron.NonSpikingLIFNode(decode="mean-mem"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_convolutional_nets_train_alike(name):
    torch.manual_seed(0)
    model = nn.Sequential(*NETS[name]())
    functional.set_step_mode(model, "m")
    x_seq = (4 if name == "normalised" else 2) * torch.rand(5, 6, 1, 8, 8)
    train_alike(model, lambda net: net(x_seq).mean(0) if name == "normalised" else 10 * net(x_seq), 3)


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("threshold", [1.0, 0.75])
@pytest.mark.parametrize(("tau", "levels"), [(4 / 3, 4), (2.0, 1), (10.0, 6)])
def test_integer_spikes(mode, detach, threshold, tau, levels):
    count = surrogate.MultiLevelSpikeCount(levels)
    original = nn.Sequential(neuron.ILIFNode(tau, threshold, count, detach, mode, store_v_seq=mode == "m"))
    fast, report = asgl_cuda.convert(original)
    assert [each.by for each in report.replaced] == [f"{levels} levels"]
    x_seq = (2 * threshold * torch.randn(7, 5, 9, dtype=torch.float64)).requires_grad_()
    results = []
    for model in (original, fast):
        functional.reset_net(model)
        calls = [model(x_seq) if mode == "m" else torch.stack([model(x) for x in x_seq]) for _ in range(2)]
        out = torch.cat(calls)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (of_x,) = torch.autograd.grad((out * grad).sum() + model[0].v.sum(), x_seq)
        results.append((out, of_x, model[0].v, *([model[0].v_seq] if mode == "m" else [])))
    (spikes, *others), (found, *found_others) = results
    assert torch.equal(found, spikes)
    for a, b in zip(found_others, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (lambda: surrogate.MultiLevelSpikeCount(4, grad_window=(0.0, 2.0)), "its gradient's window is [0.0, 2.0], not"),
        (lambda: surrogate.MultiLevelSpikeCount(300), "it counts up to 300 spikes, more than 256"),
    ],
)
def test_integer_spikes_that_are_left(count, reason):
    _, report = asgl_cuda.convert(nn.Sequential(neuron.ILIFNode(surrogate_function=count())))
    (left,) = report.left
    assert reason in left.reason


def test_levels_that_change_after_conversion():
    fast, _ = asgl_cuda.convert(nn.Sequential(neuron.ILIFNode(step_mode="m")))
    x_seq = 9 * torch.rand(2, 3)
    assert fast(x_seq).max() == 4
    functional.reset_net(fast)
    fast[0].surrogate_function = surrogate.MultiLevelSpikeCount(6)
    assert fast(x_seq).max() == 6
    fast[0].surrogate_function = surrogate.MultiLevelSpikeCount(6, grad_window=(0.0, 2.0))
    with pytest.raises(RuntimeError, match="was changed after its conversion: its gradient's window"):
        fast(x_seq)


@pytest.mark.parametrize("v_reset", [nn.Parameter(torch.zeros(())), torch.zeros(3)])
def test_a_reset_by_a_tensor(v_reset):
    node = neuron.LIFNode(step_mode="m")
    node.v_reset = v_reset
    (left,) = asgl_cuda.convert(node, inplace=True)[1].left
    assert left.reason == "its v_reset is a tensor"


def test_integer_spikes_ignore_a_decaying_input():
    """As SpikingJelly does."""
    node = neuron.ILIFNode(step_mode="m")
    node.decay_input = True
    fast, _ = asgl_cuda.convert(nn.Sequential(node))
    x_seq = torch.full((3, 1), 2.0)
    assert torch.equal(fast(x_seq), node(x_seq))
