"""Studies: networks trained at once learn as if alone; designs, choices and observations; reports in their schema."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("aeon")
pytest.importorskip("mlxtend")
pytest.importorskip("norse")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("spikingjelly")

import torch
from schema import paths
from torch import nn
from torch.nn import functional

import asgl_cuda
from asgl_cuda import OverTime
from benchmarks import readme
from benchmarks.learning import __main__ as program
from benchmarks.learning import batched, defaults, demo, neurons, noise, studies, widths
from benchmarks.learning.batched import Networks, Setting
from benchmarks.learning.data import SOURCES, Data
from benchmarks.learning.optimizers import ADAM, MOMENTUM, SGD, WEIGHT_DECAY, accuracy_of, fit, optimizer_of
from benchmarks.learning.studies import Study

ROOT = Path(__file__).parents[2]
SEEDS = (3, 1, 2)


def data(time=1, features=5, count=30, dtype=torch.float64):
    torch.manual_seed(0)
    labels = torch.arange(count) % 3
    samples = torch.rand(count, time, features, dtype=dtype) + labels.reshape(-1, 1, 1)
    return Data(samples, labels, samples, labels)


@pytest.fixture
def doubles():
    """Rounding flips no spike."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- networks trained at once ----


def optimizers_of(model, setting):
    """Each parameter in the group that its name says."""
    rates = {"log_width": setting.width_rate, "logit_decay": setting.decay_rate, "threshold": setting.decay_rate}
    named = list(model.named_parameters())
    groups = [
        {"params": [value for key, value in named if key.endswith(name)], "lr": rate}
        for name, rate in rates.items()
        if any(key.endswith(name) for key, _ in named)
    ]
    weights = {"params": [value for key, value in named if not key.endswith(tuple(rates))]}
    if setting.optimizer == ADAM:
        return [torch.optim.Adam([weights, *groups], setting.rate)]
    weights["weight_decay"] = WEIGHT_DECAY
    together = [weights, *groups] if setting.width_by_weights else [weights]
    apart = [] if setting.width_by_weights or not groups else [torch.optim.Adam(groups)]
    return [torch.optim.SGD(together, setting.rate, MOMENTUM), *apart]


def alone(found, setting, seed):
    """A training of one network in layers of torch."""
    torch.manual_seed(seed)
    sizes = (found.train.shape[2], *(batched.HIDDEN,) * setting.layers)
    layers = []
    learns = {"learn_decay": setting.decay_rate is not None, "learn_threshold": setting.decay_rate is not None}
    for linear in [nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)]:
        neuron = asgl_cuda.LIF(
            batched.HIDDEN if setting.by_channel else None, granularity="channel" if setting.by_channel else "layer",
            decay=setting.decay, width=setting.width, surrogate=setting.surrogate, analog_prob=setting.analog_prob,
            learn_width=setting.learned, detach_reset=setting.detach_reset, **learns,
        )  # fmt: skip
        layers += [OverTime(linear), OverTime(nn.BatchNorm1d(batched.HIDDEN)), neuron]
    model = nn.Sequential(*layers, nn.Linear(batched.HIDDEN, 3))
    optimizers = optimizers_of(model, setting)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, setting.steps) for each in optimizers]

    def scores(samples):
        x_seq = samples.transpose(0, 1)
        return model(x_seq.expand(setting.time_steps, -1, -1) if len(x_seq) == 1 else x_seq).mean(0)

    for (order,) in batched.orders(len(found.train), setting, [seed]):
        model.zero_grad()
        functional.cross_entropy(scores(found.train[order]), found.train_labels[order]).backward()
        for stepper in (*optimizers, *schedules):
            stepper.step()
    return model.eval(), scores(found.test).detach()


@pytest.mark.parametrize(
    ("time", "options"),
    [
        (1, {}),
        (5, {"learned": False, "layers": 2}),
        (1, {"analog_prob": 1.0}),
        (5, {"width_by_weights": True, "width_rate": 0.01}),
        (1, {"optimizer": ADAM, "rate": 3e-3, "decay_rate": 0.01}),
        (5, {"by_channel": True, "surrogate": "triangle"}),
        (5, {"decay": 0.9, "detach_reset": True}),
    ],
    ids=str,
)
def test_networks_at_once_equal_trainings_of_one(doubles, time, options):
    found = data(time)
    arms = [Networks(5, 3, SEEDS, Setting(width)) for width in (1.0, 5.0)]
    assert all(map(torch.equal, *(each.weights for each in arms))), "arms begin with the same weights"
    setting = Setting(2.0, steps=8, batch=12, time_steps=3, **options)
    networks = batched.trained(found, setting, SEEDS).eval()
    together = networks(found.test[None]).detach()
    for number, seed in enumerate(SEEDS):
        model, scores = alone(found, setting, seed)
        torch.testing.assert_close(together[number].T, scores)
        expected = [float(torch.as_tensor(layer.width).detach().mean()) for _, layer in asgl_cuda.asgl_layers(model)]
        assert networks.widths()[number] == pytest.approx(expected, abs=1e-4)
        assert (expected == [2.0] * setting.layers) == (not setting.learned)


def test_accuracies_are_by_hard_spikes_without_dropout(doubles):
    found = data(2)
    networks = batched.trained(found, Setting(1.0, analog_prob=0.5, dropout=0.2, steps=60), SEEDS)
    accuracies = networks.accuracies(found.test, found.test_labels)
    assert accuracies == networks.accuracies(found.test, found.test_labels)
    assert min(accuracies) > 90
    assert networks.training
    labels = networks.eval()(found.test[None]).argmax(1)
    assert accuracies == pytest.approx((100 * (labels == found.test_labels).double().mean(1)).tolist(), abs=1e-3)


def test_noise_is_annealed_to_nothing(doubles, monkeypatch):
    probs, lif = [], asgl_cuda.lif
    monkeypatch.setattr(asgl_cuda, "lif", lambda *a, **o: probs.append(o["analog_prob"]) or lif(*a, **o))
    batched.trained(data(), Setting(1.0, analog_prob=0.5, annealed=True, steps=4), SEEDS)
    assert probs[::6] == pytest.approx([0.5, 0.25 + 0.125 * 2**0.5, 0.25, 0.25 - 0.125 * 2**0.5])


def test_every_sample_once_an_epoch():
    orders = batched.orders(10, Setting(1.0, steps=5, batch=4), SEEDS)
    assert orders.shape == (5, 3, 4)
    for order in orders.transpose(0, 1):
        assert sorted(order.flatten()[:10].tolist()) == sorted(order.flatten()[10:].tolist()) == list(range(10))
    assert not torch.equal(orders[:, 0], orders[:, 1])


# ---- trainings of the studies ----


@pytest.fixture
def small_data(monkeypatch):
    """Sets of some samples, images for the residual network."""
    few = data(dtype=torch.float32)
    for module in (widths, noise):
        monkeypatch.setattr(module, "read", lambda *_: few)
    labels = torch.arange(80) % 10
    images = 3 * torch.eye(10)[labels].repeat_interleave(7, 1)[:, :64].reshape(-1, 1, 1, 8, 8)
    monkeypatch.setattr(neurons, "read_mnist", lambda: Data(images, labels, images, labels))
    monkeypatch.setattr(neurons, "BATCH", 8)
    monkeypatch.setattr(noise, "MARKS", (0, 2))
    monkeypatch.setattr(noise, "BATCH_SIZE", 512)
    monkeypatch.setattr(noise, "HIDDEN", (16, 16))
    noise.read_with_validation.cache_clear()
    yield
    noise.read_with_validation.cache_clear()


SHORT = {**widths.SETTINGS, "seeds": 2, "steps": 2}
TRAININGS = {
    "width_robustness": [
        partial(widths.train_from_width, widths.Training("digits", "sigmoid", SGD, method, 1.0), None, SHORT)
        for method in widths.METHODS
    ],
    "width_step": [
        partial(widths.train_by_rule, widths.Step("digits", "rectangle", 6, 2, learned, SGD, 0.2, 5.0, rule), 2)
        for learned, rule in (("width", "fixed"), ("channels", "Adam 0.1"), ("decays", "0.03"))
    ],
    "defaults": [
        partial(defaults.train_run, defaults.Run("digits", 6, 4, 0.9, 2, SGD, arm), 3, 2)
        for arm in (defaults.DEFAULT, "sigmoid 0.5")
    ],
    "noise": [
        partial(noise.train_arm, noise.Compared("digits", 4, 2, 1.0, SGD, "sigmoid", 0.1, arm), 2)
        for arm in noise.ARMS
    ],
    "gradients": [
        partial(
            lambda run: {arm: noise.fidelities(noise.read(""), run, arm, 2, 3) for arm in noise.FIDELITY_ARMS}, run
        )
        for run in noise.FOLLOWED[:2]
    ],
    "smoothing": [
        partial(noise.train_observed, noise.Smoothed(optimizer, "sigmoid", 2.0, arm), 2, 1)
        for optimizer, arm in ((SGD, "noise"), (ADAM, "no noise"))
    ],
    "adaptation": [
        partial(neurons.train_adapted, neurons.Adapted(task, neuron, 1), 1)
        for task, neuron in itertools.product(("recall, 5 steps", "vowels"), ("LIF, decay 0.98", "adLIF", "ALIF"))
    ],
    "calibration": [
        partial(neurons.train_calibrated, neurons.Calibrated(network, optimizer, rate, 0), 1)
        for network, optimizer, rate in (
            ("digits, 2 layers", "SGD", None), ("digits, convolutional, 5 layers", "Adam", 0.1),
            ("vowels, 6 layers", "SGD", 0.4),
        )
    ],
    "residual_network": [
        partial(neurons.train_residual, neurons.Residual(optimizer, 1.0, arm, 0), 2, 4)
        for optimizer, arm in ((SGD, "ASGL"), (ADAM, "SG"))
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings(small_data, name):
    """Repeatable, of other arms other, and a result has the schema of the committed ones."""
    found = [train() for train in TRAININGS[name]]
    assert TRAININGS[name][0]() == found[0]
    assert len({json.dumps(each) for each in found}) > 1
    runs = readme.read_report(name)["runs"]
    results = list(runs.values()) if isinstance(runs, dict) else runs
    assert {path for each in found for path in paths(each)} <= {path for each in results for path in paths(each)}


def test_fixed_widths_stay(small_data):
    sg, learned, asgl = (train()["widths"] for train in TRAININGS["width_robustness"])
    assert sg == [[1.0] * 6] * 2
    assert sg != learned != asgl != sg
    for arm, train in zip(noise.ARMS, TRAININGS["noise"], strict=True):
        assert (train()["widths"] == [1.0, 1.0]) == (arm == "fixed width")
    asgl, sg = (train() for train in TRAININGS["residual_network"])
    assert len(asgl["accuracies"]) == 2
    assert asgl["losses"][1] < asgl["losses"][0]
    assert len(asgl["widths"]) == 9
    assert sg["widths"] == [1.0] * 9 != asgl["widths"]


@pytest.mark.parametrize(("optimizer", "noise"), [(SGD, {"analog_prob": 0.0}), (ADAM, {"analog_prob": 0.0}), (SGD, {})])
def test_long_sequences_are_learned_by_default(optimizer, noise):
    """Constant inputs, 100 steps and a slow decay, where gradients explode through a reset that is not detached."""
    found = SOURCES["digits"].read(None)
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(2)]
    for _ in range(2):
        layers += [nn.Linear(64, 64, bias=False), asgl_cuda.BatchNormLIF(64, decay=0.95, **noise)]
    model = nn.Sequential(*layers, nn.Linear(64, 10))

    def scores_of(samples):
        return model(samples.transpose(0, 1).expand(100, -1, -1, -1, -1)).mean(0)

    steps, weights = 250, optimizer_of(model, optimizer)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(weights, steps)
    batches = (torch.randint(len(found.train), (32,)) for _ in range(steps))
    fit(
        lambda each: functional.cross_entropy(scores_of(found.train[each]), found.train_labels[each]),
        batches, weights, cosine,
    )  # fmt: skip
    assert accuracy_of(model, scores_of, found.test, found.test_labels) >= 95


def test_parameters_of_the_residual_network():
    counted = sum(each.numel() for each in neurons.residual_network(width=1.0).parameters())
    assert counted == neurons.RESIDUAL["parameters"]


def test_recall_is_learned():
    x_seq, labels = neurons.recall(400, 20, torch.Generator().manual_seed(0))
    assert x_seq.shape == (35, 400, 41)
    counts = x_seq[:10, :, :40].unflatten(2, (4, 10)).sum((0, 3))
    assert torch.equal(counts.argmax(1), labels), "the pattern is what fires most"
    assert x_seq[10:30].mean() < 0.03
    assert torch.equal(x_seq[-5:, :, 40], torch.ones(5, 400))
    assert labels.unique().tolist() == [0, 1, 2, 3]
    (accuracy,) = neurons.train_adapted(neurons.Adapted("recall, 5 steps", "adLIF", 60), 1)
    assert accuracy > 60


# ---- designs ----


@pytest.mark.parametrize("name", program.STUDIES)
def test_every_committed_run_is_of_the_design(name):
    """No two runs have one name, and settings are those of the results."""
    study, report = program.STUDIES[name], readme.read_report(name)
    names = [study.text(run) for run in study.runs]
    assert len(set(names)) == len(names)
    if study.listed:
        kind = type(study.runs[0])
        found = [kind(*(each[field] for field in kind._fields)) for each in report["runs"]]
        assert set(found) == set(study.runs)
    else:
        assert set(report["runs"]) == set(names)
    assert all(report[key] == value for key, value in study.settings.items())


def test_samples_of_validation_are_no_samples_of_training():
    few, validation, _ = noise.read_with_validation("digits")
    whole = SOURCES["digits"].read(None)
    assert len(few.train) + len(validation) == len(whole.train)
    assert torch.equal(torch.cat([few.train, validation]).sum(0), whole.train.sum(0))
    assert torch.equal(few.test, whole.test)


# ---- observations ----


def test_the_smooth_networks_gradient_is_true(doubles, monkeypatch):
    """With all elements analog; the loss of the spiking network falls by something else."""
    monkeypatch.setattr(noise, "PREDICTED", 1e-4)
    networks = Networks(5, 3, (0, 1), Setting(2.0, analog_prob=1.0))
    before = [value.clone() for value in networks.state_dict().values()]
    found = noise.fidelity(networks, data().train, data().train_labels)
    assert found["same noise"] == pytest.approx([1, 1], abs=1e-2)
    assert found["spiking"] != pytest.approx([1, 1], abs=1e-2)
    assert all(map(torch.equal, before, networks.state_dict().values()))


def test_observing_a_gradient_changes_no_training():
    """Nor does it draw noise of the training."""
    samples, setting = data(dtype=torch.float32), Setting(1.0, steps=3, analog_prob=0.2)

    def observe(networks, step):
        noise.fidelity(networks, samples.train, samples.train_labels)

    alone, observed = (batched.trained(samples, setting, (0, 1), each) for each in (None, observe))
    assert all(map(torch.equal, alone.state_dict().values(), observed.state_dict().values()))


@pytest.mark.parametrize("analog_prob", noise.SMOOTHED_ARMS.values())
@pytest.mark.parametrize(("width", "inside", "error"), [(1e-6, 0.0, 0.0), (1e6, 1.0, 0.5)])
def test_windows_of_which_all_is_known(width, inside, error, analog_prob):
    """In a narrow one is nothing, and both networks are equal; in a wide one every smooth value is 1/2."""
    torch.manual_seed(0)
    images, labels = torch.rand(40, 64), torch.randint(10, (40,))
    model = demo.spiking_mlp((32, 32), width=width, surrogate="sigmoid", analog_prob=analog_prob)
    before = [value.clone() for value in model.state_dict().values()]
    found = noise.observe(model, images, labels)
    assert found["inside"] == pytest.approx(inside, abs=1e-3)
    assert found["smoothing_error"] == pytest.approx(error, abs=1e-3)
    assert (found["noisy_loss"] == pytest.approx(found["spiking_loss"], abs=1e-4)) == (width < 1)
    assert all(map(torch.equal, before, model.state_dict().values()))
    layers = [layer for _, layer in asgl_cuda.asgl_layers(model)]
    assert all(layer.training and layer.analog_prob == analog_prob for layer in layers)
    assert noise.observe(model, images, labels)["spiking_loss"] == found["spiking_loss"]


# ---- the program ----


class Square(NamedTuple):
    """A run of a study that takes no time."""

    number: int
    width: float


def squares(count, **changes):
    runs = [Square(number, 0.5) for number in range(count)]
    return Study("squares", {"settings": {"seeds": 1}}, runs, lambda run: {"result": run.number**2}, **changes)


@pytest.mark.parametrize("listed", [False, True])
def test_trainings_are_not_repeated(tmp_path, monkeypatch, listed):
    """A report goes on with what it lacks, in the order of the study; other settings are refused."""
    # A process would import torch anew.
    monkeypatch.setattr(studies, "ProcessPoolExecutor", lambda jobs, *_, **__: ThreadPoolExecutor(jobs))
    file = tmp_path / "found.json"
    squares(2, listed=listed).conduct(file, 2, "0 0.5")
    assert len(json.loads(file.read_text())["runs"]) == 1
    squares(2, listed=listed).conduct(file, 2)
    report = squares(3, listed=listed)._replace(train=lambda run: {"result": -1}).conduct(file, 1)
    assert json.loads(file.read_text()) == report
    results = [0, 1, -1]
    if listed:
        assert report["runs"] == [{"number": n, "width": 0.5, "result": each} for n, each in enumerate(results)]
    else:
        assert report["runs"] == {f"{n} 0.5": {"result": each} for n, each in enumerate(results)}
        assert list(report["runs"]) == ["0 0.5", "1 0.5", "2 0.5"]
    other = squares(3)._replace(settings={"settings": {"seeds": 2}})
    with pytest.raises(SystemExit, match=r"under other settings: expected .*'seeds': 2.*found .*'seeds': 1.*--json"):
        other.conduct(file, 1)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["learning", *map(str, arguments)])
    return program.main()


def test_program(tmp_path, monkeypatch, capsys):
    """It prints the section of the page; a data root adds sets of the width's study."""
    conducted = []

    def conduct(study, file, jobs, only):
        conducted.append((study, file, jobs, only))
        return readme.read_report(study.name)

    monkeypatch.setattr(Study, "conduct", conduct)
    cell = "digits 4 250 10 Adam sigmoid"
    assert call(monkeypatch, "noise", "--json", tmp_path / "found.json", "--jobs", 3, "--only", cell) == 0
    assert conducted[0][1:] == (tmp_path / "found.json", 3, cell)
    with pytest.raises(SystemExit):
        call(monkeypatch, "noise", "--only", "digits 5")
    assert "--only 'digits 5' is in no run; the first one is 'digits 1 60 1 SGD rectangle 0.03 0'" in (
        capsys.readouterr().err
    )
    call(monkeypatch, "noise", "--json", tmp_path / "found.json")
    assert readme.text_of(readme.SECTIONS["noise"], readme.read_report("noise")) in capsys.readouterr().out
    (tmp_path / "NMNIST").mkdir()
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "width_robustness", "--data-root", tmp_path)
    assert {run.data for run in conducted[2][0].runs} - {run.data for run in widths.width_robustness().runs} == {
        "nmnist"
    }
    assert conducted[2][1] == Path("build/width_robustness.json")


def test_demo(tmp_path, monkeypatch, capsys):
    """Both neurons train alike; the figure is drawn."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "HIDDEN", (16, 16))
    monkeypatch.setattr(demo, "BATCH_SIZE", 512)
    monkeypatch.setattr(sys, "argv", ["demo", "--epochs", "1", "--figure", str(tmp_path / "demo.png")])
    demo.main()
    assert "times faster" in capsys.readouterr().out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


# ---- interrupts ----


@pytest.mark.parametrize(
    ("code", "status", "begin", "end"),
    [
        ("raise KeyboardInterrupt", -signal.SIGINT, "interrupted; the same", "command begins anew\n"),
        ("raise KeyboardInterrupt('--resume goes on')", -signal.SIGINT, "interrupted", "; --resume goes on\n"),
        ("1 / 0", 1, "Traceback", "ZeroDivisionError: division by zero\n"),
    ],
)
def test_an_interrupt_is_one_line_and_the_signal(code, status, begin, end):
    command = [sys.executable, "-c", f"import benchmarks\n{code}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status
    assert result.stderr.startswith(begin)
    assert result.stderr.endswith(end)
    assert (result.stderr.count("\n") == 1) == (status < 0)


def interrupted(run, file):
    """The second training has the main process interrupted after the first, and would never end."""
    if run.number:
        while not file.exists():
            threading.Event().wait(0.01)
        os.kill(os.getppid(), signal.SIGINT)
        threading.Event().wait()
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_interrupted_trainings_are_kept(tmp_path):
    file = tmp_path / "report.json"
    study = squares(2)._replace(train=partial(interrupted, file=file))
    with pytest.raises(KeyboardInterrupt, match=f"the same command goes on: {file} has 1 of 2 trainings"):
        study.conduct(file, 1)
    assert json.loads(file.read_text())["runs"] == {"0 0.5": True}, "Ctrl-C reaches the main process alone"
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
