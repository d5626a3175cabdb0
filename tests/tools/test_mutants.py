"""Mistakes seeded in kernels and launchers: recorded calls find every one of them."""

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools.emulation import sanitize
from tools.mutants.kernels import (
    BEYOND_AN_ARRAY,
    CPU_MUTANTS,
    MUTANTS,
    NO_BARRIER,
    NO_BARRIER_IN_A_SUM,
    NO_BARRIER_OF_CHANNELS,
    Mutant,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiler")]

# Execution orders of a block's threads. A missing barrier need not show in every order.
ORDERS = ("middle", "ascending", "descending", "1", "2")
# Errors of the emulation, which is stricter than a GPU, by mutants of the family "neuron".
REFUSED = {
    "a barrier for some threads alone": "has reached __syncthreads",
    "lanes that have left exchange noise": "which has exited",
    "wrong element of later steps": "a vector load that needs",
    "wrong element of dx": "a vector store that needs",
}


def seed(csrc: Path, mutants: Iterable[Mutant]) -> None:
    """Adds all mutants to the sources; the variable `mutant` selects one by number, from 1."""
    declaration = csrc / "math" / "host_device.h"
    text = declaration.read_text()
    declaration.write_text(text.replace("namespace asgl {", "namespace asgl {\ninline int mutant = 0;", 1))
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


def seeded_program(directory: Path, kernels: sanitize.Kernels, mutants: Iterable[Mutant], *flags: str) -> Path:
    if kernels is sanitize.CUDA:
        csrc = shutil.copytree(sanitize.CSRC, directory / "csrc")
    else:
        csrc = sanitize.few_instantiations(directory)
    seed(csrc, mutants)
    sanitize.build(kernels, directory / "replay", ["-DASGL_TEST_MUTANTS", *flags], csrc)
    return directory / "replay"


def first_failure(program: Path, number: int, calls: Path, orders: Iterable[str]) -> str:
    """What differs in the first order with any: a result, a plan, an error of the emulation, or a crash."""
    for order in orders:
        result = sanitize.run(program, calls, ASGL_MUTANT=str(number), ASGL_EMULATION_ORDER=order)
        if result.returncode != 0:
            return result.stdout or f"status {result.returncode}: {result.stderr}"
    return ""


@pytest.mark.parametrize("kernels", [sanitize.CUDA, sanitize.CPU], ids=lambda kernels: kernels.name)
def test_recorded_calls_find_every_mutant(kernels, tmp_path, record_property):
    families = MUTANTS if kernels is sanitize.CUDA else CPU_MUTANTS
    named = {(family, name): mutant for family, mutants in families.items() for name, mutant in mutants.items()}
    program = seeded_program(tmp_path, kernels, named.values(), "-O1")
    calls = {path.stem: path for path in sanitize.calls_for(kernels)}
    orders = ORDERS if kernels is sanitize.CUDA else ORDERS[:1]

    def found(numbered: tuple[int, tuple[str, str]]) -> str:
        number, (family, _) = numbered
        return first_failure(program, number, calls[family], orders)

    unchanged = [(0, (family, "")) for family in families]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert not any(pool.map(found, unchanged))
        differences = dict(zip(named, pool.map(found, enumerate(named, 1)), strict=True))
    for (family, name), difference in differences.items():
        record_property(f"{kernels.name}, {family}: {name}", difference.partition("\n")[0])
    assert not [name for name, difference in differences.items() if not difference]
    for name, words in REFUSED.items() if kernels is sanitize.CUDA else ():
        assert words in differences["neuron", name], name


# Mistakes that need change no result, with the reports of each: races, and accesses beyond an array.
RACES = {
    "neuron": {"no barrier between sums of threads": NO_BARRIER},
    "adaptive": {"no barrier within a sum": NO_BARRIER_IN_A_SUM},
    "normalisation": {"no barrier between ways": NO_BARRIER_OF_CHANNELS},
}
SANITIZED = {
    "race": (sanitize.CUDA, sanitize.THREAD, ["small"], "data race", RACES),
    **{
        kernels.name: (kernels, sanitize.ADDRESS, [], "heap-buffer-overflow", BEYOND_AN_ARRAY[kernels.name])
        for kernels in (sanitize.CUDA, sanitize.CPU)
    },
}


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizer_finds_mutants(name, tmp_path, record_property):
    kernels, flags, size, report, families = SANITIZED[name]
    named = {(family, name): mutant for family, mutants in families.items() for name, mutant in mutants.items()}
    program = seeded_program(tmp_path, kernels, named.values(), "-O1", "-g1", *flags)
    calls = {path.stem: path for path in sanitize.calls_for(kernels)}
    for number, (family, mistake) in enumerate(named, 1):
        result = sanitize.run(
            program, *size, calls[family], ASGL_MUTANT=str(number), **sanitize.environment_of(kernels)
        )
        assert result.returncode != 0, mistake
        assert report in result.stderr, f"{mistake} {result.stdout} {result.stderr}"
        record_property(f"sanitized {kernels.name}, {family}: {mistake}", report)
