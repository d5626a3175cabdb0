"""The studies of the width's step and of the residual network: designs, trainings and tables."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch

from benchmarks.learning import residual_network, width_step
from benchmarks.learning.data import Data
from benchmarks.learning.width_step import ADAM, BASE, SGD, Cell


@pytest.fixture
def data(monkeypatch):
    torch.manual_seed(0)
    labels = torch.arange(40) % 3
    samples = torch.rand(40, 1, 5) + labels.reshape(-1, 1, 1)
    monkeypatch.setattr(width_step, "read", lambda *_: Data(samples, labels, samples, labels))


def test_design_of_the_steps():
    every = width_step.all_runs()
    assert len({*map(str, every)}) == len(every)
    for cell, trainings in width_step.CELLS.items():
        assert trainings
        found = [run for run in every if run.cell == cell]
        count = len(trainings) * len(width_step.rules_of(cell)) * len(width_step.widths_of(cell))
        assert len(found) == count


def test_every_rule_moves_the_width_by_its_rate(data):
    """In four steps of Adam at most the sum of the rates, which fall along a cosine; not at all where it is fixed."""
    moved = {}
    cell = Cell("digits", steps=4)
    for optimizer, rate in ((SGD, 0.2), (ADAM, 3e-3)):
        for rule in width_step.RULES:
            result = width_step.train(width_step.Run(cell, optimizer, rate, rule, 5.0), 2)
            assert len(result["test"]) == len(result["widths"]) == 2
            moved[optimizer, rule] = abs(torch.tensor(result["widths"]).div(5).log()).max().item()
    for optimizer in (SGD, ADAM):
        assert moved[optimizer, "fixed"] == 0
        assert moved[optimizer, "Adam 0.01"] < moved[optimizer, "Adam 0.03"] < moved[optimizer, "Adam 0.1"] <= 0.26
        assert moved[optimizer, "Adam 7 / steps"] > 1
    assert 0 < moved[ADAM, "3e-4"] <= 0.0009
    assert moved[ADAM, "lr / 10"] == pytest.approx(moved[ADAM, "3e-4"])


@pytest.mark.parametrize("learned", ["channels", "decays"])
def test_other_learned_values(data, learned):
    cell = Cell("digits", steps=2, learned=learned)
    results = {
        rule: width_step.train(width_step.Run(cell, SGD, 0.2, rule, 5.0), 2) for rule in width_step.rules_of(cell)
    }
    assert len({str(result) for result in results.values()}) > 1


def test_table_of_the_steps():
    runs = {
        str(width_step.Run(BASE, SGD, 0.2, "Adam 0.03", width)): {"test": [90.0 - less, 92.0 - less]}
        for less, width in ((0, 1.0), (3, 5.0), (7, 30.0))
    }
    (row,) = width_step.rows({"runs": runs})
    assert row == [
        "digits, rectangle, 6 layers, 250 steps",
        "SGD 0.2",
        "Adam 0.03",
        "91.0",
        "3.0 ± 0.0",
        "",
        "7.0 ± 0.0",
    ]
    assert len(row) == len(width_step.HEAD)


def test_residual_network(monkeypatch, tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(80) % 10
    images = 3 * torch.eye(10)[labels].repeat_interleave(7, 1)[:, :64].reshape(-1, 1, 1, 8, 8)
    monkeypatch.setattr(residual_network, "read", lambda: Data(images, labels, images, labels))
    monkeypatch.setattr(residual_network, "EPOCHS", 2)
    monkeypatch.setattr(residual_network, "BATCH", 8)
    runs = {}
    for optimizer, arm in (("SGD", "ASGL"), ("SGD", "ASGL"), ("Adam", "SG")):
        run = residual_network.Run(optimizer, 1.0, arm, 0)
        result = residual_network.train(run, epochs=2, channels=4)
        assert runs.setdefault(str(run), result) == result, "repeatable"
        assert len(result["accuracies"]) == len(result["losses"]) == 2
        assert result["losses"][1] < result["losses"][0]
        assert (result["widths"] == [1.0] * 9) == (arm == "SG")
    head, rows = residual_network.rows({"runs": runs})
    assert [row[0] for row in rows] == ["SGD, width 1, ASGL", "Adam, width 1, SG"]
    assert all(len(row) == len(head) for row in rows)
    residual_network.plot({"runs": runs}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
