"""The CUDA kernels on the CPU, as two backends.

`emulated` has the C++ operators and launchers (csrc/ops) of `cuda`, `replayed` the Python operators and launchers of
`cupy`.
"""

import ctypes
import fcntl
from pathlib import Path
from typing import NamedTuple

import torch
import torch.utils.cpp_extension

from asgl_cuda import backends, ops
from asgl_cuda.backends import normalisation_kernels

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent
NAMESPACE = "asgl_cuda_emulated"
REPLAYED_NAMESPACE = "asgl_cuda_replayed"
# As the extension, but -O2 for faster compilation, and no warning about #pragma unroll.
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wno-unknown-pragmas"]

# Multiprocessors. With TINY, the launchers choose four neurons a thread wherever the layout allows. With LARGE and few
# neurons, general kernels have one neuron a thread, and so have all kernels for long sequences.
TINY, LARGE = 0, 132
THREADS_EACH = 2048  # resident on a multiprocessor, as in cuda_emulation.h


class Launch(NamedTuple):
    """The driver's arguments."""

    kernel: str
    blocks: int
    threads: int
    params: bytes


RECEIVER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t
)


class Emulation:
    """The loaded library: device, record of launches, and launcher of the operators in Python."""

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
    """Compiles the emulation if its sources have changed, and adds both backends."""
    directory = ROOT / "build" / f"emulated-torch-{torch.__version__}"
    directory.mkdir(parents=True, exist_ok=True)
    ops.define_operators(NAMESPACE)
    with (directory / "building").open("w") as building:
        # Torch's lock would outlive a killed build and block later builds; flock does not.
        fcntl.flock(building, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        path = torch.utils.cpp_extension.load(
            NAMESPACE,
            [str(source) for source in sorted(EMULATION.glob("emulated_*.cpp"))],
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
