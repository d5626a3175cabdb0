"""Schedules of the noise."""

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from comparison import Stack, random_input
from layer_cases import Foreign, network
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, AnalogProbSchedule

KINDS = {
    "multi_step": (
        lambda model: AnalogProbSchedule.multi_step(model, [5, 2, 5], gamma=0.5),
        lambda sgd: torch.optim.lr_scheduler.MultiStepLR(sgd, [2, 5, 5], 0.5),
    ),
    "cosine": (
        lambda model: AnalogProbSchedule.cosine(model, 6, final=0.05),
        lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 6, 0.05),
    ),
    "linear": (
        lambda model: AnalogProbSchedule.linear(model, 6),
        lambda sgd: torch.optim.lr_scheduler.LinearLR(sgd, 1.0, 0.0, 6),
    ),
}


@pytest.mark.parametrize(("build", "of_torch"), KINDS.values(), ids=KINDS)
def test_schedules_are_those_of_torch_from_each_layers_start(build, of_torch):
    """Constant behind the end, which torch's cosine is not."""
    model = network()
    schedule = build(model)
    assert schedule.probs == schedule.starts == {"1": 0.2, "3": 0.8}
    sgd = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": start} for start in (0.2, 0.8)])
    theirs = of_torch(sgd)
    for epoch in range(9):
        assert schedule.epoch == epoch
        assert schedule.probs == {"1": model[1].analog_prob, "3": model[3].analog_prob}
        if epoch <= 6:
            expected = theirs.get_last_lr()
            sgd.step()
            theirs.step()
        assert list(schedule.probs.values()) == pytest.approx(expected, abs=1e-12)
        schedule.step()


def test_ends_are_met_exactly():
    """No rounding is allowed: the noise at the start is the user's value, and the noise at the end may be 0."""
    for start in (number / 50 for number in range(1, 51)):
        for build in (AnalogProbSchedule.linear, AnalogProbSchedule.cosine):
            layer = LIF(analog_prob=start)
            schedule = build(layer, 1, final=0.9)
            assert layer.analog_prob == start
            schedule.step()
            assert layer.analog_prob == 0.9


@pytest.mark.parametrize(("kind", "epoch"), [("multi_step", 2), ("cosine", 8), ("linear", 0)])
def test_schedule_resumes_exactly(kind, epoch, tmp_path):
    """Also into a schedule at another epoch; the schedule itself can be pickled."""
    build, _ = KINDS[kind]
    schedule = build(network())
    for _ in range(epoch):
        schedule.step()
    torch.save(schedule.state_dict(), tmp_path / "state")
    model = network()
    resumed = build(model)
    resumed.step()
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    twin = pickle.loads(pickle.dumps(schedule))
    for _ in range(4):
        assert resumed.epoch == twin.epoch
        assert resumed.probs == twin.probs
        assert [model[1].analog_prob, model[3].analog_prob] == list(twin.probs.values())
        resumed.step()
        twin.step()


def test_a_state_brings_its_starts():
    state = AnalogProbSchedule.linear(network(), 4).state_dict()
    model = network()
    model[1].analog_prob = 0.6
    schedule = AnalogProbSchedule.linear(model, 4)
    schedule.load_state_dict(state)
    schedule.step()
    assert model[1].analog_prob == pytest.approx(0.15)
    for each in (state, schedule.state_dict()):
        each["starts"]["1"] = 0.9
        assert schedule.starts["1"] == 0.2, "neither the caller's dict nor the returned one is the state"


def test_a_layer_that_went_to_0_is_resumed():
    model = network(learn_width=False)
    schedule = AnalogProbSchedule.linear(model, 2)
    schedule.step()
    state = schedule.state_dict()
    schedule.step()
    assert model[1].analog_prob == 0
    fresh = AnalogProbSchedule.linear(model, 2)
    assert list(fresh.starts) == ["3"]
    fresh.load_state_dict(state)
    assert model[1].analog_prob == 0.1


OTHERS = r"the state must be of layers \['1', '3'\], got "
BAD_STATES = [
    ({"epoch": 1.5}, TypeError, "epoch must be an int, got float"),
    ({"epoch": -5}, ValueError, "epoch must be at least 0, got -5"),
    ({"epoch": 10**400}, ValueError, "epoch must be at most 9223372036854775807, got 1000"),
    ({"starts": {"1": 1.5, "3": 0.5}}, ValueError, r"the start of layer '1' must be in \[0, 1\], got 1\.5"),
    ({"starts": {"1": 0.5, "3": math.nan}}, ValueError, r"the start of layer '3' must be in \[0, 1\], got nan"),
    ({"starts": {"1": 0.5, "3": None}}, TypeError, "the start of layer '3' must be a float, got NoneType"),
    ({"starts": None}, ValueError, OTHERS + "None"),
    ({"starts": ["1", "3"]}, ValueError, OTHERS),
    *(
        ({"starts": dict.fromkeys(names, 0.5)}, ValueError, OTHERS)
        for names in (["1"], ["1", "3", "4"], ["0", "3"], [])
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_STATES)
def test_a_state_of_nonsense_or_other_layers_is_refused_and_nothing_is_changed(change, error, message):
    schedule = AnalogProbSchedule.linear(network(), 4)
    schedule.step()
    before = copy.deepcopy(schedule.state_dict()), schedule.probs
    with pytest.raises(error, match=f"asgl_cuda.AnalogProbSchedule: {message}"):
        schedule.load_state_dict({**before[0], "epoch": 3, **change})
    assert (schedule.state_dict(), schedule.probs) == before


def test_which_layers_are_scheduled():
    shared, ordinary, silent = LIF(analog_prob=0.4), LIF(analog_prob=0, learn_width=False), LIF(analog_prob=0)
    several, foreign = LIF(multi_spike=True, v_reset=None, analog_prob=0.0), Foreign()
    schedule = AnalogProbSchedule.linear(
        nn.Sequential(shared, ordinary, shared, silent, several, foreign), 2, final=0.5
    )
    assert schedule.starts == {"0": 0.4, "3": 0, "5": 0.3}
    schedule.step()
    assert shared.analog_prob == pytest.approx(0.45)
    assert (ordinary.analog_prob, silent.analog_prob, several.analog_prob) == (0, 0.25, 0)
    assert foreign.analog_prob == pytest.approx(0.4)
    with pytest.raises(ValueError, match="multi_spike needs analog_prob=0"):
        several.analog_prob = 0.1
    with pytest.raises(
        ValueError, match=r"a layer without multi_spike that has analog_prob > 0 or a learned width, .* in '0'"
    ):
        AnalogProbSchedule.linear(nn.Sequential(ordinary), 2)
    with pytest.raises(
        ValueError, match=r"a layer without multi_spike that has analog_prob > 0 or a learned width, .* in '0'"
    ):
        AnalogProbSchedule.linear(nn.Sequential(LIF(v_reset=None, multi_spike=True, analog_prob=0.0)), 2)


def test_a_custom_function():
    model = network()
    schedule = AnalogProbSchedule(model, lambda start, epoch: start * (epoch + 1) / 2)
    assert schedule.probs == {"1": 0.1, "3": 0.4}
    schedule.step()
    assert schedule.probs == {"1": 0.2, "3": 0.8}
    with pytest.raises(ValueError, match=r"layer '3' at epoch 2: analog_prob must be in \[0, 1\], got 1\.2"):
        schedule.step()
    assert schedule.probs == {"1": 0.2, "3": 0.8}, "a refused step must set no layer"
    assert schedule.epoch == 1
    with pytest.raises(ValueError, match="analog_prob must be in"):
        schedule.load_state_dict({"epoch": 2, "starts": {"1": 0.1, "3": 0.9}})
    assert schedule.state_dict() == {"epoch": 1, "starts": {"1": 0.2, "3": 0.8}}


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda model: AnalogProbSchedule.cosine(model, 0), ValueError, "epochs must be at least 1, got 0"),
        (lambda model: AnalogProbSchedule.linear(model, 10**400), ValueError, "epochs must be at most "),
        (lambda model: AnalogProbSchedule.linear(model, 2.0), TypeError, "epochs must be an int, got float"),
        (lambda model: AnalogProbSchedule.cosine(model, True), TypeError, "epochs must be an int, got bool"),
        (lambda model: AnalogProbSchedule.cosine(model, 2, 1.5), ValueError, r"final must be in \[0, 1\], got 1\.5"),
        (lambda model: AnalogProbSchedule.linear(model, 2, "0"), TypeError, "final must be a float, got str"),
        (lambda model: AnalogProbSchedule.linear(model, 2, 10**400), ValueError, "final must be a float, got a number"),
        (lambda model: AnalogProbSchedule.multi_step(model, [1], math.nan), ValueError, r"gamma must be .*, got nan"),
        (lambda model: AnalogProbSchedule.multi_step(model, [0, 2]), ValueError, "milestones must be at least 1"),
        (lambda model: AnalogProbSchedule.multi_step(model, [1.5]), TypeError, "milestones must be an int, got float"),
        (lambda model: AnalogProbSchedule.multi_step(model, 2), TypeError, "milestones must be a sequence .*, got int"),
        (
            lambda model: AnalogProbSchedule.multi_step(model, torch.tensor([2])),
            TypeError, r"milestones must be a sequence .*, got Tensor; milestones\.tolist\(\) converts it",
        ),
        (lambda model: AnalogProbSchedule.multi_step(model, "12"), TypeError, "milestones must .*, got str"),
        (lambda model: AnalogProbSchedule(model, 0.5), TypeError, "prob_at must be a function .*, got float; linear, "),
        (
            lambda model: AnalogProbSchedule.linear(model, 2).load_state_dict({}), ValueError,
            "the state must be a dict of 'epoch' and 'starts', got {}",
        ),
        (lambda model: AnalogProbSchedule.linear(model, 2).load_state_dict(3), ValueError, "the state .*, got 3"),
    ],
)  # fmt: skip
def test_schedule_errors(build, error, message):
    with pytest.raises(error, match=r"asgl_cuda\.AnalogProbSchedule: " + message):
        build(network())


def test_a_schedule_compiles_nothing_anew(backend, device):
    """One recompilation, where the noise ends; each epoch has the noise of eager mode."""
    torch._dynamo.reset()
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    converted, _ = asgl_cuda.convert(neuron.LIFNode(step_mode="m"), asgl={}, backend=backend)
    layers = LIF(backend=backend), asgl_cuda.BatchNormLIF(5, backend=backend), converted
    model = Stack(
        lambda m, x_seq: torch.stack([each(x_seq) for each in m.children()]), **dict(zip("abc", layers, strict=True))
    ).to(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    schedules = [AnalogProbSchedule.linear(each, 5) for each in (model, compiled)]
    x_seq = random_input(4, 300, 5, device=device)
    for epoch in range(7):
        expected, actual = [], []
        for each, found in ((model, expected), (compiled, actual)):
            torch.manual_seed(epoch)
            asgl_cuda.reset(each)
            s_seq = each(x_seq)
            found += [s_seq, *torch.autograd.grad(s_seq.square().sum(), x_seq)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True)), epoch
        for schedule in schedules:
            schedule.step()
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_shares_that_are_set_in_inference_mode_train():
    """Set, moved or made there, as by a validation: compiled training reads them outside of it."""
    layer = LIF(analog_prob=0.3)
    with torch.inference_mode():
        layer.analog_prob = 0.5
        moved = copy.deepcopy(layer).double()
        made = LIF(analog_prob=0.5)
    for each in (layer, moved, made):
        assert each._analog_prob_data.item() == 0.5
        assert not each._analog_prob_data.is_inference()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(torch.rand(4, 3, requires_grad=True)).sum().backward()
    torch._dynamo.reset()


def test_the_share_as_data_goes_where_the_layer_goes():
    layer = LIF(analog_prob=0.3).half()
    assert layer._analog_prob_data.item() == 0.3
    empty = LIF(analog_prob=0.3, device="meta").to("meta")
    assert empty._analog_prob_data.is_meta
    empty.to_empty(device="cpu")
    assert empty._analog_prob_data.item() == 0.3
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    again.analog_prob = 0.5
    assert (layer._analog_prob_data.item(), again._analog_prob_data.item()) == (0.3, 0.5)
    assert set(layer.state_dict()) == {"log_width"}
    assert not list(layer.buffers())
