"""Observations of a training under ASGL, on networks for which they are known."""

import math

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch
from rich.progress import Progress

import asgl_cuda
from benchmarks.learning import smoothing


def data(count=40):
    torch.manual_seed(0)
    return torch.rand(count, 64), torch.randint(10, (count,))


def neurons(model):
    return [layer for layer in model.modules() if isinstance(layer, asgl_cuda.LIF)]


@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
def test_a_narrow_window_leaves_the_spiking_network(surrogate):
    """Noisy and embedded network are equal, and no potential is inside the window."""
    found = smoothing.observe(smoothing.network(1e-6, surrogate), *data())
    assert max(found["inside"]) < 1e-3
    assert max(found["smoothing_error"]) < 1e-3
    assert found["noisy_loss"] == pytest.approx(found["spiking_loss"], abs=1e-4)
    assert found["width"] == pytest.approx([1e-6] * 6)


def test_a_wide_window_does_not_leave_it():
    found = smoothing.observe(smoothing.network(1e6, "sigmoid"), *data())
    assert found["inside"] == [1.0] * 6
    # Every smooth value is 1/2, as far from 1 as from 0.
    assert found["smoothing_error"] == pytest.approx([0.5] * 6, abs=1e-4)
    assert found["noisy_loss"] != found["spiking_loss"]


def test_observing_changes_nothing_and_is_repeatable():
    model = smoothing.network(1.0, "rectangle")
    before = [value.clone() for value in model.state_dict().values()]
    torch.manual_seed(1)
    first = smoothing.observe(model, *data())
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert smoothing.observe(model, *data())["spiking_loss"] == first["spiking_loss"]
    assert all(neuron.training for neuron in neurons(model))


def test_run_and_figure(tmp_path):
    with Progress(disable=True) as progress:
        epochs = smoothing.run(2.0, "sigmoid", 1, 0, progress)
    assert len(epochs) == 2
    assert epochs[1]["spiking_loss"] < epochs[0]["spiking_loss"]
    assert epochs[1]["width"] != epochs[0]["width"]
    assert all(math.isfinite(value) for epoch in epochs for value in epoch["smoothing_error"])
    report = {"runs": [{"surrogate": "sigmoid", "width": 2.0, "epochs": epochs}]}
    smoothing.plot(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
