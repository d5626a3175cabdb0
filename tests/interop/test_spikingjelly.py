"""Neurons of SpikingJelly: spikes, potentials and gradients before and after conversion."""

import pytest
import torch
from conversions import WHOLE, in_sequences, train_alike
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import asgl_cuda


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


def test_a_simple_node_does_not_begin_anew_by_itself():
    converted, _ = asgl_cuda.convert(neuron.SimpleIFNode())
    converted(torch.rand(4, 5))
    with pytest.raises(ValueError, match=r"v_init must have shape \[3, 5\], got \[4, 5\]"):
        converted(torch.rand(3, 5))


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


@pytest.mark.parametrize("v_reset", [nn.Parameter(torch.zeros(())), torch.zeros(3)])
def test_a_reset_by_a_tensor(v_reset):
    node = neuron.LIFNode(step_mode="m")
    node.v_reset = v_reset
    (left,) = asgl_cuda.convert(node, inplace=True)[1].left
    assert left.reason == "its v_reset is a tensor"
