"""The experiment on widths: its methods, its resumption and its report."""

import json
import math
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch
from rich.console import Console

import asgl_cuda
from benchmarks.learning import width_robustness
from benchmarks.learning.data import Data
from benchmarks.learning.width_robustness import ASGL, SETTINGS, SG, Run

CPU = torch.device("cpu")
SHORT = {**SETTINGS, "epochs": {"otherwise": 2}}


def data(*shape, count=20):
    torch.manual_seed(0)
    labels = torch.arange(count) % 3
    samples = torch.rand(count, *shape) + labels.reshape(-1, *(1,) * len(shape))
    return Data(samples, labels, samples, labels)


def neurons(model):
    return [layer for layer in model.modules() if isinstance(layer, asgl_cuda.LIF)]


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (6, 2, 16, 16), (5, 12), (2, 3, 32, 32), (1, 3, 24, 24)])
@pytest.mark.parametrize("method", [SG, ASGL])
def test_network(shape, method):
    run = Run("digits", "sigmoid", method, 2.5, 0)
    found = data(*shape, count=3)
    model = width_robustness.network(found.train.shape[1:], found.classes, run)
    layers = neurons(model)
    assert len(layers) >= 6
    assert all((layer.log_width is not None) == (method == ASGL) for layer in layers)
    assert all(layer.analog_prob == (SETTINGS["analog_prob"] if method == ASGL else 0) for layer in layers)
    assert all(torch.as_tensor(layer.width).item() == pytest.approx(2.5) for layer in layers)
    assert width_robustness.scores_of(model, found.train, CPU).shape == (3, 3)


def test_methods_start_from_the_same_weights():
    models = []
    for method in (SG, ASGL):
        torch.manual_seed(1)
        models.append(width_robustness.network(torch.Size([4, 7]), 3, Run("tones", "rectangle", method, 1.0, 1)))
    one, other = (
        [value for name, value in model.named_parameters() if not name.endswith("log_width")] for model in models
    )
    assert len(one) == len(other)
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("method", [SG, ASGL])
def test_training_is_repeatable_and_changes_learned_widths_alone(method):
    found = data(3, 5)
    run = Run("tones", "sigmoid", method, 1.0, 3)
    first, again = (width_robustness.train(run, found, SHORT, CPU) for _ in range(2))
    assert first["accuracy"] == again["accuracy"]
    assert first["widths"] == again["widths"]
    assert (first["widths"] == [1.0] * 6) == (method == SG)
    longer = width_robustness.train(run, found, {**SETTINGS, "epochs": {"otherwise": 40}}, CPU)
    assert longer["accuracy"] > 90


def test_augmentation_in_training_alone():
    calls = []

    def augment(sample):
        calls.append(sample.shape)
        return sample

    found = data(1, 4)._replace(augment=augment)
    width_robustness.train(Run("digits", "sigmoid", SG, 1.0, 0), found, SHORT, CPU)
    assert calls == [(1, 4)] * 40


def report(accuracies):
    """A report of accuracies by width and seed for ASGL; SG has 1 less each."""
    runs = {}
    for method, less in ((SG, 1), (ASGL, 0)):
        for width, values in accuracies.items():
            for seed, value in enumerate(values):
                runs[str(Run("digits", "sigmoid", method, width, seed))] = {"accuracy": value - less}
    return {"runs": runs, "settings": SETTINGS, "seconds": 1.0, "machine": {}}


def test_series():
    sg, asgl = width_robustness.series(report({10.0: [90.0, 94.0], 0.5: [97.0, 97.0]}))
    assert (sg.method, asgl.method) == (SG, ASGL)
    assert asgl.widths == (0.5, 10.0)
    assert asgl.means == (97.0, 92.0)
    assert asgl.deviations == (0.0, pytest.approx(math.sqrt(8)))
    assert asgl.drop == 5.0
    assert sg.means == (96.0, 91.0)


def text(found):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(width_robustness.table(found))
    return console.export_text()


def test_table_and_figure(tmp_path):
    found = report({0.5: [97.0, 98.0], 10.0: [90.0, 94.0]})
    lines = text(found)
    assert "97.5 ± 0.7" in lines
    assert "92.0 ± 2.8" in lines
    assert "the paper's" not in lines
    width_robustness.plot(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "±" not in text(report({0.5: [97.0]})).split("seeds")[1]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["width_robustness", *map(str, arguments)])
    return width_robustness.main()


def test_trainings_are_not_repeated(tmp_path, monkeypatch, capsys):
    """The second call adds a width, the third has nothing to do."""
    file = tmp_path / "found.json"
    settings = {**SETTINGS, "epochs": {"otherwise": 1}}
    monkeypatch.setattr(width_robustness, "SETTINGS", settings)
    common = ("--data", "digits", "--surrogates", "sigmoid", "--seeds", 1, "--jobs", 1, "--json", file, "--widths")
    call(monkeypatch, *common, 1)
    first = json.loads(file.read_text())
    assert set(first["runs"]) == {"digits sigmoid SG 1 0", "digits sigmoid ASGL 1 0"}
    call(monkeypatch, *common, 1, 5)
    second = json.loads(file.read_text())
    assert set(second["runs"]) == set(first["runs"]) | {"digits sigmoid SG 5 0", "digits sigmoid ASGL 5 0"}
    assert all(second["runs"][key] == value for key, value in first["runs"].items())
    assert second["seconds"] > first["seconds"]
    monkeypatch.setattr(width_robustness, "work", None)
    call(monkeypatch, *common, 1, 5)
    assert json.loads(file.read_text())["runs"] == second["runs"]
    assert "4 trainings" in capsys.readouterr().out
    monkeypatch.setattr(width_robustness, "SETTINGS", {**settings, "rate": 0.2})
    with pytest.raises(SystemExit, match=r"under other settings: expected .*'rate': 0\.2.*found .*'rate': 0\.1"):
        call(monkeypatch, *common, 1)
