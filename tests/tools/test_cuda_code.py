"""The tool that reads compiled CUDA code and holds it against the committed table must see its faults."""

from __future__ import annotations

import pytest
from sass import sass

from tools.kernels import cuda_compile
from tools.kernels.code_checks import sass_problems
from tools.kernels.cuda_code import Kernel, Usage, usages

FORWARD = Kernel("forward plain, 4 neurons", "float32", "rectangle", "hard")
BACKWARD = Kernel("backward plain, T = 4", "bfloat16", "sigmoid", "soft")
OTHER = Kernel("backward, 4 neurons", "float16", "erf", "soft")
FINE = Usage(40, 16, 0, 0, 0)
SPILLING = Usage(168, 16, 8, 4, 12)


def table_of(resources: cuda_compile.Resources) -> list[cuda_compile.Row]:
    """The rows after one way through Markdown."""
    rows = cuda_compile.rows_of(resources)
    read, version = cuda_compile.from_markdown(cuda_compile.to_markdown(rows, "13.0.88", ["-O3"]))
    assert (read, version) == (rows, "13.0.88")
    return read


def problems(now: cuda_compile.Resources, committed: cuda_compile.Resources) -> list[str]:
    return cuda_compile.compare(cuda_compile.rows_of(now), "13.0.88", table_of(committed), "13.0.88").problems


@pytest.mark.parametrize(
    ("symbol", "kernel"),
    [
        (
            "void asgl::lif_forward_kernel<float, asgl::LIF<(asgl::Surrogate)0, true>, 4, (asgl::Input)2, 0>"
            "(asgl::ForwardParams<float>)",
            FORWARD,
        ),
        (
            "void asgl::lif_backward_settled_kernel<asgl::BFloat16, asgl::LIF<(asgl::Surrogate)2, false>, 4, "
            "(asgl::Input)2, 4>(asgl::BackwardParams<asgl::BFloat16>)",
            BACKWARD,
        ),
        (
            "void asgl::lif_backward_settled_kernel<asgl::Half, asgl::LIF<(asgl::Surrogate)0, true>, 4, "
            "(asgl::Input)1, 0>(asgl::BackwardParams<asgl::Half>)",
            Kernel("backward normalised, 4 neurons", "float16", "rectangle", "hard"),
        ),
        (
            "void asgl::lif_backward_kernel<double, asgl::LIFByOptions, 1>(asgl::BackwardParams<double>)",
            Kernel("backward, 1 neuron", "float64", "any surrogate", "any reset"),
        ),
        (
            "void asgl::gradient_sum_kernel<double>(asgl::GradientSum<double>)",
            Kernel("gradient sum", "float64"),
        ),
        (
            "void asgl::batch_moments_kernel<asgl::BFloat16, 4>(asgl::MomentsParams<asgl::BFloat16>)",
            Kernel("moments, 4 columns", "bfloat16"),
        ),
        (
            "void asgl::integrator_kernel<asgl::Half, 4, (asgl::Pass)2>(asgl::IntegratorParams<asgl::Half>)",
            Kernel("integrator backward with sums, 4 neurons", "float16"),
        ),
        (
            "void asgl::batch_norm_coefficients_kernel<float>(asgl::CoefficientsParams<float>)",
            Kernel("coefficients, a block each", "float32"),
        ),
    ],
)
def test_names(symbol, kernel):
    assert Kernel.of_symbol(symbol) == kernel


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
    assert usages(log) == {"_Za": SPILLING, "_Zb": Usage(39, 0, 0, 0, 0)}


def test_the_table_accepts_what_it_lists():
    resources = {FORWARD: {80: FINE, 90: FINE}, OTHER: {80: SPILLING, 90: FINE}}
    assert problems(resources, resources) == []


def test_a_spill_on_one_more_architecture_is_found():
    before = {OTHER: {80: SPILLING, 90: FINE}}
    assert problems({OTHER: {80: SPILLING, 90: SPILLING}}, before) == [f"a new spill or stack: {OTHER}, sm_90"]


def test_a_kernel_more_is_found_in_a_row_of_its_own_or_of_many():
    before = {FORWARD: {90: FINE}, OTHER: {90: FINE}}
    for kernel in (FORWARD._replace(reset="soft"), OTHER._replace(surrogate="arctan")):
        assert "lacks a kernel" in problems({**before, kernel: {90: FINE}}, before)[0]


def test_a_change_of_registers_is_noted_where_nvcc_is_the_same():
    rows = cuda_compile.rows_of({FORWARD: {90: FINE._replace(registers=50)}})
    committed = table_of({FORWARD: {90: FINE}})
    same = cuda_compile.compare(rows, "13.0.88", committed, "13.0.88")
    assert (same.problems, same.notes) == ([], ["float32, rectangle: forward plain, 4 neurons, hard: sm_90 40 -> 50"])
    assert cuda_compile.compare(rows, "13.1.5", committed, "13.0.88") == ([], [])


def test_architectures_that_no_longer_have_the_code_of_another():
    same = {FORWARD: {86: FINE, 89: FINE, 90: SPILLING}, BACKWARD: {89: FINE, 90: SPILLING}}
    assert list(cuda_compile.same_code_problems(same)) == []
    other = {FORWARD: {86: FINE, 88: FINE, 89: FINE._replace(registers=41)}}
    assert list(cuda_compile.same_code_problems(other)) == [f"sm_89 no longer has the code of sm_86: {FORWARD}"]


def test_default_paths_must_be_there_and_not_spill():
    resources = {kernel: {80: FINE, 90: FINE} for kernel in cuda_compile.default_paths()}
    assert list(cuda_compile.default_path_problems(resources)) == []
    resources[BACKWARD] = {80: FINE, 90: SPILLING}
    del resources[FORWARD]
    found = sorted(cuda_compile.default_path_problems(resources))
    assert [problem.split(":")[0] for problem in found] == [
        "a default path is gone, or has another name",
        "a default path spills",
    ]


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


GENERAL = Kernel("backward, 1 neuron", "float32", "erf", "hard")


def nvrtc_problems(ours: cuda_compile.Resources, same_version: bool = True) -> list[str]:
    theirs = {FORWARD: {90: FINE, 120: FINE}, GENERAL: {90: FINE._replace(registers=110), 120: FINE}}
    return cuda_compile.compare_compilers({**theirs, **ours}, theirs, same_version)


def test_nvrtc_that_agrees():
    assert not nvrtc_problems({})
    fewer_blocks_fit, as_many_fit = ({GENERAL: {90: FINE._replace(registers=number)}} for number in (130, 112))
    assert not nvrtc_problems(as_many_fit)
    assert nvrtc_problems(fewer_blocks_fit)


@pytest.mark.parametrize(
    ("kind", "dtype", "registers", "alike"),
    [
        ("backward, 4 neurons", "float16", 146, True),  # three blocks are asked for
        ("backward, 4 neurons", "float16", 170, False),
        ("backward plain, 4 neurons", "float32", 130, True),
        ("backward plain, 4 neurons", "bfloat16", 130, False),  # four
        ("backward plain, T = 4", "bfloat16", 120, True),
        ("integrator backward with sums, 1 neuron", "float16", 130, False),
        ("forward plain, T = 4", "bfloat16", 120, False),
    ],
)
def test_nvrtc_has_the_blocks_that_are_asked_for(kind, dtype, registers, alike):
    kernel = Kernel(kind, dtype, "erf", "hard")
    ours, theirs = ({kernel: {80: FINE._replace(registers=number)}} for number in (registers, 128))
    assert bool(cuda_compile.compare_compilers(ours, theirs, True)) != alike


def test_nvrtc_that_takes_other_registers():
    other = FINE._replace(registers=42)
    (problem,) = nvrtc_problems({FORWARD: {90: other}})
    assert problem.startswith(f"other registers by NVRTC: {FORWARD}, sm_90: ")
    assert not nvrtc_problems({FORWARD: {90: other}}, same_version=False)
    assert not nvrtc_problems({FORWARD: {120: other}})


def test_nvrtc_that_spills():
    for same_version in (False, True):
        (problem,) = nvrtc_problems({GENERAL: {120: SPILLING}}, same_version)
        assert problem.startswith(f"a spill of NVRTC's: {GENERAL}, sm_120: ")


def test_kernels_that_only_one_of_them_has():
    (problem,) = nvrtc_problems({OTHER: {90: FINE}})
    assert problem == f"nvcc's build lacks what NVRTC was asked for: {OTHER}"
    (problem,) = cuda_compile.compare_compilers({}, {OTHER: {90: FINE}}, True)
    assert problem == f"the launchers in Python never ask for {OTHER}"


def test_every_kernel_that_can_be_asked_for_has_one_name():
    names = cuda_compile.kernels_asked_for()
    assert len(set(names)) == len(names) == 505
