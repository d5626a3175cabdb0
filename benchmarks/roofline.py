"""Predicts what bounds the hot CUDA kernels, from bytes and from instructions counted in the disassembly.

An instruction counts if it lies on the longest way through the control-flow graph, less the blocks that a time-first
call never enters: calls of division subroutines, and 64-bit integer division, which only batch-first layouts need.
Choices such as noise or none, a full or a last segment, then fall on the side that costs more. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import networkx as nx

from benchmarks.cuda_code import CSRC, Disassembler, Instruction, Kernel, Nvcc, kernel_of, usages

PAGE = CSRC / "ROOFLINE.md"
LANES = 4  # neurons a thread
CHECKPOINT_STEPS = 16
STEPS = (4, 16, 128)
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}

FLOAT_ARITHMETIC, FLOAT_CHOICE, MULTIPLY, INTEGER = "float add, multiply", "float compare, select", "IMAD", "integer"
SPECIAL, MEMORY, CONTROL, UNIFORM = "special", "memory", "control", "uniform"
CLASSES = (FLOAT_ARITHMETIC, FLOAT_CHOICE, MULTIPLY, INTEGER, SPECIAL, MEMORY, CONTROL, UNIFORM)
_CLASS_PATTERNS = {
    UNIFORM: r"U[A-Z]|R2UR|S2UR|CS2UR|VOTEU",
    FLOAT_ARITHMETIC: r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2",
    FLOAT_CHOICE: r"FSEL|FSET|FSETP|FMNMX|FCHK|F2FP",
    MULTIPLY: r"IMAD|IMUL",
    MEMORY: r"(LD|ST)([GSLC]|CU)?\d*$|RED|ATOM|CCTL",
    CONTROL: r"BRA|BRX|EXIT|CALL|RET|BSSY|BSYNC|BREAK|BAR|WARPSYNC|NOP|DEPBAR|ERRBAR|MEMBAR|YIELD|BMOV",
    SPECIAL: r"MUFU|[FI]2[FI]$|SHFL|S2R|CS2R|POPC|FLO|D[A-Z]+",
}


class Card(NamedTuple):
    """Bytes a second, multiprocessors, Hz; float additions or multiplications a cycle and multiprocessor."""

    name: str
    architecture: int
    bandwidth: float
    multiprocessors: int
    clock: float
    float_lanes: int


CARDS = (
    Card("H100 SXM", 90, 3.35e12, 132, 1.755e9, 128),
    Card("A100 40 GB", 80, 1.56e12, 108, 1.41e9, 64),
)
# The same on both, of 128 threads whose instructions start in a cycle.
MULTIPLY_LANES = ALU_LANES = 64
SPECIAL_LANES = 16
ISSUE_LANES = 128

# Instantiating the launchers names no kernel, and brings just those that are called.
SOURCE = """\
#include "lif_cuda.cuh"
namespace asgl::cuda {{
{}
}}
"""
INSTANTIATION = (
    "template cudaError_t launch_{way}<Surrogate::kRectangle, true, {scalar}>(const {params}<{scalar}>&, cudaStream_t);"
)


def class_of(instruction: Instruction) -> str:
    return next((name for name, pattern in _CLASS_PATTERNS.items() if re.match(pattern, instruction.name)), INTEGER)


# ---- the control-flow graph ----


def is_jump(instruction: Instruction) -> bool:
    """A branch, or the guarded call that never returns by which ptxas may leave a loop on sm_80."""
    return instruction.name == "BRA" or (instruction.name == "CALL" and bool(instruction.guard))


class Block(NamedTuple):
    """Instructions that run one after the other."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]  # their addresses

    @property
    def is_slow(self) -> bool:
        # Only division rounds an integer up when it makes it a float.
        return any(
            (i.name == "CALL" and not is_jump(i)) or re.match(r"I2F\.U\d+\.RP", i.opcode) for i in self.instructions
        )


def blocks_of(code: Sequence[Instruction]) -> dict[int, Block]:
    targets: dict[int, int] = {}
    for i in code:
        if i.name == "BRX":
            raise NotImplementedError("an indirect branch")
        if is_jump(i):
            targets[i.address] = int(re.findall(r"0x([0-9a-f]+)", i.operands)[-1], 16)
    following = {one.address: other.address for one, other in pairwise(code)}
    ends = {i.address for i in code if is_jump(i) or i.name in ("EXIT", "RET")}
    leaders = {code[0].address, *targets.values(), *(following[end] for end in ends if end in following)}
    blocks: dict[int, Block] = {}
    start: list[Instruction] = []
    for i in code:
        start.append(i)
        next_address = following.get(i.address)
        if next_address is not None and next_address not in leaders:
            continue
        # `@P0 BRA`, `BRA.U UP0, ...` and the like may also go on.
        conditional = bool(i.guard) or (i.name == "BRA" and "," in i.operands)
        successors = [targets[i.address]] if is_jump(i) else []
        if next_address is not None and (i.address not in ends or conditional):
            successors.append(next_address)
        blocks[start[0].address] = Block(tuple(start), tuple(successors))
        start = []
    return blocks


class Flow:
    """The graph of a kernel, and in it the loop that holds the most instructions."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self._blocks = blocks_of(code)
        entry = code[0].address
        graph = nx.DiGraph((a, b) for a, block in self._blocks.items() for b in block.successors)
        slow = [address for address in graph if self._blocks[address].is_slow]
        graph.remove_nodes_from(slow)
        graph = graph.subgraph({entry} | nx.descendants(graph, entry))
        loops = [nodes for nodes in nx.strongly_connected_components(graph) if len(nodes) > 1 or self._is_loop(nodes)]
        self.hot = max(loops, key=self._size)
        self.head = min(b for a, b in graph.edges if b in self.hot and a not in self.hot)
        exits = {b for a, b in graph.edges if a in self.hot and b not in self.hot}
        before = graph.subgraph((nx.ancestors(graph, self.head) - self.hot) | {entry})
        after = graph.subgraph(set().union(exits, *(nx.descendants(graph, node) for node in exits)) - self.hot)
        self.prologue = self._longest(before, entry)
        self.body = self._longest(graph.subgraph(self.hot), self.head)
        self.epilogue = self._longest(after, *exits)

    def _is_loop(self, nodes: set[int]) -> bool:
        return any(node in self._blocks[node].successors for node in nodes)

    def _size(self, nodes: Iterable[int]) -> int:
        return sum(len(self._blocks[node].instructions) for node in nodes)

    def _longest(self, graph: nx.DiGraph, *starts: int) -> list[Instruction]:
        """The instructions on the longest way from a start; a loop on it counts once."""
        acyclic = nx.DiGraph()
        root = -1
        acyclic.add_node(root)
        on_path: set[int] = set()
        seen: set[int] = set()

        def visit(node: int) -> None:
            seen.add(node)
            on_path.add(node)
            for successor in graph.successors(node):
                if successor not in on_path:  # else an edge back
                    acyclic.add_edge(node, successor, weight=self._size([successor]))
                if successor not in seen:
                    visit(successor)
            on_path.remove(node)

        for start in starts:
            acyclic.add_edge(root, start, weight=self._size([start]))
            if start not in seen:
                visit(start)
        path = nx.dag_longest_path(acyclic)[1:]
        return [instruction for node in path for instruction in self._blocks[node].instructions]


# ---- instructions an element ----


class Count(NamedTuple):
    """Instructions of one thread: before the loop, in one round of so many steps, after it."""

    prologue: Counter[str]
    body: Counter[str]
    epilogue: Counter[str]
    steps: int

    def per_element(self, steps: int) -> dict[str, float]:
        rounds = -(-steps // self.steps)
        total = Counter(self.prologue)
        for part in (self.epilogue, *[self.body] * rounds):
            total.update(part)
        return {name: total[name] / (steps * LANES) for name in CLASSES}


def count(kernel: Kernel, code: Sequence[Instruction]) -> Count:
    flow = Flow(code)
    bits = 8 * LANES * ELEMENT_BYTES[kernel.dtype]
    # One access a step. Loads of forward are of x alone, and stores of backward of dx alone, in their loops.
    verb = "LDG" if kernel.kind.startswith("forward") else "STG"
    steps = sum(i.name == verb and i.bits == bits for i in flow.body)
    prologue, body, epilogue = (Counter(map(class_of, part)) for part in (flow.prologue, flow.body, flow.epilogue))
    return Count(prologue, body, epilogue, steps)


def hot_kernels(nvcc: Nvcc, disassembler: Disassembler, architecture: int) -> Iterator[tuple[Kernel, Count]]:
    instantiations = [
        INSTANTIATION.format(way=way, params=params, scalar=scalar)
        for way, params in (("forward", "ForwardParams"), ("backward", "BackwardParams"))
        for scalar in ("float", "BFloat16")
    ]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = directory / "hot.cu"
        source.write_text(SOURCE.format("\n".join(instantiations)))
        nvcc.to_ptx(source, directory)
        cubin, log = nvcc.to_cubin(directory, source.stem, architecture)
        hot = {kernel_of(symbol): symbol for symbol in usages(log) if "plain" in kernel_of(symbol).kind}
        codes = disassembler.instructions(cubin, hot.values())
        for kernel in sorted(hot, key=lambda k: (not k.kind.startswith("forward"), len(k.kind), k.kind, k.dtype)):
            yield kernel, count(kernel, codes[hot[kernel]])


# ---- prediction ----


class Prediction(NamedTuple):
    """Of one kernel at one length on one card; times in picoseconds an element, the card as a whole."""

    card: str
    kernel: str
    dtype: str
    steps: int
    bytes: float
    instructions: dict[str, float]
    memory: float
    issue: float
    pipes: float  # the busiest
    busiest: str
    floor: float  # the multiply

    @property
    def time(self) -> float:
        return max(self.memory, self.issue, self.pipes)

    @property
    def binds(self) -> str:
        return {self.memory: "memory", self.issue: "issue", self.pipes: self.busiest}[self.time]

    @property
    def ratio(self) -> float:
        return self.time / self.floor


def predict(card: Card, kernel: Kernel, counted: Count, steps: int) -> Prediction:
    way = kernel.kind.split()[0]
    size = ELEMENT_BYTES[kernel.dtype]
    floor_bytes = {"forward": 2, "backward": 3}[way] * size
    checkpoints = 4 * (-(-steps // CHECKPOINT_STEPS) - 1) / steps
    instructions = counted.per_element(steps)
    pipes = {
        "FMA": (instructions[FLOAT_ARITHMETIC] + instructions[MULTIPLY]) / card.float_lanes,
        "IMAD": instructions[MULTIPLY] / MULTIPLY_LANES,
        "ALU": (instructions[FLOAT_CHOICE] + instructions[INTEGER]) / ALU_LANES,
        "special": instructions[SPECIAL] / SPECIAL_LANES,
    }
    busiest = max(pipes, key=lambda name: pipes[name])
    cycle = 1e12 / (card.multiprocessors * card.clock)
    return Prediction(
        card=card.name,
        kernel=way,
        dtype=kernel.dtype,
        steps=steps,
        bytes=floor_bytes + checkpoints,
        instructions=instructions,
        memory=1e12 * (floor_bytes + checkpoints) / card.bandwidth,
        issue=cycle * sum(instructions.values()) / ISSUE_LANES,
        pipes=cycle * pipes[busiest],
        busiest=busiest,
        floor=1e12 * floor_bytes / card.bandwidth,
    )


def is_launched(kernel: Kernel, steps: int) -> bool:
    """Whether the launchers take this kernel for so many steps."""
    segment = re.search(r"K = (\d+)", kernel.kind)
    return segment is None or int(segment[1]) == min(k for k in (4, 8, 16) if k >= min(steps, 16))


def predictions(nvcc: Nvcc, disassembler: Disassembler) -> Iterator[Prediction]:
    for card in CARDS:
        for kernel, counted in hot_kernels(nvcc, disassembler, card.architecture):
            for steps in STEPS:
                if is_launched(kernel, steps):
                    yield predict(card, kernel, counted, steps)


# ---- the page ----

HEAD = """\
# What should bound the CUDA kernels

**A prediction from the disassembly. No GPU has measured it**; it is what a measurement will be held against. Made by
`python -m benchmarks.roofline --write` with nvcc {version}; no number in a table is written by hand.

The kernels are those of the common case: rectangle, hard reset, uniform parameters, noise, gradients of x and width, a
thread for four neurons, time first. An element is one neuron at one step.

Bytes: forward reads x and writes s, backward reads x and the gradient and writes dx; both also move a potential of 4
bytes at every {checkpoint}th step but the last. The floor, `x * 2` and `x * g`, moves all but those, equally fast.

Instructions: those on the longest way through the control-flow graph of the SASS, from the entry to the loop over the
segments, as often as T needs through the loop, and on to the exit, divided by 4 T. Left out are the calls of division
subroutines and the integer division that only batch-first layouts need. Where a branch has two sides the longer counts:
noise is drawn, segments are full, and forward keeps a potential in each round. So the count is, by a little, too high.

Time: a multiprocessor starts four warp instructions a cycle, those of 128 threads. Its FMA pipes take
{lanes} float additions and multiplications a cycle, of which {multiply} may be `IMAD`; its ALU pipe takes {alu}
comparisons, selections, logic and integer additions (CUDA C++ Programming Guide, throughput of native arithmetic
instructions). The longest of memory, issue and busiest pipe is the time: perfect overlap is assumed.
"""

CAVEATS = """\
## What this leaves out

- Latency: whether enough loads are under way to keep the memory busy depends on the registers (RESOURCES.md) and is not
  modelled. Neither are launch, tail of the last wave, shared memory, and instruction-cache misses.
- The clock: 1.755 GHz on the H100, below the 1.98 GHz that its 67 TFLOP/s of float32 come to; 1.41 GHz on the A100.
  A card at its power limit runs slower, its memory does not, so that instructions bind sooner.
- Bandwidth is that of the data sheet; no kernel quite reaches it, the multiply neither. Where memory binds that
  cancels in the ratio; where instructions do the true ratio is lower.
- `IMAD.WIDE` counts as one `IMAD`; the guide does not tell them apart. Uniform instructions count only as issued.
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines) + "\n"


def page(found: Sequence[Prediction], version: str) -> str:
    parts = [
        HEAD.format(
            version=version,
            checkpoint=CHECKPOINT_STEPS,
            multiply=MULTIPLY_LANES,
            alu=ALU_LANES,
            lanes=" or ".join(f"{card.float_lanes} ({card.name.split()[0]})" for card in CARDS),
        )
    ]
    for card in CARDS:
        mine = sorted(
            (p for p in found if p.card == card.name),
            key=lambda p: (p.kernel == "backward", p.dtype != "float32", p.steps),
        )
        parts.append(
            f"## {card.name}\n\n{card.bandwidth / 1e12:g} TB/s, {card.multiprocessors} multiprocessors at "
            f"{card.clock / 1e9:g} GHz, sm_{card.architecture}. Times are picoseconds an element, of the whole card.\n"
        )
        parts.append(
            table(
                ("", "T", "bytes", "instructions", "memory", "issue", "busiest pipe", "binds", "times the multiply"),
                (
                    (
                        f"{p.kernel} {p.dtype}",
                        str(p.steps),
                        f"{p.bytes:.2f}",
                        f"{sum(p.instructions.values()):.1f}",
                        f"{p.memory:.2f}",
                        f"{p.issue:.2f}",
                        f"{p.pipes:.2f} {p.busiest}",
                        p.binds,
                        f"{p.ratio:.2f}",
                    )
                    for p in mine
                ),
            )
        )
        parts.append("Instructions an element, by class:\n")
        parts.append(
            table(
                ("", "T", *CLASSES),
                (
                    (f"{p.kernel} {p.dtype}", str(p.steps), *(f"{p.instructions[name]:.1f}" for name in CLASSES))
                    for p in mine
                ),
            )
        )
    parts.append(CAVEATS)
    return "\n".join(parts)


def main() -> None:
    """Prints the page, or writes it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write csrc/{PAGE.name} rather than print it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    arguments = parser.parse_args()
    nvcc, disassembler = Nvcc.find(), Disassembler.find()
    if nvcc is None or disassembler is None:
        parser.error("needs nvcc, cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    found = list(predictions(nvcc, disassembler))
    text = page(found, nvcc.version)
    if arguments.write:
        PAGE.write_text(text)
    else:
        print(text, end="")
    if arguments.json:
        rows = [{**p._asdict(), "binds": p.binds, "ratio": p.ratio} for p in found]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
