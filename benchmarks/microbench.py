"""Time of one neuron layer, forward and backward, measured against an element-wise multiply in the same run.

The multiply is the floor: `x * 2` reads x and writes the result as forward must, `x * g` reads two tensors and writes
one as backward must. All rows take turns within each repeat, so that a machine whose speed drifts slows them alike;
what is reported is the median over the repeats.

On a GPU the time is that of the device, between two CUDA events, while the host runs ahead. Several inputs take turns,
so that as far as 16 of them outgrow the cache they come from memory, as in a network.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils.benchmark import Timer

import asgl_cuda
from asgl_cuda.backends import BACKENDS

ANALOG_PROB = 0.2
FLOOR = "multiply"
REFERENCE = "reference"
COMPILED = "torch.compile"
# Beyond this many steps the compiler unrolls for minutes.
MOST_STEPS_TO_COMPILE = 16
# Autograd keeps some fifteen float32 tensors of the reference, and the gradients need room, too.
REFERENCE_BYTES_AN_ELEMENT = 100
MOST_SAMPLES = 16


class Size(NamedTuple):
    """The shape [steps, neurons] and type of one measurement."""

    steps: int
    neurons: int
    dtype: str
    compiled: bool = True  # whether torch.compile is measured, which takes seconds to compile

    @property
    def elements(self) -> int:
        return self.steps * self.neurons

    @property
    def bytes(self) -> int:
        return self.elements * getattr(torch, self.dtype).itemsize

    def __str__(self) -> str:
        return f"T = {self.steps}, N = {self.neurons}, {self.dtype}"


CPU_SIZES = (
    Size(4, 2**20, "float32"),
    Size(4, 2**20, "bfloat16"),
    Size(128, 2**15, "float32"),
    Size(4, 2**23, "float32"),
)
# What the kernels' speed is judged by.
GPU_SIZES = tuple(
    Size(steps, neurons, dtype) for steps, neurons in ((4, 2**24), (128, 2**19)) for dtype in ("float32", "bfloat16")
)
# From layers that a GPU hardly notices to the largest that 2^28 elements allow.
GPU_SWEEP = (
    *GPU_SIZES,
    *(
        Size(steps, 2**power, dtype, compiled=False)
        for steps in (4, 16, 128)
        for power in range(14, 27, 2)
        for dtype in ("float32", "bfloat16")
        if steps * 2**power <= 2**28 and (steps, power) not in ((4, 24), (16, 22))
    ),
    Size(16, 2**22, "float32"),
    Size(16, 2**22, "bfloat16"),
)


class Sample(NamedTuple):
    """One input with the gradient of its output; `leaf` is x in the eyes of autograd."""

    x: Tensor
    leaf: Tensor
    grad: Tensor


class Row(NamedTuple):
    """What is timed: backward gets the result of forward."""

    name: str
    forward: Callable[[Sample], Tensor]
    backward: Callable[[Sample, Tensor], Any]


class Timing(NamedTuple):
    """Median seconds of one row."""

    forward: float
    backward: float
    both: float


def samples(size: Size, device: torch.device) -> list[Sample]:
    """The inputs that take turns: one on a CPU, where the cache is part of the machine as users find it."""
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(math.ceil(2 * cache / size.bytes), MOST_SAMPLES)
    result = []
    for _ in range(count):
        x, grad = (
            torch.randn(size.steps, size.neurons, device=device, dtype=getattr(torch, size.dtype)) for _ in range(2)
        )
        result.append(Sample(x, x.detach().requires_grad_(), grad))
    return result


def fused_backends(device: torch.device) -> list[str]:
    return [name for name in asgl_cuda.available_backends() if name != REFERENCE and BACKENDS[name].serves(device)]


def rows(size: Size, device: torch.device) -> Iterator[Row]:
    """The floor, every available backend, the reference in eager mode and compiled."""
    width = torch.ones((), device=device, requires_grad=True)

    def layer(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda x_seq: asgl_cuda.lif(x_seq, width=width, analog_prob=ANALOG_PROB, backend=backend)

    def row(name: str, function: Callable[[Tensor], Tensor]) -> Row:
        return Row(name, lambda sample: function(sample.leaf), backward)

    def backward(sample: Sample, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (sample.leaf, width), sample.grad, retain_graph=True)

    yield Row(FLOOR, lambda sample: sample.x * 2, lambda sample, out: sample.x * sample.grad)
    for backend in fused_backends(device):
        yield row(f"asgl_cuda {backend}", layer(backend))
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if size.elements * REFERENCE_BYTES_AN_ELEMENT > memory / 2:
            return
    yield row(REFERENCE, layer(REFERENCE))
    if size.compiled and size.steps <= MOST_STEPS_TO_COMPILE:
        # Its backward must be repeatable to be timed alone, so it may not give its buffers away.
        torch._functorch.config.donated_buffer = False
        # Compiled for this size alone, not for any size because there was another before.
        torch._dynamo.reset()
        yield row(COMPILED, torch.compile(layer(REFERENCE), fullgraph=True, dynamic=False))


# Of a part: what is timed, and what is set up before.
CPU_STATEMENTS = {
    "forward": ("row.forward(sample)", "pass"),
    "backward": ("row.backward(sample, out)", "out = row.forward(sample)"),
    "both": ("row.backward(sample, row.forward(sample))", "pass"),
}


class CpuClock:
    """Seconds of one call of a part of a row: forward, backward, or both."""

    def __init__(self, row: Row, part: str, inputs: list[Sample]) -> None:
        names = {"row": row, "sample": inputs[0]}
        self._timer = Timer(*CPU_STATEMENTS[part], globals=names, num_threads=torch.get_num_threads())
        self.seconds()  # compiles, loads, fills caches

    def seconds(self) -> float:
        return self._timer.timeit(1).mean


class GpuClock:
    """The same on the GPU: of several calls in a row, which the host has queued before the first one starts."""

    CYCLES_A_SECOND = 2e9  # about; the wait need only be long enough
    LONGEST = 0.02  # seconds, of the calls in a row and of the wait

    def __init__(self, row: Row, part: str, inputs: list[Sample]) -> None:
        outs = [row.forward(sample) for sample in inputs] if part == "backward" else []
        self._call = {
            "forward": lambda i: row.forward(inputs[i]),
            "backward": lambda i: row.backward(inputs[i], outs[i]),
            "both": lambda i: row.backward(inputs[i], row.forward(inputs[i])),
        }[part]
        self._samples, self._next = len(inputs), 0
        self._run(1)  # compiles, loads
        torch.cuda.synchronize()
        started = time.perf_counter()
        self._run(1)
        queued = time.perf_counter()
        torch.cuda.synchronize()
        done = time.perf_counter()
        self._count = max(1, min(MOST_SAMPLES, int(self.LONGEST / (done - started))))
        self._wait = int(min(2 * self._count * (queued - started), self.LONGEST) * self.CYCLES_A_SECOND)

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._call(self._next)
            self._next = (self._next + 1) % self._samples

    def seconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._wait)
        start.record()
        self._run(self._count)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._count


def clocks_of(row: Row, inputs: list[Sample]) -> dict[tuple[str, str], CpuClock | GpuClock]:
    """A clock for each part of the row, warmed up; none where the row does not work and the others still count."""
    clock = GpuClock if inputs[0].x.is_cuda else CpuClock
    try:
        return {(row.name, part): clock(row, part, inputs) for part in Timing._fields}
    except RuntimeError as error:
        if row.name not in (REFERENCE, COMPILED):
            raise
        print(f"{row.name} does not work here: {str(error).splitlines()[0]}")
        return {}


def measure(size: Size, device: torch.device, repeats: int) -> dict[str, Timing]:
    """Median times of all rows, which take turns."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()  # of the size before; does nothing without a GPU
    inputs = samples(size, device)
    clocks: dict[tuple[str, str], CpuClock | GpuClock] = {}
    for row in rows(size, device):
        clocks |= clocks_of(row, inputs)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in clocks}
    for _ in range(repeats):
        for key, clock in clocks.items():
            seconds[key].append(clock.seconds())
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        name: Timing(*(median[name, part] for part in Timing._fields))
        for name in dict.fromkeys(name for name, _ in median)
    }


def table(size: Size, timings: dict[str, Timing]) -> str:
    """The measurement as a person reads it."""
    head = ("", "forward", "backward", "both, ms", "ns/el.", "x * 2", "x * g", "both", "faster")
    lines = [head]
    floor, reference = timings[FLOOR], timings.get(REFERENCE)
    for name, timing in timings.items():
        multiples = [seconds / least for seconds, least in zip(timing, floor, strict=True)]
        lines.append(
            (
                name,
                *(f"{1e3 * seconds:.3f}" for seconds in timing),
                f"{1e9 * timing.both / size.elements:.3f}",
                *(f"{multiple:.{2 if multiple < 100 else 0}f}" for multiple in multiples),
                f"{reference.both / timing.both:.1f}" if reference else "",
            )
        )
    widths = (9, 10, 10, 9, 7, 7, 7, 7)
    text = [
        f"{name:<15}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in lines
    ]
    return "\n".join((str(size), *text, ""))


def call_overhead(device: torch.device, calls: int = 2000, repeats: int = 15) -> dict[str, float]:
    """Microseconds of one call on a tiny tensor without gradients."""
    x_seq = torch.randn(4, 64, device=device)
    functions: dict[str, Callable[[], Tensor]] = {FLOOR: lambda: x_seq * 2}
    for backend in fused_backends(device):
        functions[f"asgl_cuda {backend}"] = partial(asgl_cuda.lif, x_seq, backend=backend)
        noisy = partial(asgl_cuda.lif, x_seq, analog_prob=ANALOG_PROB, backend=backend)
        functions[f"asgl_cuda {backend} with noise"] = noisy
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with torch.no_grad():
        for _ in range(repeats):
            for name, function in functions.items():
                timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
                seconds[name].append(timer.timeit(calls).mean)
    return {name: 1e6 * statistics.median(values) for name, values in seconds.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        **(_gpu(device) if device.type == "cuda" else {}),
        "processor": _processor(),
        "instruction_set": asgl_cuda.ops.extension.cpu_instruction_set() if asgl_cuda.ops.extension else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "asgl_cuda": asgl_cuda.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "kernels": asgl_cuda.ops.build_info.cuda if asgl_cuda.ops.build_info else None,
        "nvrtc": asgl_cuda.jit.nvrtc_version() if "cupy" in asgl_cuda.available_backends() else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str | None:
    """What a program prints, where it is installed and works."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None if result.returncode == 0 else None


def main() -> None:
    """Measures the sizes that were asked for and prints a table for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.microbench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if a backend works there, else cpu")
    parser.add_argument("--steps", type=int, help="time steps; with --neurons, measures this size alone")
    parser.add_argument("--neurons", type=int, help="neurons, batch included")
    parser.add_argument("--dtype", default="float32", choices=("float16", "bfloat16", "float32", "float64"))
    parser.add_argument("--sweep", choices=("gpu",), help="measures T = 4, 16, 128 and N from 2^14 to 2^26")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further size after this time")
    parser.add_argument("--repeats", type=int, default=15, help="the median is over this many rounds (default 15)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to FILE")
    arguments = parser.parse_args()
    started = time.monotonic()
    if (arguments.steps is None) != (arguments.neurons is None):
        parser.error("--steps and --neurons go together")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if fused_backends(torch.device("cuda")) else "cpu"))
    sizes = GPU_SWEEP if arguments.sweep else GPU_SIZES if device.type == "cuda" else CPU_SIZES
    if arguments.steps is not None:
        sizes = (Size(arguments.steps, arguments.neurons, arguments.dtype),)

    about = machine(device)
    on = about.get("gpu") or f"{about['processor']}, {about['threads']} threads"
    print(f"{on}, torch {about['torch']}; medians of {arguments.repeats}")
    print(f"rectangle, hard reset, analog_prob {ANALOG_PROB}, learned width; gradients of x and width")
    print("x * 2, x * g, both: forward, backward and both as multiples of these multiplies, and of both of them")
    print("faster: both, than the reference in eager mode; torch.compile: of the reference\n", flush=True)
    report: dict[str, Any] = {"machine": about, "analog_prob": ANALOG_PROB, "sizes": []}

    def write() -> None:
        if arguments.json:
            part = arguments.json.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(arguments.json)

    report["call_microseconds"] = overhead = call_overhead(device)
    for number, size in enumerate(sizes):
        if time.monotonic() - started > arguments.seconds:
            report["not_measured"] = [str(left) for left in sizes[number:]]
            print(f"not measured for want of time: {'; '.join(report['not_measured'])}")
            break
        timings = measure(size, device, arguments.repeats)
        print(table(size, timings), flush=True)
        report["sizes"].append(
            {
                "steps": size.steps,
                "neurons": size.neurons,
                "dtype": size.dtype,
                "seconds": {name: timing._asdict() for name, timing in timings.items()},
            }
        )
        write()  # now and whole, lest a limit from outside take all results
    write()
    print("one call on [4, 64], no_grad: " + ", ".join(f"{name} {us:.1f} µs" for name, us in overhead.items()))


if __name__ == "__main__":
    sys.exit(main())
