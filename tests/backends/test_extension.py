"""Which extension is loaded, and the message where there is none."""

import json
import os
from pathlib import Path

import pytest
import torch

import asgl_cuda
import asgl_cuda.__main__ as command
from asgl_cuda import backends
from asgl_cuda.backends import extension
from asgl_cuda.backends.extension import build_notes

HERE, OTHER = torch.__version__, "1.2.3"


@pytest.fixture
def package(monkeypatch, tmp_path) -> Path:
    """The folder of an installation with its sources and without an extension; loading returns the path."""
    package = tmp_path / "site-packages" / "asgl_cuda"
    for file in ("csrc/ops/bindings.cpp", "backends/extension/compilation.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("of this version")
    monkeypatch.setattr(extension, "PACKAGE", package)
    monkeypatch.setattr(extension, "_import_file", lambda path: path)
    build_notes.digest_of_sources.cache_clear()
    yield package
    build_notes.digest_of_sources.cache_clear()


def note(package: Path, torch_version: str = HERE) -> None:
    (package / build_notes.EXTENSION).write_bytes(b"an extension")
    sources = build_notes.digest_of_build(package / "csrc", package / "backends")
    build_notes.write_notes(package, torch_version, None, "a reason", sources)


def test_one_that_fits_is_loaded(package):
    note(package)
    module, info, problem = extension.load_extension()
    assert module == package / build_notes.EXTENSION
    assert info[:3] == (HERE, None, "a reason")
    assert problem is None
    major, minor, *_ = HERE.split(".")
    note(package, f"{major}.{minor}.99+cu130")
    assert extension.load_extension()[0] is not None, "another patch of the same minor version"


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
    "other flags": (
        other_sources("backends/extension/compilation.py"),
        "it was built from other sources than those in ",
    ),
    "not ended": (lambda package: (package / NOTES).unlink(), f"{EXTENSION} in "),
    "cut off": (lambda package: os.truncate(package / EXTENSION, 5), "it has 5 bytes instead of 12"),
    "changed": (replaced(EXTENSION, b"An extension"), "its checksum is not the one"),
    "unreadable": (replaced(EXTENSION), "Is a directory"),
    "empty notes": (replaced(NOTES, b""), "is damaged (Expecting value"),
    "program": (replaced(NOTES, b"import sys; sys.exit(3)"), "is damaged (Expecting value"),
    "deep": (replaced(NOTES, b"[" * 200_000), "recursion depth"),
    "nothing noted": (replaced(NOTES, b"{}"), "is damaged ("),
    "more noted": (rewritten(color=1), "is damaged ("),
    "checksum": (rewritten(checksum=None), "its checksum is not the one"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_one_that_does_not_fit_is_not_mapped(package, monkeypatch, damage, words):
    monkeypatch.setattr(extension, "_import_file", None)
    note(package)
    damage(package)
    module, info, problem = extension.load_extension()
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

    monkeypatch.setattr(extension, "_import_file", fail)
    note(package)
    assert extension.load_extension()[2].startswith(
        f"the compiled extension is missing: {EXTENSION} has an undefined symbol. "
    )


def test_remedy_in_a_checkout(package):
    (package.parent / "setup.py").touch()
    assert extension.build_command() == f"pip install --no-build-isolation --no-deps -e {package.parent}"


@pytest.mark.parametrize(
    ("cuda", "problem"),
    [
        (None, f"torch {HERE} is a build without CUDA. Install one for CUDA, then run: "),
        ("13.0", "the extension was built without CUDA: there is no toolkit. To build it anew: "),
    ],
)
def test_extension_without_cuda(monkeypatch, cuda, problem):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    info = build_notes.BuildInfo(HERE, None, "there is no toolkit", "0123", 1, 1)
    monkeypatch.setattr(extension, "build_info", info)
    assert backends.BACKENDS["cuda"].problem() == problem + extension.build_command()


# ---- the GPU ----


def built_for(cuda: str | None) -> build_notes.BuildInfo:
    return build_notes.BuildInfo(HERE, cuda, "a reason", "0123", 1, 1)


@pytest.mark.parametrize(
    ("cuda", "capability", "code"),
    [
        ("CUDA 13.0, sm_75 sm_80 sm_86 sm_90 and PTX of compute_80", (8, 9), "sm_86"),
        ("CUDA 13.0, sm_75 sm_80 sm_86 sm_90 and PTX of compute_80", (8, 0), "sm_80"),
        ("CUDA 13.0, sm_75 sm_80 sm_86 sm_90 and PTX of compute_80", (12, 0), "compute_80"),
        ("CUDA 13.0, sm_75 sm_80 sm_86 sm_90 and PTX of compute_80", (7, 0), None),
        ("CUDA 13.0, sm_75 and PTX of compute_75", (7, 0), None),
        ("CUDA 13.0, sm_75 and PTX of compute_75", (8, 0), "compute_75"),
        ("CUDA 13.0, sm_86", (8, 0), None),
        ("CUDA 13.0, sm_90", (10, 0), None),
        ("CUDA 13.0, sm_100", (10, 3), "sm_100"),
        ("CUDA 13.0, sm_120", (10, 3), None),
        (None, (9, 0), None),
    ],
)
def test_code_that_a_gpu_runs(cuda, capability, code):
    """Cubins within a major version, upwards; PTX on all later GPUs."""
    assert built_for(cuda).code_for(capability) == code


@pytest.fixture
def gpus(monkeypatch):
    """A V100, which is the current device, and an L40 beside it, for an extension of sm_80."""
    capabilities = {0: (7, 0), 1: (8, 9)}
    monkeypatch.setattr(extension, "build_info", built_for("CUDA 12.4, sm_80"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("Tesla V100", "L40")[device.index])
    monkeypatch.setitem(backends.BACKENDS, "cuda", backends.BACKENDS["cuda"]._replace(problem=lambda: None))
    for each in (backends._compute_cuda_misfit.cache_clear, backends._best.clear):
        each()
    yield [torch.device("cuda", index) for index in capabilities]
    for each in (backends._compute_cuda_misfit.cache_clear, backends._best.clear):
        each()


@pytest.mark.parametrize(("cupy", "best"), [(None, "cupy"), ("not installed", "reference")])
@pytest.mark.filterwarnings("ignore:asgl_cuda. using the slow reference")
def test_a_gpu_without_code_in_the_extension(gpus, monkeypatch, capsys, cupy, best):
    """Another backend serves it, an error has the remedy, and `info` as well; the other GPU is served."""
    monkeypatch.setitem(backends.BACKENDS, "cupy", backends.BACKENDS["cupy"]._replace(problem=lambda: cupy))
    problem = (
        "the extension has no kernels for Tesla V100, of compute capability 7.0: it was built by CUDA 12.4, sm_80. "
        f"To build it with TORCH_CUDA_ARCH_LIST=7.0 in the environment: {extension.build_command()}"
    )
    for _ in range(2):  # the second is remembered
        assert [backends.choose_backend(None, each, "here") for each in gpus] == [best, "cuda"]
    assert backends.choose_backend("cuda", gpus[1], "here") == "cuda"
    with pytest.raises(RuntimeError) as raised:
        backends.choose_backend("cuda", gpus[0], "here")
    assert str(raised.value) == f"here: backend 'cuda' is not available: {problem}"
    assert backends.unavailable_backends()["cuda"] == problem
    monkeypatch.setattr("sys.argv", ["asgl_cuda", "info"])
    command.main()
    out = capsys.readouterr().out
    assert f"  cuda       {problem}\n" in out
    assert f"default on a GPU: {best}\n" in out


def test_the_gpu_is_asked_about_under_torch_compile(monkeypatch):
    """That is not traced, and does not break the graph."""

    def misfit(device):
        torch._dynamo.graph_break()
        return f"no kernels for {device}"

    monkeypatch.setattr(backends, "_compute_cuda_misfit", misfit)

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + len(backends.BACKENDS["cuda"].misfit(torch.device("cuda", 1)) or "")

    assert function(torch.zeros(())) == len("no kernels for cuda:1")
