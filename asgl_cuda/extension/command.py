"""`python -m asgl_cuda build`: compiles the extension for the installed torch into the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from .. import extension
from . import build_notes

try:
    from torch.utils.cpp_extension import is_ninja_available

    from . import compilation
except ImportError as error:
    raise SystemExit(f"asgl_cuda: compiling takes setuptools ({error}): pip install setuptools ninja") from error

UNFINISHED = "building-"  # prefix of a directory in the cache
LOCK = "lock"  # file inside


def build() -> None:
    """Compiles what is missing; raises SystemExit with one line on failure."""
    wanted = compilation.wanted_build()
    if wanted == "none":
        raise SystemExit("asgl_cuda: ASGL_CUDA_BUILD is none, and build is there to compile: unset it")
    sources = extension.source_directory()
    if sources is None:
        raise SystemExit(f"asgl_cuda: {extension.NO_SOURCES}")
    planned = compilation.plan(sources, wanted)
    try:
        target = extension.build_directory(sources)
    except OSError as error:
        raise SystemExit(f"asgl_cuda: no folder for the cache ({error}): name one in XDG_CACHE_HOME") from error
    _clean(target)
    if extension.build_info is not None and planned.cuda in (None, extension.build_info.cuda):
        built = extension.build_info.cuda or f"without CUDA: {planned.reason}"
        print(f"asgl_cuda: nothing to do: the extension for torch {torch.__version__} works, {built}")
        return
    compilation.require_compiler()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Compiled beside the target, then moved: no process sees a partial build.
        with _directory_of_this_build(target.parent) as directory:
            _compile(planned, sources, directory, target)
    except OSError as error:
        raise SystemExit(
            f"asgl_cuda: the cache {target.parent} can't be written ({error}): name another folder in XDG_CACHE_HOME"
        ) from error


@contextlib.contextmanager
def _directory_of_this_build(parent: Path) -> Iterator[Path]:
    """A temporary directory, locked while in use: the system unlocks it if this process is killed."""
    while True:
        with tempfile.TemporaryDirectory(dir=parent, prefix=UNFINISHED, ignore_cleanup_errors=True) as name:
            lock = _lock(Path(name, LOCK))
            if lock is not None:
                with lock:
                    yield Path(name)
                return


def _lock(path: Path) -> TextIO | None:
    """The locked file, not inherited by children; None if another build removed the file first."""
    try:
        lock = path.open("w")
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX)
    if path.exists():
        return lock
    lock.close()
    return None


def _clean(target: Path) -> None:
    """Removes remains of killed builds, for any torch, and a damaged extension in the target."""
    with contextlib.suppress(OSError):
        for directory in target.parents[1].glob(f"*/{UNFINISHED}*"):
            _remove_unless_locked(directory)
    try:
        info = build_notes.read(target)
        if info is not None:
            build_notes.check(target, info)
    except (ValueError, FileNotFoundError):
        shutil.rmtree(target, ignore_errors=True)


def _remove_unless_locked(directory: Path) -> None:
    with contextlib.suppress(OSError), (directory / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)


def _compile(planned: compilation.Plan, sources: Path, directory: Path, target: Path) -> None:
    minutes = "some minutes" if planned.cuda else "a minute or two"
    what = f"{planned.kernels} for torch {torch.__version__} ({planned.reason})"
    print(f"asgl_cuda: compiling {what}: {minutes}", flush=True)
    if not is_ninja_available():
        print("asgl_cuda: without ninja one file is compiled after the other: pip install ninja", flush=True)
    started, replaces = time.perf_counter(), target.exists()
    log = directory / "log"
    command = [sys.executable, "-m", "asgl_cuda.extension.compilation", str(sources), str(directory)]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        kept = log.rename(target.with_suffix(".log"))
        error = first_error(kept.read_text(errors="replace"))
        raise SystemExit(f"asgl_cuda: it does not compile: {error} (log: {kept})")
    # A faster process's extension is as good.
    with contextlib.suppress(OSError):
        if replaces:
            target.rename(directory / "replaced")
        (directory / "asgl_cuda").rename(target)
    # A system library older than the compiler's fails only here.
    loading = [sys.executable, "-c", "import sys; from asgl_cuda import extension; sys.exit(extension.problem)"]
    result = subprocess.run(loading, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        ended = f"loading it ends with {signal.Signals(-result.returncode).name}" if result.returncode < 0 else ""
        raise SystemExit(f"asgl_cuda: it compiles, but {ended or result.stderr.strip()}")
    print(f"asgl_cuda: done in {time.perf_counter() - started:.0f} s, in {target}")


def first_error(log: str) -> str:
    """The first compiler, ptxas or linker error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    pattern = re.compile("error:|fatal|cannot find|undefined reference")
    return next((line for line in lines if pattern.search(line)), lines[-1])
