"""Mistakes in asgl_cuda, by name, and the tests that find each."""

from functools import partial
from typing import NamedTuple


class Mutant(NamedTuple):
    """A mistake in a file of asgl_cuda: `old`, which occurs once, becomes `new`."""

    file: str
    old: str
    new: str
    tests: str  # a file in tests, and words of pytest's -k


schedule = partial(Mutant, "training/schedule.py")

MUTANTS = {
    "schedule: a state is stored before it is accepted": schedule(
        "self._set(starts, epoch)\n        self.epoch, self.starts = epoch, starts",
        "self.epoch, self.starts = epoch, starts\n        self._set(starts, epoch)", "layer/test_schedule.py state",
    ),
}  # fmt: skip
