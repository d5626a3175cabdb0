"""Helpers of all benchmarks: arguments, a description of the machine, results as JSON and as tables."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

import asgl_cuda
from asgl_cuda.backends import BACKENDS, extension

from . import ROOT

Work = TypeVar("Work")

# ---- arguments ----

ARGUMENTS: dict[str, dict[str, Any]] = {
    "device": {"help": "cpu, cuda or cuda:N (default: cuda if a fused backend works there, else cpu)"},
    "repeats": {"type": int, "default": 11, "help": "number of times that each row is timed (default: %(default)s)"},
    "seconds": {"type": float, "default": math.inf, "help": "start no measurement after this time (default: no limit)"},
    "json": {"type": Path, "metavar": "FILE", "help": "also write the results to FILE"},
}


def parser_of(module: str, description: str, *shared: str) -> argparse.ArgumentParser:
    """The argument parser of `python -m <module>`, with the arguments of ARGUMENTS that are named."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description.splitlines()[0])
    for name in shared:
        parser.add_argument(f"--{name}", **ARGUMENTS[name])
    return parser


def fused_backends(device: torch.device) -> list[str]:
    return [name for name in asgl_cuda.available_backends() if name != "reference" and BACKENDS[name].supports(device)]


def device_of(parser: argparse.ArgumentParser, asked: str | None) -> torch.device:
    """The requested device, by default the GPU if a fused backend works on it, otherwise the CPU."""
    asked = asked or ("cuda" if fused_backends(torch.device("cuda")) else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        parser.error(f"--device must be cpu, cuda, or cuda:1 and so on, got {asked}")
    device = torch.device(asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {device} needs a GPU that torch can use: torch.cuda.is_available() is False")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {device} does not exist: torch finds {torch.cuda.device_count()} GPUs, from cuda:0 on")
    return device


# ---- the machine ----


def machine(device: torch.device) -> dict[str, Any]:
    """Machine and software of a measurement."""
    return {
        **(_gpu(device) if device.type == "cuda" else {}),
        "processor": _processor(),
        "instruction_set": extension.module.cpu_instruction_set() if extension.module else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "asgl_cuda": asgl_cuda.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


# Runnable processes per thread in the minute before a measurement. With more, other work slowed the measurement down.
LOADED = 2.0


def in_words(about: dict[str, Any]) -> str:
    """A short description of the result of `machine`, for the head of a table."""
    shared = " shared with other work" if about.get("load", 0) > LOADED * about["threads"] else ""
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    on = about.get("gpu") or f"{processor_in_words(about)}, {threads}{shared}"
    return f"{on}, torch {about['torch']}"


def processor_in_words(about: dict[str, Any]) -> str:
    """The processor, and the instruction set of the kernels."""
    return " with ".join(filter(None, (about["processor"], about["instruction_set"])))


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "kernels": extension.build_info.cuda if extension.build_info else None,
        "nvrtc": asgl_cuda.backends.cupy.nvrtc_version() if "cupy" in asgl_cuda.available_backends() else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str | None:
    """The output of a program, if it is installed and succeeds."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None if result.returncode == 0 else None


# ---- results ----


LONGEST = 300  # characters of a line, so that a row of a table or a training run is one


def to_json(value: Any) -> str:
    """JSON in which a dictionary or list is one line where it fits, else a line for each of its values."""
    line = json.dumps(value)
    if len(line) <= LONGEST or not isinstance(value, dict | list | tuple):
        return line
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {to_json(each)}" for key, each in value.items()) + "\n}"
    return "[\n" + ",\n".join(map(to_json, value)) + "\n]"


def write_json(file: Path | None, content: Any) -> None:
    """Writes a file atomically; None writes nothing."""
    if file is not None:
        part = file.with_suffix(".part")
        part.write_text(to_json(content) + "\n")
        part.replace(file)


def text_table(*rows: Sequence[str]) -> str:
    """The rows as text in aligned columns. The first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for name, *cells in rows
    )


def in_time(work: Sequence[Work], started: float, seconds: float, report: dict[str, Any]) -> Iterator[Work]:
    """Yields pieces of work until `seconds` after `started`, then prints and reports those that remain."""
    for number, each in enumerate(work):
        if time.monotonic() - started > seconds:
            report["not_measured"] = [str(left) for left in work[number:]]
            print(f"not measured for want of time: {'; '.join(report['not_measured'])}")
            return
        yield each


def minima(functions: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The least seconds of each function in `repeats` rounds, in which the functions take turns."""
    found = [float("inf")] * len(functions)
    for _ in range(repeats):
        for index, function in enumerate(functions):
            started = time.perf_counter()
            function()
            found[index] = min(found[index], time.perf_counter() - started)
    return found
