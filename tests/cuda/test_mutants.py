"""Mistakes seeded in kernels and launchers: the programs in tests/cuda/emulation find every one of them."""

import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import emulated
import pytest
import sanitize
import torch
from comparison import uniform
from test_launches import described

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import neuron_kernels, normalisation_kernels

pytestmark = pytest.mark.usefixtures("compiler")

# The orders in which the threads of a block get to run. A missing barrier need not show in all of them.
ORDERS = ("middle", "ascending", "descending", "1", "2")


class Mutant(NamedTuple):
    """A replacement of text in a file of csrc, with which the program must fail."""

    file: str
    old: str
    new: str
    program: str = "kernels_test"


def kernels(old: str, new: str) -> Mutant:
    return Mutant("cuda/neuron_kernels.cuh", old, new)


def access(old: str, new: str) -> Mutant:
    return Mutant("cuda/access.cuh", old, new)


def noise(old: str, new: str) -> Mutant:
    return Mutant("cuda/noise.cuh", old, new)


def launchers(old: str, new: str) -> Mutant:
    return Mutant("cuda/choose.cuh", old, new)


def params(old: str, new: str) -> Mutant:
    return Mutant("neuron_params.h", old, new)


def channels(old: str, new: str, file: str = "cuda/normalisation_kernels.cuh") -> Mutant:
    return Mutant(file, old, new, "batch_norm_test")


def channel_params(old: str, new: str) -> Mutant:
    return channels(old, new, "normalisation_params.h")


def channel_launchers(old: str, new: str) -> Mutant:
    return channels(old, new, "cuda/choose.cuh")


BARRIER = "  __syncthreads();"
GATHER = "if (lane == 0) first_lane[thread / kWarpThreads] = sum;"
NO_BARRIER = kernels(f"{GATHER}\n{BARRIER}", GATHER)
ALL_LIVE = access("live(n < shape.neurons())", "live(true)")
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
    "no tail check in the uniform backward": kernels("\n  if (place.live) {", "\n  {"),
    "wrong element of the gradient": kernels("(first_element + k * stride)", "(first_element + (k > 0) * stride)"),
    "wrong element in the uniform backward": kernels("(kAhead - 1) * stride", "(kAhead - 1 + (k == 1)) * stride"),
    "wrong outer index": access("shape.outer == 1 ? read_n", "shape.steps == 1 || shape.outer > 0 ? read_n"),
    "wrong checkpoint read": access("start / kCheckpointSteps - 1", "0"),
    "no last checkpoint": kernels("done < steps", "done + kSteps < steps"),
    "wrong lanes exchange noise": noise("drawn, other, kNoiseGroup)", "drawn, other)"),
    "wrong neuron's noise": noise(">> (2 * rank)", ">> (2 * other)"),
    "wrong step's noise": noise("eight_steps(source, n, start + 8)", "eight_steps(source, n, start)"),
    "noise of two steps swapped": noise("blocks_[k / 2], k % 2", "blocks_[k / 2], 1 - k % 2"),
    "carried too early": kernels("last, place.read_n, d_state);", "last, place.read_n, d_state); carried = true;"),
    "carried too early in the uniform backward": kernels("place.n, d_state);", "place.n, d_state); carried = true;"),
    "carried too late": kernels("\n      carried = true;\n      if", "\n      if"),
    "carried too late in the uniform backward": kernels("\n          carried = true;", ""),
    "v_seq does not carry": kernels("\n        carried = true;", ""),
    "parameters of the wrong step": kernels("neuron.move_to(t - 1);", ""),
    "x may be misaligned": launchers("is_aligned(params.x_seq) && ", ""),
    "v_init may be misaligned": launchers("is_aligned(params.init) && ", ""),
    "outputs may be misaligned": launchers(" && (is_aligned(sequences_and_states) && ...)", ""),
    "checkpoints may be misaligned": launchers("params.h_seq, params.checkpoints)", "params.h_seq)"),
    "rows may be misaligned": launchers("params.shape.inner % 4 == 0", "params.shape.inner % 2 == 0"),
    "four need not share a parameter": launchers("parameter.inner % 4 == 0", "true"),
    "plain in spite of other gradients": params("|| !wants(id));", "|| id == kDecay || !wants(id));"),
    "normalised in spite of a mean's gradient": params("id == kWidth || ", "id == kWidth || id == kInputMean || "),
    "normalised in spite of v_rest": params(" || options.v_rest != Real(0)) return", ") return"),
    "normalised in spite of steps that differ": params("per_step || options.v_rest", "options.v_rest"),
    "normalised in spite of neurons that differ": params("!all_uniform(parameters, kInputGain) || ", ""),
    "plain in spite of a mean": params(" && is(kInputMean, Real(0));", ";"),
    "one input for all neurons": params("? parameters[id].at(n, 0)", "? parameters[id].at(0, 0)"),
    "gain's gradient of another step": kernels("step.dc * (x[k % kAhead][j]", "step.dc * (x[(k + 1) % kAhead][j]"),
    "gain's gradient without a mean": kernels("x[k % kAhead][j] - neuron.input_mean", "x[k % kAhead][j]"),
    "dx without the gain": kernels("kNormalised ? neuron.input_gain * step.dc : step.dc", "step.dc"),
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
    "a row too many": channels("sums.add(x, left)", "sums.add(x, left < kTogether ? left + 1 : left)"),
    "a row left out": channels("sums.add(x, left)", "sums.add(x, left - 1)"),
    "a row too many in the mean": channels("k < rows ? x[k][j] : x[0][j]", "x[k][j]"),
    "a row too many in the sums": channels("k < rows ? x[k][j] - m : Real(0)", "x[k][j] - m"),
    "a row too many in the number": channels("n = rows * kLanes", "n = kRows * kLanes"),
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
    "x of a channel may be misaligned": channel_launchers("is_aligned(x_seq) && ", ""),
    "dx of a channel may be misaligned": channel_launchers(" && is_aligned(grad_x_seq)", ""),
    "channels may share four": channel_launchers("tiles.shape.inner % 4 == 0", "tiles.shape.inner % 2 == 0"),
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


@pytest.fixture(scope="module")
def precompiled(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags by which the headers that no mutant changes are read once: a fifth of the time that the builds take."""
    header = tmp_path_factory.mktemp("precompiled") / "unchanged.h"
    names = ("cuda_runtime.h", "algorithm", "cmath", "cstdio", "limits", "memory", "random", "string", "vector")
    header.write_text("".join(f"#include <{name}>\n" for name in names))
    options = (*sanitize.FLAGS, "-O0", f"-I{sanitize.EMULATION / 'include'}", "-x", "c++-header")
    subprocess.run([*compiler, *options, str(header), "-o", f"{header}.gch"], check=True)
    return "-include", str(header)


def first_failure(program: Path) -> subprocess.CompletedProcess[str]:
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
def test_mutant_is_found(name, precompiled, tmp_path):
    result = first_failure(mutated_program(MUTANTS[name], tmp_path, *precompiled))
    assert result.returncode != 0, f"{MUTANTS[name]} passes: {result.stdout}"


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizer_finds_mutant(name, tmp_path):
    mutant, flags, report = SANITIZED[name]
    result = sanitize.run(mutated_program(mutant, tmp_path, "-g", *flags), "small")
    assert result.returncode != 0
    assert report in result.stderr, result.stdout + result.stderr


# ---- the CPU kernels: all mistakes in one build, which the environment chooses from ----


class Seeded(NamedTuple):
    """An expression in a file of csrc, in a context that has @ for it, and what it is replaced by."""

    file: str
    context: str
    old: str
    new: str


def cpu(context: str, old: str, new: str) -> Seeded:
    return Seeded("cpu/neuron.cpp", context, old, new)


def tiles(context: str, old: str, new: str) -> Seeded:
    return Seeded("cpu/tile.h", context, old, new)


def options(context: str, old: str, new: str) -> Seeded:
    return Seeded("neuron_params.h", context, old, new)


def rows(context: str, old: str, new: str) -> Seeded:
    return Seeded("cpu/rows.h", context, old, new)


def loops(context: str, old: str, new: str) -> Seeded:
    return Seeded("cpu/loops.h", context, old, new)


def norm(context: str, old: str, new: str) -> Seeded:
    return Seeded("cpu/normalisation.cpp", context, old, new)


PIECES = "for_each_stretch(tile, @, [&](int64 n, int64 offset, int64 length) {"

SEEDED = {
    "kernels_test": {
        "a stretch too long": rows("std::min(tile.length - i, @)", "inner - n % inner", "inner"),
        "a channel's stretch too long": tiles("for_each_stretch(tile_, @,", "shared_ == 0 ? kTile : shared_",
                                              "shared_ == 0 ? kTile : 2 * shared_"),
        "parameters taken as alike": tiles(
            "shared_ == 0 || (@)", "parameter.inner == shared_ && parameter.count == count_", "true"
        ),
        "a parameter's run too long": tiles("for_each_stretch(tile, @,", "parameter.inner", "2 * parameter.inner"),
        "a sum's run too long": cpu("for_each_stretch(tile, @,", "parameter.inner", "2 * parameter.inner"),
        "parameters turn too late": tiles("for_each_stretch(tile, @,", "parameter.count", "2 * parameter.count"),
        "noise of another tile": tiles("if (@) {\n      first_ = tile.first", "tile.first != first_", "first_ < 0"),
        "noise of another step": tiles("rows_.row(2 * slot + @)", "t % 2", "0"),
        "noise of an earlier segment": tiles("if (@)", "pairs_[slot] != pair", "pairs_[slot] < 0"),
        "parameters of another tile": tiles("(@ || (per_step", "tile.first != first_", "first_ < 0"),
        "parameters of another step": tiles("|| (per_step && @)", "t != t_", "false"),
        "rows of the input of another tile": tiles("period_ < kTile && @",
                                                   "tile.first % count_ == tile_.first % count_", "true"),
        "rows of the input repeat too early": tiles("period_ = @", "std::max<int64>(1, kInputSums / count_) * count_",
                                                    "kInputSums"),
        "wrong checkpoint read": cpu("params.checkpoints, checkpoint(tile, @), params.at_rest()", "start",
                                     "int64(kCheckpointSteps)"),
        "no last checkpoint": cpu("kCheckpointSteps == 0 && @)", "steps < params.shape.steps",
                                  "steps + kCheckpointSteps < params.shape.steps"),
        "decay's gradient of another step": cpu("accumulate(kDecay, Real(1), dh, {state(@).v", "k", "k + 1"),
        "wrong sign of the soft reset's gradient": cpu(
            "accumulate(kReset, @", "Model::kResetsHard ? Real(1) : Real(-1)", "Real(1)"
        ),
        "a carried gradient forgotten": cpu(
            "Real(0));\n      bool carried = @;", "exists(params.grad_last)", "false"
        ),
        "uniform forward in spite of potentials": options("return v_seq == nullptr && @", "h_seq == nullptr", "true"),
        "uniform backward in spite of potentials": options(
            "only = grad_v_seq == nullptr && @", "grad_h_seq == nullptr", "true"
        ),
        "folded sums end where they turn": cpu("totals.data(), @}", "used - before_turn", "int64(0)"),
        "a row read in pieces too long": rows(f"{PIECES}\n    run<ConvertLoop<Element,", "tile.shape.inner",
                                              "2 * tile.shape.inner"),
        "a row written in pieces too long": rows(f"{PIECES}\n    run<ConvertLoop<Real_t<Element>,", "tile.shape.inner",
                                                 "2 * tile.shape.inner"),
        "a row read in place though in pieces": rows("if (@) return sequence", "tile.in_one_piece()", "true"),
        "a row written in place though in pieces": rows("sequence != nullptr && @) return", "tile.in_one_piece()",
                                                        "true"),
        "a sum without its last": loops("for (int lane = 0; @; ++i, ++lane) lanes[lane]", "i < args.length",
                                        "i + 1 < args.length"),
        "width's gradient without a threshold": loops("step.dy * (@)", "h - args.neuron.v_threshold", "h"),
        "gain's gradient without a mean": loops("gain_sum[i] += dh[i] * (@)", "x[i] - neuron.input_mean", "x[i]"),
    },
    "batch_norm_test": {
        "moments without the last value": norm("for (int lane = 0; @; ++i", "i < args.length", "i + 1 < args.length"),
        "moments of the last chunk's columns": norm("longest = @;", "std::max(longest, chunk)", "chunk"),
        "moments in the wrong slot": norm("params_.moments[@ *", "task_.slot", "task_.slot / 2"),
        "moments of one slot": norm("join(found, params.moments[@ *", "slot", "int64(0)"),
        "columns of the first tile": norm("f(row * tiles.shape.columns() + @,", "column", "int64(0)"),
        "a channel beyond its tile": norm("length = @;\n      f(channel", "std::min(tiles.units_per_channel, "
                                          "task.units - in_row)", "tiles.units_per_channel"),
        "the mean of another channel": norm("{nullptr, params.mean[@]}", "channel", "int64(0)"),
    },
}  # fmt: skip


def seeded_program(program: str, directory: Path) -> Path:
    csrc = sanitize.few_instantiations(directory)
    declaration = csrc / "math" / "host_device.h"
    declaration.write_text(
        declaration.read_text().replace("namespace asgl {", "namespace asgl {\ninline int mutant;", 1)
    )
    for number, (file, context, old, new) in enumerate(SEEDED[program].values(), 1):
        source = csrc / file
        text = source.read_text()
        place = context.replace("@", old)
        assert text.count(place) == 1, f"{file} has changed: it has {text.count(place)} times {place}"
        source.write_text(text.replace(place, context.replace("@", f"(mutant == {number} ? ({new}) : ({old}))")))
    path = directory / program
    sanitize.build(program, path, ["-O1", "-DASGL_TEST_MUTANTS", sanitize.BASELINE, *sanitize.CPU], csrc)
    return path


@pytest.mark.parametrize("program", SEEDED)
def test_mutants_on_the_cpu_are_found(program, tmp_path):
    """Each by numbers that differ, not by a crash; without any of them all is well."""
    path = seeded_program(program, tmp_path)
    found = {}
    for number, name in enumerate(["none", *SEEDED[program]]):
        result = sanitize.run(path, ASGL_MUTANT=str(number))
        found[name] = result.returncode if "cases failed" in result.stdout else f"crash: {result.stderr}"
    assert found == {"none": 0, **dict.fromkeys(SEEDED[program], 1)}


# ---- the launchers in Python: what they would start is not what those in C++ start ----

NEURON, NORMALISATION = neuron_kernels, normalisation_kernels
PYTHON = {
    "four though rows are of six": (NEURON, "layout.inner % 4 == 0", "layout.inner % 2 == 0"),
    "four need not share a parameter": (NEURON, "view.inner % 4", "view.inner % 2"),
    "x may be misaligned": (NEURON, "in (self.x_seq, self.v_init", "in (self.v_init"),
    "too long a segment": (NEURON, "if steps <= each", "if steps < each"),
    "plain in spite of a potential's gradient": (NEURON, "or grad_h_seq is not None", ""),
    "normalised in spite of v_rest": (NEURON, " or self.options.v_rest != 0", ""),
    "the same parameter at all steps": (NEURON, "step_stride=parameter.step_stride", "step_stride=0"),
    "too few slots": (NEURON, "layout.neurons // view.inner + blocks", "layout.neurons // view.inner"),
    "a width's gradient as any other's": (NEURON, 'name == "width"', "False"),
    "a thread for many slots": (NEURON, '>= constant("kManySlots")', '>= 4 * constant("kManySlots")'),
    "units of one lane": (NORMALISATION, "units = inner // lanes", "units = inner"),
    "tile beyond the last channel": (NORMALISATION, "min(threads // units, channels)", "threads // units"),
    "one row at a time": (NORMALISATION, "ways = threads // width", "ways = 1"),
    "channels may share four": (NORMALISATION, "inner % 4 == 0", "inner % 2 == 0"),
    "no more channels than threads": (NORMALISATION, 'blocks_for(channels, constant("kBlockThreads"))', "1"),
}  # fmt: skip


class Recorder:
    """A launcher that starts nothing."""

    def __init__(self, emulation):
        self.resident_threads = emulation.resident_threads
        self.launches = []

    def launch(self, device, kernel, blocks, threads, params):
        self.launches.append(emulated.Launch(kernel, blocks, threads, bytes(params)))


def make_calls(backend):
    """Of all launchers, in about as few calls as show the mistakes."""
    width = uniform(low=0.5, high=1.5)
    for shape, options in (
        ((8, 2048), {"width": width}),
        ((20, 2, 6, 32), {"width": width, "return_h_seq": True}),
        ((4, 2, 6, 32), {"input_gain": uniform(6, 1, low=0.5, high=1.5), "v_rest": 0.5}),
        ((4, 6, 2), {"width": uniform(6, 1, low=0.5, high=1.5)}),
        ((4, 6, 32), {"decay": uniform(4, 1, 1, low=0.5, high=0.9)}),
        ((32, 3, 6), {"time_dim": 1, "width": width}),
        ((2, 300 * 512), {"width": width}),
    ):
        output = asgl_cuda.lif(torch.randn(shape, requires_grad=True), **options, backend=backend)
        (output if isinstance(output, torch.Tensor) else output.h_seq).sum().backward()
    asgl_cuda.lif(torch.randn(4 * 2048 + 1)[1:].view(4, 2048).requires_grad_(), backend=backend).sum().backward()
    for shape in ((3, 2, 6, 4, 8), (3, 2, 5, 2, 3), (3, 2, 130, 1)):
        x_seq = torch.randn(shape, requires_grad=True)
        asgl_cuda.batch_norm_lif(x_seq, training=True, backend=backend).sum().backward()


@pytest.mark.parametrize("name", PYTHON)
def test_mutant_in_python_is_found(emulation, monkeypatch, name):
    found = {}
    module, old, new = PYTHON[name]
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} has changed: find the mutant {name} its new place"
    for text in (source, source.replace(old, new)):
        mutant = ModuleType(module.__name__)
        exec(compile(text, module.__name__, "exec"), mutant.__dict__)
        recorder = Recorder(emulation)
        operators = SimpleNamespace()
        for kind in (NEURON.NeuronOperators, NORMALISATION.NormalisationOperators):
            each = getattr(mutant, kind.__name__) if kind.__module__ == module.__name__ else kind
            for operator in vars(kind):
                if not operator.startswith("_"):
                    setattr(operators, operator, getattr(each(recorder), operator))
        monkeypatch.setitem(backends.BACKENDS, "mutant", backends.Backend(("cpu",), operators, lambda: None))
        make_calls("mutant")
        found[text] = [described(launch, torch.float32) for launch in recorder.launches]
    make_calls("emulated")
    expected = [described(launch, torch.float32) for launch in emulation.take_launches()]
    assert found[source] == expected
    assert found[text] != expected
