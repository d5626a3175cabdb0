"""Faults of compiled CUDA code, and differences from the committed figures, are found."""

from __future__ import annotations

import json

import pytest
from sass import sass

from asgl_cuda.backends import launched
from tools.kernels import cuda_compile, resources
from tools.kernels.code_checks import sass_problems
from tools.kernels.cuda_code import Kernel, Usage, reported_usages
from tools.kernels.resources import Resources

FORWARD = Kernel("forward plain, 4 neurons", "float32", "rectangle", "hard")
BACKWARD = Kernel("backward plain, T = 4", "bfloat16", "sigmoid", "soft")
GENERAL = Kernel("backward, 1 neuron", "float32", "erf", "hard")
OTHER = Kernel("backward, 4 neurons", "float16", "erf", "soft")
FINE = Usage(40, 16, 0, 0, 0)
SPILLING = Usage(168, 16, 8, 4, 12)


def compared(now: Resources, committed: Resources, version: str = "13.0.88") -> resources.Findings:
    """The findings against figures after a JSON round trip."""
    figures = json.loads(json.dumps({"nvcc": "13.0.88", "sections": resources.sections(committed)}))
    return resources.compare(resources.sections(now), version, figures)


@pytest.mark.parametrize(
    ("symbol", "kernel"),
    [
        ("lif_forward_kernel<float, asgl::LIF<(asgl::Surrogate)0, true>, 4, (asgl::Input)2, 0>", FORWARD),
        ("lif_backward_settled_kernel<asgl::BFloat16, asgl::LIF<(asgl::Surrogate)2, false>, 4, (asgl::Input)2, 4>",
         BACKWARD),
        ("lif_backward_settled_kernel<asgl::Half, asgl::LIF<(asgl::Surrogate)0, true>, 4, (asgl::Input)1, 0>",
         Kernel("backward normalised, 4 neurons", "float16", "rectangle", "hard")),
        ("lif_backward_kernel<double, 1, (asgl::Input)0>",
         Kernel("backward, 1 neuron", "float64", "any surrogate", "any reset")),
        ("lif_backward_settled_kernel<float, asgl::LIF<(asgl::Surrogate)0, true>, 4, (asgl::Input)3, 4>",
         Kernel("backward normalised with residual, T = 4", "float32", "rectangle", "hard")),
        ("gradient_sum_kernel<double>", Kernel("gradient sum", "float64")),
        ("batch_moments_kernel<asgl::BFloat16, 4>", Kernel("moments, 4 columns", "bfloat16")),
        ("integrator_kernel<asgl::Half, 4, (asgl::Pass)2>",
         Kernel("integrator backward with sums, 4 neurons", "float16")),
        ("batch_norm_coefficients_kernel<float>", Kernel("coefficients, a block each", "float32")),
    ],
)  # fmt: skip
def test_kernel_of_symbol(symbol, kernel):
    assert Kernel.from_symbol(f"void asgl::{symbol}(asgl::Params)") == kernel


def test_report_of_ptxas():
    log = """
ptxas info    : Compiling entry function '_Za' for 'sm_90'
ptxas info    : Function properties for _Za
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 16 bytes smem
ptxas info    : Compiling entry function '_Zb' for 'sm_90'
ptxas info    : Function properties for _Zb
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 39 registers, used 0 barriers
"""
    assert reported_usages(log) == {"_Za": SPILLING, "_Zb": Usage(39, 0, 0, 0, 0)}


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


def test_architectures_that_no_longer_have_the_code_of_another():
    same = {FORWARD: {86: FINE, 89: FINE, 90: SPILLING}, BACKWARD: {89: FINE, 90: SPILLING}}
    assert list(resources.same_code_problems(same)) == []
    other = {FORWARD: {86: FINE, 88: FINE, 89: FINE._replace(registers=41)}}
    assert list(resources.same_code_problems(other)) == [f"sm_89 no longer has the code of sm_86: {FORWARD}"]


def test_default_paths_exist_and_do_not_spill():
    found = {kernel: {80: FINE, 90: FINE} for kernel in cuda_compile.default_paths()}
    assert list(cuda_compile.default_path_problems(found)) == []
    found[BACKWARD] = {80: FINE, 90: SPILLING}
    del found[FORWARD]
    problems = sorted(cuda_compile.default_path_problems(found))
    assert [problem.split()[3:5] for problem in problems] == [["is", "gone,"], ["spills:", "backward"]]


GOOD = "LDG.E.128 R4, [R2.64]\n" * 8 + "LDG.E R1, [R2.64]\n" * 6 + "STG.E.128 [R2.64], R4\n" * 4


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (GOOD, []),
        (GOOD + "STL [R1], R4", ["1 accesses to local memory"]),
        (GOOD + "LDL.64 R4, [R1]", ["1 accesses to local memory"]),
        (GOOD + "STG.E [R2.64], R4\n" * 3, ["3 stores of fewer than 128 bits, expected at most 2"]),
        (GOOD + "LDG.E.64 R4, [R2.64]\n" * 6, ["12 loads of fewer than 128 bits, expected at most 11"]),
        (GOOD.replace(".128 R4", " R4", 6), ["2 loads of 128 bits, expected at least 4", "12 loads of fewer than 128"]),
    ],
)
def test_disassembly_of_a_hot_kernel(code, expected):
    found = list(sass_problems(FORWARD, sass(code)))
    assert len(found) == len(expected)
    assert all(one.startswith(other) for one, other in zip(found, expected, strict=True))


# ---- NVRTC against nvcc ----


def nvrtc_problems(ours: Resources, same_version: bool = True) -> list[str]:
    theirs = {FORWARD: {90: FINE, 120: FINE}, GENERAL: {90: FINE._replace(registers=110), 120: FINE}}
    return cuda_compile.compare_compilers({**theirs, **ours}, theirs, same_version)


def test_faults_of_nvrtc():
    assert not nvrtc_problems({})
    other = FINE._replace(registers=42)
    (problem,) = nvrtc_problems({FORWARD: {90: other}})
    assert problem.startswith(f"other registers by NVRTC: {FORWARD}, sm_90: ")
    assert not nvrtc_problems({FORWARD: {90: other}}, same_version=False)
    assert not nvrtc_problems({FORWARD: {120: other}})
    for same_version in (False, True):
        (problem,) = nvrtc_problems({GENERAL: {120: SPILLING}}, same_version)
        assert problem.startswith(f"a spill of NVRTC's: {GENERAL}, sm_120: ")
    assert nvrtc_problems({OTHER: {90: FINE}}) == [f"nvcc's build lacks what NVRTC was asked for: {OTHER}"]
    missing = cuda_compile.compare_compilers({}, {OTHER: {90: FINE}}, True)
    assert missing == [f"the operators never ask for {OTHER}"]


@pytest.mark.parametrize(
    ("kind", "dtype", "registers", "accepted"),
    [
        ("backward, 4 neurons", "float16", 146, True),  # its launch bounds ask for three blocks
        ("backward, 4 neurons", "float16", 170, False),
        ("backward plain, 4 neurons", "float32", 130, True),
        ("backward plain, 4 neurons", "bfloat16", 130, False),  # four blocks
        ("backward plain, T = 4", "bfloat16", 120, True),
        ("integrator backward with sums, 1 neuron", "float16", 130, False),
        ("forward plain, T = 4", "bfloat16", 120, False),
    ],
)
def test_registers_of_nvrtc_within_launch_bounds(kind, dtype, registers, accepted):
    kernel = Kernel(kind, dtype, "erf", "hard")
    ours, theirs = ({kernel: {80: FINE._replace(registers=number)}} for number in (registers, 128))
    assert bool(cuda_compile.compare_compilers(ours, theirs, True)) != accepted


def test_names_of_kernels_asked_for_are_unique():
    names = launched.kernel_names()
    assert len(set(names)) == len(names) == 926
