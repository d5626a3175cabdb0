"""Measured rates of a device: bytes of a copy, cycles of the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .clocks import Row, Sample, clock_of, in_turns

COPIED_BYTES = {"cuda": 2**30, "cpu": 2**22}  # on a GPU several times its cache
CYCLES = 50_000_000  # some 25 ms
REPEATS = 11


class Rates(NamedTuple):
    """The measured rates of a device."""

    bandwidth: float  # bytes per second that a copy reads and writes
    cycles: float | None  # per second, all multiprocessors together; None on a CPU


def measured_rates(device: torch.device) -> Rates:
    """Times a copy, and a kernel that counts cycles of the clock."""
    copied_bytes, on_gpu = COPIED_BYTES[device.type], device.type == "cuda"
    x = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device)
    sample = Sample(x, x, torch.zeros_like(x))
    calls: dict[str, Callable[[Sample], Any]] = {"copy": lambda sample: sample.grad.copy_(sample.x)}
    if on_gpu:
        calls["wait"] = lambda sample: torch.cuda._sleep(CYCLES)
    rows = [Row(name, call, lambda sample, out: None) for name, call in calls.items()]
    times = in_turns({row.name: clock_of(row, "forward", [sample]) for row in rows}, REPEATS)
    bandwidth = 2 * copied_bytes / times["copy"].median
    if not on_gpu:
        return Rates(bandwidth, None)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Rates(bandwidth, CYCLES / times["wait"].median * multiprocessors)
