"""Layers of sinabs and networks of `from_model`: outputs and gradients before and after conversion."""

import copy

import pytest
import sinabs.activation
import sinabs.layers
import torch
from conversions import SINGLE, reset, train_alike
from sinabs.from_torch import from_model
from torch import nn

import asgl_cuda

NORM = {"norm_input": False}


def test_a_least_potential_that_is_changed():
    """Read at each call; on a GPU read again only after a change."""
    layer = sinabs.layers.IAF(min_v_mem=-1.0)
    converted, _ = asgl_cuda.convert(layer)
    x = torch.full((1, 3, 2), -5.0)
    converted(x)
    assert (converted.v_mem == -1).all()
    converted.load_state_dict({**converted.state_dict(), "min_v_mem": torch.tensor(-2.0)})
    converted(x)
    assert (converted.v_mem == -2).all()
    layer(x)
    back, _ = asgl_cuda.revert(converted, inplace=True)
    assert set(vars(back)) == set(vars(layer))


def test_a_least_potential_in_a_compiled_graph():
    """The graph reads no tensor value: the conversion has stored the bound as a float."""
    converted, _ = asgl_cuda.convert(sinabs.layers.IAF(min_v_mem=-1.0, shape=(1, 2)))
    torch.compile(converted, backend="eager", fullgraph=True)(torch.full((1, 3, 2), -5.0))
    assert (converted.v_mem == -1).all()


def test_several_spikes_have_no_noise():
    net = nn.Sequential(sinabs.layers.IAF(), sinabs.layers.IAF(**SINGLE))
    converted, report = asgl_cuda.convert(net, asgl={})
    assert [row.path for row in report.replaced] == ["1"]
    (left,) = report.left
    assert "may spike several times a step, which asgl does not provide for; without asgl it can be" in left.reason
    converted, report = asgl_cuda.convert(converted)
    assert [row.path for row in report.replaced] == ["0"]
    with pytest.raises(ValueError, match=r"multi_spike needs analog_prob=0, got 0\.1"):
        converted[0].analog_prob = 0.1


@pytest.mark.parametrize("current", [False, True])
def test_states_and_copies(current):
    torch.manual_seed(0)
    options = {"tau_syn": 2.0} if current else {**NORM, **SINGLE}
    converted, _ = asgl_cuda.convert(sinabs.layers.LIF(3.0, **options), asgl=None if current else {"width": 2.0})
    x = torch.randn(4, 9, 5)
    converted(x)
    twin = copy.deepcopy(converted)
    assert type(twin) is type(converted)
    assert twin.spike_threshold is not converted.spike_threshold
    if not current:
        assert twin.analog_prob == 0.2
        assert twin.log_width is not converted.log_width
    states = ("v_mem", "i_syn")[: 1 + current]
    for name in states:
        assert torch.equal(getattr(twin, name), getattr(converted, name))
    assert not current or not torch.equal(twin.i_syn, twin.v_mem)
    converted.reset_states()
    for name in states:
        assert not getattr(converted, name).any()
        assert getattr(twin, name).any()
    twin.eval()(x[:2])  # another batch size: sinabs takes over states of the old one
    assert {getattr(twin, name).shape for name in states} == {(2, 5)}
    assert current or 0 < twin.firing_rate < 1


def vgg(pool):
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), pool,
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip
    with torch.no_grad():
        for module in net:
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight *= 3
    return net


def assert_the_same_network(model, layers, x, run=lambda net, x: net(x)):
    """All neurons are converted; outputs and gradients equal the model's."""
    converted, report = asgl_cuda.convert(model)
    assert (len(report.replaced), report.left) == (layers, [])
    results = []
    for net in (model, converted):
        reset(net)
        leaf = x.clone().requires_grad_()
        out = run(net, leaf)
        parameters = [value for value in net.parameters() if value.requires_grad]
        grads = torch.autograd.grad(out.square().sum(), [leaf, *parameters], allow_unused=True)
        results.append((out, [value for value in grads if value is not None]))
    (theirs, their_grads), (ours, our_grads) = results
    assert torch.equal(ours, theirs)
    assert theirs.unique().numel() > 1
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-4, atol=1e-5)
    assert all(grad.abs().max() > 0 for grad in our_grads)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_v_mem": None, "surrogate_grad_fn": sinabs.activation.PeriodicExponential(), "add_spiking_output": True},
        {"spike_layer_class": sinabs.layers.IAF},
        {"spike_fn": sinabs.activation.SingleSpike, "spike_threshold": torch.tensor(0.5), "input_shape": (2, 8, 8)},
    ],
    ids=lambda options: ", ".join(options) or "defaults",
)
def test_from_model_of_sinabs(options):
    torch.manual_seed(0)
    apart = options.get("spike_layer_class") is sinabs.layers.IAF  # takes time and batch apart
    ann = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)) if apart else vgg(nn.AvgPool2d(2))
    model = from_model(ann, batch_size=6, **options)
    layers = 1 if apart else 4 + options.get("add_spiking_output", False)
    x = 4 * torch.rand(6, 5, 8) if apart else 4 * torch.rand(6 * 5, 2, 8, 8)
    assert_the_same_network(model, layers, x)

    train_alike(model, lambda net: (net(x) if apart else net(x).unflatten(0, (6, 5))).mean(1), layers)


def test_a_network_trains_alike():
    torch.manual_seed(0)
    options = {"batch_size": 6, "spike_threshold": torch.tensor(0.1), **SINGLE}
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), sinabs.layers.IAFSqueeze(**options), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(4 * 16, 3), sinabs.layers.LIFSqueeze(tau_mem=3.0, **options),
    )  # fmt: skip
    x = torch.rand(6 * 5, 1, 8, 8)
    train_alike(model, lambda net: net(3 * x).unflatten(0, (6, 5)).mean(1), 2)


@pytest.mark.filterwarnings("ignore:nirtorch")
def test_a_network_of_sinabs_that_was_in_nir():
    """NIR makes one threshold and one least potential for each neuron."""
    sinabs_nir = pytest.importorskip("sinabs.nir")
    torch.manual_seed(0)
    model = from_model(vgg(sinabs.layers.SumPool2d(2)), input_shape=(2, 8, 8), batch_size=6)
    x = torch.rand(6 * 5, 2, 8, 8)
    back = sinabs_nir.from_nir(sinabs_nir.to_nir(model.spiking_model, x), batch_size=6)
    assert max(value.numel() for name, value in back.named_parameters() if "spike_threshold" in name) > 1
    assert_the_same_network(back, 4, 2 * x, lambda net, x: net(x)[0])


@pytest.mark.parametrize("reset_fn", [sinabs.activation.MembraneSubtract(), sinabs.activation.MembraneReset()])
@pytest.mark.parametrize("spike_fn", [sinabs.activation.SingleSpike, sinabs.activation.MultiSpike])
def test_gradient_of_the_threshold(reset_fn, spike_fn):
    """Only a subtraction has one."""
    grads = []
    for convert in (False, True):
        layer = sinabs.layers.IAF(spike_fn=spike_fn, reset_fn=reset_fn)
        layer.spike_threshold.requires_grad_()
        model = asgl_cuda.convert(nn.Sequential(layer))[0] if convert else nn.Sequential(layer)
        model(torch.tensor([[[0.8], [0.9], [2.7]]], requires_grad=True)).sum().backward()
        grads.append(model[0].spike_threshold.grad)
    one, other = grads
    assert (one is None) == (other is None)
    if one is not None:
        torch.testing.assert_close(one, other)
