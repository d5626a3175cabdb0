"""asgl_cuda/kernel_params.py has the sizes and offsets that compilers give csrc/lif_params.h, batch_norm_params.h."""

import ctypes
import subprocess

import emulated
import pytest
import torch

from asgl_cuda import jit, kernel_params
from asgl_cuda.kernel_params import NUM_PARAMETERS, STRUCTURES

CSRC = emulated.ROOT / "csrc"
# Every type of x_seq, and the structures as they are for it.
TYPES = {
    "float": STRUCTURES[torch.float32],
    "asgl::Half": STRUCTURES[torch.float32],
    "asgl::BFloat16": STRUCTURES[torch.float32],
    "double": STRUCTURES[torch.float64],
}
REALS = ("float", "double")
# The structures of batch normalisation, which are the same for every type, and the types of their templates.
NORMALISATION = {
    kernel_params.ChannelTiles: (),
    kernel_params.Normalisation: (),
    kernel_params.MomentsParams: TYPES,
    kernel_params.CoefficientsParams: REALS,
    kernel_params.AdjointParams: REALS,
    kernel_params.InputGradientParams: TYPES,
}


def members(kind, path="", offset=0):
    """Path, offset and type of every member, those of members included."""
    for name, member in getattr(kind, "_fields_", ()):
        place = offset + getattr(kind, name).offset
        yield path + name, place, member
        if issubclass(member, ctypes.Array):
            for index in range(member._length_):
                start = place + index * ctypes.sizeof(member._type_)
                yield from members(member._type_, f"{path}{name}[{index}].", start)
        else:
            yield from members(member, f"{path}{name}.", place)


def kinds():
    """Every structure by its name in C++."""
    for scalar, structures in TYPES.items():
        for name, structure in structures._asdict().items():
            # These are of the type of the arithmetic.
            if name not in ("ParameterView", "GradientSum") or scalar in REALS:
                yield f"asgl::{name}<{scalar}>", structure
    for structure, types in NORMALISATION.items():
        name = f"asgl::{structure.__name__}"
        yield from ((f"{name}<{type}>", structure) for type in types) if types else ((name, structure),)


def assertions() -> list[str]:
    lines = [f"static_assert(asgl::kNumParameters == {NUM_PARAMETERS});"]
    for kind, structure in kinds():
        lines.append(f"static_assert(sizeof({kind}) == {ctypes.sizeof(structure)});")
        for path, offset, member in members(structure):
            lines.append(f"static_assert(offsetof({kind}, {path}) == {offset});")
            lines.append(f"static_assert(sizeof((({kind}*)nullptr)->{path}) == {ctypes.sizeof(member)});")
    return lines


def source(lines: list[str]) -> str:
    return "\n".join(['#include "batch_norm_params.h"', '#include "lif_params.h"', *lines]) + "\n"


def host_compiler(text: str) -> str:
    """What the host's compiler has to say against it."""
    compiler = emulated.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [
        *compiler,
        "-std=c++17",
        "-fsyntax-only",
        "-Wno-invalid-offsetof",
        "-include",
        "cstddef",
        f"-I{CSRC}",
        "-x",
        "c++",
        "-",
    ]
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    return result.stderr if result.returncode else ""


def nvrtc(text: str) -> str:
    """What NVRTC has to say against it."""
    missing = jit.nvrtc_problem()
    if missing is not None:
        pytest.skip(f"no NVRTC: {missing}")
    nvrtc = jit._nvrtc()
    program = nvrtc.createProgram(OFFSETOF + text, "layout.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*jit.OPTIONS, "--gpu-architecture=compute_80", f"-I{CSRC}"))
    except nvrtc.NVRTCError:
        return nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    return ""


# NVRTC has no header with this macro, and no other expression for it that is a constant.
OFFSETOF = "#define offsetof(type, member) __INTADDR__(&(((type*)0)->member))\n"

COMPILERS = [host_compiler, nvrtc]


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
        ("BackwardParams<asgl::Half>, partials[2].slots) == ", "BackwardParams<asgl::Half>, partials[2].data) == "),
        ("offsetof(asgl::ChannelTiles, splits) == ", "offsetof(asgl::ChannelTiles, ways) == "),
        ("InputGradientParams<asgl::BFloat16>, mean) == ", "InputGradientParams<asgl::BFloat16>, adjoint) == "),
        ("AdjointParams<double>, options.eps) == ", "AdjointParams<double>, options.input_scale) == "),
    ],
)
def test_a_difference_is_found(compiler, old, new):
    text = source(assertions())
    assert text.count(old) == 1
    assert "static assertion" in compiler(text.replace(old, new)).lower().replace("static_assert", "static assertion")
