"""The translator of PTX and the machine that runs it, on small kernels; mistakes in kernels are found."""

import re
from ctypes import Structure, addressof, c_uint64, sizeof

import numpy as np
import pytest
import torch

from tools import ptx
from tools.ptx.to_cpp import UnknownPTXError, kernels, to_cpp

pytestmark = [pytest.mark.ptx, pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing()))]

WORDS = 4  # parameters


class Params(Structure):
    """Parameters of the kernels here."""

    _fields_ = (("words", c_uint64 * WORDS),)


def module(body: str, shared: str = "", most_threads: int = 1024) -> str:
    """The PTX of a kernel with its parameters in %rd10 to %rd13, its thread and block in %r10 and %r11."""
    load = "\n".join(f"ld.param.b64 %rd{10 + i}, [kernel_param_0+{8 * i}];" for i in range(WORDS))
    return f"""\
.version 8.0
.target sm_80
.address_size 64
{shared}
.visible .entry kernel(
	.param .align 8 .b8 kernel_param_0[{8 * WORDS}]
)
.maxntid {most_threads}, 1, 1
{{
.reg .pred %p<16>;
.reg .b16 %rs<16>;
.reg .b32 %r<16>;
.reg .b64 %rd<16>;
{load}
mov.u32 %r10, %tid.x;
mov.u32 %r11, %ctaid.x;
{body}
ret;
}}
"""


def translated(text: str) -> ptx.TranslatedKernel:
    return ptx.TranslatedKernel(ptx.compiled(lambda: to_cpp(kernels(text)["kernel"]), "kernel", text))


def located(text: str, statement: str) -> str:
    """A statement as errors name it."""
    return f"line {text[: text.index(statement)].count(chr(10)) + 1}: {statement.rstrip(';')}"


@pytest.fixture(scope="module")
def machine() -> ptx.Machine:
    return ptx.Machine()


def run(machine, kernel, threads, *words, buffers=(), blocks=1):
    """The machine's error; each word is an integer, or an array, which is a buffer."""
    arrays = [word for word in words if isinstance(word, np.ndarray)]
    ranges = {(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays} | set(buffers)
    values = [word.ctypes.data if isinstance(word, np.ndarray) else word for word in words]
    params = Params((c_uint64 * WORDS)(*values))
    return machine.run(kernel, blocks, threads, addressof(params), sizeof(params), ranges)


# ---- warps, blocks and memory ----

# Mode, operands and source lane of shuffles; no source lane in another segment.
SHUFFLES = [
    ("down", "4, 31", lambda lane: lane + 4 if lane + 4 < 32 else None),
    ("down", f"2, {(32 - 8) << 8 | 31}", lambda lane: lane + 2 if lane % 8 + 2 < 8 else None),
    ("down", "1, 15", lambda lane: lane + 1 if lane + 1 < 16 else None),
    ("down", "35, 31", lambda lane: lane + 3 if lane + 3 < 32 else None),
    ("idx", "5, 31", lambda lane: 5),
    ("idx", f"5, {(32 - 4) << 8 | 31}", lambda lane: lane // 4 * 4 + 1),
    ("idx", "20, 15", lambda lane: None),
]


def test_shuffles(machine):
    body = ["add.u32 %r1, %r10, 1000;", "mul.wide.u32 %rd1, %r10, 8;", "add.s64 %rd1, %rd10, %rd1;"]
    for i, (mode, how, _) in enumerate(SHUFFLES):
        body += [f"shfl.sync.{mode}.b32 %r3|%p1, %r1, {how}, -1;", "selp.b32 %r4, 1, 0, %p1;"]
        body += [f"shfl.sync.{mode}.b32 %r3, %r1, {how}, -1;", f"st.global.v2.b32 [%rd1+{512 * i}], {{%r3, %r4}};"]
    found = np.zeros((len(SHUFFLES), 64, 2), np.int32)
    assert run(machine, translated(module("\n".join(body))), 64, found) is None
    for (_, _, source), row in zip(SHUFFLES, found.tolist(), strict=True):
        for thread, each in enumerate(row):
            lane = source(thread % 32)
            assert each == [1000 + (thread if lane is None else thread // 32 * 32 + lane), lane is not None]


# ---- mistakes ----

# Each by one thread, in a kernel with all faults. %rd10 is a buffer, %rd11 the end of another before a gap.
FAULTS = {
    "ld.global.b32 %r1, [%rd10+96];": "in none of the buffers",
    "ld.global.b32 %r1, [%rd10+-4];": "in none of the buffers",
    "st.global.v4.b32 [%rd11+-8], {%r10, %r10, %r10, %r10};": "in none of the buffers",
    "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd10+8];": "is misaligned",
    "st.global.v2.b16 [%rd10+2], {%rs1, %rs1};": "is misaligned",
    "ld.shared.b32 %r1, [memory+16];": "is out of shared memory",
    "ld.shared.b32 %r1, [0];": "is out of shared memory",
    "ld.global.b32 %r1, [0];": "in none of the buffers",
    "st.param.b32 [kernel_param_0], %r10;": "is out of the parameters",
    "ld.param.b32 %r1, [kernel_param_0+32];": "is out of the parameters",
    "st.b32 [%rd12+4], %r10;": "in none of the buffers",
    "ld.global.b8 %rs1, [%rd7];": "in none of the buffers",
    "@%p7 ld.global.b32 %r1, [%rd10];": "reads a predicate that nobody wrote",
    "and.pred %p1, %p1, %p7;": "reads a predicate that nobody wrote",
}


@pytest.fixture(scope="module")
def faulty():
    body = ["mov.u64 %rd12, kernel_param_0;", "setp.ne.u32 %p1, %r10, 3;", "setp.ne.u32 %p2, %r11, 1;"]
    body += ["cvt.u32.u64 %r12, %rd13;", "or.pred %p1, %p1, %p2;", "@%p1 bra DONE;"]
    for i, fault in enumerate(FAULTS):
        body += [f"setp.ne.u32 %p3, %r12, {i};", f"@%p3 bra NEXT{i};", fault, "bra.uni DONE;", f"NEXT{i}:"]
    text = module("\n".join([*body, "DONE:"]), ".shared .align 16 .b8 memory[16];")
    return text, translated(text)


@pytest.mark.parametrize("number", range(len(FAULTS) + 1), ids=[*FAULTS, "none"])
def test_fault(machine, faulty, number):
    text, kernel = faulty
    memory = np.zeros(24, np.uint64)
    begin = memory.ctypes.data + -memory.ctypes.data % 16
    buffers = {(begin, begin + 72), (begin + 80, begin + 176)}
    problem = run(machine, kernel, 5, begin + 80, begin + 72, 0, number, buffers=buffers, blocks=2)
    if number == len(FAULTS):
        assert problem is None
    else:
        fault, expected = list(FAULTS.items())[number]
        assert problem.startswith(f"thread 3 of block 1: {located(text, fault)} ")
        assert expected in problem


def test_registers(machine):
    """Inner ones shadow outer ones; uninitialised ones are NaN."""
    text = module("""
mov.u32 %r1, 5;
{ .reg .pred p; .reg .b32 %r1; .reg .b16 low; .reg .b16 high;
mov.u32 %r1, 7; setp.eq.u32 p, %r1, 7; mov.b32 {low, high}, %r1; cvt.u32.u16 %r2, low; selp.b32 %r3, 1, 0, p; }
setp.ne.u32 %p1, %r10, 0; @%p1 bra $L__1;
st.global.cs.v4.b32 [%rd10], {%r1, %r2, %r3, %r10};
st.global.b64 [%rd10+16], %rd1; st.global.b32 [%rd10+24], %r4; st.global.b16 [%rd10+28], %rs1;
$L__1:""")
    found = np.zeros(8, np.uint32)
    assert run(machine, translated(text), 2, found) is None
    assert found[:4].tolist() == [5, 7, 1, 0]
    kinds = ((np.float64, 2), (np.float32, 6), (np.float16, 14))
    assert all(np.isnan(found.view(kind)[index]) for kind, index in kinds)
    assert torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)[14].isnan()


SHUFFLE = "shfl.sync.down.b32 %r1, %r10, 1, 31, -1;"
OTHERS = {
    "bar.sync 0;": "16 wait at __syncthreads",
    "shfl.sync.idx.b32 %r1, %r10, 0, 31, -1;": "has diverged",
    "shfl.sync.down.b32 %r2, %r10, 1, 31, 65535;": "thread 16 of block 0, lane 16, is not in the mask",
    "ret;": "lane 16, which has exited",
}


@pytest.mark.parametrize("other", OTHERS)
def test_divergent_threads(machine, other):
    """Half of a warp shuffles, the other half executes something else."""
    text = module(f"setp.lt.u32 %p1, %r10, 16;\n@%p1 bra DOWN;\n{other}\nret;\nDOWN:\n{SHUFFLE}")
    problem = run(machine, translated(text), 32)
    assert OTHERS[other] in problem
    assert located(text, SHUFFLE if other == "ret;" else other) in problem


@pytest.mark.parametrize("first", [16, 32])
def test_warps_alone_may_be_at_several_barriers(machine, first):
    """Half of a warp, or a warp, waits at one barrier while the other threads wait at another."""
    text = module(
        f"""
setp.lt.u32 %p1, %r10, {first};
bar.sync 0;
@%p1 bra DOWN;
bar.sync 0;
bra LAST;
DOWN:
bar.sync 0;
LAST:
bar.sync 0;
"""
    )
    problem = run(machine, translated(text), 64)
    if first == 32:
        assert problem is None
    else:
        assert re.search(r"line \d+: bar.sync 0 has another thread of its warp at line \d+: bar.sync 0", problem)


UNKNOWN = [
    "add.rz.f32 %r1, %r2, %r3;", "add.rn.ftz.f32 %r1, %r2, %r3;", "lop3.b32 %r1, %r2, %r3, %r4, 0x80;", "trap;",
    "call.uni (%r1), function, (%r2);", ".local .align 8 .b8 depot[8];", "ld.local.b32 %r1, [%rd1];", ".directive 1;",
    "ld.volatile.global.b32 %r1, [%rd1];", "ld.global.v8.b32 {%r1, %r2}, [%rd1];", "ld.global.v4.b32 {%r1}, [%rd1];",
    "ld.global.nc.b32 %r1, [%rd1];", "ld.shared.cs.b32 %r1, [%rd1];", "st.global.b128 [%rd1], %rd2;",
    "atom.global.add.u32 %r1, [%rd1], 1;", "mov.u32 %r1, %laneid;", "mov.u32 %r1, %unknown2;", "bar.sync 1;",
    "bar.warp.sync -1;", "shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", "cvt.rmi.s32.f32 %r1, %r2;", "bra.conv L;",
    "setp.lt.ftz.f32 %p1, %r1, %r2;", "setp.eq.s32 %p1|%p2, %r1, %r2;", "mov.b64 %rd1, 18446744073709551616;",
    ".reg .b128 %rq<2>;",
]  # fmt: skip


@pytest.mark.parametrize("statement", UNKNOWN)
def test_unknown_statements_are_errors(statement):
    text = module(f"mov.u32 %r1, 0;\n{statement}")
    with pytest.raises(UnknownPTXError) as error:
        to_cpp(kernels(text)["kernel"])
    assert str(error.value).startswith(f"kernel: {located(text, statement)}: ")
