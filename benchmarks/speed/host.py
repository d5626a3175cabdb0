"""Host time of a call on a tiny input: the cost of small layers, and of launches that a GPU waits for.

`launched in Python`: a launcher in Python, as that of the backend cupy, without calling the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from ctypes import addressof, c_void_p
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch

import asgl_cuda
from asgl_cuda.backends import BACKENDS, Backend, direct_operators, launcher, registered_operators

from ..common import fused_backends
from .clocks import in_turns

RECORDED = "recorded"
IN_PYTHON = "launched in Python"
ANALOG_PROB = 0.2
CALLS = 2000


class _Recorder:
    """A launcher that prepares the driver's arguments, and does not call it."""

    def resident_threads(self, device: torch.device) -> int:
        return 1 << 18

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        addressof((c_void_p * 1)(params))


@cache
def _recorded() -> Backend:
    """A backend for tensors on the CPU that computes nothing."""
    namespace = f"asgl_cuda_{RECORDED}"
    functions = launcher.define_with_kernels(namespace, "CPU", _Recorder())
    return Backend(("cpu",), registered_operators(namespace), lambda: None, direct_operators(functions))


@torch.no_grad()
def call_overhead(device: torch.device, repeats: int, multiply: str) -> dict[str, float]:
    """Microseconds of a call on a tiny tensor without gradients; of launchers in Python alone on the host."""
    x_seq = torch.randn(4, 64, device=device)
    calls: dict[str, Callable[[], Any]] = {multiply: lambda: x_seq * 2}
    for backend in fused_backends(device):
        calls[f"asgl_cuda {backend}"] = partial(asgl_cuda.lif, x_seq, backend=backend)
        noisy = partial(asgl_cuda.lif, x_seq, analog_prob=ANALOG_PROB, backend=backend)
        calls[f"asgl_cuda {backend} with noise"] = noisy
    calls[IN_PYTHON] = partial(asgl_cuda.lif, x_seq.cpu(), backend=RECORDED)

    def seconds(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - started) / CALLS

    with patch.dict(BACKENDS, {RECORDED: _recorded()}):
        times = in_turns({name: partial(seconds, call) for name, call in calls.items()}, repeats)
    return {name: 1e6 * each.median for name, each in times.items()}
