"""Builds, tests and times the CUDA kernels on a machine with a GPU: `python3 -m tools.gpu_check.check OUT`.

Both as nvcc compiles them and, where CuPy is installed, as NVRTC does, in under ten minutes. It takes the Python that
runs it as it is, with a CUDA build of torch, numpy and pytest, and needs no network; to build the extension it needs
setuptools, ninja, nvcc and a C++ compiler, unless it was built before (`python3 -m tools.gpu_check.prepare`).

What counts most comes first (gpu_steps.py). Every step has a time limit, and the time that one leaves over is the next
one's; a step that fails stops no other. OUT gets log.txt, all that was printed, and gpu_check.json, written anew as
each step ends. A second run goes on where the first was cut off: it leaves out the steps that came to their end. The
verdicts are printed last. The exit status is 0 if everything passed; a dry run has no bars to reach.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from benchmarks import ROOT

from .steps import RESULT, SECONDS, Machine, Step, environment, steps

WHOLE = 570.0  # seconds
GRACE = 8.0  # from the signal that ends a step to the one that it can't refuse
INTERRUPTED = "interrupted"
ALWAYS = "extension"  # each run looks whether it is there


class Outcome(NamedTuple):
    """The end of a step."""

    name: str
    passed: bool
    ended: str  # in words
    complete: bool  # whether a later run has nothing to add
    seconds: float
    tests: str | None  # the last line that pytest prints
    failures: list[str]  # as pytest lists them in its summary
    result: dict[str, Any]  # as the step itself has written it


def run(step: Step, limit: float, log: TextIO, variables: dict[str, str]) -> Outcome:
    """Prints and logs the output of the step, ends it and its children at the limit."""
    started = time.monotonic()
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        # A step finishes the work that it has begun when its time is up, if that takes no longer than this.
        words = {SECONDS: f"{0.8 * limit:.0f}", RESULT: str(file)}
        command = [words.get(word, word) for word in step.command]
        tell(f"--- {step.name}, at most {limit:.0f} s: {' '.join(command)}")
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **variables, **step.environment}, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        late = threading.Event()

        def end(number: int) -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

        timers = [
            threading.Timer(limit, end, [signal.SIGINT]),
            threading.Timer(limit + GRACE, end, [signal.SIGKILL]),
        ]
        for timer in timers:
            timer.start()
        interrupted = False
        while True:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.append(line.rstrip("\n"))
                    tell(lines[-1])
                status = process.wait()
                break
            except KeyboardInterrupt:
                end(signal.SIGINT)  # and hear its last words
                interrupted = True
                timers.append(threading.Timer(GRACE, end, [signal.SIGKILL]))
                timers[-1].start()
        for timer in timers:
            timer.cancel()
        result = json.loads(file.read_text()) if file.exists() else {}
    seconds = time.monotonic() - started
    objection = None if status else step.objection(lines)
    ended = (
        f"{INTERRUPTED} after {seconds:.0f} s" if interrupted
        else f"stopped after {seconds:.0f} s" if late.is_set()
        else f"failed with status {status}" if status
        else objection or "passed"
    )  # fmt: skip
    complete = not late.is_set() and "not_measured" not in result
    return Outcome(
        step.name, ended == "passed", ended, complete, round(seconds, 1), counts_in(lines), failures_in(lines), result
    )


def run_all(
    todo: list[Step],
    whole: float,
    log: TextIO,
    note: Callable[[Outcome], None],
    variables: dict[str, str],
) -> None:
    """Runs one after the other until someone interrupts; each may take the time left, less the time of those behind."""
    end = time.monotonic() + whole
    for number, step in enumerate(todo):
        limit = end - time.monotonic() - sum(later.seconds for later in todo[number + 1 :])
        if limit < 1:
            note(Outcome(step.name, False, "not run: no time was left", False, 0.0, None, [], {}))
        else:
            outcome = run(step, limit, log, variables)
            note(outcome)
            if outcome.ended.startswith(INTERRUPTED):
                return


# A line that tells of one test, from one process of pytest or from several.
TOLD = re.compile(r"^(?:\S+::.* )?(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR|SKIPPED)( \S+::.*)?(?: +\[ *\d+%\])?$")


def told_in(lines: list[str]) -> list[tuple[str, str]]:
    """How each test ended, and the line that said so as it did."""
    matches = ((TOLD.match(line), line) for line in lines if "::" in line)
    return [(match[1], line) for match, line in matches if match]


def counts_in(lines: list[str]) -> str | None:
    """The last line of pytest; where it was killed before, a count of the single tests."""
    found = [line for line in lines if re.search(r"\b\d+ (passed|failed|error|skipped)\b.* in [\d.]+s", line)]
    if found:
        return found[-1].strip("= ")
    counted = Counter(word.lower() for word, _ in told_in(lines))
    return f"{', '.join(f'{count} {word}' for word, count in counted.items())}, then killed" if counted else None


def failures_in(lines: list[str]) -> list[str]:
    """The failures in the summary of pytest; where it was killed before, the lines of single tests."""
    listed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return listed or [line for word, line in told_in(lines) if word in ("FAILED", "ERROR")]


# ---- the findings ----


class Findings:
    """gpu_check.json: the steps that have run, here or in a run before."""

    def __init__(self, file: Path, of: dict[str, str]) -> None:
        self._file, self._of = file, of
        self.outcomes: dict[str, Outcome] = {}
        self.about: dict[str, Any] = {}  # the machine

    def read(self) -> str | None:
        """Reads the results of an earlier run; returns why they can't be continued, if they can't."""
        if not self._file.exists():
            return None
        try:
            found = json.loads(self._file.read_text())
            outcomes = {name: Outcome(name, **outcome) for name, outcome in found["steps"].items()}
            theirs, about = found["of"], found["machine"]
        except (ValueError, KeyError, TypeError):
            return f"{self._file} was not written by this program; name another folder, or start anew with --again"
        for name, ours in self._of.items():
            if theirs.get(name) != ours:
                return (
                    f"{self._file} is of {name} {theirs.get(name)}, and this is {ours}; name another folder, or start "
                    "anew with --again"
                )
        self.outcomes, self.about = outcomes, about
        return None

    def is_done(self, name: str) -> bool:
        return name != ALWAYS and name in self.outcomes and self.outcomes[name].complete

    def note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        self.about = outcome.result.pop("machine", None) or self.about
        self.write()

    def bars(self) -> list[Any]:
        """The bars for the measurements so far."""
        import torch

        from .bars import bars

        judged, compiled = (
            self.outcomes[name].result if name in self.outcomes else None for name in ("judged", "compiled")
        )
        capability = self._of["capability"]
        architecture = int(capability.replace(".", "")) if capability else None
        return bars(torch.device("cuda" if capability else "cpu"), judged, compiled, architecture)

    def write(self) -> None:
        from benchmarks.common import write_json  # which needs torch

        content = {
            "of": self._of,
            "machine": self.about,
            "bars": [bar._asdict() for bar in self.bars()],
            "steps": {
                name: {key: value for key, value in outcome._asdict().items() if key != "name"}
                for name, outcome in self.outcomes.items()
            },
        }
        write_json(self._file, content)

    def summary(self) -> str:
        """The short table that is printed last."""
        outcomes = list(self.outcomes.values())
        lines = [line for outcome in outcomes for line in outcome.failures][:20]
        lines += [f"{outcome.name}: {outcome.tests}" for outcome in outcomes if outcome.tests]
        lines += [f"{outcome.name:<72}{outcome.seconds:>8.0f} s  {outcome.ended}" for outcome in outcomes]
        judged = self.bars()
        if judged:
            lines.append(f"{'':<62}{'predicted':>10}{'goal':>16}{'measured':>10}")
        for bar in judged:
            predicted, measured = ("" if each is None else f"{each:.2f}" for each in (bar.predicted, bar.measured))
            verdict = "passed" if bar.passed else "missed" if bar.measured is not None else "not measured"
            lines.append(f"{bar.what:<62}{predicted:>10}{bar.goal:>16}{measured:>10}  {verdict}")
        failed, all_of_them = len(self.failed()), len(outcomes) + len(judged)
        return "\n".join(
            [*lines, f"gpu-check: {failed} of {all_of_them} failed" if failed else "gpu-check: all passed"]
        )

    def failed(self) -> list[str]:
        """The steps and bars that did not pass."""
        return [
            *(outcome.name for outcome in self.outcomes.values() if not outcome.passed),
            *(bar.what for bar in self.bars() if not bar.passed and self._of["capability"]),
        ]


def digest() -> str:
    """A digest of all files that the results depend on."""
    found = hashlib.sha256()
    for folder, kinds in (("asgl_cuda", "*.py"), ("csrc", "*.[ch]*"), ("benchmarks", "*.py"), ("tests", "*.py")):
        for path in sorted((ROOT / folder).rglob(kinds)):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def why_not(dry_run: bool) -> str | None:
    """The requirement that is missing here."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch that imports ({error}); take another Python"
    missing = [name for name in ("numpy", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} lacks {' and '.join(missing)}: {sys.executable} -m pip install {' '.join(missing)}"
    if dry_run:
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} is a build without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU: torch.cuda.is_available() is False"
    return None


def not_writable(out: Path) -> str | None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return None
    except OSError as error:
        return f"{out} can't be written: {error.strerror}"


def of_here(dry_run: bool) -> dict[str, str]:
    """The properties that results must share to stand side by side."""
    import torch

    found = {"code": digest(), "torch": str(torch.__version__), "gpu": "none", "capability": ""}
    if not dry_run:
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        }
    return found


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Runs the steps that are not done yet."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.gpu_check.check", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder for log.txt and gpu_check.json")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, such as gpu-tests kernels")
    parser.add_argument("--again", action="store_true", help="also what a run before has done, of this code or another")
    parser.add_argument("--seconds", type=float, default=WHOLE, help=f"for all of it (default {WHOLE:.0f})")
    parser.add_argument("--dry-run", action="store_true", help="try this program: the CPU and small sizes for the GPU")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    if (problem := why_not(arguments.dry_run) or not_writable(out)) is not None:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 1
    machine = Machine.here("cpu" if arguments.dry_run else "cuda")
    todo = steps(machine)
    names = [step.name for step in todo]
    if unknown := set(arguments.only or ()) - set(names):
        parser.error(f"--only must name some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    findings = Findings(out / "gpu_check.json", of_here(arguments.dry_run))
    if (problem := findings.read()) is not None and not arguments.again:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 1
    wanted = [step for step in todo if step.name in (arguments.only or names)]
    todo = [step for step in wanted if arguments.again or not findings.is_done(step.name)]
    # A shell may have had this ignored, and children inherit that; the other one must end the step that runs, too.
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    started = time.monotonic()
    with (out / "log.txt").open("a") as log:
        run_all(todo, arguments.seconds, log, findings.note, environment(machine.device))
        gpu = findings.about.get("gpu", "no GPU")
        text = f"{gpu}, {time.monotonic() - started:.0f} s in all\n{findings.summary()}"
        log.write(text + "\n")
    print(text)
    return 1 if findings.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
