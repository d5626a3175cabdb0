"""The benchmark of host time has a row for each layer, and restores the table of backends."""

import torch

from asgl_cuda.backends import BACKENDS
from benchmarks.speed import host

CPU = torch.device("cpu")


def test_rows(monkeypatch):
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(torch, "compile", lambda layer, **options: layer)  # it takes seconds
    before = list(BACKENDS)
    times = host.host_times(CPU, 1)
    assert list(BACKENDS) == before
    for rows in times:
        assert next(iter(rows)) == host.GELU
        assert all(us > 0 for us in rows.values())
        assert "LIF, launched in Python" in rows
    text = host.table(times)
    assert text.count("\n") == 3 + sum(map(len, times))
    assert "BatchNormLIF cpu, compiled" in text
