"""The step of widths is Adam's, whatever the optimizer of the weights is and however a training loop calls it."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, parameter_groups
from asgl_cuda.training.groups import NEURON_LR, WIDTH_LR


def network(learn_decay=True):
    torch.manual_seed(0)
    first, second = (
        LIF(5, granularity="channel", learn_decay=learn_decay, width=width, analog_prob=0) for width in (1.0, 9.0)
    )
    return nn.Sequential(nn.Linear(3, 5), first, nn.Linear(5, 5), second, nn.Linear(5, 2))


def gradients(model, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    x_seq = 3 * torch.randn(4, 6, 3)
    model(x_seq).square().mean().backward()


def neurons_of(model):
    return [value for name, value in model.named_parameters() if name.endswith(("log_width", "logit_decay"))]


def apart(model, lr=0.1, **options):
    """The same by two optimizers, weights by SGD."""
    neurons = neurons_of(model)
    ids = {*map(id, neurons)}
    weights = [value for value in model.parameters() if id(value) not in ids]
    rates = ((value, WIDTH_LR if name.endswith("log_width") else NEURON_LR) for name, value in model.named_parameters())
    own = [{"params": [value], "lr": rate} for value, rate in rates if id(value) in ids]
    return torch.optim.SGD(weights, lr, **options), torch.optim.Adam(own)


def assert_same(model, other):
    for (name, value), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "nesterov": True}, {"foreach": False}, {"momentum": 0.9, "fused": True}], ids=str
)
def test_two_optimizers_in_one(options):
    model, other = network(), network()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), **options)
    weights, neurons = apart(other, **options)
    for seed in range(5):
        gradients(model, seed)
        gradients(other, seed)
        before = [value.grad for value in neurons_of(model)]
        optimizer.step()
        assert all(value.grad is grad for value, grad in zip(neurons_of(model), before, strict=True))
        weights.step()
        neurons.step()
        assert_same(model, other)
    assert not torch.equal(model[1].log_width, network()[1].log_width)


KINDS = ["Adadelta", "Adagrad", "ASGD", "RMSprop", "Rprop", "NAdam", "RAdam", "Adamax", "AdamW", "Adam"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_moves_widths_by_the_rate(kind):
    """3 % at the first step, for any size of the gradient, where Adadelta's own step has no size."""
    model = network()
    optimizer = getattr(torch.optim, kind)(parameter_groups(model, 1e-3, weight_decay=0.0 if kind == "Rprop" else 0.1))
    before = [value.detach().clone() for value in neurons_of(model)]
    for value in model.parameters():
        value.grad = torch.full_like(value, 1e-4)
    optimizer.step()
    factor = 1e-4 if kind == "RAdam" else 1.0  # begins with plain momentum
    for value, old, rate in zip(neurons_of(model), before, (WIDTH_LR, NEURON_LR) * 2, strict=True):
        torch.testing.assert_close(old - value, torch.full_like(value, factor * rate), rtol=0.2, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_width_lr_is_the_optimizers_own(kind):
    model, other = network(), network()
    optimizer = kind(parameter_groups(model, 0.1, width_lr=0.01))
    weights, _ = apart(other)
    plain = kind([{"params": weights.param_groups[0]["params"], "lr": 0.1, "weight_decay": 0.0}])
    neurons = kind(neurons_of(other), 0.01, weight_decay=0.0)
    for seed in range(3):
        gradients(model, seed)
        gradients(other, seed)
        for each in (optimizer, plain, neurons):
            each.step()
    assert_same(model, other)


def test_maximisation():
    model, other = network(), network()
    optimizer, expected = (
        torch.optim.SGD(parameter_groups(each, 0.1), maximize=each is model) for each in (model, other)
    )
    gradients(model, 0)
    gradients(other, 0)
    for value in other.parameters():
        value.grad.neg_()
    optimizer.step()
    expected.step()
    assert_same(model, other)


@pytest.mark.parametrize("named", [False, True])
def test_a_closure_computes_the_gradients(named):
    """As Lightning calls every optimizer."""
    model, other = network(), network()
    optimizer, expected = (torch.optim.SGD(parameter_groups(each, 0.1), momentum=0.9) for each in (model, other))
    for seed in range(3):

        def closure(seed=seed):
            gradients(model, seed)
            return torch.tensor(5.0 + seed)

        assert (optimizer.step(closure=closure) if named else optimizer.step(closure)) == 5.0 + seed
        gradients(other, seed)
        expected.step()
        assert_same(model, other)


def test_schedules_and_checkpoints():
    """Averages and rates are the optimizer's state, also in a new process's optimizer."""
    model = network()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for seed in range(3):
        gradients(model, seed)
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups[1:]] == pytest.approx([0.1 * NEURON_LR, 0.1 * WIDTH_LR])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    resumed = network()
    again = torch.optim.SGD(parameter_groups(resumed, 0.1), momentum=0.9)
    scheduled = torch.optim.lr_scheduler.StepLR(again, 2)
    for each, state in zip((resumed, again, scheduled), saved, strict=True):
        each.load_state_dict(state)
    for seed in range(3, 6):
        for net, each, rates in ((model, optimizer, schedule), (resumed, again, scheduled)):
            gradients(net, seed)
            each.step()
            rates.step()
    assert_same(model, resumed)
    assert float(again.state[resumed[1].log_width]["step"]) == 6


def test_a_checkpoint_of_another_rule_goes_on_with_it():
    """Where decays are learned, an earlier optimizer had a group less, which torch refuses: `width_lr` loads it."""
    model, other = network(learn_decay=False), network(learn_decay=False)
    old = torch.optim.SGD(parameter_groups(model, 0.1, width_lr=1e-3))
    new = torch.optim.SGD(parameter_groups(other, 0.1))
    new.load_state_dict(old.state_dict())
    for each, optimizer in ((model, old), (other, new)):
        gradients(each, 0)
        optimizer.step()
    assert_same(model, other)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaling_and_clipping(fused):
    """An overflow changes nothing; else the step is that without scaling."""
    model, other = network(), network()
    optimizer, expected = (torch.optim.SGD(parameter_groups(each, 0.1), momentum=0.9) for each in (model, other))
    if fused:
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1), momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed, overflow in enumerate((False, True, False)):
        torch.manual_seed(seed)
        x_seq = 3 * torch.randn(4, 6, 3)
        for each, scale in ((model, scaler.scale), (other, lambda loss: loss)):
            each.zero_grad()
            scale(each(x_seq).square().mean()).backward()
        if overflow:
            model[1].log_width.grad.fill_(torch.inf)
            scaler.step(optimizer)
        elif seed == 0:
            scaler.unscale_(optimizer)
            for each, stepper in ((model, lambda: scaler.step(optimizer)), (other, expected.step)):
                nn.utils.clip_grad_norm_(each.parameters(), 0.01)
                stepper()
        else:
            scaler.step(optimizer)
            expected.step()
        scaler.update()
        for value, wanted in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(value, wanted)


def test_frozen_widths_and_parameters_without_gradient_stay():
    model = network()
    model[1].log_width.requires_grad_(False)
    before = [value.detach().clone() for value in neurons_of(model)]
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1))
    optimizer.step()
    assert all(map(torch.equal, neurons_of(model), before))
    gradients(model, 0)
    optimizer.step()
    assert torch.equal(model[1].log_width, before[0])
    assert not torch.equal(model[3].log_width, before[2])


def test_a_step_that_raises_leaves_the_next_as_it_was():
    model, other = network(), network()
    optimizer, expected = (torch.optim.SGD(parameter_groups(each, 0.1)) for each in (model, other))

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    for each, stepper in ((model, optimizer), (other, expected)):
        gradients(each, 0)
        stepper.step()
    assert_same(model, other)


def test_compiled_step():
    model, other = network(), network()
    optimizer, expected = (torch.optim.SGD(parameter_groups(each, 0.1), momentum=0.9) for each in (model, other))
    step = torch.compile(optimizer.step, backend="aot_eager")
    for seed in range(3):
        gradients(model, seed)
        gradients(other, seed)
        step()
        expected.step()
    for value, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, wanted)  # compiled, the arithmetic has another order


def test_a_wide_start_is_left_under_sgd():
    """Where the optimizer's own step stays: the width's gradient is small."""
    found = {}
    for name, options in {"Adam's": {}, "SGD's": {"width_lr": 3e-4}}.items():
        model = network()
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1, **options), momentum=0.9)
        for seed in range(60):
            gradients(model, seed)
            optimizer.step()
        found[name] = (model[3].width / 9).log().abs().max().item()
    assert found["Adam's"] > 0.2
    assert found["SGD's"] < 0.01


def test_nothing_keeps_the_model():
    model = network()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), momentum=0.9)
    gradients(model, 0)
    gc.collect()
    gc.disable()
    try:
        optimizer.step()
        watched = weakref.ref(model[1].log_width)
        del model, optimizer
        assert watched() is None
    finally:
        gc.enable()


def test_optimizers_without_such_groups_are_as_ever():
    value = nn.Parameter(torch.ones(3))
    value.grad = torch.ones(3)
    torch.optim.SGD([value], lr=0.5).step()
    assert torch.equal(value, torch.full((3,), 0.5))
    assert asgl_cuda.parameter_groups(nn.Linear(2, 2), 0.1)[0]["name"] == "weights"


def test_weights_of_recurrent_neurons_are_weights():
    layer = asgl_cuda.RecurrentLIF(
        5, syn_decay=0.5, granularity="neuron", learn_decay=True, learn_threshold=True, learn_syn_decay=True
    )
    groups = {each["name"]: {*map(id, each["params"])} for each in parameter_groups(layer, 0.1, norm_weight_decay=0.0)}
    named = {name: id(value) for name, value in layer.named_parameters()}
    assert groups == {
        "weights": {named["recurrent_weight"]},
        "norms": {named["recurrent_bias"]},
        "neurons": {named[name] for name in ("logit_decay", "threshold", "logit_syn_decay")},
        "widths": {named["log_width"]},
    }


def plain(*between, layers=2):
    torch.manual_seed(0)
    blocks = [[nn.Linear(64, 64), *between, LIF()] for _ in range(layers)]
    return nn.Sequential(*(each for block in blocks for each in block), nn.Linear(64, 10))


def calibrated():
    model = plain()
    asgl_cuda.calibrate(model, torch.rand(4, 32, 64))
    return model


def of_another_initialisation():
    model = plain()
    for layer in model[::2]:
        nn.init.uniform_(layer.weight, -0.1, 0.1)
    return model


def test_a_model_that_is_likely_silent_is_named_once(monkeypatch):
    monkeypatch.setattr(asgl_cuda.checks, "_warned", set())
    with pytest.warns(
        UserWarning, match=r"asgl_cuda\.parameter_groups: several .* silent.* asgl_cuda\.calibrate"
    ) as found:
        parameter_groups(plain(), 0.1)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter_groups(plain(), 0.1)


@pytest.mark.parametrize(
    "make",
    [
        calibrated,
        of_another_initialisation,
        lambda: plain(layers=1),
        lambda: plain(nn.LayerNorm(64)),
        lambda: nn.Sequential(plain(), asgl_cuda.BatchNormLIF(10)),
        lambda: plain().to("meta"),
    ],
    ids=["calibrated", "another initialisation", "one layer", "LayerNorm", "BatchNormLIF", "meta"],
)
def test_others_are_not(make, monkeypatch):
    monkeypatch.setattr(asgl_cuda.checks, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter_groups(make(), 0.1)
