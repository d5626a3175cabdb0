"""Compiles the CUDA kernels for every architecture and compares them with RESOURCES.md.

What fails: a kernel that does not compile or that the table lacks; a spill or a stack that the table lacks; on the
architectures that count, any of those, narrow accesses or local memory in the default paths; faults of the PTX of any
kernel (code_checks.py); glue that does not compile against the installed torch. A change of registers is only reported.
Everything is compiled as asgl_cuda/extension/compilation.py has it: to PTX for compute_75 and compute_80, and from that
for each architecture. Those for which ptxas makes the code of another are compiled with --update alone, which fails
where they take other registers.

NVRTC compiles what asgl_cuda/backends can ask for, as its cupy.py has it, for two architectures, with --update for
four. What fails: a kernel that nvcc's build lacks or has beyond; faults of the PTX; a spill that nvcc's does not have;
and, where NVRTC is of nvcc's version and both go by the same PTX version, other registers than nvcc's. The
kernels that loop over steps or sums may have others, as long as no fewer blocks fit on a multiprocessor than of nvcc's
or than their launch bounds ask for: NVRTC's front end orders their many values otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from asgl_cuda.backends import cupy, integrator_kernels, normalisation_kernels
from asgl_cuda.backends import neuron_kernels as launch
from asgl_cuda.backends.structures import constant
from asgl_cuda.extension import compilation
from asgl_cuda.reference import Rules
from asgl_cuda.surrogate import SURROGATES

from . import host_compiler
from .code_checks import ptx_problems, sass_problems
from .cuda_code import ANY, CSRC, Disassembler, Kernel, Nvcc, Usage, kernel_of, run
from .cuda_code import usages as usages_of

TABLE = Path(__file__).with_name("RESOURCES.md")
SOURCES = tuple(sorted((CSRC / "cuda").glob("*.cu")))
LISTED_DTYPES = ("float32", "bfloat16")
LISTED_SURROGATES = ("rectangle", "sigmoid")
OTHERS, NVRTC, SPILLS = "All others", "NVRTC", "Spills and stack"
SPILL_COLUMNS = ("stack", "spill stores", "spill loads")

# The kernels that most calls run must be beyond reproach here.
HOT_KINDS = tuple(
    f"{direction} {input}, {kind}"
    for input in ("plain", "normalised")
    for direction in ("forward", "backward")
    for kind in ("T = 4", "4 neurons")
)
DEFAULT_KINDS = (*HOT_KINDS, "forward normalised, 1 neuron")
GENERAL_KINDS = ("forward, 1 neuron", "backward, 1 neuron")
HOT_KINDS_OF_CHANNELS = ("moments, 4 columns", "input gradient, 4 columns")
DEFAULT_KINDS_OF_CHANNELS = (*HOT_KINDS_OF_CHANNELS, "moments, 1 column", "input gradient, 1 column")
DEFAULT_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DISASSEMBLED = (80, 90, 100)
NVRTC_ARCHITECTURES = (75, 80, 90, 120)
LANES = ("1 neuron", "4 neurons")
# From here on NVRTC's PTX is for another architecture than compute_80, for which compilation.py has nvcc make it.
OTHER_PTX_FROM = 100
NVRTC_WITHOUT_UPDATE = (80, 120)  # one before and one from there on
FREE_KINDS = (
    *(f"backward{input}, {lanes}" for input in ("", " plain", " normalised") for lanes in (*LANES, "T = 4")),
    *(f"integrator backward with sums, {lanes}" for lanes in LANES),
)
MULTIPROCESSOR_REGISTERS = 65536
# Of a multiprocessor and, from sm_80 on, what each block takes beside its own (CUDA C++ Programming Guide).
SHARED_BYTES = {75: 65536, 80: 167936, 90: 233472, 120: 102400}
RESERVED_BYTES = 1024
# By launch bounds, of a kind or of a kind and type: more are luck.
ASKED_BLOCKS = {
    "backward, 4 neurons": 3, "backward normalised, 4 neurons": 3, "backward plain, 4 neurons, float32": 3,
    "integrator backward with sums, 1 neuron": 5, "integrator backward with sums, 4 neurons": 5,
}  # fmt: skip
# NVRTC compiles so many kernels at a time: it reads the headers anew each time, and the last should not take long.
CHUNK = 24

Resources = dict[Kernel, dict[int, Usage]]


class Row(NamedTuple):
    """A row of the table, by the heading that it stands under."""

    section: str
    name: str
    columns: dict[str, str]


def paths(kinds: Iterable[str], kinds_of_channels: Iterable[str]) -> list[Kernel]:
    """The kernels of these kinds that are listed one by one; batch normalisation comes last."""
    neurons = product(kinds, LISTED_DTYPES, LISTED_SURROGATES, ("hard", "soft"))
    return [Kernel(*names) for names in (*neurons, *product(kinds_of_channels, LISTED_DTYPES))]


def default_paths() -> list[Kernel]:
    general = [Kernel(kind, dtype, *ANY) for kind, dtype in product(GENERAL_KINDS, LISTED_DTYPES)]
    return general + paths(DEFAULT_KINDS, DEFAULT_KINDS_OF_CHANNELS)


def hot_paths() -> list[Kernel]:
    return paths(HOT_KINDS, HOT_KINDS_OF_CHANNELS)


# ---- the table ----


def section_and_name(kernel: Kernel) -> tuple[str, str]:
    """The row that counts the kernel."""
    if kernel.dtype in LISTED_DTYPES and kernel.surrogate in LISTED_SURROGATES:
        return f"{kernel.dtype}, {kernel.surrogate}", f"{kernel.kind}, {kernel.reset}"
    return OTHERS, ", ".join((kernel.kind, *("any",) * (kernel.reset == "any reset"), kernel.dtype))


def in_reading_order(kernel: Kernel) -> tuple[Any, ...]:
    numbers = [int(number) for number in re.findall(r"\d+", kernel.kind)]
    return kernel.dtype, kernel.surrogate, kernel.kind[0] == "b", re.sub(r"\d+", "", kernel.kind), numbers, kernel.reset


def rows_of(resources: Resources) -> list[Row]:
    groups: dict[tuple[str, str], list[dict[int, Usage]]] = defaultdict(list)
    for kernel in sorted(resources, key=in_reading_order):
        groups[section_and_name(kernel)].append(resources[kernel])
    rows = []
    for (section, name), usages in sorted(groups.items(), key=lambda item: item[0][0] == OTHERS):
        columns = {"kernels": len(usages)} if section == OTHERS else {}
        columns["shared"] = max(usage.shared for each in usages for usage in each.values())
        columns |= {f"sm_{a}": max(each[a].registers for each in usages) for a in usages[0]}
        rows.append(Row(section, name, {column: str(value) for column, value in columns.items()}))
    for kernel in sorted(resources, key=in_reading_order):
        spills = {a: usage.spills for a, usage in resources[kernel].items() if any(usage.spills)}
        for sizes in sorted(set(spills.values())):
            where = " ".join(f"sm_{a}" for a, those in spills.items() if those == sizes)
            columns = dict(zip(("architectures", *SPILL_COLUMNS), (where, *map(str, sizes)), strict=True))
            rows.append(Row(SPILLS, str(kernel), columns))
    return rows


def spills_in(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Kernel and architecture of each that spills or has a stack."""
    return {(row.name, a) for row in rows if row.section == SPILLS for a in row.columns["architectures"].split()}


INTRODUCTION = """\
# What the CUDA kernels take

Registers a thread and bytes of shared memory a block, as ptxas reports them: nvcc {version}, `{flags}`,
for sm_75 from the PTX of compute_75, for the others from compute_80's. Made by
`python -m tools.kernels.cuda_compile --update`, held against the code by `make cuda-compile`.

T is a length that the kernel knows; *plain* and *normalised* are what runs where no
parameter changes over time, of any granularity and with gradients of all but the mean: *plain* where the input current
is x itself, *normalised* where it has a gain, bias or mean, as batch normalisation gives them; *1 neuron* and *4
neurons*, *1 column* and *4 columns* are what a thread owns. Spills and stack, where there are any, come last.
"""


def to_markdown(rows: Iterable[Row], version: str, flags: Sequence[str]) -> str:
    lines = [INTRODUCTION.format(version=version, flags=" ".join(flags))]
    sections = {section: list(group) for section, group in groupby(rows, key=lambda row: row.section)}
    for section, those in {**sections, SPILLS: sections.get(SPILLS, [])}.items():
        lines += [f"## {section}", ""]
        if section == OTHERS:
            lines += [
                "The most that any takes: the other surrogates, the other types with every surrogate, and kernels that",
                "have none.",
                "",
            ]
        if section == NVRTC:
            lines += [
                "NVRTC makes this of the same source, in registers against the tables above. Only kernels that loop",
                "over steps or sums have others, whose values its front end orders otherwise; no fewer blocks fit than",
                "of nvcc's, or than are asked for.",
                "On sm_120 all may have: NVRTC makes PTX for compute_120, nvcc for compute_80.",
                "",
            ]
        if not those:
            lines += ["None.", ""]
            continue
        columns = list(those[0].columns)
        body = [["", *columns], *([row.name, *row.columns.values()] for row in those)]
        widths = [max(len(row[i]) for row in body) for i in range(len(columns) + 1)]
        texts = [not cell.isdigit() for cell in body[1]]
        rule = ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, texts, strict=True)]
        body.insert(1, rule)
        lines += [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in body]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def from_markdown(text: str) -> tuple[list[Row], str]:
    """The rows, and the version of nvcc that they come from."""
    rows: list[Row] = []
    section, header = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            section, header = line[3:], []
        elif line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            if not header:
                header = cells
            elif not name.startswith("--"):
                rows.append(Row(section, name, dict(zip(header, cells, strict=True))))
    version = re.search(r"nvcc ([\d.]+\d)", text)
    return rows, version[1] if version else ""


# ---- checks ----


class Findings(NamedTuple):
    """Problems fail the check, notes are only worth knowing."""

    problems: list[str]
    notes: list[str]


def compare(rows: Sequence[Row], version: str, committed: Sequence[Row], committed_version: str) -> Findings:
    problems, notes = [], []
    table = {(row.section, row.name): row.columns for row in committed if row.section != SPILLS}
    for section, name, columns in rows:
        if section == SPILLS:
            continue
        before = table.get((section, name))
        if before is None or int(columns.get("kernels", 1)) > int(before.get("kernels", 1)):
            problems.append(f"{TABLE.name} lacks a kernel: {section}: {name}")
        elif version == committed_version or section == NVRTC:
            changed = [f"{c} {before.get(c)} -> {value}" for c, value in columns.items() if before.get(c) != value]
            notes += [f"{section}: {name}: {', '.join(changed)}"] if changed else []
    expected = spills_in(committed)
    problems += [f"a new spill or stack: {kernel}, {a}" for kernel, a in sorted(spills_in(rows) - expected)]
    return Findings(problems, notes)


def same_code_problems(resources: Resources) -> Iterator[str]:
    """Both must have been compiled: the others are passed over."""
    for kernel, usages in resources.items():
        for architecture, other in compilation.SAME_CODE.items():
            if architecture in usages and other in usages and usages[architecture] != usages[other]:
                yield f"sm_{architecture} no longer has the code of sm_{other}: {kernel}"


def default_path_problems(resources: Resources) -> Iterator[str]:
    for kernel in default_paths():
        if kernel not in resources:
            yield f"a default path is gone, or has another name: {kernel}"
        for architecture, usage in resources.get(kernel, {}).items():
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
        hot = {kernel: symbols[source][kernel] for kernel in hot_paths() if kernel in symbols[source]}
        codes = disassembler.instructions(cubins[source, architecture], hot.values())
        for kernel, symbol in hot.items():
            found = sass_problems(kernel, codes[symbol])
            problems += [f"{kernel}, sm_{architecture}: {problem}" for problem in found]
    return problems


def faults_of_file(ptx: Path) -> list[str]:
    return [f"{ptx.name}: {problem}" for problem in ptx_problems(ptx.read_text())]


# ---- compilation ----


def compile_ops(nvcc: Nvcc, directory: Path) -> None:
    """ops.cpp as in a CUDA build, to an object against the installed torch, whichever build that is."""
    from torch.utils.cpp_extension import include_paths

    # Generated when torch is built for CUDA, and so absent from its CPU build, where nothing else is missing.
    stand_in = directory / "include" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    includes = [nvcc.include, CSRC, *include_paths(), sysconfig.get_paths()["include"], directory / "include"]
    isystem = [word for path in includes for word in ("-isystem", path)]
    defines = ["-DASGL_WITH_CUDA", "-DTORCH_EXTENSION_NAME=_C"]
    flags = [*compilation.CXX_FLAGS, "-O0"]  # it is not run
    run(
        [
            *host_compiler.command(),
            *flags,
            *defines,
            *isystem,
            "-c",
            CSRC / "ops/bindings.cpp",
            "-o",
            directory / "bindings.o",
        ]
    )


# ---- NVRTC ----


def kernels_asked_for() -> list[str]:
    """The name of every kernel that the launchers in Python can ask for."""
    names = []
    for real in (torch.float32, torch.float64):
        names += [
            launch.gradient_sum_kernel(real),
            normalisation_kernels.coefficients_kernel(real),
            normalisation_kernels.running_kernel(real),
            normalisation_kernels.adjoint_kernel(real),
        ]
    for dtype in launch.SCALARS:
        for lanes in (1,) if dtype == torch.float64 else (1, 4):
            names += [
                normalisation_kernels.moments_kernel(dtype, lanes),
                normalisation_kernels.input_gradient_kernel(dtype, lanes),
                *(
                    integrator_kernels.integrator_kernel(dtype, lanes, each)
                    for each in ("kForward", "kBackward", "kSums")
                ),
            ]
    plain = Rules(**dict.fromkeys(Rules._fields, 0))
    each = product(range(len(SURROGATES)), (0, 1))
    models = [launch.model(plain._replace(surrogate=surrogate, hard_reset=hard)) for surrogate, hard in each]
    for dtype, model in product(launch.SCALARS, (*models, launch.BY_OPTIONS)):
        inputs = (launch.GENERAL, launch.NORMALISED, launch.PLAIN)[: 1 if model == launch.BY_OPTIONS else 3]
        lanes = (1,) if dtype == torch.float64 else (1, 4)
        for call in product(lanes, inputs, (launch.CHECKPOINT_STEPS, constant("kShortSequence"))):
            names += [launch.forward_kernel(dtype, model, *call), launch.backward_kernel(dtype, model, *call)]
    return list(dict.fromkeys(names))


def compile_by_nvrtc(architecture: int, kernels: list[str]) -> tuple[dict[str, Usage], list[str]]:
    """The usages of the kernels, by symbol, and the faults of their PTX."""
    with cupy.compiled_program(kernels, f"sm_{architecture}", "-Xptxas=-v") as program:
        log, ptx = cupy._nvrtc().getProgramLog(program), cupy._nvrtc().getPTX(program).decode()
    return usages_of(log), [f"NVRTC, sm_{architecture}: {problem}" for problem in ptx_problems(ptx)]


def nvrtc_resources(architectures: Sequence[int], jobs: int) -> tuple[Resources, list[str]]:
    """The usages of all kernels, and the faults of their PTX."""
    problems = []
    resources: Resources = defaultdict(dict)
    names = kernels_asked_for()
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    with ProcessPoolExecutor(jobs) as pool:
        work = list(product(architectures, chunks))
        for (architecture, _), (usages, faults) in zip(
            work, pool.map(compile_by_nvrtc, *zip(*work, strict=True)), strict=True
        ):
            problems += faults
            for symbol, usage in usages.items():
                resources[kernel_of(symbol)][architecture] = usage
    return resources, problems


def resident_blocks(kernel: Kernel, usage: Usage, architecture: int) -> int:
    """How many blocks a multiprocessor has registers, dealt out by eight a thread, and shared memory for."""
    threads = constant("kSumThreads" if kernel.kind.startswith("gradient") else "kBlockThreads")
    by_registers = MULTIPROCESSOR_REGISTERS // (threads * -(-usage.registers // 8) * 8)
    reserved = RESERVED_BYTES if architecture >= 80 else 0
    return min(by_registers, SHARED_BYTES[architecture] // max(usage.shared + reserved, 1))


def compare_compilers(ours: Resources, theirs: Resources, same_version: bool) -> list[str]:
    """The faults of NVRTC's kernels, the first argument, against nvcc's."""
    problems = [f"nvcc's build lacks what NVRTC was asked for: {kernel}" for kernel in ours.keys() - theirs.keys()]
    problems += [f"the launchers in Python never ask for {kernel}" for kernel in theirs.keys() - ours.keys()]
    for kernel in sorted(ours.keys() & theirs.keys(), key=in_reading_order):
        for architecture, usage in ours[kernel].items():
            expected = theirs[kernel][architecture]
            blocks, expected_blocks = (resident_blocks(kernel, each, architecture) for each in (usage, expected))
            asked = (ASKED_BLOCKS.get(name) for name in (kernel.kind, f"{kernel.kind}, {kernel.dtype}"))
            least_blocks = min([expected_blocks, *filter(None, asked)])
            may_differ = kernel.kind in FREE_KINDS and blocks >= least_blocks
            same_ptx = same_version and architecture < OTHER_PTX_FROM
            if any(usage.spills) and usage.spills != expected.spills:
                problems.append(f"a spill of NVRTC's: {kernel}, sm_{architecture}: {usage}, nvcc's: {expected}")
            elif same_ptx and usage.registers != expected.registers and not may_differ:
                problems.append(f"other registers by NVRTC: {kernel}, sm_{architecture}: {usage}, nvcc's: {expected}")
    return problems


def rows_of_nvrtc(ours: Resources, theirs: Resources) -> list[Row]:
    rows = []
    for architecture in sorted({architecture for usages in ours.values() for architecture in usages}):
        both = [(each[architecture], theirs[kernel][architecture]) for kernel, each in ours.items() if kernel in theirs]
        differences = [usage.registers - expected.registers for usage, expected in both]
        columns = {
            "kernels": len(both),
            "same registers": differences.count(0),
            "most fewer": -min(differences),
            "most more": max(differences),
            "spills": sum(any(usage.spills) for usage, _ in both),
        }
        rows.append(Row(NVRTC, f"sm_{architecture}", {name: str(value) for name, value in columns.items()}))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels.cuda_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.relative_to(CSRC.parent)}")
    parser.add_argument("--architectures", type=int, nargs="+", metavar="90", help="only these (default: see above)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: one a core)")
    arguments = parser.parse_args()
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
    resources: dict[Kernel, dict[int, Usage]] = defaultdict(dict)
    symbols: dict[Path, dict[Kernel, str]] = defaultdict(dict)  # by source
    cubins: dict[tuple[Path, int], Path] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        glue = pool.submit(compile_ops, nvcc, directory)
        ptx = [path for paths in pool.map(lambda source: nvcc.to_ptx(source, directory), SOURCES) for path in paths]
        work = list(product(SOURCES, architectures))
        compiled = pool.map(lambda job: nvcc.to_cubin(directory, job[0].stem, job[1]), work)
        for (source, architecture), (cubin, log) in zip(work, compiled, strict=True):
            cubins[source, architecture] = cubin
            for symbol, usage in usages_of(log).items():
                symbols[source][kernel_of(symbol)] = symbol
                resources[kernel_of(symbol)][architecture] = usage
        glue.result()
    names = ", ".join(f"sm_{architecture}" for architecture in architectures)
    print(f"nvcc {nvcc.version}: {len(resources)} kernels for {names}; the glue; {time.monotonic() - start:.0f} s")

    problems = [*same_code_problems(resources), *default_path_problems(resources)]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for found in pool.map(faults_of_file, ptx):
            problems += found
    disassembler = Disassembler.find()
    if disassembler is None:
        print(
            "the disassembly: SKIPPED, there are no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm"
        )
    else:
        disassembled = sorted(set(DISASSEMBLED) & set(architectures))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for found in pool.map(partial(hot_path_problems, disassembler, cubins, symbols), disassembled):
                problems += found
    rows = rows_of(resources)
    reason = cupy.nvrtc_problem()
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
        found, faults = nvrtc_resources(chosen, arguments.jobs)
        problems += faults
        names = ", ".join(f"sm_{architecture}" for architecture in chosen)
        print(f"NVRTC {version}: {len(found)} kernels for {names}; {time.monotonic() - start:.0f} s")
        problems += compare_compilers(found, resources, nvcc.version.startswith(f"{version}."))
        rows += rows_of_nvrtc(found, resources)
    if arguments.update:
        TABLE.write_text(to_markdown(rows, nvcc.version, nvcc.flags))
        print(f"wrote {TABLE.relative_to(CSRC.parent)}")
    elif TABLE.exists():
        findings = compare(rows, nvcc.version, *from_markdown(TABLE.read_text()))
        problems += findings.problems
        for note in findings.notes:
            print(f"note: {note}")
    else:
        problems.append(f"there is no {TABLE.relative_to(CSRC.parent)}: --update writes it")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
