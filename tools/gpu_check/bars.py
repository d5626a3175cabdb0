"""The bars for the speed on a GPU, and whether they are reached.

A bar on a kernel is a multiple of the time of an operation that moves as many bytes, or the prediction of the roofline
for bandwidth and clock as measured in the same run and 15 % of room, if that is more.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import torch

from benchmarks.speed.host import IN_PYTHON
from benchmarks.speed.microbench import COMPILED, COPY, FLOOR, MOST_STEPS_TO_COMPILE, REFERENCE
from benchmarks.speed.rates import Rates
from benchmarks.speed.sizes import Block, Size, sweep

from ..roofline.prediction import ELEMENT_BYTES, MOVED, NORMALISATION_KERNELS, RESIDUAL_KERNELS
from .card import Work, roofline

CUPY_KERNELS = "asgl_cuda cupy"  # a row of the micro-benchmark
WHERE_MEMORY_BINDS = {"float32": {"forward": 1.15, "backward": 1.2, "both": 1.15}}
HALF_TYPES = 1.3
OVER_PREDICTED = 1.15  # the prediction assumes perfect overlap of memory and instructions
COPY_ACCESSES = 4  # to an element, by the copies of x and of the gradient beside a block
# A call by CuPy, over the same with launchers in Python that call no driver, in the same run: 77 us on a CPU. The rest
# is a launch by the driver, with torch's device and stream.
CUPY_OVER_LAUNCHERS = 1.5
Seconds = dict[str, dict[str, float]]  # by row, by part


class Bar(NamedTuple):
    """The result of a goal; `measured` and `predicted` may be missing."""

    what: str
    goal: str
    measured: float | None
    predicted: float | None
    passed: bool


class Goal(NamedTuple):
    """Bounds on the time of a row, as a multiple of the time of another."""

    what: str
    part: str
    row: str
    other: str
    least: float = 0.0
    most: float = math.inf
    times: float = 1.0  # the other row's time
    predicted: float | None = None

    def bar(self, size: str, seconds: Seconds) -> Bar:
        """The result at this size."""
        ratio = None
        if self.row in seconds and self.other in seconds:
            ratio = seconds[self.row][self.part] / (self.times * seconds[self.other][self.part])
        passed = ratio is not None and self.least <= ratio <= self.most
        return Bar(f"{size}: {self.what}", str(self), ratio, self.predicted, passed)

    def __str__(self) -> str:
        return f"at most {self.most:.2f}" if self.most < math.inf else f"at least {self.least:g}"


class Roof(NamedTuple):
    """The work of each kernel, and the rates of the card."""

    works: dict[tuple[str, str, int], Work]
    rates: Rates | None  # None where not measured

    def prediction(self, kernels: tuple[str, ...], dtype: str, steps: int) -> float | None:
        """Time of these kernels, as a multiple of the time of their bytes."""
        works = [self.works.get((name, dtype, steps)) or self.works.get((name, dtype, 0)) for name in kernels]
        if self.rates is None or None in works:
            return None
        moved = sum(MOVED[name] for name in kernels) * ELEMENT_BYTES[dtype]
        return sum(work.seconds(self.rates) for work in works if work) * self.rates.bandwidth / moved


def most(part: str, dtype: str, predicted: float | None) -> float:
    """The bar on forward, backward or both."""
    return max(WHERE_MEMORY_BINDS.get(dtype, {}).get(part, HALF_TYPES), OVER_PREDICTED * (predicted or 0.0))


def size_goals(size: Size, ours: str, with_cupy: bool, roof: Roof) -> list[Goal]:
    """The floor of the kernels is `x * 2` forward and `x * g` backward."""
    found = []
    for part, floor in (("forward", "x * 2"), ("backward", "x * g")):
        predicted = roof.prediction((part,), size.dtype, size.steps)
        bar = most(part, size.dtype, predicted)
        found.append(Goal(f"{part} over {floor}", part, ours, FLOOR, most=bar, predicted=predicted))
    found.append(Goal("reference over ours", "both", REFERENCE, ours, least=15))
    if with_cupy:
        found += [
            Goal(f"CuPy over nvcc, {part}", part, CUPY_KERNELS, ours, most=1.03) for part in ("forward", "backward")
        ]
    return found


def block_goals(block: Block, ours: str, with_cupy: bool, roof: Roof) -> list[Goal]:
    """The floor of normalisation and neurons is copies of as many bytes."""
    kernels = RESIDUAL_KERNELS if block.residual else NORMALISATION_KERNELS
    predicted = roof.prediction(kernels, block.dtype, block.steps)
    bar = most("both", block.dtype, predicted)
    times = block.accesses / COPY_ACCESSES
    names = {"nvcc": ours, **({"CuPy": CUPY_KERNELS} if with_cupy else {})}
    return [
        Goal(f"{name} over copies", "both", row, COPY, most=bar, times=times, predicted=predicted)
        for name, row in names.items()
    ]


def seconds_by_size(benchmark: dict[str, Any]) -> dict[str, Seconds]:
    """The seconds of each size and block, by name."""
    sizes = {str(size_of(each)): each["seconds"] for each in benchmark.get("sizes", ())}
    blocks = {str(block_of(each)): each["seconds"] for each in benchmark.get("blocks", ())}
    return {**sizes, **blocks}


def size_of(found: dict[str, Any]) -> Size:
    return Size(found["steps"], found["neurons"], found["dtype"], layout=found["layout"], learned=found["learned"])


def block_of(found: dict[str, Any]) -> Block:
    return Block(tuple(found["shape"]), found["dtype"], found["layout"], residual=found["residual"])


def bars(
    device: torch.device, judged: dict[str, Any] | None, compiled: dict[str, Any] | None, architecture: int | None
) -> list[Bar]:
    """Results by two runs of the micro-benchmark, the second with torch.compile, as far as they ran."""
    found = []
    if judged is not None:
        found += judged_bars(device, judged, architecture)
    if compiled is not None:
        goal = Goal("torch.compile over ours", "both", COMPILED, f"asgl_cuda {device.type}", least=1)
        measured = seconds_by_size(compiled)
        for size in sweep("judged", device):
            if isinstance(size, Size) and size.steps <= MOST_STEPS_TO_COMPILE:
                found.append(goal.bar(str(size), measured.get(str(size), {})))
    return found


def judged_bars(device: torch.device, judged: dict[str, Any], architecture: int | None) -> list[Bar]:
    ours = f"asgl_cuda {device.type}"
    with_cupy = device.type == "cuda" and importlib.util.find_spec("cupy") is not None
    roof = Roof(roofline(architecture), Rates(**judged["card"]) if "card" in judged else None)
    measured = seconds_by_size(judged)
    found = []
    for size in sweep("judged", device):
        goals = (block_goals if isinstance(size, Block) else size_goals)(size, ours, with_cupy, roof)
        found += [goal.bar(str(size), measured.get(str(size), {})) for goal in goals]
    if with_cupy:
        calls = {name: {"both": us} for name, us in judged.get("call_microseconds", {}).items()}
        goal = Goal("CuPy over its launchers", "both", CUPY_KERNELS, IN_PYTHON, most=CUPY_OVER_LAUNCHERS)
        found.append(goal.bar("a call", calls))
    return found
