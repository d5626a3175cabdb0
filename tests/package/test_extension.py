"""The choice of the compiled extension that is loaded, and the message where there is none."""

import sys
from pathlib import Path

import pytest
import torch

from asgl_cuda import backends, extension

HERE, OTHER = torch.__version__, "1.2.3"


@pytest.fixture
def places(monkeypatch, tmp_path) -> tuple[Path, Path]:
    """The places of the installed extension and of the user's, without either; a loaded one is its folder's name."""
    package = tmp_path / "checkout" / "asgl_cuda"
    for file in ("csrc/ops.cpp", "compilation.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("of this version")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "PACKAGE", package)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not Path(entry, "asgl_cuda").exists()])
    monkeypatch.setattr(extension, "_import", lambda path: path.parent)
    return package, extension.build_directory(package / "csrc")


def note(folder: Path, torch_version: str, cuda: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.py").write_text(f"TORCH_VERSION, CUDA, REASON = {(torch_version, cuda, 'a reason')!r}\n")
    return folder


@pytest.mark.parametrize(
    ("installed", "users", "loaded"),
    [
        ((HERE,), None, 0),
        (None, (HERE,), 1),
        ((OTHER,), (HERE,), 1),
        ((HERE,), (HERE,), 1),  # asked for although the other was there
        ((HERE,), (HERE, "CUDA 13.0"), 1),
        ((HERE, "CUDA 13.0"), (HERE,), 0),
    ],
)
def test_which_is_loaded(places, installed, users, loaded):
    for place, noted in zip(places, (installed, users), strict=True):
        if noted is not None:
            note(place, *noted)
    module, info, problem = extension.load()
    assert module == places[loaded]
    assert info.cuda == ((installed, users)[loaded] + (None,))[1]
    assert problem is None


def test_changed_sources_are_another_extension(places):
    package, users = places
    note(users, HERE)
    assert extension.load()[0] == users
    for file in ("csrc/ops.cpp", "compilation.py"):
        (package / file).write_text("of another version")
        extension.digest_of_sources.cache_clear()
        assert extension.load()[0] is None
        (package / file).write_text("of this version")


@pytest.mark.usefixtures("places")
def test_nothing_is_read_where_the_user_has_compiled_nothing(monkeypatch):
    monkeypatch.setattr(extension, "digest_of_sources", None)
    assert extension.load()[0] is None


def test_cache_that_can_not_be_read(places, monkeypatch):
    def refuse(_):
        raise PermissionError

    note(places[0], HERE)
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert extension.load()[0] == places[0]


def fail(path):
    raise ImportError(f"{path.name} has an undefined symbol")


@pytest.mark.parametrize(
    ("installed", "load", "why"),
    [
        (None, None, "it was not built with this installation"),
        (OTHER, None, f"it was built for torch 1.2.3, and this is torch {HERE}"),
        (HERE, fail, "it does not load: _C"),
    ],
)
def test_problem(places, monkeypatch, installed, load, why):
    if installed is not None:
        note(places[0], installed)
    if load is not None:
        monkeypatch.setattr(extension, "_import", load)
    module, info, problem = extension.load()
    assert (module, info) == (None, None)
    assert problem.startswith(f"the compiled extension is missing: {why}")
    assert problem.endswith(". To build it: python -m asgl_cuda build")


@pytest.mark.parametrize(("built_for", "names_it"), [(HERE, True), (OTHER, False)])
def test_folder_that_hides_an_installation(places, monkeypatch, tmp_path, built_for, names_it):
    installation = note(tmp_path / "site-packages" / "asgl_cuda", built_for)
    monkeypatch.setattr(sys, "path", [str(places[0].parent), *sys.path, str(installation.parent)])
    problem = extension.load()[2]
    expected = (
        f"the compiled extension is missing in {places[0]}, which hides the installation in {installation}, which has "
        "it: start Python in another folder, or build it here, too: python -m asgl_cuda build"
    )
    assert (problem == expected) == names_it
    assert problem.endswith("python -m asgl_cuda build")


@pytest.mark.parametrize(
    ("cuda", "problem"),
    [
        (None, f"torch {HERE} is a build without CUDA. With one for CUDA: python -m asgl_cuda build"),
        (
            "13.0",
            "the extension was built without CUDA: there is no toolkit. To build it anew: python -m asgl_cuda build",
        ),
    ],
)
def test_extension_without_cuda(monkeypatch, cuda, problem):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(extension, "build_info", extension.BuildInfo(HERE, None, "there is no toolkit"))
    assert backends.BACKENDS["cuda"].problem() == problem
