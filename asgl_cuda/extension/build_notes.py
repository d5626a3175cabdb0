"""The notes about a compiled extension, in a file beside it: the torch it fits, its sources, its size and checksum.

They are checked before the extension is loaded, because some extensions end the process that loads them: a file that
was cut off (SIGBUS), and one whose operators have other arguments than those of ops.py (SIGABRT). This is data, read
without executing it. The module needs Python alone: setup.py loads it where the package can't be imported.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

EXTENSION = f"_C{EXTENSION_SUFFIXES[0]}"  # the file's name for this Python
NOTES = "_build_info.json"
SOURCES = ("*.cpp", "*.cu", "*.cuh", "*.h")


class BuildInfo(NamedTuple):
    """The notes; they are about an extension in the same directory."""

    torch_version: str
    cuda: str | None  # the toolkit and the architectures that the CUDA kernels were compiled by and for
    reason: str  # why with or without CUDA
    sources: str  # digest_of_build at the time
    file: str
    size: int
    checksum: int


_TYPES = {
    "torch_version": (str,), "cuda": (str, type(None)), "reason": (str,), "sources": (str,), "file": (str,),
    "size": (int,), "checksum": (int,),
}  # fmt: skip


@functools.cache
def digest_of_sources(directory: Path) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in directory.rglob(pattern)):
        digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def digest_of_build(sources: Path, package: Path) -> str:
    """Names the sources and how the package compiles them."""
    digest = hashlib.sha256(digest_of_sources(sources) + (package / "extension" / "compilation.py").read_bytes())
    return digest.hexdigest()[:16]


def write(directory: Path, torch_version: str, cuda: str | None, reason: str, sources: str) -> None:
    """Notes the new extension there. It is on the disk before the notes are, and they are there whole or not at all."""
    extension, notes = directory / EXTENSION, directory / NOTES
    with extension.open("rb") as written:
        os.fsync(written.fileno())
        content = written.read()
    info = BuildInfo(torch_version, cuda, reason, sources, EXTENSION, len(content), zlib.crc32(content))
    part = notes.with_suffix(".part")
    with part.open("w", encoding="utf-8") as writing:
        writing.write(json.dumps(info._asdict(), indent=2) + "\n")
        writing.flush()
        os.fsync(writing.fileno())
    part.replace(notes)
    notes.with_suffix(".py").unlink(missing_ok=True)  # the notes of earlier versions


def read(directory: Path) -> BuildInfo | None:
    """The notes there, None where there are none. Raises ValueError where they are damaged."""
    path = directory / NOTES
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(noted, dict) or noted.keys() != _TYPES.keys():
        raise ValueError(f"{path} is damaged: it must have {', '.join(_TYPES)}, and nothing else")
    for name, types in _TYPES.items():
        if type(noted[name]) not in types:
            raise ValueError(f"{path} is damaged: {name} is a {type(noted[name]).__name__}")
    return BuildInfo(**noted)


def check(directory: Path, info: BuildInfo) -> None:
    """Raises ValueError where the extension there is not the one that was built, FileNotFoundError where it is gone."""
    path = directory / info.file
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    if len(content) != info.size:
        raise ValueError(f"{path} is damaged: it has {len(content)} bytes, and {info.size} were built")
    # For accidents a CRC does: it takes 0.2 ms a MB, a hash 0.5 and more.
    if zlib.crc32(content) != info.checksum:
        raise ValueError(f"{path} is damaged: its checksum is another than when it was built")
