"""Faults in the code of compiled kernels, by their PTX and SASS.

PTX shows operations rounded unlike the reference's, and accesses to a sequence narrower than a thread's four
neighbours; ptxas changes neither. Each access is traced to the pointer parameters of its address.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from ctypes import Array, Structure, c_void_p, sizeof
from typing import NamedTuple

import torch

from .cuda_code import Instruction, Kernel, kernel_of
from .structures import structure


class Operation(NamedTuple):
    """One instruction of PTX, without its guard."""

    opcode: str
    operands: str


def kernels_in(ptx: str) -> Iterator[tuple[str, list[Operation]]]:
    """Symbols with their instructions."""
    instruction = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)\b([^;]*);", re.MULTILINE)
    _, *parts = re.split(r"\.entry\s+(\w+)", ptx)
    for symbol, body in zip(parts[::2], parts[1::2], strict=True):
        yield symbol, [Operation(*found.groups()) for found in instruction.finditer(body)]


def ptx_problems(ptx: str) -> Iterator[str]:
    """The faults of all kernels."""
    for symbol, code in kernels_in(ptx):
        kernel = kernel_of(symbol)
        for problem in (*arithmetic_problems(kernel, code), *access_problems(kernel, code)):
            yield f"{kernel}: {problem}"


# ---- arithmetic ----

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
    """The opcode's fault in the kernel, if any."""
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


def arithmetic_problems(kernel: Kernel, code: Sequence[Operation]) -> Iterator[str]:
    for opcode, times in sorted(Counter(operation.opcode for operation in code).items()):
        fault = arithmetic_fault(opcode, kernel)
        if fault is not None:
            yield f"{opcode} {fault}, {times} times"


# ---- accesses ----

# The kernels in which a thread owns four neighbours, and their parameters.
FOURS = r"(forward|backward|integrator|moments|input gradient)\b.*(4 neurons|4 columns|T = \d+)"
STRUCTURES = {
    "forward": "ForwardParams",
    "backward": "BackwardParams",
    "integrator": "IntegratorParams",
    "moments": "MomentsParams",
    "input gradient": "InputGradientParams",
}
# Pointers to elements of x's type (in the integrator all sequences), and to one value for the four neighbours. Other
# pointers are to potentials and states, which are float32.
ELEMENT_MEMBERS = ("x_seq", "s_seq", "residual", "grad_s_seq", "grad_x_seq", "grad_residual")
SHARED_MEMBERS = ("parameters", "partials", "noise", "zeros", "moments", "mean", "adjoint", "gain")
UNKNOWN = "an unknown address"
BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def pointers_in(layout: type[Structure], begin: int = 0) -> dict[int, str]:
    """The outermost member of each pointer, by offset."""
    found: dict[int, str] = {}
    for member, kind, *_ in layout._fields_:
        inner, length = (kind._type_, kind._length_) if issubclass(kind, Array) else (kind, 1)
        for i in range(length):
            offset = begin + getattr(layout, member).offset + i * sizeof(inner)
            if issubclass(inner, Structure):
                found |= dict.fromkeys(pointers_in(inner, offset), member)
            elif inner is c_void_p:
                found[offset] = member
    return found


Origin = int | str  # a parameter's address, by offset; or a pointer, by name


class Move(NamedTuple):
    """A 64-bit register gets a term, another register plus `added`, or the value loaded from that address."""

    register: str
    source: str
    added: int
    loaded: bool


def moves_in(code: Sequence[Operation]) -> Iterator[Move]:
    """Address computations, term by term, and loads of parameters that may be pointers."""
    term = re.compile(r"(%\w+|\w+_param_0\b)(?:\s*[+,]\s*(-?\d+))?")  # `%rd1, 8` is the end of an addition
    for opcode, operands in code:
        loaded = opcode.startswith("ld.param.")
        if not opcode.endswith("64") or (opcode.startswith(("ld.", "st.", "setp.")) and not loaded):
            continue
        registers, _, sources = operands.partition("[" if loaded else ",")
        for i, register in enumerate(re.findall(r"%\w+", registers)):
            for source, added in term.findall(sources):
                yield Move(register, source if source[0] == "%" else "parameters", int(added or 0) + 8 * i, loaded)


def origins(code: Sequence[Operation], layout: type[Structure]) -> dict[str, set[Origin]]:
    """The origins of addresses, direct or indirect, by register."""
    pointers, size = pointers_in(layout), sizeof(layout)
    moves = list(moves_in(code))
    known: dict[str, set[Origin]] = defaultdict(set, parameters={0})
    changed = True
    while changed:  # a loop carries origins backwards
        changed = False
        for register, source, added, loaded in moves:
            names = {origin for origin in known[source] if isinstance(origin, str)}
            addresses = {origin + added for origin in known[source] if isinstance(origin, int)}
            offsets = {address for address in addresses if 0 <= address < size}
            found = {pointers[offset] for offset in offsets if offset in pointers} if loaded else names | offsets
            changed = changed or not found <= known[register]
            known[register] |= found
    return known


def expected_bits(kernel: Kernel, member: str) -> int | None:
    """The width of an access to the member: None for any, 0 for none."""
    if member == UNKNOWN:
        return 0
    if member in SHARED_MEMBERS:
        return None
    elements = member in ELEMENT_MEMBERS or (kernel.kind.startswith("integrator") and member.endswith("_seq"))
    return 4 * BITS[kernel.dtype if elements else "float32"]


def access_problems(kernel: Kernel, code: Sequence[Operation]) -> Iterator[str]:
    """Local memory in any kernel; accesses of other widths where a thread owns four neighbours."""
    local = sum(".local." in operation.opcode for operation in code)
    if local:
        yield f"{local} accesses to local memory"
    fours = re.fullmatch(FOURS, kernel.kind)
    if fours is None:
        return
    known = origins(code, structure(STRUCTURES[fours[1]], torch.float32))
    found: Counter[tuple[str, str, int]] = Counter()
    for opcode, operands in code:
        access = re.fullmatch(r"(ld|st)(?!\.(?:param|shared|local)\b).*?(?:\.v(\d))?\.[a-z]+(\d+)", opcode)
        if access is not None:
            (address,) = re.findall(r"\[\s*([%$\w]+)", operands)
            for member in {origin for origin in known[address] if isinstance(origin, str)} or {UNKNOWN}:
                found[access[1], member, int(access[2] or 1) * int(access[3])] += 1
    if kernel.kind.startswith("moments"):
        found["ld", "x_seq", BITS[kernel.dtype]] -= 1  # the shift is one value
    for (name, member, bits), times in sorted(found.items()):
        expected = expected_bits(kernel, member)
        if times > 0 and expected not in (None, bits):
            verb = {"ld": "loads from", "st": "stores to"}[name]
            yield f"{times} {verb} {member} of {bits} bits, expected {expected}"


# ---- accesses in SASS ----


class Accesses(NamedTuple):
    """Counts of global accesses: at least for four elements, at most for narrower accesses."""

    loads: int
    stores: int
    narrow_loads: int
    narrow_stores: int


def expected_accesses(kernel: Kernel) -> Accesses:
    if kernel.kind.startswith("moments"):
        return Accesses(8, 0, 1, 3)  # narrow: the shift; the moments
    residual = int("with residual" in kernel.kind)
    if kernel.kind.startswith("input gradient"):
        return Accesses(4, 2, 3 + residual, 0)  # narrow: mean, slope, offset, with a residual the gain
    normalised = "normalised" in kernel.kind
    # For each parameter, a load of one value and a load of several; three words of rng_state.
    narrow_loads = 2 * (7 if normalised else 4) + 3
    if kernel.kind.startswith("forward"):
        return Accesses(4 * (1 + residual), 4, narrow_loads, 2)  # narrow stores: the zeros behind the checkpoints
    # Partial sums have three stores: for all neurons, a run, a neuron.
    narrow_stores = 3 * (6 if normalised else 4)
    stores = 4 * (1 + residual)
    if "T = " in kernel.kind:  # x and the gradient
        return Accesses((2 + residual) * 4, stores, narrow_loads, narrow_stores)
    # x and the gradient, before the loops and inside; normalised kernels load x twice.
    return Accesses(2 * ((3 if normalised else 2) + residual) * 4, stores, narrow_loads, narrow_stores)


def sass_problems(kernel: Kernel, code: Sequence[Instruction]) -> Iterator[str]:
    """The faults of a hot kernel: local memory, or accesses narrower than four elements."""
    local = [i for i in code if i.name in ("LDL", "STL")]
    if local:
        yield f"{len(local)} accesses to local memory"
    bits = 4 * BITS[kernel.dtype]
    expected = expected_accesses(kernel)
    for verb, name, least, most_narrow in (
        ("loads", "LDG", expected.loads, expected.narrow_loads),
        ("stores", "STG", expected.stores, expected.narrow_stores),
    ):
        widths = [i.bits for i in code if i.name == name]
        narrow = sum(width < bits for width in widths)
        if widths.count(bits) < least:
            yield f"{widths.count(bits)} {verb} of {bits} bits, expected at least {least}"
        if narrow > most_narrow:
            yield f"{narrow} {verb} of fewer than {bits} bits, expected at most {most_narrow}"
