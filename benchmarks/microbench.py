"""Time of one neuron layer, forward and backward, measured against an element-wise multiply in the same run.

The multiply is the floor: `x * 2` reads x and writes the result as forward must, `x * g` reads two tensors and writes
one as backward must. All rows take turns within each repeat, so that a machine whose speed drifts slows them alike;
what is reported is the median over the repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

import asgl_cuda

ANALOG_PROB = 0.2
COLUMNS = ("", "forward", "backward", "both, ms", "ns/el.", "multiplies", "faster")
FLOOR = "multiply"
REFERENCE = "reference"
# Beyond this many steps the compiler unrolls for minutes.
MOST_STEPS_TO_COMPILE = 16


class Size(NamedTuple):
    """The shape [steps, neurons] and type of one measurement."""

    steps: int
    neurons: int
    dtype: str

    @property
    def elements(self) -> int:
        return self.steps * self.neurons

    def __str__(self) -> str:
        return f"T = {self.steps}, N = {self.neurons}, {self.dtype}"


DEFAULT_SIZES = (
    Size(4, 2**20, "float32"),
    Size(4, 2**20, "bfloat16"),
    Size(128, 2**15, "float32"),
    Size(4, 2**23, "float32"),
)


class Row(NamedTuple):
    """What is timed: backward gets the result of forward."""

    name: str
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Any]


class Timing(NamedTuple):
    """Median seconds of one row."""

    forward: float
    backward: float
    both: float


def rows(size: Size) -> Iterator[Row]:
    """The floor, every available backend, the reference in eager mode and compiled."""
    dtype = getattr(torch, size.dtype)
    x_seq = torch.randn(size.steps, size.neurons).to(dtype)
    grad = torch.randn(size.steps, size.neurons).to(dtype)
    leaf = x_seq.clone().requires_grad_()
    width = torch.ones((), requires_grad=True)

    def layer(backend: str) -> Callable[[], Tensor]:
        return lambda: asgl_cuda.lif(leaf, width=width, analog_prob=ANALOG_PROB, backend=backend)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (leaf, width), grad, retain_graph=True)

    yield Row(FLOOR, lambda: x_seq * 2, lambda out: x_seq * grad)
    for backend in asgl_cuda.available_backends():
        if backend != REFERENCE:
            yield Row(f"asgl_cuda {backend}", layer(backend), backward)
    yield Row(REFERENCE, layer(REFERENCE), backward)
    if size.steps <= MOST_STEPS_TO_COMPILE:
        # Its backward must be repeatable to be timed alone, so it may not give its buffers away.
        torch._functorch.config.donated_buffer = False
        yield Row("torch.compile", torch.compile(layer(REFERENCE), fullgraph=True), backward)


def measure(size: Size, repeats: int, console: Console) -> dict[str, Timing]:
    """Median times of all rows, which take turns."""
    torch.manual_seed(0)
    candidates = list(rows(size))
    timers: dict[tuple[str, str], Timer] = {}
    for row in candidates:
        names = {"forward": row.forward, "backward": row.backward}
        timers[row.name, "forward"] = Timer("forward()", globals=names, num_threads=torch.get_num_threads())
        timers[row.name, "both"] = Timer("backward(forward())", globals=names, num_threads=torch.get_num_threads())
        timers[row.name, "backward"] = Timer(
            "backward(out)", "out = forward()", globals=names, num_threads=torch.get_num_threads()
        )
    for timer in timers.values():  # compiles, loads, fills caches
        timer.timeit(1)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    for _ in track(range(repeats), str(size), console=console, transient=True):
        for key, timer in timers.items():
            seconds[key].append(timer.timeit(1).mean)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {row.name: Timing(*(median[row.name, part] for part in Timing._fields)) for row in candidates}


def table(size: Size, timings: dict[str, Timing]) -> Table:
    """The measurement as a person reads it."""
    result = Table(title=str(size), title_justify="left", padding=(0, 0, 0, 1))
    for column in COLUMNS:
        result.add_column(column, justify="right" if column else "left")
    for name, timing in timings.items():
        result.add_row(
            name,
            *(f"{1e3 * seconds:.2f}" for seconds in timing),
            f"{1e9 * timing.both / size.elements:.3f}",
            f"{timing.both / timings[FLOOR].both:.2f}",
            f"{timings[REFERENCE].both / timing.both:.1f}",
        )
    return result


def call_overhead(calls: int = 2000, repeats: int = 15) -> dict[str, float]:
    """Microseconds of one call on a tiny tensor without gradients."""
    x_seq = torch.randn(4, 64)
    functions: dict[str, Callable[[], Tensor]] = {
        FLOOR: lambda: x_seq * 2,
        "asgl_cuda": lambda: asgl_cuda.lif(x_seq),
        "asgl_cuda with noise": lambda: asgl_cuda.lif(x_seq, analog_prob=ANALOG_PROB),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with torch.no_grad():
        for _ in range(repeats):
            for name, function in functions.items():
                timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
                seconds[name].append(timer.timeit(calls).mean)
    return {name: 1e6 * statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "processor": _processor(),
        "instruction_set": asgl_cuda.ops.extension.cpu_instruction_set() if asgl_cuda.ops.extension else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "asgl_cuda": asgl_cuda.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measures the sizes that were asked for and prints a table for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.microbench", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="time steps; with --neurons, measures this size alone")
    parser.add_argument("--neurons", type=int, help="neurons, batch included")
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--repeats", type=int, default=15, help="the median is over this many rounds (default 15)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to FILE")
    arguments = parser.parse_args()
    if (arguments.steps is None) != (arguments.neurons is None):
        parser.error("--steps and --neurons go together")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = DEFAULT_SIZES
    if arguments.steps is not None:
        sizes = (Size(arguments.steps, arguments.neurons, arguments.dtype),)

    console = Console()
    about = machine()
    console.print(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}; medians of {arguments.repeats}"
    )
    console.print(f"rectangle, hard reset, analog_prob {ANALOG_PROB}, learned width; gradients of x and width")
    console.print("multiplies: both, over that of x * 2 and x * g; faster: than the reference in eager mode")
    console.print("torch.compile: of the reference\n")
    results = []
    for size in sizes:
        timings = measure(size, arguments.repeats, console)
        console.print(table(size, timings))
        results.append({**size._asdict(), "seconds": {name: timing._asdict() for name, timing in timings.items()}})
    overhead = call_overhead()
    console.print("one call on [4, 64], no_grad: " + ", ".join(f"{name} {us:.1f} µs" for name, us in overhead.items()))
    if arguments.json:
        report = {"machine": about, "analog_prob": ANALOG_PROB, "sizes": results, "call_microseconds": overhead}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
