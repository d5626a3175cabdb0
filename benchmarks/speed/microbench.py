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
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import OverTime
from asgl_cuda.selfcheck import THRESHOLD_BAND

from ..common import device_of, fused_backends, in_time, parser_of, text_table, write_json
from . import host
from .clocks import PARTS, Row, Sample, clock_of, in_turns, keep_memory, row_of, saved_bytes
from .peers import (
    ADLIF,
    ALIF,
    DECAY,
    SURROGATE,
    Peer,
    adaptive_step,
    asgl_loop,
    installed_peers,
    introduced,
    lif_loop,
    loop,
)
from .sizes import LAYOUTS, SWEEPS, Block, Size, description, samples, sweep, usual_sizes

ANALOG_PROB = host.ANALOG_PROB
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
SIGMOID = ", sigmoid"  # suffix of a row with that surrogate, the default; the others have SURROGATE
COMPILED_STEP = "compiled step"  # the loop, with one step compiled
PAIR = "pair: "  # prefix of blocks that are not fused
# Beyond this many steps the compiler unrolls for minutes.
MOST_STEPS_TO_COMPILE = 16
FEWEST_STEPS = 4  # at which it is measured what recompiles
# Autograd keeps some fifteen float32 tensors of the reference; the gradients take the rest.
REFERENCE_BYTES_AN_ELEMENT = 100


class Pair(nn.Sequential):
    """A normalisation and neurons as two layers; an optional residual is added between the two."""

    def forward(self, x_seq: Tensor, residual: Tensor | None = None) -> Tensor:
        norm, neurons = self
        x_seq = norm(x_seq)
        spikes: Tensor = neurons(x_seq if residual is None else x_seq + residual)
        return spikes


# ---- rows ----


def reset_compiler() -> None:
    """Resets the compiler before each size, because after another size it would make sizes dynamic."""
    torch._inductor.config.force_disable_caches = True
    torch._dynamo.config.cache_size_limit = 64  # layers of several libraries share code
    # Backward is timed alone, and repeated: it must keep its buffers.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()


def compiled_rows(size: Size | Block, name: str, function: Callable[..., Tensor], *parameters: Tensor) -> Iterator[Row]:
    """The row of the layer under torch.compile, unless compiling takes too long."""
    if size.compiled and size.steps <= MOST_STEPS_TO_COMPILE:
        yield row_of(name, torch.compile(function, fullgraph=True, dynamic=False), *parameters)


def reference_fits(size: Size | Block, device: torch.device) -> bool:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    return size.elements * REFERENCE_BYTES_AN_ELEMENT <= memory / 2


def floor_row() -> Row:
    return Row(FLOOR, lambda sample: sample.x * 2, lambda sample, out: sample.x * sample.grad)


def neuron_rows(size: Size, device: torch.device) -> Iterator[Row]:
    """Rows of a layer: the floor, every implementation of ASGL, every implementation of the ordinary LIF neuron."""
    width = torch.ones((), device=device, requires_grad=True)
    asgl = {"width": width, "analog_prob": ANALOG_PROB}

    def layer(backend: str, **options: Any) -> Callable[[Tensor], Tensor]:
        return partial(asgl_cuda.lif, decay=DECAY, backend=backend, **{"surrogate": SURROGATE, **options})

    yield floor_row()
    for backend in fused_backends(device):
        yield row_of(f"asgl_cuda {backend}", layer(backend, **asgl), width)
    if not reference_fits(size, device):
        return
    yield row_of(REFERENCE, layer(REFERENCE, **asgl), width)
    yield from compiled_rows(size, COMPILED, layer(REFERENCE, **asgl), width)
    if not size.peers:
        return
    yield row_of(LOOP, lambda x_seq: asgl_loop(x_seq, width, ANALOG_PROB), width)
    for backend in fused_backends(device):
        yield row_of(f"{PLAIN}asgl_cuda {backend}", layer(backend))
        yield row_of(f"{PLAIN}asgl_cuda {backend}{SIGMOID}", layer(backend, surrogate="sigmoid"))
    yield row_of(f"{PLAIN}{REFERENCE}", layer(REFERENCE))
    for name, peer in {PLAIN_LOOP: lif_loop(width), **installed_peers("LIF", width)}.items():
        yield row_of(f"{PLAIN}{name}", peer.spikes)
        if size.compiled and size.steps <= MOST_STEPS_TO_COMPILE:
            yield row_of(f"{PLAIN}{name}, {COMPILED}", peer.compiled().spikes)
    for name, backend in {
        **{f"asgl_cuda {each}": each for each in fused_backends(device)},
        REFERENCE: REFERENCE,
    }.items():
        yield row_of(f"{INTEGER}{name}", layer(backend, v_reset=None, levels=4))


def adaptive_rows(size: Size, device: torch.device) -> Iterator[Row]:
    """Rows of adaptive neurons: the floor, LIF, then every implementation of adLIF and of ALIF."""
    backends = {f"asgl_cuda {backend}": backend for backend in fused_backends(device)}
    if reference_fits(size, device):
        backends[REFERENCE] = REFERENCE

    def layers(prefix: str, function: Callable[..., Any], **options: Any) -> Iterator[Row]:
        for name, backend in backends.items():
            call = partial(function, decay=DECAY, surrogate=SURROGATE, backend=backend, **options)
            yield row_of(f"{prefix}{name}", call)

    yield floor_row()
    yield from layers(PLAIN, asgl_cuda.lif)
    for prefix, options in ADAPTIVE.items():
        yield from layers(prefix, asgl_cuda.adaptive_lif, **options)
        if REFERENCE not in backends:
            continue
        yield row_of(f"{prefix}{PLAIN_LOOP}", partial(loop, step=adaptive_step, **options))
        if size.compiled:
            # The whole sequence in one function compiles for minutes: see MOST_STEPS_TO_COMPILE.
            step = torch.compile(partial(adaptive_step, **options), fullgraph=True, dynamic=False)
            yield row_of(f"{prefix}{COMPILED_STEP}", partial(loop, step=step))
        if size.peers and options is ALIF:
            for name, peer in installed_peers("ALIF", torch.zeros((), device=device)).items():
                yield row_of(f"{prefix}{name}", peer.spikes)


def block_rows(block: Block, device: torch.device) -> Iterator[Row]:
    """Rows of a block: the floor, copies, then every implementation of the block, fused and as a pair."""
    channels = block.shape[2]
    neuron: dict[str, Any] = {
        "decay": DECAY, "analog_prob": ANALOG_PROB, "surrogate": SURROGATE, "detach_reset": False
    }  # fmt: skip

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
    if reference_fits(block, device):
        yield row(f"{PAIR}{REFERENCE}", pair(REFERENCE))
        module = pair(REFERENCE)
        yield from compiled_rows(block, f"{PAIR}{COMPILED}", module, *module.parameters())


def rows_of(size: Size | Block, device: torch.device) -> Iterator[Row]:
    reset_compiler()
    if isinstance(size, Block):
        return block_rows(size, device)
    return (adaptive_rows if size.adaptive else neuron_rows)(size, device)


# ---- the same spikes ----


def refuse_other_spikes(name: str, spikes: Tensor, expected: Any, than: str) -> None:
    """Raises RuntimeError if spikes differ, except where a potential differs from the threshold by rounding only."""
    sure = ((expected.h_seq - 1).abs() > THRESHOLD_BAND).all(0)
    differ = ((spikes - expected.s_seq).abs() > THRESHOLD_BAND) & sure
    if differ.any():
        raise RuntimeError(f"{name} emits other spikes than asgl_cuda.{than}, at {int(differ.sum())} elements")


@torch.no_grad()
def check_peers(device: torch.device) -> None:
    """Checks that loops and peers emit the spikes of asgl_cuda."""
    x_seq, width = torch.randn(20, 4096, device=device), torch.ones((), device=device)
    state = torch.tensor([1, 2], device=device)
    mask = asgl_cuda.analog_mask(x_seq, ANALOG_PROB, state)
    noisy = {"width": width, "analog_prob": ANALOG_PROB, "rng_state": state, "surrogate": SURROGATE}
    compared = {LOOP: Peer(lambda x: asgl_loop(x, width, ANALOG_PROB, mask), noisy)}
    for prefix, options in ADAPTIVE.items():
        compared[f"{prefix}{PLAIN_LOOP}"] = Peer(partial(loop, step=adaptive_step, **options), options)
    compared |= {f"{PLAIN}{PLAIN_LOOP}": lif_loop(width), **installed_peers("LIF", width)}
    compared |= {f"ALIF: {name}": peer for name, peer in installed_peers("ALIF", width).items()}
    for name, peer in compared.items():
        neuron = dict(peer.same_neuron)
        current = neuron.pop("input_gain", 1) * x_seq
        function: Any = asgl_cuda.adaptive_lif if "adapt_decay" in neuron else asgl_cuda.lif
        expected = function(current, decay=DECAY, return_h_seq=True, backend=REFERENCE, **neuron)
        refuse_other_spikes(name, peer.spikes(x_seq), expected, function.__name__)


@torch.no_grad()
def check_blocks(device: torch.device) -> None:
    """Checks that the rows of a block emit the same spikes, in float32, because in half types pairs round in between.

    Compiled rows draw other noise and are not compared.
    """
    for layout, with_residual in product(LAYOUTS, (False, True)):
        block = Block((4, 8, 16, 8, 8), "float32", layout, compiled=False, residual=with_residual)
        x_seq = 2 * block.random(device) + 1
        residual = block.random(device) if with_residual else None
        sample = Sample(x_seq, x_seq, x_seq, residual, residual)
        options: dict[str, Any] = {
            "decay": DECAY, "analog_prob": ANALOG_PROB, "surrogate": SURROGATE, "backend": REFERENCE
        }  # fmt: skip
        torch.manual_seed(0)  # the noise
        expected = asgl_cuda.batch_norm_lif(x_seq, training=True, residual=residual, return_h_seq=True, **options)
        for row in block_rows(block, device):
            torch.manual_seed(0)
            if row.name not in YARDSTICKS:
                refuse_other_spikes(row.name, row.forward(sample), expected, "batch_norm_lif")


# ---- measurement ----


def first_seconds(row: Row, sample: Sample) -> float:
    """The seconds of a row's first call, which may include compiling."""
    started = time.perf_counter()
    row.call("both", sample)
    return time.perf_counter() - started


def recompiled(row: Row, size: Size, device: torch.device) -> dict[str, float]:
    """The seconds of the first calls with a second batch size, with a third one, and with one more time step."""
    others = {
        "batch": size._replace(neurons=size.neurons // 2),
        "third_batch": size._replace(neurons=size.neurons // 4),
        "steps": size._replace(steps=size.steps + 1),
    }
    return {name: first_seconds(row, samples(other, device)[0]) for name, other in others.items()}


def measure(size: Size | Block, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measures all rows of a size, which take turns: median seconds, the spread of `both`, and bytes kept for backward.

    Also the seconds of the first call, in which some rows compile, and of recompiling peers at few time steps.
    """
    torch.manual_seed(0)
    torch.cuda.empty_cache()  # the memory of the previous size; without effect on a CPU
    inputs = samples(size, device)
    clocks: dict[tuple[str, str], Callable[[], float]] = {}
    kept: dict[str, int | None] = {}
    first: dict[str, float] = {}
    compiled: list[Row] = []
    for row in rows_of(size, device):
        try:
            first[row.name] = first_seconds(row, inputs[0])
            found = {(row.name, part): clock_of(row, part, inputs) for part in PARTS}
            saved = None if row.name in YARDSTICKS else saved_bytes(partial(row.forward, inputs[0]))
        except RuntimeError as error:
            if "asgl_cuda" in row.name or row.name in YARDSTICKS:
                raise
            print(f"{row.name} does not work here: {str(error).splitlines()[0]}")
            continue
        clocks |= found
        kept[row.name] = saved
        if row.name.startswith(PLAIN) and row.name.endswith(COMPILED) and size.steps == FEWEST_STEPS:
            compiled.append(row)
    times = in_turns(clocks, repeats)
    return {
        **description(size),
        "seconds": {name: {part: times[name, part].median for part in PARTS} for name in kept},
        "rows": {
            name: {"spread": times[name, "both"].spread, "saved_bytes": each, "first_seconds": first[name]}
            for name, each in kept.items()
        },
        "recompiled": {row.name: recompiled(row, size, device) for row in compiled if isinstance(size, Size)},
    }


def table(size: Size | Block, found: dict[str, Any]) -> str:
    """The measurement as a text table. Each row is compared with the reference of its kind, such as PLAIN."""
    lines = [(str(size), *PARTS, "+-", "ns/el.", "multiplies", "faster", "saved")]
    seconds = found["seconds"]
    for name, by_part in seconds.items():
        both, about = by_part["both"], found["rows"][name]
        kind = next((each for each in (PLAIN, INTEGER, *ADAPTIVE, PAIR) if name.startswith(each)), "")
        reference = seconds.get(f"{kind}{REFERENCE}") or seconds.get(f"{PAIR}{REFERENCE}")
        kept = about["saved_bytes"]
        lines.append(
            (
                name,
                *(f"{1e3 * by_part[part]:.3f}" for part in PARTS),
                f"{100 * about['spread']:.0f} %",
                f"{1e9 * both / size.elements:.3f}",
                f"{both / seconds[FLOOR]['both']:.2f}",
                f"{reference['both'] / both:.1f}" if reference else "",
                "" if kept is None else f"{kept / size.elements:.1f}",
            )
        )
    return f"{text_table(*lines)}\n"


def main() -> int:
    """Measures the requested sizes and prints a table for each."""
    parser = parser_of("benchmarks.speed.microbench", __doc__, "device", "seconds", "repeats", "json")
    parser.set_defaults(repeats=15)
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, help="sizes to measure instead of the usual ones")
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {arguments.repeats}")
    device = device_of(parser, arguments.device)
    sweeps = arguments.sweep or []
    sizes = [size for name in sweeps for size in sweep(name, device)] if sweeps else usual_sizes(device)
    keep_memory()
    about = introduced(device, f"milliseconds, medians of {arguments.repeats}")
    print(f"asgl_cuda, {REFERENCE}, {LOOP}: noise and a learned width; {PLAIN}without, as the other libraries have it")
    print(f"multiplies: as a multiple of {FLOOR}'s time; faster: than the reference; saved: bytes an element")
    check_peers(device)
    check_blocks(device)
    print("the spikes of the loops, of each peer and of the pairs are ours\n", flush=True)
    report: dict[str, Any] = {"machine": about, "analog_prob": ANALOG_PROB, "sizes": [], "blocks": []}
    report["call_microseconds"] = overhead = host.call_overhead(device, arguments.repeats, FLOOR)
    for size in in_time(sizes, started, arguments.seconds, report):
        found = measure(size, device, arguments.repeats)
        print(table(size, found), flush=True)
        report["blocks" if isinstance(size, Block) else "sizes"].append(found)
        write_json(arguments.json, report)  # already here: the program may be killed
    write_json(arguments.json, report)
    print("one call on [4, 64], no_grad: " + ", ".join(f"{name} {us:.1f} µs" for name, us in overhead.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
