"""The micro-benchmark: that peers do the same work is checked, and what it writes is what it measured."""

import json
import sys

import pytest
import torch

from benchmarks import clocks, microbench, peers
from benchmarks.microbench import FLOOR, LOOP, PLAIN, REFERENCE, Size

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    """torch.compile takes seconds, and is not what is tested here."""
    monkeypatch.setattr(microbench, "MOST_STEPS_TO_COMPILE", 0)


def installed():
    return peers.installed_peers(CPU)[0]


def test_every_peer_is_there_or_named():
    found, missing = peers.installed_peers(CPU)
    names = [peer.name.split()[0] for peer in found]
    assert sorted(names + missing) == ["Norse", "SpikingJelly", "sinabs", "snnTorch"]


def test_peers_emit_the_same_spikes():
    microbench.check_peers(CPU)


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


def test_loop_draws_its_masks():
    torch.manual_seed(0)
    x_seq = torch.full((1, 10000), 1.25)  # analog elements are 3/4, spikes are 1
    assert abs((peers.asgl_loop(x_seq, torch.ones(()), 0.3) == 0.75).float().mean() - 0.3) < 0.03


@pytest.mark.parametrize("layout", microbench.LAYOUTS)
def test_rows(layout):
    size = Size(3, 4096, "float32", layout=layout)
    found = microbench.measure(size, CPU, repeats=2)
    assert next(iter(found)) == FLOOR
    assert REFERENCE in found
    plain = [name for name in found if name.startswith(PLAIN)]
    if layout == microbench.LAYOUTS[0]:
        assert LOOP in found
        assert [name.removeprefix(PLAIN) for name in plain][-len(installed()) :] == [peer.name for peer in installed()]
    else:
        assert not plain
    for name, each in found.items():
        assert min(each.timing) > 0
        assert each.peak_bytes >= 2 * size.bytes, "the output and the gradient"
        assert (each.saved_bytes is None) == (name == FLOOR)
    microbench.table(size, found)


@pytest.mark.skipif("cpu" not in microbench.fused_backends(CPU), reason="no CPU kernels")
def test_bytes():
    """Backward needs x alone; forward and backward allocate the spikes and the gradient of x."""
    size = Size(4, 2**16, "float32", peers=False)
    found = microbench.measure(size, CPU, repeats=2)["asgl_cuda cpu"]
    assert 1 <= found.saved_bytes / size.bytes < 1.01
    assert 2 <= found.peak_bytes / size.bytes < 2.02


def test_cold_caches_are_filled_before_each_call(monkeypatch):
    monkeypatch.setattr(clocks, "COLD_BYTES", 1000)
    x = torch.rand(2, 3)
    row = clocks.Row("row", lambda sample: sample.x * 2, lambda sample, out: out)
    clock = clocks.CpuClock(row, "both", [clocks.Sample(x, x, x)], cold=True)
    clock._elsewhere.zero_()
    assert clock.seconds() > 0
    assert clock._elsewhere.all()


def test_sweeps():
    sizes = {name: microbench.sweep(name, CPU) for name in ("T", "N", "dtype", "layout")}
    assert len({size.steps for size in sizes["T"]}) == len(sizes["T"])
    assert len({size.neurons for size in sizes["N"]}) == len(sizes["N"])
    assert {size.dtype for size in sizes["dtype"]} == set(microbench.DTYPES)
    assert {size.layout for size in sizes["layout"]} == set(microbench.LAYOUTS)


def test_report_and_figure(tmp_path, monkeypatch, capsys):
    sizes = [Size(2, 64, "float32"), Size(3, 64, "float32"), Size(3, 128, "float32")]
    monkeypatch.setattr(microbench, "CPU_SIZES", sizes)
    monkeypatch.setattr(microbench, "sweep", lambda name, device: sizes)
    json_file, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--device", "cpu", "--repeats", "2", "--json", str(json_file), "--plot", str(figure), "--sweep", "T"]
    monkeypatch.setattr(sys, "argv", ["microbench", *arguments])
    assert microbench.main() == 0
    report = json.loads(json_file.read_text())
    assert [(size["steps"], size["neurons"]) for size in report["sizes"]] == [(2, 64), (3, 64), (3, 128)]
    for size in report["sizes"]:
        assert list(size["seconds"]) == list(size["rows"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "T = 3, N = 128, float32" in capsys.readouterr().out
