"""The parameter groups of an optimizer; the step of widths is Adam's, however a training loop calls the optimizer."""

import copy
import inspect
import itertools
import math
import warnings

import pytest
import torch
from layer_cases import Foreign
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


def sgd(model, momentum=0.9, groups=None, **options):
    return torch.optim.SGD(parameter_groups(model, 0.1, **(groups or {})), momentum=momentum, **options)


def gradients(seed, *models):
    for model in models:
        torch.manual_seed(seed)
        model.zero_grad()
        model(3 * torch.randn(4, 6, 3)).square().mean().backward()


def neurons_of(model):
    return [value for name, value in model.named_parameters() if name.endswith(("log_width", "logit_decay"))]


def apart(model, **options):
    """The same by two optimizers, weights by SGD."""
    named = dict(model.named_parameters())
    rates = {"log_width": WIDTH_LR, "logit_decay": NEURON_LR}
    own = [{"params": [value], "lr": rates[name[2:]]} for name, value in named.items() if name[2:] in rates]
    weights = [value for name, value in named.items() if name[2:] not in rates]
    return torch.optim.SGD(weights, 0.1, **options), torch.optim.Adam(own)


def assert_same(model, other, equal=torch.equal):
    for (name, value), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert equal(value, expected), name


# ---- groups ----


def test_groups_hold_every_parameter_once():
    """Shared or frozen, of a foreign layer and of every kind of this package; normalisations apart if asked for."""
    neuron = LIF(5, granularity="channel", learn_decay=True, learn_threshold=True)
    joined, foreign = asgl_cuda.BatchNormLIF(5, learn_decay=True), Foreign()
    recurrent = asgl_cuda.RecurrentLIF(5, syn_decay=0.5, learn_syn_decay=True)
    integrator = asgl_cuda.LeakyIntegrator(learn_decay=True)
    adaptive, norm = asgl_cuda.AdaptiveLIF(learn_adaptation=True), nn.LayerNorm((3, 4))
    linear, neuron.inside = nn.Linear(5, 5), nn.Linear(2, 2)  # a module inside of neurons is none
    model = nn.Sequential(
        linear, neuron, nn.Sequential(linear, neuron, foreign), nn.BatchNorm1d(5), joined, recurrent, integrator, norm,
        adaptive,
    )  # fmt: skip
    model[3].weight = linear.bias  # shared as a parameter, too
    linear.weight.requires_grad_(False)
    groups = {
        "weights": [linear.weight, neuron.inside.weight, foreign.recurrent.weight, recurrent.recurrent_weight],
        "norms": [
            linear.bias, neuron.inside.bias, foreign.recurrent.bias, model[3].bias, joined.weight, joined.bias,
            recurrent.recurrent_bias, *norm.parameters(),
        ],
        "neurons": [
            neuron.logit_decay, neuron.threshold, foreign.beta, joined.logit_decay, recurrent.logit_syn_decay,
            adaptive.logit_adapt_decay, adaptive.adapt_potential, adaptive.adapt_spike, integrator.logit_decay,
        ],
        "widths": [each.log_width for each in (neuron, foreign, joined, recurrent, adaptive)],
    }  # fmt: skip

    def assert_groups(found, expected):
        assert [group["name"] for group in found] == list(expected)
        for group in found:
            assert len(group["params"]) == len({*map(id, group["params"])})
            assert {*map(id, group["params"])} == {*map(id, expected[group["name"]])}, group["name"]

    found = parameter_groups(model, 0.5, weight_decay=0.1, norm_weight_decay=0.0)
    assert_groups(found, groups)
    rates = [(group["lr"], group["weight_decay"]) for group in found]
    assert rates == [(0.5, 0.1), (0.5, 0.0), (NEURON_LR, 0.0), (WIDTH_LR, 0.0)]
    apart = {"weights": groups["weights"] + groups["norms"], "neurons": groups["neurons"] + groups["widths"]}
    found = parameter_groups(model, 0.5, width_lr=0.01, weight_decay=0.1)
    assert_groups(found, apart)
    assert [(group["lr"], group["weight_decay"]) for group in found] == [(0.5, 0.1), (0.01, 0.0)]


# Muon takes matrices alone.
DECAYING = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and name != "Muon" and "weight_decay" in inspect.signature(kind).parameters
]


@pytest.mark.parametrize("kind", DECAYING)
@pytest.mark.parametrize("own", [None, 0.2])
def test_weights_have_the_weight_decay_of_the_optimizer(kind, own):
    """Unless the groups were asked for another. Learned parameters of neurons never decay."""
    kind = getattr(torch.optim, kind)
    default = inspect.signature(kind).parameters["weight_decay"].default
    for asked, norms in itertools.product((None, 0.0, 0.3), (None, 0.0)):
        groups = parameter_groups(network(), 0.1, weight_decay=asked, norm_weight_decay=norms)
        optimizer = kind(groups, **({} if own is None else {"weight_decay": own}))
        found = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
        assert found.pop("weights") == next(each for each in (asked, own, default) if each is not None)
        assert not any(found.values())


def test_no_key_but_what_was_asked_for():
    """A key of a group hides the optimizer's option of that name."""
    for width_lr, more in ((None, {"by_adam"}), (0.01, set())):
        weights, *others = parameter_groups(network(), 0.1, width_lr=width_lr)
        assert {*weights} == {"name", "params", "lr"}
        assert all({*each} == {"name", "params", "lr", "weight_decay", *more} for each in others)


def test_empty_groups_are_left_out():
    assert [group["name"] for group in parameter_groups(nn.Linear(2, 2), 0.1)] == ["weights"]
    for layer, name in ((LIF(), "widths"), (asgl_cuda.LeakyIntegrator(learn_decay=True), "neurons")):
        assert [group["name"] for group in parameter_groups(layer, 0.1)] == [name]
        assert [group["name"] for group in parameter_groups(layer, 0.1, width_lr=0.01)] == ["neurons"]
    assert parameter_groups(LIF(learn_width=False), 0.1) == []


@pytest.mark.parametrize("name", ["lr", "width_lr", "weight_decay", "norm_weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_group_errors(name, value):
    with pytest.raises(ValueError, match=rf"asgl_cuda\.parameter_groups: {name} must be >= 0, got {value}"):
        parameter_groups(network(), **{"lr": 0.1, name: value})


def test_parameters_instead_of_a_model():
    with pytest.raises(TypeError, match=r"model must be .*, got generator; pass the model itself"):
        parameter_groups(network().parameters(), 0.1)


# ---- the step ----


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "nesterov": True}, {"foreach": False}, {"momentum": 0.9, "fused": True}], ids=str
)
def test_two_optimizers_in_one(options):
    model, other = network(), network()
    optimizer, (weights, neurons) = sgd(model, **{"momentum": 0, **options}), apart(other, **options)
    for seed in range(3):
        gradients(seed, model, other)
        before = [value.grad for value in neurons_of(model)]
        for each in (optimizer, weights, neurons):
            each.step()
        assert all(value.grad is grad for value, grad in zip(neurons_of(model), before, strict=True))
        assert_same(model, other)
    assert not torch.equal(model[1].log_width, network()[1].log_width)


KINDS = ["Adadelta", "Adagrad", "ASGD", "RMSprop", "Rprop", "NAdam", "RAdam", "Adamax", "AdamW", "Adam"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_moves_widths_by_the_rate(kind):
    """3 % at the first step, for any size of the gradient, where Adadelta's own step has no size."""
    model = network()
    optimizer = getattr(torch.optim, kind)(
        parameter_groups(model, 1e-3), **({} if kind == "Rprop" else {"weight_decay": 0.1})
    )
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
    optimizer = kind(parameter_groups(model, 0.1, width_lr=0.01, weight_decay=0.2))
    weights, _ = apart(other)
    plain = kind(weights.param_groups[0]["params"], lr=0.1, weight_decay=0.2)
    neurons = kind(neurons_of(other), 0.01, weight_decay=0.0)
    for seed in range(3):
        gradients(seed, model, other)
        for each in (optimizer, plain, neurons):
            each.step()
    assert_same(model, other)


@pytest.mark.parametrize("how", ["positional", "named", "raising", "maximizing", "compiled"])
def test_ways_to_step(how):
    """With a closure that computes the gradients, as Lightning does, after one that raised, uphill, and compiled."""
    model, other = network(), network()
    optimizer, expected = sgd(model, maximize=how == "maximizing"), sgd(other)
    step = torch.compile(optimizer.step, backend="aot_eager") if how == "compiled" else optimizer.step

    def interrupted():
        raise KeyboardInterrupt

    for seed in range(3):

        def closure(seed=seed):
            gradients(seed, model)
            return torch.tensor(5.0 + seed)

        gradients(seed, other)
        if how == "raising":
            with pytest.raises(KeyboardInterrupt):
                step(interrupted)
        if how in ("positional", "named"):
            assert (step(closure=closure) if how == "named" else step(closure)) == 5.0 + seed
        else:
            closure()
            step()
        for value in other.parameters() if how == "maximizing" else ():
            value.grad.neg_()
        expected.step()
        # Compiled, the arithmetic has another order.
        assert_same(model, other, torch.allclose if how == "compiled" else torch.equal)


def test_schedules_and_checkpoints():
    """Averages and rates are the optimizer's state, also in a new process's optimizer."""

    def made():
        model = network()
        optimizer = sgd(model)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def goes_on(seeds, model, optimizer, schedule):
        for seed in seeds:
            gradients(seed, model)
            optimizer.step()
            schedule.step()

    first, second = made(), made()
    goes_on(range(3), *first)
    rates = [group["lr"] for group in first[1].param_groups[1:]]
    assert rates == pytest.approx([0.1 * NEURON_LR, 0.1 * WIDTH_LR])
    for each, other in zip(second, first, strict=True):
        each.load_state_dict(copy.deepcopy(other.state_dict()))
    for each in (first, second):
        goes_on(range(3, 6), *each)
    assert_same(first[0], second[0])
    assert float(second[1].state[second[0][1].log_width]["step"]) == 6


def test_a_checkpoint_of_another_rule_goes_on_with_it():
    """Where decays are learned, an earlier optimizer had a group less, which torch refuses: `width_lr` loads it."""
    model, other = network(learn_decay=False), network(learn_decay=False)
    old, new = sgd(model, groups={"width_lr": 1e-3}), sgd(other)
    new.load_state_dict(old.state_dict())
    gradients(0, model, other)
    old.step()
    new.step()
    assert_same(model, other)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaling_and_clipping(fused):
    """An overflow changes nothing; else the step is that without scaling."""
    model, other = network(), network()
    optimizer, expected = sgd(model, **({"fused": True} if fused else {})), sgd(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed, overflow in enumerate((False, True, False)):
        torch.manual_seed(seed)
        x_seq = 3 * torch.randn(4, 6, 3)
        for each, scale in ((model, scaler.scale), (other, lambda loss: loss)):
            each.zero_grad()
            scale(each(x_seq).square().mean()).backward()
        if overflow:
            model[1].log_width.grad.fill_(torch.inf)
        if seed == 0:
            scaler.unscale_(optimizer)
            for each in (model, other):
                nn.utils.clip_grad_norm_(each.parameters(), 0.01)
        scaler.step(optimizer)
        if not overflow:
            expected.step()
        scaler.update()
        assert_same(model, other, lambda *pair: torch.testing.assert_close(*pair) is None)


def test_frozen_widths_and_parameters_without_gradient_stay():
    model = network()
    model[1].log_width.requires_grad_(False)
    before = [value.detach().clone() for value in neurons_of(model)]
    optimizer = sgd(model)
    optimizer.step()
    assert all(map(torch.equal, neurons_of(model), before))
    gradients(0, model)
    optimizer.step()
    assert torch.equal(model[1].log_width, before[0])
    assert not torch.equal(model[3].log_width, before[2])


def test_optimizers_without_such_groups_are_as_ever():
    parameter_groups(network(), 0.1)  # registers the hooks of all optimizers
    value = nn.Parameter(torch.ones(3))
    value.grad = torch.full((3,), 2.0)  # not 1, with which Adam's first step is the same
    torch.optim.SGD([value], lr=0.5).step()
    assert torch.equal(value, torch.zeros(3))


# ---- the warning ----


def plain(*between, layers=2):
    torch.manual_seed(0)
    blocks = [[nn.Linear(64, 64), *between, LIF()] for _ in range(layers)]
    return nn.Sequential(*(each for block in blocks for each in block), nn.Linear(64, 10))


def calibrated():
    model = plain()
    asgl_cuda.calibrate(model, torch.rand(4, 32, 64))
    return model


def with_another_initialisation():
    model = plain()
    for layer in model[::2]:
        nn.init.uniform_(layer.weight, -0.1, 0.1)
    return model


def test_a_model_that_is_likely_silent_is_named_once(monkeypatch):
    monkeypatch.setattr(asgl_cuda.checks, "_warned", set())
    words = r"asgl_cuda\.parameter_groups: the model has several .* silent.* asgl_cuda\.calibrate.* If another module"
    with pytest.warns(UserWarning, match=words) as found:
        parameter_groups(plain(), 0.1)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter_groups(plain(), 0.1)


OTHERS = {
    "calibrated": calibrated,
    "another initialisation": with_another_initialisation,
    "one layer": lambda: plain(layers=1),
    "LayerNorm": lambda: plain(nn.LayerNorm(64)),
    "BatchNormLIF": lambda: nn.Sequential(plain(), asgl_cuda.BatchNormLIF(10)),
    "meta": lambda: plain().to("meta"),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_others_are_not(make, monkeypatch):
    model = make()
    monkeypatch.setattr(asgl_cuda.checks, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter_groups(model, 0.1)
