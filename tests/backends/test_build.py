"""Compilation: toolkit, architectures and compiler; the compilers are scripts of a few lines."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution
from torch.utils import cpp_extension

import asgl_cuda
from asgl_cuda.backends.extension import build_notes, compilation

ROOT = Path(__file__).parents[2]

WHEEL_HOMES = compilation.wheel_homes


@pytest.fixture
def build(monkeypatch, tmp_path) -> ModuleType:
    """A torch built for CUDA 13.2 on a machine without a toolkit."""
    for name in ("ASGL_CUDA_BUILD", "CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(compilation, "DEFAULT_TOOLKIT", tmp_path / "nowhere")
    monkeypatch.setattr(compilation, "wheel_homes", lambda major: [])
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.version, "hip", None)
    return compilation


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make_toolkit(home: Path, version: str = "13.0", cudart: str = "lib64/libcudart.so") -> Path:
    script(
        home / "bin" / "nvcc",
        f'case "$*" in\n--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;\n'
        f"--dryrun*) echo '#$ TOP={home}/bin/..' >&2 ;;\nesac",
    )
    for file in ("include/cuda_runtime.h", cudart):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    return home


@pytest.mark.parametrize("named", [None, "of another version", "that is gone"])
@pytest.mark.parametrize("place", ["CUDA_HOME", "behind a wrapper", "wheels", "default"])
def test_toolkit_that_is_found(build, monkeypatch, tmp_path, place, named):
    """A named one before the default; nvcc on the PATH may be a script; a wheel's libcudart has a version.

    A named one that does not serve hides none of the others.
    """
    if named is not None and place != "CUDA_HOME":
        other = tmp_path / "named"
        monkeypatch.setenv("CUDA_HOME", str(make_toolkit(other, version="12.9") if "version" in named else other))
    home, cudart = tmp_path / "toolkit", "lib64/libcudart.so"
    if place == "wheels":
        home, cudart = tmp_path / "site-packages/nvidia/cu13", "lib/libcudart.so.13"
        monkeypatch.setattr(build, "wheel_homes", WHEEL_HOMES)
        monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    make_toolkit(home, cudart=cudart)
    if place == "CUDA_HOME":
        monkeypatch.setattr(build, "DEFAULT_TOOLKIT", make_toolkit(tmp_path / "default"))
        monkeypatch.setenv("CUDA_HOME", str(home))
    if place == "behind a wrapper":
        script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    if place == "default":
        monkeypatch.setattr(build, "DEFAULT_TOOLKIT", home)
    toolkit, reason = build.choose_toolkit(None)
    assert toolkit == (home, "13.0", home / "include", home / cudart)
    assert "13.2" in reason
    assert str(home) in reason
    left = f", since CUDA_HOME={tmp_path / 'named'} has no toolkit of CUDA 13"
    assert reason.endswith(left if "CUDA_HOME" in reason else str(home))
    assert ("CUDA_HOME" in reason) == (named is not None and place != "CUDA_HOME")


def without_cuda(monkeypatch, home):
    monkeypatch.setattr(torch.version, "cuda", None)


def for_rocm(monkeypatch, home):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")


NO_TOOLKIT = {
    "nowhere": (lambda patch, home: shutil.rmtree(home), "none is in {home}", "needs a toolkit of CUDA 13 "),
    "without nvcc": (lambda patch, home: (home / "bin/nvcc").unlink(), "none is in {home} ", "needs a toolkit"),
    "nvcc does not start": (
        lambda patch, home: (home / "bin/nvcc").chmod(0o644), "none is in {home} ", r"cuda-toolkit\[nvcc\]==13\.2\.\*"
    ),
    "without headers": (lambda patch, home: (home / "include/cuda_runtime.h").unlink(), "none is in {home} ", "needs"),
    "without libcudart": (lambda patch, home: (home / "lib64/libcudart.so").unlink(), "none is in {home} ", "needs"),
    "another version": (
        lambda patch, home: make_toolkit(home, version="12.9"),
        "toolkit of CUDA 13 with nvcc, cuda_runtime.h and libcudart, but {home} is CUDA 12.9", "needs a toolkit",
    ),
    "another version in CUDA_HOME": (
        lambda patch, home: patch.setenv(
            "CUDA_HOME", str(make_toolkit(make_toolkit(home, version="12.9") / "named", version="12.8"))
        ),
        "but {home}/named is CUDA 12.8; {home} is CUDA 12.9", "needs a toolkit",
    ),
    "torch without CUDA": (without_cuda, "is a build without CUDA", "but torch .* is a build without CUDA"),
    "torch for ROCm": (for_rocm, "is a build for ROCm", "but torch .* is a build for ROCm"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason", "refused"), NO_TOOLKIT.values(), ids=NO_TOOLKIT)
def test_no_toolkit(build, monkeypatch, tmp_path, change, reason, refused):
    home = make_toolkit(tmp_path / "toolkit")
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", home)
    change(monkeypatch, home)
    toolkit, why = build.choose_toolkit(None)
    assert toolkit is None
    assert reason.format(home=home) in why
    with pytest.raises(SystemExit, match="ASGL_CUDA_BUILD is cuda, but ") as error:
        build.choose_toolkit("cuda")
    assert re.search(refused, str(error.value))


def test_choices(build, monkeypatch):
    assert "was cpu" in build.choose_toolkit("cpu")[1]
    monkeypatch.setenv("ASGL_CUDA_BUILD", "gpu")
    with pytest.raises(SystemExit, match="ASGL_CUDA_BUILD must be cuda, cpu or none, got 'gpu'"):
        build.requested_build()


KNOWN = [75, 80, 86, 90, 120, 103]


@pytest.mark.parametrize(
    ("asked", "flags", "built"),
    [
        (
            "", ["arch=compute_75,code=[sm_75]", "arch=compute_80,code=[sm_80,sm_86,sm_90,sm_103,sm_120,compute_80]"],
            "sm_75 sm_80 sm_86 sm_90 sm_103 sm_120 and PTX of compute_80",
        ),
        ("9.0", ["arch=compute_80,code=[sm_90]"], "sm_90"),
        ("12.0a", ["arch=compute_80,code=[sm_120]"], "sm_120"),
        ("7.5+PTX", ["arch=compute_75,code=[sm_75,compute_75]"], "sm_75 and PTX of compute_75"),
        (
            "8.6 8.0;9.0+PTX", ["arch=compute_80,code=[sm_80,sm_86,sm_90,compute_80]"],
            "sm_80 sm_86 sm_90 and PTX of compute_80",
        ),
    ],
)  # fmt: skip
def test_architectures(build, monkeypatch, asked, flags, built):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(build, "architectures_of_torch", set)
    assert build.architecture_flags([70, *KNOWN]) == ([f"-gencode={flag}" for flag in flags], built)


@pytest.mark.parametrize(
    ("flags", "built"),
    [
        ("sm_50 sm_75 sm_86 sm_90a sm_100 compute_100", "sm_75 sm_86 sm_90 and PTX of compute_80"),
        ("sm_120 compute_120", "sm_120 and PTX of compute_80"),
        ("sm_50 sm_60", "sm_75 sm_80 sm_86 sm_90 sm_103 sm_120 and PTX of compute_80"),
        (None, "sm_75 sm_80 sm_86 sm_90 sm_103 sm_120 and PTX of compute_80"),
        ("sm_86 sm_89", "sm_86 and PTX of compute_80"),
        ("sm_89", "sm_89 and PTX of compute_80"),
    ],
)
def test_architectures_are_those_of_torch(build, monkeypatch, flags, built):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: flags, raising=False)
    assert build.architecture_flags([70, *KNOWN, 89])[1] == built


@pytest.mark.parametrize("asked", ["Hopper", "9.0;sm_80", "8.7"])
def test_unknown_architectures(build, monkeypatch, asked):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(
        SystemExit, match=rf"that this nvcc knows .7.5 8.0 8.6 9.0 10.3 12.0. in the form .*, got '{asked}'"
    ):
        build.architecture_flags(KNOWN)


@pytest.mark.parametrize(
    ("cuda", "minutes"), [(None, 5), ("CUDA 13.0, sm_90", 7), ("CUDA 13.0, sm_75 sm_80 and PTX of compute_80", 8)]
)
def test_notes_and_last_line(build, capsys, tmp_path, monkeypatch, cuda, minutes):
    """And progress, on the terminal, of the files that are compiled now."""
    said: list[str] = []
    named = threading.Event()

    def say(words):
        said.append(words)
        if len(said) == 2:
            named.set()

    monkeypatch.setattr(build, "print_to_terminal", say)
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", lambda _: compiled())
    objects = tmp_path / "objects" / "csrc"
    objects.mkdir(parents=True)
    (objects / "earlier.o").touch()

    def compiled():
        (objects / "neuron.o").touch()
        assert named.wait(60)

    extension = cpp_extension.CppExtension("asgl_cuda._C", ["a.cpp", "b.cpp"])
    script(tmp_path / "bin" / "c++", "exit 1")
    command = build.build_command_class(build.BuildPlan(extension, cuda, "a reason", "0123"), tmp_path)(Distribution())
    command.inplace, command.build_lib, command.build_temp = False, str(tmp_path), str(tmp_path / "objects")
    package = tmp_path / "asgl_cuda"
    package.mkdir()
    (package / build_notes.EXTENSION).write_bytes(b"built")
    monkeypatch.setenv("MAX_JOBS", "3")
    command.run()
    assert build_notes.read_notes(package)[:4] == (torch.__version__, cuda, "a reason", "0123")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("asgl_cuda: built ")
    assert (cuda or "only the CPU kernels") in last
    assert last.endswith(": a reason")
    assert f"3 files at a time: on two cores {minutes} minutes" in said[0]
    assert said[1] == "1 of 2 files: neuron"


def test_compiler(build, monkeypatch, tmp_path):
    """Variables without a name are not asked for."""
    for asked in ("", " "):
        for name in ("CC", "CXX"):
            monkeypatch.setenv(name, asked)
        build.plan_build(ROOT / "csrc", "cpu")  # as of a source archive, which needs no compiler
        with pytest.raises(SystemExit, match="no C\\+\\+ compiler 'c\\+\\+' on PATH; install one"):
            build.require_compiler()
    compiler = script(tmp_path / "bin" / "c++", "exit 1")
    build.require_compiler()
    build.plan_build(ROOT / "csrc", "cpu")
    assert not {"CC", "CXX"} & os.environ.keys()
    monkeypatch.setenv("CXX", f"{compiler}-18")
    with pytest.raises(SystemExit, match=r"CXX must name a program .* got '.*/c\+\+-18'; with ASGL_CUDA_BUILD=none"):
        build.require_compiler()
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    with pytest.raises(SystemExit, match=r"CXX must name one program, without arguments, got '.*/c\+\+ -m64'; with"):
        build.require_compiler()


@pytest.mark.parametrize(("asked", "jobs"), [("3", 3), ("0", 1), ("many", None), ("-1", None), ("", None)])
def test_number_of_jobs(build, monkeypatch, asked, jobs):
    monkeypatch.setenv("MAX_JOBS", asked)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    for free, most in ((8.3, 7), (8.1, 6), (4, 2), (3.1, 1), (0.1, 1)):  # in GB: one file takes 2.2, others 1
        kilobytes = int(free * 1000 * 1024)
        monkeypatch.setattr(Path, "read_text", lambda _, size=kilobytes: f"MemAvailable: {size} kB\n")
        assert build.parallel_jobs() == (jobs or most)


@pytest.mark.parametrize(("jobs", "threads"), [(2, 1), (7, 1), (19, 4)])
def test_threads_of_nvcc(build, monkeypatch, tmp_path, jobs, threads):
    """Of four files at a time."""
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", make_toolkit(tmp_path / "toolkit"))
    found = build.plan_build(ROOT / "csrc", "cuda").extension.extra_compile_args["nvcc"]
    assert found[-1] == f"--threads={threads}"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("place", "asked", "taken"),
    [("argument", "", "c++"), ("environment", " ", "c++"), ("argument", "ccache g++", "ccache g++")],
)
def test_compiler_that_make_takes(monkeypatch, place, asked, taken):
    for name in ("CXX", "MAKEFLAGS", "MAKEOVERRIDES"):  # inherited by a make run from make
        monkeypatch.delenv(name, raising=False)
    command = ["make", "--no-print-directory", "--eval=compiler: ; @echo [$(CXX)]", "compiler"]
    if place == "argument":
        command.append(f"CXX={asked}")
    else:
        monkeypatch.setenv("CXX", asked)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == f"[{taken}]\n", result.stderr


@pytest.mark.parametrize(
    ("version", "cuda", "name"),
    [
        ("2.13.0+cpu", None, "torch2.13.cpu"),
        ("2.13.1+cu130", "CUDA 13.0, sm_90", "torch2.13.cu130"),
        ("2.6.0+cu124", None, "torch2.6.cpu"),
        ("2.15.0", "CUDA 13.2, sm_90", "torch2.15.cuda"),
    ],
)
def test_version_of_a_wheel_names_its_torch(version, cuda, name):
    assert build_notes.local_version(version, cuda) == name


def test_an_archive_names_no_torch(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path],
        cwd=ROOT, env={**os.environ, "ASGL_CUDA_BUILD": "cpu"}, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / f"asgl_cuda-{asgl_cuda.__version__}.tar.gz").exists(), sorted(tmp_path.iterdir())


OLD_SETUPTOOLS = """
import runpy, setuptools, sys
setuptools.__version__ = "68.2.2"
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_setup_names_the_setuptools_that_it_takes():
    result = subprocess.run([sys.executable, "-c", OLD_SETUPTOOLS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    (message,) = result.stderr.splitlines()
    assert message.startswith("asgl_cuda: setup.py takes setuptools 77 or newer, and this is 68.2.2: pip install ")
    assert "setuptools>=77" in message
    assert '"setuptools>=77"' in (ROOT / "pyproject.toml").read_text()
