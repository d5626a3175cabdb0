"""Dependencies run one way, in Python and in C++, and a module has one import name."""

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each may import those before it.
LAYERS = ("asgl_cuda", "benchmarks", "tools", "tests")
# Rooms of asgl_cuda, files and folders; each may import those before it.
ROOMS = (
    "_version", "layout", "torch_modes", "reference", "checks", "backends", "calls", "neurons", "spikes", "selfcheck",
    "interop", "states", "training", "__init__", "__main__",
)  # fmt: skip
# Folders of csrc, and the folders whose headers each may include; "." is csrc itself.
HEADERS = {
    "math": {"math"},
    "params": {"math", "params"},
    "cpu": {"cpu", "math", "params"},
    "cuda": {"cuda", "math", "params"},
    "ops": {"ops", "math", "params", "cpu", "cuda"},
}


def files(folder: str, pattern: str = "*.py") -> list[Path]:
    return sorted((ROOT / folder).rglob(pattern))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    """The absolute names that a module imports anywhere; `a.b` for `from a import b`."""
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer):
    """None imports a later one; tests are no package, since a second name would be a second module."""
    later = ("tests", *LAYERS[LAYERS.index(layer) + 1 :])
    assert not [f"{path}: {name}" for path in files(layer) for name in imports(path) if name.split(".")[0] in later]
    assert not files("tests", "__init__.py")


def test_rooms():
    """The package has these rooms, and each knows those before it."""
    inside = (ROOT / "asgl_cuda").iterdir()
    found = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == set(ROOMS)
    for path in files("asgl_cuda"):
        room = path.relative_to(ROOT / "asgl_cuda").parts[0].removesuffix(".py")
        known = {f"asgl_cuda.{each}" for each in ROOMS[: ROOMS.index(room) + 1]}
        names = {".".join(name.split(".")[:2]) for name in imports(path) if name.split(".")[0] == "asgl_cuda"}
        assert names <= known, path


def test_no_test_measures_time():
    """On a busy machine it would fail: tests count work, benchmarks measure time."""
    clocks = ("time", "timeit", "torch.utils.benchmark")
    assert not [path for path in files("tests") for name in imports(path) if name.startswith(clocks)]


@pytest.mark.parametrize("package", LAYERS[:-1])
def test_no_circle(package):
    modules = {name_of(path): path for path in files(package)}
    graph = {}
    for name, path in modules.items():
        found = (each if each in modules else each.rpartition(".")[0] for each in imports(path))
        graph[name] = {each for each in found if each in modules and each != name}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("folder", HEADERS)
def test_headers(folder):
    for path in files("csrc", "*.*"):
        assert path.suffix in (".h", ".cuh", ".cpp", ".cu"), "pages are in tools and docs"
        if folder == path.parent.name:
            assert set(re.findall(r'#include "(?:(\w+)/)?[\w.]+"', path.read_text())) <= HEADERS[folder], path
            if folder == "ops":  # the plan of launches, not the kernels
                assert set(re.findall(r'#include "cuda/([\w.]+)"', path.read_text())) <= {"plan.h", "start.cuh"}, path
