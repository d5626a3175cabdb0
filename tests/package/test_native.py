"""The headers of csrc without torch, compiled alone by the host's C++ compiler."""

import re
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = Path(__file__).parent / "native" / "headers_test.cpp"
# No contraction, as in the build of the extension: the kernels promise equal bits.
FLAGS = ("-O1", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")

CHECKS = tuple(re.findall(r"CHECK\((\w+)\),", SOURCE.read_text()))


@pytest.fixture(scope="session")
def program(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "headers_test"
    build = [*compiler, *FLAGS, "-I", str(CSRC), str(SOURCE), "-o", str(path)]
    result = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return path


@pytest.mark.parametrize("check", CHECKS)
def test_headers(program, check):
    result = subprocess.run([program, check], capture_output=True, text=True, timeout=600)
    # A negative status is the terminating signal, such as a segmentation fault.
    assert result.returncode == 0, f"status {result.returncode}: {result.stdout}{result.stderr}"


def test_every_check_of_the_program_is_run(program):
    result = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert tuple(result.stdout.split()) == CHECKS


@pytest.mark.parametrize("header", [*CSRC.glob("math/*.h"), *CSRC.glob("params/*.h")], ids=lambda path: path.stem)
def test_header_stands_alone(compiler, tmp_path, header):
    """Included first and alone, with no header from outside csrc, which NVRTC lacks."""
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header}"\n')
    build = [*compiler, *FLAGS, "-I", str(CSRC), "-M", str(source)]
    result = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    included = [Path(word) for word in result.stdout.replace("\\\n", " ").split()[1:]]
    # Compilers name headers of their own among the dependencies although no line includes them.
    outside = [
        path for path in included if CSRC not in path.parents and path.name not in (source.name, "stdc-predef.h")
    ]
    assert not outside
    checked = subprocess.run([*build[:-2], "-fsyntax-only", str(source)], capture_output=True, text=True, timeout=600)
    assert checked.returncode == 0, checked.stderr
