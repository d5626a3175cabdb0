"""Writes the measurements in benchmarks/results into README.md and docs: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from . import ROOT
from .common import in_words, processor_in_words
from .learning import defaults, noise, widths
from .learning.data import SOURCES
from .learning.neurons import adaptation_rows, calibration_rows, residual_rows
from .learning.sparse import NETWORKS as SPARSE_NETWORKS
from .learning.sparse import sparse_rows
from .speed import convert
from .speed.end_to_end import COMPILED_NETWORK, COMPILED_STEP, CONVERTED, FUSED_BLOCK, SPIKES
from .speed.memory import HEAD as MEMORY_HEAD
from .speed.memory import KEPT, RECOMPUTED
from .speed.memory import rows as memory_rows
from .speed.microbench import (
    ANALOG_PROB,
    COMPILED,
    FLOOR,
    LOOP,
    MOST_STEPS_TO_COMPILE,
    PAIR,
    PLAIN,
    PLAIN_LOOP,
    REFERENCE,
    SIGMOID,
)
from .speed.recurrent import ALL_SPIKE, PRODUCTS, WITH_INPUT
from .speed.sizes import LAYOUTS

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md")
OURS = "asgl_cuda cpu"
SHOWN = "MLP", "convolutional", "residual", "speech", "recurrent speech"  # networks of README
NOISY, FIXED = "learned, noise", "fixed width"  # columns of asgl_cuda
SPACE = "\N{NO-BREAK SPACE}"
Report = dict[str, Any]
Rows = list[list[str]]


# ---- tables ----


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["--:" if i else "---" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def folded(title: str, table: list[str]) -> list[str]:
    """A table that is folded until the reader opens it."""
    return ["<details>", f"<summary>{title}</summary>", "", *table, "", "</details>"]


def digest(header: Sequence[str], rows: Rows, shown: Collection[str], title: str = "More rows") -> list[str]:
    """A table of the rows whose first cells are in `shown`, without versions, and a folded table of all other rows."""
    first: Rows = []
    others: Rows = []
    for row in rows:
        cells = [re.sub(r" \d+\.\d+\.\d+", "", cell) for cell in row]
        names = {", ".join(cells[:count]) for count in range(1, len(cells))}
        (others if names.isdisjoint(shown) else first).append(row)
    if not first:
        return markdown_table(header, rows)
    return [*markdown_table(header, first), "", *folded(title, markdown_table(header, others))]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.{2 if value < 10 else 1}f}"


def between(values: Collection[float], first: str = ".2f", last: str = ".2f") -> str:
    if not values:
        return "-"
    least, most = f"{min(values):{first}}", f"{max(values):{last}}"
    return least if least == most else f"{least} to {most}"


def listed(words: Sequence[str]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1]))


def power_of_two(value: int) -> str:
    return f"2^{value.bit_length() - 1}" if value & (value - 1) == 0 else str(value)


def named(size: Report) -> str:
    return f"T = {size['steps']}, N = {power_of_two(size['neurons'])}"


# ---- measurements of a layer ----


def elements(size: Report) -> int:
    return math.prod(size["shape"]) if "shape" in size else size["steps"] * size["neurons"]


def nanoseconds(size: Report, row: str) -> float | None:
    """The nanoseconds per element of forward and backward."""
    timing = size["seconds"].get(row)
    return None if timing is None else 1e9 * timing["both"] / elements(size)


def kept_bytes(size: Report, row: str) -> float | None:
    saved = size["rows"][row]["saved_bytes"]
    return None if saved is None else saved / elements(size)


def compared(report: Report) -> tuple[list[Report], list[str]]:
    """The sizes with rows of the ordinary neuron, and the names of these rows without those of compiled peers."""
    sizes = [size for size in report["sizes"] if f"{PLAIN}{OURS}" in size["seconds"]]
    names = [name for name in sizes[0]["seconds"] if name.startswith(PLAIN) and not name.endswith(COMPILED)]
    return sizes, names


def compiled(name: str) -> str:
    return f"{name}, {COMPILED}"


def shown_as(name: str) -> str:
    words = {PLAIN_LOOP: "loop in PyTorch", REFERENCE: "loop with all options"}
    name = name.removeprefix(PLAIN)
    return words.get(name, re.sub(f"^{OURS}", "asgl_cuda, LIF", name))


def pair_of(eager: float | None, compiled: float | None, digits: Callable[[float | None], str]) -> str:
    return f"{digits(eager)}{SPACE}/{SPACE}{digits(compiled) or '-'}"


def name_alone(name: str) -> str:
    """The name of a library without its version, for a head whose caption has the versions."""
    return re.sub(r" \d[\d.]*$", "", "loop" if name == f"{PLAIN}{PLAIN_LOOP}" else name.removeprefix(PLAIN))


def layers(report: Report) -> list[str]:
    """The table of one layer: times by steps and library, eager and compiled, and a last row of kept bytes."""
    sizes, peers = compared(report)
    ours = {"floor": FLOOR, NOISY: OURS, FIXED: f"{PLAIN}{OURS}"}
    others = [name for name in peers if "asgl_cuda" not in name and not name.endswith(REFERENCE)]
    rows = []
    for size in sizes:
        pairs = (pair_of(nanoseconds(size, name), nanoseconds(size, compiled(name)), number) for name in others)
        rows.append([f"T = {size['steps']}", *(number(nanoseconds(size, row)) for row in ours.values()), *pairs])

    def kept(name: str) -> str:
        found = kept_bytes(sizes[0], name) if name in sizes[0]["rows"] else None
        return "" if found is None else f"{found:.0f}"

    pairs = (f"{kept(name)} / {kept(compiled(name)) or '-'}" for name in others)
    rows.append(["bytes", *map(kept, ours.values()), *pairs])
    return markdown_table(["", *ours, *map(name_alone, others)], rows)


def layers_values(report: Report) -> Report:
    sizes = compared(report)[0]
    (count,) = {elements(size) for size in sizes}
    sigmoid = [nanoseconds(size, f"{PLAIN}{OURS}{SIGMOID}") for size in sizes]
    return {
        **long_values(read_report("end_to_end")),
        "sigmoid": between([each for each in sigmoid if each is not None]),
        "elements": power_of_two(count),
        "noise": ANALOG_PROB,
        "first_steps": sizes[0]["steps"],
    }


def microbench(report: Report) -> list[str]:
    """The tables of single layers: ASGL by size, then the ordinary neuron of every library."""
    rows = []
    for size in report["sizes"]:
        floor, mine, *others = (nanoseconds(size, name) for name in (FLOOR, OURS, COMPILED, LOOP, REFERENCE))
        rows.append([f"{named(size)}, {size['dtype']}", *map(number, (floor, mine, mine / floor, *others))])
    head = ["", "two multiplies", "asgl_cuda", "asgl_cuda / multiplies", "torch.compile", "author's loop", "reference"]
    sizes, peers = compared(report)
    plain = []
    for name in (each for peer in peers for each in (peer, compiled(peer))):
        times = [nanoseconds(size, name) for size in sizes]
        if times[0] is not None:
            again = sizes[0]["recompiled"].get(name, {})
            first = [size["rows"].get(name, {}).get("first_seconds") if again else None for size in sizes[:2]]
            seconds = [*first, *(again.get(key) for key in ("batch", "third_batch", "steps"))]
            plain.append([shown_as(name), *map(number, (*times, *seconds))])
    calls = report["call_microseconds"]
    firsts = "first call, T = 4", "first call, T = 16", "second batch size", "third batch size", "T = 5"
    return [
        *markdown_table(head, rows),
        "",
        "The next table compares implementations of the ordinary LIF neuron, which has a fixed width and no noise. "
        "asgl_cuda has a rectangle or, in one row, a sigmoid. The other libraries have their default surrogates. *loop "
        'with all options* is the backend `"reference"`. *loop in PyTorch* is the '
        "[short loop](design/equations.md#the-loop-in-pytorch) that computes only this neuron. The first three "
        "columns are again nanoseconds per element. The other columns are the seconds of single calls of compiled "
        "layers. A *first call* includes compiling. The columns *second batch size*, *third batch size* and *T = 5* "
        "are later calls of the layer that was compiled at T = 4. A call with a new size may compile the layer "
        "again.",
        "",
        *markdown_table(
            ["", *(f"T = {size['steps']}" for size in sizes), *firsts],
            plain,
        ),
        "",
        f"One call of `lif` with an input `[4, 64]` and without gradients takes {calls[OURS]:.1f} µs without noise and "
        f"{calls[f'{OURS} with noise']:.1f} µs with noise. `x * 2` takes {calls[FLOOR]:.1f} µs with the same input.",
    ]


def adaptive(report: Report) -> list[str]:
    """The table of adaptive neurons: the time of every implementation, also as a multiple of LIF's."""
    sizes = report["sizes"]
    rows = []
    for name in sizes[0]["seconds"]:
        times = [(nanoseconds(size, name), nanoseconds(size, f"{PLAIN}{OURS}")) for size in sizes]
        rows.append([name, *(number(each) for time, lif in times for each in (time, time / lif))])
    head = ["", *(cell for size in sizes for cell in (named(size), "times LIF"))]
    shown = ("LIF: asgl_cuda cpu", "ALIF: asgl_cuda cpu", "ALIF: loop", "ALIF: Norse")
    return digest(head, [row for row in rows if row[0] != FLOOR], shown)


def block(report: Report) -> list[str]:
    """The table of blocks: normalisation and neurons as one layer and as two, and the bytes kept for backward."""
    names = (FLOOR, OURS, f"{PAIR}{OURS}", f"{PAIR}{COMPILED}", f"{PAIR}{REFERENCE}")
    rows = []
    for each in report["blocks"]:
        times = floor, fused, pair, _, reference = [nanoseconds(each, name) for name in names]
        kept = (kept_bytes(each, name) for name in (OURS, f"{PAIR}{OURS}"))
        layout = "" if each["layout"] == LAYOUTS[0] else f", {each['layout']}"
        name = f"{each['dtype']}{layout}{', residual' if each['residual'] else ''}"
        rows.append([name, *map(number, (*times, fused / floor, pair / fused, reference / fused, *kept))])
    head = ["", "floor", "fused", "pair", "pair, torch.compile", "pair, reference"]
    head += ["fused / floor", "pair / fused", "pair, reference / fused", "kept, fused", "kept, pair"]
    return markdown_table(head, rows)


def others_by_ours(report: Report) -> list[float]:
    """The times of the other libraries' recurrent layers as multiples of our layer's."""
    found = []
    for seconds in (size["seconds"] for size in report["sizes"]):
        for end in ("", WITH_INPUT):
            names = (f"{peer}{end}" for peer in report["machine"]["peers"])
            found += [seconds[name] / seconds[f"{OURS}{end}"] for name in names if name in seconds]
    return found


def recurrent_values(report: Report) -> Report:
    """Times by those of the products, with the fewest neurons and with more, and other libraries' by the layer's."""
    sizes = report["sizes"]
    fewest = min(size["neurons"] for size in sizes)
    found: Report = {"fewest": fewest, "rates": between([size["rate"] for size in sizes], ".1%", ".1%")}
    for name, row in {"few": OURS, "all": f"{OURS}{ALL_SPIKE}"}.items():
        for end, small in {"small": True, "large": False}.items():
            seconds = (size["seconds"] for size in sizes if (size["neurons"] == fewest) == small)
            found[f"{name}_{end}"] = between([each[row] / each[PRODUCTS] for each in seconds])
    return {**found, "faster": between(others_by_ours(report), ".1f", ".0f")}


def recurrent(report: Report) -> list[str]:
    """The table of recurrent layers: milliseconds by size and threads, and bytes kept for backward."""
    sizes = report["sizes"]
    head = ["", *(f"{size['steps']}, {size['batch']}, {size['neurons']}; {size['threads']}" for size in sizes), "kept"]
    count = sizes[-1]["steps"] * sizes[-1]["batch"] * sizes[-1]["neurons"]
    rows = []
    for name in sizes[0]["seconds"]:
        kept = sizes[-1]["saved_bytes"].get(name)
        times = (number(1e3 * size["seconds"][name]) for size in sizes)
        rows.append([name, *times, number(None if kept is None else kept / count)])
    return markdown_table(head, rows)


# ---- networks, libraries, studies ----


def milliseconds(network: Report, variant: str, part: str = "seconds") -> float | None:
    found = network["variants"].get(variant)
    return None if found is None or part not in found else 1e3 * found[part]


def libraries(report: Report) -> list[str]:
    """The names of the rows of the loop and of the libraries, eager and not converted."""
    names = dict.fromkeys(name for each in report["networks"].values() for name in each["variants"])
    ends = (COMPILED, COMPILED_STEP, COMPILED_NETWORK)
    return [
        name for name in names
        if name.startswith(PLAIN) and OURS not in name and CONVERTED not in name and not name.endswith(ends)
    ]  # fmt: skip


def compiled_milliseconds(network: Report, name: str, part: str = "seconds") -> float | None:
    """The least time of a training step, or of another part, among the compiled variants of a library."""
    variants = (compiled(name), f"{name}{COMPILED_STEP}", f"{name}{COMPILED_NETWORK}")
    times = [time for each in variants if (time := milliseconds(network, each, part)) is not None]
    return min(times, default=None)


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def networks_of_readme(report: Report) -> Report:
    """The report with the networks of README alone."""
    return {**report, "networks": {name: report["networks"][name] for name in SHOWN}}


def steps(report: Report) -> list[str]:
    """The table of training steps: milliseconds by network and library, eager and compiled."""
    report = networks_of_readme(report)
    ours = {NOISY: OURS, FIXED: f"{PLAIN}{OURS}"}
    names = libraries(report)
    rows = []
    for name, network in report["networks"].items():
        pairs = (pair_of(milliseconds(network, each), compiled_milliseconds(network, each), rounded) for each in names)
        cells = (rounded(milliseconds(network, row)) for row in ours.values())
        rows.append([f"{name}, T{SPACE}={SPACE}{network['input_shape'][0]}", *cells, *pairs])
    return markdown_table(["", *ours, *map(name_alone, names)], rows)


Time = Callable[[Report, str], float | None]  # of a network and the name of a library's row


def time_of(suffix: str = "", part: str = "seconds") -> Time:
    """The milliseconds of a training step, or of another part, of the row with this suffix after the name."""
    return lambda network, name: milliseconds(network, f"{name}{suffix}", part)


def times_faster(report: Report, slower: Time, faster: Time, rows: Collection[str]) -> list[float]:
    """How many times as fast the faster variant is as the slower one, for the networks that have both."""
    pairs = ((slower(network, name), faster(network, name)) for network in report["networks"].values() for name in rows)
    return [before / after for before, after in pairs if before and after]


def steps_values(report: Report) -> Report:
    peers = libraries(report)[1:]  # without the loop

    def noisy(network: Report, name: str) -> float | None:
        return milliseconds(network, OURS)

    converted, fused = f"{CONVERTED} cpu", f"{CONVERTED} cpu{FUSED_BLOCK}"
    evaluation, stream = "evaluation_seconds", "stream_seconds"

    def ranges(name: str, slower: Time, faster: Time, rows: Collection[str], form: str) -> Report:
        """The ratios of networks with few time steps, in which whole layers were compiled, and of those with many."""
        networks: dict[str, Report] = {"short": {}, "long": {}}
        for key, each in report["networks"].items():
            networks["short" if each["input_shape"][0] <= MOST_STEPS_TO_COMPILE else "long"][key] = each
        return {
            f"{name}_{end}": between(times_faster({"networks": some}, slower, faster, rows), form, form)
            for end, some in networks.items()
        }

    def of(library: str) -> list[str]:
        return [name for name in peers if library in name]

    return {
        **ranges("noisy", milliseconds, noisy, peers, ".1f"),
        **ranges("compiled", compiled_milliseconds, noisy, [name for name in peers if "sinabs" not in name], ".2f"),
        **ranges("jelly", milliseconds, time_of(converted), of("SpikingJelly"), ".1f"),
        **ranges("snntorch", milliseconds, time_of(converted), of("snnTorch"), ".1f"),
        **ranges("converted", compiled_milliseconds, time_of(converted), peers, ".2f"),
        **ranges(
            "evaluated", partial(compiled_milliseconds, part=evaluation), time_of(converted, evaluation), peers, ".2f"
        ),
        "fused": between(times_faster(report, time_of(converted), time_of(fused), peers)),
        "fused_stream": between(
            times_faster(report, time_of(fused, stream), time_of(converted, stream), peers), ".1f", ".1f"
        ),
    }


def limits_values(report: Report) -> Report:
    return {**steps_values(report), **convert_values(read_report("convert"))}


def gain_values(report: Report) -> Report:
    (block,) = (
        each for each in read_report("microbench")["blocks"]
        if (each["dtype"], each["layout"], each["residual"]) == ("float32", LAYOUTS[0], False)
    )  # fmt: skip
    kept = {"kept": kept_bytes(block, OURS), "kept_apart": kept_bytes(block, f"{PAIR}{OURS}")}
    return {**steps_values(report), **kept}


def end_to_end(report: Report) -> list[str]:
    """A folded table per network: times of a training step, an evaluation and the first step, and bytes."""
    lines: list[str] = []
    for name, network in report["networks"].items():
        rows = [
            [
                shown_as(variant) if variant.startswith(PLAIN) else variant,
                *(f"{1e3 * each[part]:.0f}" for part in ("seconds", "evaluation_seconds")),
                f"{1e6 * each['stream_seconds']:.0f}" if "stream_seconds" in each else "",
                *(f"{each[part] / 1e6:.0f}" for part in ("kept_bytes", "peak_bytes")),
                *(f"{seconds:.1f}" if "compile" in variant else ""
                  for seconds in each["first_seconds"].values()),
            ]
            for variant, each in network["variants"].items()
        ]  # fmt: skip
        head = ["", "training step, ms", "evaluation, ms", "streamed step, µs", "kept, MB", "peak, MB"]
        head += ["first step, s", "first evaluation, s"]
        trained, evaluated = (
            between([100 * each for each in found], ".0f", ".0f") for found in network["rates"].values()
        )
        spikes = next(each for each in network["variants"].values() if "replaced" in each)
        layers = f"{spikes['replaced']} of {spikes['replaced'] + spikes['left']} layers are spike layers"
        title = (
            f"{name}, {network['input_shape']}: per time step, {trained} % of the neurons spike in training and "
            f"{evaluated} % in evaluation; {layers}"
        )
        lines += [*folded(title, markdown_table(head, rows)), ""]
    return lines[:-1]


def long_values(report: Report) -> Report:
    """Values for the text about one compiled layer at many steps."""
    if (found := report.get("long_loop")) is None:  # not measured
        return {"long": ""}
    times = {f"long_{name}": 1e9 * found[name] / elements(found) for name in ("eager", "compiled")}
    sentence = (
        f"Compiling one layer of {found['layer']} at T = {found['steps']} took {found['first_seconds']:.0f} s. The "
        f"compiled layer took {times['long_compiled']:.1f} ns per element, and the same layer without compiling "
        f"{times['long_eager']:.1f} ns. "
    )
    return {"long": sentence, "long_steps": found["steps"], **times}


def convert_values(report: Report) -> Report:
    """How many times as fast conversion makes layers that take one step per call."""
    every = (each for size in report["sizes"] for each in size["layers"] if each["layer"].endswith("a step a call"))
    return {"stepped": between([each["seconds"]["before"] / each["seconds"]["after"] for each in every], ".1f", ".1f")}


def demo(report: Report) -> list[str]:
    """The lines that the demo printed at its end."""
    return ["```text", *report["printed"], f"({in_words(report['machine'])}, {report['machine']['date']})", "```"]


def learned_values(report: Report) -> Report:
    found = defaults.lost(report)
    return {**found, "lost_cells": f"{found['lost']} settings" if found["lost"] else "no setting"}


def memory(report: Report) -> list[str]:
    rows = [row for name, found in report["networks"].items() for row in memory_rows(name, found)]
    return digest(MEMORY_HEAD, rows, (f"VGG, T = 4: {KEPT}", f"VGG, T = 4: {RECOMPUTED}"))


def spike_layers(report: Report) -> list[str]:
    """The table of spike layers: milliseconds of torch's and of spike layers, and ratios. Networks come first."""
    rows: Rows = []
    for name, found in report["rows"].items():
        cells = []
        for part in ("forward", "step"):
            theirs, ours = (1e3 * each for each in found.get(part, (0.0, 0.0)))
            cells.append(f"{theirs:.3g} / {ours:.3g} = {theirs / ours:.1f}" if ours else "")
        rows.append([name, *cells])
    shown = "network", "stream", "Linear(1024, 1024) [512", *SPARSE_NETWORKS
    first = [row for row in rows if row[0].startswith(shown)]
    head = ["", "forward", "step"]
    others = [row for row in rows if row not in first]
    return [*markdown_table(head, first), "", *folded("Other layers", markdown_table(head, others))]


def spikes_values(report: Report) -> Report:
    """How many times as fast spike layers make whole networks."""
    networks = read_report("end_to_end")

    names = {"evaluations": "evaluation_seconds", "steps_by_spikes": "seconds", "streams_by_spikes": "stream_seconds"}
    return {
        name: between(
            times_faster(networks, time_of(part=part), time_of(SPIKES, part), [f"{PLAIN}{OURS}"]),
            ".1f",
            ".1f",
        )
        for name, part in names.items()
    }


def calibrated(report: Report) -> list[str]:
    """The table of accuracies by calibrated rate, and the differences between usual rates."""
    head, rows = calibration_rows(report)
    usual = [column for column, name in enumerate(head) if name in ("0.05", "0.1", "0.2")]
    apart: dict[bool, list[float]] = {False: [], True: []}
    for row in rows:
        accuracies = [float(row[column]) for column in usual]
        apart["12 layers" in row[0]].append(max(accuracies) - min(accuracies))
    shallow, deep = (between(each, ".1f", ".1f") for each in apart.values())
    return [
        *digest(head, rows, ("digits, 6 layers, SGD", "digits, 6 layers, Adam")),
        "",
        f"The best and the worst accuracy at rates of 0.05, 0.1 and 0.2 are {shallow} points apart in networks of up "
        f"to six layers, and {deep} points in networks of twelve layers.",
    ]


def robustness(report: Report) -> list[str]:
    """The table of mean accuracies over the data sets by width, and a folded one of each set with its deviations."""
    every = folded("Each set, mean ± standard deviation of the seeds", markdown_table(*widths.robustness_rows(report)))
    shown = [f"{optimizer}, rectangle, {arm}" for optimizer in ("SGD", "Adam") for arm in ("SG", "learned")]
    return [*digest(*widths.robustness_summary(report), shown), "", *every]


def robustness_values(report: Report) -> Report:
    sets = dict.fromkeys(key.split()[0] for key in report["runs"])
    return {
        "sets": len(sets),
        "kinds": listed([f"{name} ({SOURCES[name].kind})" for name in sets]),
    }


def width_step(report: Report) -> list[str]:
    """The table of accuracies with the initial width 1, and of the losses with wider ones, by rule."""
    first, *others = widths.CELLS
    base, others = (list(widths.step_rows(report, cells)) for cells in ([first], others))
    rules = [(weights, rule) for weights in ("SGD 0.2", "Adam 0.003") for rule in ("fixed", "Adam 0.03")]
    table = digest(
        widths.STEP_HEAD, base, [", ".join((base[0][0], *each)) for each in rules], "More learning rates and rules"
    )
    return [*table, "", *folded("Other tasks and parameters", markdown_table(widths.STEP_HEAD, others))]


def noisy(report: Report) -> list[str]:
    """The table of accuracies without noise and of the gain of each `analog_prob`, by task, optimizer and surrogate."""
    tasks = ("digits, T = 1, 60 steps", "digits, T = 4, 250 steps", "tones, 250 steps")
    shown = [f"{task}, width 1" for task in tasks]
    lines: list[str] = []
    for arm in list(noise.SHARES)[1:]:
        lines += [f"`analog_prob={arm}`:", "", *digest(noise.HEAD, list(noise.noise_rows(report, arm)), shown), ""]
    controls = markdown_table(noise.HEAD, noise.control_rows(report))
    return [*lines, *folded(f"Controls, gains on {noise.named(noise.CONTROLLED)}", controls)]


def nothing(report: Report) -> list[str]:
    """The body of a section that consists of words alone."""
    return []


def study(rows: Callable[[Report], tuple[list[str], Rows]], *shown: str) -> Callable[[Report], list[str]]:
    """A function that makes the table of a study: all its rows, or only `shown` ones with the others folded."""
    return lambda report: digest(*rows(report), shown) if shown else markdown_table(*rows(report))


# ---- sections ----


class Section(NamedTuple):
    """A generated part of a page: its result file, its table, and its text, with values of the report in braces."""

    file: str
    body: Callable[[Report], list[str]]
    words: str
    values: Callable[[Report], Report] = lambda report: {}


ON = "on {on}, {date}"
LAYER = f"Times of forward and backward together, in nanoseconds per element, {ON}:"
COST = "training runs took {minutes:.0f} minutes on one core:"
STUDIED = f"Each value is the mean over {{seeds}} seeds. {{trainings:,}} {COST}"
FAST = (
    "We timed training steps of seven networks ([five of them](#speed-and-memory) are below) on {threads} threads of "
    "a CPU. We compared the default neurons of asgl_cuda with the neurons of SpikingJelly, snnTorch, Norse and "
    "sinabs. With T = 4 or 8 time steps, a training step with asgl_cuda is {noisy_short} times as fast as with these "
    "libraries. With T = 100, it is {noisy_long} times as fast. We also compiled the neurons of the libraries by "
    "`torch.compile`, and some whole networks. If both were compiled, we took the shorter time. Compared with "
    "compiled SpikingJelly, snnTorch and Norse, a training step with asgl_cuda is {compiled_short} times as fast at T"
    " = 4 and 8. At T = 100 we compiled only a single time step, and only for snnTorch and Norse. Compared with "
    "these, a training step with asgl_cuda is {compiled_long} times as fast."
)
LEARNED = (
    "Layers learn the width of their surrogate gradient together with the weights. We compared the default arguments "
    "with five fixed surrogates in small fully connected networks, in {cells} "
    "[settings](docs/measured.md#the-defaults). The settings differ in the task, the depth, the number of time steps,"
    " the decay, the optimizer and the length of training. In {lost_cells} was the accuracy with the defaults lower "
    "than with the best of the five by more than the 95 % interval of the difference. Results in some of the settings"
    " were used to choose the defaults, so the comparison favours the defaults."
)
STEPS = (
    f"This table shows milliseconds per training step of five networks, in float32 {ON}. A cell with two figures has"
    " the time without `torch.compile`, then the time with it. A dash means that nothing was compiled. The first two "
    "columns are layers of asgl_cuda: *learned, noise* has the default arguments, and *fixed width* has no noise. "
    "*loop* is a loop over time in plain PyTorch. [Measured](docs/measured.md#a-training-step) has the versions, the "
    "batch sizes, what was compiled, and the seconds that compiling took."
)
LAYERS = (
    "This table shows nanoseconds per neuron and time step, for forward and backward of one layer. In each row, T "
    f"times the number of neurons of all samples is {{elements}}. We measured in float32 {ON}. *floor* is the time of "
    "`x * 2` and `x * g`, for an input x and a gradient g. These products move as many bytes as forward and backward "
    "must. Both columns of asgl_cuda have a rectangle as surrogate here, and the libraries have their default "
    "surrogates. A sigmoid takes {sigmoid} ns with a fixed width. In the column *learned, noise*, a fraction {noise} "
    "of the outputs is noisy, while the default is 0.5. [The neuron](#the-neuron) explains noise. The table has no "
    "compiled layers at T = {long_steps}. In another measurement, SpikingJelly's compiled layer took "
    "{long_compiled:.1f} ns with this T. The last row shows the bytes per neuron and time step that are kept for "
    "backward at T = {first_steps}."
)
GAIN = (
    "With `convert`, training steps of networks with SpikingJelly's neurons became {jelly_short} times as fast at T ="
    " 4 and 8, and {jelly_long} times at T = 100. For snnTorch we did not time `sequences` on these networks (the "
    "[tutorial](docs/tutorials/convert-snntorch.md#the-times) times a small one). Instead we wrapped each layer of "
    "snnTorch in asgl_cuda's [`MultiStep`](docs/reference/neurons.md#multistep), which converts the layer and "
    "computes a whole sequence per call. The networks with layers of snnTorch became {snntorch_short} times as fast "
    "at T = 4 and 8, and {snntorch_long} times at T = 100. These figures leave out the network *recurrent speech*, "
    "and compare with the libraries' neurons without `torch.compile`. In converted SpikingJelly networks with "
    "normalisations, `fuse` makes training steps {fused} times as fast as without `fuse`. It does not make "
    "evaluations faster. Evaluations of one sample with one time step per call took {fused_stream} times as long as "
    "before. `fuse` also saves memory: in float32 a normalisation and its neurons then keep {kept:.0f} bytes per "
    "neuron and time step for backward instead of {kept_apart:.0f}. If `fuse` also merges a residual addition, the "
    "residual is kept instead of the sum. This saves memory only where the residual is kept for backward anyway. For "
    "example, the spikes of an identity shortcut are usually also the input of a convolution, which keeps them."
)
LIMITS = (
    "At T = 4 and 8, `convert` alone gains nothing in most networks of SpikingJelly or snnTorch that already use "
    "`torch.compile`. Compared with the compiled networks, training steps became {converted_short} times as fast, and"
    " evaluations {evaluated_short} times. `fuse` can still gain, if it merges normalisations. Without `sequences`, "
    "converted layers that take one time step per call gain less than those that take whole sequences: small layers "
    "became [1.0 to 1.6 times](docs/guides/convert.md#one-step-per-call) as fast, and large ones [{stepped} "
    "times](docs/measured.md#converted-layers)."
)
ARMS = [(optimizer, surrogate) for optimizer in ("SGD", "Adam") for surrogate in ("rectangle", "sigmoid")]
SECTIONS = {
    "fast": Section("end_to_end", nothing, FAST, steps_values),
    "learned": Section("defaults", nothing, LEARNED, learned_values),
    "demo": Section("demo", demo, ""),
    "gain": Section("end_to_end", nothing, GAIN, gain_values),
    "limits": Section("end_to_end", nothing, LIMITS, limits_values),
    "steps": Section("end_to_end", steps, STEPS, steps_values),
    "layers": Section("microbench", layers, LAYERS, layers_values),
    "microbench": Section("microbench", microbench, LAYER),
    "adaptive": Section("microbench_adaptive", adaptive, LAYER),
    "recurrent": Section(
        "recurrent",
        recurrent,
        "Times in milliseconds, float32, on {processor}, torch {torch}, {date}. In the row *asgl_cuda cpu*, {rates} "
        "of the neurons spike per time step. The layers of the other libraries take {faster} times as long as the "
        "layer of asgl_cuda, `RecurrentLIF`. The row *all spike* is `RecurrentLIF` if all neurons spike. With N = "
        "{fewest}, it is then faster: it takes {all_small} times as long as its matrix products alone, and otherwise "
        "{few_small} times. With more neurons it is slower: it takes {all_large} times as long as its products, and "
        "otherwise {few_large} times:",
        recurrent_values,
    ),
    "block": Section(
        "microbench", block, f"Times in nanoseconds per element, for an input of shape `{{blocks[0][shape]}}`, {ON}:"
    ),
    "end_to_end": Section(
        "end_to_end",
        end_to_end,
        f"{{long}}The times are medians, in float32, {ON}:",
        long_values,
    ),
    "memory": Section(
        "memory", memory, f"The batch size is {{batch}} unless a row says otherwise. Measured in float32 {ON}:"
    ),
    "convert": Section(
        "convert",
        study(convert.rows, "spikingjelly LIFNode", "snntorch Leaky in MultiStep", "norse LIF", "sinabs LIF"),
        "The cells are the time before conversion divided by the time after it. A layer that is called once for each "
        "time step (*a step a call*) becomes only {stepped} times as fast, because no kernel can then compute all "
        f"steps at once. Measured with {{elements:,}} elements {ON}:",
        convert_values,
    ),
    "calibration": Section(
        "calibration",
        calibrated,
        f"Accuracy after {{steps}} training steps, averaged over {{seeds}} seeds. {{count}} {COST}",
    ),
    "width_robustness": Section(
        "width_robustness",
        robustness,
        f"Accuracy after {{steps}} training steps, averaged over {{sets}} data sets and {{seeds}} seeds. The data sets "
        f"are {{kinds}}. {{trainings:,}} {COST}",
        robustness_values,
    ),
    "width_step": Section("width_step", width_step, STUDIED),
    "residual_network": Section(
        "residual_network",
        study(residual_rows, *(f"{each}, width 10, {arm}" for each in ("SGD", "Adam") for arm in ("SG", "learned"))),
        "The network has {parameters:,} parameters, T = {time_steps}, and a {surrogate} as surrogate. Each value is "
        f"the mean over {{seeds}} seeds. {{count}} {COST}",
    ),
    "defaults": Section(
        "defaults",
        study(defaults.rows),
        "Each value is the mean over {seeds} seeds. The first learned arm has the defaults of the layers. In {lost} "
        "of {cells} rows it is worse than the best fixed arm by more than the interval. Each other learned arm is "
        "worse by more than the interval in {others} rows, and the {most} is worse most often. In {highest} rows, the "
        "best fixed arm had the highest of its three learning rates, so a still higher rate might be better for it. "
        "The results in some of these rows were used to choose the defaults, "
        "so the comparison favours the defaults. All training runs took {minutes:.0f} "
        "minutes on one core:",
        defaults.lost,
    ),
    "noise": Section("noise", noisy, STUDIED),
    "gradients": Section(
        "gradients",
        study(noise.gradient_rows, *(f"{', '.join(each)}, width 5, step 20" for each in ARMS)),
        "The data set is {data}. Each value is the mean over {seeds} seeds:",
    ),
    "adaptation": Section("adaptation", study(adaptation_rows), STUDIED),
    "spikes": Section(
        "spikes",
        spike_layers,
        "In the networks of [A training step](#a-training-step), with two threads and without noise, evaluations with "
        "spike layers are {evaluations} times as fast as with torch's layers. Training steps are {steps_by_spikes} "
        "times as fast, and streamed steps {streams_by_spikes} times. In the following table, a cell contains the "
        "milliseconds with torch's layers, those with spike layers, and the ratio of the two. Each time is the least "
        f"of several rounds, in float32 {ON}:",
        spikes_values,
    ),
    "sparse": Section("sparse", study(sparse_rows), f"Results after {{steps}} training steps. {{count}} {COST}"),
    "smoothing": Section(
        "smoothing",
        study(
            noise.smoothing_rows,
            *(f"SGD, {each}, width 5, {arm}" for each in ("rectangle", "sigmoid") for arm in ("noise", "no noise")),
        ),
        "Each value is the mean over {seeds} seeds, after {epochs} epochs of training:",
    ),
}


def read_report(name: str) -> Report:
    report: Report = json.loads((RESULTS / f"{name}_cpu.json").read_text())
    return report


def values(report: Report) -> Report:
    """Values that all texts may name: the machine, the settings, the number of training runs and their time."""
    about = report["machine"]
    found = {**about, "on": in_words(about), "processor": processor_in_words(about)}
    found |= {**report, **report.get("settings", {})}
    if "runs" in report:
        found["count"] = len(report["runs"])
        found["trainings"], found["minutes"] = found.get("seeds", 1) * found["count"], found.get("seconds", 0) / 60
    return found


def text_of(section: Section, report: Report) -> str:
    words = section.words.format(**{**values(report), **section.values(report)})
    body = section.body(report)
    return "\n".join([*filter(None, [words]), *([""] if words and body else []), *body])


def pages(texts: dict[Path, str]) -> dict[Path, str]:
    """The pages with regenerated sections, each between `<!-- name -->` and `<!-- /name -->` of exactly one page."""
    found = dict(texts)
    for name, section in SECTIONS.items():
        content = text_of(section, read_report(section.file))
        pattern = re.compile(rf"(<!-- {name} -->)(\n?).*?(<!-- /{name} -->)", re.DOTALL)
        (page,) = (page for page, text in found.items() if pattern.search(text))
        found[page] = pattern.sub(
            lambda match, content=content: f"{match[1]}{match[2]}{content}{match[2]}{match[3]}", found[page]
        )
    return found


def read() -> dict[Path, str]:
    """The committed pages."""
    return {page: page.read_text() for page in PAGES}


def main() -> int:
    """Writes the pages with all generated sections."""
    for page, text in pages(read()).items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
