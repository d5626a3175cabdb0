"""The operators on fake CUDA tensors, as compilers and exporters see them: without a GPU or a build for one."""

import pytest
import torch
from comparison import real_of
from torch._subclasses import FakeTensorMode

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import cupy, extension
from asgl_cuda.reference.records import Numbers, Rules

pytestmark = pytest.mark.skipif(extension.module is None, reason=str(extension.problem))

CUDA = torch.device("cuda", 0)


@pytest.fixture
def operators(monkeypatch):
    """Those of a build with CUDA; fake tensors never reach its kernels."""
    found = backends.registered_operators("asgl_cuda")
    monkeypatch.setitem(backends.BACKENDS, "cuda", backends.Backend(("cuda",), found, lambda: None))
    return found


def results(operators, device, steps, layout, dtype):
    """The results of lif_forward and lif_backward."""
    sizes = {"channels_last": (steps, 2, 4, 5, 3), "batch first": (2, steps, 3, 4, 5)}.get(layout, (steps, 2, 3, 4, 5))
    x_seq, time_dim = torch.rand(sizes, dtype=dtype, device=device), int(layout == "batch first")
    if layout == "channels_last":
        x_seq = x_seq.permute(0, 1, 4, 2, 3)
    real = real_of(dtype)
    width, v_threshold = (torch.ones(sizes, dtype=real, device=device) for sizes in ((3, 1, 1), ()))
    parameters = [width, None, v_threshold, None, None, None, None, torch.zeros_like(x_seq)]
    v_init = torch.zeros(2, 3, 4, 5, dtype=real, device=device)
    state = operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device=device))
    numbers = Numbers(0.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0, residual_gain=1.0, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    rules = Rules(0, 1, *[0] * 8, analog_below=20000, levels=0, adaptation=0, time_dim=time_dim, trailing=0)
    *outputs, kept = operators.lif_forward(x_seq, v_init, state, *parameters, numbers, rules, [True] * 4)
    wanted = [True, True, True, False, True, False, False, False, False, True]
    grads = operators.lif_backward(*outputs, x_seq, v_init, state, kept, *parameters, numbers, rules, wanted)
    return [state, *outputs, kept, *grads]


@pytest.mark.parametrize(
    ("steps", "layout", "dtype"),
    [(4, "contiguous", torch.float32), (20, "contiguous", torch.float16), (20, "channels_last", torch.float64),
     (20, "batch first", torch.float32)],
)  # fmt: skip
def test_operators_describe_their_results(operators, steps, layout, dtype):
    """On the device of x, otherwise as from the kernels on the CPU."""
    real = results(operators, "cpu", steps, layout, dtype)
    with FakeTensorMode():
        fake = results(operators, "cuda", steps, layout, dtype)
    for ours, theirs in zip(fake, real, strict=True):
        assert (ours.shape, ours.dtype, ours.stride(), ours.device) == (
            theirs.shape, theirs.dtype, theirs.stride(), CUDA,
        )  # fmt: skip


@pytest.mark.parametrize("namespace", ["asgl_cuda", cupy.NAMESPACE])
@pytest.mark.parametrize("key", ["CUDA", "AutogradCUDA"])
def test_every_build_has_kernels_for_cuda(namespace, key):
    """Without nvcc, a launcher in Python starts those of CuPy."""
    for name in backends.Operators._fields:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


@pytest.mark.usefixtures("operators")
def test_parameter_on_another_device_is_refused():
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"asgl_cuda\.lif: width must be on cuda:0 as x_seq, got cpu"),
    ):
        asgl_cuda.lif(torch.rand(4, 3, device="cuda"), width=torch.ones(()))


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("training", [False, True])
def test_exported(operators, training):
    layer = asgl_cuda.LIF(learn_width=False, analog_prob=0.3).train(training)
    with FakeTensorMode():
        x_seq = torch.rand(20, 3, 5, device="cuda")
        program = torch.export.export(layer, (x_seq,), dynamic_shapes=({1: torch.export.Dim("batch", min=2)},))
    found = targets(program.graph)
    assert operators.lif_forward in found
    assert (operators.draw_rng_state in found) == training
