"""Small calls that launch each kind of kernel, for compute-sanitizer, which makes calls a hundred times as slow.

They use one and four neurons per thread, with tails, checkpoints and sums of every kind. On a CPU they only test this
program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import asgl_cuda
from benchmarks.common import device_of, parser_of

ANALOG_PROB = 0.3


def inputs(device: torch.device) -> Iterator[Tensor]:
    """Sequences [T, B, C, L], the last two of more neurons than a GPU has threads."""
    fills = 1000
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fills = properties.multi_processor_count * properties.max_threads_per_multi_processor
    for dtype, shape in (
        (torch.float32, (18, 2, 3, 31)), (torch.bfloat16, (5, 1, 7, 129)), (torch.float64, (5, 1, 2, 65)),
        (torch.float32, (5, fills // 512 + 1, 4, 132)), (torch.bfloat16, (18, fills // 512 + 1, 4, 132)),
    ):  # fmt: skip
        torch.manual_seed(0)
        yield torch.rand(shape).to(device, dtype).requires_grad_()


def calls(x_seq: Tensor, backend: str) -> Iterator[tuple[str, Callable[[], Tensor], list[Tensor]]]:
    """The calls, each with a name and the tensors that get gradients."""
    steps, _, channels, length = x_seq.shape
    real = torch.float64 if x_seq.dtype == torch.float64 else torch.float32

    def parameter(*sizes: int, value: float = 1.0) -> Tensor:
        return torch.full(sizes, value, dtype=real, device=x_seq.device, requires_grad=True)

    residual = x_seq.detach().clone().requires_grad_()
    common = {"analog_prob": ANALOG_PROB, "backend": backend}
    for name, sizes in (
        ("one width", ()), ("by channel", (channels, 1)), ("by neuron", (channels, length)),
        ("by step", (steps, 1, 1, 1)),
    ):  # fmt: skip
        width, decay = parameter(*sizes), parameter(*sizes, value=0.5)
        yield (
            name, lambda width=width, decay=decay: asgl_cuda.lif(x_seq, width=width, decay=decay, **common),
            [x_seq, width, decay],
        )  # fmt: skip
    yield "residual", lambda: asgl_cuda.lif(x_seq, residual=residual, **common), [x_seq, residual]
    yield "general", lambda: asgl_cuda.lif(x_seq, return_v_seq=True, **common).v_seq, [x_seq]
    for name, added in (("BatchNormLIF", ()), ("BatchNormLIF, residual", (residual,))):
        layer = asgl_cuda.BatchNormLIF(channels, **common).to(x_seq.device, real)
        yield (
            name, lambda layer=layer, added=added: layer(x_seq, *added), [x_seq, *added, *layer.parameters()],
        )  # fmt: skip
        yield f"{name}, evaluation", lambda layer=layer, added=added: layer.eval()(x_seq, *added), [x_seq, *added]
    threshold = parameter(channels, 1)
    levels = {"levels": 4, "v_reset": None, "v_threshold": threshold, **common}
    yield "levels", lambda: asgl_cuda.lif(x_seq, **levels), [x_seq, threshold]
    for name, options in (("", {}), (", synapse and adaptation", {"syn_decay": 0.8, "adapt_decay": 0.9})):
        recurrent = asgl_cuda.RecurrentLIF(length, **options, **common).to(x_seq.device, real)
        yield (
            f"RecurrentLIF{name}", lambda layer=recurrent: layer(x_seq[:, :, 0]), [x_seq, *recurrent.parameters()],
        )  # fmt: skip
    adaptive = asgl_cuda.AdaptiveLIF(backend=backend).to(x_seq.device)
    yield "AdaptiveLIF", lambda: adaptive(x_seq), [x_seq, *adaptive.parameters()]
    integrator = asgl_cuda.LeakyIntegrator(learn_decay=True, backend=backend).to(x_seq.device)
    yield "LeakyIntegrator", lambda: integrator(x_seq), [x_seq, *integrator.parameters()]


def main() -> int:
    """Makes every call, forward and backward."""
    parser = parser_of("tools.gpu_check.small_calls", __doc__, "device")
    parser.add_argument("--backend", required=True)
    arguments = parser.parse_args()
    device = device_of(parser, arguments.device)
    for x_seq in inputs(device):
        for name, call, leaves in calls(x_seq, arguments.backend):
            output = call()
            grads = torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
            total = sum(float(grad.double().sum()) for grad in grads if grad is not None)
            print(f"{name}: {list(x_seq.shape)}, {x_seq.dtype}, gradients {total:.3g}", flush=True)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
