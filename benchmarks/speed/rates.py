"""Measured rates of a device: bytes of a copy, cycles of the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

COPIED_BYTES = {"cuda": 2**30, "cpu": 2**22}  # on a GPU several times its cache
CYCLES = 50_000_000  # some 25 ms


class Rates(NamedTuple):
    """The measured rates of a device."""

    bandwidth: float  # bytes per second that a copy reads and writes
    cycles: float | None  # per second, all multiprocessors together; None on a CPU


def measured_rates(device: torch.device) -> Rates:
    """Times a copy, and a kernel that counts cycles of the clock."""
    copied_bytes = COPIED_BYTES[device.type]
    x = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device)
    out = torch.zeros_like(x)
    bandwidth = 2 * copied_bytes / seconds_of(lambda: out.copy_(x), device)
    if device.type != "cuda":
        return Rates(bandwidth, None)
    clock = CYCLES / seconds_of(lambda: torch.cuda._sleep(CYCLES), device)
    return Rates(bandwidth, clock * torch.cuda.get_device_properties(device).multi_processor_count)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 11) -> float:
    """The median of single calls, after two warm-up calls."""
    found = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
    return statistics.median(found[2:])
