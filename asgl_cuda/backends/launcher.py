"""The operators on CUDA kernels that Python starts.

csrc/ops checks arguments, allocates results, chooses kernel and grid and packs the parameters, as for the kernels that
nvcc compiled; a launcher starts a kernel by its name.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from . import extension
from .ops import define_operators


class Launcher(Protocol):
    """Starts kernels. Any thread may call it."""

    def resident_threads(self, device: torch.device) -> int:
        """The largest number of threads that the device can hold at a time."""

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        """Starts a kernel, named by a C++ expression, on the current stream of the device, which is the current one.

        `params`: the address of the kernel's parameters, of `size` bytes, valid until `launch` returns.
        """


def define_with_kernels(namespace: str, device: str, launcher: Launcher) -> Any:
    """Defines the operators in this namespace for tensors on `device`, "CPU" or "CUDA".

    Returns an object with the operators as functions (csrc/ops/direct_calls.h). Without a fitting extension, the
    operators have no kernels, and None is returned.
    """
    define_operators(namespace)
    return register_kernels(namespace, device, launcher)


def register_kernels(namespace: str, device: str, launcher: Launcher) -> Any:
    """Registers a launcher's kernels for operators that are already defined. Returns what define_with_kernels does."""
    with_kernels = getattr(extension.module, "implement", None)
    return None if with_kernels is None else with_kernels(namespace, device, launcher.launch, launcher.resident_threads)


def kernel_names() -> list[str]:
    """The C++ expressions of all kernels that the operators may start."""
    assert extension.module is not None
    names: list[str] = extension.module.kernel_names()
    return names
