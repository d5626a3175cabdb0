"""Mistakes seeded in kernels and launchers: the programs in tests/cuda/emulation find every one of them."""

import shutil
from collections.abc import Callable, Iterable
from functools import cache, partial
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
    """A mistake in a file of csrc: in a context that has @ for it, old is replaced by new.

    Both are expressions, or statements with their semicolons, of which one may be empty.
    """

    file: str
    context: str
    old: str
    new: str


kernels = partial(Mutant, "cuda/neuron_kernels.cuh")
access = partial(Mutant, "cuda/access.cuh")
noise = partial(Mutant, "cuda/noise.cuh")
launchers = partial(Mutant, "cuda/choose.cuh")
params = partial(Mutant, "neuron_params.h")
channels = partial(Mutant, "cuda/normalisation_kernels.cuh")
channel_params = partial(Mutant, "normalisation_params.h")

BARRIER = "__syncthreads();"
NO_BARRIER = kernels("= sum;\n  @\n  if (thread == run.begin", BARRIER, "")
ALL_LIVE = access("live(@)", "n < shape.neurons()", "true")
NO_BARRIER_OF_CHANNELS = channels("half * tiles.width]);\n    @", BARRIER, "")
BEYOND_LAST_ROW = channels("if (@) {\n        Lanes", "row + k * place.step < place.end_row", "true")

MUTANTS = {
    "kernels_test": {
        "no barrier between two sums": kernels("@  // whoever reads", BARRIER, ""),
        "no barrier within a sum": NO_BARRIER,
        "no barrier in the last sum": kernels("@\n  if (thread > 0) return;", BARRIER, ""),
        "wrong lane in a sum": kernels("other = @;", "__shfl_down_sync(kWholeWarp, sum, distance)",
                                       "__shfl_xor_sync(kWholeWarp, sum, distance)"),
        "a sum beyond its warp": kernels("if (@ && thread", "lane + distance < kWarpThreads", "true"),
        "a sum beyond its run": kernels("&& @) sum += other", "thread + distance < run.end", "true"),
        "wrong lane in the last sum": kernels("total += @;", "__shfl_down_sync(kWholeWarp, total, distance)",
                                              "__shfl_up_sync(kWholeWarp, total, distance)"),
        "shifted slot": kernels("slots[place.n + @]", "blockIdx.x", "blockIdx.x + (place.n > 0)"),
        "all live": ALL_LIVE,
        "no tail check of spikes": kernels("if (@) Lanes::store(s,", "place.live", "true"),
        "no tail check of dx": kernels("params.grad_x_seq != nullptr && @)", "place.live", "true"),
        "no tail check in the uniform backward": kernels("\n  if (@) {", "place.live", "true"),
        "wrong element of the gradient": kernels("(first_element + @ * stride)", "k", "(k > 0)"),
        "wrong element in the uniform backward": kernels("(element + (@) * stride)", "kAhead - 1",
                                                         "kAhead - 1 + (k == 1)"),
        "wrong outer index": access("element(@ ? read_n", "shape.outer == 1", "shape.steps == 1 || shape.outer > 0"),
        "wrong checkpoint read": access("load(checkpoints, (@)", "start / kCheckpointSteps - 1", "0"),
        "no last checkpoint": kernels("== 0 && @ &&", "done < steps", "done + kSteps < steps"),
        "wrong lanes exchange noise": noise("told = @", "__shfl_sync(kWholeWarp, drawn, other, kNoiseGroup)",
                                            "__shfl_sync(kWholeWarp, drawn, other)"),
        "wrong neuron's noise": noise(">> (2 * @)", "rank", "other"),
        "wrong step's noise": noise("eight_steps(source, n, @)", "start + 8", "start"),
        "noise of two steps swapped": noise("blocks_[k / 2], @", "k % 2", "1 - k % 2"),
        "carried too early": kernels("last, place.read_n, d_state);@", "", "carried = true;"),
        "carried too early in the uniform backward": kernels("last, place.n, d_state);@", "", "carried = true;"),
        "carried too late": kernels("\n      @\n", "carried = true;", ""),
        "carried too late in the uniform backward": kernels("\n          @\n", "carried = true;", ""),
        "v_seq does not carry": kernels("\n        @\n", "carried = true;", ""),
        "parameters of the wrong step": kernels("@", "neuron.move_to(t - 1);", ""),
        "x may be misaligned": launchers("shared && @", "is_aligned(params.x_seq)", "true"),
        "v_init may be misaligned": launchers("&& @ &&", "is_aligned(params.init)", "true"),
        "outputs may be misaligned": launchers("(@)", "is_aligned(sequences_and_states) && ...", "true"),
        "checkpoints may be misaligned": launchers("params.h_seq, @)", "params.checkpoints", "params.last"),
        "rows may be misaligned": launchers("params.shape.inner % @ == 0", "4", "2"),
        "four need not share a parameter": launchers("|| @)", "parameter.inner % 4 == 0", "true"),
        "plain in spite of other gradients": params("|| @);", "!wants(id)", "id == kDecay || !wants(id)"),
        "normalised in spite of a mean's gradient": params("(@ ||", "id == kWidth", "id == kWidth || id == kInputMean"),
        "normalised in spite of v_rest": params("|| @) return", "options.v_rest != Real(0)", "false"),
        "normalised in spite of steps that differ": params("kInputGain) || @ ||", "per_step", "false"),
        "normalised in spite of neurons that differ": params("@ ||", "!all_uniform(parameters, kInputGain)", "false"),
        "plain in spite of a mean": params("&& @;", "is(kInputMean, Real(0))", "true"),
        "one input for all neurons": params("? parameters[id].at(@, 0)", "n", "0"),
        "gain's gradient of another step": kernels("step.dc * (x[@ % kAhead][j]", "k", "(k + 1)"),
        "gain's gradient without a mean": kernels("% kAhead][j] - @", "neuron.input_mean", "Real(0)"),
        "dx without the gain": kernels("kNormalised ? @ :", "neuron.input_gain * step.dc", "step.dc"),
        "gain's and bias' sums swapped": kernels("store_sum(kInputGain, @)", "gain_sum", "bias_sum"),
        "sums of the wrong run": kernels("store_partial(slots, @,", "run_of(place, params.parameters[id])",
                                         "Run{0, 0, kBlockThreads}"),
        "too short a segment": launchers("kernel = steps <= @ ", "4", "5"),
    },
    "batch_norm_test": {
        "no barrier before moments are joined": channels("= own;\n  @", BARRIER, ""),
        "no barrier between ways": NO_BARRIER_OF_CHANNELS,
        "no barrier between neighbours": channels("\n    @\n  }\n  return", BARRIER, ""),
        "no barrier before slots are joined": channels("= found;\n    @", BARRIER, ""),
        "no barrier between slots": channels("moments[thread + half]);\n      @", BARRIER, ""),
        "all units live": channels("way < tiles.ways && @", "unit < task.units", "true"),
        "all ways live": channels("live(@ &&", "way < tiles.ways", "true"),
        "joined beyond the channel": channels("tiles.tiles_per_channel > 1 ? @ :", "tiles.width",
                                              "tiles.units_per_channel"),
        "a neighbour too many": channels("place.way == 0 && @)", "place.rank < left - half",
                                         "place.rank <= left - half"),
        "a neighbour left out": channels("half = @;\n    if (place.way == 0", "(left + 1) / 2", "left / 2"),
        "a way left out": channels("if (@)", "place.way < left - half", "place.way + 1 < left - half"),
        "a row too many": channels("sums.add(x, @)", "left", "left < kTogether ? left + 1 : left"),
        "a row left out": channels("[kLanes], int rows) {@", "", "--rows;"),
        "a row too many in the mean": channels("k < rows ? x[k][j] : @;", "x[0][j]", "x[k][j]"),
        "a row too many in the sums": channels("k < rows ? x[k][j] - m : @;", "Real(0)", "x[k][j] - m"),
        "a row too many in the number": channels("n = @ * kLanes", "rows", "kRows"),
        "wrong mean in a sum": channels("sum += n * offset + @;", "distance", "0"),
        "wrong mean in squares": channels("n * offset + @)", "2 * distance", "distance"),
        "wrong row": channels("(element + @ * stride), x[k]);\n      }", "k", "(k % 3)"),
        "wrong stride": channels("stride = @;\n  Moments", "place.step * tiles.shape.columns()",
                                 "tiles.shape.columns()"),
        "wrong column": channels("inner + @;", "position * kLanes", "position"),
        "wrong slot": channels("moments[@ *", "place.task.slot", "place.task.slot / 2"),
        "wrong slots joined": channels("slot += @)", "kBlockThreads", "kBlockThreads + 1"),
        "too many channels": channels("if (@) params.compute", "channel < params.channels", "true"),
        "not all channels": channels("(channel < @))) params.compute", "params.channels", "params.channels - 1"),
        "wrong end of rows": channels("if (@) {\n#pragma", "row + k * place.step < place.end_row",
                                      "row + k < place.end_row"),
        "wrong mean": channels("params.mean[@]", "place.channel", "place.task.first_channel"),
        "units of the wrong tile": channel_params("first_unit = @;", "tile * tiles.width", "tile"),
        "tile beyond the last channel": channel_params("left < tiles.channels_per_tile ? @ :", "left",
                                                       "tiles.channels_per_tile"),
        "too many splits": channel_params("rows_per_split = @;", "enough > needed ? enough : needed", "enough"),
        "x of a channel may be misaligned": launchers("&& @ &&", "is_aligned(x_seq)", "true"),
        "dx of a channel may be misaligned": launchers("&& @;", "is_aligned(grad_x_seq)", "true"),
        "channels may share four": launchers("tiles.shape.inner % @ == 0", "4", "2"),
    },
}  # fmt: skip

# These are in the CPU kernels, and the same programs find them.
cpu = partial(Mutant, "cpu/neuron.cpp")
tiles = partial(Mutant, "cpu/tile.h")
rows = partial(Mutant, "cpu/rows.h")
loops = partial(Mutant, "cpu/loops.h")
norm = partial(Mutant, "cpu/normalisation.cpp")

PIECES = "for_each_stretch(tile, @, [&](int64 n, int64 offset, int64 length) {"

CPU_MUTANTS = {
    "kernels_test": {
        "a stretch too long": rows("return {@, inner", "inner - tile.first % inner", "inner"),
        "a channel's stretch too long": tiles("for_each_stretch(tile_, @,", "shared_ == 0 ? kTile : shared_",
                                              "shared_ == 0 ? kTile : 2 * shared_"),
        "parameters taken as alike": tiles(
            "shared_ == 0 || (@)", "parameter.inner == shared_ && parameter.count == count_", "true"
        ),
        "a parameter's run too long": tiles("runs_of(tile, @), inverse", "parameter.inner", "2 * parameter.inner"),
        "a parameter's last value stays": loops("== args.count ? @ :", "0", "index"),
        "a sum's run too long": cpu("runs_of(tile, @), slots", "parameter.inner", "2 * parameter.inner"),
        "a sum without the run's later tiles": cpu("for (; @; ++tile) totals", "(tile + 1) * sum.tile < end", "false"),
        "a sum across a tile's end": cpu("std::min(length - i, @)", "(tile + 1) * sum.tile - (run + i)", "length"),
        "parameters turn too late": tiles("for_each_stretch(tile, @,", "parameter.count", "2 * parameter.count"),
        "noise of another tile": tiles("if (@) {\n      first_ = tile.first", "tile.first != first_", "first_ < 0"),
        "noise of another step": tiles("rows_.row(2 * slot + @)", "t % 2", "0"),
        "noise of an earlier segment": tiles("if (@)", "pairs_[slot] != pair", "pairs_[slot] < 0"),
        "one value for several channels": tiles(
            "|| @);", "tile.first % parameter.inner + tile.length <= parameter.inner", "true"
        ),
        "parameters of another tile": tiles("if (@ && (t == t_", "tile.first == first_", "first_ >= 0"),
        "parameters of another step": tiles("(@ || !per_step_)", "t == t_", "true"),
        "a row of another tile": tiles("pattern = {@, is_per_step", "place", "int64(0)"),
        "a row of another step": tiles(", @};", "is_per_step(id) ? t : 0", "0"),
        "a row beyond the parameter": tiles(
            "&&\n                          @;", "place + tile.length <= parameter.count", "place < parameter.count"
        ),
        "rows of the input of another tile": tiles("period_ < kTile && @",
                                                   "tile.first % count_ == tile_.first % count_", "true"),
        "rows of the input repeat too early": tiles("period_ = @", "std::max<int64>(1, kInputSums / count_) * count_",
                                                    "kInputSums"),
        "wrong checkpoint read": cpu("params.checkpoints, checkpoint(tile, @), params.at_rest()", "start",
                                     "int64(kCheckpointSteps)"),
        "no last checkpoint": cpu("kCheckpointSteps == 0 && @)", "steps < params.shape.steps",
                                  "steps + kCheckpointSteps < params.shape.steps"),
        "decay's gradient of another step": cpu("accumulate(kDecay, Real(1), dh, {state(@).v", "k", "k + 1"),
        "decay's gradient of another settled step": cpu("d_state, state(@).v, width", "t - start", "t - start + 1"),
        "wrong sign of the soft reset's gradient": cpu(
            "accumulate(kReset, @", "Model::kResetsHard ? Real(1) : Real(-1)", "Real(1)"
        ),
        "a carried gradient forgotten": cpu(
            "}\n      bool carried = @;", "exists(params.grad_last)", "false"
        ),
        "settled forward in spite of potentials": cpu("return params.v_seq == nullptr && @;",
                                                      "params.h_seq == nullptr", "true"),
        "settled backward in spite of potentials": cpu("return params.grad_v_seq == nullptr && @ &&",
                                                       "params.grad_h_seq == nullptr", "true"),
        "settled in spite of a hard reset's gradient": cpu("!(@ &&", "params.wants(kReset)", "false"),
        "settled in spite of a potential at rest": cpu("&& @ &&", "params.options.v_rest == 0", "true"),
        "folded sums end where they turn": cpu("totals.data(), @}", "used - before_turn", "int64(0)"),
        "a row read in pieces too long": rows(f"{PIECES}\n    run<ConvertLoop<Element,", "tile.shape.inner",
                                              "2 * tile.shape.inner"),
        "a row written in pieces too long": rows(f"{PIECES}\n    run<ConvertLoop<Real_t<Element>,", "tile.shape.inner",
                                                 "2 * tile.shape.inner"),
        "a row read in place though in pieces": rows("if (@) return sequence", "tile.in_one_piece()", "true"),
        "a row written in place though in pieces": rows("sequence != nullptr && @) return", "tile.in_one_piece()",
                                                        "true"),
        "a sum without its last": loops("for (int lane = 0; @; ++i, ++lane) lanes[lane]", "i < length",
                                        "i + 1 < length"),
        "width's gradient without a threshold": loops("step.dy * (@)", "h - neuron.v_threshold", "h"),
        "threshold's gradient without a width": loops("step.dy * @;", "neuron.inverse_width", "Real(1)"),
        "soft reset's gradient without a spike": loops("keep_if(args.carried, @);", "d_state.v * s", "d_state.v"),
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


def seed(csrc: Path, mutants: Iterable[Mutant], chosen: int = 0) -> None:
    """Puts all mutants into the sources; the variable `mutant` says by its number, from 1, which one is made."""
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
    """Says which cases failed in the first order in which some did: numbers that differ, or an error of the emulation.

    A crash would say nothing about the mistake.
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
    """Each is found by numbers that differ; without any of them all is well."""
    mutants, csrc = CPU_MUTANTS[program], sanitize.few_instantiations(tmp_path)
    path = seeded_program(program, mutants.values(), csrc, sanitize.BASELINE, *sanitize.CPU)
    found = {name: first_failure(path, number, ["middle"]) for number, name in enumerate(["none", *mutants])}
    assert {name for name in found if not found[name]} == {"none"}, found


# Each is a program, a mutant, a sanitizer and the words of its report.
SANITIZED = {
    "race of neurons": ("kernels_test", NO_BARRIER, sanitize.THREAD, "data race"),
    "race of channels": ("batch_norm_test", NO_BARRIER_OF_CHANNELS, sanitize.THREAD, "data race"),
    "overflow of neurons": ("kernels_test", ALL_LIVE, sanitize.ADDRESS, "heap-buffer-overflow"),
    "overflow of channels": ("batch_norm_test", BEYOND_LAST_ROW, sanitize.ADDRESS, "heap-buffer-overflow"),
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


@pytest.fixture(scope="module", params=["kernels_test", "batch_norm_test"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / request.param
    sanitize.build(request.param, path, ["-O1"])
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_are_right(program, order):
    result = sanitize.run(program, ASGL_EMULATION_ORDER=order)
    assert result.returncode == 0, result.stdout + result.stderr


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
    "no more channels than threads": (
        NORMALISATION, 'adjoint_kernel(real), blocks_for(channels, constant("kBlockThreads"))',
        "adjoint_kernel(real), 1",
    ),
}  # fmt: skip


class Recorder:
    """A launcher that starts nothing."""

    def __init__(self, emulation):
        self.resident_threads = emulation.resident_threads
        self.launches = []

    def launch(self, device, kernel, blocks, threads, params):
        self.launches.append(emulated.Launch(kernel, blocks, threads, bytes(params)))


def make_calls(backend):
    """It calls all launchers, in about as few calls as show the mistakes."""
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
