"""Mistakes seeded in the CUDA kernels and launchers: the programs in tests/emulation find every one of them."""

import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import emulated
import pytest
import sanitize

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")

# The orders in which the threads of a block get to run. A missing barrier need not show in all of them.
ORDERS = ("middle", "ascending", "descending", "1", "2")


class Mutant(NamedTuple):
    """A replacement of text in a file of csrc, with which the program must fail."""

    file: str
    old: str
    new: str
    program: str = "kernels_test"


def kernels(old: str, new: str) -> Mutant:
    return Mutant("lif_kernels.cuh", old, new)


def launchers(old: str, new: str) -> Mutant:
    return Mutant("lif_cuda.cuh", old, new)


def params(old: str, new: str) -> Mutant:
    return Mutant("lif_params.h", old, new)


def channels(old: str, new: str, file: str = "batch_norm_kernels.cuh") -> Mutant:
    return Mutant(file, old, new, "batch_norm_test")


def channel_params(old: str, new: str) -> Mutant:
    return channels(old, new, "batch_norm_params.h")


BARRIER = "  __syncthreads();"
GATHER = "if (lane == 0) first_lane[thread / kWarpThreads] = sum;"
NO_BARRIER = kernels(f"{GATHER}\n{BARRIER}", GATHER)
ALL_LIVE = kernels("live(n < shape.neurons())", "live(true)")
OF_ALL_WAYS = "join(moments[thread], moments[thread + half * tiles.width]);"
NO_BARRIER_OF_CHANNELS = channels(f"{OF_ALL_WAYS}\n  {BARRIER}", OF_ALL_WAYS)
BEYOND_LAST_ROW = channels("if (row + k * place.step < place.end_row) {\n        Lanes", "{\n        Lanes")

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
    "plain in spite of other gradients": params("wants = wants || (other", "wants = wants || (other && id != kDecay"),
    "normalised in spite of a mean's gradient": params("id != kWidth && ", "id != kWidth && id != kInputMean && "),
    "normalised in spite of v_rest": params(" || options.v_rest != Real(0)) return", ") return"),
    "normalised in spite of steps that differ": params("per_step || options.v_rest", "options.v_rest"),
    "normalised in spite of neurons that differ": params("!all_uniform(parameters, kInputGain) || ", ""),
    "plain in spite of a mean": params(" && is(kInputMean, Real(0));", ";"),
    "one input for all neurons": params("? parameters[id].at(n, 0)", "? parameters[id].at(0, 0)"),
    "gain's gradient of another step": kernels("step.dh * (x[k % kAhead][j]", "step.dh * (x[(k + 1) % kAhead][j]"),
    "gain's gradient without a mean": kernels("x[k % kAhead][j] - neuron.input_mean", "x[k % kAhead][j]"),
    "dx without the gain": kernels("kNormalised ? neuron.input_gain * step.dh : step.dh", "step.dh"),
    "gain's and bias' sums swapped": kernels("store_sum(kInputGain, gain_sum)", "store_sum(kInputGain, bias_sum)"),
    "sums of the wrong run": kernels(
        "store_partial(slots, run_of(place, params.parameters[id]), place.live, sum)",
        "store_partial(slots, {0, 0, kBlockThreads}, place.live, sum)",
    ),
    "too short a segment": launchers("steps <= 4 ", "steps <= 5 "),
    "no barrier before moments are joined": channels(f"= own;\n{BARRIER}", "= own;"),
    "no barrier between ways": NO_BARRIER_OF_CHANNELS,
    "no barrier between neighbours": channels(
        f"moments[thread] = join(moments[thread], moments[thread + half]);\n  {BARRIER}\n  }}\n  return",
        "moments[thread] = join(moments[thread], moments[thread + half]);\n  }\n  return",
    ),
    "no barrier before slots are joined": channels(f"= found;\n  {BARRIER}", "= found;"),
    "no barrier between slots": channels(
        f"moments[thread + half]);\n    {BARRIER}\n    }}", "moments[thread + half]);\n    }"
    ),
    "all units live": channels("way < tiles.ways && unit < task.units", "way < tiles.ways"),
    "all ways live": channels("way < tiles.ways && unit < task.units", "unit < task.units"),
    "joined beyond the channel": channels(
        "tiles.tiles_per_channel > 1 ? tiles.width : tiles.units", "false ? 0 : tiles.units"
    ),
    "a neighbour too many": channels("place.rank < left - half)", "place.rank <= left - half)"),
    "a neighbour left out": channels(
        "half = (left + 1) / 2;\n    if (place.way == 0", "half = left / 2;\n    if (place.way == 0"
    ),
    "a way left out": channels("place.way < left - half", "place.way + 1 < left - half"),
    "a row too many": channels("if (done + k < rows)", "if (done + k <= rows)"),
    "a row left out": channels("rows - done)", "rows - done - 1)"),
    "a row too many in the mean": channels("k < rows ? x[k][j] : x[0][j]", "x[k][j]"),
    "a row too many in the sums": channels("k < rows ? x[k][j] - m : Real(0)", "x[k][j] - m"),
    "a row too many in the number": channels("(rows < kRows ? rows : kRows)", "kRows"),
    "wrong mean in a sum": channels("sum += n * offset + distance", "sum += n * offset"),
    "wrong mean in squares": channels("n * offset + 2 * distance", "n * offset + distance"),
    "wrong row": channels("(element + k * stride), x[k]);\n      }", "(element + (k % 3) * stride), x[k]);\n      }"),
    "wrong stride": channels(
        "stride = place.step * tiles.shape.columns();\n  Moments", "stride = tiles.shape.columns();\n  Moments"
    ),
    "wrong column": channels("position * kLanes", "position"),
    "wrong slot": channels("place.task.slot * tiles", "place.task.slot / 2 * tiles"),
    "wrong slots joined": channels("slot += kBlockThreads", "slot += kBlockThreads + 1"),
    "not all channels": channels("channel < params.channels", "channel + 1 < params.channels"),
    "too many channels": channels("if (channel < params.channels) ", ""),
    "wrong end of rows": channels(
        "if (row + k * place.step < place.end_row) {\n#pragma", "if (row + k < place.end_row) {\n#pragma"
    ),
    "wrong mean": channels("params.mean[place.channel]", "params.mean[place.task.first_channel]"),
    "units of the wrong tile": channel_params("first_unit = tile * tiles.width", "first_unit = tile"),
    "tile beyond the last channel": channel_params("left < tiles.channels_per_tile ? left : ", ""),
    "too many splits": channel_params("enough > needed ? enough : needed", "enough"),
    "x of a channel may be misaligned": channels("is_aligned(x_seq) && ", "", "batch_norm_cuda.cu"),
    "dx of a channel may be misaligned": channels(" && is_aligned(grad_x_seq)", "", "batch_norm_cuda.cu"),
    "channels may share four": channels("shape.inner % 4 == 0", "shape.inner % 2 == 0", "batch_norm_cuda.cu"),
}  # fmt: skip


def mutated_csrc(mutant: Mutant, directory: Path) -> Path:
    csrc = shutil.copytree(sanitize.CSRC, directory / "csrc")
    source = csrc / mutant.file
    text = source.read_text()
    assert mutant.old in text, f"{mutant.file} has changed: find the mutant {mutant} its new place"
    source.write_text(text.replace(mutant.old, mutant.new))
    return csrc


def mutated_program(mutant: Mutant, directory: Path, *flags: str) -> Path:
    program = directory / "program"
    # Without optimisation: compiling takes longer than running.
    sanitize.build(mutant.program, program, ["-O0", *flags], mutated_csrc(mutant, directory))
    return program


def first_failure(program: Path) -> CompletedProcess[str]:
    for order in ORDERS:
        result = sanitize.run(program, ASGL_EMULATION_ORDER=order)
        if result.returncode != 0:
            break
    return result


# Mutant, sanitizer and what its report says.
SANITIZED = {
    "race of neurons": (NO_BARRIER, sanitize.THREAD, "data race"),
    "race of channels": (NO_BARRIER_OF_CHANNELS, sanitize.THREAD, "data race"),
    "overflow of neurons": (ALL_LIVE, sanitize.ADDRESS, "heap-buffer-overflow"),
    "overflow of channels": (BEYOND_LAST_ROW, sanitize.ADDRESS, "heap-buffer-overflow"),
}


@pytest.fixture(scope="module", params=["kernels_test", "batch_norm_test"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / request.param
    sanitize.build(request.param, path, ["-O1"])
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_are_right(program, order):
    result = sanitize.run(program, ASGL_EMULATION_ORDER=order)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found(name, tmp_path):
    result = first_failure(mutated_program(MUTANTS[name], tmp_path))
    assert result.returncode != 0, f"{MUTANTS[name]} passes: {result.stdout}"


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizer_finds_mutant(name, tmp_path):
    mutant, flags, report = SANITIZED[name]
    result = sanitize.run(mutated_program(mutant, tmp_path, "-g", *flags), "small")
    assert result.returncode != 0
    assert report in result.stderr, result.stdout + result.stderr
