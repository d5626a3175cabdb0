"""Findings of a monitor on layers whose values are known."""

import math
import re
from typing import ClassVar

import pytest
import torch
from comparison import random_input
from layer_cases import CASES, Foreign, N, make, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import LIF, Monitor
from asgl_cuda.reference.surrogates import SURROGATES


def seen(layer, *calls, **options):
    """What a monitor finds of a layer alone in these calls."""
    with Monitor(layer) as monitor:
        for x_seq in calls:
            layer(x_seq, **options)
    return monitor.result()[""]


def exact(**options):
    """Neurons that fire by the input of the step alone, with a rectangle."""
    return LIF(**{"decay": 0.0, "analog_prob": 0.0, "surrogate": "rectangle", **options})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "granularity", "time_dim", "dtype", "stateful"),
    [
        ("LIF", "layer", 0, torch.bfloat16, True), ("LIF", "channel", 1, torch.float32, False),
        ("soft reset", "neuron", 0, torch.float64, True), ("soft reset", "channel", -1, torch.float32, True),
        ("RecurrentLIF", "layer", 0, torch.float32, True), ("RecurrentLIF", "neuron", 1, torch.float64, False),
    ],
)  # fmt: skip
def test_monitor_measures_what_the_function_computes(
    backend, device, kind, granularity, time_dim, dtype, stateful, training
):
    """From carried states and with the same noise, also of spikes whose height is the threshold."""
    case, options = CASES[kind], {"granularity": granularity, "time_dim": time_dim, "stateful": stateful}
    layer = make(kind, backend, device, **options).train(training)
    layer = layer.double() if dtype == torch.float64 else layer
    values = {name: getattr(layer, attribute).detach() for name, attribute in case.learned.items()}
    if time_dim == -1:
        values = {name: value.reshape(N, 1) for name, value in values.items()}
    given = {**case.options, **values, "time_dim": time_dim, "return_h_seq": True, "backend": backend}
    given["analog_prob"] = 0.4 if training else 0.0
    shares = {name: [] for name in ("firing_rate", "analog_share", "inside", "smoothing_error")}
    monitor = Monitor(layer)
    if not stateful:
        layer.step(random_input(3, N, dtype=dtype, device=device))  # whose states no sequence starts from
    for seed in range(2):
        x_seq = random_input(6, 3, N, dtype=dtype, device=device).detach().mul(2).movedim(0, time_dim)
        states = {f"{name}_init": getattr(layer, name) if stateful else None for name in case.states}
        torch.manual_seed(seed)
        with monitor:
            s_seq = layer(x_seq)
        torch.manual_seed(seed)
        expected = case.function(x_seq, **given, **states)
        assert torch.equal(s_seq, expected.s_seq)
        threshold, width = (values[name].to(expected.h_seq) for name in ("v_threshold", "width"))
        u = expected.h_seq - threshold
        y = u * (1 / width)
        fired = u > 0 if case.options.get("strict_threshold") else u >= 0
        hard = fired * threshold if case.options.get("scale_output") else fired.to(u)
        shares["firing_rate"].append(fired.movedim(time_dim, 0))
        shares["analog_share"].append(s_seq != hard.to(dtype))
        shares["inside"].append(y.abs() < 0.5)
        shares["smoothing_error"].append((SURROGATES[layer.surrogate].cumulative(y) - fired.to(y)).abs())
    by_neuron = torch.cat(shares["firing_rate"]).flatten(0, 1)
    found = monitor.result()[""]
    assert found.pop("growth") >= 1
    assert found == pytest.approx(
        {
            "width": layer.width.double().mean().item(),
            **{name: torch.stack(parts).double().mean().item() for name, parts in shares.items()},
            "dead": (~by_neuron.any(0)).double().mean().item(),
            "saturated": by_neuron.all(0).double().mean().item(),
        },
        rel=1e-6,
        abs=1e-12,
    )
    assert 0 < found["firing_rate"] < 1
    assert (0 < found["analog_share"] < 0.6) == training


GROWING = {
    "hard reset": {},
    "noise": {"analog_prob": 0.4},
    "another reset": {"v_reset": -0.3, "v_rest": 0.1, "v_threshold": 1.2},
    "floor": {"v_min": -0.1, "v_reset": -0.3},
    "detached": {"detach_reset": True, "analog_prob": 0.4},
    "detached soft reset": {"detach_reset": True, "v_reset": None},
    "soft reset": {"v_reset": None, "width": 0.3},
    "an amount": {"v_reset": None, "reset_amount": 2.0, "v_min": -0.5},
    "spike's height": {"scale_output": True, "v_threshold": 0.7, "analog_prob": 0.4},
    "levels": {"levels": 3, "v_reset": None, "width": 1.0, "v_threshold": 0.7, "reset_amount": 3.0, "analog_prob": 0.4},
    "several spikes": {"multi_spike": True, "v_reset": None, "width": 0.3},
    "periodic": {"multi_spike": True, "v_reset": None, "surrogate": "periodic_exponential", "width": 0.2},
    **{name: {"surrogate": name, "surrogate_gain": 3.0} for name in SURROGATES},
}


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("options", GROWING.values(), ids=GROWING)
def test_growth_of_gradients(backend, device, options, time_dim):
    """Against autograd: the largest derivative of a potential by the current of an earlier step."""
    neurons = {
        "decay": 0.9, "width": 0.5, "surrogate": "rectangle", "analog_prob": 0.0, "detach_reset": False,
        "time_dim": time_dim, "backend": backend, **options,
    }  # fmt: skip
    layer = LIF(**neurons, learn_width=False)
    x_seq = random_input(7, 5, N, dtype=torch.float64, device=device).detach().abs().movedim(0, time_dim)
    x_seq.requires_grad_()
    torch.manual_seed(1)
    with Monitor(layer) as monitor:
        layer(x_seq)
    torch.manual_seed(1)
    h_seq = asgl_cuda.lif(x_seq, **neurons, return_h_seq=True).h_seq.movedim(time_dim, 0)
    by_current = [torch.autograd.grad(h.sum(), x_seq, retain_graph=True)[0].abs().amax(time_dim) for h in h_seq]
    growth = torch.stack(by_current).amax(0)
    assert monitor.result()[""]["growth"] == pytest.approx(growth.mean().item(), rel=1e-9)
    assert (growth.max() > 1.01) == ("detach_reset" not in options)


def test_growth_of_a_recurrent_layer_is_of_its_potentials():
    """Missing with an adaptation, which is a second way back."""
    x_seq, values = torch.rand(9, 2, N), {"decay": 0.95, "width": 0.1, "analog_prob": 0.0, "detach_reset": False}
    layer = asgl_cuda.RecurrentLIF(N, bias=False, **values)
    nn.init.zeros_(layer.recurrent_weight)
    expected = seen(LIF(**values), x_seq)["growth"]
    assert seen(layer, x_seq)["growth"] == expected > 1.1
    assert "growth" not in seen(asgl_cuda.RecurrentLIF(N, adapt_decay=0.9, **values), x_seq)


@pytest.mark.parametrize(
    ("checkpointed", "stateful", "analog_prob"), [(True, False, 0.4), (False, True, 0.4), (False, True, 0.0)]
)
def test_watching_changes_no_bit(backend, device, checkpointed, stateful, analog_prob):
    def run(watched):
        torch.manual_seed(7)
        stateful_too = {"stateful": stateful, "analog_prob": analog_prob, "backend": backend}
        model = nn.Sequential(
            nn.Linear(6, 5), LIF(5, granularity="channel", **stateful_too),
            nn.Dropout(0.3), nn.Linear(5, 6), LIF(analog_prob=analog_prob, learn_decay=True, backend=backend),
        ).to(device)  # fmt: skip
        x_seq = torch.randn(4, 3, 6, device=device, requires_grad=True)
        monitor = Monitor(model)
        if watched:
            monitor.start()
        calls = [lambda: checkpoint(model, x_seq, use_reentrant=False) if checkpointed else model(x_seq)] * 2
        outputs = [call() for call in calls]
        sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
        monitor.stop()
        assert not watched or "firing_rate" in monitor.result()["1"]
        v = torch.zeros(()) if model[1].v is None else model[1].v
        drawn = torch.rand(8), torch.rand(8, device=device)
        return [*outputs, x_seq.grad, *(value.grad for value in model.parameters()), v, *drawn]

    assert all(map(torch.equal, run(False), run(True)))


def test_dead_and_saturated_neurons():
    """Counted over time, batch and calls."""
    layer = exact()
    x_seq = torch.zeros(2, 3, 4)
    x_seq[..., 1] = 2.0
    x_seq[0, 0, 2] = 2.0
    with Monitor(layer) as monitor:
        layer(x_seq)
        found = monitor.result()[""]
        assert (found["dead"], found["saturated"], found["firing_rate"]) == (0.5, 0.25, 7 / 24)
        x_seq[1, 2, 3] = 2.0
        layer(x_seq[:, 2:])
    found = monitor.result()[""]
    assert (found["dead"], found["saturated"], found["firing_rate"]) == (0.25, 0.25, (7 + 3) / (24 + 8))


def test_which_dimensions_are_neurons():
    for shape, count in (((4,), 1), ((4, 5), 5), ((4, 3, 5), 5), ((4, 3, 5, 2), 10)):
        x_seq = torch.full(shape, 2.0)
        x_seq.view(4, -1)[0, 0] = 0.0
        assert seen(exact(), x_seq)["saturated"] == pytest.approx(1 - 1 / count)
    found = seen(exact(), torch.full((2, 3, 4), 2.0), torch.zeros(2, 3, 6))  # a layer shared between shapes
    assert (found["firing_rate"], found["dead"], found["saturated"]) == pytest.approx((0.4, 0.6, 0.4))


def test_a_monitor_that_saw_nothing():
    monitor, expected = Monitor(network()), {"1": {"width": 1.0}, "3": {"width": 1.0}}
    assert monitor.result() == expected
    with monitor:
        monitor._layers["1"](torch.zeros(4, 0, 5))  # no sample at all
    assert monitor.result() == expected
    assert str(monitor).splitlines()[1].split() == ["1", "1.0000", *["-"] * 7]
    assert monitor.problems()[0].startswith("nothing was seen: no call of the model inside `with monitor:`")
    assert str(monitor).splitlines()[-1] == monitor.problems()[0]


def half_dead(count):
    x_seq = torch.ones(2, 3, 10)
    x_seq[:, :, :count] = 0.7
    return x_seq


X = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))
LONG = torch.linspace(0.5, 1.5, 20).expand(100, 1, -1)  # constant currents
WORDS = [
    (LIF(analog_prob=0.0), X, []),
    (exact(), X * 0.01, ["no neuron ever fired", "0.0% of", ": no gradient", "larger weights", "width"]),
    (exact(), torch.linspace(0, 0.502, 1000)[None], ["no neuron ever fired", "hardly any gradient", "width"]),
    (LIF(analog_prob=0.0), X * 0.01, ["no neuron ever fired", "gradients shrink on their way to the", "calibrate"]),
    (LIF(analog_prob=0.0, width=9.0), X * 0.01, ["no neuron ever fired. What helps: larger weights before the"]),
    (LIF(analog_prob=0.0), X.abs() * 100, ["% of the neurons fired at every step (saturated)", "smaller weights"]),
    (exact(width=1e-6), X, ["no gradient passes", "differently scaled weights"]),
    (LIF(analog_prob=0.0, surrogate="sigmoid"), X * math.nan, ["its potentials are NaN, and no weight of the model "]),
    (exact(), half_dead(5), []),
    (exact(), half_dead(6), ["60% of the neurons never fired (dead). What helps: a normalisation before"]),
    (LIF(levels=4, v_reset=None, analog_prob=0.0), -X.abs(), ["between 0 and levels thresholds: no gradient"]),
    (asgl_cuda.BatchNormLIF(5, eps=0.0), torch.ones(4, 6, 5), ["100% of the channels do not vary"]),
    (LIF(analog_prob=0.0), torch.linspace(0, 1.5, 20).expand(8, 1, -1), []),  # a constant current
    (exact(decay=0.95, detach_reset=False), LONG, ["gradients grow by a factor of", "detach_reset=True"]),
    (LIF(analog_prob=0.0, decay=0.95, width=0.2, detach_reset=False), LONG, ["gradients grow", "detach_reset=True"]),
    (LIF(analog_prob=0.0, decay=0.95), LONG, []),
    (exact(decay=0.95, width=2.0, detach_reset=False), LONG, []),
    (
        LIF(analog_prob=0.0, levels=2, v_reset=None, reset_amount=4.0, detach_reset=False), LONG,
        ["gradients grow", "detach_reset=True"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "x_seq", "expected"), WORDS)
def test_problems_in_words(layer, x_seq, expected):
    """The layer, the finding and the remedy, whose functions exist."""
    model = nn.Sequential(layer)
    with Monitor(model) as monitor:
        model(x_seq)
    found = monitor.problems()
    assert len(found) == bool(expected)
    assert len(str(monitor).splitlines()) == 2 + 2 * len(found)
    for line in found:
        assert line.startswith("0: ")
        assert all(part in line for part in expected), line
        assert ("width" in line) == (any("width" in part for part in expected) or "abs(u)" in line)
        assert str(monitor).splitlines()[-1] == line
        assert {*re.findall(r"asgl_cuda\.(\w+)", line)} <= {*asgl_cuda.__all__}


def normalised_model(**options):
    model = nn.Sequential(nn.Linear(20, 30), asgl_cuda.BatchNormLIF(30, analog_prob=0.0, **options))
    return model, "1"


def fused_model(**options):
    norm = asgl_cuda.OverTime(nn.BatchNorm1d(30, **options))
    model, report = asgl_cuda.fuse(nn.Sequential(nn.Linear(20, 30), norm, LIF(analog_prob=0.0)), torch.randn(3, 2, 20))
    assert report.replaced
    return model, "2"


@pytest.mark.parametrize("make", [normalised_model, fused_model])
def test_channels_that_do_not_vary(make):
    """One image as a constant current: the normalisation maps it to its bias, and nothing fires for good."""
    model, name = make()
    image, others = torch.randn(1, 20), torch.randn(16, 20)  # of two, a channel may be alike by chance

    def found_in(images):
        with Monitor(model) as monitor:
            model(images.expand(8, -1, -1))
        return monitor.result()[name].get("constant"), " ".join(monitor.problems())

    constant, problems = found_in(image)
    assert constant == 1.0
    assert problems.startswith(f"{name}: 100% of the channels do not vary over time and batch, so its normalisation")
    assert "a larger batch" in problems
    assert "calibrate" not in problems
    assert "BatchNormLIF" not in problems
    with pytest.raises(ValueError, match=rf"{name} \(\w+\): no factor"):
        asgl_cuda.calibrate(model, image.expand(8, -1, -1))
    assert found_in(others)[0] == 0.0
    with torch.no_grad():
        model[0].weight[:15] = 0  # half of them, which is no problem
    constant, problems = found_in(others)
    assert constant == 0.5
    assert "vary" not in problems
    model.eval()  # running statistics, for which an image may be alone
    constant, problems = found_in(image)
    assert constant is None
    assert "vary" not in problems


def test_watching_reads_no_value():
    """On a GPU a value that is read, or copied from the host, is waited for."""

    class Reads(TorchDispatchMode):
        found: ClassVar[list[str]] = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.found += [each for each in ("_local_scalar_dense", "lift_fresh") if each in str(operator)]
            return operator(*args, **(kwargs or {}))

    model, _ = normalised_model()
    model.append(LIF(width=1.5, learn_width=False, analog_prob=0.0))
    with Monitor(model), Reads() as reads:
        model(torch.randn(4, 2, 20))
    assert reads.found == []


@pytest.mark.filterwarnings("ignore:.*neurons at rest fire")
@pytest.mark.parametrize(("training", "affine"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("make", [normalised_model, fused_model])
@pytest.mark.parametrize(("threshold", "expected"), [(9.0, ("larger", "lower")), (-9.0, ("smaller", "higher"))])
def test_advice_is_not_what_the_layer_is(make, training, affine, threshold, expected):
    """No normalisation for what normalises, and `calibrate` where it scales a weight."""
    model, _ = make(affine=affine)
    layer = model.train(training)[-1]
    layer.v_reset, layer.v_threshold = None, threshold
    layer.reset_amount = 0.01
    inputs = torch.randn(8, 16, 20)
    with Monitor(model) as monitor:
        model(inputs)
    (line,) = monitor.problems()
    assert "BatchNormLIF" not in line
    assert "before the neurons" not in line
    assert ("asgl_cuda.calibrate" in line) == affine
    assert (f"a {expected[0]} weight of its normalisation" if affine else f"a {expected[1]} threshold") in line
    assert ("running statistics" in line) == (not training)
    if affine and threshold > 0:
        asgl_cuda.calibrate(model, inputs)
        monitor.reset()
        with monitor:
            model(inputs)
        assert not any("never" in each for each in monitor.problems())


def test_nan_of_the_data_is_no_fault_of_the_learning_rate():
    """Of a weight it is, in whatever layer, and of no other sign of it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), LIF())
    with Monitor(model) as monitor:
        model(torch.full((4, 3), math.nan))
    (problem,) = monitor.problems()
    assert problem == (
        "2: its potentials are NaN, and no weight of the model is. What helps: look for NaN or infinity in the data, "
        "and in float16 for currents beyond 65504"
    )
    nn.init.constant_(model[0].bias, math.nan)
    (problem,) = monitor.problems()
    assert problem.startswith(
        "2: its potentials or its width are NaN, as is a weight of the model. What helps: a smaller learning "
    )


@pytest.mark.parametrize("kind", ["LIF", "BatchNormLIF", "AdaptiveLIF", "RecurrentLIF"])
def test_an_option_that_monitor_does_not_know_is_refused(monkeypatch, kind):
    """Where it is in use."""
    layer = getattr(asgl_cuda, kind)(*[3] * (kind in ("BatchNormLIF", "RecurrentLIF")))
    model = nn.Sequential(nn.Linear(3, 3), layer)
    tables = [type(layer)._options, *[type(layer)._norm_options] * (kind == "BatchNormLIF")]
    monkeypatch.setitem(tables[-1], "refractory", None)
    with Monitor(model) as monitor:
        model(torch.ones(2, 4, 3))
    layer.refractory = 2
    with pytest.raises(ValueError, match=rf"^asgl_cuda\.Monitor: 1 \({kind}\) has refractory=2, which Monitor does"):
        monitor.start()
    assert not layer._forward_hooks


def test_start_stop_and_reset():
    layer = exact()
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


def test_a_monitor_knows_the_strict_threshold_and_the_layers_errors():
    for strict in (False, True):
        found = seen(exact(strict_threshold=strict), torch.ones(1, 1, 1))
        assert (found["firing_rate"], found["analog_share"]) == (not strict, 0)
    layer = LIF()
    for arguments in ((), ("x",), (torch.zeros(2, dtype=torch.int64),)):
        with pytest.raises(TypeError) as plain:
            layer(*arguments)
        with pytest.raises(TypeError) as watched, Monitor(layer) as monitor:
            layer(*arguments)
        assert str(watched.value) == str(plain.value)
        assert monitor.result() == {"": {"width": 1.0}}


def test_keyword_arguments_and_other_hooks():
    """The monitor sees the input after pre-hooks and the output before other hooks."""
    layer = exact()
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((), {"x_seq": kwargs["x_seq"] + 1}), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: output + 7)
    with Monitor(layer) as monitor:
        output = layer(x_seq=torch.full((1, 1, 2), 0.25))
    assert output.tolist() == [[[8.0, 8.0]]]
    found = monitor.result()[""]
    assert (found["firing_rate"], found["analog_share"], found["inside"]) == (1, 0, 1)
    assert found["smoothing_error"] == 0.25


def test_carried_potentials_of_inference_mode_and_compiled_code():
    layer = LIF(stateful=True, analog_prob=0.5)
    with Monitor(layer) as monitor:
        with torch.inference_mode():
            layer(torch.rand(4, 2, 3))
        layer(torch.rand(4, 2, 3, requires_grad=True)).sum().backward()
    assert 0 <= monitor.result()[""]["firing_rate"] <= 1
    layer = LIF()
    with Monitor(layer) as monitor:
        torch.compile(layer, backend="eager", fullgraph=True)(torch.rand(4, 2, 3))
        assert monitor.result()[""] == {"width": 1.0}


def test_findings_on_foreign_layers():
    """Alone and in a tuple, step by step, without a tensor."""
    #                 time, batch, neuron: dead, saturated, neither
    s_seq = torch.tensor([[[0.0, 1.0, 0.0], [0.25, 1.0, 0.75]], [[0.0, 0.5, 0.0], [0.0, 1.0, 1.0]]])
    expected, neurons = {"width": 2.0, "firing_rate": 0.5, "analog_share": 0.25}, {"dead": 1 / 3, "saturated": 1 / 3}
    for wrap in (lambda s_seq: s_seq, lambda s_seq: (s_seq, "state")):
        assert seen(Foreign(wrap(s_seq)), s_seq) == pytest.approx(expected)
        assert seen(Foreign(wrap(s_seq), time_dim=0), s_seq) == pytest.approx({**expected, **neurons})
        assert seen(Foreign(wrap(s_seq.transpose(0, 1)), time_dim=1), s_seq) == pytest.approx({**expected, **neurons})
    step = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    found = seen(Foreign(time_dim=None), step, step)
    assert (found["dead"], found["saturated"], found["firing_rate"]) == pytest.approx((1 / 3, 1 / 3, 0.5))
    assert seen(Foreign(time_dim=None), torch.tensor([0.0, 1.0]))["saturated"] == 0.5  # without batch
    assert seen(Foreign({"spikes": 1}), step) == {"width": pytest.approx(2.0)}

    class Doubled(LIF):
        def forward(self, x_seq):
            return super().forward(2 * x_seq)

    found = seen(Doubled(analog_prob=0.0), torch.full((1, 1, 2), 0.5))
    assert set(found) == {"width", "firing_rate", "analog_share", "dead", "saturated"}
    assert found["firing_rate"] == 1.0


def test_table_and_scalars():
    model = nn.Sequential(nn.Linear(6, 5), LIF(analog_prob=0.4), nn.Linear(5, 2), Foreign())
    with Monitor(model) as monitor:
        model(torch.randn(4, 3, 6))
    result = monitor.result()
    expected = {f"{key}/{name}": value for name, values in result.items() for key, value in values.items()}
    assert monitor.scalars() == expected
    assert len(expected) == 8 + 3
    head, first, second, *_ = str(monitor).splitlines()
    assert head.startswith("layer")
    keys = ("width", "firing_rate", "analog_share", "inside", "smoothing_error", "growth", "dead", "saturated")
    assert first.split() == ["1", *(f"{result['1'][key]:.4f}" for key in keys)]
    assert second.split()[0] == "3"
    assert second.split().count("-") == 5
    assert len(head) == len(first) == len(second)
    lone = Monitor(LIF(width=2.0))
    assert lone.scalars() == pytest.approx({"width": 2.0})
    assert "(the model)" in str(lone)


def test_inputs_of_spike_layers():
    """Which of them are not zero, and where torch's layer is faster."""
    torch.manual_seed(0)
    model = nn.Sequential(
        asgl_cuda.SpikeLinear(8, 64), LIF(), asgl_cuda.OverTime(asgl_cuda.SpikeConv1d(1, 4, 3)), nn.Flatten(2)
    )
    model.insert(2, nn.Unflatten(2, (1, 64)))
    x_seq = torch.zeros(4, 2, 8)
    x_seq[..., :6] = float("nan")
    x_seq[..., 6] = 1.0
    with Monitor(model) as monitor:
        s_seq = model[:2](x_seq)
        for share in (1.0, 0.0, 0.2):
            model[3]((torch.arange(320).reshape(1, 5, 1, 64) < 320 * share).float())
    found = monitor.result()
    assert list(found) == ["0", "1", "3.layer"]
    assert found["0"] == {"nonzero_inputs": 0.875}
    assert found["3.layer"] == {"nonzero_inputs": pytest.approx(0.4)}
    assert "nonzero_inputs" not in found["1"]
    assert s_seq.shape == (4, 2, 64)
    assert monitor.scalars()["nonzero_inputs/0"] == 0.875
    problems = [each for each in monitor.problems() if "inputs are not zero" in each]
    assert [each.partition(":")[0] for each in problems] == ["0", "3.layer"]
    assert "88% of its inputs" in problems[0]
    assert "asgl_cuda.from_spike_layers" in problems[0]
    assert "nonzero inputs" in str(monitor)
    assert not any(each._forward_pre_hooks for each in model.modules())
    monitor.reset()
    with monitor:
        model[3](torch.zeros(1, 5, 1, 64))
    assert monitor.result()["3.layer"] == {"nonzero_inputs": 0}
    assert not any("not zero" in each for each in monitor.problems())
    assert "nonzero" not in str(Monitor(nn.Sequential(LIF())))
