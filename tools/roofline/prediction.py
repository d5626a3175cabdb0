"""The bound of a CUDA kernel on a card, from the bytes that a call moves and the instructions that are issued."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from ctypes import Structure
from typing import Any, NamedTuple

import torch

from ..kernels.cuda_code import Instruction, Kernel, Usage
from ..kernels.structures import constant, structure
from .recorded_calls import BLOCK, COMMON, RESIDUAL_BLOCK, Launch
from .sass_run import Program, indices

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
REAL_BYTES = 4  # parameters, states and potentials, for both element types
WARP = 32

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
    """Bytes per second, multiprocessors, Hz; float additions or multiplications per cycle and multiprocessor."""

    name: str
    architecture: int
    bandwidth: float
    multiprocessors: int
    clock: float
    float_lanes: int
    shared_bytes: int  # per multiprocessor, for all resident blocks

    @property
    def cycles(self) -> float:
        """Cycles per second, all multiprocessors together."""
        return self.multiprocessors * self.clock


CARDS = (
    Card("H100 SXM", 90, 3.35e12, 132, 1.755e9, 128, 228 * 1024),
    Card("H200 SXM", 90, 4.8e12, 132, 1.755e9, 128, 228 * 1024),
    Card("B200 SXM", 100, 7.7e12, 148, 1.86e9, 128, 228 * 1024),
    Card("A100 40 GB", 80, 1.56e12, 108, 1.41e9, 64, 164 * 1024),
)
# The same on all cards: lanes a cycle and multiprocessor, which issues for 128 threads.
MULTIPLY_LANES = ALU_LANES = 64
SPECIAL_LANES = 16
ISSUE_LANES = 128
# Of a multiprocessor, on all cards.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
RESERVED_SHARED_BYTES = 1024  # per block, beyond its own shared memory

# Kernels of the common case, with elements moved for each element of x.
MOVED = {
    "forward": 2, "backward": 3, "moments": 1, "forward normalised": 2, "backward normalised": 3, "input gradient": 3,
    "forward by neuron": 2, "backward by neuron": 3,
    "forward normalised with residual": 3, "backward normalised with residual": 4, "input gradient with residual": 3,
}  # fmt: skip
NEURON_KERNELS = ("forward", "backward")
NORMALISATION_KERNELS = ("moments", "forward normalised", "backward normalised", "input gradient")
RESIDUAL_KERNELS = ("moments", *(f"{name} with residual" for name in NORMALISATION_KERNELS[1:]))
BY_CHANNEL = ("moments", "input gradient", "input gradient with residual")

_STRUCTURES = {
    "lif_forward": "ForwardParams", "lif_backward": "BackwardParams", "batch_moments": "MomentsParams",
    "batch_norm_input_gradient": "InputGradientParams", "gradient_sum": "GradientSum",
}  # fmt: skip


def class_of(instruction: Instruction) -> str:
    return next((name for name, pattern in _CLASS_PATTERNS.items() if re.match(pattern, instruction.name)), INTEGER)


def name_of(kernel: Kernel) -> str:
    return kernel.kind.split(",")[0].removesuffix(" plain")


def repeats_in(view: Structure, tile: int) -> bool:
    """ParameterView::repeats_in of csrc: a tile stores one sum for each value."""
    return bool(view.inner == 1 and 2 * view.count <= tile)


def kernel_of_launch(launch: Launch) -> Kernel:
    return Kernel.from_symbol(f"void {launch.kernel}()")


# ---- bytes of a launch ----


def parameters_of(launch: Launch) -> Structure | None:
    """The launch's parameters, for kernels over whole sequences and gradient sums."""
    for prefix, name in _STRUCTURES.items():
        if launch.kernel.startswith(f"asgl::{prefix}"):
            return structure(name, torch.float32).from_buffer_copy(launch.parameters)
    return None


class Moved(NamedTuple):
    """Bytes an element: of sequences, which an element-wise operation moves as well, and of all else."""

    sequences: float
    more: float


def moved(params: Any, dtype: str) -> Moved:
    """Bytes by the parameters of a kernel over whole sequences; null pointers move nothing."""
    size = ELEMENT_BYTES[dtype]
    given = {name for name, *_ in _fields(params) if isinstance(getattr(params, name), int) and getattr(params, name)}
    sequences = size * len({"x_seq", "residual", "s_seq", "grad_s_seq", "grad_x_seq", "grad_residual"} & given)
    sequences += REAL_BYTES * len({"v_seq", "h_seq", "grad_v_seq", "grad_h_seq"} & given)
    if not hasattr(params, "shape"):  # normalisation: the gradient is overwritten where no residual needs it
        return Moved(sequences + size * ("grad_x_seq" in given and "grad_residual" not in given), 0.0)
    steps, neurons = params.shape.steps, params.shape.outer * params.shape.inner
    values = (-(-steps // constant("kCheckpointSteps")) - 1) * neurons
    values += neurons * len({"v_init", "v_last", "grad_v_last", "grad_v_init"} & given)
    for view in params.parameters:
        values += view.count * (steps if view.step_stride else 1) if view.data else 0
    for partial, view in zip(getattr(params, "partials", ()), params.parameters, strict=False):
        stored = params.tiles.count * view.count if repeats_in(view, params.tiles.tile) else partial.slots
        values += stored * (steps if view.step_stride else 1) if partial.data else 0
    return Moved(sequences, REAL_BYTES * values / (steps * neurons))


def _fields(params: Any) -> list[Any]:
    found: list[Any] = []
    for each in type(params).__mro__:
        found += each.__dict__.get("_fields_", [])
    return found


# ---- instructions of a launch ----


def issued(program: Program, launch: Launch) -> dict[str, float]:
    """Instructions of a thread by class: the mean over the warps of a block in the middle of the grid."""
    warps = range(0, launch.threads, WARP)
    total: Counter[str] = Counter()
    for first in warps:
        trace = program.run(launch.parameters, first, launch.blocks // 2)
        check(program, launch, trace)
        for index, times in Counter(indices(trace)).items():
            total[class_of(program.code[index])] += times
    return {name: total[name] / len(warps) for name in CLASSES}


def check(program: Program, launch: Launch, trace: Sequence[int]) -> None:
    """Refuses a trace of a neuron kernel that does not load x and store a result at each step."""
    steps = getattr(getattr(parameters_of(launch), "shape", None), "steps", 0)
    done = Counter(program.code[index].name for index in trace if index >= 0)
    if launch.kernel.startswith("asgl::lif_") and min(done["LDG"], done["STG"]) < steps:
        raise RuntimeError(f"{launch.kernel}: {done['LDG']} loads and {done['STG']} stores in {steps} steps")


# ---- prediction ----


class Counts(NamedTuple):
    """Bytes and instructions of a kernel for each element, in one call, at one length, on one architecture.

    `steps` is 0 for a kernel by channel, which does the same at any length.
    """

    architecture: int
    call: str
    kind: str  # as in tools/kernels/RESOURCES.md
    dtype: str
    steps: int
    moved: Moved
    instructions: dict[str, float]  # by class

    @property
    def kernel(self) -> str:
        return name_of(Kernel(self.kind, self.dtype))

    @property
    def is_common(self) -> bool:
        """Whether it belongs to the common case, in which a kernel is known by its name."""
        kernels = {
            COMMON.name: NEURON_KERNELS,
            BLOCK.name: NORMALISATION_KERNELS,
            RESIDUAL_BLOCK.name: RESIDUAL_KERNELS[1:],
        }
        return self.kernel in kernels.get(self.call, ())

    @property
    def work(self) -> object:
        return self.kind, self.dtype, self.steps, sum(self.moved), tuple(self.instructions.items())

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "moved": list(self.moved), "instructions": list(self.instructions.values())}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Counts:
        instructions = dict(zip(CLASSES, row["instructions"], strict=True))
        return cls(**{**row, "moved": Moved(*row["moved"]), "instructions": instructions})


def pipe_cycles(card: Card, instructions: dict[str, float]) -> dict[str, float]:
    """Cycles of a multiprocessor in each pipe, for these instructions of a thread."""
    return {
        "FMA": (instructions[FLOAT_ARITHMETIC] + instructions[MULTIPLY]) / card.float_lanes,
        "IMAD": instructions[MULTIPLY] / MULTIPLY_LANES,
        "ALU": (instructions[FLOAT_CHOICE] + instructions[INTEGER]) / ALU_LANES,
        "special": instructions[SPECIAL] / SPECIAL_LANES,
    }


class Prediction(NamedTuple):
    """The time of a kernel on a card, in picoseconds an element."""

    counts: Counts
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


def predict(card: Card, counts: Counts) -> Prediction:
    pipes = pipe_cycles(card, counts.instructions)
    busiest = max(pipes, key=lambda name: pipes[name])
    cycle = 1e12 / card.cycles
    return Prediction(
        counts,
        memory=1e12 * sum(counts.moved) / card.bandwidth,
        issue=cycle * sum(counts.instructions.values()) / ISSUE_LANES,
        pipes=cycle * pipes[busiest],
        busiest=busiest,
        floor=1e12 * counts.moved.sequences / card.bandwidth,
    )


def resident_blocks(card: Card, usage: Usage, threads: int) -> int:
    """Blocks that a multiprocessor holds at once; registers are allocated by warp, 256 at a time."""
    warps = threads // WARP
    warp_registers = -(-usage.registers * WARP // 256) * 256
    limits = [REGISTERS // warp_registers // warps, THREADS // threads, BLOCKS]
    limits.append(card.shared_bytes // (usage.shared + RESERVED_SHARED_BYTES))
    return min(limits)
