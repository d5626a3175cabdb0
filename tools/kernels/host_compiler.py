"""The host's C++ compiler, as tests and tools find it; they may lack torch."""

import os
import shlex
import shutil


def command() -> list[str]:
    """The words that start it: those in CXX, or c++."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def compiler() -> list[str] | None:
    """The same where there is such a program."""
    return command() if shutil.which(command()[0]) else None
