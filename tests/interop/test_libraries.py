"""Each library's layers against their conversions, in float64: spikes equal, states and gradients within 1e-12.

A case is a function that makes the layer, and what the report must say of it (None: not compared).
"""

import itertools
from functools import partial

import authors_code
import norse.torch as norse
import pytest
import snntorch
import torch
from conversions import SINGLE, assert_equal, steps
from norse.torch.functional import reset as resets
from sinabs import activation, layers
from sinabs.layers.alif import ALIFSqueeze
from snntorch import surrogate as slopes
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from asgl_cuda.interop.snntorch import MultiStep

T, B, N = 5, 3, 7
OWN, FLAT, READ_OUT = "its own surrogate, outside of the kernel", "slope 1 everywhere", "leaky_integrator"
pytestmark = pytest.mark.usefixtures("in_double", "spikes_in_double")


def table(kinds, variants):
    """The product of two tables of functions and options."""
    pairs = itertools.product(kinds.items(), variants.items())
    return {f"{kind}, {variant}": partial(make, **options) for (kind, make), (variant, options) in pairs}


def each(low, high):
    return torch.linspace(low, high, N, dtype=torch.float64)


# ---- SpikingJelly ----


def run_jelly(node, x_seq):
    if getattr(node, "step_mode", "m") == "m":
        out = node(x_seq)
        out = list(out) if isinstance(out, list) else [out]
    else:
        out = [torch.stack([node(x) for x in x_seq])]
    v_seq = [node.v_seq] if getattr(node, "store_v_seq", False) else []
    return [*out, node.v, *v_seq, *([node.c] if hasattr(node, "c") else [])]


def stored(kind, **options):
    """`v_seq` is stored in sequences, whether or not the constructor takes the option."""
    whole = options.pop("step_mode", "m") == "m"
    node = getattr(neuron, kind)(**options)
    node.step_mode, node.store_v_seq = "m" if whole else "s", whole
    return node


NODES = {
    "IF": partial(stored, "IFNode"),
    "LIF": partial(stored, "LIFNode", tau=2.5, decay_input=False),
    "LIF decay_input": partial(stored, "LIFNode", tau=1.6),
    "PLIF": partial(stored, "ParametricLIFNode", init_tau=2.5, decay_input=False),
    "PLIF decay_input": partial(stored, "ParametricLIFNode", init_tau=1.6),
    "LIF, a step": partial(stored, "LIFNode", step_mode="s"),
    "simple IF": neuron.SimpleIFNode,
}
RESETS = {
    f"{v_reset}, {detached}": {"v_threshold": threshold, "v_reset": v_reset, "detach_reset": detached}
    for (threshold, v_reset), detached in itertools.product([(1.0, 0.0), (0.7, -0.3), (0.8, None)], [False, True])
}
FUNCTIONS = {
    "sigmoid, width 0.25": surrogate.Sigmoid(4.0), "arctan, width 0.5": surrogate.ATan(2.0),
    "triangle, width 0.6667": surrogate.PiecewiseQuadratic(1.5), "fast_sigmoid, width 0.5": surrogate.SoftSign(2.0),
    "erf, width 0.5": surrogate.Erf(2.0), "rectangle, width 0.7692": surrogate.Rect(1.3),
    "slope 0.7 everywhere": surrogate.LeakyKReLU(0.7, 0.7),
    "rectangle, width 1.4": surrogate.PiecewiseLeakyReLU(0.7, 0.0),
}  # fmt: skip
OWN_FUNCTIONS = (
    surrogate.LeakyKReLU(0.3, 0.8), surrogate.PiecewiseLeakyReLU(0.7, 0.02), surrogate.S2NN(3.0, 0.9),
    surrogate.QPseudoSpike(1.7), surrogate.LogTailedReLU(0.1), surrogate.SquarewaveFourierSeries(3, 6.0),
)  # fmt: skip
INTEGER = {
    f"{levels} levels, {mode}": partial(
        neuron.ILIFNode, tau, 0.75, surrogate.MultiLevelSpikeCount(levels), detached, mode, store_v_seq=mode == "m"
    )
    for (tau, levels), mode, detached in itertools.product([(4 / 3, 4), (2.0, 1), (10.0, 6)], "sm", [False, True])
}
JELLY = {
    **{name: (make, None) for name, make in table(NODES, RESETS).items()},
    **{
        f"simple LIF {decays}, {v_reset}": (partial(neuron.SimpleLIFNode, 1.6, decays, v_reset=v_reset), None)
        for decays, v_reset in itertools.product([False, True], [0.0, -0.3])
    },
    **{
        f"CUBA, {v_reset}, {mode}": (
            partial(stored, "CUBALIFNode", v_threshold=0.5, v_reset=v_reset, step_mode=mode), None,
        )
        for v_reset, mode in itertools.product([0.0, -0.3, None], "sm")
    },
    **{by: (partial(stored, "LIFNode", surrogate_function=each), by) for by, each in FUNCTIONS.items()},
    **{
        f"{type(each).__name__}, {mode}": (
            partial(stored, kind, surrogate_function=each, detach_reset=True, step_mode=mode), OWN,
        )
        for each, (kind, mode) in itertools.product(OWN_FUNCTIONS, [("LIFNode", "s"), ("ParametricLIFNode", "m")])
    },
    **{name: (make, name.partition(",")[0]) for name, make in INTEGER.items()},
    **{
        f"{kind}, {decode}": (partial(getattr(neuron, kind), decode=decode), READ_OUT)
        for kind in ("NonSpikingIFNode", "NonSpikingLIFNode")
        for decode in (None, "max-mem", "max-abs-mem", "mean-mem", "last_mem")
    },
}  # fmt: skip

# ---- snnTorch ----


def run_snntorch(layer, x_seq):
    return list(layer(x_seq)) if isinstance(layer, MultiStep) else steps(layer, x_seq, hand_on=False)


def leaky(kind="Leaky", **options):
    hidden = {"init_hidden": True, "output": True}
    return getattr(snntorch, kind)(**{"beta": 0.8, "threshold": 0.9, **hidden, **options})


LEARNED = {"learn_beta": True, "learn_threshold": True}
NEURONS = {
    "Leaky": leaky,
    "Leaky, handed on": partial(leaky, init_hidden=False),
    "Leaky, learned": partial(leaky, **LEARNED),
    "Leaky, at once": partial(leaky, reset_delay=False),
    "Leaky, at once, learned": partial(leaky, **LEARNED, reset_delay=False),
    "Leaky, by neuron": lambda **options: leaky(beta=each(0.3, 0.9), learn_beta=True, **options),
    "Synaptic": partial(leaky, "Synaptic", alpha=0.7),
    "Synaptic, learned": lambda **options: leaky(
        "Synaptic", alpha=each(0.3, 0.9), learn_alpha=True, **LEARNED, **options
    ),
    "Synaptic, at once": partial(leaky, "Synaptic", alpha=0.7, reset_delay=False, learn_alpha=True),
    "Lapicque": partial(leaky, "Lapicque"),
    "Lapicque, R and C": partial(leaky, "Lapicque", beta=False, R=0.5, C=3, time_step=0.8, learn_threshold=True),
}
MECHANISMS = {how: {"reset_mechanism": how} for how in ("subtract", "zero", "none")}
# A learned value at the ends of its clamp, where threshold / beta has no gradient.
ENDS = (-0.5, 0.0, 1e-7, 1e-4, 0.3, 1.0, 1.5)
SLOPES = {
    "arctan, width 0.3333": slopes.atan(alpha=3.0),
    "fast_sigmoid, width 0.2, gradient times 0.4": slopes.fast_sigmoid(5),
    "sigmoid, width 0.2": slopes.sigmoid(slope=5), FLAT: slopes.straight_through_estimator(),
}  # fmt: skip
OWN_SLOPES = {
    "spike rate escape": slopes.spike_rate_escape(beta=1.3, slope=2.0),
    "triangular": slopes.triangular(threshold=0.7),
    "heaviside": slopes.heaviside(),
    "sparse": slopes.SFS(slope=3, B=-0.4),
}
SNNTORCH = {
    **{
        name: (make, None)
        for name, make in table(NEURONS, MECHANISMS).items()
        if name.startswith("Leaky") or "zero" not in name
    },
    **{by: (partial(leaky, spike_grad=each), by) for by, each in SLOPES.items()},
    **{
        f"{name}, {kind}, {how}": (partial(leaky, kind, spike_grad=each, reset_mechanism=how, **more), OWN)
        for name, each in OWN_SLOPES.items()
        for kind, how, more in (
            ("Leaky", "subtract", LEARNED), ("Leaky", "zero", {}), ("Leaky", "none", LEARNED),
            ("Synaptic", "subtract", {"alpha": 0.6, "learn_alpha": True}), ("Lapicque", "subtract", {}),
        )
    },
    **{
        f"{kind}, {name} {value}": (
            partial(leaky, kind, **{**more, name: value, f"learn_{name}": True}), None,
        )
        for (kind, name, more), value in itertools.product(
            [("Leaky", "beta", {}), ("Synaptic", "beta", {"alpha": 0.5}), ("Synaptic", "alpha", {})], ENDS
        )
    },
}  # fmt: skip

# ---- Norse ----


def run_norse(layer, x_seq):
    state = getattr(layer, "kept", None)
    if isinstance(layer, norse.module.snn.SNNCell):
        rows = []
        for x in x_seq:
            out, state = layer(x, state)
            rows.append(out)
        s, states = torch.stack(rows), state
    else:
        s, states = layer(x_seq, state)
        state = type(states)(*(value[-1] for value in states)) if layer.record_states else states
    layer.kept = state
    return [s, *states]


def neurons_of_norse(kind, parameters=None, learned=False, records=False, reset="value", **given):
    """Parameters are the user's in Norse: of the layer if learned."""
    name = kind.removesuffix("Cell").removesuffix("Box") if "Box" not in kind else "LIFBox"
    values = {"v_th": 0.6, "v_reset": -0.2, "tau_syn_inv": 300.0, "tau_mem_inv": 400.0, "v_leak": 0.125, **given}
    made = getattr(norse, f"{name}Parameters")
    values = {key: torch.as_tensor(value) for key, value in values.items() if key in made._fields and key != "method"}
    if learned:
        values = {key: nn.Parameter(value) for key, value in values.items() if key != "alpha"}
    more = {"method": given["method"]} if "method" in given else {}
    if "reset_method" in made._fields:
        more["reset_method"] = getattr(resets, f"reset_{reset}")
    layer = getattr(norse, kind)(made(**values, **more))
    for key, value in values.items():
        if learned:
            layer.register_parameter(key, value)
    if records:
        layer.record_states = True
    return layer


METHODS = ("super", "triangle", "tanh", "heavi_erfc")
ADAPTING = {"tau_adapt_inv": 100.0, "beta": 0.8}
NORSE = {
    **{
        f"LIFBoxCell, {method}, {reset}": (
            partial(neurons_of_norse, "LIFBoxCell", method=method, alpha=1.7, reset=reset), None,
        )
        for method, reset in itertools.product(METHODS, ("value", "subtract"))
    },
    **{
        f"{kind}, {method}, {learned}": (
            partial(neurons_of_norse, kind, method=method, learned=learned, records=learned and "Cell" not in kind),
            None,
        )
        for kind, method, learned in itertools.product(
            ("LIF", "LIFCell", "IAF", "IAFCell"), ("super", "triangle"), (False, True)
        )
    },
    **{
        f"{kind}, {method}, {learned}, {list(more)}": (
            partial(
                neurons_of_norse, kind, method=method, learned=learned, alpha=2.0, records=learned and kind == "LSNN",
                **{**ADAPTING, **more},
            ), None,
        )
        for kind, method, learned in itertools.product(("LSNN", "LSNNCell"), METHODS, (False, True))
        for more in ({}, {"beta": each(0.3, 1.2)})
    },
    "LI": (norse.LI, READ_OUT),
    "LI, records": (partial(neurons_of_norse, "LI", learned=True, records=True), READ_OUT),
    "LI, learned": (partial(neurons_of_norse, "LI", learned=True), READ_OUT),
}  # fmt: skip

# ---- sinabs ----


def run_sinabs(layer, x_seq):
    squeezed = hasattr(layer, "num_timesteps")
    x = x_seq.transpose(0, 1)
    out = layer(x.flatten(0, 1) if squeezed else x)
    out = out.unflatten(0, x.shape[:2]) if squeezed else out
    states = [layer.v_mem, *(getattr(layer, name) for name in ("i_syn", "b") if getattr(layer, name, None) is not None)]
    recorded = [layer.recordings[name].transpose(0, 1) for name in sorted(layer.recordings)]
    return [out.transpose(0, 1), *states, *recorded]


def of_sinabs(kind, **options):
    return getattr(layers, kind)(**{"record_states": True, "spike_threshold": torch.tensor(0.8), **options})


MAX, TO_ZERO = activation.MaxSpike, {"reset_fn": activation.MembraneReset()}
GAUSSIAN, PERIODIC = activation.Gaussian(0.0, 0.6, 0.8), activation.PeriodicExponential(0.4, 1.7)
BY_PERIODIC, BY_GAUSSIAN = (
    "periodic_exponential, width 0.4, gradient times 1.36", f"erf, width {0.6 * 2**0.5:.4g}, gradient times 0.8",
)  # fmt: skip
FIRING = {
    "SingleSpike": (SINGLE, None),
    "SingleSpike, Gaussian": ({**SINGLE, "surrogate_grad_fn": GAUSSIAN}, BY_GAUSSIAN),
    "MaxSpike(1)": ({"spike_fn": MAX(1)}, None),
    "MaxSpike(1), 0.4": ({"spike_fn": MAX(1), "reset_fn": activation.MembraneSubtract(0.4)}, None),
    "SingleSpike, to 0": ({**SINGLE, **TO_ZERO}, None),
    "MaxSpike(2)": ({"spike_fn": MAX(2)}, None),
    "MaxSpike(3), 0.4": ({"spike_fn": MAX(3), "reset_fn": activation.MembraneSubtract(0.4)}, None),
    "MaxSpike(), periodic": ({"spike_fn": MAX(), "surrogate_grad_fn": PERIODIC}, BY_PERIODIC),
    "MultiSpike": ({}, None),
    "MultiSpike, periodic": ({"surrogate_grad_fn": PERIODIC}, BY_PERIODIC),
    "MaxSpike(3), to 0": ({"spike_fn": MAX(3), **TO_ZERO}, OWN),
    "MultiSpike, to 0": (TO_ZERO, OWN),
    "MaxSpike(2), Heaviside": ({"spike_fn": MAX(2), "surrogate_grad_fn": activation.Heaviside(0.5), **TO_ZERO}, OWN),
    "SingleSpike, MultiGaussian": ({**SINGLE, "surrogate_grad_fn": activation.MultiGaussian(0.0, 0.6), **TO_ZERO}, OWN),
}
LEAKS = {
    "IAF": ("IAF", {}),
    "LIF": ("LIF", {"tau_mem": 3.0, "norm_input": False}),
    "LIF, floor": ("LIF", {"tau_mem": 3.0, "min_v_mem": -0.3, "train_alphas": True}),
    "LIF, current": ("LIF", {"tau_mem": 3.0, "tau_syn": 2.0, "norm_input": False}),
}
ADAPTIVE = {
    "": {}, "current": {"tau_syn": 3.0}, "learned": {"train_alphas": True, "norm_input": False},
    "by neuron": {"tau_adapt": each(5, 20), "adapt_scale": each(0.4, 1.8), "norm_input": False},
}  # fmt: skip
THRESHOLDS = {"one": torch.tensor(0.8), "each": each(0.5, 1.2)}
SINABS = {
    **{
        f"{leak}, {firing}, {threshold}": (partial(of_sinabs, kind, spike_threshold=value, **{**options, **more}), by)
        for (leak, (kind, options)), (firing, (more, by)), (threshold, value) in itertools.product(
            LEAKS.items(), FIRING.items(), THRESHOLDS.items()
        )
        if threshold == "one" or firing not in ("MaxSpike(2), Heaviside", "SingleSpike, MultiGaussian")
    },
    **{
        f"{kind}, {options}": (partial(of_sinabs, kind, batch_size=B, **options), None)
        for kind, options in (
            ("LIFSqueeze", {"tau_mem": 2.0}), ("IAFSqueeze", SINGLE),
            ("IAFSqueeze", {"min_v_mem": torch.full((N,), -1)}),
            ("LIFSqueeze", {"tau_mem": 3.0, "tau_syn": each(1, 4), "train_alphas": True}),
            ("LIFSqueeze", {"tau_mem": each(1, 5), "norm_input": False, **SINGLE}),
        )
    },
    **{
        f"ALIF {name}, {surrogate_}, {reset}{squeezed}": (
            lambda options=options, function=function, reset_fn=reset_fn, squeezed=squeezed: (
                partial(ALIFSqueeze, batch_size=B) if squeezed else layers.ALIF
            )(
                **{"tau_mem": 5.0, "tau_adapt": 8.0, "adapt_scale": 1.2, "spike_threshold": torch.tensor(0.8),
                   "surrogate_grad_fn": function, "reset_fn": reset_fn, "record_states": True, **options}
            ), None,
        )
        for (name, options), (surrogate_, function), (reset, reset_fn), squeezed in itertools.product(
            ADAPTIVE.items(),
            {
                "exponential": activation.SingleExponential(0.6, 1.3), "gaussian": GAUSSIAN,
                "heaviside": activation.Heaviside(0.3),
            }.items(),
            {
                "to 0": TO_ZERO["reset_fn"], "0.7": activation.MembraneSubtract(0.7),
                "subtract": activation.MembraneSubtract(),
            }.items(),
            ("", ", squeezed"),
        )
        if surrogate_ != "heaviside" or reset == "to 0"
    },
    **{
        f"{kind}, {options}": (
            partial(getattr(layers, kind), tau_mem=each(1, 5), record_states=True, **options), READ_OUT,
        )
        for kind, options in (
            ("ExpLeak", {}), ("ExpLeak", {"norm_input": True}), ("ExpLeak", {"train_alphas": True}),
            ("ExpLeakSqueeze", {"batch_size": B}),
        )
    },
}  # fmt: skip

# ---- the authors' code ----


def run_authors(layer, x_seq):
    return [layer(x_seq), layer.vmem]


def of_authors(kind, granularity, v_reset, p):
    """All elements are hard or all are smooth, since the libraries draw different noise."""
    function = authors_code.EfficientNoisySpikeII(kind(2.0, granularity=granularity), p=p)
    layer = authors_code.LIFLayer(T, spike_fn=function, decay=0.6, thresh=0.7, vreset=v_reset)
    layer(torch.zeros(T, B, N, 2, 2))  # makes the widths
    return layer


AUTHORS = {
    f"{kind.__name__}, {granularity}, {v_reset}, {p}": (partial(of_authors, kind, granularity, v_reset, p), None)
    for kind, granularity, v_reset, p in itertools.product(
        (authors_code.InvRectangle, authors_code.InvSigmoid), ("layer", "channel", "neuron"), (None, 0.1), (0.0, 1.0)
    )
}


@pytest.mark.parametrize("name", JELLY)
def test_spikingjelly(name):
    assert_equal(*JELLY[name], run_jelly, (T, B, N), scale=4.0 if "levels" in name else 2.5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", SNNTORCH)
def test_snntorch(name, whole):
    if (whole and "at once, subtract" in name) or (whole and "at once, learned, subtract" in name):
        with pytest.raises(ValueError, match="needs reset_delay=True, got False"):
            MultiStep(SNNTORCH[name][0]())
        return
    assert_equal(*SNNTORCH[name], run_snntorch, (T, B, N), wrap=MultiStep if whole else None)


@pytest.mark.parametrize("name", NORSE)
def test_norse(name):
    # The first step of LIF and LI is float32 in Norse.
    rtol = 1e-7 if name.startswith(("LIF, ", "LI,")) else 1e-12
    assert_equal(*NORSE[name], run_norse, (T, B, N), scale=3.0, rtol=rtol)


@pytest.mark.parametrize("name", SINABS)
def test_sinabs(name):
    assert_equal(*SINABS[name], run_sinabs, (T, B, N), scale=6.0 if "ALIF" in name else 4.0)


@pytest.mark.parametrize("name", AUTHORS)
def test_authors(name):
    assert_equal(*AUTHORS[name], run_authors, (T, B, N, 2, 2), fires=name.endswith("0.0"), modes=(True,))
