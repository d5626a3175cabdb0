"""Any value for any argument is accepted, or refused by an error of asgl_cuda that names the argument."""

import importlib.util
import inspect
import math
import warnings
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, AdaptiveLIF, AnalogProbSchedule, BatchNormLIF, LeakyIntegrator, OverTime, RecurrentLIF
from asgl_cuda.calls.arguments import NeuronArguments


class Contrary:
    """Can be neither hashed, compared nor shown."""

    __hash__ = None

    def __eq__(self, other):
        raise RuntimeError("compared")

    def __repr__(self):
        raise RuntimeError("shown")


NONSENSE = [
    None, True, -1, 0.5, math.nan, math.inf, 10**400, -(10**400), 10**5000, 1 + 2j, Fraction(10**400), Decimal(1),
    "nonsense", "", "\udcff", b"x", ["cpu"], [[1.0]], {"a": 1}, {1}, range(3), float, len, object(), Contrary(),
    nn.Identity(), torch.float32, torch.ones(2), torch.ones((1,) * 7), torch.zeros(0), torch.tensor(1j),
    torch.tensor(True), torch.tensor(0.5), torch.ones((), device="meta"), torch.ones(3, dtype=torch.int64),
    torch.ones(2).to_sparse(), torch.nested.nested_tensor([torch.ones(2)]), nn.Parameter(torch.tensor(0.5)),
]  # fmt: skip

X = torch.zeros(2, 4, 6, 3)
STATE = torch.zeros(2, dtype=torch.int64)


def network():
    return nn.Sequential(nn.Linear(3, 3), LIF(), LIF(multi_spike=True, v_reset=None, analog_prob=0.0))


def names(function, *others):
    parameters = inspect.signature(function).parameters.values()
    given = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return [name for name in (*given, *others) if name != "self"]


def set_on(make, x_seq=X):
    """A call that sets attributes of a layer, and calls it if they could be set."""

    def call(**values):
        layer = make()
        for name, value in values.items():
            setattr(layer, name, value)
        layer(x_seq)

    return call


def loads(**change):
    schedule = AnalogProbSchedule.linear(network(), 4)
    schedule.load_state_dict({**schedule.state_dict(), **change})


def built(kind, arguments, **others):
    """A schedule of a new network."""
    make = getattr(AnalogProbSchedule, kind)
    return lambda **options: make(**{"model": network(), **others, **options}), arguments, {}


# Call, arguments that get nonsense, and other arguments.
CALLS = {
    "lif": (asgl_cuda.lif, names(asgl_cuda.lif), {"x_seq": X}),
    "leaky_integrator": (asgl_cuda.leaky_integrator, names(asgl_cuda.leaky_integrator), {"x_seq": X}),
    "analog_mask": (
        asgl_cuda.analog_mask, names(asgl_cuda.analog_mask), {"x_seq": X, "analog_prob": 0.5, "rng_state": STATE},
    ),
    "batch_norm_lif": (
        lambda **options: asgl_cuda.batch_norm_lif(
            **{"x_seq": X, "running_mean": torch.zeros(6), "running_var": torch.ones(6), "training": True, **options}
        ),
        [name for name in names(asgl_cuda.batch_norm_lif, *NeuronArguments.__annotations__) if name != "neuron"],
        {},
    ),
    "adaptive_lif": (
        asgl_cuda.adaptive_lif, names(asgl_cuda.adaptive_lif, "v_init", "v_reset", "width"),
        {"x_seq": X, "adapt_decay": 0.9},
    ),
    "recurrent_lif": (
        asgl_cuda.recurrent_lif, names(asgl_cuda.recurrent_lif, *NeuronArguments.__annotations__),
        {"x_seq": X[0], "weight": torch.zeros(3, 3)},
    ),
    "recurrent_lif with all": (
        asgl_cuda.recurrent_lif, names(asgl_cuda.recurrent_lif, "width", "v_init", "v_reset"),
        {"x_seq": X[0], "weight": torch.zeros(3, 3), "syn_decay": 0.5, "adapt_decay": 0.9},
    ),
    "unroll_levels": (asgl_cuda.unroll_levels, names(asgl_cuda.unroll_levels), {"s_seq": X, "levels": 2}),
    "LIF": (LIF, names(LIF.__init__), {}),
    "LIF that learns": (LIF, names(LIF.__init__), {"learn_decay": True, "learn_threshold": True}),
    "LIF of channels": (LIF, ["num_features"], {"granularity": "channel"}),
    "LIF called": (LIF(), ["x_seq", "residual"], {"x_seq": X}),
    "LIF carries": (set_on(lambda: LIF(stateful=True)), ["v"], {}),
    "LIF set": (set_on(LIF), ["width", "decay", "v_threshold", "analog_prob", "v_rest", "input_gain", "v_min"], {}),
    "BatchNormLIF": (BatchNormLIF, names(BatchNormLIF.__init__, *names(LIF.__init__)[1:]), {"num_features": 6}),
    "BatchNormLIF called": (BatchNormLIF(6), ["x_seq", "residual"], {"x_seq": X}),
    "BatchNormLIF set": (set_on(lambda: BatchNormLIF(6)), ["eps", "momentum", "input_scale", "process_group"], {}),
    "LeakyIntegrator": (LeakyIntegrator, names(LeakyIntegrator.__init__), {}),
    "LeakyIntegrator called": (LeakyIntegrator(), ["x_seq", "residual"], {"x_seq": X}),
    "AdaptiveLIF": (AdaptiveLIF, names(AdaptiveLIF.__init__, "decay", "stateful"), {}),
    "AdaptiveLIF called": (AdaptiveLIF(), ["x_seq", "residual"], {"x_seq": X}),
    "AdaptiveLIF carries": (set_on(lambda: AdaptiveLIF(stateful=True)), ["v", "w"], {}),
    "RecurrentLIF": (
        RecurrentLIF, names(RecurrentLIF.__init__, *names(LIF.__init__)[1:]), {"hidden_size": 3},
    ),
    "RecurrentLIF that learns": (
        RecurrentLIF, names(RecurrentLIF.__init__, "width", "granularity"),
        {"hidden_size": 3, "syn_decay": 0.5, "learn_syn_decay": True, "adapt_decay": 0.9, "learn_adaptation": True},
    ),
    "RecurrentLIF called": (RecurrentLIF(3), ["x_seq", "residual"], {"x_seq": X[0]}),
    "RecurrentLIF carries": (
        set_on(lambda: RecurrentLIF(3, syn_decay=0.5, adapt_decay=0.9, stateful=True), X[0]), ["v", "s", "i", "w"], {},
    ),
    "OverTime": (OverTime, ["layer"], {}),
    "OverTime called": (OverTime(nn.Identity()), ["x_seq"], {}),
    "AnalogProbSchedule": (AnalogProbSchedule, ["model"], {"prob_at": lambda start, epoch: start}),
    "AnalogProbSchedule of": (lambda prob_at: AnalogProbSchedule(network(), lambda *_: prob_at), ["prob_at"], {}),
    "multi_step": built("multi_step", ["model", "milestones", "gamma"], milestones=[1]),
    "multi_step at": (lambda epoch: AnalogProbSchedule.multi_step(network(), [epoch]), ["epoch"], {}),
    "cosine": built("cosine", ["model", "epochs", "final"], epochs=3),
    "linear": built("linear", ["model", "epochs", "final"], epochs=3),
    "state": (lambda state: AnalogProbSchedule.linear(network(), 4).load_state_dict(state), ["state"], {}),
    "state of": (loads, ["epoch", "starts"], {}),
    "state from": (lambda start: loads(starts={"1": start, "2": 0.0}), ["start"], {}),
    "parameter_groups": (asgl_cuda.parameter_groups, names(asgl_cuda.parameter_groups), {"model": LIF(), "lr": 0.1}),
    "spiking_eval": (lambda model: asgl_cuda.spiking_eval(model).__enter__(), ["model"], {}),
    "step": (asgl_cuda.step, ["model", "x_t"], {"model": LIF(), "x_t": X[0]}),
    "step called": (LIF().step, ["x_t"], {}),
    "detach": (asgl_cuda.detach, ["model"], {}),
    "convert_sync_batchnorm": (
        asgl_cuda.convert_sync_batchnorm, names(asgl_cuda.convert_sync_batchnorm), {"model": LIF()},
    ),
    "calibrate": (
        asgl_cuda.calibrate, names(asgl_cuda.calibrate), {"model": network()[:2], "x_seq": torch.rand(8, 16, 3)},
    ),
    "reset": (asgl_cuda.reset, ["model"], {}),
    "asgl_layers": (asgl_cuda.asgl_layers, ["model"], {}),
    "Monitor": (asgl_cuda.Monitor, ["model"], {}),
    "lightning_callback": (asgl_cuda.lightning_callback, ["schedule", "monitor"], {}),
    "convert": (asgl_cuda.convert, names(asgl_cuda.convert), {"model": LIF()}),
    "convert with": (
        lambda **asgl: asgl_cuda.convert(LIF(), asgl=asgl), ["width", "analog_prob", "learn_width", "surrogate"], {},
    ),
    "revert": (asgl_cuda.revert, names(asgl_cuda.revert), {"model": LIF()}),
    "fuse": (asgl_cuda.fuse, names(asgl_cuda.fuse), {"model": LIF()}),
    "unfuse": (asgl_cuda.unfuse, names(asgl_cuda.unfuse), {"model": LIF()}),
}  # fmt: skip
if importlib.util.find_spec("nir") and importlib.util.find_spec("nirtorch"):
    CALLS |= {
        "to_nir": (asgl_cuda.to_nir, names(asgl_cuda.to_nir), {"model": LIF(), "example_input": X}),
        "from_nir": (asgl_cuda.from_nir, names(asgl_cuda.from_nir), {"graph": asgl_cuda.to_nir(LIF(), X)}),
    }
if importlib.util.find_spec("snntorch"):
    import snntorch

    from asgl_cuda.interop.snntorch import MultiStep

    CALLS["MultiStep"] = (MultiStep, names(MultiStep.__init__), {"layer": snntorch.Leaky(0.5)})


def raw_error(call, options):
    """The error of a call, if not one of asgl_cuda's own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**options)
    except Exception as error:
        in_words = isinstance(error, (TypeError, ValueError)) and str(error).startswith("asgl_cuda.")
        return None if in_words and "\n" not in str(error) else error
    return None


@pytest.mark.parametrize("name", CALLS)
def test_nonsense_is_accepted_or_refused_clearly(name):
    call, arguments, others = CALLS[name]
    raw = [
        (argument, type(value), error)
        for argument in arguments
        for value in NONSENSE
        if (error := raw_error(call, {**others, argument: value})) is not None
    ]
    assert not raw, "\n".join(map(str, raw))
