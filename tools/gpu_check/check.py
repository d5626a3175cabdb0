"""Builds, tests and times the CUDA kernels on a machine with a GPU: `python3 -m tools.gpu_check.check OUT`.

The kernels by nvcc and, where CuPy is installed, by NVRTC, in under ten minutes. Needs a Python with a CUDA build of
torch, numpy and pytest, and no network; to build the extension (or in advance: `python3 -m tools.gpu_check.prepare`)
setuptools, ninja, nvcc and a C++ compiler.

The extension is built first, which does not count against the ten minutes. The most important steps come first
(steps.py). Each has a time limit, and passes unused time on to the next; a step that fails stops no other. OUT gets
log.txt, all output, and gpu_check.json, rewritten as each step ends. A second run skips the steps that the first
completed. The verdicts are printed last. The exit status is 0 if everything passed; a dry run has no bars, and ten
times the time.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from benchmarks import ROOT

from .steps import BUILD, BUILD_SECONDS, RESULT, SECONDS, Machine, Step, environment, steps

WHOLE = 570.0  # seconds
GRACE = 8.0  # from SIGINT to SIGKILL
INTERRUPTED = "interrupted"


class Outcome(NamedTuple):
    """The outcome of a step."""

    name: str
    passed: bool
    ended: str  # how the step ended, in words
    complete: bool  # a later run can skip it
    seconds: float
    tests: str | None  # the last line of pytest
    failures: list[str]  # as in pytest's summary
    result: dict[str, Any]  # written by the step


def run(step: Step, limit: float, log: TextIO, variables: dict[str, str]) -> Outcome:
    """Runs a step, and prints and logs its output. Ends the step and its children at the limit, in seconds."""
    started = time.monotonic()
    lines: list[str] = []

    def show(line: str) -> None:
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        # A step begins no work after this time; the rest is for work in progress.
        words = {SECONDS: f"{0.8 * limit:.0f}", RESULT: str(file)}
        command = [words.get(word, word) for word in step.command]
        show(f"--- {step.name}, at most {limit:.0f} s: {' '.join(command)}")
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
                    show(lines[-1])
                status = process.wait()
                break
            except KeyboardInterrupt:
                end(signal.SIGINT)  # and read on
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
        step.name,
        ended == "passed",
        ended,
        complete,
        round(seconds, 1),
        last_of_pytest(lines),
        failures_in(lines),
        result,
    )


def run_all(
    todo: list[Step],
    whole: float,
    log: TextIO,
    note: Callable[[Outcome], None],
    variables: dict[str, str],
) -> bool:
    """Runs the steps until interrupted. Each may take the time left of `whole`, less the time of later steps.

    Returns whether all have ended.
    """
    end = time.monotonic() + whole
    for number, step in enumerate(todo):
        limit = end - time.monotonic() - sum(later.seconds for later in todo[number + 1 :])
        if limit < 1:
            note(Outcome(step.name, False, "not run: no time was left", False, 0.0, None, [], {}))
        else:
            outcome = run(step, limit, log, variables)
            note(outcome)
            if outcome.ended.startswith(INTERRUPTED):
                return False
    return True


def last_of_pytest(lines: list[str]) -> str | None:
    """The line in which pytest counts its tests; None if pytest was killed before."""
    found = [line for line in lines if re.search(r"\b\d+ (passed|failed|error|skipped)\b.* in [\d.]+s", line)]
    return found[-1].strip("= ") if found else None


def failures_in(lines: list[str]) -> list[str]:
    """The failures in pytest's summary, or if pytest was killed, the lines of the tests that failed."""
    listed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return listed or [line for line in lines if "::" in line and re.search(r"\b(FAILED|ERROR)\b", line)]


# ---- the findings ----


class Findings:
    """The content of gpu_check.json: the steps of this and earlier runs."""

    def __init__(self, file: Path, origin: dict[str, str]) -> None:
        self._file, self._origin = file, origin
        self.outcomes: dict[str, Outcome] = {}
        self.about: dict[str, Any] = {}  # the machine

    def read(self) -> str | None:
        """Reads the results of an earlier run; returns why this run can't continue them, if it can't."""
        if not self._file.exists():
            return None
        try:
            found = json.loads(self._file.read_text())
            outcomes = {name: Outcome(name, **outcome) for name, outcome in found["steps"].items()}
            theirs, about = found["origin"], found["machine"]
        except (ValueError, KeyError, TypeError):
            return f"{self._file} was not written by this program; name another folder, or use --again"
        for name, ours in self._origin.items():
            if theirs.get(name) != ours:
                return (
                    f"{self._file} is of {name} {theirs.get(name)}, and this is {ours}; name another folder, or use "
                    "--again"
                )
        self.outcomes, self.about = outcomes, about
        return None

    def is_done(self, name: str) -> bool:
        """Whether an earlier run completed this step."""
        return name != BUILD and name in self.outcomes and self.outcomes[name].complete

    def note(self, outcome: Outcome) -> None:
        """Adds the outcome of a step, and writes the file."""
        self.outcomes[outcome.name] = outcome
        self.about = outcome.result.pop("machine", None) or self.about
        self.write()

    def bars(self) -> list[Any]:
        """The bars for the measurements so far, none in a dry run: times on a CPU say nothing about them."""
        from .bars import bars  # needs torch

        steps = ("judged", "compiled") if self._origin["capability"] else ()
        return bars(**{name: self.outcomes[name].result for name in steps if name in self.outcomes})

    def write(self) -> None:
        from benchmarks.common import write_json  # needs torch

        content = {
            "origin": self._origin,
            "machine": self.about,
            "bars": [bar._asdict() for bar in self.bars()],
            "steps": {
                name: {key: value for key, value in outcome._asdict().items() if key != "name"}
                for name, outcome in self.outcomes.items()
            },
        }
        write_json(self._file, content)

    def summary(self) -> str:
        """The table that is printed last."""
        outcomes = list(self.outcomes.values())
        lines = [line for outcome in outcomes for line in outcome.failures][:20]
        lines += [f"{outcome.name}: {outcome.tests}" for outcome in outcomes if outcome.tests]
        for outcome in outcomes:
            note = f"; {outcome.result['note']}" if "note" in outcome.result else ""
            lines.append(f"{outcome.name:<72}{outcome.seconds:>8.0f} s  {outcome.ended}{note}")
        bars = self.bars()
        if bars:
            lines.append(f"{'':<62}{'goal':>16}{'measured':>10}")
        for bar in bars:
            measured = "" if bar.measured is None else f"{bar.measured:.2f}"
            verdict = "passed" if bar.passed else "missed" if bar.measured is not None else "not measured"
            lines.append(f"{bar.what:<62}{bar.goal:>16}{measured:>10}  {verdict}")
        failed, all_of_them = len(self.failed()), len(outcomes) + len(bars)
        return "\n".join(
            [*lines, f"gpu-check: {failed} of {all_of_them} failed" if failed else "gpu-check: all passed"]
        )

    def failed(self) -> list[str]:
        """The names of the steps and bars that did not pass."""
        return [
            *(outcome.name for outcome in self.outcomes.values() if not outcome.passed),
            *(bar.what for bar in self.bars() if not bar.passed),
        ]


def digest() -> str:
    """A hash of all files on which the results depend."""
    found = hashlib.sha256()
    for folder, kinds in (
        ("asgl_cuda", "*.py"), ("csrc", "*.[ch]*"), ("benchmarks", "*.py"), ("tools", "*.py"), ("tests", "*.py")
    ):  # fmt: skip
        for path in sorted((ROOT / folder).rglob(kinds)):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def why_not(dry_run: bool) -> str | None:
    """Why this machine can not run the check, with a remedy, or None."""
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
    """Why results can not be written to this folder, or None."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return None
    except OSError as error:
        return f"{out} can't be written: {error.strerror}"


def origin(dry_run: bool) -> dict[str, str]:
    """The properties that results must share to be comparable."""
    import torch

    found = {"code": digest(), "torch": str(torch.__version__), "gpu": "none", "capability": ""}
    if not dry_run:
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        }
    return found


def interrupt(*_: Any) -> None:
    """Ends the current step as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the steps that an earlier run has not completed, and prints the verdicts."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.gpu_check.check", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder for log.txt and gpu_check.json")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, such as gpu-tests kernels")
    parser.add_argument("--again", action="store_true", help="repeat completed steps, also those of other code")
    parser.add_argument("--dry-run", action="store_true", help="try this program, on the CPU with small sizes")
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
    findings = Findings(out / "gpu_check.json", origin(arguments.dry_run))
    if (problem := findings.read()) is not None and not arguments.again:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 1
    wanted = [step for step in todo if step.name in (arguments.only or names)]
    slower = 10 if arguments.dry_run else 1  # a dry run may have few cores, shared with others
    todo = [step for step in wanted if arguments.again or not findings.is_done(step.name)]
    builds = [step for step in todo if step.name == BUILD]
    todo = [step._replace(seconds=slower * step.seconds) for step in todo if step.name != BUILD]
    # Children inherit an ignored SIGINT from a background shell; SIGTERM must end the current step, too.
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    started = time.monotonic()
    with (out / "log.txt").open("a") as log:
        variables = environment(machine.device)
        if run_all(builds, BUILD_SECONDS, log, findings.note, variables):
            run_all(todo, slower * WHOLE, log, findings.note, variables)
        gpu = findings.about.get("gpu", "no GPU")
        text = f"{gpu}, {time.monotonic() - started:.0f} s in all\n{findings.summary()}"
        log.write(text + "\n")
    print(text)
    return 1 if findings.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
