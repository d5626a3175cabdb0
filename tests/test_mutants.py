"""Mistakes seeded in the CUDA kernels and launchers: tests/emulation/kernels_test.cpp finds every one of them."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import emulated
import pytest
import sanitize

Outcome = CompletedProcess[str]

# The orders in which the threads of a block get to run. A missing barrier need not show in all of them.
ORDERS = ("middle", "ascending", "descending", "1", "2")


class Mutant(NamedTuple):
    """A replacement of text in a file of csrc, with which the program must fail."""

    file: str
    old: str
    new: str


def kernels(old: str, new: str) -> Mutant:
    return Mutant("lif_kernels.cuh", old, new)


def launchers(old: str, new: str) -> Mutant:
    return Mutant("lif_cuda.cuh", old, new)


BARRIER = "  __syncthreads();"
GATHER = "if (lane == 0) first_lane[thread / kWarpThreads] = sum;"
NO_BARRIER = kernels(f"{GATHER}\n{BARRIER}", GATHER)
ALL_LIVE = kernels("live(n < shape.neurons())", "live(true)")

MUTANTS = {
    "no barrier between two sums": kernels(f"{BARRIER}  // whoever reads", "  // whoever reads"),
    "no barrier within a sum": NO_BARRIER,
    "no barrier in the last sum": kernels(f"{BARRIER}\n    if (thread > 0) return;", "    if (thread > 0) return;"),
    "wrong lane in a sum": kernels("__shfl_down_sync(kWholeWarp, sum,", "__shfl_xor_sync(kWholeWarp, sum,"),
    "a sum beyond its warp": kernels("lane + distance < kWarpThreads && ", ""),
    "a sum beyond its run": kernels(" && thread + distance < run.end", ""),
    "wrong lane in the last sum": kernels("__shfl_down_sync(kWholeWarp, total,", "__shfl_up_sync(kWholeWarp, total,"),
    "shifted slot": kernels("slots[place.n + blockIdx.x]", "slots[place.n + blockIdx.x + (place.n > 0)]"),
    "all live": ALL_LIVE,
    "no tail check of spikes": kernels("if (place.live) Lanes::store(s,", "Lanes::store(s,"),
    "no tail check of dx": kernels("params.grad_x_seq != nullptr && place.live", "params.grad_x_seq != nullptr"),
    "no tail check in the plain backward": kernels("\n  if (place.live) {", "\n  {"),
    "wrong element of the gradient": kernels("(first_element + k * stride)", "(first_element + (k > 0) * stride)"),
    "wrong element in the plain backward": kernels("(kAhead - 1) * stride", "(kAhead - 1 + (k == 1)) * stride"),
    "wrong outer index": kernels("shape.outer == 1 ? read_n", "shape.steps == 1 || shape.outer > 0 ? read_n"),
    "wrong checkpoint read": kernels("start / kCheckpointSteps - 1", "0"),
    "no last checkpoint": kernels("done < steps", "done + kSteps < steps"),
    "wrong lanes exchange noise": kernels("drawn, other, kNoiseGroup)", "drawn, other)"),
    "wrong neuron's noise": kernels(">> (2 * rank)", ">> (2 * other)"),
    "wrong step's noise": kernels("eight_steps(source, n, start + 8)", "eight_steps(source, n, start)"),
    "noise of two steps swapped": kernels("blocks_[k / 2], k % 2", "blocks_[k / 2], 1 - k % 2"),
    "carried too early": kernels("last + place.read_n, dv);", "last + place.read_n, dv); carried = true;"),
    "carried too early in the plain backward": kernels("last + place.n, dv);", "last + place.n, dv); carried = true;"),
    "carried too late": kernels("\n      carried = true;\n      if", "\n      if"),
    "carried too late in the plain backward": kernels("\n          carried = true;", ""),
    "v_seq does not carry": kernels("\n        carried = true;", ""),
    "parameters of the wrong step": kernels("neuron.move_to(t - 1);", ""),
    "x may be misaligned": launchers("is_aligned(params.x_seq) && ", ""),
    "v_init may be misaligned": launchers("is_aligned(params.v_init) && ", ""),
    "outputs may be misaligned": launchers(" && (is_aligned(sequences_and_states) && ...)", ""),
    "checkpoints may be misaligned": launchers("params.h_seq, params.checkpoints)", "params.h_seq)"),
    "rows may be misaligned": launchers("params.shape.inner % 4 == 0", "params.shape.inner % 2 == 0"),
    "four need not share a parameter": launchers("parameter.inner % 4 == 0", "true"),
    "plain in spite of other gradients": launchers("id == kWidth || params.partials[id].data == nullptr", "true"),
    "too short a segment": launchers("steps <= 4 ?", "steps <= 5 ?"),
}  # fmt: skip


def mutated_csrc(mutant: Mutant, directory: Path) -> Path:
    csrc = shutil.copytree(sanitize.CSRC, directory / "csrc")
    source = csrc / mutant.file
    text = source.read_text()
    assert mutant.old in text, f"{mutant.file} has changed: find the mutant {mutant} its new place"
    source.write_text(text.replace(mutant.old, mutant.new))
    return csrc


def first_failure(mutant: Mutant, directory: Path) -> Outcome:
    program = directory / "program"
    # Without optimisation: compiling takes longer than running.
    sanitize.build("kernels_test", program, ["-O0"], mutated_csrc(mutant, directory))
    for order in ORDERS:
        result = sanitize.run(program, ASGL_EMULATION_ORDER=order)
        if result.returncode != 0:
            break
    return result


def under_sanitizer(mutant: Mutant, flags: tuple[str, ...], argument: str, directory: Path) -> Outcome:
    program = directory / "program"
    sanitize.build("kernels_test", program, ["-O0", "-g", *flags], mutated_csrc(mutant, directory))
    return sanitize.run(program, argument)


# By what the report says of the mutant.
SANITIZED = {
    "data race": partial(under_sanitizer, NO_BARRIER, sanitize.THREAD, "small"),
    "heap-buffer-overflow": partial(under_sanitizer, ALL_LIVE, sanitize.ADDRESS, "small"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    """The failure of every mutant, by its name, all on their way at the same time."""
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    tasks = {**{name: partial(first_failure, mutant) for name, mutant in MUTANTS.items()}, **SANITIZED}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(task, tmp_path_factory.mktemp("mutant")) for name, task in tasks.items()}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("kernels") / "kernels_test"
    sanitize.build("kernels_test", path, ["-O1"])
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_are_right(program, order):
    result = sanitize.run(program, ASGL_EMULATION_ORDER=order)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found(outcomes, name):
    result = outcomes[name].result()
    assert result.returncode != 0, f"{MUTANTS[name]} passes: {result.stdout}"


@pytest.mark.parametrize("finding", SANITIZED)
def test_sanitizer_finds_mutant(outcomes, finding):
    result = outcomes[finding].result()
    assert result.returncode != 0
    assert finding in result.stderr, result.stdout + result.stderr
