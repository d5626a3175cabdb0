"""FiringRates: rates with gradients, of all calls that are trained."""

import copy
import pickle

import pytest
import torch
from comparison import random_input
from layer_cases import NEURONS, N, make
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import LIF, FiringRates

T, B = 5, 3


def network(analog_prob=0.2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(N, N),
        asgl_cuda.BatchNormLIF(N, analog_prob=analog_prob),
        nn.Linear(N, 4),
        LIF(surrogate="sigmoid", analog_prob=0.0),
    )


def inputs():
    return torch.rand(T, B, N, generator=torch.Generator().manual_seed(1)) * 3


def by_hand(model, x_seq):
    """The mean outputs of the layers in order."""
    rates, hooks = [], []
    for _, layer in asgl_cuda.asgl_layers(model):
        hooks.append(layer.register_forward_hook(lambda layer, args, s_seq: rates.append(s_seq.mean())))
    model(x_seq)
    for hook in hooks:
        hook.remove()
    return rates


PENALTIES = {
    "mean": (None, lambda rates: sum(rates) / 2),
    "target": (0.1, lambda rates: sum((rate - 0.1) ** 2 for rate in rates) / 2),
    "targets": ({"3": 0.9, "1": 0}, lambda rates: (rates[0] ** 2 + (rates[1] - 0.9) ** 2) / 2),
    "one": ({"3": 0.2}, lambda rates: (rates[1] - 0.2) ** 2),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_those_of_mean_outputs(name):
    target, expected = PENALTIES[name]
    model, x_seq = network(), inputs()
    torch.manual_seed(2)
    theirs = expected(by_hand(model, x_seq))
    torch.manual_seed(2)
    with FiringRates(model) as rates:
        model(x_seq)
        ours = rates.penalty(target)
    torch.testing.assert_close(ours, theirs)
    parameters = [each for each in model.parameters() if each.requires_grad]
    found, wanted = (torch.autograd.grad(each, parameters, allow_unused=True) for each in (ours, theirs))
    for grad, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, other)
    assert any(grad is not None and grad.any() for grad in found)


@pytest.mark.parametrize("kind", NEURONS)
def test_every_kind_of_neuron_is_counted(kind, backend, device):
    layer = make(kind, backend, device, scale_output=False) if kind == "LIF" else make(kind, backend, device)
    layer = nn.Sequential(nn.Identity(), layer)
    x_seq = (random_input(T, B, N, device=device).detach() * 2).requires_grad_()
    with FiringRates(layer) as rates:
        s_seq = layer(x_seq)
        found = rates.take()["1"]
    torch.testing.assert_close(found, s_seq.mean())
    ours, theirs = (torch.autograd.grad(each, x_seq, retain_graph=True)[0] for each in (found, s_seq.mean()))
    torch.testing.assert_close(ours, theirs)


def test_steps_are_as_the_sequence():
    """By `step` of the model and of the layers, and calls of different lengths."""
    model, x_seq = network(analog_prob=0.0).eval(), inputs()
    with FiringRates(model) as rates:
        model(x_seq)
        whole = rates.take()
        for x_t in x_seq:
            asgl_cuda.step(model, x_t)
        stepped = rates.take()
        asgl_cuda.reset(model)
        model[1].stateful = model[3].stateful = True
        model(x_seq[:1])
        model(x_seq[1:])
        for found in (stepped, rates.take()):
            assert list(found) == ["1", "3"]
            torch.testing.assert_close(found, whole)


def test_a_silent_layer_has_a_gradient_where_its_surrogate_has_one():
    for surrogate, flows in (("sigmoid", True), ("rectangle", False)):
        layer = LIF(surrogate=surrogate, analog_prob=0.0)
        x_seq = torch.full((T, B, N), -3.0, requires_grad=True)
        with FiringRates(layer) as rates:
            layer(x_seq)
            penalty = rates.penalty(0.1)
        assert penalty.item() == pytest.approx(0.01)
        (grad,) = torch.autograd.grad(penalty, x_seq)
        assert bool((grad < 0).all()) == flows, "towards more spikes"


def checkpointed(model, x_seq):
    return checkpoint(model, x_seq, use_reentrant=False)


def recomputed(model, x_seq):
    with asgl_cuda.recompute_spikes():
        return model(x_seq)


def compiled(model, x_seq):
    torch.compiler.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(x_seq)  # taken below with the second call
    return run(x_seq)


@pytest.mark.parametrize("run", [checkpointed, recomputed, compiled])
def test_ways_to_run_a_model(run):
    """The same gradients, and nothing is counted when a checkpoint computes its forward again."""

    def gradients(run):
        model = network(analog_prob=0.0)
        with FiringRates(model) as rates:
            scores = run(model, inputs())
            penalty = rates.penalty(0.1)
            (scores.square().sum() + 10 * penalty).backward()
            with pytest.raises(RuntimeError, match="no call of a layer is recorded"):
                rates.take()
        return penalty, *(each.grad for each in model.parameters())

    for found, expected in zip(gradients(run), gradients(lambda model, x_seq: model(x_seq)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_trained_does_not_count():
    model, x_seq = network(), inputs()
    with FiringRates(model) as rates:
        model(x_seq)
        with torch.no_grad():
            model.eval()(10 * x_seq)
        torch.func.vmap(LIF(), randomness="different")(x_seq)
        model.train()
        first = rates.take()
        with pytest.raises(RuntimeError, match=r"asgl_cuda\.FiringRates: no call of a layer is recorded"):
            rates.penalty()
        model(x_seq)
    assert 0 < first["1"] < 1
    with pytest.raises(RuntimeError, match=r"Take the rates once per forward pass, before the `with` block or stop"):
        rates.take()
    assert not any(layer._forward_hooks for layer in model.modules())
    with rates:
        model[:2](x_seq)
        with pytest.raises(RuntimeError, match=r"with a target is recorded: got targets for '3', and calls of '1'$"):
            rates.penalty({"3": 0.1})
        model[:2](x_seq)
        with pytest.raises(RuntimeError, match=r"got targets for no layer, and calls of '1'$"):
            rates.penalty({})


def test_half_types_and_types_beside_each_other():
    model = nn.Sequential(LIF(analog_prob=0.0), nn.Identity(), LIF(analog_prob=0.0))
    model[1].register_forward_hook(lambda module, args, output: output.to(torch.float64))
    x_seq = (torch.arange(70000).remainder(3) == 0).to(torch.bfloat16).mul(2).reshape(7, -1).requires_grad_()
    with FiringRates(model) as rates:
        model(x_seq)
        found = rates.take()
        assert found["0"].item() == pytest.approx(1 / 3, rel=1e-4), "in float32"
        model(x_seq)
        assert rates.penalty(0.1).item() == pytest.approx((1 / 3 - 0.1) ** 2, rel=1e-3)


def test_copies_of_a_model_record_nothing():
    model, x_seq = network(), inputs()
    with FiringRates(model) as rates:
        model(x_seq)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            again(10 * x_seq)
        found = rates.take()
        model(x_seq)
        torch.testing.assert_close(rates.take()["3"], found["3"])


COUNTING = LIF(levels=4, v_reset=None, analog_prob=0.0)
ERRORS = {
    "no layer": (lambda: FiringRates(nn.Linear(2, 2)), ValueError, "model must have an ASGL layer"),
    "no module": (lambda: FiringRates(3), TypeError, "model must be a torch.nn.Module"),
    "scaled": (lambda: FiringRates(LIF(scale_output=True)), ValueError, r"the model \(LIF\) .* by v_threshold instead"),
    "scaled levels": (
        lambda: FiringRates(LIF(v_reset=None, levels=4, scale_output=True)),
        ValueError,
        r"the model \(LIF\) .* by 1 / levels instead",
    ),
    "group": (lambda: FiringRates(LIF(), process_group="all"), TypeError, "process_group must be"),
    "below 0": (lambda: FiringRates(LIF()).penalty(-0.1), ValueError, r"target must be in \[0, 1\] for .*, got -0\.1"),
    "above 1": (
        lambda: FiringRates(network()).penalty({"3": 5.0}),
        ValueError,
        r"target must .* for 3 \(\w+\), got 5\.0",
    ),
    "of levels": (lambda: FiringRates(COUNTING).penalty(-1.0), ValueError, r"target must be at least 0 for the model"),
    "no number": (lambda: FiringRates(LIF()).penalty("low"), TypeError, "target must be a float"),
    "NaN": (lambda: FiringRates(LIF()).penalty({"": float("nan")}), ValueError, "target must be finite"),
    "name": (
        lambda: FiringRates(network()).penalty({"2": 0.1}),
        KeyError,
        "no ASGL layer is named '2'; the layers are named '1', '3'",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, words):
    with pytest.raises(error, match=rf"asgl_cuda\.FiringRates: {words}"):
        call()


def test_converted_layers():
    """Of an output with the potential beside the spikes, the spikes."""
    snntorch = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    lazy = snntorch.Leaky(0.9, init_hidden=True, output=True)
    model, _ = asgl_cuda.convert(nn.Sequential(nn.Linear(N, 4), snntorch.Leaky(0.9, init_hidden=True), lazy))
    x_seq = inputs()
    with FiringRates(model) as rates:
        outputs = [model(x_t)[0] for x_t in x_seq]
        found = rates.take()
    assert list(found) == ["1", "2"]
    assert found["2"].requires_grad
    torch.testing.assert_close(found["2"], torch.stack(outputs).mean())
