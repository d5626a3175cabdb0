"""The experiment on widths: its methods, its resumption and its report."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch

from benchmarks.learning import runs, width_robustness
from benchmarks.learning.data import Data
from benchmarks.learning.width_robustness import ASGL, LEARNED, METHODS, SETTINGS, SG, Run

SHORT = {**SETTINGS, "seeds": 2, "steps": 2}


@pytest.fixture
def data(monkeypatch):
    torch.manual_seed(0)
    labels = torch.arange(20) % 3
    samples = torch.rand(20, 3, 5) + labels.reshape(-1, 1, 1)
    monkeypatch.setattr(width_robustness, "read", lambda *_: Data(samples, labels, samples, labels))


@pytest.mark.parametrize("method", METHODS)
def test_training_is_repeatable_and_changes_learned_widths_alone(data, method):
    run = Run("tones", "sigmoid", "SGD", method, 1.0)
    first, again = (width_robustness.train(run, None, SHORT) for _ in range(2))
    assert first == again
    assert len(first["accuracies"]) == 2
    assert (first["widths"] == [[1.0] * 6] * 2) == (method == SG)


def test_methods_differ_in_width_and_noise(data):
    settings = {**SHORT, "steps": 20}
    results = [
        width_robustness.train(Run("tones", "sigmoid", "SGD", method, 1.0), None, settings)["widths"]
        for method in METHODS
    ]
    assert results[0] != results[1] != results[2] != results[0]


def report(accuracies):
    """A report of accuracies by width for ASGL; SG has 1 less each."""
    runs = {
        str(Run("digits", "sigmoid", "Adam", method, width)): {"accuracies": [value - less for value in values]}
        for method, less in ((ASGL, 0), (SG, 1))
        for width, values in accuracies.items()
    }
    return {"runs": runs, "settings": SETTINGS, "seconds": 1.0, "machine": {}}


def test_series():
    sg, asgl = width_robustness.series(report({10.0: [90.0, 94.0], 0.5: [97.0, 97.0]}))
    assert (sg.method, asgl.method) == (SG, ASGL)
    assert asgl.widths == (0.5, 10.0)
    assert asgl.means == (97.0, 92.0)
    assert asgl.deviations == (0.0, pytest.approx(math.sqrt(8)))
    assert asgl.drop == 5.0
    assert sg.means == (96.0, 91.0)


def test_table_and_figure(tmp_path):
    found = report({0.5: [97.0, 98.0], 10.0: [90.0, 94.0]})
    head, rows = width_robustness.rows(found)
    assert head == ["", "0.5", "10", "best - worst"]
    assert rows[1] == ["digits, sigmoid, Adam, ASGL", "97.5 ± 0.7", "92.0 ± 2.8", "5.5"]
    assert width_robustness.summary(found) == (
        ["", "0.5", "10"],
        [["Adam, sigmoid, SG", "96.5", "91.0"], ["Adam, sigmoid, ASGL", "97.5", "92.0"]],
    )
    width_robustness.plot(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["width_robustness", *map(str, arguments)])
    return width_robustness.main()


def test_trainings_are_not_repeated(tmp_path, monkeypatch, capsys):
    """The second call adds a width, the third has nothing to do."""
    file = tmp_path / "found.json"
    # A process would import torch anew.
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda jobs, *_, **__: ThreadPoolExecutor(jobs))
    for name, value in (("SETTINGS", SHORT), ("SURROGATES", ("sigmoid",)), ("RATES", {"SGD": 0.1}), ("WIDTHS", (1.0,))):
        monkeypatch.setattr(width_robustness, name, value)
    common = ("--data", "digits", "--jobs", 1, "--json", file)
    call(monkeypatch, *common)
    first = json.loads(file.read_text())
    assert set(first["runs"]) == {f"digits sigmoid SGD {method} 1" for method in (SG, LEARNED, ASGL)}
    monkeypatch.setattr(width_robustness, "WIDTHS", (1.0, 5.0))
    call(monkeypatch, *common)
    second = json.loads(file.read_text())
    assert set(second["runs"]) == set(first["runs"]) | {f"digits sigmoid SGD {method} 5" for method in METHODS}
    assert all(second["runs"][key] == value for key, value in first["runs"].items())
    assert second["seconds"] > first["seconds"]
    monkeypatch.setattr(width_robustness, "train", lambda: None)
    call(monkeypatch, *common)
    assert json.loads(file.read_text())["runs"] == second["runs"]
    assert "12 trainings" in capsys.readouterr().out
    monkeypatch.setattr(width_robustness, "SETTINGS", {**SHORT, "analog_prob": 0.3})
    with pytest.raises(
        SystemExit, match=r"under other settings: expected .*'analog_prob': 0\.3.*found .*'analog_prob': 0\.2"
    ):
        call(monkeypatch, *common)
