"""The emulation of CUDA on the CPU runs correct programs, and refuses incorrect ones."""

import subprocess

import pytest

from tools.emulation.sanitize import EMULATION, PROGRAMS

# Programs with one mistake each.
MISTAKES = (
    "missing-barrier-before-gather", "missing-barrier-before-broadcast", "missing-syncwarp", "wrong-lane",
    "divergent-barrier", "divergent-shuffle", "exited-lane", "misaligned",
)  # fmt: skip


@pytest.fixture(scope="session")
def selftest(compiler, tmp_path_factory):
    program = tmp_path_factory.mktemp("emulation") / "selftest"
    command = [*compiler, "-O2", "-std=c++20", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{EMULATION}/include"]
    subprocess.run([*command, str(PROGRAMS / "selftest.cpp"), "-o", str(program)], check=True)
    return program


def test_correct_programs(selftest):
    result = subprocess.run([selftest, "all"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_found(selftest, mistake):
    result = subprocess.run([selftest, mistake], capture_output=True, text=True, timeout=600)
    assert result.returncode == 1, result.stdout + result.stderr
