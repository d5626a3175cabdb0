"""Compiles the CUDA kernels for every architecture and compares them with resources.json.

Failures: a kernel that does not compile, or is not in the figures; other kernels than the operators name; a spill or
stack that is not in the figures; operations that are rounded unlike the reference's (code_checks.py); glue that does
not compile against the installed torch. A change of registers is only reported.
The flags are those of asgl_cuda/backends/extension/compilation.py: PTX for compute_75 and compute_80, from which each
architecture is compiled. Architectures with the code of another (SAME_CODE) are compiled only with --update, which
fails where registers differ.

NVRTC compiles the same kernels for one architecture, with --update for four. Failures: faults of the PTX; more kernels
that spill than in the figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from pathlib import Path

from asgl_cuda.backends import cupy, extension, launcher
from asgl_cuda.backends.extension import compilation

from .. import host_compiler
from . import resources
from .code_checks import ptx_problems
from .cuda_code import CSRC, SCALARS, Kernel, Nvcc, Usage, kernel_of, reported_usages, run
from .resources import PAGE, Resources

# Each type has a source file of its own.
TYPES = tuple(sorted(str(dtype).removeprefix("torch.") for dtype in SCALARS))

NVRTC_ARCHITECTURES = (75, 80, 90, 120)
NVRTC_WITHOUT_UPDATE = (90,)
# Kernels in one NVRTC program: each program parses the headers, but the last should be short.
CHUNK = 24


def file_problems(ptx: Path) -> list[str]:
    """The faults of a PTX file."""
    return [f"{ptx.name}: {problem}" for problem in ptx_problems(ptx.read_text())]


# ---- compilation ----


def compile_ops(nvcc: Nvcc, directory: Path) -> None:
    """Compiles the operators of a CUDA build against the installed torch, even a CPU build."""
    from torch.utils.cpp_extension import include_paths

    # Generated when torch is built for CUDA: the only header that a CPU build of torch lacks.
    stand_in = directory / "include" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    includes = [nvcc.include, CSRC, *include_paths(), sysconfig.get_paths()["include"], directory / "include"]
    isystem = [word for path in includes for word in ("-isystem", path)]
    flags = [*compilation.CXX_FLAGS, "-O0", "-DASGL_WITH_CUDA", "-DTORCH_EXTENSION_NAME=_C", *isystem]
    run([*host_compiler.command(), *flags, "-c", CSRC / "ops/bindings.cpp", "-o", directory / "bindings.o"])


def named_kernels(types: Sequence[str]) -> dict[Kernel, str]:
    """The kernels that the operators may start, with their C++ expressions."""
    named = {Kernel.from_symbol(f"void {name}("): name for name in launcher.kernel_names()}
    return {kernel: name for kernel, name in named.items() if kernel.dtype in types}


# ---- NVRTC ----


def compile_by_nvrtc(architecture: int, kernels: list[str]) -> tuple[dict[str, Usage], list[str]]:
    """Compiles kernels with NVRTC. Returns their usages by symbol, and the faults of their PTX."""
    with cupy.compiled_program(kernels, f"sm_{architecture}", "-Xptxas=-v") as program:
        log, ptx = cupy._nvrtc().getProgramLog(program), cupy._nvrtc().getPTX(program).decode()
    return reported_usages(log), [f"NVRTC, sm_{architecture}: {problem}" for problem in ptx_problems(ptx)]


def nvrtc_resources(names: list[str], architectures: Sequence[int]) -> tuple[Resources, list[str]]:
    """The usages of the named kernels, and the faults of their PTX."""
    problems = []
    found: Resources = defaultdict(dict)
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = list(product(architectures, chunks))
        results = pool.map(compile_by_nvrtc, *zip(*work, strict=True))
        for (architecture, _), (usages, faults) in zip(work, results, strict=True):
            problems += faults
            for symbol, usage in usages.items():
                found[kernel_of(symbol)][architecture] = usage
    return found, problems


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels.cuda_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", action="store_true", help=f"write resources.json and {PAGE.path.name}")
    parser.add_argument("--draw", action="store_true", help=f"draw {PAGE.path.name} again from resources.json")
    parser.add_argument("--architectures", type=int, nargs="+", metavar="90", help="only these (default: see above)")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, help="only kernels of these (default: all)")
    arguments = parser.parse_args()
    if arguments.draw:
        PAGE.write()
        return 0
    if arguments.update and (arguments.architectures or arguments.types != TYPES or cupy.nvrtc_problem()):
        parser.error("--update needs all architectures, all types, and NVRTC")
    nvcc = Nvcc.find()
    if nvcc is None:
        print("cuda-compile: SKIPPED, there is no nvcc on the PATH")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        return check(nvcc, Path(directory), arguments)


def check(nvcc: Nvcc, directory: Path, arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    known = [each for each in nvcc.architectures if arguments.update or each not in compilation.SAME_CODE]
    architectures = arguments.architectures or known
    sources = [CSRC / "cuda" / f"compiled_{name}.cu" for name in arguments.types]
    found: Resources = defaultdict(dict)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        glue = pool.submit(compile_ops, nvcc, directory)
        paths_by_source = pool.map(lambda source: nvcc.to_ptx(source, directory, architectures), sources)
        ptx = [path for paths in paths_by_source for path in paths]
        work = list(product(sources, architectures))
        compiled = pool.map(lambda job: nvcc.report(directory, job[0].stem, job[1]), work)
        for (_, architecture), log in zip(work, compiled, strict=True):
            for symbol, usage in reported_usages(log).items():
                found[kernel_of(symbol)][architecture] = usage
        glue.result()
    names = ", ".join(f"sm_{architecture}" for architecture in architectures)
    print(f"nvcc {nvcc.version}: {len(found)} kernels for {names}; the glue; {time.monotonic() - start:.0f} s")

    problems = list(resources.same_code_problems(found))
    if extension.problem is None:
        named = named_kernels(arguments.types)
        problems += [
            f"the operators start {kernel}, which nvcc does not make" for kernel in named.keys() - found.keys()
        ]
        problems += [f"nvcc makes {kernel}, which the operators never start" for kernel in found.keys() - named.keys()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        problems += [problem for each in pool.map(file_problems, ptx) for problem in each]
    sections = resources.sections(found)
    reason = cupy.nvrtc_problem() or extension.problem
    chosen = sorted(set(NVRTC_ARCHITECTURES) & set(architectures))
    if not arguments.update:
        chosen = [a for a in chosen if a in NVRTC_WITHOUT_UPDATE] or chosen
    if reason is not None:
        print(f"NVRTC: SKIPPED, {reason}: pip install cupy-cuda13x nvidia-cuda-nvrtc")
    elif not chosen:
        print(f"NVRTC: SKIPPED, it compiles for {', '.join(f'sm_{a}' for a in NVRTC_ARCHITECTURES)}")
    else:
        start = time.monotonic()
        by_nvrtc, faults = nvrtc_resources(list(named.values()), chosen)
        names = ", ".join(f"sm_{architecture}" for architecture in chosen)
        print(f"NVRTC {cupy.nvrtc_version()}: {len(by_nvrtc)} kernels for {names}; {time.monotonic() - start:.0f} s")
        problems += faults
        sections = resources.with_nvrtc(sections, by_nvrtc, found)
    if arguments.update:
        PAGE.write({"nvcc": nvcc.version, "flags": nvcc.flags, "sections": sections})
        print(f"wrote {PAGE.path.relative_to(CSRC.parent)}")
    else:
        findings = resources.compare(sections, nvcc.version, PAGE.figures)
        problems += findings.problems
        for note in findings.notes:
            print(f"note: {note}")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
