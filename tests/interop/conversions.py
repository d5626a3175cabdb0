"""Layers of other libraries, one table; how each is called; and the comparison of models with their conversions."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import authors_code
import norse.torch as norse
import sinabs.layers
import snntorch
import torch
from norse.torch.functional import reset as resets
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from sinabs import activation
from snntorch import surrogate as slopes
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn

import asgl_cuda
from asgl_cuda.interop.converted import Converted
from asgl_cuda.interop.fuse import Fused
from asgl_cuda.interop.snntorch import MultiStep

T, B, N, C = 5, 3, 7, 3  # steps, batch, neurons, and channels in models to fuse
SINGLE = {"spike_fn": activation.SingleSpike}
FLAT, READ_OUT = "slope 1 everywhere", "leaky_integrator"


class Case(NamedTuple):
    """A layer to convert."""

    make: Callable[..., nn.Module]
    by: str | None = None  # what the report says of it; None: not compared
    shape: tuple[int, ...] = (B, N)  # of the input of a step
    scale: float = 2.5
    rtol: float = 1e-12
    fires: bool = True  # else values are smooth


def each(low, high):
    """A value for each neuron."""
    return torch.linspace(low, high, N, dtype=torch.float64)


def turns(*columns):
    """Rows in which each value of each column occurs: as many as the longest has, the others repeated."""
    longest = max(map(len, columns))
    return zip(*(itertools.islice(itertools.cycle(column), longest) for column in columns), strict=True)


# ---- SpikingJelly ----


def node(kind, step_mode="m", **options):
    """`v_seq` is stored in sequences, whether or not the constructor takes the option."""
    made = getattr(neuron, kind)(**options)
    made.step_mode, made.store_v_seq = step_mode, step_mode == "m"
    return made


NODES = {
    "IF": partial(node, "IFNode"),
    "LIF": partial(node, "LIFNode", tau=2.5, decay_input=False),
    "LIF decay_input": partial(node, "LIFNode", tau=1.6),
    "PLIF": partial(node, "ParametricLIFNode", init_tau=2.5, decay_input=False),
    "PLIF decay_input": partial(node, "ParametricLIFNode", init_tau=1.6),
    "LIF, a step": partial(node, "LIFNode", step_mode="s"),
    "simple IF": neuron.SimpleIFNode,
}
FUNCTIONS = {
    "sigmoid, width 0.25": surrogate.Sigmoid(4.0), "arctan, width 0.5": surrogate.ATan(2.0),
    "triangle, width 0.6667": surrogate.PiecewiseQuadratic(1.5), "fast_sigmoid, width 0.5": surrogate.SoftSign(2.0),
    "erf, width 0.5": surrogate.Erf(2.0), "rectangle, width 0.7692": surrogate.Rect(1.3),
    "laplace, width 0.5": surrogate.PiecewiseExp(2.0),
    "slope 0.7 everywhere": surrogate.LeakyKReLU(0.7, 0.7),
    "rectangle, width 1.4": surrogate.PiecewiseLeakyReLU(0.7, 0.0),
}  # fmt: skip
RESETS = ((1.0, 0.0), (0.7, -0.3), (0.8, None))


def levels(most, tau, mode):
    count = surrogate.MultiLevelSpikeCount(most)
    return neuron.ILIFNode(tau, 0.75, count, tau == 2.0, mode, store_v_seq=mode == "m")


JELLY = {
    **{
        f"{kind}, {v_reset}": Case(
            partial(NODES[kind], v_threshold=threshold, v_reset=v_reset, detach_reset=bool(number % 2))
        )
        for number, (kind, (threshold, v_reset)) in enumerate(itertools.product(NODES, RESETS))
    },
    "simple LIF": Case(partial(neuron.SimpleLIFNode, 1.6, False)),
    "simple LIF, -0.3": Case(partial(neuron.SimpleLIFNode, 1.6, True, v_reset=-0.3)),
    **{
        f"CUBA, {v_reset}": Case(partial(node, "CUBALIFNode", mode, v_threshold=0.5, v_reset=v_reset))
        for v_reset, mode in ((0.0, "s"), (-0.3, "m"), (None, "m"))
    },
    **{by: Case(partial(node, "LIFNode", surrogate_function=function), by) for by, function in FUNCTIONS.items()},
    **{
        f"{most} levels": Case(partial(levels, most, tau, mode), f"{most} levels", scale=4.0)
        for most, tau, mode in ((4, 4 / 3, "s"), (1, 2.0, "m"), (6, 10.0, "m"))
    },
    **{
        f"read-out, {decode}": Case(partial(getattr(neuron, kind), decode=decode), READ_OUT)
        for decode, kind in turns(
            (None, "max-mem", "max-abs-mem", "mean-mem", "last_mem"), ("NonSpikingIFNode", "NonSpikingLIFNode")
        )
    },
}  # fmt: skip

# ---- snnTorch ----


def leaky(kind="Leaky", **options):
    hidden = {"init_hidden": True, "output": True}
    return getattr(snntorch, kind)(**{"beta": 0.8, "threshold": 0.9, **hidden, **options})


def by_neuron(name="beta", **options):
    return leaky(**{name: each(0.3, 0.9), f"learn_{name}": True, **options})


def lapicque_by_neuron(**options):
    made = leaky("Lapicque", beta=False, R=0.5, C=3, time_step=1.2, **options)
    made.R = each(0.2, 0.9)  # which the constructor does not take
    return made


LEARNED = {"learn_beta": True, "learn_threshold": True}
SYNAPTIC = {"kind": "Synaptic", "alpha": 0.7}
MECHANISMS = ("subtract", "zero", "none")
NEURONS = {
    "Leaky": (leaky, MECHANISMS),
    "Leaky, handed on": (partial(leaky, init_hidden=False), MECHANISMS),
    "Leaky, learned": (partial(leaky, **LEARNED), MECHANISMS),
    "Leaky, at once": (partial(leaky, reset_delay=False), MECHANISMS),
    "Leaky, at once, learned": (partial(leaky, **LEARNED, reset_delay=False), ("subtract", "zero")),
    "Leaky, each": (by_neuron, ("subtract", "none")),
    "Synaptic": (partial(leaky, **SYNAPTIC), ("subtract", "none")),
    "Synaptic, learned": (partial(by_neuron, "alpha", kind="Synaptic", **LEARNED), ("subtract", "none")),
    "Synaptic, at once": (partial(leaky, **SYNAPTIC, reset_delay=False, learn_alpha=True), ("subtract", "none")),
    "Lapicque": (partial(leaky, "Lapicque"), ("none",)),
    "Lapicque, R and C": (
        partial(leaky, "Lapicque", beta=False, R=0.5, C=3, time_step=0.8, learn_threshold=True), ("subtract", "none"),
    ),
    "Lapicque, a negative decay": (
        partial(leaky, "Lapicque", beta=False, R=0.5, C=3, time_step=2.0), ("subtract", "none"),
    ),
    "Lapicque, negative decays and others": (lapicque_by_neuron, ("subtract", "none")),
}  # fmt: skip
SLOPES = {
    "arctan, width 0.3333": slopes.atan(alpha=3.0),
    "fast_sigmoid, width 0.2, gradient times 0.4": slopes.fast_sigmoid(5),
    "sigmoid, width 0.2": slopes.sigmoid(slope=5), FLAT: slopes.straight_through_estimator(),
}  # fmt: skip
# A learned value at the ends of its clamp, where threshold / beta has no gradient.
ENDS = {"beta": (-0.5, 0.0, 1e-7, 1e-4, 1.0, 1.5), "alpha": (-0.5, 1.5)}
SNNTORCH = {
    **{
        f"{name}, {how}": Case(partial(make, reset_mechanism=how))
        for name, (make, mechanisms) in NEURONS.items()
        for how in mechanisms
    },
    **{by: Case(partial(leaky, spike_grad=slope), by) for by, slope in SLOPES.items()},
    **{
        f"{name} {value}": Case(
            partial(leaky, **{**(SYNAPTIC if name == "alpha" else {}), name: value, f"learn_{name}": True})
        )
        for name, values in ENDS.items()
        for value in values
    },
}  # fmt: skip
NOT_WHOLE = ("Leaky, at once, subtract", "Leaky, at once, learned, subtract", "Synaptic, at once, subtract")

# ---- Norse ----


def norses(kind, learned=False, reset="value", records=None, **given):
    """Parameters are the user's in Norse: of the layer if learned."""
    made = getattr(norse, f"{kind.removesuffix('Cell')}Parameters")
    values = {"v_th": 0.6, "v_reset": -0.2, "tau_syn_inv": 300.0, "tau_mem_inv": 400.0, "v_leak": 0.125, **given}
    values = {key: torch.as_tensor(value) for key, value in values.items() if key in made._fields and key != "method"}
    if learned:
        values = {key: nn.Parameter(value) for key, value in values.items() if key != "alpha"}
    more = {"method": given["method"]} if "method" in given else {}
    if "reset_method" in made._fields:
        more["reset_method"] = getattr(resets, f"reset_{reset}")
    result = getattr(norse, kind)(made(**values, **more))
    for key, value in values.items() if learned else ():
        result.register_parameter(key, value)
    if "Cell" not in kind:
        result.record_states = learned if records is None else records
    return result


METHODS = ("super", "triangle", "tanh", "heavi_erfc")
NORSE = {
    **{
        f"LIFBoxCell, {method}": Case(partial(norses, "LIFBoxCell", method=method, alpha=1.7, reset=reset))
        for method, reset in turns(METHODS, ("value", "subtract"))
    },
    **{
        f"{kind}, {method}": Case(
            partial(norses, kind, learned, method=method), rtol=1e-7 if kind == "LIF" else 1e-12
        )  # The first step of LIF and LI is float32 in Norse.
        for kind in ("LIF", "LIFCell", "IAF", "IAFCell")
        for method, learned in (("super", True), ("triangle", False))
    },
    "LI": Case(norse.LI, READ_OUT, rtol=1e-6),
    "LI, learned": Case(partial(norses, "LI", True, records=False), READ_OUT, rtol=1e-6),
    "LI, records": Case(partial(norses, "LI", True), READ_OUT, rtol=1e-6),
}  # fmt: skip

# ---- sinabs ----


def sinabs_layer(kind, **options):
    return getattr(sinabs.layers, kind)(**{"record_states": True, "spike_threshold": torch.tensor(0.8), **options})


MAX, TO_ZERO, BY_04 = activation.MaxSpike, activation.MembraneReset(), activation.MembraneSubtract(0.4)
GAUSSIAN, PERIODIC = activation.Gaussian(0.0, 0.6, 0.8), activation.PeriodicExponential(0.4, 1.7)
BY_PERIODIC, BY_GAUSSIAN = (
    "periodic_exponential, width 0.4, gradient times 1.36", f"erf, width {0.6 * 2**0.5:.4g}, gradient times 0.8",
)  # fmt: skip
FIRING = {
    "SingleSpike": (SINGLE, None),
    "SingleSpike, Gaussian": ({**SINGLE, "surrogate_grad_fn": GAUSSIAN}, BY_GAUSSIAN),
    "MaxSpike(1)": ({"spike_fn": MAX(1)}, None),
    "MaxSpike(1), 0.4": ({"spike_fn": MAX(1), "reset_fn": BY_04}, None),
    "SingleSpike, to 0": ({**SINGLE, "reset_fn": TO_ZERO}, None),
    "MaxSpike(2)": ({"spike_fn": MAX(2)}, None),
    "MaxSpike(3), 0.4": ({"spike_fn": MAX(3), "reset_fn": BY_04}, None),
    "MaxSpike(), periodic": ({"spike_fn": MAX(), "surrogate_grad_fn": PERIODIC}, BY_PERIODIC),
    "MultiSpike": ({}, None),
    "MultiSpike, periodic": ({"surrogate_grad_fn": PERIODIC}, BY_PERIODIC),
}  # fmt: skip
LEAKS = (
    ("IAF", {}),
    ("LIF", {"tau_mem": 3.0, "norm_input": False}),
    ("LIF", {"tau_mem": 3.0, "min_v_mem": -0.3, "train_alphas": True}),
    ("LIF", {"tau_mem": 3.0, "tau_syn": 2.0, "norm_input": False}),
)
SINABS = {
    **{
        f"{kind} {number}, {firing}": Case(
            partial(sinabs_layer, kind, **{**options, **more}, **({"spike_threshold": each(0.5, 1.2)} if own else {})),
            by, scale=4.0,
        )
        for row, (firing, (more, by)) in enumerate(FIRING.items())
        for number, (kind, options) in enumerate(LEAKS)
        if number % 2 == row % 2
        for own in (number // 2 == row // 2 % 2,)
    },
    **{
        f"{kind}, {list(options)}": Case(partial(sinabs_layer, kind, batch_size=B, **options), scale=4.0)
        for kind, options in (
            ("IAFSqueeze", {"min_v_mem": torch.full((N,), -1)}),
            ("LIFSqueeze", {"tau_mem": 3.0, "tau_syn": each(1, 4), "train_alphas": True}),
            ("LIFSqueeze", {"tau_mem": each(1, 5), "norm_input": False, **SINGLE}),
        )
    },
    **{
        f"{kind}, {options}": Case(
            partial(getattr(sinabs.layers, kind), tau_mem=each(1, 5), record_states=True, **options), READ_OUT
        )
        for kind, options in (
            ("ExpLeak", {"norm_input": True}), ("ExpLeak", {"train_alphas": True}),
            ("ExpLeakSqueeze", {"batch_size": B}),
        )
    },
}  # fmt: skip

# ---- the authors' code ----


def authors_layer(kind=authors_code.InvSigmoid, p=0.0, steps=T, made=True, granularity="layer", **options):
    """All elements are hard or all are smooth where outputs are compared, since the libraries draw different noise."""
    function = authors_code.EfficientNoisySpikeII(kind(2.0, granularity=granularity), p=p)
    result = authors_code.LIFLayer(steps, spike_fn=function, **options)
    if made:
        result(torch.zeros(steps, B, N, 2, 2))  # makes the widths
    return result


AUTHORS = {
    f"{kind.__name__}, {granularity}": Case(
        partial(authors_layer, kind, p, granularity=granularity, decay=0.6, thresh=0.7, vreset=v_reset),
        shape=(B, N, 2, 2), fires=p == 0,
    )
    for (kind, granularity), p, v_reset in turns(
        list(itertools.product((authors_code.InvRectangle, authors_code.InvSigmoid), ("layer", "channel", "neuron"))),
        (0.0, 1.0), (None, None, 0.1, 0.1),
    )
}  # fmt: skip

# ---- neurons whose spikes return to them ----

Linear, ElementWise = layer.LinearRecurrentContainer, layer.ElementWiseRecurrentContainer
ATAN = {"spike_grad": slopes.atan(alpha=2.0)}
ALL = {"linear_features": N, **ATAN}
ONE = {"all_to_all": False, **ATAN}
HERE = {"init_hidden": True}


def norse_values(**values):
    given = {"tau_mem_inv": 400.0, "alpha": 2.0, "v_th": 0.3, **values}
    return norse.LIFParameters(**{name: torch.as_tensor(value) for name, value in given.items()})


def sinabs_recurrent(*values, connection=None, kind="LIFRecurrent", **options):
    connection = nn.Linear(N, N) if connection is None else connection
    return getattr(sinabs.layers, kind)(*values, rec_connect=connection, **SINGLE, **options).double()


RECURRENT = {
    "RLeaky": Case(lambda: snntorch.RLeaky(0.8, **ALL, **LEARNED)),
    "RLeaky, each": Case(lambda: snntorch.RLeaky(each(0.5, 0.9), V=each(-0.5, 1.0), **ONE, **LEARNED)),
    "RLeaky, state inside": Case(lambda: snntorch.RLeaky(0.8, V=0.5, **ONE, **HERE, output=True), None, (B, 2, N)),
    "RLeaky, spikes alone": Case(lambda: snntorch.RLeaky(0.8, learn_recurrent=False, **ALL, **HERE)),
    "RLeaky, none": Case(lambda: snntorch.RLeaky(0.8, reset_mechanism="none", **ALL)),
    "RLeaky, values of other shapes": Case(
        lambda: snntorch.RLeaky(torch.linspace(0.5, 0.9, 2 * N).reshape(2, N), V=0.5, **ONE, **LEARNED), None, (B, 2, N)
    ),
    "RLeaky, forgets": Case(lambda: snntorch.RLeaky(1e-4, learn_beta=True, **ALL)),
    "RSynaptic": Case(lambda: snntorch.RSynaptic(0.7, 0.8, learn_alpha=True, **ALL, **LEARNED)),
    "RSynaptic, each": Case(
        lambda: snntorch.RSynaptic(each(0.2, 0.8), each(0.5, 0.9), V=each(-0.5, 1.0), **ONE, **LEARNED)
    ),
    "RSynaptic, spikes alone": Case(lambda: snntorch.RSynaptic(0.7, 0.8, **ALL, **HERE)),
    "LIFRecurrent": Case(lambda: norse.LIFRecurrent(4, N, norse_values()), None, (B, 4)),
    "LIFRecurrent, recorded": Case(
        lambda: norse.LIFRecurrent(4, N, norse_values(v_leak=0.125, v_reset=-0.25), record_states=True, autapses=True),
        None, (B, 2, 4),
    ),
    "LIFRecurrent, each": Case(
        lambda: norse.LIFRecurrent(4, N, norse_values(tau_mem_inv=each(300, 600), tau_syn_inv=each(100, 200))),
        None, (B, 4),
    ),
    "LIFRecurrentCell": Case(lambda: norse.LIFRecurrentCell(4, N, norse_values()), None, (B, 4)),
    "sinabs": Case(lambda: sinabs_recurrent(3.0)),
    "sinabs, each": Case(lambda: sinabs_recurrent(each(2.0, 4.0), tau_syn=each(1.0, 3.0), train_alphas=True)),
    "sinabs, reset": Case(
        lambda: sinabs_recurrent(3.0, connection=nn.Linear(N, N, bias=False), reset_fn=TO_ZERO, norm_input=False)
    ),
    "sinabs IAF": Case(
        lambda: sinabs_recurrent(kind="IAFRecurrent", tau_syn=2.0, reset_fn=activation.MembraneSubtract(0.5)),
        None, (B, 2, N),
    ),
    "container": Case(lambda: Linear(neuron.LIFNode(v_reset=0.25), N, N, step_mode="m"), scale=9.0),
    "container, a step": Case(lambda: Linear(neuron.LIFNode(v_reset=None), N, N), scale=9.0),
    "container of a Linear": Case(
        lambda: Linear(nn.Sequential(nn.Linear(4, N), neuron.ParametricLIFNode()), 4, N, step_mode="m"),
        None, (B, 2, 4), 9.0,
    ),
    "container, CUBALIFNode": Case(lambda: Linear(neuron.CUBALIFNode(), N, N, bias=False, step_mode="m"), scale=9.0),
    "element-wise": Case(
        lambda: ElementWise(neuron.IFNode(v_reset=None), lambda y, x: x - 0.3 * y, step_mode="m"), None, (B, 2, N)
    ),
    "element-wise, no batch": Case(
        lambda: ElementWise(neuron.LIFNode(v_threshold=0.5), torch.add, step_mode="m"), None, ()
    ),
    "element-wise, a step": Case(
        lambda: ElementWise(neuron.LIFNode(decay_input=False, detach_reset=True), lambda y, x: y + x)
    ),
}  # fmt: skip
CASES = {**JELLY, **SNNTORCH, **NORSE, **SINABS, **AUTHORS, **RECURRENT}

# A layer of each class, for the questions that are not about its equations.
WHOLE, STEP = (T, B, N), (B, N)
LAYERS = {
    "IFNode": (lambda: neuron.IFNode(step_mode="m"), WHOLE),
    "LIFNode": (lambda: neuron.LIFNode(step_mode="m"), WHOLE),
    "LIFNode, a step": (neuron.LIFNode, STEP),
    "ParametricLIFNode": (lambda: neuron.ParametricLIFNode(step_mode="m"), WHOLE),
    "ParametricLIFNode, a step": (neuron.ParametricLIFNode, STEP),
    "SimpleLIFNode": (lambda: neuron.SimpleLIFNode(2.0, True, step_mode="m"), WHOLE),
    "CUBALIFNode": (partial(node, "CUBALIFNode"), WHOLE),
    "NonSpikingLIFNode": (lambda: neuron.NonSpikingLIFNode(decode="last_mem"), WHOLE),
    "Leaky": (lambda: snntorch.Leaky(beta=0.5), STEP),
    "Leaky, zero": (lambda: snntorch.Leaky(beta=0.5, reset_mechanism="zero"), STEP),
    "Leaky, none": (lambda: snntorch.Leaky(beta=0.5, reset_mechanism="none"), STEP),
    "Leaky without delay": (lambda: snntorch.Leaky(beta=0.5, reset_delay=False), STEP),
    "Leaky, each": (lambda: snntorch.Leaky(beta=torch.full((N,), 0.5), learn_beta=True), STEP),
    "Leaky, state inside": (lambda: snntorch.Leaky(beta=0.5, init_hidden=True, output=True), STEP),
    "Lapicque": (lambda: snntorch.Lapicque(beta=0.5), STEP),
    "Synaptic": (lambda: snntorch.Synaptic(alpha=0.5, beta=0.5), STEP),
    "norse LIF": (norse.LIF, WHOLE),
    "norse LIFCell": (norse.LIFCell, STEP),
    "norse LIFBoxCell": (norse.LIFBoxCell, STEP),
    "norse IAF": (norse.IAF, WHOLE),
    "norse LI": (norse.LI, WHOLE),
    "sinabs LIF": (lambda: sinabs.layers.LIF(2.0, **SINGLE), WHOLE),
    "sinabs LIF, several": (lambda: sinabs.layers.LIF(2.0), WHOLE),
    "sinabs LIF, tau_syn": (lambda: sinabs.layers.LIF(2.0, tau_syn=2.0, record_states=True), WHOLE),
    "sinabs LIFSqueeze": (lambda: sinabs.layers.LIFSqueeze(tau_mem=2.0, batch_size=3), STEP),
    "sinabs ExpLeak": (lambda: sinabs.layers.ExpLeak(2.0), WHOLE),
    "authors": (partial(authors_layer, made=False), WHOLE),
}


# ---- calls ----


def flat(value):
    """All tensors in a nested output."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, (tuple, list)) else []


def run(made, x_seq, state=()):
    """A layer's outputs and states for [T, B, ...], in steps where it takes these; and what the next call is given."""
    if isinstance(made, sinabs.layers.StatefulLayer):
        squeezed, x = hasattr(made, "num_timesteps"), x_seq.transpose(0, 1)
        out = made(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if squeezed else made(x)
        states = (getattr(made, name, None) for name in ("v_mem", "i_syn"))
        recorded = (made.recordings[name].transpose(0, 1) for name in sorted(made.recordings))
        return [out.transpose(0, 1), *(each for each in states if each is not None), *recorded], ()
    if isinstance(made, authors_code.LIFLayer):
        return [made(x_seq), made.vmem], ()
    if isinstance(made, (SNN, SNNRecurrent)):
        out, states = made(x_seq, *state)
        last = type(states)(*(value[-1] for value in states)) if made.record_states else states
        return [out, *states], (last,)
    if isinstance(made, MultiStep):
        found, returning = flat(made(x_seq, *state)), "R" in type(made.layer).__name__
        return found, tuple(value[-1] for value in found) if returning and not made.layer.init_hidden else ()
    if isinstance(made, snntorch.SpikingNeuron):
        rows, returning = [], type(made).__name__.removeprefix("Converted").startswith("R")
        for x in x_seq:
            row = out if isinstance(out := made(x, *state), tuple) else (out,)
            rows.append(row)
            state = () if made.init_hidden else row[0 if returning else 1 :]
        return [torch.stack(values) for values in zip(*rows, strict=True)], state
    if isinstance(made, (SNNCell, SNNRecurrentCell)):
        rows = []
        for x in x_seq:
            row, *state = made(x, *state)
            rows.append(row)
        return [torch.stack(rows), *state[0]], state
    whole = getattr(made, "step_mode", "m") == "m"
    out = flat(made(x_seq)) if whole else [torch.stack([made(x) for x in x_seq])]
    inner = getattr(made, "sub_module", made)
    inner = inner[-1] if isinstance(inner, nn.Sequential) else inner
    v_seq = [inner.v_seq] if getattr(inner, "store_v_seq", False) else []
    spikes = [made.y] if hasattr(made, "sub_module") else []
    return [*out, *spikes, inner.v, *v_seq, *([inner.c] if hasattr(inner, "c") else [])], ()


def reset(model):
    """Resets other libraries' layers, by the layers' own methods."""
    for module in model.modules():
        if isinstance(module, sinabs.layers.StatefulLayer):
            module.reset_states()
        elif isinstance(module, snntorch.SpikingNeuron):
            if module.init_hidden:
                module.reset_mem()
        elif hasattr(module, "reset") and not isinstance(module, asgl_cuda.neurons.base.NeuronLayer):
            module.reset()


def gradients(values, made, *others):
    """Of the tensors, and of all that the layer learns."""
    weights = [torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) for value in values]
    tensors = getattr(made, "p", ())  # of Norse's layers
    learned = [each for _, each in sorted(made.named_parameters())] + list(tensors)
    learned = [each for each in learned if isinstance(each, torch.Tensor) and each.requires_grad]
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    return torch.autograd.grad(loss, [*others, *learned], allow_unused=True)


def same(ours, theirs, rtol=1e-12):
    """Equal up to a share of the largest value."""
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if their is not None:
            assert our.dtype is their.dtype
            size = float(their.detach().abs().max()) if their.numel() else 0.0
            torch.testing.assert_close(our, their, rtol=rtol, atol=rtol * max(1.0, size))


def close(ours, theirs):
    """Up to some tens of float32 roundings of the largest value: two orders of the same sums."""
    return bool(((ours - theirs).abs() <= 1e-5 * theirs.abs().max().clamp(min=1)).all())


# ---- models and methods ----


def calling(part, name):
    """A function that calls the method."""
    method = getattr(part, name)
    return lambda *arguments, **named: method(*arguments, **named)


def exchange(part, name):
    """Shadows a method by an instance attribute that calls the method."""
    setattr(part, name, calling(part, name))


def on(model, backend):
    """All layers of neurons on one backend."""
    for module in model.modules():
        if isinstance(module, asgl_cuda.LIF):
            module.backend = backend
        elif isinstance(module, Converted):
            module.settings = module.settings._replace(backend=backend)
    return model


def scattered(model):
    """The model with normalisations that are not the identity."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.3), ("running_var", 0.5)):
                    if getattr(module, name) is not None:
                        getattr(module, name).uniform_(low, low + 1.5)
    return model


def history(model, x_seq):
    """The outputs, gradients and buffers of two calls in training and one in evaluation."""
    found = {}
    for number, training in enumerate((True, True, False)):
        torch.manual_seed(number)
        model.train(training)
        model.zero_grad()
        x = x_seq.clone().requires_grad_()
        out = model(x)
        if out.requires_grad:  # not in evaluation of the authors' code
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(number))).sum().backward()
        found |= {f"output {number}": out.detach(), f"x.grad {number}": x.grad}
        found |= {f"{name}.grad {number}": value.grad for name, value in model.named_parameters()}
        found |= {f"{name} {number}": value.clone() for name, value in model.named_buffers() if "mem" not in name}
        reset(model)
    return found


def assert_alike(model, x_seq, pairs, backend):
    """The fused and the unfused model give the results of the model that is only converted.

    The model itself differs where `convert` finds the width of a surrogate inexactly.
    """
    for _ in range(10):  # until some neurons fire and others do not
        scattered(model)
        expected = history(on(asgl_cuda.convert(model)[0], backend), x_seq)
        if 0.02 < expected["output 1"].count_nonzero() / expected["output 1"].numel() < 0.98:
            break
    else:
        raise AssertionError("no draw of the parameters in which some neurons fire and others do not")
    classes = [type(module) for module in model.modules()]
    fused, report = asgl_cuda.fuse(model, x_seq)
    assert (len(report.replaced), report.left) == (pairs, []), report
    assert len([module for module in fused.modules() if isinstance(module, Fused)]) == pairs
    on(fused, backend)
    torch.testing.assert_close(history(fused, x_seq), expected, rtol=1e-9, atol=1e-11)
    original = {name: value for name, value in history(copy.deepcopy(model), x_seq).items() if value is not None}
    found = {name: expected[name] for name in original}
    torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert list(fused.state_dict()) == list(model.state_dict())
    back, report = asgl_cuda.unfuse(asgl_cuda.fuse(model, x_seq)[0])
    assert len([row for row in report.replaced if row.layer.startswith("Fused")]) == pairs
    assert [type(module) for module in back.modules()] == classes
