"""Times spike layers and torch's dense layers, in turns, on one thread: `python -m benchmarks.speed.spikes`.

Forward is without gradients. A step is forward with gradients and backward; for a single layer, with the gradient of
the input. The inputs of layers are ones at random positions. The network has 700-512-512-512-20 features over 64 time
steps of 32 samples, a tenth of its inputs is not zero, and its hidden firing rates are about --shares. Its neurons have
no noise, because smooth values are not zero. A stream is one sample in evaluation, by `asgl_cuda.step`, through
700-1024-1024-20 features. Trained networks are those of `benchmarks.learning.sparse`, with and without a penalty on
firing rates. Times are the least of --repeats rounds.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import asgl_cuda

from ..common import machine, minima, parser_of, write_json
from ..learning.sparse import NETWORKS, SETTINGS, Sparse, trained
from .clocks import keep_memory

STEPS = 100  # of a stream
MOST_FEW, CALLS = 5000, 50  # calls with fewer elements are timed so many at a time
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
# A layer's name and arguments, the shape of its input, and its layout.
LAYERS: tuple[tuple[str, tuple[int, ...], dict[str, int], tuple[int, ...], Any], ...] = (
    ("Linear", (1024, 1024), {}, (512, 1024), None),
    ("Linear", (700, 512), {}, (2048, 700), None),
    ("Linear", (1024, 1024), {}, (1, 1024), None),
    ("Linear", (4096, 4096), {}, (1, 4096), None),
    ("Conv2d", (128, 128, 3), {"padding": 1}, (64, 128, 16, 16), LAST),
    ("Conv2d", (64, 64, 3), {"padding": 1}, (64, 64, 32, 32), LAST),
    ("Conv2d", (128, 128, 3), {"padding": 1}, (64, 128, 16, 16), CONTIGUOUS),
    ("Conv2d", (64, 64, 3), {"padding": 1}, (64, 64, 32, 32), CONTIGUOUS),
    ("Conv2d", (256, 256, 1), {}, (64, 256, 16, 16), LAST),
    ("Conv2d", (128, 128, 3), {"padding": 1, "stride": 2}, (64, 128, 16, 16), LAST),
    ("Conv2d", (64, 64, 5), {"padding": 2}, (64, 64, 16, 16), LAST),
)


def compare(dense: nn.Module, ours: nn.Module, x: Tensor, repeats: int) -> dict[str, list[float]]:
    """The seconds of forward and of a step, for torch's layers and for the spike layers."""
    grad = torch.randn_like(dense(x))
    inputs = (x,) if x.requires_grad else ()

    def evaluation(model: nn.Module) -> Callable[[], Any]:
        return torch.no_grad()(lambda: model(x))

    def step(model: nn.Module) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(model(x), (*inputs, *model.parameters()), grad)

    models = dense, ours
    many = 1 if x.numel() > MOST_FEW else CALLS  # of calls that take microseconds
    trained = minima([times(many, step(each)) for each in models], repeats)
    found = minima([times(many, evaluation(each.eval())) for each in models], repeats)
    return {"forward": [each / many for each in found], "step": [each / many for each in trained]}


def times(many: int, function: Callable[[], Any]) -> Callable[[], Any]:
    """A function that calls `function` `many` times."""

    def called() -> None:
        for _ in range(many):
            function()

    return called


def network(linear: type[nn.Linear], share: float) -> nn.Sequential:
    """The network, whose thresholds are such that about the fraction `share` of the neurons fires at each step."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (700, 512, 512):
        layers += [linear(inputs, 512), asgl_cuda.LIF(analog_prob=0.0)]
    model = nn.Sequential(*layers, nn.Linear(512, 20))
    asgl_cuda.calibrate(model, (torch.rand(64, 32, 700) < 0.1).float(), share)
    return model


def stream(linear: type[nn.Linear], share: float, x_seq: Tensor) -> Callable[[], Any]:
    """A function that streams one sample through 700-1024-1024-20 features with hidden rates of about `share`."""
    torch.manual_seed(0)
    model = nn.Sequential(
        linear(700, 1024),
        asgl_cuda.LIF(analog_prob=0.0),
        linear(1024, 1024),
        asgl_cuda.LIF(analog_prob=0.0),
        nn.Linear(1024, 20),
    ).eval()
    asgl_cuda.calibrate(model, x_seq, share)
    asgl_cuda.reset(model)
    return torch.no_grad()(lambda: [asgl_cuda.step(model, x_t) for x_t in x_seq])


def rows(shares: Sequence[float], repeats: int) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """The name and the seconds of each row: of layers by fraction of non-zero inputs, then of networks and streams."""
    for name, sizes, options, shape, layout in LAYERS:
        dense: nn.Module = getattr(nn, name)(*sizes, **options)
        ours: nn.Module = getattr(asgl_cuda, f"Spike{name}")(*sizes, **options)
        ours.load_state_dict(dense.state_dict())
        words = "" if layout is None else " channels_last" if layout is LAST else " contiguous"
        words += "".join(f" {option}={value}" for option, value in options.items())
        for share in shares:
            x = (torch.rand(shape) < share).float()
            if layout is not None:
                x = x.contiguous(memory_format=layout)
                dense.to(memory_format=layout)
                ours.to(memory_format=layout)
            yield f"{name}{sizes}{words} {list(shape)} at {share}", compare(dense, ours, x.requires_grad_(), repeats)
    for share in shares:
        x = (torch.rand(64, 32, 700) < 0.1).float()
        dense, ours = network(nn.Linear, share), network(asgl_cuda.SpikeLinear, share)
        yield f"network, T = 64, B = 32, at {share}", compare(dense, ours, x, repeats)
    for share in shares:
        x_seq = (torch.rand(STEPS, 1, 700) < share).float()
        found = minima([stream(linear, share, x_seq) for linear in (nn.Linear, asgl_cuda.SpikeLinear)], repeats)
        yield f"stream, a step, at {share}", {"forward": [each / STEPS for each in found]}


def trained_rows(repeats: int) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Name and seconds of each network of the study of penalties, after training."""
    for name, penalty in itertools.product(NETWORKS, (False, True)):
        dense, data = trained(Sparse(name, penalty, seed=0))
        x = data.test[: SETTINGS["batch"]]
        ours, _ = asgl_cuda.to_spike_layers(copy.deepcopy(dense), x)
        yield f"{name}, {'penalty' if penalty else 'none'}", compare(dense, ours, x, repeats)


def main() -> int:
    """Prints a row for each layer and each fraction of non-zero inputs."""
    parser = parser_of("benchmarks.speed.spikes", str(__doc__), "repeats", "json")
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.05, 0.1, 0.2], help="fractions of non-zero inputs"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "threads": arguments.threads, "rows": {}}
    every = itertools.chain(rows(arguments.shares, arguments.repeats), trained_rows(arguments.repeats))
    for name, found in every:
        parts = (
            f"{part} {1e3 * theirs:8.3f} / {1e3 * mine:8.3f} = {theirs / mine:5.2f}"
            for part, (theirs, mine) in found.items()
        )
        print(f"{name}: {'  '.join(parts)}", flush=True)
        report["rows"][name] = found
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
