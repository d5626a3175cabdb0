"""The launches of a call, as the operators of csrc/ops plan them.

Nothing is computed. The tensors are on the CPU, where memory that is never written is never allocated.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import launched

NAMESPACE = "asgl_cuda_predicted"


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: str  # a C++ expression
    blocks: int
    threads: int
    parameters: bytes


class Recorder:
    """A launcher that starts nothing."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.threads = 0  # resident on the device

    def resident_threads(self, device: torch.device) -> int:
        return self.threads

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        self.launches.append(Launch(kernel, blocks, threads, ctypes.string_at(params, size)))


@functools.cache
def _recorder() -> Recorder:
    recorder = Recorder()
    launched.implement(NAMESPACE, "CPU", recorder)
    return recorder


def recorded(call: Callable[[], Any], resident_threads: int) -> list[Launch]:
    """The launches of a call with the backend `NAMESPACE`, on a device of this size."""
    recorder = _recorder()
    recorder.launches, recorder.threads = [], resident_threads
    backends.BACKENDS[NAMESPACE] = backends.Backend(("cpu",), backends.operators_in(NAMESPACE), lambda: None)
    try:
        call()
    finally:
        del backends.BACKENDS[NAMESPACE]
    return recorder.launches


# ---- calls ----


class Call(NamedTuple):
    """A call forward and backward; the device's size follows from `neurons_each`."""

    name: str
    make: Callable[[int, torch.dtype], Callable[[], Any]]  # by steps and type
    neurons_each: int = 4


ELEMENTS, CHANNELS, INNER = 2**24, 64, 1024


def learned(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.5, requires_grad=True)


def _sequence(steps: int, dtype: torch.dtype, batch_first: bool = False, channels_last: bool = False) -> torch.Tensor:
    # At least two samples up to 128 steps: with one, batch first would be time first.
    samples = ELEMENTS // (steps * CHANNELS * INNER)
    sizes = (samples, steps) if batch_first else (steps, samples)
    if channels_last:
        return torch.empty(*sizes, INNER, CHANNELS, dtype=dtype).movedim(-1, 2).requires_grad_()
    return torch.empty(*sizes, CHANNELS, INNER, dtype=dtype, requires_grad=True)


def trained(x_seq: torch.Tensor, function: Callable[..., Any] = asgl_cuda.lif, **options: Any) -> Callable[[], None]:
    """A call, and backward from its spikes alone; by default with a learned width and noise."""
    options = {"width": learned(), "analog_prob": 0.1, **options}

    def call() -> None:
        found = function(x_seq, backend=NAMESPACE, **options)
        s_seq = found if isinstance(found, torch.Tensor) else found[0]
        s_seq.backward(torch.empty_like(s_seq))

    return call


def _lif(
    name: str, neurons_each: int = 4, batch_first: bool = False, with_residual: bool = False, **options: Any
) -> Call:
    """A call of `lif`; options that are functions make a tensor."""

    def make(steps: int, dtype: torch.dtype) -> Callable[[], None]:
        made = {key: value() if callable(value) else value for key, value in options.items()}
        if with_residual:
            made["residual"] = _sequence(steps, dtype, batch_first)
        return trained(_sequence(steps, dtype, batch_first), time_dim=int(batch_first), **made)

    return Call(name, make, neurons_each)


def _block(
    steps: int, dtype: torch.dtype, with_residual: bool = False, channels_last: bool = False
) -> Callable[[], None]:
    residual = _sequence(steps, dtype, channels_last=channels_last) if with_residual else None
    statistics = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    affine = {"weight": learned(CHANNELS), "bias": learned(CHANNELS)}

    def function(x_seq: torch.Tensor, **options: Any) -> Any:
        return asgl_cuda.batch_norm_lif(x_seq, *statistics, training=True, residual=residual, **affine, **options)

    return trained(_sequence(steps, dtype, channels_last=channels_last), function)


def _by_channel() -> torch.Tensor:
    return learned(CHANNELS, 1)


def _by_neuron() -> torch.Tensor:
    return learned(CHANNELS, INNER)


COMMON = _lif("lif, width learned")
BLOCK = Call("batch_norm_lif", _block)
RESIDUAL_BLOCK = Call("batch_norm_lif, residual", functools.partial(_block, with_residual=True))
WITHOUT_NOISE = _lif("lif, no noise", analog_prob=0.0)
BY_NEURON = _lif("lif, width by neuron", width=_by_neuron)
OTHERS = (
    WITHOUT_NOISE,
    _lif("lif, residual", with_residual=True),
    _lif("lif, batch first", batch_first=True),
    _lif("lif, width by channel", width=_by_channel),
    _lif("lif, decay, width learned", decay=learned),
    _lif("lif, width by channel, decay learned", width=_by_channel, decay=learned),
    _lif("lif, all by channel", decay=_by_channel, v_threshold=_by_channel, width=_by_channel),
    BY_NEURON,
    _lif("lif, all by neuron", decay=_by_neuron, v_threshold=_by_neuron, width=_by_neuron),
    Call("batch_norm_lif, channels_last", functools.partial(_block, channels_last=True)),
    _lif("lif, store_v_seq", return_v_seq=True),
    _lif("lif, store_v_seq, small", 1, return_v_seq=True),
)


def launches(call: Call, steps: int, dtype: str) -> list[Launch]:
    many = 2**40
    return recorded(call.make(steps, getattr(torch, dtype)), 1 if call.neurons_each == 4 else many)
