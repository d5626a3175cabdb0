"""Loads the compiled extension that is installed with the package, if it fits this process.

`compilation` builds the extension, for setup.py. `build_notes` reads and writes what is checked before it is loaded.
"""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from ..._version import __version__
from .. import ops  # noqa: F401  # defines the operators that the extension looks up when it is loaded
from . import build_notes
from .build_notes import EXTENSION, NOTES, BuildInfo

PACKAGE = Path(__file__).parents[2]


def source_directory() -> Path | None:
    """The folder of the C++ sources, in the package or in a checkout beside it. None if they are missing."""
    folders = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
    return next((path for path in folders if (path / "ops/bindings.cpp").is_file()), None)


def build_command() -> str:
    """The command that builds the extension for this torch."""
    options = "--no-build-isolation --no-deps"
    if (PACKAGE.parent / "setup.py").is_file():
        return f"pip install {options} -e {PACKAGE.parent}"
    return f"in a checkout of asgl_cuda, pip install {options} --force-reinstall ."


def missing_sources_message() -> str:
    """The message that sources are missing, with a remedy."""
    return f"the sources, which were installed with asgl_cuda, are gone. To install them again: {build_command()}"


def _misfit(info: BuildInfo) -> str | None:
    """Why the extension does not fit this torch or these sources, or None. Any torch of the same series fits."""
    if build_notes.release_series(info.torch_version) != build_notes.release_series(torch.__version__):
        name = f"asgl_cuda {__version__}+{build_notes.local_version(info.torch_version, info.cuda)}"
        return f"{name} was built for torch {info.torch_version}, and this is torch {torch.__version__}"
    sources = source_directory()
    if sources is not None and info.sources != build_notes.digest_of_build(sources, PACKAGE / "backends"):
        return f"it was built from other sources than those in {sources}"
    return None


def load_extension() -> tuple[ModuleType | None, BuildInfo | None, str | None]:
    """Loads the extension. Returns it, its notes and None; or None, None, and the problem with a remedy."""
    if not (PACKAGE / NOTES).exists():
        others = [path.name for path in PACKAGE.glob("_C.*")]
        why = f"{', '.join(others)} in {PACKAGE} has no {NOTES} beside it: its build did not end" if others else None
        return None, None, _missing_extension_message(why or f"it was not built with this installation, in {PACKAGE}")
    try:
        info = build_notes.read_notes(PACKAGE)
        why = _misfit(info)
        if why is None:
            return _import_file(PACKAGE / EXTENSION), info, None
    except FileNotFoundError:
        why = f"this Python loads {EXTENSION}, which is not in {PACKAGE}: it was built for another Python"
    except (ImportError, OSError, TypeError, ValueError) as error:
        why = str(error)
    return None, None, _missing_extension_message(why)


def _missing_extension_message(why: str) -> str:
    """The message that the extension is missing, with a remedy."""
    return f"the compiled extension is missing: {why}. To build it: {build_command()}"


def _import_file(path: Path) -> ModuleType:
    """Loads the extension module from this file."""
    spec = spec_from_file_location("asgl_cuda._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The extension, its notes and None; or None, None, and why the extension is missing, with a remedy.
module, build_info, problem = load_extension()
