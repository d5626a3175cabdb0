"""The host's C++ compiler, for tests and tools; needs no torch."""

import os
import shlex
import shutil


def command() -> list[str]:
    """The command: CXX, or c++."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def compiler() -> list[str] | None:
    """The command, where it is on PATH."""
    return command() if shutil.which(command()[0]) else None
