"""Structures and constants that the tools read from csrc equal those of the host's compiler, and of NVRTC.

So both have one layout. What asgl_cuda packs for csrc has its order.
"""

import ctypes
import re
import subprocess

import pytest
import torch

from asgl_cuda.backends import cupy
from asgl_cuda.layout import CHECKPOINT_STEPS
from asgl_cuda.reference import BELOW_IN_STATE, DRAWS, Numbers, Parameters, Rules
from asgl_cuda.surrogate import SURROGATES
from tools import host_compiler
from tools.emulation import emulated
from tools.kernels import structures
from tools.kernels.structures import constant, structure

CSRC = emulated.ROOT / "csrc"
# Types of x_seq, with their types of arithmetic.
TYPES = {"float": torch.float32, "asgl::Half": torch.float32, "asgl::BFloat16": torch.float32, "double": torch.float64}
REALS = ("float", "double")
# Structures, with their template arguments.
STRUCTURES = {
    "ParameterView": REALS,
    "ForwardParams": TYPES,
    "BackwardParams": TYPES,
    "IntegratorParams": TYPES,
    "GradientSum": REALS,
    "ChannelTiles": (),
    "Normalisation": (),
    "MomentsParams": TYPES,
    "CoefficientsParams": REALS,
    "RunningParams": REALS,
    "AdjointParams": REALS,
    "InputGradientParams": TYPES,
}
CONSTANTS = ("kNumParameters", "kNumSurrogates", "kNumCoefficients", "kCheckpointSteps", "kAlwaysAnalog",
             "kAnalogBelowInState", "kInputMean", "Input::kGeneral", "Input::kNormalised", "Input::kPlain",
             "Input::kNormalisedResidual", "Input::kGeneralResidual", "Input::kApart",
             "Surrogate::kLaplace", "kLearnedBound", "Derivative::kOfLogitDecay")  # fmt: skip


def members(kind, path="", offset=0):
    """Path, offset and type of every member and of its members."""
    for name, member in getattr(kind, "_fields_", ()):
        begin = offset + getattr(kind, name).offset
        yield path + name, begin, member
        if issubclass(member, ctypes.Array):
            for index in range(member._length_):
                start = begin + index * ctypes.sizeof(member._type_)
                yield from members(member._type_, f"{path}{name}[{index}].", start)
        else:
            yield from members(member, f"{path}{name}.", begin)


def kinds():
    """Every structure, by its name in C++."""
    for name, types in STRUCTURES.items():
        for scalar in types:
            yield f"asgl::{name}<{scalar}>", structure(name, TYPES[scalar])
        if not types:
            yield f"asgl::{name}", structure(name)


def assertions() -> list[str]:
    lines = [f"static_assert(static_cast<int>(asgl::{name}) == {constant(name)});" for name in CONSTANTS]
    for kind, fields in kinds():
        lines.append(f"static_assert(sizeof({kind}) == {ctypes.sizeof(fields)});")
        for path, offset, member in members(fields):
            lines.append(f"static_assert(offsetof({kind}, {path}) == {offset});")
            lines.append(f"static_assert(sizeof((({kind}*)nullptr)->{path}) == {ctypes.sizeof(member)});")
    return lines


def source(lines: list[str]) -> str:
    headers = [f'#include "params/{name}.h"' for name in ("normalisation", "integrator", "gradient")]
    return "\n".join([*headers, *lines]) + "\n"


def by_host(text: str) -> str:
    """The errors of the host's compiler."""
    command = host_compiler.compiler()
    if command is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", "-include", "cstddef", "-x", "c++"]
    result = subprocess.run(
        [*command, *flags, f"-I{CSRC}", "-"], input=text, capture_output=True, text=True, timeout=600
    )
    return result.stderr if result.returncode else ""


def by_nvrtc(text: str) -> str:
    """The errors of NVRTC."""
    missing = cupy.nvrtc_problem()
    if missing is not None:
        pytest.skip(f"no NVRTC: {missing}")
    nvrtc = cupy._nvrtc()
    program = nvrtc.createProgram(OFFSETOF + text, "layout.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*cupy.OPTIONS, "--gpu-architecture=compute_80", f"-I{CSRC}"))
    except nvrtc.NVRTCError:
        return nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    return ""


# NVRTC has no header with this macro, and no other constant expression for it.
OFFSETOF = "#define offsetof(type, member) __INTADDR__(&(((type*)0)->member))\n"

COMPILERS = [by_host, by_nvrtc]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_layout(compiler):
    lines = assertions()
    assert len(lines) > 1000
    assert compiler(source(lines)) == ""


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ForwardParams<float>, h_seq) == ", "ForwardParams<float>, v_seq) == "),
        ("sizeof(asgl::GradientSum<double>) == ", "8 + sizeof(asgl::GradientSum<double>) == "),
        ("AdjointParams<double>, options.eps) == ", "AdjointParams<double>, options.input_scale) == "),
    ],
)
def test_a_difference_is_found(compiler, old, new):
    text = source(assertions())
    assert text.count(old) == 1
    assert "static assertion" in compiler(text.replace(old, new)).lower().replace("static_assert", "static assertion")


def test_constants_of_python():
    assert constant("kCheckpointSteps") == CHECKPOINT_STEPS
    assert (constant("kAlwaysAnalog"), constant("kAnalogBelowInState")) == (DRAWS, BELOW_IN_STATE)
    names = [f"Surrogate::k{name.title().replace('_', '')}" for name in SURROGATES]
    assert [constant(name) for name in names] == [surrogate.id for surrogate in SURROGATES.values()]


def in_csrc(field):
    """A parameter's enumerator in ParameterId."""
    return "k" + field.removeprefix("v_").title().replace("_", "")


def test_order_of_packed_options():
    *fields, residual = Parameters._fields
    assert ([constant(in_csrc(field)) for field in fields], residual) == (
        [*range(constant("kNumParameters"))],
        "residual",
    )
    assert [name for name, _ in structure("Rules")._fields_] == [*Rules._fields]
    (constants, row), *others = structure("Numbers")._fields_
    assert (constants, row._length_) == ("constants", constant("kNumParameters"))
    assert (*fields, *(name for name, _ in others)) == Numbers._fields


HEADER = """
#define ASGL_HOST_DEVICE inline \\
  __attribute__((always_inline))
constexpr int kFew = 0x3u, kMany = 2 * kFew + (1 << 2);  // kFew = 4
enum Order { kFirst, kThird = 2, kFourth, kCount };
enum class Kind : int { kOne = 1, kTwo };
constexpr int kKinds = static_cast<int>(Kind::kTwo);
struct Forward;
template <class T>
struct Box {
  T v;
};
template <class Scalar>
struct Base {
  using Real = Real_t<Scalar>;
  Real a[kCount], b;
  explicit Base(int c) : b(c) { int64 d; }
  int f() const { return 1; }
};
/* struct Derived { int c; }; */
template <class Scalar>
struct Derived : Base<Scalar> {
  const Scalar *x, *y;
  Box<const Real*> box;
  Box<Real> boxes[2];
  Kind kind{};
  static constexpr int kE = 5;
 private:
  bool g = false;
};
template <class Scalar>
struct ByValue {
  Scalar x;
};
struct Odd {
  unsigned long x;
};
constexpr int kOdd = sizeof(int);
"""


@pytest.fixture
def header(monkeypatch, tmp_path):
    """A folder of csrc with this header alone."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "some.cuh").write_text(HEADER)
    cached = [each for each in vars(structures).values() if hasattr(each, "cache_clear")]
    monkeypatch.setattr(structures, "source_directory", lambda: tmp_path)
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def test_header_is_read(header):
    names = ("kMany", "kFew", "kThird", "kFourth", "kCount", "Kind::kOne", "Kind::kTwo", "kKinds", "kE")
    assert [constant(name) for name in names] == [10, 3, 2, 3, 4, 1, 2, 2, 5]
    derived = structure("Derived", torch.float64)
    found = [(path, offset) for path, offset, _ in members(derived)]
    assert found == [("a", 0), ("b", 32), ("x", 40), ("y", 48), ("box", 56), ("box.v", 56), ("boxes", 64),
                     ("boxes[0].v", 64), ("boxes[1].v", 72), ("kind", 80), ("g", 84)]  # fmt: skip
    assert structure("Derived", torch.float32).y.offset == 32
    assert dict(derived._fields_)["box"] is not dict(derived._fields_)["boxes"]._type_


@pytest.mark.parametrize(
    ("read", "name", "named"),
    [
        (constant, "kNowhere", "kNowhere"),
        (constant, "kOne", "kOne"),
        (constant, "kOdd", re.escape("sizeof(int)")),
        (structure, "Nowhere", "'Nowhere'"),
        (structure, "Forward", "'Forward'"),
        (structure, "Odd", "unsigned"),
        (lambda name: structure(name, torch.float32), "ByValue", "Scalar x.*depends on the type of x_seq"),
    ],
)
def test_unreadable_declarations_are_named(header, read, name, named):
    with pytest.raises(ValueError, match=rf"asgl_cuda: .*{named}"):
        read(name)
