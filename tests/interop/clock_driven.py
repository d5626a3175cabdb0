"""Neurons of SpikingJelly's `clock_driven` and their conversions; test_clock_driven.py runs this file."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from spikingjelly.clock_driven import functional, layer, neuron, surrogate
from torch import nn

import asgl_cuda

T, B, N = 6, 3, 5


def results(node, x_seqs):
    """Outputs, potentials and their gradients over calls of a node that keeps its state, as a whole or in steps."""
    leaves, found = [x_seq.clone().requires_grad_() for x_seq in x_seqs], []
    for leaf in leaves:
        if any("MultiStep" in kind.__name__ for kind in type(node).__mro__):
            found += [node(leaf), node.v_seq]
            assert node.v.shape == leaf.shape[1:]
        else:
            rows = [(node(x), node.v) for x in leaf]
            found += [torch.stack(values) for values in zip(*rows, strict=True)]
    weights = torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=weights)).sum() for value in found)
    return found, torch.autograd.grad(loss, [*leaves, *node.parameters()])


def assert_equal(node, training=True):
    converted, report = asgl_cuda.convert(node)
    assert [row.layer for row in report.replaced] == [type(node).__name__], report
    assert isinstance(converted, type(node))
    torch.manual_seed(0)
    x_seqs = [2 * torch.randn(T, B, N) for _ in range(2)]
    (theirs, their_grads), (ours, our_grads) = (results(each.train(training), x_seqs) for each in (node, converted))
    assert 0.05 < theirs[0].mean() < 0.95
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    for our, their in zip(our_grads, their_grads, strict=True):
        assert (our - their).abs().max() <= 1e-12 * their.abs().max()
    functional.reset_net(converted), functional.reset_net(node)
    assert converted.v == node.v


@pytest.fixture(autouse=True)
def in_double():
    torch.set_default_dtype(torch.float64)


KINDS = [
    getattr(neuron, multi + kind)
    for multi, kind in itertools.product(("MultiStep", ""), ("IFNode", "LIFNode", "ParametricLIFNode"))
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("v_reset", "detach_reset", "decay_input"), [(0.0, False, True), (-0.3, True, False), (None, False, False)]
)
def test_nodes(kind, v_reset, detach_reset, decay_input):
    options = {"v_reset": v_reset, "detach_reset": detach_reset, "v_threshold": 0.7 if v_reset else 1.0}
    if "decay_input" in inspect.signature(kind).parameters:  # since 0.0.0.0.10
        options["decay_input"] = decay_input
    assert_equal(kind(**options), training=decay_input)


def by_lava(node):
    node.backend = "lava"
    return node


LEFT = {
    "MultiStepEIFNode": (neuron.MultiStepEIFNode, "asgl_cuda has no such neuron"),
    "smooth": (
        lambda: neuron.MultiStepLIFNode(surrogate_function=surrogate.ATan(spiking=False)),
        "its surrogate function does not spike (spiking=False)",
    ),
    "lava": (lambda: by_lava(neuron.MultiStepLIFNode()), 'it is computed by Lava (backend="lava")'),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left(name):
    made, reason = LEFT[name][0](), LEFT[name][1]
    _, report = asgl_cuda.convert(nn.Sequential(made))
    assert (report.replaced, report.left[0]) == ([], ("0", type(made).__name__, reason))


def test_notes():
    _, report = asgl_cuda.convert(nn.Sequential(layer.MultiStepDropout(), layer.SeqToANNContainer(nn.Linear(2, 2))))
    assert report == ([], [])
    assert report.notes[0].endswith(": spikingjelly")
    _, report = asgl_cuda.convert(nn.Sequential(neuron.MultiStepLIFNode(), neuron.LIFNode(), neuron.MultiStepIFNode()))
    assert report.notes == [
        "1: one step per call gains little; MultiStep nodes compute whole sequences, several times faster"
    ]


def test_a_layer_that_changes_is_checked_again():
    converted, _ = asgl_cuda.convert(neuron.MultiStepLIFNode())
    converted(torch.rand(T, B, N))
    converted.backend = "lava"
    with pytest.raises(RuntimeError, match="MultiStepLIFNode was changed after its conversion: its Lava is True"):
        converted(torch.rand(T, B, N))
    converted.backend = "cupy"  # without effect
    converted(torch.rand(T, B, N))
    with pytest.raises(ValueError, match=r"v_init must have shape \[2, 5\], got \[3, 5\]"):
        converted(torch.rand(T, 2, N))


def test_states():
    net = nn.Sequential(nn.Linear(4, N), neuron.MultiStepParametricLIFNode(), nn.Linear(N, N), neuron.MultiStepIFNode())
    fast, report = asgl_cuda.convert(net)
    assert len(report.replaced) == 2
    assert list(fast.state_dict()) == list(net.state_dict())
    x_seq = torch.randn(T, B, 4)
    for _ in range(2):
        assert torch.equal(fast(x_seq), net(x_seq))
    back, _ = asgl_cuda.revert(fast)
    assert type(back[1]) is type(net[1])
    asgl_cuda.detach(fast)
    assert not fast[1].v_seq.requires_grad
    for twin in (back, fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close([twin[1].v, twin[3].v_seq], [net[1].v, net[3].v_seq])
    functional.reset_net(fast), functional.reset_net(net)
    assert (fast[1].v, fast[1].v_seq, fast[1].v_threshold) == (0.0, None, 1.0)
    fast[1].store_v_seq = False
    expected = net(x_seq)
    assert torch.equal(fast(x_seq), expected)
    assert fast[1].v_seq is None
    for model in (net, fast):
        asgl_cuda.reset(model)
        assert torch.equal(torch.stack([asgl_cuda.step(model, x) for x in x_seq]), expected)
    compiled = torch.compile(fast, backend="eager")
    asgl_cuda.reset(fast)
    assert torch.equal(compiled(x_seq), expected)


@pytest.mark.parametrize("multi", ["MultiStep", ""])
def test_a_node_of_0_0_0_0_8(multi):
    """It has the last spikes and, without an attribute `decay_input`, an input that decays."""
    node = getattr(neuron, f"{multi}LIFNode")()
    converted, _ = asgl_cuda.convert(node)
    del converted.decay_input
    for name in ("spike", "spike_seq"):
        converted.register_memory(name, None)
    x_seq = 2 * torch.randn(T, B, N)
    expected = node(x_seq)
    assert torch.equal(converted(x_seq), expected)
    assert torch.equal(converted.spike, expected[-1] if multi else expected)
    assert torch.equal(converted.spike_seq, expected) if multi else converted.spike_seq is None
