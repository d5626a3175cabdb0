"""Compiles the CUDA kernels for every architecture and compares them with resources.json.

Failures: a kernel that does not compile, or is not in the figures; a spill or stack that is not in the figures; in the
default paths, on DEFAULT_ARCHITECTURES, any spill, narrow access or use of local memory; faults of the PTX of any
kernel (code_checks.py); glue that does not compile against the installed torch. A change of registers is only reported.
The flags are those of asgl_cuda/extension/compilation.py: PTX for compute_75 and compute_80, from which each
architecture is compiled. Architectures with the code of another (SAME_CODE) are compiled only with --update, which
fails where registers differ.

NVRTC compiles all kernels of csrc/cuda/kernel.h for one architecture, with --update for four. Failures: kernels of
only one of NVRTC and nvcc; faults of the PTX; a spill that nvcc's kernel does not have; and, where NVRTC has nvcc's
version and PTX version, other registers than nvcc's. Kernels that loop over steps or sums are exempt while as many
blocks fit on a multiprocessor as of nvcc's kernel, or as launch bounds request: NVRTC's front end orders values
differently.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

from asgl_cuda import extension
from asgl_cuda.backends import cupy, launched
from asgl_cuda.extension import compilation

from .. import host_compiler
from . import resources
from .code_checks import ptx_problems, sass_problems
from .cuda_code import ANY, CSRC, Disassembler, Kernel, Nvcc, Usage, kernel_of, reported_usages, run
from .resources import LISTED_DTYPES, LISTED_SURROGATES, PAGE, SPILL_COLUMNS, Resources, reading_order
from .structures import constant

SOURCES = tuple(sorted((CSRC / "cuda").glob("*.cu")))

# The kernels of most calls: no spills, local memory or narrow accesses.
HOT_KINDS = tuple(
    f"{direction} {input}, {kind}"
    for input in ("plain", "normalised", "normalised with residual")
    for direction in ("forward", "backward")
    for kind in ("T = 4", "4 neurons")
)
DEFAULT_KINDS = (*HOT_KINDS, "forward normalised, 1 neuron")
GENERAL_KINDS = ("forward, 1 neuron", "backward, 1 neuron")
HOT_CHANNEL_KINDS = ("moments, 4 columns", "input gradient, 4 columns", "input gradient with residual, 4 columns")
DEFAULT_CHANNEL_KINDS = (*HOT_CHANNEL_KINDS, "moments, 1 column", "input gradient, 1 column")
DEFAULT_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DISASSEMBLED = (80, 90, 100)
NVRTC_ARCHITECTURES = (75, 80, 90, 120)
LANES = ("1 neuron", "4 neurons")
# From sm_100 on, NVRTC's PTX differs from compute_80's; compiled with --update.
OTHER_PTX_FROM = 100
NVRTC_WITHOUT_UPDATE = (90,)
_FREE_INPUTS = "", " plain", " normalised", " with residual", " normalised with residual", " by neuron"
FREE_KINDS = (
    *(f"backward{input}, {lanes}" for input in _FREE_INPUTS for lanes in (*LANES, "T = 4")),
    *(f"integrator backward with sums, {lanes}" for lanes in LANES),
    "adaptive backward",
)
MULTIPROCESSOR_REGISTERS = 65536
# Shared memory of a multiprocessor and, from sm_80 on, reserved bytes of a block (CUDA C++ Programming Guide).
SHARED_BYTES = {75: 65536, 80: 167936, 90: 233472, 120: 102400}
RESERVED_BYTES = 1024
# Resident blocks by launch bounds, of a kind or of a kind and type.
ASKED_BLOCKS = {
    "backward, 4 neurons": 3, "backward normalised, 4 neurons": 3, "backward plain, 4 neurons, float32": 3,
    **dict.fromkeys(("backward with residual, 4 neurons", "backward normalised with residual, 4 neurons",
                     "backward normalised with residual, T = 4", "backward by neuron, 4 neurons"), 3),
    "integrator backward with sums, 1 neuron": 5, "integrator backward with sums, 4 neurons": 5,
}  # fmt: skip
# Kernels in one NVRTC program: each program parses the headers, but the last should be short.
CHUNK = 24


def paths(kinds: Iterable[str], channel_kinds: Iterable[str]) -> list[Kernel]:
    """The individually listed kernels of these kinds; batch normalisation comes last."""
    neurons = product(kinds, LISTED_DTYPES, LISTED_SURROGATES, ("hard", "soft"))
    return [Kernel(*names) for names in (*neurons, *product(channel_kinds, LISTED_DTYPES))]


def default_paths() -> list[Kernel]:
    general = [Kernel(kind, dtype, *ANY) for kind, dtype in product(GENERAL_KINDS, LISTED_DTYPES)]
    return general + paths(DEFAULT_KINDS, DEFAULT_CHANNEL_KINDS)


# ---- checks ----


def default_path_problems(found: Resources) -> Iterator[str]:
    for kernel in default_paths():
        if kernel not in found:
            yield f"a default path is gone, or has another name: {kernel}"
        for architecture, usage in found.get(kernel, {}).items():
            if architecture in DEFAULT_ARCHITECTURES and any(usage.spills):
                sizes = ", ".join(map("{} {}".format, SPILL_COLUMNS, usage.spills))
                yield f"a default path spills: {kernel}, sm_{architecture}: {sizes}"


def hot_path_problems(
    disassembler: Disassembler,
    cubins: dict[tuple[Path, int], Path],
    symbols: dict[Path, dict[Kernel, str]],
    architecture: int,
) -> list[str]:
    """The faults of the hot kernels in all sources."""
    problems = []
    for source in SOURCES:
        every = paths(HOT_KINDS, HOT_CHANNEL_KINDS)
        hot = {kernel: symbols[source][kernel] for kernel in every if kernel in symbols[source]}
        codes = disassembler.instructions(cubins[source, architecture], hot.values())
        for kernel, symbol in hot.items():
            found = sass_problems(kernel, codes[symbol])
            problems += [f"{kernel}, sm_{architecture}: {problem}" for problem in found]
    return problems


def file_problems(ptx: Path) -> list[str]:
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


# ---- NVRTC ----


def compile_by_nvrtc(architecture: int, kernels: list[str]) -> tuple[dict[str, Usage], list[str]]:
    """Usages by symbol, and the faults of the PTX."""
    with cupy.compiled_program(kernels, f"sm_{architecture}", "-Xptxas=-v") as program:
        log, ptx = cupy._nvrtc().getProgramLog(program), cupy._nvrtc().getPTX(program).decode()
    return reported_usages(log), [f"NVRTC, sm_{architecture}: {problem}" for problem in ptx_problems(ptx)]


def nvrtc_resources(architectures: Sequence[int], jobs: int) -> tuple[Resources, list[str]]:
    """The usages of all kernels, and the faults of their PTX."""
    problems = []
    found: Resources = defaultdict(dict)
    names = launched.kernel_names()
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    with ProcessPoolExecutor(jobs) as pool:
        work = list(product(architectures, chunks))
        results = pool.map(compile_by_nvrtc, *zip(*work, strict=True))
        for (architecture, _), (usages, faults) in zip(work, results, strict=True):
            problems += faults
            for symbol, usage in usages.items():
                found[kernel_of(symbol)][architecture] = usage
    return found, problems


def resident_blocks(kernel: Kernel, usage: Usage, architecture: int) -> int:
    """Blocks of a multiprocessor by registers, allocated by eight a thread, and by shared memory."""
    threads = constant("kSumThreads" if kernel.kind.startswith("gradient") else "kBlockThreads")
    by_registers = MULTIPROCESSOR_REGISTERS // (threads * -(-usage.registers // 8) * 8)
    reserved = RESERVED_BYTES if architecture >= 80 else 0
    return min(by_registers, SHARED_BYTES[architecture] // max(usage.shared + reserved, 1))


def compare_compilers(ours: Resources, theirs: Resources, same_version: bool) -> list[str]:
    """The faults of NVRTC's kernels, the first argument, against nvcc's."""
    problems = [f"nvcc's build lacks what NVRTC was asked for: {kernel}" for kernel in ours.keys() - theirs.keys()]
    problems += [f"the operators never ask for {kernel}" for kernel in theirs.keys() - ours.keys()]
    for kernel in sorted(ours.keys() & theirs.keys(), key=reading_order):
        for architecture, usage in ours[kernel].items():
            expected = theirs[kernel][architecture]
            blocks, expected_blocks = (resident_blocks(kernel, each, architecture) for each in (usage, expected))
            asked = (ASKED_BLOCKS.get(name) for name in (kernel.kind, f"{kernel.kind}, {kernel.dtype}"))
            may_differ = kernel.kind in FREE_KINDS and blocks >= min([expected_blocks, *filter(None, asked)])
            same_ptx = same_version and architecture < OTHER_PTX_FROM
            if any(usage.spills) and usage.spills != expected.spills:
                problems.append(f"a spill of NVRTC's: {kernel}, sm_{architecture}: {usage}, nvcc's: {expected}")
            elif same_ptx and usage.registers != expected.registers and not may_differ:
                problems.append(f"other registers by NVRTC: {kernel}, sm_{architecture}: {usage}, nvcc's: {expected}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels.cuda_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", action="store_true", help=f"write resources.json and {PAGE.path.name}")
    parser.add_argument("--draw", action="store_true", help=f"draw {PAGE.path.name} again from resources.json")
    parser.add_argument("--architectures", type=int, nargs="+", metavar="90", help="only these (default: see above)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: one a core)")
    arguments = parser.parse_args()
    if arguments.draw:
        PAGE.write()
        return 0
    if arguments.update and (arguments.architectures or cupy.nvrtc_problem()):
        parser.error("--update needs all architectures, and NVRTC")
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
    found: Resources = defaultdict(dict)
    symbols: dict[Path, dict[Kernel, str]] = defaultdict(dict)  # by source
    cubins: dict[tuple[Path, int], Path] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        glue = pool.submit(compile_ops, nvcc, directory)
        ptx = [path for paths in pool.map(lambda source: nvcc.to_ptx(source, directory), SOURCES) for path in paths]
        work = list(product(SOURCES, architectures))
        compiled = pool.map(lambda job: nvcc.to_cubin(directory, job[0].stem, job[1]), work)
        for (source, architecture), (cubin, log) in zip(work, compiled, strict=True):
            cubins[source, architecture] = cubin
            for symbol, usage in reported_usages(log).items():
                symbols[source][kernel_of(symbol)] = symbol
                found[kernel_of(symbol)][architecture] = usage
        glue.result()
    names = ", ".join(f"sm_{architecture}" for architecture in architectures)
    print(f"nvcc {nvcc.version}: {len(found)} kernels for {names}; the glue; {time.monotonic() - start:.0f} s")

    problems = [*resources.same_code_problems(found), *default_path_problems(found)]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        problems += [problem for each in pool.map(file_problems, ptx) for problem in each]
    disassembler = Disassembler.find()
    if disassembler is None:
        print(
            "the disassembly: SKIPPED, there are no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm"
        )
    else:
        disassembled = sorted(set(DISASSEMBLED) & set(architectures))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            every = pool.map(partial(hot_path_problems, disassembler, cubins, symbols), disassembled)
            problems += [problem for each in every for problem in each]
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
        version = cupy.nvrtc_version()
        by_nvrtc, faults = nvrtc_resources(chosen, arguments.jobs)
        names = ", ".join(f"sm_{architecture}" for architecture in chosen)
        print(f"NVRTC {version}: {len(by_nvrtc)} kernels for {names}; {time.monotonic() - start:.0f} s")
        problems += [*faults, *compare_compilers(by_nvrtc, found, nvcc.version.startswith(f"{version}."))]
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
