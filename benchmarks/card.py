"""The speed of a GPU, measured, and the time that csrc/ROOFLINE.md predicts for a kernel on it."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .prediction import CARDS, ISSUE_LANES, Card
from .roofline import PAGE

COPIED_BYTES = {"cuda": 2**30, "cpu": 2**22}  # on a GPU several times what its cache holds
CYCLES = 50_000_000  # some 25 ms


class Rates(NamedTuple):
    """The speeds of a card as it runs here."""

    bandwidth: float  # bytes that a copy reads and writes a second
    cycles: float | None  # a second, of all multiprocessors together; None on a CPU


class Work(NamedTuple):
    """The needs of a kernel for one element: bytes, and cycles of one multiprocessor."""

    bytes: float
    issue: float
    pipes: float  # the busiest

    def seconds(self, rates: Rates) -> float:
        """The time of one element, where all work overlaps perfectly."""
        cycles = max(self.issue, self.pipes) / rates.cycles if rates.cycles else 0.0
        return max(self.bytes / rates.bandwidth, cycles)


def measured_rates(device: torch.device) -> Rates:
    """Times a copy, and a kernel that does nothing but count cycles of the clock."""
    copied_bytes = COPIED_BYTES[device.type]
    x = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device)
    out = torch.zeros_like(x)
    bandwidth = 2 * copied_bytes / seconds_of(lambda: out.copy_(x), device)
    if device.type != "cuda":
        return Rates(bandwidth, None)
    clock = CYCLES / seconds_of(lambda: torch.cuda._sleep(CYCLES), device)
    return Rates(bandwidth, clock * torch.cuda.get_device_properties(device).multi_processor_count)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 11) -> float:
    """The median of single calls, after two to warm up."""
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


def roofline(architecture: int | None) -> dict[tuple[str, str, int], Work]:
    """The work of each kernel, type and length (0 for a kernel that has none), as the page has it for these cards.

    Where the page has no such card, only bytes are known, and the numbers of any card serve.
    """
    known = [card for card in CARDS if card.architecture == architecture]
    card = (known or CARDS)[0]
    section = PAGE.read_text().split(f"\n## {card.name}\n")[1].split("\n## ")[0]
    row = re.compile(
        r"^\| (?P<kernel>[a-z ]+?) (?P<dtype>float32|bfloat16) +\| (?P<steps>\d+|any) +\| (?P<bytes>[\d.]+) +"
        r"\| (?P<instructions>[\d.]+) +\| [\d.]+ +\| [\d.]+ +\| (?P<pipes>[\d.]+) \w+ +\|",
        re.MULTILINE,
    )
    found = {}
    for match in row.finditer(section):
        steps = 0 if match["steps"] == "any" else int(match["steps"])
        found[match["kernel"], match["dtype"], steps] = work_of(match, card if known else None)
    return found


def work_of(row: re.Match[str], card: Card | None) -> Work:
    """The page gives the pipes in picoseconds of the whole card."""
    if card is None:
        return Work(float(row["bytes"]), 0.0, 0.0)
    pipes = float(row["pipes"]) * 1e-12 * card.multiprocessors * card.clock
    return Work(float(row["bytes"]), float(row["instructions"]) / ISSUE_LANES, pipes)
