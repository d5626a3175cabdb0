"""Compilation of the CUDA kernels by nvcc, their names, and the reports of ptxas; needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from asgl_cuda.backends.extension import compilation
from asgl_cuda.reference.surrogates import INTEGER, SURROGATES
from benchmarks import ROOT

CSRC = ROOT / "csrc"

# Types in the names of kernels.
SCALARS = {
    torch.float32: "float", torch.float64: "double", torch.float16: "asgl::Half", torch.bfloat16: "asgl::BFloat16",
}  # fmt: skip
_DTYPES = {scalar: str(dtype).removeprefix("torch.") for dtype, scalar in SCALARS.items()}
_SURROGATES = {
    **{f"(asgl::Surrogate){surrogate.id}": name for name, surrogate in SURROGATES.items()},
    f"(asgl::Surrogate){INTEGER}": "integer",
}
ANY = "any surrogate", "any reset"  # in general kernels
INPUTS = ("", " normalised", " plain", " normalised with residual", " with residual", " by neuron")  # asgl::Input
PASSES = "forward", "backward", "backward with sums"  # asgl::Pass
# Kernels without such template arguments.
ALONE = {
    "adaptive_forward_kernel": "adaptive forward", "adaptive_backward_kernel": "adaptive backward",
    "gradient_sum_kernel": "gradient sum", "batch_norm_coefficients_kernel": "coefficients, a block each",
}  # fmt: skip


def kind_of(name: str, arguments: list[str]) -> str | None:
    """The kind of a kernel by its template arguments without type, surrogate and reset; None for an unknown kernel."""

    def several(count: str, what: str) -> str:
        return f"{count} {what}{'' if count == '1' else 's'}"

    match name, *(each.rpartition(")")[2] for each in arguments):
        case ("lif_forward_kernel" | "lif_backward_kernel" | "lif_backward_settled_kernel", lanes, given, *steps):
            length = several(lanes, "neuron") if steps in ([], ["0"]) else f"T = {steps[0]}"
            return f"{name.split('_')[1]}{INPUTS[int(given)]}, {length}"
        case "integrator_kernel", lanes, each:
            return f"integrator {PASSES[int(each)]}, {several(lanes, 'neuron')}"
        case "batch_moments_kernel", columns:
            return f"moments, {several(columns, 'column')}"
        case "batch_norm_input_gradient_kernel", columns, residual:
            return f"input gradient{' with residual' if residual == 'true' else ''}, {several(columns, 'column')}"
        case (alone,):
            return ALONE.get(alone)
    return None


class Kernel(NamedTuple):
    """An instantiation of a kernel template. `surrogate` and `reset` are empty in kernels without a neuron."""

    kind: str
    dtype: str
    surrogate: str = ""
    reset: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, self))

    @classmethod
    def from_symbol(cls, demangled: str) -> Kernel:
        """Parses `void asgl::lif_forward_kernel<float, asgl::LIF<(asgl::Surrogate)0, true>, 4, (asgl::Input)2>(.)`."""
        match = re.match(r"void asgl::(\w+)<(.*?)>\(", demangled)
        if match is None:
            return cls(demangled, "")
        name, arguments, surrogate, reset = match[1], match[2], "", ""
        model = re.search(r"asgl::LIF(?:ByOptions<\w+>|<(.*), (true|false)>)(, )?", arguments)
        if name in ("lif_backward_kernel", "adaptive_forward_kernel", "adaptive_backward_kernel"):
            surrogate, reset = ANY
        if model is not None:
            surrogate = _SURROGATES.get(model[1], ANY[0])
            reset = {"true": "hard", "false": "soft"}.get(model[2], ANY[1])
            arguments = arguments.replace(model[0], "")
        dtype, *rest = arguments.split(", ")
        return cls(kind_of(name, rest) or f"{name}<{', '.join(rest)}>", _DTYPES[dtype], surrogate, reset)


class Usage(NamedTuple):
    """The report of ptxas on a kernel for one architecture: registers per thread, and bytes of the rest."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> tuple[int, int, int]:
        return self.stack, self.spill_stores, self.spill_loads


def run(command: Iterable[str | Path]) -> str:
    """Runs a command that must succeed. Returns its output and errors."""
    words = [str(word) for word in command]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(words)}\n{result.stdout}")
    return result.stdout


class Nvcc:
    """The compiler nvcc."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.flags = compilation.NVCC_FLAGS
        self._oldest = compilation.OLDEST_ARCHITECTURE
        # PTX targets, the sources of all architectures.
        self._virtual = (compilation.OLDEST_ARCHITECTURE, compilation.SHARED_ARCHITECTURE)

    @classmethod
    def find(cls) -> Nvcc | None:
        """The nvcc of the variable NVCC or on the PATH; None without one."""
        path = shutil.which(os.environ.get("NVCC", "nvcc"))
        return cls(path) if path else None

    @property
    def version(self) -> str:
        return re.search(r"V([\d.]+)", run([self.path, "--version"]))[1]

    @property
    def architectures(self) -> list[int]:
        """The architectures that both nvcc and the package support."""
        known = map(int, re.findall(r"sm_(\d+)$", run([self.path, "--list-gpu-code"]), re.MULTILINE))
        return sorted(architecture for architecture in known if architecture >= self._oldest)

    @property
    def include(self) -> Path:
        """The directory of cuda_runtime.h. If nvcc is a wrapper script, only the nvcc that it calls knows it."""
        dry = run([self.path, "-v", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull])
        return Path(re.search(r'INCLUDES="-I([^"]+)"', dry)[1].strip())

    def _virtual_for(self, architecture: int) -> int:
        """The architecture of the PTX from which an architecture is compiled."""
        return max(v for v in self._virtual if v <= architecture)

    def to_ptx(self, source: Path, directory: Path, architectures: Iterable[int]) -> list[Path]:
        """Compiles a source to the object `<name>.o` for the host, and to `<name>.compute_80.ptx` and others as needed.

        Returns the paths of the PTX files.
        """
        needed = sorted({self._virtual_for(each) for each in architectures})
        virtual = [f"-gencode=arch=compute_{v},code=compute_{v}" for v in needed]
        # One run for all, whose front end on the host's side runs once.
        command = [self.path, *self.flags, *virtual, "--threads=2", "-I", CSRC, "--keep", "--keep-dir", directory]
        run([*command, "-c", source, "-o", directory / f"{source.stem}.o"])
        paths = [directory / f"{source.stem}.compute_{v}.ptx" for v in needed]
        if len(paths) == 1:  # else --keep puts the architecture in the name
            (directory / f"{source.stem}.ptx").rename(paths[0])
        return paths

    def report(self, directory: Path, stem: str, architecture: int) -> str:
        """The report of ptxas on the PTX of `to_ptx`."""
        virtual = self._virtual_for(architecture)
        ptx, cubin = directory / f"{stem}.compute_{virtual}.ptx", directory / f"{stem}.sm_{architecture}.cubin"
        return run([self.path, *self.flags, f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", ptx, "-o", cubin])


@lru_cache
def _demangled(symbol: str) -> str:
    """The C++ name of a symbol."""
    return run(["c++filt", symbol]).strip()


def kernel_of(symbol: str) -> Kernel:
    """The kernel with this symbol."""
    return Kernel.from_symbol(_demangled(symbol))


_REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for .*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def reported_usages(log: str) -> dict[str, Usage]:
    """Parses the reports of ptxas in a log, by symbol."""
    return {
        match["symbol"]: Usage(
            *(int(match[key] or 0) for key in ("registers", "shared", "stack", "stores", "loads")),
        )
        for match in _REPORT.finditer(log)
    }
