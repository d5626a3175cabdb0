"""Compilation: toolkit, architectures, compiler and cache; the compilers are scripts of a few lines."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution

from asgl_cuda import extension
from asgl_cuda.extension import build_notes, compilation
from asgl_cuda.extension import command as build_module
from asgl_cuda.extension.command import build as build_command
from asgl_cuda.extension.command import first_error

ROOT = Path(__file__).parents[2]
HERE = torch.__version__

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
def test_notes_and_last_line(build, capsys, tmp_path, cuda):
    script(tmp_path / "bin" / "c++", "exit 1")
    command = build.builder(build.Plan(None, cuda, "a reason", "0123"), tmp_path)(Distribution())
    command.inplace, command.build_lib, command.build_temp = False, str(tmp_path), str(tmp_path / "objects")
    package = tmp_path / "asgl_cuda"
    package.mkdir()
    (package / build_notes.EXTENSION).write_bytes(b"built")
    command.run()
    noted = build_notes.read(package)
    assert noted[:5] == (torch.__version__, cuda, "a reason", "0123", build_notes.EXTENSION)
    build_notes.check(package, noted)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("asgl_cuda: built ")
    assert (cuda or "only the CPU kernels") in last
    assert last.endswith(": a reason")


@pytest.mark.parametrize("asked", ["", " "])
def test_compiler_without_a_name_is_not_asked_for(build, monkeypatch, tmp_path, asked):
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, asked)
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler 'c\\+\\+' on the PATH"):
        build.require_compiler()
    script(tmp_path / "bin" / "c++", "exit 1")
    build.require_compiler()
    build.plan(ROOT / "csrc", "cpu")
    assert not {"CC", "CXX"} & os.environ.keys()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("there --with=arguments", None),
        ("'there' -m64", None),
        ("missing -O2", "no C\\+\\+ compiler 'missing' on the PATH"),
        ("'a folder/there", r"CXX must be a command, .* got \"'a folder/there\" \(No closing quotation\)"),
    ],
)
def test_compiler_with_arguments(build, monkeypatch, tmp_path, asked, message):
    script(tmp_path / "bin" / "there", "exit 1")
    monkeypatch.setenv("CXX", asked)
    with nullcontext() if message is None else pytest.raises(SystemExit, match=f"^asgl_cuda: {message}"):
        build.require_compiler()


@pytest.mark.parametrize("asked", ["there", "'there'", "there --with='two words'"])
def test_compiler_with_arguments_is_one_program_for_torch(build, monkeypatch, tmp_path, asked):
    script(tmp_path / "bin" / "there", 'echo "$#"')
    monkeypatch.setenv("CXX", asked)
    build.name_compiler(tmp_path / "objects")
    output = subprocess.run([os.environ["CXX"], "-c", "a file"], capture_output=True, text=True, check=True).stdout
    assert output == f"{2 + ('--with' in asked)}\n"


@pytest.mark.parametrize(("asked", "jobs"), [("3", "3"), ("many", None), ("-1", None), ("", None)])
def test_number_of_jobs(build, monkeypatch, asked, jobs):
    monkeypatch.setenv("MAX_JOBS", asked)
    build.plan(ROOT / "csrc", "cpu")
    assert os.environ["MAX_JOBS"] == (jobs or str(os.cpu_count()))


@pytest.mark.parametrize(
    ("jobs", "gigabytes", "threads"), [(4, 64, 4), (16, 64, 16), (16, 15, 4), (2, 3, 2), (2, 2, 1), (16, 0.1, 1)]
)
def test_threads_of_nvcc_fit_into_memory(build, monkeypatch, tmp_path, jobs, gigabytes, threads):
    """Five sources at a time, 750 MiB a thread."""
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", make_toolkit(tmp_path / "toolkit"))
    monkeypatch.setattr(build, "available_bytes", lambda: int(gigabytes * 2**30))
    found = build.plan(ROOT / "csrc", "cuda").extension.extra_compile_args["nvcc"]
    assert found[-1] == f"--threads={threads}"


def test_available_memory():
    assert 2**20 < compilation.available_bytes() < 2**50


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


@pytest.fixture
def cache(build, monkeypatch, tmp_path) -> Path:
    """The user's cache, on a machine with a failing compiler and without an extension."""
    monkeypatch.setenv("ASGL_CUDA_BUILD", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "build_info", None)
    script(tmp_path / "bin" / "c++", "exit 1")
    return tmp_path / "cache"


def unknown():
    raise FileNotFoundError("the user is unknown")


NOT_POSSIBLE = {
    "no compiler": (
        lambda patch, path: (path / "bin" / "c++").unlink(), "no C++ compiler 'c++' on the PATH", "apt install g++",
    ),
    "unwritable cache": (
        lambda patch, path: (path / "cache").touch(), "can't be written", "name another folder in XDG_CACHE_HOME",
    ),
    "no home": (
        lambda patch, path: patch.setattr(extension, "cache_directory", unknown),
        "no folder for the cache (the user is unknown)", "name one in XDG_CACHE_HOME",
    ),
    "no sources": (
        lambda patch, path: patch.setattr(extension, "source_directory", lambda: None),
        "the sources, which were installed with asgl_cuda, are gone",
        "in a checkout of it: pip install --force-reinstall",
    ),
    "nothing asked for": (
        lambda patch, path: patch.setenv("ASGL_CUDA_BUILD", "none"), "ASGL_CUDA_BUILD is none", "unset it",
    ),
    "CUDA without toolkit": (
        lambda patch, path: patch.setenv("ASGL_CUDA_BUILD", "cuda"), "ASGL_CUDA_BUILD is cuda, but",
        "name one in CUDA_HOME",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("damage", "problem", "remedy"), NOT_POSSIBLE.values(), ids=NOT_POSSIBLE)
def test_build_that_is_not_possible(monkeypatch, tmp_path, damage, problem, remedy):
    damage(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match=r"^asgl_cuda: [^\n]*$") as raised:
        build_command()
    assert problem in str(raised.value)
    assert remedy in str(raised.value)


def test_build_without_ninja(cache, monkeypatch, capsys):
    def run(command, stdout, **_):
        stdout.write("running build_ext\n/tmp/a.cpp:3:1: error: no\nninja: build stopped\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("asgl_cuda.extension.command.is_ninja_available", lambda: False)
    monkeypatch.setattr("asgl_cuda.extension.command.subprocess.run", run)
    message = r"^asgl_cuda: it does not compile: /tmp/a.cpp:3:1: error: no \(log: .*\.log\)$"
    with pytest.raises(SystemExit, match=message):
        build_command()
    assert "without ninja one file is compiled after the other: pip install ninja\n" in capsys.readouterr().out
    assert [path.suffix for path in cache.glob("*/*/*")] == [".log"]


def test_loading_that_ends_the_process(cache, monkeypatch):
    """The extension is compiled, and its first lines end the process that loads it."""

    def run(command, **_):
        compiling = "asgl_cuda.extension.compilation" in command
        if compiling:
            (Path(command[-1]) / "asgl_cuda").mkdir()
        return subprocess.CompletedProcess(command, 0 if compiling else -signal.SIGILL, "", "")

    monkeypatch.setattr("asgl_cuda.extension.command.subprocess.run", run)
    with pytest.raises(SystemExit, match=r"^asgl_cuda: it compiles, but loading it ends with SIGILL$"):
        build_command()


BUILDING = """
import sys, time
from pathlib import Path
from asgl_cuda.extension import command as build
with build._directory_of_this_build(Path(sys.argv[1])) as directory:
    print(directory, flush=True)
    time.sleep(600)
"""


def test_leftovers_of_a_killed_build_are_removed(cache, monkeypatch):
    """The leftovers of other versions of torch are removed, too."""
    extension.cache_directory().mkdir(parents=True)
    other = cache / "asgl_cuda/torch-1.2.3/building-before"
    (other / "objects").mkdir(parents=True)
    command = [sys.executable, "-c", BUILDING, str(extension.cache_directory())]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, living = (Path(each.stdout.readline().strip()) for each in processes)
        processes[0].kill()
        processes[0].wait()
        assert killed.exists()
        monkeypatch.setattr("asgl_cuda.extension.command._compile", lambda *_: None)
        build_command()
        assert not killed.exists()
        assert not other.exists()
        assert living.exists()
        assert list(extension.cache_directory().iterdir()) == [living]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.parametrize("opened", [False, True])
def test_directory_that_was_taken_for_a_leftover(cache, monkeypatch, opened):
    """A concurrent build removes the new directory before it is locked: this build creates another."""
    cache.mkdir()
    lock, flock, removed = build_module._lock, fcntl.flock, []

    def remove(directory):
        if not removed:
            removed.append(directory)
            shutil.rmtree(directory)

    def lock_late(path):
        remove(path.parent)
        return lock(path)

    def flock_late(file, operation):
        remove(Path(file.name).parent)
        flock(file, operation)

    if opened:
        monkeypatch.setattr(fcntl, "flock", flock_late)
    else:
        monkeypatch.setattr(build_module, "_lock", lock_late)
    with build_module._directory_of_this_build(cache) as directory:
        assert directory != removed[0]
        build_module._remove_unless_locked(directory)
        assert directory.exists()
    assert not list(cache.iterdir())


def test_error_in_the_directory_is_not_taken_for_its_removal(cache):
    cache.mkdir()
    with pytest.raises(FileNotFoundError, match="of something else"), build_module._directory_of_this_build(cache):
        raise FileNotFoundError("of something else")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("works", [True, False])
def test_damaged_extension_in_the_cache_is_removed(cache, monkeypatch, works):
    """Also where another one works."""
    target = extension.build_directory(extension.source_directory())
    target.mkdir(parents=True)
    (target / build_notes.EXTENSION).write_bytes(b"built")
    build_notes.write(target, torch.__version__, None, "a reason", target.name)
    info = build_notes.read(target) if works else None
    (target / build_notes.EXTENSION).write_bytes(b"bui")
    monkeypatch.setattr(extension, "build_info", info)
    monkeypatch.setattr("asgl_cuda.extension.command._compile", lambda *_: None)
    build_command()
    assert not target.exists()


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
    monkeypatch.setattr(
        extension, "build_info", build_notes.BuildInfo(torch.__version__, there, "a reason", "", "", 0, 0)
    )
    compiled = []
    monkeypatch.setattr("asgl_cuda.extension.command._compile", lambda *arguments: compiled.append(arguments))
    build_command()
    assert bool(compiled) != done
    assert ("nothing to do: the extension for torch " in capsys.readouterr().out) == done


@pytest.mark.parametrize(
    ("log", "first"),
    [
        ("cc -c a.cpp\na.cpp:1:9: fatal error: Python.h: No such file\n  | ^\nninja: build stopped", ": No such file"),
        ("a.cu(7): error: no such thing\n1 error detected", "no such thing"),
        ("ptxas fatal   : Unknown option", "Unknown option"),
        ("/usr/bin/ld: cannot find -lc10\ncollect2: error: ld returned 1 exit status", "-lc10"),
        ("Traceback\n  File\nSomething else\n\n", "Something else"),
        ("", "it said nothing"),
    ],
)
def test_first_error(log, first):
    assert first_error(log).endswith(first)
