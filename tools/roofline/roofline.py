"""Predicts the bound of the CUDA kernels from bytes and from instructions, for the calls of users.

The launchers are asked which kernels a call starts, and with what parameters; the SASS of each is run for a thread of
every warp of a block, as far as parameters decide its way, and the instructions that it is issued are counted. No GPU
is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.common import parser_of, write_json

from ..kernels.cuda_code import Disassembler, Nvcc
from .compiled_kernels import Kernels, compile_kernels
from .prediction import (  # fmt: skip
    ALU_LANES,
    BY_CHANNEL,
    CARDS,
    CLASSES,
    ELEMENT_BYTES,
    MOVED,
    MULTIPLY_LANES,
    OF_NEURONS,
    OF_NORMALISATION,
    Card,
    Prediction,
    kernel_of_launch,
    name_of,
)
from .recorded_calls import BLOCK, CHANNELS, COMMON, ELEMENTS, INNER, OTHERS, Call, launches
from .sections import predicted, sections, table

PAGE = Path(__file__).with_name("ROOFLINE.md")
ACCESSES = "## Sectors that the warps touch"  # heads what tools/ptx/accesses.py writes, the rest of the page
STEPS = (4, 16, 128)
CHECKPOINT_STEPS = 16


def predictions(kernels: dict[int, Kernels], calls: Iterable[Call]) -> Iterator[Prediction]:
    """Of every kernel that passes over whole sequences; the others of a call are small."""
    for call in calls:
        for dtype in ELEMENT_BYTES:
            for steps in STEPS:
                for launch in launches(call, steps, dtype):
                    name = name_of(kernel_of_launch(launch))
                    if name not in MOVED or (name in BY_CHANNEL and steps != STEPS[0]):
                        continue
                    for card in CARDS:
                        yield predicted(card, kernels[card.architecture], call.name, launch, ELEMENTS, steps)


# ---- the page ----

HEAD = """\
# What should bound the CUDA kernels

**A prediction from the disassembly. No GPU has measured it**; it is what a measurement will be held against. Made by
`python -m tools.roofline.roofline --write` with nvcc {version}; no number in a table is written by hand.

Each card begins with the common case, `lif` with a learned width: rectangle, hard reset, uniform parameters, noise,
gradients of x and width, a thread for four neurons, time first. `batch_norm_lif` in training follows, and then *other
calls*, which are the common case except for what their names say. An element is one neuron at one step.

Bytes: forward reads x and writes s, backward reads x and the gradient and writes dx; both also move a potential of 4
bytes at every {checkpoint}th step but the last. v_seq adds 4 bytes whatever the type is; parameters and their partial
sums add what they have. The floor, `x * 2` and `x * g`, moves the sequences, v_seq included, equally fast.

Instructions: the launchers say which kernels a call starts, and with which parameters. The SASS of each is then run,
one thread for every warp of one block: integers and predicates are computed, floats and the contents of memory are not.
Loops and branches depend on the former, so that each is taken as often as on a GPU, and what a call does not use is
skipped where the kernel skips it. Two kinds of branches do depend on floats: a division is taken for one of the usual
kind, and moments that are joined for such as are not empty. An instruction whose predicate is false takes its turn, and
counts.

Time: a multiprocessor starts four warp instructions a cycle, those of 128 threads. Its FMA pipes take
{lanes} float additions and multiplications a cycle, of which {multiply} may be
`IMAD`; its ALU pipe takes {alu} comparisons, selections, logic and integer additions (CUDA C++ Programming Guide,
throughput of native arithmetic instructions). The longest of memory, issue and busiest pipe is the time: perfect
overlap is assumed. The section on waves says where latency does not allow it.

`batch_norm_lif` in training is four passes: moments reads x; forward reads x and writes s; backward reads x and the
gradient and writes the gradient of the normalised input, times its gain; the input gradient reads that and x and writes
dx in its place. That is {moved} elements, {moved_bytes} bytes in float32, and the floor is a copy that moves as many.
Forward and backward are then the normalised kernels (RESOURCES.md). Backward loads x twice, the second time from L1 or
L2, which it has just come through: the bytes count it once.

Other calls: *by channel* means a tensor with a value for each of {channels} channels of {inner} neurons; *all* are
width, decay and threshold, all learned; *by neuron* means that each of those has a value, which costs a thread
its other three neurons; *store_v_seq* keeps the potentials, which get no gradient, and takes the general kernels, of
which a *small* layer, too small to fill the card with four neurons a thread, gets those with one. A row that would be
the same as in the common case is left out.
"""

CAVEATS = """\
## What this leaves out

- Launch, bank conflicts of shared memory, and instruction-cache misses; latency and the last wave, in the tables of the
  cards, which the section on waves has.
- The clock: 1.755 GHz on H100 and H200, below the 1.98 GHz that their 67 TFLOP/s of float32 come to; 1.86 GHz on the
  B200, below the 1.98 GHz of its 75 TFLOP/s; 1.41 GHz on the A100. A card at its power limit runs slower, its memory
  does not, so that instructions bind sooner. `python -m tools.gpu_check.check` takes the clock and the bandwidth
  that it measures.
- Bandwidth is that of the data sheet; no kernel quite reaches it, the multiply neither. Where memory binds that
  cancels in the ratio; where instructions do the true ratio is lower.
- What batch normalisation does once for each channel: coefficients, adjoint, the last sums of the gradients of gain and
  bias. Double precision counts at the rate of special functions, and is faster on all these cards. Whether the second
  load of x hits depends on the cache: if none did, backward would move a third more.
- Other surrogates than the rectangle, and the soft reset.
- `IMAD.WIDE` counts as one `IMAD`; the guide does not tell them apart. Uniform instructions count only as issued.
"""


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


def is_common(p: Prediction) -> bool:
    """Whether it belongs to the tables of the common case, in which the page's readers find a kernel by its name."""
    if p.call == COMMON.name:
        return p.kernel in OF_NEURONS
    return p.call == BLOCK.name and p.kernel in OF_NORMALISATION


def of_other_calls(found: Sequence[Prediction]) -> list[Prediction]:
    """The kernels of one card that do anything else than in the common case."""

    def work(p: Prediction) -> object:
        return p.kind, p.dtype, p.steps, p.bytes, tuple(p.instructions.items())

    common = {work(p) for p in found if is_common(p)}
    return [p for p in found if not is_common(p) and work(p) not in common]


def row_of_call(p: Prediction) -> tuple[str, ...]:
    _, *cells = row_of(p)
    return (p.call, f"{p.kind}, {p.dtype}", *cells)


def rows_of_calls_in_short(found: Sequence[Prediction]) -> Iterator[tuple[str, ...]]:
    """A row for each call and pass, a column for each type and length."""
    grouped: dict[tuple[str, bool], dict[tuple[str, int], Prediction]] = {}
    for p in found:
        grouped.setdefault((p.call, p.kernel.startswith("forward")), {})[p.dtype, p.steps] = p
    for (call, forward), those in grouped.items():
        cells = [those.get((dtype, steps)) for dtype in ELEMENT_BYTES for steps in STEPS]
        yield (
            f"{call}, {'forward' if forward else 'backward'}",
            *("" if p is None else f"{p.ratio:.2f} {p.binds}" for p in cells),
        )


def tables_of(card: Card, found: Sequence[Prediction]) -> Iterator[str]:
    of_card = [p for p in found if p.card == card.name]
    common = [p for p in of_card if is_common(p)]
    mine = sorted(
        (p for p in common if p.kernel in OF_NEURONS),
        key=lambda p: (OF_NEURONS.index(p.kernel), p.dtype != "float32", p.steps),
    )
    yield (
        f"## {card.name}\n\n{card.bandwidth / 1e12:g} TB/s, {card.multiprocessors} multiprocessors at "
        f"{card.clock / 1e9:g} GHz, sm_{card.architecture}. Times are picoseconds an element, of the whole card.\n"
    )
    yield table((*COLUMNS, "times the multiply"), map(row_of, mine))
    if card == next(each for each in CARDS if each.architecture == card.architecture):
        yield "Instructions an element, by class:\n"
        yield table(("", "T", *CLASSES), map(row_of_classes, mine))
    yield "Batch normalisation in front of the neuron:\n"
    yield table((*COLUMNS, "times the copy"), rows_of_normalisation(common))
    others = of_other_calls(of_card)
    if card == CARDS[0]:
        yield "Other calls:\n"
        yield table(("call", "kernel", *COLUMNS[1:], "times the multiply"), map(row_of_call, others))
    yield "Other calls in short, as times the multiply and what binds:\n"
    header = ("", *(f"{dtype}, T = {steps}" for dtype in ELEMENT_BYTES for steps in STEPS))
    yield table(header, rows_of_calls_in_short(others))


def page(found: Sequence[Prediction], kernels: dict[int, Kernels], version: str) -> str:
    moved_elements = sum(MOVED[name] for name in OF_NORMALISATION)
    lanes = dict.fromkeys(card.float_lanes for card in CARDS)
    head = HEAD.format(
        version=version,
        checkpoint=CHECKPOINT_STEPS,
        multiply=MULTIPLY_LANES,
        alu=ALU_LANES,
        channels=CHANNELS,
        inner=INNER,
        moved=moved_elements,
        moved_bytes=moved_elements * ELEMENT_BYTES["float32"],
        lanes=" or ".join(
            f"{each} ({', '.join(card.name.split()[0] for card in CARDS if card.float_lanes == each)})"
            for each in lanes
        ),
    )
    parts = [head]
    for card in CARDS:
        parts += tables_of(card, found)
    return "\n".join([*parts, *sections(kernels), CAVEATS])


def parts_of(page: str) -> tuple[str, str]:
    """What is written here, and what tools/ptx/accesses.py writes; a blank line stands between."""
    before, heading, after = page.partition(ACCESSES)
    return before.rstrip("\n") + "\n", heading + after


def write(text: str) -> None:
    PAGE.write_text(f"{text}\n{parts_of(PAGE.read_text())[1]}")


def main() -> None:
    """Prints the page, or writes it."""
    parser = parser_of("tools.roofline.roofline", __doc__, "json")
    parser.add_argument("--write", action="store_true", help=f"write csrc/{PAGE.name} rather than print it")
    arguments = parser.parse_args()
    nvcc, disassembler = Nvcc.find(), Disassembler.find()
    if nvcc is None or disassembler is None:
        parser.error("needs nvcc, cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    architectures = dict.fromkeys(card.architecture for card in CARDS)
    kernels = compile_kernels(nvcc, disassembler, architectures)
    found = list(predictions(kernels, (COMMON, BLOCK, *OTHERS)))
    text = page(found, kernels, nvcc.version)
    for architecture, those in kernels.items():
        for kernel, addresses in those.undecided.items():
            print(f"sm_{architecture}: {kernel}: not known which way: {', '.join(addresses)}", file=sys.stderr)
    if arguments.write:
        write(text)
    else:
        print(text, end="")
    write_json(arguments.json, [{**p._asdict(), "binds": p.binds, "ratio": p.ratio} for p in found])


if __name__ == "__main__":
    main()
