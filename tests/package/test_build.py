"""Compilation: toolkit, architectures and compiler; the compilers are scripts of a few lines."""

import os
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
from asgl_cuda.extension import build_notes, compilation

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


def test_toolkit_that_is_named(build, monkeypatch, tmp_path):
    home = make_toolkit(tmp_path / "named")
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", make_toolkit(tmp_path / "default"))
    monkeypatch.setenv("CUDA_HOME", str(home))
    toolkit, reason = build.choose_toolkit(None)
    assert toolkit == (home, "13.0", home / "include", home / "lib64/libcudart.so")
    assert "13.2" in reason
    assert str(home) in reason


def test_toolkit_behind_a_wrapper(build, tmp_path):
    home = make_toolkit(tmp_path / "toolkit")
    script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert build.choose_toolkit(None)[0].home == home


def test_toolkit_of_wheels(build, monkeypatch, tmp_path):
    make_toolkit(tmp_path / "site-packages/nvidia/cu13", cudart="lib/libcudart.so.13")
    monkeypatch.setattr(build, "wheel_homes", WHEEL_HOMES)
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    assert build.choose_toolkit(None)[0].cudart == tmp_path / "site-packages/nvidia/cu13/lib/libcudart.so.13"


def test_no_toolkit(build, monkeypatch, tmp_path):
    toolkit, reason = build.choose_toolkit(None)
    assert toolkit is None
    assert f"none is in {tmp_path}/nowhere" in reason
    assert "cuda-toolkit[nvcc]==13.2.*" in reason
    with pytest.raises(SystemExit, match=r"ASGL_CUDA_BUILD is cuda, but .* needs a toolkit of CUDA 13 "):
        build.choose_toolkit("cuda")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.chmod(0o644)], ids=["missing", "does not start"])
@pytest.mark.parametrize("file", ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so"])
def test_incomplete_toolkit(build, monkeypatch, tmp_path, file, damage):
    if damage is not Path.unlink and file != "bin/nvcc":
        pytest.skip("nothing but nvcc is started")
    home = make_toolkit(tmp_path / "toolkit")
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", home)
    damage(home / file)
    toolkit, reason = build.choose_toolkit(None)
    assert toolkit is None
    assert f"none is in {home} " in reason


def test_toolkit_of_another_version(build, monkeypatch, tmp_path):
    home = make_toolkit(tmp_path / "toolkit", version="12.9")
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", home)
    toolkit, reason = build.choose_toolkit(None)
    assert toolkit is None
    assert f"toolkit of CUDA 13 with nvcc, cuda_runtime.h and libcudart, but {home} is CUDA 12.9" in reason


@pytest.mark.parametrize(
    ("version", "reason"), [("cuda", "is a build without CUDA"), ("hip", "is a build for ROCm"), (None, "was cpu")]
)
def test_cpu_only(build, monkeypatch, tmp_path, version, reason):
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", make_toolkit(tmp_path / "toolkit"))
    if version == "hip":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", "13.2" if version is None else None)
    toolkit, why = build.choose_toolkit("cpu" if version is None else None)
    assert toolkit is None
    assert reason in why
    if version is not None:
        with pytest.raises(SystemExit, match=rf"ASGL_CUDA_BUILD is cuda, but torch .* {reason}"):
            build.choose_toolkit("cuda")


def test_unknown_choice(build, monkeypatch):
    monkeypatch.setenv("ASGL_CUDA_BUILD", "gpu")
    with pytest.raises(SystemExit, match="ASGL_CUDA_BUILD must be cuda, cpu or none, got 'gpu'"):
        build.wanted_build()


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
    assert build.architectures([70, *KNOWN]) == ([f"-gencode={flag}" for flag in flags], built)


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
    assert build.architectures([70, *KNOWN, 89])[1] == built


@pytest.mark.parametrize("asked", ["Hopper", "9", "9.0;sm_80", "8.7"])
def test_unknown_architectures(build, monkeypatch, asked):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match=rf"some of 7.5 8.0 8.6 9.0 10.3 12.0, got '{asked}'"):
        build.architectures(KNOWN)


@pytest.mark.parametrize("cuda", [None, "CUDA 13.0, sm_90"])
def test_notes_and_last_line(build, capsys, tmp_path, monkeypatch, cuda):
    """And progress, on the terminal, of the files that are compiled now."""
    said: list[str] = []
    named = threading.Event()

    def say(words):
        said.append(words)
        if len(said) == 2:
            named.set()

    monkeypatch.setattr(build, "say", say)
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", lambda _: compiled())
    objects = tmp_path / "objects" / "csrc"
    objects.mkdir(parents=True)
    (objects / "earlier.o").touch()

    def compiled():
        (objects / "neuron.o").touch()
        assert named.wait(60)

    extension = cpp_extension.CppExtension("asgl_cuda._C", ["a.cpp", "b.cpp"])
    script(tmp_path / "bin" / "c++", "exit 1")
    command = build.builder(build.Plan(extension, cuda, "a reason", "0123"), tmp_path)(Distribution())
    command.inplace, command.build_lib, command.build_temp = False, str(tmp_path), str(tmp_path / "objects")
    package = tmp_path / "asgl_cuda"
    package.mkdir()
    (package / build_notes.EXTENSION).write_bytes(b"built")
    monkeypatch.setenv("MAX_JOBS", "3")
    command.run()
    assert build_notes.read(package)[:4] == (torch.__version__, cuda, "a reason", "0123")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("asgl_cuda: built ")
    assert (cuda or "only the CPU kernels") in last
    assert last.endswith(": a reason")
    assert "3 files at a time" in said[0]
    assert said[1] == "1 of 2 files: neuron"


def test_compiler(build, monkeypatch, tmp_path):
    """Variables without a name are not asked for."""
    for asked in ("", " "):
        for name in ("CC", "CXX"):
            monkeypatch.setenv(name, asked)
        build.plan(ROOT / "csrc", "cpu")  # as of a source archive, which needs no compiler
        with pytest.raises(SystemExit, match="no C\\+\\+ compiler 'c\\+\\+' on the PATH"):
            build.require_compiler()
    compiler = script(tmp_path / "bin" / "c++", "exit 1")
    build.require_compiler()
    build.plan(ROOT / "csrc", "cpu")
    assert not {"CC", "CXX"} & os.environ.keys()
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    with pytest.raises(
        SystemExit, match=r"no C\+\+ compiler '.*/c\+\+ -m64' on the PATH.* name another program in CXX"
    ):
        build.require_compiler()


@pytest.mark.parametrize(("asked", "jobs"), [("3", 3), ("0", 1), ("many", None), ("-1", None), ("", None)])
def test_number_of_jobs(build, monkeypatch, asked, jobs):
    monkeypatch.setenv("MAX_JOBS", asked)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(Path, "read_text", lambda _: f"MemAvailable: {7 * build.COMPILER_BYTES // 1024} kB\n")
    assert build.jobs() == (jobs or 7)
    monkeypatch.setattr(Path, "read_text", lambda _: f"MemAvailable: {3.5 * build.COMPILER_BYTES // 1024:.0f} kB\n")
    assert build.jobs() == (jobs or 3)
    monkeypatch.setattr(Path, "read_text", lambda _: "MemAvailable: 1 kB\n")
    assert build.jobs() == (jobs or 1)


@pytest.mark.parametrize(("jobs", "threads"), [(2, 1), (4, 1), (16, 3)])
def test_threads_of_nvcc(build, monkeypatch, tmp_path, jobs, threads):
    """Of five files at a time."""
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", make_toolkit(tmp_path / "toolkit"))
    found = build.plan(ROOT / "csrc", "cuda").extension.extra_compile_args["nvcc"]
    assert found[-1] == f"--threads={threads}"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("place", ["argument", "environment"])
@pytest.mark.parametrize(("asked", "taken"), [("", "c++"), (" ", "c++"), ("ccache g++", "ccache g++")])
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


@pytest.mark.parametrize(("wanted", "command"), [("cpu", "dist_info"), ("cpu", "sdist"), ("none", "dist_info")])
def test_version_of_what_setup_makes(tmp_path, wanted, command):
    folder = {"dist_info": "--output-dir", "sdist": "--dist-dir"}[command]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, command, folder, tmp_path],
        cwd=ROOT, env={**os.environ, "ASGL_CUDA_BUILD": wanted}, check=True, capture_output=True,
    )  # fmt: skip
    version = asgl_cuda.__version__
    if (wanted, command) == ("cpu", "dist_info"):
        version += f"+{build_notes.local_version(torch.__version__, None)}"
    names = {"dist_info": f"asgl_cuda-{version}.dist-info", "sdist": f"asgl_cuda-{version}.tar.gz"}
    assert (tmp_path / names[command]).exists(), sorted(tmp_path.iterdir())


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
