"""Predicts the bound of the uniform CUDA kernels, from bytes and from instructions counted in the disassembly.

An instruction counts if it lies on the longest way through the control-flow graph, less the blocks that a time-first
call never enters: calls of division subroutines, and integer division, which only batch-first layouts and the kernels
that go by channel need. Choices such as noise or none, a full or a last segment, then fall on the side that costs more.
No GPU is needed.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import networkx as nx

from .common import parser_of, write_json
from .cuda_code import CSRC, Disassembler, Instruction, Kernel, Nvcc, kernel_of, usages

PAGE = CSRC / "ROOFLINE.md"
ACCESSES = "## Sectors that the warps touch"  # heads what tests/ptx_accesses.py writes, the rest of the page
LANES = 4  # neurons a thread
CHECKPOINT_STEPS = 16
STEPS = (4, 16, 128)
ROWS = 16  # of four columns, in a thread of a kernel that goes by channel
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
    """A card: bytes a second, multiprocessors, Hz; float additions or multiplications a cycle and multiprocessor."""

    name: str
    architecture: int
    bandwidth: float
    multiprocessors: int
    clock: float
    float_lanes: int


CARDS = (
    Card("H100 SXM", 90, 3.35e12, 132, 1.755e9, 128),
    Card("H200 SXM", 90, 4.8e12, 132, 1.755e9, 128),
    Card("B200 SXM", 100, 7.7e12, 148, 1.86e9, 128),
    Card("A100 40 GB", 80, 1.56e12, 108, 1.41e9, 64),
)
# These are the same on all cards, of 128 threads whose instructions start in a cycle.
MULTIPLY_LANES = ALU_LANES = 64
SPECIAL_LANES = 16
ISSUE_LANES = 128

# The kernels, and how many elements each moves for one of x.
MOVED = {
    "forward": 2, "backward": 3, "moments": 1, "forward normalised": 2, "backward normalised": 3, "input gradient": 3
}  # fmt: skip
OF_NEURONS = ("forward", "backward")
OF_NORMALISATION = ("moments", "forward normalised", "backward normalised", "input gradient")
BY_CHANNEL = ("moments", "input gradient")

# Instantiating the launchers names no kernel, and brings just those that are called.
SOURCE = """\
#include "cuda/choose.cuh"
namespace asgl::cuda {{
{}
}}
"""
OF_MODEL = "template cudaError_t launch(LIF<Surrogate::kRectangle, true>, const {}<{}>&, cudaStream_t);"
OF_CHANNELS = "template cudaError_t launch(const {}<{}>&, cudaStream_t);"
INSTANTIATIONS = {
    "ForwardParams": OF_MODEL, "BackwardParams": OF_MODEL,
    "MomentsParams": OF_CHANNELS, "InputGradientParams": OF_CHANNELS,
}  # fmt: skip


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
    def calls(self) -> bool:
        return any(i.name == "CALL" and not is_jump(i) for i in self.instructions)

    @property
    def divides(self) -> bool:
        # Only division rounds an integer up when it makes it a float.
        return any(re.match(r"I2F\.U\d+\.RP", i.opcode) for i in self.instructions)


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
    """The graph of a kernel, and in it the loop that holds the most instructions.

    In a kernel that goes by channel the inner loop is taken, if there is one, and integer division counts.
    """

    def __init__(self, code: Sequence[Instruction], by_channel: bool = False) -> None:
        self._blocks = blocks_of(code)
        entry = code[0].address
        graph = nx.DiGraph((a, b) for a, block in self._blocks.items() for b in block.successors)
        slow = [a for a in graph if self._blocks[a].calls or (self._blocks[a].divides and not by_channel)]
        graph.remove_nodes_from(slow)
        graph = graph.subgraph({entry} | nx.descendants(graph, entry))
        self.loop = max(self._loops(graph), key=self._size)
        self.head = self._head(graph)
        if by_channel:
            once = nx.DiGraph(graph.subgraph(self.loop))
            once.remove_edges_from(list(once.in_edges(self.head)))
            self.loop = max(self._loops(once), key=self._size, default=self.loop)
            self.head = self._head(graph)
        exits = {b for a, b in graph.edges if a in self.loop and b not in self.loop}
        before = graph.subgraph((nx.ancestors(graph, self.head) - self.loop) | {entry})
        after = graph.subgraph(set().union(exits, *(nx.descendants(graph, node) for node in exits)) - self.loop)
        self.prologue = self._longest(before, entry)
        self.body = self._longest(graph.subgraph(self.loop), self.head)
        self.epilogue = self._longest(after, *exits)

    def _loops(self, graph: nx.DiGraph) -> list[set[int]]:
        components = nx.strongly_connected_components(graph)
        return [nodes for nodes in components if len(nodes) > 1 or any(graph.has_edge(node, node) for node in nodes)]

    def _head(self, graph: nx.DiGraph) -> int:
        return min(b for a, b in graph.edges if b in self.loop and a not in self.loop)

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


def name_of(kernel: Kernel) -> str:
    return kernel.kind.split(",")[0].removesuffix(" plain")


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
    flow = Flow(code, name_of(kernel) in BY_CHANNEL)
    bits = 8 * LANES * ELEMENT_BYTES[kernel.dtype]
    # Each step or row has one access: forward and moments load x alone, the others store dx alone.
    verb = "LDG" if kernel.kind.startswith(("forward", "moments")) else "STG"
    steps = sum(i.name == verb and i.bits == bits for i in flow.body)
    prologue, body, epilogue = (Counter(map(class_of, part)) for part in (flow.prologue, flow.body, flow.epilogue))
    return Count(prologue, body, epilogue, steps)


def uniform_kernels(nvcc: Nvcc, disassembler: Disassembler, architecture: int) -> Iterator[tuple[Kernel, Count]]:
    instantiations = [
        text.format(params, scalar) for params, text in INSTANTIATIONS.items() for scalar in ("float", "BFloat16")
    ]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = directory / "uniform.cu"
        source.write_text(SOURCE.format("\n".join(instantiations)))
        nvcc.to_ptx(source, directory)
        cubin, log = nvcc.to_cubin(directory, source.stem, architecture)
        chosen = {kernel_of(symbol): symbol for symbol in usages(log) if is_uniform(kernel_of(symbol))}
        codes = disassembler.instructions(cubin, chosen.values())
        for kernel, symbol in chosen.items():
            yield kernel, count(kernel, codes[symbol])


def is_uniform(kernel: Kernel) -> bool:
    # The general kernels have the names of the plain ones, less a word.
    of_neurons = "plain" in kernel.kind or "normalised" in kernel.kind
    return of_neurons or (kernel.kind.endswith("4 columns") and kernel.dtype in ELEMENT_BYTES)


# ---- prediction ----


class Prediction(NamedTuple):
    """The prediction for a kernel at one length on one card; times are picoseconds an element of the whole card.

    A kernel that goes by channel does the same whatever the length; its `steps` are 0.
    """

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
    name = name_of(kernel)
    floor_bytes = MOVED[name] * ELEMENT_BYTES[kernel.dtype]
    checkpoints = 4 * (-(-steps // CHECKPOINT_STEPS) - 1) / steps if steps else 0
    instructions = counted.per_element(steps or ROWS)
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
        kernel=name,
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
    architectures = dict.fromkeys(card.architecture for card in CARDS)
    found = {architecture: list(uniform_kernels(nvcc, disassembler, architecture)) for architecture in architectures}
    for card in CARDS:
        for kernel, counted in found[card.architecture]:
            for steps in (0,) if name_of(kernel) in BY_CHANNEL else STEPS:
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
{lanes} float additions and multiplications a cycle, of which {multiply} may be
`IMAD`; its ALU pipe takes {alu} comparisons, selections, logic and integer additions (CUDA C++ Programming Guide,
throughput of native arithmetic instructions). The longest of memory, issue and busiest pipe is the time: perfect
overlap is assumed.

`batch_norm_lif` in training is four passes: moments reads x; forward reads x and writes s; backward reads x and the
gradient and writes the gradient of the normalised input, times its gain; the input gradient reads that and x and writes
dx in its place. That is {moved} elements, {moved_bytes} bytes in float32, and the floor is a copy that moves as many.
Forward and backward are then the normalised kernels (RESOURCES.md). Backward loads x twice, the second time from L1 or
L2, which it has just come through: the bytes count it once. Moments and the input gradient are counted for the {rows}
rows of four columns that a thread has, with the integer division by which it finds them.
"""

CAVEATS = """\
## What this leaves out

- Latency: whether enough loads are under way to keep the memory busy depends on the registers (RESOURCES.md) and is not
  modelled. Neither are launch, tail of the last wave, shared memory, and instruction-cache misses.
- The clock: 1.755 GHz on H100 and H200, below the 1.98 GHz that their 67 TFLOP/s of float32 come to; 1.86 GHz on the
  B200, below the 1.98 GHz of its 75 TFLOP/s; 1.41 GHz on the A100. A card at its power limit runs slower, its memory
  does not, so that instructions bind sooner. `python -m benchmarks.gpu_check` takes the clock and the bandwidth that it
  measures.
- Bandwidth is that of the data sheet; no kernel quite reaches it, the multiply neither. Where memory binds that
  cancels in the ratio; where instructions do the true ratio is lower.
- What batch normalisation does once for each channel: coefficients, adjoint, the last sums of the gradients of gain and
  bias. Of the seven rounds in which a block joins its moments two count, as many as a warp takes part in on average.
  Double precision counts at the rate of special functions, and is faster on all these cards. Whether the second load of
  x hits depends on the cache: if none did, backward would move a third more.
- `IMAD.WIDE` counts as one `IMAD`; the guide does not tell them apart. Uniform instructions count only as issued.
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines) + "\n"


def row_of(p: Prediction) -> tuple[str, ...]:
    return (
        f"{p.kernel} {p.dtype}", str(p.steps or "any"), f"{p.bytes:.2f}", f"{sum(p.instructions.values()):.1f}",
        f"{p.memory:.2f}", f"{p.issue:.2f}", f"{p.pipes:.2f} {p.busiest}", p.binds, f"{p.ratio:.2f}",
    )  # fmt: skip


def row_of_classes(p: Prediction) -> tuple[str, ...]:
    return f"{p.kernel} {p.dtype}", str(p.steps), *(f"{p.instructions[name]:.1f}" for name in CLASSES)


def row_of_sum(those: Sequence[Prediction], dtype: str, steps: int) -> tuple[str, ...]:
    def total(get: Callable[[Prediction], float]) -> float:
        return sum(get(p) for p in those)

    return (
        f"all four {dtype}", str(steps), f"{total(lambda p: p.bytes):.2f}",
        f"{total(lambda p: sum(p.instructions.values())):.1f}", f"{total(lambda p: p.memory):.2f}",
        f"{total(lambda p: p.issue):.2f}", "", "", f"{total(lambda p: p.time) / total(lambda p: p.floor):.2f}",
    )  # fmt: skip


def rows_of_normalisation(found: Sequence[Prediction]) -> Iterator[tuple[str, ...]]:
    """A row for each kernel, and for each length one for the four together."""
    for dtype in ELEMENT_BYTES:
        mine = [p for p in found if p.dtype == dtype and p.kernel in OF_NORMALISATION]
        for p in sorted(mine, key=lambda p: (OF_NORMALISATION.index(p.kernel), p.steps)):
            yield row_of(p)
        for steps in STEPS:
            yield row_of_sum([p for p in mine if p.steps in (0, steps)], dtype, steps)


COLUMNS = ("", "T", "bytes", "instructions", "memory", "issue", "busiest pipe", "binds")


def page(found: Sequence[Prediction], version: str) -> str:
    parts = [
        HEAD.format(
            version=version,
            checkpoint=CHECKPOINT_STEPS,
            multiply=MULTIPLY_LANES,
            alu=ALU_LANES,
            rows=ROWS,
            moved=sum(MOVED[name] for name in OF_NORMALISATION),
            moved_bytes=sum(MOVED[name] for name in OF_NORMALISATION) * ELEMENT_BYTES["float32"],
            lanes=" or ".join(
                f"{lanes} ({', '.join(card.name.split()[0] for card in CARDS if card.float_lanes == lanes)})"
                for lanes in dict.fromkeys(card.float_lanes for card in CARDS)
            ),
        )
    ]
    for card in CARDS:
        of_card = [p for p in found if p.card == card.name]
        mine = sorted(
            (p for p in of_card if p.kernel in OF_NEURONS),
            key=lambda p: (OF_NEURONS.index(p.kernel), p.dtype != "float32", p.steps),
        )
        parts.append(
            f"## {card.name}\n\n{card.bandwidth / 1e12:g} TB/s, {card.multiprocessors} multiprocessors at "
            f"{card.clock / 1e9:g} GHz, sm_{card.architecture}. Times are picoseconds an element, of the whole card.\n"
        )
        parts.append(table((*COLUMNS, "times the multiply"), map(row_of, mine)))
        if card == next(each for each in CARDS if each.architecture == card.architecture):
            parts.append("Instructions an element, by class:\n")
            parts.append(table(("", "T", *CLASSES), map(row_of_classes, mine)))
        parts.append("Batch normalisation in front of the neuron:\n")
        parts.append(table((*COLUMNS, "times the copy"), rows_of_normalisation(of_card)))
    parts.append(CAVEATS)
    return "\n".join(parts)


def parts_of(page: str) -> tuple[str, str]:
    """What is written here, and what tests/ptx_accesses.py writes; a blank line stands between."""
    before, heading, after = page.partition(ACCESSES)
    return before.rstrip("\n") + "\n", heading + after


def write(text: str) -> None:
    PAGE.write_text(f"{text}\n{parts_of(PAGE.read_text())[1]}")


def main() -> None:
    """Prints the page, or writes it."""
    parser = parser_of("roofline", __doc__, "json")
    parser.add_argument("--write", action="store_true", help=f"write csrc/{PAGE.name} rather than print it")
    arguments = parser.parse_args()
    nvcc, disassembler = Nvcc.find(), Disassembler.find()
    if nvcc is None or disassembler is None:
        parser.error("needs nvcc, cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    found = list(predictions(nvcc, disassembler))
    text = page(found, nvcc.version)
    if arguments.write:
        write(text)
    else:
        print(text, end="")
    write_json(arguments.json, [{**p._asdict(), "binds": p.binds, "ratio": p.ratio} for p in found])


if __name__ == "__main__":
    main()
