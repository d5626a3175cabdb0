"""The training kit: schedules, parameter groups, monitors and hard spikes, on layers for which all is known."""

import copy
import math
import pickle
import sys
import types
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from comparison import random_input
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import (
    LIF,
    AnalogProbSchedule,
    Monitor,
    asgl_layers,
    lightning_callback,
    parameter_groups,
    spiking_eval,
)
from asgl_cuda.surrogate import SURROGATES

KINDS = {
    "multi_step": lambda model: AnalogProbSchedule.multi_step(model, [2, 5, 5], gamma=0.5),
    "cosine": lambda model: AnalogProbSchedule.cosine(model, 6, final=0.05),
    "linear": lambda model: AnalogProbSchedule.linear(model, 6, final=0.05),
}
EXPECTED = {
    "multi_step": lambda start, epoch: start * (1, 1, 0.5, 0.5, 0.5, 0.125, 0.125, 0.125, 0.125)[epoch],
    "cosine": lambda start, epoch: 0.05 + (start - 0.05) * math.cos(math.pi * min(epoch, 6) / 12) ** 2,
    "linear": lambda start, epoch: 0.05 + (start - 0.05) * (6 - min(epoch, 6)) / 6,
}


def network(**options):
    """Layers "1" and "3" start with another noise each."""
    return nn.Sequential(nn.Linear(7, 5), LIF(analog_prob=0.2, **options), nn.Linear(5, 3), LIF(analog_prob=0.8))


class Foreign(nn.Module):
    """A neuron of another library as the converter leaves it: with the attributes, not of LIF's class."""

    def __init__(self, output=None, **attributes):
        super().__init__()
        self.analog_prob = 0.3
        self.log_width = nn.Parameter(torch.tensor([0.0, math.log(3.0)]))
        self.beta = nn.Parameter(torch.tensor(0.9))
        self.recurrent = nn.Linear(2, 2)
        self.output = output
        for name, value in attributes.items():
            setattr(self, name, value)

    @property
    def width(self):
        return self.log_width.exp()

    def forward(self, x_seq):
        return x_seq if self.output is None else self.output


# ---- which layers ----


def test_each_asgl_layer_once():
    shared, foreign = LIF(), Foreign()
    model = nn.Sequential(
        shared, nn.Linear(2, 2), nn.Sequential(foreign, shared), LIF(analog_prob=0, learn_width=False)
    )
    assert list(asgl_layers(model)) == [("0", shared), ("2.0", foreign), ("3", model[3])]


def test_a_wrapper_of_torch_compile_is_no_layer():
    layer = LIF()
    assert list(asgl_layers(torch.compile(layer, backend="eager"))) == [("_orig_mod", layer)]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda model: AnalogProbSchedule.cosine(model, 3), "AnalogProbSchedule"),
        (Monitor, "Monitor"),
        (lambda model: spiking_eval(model).__enter__(), "spiking_eval"),
    ],
)
def test_a_model_without_asgl_layers_is_refused(call, name):
    with pytest.raises(ValueError, match=rf"asgl_cuda\.{name}: model must have an ASGL layer, got a Sequential"):
        call(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (asgl_layers, "asgl_layers"),
        (lambda model: AnalogProbSchedule.cosine(model, 3), "AnalogProbSchedule"),
        (lambda model: parameter_groups(model, 0.1), "parameter_groups"),
        (Monitor, "Monitor"),
        (lambda model: spiking_eval(model).__enter__(), "spiking_eval"),
        (asgl_cuda.reset, "reset"),
    ],
)
def test_what_is_no_module_is_refused(call, name):
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{name}: model must be a torch\.nn\.Module, got list"):
        call([LIF()])


# ---- schedules ----


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_goes_from_each_layers_own_start(kind):
    model = network()
    schedule = KINDS[kind](model)
    for epoch in range(9):
        assert schedule.epoch == epoch
        expected = {"1": EXPECTED[kind](0.2, epoch), "3": EXPECTED[kind](0.8, epoch)}
        assert schedule.probs == pytest.approx(expected, abs=1e-12)
        assert schedule.probs == {"1": model[1].analog_prob, "3": model[3].analog_prob}
        if epoch == 0:
            assert schedule.probs == schedule.starts == {"1": 0.2, "3": 0.8}
        if epoch >= 6 and kind != "multi_step":
            assert set(schedule.probs.values()) == {0.05}
        schedule.step()


def test_ends_are_met_exactly():
    """Not but for a rounding: the noise at the start is what the user wrote, and that at the end may be 0."""
    for start in (number / 50 for number in range(1, 51)):
        for build in (AnalogProbSchedule.linear, AnalogProbSchedule.cosine):
            layer = LIF(analog_prob=start)
            schedule = build(layer, 1, final=0.9)
            assert layer.analog_prob == start
            schedule.step()
            assert layer.analog_prob == 0.9


def test_schedules_agree_with_those_of_torch():
    schedulers = torch.optim.lr_scheduler
    for ours, theirs in (
        (AnalogProbSchedule.multi_step(network(), [3, 1], 0.3), lambda sgd: schedulers.MultiStepLR(sgd, [3, 1], 0.3)),
        (AnalogProbSchedule.cosine(network(), 4, 0.1), lambda sgd: schedulers.CosineAnnealingLR(sgd, 4, 0.1)),
        (AnalogProbSchedule.linear(network(), 4), lambda sgd: schedulers.LinearLR(sgd, 1.0, 0.0, 4)),
    ):
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": start} for start in ours.starts.values()]
        sgd = torch.optim.SGD(groups)
        theirs = theirs(sgd)
        for _ in range(5):
            assert list(ours.probs.values()) == pytest.approx(theirs.get_last_lr(), abs=1e-12)
            ours.step()
            sgd.step()
            theirs.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epoch", [0, 1, 2, 5, 8])
def test_schedule_resumes_exactly(kind, epoch, tmp_path):
    schedule = KINDS[kind](network())
    for _ in range(epoch):
        schedule.step()
    torch.save(schedule.state_dict(), tmp_path / "state")
    for ahead in (0, 3):  # also into a schedule that has gone elsewhere
        model = network()
        resumed = KINDS[kind](model)
        for _ in range(ahead):
            resumed.step()
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        twin = KINDS[kind](network())
        for _ in range(epoch):
            twin.step()
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
    state["starts"]["1"] = 0.9
    assert schedule.starts["1"] == 0.2, "the state is not the caller's dict"


def test_a_state_is_a_copy():
    schedule = AnalogProbSchedule.linear(network(), 4)
    schedule.state_dict()["starts"]["1"] = 0.9
    assert schedule.starts["1"] == 0.2


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


@pytest.mark.parametrize("names", [["1"], ["1", "3", "4"], ["0", "3"], []])
def test_the_state_of_other_layers_is_refused(names):
    schedule = AnalogProbSchedule.linear(network(), 4)
    schedule.step()
    before = schedule.probs
    with pytest.raises(ValueError, match=r"AnalogProbSchedule: the state must be of layers \['1', '3'\], got \["):
        schedule.load_state_dict({"epoch": 3, "starts": dict.fromkeys(names, 0.5)})
    assert schedule.probs == before
    assert schedule.epoch == 1
    assert schedule.starts == {"1": 0.2, "3": 0.8}


def test_shared_and_ordinary_layers():
    shared, ordinary, silent = LIF(analog_prob=0.4), LIF(analog_prob=0, learn_width=False), LIF(analog_prob=0)
    schedule = AnalogProbSchedule.linear(nn.Sequential(shared, ordinary, shared, silent), 2, final=0.5)
    assert schedule.starts == {"0": 0.4, "3": 0}
    schedule.step()
    assert shared.analog_prob == pytest.approx(0.45)
    assert ordinary.analog_prob == 0
    assert silent.analog_prob == 0.25
    with pytest.raises(ValueError, match=r"a layer with noise or a learned width, .* in '0'"):
        AnalogProbSchedule.linear(nn.Sequential(ordinary), 2)


def test_foreign_layers_are_scheduled():
    layer = Foreign()
    AnalogProbSchedule.multi_step(layer, [1]).step()
    assert layer.analog_prob == pytest.approx(0.03)


def test_a_function_of_ones_own():
    model = network()
    schedule = AnalogProbSchedule(model, lambda start, epoch: start * (epoch + 1) / 2)
    assert schedule.probs == {"1": 0.1, "3": 0.4}
    schedule.step()
    assert schedule.probs == {"1": 0.2, "3": 0.8}
    with pytest.raises(ValueError, match=r"layer '3' at epoch 2: analog_prob must be in \[0, 1\], got 1\.2"):
        schedule.step()
    assert schedule.probs == {"1": 0.2, "3": 0.8}, "a refused step must set no layer"
    assert schedule.epoch == 1


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda model: AnalogProbSchedule.cosine(model, 0), ValueError, "epochs must be >= 1, got 0"),
        (lambda model: AnalogProbSchedule.linear(model, -1), ValueError, "epochs must be >= 1, got -1"),
        (lambda model: AnalogProbSchedule.linear(model, 2.0), TypeError, "epochs must be an int, got float"),
        (lambda model: AnalogProbSchedule.cosine(model, True), TypeError, "epochs must be an int, got bool"),
        (lambda model: AnalogProbSchedule.cosine(model, 2, 1.5), ValueError, r"final must be in \[0, 1\], got 1\.5"),
        (lambda model: AnalogProbSchedule.linear(model, 2, "0"), TypeError, "final must be a float, got str"),
        (
            lambda model: AnalogProbSchedule.multi_step(model, [1], math.nan),
            ValueError,
            r"gamma must be in \[0, 1\], got nan",
        ),
        (
            lambda model: AnalogProbSchedule.multi_step(model, [0, 2]),
            ValueError,
            r"milestones must be ints >= 1, got \[0, 2\]",
        ),
        (lambda model: AnalogProbSchedule.multi_step(model, [1.5]), ValueError, r"milestones .*, got \[1\.5\]"),
        (lambda model: AnalogProbSchedule.multi_step(model, 2), TypeError, "milestones must be a sequence .*, got int"),
        (lambda model: AnalogProbSchedule(model, 0.5), TypeError, "prob_at must be a function .*, got float"),
        (
            lambda model: AnalogProbSchedule.linear(model, 2).load_state_dict({}),
            ValueError,
            r"the state must be a dict of 'epoch' and 'starts', got \[\]",
        ),
        (
            lambda model: AnalogProbSchedule.linear(model, 2).load_state_dict(3),
            ValueError,
            "the state must .*, got int",
        ),
    ],
)
def test_schedule_errors(build, error, message):
    with pytest.raises(error, match=r"asgl_cuda\.AnalogProbSchedule: " + message):
        build(network())


# ---- parameter groups ----


def test_groups_hold_every_parameter_once():
    neuron = LIF(5, granularity="channel", learn_decay=True, learn_threshold=True)
    linear, foreign = nn.Linear(5, 5), Foreign()
    model = nn.Sequential(linear, neuron, nn.Sequential(linear, neuron, foreign), nn.BatchNorm1d(5))
    model[3].weight = linear.bias  # shared as a parameter, too
    linear.weight.requires_grad_(False)
    weights, neurons = parameter_groups(model, 0.1, width_lr=0.01, weight_decay=1e-4)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 1e-4)
    assert (neurons["lr"], neurons["weight_decay"]) == (0.01, 0.0)
    expected = [neuron.log_width, neuron.logit_decay, neuron.threshold, foreign.log_width, foreign.beta]
    assert list(map(id, neurons["params"])) == list(map(id, expected))
    found = weights["params"] + neurons["params"]
    assert len({*map(id, found)}) == len(found) == len(list(model.parameters()))
    assert {*map(id, found)} == {*map(id, model.parameters())}
    assert id(foreign.recurrent.weight) in map(id, weights["params"])
    assert id(linear.weight) in map(id, weights["params"]), "a frozen one stays in"


def test_a_normalisation_trains_the_same_fused_and_apart():
    fused = nn.Sequential(nn.Linear(5, 5), asgl_cuda.BatchNormLIF(5, learn_decay=True))
    weights, neurons = parameter_groups(fused, 0.1)
    assert list(map(id, weights["params"])) == list(map(id, (*fused[0].parameters(), fused[1].weight, fused[1].bias)))
    assert list(map(id, neurons["params"])) == list(map(id, (fused[1].log_width, fused[1].logit_decay)))


def test_a_step_has_the_rates_asked_for():
    model = network()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5, weight_decay=0.1), lr=1.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    for name, value in model.named_parameters():
        step = 3e-4 if name.endswith("log_width") else 0.5 * (1 + 0.1 * before[name])
        torch.testing.assert_close(value, before[name] - step)


def test_empty_groups_are_left_out():
    assert [group["name"] for group in parameter_groups(nn.Linear(2, 2), 0.1)] == ["weights"]
    assert [group["name"] for group in parameter_groups(LIF(), 0.1)] == ["neurons"]
    assert parameter_groups(LIF(learn_width=False), 0.1) == []


@pytest.mark.parametrize("name", ["lr", "width_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_group_errors(name, value):
    with pytest.raises(ValueError, match=rf"asgl_cuda\.parameter_groups: {name} must be >= 0, got {value}"):
        parameter_groups(network(), **{"lr": 0.1, name: value})


# ---- monitor ----

LAYERS = [
    {"surrogate": surrogate, "v_reset": v_reset, "stateful": stateful, "scale_output": not stateful}
    for surrogate in ("rectangle", "sigmoid", "triangle")
    for v_reset in (0.1, None)
    for stateful in (False, True)
]


def shaped(value, granularity, time_dim, dims):
    """Parameters of granularity neuron `[C, W]` or channel `[C]` in an input of 4 dimensions, by hand."""
    if granularity == "layer":
        return value
    sizes = [1, 1, 5, 1] if granularity == "channel" else [1, 1, 5, 3]
    return value.reshape(sizes).movedim(0, time_dim)


@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("granularity", "time_dim"), [("layer", 0), ("channel", 1), ("neuron", 0), ("neuron", -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_monitor_measures_what_the_function_computes(backend, device, options, training, granularity, time_dim, dtype):
    features = {"layer": None, "channel": 5, "neuron": (5, 3)}[granularity]
    layer = LIF(
        features,
        granularity=granularity,
        time_dim=time_dim,
        analog_prob=0.4,
        v_threshold=0.9,
        width=1.3,
        backend=backend,
        learn_decay=True,
        learn_threshold=True,
        **options,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.rand_like(parameter) * 0.3
    layer = layer.to(device).train(training)
    inputs = [random_input(4, 2, 5, 3, dtype=dtype, device=device).detach().movedim(0, time_dim) for _ in range(2)]
    torch.manual_seed(11)
    with Monitor(layer) as monitor:
        for x_seq in inputs:
            layer(x_seq)
    (found,) = monitor.result().values()

    torch.manual_seed(11)
    width, decay, threshold = (
        shaped(value.detach(), granularity, time_dim, 4) for value in (layer.width, layer.decay, layer.v_threshold)
    )
    spikes, differs, inside, errors, v = [], [], [], [], None
    for x_seq in inputs:
        s_seq, v_last, _, h_seq = asgl_cuda.lif(
            x_seq, width=width, decay=decay, v_threshold=threshold, analog_prob=0.4 if training else 0.0, v_init=v,
            surrogate=options["surrogate"], v_reset=options["v_reset"], scale_output=options["scale_output"],
            return_v_last=True, return_h_seq=True, time_dim=time_dim, backend=backend,
        )  # fmt: skip
        v = v_last if options["stateful"] else None
        y = (h_seq - threshold) * (1 / width.to(h_seq))
        fired = h_seq - threshold >= 0
        hard = fired * threshold if options["scale_output"] else fired.to(h_seq)
        spikes.append(fired.movedim(time_dim, 0))
        differs.append(s_seq != hard.to(dtype))
        inside.append(y.abs() < 0.5)
        errors.append((SURROGATES[options["surrogate"]].cumulative(y) - fired.to(y)).abs())
    mean = lambda parts: torch.stack(parts).double().mean().item()  # noqa: E731
    by_neuron = torch.stack(spikes).flatten(0, 2)  # [calls * T * N, 5, 3]
    expected = {
        "width": width.double().mean().item(),
        "firing_rate": mean(spikes),
        "analog_share": mean(differs),
        "inside": mean(inside),
        "smoothing_error": mean(errors),
        "dead": (~by_neuron.any(0)).double().mean().item(),
        "saturated": by_neuron.all(0).double().mean().item(),
    }
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert 0 < found["firing_rate"] < 1
    assert (found["analog_share"] > 0) == training
    assert found["analog_share"] <= 0.6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("analog_prob", [0.0, 0.4, 1.0])
def test_watching_changes_no_bit(backend, device, training, stateful, analog_prob):
    def run(watched):
        torch.manual_seed(7)
        model = nn.Sequential(
            nn.Linear(6, 5), LIF(5, granularity="channel", stateful=stateful, analog_prob=analog_prob, backend=backend),
            nn.Dropout(0.3), nn.Linear(5, 6), LIF(analog_prob=analog_prob, learn_decay=True, backend=backend),
        ).to(device).train(training)  # fmt: skip
        x_seq = torch.randn(4, 3, 6, device=device, requires_grad=True)
        monitor = Monitor(model)
        if watched:
            monitor.start()
        outputs = [model(x_seq), model(x_seq)]
        sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
        monitor.stop()
        assert ("firing_rate" in monitor.result()["1"]) == watched
        v = model[1].v if stateful else torch.zeros(())
        drawn = torch.rand(8), torch.rand(8, device=device)
        return [*outputs, x_seq.grad, *(value.grad for value in model.parameters()), v, *drawn]

    for plain, watched in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, watched)


def test_watching_changes_no_bit_under_checkpointing():
    def run(watched):
        torch.manual_seed(7)
        model, x_seq = network(), torch.randn(4, 2, 7, requires_grad=True)
        with Monitor(model) if watched else torch.enable_grad():
            checkpoint(model, x_seq, use_reentrant=False).sum().backward()
        return [x_seq.grad, *(value.grad for value in model.parameters()), torch.rand(4)]

    for plain, watched in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, watched)


def test_dead_and_saturated_neurons():
    """Over the whole of time, batch and calls."""
    layer = LIF(decay=0.0, analog_prob=0.0)
    x_seq = torch.zeros(2, 3, 4)
    x_seq[..., 1] = 2.0
    x_seq[0, 0, 2] = 2.0
    with Monitor(layer) as monitor:
        layer(x_seq)
        assert monitor.result()[""]["dead"] == 0.5
        assert monitor.result()[""]["saturated"] == 0.25
        assert monitor.result()[""]["firing_rate"] == 7 / 24
        x_seq[1, 2, 3] = 2.0
        layer(x_seq[:, 2:])
    found = monitor.result()[""]
    assert (found["dead"], found["saturated"]) == (0.25, 0.25)
    assert found["firing_rate"] == (7 + 3) / (24 + 8)


@pytest.mark.parametrize(("shape", "neurons"), [((4,), 1), ((4, 5), 5), ((4, 3, 5), 5), ((4, 3, 5, 2), 10)])
def test_which_dimensions_are_neurons(shape, neurons):
    layer = LIF(decay=0.0, analog_prob=0.0)
    x_seq = torch.full(shape, 2.0)
    x_seq.view(4, -1)[0, 0] = 0.0
    with Monitor(layer) as monitor:
        layer(x_seq)
    assert monitor.result()[""]["saturated"] == pytest.approx(1 - 1 / neurons)


def test_a_layer_shared_between_shapes():
    layer = LIF(decay=0.0, analog_prob=0.0)
    with Monitor(nn.Sequential(layer, nn.Identity(), layer)) as monitor:
        layer(torch.full((2, 3, 4), 2.0))
        layer(torch.zeros(2, 3, 6))
    assert list(monitor.result()) == ["0"]
    found = monitor.result()["0"]
    assert (found["firing_rate"], found["dead"], found["saturated"]) == pytest.approx((0.4, 0.6, 0.4))


def test_a_monitor_that_saw_nothing():
    monitor = Monitor(network())
    expected = {"1": {"width": 1.0}, "3": {"width": 1.0}}
    assert monitor.result() == expected
    with monitor:
        monitor._layers["1"](torch.zeros(4, 0, 5))  # no sample at all
    assert monitor.result() == expected
    assert str(monitor).splitlines()[1].split() == ["1", "1.0000", "-", "-", "-", "-", "-", "-"]


def test_start_stop_and_reset():
    layer = LIF(decay=0.0, analog_prob=0.0)
    monitor = Monitor(layer)
    spikes, silence = torch.full((1, 1, 1), 2.0), torch.zeros(1, 1, 1)
    rate = lambda: monitor.result()[""].get("firing_rate")  # noqa: E731
    monitor.start()
    monitor.start()
    layer(spikes)
    monitor.stop()
    monitor.stop()
    layer(silence)
    assert rate() == 1.0
    with monitor:
        layer(silence)
    assert rate() == 0.5, "it goes on where it was"
    with pytest.raises(ZeroDivisionError), monitor:
        raise ZeroDivisionError
    layer(spikes)
    assert rate() == 0.5, "an exception stops it"
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    monitor.reset()
    assert rate() is None


def test_a_with_inside_another_does_not_end_it():
    layer = LIF(decay=0.0, analog_prob=0.0)
    monitor = Monitor(layer)
    for outside in (monitor, None):
        if outside is None:
            monitor.start()
        with outside or nullcontext():
            with monitor:
                layer(torch.zeros(1, 1, 1))
            monitor.reset()
            layer(torch.full((1, 1, 1), 2.0))
            assert monitor.result()[""]["firing_rate"] == 1.0
        assert bool(layer._forward_hooks) == (outside is None)
        monitor.stop()


def test_a_monitor_knows_the_strict_threshold():
    for strict in (False, True):
        layer = LIF(decay=0.0, analog_prob=0.0, strict_threshold=strict)
        with Monitor(layer) as monitor:
            s_seq = layer(torch.ones(1, 1, 1))
        assert monitor.result()[""]["firing_rate"] == s_seq.item() == (not strict)
        assert monitor.result()[""]["analog_share"] == 0


def test_errors_of_the_layer_stay_its_own():
    layer = LIF()
    for arguments in ((), ("x",), (torch.zeros(2, dtype=torch.int64),)):
        with pytest.raises(TypeError) as plain:
            layer(*arguments)
        with pytest.raises(TypeError) as watched, Monitor(layer) as monitor:
            layer(*arguments)
        assert str(watched.value) == str(plain.value)
        assert monitor.result() == {"": {"width": 1.0}}


def test_keyword_arguments_and_other_hooks():
    """The call is watched as the layer computed it: with the input that a hook has made, before another is at it."""
    layer = LIF(decay=0.0, analog_prob=0.0)
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((), {"x_seq": kwargs["x_seq"] + 1}), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: output + 7)
    with Monitor(layer) as monitor:
        output = layer(x_seq=torch.full((1, 1, 2), 0.25))
    assert output.tolist() == [[[8.0, 8.0]]]
    found = monitor.result()[""]
    assert (found["firing_rate"], found["analog_share"], found["inside"]) == (1, 0, 1)
    assert found["smoothing_error"] == 0.25


def test_the_second_call_is_of_the_layers_backend(monkeypatch):
    asked = []
    lif = asgl_cuda.lif

    def spy(x_seq, **options):
        asked.append(options["backend"])
        return lif(x_seq, **options)

    monkeypatch.setattr(asgl_cuda.neuron, "lif", spy)
    model = nn.Sequential(LIF(backend="reference"), LIF())
    with Monitor(model):
        model(torch.rand(4, 2, 3))
    assert asked == ["reference", "reference", None, None]


def test_carried_potentials_of_inference_mode():
    layer = LIF(stateful=True, analog_prob=0.5)
    with Monitor(layer) as monitor:
        with torch.inference_mode():
            layer(torch.rand(4, 2, 3))
        layer(torch.rand(4, 2, 3, requires_grad=True)).sum().backward()
    assert 0 <= monitor.result()[""]["firing_rate"] <= 1


def test_compiled_code_is_not_watched():
    layer = LIF()
    x_seq = torch.rand(4, 2, 3)
    with Monitor(layer) as monitor:
        torch.compile(layer, backend="eager", fullgraph=True)(x_seq)
        assert monitor.result()[""] == {"width": 1.0}
        layer(x_seq)
    assert "firing_rate" in monitor.result()[""]


@pytest.mark.parametrize("wrap", [lambda s_seq: s_seq, lambda s_seq: (s_seq, "state")])
def test_foreign_layers_tell_what_their_output_does(wrap):
    #                 time, batch, neuron: dead, saturated, neither
    s_seq = torch.tensor([[[0.0, 1.0, 0.0], [0.25, 1.0, 0.75]], [[0.0, 0.5, 0.0], [0.0, 1.0, 1.0]]])
    without = Foreign(wrap(s_seq))
    model = nn.Sequential(
        without, Foreign(wrap(s_seq), time_dim=0), Foreign(wrap(s_seq.transpose(0, 1)), time_dim=1)
    )  # fmt: skip
    with Monitor(model) as monitor:
        for layer in model:
            layer(torch.zeros(()))
    expected = {"width": 2.0, "firing_rate": 0.5, "analog_share": 0.25}
    found = monitor.result()
    assert found["0"] == pytest.approx(expected)
    assert found["1"] == found["2"] == pytest.approx({**expected, "dead": 1 / 3, "saturated": 1 / 3})


def test_foreign_layers_called_step_by_step():
    layer = Foreign(time_dim=None)
    with Monitor(layer) as monitor:
        for step in ([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]], [[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]):
            layer(torch.tensor(step))
    found = monitor.result()[""]
    assert (found["dead"], found["saturated"], found["firing_rate"]) == pytest.approx((1 / 3, 1 / 3, 0.5))
    monitor.reset()
    with monitor:
        layer(torch.tensor([0.0, 1.0]))  # no batch
    assert monitor.result()[""]["saturated"] == 0.5


def test_a_subclass_with_a_forward_of_its_own_is_foreign():
    class Doubled(LIF):
        def forward(self, x_seq):
            return super().forward(2 * x_seq)

    layer = Doubled(analog_prob=0.0)
    with Monitor(layer) as monitor:
        layer(torch.full((1, 1, 2), 0.5))
    assert set(monitor.result()[""]) == {"width", "firing_rate", "analog_share", "dead", "saturated"}
    assert monitor.result()[""]["firing_rate"] == 1.0


def test_outputs_without_a_tensor_are_passed_over():
    layer = Foreign({"spikes": 1})
    with Monitor(layer) as monitor:
        layer(torch.zeros(()))
    assert monitor.result() == {"": {"width": pytest.approx(2.0)}}


def watched_network():
    model = nn.Sequential(nn.Linear(6, 5), LIF(analog_prob=0.4), nn.Linear(5, 2), Foreign())
    with Monitor(model) as monitor:
        model(torch.randn(4, 3, 6))
    return monitor


def test_table_and_writer():
    monitor = watched_network()
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda tag, value, step: written.append((tag, value, step)))
    monitor.write(writer, 12)
    result = monitor.result()
    expected = {f"{key}/{name}": value for name, values in result.items() for key, value in values.items()}
    assert monitor.scalars() == expected
    assert sorted(written) == sorted((tag, value, 12) for tag, value in expected.items())
    assert len(expected) == 7 + 3
    head, first, second = str(monitor).splitlines()
    assert head.startswith("layer")
    assert first.split() == ["1", *(f"{value:.4f}" for value in result["1"].values())]
    assert second.split()[0] == "3"
    assert second.split().count("-") == 4
    assert len(head) == len(first) == len(second)


def test_a_lone_layer_has_a_name_in_the_table_only():
    monitor = Monitor(LIF(width=2.0))
    assert monitor.scalars() == pytest.approx({"width": 2.0})
    assert "(the model)" in str(monitor)


def test_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        watched_network().write(writer, 1)
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figure(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"figure.{suffix}"
    watched_network().plot(file)
    assert file.stat().st_size > 1000
    if suffix == "svg":
        drawn = file.read_text()
        assert "smoothing error" in drawn
        Monitor(LIF()).plot(str(file))
        assert file.read_text() != drawn


def test_figure_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"asgl_cuda\.Monitor\.plot: needs matplotlib, .*: pip install matplotlib"):
        watched_network().plot(tmp_path / "figure.png")


# ---- Lightning ----


class Callback:
    """Stands in for Lightning's."""


def lightning(monkeypatch, *names):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Callback=Callback) if name in names else None)


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_callback(monkeypatch, name):
    lightning(monkeypatch, "lightning", name)
    model = network()
    schedule, monitor = AnalogProbSchedule.linear(model, 4), Monitor(model)
    callback = lightning_callback(schedule, monitor)
    assert isinstance(callback, Callback)
    logged = []
    module = types.SimpleNamespace(log_dict=lambda values, sync_dist: logged.append((values, sync_dist)))

    def step(x_seq):
        callback.on_train_batch_start(None, module, x_seq, 0)
        model(x_seq)
        callback.on_train_batch_end(None, module, None, x_seq, 0)

    for epoch in range(2):
        callback.on_train_epoch_start(None, module)
        assert schedule.epoch == epoch
        step(torch.randn(4, 3, 7))
        seen = monitor.result()
        model(torch.full((4, 3, 7), 100.0))  # validation
        assert monitor.result() == seen
        callback.on_train_epoch_end(None, module)
        assert logged[epoch] == (monitor.scalars(), True)
        assert "firing_rate/1" in logged[epoch][0]
        assert schedule.epoch == epoch + 1
    callback.on_train_epoch_start(None, module)
    assert "firing_rate" not in monitor.result()["1"], "each epoch begins anew"

    fresh = network()
    resumed = lightning_callback(AnalogProbSchedule.linear(fresh, 4))
    resumed.load_state_dict(callback.state_dict())
    assert fresh[1].analog_prob == model[1].analog_prob == 0.1

    callback.on_train_batch_start(None, module, None, 0)
    callback.on_exception(None, module, ValueError())
    assert not model[1]._forward_hooks


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_the_lightning_that_was_imported_is_used(monkeypatch, name):
    lightning(monkeypatch, name)
    both = {
        each: types.SimpleNamespace(Callback=type(each, (), {})) for each in ("lightning.pytorch", "pytorch_lightning")
    }
    for each in both:
        if each != name:
            monkeypatch.delitem(sys.modules, each)
    monkeypatch.setattr(asgl_cuda.monitor.importlib, "import_module", both.__getitem__)
    assert isinstance(lightning_callback(monitor=Monitor(network())), both[name].Callback)


def test_lightning_callback_with_one_of_the_two(monkeypatch):
    lightning(monkeypatch, "lightning.pytorch")
    model = network()
    logged = []
    module = types.SimpleNamespace(log_dict=lambda values, sync_dist: logged.append(values))
    schedule = AnalogProbSchedule.linear(model, 4)
    for callback in (lightning_callback(schedule), lightning_callback(monitor=Monitor(model))):
        callback.on_train_epoch_start(None, module)
        callback.on_train_batch_start(None, module, None, 0)
        callback.on_train_batch_end(None, module, None, None, 0)
        callback.on_exception(None, module, ValueError())
        callback.on_train_epoch_end(None, module)
        callback.load_state_dict(callback.state_dict())
    assert schedule.epoch == 1
    assert logged == [{"width/1": 1.0, "width/3": 1.0}]


def test_lightning_callback_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"asgl_cuda\.lightning_callback: needs a schedule, a monitor or both"):
        lightning_callback()
    for name, kind in (("schedule", "AnalogProbSchedule"), ("monitor", "Monitor")):
        with pytest.raises(TypeError, match=rf"asgl_cuda\.lightning_callback: {name} .* asgl_cuda\.{kind}, got int"):
            lightning_callback(**{name: 5})
    lightning(monkeypatch)
    with pytest.raises(ImportError, match=r"asgl_cuda\.lightning_callback: needs lightning, .*: pip install lightning"):
        lightning_callback(monitor=Monitor(network()))


# ---- hard spikes ----


@pytest.mark.parametrize("training", [True, False])
def test_spiking_eval(training):
    model = nn.Sequential(nn.Linear(6, 5), LIF(width=9.0), nn.Dropout(0.5), LIF(width=9.0, analog_prob=1.0), Foreign())
    model.train(training)
    modes = [module.training for module in model.modules()]
    x_seq = torch.randn(4, 3, 6, requires_grad=True)
    with spiking_eval(model):
        assert [layer.analog_prob for _, layer in asgl_layers(model)] == [0, 0, 0]
        assert [module.training for module in model.modules()] == modes
        s_seq = model(x_seq)
        assert ((s_seq == 0) | (s_seq == 1)).all()
        s_seq.sum().backward()
        assert x_seq.grad.abs().sum() > 0
    assert [layer.analog_prob for _, layer in asgl_layers(model)] == [0.2, 1.0, 0.3]
    assert [module.training for module in model.modules()] == modes


def test_spiking_eval_has_the_gradients_of_evaluation():
    layer, x_seq = LIF(analog_prob=0.5), random_input(6, 3, 31)
    with spiking_eval(layer):
        s_seq = layer(x_seq)
    (found,) = torch.autograd.grad(s_seq.sum(), x_seq)
    layer.eval()
    (expected,) = torch.autograd.grad(layer(x_seq).sum(), x_seq)
    assert torch.equal(found, expected)
    assert found.abs().sum() > 0


def test_spiking_eval_ends_after_an_exception():
    model = network()
    with pytest.raises(ZeroDivisionError), spiking_eval(model):
        raise ZeroDivisionError
    assert (model[1].analog_prob, model[3].analog_prob) == (0.2, 0.8)


def test_spiking_eval_inside_itself():
    layer = LIF(analog_prob=0.4)
    with spiking_eval(layer):
        with spiking_eval(layer):
            pass
        assert layer.analog_prob == 0
    assert layer.analog_prob == 0.4


# ---- carried potentials ----


def test_reset_of_a_whole_model():
    shared = LIF(stateful=True)
    norm = asgl_cuda.BatchNormLIF(3, stateful=True, store_v_seq=True)
    model = nn.Sequential(shared, nn.Sequential(norm, shared))
    model(torch.randn(4, 2, 3))
    assert shared.v is not None
    asgl_cuda.reset(model)
    assert shared.v is norm.v is norm.v_seq is None


@pytest.mark.parametrize(
    ("library", "make", "current"),
    [
        ("spikingjelly.activation_based.neuron", lambda of: (of.LIFNode(), of.QIFNode()), 1.2),
        ("snntorch", lambda of: (of.Leaky(0.9, init_hidden=True), of.Lapicque(0.9, init_hidden=True)), 0.4),
        (
            "sinabs.layers",
            lambda of: (of.LIF(10.0, spike_fn=sys.modules["sinabs"].activation.SingleSpike), of.ExpLeak(10.0)),
            3.0,
        ),
    ],
)
def test_reset_of_other_libraries_layers(library, make, current):
    """Converted, and left because asgl_cuda has no such neuron."""
    model, report = asgl_cuda.convert(nn.Sequential(*make(pytest.importorskip(library))))
    assert (len(report.replaced), len(model)) == (1, 2)
    x = torch.full((2, 5, 3), current)

    def outputs():
        return torch.stack([layer(x) for layer in model for _ in range(5)])

    first = outputs()
    assert not torch.equal(outputs()[:5], first[:5])
    asgl_cuda.reset(model)
    assert torch.equal(outputs(), first)


@pytest.mark.parametrize("kind", ["LIF", "BatchNormLIF", "converted"])
def test_a_schedule_compiles_nothing_anew(backend, device, kind):
    """Except where the noise ends, once; the noise of each epoch is that of eager mode."""
    torch._dynamo.reset()
    if kind == "converted":
        neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
        model, _ = asgl_cuda.convert(nn.Sequential(neuron.LIFNode(step_mode="m")), asgl={}, backend=backend)
        model.to(device)
    else:
        model = nn.Sequential(getattr(asgl_cuda, kind)(*([5] if kind == "BatchNormLIF" else []), backend=backend)).to(
            device
        )
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    schedules = [AnalogProbSchedule.linear(each, 12) for each in (model, compiled)]
    x_seq = random_input(4, 300, 5, device=device)
    for epoch in range(14):
        expected, actual = [], []
        for each, found in ((model, expected), (compiled, actual)):
            torch.manual_seed(epoch)
            if kind == "converted":
                asgl_cuda.reset(each)
            s_seq = each(x_seq)
            found += [s_seq, *torch.autograd.grad(s_seq.square().sum(), x_seq)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True)), epoch
        for schedule in schedules:
            schedule.step()
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_the_share_as_data_goes_where_the_layer_goes():
    layer = LIF(analog_prob=0.3).half()
    assert layer._analog_prob_data.item() == 0.3
    empty = LIF(analog_prob=0.3, device="meta").to("meta").to_empty(device="cpu")
    assert empty._analog_prob_data.item() == 0.3
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    again.analog_prob = 0.5
    assert (layer._analog_prob_data.item(), again._analog_prob_data.item()) == (0.3, 0.5)
    assert set(layer.state_dict()) == {"log_width"}
    assert not list(layer.buffers())
