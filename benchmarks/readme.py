"""Writes the figures of benchmarks/results into README.md and docs: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import ROOT
from .common import in_words, processor_in_words
from .learning import noise, widths
from .learning.data import SOURCES
from .learning.neurons import adaptation_rows, calibration_rows, residual_rows
from .speed import convert
from .speed.end_to_end import FUSED_BLOCK, NEURONS
from .speed.memory import HEAD as MEMORY_HEAD
from .speed.memory import KEPT, RECOMPUTED
from .speed.memory import rows as memory_rows
from .speed.microbench import COMPILED, FLOOR, LOOP, PAIR, PLAIN, REFERENCE, SIGMOID
from .speed.recurrent import PRODUCTS, WITH_INPUT
from .speed.sizes import LAYOUTS

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md")
OURS = "asgl_cuda cpu"
Report = dict[str, Any]
Rows = list[list[str]]


# ---- tables ----


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["--:" if i else "---" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def folded(title: str, table: list[str]) -> list[str]:
    """A table that a reader opens."""
    return ["<details>", f"<summary>{title}</summary>", "", *table, "", "</details>"]


def digest(header: Sequence[str], rows: Rows, shown: Collection[str], title: str = "More rows") -> list[str]:
    """The rows whose first cells are those, versions left out, and the others folded."""
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


def between(values: list[float], first: str = ".2f", last: str = ".2f") -> str:
    return f"{min(values):{first}} to {max(values):{last}}"


def power_of_two(value: int) -> str:
    return f"2^{value.bit_length() - 1}" if value & (value - 1) == 0 else str(value)


def named(size: Report) -> str:
    return f"T = {size['steps']}, N = {power_of_two(size['neurons'])}"


# ---- measurements of a layer ----


def elements(size: Report) -> int:
    return math.prod(size["shape"]) if "shape" in size else size["steps"] * size["neurons"]


def nanoseconds(size: Report, row: str) -> float | None:
    """The time of an element, forward and backward."""
    timing = size["seconds"].get(row)
    return None if timing is None else 1e9 * timing["both"] / elements(size)


def kept_bytes(size: Report, row: str) -> float | None:
    saved = size["rows"][row]["saved_bytes"]
    return None if saved is None else saved / elements(size)


def compared(report: Report) -> tuple[list[Report], list[str]]:
    """The sizes with rows of the ordinary neuron, and these rows."""
    sizes = [size for size in report["sizes"] if f"{PLAIN}{OURS}" in size["seconds"]]
    return sizes, [name for name in sizes[0]["seconds"] if name.startswith(PLAIN)]


def peers_in_words(rows: Collection[str]) -> str:
    """How the ordinary neurons of the rows differ, and what is not among them."""
    sigmoid = ", and with a sigmoid" if any(SIGMOID in name for name in rows) else ""
    end = f", {COMPILED}"
    compiled = [name.removeprefix(PLAIN).removesuffix(end) for name in rows if name.endswith(end)]
    under = f"{' and '.join(compiled)} alone is" if compiled else "none is"
    return (
        "Surrogates differ: the other libraries have their defaults, asgl_cuda is measured with a rectangle, which "
        f"costs little{sigmoid}. Backends that others have for GPUs are not shown, and {under} shown under "
        "torch.compile."
    )


def headline(report: Report) -> list[str]:
    """The layer compared with a multiply and the libraries: time, and bytes kept for backward."""
    sizes, peers = compared(report)
    words = {OURS: "asgl_cuda, LIF", REFERENCE: "loop in PyTorch"}
    columns = {"two multiplies": FLOOR, "asgl_cuda, ASGL": OURS}
    columns |= {words.get(name.removeprefix(PLAIN), name.removeprefix(PLAIN)): name for name in peers}
    rows = [[named(size), *(number(nanoseconds(size, row)) for row in columns.values())] for size in sizes]
    kept = (kept_bytes(sizes[0], row) for row in columns.values())
    name = f"bytes kept for backward, T = {sizes[0]['steps']}"
    rows.append([name, *("" if each is None else f"{each:.1f}" for each in kept)])
    return markdown_table(["", *columns], rows)


def headline_values(report: Report) -> Report:
    blocks = report["blocks"]
    gains = [block["seconds"][f"{PAIR}{OURS}"]["both"] / block["seconds"][OURS]["both"] for block in blocks]
    plain = {"dtype": "float32", "layout": LAYOUTS[0], "residual": False}
    (block,) = (each for each in blocks if plain.items() <= each.items())
    networks = [each["variants"] for each in read_report("end_to_end")["networks"].values()]
    fused = [each for each in networks if f"{OURS}{FUSED_BLOCK}" in each]
    vgg = read_report("memory")["networks"]["VGG, T = 4"]
    products, faster = recurrent_ratios(read_report("recurrent"))
    return {
        "peers": peers_in_words(compared(report)[1]),
        "gains": between(gains),
        "steps": between([each[OURS]["seconds"] / each[f"{OURS}{FUSED_BLOCK}"]["seconds"] for each in fused]),
        "kept": kept_bytes(block, OURS),
        "kept_apart": kept_bytes(block, f"{PAIR}{OURS}"),
        **{
            name: vgg[RECOMPUTED][key] / vgg[KEPT][key] for name, key in (("memory", "kept_bytes"), ("time", "seconds"))
        },
        "products": between(products),
        "faster": between(faster, ".1f", ".0f"),
    }


def microbench(report: Report) -> list[str]:
    """ASGL over sizes, then the ordinary neuron of every library."""
    rows = []
    for size in report["sizes"]:
        floor, mine, *others = (nanoseconds(size, name) for name in (FLOOR, OURS, COMPILED, LOOP, REFERENCE))
        rows.append([f"{named(size)}, {size['dtype']}", *map(number, (floor, mine, mine / floor, *others))])
    head = ["", "two multiplies", "asgl_cuda", "times multiplies", "torch.compile", "author's loop", "reference"]
    sizes, peers = compared(report)
    plain = [[f"T = {size['steps']}", *(number(nanoseconds(size, name)) for name in peers)] for size in sizes]
    calls = report["call_microseconds"]
    return [
        *markdown_table(head, rows),
        "",
        "The same as an ordinary LIF neuron, without noise and learned width, which is what the other libraries have. "
        f"{peers_in_words(peers)}",
        "",
        *markdown_table(["", *(name.removeprefix(PLAIN) for name in peers)], plain),
        "",
        f"One call on `[4, 64]` without gradients: {calls[OURS]:.1f} µs, with noise {calls[f'{OURS} with noise']:.1f} "
        f"µs, `x * 2` {calls[FLOOR]:.1f} µs.",
    ]


def adaptive(report: Report) -> list[str]:
    """Every adaptive neuron of every implementation, and as a multiple of LIF's time."""
    sizes = report["sizes"]
    rows = []
    for name in sizes[0]["seconds"]:
        times = [(nanoseconds(size, name), nanoseconds(size, f"{PLAIN}{OURS}")) for size in sizes]
        rows.append([name, *(number(each) for time, lif in times for each in (time, time / lif))])
    head = ["", *(cell for size in sizes for cell in (named(size), "times LIF"))]
    shown = ("LIF: asgl_cuda cpu", "ALIF: asgl_cuda cpu", "ALIF: loop", "ALIF: Norse")
    return digest(head, [row for row in rows if row[0] != FLOOR], shown)


def block(report: Report) -> list[str]:
    """Normalisation and neurons as one and as two layers, and the bytes kept for backward."""
    names = (FLOOR, OURS, f"{PAIR}{OURS}", f"{PAIR}{COMPILED}", f"{PAIR}{REFERENCE}")
    rows = []
    for each in report["blocks"]:
        times = floor, fused, pair, _, reference = [nanoseconds(each, name) for name in names]
        kept = (kept_bytes(each, name) for name in (OURS, f"{PAIR}{OURS}"))
        layout = "" if each["layout"] == LAYOUTS[0] else f", {each['layout']}"
        name = f"{each['dtype']}{layout}{', residual' if each['residual'] else ''}"
        rows.append([name, *map(number, (*times, fused / floor, pair / fused, reference / fused, *kept))])
    head = ["", "floor", "fused", "pair", "pair, torch.compile", "pair, reference"]
    head += ["times floor", "faster than pair", "than reference", "kept, fused", "kept, pair"]
    return markdown_table(head, rows)


def recurrent_ratios(report: Report) -> tuple[list[float], list[float]]:
    """The layer's time as a multiple of its products', and the other libraries' as multiples of the layer's."""
    products, faster = [], []
    for seconds in (size["seconds"] for size in report["sizes"]):
        products.append(seconds[OURS] / seconds[PRODUCTS])
        for end in ("", WITH_INPUT):
            names = (f"{peer}{end}" for peer in report["machine"]["peers"])
            faster += [seconds[name] / seconds[f"{OURS}{end}"] for name in names if name in seconds]
    return products, faster


def recurrent(report: Report) -> list[str]:
    """Every recurrent layer: milliseconds by size and threads, and bytes kept for backward."""
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


def end_to_end(report: Report) -> list[str]:
    """Milliseconds of a training step and the share of the neuron layers, by network and variant."""
    networks = report["networks"]
    widest_first = sorted(networks.values(), key=lambda each: len(each["variants"]), reverse=True)
    rows = []
    for variant in dict.fromkeys(name for each in widest_first for name in each["variants"]):
        found = (network["variants"].get(variant) for network in networks.values())
        cells = (f"{1e3 * each['seconds']:.0f} ms, {each['shares'][NEURONS]:.0%}" if each else "" for each in found)
        rows.append([variant, *cells])
    head = ["", *(f"{name}, {each['input_shape']}" for name, each in networks.items())]
    return digest(head, rows, (f"{PLAIN}{OURS}", f"{PLAIN}SpikingJelly", f"{PLAIN}snnTorch"))


def memory(report: Report) -> list[str]:
    rows = [row for name, found in report["networks"].items() for row in memory_rows(name, found)]
    return digest(MEMORY_HEAD, rows, (f"VGG, T = 4: {KEPT}", f"VGG, T = 4: {RECOMPUTED}"))


def calibrated(report: Report) -> list[str]:
    """Accuracies by the calibrated rate, and how far usual rates are apart."""
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
        f"Among 0.05, 0.1 and 0.2 the best and the worst rate are {shallow} points apart at up to six layers, {deep} "
        "at twelve.",
    ]


def robustness(report: Report) -> list[str]:
    """Mean accuracy over the sets by width; and, folded, each set with the deviations over the seeds."""
    every = folded("Each set, mean ± standard deviation of the seeds", markdown_table(*widths.robustness_rows(report)))
    shown = [f"{optimizer}, rectangle, {arm}" for optimizer in ("SGD", "Adam") for arm in ("SG", "learned")]
    return [*digest(*widths.robustness_summary(report), shown), "", *every]


def robustness_values(report: Report) -> Report:
    sets = dict.fromkeys(key.split()[0] for key in report["runs"])
    return {
        "kinds": ", ".join(f"{name} ({SOURCES[name].kind})" for name in sets),
        "optimizers": ", ".join(f"{name} at {rate:g}" for name, rate in report["settings"]["rates"].items()),
    }


def width_step(report: Report) -> list[str]:
    """Accuracies from width 1 and losses from wider starts, by rule."""
    first, *others = widths.CELLS
    base, others = (list(widths.step_rows(report, cells)) for cells in ([first], others))
    rules = [(weights, rule) for weights in ("SGD 0.2", "Adam 0.003") for rule in ("fixed", "Adam 0.03")]
    table = digest(
        widths.STEP_HEAD, base, [", ".join((base[0][0], *each)) for each in rules], "More learning rates and rules"
    )
    return [*table, "", *folded("Other tasks and parameters", markdown_table(widths.STEP_HEAD, others))]


def noisy(report: Report) -> list[str]:
    """Accuracy of learned widths without noise and the gain of each share, by task, optimizer and surrogate."""
    tasks = ("digits, T = 1, 60 steps", "digits, T = 4, 250 steps", "tones, 250 steps")
    shown = [f"{task}, width 1" for task in tasks]
    lines: list[str] = []
    for arm in list(noise.SHARES)[1:]:
        lines += [f"`analog_prob={arm}`:", "", *digest(noise.HEAD, list(noise.noise_rows(report, arm)), shown), ""]
    controls = markdown_table(noise.HEAD, noise.control_rows(report))
    return [*lines, *folded(f"Controls, gains on {noise.named(noise.CONTROLLED)}", controls)]


def study(rows: Callable[[Report], tuple[list[str], Rows]], *shown: str) -> Callable[[Report], list[str]]:
    """The table of a study, all of it or, of its rows, those that are shown first."""
    return lambda report: digest(*rows(report), shown) if shown else markdown_table(*rows(report))


# ---- sections ----


class Section(NamedTuple):
    """A part of a page: its result file, what it shows, and a line about that, with values of the report in braces."""

    file: str
    body: Callable[[Report], list[str]]
    words: str
    values: Callable[[Report], Report] = lambda report: {}


ON = "on {on}, {date}"
LAYER = f"Forward and backward, nanoseconds an element, {ON}:"
COST = "trainings took {minutes:.0f} minutes of one core:"
STUDIED = f"Mean of {{seeds}} seeds; {{trainings:,}} {COST}"
HEADLINE = (
    f"Forward and backward, nanoseconds an element, float32, {ON}. ASGL has noise and a learned width, all others are "
    "ordinary LIF. {peers} `BatchNormLIF` is {gains} times faster than `nn.BatchNorm2d` before `LIF`, by type and "
    "layout, a training step of convolutional networks {steps} times; without a residual it keeps {kept:.1f} instead "
    "of {kept_apart:.1f} bytes an element. With `asgl_cuda.recompute_spikes()` backward computes spikes again: a "
    "VGG-like network keeps {memory:.2f} of its bytes, in {time:.2f} times the time of a step. `RecurrentLIF` takes "
    "{products} times the matrix products of its recurrence, the recurrent layers of the four libraries {faster} times "
    "as long as it. [All measurements](docs/measured.md):"
)
ARMS = [(optimizer, surrogate) for optimizer in ("SGD", "Adam") for surrogate in ("rectangle", "sigmoid")]
SECTIONS = {
    "headline": Section("microbench", headline, HEADLINE, headline_values),
    "microbench": Section("microbench", microbench, LAYER),
    "adaptive": Section("microbench_adaptive", adaptive, LAYER),
    "recurrent": Section(
        "recurrent",
        recurrent,
        "Milliseconds, float32, on {processor}, torch {torch}, {date}; {rates} of elements spike, except in one row:",
        lambda report: {"rates": between([size["rate"] for size in report["sizes"]], ".1%", ".1%")},
    ),
    "block": Section("microbench", block, f"`{{blocks[0][shape]}}`, nanoseconds an element, {ON}:"),
    "end_to_end": Section("end_to_end", end_to_end, f"Milliseconds of a step, share of the neurons, {ON}:"),
    "memory": Section("memory", memory, f"Batch {{batch}} unless said, float32, {ON}:"),
    "convert": Section(
        "convert",
        study(convert.rows, "spikingjelly LIFNode", "snntorch Leaky in MultiStep", "norse LIF", "sinabs LIF"),
        f"Times faster, {{elements:,}} elements, {ON}:",
    ),
    "calibration": Section(
        "calibration", calibrated, f"After {{steps}} steps, mean of {{seeds}} seeds; {{count}} {COST}"
    ),
    "width_robustness": Section(
        "width_robustness",
        robustness,
        f"After {{steps}} steps, mean of {{kinds}} and {{seeds}} seeds; {{optimizers}}. {{trainings:,}} {COST}",
        robustness_values,
    ),
    "width_step": Section("width_step", width_step, STUDIED),
    "residual_network": Section(
        "residual_network",
        study(residual_rows, *(f"{each}, width 10, {arm}" for each in ("SGD", "Adam") for arm in ("SG", "learned"))),
        f"{{parameters:,}} parameters, T = {{time_steps}}, {{surrogate}}, {{seeds}} seeds; {{count}} {COST}",
    ),
    "noise": Section("noise", noisy, STUDIED),
    "gradients": Section(
        "gradients",
        study(noise.gradient_rows, *(f"{', '.join(each)}, width 5, step 20" for each in ARMS)),
        "On {data}, means of {seeds} seeds:",
    ),
    "adaptation": Section("adaptation", study(adaptation_rows), STUDIED),
    "smoothing": Section(
        "smoothing",
        study(
            noise.smoothing_rows,
            *(f"SGD, {each}, width 5, {arm}" for each in ("rectangle", "sigmoid") for arm in ("noise", "no noise")),
        ),
        "Over {epochs} epochs, {seeds} seeds:",
    ),
}


def read_report(name: str) -> Report:
    report: Report = json.loads((RESULTS / f"{name}_cpu.json").read_text())
    return report


def values(report: Report) -> Report:
    """What words may name: the machine, the settings, and the number of trainings and their time."""
    about = report["machine"]
    found = {**about, "on": in_words(about), "processor": processor_in_words(about)}
    found |= {**report, **report.get("settings", {})}
    if "runs" in report:
        found["count"] = len(report["runs"])
        found["trainings"], found["minutes"] = found["seeds"] * found["count"], found.get("seconds", 0) / 60
    return found


def text_of(section: Section, report: Report) -> str:
    words = section.words.format(**{**values(report), **section.values(report)})
    return "\n".join((words, "", *section.body(report)))


def pages(texts: dict[Path, str]) -> dict[Path, str]:
    """The pages with regenerated sections, each between `<!-- name -->` and `<!-- /name -->` of exactly one page."""
    found = dict(texts)
    for name, section in SECTIONS.items():
        content = text_of(section, read_report(section.file))
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        (page,) = (page for page, text in found.items() if pattern.search(text))
        found[page] = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", found[page])
    return found


def read() -> dict[Path, str]:
    """The committed pages."""
    return {page: page.read_text() for page in PAGES}


def main() -> int:
    """Writes the pages."""
    for page, text in pages(read()).items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
