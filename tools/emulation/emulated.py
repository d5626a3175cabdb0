"""The CUDA kernels on the CPU, as the backend `emulated`: the host's compiler compiles them and their launchers.

The operators are the extension's; the emulation is a launcher, as CuPy is one.
"""

import ctypes
import fcntl
from pathlib import Path
from typing import NamedTuple

import torch
import torch.utils.cpp_extension

from asgl_cuda import backends
from asgl_cuda.backends import extension, launcher

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent
NAMESPACE = "asgl_cuda_emulated"
# As the extension, but -O2 for faster compilation, and no warning about #pragma unroll.
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wno-unknown-pragmas"]

# Multiprocessors. With TINY, the launchers choose four neurons a thread wherever the layout allows. With LARGE and few
# neurons, general kernels have one neuron a thread, and so have all kernels for long sequences.
TINY, LARGE = 0, 132
THREADS_EACH = 2048  # resident on a multiprocessor


class Launch(NamedTuple):
    """The arguments of a launch, as a driver gets them."""

    kernel: str
    blocks: int
    threads: int
    params: bytes


class Emulation:
    """The loaded library of emulated kernels: a launcher that records its launches."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.asgl_emulated_launch.restype = ctypes.c_char_p
        self._launches: list[Launch] = []
        self.set_multiprocessors(TINY)

    def set_multiprocessors(self, count: int) -> None:
        """Sets the size of the emulated device, on which plans depend."""
        self._multiprocessors = count

    def take_launches(self) -> list[Launch]:
        """Returns and forgets the launches since the last call."""
        launches, self._launches = self._launches, []
        return launches

    def resident_threads(self, device: torch.device) -> int:
        return self._multiprocessors * THREADS_EACH

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        self._launches.append(Launch(kernel, blocks, threads, ctypes.string_at(params, size)))
        problem = self.library.asgl_emulated_launch(
            kernel.encode(), ctypes.c_longlong(blocks), threads, ctypes.c_void_p(params)
        )
        if problem is not None:
            raise RuntimeError(f"emulated CUDA: {kernel}: {problem.decode()}")


def register() -> Emulation:
    """Compiles the emulation if its sources have changed, and adds the backend."""
    directory = ROOT / "build" / "emulated"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "building").open("w") as building:
        # Torch's lock would outlive a killed build and block later builds; flock does not.
        fcntl.flock(building, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        path = torch.utils.cpp_extension.load(
            NAMESPACE,
            [str(source) for source in sorted(EMULATION.glob("emulated_*.cpp"))],
            extra_cflags=FLAGS,
            extra_ldflags=["-pthread"],
            extra_include_paths=[str(EMULATION / "include"), str(ROOT / "csrc")],
            build_directory=str(directory),
            is_python_module=False,
        )
    emulation = Emulation(path or str(directory / f"{NAMESPACE}.so"))
    functions = launcher.define_with_kernels(NAMESPACE, "CPU", emulation)
    backends.BACKENDS["emulated"] = backends.Backend(
        ("cpu",),
        backends.registered_operators(NAMESPACE),
        lambda: extension.problem,
        backends.direct_operators(functions),
    )
    return emulation
