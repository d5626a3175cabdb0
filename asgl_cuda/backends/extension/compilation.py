"""Compiles the extension, for setup.py, which can't import the package. Imports only build_notes.py of it.

Environment variables:
ASGL_CUDA_BUILD is cuda for the kernels for CPU and GPU, or cpu for only those for the CPU. Default: cuda if the
installed torch and a toolkit allow it, even without a GPU; else cpu.
TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", names the GPUs. Default: those that the installed torch was built for, from
sm_75 on, as far as nvcc knows them, and PTX for newer ones. Architectures with the same code are compiled once.
MAX_JOBS is the number of files that are compiled at a time. Default: one per core, as far as memory suffices.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from setuptools import Distribution, Extension
from torch.utils import cpp_extension

from . import build_notes

DEFAULT_TOOLKIT = Path("/usr/local/cuda")
FIRST_MAJOR_WITH_WHEELS = 13  # the wheel for CUDA 12 has no nvcc in it
OLDEST_ARCHITECTURE = 75
# Architectures from 80 on are compiled from one PTX, that of compute_80. nvcc (cicc) makes the same PTX for compute_80
# to compute_90. For compute_100 it makes other PTX, with which ptxas spills more registers.
SHARED_ARCHITECTURE = 80
# The first architecture of a pair runs machine code of the second, and nvcc 13.0 makes the same code for both. So by
# default the first is not compiled if the second is. `python -m tools.kernels.cuda_compile --update` fails if
# registers, shared memory or spills of a pair differ.
SAME_CODE = {88: 86, 89: 86, 121: 120}

# -ffp-contract=off: each operation is rounded by itself, as in the reference. -fno-math-errno and -fno-trapping-math
# let the compiler vectorise math functions and comparisons, and change no value. -g0: debug symbols would make the
# extension ten times as large.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"]
CPU_SOURCES = (
    "cpu/integrator.cpp", "cpu/neuron.cpp", "cpu/neuron_adaptive.cpp", "cpu/neuron_settled.cpp",
    "cpu/normalisation.cpp", "cpu/packed_spikes.cpp", "cpu/recurrent.cpp", "cpu/spikes.cpp", "ops/bindings.cpp",
)  # fmt: skip
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false"]
# Upper bounds of the memory that one compiler needs, from which `parallel_jobs` computes how many run at a time: for
# most files, and for ops/bindings.cpp. Measured: 746 MB per thread of nvcc, 760 to 840 MB for g++ with the files in
# cpu, and 2,175 MB for g++ with ops/bindings.cpp.
COMPILER_BYTES, LARGEST_COMPILER_BYTES = 1000 * 2**20, 2200 * 2**20


class Toolkit(NamedTuple):
    """The parts of a CUDA toolkit that are needed."""

    home: Path
    version: str  # version of nvcc, such as 13.0
    include: Path
    cudart: Path


def output_of(*command: str | Path) -> str:
    """The output and errors of a program; empty if it can't be started."""
    try:
        return subprocess.run(
            command, check=False, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ).stdout
    except OSError:
        return ""


def wheel_homes(major: str) -> list[Path]:
    """The folders into which the wheel nvidia-cuda-nvcc puts nvcc."""
    package = importlib.util.find_spec("nvidia")
    return [Path(folder) / f"cu{major}" for folder in (package and package.submodule_search_locations) or ()]


def home_from_environment() -> tuple[str, Path] | None:
    """The environment variable that names a toolkit, and its folder. None if no variable does."""
    return next(((name, Path(home)) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))), None)


def toolkit_homes(major: str) -> list[Path]:
    """Folders that may contain a toolkit, best first. The one that a variable names may have the wrong version."""
    named = home_from_environment()
    homes = [DEFAULT_TOOLKIT, *wheel_homes(major)]
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper script. With --dryrun, the nvcc that the script calls prints the folder of its toolkit.
        top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "any.cu"), re.MULTILINE)
        homes = [*([Path(top[1].strip()).resolve()] if top else []), Path(nvcc).parent.parent, *homes]
    return [*([named[1]] if named else []), *homes]


def read_toolkit(home: Path) -> Toolkit | None:
    """The toolkit in that folder, as NVIDIA's installer, Debian, conda or the wheels lay it out, if it is complete."""

    def first_match(*patterns: str) -> Path | None:
        """The first file in the toolkit that fits a pattern, or None."""
        return next((path for pattern in patterns for path in sorted(home.glob(pattern))), None)

    version = re.search(r"release (\d+\.\d+)", output_of(home / "bin/nvcc", "--version"))
    header = first_match("include/cuda_runtime.h", "targets/*/include/cuda_runtime.h")
    # In NVIDIA's wheels libcudart is only named libcudart.so.13, which -lcudart does not find. So the linker gets the
    # path of the file.
    folders = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
    cudart = first_match(*(f"{folder}/libcudart.so*" for folder in folders))
    if header is None or cudart is None or version is None:
        return None
    return Toolkit(home.resolve(), version[1], header.parent.resolve(), cudart.resolve())


def find_toolkit(cuda: str) -> Toolkit | str:
    """A toolkit of the same major version, which is all that CUDA asks for, or why there is none."""
    major = cuda.split(".")[0]
    homes = toolkit_homes(major)
    toolkits = {home: toolkit for home in homes if (toolkit := read_toolkit(home))}
    for toolkit in toolkits.values():
        if toolkit.version.split(".")[0] == major:
            return toolkit
    others = "; ".join(f"{home} is CUDA {toolkit.version}" for home, toolkit in toolkits.items())
    wheels = f", or pip install 'cuda-toolkit[nvcc]=={cuda}.*'" if int(major) >= FIRST_MAJOR_WITH_WHEELS else ""
    return (
        f"torch {torch.__version__} needs a toolkit of CUDA {major} with nvcc, cuda_runtime.h and libcudart, but "
        f"{others or 'none is in ' + ', '.join(map(str, homes))} (name one in CUDA_HOME{wheels})"
    )


def choose_toolkit(wanted: str | None) -> tuple[Toolkit | None, str]:
    """The toolkit to compile the CUDA kernels with, or None to compile none, and the reason.

    `wanted` is "cuda", "cpu" or None, see `requested_build`. Raises SystemExit if it is "cuda" and there is no toolkit.
    """
    if wanted == "cpu":
        return None, "ASGL_CUDA_BUILD was cpu"
    if torch.version.hip is not None:
        found: Toolkit | str = f"torch {torch.__version__} is a build for ROCm, for which there are no kernels"
    elif torch.version.cuda is None:
        found = f"torch {torch.__version__} is a build without CUDA"
    else:
        found = find_toolkit(torch.version.cuda)
    if isinstance(found, Toolkit):
        reason = f"torch {torch.__version__} is a build for CUDA {torch.version.cuda}, toolkit in {found.home}"
        if (named := home_from_environment()) and named[1].resolve() != found.home:
            variable, home = named
            reason += f", since {variable}={home} has no toolkit of CUDA {found.version.split('.')[0]}"
        return found, reason
    if wanted == "cuda":
        raise SystemExit(f"asgl_cuda: ASGL_CUDA_BUILD is cuda, but {found}")
    return None, found


def architectures_of_torch() -> set[int]:
    """The architectures that torch has code for. torch.cuda.get_arch_list returns them only on a machine with a GPU."""
    flags = getattr(torch._C, "_cuda_getArchFlags", str)() or ""
    return {int(number) for number in re.findall(r"\bsm_(\d+)", flags)}


def architecture_flags(known: list[int]) -> tuple[list[str], str]:
    """The flags for an nvcc that knows these architectures, and a description of what they compile.

    TORCH_CUDA_ARCH_LIST selects architectures. Raises SystemExit if it has another form or names an unknown one.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked:
        entries = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry) for entry in re.split(r"[;,\s]+", asked)]
        wanted = {int(entry[1] + entry[2]): entry[3] is not None for entry in entries if entry}
        if None in entries or not wanted.keys() <= set(known):
            raise SystemExit(
                "asgl_cuda: TORCH_CUDA_ARCH_LIST must name architectures that this nvcc knows "
                f"({' '.join(f'{number / 10:.1f}' for number in sorted(known))}) in the form 8.0;9.0+PTX, got {asked!r}"
            )
    else:
        supported = {number for number in known if number >= OLDEST_ARCHITECTURE}
        chosen = supported & architectures_of_torch() or supported
        chosen = {number for number in chosen if SAME_CODE.get(number) not in chosen}
        wanted = {number: number == max(chosen) for number in chosen}
    groups: dict[int, list[int]] = {}
    for number in sorted(wanted):
        groups.setdefault(min(number, SHARED_ARCHITECTURE), []).append(number)
    flags, built = [], []
    for virtual, numbers in groups.items():
        codes = [f"sm_{number}" for number in numbers]
        if any(wanted[number] for number in numbers):
            codes.append(f"compute_{virtual}")
        flags.append(f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]")
        built += [code.replace("compute", "and PTX of compute") for code in codes]
    return flags, " ".join(built)


def parallel_jobs() -> int:
    """The number of compilers that run at a time: MAX_JOBS, or one per core, as far as memory suffices."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit():
        return max(1, int(asked))
    try:
        (free,) = re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return os.cpu_count() or 1
    beside_largest = (int(free) * 1024 - LARGEST_COMPILER_BYTES) // COMPILER_BYTES
    return max(1, min(os.cpu_count() or 1, 1 + beside_largest))


def requested_build() -> str | None:
    """The value of ASGL_CUDA_BUILD: "cuda", "cpu", "none", or None if it is not set. Raises SystemExit for others."""
    wanted = os.environ.get("ASGL_CUDA_BUILD")
    if wanted not in (None, "cuda", "cpu", "none"):
        raise SystemExit(f"asgl_cuda: ASGL_CUDA_BUILD must be cuda, cpu or none, got {wanted!r}")
    return wanted


class BuildPlan(NamedTuple):
    """What is compiled, and why."""

    extension: Extension
    cuda: str | None  # what the CUDA kernels are compiled by and for
    reason: str  # why they are built or not
    sources: str  # digest of the sources


def plan_build(csrc: Path, wanted: str | None) -> BuildPlan:
    """Plans how to compile the sources in `csrc`, and prepares this process for it.

    `wanted` is "cuda", "cpu" or None, see `requested_build`. Sets PATH and MAX_JOBS, removes an empty CC or CXX, and
    sets CUDA_HOME of torch's cpp_extension. Paths of sources are relative if `csrc` is, as setup.py needs them. Raises
    SystemExit if the CUDA kernels were asked for and can't be compiled, or TORCH_CUDA_ARCH_LIST is wrong.
    """
    for name in ("CC", "CXX"):  # an empty name, which torch and setuptools would try to start
        if not os.environ.get(name, "-").strip():
            del os.environ[name]
    # pip installs ninja into this folder, which may be missing from the PATH.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    toolkit, reason = choose_toolkit(wanted)
    sources = build_notes.digest_of_build(csrc, Path(__file__).parents[1])
    parallel = parallel_jobs()
    os.environ["MAX_JOBS"] = str(parallel)
    extension = cpp_extension.CppExtension(
        "asgl_cuda._C",
        [str(csrc / name) for name in CPU_SOURCES],
        include_dirs=[str(csrc.resolve())],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-fopenmp"],
    )
    if toolkit is None:
        return BuildPlan(extension, None, reason, sources)
    nvcc = toolkit.home / "bin" / "nvcc"
    known = [int(number) for number in re.findall(r"\bsm_(\d+)\b", output_of(nvcc, "--list-gpu-code"))]
    flags, built = architecture_flags(known)
    # torch derives CUDA_HOME from the nvcc on the PATH, which gives a wrong folder if that nvcc is a wrapper script.
    cpp_extension.CUDA_HOME = str(toolkit.home)
    kernels = sorted(map(str, (csrc / "cuda").glob("*.cu")))
    extension.sources[:0] = kernels
    extension.define_macros.append(("ASGL_WITH_CUDA", None))
    threads = max(1, parallel // len(kernels))  # threads of each compiler that ninja starts
    extension.extra_compile_args["nvcc"] = [*NVCC_FLAGS, *flags, f"--threads={threads}"]
    if toolkit.include != Path("/usr/include"):  # compilers search it anyway, after all others
        extension.include_dirs.append(str(toolkit.include))
    extension.libraries.append("c10_cuda")
    extension.extra_link_args.append(str(toolkit.cudart))
    return BuildPlan(extension, f"CUDA {toolkit.version}, {built}", reason, sources)


def print_to_terminal(line: str) -> None:
    """Prints a line to the terminal itself, because pip captures the output of a build."""
    try:
        with Path("/dev/tty").open("w") as terminal:
            terminal.write(f"asgl_cuda: {line}\n")
    except OSError:  # there is no terminal
        pass


def require_compiler() -> None:
    """Raises SystemExit, with a remedy, if there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        if " " in compiler:
            problem = f"CXX must name one program, without arguments, got {compiler!r}"
        elif "CXX" in os.environ:
            problem = f"CXX must name a program that can be run, got {compiler!r}"
        else:
            problem = "no C++ compiler 'c++' on PATH; install one (Debian, Ubuntu: apt install g++), or name one in CXX"
        raise SystemExit(
            f"asgl_cuda: {problem}; with ASGL_CUDA_BUILD=none, asgl_cuda is installed without the fast kernels"
        )


def build_command_class(planned: BuildPlan, package: Path) -> type[cpp_extension.BuildExtension]:
    """The class of the command build_ext; `package` is the folder for a build in place."""
    kernels = f"the CPU and CUDA kernels ({planned.cuda})" if planned.cuda else "only the CPU kernels"
    # Times on two cores: g++ takes at most 5 minutes. nvcc took 1 to 2 minutes for one architecture, and 3 to 6 minutes
    # for six.
    minutes = 5 + (1 + len(re.findall(r"\bsm_", planned.cuda)) if planned.cuda else 0)

    class Build(cpp_extension.BuildExtension):
        """Compiles the extension, shows its progress, and writes the notes beside it (build_notes.py)."""

        def run(self) -> None:
            """Compiles, reports progress, and writes the notes of the build."""
            require_compiler()
            print_to_terminal(
                f"compiling {kernels}, {os.environ['MAX_JOBS']} files at a time: on two cores {minutes} minutes"
            )
            compiled = threading.Event()
            earlier = {path: path.stat().st_mtime_ns for path in Path(self.build_temp).rglob("*.o")}
            threading.Thread(target=self.report_progress, args=(compiled, earlier), daemon=True).start()
            try:
                super().run()
            finally:
                compiled.set()
            target = package if self.inplace else Path(self.build_lib) / "asgl_cuda"
            build_notes.write_notes(target, torch.__version__, planned.cuda, planned.reason, planned.sources)
            print(f"asgl_cuda: built {kernels} for torch {torch.__version__} on {platform.machine()}: {planned.reason}")

        def report_progress(self, compiled: threading.Event, earlier: dict[Path, int]) -> None:
            """Prints the name of each file that has been compiled, when its object appears."""
            done: list[Path] = []
            while not compiled.wait(1):
                for path in Path(self.build_temp).rglob("*.o"):
                    if path not in done and path.stat().st_mtime_ns != earlier.get(path):
                        done.append(path)
                        print_to_terminal(f"{len(done)} of {len(planned.extension.sources)} files: {path.stem}")

    return Build


def build(csrc: Path, directory: Path) -> None:
    """Compiles the sources in `csrc` to `asgl_cuda` in the directory, and keeps the objects there for the next time.

    Changes the environment of this process, as `plan_build` says. Raises SystemExit if the build is impossible.
    """
    planned = plan_build(csrc, requested_build())
    command = build_command_class(planned, directory)(Distribution({"ext_modules": [planned.extension]}))
    command.build_lib, command.build_temp = str(directory), str(directory / "objects")
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    build(*map(Path, sys.argv[1:]))
