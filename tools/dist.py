"""Builds the source archive and both wheels into dist/ and checks each in a fresh environment: `python -m tools.dist`.

- asgl_cuda-*.tar.gz: all tracked files except NOT_SHIPPED.
- asgl_cuda-*-none-any.whl: pure Python, for every supported Python and torch.
- asgl_cuda-*-linux_*.whl: compiled, for this Python and torch's minor version, which its own version names.
  ASGL_CUDA_BUILD=cuda requires CUDA kernels, which are else compiled where torch and a toolkit allow.

The wheels are built from the archive, not the checkout. Each artefact is installed in a fresh environment by the
README's commands, and compared with the reference by `python -m asgl_cuda check`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks import ROOT

DIST = ROOT / "dist"
NOT_SHIPPED = (".ci/", ".github/", ".gitignore", ".clang-format")
BUILD_TOOLS = ("setuptools>=77", "ninja")
NOTHING_COMPILED = "only the reference works here"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Runs a command and returns its output. If it fails, raises SystemExit with the output."""
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if result.returncode != 0:
        raise SystemExit(f"{result.stdout}\n{' '.join(map(str, command))}: status {result.returncode}")
    return result.stdout


def build_archive() -> Path:
    """Builds the source archive, and checks that it has every tracked file except NOT_SHIPPED."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        shipped = {name.partition("/")[2] for name in opened.getnames()}
    tracked = run("git", "ls-files").splitlines()
    lacking = [name for name in tracked if name not in shipped and not name.startswith(NOT_SHIPPED)]
    if lacking:
        raise SystemExit(f"{archive.name} lacks {', '.join(lacking)}: MANIFEST.in says what is in it")
    return archive


def build_wheel(archive: Path, pattern: str, **environment: str) -> Path:
    """Builds a wheel from the archive; `pattern` is the pattern of its name."""
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", DIST)
    run(*command, archive, **environment)
    (wheel,) = DIST.glob(pattern)
    return wheel


def check(artefact: Path, torch: str) -> None:
    """Installs the artefact in a fresh environment, and compares it with the reference."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "venv", folder / "environment")
        python = folder / "environment" / "bin" / "python"
        # The environment's bin has ninja.
        environment = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
        install = (python, "-m", "pip", "-q", "--disable-pip-version-check", "install")
        run(*install, torch, *BUILD_TOOLS, cwd=folder)
        run(*install, "--no-build-isolation", artefact, cwd=folder, **environment)
        command = (python, "-m", "asgl_cuda")
        found = run(*command, "check", cwd=folder, **environment)
        if (NOTHING_COMPILED in found) != artefact.name.endswith("-none-any.whl"):
            raise SystemExit(f"{artefact.name}: {found}")
        print(f"{artefact.name}: {found.splitlines()[-1]}, after {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    """Builds and checks the archive and both wheels."""
    import torch

    shutil.rmtree(DIST, ignore_errors=True)
    archive = build_archive()
    pure = build_wheel(archive, "*-none-any.whl", ASGL_CUDA_BUILD="none")
    compiled = build_wheel(archive, "*-linux_*.whl")
    for artefact in (archive, pure, compiled):
        print(f"{artefact.relative_to(ROOT)}: {artefact.stat().st_size / 2**20:.1f} MB", flush=True)
    for artefact in (archive, pure, compiled):
        check(artefact, f"torch=={torch.__version__.partition('+')[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
