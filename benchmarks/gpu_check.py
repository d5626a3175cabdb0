"""Builds, tests and times the CUDA kernels on a machine with a GPU: `make gpu-check OUT=dir`.

Both as nvcc compiles them and, where CuPy is installed, as NVRTC does.

It takes the Python that runs it as it is, with its torch, and needs no network. Every step has a time limit, and the
time that one leaves over is the next one's; a step that fails stops no other. OUT gets log.txt, all that was printed,
and gpu_check.json; what counts is printed last. The exit status is 0 if everything passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).parents[1]
# Of these no test touches the GPU, and some take minutes.
IGNORED = (
    "--ignore=tests/test_build.py",
    "--ignore=tests/test_distributed.py",
    "--ignore=tests/test_emulation.py",
    "--ignore=tests/test_end_to_end.py",
    "--ignore=tests/test_fuse.py",
    "--ignore=tests/test_kernel_params.py",
    "--ignore=tests/test_launches.py",
    "--ignore=tests/test_mutants.py",
    "--ignore=tests/test_microbench.py",
    "--ignore=tests/test_native.py",
    "--ignore=tests/test_smoothing.py",
    "--ignore=tests/test_wheel.py",
    "--deselect=tests/test_command_line.py::test_every_clone_of_the_cpu_kernels_agrees",
)
JUDGED = tuple((steps, neurons, dtype) for steps, neurons in ((4, 24), (128, 19)) for dtype in ("float32", "bfloat16"))
# Of normalisation and neurons: shape, type and layout.
JUDGED_BLOCKS = tuple(
    ((4, batch, 64, 32, 32), dtype, layout)
    for batch, dtype, layout in (
        (32, "float32", "time first"),
        (256, "float32", "time first"),
        (256, "float32", "channels_last"),
        (256, "bfloat16", "time first"),
    )
)
KERNELS, CUPY_KERNELS = "asgl_cuda cuda", "asgl_cuda cupy"  # rows of the micro-benchmark, as those named below
# An element of a block is accessed nine times, by a copy of x and one of the gradient four times.
COPIES_OF_A_BLOCK = 9 / 4
CUPY_MICROSECONDS = 30  # that a call of the host may take longer


class Step(NamedTuple):
    """A command with its share of the time; `objection` looks at the output of one that ended with status 0."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str]
    objection: Callable[[list[str]], str | None] = lambda lines: None


class Outcome(NamedTuple):
    """How a step ended."""

    name: str
    passed: bool
    ended: str  # in words
    seconds: float
    lines: list[str]  # of its output


class Goal(NamedTuple):
    """How much time of one row for the time of another is wanted."""

    what: str
    part: str
    row: str
    other: str
    least: float = 0.0
    most: float = math.inf
    times: float = 1.0  # the other row's time is taken

    def bar(self, size: str, seconds: dict[str, dict[str, float]]) -> Bar:
        """What came of it at this size."""
        ratio = None
        if self.row in seconds and self.other in seconds:
            ratio = seconds[self.row][self.part] / (self.times * seconds[self.other][self.part])
        passed = ratio is not None and self.least <= ratio <= self.most
        return Bar(f"{size}: {self.what}", str(self), ratio, passed)

    def __str__(self) -> str:
        return f"at most {self.most:g}" if self.most < math.inf else f"at least {self.least:g}"


class Bar(NamedTuple):
    """What came of a goal; `measured` is None where it was not."""

    what: str
    goal: str
    measured: float | None
    passed: bool


def steps(python: str, capability: tuple[int, int], out: Path) -> list[Step]:
    """Their seconds come to just under nine minutes. The build, without which all else is vain, has some to spare.

    The suite on CuPy compiles some hundred kernels, which the tests of the device then find in CuPy's cache.
    """
    pytest = [python, "-m", "pytest", "-rfE", "--color=no"]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    suite = [*pytest, *workers, *IGNORED, "-m", "not gpu"]
    build = {"ASGL_CUDA_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability)}
    bench = [python, "-m", "benchmarks.microbench", "--device", "cuda", "--sweep", "gpu", "--repeats", "10"]
    found = [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 140, build),
        Step("info", [python, "-m", "asgl_cuda", "info"], 10, {}, cuda_is_missing),
        Step("check", [python, "-m", "asgl_cuda", "check"], 35, {}),
        Step("suite", suite, 80, {"ASGL_TEST_BACKENDS": "cuda"}, nothing_passed),
        Step("suite on CuPy", suite, 90, {"ASGL_TEST_BACKENDS": "cupy"}, nothing_passed),
        Step("gpu tests", [*pytest, "-m", "gpu"], 80, {"ASGL_TEST_BACKENDS": "cuda,cupy"}, nothing_passed),
        Step("benchmark", [*bench, "--seconds", "75", "--json", str(out / "microbench.json")], 100, {}),
    ]
    return found if importlib.util.find_spec("cupy") else [step for step in found if "CuPy" not in step.name]


def cuda_is_missing(lines: list[str]) -> str | None:
    return None if any(line.split() == ["cuda", "works"] for line in lines) else "the backend cuda does not work"


def nothing_passed(lines: list[str]) -> str | None:
    """Where the backend is missing there is nothing to test, and pytest is content."""
    return None if any(re.search(r"\b\d+ passed", line) for line in lines) else "no test was run"


def run(step: Step, limit: float, log: TextIO) -> Outcome:
    """Prints and logs what the step says, ends it and its children at the limit."""
    started = time.monotonic()

    def tell(line: str) -> None:
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    tell(f"--- {step.name}, at most {limit:.0f} s: {' '.join(step.command)}")
    process = subprocess.Popen(
        step.command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}, text=True,
        errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        tell(lines[-1])
    status = process.wait()
    timer.cancel()
    seconds = time.monotonic() - started
    if late.is_set():
        return Outcome(step.name, False, f"stopped after {seconds:.0f} s", seconds, lines)
    if status != 0:
        return Outcome(step.name, False, f"failed with status {status}", seconds, lines)
    objection = step.objection(lines)
    return Outcome(step.name, objection is None, objection or "passed", seconds, lines)


def run_all(todo: list[Step], log: TextIO) -> list[Outcome]:
    """One after the other, each up to the time at which all before it and itself must be done."""
    started = time.monotonic()
    done_by = 0.0
    outcomes = []
    for step in todo:
        done_by += step.seconds
        outcomes.append(run(step, started + done_by - time.monotonic(), log))
    return outcomes


def goals(steps: int, dtype: str) -> list[Goal]:
    """The floor of the kernels is `x * 2` forward and `x * g` backward."""
    forward, backward = (1.15, 1.2) if dtype == "float32" else (1.3, 1.3)
    found = [
        Goal("forward over x * 2", "forward", KERNELS, "multiply", most=forward),
        Goal("backward over x * g", "backward", KERNELS, "multiply", most=backward),
        Goal("reference over ours", "both", "reference", KERNELS, least=15),
    ]
    if importlib.util.find_spec("cupy"):
        found += [
            Goal(f"CuPy over nvcc, {part}", part, CUPY_KERNELS, KERNELS, most=1.03) for part in ("forward", "backward")
        ]
    if steps <= 16:  # beyond, compiling takes minutes
        found.append(Goal("torch.compile over ours", "both", "torch.compile", KERNELS, least=1))
    return found


def block_goals(dtype: str) -> list[Goal]:
    """The floor of normalisation and neurons is to move as many bytes, 36 an element in float32, by copies."""
    most = 1.15 if dtype == "float32" else 1.3
    names = {"CuPy": CUPY_KERNELS} if importlib.util.find_spec("cupy") else {}
    return [
        Goal(f"{name} over copies", "both", row, "copy", most=most, times=COPIES_OF_A_BLOCK)
        for name, row in {"nvcc": KERNELS, **names}.items()
    ]


def bars(benchmark: dict[str, Any]) -> list[Bar]:
    """What the measurements of the micro-benchmark come to."""
    measured = {(size["steps"], size["neurons"], size["dtype"]): size["seconds"] for size in benchmark.get("sizes", ())}
    found = []
    for steps, power, dtype in JUDGED:
        seconds = measured.get((steps, 2**power, dtype), {})
        found += [goal.bar(f"T = {steps}, N = 2^{power}, {dtype}", seconds) for goal in goals(steps, dtype)]
    blocks = benchmark.get("blocks", ())
    measured = {(*block["shape"], block["dtype"], block["layout"]): block["seconds"] for block in blocks}
    for shape, dtype, layout in JUDGED_BLOCKS:
        seconds = measured.get((*shape, dtype, layout), {})
        found += [goal.bar(f"block {list(shape)}, {dtype}, {layout}", seconds) for goal in block_goals(dtype)]
    if importlib.util.find_spec("cupy"):
        calls = benchmark.get("call_microseconds", {})
        more = calls[CUPY_KERNELS] - calls[KERNELS] if {CUPY_KERNELS, KERNELS} <= calls.keys() else None
        passed = more is not None and more <= CUPY_MICROSECONDS
        found.append(Bar("a call, CuPy over nvcc, microseconds", f"at most {CUPY_MICROSECONDS}", more, passed))
    return found


def counts_of(outcome: Outcome) -> str | None:
    """The last line that pytest prints."""
    found = [line for line in outcome.lines if re.search(r"\b\d+ (passed|failed|error|skipped)\b.* in [\d.]+s", line)]
    return found[-1].strip("= ") if found else None


def failures_in(outcome: Outcome) -> list[str]:
    """What pytest lists in its summary."""
    return [line for line in outcome.lines if line.startswith(("FAILED ", "ERROR "))]


def summary(outcomes: list[Outcome], judged: list[Bar]) -> str:
    """The short table that is printed last."""
    rows = [(outcome.name, "", f"{outcome.seconds:.0f} s", outcome.ended) for outcome in outcomes]
    for bar in judged:
        value = "" if bar.measured is None else f"{bar.measured:.2f}"
        verdict = "passed" if bar.passed else "missed" if bar.measured is not None else "not measured"
        rows.append((bar.what, bar.goal, value, verdict))
    failed = sum(not each.passed for each in (*outcomes, *judged))
    lines = [line for outcome in outcomes for line in failures_in(outcome)][:20]
    lines += [f"{outcome.name}: {counts}" for outcome in outcomes if (counts := counts_of(outcome))]
    lines += [f"{what:<72}{goal:>13}{value:>8}  {verdict}" for what, goal, value, verdict in rows]
    return "\n".join([*lines, f"gpu-check: {failed} of {len(rows)} failed" if failed else "gpu-check: all passed"])


def result(outcomes: list[Outcome], judged: list[Bar], benchmark: dict[str, Any]) -> dict[str, Any]:
    """The content of gpu_check.json but for the machine."""
    return {
        "steps": {
            outcome.name: {
                "passed": outcome.passed,
                "ended": outcome.ended,
                "seconds": round(outcome.seconds, 1),
                "tests": counts_of(outcome),
                "failures": failures_in(outcome),
            }
            for outcome in outcomes
        },
        "bars": [bar._asdict() for bar in judged],
        "benchmark": benchmark,
    }


def why_not() -> str | None:
    """What is missing here."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch that imports ({error}); name another Python: make gpu-check PYTHON=..."
    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} is a build without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU: torch.cuda.is_available() is False"
    return None


def main() -> int:
    """Runs all steps."""
    parser = argparse.ArgumentParser(prog="make gpu-check OUT=dir", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder for log.txt and gpu_check.json")
    out = parser.parse_args().out.absolute()
    if (problem := why_not()) is not None:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 1
    import torch

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    measurements = out / "microbench.json"
    measurements.unlink(missing_ok=True)
    with (out / "log.txt").open("w") as log:
        outcomes = run_all(steps(sys.executable, torch.cuda.get_device_capability(), out), log)
        benchmark = json.loads(measurements.read_text()) if measurements.exists() else {}
        measurements.unlink(missing_ok=True)
        judged = bars(benchmark)
        # Not before: it loads what has just been built.
        from .microbench import machine

        about = benchmark.pop("machine", None) or machine(torch.device("cuda"))
        content = {"machine": about, **result(outcomes, judged, benchmark)}
        (out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
        text = f"{about['gpu']}, {time.monotonic() - started:.0f} s in all\n{summary(outcomes, judged)}"
        log.write(text + "\n")
    print(text)
    return 0 if all(each.passed for each in (*outcomes, *judged)) else 1


if __name__ == "__main__":
    sys.exit(main())
