"""`python -m asgl_cuda build`: compiles the extension for the torch that is installed, into the user's cache."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import extension

try:
    from torch.utils.cpp_extension import is_ninja_available

    from . import compilation
except ImportError as error:
    raise SystemExit(f"asgl_cuda: compiling takes setuptools ({error}): pip install setuptools ninja") from error


def build() -> None:
    """Compiles what is missing; SystemExit with one line where that is not possible."""
    wanted = compilation.wanted_build()
    if wanted == "none":
        raise SystemExit("asgl_cuda: ASGL_CUDA_BUILD is none, and build is there to compile: unset it")
    sources = extension.source_directory()
    if sources is None:
        raise SystemExit(f"asgl_cuda: {extension.NO_SOURCES}")
    planned = compilation.plan(sources, wanted)
    if extension.build_info is not None and planned.cuda in (None, extension.build_info.cuda):
        built = extension.build_info.cuda or f"without CUDA: {planned.reason}"
        print(f"asgl_cuda: nothing to do: the extension for torch {torch.__version__} works, {built}")
        return
    compilation.require_compiler()
    target = extension.build_directory(sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Compiled beside its place, then moved there: no other process finds half of it.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as directory:
            _compile(planned, sources, Path(directory), target)
    except OSError as error:
        raise SystemExit(
            f"asgl_cuda: the cache {target.parent} can't be written ({error}): name another folder in XDG_CACHE_HOME"
        ) from error


def _compile(planned: compilation.Plan, sources: Path, directory: Path, target: Path) -> None:
    minutes = "some minutes" if planned.cuda else "a minute or two"
    what = f"{planned.kernels} for torch {torch.__version__} ({planned.reason})"
    print(f"asgl_cuda: compiling {what}: {minutes}", flush=True)
    if not is_ninja_available():
        print("asgl_cuda: without ninja one file is compiled after the other: pip install ninja", flush=True)
    started, replaces = time.perf_counter(), target.exists()
    log = directory / "log"
    command = [sys.executable, "-m", "asgl_cuda.compilation", str(sources), str(directory)]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        kept = log.rename(target.with_suffix(".log"))
        error = first_error(kept.read_text(errors="replace"))
        raise SystemExit(f"asgl_cuda: it does not compile: {error} (log: {kept})")
    # Where another process was faster, its extension is as good.
    with contextlib.suppress(OSError):
        if replaces:
            target.rename(directory / "replaced")
        (directory / "asgl_cuda").rename(target)
    # A library of the system that is older than the compiler's shows only now.
    loading = [sys.executable, "-c", "import sys; from asgl_cuda import extension; sys.exit(extension.problem)"]
    result = subprocess.run(loading, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"asgl_cuda: it compiles, but {result.stderr.strip()}")
    print(f"asgl_cuda: done in {time.perf_counter() - started:.0f} s, in {target}")


def first_error(log: str) -> str:
    """What a compiler, ptxas or linker says first, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    pattern = re.compile("error:|fatal|cannot find|undefined reference")
    return next((line for line in lines if pattern.search(line)), lines[-1])
