"""Studies of neurons in small networks: adaptation, calibration, and a convolutional residual network.

`adaptation` compares LIF with adLIF and ALIF, on delayed recall and on vowels. In recall, one of four groups of ten
channels fires for ten steps, among noise, and after a delay a cue asks which one it was. Vowels are 29 steps of speech,
centred and scaled. Networks have one or two layers of 64 neurons, which learn a decay and an adaptation per neuron.

`calibration`: test accuracy of networks without normalisation, by the rate of `asgl_cuda.calibrate`. Each network is
trained by SGD with momentum and by Adam, from torch's default weights and from the same weights calibrated to a rate on
256 training samples. The last layer's rate is measured before training.

`residual_network`: the width fixed, learned, and learned with noise, at two first widths. Nine convolutions with
normalisation and neurons in four residual blocks, T = 4, trained on MNIST at 14 x 14 by SGD with momentum and by Adam,
with the groups of `asgl_cuda.parameter_groups`, along half a cosine. Test accuracies after every epoch are by hard
spikes. It is the largest network that is trained for these pages; CIFAR and ImageNet need a GPU.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import LIF, OverTime

from .data import SOURCES, Data, standardised
from .optimizers import RATES, accuracy_of, fit, optimizer_of
from .recipe.networks import ResNet
from .studies import Report, Study, spread, text_of

# Of the neurons in all three studies, unless a study says otherwise.
NEURON: dict[str, Any] = {"surrogate": "rectangle", "analog_prob": 0.2, "detach_reset": False}

# ---- adaptation ----

ADAPTED_SEEDS, HIDDEN = 5, 64
ADAPTED_STEPS = {"recall": 400, "vowels": 360}
TASKS = ("recall, 50 steps", "recall, 100 steps", "vowels")
PATTERNS, PATTERN_STEPS, CUE_STEPS = 4, 10, 5
# The decay at the start, and the adaptation; None for the ordinary neuron.
NEURONS: dict[str, tuple[float, dict[str, Any] | None]] = {
    "LIF, decay 0.9": (0.9, None),
    "LIF, decay 0.98": (0.98, None),
    "adLIF": (0.9, {}),
    "ALIF": (0.9, {"to_threshold": True}),
}


class Adapted(NamedTuple):
    """The training runs of one cell, for all seeds."""

    task: str
    neuron: str
    steps: int


def recall(samples: int, delay: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Events `[T, samples, 41]`, whose last channel is the cue, and the index of the group to recall in each sample."""
    labels = torch.randint(PATTERNS, (samples,), generator=generator)
    shape = PATTERN_STEPS + delay + CUE_STEPS, samples, 10 * PATTERNS + 1
    x_seq = (torch.rand(shape, generator=generator) < 0.02).float()
    fired = (torch.rand(PATTERN_STEPS, samples, 10, generator=generator) < 0.5).float()
    channels = 10 * labels[:, None] + torch.arange(10)
    x_seq[:PATTERN_STEPS].scatter_(2, channels.expand_as(fired), fired)
    x_seq[-CUE_STEPS:, :, -1] = 1
    return x_seq, labels


def adapted_network(features: int, classes: int, layers: int, neuron: str) -> nn.Sequential:
    decay, adaptation = NEURONS[neuron]
    options: dict[str, Any] = {
        "granularity": "neuron", "learn_decay": True, "decay": decay, "v_reset": None, **NEURON
    }  # fmt: skip
    made: list[nn.Module] = []
    for inputs in (features, *(HIDDEN,) * (layers - 1)):
        adapting = None if adaptation is None else {**options, **adaptation, "learn_adaptation": True}
        hidden = asgl_cuda.LIF(HIDDEN, **options) if adapting is None else asgl_cuda.AdaptiveLIF(HIDDEN, **adapting)
        made += [nn.Linear(inputs, HIDDEN), hidden]
    return nn.Sequential(*made, nn.Linear(HIDDEN, classes), asgl_cuda.LeakyIntegrator(decay=0.9, input_gain=0.1))


def train_adapted(run: Adapted, seeds: int = ADAPTED_SEEDS) -> list[float]:
    """Trains one network per seed. Returns their test accuracies in percent."""
    return [_accuracy(run, seed) for seed in range(seeds)]


def _accuracy(run: Adapted, seed: int) -> float:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    if run.task == "vowels":
        data = standardised(SOURCES["vowels"].read(None))
        samples = data.train.transpose(0, 1)
        net = adapted_network(samples.shape[2], data.classes, 2, run.neuron)
        asgl_cuda.calibrate(net, samples[:, :128])
        chosen = (torch.randint(samples.shape[1], (32,), generator=draw) for _ in range(run.steps))
        batches: Iterator[tuple[Tensor, Tensor]] = ((samples[:, each], data.train_labels[each]) for each in chosen)
        tested = data.test.transpose(0, 1), data.test_labels
        read_out, rate = slice(None), 2e-3
    else:
        delay = int(run.task.split()[1])
        net = adapted_network(10 * PATTERNS + 1, PATTERNS, 1, run.neuron)
        batches = (recall(64, delay, draw) for _ in range(run.steps))
        tested = recall(1000, delay, torch.Generator().manual_seed(seed + 1000))
        read_out, rate = slice(-CUE_STEPS, None), 5e-3

    def scores(x_seq: Tensor) -> Tensor:
        return 5 * net(x_seq)[read_out].mean(0)

    optimizer = torch.optim.Adam(asgl_cuda.parameter_groups(net, lr=rate, width_lr=rate))
    fit(lambda batch: functional.cross_entropy(scores(batch[0]), batch[1]), batches, optimizer)
    return round(accuracy_of(net, scores, *tested, dim=1), 2)


def adaptation_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: the mean, the lowest and the highest accuracies."""
    tasks = list(dict.fromkeys(name.partition(": ")[0] for name in report["runs"]))
    found = [[neuron, *(spread(report["runs"][f"{task}: {neuron}"]) for task in tasks)] for neuron in NEURONS]
    return ["", *tasks], found


ADAPTED = [Adapted(*each, ADAPTED_STEPS[each[0].split(",")[0]]) for each in itertools.product(TASKS, NEURONS)]
ADAPTATION = Study(
    "adaptation", {"settings": {"seeds": ADAPTED_SEEDS, "hidden": HIDDEN, "steps": ADAPTED_STEPS}}, ADAPTED,
    train_adapted, text=lambda run: f"{run.task}: {run.neuron}",
)  # fmt: skip

# ---- calibration ----

FIRING_RATES = (None, 0.05, 0.1, 0.2, 0.4)  # None: not calibrated
SEEDS = 3
STEPS = 350
BATCH = 64
SAMPLES = 256  # to calibrate on
TIME_STEPS = 4  # of an image
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
}


class OverSamples(nn.Sequential):
    """A network from samples `[B, T, ...]` to scores `[B, classes]`, which are means over time."""

    def forward(self, samples: Tensor) -> Tensor:
        x_seq = samples.transpose(0, 1)
        if x_seq.shape[0] == 1:
            x_seq = x_seq.expand(TIME_STEPS, *x_seq.shape[1:])
        scores: Tensor = super().forward(x_seq)
        return scores.mean(0)


def linear(inputs: int, layers: int, classes: int, **neuron: Any) -> nn.Module:
    hidden = [(nn.Linear(*pair), LIF(**NEURON | neuron)) for pair in itertools.pairwise((inputs, *(128,) * layers))]
    return OverSamples(nn.Flatten(2), *itertools.chain(*hidden), nn.Linear(128, classes))


def convolutional(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((1, 16, 16, 32, 32)):
        if inputs < outputs == 32:
            layers.append(OverTime(nn.MaxPool2d(2)))
        layers += [OverTime(nn.Conv2d(inputs, outputs, 3, padding=1)), LIF(**NEURON)]
    return OverSamples(*layers, nn.Flatten(2), nn.Linear(512, 128), LIF(**NEURON), nn.Linear(128, classes))


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {  # the data, and the network
    "digits, 2 layers": ("digits", partial(linear, 64, 2, 10)),
    "digits, 6 layers": ("digits", partial(linear, 64, 6, 10)),
    "digits, 12 layers": ("digits", partial(linear, 64, 12, 10)),
    "digits, 12 layers, triangle": ("digits", partial(linear, 64, 12, 10, surrogate="triangle")),
    "digits, convolutional, 5 layers": ("digits", partial(convolutional, 10)),
    "vowels, 6 layers": ("vowels", partial(linear, 12, 6, 9)),
}


class Calibrated(NamedTuple):
    """One training."""

    network: str
    optimizer: str
    rate: float | None
    seed: int


def train_calibrated(run: Calibrated, steps: int = STEPS) -> dict[str, Any]:
    """Trains a network. Returns its test accuracy in percent, and the last layer's firing rate before training.

    Both are None if no factor on the weights reaches the rate, as with mostly silent samples.
    """
    torch.manual_seed(run.seed)
    name, make = NETWORKS[run.network]
    data = SOURCES[name].read(None)
    model = make()
    samples = data.train[torch.randperm(len(data.train))[:SAMPLES]]
    if run.rate is not None:
        try:
            asgl_cuda.calibrate(model, samples, run.rate)
        except ValueError:
            return {"accuracy": None, "last_rate": None}
    with asgl_cuda.spiking_eval(model), asgl_cuda.Monitor(model) as monitor, torch.no_grad():
        model(samples)
    *_, last = monitor.result().values()
    batches = (torch.randint(len(data.train), (BATCH,)) for _ in range(steps))
    optimizer = OPTIMIZERS[run.optimizer](model.parameters())
    fit(lambda each: functional.cross_entropy(model(data.train[each]), data.train_labels[each]), batches, optimizer)
    return {"accuracy": accuracy_of(model, model, data.test, data.test_labels), "last_rate": last["firing_rate"]}


def calibration_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: mean accuracies over seeds by rate, and the last layer's rate before calibration."""
    rates = list(dict.fromkeys(run["rate"] for run in report["runs"]))
    found: dict[str, dict[float | None, list[dict[str, Any]]]] = {}
    for run in report["runs"]:
        found.setdefault(f"{run['network']}, {run['optimizer']}", {}).setdefault(run["rate"], []).append(run)
    table = []
    for name, by_rate in found.items():
        cells = []
        for rate in rates:
            reached = [run["accuracy"] for run in by_rate[rate] if run["accuracy"] is not None]
            cells.append(f"{statistics.fmean(reached):.1f}" if len(reached) == len(by_rate[rate]) else "out of reach")
        last = statistics.fmean(run["last_rate"] for run in by_rate[None])
        table.append([name, f"{last:.4f}", *cells])
    names = ("as made" if rate is None else f"{rate:g}" for rate in rates)
    return ["", "rate of the last layer, as made", *names], table


CALIBRATED = [Calibrated(*each) for each in itertools.product(NETWORKS, OPTIMIZERS, FIRING_RATES, range(SEEDS))]
CALIBRATION = Study(
    "calibration", {"settings": {"steps": STEPS, "batch": BATCH, "samples": SAMPLES, "seeds": SEEDS}}, CALIBRATED,
    train_calibrated, listed=True,
)  # fmt: skip

# ---- residual_network ----

WIDTHS = (1.0, 10.0)
EPOCHS = 4
RESIDUAL: dict[str, Any] = {
    "seeds": SEEDS, "channels": 16, "time_steps": TIME_STEPS, "epochs": EPOCHS, "batch": BATCH, "rates": RATES,
    "surrogate": NEURON["surrogate"], "parameters": 96323,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "SG": {"learn_width": False, "analog_prob": 0.0},
    "learned": {"analog_prob": 0.0},
    "ASGL": {"analog_prob": 0.2},
}


class Residual(NamedTuple):
    """One training."""

    optimizer: str
    width: float
    arm: str
    seed: int


def residual_network(channels: int = RESIDUAL["channels"], **neuron: Any) -> nn.Module:
    """A network from images `[T, B, 1, H, W]` to scores `[T, B, 10]`. Normalisations are fused with the neurons."""
    make = partial(LIF, **NEURON | neuron)
    stages = (channels, 2 * channels, 4 * channels)
    fused, _ = asgl_cuda.fuse(ResNet(stages, (1, 2, 1), 0, 1, 10, make), torch.zeros(1, 2, 1, 28, 28), inplace=True)
    return fused


@cache
def read_mnist() -> Data:
    return SOURCES["mnist"].read(None)


def train_residual(run: Residual, epochs: int = EPOCHS, channels: int = RESIDUAL["channels"]) -> dict[str, Any]:
    """Trains a network. Returns its test accuracies in percent and mean training losses by epoch, and final widths."""
    data = read_mnist()
    images, labels = data.train[:, 0], data.train_labels
    torch.manual_seed(run.seed)
    model = residual_network(channels, width=run.width, **ARMS[run.arm])
    optimizer = optimizer_of(model, run.optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(images) / BATCH))

    def scores_of(images: Tensor) -> Tensor:
        scores: Tensor = model(images.expand(TIME_STEPS, *images.shape)).mean(0)
        return scores

    def loss_of(batch: Tensor) -> Tensor:
        return functional.cross_entropy(scores_of(images[batch]), labels[batch])

    accuracies, losses = [], []
    for _ in range(epochs):
        found = fit(loss_of, torch.randperm(len(images)).split(BATCH), optimizer, schedule)
        losses.append(round(statistics.fmean(found), 4))
        accuracies.append(round(accuracy_of(model, scores_of, data.test[:, 0], data.test_labels), 2))
    widths = [round(torch.as_tensor(layer.width).item(), 3) for _, layer in asgl_cuda.asgl_layers(model)]
    return {"accuracies": accuracies, "losses": losses, "widths": widths}


def by_seed(report: Report, *run: Any) -> list[dict[str, Any]]:
    found = (report["runs"].get(text_of((*run, seed))) for seed in range(SEEDS))
    return [each for each in found if each is not None]


def residual_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: the mean, the lowest and the highest accuracies after each epoch."""
    marks = range(EPOCHS)
    found = []
    for optimizer, width, arm in itertools.product(RATES, WIDTHS, ARMS):
        if seeds := by_seed(report, optimizer, width, arm):
            cells = [spread([each["accuracies"][mark] for each in seeds]) for mark in marks]
            mean = statistics.fmean(statistics.fmean(each["widths"]) for each in seeds)
            found.append([f"{optimizer}, width {width:g}, {arm}", *cells, f"{mean:.2f}"])
    return ["", *(f"epoch {mark + 1}" for mark in marks), "mean width, end"], found


RESIDUALS = [Residual(*each[1:], each[0]) for each in itertools.product(range(SEEDS), RATES, WIDTHS, ARMS)]
RESIDUAL_NETWORK = Study("residual_network", {"settings": RESIDUAL}, RESIDUALS, train_residual)
