"""Builds the compiled part of asgl_cuda, as asgl_cuda/extension/compilation.py says; all else is in pyproject.toml.

ASGL_CUDA_BUILD says what to compile: cuda and cpu as there; none leaves the PyTorch reference, what CuPy compiles on a
GPU, and `python -m asgl_cuda build`.
"""

from __future__ import annotations

import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = ROOT / "asgl_cuda"
OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, which older ones can't read


def require_setuptools() -> None:
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"asgl_cuda: setup.py takes setuptools {OLDEST_SETUPTOOLS} or newer, and this is {setuptools.__version__}: "
            f'pip install "setuptools>={OLDEST_SETUPTOOLS}". With any setuptools, and without an installation: '
            "python -m asgl_cuda build in this folder"
        )


def load_compilation() -> ModuleType:
    """asgl_cuda/extension/compilation.py without its packages, which would load what an earlier build has left."""
    for name, folder in (("asgl_cuda", PACKAGE), ("asgl_cuda.extension", PACKAGE / "extension")):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    try:
        return import_module("asgl_cuda.extension.compilation")
    except ImportError as error:
        raise SystemExit(
            f"asgl_cuda: it is built against the torch that it will run with, and that does not import here ({error}). "
            f'First: pip install torch "setuptools>={OLDEST_SETUPTOOLS}" ninja. Then what failed, with '
            "--no-build-isolation."
        ) from error


class BuildPackage(build_py):
    """The package with the sources: CuPy has the kernels compiled, `python -m asgl_cuda build` everything."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # they are found beside the package then
            return
        target = Path(self.build_lib) / "asgl_cuda" / "csrc"
        ignored = shutil.ignore_patterns("*.md")
        shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True, ignore=ignored)


class BuildWithoutExtension(BuildPackage):
    """The package less what an earlier build has left in the source tree."""

    def run(self) -> None:
        super().run()
        target = PACKAGE if self.editable_mode else Path(self.build_lib) / "asgl_cuda"
        for leftover in (*target.glob("_build_info.*"), *target.glob("_C.*")):
            leftover.unlink(missing_ok=True)
        print(
            "asgl_cuda: compiled no kernels: ASGL_CUDA_BUILD was none. CuPy compiles those for a GPU, "
            "python -m asgl_cuda build all"
        )


def main() -> None:
    require_setuptools()
    compilation = load_compilation()
    wanted = compilation.wanted_build()
    if wanted == "none":
        setup(cmdclass={"build_py": BuildWithoutExtension})
        return
    planned = compilation.plan(Path("csrc"), wanted)
    commands = {"build_py": BuildPackage, "build_ext": compilation.builder(planned, PACKAGE)}
    setup(ext_modules=[planned.extension], cmdclass=commands)


if __name__ == "__main__":
    main()
