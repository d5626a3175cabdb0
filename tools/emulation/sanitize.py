"""Runs emulated CUDA kernels and CPU kernels under sanitizers, without torch: `python -m tools.emulation.sanitize`."""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import host_compiler

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATION = Path(__file__).parent
PROGRAMS = ROOT / "tests" / "cuda" / "programs"
# Without contraction, as the extension: bits are compared.
FLAGS = ("-std=c++20", "-ffp-contract=off", "-pthread")

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# ThreadSanitizer does not support fibres: each thread of a block is an OS thread.
THREAD = ("-fsanitize=thread", "-DASGL_EMULATE_THREADS")

# CPU instead of CUDA kernels; BASELINE, one instruction set, compiles in a third of the time.
CPU = ("-DASGL_TEST_CPU", f"-I{EMULATION / 'cpu'}", "-include", "cpu_launchers.h")
BASELINE = "-DASGL_TEST_BASELINE"

# Program, flags and arguments: the CUDA kernels and those for the CPU, each under one sanitizer.
JOBS = (
    ("kernels_test", (*THREAD, *CPU, BASELINE), ("small",)),
    ("kernels_test", ADDRESS, ()),
    ("adaptive_test", (*ADDRESS, *CPU, BASELINE), ()),
    ("adaptive_test", ADDRESS, ()),
    ("integrator_test", (*ADDRESS, *CPU, BASELINE), ()),
    ("integrator_test", ADDRESS, ()),
    ("batch_norm_test", (*ADDRESS, *CPU), ()),
    ("recurrent_test", (*ADDRESS, *CPU, BASELINE), ()),
    ("batch_norm_test", ADDRESS, ()),
)
# With --all: the rest.
MORE_JOBS = (
    ("kernels_test", (*ADDRESS, *CPU), ()),
    ("kernels_test", THREAD, ("small",)),
    ("adaptive_test", THREAD, ("small",)),
    ("integrator_test", THREAD, ("small",)),
    ("batch_norm_test", THREAD, ("small",)),
    ("selftest", ADDRESS, ()),
    ("selftest", THREAD, ()),
)


def few_instantiations(directory: Path) -> Path:
    """A copy of csrc with only the tests' types and surrogates of CPU kernels, which compiles in seconds."""
    csrc = directory / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(CSRC, csrc)
    surrogates = "std::make_integer_sequence<int, kNumSurrogates>{}"
    for file, pattern, replacement, count in (
        ("launch.h", re.escape(surrogates), "std::integer_sequence<int, 0, 2>{}", 1),
        (
            "cpu/recurrent.cpp",
            re.escape("std::make_integer_sequence<int, kNumSurrogates - 1>{}"),
            "std::integer_sequence<int, 0, 2>{}",
            1,
        ),
        ("cpu/recurrent.cpp", r"template void .*<Half>.*\n", "", 2),
        ("cpu/neuron.cpp", r"template void .*<Half>.*\n", "", 4),
        ("cpu/neuron_adaptive.cpp", r"template void .*<Half>.*\n", "", 2),
        ("cpu/neuron_settled.cpp", r"template void .*<Half>.*\n", "", 2),
        ("cpu/integrator.cpp", r"template void .*<Half>.*\n", "", 2),
    ):
        text, found = re.subn(pattern, replacement, (csrc / file).read_text())
        assert found == count, f"{file} has changed: {pattern} is {found} times in it"
        (csrc / file).write_text(text)
    return csrc


def build(name: str, program: Path, flags: Sequence[str] = (), csrc: Path = CSRC) -> None:
    """Compiles tests/cuda/programs/NAME.cpp with the kernels in `csrc`."""
    paths = [f"-I{EMULATION / 'include'}", f"-I{EMULATION}", f"-I{csrc}"]
    command = [*host_compiler.command(), *FLAGS, *flags, *paths, str(PROGRAMS / f"{name}.cpp"), "-o", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *arguments]
    # A racing program may never end.
    variables = {"TSAN_OPTIONS": "halt_on_error=1", **os.environ, **environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    # ThreadSanitizer does not start with more random address bits than it expects.
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        command = ["setarch", platform.machine(), "-R", *command]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    return result


def sanitize(name: str, flags: Sequence[str], arguments: Sequence[str], directory: Path) -> bool:
    on_cpu = CPU[0] in flags
    title = f"{name} {' '.join([*flags[:1], 'on the CPU' if on_cpu else 'emulated', *arguments])}"
    program = directory / title.replace(" ", "_")
    build(name, program, ["-O1", "-g1", *flags], directory / "csrc" if on_cpu else CSRC)
    # With fibres, the check of returned locals takes two thirds of the time.
    environment = {} if on_cpu else {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    result = run(program, *arguments, **environment)
    if result.returncode == 0:
        print(f"{title}: {result.stdout.splitlines()[-1]}", flush=True)
    else:
        print(f"{title}: status {result.returncode}\n{result.stdout}{result.stderr}", flush=True)
    return result.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.emulation.sanitize", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every program under every sanitizer")
    jobs = (*JOBS, *MORE_JOBS) if parser.parse_args().all else JOBS
    directory = CSRC.parent / "build" / "sanitize"
    directory.mkdir(parents=True, exist_ok=True)
    few_instantiations(directory)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        clean = list(pool.map(lambda job: sanitize(*job, directory), jobs))
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
