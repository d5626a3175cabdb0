"""The compiled part of the package: where it may be, and which one this process has loaded.

It is installed with the package or, where that one is missing or was built for another torch, compiled into the user's
cache by `python -m asgl_cuda build`: one for each torch, Python and state of the sources.
"""

from __future__ import annotations

import functools
import hashlib
import os
import runpy
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from . import ops  # noqa: F401  # it defines the operators, which the extension looks up when it is loaded

PACKAGE = Path(__file__).parent
BUILD = "python -m asgl_cuda build"  # the remedy, wherever the extension is missing or another one is wanted
NO_SOURCES = (
    "the sources, which were installed with asgl_cuda, are gone. "
    "To install them again, in a checkout of it: pip install --force-reinstall --no-deps --no-build-isolation ."
)
SOURCES = ("*.cpp", "*.cu", "*.cuh", "*.h")


class BuildInfo(NamedTuple):
    """The notes that compilation.py made when it compiled the extension."""

    torch_version: str
    cuda: str | None  # the toolkit and the architectures that the CUDA kernels were compiled by and for
    reason: str  # why with or without CUDA

    @property
    def fits(self) -> bool:
        """An extension loads in any torch of the same minor version."""
        return _minor(self.torch_version) == _minor(torch.__version__)


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def source_directory() -> Path | None:
    """Where the sources are: in the package, or beside it in a checkout."""
    places = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
    return next((path for path in places if (path / "ops.cpp").is_file()), None)


@functools.cache
def digest_of_sources(directory: Path) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in directory.rglob(pattern)):
        digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def cache_directory() -> Path:
    """Where the user's extensions for this torch and this Python are."""
    cache = os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '')}/.cache"
    return Path(cache, "asgl_cuda", f"torch-{torch.__version__}-{EXTENSION_SUFFIXES[0].split('.')[1]}")


def build_directory(sources: Path) -> Path:
    """The place in the cache for the extension that compilation.py makes of these sources."""
    digest = hashlib.sha256(digest_of_sources(sources) + (PACKAGE / "compilation.py").read_bytes())
    return cache_directory() / digest.hexdigest()[:16]


def _info_in(directory: Path) -> BuildInfo | None:
    """The notes about the extension there, None where there is none."""
    try:
        noted = runpy.run_path(str(directory / "_build_info.py"))
        return BuildInfo(noted["TORCH_VERSION"], noted["CUDA"], noted["REASON"])
    except (OSError, KeyError):
        return None


def _directories() -> list[Path]:
    """The user's own first: it was asked for because the other did not do."""
    found = [PACKAGE]
    try:
        sources = source_directory() if cache_directory().is_dir() else None
        if sources is not None:
            found.insert(0, build_directory(sources))
    except OSError:  # a home that belongs to somebody else
        pass
    return found


def _hidden_installation() -> Path | None:
    """An installation with an extension for this torch, behind the folder that this package is imported from."""
    folders = [Path(entry or ".").resolve() / PACKAGE.name for entry in sys.path]
    found = {folder: _info_in(folder) for folder in folders if folder != PACKAGE.resolve()}
    return next((folder for folder, info in found.items() if info is not None and info.fits), None)


def load() -> tuple[ModuleType | None, BuildInfo | None, str | None]:
    """The extension and its notes, or why there is none and the remedy."""
    found = [(path, info) for path in _directories() if (info := _info_in(path)) is not None]
    found.sort(key=lambda each: each[1].cuda is None)  # stable: one with CUDA kernels goes before one without
    why = "it was not built with this installation"
    for path, info in found:
        if not info.fits:
            why = f"it was built for torch {info.torch_version}, and this is torch {torch.__version__}"
            continue
        try:
            return _import(path / f"_C{EXTENSION_SUFFIXES[0]}"), info, None
        except (ImportError, OSError) as error:
            why = f"it does not load: {error}"
    missing = "the compiled extension is missing"
    hidden = _hidden_installation()
    if hidden is not None:
        return None, None, (
            f"{missing} in {PACKAGE}, which hides the installation in {hidden}, which has it: start Python in another "
            f"folder, or build it here, too: {BUILD}"
        )  # fmt: skip
    return None, None, f"{missing}: {why}. To build it: {BUILD}"


def _import(path: Path) -> ModuleType:
    spec = spec_from_file_location("asgl_cuda._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


module, build_info, problem = load()
