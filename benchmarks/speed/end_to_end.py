"""Training steps and evaluations of whole networks, with the neurons of asgl_cuda, of a loop and of other libraries.

A step is forward, loss, backward and optimizer; an evaluation is forward without gradients. Both begin at rest. The
weights, the data, the loss and the optimizer are the same for all variants of a network. Neurons are those of `peers`:
ordinary LIF with decay 1/2, threshold 1, reset to 0 and the library's default surrogate. Those of ASGL are asgl_cuda's
layers with default arguments, which also have noise and a learned width. snnTorch's recurrent neurons subtract at the
reset.

Each network is measured eager and with compiled neurons, together with the seconds of the first call. One network is
also measured compiled as a whole. Loops over many time steps take long to compile, so for these one step of the cell is
compiled, and `long_loop` measures one layer whose whole loop is compiled. SpikingJelly's nodes are also measured
converted, and snnTorch's neurons in `MultiStep`, which takes whole sequences. `asgl_cuda.fuse` merges batch
normalisation and neurons. `asgl_cuda.to_spike_layers` replaces layers with sparse inputs, after some training steps.
The networks of asgl_cuda's neurons are also measured as streams: one sample in evaluation, by `asgl_cuda.step`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import LIF, RecurrentLIF

from ..common import fused_backends
from . import recurrent
from .clocks import in_turns, row_of
from .microbench import (
    COMPILED,
    MOST_STEPS_TO_COMPILE,
    PLAIN,
    PLAIN_LOOP,
    check_peers,
    first_seconds,
    reset_compiler,
)
from .networks import NETWORKS, STREAMED_STEPS, MakeNeuron, Network, Training
from .peers import DECAY, OverSteps, Recurrent, installed, installed_peers, lif_loop, recurrent_loop
from .sizes import Size, samples

OURS = "asgl_cuda"  # beginning of the name of a neuron of asgl_cuda
FUSED_BLOCK = ", fused block"  # suffix of a variant whose neurons normalise
CONVERTED = ", converted"  # suffix of a variant whose neurons of another library are replaced
SPIKES = ", spike layers"  # suffix of a variant whose layers with sparse inputs are spike layers
COMPILED_STEP = ", compiled step"  # suffix of a variant with a compiled cell
COMPILED_NETWORK = ", compiled network"
# The libraries whose cells can be compiled alone.
BY_STEPS = {"LIF": (PLAIN_LOOP, "snnTorch", "Norse"), "recurrent": (PLAIN_LOOP, "snnTorch")}
OTHER_RESET = "snnTorch"  # whose recurrent neurons subtract at the next step
LONG_LOOP = "long loop"  # one compiled layer at many steps
LONG, LONG_REPEATS = Size(128, 2**15, "float32"), 5
# Training steps before anything but first calls is measured, so that evaluations do not use the initial running
# statistics. In deep networks these have not settled then.
TRAINED_STEPS = 20
COMPARED_STEPS = 3
COMPARED_BATCH = 4
# Losses are compared in float64: fusion changes roundings, and a single other spike changes all that follows. In
# float32, other spikes occur within a few steps, in float64 none. Other noise changes a loss by at least 1e-4.
LOSS_TOLERANCE = 1e-9
# Relative tolerance of first losses between implementations of one neuron in float32, where roundings change a few
# spikes.
SAME_NEURON = 1e-3


class Variant(NamedTuple):
    """A variant of a network: its neurons, and what else is changed in the network."""

    name: str
    neuron: MakeNeuron
    fused: bool = False  # with the normalisations
    converted: str | None = None  # to this backend
    spikes: bool = False  # spike layers where inputs are sparse
    compiled: bool = False  # the network

    @property
    def takes_steps(self) -> bool:
        """Whether `asgl_cuda.step` knows all of the network's layers."""
        return OURS in self.name or self.converted is not None


class Sequences(nn.Module):
    """snnTorch's neurons in `MultiStep`. Returns only their spikes."""

    def __init__(self) -> None:
        super().__init__()
        import snntorch

        from asgl_cuda.interop.snntorch import MultiStep

        self.layer = MultiStep(snntorch.Leaky(beta=DECAY, reset_mechanism="zero"))

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.layer(x_seq, torch.zeros_like(x_seq[0]))[0]  # type: ignore[no-any-return]


def ours(network: Network, backend: str, **options: Any) -> MakeNeuron:
    """A function that makes asgl_cuda's neurons: LIF, or in recurrent networks a linear layer and RecurrentLIF."""
    if network.kind == "LIF":
        return partial(LIF, backend=backend, **options)

    def make(input_weight: Tensor, weight: Tensor) -> nn.Module:
        count, inputs = input_weight.shape
        linear = nn.Linear(inputs, count, bias=False)
        neurons = RecurrentLIF(count, bias=False, backend=backend, **options)
        linear.weight.data, neurons.recurrent_weight.data = input_weight, weight
        return nn.Sequential(linear, neurons)

    return make


def theirs(network: Network, make: Any) -> MakeNeuron:
    """A function that makes the layer of a peer; for recurrent layers, from the weights of the input and of spikes."""
    if network.kind == "LIF":
        return lambda: make(torch.zeros(())).layer
    return lambda input_weight, weight: Recurrent(make(weight, input_weight), input_weight)


def compiled_layer(make: MakeNeuron, *weights: Tensor) -> nn.Module:
    return torch.compile(make(*weights))  # type: ignore[return-value]


def compiled_cells(make: MakeNeuron) -> MakeNeuron:
    """A function that makes the same neurons with a compiled cell, which computes one step."""

    def made(*weights: Tensor) -> nn.Module:
        layer = make(*weights)
        for each in layer.modules():
            if isinstance(each, OverSteps):
                each.cell = torch.compile(each.cell)
        return layer

    return made


def variants(network: Network, device: torch.device) -> Iterator[Variant]:
    """The variants of a network: first the neuron of ASGL, then the ordinary neuron in every implementation."""
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in network.make(nn.Identity).modules())
    for backend in fused_backends(device):
        asgl = ours(network, backend)
        yield Variant(f"{OURS} {backend}", asgl)
        if normalised:
            yield Variant(f"{OURS} {backend}{FUSED_BLOCK}", asgl, fused=True)
        plain = ours(network, backend, learn_width=False, analog_prob=0.0, detach_reset=False)
        yield Variant(f"{PLAIN}{OURS} {backend}", plain)
        if backend == "cpu":
            yield Variant(f"{PLAIN}{OURS} {backend}{SPIKES}", plain, spikes=True)
    makers = {PLAIN_LOOP: lif_loop if network.kind == "LIF" else recurrent_loop, **installed(network.kind)}
    for name, make in makers.items():
        neuron = theirs(network, make)
        yield Variant(f"{PLAIN}{name}", neuron)
        if network.input_shape[0] <= MOST_STEPS_TO_COMPILE:
            yield Variant(f"{PLAIN}{name}, {COMPILED}", partial(compiled_layer, neuron))
            if not normalised and name.startswith("SpikingJelly"):
                yield Variant(f"{PLAIN}{name}{COMPILED_NETWORK}", neuron, compiled=True)
        elif name.startswith(BY_STEPS[network.kind]):
            yield Variant(f"{PLAIN}{name}{COMPILED_STEP}", compiled_cells(neuron))
        for backend in fused_backends(device) if network.kind == "LIF" else ():
            converted = f"{PLAIN}{name}{CONVERTED} {backend}"
            if name.startswith("SpikingJelly"):
                yield Variant(converted, neuron, converted=backend)
                if normalised:
                    yield Variant(f"{converted}{FUSED_BLOCK}", neuron, fused=True, converted=backend)
            if name.startswith("snnTorch"):
                yield Variant(converted, Sequences)


def training_of(
    network: Network, variant: Variant, device: torch.device, dtype: torch.dtype = torch.float32
) -> Training:
    torch.manual_seed(0)
    model = network.make(variant.neuron)
    if variant.converted:
        asgl_cuda.convert(model, inplace=True, backend=variant.converted)
    training = Training(model, network.input_shape, device, dtype)
    if variant.fused:
        _, report = asgl_cuda.fuse(model, training.x_seq, inplace=True)
        if len(report.left) != network.left:
            raise RuntimeError(f"not all of the network is fused:\n{report}")
    if variant.compiled:
        training.model = torch.compile(training.model)
    return training


def check_losses(network: Network, device: torch.device) -> list[str]:
    """Compares losses with and without fusion; returns the names of fused variants."""
    steps, _, *sizes = network.input_shape
    network = network._replace(input_shape=(steps, COMPARED_BATCH, *sizes))

    def losses(variant: Variant) -> Tensor:
        training = training_of(network, variant, device, torch.float64)
        return torch.stack([training.step() for _ in range(COMPARED_STEPS)])

    found = {variant.name: variant for variant in variants(network, device)}
    names = [name for name, variant in found.items() if variant.fused]
    for name in names:
        ours, theirs = losses(found[name]), losses(found[name.removesuffix(FUSED_BLOCK)])
        if not torch.allclose(ours, theirs, rtol=LOSS_TOLERANCE, atol=0):
            raise RuntimeError(f"{name}: the losses must be {theirs.tolist()}, as without fusing, got {ours.tolist()}")
    return names


def check_first_losses(network: Network, losses: dict[str, float]) -> None:
    """Raises RuntimeError if an implementation of the ordinary neuron has another first loss than the first one."""
    plain = {name: loss for name, loss in losses.items() if name.startswith(PLAIN)}
    expected = next(iter(plain.values()))
    for name, loss in plain.items():
        other = network.kind == "recurrent" and name.startswith(f"{PLAIN}{OTHER_RESET}")
        if not other and abs(loss / expected - 1) > SAME_NEURON:
            raise RuntimeError(f"{name}: the first loss must be {expected:.5f}, as of the others, got {loss:.5f}")


# ---- measurement ----


@torch.no_grad()
def firing_rates(training: Training) -> dict[str, list[float]]:
    """The spikes per neuron and step of each layer, in training and in evaluation."""
    rates: list[float] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: rates.append(float(output.mean())))
        for layer in training.model.modules()
        if isinstance(layer, LIF | RecurrentLIF)
    ]
    training.loss()
    training.evaluate()
    for hook in hooks:
        hook.remove()
    return {"training": rates[: len(hooks)], "evaluation": rates[len(hooks) :]}


def first_calls(training: Training) -> dict[str, Any]:
    """The seconds of the first step and of the first evaluation, both with compiling, and the loss of that step."""
    losses: list[float] = []

    def step(training: Training) -> Tensor:
        losses.append(float(loss := training.step()))
        return loss

    seconds = {"training": training.seconds(step), "evaluation": training.seconds(Training.evaluate)}
    return {"first_seconds": seconds, "first_loss": losses[0]}


def measure(network: Network, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measures each variant: median seconds, bytes, losses and seconds of first calls; and firing rates of the neurons.

    The seconds are those of a training step, of an evaluation, and of a time step of a stream.
    """
    reset_compiler()
    found: dict[str, dict[str, Any]] = {}
    trainings: dict[str, Training] = {}
    chosen = {variant.name: variant for variant in variants(network, device)}
    for variant in chosen.values():
        try:
            training = training_of(network, variant, device)
            found[variant.name] = first_calls(training)
        except RuntimeError as error:
            if COMPILED not in variant.name:
                raise
            print(f"{variant.name} does not compile: {str(error).splitlines()[0]}")
            continue
        trainings[variant.name] = training
    check_first_losses(network, {name: each["first_loss"] for name, each in found.items()})
    for name, training in trainings.items():
        for _ in range(TRAINED_STEPS):
            training.step()
        if chosen[name].spikes:
            _, replacement = asgl_cuda.to_spike_layers(training.model, training.x_seq)
            found[name]["replaced"] = len(replacement.replaced)
            found[name]["left"] = len(replacement.left)
            training.step()
    parts = {"seconds": Training.step, "evaluation_seconds": Training.evaluate, "stream_seconds": Training.stream}
    clocks = {
        (name, part): partial(training.seconds, work)
        for part, work in parts.items()
        for name, training in trainings.items()
        if work is not Training.stream or chosen[name].takes_steps
    }
    times = in_turns(clocks, repeats)
    for name, training in trainings.items():
        found[name] |= {"last_loss": float(training.step()), **training.allocated_bytes()}
        found[name] |= {part: times[name, part].median for part in parts if (name, part) in times}
        if chosen[name].takes_steps:
            found[name]["stream_seconds"] /= STREAMED_STEPS
        found[name]["spread"] = times[name, "seconds"].spread
        if not found[name]["last_loss"] < found[name]["first_loss"]:
            raise RuntimeError(
                f"{name}: the loss must fall in training, got {found[name]['first_loss']} in the first step and "
                f"{found[name]['last_loss']} in the last one"
            )
    plain = next(name for name in trainings if name.startswith(f"{PLAIN}{OURS}"))
    return {"rates": firing_rates(trainings[plain]), "variants": found}


def long_loop(device: torch.device) -> dict[str, Any]:
    """Measures one peer's layer at many steps: seconds of the first compiled call, and of eager and compiled calls."""
    reset_compiler()
    (sample,) = samples(LONG, device)
    name, peer = next(iter({**installed_peers("LIF", sample.x), PLAIN_LOOP: lif_loop(sample.x)}.items()))
    eager, compiled = row_of(name, peer.spikes), row_of(name, peer.compiled().spikes)
    first = first_seconds(compiled, sample)
    clocks = {which: partial(first_seconds, row, sample) for which, row in (("eager", eager), ("compiled", compiled))}
    seconds = {which: times.median for which, times in in_turns(clocks, LONG_REPEATS).items()}
    return {"layer": name, "steps": LONG.steps, "neurons": LONG.neurons, "first_seconds": first, **seconds}


def measurements(
    report: dict[str, Any], device: torch.device, repeats: int, chosen: Collection[str] = (*NETWORKS, LONG_LOOP)
) -> Iterator[str]:
    """Measures the chosen networks, after checking spikes of peers and losses of fused variants."""
    check_peers(device)
    recurrent.check_peers(device)
    report.setdefault("networks", {})
    if LONG_LOOP in chosen:
        report["long_loop"] = long_loop(device)
        yield LONG_LOOP
    for name, network in NETWORKS.items():
        if name not in chosen:
            continue
        check_losses(network, device)
        report["networks"][name] = {"input_shape": list(network.input_shape), **measure(network, device, repeats)}
        report["networks"] = {each: report["networks"][each] for each in NETWORKS if each in report["networks"]}
        yield name
