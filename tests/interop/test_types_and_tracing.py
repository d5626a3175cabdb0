"""Types of inputs, autocast and torch.jit: converted layers do what the libraries' own layers do."""

from contextlib import nullcontext

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from conversions import LAYERS, SINGLE, WHOLE, authors_layer, close, flat
from spikingjelly.activation_based import functional, neuron
from torch import nn

import asgl_cuda
from asgl_cuda.interop.snntorch import MultiStep


def outputs(layer, x):
    """All tensors returned by two calls or recorded by sinabs."""
    found, state = [], ()
    for _ in range(2):
        out = layer(x, *state)
        found += flat(out)
        state = out[1:] if isinstance(out, tuple) and not getattr(layer, "init_hidden", False) else ()
    return [*found, *getattr(layer, "recordings", {}).values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_types(name, cast, dtype):
    make, shape = LAYERS[name]
    x = (3 * torch.rand(shape)).to(dtype)
    with torch.autocast("cpu", dtype=cast) if cast else nullcontext():
        try:
            expected = outputs(make(), x)
        except RuntimeError as error:
            assert "autocast" in str(error)  # noqa: PT017
            pytest.skip("the library's own layer can't")
        assert [each.dtype for each in outputs(asgl_cuda.convert(make())[0], x)] == [each.dtype for each in expected]


INTEGERS = {
    **{name: make for name, (make, _) in LAYERS.items() if "norse L" not in name and "Exp" not in name},
    "LIFNode, a reset": lambda: neuron.ParametricLIFNode(v_reset=0.3),
    "IFNode, soft": lambda: neuron.IFNode(v_reset=None),
    "SimpleLIFNode, a reset": lambda: neuron.SimpleLIFNode(2.0, True, v_reset=0.3),
    "CUBALIFNode, soft": lambda: neuron.CUBALIFNode(v_reset=None),
    "Leaky, whole numbers": lambda: snntorch.Leaky(beta=1, threshold=2, reset_mechanism="zero"),
    "Synaptic, state inside": lambda: snntorch.Synaptic(
        alpha=0.5, beta=0.5, threshold=2.0, init_hidden=True, output=True
    ),
    "norse LIFBoxCell, whole numbers": lambda: norse.LIFBoxCell(
        norse.LIFBoxParameters(v_th=torch.tensor(1), tau_mem_inv=torch.tensor(400))
    ),
    "sinabs LIF, whole numbers": lambda: sinabs.layers.LIF(tau_mem=3, spike_threshold=1, **SINGLE),
    "sinabs IAF, whole numbers": lambda: sinabs.layers.IAF(spike_threshold=50, **SINGLE),
    "sinabs IAF, whole numbers, several": lambda: sinabs.layers.IAF(spike_threshold=50, min_v_mem=-1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name, dtype):
    """Integer thresholds and inputs, which PyTorch's operations mix with floats."""
    torch.manual_seed(0)
    x = torch.randint(0, 60 if "whole" in name and "IAF" in name else 4, (6, 4, 5)).to(dtype)
    layer, (converted, report) = INTEGERS[name](), asgl_cuda.convert(INTEGERS[name]())
    assert len(report.replaced) == 1
    theirs = outputs(layer, x)
    assert theirs[0].any()
    torch.testing.assert_close(outputs(converted, x), theirs)
    for name in ("v", "v_mem"):
        if hasattr(layer, name):
            torch.testing.assert_close(getattr(converted, name), getattr(layer, name))


def test_under_autocast_a_network_gives_the_spikes_and_gradients_of_the_library():
    """State and dependent values of sinabs are float32, also counts that bfloat16 can't represent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), sinabs.layers.IAF(spike_threshold=torch.tensor(0.01)), nn.Linear(6, 3))
    converted, _ = asgl_cuda.convert(model)
    x = 10 * torch.rand(2, 5, 4)
    results = []
    for net in (model, converted):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            spikes = net[:2](x)
            out = net[2](spikes)
        out.float().square().mean().backward()
        grads = [value.grad for value in net.parameters() if value.grad is not None]
        results.append((spikes.detach(), out.detach(), *grads))
    (theirs, *_), (ours, *_) = results
    assert ours.dtype == theirs.dtype == torch.float32
    assert theirs.max() > 256
    for ours, theirs in zip(*results[::-1], strict=True):
        assert torch.equal(ours, theirs) or close(ours, theirs)


# ---- torch.jit ----


@pytest.mark.parametrize("name", LAYERS)
def test_traces_as_the_original_does(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    x, other = 3 * torch.rand(2, *shape)
    try:
        expected = torch.jit.trace(make(), x, check_trace=False)(other)
    except RuntimeError as error:
        assert "as a constant" in str(error)  # noqa: PT017
        pytest.skip("the library's own layer can't be traced")
    converted, _ = asgl_cuda.convert(make())
    made = type(converted)
    found = torch.jit.trace(converted, x, check_trace=False)(other)
    assert type(converted) is made
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=0)


def test_asgl_layers_are_traced_in_evaluation():
    model = nn.Sequential(nn.Linear(5, 4), neuron.LIFNode(step_mode="m"), nn.Linear(4, 2))
    converted, _ = asgl_cuda.convert(model, asgl={"width": 2.0})
    x_seq, other = 3 * torch.rand(2, *WHOLE)
    traced = torch.jit.trace(converted.eval(), x_seq, check_trace=False)
    functional.reset_net(model)
    torch.testing.assert_close(traced(other), torch.jit.trace(model, x_seq, check_trace=False)(other))
    functional.reset_net(converted.train())
    with pytest.raises(RuntimeError, match=r"asgl_cuda\.convert: torch\.jit can't .* LIFNode.*: asgl_cuda\.revert"):
        torch.jit.trace(converted, x_seq, check_trace=False)
    layer = authors_layer(3).eval()
    layer.cell.spike_fn.inv_sg.make(torch.zeros(2, 5))
    torch.testing.assert_close(torch.jit.trace(asgl_cuda.convert(layer)[0], x_seq)(other), layer(other))


def test_errors_of_trace_and_script():
    x_seq = torch.rand(WHOLE)
    multi = MultiStep(snntorch.Leaky(beta=0.5))
    with pytest.raises(RuntimeError, match=r"asgl_cuda\.convert: torch\.jit can't .* Leaky"):
        torch.jit.trace(multi, x_seq, check_trace=False)
    for make, _ in LAYERS.values():
        with pytest.raises(RuntimeError, match=r"asgl_cuda\.convert: torch\.jit can't script a converted"):
            torch.jit.script(nn.Sequential(asgl_cuda.convert(make())[0]))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_shared_surrogate(strict):
    """torch.export wraps a module that several layers share, as SpikingJelly's default surrogate, in another class."""
    nodes = (neuron.LIFNode(step_mode="m") for _ in range(2))
    model, _ = asgl_cuda.convert(nn.Sequential(*nodes))
    x_seq = 3 * torch.rand(4, 2, 5)
    exported = torch.export.export(model, (x_seq,), strict=strict)
    functional.reset_net(model)
    assert torch.equal(exported.module()(x_seq), model(x_seq))
