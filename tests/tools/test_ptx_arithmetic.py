"""The arithmetic instructions of PTX in tools/ptx/arithmetic.h, against Python, numpy and torch."""

import math
import operator
import re
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from test_ptx_machine import module, run, translated

from tools import ptx
from tools.ptx.to_cpp import known_instructions

pytestmark = [pytest.mark.ptx, pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing()))]

N = 1024  # threads, each with operands of its own
NUMPY = {
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "s8": np.int8, "u8": np.uint8, "s16": np.int16,
    "u16": np.uint16, "s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64, "b16": np.uint16,
    "b32": np.uint32, "b64": np.uint64, "f16x2": np.uint32, "bf16x2": np.uint32, "pred": np.uint32,
}  # fmt: skip
REGISTERS = {1: "rs", 2: "rs", 4: "r", 8: "rd"}
WHOLE = [0, 1, 2, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 300, 2**15, 2**16 - 1, 2**31 - 1, 2**31]
WHOLE += [2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 128, 2**64 - 2, 2**64 - 1]
# With ties of rounding to float16, bfloat16 and integers. Fewer than N pairs.
REAL = [sign * a for a in (0.0, 0.5, 1.0, 1.5, 2.5, math.inf) for sign in (1, -1)]
REAL += [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65520.0, 2.0**-25, 0.1, math.nan]


def specials(dtype):
    if not np.issubdtype(dtype, np.floating):
        return np.array(WHOLE, np.uint64).astype(dtype)
    limits = np.finfo(dtype)
    edges = [limits.max, -limits.max, limits.tiny, limits.smallest_subnormal, -limits.smallest_subnormal * 3]
    with np.errstate(over="ignore"):
        return np.array([*REAL, *edges], np.float64).astype(dtype)


def operands(types):
    """All or, if too many, some combinations of special values; random bits."""
    generator = np.random.default_rng(0)
    values = [specials(NUMPY[each]) for each in types]
    few = math.prod(map(len, values)) <= N
    chosen = (
        list(zip(*product(*values), strict=True)) if few else [generator.choice(each, N * 3 // 4) for each in values]
    )
    found = []
    for each, some in zip(types, chosen, strict=True):
        column = generator.integers(0, 2**64, N, np.uint64, endpoint=False).astype(f"u{NUMPY[each]().itemsize}")
        column = column.view(NUMPY[each])
        column[: len(some)] = some
        found.append(column)
    return found


def bits(values):
    return values.view(f"u{values.dtype.itemsize}").astype(np.uint64)


def signed_bits(value, width):
    """An integer wrapped to a signed type."""
    return (value + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)


def quotient(a, b):
    if b == 0:
        return -1  # undefined on a device
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return -1 if b == 0 else a - quotient(a, b) * b


def fused(dtype, round_down=False):
    """A * b + c with a single rounding, to nearest or down."""

    def one(a, b, c):
        if not all(map(math.isfinite, (a, b, c))):
            return c if math.isfinite(a) and math.isfinite(b) else dtype(float(a) * float(b) + float(c))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        if exact == 0:
            same_sign = np.signbit(a) ^ np.signbit(b) == np.signbit(c)
            return c if same_sign else dtype(-0.0 if round_down else 0.0)
        try:
            nearest = dtype(float(exact))
        except OverflowError:
            nearest = dtype(math.inf if exact > 0 else -math.inf)
        if np.isinf(nearest) and not round_down:
            return nearest
        # After a rounding to float64 a neighbour may be correct.
        around = [np.nextafter(nearest, dtype(-math.inf)), nearest, np.nextafter(nearest, dtype(math.inf))]
        if round_down:
            return max(each for each in around if float(each) <= exact)
        is_odd = f"i{dtype().itemsize}"
        finite = filter(np.isfinite, around)
        return min(finite, key=lambda each: (abs(Fraction(float(each)) - exact), each.view(is_odd) & 1))

    return lambda *columns: np.array([one(*each) for each in zip(*columns, strict=True)], dtype)


def to_half(dtype):
    """The bits; a device's NaN, not torch's."""

    def convert(a):
        half = torch.from_numpy(a).to(dtype)
        return torch.where(half.isnan(), 0x7FFF, half.view(torch.int16)).numpy().view(np.uint16)

    return convert


def packed(dtype):
    half = to_half(dtype)
    return lambda high, low: half(high).astype(np.uint32) << 16 | half(low)


def flushed(a):
    return np.where(np.abs(a) < np.finfo(a.dtype).tiny, np.copysign(a.dtype.type(0), a), a)


def upper_half(a):
    return (a.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def larger(a, b):
    """0 is larger than -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.maximum(a, b))


ORDERED = {
    "eq": operator.eq, "ne": lambda a, b: (a < b) | (a > b), "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge, "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
UNORDERED = {
    f"{name}u": lambda a, b, compare=ORDERED[name]: compare(a, b) | np.isnan(a) | np.isnan(b)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
CONVERTED = [("u32", "u8"), ("s32", "s8"), ("u32", "u16"), ("s32", "s16"), ("s64", "s32"), ("u64", "u32"),
             ("u32", "u64"), ("u16", "u32"), ("s64", "s8"), ("s16", "s8"), ("u16", "u8"), ("s8", "s32"),
             ("u8", "u64")]  # fmt: skip


def table():
    """Instructions, types of operands and result, and functions of the columns of operands.

    Only the low bits of integer results count. Operands are registers a, b, c, the result is d.
    """
    ordered = {name: ORDERED[name] for name in ("eq", "ne", "lt", "le", "gt", "ge")}
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        width = int(kind[1:])
        yield f"add.{kind}", [kind, kind], kind, operator.add
        yield f"sub.{kind}", [kind, kind], kind, operator.sub
        yield f"mul.lo.{kind}", [kind, kind], kind, operator.mul
        yield f"mad.lo.{kind}", [kind, kind, kind], kind, lambda a, b, c: a * b + c
        yield f"div.{kind}", [kind, kind], kind, quotient
        yield f"rem.{kind}", [kind, kind], kind, remainder
        yield f"min.{kind}", [kind, kind], kind, min
        yield f"max.{kind}", [kind, kind], kind, max
        yield f"shr.{kind}", [kind, "u32"], kind, lambda a, b: a >> b
        for name, compare in ordered.items():
            yield f"setp.{name}.{kind}", [kind, kind], "pred", compare
        if width < 64:
            yield f"mul.wide.{kind}", [kind, kind], f"{kind[0]}{2 * width}", operator.mul
        if width == 32:
            yield f"mul.hi.{kind}", [kind, kind], kind, lambda a, b: a * b >> 32
        if kind[0] == "s":
            yield f"neg.{kind}", [kind], kind, operator.neg
    for width in (16, 32, 64):
        kind = f"b{width}"
        for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
            yield f"{name}.{kind}", [kind, kind], kind, function
        yield f"not.{kind}", [kind], kind, operator.invert
        yield f"mov.{kind}", [kind], kind, lambda a: a
        yield f"shl.{kind}", [kind, "u32"], kind, lambda a, b: a << b if b < 64 else 0
        text = f"setp.gt.u32 %p2, c, 2; setp.le.u32 %p3, c, 7; and.pred %p2, %p2, %p3; selp.{kind} d, a, b, %p2"
        yield text, [kind, kind, "u32"], kind, lambda a, b, c: a if 2 < c <= 7 else b
        if width == 16:
            continue

        def inserted(a, b, first, length, width=width):
            field = (2 ** (length & 255) - 1) << (first & 255)
            return (b & ~field | (a << (first & 255) & field)) % 2**width

        yield f"bfi.{kind} d, a, b, c, 9", [kind, kind, "u32"], kind, lambda a, b, c, f=inserted: f(a, b, c, 9)
        yield f"bfi.{kind} d, a, b, 3, c", [kind, kind, "u32"], kind, lambda a, b, c, f=inserted: f(a, b, 3, c)

        def extracted(a, first, length):
            return a >> (first & 255) & (2 ** (length & 255) - 1)

        kind = f"u{width}"
        yield f"bfe.{kind} d, a, b, 9", [kind, "u32"], kind, lambda a, b, f=extracted: f(a, b, 9)
        yield f"bfe.{kind} d, a, 3, b", [kind, "u32"], kind, lambda a, b, f=extracted: f(a, 3, b)
    yield "cvta.to.global.u64", ["u64"], "u64", lambda a: a
    parts = "mov.b32 {%rs5, %rs6}, a; mov.b32 d, {%rs6, %rs5}"
    yield parts, ["b32"], "b32", lambda a: a >> 16 | a << 16
    yield "mov.b64 {%r5, %r6}, a; mov.b64 d, {%r6, %r5}", ["b64"], "b64", lambda a: a >> 32 | a << 32
    parts = "mov.b64 {%rs1, %rs2, %rs3, %rs4}, a; mov.b64 d, {%rs1, %rs3, %rs2, %rs4}"
    yield parts, ["b64"], "b64", lambda a: a & 0xFFFF00000000FFFF | a >> 16 & 0xFFFF0000 | (a & 0xFFFF0000) << 16
    for to, source in CONVERTED:
        yield f"cvt.{to}.{source}", [source], to, lambda a: a
    # A result narrower than its register is extended.
    yield "cvt.s8.s32 %rs5, a; cvt.s32.s16 d, %rs5", ["s32"], "s32", lambda a: signed_bits(a, 8)
    yield "cvt.u8.u32 %rs5, a; cvt.u32.u16 d, %rs5", ["u32"], "u32", lambda a: a % 256
    yield "mov.b32 d, -1", [], "b32", lambda: -1
    text = "setp.eq.u32 %p2, a, a; not.pred %p3, %p2; mov.pred %p4, -1; xor.pred %p2, %p2, %p3; and.pred %p2, %p2, %p4"
    yield f"{text}; or.pred d, %p2, %p3", ["u32"], "pred", lambda a: 1

    for kind in ("f32", "f64"):
        dtype, integers = NUMPY[kind], f"b{kind[1:]}"
        two, three = [kind, kind], [kind, kind, kind]
        for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)):
            yield f"{name}.rn.{kind}", two, kind, function
        yield f"rcp.rn.{kind}", [kind], kind, lambda a: a.dtype.type(1) / a
        yield f"fma.rn.{kind}", three, kind, fused(dtype)
        yield f"neg.{kind}", [kind], kind, np.negative
        yield f"abs.{kind}", [kind], kind, np.abs
        yield f"copysign.{kind}", two, kind, lambda sign, a: np.copysign(a, sign)
        one = {"f32": "0f3F800000", "f64": "0d3FF0000000000000"}[kind]
        text = f"setp.lt.{kind} %p2, a, {one}; selp.{kind} d, a, {one}, %p2"
        yield text, [kind], kind, lambda a: np.where(a < 1, a, a.dtype.type(1))
        for name, function in {**ORDERED, **UNORDERED}.items():
            yield f"setp.{name}.{kind}", two, "pred", function
        for source in ("s32", "u32", "s64", "u64"):
            yield f"cvt.rn.{kind}.{source}", [source], kind, lambda a, dtype=dtype: a.astype(dtype)
        yield f"cvt.rzi.{kind}.{kind}", [kind], kind, np.trunc
        yield f"mov.{integers}", [kind], kind, lambda a: a
    yield "fma.rm.f32", ["f32", "f32", "f32"], "f32", fused(np.float32, round_down=True)
    yield "sqrt.rn.f64", ["f64"], "f64", np.sqrt
    yield "max.NaN.f32", ["f32", "f32"], "f32", larger
    yield "min.NaN.f32", ["f32", "f32"], "f32", lambda a, b: -larger(-a, -b)
    yield "cvt.f64.f32", ["f32"], "f64", lambda a: a.astype(np.float64)
    yield "cvt.rn.f32.f64", ["f64"], "f32", lambda a: a.astype(np.float32)
    yield "cvt.f32.f16", ["f16"], "f32", lambda a: a.astype(np.float32)
    yield "cvt.rn.f16.f32", ["f32"], "f16", lambda a: to_half(torch.float16)(a).view(np.float16)
    yield "cvt.rn.f16x2.f32", ["f32", "f32"], "f16x2", packed(torch.float16)
    yield "cvt.rn.bf16x2.f32", ["f32", "f32"], "bf16x2", packed(torch.bfloat16)
    yield "cvt.rni.f32.f32", ["f32"], "f32", np.rint
    yield "cvt.sat.f32.f32", ["f32"], "f32", lambda a: np.where(a > 0, np.minimum(a, 1), np.float32(0))
    exact = np.float64
    yield "ex2.approx.ftz.f32", ["f32"], "f32", lambda a: flushed(np.exp2(exact(flushed(a))).astype(np.float32))
    yield "rcp.approx.ftz.f32", ["f32"], "f32", lambda a: flushed((1 / exact(flushed(a))).astype(np.float32))
    yield "rcp.approx.ftz.f64", ["f64"], "f64", lambda a: upper_half(flushed(1 / upper_half(flushed(a))))


TABLE = list(table())


@pytest.fixture(scope="module")
def results():
    """The results of all instructions, by one kernel."""
    body = ["mad.lo.u32 %r12, %r10, 8, 0;", "cvt.u64.u32 %rd14, %r12;"]
    body += ["add.s64 %rd8, %rd10, %rd14;", "add.s64 %rd9, %rd11, %rd14;"]
    columns = []
    for row, (text, types, kind, _) in enumerate(TABLE):
        names = {}
        for i, (letter, each, column) in enumerate(zip("abc", types, operands(types), strict=False)):
            size = max(2, column.itemsize)
            names[letter] = f"%{REGISTERS[size]}{i + 1}"
            body.append(f"ld.global.b{8 * size} {names[letter]}, [%rd8+{8 * N * len(columns)}];")
            # Set bits above an 8-bit operand in its 16-bit register.
            columns.append(bits(column) | (0xA500 if NUMPY[each]().itemsize == 1 else 0))
        size = max(2, NUMPY[kind]().itemsize)
        names["d"] = "%p1" if kind == "pred" else f"%{REGISTERS[size]}4"
        if " " not in text:
            text = f"{text} {', '.join(('d', *'abc'[: len(types)]))}"
        body += [re.sub(r"\b[abcd]\b(?!\.)", lambda name, names=names: names[name[0]], text) + ";"]
        if kind == "pred":
            body.append("selp.b32 %r4, 1, 0, %p1;")
            names["d"] = "%r4"
        body.append(f"st.global.b{8 * size} [%rd9+{8 * N * row}], {names['d']};")
    found = np.full((len(TABLE), N), 0xDBDBDBDBDBDBDBDB, np.uint64)
    problem = run(ptx.Machine(), translated(module("\n".join(body))), N, np.array(columns, np.uint64), found)
    assert problem is None
    return found


def expected_of(types, kind, function):
    """The expected results, in their type."""
    columns = operands(types)
    dtype = np.dtype(NUMPY[kind])
    if any(np.issubdtype(column.dtype, np.floating) for column in columns) or np.issubdtype(dtype, np.floating):
        with np.errstate(all="ignore"):
            return function(*columns).astype(dtype)
    rows = zip(*(column.tolist() for column in columns), strict=True) if columns else [()] * N
    return np.array([int(function(*row)) % 2 ** (8 * dtype.itemsize) for row in rows], f"u{dtype.itemsize}").view(dtype)


@pytest.mark.parametrize("row", range(len(TABLE)), ids=[text for text, *_ in TABLE])
def test_instruction(results, row):
    text, types, kind, function = TABLE[row]
    expected = expected_of(types, kind, function)
    actual = results[row].astype(f"u{expected.dtype.itemsize}").view(expected.dtype)
    same = bits(actual) == bits(expected)
    if np.issubdtype(expected.dtype, np.floating):
        same |= np.isnan(actual) & np.isnan(expected)
        if kind == "f32" and not text.startswith(("mov", "neg", "abs", "copysign", "selp")):
            assert (bits(actual)[np.isnan(actual)] == 0x7FFFFFFF).all()
    wrong = np.flatnonzero(~same)[:5]
    shown = [(*(column[i] for column in operands(types)), "gives", actual[i], "not", expected[i]) for i in wrong]
    assert not shown


def test_table_is_complete():
    helpers = {"canonical", "fused", "flushed", "off_by", "upper_half"}
    words = {word.replace(".", "_") for text, *_ in TABLE for word in re.findall(r"(?:^|; )([\w.]+)", text)}
    missing = {
        name for name in known_instructions() - helpers
        if not any(re.fullmatch(rf"{name.rstrip('_')}_[a-z0-9_]+", word) for word in words)
    }  # fmt: skip
    assert not missing


def test_error_of_approximations():
    """The machine's settings are in units in the last place."""
    body = "ld.global.b32 %r1, [%rd10]; rcp.approx.ftz.f32 %r2, %r1; ex2.approx.ftz.f32 %r3, %r1;"
    kernel = translated(module(f"{body} st.global.v2.b32 [%rd11], {{%r2, %r3}};"))
    near, off = ptx.Machine(), ptx.Machine()
    off.rcp_units, off.ex2_units = 1, -2
    found = np.zeros((2, 2), np.uint32)
    for each, to in ((near, found[0]), (off, found[1])):
        assert run(each, kernel, 1, np.array([3], np.float32), to) is None
    assert (found[1].astype(int) - found[0]).tolist() == [1, -2]
