"""Compiles beforehand, so that the GPU does not wait: the extension, and CuPy's kernels into their cache.

With `--architecture 9.0` it runs on any machine, without a GPU: asgl_cuda/_C.*.so, asgl_cuda/_build_info.json
and build/prepared, which it leaves, can be carried to one with the same Python, torch and CuPy. An extension that works
is taken as it is.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from asgl_cuda import extension
from asgl_cuda.backends import cupy
from asgl_cuda.extension import build_notes
from benchmarks import ROOT
from benchmarks.common import parser_of

from .steps import CUPY_CACHE

COMPILED = ROOT / "build" / "compiled"
# It runs in a process of its own, since an extension that is built anew can't be loaded anew.
PROBE = """
import sys, torch
from asgl_cuda import extension, lif
device, architecture = sys.argv[1:]
info = extension.build_info
if extension.module is None:
    sys.exit(f"the extension is missing: {extension.problem}")
if device == "cuda" and info.cuda is None:
    sys.exit(f"the extension was built without CUDA: {info.reason}")
if device == "cuda" and architecture not in info.cuda.split():
    sys.exit(f"the extension was built for {info.cuda}, and not for {architecture}")
if device == "cpu" or torch.cuda.is_available():
    lif(torch.ones(4, 64, device=device), backend=device).sum().item()
"""


def extension_problem(device: str, architecture: str) -> str | None:
    """Why it must be built, None where it works as it is."""
    name = f"sm_{architecture.replace('.', '')}"
    result = subprocess.run(
        [sys.executable, "-c", PROBE, device, name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return None if result.returncode == 0 else (result.stderr.strip().splitlines() or ["it crashes"])[-1]


def build(architecture: str) -> bool:
    """Builds in place, for this GPU alone; returns whether that worked."""
    environment = {**os.environ, "ASGL_CUDA_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": architecture}
    if importlib.util.find_spec("setuptools") is None:
        print(f"compiling takes setuptools, which {sys.executable} does not have", flush=True)
        return False
    # Without setup.py: many a setuptools can't read pyproject.toml.
    command = [sys.executable, "-m", "asgl_cuda.extension.compilation", str(ROOT / "csrc"), str(COMPILED)]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        return False
    for name in (build_notes.EXTENSION, build_notes.NOTES):  # the notes last
        (COMPILED / "asgl_cuda" / name).replace(extension.PACKAGE / name)
    return True


def ready(device: str, architecture: str) -> str | None:
    """Builds the extension if need be; returns why it does not work after all, if it does not."""
    problem = extension_problem(device, architecture)
    if problem is None or device == "cpu":
        return problem
    print(f"{problem}; it is built anew", flush=True)
    if not build(architecture):
        return "the extension could not be built, for the reason above"
    return extension_problem(device, architecture)


def fill_cache(architecture: str, jobs: int) -> int:
    """Compiles all kernels that the backend cupy can ask for; returns how many there are."""
    from ..kernels.cuda_compile import kernels_asked_for

    major, minor = map(int, architecture.split("."))
    compiled = partial(cupy.load_or_compile, architecture=cupy.target((major, minor)))
    # The processes start anew, not as copies of this one, in which torch has threads and a GPU.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return len(list(pool.map(compiled, kernels_asked_for(), chunksize=4)))


def main() -> int:
    """Builds, if need be, then fills the cache."""
    parser = parser_of("tools.gpu_check.prepare", __doc__)
    parser.add_argument("--architecture", metavar="X.Y", help="compute capability (default: this GPU's)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program (default cuda)")
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.device == "cuda" and not arguments.architecture:
        if not torch.cuda.is_available():
            parser.error(f"torch {torch.__version__} finds no GPU, so --architecture must say for which to build")
        arguments.architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    architecture = arguments.architecture or ""
    problem = ready(arguments.device, architecture)
    print(f"{problem or 'the extension works'}, after {time.monotonic() - started:.0f} s", flush=True)
    if arguments.device == "cuda" and importlib.util.find_spec("cupy") is not None:
        os.environ.setdefault("CUPY_CACHE_DIR", str(CUPY_CACHE))
        count = fill_cache(architecture, os.cpu_count() or 1)
        print(f"{count} kernels are in {cupy.cache_directory()}, after {time.monotonic() - started:.0f} s")
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
