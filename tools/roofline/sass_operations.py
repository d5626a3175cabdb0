"""The instructions of SASS that decide the control flow of a thread, as operations on registers and predicates.

Known are integers, predicates and the kernel's parameters, which are stored in the constant bank. Unknown values are
None: the contents of memory, floats, and results of unknown values.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..kernels.cuda_code import Instruction

Value = int | None
Operation = Callable[["Thread"], None]
Getter = Callable[["Thread"], Value]

WORD = 0xFFFFFFFF
_REGISTER = re.compile(r"([-~|]*)(U?R)(\d+|Z)((?:\.\w+)*)\|?$")
PREDICATE = re.compile(r"(!?)(U?P)([0-6T])$")
_CONSTANT = re.compile(r"([-~|]*)c\[0x([0-9a-f]+)\]\[(?:(U?R)(\d+|Z)\+?)?(-?0x[0-9a-f]+)?\]\|?$")
_NUMBER = re.compile(r"-?(0x[0-9a-f]+|\d+)$")
_NO_RESULT = re.compile(
    r"(ST[GSL]?|RED|BRA|BRX|EXIT|CALL|RET|BSSY|BSYNC|BREAK|BAR|WARPSYNC|NOP|DEPBAR|ERRBAR|MEMBAR|YIELD|CCTL)$"
)


class Split(NamedTuple):
    """The operands of an instruction: leading predicates, result, sources, trailing predicates."""

    outs: tuple[str, ...]
    result: str
    sources: tuple[str, ...]
    ins: tuple[str, ...]


def operands_of(instruction: Instruction) -> list[str]:
    text = instruction.operands.replace(".reuse", "").strip()
    return [word.strip() for word in text.split(",")] if text else []


def split(instruction: Instruction) -> Split:
    words = operands_of(instruction)
    outs, ins = [], []
    while words and PREDICATE.match(words[0]):
        outs.append(words.pop(0))
    result = ""
    if not re.search(r"SETP|PLOP3", instruction.name) and not _NO_RESULT.match(instruction.name) and words:
        result = words.pop(0)
        while words and PREDICATE.match(words[0]):
            outs.append(words.pop(0))
    while words and PREDICATE.match(words[-1]):
        ins.insert(0, words.pop())
    return Split(tuple(outs), result, tuple(words), tuple(ins))


def width_of(instruction: Instruction) -> int:
    """The registers of the result."""
    name, opcode = instruction.name, instruction.opcode
    if name in ("SHF", "USHF", "I2F"):
        return 1
    if ".128" in opcode:
        return 4
    wide = name in ("CS2R", "DADD", "DMUL", "DFMA") and ".32" not in opcode
    return 2 if wide or re.search(r"\.64|WIDE|F2F\.F64|F2I\.[US]64", opcode) else 1


# ---- values ----


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def bits_of(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def rounded_up(number: int) -> int:
    """The bits of a natural number as float32, rounded up."""
    bits = bits_of(float(number))
    return bits if float_of(bits) >= number else bits + 1


def looked_up(table: int, *bits: bool | None) -> bool | None:
    """A truth table, looked up at bits that may be unknown."""
    if None not in bits:
        return bool(table >> sum(bool(bit) << k for k, bit in enumerate(reversed(bits))) & 1)
    found = {0}
    for bit in bits:
        found = {2 * index + each for index in found for each in ((False, True) if bit is None else (bit,))}
    values = {table >> index & 1 for index in found}
    return bool(values.pop()) if len(values) == 1 else None


@functools.cache
def _names(name: str, width: int) -> tuple[str, ...]:
    """Consecutive registers; none for RZ."""
    match = _REGISTER.match(name)
    if match is None or match[3] == "Z":
        return ()
    return tuple(f"{match[2]}{int(match[3]) + k}" for k in range(width))


class Thread:
    """Registers and predicates of a thread, and the kernel's parameters."""

    def __init__(self, parameters: bytes, parameters_at: int, special: Mapping[str, int]) -> None:
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {}
        self.parameters, self.parameters_at, self.special = parameters, parameters_at, special

    def constant(self, at: int, size: int) -> Value:
        at -= self.parameters_at
        if at < 0 or at + size > len(self.parameters):
            return None
        return int.from_bytes(self.parameters[at : at + size], "little")

    def predicate(self, word: str) -> bool | None:
        negated = word.startswith("!")
        name = word.removeprefix("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return value if value is None else value != negated

    def set_predicate(self, name: str, value: bool | None) -> None:
        if name not in ("PT", "UPT"):
            self.predicates[name] = value

    def set(self, name: str, value: Value, width: int = 1) -> None:
        """Sets consecutive registers."""
        for k, each in enumerate(_names(name, width)):
            self.registers[each] = None if value is None else value >> 32 * k & WORD


def getter(word: str, wide: bool = False) -> Getter:
    """An operand of 32 or 64 bits; negation is not truncated to 32, to keep the carry."""
    if match := _NUMBER.match(word):
        number = int(word, 0) & (2**64 - 1 if wide else WORD)
        return lambda thread: number
    sign = ""
    if match := _REGISTER.match(word):
        sign, kind, index, part = match.groups()
        names = [] if index == "Z" else [f"{kind}{index}"] + ([f"{kind}{int(index) + 1}"] if wide else [])
        byte = int(part[2]) if re.match(r"\.B\d", part) else None
        if len(names) == 1 and not sign and byte is None:
            (name,) = names
            return lambda thread: thread.registers.get(name, 0)

        def value(thread: Thread) -> Value:
            words = [thread.registers.get(name, 0) for name in names]
            if None in words:
                return None
            total = sum(each << 32 * k for k, each in enumerate(words) if each is not None)
            return total if byte is None else total >> 8 * byte & 0xFF
    elif match := _CONSTANT.match(word):
        sign, bank, kind, index, offset = match.groups()
        at, base = int(offset or "0", 0), f"{kind}{index}" if kind else None

        def value(thread: Thread) -> Value:
            start = 0 if base is None or base.endswith("Z") else thread.registers.get(base)
            return None if start is None or int(bank, 16) else thread.constant(signed(start) + at, 8 if wide else 4)
    else:
        return lambda thread: None
    if "~" in sign:
        return lambda thread: None if (v := value(thread)) is None else ~v & WORD
    if "-" in sign:
        return lambda thread: None if (v := value(thread)) is None else (~v & WORD) + 1
    return value if "|" not in sign else lambda thread: None


# ---- instructions ----


def _sum(i: Instruction, s: Split) -> Operation:
    terms = [getter(word) for word in s.sources]
    carried = ".X" in i.opcode

    def run(thread: Thread) -> None:
        values = [term(thread) for term in terms]
        carries = [thread.predicate(word) for word in s.ins] if carried else []
        total = None if None in values or None in carries else sum(v for v in (*values, *carries) if v is not None)
        thread.set(s.result, total)
        for k, out in enumerate(s.outs):
            thread.set_predicate(out, None if total is None else total >> 32 > k)

    return run


def _product(i: Instruction, s: Split) -> Operation:
    wide, high = "WIDE" in i.opcode, ".HI" in i.opcode
    is_signed = (wide or high) and ".U32" not in i.opcode
    a, b = (getter(word) for word in s.sources[:2])
    c = getter(s.sources[2], wide or high)

    def run(thread: Thread) -> None:
        x, y, z = a(thread), b(thread), c(thread)
        carry: Value = 0
        if ".X" in i.opcode:
            given = thread.predicate(s.ins[-1])
            carry = None if given is None else int(given)
        if (x == 0 or y == 0) and z is not None and carry is not None:
            total: Value = z + carry
        elif x is None or y is None or z is None or carry is None:
            total = None
        else:
            total = (signed(x) * signed(y) if is_signed else x * y) + z + carry
        thread.set(s.result, total if total is None or not high else total >> 32, 2 if wide else 1)
        for out in s.outs:
            thread.set_predicate(out, None if total is None else bool(total >> (64 if wide or high else 32) & 1))

    return run


def _shift_and_add(i: Instruction, s: Split) -> Operation:
    high, extended = ".HI" in i.opcode, ".SX32" in i.opcode
    *words, amount = s.sources
    values = [getter(word) for word in words]
    shift = int(amount, 0)

    def run(thread: Thread) -> None:
        found = [value(thread) for value in values]
        carry = thread.predicate(s.ins[0]) if ".X" in i.opcode else False
        total = None
        if None not in found and carry is not None:
            a, b, *more = (each for each in found if each is not None)
            sign = WORD if a >> 31 else 0
            upper = sign if extended else more[0] if more else 0
            shifted = (upper << 32 | a) << shift >> 32 if high else a << shift
            total = (shifted & WORD) + b + carry
        thread.set(s.result, total)
        for out in s.outs:
            thread.set_predicate(out, None if total is None else bool(total >> 32))

    return run


def _shift(i: Instruction, s: Split) -> Operation:
    values = [getter(word) for word in s.sources]
    left, is_64, high = ".L" in i.opcode, "64" in i.opcode, ".HI" in i.opcode
    arithmetic = ".S32" in i.opcode or ".S64" in i.opcode

    def run(thread: Thread) -> None:
        a, amount, c = (value(thread) for value in values)
        if a is None or amount is None or c is None:
            return thread.set(s.result, None)
        amount &= 63 if is_64 else 31
        both = c << 32 | a
        if not left:
            if arithmetic and c >> 31 and (is_64 or high):
                both -= 1 << 64
            both >>= amount
        else:
            both <<= amount
        return thread.set(s.result, both >> 32 if high else both)

    return run


def _compare(i: Instruction, s: Split) -> Operation:
    a, b = (getter(word) for word in s.sources)
    _, relation, *rest = i.opcode.split(".")
    unsigned, extended = "U32" in rest, "EX" in rest
    together = next(word for word in rest if word in ("AND", "OR", "XOR"))

    def run(thread: Thread) -> None:
        x, y = a(thread), b(thread)
        below = thread.predicate(s.ins[1]) if extended else None
        result: bool | None = None
        if x is not None and y is not None:
            x, y = x & WORD, y & WORD
            if not unsigned:
                x, y = signed(x), signed(y)
            if not extended or x != y:
                result = {"EQ": x == y, "NE": x != y, "LT": x < y, "LE": x <= y, "GT": x > y, "GE": x >= y}[relation]
            else:
                result = below
        given = thread.predicate(s.ins[0])
        table = {"AND": 0b1000, "OR": 0b1110, "XOR": 0b0110}[together]
        for out, one in zip(s.outs, (result, None if result is None else not result), strict=True):
            thread.set_predicate(out, looked_up(table, one, given))

    return run


def _logic(i: Instruction, s: Split) -> Operation:
    *words, table_word = s.sources
    values, table = [getter(word) for word in words], int(table_word, 0)

    def run(thread: Thread) -> None:
        a, b, c = (value(thread) for value in values)
        result = None
        if table == 0xC0 and 0 in (a, b):
            result = 0
        elif a is not None and b is not None and c is not None:
            result = 0
            for row in range(8):
                if table >> row & 1:
                    result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c) & WORD
        thread.set(s.result, result)
        for out in s.outs:
            thread.set_predicate(out, None if result is None else result != 0)

    return run


def _logic_of_predicates(i: Instruction, s: Split) -> Operation:
    *words, first, second = operands_of(i)
    tables = int(first, 0), int(second, 0)

    def run(thread: Thread) -> None:
        bits = [thread.predicate(word) for word in words[2:]]
        for out, table in zip(words[:2], tables, strict=True):
            thread.set_predicate(out, looked_up(table, *bits))

    return run


def _select(i: Instruction, s: Split) -> Operation:
    a, b = (getter(word) for word in s.sources)

    def run(thread: Thread) -> None:
        chosen, x, y = thread.predicate(s.ins[0]), a(thread), b(thread)
        thread.set(s.result, (x if chosen else y) if chosen is not None else x if x == y else None)

    return run


def _move(i: Instruction, s: Split) -> Operation:
    value = getter(s.sources[0])
    return lambda thread: thread.set(s.result, value(thread))


def _constant(i: Instruction, s: Split) -> Operation:
    width = width_of(i)
    match = _CONSTANT.match(s.sources[0])
    if match is None:
        return lambda thread: thread.set(s.result, None, width)
    _, bank, kind, index, offset = match.groups()
    size = 1 if ".U8" in i.opcode else 4 * width

    def run(thread: Thread) -> None:
        start = thread.registers.get(f"{kind}{index}") if kind and index != "Z" else 0
        known = start is not None and not int(bank, 16)
        value = thread.constant(signed(start or 0) + int(offset or "0", 0), size) if known else None
        thread.set(s.result, value, width)

    return run


def _special(i: Instruction, s: Split) -> Operation:
    if s.sources[0] == "SRZ":
        return lambda thread: thread.set(s.result, 0, width_of(i))
    return lambda thread: thread.set(s.result, thread.special.get(s.sources[0]), width_of(i))


def _halves(i: Instruction, s: Split) -> Operation:
    """A constant: `HFMA2 R5, -RZ, RZ, 0, 2.4e-06`."""
    if not all("RZ" in word for word in s.sources[:2]):
        return _unknown(i, s)
    try:
        high, low = (struct.unpack("<H", struct.pack("<e", float(word)))[0] for word in s.sources[2:])
    except ValueError:
        return _unknown(i, s)
    return lambda thread: thread.set(s.result, high << 16 | low)


def _bytes(i: Instruction, s: Split) -> Operation:
    a, chosen, b = (getter(word) for word in s.sources)

    def run(thread: Thread) -> None:
        x, which, y = a(thread), chosen(thread), b(thread)
        if x is None or which is None or y is None:
            return thread.set(s.result, None)
        both, result = y << 32 | x, 0
        for k in range(4):
            nibble = which >> 4 * k & 0xF
            byte = both >> 8 * (nibble & 7) & 0xFF
            result |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * k
        return thread.set(s.result, result)

    return run


def _pack_predicates(i: Instruction, s: Split) -> Operation:
    value, mask = getter(s.sources[1]), int(s.sources[2], 0)

    def run(thread: Thread) -> None:
        bits = [thread.predicate(f"P{k}") for k in range(7) if mask >> k & 1]
        kept = value(thread)
        total = None
        if None not in bits and kept is not None:
            set_bits = sum(1 << k for k in range(7) if mask >> k & 1 and thread.predicate(f"P{k}"))
            total = kept & ~mask | set_bits
        thread.set(s.result, total)

    return run


def _unpack_predicates(i: Instruction, s: Split) -> Operation:
    value, mask = getter(s.sources[0]), int(s.sources[1], 0)

    def run(thread: Thread) -> None:
        found = value(thread)
        for k in range(7):
            if mask >> k & 1:
                thread.set_predicate(f"P{k}", None if found is None else bool(found >> k & 1))

    return run


def _to_float(i: Instruction, s: Split) -> Operation:
    if ".RP" not in i.opcode:
        return _unknown(i, s)
    value = getter(s.sources[0], ".U64" in i.opcode)
    return lambda thread: thread.set(s.result, None if (v := value(thread)) is None else rounded_up(v))


def _from_float(i: Instruction, s: Split) -> Operation:
    value, width = getter(s.sources[0]), width_of(i)
    most = 2 ** (32 * width) - 1

    def run(thread: Thread) -> None:
        bits = value(thread)
        thread.set(s.result, None if bits is None else min(int(max(float_of(bits), 0.0)), most), width)

    return run


def _reciprocal(i: Instruction, s: Split) -> Operation:
    if i.opcode != "MUFU.RCP":
        return _unknown(i, s)
    value = getter(s.sources[0])

    def run(thread: Thread) -> None:
        bits = value(thread)
        thread.set(s.result, bits_of(1 / float_of(bits)) if bits is not None and bits << 1 & WORD else None)

    return run


def _unknown(i: Instruction, s: Split) -> Operation:
    width = width_of(i)

    def run(thread: Thread) -> None:
        if s.result:
            thread.set(s.result, None, width)
        for out in s.outs:
            thread.set_predicate(out, None)

    return run


_COMPUTED: dict[str, Callable[[Instruction, Split], Operation]] = {
    "IADD3": _sum, "VIADD": _sum, "IADD": _sum, "IMAD": _product, "LEA": _shift_and_add, "SHF": _shift,
    "ISETP": _compare, "LOP3": _logic, "PLOP3": _logic_of_predicates, "SEL": _select, "MOV": _move, "R2UR": _move,
    "LDC": _constant, "ULDC": _constant, "LDCU": _constant, "S2R": _special, "S2UR": _special, "CS2R": _special,
    "HFMA2": _halves, "PRMT": _bytes, "P2R": _pack_predicates, "R2P": _unpack_predicates, "I2F": _to_float,
    "F2I": _from_float, "MUFU": _reciprocal,
}  # fmt: skip


def operation(i: Instruction) -> Callable[[Thread], bool]:
    """A function that executes the instruction, and returns whether its predicate held."""
    s = split(i)
    if i.name == "R2P":
        s = Split((), "", tuple(operands_of(i)[1:]), ())
    make = _COMPUTED.get(i.name) or (_COMPUTED.get(i.name[1:]) if i.name.startswith("U") else None) or _unknown
    if i.name == "MOV" and len(s.sources) > 1:
        s = s._replace(sources=s.sources[:1])
    run = make(i, s)
    set_unknown = _unknown(i, s)

    def guarded(thread: Thread) -> bool:
        runs = thread.predicate(i.guard) if i.guard else True
        if runs is None:
            set_unknown(thread)
        elif runs:
            run(thread)
        return runs is not False

    return guarded
