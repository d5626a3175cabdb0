"""The steps of `python3 -m tools.gpu_check.check` and their time, the most important first."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import ROOT

BUILD = "extension"  # the step before the others, in every run
BUILD_SECONDS = 3600.0  # beside the time of the others: a compiler on few cores may take half an hour
PREPARED = ROOT / "build" / "prepared"  # by prepare.py
CUPY_CACHE = PREPARED / "cupy"
# Placeholders in a command.
SECONDS = "SECONDS"  # time limit
RESULT = "RESULT"  # JSON file for results
# Stand in for a suite without a GPU.
A_FEW_TESTS = ["tests/reference/test_noise.py", "-k", "mask_with_time or none_and_all"]


class Machine(NamedTuple):
    """The properties that determine the steps."""

    device: str
    backends: tuple[str, ...]
    ncu: str | None = None
    sanitizer: bool = False
    workers: int = 0  # processes of pytest-xdist; 0 without it

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine; for a CPU, only the backend cpu."""
        if device == "cpu":
            return cls("cpu", ("cpu",))
        return cls(
            "cuda",
            ("cuda", *(["cupy"] if importlib.util.find_spec("cupy") else [])),
            shutil.which("ncu"),
            shutil.which("compute-sanitizer") is not None,
            min(8, (os.cpu_count() or 1) // 2) if importlib.util.find_spec("xdist") else 0,
        )


class Step(NamedTuple):
    """A command and its reserved time; `objection` may refuse the output of a command with status 0."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str]
    objection: Callable[[list[str]], str | None] = lambda lines: None


def nothing_passed(lines: list[str]) -> str | None:
    """Without the backend pytest has nothing to test, and succeeds."""
    return None if any(re.search(r"\b\d+ passed", line) for line in lines) else "no test was run"


def not_everything(lines: list[str]) -> str | None:
    left = next((line for line in lines if line.startswith("not measured for want of time")), None)
    return None if left is None else f"{left.count(';') + 1} sizes were not measured for want of time"


def steps(machine: Machine, python: str = sys.executable) -> list[Step]:
    """The build, and steps of at most nine and a half minutes in all; each may use what those before it left."""
    device, on_gpu = machine.device, machine.device == "cuda"
    # A line for each test as it ends, and a traceback of a test that hangs: in the driver only SIGKILL ends it.
    pytest = [python, "-m", "pytest", "-vv", "-rfE", "--color=no", "-o", "faulthandler_timeout=45"]

    def tests(name: str, marked: str, seconds: float, backends: tuple[str, ...], workers: int = 0) -> Step:
        chosen = ["-m", marked] if on_gpu else ["-m", "backend", *A_FEW_TESTS]
        processes = ["-n", str(workers)] if workers else []
        return Step(
            name, [*pytest, *processes, *chosen], seconds, {"ASGL_TEST_BACKENDS": ",".join(backends)}, nothing_passed
        )

    def measures(name: str, module: str, *arguments: str, seconds: float, timed: bool = True) -> Step:
        limit = ["--seconds", SECONDS] if timed else []
        command = [python, "-m", module, "--device", device, *arguments, *limit, "--json", RESULT]
        return Step(name, command, seconds, {}, not_everything)

    def benchmark(name: str, sweep: str, repeats: int, seconds: float) -> Step:
        repeated = str(repeats if on_gpu else 2)
        return measures(name, "benchmarks.speed.microbench", "--sweep", sweep, "--repeats", repeated, seconds=seconds)

    found = [
        Step(BUILD, [python, "-m", "tools.gpu_check.prepare", "--device", device], BUILD_SECONDS, {}),
        tests("gpu-tests", "gpu and not sanitizer", 50, machine.backends),  # one process: some fill the memory
        measures("kernels", "tools.gpu_check.kernel_times", seconds=40),
    ]
    if machine.ncu:
        found.append(
            measures("counters", "tools.gpu_check.kernel_times", "--ncu", machine.ncu, seconds=40, timed=False)
        )
    found.append(benchmark("judged", "judged", repeats=10, seconds=55))
    found += [tests(f"suite-{each}", "backend and not gpu", 65, (each,), machine.workers) for each in machine.backends]
    found += [
        Step("check", [python, "-m", "asgl_cuda", "check"], 10, {}),
        measures("layers", "tools.gpu_check.layers", seconds=40, timed=False),
        measures("layers-compiled", "tools.gpu_check.layers", "--compiled", seconds=60, timed=False),
        benchmark("compiled", "compiled", repeats=5, seconds=45),
    ]
    if machine.sanitizer:
        found.append(tests("sanitizer", "sanitizer", 30, machine.backends, machine.workers))
    return found


def environment(device: str) -> dict[str, str]:
    """The environment of all steps; without a GPU, of processes that share few cores."""
    found = {"PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        return {**found, "OMP_NUM_THREADS": "1", "ASGL_TEST_BACKENDS": "cpu"}
    return {**found, "CUPY_CACHE_DIR": os.environ.get("CUPY_CACHE_DIR", str(CUPY_CACHE))}
