"""Translates the PTX that NVRTC and nvcc make of the CUDA kernels to portable C++.

A register becomes a variable, a label a label, and an instruction a call of the function with its name in arithmetic.h
or machine.h. Unknown statements are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent

_STATEMENT = re.compile(r"\s*(?:(?P<label>[\w$]+):|(?P<brace>[{}])|(?P<text>[^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(\s*\.param \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]\s*\)([^{]*)\{")
_SHARED = re.compile(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%?[\w$]+)(<\d+>)?")
_INTEGER = re.compile(r"[bus]\d+")
_GUARD = re.compile(r"@(!?)(%[\w$]+)\s+")
_SPECIAL = {"%tid.x": "m.tid_x", "%ctaid.x": "m.ctaid_x", "%ntid.x": "m.ntid_x", "%nctaid.x": "m.nctaid_x"}
_TYPES = frozenset(
    (*(f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)), "f16", "f16x2", "bf16x2", "f32", "f64", "pred")
)
_SPACES = frozenset(("param", "shared", "global"))
# Without effect on a running kernel.
_IGNORED = frozenset((".pragma", ".loc"))
_KEYWORDS = frozenset(("and", "or", "xor", "not"))


class UnknownPTXError(Exception):
    """Raised for PTX that the translator does not know."""


@dataclass
class Kernel:
    """A kernel of a PTX module: its parameters, its shared memory by name, and the text between its braces."""

    symbol: str
    param: str
    param_bytes: int
    shared: dict[str, tuple[int, int]]  # alignment and size
    most_threads: int
    first_line: int
    body: str


def kernels(ptx: str) -> dict[str, Kernel]:
    """The kernels of a PTX module, by symbol."""
    text = re.sub(r"//[^\n]*", "", ptx)
    found: dict[str, Kernel] = {}
    entries = list(_ENTRY.finditer(text))
    if not entries or len(entries) != len(re.findall(r"\.(?:entry|func)\b", text)):
        raise UnknownPTXError("expected a module of kernels of one parameter and no other functions")
    module_shared = _shared(text[: entries[0].start()])
    for entry in entries:
        symbol, _, param, size, directives = entry.groups()
        most = re.search(r"\.maxntid (\d+)", directives)
        depth, end = 1, entry.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        body = text[entry.end() : end - 1]
        used = {name: size for name, size in module_shared.items() if name in body}
        first_line = text.count("\n", 0, entry.end()) + 1
        found[symbol] = Kernel(
            symbol, param, int(size), {**used, **_shared(body)}, int(most[1]) if most else 1024, first_line, body
        )
    return found


def _shared(text: str) -> dict[str, tuple[int, int]]:
    return {name: (int(alignment), int(size)) for alignment, name, size in _SHARED.findall(text)}


def known_instructions() -> frozenset[str]:
    """The names of the functions in arithmetic.h."""
    text = (HERE / "arithmetic.h").read_text()
    return frozenset(re.findall(r"^\w[\w ]* (\w+)\([^;]*\) \{", text, re.MULTILINE))


def to_cpp(kernel: Kernel) -> str:
    """The C++ code of a kernel."""
    return _Translation(kernel).cpp()


@dataclass
class _Translation:
    kernel: Kernel
    registers: dict[str, str] = field(default_factory=dict)  # type by name, or `prefix<>` if numbered
    local: dict[str, str] = field(default_factory=dict)  # type by name in an inner scope
    used: dict[str, str] = field(default_factory=dict)
    where: str = ""  # line and text of the statement
    known: frozenset[str] = field(default_factory=known_instructions)

    def cpp(self) -> str:
        shared_bytes, self.addresses = 0, {}
        for name, (alignment, size) in self.kernel.shared.items():
            shared_bytes = -(-shared_bytes // alignment) * alignment
            self.addresses[name] = shared_bytes
            shared_bytes += size
        body = "\n".join(self._lines())
        declared = "".join(f"  {_declaration(kind, name)}\n" for name, kind in sorted(self.used.items()))
        return (
            '#include "arithmetic.h"\n\nusing namespace ptx;\n\n'
            f'extern "C" const unsigned asgl_ptx_facts[] = {{{self.kernel.param_bytes}, {shared_bytes}, '
            f"{self.kernel.most_threads}}};\n\n"
            f'extern "C" void asgl_ptx_kernel(const Machine& m) {{\n{declared}{body}\n}}\n'
        )

    def _lines(self) -> Iterator[str]:
        body, line, depth = self.kernel.body.rstrip(), self.kernel.first_line, 0
        position = start = 0
        while position < len(body):
            match = _STATEMENT.match(body, position)
            if match is None:
                raise UnknownPTXError(f"{self.kernel.symbol}: {body[position : position + 200].strip()!r}")
            before, start = start, match.end() - len(match[0].lstrip())
            line += body.count("\n", before, start)
            position = match.end()
            if match["label"]:
                yield f"{_name(match['label'])}:;"
            elif match["brace"]:
                depth += 1 if match["brace"] == "{" else -1
                self.local.clear()
                yield match["brace"]
            else:
                text = " ".join(match["text"].split())
                self.where = f"line {line}: {text}"
                try:  # the comment shows in errors of the C++ compiler
                    yield f"  {self._statement(text, depth)}  // {self.where}"
                except UnknownPTXError as error:
                    raise UnknownPTXError(f"{self.kernel.symbol}: {self.where}: {error}") from None

    def _statement(self, text: str, depth: int) -> str:
        if text.startswith("."):
            return self._directive(text, depth)
        guard = _GUARD.match(text)
        condition = ""
        if guard:
            text = text[guard.end() :]
            condition = f"if ({'!' * len(guard[1])}{self._operand(guard[2])}) "
        opcode, _, rest = text.partition(" ")
        return condition + self._instruction(opcode, _split(rest))

    def _directive(self, text: str, depth: int) -> str:
        if text.partition(" ")[0] in _IGNORED or _SHARED.match(text):
            return ""
        register = _REGISTERS.fullmatch(text)
        if register is None:
            raise UnknownPTXError("unknown directive")
        kind, name, many = register.groups()
        if kind not in _TYPES:
            raise UnknownPTXError("registers of an unknown type")
        if depth:
            self.local[name] = kind
            return _declaration(kind, _name(name))
        self.registers[name if not many else f"{name}<>"] = kind
        return ""

    def _instruction(self, opcode: str, operands: list[str]) -> str:
        words = opcode.split(".")
        first = 1 + max((i for i, word in enumerate(words) if word not in _TYPES), default=-1)
        name, types = "_".join(words[:first]), ", ".join(words[first:])
        if name in _KEYWORDS:
            name += "_"
        match words[0]:
            case "bra" if opcode in ("bra", "bra.uni"):
                return f"goto {_name(operands[0])};"
            case "ret" if opcode == "ret":
                return "return;"
            case "bar" if opcode == "bar.sync" and operands == ["0"]:
                return f'm.barrier("{self.where}");'
            case "ld" | "st":
                return self._access(words, operands)
            case "shfl" if words[1] == "sync" and words[2] in ("down", "idx") and words[3:] == ["b32"]:
                value, _, found = operands[0].partition("|")
                arguments = ", ".join((f'"{self.where}"', *map(self._operand, operands[1:])))
                to_found = f" write({self._register(found)}, got.found);" if found else ""
                return (
                    f"{{ const auto got = shuffle<Shuffle::{words[2]}>(m, {arguments}); "
                    f"write({self._register(value)}, got.value);{to_found} }}"
                )
            case "mov" if "{" in "".join(operands):
                return self._vector_move(words[1], *operands)
        if name not in self.known or not types:
            raise UnknownPTXError("unknown instruction")
        # Operands and result of an instruction with one type have that type, or are predicates.
        only = words[first] if len(words) == first + 1 else None
        machine = ["m"] if "approx" in words else []
        arguments = ", ".join((*machine, *(self._operand(each, only) for each in operands[1:])))
        result = f"{name}<{types}>({arguments})"
        to = self._register(operands[0])
        return f"{to} = {result};" if _same(self._kind(operands[0]), only) else f"write({to}, {result});"

    def _access(self, words: list[str], operands: list[str]) -> str:
        verb, *qualifiers, kind = words
        if qualifiers[:2] == ["global", "cs"]:
            del qualifiers[1]  # a hint to the caches
        vector = next((word for word in qualifiers if word in ("v2", "v4")), None)
        space = next((word for word in qualifiers if word in _SPACES), "generic")
        if len(qualifiers) != (vector is not None) + (space != "generic") or kind not in _TYPES:
            raise UnknownPTXError("unknown access")
        reads = verb == "ld"
        values, address = operands if reads else reversed(operands)
        registers = _split(values.strip("{}"))
        if len(registers) != int(vector[1:] if vector else 1):
            raise UnknownPTXError("an access with another number of registers")
        base, _, offset = map(str.strip, address.strip("[]").partition("+"))
        # An address in shared memory may be a 32-bit register.
        at = self._register(base) if base.startswith("%") else self._operand(base)
        at = f"u64({at}) + {int(offset or 0)}"
        arguments = ", ".join((f'"{self.where}"', at, *map(self._register if reads else self._operand, registers)))
        return f"{'load' if reads else 'store'}<Space::{space}, {kind}>(m, {arguments});"

    def _vector_move(self, kind: str, to: str, source: str) -> str:
        parts = _split((to if to.startswith("{") else source).strip("{}"))
        part = f"b{int(kind[1:]) // len(parts)}"
        if to.startswith("{"):
            return f"unpack<{kind}, {part}>({self._operand(source)}, {', '.join(map(self._register, parts))});"
        return f"write({self._register(to)}, pack<{kind}, {part}>({', '.join(map(self._operand, parts))}));"

    def _register(self, text: str) -> str:
        kind, name = self._kind(text), _name(text)
        if text not in self.local:
            self.used[name] = kind
        return name

    def _kind(self, text: str) -> str:
        numbered = f"{text.rstrip('0123456789')}<>"
        kind = self.local.get(text) or self.registers.get(text) or self.registers.get(numbered)
        if kind is None:
            raise UnknownPTXError(f"{text} is no register")
        return kind

    def _operand(self, text: str, wanted: str | None = None) -> str:
        """An expression that converts to the instruction's type for the operand, or has the type `wanted`."""
        if text in _SPECIAL:
            return f"Bits<u32>{{{_SPECIAL[text]}}}"
        if re.fullmatch(r"-?\d+", text):
            return f"Integer<{_integer(int(text))}>{{}}"
        if re.fullmatch(r"0[fF][\da-fA-F]{8}", text):
            return f"Bits<u32>{{0x{text[2:]}u}}"
        if re.fullmatch(r"0[dD][\da-fA-F]{16}", text):
            return f"Bits<u64>{{0x{text[2:]}ull}}"
        if text == self.kernel.param:
            return "Bits<u64>{m.params.begin}"
        if text in self.addresses:
            return f"Integer<kSharedBegin + {self.addresses[text]}>{{}}"
        name, kind = self._register(text), self._kind(text)
        if _same(kind, wanted):
            return f"{wanted}({name})"
        if kind == "pred":
            return f'Condition{{m, "{self.where}", {name}}}'
        return f"Bits<decltype({name})>{{{name}}}"


def _same(register: str, wanted: str | None) -> bool:
    """Whether C++ converts between these types without changing a bit."""
    if register == wanted:
        return register != "pred"
    integers = wanted is not None and _INTEGER.fullmatch(register) and _INTEGER.fullmatch(wanted)
    return bool(integers) and register[1:] == wanted[1:]


def _integer(value: int) -> str:
    """A C++ literal; C++ has none for -2^63."""
    if not -(2**63) <= value < 2**64:
        raise UnknownPTXError(f"{value} has more than 64 bits")
    value = value - 2**64 if value >= 2**63 else value
    return "-9223372036854775807ll - 1" if value == -(2**63) else f"{value}ll"


def _declaration(kind: str, name: str) -> str:
    if kind == "pred":
        return f"Predicate {name};"
    return f"{kind} {name} = kPoison<{kind}>;"


def _name(text: str) -> str:
    """The C++ name of a register or label, distinct from types such as f32."""
    return text.lstrip("%$").replace("$", "_") + "_"


def _split(operands: str) -> list[str]:
    """Splits operands; a group in braces or brackets is one operand."""
    return [each.strip() for each in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands) if each.strip()]
