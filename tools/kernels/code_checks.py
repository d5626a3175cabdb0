"""Finds operations in the PTX of compiled kernels that are rounded unlike the reference's; ptxas changes none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from .cuda_code import Kernel, kernel_of


def ptx_problems(ptx: str) -> Iterator[str]:
    """The faults of all kernels of a PTX module."""
    opcode = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)\b[^;]*;", re.MULTILINE)
    _, *parts = re.split(r"\.entry\s+(\w+)", ptx)
    for symbol, body in zip(parts[::2], parts[1::2], strict=True):
        for problem in arithmetic_problems(kernel_of(symbol), opcode.findall(body)):
            yield f"{kernel_of(symbol)}: {problem}"


_EXP = {"fma.rn", "fma.rm", "ex2.approx.ftz"}
_RECIPROCAL = {"rcp.approx.ftz"}
# exp, erf and atan are libdevice's, with contraction and approximations; a surrogate's reciprocals are approximate.
SURROGATE_OPERATIONS = {
    "sigmoid": _EXP | _RECIPROCAL,
    "arctan": {"fma.rn"} | _RECIPROCAL,
    "erf": _EXP,
    "fast_sigmoid": _RECIPROCAL,
    "laplace": _EXP,
}
SURROGATE_OPERATIONS["any surrogate"] = set().union(*SURROGATE_OPERATIONS.values())
# The moments' sums of squares, and exact products (math/pair.h).
OPERATIONS_OF_MOMENTS = {"fma.rn"}
ROUNDED = ("add", "sub", "mul", "div", "rcp", "sqrt")


def arithmetic_fault(opcode: str, kernel: Kernel) -> str | None:
    """What is wrong with an opcode in this kernel, or None."""
    operation, _, kind = opcode.rpartition(".")
    name, *modifiers = operation.split(".")
    if operation in SURROGATE_OPERATIONS.get(kernel.surrogate, ()):
        return None
    if kernel.kind.startswith("moments") and operation in OPERATIONS_OF_MOMENTS:
        return None
    if opcode.startswith("call"):
        return "calls code that is not checked"
    if "ftz" in modifiers:
        return "flushes subnormal values to zero"
    if not re.fullmatch(r"b?f\d+(x2)?", kind):
        return None
    if name in ("fma", "mad"):
        return "is contracted"
    if "approx" in modifiers:
        return "is approximate"
    if name in ROUNDED and "rn" not in modifiers:
        return "may be contracted, or is not rounded to nearest"
    return None


def arithmetic_problems(kernel: Kernel, opcodes: Iterable[str]) -> Iterator[str]:
    """What is wrong with the opcodes of a kernel, each with its number of occurrences."""
    for opcode, times in sorted(Counter(opcodes).items()):
        fault = arithmetic_fault(opcode, kernel)
        if fault is not None:
            yield f"{opcode} {fault}, {times} times"
