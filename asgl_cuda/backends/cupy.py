"""The CuPy backend: the CUDA kernels of csrc on a GPU without nvcc on the machine.

The operators are the compiled extension's (launcher.py); one that was built without CUDA serves as well. NVRTC, a CUDA
library, compiles each kernel at first use from the headers installed with this package, and CuPy launches the kernel.
Binaries are stored in CuPy's cache on disk (CUPY_CACHE_DIR, else ~/.cupy/kernel_cache). CuPy's own compilation,
RawModule, is not used: it always flushes subnormal numbers to zero.

During CUDA graph capture a kernel can be launched but not loaded: it must have run once before, as torch requires
anyway.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import extension, launcher
from .extension import missing_sources_message, source_directory
from .extension.build_notes import digest_of_sources

NAMESPACE = "asgl_cuda_cupy"
# The program that NVRTC compiles. Each of these headers includes neuron_kernels.cuh.
SOURCE = "".join(f'#include "cuda/{name}_kernels.cuh"\n' for name in ("adaptive", "integrator", "normalisation"))
# As NVCC_FLAGS in compilation.py, without -O3. Without contraction to FMA, additions and multiplications round as on
# the CPU.
OPTIONS = ("--std=c++17", "--fmad=false")
# A small kernel as a test: the backend counts as working if this kernel can be compiled and loaded.
PROBE = "asgl::gradient_sum_kernel<float>"

logger = logging.getLogger("asgl_cuda")


def install_command() -> str:
    """The command that installs CuPy and NVRTC for the CUDA of the installed torch."""
    # The packages of the extras cupy and cupy12 in pyproject.toml. The command does not use the extras, because
    # asgl_cuda is on no package index.
    if (torch.version.cuda or "").startswith("12."):
        return 'pip install "cupy-cuda12x>=13.6" "nvidia-cuda-nvrtc-cu12==12.*"'
    return 'pip install "cupy-cuda13x>=13.6" "nvidia-cuda-nvrtc==13.*"'


class Binary(NamedTuple):
    """A compiled kernel: its mangled name, and a cubin or PTX."""

    symbol: str
    image: bytes


def _nvrtc() -> Any:
    """CuPy's module of NVRTC, imported only where it is needed."""
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc


def target_architecture(capability: tuple[int, int]) -> str:
    """The architecture to compile for: the device's own or, if NVRTC is older, PTX of the latest one that it knows."""
    wanted = 10 * capability[0] + capability[1]
    known = [architecture for architecture in _nvrtc().getSupportedArchs() if architecture <= wanted]
    if not known:
        raise RuntimeError(
            f"asgl_cuda: the backend 'cupy' can't compile for this GPU, of compute capability {wanted / 10:.1f}, which "
            f"is older than those that NVRTC {nvrtc_version()} supports; install torch, CuPy and NVRTC, all for "
            "one older major version of CUDA, or pass another backend"
        )
    return f"sm_{wanted}" if wanted in known else f"compute_{max(known)}"


@contextmanager
def compiled_program(kernels: list[str], architecture: str, *options: str) -> Iterator[Any]:
    """Compiles these kernels, and yields NVRTC's handle of the program, destroyed afterwards. Needs no GPU."""
    nvrtc = _nvrtc()
    directory = source_directory()
    program = nvrtc.createProgram(SOURCE, "asgl_cuda.cu", (), ())
    try:
        for kernel in kernels:
            nvrtc.addNameExpression(program, kernel)
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture={architecture}", f"-I{directory}", *options))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(
                f"asgl_cuda: NVRTC {nvrtc_version()} does not compile {', '.join(kernels)} for {architecture} "
                f"({error}), from the headers in {directory}. To try another NVRTC: {install_command()}\n"
                f"{nvrtc.getProgramLog(program)}"
            ) from error
        yield program
    finally:
        nvrtc.destroyProgram(program)


def compile_kernels(kernels: list[str], architecture: str, *options: str) -> tuple[list[Binary], str]:
    """Compiles the kernels into one image. Returns a Binary for each, and NVRTC's log."""
    nvrtc = _nvrtc()
    with compiled_program(kernels, architecture, *options) as program:
        image = (
            nvrtc.getPTX(program)
            if architecture.startswith("compute_")
            else _restore_last_byte(nvrtc.getCUBIN(program))
        )
        binaries = [Binary(nvrtc.getLoweredName(program, kernel), image) for kernel in kernels]
        return binaries, nvrtc.getProgramLog(program)


def _restore_last_byte(cubin: bytes) -> bytes:
    """The cubin with its last byte, which CuPy drops at least up to 14.2, as if it were a string's NUL.

    It is a 0: the upper byte of a size or an alignment in the last header. If CuPy drops nothing, one 0 more changes
    nothing.
    """
    return cubin + b"\0"


def nvrtc_version() -> str:
    """The version of NVRTC, such as 12.4."""
    return ".".join(map(str, _nvrtc().getVersion()))


def nvrtc_problem() -> str | None:
    """Why NVRTC or CuPy, which calls it, is missing. None if both are present."""
    try:
        nvrtc_version()
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def cache_directory() -> Path:
    """The directory in which CuPy stores compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def load_or_compile(kernel: str, architecture: str) -> Binary:
    """Loads a kernel from the disk cache, or compiles and stores it."""
    directory = source_directory()
    assert directory is not None  # checked by problem()
    parts = (kernel, architecture, nvrtc_version(), *OPTIONS)
    key = hashlib.sha256(digest_of_sources(directory) + "\0".join(parts).encode()).hexdigest()
    path = cache_directory() / f"asgl_cuda_{key}.cubin"
    binary = _read_binary(path)
    if binary is None:
        started = time.perf_counter()
        (binary,), _ = compile_kernels([kernel], architecture)
        logger.info("compiled %s for %s in %.2f s", kernel, architecture, time.perf_counter() - started)
        _write_binary(path, binary)
    return binary


def _read_binary(path: Path) -> Binary | None:
    """The binary in this file; None if the file is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, symbol_and_image = content[:32], content[32:]
    if hashlib.sha256(symbol_and_image).digest() != checksum:
        return None
    symbol, _, image = symbol_and_image.partition(b"\0")
    return Binary(symbol.decode(), image)


def _write_binary(path: Path, binary: Binary) -> None:
    """Writes the binary to this file, atomically, because other processes use the same directory."""
    content = binary.symbol.encode() + b"\0" + binary.image
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(content).digest() + content)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("a compiled kernel could not be stored, so the next process will compile it again: %s", error)


def _driver() -> Any:
    """CuPy's module of CUDA's driver, imported only where it is needed."""
    from cupy_backends.cuda.api import driver

    return driver


class CupyLauncher:
    """Launches kernels through CuPy's binding of the CUDA driver, in torch's context."""

    def __init__(self) -> None:
        self._functions: dict[tuple[int, str], int] = {}
        self._resident_threads: dict[int, int] = {}

    def resident_threads(self, device: torch.device) -> int:
        """The number of threads that the GPU can hold at once."""
        if device.index not in self._resident_threads:
            found = torch.cuda.get_device_properties(device)
            each = found.max_threads_per_multi_processor
            self._resident_threads[device.index] = found.multi_processor_count * each
        return self._resident_threads[device.index]

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        """Starts a kernel by its name, on torch's current stream, see `Launcher`. The driver needs no `size`."""
        try:
            driver = _driver()
        except ImportError as error:
            raise RuntimeError(f"asgl_cuda: the backend 'cupy' is not available: {_problem_of_cupy()}") from error
        arguments = (c_void_p * 1)(params)
        function = self._functions.get((device.index, kernel)) or self.load(device, kernel)
        stream = torch.cuda.current_stream(device).cuda_stream
        _make_context_current(driver, device.index)
        driver.launchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, addressof(arguments), 0)

    def load(self, device: torch.device, kernel: str) -> int:
        """Loads a kernel, compiled if needed, on `device`, torch's current device, and returns its handle."""
        driver = _driver()
        binary = load_or_compile(kernel, target_architecture(torch.cuda.get_device_capability(device)))
        _make_context_current(driver, device.index)
        module = driver.moduleLoadData(binary.image)  # the module stays loaded
        function: int = driver.moduleGetFunction(module, binary.symbol)
        self._functions[device.index, kernel] = function
        return function


def _make_context_current(driver: Any, device_index: int) -> None:
    """Makes torch's context current in this thread: unlike CUDA's runtime, the driver does not create one."""
    if not driver.ctxGetCurrent():
        import cupy

        cupy.cuda.runtime.setDevice(device_index)


LAUNCHER = CupyLauncher()
# The operators of this backend as functions. None without an extension that fits this version.
FUNCTIONS = launcher.define_with_kernels(NAMESPACE, "CUDA", LAUNCHER)
if extension.build_info is not None and extension.build_info.cuda is None:
    # Exported programs and C++ call the operators in the namespace asgl_cuda. If nvcc compiled no kernels, CuPy's
    # kernels are registered for these operators as well.
    launcher.register_kernels("asgl_cuda", "CUDA", LAUNCHER)


def describe_paths() -> str:
    """The paths of the headers, NVRTC and the cache, as far as they are present, for `python -m asgl_cuda info`."""
    if importlib.util.find_spec("cupy_backends") is None:
        nvrtc = "CuPy missing"
    elif nvrtc_problem() is not None:
        nvrtc = "NVRTC missing"
    else:
        maps = Path("/proc/self/maps")  # lists the libraries of this process, on some systems
        lines = maps.read_text().splitlines() if maps.exists() else []
        paths = sorted({line.split()[-1] for line in lines if "libnvrtc.so" in line})
        nvrtc = f"NVRTC {nvrtc_version()}" + "".join(f" in {path}" for path in paths)
    return f"headers {source_directory() or 'missing'}, {nvrtc}, cache {cache_directory()}"


def problem() -> str | None:
    """Why the backend 'cupy' does not work here, with a remedy, or None. Computed once; initialises CUDA."""
    return _problem()


# With this attribute, torch.compile calls the function instead of tracing it. torch.compiler.assume_constant_result
# sets the same attribute, but imports the whole compiler.
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _problem() -> str | None:
    """As `problem`, but torch.compile would trace it."""
    return _problem_of_cupy() or extension.problem or _problem_of_device() or _problem_of_compilation()


def _problem_of_cupy() -> str | None:
    """Why CuPy can't be imported or does not match torch's CUDA, or None."""
    install = install_command()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA. Install one for CUDA, then run: {install}"
    try:
        import cupy

        driver = _driver()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return f"CuPy is not installed. To install it: {install}"
        reason = next((line for line in str(error).splitlines() if line.strip("= ")), repr(error))
        return f"CuPy is installed but does not import ({reason.strip()}). To mend it: {install}"
    if cupy.cuda.runtime.is_hip:
        return f"CuPy {cupy.__version__} is a build for ROCm. Uninstall it, then run: {install}"
    theirs, ours = driver.get_build_version() // 1000, int(torch.version.cuda.split(".")[0])
    if theirs != ours:
        return (
            f"CuPy {cupy.__version__} is for CUDA {theirs}, and torch {torch.__version__} for CUDA {ours}. "
            f"Uninstall it (pip uninstall cupy-cuda{theirs}x), then run: {install}"
        )
    return None


def _problem_of_device() -> str | None:
    """Why there is no GPU for CuPy, or None."""
    import cupy

    if not torch.cuda.is_available():
        return "torch finds no CUDA device: torch.cuda.is_available() is False"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        return f"CuPy finds no CUDA device, though torch does: {error}"
    return None if count else "CuPy finds no CUDA device, though torch does"


def _problem_of_compilation() -> str | None:
    """Why the smallest kernel can't be compiled and loaded, or None."""
    if source_directory() is None:
        return missing_sources_message()
    missing = nvrtc_problem()
    if missing is not None:
        return f"NVRTC, which compiles the kernels, is missing ({missing}). To install it: {install_command()}"
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        LAUNCHER.load(device, PROBE)
    except RuntimeError as error:
        return f"a first kernel could not be compiled and loaded: {error}"
    return None
