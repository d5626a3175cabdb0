"""Memory of training steps: less is kept where spikes are recomputed, and allocations are counted."""

import pytest
import torch

from benchmarks.speed import memory
from benchmarks.speed.clocks import allocated_bytes

CPU = torch.device("cpu")
MEGABYTE = 2**20


def test_allocated_bytes():
    def call():
        torch.ones(8 * MEGABYTE, dtype=torch.uint8)
        return torch.ones(2 * MEGABYTE, dtype=torch.uint8)

    peak, left = allocated_bytes(call, CPU)
    assert 2 * MEGABYTE <= left < 3 * MEGABYTE
    assert left <= peak < 11 * MEGABYTE


def test_spikes_computed_again(monkeypatch):
    monkeypatch.setattr(memory, "BATCH", 2)
    found = memory.measure("VGG, T = 4", CPU, repeats=1)
    assert list(found) == [memory.KEPT, memory.RECOMPUTED, memory.CHECKPOINTED]
    assert found[memory.RECOMPUTED]["kept_bytes"] <= 0.56 * found[memory.KEPT]["kept_bytes"]
    assert found[memory.RECOMPUTED]["peak_bytes"] < found[memory.KEPT]["peak_bytes"]
    assert "recompute_spikes" in memory.table("VGG, T = 4", found)


@pytest.mark.parametrize("name", memory.LINEAR)
def test_linear_networks(name):
    found = memory.measure(name, CPU, repeats=1)
    assert list(found) == [memory.KEPT, memory.RECOMPUTED]
    assert found[memory.RECOMPUTED]["kept_bytes"] <= 0.65 * found[memory.KEPT]["kept_bytes"]
