"""The mistakes of tools/mutants fit the package; `python -m tools.mutants.check` runs the tests that find them."""

import shutil
import subprocess
import sys

import pytest

from tools.mutants import check
from tools.mutants.table import MUTANTS, Mutant


def test_each_mistake_can_be_seeded():
    files = {name: check.ROOT / "tests" / mutant.tests.partition(" ")[0] for name, mutant in MUTANTS.items()}
    assert not [name for name, file in files.items() if not file.is_file()]
    for mutant in MUTANTS.values():
        path, text = check.mutated(mutant, check.ROOT)
        assert text != path.read_text()


def test_a_seeded_mistake_is_found():
    """Tests run the copy that has the mistake, not this package."""
    command = [sys.executable, "-m", "tools.mutants.check", "noise: rng_state and generator"]
    run = subprocess.run(command, cwd=check.ROOT, capture_output=True, text=True)
    assert "noise: rng_state and generator: found by tests/calls/test_arguments.py::" in run.stdout, run.stderr
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "SURVIVED"),
        (1, "found by tests/neurons/test_views.py::test_view"),
        (5, "NOT RUN: pytest's status 5"),
        (-11, "found by signal 11, tests/neurons/test_views.py"),
    ],
)
def test_outcomes(monkeypatch, tmp_path, status, said):
    (tmp_path / "asgl_cuda").mkdir()
    file = tmp_path / "asgl_cuda" / "layout.py"
    shutil.copy(check.ROOT / "asgl_cuda" / "layout.py", file)
    before = file.read_text()

    def run_tests(*arguments):
        assert arguments == (tmp_path, "-x", "tests/neurons/test_views.py", "-k", "copy or view")
        assert file.read_text() == before.replace("CHECKPOINT_STEPS = 16", "CHECKPOINT_STEPS = 8")
        if status == 1:
            (tmp_path / "notes").write_text("\ttests/neurons/test_views.py::test_view\n")
        return status

    monkeypatch.setattr(check, "run_tests", run_tests)
    mutant = Mutant("CHECKPOINT_STEPS = 16", "CHECKPOINT_STEPS = 8", "neurons/test_views.py copy or view")
    assert check.check(tmp_path, mutant) == said
    assert file.read_text() == before
    said = check.check(tmp_path, mutant._replace(old="return"))
    assert said.startswith("NOT APPLIED: the text to change must be in asgl_cuda once, and is asgl_cuda/layout.py ")
    assert check.check(tmp_path, mutant._replace(old="of nowhere")).endswith("is nowhere: 'of nowhere'")
