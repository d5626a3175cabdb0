"""Counts the sectors that warps touch where the CUDA kernels reach global memory.

A kernel's PTX runs on the CPU, as in the backend `ptx`, and each access of each thread is recorded. What the threads of
a warp do with the same instruction, each for the same time, is one access of the warp. It touches some sectors; it
needs as many as its distinct bytes fill. `--write` puts the table into ROOFLINE.md.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asgl_cuda import backends
from asgl_cuda.backends.neuron_kernels import SCALARS
from asgl_cuda.batch_norm import batch_norm_lif
from asgl_cuda.functional import lif
from tools.emulation import emulated
from tools.ptx import backend as ptx

from ..kernels.cuda_code import Kernel
from ..roofline import roofline

SECTOR_BYTES = 32
WARP_THREADS = 32
BACKEND = "traced"
# Members of the structures that kernels are given: the first have the type of x_seq, the others that of the state.
SEQUENCES = ("x_seq", "s_seq", "grad_s_seq", "grad_x_seq")
REAL_SEQUENCES = ("v_seq", "h_seq", "grad_v_seq", "grad_h_seq")
_BYTES = {scalar: dtype.itemsize for dtype, scalar in SCALARS.items()}


class Sectors(NamedTuple):
    """Sectors that accesses touch, and the fewest that could hold their bytes."""

    touched: int = 0
    fewest: int = 0

    def __str__(self) -> str:
        if self.touched == self.fewest:
            return str(self.touched)
        return f"{self.touched} / {self.fewest} = {self.touched / self.fewest:.2f}"


class Counts(NamedTuple):
    """The sectors of a kernel's accesses to sequences, and to all else."""

    loads: Sectors = Sectors()
    stores: Sectors = Sectors()
    other_loads: Sectors = Sectors()
    other_stores: Sectors = Sectors()


def of_warps(accesses: Iterable[ptx.Access]) -> Iterator[list[ptx.Access]]:
    """The accesses that a warp makes at once: the n-th time that each of its threads comes to an instruction."""
    times: Counter[Any] = Counter()
    together: dict[Any, list[ptx.Access]] = defaultdict(list)
    for access in accesses:
        thread = access.where, access.block, access.thread
        together[access.where, access.block, access.thread // WARP_THREADS, times[thread]].append(access)
        times[thread] += 1
    yield from together.values()


def sectors(of_warp: Iterable[ptx.Access]) -> Sectors:
    """Threads that read the same address need its bytes once."""
    size = {access.address: access.bytes for access in of_warp}
    touched = {byte // SECTOR_BYTES for first, count in size.items() for byte in (first, first + count - 1)}
    return Sectors(len(touched), -(-sum(size.values()) // SECTOR_BYTES))


def count(accesses: Iterable[ptx.Access], sequences: Iterable[range]) -> Counts:
    """`sequences`: where they lie."""
    found = [Sectors()] * len(Counts._fields)
    for of_warp in of_warps(accesses):
        first = of_warp[0]
        column = 2 * (not any(first.address in each for each in sequences)) + first.stores
        found[column] = Sectors(*map(sum, zip(found[column], sectors(of_warp), strict=True)))
    return Counts(*found)


def sequences_of(kernel: str, params: ctypes.Structure) -> list[range]:
    """Where the sequences lie that a kernel is given."""
    element = _BYTES[re.findall(r"<([\w:]+)", kernel)[0]]
    shape = params.tiles.shape if hasattr(params.tiles, "shape") else params.shape
    elements = math.prod(getattr(shape, name) for name, _ in shape._fields_)
    sizes = {**dict.fromkeys(SEQUENCES, element), **dict.fromkeys(REAL_SEQUENCES, max(element, 4))}
    begins = {name: getattr(params, name, None) for name in sizes}
    return [range(begin, begin + elements * sizes[name]) for name, begin in begins.items() if begin]


class TracingLauncher(ptx.Launcher):
    """Counts the accesses of those kernels that `is_wanted` names; the others run untraced."""

    def __init__(self, machine: ptx.Machine, multiprocessors: int, is_wanted: Callable[[Kernel], bool]) -> None:
        super().__init__(machine, multiprocessors)
        self._is_wanted = is_wanted
        self.found: list[tuple[Kernel, Counts]] = []

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: ctypes.Structure) -> None:
        name = Kernel.of_symbol(f"void {kernel}(")
        if not self._is_wanted(name):
            super().launch(device, kernel, blocks, threads, params)
            return
        self.machine.take_accesses()
        self.machine.traced = True
        try:
            super().launch(device, kernel, blocks, threads, params)
        finally:
            self.machine.traced = False
        # A generic address may be one of a parameter, which lies in no memory that has sectors.
        first = ctypes.addressof(params)
        own = range(first, first + ctypes.sizeof(params))
        accesses = [access for access in self.machine.take_accesses() if access.address not in own]
        sequences = sequences_of(kernel, params) if hasattr(params, "tiles") else []
        self.found.append((name, count(accesses, sequences)))


# ---- what is traced ----


class Case(NamedTuple):
    """Kernels of one step of training, by the begin of their names; `one`: a thread has one neuron."""

    kernels: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[Tensor, dict[str, Any]], Any]
    one: bool = False
    about: str = ""


class Row(NamedTuple):
    """A row of the table."""

    kernel: Kernel
    case: Case
    counts: Counts


# Where kernels read and write depends on neither surrogate nor reset: those are taken that the tests compile anyway.
_CHOSEN: dict[torch.dtype, dict[str, Any]] = {
    dtype: {"surrogate": surrogate, "v_reset": 0.0 if reset == "hard" else None}
    for dtype, surrogate, reset in reversed(ptx.CHOSEN)
}
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (2, 16, 8, 8)  # batch, channels, rows, columns
ODD_SIZES = (2, 15, 7, 7)  # their product is no multiple of four, and no step of x begins where a sector does
STEPS = (4, 8, 17)  # a length that kernels know, a part of a segment, and two segments, which have checkpoints


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
    """All sequences and states, two parameters of channels and two of the layer."""
    dtype, channels = x_seq.dtype, (x_seq.shape[2], 1, 1)
    return lif(
        x_seq, decay=_learned(dtype, *channels, value=0.5), v_threshold=_learned(dtype), width=_learned(dtype),
        input_gain=_learned(dtype, *channels), v_init=_learned(dtype, *x_seq.shape[1:], value=0.0),
        return_v_last=True, return_v_seq=True, return_h_seq=True, **options,
    )  # fmt: skip


def _decay(*shape: int) -> Callable[[Tensor, dict[str, Any]], Any]:
    return lambda x_seq, options: lif(x_seq, decay=_learned(x_seq.dtype, *shape, value=0.5), **options)


def cases(dtypes: Iterable[torch.dtype] = TYPES) -> Iterator[Case]:
    for dtype in dtypes:
        if dtype != torch.float64:
            for steps in STEPS:
                yield Case(("forward", "backward"), dtype, (steps, *SIZES), _plain)
            for steps in STEPS:
                by_channel = ("moments", "input gradient") if steps == STEPS[-1] else ()
                yield Case(("forward", "backward", *by_channel), dtype, (steps, *SIZES), _normalised)
            yield Case(("forward", "backward"), dtype, (STEPS[-1], *SIZES), _general)
        yield Case(("forward", "backward"), dtype, (STEPS[-1], *SIZES), _by_neuron)
        for sizes in (SIZES, ODD_SIZES):
            yield Case(("forward", "backward"), dtype, (STEPS[-1], *sizes), _general, one=True)
        yield Case(("moments", "input gradient"), dtype, (STEPS[-1], *ODD_SIZES), _normalised, one=True)
    if torch.float32 in dtypes:
        yield from cases_of_few()


def cases_of_few() -> Iterator[Case]:
    """What is done once a channel, or once a value of a parameter, where there are some slots and where many."""
    few, many = (4, 32, *SIZES[1:]), (1, 128, *SIZES[1:])
    for shape in (few, many):
        yield Case(("coefficients", "adjoint"), torch.float32, shape, _normalised)
        yield Case(("gradient sum",), torch.float32, shape, _plain, about="one value")
        yield Case(("gradient sum",), torch.float32, shape, _decay(*SIZES[1:2], 1, 1), about="a value a channel")
    yield Case(("gradient sum",), torch.float32, few, _decay(*SIZES[1:]), about="a value a neuron")


def trace(case: Case, machine: ptx.Machine) -> list[Row]:
    """Runs forward and backward."""
    multiprocessors = emulated.LARGE if case.one else emulated.TINY
    launcher = TracingLauncher(machine, multiprocessors, lambda kernel: kernel.kind.startswith(case.kernels))
    operators = backends.Operators(**launcher.operators())
    backends.BACKENDS[BACKEND] = backends.Backend(("cpu",), operators, lambda: None)
    try:
        x_seq = torch.zeros(case.shape, dtype=case.dtype, requires_grad=True)
        output = case.compute(x_seq, {"analog_prob": 0.25, "backend": BACKEND, **_CHOSEN[case.dtype]})
        outputs = [output] if isinstance(output, Tensor) else output
        torch.autograd.backward(outputs, [torch.zeros_like(each) for each in outputs])
    finally:
        del backends.BACKENDS[BACKEND]
    return [Row(kernel, case, counts) for kernel, counts in launcher.found]


# ---- the section of the page ----

INTRODUCTION = f"""\
{roofline.ACCESSES}

A sector is {SECTOR_BYTES} bytes of memory that begin at a multiple of {SECTOR_BYTES}: caches and memory move no
less. What the {WARP_THREADS} threads of a warp load or store by one instruction is one access, and costs the
sectors that it touches. The fewest possible are those that its bytes would fill, side by side from the begin of a
sector; bytes that several threads read count once. Both are summed over a kernel's accesses. A cell has one number
where they are equal, and then no access could have done with less; else it has touched / fewest = ratio.

`python -m tools.ptx.accesses --write` counts them: it runs the PTX that NVRTC makes for {ptx.ARCHITECTURE} on the
CPU, and records each access of each thread to global memory. Sequences are x, spikes, potentials and their
gradients, time first. Others are parameters, their partial sums, the state of the noise, states of neurons,
checkpoints and moments. Plain neurons learn their width, normalised ones also gain and bias of each channel; the
rest have all sequences and states, and learn decay and gain of each channel, threshold and width. Surrogate and
reset are those that the tests of PTX compile: the former changes no access, and a soft reset reads the threshold as
its amount.

Where x has 15 x 7 x 7 neurons a step does not begin where a sector does, and each access of a warp reaches into a
sector of the next: the cache then has it for the neighbour. Moments load the first value of each thread by itself,
from sectors that they load next in whole. Sums of gradients read the slots of neighbouring elements side by
side, which begin where a sector does not; stores of partial sums by neuron do so, too. Moments are records of three
float64, and a thread reads or writes one record.

It shows the pattern of each access by itself: that neighbouring threads reach neighbouring memory. It can't show
which sectors a cache still holds from another access or another warp, and so not how many come from memory; nor in
which order warps run, nor what ptxas splits, joins or moves. The n-th time that a thread comes to an instruction
counts as one access with the n-th time of the others in its warp, though they may come there apart.
"""


def tables(rows: Iterable[Row]) -> dict[str, str]:
    """A table for each type."""
    header = ("", "sequence", "loads", "stores", "other loads", "other stores")
    lines: dict[str, list[list[str]]] = defaultdict(list)
    for kernel, case, counts in rows:
        size = " x ".join(map(str, case.shape))
        about = f", {case.about}" if case.about else ""
        lines[kernel.dtype].append([f"{kernel.kind}{about}", size, *map(str, counts)])
    return {dtype: roofline.table(header, those) for dtype, those in lines.items()}


def section(rows: Iterable[Row]) -> str:
    parts = [INTRODUCTION, *(f"### {dtype}\n\n{table}" for dtype, table in tables(rows).items())]
    return "\n".join(parts)


def main() -> None:
    """Prints the section, or writes it."""
    parser = argparse.ArgumentParser(prog="python -m tools.ptx.accesses", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write it to csrc/{roofline.PAGE.name}")
    arguments = parser.parse_args()
    reason = ptx.missing()
    if reason is not None:
        parser.error(reason)
    machine = ptx.Machine()
    text = section(row for case in cases() for row in trace(case, machine))
    if arguments.write:
        before, _ = roofline.parts_of(roofline.PAGE.read_text())
        roofline.PAGE.write_text(f"{before}\n{text}")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
