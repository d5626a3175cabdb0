"""The CuPy backend without a GPU: compilation by NVRTC, the cache, launches on a fake driver, missing parts."""

import contextlib
import logging
import os
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_fake_cuda import targets
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import cupy as jit
from asgl_cuda.backends import extension
from tools import host_compiler
from tools.emulation import emulated
from tools.kernels.code_checks import ptx_problems

FORWARD = "asgl::lif_forward_kernel<float, asgl::LIF<(asgl::Surrogate)0, true>, 4, (asgl::Input)2, 0>"


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


# ---- compilation ----


@pytest.mark.usefixtures("nvrtc")
def test_kernel_is_compiled_once(cache, caplog):
    caplog.set_level(logging.INFO, logger="asgl_cuda")
    compiled = jit.load_or_compile(jit.PROBE, "sm_90")
    assert compiled.image.startswith(b"\x7fELF")
    assert compiled.symbol.encode() in compiled.image
    (message,) = caplog.messages
    assert message.startswith(f"compiled {jit.PROBE} for sm_90 in ")
    assert jit.load_or_compile(jit.PROBE, "sm_90") == compiled
    assert len(caplog.messages) == len(list(cache.iterdir())) == 1
    # The image is whole.
    tables = struct.unpack_from("<QQ", compiled.image, 32)  # program headers, section headers
    size, count, section_size, section_count = struct.unpack_from("<4H", compiled.image, 54)
    end = max(tables[0] + size * count, tables[1] + section_size * section_count)
    assert len(compiled.image) - end in (0, 1)  # as CuPy drops the last byte or not
    assert jit._restore_last_byte(b"anything") == b"anything\0"  # whatever its headers say


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    ("options", "fault"),
    [(jit.OPTIONS, None), (("--std=c++17", "--fmad=true"), "is contracted"),
     ((*jit.OPTIONS, "--ftz=true"), "flushes subnormal")],  # as CuPy's own compilation
    ids=["as it is", "contraction", "subnormal values"],
)  # fmt: skip
def test_arithmetic_of_the_reference(monkeypatch, options, fault):
    monkeypatch.setattr(jit, "OPTIONS", options)
    (binary,), _ = jit.compile_kernels([FORWARD], "compute_80")
    problems = list(ptx_problems(binary.image.decode()))
    assert any(fault in problem for problem in problems) if fault else not problems


@pytest.mark.usefixtures("nvrtc", "cache")
def test_compilation_that_fails(monkeypatch, tmp_path):
    headers = shutil.copytree(emulated.ROOT / "csrc", tmp_path / "headers")
    monkeypatch.setattr(jit, "source_directory", lambda: headers)
    (headers / "cuda" / "neuron_kernels.cuh").write_text("this is no C++\n")
    with pytest.raises(RuntimeError) as raised:
        jit.load_or_compile(FORWARD, "sm_90")
    first, log = str(raised.value).split("\n", 1)
    assert first.startswith(f"asgl_cuda: NVRTC {jit.nvrtc_version()} does not compile {FORWARD} for sm_90 ")
    assert str(headers) in first
    assert first.endswith(jit.install_command())
    assert "error:" in log


@pytest.mark.parametrize("fails", [False, True])
def test_programs_are_destroyed(monkeypatch, fails):
    programs = []

    class Nvrtc(types.SimpleNamespace):
        NVRTCError = ArithmeticError

        def compileProgram(self, *_):  # noqa: N802
            if fails:
                raise ArithmeticError

    fake = Nvrtc(
        createProgram=lambda *_: programs.append(7) or 7, destroyProgram=programs.remove, getVersion=lambda: (99, 0),
        addNameExpression=lambda *_: None, getProgramLog=lambda _: "", getLoweredName=lambda *_: "_",
        getPTX=lambda _: b"",
    )  # fmt: skip
    monkeypatch.setattr(jit, "_nvrtc", lambda: fake)
    with pytest.raises(RuntimeError, match=r"NVRTC 99\.0 does not compile") if fails else contextlib.nullcontext():
        jit.compile_kernels([jit.PROBE], "compute_90")
    assert not programs


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "sm_80"), ((9, 0), "sm_90"), ((9, 5), "compute_90"), ((13, 0), "compute_121")]
)
def test_target(monkeypatch, capability, expected):
    fake = types.SimpleNamespace(getSupportedArchs=lambda: (75, 80, 90, 100, 121), getVersion=lambda: (13, 0))
    monkeypatch.setattr(jit, "_nvrtc", lambda: fake)
    assert jit.target_architecture(capability) == expected
    words = (
        r"capability 6\.1, which is older than those that NVRTC 13\.0 supports; install torch, CuPy and NVRTC, .* older"
    )
    with pytest.raises(RuntimeError, match=words):
        jit.target_architecture((6, 1))


# ---- the cache ----


@pytest.fixture
def compiled(monkeypatch, cache) -> list[tuple]:
    """Records compilations, which give a binary each."""
    found: list[tuple] = []

    def compile_kernels(*arguments):
        found.append(arguments)
        return [jit.Binary("_", bytes([len(found)]))], ""

    monkeypatch.setattr(jit, "compile_kernels", compile_kernels)
    monkeypatch.setattr(jit, "nvrtc_version", lambda: "13.0")
    return found


def test_whatever_a_kernel_is_made_of_makes_another(compiled, cache, monkeypatch, tmp_path):
    changed = shutil.copytree(emulated.ROOT / "csrc", tmp_path / "changed")
    with (changed / "math" / "philox.h").open("a") as file:
        file.write("// changed\n")
    kernel, architecture = jit.PROBE, "sm_90"
    for number, (name, value) in enumerate(
        [(None, None), ("nvrtc_version", lambda: "99.0"), ("OPTIONS", (*jit.OPTIONS, "--ftz=true")),
         ("source_directory", lambda: changed), ("kernel", FORWARD), ("architecture", "sm_80")], 1,
    ):  # fmt: skip
        if hasattr(jit, str(name)):
            monkeypatch.setattr(jit, name, value)
        kernel, architecture = (value if name == "kernel" else kernel), (value if name == "architecture" else "sm_90")
        for _ in range(2):
            jit.load_or_compile(kernel, architecture)
        assert len(compiled) == len(list(cache.iterdir())) == number


def test_damaged_file_is_compiled_again(compiled, cache):
    jit.load_or_compile(jit.PROBE, "sm_90")
    (file,) = cache.iterdir()
    for damage in (lambda content: b"", lambda content: content[:-1], lambda content: b"x" + content[1:]):
        file.write_bytes(damage(file.read_bytes()))
        assert jit._read_binary(file) is None
        again = jit.load_or_compile(jit.PROBE, "sm_90")
        assert jit._read_binary(file) == again == jit.Binary("_", bytes([len(compiled)]))


def test_cache_that_cannot_be_written(compiled, cache, caplog):
    cache.write_text("a file where the directory should be")
    assert jit.load_or_compile(jit.PROBE, "sm_90").image
    assert "a compiled kernel could not be stored" in caplog.text


# ---- launches ----


def test_resident_threads(monkeypatch):
    properties = types.SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert jit.CupyLauncher().resident_threads(torch.device("cuda", 0)) == 132 * 2048


# Twice on a device, on a second one, and by a thread that has no context.
LAUNCHES = """
import ctypes, types
import cupy, torch
from asgl_cuda.backends import cupy as jit
fake = ctypes.CDLL("libcuda.so.1")
cupy.cuda.runtime = types.SimpleNamespace(setDevice=lambda device: fake.fake_set_device(device))
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0xabc + device.index)
params = (ctypes.c_longlong * 3)(1, 2, 258)
launcher = jit.CupyLauncher()
for index in (3, 3, 4, None, 3):
    if index is None:
        fake.fake_lose_context()
    else:
        device = torch.device("cuda", index)
        launcher.launch(device, jit.PROBE, 5, 128, ctypes.addressof(params), ctypes.sizeof(params))
"""


@pytest.mark.usefixtures("nvrtc", "cache")
def test_launches_of_cupy_on_a_fake_driver(tmp_path):
    """Compilation and CuPy's binding of the driver are real; only the driver is not."""
    compiler = host_compiler.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).parent / "fake_libcuda.cpp"
    library = tmp_path / "libcuda.so.1"
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHES], capture_output=True, text=True, timeout=600, env=environment,
        cwd=emulated.ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    symbol = jit.load_or_compile(jit.PROBE, "sm_90").symbol
    params = "010000000000000002000000000000000201000000000000"
    launched = "launch 0x20 grid 5 1 1 block 128 1 1 shared 0 stream {} extra 0 params " + params
    loaded = ["module \x7fELF\x02", f"function {symbol} of 0x10"]
    on_three, on_four = launched.format("0xabf"), launched.format("0xac0")
    expected = ["device 3", *loaded, on_three, on_three, *loaded, on_four, "device 3", on_three]
    assert result.stdout.splitlines() == expected


# ---- missing parts ----


@pytest.fixture
def cupy(monkeypatch) -> types.ModuleType:
    """A complete machine, with the part of CuPy that the backend checks."""
    module = types.ModuleType("cupy")
    module.__version__ = "14.2.0"
    runtime = types.SimpleNamespace(is_hip=False, getDeviceCount=lambda: 2)
    module.cuda = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(jit, "nvrtc_version", lambda: "13.0")
    driver = types.SimpleNamespace(get_build_version=lambda: 13020)
    monkeypatch.setattr(jit, "_driver", lambda: driver)
    monkeypatch.setattr(jit.LAUNCHER, "load", lambda device, kernel: jit.load_or_compile(kernel, str(device)))
    monkeypatch.setattr(jit, "load_or_compile", lambda kernel, architecture: None)
    monkeypatch.setattr(backends, "_warned", set())
    jit._problem.cache_clear()
    yield module
    jit._problem.cache_clear()


def raise_error(error: Exception):
    def function(*_):
        raise error

    return function


class Refuses:
    """An import hook that finds a CuPy that fails to import."""

    BANNER = "\n================\nFailed to import CuPy.\nOriginal error: libcurand.so.10 is gone\n================\n"

    def find_spec(self, name, path=None, target=None):
        if name == "cupy":
            raise ImportError(self.BANNER)


FOR_13 = 'pip install "cupy-cuda13x>=13.6" "nvidia-cuda-nvrtc==13.*"'
FOR_12 = 'pip install "cupy-cuda12x>=13.6" "nvidia-cuda-nvrtc-cu12==12.*"'
NVRTC_ERROR = RuntimeError(f"asgl_cuda: NVRTC 13.0 does not compile {jit.PROBE} for sm_90\nlog: error: no")
# A change by monkeypatch; words of the problem, and its end.
PROBLEMS = {
    "without cuda": (lambda cupy, m: m.setattr(torch.version, "cuda", None), "is a build without CUDA", FOR_13),
    "without cupy": (lambda cupy, m: m.setitem(sys.modules, "cupy", None), "CuPy is not installed. To install it: ",
                     FOR_13),
    "broken cupy": (lambda cupy, m: (m.delitem(sys.modules, "cupy"),
                                     m.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])),
                    "CuPy is installed but does not import (Failed to import CuPy.", FOR_13),
    "cupy for another cuda": (lambda cupy, m: m.setattr(jit._driver(), "get_build_version", lambda: 12090),
                              "is for CUDA 12, and torch", FOR_13),
    "torch for another cuda": (lambda cupy, m: m.setattr(torch.version, "cuda", "12.8"), "is for CUDA 13, and torch",
                               FOR_12),
    "cupy for rocm": (lambda cupy, m: m.setattr(cupy.cuda.runtime, "is_hip", True), "is a build for ROCm", FOR_13),
    "without device": (lambda cupy, m: m.setattr(torch.cuda, "is_available", lambda: False),
                       "torch finds no CUDA device: ", "torch.cuda.is_available() is False"),
    "without device of cupy": (
        lambda cupy, m: m.setattr(cupy.cuda.runtime, "getDeviceCount",
                                  raise_error(RuntimeError("cudaErrorInsufficientDriver"))),
        "CuPy finds no CUDA device, though torch does: cudaErrorInsufficientDriver", ""),
    "without headers": (lambda cupy, m: m.setattr(jit, "source_directory", lambda: None),
                        "the sources, which were installed with asgl_cuda, are gone", extension.build_command()),
    "without nvrtc": (
        lambda cupy, m: m.setattr(jit, "nvrtc_version", raise_error(RuntimeError('Failure finding "libnvrtc.so.13"'))),
        "NVRTC, which compiles the kernels, is missing", FOR_13),
    "headers that do not compile": (lambda cupy, m: m.setattr(jit, "load_or_compile", raise_error(NVRTC_ERROR)),
                                    "a first kernel could not be compiled and loaded: ", "log: error: no"),
}  # fmt: skip


def test_nothing_is_missing(cupy):
    assert jit.problem() is None


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem(cupy, monkeypatch, name):
    change, words, end = PROBLEMS[name]
    change(cupy, monkeypatch)
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
    assert backends.choose_backend(None, device, "asgl_cuda.lif") == "reference", "without another warning"


def targets_on_a_gpu():
    """The operators of `lif` on a CUDA tensor by the default backend."""
    with FakeTensorMode():
        return targets(make_fx(lambda x_seq: asgl_cuda.lif(x_seq))(torch.rand(4, 3, device="cuda")).graph)


def test_default_without_an_extension_for_the_gpu(monkeypatch):
    def give(name, problem):
        monkeypatch.setitem(backends.BACKENDS, name, backends.BACKENDS[name]._replace(problem=lambda: problem))

    give("cuda", "not built")
    give("cupy", None)
    assert torch.ops.asgl_cuda_cupy.lif_forward.default in targets_on_a_gpu()
    give("cuda", None)
    assert torch.ops.asgl_cuda.lif_forward.default in targets_on_a_gpu()


def test_choice_under_torch_compile():
    """The checks of the machine are not traced, and do not break the graph."""
    jit._problem.cache_clear()

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + (backends.BACKENDS["cupy"].problem() is None)

    assert function(torch.zeros(())) == (jit.problem() is None)
