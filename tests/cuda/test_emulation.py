"""The emulation of CUDA on the CPU, to run the CUDA kernels where there is no GPU: it works, and it can fail."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "emulation"

# Programs with one mistake each, of the kinds that a kernel may have.
MISTAKES = (
    "missing-barrier-before-gather", "missing-barrier-before-broadcast", "missing-syncwarp", "wrong-lane",
    "divergent-barrier", "divergent-shuffle", "exited-lane", "misaligned",
)  # fmt: skip


@pytest.fixture(scope="session")
def selftest(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("emulation") / "selftest"
    command = [*compiler.split(), "-O2", "-std=c++20", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{HERE}/include"]
    subprocess.run([*command, str(HERE / "selftest.cpp"), "-o", str(program)], check=True)
    return program


def test_everything_works(selftest):
    result = subprocess.run([selftest, "all"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_found(selftest, mistake):
    result = subprocess.run([selftest, mistake], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stdout + result.stderr
