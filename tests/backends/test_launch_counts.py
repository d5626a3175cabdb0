"""Launches of a step of training: each costs a GPU, and its host, some microseconds.

The emulated device counts the project's kernels; torch's profiler shows the torch operations that would launch a GPU
kernel, also operations inside operators.
"""

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF

# These only allocate or view memory, or read values that are on the CPU.
NO_LAUNCH = re.compile(
    r"aten::((new_)?empty|(.*_)?strided|view|reshape|expand|permute|unbind|select|slice|flatten|narrow|detach|alias|to"
    r"|item|_local_scalar_dense|contiguous|(un)?squeeze|transpose|t\b|movedim|resolve_conj)"
)
X_SHAPE = (4, 2, 6, 3, 3)
LEARNED = {"learn_decay": True, "learn_threshold": True, "backend": "emulated"}
KERNELS = ["lif_forward_kernel", "lif_backward_settled_kernel", "gradient_sum_kernel"]


@pytest.fixture(autouse=True)
def nothing_is_filled(outputs_filled_with_nan):
    """Fills by outputs_filled_with_nan would count as launches."""
    torch.use_deterministic_algorithms(False)


def launching(event):
    """The innermost torch operations of an event that would launch a kernel."""
    inside = [name for child in event.cpu_children for name in launching(child)]
    launches = event.name.startswith("aten::") and not NO_LAUNCH.match(event.name)
    return inside or ([event.name] if launches else [])


def launches_of(function, emulation):
    """The names of all kernels that a second call launches."""
    function()
    emulation.take_launches()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    events = profiler.events()
    assert any(event.name.startswith("asgl_cuda_") for event in events)
    found = [name for event in events if event.cpu_parent is None for name in launching(event)]
    return found + [launch.kernel.removeprefix("asgl::").split("<")[0] for launch in emulation.take_launches()]


def launches_of_training(layer, emulation):
    """Of a step without the optimizer; gradients are new, as after zero_grad()."""
    x_seq, grad = torch.randn(X_SHAPE, requires_grad=True), torch.randn(X_SHAPE)

    def step():
        layer.zero_grad()
        x_seq.grad = None
        layer(x_seq).backward(grad)

    return launches_of(step, emulation)


@pytest.mark.parametrize(
    ("features", "options"),
    [
        (None, {"backend": "emulated"}), (None, {"analog_prob": 0.0, "backend": "emulated"}), (None, LEARNED),
        (6, {**LEARNED, "granularity": "channel"}), ((6, 3, 3), {**LEARNED, "granularity": "neuron"}),
    ],
)  # fmt: skip
def test_lif(emulation, features, options):
    """Draw, forward, backward, and one sum for the gradients of all parameters; one more is seen."""
    layer = LIF(features, **options)
    found = launches_of_training(layer, emulation)
    assert found == ["aten::random_"] * (layer.analog_prob > 0) + KERNELS
    assert len(launches_of_training(nn.Sequential(layer, nn.ReLU()), emulation)) == len(found) + 2


@pytest.mark.parametrize("options", [{"backend": "emulated"}, {"affine": False, "backend": "emulated"}, LEARNED])
def test_batch_norm_lif(emulation, options):
    """test_lif's, moments and coefficients before, with the running statistics, and the input's gradient after."""
    found = launches_of_training(BatchNormLIF(6, **options), emulation)
    before, after = ["batch_moments_kernel", "batch_norm_coefficients_kernel"], ["batch_norm_input_gradient_kernel"]
    assert found == ["aten::random_", *before, *KERNELS, *after]


@pytest.mark.parametrize("options", [{}, {"recurrent": "elementwise"}, {"time_dim": 1}, {"autapses": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_of_recurrent_neurons(emulation, options, dtype):
    """A product, and the neuron's kernel with bias and input; without a synapse, an adaptation or a gain."""

    def launches(steps, **more):
        layer = asgl_cuda.RecurrentLIF(6, analog_prob=0.0, backend="emulated", **options, **more)
        x_seq = torch.randn(steps, steps, 6, dtype=dtype)
        with torch.no_grad():
            return launches_of(lambda: layer(x_seq), emulation)

    product = "aten::mul" if "recurrent" in options else "aten::mm"
    assert Counter(launches(5)) - Counter(launches(3)) == {product: 2, "lif_forward_kernel": 2}
    for more, each in (({"syn_decay": 0.5}, 6), ({"input_gain": 0.5}, 4)):
        assert len(launches(5, **more)) - len(launches(3, **more)) == 2 * each


def test_evaluation(emulation):
    x_seq = torch.randn(X_SHAPE)
    with torch.no_grad():
        for layer, count in ((LIF(backend="emulated"), 1), (BatchNormLIF(6, backend="emulated"), 2)):
            assert len(launches_of(lambda layer=layer: layer.eval()(x_seq), emulation)) == count


def test_the_public_function(emulation):
    """A width computed by an operation of torch costs that operation, forward and backward, and no more."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_width = nn.Parameter(torch.zeros(()))

        def forward(self, x_seq):
            return asgl_cuda.lif(x_seq, width=self.log_width.exp(), analog_prob=0.2, backend="emulated")

    found = launches_of_training(Layer(), emulation)
    assert sorted(found)[:3] == ["aten::exp", "aten::mul", "aten::random_"]
    assert len(found) == 6
