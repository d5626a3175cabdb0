"""Alternatives to asgl_cuda: the neurons of other libraries, and ASGL as a loop in plain PyTorch.

The libraries have no ASGL: each is an ordinary LIF neuron with decay 1/2, threshold 1 and reset to 0, in the fastest
form that its documentation shows for a whole sequence, with its default surrogate. Those that have adaptive neurons add
the adaptation to the threshold (ALIF). All have recurrent layers, here without a bias where that can be left out.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..common import machine

Made = TypeVar("Made")

DECAY = 0.5
ADAPT_DECAY, ADAPT_SPIKE = 0.9, 0.2
# Options of asgl_cuda.adaptive_lif: the adaptation in the current follows the potential, too.
ADLIF: dict[str, Any] = {"adapt_decay": ADAPT_DECAY, "adapt_spike": ADAPT_SPIKE, "adapt_potential": 0.1}
ALIF: dict[str, Any] = {"adapt_decay": ADAPT_DECAY, "adapt_spike": ADAPT_SPIKE, "to_threshold": True}


class Peer(NamedTuple):
    """Another implementation of a layer."""

    name: str  # with the version
    spikes: Callable[[Tensor], Tensor]  # [T, N] to [T, N]
    same_neuron: dict[str, Any]  # options of asgl_cuda.lif, or of adaptive_lif, for the same spikes


def step_by_step(cell: Callable[..., Any], x_seq: Iterable[Tensor], state: Any = None) -> Tensor:
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


def norse_alif(device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """LSNNCell, a step a call; its synapse passes the input on, a step later."""
    from norse.torch import LSNNCell, LSNNFeedForwardState, LSNNParameters

    dt = 0.001
    tensors = {"v_leak": 0.0, "v_th": 1.0, "v_reset": 0.0, "tau_mem_inv": (1 - DECAY) / dt, "tau_syn_inv": 1 / dt}
    tensors |= {"tau_adapt_inv": (1 - ADAPT_DECAY) / dt, "beta": ADAPT_SPIKE / ADAPT_DECAY}
    parameters = LSNNParameters(**{name: torch.tensor(value, device=device) for name, value in tensors.items()})
    cell = LSNNCell(parameters, dt=dt)

    def spikes(x_seq: Tensor) -> Tensor:
        first, *later = x_seq
        nothing = torch.zeros_like(first)
        state = LSNNFeedForwardState(v=nothing, i=first, b=torch.ones_like(first))
        return step_by_step(cell, (*later, nothing), state)

    return spikes, {**ALIF, "strict_threshold": True, "input_gain": 1 - DECAY}


def sinabs_alif(device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """ALIF over the sequence, with the reset of `sinabs`."""
    from sinabs import layers
    from sinabs.activation import MembraneReset

    layer = layers.ALIF(
        tau_mem=-1 / math.log(DECAY), tau_adapt=-1 / math.log(ADAPT_DECAY),
        adapt_scale=ADAPT_SPIKE / (1 - ADAPT_DECAY), reset_fn=MembraneReset(), norm_input=False,
    ).to(device)  # fmt: skip

    def spikes(x_seq: Tensor) -> Tensor:
        layer.reset_states()
        return layer(x_seq[None])[0]  # batch first

    return spikes, ALIF


class RecurrentPeer(NamedTuple):
    """Another implementation of a recurrent layer."""

    spikes: Callable[[Tensor], Tensor]  # [T, B, N] to [T, B, N]
    weights: tuple[Tensor, ...]  # their gradients are computed
    same_neuron: dict[str, Any]  # options of asgl_cuda.recurrent_lif for the same spikes
    has_input: bool = False  # the layer multiplies its input with a weight, too


def snntorch_recurrent(weight: Tensor, input_weight: Tensor) -> RecurrentPeer:
    """RLeaky, a step a call; by default it subtracts at the next step, after the decay."""
    import snntorch

    leaky = snntorch.RLeaky(beta=DECAY, linear_features=len(weight)).to(weight)
    with torch.no_grad():
        leaky.recurrent.weight.copy_(weight)
        leaky.recurrent.bias.zero_()

    def cell(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        s, v = leaky(x, *state)
        return s, (s, v)

    def spikes(x_seq: Tensor) -> Tensor:
        return step_by_step(cell, x_seq, (torch.zeros_like(x_seq[0]),) * 2)

    subtracts = {"v_reset": None, "reset_amount": 1 / DECAY, "strict_threshold": True}
    return RecurrentPeer(spikes, tuple(leaky.recurrent.parameters()), subtracts)


def sinabs_recurrent(weight: Tensor, input_weight: Tensor) -> RecurrentPeer:
    """LIFRecurrent over the sequence, with the spikes and the reset of `sinabs`."""
    from sinabs import layers
    from sinabs.activation import MembraneReset, SingleSpike

    connections = linear_of(weight)
    layer = layers.LIFRecurrent(
        tau_mem=-1 / math.log(DECAY), rec_connect=connections, spike_fn=SingleSpike, reset_fn=MembraneReset(),
        norm_input=False,
    ).to(weight)  # fmt: skip

    def spikes(x_seq: Tensor) -> Tensor:
        layer.reset_states()
        return layer(x_seq.movedim(0, 1)).movedim(1, 0)  # batch first

    return RecurrentPeer(spikes, (connections.weight,), {})


def norse_recurrent(weight: Tensor, input_weight: Tensor) -> RecurrentPeer:
    """LIFRecurrent over the sequence; its synapse lasts for a step, and its current is scaled by 1 - decay."""
    from norse.torch import LIFParameters, LIFRecurrent

    dt = 0.001
    values = {"v_leak": 0.0, "v_th": 1.0, "v_reset": 0.0, "tau_mem_inv": (1 - DECAY) / dt, "tau_syn_inv": 1 / dt}
    parameters = LIFParameters(**{name: weight.new_tensor(value) for name, value in values.items()})
    weights = [nn.Parameter(each / (1 - DECAY)) for each in (input_weight, weight)]
    layer = LIFRecurrent(
        input_weight.shape[1], len(weight), parameters, input_weights=weights[0], recurrent_weights=weights[1],
        autapses=True, dt=dt,
    )  # fmt: skip
    return RecurrentPeer(lambda x_seq: layer(x_seq)[0], tuple(weights), {"strict_threshold": True}, has_input=True)


def spikingjelly_recurrent(weight: Tensor, input_weight: Tensor) -> RecurrentPeer:
    """LIFNode in a LinearRecurrentContainer, which multiplies input and spikes with one weight."""
    from spikingjelly.activation_based import functional, layer

    count = len(weight)
    node = spikingjelly_node().to(weight)
    node.step_mode = "s"
    container = layer.LinearRecurrentContainer(node, count, count, bias=False, step_mode="m").to(weight)
    with torch.no_grad():
        container.rc.weight.copy_(torch.cat([input_weight, weight], 1))

    def spikes(x_seq: Tensor) -> Tensor:
        functional.reset_net(container)
        return container(x_seq)

    return RecurrentPeer(spikes, (container.rc.weight,), {}, has_input=True)


def linear_of(weight: Tensor) -> nn.Linear:
    """The product with a weight of its own, of these values."""
    layer = nn.Linear(*weight.shape, bias=False).to(weight)
    layer.weight.data.copy_(weight)
    return layer


Maker = Callable[[torch.device], tuple[Callable[[Tensor], Tensor], dict[str, Any]]]
_MAKERS: dict[str, Maker] = {"SpikingJelly": spikingjelly, "snnTorch": snntorch, "Norse": norse, "sinabs": sinabs}
_ADAPTIVE_MAKERS: dict[str, Maker] = {"Norse": norse_alif, "sinabs": sinabs_alif}


_RECURRENT_MAKERS: dict[str, Callable[[Tensor, Tensor], RecurrentPeer]] = {
    "SpikingJelly": spikingjelly_recurrent,
    "snnTorch": snntorch_recurrent,
    "Norse": norse_recurrent,
    "sinabs": sinabs_recurrent,
}


def _made(makers: Mapping[str, Callable[..., Made]], *arguments: Any) -> tuple[dict[str, Made], list[str]]:
    """What the makers of installed libraries make, by name and version; the names of missing libraries."""
    found, missing = {}, []
    for name, make in makers.items():
        try:
            made = make(*arguments)
        except ImportError:
            missing.append(name)
            continue
        found[f"{name} {importlib.metadata.version(name.lower())}"] = made
    return found, missing


def _installed(makers: Mapping[str, Maker], device: torch.device) -> tuple[list[Peer], list[str]]:
    found, missing = _made(makers, device)
    return [Peer(name, *made) for name, made in found.items()], missing


def installed_peers(device: torch.device) -> tuple[list[Peer], list[str]]:
    """The installed peers, and the names of missing peers."""
    return _installed(_MAKERS, device)


def adaptive_peers(device: torch.device) -> list[Peer]:
    """The installed peers with adaptive neurons, as those."""
    return _installed(_ADAPTIVE_MAKERS, device)[0]


def recurrent_peers(weight: Tensor, input_weight: Tensor) -> dict[str, RecurrentPeer]:
    """Recurrent layers of the installed libraries, with these weights, `[N, N]`."""
    return _made(_RECURRENT_MAKERS, weight, input_weight)[0]


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


def adaptive_step(
    x: Tensor,
    v: Tensor,
    w: Tensor,
    adapt_decay: float,
    adapt_spike: float,
    adapt_potential: float = 0.0,
    to_threshold: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of adaptive neurons in plain PyTorch: spike, potential, adaptation."""
    h = DECAY * v + (x if to_threshold else x - w)
    u = (h - w if to_threshold else h) - 1.0
    a = (u + 0.5).clamp(0, 1)
    s = a + ((u >= 0).to(a) - a).detach()
    v = h * (1 - s)
    w = adapt_decay * w + adapt_spike * s
    return s, v, w + adapt_potential * v if adapt_potential else w


def adaptive_loop(
    x_seq: Tensor, step: Callable[..., tuple[Tensor, Tensor, Tensor]] = adaptive_step, **options: Any
) -> Tensor:
    """Adaptive neurons as a loop over the steps."""
    v, w = torch.zeros_like(x_seq[0]), torch.zeros_like(x_seq[0])
    s_seq = []
    for x in x_seq:
        s, v, w = step(x, v, w, **options)
        s_seq.append(s)
    return torch.stack(s_seq)


def recurrent_step(x: Tensor, s: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One step of recurrent neurons in plain PyTorch: spike, potential."""
    h = DECAY * v + x + nn.functional.linear(s, weight)
    u = h - 1.0
    a = (u + 0.5).clamp(0, 1)
    s = a + ((u >= 0).to(a) - a).detach()
    return s, h * (1 - s)


def recurrent_loop(
    x_seq: Tensor, weight: Tensor, step: Callable[..., tuple[Tensor, Tensor]] = recurrent_step
) -> Tensor:
    """Recurrent neurons as a loop over the steps."""
    s = v = torch.zeros_like(x_seq[0])
    s_seq = []
    for x in x_seq:
        s, v = step(x, s, v, weight)
        s_seq.append(s)
    return torch.stack(s_seq)
