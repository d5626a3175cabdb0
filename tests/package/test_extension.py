"""The choice of the compiled extension that is loaded, and the message where there is none."""

import json
import os
import pwd
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import asgl_cuda.__main__
from asgl_cuda import backends, extension
from asgl_cuda.extension import build_notes

HERE, OTHER = torch.__version__, "1.2.3"


@pytest.fixture
def places(monkeypatch, tmp_path) -> tuple[Path, Path]:
    """Folders of the installed and the user's extension, both missing; loading returns the folder."""
    package = tmp_path / "checkout" / "asgl_cuda"
    for file in ("csrc/ops/bindings.cpp", "extension/compilation.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("of this version")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "PACKAGE", package)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not Path(entry, "asgl_cuda").exists()])
    monkeypatch.setattr(extension, "_import", lambda path: path.parent)
    build_notes.digest_of_sources.cache_clear()
    return package, extension.build_directory(package / "csrc")


def note(folder: Path, torch_version: str, cuda: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / build_notes.EXTENSION).write_bytes(b"an extension")
    sources = build_notes.digest_of_build(extension.source_directory(), extension.PACKAGE)
    build_notes.write(folder, torch_version, cuda, "a reason", sources)
    return folder


@pytest.mark.parametrize(
    ("installed", "users", "loaded"),
    [
        ((HERE,), None, 0),
        (None, (HERE,), 1),
        ((OTHER,), (HERE,), 1),
        ((HERE,), (HERE,), 1),  # the user's build, although the installed one fits
        ((HERE,), (HERE, "CUDA 13.0"), 1),
        ((HERE, "CUDA 13.0"), (HERE,), 0),
    ],
)
def test_which_is_loaded(places, installed, users, loaded):
    for place, noted in zip(places, (installed, users), strict=True):
        if noted is not None:
            note(place, *noted)
    module, info, problem, damage = extension.load()
    assert module == places[loaded]
    assert not damage
    assert info.cuda == ((installed, users)[loaded] + (None,))[1]
    assert problem is None


def test_extension_of_other_sources_is_not_loaded(places):
    """Torch aborts where the extension's operators differ from ops.py."""
    package, users = places
    for folder in (users, package):
        note(folder, HERE)
        assert extension.load()[0] == folder
        for file in ("csrc/ops/bindings.cpp", "extension/compilation.py"):
            (package / file).write_text("of another version")
            build_notes.digest_of_sources.cache_clear()
            module, _, problem, _ = extension.load()
            assert module is None
            if folder == package and file.startswith("csrc"):
                words = f"is missing: it was built from other sources than those in {package}/csrc. To build it: "
                assert words in problem
            (package / file).write_text("of this version")
            build_notes.digest_of_sources.cache_clear()
        shutil.rmtree(users, ignore_errors=True)


@pytest.mark.usefixtures("places")
def test_nothing_is_read_where_the_user_has_compiled_nothing(monkeypatch):
    monkeypatch.setattr(build_notes, "digest_of_sources", None)
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
    module, info, problem, _ = extension.load()
    assert (module, info) == (None, None)
    assert problem.startswith(f"the compiled extension is missing: {why}")
    assert problem.endswith(". To build it: python -m asgl_cuda build")


def rewritten(**noted):
    def damage(folder):
        notes = folder / build_notes.NOTES
        notes.write_text(json.dumps({**json.loads(notes.read_text()), **noted}))

    return damage


def directory_at(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def notes_are(content):
    return lambda folder: (folder / build_notes.NOTES).write_bytes(content)


FIELDS = "it must have torch_version, cuda, reason"
DAMAGE = {
    "cut off": (lambda folder: os.truncate(folder / build_notes.EXTENSION, 5), "it has 5 bytes, and 12 were built"),
    "changed": (
        lambda folder: (folder / build_notes.EXTENSION).write_bytes(b"An extension"),
        "its checksum is another",
    ),
    "unreadable": (directory_at(build_notes.EXTENSION), "can't be read: Is a directory"),
    "unreadable notes": (directory_at(build_notes.NOTES), "can't be read: Is a directory"),
    "empty notes": (notes_are(b""), "Expecting value"),
    "notes cut off": (notes_are(b'{"torch_ver'), "Unterminated string"),
    "program": (notes_are(b"import sys; sys.exit(3)"), "Expecting value"),
    "bytes": (notes_are(b"\xff\xfe"), "can't decode"),
    "deep": (notes_are(b"[" * 200_000), "recursion depth"),
    "no object": (notes_are(b"[1]"), FIELDS),
    "nothing noted": (notes_are(b"{}"), FIELDS),
    "more noted": (rewritten(color=1), FIELDS),
    "version": (rewritten(torch_version=2.13), "torch_version is a float"),
    "cuda": (rewritten(cuda=False), "cuda is a bool"),
    "size": (rewritten(size="12"), "size is a str"),
    "checksum": (rewritten(checksum=None), "checksum is a NoneType"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage(places, monkeypatch, damage, words):
    package, _ = places
    monkeypatch.setattr(extension, "_import", None)
    damage(note(package, HERE))
    module, info, problem, found = extension.load()
    assert (module, info) == (None, None)
    assert problem.startswith(f"the compiled extension can not be loaded: {package}/")
    assert words in problem
    assert problem.endswith(". To build it: python -m asgl_cuda build")
    assert "\n" not in problem
    assert found.keys() == {package}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / build_notes.EXTENSION).unlink(), "is gone, and _build_info.json is there"),
        (lambda folder: (folder / build_notes.NOTES).unlink(), "has no _build_info.json beside it: its build was not "),
        (rewritten(file="_C.another.so"), f"it is _C.another.so, and this Python loads {build_notes.EXTENSION}"),
    ],
)
def test_missing_files(places, monkeypatch, damage, words):
    monkeypatch.setattr(extension, "_import", None)
    damage(note(places[0], HERE))
    problem = extension.load()[2]
    assert problem.startswith("the compiled extension is missing: ")
    assert words in problem


def test_damaged_one_is_passed_over_and_named(places, monkeypatch, capsys):
    """The user's extension, built for CUDA, is passed over; the installed one is loaded."""
    package, users = places
    note(package, HERE)
    os.truncate(note(users, HERE, "CUDA 13.0") / build_notes.EXTENSION, 5)
    module, info, problem, damage = extension.load()
    assert (module, info.cuda, problem) == (package, None, None)
    monkeypatch.setattr(extension, "damage", damage)
    monkeypatch.setattr(extension, "module", asgl_cuda.extension.module or pytest.skip("no extension"))
    assert asgl_cuda.__main__.info() == 0
    line = f"passed over: {users / build_notes.EXTENSION} is damaged: it has 5 bytes, and 12 were built. To mend it: "
    assert f"{line}python -m asgl_cuda build\n" in capsys.readouterr().out


def test_notes_come_last_and_replace_those_of_earlier_versions(tmp_path, monkeypatch):
    (tmp_path / "_build_info.py").touch()
    (tmp_path / build_notes.EXTENSION).write_bytes(b"first")
    build_notes.write(tmp_path, HERE, None, "a reason", "0123")
    assert {path.name for path in tmp_path.iterdir()} == {build_notes.EXTENSION, "_build_info.json"}
    first = build_notes.read(tmp_path)
    assert first == (HERE, None, "a reason", "0123", build_notes.EXTENSION, 5, zlib.crc32(b"first"))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        build_notes.write(tmp_path, HERE, "CUDA", "a reason", "0123")
    assert build_notes.read(tmp_path) == first


@pytest.mark.skipif(extension.module is None, reason="no extension")
@pytest.mark.parametrize("size", [100, 4096, 1_000_000])
def test_process_that_imports_a_truncated_extension_goes_on(tmp_path, size):
    package = tmp_path / "asgl_cuda"
    shutil.copytree(extension.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "_C.*", "_build_info.*"))
    shutil.copytree(extension.source_directory(), tmp_path / "csrc")
    built = Path(extension.module.__file__)
    for file in (built, built.parent / build_notes.NOTES):
        shutil.copy(file, package)
    (package / "_build_info.py").write_text("import sys\nsys.exit(3)")  # left by an earlier version
    os.truncate(package / built.name, size)
    result = subprocess.run(
        [sys.executable, "-m", "asgl_cuda", "info"], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{package / built.name} is damaged: it has {size} bytes, and " in result.stdout


def test_cache_is_where_the_specification_has_it(monkeypatch, tmp_path):
    """Relative paths in XDG_CACHE_HOME and HOME are ignored."""

    def place():
        return extension.cache_directory().parents[1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "cache", "./cache", "~/.cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert place() == tmp_path / "home/.cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    known = pwd.getpwuid(os.getuid()).pw_dir
    for ignored in ("", "home", None):
        monkeypatch.delenv("HOME") if ignored is None else monkeypatch.setenv("HOME", ignored)
        assert place() == Path(known, ".cache")


def test_without_a_home_the_installed_one_is_loaded(places, monkeypatch):
    def unknown(_):
        raise KeyError

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    note(places[0], HERE)
    assert extension.load()[0] == places[0]


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
        (None, f"torch {HERE} is a build without CUDA. With one for CUDA: "),
        ("13.0", "the extension was built without CUDA: there is no toolkit. To build it anew: "),
    ],
)
def test_extension_without_cuda(monkeypatch, cuda, problem):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    info = build_notes.BuildInfo(HERE, None, "there is no toolkit", "0123", build_notes.EXTENSION, 1, 1)
    monkeypatch.setattr(extension, "build_info", info)
    assert backends.BACKENDS["cuda"].problem() == f"{problem}python -m asgl_cuda build"
