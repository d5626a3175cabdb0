"""The time that tools/roofline/roofline.json predicts for a kernel on a card with measured rates."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.speed.rates import Rates

from ..roofline.prediction import CARDS, ISSUE_LANES, pipe_cycles
from ..roofline.roofline import PAGE, counts_in


class Work(NamedTuple):
    """Work per element: bytes of memory traffic, and cycles of a multiprocessor."""

    bytes: float
    issue: float
    pipes: float  # the busiest

    def seconds(self, rates: Rates) -> float:
        """The time of one element, with perfect overlap."""
        cycles = max(self.issue, self.pipes) / rates.cycles if rates.cycles else 0.0
        return max(self.bytes / rates.bandwidth, cycles)


def roofline(architecture: int | None) -> dict[tuple[str, str, int], Work]:
    """Work by kernel, type and length (0 for a kernel by channel); on an unknown architecture only bytes."""
    card = next((card for card in CARDS if card.architecture == architecture), None)
    found = {}
    for each in counts_in(PAGE.figures):
        if each.is_common and each.architecture == (card or CARDS[0]).architecture:
            issue = pipes = 0.0
            if card is not None:
                issue = sum(each.instructions.values()) / ISSUE_LANES
                pipes = max(pipe_cycles(card, each.instructions).values())
            found[each.kernel, each.dtype, each.steps] = Work(sum(each.moved), issue, pipes)
    return found
