"""The benchmark of adaptive neurons."""

import pytest
import torch

import asgl_cuda

pytest.importorskip("rich")
from benchmarks.learning import adaptation


def test_recall():
    x_seq, labels = adaptation.recall(400, 20, torch.Generator().manual_seed(0))
    assert x_seq.shape == (35, 400, 41)
    counts = x_seq[:10, :, :40].unflatten(2, (4, 10)).sum((0, 3))
    assert torch.equal(counts.argmax(1), labels), "the pattern is what fires most"
    assert x_seq[10:30].mean() < 0.03
    assert torch.equal(x_seq[-5:, :, 40], torch.ones(5, 400))
    assert labels.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("neuron", adaptation.NEURONS)
def test_networks(neuron):
    net = adaptation.network(41, 4, 2, neuron)
    layers = [each for each in net if isinstance(each, (asgl_cuda.LIF, asgl_cuda.AdaptiveLIF))]
    assert [isinstance(each, asgl_cuda.AdaptiveLIF) for each in layers] == [neuron in ("adLIF", "ALIF")] * 2
    assert [each.to_threshold for each in layers if neuron != "adLIF" and "LIF," not in neuron] == (
        [True, True] if neuron == "ALIF" else []
    )
    assert net(torch.rand(6, 3, 41)).shape == (6, 3, 4)


def test_training(monkeypatch):
    monkeypatch.setattr(adaptation, "SEEDS", 1)
    (accuracy,) = adaptation.train(adaptation.Run("recall, 5 steps", "adLIF", 60))
    assert accuracy > 60
    assert adaptation.train(adaptation.Run("recall, 5 steps", "adLIF", 60)) == [accuracy]
