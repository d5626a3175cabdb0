"""`calibrate` on converted models: sequences, steps in a loop, currents, fused pairs."""

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from comparison import Stack
from conversions import SINGLE
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import asgl_cuda

STEPS = 4


@pytest.fixture
def x_seq():
    return torch.rand(1, 12, 1, 8, 8, generator=torch.Generator().manual_seed(5)).expand(STEPS, -1, -1, -1, -1)


class Loop(nn.Module):
    """A step at a time, as models of snnTorch and Norse's cells are written."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_seq):
        states = [None] * len(self.layers)
        outputs = []
        for x in x_seq.flatten(2):
            for place, each in enumerate(self.layers):
                if isinstance(each, nn.Linear):
                    x = each(x)
                elif isinstance(each, snntorch.Synaptic):
                    x, *states[place] = each(x, *(states[place] or ()))
                else:
                    x, states[place] = each(x, states[place])
            outputs.append(x)
        return torch.stack(outputs)


def spikingjelly(step_mode):
    model = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), neuron.LIFNode(tau=2.0), layer.MaxPool2d(2),
        layer.Conv2d(8, 8, 3), layer.BatchNorm2d(8), neuron.ParametricLIFNode(), layer.Flatten(),
        layer.Linear(32, 30), neuron.CUBALIFNode(0.7, 0.7), layer.Dropout(0.5), layer.Linear(30, 30), neuron.IFNode(),
    )  # fmt: skip
    functional.set_step_mode(model, step_mode)
    if step_mode == "m":
        return model
    return Stack(lambda m, x_seq: torch.stack([m.model(x) for x in x_seq]), model=model)


def wide():
    return nn.Linear(64, 50)


MODELS = {
    "SpikingJelly, sequences": (lambda: spikingjelly("m"), 4),
    "SpikingJelly, steps": (lambda: spikingjelly("s"), 4),
    "snnTorch": (lambda: Loop(wide(), snntorch.Leaky(0.9), nn.Linear(50, 50), snntorch.Synaptic(0.8, 0.8)), 2),
    "Norse, cells": (lambda: Loop(wide(), norse.LIFCell(), nn.Linear(50, 50), norse.LIFBoxCell()), 2),
    "Norse": (
        lambda: norse.SequentialState(nn.Flatten(2), wide(), norse.LIF(), nn.Linear(50, 50), norse.IAF()), 2,
    ),
    "sinabs": (
        lambda: nn.Sequential(
            Stack(lambda _, x_seq: x_seq.transpose(0, 1)), nn.Flatten(2), wide(),
            sinabs.layers.LIF(tau_mem=5.0, **SINGLE),
            nn.Linear(50, 50), sinabs.layers.IAF(**SINGLE),
        ), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("asgl", [None, {"surrogate": "sigmoid", "width": 1.0}], ids=["same", "asgl"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_layers_fire_at_the_rate(name, asgl, x_seq):
    torch.manual_seed(3)
    make, layers = MODELS[name]
    model, report = asgl_cuda.convert(make(), asgl=asgl)
    if name == "SpikingJelly, sequences" and asgl is None:
        model, layers = make(), 1
        nn.init.normal_(model[0].weight)  # in front of neurons that stay as they are
        model, _ = asgl_cuda.fuse(model, x_seq)  # converts those that it joins, and no others
    elif asgl is None and len(report.replaced) < layers:
        pytest.skip("as they are, these layers are faster than converted ones")
    calibrated = asgl_cuda.calibrate(model, x_seq)
    assert len(calibrated.layers) == layers
    for row in calibrated.layers:
        assert row.rate_after == pytest.approx(0.2, rel=0.02), row
    assert all(row.factor == pytest.approx(1, rel=0.03) for row in asgl_cuda.calibrate(model, x_seq).layers)
    asgl_cuda.reset(model.eval())
    model(x_seq)


def test_neurons_that_are_not_converted(x_seq):
    """Weights in front are not assigned to later layers."""
    model = nn.Sequential(
        nn.Flatten(2), wide(), neuron.QIFNode(step_mode="m"), nn.Linear(50, 50), neuron.LIFNode(step_mode="m")
    )
    with torch.no_grad():
        model[1].weight *= 20
    report = asgl_cuda.calibrate(asgl_cuda.convert(model)[0], x_seq)
    assert [row.weight for row in report.layers] == ["3.weight"]
