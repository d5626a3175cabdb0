"""The sources that are compiled, and their flags; the compilers here are scripts of a few lines."""

import runpy
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution

from asgl_cuda import compilation, extension
from asgl_cuda.build import build as build_command
from asgl_cuda.build import first_error

WHEEL_HOMES = compilation.wheel_homes


@pytest.fixture
def build(monkeypatch, tmp_path) -> ModuleType:
    """The torch is built for CUDA 13.2, the machine has no toolkit."""
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


@pytest.mark.parametrize("file", ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so"])
def test_incomplete_toolkit(build, monkeypatch, tmp_path, file):
    home = make_toolkit(tmp_path / "toolkit")
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", home)
    (home / file).unlink()
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
            "",
            ["arch=compute_75,code=[sm_75]", "arch=compute_80,code=[sm_80,sm_86,sm_90,sm_103,sm_120,compute_80]"],
            "sm_75 sm_80 sm_86 sm_90 sm_103 sm_120 and PTX of compute_80",
        ),
        ("9.0", ["arch=compute_80,code=[sm_90]"], "sm_90"),
        ("12.0a", ["arch=compute_80,code=[sm_120]"], "sm_120"),
        ("7.5+PTX", ["arch=compute_75,code=[sm_75,compute_75]"], "sm_75 and PTX of compute_75"),
        ("8.6 8.0;9.0+PTX", ["arch=compute_80,code=[sm_80,sm_86,sm_90,compute_80]"],
         "sm_80 sm_86 sm_90 and PTX of compute_80"),
    ],
)  # fmt: skip
def test_architectures(build, monkeypatch, asked, flags, built):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
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
def test_notes_and_last_line(build, capsys, tmp_path, cuda):
    script(tmp_path / "bin" / "c++", "exit 1")
    command = build.builder(build.Plan(None, cuda, "a reason"), tmp_path)(Distribution())
    command.inplace, command.build_lib = False, str(tmp_path)
    command.run()
    noted = runpy.run_path(str(tmp_path / "asgl_cuda/_build_info.py"))
    assert (noted["TORCH_VERSION"], noted["CUDA"], noted["REASON"]) == (torch.__version__, cuda, "a reason")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("asgl_cuda: built ")
    assert (cuda or "only the CPU kernels") in last
    assert last.endswith(": a reason")


@pytest.fixture
def cache(build, monkeypatch, tmp_path) -> Path:
    """The user's, on a machine with a compiler that fails, where no extension is."""
    monkeypatch.setenv("ASGL_CUDA_BUILD", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "build_info", None)
    script(tmp_path / "bin" / "c++", "exit 1")
    return tmp_path / "cache"


def unset_compiler(monkeypatch, tmp_path):
    (tmp_path / "bin" / "c++").unlink()


def unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "cache").touch()


def no_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "source_directory", lambda: None)


def nothing_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("ASGL_CUDA_BUILD", "none")


def cuda_without_toolkit(monkeypatch, tmp_path):
    monkeypatch.setenv("ASGL_CUDA_BUILD", "cuda")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("damage", "problem", "remedy"),
    [
        (unset_compiler, "no C++ compiler 'c++' on the PATH", "apt install g++"),
        (unwritable_cache, "can't be written", "name another folder in XDG_CACHE_HOME"),
        (
            no_sources,
            "the sources, which were installed with asgl_cuda, are gone",
            "in a checkout of it: pip install --force-reinstall",
        ),
        (nothing_asked_for, "ASGL_CUDA_BUILD is none", "unset it"),
        (cuda_without_toolkit, "ASGL_CUDA_BUILD is cuda, but", "name one in CUDA_HOME"),
    ],
)
def test_build_that_is_not_possible(monkeypatch, tmp_path, damage, problem, remedy):
    damage(monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as raised:
        build_command()
    (message,) = str(raised.value).splitlines()
    assert message.startswith("asgl_cuda: ")
    assert problem in message
    assert remedy in message


def test_build_without_ninja(cache, monkeypatch, capsys):
    def run(command, stdout, **_):
        stdout.write("running build_ext\n/tmp/a.cpp:3:1: error: no\nninja: build stopped\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("asgl_cuda.build.is_ninja_available", lambda: False)
    monkeypatch.setattr("asgl_cuda.build.subprocess.run", run)
    with pytest.raises(
        SystemExit, match=r"^asgl_cuda: it does not compile: /tmp/a.cpp:3:1: error: no \(log: .*\.log\)$"
    ):
        build_command()
    assert "without ninja one file is compiled after the other: pip install ninja\n" in capsys.readouterr().out
    assert [path.suffix for path in cache.glob("*/*/*")] == [".log"]


@pytest.mark.parametrize(
    ("there", "asked", "done"),
    [(None, "cpu", True), ("CUDA 13.0, sm_90", "cpu", True), (None, None, True), (None, "cuda", False),
     ("CUDA 13.0, sm_75", "cuda", False), ("CUDA 13.0, sm_90", "cuda", True)],
)  # fmt: skip
def test_when_there_is_something_to_build(cache, monkeypatch, tmp_path, capsys, there, asked, done):
    if asked == "cuda":
        toolkit = make_toolkit(tmp_path / "toolkit")
        script(toolkit / "bin" / "nvcc", 'case "$*" in\n--version) echo release 13.0 ;;\n*) echo sm_90 ;;\nesac')
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    if asked is None:
        monkeypatch.delenv("ASGL_CUDA_BUILD")
    else:
        monkeypatch.setenv("ASGL_CUDA_BUILD", asked)
    monkeypatch.setattr(extension, "build_info", extension.BuildInfo(torch.__version__, there, "a reason"))
    compiled = []
    monkeypatch.setattr("asgl_cuda.build._compile", lambda *arguments: compiled.append(arguments))
    build_command()
    assert bool(compiled) != done
    assert ("nothing to do: the extension for torch " in capsys.readouterr().out) == done


@pytest.mark.parametrize(
    ("log", "first"),
    [
        (
            "cc -c a.cpp\na.cpp:1:9: fatal error: Python.h: No such file\n  | ^\nninja: build stopped",
            "Python.h: No such file",
        ),
        ("a.cu(7): error: no such thing\n1 error detected", "no such thing"),
        ("ptxas fatal   : Unknown option", "Unknown option"),
        ("/usr/bin/ld: cannot find -lc10\ncollect2: error: ld returned 1 exit status", "-lc10"),
        ("Traceback\n  File\nSomething else\n\n", "Something else"),
        ("", "it said nothing"),
    ],
)
def test_first_error(log, first):
    assert first_error(log).endswith(first)
