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
import asgl_cuda.__main__ as command
from asgl_cuda.backends import BACKENDS, cupy

EMULATIONS = {"emulated", "ptx", "ptx_one"}  # in tests only
HERE = set(asgl_cuda.available_backends()) - EMULATIONS
needs_kernels = pytest.mark.skipif("cpu" not in HERE, reason="no CPU kernels")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})


def main(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["asgl_cuda", *arguments])
    try:
        status = command.main()
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def only(monkeypatch, backends):
    """Replaces the table in every module: removing rows would change the order of preference."""
    neurons = "neurons.lif", "neurons.leaky_integrator", "neurons.recurrent_lif"
    for module in ("backends", "calls.plan", *neurons, "selfcheck"):
        monkeypatch.setattr(f"asgl_cuda.{module}.BACKENDS", backends)


# ---- info ----


def test_info_names_every_backend(monkeypatch, capsys, tmp_path):
    """With the reason why one does not work, and the page that explains it, where there is one: a wheel has none."""
    broken = BACKENDS["cupy"]._replace(problem=lambda: "no compiler")
    monkeypatch.setitem(BACKENDS, "cupy", broken)
    monkeypatch.setattr(command.extension, "PACKAGE", tmp_path / "asgl_cuda")
    status, out, _ = main(monkeypatch, capsys, "info")
    assert status == 0
    assert f"asgl_cuda {asgl_cuda.__version__}, torch {torch.__version__}, " in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert set(lines) - EMULATIONS == set(BACKENDS) - EMULATIONS
    assert all(lines[name].split() == [name, "works"] for name in HERE - {"cupy"})
    assert lines["cupy"] == "  cupy       no compiler"
    assert all(problem in lines[name] for name, problem in asgl_cuda.unavailable_backends().items())
    assert "troubleshooting" not in out
    page = tmp_path / "docs" / "guides" / "troubleshooting.md"
    page.parent.mkdir(parents=True)
    page.touch()
    assert main(monkeypatch, capsys, "info")[1].endswith(f"what these messages mean: {page}\n")
    assert (Path(__file__).parents[2] / page.relative_to(tmp_path)).is_file()


def test_info_tells_a_missing_cupy_from_a_missing_nvrtc(monkeypatch):
    """A CUDA build of torch installs NVRTC itself."""
    monkeypatch.setitem(sys.modules, "cupy_backends", None)
    assert ", CuPy missing, " in cupy.describe_paths()
    monkeypatch.setitem(sys.modules, "cupy_backends", ModuleType("cupy_backends"))
    sys.modules["cupy_backends"].__spec__ = ModuleSpec("cupy_backends", None)
    monkeypatch.setattr(cupy, "nvrtc_problem", lambda: "no libnvrtc.so")
    assert ", NVRTC missing, " in cupy.describe_paths()


def test_output_that_is_not_read_to_its_end():
    result = run("bash", "-c", '"$0" -m asgl_cuda info | head -n 1', sys.executable)
    assert (len(result.stdout.splitlines()), result.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [((), 2, "usage: python -m asgl_cuda"), (("bench",), 2, "info, check"), (("--version",), 0, asgl_cuda.__version__)],
)
def test_arguments(monkeypatch, capsys, arguments, status, words):
    found, out, err = main(monkeypatch, capsys, *arguments)
    assert found == status
    assert words in (err if status else out).replace("'", "")
    assert not (out if status else err)


# ---- check ----


def flip_one(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    last = tensor.view(-1)[-1:]
    last.copy_(torch.where(last < 1, last + 1, 0))
    return tensor


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


def spoilt(number, change):
    """An operator with another of its results."""
    return lambda result: tuple(change(each) if i == number else each for i, each in enumerate(result))


def grown(result):
    return result[0], *(1.1 * grad for grad in result[1:])


WORDS = {"integrator": "leaky_integrator", "recurrent": "recurrent_lif"}  # of the cases of an operator


@pytest.mark.parametrize(
    "broken",
    [
        {
            "lif_forward": (spoilt(0, flip_one), "s_seq"), "integrator_backward": (grown, "grad_decay"),
            "recurrent_forward": (spoilt(0, flip_one), "s_seq"),
        },
        {
            "lif_backward": (spoilt(0, flip_one), "grad_x_seq"), "integrator_forward": (spoilt(0, flip_one), "v_seq"),
            "recurrent_backward": (spoilt(1, lambda grad: 1.1 * grad), "grad_weight"),
        },
        {"lif_forward": (spoilt(1, flip_one), "v_last")},
        {"lif_backward": (grown, "grad_width")},
        {
            "lif_forward": (spoilt(0, with_nan), "s_seq"), "integrator_forward": (spoilt(0, with_nan), "v_seq"),
            "recurrent_backward": (spoilt(1, with_nan), "grad_weight"),
        },
    ],
    ids=lambda broken: ", ".join(broken),
)  # fmt: skip
def test_check_finds_one_wrong_element(backend, monkeypatch, capsys, broken):
    right = BACKENDS[backend].operators._asdict()
    wrong = {
        name: lambda *arguments, name=name, change=change: change(right[name](*arguments))
        for name, (change, _) in broken.items()
    }
    operators = BACKENDS[backend].operators._replace(**wrong)
    only(monkeypatch, {backend: BACKENDS[backend]._replace(operators=operators, direct=None), **REFERENCE})
    status, out, _ = main(monkeypatch, capsys, "check")
    lines = [line for line in out.splitlines() if line.startswith(backend)]
    found = 0
    for name, (_, quantity) in broken.items():
        word = WORDS.get(name.partition("_")[0])
        cases = [line for line in lines if (word in line if word else not any(each in line for each in WORDS.values()))]
        assert cases
        assert all("MISMATCH" in line and quantity in line for line in cases)
        found += len(cases)
    assert status == 1
    assert f"{len(lines) - found} cases agree, {found} do not" in out


REFERENCE = {"reference": BACKENDS["reference"]}


def test_check_agrees_or_has_nothing_to_compare(monkeypatch, capsys):
    only(monkeypatch, {name: BACKENDS[name] for name in HERE})
    status, out, _ = main(monkeypatch, capsys, "check")
    assert status == 0
    assert ", 0 do not" in out
    assert "MISMATCH" not in out
    assert all(f"\n{name} " in out for name in HERE - {"reference"})
    only(monkeypatch, REFERENCE)
    status, out, _ = main(monkeypatch, capsys, "check")
    assert status == 0
    assert "nothing to compare" in out


# ---- the processor ----


@needs_kernels
def test_unknown_instruction_set_is_an_error():
    code = """
import sys, torch, asgl_cuda.__main__
sys.argv[1:] = ["info"]
print(asgl_cuda.__main__.main())
asgl_cuda.lif(torch.zeros(64, 20000))
"""
    message = "asgl_cuda: ASGL_CUDA_INSTRUCTION_SET must be baseline, avx2 or avx512, got 'sse'"
    result = run(sys.executable, "-c", code, ASGL_CUDA_INSTRUCTION_SET="sse")
    assert (result.returncode, result.stdout) == (1, "1\n")
    assert result.stderr.startswith(f"{message}\n")
    assert result.stderr.endswith(f"ValueError: {message}\n")


# What check leaves out: the lean loops, long sequences, tails, edges of tiles, and sums of many values.
CLONE = """
import sys, torch, asgl_cuda
from asgl_cuda.__main__ import check
from asgl_cuda.selfcheck import differences
if asgl_cuda.backends.extension.module.cpu_instruction_set() != sys.argv[1]:
    sys.exit(77)
assert check() == 0
state = torch.tensor([3, 5])
for T, N in ((1, 1), (2, 7), (5, 31), (16, 257), (17, 700), (33, 4096), (100, 64), (4, 50001)):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x_seq = torch.randn(T, N).to(dtype).requires_grad_()
        width = torch.ones(N, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        for options in (
            {"outputs": ("s_seq",)}, {"outputs": ("s_seq",), "width": width, "analog_prob": 0.3, "rng_state": state},
            {"v_reset": None, "decay": 0.9, "width": width},
        ):
            for name, each in differences(x_seq, "cpu", surrogate="rectangle", **options).items():
                assert each.relative <= (1e-5 if name == "grad_width" else 0), (T, N, dtype, options, name, each)
x_seq = torch.randn(3, 64, 5, 40) * 1e-3
x_seq[0, 0] += 1e4
found, expected = (
    asgl_cuda.batch_norm_lif(x_seq, training=True, return_h_seq=True, backend=each) for each in ("cpu", "reference")
)
torch.testing.assert_close(found.h_seq, expected.h_seq, rtol=1e-5, atol=1e-6)
"""


@needs_kernels
@pytest.mark.parametrize(("asked", "name"), [("baseline", "baseline"), ("avx2", "AVX2")])
def test_every_clone_of_the_cpu_kernels_agrees(asked, name):
    """The suite runs the processor's best clone; older processors select other clones."""
    result = run(sys.executable, "-c", CLONE, name, ASGL_CUDA_INSTRUCTION_SET=asked)
    if result.returncode == 77:
        pytest.skip(f"this processor has no {name}")
    assert result.returncode == 0, result.stdout + result.stderr


# ---- import ----


def test_import_brings_nothing_but_torch():
    """No package that only tests, benchmarks or interop modules need, even where it is installed; no hook, no word."""
    code = """
import sys, torch
before = set(sys.modules)
import asgl_cuda
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
from torch.optim import optimizer
assert not optimizer._global_optimizer_pre_hooks and not optimizer._global_optimizer_post_hooks
"""
    result = run(sys.executable, "-W", "error:asgl_cuda", "-c", code)
    # A lazily loaded part of torch itself may come with it.
    assert (result.returncode, result.stderr) == (0, "")
    assert set(result.stdout.split()) - {"torch"} == {"asgl_cuda"}
