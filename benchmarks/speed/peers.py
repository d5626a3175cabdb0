"""Alternatives to asgl_cuda: the neurons of other libraries, and ASGL as a loop in plain PyTorch.

The libraries have no ASGL: each is an ordinary LIF neuron with decay 1/2, threshold 1 and reset to 0, in the fastest
form that its documentation shows for a whole sequence, with its default surrogate.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common import machine

DECAY = 0.5


class Peer(NamedTuple):
    """Another implementation of a plain LIF layer."""

    name: str  # with the version
    spikes: Callable[[Tensor], Tensor]  # [T, N] to [T, N]
    same_neuron: dict[str, Any]  # options of asgl_cuda.lif for the same spikes


def step_by_step(cell: Callable[..., Any], x_seq: Tensor, state: Any = None) -> Tensor:
    """The spikes of a cell that maps input and state to spike and state."""
    s_seq = []
    for x in x_seq:
        s, state = cell(x, state)
        s_seq.append(s)
    return torch.stack(s_seq)


def spikingjelly_node() -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    return neuron.LIFNode(
        tau=1 / (1 - DECAY), decay_input=False, surrogate_function=surrogate.Sigmoid(alpha=4.0), step_mode="m"
    )


def spiking_resnet18(neuron: Callable[[], nn.Module], classes: int) -> nn.Module:
    """SpikingJelly's ResNet-18 with these neurons, for `[T, B, 3, H, W]`."""
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.model import spiking_resnet

    model: nn.Module = spiking_resnet.spiking_resnet18(spiking_neuron=neuron, num_classes=classes)
    functional.set_step_mode(model, "m")
    return model


def spikingjelly(device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Multi-step LIFNode."""
    from spikingjelly.activation_based import functional

    node = spikingjelly_node()

    def spikes(x_seq: Tensor) -> Tensor:
        functional.reset_net(node)
        return node(x_seq)

    return spikes, {}


def snntorch(device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Leaky, a step a call."""
    import snntorch

    leaky = snntorch.Leaky(beta=DECAY, threshold=1.0, reset_mechanism="zero").to(device)

    return lambda x_seq: step_by_step(leaky, x_seq, leaky.reset_mem()), {"strict_threshold": True}


def norse(device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """LIFBoxCell, a step a call; its input is scaled by 1 - decay."""
    from norse.torch import LIFBoxCell, LIFBoxParameters

    dt = 0.001
    tensors = {"v_leak": 0.0, "v_th": 1.0, "v_reset": 0.0, "tau_mem_inv": (1 - DECAY) / dt}
    parameters = LIFBoxParameters(**{name: torch.tensor(value, device=device) for name, value in tensors.items()})
    cell = LIFBoxCell(parameters, dt=dt)

    return partial(step_by_step, cell), {"strict_threshold": True, "input_gain": 1 - DECAY}


def sinabs(device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """LIF over the sequence, with at most one spike a step, not its default."""
    from sinabs import layers
    from sinabs.activation import MembraneReset, SingleSpike

    layer = layers.LIF(
        tau_mem=-1 / math.log(DECAY), spike_fn=SingleSpike, reset_fn=MembraneReset(), norm_input=False
    ).to(device)

    def spikes(x_seq: Tensor) -> Tensor:
        layer.reset_states()
        return layer(x_seq[None])[0]  # batch first

    return spikes, {}


_MAKERS = {"SpikingJelly": spikingjelly, "snnTorch": snntorch, "Norse": norse, "sinabs": sinabs}


def installed_peers(device: torch.device) -> tuple[list[Peer], list[str]]:
    """The installed peers, and the names of missing peers."""
    found, missing = [], []
    for name, make in _MAKERS.items():
        try:
            spikes, same_neuron = make(device)
        except ImportError:
            missing.append(name)
            continue
        found.append(Peer(f"{name} {importlib.metadata.version(name.lower())}", spikes, same_neuron))
    return found, missing


def machine_and_peers(device: torch.device) -> dict[str, Any]:
    """As `machine`, with the libraries and their versions."""
    return {**machine(device), "peers": [peer.name for peer in installed_peers(device)[0]]}


def asgl_loop(x_seq: Tensor, width: Tensor, analog_prob: float, mask: Tensor | None = None) -> Tensor:
    """ASGL in plain PyTorch, with a mask drawn at each step, or given to compare results."""
    v = torch.zeros_like(x_seq[0])
    s_seq = []
    for t, x in enumerate(x_seq):
        h = DECAY * v + x
        u = h - 1.0
        a = (u / width + 0.5).clamp(0, 1)
        z = (u >= 0).to(a)
        analog = torch.bernoulli(torch.full_like(u, analog_prob)) if mask is None else mask[t].to(a)
        s = a + ((1 - analog) * (z - a)).detach()
        v = h * (1 - s)
        s_seq.append(s)
    return torch.stack(s_seq)
