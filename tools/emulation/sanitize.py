"""Runs recorded calls of CUDA and CPU kernels under sanitizers: `python -m tools.emulation.sanitize`."""

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tools import host_compiler

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATION = Path(__file__).parent
PROGRAMS = ROOT / "tests" / "cuda" / "programs"
DIRECTORY = ROOT / "build" / "sanitize"
# Without contraction, as the extension: bits are compared.
FLAGS = ("-std=c++20", "-ffp-contract=off", "-pthread")

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# ThreadSanitizer does not support fibres: each thread of a block is an OS thread.
THREAD = ("-fsanitize=thread", "-DASGL_EMULATE_THREADS")


class Kernels(NamedTuple):
    """The kernels of a program. `flags` are for all files, `own` for the files of the kernels alone."""

    name: str
    flags: tuple[str, ...]
    own: tuple[str, ...] = ()


CUDA = Kernels("cuda", (f"-I{EMULATION / 'include'}", f"-I{EMULATION}"))
CLONES = Kernels("clones", ("-DASGL_TEST_CPU", f"-I{EMULATION / 'cpu'}"))
CPU = Kernels("cpu", CLONES.flags, ("-include", "one_instruction_set.h"))

# Kernels, sanitizer and size of the calls; with --all also the rest.
JOBS = ((CUDA, ADDRESS, ""), (CPU, ADDRESS, ""), (CPU, THREAD, ""))
MORE_JOBS = ((CUDA, THREAD, "small"), (CLONES, ADDRESS, ""))


def few_instantiations(directory: Path) -> Path:
    """A copy of csrc whose CPU kernels have only the recorded types and surrogates; it compiles in seconds."""
    csrc = directory / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(CSRC, csrc)
    few = "std::integer_sequence<int, 0, 2>{}"
    for file, pattern, replacement, count in (
        ("cpu/models.h", re.escape("std::make_integer_sequence<int, kNumSurrogates>{}"), few, 1),
        ("cpu/recurrent.cpp", re.escape("std::make_integer_sequence<int, kNumSurrogates - 1>{}"), few, 1),
        ("cpu/recurrent.cpp", r"template void .*<Half>.*\n", "", 2),
        ("cpu/neuron.cpp", r"template void .*<Half>.*\n", "", 4),
        ("cpu/neuron_adaptive.cpp", r"template void .*<Half>.*\n", "", 2),
        ("cpu/neuron_settled.cpp", r"template void .*<Half>.*\n", "", 2),
        ("cpu/integrator.cpp", r"template void .*<Half>.*\n", "", 2),
        ("cpu/normalisation.cpp", r"template void .*<Half>.*\n", "", 4),
    ):
        text, found = re.subn(pattern, replacement, (csrc / file).read_text())
        assert found == count, f"{file} has changed: {pattern} is {found} times in it"
        (csrc / file).write_text(text)
    return csrc


def compile_all(sources: Sequence[tuple[Path, Sequence[str]]], program: Path, flags: Sequence[str]) -> None:
    """Compiles sources, each with flags of its own, in parallel, and links them."""

    def run(*arguments: str) -> None:
        command = [*host_compiler.command(), *FLAGS, *flags, *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{result.stderr[:10000]}")

    with tempfile.TemporaryDirectory(dir=program.parent) as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(directory, f"{source.stem}.o")) for source, _ in sources]
        commands = [(*own, "-c", str(source), "-o", path) for (source, own), path in zip(sources, objects, strict=True)]
        list(pool.map(lambda arguments: run(*arguments), commands))
        run(*objects, "-o", str(program))


def build(kernels: Kernels, program: Path, flags: Sequence[str] = (), csrc: Path = CSRC) -> None:
    """Compiles replay.cpp with the kernels in `csrc`."""
    own = () if kernels is CUDA else sorted((csrc / "cpu").glob("*.cpp"))
    sources = [(PROGRAMS / "replay.cpp", kernels.flags), *((source, kernels.flags + kernels.own) for source in own)]
    compile_all(sources, program, [*flags, f"-I{csrc}"])


def recorded_calls() -> Path:
    """The directory with recorded calls. If sources have changed, another process records the calls again."""
    sources = [*CSRC.rglob("*.*"), *PROGRAMS.glob("record*"), *EMULATION.glob("*.*")]
    sources += (path for path in (ROOT / "asgl_cuda").rglob("*.py"))
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    parent = DIRECTORY.with_name("recorded")
    parent.mkdir(parents=True, exist_ok=True)
    made, directory = parent / "made", parent / digest.hexdigest()[:16]
    with (parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            for old in (path for path in parent.iterdir() if path.is_dir()):
                shutil.rmtree(old)
            made.mkdir()
            library = made / "recorder.so"
            flags = ("-O1", "-shared", "-fPIC")
            compile_all([(PROGRAMS / "recorder.cpp", (f"-I{CSRC}",))], library, flags)
            command = [sys.executable, "-m", "tools.emulation.record", str(made)]
            # Other instruction sets multiply matrices by fused operations.
            environment = {"LD_PRELOAD": str(library), "ASGL_CUDA_INSTRUCTION_SET": "baseline"}
            subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **environment})
            made.rename(directory)
    return directory


def calls_for(kernels: Kernels) -> list[Path]:
    """The files with the recorded calls of these kernels."""
    paths = sorted(recorded_calls().glob("*.cuda" if kernels is CUDA else "*.cpu"))
    return [path for path in paths if kernels is not CLONES or path.stem != "recurrent"]


def run(program: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program; again, without random addresses, if ThreadSanitizer does not start with them."""
    command = [str(program), *map(str, arguments)]
    # A racing program may never end.
    variables = {"TSAN_OPTIONS": "halt_on_error=1", **os.environ, **environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    # ThreadSanitizer does not start with more random address bits than it expects.
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        command = ["setarch", platform.machine(), "-R", *command]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    return result


def environment_of(kernels: Kernels) -> dict[str, str]:
    """Variables for a run under a sanitizer. With fibres, checking for returned locals takes two thirds of the time."""
    return {"ASAN_OPTIONS": "detect_stack_use_after_return=0"} if kernels is CUDA else {}


def sanitize(kernels: Kernels, flags: Sequence[str], size: str) -> bool:
    """Replays the recorded calls under a sanitizer; returns whether it found nothing."""
    title = f"{kernels.name} {flags[0]} {size}".strip()
    program = DIRECTORY / title.replace(" ", "_")
    build(kernels, program, ["-O1", "-g1", *flags], CSRC if kernels is CUDA else DIRECTORY / "csrc")
    result = run(program, *filter(None, [size]), *calls_for(kernels), **environment_of(kernels))
    if result.returncode == 0:
        print(f"{title}: {result.stdout.splitlines()[-1]}", flush=True)
    else:
        print(f"{title}: status {result.returncode}\n{result.stdout}{result.stderr}", flush=True)
    return result.returncode == 0


def sanitize_spikes(flags: Sequence[str]) -> bool:
    """Runs products of spikes at random sizes with every instruction set; they need no recording."""
    title = f"spikes {flags[0]}"
    program = DIRECTORY / title.replace(" ", "_")
    sources = [PROGRAMS / "spike_products.cpp", CSRC / "cpu" / "spikes.cpp", CSRC / "cpu" / "packed_spikes.cpp"]
    own = [f"-I{CSRC}", *CLONES.flags]
    compile_all([(source, own) for source in sources], program, ["-O1", "-g1", *flags])
    results = [run(program, ASGL_CUDA_INSTRUCTION_SET=each) for each in ("baseline", "avx2", "avx512")]
    for result in results:
        if result.returncode != 0:
            print(f"{title}: status {result.returncode}\n{result.stdout}{result.stderr}", flush=True)
            return False
    print(f"{title}: {results[0].stdout.strip()}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.emulation.sanitize", description=__doc__)
    parser.add_argument("--all", action="store_true", help="all kernels under every sanitizer")
    everything = parser.parse_args().all
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    few_instantiations(DIRECTORY)
    recorded_calls()
    clean = [sanitize_spikes(flags) for flags in (ADDRESS, THREAD)]
    clean += [sanitize(*job) for job in (*JOBS, *(MORE_JOBS if everything else ()))]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
