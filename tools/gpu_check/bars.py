"""Bars for the speed on a GPU, as multiples of the time of another row in the same run, and whether they are reached.

The floor of a kernel is an operation that moves as many bytes: a multiply, or copies.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.speed.host import IN_PYTHON
from benchmarks.speed.microbench import COMPILED, COPY, FLOOR, MOST_STEPS_TO_COMPILE, REFERENCE
from benchmarks.speed.sizes import JUDGED, Block, Size

OURS, CUPY_KERNELS = "asgl_cuda cuda", "asgl_cuda cupy"  # rows of the micro-benchmark
MOST = {"forward": 1.15, "backward": 1.2, "both": 1.15}  # over the floor, in float32
HALF_TYPES = 1.3  # where instructions bind on cards with fast memory: see docs/design/gpu.md
COPY_ACCESSES = 4  # to an element, by the copies of x and of the gradient beside a block
# A call by CuPy, over the same with launchers in Python that call no driver, in the same run: 77 us on a CPU. The rest
# is a launch by the driver, with torch's device and stream.
CUPY_OVER_LAUNCHERS = 1.5
Seconds = dict[str, dict[str, float]]  # by row, by part


class Bar(NamedTuple):
    """The result of a goal. `measured` is None if the row or the other row did not run."""

    what: str
    goal: str
    measured: float | None
    passed: bool


class Goal(NamedTuple):
    """Bounds on the time of one row, in units of `times` times another row's."""

    what: str
    part: str
    row: str
    other: str
    least: float = 0.0
    most: float = math.inf
    times: float = 1.0  # the other row's time

    def bar(self, size: Any, seconds: Seconds) -> Bar:
        """Compares the goal with the measured times at this size."""
        ratio = None
        if self.row in seconds and self.other in seconds:
            ratio = seconds[self.row][self.part] / (self.times * seconds[self.other][self.part])
        passed = ratio is not None and self.least <= ratio <= self.most
        return Bar(f"{size}: {self.what}", str(self), ratio, passed)

    def __str__(self) -> str:
        return f"at most {self.most:.2f}" if self.most < math.inf else f"at least {self.least:g}"


def goals(size: Size | Block, with_cupy: bool) -> Iterator[Goal]:
    """The goals for a judged size or block."""
    most = MOST if size.dtype == "float32" else dict.fromkeys(MOST, HALF_TYPES)
    if isinstance(size, Block):
        times = size.accesses / COPY_ACCESSES
        for name, row in {"nvcc": OURS, **({"CuPy": CUPY_KERNELS} if with_cupy else {})}.items():
            yield Goal(f"{name} over copies", "both", row, COPY, most=most["both"], times=times)
        return
    for part, floor in (("forward", "x * 2"), ("backward", "x * g")):
        yield Goal(f"{part} over {floor}", part, OURS, FLOOR, most=most[part])
        if with_cupy:
            yield Goal(f"CuPy over nvcc, {part}", part, CUPY_KERNELS, OURS, most=1.03)
    yield Goal("reference over ours", "both", REFERENCE, OURS, least=15)


def seconds_by_size(benchmark: dict[str, Any]) -> dict[str, Seconds]:
    """The seconds of each size and block, by name."""
    found = {}
    for each in benchmark.get("sizes", ()):
        found[str(Size(each["steps"], each["neurons"], each["dtype"]))] = each["seconds"]
    for each in benchmark.get("blocks", ()):
        block = Block(tuple(each["shape"]), each["dtype"], each["layout"], residual=each["residual"])
        found[str(block)] = each["seconds"]
    return found


def bars(judged: dict[str, Any] | None = None, compiled: dict[str, Any] | None = None) -> list[Bar]:
    """The results of all goals, from two runs of the micro-benchmark, the second one with torch.compile."""
    found = []
    if judged is not None:
        with_cupy = importlib.util.find_spec("cupy") is not None
        measured = seconds_by_size(judged)
        for size in JUDGED:
            found += [goal.bar(size, measured.get(str(size), {})) for goal in goals(size, with_cupy)]
        if with_cupy:
            calls = {name: {"both": us} for name, us in judged.get("call_microseconds", {}).items()}
            goal = Goal("CuPy over its launchers", "both", CUPY_KERNELS, IN_PYTHON, most=CUPY_OVER_LAUNCHERS)
            found.append(goal.bar("a call", calls))
    if compiled is not None:
        goal = Goal("torch.compile over ours", "both", COMPILED, OURS, least=1)
        measured = seconds_by_size(compiled)
        for size in JUDGED:
            if isinstance(size, Size) and size.steps <= MOST_STEPS_TO_COMPILE:
                found.append(goal.bar(size, measured.get(str(size), {})))
    return found
