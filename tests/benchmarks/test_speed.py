"""Measurements of layers and training steps: rows do the same work, bytes are right, and reports have their schema."""

import json
import math
import re
import sys
from functools import partial

import pytest

pytest.importorskip("norse")
pytest.importorskip("rich")
pytest.importorskip("sinabs")
pytest.importorskip("sklearn")
pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly.activation_based.layer")  # before a test replaces the base of one of its classes

import torch
from schema import paths
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import asgl_cuda
from asgl_cuda import OverTime
from benchmarks import readme
from benchmarks.common import in_words
from benchmarks.speed import __main__ as program
from benchmarks.speed import clocks, convert, end_to_end, host, memory, microbench, networks, peers, recurrent, sizes
from benchmarks.speed.clocks import Row, Sample, allocated_bytes
from benchmarks.speed.end_to_end import FUSED_BLOCK, Variant, training_of
from benchmarks.speed.microbench import COPY, FLOOR, LOOP, PAIR, PLAIN, REFERENCE, YARDSTICKS
from benchmarks.speed.networks import Network, Training
from benchmarks.speed.recurrent import ALL_SPIKE, PRODUCTS, WITH_INPUT
from benchmarks.speed.sizes import Block, Size

CPU = torch.device("cpu")
MEGABYTE = 2**20
needs_kernels = pytest.mark.skipif("cpu" not in microbench.fused_backends(CPU), reason="no CPU kernels")


@pytest.fixture(autouse=True)
def one_backend(monkeypatch):
    """Emulated backends take seconds for what the CPU kernels do in milliseconds."""
    for module in (end_to_end, host, microbench, recurrent):
        monkeypatch.setattr(module, "fused_backends", lambda device: ["cpu"])


@pytest.fixture(autouse=True)
def compiled(monkeypatch) -> list:
    """What torch.compile would compile, for seconds."""
    found = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: found.append(function) or function)
    return found


# ---- the same work ----


def test_all_rows_emit_the_same_spikes():
    microbench.check_peers(CPU)
    microbench.check_blocks(CPU)
    recurrent.check_peers(CPU)


def another_peer(kind, name, make):
    return lambda patch: patch.setitem(peers.PEERS[kind], name, make)


def another_option(module, name, **options):
    return lambda patch: patch.setattr(module, name, partial(getattr(module, name), **options))


def another_mask(patch):
    patch.setattr(microbench, "asgl_loop", lambda x, width, p, mask: peers.asgl_loop(x, width, p, ~mask))


def another_conversion(patch):
    patch.setattr(convert, "cases", lambda: [next(convert.spikingjelly())._replace(converted=lambda _: nn.Identity())])


def other_noise(patch):
    patch.setattr(asgl_cuda, "recompute_spikes", lambda model: setattr(model[0][1], "analog_prob", 0.9) or model)


def another_fusion(patch):
    fuse = asgl_cuda.fuse

    def fuse_wrongly(model, example, inplace):
        model[1].layer.eps = 2e-5
        return fuse(model, example, inplace=inplace)

    patch.setattr(asgl_cuda, "fuse", fuse_wrongly)


def block(neuron):
    first = OverTime(nn.Conv2d(1, 8, 3)), OverTime(nn.BatchNorm2d(8)), neuron()
    return nn.Sequential(*first, OverTime(nn.Flatten()), OverTime(nn.Linear(8 * 6 * 6, networks.CLASSES)))


BLOCK = Network(block, (2, 5, 1, 8, 8))


def measured(module):
    return lambda: list(module.measurements({}, CPU, repeats=1))


REFUSED = {
    "peer": (
        another_peer("LIF", "snnTorch", lambda like: peers.Peer(torch.ones_like, {})),
        partial(microbench.check_peers, CPU),
        r"^snnTorch \d.* emits other spikes than asgl_cuda\.lif, at \d+ elements$",
    ),
    "loop": (another_mask, partial(microbench.check_peers, CPU), f"^{LOOP} emits other spikes than asgl_cuda"),
    "adaptation": (
        another_option(microbench, "adaptive_step", adapt_potential=0.3), partial(microbench.check_peers, CPU),
        r"^ALIF: loop emits other spikes than asgl_cuda\.adaptive_lif",
    ),
    "block": (
        another_option(asgl_cuda, "BatchNormLIF", eps=1e-3), partial(microbench.check_blocks, CPU),
        r"^asgl_cuda cpu emits other spikes than asgl_cuda\.batch_norm_lif",
    ),
    "pair": (
        another_option(nn, "BatchNorm2d", eps=1e-3), partial(microbench.check_blocks, CPU),
        f"^{PAIR}.* emits other spikes than asgl_cuda",
    ),
    "recurrent peer": (
        another_peer("recurrent", "Norse", lambda weight, given: peers.norse_recurrent(-weight, given)),
        partial(recurrent.check_peers, CPU),
        r"^Norse \d.* emits other spikes than asgl_cuda\.recurrent_lif$",
    ),
    "conversion": (another_conversion, measured(convert), "^spikingjelly IFNode emits other spikes when it is conv"),
    "fused block": (
        another_fusion, lambda: end_to_end.check_losses(BLOCK, CPU),
        r"^asgl_cuda .*, fused block: the losses must be \[.*\], as without fusing, got \[.*\]$",
    ),
    "recomputed": (other_noise, measured(memory), "^VGG, T = 2: asgl_cuda, recompute_spikes has other gradients$"),
}  # fmt: skip


FEW = "MLP", "convolutional", "speech", "recurrent speech"


@pytest.fixture
def tiny(monkeypatch):
    """Sizes of layers and networks that take milliseconds."""
    few = [Size(2, 64, "float32"), Size(3, 64, "bfloat16", peers=False)]
    for module, values in {
        convert: {"STEPS": (2, 4), "ELEMENTS": 64},
        recurrent: {"SIZES": (recurrent.Size(3, 2, 5),), "THREADS": (torch.get_num_threads(),)},
        memory: {
            "LENGTHS": (2,), "BATCH": 1, "find_spec": lambda name: None,
            **{name: getattr(memory, name)._replace(input_shape=(2, 1, size)) for name, size in
               (("MLP", 784), ("SPEECH", 700))},
        },
        end_to_end: {
            "NETWORKS": {name: each._replace(input_shape=(2 if "speech" in name else 1, 2, *each.input_shape[2:]))
                         for name, each in networks.NETWORKS.items() if name in FEW},
            "TRAINED_STEPS": 1, "MOST_STEPS_TO_COMPILE": 1, "LONG": Size(3, 64, "float32"), "LONG_REPEATS": 1,
        },
        host: {"CALLS": 2},
        sizes: {"CPU_SIZES": few, "CPU_BLOCKS": [Block((2, 3, 4, 5, 6), "float32", "channels_last", residual=True)]},
    }.items():  # fmt: skip
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@needs_kernels
@pytest.mark.parametrize(("change", "call", "words"), REFUSED.values(), ids=REFUSED)
def test_other_work_is_refused(tiny, monkeypatch, change, call, words):
    change(monkeypatch)
    with pytest.raises(RuntimeError, match=words):
        call()


def test_loop_draws_masks():
    x_seq = torch.full((1, 10000), 1.25)  # analog elements are 3/4, spikes are 1
    assert abs((peers.asgl_loop(x_seq, torch.ones(()), 0.3) == 0.75).float().mean() - 0.3) < 0.03


def test_loops_have_our_gradients():
    x_seq, weight = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((20, 4, 12), (12, 12)))
    recurrent = asgl_cuda.recurrent_lif(x_seq, weight, decay=0.5, surrogate="rectangle")
    pairs = [(recurrent, {"step": peers.recurrent_step, "weight": weight})]
    for options in (peers.ADLIF, peers.ALIF):
        ours = asgl_cuda.adaptive_lif(x_seq + 0 * weight.sum(), decay=0.5, surrogate="rectangle", **options)
        pairs.append((ours, {"step": peers.adaptive_step, **options}))
    for ours, options in pairs:
        assert 0.05 < ours.mean() < 0.9
        theirs = peers.loop(x_seq, **options) + 0 * weight.sum()
        found, expected = (torch.autograd.grad(each, (x_seq, weight), torch.ones_like(each)) for each in (ours, theirs))
        torch.testing.assert_close(found, expected)


# ---- rows and bytes ----


def without_versions(names):
    return [re.sub(r" \d[\d.]*", "", name) for name in names]


OURS = "asgl_cuda cpu"
LIBRARIES = [
    name for library in ("loop", "SpikingJelly", "snnTorch", "Norse", "sinabs")
    for name in (library, f"{library}, {microbench.COMPILED}")
]  # fmt: skip
LOOPS = [OURS, REFERENCE, "loop", "compiled step"]
ROWS = {
    Size(3, 64, "float32"): [
        FLOOR, OURS, REFERENCE, microbench.COMPILED, LOOP,
        *(f"{PLAIN}{name}" for name in (OURS, f"{OURS}, sigmoid", REFERENCE, *LIBRARIES)),
        f"I-LIF: {OURS}", f"I-LIF: {REFERENCE}",
    ],
    Size(17, 64, "float32", peers=False): [FLOOR, OURS, REFERENCE],
    Size(20, 64, "float32", adaptive=True): [
        FLOOR, f"{PLAIN}{OURS}", f"{PLAIN}{REFERENCE}", *(f"adLIF: {name}" for name in LOOPS),
        *(f"ALIF: {name}" for name in (*LOOPS, "Norse", "sinabs")),
    ],
    **{Block((3, 2, 4, 6, 5), "float32", layout, compiled=False, residual=residual):
       [*YARDSTICKS, OURS, f"{PAIR}{OURS}", f"{PAIR}{REFERENCE}"]
       for layout, residual in zip(sizes.LAYOUTS, (False, True), strict=True)},
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize(("size", "expected"), ROWS.items(), ids=map(str, ROWS))
def test_rows(monkeypatch, size, expected):
    """Every implementation once, with positive times; the learned width gets a gradient."""
    found = microbench.measure(size, CPU, repeats=2)
    assert without_versions(found["seconds"]) == expected
    assert list(found["rows"]) == list(found["seconds"])
    for name, row in found["rows"].items():
        assert min(found["seconds"][name].values()) > 0
        assert (row["saved_bytes"] is None) == (name in YARDSTICKS)
    if isinstance(size, Size) and not size.adaptive:
        (sample,) = sizes.samples(size, CPU)
        row = next(row for row in microbench.rows_of(size, CPU) if row.name == OURS)
        assert [grad.shape for grad in row.call("both", sample)] == [(size.steps, size.neurons), ()]


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor))
        return result


@pytest.mark.parametrize(("dtype", "residual"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_bytes_of_block_yardsticks(dtype, residual):
    """The floor moves as much as the fused block, 36 or 44 bytes a float32 element; a copy 16."""
    block = Block((2, 8, 8, 16, 16), dtype, residual=residual)
    (sample,) = sizes.samples(block, CPU)
    moved = {}
    for row in microbench.rows_of(block, CPU):
        if row.name in YARDSTICKS:
            with Traffic() as traffic:
                row.call("both", sample)
            moved[row.name] = traffic.bytes / block.bytes
    assert block.accesses == (11 if residual else 9)
    assert moved == {FLOOR: pytest.approx(block.accesses, abs=0.01), COPY: 4}


def test_the_implementation_that_spikingjelly_chose(monkeypatch, capsys):
    """Is part of a report from a GPU: on a machine without nvcc it may be another one."""
    from spikingjelly._ops import lif

    monkeypatch.setattr(lif._selection, "diagnostics", lambda device, execution: {"implementation": "triton"})
    monkeypatch.setattr(peers, "machine", lambda device: {"gpu": "a card", "torch": "2.13", "threads": 1})
    monkeypatch.setattr(peers, "installed_peers", lambda *_: {})
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert peers.introduced(torch.device("cuda"), "medians")["spikingjelly_implementation"] == "triton"


@pytest.mark.parametrize("queued", [True, False])
def test_a_gpus_time_with_and_without_the_hosts(monkeypatch, queued):
    """Behind a wait the host runs ahead; without, its time counts where it binds."""
    done = []
    event = type("Event", (), {"__init__": lambda self, **_: None, "synchronize": lambda self: None})
    event.record, event.elapsed_time = lambda self: done.append("event"), lambda self, end: 6.0
    for name, value in {"synchronize": lambda: None, "Event": event, "_sleep": lambda _: done.append("wait")}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    row = Row("a call", lambda sample: done.append("call"), lambda sample, out: None)
    clock = clocks.GpuClock(row, "both", [Sample(torch.ones(2), None, None)], queued)
    calls = clock._count
    done.clear()
    assert clock.seconds() == pytest.approx(6e-3 / calls)
    assert done == [*["wait"] * queued, "event", *["call"] * calls, "event"]


# ---- recurrent rows ----


@pytest.fixture
def small_recurrent():
    torch.manual_seed(0)
    size = recurrent.Size(5, 4, 12)
    return size, recurrent.sample_at(size, CPU)


@needs_kernels
def test_recurrent_rows(small_recurrent):
    """Every row with gradients of the input and of all its weights; in one all neurons spike."""
    size, sample = small_recurrent
    rows = {row.name: row for row in recurrent.rows_of(size, CPU, sample.x)}
    assert without_versions(rows) == [
        PRODUCTS, OURS, f"{OURS}{ALL_SPIKE}", "loop", "compiled step", "snnTorch", "sinabs", f"{OURS}{WITH_INPUT}",
        f"SpikingJelly{WITH_INPUT}", f"Norse{WITH_INPUT}",
    ]  # fmt: skip
    for name, row in rows.items():
        if name != PRODUCTS:
            dense = [(12, 12)] * (2 if WITH_INPUT in name else 1)
            expected = {"snnTorch": [(12, 12), (12,)], "SpikingJelly": [(12, 24)]}.get(name.split()[0], dense)
            assert sorted(map(tuple, (each.shape for each in row.call("both", sample)[1:]))) == sorted(expected), name
    assert rows[f"{OURS}{ALL_SPIKE}"].forward(sample).all()
    assert 0.02 < rows[OURS].forward(sample).mean() < 0.2
    # Potentials and spikes, the weight and nine parameters of each neuron.
    saved = recurrent.measure(size, CPU, repeats=1)["saved_bytes"]
    assert saved[OURS] == 4 * (2 * math.prod(size) + 12 * 12 + 9 * 12)
    assert PRODUCTS not in saved


def test_products_are_those_of_the_layer(small_recurrent):
    _, sample = small_recurrent
    weight, s_seq = torch.randn(12, 12), (torch.randn(5, 4, 12) > 0).float()
    row = recurrent.products_row(weight, s_seq)
    torch.testing.assert_close(row.forward(sample), s_seq[-1] @ weight.T)
    expected = sum(grad.T @ s for grad, s in zip(sample.grad, s_seq, strict=True))
    torch.testing.assert_close(row.backward(sample, row.forward(sample)), expected)


# ---- training steps ----


def test_allocated_bytes():
    """Older gradients, freed in a step, are not counted as less."""

    def call():
        torch.ones(8 * MEGABYTE, dtype=torch.uint8)
        return torch.ones(2 * MEGABYTE, dtype=torch.uint8)

    peak, left = allocated_bytes(call, CPU)
    assert 2 * MEGABYTE <= left < 3 * MEGABYTE
    assert left <= peak < 11 * MEGABYTE
    training = Training(nn.Sequential(nn.Linear(3, 2**18), nn.Linear(2**18, networks.CLASSES)), (1, 1, 3), CPU)
    for _ in range(2):
        training.step()
        assert training.allocated_bytes()["peak_bytes"] > 4 * 2**18 * (3 + networks.CLASSES)


@needs_kernels
def test_fused_blocks_train_as_unfused_ones():
    names = end_to_end.check_losses(BLOCK, CPU)
    assert without_versions(names) == [f"{OURS}{FUSED_BLOCK}", f"LIF: SpikingJelly, converted cpu{FUSED_BLOCK}"]
    assert [each.name for each in end_to_end.variants(BLOCK, CPU) if each.fused] == names
    assert not [each for each in end_to_end.variants(networks.MLP, CPU) if each.fused]


def test_a_network_without_fusion_is_refused():
    with pytest.raises(RuntimeError, match=r"^not all of the network is fused:\n0 replaced, 1 left"):
        training_of(BLOCK, Variant("no neurons", nn.Identity, fused=True), CPU)


# ---- programs ----


def run_program(monkeypatch, tmp_path, main, *arguments):
    file = tmp_path / "found.json"
    words = ["program", *arguments, "--device", "cpu", "--repeats", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    return json.loads(file.read_text())


SMALL = {name: each._replace(input_shape=(3, 2, *each.input_shape[2:])) for name, each in networks.NETWORKS.items()}


@needs_kernels
@pytest.mark.parametrize("name", SMALL)
def test_variants_compute_the_same_network(name):
    """Evaluations have no memory of earlier calls; all of an ordinary neuron have the same scores, and learn."""
    scores = {}
    for variant in end_to_end.variants(SMALL[name], CPU):
        training = training_of(SMALL[name], variant, CPU)
        if variant.spikes:
            asgl_cuda.to_spike_layers(training.model, training.x_seq)
        training.model.eval()
        scores[variant.name] = training.evaluate()
        assert torch.equal(training.evaluate(), scores[variant.name]), variant.name
        if variant.takes_steps:
            torch.testing.assert_close(
                training.stream(SMALL[name].input_shape[0]), scores[variant.name][:1], rtol=1e-3, atol=1e-3
            )
        first = training.step()
        learned = [each for each in training.model.parameters() if each.requires_grad]  # sinabs has frozen thresholds
        assert all(each.grad is not None and each.grad.isfinite().all() for each in learned)
        assert [training.step() for _ in range(4)][-1] < first, variant.name
    plain = {name: each for name, each in scores.items() if name.startswith(PLAIN)}
    other = {each for each in plain if "recurrent" in name and "snnTorch" in each}
    assert len(plain) - len(other) >= (6 if "recurrent" in name else 9)
    expected = plain.pop(f"{PLAIN}{OURS}")
    for variant in plain.keys() - other:
        torch.testing.assert_close(plain[variant], expected, rtol=1e-3, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("name", program.PROGRAMS)
def test_programs(tiny, monkeypatch, tmp_path, capsys, name):
    """A report has the schema of the committed one, whose section is printed."""
    report = run_program(monkeypatch, tmp_path, program.main, name)
    expected = set(paths(readme.read_report(name)))
    assert set(paths(report)) - {".machine.load"} <= expected  # which older files lack
    printed = capsys.readouterr().out
    assert readme.text_of(readme.SECTIONS[name], report) in printed
    if name == "convert":
        assert len(report["sizes"]) == 2
        assert len({(each["library"], each["layer"]) for each in report["sizes"][0]["layers"]}) == 20
    if name == "memory":
        for each in report["networks"].values():
            kept, recomputed = each[memory.KEPT], each[memory.RECOMPUTED]
            assert recomputed["kept_bytes"] < 0.75 * kept["kept_bytes"]


@needs_kernels
def test_microbench(tiny, monkeypatch, tmp_path, capsys):
    """Blocks are measured by default."""
    report = run_program(monkeypatch, tmp_path, microbench.main)
    assert set(paths(report)) - {".machine.load"} <= set(paths(readme.read_report("microbench")))
    assert [size["dtype"] for size in report["sizes"]] == ["float32", "bfloat16"]
    assert report["call_microseconds"][host.IN_PYTHON] > 0
    assert host.RECORDED not in asgl_cuda.backends.BACKENDS
    printed = capsys.readouterr().out
    assert in_words(report["machine"]) in printed
    assert "T = 2, N = 64, float32" in printed
    assert "block [2, 3, 4, 5, 6], float32, channels_last, residual" in printed
    for name in ("microbench", "block"):
        assert "| --: |" in readme.text_of(readme.SECTIONS[name], report)


def other_decay(patch):
    jelly = peers.spikingjelly_node
    patch.setattr(peers, "spikingjelly_node", lambda *mode: setattr(node := jelly(*mode), "tau", 1.7) or node)


def no_learning(patch):
    patch.setattr(torch.optim.SGD, "step", lambda self: None)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_decay, r"^LIF: SpikingJelly \d.*: the first loss must be"),
        (no_learning, "^asgl_cuda cpu: the loss must fall in training"),
    ],
)
def test_networks_that_differ_are_refused(tiny, monkeypatch, change, words):
    monkeypatch.setattr(end_to_end, "check_peers", lambda device: None)
    change(monkeypatch)
    with pytest.raises(RuntimeError, match=words):
        end_to_end.measure(end_to_end.NETWORKS["MLP"]._replace(input_shape=(6, 8, 784)), CPU, repeats=1)


@needs_kernels
def test_networks_are_measured_one_by_one(tiny, monkeypatch, tmp_path):
    """The second command adds to the file of the first, unless that is of another day."""
    run = partial(run_program, monkeypatch, tmp_path, program.main, "end_to_end", "--networks")
    assert list(run("speech")["networks"]) == ["speech"]
    report = run("MLP", end_to_end.LONG_LOOP)
    assert list(report["networks"]) == ["MLP", "speech"]
    assert report["long_loop"]["layer"].startswith("SpikingJelly")
    (tmp_path / "found.json").write_text(json.dumps({**report, "machine": {**report["machine"], "date": "2026-01-01"}}))
    with pytest.raises(SystemExit):
        run("MLP")


def test_machine_in_words():
    about = {"processor": "AMD EPYC", "instruction_set": "AVX2", "threads": 2, "torch": "2.13.0"}
    assert in_words(about) == "AMD EPYC with AVX2, 2 threads, torch 2.13.0"
    assert in_words({**about, "instruction_set": None, "load": 2.5}) == "AMD EPYC, 2 threads, torch 2.13.0"
    assert in_words({**about, "load": 9.5}) == "AMD EPYC with AVX2, 2 threads shared with other work, torch 2.13.0"
    assert in_words({**about, "gpu": "NVIDIA H100"}) == "NVIDIA H100, torch 2.13.0"


def test_time_runs_out(tiny, monkeypatch, tmp_path, capsys):
    run_program(monkeypatch, tmp_path, program.main, "recurrent", "--seconds", "0")
    assert "not measured for want of time" in capsys.readouterr().out
