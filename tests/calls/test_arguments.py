"""Invalid arguments of all functions: the type of the error, the expected value and the given one."""

import inspect
import warnings
from functools import partial

import pytest
import torch
from comparison import assert_equals_reference
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import LIF, backends
from asgl_cuda.backends import extension
from asgl_cuda.calls import plan
from asgl_cuda.checks import format_value
from asgl_cuda.neurons.adaptive_lif import _NEURON as OF_ADAPTIVE
from asgl_cuda.neurons.lif import LIF_DEFAULTS
from asgl_cuda.neurons.recurrent_lif import _NEURON as OF_RECURRENT

X = torch.zeros(4, 6, 3)
NESTED = torch.nested.nested_tensor([torch.zeros(2, 3)], layout=torch.jagged)
STATE = torch.zeros(2, dtype=torch.int64)
NAN, INF = float("nan"), float("inf")
SOFT = {"v_reset": None}
SEVERAL = {"multi_spike": True, **SOFT}
TRAINING = {"training": True}

with_extension = pytest.mark.skipif(extension.module is None, reason=str(extension.problem))


def names_of(function, *others):
    return {*inspect.signature(function).parameters, *others} - {"neuron", "unknown"}


# By name: the function with what it needs, and its arguments.
FUNCTIONS = {
    "lif": (asgl_cuda.lif, {*names_of(asgl_cuda.lif)}),
    "batch_norm_lif": (
        partial(asgl_cuda.batch_norm_lif, training=True),
        names_of(asgl_cuda.batch_norm_lif, *(LIF_DEFAULTS.keys() - {"input_gain", "input_bias", "input_mean"})),
    ),
    "adaptive_lif": (
        partial(asgl_cuda.adaptive_lif, adapt_decay=0.9),
        names_of(asgl_cuda.adaptive_lif, *OF_ADAPTIVE),
    ),
    "recurrent_lif": (
        partial(asgl_cuda.recurrent_lif, weight=torch.zeros(3, 3), adapt_decay=0.9),
        names_of(asgl_cuda.recurrent_lif, *OF_RECURRENT),
    ),
    "leaky_integrator": (asgl_cuda.leaky_integrator, names_of(asgl_cuda.leaky_integrator)),
}
BROADCASTS = "lif batch_norm_lif adaptive_lif leaky_integrator"  # recurrent neurons have one value or one by neuron
# The layer LIF refuses these, too.
OF_THE_LAYER = {"levels", "multi_spike", "v_min", "surrogate", "v_reset", "analog_prob"}

BAD = [
    # Options, error, words of the message; and the functions, by default all that have the arguments.
    ({"x_seq": torch.zeros(4, 6, 3, dtype=torch.int64)}, TypeError, "x_seq must be float16|by x_seq.float()"),
    ({"x_seq": torch.zeros(4, 6, 3, dtype=torch.complex64)}, TypeError, "x_seq must be float16|torch.complex64"),
    ({"x_seq": [[1.0]]}, TypeError, "x_seq must be a tensor, got list"),
    ({"x_seq": torch.tensor(1.0)}, ValueError, "x_seq|at least one dimension"),
    ({"x_seq": torch.zeros(0, 6, 3)}, ValueError, "x_seq|time step|[0, 6, 3]"),
    ({"x_seq": X.to_sparse()}, TypeError, "x_seq|dense|sparse"),
    ({"x_seq": X.to_mkldnn()}, TypeError, "x_seq|dense|mkldnn"),
    ({"x_seq": torch.nested.nested_tensor([torch.zeros(3)])}, TypeError, "x_seq|dense|nested"),
    ({"time_dim": 3}, ValueError, "time_dim must be in [-3, 2]|got 3"),
    ({"time_dim": -4}, ValueError, "time_dim|got -4"),
    ({"time_dim": 1.0}, TypeError, "time_dim|int|float"),
    ({"time_dim": 10**5000}, ValueError, "time_dim|[-3, 2]"),
    *(
        ({name: torch.ones(5)}, ValueError, f"{name} must broadcast to the shape of x_seq, [4, 6, 3]|[5]", BROADCASTS)
        for name in ("width", "decay", "v_threshold", "v_reset", "input_gain", "input_bias", "input_mean",
                     "adapt_decay", "adapt_potential", "adapt_spike")
    ),
    ({"reset_amount": torch.ones(5), **SOFT}, ValueError, "reset_amount|[4, 6, 3]|[5]", BROADCASTS),
    ({"decay": torch.ones(2, 4, 6, 3)}, ValueError, "decay|[4, 6, 3]|[2, 4, 6, 3]", BROADCASTS),
    ({"width": torch.ones(1, 4, 6, 3)}, ValueError, "width|[4, 6, 3]|[1, 4, 6, 3]", BROADCASTS),
    ({"decay": torch.ones((), dtype=torch.bool)}, TypeError, "decay|float16|torch.bool"),
    ({"v_threshold": torch.ones(3, dtype=torch.complex64)}, TypeError, "v_threshold|float16"),
    ({"width": torch.ones(3).to_sparse()}, TypeError, "width|dense|sparse"),
    ({"width": "1"}, TypeError, "width must be a float or a tensor, got str"),
    ({"decay": None}, TypeError, "decay must be a float or a tensor, got NoneType"),
    ({"width": True}, TypeError, "width|bool"),
    *(({"width": width}, ValueError, f"width must be|{width}") for width in (0.0, -1, NAN)),
    *(
        ({"width": torch.tensor(values)}, ValueError, f"width|{words}")
        for values, words in ((-0.5, "> 0|-0.5"), ([1.0, 0.0, 1.0], "> 0|0.0"), ([1.0, NAN, 1.0], "> 0|nan"),
                              ([1e-40] * 3, "1.0842021724855044e-19"), ([1.0, INF, 1.0], "finite|inf"),
                              ([1e-40, INF, 1.0], "1.0842021724855044e-19"), ([[INF]], "finite|inf"))
    ),
    ({"width": torch.zeros(3), "analog_prob": 0.5}, ValueError, "width must be > 0|got 0.0"),
    # Beside the plans kept for widths of the same type and shape above.
    ({"width": torch.ones(3, dtype=torch.int32)}, TypeError, "width must be float16|torch.int32"),
    ({"width": torch.ones(3, device="meta")}, ValueError, "width must be on cpu|meta"),
    ({"width": INF}, ValueError, "width|finite|inf"),
    ({"width": 1e-40}, ValueError, "width|1.0842021724855044e-19|1e-40"),
    ({"width": 10**400}, ValueError, "width|float|beyond"),
    ({"decay": -(10**400)}, ValueError, "decay|float|beyond"),
    ({"v_rest": 10**5000}, ValueError, "v_rest|float|beyond"),
    *(({name: NAN}, ValueError, f"{name} must be a number, got nan")
      for name in ("decay", "v_threshold", "v_rest", "surrogate_gain", "adapt_potential")),
    ({"v_rest": torch.zeros(3)}, TypeError, "v_rest must be a float|Tensor"),
    ({"surrogate_gain": "2"}, TypeError, "surrogate_gain|str"),
    ({"strict_threshold": "no"}, TypeError, "strict_threshold must be a bool, got str"),
    ({"return_v_seq": 1}, TypeError, "return_v_seq|bool|int"),
    ({"return_v_last": None}, TypeError, "return_v_last must be a bool"),
    ({"to_threshold": 1}, TypeError, "to_threshold must be a bool"),
    ({"delay": 1}, TypeError, "delay must be a bool, got int"),
    ({"generator": 3}, TypeError, "generator|torch.Generator|int"),
    ({"analog_prob": 1.5}, ValueError, "analog_prob must be in [0, 1], got 1.5"),
    ({"analog_prob": -0.1}, ValueError, "analog_prob|[0, 1]|-0.1"),
    ({"analog_prob": NAN}, ValueError, "analog_prob|[0, 1]|nan"),
    ({"analog_prob": torch.ones(2)}, TypeError, "analog_prob|float|tensor of one value|[2]"),
    ({"analog_prob": torch.tensor(1)}, TypeError, "analog_prob|a floating-point tensor of one value|shape []|int64"),
    ({"analog_prob": torch.tensor(1.5)}, ValueError, "analog_prob|[0, 1]|1.5"),
    ({"analog_prob": torch.tensor(0.5, device="meta")}, ValueError, "analog_prob|cpu|meta"),
    ({"surrogate": "gaussian"}, ValueError, "surrogate must be one of rectangle, triangle, sigmoid|'gaussian'"),
    ({"surrogate": ["arctan"]}, ValueError, "surrogate|arctan|['arctan']"),
    ({"surrogate": "periodic_exponential", **SOFT}, ValueError, "'periodic_exponential' needs multi_spike=True"),
    ({"backend": "gpu"}, ValueError, "backend must be one of|cpu|reference|'gpu'"),
    ({"backend": {"cpu": 1}}, ValueError, "backend|cpu|{'cpu': 1}"),
    ({"rng_state": (1, 2)}, TypeError, "rng_state|int64|tuple"),
    ({"rng_state": torch.zeros(2)}, TypeError, "rng_state|int64|float32"),
    ({"rng_state": torch.zeros(3, dtype=torch.int64)}, ValueError, "rng_state|[2]|[3]"),
    ({"rng_state": STATE.to("meta")}, ValueError, "rng_state|cpu|meta"),
    ({"rng_state": STATE.to_sparse()}, TypeError, "rng_state|dense|sparse"),
    ({"rng_state": STATE, "generator": torch.Generator()}, ValueError, "rng_state|generator"),
    *(
        row
        for name, needs in (("v_init", {}), ("w_init", {}), ("s_init", {}), ("i_init", {"syn_decay": 0.5}))
        for row in (
            ({name: torch.zeros(6, 4), **needs}, ValueError, f"{name} must have shape [6, 3], got [6, 4]"),
            ({name: torch.zeros(3), **needs}, ValueError, f"{name}|[6, 3]|[3]"),
            ({name: 0.0, **needs}, TypeError, f"{name}|tensor|float|torch.full_like(x_seq[0], 0.0)"),
            ({name: torch.zeros(6, 3, dtype=torch.int64), **needs}, TypeError, f"{name}|float16|int64"),
            ({name: torch.zeros(6, 3, device="meta"), **needs}, ValueError, f"{name}|cpu|meta"),
        )
    ),
    ({"reset_amount": 1.0}, ValueError, "reset_amount|v_reset=None"),
    ({"tau": 2.0}, TypeError, "'tau'", "lif batch_norm_lif adaptive_lif recurrent_lif leaky_integrator"),
    ({"tau": 2.0}, TypeError, "tau=2.0 is decay=0.5|divides the input|input_gain=0.5", "lif"),
    ({"v_treshold": 2.0}, TypeError, "'v_treshold'|did you mean v_threshold?", "lif"),
    # A residual.
    ({"residual": X[0]}, ValueError, "residual must have x_seq's shape [4, 6, 3], got [6, 3]"),
    ({"residual": X[0]}, ValueError, "if it is a state, pass none to a layer, and v_init to a function; residual.ex"),
    ({"residual": X[:, :1]}, ValueError, "got [4, 1, 3]; residual.expand_as(x_seq)"),
    ({"residual": X.half()}, TypeError, "residual must have x_seq's type torch.float32, got torch.float16"),
    ({"residual": 1.0}, TypeError, "residual must be a tensor or None, got float"),
    ({"residual": X.to_sparse()}, TypeError, "residual must be a dense tensor|sparse_coo; residual.to_dense()"),
    ({"residual": NESTED}, TypeError, "got a nested tensor; torch.nested.to_padded_tensor(residual, 0.0) pads it"),
    ({"residual": X.to("meta")}, ValueError, "residual must be on cpu as x_seq, got meta"),
    ({"residual": X, "residual_gain": "one"}, TypeError, "residual_gain must be a float"),
    ({"residual": X, "residual_gain": NAN}, ValueError, "residual_gain must be a number"),
    *(({"residual_gain": gain}, ValueError, f"residual_gain needs a residual|{gain}") for gain in (0.5, 2.0, 0.0, -1)),
    # Several spikes a step, levels, and a floor.
    ({"multi_spike": True}, ValueError, "needs v_reset=None, got v_reset 0.0"),
    ({"multi_spike": 1, **SOFT}, TypeError, "multi_spike must be a bool, got int"),
    ({**SEVERAL, "analog_prob": 0.2}, ValueError, "needs analog_prob=0, got 0.2; |emit a smooth value"),
    ({**SEVERAL, "analog_prob": torch.zeros(())}, ValueError, "as a number, got a tensor", "lif batch_norm_lif"),
    ({**SEVERAL, "analog_prob": [0.1]}, TypeError, "analog_prob|float|list"),
    *(({**SEVERAL, "v_threshold": value}, ValueError, "v_threshold > 0|multi_spike")
      for value in (0.0, -1, torch.tensor([1.0, 0.0, 1.0]), torch.tensor(NAN))),
    ({"v_reset": 0.0, "levels": 4}, ValueError, "levels is for the soft reset and needs v_reset=None, got v_reset 0.0"),
    *(({**SOFT, "levels": levels}, ValueError, f"levels must be an int in [1, 256], got {levels}")
      for levels in (0, 257, 4.0, True)),
    ({**SOFT, "levels": 4, "surrogate": "arctan"}, ValueError, "takes no other, got 'arctan'"),
    *(({**SOFT, "levels": 4, "v_threshold": value}, ValueError, "v_threshold|> 0")
      for value in (0.0, -1.0, torch.zeros(3))),
    *(({**SOFT, "levels": 4, "width": width}, ValueError, f"its default, 1.0, got {got}", "lif batch_norm_lif")
      for width, got in ((2.0, "2.0"), (torch.ones(()), "a tensor; leave out width"), (torch.ones(3), "a tensor"))),
    ({"v_min": NAN}, ValueError, "v_min must be finite, got nan"),
    ({"v_min": -INF}, ValueError, "v_min must be finite, got -inf"),
    ({"v_min": "0"}, TypeError, "v_min must be a float, got str"),
    # What some neurons lack.
    *(({name: value}, TypeError, f"argument '{name}'|that these neurons do not have", "adaptive_lif recurrent_lif")
      for name, value in (("levels", 4), ("residual", X), ("v_min", 0.0))),
    ({"input_gain": 2.0}, TypeError, "'input_gain'", "batch_norm_lif"),
    # Normalised.
    *(({"weight": value}, error, words, "batch_norm_lif") for value, error, words in (
        (torch.ones(4), ValueError, "weight must have shape [3]|got [4]"),
        (torch.ones(3).int(), TypeError, "weight must be float16, bfloat16, float32 or float64"),
        (1.0, TypeError, "weight must be a tensor, got float"),
        (torch.ones(3, device="meta"), ValueError, "weight must be on cpu|got meta"),
        (torch.ones(3).to_sparse(), TypeError, "weight must be a dense tensor"))),
    ({"bias": torch.ones(1, 3)}, ValueError, "bias must have shape [3]|got [1, 3]", "batch_norm_lif"),
    ({"training": False}, ValueError, "evaluation|needs running_mean and running_var", "batch_norm_lif"),
    ({"running_mean": torch.zeros(3)}, ValueError, "must both be given"),
    ({"x_seq": X[:, 0]}, ValueError, "must have a dimension of channels|got shape [4, 3]", "batch_norm_lif"),
    ({"x_seq": X[:1, :1]}, ValueError, "per channel, got x_seq of shape [1, 1, 3]|model.eval()", "batch_norm_lif"),
    ({"eps": "small"}, TypeError, "eps must be a float, got str"),
    ({"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    ({"eps": INF}, ValueError, "eps must be finite, got inf"),
    ({"input_scale": None}, TypeError, "input_scale must be a float, got NoneType"),
    ({"momentum": None}, TypeError, "momentum must be a float or a tensor, got NoneType"),
    ({"momentum": INF}, ValueError, "momentum must be finite, got inf"),
    ({"momentum": torch.tensor(NAN)}, ValueError, "momentum must be finite, got nan"),
    ({"momentum": torch.tensor([NAN])}, ValueError, "momentum must be finite, got nan"),
    ({"momentum": torch.ones(2)}, ValueError, "momentum|tensor of one value|shape [2]"),
    ({"momentum": torch.ones(())[None][:0]}, ValueError, "momentum|shape [0]"),
    ({"momentum": torch.tensor(1j)}, TypeError, "momentum must be float16, bfloat16, float32 or float64"),
    ({"momentum": torch.ones((), device="meta")}, ValueError, "momentum must be on cpu|meta"),
    ({"process_group": [1, 2]}, TypeError, "process_group must be|got [1, 2]"),
    # Recurrent.
    *(({name: value, **needs}, error, words, "recurrent_lif") for name, value, needs, error, words in (
        ("x_seq", torch.zeros(2, 3, 4, 3), {}, ValueError, "x_seq must have shape [T, B, N]"),
        ("time_dim", 2, {}, ValueError, "got [4, 6, 3] with time_dim=2"),
        ("weight", torch.zeros(3, 2), {}, ValueError, "weight must have shape [3, 3] or [3] for x_seq of shape "),
        ("weight", torch.zeros(3, 3).int(), {}, TypeError, "weight must be float16|float64, got torch.int32"),
        ("weight", torch.zeros(3, 3).to_sparse(), {}, TypeError, "weight must be a dense tensor"),
        ("bias", torch.zeros(4), {}, ValueError, "bias must have shape [3] for x_seq of shape [4, 6, 3], got [4]"),
        ("width", torch.ones(4, 1, 1), {}, ValueError, "width must have one value or shape [3], got [4, 1, 1]"),
        ("width", torch.ones(6, 1), {}, ValueError, "width must have one value or shape [3], got [6, 1]"),
        ("width", torch.ones(4, 1, 3), {}, ValueError, "width must have one value or shape [3], got [4, 1, 3]"),
        ("width", "wide", {}, TypeError, "width must be"),
        ("width", torch.ones(3).long(), {}, TypeError, "width must be float16, bfloat16, float32 or float64"),
        ("v_reset", torch.zeros(6, 1), {}, ValueError, "v_reset must have one value or shape [3], got [6, 1]"),
        ("syn_decay", torch.ones(4, 1, 1), {}, ValueError, "syn_decay must have one value or shape [3]"),
        ("syn_decay", torch.ones(3).long(), {}, TypeError, "syn_decay must be float16|float64, got torch.int64"),
        ("syn_decay", NAN, {}, ValueError, "syn_decay must be a number, got nan"),
        ("i_init", torch.zeros(6, 3), {}, ValueError, "i_init needs syn_decay"),
        ("input_gain", NAN, {}, ValueError, "input_gain must be"),
        ("input_gain", 0.5, {}, ValueError, "input_gain must be 1 with an adaptation, got 0.5"),
        ("adapt_decay", torch.ones(4, 1, 1), {}, ValueError, "adapt_decay must have one value or shape [3]"),
        ("adapt_decay", NAN, {}, ValueError, "adapt_decay must be a number, got nan"),
        *((name, value, {"adapt_decay": None}, ValueError, f"{name} needs adapt_decay, got {got} without")
          for name, value, got in (("adapt_potential", 0.1, "0.1"), ("to_threshold", True, "True"),
                                   ("adapt_spike", torch.ones(3), "a tensor of shape [3]"),
                                   ("w_init", torch.zeros(6, 3), "a tensor of shape [6, 3]"))))),
]  # fmt: skip
ROWS = [
    pytest.param(name, *row[:3], id=f"{name} {format_value(row[0])[:40]}")
    for row in BAD
    for name, (_, takes) in FUNCTIONS.items()
    if (len(row) < 4 or name in row[3].split()) and (row[0].keys() <= takes or (row[1] is TypeError and len(row) > 3))
]


@pytest.mark.parametrize(("name", "options", "error", "words"), ROWS)
def test_bad_arguments(name, options, error, words):
    """Refused before anything is drawn or computed."""
    function, _ = FUNCTIONS[name]
    given = {"x_seq": X, **options}
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        function(given.pop("x_seq"), **given)
    message = str(caught.value)
    assert f"asgl_cuda.{name}" in message
    for word in words.split("|"):
        assert word in message
    assert torch.equal(state, torch.get_rng_state())
    if (
        name == "lif"
        and options.keys() <= OF_THE_LAYER
        and not any(isinstance(each, torch.Tensor) for each in options.values())
    ):
        with pytest.raises(error) as caught:
            LIF(**{"analog_prob": 0.0, **options})
        assert words.split("|")[-1] in str(caught.value)
        assert "asgl_cuda.LIF" in str(caught.value)


def test_bad_arguments_of_layers():
    with pytest.raises(ValueError, match=r"needs analog_prob=0, got 0\.5"):  # the default
        LIF(**SEVERAL)
    layer = LIF(**SEVERAL, analog_prob=0.0)
    with pytest.raises(ValueError, match=r"needs analog_prob=0, got 0\.1"):
        layer.analog_prob = 0.1
    assert layer.analog_prob == 0
    layer = asgl_cuda.BatchNormLIF(5)
    with pytest.raises(ValueError, match=r"running_mean must have shape \[3\], .* got \[5\]"):
        layer(torch.randn(4, 2, 3, 6))
    assert int(layer.num_batches_tracked) == 0
    for wrong in (0, [], "3", True):
        with pytest.raises(ValueError, match="num_features must be a positive int, the number of channels C"):
            asgl_cuda.BatchNormLIF(wrong)


def test_accepted_arguments_stand_for_no_others(monkeypatch):
    """Checks are kept by signature, where True == 1, and only so many."""
    asgl_cuda.lif(X, strict_threshold=True)
    with pytest.raises(TypeError, match="strict_threshold must be a bool, got int"):
        asgl_cuda.lif(X, strict_threshold=1)
    monkeypatch.setattr(plan, "_MOST_PLANS", 3)
    for number in range(9):
        asgl_cuda.lif(X, v_rest=number / 8)
    assert len(inspect.getclosurevars(plan._PLANS[False, False]).nonlocals["plans"]) <= 3


def test_bad_arguments_of_analog_mask():
    with pytest.raises(ValueError, match=r"asgl_cuda.analog_mask: analog_prob must be in \[0, 1\], got 2"):
        asgl_cuda.analog_mask(X, 2, STATE)
    with pytest.raises(TypeError, match=r"asgl_cuda\.analog_mask: rng_state"):
        asgl_cuda.analog_mask(X, 0.5, STATE.float())
    with pytest.raises(ValueError, match=r"asgl_cuda\.analog_mask: time_dim"):
        asgl_cuda.analog_mask(X, 0.5, STATE, time_dim=7)


def test_half_parameters_are_taken(backend, device):
    """Parameters of a model cast to half are widened; gradients have the parameters' type."""
    x_seq = torch.rand(4, 6, 3, device=device).bfloat16()
    width = torch.ones(3, device=device, dtype=torch.bfloat16, requires_grad=True)
    v_init = torch.zeros(6, 3, device=device, dtype=torch.bfloat16, requires_grad=True)
    asgl_cuda.lif(x_seq, width=width, v_init=v_init, backend=backend).sum().backward()
    assert width.grad.dtype == v_init.grad.dtype == torch.bfloat16


def test_integers_are_numbers(backend, device):
    x_seq = torch.rand(4, 6, device=device)
    floats = asgl_cuda.lif(x_seq, decay=0.0, v_threshold=1.0, v_reset=0.0, analog_prob=1.0, backend=backend)
    assert torch.equal(floats, asgl_cuda.lif(x_seq, decay=0, v_threshold=1, v_reset=0, analog_prob=1, backend=backend))


def test_numbers_of_numpy_are_numbers(backend, device):
    numpy = pytest.importorskip("numpy")
    x_seq = torch.rand(4, 6, device=device)
    options = {"decay": 0.75, "v_rest": 0.25, "surrogate_gain": 0.5, "width": 2.0}
    theirs = {name: numpy.float32(value) for name, value in options.items()}
    flags = {"return_v_last": numpy.bool_(True), "strict_threshold": numpy.bool_(True), "time_dim": numpy.int64(1)}
    expected = asgl_cuda.lif(x_seq, **options, return_v_last=True, strict_threshold=True, time_dim=1, backend=backend)
    actual = asgl_cuda.lif(x_seq, **theirs, **flags, backend=backend)
    assert torch.equal(actual.s_seq, expected.s_seq)
    assert torch.equal(actual.v_last, expected.v_last)
    expected = asgl_cuda.leaky_integrator(x_seq, 0.75, delay=True, return_v_last=True, time_dim=1, backend=backend)
    theirs = {"delay": numpy.bool_(True), "return_v_last": numpy.bool_(True), "time_dim": numpy.int64(1)}
    actual = asgl_cuda.leaky_integrator(x_seq, numpy.float64(0.75), **theirs, backend=backend)
    assert torch.equal(actual.v_seq, expected.v_seq)
    assert torch.equal(actual.v_last, expected.v_last)


@with_extension
def test_backend_that_does_not_serve_the_device():
    with pytest.raises(ValueError, match="backend 'cpu' needs x_seq on cpu, got meta"):
        asgl_cuda.lif(X.to("meta"), backend="cpu")


@pytest.fixture
def without_extension(monkeypatch):
    """Mimics an extension built for another torch."""
    problem = "the compiled extension is missing: it was built for torch 1.2.3"
    broken = {
        name: backend if name == "reference" else backend._replace(problem=lambda: problem)
        for name, backend in backends.BACKENDS.items()
    }
    monkeypatch.setattr(backends, "BACKENDS", broken)
    for module in ("calls.plan", "neurons.lif"):
        monkeypatch.setattr(f"asgl_cuda.{module}.BACKENDS", broken)
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.usefixtures("without_extension")
def test_missing_extension_falls_back_with_one_warning():
    with pytest.warns(UserWarning, match="slow reference backend on cpu: .*built for torch 1.2.3"):
        asgl_cuda.lif(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asgl_cuda.lif(X)
        asgl_cuda.LIF()(X)
    assert asgl_cuda.available_backends() == ("reference",)
    with pytest.raises(RuntimeError, match=r"asgl_cuda.lif: backend 'cpu' is not available: .*built for torch 1\.2\.3"):
        asgl_cuda.lif(X, backend="cpu")


def spikingjelly_layer():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    return asgl_cuda.convert(nn.Sequential(neuron.LIFNode(step_mode="m")))[0]


CALLS = {
    "lif": lambda: asgl_cuda.lif,
    "batch_norm_lif": lambda: partial(asgl_cuda.batch_norm_lif, training=True),
    "LIF": asgl_cuda.LIF,
    "BatchNormLIF": lambda: asgl_cuda.BatchNormLIF(3),
    "in a Sequential": lambda: nn.Sequential(nn.Identity(), nn.Sequential(asgl_cuda.LIF())),
    "in a checkpoint": lambda: partial(checkpoint, asgl_cuda.LIF(), use_reentrant=False),
    "under torch.compile": lambda: torch.compile(asgl_cuda.LIF(), fullgraph=True, backend="eager"),
    "a converted layer": spikingjelly_layer,
}


@pytest.mark.usefixtures("without_extension")
@pytest.mark.parametrize("name", CALLS)
def test_warning_names_the_users_line(name):
    function = CALLS[name]()
    with pytest.warns(UserWarning, match="slow reference backend") as warned:
        exec(compile("\n\nfunction(X)", "the user's file", "exec"), {"function": function, "X": X, "__name__": "user"})
    places = [(each.filename, each.lineno) for each in warned if "slow reference" in str(each.message)]
    assert places == [("the user's file", 3)]


@pytest.mark.usefixtures("without_extension")
def test_no_warning_for_meta_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asgl_cuda.lif(X.to("meta")).is_meta


def test_the_least_width_has_the_same_gradients_everywhere(backend, device):
    """Smaller widths: 1 / width^2 = inf, and 0 * inf = NaN."""
    least = torch.finfo(torch.float32).tiny ** 0.5
    x_seq = torch.tensor([[0.5, 1.0, 1.5], [1.0, 1.0, 0.2]], device=device).requires_grad_()
    for width in (least, torch.tensor(least, device=device).requires_grad_()):
        assert_equals_reference(x_seq, backend, width=width)
    double = x_seq.detach().double().requires_grad_()
    assert asgl_cuda.lif(double, width=1e-40, backend=backend).sum().isfinite()


@pytest.mark.parametrize("surrogate", ["fast_sigmoid", "arctan"])
def test_where_the_square_overflows_there_is_no_gradient(backend, device, surrogate):
    """As documented in `lif`: from abs(u) = 1e19 width on, the square of u / width may be infinite."""
    least = 1.1e-19

    def gradients(u, dtype, name):
        x_seq = (1 + torch.tensor([u], dtype=dtype, device=device)).requires_grad_()
        width = torch.tensor(least, dtype=dtype, device=device).requires_grad_()
        s_seq = asgl_cuda.lif(x_seq, width=width, surrogate=surrogate, backend=name)
        return torch.autograd.grad(s_seq.sum(), (x_seq, width))

    exact = gradients([0.25, 1.0], torch.float64, "reference")
    for ours, theirs in zip(gradients([0.25, 1.0], torch.float32, backend), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    grad_x_seq, grad_width = gradients([3.0, 100.0], torch.float32, backend)
    assert not grad_x_seq.any()
    assert grad_width == 0


def test_nan_in_the_input_shows_in_the_gradients_of_parameters(backend, device):
    """With a rectangle NaN gives no gradient of x, but NaN in parameter gradients, which torch.amp.GradScaler sees."""
    x_seq = torch.tensor([[0.5], [NAN], [1.0]], device=device, requires_grad=True)
    width = torch.ones((), device=device, requires_grad=True)
    s_seq = asgl_cuda.lif(x_seq, width=width, surrogate="rectangle", backend=backend)
    s_seq.sum().backward()
    assert not s_seq.any()
    assert not x_seq.grad[1:].any()
    assert width.grad.isnan()


def test_numbers_that_change_have_no_plan():
    class Changing(float):
        now = 0.0

        def __float__(self):
            return self.now

    decay = Changing()
    for decay.now in (0.2, 0.9):
        found, expected = (asgl_cuda.lif(X + 0.3, decay=each, return_v_seq=True).v_seq for each in (decay, decay.now))
        assert torch.equal(found, expected)
