"""The operators on fake CUDA tensors, as compilers and exporters see them: without a GPU or a build for one."""

import pytest
import torch
from comparison import real_of, rng_state
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import asgl_cuda
from asgl_cuda import backends, extension
from asgl_cuda.backends import cupy
from asgl_cuda.reference import Numbers, Rules

pytestmark = pytest.mark.skipif(extension.module is None, reason=str(extension.problem))

CUDA = torch.device("cuda", 0)
EVERY = {"return_v_last": True, "return_v_seq": True, "return_h_seq": True}


@pytest.fixture
def cuda_backend(monkeypatch):
    """The backend of a build with CUDA; fake tensors never reach its kernels."""
    backend = backends.Backend(("cuda",), backends.operators_in("asgl_cuda"), lambda: None)
    monkeypatch.setitem(backends.BACKENDS, "cuda", backend)


def described(tensors):
    return [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors]


def calls(device, steps, layout, dtype):
    """Arguments of lif_forward, and of lif_backward as a function of its results."""
    sizes = {"channels_last": (steps, 2, 4, 5, 3), "batch first": (2, steps, 3, 4, 5)}.get(layout, (steps, 2, 3, 4, 5))
    x_seq, time_dim = torch.rand(sizes, dtype=dtype, device=device), int(layout == "batch first")
    if layout == "channels_last":
        x_seq = x_seq.permute(0, 1, 4, 2, 3)
    real = real_of(dtype)
    width, v_threshold = (torch.ones(sizes, dtype=real, device=device) for sizes in ((3, 1, 1), ()))
    parameters = [width, None, v_threshold, None, None, None, None, torch.zeros_like(x_seq)]
    v_init = torch.zeros(2, 3, 4, 5, dtype=real, device=device)
    state = rng_state(device=device)
    numbers = Numbers(0.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0, residual_gain=1.0, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    rules = Rules(0, 1, *[0] * 8, analog_below=20000, levels=0, adaptation=0, time_dim=time_dim)
    forward = (x_seq, v_init, state, parameters, numbers, rules, [True] * 4)

    def backward(*outputs):
        *grads, checkpoints = outputs
        wanted = [True, True, True, False, True, False, False, False, False, True]
        return grads, x_seq, v_init, state, checkpoints, parameters, numbers, rules, wanted

    return forward, backward


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch first"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_operators_describe_their_results(steps, layout, dtype):
    """On the device of x, otherwise as from the kernels on the CPU."""
    operators = backends.operators_in("asgl_cuda")

    def run(device):
        forward, backward = calls(device, steps, layout, dtype)
        outputs = operators.lif_forward(*forward)
        gradients = operators.lif_backward(*backward(*outputs))
        drawn = operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device=device))
        return [*outputs, *gradients, drawn]

    real = run("cpu")
    with FakeTensorMode():
        fake = run("cuda")
    assert described(fake) == described(real)
    assert {tensor.device for tensor in fake} == {CUDA}


@pytest.mark.parametrize("namespace", ["asgl_cuda", cupy.NAMESPACE])
@pytest.mark.parametrize("key", ["CUDA", "AutogradCUDA"])
def test_every_build_has_kernels_for_cuda(namespace, key):
    """Without nvcc, a launcher in Python starts those of CuPy."""
    for name in backends.Operators._fields:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


@pytest.mark.usefixtures("cuda_backend")
def test_default_backend_on_cuda():
    with FakeTensorMode():
        output = asgl_cuda.lif(torch.rand(4, 3, 5, device="cuda").bfloat16(), analog_prob=0.3, **EVERY)
    assert [tensor.device for tensor in output] == [CUDA] * 4
    assert [tensor.dtype for tensor in output] == [torch.bfloat16, *[torch.float32] * 3]


@pytest.mark.usefixtures("cuda_backend")
def test_parameter_on_another_device_is_refused():
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"asgl_cuda\.lif: width must be on cuda:0 as x_seq, got cpu"),
    ):
        asgl_cuda.lif(torch.rand(4, 3, device="cuda"), width=torch.ones(()))


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.usefixtures("cuda_backend")
def test_traced_by_make_fx():
    operators = backends.operators_in("asgl_cuda")

    def function(x_seq, grad):
        state = operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device=x_seq.device))
        output = asgl_cuda.lif(x_seq, analog_prob=0.3, rng_state=state, return_v_last=True)
        return output.s_seq * grad, output.v_last

    with FakeTensorMode():
        x_seq = torch.rand(20, 3, 5, device="cuda")
        graph = make_fx(function)(x_seq, x_seq).graph
    assert operators.draw_rng_state in targets(graph)
    assert operators.lif_forward in targets(graph)
    (result,) = (node for node in graph.nodes if node.op == "output")
    assert [node.meta["val"].shape for node in result.args[0]] == [(20, 3, 5), (3, 5)]
    assert {node.meta["val"].device for node in result.args[0]} == {CUDA}


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("training", [False, True])
def test_exported(training):
    operators = backends.operators_in("asgl_cuda")
    layer = asgl_cuda.LIF(learn_width=False, analog_prob=0.3).train(training)
    with FakeTensorMode():
        x_seq = torch.rand(20, 3, 5, device="cuda")
        program = torch.export.export(layer, (x_seq,), dynamic_shapes=({1: torch.export.Dim("batch", min=2)},))
    found = targets(program.graph)
    assert operators.lif_forward in found
    assert (operators.draw_rng_state in found) == training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="autograd needs the device itself")
@pytest.mark.usefixtures("cuda_backend")
def test_gradients():
    with FakeTensorMode():
        x_seq = torch.rand(20, 3, 5, device="cuda", requires_grad=True)
        width = torch.ones(5, device="cuda", requires_grad=True)
        s_seq = asgl_cuda.lif(x_seq, width=width, analog_prob=0.3)
        grads = torch.autograd.grad(s_seq.sum(), (x_seq, width))
    assert described(grads) == described((x_seq, width))
    assert {grad.device for grad in grads} == {CUDA}
