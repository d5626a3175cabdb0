"""Host time of a call on a tiny input, on one thread: the cost of small layers, and of launches that a GPU waits for.

The yardstick is `gelu` in the same run: with gradients forward and backward, without them forward alone. An empty
autograd function of two inputs shows the cost of any function in Python. On a GPU: the time until all is queued.

`launched in Python`: a launcher in Python, as that of the backend cupy, without calling the driver.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import addressof, c_void_p
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.benchmark import Timer

import asgl_cuda
from asgl_cuda import OverTime
from asgl_cuda.backends import BACKENDS, Backend, direct_operators, launched, operators_in

from ..common import fused_backends
from .clocks import in_turns

SHAPE = (4, 2, 3, 2, 2)  # T, B, C, H, W
CHANNELS = SHAPE[2]
GELU = "gelu"
RECORDED = "recorded"
IN_PYTHON = "launched in Python"
ANALOG_PROB = 0.2
CALLS = 100


class HostTimes(NamedTuple):
    """Microseconds of a call with gradients, forward and backward, and without; with a row for gelu."""

    with_gradients: dict[str, float]
    without_gradients: dict[str, float]


class _Empty(torch.autograd.Function):
    """A function that copies its first input."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.saved_tensors  # noqa: B018
        return grad, None


class _Recorder:
    """A launcher that prepares the driver's arguments, and does not call it."""

    def resident_threads(self, device: torch.device) -> int:
        return 1 << 18

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        addressof((c_void_p * 1)(params))


@cache
def _recorded() -> Backend:
    """A backend for tensors on the CPU that computes nothing."""
    namespace = f"asgl_cuda_{RECORDED}"
    functions = launched.implement(namespace, "CPU", _Recorder())
    return Backend(("cpu",), operators_in(namespace), lambda: None, direct_operators(functions))


@contextmanager
def recorded_backend() -> Iterator[None]:
    """The backend RECORDED, for tensors on the CPU."""
    BACKENDS[RECORDED] = _recorded()
    try:
        yield
    finally:
        del BACKENDS[RECORDED]


def _compiled_backends(device: torch.device) -> list[str]:
    return [name for name in fused_backends(device) if name != RECORDED]


def layers(device: torch.device, backend: str) -> dict[str, nn.Module]:
    """Layers by the names of their rows."""

    def pair() -> nn.Module:
        return nn.Sequential(OverTime(nn.BatchNorm2d(CHANNELS)), asgl_cuda.LIF(backend=backend)).to(device)

    return {
        "LIF": asgl_cuda.LIF(backend=backend).to(device),
        "BatchNormLIF": asgl_cuda.BatchNormLIF(CHANNELS, backend=backend).to(device),
        "BatchNorm2d, LIF": pair(),
    }


def host_times(device: torch.device, repeats: int) -> HostTimes:
    """Measures all rows, which take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with recorded_backend():
            return HostTimes(_with_gradients(device, repeats), _without_gradients(device, repeats))
    finally:
        torch.set_num_threads(threads)


def _with_gradients(device: torch.device, repeats: int) -> dict[str, float]:
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    grad = torch.randn(SHAPE, device=device)
    width = torch.ones(1, device=device, requires_grad=True)

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.backward(function(x), grad)

    rows = {GELU: step(gelu), "empty function": step(lambda x: _Empty.apply(x, width))}  # type: ignore[no-untyped-call]
    for backend in _compiled_backends(device):
        rows[f"lif {backend}"] = step(partial(asgl_cuda.lif, backend=backend))
        learned = partial(asgl_cuda.lif, width=width, analog_prob=ANALOG_PROB, backend=backend)
        rows[f"lif, width and noise {backend}"] = step(learned)
        for name, layer in layers(device, backend).items():
            rows[f"{name} {backend}"] = step(layer)
            if name != "LIF":
                compiled = torch.compile(layer, fullgraph=True)
                rows[f"{name} {backend}, compiled"] = step(compiled)
    if device.type == "cpu":
        layer: nn.Module = asgl_cuda.LIF(backend=RECORDED)
        rows[f"LIF, {IN_PYTHON}"] = step(layer)
        layer = asgl_cuda.BatchNormLIF(CHANNELS, backend=RECORDED)
        rows[f"BatchNormLIF, {IN_PYTHON}"] = step(layer)
    return _microseconds(rows, device, repeats)


@torch.no_grad()
def _without_gradients(device: torch.device, repeats: int) -> dict[str, float]:
    x = torch.randn(SHAPE, device=device)
    rows: dict[str, Callable[[], Any]] = {GELU: partial(gelu, x)}
    for backend in _compiled_backends(device):
        rows[f"lif {backend}"] = partial(asgl_cuda.lif, x, backend=backend)
        for name, layer in layers(device, backend).items():
            rows[f"{name} {backend}"] = partial(layer.eval(), x)
    if device.type == "cpu":
        rows[f"LIF, {IN_PYTHON}"] = partial(asgl_cuda.LIF(backend=RECORDED).eval(), x)
    return _microseconds(rows, device, repeats)


def _microseconds(rows: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Medians; on a CPU, of the thread's CPU time, which excludes other processes."""
    timer = time.thread_time if device.type == "cpu" else time.perf_counter

    def clock(function: Callable[[], Any]) -> Callable[[], float]:
        for _ in range(CALLS):
            function()
        made = Timer("function()", globals={"function": function}, timer=timer)

        def seconds() -> float:
            found: float = made.timeit(CALLS).mean
            if device.type == "cuda":
                torch.cuda.synchronize()  # an empty queue for the next row
            return found

        return seconds

    seconds = in_turns({name: clock(function) for name, function in rows.items()}, repeats)
    return {name: 1e6 * statistics.median(values) for name, values in seconds.items()}


def table(times: HostTimes) -> str:
    """Microseconds, and multiples of gelu's."""
    lines = [f"tiny input {list(SHAPE)}, one thread{'µs':>37}{'x gelu':>9}"]
    for title, rows in zip(("forward and backward", "no_grad, evaluation"), times, strict=True):
        lines.append(f"{title}:")
        lines += [f"  {name:<60}{us:>7.1f}{us / rows[GELU]:>9.2f}" for name, us in rows.items()]
    return "\n".join((*lines, ""))
