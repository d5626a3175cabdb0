"""The backend and types in which models of other libraries are compared with their conversions."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import asgl_cuda

MISSING = [name for name in ("norse", "sinabs", "snntorch", "spikingjelly") if find_spec(name) is None]
if MISSING:
    print(f"asgl_cuda: no {', '.join(MISSING)}, so conversions of other libraries' layers are not tested")
    tests = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    collect_ignore = [name for name in tests if not name.startswith("test_nir")]


@pytest.fixture
def backend():
    """Of the neurons in models: that backends agree is for the tests of neurons."""
    return "cpu" if "cpu" in asgl_cuda.available_backends() else "reference"


@pytest.fixture
def in_double():
    """Float64, in which no spike depends on the rounding of a sum."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def spikes_in_double(monkeypatch):
    """Spikes of snnTorch and sinabs are float32, and round gradients that pass through them."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
