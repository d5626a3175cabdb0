"""Seeds the mistakes of table.py, one at a time, and runs their tests: `python -m tools.mutants.check [names]`.

Without names, the mistakes in kernels and launchers follow, which tests/tools seeds. build/mutants.md then lists the
test that found each mistake.
"""

import argparse
import compileall
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

from tools.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
# Imported once, not for each mutant: what takes seconds.
LIBRARIES = (
    "torch", "torch._dynamo", "torch._inductor.config", "torch.func", "hypothesis", "nir", "nirtorch", "norse.torch",
    "sinabs.layers", "snntorch", "spikingjelly.activation_based.layer", "spikingjelly.activation_based.neuron",
)  # fmt: skip
SECONDS = 600  # of a mutant's tests
KERNELS = "tests/tools/test_mutants.py", "tests/tools/test_ptx_mutants.py"
TABLE = ROOT / "build" / "mutants.md"


class Notes:
    """A plugin of pytest that writes down which tests fail, and the mistakes that tests report as properties."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            rows = [*report.user_properties, *([("", report.nodeid)] if report.failed else [])]
            with self.file.open("a") as file:
                file.writelines(f"{name}\t{by}\n" for name, by in rows)

    def take(self) -> list[list[str]]:
        """The rows of the runs since the last call; the first cell of a test that failed is empty."""
        rows = [line.split("\t") for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self.file.unlink(missing_ok=True)
        return rows


def mutated(mutant: Mutant, root: Path) -> tuple[Path, str]:
    """The file of asgl_cuda in `root` that contains the text, and its content with the mistake."""
    texts = {path: path.read_text() for path in sorted((root / "asgl_cuda").rglob("*.py"))}
    times = {path: text.count(mutant.old) for path, text in texts.items() if mutant.old in text}
    if sum(times.values()) != 1:
        where = ", ".join(f"{path.relative_to(root)} {count} times" for path, count in times.items()) or "nowhere"
        raise ValueError(f"the text to change must be in asgl_cuda once, and is {where}: {mutant.old!r}")
    (path,) = times
    return path, texts[path].replace(mutant.old, mutant.new)


def run_tests(directory: Path, *arguments: str, root: Path | None = None, seconds: int = SECONDS) -> int:
    """Runs pytest in a fork. Returns 0 if tests pass, 1 if one fails, or the negative number of a signal.

    The tests are those in `root`, by default in the directory, which gets the files `output` and `notes`.
    """
    root = root or directory
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        os.chdir(root)
        sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
            del sys.modules[name]
        with open(directory / "output", "w") as output:  # noqa: PTH123
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        common = ["-q", "--no-header", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*common, *arguments], plugins=[Notes(directory / "notes")]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def selected(file: str, words: str) -> list[str]:
    """The arguments that select tests of a file; pytest ends at the first failure."""
    return ["-x", f"tests/{file}", *(["-k", words] if words else [])]


def copied(directory: Path) -> Path:
    """Copies the repository, without built and downloaded files."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "docs", "*.egg-info")
    copy = shutil.copytree(ROOT, directory / "repository", ignore=ignored)
    # By content, since files change within a second.
    compileall.compile_dir(copy / "asgl_cuda", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return copy


def fails_without(directory: Path, mutants: Iterable[Mutant]) -> dict[str, int]:
    """The status of pytest for each test file of the mutants that fails without any mistake."""
    words: dict[str, list[str]] = {}
    for mutant in mutants:
        file, _, expression = mutant.tests.partition(" ")
        words.setdefault(file, []).append(expression)
    found = {
        file: run_tests(
            directory, *selected(file, "" if "" in all_words else " or ".join(f"({each})" for each in all_words))
        )
        for file, all_words in words.items()
    }
    return {file: status for file, status in found.items() if status != 0}


def check(directory: Path, mutant: Mutant) -> str:
    """Seeds a mistake. Returns the test that found it, `SURVIVED`, or why the tests say nothing."""
    try:
        file, text = mutated(mutant, directory)
    except ValueError as error:
        return f"NOT APPLIED: {error}"
    before = file.read_text()
    file.write_text(text)
    try:
        path, _, words = mutant.tests.partition(" ")
        status = run_tests(directory, *selected(path, words))
    finally:
        file.write_text(before)
    failed = [by for _, by in Notes(directory / "notes").take()]
    if status == 1:
        return f"found by {failed[0]}"
    if status < 0:
        return f"found by signal {-status}, tests/{path}"
    return "SURVIVED" if status == 0 else f"NOT RUN: pytest's status {status}"


def check_kernels(directory: Path) -> dict[str, str]:
    """The same for all mistakes in kernels and launchers. A test that fails otherwise has a row of its own."""
    os.environ.pop("ASGL_TEST_BACKENDS")
    status = run_tests(directory, *KERNELS, "-m", "slow", root=ROOT, seconds=6 * 3600)
    print((directory / "output").read_text())
    rows = Notes(directory / "notes").take()
    found = {name or by: f"found by {by}" if name and by else "SURVIVED" for name, by in rows}
    return found if status in (0, 1) else {**found, "tests/tools": f"NOT RUN: pytest's status {status}"}


def main(mutants: Mapping[str, Mutant] = MUTANTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants, or beginnings of their names; default all")
    parser.add_argument("--show", action="store_true", help="show pytest's output, too")
    arguments = parser.parse_args()
    chosen = {name: each for name, each in mutants.items() if name.startswith(tuple(arguments.names) or "")}
    if unknown := [name for name in arguments.names if not any(each.startswith(name) for each in chosen)]:
        parser.error(f"no mutant begins with {', '.join(unknown)}")
    os.environ |= {"ASGL_TEST_BACKENDS": "cpu", "OMP_NUM_THREADS": "1"}  # no thread before a fork
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    said: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = copied(Path(temporary))
        for file, status in fails_without(directory, chosen.values()).items():
            said[f"tests/{file} without a mistake"] = f"FAILS: pytest's status {status}"
            print((directory / "output").read_text())
        Notes(directory / "notes").take()
        for name, mutant in chosen.items():
            said[name] = check(directory, mutant)
            print(f"{name}: {said[name]}", flush=True)
            if arguments.show:
                print((directory / "output").read_text())
        if not arguments.names:
            said |= check_kernels(directory)
    from tools.pages import table  # imports asgl_cuda, which each fork must import from its copy

    TABLE.parent.mkdir(exist_ok=True)
    rows = ((name, each.removeprefix("found by ").replace("|", "\\|")) for name, each in said.items())
    TABLE.write_text(table(["mistake", "found by"], rows, left=2))
    bad = [name for name, each in said.items() if not each.startswith("found")]
    print("\n".join([f"{len(said)} mistakes, {len(bad)} not found; {TABLE} has what found each", *bad]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
