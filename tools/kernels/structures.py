"""Structures of kernel parameters as the tools decode them, and constants, read from the headers of csrc.

Relies on the headers' style: a struct begins and ends at the start of a line, and its template has one parameter,
called Scalar for the type of x_seq. Anything that can't be parsed is an error.
"""

from __future__ import annotations

import functools
import re
from ctypes import Structure, c_bool, c_double, c_float, c_int, c_longlong, c_ubyte, c_uint, c_ushort, c_void_p
from typing import Any

import torch

from asgl_cuda.extension import no_sources, source_directory

_TYPES = {
    "bool": c_bool, "int": c_int, "float": c_float, "double": c_double, "uint8": c_ubyte, "uint16": c_ushort,
    "uint32": c_uint, "int64": c_longlong, "int64_t": c_longlong,
}  # fmt: skip
_REALS = {torch.float32: c_float, torch.float64: c_double, None: None}


@functools.cache
def structure(name: str, real: torch.dtype | None = None) -> type[Structure]:
    """The structure `name`; `real` is the arithmetic type of a template.

    The type of x_seq changes no layout.
    """
    return _structure(name, _REALS[real])


_PARAMS = {
    "lif_forward_kernel": "ForwardParams", "lif_backward_kernel": "BackwardParams",
    "lif_backward_settled_kernel": "BackwardParams", "adaptive_forward_kernel": "ForwardParams",
    "adaptive_backward_kernel": "BackwardParams", "gradient_sum_kernel": "GradientSum",
    "integrator_kernel": "IntegratorParams", "batch_moments_kernel": "MomentsParams",
    "batch_norm_coefficients_kernel": "CoefficientsParams", "batch_norm_running_kernel": "RunningParams",
    "batch_norm_adjoint_kernel": "AdjointParams", "batch_norm_input_gradient_kernel": "InputGradientParams",
}  # fmt: skip


def structure_of(kernel: str) -> type[Structure]:
    """The structure of a kernel's parameters; `kernel` is its C++ expression."""
    name, _, arguments = kernel.removeprefix("asgl::").partition("<")
    return structure(_PARAMS[name], torch.float64 if arguments.startswith("double") else torch.float32)


@functools.cache
def constant(name: str) -> int:
    """The value of a `constexpr` or of an enumerator, such as kBlockThreads or Input::kPlain."""
    found = set(re.findall(rf"\bconstexpr [^;{{}}(]*?\b{name} = ([^,;]+)[,;]", _headers()))
    for scoped, enum, body in re.findall(r"\benum (class )?(\w+)[^;{]*\{([^}]*)\}", _headers()):
        value = "-1"
        for entry in body.split(","):
            enumerator, _, given = map(str.strip, entry.partition("="))
            value = given or f"{value} + 1"
            if name == (f"{enum}::{enumerator}" if scoped else enumerator):
                found.add(value)
    if len(found) != 1:
        raise ValueError(f"asgl_cuda: the headers of csrc should give {name} one value, and they give {sorted(found)}")
    return _evaluate(found.pop())


@functools.cache
def _headers() -> str:
    """All headers, without comments."""
    directory = source_directory()
    if directory is None:
        raise RuntimeError(f"asgl_cuda: {no_sources()}")
    paths = sorted(path for path in directory.rglob("*.*") if path.suffix in (".h", ".cuh"))
    return re.sub(r" *//.*|/\*[\s\S]*?\*/", "", "\n".join(path.read_text() for path in paths))


def _evaluate(expression: str) -> int:
    """An integer expression of C++, which may name other constants."""
    text = re.sub(r"\b(?:\w+::)?k[A-Z]\w*", lambda name: str(constant(name[0])), expression)
    text = re.sub(r"static_cast<\w+>|(?<=[\da-fA-F])[uUlL]+\b", "", text)
    if not re.fullmatch(r"(0x[\da-fA-F]+|\d+|<<|[-+*/()\s])+", text):
        raise ValueError(f"asgl_cuda: can't read {expression!r} in the headers of csrc as an integer")
    return int(eval(text.replace("/", "//")))


@functools.cache
def _structure(name: str, argument: Any) -> type[Structure]:
    """`argument`: the template argument, or the arithmetic type if the parameter is Scalar."""
    head = rf"^(?:template <class (\w+)>\n)?struct {name}(?: : (\w+)<\w+>)? \{{$([\s\S]*?)^\}};$"
    found = re.findall(head, _headers(), re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"asgl_cuda: the headers of csrc should define struct {name!r} once, not {len(found)} times")
    ((parameter, base, body),) = found
    enums = re.findall(r"\benum (?:class )?(\w+)", _headers())
    known = {**_TYPES, **dict.fromkeys(enums, c_int), "Real" if parameter == "Scalar" else parameter: argument}

    def type_of(text: str) -> Any:
        if text.endswith("*"):
            return c_void_p
        if text in known:
            return known[text]
        template, _, argument = text.partition("<")
        return _structure(template, type_of(argument.strip(" >")) if argument else None)

    fields = [*_structure(base, argument)._fields_] if base else []
    while "{" in body:  # function body or initialiser
        body = re.sub(r"\{[^{}]*\}", ";", body)
    body = re.sub(r"\b(private|public):|\bconst\b| = [^,;]*", "", body).replace("\n", " ")
    for member in body.split(";"):
        if "(" in member or re.match(r"\s*(using |static |$)", member):
            continue
        kind, declarators = re.findall(r"^\s*(\w+(?:<.*>)?)(.*)$", member)[0]
        for stars, own_name, extent in re.findall(r"(\**) ?(\w+)(?:\[(\w+)\])?(?:, |$)", declarators):
            if kind + stars == "Scalar":
                raise ValueError(f"asgl_cuda: the layout of {member!r} in struct {name} depends on the type of x_seq")
            found_type = type_of(kind + stars)
            fields.append((own_name, found_type * _evaluate(extent) if extent else found_type))
    return type(name, (Structure,), {"_fields_": fields})
