"""The CUDA kernels, run on the CPU by the emulation beside this file, as two backends.

`emulated`: operators and launchers in C++ (csrc/ops), as in the backend `cuda`. `replayed`: operators and launchers in
Python, as in the backend `cupy`; the launches that the driver would get are run.
"""

import ctypes
import fcntl
from pathlib import Path
from typing import NamedTuple

import torch
import torch.utils.cpp_extension

from asgl_cuda import backends, ops
from asgl_cuda.backends import normalisation_kernels

from ..kernels.host_compiler import compiler as compiler

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent
NAMESPACE = "asgl_cuda_emulated"
REPLAYED_NAMESPACE = "asgl_cuda_replayed"
# The extension is compiled so, except for the speed of compilation and the warning of #pragma unroll.
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wno-unknown-pragmas"]

# On a device that any grid fills, the launchers take four neurons a thread wherever the layout allows it. On a large
# one the general kernels have one, and the others in long sequences.
TINY, LARGE = 0, 132  # multiprocessors
THREADS_EACH = 2048  # that a multiprocessor holds, as in cuda/emulation/cuda_emulation.h


class Launch(NamedTuple):
    """The arguments that the driver was given."""

    kernel: str
    blocks: int
    threads: int
    params: bytes


RECEIVER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t
)


class Emulation:
    """The loaded library is the device, answers the tests' questions, and is a launcher to the operators in Python."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.asgl_emulated_launch.restype = ctypes.c_char_p
        self.set_multiprocessors(TINY)

    def set_multiprocessors(self, count: int) -> None:
        self._multiprocessors = count
        self._library.asgl_emulated_set_multiprocessors(count)

    def take_launches(self) -> list[Launch]:
        """Every launch since the last call."""
        launches: list[Launch] = []

        def receive(kernel, blocks, threads, params, size):
            launches.append(Launch(kernel.decode(), blocks, threads, params[:size]))

        self._library.asgl_emulated_take_launches(RECEIVER(receive))
        return launches

    def resident_threads(self, device: torch.device) -> int:
        return self._multiprocessors * THREADS_EACH

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: ctypes.Structure) -> None:
        problem = self._library.asgl_emulated_launch(
            kernel.encode(), blocks, threads, ctypes.byref(params), ctypes.c_size_t(ctypes.sizeof(params))
        )
        if problem is not None:
            raise RuntimeError(f"emulated CUDA: {kernel}: {problem.decode()}")


def register() -> Emulation:
    """Compiles the emulation where its sources have changed, and makes both backends like the others."""
    directory = ROOT / "build" / f"emulated-torch-{torch.__version__}"
    directory.mkdir(parents=True, exist_ok=True)
    ops.define_operators(NAMESPACE)
    with (directory / "building").open("w") as building:
        # The lock of torch outlives a build that was killed, and all who came later would wait; this one does not.
        fcntl.flock(building, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        path = torch.utils.cpp_extension.load(
            NAMESPACE,
            [str(EMULATION / "emulated_kernels.cpp"), str(EMULATION / "emulated_ops.cpp")],
            extra_cflags=[*FLAGS, "-DASGL_WITH_CUDA"],
            extra_ldflags=["-pthread"],
            extra_include_paths=[str(EMULATION / "include"), str(ROOT / "csrc")],
            build_directory=str(directory),
            is_python_module=False,
        )
    emulation = Emulation(path or str(directory / f"{NAMESPACE}.so"))
    normalisation_kernels.implement(REPLAYED_NAMESPACE, "CPU", normalisation_kernels.operators_on(emulation))
    for name, namespace in (("emulated", NAMESPACE), ("replayed", REPLAYED_NAMESPACE)):
        backends.BACKENDS[name] = backends.Backend(("cpu",), backends.operators_in(namespace), lambda: None)
    return emulation
