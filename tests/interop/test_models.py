"""Models of other libraries as a whole: rates, a time step a call, and states that are detached."""

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from comparison import Stack
from conversions import SINGLE, B, N, T, authors_layer, node
from sinabs.activation import MembraneReset
from spikingjelly.activation_based import functional, layer, neuron, rnn
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, OverTime
from asgl_cuda.interop.snntorch import MultiStep

HIDDEN = {"init_hidden": True}


def spikingjelly(*layers, step_mode="m"):
    model = nn.Sequential(*layers)
    functional.set_step_mode(model, step_mode)
    return model


# ---- rates ----


def steps_of(*layers):
    """A step at a time, as models of snnTorch and Norse's cells are written."""

    def forward(model, x_seq):
        states, outputs = [()] * len(layers), []
        for x in x_seq.flatten(2):
            for number, each in enumerate(model.layers):
                if isinstance(each, nn.Linear):
                    x = each(x)
                else:
                    x, *states[number] = each(x, *states[number])
            outputs.append(x)
        return torch.stack(outputs)

    return Stack(forward, layers=nn.ModuleList(layers))


def jelly_net(step_mode):
    model = spikingjelly(
        layer.Conv2d(1, 8, 3, padding=1), neuron.LIFNode(tau=2.0), layer.MaxPool2d(2),
        layer.Conv2d(8, 8, 3), layer.BatchNorm2d(8), neuron.ParametricLIFNode(), layer.Flatten(),
        layer.Linear(32, 30), neuron.CUBALIFNode(0.7, 0.7), layer.Dropout(0.5), layer.Linear(30, 30), neuron.IFNode(),
        step_mode=step_mode,
    )  # fmt: skip
    return model if step_mode == "m" else Stack(lambda m, x_seq: torch.stack([m.model(x) for x in x_seq]), model=model)


def wide():
    return nn.Linear(64, 50)


ASGL = {"surrogate": "sigmoid", "width": 1.0}
RATES = {
    "SpikingJelly, fused": (lambda: jelly_net("m"), None, 1),
    "SpikingJelly, sequences": (lambda: jelly_net("m"), ASGL, 4),
    "SpikingJelly, steps": (lambda: jelly_net("s"), ASGL, 4),
    "snnTorch": (
        lambda: steps_of(wide(), snntorch.Leaky(0.9), nn.Linear(50, 50), snntorch.Synaptic(0.8, 0.8)), ASGL, 2,
    ),
    "Norse, cells": (lambda: steps_of(wide(), norse.LIFCell(), nn.Linear(50, 50), norse.LIFBoxCell()), ASGL, 2),
    "Norse": (
        lambda: norse.SequentialState(nn.Flatten(2), wide(), norse.LIF(), nn.Linear(50, 50), norse.IAF()), None, 2,
    ),
    "sinabs": (
        lambda: nn.Sequential(
            Stack(lambda _, x_seq: x_seq.transpose(0, 1)), nn.Flatten(2), wide(),
            sinabs.layers.LIF(tau_mem=5.0, **SINGLE), nn.Linear(50, 50), sinabs.layers.IAF(**SINGLE),
        ), None, 2,
    ),
    "behind neurons that stay": (
        lambda: spikingjelly(nn.Flatten(2), wide(), neuron.QIFNode(), nn.Linear(50, 50), neuron.LIFNode()), None, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_converted_layers_fire_at_the_rate(name):
    torch.manual_seed(3)
    x_seq = torch.rand(1, 12, 1, 8, 8, generator=torch.Generator().manual_seed(5)).expand(4, -1, -1, -1, -1)
    make, asgl, layers = RATES[name]
    model = make()
    if name == "SpikingJelly, fused":
        nn.init.normal_(model[0].weight)  # in front of neurons that stay as they are
        model, _ = asgl_cuda.fuse(model, x_seq)  # converts those that it joins, and no others
    else:
        model, _ = asgl_cuda.convert(model, asgl=asgl)
    if name == "behind neurons that stay":
        model[1].weight.data *= 20
    calibrated = asgl_cuda.calibrate(model, x_seq)
    assert len(calibrated.layers) == layers
    for row in calibrated.layers:
        assert row.rate_after == pytest.approx(0.2, rel=0.02), row
    if name == "behind neurons that stay":  # weights in front of those are not assigned to later layers
        assert [row.weight for row in calibrated.layers] == ["3.weight"]
    assert all(row.factor == pytest.approx(1, rel=0.03) for row in asgl_cuda.calibrate(model, x_seq).layers)
    asgl_cuda.reset(model.eval())
    model(x_seq)


# ---- a time step a call ----


def network(*neurons, linear=nn.Linear):
    """Neurons with weights in front of each, whose sums are exact for any number of rows; most cause spikes."""
    layers = [each for size, made in zip([4] + [N] * len(neurons), neurons, strict=False)
              for each in (linear(size, N), made)]  # fmt: skip
    with torch.no_grad():
        for value in (value for made in layers[::2] for value in made.parameters()):
            value.copy_((value * 16).round() / 4 + 0.5)
    return nn.Sequential(*layers)


def converted(model):
    return asgl_cuda.convert(model, inplace=True)[0]


def nodes(step_mode, *more):
    made = neuron.LIFNode(v_reset=None), neuron.ParametricLIFNode(), neuron.CUBALIFNode(), neuron.QIFNode()
    return spikingjelly(*network(*made, *more, linear=layer.Linear), step_mode=step_mode)


def sinabs_network():
    return network(
        sinabs.layers.LIF(2.0, tau_syn=3.0, **SINGLE), sinabs.layers.LIF(5.0, reset_fn=MembraneReset(), **SINGLE),
        sinabs.layers.ExpLeak(4.0),
    )  # fmt: skip


def squeezed():
    return sinabs.layers.IAFSqueeze(batch_size=B, **SINGLE)


# A model and the time dimension of its sequences: None where it takes a step a call.
STREAMED = {
    "spikingjelly m": (lambda: nodes("m"), 0),
    "spikingjelly s": (lambda: nodes("s"), None),
    "spikingjelly steps over time": (lambda: network(layer.MultiStepContainer(neuron.LIFNode()), LIF()), 0),
    "spikingjelly filter": (
        lambda: network(spikingjelly(neuron.IFNode(), layer.SynapseFilter(2.0), layer.Dropout()), nn.Identity()), 0,
    ),
    "spikingjelly beside ours, fused": (
        lambda: asgl_cuda.fuse(
            network(LIF(), node("LIFNode"), spikingjelly(layer.BatchNorm1d(N), neuron.LIFNode()), OverTime(nn.ReLU())),
            torch.rand(T, B, 4),
        )[0], 0,
    ),
    "spikingjelly, spikes that return": (
        lambda: network(layer.LinearRecurrentContainer(neuron.LIFNode(), N, N, step_mode="m")), 0,
    ),
    "snntorch": (
        lambda: network(snntorch.Leaky(0.9, **HIDDEN), snntorch.Synaptic(0.8, 0.7, **HIDDEN, output=True)), None,
    ),
    "snntorch over time": (lambda: network(LIF(), MultiStep(snntorch.Leaky(0.9))), 0),
    "snntorch, spikes that return": (lambda: network(snntorch.RLeaky(0.8, linear_features=N, **HIDDEN)), None),
    "sinabs": (sinabs_network, 1),
    "sinabs with time and batch in one, over time": (
        lambda: network(OverTime(squeezed()), sinabs.layers.ExpLeak(4.0)), 1,
    ),
    "sinabs with time and batch in one": (lambda: network(squeezed()), None),
}  # fmt: skip
CHANGES = pytest.mark.parametrize("change", [lambda model: model, converted], ids=["original", "converted"])


def parts(output):
    return output if isinstance(output, tuple) else (output,)


@CHANGES
@pytest.mark.parametrize(("make", "time_dim"), STREAMED.values(), ids=STREAMED)
def test_steps_are_one_sequence(make, time_dim, change):
    model = change(make()).eval()
    x_seq = torch.randint(-1, 6, (T, B, 4)).float()
    with torch.no_grad():
        if time_dim is None:  # the only way to compute it
            whole = [torch.stack(each) for each in zip(*(parts(model(x_t)) for x_t in x_seq), strict=True)]
        else:
            whole = [part.movedim(time_dim, 0) for part in parts(model(x_seq.movedim(0, time_dim)))]
        assert any(part.any() for part in whole)
        for _ in range(2):
            asgl_cuda.reset(model)
            steps = [parts(asgl_cuda.step(model, x_t)) for x_t in x_seq]
            for ours, theirs in zip(zip(*steps, strict=True), whole, strict=True):
                torch.testing.assert_close(torch.stack(ours), theirs, rtol=0, atol=1e-6)


def test_a_model_that_goes_over_time_itself():
    class Loop(nn.Module):
        def __init__(self, keeps):
            super().__init__()
            self.linear, self.lif, self.keeps = nn.Linear(4, N), snntorch.Leaky(0.9, init_hidden=keeps), keeps

        def forward(self, x_seq):
            if self.keeps:
                return torch.stack([self.lif(self.linear(x)) for x in x_seq])
            return torch.stack([self.lif(self.linear(x), self.lif.reset_mem())[0] for x in x_seq])

    model, x_seq = Loop(True), torch.randint(-1, 9, (T, B, 4)).float()
    whole = model(x_seq)
    asgl_cuda.reset(model)
    assert torch.equal(torch.stack([asgl_cuda.step(model, x_t, time_dim=0) for x_t in x_seq]), whole)
    with pytest.raises(
        RuntimeError, match=r"Leaky at 'lif' is called twice .* loops over time, pass the time dimension"
    ):
        asgl_cuda.step(model, x_seq[0])
    other = Loop(False)
    with pytest.raises(
        RuntimeError, match=r"Leaky at 'lif' gets its state as an argument from the model's forward.*init_hidden=True"
    ):
        asgl_cuda.step(other, x_seq[0], time_dim=0)
    for each in (model, other):
        assert not each.lif._forward_pre_hooks
        assert not each.lif._forward_hooks
    with pytest.raises(ValueError, match=r"got none \(one step per call\) for LIFNode at '0', 0 for LIF at '1'"):
        asgl_cuda.step(nn.Sequential(neuron.LIFNode(), LIF()), x_seq[0])


@pytest.mark.parametrize(
    "make", [lambda: LIF(stateful=True), lambda: snntorch.Leaky(0.9, **HIDDEN)], ids=["LIF", "Leaky"]
)
def test_calls_in_compiled_code_are_not_checked(make):
    """A layer that is called twice in a step goes on from its own state."""
    torch._dynamo.reset()
    model, other = (Stack(lambda m, x_seq: m.lif(m.lif(x_seq)), lif=make()).eval() for _ in range(2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for x_t in torch.randint(2, 6, (T, B, 4)).float():
        expected = other(x_t[None])[0]
        assert expected.any()
        assert torch.equal(asgl_cuda.step(compiled, x_t), expected)


REFUSED = {
    "norse": (lambda: nn.Sequential(nn.Linear(4, N), norse.LIFCell()), r"LIFCell at '1' .*: in Norse the caller"),
    "norse sequence": (lambda: norse.SequentialState(norse.LIF()), "LIF at '0' .*: in Norse the caller passes"),
    "norse recurrent": (lambda: norse.LIFRecurrentCell(4, N), "LIFRecurrentCell can't .*: in Norse the caller passes"),
    "not spiking": (neuron.NonSpikingLIFNode, "NonSpikingLIFNode can't be called step .* carries no potential"),
    "parallel": (lambda: nn.Sequential(neuron.PSN(T)), "PSN at '0' can't be called step .* carries no potential"),
    "sinabs recurrent": (
        lambda: sinabs.layers.IAFRecurrent(rec_connect=nn.Linear(4, 4)), "IAFRecurrent .* its recurrent input",
    ),
    "an adaptive current": (
        lambda: sinabs.layers.ALIF(5.0, 5.0, 3.0, reset_fn=MembraneReset()), r"ALIF .* its current \(tau_syn\)",
    ),
    "fixed steps": (lambda: sinabs.layers.IAFSqueeze(num_timesteps=T), "IAFSqueeze .*num_timesteps=5; with batch_size"),
    "authors": (lambda: authors_layer(made=False), "LIFLayer can't be called step .* starts each call at rest"),
}  # fmt: skip


@CHANGES
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_errors_of_models_that_can_not_be_streamed(make, words, change):
    with pytest.raises(RuntimeError, match=rf"asgl_cuda\.step: {words}"):
        asgl_cuda.step(change(make()), torch.rand(B, 4))


CARRYING = [
    lambda: node("LIFNode"), lambda: neuron.PSN(4), lambda: layer.SynapseFilter(2.0), lambda: snntorch.Leaky(0.9),
    lambda: snntorch.SLSTM(3, 3), norse.LIF, norse.LICell, lambda: norse.LIFRecurrentCell(3, 3),
    lambda: sinabs.layers.LIF(2.0), lambda: sinabs.layers.ExpLeak(2.0), lambda: authors_layer(made=False),
    lambda: MultiStep(snntorch.Leaky(0.9)), lambda: layer.MultiStepContainer(neuron.IFNode()),
    lambda: rnn.SpikingLSTM(3, 3, 1),
]  # fmt: skip


def test_over_time_refuses_neurons_of_all_libraries():
    for make in CARRYING:
        for change in (lambda model: model, converted):
            model = change(nn.Sequential(nn.Linear(3, 3), make()))
            with pytest.raises(TypeError, match=r"OverTime: layer must not use time, got \w+ at '1(\.\w+)?'"):
                OverTime(model)
            wrapper = OverTime(nn.Sequential(nn.Linear(3, 3)))
            wrapper.layer.append(model)
            with pytest.raises(TypeError, match=r"OverTime: layer must not use time, got \w+ at '1\.1(\.\w+)?', "):
                wrapper(torch.rand(T, B, 3))


ROW = r"nn\.Sequential\(OverTime\(\.\.\.\), "
WHOLE = rf"in a form that takes \[T, B, \.\.\.\]: {ROW}"
OUTSIDE = {
    "Leaky": (lambda: snntorch.Leaky(0.9), rf"{WHOLE}asgl_cuda\.interop\.snntorch\.MultiStep\(Leaky\(\.\.\., init_"),
    "Alpha": (lambda: snntorch.Alpha(0.9, 0.8), "and call it as snnTorch does$"),
    "MultiStep": (lambda: MultiStep(snntorch.Leaky(0.9)), rf"as in {ROW}MultiStep\(\.\.\.\)\)$"),
    "LIFNode": (lambda: node("LIFNode"), rf"as in {ROW}LIFNode\(\.\.\.\)\)$"),
    "IFNode": (lambda: neuron.IFNode(), rf"{WHOLE}IFNode\(\.\.\., step_mode='m'\)\)$"),
    "SpikingLSTM": (lambda: rnn.SpikingLSTM(3, 3, 1), rf"as in {ROW}SpikingLSTM\(\.\.\.\)\)$"),
    "SpikingLSTMCell": (lambda: rnn.SpikingLSTMCell(3, 3), "and call it as SpikingJelly does$"),
    "LIFCell": (norse.LIFCell, rf"{WHOLE}norse\.torch\.Lift\(LIFCell\(\.\.\.\)\)\), which also returns the state$"),
    "LI": (norse.LI, r"as in norse\.torch\.SequentialState\(OverTime\(\.\.\.\), LI\(\.\.\.\)\)$"),
    "LIF": (lambda: sinabs.layers.LIF(2.0), rf"as in {ROW}LIF\(\.\.\.\)\), which takes \[B, T, \.\.\.\]$"),
    "LIFLayer": (lambda: authors_layer(made=False), rf"as in {ROW}LIFLayer\(\.\.\.\)\)$"),
}  # fmt: skip


@pytest.mark.parametrize("change", [lambda model: model, converted], ids=["original", "converted"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_over_time_says_how_a_layer_goes_outside(name, change):
    """Also for layers that take one step per call, which would take a sequence for a step. Names stay the library's."""
    make, words = OUTSIDE[name]
    with pytest.raises(TypeError, match=rf"got {name} at '1', which would .*; put it outside, {words}"):
        OverTime(change(nn.Sequential(nn.Linear(3, 3), make())))


def test_the_advice_of_over_time_works():
    x_seq = torch.rand(T, B, 3)
    norm = OverTime(nn.Linear(3, 4))
    for model in (
        nn.Sequential(norm, MultiStep(snntorch.Leaky(0.9, init_hidden=True))),
        nn.Sequential(norm, neuron.IFNode(step_mode="m")),
        nn.Sequential(norm, sinabs.layers.LIF(2.0)),
        nn.Sequential(norm, norse.Lift(norse.LIFCell())),
        norse.SequentialState(norm, norse.LI()),
    ):
        for each in (model, converted(model)):
            output = each(x_seq)
            assert (output[0] if isinstance(output, tuple) else output).shape == (T, B, 4)


def test_over_time_takes_stateless_layers():
    for module in (
        layer.Conv2d(1, 1, 1), layer.BatchNorm2d(1), layer.Dropout(), squeezed(), OverTime(nn.Conv2d(1, 1, 1)),
        layer.SeqToANNContainer(nn.Conv2d(1, 1, 1)), norse.Lift(nn.Identity()),
    ):  # fmt: skip
        OverTime(nn.Sequential(module))


# ---- detach ----


CUT = {
    "spikingjelly m": (lambda: nodes("m", LIF(stateful=True), layer.SynapseFilter(2.0)), 0),
    "spikingjelly s": (lambda: nodes("s"), None),
    "spikingjelly delay": (
        lambda: spikingjelly(*network(layer.Delay(1), nn.Identity(), linear=layer.Linear), step_mode="s"), None,
    ),
    "snntorch": (
        lambda: network(
            snntorch.Leaky(0.5, **HIDDEN), snntorch.Alpha(0.9, 0.8, **HIDDEN),
            snntorch.RLeaky(0.5, linear_features=N, **HIDDEN), snntorch.Synaptic(0.9, 0.8, **HIDDEN),
            snntorch.Leaky(0.5, **HIDDEN, reset_delay=False, learn_beta=True, learn_threshold=True),
        ), None,
    ),
    "sinabs": (sinabs_network, 1),
}  # fmt: skip


@CHANGES
@pytest.mark.parametrize(("make", "time_dim"), CUT.values(), ids=CUT)
def test_detached_states_keep_their_values_and_lose_their_graph(make, time_dim, change):
    def run(cut):
        torch.manual_seed(0)
        model = change(make())
        x = torch.rand(4, T, B, 4, requires_grad=True)
        for part in x:
            output = model(part.movedim(0, time_dim or 0) if time_dim is not None else part[0])
            cut(model)
        return output, x, model

    untouched, _, _ = run(lambda model: None)
    output, x, model = run(asgl_cuda.detach)
    assert torch.equal(output, untouched)
    assert output.any()
    (grad,) = torch.autograd.grad(output.sum(), x, allow_unused=True)
    assert grad is None or not grad[:3].any()  # a Delay leaves nothing
    assert any(value.requires_grad for value in model.parameters())
    model(x[0, 0] if time_dim is None else x[0].movedim(0, time_dim)).sum().backward()
