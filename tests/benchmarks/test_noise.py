"""The benchmarks of the noise and of gradients: the design, what is chosen by which samples, and known fidelities."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch

from benchmarks.learning import batched, gradients, noise, runs
from benchmarks.learning.batched import Networks, Setting
from benchmarks.learning.data import SOURCES, Data
from benchmarks.learning.noise import ARMS, CONTROLS, EDGE, QUIET, Cell, Run

CELL = Cell("digits", 4, 60, 1.0, "SGD", "sigmoid")
RATES = noise.RATES["SGD"]


def test_design():
    cells, every = list(noise.cells()), noise.all_runs()
    assert len({str(run) for run in every}) == len(every)
    assert {run.cell for run in every} == set(cells)
    assert all(sum(cell == run.cell and run.arm == QUIET for run in every) == len(RATES) for cell in cells)
    assert {(cell.optimizer, cell.surrogate) for cell in cells} == {
        (optimizer, surrogate) for optimizer in ("SGD", "Adam") for surrogate in ("rectangle", "sigmoid")
    }
    assert {run.cell[:4] for run in every if run.arm in CONTROLS} == {noise.CONTROLLED}


def test_paired():
    gain, half = runs.paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    assert gain == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5, abs=1e-3)  # Student's t with 2 degrees of freedom, deviation 1


def report():
    """Validation prefers the first rate without noise, the last with noise; the test prefers others."""
    found = {}
    for number, rate in enumerate(RATES):
        found[str(Run(CELL, QUIET, rate))] = {"validation": 90.0 - number, "test": [80.0 + number, 82.0 + number]}
        found[str(Run(CELL, "0.2", rate))] = {
            "validation": 90.0 + number,
            "test": [90.0 - number / 2, 92.0 - 1.5 * number],
        }
    return {"runs": found}


def test_rates_are_chosen_by_validation():
    quiet, noisy = (noise.chosen(report(), CELL, arm) for arm in (QUIET, "0.2"))
    assert (quiet.rate, noisy.rate) == (RATES[0], RATES[-1])
    assert quiet.at_edge
    assert noisy.at_edge
    assert (quiet.test, quiet.gain, quiet.half) == ([80.0, 82.0], 0, 0)
    assert noisy.test == [88.0, 86.0]
    assert noisy.gain == 6.0
    assert noise.chosen(report(), CELL, "0.5") is None


def test_table_and_figure(tmp_path):
    ((name, *cells),) = noise.rows(report(), "0.2")
    assert name == "digits, T = 4, 60 steps, width 1"
    assert len(cells) == len(noise.HEAD) - 1
    cell = cells[noise.HEAD.index("SGD, sigmoid") - 1]
    assert [each for each in cells if each] == [cell]
    assert cell.startswith("81.0, +6.0 ± ")
    assert cell.endswith(EDGE)
    (row,) = noise.rows(report(), "0.5")
    assert "81.0, " in row, "an arm that was not trained"
    controls = list(noise.control_rows(report()))
    assert {len(row) for row in controls} == {len(noise.control_head())}
    assert not any(cell for row in controls for cell in row[1:])
    noise.plot(report(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_rate_inside_is_no_edge():
    found = report()
    for run in found["runs"].values():
        run["validation"] = 50.0
    for arm in (QUIET, "0.2"):
        found["runs"][str(Run(CELL, arm, RATES[2]))]["validation"] = 60.0
    assert noise.chosen(found, CELL, QUIET).rate == RATES[2]
    assert EDGE not in noise.gain_of(found, CELL, "0.2")
    found["runs"][str(Run(CELL, "0.2", RATES[0]))]["validation"] = 70.0
    assert noise.gain_of(found, CELL, "0.2").endswith(EDGE)


@pytest.mark.parametrize("arm", ARMS)
def test_training(arm):
    result = noise.train(Run(CELL._replace(steps=2), arm, 0.1), 2)
    assert len(result["test"]) == len(result["widths"]) == 2
    assert (result["widths"] == [1.0, 1.0]) == (arm == "fixed width")


def test_samples_of_validation_are_no_samples_of_training():
    data, validation, _ = noise.read("digits")
    whole = SOURCES["digits"].read(None)
    assert len(data.train) + len(validation) == len(whole.train)
    assert torch.equal(torch.cat([data.train, validation]).sum(0), whole.train.sum(0))
    assert torch.equal(data.test, whole.test)


def test_sequences_are_halved():
    samples = torch.arange(90.0).reshape(2, 9, 5)
    data = Data(samples, torch.zeros(2), samples[:1], torch.zeros(1))
    halved = batched.shortened(data)
    assert halved.train.shape == (2, 4, 5)
    assert torch.equal(halved.test[0, 3], (samples[0, 6] + samples[0, 7]) / 2)
    short = data._replace(train=samples[:, :8])
    assert batched.shortened(short) is short


def data(count=60):
    torch.manual_seed(0)
    labels = torch.arange(count) % 3
    samples = torch.rand(count, 1, 5) + labels.reshape(-1, 1, 1)
    return Data(samples, labels, samples, labels)


def test_the_smooth_networks_gradient_is_true(monkeypatch):
    """With all elements analog; the loss of the spiking network falls by something else."""
    monkeypatch.setattr(gradients, "PREDICTED", 1e-4)
    torch.set_default_dtype(torch.float64)
    try:
        networks = Networks(5, 3, (0, 1), Setting(2.0, analog_prob=1.0))
        before = [value.clone() for value in networks.state_dict().values()]
        found = gradients.fidelity(networks, data().train.double(), data().train_labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["same noise"] == pytest.approx([1, 1], abs=1e-2)
    assert found["spiking"] != pytest.approx([1, 1], abs=1e-2)
    assert all(map(torch.equal, before, networks.state_dict().values()))


def test_observing_changes_no_training(monkeypatch):
    """Nor does it draw noise of the training."""
    monkeypatch.setattr(gradients, "MARKS", (0, 2))
    samples, setting = data(), Setting(1.0, steps=3, analog_prob=0.2)
    alone = batched.trained(samples, setting, (0, 1))

    def observe(networks, step):
        gradients.fidelity(networks, samples.train, samples.train_labels)

    observed = batched.trained(samples, setting, (0, 1), observe)
    assert all(map(torch.equal, alone.state_dict().values(), observed.state_dict().values()))
    found = {arm: gradients.measure(samples, "SGD", "sigmoid", 1.0, arm, seeds=2, steps=3) for arm in gradients.ARMS}
    head, rows = gradients.rows({"runs": {"width 1": found}})
    assert [row[0] for row in rows] == ["width 1, step 0", "width 1, step 2"]
    assert all(len(row) == len(head) for row in rows)
    assert rows[0][1] == rows[0][2], "fixed and learned widths begin alike"
