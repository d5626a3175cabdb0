"""Mistakes seeded in kernels and launchers: the programs in tests/cuda/programs find every one of them."""

import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
from mutants import (
    ALL_LIVE,
    BEYOND_LAST_ROW,
    CPU_MUTANTS,
    DEAD_LANES,
    DEAD_LANES_OF_ADAPTIVE,
    DEAD_LANES_OF_INTEGRATORS,
    MUTANTS,
    NO_BARRIER,
    NO_BARRIER_OF_ADAPTIVE,
    NO_BARRIER_OF_CHANNELS,
    Mutant,
)

from tools.emulation import sanitize

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiler")]

# Execution orders of a block's threads. A missing barrier need not show in every order.
ORDERS = ("middle", "ascending", "descending", "1", "2")


def seed(csrc: Path, mutants: Iterable[Mutant], chosen: int = 0) -> None:
    """Adds all mutants to the sources; the variable `mutant` selects one by number, from 1."""
    declaration = csrc / "math" / "host_device.h"
    text = declaration.read_text()
    declaration.write_text(text.replace("namespace asgl {", f"namespace asgl {{\ninline int mutant = {chosen};", 1))
    for number, (file, context, old, new) in enumerate(mutants, 1):
        source = csrc / file
        text = source.read_text()
        place = context.replace("@", old)
        assert text.count(place) == 1, f"{file} has changed: it has {text.count(place)} times {place}"
        if (old + new).endswith(";"):
            either = f"if (mutant == {number}) {{ {new} }} else {{ {old} }}"
        else:
            either = f"(mutant == {number} ? ({new}) : ({old}))"
        source.write_text(text.replace(place, context.replace("@", either)))


def seeded_program(program: str, mutants: Iterable[Mutant], csrc: Path, *flags: str) -> Path:
    seed(csrc, mutants)
    path = csrc.parent / program
    sanitize.build(program, path, ["-O1", "-DASGL_TEST_MUTANTS", *flags], csrc)
    return path


def first_failure(program: Path, number: int, orders: Iterable[str] = ORDERS) -> str:
    """The failed cases of the first order with any: values that differ, or an error of the emulation.

    A crash would prove nothing.
    """
    for order in orders:
        result = sanitize.run(program, ASGL_MUTANT=str(number), ASGL_EMULATION_ORDER=order)
        assert "cases failed" in result.stdout, f"crash: {result.stdout} {result.stderr}"
        if result.returncode != 0:
            return result.stdout
    return ""


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """All mutants of a program in one build."""

    @cache
    def build(program: str) -> Path:
        csrc = shutil.copytree(sanitize.CSRC, tmp_path_factory.mktemp(program) / "csrc")
        path = seeded_program(program, MUTANTS[program].values(), csrc)
        assert not first_failure(path, 0, ["middle"]), "without any of them all is well"
        return path

    return build


@pytest.mark.parametrize(
    ("program", "name"), [pytest.param(program, name, id=name) for program in MUTANTS for name in MUTANTS[program]]
)
def test_mutant_is_found(seeded, program, name):
    assert first_failure(seeded(program), list(MUTANTS[program]).index(name) + 1)


@pytest.mark.parametrize("program", CPU_MUTANTS)
def test_mutants_on_the_cpu_are_found(program, tmp_path):
    """Each mutant changes values; without mutants every case passes."""
    mutants, csrc = CPU_MUTANTS[program], sanitize.few_instantiations(tmp_path)
    path = seeded_program(program, mutants.values(), csrc, sanitize.BASELINE, *sanitize.CPU)
    found = {name: first_failure(path, number, ["middle"]) for number, name in enumerate(["none", *mutants])}
    assert {name for name in found if not found[name]} == {"none"}, found


OUTSIDE = "outside of the arrays"
# Program, mutant, sanitizer, if any, and words of the report.
SANITIZED = {
    "race of neurons": ("kernels_test", NO_BARRIER, sanitize.THREAD, "data race"),
    "race of adaptive neurons": ("adaptive_test", NO_BARRIER_OF_ADAPTIVE, sanitize.THREAD, "data race"),
    "race of channels": ("batch_norm_test", NO_BARRIER_OF_CHANNELS, sanitize.THREAD, "data race"),
    "overflow of neurons": ("kernels_test", ALL_LIVE, sanitize.ADDRESS, "heap-buffer-overflow"),
    "overflow of channels": ("batch_norm_test", BEYOND_LAST_ROW, sanitize.ADDRESS, "heap-buffer-overflow"),
    "dead lanes of neurons": ("kernels_test", DEAD_LANES, (), OUTSIDE),
    "dead lanes of adaptive neurons": ("adaptive_test", DEAD_LANES_OF_ADAPTIVE, (), OUTSIDE),
    "dead lanes of integrators": ("integrator_test", DEAD_LANES_OF_INTEGRATORS, (), OUTSIDE),
    "dead rows of channels": ("batch_norm_test", BEYOND_LAST_ROW, (), OUTSIDE),
}


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizer_finds_mutant(name, tmp_path):
    program, mutant, flags, report = SANITIZED[name]
    csrc = shutil.copytree(sanitize.CSRC, tmp_path / "csrc")
    seed(csrc, [mutant], chosen=1)
    sanitize.build(program, tmp_path / program, ["-O0", "-g", *flags], csrc)
    result = sanitize.run(tmp_path / program, "small")
    assert result.returncode != 0
    assert report in result.stderr, result.stdout + result.stderr


@pytest.fixture(scope="module", params=["kernels_test", "adaptive_test", "integrator_test", "batch_norm_test"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / request.param
    sanitize.build(request.param, path, ["-O1"])
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_are_right(program, order):
    result = sanitize.run(program, ASGL_EMULATION_ORDER=order)
    assert result.returncode == 0, result.stdout + result.stderr
