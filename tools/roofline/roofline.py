"""Predicts the bound of the CUDA kernels from bytes and instructions, for typical calls: `--write` renews the figures.

The launchers name the kernels of a call, and their parameters; the SASS of each is run for a thread of every warp of a
block, as far as parameters decide its control flow, and the instructions issued are counted. Needs no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import parser_of

from ..kernels.cuda_code import Disassembler, Nvcc
from ..pages import Page, table
from . import sections
from .compiled_kernels import MOMENTS, Kernels, compile_kernels
from .prediction import (
    ALU_LANES,
    BY_CHANNEL,
    CARDS,
    CLASSES,
    ELEMENT_BYTES,
    MOVED,
    MULTIPLY_LANES,
    NEURON_KERNELS,
    NORMALISATION_KERNELS,
    RESIDUAL_KERNELS,
    Card,
    Counts,
    Prediction,
    kernel_of_launch,
    name_of,
    predict,
)
from .recorded_calls import BLOCK, CHANNELS, COMMON, ELEMENTS, INNER, OTHERS, RESIDUAL_BLOCK, Call, launches

STEPS = (4, 16, 128)
CHECKPOINT_STEPS = 16


def counted(kernels: dict[int, Kernels], calls: Iterable[Call]) -> Iterator[Counts]:
    """Every kernel over whole sequences; the others of a call are small."""
    for call in calls:
        for dtype in ELEMENT_BYTES:
            for steps in STEPS:
                for launch in launches(call, steps, dtype):
                    name = name_of(kernel_of_launch(launch))
                    if name in MOVED and (name not in BY_CHANNEL or steps == STEPS[0]):
                        for architecture, those in kernels.items():
                            yield sections.counts_of(architecture, those, call.name, launch, ELEMENTS, steps)


def figures(kernels: dict[int, Kernels], moments: dict[int, Kernels], version: str) -> dict[str, Any]:
    found = counted(kernels, (COMMON, BLOCK, RESIDUAL_BLOCK, *OTHERS))
    return {"nvcc": version, "counts": [each.to_json() for each in found], **sections.figures(kernels, moments)}


def counts_in(figures: dict[str, Any]) -> list[Counts]:
    return [Counts.from_json(row) for row in figures["counts"]]


# ---- the page ----

HEAD = """\
# What should bound the CUDA kernels

**A prediction from the disassembly. No GPU has measured it**; measurements will be compared with it. Made by
`python -m tools.roofline.roofline --write` with nvcc {version}, and drawn from roofline.json.

Each card begins with the common case, `lif` with a learned width: rectangle, hard reset, uniform parameters, noise,
gradients of x and width, a thread for four neurons, time first. `batch_norm_lif` in training follows, and then *other
calls*, which are the common case except for what their names say. An element is one neuron at one step.

Bytes: forward reads x and writes s, backward reads x and the gradient and writes dx; both also move a potential of 4
bytes at every {checkpoint}th step but the last. v_seq adds 4 bytes whatever the type is; parameters and their partial
sums add what they have. The floor, `x * 2` and `x * g`, moves the sequences, v_seq included, equally fast.

Instructions: the launchers name the kernels of a call, and their parameters. The SASS of each is run for one thread of
every warp of one block: integers and predicates are computed, floats and the contents of memory are unknown. Loops and
branches depend on the former, so each is taken as often as on a GPU, and a kernel skips what a call does not use.
Divisions do depend on floats: they are assumed to take the fast path. An instruction whose predicate is false is
issued, and counted.

Time: a multiprocessor starts four warp instructions a cycle, those of 128 threads. Its FMA pipes take
{lanes} float additions and multiplications a cycle, at most {multiply} of them
`IMAD`; its ALU pipe takes {alu} comparisons, selections, logic and integer additions (CUDA C++ Programming Guide,
throughput of native arithmetic instructions). The longest of memory, issue and busiest pipe is the time: perfect
overlap is assumed. The section on waves says where latency does not allow it.

`batch_norm_lif` in training is four passes: moments reads x; forward reads x and writes s; backward reads x and the
gradient and writes the gradient of the normalised input, times its gain; the input gradient reads that and x and writes
dx in place. That is {moved} elements, {moved_bytes} bytes in float32, and the floor is a copy of as many. Forward and
backward are the normalised kernels (RESOURCES.md). Backward loads x twice, the second time from L1 or L2 in the main
(section on the second read): the bytes count it once.

Kernels of their own add a residual r between the two. Forward and backward read it as well, and backward writes the
gradient of the sum, which r shares; the input gradient reads it and x and writes dx to memory of its own. That is
{with_residual} elements, {bytes_with_residual} bytes in float32, and the floor is a copy of as many. `lif` with a
residual, one of the *other calls*, moves 3 elements forward and 4 backward, where r shares dx. Its multiply is `x + r`,
and `torch.addcmul(x, r, g)`, which reads three and writes one.

Other calls: *by channel* is a tensor with a value for each of {channels} channels of {inner} neurons; *all* are
width, decay and threshold, all learned; *by neuron* is a value for each neuron, in kernels of their own;
*channels_last* are 64 adjacent channels, in the same kernels;
*store_v_seq* stores the potentials, which get no gradient, and takes the general kernels, with one neuron a thread in a
*small* layer, which would not fill the card with four. Rows equal to the common case are left out.
"""

CAVEATS = """\
## What this leaves out

- Launch, bank conflicts of shared memory, and instruction-cache misses. The tables of the cards leave out latency and
  the last wave (section on waves).
- The clock: 1.755 GHz on H100 and H200, below the 1.98 GHz of their 67 TFLOP/s of float32; 1.86 GHz on the B200,
  below the 1.98 GHz of its 75 TFLOP/s; 1.41 GHz on the A100. A card at its power limit lowers its clock, not its
  bandwidth, so that instructions bind sooner. `python -m tools.gpu_check.check` predicts from measured clock and
  bandwidth.
- Bandwidth is the data sheet's, which no kernel reaches, nor does the multiply. Where memory binds, this cancels in
  the ratio; where instructions bind, the true ratio is lower.
- Per-channel work of batch normalisation: coefficients, adjoint, the last sums of the gradients of gain and bias.
  Double precision counts at the rate of special functions, which is below its own on these cards: the section on
  float64 has others.
- Other surrogates than the rectangle, and the soft reset.
- `IMAD.WIDE` counts as one `IMAD`, as in the guide. Uniform instructions count only as issued.
"""


def row_of(p: Prediction) -> tuple[str, ...]:
    return (
        f"{p.counts.kernel} {p.counts.dtype}", str(p.counts.steps or "any"), f"{sum(p.counts.moved):.2f}",
        f"{sum(p.counts.instructions.values()):.1f}", f"{p.memory:.2f}", f"{p.issue:.2f}",
        f"{p.pipes:.2f} {p.busiest}", p.binds, f"{p.ratio:.2f}",
    )  # fmt: skip


def class_row(p: Prediction) -> tuple[str, ...]:
    instructions = (f"{p.counts.instructions[name]:.1f}" for name in CLASSES)
    return f"{p.counts.kernel} {p.counts.dtype}", str(p.counts.steps), *instructions


def sum_row(those: Sequence[Prediction], dtype: str, steps: int) -> tuple[str, ...]:
    def total(get: Callable[[Prediction], float]) -> float:
        return sum(get(p) for p in those)

    return (
        f"all four {dtype}", str(steps), f"{total(lambda p: sum(p.counts.moved)):.2f}",
        f"{total(lambda p: sum(p.counts.instructions.values())):.1f}", f"{total(lambda p: p.memory):.2f}",
        f"{total(lambda p: p.issue):.2f}", "", "", f"{total(lambda p: p.time) / total(lambda p: p.floor):.2f}",
    )  # fmt: skip


def normalisation_rows(found: Sequence[Prediction], kernels: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """A row for each kernel, and for each length one for the four together."""
    for dtype in ELEMENT_BYTES:
        mine = [p for p in found if p.counts.dtype == dtype and p.counts.kernel in kernels]
        for p in sorted(mine, key=lambda p: (kernels.index(p.counts.kernel), p.counts.steps)):
            yield row_of(p)
        for steps in STEPS:
            yield sum_row([p for p in mine if p.counts.steps in (0, steps)], dtype, steps)


COLUMNS = ("", "T", "bytes", "instructions", "memory", "issue", "busiest pipe", "binds")


def other_calls(found: Sequence[Prediction]) -> list[Prediction]:
    """The kernels of one card whose work differs from the common case."""
    common = {p.counts.work for p in found if p.counts.is_common}
    return [p for p in found if not p.counts.is_common and p.counts.work not in common]


def call_row(p: Prediction) -> tuple[str, ...]:
    _, *cells = row_of(p)
    return (p.counts.call, f"{p.counts.kind}, {p.counts.dtype}", *cells)


def short_call_rows(found: Sequence[Prediction]) -> Iterator[tuple[str, ...]]:
    """A row for each call and pass, a column for each type and length."""
    grouped: dict[tuple[str, bool], dict[tuple[str, int], Prediction]] = {}
    for p in found:
        key = p.counts.call, p.counts.kernel.startswith("forward")
        grouped.setdefault(key, {})[p.counts.dtype, p.counts.steps] = p
    for (call, forward), those in grouped.items():
        cells = [those.get((dtype, steps)) for dtype in ELEMENT_BYTES for steps in STEPS]
        name = f"{call}, {'forward' if forward else 'backward'}"
        yield name, *("" if p is None else f"{p.ratio:.2f} {p.binds}" for p in cells)


def card_tables(card: Card, counts: Sequence[Counts]) -> Iterator[str]:
    found = [predict(card, each) for each in counts if each.architecture == card.architecture]
    common = [p for p in found if p.counts.is_common]
    mine = sorted(
        (p for p in common if p.counts.kernel in NEURON_KERNELS),
        key=lambda p: (NEURON_KERNELS.index(p.counts.kernel), p.counts.dtype != "float32", p.counts.steps),
    )
    yield (
        f"## {card.name}\n\n{card.bandwidth / 1e12:g} TB/s, {card.multiprocessors} multiprocessors at "
        f"{card.clock / 1e9:g} GHz, sm_{card.architecture}. Times are picoseconds an element, of the whole card.\n"
    )
    yield table((*COLUMNS, "times the multiply"), map(row_of, mine))
    if card == next(each for each in CARDS if each.architecture == card.architecture):
        yield "Instructions an element, by class:\n"
        yield table(("", "T", *CLASSES), map(class_row, mine))
    yield "Batch normalisation in front of the neuron:\n"
    yield table((*COLUMNS, "times the copy"), normalisation_rows(common, NORMALISATION_KERNELS))
    yield "With a residual added between the two:\n"
    yield table((*COLUMNS, "times the copy"), normalisation_rows(common, RESIDUAL_KERNELS))
    others = other_calls(found)
    if card == CARDS[0]:
        yield "Other calls:\n"
        yield table(("call", "kernel", *COLUMNS[1:], "times the multiply"), map(call_row, others))
    yield "Other calls in short, as times the multiply and what binds:\n"
    header = ("", *(f"{dtype}, T = {steps}" for dtype in ELEMENT_BYTES for steps in STEPS))
    yield table(header, short_call_rows(others))


def text(found: dict[str, Any]) -> str:
    moved_elements, with_residual = (
        sum(MOVED[name] for name in names) for names in (NORMALISATION_KERNELS, RESIDUAL_KERNELS)
    )
    lanes = dict.fromkeys(card.float_lanes for card in CARDS)
    parts = [
        HEAD.format(
            version=found["nvcc"],
            checkpoint=CHECKPOINT_STEPS,
            multiply=MULTIPLY_LANES,
            alu=ALU_LANES,
            channels=CHANNELS,
            inner=INNER,
            moved=moved_elements,
            moved_bytes=moved_elements * ELEMENT_BYTES["float32"],
            with_residual=with_residual,
            bytes_with_residual=with_residual * ELEMENT_BYTES["float32"],
            lanes=" or ".join(
                f"{each} ({', '.join(card.name.split()[0] for card in CARDS if card.float_lanes == each)})"
                for each in lanes
            ),
        )
    ]
    counts = counts_in(found)
    for card in CARDS:
        parts += card_tables(card, counts)
    return "\n".join([*parts, *sections.texts(found), CAVEATS])


PAGE = Page(Path(__file__).with_name("ROOFLINE.md"), text)


def main() -> None:
    """Prints a new page, or writes page and figures."""
    parser = parser_of("tools.roofline.roofline", __doc__)
    parser.add_argument("--write", action="store_true", help="write roofline.json and ROOFLINE.md, print nothing")
    parser.add_argument("--draw", action="store_true", help="draw ROOFLINE.md again from roofline.json")
    arguments = parser.parse_args()
    if arguments.draw:
        PAGE.write()
        return
    nvcc, disassembler = Nvcc.find(), Disassembler.find()
    if nvcc is None or disassembler is None:
        parser.error("needs nvcc, cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    kernels = compile_kernels(nvcc, disassembler, dict.fromkeys(card.architecture for card in CARDS))
    moments = compile_kernels(
        nvcc, disassembler, (architecture for _, architecture, *_ in sections.FLOAT64_CARDS), MOMENTS
    )
    found = figures(kernels, moments, nvcc.version)
    for architecture, those in kernels.items():
        for kernel, addresses in those.undecided.items():
            print(f"sm_{architecture}: {kernel}: undecided branches at {', '.join(addresses)}", file=sys.stderr)
    if arguments.write:
        PAGE.write(found)
    else:
        print(text(found), end="")


if __name__ == "__main__":
    main()
