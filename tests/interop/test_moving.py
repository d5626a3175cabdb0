"""The tables of docs/guides/moving.md: in each row, the library's layer and ours with those arguments agree."""

from __future__ import annotations

import math
import warnings
from typing import Any

import norse.torch as norse
import pytest
import snntorch as snn
import torch
from authors_code import EfficientNoisySpike, InvRectangle, InvSigmoid, LIFLayer
from norse.torch.functional.reset import reset_subtract
from sinabs import activation, layers
from snntorch import surrogate as slopes
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import LIF, LeakyIntegrator

pytestmark = pytest.mark.usefixtures("in_double")


def plain(**options: Any) -> LIF:
    """A neuron without the features that other libraries lack."""
    return LIF(**{"learn_width": False, "analog_prob": 0.0, **options})


def input_of(shape: tuple[int, ...] = (20, 3, 7), scale: float = 1.0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(7)) * scale).requires_grad_()


def assert_moved(theirs: Any, ours: Any, x_seq: Tensor) -> None:
    """Compares spikes, and gradients of their randomly weighted sum."""
    expected, found = theirs(x_seq), ours(x_seq)
    assert 0.02 < (found > 0).double().mean() < 0.98  # spikes and silence
    torch.testing.assert_close(found, expected, check_dtype=False)  # snnTorch emits float32 in any case
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8))
    gradients = [torch.autograd.grad((out * weights).sum(), x_seq)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # snnTorch and sinabs keep parameters in float32


def spikingjelly_rows() -> dict[str, Any]:
    sigmoid = {"surrogate": "sigmoid", "width": 1 / 4}  # Sigmoid(alpha=4) is SpikingJelly's default

    def node(kind: Any, **options: Any) -> Any:
        return kind(step_mode="m", **options)

    def surrogates(name: str, function: Any, width: float) -> Any:
        return node(neuron.LIFNode, surrogate_function=function), {"decay": 0.5, "input_gain": 0.5, "width": width,
                                                                   "surrogate": name}  # fmt: skip

    lif = {"decay": 0.5, "input_gain": 0.5, **sigmoid}
    rows = {
        "tau=2": (node(neuron.LIFNode, tau=2.0), lif),
        "tau=4": (node(neuron.LIFNode, tau=4.0), {**lif, "decay": 0.75, "input_gain": 0.25}),
        "decay_input=False": (node(neuron.LIFNode, decay_input=False), {**lif, "input_gain": 1.0}),
        "IFNode": (node(neuron.IFNode), {**sigmoid, "decay": 1.0}),
        "v_threshold": (node(neuron.LIFNode, v_threshold=0.7), {**lif, "v_threshold": 0.7}),
        "v_reset": (node(neuron.LIFNode, v_reset=0.2), {**lif, "v_reset": 0.2, "v_rest": 0.2}),
        "v_reset=None": (node(neuron.LIFNode, v_reset=None), {**lif, "v_reset": None}),
        "detach_reset": (node(neuron.LIFNode, detach_reset=True), {**lif, "detach_reset": True}),
        "Sigmoid": surrogates("sigmoid", surrogate.Sigmoid(3.0), 1 / 3),
        "ATan": surrogates("arctan", surrogate.ATan(2.0), 1 / 2),
        "Rect": surrogates("rectangle", surrogate.Rect(0.8), 1 / 0.8),
        "PiecewiseQuadratic": surrogates("triangle", surrogate.PiecewiseQuadratic(1.5), 1 / 1.5),
        "Erf": surrogates("erf", surrogate.Erf(2.0), 1 / 2),
        "SoftSign": surrogates("fast_sigmoid", surrogate.SoftSign(2.0), 1 / 2),
        "PiecewiseExp": surrogates("laplace", surrogate.PiecewiseExp(2.0), 1 / 2),
    }
    current = neuron.CUBALIFNode()
    current.step_mode = "m"
    behind = nn.Sequential(LeakyIntegrator(decay=0.5), plain(decay=0.75, v_threshold=0.5, width=1.0))
    return {
        **{name: (node, plain(**options), input_of(scale=2.5)) for name, (node, options) in rows.items()},
        "current": (current, behind, input_of(scale=0.3)),
    }


def over_steps(layer: Any) -> Any:
    """A loop over steps for a layer of snnTorch."""

    def run(x_seq: Tensor) -> Tensor:
        layer.reset_mem()
        return torch.stack([layer(x)[0] for x in x_seq])

    return run


def snntorch_rows() -> dict[str, Any]:
    def leaky(**options: Any) -> Any:
        return snn.Leaky(**{"beta": 0.8, **options}).double()

    delayed = {"decay": 0.8, "v_reset": None, "reset_amount": 1 / 0.8, "detach_reset": True, "strict_threshold": True}
    arctan = {**delayed, "surrogate": "arctan", "width": 1 / 2}

    def surrogates(function: Any, name: str, width: float, gain: float) -> Any:
        return leaky(spike_grad=function), {**delayed, "surrogate": name, "width": width, "surrogate_gain": gain}

    rows = {
        "beta": (leaky(), arctan),
        "threshold": (leaky(threshold=0.7), {**arctan, "v_threshold": 0.7, "reset_amount": 0.7 / 0.8}),
        "zero": (leaky(reset_mechanism="zero"), {**arctan, "v_reset": 0.0, "reset_amount": None}),
        "none": (leaky(reset_mechanism="none"), {**arctan, "reset_amount": 0.0}),
        "reset_delay=False": (leaky(reset_delay=False), {**arctan, "reset_amount": None, "detach_reset": False}),
        "atan": surrogates(slopes.atan(alpha=3.0), "arctan", 1 / 3, 1.0),
        "fast_sigmoid": surrogates(slopes.fast_sigmoid(slope=25), "fast_sigmoid", 1 / 25, 2 / 25),
        "sigmoid": surrogates(slopes.sigmoid(slope=25), "sigmoid", 1 / 25, 1.0),
    }
    behind = nn.Sequential(LeakyIntegrator(decay=0.6), plain(**arctan))
    return {
        **{name: (over_steps(layer), plain(**options), input_of(scale=0.8)) for name, (layer, options) in rows.items()},
        "Synaptic": (over_steps(snn.Synaptic(alpha=0.6, beta=0.8).double()), behind, input_of(scale=0.4)),
    }


def norse_rows() -> dict[str, Any]:
    def box(**options: Any) -> Any:
        return norse.LIFBoxParameters(**{"alpha": torch.as_tensor(10.0), **options})

    lif = {"decay": 0.9, "input_gain": 0.1, "strict_threshold": True, "surrogate": "fast_sigmoid", "width": 1.0,
           "surrogate_gain": 2.0}  # fmt: skip
    as_tensor = torch.as_tensor
    rows = {
        "tau_mem_inv": (box(), lif),
        "tau_mem_inv, other": (box(tau_mem_inv=as_tensor(250.0)), {**lif, "decay": 0.75, "input_gain": 0.25}),
        "v_leak": (box(v_leak=as_tensor(0.3)), {**lif, "v_rest": 0.3}),
        "v_th": (box(v_th=as_tensor(0.7)), {**lif, "v_threshold": 0.7}),
        "v_reset": (box(v_reset=as_tensor(0.2)), {**lif, "v_reset": 0.2}),
        "reset_subtract": (box(reset_method=reset_subtract), {**lif, "v_reset": None}),
    }

    def stepped(cell: Any) -> Any:
        def theirs(x_seq: Tensor) -> Tensor:
            state, out = None, []
            for x in x_seq:
                z, state = cell(x, state)
                out.append(z)
            return torch.stack(out)

        return theirs

    def with_current(synapse: float, **options: Any) -> Any:
        layer = norse.LIF(norse.LIFParameters(alpha=torch.as_tensor(10.0)), dt=0.001 * options["input_gain"] / 0.1)
        ours = nn.Sequential(LeakyIntegrator(decay=synapse), plain(**{**lif, **options}))
        return lambda x_seq: layer(x_seq)[0], ours, input_of(scale=3)

    read_out = nn.Sequential(LeakyIntegrator(decay=0.8), LeakyIntegrator(decay=0.9, input_gain=0.1))
    return {
        **{
            name: (stepped(norse.LIFBoxCell(p)), plain(**options), input_of(scale=15))
            for name, (p, options) in rows.items()
        },
        "current": with_current(0.8, decay=0.9, input_gain=0.1),
        "dt": with_current(0.6, decay=0.8, input_gain=0.2),
        "read-out": (lambda x_seq: norse.LI()(x_seq)[0], read_out, input_of() - 0.3),
    }


def sinabs_rows() -> dict[str, Any]:
    decay = math.exp(-1 / 5)
    single = {"spike_fn": activation.SingleSpike}
    lif = {"decay": decay, "input_gain": 1 - decay, "v_reset": None, "surrogate": "laplace", "width": 0.5,
           "time_dim": 1, "surrogate_gain": 2.0}  # fmt: skip
    rows = {
        "tau_mem": (layers.LIF(tau_mem=5.0, **single), lif),
        "norm_input=False": (layers.LIF(tau_mem=5.0, norm_input=False, **single), {**lif, "input_gain": 1.0}),
        "spike_threshold": (
            layers.LIF(tau_mem=5.0, spike_threshold=torch.tensor(0.7), **single),
            {**lif, "v_threshold": 0.7, "width": 0.5 * 0.7},
        ),
        "MultiSpike": (layers.LIF(tau_mem=5.0), {**lif, "multi_spike": True}),
        "MembraneReset": (
            layers.LIF(tau_mem=5.0, reset_fn=activation.MembraneReset(), **single),
            {**lif, "v_reset": 0.0, "detach_reset": True},
        ),
        "subtract_value": (
            layers.LIF(tau_mem=5.0, reset_fn=activation.MembraneSubtract(0.6), **single), {**lif, "reset_amount": 0.6},
        ),
        "min_v_mem": (layers.LIF(tau_mem=5.0, min_v_mem=-0.1, **single), {**lif, "v_min": -0.1}),
        "grad_width": (
            layers.LIF(tau_mem=5.0, surrogate_grad_fn=activation.SingleExponential(grad_width=0.8), **single),
            {**lif, "width": 0.8},
        ),
        "IAF": (layers.IAF(**single), {**lif, "decay": 1.0, "input_gain": 1.0}),
        "PeriodicExponential": (
            layers.LIF(tau_mem=5.0, surrogate_grad_fn=activation.PeriodicExponential()),
            {**lif, "multi_spike": True, "surrogate": "periodic_exponential", "surrogate_gain": 1.0},
        ),
    }  # fmt: skip
    synapse = math.exp(-1 / 3)
    behind = nn.Sequential(LeakyIntegrator(decay=synapse, input_gain=synapse, time_dim=1), plain(**lif))
    read_out = LeakyIntegrator(decay=decay, time_dim=1)

    def x_seq(row: str) -> Tensor:
        scale = 0.8 if row in ("IAF", "norm_input=False") else 5.0
        return input_of((3, 20, 7), scale) - (0.6 if row == "min_v_mem" else 0.0)

    return {
        **{row: (layer.double(), plain(**options), x_seq(row)) for row, (layer, options) in rows.items()},
        "current": (layers.LIF(tau_mem=5.0, tau_syn=3.0, **single).double(), behind, input_of((3, 20, 7), 3.0)),
        "read-out": (layers.ExpLeak(tau_mem=5.0).double(), read_out, input_of((3, 20, 7)) - 0.3),
    }


def authors_rows() -> dict[str, Any]:
    found = {}
    for kind, name in ((InvRectangle, "rectangle"), (InvSigmoid, "sigmoid")):
        for v_reset in (None, 0.0):
            layer = LIFLayer(20, spike_fn=EfficientNoisySpike(kind(2.0)), decay=0.7, thresh=0.5, vreset=v_reset)
            ours = LIF(
                decay=0.7, v_threshold=0.5, v_reset=v_reset, scale_output=True, analog_prob=0.0, learn_decay=True,
                dtype=torch.float64, surrogate=name, width=1 / 2,
            )  # fmt: skip
            found[f"{kind.__name__}, vreset={v_reset}"] = layer.double(), ours, input_of()
    return found


ROWS = {"spikingjelly": spikingjelly_rows, "snntorch": snntorch_rows, "norse": norse_rows, "sinabs": sinabs_rows,
        "authors": authors_rows}  # fmt: skip


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the row without a reset warns
    NAMES = [(library, row) for library in ROWS for row in ROWS[library]()]


@pytest.mark.parametrize(("library", "row"), NAMES)
@pytest.mark.filterwarnings("ignore:asgl_cuda.LIF. a spike takes 0 off")
def test_rows(library: str, row: str):
    assert_moved(*ROWS[library]()[row])


def test_spikingjelly_carries_its_potential():
    node = neuron.LIFNode(step_mode="m", store_v_seq=True)
    options = {"decay": 0.5, "input_gain": 0.5, "surrogate": "sigmoid", "width": 0.25}
    ours = plain(stateful=True, store_v_seq=True, **options)
    for _ in range(2):
        x_seq = input_of(scale=2.5)
        torch.testing.assert_close(ours(x_seq), node(x_seq))
        torch.testing.assert_close(ours.v_seq, node.v_seq)
    functional.reset_net(node)
    asgl_cuda.reset(ours)
    torch.testing.assert_close(ours(x_seq), node(x_seq))


def test_snntorch_potential():
    layer = snn.Leaky(beta=0.8).double()
    x_seq = input_of()
    layer.reset_mem()
    expected = torch.stack([layer(x)[1] for x in x_seq])
    options = {"decay": 0.8, "v_reset": None, "reset_amount": 1 / 0.8, "strict_threshold": True}
    torch.testing.assert_close(asgl_cuda.lif(x_seq, return_h_seq=True, **options).h_seq, expected)
