"""Runs the PTX of the CUDA kernels on the CPU: the output of a compiler for GPUs, not the source.

As for the backend `cupy`, the operators of csrc/ops choose a kernel, its grid and its parameters, and NVRTC compiles it
with the same options; to_cpp.py translates its PTX, and run.cpp runs it on the emulation's fibres. Two backends: `ptx`
with four neurons a thread wherever the layout allows, `ptx_one` with one wherever the size of the device decides.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asgl_cuda import backends
from asgl_cuda.backends import cupy, extension, launcher, ops
from asgl_cuda.backends.extension.build_notes import digest_of_sources
from asgl_cuda.reference.records import Rules
from asgl_cuda.reference.surrogates import SURROGATES
from asgl_cuda.selfcheck import EXACT_SURROGATES

from ..emulation.emulated import EMULATION, LARGE, ROOT, THREADS_EACH, TINY, Emulation
from ..host_compiler import compiler
from ..kernels.cuda_code import SCALARS
from .to_cpp import HERE, kernels, to_cpp

BACKENDS = {"ptx": TINY, "ptx_one": LARGE}  # with multiprocessors
DIRECTORY = ROOT / "build" / "ptx"
ARCHITECTURE = "compute_80"

# PTX wraps integers, and does not contract.
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
FLAGS += ["-Wno-unknown-pragmas", f"-I{HERE}", f"-I{EMULATION}"]
SOURCES = [HERE / "machine.h", HERE / "arithmetic.h", HERE / "run.cpp", *sorted(EMULATION.glob("*.h"))]


def missing() -> str | None:
    """Why PTX can't be compiled or run here, or None."""
    if compiler() is None:
        return "no C++ compiler"
    if extension.problem is not None:
        return extension.problem
    problem = cupy.nvrtc_problem()
    return None if problem is None else f"no NVRTC ({problem})"


def compiled(cpp: Callable[[], str] | Path, *parts: str) -> Path:
    """The shared library of C++ code, cached by a digest of `parts`, which identify the code, and of all sources."""
    digest = hashlib.sha256("\0".join((*parts, *map(str, compiler() or ()), *FLAGS)).encode())
    for source in (*SOURCES, Path(__file__).with_name("to_cpp.py")):
        digest.update(source.read_bytes())
    path = DIRECTORY / f"{digest.hexdigest()[:32]}.so"
    if not path.exists():
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DIRECTORY) as directory:  # against races with other processes
            source, library = Path(directory, "kernel.cpp"), Path(directory, "kernel.so")
            source.write_text(cpp.read_text() if isinstance(cpp, Path) else cpp())
            command = [*(compiler() or ()), *FLAGS, str(source), "-o", str(library)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                lines = source.read_text().splitlines()  # for errors in headers, the calling lines
                shown = {lines[int(line) - 1].strip(): None for line in re.findall(r"kernel\.cpp:(\d+)", result.stderr)}
                problem = "\n".join((*shown, result.stderr[:4000]))
                raise RuntimeError(f"{parts[0]}: translated PTX does not compile: {problem}")
            library.replace(path)
    return path


def by_nvrtc(kernel: str, architecture: str, *options: str) -> str:
    """The PTX of one kernel, compiled as in the backend `cupy`."""
    (binary,), _ = cupy.compile_kernels([kernel], architecture, *options)
    return binary.image.rstrip(b"\0").decode()


class Range(ctypes.Structure):
    """The address range of a buffer."""

    _fields_ = (("begin", ctypes.c_uint64), ("end", ctypes.c_uint64))


class Access(NamedTuple):
    """An access of a thread to global memory; `where` is the instruction, with its line."""

    where: str
    block: int
    thread: int
    stores: bool
    bytes: int
    address: int


_RECEIVER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_bool, ctypes.c_uint, ctypes.c_uint64
)


class Machine:
    """The library of run.cpp, which runs translated kernels, and its settings."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(compiled(HERE / "run.cpp", "run")))
        self._library.asgl_ptx_run.restype = ctypes.c_char_p
        self.traced = False
        self.rcp_units = self.ex2_units = 0  # error of approximations, in ulp

    def run(
        self,
        kernel: TranslatedKernel,
        blocks: int,
        threads: int,
        params: int,
        size: int,
        buffers: set[tuple[int, int]],
    ) -> str | None:
        """Runs a kernel. Returns the problem, if any."""
        if size != kernel.param_bytes:
            return f"its parameters take {kernel.param_bytes} bytes, got {size}"
        if threads > kernel.most_threads:
            return f"a block has at most {kernel.most_threads} threads, got {threads}"
        ranges = (Range * len(buffers))(*buffers)
        problem = self._library.asgl_ptx_run(
            kernel.entry, kernel.shared_bytes, blocks, threads, ctypes.c_void_p(params), ctypes.c_size_t(size), ranges,
            ctypes.c_size_t(len(ranges)), self.rcp_units, self.ex2_units, self.traced,
        )  # fmt: skip
        return None if problem is None else problem.decode()

    def take_accesses(self) -> list[Access]:
        """Returns and forgets the traced accesses, in the order of each thread."""
        accesses: list[Access] = []

        def receive(where, *values):
            accesses.append(Access(where.decode(), *values))

        self._library.asgl_ptx_take_accesses(_RECEIVER(receive))
        return accesses


class TranslatedKernel:
    """The loaded library of a translated kernel."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.entry = ctypes.cast(library.asgl_ptx_kernel, ctypes.c_void_p)
        self.param_bytes, self.shared_bytes, self.most_threads = (ctypes.c_uint * 3).in_dll(library, "asgl_ptx_facts")


class _Storages(TorchDispatchMode):
    """The storages of the given tensors and of operators' results."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.ranges: set[tuple[int, int]] = set()
        self._add(tensors)

    def _add(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                self.ranges.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self._add(result)
        return result


# Executed by default: neuron kernels of every type, reset and input, for rectangle and triangle, which are
# bit-exact; kernels for any surrogate, with these two; kernels without a neuron.
CHOSEN = (
    (torch.float32, "rectangle", "hard"),
    (torch.float32, "triangle", "soft"),
    (torch.bfloat16, "rectangle", "soft"),
    (torch.float16, "triangle", "hard"),
    (torch.float64, "rectangle", "soft"),
)


def _kinds(dtype: torch.dtype, surrogate: str, reset: str) -> str:
    hard = "true" if reset == "hard" else "false"
    return f"<{SCALARS[dtype]}, asgl::LIF<(asgl::Surrogate){SURROGATES[surrogate].id}, {hard}>"


_CHOSEN_KINDS = tuple(_kinds(*each) for each in CHOSEN)
_EXACT_IDS = {SURROGATES[each].id for each in EXACT_SURROGATES}


def is_chosen(kernel: str, surrogate: int | None) -> bool:
    """Whether launches of this kernel are executed by default, in a call with this surrogate, if any."""
    if "asgl::LIF<" in kernel:
        return any(kinds in kernel for kinds in _CHOSEN_KINDS)
    return surrogate in {None, *_EXACT_IDS}


_namespaces = itertools.count()


class Launcher:
    """Runs launches of the operators of csrc/ops. `compile_kernel` returns the PTX of a kernel by name.

    With an `emulation`, kernels that are not chosen run on it.
    """

    def __init__(
        self,
        machine: Machine,
        multiprocessors: int = TINY,
        architecture: str = ARCHITECTURE,
        options: tuple[str, ...] = (),
        compile_kernel: Callable[..., str] = by_nvrtc,
        emulation: Emulation | None = None,
    ) -> None:
        self.machine, self.multiprocessors = machine, multiprocessors
        self._how = architecture, *options
        self._compile_kernel, self._emulation = compile_kernel, emulation
        self._kernels: dict[str, TranslatedKernel] = {}
        self._local = threading.local()

    def resident_threads(self, device: torch.device) -> int:
        return self.multiprocessors * THREADS_EACH

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        if self._emulation is not None and not is_chosen(kernel, self._local.surrogate):
            self._emulation.launch(device, kernel, blocks, threads, params, size)
            return
        if kernel not in self._kernels:
            self._kernels[kernel] = TranslatedKernel(self.library(kernel))
        ranges = self._local.storages.ranges
        problem = self.machine.run(self._kernels[kernel], blocks, threads, params, size, ranges)
        if problem is not None:
            raise RuntimeError(f"PTX: {kernel}: {problem}")

    def library(self, kernel: str) -> Path:
        """The path of the translated kernel, compiled at first use."""
        directory = cupy.source_directory()
        assert directory is not None

        def cpp() -> str:
            (translated,) = kernels(self._compile_kernel(kernel, *self._how)).values()
            return to_cpp(translated)

        parts = digest_of_sources(directory).hex(), self._compile_kernel.__name__, cupy.nvrtc_version(), *cupy.OPTIONS
        return compiled(cpp, kernel, *self._how, *parts)

    def operators(self) -> dict[str, Callable[..., Any]]:
        """The operators; their kernels may access only the storages of a call's tensors."""
        namespace = f"asgl_cuda_ptx_launcher_{next(_namespaces)}"
        launcher.define_with_kernels(namespace, "CPU", self)
        kernels = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

        def watched(operator: Any) -> Callable[..., Any]:
            names = [argument.name for argument in operator._schema.arguments]

            def call(*arguments: Any) -> Any:
                rules = dict(zip(names, arguments, strict=True)).get("rules")
                self._local.surrogate = None if rules is None else Rules(*rules).surrogate
                self._local.storages = _Storages(arguments)
                # Not a call of the operator, which would hide its allocations from the mode.
                with self._local.storages:
                    return operator.redispatch(kernels, *arguments)

            return call

        operators = backends.registered_operators(namespace)
        return {name: watched(each) for name, each in operators._asdict().items()}


def register(name: str, launcher: Launcher) -> None:
    """Adds a backend of this name."""
    namespace = f"asgl_cuda_{name}"
    library = ops.define_operators(namespace)
    for operator, call in launcher.operators().items():
        library.impl(operator, call, "CPU")
    backends.BACKENDS[name] = backends.Backend(("cpu",), backends.registered_operators(namespace), lambda: None)
