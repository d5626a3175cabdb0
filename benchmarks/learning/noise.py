"""Studies of the noise: what it gains, how true its gradients are, and how it smooths.

`noise`: accuracies with shares of analog elements, less those of the same learned widths without noise. Cells are data
sets, one time step or several, 60 and 250 steps, a first width of 1 or 10; in each, weights by SGD with momentum and by
Adam, and two surrogates. Every arm has five learning rates, one of which is chosen by accuracy on a fifth of the
training samples, the mean over the seeds; the tables show accuracy on the test samples, and mark what chose the least
or the largest rate. Differences are paired by seed: weights and the order of the samples are the same. One task has
controls: a fixed width, all elements analog, a share that falls, and dropout of spikes. Widths take the step of
`asgl_cuda.parameter_groups`. Long sequences are halved.

`gradients`: at marks of a training the gradient of a batch is taken as the training takes it, with its noise. A step
against it, of all weights, so long that it predicts the loss to fall by a hundredth, is tried. The measured change,
divided by the prediction, is that of the loss with the same noise, and that of the loss of the embedded spiking
network, with hard spikes alone. 1 is a true gradient, 0 a useless one, 2 as far from the truth as 0. Three arms: the
width fixed, learned without noise, and learned with noise; differences between the last two are paired.

`smoothing`: networks of six layers with learned widths learn the digits. After each epoch, as means over the layers:
the width, the share of elements whose potential is inside the window of the surrogate, and the smoothing error, the
mean distance of the smooth value from its spike. For the whole network, on the test images: its loss with noise, also
where it was trained without, and the loss of the spiking network with the same weights.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda.training.groups import WIDTH_LR

from .batched import Networks, Setting, flat, read, trained
from .data import Data
from .demo import ANALOG_PROB, BATCH_SIZE, load_data, scores_of, spiking_mlp
from .optimizers import ADAM, RATES, SGD, fit, optimizer_of
from .studies import Report, Study, paired, text_of

# ---- noise ----

TRIED = {SGD: (0.03, 0.1, 0.3, 1.0, 3.0), ADAM: (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
SURROGATES = ("rectangle", "sigmoid")
SEEDS = 10
HOW = tuple(itertools.product(TRIED, SURROGATES))
HEAD = ["", *map(", ".join, HOW)]
EDGE = " *"  # of a gain, where an arm chose the least or the largest rate
QUIET = "0"  # the arm that the others are compared with
SHARES: dict[str, dict[str, Any]] = {QUIET: {}, "0.2": {"analog_prob": 0.2}, "0.5": {"analog_prob": 0.5}}
CONTROLS: dict[str, dict[str, Any]] = {
    "1": {"analog_prob": 1.0},
    "0.5 to 0": {"analog_prob": 0.5, "annealed": True},
    "fixed width": {"learned": False},
    **{f"dropout {share:g}": {"dropout": share} for share in (0.02, 0.05, 0.1, 0.2, 0.5)},
}
ARMS = SHARES | CONTROLS


class Compared(NamedTuple):
    """The runs of all seeds with one learning rate. A cell is all fields but the last two, a task the first four."""

    data: str
    time_steps: int  # 0: those of the data
    steps: int
    width: float
    optimizer: str
    surrogate: str
    rate: float
    arm: str


TASKS = (
    ("digits", 1, 60, 1.0), ("digits", 1, 250, 1.0), ("digits", 4, 60, 1.0), ("digits", 4, 250, 1.0),
    ("digits", 4, 250, 10.0), ("mnist", 1, 250, 1.0), ("tones", 0, 250, 1.0),
)  # fmt: skip
CONTROLLED = TASKS[1]
CELLS = [(*task, *how) for task in TASKS for how in HOW]
COMPARED = [
    Compared(*cell, rate, arm)
    for cell in CELLS
    for arm, rate in itertools.product(ARMS if cell[:4] == CONTROLLED else SHARES, TRIED[cell[4]])
]


@cache
def read_with_validation(name: str) -> tuple[Data, Tensor, Tensor]:
    """A data set without the samples for validation, and these samples with their labels."""
    data = read(name)
    train, validation, train_labels, validation_labels = train_test_split(
        data.train, data.train_labels, test_size=0.2, stratify=data.train_labels, random_state=0
    )
    return data._replace(train=train, train_labels=train_labels), validation, validation_labels


def train_arm(run: Compared, seeds: int = SEEDS) -> dict[str, Any]:
    """Trains networks: mean validation accuracy, test accuracies, and the final widths as means over the layers."""
    data, validation, validation_labels = read_with_validation(run.data)
    setting = Setting(
        run.width, steps=run.steps, time_steps=run.time_steps or data.train.shape[1], rate=run.rate,
        optimizer=run.optimizer, surrogate=run.surrogate, width_rate=WIDTH_LR, **ARMS[run.arm],
    )  # fmt: skip
    networks = trained(data, setting, range(seeds))
    return {
        "validation": statistics.fmean(networks.accuracies(flat(validation), validation_labels)),
        "test": networks.accuracies(flat(data.test), data.test_labels),
        "widths": [round(statistics.fmean(widths), 3) for widths in networks.widths()],
    }


class Gain(NamedTuple):
    """The gain of an arm over the arm without noise, each at the rate that validation chose, +- half its interval."""

    quiet: float  # mean accuracy of the quiet arm
    mean: float
    half: float
    at_edge: bool  # one of the two chose the least or the largest rate that was tried

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}{EDGE if self.at_edge else ''}"


def gain_of(report: Report, cell: tuple[Any, ...], arm: str) -> Gain | None:
    """The gain of an arm; None if the arm was not trained."""
    rates, chosen = TRIED[cell[4]], {}
    for each in (QUIET, arm):
        found = {rate: report["runs"].get(text_of((*cell, rate, each))) for rate in rates}
        if not all(found.values()):
            return None
        chosen[each] = max(rates, key=lambda rate: found[rate]["validation"])
    quiet, gained = (report["runs"][text_of((*cell, chosen[each], each))]["test"] for each in (QUIET, arm))
    at_edge = not {*chosen.values()}.isdisjoint((rates[0], rates[-1]))
    return Gain(statistics.fmean(quiet), *paired(gained, quiet), at_edge)


def named(task: tuple[Any, ...]) -> str:
    """A task, or the task of a cell."""
    data, time_steps, steps, width, *_ = task
    time = f", T = {time_steps}" if time_steps else ""
    return f"{data}{time}, {steps} steps, width {width:g}"


def noise_rows(report: Report, arm: str) -> Iterator[list[str]]:
    """A row per task: the accuracy without noise and the gain of an arm, by optimizer and surrogate."""
    for task in TASKS:
        gains = [(gain_of(report, cell, QUIET), gain_of(report, cell, arm)) for cell in CELLS if cell[:4] == task]
        if any(quiet for quiet, _ in gains):
            yield [named(task), *(f"{quiet.quiet:.1f}, {gain or ''}" if quiet else "" for quiet, gain in gains)]


def control_rows(report: Report) -> Iterator[list[str]]:
    """A row per arm: its gain in each cell that has controls."""
    for arm in ARMS:
        if arm != QUIET:
            yield [arm, *(str(gain_of(report, cell, arm) or "") for cell in CELLS if cell[:4] == CONTROLLED)]


NOISE_SETTINGS = {"settings": {"seeds": SEEDS, "base": Setting(1.0)._asdict()}}
NOISE = Study("noise", NOISE_SETTINGS, COMPARED, train_arm)

# ---- gradients ----

DATA = "digits"
STEPS, MARKS = 120, (0, 20, 60, 119)
BATCH = 512
FIRST_WIDTHS = (1.0, 5.0)
PREDICTED = 0.01  # of the loss
NOISY = "learned, noise 0.2"
FIDELITY_ARMS: dict[str, dict[str, Any]] = {"fixed": {"learned": False}, "learned": {}, NOISY: {"analog_prob": 0.2}}


class Followed(NamedTuple):
    """The training runs of all arms and seeds."""

    optimizer: str
    surrogate: str
    width: float


def fidelity(networks: Networks, samples: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """The measured change of the loss divided by the predicted one, with the same noise and without, of each network.

    Weights are restored afterwards.
    """
    seeds = len(networks.seeds)
    state = {key: value.clone() for key, value in networks.state_dict().items()}
    weights, generator = [*networks.weights], torch.get_rng_state()

    def loss(analog_prob: float) -> Tensor:
        torch.set_rng_state(generator)
        return networks.loss(samples[None], labels.expand(seeds, -1), analog_prob)

    losses = {"same noise": networks.setting.analog_prob, "spiking": 0.0}
    before = {name: loss(prob).detach() for name, prob in losses.items()}
    noisy = loss(networks.setting.analog_prob)
    grads = torch.autograd.grad(noisy.sum(), weights)
    predicted = PREDICTED * noisy.detach()
    size = predicted / sum(grad.square().sum((1, 2)) for grad in grads)
    with torch.no_grad():
        for weight, grad in zip(weights, grads, strict=True):
            weight -= size[:, None, None] * grad
        change = {name: (before[name] - loss(prob)) / predicted for name, prob in losses.items()}
    networks.load_state_dict(state)
    return {name: [round(value, 4) for value in values.tolist()] for name, values in change.items()}


def fidelities(data: Data, run: Followed, arm: str, seeds: int = SEEDS, steps: int = STEPS) -> dict[str, Any]:
    """The fidelities at each mark, by seed."""
    found: dict[str, Any] = {}
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:BATCH]
    samples, labels = flat(data.train)[chosen], data.train_labels[chosen]

    def observe(networks: Networks, step: int) -> None:
        if step in MARKS:
            found[str(step)] = fidelity(networks, samples, labels)

    how = {"optimizer": run.optimizer, "rate": RATES[run.optimizer], "surrogate": run.surrogate}
    trained(data, Setting(run.width, steps=steps, **how, **FIDELITY_ARMS[arm]), range(seeds), observe)
    return found


def train_followed(run: Followed) -> dict[str, Any]:
    data = read(DATA)
    return {arm: fidelities(data, run, arm) for arm in FIDELITY_ARMS}


def gradient_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: measured by predicted change by arm, and what noise adds to its distance from 1."""
    found = []
    for case, arms in report["runs"].items():
        for mark, quiet in arms["learned"].items():
            cells = [f"{statistics.fmean(by_mark[mark]['same noise']):.2f}" for by_mark in arms.values()]
            for name in ("same noise", "spiking"):
                noisy, without = ([abs(value - 1) for value in each[name]] for each in (arms[NOISY][mark], quiet))
                cells.append("{:+.2f} ± {:.2f}".format(*paired(noisy, without)))
            found.append([f"{case}, step {mark}", *cells])
    return ["", *FIDELITY_ARMS, "distance from 1, by noise", "for the spiking network"], found


FOLLOWED = [Followed(*each) for each in itertools.product(RATES, SURROGATES, FIRST_WIDTHS)]
GRADIENTS = Study(
    "gradients", {"data": DATA, "seeds": SEEDS}, FOLLOWED, train_followed,
    text=lambda run: "{}, {}, width {:g}".format(*run),
)  # fmt: skip

# ---- smoothing ----

HIDDEN = (64,) * 6
OBSERVED_SEEDS, EPOCHS = 3, 15
OBSERVED = ("width", "inside", "smoothing_error")  # reported by asgl_cuda.Monitor for each layer
LOSSES = {"noisy_loss": "noisy network", "spiking_loss": "embedded spiking network"}
NOISE_DRAWS = 20  # for the mean of the noisy network's loss
SMOOTHED_ARMS = {"noise": ANALOG_PROB, "no noise": 0.0}


class Smoothed(NamedTuple):
    """The training runs of all seeds."""

    optimizer: str
    surrogate: str
    width: float
    arm: str


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores_of(model, images), labels)


@torch.no_grad()
def observe(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The quantities in OBSERVED without noise, as means over the layers, and the losses with and without noise."""
    model.eval()
    with asgl_cuda.Monitor(model) as monitor:
        spiking = loss_of(model, images, labels).item()
    layers = monitor.result().values()
    neurons = [neuron for _, neuron in asgl_cuda.asgl_layers(model)]
    probs = [neuron.analog_prob for neuron in neurons]
    for neuron in neurons:
        neuron.train()  # only neurons, so that only the noise differs
        neuron.analog_prob = ANALOG_PROB
    noisy = [loss_of(model, images, labels).item() for _ in range(NOISE_DRAWS)]
    for neuron, prob in zip(neurons, probs, strict=True):
        neuron.analog_prob = prob
    model.train()
    means = {key: statistics.fmean(layer[key] for layer in layers) for key in OBSERVED}
    return {**means, "noisy_loss": statistics.fmean(noisy), "spiking_loss": spiking}


def observations(run: Smoothed, seed: int, epochs: int) -> list[dict[str, float]]:
    """Trains a network. Returns what `observe` measures before the first epoch and after each."""
    images, test_images, labels, test_labels = load_data(seed)
    torch.manual_seed(seed)
    neuron = {"width": run.width, "surrogate": run.surrogate, "analog_prob": SMOOTHED_ARMS[run.arm]}
    model = spiking_mlp(HIDDEN, **neuron)
    optimizer = optimizer_of(model, run.optimizer)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // BATCH_SIZE))
    found = [observe(model, test_images, test_labels)]
    for _ in range(epochs):
        batches = torch.randperm(len(images)).split(BATCH_SIZE)
        fit(lambda each: loss_of(model, images[each], labels[each]), batches, optimizer, cosine)
        found.append(observe(model, test_images, test_labels))
    return found


def over_seeds(runs: Sequence[list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Means and standard deviations of each quantity, by epoch."""
    by_epoch = [{key: [epoch[key] for epoch in epochs] for key in epochs[0]} for epochs in zip(*runs, strict=True)]
    return {
        key: {
            "mean": [round(statistics.fmean(values[key]), 5) for values in by_epoch],
            "deviation": [round(statistics.stdev(values[key]), 5) for values in by_epoch],
        }
        for key in by_epoch[0]
    }


def train_observed(run: Smoothed, seeds: int = OBSERVED_SEEDS, epochs: int = EPOCHS) -> dict[str, Any]:
    return {"observed": over_seeds([observations(run, seed, epochs) for seed in range(seeds)])}


def case_of(run: dict[str, Any]) -> str:
    return f"{run['optimizer']}, {run['surrogate']}, width {run['width']:g}"


def smoothing_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: widths and errors at the start and the end, losses at the end."""
    found = []
    for each in report["runs"]:
        observed = each["observed"]
        cells = [
            f"{observed[key]['mean'][0]:.2f} to {observed[key]['mean'][-1]:.2f} ± {observed[key]['deviation'][-1]:.2f}"
            for key in ("width", "smoothing_error")
        ]
        cells += [f"{observed[key]['mean'][-1]:.3f} ± {observed[key]['deviation'][-1]:.3f}" for key in LOSSES]
        found.append([f"{case_of(each)}, {each['arm']}", *cells])
    return ["", "learned width", "smoothing error", "loss, noisy", "loss, spiking"], found


SMOOTHED = [Smoothed(*each) for each in itertools.product(RATES, SURROGATES, FIRST_WIDTHS, SMOOTHED_ARMS)]
SMOOTHING = Study(
    "smoothing", {"seeds": OBSERVED_SEEDS, "epochs": EPOCHS}, SMOOTHED, train_observed, listed=True,
)  # fmt: skip
