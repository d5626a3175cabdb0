"""Large outputs, states and checkpoints on a CPU request huge pages, where the system grants these by madvise."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import asgl_cuda

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/smaps")
LARGE = 2**21  # elements of 8 MiB in float32

pytestmark = [
    pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="no CPU kernels"),
    pytest.mark.skipif(
        not (SETTING.exists() and "[madvise]" in SETTING.read_text()), reason="there are no huge pages on request"
    ),
]


def asked_for(tensor: Tensor) -> bool:
    """Whether huge pages were requested at the middle of the tensor's memory."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in MAPS.read_text().splitlines():
        first, *rest = line.split()
        if first == "VmFlags:":
            if inside:
                return "hg" in rest
        elif not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            inside = begin <= middle < end
    raise AssertionError("the tensor lies in no mapping")


def test_what_is_large_asks_for_huge_pages():
    x_seq = torch.randn(32, LARGE // 16, requires_grad=True)
    found = asgl_cuda.lif(x_seq, return_v_seq=True, return_h_seq=True, backend="cpu")
    (grad,) = torch.autograd.grad(found.s_seq, x_seq, torch.ones_like(x_seq))
    for tensor in (found.s_seq, found.v_seq, found.h_seq, grad):
        assert asked_for(tensor)
    x_seq, residual = (torch.randn(4, 16, LARGE // 64, requires_grad=True) for _ in range(2))
    s_seq = asgl_cuda.batch_norm_lif(x_seq, training=True, residual=residual, backend="cpu")
    for grad in torch.autograd.grad(s_seq, (x_seq, residual), torch.ones_like(s_seq)):
        assert asked_for(grad)


def test_states_and_checkpoints_ask_for_huge_pages():
    """Each is as large as one step of the sequence."""
    output = asgl_cuda.lif(torch.randn(17, LARGE, requires_grad=True), return_v_last=True, backend="cpu")
    saved = [tensor for tensor in output.s_seq.grad_fn.saved_tensors if tensor is not None]
    (checkpoints,) = (tensor for tensor in saved if tensor.dim() == 1 and tensor.numel() >= LARGE)
    assert asked_for(output.v_last)
    assert asked_for(checkpoints)
