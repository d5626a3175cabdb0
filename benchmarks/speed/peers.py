"""The neurons of other libraries that are compared with asgl_cuda, here called peers.

The libraries have no ASGL. Each peer is an ordinary LIF neuron with decay 1/2, threshold 1 and reset to 0, in the
fastest form that the library's documentation shows for a whole sequence, with the library's default surrogate. Norse
and sinabs also have adaptive neurons, which add the adaptation to the threshold (ALIF). All have recurrent layers, here
without a bias where that can be left out.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common import in_words, machine

DECAY = 0.5
ADAPT_DECAY, ADAPT_SPIKE = 0.9, 0.2
SURROGATE = "rectangle"  # of asgl_cuda in all rows that name no other
# Options of asgl_cuda.adaptive_lif. In adLIF the adaptation also follows the potential.
ADLIF: dict[str, Any] = {"adapt_decay": ADAPT_DECAY, "adapt_spike": ADAPT_SPIKE, "adapt_potential": 0.1}
ALIF: dict[str, Any] = {"adapt_decay": ADAPT_DECAY, "adapt_spike": ADAPT_SPIKE, "to_threshold": True}
NORSE_STEP = 0.001  # seconds
Spikes = Callable[[Tensor], Tensor]  # [T, N] to [T, N], of recurrent layers [T, B, N]


class Peer(NamedTuple):
    """A layer of another library, and how it is compared with asgl_cuda."""

    layer: Spikes  # from the state of its last call, unless it starts at rest by itself
    same_neuron: dict[str, Any]  # options of lif, adaptive_lif or recurrent_lif for the same spikes
    weights: tuple[Tensor, ...] = ()  # of a recurrent layer: their gradients are computed
    has_input: bool = False  # a recurrent layer that multiplies its input with a weight, too
    reset: Callable[[], object] = tuple  # outside of the layer, where no compiler has to follow it

    def spikes(self, x_seq: Tensor) -> Tensor:
        """The layer's spikes for a sequence that starts at rest."""
        self.reset()
        return self.layer(x_seq)

    def compiled(self) -> Peer:
        return self._replace(layer=torch.compile(self.layer))


# ---- calls of the libraries ----


def step_by_step(cell: Callable[..., Any], x_seq: Iterable[Tensor], state: Any = None) -> Tensor:
    """The spikes of a cell that maps input and state to spike and state."""
    s_seq = []
    for x in x_seq:
        s, state = cell(x, state)
        s_seq.append(s)
    return torch.stack(s_seq)


class OverSteps(nn.Module):
    """Applies a cell to a sequence, one step per call, from the state that `rest` returns for the first step."""

    def __init__(self, cell: Callable[..., Any], rest: Callable[[Tensor], Any] = lambda x: None) -> None:
        super().__init__()
        self.cell, self._rest = cell, rest

    def forward(self, x_seq: Tensor) -> Tensor:
        return step_by_step(self.cell, x_seq, self._rest(x_seq[0]))


class BatchFirst(nn.Module):
    """Wraps a layer that takes `[B, T, ...]`, for inputs `[T, B, ...]` or `[T, N]`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_seq: Tensor) -> Tensor:
        batched = x_seq if x_seq.dim() > 2 else x_seq[:, None]
        return self.layer(batched.movedim(0, 1)).movedim(1, 0).reshape(x_seq.shape)  # type: ignore[no-any-return]


def peer_of_spikingjelly(module: Any, *about: Any) -> Peer:
    from spikingjelly.activation_based import functional

    return Peer(module, {}, *about, reset=partial(functional.reset_net, module))


def peer_of_sinabs(layer: Any, same_neuron: dict[str, Any], *about: Any) -> Peer:
    return Peer(BatchFirst(layer), same_neuron, *about, reset=layer.reset_states)


def norse_parameters(kind: Callable[..., Any], like: Tensor, **more: float) -> Any:
    """Parameters of a Norse neuron with decay DECAY. Norse multiplies the input current by 1 - DECAY."""
    values = {"v_leak": 0.0, "v_th": 1.0, "v_reset": 0.0, "tau_mem_inv": (1 - DECAY) / NORSE_STEP, **more}
    return kind(**{name: like.new_tensor(value) for name, value in values.items()})


def sinabs_neuron() -> dict[str, Any]:
    """Arguments of a sinabs neuron with decay DECAY and at most one spike per step, which is not the default."""
    from sinabs.activation import MembraneReset, SingleSpike

    reset = {"reset_fn": MembraneReset(), "norm_input": False}
    return {"tau_mem": -1 / math.log(DECAY), "spike_fn": SingleSpike, **reset}


def spikingjelly_node(step_mode: str = "m") -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    options = {"decay_input": False, "surrogate_function": surrogate.Sigmoid(alpha=4.0)}
    return neuron.LIFNode(tau=1 / (1 - DECAY), step_mode=step_mode, **options)


# ---- LIF and ALIF, by a tensor on their device ----


def spikingjelly(like: Tensor) -> Peer:
    return peer_of_spikingjelly(spikingjelly_node())


def snntorch(like: Tensor) -> Peer:
    """Leaky of snnTorch, which takes one step per call."""
    import snntorch

    leaky = snntorch.Leaky(beta=DECAY, threshold=1.0, reset_mechanism="zero").to(like)
    return Peer(OverSteps(leaky, torch.zeros_like), {"strict_threshold": True})


def norse(like: Tensor) -> Peer:
    """Norse's LIFBoxCell, which takes one step per call. Its potentials and threshold are scaled by 1 - DECAY."""
    from norse.torch import LIFBoxCell, LIFBoxParameters

    cell = LIFBoxCell(norse_parameters(LIFBoxParameters, like, v_th=1 - DECAY), dt=NORSE_STEP)
    return Peer(OverSteps(cell), {"strict_threshold": True})


def sinabs(like: Tensor) -> Peer:
    """LIF of sinabs, which takes the whole sequence."""
    from sinabs import layers

    return peer_of_sinabs(layers.LIF(**sinabs_neuron()).to(like), {})


def norse_alif(like: Tensor) -> Peer:
    """Norse's LSNNCell, which takes one step per call. Its synapse passes the input on one step later."""
    from norse.torch import LSNNCell, LSNNFeedForwardState, LSNNParameters

    rates = {"tau_syn_inv": 1 / NORSE_STEP, "tau_adapt_inv": (1 - ADAPT_DECAY) / NORSE_STEP}
    parameters = norse_parameters(LSNNParameters, like, **rates, beta=ADAPT_SPIKE / ADAPT_DECAY)
    cell = LSNNCell(parameters, dt=NORSE_STEP)

    def spikes(x_seq: Tensor) -> Tensor:
        first, *later = x_seq
        nothing = torch.zeros_like(first)
        state = LSNNFeedForwardState(v=nothing, i=first, b=torch.ones_like(first))
        return step_by_step(cell, (*later, nothing), state)

    return Peer(spikes, {**ALIF, "strict_threshold": True, "input_gain": 1 - DECAY})


def sinabs_alif(like: Tensor) -> Peer:
    """ALIF of sinabs, which takes the whole sequence, with its default of several spikes per step."""
    from sinabs import layers

    neuron = {name: value for name, value in sinabs_neuron().items() if name != "spike_fn"}
    adaptation = {"tau_adapt": -1 / math.log(ADAPT_DECAY), "adapt_scale": ADAPT_SPIKE / (1 - ADAPT_DECAY)}
    return peer_of_sinabs(layers.ALIF(**neuron, **adaptation).to(like), ALIF)


# ---- recurrent layers, by their weight and that of the input ----


def zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two states at rest."""
    return torch.zeros_like(x), torch.zeros_like(x)


def snntorch_recurrent(weight: Tensor, input_weight: Tensor) -> Peer:
    """RLeaky of snnTorch, which takes one step per call. It resets by subtraction in the next step, after the decay."""
    import snntorch

    leaky = snntorch.RLeaky(beta=DECAY, linear_features=len(weight)).to(weight)
    with torch.no_grad():
        leaky.recurrent.weight.copy_(weight)
        leaky.recurrent.bias.zero_()

    def cell(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        s, v = leaky(x, *state)
        return s, (s, v)

    subtracts = {"v_reset": None, "reset_amount": 1 / DECAY, "strict_threshold": True}
    return Peer(OverSteps(cell, zeros), subtracts, tuple(leaky.recurrent.parameters()))


def sinabs_recurrent(weight: Tensor, input_weight: Tensor) -> Peer:
    """LIFRecurrent of sinabs, which takes the whole sequence."""
    from sinabs import layers

    connections = nn.Linear(*weight.shape, bias=False).to(weight)
    connections.weight.data.copy_(weight)
    layer = layers.LIFRecurrent(rec_connect=connections, **sinabs_neuron()).to(weight)
    return peer_of_sinabs(layer, {}, (connections.weight,))


def norse_recurrent(weight: Tensor, input_weight: Tensor) -> Peer:
    """Norse's LIFRecurrent, which takes the whole sequence. Its synaptic current lasts for one step."""
    from norse.torch import LIFParameters, LIFRecurrent

    parameters = norse_parameters(LIFParameters, weight, tau_syn_inv=1 / NORSE_STEP)
    weights = [nn.Parameter(each / (1 - DECAY)) for each in (input_weight, weight)]
    layer = LIFRecurrent(
        input_weight.shape[1], len(weight), parameters, input_weights=weights[0], recurrent_weights=weights[1],
        autapses=True, dt=NORSE_STEP,
    )  # fmt: skip
    return Peer(lambda x_seq: layer(x_seq)[0], {"strict_threshold": True}, tuple(weights), has_input=True)


def spikingjelly_recurrent(weight: Tensor, input_weight: Tensor) -> Peer:
    """SpikingJelly's LIFNode in a LinearRecurrentContainer, which multiplies input and spikes by one weight.

    The container must have as many inputs as neurons. For another number of inputs, it follows a product of the input.
    """
    from spikingjelly.activation_based import layer

    node, count, has_input = spikingjelly_node("s"), len(weight), input_weight.shape == weight.shape
    container = layer.LinearRecurrentContainer(node, count, count, bias=False, step_mode="m").to(weight)
    with torch.no_grad():
        container.rc.weight.copy_(torch.cat([input_weight if has_input else torch.eye(count).to(weight), weight], 1))
    return peer_of_spikingjelly(container, (container.rc.weight,), has_input)


class Recurrent(nn.Module):
    """A peer's recurrent layer. If it has no weight for the input, it follows a product of the whole sequence."""

    def __init__(self, peer: Peer, input_weight: Tensor) -> None:
        super().__init__()
        self.layer, self._reset, self.weights = peer.layer, peer.reset, nn.ParameterList(peer.weights)
        self.input_weight = None if peer.has_input else nn.Parameter(input_weight)

    def forward(self, x_seq: Tensor) -> Tensor:
        self._reset()
        return self.layer(x_seq if self.input_weight is None else nn.functional.linear(x_seq, self.input_weight))


PEERS: dict[str, dict[str, Callable[..., Peer]]] = {
    "LIF": {"SpikingJelly": spikingjelly, "snnTorch": snntorch, "Norse": norse, "sinabs": sinabs},
    "ALIF": {"Norse": norse_alif, "sinabs": sinabs_alif},
    "recurrent": {
        "SpikingJelly": spikingjelly_recurrent, "snnTorch": snntorch_recurrent, "Norse": norse_recurrent,
        "sinabs": sinabs_recurrent,
    },
}  # fmt: skip


def installed(kind: str) -> dict[str, Callable[..., Peer]]:
    """The functions that make the peers of this kind, for the installed libraries, by name and version."""
    found = {}
    for name, make in PEERS[kind].items():
        if find_spec(name.lower()) is not None:
            found[f"{name} {importlib.metadata.version(name.lower())}"] = make
    return found


def spikingjelly_implementation(device: torch.device) -> str | None:
    """The implementation of LIF that SpikingJelly has chosen for the device: cuda, triton or torch; None before 2.0."""
    try:
        from spikingjelly.activation_based.functional import neuron_implementation
    except ImportError:
        return None
    return str(neuron_implementation("lif", device)["implementation"])


def installed_peers(kind: str, *arguments: Tensor) -> dict[str, Peer]:
    return {name: make(*arguments) for name, make in installed(kind).items()}


def introduced(device: torch.device, words: str) -> dict[str, Any]:
    """Machine, software and peers of a measurement; printed with these words, and what is missing."""
    about = {**machine(device), "peers": list(installed_peers("LIF", torch.zeros((), device=device)))}
    if device.type == "cuda":  # on a CPU there is one
        about["spikingjelly_implementation"] = spikingjelly_implementation(device)
    print(f"{in_words(about)}; {words}")
    missing = [name for name in PEERS["LIF"] if not any(peer.startswith(name) for peer in about["peers"])]
    if missing:
        print(f'not installed: {", ".join(missing)} (pip install ".[bench]")')
    return about


# ---- loops in plain PyTorch ----


def smoothed(u: Tensor, width: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The smooth value under a rectangle, and the hard spike."""
    a = (u / width + 0.5).clamp(0, 1)
    return a, (u >= 0).to(a)


def asgl_loop(x_seq: Tensor, width: Tensor, analog_prob: float, mask: Tensor | None = None) -> Tensor:
    """ASGL with a mask drawn at each step, or given to compare results."""
    v = torch.zeros_like(x_seq[0])
    s_seq = []
    for t, x in enumerate(x_seq):
        h = DECAY * v + x
        a, z = smoothed(h - 1.0, width)
        analog = torch.bernoulli(torch.full_like(h, analog_prob)) if mask is None else mask[t].to(a)
        s = a + ((1 - analog) * (z - a)).detach()
        v = h * (1 - s)
        s_seq.append(s)
    return torch.stack(s_seq)


def lif_step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the loop that docs/design/equations.md prints, without noise: spike and potential."""
    h = DECAY * v + x
    a, z = smoothed(h - 1.0)
    s = a + (z - a).detach()
    return s, h * (1 - s)


def lif_loop(like: Tensor) -> Peer:
    return Peer(OverSteps(lif_step, torch.zeros_like), {})


def adaptive_step(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    adapt_decay: float,
    adapt_spike: float,
    adapt_potential: float = 0.0,
    to_threshold: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of adaptive neurons: spike; potential and adaptation."""
    v, w = state
    h = DECAY * v + (x if to_threshold else x - w)
    a, z = smoothed((h - w if to_threshold else h) - 1.0)
    s = a + (z - a).detach()
    v = h * (1 - s)
    w = adapt_decay * w + adapt_spike * s
    return s, (v, w + adapt_potential * v if adapt_potential else w)


def recurrent_step(x: Tensor, state: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of recurrent neurons: spike; spike and potential."""
    s, v = state
    h = DECAY * v + x + nn.functional.linear(s, weight)
    a, z = smoothed(h - 1.0)
    s = a + (z - a).detach()
    return s, (s, h * (1 - s))


def recurrent_loop(weight: Tensor, input_weight: Tensor) -> Peer:
    parameter = nn.Parameter(weight)
    return Peer(OverSteps(partial(recurrent_step, weight=parameter), zeros), {}, (parameter,))


def loop(x_seq: Tensor, step: Callable[..., Any], **options: Any) -> Tensor:
    """Adaptive or recurrent neurons over the steps."""
    return step_by_step(partial(step, **options), x_seq, zeros(x_seq[0]))
