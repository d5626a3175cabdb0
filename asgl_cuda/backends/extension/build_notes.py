"""Notes beside a compiled extension: the torch that it fits, its sources, its size and checksum.

They are checked before the extension is loaded, because some extensions end the process that loads them: a file that
was cut off (SIGBUS), and one whose operators have other arguments than those of ops.py (SIGABRT). Notes are JSON, so
that damaged ones execute nothing. This module imports only the standard library, because setup.py loads it where the
package can't be imported.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import zlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

EXTENSION = f"_C{EXTENSION_SUFFIXES[0]}"  # the file name for this version of Python
NOTES = "_build_info.json"
SOURCES = ("*.cpp", "*.cu", "*.cuh", "*.h")


class BuildInfo(NamedTuple):
    """The notes about an extension."""

    torch_version: str
    cuda: str | None  # the toolkit and the architectures that the CUDA kernels were compiled by and for
    reason: str  # why it was built with or without CUDA
    sources: str  # digest_of_build at build time
    size: int  # bytes of the extension's file
    checksum: int  # CRC-32 of this file

    def code_for(self, capability: tuple[int, int]) -> str | None:
        """The code for a GPU of this compute capability, such as sm_86 or compute_80; None if there is none.

        A cubin runs on GPUs of the same major version and no lower minor one. The driver compiles PTX for later GPUs.
        """
        wanted = 10 * capability[0] + capability[1]
        names = re.findall(r"\b(sm|compute)_(\d+)", self.cuda or "")
        built = {kind: [int(number) for each, number in names if each == kind] for kind in ("sm", "compute")}
        cubins = [number for number in built["sm"] if number // 10 == capability[0] and number <= wanted]
        ptx = [number for number in built["compute"] if number <= wanted]
        return f"sm_{max(cubins)}" if cubins else f"compute_{max(ptx)}" if ptx else None


def release_series(torch_version: str) -> str:
    """The major and minor number of a version of torch: 2.6 of 2.6.0+cpu."""
    return ".".join(torch_version.split("+")[0].split(".")[:2])


def local_version(torch_version: str, cuda: str | None) -> str:
    """The local version of a wheel, which names the torch that it fits: torch2.13.cpu, torch2.13.cu130."""
    build = (torch_version.partition("+")[2] or "cuda") if cuda else "cpu"
    return f"torch{release_series(torch_version)}.{build}"


@functools.cache
def digest_of_sources(directory: Path) -> bytes:
    """A hash of the paths and contents of all sources of the extension in the directory."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in directory.rglob(pattern)):
        digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def digest_of_build(csrc: Path, backends: Path) -> str:
    """A hash of the sources and of compilation.py, which compiles them; `backends` is the folder of that name."""
    how = (backends / "extension" / "compilation.py").read_bytes()
    return hashlib.sha256(digest_of_sources(csrc) + how).hexdigest()[:16]


def write_notes(directory: Path, torch_version: str, cuda: str | None, reason: str, sources: str) -> None:
    """Writes the notes about the extension in this directory."""
    content = (directory / EXTENSION).read_bytes()
    info = BuildInfo(torch_version, cuda, reason, sources, len(content), zlib.crc32(content))
    (directory / NOTES).write_text(json.dumps(info._asdict(), indent=2) + "\n", encoding="utf-8")


def read_notes(directory: Path) -> BuildInfo:
    """Reads the notes and checks the extension. Raises OSError without notes, ValueError if a file is damaged."""
    notes, extension = directory / NOTES, directory / EXTENSION
    try:
        info = BuildInfo(**json.loads(notes.read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{notes} is damaged ({error})") from error
    content = extension.read_bytes()
    if len(content) != info.size:
        raise ValueError(f"{extension} is damaged: it has {len(content)} bytes instead of {info.size}")
    # A CRC is enough to find accidental damage. It takes 0.2 ms per MB, and a cryptographic hash takes at least 0.5 ms.
    if zlib.crc32(content) != info.checksum:
        raise ValueError(f"{extension} is damaged: its checksum is not the one of the file that was built")
    return info
