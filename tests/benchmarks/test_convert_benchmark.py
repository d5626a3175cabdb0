"""The benchmark of conversions compares layers that do the same work."""

import json
import sys

import pytest

pytest.importorskip("norse")
pytest.importorskip("sinabs")
pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")

import torch
from torch import nn

from benchmarks.speed import convert
from benchmarks.speed.clocks import Sample


def sample():
    torch.manual_seed(0)
    x = torch.randn(3, 500)
    return Sample(x, x.clone().requires_grad_(), torch.randn_like(x))


def test_every_layer_is_converted_and_timed():
    names = []
    for case in convert.cases():
        found = convert.measure(case, sample(), repeats=1)
        assert min(found["seconds"].values()) > 0
        names.append((case.library, found["layer"]))
    assert len(names) == len(set(names)) == 20


def test_other_spikes_are_refused():
    case = next(convert.cases())
    with pytest.raises(RuntimeError, match="spikingjelly IFNode emits other spikes when it is converted"):
        convert.measure(case._replace(converted=lambda layer: nn.Identity()), sample(), repeats=1)


def test_main(tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--steps", "2", "4", "--elements", "64", "--repeats", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    convert.main()
    report = json.loads(file.read_text())
    assert [(size["steps"], size["neurons"]) for size in report["sizes"]] == [(2, 32), (4, 16)]
    assert capsys.readouterr().out.count("Leaky in MultiStep") == 2
