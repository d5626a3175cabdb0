"""Time of spike layers beside torch's dense layers, one thread, in turns: `python -m benchmarks.speed.spikes`.

Forward without gradients; a step is forward with gradients and backward, for a layer with the gradient of the input.
Inputs are ones at random places. The network has 700-512-512-512-20 features over 64 steps of 32 samples, a tenth of
its input is not zero, and its hidden rates are about --shares. Minima of --repeats.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import asgl_cuda

from ..common import minima, parser_of
from .clocks import keep_memory

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


def compare(dense: nn.Module, ours: nn.Module, x: Tensor, repeats: int) -> str:
    """Milliseconds of forward and of a step, torch's and ours, and their ratios."""
    grad = torch.randn_like(dense(x))
    inputs = (x,) if x.requires_grad else ()

    def evaluation(model: nn.Module) -> Callable[[], Any]:
        return torch.no_grad()(lambda: model(x))

    def step(model: nn.Module) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(model(x), (*inputs, *model.parameters()), grad)

    models = dense, ours
    trained = minima([step(each) for each in models], repeats)
    found = minima([evaluation(each.eval()) for each in models], repeats)
    return "  ".join(
        f"{part} {1e3 * theirs:8.3f} / {1e3 * mine:8.3f} = {theirs / mine:5.2f}"
        for part, (theirs, mine) in (("forward", found), ("step", trained))
    )


def network(linear: type[nn.Linear], share: float) -> nn.Sequential:
    """The threshold is set so that about this share of the neurons fires."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (700, 512, 512):
        layers += [linear(inputs, 512), asgl_cuda.LIF(width=1.0)]
    model = nn.Sequential(*layers, nn.Linear(512, 20))
    asgl_cuda.calibrate(model, (torch.rand(64, 32, 700) < 0.1).float(), share)
    return model


def main() -> int:
    """Prints a row for each layer and share."""
    parser = parser_of("benchmarks.speed.spikes", str(__doc__), "repeats")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.05, 0.1, 0.2], help="of non-zero inputs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()
    torch.manual_seed(0)
    for name, sizes, options, shape, layout in LAYERS:
        dense: nn.Module = getattr(nn, name)(*sizes, **options)
        ours: nn.Module = getattr(asgl_cuda, f"Spike{name}")(*sizes, **options)
        ours.load_state_dict(dense.state_dict())
        for share in arguments.shares:
            x = (torch.rand(shape) < share).float()
            if layout is not None:
                x = x.contiguous(memory_format=layout)
                dense.to(memory_format=layout)
                ours.to(memory_format=layout)
            words = "" if layout is None else " channels_last" if layout is LAST else " contiguous"
            words += "".join(f" {option}={value}" for option, value in options.items())
            found = compare(dense, ours, x.requires_grad_(), arguments.repeats)
            print(f"{name}{sizes}{words} {list(shape)} at {share}: {found}")
    for share in arguments.shares:
        x = (torch.rand(64, 32, 700) < 0.1).float()
        dense, ours = network(nn.Linear, share), network(asgl_cuda.SpikeLinear, share)
        print(f"network, T = 64, B = 32, at {share}: {compare(dense, ours, x, arguments.repeats)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
