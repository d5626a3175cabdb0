"""Which extension is loaded, and the message where there is none."""

import json
import os
from pathlib import Path

import pytest
import torch

import asgl_cuda
from asgl_cuda import backends, extension
from asgl_cuda.extension import build_notes

HERE, OTHER = torch.__version__, "1.2.3"


@pytest.fixture
def package(monkeypatch, tmp_path) -> Path:
    """The folder of an installation with its sources and without an extension; loading returns the path."""
    package = tmp_path / "site-packages" / "asgl_cuda"
    for file in ("csrc/ops/bindings.cpp", "extension/compilation.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("of this version")
    monkeypatch.setattr(extension, "PACKAGE", package)
    monkeypatch.setattr(extension, "_import", lambda path: path)
    build_notes.digest_of_sources.cache_clear()
    yield package
    build_notes.digest_of_sources.cache_clear()


def note(package: Path, torch_version: str = HERE) -> None:
    (package / build_notes.EXTENSION).write_bytes(b"an extension")
    sources = build_notes.digest_of_build(package / "csrc", package)
    build_notes.write(package, torch_version, None, "a reason", sources)


def test_one_that_fits_is_loaded(package):
    note(package)
    module, info, problem = extension.load()
    assert module == package / build_notes.EXTENSION
    assert info[:3] == (HERE, None, "a reason")
    assert problem is None
    major, minor, *_ = HERE.split(".")
    note(package, f"{major}.{minor}.99+cu130")
    assert extension.load()[0] is not None, "another patch of the same minor version"


def rewritten(**noted):
    def damage(package):
        notes = package / build_notes.NOTES
        notes.write_text(json.dumps({**json.loads(notes.read_text()), **noted}))

    return damage


def replaced(name, content=None):
    """A file with other content, or a folder in its place."""

    def damage(package):
        (package / name).unlink()
        (package / name).mkdir() if content is None else (package / name).write_bytes(content)

    return damage


def other_sources(file):
    def damage(package):
        (package / file).write_text("of another version")
        build_notes.digest_of_sources.cache_clear()

    return damage


NOTES, EXTENSION = build_notes.NOTES, build_notes.EXTENSION
DAMAGE = {
    "never built": (
        lambda package: [(package / name).unlink() for name in (NOTES, EXTENSION)],
        "it was not built with this installation",
    ),
    "another torch": (
        lambda package: note(package, OTHER),
        f"asgl_cuda {asgl_cuda.__version__}+torch1.2.cpu was built for torch 1.2.3, and this is torch {HERE}",
    ),
    "another Python": (
        lambda package: (package / EXTENSION).rename(package / "_C.another.so"),
        f"this Python loads {EXTENSION}",
    ),
    "other sources": (other_sources("csrc/ops/bindings.cpp"), "it was built from other sources than those in "),
    "other flags": (other_sources("extension/compilation.py"), "it was built from other sources than those in "),
    "not ended": (lambda package: (package / NOTES).unlink(), f"{EXTENSION} in "),
    "cut off": (lambda package: os.truncate(package / EXTENSION, 5), "it has 5 bytes, and 12 were built"),
    "changed": (replaced(EXTENSION, b"An extension"), "its checksum is another"),
    "unreadable": (replaced(EXTENSION), "Is a directory"),
    "empty notes": (replaced(NOTES, b""), "is damaged (Expecting value"),
    "program": (replaced(NOTES, b"import sys; sys.exit(3)"), "is damaged (Expecting value"),
    "deep": (replaced(NOTES, b"[" * 200_000), "recursion depth"),
    "nothing noted": (replaced(NOTES, b"{}"), "is damaged ("),
    "more noted": (rewritten(color=1), "is damaged ("),
    "checksum": (rewritten(checksum=None), "its checksum is another"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_one_that_does_not_fit_is_not_mapped(package, monkeypatch, damage, words):
    monkeypatch.setattr(extension, "_import", None)
    note(package)
    damage(package)
    module, info, problem = extension.load()
    assert (module, info) == (None, None)
    assert problem.startswith("the compiled extension is missing: ")
    assert words in problem
    assert problem.endswith(
        ". To build it: in a checkout of asgl_cuda, pip install --no-build-isolation --no-deps --force-reinstall ."
    )
    assert "\n" not in problem


def test_one_that_does_not_load(package, monkeypatch):
    def fail(path):
        raise ImportError(f"{path.name} has an undefined symbol")

    monkeypatch.setattr(extension, "_import", fail)
    note(package)
    assert extension.load()[2].startswith(f"the compiled extension is missing: {EXTENSION} has an undefined symbol. ")


def test_remedy_in_a_checkout(package):
    (package.parent / "setup.py").touch()
    assert extension.remedy() == f"pip install --no-build-isolation --no-deps -e {package.parent}"


@pytest.mark.parametrize(
    ("cuda", "problem"),
    [
        (None, f"torch {HERE} is a build without CUDA. With one for CUDA: "),
        ("13.0", "the extension was built without CUDA: there is no toolkit. To build it anew: "),
    ],
)
def test_extension_without_cuda(monkeypatch, cuda, problem):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    info = build_notes.BuildInfo(HERE, None, "there is no toolkit", "0123", 1, 1)
    monkeypatch.setattr(extension, "build_info", info)
    assert backends.BACKENDS["cuda"].problem() == problem + extension.remedy()
