"""The sections of ROOFLINE.md beside its tables of times: sums of gradients, waves, few neurons, the noise."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch

from ..kernels.cuda_code import Instruction
from .compiled_kernels import Kernels
from .prediction import (  # fmt: skip
    CARDS,
    ELEMENT_BYTES,
    ISSUE_LANES,
    REAL_BYTES,
    THREADS,
    WARP,
    Card,
    Prediction,
    blocks_at_once,
    kernel_of_launch,
    moved,
    parameters_of,
    predict,
)
from .recorded_calls import BLOCK, COMMON, OTHERS, WITHOUT_NOISE, Call, Launch, launches, learned, recorded, trained
from .sass_run import ARITHMETIC_CYCLES, MEMORY_CYCLES, ON_CHIP_CYCLES, alone, places

CARD = CARDS[0]
L2_BYTES_A_CYCLE = 64  # that one multiprocessor gets
LATENCY = 700e-9  # of memory under load
DTYPES = ("float32", "bfloat16")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines) + "\n"


def prose(text: str) -> str:
    """Paragraphs, their lines filled anew."""
    filled = (textwrap.fill(each, 120, break_long_words=False, break_on_hyphens=False) for each in text.split("\n\n"))
    return "\n\n".join(filled) + "\n"


def is_of_neurons(launch: Launch) -> bool:
    return launch.kernel.startswith("asgl::lif_")


def elements_of(launch: Launch) -> int:
    shape = parameters_of(launch).shape
    return int(shape.outer * shape.steps * shape.inner)


def predicted(card: Card, kernels: Kernels, call: str, launch: Launch, elements: int, steps: int) -> Prediction:
    """The prediction for one kernel of a call that has so many elements."""
    of_thread = kernels.issued(launch)
    threads = launch.blocks * launch.threads
    instructions = {name: count * threads / elements for name, count in of_thread.items()}
    kernel = kernel_of_launch(launch)
    return predict(card, call, kernel, steps, moved(parameters_of(launch), kernel.dtype), instructions)


def seconds_alone(card: Card, kernels: Kernels, launch: Launch) -> float:
    """The time of the slowest warp of a block, were it alone."""
    program, _ = kernels.of(launch)
    ways = (program.run(launch.parameters, first, launch.blocks // 2) for first in range(0, launch.threads, WARP))
    return max(alone(program.code, way).cycles for way in ways) / card.clock


# ---- the sums of gradients ----

SUM_NEURONS, SUM_STEPS = (64, 256, 1024), 4
SUMS: dict[str, Callable[[], torch.Tensor]] = {
    "of the layer": lambda: learned(),
    "of a channel": lambda: learned(SUM_NEURONS[1], 1),
    "of a neuron": lambda: learned(*SUM_NEURONS),
}


class SumTime(NamedTuple):
    """The times that may bind a gradient sum, in seconds."""

    issue: float
    l2: float
    latency: float
    memory: float

    @property
    def most(self) -> float:
        return max(self)

    @property
    def binds(self) -> str:
        return self._fields[self.index(self.most)].replace("l2", "L2")


def sum_time(card: Card, instructions: float, alone: float, launch: Launch, numbers: int, at_once: int) -> SumTime:
    """`instructions` of a thread; `alone`: seconds of a block's slowest warp; `numbers` that are read or written."""
    here = -(-launch.blocks // card.multiprocessors)  # blocks of the multiprocessor that has most
    a_block = REAL_BYTES * numbers / launch.blocks
    return SumTime(
        issue=here * launch.threads * instructions / ISSUE_LANES / card.clock,
        l2=here * a_block / L2_BYTES_A_CYCLE / card.clock,
        latency=-(-here // at_once) * alone,
        memory=REAL_BYTES * numbers / card.bandwidth,
    )


def gradient_sums(card: Card, kernels: Kernels) -> Iterator[tuple[str, ...]]:
    for name, width in SUMS.items():
        x_seq = torch.empty(SUM_STEPS, *SUM_NEURONS, requires_grad=True)
        found = recorded(trained(x_seq, width=width()), 1)
        backward = next(each for each in found if "backward" in each.kernel)
        launch = next(each for each in found if "gradient_sum" in each.kernel)
        _, usage = kernels.of(launch)
        params = parameters_of(launch)
        slots = sum(part.partials.slots for part in params.parts[: params.count])
        # The derivative of the width needs the width, too.
        numbers = slots + sum(2 * part.parameter.count for part in params.parts[: params.count])
        instructions = sum(kernels.issued(launch).values())
        time = sum_time(
            card, instructions, seconds_alone(card, kernels, launch), launch, numbers,
            blocks_at_once(card, usage, launch.threads),
        )  # fmt: skip
        elements = math.prod(x_seq.shape)
        of_backward = predicted(card, kernels, "", backward, elements, SUM_STEPS).time * 1e-12 * elements
        yield (
            name, str(launch.blocks), str(slots), f"{instructions * launch.blocks * launch.threads / slots:.1f}",
            *(f"{1e6 * each:.1f}" for each in time), time.binds, f"{100 * time.most / of_backward:.1f} %",
        )  # fmt: skip


def section_of_sums(kernels: Kernels) -> str:
    header = ("a value", "blocks", "slots", "instructions", "issue", "L2", "latency", "memory", "binds", "of backward")
    text = f"""\
Backward leaves a partial sum for each run of neurons that share a value, and of each block: a slot. `gradient_sum` adds
them up. Here the width is learned, N = 2^{int(math.log2(math.prod(SUM_NEURONS)))}, T = {SUM_STEPS}, in float32, on an
{CARD.name}. Times are microseconds; instructions are those of threads for each slot.

The longest of four times binds. *Issue*: the threads of a block start {ISSUE_LANES} instructions a cycle. *L2*: it
gives one multiprocessor {L2_BYTES_A_CYCLE} bytes a cycle. *Latency*: the way of the slowest warp alone, as in the
section on few neurons; a load takes {MEMORY_CYCLES} cycles, and loads overlap until the first is used. *Memory*: the
whole card's bandwidth. The first three are those of the multiprocessor that has most blocks; a single block has one to
itself, and the others idle. The last column is the share of backward's time, which runs before.
"""
    return f"## Sums of gradients\n\n{prose(text)}\n{table(header, gradient_sums(CARD, kernels))}"


# ---- waves ----

SIZES = ((2**19, 128), (2**20, 16), (2**24, 4))  # neurons, steps
CALLS_OF_WAVES = (COMMON, BLOCK, *(call for call in OTHERS if call.name == "lif, all by channel"))


class Waves(NamedTuple):
    """How the blocks of a launch fill a card."""

    waves: float
    full_bytes: float  # under way in a full wave
    last_bytes: float  # and in the last one
    wave: float  # seconds of a full wave at full speed
    seconds: float  # of all waves, none shorter than a block alone


def waves(blocks: int, at_once: int, thread_bytes: int, threads: int, seconds: float, alone: float) -> Waves:
    """`seconds`: the kernel's, at full speed; `alone`: those of a block that is alone."""
    full_waves = -(-blocks // at_once) - 1
    last = blocks - full_waves * at_once
    wave = seconds * at_once / blocks
    bytes_each = threads * thread_bytes
    return Waves(
        waves=blocks / at_once,
        full_bytes=at_once * bytes_each,
        last_bytes=last * bytes_each,
        wave=wave,
        seconds=full_waves * max(wave, alone) + max(seconds * last / blocks, alone),
    )


def row_of_waves(card: Card, kernels: Kernels, call: Call, launch: Launch, neurons: int, steps: int) -> tuple[str, ...]:
    program, usage = kernels.of(launch)
    kernel = kernel_of_launch(launch)
    recorded_elements, elements = elements_of(launch), neurons * steps
    prediction = predicted(card, kernels, call.name, launch, recorded_elements, steps)
    time = prediction.time * 1e-12 * elements
    way = program.run(launch.parameters, 0, launch.blocks // 2)
    held = blocks_at_once(card, usage, launch.threads)
    slowest = seconds_alone(card, kernels, launch)
    found = waves(
        launch.blocks * elements // recorded_elements, held * card.multiprocessors,
        alone(program.code, way).loaded_bytes, launch.threads, time, slowest,
    )  # fmt: skip
    return (
        f"{kernel.kind} {kernel.dtype}", str(steps), f"2^{int(math.log2(neurons))}", str(usage.registers), str(held),
        f"{found.waves:.2f}", f"{found.full_bytes / 1e6:.1f}", f"{found.last_bytes / 1e6:.1f}",
        f"{1e6 * found.wave:.1f}", f"{1e6 * slowest:.1f}", f"{1e6 * time:.0f}", f"{found.seconds / time:.2f}",
    )  # fmt: skip


def rows_of_waves(card: Card, kernels: Kernels) -> Iterator[tuple[str, ...]]:
    seen = set()
    for call, dtype, (neurons, steps) in product(CALLS_OF_WAVES, DTYPES, SIZES):
        for launch in filter(is_of_neurons, launches(call, steps, dtype)):
            key = launch.kernel, neurons, steps
            if key not in seen:
                seen.add(key)
                yield row_of_waves(card, kernels, call, launch, neurons, steps)


def section_of_waves(kernels: Kernels) -> str:
    header = ("", "T", "N", "registers", "blocks", "waves", "MB, full", "MB, last", "wave", "alone", "all", "by waves")
    rows = list(rows_of_waves(CARD, kernels))
    late = [f"{name} (T = {steps})" for name, steps, *_, by_waves in rows if float(by_waves) > 1.1]
    text = f"""\
How many blocks of 128 threads a multiprocessor holds follows from registers, shared memory (RESOURCES.md) and its
{THREADS} threads; a wave is what all hold at once. *MB* are the bytes that loads have under way at most, in a full wave
and in the last one. To keep the memory of an {CARD.name} busy, latency times bandwidth must be under way,
{1e9 * LATENCY:.0f} ns * {CARD.bandwidth / 1e12:g} TB/s = {LATENCY * CARD.bandwidth / 1e6:.1f} MB: a last wave that has
less leaves memory idle.

Times are microseconds. *Wave* is what a full one takes at the speed of the tables above, *alone* what a block takes by
itself, as its loads and dependent instructions have it (next section), and *all* is the kernel at the speed of the
tables. The last column is the time of the waves one after another, none shorter than a block alone, as a multiple of
*all*. It is pessimistic, as a block starts as soon as another ends, and waves are not in step.

Where *wave* is longer than *alone*, only the last wave costs something, and only if waves are few. Where *alone* is
longer, every wave waits for latency: more warps or earlier loads would help there, and fewer instructions would not,
unless they are in the chain. More than a tenth is at stake in: {"; ".join(late) or "none"}.
"""
    return f"## Waves, and the tail of the last one\n\n{prose(text)}\n{table(header, rows)}"


# ---- few neurons ----

FEW_NEURONS, LONG = 1024, 1000


def rows_of_few(card: Card, kernels: Kernels) -> Iterator[tuple[str, ...]]:
    for device_threads in (card.multiprocessors * 2048, 1):
        for dtype in DTYPES:
            x_seq = torch.empty(LONG, FEW_NEURONS, dtype=getattr(torch, dtype), requires_grad=True)
            for launch in filter(is_of_neurons, recorded(trained(x_seq), device_threads)):
                program, _ = kernels.of(launch)
                way = program.run(launch.parameters)
                free, loaded = (alone(program.code, way, cycles).cycles for cycles in (ON_CHIP_CYCLES, MEMORY_CYCLES))
                warps = launch.blocks * launch.threads // WARP
                yield (
                    f"{kernel_of_launch(launch).kind} {dtype}", str(warps), f"{len(way) / LONG:.0f}",
                    f"{free / LONG:.0f}", f"{loaded / LONG:.0f}", f"{1e6 * loaded / card.clock:.0f}",
                )  # fmt: skip


def section_of_few(kernels: Kernels) -> str:
    header = ("", "warps", "instructions", "cycles", "with loads", "microseconds")
    text = f"""\
With N = {FEW_NEURONS} and T = {LONG} neither memory nor issue binds but the way of one warp: each has one of the
{4 * CARD.multiprocessors} schedulers of an {CARD.name} to itself. Its instructions start in order, one a cycle, and
wait for what they read: {ARITHMETIC_CYCLES} cycles for arithmetic, {ON_CHIP_CYCLES} for shared memory, constants,
shuffles and special functions, {MEMORY_CYCLES} for global memory, or {ON_CHIP_CYCLES} in the column *cycles*. Branches
and barriers wait for nothing. Instructions and cycles are those of a step, microseconds of the whole kernel with loads.
The launchers give a thread one neuron here, as in the upper rows; the lower ones are for four.
"""
    return f"## Few neurons, long sequences\n\n{prose(text)}\n{table(header, rows_of_few(CARD, kernels))}"


# ---- the noise ----

NOISE_STEPS, NOISE_DTYPE = (4, 16), "bfloat16"
MASK_BYTES = 1 / 8  # an element
PHILOX = ("-0x2daee0ad", "-0x326172a9", "0xd2511f53", "0xcd9e8d57")  # the two multipliers, as either sign


class Noise(NamedTuple):
    """A kernel that draws its noise, and one that has it as a mask of bits."""

    drawn: Prediction
    kept: Prediction
    multiplications: float  # an element, by Philox's constants


def noise_of(card: Card, kernels: Kernels, steps: int) -> tuple[Noise, Noise]:
    """Forward, which draws in any case, and backward, which needs no instructions for the noise where it is kept."""
    with_noise, without = (launches(call, steps, NOISE_DTYPE)[:2] for call in (COMMON, WITHOUT_NOISE))
    found = []
    for launch, other in zip(with_noise, (with_noise[0], without[1]), strict=True):
        elements = elements_of(launch)
        drawn, kept = (predicted(card, kernels, COMMON.name, each, elements, steps) for each in (launch, other))
        bytes_kept = drawn.bytes + MASK_BYTES
        kept = kept._replace(bytes=bytes_kept, memory=1e12 * bytes_kept / card.bandwidth)
        program, _ = kernels.of(launch)
        way = program.run(launch.parameters, 0, launch.blocks // 2)
        products = sum(is_philox(program.code[k]) for k in places(way))
        found.append(Noise(drawn, kept, products * launch.blocks * launch.threads / elements))
    return found[0], found[1]


def is_philox(i: Instruction) -> bool:
    """Whether it multiplies by one of Philox's constants."""
    return "IMAD.WIDE" in i.opcode and any(each in i.operands.lower() for each in PHILOX)


def rows_of_noise(card: Card, steps: int, noises: Sequence[Noise]) -> Iterator[tuple[str, ...]]:
    for part, each in zip(("forward", "backward"), noises, strict=True):
        both = each.drawn, each.kept
        yield (
            f"{card.name}, {part}", str(steps), f"{each.multiplications:.1f}",
            *(f"{sum(p.instructions.values()):.1f}" for p in both), *(f"{p.bytes:.2f}" for p in both),
            *(f"{p.ratio:.2f} {p.binds}" for p in both),
        )  # fmt: skip


def section_of_noise(kernels: dict[int, Kernels]) -> str:
    rows, saved = [], []
    for steps in NOISE_STEPS:
        shares = []
        for card in CARDS:
            noises = noise_of(card, kernels[card.architecture], steps)
            rows += rows_of_noise(card, steps, noises)
            now, then = (sum(getattr(each, name).time for each in noises) for name in ("drawn", "kept"))
            shares.append(f"{100 * (1 - then / now):.0f} % on {card.name}")
        saved.append(f"{', '.join(shares)} at T = {steps}")
    header = (
        "", "T", "Philox products", "instructions", "with a mask", "bytes", "with a mask", "times the multiply",
        "with a mask",
    )  # fmt: skip
    before = f"""\
Ten rounds of Philox, two products each, make the noise of eight elements, in forward and again in backward. Forward
could keep it as a mask, a bit an element: {MASK_BYTES:g} bytes more in each pass, where an element of x has
{ELEMENT_BYTES[NOISE_DTYPE]} in {NOISE_DTYPE}. Backward with a mask is counted as if there were no noise, so that
unpacking is free, as is packing in forward: what is saved is an upper bound.
"""
    after = f"""\
Forward and backward together would save at most {"; ".join(saved)}. Where memory binds, as in float32 nearly
everywhere, the mask costs its bytes and saves nothing. It would also be one more tensor that lives until backward.
"""
    return f"## The noise is drawn twice\n\n{prose(before)}\n{table(header, rows)}\n{prose(after)}"


def sections(kernels: dict[int, Kernels]) -> list[str]:
    """All of them, in the order of the page."""
    of_card = kernels[CARD.architecture]
    return [section_of_sums(of_card), section_of_waves(of_card), section_of_few(of_card), section_of_noise(kernels)]
