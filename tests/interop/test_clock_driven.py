"""SpikingJelly 0.0.0.0.12, which can't be imported beside the current version."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".venv" / "spikingjelly-0.0.0.0.12"


@pytest.mark.skipif(not FOLDER.exists(), reason=f"no SpikingJelly 0.0.0.0.12 in {FOLDER}; make setup installs it")
def test_in_a_process_of_its_own():
    tests = Path(__file__).with_name("clock_driven.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", tests],
        env={**os.environ, "PYTHONPATH": str(FOLDER)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    counted = re.search(r"(\d+) passed", result.stdout)
    assert counted is not None
    assert int(counted[1]) > 20
