"""The micro-benchmark refuses rows that do other work, and counts bytes and sizes correctly."""

import json
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import asgl_cuda
from benchmarks.speed import clocks, microbench, peers, sizes
from benchmarks.speed.microbench import (
    ADAPTIVE,
    COMPILED_STEP,
    COPY,
    FLOOR,
    LOOP,
    PAIR,
    PLAIN,
    PLAIN_LOOP,
    REFERENCE,
    YARDSTICKS,
)
from benchmarks.speed.sizes import Block, Size
from tools.gpu_check.bars import COPY_ACCESSES

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif("cpu" not in microbench.fused_backends(CPU), reason="no CPU kernels")


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    """torch.compile takes seconds."""
    monkeypatch.setattr(microbench, "MOST_STEPS_TO_COMPILE", 0)


def test_every_peer_is_installed_or_named():
    found, missing = peers.installed_peers(CPU)
    names = [peer.name.split()[0] for peer in found]
    assert sorted(names + missing) == ["Norse", "SpikingJelly", "sinabs", "snnTorch"]


def test_rows_emit_the_same_spikes():
    microbench.check_peers(CPU)
    microbench.check_adaptive_peers(CPU)
    microbench.check_blocks(CPU)


def test_another_neuron_is_refused(monkeypatch):
    def fire_always(x_seq):
        return torch.ones_like(x_seq)

    monkeypatch.setattr(microbench, "installed_peers", lambda device: ([peers.Peer("wrong 1.0", fire_always, {})], []))
    with pytest.raises(RuntimeError, match=r"wrong 1\.0 emits other spikes than asgl_cuda\.lif, at \d+ elements"):
        microbench.check_peers(CPU)


def test_another_loop_is_refused(monkeypatch):
    monkeypatch.setattr(microbench, "asgl_loop", lambda x, width, p, mask: peers.asgl_loop(x, width, p, ~mask))
    with pytest.raises(RuntimeError, match=f"{LOOP} emits other spikes"):
        microbench.check_peers(CPU)


def test_another_adaptation_is_refused(monkeypatch):
    monkeypatch.setattr(microbench, "adaptive_loop", partial(peers.adaptive_loop, adapt_spike=0.3))
    monkeypatch.setattr(microbench, "ADAPTIVE", {"ALIF: ": {"adapt_decay": 0.9, "to_threshold": True}})
    with pytest.raises(RuntimeError, match=r"ALIF: loop emits other spikes than asgl_cuda\.adaptive_lif"):
        microbench.check_adaptive_peers(CPU)


def test_loop_draws_masks():
    torch.manual_seed(0)
    x_seq = torch.full((1, 10000), 1.25)  # analog elements are 3/4, spikes are 1
    assert abs((peers.asgl_loop(x_seq, torch.ones(()), 0.3) == 0.75).float().mean() - 0.3) < 0.03


@pytest.mark.parametrize("layout", sizes.LAYOUTS)
def test_rows(layout):
    size = Size(3, 4096, "float32", layout=layout)
    found = microbench.measure(size, CPU, repeats=2)
    assert next(iter(found)) == FLOOR
    assert REFERENCE in found
    plain = [name for name in found if name.startswith(PLAIN)]
    if layout == sizes.LAYOUTS[0]:
        assert LOOP in found
        expected = [peer.name for peer in peers.installed_peers(CPU)[0]]
        assert [name.removeprefix(PLAIN) for name in plain[len(plain) - len(expected) :]] == expected
    else:
        assert not plain
    for name, each in found.items():
        assert min(each.timing) > 0
        assert each.peak_bytes >= 2 * size.bytes, "the output and the gradient"
        assert (each.saved_bytes is None) == (name == FLOOR)
    microbench.table(size, found)


def test_one_peer_is_compiled(monkeypatch):
    monkeypatch.setattr(microbench, "MOST_STEPS_TO_COMPILE", 16)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    peer = peers.Peer("snnTorch 1.0", lambda x_seq: x_seq, {})
    monkeypatch.setattr(microbench, "installed_peers", lambda device: ([peer, peer._replace(name="other 1.0")], []))
    rows = [row.name for row in microbench.rows_of(Size(4, 64, "float32"), CPU)]
    assert [name for name in rows if "1.0" in name] == [
        f"{PLAIN}snnTorch 1.0", f"{PLAIN}snnTorch 1.0, torch.compile", f"{PLAIN}other 1.0",
    ]  # fmt: skip
    assert compiled[1:] == [peer.spikes]
    assert not any("1.0, " in row.name for row in microbench.rows_of(Size(32, 64, "float32"), CPU))


@needs_kernels
def test_bytes():
    """Kept: x alone; allocated: spikes and the gradient of x."""
    size = Size(4, 2**16, "float32", peers=False)
    found = microbench.measure(size, CPU, repeats=2)["asgl_cuda cpu"]
    assert 1 <= found.saved_bytes / size.bytes < 1.01
    assert 2 <= found.peak_bytes / size.bytes < 2.02


@pytest.mark.parametrize(
    ("module", "layer", "refused"),
    [
        pytest.param(asgl_cuda, "BatchNormLIF", "asgl_cuda cpu", marks=needs_kernels),
        pytest.param(microbench.nn, "BatchNorm2d", PAIR, id="pair"),
    ],
)
def test_another_normalisation_is_refused(monkeypatch, module, layer, refused):
    monkeypatch.setattr(module, layer, partial(getattr(module, layer), eps=1e-3))
    with pytest.raises(RuntimeError, match=rf"^{refused}.* emits other spikes than asgl_cuda\.batch_norm_lif, at \d+"):
        microbench.check_blocks(CPU)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["time first", "channels_last"])
def test_block_rows(layout, residual):
    block = Block((3, 2, 4, 6, 5), "float32", layout, residual=residual)
    assert block.random(CPU).shape == block.shape
    found = microbench.measure(block, CPU, repeats=2)
    ours = [f"asgl_cuda {backend}" for backend in microbench.fused_backends(CPU)]
    assert list(found) == [*YARDSTICKS, *ours, *(f"{PAIR}{name}" for name in ours), f"{PAIR}{REFERENCE}"]
    for name, each in found.items():
        assert min(each.timing) > 0
        assert (each.saved_bytes is None) == (name in YARDSTICKS)
    faster = found[f"{PAIR}{REFERENCE}"].timing.both / found[FLOOR].timing.both
    assert f"{faster:.1f}" in microbench.table(block, found).splitlines()[2].split()


def test_adaptive_rows(monkeypatch):
    """Both forms in every implementation; the libraries' own only in the threshold; ratios to the same row of LIF."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    size = Size(20, 512, "float32", adaptive=True)
    found = microbench.measure(size, CPU, repeats=2)
    assert len(compiled) == len(ADAPTIVE)
    ours = [*(f"asgl_cuda {backend}" for backend in microbench.fused_backends(CPU)), REFERENCE]
    own = [peer.name for peer in peers.adaptive_peers(CPU)]
    kinds = {PLAIN: ours} | {prefix: [*ours, PLAIN_LOOP, COMPILED_STEP] for prefix in ADAPTIVE}
    kinds["ALIF: "] += own
    assert list(found) == [FLOOR, *(f"{prefix}{name}" for prefix, names in kinds.items() for name in names)]
    lines = {line[:24].strip(): line.split() for line in microbench.table(size, found).splitlines()[2:]}
    for prefix in ADAPTIVE:
        ratio = found[f"{prefix}{REFERENCE}"].timing.both / found[f"{PLAIN}{REFERENCE}"].timing.both
        assert lines[f"{prefix}{REFERENCE}"][-5:-3] == [f"{ratio:.2f}", "1.0"]


def test_adaptive_rows_have_the_gradients_of_the_reference():
    """Of loops and ours; the libraries have other surrogates."""
    size = Size(20, 512, "float32", compiled=False, peers=False, adaptive=True)
    (sample,) = sizes.samples(size, CPU)
    grads = {row.name: row.backward(sample, row.forward(sample)) for row in microbench.rows_of(size, CPU)}
    for prefix in ADAPTIVE:
        expected, *_ = grads[f"{prefix}{REFERENCE}"]
        for name, (found, *_) in grads.items():
            if name.startswith(prefix):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


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
    """The floor moves as much as the fused block, 36 or 44 bytes a float32 element; the GPU's bar counts copies."""
    block = Block((2, 8, 8, 16, 16), dtype, residual=residual)
    (sample,) = sizes.samples(block, CPU)
    moved = {}
    for row in microbench.rows_of(block, CPU):
        if row.name in YARDSTICKS:
            with Traffic() as traffic:
                row.backward(sample, row.forward(sample))
            moved[row.name] = traffic.bytes / block.bytes
    assert block.accesses == (11 if residual else 9)
    assert moved == {FLOOR: pytest.approx(block.accesses, abs=0.01), COPY: COPY_ACCESSES}


@needs_kernels
@pytest.mark.parametrize(("residual", "kept"), [(False, 4), (True, 8)])
def test_bytes_of_a_block(residual, kept):
    """The fused layer saves its inputs for backward; the pair, x and the tensor before the neurons."""
    block = Block((4, 8, 16, 16, 16), "float32", residual=residual)
    found = microbench.measure(block, CPU, repeats=2)
    assert kept <= found["asgl_cuda cpu"].saved_bytes / block.elements < kept + 0.3
    assert 8 <= found[f"{PAIR}asgl_cuda cpu"].saved_bytes / block.elements < 8.3
    assert found["asgl_cuda cpu"].peak_bytes < found[f"{PAIR}asgl_cuda cpu"].peak_bytes


@pytest.mark.parametrize("learned", sizes.LEARNED)
def test_learned_parameters_get_gradients(learned):
    size = Size(3, 4096, "float32", compiled=False, peers=False, learned=learned)
    sample = sizes.samples(size, CPU)[0]
    assert sample.x.numel() == size.elements
    for row in microbench.rows_of(size, CPU):
        if row.name != FLOOR:
            grads = row.backward(sample, row.forward(sample))
            assert [grad.shape for grad in grads[1:]] == [value.shape for value in size.parameters(CPU).values()]


def test_sweeps():
    """On a GPU the judged cases but residuals are measured again beside torch.compile; on a CPU all sizes are small."""
    found = {name: sizes.sweep(name, torch.device("cuda")) for name in sizes.FOR_GPUS}
    judged = [size._replace(compiled=True) for size in found["judged"]]
    assert judged == [
        *(size._replace(peers=False) if isinstance(size, Size) else size for size in found["compiled"][:8]),
        *sizes.GPU_RESIDUAL_BLOCKS,
    ]
    assert len(set(found["gpu"])) == len(found["gpu"])
    assert all(size.elements <= 2**15 for name in found for size in sizes.sweep(name, CPU))
    for name, values in (("dtype", sizes.DTYPES), ("layout", sizes.LAYOUTS), ("learned", sizes.LEARNED)):
        assert {getattr(size, name) for size in sizes.sweep(name, CPU)} == set(values)


def test_cold_caches_are_filled_before_each_call(monkeypatch):
    monkeypatch.setattr(clocks, "COLD_BYTES", 1000)
    x = torch.rand(2, 3)
    row = clocks.Row("row", lambda sample: sample.x * 2, lambda sample, out: out)
    clock = clocks.CpuClock(row, "both", [clocks.Sample(x, x, x)], cold=True)
    clock._elsewhere.zero_()
    assert clock.seconds() > 0
    assert clock._elsewhere.all()


def test_report_and_figure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    few = [Size(2, 64, "float32"), Size(3, 64, "float32"), Size(3, 128, "float32"), Block((2, 3, 4, 5, 6), "float32")]
    monkeypatch.setattr(microbench, "sweep", lambda name, device: few)
    json_file, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--device", "cpu", "--repeats", "2", "--json", str(json_file), "--plot", str(figure), "--sweep", "T"]
    monkeypatch.setattr(sys, "argv", ["microbench", *arguments])
    assert microbench.main() == 0
    report = json.loads(json_file.read_text())
    assert [(size["steps"], size["neurons"]) for size in report["sizes"]] == [(2, 64), (3, 64), (3, 128)]
    assert [block["shape"] for block in report["blocks"]] == [[2, 3, 4, 5, 6]]
    for size in report["sizes"] + report["blocks"]:
        assert list(size["seconds"]) == list(size["rows"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "T = 3, N = 128, float32" in printed
    assert "block [2, 3, 4, 5, 6], float32" in printed


@pytest.mark.parametrize("arguments", [[], ["--fresh"]])
def test_memory_is_kept_unless_fresh(tmp_path, monkeypatch, arguments):
    """Blocks are measured by default."""
    monkeypatch.setattr(sizes, "CPU_SIZES", [Size(2, 64, "float32", peers=False)])
    monkeypatch.setattr(sizes, "CPU_BLOCKS", [Block((2, 3, 4, 5, 6), "bfloat16", "channels_last")])
    asked = []
    monkeypatch.setattr(microbench, "keep_memory", lambda: asked.append(True) or True)
    file = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["microbench", "--device", "cpu", "--repeats", "2", "--json", str(file), *arguments]
    )
    assert microbench.main() == 0
    report = json.loads(file.read_text())
    assert report["memory_kept"] == bool(asked) == (not arguments)
    assert [(block["dtype"], block["layout"]) for block in report["blocks"]] == [("bfloat16", "channels_last")]
