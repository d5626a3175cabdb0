"""Observations of a training under ASGL, on networks for which they are known."""

import math

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch

import asgl_cuda
from benchmarks.learning import smoothing


def data(count=40):
    torch.manual_seed(0)
    return torch.rand(count, 64), torch.randint(10, (count,))


def neurons(model):
    return [layer for layer in model.modules() if isinstance(layer, asgl_cuda.LIF)]


@pytest.mark.parametrize("analog_prob", smoothing.ARMS.values())
@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
def test_a_narrow_window_leaves_the_spiking_network(surrogate, analog_prob):
    """Noisy and embedded network are equal, and no potential is inside the window."""
    found = smoothing.observe(smoothing.network(1e-6, surrogate, analog_prob), *data())
    assert found["inside"] < 1e-3
    assert found["smoothing_error"] < 1e-3
    assert found["noisy_loss"] == pytest.approx(found["spiking_loss"], abs=1e-4)
    assert found["width"] == pytest.approx(1e-6)


@pytest.mark.parametrize("analog_prob", smoothing.ARMS.values())
def test_a_wide_window_does_not_leave_it(analog_prob):
    """Trained without noise or with it, the noisy network is observed with noise."""
    found = smoothing.observe(smoothing.network(1e6, "sigmoid", analog_prob), *data())
    assert found["inside"] == 1.0
    # Every smooth value is 1/2, as far from 1 as from 0.
    assert found["smoothing_error"] == pytest.approx(0.5, abs=1e-4)
    assert found["noisy_loss"] != found["spiking_loss"]


def test_observing_changes_nothing_and_is_repeatable():
    model = smoothing.network(1.0, "rectangle", 0.0)
    before = [value.clone() for value in model.state_dict().values()]
    torch.manual_seed(1)
    first = smoothing.observe(model, *data())
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert smoothing.observe(model, *data())["spiking_loss"] == first["spiking_loss"]
    assert all(neuron.training and neuron.analog_prob == 0 for neuron in neurons(model))


@pytest.mark.parametrize("optimizer", smoothing.RATES)
def test_run_and_figure(optimizer, tmp_path):
    runs = [smoothing.run(optimizer, 2.0, "sigmoid", 0.2, 3, seed) for seed in (0, 1)]
    for before, *_, after in runs:
        assert after["spiking_loss"] < before["spiking_loss"]
        assert after["width"] != before["width"]
        assert math.isfinite(after["smoothing_error"])
    observed = smoothing.over_seeds(runs)
    widths = [run[-1]["width"] for run in runs]
    assert observed["width"]["mean"][-1] == pytest.approx(sum(widths) / 2, abs=1e-4)
    assert observed["width"]["deviation"][::3] == pytest.approx([0, abs(widths[0] - widths[1]) / 2**0.5], abs=1e-4)
    case = {"optimizer": optimizer, "surrogate": "sigmoid", "width": 2.0, "arm": "noise"}
    report = {"runs": [{**case, "observed": observed}]}
    _, (row,) = smoothing.rows(report)
    assert row[1].startswith("2.00 to ")
    smoothing.plot(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
