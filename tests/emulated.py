"""The backend `emulated`: the CUDA kernels and their launchers, run on the CPU by the emulation beside this file."""

import ctypes
import os
import shlex
import shutil
from pathlib import Path

import torch
import torch.utils.cpp_extension

from asgl_cuda import backends, ops

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "emulation"
NAMESPACE = "asgl_cuda_emulated"
# As the extension is compiled, but for speed of compilation and what warns of #pragma unroll.
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wno-unknown-pragmas"]

# On a device that any grid fills, the launchers take four neurons a thread wherever the layout allows it.
TINY, LARGE = 0, 132  # multiprocessors


def compiler() -> list[str] | None:
    """The host's C++ compiler, if there is one."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    return command if shutil.which(command[0]) else None


class Emulation:
    """The loaded library, and what tests ask of the emulated device."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self.set_multiprocessors(TINY)

    def set_multiprocessors(self, count: int) -> None:
        self._library.asgl_emulated_set_multiprocessors(count)

    def take_launches(self) -> list[tuple[int, int]]:
        """Grid and block of every launch since the last call."""
        capacity = 4096
        pairs = (ctypes.c_uint * (2 * capacity))()
        count = self._library.asgl_emulated_take_launches(pairs, capacity)
        return [(pairs[2 * i], pairs[2 * i + 1]) for i in range(count)]


def register() -> Emulation:
    """Compiles what has changed, and makes `emulated` a backend like the others."""
    directory = ROOT / "build" / f"emulated-torch-{torch.__version__}"
    directory.mkdir(parents=True, exist_ok=True)
    path = torch.utils.cpp_extension.load(
        NAMESPACE,
        [str(EMULATION / "emulated_lif.cpp"), str(EMULATION / "emulated_ops.cpp")],
        extra_cflags=FLAGS,
        extra_ldflags=["-pthread"],
        extra_include_paths=[str(EMULATION / "include"), str(ROOT / "csrc")],
        build_directory=str(directory),
        is_python_module=False,
    )
    ops.register_fakes(NAMESPACE)
    backends.BACKENDS["emulated"] = backends.Backend(("cpu",), backends.compiled_operators(NAMESPACE), None)
    return Emulation(path or str(directory / f"{NAMESPACE}.so"))
