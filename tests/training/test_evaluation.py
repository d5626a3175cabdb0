"""Evaluation with hard spikes."""

import pytest
import torch
from comparison import random_input
from layer_cases import Foreign, network
from torch import nn

from asgl_cuda import LIF, asgl_layers, spiking_eval


@pytest.mark.parametrize("training", [True, False])
def test_spiking_eval(training):
    """Hard spikes, the gradients of evaluation, and nothing else; again inside itself, and after an exception."""
    model = nn.Sequential(nn.Linear(6, 5), LIF(width=9.0), nn.Dropout(0.5), LIF(width=9.0, analog_prob=1.0), Foreign())
    model.train(training)
    modes = [module.training for module in model.modules()]
    probs = lambda: [layer.analog_prob for _, layer in asgl_layers(model)]  # noqa: E731
    x_seq = torch.randn(4, 3, 6, requires_grad=True)
    with spiking_eval(model):
        assert probs() == [0, 0, 0]
        assert [module.training for module in model.modules()] == modes
        s_seq = model(x_seq)
        assert ((s_seq == 0) | (s_seq == 1)).all()
        s_seq.sum().backward()
        assert x_seq.grad.abs().sum() > 0
        with spiking_eval(model):
            pass
        assert probs() == [0, 0, 0]
    assert probs() == [0.5, 1.0, 0.3]
    with pytest.raises(ZeroDivisionError), spiking_eval(model):
        raise ZeroDivisionError
    assert probs() == [0.5, 1.0, 0.3]
    layer, x_seq = LIF(analog_prob=0.5), random_input(6, 3, 31)
    with spiking_eval(layer):
        (found,) = torch.autograd.grad(layer(x_seq).sum(), x_seq)
    (expected,) = torch.autograd.grad(layer.eval()(x_seq).sum(), x_seq)
    assert torch.equal(found, expected)


def test_spiking_eval_as_a_decorator():
    model = network()

    @spiking_eval(model)
    def shares(depth):
        return [model[1].analog_prob, model[3].analog_prob] + (shares(depth - 1) if depth else [])

    for _ in range(2):
        assert shares(1) == [0, 0, 0, 0]
        assert (model[1].analog_prob, model[3].analog_prob) == (0.2, 0.8)


def test_spiking_eval_of_a_layer_that_refuses_changes_nothing():
    class Stubborn(LIF):
        @property
        def analog_prob(self):
            return 0.5

        @analog_prob.setter
        def analog_prob(self, value):
            if value == 0 and hasattr(self, "threshold"):
                raise ZeroDivisionError

    model = nn.Sequential(LIF(analog_prob=0.4), Stubborn())
    with pytest.raises(ZeroDivisionError), spiking_eval(model):
        pass
    assert model[0].analog_prob == 0.4
