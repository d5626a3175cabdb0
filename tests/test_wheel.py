"""The pure-Python wheel, ASGL_CUDA_BUILD=none: built, installed where there is nothing but torch, and used there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# What tests the reference and the errors; the rest needs a fused backend or a checkout.
SUITE = ("test_arguments.py", "test_neuron.py", "test_philox.py", "test_properties.py", "test_torch_features.py")
TESTS_NEED = ("conftest.py", "comparison.py", "emulated.py")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, and that sees no checkout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    result = subprocess.run(
        words, cwd=cwd, env={**inherited, **environment}, text=True, timeout=300, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """From a copy of the tree, with all that earlier builds have left in it."""
    directory = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, directory / "tree", ignore=ignored)
    (directory / "tree" / "asgl_cuda" / "_C.leftover.so").touch()
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    command = (sys.executable, "-m", "pip", "wheel", *options, "-w", directory, directory / "tree")
    run(*command, cwd=directory, ASGL_CUDA_BUILD="none")
    (found,) = directory.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Of an environment with this wheel and, from elsewhere, torch and what tests need."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=environment)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # Its packages, but nothing that was installed there from a checkout.
    (site_packages / "torch_from_elsewhere.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def test_content(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"asgl_cuda/jit.py", "asgl_cuda/csrc/batch_norm_kernels.cuh", "asgl_cuda/csrc/philox.h"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.py", ".cpp", ".cu"))]


def test_info(python, tmp_path):
    out = run(python, "-m", "asgl_cuda", "info", cwd=tmp_path)
    lines = [line.split() for line in out.splitlines()]
    assert ["reference", "works"] in lines
    assert ["cpu", "works"] not in lines
    assert f"headers {python.parents[1]}" in out
    assert "cpu        the compiled extension is missing: it was not built with this installation" in out


def test_reference(python, tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in (*TESTS_NEED, *SUITE):
        shutil.copy(ROOT / "tests" / name, tests)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = (python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore:asgl_cuda", "tests")
    out = run(*command, cwd=tmp_path, ASGL_TEST_BACKENDS="reference")
    passed = int(out.split(" passed")[0].split()[-1])
    assert passed > 100
