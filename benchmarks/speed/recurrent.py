"""Time of one recurrent layer, forward and backward, measured against its matrix products alone in the same run.

Forward multiplies the spikes by the weight at each step. Backward multiplies the gradient by the weight at each step,
and has one product over all steps for the gradient of the weight. These products alone, by torch.mm into allocated
memory, are the floor of a dense computation. These rows are compared with it: recurrent LIF neurons in every fused
backend, at the usual rate and with all neurons spiking; a loop in PyTorch, also with its step compiled; and the layers
of the other libraries. Some of these also multiply the input by a weight. They are compared with asgl_cuda's layer
after a product of the whole sequence.

First, the spikes of all rows are compared with those of asgl_cuda. All rows take turns in each round; the median over
the rounds is reported. Gradients are those of input and weights. On a GPU the time includes that of the host, which
starts kernels at each step and may be slower than the GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import asgl_cuda

from ..common import fused_backends
from .clocks import Row, Sample, clock_of, in_turns, row_of, sample_of, saved_bytes
from .microbench import COMPILED_STEP, PLAIN_LOOP, REFERENCE, reset_compiler
from .peers import DECAY, SURROGATE, Peer, installed_peers, loop, recurrent_step

PRODUCTS = "products alone"
ALL_SPIKE = ", all spike"  # suffix: at a threshold that all neurons reach at each step
WITH_INPUT = ", input"  # suffix: with the product of the input
INPUT_DEVIATION = 0.66  # of a normal current, at which some 7 % of the elements spike
CHECKED = (8, 64, 33)


class Size(NamedTuple):
    """A measured size: the numbers of time steps, of samples in the batch, and of neurons."""

    steps: int
    batch: int
    neurons: int

    def __str__(self) -> str:
        return f"T = {self.steps}, B = {self.batch}, N = {self.neurons}"


SIZES = (Size(16, 64, 64), Size(100, 128, 128), Size(100, 128, 256), Size(250, 32, 512))
THREADS = (1, 2)  # of a CPU


def weights(neurons: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The recurrent weight as RecurrentLIF draws it, and a weight of the input that keeps the current's deviation."""
    bound = 1 / math.sqrt(neurons)
    weight = torch.empty(neurons, neurons, device=device).uniform_(-bound, bound)
    return weight, torch.nn.init.orthogonal_(torch.empty_like(weight))


def sample_at(size: Size, device: torch.device) -> Sample:
    x, grad = torch.randn(2, *size, device=device)
    return sample_of(INPUT_DEVIATION * x, grad)


def layer(x_seq: Tensor, weight: Tensor, input_weight: Tensor | None = None, **options: Any) -> Tensor:
    """Recurrent neurons; if there is a weight of the input, after a product of the whole sequence with it."""
    current = x_seq if input_weight is None else linear(x_seq, input_weight)
    spikes = asgl_cuda.recurrent_lif(current, weight, decay=DECAY, **{"surrogate": SURROGATE, **options})
    assert isinstance(spikes, Tensor)
    return spikes


def products_row(weight: Tensor, s_seq: Tensor) -> Row:
    """The row of the matrix products alone, of a layer that emits the spikes `s_seq`."""
    out, total, transposed = torch.empty_like(s_seq[0]), torch.empty_like(weight), weight.T
    s_flat = s_seq.flatten(0, 1)

    def forward(sample: Sample) -> Tensor:
        for s in s_seq:
            torch.mm(s, transposed, out=out)
        return out

    def backward(sample: Sample, product: Tensor) -> Tensor:
        for grad in sample.grad:
            torch.mm(grad, weight, out=out)
        return torch.mm(sample.grad.flatten(0, 1).T, s_flat, out=total)

    return Row(PRODUCTS, forward, backward)


def rows_of(size: Size, device: torch.device, s_seq: Tensor) -> Iterator[Row]:
    """The rows of a size: the products, every implementation, then those with the product of the input."""
    weight, input_weight = (each.requires_grad_() for each in weights(size.neurons, device))
    yield products_row(weight.detach(), s_seq)
    ours = {f"asgl_cuda {backend}": partial(layer, backend=backend) for backend in fused_backends(device)}
    for name, function in ours.items():
        yield row_of(name, partial(function, weight=weight), weight)
        yield row_of(f"{name}{ALL_SPIKE}", partial(function, weight=weight, v_threshold=-100.0), weight)
    yield row_of(PLAIN_LOOP, partial(loop, step=recurrent_step, weight=weight), weight)
    reset_compiler()
    step = torch.compile(recurrent_step, fullgraph=True, dynamic=False)
    yield row_of(COMPILED_STEP, partial(loop, step=step, weight=weight), weight)
    peers = installed_peers("recurrent", weight.detach(), input_weight.detach())
    yield from (row_of(name, peer.spikes, *peer.weights) for name, peer in peers.items() if not peer.has_input)
    for name, function in ours.items():
        both = partial(function, weight=weight, input_weight=input_weight)
        yield row_of(f"{name}{WITH_INPUT}", both, weight, input_weight)
    for name, peer in peers.items():
        if peer.has_input:
            yield row_of(f"{name}{WITH_INPUT}", peer.spikes, *peer.weights)


@torch.no_grad()
def check_peers(device: torch.device) -> None:
    """Raises RuntimeError if the loop or a peer emits other spikes than asgl_cuda.

    Inputs and weights have few bits, so that sums are exact in any order.
    """
    size = Size(*CHECKED)
    x, *both = ((16 * each).round() / 16 for each in (sample_at(size, device).x, *weights(size.neurons, device)))
    x_seq = x + 1 / 32  # no potential is at the threshold, where the decay of `sinabs` rounds
    plain = Peer(partial(loop, step=recurrent_step, weight=both[0]), {})
    for name, peer in {PLAIN_LOOP: plain, **installed_peers("recurrent", *both)}.items():
        given = both if peer.has_input else both[:1]
        expected = layer(x_seq, *given, backend=REFERENCE, **peer.same_neuron)
        if not torch.equal(peer.spikes(x_seq), expected):
            raise RuntimeError(f"{name} emits other spikes than asgl_cuda.recurrent_lif")


def measure(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measures all rows of a size, which take turns: median seconds, spread, bytes kept for backward, firing rate."""
    torch.manual_seed(0)
    sample = sample_at(size, device)
    with torch.no_grad():
        s_seq = layer(sample.x, weights(size.neurons, device)[0])
    found = list(rows_of(size, device, s_seq))
    times = in_turns({row.name: clock_of(row, "both", [sample], queued=False) for row in found}, repeats)
    layers = [row for row in found if row.name != PRODUCTS]
    return {
        **size._asdict(),
        "threads": torch.get_num_threads(),
        "rate": s_seq.mean().item(),
        "seconds": {name: each.median for name, each in times.items()},
        "spread": {name: each.spread for name, each in times.items()},
        "saved_bytes": {row.name: saved_bytes(partial(row.forward, sample)) for row in layers},
    }


def measurements(report: dict[str, Any], device: torch.device, repeats: int) -> Iterator[str]:
    """Measures every size with each number of threads, after checking the spikes of the loop and of each peer."""
    check_peers(device)
    report["sizes"] = []
    thread_counts = THREADS if device.type == "cpu" else (torch.get_num_threads(),)
    for threads, size in itertools.product(thread_counts, SIZES):
        torch.set_num_threads(threads)
        report["sizes"].append(measure(size, device, repeats))
        yield f"{size}, {threads} threads"
