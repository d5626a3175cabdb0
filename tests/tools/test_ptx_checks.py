"""The checks of PTX find each kind of fault, and none in correct code."""

from __future__ import annotations

import re

import pytest
import torch

from tools.kernels import cuda_code
from tools.kernels.code_checks import FOURS, access_problems, arithmetic_problems, kernels_in, ptx_problems
from tools.kernels.cuda_code import Kernel
from tools.kernels.structures import structure

PLAIN = Kernel("forward plain, 4 neurons", "float32", "rectangle", "hard")
GENERAL = Kernel("backward, 4 neurons", "bfloat16", "erf", "soft")
SYMBOL = "_ZN4asgl18lif_forward_kernelIfNS_3LIFILNS_9SurrogateE0ELb1EEELi4ELNS_5InputE2ELi0EEEvNS_13ForwardParamsIT_EE"


def offset(name: str, member: str) -> int:
    return getattr(structure(name, torch.float32), member).offset


def ptx(code: str, symbol: str = "kernel") -> str:
    """A kernel of this code, with {x_seq} for its offset in the parameters."""
    layout = structure("BackwardParams" if "{grad_" in code else "ForwardParams", torch.float32)
    offsets = {member: getattr(layout, member).offset for member, _ in layout._fields_}
    return f"""
.version 9.0
.target sm_80
.visible .entry {symbol}(
	.param .align 8 .b8 {symbol}_param_0[600]
)
.maxntid 128, 1, 1
{{
	.reg .pred 	%p<2>;
	.reg .b64 	%rd<9>;
{code.format(**offsets).replace("PARAMS", f"{symbol}_param_0")}
	ret;

}}
"""


def operations(code: str):
    ((symbol, found),) = kernels_in(ptx(code))
    assert symbol == "kernel"
    return found


# ---- arithmetic ----


FAULTS = [
    "add.f32 \t%f1, %f2, %f3;", "@%p1 sub.f32 %f1, %f2, %f3;", "mul.f32 %f1, %f2, %f3;", "mul.rz.f32 %f1, %f2, %f3;",
    "add.f64 %fd1, %fd2, %fd3;", "mul.rn.ftz.f32 %f1, %f2, %f3;", "fma.rn.f32 %f1, %f2, %f3, %f4;",
    "fma.rn.f64 %fd1, %fd2, %fd3, %fd4;", "fma.rn.bf16x2 %r1, %r2, %r3, %r4;", "div.approx.f32 %f1, %f2, %f3;",
    "div.full.f32 %f1, %f2, %f3;", "rcp.approx.ftz.f32 %f1, %f2;", "ex2.approx.ftz.f32 %f1, %f2;",
    "sqrt.approx.f32 %f1, %f2;", "setp.lt.ftz.f32 %p1, %f1, %f2;", "cvt.ftz.s32.f32 %r1, %f1;",
    "$L__BB0_1:\n\tadd.f32 %f1, %f2, %f3;", "call.uni (retval0),\n\tslow_path,\n\t(param0);",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_other_arithmetic_than_the_references(fault):
    (problem,) = arithmetic_problems(PLAIN, operations(fault))
    assert re.search(r"\b(add|sub|mul|fma|div|rcp|ex2|sqrt|setp|cvt|call)\.\S* .*, 1 times$", problem)


@pytest.mark.parametrize(
    ("surrogate", "allowed"),
    [
        ("sigmoid", ["fma.rn", "fma.rm", "ex2.approx.ftz", "rcp.approx.ftz"]),
        ("arctan", ["fma.rn", "rcp.approx.ftz"]),
        ("erf", ["fma.rn", "fma.rm", "ex2.approx.ftz"]),
        ("fast_sigmoid", ["rcp.approx.ftz"]),
        ("laplace", ["fma.rn", "fma.rm", "ex2.approx.ftz"]),
        ("rectangle", []),
        ("triangle", []),
        ("", []),  # batch normalisation
    ],
)
def test_operations_allowed_to_a_surrogate_alone(surrogate, allowed):
    every = ["fma.rn.f32", "fma.rn.f64", "fma.rm.f32", "ex2.approx.ftz.f32", "rcp.approx.ftz.f32", "rcp.approx.ftz.f64"]
    code = operations("".join(f"{opcode} %f1, %f2;\n" for opcode in every))
    found = [problem.split()[0] for problem in arithmetic_problems(PLAIN._replace(surrogate=surrogate), code)]
    assert found == sorted(opcode for opcode in every if opcode.rpartition(".")[0] not in allowed)


def test_exact_products_of_moments():
    moments = Kernel("moments, 4 columns", "float32")
    code = operations("fma.rn.f32 %f1, %f2, %f3, %f4;\nfma.rz.f32 %f1, %f2, %f3, %f4;\nadd.f32 %f1, %f2, %f3;")
    assert [problem.split()[0] for problem in arithmetic_problems(moments, code)] == ["add.f32", "fma.rz.f32"]


def test_arithmetic_of_the_reference():
    code = """
	add.rn.f32 	%f1, %f2, %f3;
	sub.rn.f64 	%fd1, %fd2, %fd3;
	@!%p1 mul.rn.f32 	%f1, %f2, 0fBF800000;
	div.rn.f64 	%fd1, %fd2, %fd3;
	rcp.rn.f32 	%f1, %f2;
	mad.lo.s32 	%r1, %r2, %r3, %r4;
	add.s64 	%rd1, %rd2, 8;
	max.NaN.f32 	%f1, %f2, %f3;
	cvt.rn.bf16x2.f32 %r1, %f1, %f2;
"""
    assert not list(arithmetic_problems(PLAIN, operations(code)))


# ---- accesses ----

# A loop over steps whose address is carried, and comes from a later block.
GOOD = """
	mov.b64 	%rd1, PARAMS;
	ld.param.u64 	%rd2, [%rd1+{x_seq}];
	ld.param.u64 	%rd3, [PARAMS+{s_seq}];
	ld.param.u64 	%rd8, [PARAMS+{noise}];
	cvta.to.global.u64 	%rd5, %rd3;
	ld.u64 	%rd9, [%rd8+8];
	ld.shared.f32 	%f9, [first_lane+4];
	bra.uni 	$L__BB0_2;
$L__BB0_1:
	add.s64 	%rd6, %rd4, %rd7;
	ld.global.v4.f32 	{{%f1, %f2, %f3, %f4}}, [%rd6];
	mov.u64 	%rd4, %rd6;
	// begin inline asm
	st.global.v4.f32 [%rd5], {{%f1, %f2, %f3, %f4}};
	// end inline asm
	@%p1 bra 	$L__BB0_3;
	bra.uni 	$L__BB0_1;
$L__BB0_2:
	cvta.to.global.u64 	%rd4, %rd2;
	bra.uni 	$L__BB0_1;
$L__BB0_3:
"""


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ("v4.f32 	{{%f1, %f2, %f3, %f4}}", "v2.f32 	{{%f1, %f2}}", "1 loads from x_seq of 64 bits"),
        ("ld.global.v4.f32 	{{%f1, %f2, %f3, %f4}}", "ld.global.nc.f32 	%f1", "1 loads from x_seq of 32 bits"),
        ("st.global.v4.f32 [%rd5]", "st.global.f32 [%rd5+4]", "1 stores to s_seq of 32 bits"),
        ("[%rd1+{x_seq}]", "[%rd1+{shape}]", "1 loads from an unknown address of 128 bits"),
        ("[%rd5]", "[zeros$324]", "1 stores to an unknown address of 128 bits"),
        ("ld.shared.f32", "ld.local.f32", "1 accesses to local memory"),
    ],
)
def test_narrow_and_unknown_accesses(good, bad, problem):
    assert not list(access_problems(PLAIN, operations(GOOD)))
    assert good in GOOD
    (found,) = access_problems(PLAIN, operations(GOOD.replace(good, bad)))
    assert found.startswith(problem)


# Addresses from a vector of parameters, one of them by an addition.
HALVES = """
	mov.b64 	%rd1, PARAMS;
	add.s64 	%rd2, %rd1, {grad_x_seq};
	ld.param.v2.u64 	{{%rd3, %rd4}}, [%rd2];
	add.s64 	%rd5, %rd3, %rd6;
	st.global.v2.b32 	[%rd5], {{%r1, %r2}};
	st.global.v4.f32 	[%rd4], {{%f1, %f2, %f3, %f4}};
"""


def test_split_store():
    assert offset("BackwardParams", "grad_v_init") == offset("BackwardParams", "grad_x_seq") + 8
    assert not list(access_problems(GENERAL, operations(HALVES)))
    split = HALVES.replace(
        "st.global.v2.b32 	[%rd5], {{%r1, %r2}};",
        "st.global.u32 	[%rd5], %r1;\n	st.global.u32 	[%rd5+4], %r2;",
    )
    (problem,) = access_problems(GENERAL, operations(split))
    assert problem == "2 stores to grad_x_seq of 32 bits, expected 64"
    (problem,) = access_problems(GENERAL._replace(dtype="float32"), operations(HALVES))
    assert problem == "1 stores to grad_x_seq of 64 bits, expected 128"
    assert not list(access_problems(Kernel("backward, 1 neuron", "bfloat16", "erf", "soft"), operations(split)))


def test_shift_is_one_value():
    code = f"""
	ld.param.u64 	%rd1, [PARAMS+{offset("MomentsParams", "x_seq")}];
	ld.global.u16 	%rs1, [%rd1];
	ld.global.v2.u32 	{{{{%r1, %r2}}}}, [%rd1];
"""
    moments = Kernel("moments, 4 columns", "float16")
    assert not list(access_problems(moments, operations(code)))
    (problem,) = access_problems(moments, operations(code + "	ld.global.u16 	%rs1, [%rd1+2];\n"))
    assert problem == "1 loads from x_seq of 16 bits, expected 64"


# ---- kernels ----


def test_faults_are_named_by_their_kernel():
    code = ptx(GOOD, SYMBOL) + ptx(GOOD + "	mul.f32 	%f1, %f2, %f3;\n", SYMBOL.replace("Lb1", "Lb0"))
    (problem,) = ptx_problems(code)
    assert problem.startswith(f"{PLAIN._replace(reset='soft')}: mul.f32 may be contracted")


def test_every_kernel_of_fours_is_checked():
    for kind in cuda_code._KINDS.values():
        assert bool(re.fullmatch(FOURS, kind)) == bool(re.search(r"4 neurons|4 columns|T = ", kind))
