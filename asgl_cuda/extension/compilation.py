"""How the compiled part of asgl_cuda is compiled: what setup.py and `python -m asgl_cuda build` have in common.

It takes nothing of the package except build_notes.py, since setup.py loads both where the package can't be imported.

ASGL_CUDA_BUILD says what to compile: cuda, the kernels for CPU and GPU; cpu, only those for the CPU. Without it, cuda
where the installed torch and a toolkit allow that, a GPU or not; else cpu.
TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", says for which GPUs; without it, for those that the installed torch was
built for, from sm_75 on, as far as nvcc knows them: other GPUs of their major versions run that code, and newer ones
have PTX. Of a torch that does not say what it was built for, for all that nvcc knows. Where two would have the same
code, it is made once.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from setuptools import Distribution, Extension
from torch.utils import cpp_extension

from . import build_notes

DEFAULT_TOOLKIT = Path("/usr/local/cuda")
FIRST_MAJOR_WITH_WHEELS = 13  # the wheel for CUDA 12 has no nvcc in it
OLDEST_ARCHITECTURE = 75
# cicc gives the same PTX for all from compute_80 to compute_90. That for compute_100 and on is other, and with it
# ptxas spills more in backward's fast path; so one run of cicc serves all, and GPUs to come.
SHARED_ARCHITECTURE = 80
# nvcc 13.0 makes the same bits of every kernel for both, and the first runs the second's code. `make cuda-compile`
# says if that changes.
SAME_CODE = {88: 86, 89: 86, 121: 120}

# No contraction, on purpose: every backend rounds each operation as the reference does. The next two only let the
# compiler vectorise comparisons and calls; they change no value. Debug symbols, which many a Python asks for, would
# make the extension ten times as large.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"]
CPU_SOURCES = (
    "cpu/integrator.cpp", "cpu/neuron.cpp", "cpu/neuron_adaptive.cpp", "cpu/neuron_settled.cpp",
    "cpu/normalisation.cpp", "ops/bindings.cpp",
)  # fmt: skip
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false"]
NVCC_BYTES = 750 * 2**20  # of a thread of nvcc; measured 746 MB


class Toolkit(NamedTuple):
    """A CUDA toolkit, as far as it is needed."""

    home: Path
    version: str  # version of nvcc, such as 13.0
    include: Path
    cudart: Path

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


def output_of(*command: str | Path) -> str:
    """What a program says, nothing where there is none that starts."""
    try:
        result = subprocess.run(
            command, check=False, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError:
        return ""
    return result.stdout


def wheel_homes(major: str) -> list[Path]:
    """Where the wheel nvidia-cuda-nvcc puts its nvcc."""
    package = importlib.util.find_spec("nvidia")
    return [Path(folder) / f"cu{major}" for folder in (package and package.submodule_search_locations) or ()]


def toolkit_homes(major: str) -> list[Path]:
    """Where a toolkit may be, best first."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return [Path(named)]
    homes = [DEFAULT_TOOLKIT, *wheel_homes(major)]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # It may be a wrapper script, which can lie anywhere; the compiler behind it knows its own place.
        top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "any.cu"), re.MULTILINE)
        homes = [*([Path(top[1].strip()).resolve()] if top else []), Path(nvcc).parent.parent, *homes]
    return homes


def read_toolkit(home: Path) -> Toolkit | None:
    """The toolkit in that folder, as NVIDIA's installer, Debian, conda or the wheels lay it out, if it is complete."""

    def first(*patterns: str) -> Path | None:
        return next((path for pattern in patterns for path in sorted(home.glob(pattern))), None)

    nvcc = first("bin/nvcc")
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version")) if nvcc else None
    header = first("include/cuda_runtime.h", "targets/*/include/cuda_runtime.h")
    # In the wheels only under its full name, libcudart.so.13, which -lcudart would not find.
    libraries = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
    cudart = first(*(f"{folder}/libcudart.so*" for folder in libraries))
    if header is None or cudart is None or version is None:
        return None
    return Toolkit(home.resolve(), version[1], header.parent.resolve(), cudart.resolve())


def find_toolkit(cuda: str) -> Toolkit | str:
    """A toolkit of the same major version, which is all that CUDA asks for, or why there is none."""
    major = cuda.split(".")[0]
    homes = toolkit_homes(major)
    others = []
    for home in homes:
        toolkit = read_toolkit(home)
        if toolkit is not None and toolkit.version.split(".")[0] == major:
            return toolkit
        if toolkit is not None:
            others.append(f"{home} is CUDA {toolkit.version}")
    found = "; ".join(dict.fromkeys(others)) or f"none is in {', '.join(map(str, homes))}"
    wheels = f", or pip install 'cuda-toolkit[nvcc]=={cuda}.*'" if int(major) >= FIRST_MAJOR_WITH_WHEELS else ""
    return (
        f"torch {torch.__version__} needs a toolkit of CUDA {major} with nvcc, cuda_runtime.h and libcudart, "
        f"but {found} (name one in CUDA_HOME{wheels})"
    )


def choose_toolkit(wanted: str | None) -> tuple[Toolkit | None, str]:
    """What to compile the CUDA kernels with, None for not at all, and why."""
    if wanted == "cpu":
        return None, "ASGL_CUDA_BUILD was cpu"
    if torch.version.hip is not None:
        found: Toolkit | str = f"torch {torch.__version__} is a build for ROCm, for which there are no kernels"
    elif torch.version.cuda is None:
        found = f"torch {torch.__version__} is a build without CUDA"
    else:
        found = find_toolkit(torch.version.cuda)
    if isinstance(found, Toolkit):
        return found, f"torch {torch.__version__} is a build for CUDA {torch.version.cuda}, toolkit in {found.home}"
    if wanted == "cuda":
        raise SystemExit(f"asgl_cuda: ASGL_CUDA_BUILD is cuda, but {found}")
    return None, found


def architectures_of_torch() -> set[int]:
    """The architectures that the installed torch has code for. torch.cuda.get_arch_list says it only beside a GPU."""
    flags = getattr(torch._C, "_cuda_getArchFlags", str)() or ""
    return {int(number) for number in re.findall(r"\bsm_(\d+)", flags)}


def architectures(known: list[int]) -> tuple[list[str], str]:
    """Arguments for an nvcc that knows these architectures, and in words what they ask for."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked:
        entries = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry) for entry in re.split(r"[;,\s]+", asked)]
        wanted = {int(entry[1] + entry[2]): entry[3] is not None for entry in entries if entry}
        if None in entries or not wanted.keys() <= set(known):
            raise SystemExit(
                f"asgl_cuda: TORCH_CUDA_ARCH_LIST must be of the form 8.0;9.0+PTX, for this nvcc with some of "
                f"{' '.join(f'{number / 10:.1f}' for number in sorted(known))}, got {asked!r}"
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


def known_architectures(nvcc: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\bsm_(\d+)\b", output_of(nvcc, "--list-gpu-code"))]


def available_bytes() -> int:
    """The memory that is free, or would be."""
    try:
        (found,) = re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(found) * 1024


def nvcc_threads(sources: int, jobs: int, available: int) -> int:
    """The threads of each nvcc, of which ninja starts one a source and job."""
    return max(1, min(jobs, available // (NVCC_BYTES * min(sources, jobs))))


class Plan(NamedTuple):
    """What is to be compiled."""

    extension: Extension
    cuda: str | None  # what the CUDA kernels are compiled by and for
    reason: str  # why with or without them
    sources: str  # their digest

    @property
    def kernels(self) -> str:
        return f"the CPU and CUDA kernels ({self.cuda})" if self.cuda else "only the CPU kernels"


def wanted_build() -> str | None:
    """What ASGL_CUDA_BUILD asks for."""
    wanted = os.environ.get("ASGL_CUDA_BUILD")
    if wanted not in (None, "cuda", "cpu", "none"):
        raise SystemExit(f"asgl_cuda: ASGL_CUDA_BUILD must be cuda, cpu or none, got {wanted!r}")
    return wanted


def plan(csrc: Path, wanted: str | None) -> Plan:
    """How to compile the sources there. Paths are relative where that one is, as setuptools wants them in setup.py."""
    if not os.environ.get("MAX_JOBS", "").isdigit():
        os.environ["MAX_JOBS"] = str(os.cpu_count() or 1)
    for name in ("CC", "CXX"):  # torch and setuptools would start a program without a name
        if not os.environ.get(name, "-").strip():
            del os.environ[name]
    # Where pip puts ninja, which the PATH need not name.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    toolkit, reason = choose_toolkit(wanted)
    sources = build_notes.digest_of_build(csrc, Path(__file__).parents[1])
    extension = cpp_extension.CppExtension(
        "asgl_cuda._C",
        [str(csrc / name) for name in CPU_SOURCES],
        include_dirs=[str(csrc.resolve())],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-fopenmp"],
    )
    if toolkit is None:
        return Plan(extension, None, reason, sources)
    flags, built = architectures(known_architectures(toolkit.nvcc))
    # What torch makes of the nvcc on the PATH is wrong where that is a wrapper script.
    cpp_extension.CUDA_HOME = str(toolkit.home)
    kernels = sorted(map(str, (csrc / "cuda").glob("*.cu")))
    extension.sources[:0] = kernels
    extension.define_macros.append(("ASGL_WITH_CUDA", None))
    threads = nvcc_threads(len(kernels), max(1, int(os.environ["MAX_JOBS"])), available_bytes())
    extension.extra_compile_args["nvcc"] = [*NVCC_FLAGS, *flags, f"--threads={threads}"]
    if toolkit.include != Path("/usr/include"):  # there already, and in its right place in the order
        extension.include_dirs.append(str(toolkit.include))
    extension.libraries.append("c10_cuda")
    extension.extra_link_args.append(str(toolkit.cudart))
    return Plan(extension, f"CUDA {toolkit.version}, {built}", reason, sources)


def require_compiler() -> list[str]:
    """The words of CXX, or c++; SystemExit where there is no such program."""
    asked = os.environ.get("CXX", "")
    try:
        words = shlex.split(asked) or ["c++"]
    except ValueError as error:
        raise SystemExit(f"asgl_cuda: CXX must be a command, such as 'ccache g++', got {asked!r} ({error})") from error
    if shutil.which(words[0]) is None:
        raise SystemExit(
            f"asgl_cuda: no C++ compiler {words[0]!r} on the PATH. Install one (Debian, Ubuntu: apt install g++) or "
            "name another in CXX; with ASGL_CUDA_BUILD=none it is installed without the fast kernels"
        )
    return words


def name_compiler(directory: Path) -> None:
    """Puts CXX with arguments into a script, since torch takes all of it for the name of a program."""
    words = require_compiler()
    if os.environ.get("CXX", words[0]) != words[0]:
        script = directory.resolve() / "compiler"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
        os.environ["CXX"] = str(script)


def builder(planned: Plan, package: Path) -> type[cpp_extension.BuildExtension]:
    """The command build_ext; `package` is where it builds in place."""

    class Build(cpp_extension.BuildExtension):
        """Also notes what the extension was built for, to be compared with what it is imported into."""

        def run(self) -> None:
            name_compiler(Path(self.build_temp))
            super().run()
            target = package if self.inplace else Path(self.build_lib) / "asgl_cuda"
            build_notes.write(target, torch.__version__, planned.cuda, planned.reason, planned.sources)
            print(
                f"asgl_cuda: built {planned.kernels} for torch {torch.__version__} on {platform.machine()}: "
                f"{planned.reason}"
            )

    return Build


def main(csrc: Path, directory: Path) -> None:
    """Compiles the sources there to `asgl_cuda` in the directory, where `objects` serve the next time."""
    planned = plan(csrc, wanted_build())
    command = builder(planned, directory)(Distribution({"ext_modules": [planned.extension]}))
    command.build_lib, command.build_temp = str(directory), str(directory / "objects")
    command.force = True  # without ninja only dates of *.cpp and *.cu would count
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
