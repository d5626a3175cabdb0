"""The bound of a CUDA kernel on a card: from the bytes that a call moves and the instructions that it is issued."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from ctypes import Structure
from typing import Any, NamedTuple

import torch

from asgl_cuda.backends.structures import constant, structure

from ..kernels.cuda_code import Instruction, Kernel, Usage
from .recorded_calls import Launch
from .sass_run import Program, places

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
REAL_BYTES = 4  # of parameters, states and potentials for both
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
    """A card: bytes a second, multiprocessors, Hz; float additions or multiplications a cycle and multiprocessor."""

    name: str
    architecture: int
    bandwidth: float
    multiprocessors: int
    clock: float
    float_lanes: int
    shared_bytes: int  # of a multiprocessor, for all its blocks

    @property
    def cycles(self) -> float:
        """Cycles a second of all multiprocessors together."""
        return self.multiprocessors * self.clock


CARDS = (
    Card("H100 SXM", 90, 3.35e12, 132, 1.755e9, 128, 228 * 1024),
    Card("H200 SXM", 90, 4.8e12, 132, 1.755e9, 128, 228 * 1024),
    Card("B200 SXM", 100, 7.7e12, 148, 1.86e9, 128, 228 * 1024),
    Card("A100 40 GB", 80, 1.56e12, 108, 1.41e9, 64, 164 * 1024),
)
# These are the same on all cards, of 128 threads whose instructions start in a cycle.
MULTIPLY_LANES = ALU_LANES = 64
SPECIAL_LANES = 16
ISSUE_LANES = 128
# What a multiprocessor has, on all cards.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SHARED_BYTES_OF_SYSTEM = 1024  # that each block takes beyond its own

# The kernels of the common case, and how many elements each moves for one of x.
MOVED = {
    "forward": 2, "backward": 3, "moments": 1, "forward normalised": 2, "backward normalised": 3, "input gradient": 3
}  # fmt: skip
OF_NEURONS = ("forward", "backward")
OF_NORMALISATION = ("moments", "forward normalised", "backward normalised", "input gradient")
BY_CHANNEL = ("moments", "input gradient")

_STRUCTURES = {
    "lif_forward": "ForwardParams", "lif_backward": "BackwardParams", "batch_moments": "MomentsParams",
    "batch_norm_input_gradient": "InputGradientParams", "gradient_sum": "GradientSum",
}  # fmt: skip


def class_of(instruction: Instruction) -> str:
    return next((name for name, pattern in _CLASS_PATTERNS.items() if re.match(pattern, instruction.name)), INTEGER)


def name_of(kernel: Kernel) -> str:
    return kernel.kind.split(",")[0].removesuffix(" plain")


def kernel_of_launch(launch: Launch) -> Kernel:
    return Kernel.of_symbol(f"void {launch.kernel}()")


# ---- what a launch moves ----


def parameters_of(launch: Launch) -> Structure | None:
    """The structure of its parameters, for the kernels that pass over whole sequences and the sums of gradients."""
    for prefix, name in _STRUCTURES.items():
        if launch.kernel.startswith(f"asgl::{prefix}"):
            return structure(name, torch.float32).from_buffer_copy(launch.parameters)
    return None


class Moved(NamedTuple):
    """Bytes an element: the sequences, which an element-wise operation would move, too, and all else."""

    sequences: float
    more: float


def moved(params: Any, dtype: str) -> Moved:
    """A null pointer moves nothing; `params` is the structure that a kernel of whole sequences is given."""
    size = ELEMENT_BYTES[dtype]
    given = {name for name, *_ in _fields(params) if isinstance(getattr(params, name), int) and getattr(params, name)}
    sequences = size * len({"x_seq", "s_seq", "grad_s_seq", "grad_x_seq"} & given)
    sequences += REAL_BYTES * len({"v_seq", "h_seq", "grad_v_seq", "grad_h_seq"} & given)
    if not hasattr(params, "shape"):  # of normalisation, where the gradient is read before it is overwritten
        return Moved(sequences + size * ("grad_x_seq" in given), 0.0)
    steps, neurons = params.shape.steps, params.shape.outer * params.shape.inner
    numbers = (-(-steps // constant("kCheckpointSteps")) - 1) * neurons
    states = (getattr(params, name, None) for name in ("init", "last", "grad_last", "grad_init"))
    numbers += sum(neurons for state in states if state is not None and state.v)
    for view in params.parameters:
        numbers += view.count * (steps if view.step_stride else 1) if view.data else 0
    for partial, view in zip(getattr(params, "partials", ()), params.parameters, strict=False):
        numbers += partial.slots * (steps if view.step_stride else 1) if partial.data else 0
    return Moved(sequences, REAL_BYTES * numbers / (steps * neurons))


def _fields(params: Any) -> list[Any]:
    found: list[Any] = []
    for each in type(params).__mro__:
        found += each.__dict__.get("_fields_", [])
    return found


# ---- what a launch is issued ----


def issued(program: Program, launch: Launch) -> dict[str, float]:
    """Instructions by class of a thread, the mean over the warps of a block in the middle of the grid."""
    warps = range(0, launch.threads, WARP)
    total: Counter[str] = Counter()
    for first in warps:
        way = program.run(launch.parameters, first, launch.blocks // 2)
        check(program, launch, way)
        for place, times in Counter(places(way)).items():
            total[class_of(program.code[place])] += times
    return {name: total[name] / len(warps) for name in CLASSES}


def check(program: Program, launch: Launch, way: Sequence[int]) -> None:
    """A way through a kernel of neurons loads x and stores a result at each step, or it was not the right one."""
    steps = getattr(getattr(parameters_of(launch), "shape", None), "steps", 0)
    done = Counter(program.code[place].name for place in way if place >= 0)
    if launch.kernel.startswith("asgl::lif_") and min(done["LDG"], done["STG"]) < steps:
        raise RuntimeError(f"{launch.kernel}: {done['LDG']} loads and {done['STG']} stores in {steps} steps")


# ---- prediction ----


class Prediction(NamedTuple):
    """The prediction for a kernel of a call, at one length on one card; times are picoseconds an element of the card.

    A kernel that goes by channel does the same whatever the length; its `steps` are 0.
    """

    card: str
    call: str
    kind: str  # of the kernel, as in tools/kernels/RESOURCES.md
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


def pipes_of(card: Card, instructions: dict[str, float]) -> dict[str, float]:
    """Cycles of a multiprocessor that each pipe needs for these instructions of a thread."""
    return {
        "FMA": (instructions[FLOAT_ARITHMETIC] + instructions[MULTIPLY]) / card.float_lanes,
        "IMAD": instructions[MULTIPLY] / MULTIPLY_LANES,
        "ALU": (instructions[FLOAT_CHOICE] + instructions[INTEGER]) / ALU_LANES,
        "special": instructions[SPECIAL] / SPECIAL_LANES,
    }


def predict(
    card: Card, call: str, kernel: Kernel, steps: int, bytes_moved: Moved, instructions: dict[str, float]
) -> Prediction:
    """`instructions`: an element, by class."""
    pipes = pipes_of(card, instructions)
    busiest = max(pipes, key=lambda name: pipes[name])
    cycle = 1e12 / card.cycles
    name = name_of(kernel)
    return Prediction(
        card=card.name,
        call=call,
        kind=kernel.kind,
        kernel=name,
        dtype=kernel.dtype,
        steps=0 if name in BY_CHANNEL else steps,
        bytes=sum(bytes_moved),
        instructions=instructions,
        memory=1e12 * sum(bytes_moved) / card.bandwidth,
        issue=cycle * sum(instructions.values()) / ISSUE_LANES,
        pipes=cycle * pipes[busiest],
        busiest=busiest,
        floor=1e12 * bytes_moved.sequences / card.bandwidth,
    )


def blocks_at_once(card: Card, usage: Usage, threads: int) -> int:
    """How many blocks a multiprocessor holds. Registers are given to a warp, 256 at a time."""
    warps = threads // WARP
    of_warp = -(-usage.registers * WARP // 256) * 256
    limits = [REGISTERS // of_warp // warps, THREADS // threads, BLOCKS]
    limits.append(card.shared_bytes // (usage.shared + SHARED_BYTES_OF_SYSTEM))
    return min(limits)
