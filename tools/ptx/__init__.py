"""The PTX that compilers make of the CUDA kernels, translated to C++ and run on the CPU."""

from .backend import (
    BACKENDS,
    CHOSEN,
    DIRECTORY,
    Access,
    Launcher,
    Machine,
    TranslatedKernel,
    compiled,
    missing,
    register,
)

__all__ = ["BACKENDS", "CHOSEN", "DIRECTORY", "Access", "Launcher", "Machine", "TranslatedKernel", "compiled",
           "missing", "register"]  # fmt: skip
