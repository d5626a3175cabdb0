"""Ctrl-C ends a benchmark with a line that says how to go on."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")

from benchmarks.learning.runs import train_all

ROOT = Path(__file__).parents[2]


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("said", ["", "--resume goes on"])
def test_one_line_and_the_signal(said):
    code = f"import benchmarks\nraise KeyboardInterrupt(*filter(None, [{said!r}]))"
    result = run(code)
    assert result.stderr == f"interrupted; {said or 'the same command begins anew'}\n"
    assert result.returncode == -signal.SIGINT


def test_errors_are_shown_as_ever():
    result = run("import benchmarks; 1 / 0")
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert result.returncode == 1


def interrupted(run, file):
    """The second training has the main process interrupted after the first, and would never end."""
    if run:
        while not file.exists():
            threading.Event().wait(0.01)
        os.kill(os.getppid(), signal.SIGINT)
        threading.Event().wait()
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_trainings_are_kept(tmp_path):
    file = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt, match=f"the same command goes on: {file} has 1 of 2 trainings"):
        train_all([0, 1], partial(interrupted, file=file), {"runs": {}, "seconds": 0.0}, file, jobs=1)
    assert json.loads(file.read_text())["runs"] == {"0": True}, "Ctrl-C reaches the main process alone"
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
