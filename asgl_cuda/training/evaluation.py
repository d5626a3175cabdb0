"""Evaluation with hard spikes and surrogate gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layers import require_asgl_layers


@contextmanager
def spiking_eval(model: nn.Module) -> Iterator[None]:
    """A context in which every ASGL layer emits hard spikes, with surrogate gradients, for attacks and fine-tuning.

    On entry `analog_prob` is set to 0. On exit each layer gets its own value back, also after an exception. Nothing
    else changes, for example not the modes of batch norm and dropout. Adversarial attacks need `model.eval()` as well,
    and fine-tuning does not. Do not step an `AnalogProbSchedule` inside, because its values are lost on exit.

    The result is a context manager and a decorator of functions.

    Raises ValueError for a model without ASGL layers, and TypeError if `model` is not a module, both on entry.

    Example::

        model = nn.Sequential(nn.Linear(64, 128), asgl_cuda.LIF(analog_prob=0.2))
        x_seq = torch.randn(4, 32, 64, requires_grad=True)
        with asgl_cuda.spiking_eval(model):
            (gradient,) = torch.autograd.grad(model(x_seq).sum(), x_seq)
    """
    before = [(layer, layer.analog_prob) for layer in require_asgl_layers(model, "asgl_cuda.spiking_eval").values()]
    try:
        for layer, _ in before:
            layer.analog_prob = 0.0
        yield
    finally:
        for layer, analog_prob in before:
            layer.analog_prob = analog_prob
