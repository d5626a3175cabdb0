"""Backends and types in which models of other libraries are compared with what is made of them."""

import pytest
import torch

import asgl_cuda


@pytest.fixture(params=[name for name in ("reference", "cpu") if name in asgl_cuda.available_backends()])
def backend(request):
    return request.param


@pytest.fixture
def in_double():
    """In float64 no spike hangs on how a sum is rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
