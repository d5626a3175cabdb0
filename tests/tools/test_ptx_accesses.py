"""The sectors that warps touch are those of tools/roofline/ROOFLINE.md, the fewest possible where most calls go."""

from __future__ import annotations

import functools
import math
import os
import re

import pytest
import torch

import asgl_cuda
from tools.ptx import accesses as ptx_accesses
from tools.ptx import backend as ptx
from tools.ptx.accesses import Case, Counts, Row, Sectors
from tools.roofline import roofline

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing())),
]

# The others take as long again, and would find the same fault in the same source.
TYPES = (torch.float32, torch.bfloat16) if "ASGL_TEST_BACKENDS" not in os.environ else ptx_accesses.TYPES


@functools.cache
def traced(dtype: torch.dtype) -> tuple[Row, ...]:
    machine = ptx.Machine()
    return tuple(row for case in ptx_accesses.cases((dtype,)) for row in ptx_accesses.trace(case, machine))


def accesses(addresses: list[int], size: int = 4, where: str = "ld", block: int = 0) -> list[ptx.Access]:
    """An access of each thread of a block."""
    return [ptx.Access(where, block, thread, False, size, address) for thread, address in enumerate(addresses)]


# ---- how it is counted ----


@pytest.mark.parametrize(
    ("addresses", "size", "expected"),
    [
        ([4 * lane for lane in range(32)], 4, Sectors(4, 4)),
        ([4 * lane for lane in reversed(range(32))], 4, Sectors(4, 4)),
        ([16 * lane for lane in range(32)], 16, Sectors(16, 16)),
        ([4 * lane + 4 for lane in range(32)], 4, Sectors(5, 4)),  # it begins in the midst of a sector
        ([8 * lane for lane in range(32)], 4, Sectors(8, 4)),
        ([32 * lane for lane in range(32)], 4, Sectors(32, 4)),
        ([4096 * lane for lane in range(32)], 16, Sectors(32, 16)),
        ([64] * 32, 4, Sectors(1, 1)),
        ([8 * (lane // 16) for lane in range(32)], 8, Sectors(1, 1)),
        ([24 * lane for lane in range(32)], 8, Sectors(24, 8)),
        ([30], 2, Sectors(1, 1)),
    ],
)
def test_sectors(addresses, size, expected):
    assert ptx_accesses.sectors(accesses(addresses, size)) == expected


def test_an_access_of_a_warp_is_one_instruction_of_its_threads_at_a_time():
    side_by_side, apart = [4 * thread for thread in range(64)], [4096 + 32 * thread for thread in range(64)]
    rounds = [*accesses(side_by_side), *accesses(apart), *accesses(side_by_side, where="another"),
              *accesses(side_by_side, block=1)]  # fmt: skip
    sizes = sorted(ptx_accesses.sectors(each).touched for each in ptx_accesses.of_warps(rounds))
    assert sizes == [4] * 6 + [32] * 2
    # In which order threads come makes no difference: the fibres run one after the other.
    by_thread = sorted(rounds, key=lambda access: access.thread)
    assert sorted(ptx_accesses.sectors(each).touched for each in ptx_accesses.of_warps(by_thread)) == sizes


def test_loads_stores_and_sequences_are_told_apart():
    loads, apart = accesses([4 * thread for thread in range(32)]), accesses([1024 + 8 * thread for thread in range(32)])
    stores = [each._replace(where="st", stores=True) for each in loads]
    others = [each._replace(where="ld of another") for each in apart]
    expected = Counts(Sectors(4, 4), Sectors(4, 4), Sectors(8, 4), Sectors())
    assert ptx_accesses.count([*loads, *stores, *others], [range(0, 128)]) == expected


# ---- what the kernels do ----


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sequences_of_settled_neurons_are_reached_by_the_fewest_sectors(dtype):
    found = 0
    for kernel, case, counts in traced(dtype):
        if re.search("plain|normalised", kernel.kind) is None:
            continue
        found += 1
        sequence = math.prod(case.shape) * dtype.itemsize // ptx_accesses.SECTOR_BYTES
        again = "normalised" in kernel.kind and "T = 4" not in kernel.kind
        loads = 1 if kernel.kind.startswith("forward") else 2 + again  # of x, gradient, x
        assert counts.loads == Sectors(loads * sequence, loads * sequence), f"{kernel}, {case.shape}"
        assert counts.stores == Sectors(sequence, sequence), f"{kernel}, {case.shape}"
    assert found == 2 + (0 if dtype == torch.float64 else 4 * len(ptx_accesses.STEPS))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_page_has_what_the_trace_gives(dtype):
    """A kernel that has become worse shows here, and so does one that has become better."""
    _, section = roofline.parts_of(roofline.PAGE.read_text())
    assert section.startswith(ptx_accesses.INTRODUCTION)
    name = str(dtype).removeprefix("torch.")
    committed = section.split(f"### {name}\n\n")[1].split("\n###")[0]
    (table,) = ptx_accesses.tables(traced(dtype)).values()
    assert table.strip() == committed.strip(), "after a change that is meant: python -m tools.ptx.accesses --write"


def test_a_stride_between_neighbouring_threads_shows():
    """Four neurons of a batch lie beside those of the next step, not beside those of the next batch."""

    def batch_first(x_seq, options):
        return asgl_cuda.lif(x_seq, time_dim=1, **options)

    case = Case(("forward", "backward"), torch.float32, (256, 4, 4), batch_first)
    rows = ptx_accesses.trace(case, ptx.Machine())
    assert [row.kernel.kind for row in rows] == ["forward plain, T = 4", "backward plain, T = 4"]
    for row in rows:
        assert row.counts.loads.touched == 2 * row.counts.loads.fewest
        assert row.counts.stores.touched == 2 * row.counts.stores.fewest


# ---- the page ----


def test_both_tools_keep_what_the_other_writes(monkeypatch, tmp_path):
    page = tmp_path / "ROOFLINE.md"
    page.write_text(f"# What it was\n\n{roofline.ACCESSES}\n\nHow it is.\n")
    before, section = roofline.parts_of(page.read_text())
    assert before == "# What it was\n"
    assert section == f"{roofline.ACCESSES}\n\nHow it is.\n"
    monkeypatch.setattr(roofline, "PAGE", page)
    roofline.write("# What it is\n")
    assert page.read_text() == f"# What it is\n\n{section}"
    assert roofline.parts_of("# Alone\n") == ("# Alone\n", "")
