"""Trains networks on the Spiking Heidelberg Digits: `python -m benchmarks.learning.spoken --data-root DIR`.

DIR/SHD has `shd_train.h5` and `shd_test.h5`, as published by Cramer, Stradmann, Schemmel, Zenke: The Heidelberg spiking
data sets for the systematic evaluation of spiking neural networks, IEEE TNNLS 2022. One hidden layer of neurons,
without recurrence, with it, and with recurrence and adaptation (RadLIF), is trained on the same samples in the same
order. The loss is the cross-entropy of the mean of a leaky readout. After each epoch the accuracy on the test samples
is printed; it chooses nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import LIF, LeakyIntegrator, RecurrentLIF

from ..common import parser_of
from .data import SOURCES, Data
from .optimizers import accuracy_of, fit

BATCH_SIZE = 128
RATE = 1e-3
HARD: dict[str, Any] = {"decay": 0.95, "granularity": "neuron", "learn_decay": True, "surrogate": "triangle",
                        "analog_prob": 0.0}  # fmt: skip
ADAPTATION: dict[str, Any] = {"adapt_decay": 0.97, "adapt_spike": 0.1, "learn_adaptation": True}
NEURONS = {
    "LIF": lambda count: LIF(count, **HARD),
    "recurrent": lambda count: RecurrentLIF(count, bias=False, **HARD),
    "recurrent and adaptive": lambda count: RecurrentLIF(count, bias=False, **HARD, **ADAPTATION),
}


def network(neurons: str, hidden: int, data: Data) -> nn.Sequential:
    """A network that returns scores `[T, B, classes]` of each step. Before training its neurons fire at 0.1."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(data.train.shape[2], hidden, bias=False),
        NEURONS[neurons](hidden),
        nn.Linear(hidden, data.classes),
        LeakyIntegrator(decay=0.95),
    )
    asgl_cuda.calibrate(net, sequence(data.train[:BATCH_SIZE]), rate=0.1)
    return net


def sequence(samples: Tensor) -> Tensor:
    """Samples `[B, T, N]` as an input, `[T, B, N]`."""
    return samples.transpose(0, 1).float()


def train(neurons: str, data: Data, epochs: int, hidden: int) -> list[float]:
    """Prints and returns the accuracy on the test samples, in percent, after each epoch."""
    net = network(neurons, hidden, data)
    optimizer = torch.optim.Adam(asgl_cuda.parameter_groups(net, lr=RATE))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)

    def scores(samples: Tensor) -> Tensor:
        return net(sequence(samples)).mean(0)  # type: ignore[no-any-return]

    def loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores(data.train[batch]), data.train_labels[batch])

    optimizer.register_step_pre_hook(clip)
    found = []
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        fit(loss, torch.randperm(len(data.train)).split(BATCH_SIZE), optimizer)
        schedule.step()
        seconds = time.perf_counter() - started
        found.append(accuracy_of(net, scores, data.test, data.test_labels))
        print(f"{neurons}, epoch {epoch}: {found[-1]:.1f} % of the test samples, {seconds:.1f} s")
    return found


def main() -> None:
    """Trains with each kind of neurons."""
    parser = parser_of("benchmarks.learning.spoken", str(__doc__))
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR", help="folder that contains SHD")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of each training run (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden neurons (default: %(default)s)")
    arguments = parser.parse_args()
    for name in ("epochs", "hidden"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    try:
        data = SOURCES["shd"].read(arguments.data_root)
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    for neurons in NEURONS:
        train(neurons, data, arguments.epochs, arguments.hidden)


if __name__ == "__main__":
    main()
