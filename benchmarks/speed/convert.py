"""The time that `asgl_cuda.convert` saves: layers of other libraries before and after conversion, forward and backward.

Both layers take turns within each repeat; the median is reported. Spikes, or potentials of layers that do not fire, are
compared first.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import asgl_cuda

from ..common import device_of, in_words, parser_of, write_json
from .clocks import Row, Sample, clock_of, in_turns, keep_memory, spread
from .peers import machine_and_peers, step_by_step


class Case(NamedTuple):
    """A layer, its call with a sequence `[T, N]` from rest, and its conversion."""

    library: str
    name: str
    layer: nn.Module
    spikes: Callable[[Any, Tensor], Tensor]
    converted: Callable[[nn.Module], nn.Module] = lambda layer: asgl_cuda.convert(layer)[0]


def spikingjelly() -> Iterator[Case]:
    from spikingjelly.activation_based import functional, neuron

    def whole(node: Any, x_seq: Tensor) -> Tensor:
        functional.reset_net(node)
        return node(x_seq)  # type: ignore[no-any-return]

    def by_step(node: Any, x_seq: Tensor) -> Tensor:
        functional.reset_net(node)
        return torch.stack([node(x) for x in x_seq])

    def decoded(node: Any, x_seq: Tensor) -> Tensor:
        return node(x_seq).expand_as(x_seq)  # type: ignore[no-any-return]

    for make in (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode):
        yield Case("spikingjelly", make.__name__, make(step_mode="m"), whole)
    yield Case("spikingjelly", "LIFNode, a step a call", neuron.LIFNode(step_mode="s"), by_step)
    current = neuron.CUBALIFNode()
    current.step_mode = "m"
    yield Case("spikingjelly", "CUBALIFNode", current, whole)
    yield Case("spikingjelly", "NonSpikingLIFNode", neuron.NonSpikingLIFNode(decode="mean-mem"), decoded)


def snntorch() -> Iterator[Case]:
    from snntorch import Leaky, Synaptic

    from asgl_cuda.interop.snntorch import MultiStep

    def spikes(layer: Any, x_seq: Tensor) -> Tensor:
        whole = isinstance(layer, MultiStep)
        count = 2 if isinstance(layer.layer if whole else layer, Synaptic) else 1
        states: Any = [torch.zeros_like(x_seq[0])] * count
        if whole:
            return layer(x_seq, *states)[0]  # type: ignore[no-any-return]
        s_seq = []
        for x in x_seq:
            s, *states = layer(x, *states)
            s_seq.append(s)
        return torch.stack(s_seq)

    for make in (Leaky, Synaptic):
        name, options = make.__name__, {"beta": 0.5} | ({"alpha": 0.5} if make is Synaptic else {})
        yield Case("snntorch", f"{name}, a step a call", make(**options), spikes)
        yield Case(
            "snntorch", f"{name} in MultiStep", make(**options), spikes, lambda layer: MultiStep(copy.deepcopy(layer))
        )


def norse() -> Iterator[Case]:
    from norse.torch import IAF, LI, LIF, LIFBoxCell, LIFBoxParameters, LIFCell, LIFParameters

    def whole(layer: Any, x_seq: Tensor) -> Tensor:
        return layer(x_seq)[0]  # type: ignore[no-any-return]

    p = LIFParameters(tau_mem_inv=torch.tensor(500.0))
    yield Case("norse", "LIF", LIF(p), whole)
    yield Case("norse", "LIFCell, a step a call", LIFCell(p), step_by_step)
    yield Case("norse", "LIFBoxCell, a step a call", LIFBoxCell(LIFBoxParameters(p.tau_mem_inv)), step_by_step)
    yield Case("norse", "IAF", IAF(), whole)
    yield Case("norse", "LI", LI(), whole)


def sinabs() -> Iterator[Case]:
    from sinabs import layers
    from sinabs.activation import SingleSpike

    def spikes(layer: Any, x_seq: Tensor) -> Tensor:
        layer.reset_states()
        return layer(x_seq[None])[0]  # type: ignore[no-any-return]

    yield Case("sinabs", "LIF", layers.LIF(2.0, spike_fn=SingleSpike, norm_input=False), spikes)
    yield Case("sinabs", "IAF", layers.IAF(spike_fn=SingleSpike), spikes)
    yield Case("sinabs", "IAF, MultiSpike", layers.IAF(min_v_mem=-1.0), spikes)
    yield Case("sinabs", "LIF, MultiSpike, tau_syn", layers.LIF(2.0, tau_syn=2.0, norm_input=False), spikes)
    yield Case("sinabs", "ExpLeak", layers.ExpLeak(2.0), spikes)


def cases() -> Iterator[Case]:
    """Layers of the installed libraries."""
    for library in (spikingjelly, snntorch, norse, sinabs):
        if importlib.util.find_spec(library.__name__) is None:
            print(f'not installed: {library.__name__} (pip install ".[bench]")')
        else:
            yield from library()


def measure(case: Case, sample: Sample, repeats: int) -> dict[str, Any]:
    """Median seconds of both layers, forward and backward."""
    device = sample.x.device
    layers = {"before": case.layer.to(device), "after": case.converted(case.layer).to(device)}
    with torch.no_grad():
        before, after = (case.spikes(layer, sample.x) for layer in layers.values())
    # Spikes differ where a potential is within rounding of the threshold.
    if (~torch.isclose(before, after, rtol=1e-3, atol=1e-4)).float().mean() > 1e-4:
        raise RuntimeError(f"{case.library} {case.name} emits other spikes when it is converted")

    def row(layer: nn.Module) -> Row:
        return Row(
            case.name,
            lambda sample: case.spikes(layer, sample.leaf),
            lambda sample, out: torch.autograd.grad(out, sample.leaf, sample.grad),
        )

    seconds = in_turns(
        {name: clock_of(row(layer), "both", [sample]).seconds for name, layer in layers.items()}, repeats
    )
    return {
        "library": f"{case.library} {importlib.metadata.version(case.library)}",
        "layer": case.name,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "spread": {name: spread(values) for name, values in seconds.items()},
    }


def main() -> int:
    """Measures every layer at every number of steps."""
    parser = parser_of("benchmarks.speed.convert", __doc__, "device", "repeats", "json")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 16, 128], help="time steps (default 4 16 128)")
    parser.add_argument("--elements", type=int, default=2**22, help="steps times neurons (default 2^22)")
    arguments = parser.parse_args()
    device = device_of(parser, arguments.device)
    keep_memory()
    about = machine_and_peers(device)
    print(f"{in_words(about)}; forward and backward, medians of {arguments.repeats}")
    print(f"{'':<40}{'T':>6}{'before, ms':>14}{'after, ms':>14}{'faster':>10}", flush=True)
    report: dict[str, Any] = {"machine": about, "elements": arguments.elements, "sizes": []}
    for steps in arguments.steps:
        torch.manual_seed(0)
        x = torch.randn(steps, arguments.elements // steps, device=device)
        sample = Sample(x, x.clone().requires_grad_(), torch.randn_like(x))
        found = []
        for case in cases():
            each = measure(case, sample, arguments.repeats)
            found.append(each)
            before, after = each["seconds"]["before"], each["seconds"]["after"]
            name = f"{each['library']} {each['layer']}"
            cells = f"{1e3 * before:>14.2f}{1e3 * after:>14.2f}{before / after:>10.1f}"
            print(f"{name:<40}{steps:>6}{cells}", flush=True)
        report["sizes"].append({"steps": steps, "neurons": arguments.elements // steps, "layers": found})
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
