"""Makes ready what the GPU would wait for: the compiled extension, and CuPy's kernels in their cache.

With `--architecture 9.0` on any machine, without a GPU: what it leaves, asgl_cuda/_C.*.so, asgl_cuda/_build_info.py and
build/prepared, can be carried to one with the same Python, torch and CuPy. An extension that works is taken as it is,
unless it is known to have been compiled from other sources.
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

from . import ROOT
from .common import parser_of
from .cuda_code import CSRC
from .gpu_steps import CUPY_CACHE, PREPARED

SOURCES = PREPARED / "sources"  # a digest of what the extension was compiled from
# In a process of its own, since what is built anew can't be loaded anew.
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


def digest() -> str:
    """Of the sources and of how they are compiled."""
    return extension.build_directory(CSRC).name


def extension_problem(device: str, architecture: str) -> str | None:
    """Why it must be built, None where it works as it is."""
    if SOURCES.exists() and SOURCES.read_text() != digest():
        return "the extension was built from other sources"
    name = f"sm_{architecture.replace('.', '')}"
    result = subprocess.run(
        [sys.executable, "-c", PROBE, device, name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return None if result.returncode == 0 else (result.stderr.strip().splitlines() or ["it crashes"])[-1]


def build(architecture: str) -> bool:
    """In place, for this GPU alone; whether it could be."""
    environment = {**os.environ, "ASGL_CUDA_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        return False
    PREPARED.mkdir(parents=True, exist_ok=True)
    SOURCES.write_text(digest())
    return True


def ready(device: str, architecture: str) -> str | None:
    """Builds the extension if need be; why it does not work after all."""
    problem = extension_problem(device, architecture)
    if problem is None or device == "cpu":
        return problem
    print(f"{problem}; it is built anew", flush=True)
    if not build(architecture):
        return "the extension could not be built, for the reason above"
    return extension_problem(device, architecture)


def fill_cache(architecture: str, jobs: int) -> int:
    """Compiles all that the backend cupy can ask for; returns how many kernels there are."""
    from tests.cuda_compile import kernels_asked_for

    major, minor = map(int, architecture.split("."))
    compiled = partial(cupy.load_or_compile, architecture=cupy.target((major, minor)))
    # Anew, not as copies of this one, in which torch has threads and a GPU.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return len(list(pool.map(compiled, kernels_asked_for(), chunksize=4)))


def main() -> int:
    """Builds, if need be, then fills the cache."""
    parser = parser_of("prepare", __doc__)
    parser.add_argument("--architecture", metavar="X.Y", help="compute capability (default: that of this GPU)")
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
