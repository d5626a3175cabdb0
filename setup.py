"""Builds the compiled part of asgl_cuda; everything else is in pyproject.toml.

ASGL_CUDA_BUILD says what to compile: cpu, the default, or none, which leaves only the PyTorch reference.
"""

import os
import platform
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"asgl_cuda: it is built against the torch that it will run with, and that does not import here ({error}). "
        'First: pip install torch "setuptools>=77" ninja. Then what failed, with --no-build-isolation.'
    ) from error

PACKAGE = Path(__file__).parent / "asgl_cuda"

# No contraction, on purpose: every backend rounds each operation as the reference does. The next two only let the
# compiler vectorise comparisons and calls; they change no value. Debug symbols, which many a Python asks for, would
# make the extension ten times as large.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"]


class Build(BuildExtension):
    """Also notes what the extension was built for, to be compared with what it is imported into."""

    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            raise SystemExit(
                f"asgl_cuda: no C++ compiler {compiler!r} on the PATH. Install one (Debian, Ubuntu: apt install g++), "
                "name another in CXX, or set ASGL_CUDA_BUILD=none to do without the fast kernels."
            )
        super().run()
        target = PACKAGE if self.inplace else Path(self.build_lib) / "asgl_cuda"
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build_info.py").write_text(
            f"TORCH_VERSION = {torch.__version__!r}\nCUDA = None\nREASON = 'not yet'\n"
        )
        print(f"asgl_cuda: built the CPU kernels for torch {torch.__version__} on {platform.machine()} ({REASON})")


class BuildWithoutExtension(build_py):
    """The package less what an earlier build has left in the source tree."""

    def run(self) -> None:
        super().run()
        target = PACKAGE if self.editable_mode else Path(self.build_lib) / "asgl_cuda"
        for leftover in (target / "_build_info.py", *target.glob("_C.*")):
            leftover.unlink(missing_ok=True)
        print(f"asgl_cuda: built no kernels, only the PyTorch reference ({REASON})")


wanted = os.environ.get("ASGL_CUDA_BUILD")
REASON = "the default" if wanted is None else f"ASGL_CUDA_BUILD={wanted}"
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

if wanted in (None, "cpu"):
    extension = CppExtension(
        "asgl_cuda._C",
        ["csrc/lif_cpu.cpp", "csrc/ops.cpp"],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-fopenmp"],
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})
elif wanted == "none":
    setup(cmdclass={"build_py": BuildWithoutExtension})
else:
    raise SystemExit(f"asgl_cuda: ASGL_CUDA_BUILD must be cpu or none, got {wanted!r}")
