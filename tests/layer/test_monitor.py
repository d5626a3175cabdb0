"""Findings of a monitor on layers whose values are known."""

import math
import re
import sys
import types
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
import torch._dynamo.testing
from comparison import random_input, randomized
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training_layers import Foreign, network

import asgl_cuda
from asgl_cuda import LIF, Monitor
from asgl_cuda.surrogate import SURROGATES

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
    options = {"analog_prob": 0.4, "v_threshold": 0.9, "width": 1.3, "backend": backend, **options}
    learned = {"learn_decay": True, "learn_threshold": True}
    layer = LIF(features, granularity=granularity, time_dim=time_dim, **learned, **options)
    layer = randomized(layer).to(device).train(training)
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
        assert not watched or "firing_rate" in monitor.result()["1"]
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
    """Counted over time, batch and calls."""
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
    monitor.start()
    assert monitor.result() == expected
    with monitor:
        monitor._layers["1"](torch.zeros(4, 0, 5))  # no sample at all
    assert monitor.result() == expected
    assert str(monitor).splitlines()[1].split() == ["1", "1.0000", "-", "-", "-", "-", "-", "-"]
    assert monitor.problems()[0].startswith("nothing was seen: the model was not called, or only in compiled code")
    assert str(monitor).splitlines()[-1] == monitor.problems()[0]


def test_a_monitor_that_was_never_started_warns_once():
    monitor = Monitor(network())
    with pytest.warns(UserWarning, match=r"asgl_cuda\.Monitor: it was never started, so it saw nothing: call the"):
        monitor.result()
    assert set(monitor.scalars()) == {"width/1", "width/3"}


@pytest.mark.parametrize(
    ("layer", "scale", "expected"),
    [
        (LIF(analog_prob=0.0), 1.0, None),
        (LIF(analog_prob=0.0), 0.01, ["no neuron ever fired", "0.0% of", ": no gradient", "larger weights", "width"]),
        (LIF(analog_prob=0.0, surrogate="sigmoid"), 0.01, ["no neuron ever fired", "hardly any gradient"]),
        (LIF(analog_prob=0.0, width=9.0), 0.01, ["no neuron ever fired. What helps: larger weights"]),
        (LIF(analog_prob=0.0), 100.0, ["% of the neurons fired at every step (saturated)", "smaller weights"]),
        (LIF(analog_prob=0.0, width=1e-6), 1.0, ["no gradient passes", "weights of another scale"]),
        (LIF(analog_prob=0.0, surrogate="sigmoid"), math.nan, ["its potentials or its width are NaN"]),
    ],
)
def test_problems_in_words(layer, scale, expected):
    """The layer, the finding and the remedy, whose functions exist."""
    x_seq = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))
    x_seq = (x_seq.abs() if scale > 1 else x_seq) * scale
    model = nn.Sequential(layer)
    with Monitor(model) as monitor:
        model(x_seq)
    found = monitor.problems()
    if expected is None:
        assert found == []
        assert len(str(monitor).splitlines()) == 2
        return
    (line,) = found
    assert line.startswith("0: ")
    assert all(part in line for part in expected), line
    assert str(monitor).splitlines()[-1] == line
    for name in re.findall(r"asgl_cuda\.(\w+)", line):
        assert name in asgl_cuda.__all__


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
    image, others = torch.randn(1, 20), torch.randn(2, 20)

    def found_in(images):
        with Monitor(model) as monitor:
            model(images.expand(8, -1, -1))
        return monitor.result()[name], monitor.problems()

    found, problems = found_in(image)
    assert (found["constant"], found["firing_rate"]) == (1.0, 0.0)
    assert problems[0].startswith(f"{name}: 100% of the channels do not vary over time and batch: its normalisation")
    assert "a larger batch" in problems[0]
    assert "calibrate" not in problems[0]
    assert "BatchNormLIF" not in problems[0]
    with pytest.raises(ValueError, match="whatever the factor"):
        asgl_cuda.calibrate(model, image.expand(8, -1, -1))
    found, problems = found_in(others)
    assert found["constant"] == 0.0
    assert not any("vary" in each for each in problems)
    with torch.no_grad():
        model[0].weight[:15] = 0  # half of them, which is no problem
    found, problems = found_in(others)
    assert found["constant"] == 0.5
    assert not any("vary" in each for each in problems)
    model.eval()  # running statistics, for which an image may be alone
    found, problems = found_in(image)
    assert "constant" not in found
    assert not any("vary" in each for each in problems)


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


def test_a_constant_channel_without_eps_is_named():
    """Its potentials are NaN for that reason."""
    layer = asgl_cuda.BatchNormLIF(5, eps=0.0)
    with Monitor(layer) as monitor:
        layer(torch.ones(4, 6, 5))
    assert "100% of the channels do not vary" in monitor.problems()[0]


def test_a_constant_current_of_neurons_alone_is_no_problem():
    model = nn.Sequential(LIF(analog_prob=0.0))
    with Monitor(model) as monitor:
        model(torch.linspace(0, 1.5, 20).expand(8, 1, -1))
    assert "constant" not in monitor.result()["0"]
    assert monitor.problems() == []


@pytest.mark.filterwarnings("ignore:.*neurons at rest fire")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
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
    assert "in front" not in line
    assert ("asgl_cuda.calibrate" in line) == affine
    assert (f"a {expected[0]} weight of its normalisation" if affine else f"a {expected[1]} threshold") in line
    assert ("running statistics" in line) == (not training)
    if not affine:
        with pytest.raises(ValueError, match="no weight to be scaled"):
            asgl_cuda.calibrate(model, inputs)
    elif threshold > 0:
        asgl_cuda.calibrate(model, inputs)
        monitor.reset()
        with monitor:
            model(inputs)
        assert not any("never" in each for each in monitor.problems())


def test_with_levels_no_width_is_advised():
    layer = LIF(levels=4, v_reset=None, analog_prob=0.0)
    with Monitor(layer) as monitor:
        layer(torch.full((4, 2, 8), -1.0))
    (line,) = monitor.problems()
    assert "0.0% of the potentials are between 0 and levels thresholds: no gradient" in line
    assert "width" not in line


def test_some_dead_neurons_in_words():
    layer = LIF(decay=0.0, analog_prob=0.0)
    x_seq = torch.ones(2, 3, 10)
    for dead in (5, 6):
        x_seq[:, :, :dead] = 0.7
        with Monitor(layer) as monitor:
            layer(x_seq)
        found = monitor.problems()
        assert len(found) == (dead > 5)
    assert found[0].startswith(
        "(the model): 60% of the neurons never fired (dead). What helps: a normalisation in front"
    )


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
    """The monitor sees the input after pre-hooks and the output before other hooks."""
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
    computed = asgl_cuda.neuron.computed

    def spy(caller, x_seq, given):
        asked.append(given.backend)
        return computed(caller, x_seq, given)

    monkeypatch.setattr(asgl_cuda.neuron, "computed", spy)
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
def test_findings_on_foreign_layers(wrap):
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
        layer(torch.tensor([0.0, 1.0]))  # without batch
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
    head, first, second, *_ = str(monitor).splitlines()
    assert head.startswith("layer")
    assert first.split() == ["1", *(f"{value:.4f}" for value in result["1"].values())]
    assert second.split()[0] == "3"
    assert second.split().count("-") == 4
    assert len(head) == len(first) == len(second)


def test_a_lone_layer_has_a_name_in_the_table_only():
    with Monitor(LIF(width=2.0)) as monitor:
        pass
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
        with Monitor(LIF()) as monitor:
            monitor.plot(str(file))
        assert file.read_text() != drawn


def test_figure_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"asgl_cuda\.Monitor\.plot: needs matplotlib, .*: pip install matplotlib"):
        watched_network().plot(tmp_path / "figure.png")
