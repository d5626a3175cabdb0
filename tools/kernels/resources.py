"""Registers, shared memory and spills of the compiled kernels: the figures in resources.json, and their page."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from asgl_cuda.backends.extension import compilation

from ..pages import Page, table
from .cuda_code import Kernel, Usage

LISTED_DTYPES = ("float32", "bfloat16")
LISTED_SURROGATES = ("rectangle", "sigmoid")
OTHERS, NVRTC, SPILLS = "All others", "NVRTC", "Spills and stack"
SPILL_COLUMNS = ("stack", "spill stores", "spill loads")

Resources = dict[Kernel, dict[int, Usage]]  # by architecture
Row = dict[str, Any]  # the row's name under "", then its columns
Sections = dict[str, list[Row]]  # by heading


def section_and_name(kernel: Kernel) -> tuple[str, str]:
    """The heading and the row under which the kernel is counted."""
    if kernel.dtype in LISTED_DTYPES and kernel.surrogate in LISTED_SURROGATES:
        return f"{kernel.dtype}, {kernel.surrogate}", f"{kernel.kind}, {kernel.reset}"
    return OTHERS, ", ".join((kernel.kind, *("any",) * (kernel.reset == "any reset"), kernel.dtype))


def reading_order(kernel: Kernel) -> tuple[Any, ...]:
    """The key by which kernels are sorted on the page."""
    numbers = [int(number) for number in re.findall(r"\d+", kernel.kind)]
    return kernel.dtype, kernel.surrogate, kernel.kind[0] == "b", re.sub(r"\d+", "", kernel.kind), numbers, kernel.reset


def sections(resources: Resources) -> Sections:
    """The rows of the page, by heading."""
    groups: dict[tuple[str, str], list[dict[int, Usage]]] = defaultdict(list)
    for kernel in sorted(resources, key=reading_order):
        groups[section_and_name(kernel)].append(resources[kernel])
    found: Sections = defaultdict(list)
    for (section, name), usages in sorted(groups.items(), key=lambda item: item[0][0] == OTHERS):
        row: Row = {"": name, **({"kernels": len(usages)} if section == OTHERS else {})}
        row["shared"] = max(usage.shared for each in usages for usage in each.values())
        found[section].append(row | {f"sm_{a}": max(each[a].registers for each in usages) for a in usages[0]})
    found[SPILLS] = []
    for kernel in sorted(resources, key=reading_order):
        spills = {a: usage.spills for a, usage in resources[kernel].items() if any(usage.spills)}
        for sizes in sorted(set(spills.values())):
            where = " ".join(f"sm_{a}" for a, those in spills.items() if those == sizes)
            columns = dict(zip(SPILL_COLUMNS, sizes, strict=True))
            found[SPILLS].append({"": str(kernel), "architectures": where, **columns})
    return dict(found)


def with_nvrtc(found: Sections, ours: Resources, theirs: Resources) -> Sections:
    """Adds a section before the spills: registers of NVRTC's kernels, `ours`, against nvcc's."""
    rows = []
    for architecture in sorted({architecture for usages in ours.values() for architecture in usages}):
        both = [(each[architecture], theirs[kernel][architecture]) for kernel, each in ours.items() if kernel in theirs]
        differences = [usage.registers - expected.registers for usage, expected in both]
        spills = sum(any(usage.spills) for usage, _ in both)
        row = {"": f"sm_{architecture}", "kernels": len(both), "same registers": differences.count(0)}
        rows.append(row | {"most fewer": -min(differences), "most more": max(differences), "spills": spills})
    return {**{name: each for name, each in found.items() if name != SPILLS}, NVRTC: rows, SPILLS: found[SPILLS]}


# ---- comparison ----


class Findings(NamedTuple):
    """Problems fail the check; notes do not."""

    problems: list[str]
    notes: list[str]


def spills_in(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """The kernel and architecture of each row with a spill or a stack."""
    return {(row[""], architecture) for row in rows for architecture in row["architectures"].split()}


def compare(now: Sections, version: str, committed: dict[str, Any]) -> Findings:
    """Compares the figures of this version of nvcc with the committed ones."""
    problems, notes = [], []
    before = {(section, row[""]): row for section, rows in committed["sections"].items() for row in rows}
    for section, row in ((section, row) for section, rows in now.items() if section != SPILLS for row in rows):
        expected = before.get((section, row[""]))
        if expected is None or row.get("kernels", 1) > expected.get("kernels", 1):
            problems.append(f"{PAGE.path.name} lacks a kernel: {section}: {row['']}")
        elif section == NVRTC and row["spills"] > expected["spills"]:
            problems.append(f"NVRTC: kernels that spill on {row['']}: {row['spills']} instead of {expected['spills']}")
        elif version == committed["nvcc"] or section == NVRTC:
            changed = [f"{c} {expected.get(c)} -> {value}" for c, value in row.items() if expected.get(c) != value]
            notes += [f"{section}: {row['']}: {', '.join(changed)}"] if changed else []
    new = spills_in(now[SPILLS]) - spills_in(committed["sections"][SPILLS])
    return Findings(problems + [f"a new spill or stack: {kernel}, {a}" for kernel, a in sorted(new)], notes)


def same_code_problems(resources: Resources) -> Iterator[str]:
    """Differences between architectures that SAME_CODE says are equal, as far as they were compiled."""
    for kernel, usages in resources.items():
        for architecture, other in compilation.SAME_CODE.items():
            if architecture in usages and other in usages and usages[architecture] != usages[other]:
                yield f"sm_{architecture} no longer has the code of sm_{other}: {kernel}"


# ---- the page ----

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
INTRODUCTIONS = {
    OTHERS: """\
The most that any takes: the other surrogates, the other types with every surrogate, and kernels that
have none.
""",
    NVRTC: """\
NVRTC makes this of the same source, in registers against the tables above. Only kernels that loop
over steps or sums have others, whose values its front end orders otherwise.
On sm_120 all may have: NVRTC makes PTX for compute_120, nvcc for compute_80.
""",
}


def text(figures: dict[str, Any]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION.format(version=figures["nvcc"], flags=" ".join(figures["flags"]))]
    for section, rows in figures["sections"].items():
        body = table(rows[0], (map(str, row.values()) for row in rows), 1 + (section == SPILLS)) if rows else "None.\n"
        parts += [f"## {section}\n", *filter(None, [INTRODUCTIONS.get(section)]), body]
    return "\n".join(parts)


PAGE = Page(Path(__file__).with_name("RESOURCES.md"), text)
