"""The pure Python wheel, used beside torch alone; and the commands of the README."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import asgl_cuda
from asgl_cuda.backends.extension import build_notes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# These test the reference and the errors; the rest needs a fused backend or a checkout.
SUITE = (
    "calls/test_arguments.py", "neurons/test_base.py", "reference/test_noise.py", "torch_modes/test_torch_features.py"
)  # fmt: skip
TESTS_NEED = ("conftest.py", "comparison.py", "layer_cases.py")


def run(*command: str | Path, cwd: Path, status: int = 0, **environment: str) -> str:
    """The output of a command, which must end with this status and sees no checkout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    result = subprocess.run(
        words, cwd=cwd, env={**inherited, **environment}, text=True, timeout=600, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == status, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the tree with leftovers of earlier builds."""
    directory = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, directory / "tree", ignore=ignored)
    for leftover in ("_C.leftover.so", "_build_info.json", "_build_info.py"):
        (directory / "tree" / "asgl_cuda" / leftover).touch()
    command = (sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", directory)
    run(*command, cwd=directory / "tree", ASGL_CUDA_BUILD="none")
    (found,) = directory.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with this wheel and, from elsewhere, torch and the packages that tests need."""
    python = environment_in(tmp_path_factory.mktemp("environment"))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    see_packages_of_this(python)
    return python


def environment_in(directory: Path) -> Path:
    """The Python of a new environment."""
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=ROOT)
    return directory / "bin" / "python"


def see_packages_of_this(python: Path) -> None:
    """Exposes the packages of the tests' environment, except installations from a checkout."""
    (site_packages,) = python.parents[1].glob("lib/python*/site-packages")
    (site_packages / "torch_from_elsewhere.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")


def test_content(wheel):
    assert wheel.name == f"asgl_cuda-{asgl_cuda.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"asgl_cuda/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".md"}
    assert {"asgl_cuda/backends/cupy.py", *sources} <= names
    assert not [name for name in names if name.endswith((".so", ".md")) or "_build_info" in name]


def test_info(python, tmp_path):
    out = run(python, "-m", "asgl_cuda", "info", cwd=tmp_path)
    lines = [line.split() for line in out.splitlines()]
    assert ["reference", "works"] in lines
    assert ["cpu", "works"] not in lines
    assert f"headers {python.parents[1]}" in out
    assert "cpu        the compiled extension is missing: it was not built with this installation, in " in out


# Stubs for the kernels, which take a minute to compile.
STUB = """
#include <Python.h>
namespace {
PyObject* cpu_threads(PyObject*, PyObject*) { return PyLong_FromLong(1); }
PyObject* cpu_instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString("a stub"); }
PyMethodDef methods[] = {{"cpu_threads", cpu_threads, METH_NOARGS, nullptr},
                         {"cpu_instruction_set", cpu_instruction_set, METH_NOARGS, nullptr}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
}
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""


def stub_sources(csrc: Path) -> None:
    for path in csrc.rglob("*.cpp"):
        path.write_text(STUB if path.name == "bindings.cpp" else "")


def test_readme_says_how(tmp_path):
    """The commands in a copy of the checkout, except for torch and the comparison, which a stub does not pass."""
    ignored = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info", "_C.*", "_build_info.*")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    stub_sources(tmp_path / "checkout" / "csrc")
    python = environment_in(tmp_path / "environment")
    see_packages_of_this(python)
    pip = python.with_name("pip")
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {python} "$@"\n')
    pip.chmod(0o755)
    *_, install, info = README.split("## Install\n")[1].split("```sh\n")[1].split("```")[0].splitlines()
    # Leave other installations untouched.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_IGNORE_INSTALLED": "1"}
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    for command in (install, info):
        out = run("sh", "-c", command, cwd=tmp_path / "checkout", PATH=path, ASGL_CUDA_BUILD="cpu", **offline)
    assert ["cpu", "works"] in [line.split() for line in out.splitlines()]
    version = f"{asgl_cuda.__version__}+{build_notes.local_version(torch.__version__, None)}"
    assert list(python.parents[1].rglob(f"asgl_cuda-{version}.dist-info")), "the version names the torch that it fits"


@pytest.mark.slow
def test_reference(python, tmp_path):
    tests = tmp_path / "tests"
    for name in (*TESTS_NEED, *SUITE):
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, tests / name)
    for folder in ("tools", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = (python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore:asgl_cuda", "tests")
    out = run(*command, cwd=tmp_path, ASGL_TEST_BACKENDS="reference")
    passed = int(out.split(" passed")[0].split()[-1])
    assert passed > 100
