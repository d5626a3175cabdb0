"""The CuPy backend without a GPU: compilation by NVRTC, the cache, launches on a fake CuPy, parts that are missing."""

import ctypes
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from test_fake_cuda import targets
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import cupy as jit
from asgl_cuda.backends import neuron_kernels as launch
from asgl_cuda.backends import normalisation_kernels
from asgl_cuda.backends.structures import structure
from asgl_cuda.reference import Rules
from tools.emulation import emulated
from tools.kernels.code_checks import ptx_problems
from tools.kernels.cuda_code import Disassembler

MODEL = launch.model(Rules(**{**dict.fromkeys(Rules._fields, 0), "hard_reset": 1}))
FORWARD = launch.forward_kernel(torch.float32, MODEL, 4, launch.PLAIN)
BACKWARD = launch.backward_kernel(torch.float32, MODEL, 4, launch.PLAIN, 4)
GENERAL_OF_HALVES = launch.backward_kernel(torch.bfloat16, MODEL, 4, launch.GENERAL)
OF_BATCH_NORM = (
    launch.forward_kernel(torch.float32, MODEL, 4, launch.NORMALISED),
    launch.backward_kernel(torch.float32, MODEL, 4, launch.NORMALISED, 4),
    normalisation_kernels.moments_kernel(torch.float32, 4),
    normalisation_kernels.input_gradient_kernel(torch.float32, 4),
)


@pytest.fixture
def nvrtc():
    missing = jit.nvrtc_problem()
    if missing is not None:
        pytest.skip(f"no NVRTC: {missing}")


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(directory))
    return directory


@pytest.fixture
def headers(monkeypatch, tmp_path) -> Path:
    """A copy, to be changed."""
    directory = tmp_path / "headers"
    shutil.copytree(emulated.ROOT / "csrc", directory)
    monkeypatch.setattr(jit, "source_directory", lambda: directory)
    return directory


# ---- compilation and cache ----


@pytest.mark.usefixtures("nvrtc")
def test_kernel_is_compiled_once_and_then_read(cache, caplog):
    caplog.set_level(logging.INFO, logger="asgl_cuda")
    compiled = jit.load_or_compile(FORWARD, "sm_90")
    assert compiled.image.startswith(b"\x7fELF")
    assert compiled.symbol.encode() in compiled.image
    (message,) = caplog.messages
    assert message.startswith(f"compiled {FORWARD} for sm_90 in ")
    assert jit.load_or_compile(FORWARD, "sm_90") == compiled
    assert len(caplog.messages) == len(list(cache.iterdir())) == 1
    assert jit.load_or_compile(FORWARD, "sm_80") != compiled
    assert len(caplog.messages) == len(list(cache.iterdir())) == 2


@pytest.mark.usefixtures("nvrtc")
def test_cubin_is_whole(tmp_path):
    (binary,), _ = jit.compile_kernels([jit.PROBE], "sm_90")
    tables = struct.unpack_from("<QQ", binary.image, 32)  # program headers, section headers
    size, count, section_size, section_count = struct.unpack_from("<4H", binary.image, 54)
    assert len(binary.image) == max(tables[0] + size * count, tables[1] + section_size * section_count)
    assert jit._whole(binary.image) == binary.image  # as for a CuPy that does not drop the last byte
    disassembler = Disassembler.find()
    if disassembler is not None:
        cubin = tmp_path / "probe.cubin"
        cubin.write_bytes(binary.image)
        assert disassembler.instructions(cubin, [binary.symbol])[binary.symbol]


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[:-1], lambda content: b"x" + content[1:]]
)
def test_damaged_file_is_compiled_again(cache, damage):
    compiled = jit.load_or_compile(jit.PROBE, "sm_90")
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert jit._read(file) is None
    again = jit.load_or_compile(jit.PROBE, "sm_90")
    assert again.symbol == compiled.symbol  # the bits of two compilations need not be the same
    assert jit._read(file) == again


@pytest.mark.usefixtures("nvrtc")
def test_changed_header_is_another_kernel(cache, headers, monkeypatch):
    jit.load_or_compile(jit.PROBE, "sm_90")
    changed = headers.with_name("changed")
    shutil.copytree(headers, changed)
    with (changed / "math" / "philox.h").open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(jit, "source_directory", lambda: changed)
    jit.load_or_compile(jit.PROBE, "sm_90")
    assert len(list(cache.iterdir())) == 2


@pytest.mark.usefixtures("nvrtc")
def test_cache_that_cannot_be_written(cache, caplog):
    cache.write_text("a file where the directory should be")
    assert jit.load_or_compile(jit.PROBE, "sm_90").image
    assert "a compiled kernel could not be kept" in caplog.text


@pytest.mark.usefixtures("nvrtc", "cache")
def test_time_to_compile():
    started = time.perf_counter()
    jit.load_or_compile(FORWARD, "sm_90")
    jit.load_or_compile(BACKWARD, "sm_90")
    assert time.perf_counter() - started < 3


@pytest.mark.usefixtures("nvrtc", "cache")
def test_time_of_a_new_process_with_a_filled_cache():
    for kernel in (FORWARD, BACKWARD):
        jit.load_or_compile(kernel, "sm_90")
    code = f"""
import time, cupy
from asgl_cuda.backends import cupy as jit
started = time.perf_counter()
for kernel in {(FORWARD, BACKWARD)!r}:
    jit.load_or_compile(kernel, "sm_90")
print(time.perf_counter() - started)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.2


@pytest.mark.usefixtures("nvrtc")
def test_code_is_without_faults():
    for kernel in (FORWARD, BACKWARD, GENERAL_OF_HALVES, *OF_BATCH_NORM):
        (binary,), _ = jit.compile_kernels([kernel], "compute_80")
        ptx = binary.image.decode()
        assert "mul.rn.f32" in ptx
        assert not list(ptx_problems(ptx))


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    ("options", "fault"), [(("--fmad=true",), "is contracted"), (("--fmad=false", "--ftz=true"), "flushes subnormal")]
)
def test_options_that_change_the_arithmetic_are_seen(monkeypatch, options, fault):
    """CuPy's own compilation always asks for the second."""
    monkeypatch.setattr(jit, "OPTIONS", ("--std=c++17", *options))
    (binary,), _ = jit.compile_kernels([FORWARD], "compute_80")
    assert any(fault in problem for problem in ptx_problems(binary.image.decode()))


@pytest.mark.usefixtures("nvrtc", "cache")
def test_compilation_that_fails(headers):
    (headers / "cuda" / "neuron_kernels.cuh").write_text("this is no C++\n")
    with pytest.raises(RuntimeError) as raised:
        jit.load_or_compile(FORWARD, "sm_90")
    first, log = str(raised.value).split("\n", 1)
    assert first.startswith(f"asgl_cuda: NVRTC {jit.nvrtc_version()} does not compile {FORWARD} for sm_90 ")
    assert str(headers) in first
    assert first.endswith(jit.install_command())
    assert 'error: identifier "this" is undefined' in log or "error:" in log


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((9, 5), "compute_90"), ((13, 0), "compute_121")]
)
def test_target(monkeypatch, capability, expected):
    fake = types.SimpleNamespace(getSupportedArchs=lambda: (75, 80, 90, 100, 121))
    monkeypatch.setattr(jit, "_nvrtc", lambda: fake)
    assert jit.target(capability) == expected
    with pytest.raises(RuntimeError, match=r"this NVRTC does not compile for compute capability 6\.1"):
        jit.target((6, 1))


# ---- launches ----

DEVICES = [torch.device("cuda", index) for index in (0, 1)]
PARAMS = structure("ForwardParams", torch.float32)((1, 2, 3), x_seq=4096)


class Machine:
    """Two GPUs as CuPy's driver and torch show them; it records what it is asked for."""

    def __init__(self) -> None:
        self.current, self.context = 0, True
        self.loads, self.calls = [], []

    def moduleLoadData(self, image):  # noqa: N802
        return self.current, image

    def moduleGetFunction(self, module, symbol):  # noqa: N802
        self.loads.append((*module, symbol))
        return self.current, symbol

    def ctxGetCurrent(self):  # noqa: N802
        return int(self.context)

    def setDevice(self, index):  # noqa: N802
        self.current, self.context = index, True

    def launchKernel(self, function, *numbers):  # noqa: N802
        assert self.context
        assert function[0] == self.current
        *grid, shared_bytes, stream, arguments, extra = numbers
        assert (shared_bytes, extra) == (0, 0)
        pointer = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        self.calls.append((*function, tuple(grid), stream, ctypes.string_at(pointer, ctypes.sizeof(PARAMS))))

    def install(self, monkeypatch) -> None:
        machine = self

        class Device:
            def __init__(self, device):
                self.index = device.index

            def __enter__(self):
                self.before, machine.current = machine.current, self.index

            def __exit__(self, *_):
                machine.current = self.before

        monkeypatch.setattr(jit, "_driver", lambda: self)
        monkeypatch.setattr(jit, "load_or_compile", lambda kernel, target: jit.Binary(f"_{kernel}", target.encode()))
        monkeypatch.setattr(jit, "target", lambda capability: f"sm_{capability[0]}{capability[1]}")
        monkeypatch.setattr(torch.cuda, "device", Device)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (8, 0))[device.index])
        streams = [types.SimpleNamespace(cuda_stream=number) for number in (7, 0)]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    machine.install(monkeypatch)
    return machine


def test_launch(machine):
    launcher = jit.CupyLauncher()
    for device in (*DEVICES, *DEVICES):
        launcher.launch(device, FORWARD, 5, 128, PARAMS)
    symbol = f"_{FORWARD}"
    assert machine.loads == [(0, b"sm_90", symbol), (1, b"sm_80", symbol)]  # once on each device
    first, second = ((index, symbol, (5, 1, 1, 128, 1, 1), stream, bytes(PARAMS)) for index, stream in ((0, 7), (1, 0)))
    assert machine.calls == [first, second, first, second]
    assert machine.current == 0


def test_a_launch_that_fails_leaves_the_device_as_it_was(machine, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")

    monkeypatch.setattr(machine, "launchKernel", fail)
    with pytest.raises(RuntimeError, match="invalid argument"):
        jit.CupyLauncher().launch(DEVICES[1], FORWARD, 5, 128, PARAMS)
    assert machine.current == 0


def test_a_thread_without_a_context_gets_one(machine, monkeypatch):
    runtime = types.SimpleNamespace(setDevice=machine.setDevice)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime)))
    launcher = jit.CupyLauncher()
    for _ in range(2):
        machine.context = False
        launcher.launch(DEVICES[1], FORWARD, 5, 128, PARAMS)
    assert len(machine.calls) == 2


def test_resident_threads(monkeypatch):
    properties = types.SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert jit.CupyLauncher().resident_threads(DEVICES[0]) == 132 * 2048


@pytest.mark.usefixtures("nvrtc", "cache")
def test_cupy_itself_on_a_fake_driver(tmp_path):
    """Compilation, CuPy's binding of the driver and what it hands over are real; only the driver is not."""
    compiler = emulated.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).parent / "fake_libcuda.cpp"
    library = tmp_path / "libcuda.so.1"
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    code = """
import contextlib, ctypes, types
import cupy, torch
from asgl_cuda.backends import cupy as jit
from asgl_cuda.backends.structures import structure
fake = ctypes.CDLL("libcuda.so.1")
cupy.cuda.runtime = types.SimpleNamespace(setDevice=lambda device: fake.fake_set_device(device))
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0xabc)
params = structure("ForwardParams", torch.float32)((1, 2, 258))
launcher = jit.CupyLauncher()
for kernel in (jit.PROBE, jit.PROBE):
    launcher.launch(torch.device("cuda", 3), kernel, 5, 128, params)
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd=emulated.ROOT
    )
    assert result.returncode == 0, result.stderr
    symbol = jit.load_or_compile(jit.PROBE, "sm_90").symbol
    number = "{:02x}00000000000000".format
    params = number(1) + number(2) + "0201000000000000"
    launched = f"launch 0x20 grid 5 1 1 block 128 1 1 shared 0 stream 0xabc extra 0 params {params}"
    expected = ["device 3", "module \x7fELF\x02", f"function {symbol} of 0x10", launched, launched]
    assert result.stdout.splitlines() == expected


# ---- parts that are missing ----


class Cupy(types.ModuleType):
    """As much of CuPy as shows whether it works."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.__version__ = "14.2.0"
        runtime = types.SimpleNamespace(is_hip=False, getDeviceCount=lambda: 2)
        self.cuda = types.SimpleNamespace(runtime=runtime)


@pytest.fixture
def cupy(machine, monkeypatch) -> Cupy:
    """A machine on which nothing is missing."""
    machine.get_build_version = lambda: 13020
    module = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(jit, "nvrtc_version", lambda: "13.0")
    monkeypatch.setattr(jit, "LAUNCHER", jit.CupyLauncher())
    monkeypatch.setattr(backends, "_warned", set())
    jit._problem.cache_clear()
    yield module
    jit._problem.cache_clear()


def raise_error(error: Exception):
    def function(*_):
        raise error

    return function


class Refuses:
    """An import hook under which CuPy is there but does not import."""

    BANNER = "\n================\nFailed to import CuPy.\nOriginal error: libcurand.so.10 is gone\n================\n"

    def find_spec(self, name, path=None, target=None):
        if name == "cupy":
            raise ImportError(self.BANNER)


def without_cuda(cupy, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


def without_cupy(cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)


def with_broken_cupy(cupy, monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])


def with_cupy_for_another_cuda(cupy, monkeypatch):
    jit._driver().get_build_version = lambda: 12090


def with_torch_for_another_cuda(cupy, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def with_cupy_for_rocm(cupy, monkeypatch):
    cupy.cuda.runtime.is_hip = True


def without_device(cupy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def without_device_of_cupy(cupy, monkeypatch):
    cupy.cuda.runtime.getDeviceCount = raise_error(RuntimeError("cudaErrorInsufficientDriver"))


def without_headers(cupy, monkeypatch):
    monkeypatch.setattr(jit, "source_directory", lambda: None)


def without_nvrtc(cupy, monkeypatch):
    monkeypatch.setattr(jit, "nvrtc_version", raise_error(RuntimeError('Failure finding "libnvrtc.so.13"')))


def with_headers_that_do_not_compile(cupy, monkeypatch):
    error = RuntimeError(f"asgl_cuda: NVRTC 13.0 does not compile {jit.PROBE} for sm_90\nlog: error: no")
    monkeypatch.setattr(jit, "load_or_compile", raise_error(error))


FOR_13 = 'pip install "cupy-cuda13x>=13.6" "nvidia-cuda-nvrtc==13.*"'
FOR_12 = 'pip install "cupy-cuda12x>=13.6" "nvidia-cuda-nvrtc-cu12==12.*"'
PROBLEMS = [
    (without_cuda, "is a build without CUDA", FOR_13),
    (without_cupy, "CuPy is not installed. To install it: ", FOR_13),
    (with_broken_cupy, "CuPy is installed but does not import (Failed to import CuPy.", FOR_13),
    (with_cupy_for_another_cuda, "is for CUDA 12, and torch", FOR_13),
    (with_torch_for_another_cuda, "is for CUDA 13, and torch", FOR_12),
    (with_cupy_for_rocm, "is a build for ROCm", FOR_13),
    (without_device, "torch finds no CUDA device: ", "torch.cuda.is_available() is False"),
    (without_device_of_cupy, "CuPy finds no CUDA device, though torch does: cudaErrorInsufficientDriver", ""),
    (without_headers, "the sources, which were installed with asgl_cuda, are gone", "--no-build-isolation ."),
    (without_nvrtc, "NVRTC, which compiles the kernels, is missing", FOR_13),
    (with_headers_that_do_not_compile, "a first kernel could not be compiled and loaded: ", "log: error: no"),
]


@pytest.mark.usefixtures("cupy")
def test_nothing_is_missing(machine):
    assert jit.problem() is None
    assert machine.loads == [(0, b"sm_90", f"_{jit.PROBE}")]


@pytest.mark.parametrize(("damage", "words", "end"), PROBLEMS, ids=[each[0].__name__ for each in PROBLEMS])
def test_problem(cupy, monkeypatch, damage, words, end):
    damage(cupy, monkeypatch)
    monkeypatch.setitem(backends.BACKENDS, "cuda", backends.BACKENDS["cuda"]._replace(problem=lambda: "not built"))
    problem = jit.problem()
    assert words in problem
    assert problem.endswith(end)
    assert len(problem.splitlines()) <= 2
    assert backends.unavailable_backends()["cupy"] == problem
    device = torch.device("cuda")
    with pytest.raises(RuntimeError) as raised:
        backends.choose_backend("cupy", device, "asgl_cuda.lif")
    assert str(raised.value) == f"asgl_cuda.lif: backend 'cupy' is not available: {problem}"
    with pytest.warns(UserWarning, match="using the slow reference backend on cuda") as warned:
        assert backends.choose_backend(None, device, "asgl_cuda.lif") == "reference"
    assert f"cupy: {problem}" in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend(None, device, "asgl_cuda.lif") == "reference"


def targets_on_a_gpu():
    """The operators that `lif` calls for a CUDA tensor when no backend is asked for."""
    with FakeTensorMode():
        return targets(make_fx(lambda x_seq: asgl_cuda.lif(x_seq))(torch.rand(4, 3, device="cuda")).graph)


def test_it_is_used_where_nothing_was_compiled_for_the_gpu(monkeypatch):
    def give(name, problem):
        monkeypatch.setitem(backends.BACKENDS, name, backends.BACKENDS[name]._replace(problem=lambda: problem))

    give("cuda", "not built")
    give("cupy", None)
    assert torch.ops.asgl_cuda_cupy.lif_forward.default in targets_on_a_gpu()
    give("cuda", None)
    assert torch.ops.asgl_cuda.lif_forward.default in targets_on_a_gpu()


def test_choice_under_torch_compile():
    """The machine is looked at, not traced: nothing of it breaks the graph."""
    jit._problem.cache_clear()

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + (backends.BACKENDS["cupy"].problem() is None)

    assert function(torch.zeros(())) == (jit.problem() is None)
