"""Launches of a step of training: each costs a GPU, and its host, some microseconds.

The emulated device counts the project's kernels; torch's profiler shows the torch operations that would launch a GPU
kernel, also operations inside operators.
"""

import re

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import asgl_cuda

# These only allocate or view memory, or read values that are on the CPU.
NO_LAUNCH = re.compile(
    r"aten::((new_)?empty|(.*_)?strided|view|reshape|expand|permute|unbind|select|slice|flatten|narrow|detach|alias|to"
    r"|item|_local_scalar_dense|contiguous)"
)


@pytest.fixture
def backend(emulation):
    return "emulated"


def launching(event):
    """The innermost torch operations of an event that would launch a kernel."""
    inside = [name for child in event.cpu_children for name in launching(child)]
    launches = event.name.startswith("aten::") and not NO_LAUNCH.match(event.name)
    return inside or ([event.name] if launches else [])


def launches_of(function, emulation):
    """The names of all kernels that a call launches."""
    emulation.take_launches()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    events = profiler.events()
    assert any(event.name.startswith("asgl_cuda_") for event in events)
    found = [name for event in events if event.cpu_parent is None for name in launching(event)]
    return found + [launch.kernel.removeprefix("asgl::").split("<")[0] for launch in emulation.take_launches()]


def training_step(layer, x_seq, grad):
    """A step without the optimizer; gradients are new, as after zero_grad()."""

    def step():
        layer.zero_grad()
        x_seq.grad = None
        layer(x_seq).backward(grad)

    return step


@pytest.fixture(autouse=True)
def nothing_is_filled(outputs_filled_with_nan):
    """Fills by outputs_filled_with_nan would count as launches."""
    torch.use_deterministic_algorithms(False)


X_SHAPE = (4, 2, 6, 3, 3)
LEARNED = {"learn_decay": True, "learn_threshold": True}
# num_features comes first: none for the whole layer, channels, or neurons.
LAYERS = [((), {}), ((), {"analog_prob": 0.0}), ((), LEARNED), ((6,), {**LEARNED, "granularity": "channel"}),
          (((6, 3, 3),), {**LEARNED, "granularity": "neuron"})]  # fmt: skip


def launches_of_training(layer, emulation):
    x_seq, grad = torch.randn(X_SHAPE, requires_grad=True), torch.randn(X_SHAPE)
    step = training_step(layer, x_seq, grad)
    step()
    return launches_of(step, emulation)


@pytest.mark.parametrize(("features", "options"), LAYERS)
def test_lif(emulation, backend, features, options):
    """Draw, forward, backward, and one sum for the gradients of all parameters."""
    found = launches_of_training(asgl_cuda.LIF(*features, **options, backend=backend), emulation)
    kernels = ["lif_forward_kernel", "lif_backward_settled_kernel", "gradient_sum_kernel"]
    assert found == [
        *(["aten::random_"] if options.get("analog_prob") != 0.0 else []),
        *kernels,
    ]


@pytest.mark.parametrize("options", [{}, {"affine": False}, LEARNED])
def test_batch_norm_lif(emulation, backend, options):
    """test_lif's, and moments, coefficients, running statistics; the adjoint and the input's gradient."""
    found = launches_of_training(asgl_cuda.BatchNormLIF(6, **options, backend=backend), emulation)
    assert len(found) == 9, found
    assert found.count("gradient_sum_kernel") == 1


@pytest.mark.parametrize(("layer", "features", "count"), [("LIF", (), 1), ("BatchNormLIF", (6,), 2)])
def test_evaluation(emulation, backend, layer, features, count):
    layer, x_seq = getattr(asgl_cuda, layer)(*features, backend=backend).eval(), torch.randn(X_SHAPE)
    with torch.no_grad():
        layer(x_seq)
        assert len(launches_of(lambda: layer(x_seq), emulation)) == count


def test_the_public_function(emulation, backend):
    """A width computed by an operation of torch costs that operation, forward and backward, and no more."""
    log_width = nn.Parameter(torch.zeros(()))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_width = log_width

        def forward(self, x_seq):
            return asgl_cuda.lif(x_seq, width=self.log_width.exp(), analog_prob=0.2, backend=backend)

    found = launches_of_training(Layer(), emulation)
    assert sorted(found)[:3] == ["aten::exp", "aten::mul", "aten::random_"]
    assert len(found) == 6


@pytest.mark.parametrize("place", ["around", "inside"])
def test_one_more_is_seen(emulation, backend, place, monkeypatch):
    layer = asgl_cuda.LIF(backend=backend)
    if place == "around":
        found = launches_of_training(nn.Sequential(layer, nn.ReLU()), emulation)
        assert len(found) == 4 + 2
    else:
        operators = asgl_cuda.backends.BACKENDS[backend].operators

        def forward(*arguments):
            result = operators.lif_forward(*arguments)
            result[0].mul_(1)
            return result

        spied = operators._replace(lif_forward=forward)
        spied = asgl_cuda.backends.BACKENDS[backend]._replace(operators=spied, direct=None)
        monkeypatch.setitem(asgl_cuda.backends.BACKENDS, backend, spied)
        assert len(launches_of_training(layer, emulation)) == 4 + 1
