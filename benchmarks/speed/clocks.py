"""Measures seconds and bytes of forward and backward of one layer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)

PARTS = ("forward", "backward", "both")
MOST_SAMPLES = 16


def keep_memory() -> None:
    """Makes the C library keep freed memory, if it has mallopt. On a GPU torch does the same.

    By default, the C library returns large blocks to the system, and measurements would include page faults.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: None)
    for parameter in (trim_threshold, mmap_threshold):
        mallopt(parameter, most)


class Sample(NamedTuple):
    """The tensors of a call: the input, the gradient of the output, and in some blocks a residual.

    The leaves share the memory of input and residual, and require gradients.
    """

    x: Tensor
    leaf: Tensor
    grad: Tensor
    residual: Tensor | None = None
    residual_leaf: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.leaf,) if self.residual_leaf is None else (self.leaf, self.residual_leaf)


def sample_of(x: Tensor, grad: Tensor, residual: Tensor | None = None) -> Sample:
    residual_leaf = None if residual is None else residual.detach().requires_grad_()
    return Sample(x, x.detach().requires_grad_(), grad, residual, residual_leaf)


class Row(NamedTuple):
    """A row of a table: its name and the timed functions. `backward` gets the result of `forward`."""

    name: str
    forward: Callable[[Sample], Tensor]
    backward: Callable[[Sample, Tensor], Any]

    def call(self, part: str, sample: Sample, out: Tensor | None = None) -> Any:
        """Calls forward, backward or both. For backward alone, `out` is the result of an earlier forward."""
        if part == "forward":
            return self.forward(sample)
        return self.backward(sample, self.forward(sample) if out is None else out)


def row_of(name: str, function: Callable[..., Tensor], *parameters: Tensor) -> Row:
    """The row of a layer, whose backward computes the gradients of its inputs and parameters."""

    def backward(sample: Sample, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (*sample.leaves, *parameters), sample.grad, retain_graph=True)

    return Row(name, lambda sample: function(*sample.leaves), backward)


class CpuClock:
    """Measures the seconds of a call of forward, backward or both on a CPU."""

    def __init__(self, row: Row, part: str, inputs: list[Sample]) -> None:
        self._row, self._part, self._sample = row, part, inputs[0]
        self.seconds()  # compiles, loads, fills caches

    def seconds(self) -> float:
        out = self._row.forward(self._sample) if self._part == "backward" else None
        started = time.perf_counter()
        self._row.call(self._part, self._sample, out)
        return time.perf_counter() - started


class GpuClock:
    """Measures the seconds of a call on a GPU, as the mean over several calls in a row.

    With `queued`, all calls are queued before the first one starts, which hides the time of the host. Without it, the
    host's time counts if the host is slower than the GPU.
    """

    CYCLES_A_SECOND = 2e9  # an estimate: the wait need only be long enough
    LONGEST = 0.02  # seconds of the calls in a row, and of the wait

    def __init__(self, row: Row, part: str, inputs: list[Sample], queued: bool = True) -> None:
        outs = [row.forward(sample) if part == "backward" else None for sample in inputs]
        self._row, self._part, self._inputs, self._next = row, part, list(zip(inputs, outs, strict=True)), 0
        self._run(1)  # compiles, loads
        torch.cuda.synchronize()
        started = time.perf_counter()
        self._run(1)
        launched = time.perf_counter()
        torch.cuda.synchronize()
        done = time.perf_counter()
        self._count = max(1, min(MOST_SAMPLES, int(self.LONGEST / (done - started))))
        seconds = min(2 * self._count * (launched - started), self.LONGEST)
        self._wait = int(seconds * self.CYCLES_A_SECOND) if queued else 0

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._row.call(self._part, *self._inputs[self._next])
            self._next = (self._next + 1) % len(self._inputs)

    def seconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._wait:
            torch.cuda._sleep(self._wait)
        start.record()
        self._run(self._count)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._count


def clock_of(row: Row, part: str, inputs: list[Sample], queued: bool = True) -> Callable[[], float]:
    if inputs[0].x.device.type == "cuda":
        return GpuClock(row, part, inputs, queued).seconds
    return CpuClock(row, part, inputs).seconds


class Times(NamedTuple):
    """The median seconds of a call, and half the interquartile range as a fraction of the median."""

    median: float
    spread: float


def times_of(values: list[float]) -> Times:
    if len(values) < 2:
        return Times(values[0], 0.0)
    lower, median, upper = statistics.quantiles(values, n=4)
    return Times(median, (upper - lower) / 2 / median)


def in_turns(clocks: Mapping[Name, Callable[[], float]], repeats: int) -> dict[Name, Times]:
    """The times of each clock. The clocks take turns, so that a drift of the machine's speed affects all alike."""
    seconds: dict[Name, list[float]] = {name: [] for name in clocks}
    for _ in range(repeats):
        for name, clock in clocks.items():
            seconds[name].append(clock())
    return {name: times_of(values) for name, values in seconds.items()}


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes of the storages that autograd saves for the backward pass of `call`, inputs included."""
    storages: dict[int, int] = {}  # by address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()  # alive, so that no address is reused
    del out
    return sum(storages.values())


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discards standard error, to which the profiler's library writes a line for each run."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def allocated_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """The peak of allocated bytes during a call, and the bytes that stay allocated while its result exists.

    Both are relative to the bytes allocated before the call. If the call frees earlier memory, both are lower.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return found
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silence(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    allocations = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now
