"""The speed of a GPU, measured, and the time that tools/roofline/ROOFLINE.md predicts for a kernel on it."""

from __future__ import annotations

import re
from typing import NamedTuple

from benchmarks.speed.rates import Rates

from ..roofline.prediction import CARDS, ISSUE_LANES, Card
from ..roofline.roofline import PAGE


class Work(NamedTuple):
    """The needs of a kernel for one element: bytes, and cycles of one multiprocessor."""

    bytes: float
    issue: float
    pipes: float  # the busiest

    def seconds(self, rates: Rates) -> float:
        """The time of one element, where all work overlaps perfectly."""
        cycles = max(self.issue, self.pipes) / rates.cycles if rates.cycles else 0.0
        return max(self.bytes / rates.bandwidth, cycles)


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
