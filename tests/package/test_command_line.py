"""`python -m asgl_cuda`, and the cost of importing the package."""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import asgl_cuda
import asgl_cuda.__main__
from asgl_cuda.backends import BACKENDS, cupy

EMULATIONS = {"emulated", "ptx", "ptx_one"}  # in tests only


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


def test_info_names_every_backend():
    result = run("-m", "asgl_cuda", "info")
    assert result.returncode == 0, result.stderr
    assert asgl_cuda.__version__ in result.stdout
    assert torch.__version__ in result.stdout
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert set(lines) == set(BACKENDS) - EMULATIONS
    for name in set(asgl_cuda.available_backends()) - EMULATIONS:
        assert lines[name].split() == [name, "works"]
    for name, problem in asgl_cuda.unavailable_backends().items():
        assert problem in lines[name]


def test_info_tells_why_a_backend_does_not_work(monkeypatch, capsys):
    broken = BACKENDS["cpu"]._replace(problem=lambda: "the compiled extension is missing: no compiler")
    monkeypatch.setitem(BACKENDS, "cpu", broken)
    assert asgl_cuda.__main__.info() == 0
    assert "cpu        the compiled extension is missing: no compiler" in capsys.readouterr().out


def test_info_tells_a_missing_cupy_from_a_missing_nvrtc(monkeypatch):
    """A CUDA build of torch installs NVRTC itself."""
    monkeypatch.setitem(sys.modules, "cupy_backends", None)
    assert ", CuPy missing, " in cupy.description()
    monkeypatch.setitem(sys.modules, "cupy_backends", ModuleType("cupy_backends"))
    sys.modules["cupy_backends"].__spec__ = ModuleSpec("cupy_backends", None)
    monkeypatch.setattr(cupy, "nvrtc_problem", lambda: "no libnvrtc.so")
    assert ", NVRTC missing, " in cupy.description()


def test_info_names_the_page_that_explains_it_where_there_is_one(monkeypatch, capsys, tmp_path):
    """A wheel has no documentation, and must not name a missing file."""
    monkeypatch.setitem(BACKENDS, "cpu", BACKENDS["cpu"]._replace(problem=lambda: "no compiler"))
    page = tmp_path / "docs" / "guides" / "troubleshooting.md"
    monkeypatch.setattr(asgl_cuda.__main__.extension, "PACKAGE", tmp_path / "asgl_cuda")
    assert asgl_cuda.__main__.info() == 0
    assert "troubleshooting" not in capsys.readouterr().out
    page.parent.mkdir(parents=True)
    page.touch()
    assert asgl_cuda.__main__.info() == 0
    assert capsys.readouterr().out.endswith(f"what these messages mean: {page}\n")
    assert (Path(__file__).parents[2] / page.relative_to(tmp_path)).is_file()


def test_check_agrees_here():
    result = run("-m", "asgl_cuda", "check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 do not" in result.stdout
    assert "MISMATCH" not in result.stdout
    for name in asgl_cuda.available_backends():
        if name not in ("reference", *EMULATIONS):
            assert f"\n{name} " in result.stdout


@pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="no CPU kernels")
def test_unknown_instruction_set_is_an_error():
    message = "asgl_cuda: ASGL_CUDA_INSTRUCTION_SET must be baseline, avx2 or avx512, got 'sse'"
    result = run("-m", "asgl_cuda", "info", ASGL_CUDA_INSTRUCTION_SET="sse")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"{message}\n")
    code = "import torch, asgl_cuda; asgl_cuda.lif(torch.zeros(64, 20000))"
    result = run("-c", code, ASGL_CUDA_INSTRUCTION_SET="sse")
    assert result.returncode == 1
    assert result.stderr.endswith(f"ValueError: {message}\n")


@pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="no CPU kernels")
@pytest.mark.parametrize(("asked", "name"), [("baseline", "baseline"), ("avx2", "AVX2")])
def test_every_clone_of_the_cpu_kernels_agrees(asked, name):
    """The suite runs the processor's best clone; older processors select other clones."""
    found = run("-m", "asgl_cuda", "info", ASGL_CUDA_INSTRUCTION_SET=asked)
    if f"CPU kernels: {name}," not in found.stdout:
        pytest.skip(f"this processor has no {name}")
    result = run("-m", "asgl_cuda", "check", ASGL_CUDA_INSTRUCTION_SET=asked)
    assert result.returncode == 0, result.stdout + result.stderr
    # check leaves out the lean loops, long sequences, tails, and sums of many values.
    neuron = Path(__file__).parents[1] / "neuron"
    suite = [
        f"{neuron}/{test}"
        for test in (
            "test_features.py::test_equals_reference",
            "test_philox.py::test_mask_of_backend_is_analog_mask",
            "test_gradients.py::test_sizes_that_cross_the_edges_of_tiles",
            "test_batch_norm.py::test_variance_where_outliers_come_first",
        )
    ]
    result = run("-m", "pytest", *suite, ASGL_CUDA_INSTRUCTION_SET=asked, ASGL_TEST_BACKENDS="cpu")
    assert result.returncode == 0, result.stdout + result.stderr


def flip_one(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    last = tensor.view(-1)[-1:]
    last.copy_(torch.where(last < 1, last + 1, 0))
    return tensor


def only(monkeypatch, backends):
    """Replaces the table in every module: removing rows would change the order of preference."""
    for module in ("backends", "call", "integrator", "recurrent", "selfcheck"):
        monkeypatch.setattr(f"asgl_cuda.{module}.BACKENDS", backends)


def parameters_grown(result):
    return result[0], *(1.1 * grad for grad in result[1:])


@pytest.mark.parametrize(
    ("operator", "broken", "quantity"),
    [
        ("lif_forward", lambda result: (flip_one(result[0]), *result[1:]), "s_seq"),
        ("lif_forward", lambda result: (result[0], flip_one(result[1]), *result[2:]), "v_last"),
        ("lif_backward", lambda result: (flip_one(result[0]), *result[1:]), "grad_x_seq"),
        ("lif_backward", parameters_grown, "grad_width"),
        ("integrator_forward", lambda result: (flip_one(result[0]), *result[1:]), "v_seq"),
        ("integrator_backward", parameters_grown, "grad_decay"),
        ("recurrent_forward", lambda result: (flip_one(result[0]), *result[1:]), "s_seq"),
        ("recurrent_backward", lambda result: (result[0], 1.1 * result[1], *result[2:]), "grad_weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "broken",
)
def test_check_finds_one_wrong_element(backend, monkeypatch, capsys, operator, broken, quantity):
    operators = BACKENDS[backend].operators
    right = getattr(operators, operator)
    wrong = operators._replace(**{operator: lambda *arguments: broken(right(*arguments))})
    spoilt = BACKENDS[backend]._replace(operators=wrong, direct=None)
    only(monkeypatch, {backend: spoilt, "reference": BACKENDS["reference"]})
    assert asgl_cuda.__main__.check() == 1
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(backend)]
    words = {"integrator": "leaky_integrator", "recurrent": "recurrent_lif"}
    word = words.get(operator.partition("_")[0])
    of_it = [line for line in lines if (word in line if word else not any(each in line for each in words.values()))]
    assert of_it
    assert all("MISMATCH" in line and quantity in line for line in of_it)
    assert f"{len(lines) - len(of_it)} cases agree, {len(of_it)} do not" in out


def test_check_without_a_fused_backend_says_so(monkeypatch, capsys):
    only(monkeypatch, {"reference": BACKENDS["reference"]})
    assert asgl_cuda.__main__.check() == 0
    assert "nothing to compare" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("bench",)], ids=["none", "unknown"])
def test_no_command_prints_usage(arguments):
    result = run("-m", "asgl_cuda", *arguments)
    assert result.returncode == 2
    assert not result.stdout
    assert result.stderr.startswith("usage: python -m asgl_cuda")
    assert "info" in result.stderr
    assert "check" in result.stderr


def test_import_brings_nothing_but_torch():
    """No package that only tests, benchmarks or interop modules need, even where it is installed."""
    code = """
import sys, torch
before = set(sys.modules)
import asgl_cuda
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    # A lazily loaded part of torch itself may come with it.
    assert set(result.stdout.split()) - {"torch"} == {"asgl_cuda"}


def test_import_prints_and_warns_nothing():
    result = run("-W", "error:asgl_cuda", "-c", "import torch; import asgl_cuda")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_missing_numpy_is_silent(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')")
    search = os.pathsep.join([str(tmp_path), *sys.path])
    result = run("-m", "asgl_cuda", "--version", PYTHONPATH=search)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"asgl_cuda {asgl_cuda.__version__}\n", "")


def test_output_that_is_not_read_to_its_end():
    command = ["bash", "-c", '"$0" -m asgl_cuda info | head -n 1', sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (len(result.stdout.splitlines()), result.stderr) == (1, "")
