"""Seeds the mistakes of table.py, one at a time, and runs their tests: `python -m tools.mutants.check [names]`."""

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


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The text of the file with the mistake."""
    text = (root / "asgl_cuda" / mutant.file).read_text()
    if (times := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file} has changed: it has {times} times {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def run_tests(directory: Path, file: str, words: str) -> int:
    """The status of pytest in a fork of this process: 0 where tests pass, 1 where one fails, or a negative signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.chdir(directory)
        sys.path[:] = [str(directory), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
            del sys.modules[name]
        with open(directory / "output", "w") as output:  # noqa: PTH123
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        selected = ["-k", words] if words else []
        os._exit(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", f"tests/{file}", *selected]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def copied(directory: Path) -> Path:
    """A copy of the repository, without what is built or downloaded."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "docs", "*.egg-info")
    copy = shutil.copytree(ROOT, directory / "repository", ignore=ignored)
    # By content, since files change within a second.
    compileall.compile_dir(copy / "asgl_cuda", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return copy


def fails_without(directory: Path, mutants: Iterable[Mutant]) -> dict[str, int]:
    """Status of pytest by test file, where tests of the mutants fail without any."""
    words: dict[str, list[str]] = {}
    for mutant in mutants:
        file, _, expression = mutant.tests.partition(" ")
        words.setdefault(file, []).append(expression)
    found = {
        file: run_tests(directory, file, "" if "" in all_words else " or ".join(f"({each})" for each in all_words))
        for file, all_words in words.items()
    }
    return {file: status for file, status in found.items() if status != 0}


def check(directory: Path, mutant: Mutant) -> str:
    """`found`, `SURVIVED`, or why the tests say nothing."""
    try:
        text = mutated(mutant)
    except ValueError as error:
        return f"NOT APPLIED: {error}"
    file = directory / "asgl_cuda" / mutant.file
    before = file.read_text()
    file.write_text(text)
    try:
        path, _, words = mutant.tests.partition(" ")
        status = run_tests(directory, path, words)
    finally:
        file.write_text(before)
    if status == 0:
        return "SURVIVED"
    said = "" if status == 1 else f"NOT RUN: pytest's status {status}" if status > 0 else f"found: signal {-status}"
    return said or "found"


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
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = copied(Path(temporary))
        for file, status in fails_without(directory, chosen.values()).items():
            bad += 1
            print(f"tests/{file} fails without a mutant: pytest's status {status}")
            print((directory / "output").read_text())
        for name, mutant in chosen.items():
            said = check(directory, mutant)
            bad += not said.startswith("found")
            print(f"{said}: {name}", flush=True)
            if arguments.show:
                print((directory / "output").read_text())
    print(f"{len(chosen)} mutants, {bad} not found")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
