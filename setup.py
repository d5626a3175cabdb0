"""Builds the compiled part of asgl_cuda; everything else is in pyproject.toml."""

import os
import platform
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

PACKAGE = Path(__file__).parent / "asgl_cuda"

# No contraction, on purpose: every backend rounds each operation as the reference does. The other two only let the
# compiler vectorise comparisons and calls; they change no value.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


class Build(BuildExtension):
    """Also notes what the extension was built for, to be compared with what it is imported into."""

    def run(self) -> None:
        super().run()
        target = PACKAGE if self.inplace else Path(self.build_lib) / "asgl_cuda"
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build_info.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')
        print(f"asgl_cuda: built the CPU extension for torch {torch.__version__} on {platform.machine()}")


os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(
    ext_modules=[
        CppExtension(
            "asgl_cuda._C",
            ["csrc/lif_cpu.cpp", "csrc/ops.cpp"],
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": Build},
)
