"""The layer of leaky integrators: its parameter and its state, and what it shares with `LIF`."""

import copy
import pickle

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, LeakyIntegrator, leaky_integrator


@pytest.mark.parametrize(
    ("granularity", "features", "shape"), [("layer", None, ()), ("channel", 4, (4, 1)), ("neuron", (4, 6), (4, 6))]
)
@pytest.mark.parametrize("time_dim", [0, 1])
def test_learned_decay(backend, device, granularity, features, shape, time_dim):
    """The sigmoid of the logit as torch has it, with its gradient."""
    options = {"granularity": granularity, "time_dim": time_dim, "backend": backend, "device": device}
    layer = LeakyIntegrator(features, decay=0.8, learn_decay=True, **options)
    torch.testing.assert_close(layer.decay, torch.full_like(layer.decay, 0.8))
    assert list(layer.state_dict()) == ["logit_decay"]
    with torch.no_grad():
        layer.logit_decay += torch.rand_like(layer.logit_decay)
    x_seq = torch.rand(5, 3, 4, 6, device=device).movedim(0, time_dim).contiguous()
    decay = layer.logit_decay.detach().sigmoid().reshape(shape)
    decay.requires_grad_()
    expected = asgl_cuda.leaky_integrator(x_seq, decay, time_dim=time_dim, backend="reference")
    actual = layer(x_seq)
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    chain = decay.grad * decay.detach() * (1 - decay.detach())
    torch.testing.assert_close(layer.logit_decay.grad.reshape(shape), chain, rtol=1e-4, atol=1e-5)


def test_equals_the_function(backend, device):
    x_seq, options = torch.rand(5, 3, 4, device=device), {"input_gain": 0.5, "v_rest": 0.25, "delay": True}
    layer = LeakyIntegrator(decay=0.75, backend=backend, **options).to(device)
    v_init = torch.full((3, 4), 0.3, device=device).half()
    assert torch.equal(layer(x_seq), leaky_integrator(x_seq, 0.75, backend="reference", **options))
    found = (leaky_integrator(x_seq, v_init=each, backend=backend) for each in (v_init, v_init.float()))
    assert torch.equal(*found)


@pytest.mark.parametrize("delay", [False, True])
def test_state_makes_two_calls_one(backend, device, delay):
    x_seq = torch.rand(8, 3, 5, device=device)
    options = {"decay": 0.7, "input_gain": 0.4, "v_rest": 0.2, "delay": delay, "backend": backend}
    layer = LeakyIntegrator(stateful=True, **options)
    whole = LeakyIntegrator(**options)(x_seq)
    assert torch.equal(torch.cat([layer(x_seq[:3]), layer(x_seq[3:])]), whole)
    assert layer.v.shape == (3, 5)
    with pytest.raises(ValueError, match=r"asgl_cuda.LeakyIntegrator: the carried potential has shape \[3, 5\]"):
        layer(x_seq[:, :1])
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied.v, layer.v)
    assert layer.double().v.dtype == torch.float64
    asgl_cuda.reset(nn.Sequential(layer))
    assert layer.v is None
    assert torch.equal(layer(x_seq), whole)
    layer.detach_()
    assert not layer.v.requires_grad


def test_as_a_synapse_and_a_read_out(backend, device):
    def network(backend):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(6, 8), LeakyIntegrator(decay=0.8, learn_decay=True, backend=backend),
            LIF(decay=0.7, analog_prob=0.0, backend=backend), nn.Linear(8, 3),
            LeakyIntegrator(decay=0.9, input_gain=0.1, delay=True, backend=backend),
        )  # fmt: skip
        return model.to(device)

    x_seq = torch.rand(9, 4, 6, device=device) * 3
    gradients = []
    for model in (network(backend), network("reference")):
        model(x_seq).square().mean().backward()
        gradients.append([each.grad for each in model.parameters() if each.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 6
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_torch_tools(backend, device):
    layer = LeakyIntegrator(4, granularity="channel", learn_decay=True, decay=0.6, backend=backend, device=device)
    x_seq = torch.rand(3, 2, 4, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_seq), layer(x_seq))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), layer))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    with pytest.raises(RuntimeError, match=r"asgl_cuda.LeakyIntegrator: torch.jit can neither"):
        torch.jit.script(layer)
    meta = LeakyIntegrator(learn_decay=True, decay=0.75, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert meta.decay.item() == pytest.approx(0.75)
    weights, neurons = asgl_cuda.parameter_groups(nn.Sequential(nn.Linear(2, 2), layer.cpu()), lr=0.1)
    assert (len(weights["params"]), neurons["params"]) == (2, [layer.logit_decay])
    with torch.autocast(device.type, torch.bfloat16):
        assert layer.to(device)(x_seq).dtype == torch.float32
    stateful = LeakyIntegrator(stateful=True)
    with pytest.raises(RuntimeError, match="can't keep potentials under transforms"):
        torch.func.vmap(stateful)(torch.rand(2, 3, 4))


def test_repr_names_what_differs():
    layer = LeakyIntegrator(3, granularity="channel", learn_decay=True, delay=True, time_dim=1)
    others = "input_gain=1, v_rest=0, granularity=channel, delay=True, time_dim=1"
    assert repr(layer) == f"LeakyIntegrator([3], decay=0.5 (learned), {others})"
