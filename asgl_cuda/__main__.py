"""The commands `python -m asgl_cuda info` and `python -m asgl_cuda check`."""

from __future__ import annotations

import argparse
import platform
import signal
import sys

import torch

from ._version import __version__
from .backends import BACKENDS, available_backends, cupy, extension, unavailable_backends
from .selfcheck import Row, check_backends


def info() -> int:
    """Prints which backends work here, and why the others do not. Returns the exit status, 0."""
    print(
        f"asgl_cuda {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    if extension.module is not None:
        print(f"CPU kernels: {extension.module.cpu_instruction_set()}, {extension.module.cpu_threads()} threads")
    if extension.build_info is not None and extension.build_info.cuda is not None:
        print(f"CUDA kernels: compiled ahead of time, {extension.build_info.cuda}")
    print(f"CuPy kernels: compiled when first used; {cupy.describe_paths()}")
    available = available_backends()
    for name, device in (("CPU", "cpu"), ("GPU", "cuda")):
        best = next(each for each in available if BACKENDS[each].supports(torch.device(device)))
        print(f"default on a {name}: {best}")
    for name in available:
        print(f"  {name:<10} works")
    problems = unavailable_backends()
    for name, problem in problems.items():
        print(f"  {name:<10} {problem}")
    page = extension.PACKAGE.parent / "docs" / "guides" / "troubleshooting.md"
    if problems and page.is_file():  # a wheel has no documentation
        print(f"what these messages mean: {page}")
    return 0


def check() -> int:
    """Compares every available backend with the reference and prints a line per case. Returns the exit status."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in check_backends():
        groups.setdefault((row.backend, row.what), []).append(row)
    if not groups:
        print("only the reference works here: nothing to compare (python -m asgl_cuda info says why)")
        return 0
    print(f"{'backend':<10}{'case':<42}{'output':>10}{'potentials':>12}{'grad x':>10}{'grad params':>13}")
    failed = 0
    for (backend, what), rows in groups.items():
        by_name = {row.quantity: row.difference.relative for row in rows}
        output = by_name.pop("s_seq" if "s_seq" in by_name else "v_seq")
        grad_x = by_name.pop("grad_x_seq")
        potentials = max(value for name, value in by_name.items() if name in ("v_last", "v_seq", "h_seq"))
        parameters = max(value for name, value in by_name.items() if name.startswith("grad_"))
        bad = [row.quantity for row in rows if not row.passed]
        failed += bool(bad)
        print(
            f"{backend:<10}{what:<42}{output:>10.1e}{potentials:>12.1e}{grad_x:>10.1e}"
            f"{parameters:>13.1e}{'  MISMATCH in ' + ', '.join(bad) if bad else ''}"
        )
    print("largest differences from the reference, relative to its largest value; 0 means the same bits")
    print(f"{len(groups) - failed} cases agree, {failed} do not")
    return 1 if failed else 0


def main() -> int:
    """Runs the command that the arguments name. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m asgl_cuda", description="What asgl_cuda can do on this machine.")
    parser.add_argument("--version", action="version", version=f"asgl_cuda {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which backends work here, and what would make the others work")
    commands.add_parser("check", help="compare every backend that works here with the reference")
    command = {"info": info, "check": check}[parser.parse_args().command]
    try:
        if extension.module is not None:
            extension.module.cpu_instruction_set()
    except ValueError as error:  # ASGL_CUDA_INSTRUCTION_SET is unavailable here
        print(error, file=sys.stderr)
        return 1
    return command()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `info | head` is no error
    sys.exit(main())
