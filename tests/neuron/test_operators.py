"""Bare operators refuse a tensor of another device, type or shape before they read it."""

import pytest
import torch
from comparison import rng_state

from asgl_cuda.backends import BACKENDS
from asgl_cuda.layout import checkpoint_elements
from asgl_cuda.reference import Numbers, Parameters, Rules

STEPS, BATCH, CHANNELS, SIZE = 18, 2, 3, 5


def calls(device):
    """Arguments of each operator with every tensor that it takes."""

    def tensor(*sizes, dtype=torch.float32):
        return torch.rand(sizes, device=device).to(dtype)

    def sequence():
        return tensor(STEPS, BATCH, CHANNELS, SIZE)

    def state():
        return tensor(BATCH, CHANNELS, SIZE)

    def by_channel(*sizes):
        return tensor(*sizes, CHANNELS, 1)

    x_seq = sequence()
    numbers = Numbers(*[0.0] * 7, residual_gain=1.0, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    rules = Rules(0, 1, *[0] * 8, analog_below=20000, levels=0, adaptation=0, time_dim=0)
    without_noise = rules.changed(analog_below=0)
    packed = [*(by_channel() + 0.1 for _ in range(7)), sequence()], numbers, rules
    inputs = state(), rng_state(device=device)
    checkpoints = tensor(checkpoint_elements(x_seq, 0))
    decay_and_gain = [None, by_channel(), None, None, by_channel(), None, None, None], numbers, without_noise
    gradient = sequence(), state(), sequence(), x_seq, state(), *decay_and_gain, False
    running = tensor(CHANNELS), tensor(CHANNELS)
    total = tensor(CHANNELS, 3, dtype=torch.float64)
    sums = [by_channel() for _ in range(4)]
    yield "lif_forward", (x_seq, *inputs, *packed, [True] * 4)
    yield "lif_forward", (x_seq, *inputs, *packed[:2], without_noise, [False] * 4)
    for wanted in ([True] * 10, [False] * 10):
        grads = [sequence(), state(), sequence(), sequence()]
        yield "lif_backward", (grads, x_seq, *inputs, checkpoints, *packed, wanted)
        yield "integrator_backward", (*gradient, wanted)
    yield "integrator_forward", (x_seq, state(), *decay_and_gain, False, True)
    statistics = tensor(2, CHANNELS, 3, dtype=torch.float64)
    yield "batch_norm_coefficients", (x_seq, statistics, *running, *running, 1e-5, 1.0, 0)
    yield "batch_norm_coefficients", (x_seq, None, None, None, *running, 1e-5, 1.0, 0)
    yield "batch_norm_update", (*running, torch.zeros((), dtype=torch.int64, device=device), by_channel(4), 0.1)
    for gradients in ((sequence(), sequence()), (tensor(0), None)):
        yield "batch_norm_backward", (*gradients, x_seq, by_channel(4), total, *sums, 1e-5, 1.0, 0)


def others(tensor, broadcasts):
    """The same tensor on another device, of another type, and of another shape."""
    yield tensor.to("meta")
    yield tensor.to(
        {torch.float32: torch.float64, torch.float64: torch.float32, torch.int64: torch.int32}[tensor.dtype]
    )
    if tensor.dim() and tensor.numel():
        yield torch.cat([tensor, tensor], min(2, tensor.dim() - 1))
        yield tensor[(None,) * 4] if broadcasts else tensor.flatten()[0]


def changed_calls(arguments):
    """The arguments with one tensor changed, in every place and way."""
    for place, value in enumerate(arguments):
        in_list = isinstance(value, list)
        for index, tensor in enumerate(value if in_list else [value]):
            broadcasts = in_list and len(value) == len(Parameters._fields)
            for other in others(tensor, broadcasts) if isinstance(tensor, torch.Tensor) else ():
                new = [*value[:index], other, *value[index + 1 :]] if in_list else other
                what = f"{place}, {index}: {list(other.shape)}, {other.dtype}, {other.device}"
                yield what, (*arguments[:place], new, *arguments[place + 1 :])


@pytest.mark.parametrize("way", ["operators", "direct"])
def test_each_tensor_is_checked(backend, device, way):
    operators = getattr(BACKENDS[backend], way)
    if operators is None:
        pytest.skip("no direct calls")
    for name, arguments in calls(device):
        operator = getattr(operators, name)
        operator(*arguments)
        for what, changed in changed_calls(arguments):
            with pytest.raises((ValueError, TypeError), match="asgl_cuda"):
                refused(operator, name, what, changed)


def refused(operator, name, what, arguments):
    operator(*arguments)
    pytest.fail(f"{name} takes {what}")
