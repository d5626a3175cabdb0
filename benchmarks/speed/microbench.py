"""Time of one neuron layer, forward and backward, measured against an element-wise multiply in the same run.

The multiply is the floor: `x * 2` reads x and writes the result as forward must, `x * g` reads two tensors and writes
one as backward must. Compared with it: the neuron of ASGL in every backend, as the reference and as a loop in plain
PyTorch, and the ordinary LIF neuron, which the other libraries have as well, each with its default surrogate and one
under torch.compile, and with integer spikes. All rows take turns within each repeat, so that a drift of the machine's
speed affects all alike; the median over the repeats is reported. The spikes of peers are compared with ours before they
are timed. `--sweep adaptive`: adaptive neurons beside LIF, and as a loop under torch.compile.

A block is batch normalisation and ASGL neurons in training: fused, `asgl_cuda.BatchNormLIF`, or as the pair of
`torch.nn.BatchNorm2d` and the neurons. The fused block accesses an element nine times, 36 bytes in float32, as does its
floor, in the same order: forward is `x.sum()`, which reads x as the statistics must (4), and `x * 2` (8), backward
`x * g` (12) and a multiply of the result with x, in place (12). Copies of x and g, 16 bytes together, show the speed of
memory.

In a residual block r is added between the two, by `BatchNormLIF(x, r)` or apart. The fused one accesses an element
eleven times, and so does its floor: `x.sum()` and `x + r`, then `torch.addcmul(x, r, g)` and the same multiply.

On a GPU the time is the device's, between two CUDA events, while the host runs ahead. Several inputs take turns, up to
16, so that they come from memory rather than the cache, as in a network.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import asgl_cuda
from asgl_cuda import OverTime
from asgl_cuda.selfcheck import THRESHOLD_BAND

from .. import palette
from ..common import device_of, fused_backends, in_time, in_words, parser_of, write_json
from . import host
from .clocks import (
    PARTS,
    CpuClock,
    GpuClock,
    Row,
    Sample,
    clock_of,
    in_turns,
    keep_memory,
    peak_bytes,
    saved_storages,
    spread,
)
from .peers import (
    ADLIF,
    ALIF,
    DECAY,
    Peer,
    adaptive_loop,
    adaptive_peers,
    adaptive_step,
    asgl_loop,
    installed_peers,
    machine_and_peers,
)
from .rates import measured_rates
from .sizes import DTYPES, HOST, LAYOUTS, SWEEPS, Block, Size, samples, sweep, usual_sizes

ANALOG_PROB = 0.2
FLOOR = "multiply"
COPY = "copy"
YARDSTICKS = (FLOOR, COPY)
REFERENCE = "reference"
COMPILED = "torch.compile"
LOOP = "author's loop"
PLAIN = "LIF: "  # prefix of rows without noise and learned width
INTEGER = "I-LIF: "  # the same with integer spikes
# The same with adaptation, in the current and in the threshold.
ADAPTIVE = {"adLIF: ": ADLIF, "ALIF: ": ALIF}
PLAIN_LOOP = "loop"
SIGMOID = ", sigmoid"  # suffix of a row with that surrogate: the default, a rectangle, costs less than most of peers'
COMPILED_PEER = "snnTorch"  # compiles in seconds, to the fastest; Norse and sinabs do not compile as one graph
COMPILED_STEP = "compiled step"  # the loop, with one step compiled
PAIR = "pair: "  # prefix of blocks that are not fused
# Beyond this many steps the compiler unrolls for minutes.
MOST_STEPS_TO_COMPILE = 16
# Autograd keeps some fifteen float32 tensors of the reference; the gradients take the rest.
REFERENCE_BYTES_AN_ELEMENT = 100


class Timing(NamedTuple):
    """Median seconds of one row."""

    forward: float
    backward: float
    both: float


class Measurement(NamedTuple):
    """The measurements of one row."""

    timing: Timing
    spread: float  # half the interquartile range of `both`, as a share of its median
    saved_bytes: int | None
    peak_bytes: int | None
    first_seconds: float  # first call, forward and backward


class Pair(nn.Sequential):
    """A normalisation and neurons apart, with a residual added between the two."""

    def forward(self, x_seq: Tensor, residual: Tensor | None = None) -> Tensor:
        norm, neurons = self
        x_seq = norm(x_seq)
        spikes: Tensor = neurons(x_seq if residual is None else x_seq + residual)
        return spikes


def row_of(name: str, function: Callable[..., Tensor], *parameters: Tensor) -> Row:
    """A layer, with gradients of its inputs and parameters."""

    def backward(sample: Sample, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (*sample.leaves, *parameters), sample.grad, retain_graph=True)

    return Row(name, lambda sample: function(*sample.leaves), backward)


def reset_compiler() -> None:
    """For one size alone: after another size the compiler would make sizes dynamic."""
    # Backward is timed alone, and repeated: it must keep its buffers.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()


def compiled_rows(
    size: Size | Block,
    name: str,
    function: Callable[..., Tensor],
    *parameters: Tensor,
    modes: Sequence[str | None] = (None,),
) -> Iterator[Row]:
    """The layer under torch.compile, in each of the modes; None is the default."""
    if not size.compiled or size.steps > MOST_STEPS_TO_COMPILE:
        return
    for mode in modes:
        compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
        yield row_of(name if mode is None else f"{name} max-autotune", compiled, *parameters)


def reference_fits(size: Size | Block, device: torch.device) -> bool:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    return size.elements * REFERENCE_BYTES_AN_ELEMENT <= memory / 2


def neuron_rows(size: Size, device: torch.device) -> Iterator[Row]:
    """The floor; every implementation of ASGL; every implementation of the ordinary LIF neuron."""
    learned = size.parameters(device)
    width = learned["width"]

    def layer(backend: str, **options: Any) -> Callable[[Tensor], Tensor]:
        return partial(asgl_cuda.lif, **{"decay": DECAY, **options}, time_dim=size.time_dim, backend=backend)

    asgl = {**learned, "analog_prob": ANALOG_PROB}
    yield Row(FLOOR, lambda sample: sample.x * 2, lambda sample, out: sample.x * sample.grad)
    for backend in fused_backends(device):
        yield row_of(f"asgl_cuda {backend}", layer(backend, **asgl), *learned.values())
    if not reference_fits(size, device):
        return
    yield row_of(REFERENCE, layer(REFERENCE, **asgl), *learned.values())
    modes = (None, "max-autotune-no-cudagraphs") if device.type == "cuda" and size.peers else (None,)
    yield from compiled_rows(size, COMPILED, layer(REFERENCE, **asgl), *learned.values(), modes=modes)
    if size.layout != LAYOUTS[0] or not size.peers:
        return
    yield row_of(LOOP, lambda x_seq: asgl_loop(x_seq, width, ANALOG_PROB), width)
    for backend in fused_backends(device):
        yield row_of(f"{PLAIN}asgl_cuda {backend}", layer(backend))
        yield row_of(f"{PLAIN}asgl_cuda {backend}{SIGMOID}", layer(backend, surrogate="sigmoid"))
    yield row_of(f"{PLAIN}{REFERENCE}", layer(REFERENCE))
    for peer in installed_peers(device)[0]:
        yield row_of(f"{PLAIN}{peer.name}", peer.spikes)
        if peer.name.startswith(COMPILED_PEER):
            yield from compiled_rows(size, f"{PLAIN}{peer.name}, {COMPILED}", peer.spikes)
    integer: dict[str, Any] = {"v_reset": None, "levels": 4}
    for backend in fused_backends(device):
        yield row_of(f"{INTEGER}asgl_cuda {backend}", layer(backend, **integer))
    yield row_of(f"{INTEGER}{REFERENCE}", layer(REFERENCE, **integer))


def adaptive_rows(size: Size, device: torch.device) -> Iterator[Row]:
    """The floor; LIF; every implementation of adaptive neurons, in the current and in the threshold."""
    backends = {f"asgl_cuda {backend}": backend for backend in fused_backends(device)}
    if reference_fits(size, device):
        backends[REFERENCE] = REFERENCE

    def layers(prefix: str, function: Callable[..., Any], **options: Any) -> Iterator[Row]:
        for name, backend in backends.items():
            yield row_of(f"{prefix}{name}", partial(function, decay=DECAY, backend=backend, **options))

    yield Row(FLOOR, lambda sample: sample.x * 2, lambda sample, out: sample.x * sample.grad)
    yield from layers(PLAIN, asgl_cuda.lif)
    for prefix, options in ADAPTIVE.items():
        yield from layers(prefix, asgl_cuda.adaptive_lif, **options)
        if REFERENCE not in backends:
            continue
        yield row_of(f"{prefix}{PLAIN_LOOP}", partial(adaptive_loop, **options))
        if size.compiled:
            # The whole sequence in one function compiles for minutes: see MOST_STEPS_TO_COMPILE.
            step = torch.compile(partial(adaptive_step, **options), fullgraph=True, dynamic=False)
            yield row_of(f"{prefix}{COMPILED_STEP}", partial(adaptive_loop, step=step))
        if size.peers and options is ALIF:
            for peer in adaptive_peers(device):
                yield row_of(f"{prefix}{peer.name}", peer.spikes)


def block_rows(block: Block, device: torch.device) -> Iterator[Row]:
    """The floor; copies; every implementation of the block, fused and as a pair."""
    channels = block.shape[2]
    neuron: dict[str, Any] = {"decay": DECAY, "analog_prob": ANALOG_PROB}

    def pair(backend: str) -> nn.Module:
        norm = OverTime(nn.BatchNorm2d(channels))
        return Pair(norm, asgl_cuda.LIF(**neuron, backend=backend)).to(device)

    def row(name: str, layer: nn.Module) -> Row:
        return row_of(name, layer, *layer.parameters())

    def forward_floor(sample: Sample) -> Tensor:
        sample.x.sum()
        return sample.x * 2 if sample.residual is None else sample.x + sample.residual

    def backward_floor(sample: Sample, out: Tensor) -> Tensor:
        x, _, grad, residual, _ = sample
        return (x * grad if residual is None else torch.addcmul(x, residual, grad)).mul_(x)

    yield Row(FLOOR, forward_floor, backward_floor)
    yield Row(COPY, lambda sample: sample.x.clone(), lambda sample, out: sample.grad.clone())
    for backend in fused_backends(device):
        yield row(f"asgl_cuda {backend}", asgl_cuda.BatchNormLIF(channels, **neuron, backend=backend).to(device))
    for backend in fused_backends(device):
        yield row(f"{PAIR}asgl_cuda {backend}", pair(backend))
    if not reference_fits(block, device):
        return
    yield row(f"{PAIR}{REFERENCE}", pair(REFERENCE))
    module = pair(REFERENCE)
    yield from compiled_rows(block, f"{PAIR}{COMPILED}", module, *module.parameters())


def rows_of(size: Size | Block, device: torch.device) -> Iterator[Row]:
    reset_compiler()
    if isinstance(size, Block):
        return block_rows(size, device)
    return (adaptive_rows if size.adaptive else neuron_rows)(size, device)


def refuse_other_spikes(
    name: str, spikes: Tensor, expected: Tensor | asgl_cuda.LIFOutput | asgl_cuda.AdaptiveLIFOutput, than: str
) -> None:
    """Raises where spikes differ, except at potentials within rounding of the threshold."""
    assert isinstance(expected, asgl_cuda.LIFOutput | asgl_cuda.AdaptiveLIFOutput)
    assert expected.h_seq is not None
    sure = ((expected.h_seq - 1).abs() > THRESHOLD_BAND).all(0)
    differ = ((spikes - expected.s_seq).abs() > THRESHOLD_BAND) & sure
    if differ.any():
        raise RuntimeError(f"{name} emits other spikes than {than}, at {int(differ.sum())} elements")


@torch.no_grad()
def check_peers(device: torch.device) -> None:
    """Checks that peers do the same work: their spikes are ours."""
    x_seq = torch.randn(20, 4096, device=device)
    state = torch.tensor([1, 2], device=device)
    mask = asgl_cuda.analog_mask(x_seq, ANALOG_PROB, state)
    width = torch.ones((), device=device)
    noisy = {"width": width, "analog_prob": ANALOG_PROB, "rng_state": state}
    loop = Peer(LOOP, lambda x: asgl_loop(x, width, ANALOG_PROB, mask), noisy)
    for peer in (loop, *installed_peers(device)[0]):
        options = {"decay": DECAY, "return_h_seq": True, **peer.same_neuron}
        expected = asgl_cuda.lif(x_seq, backend=REFERENCE, **options)
        refuse_other_spikes(peer.name, peer.spikes(x_seq), expected, "asgl_cuda.lif")


@torch.no_grad()
def check_adaptive_peers(device: torch.device) -> None:
    """As `check_peers`, for adaptive neurons."""
    x_seq = torch.randn(20, 4096, device=device)
    loops = (Peer(f"{prefix}{PLAIN_LOOP}", partial(adaptive_loop, **each), each) for prefix, each in ADAPTIVE.items())
    for peer in (*loops, *adaptive_peers(device)):
        neuron = dict(peer.same_neuron)
        current = neuron.pop("input_gain", 1) * x_seq
        options = {"decay": DECAY, "return_h_seq": True, **neuron}
        expected = asgl_cuda.adaptive_lif(current, backend=REFERENCE, **options)
        refuse_other_spikes(peer.name, peer.spikes(x_seq), expected, "asgl_cuda.adaptive_lif")


@torch.no_grad()
def check_blocks(device: torch.device) -> None:
    """Checks the rows of a block in float32; in half types the pair rounds between its layers.

    The compiler draws other noise, and is not compared.
    """
    for layout, with_residual in product((LAYOUTS[0], "channels_last"), (False, True)):
        block = Block((4, 8, 16, 8, 8), "float32", layout, compiled=False, residual=with_residual)
        x_seq = 2 * block.random(device) + 1
        residual = block.random(device) if with_residual else None
        sample = Sample(x_seq, x_seq, x_seq, residual, residual)

        def seeded(function: Callable[[], Any]) -> Any:
            torch.manual_seed(0)  # the noise
            return function()

        expected = seeded(
            lambda sample=sample: asgl_cuda.batch_norm_lif(
                sample.x, training=True, decay=DECAY, analog_prob=ANALOG_PROB, residual=sample.residual,
                return_h_seq=True, backend=REFERENCE,
            )
        )  # fmt: skip
        for row in block_rows(block, device):
            if row.name not in YARDSTICKS:
                spikes = seeded(lambda row=row, sample=sample: row.forward(sample))
                refuse_other_spikes(row.name, spikes, expected, "asgl_cuda.batch_norm_lif")


class Clocks(NamedTuple):
    """The clocks of a warmed up row."""

    parts: dict[str, CpuClock | GpuClock]
    saved_bytes: int | None
    peak_bytes: int | None
    first_seconds: float


def clocks_of(row: Row, inputs: list[Sample], cold: bool) -> Clocks | None:
    """The clocks of a row; None where a peer does not work."""
    device = inputs[0].x.device

    def call() -> None:
        row.backward(inputs[0], row.forward(inputs[0]))
        if device.type == "cuda":
            torch.cuda.synchronize()

    try:
        started = time.perf_counter()
        call()
        first = time.perf_counter() - started
        parts = {part: clock_of(row, part, inputs, cold) for part in PARTS}
        saved = None if row.name in YARDSTICKS else sum(saved_storages(lambda: row.forward(inputs[0])).values())
        return Clocks(parts, saved, peak_bytes(call, device), first)
    except RuntimeError as error:
        if "asgl_cuda" in row.name or row.name in YARDSTICKS:
            raise
        print(f"{row.name} does not work here: {str(error).splitlines()[0]}")
        return None


def measure(size: Size | Block, device: torch.device, repeats: int, cold: bool = False) -> dict[str, Measurement]:
    """Measures all rows, which take turns."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()  # the memory of the previous size; without effect on a CPU
    inputs = samples(size, device)
    clocks = {row.name: found for row in rows_of(size, device) if (found := clocks_of(row, inputs, cold)) is not None}
    parts = {(name, part): clock.seconds for name, found in clocks.items() for part, clock in found.parts.items()}
    seconds = in_turns(parts, repeats)
    return {
        name: Measurement(
            Timing(*(statistics.median(seconds[name, part]) for part in PARTS)),
            spread(seconds[name, "both"]),
            found.saved_bytes,
            found.peak_bytes,
            found.first_seconds,
        )
        for name, found in clocks.items()
    }


HEAD = (
    "", "forward", "backward", "both, ms", "+-", "ns/el.", "GB/s", "x * 2", "x * g", "both", "LIF", "faster", "saved",
    "peak", "first, s",
)  # fmt: skip


def table(size: Size | Block, found: dict[str, Measurement]) -> str:
    """The measurement as text."""
    lines = [HEAD]
    floor = found[FLOOR].timing
    prefixes = (PLAIN, INTEGER, *ADAPTIVE, PAIR, "")
    slowest = {name: found[f"{name}{REFERENCE}"] for name in prefixes if f"{name}{REFERENCE}" in found}
    for name, (timing, spread_, saved, peak, first) in found.items():
        multiples = [seconds / least for seconds, least in zip(timing, floor, strict=True)]
        prefix = next(each for each in prefixes if name.startswith(each))
        reference = slowest.get(prefix, slowest.get(PAIR))
        plain = found.get(f"{PLAIN}{name.removeprefix(prefix)}") if prefix in (INTEGER, *ADAPTIVE) else None
        lines.append(
            (
                name,
                *(f"{1e3 * seconds:.3f}" for seconds in timing),
                f"{100 * spread_:.0f} %",
                f"{1e9 * timing.both / size.elements:.3f}",
                f"{size.accesses * size.bytes / timing.both / 1e9:.1f}",
                *(f"{multiple:.{2 if multiple < 100 else 0}f}" for multiple in multiples),
                f"{timing.both / plain.timing.both:.2f}" if plain else "",
                f"{reference.timing.both / timing.both:.1f}" if reference else "",
                "" if saved is None else f"{saved / size.elements:.1f}",
                "" if peak is None else f"{peak / size.elements:.1f}",
                f"{first:.2f}",
            )
        )
    widths = (9, 10, 10, 6, 9, 7, 7, 7, 7, 7, 7, 7, 7, 9)
    name_width = max(24, *(len(name) for name in found))
    text = [
        f"{name:<{name_width}}" + "".join(f" {cell:>{width - 1}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in lines
    ]
    return "\n".join((str(size), *text, ""))


@palette.styled
def plot(report: dict[str, Any], file: Path) -> None:
    """Nanoseconds an element over T and over N, each at the other's most frequent value; I-LIF takes as long as LIF."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5))
    panels = figure.subplots(1, 2, sharey=True)
    measured = [size for size in report["sizes"] if size["dtype"] == "float32" and size["layout"] == LAYOUTS[0]]
    names = dict.fromkeys(name for size in measured for name in size["seconds"] if not name.startswith(INTEGER))
    for panel, along, fixed, label in (
        (panels[0], "steps", "neurons", "time steps T"),
        (panels[1], "neurons", "steps", "neurons N"),
    ):
        values = [size[fixed] for size in measured]
        chosen = max(sorted(set(values)), key=values.count)
        sizes = sorted((size for size in measured if size[fixed] == chosen), key=lambda size: size[along])
        for number, name in enumerate(names):
            points = [
                (size[along], 1e9 * size["seconds"][name]["both"] / (size["steps"] * size["neurons"]))
                for size in sizes
                if name in size["seconds"]
            ]
            style = palette.line(number - 1, linewidth=2.4 if "asgl_cuda" in name else 1.2)
            if name == FLOOR:
                style = {"color": palette.BLACK, "linewidth": 1.6}
            if points:
                panel.plot(*zip(*points, strict=True), label="two multiplies" if name == FLOOR else name, **style)
        panel.set(yscale="log", xlabel=label, title=f"{'N' if fixed == 'neurons' else 'T'} = {chosen}")
        panel.set_xscale("log", base=2)
    panels[0].set_ylabel("forward and backward, ns an element")
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=4)
    about = report["machine"]
    figure.suptitle(f"{about.get('gpu') or about['processor']}, torch {about['torch']}, float32")
    figure.savefig(file)


def call_overhead(device: torch.device, repeats: int, calls: int = 2000) -> dict[str, float]:
    """Microseconds of a call on a tiny tensor without gradients; of launchers in Python alone on the host."""
    x_seq = torch.randn(4, 64, device=device)
    functions: dict[str, Callable[[], Tensor]] = {FLOOR: lambda: x_seq * 2}
    for backend in fused_backends(device):
        functions[f"asgl_cuda {backend}"] = partial(asgl_cuda.lif, x_seq, backend=backend)
        noisy = partial(asgl_cuda.lif, x_seq, analog_prob=ANALOG_PROB, backend=backend)
        functions[f"asgl_cuda {backend} with noise"] = noisy
    functions[host.IN_PYTHON] = partial(asgl_cuda.lif, x_seq.cpu(), backend=host.RECORDED)

    def clock(function: Callable[[], Tensor]) -> Callable[[], float]:
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return lambda: timer.timeit(calls).mean

    with torch.no_grad(), host.recorded_backend():
        seconds = in_turns({name: clock(function) for name, function in functions.items()}, repeats)
    return {name: 1e6 * statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    """Measures the requested sizes and prints a table for each."""
    parser = parser_of("benchmarks.speed.microbench", __doc__, "device", "seconds", "repeats", "json", "plot")
    parser.set_defaults(repeats=15)
    parser.add_argument("--steps", type=int, help="time steps; with --neurons, measures this size alone")
    parser.add_argument("--neurons", type=int, help="neurons, batch included")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, help="what to vary (with --plot by default T and N)")
    parser.add_argument("--cold", action="store_true", help="fill the CPU's caches with other data before each call")
    parser.add_argument(
        "--fresh", action="store_true", help="the C library's defaults: large memory is fresh at each call"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    arguments = parser.parse_args()
    started = time.monotonic()
    if (arguments.steps is None) != (arguments.neurons is None):
        parser.error("--steps and --neurons go together")
    for name in ("steps", "neurons", "repeats", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be >= 1, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = device_of(parser, arguments.device)
    sweeps = arguments.sweep or (["T", "N"] if arguments.plot and arguments.steps is None else [])
    sizes = [size for name in sweeps for size in sweep(name, device)]
    if arguments.steps is not None:
        sizes = [Size(arguments.steps, arguments.neurons, arguments.dtype)]
    if HOST not in sweeps:
        sizes = sizes or usual_sizes(device)

    kept = not arguments.fresh and keep_memory()
    about = machine_and_peers(device)
    print(f"{in_words(about)}; medians of {arguments.repeats}, {'cold' if arguments.cold else 'warm'} caches")
    if device.type == "cpu":
        print(f"the C library {'keeps' if kept else 'may return'} freed memory")
    print(f"rectangle, hard reset, analog_prob {ANALOG_PROB}, learned width; gradients of x and width")
    print(f"{PLAIN}without noise and learned width, as in the other libraries; default surrogates; gradient of x")
    print("+-: half the interquartile range; GB/s: of 5 accesses to an element, in a block 9, with a residual 11")
    print("x * 2, x * g, both: forward, backward and both as multiples of these multiplies, and of their sum")
    print("faster: both, than the reference in eager mode; torch.compile: of the reference; column LIF: both, as a")
    print("multiple of LIF's; compiled step: one step of the loop is compiled, since a sequence takes minutes")
    print("saved: bytes an element kept for backward; peak: bytes an element allocated; first: the first call")
    print("block: batch normalisation and neurons in training, fused, or as a pair of nn.BatchNorm2d and the neurons;")
    print("gradients of x, weight, bias and width; its multiplies: x.sum() and x * 2, (x * g).mul_(x)")
    print("residual: r is added between the two; x + r, and torch.addcmul(x, r, g), in place of x * 2 and x * g")
    missing = installed_peers(device)[1]
    if missing:
        print(f'not installed: {", ".join(missing)} (pip install ".[bench]")')
    check_peers(device)
    check_adaptive_peers(device)
    check_blocks(device)
    print("the spikes of the loops, of each peer and of the pairs are ours\n", flush=True)
    report: dict[str, Any] = {"machine": about, "analog_prob": ANALOG_PROB, "cold": arguments.cold}
    report["memory_kept"] = kept
    report |= {"sizes": [], "blocks": []}
    if "judged" in sweeps:
        report["card"] = measured_rates(device)._asdict()
    if HOST in sweeps:
        times = host.host_times(device, arguments.repeats)
        print(host.table(times), flush=True)
        report["host_microseconds"] = times._asdict()
    report["call_microseconds"] = overhead = call_overhead(device, arguments.repeats)
    for size in in_time(sizes, started, arguments.seconds, report):
        found = measure(size, device, arguments.repeats, arguments.cold)
        print(table(size, found), flush=True)
        report["blocks" if isinstance(size, Block) else "sizes"].append(
            {
                **size.description(),
                "seconds": {name: each.timing._asdict() for name, each in found.items()},
                "rows": {
                    name: {key: value for key, value in each._asdict().items() if key != "timing"}
                    for name, each in found.items()
                },
            }
        )
        write_json(arguments.json, report)  # already here: the program may be killed
    write_json(arguments.json, report)
    print("one call on [4, 64], no_grad: " + ", ".join(f"{name} {us:.1f} µs" for name, us in overhead.items()))
    if arguments.plot:
        plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
