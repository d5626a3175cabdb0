"""Networks that are trained at once learn as if alone, by layers and optimizers of torch."""

import itertools

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch
from torch import nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import OverTime
from benchmarks.learning import batched
from benchmarks.learning.batched import Networks, Setting
from benchmarks.learning.data import Data
from benchmarks.learning.optimizers import ADAM, MOMENTUM, WEIGHT_DECAY

SEEDS = (3, 1, 2)


def data(time, features=5, count=30):
    torch.manual_seed(0)
    labels = torch.arange(count) % 3
    samples = torch.rand(count, time, features, dtype=torch.float64) + labels.reshape(-1, 1, 1)
    return Data(samples, labels, samples, labels)


@pytest.fixture(autouse=True)
def doubles():
    """Rounding flips no spike."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def optimizers_of(model, setting):
    """Each parameter in the group that its name says."""
    rates = {"log_width": setting.width_rate, "logit_decay": setting.decay_rate, "threshold": setting.decay_rate}
    named = list(model.named_parameters())
    neurons = [
        {"params": [value for key, value in named if key.endswith(name)], "lr": rate}
        for name, rate in rates.items()
        if any(key.endswith(name) for key, _ in named)
    ]
    weights = {"params": [value for key, value in named if not key.endswith(tuple(rates))]}
    if setting.optimizer == ADAM:
        return [torch.optim.Adam([weights, *neurons], setting.rate)]
    weights["weight_decay"] = WEIGHT_DECAY
    together = [weights, *neurons] if setting.width_by_weights else [weights]
    apart = [] if setting.width_by_weights or not neurons else [torch.optim.Adam(neurons)]
    return [torch.optim.SGD(together, setting.rate, MOMENTUM), *apart]


def alone(found, setting, seed):
    """A training of one network in layers."""
    torch.manual_seed(seed)
    sizes = (found.train.shape[2], *(batched.HIDDEN,) * setting.layers)
    linear = [nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)]
    layers = []
    for each in linear:
        neuron = asgl_cuda.LIF(
            batched.HIDDEN if setting.by_channel else None,
            granularity="channel" if setting.by_channel else "layer",
            decay=batched.DECAY,
            width=setting.width,
            surrogate=setting.surrogate,
            analog_prob=setting.analog_prob,
            learn_width=setting.learned,
            learn_decay=setting.decay_rate is not None,
            learn_threshold=setting.decay_rate is not None,
        )
        layers += [OverTime(each), OverTime(nn.BatchNorm1d(batched.HIDDEN)), neuron]
    model = nn.Sequential(*layers, nn.Linear(batched.HIDDEN, 3))
    optimizers = optimizers_of(model, setting)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, setting.steps) for each in optimizers]
    steppers = [*optimizers, *schedules]

    def scores(samples):
        x_seq = samples.transpose(0, 1)
        return model(x_seq.expand(setting.time_steps, -1, -1) if len(x_seq) == 1 else x_seq).mean(0)

    for (order,) in batched.orders(len(found.train), setting, [seed]):
        model.zero_grad()
        functional.cross_entropy(scores(found.train[order]), found.train_labels[order]).backward()
        for stepper in steppers:
            stepper.step()
    return model.eval(), scores(found.test).detach()


@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learned": False, "layers": 2},
        {"analog_prob": 1.0},
        {"width_by_weights": True, "width_rate": 0.01},
        {"optimizer": ADAM, "rate": 3e-3, "decay_rate": 0.01},
        {"by_channel": True, "surrogate": "triangle"},
    ],
    ids=str,
)
def test_equals_trainings_of_one(time, options):
    found = data(time)
    setting = Setting(2.0, steps=8, batch=12, time_steps=3, **options)
    networks = batched.trained(found, setting, SEEDS).eval()
    together = networks(found.test[None]).detach()
    for number, seed in enumerate(SEEDS):
        model, scores = alone(found, setting, seed)
        torch.testing.assert_close(together[number].T, scores)
        widths = [float(torch.as_tensor(layer.width).detach().mean()) for _, layer in asgl_cuda.asgl_layers(model)]
        assert networks.widths()[number] == pytest.approx(widths, abs=1e-4)
        assert (widths == [2.0] * setting.layers) == (not setting.learned)


def test_seeds_differ_and_arms_begin_with_the_same_weights():
    settings = Setting(1.0), Setting(5.0, learned=False)
    one, other = (Networks(5, 3, SEEDS, setting) for setting in settings)
    assert all(map(torch.equal, one.weights, other.weights))
    assert not torch.equal(one.weights[0][0], one.weights[0][1])


def test_accuracies_are_by_hard_spikes_without_dropout():
    found = data(2)
    networks = batched.trained(found, Setting(1.0, analog_prob=0.5, dropout=0.2, steps=60), SEEDS)
    accuracies = networks.accuracies(found.test, found.test_labels)
    assert accuracies == networks.accuracies(found.test, found.test_labels)
    assert min(accuracies) > 90
    assert networks.training
    labels = networks.eval()(found.test[None]).argmax(1)
    assert accuracies == pytest.approx((100 * (labels == found.test_labels).double().mean(1)).tolist(), abs=1e-3)


def test_noise_is_annealed_to_nothing(monkeypatch):
    probs = []
    lif = asgl_cuda.lif
    monkeypatch.setattr(asgl_cuda, "lif", lambda *a, **o: probs.append(o["analog_prob"]) or lif(*a, **o))
    batched.trained(data(1), Setting(1.0, analog_prob=0.5, annealed=True, steps=4), SEEDS)
    assert probs[::6] == pytest.approx([0.5, 0.25 + 0.125 * 2**0.5, 0.25, 0.25 - 0.125 * 2**0.5])


def test_every_sample_once_an_epoch():
    orders = batched.orders(10, Setting(1.0, steps=5, batch=4), SEEDS)
    assert orders.shape == (5, 3, 4)
    for order in orders.transpose(0, 1):
        assert sorted(order.flatten()[:10].tolist()) == sorted(order.flatten()[10:].tolist()) == list(range(10))
    assert not torch.equal(orders[:, 0], orders[:, 1])
