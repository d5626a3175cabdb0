"""The tables of docs/guides/moving.md: in each row, the library's layer and ours with those arguments agree.

The rows of surrogates of SpikingJelly and snnTorch are FUNCTIONS and SLOPES in conversions.py.
"""

import math

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from authors_code import InvRectangle, InvSigmoid
from conversions import SINGLE, WHOLE, authors_layer, norses, run
from conversions import node as jelly
from sinabs import activation
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, LeakyIntegrator

pytestmark = pytest.mark.usefixtures("in_double", "spikes_in_double")


def plain(**options):
    """A neuron without the features that other libraries lack."""
    return LIF(**{"learn_width": False, "analog_prob": 0.0, "detach_reset": False, **options})


SIGMOID = {"surrogate": "sigmoid", "width": 1 / 4}  # Sigmoid(alpha=4) is SpikingJelly's default
HALF = {"decay": 0.5, "input_gain": 0.5}
# The library's options of LIFNode, and ours.
SPIKINGJELLY = {
    "tau=2": ({"tau": 2.0}, {}),
    "tau=4": ({"tau": 4.0}, {"decay": 0.75, "input_gain": 0.25}),
    "decay_input=False": ({"decay_input": False}, {"input_gain": 1.0}),
    "v_threshold": ({"v_threshold": 0.7}, {"v_threshold": 0.7}),
    "v_reset": ({"v_reset": 0.2}, {"v_reset": 0.2, "v_rest": 0.2}),
    "v_reset=None": ({"v_reset": None}, {"v_reset": None}),
    "detach_reset": ({"detach_reset": True}, {"detach_reset": True}),
}
DELAYED = {"decay": 0.8, "v_reset": None, "reset_amount": 1 / 0.8, "detach_reset": True, "strict_threshold": True,
           "surrogate": "arctan", "width": 1 / 2}  # fmt: skip
SNNTORCH = {
    "beta": ({}, {}),
    "threshold": ({"threshold": 0.7}, {"v_threshold": 0.7, "reset_amount": 0.7 / 0.8}),
    "zero": ({"reset_mechanism": "zero"}, {"v_reset": 0.0, "reset_amount": None}),
    "none": ({"reset_mechanism": "none"}, {"reset_amount": 0.0}),
    "reset_delay=False": ({"reset_delay": False}, {"reset_amount": None, "detach_reset": False}),
}
BOX = {"decay": 0.9, "input_gain": 0.1, "strict_threshold": True, "surrogate": "fast_sigmoid", "width": 1.0,
       "surrogate_gain": 2.0}  # fmt: skip
DEFAULTS = {"tau_mem_inv": 100.0, "tau_syn_inv": 200.0, "v_leak": 0.0, "v_th": 1.0, "v_reset": 0.0, "alpha": 10.0}
NORSE = {
    "tau_mem_inv": ({}, {}),
    "tau_mem_inv, other": ({"tau_mem_inv": 250.0}, {"decay": 0.75, "input_gain": 0.25}),
    "v_leak": ({"v_leak": 0.3}, {"v_rest": 0.3}),
    "v_th": ({"v_th": 0.7}, {"v_threshold": 0.7}),
    "v_reset": ({"v_reset": 0.2}, {"v_reset": 0.2}),
    "reset_subtract": ({"reset": "subtract"}, {"v_reset": None}),
}
LEAK, SYNAPSE = math.exp(-1 / 5), math.exp(-1 / 3)
EXPONENTIAL = {"decay": LEAK, "input_gain": 1 - LEAK, "v_reset": None, "surrogate": "laplace", "width": 0.5,
               "surrogate_gain": 2.0}  # fmt: skip
ZERO, BY_06 = activation.MembraneReset(), activation.MembraneSubtract(0.6)
EACH = torch.linspace(0.4, 1.0, WHOLE[-1], dtype=torch.float64)
OF_08, PERIODIC = activation.SingleExponential(grad_width=0.8), activation.PeriodicExponential()
SINABS = {
    "tau_mem": (SINGLE, {}),
    "norm_input=False": ({"norm_input": False, **SINGLE}, {"input_gain": 1.0}),
    "spike_threshold": ({"spike_threshold": torch.tensor(0.7), **SINGLE}, {"v_threshold": 0.7, "width": 0.5 * 0.7}),
    "spike_threshold, one per neuron": (
        {"spike_threshold": EACH, **SINGLE},
        {"num_features": len(EACH), "granularity": "neuron", "v_threshold": EACH, "width": 0.5 * EACH},
    ),
    "MultiSpike": ({}, {"multi_spike": True}),
    "MembraneReset": ({"reset_fn": ZERO, **SINGLE}, {"v_reset": 0.0, "detach_reset": True}),
    "subtract_value": ({"reset_fn": BY_06, **SINGLE}, {"reset_amount": 0.6}),
    "min_v_mem": ({"min_v_mem": -0.1, **SINGLE}, {"v_min": -0.1}),
    "grad_width": ({"surrogate_grad_fn": OF_08, **SINGLE}, {"width": 0.8}),
    "PeriodicExponential": (
        {"surrogate_grad_fn": PERIODIC},
        {"multi_spike": True, "surrogate": "periodic_exponential", "surrogate_gain": 1.0},
    ),
}  # fmt: skip


def behind(synapse, gain=1.0, **options):
    """Neurons behind their current."""
    return nn.Sequential(LeakyIntegrator(decay=synapse, input_gain=gain), plain(**options))


def leaky(kind="Leaky", **options):
    return getattr(snntorch, kind)(**{"beta": 0.8, "threshold": 1.0, **options}).double()


# The library's layer, ours, the scale and the mean of the input.
ROWS = {
    **{
        f"spikingjelly, {name}": lambda theirs=theirs, ours=ours: (
            jelly("LIFNode", **theirs), plain(**{**HALF, **SIGMOID, **ours}), 2.5,
        )
        for name, (theirs, ours) in SPIKINGJELLY.items()
    },
    "spikingjelly, IFNode": lambda: (jelly("IFNode"), plain(**SIGMOID, decay=1.0), 2.5),
    "spikingjelly, current": lambda: (
        jelly("CUBALIFNode"), behind(0.5, decay=0.75, v_threshold=0.5, surrogate="rectangle"), 0.3,
    ),
    **{
        f"snntorch, {name}": lambda theirs=theirs, ours=ours: (leaky(**theirs), plain(**{**DELAYED, **ours}), 0.8)
        for name, (theirs, ours) in SNNTORCH.items()
    },
    "snntorch, Synaptic": lambda: (leaky("Synaptic", alpha=0.6), behind(0.6, **DELAYED), 0.4),
    **{
        f"norse, {name}": lambda theirs=theirs, ours=ours: (
            norses("LIFBoxCell", **{**DEFAULTS, **theirs}), plain(**{**BOX, **ours}), 15.0,
        )
        for name, (theirs, ours) in NORSE.items()
    },
    "norse, current": lambda: (norses("LIF", **DEFAULTS), behind(0.8, **BOX), 3.0),
    "norse, dt": lambda: (
        norse.LIF(norse.LIFParameters(alpha=torch.as_tensor(10.0)), dt=0.002),
        behind(0.6, **{**BOX, "decay": 0.8, "input_gain": 0.2}), 3.0,
    ),
    "norse, read-out": lambda: (
        norse.LI(), nn.Sequential(LeakyIntegrator(decay=0.8), LeakyIntegrator(decay=0.9, input_gain=0.1)), 1.0, -0.3,
    ),
    **{
        f"sinabs, {name}": lambda name=name, theirs=theirs, ours=ours: (
            sinabs.layers.LIF(tau_mem=5.0, **theirs).double(), plain(**{**EXPONENTIAL, **ours}),
            0.8 if name == "norm_input=False" else 5.0, -0.6 if name == "min_v_mem" else 0.0,
        )
        for name, (theirs, ours) in SINABS.items()
    },
    "sinabs, IAF": lambda: (
        sinabs.layers.IAF(**SINGLE).double(), plain(**{**EXPONENTIAL, "decay": 1.0, "input_gain": 1.0}), 0.8,
    ),
    "sinabs, current": lambda: (
        sinabs.layers.LIF(tau_mem=5.0, tau_syn=3.0, **SINGLE).double(), behind(SYNAPSE, SYNAPSE, **EXPONENTIAL), 3.0,
    ),
    "sinabs, read-out": lambda: (
        sinabs.layers.ExpLeak(tau_mem=5.0).double(), LeakyIntegrator(decay=LEAK), 1.0, -0.3,
    ),
    **{
        f"authors, {name}, {v_reset}": lambda kind=kind, name=name, v_reset=v_reset: (
            authors_layer(kind, made=False, steps=20, decay=0.7, thresh=0.5, vreset=v_reset).double(),
            plain(decay=0.7, v_threshold=0.5, v_reset=v_reset, scale_output=True, surrogate=name, width=1 / 2), 1.0,
        )
        for kind, name in ((InvRectangle, "rectangle"), (InvSigmoid, "sigmoid")) for v_reset in (None, 0.0)
    },
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore:asgl_cuda.LIF. a spike subtracts 0 from")
def test_rows(row):
    """Spikes, and gradients of their randomly weighted sum."""
    theirs, ours, scale, *mean = ROWS[row]()
    x_seq = (torch.rand(20, *WHOLE[1:]) * scale + sum(mean)).requires_grad_()
    expected, found = run(theirs, x_seq)[0][0], ours(x_seq)
    assert 0.02 < (found > 0).double().mean() < 0.98  # spikes and silence
    torch.testing.assert_close(found, expected, check_dtype=False)
    weights = torch.randn(expected.shape)
    gradients = [torch.autograd.grad((out * weights).sum(), x_seq)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_potentials():
    """SpikingJelly carries them; those of snnTorch are before the reset."""
    theirs, ours = jelly("LIFNode"), plain(stateful=True, store_v_seq=True, **HALF, **SIGMOID)
    for _ in range(2):
        x_seq = 2.5 * torch.rand(WHOLE)
        torch.testing.assert_close(ours(x_seq), theirs(x_seq))
        torch.testing.assert_close(ours.v_seq, theirs.v_seq)
    options = {name: value for name, value in DELAYED.items() if name not in ("surrogate", "width")}
    found = asgl_cuda.lif(x_seq, return_h_seq=True, **options).h_seq
    torch.testing.assert_close(found, run(leaky(), x_seq)[0][1])
