"""Writes the figures of benchmarks/results into README.md and docs: `python -m benchmarks.readme`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from . import ROOT
from .learning.adaptation import rows as adaptation_rows
from .learning.calibration import summary as calibration_summary
from .learning.data import SOURCES
from .learning.gradients import rows as gradients_rows
from .learning.noise import CONTROLLED, EDGE, QUIET, SHARES, control_head, control_rows, named
from .learning.noise import HEAD as NOISE_HEAD
from .learning.noise import rows as noise_rows
from .learning.residual_network import rows as residual_rows
from .learning.smoothing import rows as smoothing_rows
from .learning.width_robustness import rows as width_rows
from .learning.width_robustness import summary as width_summary
from .learning.width_step import CELLS
from .learning.width_step import HEAD as STEP_HEAD
from .learning.width_step import rows as step_rows
from .speed.end_to_end import FUSED_BLOCK, NEURONS
from .speed.memory import KEPT, RECOMPUTED
from .speed.microbench import COMPILED, FLOOR, LOOP, PAIR, PLAIN, REFERENCE, SIGMOID
from .speed.recurrent import PRODUCTS, WITH_INPUT
from .speed.sizes import LAYOUTS

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md")


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["--:" if i else "---" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def folded(title: str, table: list[str]) -> list[str]:
    """A table that a reader opens."""
    return ["<details>", f"<summary>{title}</summary>", "", *table, "", "</details>"]


def digest(header: list[str], rows: list[list[str]], shown: Collection[str], title: str = "More rows") -> list[str]:
    """The rows whose first cells are those, versions left out, and the others folded."""
    first: list[list[str]] = []
    others: list[list[str]] = []
    for row in rows:
        cells = [re.sub(r" \d+\.\d+\.\d+", "", cell) for cell in row]
        names = {", ".join(cells[:count]) for count in range(1, len(cells))}
        (others if names.isdisjoint(shown) else first).append(row)
    if len(first) != len(shown):
        raise ValueError(f"benchmarks.readme: expected one row each for {shown}, got {[row[0] for row in first]}")
    return [*markdown_table(header, first), "", *folded(title, markdown_table(header, others))]


def nanoseconds(size: dict[str, Any], row: str) -> float | None:
    """The time of an element, forward and backward."""
    timing = size["seconds"].get(row)
    elements = math.prod(size["shape"]) if "shape" in size else size["steps"] * size["neurons"]
    return None if timing is None else 1e9 * timing["both"] / elements


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.{2 if value < 10 else 1}f}"


def power_of_two(value: int) -> str:
    return f"2^{value.bit_length() - 1}" if value & (value - 1) == 0 else str(value)


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


def headline(report: dict[str, Any]) -> str:
    """The layer compared with a multiply and the libraries: time, and bytes kept for backward."""
    about = report["machine"]
    ours = "asgl_cuda cpu"
    compared = [size for size in report["sizes"] if f"{PLAIN}{ours}" in size["seconds"]]
    peers = [name for name in compared[0]["seconds"] if name.startswith(PLAIN)]
    words = {ours: "asgl_cuda, LIF", REFERENCE: "loop in PyTorch"}
    columns = {"two multiplies": FLOOR, "asgl_cuda, ASGL": ours}
    columns |= {words.get(name.removeprefix(PLAIN), name.removeprefix(PLAIN)): name for name in peers}
    rows = []
    for size in compared:
        name = f"T = {size['steps']}, N = {power_of_two(size['neurons'])}"
        rows.append([name, *(number(nanoseconds(size, row)) for row in columns.values())])
    first = compared[0]
    elements = first["steps"] * first["neurons"]
    kept = [first["rows"][row].get("saved_bytes") for row in columns.values()]
    name = f"bytes kept for backward, T = {first['steps']}"
    rows.append([name, *("" if each is None else f"{each / elements:.1f}" for each in kept)])
    gains = [nanoseconds(block, f"{PAIR}{ours}") / nanoseconds(block, ours) for block in report["blocks"]]
    (block,) = (
        each
        for each in report["blocks"]
        if each["dtype"] == "float32" and each["layout"] == LAYOUTS[0] and not each.get("residual")
    )
    kept_by = [block["rows"][name]["saved_bytes"] / math.prod(block["shape"]) for name in (ours, f"{PAIR}{ours}")]
    networks = json.loads((RESULTS / "end_to_end_cpu.json").read_text())["networks"]
    variants = [each["variants"] for each in networks.values() if f"{ours}{FUSED_BLOCK}" in each["variants"]]
    steps = [each[ours]["seconds"] / each[f"{ours}{FUSED_BLOCK}"]["seconds"] for each in variants]
    vgg = json.loads((RESULTS / "memory_cpu.json").read_text())["networks"]["VGG, T = 4"]
    memory, time = (vgg[RECOMPUTED][key] / vgg[KEPT][key] for key in ("kept_bytes", "seconds"))
    products, faster = recurrent_ratios(json.loads((RESULTS / "recurrent_cpu.json").read_text()))
    lines = [
        f"Forward and backward, nanoseconds an element, float32, on {about['processor']}, {about['threads']} threads, "
        f"torch {about['torch']}, {about['date']}. ASGL has noise and a learned width, all others are ordinary LIF. "
        f"{peers_in_words(peers)} `BatchNormLIF` is {min(gains):.2f} to {max(gains):.2f} times faster than "
        "`nn.BatchNorm2d` before `LIF`, by type and layout, a training step of convolutional networks "
        f"{min(steps):.2f} to {max(steps):.2f} times; without a residual it keeps {kept_by[0]:.1f} instead of "
        f"{kept_by[1]:.1f} bytes an element. With `asgl_cuda.recompute_spikes()` backward "
        f"computes spikes again: a VGG-like network keeps {memory:.2f} of its bytes, in {time:.2f} times the time of a "
        f"step. `RecurrentLIF` takes {min(products):.2f} to {max(products):.2f} times the matrix products of its "
        f"recurrence, the recurrent layers of the four libraries {min(faster):.1f} to {max(faster):.0f} times as long "
        "as it. [All measurements](docs/measured.md):",
        "",
        *markdown_table(["", *columns], rows),
    ]
    return "\n".join(lines)


def microbench(report: dict[str, Any]) -> str:
    """ASGL over sizes, then the ordinary neuron of every library."""
    about = report["machine"]
    ours = "asgl_cuda cpu"
    rows = []
    for size in report["sizes"]:
        floor, mine, compiled, reference, loop = (
            nanoseconds(size, name) for name in (FLOOR, ours, COMPILED, REFERENCE, LOOP)
        )
        name = f"T = {size['steps']}, N = {power_of_two(size['neurons'])}, {size['dtype']}"
        rows.append([name, *map(number, (floor, mine, mine / floor, compiled, loop, reference))])
    head = ["", "two multiplies", "asgl_cuda", "times multiplies", "torch.compile", "author's loop", "reference"]
    where = f"{about['processor']}, {about['threads']} threads, {about['instruction_set']}, torch {about['torch']}"
    lines = [
        f"Forward and backward, nanoseconds an element, on {where}, {about['date']}:",
        "",
        *markdown_table(head, rows),
        "",
    ]
    compared = [size for size in report["sizes"] if f"{PLAIN}{ours}" in size["seconds"]]
    names = [name for name in compared[0]["seconds"] if name.startswith(PLAIN)]
    lines += [
        "The same as an ordinary LIF neuron, without noise and learned width, which is what the other libraries have. "
        f"{peers_in_words(names)}",
        "",
    ]
    rows = [[f"T = {size['steps']}", *(number(nanoseconds(size, name)) for name in names)] for size in compared]
    lines += markdown_table(["", *(name.removeprefix(PLAIN) for name in names)], rows)
    calls = report["call_microseconds"]
    noisy = calls[f"{ours} with noise"]
    lines += [
        "",
        f"One call on `[4, 64]` without gradients: {calls[ours]:.1f} µs, with noise {noisy:.1f} µs, "
        f"`x * 2` {calls[FLOOR]:.1f} µs.",
    ]
    return "\n".join(lines)


def adaptive(report: dict[str, Any]) -> str:
    """Every adaptive neuron of every implementation, and as a multiple of LIF's time."""
    about, sizes = report["machine"], report["sizes"]
    lif = f"{PLAIN}asgl_cuda cpu"
    rows, head = [], [""]
    for size in sizes:
        head += [f"T = {size['steps']}, N = {power_of_two(size['neurons'])}", "times LIF"]
    for name in sizes[0]["seconds"]:
        if name == FLOOR:
            continue
        rows.append([name])
        for size in sizes:
            time = nanoseconds(size, name)
            rows[-1] += [number(time), number(time / nanoseconds(size, lif))]
    words = (
        f"Adaptive neurons beside `LIF`, forward and backward, nanoseconds an element, {sizes[0]['dtype']}, on "
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, {about['date']}:"
    )
    shown = ("LIF: asgl_cuda cpu", "ALIF: asgl_cuda cpu", "ALIF: loop", "ALIF: Norse")
    return "\n".join((words, "", *digest(head, rows, shown)))


def recurrent_ratios(report: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The layer's time as a multiple of its products', and the other libraries' as multiples of the layer's."""
    ours, peers = "asgl_cuda cpu", report["machine"]["peers"]
    products, faster = [], []
    for seconds in (size["seconds"] for size in report["sizes"]):
        products.append(seconds[ours] / seconds[PRODUCTS])
        by_input = {end: seconds[f"{ours}{end}"] for end in ("", WITH_INPUT)}
        names = [(f"{peer}{end}", time) for peer in peers for end, time in by_input.items()]
        faster += [seconds[name] / time for name, time in names if name in seconds]
    return products, faster


def recurrent(report: dict[str, Any]) -> str:
    """Every recurrent layer: milliseconds by size and threads, and bytes kept for backward."""
    about, sizes = report["machine"], report["sizes"]
    head = ["", *(f"{size['steps']}, {size['batch']}, {size['neurons']}; {size['threads']}" for size in sizes)]
    last = sizes[-1]
    elements = last["steps"] * last["batch"] * last["neurons"]
    rows = []
    for name in sizes[0]["seconds"]:
        kept = last["saved_bytes"].get(name)
        times = (number(1e3 * size["seconds"][name]) for size in sizes)
        rows.append([name, *times, number(None if kept is None else kept / elements)])
    rates = [size["rate"] for size in sizes]
    words = (
        "Recurrent neurons, forward and backward, milliseconds by T, B, N and number of threads, float32, on "
        f"{about['processor']}, torch {about['torch']}, {about['date']}; {min(rates):.1%} to {max(rates):.1%} of the "
        f"elements spike, except in the row that says so. Layers with *{WITH_INPUT.removeprefix(', ')}* multiply the "
        "input with a weight, too. Last: bytes an element kept for backward at the last size, input and weights "
        "included."
    )
    return "\n".join((words, "", *markdown_table([*head, "kept"], rows)))


def block(report: dict[str, Any]) -> str:
    """Normalisation and neurons as one and as two layers, and the bytes kept for backward."""
    ours = "asgl_cuda cpu"
    names = (FLOOR, ours, f"{PAIR}{ours}", f"{PAIR}{COMPILED}", f"{PAIR}{REFERENCE}")
    rows = []
    for each in report["blocks"]:
        floor, fused, pair, compiled, reference = (nanoseconds(each, name) for name in names)
        kept = (each["rows"][name]["saved_bytes"] / math.prod(each["shape"]) for name in (ours, f"{PAIR}{ours}"))
        layout = "" if each["layout"] == LAYOUTS[0] else f", {each['layout']}"
        rows.append(
            [
                f"{each['dtype']}{layout}{', residual' if each.get('residual') else ''}",
                *map(number, (floor, fused, pair, compiled, reference)),
                *map(number, (fused / floor, pair / fused, reference / fused)),
                *map(number, kept),
            ]
        )
    shape = report["blocks"][0]["shape"]
    assert all(each["shape"] == shape for each in report["blocks"])
    has_residual = any(each.get("residual") for each in report["blocks"])
    more = ", 44 with a residual added between the two" if has_residual else ""
    head = ["", "floor", "fused", "pair", "pair, torch.compile", "pair, reference"]
    head += ["times floor", "faster than pair", "than reference", "kept, fused", "kept, pair"]
    return "\n".join(
        (
            f"Batch normalisation and noisy neurons in training, `{shape}`, forward and backward, nanoseconds an "
            "element, on the same machine: fused, and as a pair of `nn.BatchNorm2d` and the neurons. The floor, a sum "
            f"and three multiplies, moves what the fused one must move, 36 bytes an element in float32{more}. "
            "Kept: bytes an element, for backward.",
            "",
            *markdown_table(head, rows),
        )
    )


def end_to_end(report: dict[str, Any]) -> str:
    """Milliseconds of a training step and the share of the neuron layers, by network and variant."""
    widest_first = sorted(report["networks"].values(), key=lambda each: len(each["variants"]), reverse=True)
    variants = list(dict.fromkeys(name for each in widest_first for name in each["variants"]))
    rows = []
    for variant in variants:
        cells = []
        for network in report["networks"].values():
            found = network["variants"].get(variant)
            cells.append("" if found is None else f"{1e3 * found['seconds']:.0f} ms, {found['shares'][NEURONS]:.0%}")
        rows.append([variant, *cells])
    heads = [f"{name}, {report['networks'][name]['input_shape']}" for name in report["networks"]]
    return "\n".join(
        (
            "A whole training step, and the share of the neuron layers in it, on the same machine; in a fused block "
            "the share includes the batch normalisations:",
            "",
            *digest(["", *heads], rows, (f"{PLAIN}asgl_cuda cpu", f"{PLAIN}SpikingJelly")),
        )
    )


def memory(report: dict[str, Any]) -> str:
    """Bytes and time of each network and variant, against the first."""
    about = report["machine"]
    rows = []
    for network, found in report["networks"].items():
        base = found[KEPT]
        for variant, each in found.items():
            shares = [f"{each[key] / base[key]:.2f}" for key in ("kept_bytes", "peak_bytes", "seconds")]
            values = [f"{each['kept_bytes'] / 1e6:.0f} MB", f"{each['peak_bytes'] / 1e6:.0f} MB"]
            values.append(f"{1e3 * each['seconds']:.0f} ms")
            rows.append([f"{network}: {variant}", *map("{}, {}".format, values, shares)])
    lines = [
        f"Kept for backward, peak and time of a step, batch {report['batch']} unless said, float32, and as shares "
        f"of the first variant's; on {about['processor']}, {about['threads']} threads, torch {about['torch']}, "
        f"{about['date']}:",
        "",
        *digest(["", "kept", "peak", "step"], rows, (f"VGG, T = 4: {KEPT}", f"VGG, T = 4: {RECOMPUTED}")),
    ]
    return "\n".join(lines)


def smoothing(report: dict[str, Any]) -> str:
    """Width and smoothing error, means over the layers, and both losses, at the start and at the end."""
    words = (
        f"Over {report['epochs']} epochs on handwritten digits, means over the layers and {report['seeds']} seeds, "
        "± standard deviation of the seeds:"
    )
    shown = [
        f"SGD, {surrogate}, width 5, {arm}" for surrogate in ("rectangle", "sigmoid") for arm in ("noise", "no noise")
    ]
    return "\n".join((words, "", *digest(*smoothing_rows(report), shown)))


def width_robustness(report: dict[str, Any]) -> str:
    """Mean accuracy over the sets by width; and, folded, each set with the deviations over the seeds."""
    about = report["settings"]
    seeds, rates = about["seeds"], about["rates"]
    names = dict.fromkeys(key.split()[0] for key in report["runs"])
    kinds = ", ".join(f"{name} ({SOURCES[name].kind})" for name in names)
    trainings = ", ".join(f"{name} at {rate:g}" for name, rate in rates.items())
    words = (
        f"Test accuracy in percent over the width at the start after {about['steps']} steps, mean of {kinds} and "
        f"{seeds} seeds; {trainings}. {seeds * len(report['runs']):,} trainings took {report['seconds'] / 60:.0f} "
        "minutes of one core:"
    )
    every = folded("Each set, mean ± standard deviation of the seeds", markdown_table(*width_rows(report)))
    shown = [f"{optimizer}, rectangle, {arm}" for optimizer in rates for arm in ("SG", "learned")]
    return "\n".join((words, "", *digest(*width_summary(report), shown), "", *every))


def width_step(report: dict[str, Any]) -> str:
    """Accuracies from width 1 and losses from wider starts, by rule."""
    seeds = report["settings"]["seeds"]
    words = (
        f"Test accuracy in percent from a first width of 1, mean of {seeds} seeds, and what wider starts lose against "
        f"it, with 95 % intervals. {seeds * len(report['runs']):,} trainings took {report['seconds'] / 60:.0f} minutes "
        "of one core:"
    )
    first, *others = CELLS
    base, others = (list(step_rows(report, cells)) for cells in ([first], others))
    shown = [
        f"{base[0][0]}, {weights}, {rule}" for weights in ("SGD 0.2", "Adam 0.003") for rule in ("fixed", "Adam 0.03")
    ]
    table = digest(STEP_HEAD, base, shown, "More learning rates and rules")
    return "\n".join((words, "", *table, "", *folded("Other tasks and parameters", markdown_table(STEP_HEAD, others))))


def residual_network(report: dict[str, Any]) -> str:
    """Accuracies after some epochs, by optimizer, first width and arm."""
    about = report["settings"]
    words = (
        f"Test accuracy in percent on mnist of a residual network of nine convolutions ({about['parameters']:,} "
        f"parameters, T = {about['time_steps']}, {about['surrogate']}), mean of {about['seeds']} seeds (least to "
        f"most). {len(report['runs'])} trainings took {report['seconds'] / 60:.0f} minutes of one core:"
    )
    shown = [f"{optimizer}, width 10, {arm}" for optimizer in ("SGD", "Adam") for arm in ("SG", "learned")]
    return "\n".join((words, "", *digest(*residual_rows(report), shown)))


def noise(report: dict[str, Any]) -> str:
    """Accuracy of learned widths without noise and the gain of each share, by task, optimizer and surrogate."""
    seeds = report["settings"]["seeds"]
    lines = [
        "Test accuracy in percent of learned widths without noise at the learning rate that validation chose, mean of "
        f"{seeds} seeds, and what a share of analog elements gains on it, at its own rate, with 95 % intervals;"
        f"{EDGE}: one of the two chose the least or the largest rate. {seeds * len(report['runs']):,} trainings took "
        f"{report['seconds'] / 60:.0f} minutes of one core.",
    ]
    for arm in SHARES:
        if arm != QUIET:
            shown = (
                "digits, T = 1, 60 steps, width 1",
                "digits, T = 4, 250 steps, width 1",
                "tones, 250 steps, width 1",
            )
            lines += ["", f"`analog_prob={arm}`:", "", *digest(NOISE_HEAD, list(noise_rows(report, arm)), shown)]
    controls = markdown_table(control_head(), list(control_rows(report)))
    return "\n".join((*lines, "", *folded(f"Controls, gains on {named(CONTROLLED)}", controls)))


def gradients(report: dict[str, Any]) -> str:
    """Measured by predicted changes of the loss."""
    words = (
        f"Measured by predicted change of the loss on {report['data']}, means of {report['seeds']} seeds, and by how "
        "much noise changes the distance from 1, with 95 % intervals of paired differences:"
    )
    kinds = [(optimizer, surrogate) for optimizer in ("SGD", "Adam") for surrogate in ("rectangle", "sigmoid")]
    shown = [f"{optimizer}, {surrogate}, width 5, step 20" for optimizer, surrogate in kinds]
    return "\n".join((words, "", *digest(*gradients_rows(report), shown)))


def adaptation(report: dict[str, Any]) -> str:
    """Accuracies by neuron and task."""
    seeds = report["settings"]["seeds"]
    words = (
        f"Test accuracy in percent, mean of {seeds} seeds (least to most). {seeds * len(report['runs'])} trainings "
        f"took {report['seconds'] / 60:.0f} minutes of one core:"
    )
    return "\n".join((words, "", *markdown_table(*adaptation_rows(report))))


def convert(report: dict[str, Any]) -> str:
    """Speedups by layer and steps."""
    names = [f"{each['library']} {each['layer']}" for each in report["sizes"][0]["layers"]]
    rows = []
    for number, name in enumerate(names):
        timings = [size["layers"][number]["seconds"] for size in report["sizes"]]
        rows.append([name, *(f"{each['before'] / each['after']:.1f}" for each in timings)])
    head = [f"T = {size['steps']}" for size in report["sizes"]]
    return "\n".join(
        (
            f"How many times faster the layers are, forward and backward, on {report['elements']:,} elements, "
            f"{report['machine']['processor']}, {report['machine']['threads']} threads, {report['machine']['date']}:",
            "",
            *digest(
                ["", *head], rows, ("spikingjelly LIFNode", "snntorch Leaky in MultiStep", "norse LIF", "sinabs LIF")
            ),
        )
    )


def calibration(report: dict[str, Any]) -> str:
    """Accuracies by the calibrated rate."""
    head, rows = calibration_summary(report)
    settings = report["settings"]
    usual = [column for column, name in enumerate(head) if name in ("0.05", "0.1", "0.2")]
    deep: list[float] = []
    shallow: list[float] = []
    for row in rows:
        accuracies = [float(row[column]) for column in usual]
        (deep if "12 layers" in row[0] else shallow).append(max(accuracies) - min(accuracies))
    return "\n".join(
        (
            f"Test accuracy in percent after {settings['steps']} steps, means of {settings['seeds']} seeds, as the "
            f"network was made and calibrated to a rate. {len(report['runs'])} trainings took "
            f"{report['seconds'] / 60:.0f} minutes:",
            "",
            *digest(head, rows, ("digits, 6 layers, SGD", "digits, 6 layers, Adam")),
            "",
            f"Among 0.05, 0.1 and 0.2 the best and the worst rate are {min(shallow):.1f} to {max(shallow):.1f} points "
            f"apart at up to six layers, {min(deep):.1f} to {max(deep):.1f} at twelve.",
        )
    )


MAKERS = {
    "headline": ("microbench", headline),
    "microbench": ("microbench", microbench),
    "adaptive": ("microbench_adaptive", adaptive),
    "recurrent": ("recurrent", recurrent),
    "block": ("microbench", block),
    "end_to_end": ("end_to_end", end_to_end),
    "memory": ("memory", memory),
    "smoothing": ("smoothing", smoothing),
    "width_robustness": ("width_robustness", width_robustness),
    "width_step": ("width_step", width_step),
    "residual_network": ("residual_network", residual_network),
    "noise": ("noise", noise),
    "gradients": ("gradients", gradients),
    "adaptation": ("adaptation", adaptation),
    "calibration": ("calibration", calibration),
    "convert": ("convert", convert),
}


def sections() -> Iterator[tuple[str, str]]:
    """Names, and the text between `<!-- name -->` and `<!-- /name -->`."""
    for name, (file, make) in MAKERS.items():
        yield name, make(json.loads((RESULTS / f"{file}_cpu.json").read_text()))


def pages(texts: dict[Path, str]) -> dict[Path, str]:
    """The pages with regenerated sections; each section is in exactly one page."""
    found = dict(texts)
    for name, content in sections():
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
