"""The sections of ROOFLINE.md beside the tables of times: gradient sums, waves, few neurons, noise, float64, L2.

Each section has a function for the rows of its table, and a function for its text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from ..kernels.cuda_code import Instruction
from ..pages import prose, table
from .compiled_kernels import Kernels
from .prediction import (
    BY_CHANNEL,
    CARDS,
    ELEMENT_BYTES,
    ISSUE_LANES,
    MOVED,
    REAL_BYTES,
    THREADS,
    WARP,
    Card,
    Counts,
    Moved,
    Prediction,
    kernel_of_launch,
    moved,
    name_of,
    parameters_of,
    predict,
    resident_blocks,
)
from .recorded_calls import (
    BLOCK,
    COMMON,
    ELEMENTS,
    OTHERS,
    RESIDUAL_BLOCK,
    WITHOUT_NOISE,
    Call,
    Launch,
    launches,
    learned,
    recorded,
    trained,
)
from .sass_run import ARITHMETIC_CYCLES, MEMORY_CYCLES, ON_CHIP_CYCLES, alone, indices

CARD = CARDS[0]
L2_BYTES_A_CYCLE = 64  # per multiprocessor
LATENCY = 700e-9  # seconds, memory under load
DTYPES = ("float32", "bfloat16")

Row = list[Any]


def formatted(columns: Sequence[tuple[str, str]], rows: Sequence[Row]) -> str:
    """A table of columns with a name and a format."""
    cells = ([f"{value:{spec}}" for (_, spec), value in zip(columns, row, strict=True)] for row in rows)
    return table([name for name, _ in columns], cells)


def is_neuron(launch: Launch) -> bool:
    return launch.kernel.startswith("asgl::lif_")


def elements_of(launch: Launch) -> int:
    shape = parameters_of(launch).shape
    return int(shape.outer * shape.steps * shape.inner)


def counts_of(architecture: int, kernels: Kernels, call: str, launch: Launch, elements: int, steps: int) -> Counts:
    threads = launch.blocks * launch.threads
    instructions = {name: count * threads / elements for name, count in kernels.issued(launch).items()}
    kernel = kernel_of_launch(launch)
    bytes_moved = moved(parameters_of(launch), kernel.dtype)
    steps = 0 if name_of(kernel) in BY_CHANNEL else steps
    return Counts(architecture, call, kernel.kind, kernel.dtype, steps, bytes_moved, instructions)


def seconds_alone(card: Card, kernels: Kernels, launch: Launch) -> float:
    """The time of a block's slowest warp, running alone."""
    program, _ = kernels[launch]
    traces = (program.run(launch.parameters, first, launch.blocks // 2) for first in range(0, launch.threads, WARP))
    return max(alone(program.code, trace).cycles for trace in traces) / card.clock


# ---- the sums of gradients ----

SAMPLES, CHANNELS, INNER, SUM_STEPS = 64, 256, 1024, 4
SUM_NEURONS = SAMPLES, CHANNELS, INNER
# Sizes of a step and of the width.
SUMS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "of the layer": (SUM_NEURONS, ()),
    "of a channel": (SUM_NEURONS, (CHANNELS, 1)),
    "of a channel, channels_last": ((SAMPLES, INNER, CHANNELS), (CHANNELS,)),
    "of a neuron of all samples": (SUM_NEURONS, (CHANNELS, INNER)),
    "of a neuron of one": (SUM_NEURONS, SUM_NEURONS),
}
SUM_COLUMNS = (
    ("a value", ""), ("blocks", ""), ("slots", ""), ("instructions", ".1f"), ("issue", ".1f"), ("L2", ".1f"),
    ("latency", ".1f"), ("memory", ".1f"), ("binds", ""), ("% of backward", ".1f"),
)  # fmt: skip


class SumTime(NamedTuple):
    """The times that may bind a gradient sum, in seconds."""

    issue: float
    l2: float
    latency: float
    memory: float

    @property
    def binds(self) -> str:
        return self._fields[self.index(max(self))].replace("l2", "L2")


def sum_time(card: Card, instructions: float, alone: float, launch: Launch, values: int, resident: int) -> SumTime:
    """By instructions of a thread, seconds of a block's slowest warp, values read or written, and resident blocks."""
    here = -(-launch.blocks // card.multiprocessors)  # blocks of the multiprocessor with most
    block_bytes = REAL_BYTES * values / launch.blocks
    return SumTime(
        issue=here * launch.threads * instructions / ISSUE_LANES / card.clock,
        l2=here * block_bytes / L2_BYTES_A_CYCLE / card.clock,
        latency=-(-here // resident) * alone,
        memory=REAL_BYTES * values / card.bandwidth,
    )


def gradient_sums(card: Card, kernels: Kernels) -> Iterator[Row]:
    for name, (sizes, width) in SUMS.items():
        x_seq = torch.empty(SUM_STEPS, *sizes, requires_grad=True)
        found = recorded(trained(x_seq, width=learned(*width)), 1)
        backward = next(each for each in found if "backward" in each.kernel)
        elements = math.prod(x_seq.shape)
        counts = counts_of(card.architecture, kernels, "", backward, elements, SUM_STEPS)
        backward_seconds = predict(card, counts).time * 1e-12 * elements
        for launch in (each for each in found if "gradient_sum" in each.kernel):
            params = parameters_of(launch)
            (part,) = params.parts[: params.count]
            slots = part.neurons if part.parameter.inner == 1 else part.partials.slots
            # The derivative of the width needs the width, too.
            values = slots + 2 * part.parameter.count
            instructions = sum(kernels.issued(launch).values())
            resident = resident_blocks(card, kernels[launch].usage, launch.threads)
            time = sum_time(card, instructions, seconds_alone(card, kernels, launch), launch, values, resident)
            each_slot = instructions * launch.blocks * launch.threads / slots
            share = 100 * max(time) / backward_seconds
            yield [name, launch.blocks, slots, each_slot, *(1e6 * seconds for seconds in time), time.binds, share]
            name = "its totals"


def sums_text(rows: list[Row]) -> str:
    text = f"""\
Backward stores a partial sum for each block and run of neurons with a common value: a slot. `gradient_sum` adds them
up; a second launch adds up the totals of split runs. Here the width is learned, N =
2^{int(math.log2(math.prod(SUM_NEURONS)))}, T = {SUM_STEPS}, in float32, on an {CARD.name}. Times are microseconds;
instructions are those of threads for each slot.

The longest of four times binds. *Issue*: the threads of a block start {ISSUE_LANES} instructions a cycle. *L2*:
{L2_BYTES_A_CYCLE} bytes a cycle and multiprocessor. *Latency*: the trace of the slowest warp alone, as in the section
on few neurons; a load takes {MEMORY_CYCLES} cycles, and loads overlap until the first is used. *Memory*: the
bandwidth of the whole card. The first three are those of the multiprocessor with most blocks; a single block has one
to itself, and the others idle. The last column is the share of backward's time, which runs before.
"""
    return f"## Sums of gradients\n\n{prose(text)}\n{formatted(SUM_COLUMNS, rows)}"


# ---- waves ----

SIZES = ((2**19, 128), (2**20, 16), (2**24, 4))  # neurons, steps
WAVE_CALLS = (COMMON, BLOCK, RESIDUAL_BLOCK, *(call for call in OTHERS if call.name == "lif, all by channel"))
WAVE_COLUMNS = (
    ("", ""), ("T", ""), ("N", ""), ("registers", ""), ("blocks", ""), ("waves", ".2f"), ("MB, full", ".1f"),
    ("MB, last", ".1f"), ("wave", ".1f"), ("alone", ".1f"), ("all", ".0f"), ("by waves", ".2f"),
)  # fmt: skip


class Waves(NamedTuple):
    """The waves of a launch's blocks on a card."""

    waves: float
    full_bytes: float  # in flight in a full wave
    last_bytes: float  # in flight in the last wave
    wave: float  # seconds of a full wave at full speed
    seconds: float  # of all waves, none shorter than a block alone


def waves(blocks: int, resident: int, thread_bytes: int, threads: int, seconds: float, alone: float) -> Waves:
    """`seconds`: of the kernel, at full speed; `alone`: of a single block."""
    full_waves = -(-blocks // resident) - 1
    last = blocks - full_waves * resident
    wave = seconds * resident / blocks
    block_bytes = threads * thread_bytes
    return Waves(
        waves=blocks / resident,
        full_bytes=resident * block_bytes,
        last_bytes=last * block_bytes,
        wave=wave,
        seconds=full_waves * max(wave, alone) + max(seconds * last / blocks, alone),
    )


def wave_row(card: Card, kernels: Kernels, call: Call, launch: Launch, neurons: int, steps: int) -> Row:
    program, usage = kernels[launch]
    kernel = kernel_of_launch(launch)
    recorded_elements, elements = elements_of(launch), neurons * steps
    counts = counts_of(card.architecture, kernels, call.name, launch, recorded_elements, steps)
    seconds = predict(card, counts).time * 1e-12 * elements
    trace = program.run(launch.parameters, 0, launch.blocks // 2)
    resident = resident_blocks(card, usage, launch.threads)
    slowest = seconds_alone(card, kernels, launch)
    found = waves(
        launch.blocks * elements // recorded_elements, resident * card.multiprocessors,
        alone(program.code, trace).loaded_bytes, launch.threads, seconds, slowest,
    )  # fmt: skip
    return [
        f"{kernel.kind} {kernel.dtype}", steps, f"2^{int(math.log2(neurons))}", usage.registers, resident, found.waves,
        found.full_bytes / 1e6, found.last_bytes / 1e6, 1e6 * found.wave, 1e6 * slowest, 1e6 * seconds,
        found.seconds / seconds,
    ]  # fmt: skip


def wave_rows(card: Card, kernels: Kernels) -> Iterator[Row]:
    seen = set()
    for call, dtype, (neurons, steps) in product(WAVE_CALLS, DTYPES, SIZES):
        for launch in filter(is_neuron, launches(call, steps, dtype)):
            key = launch.kernel, neurons, steps
            if key not in seen:
                seen.add(key)
                yield wave_row(card, kernels, call, launch, neurons, steps)


def waves_text(rows: list[Row]) -> str:
    late = [f"{name} (T = {steps})" for name, steps, *_, by_waves in rows if round(by_waves, 2) > 1.1]
    text = f"""\
Registers, shared memory (RESOURCES.md) and {THREADS} threads limit the blocks of 128 threads that a multiprocessor
holds; a wave is the blocks of all multiprocessors. *MB* are the bytes that loads have in flight at most, in a full wave
and in the last one. To keep the memory of an {CARD.name} busy, latency times bandwidth must be in flight,
{1e9 * LATENCY:.0f} ns * {CARD.bandwidth / 1e12:g} TB/s = {LATENCY * CARD.bandwidth / 1e6:.1f} MB: a last wave with less
leaves memory idle.

Times are microseconds. *Wave*: a full one at the speed of the tables above; *alone*: a single block, by the latency
of its loads and dependent instructions (next section); *all*: the kernel at the speed of the tables. The last column
is the time of the waves one after another, none shorter than a block alone, as a multiple of *all*. It is
pessimistic: a block starts as soon as another ends, and waves are not in step.

Where *wave* is longer than *alone*, only the last of few waves costs something. Where *alone* is longer, every wave
waits for latency: more warps or earlier loads would help there, fewer instructions only in the dependent chain. More
than a tenth is at stake in: {"; ".join(late) or "none"}.
"""
    return f"## Waves, and the tail of the last one\n\n{prose(text)}\n{formatted(WAVE_COLUMNS, rows)}"


# ---- few neurons ----

FEW_NEURONS, LONG = 1024, 1000
FEW_COLUMNS = (
    ("", ""), ("warps", ""), ("instructions", ".0f"), ("cycles", ".0f"), ("with loads", ".0f"), ("microseconds", ".0f")
)  # fmt: skip


def few_rows(card: Card, kernels: Kernels) -> Iterator[Row]:
    for device_threads in (card.multiprocessors * 2048, 1):
        for dtype in DTYPES:
            x_seq = torch.empty(LONG, FEW_NEURONS, dtype=getattr(torch, dtype), requires_grad=True)
            for launch in filter(is_neuron, recorded(trained(x_seq), device_threads)):
                program, _ = kernels[launch]
                trace = program.run(launch.parameters)
                free, loaded = (alone(program.code, trace, cycles).cycles for cycles in (ON_CHIP_CYCLES, MEMORY_CYCLES))
                warps = launch.blocks * launch.threads // WARP
                name = f"{kernel_of_launch(launch).kind} {dtype}"
                yield [name, warps, len(trace) / LONG, free / LONG, loaded / LONG, 1e6 * loaded / card.clock]


def few_text(rows: list[Row]) -> str:
    text = f"""\
With N = {FEW_NEURONS} and T = {LONG} the trace of one warp binds, neither memory nor issue: each warp has one of the
{4 * CARD.multiprocessors} schedulers of an {CARD.name} to itself. Its instructions start in order, one a cycle, and
wait for their operands: {ARITHMETIC_CYCLES} cycles for arithmetic, {ON_CHIP_CYCLES} for shared memory, constants,
shuffles and special functions, {MEMORY_CYCLES} for global memory, or {ON_CHIP_CYCLES} in the column *cycles*. Branches
and barriers wait for nothing. Instructions and cycles are those of a step, microseconds of the whole kernel with loads.
The launchers choose one neuron a thread here, as in the upper rows; the lower ones have four.
"""
    return f"## Few neurons, long sequences\n\n{prose(text)}\n{formatted(FEW_COLUMNS, rows)}"


# ---- the noise ----

NOISE_STEPS, NOISE_DTYPE = (4, 16), "bfloat16"
MASK_BYTES = 1 / 8  # an element
PHILOX = ("-0x2daee0ad", "-0x326172a9", "0xd2511f53", "0xcd9e8d57")  # both multipliers, in either sign
NOISE_COLUMNS = (
    ("", ""), ("T", ""), ("Philox products", ".1f"), ("instructions", ".1f"), ("with a mask", ".1f"), ("bytes", ".2f"),
    ("with a mask", ".2f"), ("times the multiply", ""), ("with a mask", ""),
)  # fmt: skip


class Noise(NamedTuple):
    """A kernel that draws its noise, and the kernel with a mask of bits."""

    drawn: Prediction
    kept: Prediction
    multiplications: float  # an element, by Philox's constants


def noise_of(card: Card, kernels: Kernels, steps: int) -> tuple[Noise, Noise]:
    """Forward, which draws in any case, and backward, without instructions for the noise where a mask is kept."""
    with_noise, without = (launches(call, steps, NOISE_DTYPE)[:2] for call in (COMMON, WITHOUT_NOISE))
    found = []
    for launch, other in zip(with_noise, (with_noise[0], without[1]), strict=True):
        elements = elements_of(launch)
        drawn, kept = (
            counts_of(card.architecture, kernels, COMMON.name, each, elements, steps) for each in (launch, other)
        )
        kept = kept._replace(moved=Moved(drawn.moved.sequences, drawn.moved.more + MASK_BYTES))
        program, _ = kernels[launch]
        trace = program.run(launch.parameters, 0, launch.blocks // 2)
        products = sum(is_philox(program.code[k]) for k in indices(trace))
        multiplications = products * launch.blocks * launch.threads / elements
        found.append(Noise(predict(card, drawn), predict(card, kept), multiplications))
    return found[0], found[1]


def is_philox(i: Instruction) -> bool:
    """Whether it multiplies by one of Philox's constants."""
    return "IMAD.WIDE" in i.opcode and any(each in i.operands.lower() for each in PHILOX)


def noise_rows(card: Card, steps: int, noises: Sequence[Noise]) -> Iterator[Row]:
    for part, each in zip(("forward", "backward"), noises, strict=True):
        both = each.drawn, each.kept
        yield [
            f"{card.name}, {part}", steps, each.multiplications,
            *(sum(p.counts.instructions.values()) for p in both), *(sum(p.counts.moved) for p in both),
            *(f"{p.ratio:.2f} {p.binds}" for p in both),
        ]  # fmt: skip


def noise_figures(kernels: dict[int, Kernels]) -> dict[str, Any]:
    """The rows, and the share of the time that a mask would save at most, by length and card."""
    rows: list[Row] = []
    saved: dict[str, dict[str, float]] = {}
    for steps, card in product(NOISE_STEPS, CARDS):
        noises = noise_of(card, kernels[card.architecture], steps)
        rows += noise_rows(card, steps, noises)
        now, then = (sum(getattr(each, name).time for each in noises) for name in ("drawn", "kept"))
        saved.setdefault(str(steps), {})[card.name] = 1 - then / now
    return {"rows": rows, "saved": saved}


def noise_text(figures: dict[str, Any]) -> str:
    saved = (
        f"{', '.join(f'{100 * share:.0f} % on {card}' for card, share in shares.items())} at T = {steps}"
        for steps, shares in figures["saved"].items()
    )
    before = f"""\
Ten rounds of Philox, two products each, make the noise of eight elements, in forward and again in backward. Forward
could keep it as a mask, a bit an element: {MASK_BYTES:g} bytes more in each pass, where an element of x has
{ELEMENT_BYTES[NOISE_DTYPE]} in {NOISE_DTYPE}. Backward with a mask is counted as if there were no noise, with free
unpacking, and forward with free packing: the saving is an upper bound.
"""
    after = f"""\
Forward and backward together would save at most {"; ".join(saved)}. Where memory binds, as in float32 nearly
everywhere, the mask costs its bytes and saves nothing. It would also be one more tensor that lives until backward.
"""
    drawn = formatted(NOISE_COLUMNS, figures["rows"])
    return f"## The noise is drawn twice\n\n{prose(before)}\n{drawn}\n{prose(after)}"


# ---- float64 ----

# Name, architecture, bytes per second, multiprocessors, Hz, float64 operations per cycle and multiprocessor.
FLOAT64_CARDS = (
    ("RTX 3090", 86, 0.936e12, 82, 1.695e9, 2),
    ("RTX 4090", 89, 1.008e12, 128, 2.52e9, 2),
    ("B300", 103, 8e12, 148, 1.92e9, 2),
    ("H100 SXM", 90, 3.35e12, 132, 1.755e9, 64),
)
# Conversions from and to float64 have its rate.
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w+64H|[FI]2[FI]\b.*F64")
FLOAT64_COLUMNS = (
    ("", ""), ("float64", ".2f"), ("instructions", ".1f"), ("memory", ".2f"), ("issue", ".2f"), ("float64", ".2f"),
    ("times the bytes", ".2f"),
)  # fmt: skip


def float64_rows(kernels: dict[int, Kernels]) -> Iterator[Row]:
    for (name, architecture, bandwidth, multiprocessors, clock, lanes), dtype in product(FLOAT64_CARDS, DTYPES):
        launch = next(each for each in launches(BLOCK, NOISE_STEPS[0], dtype) if "batch_moments" in each.kernel)
        program, _ = kernels[architecture][launch]
        warps = range(0, launch.threads, WARP)
        traces = (program.run(launch.parameters, first, launch.blocks // 2) for first in warps)
        counts = Counter(bool(FLOAT64.match(program.code[k].opcode)) for trace in traces for k in indices(trace))
        slow, issued = (WARP * launch.blocks * count / ELEMENTS for count in (counts[True], counts.total()))
        cycle = 1e12 / multiprocessors / clock
        times = 1e12 * ELEMENT_BYTES[dtype] / bandwidth, cycle * issued / ISSUE_LANES, cycle * slow / lanes
        yield [f"{name} {dtype}", slow, issued, *times, max(times) / times[0]]


def float64_text(rows: list[Row]) -> str:
    text = """\
Means and variances are float64, which runs at 1/64 of float32's rate on most cards. The moments' kernel sums pairs of
float32 (csrc/math/pair.h), and has float64 only where a block stores its moments. The tables above count float64 at the
rate of special functions; here it is counted at its own, for the first pass of `batch_norm_lif`. Columns are
instructions an element, picoseconds an element, and the longest time as a multiple of the bytes'.
"""
    return f"## Float64 in the moments\n\n{prose(text)}\n{formatted(FLOAT64_COLUMNS, rows)}"


# ---- the second read of x ----

# Name, bytes of L2, multiprocessors, whether L2 has two halves, each of which may hold what its multiprocessors read.
L2_CARDS = (
    ("H100 SXM", 50e6, 132, True), ("A100 40 GB", 40e6, 108, True), ("A10", 6e6, 72, False),
    ("RTX 3090", 6e6, 82, False),
)  # fmt: skip
BACKWARD_BLOCKS, BACKWARD_NEURONS, SEGMENT = 3, 4 * 128, 16  # of a multiprocessor; of a block; steps
L2_COLUMNS = (("", ""), ("x of a segment, MB", ".1f"), ("% more bytes", ""), ("streaming", ""))


def more_bytes(step_bytes: float, l2: float, sequences: int) -> float:
    """Bytes of x that miss at the second read, as a share of backward's, where so many sequences occupy L2.

    Between the two reads of x at the k-th step from a segment's end, k steps of each sequence are touched.
    """
    hits = min(1.0, l2 / (sequences * step_bytes * SEGMENT))
    return (1 - hits) / MOVED["backward normalised"]


def second_read_rows() -> Iterator[Row]:
    for (name, l2, multiprocessors, halves), dtype in product(L2_CARDS, DTYPES):
        step_bytes = multiprocessors * BACKWARD_BLOCKS * BACKWARD_NEURONS * ELEMENT_BYTES[dtype]
        cells = []
        for sequences in (MOVED["backward normalised"], 1):
            found = [100 * more_bytes(step_bytes, size, sequences) for size in ((l2, l2 / 2) if halves else (l2,))]
            cells.append(" to ".join(dict.fromkeys(f"{each:.0f}" for each in found)))
        yield [f"{name} {dtype}", 1e-6 * step_bytes * SEGMENT, *cells]


def second_read_text() -> str:
    text = f"""\
From T = 5 on, backward of a normalised layer reads x of a segment of {SEGMENT} steps forward and again backward. In
between, the blocks that a multiprocessor holds, {BACKWARD_BLOCKS} of {BACKWARD_NEURONS} neurons, touch the later steps
of x, of the gradient and of dx. In a model where all blocks are at the same step and L2 keeps what was used last, x
misses if these are more than L2 holds; where L2 has two halves, from half of it on. The gradient, the residual, and
what backward stores are marked as streaming: their lines leave L2 first. The last column is the best case, in which
they take no room. Later kernels read dx after all of it was written, from L2 only if all fits, marked or not.
"""
    rows = list(second_read_rows())
    return f"## The second read of x\n\n{prose(text)}\n{formatted(L2_COLUMNS, rows)}"


def figures(kernels: dict[int, Kernels], moments: dict[int, Kernels]) -> dict[str, Any]:
    """The figures of all sections, in the order of the page. `moments`: for FLOAT64_CARDS."""
    ours = kernels[CARD.architecture]
    return {
        "sums": list(gradient_sums(CARD, ours)),
        "waves": list(wave_rows(CARD, ours)),
        "few": list(few_rows(CARD, ours)),
        "noise": noise_figures(kernels),
        "float64": list(float64_rows(moments)),
    }


def texts(found: dict[str, Any]) -> list[str]:
    return [
        sums_text(found["sums"]), waves_text(found["waves"]), few_text(found["few"]), noise_text(found["noise"]),
        float64_text(found["float64"]), second_read_text(),
    ]  # fmt: skip
