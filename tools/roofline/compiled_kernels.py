"""The kernels that calls of the common model start, compiled for one architecture, ready to be run instruction-wise."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..kernels.cuda_code import Disassembler, Kernel, Nvcc, Usage, kernel_of, usages
from .prediction import issued, kernel_of_launch
from .recorded_calls import Launch
from .sass_run import Program

# Instantiating the launchers names no kernel, and brings just those that are called.
SOURCE = """\
#include "cuda/choose.cuh"
namespace asgl::cuda {{
{}
}}
"""
OF_MODEL = "template cudaError_t launch(LIF<Surrogate::kRectangle, true>, const {}<{}>&, cudaStream_t);"
OF_TYPE = "template cudaError_t launch(const {}<{}>&, cudaStream_t);"
SCALARS, REALS = ("float", "BFloat16"), ("float",)
INSTANTIATIONS = (
    ("ForwardParams", OF_MODEL, SCALARS), ("BackwardParams", OF_MODEL, SCALARS), ("MomentsParams", OF_TYPE, SCALARS),
    ("InputGradientParams", OF_TYPE, SCALARS), ("GradientSum", OF_TYPE, REALS),
)  # fmt: skip


class Compiled(NamedTuple):
    """A kernel, and what ptxas reports of it."""

    program: Program
    usage: Usage


class Kernels:
    """The kernels of one architecture."""

    def __init__(self, found: dict[Kernel, Compiled]) -> None:
        self._found = found
        self._issued: dict[Launch, dict[str, float]] = {}

    def of(self, launch: Launch) -> Compiled:
        """The kernel that a launch starts."""
        return self._found[kernel_of_launch(launch)]

    def issued(self, launch: Launch) -> dict[str, float]:
        """Instructions of a thread by class, as in prediction.issued, counted once for each launch."""
        if launch not in self._issued:
            self._issued[launch] = issued(self.of(launch).program, launch)
        return self._issued[launch]

    @property
    def undecided(self) -> dict[str, list[str]]:
        """The branches whose side was not known, by kernel, as far as the kernels have been run."""
        return {
            str(kernel): [f"{address:#x}" for address in sorted(compiled.program.undecided)]
            for kernel, compiled in self._found.items()
            if compiled.program.undecided
        }


def compile_kernels(nvcc: Nvcc, disassembler: Disassembler, architectures: Iterable[int]) -> dict[int, Kernels]:
    """By architecture."""
    instantiations = [text.format(params, scalar) for params, text, types in INSTANTIATIONS for scalar in types]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = directory / "kernels.cu"
        source.write_text(SOURCE.format("\n".join(instantiations)))
        nvcc.to_ptx(source, directory)
        for architecture in architectures:
            cubin, log = nvcc.to_cubin(directory, source.stem, architecture)
            reports = usages(log)
            codes = disassembler.instructions(cubin, reports)
            found[architecture] = Kernels(
                {
                    kernel_of(symbol): Compiled(Program(codes[symbol], architecture), report)
                    for symbol, report in reports.items()
                }
            )
    return found
