"""Compiles in advance, so that the GPU does not wait: the extension, and CuPy's kernels into their cache.

With `--architecture 9.0` it needs no GPU; asgl_cuda/_C.*.so, asgl_cuda/_build_info.json and build/prepared can then be
copied to a machine with the same Python, torch and CuPy. A working extension is kept.
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

from asgl_cuda.backends import cupy, extension, launcher
from asgl_cuda.backends.extension import build_notes
from benchmarks import ROOT
from benchmarks.common import parser_of

from .steps import CUPY_CACHE

COMPILED = ROOT / "build" / "compiled"
# In a separate process: a rebuilt extension can't be reloaded.
PROBE = """
import sys, torch
from asgl_cuda import lif
from asgl_cuda.backends import extension
device, architecture = sys.argv[1:]
info = extension.build_info
if extension.module is None:
    sys.exit(f"the extension is missing: {extension.problem}")
if device == "cuda" and info.cuda is None:
    sys.exit(f"the extension was built without CUDA: {info.reason}")
if device == "cuda" and not (info.code_for(tuple(map(int, architecture.split(".")))) or "").startswith("sm_"):
    sys.exit(f"the extension was built for {info.cuda}, and has no cubin for {architecture}")
if device == "cpu" or torch.cuda.is_available():
    lif(torch.ones(4, 64, device=device), backend=device).sum().item()
"""


def extension_problem(device: str, architecture: str) -> str | None:
    """Why the extension must be built; None if it works."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, device, architecture], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return None if result.returncode == 0 else (result.stderr.strip().splitlines() or ["it crashes"])[-1]


def build(architecture: str) -> bool:
    """Builds the extension in place, for one architecture; returns whether it succeeded."""
    environment = {**os.environ, "ASGL_CUDA_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": architecture}
    if importlib.util.find_spec("setuptools") is None:
        print(f"compilation needs setuptools, which {sys.executable} lacks", flush=True)
        return False
    # Without setup.py: an old setuptools can't read pyproject.toml.
    command = [sys.executable, "-m", "asgl_cuda.backends.extension.compilation", str(ROOT / "csrc"), str(COMPILED)]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        return False
    for name in (build_notes.EXTENSION, build_notes.NOTES):  # the notes last
        (COMPILED / "asgl_cuda" / name).replace(extension.PACKAGE / name)
    return True


def ready(device: str, architecture: str) -> str | None:
    """Builds the extension if needed; returns its problem, if one remains."""
    problem = extension_problem(device, architecture)
    if problem is None or device == "cpu":
        return problem
    print(f"{problem}; building it", flush=True)
    if not build(architecture):
        return "the extension could not be built, for the reason above"
    return extension_problem(device, architecture)


def fill_cache(architecture: str) -> int:
    """Compiles all kernels that the backend `cupy` can request, and returns their number."""
    major, minor = map(int, architecture.split("."))
    compiled = partial(cupy.load_or_compile, architecture=cupy.target_architecture((major, minor)))
    # Spawned: a fork would inherit torch's threads, CUDA context, and an extension from before `build`.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return len(list(pool.map(compiled, pool.submit(launcher.kernel_names).result(), chunksize=4)))


def main() -> int:
    """Builds the extension if needed, then fills the cache."""
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
        count = fill_cache(architecture)
        print(f"{count} kernels are in {cupy.cache_directory()}, after {time.monotonic() - started:.0f} s")
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
