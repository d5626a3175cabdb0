"""The time that `asgl_cuda.convert` saves: forward and backward of other libraries' layers before and after conversion.

In each round both layers are timed once; the median over the rounds is reported. Before that, the spikes of both are
compared, or the potentials of layers that do not fire.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import asgl_cuda

from .clocks import Sample, clock_of, in_turns, row_of, sample_of
from .peers import peer_of_sinabs, peer_of_spikingjelly, step_by_step

STEPS, ELEMENTS = (4, 16, 128), 2**22  # elements: steps times neurons


class Case(NamedTuple):
    """A layer of a library, the function that applies it to a sequence `[T, N]` from rest, and its conversion."""

    library: str
    name: str
    layer: nn.Module
    spikes: Callable[[Any, Tensor], Tensor]
    converted: Callable[[nn.Module], nn.Module] = lambda layer: asgl_cuda.convert(layer)[0]


def by_spikingjelly(layer: Any, x_seq: Tensor) -> Tensor:
    return peer_of_spikingjelly(layer).spikes(x_seq)


def by_sinabs(layer: Any, x_seq: Tensor) -> Tensor:
    return peer_of_sinabs(layer, {}).spikes(x_seq)


def spikingjelly() -> Iterator[Case]:
    from spikingjelly.activation_based import functional, neuron

    def by_step(node: Any, x_seq: Tensor) -> Tensor:
        functional.reset_net(node)
        return torch.stack([node(x) for x in x_seq])

    def decoded(node: Any, x_seq: Tensor) -> Tensor:
        return node(x_seq).expand_as(x_seq)  # type: ignore[no-any-return]

    case = partial(Case, "spikingjelly")
    for make in (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode):
        yield case(make.__name__, make(step_mode="m"), by_spikingjelly)
    yield case("LIFNode, a step a call", neuron.LIFNode(step_mode="s"), by_step)
    current = neuron.CUBALIFNode()
    current.step_mode = "m"
    yield case("CUBALIFNode", current, by_spikingjelly)
    yield case("NonSpikingLIFNode", neuron.NonSpikingLIFNode(decode="mean-mem"), decoded)


def snntorch() -> Iterator[Case]:
    from snntorch import Leaky, Synaptic

    from asgl_cuda.interop.snntorch import MultiStep

    def spikes(layer: Any, x_seq: Tensor, states: int) -> Tensor:
        state = (torch.zeros_like(x_seq[0]),) * states
        if isinstance(layer, MultiStep):
            return layer(x_seq, *state)[0]  # type: ignore[no-any-return]

        def cell(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            s, *after = layer(x, *state)
            return s, tuple(after)

        return step_by_step(cell, x_seq, state)

    for make, options in ((Leaky, {"beta": 0.5}), (Synaptic, {"alpha": 0.5, "beta": 0.5})):
        call = partial(spikes, states=len(options))
        yield Case("snntorch", f"{make.__name__}, a step a call", make(**options), call)
        whole: Callable[[nn.Module], nn.Module] = lambda layer: MultiStep(copy.deepcopy(layer))  # noqa: E731
        yield Case("snntorch", f"{make.__name__} in MultiStep", make(**options), call, whole)


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

    for name, layer in {
        "LIF": layers.LIF(2.0, spike_fn=SingleSpike, norm_input=False),
        "IAF": layers.IAF(spike_fn=SingleSpike),
        "IAF, MultiSpike": layers.IAF(min_v_mem=-1.0),
        "LIF, MultiSpike, tau_syn": layers.LIF(2.0, tau_syn=2.0, norm_input=False),
        "ExpLeak": layers.ExpLeak(2.0),
    }.items():
        yield Case("sinabs", name, layer, by_sinabs)


def cases() -> Iterator[Case]:
    """Layers of the installed libraries."""
    for library in (spikingjelly, snntorch, norse, sinabs):
        if importlib.util.find_spec(library.__name__) is not None:
            yield from library()


def measure(case: Case, sample: Sample, repeats: int) -> dict[str, Any]:
    """Median seconds of both layers, forward and backward."""
    device = sample.x.device
    layers = {"before": case.layer.to(device), "after": case.converted(case.layer).to(device)}
    with torch.no_grad():
        before, after = (case.spikes(layer, sample.x) for layer in layers.values())
    # Spikes may differ if a potential differs from the threshold by rounding only.
    if (~torch.isclose(before, after, rtol=1e-3, atol=1e-4)).float().mean() > 1e-4:
        raise RuntimeError(f"{case.library} {case.name} emits other spikes when it is converted")
    rows = {name: row_of(name, partial(case.spikes, layer)) for name, layer in layers.items()}
    times = in_turns({name: clock_of(row, "both", [sample]) for name, row in rows.items()}, repeats)
    return {
        "library": f"{case.library} {importlib.metadata.version(case.library)}",
        "layer": case.name,
        "seconds": {name: each.median for name, each in times.items()},
        "spread": {name: each.spread for name, each in times.items()},
    }


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: how many times as fast each layer becomes, by number of steps."""
    found: dict[str, list[str]] = {}
    for size in report["sizes"]:
        for each in size["layers"]:
            faster = each["seconds"]["before"] / each["seconds"]["after"]
            found.setdefault(f"{each['library']} {each['layer']}", []).append(f"{faster:.1f}")
    return ["", *(f"T = {size['steps']}" for size in report["sizes"])], [
        [name, *cells] for name, cells in found.items()
    ]


def measurements(report: dict[str, Any], device: torch.device, repeats: int) -> Iterator[str]:
    """Measures every layer at every number of steps."""
    report |= {"elements": ELEMENTS, "sizes": []}
    for steps in STEPS:
        torch.manual_seed(0)
        shape = steps, ELEMENTS // steps
        sample = sample_of(*(torch.randn(shape, device=device) for _ in range(2)))
        layers = [measure(case, sample, repeats) for case in cases()]
        report["sizes"].append({"steps": steps, "neurons": shape[1], "layers": layers})
        yield f"T = {steps}"
