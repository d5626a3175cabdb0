"""Faults of compiled CUDA code, and differences from the committed figures, are found."""

from __future__ import annotations

import json

import pytest

from tools.kernels import resources
from tools.kernels.code_checks import ptx_problems
from tools.kernels.cuda_code import Kernel, Usage
from tools.kernels.resources import Resources
from tools.ptx import accesses

FORWARD = Kernel("forward plain, 4 neurons", "float32", "rectangle", "hard")
BACKWARD = Kernel("backward plain, T = 4", "bfloat16", "sigmoid", "soft")
OTHER = Kernel("backward, 4 neurons", "float16", "erf", "soft")
FINE = Usage(40, 16, 0, 0, 0)
SPILLING = Usage(168, 16, 8, 4, 12)


def compared(now: Resources, committed: Resources, version: str = "13.0.88") -> resources.Findings:
    """The findings against figures after a JSON round trip."""
    figures = json.loads(json.dumps({"nvcc": "13.0.88", "sections": resources.sections(committed)}))
    return resources.compare(resources.sections(now), version, figures)


def test_differences_from_the_committed_figures():
    before = {FORWARD: {80: FINE, 90: FINE}, OTHER: {80: SPILLING, 90: FINE}}
    assert compared(before, before) == ([], [])
    spilling = {**before, OTHER: {80: SPILLING, 90: SPILLING}}
    assert compared(spilling, before).problems == [f"a new spill or stack: {OTHER}, sm_90"]
    for kernel in (FORWARD._replace(reset="soft"), OTHER._replace(surrogate="arctan")):  # with and without its own row
        assert "lacks a kernel" in compared({**before, kernel: {80: FINE, 90: FINE}}, before).problems[0]
    more = {**before, FORWARD: {80: FINE, 90: FINE._replace(registers=50)}}
    assert compared(more, before) == ([], ["float32, rectangle: forward plain, 4 neurons, hard: sm_90 40 -> 50"])
    assert compared(more, before, version="13.1.5") == ([], []), "registers change with the version"


def test_spills_of_nvrtc():
    nvcc, spilling = {FORWARD: {120: FINE}}, {FORWARD: {120: SPILLING}}
    found, known = (resources.with_nvrtc(resources.sections(nvcc), each, nvcc) for each in (spilling, nvcc))
    (problem,) = resources.compare(found, "13.0.88", {"nvcc": "13.0.88", "sections": known}).problems
    assert problem == "NVRTC: kernels that spill on sm_120: 1 instead of 0"
    assert not resources.compare(found, "13.0.88", {"nvcc": "13.0.88", "sections": found}).problems


def test_architectures_that_no_longer_have_the_code_of_another():
    same = {FORWARD: {86: FINE, 89: FINE, 90: SPILLING}, BACKWARD: {89: FINE, 90: SPILLING}}
    assert list(resources.same_code_problems(same)) == []
    other = {FORWARD: {86: FINE, 88: FINE, 89: FINE._replace(registers=41)}}
    assert list(resources.same_code_problems(other)) == [f"sm_89 no longer has the code of sm_86: {FORWARD}"]


@pytest.mark.parametrize("page", [resources.PAGE, accesses.PAGE], ids=lambda page: page.path.name)
def test_page_is_drawn_from_its_figures(page):
    """After a change of the text alone, the page's program redraws the page with --draw."""
    assert page.text(page.figures) == page.path.read_text()


# ---- arithmetic in PTX ----

ENTRY = """
.visible .entry {symbol}(
	.param .align 8 .b8 {symbol}_param_0[600]
)
{{
	.reg .pred 	%p<2>;
{code}
	ret;

}}
"""
SYMBOL = "_ZN4asgl18lif_forward_kernelIfNS_3LIFILNS_9SurrogateE0ELb1EEELi4ELNS_5InputE2ELi0EEEvNS_13ForwardParamsIT_EE"
FAULTS = [
    "add.f32 \t%f1, %f2, %f3;", "@%p1 sub.f32 %f1, %f2, %f3;", "mul.f32 %f1, %f2, %f3;", "mul.rz.f32 %f1, %f2, %f3;",
    "add.f64 %fd1, %fd2, %fd3;", "mul.rn.ftz.f32 %f1, %f2, %f3;", "fma.rn.f32 %f1, %f2, %f3, %f4;",
    "fma.rn.f64 %fd1, %fd2, %fd3, %fd4;", "fma.rn.bf16x2 %r1, %r2, %r3, %r4;", "div.approx.f32 %f1, %f2, %f3;",
    "div.full.f32 %f1, %f2, %f3;", "rcp.approx.ftz.f32 %f1, %f2;", "ex2.approx.ftz.f32 %f1, %f2;",
    "sqrt.approx.f32 %f1, %f2;", "setp.lt.ftz.f32 %p1, %f1, %f2;", "cvt.ftz.s32.f32 %r1, %f1;",
    "$L__BB0_1:\n\tadd.f32 %f1, %f2, %f3;", "call.uni (retval0),\n\tslow_path,\n\t(param0);",
]  # fmt: skip
CORRECT = """
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


def test_other_arithmetic_than_the_references():
    """Each fault, among correct kernels, is named with its kernel."""
    soft = SYMBOL.replace("Lb1", "Lb0")
    for fault in FAULTS:
        code = ENTRY.format(symbol=SYMBOL, code=CORRECT) + ENTRY.format(symbol=soft, code=CORRECT + fault)
        opcode = fault.split()[1 if fault[0] in "@$" else 0]
        (problem,) = ptx_problems(code)
        assert problem.startswith(f"{FORWARD._replace(reset='soft')}: {opcode} ")
        assert problem.endswith(", 1 times")
