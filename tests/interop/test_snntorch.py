"""Neurons of snnTorch: spikes, potentials and gradients before and after conversion, and MultiStep."""

import pytest
import snntorch
import torch
from conversions import close, steps, train_alike
from snntorch import utils
from torch import nn

import asgl_cuda
from asgl_cuda.interop.snntorch import MultiStep


def test_errors_of_multi_step():
    for layer, error, words in (
        (nn.Linear(2, 2), ValueError, "a Leaky, .* or RSynaptic of snnTorch: it is a Linear"),
        (snntorch.Leaky(beta=0.5, state_quant=lambda mem: mem), ValueError, "of snnTorch: it quantises its state"),
        (5, TypeError, "a Leaky, .* or RSynaptic of snnTorch, got int"),
    ):
        with pytest.raises(error, match=rf"snntorch\.MultiStep: layer must be .*{words}"):
            MultiStep(layer)
    multi = MultiStep(snntorch.Leaky(beta=0.5))
    for arguments, name in ((([1.0],), "x_seq"), ((torch.ones(2, 3), 5), "a state")):
        with pytest.raises(TypeError, match=rf"snntorch\.MultiStep: {name} must be a tensor, got (list|int)"):
            multi(*arguments)
    made = MultiStep(snntorch.Leaky(beta=0.9))
    reverted, _ = asgl_cuda.revert(made)
    x_seq = torch.rand(3, 2)
    with pytest.raises(RuntimeError, match=r"got one that was reverted: asgl_cuda\.convert"):
        reverted(x_seq)
    assert torch.equal(asgl_cuda.convert(reverted)[0](x_seq)[0], made(x_seq)[0])


@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_multi_step_states_and_keys(kind):
    """It goes on from the last call, unless it is given states; keys are those of the layer, and of older versions."""
    torch.manual_seed(0)
    options = {"beta": 0.8, "learn_threshold": True, **({"alpha": 0.7} if kind == "Synaptic" else {})}
    layer, model = (nn.Sequential(nn.Identity(), getattr(snntorch, kind)(**options)) for _ in range(2))
    multi = nn.Sequential(nn.Identity(), MultiStep(model[1]))
    x_seq = torch.randn(9, 3, 7)
    first = multi(x_seq)[0]
    assert torch.equal(first, steps(layer[1], x_seq)[0])
    assert not torch.equal(multi(x_seq)[0], first)
    asgl_cuda.reset(multi)
    assert torch.equal(multi(x_seq)[0], first)
    states = torch.rand(len(options) - 1, 3, 7)
    torch.testing.assert_close(multi[1](x_seq, mem=states[-1])[0][0], layer[1](x_seq[0], mem=states[-1])[0])
    torch.testing.assert_close(multi[1](x_seq, *states)[0][0], layer[1](x_seq[0], *states)[0])
    assert list(multi.state_dict()) == list(layer.state_dict())
    values = {**layer.state_dict(), "1.threshold": torch.tensor(0.3)}
    old = {key.replace("1.", "1.layer."): value for key, value in values.items()}
    for given in (values, old):
        multi.load_state_dict(layer.state_dict())
        multi.load_state_dict(given)
        assert multi[1].layer.threshold == torch.tensor(0.3)


def test_a_beta_that_moves_to_zero_is_followed():
    """By an optimizer, or by a clamp after its step."""
    torch.manual_seed(0)
    layer = snntorch.Leaky(beta=0.3, learn_beta=True)
    multi = MultiStep(snntorch.Leaky(beta=0.3, learn_beta=True))
    x_seq = torch.randn(6, 5, 7)
    for value in (0.3, 0.0, 0.5):
        for each in (layer, multi.layer):
            each.reset_mem()
            with torch.no_grad():
                each.beta.fill_(value)
        (theirs,) = torch.autograd.grad(sum(map(torch.sum, steps(layer, x_seq))), layer.beta)
        (ours,) = torch.autograd.grad(sum(map(torch.sum, multi(x_seq))), multi.layer.beta)
        assert close(ours, theirs)


# ---- state ----


@pytest.mark.parametrize(("init_hidden", "output"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_arguments_and_states(kind, init_hidden, output):
    torch.manual_seed(0)
    values = {"beta": 0.8, **({"alpha": 0.7} if kind == "Synaptic" else {})}
    layer = getattr(snntorch, kind)(**values, init_hidden=init_hidden, output=output)
    converted, _ = asgl_cuda.convert(layer)
    x, *states = torch.randn(2 + len(values) - 1, 3, 4)
    for each in (layer, converted):
        if init_hidden:
            with pytest.raises(TypeError, match=r"`(mem|syn)` should not be passed"):
                each(x, *states)
            each.reset_mem()
    arguments = () if init_hidden else states
    torch.testing.assert_close(converted(x, *arguments), layer(x, *arguments))
    for name in ("mem", "syn")[: len(states)]:
        found = getattr(converted, name)
        torch.testing.assert_close(found, getattr(layer, name))
        assert found.any()
        assert found.grad_fn is None
    converted(x.requires_grad_(), *arguments)
    getattr(snntorch, kind).detach_hidden()
    utils.reset(nn.Sequential(converted))
    for name in ("mem", "syn")[: len(states)]:
        assert getattr(converted, name).grad_fn is None
        assert not getattr(converted, name).any()


@pytest.mark.parametrize("reset_mechanism", ["subtract", "zero"])
@pytest.mark.parametrize("change", ["nothing", "detach", "in place", "threshold", "beta", "another", "no gradient"])
def test_changes_between_two_calls(change, reset_mechanism):
    """Cached values hold only for the unchanged potential."""
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        layer = snntorch.Leaky(beta=0.8, learn_beta=True, reset_mechanism=reset_mechanism)
        layer = asgl_cuda.convert(layer)[0] if convert else layer
        x = torch.randn(2, 300, requires_grad=True)
        _, mem = layer(2 * x[0])
        if change == "detach":
            mem.detach_()
        elif change == "in place":
            mem = mem.detach()
            mem += 0.5
        elif change == "threshold":
            layer.threshold = torch.tensor(0.5)
        elif change == "beta":
            layer.beta = nn.Parameter(torch.tensor(0.4))
        elif change == "another":
            mem = mem.flip(0)
        if change == "no gradient":
            with torch.no_grad():
                _, mem = layer(x[0], mem)
        s, mem = layer(x[1], mem)
        results.append((s.detach(), mem.detach(), *torch.autograd.grad((s + mem).sum(), [x, layer.beta])))
    for ours, theirs in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_asgl_steps_of_a_learned_beta_reset_by_what_was_emitted():
    asgl = {"width": 4.0, "analog_prob": 1.0, "learn_width": False}
    x_seq = torch.rand(6, 3, 4)
    results = [
        steps(asgl_cuda.convert(snntorch.Leaky(beta=0.5, learn_beta=learned), asgl=asgl)[0], x_seq)
        for learned in (True, False)
    ]
    torch.testing.assert_close(*results)


def test_hidden_states_are_found():
    """`detach_hidden` and `reset_hidden` iterate over a list of all created layers."""
    layer = snntorch.Leaky(beta=0.5, init_hidden=True)
    converted, _ = asgl_cuda.convert(nn.Sequential(nn.Linear(2, 2), layer))
    converted(torch.randn(3, 2))
    assert converted[1].mem.requires_grad
    snntorch.Leaky.detach_hidden()
    assert not converted[1].mem.requires_grad
    count = len(snntorch.SpikingNeuron.instances)
    asgl_cuda.convert(layer, inplace=True)
    assert len(snntorch.SpikingNeuron.instances) == count


@pytest.mark.parametrize("function", ["convert", "revert", "fuse", "unfuse"])
def test_hidden_states_of_a_copy_are_found(function):
    """Also in layers that stay unchanged."""

    class Mine(snntorch.Leaky):
        pass

    kept = [Mine(beta=0.5, init_hidden=True), snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True)]
    model = nn.Sequential(nn.BatchNorm1d(2), snntorch.Leaky(beta=0.5, init_hidden=True), *kept)
    if function in ("revert", "unfuse"):
        model, _ = asgl_cuda.fuse(asgl_cuda.convert(model)[0])
    made, _ = getattr(asgl_cuda, function)(model)
    x = 5 + torch.randn(3, 2)
    made(x), model(x)
    layers = [layer for net in (made, model) for layer in net if isinstance(layer, snntorch.SpikingNeuron)]
    utils.reset(made)
    for layer in layers:
        assert not (layer.syn if isinstance(layer, snntorch.Synaptic) else layer.mem).any(), type(layer)


# ---- trainings ----


def test_nets_train_alike():
    torch.manual_seed(0)
    hidden = {"init_hidden": True}
    nets = [
        nn.Linear(8, 10), snntorch.Leaky(beta=0.9, learn_beta=True, **hidden),
        nn.Linear(10, 3), snntorch.Leaky(beta=0.8, output=True, **hidden),
    ], [
        nn.Linear(8, 10), snntorch.Synaptic(alpha=0.8, beta=0.9, learn_alpha=True, **hidden),
        nn.Linear(10, 6), snntorch.Lapicque(beta=0.8, **hidden),
        nn.Linear(6, 3), snntorch.Leaky(beta=0.8, reset_mechanism="none", output=True, **hidden),
    ]  # fmt: skip
    x_seq = 2 * torch.rand(7, 6, 8)
    for net in nets:
        train_alike(nn.Sequential(*net), lambda net: sum(map(sum, (net(x) for x in x_seq))) / len(x_seq), len(net) // 2)
