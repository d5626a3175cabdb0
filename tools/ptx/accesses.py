"""Counts the sectors of global memory that the warps of the CUDA kernels touch; `--write` renews the figures.

A kernel's PTX runs on the CPU, as in the backend `ptx`, with a trace of each thread's accesses. The n-th execution of
an instruction by the threads of a warp is one access, which needs the sectors that its distinct bytes would fill, and
may touch more.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from asgl_cuda import backends
from asgl_cuda.neurons.batch_norm_lif import batch_norm_lif
from asgl_cuda.neurons.leaky_integrator import leaky_integrator
from asgl_cuda.neurons.lif import lif

from ..emulation.emulated import LARGE, TINY
from ..kernels.cuda_code import Kernel
from ..pages import Page, prose, table
from .backend import ARCHITECTURE, CHOSEN, Access, Launcher, Machine, missing

SECTOR_BYTES = 32
WARP_THREADS = 32
BACKEND = "traced"


class Sectors(NamedTuple):
    """The number of sectors touched, and the smallest number for as many bytes."""

    touched: int = 0
    fewest: int = 0

    def __str__(self) -> str:
        if self.touched == self.fewest:
            return str(self.touched)
        return f"{self.touched} / {self.fewest} = {self.touched / self.fewest:.2f}"


class Counts(NamedTuple):
    """The sectors of a kernel's accesses to sequences, and to all other memory."""

    loads: Sectors = Sectors()
    stores: Sectors = Sectors()
    other_loads: Sectors = Sectors()
    other_stores: Sectors = Sectors()


def warp_accesses(accesses: Iterable[Access]) -> Iterator[list[Access]]:
    """Groups the accesses of a warp: the n-th executions of an instruction by its threads are one access."""
    times: Counter[Any] = Counter()
    together: dict[Any, list[Access]] = defaultdict(list)
    for access in accesses:
        thread = access.where, access.block, access.thread
        together[access.where, access.block, access.thread // WARP_THREADS, times[thread]].append(access)
        times[thread] += 1
    yield from together.values()


def sectors(at_once: Iterable[Access]) -> Sectors:
    """Counts the sectors of one access of a warp. Threads that read the same address need its bytes once."""
    size = {access.address: access.bytes for access in at_once}
    touched = {byte // SECTOR_BYTES for first, count in size.items() for byte in (first, first + count - 1)}
    return Sectors(len(touched), -(-sum(size.values()) // SECTOR_BYTES))


def count(accesses: Iterable[Access], sequences: Iterable[range]) -> Counts:
    """Counts the sectors of all accesses; `sequences` are address ranges."""
    found = [Sectors()] * len(Counts._fields)
    for at_once in warp_accesses(accesses):
        first = at_once[0]
        column = 2 * (not any(first.address in each for each in sequences)) + first.stores
        found[column] = Sectors(*map(sum, zip(found[column], sectors(at_once), strict=True)))
    return Counts(*found)


# ---- cases ----


class Case(NamedTuple):
    """A training step, and the kernels of it, by prefixes of their names. `one`: with one neuron per thread."""

    kernels: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[Tensor, dict[str, Any]], Any]
    one: bool = False
    about: str = ""
    residual: bool = False


class Row(NamedTuple):
    """The counts of a kernel in a case."""

    kernel: Kernel
    case: Case
    counts: Counts

    def to_json(self) -> dict[str, Any]:
        about = ", ".join(filter(None, (self.kernel.kind, self.case.about)))
        return {
            "kernel": about,
            "shape": list(self.case.shape),
            **{k: list(v) for k, v in self.counts._asdict().items()},
        }


# Addresses depend on neither surrogate nor reset: tests compile these kernels anyway.
_CHOSEN: dict[torch.dtype, dict[str, Any]] = {
    dtype: {"surrogate": surrogate, "v_reset": 0.0 if reset == "hard" else None}
    for dtype, surrogate, reset in reversed(CHOSEN)
}
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (2, 16, 8, 8)  # batch, channels, rows, columns
ODD_SIZES = (2, 15, 7, 7)  # no multiples of four; steps not aligned to sectors
STEPS = (4, 8, 17)  # a compile-time length, part of a segment, and two segments, with checkpoints


def _learned(dtype: torch.dtype, *shape: int, value: float = 1.0) -> Tensor:
    return torch.full(shape, value, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)


def _plain(x_seq: Tensor, options: dict[str, Any]) -> Any:
    return lif(x_seq, width=_learned(x_seq.dtype), **options)


def _by_neuron(x_seq: Tensor, options: dict[str, Any]) -> Any:
    return lif(x_seq, width=_learned(x_seq.dtype, *x_seq.shape[2:]), **options)


def _normalised(x_seq: Tensor, options: dict[str, Any]) -> Any:
    weight, bias = (_learned(x_seq.dtype, x_seq.shape[2]) for _ in range(2))
    width = _learned(x_seq.dtype)
    return batch_norm_lif(x_seq, weight=weight, bias=bias, training=True, width=width, **options)


def _general(x_seq: Tensor, options: dict[str, Any]) -> Any:
    """All sequences and states, two parameters by channel and two of the layer."""
    dtype, channels = x_seq.dtype, (x_seq.shape[2], 1, 1)
    return lif(
        x_seq, decay=_learned(dtype, *channels, value=0.5), v_threshold=_learned(dtype), width=_learned(dtype),
        input_gain=_learned(dtype, *channels), v_init=_learned(dtype, *x_seq.shape[1:], value=0.0),
        return_v_last=True, return_v_seq=True, return_h_seq=True, **options,
    )  # fmt: skip


def _integrated(x_seq: Tensor, options: dict[str, Any]) -> Any:
    return leaky_integrator(x_seq, decay=_learned(x_seq.dtype, value=0.5), backend=options["backend"])


def _decay(*shape: int) -> Callable[[Tensor, dict[str, Any]], Any]:
    return lambda x_seq, options: lif(x_seq, decay=_learned(x_seq.dtype, *shape, value=0.5), **options)


def cases(dtypes: Iterable[torch.dtype] = TYPES) -> Iterator[Case]:
    """The cases of the page."""
    for dtype in dtypes:
        if dtype != torch.float64:
            for steps in STEPS:
                yield Case(("forward", "backward"), dtype, (steps, *SIZES), _plain)
            for steps in STEPS:
                by_channel = ("moments", "input gradient") if steps == STEPS[-1] else ()
                yield Case(("forward", "backward", *by_channel), dtype, (steps, *SIZES), _normalised)
            yield Case(("forward", "backward"), dtype, (STEPS[-1], *SIZES), _general)
            yield from residual_cases(dtype)
        yield Case(("forward", "backward"), dtype, (STEPS[-1], *SIZES), _by_neuron)
        for sizes in (SIZES, ODD_SIZES):
            yield Case(("forward", "backward"), dtype, (STEPS[-1], *sizes), _general, one=True)
        yield Case(("forward", "backward"), dtype, (STEPS[-1], *SIZES), _plain, one=True, residual=True)
        yield Case(("moments", "input gradient"), dtype, (STEPS[-1], *ODD_SIZES), _normalised, one=True)
        yield Case(("input gradient",), dtype, (STEPS[-1], *ODD_SIZES), _normalised, one=True, residual=True)
    if torch.float32 in dtypes:
        yield from few_cases()


def residual_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Calls with a residual, with four neurons per thread."""
    for steps in (STEPS[0], STEPS[-1]):
        yield Case(("forward", "backward"), dtype, (steps, *SIZES), _plain, residual=True)
        yield Case(("forward", "backward", "input gradient"), dtype, (steps, *SIZES), _normalised, residual=True)
    yield Case(("forward", "backward"), dtype, (STEPS[-1], *SIZES), _general, residual=True)


def few_cases() -> Iterator[Case]:
    """Kernels that run per channel or per parameter value, with few and many slots, and the integrator's."""
    few, many = (4, 32, *SIZES[1:]), (1, 128, *SIZES[1:])
    for shape in (few, many):
        yield Case(("coefficients",), torch.float32, shape, _normalised)
        yield Case(("gradient sum",), torch.float32, shape, _plain, about="one value")
        yield Case(("gradient sum",), torch.float32, shape, _decay(*SIZES[1:2], 1, 1), about="a value a channel")
    yield Case(("gradient sum",), torch.float32, few, _decay(*SIZES[1:]), about="a value a neuron")
    yield Case(("integrator",), torch.float32, (STEPS[-1], *SIZES), _integrated)


class TracingLauncher(Launcher):
    """Counts the accesses of a case's kernels; the others run untraced."""

    def __init__(self, machine: Machine, case: Case) -> None:
        super().__init__(machine, LARGE if case.one else TINY)
        self._case = case
        self._sequence_bytes = math.prod(case.shape) * case.dtype.itemsize
        self.found: list[Row] = []

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        name = Kernel.from_symbol(f"void {kernel}(")
        self.machine.traced = name.kind.startswith(self._case.kernels)
        try:
            super().launch(device, kernel, blocks, threads, params, size)
        finally:
            # A generic address may point to parameters, outside global memory.
            own = range(params, params + size)
            accesses = [access for access in self.machine.take_accesses() if access.address not in own]
            was_traced, self.machine.traced = self.machine.traced, False
        if was_traced:
            # No other tensor of a case is as large as a sequence.
            storages = (range(*each) for each in self._local.storages.ranges)
            sequences = [each for each in storages if len(each) >= self._sequence_bytes]
            self.found.append(Row(name, self._case, count(accesses, sequences)))


def trace(case: Case, machine: Machine) -> list[Row]:
    """Runs forward and backward."""
    launcher = TracingLauncher(machine, case)
    operators = backends.Operators(**launcher.operators())
    with patch.dict(backends.BACKENDS, {BACKEND: backends.Backend(("cpu",), operators, lambda: None)}):
        x_seq = torch.zeros(case.shape, dtype=case.dtype, requires_grad=True)
        options = {"analog_prob": 0.25, "backend": BACKEND, **_CHOSEN[case.dtype]}
        if case.residual:
            options["residual"] = torch.zeros_like(x_seq, requires_grad=True)
        output = case.compute(x_seq, options)
        outputs = [output] if isinstance(output, Tensor) else output
        torch.autograd.backward(outputs, [torch.zeros_like(each) for each in outputs])
    return launcher.found


# ---- the page ----

INTRODUCTION = "# Sectors that the warps touch\n\n" + prose(f"""\
A sector is {SECTOR_BYTES} aligned bytes, the smallest unit that caches and memory move. One instruction of a warp's
{WARP_THREADS} threads is one access, and costs the sectors that it touches. The fewest possible are those that its
distinct bytes would fill, side by side from the beginning of a sector. Both are summed over a kernel's accesses. A cell
has one value where they are equal, else touched / fewest = ratio.

`python -m tools.ptx.accesses --write` counts them: it runs the PTX that NVRTC compiles for {ARCHITECTURE} on the CPU,
and records each access of each thread to global memory. Sequences are x, residual, spikes, potentials and their
gradients, time first. Others are parameters, their partial sums, the state of the noise, states of neurons, checkpoints
and moments. Plain neurons learn their width, normalised ones also gain and bias of each channel; those with a residual
are measured as both. The rest have all sequences and states, and learn decay and gain of each channel, threshold and
width. Surrogate and reset are those of the tests of PTX: the former changes no access, and a soft reset reads the
threshold as its amount.

With 15 x 7 x 7 neurons, steps of x are not aligned to sectors, and each access of a warp reaches into a sector of the
next warp, which then finds it in the cache. Moments load the first value of a channel in the block beforehand, the same
for its threads. Gradient sums read the slots of neighbouring elements side by side, not aligned to sectors; so are
stores of partial sums by neuron. Moments are records of three float64, one a thread.

This shows the pattern of each access: whether neighbouring threads access neighbouring memory. It does not show which
sectors are still in a cache, and so how many come from memory; nor the order of warps, nor what ptxas splits, joins or
moves. The n-th executions of an instruction by the threads of a warp count as one access even where threads diverge.
""")
HEADER = ("", "sequence", "loads", "stores", "other loads", "other stores")


def figures(rows: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """The rows by type."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row.kernel.dtype].append(row.to_json())
    return dict(found)


def text(found: dict[str, list[dict[str, Any]]]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for dtype, rows in found.items():
        cells = (
            [row["kernel"], " x ".join(map(str, row["shape"])), *(str(Sectors(*row[name])) for name in Counts._fields)]
            for row in rows
        )
        parts.append(f"## {dtype}\n\n{table(HEADER, cells)}")
    return "\n".join(parts)


PAGE = Page(Path(__file__).with_name("SECTORS.md"), text)


def main() -> None:
    """Prints a new page, or writes page and figures."""
    parser = argparse.ArgumentParser(prog="python -m tools.ptx.accesses", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write sectors.json and SECTORS.md, print nothing")
    parser.add_argument("--draw", action="store_true", help="draw SECTORS.md again from sectors.json")
    arguments = parser.parse_args()
    if arguments.draw:
        PAGE.write()
        return
    reason = missing()
    if reason is not None:
        parser.error(reason)
    machine = Machine()
    found = figures(row for case in cases() for row in trace(case, machine))
    if arguments.write:
        PAGE.write(found)
    else:
        print(text(found), end="")


if __name__ == "__main__":
    main()
