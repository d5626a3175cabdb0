"""Models of other libraries, converted and not, a time step a call; their states detached."""

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from conversions import SINGLE, authors_layer
from sinabs.activation import MembraneReset
from spikingjelly.activation_based import functional, layer, neuron, rnn
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, OverTime
from asgl_cuda.interop.snntorch import MultiStep

T, B, N = 6, 3, 5


def exact(module):
    """Weights whose sums are exact for any number of rows of a matrix product; most cause spikes."""
    with torch.no_grad():
        for value in module.parameters():
            value.copy_((value * 16).round() / 4 + 0.5)
    return module


def network(*neurons, linear=nn.Linear):
    """Neurons with weights in front of each."""
    sizes = [4] + [N] * len(neurons)
    return nn.Sequential(*(each for size, made in zip(sizes, neurons, strict=False)
                           for each in (exact(linear(size, N)), made)))  # fmt: skip


def spikingjelly(step_mode, *neurons):
    model = network(*neurons, linear=layer.Linear)
    functional.set_step_mode(model, step_mode)
    return model


def converted(model):
    return asgl_cuda.convert(model, inplace=True)[0]


def nodes():
    return [neuron.LIFNode(v_reset=None), neuron.ParametricLIFNode(), neuron.CUBALIFNode(), neuron.QIFNode()]


# A model and the time dimension of its sequences: None where it takes a step a call.
STREAMED = {
    "spikingjelly m": (lambda: spikingjelly("m", *nodes()), 0),
    "spikingjelly s": (lambda: spikingjelly("s", *nodes()), None),
    "spikingjelly steps over time": (lambda: network(layer.MultiStepContainer(neuron.LIFNode()), LIF()), 0),
    "spikingjelly filter": (
        lambda: spikingjelly("m", nn.Sequential(neuron.IFNode(), layer.SynapseFilter(2.0), layer.Dropout())), 0,
    ),
    "spikingjelly beside ours": (lambda: network(OverTime(nn.ReLU()), LIF(), neuron.LIFNode(step_mode="m")), 0),
    "spikingjelly fused": (
        lambda: asgl_cuda.fuse(
            spikingjelly("m", neuron.IFNode(), nn.Sequential(layer.BatchNorm1d(N), neuron.LIFNode()))
        )[0], 0,
    ),
    "snntorch": (
        lambda: network(snntorch.Leaky(0.9, init_hidden=True),
                        snntorch.Synaptic(0.8, 0.7, init_hidden=True, output=True)), None,
    ),
    "snntorch over time": (lambda: network(LIF(), MultiStep(snntorch.Leaky(0.9))), 0),
    "sinabs": (
        lambda: network(sinabs.layers.LIF(2.0, tau_syn=3.0, **SINGLE),
                        sinabs.layers.ALIF(5.0, 5.0, reset_fn=MembraneReset()),
                        sinabs.layers.ExpLeak(4.0)), 1,
    ),
    "sinabs with time and batch in one, of a sequence": (
        lambda: network(OverTime(sinabs.layers.IAFSqueeze(batch_size=B, **SINGLE)), sinabs.layers.ExpLeak(4.0)), 1,
    ),
    "sinabs with time and batch in one": (lambda: network(sinabs.layers.IAFSqueeze(batch_size=B, **SINGLE)), None),
}  # fmt: skip


def flat(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("change", [lambda model: model, converted], ids=["original", "converted"])
@pytest.mark.parametrize(("make", "time_dim"), STREAMED.values(), ids=STREAMED)
def test_steps_are_one_sequence(make, time_dim, change):
    model = change(make()).eval()
    x_seq = torch.randint(-1, 6, (T, B, 4)).float()
    with torch.no_grad():
        if time_dim is None:  # the only way to compute it
            whole = [torch.stack(parts) for parts in zip(*(flat(model(x_t)) for x_t in x_seq), strict=True)]
        else:
            whole = [part.movedim(time_dim, 0) for part in flat(model(x_seq.movedim(0, time_dim)))]
        assert any(part.any() for part in whole)
        for _ in range(2):
            asgl_cuda.reset(model)
            steps = [flat(asgl_cuda.step(model, x_t)) for x_t in x_seq]
            assert steps[0][0].shape == (B, N)
            for ours, theirs in zip(zip(*steps, strict=True), whole, strict=True):
                assert torch.equal(torch.stack(ours), theirs)


def test_a_model_that_goes_over_time_itself():
    class Loop(nn.Module):
        def __init__(self, keeps):
            super().__init__()
            self.linear, self.lif, self.keeps = exact(nn.Linear(4, N)), snntorch.Leaky(0.9, init_hidden=keeps), keeps

        def forward(self, x_seq):
            if self.keeps:
                return torch.stack([self.lif(self.linear(x)) for x in x_seq])
            mem, spikes = self.lif.reset_mem(), []
            for x in x_seq:
                spk, mem = self.lif(self.linear(x), mem)
                spikes.append(spk)
            return torch.stack(spikes)

    model, x_seq = Loop(True), torch.randint(-1, 4, (T, B, 4)).float()
    whole = model(x_seq)
    asgl_cuda.reset(model)
    assert torch.equal(torch.stack([asgl_cuda.step(model, x_t, time_dim=0) for x_t in x_seq]), whole)
    with pytest.raises(RuntimeError, match=r"Leaky at 'lif' is called twice .* time_dim must say where time is"):
        asgl_cuda.step(model, x_seq[0])
    with pytest.raises(RuntimeError, match=r"Leaky at 'lif' gets its state from the model's forward.*init_hidden=True"):
        asgl_cuda.step(Loop(False), x_seq[0], time_dim=0)


REFUSED = {
    "norse": (lambda: nn.Sequential(nn.Linear(4, N), norse.LIFCell()), r"LIFCell at '1' .*: Norse hands its state on"),
    "norse sequence": (lambda: norse.SequentialState(norse.LIF()), "LIF at '0' .*: Norse hands its state on"),
    "norse recurrent": (lambda: norse.LIFRecurrentCell(4, N), "LIFRecurrentCell can't .*: Norse hands its state on"),
    "not spiking": (neuron.NonSpikingLIFNode, "NonSpikingLIFNode can't take a step .* carries no potential"),
    "parallel": (lambda: nn.Sequential(neuron.PSN(T)), "PSN at '0' can't take a step .* carries no potential"),
    "sinabs recurrent": (
        lambda: sinabs.layers.IAFRecurrent(rec_connect=nn.Linear(4, 4)), "IAFRecurrent .* its recurrent input",
    ),
    "an adaptive current": (
        lambda: sinabs.layers.ALIF(5.0, 5.0, 3.0, reset_fn=MembraneReset()), r"ALIF .* its current \(tau_syn\)",
    ),
    "fixed steps": (lambda: sinabs.layers.IAFSqueeze(num_timesteps=T), "IAFSqueeze .*num_timesteps=6; with batch_size"),
    "authors": (lambda: authors_layer(T), "LIFLayer can't take a step .* begins at rest with each call"),
}  # fmt: skip


@pytest.mark.parametrize("change", [lambda model: model, converted], ids=["original", "converted"])
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_errors_of_models_that_can_not_be_streamed(make, words, change):
    with pytest.raises(RuntimeError, match=rf"asgl_cuda\.step: (Converted)?{words}"):
        asgl_cuda.step(change(make()), torch.rand(B, 4))


def test_layers_that_differ_in_what_they_take():
    model = nn.Sequential(neuron.LIFNode(), LIF())
    with pytest.raises(ValueError, match=r"LIFNode at '0' takes a step a call, LIF at '1' has time at 0"):
        asgl_cuda.step(model, torch.rand(B, 4))


CARRYING = [
    neuron.LIFNode(step_mode="m"), neuron.PSN(4), layer.SynapseFilter(2.0), snntorch.Leaky(0.9), snntorch.SLSTM(3, 3),
    norse.LIF(), norse.LICell(), norse.LIFRecurrentCell(3, 3), sinabs.layers.LIF(2.0), sinabs.layers.ExpLeak(2.0),
    authors_layer(T), MultiStep(snntorch.Leaky(0.9)), layer.MultiStepContainer(neuron.IFNode()),
    rnn.SpikingLSTM(3, 3, 1),
]  # fmt: skip


@pytest.mark.parametrize("change", [lambda model: model, converted], ids=["original", "converted"])
@pytest.mark.parametrize("carrying", CARRYING, ids=lambda module: type(module).__name__)
def test_over_time_refuses_neurons_of_all_libraries(carrying, change):
    model = change(nn.Sequential(nn.Linear(3, 3), carrying))
    with pytest.raises(TypeError, match=r"asgl_cuda\.OverTime: layer must know no time, got \w+ at '1(\.\w+)?', "):
        OverTime(model)
    wrapper = OverTime(nn.Sequential(nn.Linear(3, 3)))
    wrapper.layer.append(model)
    with pytest.raises(TypeError, match=r"asgl_cuda\.OverTime: layer must know no time, got \w+ at '1\.1(\.\w+)?', "):
        wrapper(torch.rand(T, B, 3))
    asgl_cuda.revert(model, inplace=True)


def test_over_time_takes_stateless_layers():
    inside = [
        layer.Conv2d(1, 1, 1), layer.BatchNorm2d(1), layer.Dropout(), sinabs.layers.IAFSqueeze(batch_size=B),
        OverTime(nn.Conv2d(1, 1, 1)), layer.SeqToANNContainer(nn.Conv2d(1, 1, 1)), norse.Lift(nn.Identity()),
    ]  # fmt: skip
    for module in inside:
        OverTime(nn.Sequential(module))


CUT = {
    "spikingjelly m": (lambda: spikingjelly("m", *nodes(), LIF(), layer.SynapseFilter(2.0)), 0),
    "spikingjelly s": (lambda: spikingjelly("s", *nodes()), None),
    "spikingjelly delay": (lambda: spikingjelly("s", layer.Delay(1), nn.Identity()), None),
    "snntorch": (
        lambda: network(
            snntorch.Leaky(0.5, init_hidden=True), snntorch.Alpha(0.9, 0.8, init_hidden=True),
            snntorch.RLeaky(0.5, linear_features=N, init_hidden=True), snntorch.Synaptic(0.9, 0.8, init_hidden=True),
            snntorch.Leaky(0.5, init_hidden=True, reset_delay=False, learn_beta=True, learn_threshold=True),
        ), None,
    ),
    "sinabs": (STREAMED["sinabs"][0], 1),
}  # fmt: skip


@pytest.mark.parametrize("change", [lambda model: model, converted], ids=["original", "converted"])
@pytest.mark.parametrize(("make", "time_dim"), CUT.values(), ids=CUT)
def test_detached_states_keep_their_values_and_lose_their_graph(make, time_dim, change):
    def run(cut):
        torch.manual_seed(0)
        model = change(make())
        for module in model:
            if isinstance(module, LIF):
                module.stateful = True
        x = torch.rand(4, T, B, 4, requires_grad=True)
        for part in x:
            step = part.movedim(0, time_dim or 0) if time_dim is not None else part[0]
            output = model(step)
            cut(model)
        return output, x, model

    untouched, _, _ = run(lambda model: None)
    output, x, model = run(asgl_cuda.detach)
    assert torch.equal(output, untouched)
    assert output.any()
    (grad,) = torch.autograd.grad(output.sum(), x, allow_unused=True)
    assert grad is None or not grad[:3].any()  # a Delay leaves nothing
    learns = [value for value in model.parameters() if value.requires_grad]
    assert learns
    model(x[0, 0] if time_dim is None else x[0].movedim(0, time_dim)).sum().backward()
