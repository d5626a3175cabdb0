"""Warps touch the sectors in tools/ptx/sectors.json, the fewest possible in most kernels."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch

import asgl_cuda
from tools import ptx
from tools.ptx import accesses
from tools.ptx.accesses import Case, Row, Sectors

pytestmark = [pytest.mark.ptx, pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing()))]

# The other types take as long again each, for the same source.
TYPES = [pytest.param(dtype, marks=[pytest.mark.slow] if dtype != torch.float32 else []) for dtype in accesses.TYPES]


@functools.cache
def traced(dtype: torch.dtype) -> tuple[Row, ...]:
    machine = ptx.Machine()
    return tuple(row for case in accesses.cases((dtype,)) for row in accesses.trace(case, machine))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sectors_of_kernels(dtype):
    """Settled neurons touch the fewest; all as committed."""
    found = 0
    for kernel, case, counts in traced(dtype):
        if re.search("plain|normalised|by neuron", kernel.kind) is None:
            continue
        found += 1
        sequence = math.prod(case.shape) * dtype.itemsize // accesses.SECTOR_BYTES
        again = "normalised" in kernel.kind and "T = 4" not in kernel.kind
        # x; the gradient; x again if normalised, by neuron for the gain's gradient alone; the residual
        loads = (1 if kernel.kind.startswith("forward") else 2 + again) + case.residual
        assert counts.loads == Sectors(loads * sequence, loads * sequence), f"{kernel}, {case.shape}"
        assert counts.stores == Sectors(sequence, sequence), f"{kernel}, {case.shape}"
    assert found == 2 + (0 if dtype == torch.float64 else 4 * len(accesses.STEPS) + 8)
    name = str(dtype).removeprefix("torch.")
    now = accesses.figures(traced(dtype))[name]
    assert now == accesses.PAGE.figures[name], "after an intended change: python -m tools.ptx.accesses --write"


def test_stride_between_neighbouring_threads_shows():
    """With batch first, four neurons of a sample are adjacent to their next step, not to the next sample."""

    def batch_first(x_seq, options):
        return asgl_cuda.lif(x_seq, time_dim=1, **options)

    case = Case(("forward", "backward"), torch.float32, (256, 4, 4), batch_first)
    rows = accesses.trace(case, ptx.Machine())
    assert [row.kernel.kind for row in rows] == ["forward plain, T = 4", "backward plain, T = 4"]
    for row in rows:
        assert row.counts.loads.touched == 2 * row.counts.loads.fewest
        assert row.counts.stores.touched == 2 * row.counts.stores.fewest
