"""The structures that kernels are given, and constants, read from the headers of csrc when they are first asked for.

The part of C++ that is understood: structs of numbers, pointers, enums, arrays and other structs, templates of types,
inheritance, enums, and `constexpr` integers. Anything else is an error that names it.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Iterator
from ctypes import Structure, c_bool, c_double, c_float, c_int, c_longlong, c_uint, c_ulonglong, c_ushort, c_void_p
from typing import Any

import torch

from ..extension import NO_SOURCES, source_directory

_NUMBERS = {
    "bool": c_bool, "int": c_int, "float": c_float, "double": c_double, "uint16": c_ushort, "uint32": c_uint,
    "int64": c_longlong, "int64_t": c_longlong, "uint64": c_ulonglong,
}  # fmt: skip
_REALS = {torch.float32: c_float, torch.float64: c_double, None: None}
_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift,
}  # fmt: skip


@functools.cache
def structure(name: str, real: torch.dtype | None = None) -> type[Structure]:
    """The structure of this name; `real` is the type of its arithmetic, where it is a template.

    The type of x_seq changes no layout.
    """
    names, _, _ = _definition(name)
    arguments = tuple(_REALS[real] if each == "Real" else None for each in names)
    return _structure(name, arguments, _REALS[real] if names else None)


@functools.cache
def constant(name: str) -> int:
    """The value of a `constexpr` or of an enumerator, such as kBlockThreads or Input::kPlain."""
    values = {value for enumerator, value in _enumerators() if enumerator == name}
    values.update(map(_evaluate, re.findall(rf"\bconstexpr [^;{{}}(]*?\b{name} = ([^,;]+)[,;]", _headers())))
    if len(values) != 1:
        raise ValueError(f"asgl_cuda: the headers of csrc should give {name} one value, and they give {sorted(values)}")
    return values.pop()


@functools.cache
def _headers() -> str:
    """All headers, without comments and directives, and with single spaces."""
    directory = source_directory()
    if directory is None:
        raise RuntimeError(f"asgl_cuda: {NO_SOURCES}")
    paths = sorted(path for path in directory.rglob("*.*") if path.suffix in (".h", ".cuh"))
    text = "\n".join(path.read_text() for path in paths)
    for ignored in (r"//.*", r"/\*[\s\S]*?\*/", r"(?m)^ *#(.*\\\n)*.*"):
        text = re.sub(ignored, "", text)
    return " ".join(text.split())


@functools.cache
def _enums() -> dict[str, tuple[bool, str]]:
    """The enums by name: whether enumerators need that name before them, and the enumerators."""
    found = re.findall(r"\benum (class )?(\w+)[^;{]*\{([^}]*)\}", _headers())
    return {name: (bool(scoped), body) for scoped, name, body in found}


def _enumerators() -> Iterator[tuple[str, int]]:
    for enum, (scoped, body) in _enums().items():
        value = -1
        for entry in filter(str.strip, body.split(",")):
            name, _, expression = entry.partition("=")
            value = _evaluate(expression) if expression else value + 1
            yield f"{enum}::{name.strip()}" if scoped else name.strip(), value


def _evaluate(expression: str) -> int:
    """An integer expression of C++, which may name other constants."""
    text = re.sub(r"static_cast<\w+>", "", expression)
    text = re.sub(r"\b(0[xX][\da-fA-F]+|\d+)[uUlL]*\b", r"\1", text).replace("::", ".").replace("/", "//").strip()

    def value_of(node: ast.AST) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name() | ast.Attribute():
                return constant(ast.unparse(node).replace(".", "::"))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return int(_OPERATORS[type(op)](value_of(left), value_of(right)))
        raise SyntaxError

    try:
        return value_of(ast.parse(text, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"asgl_cuda: can't read {expression.strip()!r} in the headers of csrc as an integer") from None


def _definition(name: str) -> tuple[list[str], str | None, int]:
    """The parameters of a struct's template, its base, and where its body begins."""
    found = [*re.finditer(rf"struct {name}(?: : ([^{{;]+?))? \{{", _headers())]
    if len(found) != 1:
        raise ValueError(f"asgl_cuda: the headers of csrc should define struct {name!r} once, not {len(found)} times")
    begin, base, end = found[0].start(), found[0][1], found[0].end()
    template = re.search(r"template <([^<>]*)> $", _headers()[max(begin - 200, 0) : begin])
    return [parameter.split()[-1] for parameter in template[1].split(",")] if template else [], base, end


@functools.cache
def _structure(name: str, arguments: tuple[Any, ...], real: Any) -> type[Structure]:
    """`arguments`: the types that its template is given, None for one that is not known; `real`: the type Real."""
    names, base, begin = _definition(name)
    known = {"Real": real, **dict(zip(names, arguments, strict=True))}
    fields: list[tuple[str, Any]] = [*_type(base, known)._fields_] if base else []
    for member in _members(begin):
        kind, declarators = re.findall(r"^(?:const )?([\w:]+(?: ?<.*>)?)(.*)$", member)[0]
        for declarator in declarators.split(","):
            stars, own_name, extents = re.findall(r"^(.*?)(\w+)((?: ?\[[^]]*\])*)$", declarator.strip())[0]
            found = _type(kind + stars, known)
            if found is None:
                raise ValueError(f"asgl_cuda: the layout of {member!r} in struct {name} depends on the type of x_seq")
            for extent in reversed(re.findall(r"\[([^]]*)\]", extents)):
                found = found * _evaluate(extent)
            fields.append((own_name, found))
    return type(name, (Structure,), {"_fields_": fields})


def _members(begin: int) -> Iterator[str]:
    """The declarations of data in a struct, whose body begins there."""
    depth, statement = 1, ""
    for match in re.compile(r"[{};]|[^{};]+").finditer(_headers(), begin):
        token = match[0]
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            if depth == 0:
                return
            if depth == 1 and "(" in statement:  # a function ends
                statement = ""
        elif depth == 1 and token != ";":
            statement += token
        elif depth == 1:
            statement = re.sub(r"\b(public|private|protected) ?:(?!:)| = [^,]*", "", statement).strip()
            if statement and "(" not in statement and not re.match(r"(using|static|friend) ", statement):
                yield statement
            statement = ""


def _type(text: str, known: dict[str, Any]) -> Any:
    """The type of ctypes for a type of C++, None where it is not known."""
    text = text.replace("const ", "").strip()
    if text.endswith(("*", "&")):
        return c_void_p
    if text in known:
        return known[text]
    if text in _NUMBERS:
        return _NUMBERS[text]
    if text in _enums():
        return c_int
    name, _, arguments = text.partition("<")
    types = tuple(_type(each, known) for each in arguments.strip(" >").split(",") if each)
    return _structure(name.strip(), types, known["Real"] if types else None)
