"""Builds asgl_cuda's extension, by asgl_cuda/backends/extension/compilation.py; the metadata is in pyproject.toml.

ASGL_CUDA_BUILD: cuda or cpu, as in compilation.py, or none: the PyTorch reference alone.
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
OLDEST_SETUPTOOLS = 77  # also in pyproject.toml, and required to read it


def require_setuptools() -> None:
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"asgl_cuda: setup.py takes setuptools {OLDEST_SETUPTOOLS} or newer, and this is {setuptools.__version__}: "
            f'pip install "setuptools>={OLDEST_SETUPTOOLS}"'
        )


def load_compilation() -> ModuleType:
    """Imports compilation.py without its parent packages, which would load an earlier build's extension."""
    for name in ("asgl_cuda", "asgl_cuda.backends", "asgl_cuda.backends.extension"):
        package = ModuleType(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
        sys.modules[name] = package
    try:
        return import_module("asgl_cuda.backends.extension.compilation")
    except ImportError as error:
        raise SystemExit(
            f"asgl_cuda: it is built against the torch that it will run with, and that does not import here ({error}). "
            f'First: pip install torch "setuptools>={OLDEST_SETUPTOOLS}" ninja. Then what failed, with '
            "--no-build-isolation."
        ) from error


class BuildPackage(build_py):
    """Adds csrc to the package, for CuPy's kernels."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # csrc is found beside the package
            return
        target = Path(self.build_lib) / "asgl_cuda" / "csrc"
        ignored = shutil.ignore_patterns("*.md")
        shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True, ignore=ignored)


class BuildWithoutExtension(BuildPackage):
    """Removes the files of an earlier build from the package."""

    def run(self) -> None:
        super().run()
        target = PACKAGE if self.editable_mode else Path(self.build_lib) / "asgl_cuda"
        for leftover in (*target.glob("_build_info.*"), *target.glob("_C.*")):
            leftover.unlink(missing_ok=True)
        print("asgl_cuda: compiled nothing: ASGL_CUDA_BUILD was none. What remains is the slow PyTorch reference")


def main() -> None:
    require_setuptools()
    compilation = load_compilation()
    version = import_module("asgl_cuda._version").__version__
    wanted = compilation.requested_build()
    if wanted == "none":
        setup(version=version, cmdclass={"build_py": BuildWithoutExtension})
        return
    planned = compilation.plan_build(Path("csrc"), wanted)
    commands = {"build_py": BuildPackage, "build_ext": compilation.build_command_class(planned, PACKAGE)}
    if "sdist" not in sys.argv:  # the archive fits every torch
        version += f"+{compilation.build_notes.local_version(compilation.torch.__version__, planned.cuda)}"
    setup(version=version, ext_modules=[planned.extension], cmdclass=commands)


if __name__ == "__main__":
    main()
