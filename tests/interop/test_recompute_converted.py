"""Spikes of converted layers that backward computes again, in a network with weights before and behind them."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conversions import LAYERS, WHOLE, reset
from torch import nn

import asgl_cuda
from asgl_cuda import recompute


class Network(nn.Module):
    """A layer between weights; of several outputs the first."""

    def __init__(self, layer, features):
        super().__init__()
        self.before, self.layer, self.behind = nn.Linear(features, features), layer, nn.Linear(features, 3)

    def forward(self, x):
        spikes = self.layer(self.before(x))
        return self.behind(spikes if isinstance(spikes, torch.Tensor) else spikes[0])


def gradients(model, x, context):
    torch.manual_seed(0)
    with context:
        loss = model(x).square().sum()
    loss.backward()
    return loss.detach(), [each.grad for each in model.parameters()]


@pytest.mark.parametrize("asgl", [None, {"width": 1.0, "analog_prob": 0.3}])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, asgl, monkeypatch):
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    model, report = asgl_cuda.convert(Network(make(), shape[-1]), asgl=asgl)
    if not report.replaced:
        pytest.skip("ASGL has no noise for this layer")
    computed = []
    original = recompute._Spikes._computed
    monkeypatch.setattr(recompute._Spikes, "_computed", lambda self: computed.append(self) or original(self))
    x = torch.randn(shape) * 3 + 1
    twin = copy.deepcopy(model)
    for each in (model, twin):
        reset(each)
    expected, found = gradients(model, x, nullcontext()), gradients(twin, x, asgl_cuda.recompute_spikes())
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    if shape == WHOLE:
        fires = model.layer.settings.spike is not None
        assert bool(computed) == fires
