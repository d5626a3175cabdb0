"""The compiled extension: possible paths, and the module loaded by this process.

The extension is installed with the package or, if missing or built for another torch, compiled into the user's cache by
`python -m asgl_cuda build`: one for each torch, Python and state of the sources.
"""

from __future__ import annotations

import os
import pwd
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from .. import ops  # noqa: F401  # defines the operators that the extension looks up when it is loaded
from . import build_notes
from .build_notes import EXTENSION, BuildInfo

PACKAGE = Path(__file__).parents[1]
BUILD = "python -m asgl_cuda build"  # the remedy in errors
NO_SOURCES = (
    "the sources, which were installed with asgl_cuda, are gone. "
    "To install them again, in a checkout of it: pip install --force-reinstall --no-deps --no-build-isolation ."
)


def fits(info: BuildInfo) -> bool:
    """An extension loads in any torch of the same minor version."""
    return _minor(info.torch_version) == _minor(torch.__version__)


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def source_directory() -> Path | None:
    """The folder of the sources: in the package, or beside it in a checkout."""
    folders = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
    return next((path for path in folders if (path / "ops/bindings.cpp").is_file()), None)


def cache_directory() -> Path:
    """Directory of the user's extensions for this torch and Python. Raises FileNotFoundError if no home is known.

    A relative XDG_CACHE_HOME is ignored, as its specification requires.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(cache).is_absolute():
        cache = f"{_home()}/.cache"
    return Path(cache, "asgl_cuda", f"torch-{torch.__version__}-{EXTENSION_SUFFIXES[0].split('.')[1]}")


def _home() -> str:
    home = os.environ.get("HOME", "")
    if not Path(home).is_absolute():
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            raise FileNotFoundError("HOME is not set, and the user is unknown to the system") from None
    return home


def build_directory(sources: Path) -> Path:
    """The path in the cache of the extension built from these sources."""
    return cache_directory() / build_notes.digest_of_build(sources, PACKAGE)


def _directories() -> list[Path]:
    """The user's build first, made because the installed one did not work."""
    found = [PACKAGE]
    try:
        sources = source_directory() if cache_directory().is_dir() else None
        if sources is not None:
            found.insert(0, build_directory(sources))
    except OSError:  # a home without access
        pass
    return found


def _has_extension(folder: Path) -> bool:
    """Whether the notes fit this torch."""
    try:
        info = build_notes.read(folder)
    except ValueError:
        return False
    return info is not None and fits(info)


def _hidden_installation() -> Path | None:
    """An installation with an extension for this torch, hidden by this package on sys.path."""
    folders = [Path(entry or ".").resolve() / PACKAGE.name for entry in sys.path]
    return next((each for each in folders if each != PACKAGE.resolve() and _has_extension(each)), None)


def _misfit(info: BuildInfo) -> str | None:
    """The reason why an extension with these notes does not fit this process."""
    if not fits(info):
        return f"it was built for torch {info.torch_version}, and this is torch {torch.__version__}"
    if info.file != EXTENSION:
        return f"it was built for another Python: it is {info.file}, and this Python loads {EXTENSION}"
    sources = source_directory()
    try:
        if sources is not None and info.sources != build_notes.digest_of_build(sources, PACKAGE):
            return f"it was built from other sources than those in {sources}"
    except OSError:  # unreadable sources are not compared
        pass
    return None


def load() -> tuple[ModuleType | None, BuildInfo | None, str | None, dict[Path, str]]:
    """The extension and its notes, or the reason for none with a remedy; and any damage by directory."""
    found: list[tuple[Path, BuildInfo]] = []
    whys: list[str] = []
    damage: dict[Path, str] = {}
    for path in _directories():
        try:
            info = build_notes.read(path)
        except ValueError as error:
            damage[path] = str(error)
            continue
        if info is not None:
            found.append((path, info))
        elif (path / EXTENSION).exists():
            unended = "its build was not ended, or is of an earlier version"
            whys.append(f"{path / EXTENSION} has no {build_notes.NOTES} beside it: {unended}")
    found.sort(key=lambda each: each[1].cuda is None)  # stable: extensions with CUDA kernels first
    for path, info in found:
        misfit = _misfit(info)
        if misfit is not None:
            whys.append(misfit)
            continue
        try:
            build_notes.check(path, info)
        except ValueError as error:
            damage[path] = str(error)
            continue
        except FileNotFoundError:
            whys.append(f"{path / EXTENSION} is gone, and {build_notes.NOTES} is there")
            continue
        try:
            return _import(path / EXTENSION), info, None, damage
        except (ImportError, OSError) as error:
            whys.append(f"it does not load: {error}")
    missing = f"the compiled extension {'can not be loaded' if damage else 'is missing'}"
    hidden = _hidden_installation()
    if hidden is not None:
        what = f"{missing}: {'; '.join(damage.values())}. It is" if damage else missing
        return None, None, (
            f"{what} in {PACKAGE}, which hides the installation in {hidden}, which has it: start Python in another "
            f"folder, or build it here, too: {BUILD}"
        ), damage  # fmt: skip
    why = "; ".join([*damage.values(), *whys]) or "it was not built with this installation"
    return None, None, f"{missing}: {why}. To build it: {BUILD}", damage


def _import(path: Path) -> ModuleType:
    spec = spec_from_file_location("asgl_cuda._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


module, build_info, problem, damage = load()
