"""The layer of adaptive neurons: its parameters and its two states, and what it shares with `LIF`."""

import copy
import pickle

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda import AdaptiveLIF

forms = pytest.mark.parametrize("to_threshold", [False, True], ids=["current", "threshold"])
OPTIONS = {"adapt_decay": 0.9, "adapt_potential": 0.1, "adapt_spike": 0.3, "decay": 0.8}


@forms
@pytest.mark.parametrize(
    ("granularity", "features", "shape"), [("layer", None, (1,)), ("channel", 4, (4, 1)), ("neuron", (4, 6), (4, 6))]
)
@pytest.mark.parametrize("time_dim", [0, 1])
def test_learned(backend, device, granularity, features, shape, time_dim, to_threshold):
    layer = AdaptiveLIF(
        features, **OPTIONS, to_threshold=to_threshold, learn_adaptation=True, learn_decay=True, analog_prob=0,
        granularity=granularity, time_dim=time_dim, backend=backend, device=device,
    )  # fmt: skip
    assert list(layer.state_dict()) == [
        "log_width", "logit_decay", "logit_adapt_decay", "adapt_potential", "adapt_spike"
    ]  # fmt: skip
    for name in ("adapt_decay", "adapt_potential", "adapt_spike"):
        torch.testing.assert_close(getattr(layer, name), torch.full_like(getattr(layer, name), OPTIONS[name]))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.rand_like(parameter)
    x_seq = (3 * torch.rand(5, 3, 4, 6, device=device) - 1).movedim(0, time_dim).contiguous()
    leaves = {
        "width": layer.log_width.exp(), "decay": layer.logit_decay.sigmoid(),
        "adapt_decay": layer.logit_adapt_decay.sigmoid(), "adapt_potential": layer.adapt_potential,
        "adapt_spike": layer.adapt_spike,
    }  # fmt: skip
    given = {name: each.reshape(shape) for name, each in leaves.items()}
    expected = asgl_cuda.adaptive_lif(x_seq, **given, to_threshold=to_threshold, time_dim=time_dim, backend="reference")
    actual = layer(x_seq)
    torch.testing.assert_close(actual, expected)
    weights, parameters = torch.rand_like(x_seq), list(layer.parameters())
    ours = torch.autograd.grad((actual * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@forms
def test_states_make_two_calls_one(backend, device, to_threshold):
    x_seq = 3 * torch.rand(8, 3, 5, device=device) - 1
    options = {**OPTIONS, "to_threshold": to_threshold, "analog_prob": 0, "backend": backend}
    whole = AdaptiveLIF(**options)(x_seq)
    layer = AdaptiveLIF(stateful=True, **options)
    assert torch.equal(torch.cat([layer(x_seq[:3]), layer(x_seq[3:])]), whole)
    assert layer.v.shape == layer.w.shape == (3, 5)
    with torch.no_grad():
        kept = layer.w.clone()
        layer.v[0] = layer.v_rest  # one row begins anew
    assert torch.equal(layer.w, kept)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied.w, layer.w)
    asgl_cuda.reset(nn.Sequential(layer))
    assert layer.v is layer.w is None
    model = nn.Sequential(layer)
    assert torch.equal(torch.stack([asgl_cuda.step(model, x_t) for x_t in x_seq]), whole)
    asgl_cuda.reset(model)
    with asgl_cuda.Monitor(model) as monitor:
        layer(x_seq[:4])
        assert torch.equal(layer(x_seq[4:]), whole[4:])
    assert monitor.result()["0"]["firing_rate"] == pytest.approx(whole.mean().item())
    asgl_cuda.detach(model)
    assert not layer.w.requires_grad
    assert layer.double().w.dtype == torch.float64


@forms
@pytest.mark.parametrize("given", ["v", "w", "vw"])
def test_states_that_are_set_are_used(backend, device, given, to_threshold):
    """The other one starts at rest, in calls and in steps."""
    x_seq = (3 * torch.rand(5, 3, 7, device=device) - 1).double()
    options = {**OPTIONS, "v_rest": 0.1, "to_threshold": to_threshold}
    layer = AdaptiveLIF(**options, stateful=True, analog_prob=0, backend=backend)
    states = {name: torch.rand(3, 7, device=device, requires_grad=True) for name in given}
    expected = asgl_cuda.adaptive_lif(x_seq, **options, **{f"{name}_init": states[name] for name in given})
    for call in (layer, lambda x_seq: torch.stack([asgl_cuda.step(layer, x_t) for x_t in x_seq])):
        layer.reset()
        for name in given:
            setattr(layer, name, states[name])
        actual = call(x_seq)
        assert torch.equal(actual, expected)
        assert all(grad.any() for grad in torch.autograd.grad(actual.sum(), states.values()))
    layer.reset()
    setattr(layer, given[-1], 2 * states[given[-1]])
    asgl_cuda.detach(layer)
    assert not getattr(layer, given[-1]).requires_grad


def test_gradients_flow_through_carried_states(backend, device):
    x_seq = (3 * torch.rand(8, 3, 5, device=device) - 1).requires_grad_()
    layer = AdaptiveLIF(**OPTIONS, stateful=True, analog_prob=0, backend=backend, device=device)
    weights = torch.rand_like(x_seq)
    parts = torch.autograd.grad((torch.cat([layer(x_seq[:3]), layer(x_seq[3:])]) * weights).sum(), x_seq)[0]
    layer.reset()
    torch.testing.assert_close(parts, torch.autograd.grad((layer(x_seq) * weights).sum(), x_seq)[0])


def test_what_it_shares_with_lif(backend, device):
    layer = AdaptiveLIF(learn_adaptation=True, backend=backend, device=device)
    model = nn.Sequential(nn.Linear(6, 6, device=device), layer)
    assert [name for name, _ in asgl_cuda.asgl_layers(model)] == ["1"]
    groups = {each["name"]: set(each["params"]) for each in asgl_cuda.parameter_groups(model, lr=0.1)}
    assert groups["neurons"] | groups["widths"] == set(layer.parameters())
    assert groups["widths"] == {layer.log_width}
    asgl_cuda.AnalogProbSchedule.linear(model, 2)
    with torch.no_grad():
        layer.adapt_spike.fill_(5.0)
    layer.reset_parameters()
    assert layer.adapt_spike.item() == pytest.approx(0.1)
    assert "adapt_decay=0.97 (learned)" in repr(layer)
    x_seq = torch.rand(5, 2, 6, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    compiled(x_seq).sum().backward()
    assert layer.logit_adapt_decay.grad is not None


def test_is_left_by_what_knows_only_lif():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), AdaptiveLIF())
    fused, _ = asgl_cuda.fuse(model, torch.rand(3, 6))
    assert isinstance(fused[2], AdaptiveLIF)
    pytest.importorskip("nir")
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="AdaptiveLIF"):
        asgl_cuda.to_nir(nn.Sequential(nn.Linear(6, 6), AdaptiveLIF()), torch.rand(3, 2, 6))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapt_decay": 1.5}, "adapt_decay must be in"),
        ({"adapt_decay": 1.0, "learn_adaptation": True}, "a learned adapt_decay must be in"),
        ({"adapt_spike": float("inf")}, "adapt_spike must be finite"),
        ({"to_threshold": 1}, "to_threshold must be a bool"),
        ({"levels": 4}, "unexpected keyword argument 'levels'"),
        ({"input_gain": 2.0}, "unexpected keyword argument 'input_gain'"),
    ],
)
def test_arguments_are_checked(given, message):
    with pytest.raises((TypeError, ValueError), match=f"asgl_cuda.AdaptiveLIF: .*{message}"):
        AdaptiveLIF(**given)
