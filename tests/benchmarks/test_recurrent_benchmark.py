"""The benchmark of recurrent layers compares layers that do the same work."""

import json
import math
import re
import sys
from functools import partial

import pytest

pytest.importorskip("norse")
pytest.importorskip("sinabs")
pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")

import torch

from benchmarks import readme
from benchmarks.speed import peers, recurrent
from benchmarks.speed.recurrent import ALL_SPIKE, PRODUCTS, WITH_INPUT, Size

CPU = torch.device("cpu")
SIZE = Size(5, 4, 12)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_rows_emit_the_same_spikes():
    recurrent.check_peers(CPU)


@pytest.mark.parametrize("name", ["snntorch", "sinabs", "norse", "spikingjelly"])
def test_other_spikes_are_refused(monkeypatch, name):
    """As of a layer whose weight is another."""
    (key,) = (key for key in peers._RECURRENT_MAKERS if key.lower() == name)
    make = peers._RECURRENT_MAKERS[key]
    monkeypatch.setitem(peers._RECURRENT_MAKERS, key, lambda weight, input_weight: make(-weight, input_weight))
    with pytest.raises(RuntimeError, match=rf"^{key} \d.* emits other spikes than asgl_cuda\.recurrent_lif$"):
        recurrent.check_peers(CPU)


def test_the_loop_has_our_gradients():
    x_seq = torch.randn(*SIZE, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    outputs = (recurrent.layer(x_seq, weight), peers.recurrent_loop(x_seq, weight))
    assert 0.1 < outputs[0].mean() < 0.9
    ours, loops = (torch.autograd.grad(each, (x_seq, weight), torch.ones_like(each)) for each in outputs)
    torch.testing.assert_close(ours, loops)


def test_rows(monkeypatch):
    monkeypatch.setattr(recurrent, "fused_backends", lambda device: ["cpu"])
    found = recurrent.measure(SIZE, CPU, repeats=1, compiled=False)
    assert [re.sub(r" \d[\d.]*", "", name) for name in found["seconds"]] == [
        PRODUCTS, "asgl_cuda cpu", f"asgl_cuda cpu{ALL_SPIKE}", "loop", "snnTorch", "sinabs",
        f"asgl_cuda cpu{WITH_INPUT}", f"SpikingJelly{WITH_INPUT}", f"Norse{WITH_INPUT}",
    ]  # fmt: skip
    assert min(found["seconds"].values()) > 0
    assert found["saved_bytes"].keys() == found["seconds"].keys() - {PRODUCTS}
    # Potentials and spikes, the weight and six parameters of each neuron.
    elements = math.prod(SIZE)
    assert found["saved_bytes"]["asgl_cuda cpu"] == 4 * (2 * elements + 12 * 12 + 6 * 12)
    recurrent.table(SIZE, found)


def test_every_gradient_of_a_row_is_computed():
    """Of the input and of all weights: those of the library are its own parameters."""
    sample = recurrent.sample_of(SIZE, CPU)
    with torch.no_grad():
        s_seq = recurrent.layer(sample.x, recurrent.weights(12, CPU)[0])
    for row in recurrent.rows_of(SIZE, CPU, s_seq, compiled=False):
        gradients = row.backward(sample, row.forward(sample))
        if row.name != PRODUCTS:
            shapes = [list(each.shape) for each in gradients[1:]]
            dense = [[12, 12]] if WITH_INPUT not in row.name else [[12, 12], [12, 12]]
            expected = {"snnTorch": [[12, 12], [12]], "SpikingJelly": [[12, 24]]}.get(row.name.split()[0], dense)
            assert sorted(shapes, reverse=True) == sorted(expected, reverse=True), row.name


def test_products_are_those_of_the_layer():
    sample = recurrent.sample_of(SIZE, CPU)
    weight, s_seq = torch.randn(12, 12), (torch.randn(*SIZE) > 0).float()
    row = recurrent.products_row(weight, s_seq)
    torch.testing.assert_close(row.forward(sample), s_seq[-1] @ weight.T)
    expected = sum(grad.T @ s for grad, s in zip(sample.grad, s_seq, strict=True))
    torch.testing.assert_close(row.backward(sample, row.forward(sample)), expected)
    for part, count in ((row.forward, 5), (partial(row.backward, product=s_seq[0]), 5 + 1)):
        with torch.profiler.profile() as profile:
            part(sample)
        assert [each.name for each in profile.events()].count("aten::mm") == count


def test_all_neurons_spike_in_the_row_that_says_so():
    sample = recurrent.sample_of(SIZE, CPU)
    rows = {row.name: row for row in recurrent.rows_of(SIZE, CPU, sample.x, compiled=False)}
    ours = "asgl_cuda cpu"
    assert rows[f"{ours}{ALL_SPIKE}"].forward(sample).all()
    assert 0.02 < rows[ours].forward(sample).mean() < 0.2


def test_main(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    file = tmp_path / "found.json"
    arguments = [
        "--device",
        "cpu",
        "--sizes",
        "3,2,5",
        "2,3,4",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json",
        str(file),
    ]
    monkeypatch.setattr(sys, "argv", ["recurrent", *arguments])
    threads = torch.get_num_threads()
    try:
        recurrent.main()
    finally:
        torch.set_num_threads(threads)
    report = json.loads(file.read_text())
    sizes = [(each["steps"], each["batch"], each["neurons"], each["threads"]) for each in report["sizes"]]
    assert sizes == [(3, 2, 5, 1), (2, 3, 4, 1)]
    assert capsys.readouterr().out.count("compiled step") == 2
    products, faster = readme.recurrent_ratios(report)
    assert (len(products), len(faster)) == (2, 8)
    seconds = report["sizes"][0]["seconds"]
    (sinabs,) = (time for name, time in seconds.items() if name.startswith("sinabs"))
    (norse,) = (time for name, time in seconds.items() if name.startswith("Norse"))
    assert {sinabs / seconds["asgl_cuda cpu"], norse / seconds[f"asgl_cuda cpu{WITH_INPUT}"]} <= {*faster}
    assert f"{1e3 * norse:.{2 if 1e3 * norse < 10 else 1}f}" in readme.recurrent(report)
