"""A training step of one layer on a tiny input, bound by the host: its time, kernels and peak of memory.

Forward and backward in eager mode; replayed from a CUDA graph; and under torch.compile with mode="reduce-overhead",
which captures such graphs itself.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import asgl_cuda
from benchmarks.common import device_of, fused_backends, parser_of, write_json
from benchmarks.speed.clocks import allocated_bytes
from benchmarks.speed.microbench import ANALOG_PROB

from .kernel_times import kind_of, launches

SHAPE = (4, 8, 16, 4, 4)  # [T, B, C, H, W]
RECURRENT_SHAPE = (50, 16, 64)  # [T, B, N]
RESIDUAL = "BatchNormLIF, residual"
EAGER, GRAPH, COMPILED = "eager", "CUDA graph", "reduce-overhead"
CALLS = {"cuda": 500, "cpu": 20}
REPEATS = 7


def layers(device: torch.device, backend: str) -> dict[str, nn.Module]:
    """The layers to measure, by name."""
    options: dict[str, Any] = {"analog_prob": ANALOG_PROB, "backend": backend}
    learns_all = asgl_cuda.LIF(SHAPE[2], granularity="channel", learn_decay=True, learn_threshold=True, **options)
    return {
        "LIF": asgl_cuda.LIF(**options).to(device),
        "LIF by channel, learned width, decay, threshold": learns_all.to(device),
        "BatchNormLIF": asgl_cuda.BatchNormLIF(SHAPE[2], **options).to(device),
        RESIDUAL: asgl_cuda.BatchNormLIF(SHAPE[2], **options).to(device),
        "LIF, levels": asgl_cuda.LIF(levels=4, v_reset=None, learn_threshold=True, **options).to(device),
        "AdaptiveLIF": asgl_cuda.AdaptiveLIF(learn_adaptation=True, **options).to(device),
        "RecurrentLIF": asgl_cuda.RecurrentLIF(RECURRENT_SHAPE[2], **options).to(device),
        "RecurrentLIF, synapse and adaptation": asgl_cuda.RecurrentLIF(
            RECURRENT_SHAPE[2], syn_decay=0.8, learn_syn_decay=True, adapt_decay=0.9, **options
        ).to(device),
        "LeakyIntegrator": asgl_cuda.LeakyIntegrator(learn_decay=True, backend=backend).to(device),
    }


def shape_for(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the input of a layer."""
    return RECURRENT_SHAPE if isinstance(layer, asgl_cuda.RecurrentLIF) else SHAPE


def training_step(
    layer: nn.Module, device: torch.device, residual: bool = False, compiled: bool = False
) -> Callable[[], Any]:
    """Returns a function that computes spikes, and the gradients of the inputs and parameters."""
    shape = shape_for(layer)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(1 + residual)]
    grad = torch.randn(shape, device=device)
    leaves = (*inputs, *layer.parameters())
    function = torch.compile(layer, mode="reduce-overhead") if compiled else layer

    def step() -> tuple[Tensor, ...]:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(function(*inputs), leaves, grad)

    return step


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the function, warmed up on another stream as torch requires, and its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def replayed(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a replay of its CUDA graph."""
    graph, _ = captured(step)

    def replay() -> Callable[[], Any]:
        graph.replay()
        return step  # keeps alive the tensors that the graph reads

    return replay


def variants(
    layer: nn.Module, device: torch.device, residual: bool, compiled: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A compiled training step, or the step in eager mode and on a GPU as a CUDA graph, each with its name."""
    if compiled:
        yield COMPILED, training_step(layer, device, residual, compiled=True)
        return
    yield EAGER, training_step(layer, device, residual)
    if device.type == "cuda":
        yield GRAPH, replayed(training_step(layer, device, residual))


def measure(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The median microseconds of a step among many in succession, and its launches."""
    for _ in range(3):  # compiles, records
        step()
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    seconds = statistics.median(timer.timeit(CALLS[device.type]).mean for _ in range(REPEATS))
    launched = {kind_of(name)[1]: len(times) for name, times in launches(step, device).items()}
    found = {"microseconds": 1e6 * seconds, "launches": sum(launched.values()), "launched": launched}
    return {**found, "peak_bytes": allocated_bytes(step, device)[0]}


def main() -> int:
    """Measures every layer in every backend of the device."""
    parser = parser_of("tools.gpu_check.layers", __doc__, "device", "json")
    parser.add_argument("--compiled", action="store_true", help="only under torch.compile, which takes a while")
    arguments = parser.parse_args()
    device = device_of(parser, arguments.device)
    report: dict[str, Any] = {"layers": []}
    for backend in fused_backends(device):
        for name, layer in layers(device, backend).items():
            for variant, step in variants(layer, device, name == RESIDUAL, arguments.compiled):
                found = measure(step, device)
                print(f"{backend}, {name}, {variant}: {found['microseconds']:.1f} µs, {found['launches']} launches")
                for kernel, count in found["launched"].items():
                    print(f"  {count} {kernel[:100]}", flush=True)
                about = {"backend": backend, "layer": name, "shape": shape_for(layer), "variant": variant}
                report["layers"].append({**about, **found})
                write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
