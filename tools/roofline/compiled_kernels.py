"""The kernels of the common model, compiled, ready to be run instruction by instruction."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..kernels.cuda_code import Disassembler, Kernel, Nvcc, Usage, kernel_of, reported_usages
from .prediction import issued, kernel_of_launch
from .recorded_calls import Launch
from .sass_run import Program

# Instantiates launchers, and so only the kernels that they call.
SOURCE = """\
#include "cuda/launch_neuron.cuh"
#include "cuda/launch_normalisation.cuh"
namespace asgl::cuda {{
{}
}}
"""
SCALARS, REALS = ("float", "BFloat16"), ("float",)
MODEL = "LIF<Surrogate::kRectangle, true>"
MOMENTS = (("template cudaError_t launch_moments<{}>(const Start&);", SCALARS),)
INSTANTIATIONS = (
    ("template cudaError_t launch_settled<{}>(" + MODEL + ", const Start&);", SCALARS),
    ("template cudaError_t launch_general<{}>(const Start&);", SCALARS),
    *MOMENTS,
    ("template cudaError_t launch_input_gradient<{}>(const Start&);", SCALARS),
    ("template __global__ void asgl::gradient_sum_kernel<{}>(const GradientSum<{}>);", REALS),
)


class Compiled(NamedTuple):
    """A kernel, with the report of ptxas."""

    program: Program
    usage: Usage


class Kernels:
    """The kernels of one architecture."""

    def __init__(self, found: dict[Kernel, Compiled]) -> None:
        self._found = found
        self._issued: dict[Launch, dict[str, float]] = {}

    def __getitem__(self, launch: Launch) -> Compiled:
        return self._found[kernel_of_launch(launch)]

    def issued(self, launch: Launch) -> dict[str, float]:
        """prediction.issued, cached by launch."""
        if launch not in self._issued:
            self._issued[launch] = issued(self[launch].program, launch)
        return self._issued[launch]

    @property
    def undecided(self) -> dict[str, list[str]]:
        """Branches undecided in the runs so far, by kernel."""
        return {
            str(kernel): [f"{address:#x}" for address in sorted(compiled.program.undecided)]
            for kernel, compiled in self._found.items()
            if compiled.program.undecided
        }


def compile_kernels(
    nvcc: Nvcc,
    disassembler: Disassembler,
    architectures: Iterable[int],
    wanted: tuple[tuple[str, tuple[str, ...]], ...] = INSTANTIATIONS,
) -> dict[int, Kernels]:
    """By architecture."""
    instantiations = [text.replace("{}", scalar) for text, types in wanted for scalar in types]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = directory / "kernels.cu"
        source.write_text(SOURCE.format("\n".join(instantiations)))
        nvcc.to_ptx(source, directory)
        for architecture in architectures:
            cubin, log = nvcc.to_cubin(directory, source.stem, architecture)
            reports = reported_usages(log)
            codes = disassembler.instructions(cubin, reports)
            found[architecture] = Kernels(
                {
                    kernel_of(symbol): Compiled(Program(codes[symbol], architecture), report)
                    for symbol, report in reports.items()
                }
            )
    return found
