"""Arguments of layers: numbers of every type, invalid values, and names from other libraries."""

import copy
import re
import warnings
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, AdaptiveLIF, BatchNormLIF, LeakyIntegrator, OverTime, checks
from asgl_cuda.surrogate import ELSEWHERE

numpy = pytest.importorskip("numpy")

LAYERS = {"LIF": LIF, "BatchNormLIF": partial(BatchNormLIF, 3), "LeakyIntegrator": LeakyIntegrator}
X = torch.ones(2, 4, 3)
OF_NEURONS = ("width", "v_threshold", "analog_prob", "v_reset", "v_min", "surrogate_gain")
NUMBERS = {
    "LIF": ("decay", *OF_NEURONS, "v_rest", "input_gain"),
    "BatchNormLIF": ("decay", *OF_NEURONS, "v_rest", "eps", "momentum", "input_scale"),
    "LeakyIntegrator": ("decay", "v_rest", "input_gain"),
}
PAIRS = [(kind, name) for kind, names in NUMBERS.items() for name in names]
LEARNED = {"width": "learn_width", "decay": "learn_decay", "v_threshold": "learn_threshold"}
NUMBER_LIKE = {
    "a tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "a tensor with a dimension": lambda value: torch.tensor([value], dtype=torch.float64),
    "a number of numpy": numpy.float64,
    "an array": lambda value: numpy.array(value),
    "a fraction": Fraction,
    "a Parameter that is frozen": lambda value: nn.Parameter(torch.tensor(value).double(), requires_grad=False),
}


@pytest.fixture(autouse=True)
def warned(monkeypatch):
    monkeypatch.setattr(checks, "_warned", set())


def value_of(layer, name):
    value = getattr(layer, name)
    return value.item() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize("like", NUMBER_LIKE)
def test_values_like_numbers_are_taken(kind, name, like):
    value = 0.25
    layer = LAYERS[kind](**{name: NUMBER_LIKE[like](value)})
    assert value_of(layer, name) == pytest.approx(value, rel=1e-6)
    assert set(dict(layer.named_parameters())) <= {"log_width", "weight", "bias"}
    assert f"{value}" in repr(layer)
    layer(torch.rand(2, 4, 3))
    copy.deepcopy(layer)


@pytest.mark.parametrize(("kind", "name"), [pair for pair in PAIRS if pair[1] in (*LEARNED, "analog_prob")])
@pytest.mark.parametrize("like", NUMBER_LIKE)
@pytest.mark.parametrize("learned", [False, True])
def test_setters_take_them_too(kind, name, like, learned):
    layer = LAYERS[kind](**({LEARNED[name]: learned} if name in LEARNED else {}))
    parameters = dict(layer.named_parameters())
    setattr(layer, name, NUMBER_LIKE[like](0.25))
    assert value_of(layer, name) == pytest.approx(0.25, rel=1e-6)
    assert dict(layer.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[key] for key, parameter in layer.named_parameters())


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize("as_parameter", [False, True])
def test_a_parameter_is_an_initial_value_and_no_constant(kind, name, as_parameter):
    """A constant would silently not be trained."""
    given = nn.Parameter(torch.tensor(0.25)) if as_parameter else torch.tensor(0.5, requires_grad=True) / 2
    option = LEARNED.get(name)
    if option:
        layer = LAYERS[kind](**{name: given, option: True})
        assert getattr(layer, name).item() == pytest.approx(0.25)
        assert getattr(layer, name).requires_grad
        setattr(layer, name, given)
        assert getattr(layer, name).item() == pytest.approx(0.25)
    words = rf"asgl_cuda\.{kind}: {name} would be a constant .* {option + '=True' if option else ''}.*item\(\)"
    options = {option: False} if option else {}
    with pytest.raises(ValueError, match=words):
        LAYERS[kind](**{name: given}, **options)
    if option or name == "analog_prob":
        layer = LAYERS[kind](**options)
        before = dict(vars(layer)), value_of(layer, name)
        with pytest.raises(ValueError, match=words):
            setattr(layer, name, given)
        assert (vars(layer), value_of(layer, name)) == before


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2), "a float or a tensor of one value, got a tensor of shape \\[2\\]"),
        (torch.ones((), device="meta"), "a float or a tensor of one value, got one on meta"),
        (torch.tensor(True), "a float.*, got .*bool"),
        (torch.tensor(1j), "a float.*, got .*complex"),
        (numpy.ones(2), "a float, got ndarray"),
        (10**400, "a float, got a number beyond"),
        (nn.Identity(), "a float.*, got Identity"),
        ("1", "a float.*, got str"),
    ],
    ids=str,
)
def test_other_values_are_refused(kind, name, value, words):
    with pytest.raises((TypeError, ValueError), match=rf"asgl_cuda\.{kind}: {name} must be {words}"):
        LAYERS[kind](**{name: value})


@pytest.mark.parametrize("granularity", ["channel", "neuron"])
@pytest.mark.parametrize("kind", LAYERS)
def test_numbers_of_numpy_are_sizes_and_flags(kind, granularity):
    make = BatchNormLIF if kind == "BatchNormLIF" else LAYERS[kind]
    options = {"granularity": granularity, "time_dim": numpy.int64(1), "stateful": numpy.bool_(True)}
    for size in (numpy.int64(3), (numpy.int32(3),)):
        layer = make(size, learn_decay=numpy.bool_(True), **options)
        assert layer.num_features == (3,)
        assert (type(layer.num_features[0]), type(layer.time_dim), type(layer.stateful)) == (int, int, bool)
        assert layer.logit_decay.shape == (3,)


# ---- invalid values ----


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("learned", [False, True])
def test_a_decay_outside_of_0_and_1_is_refused(kind, learned):
    for value, hint in (
        (2.0, "; SpikingJelly's tau=2 is decay=0.5"),
        (20, "; SpikingJelly's tau=20 is decay=0.95"),
        (1.001, "; SpikingJelly's tau="),
        (-1, "$"),
        (-1e-9, "$"),
    ):
        with pytest.raises(ValueError, match=rf"asgl_cuda\.{kind}: decay must be in \[0, 1\], got {value:g}{hint}"):
            LAYERS[kind](decay=value, learn_decay=learned)
        layer = LAYERS[kind](learn_decay=learned)
        with pytest.raises(ValueError, match=rf"asgl_cuda\.{kind}: decay must be in \[0, 1\], got {value:g}{hint}"):
            layer.decay = value
        assert value_of(layer, "decay") == 0.5
    for value in (0, 1):
        assert learned or LAYERS[kind](decay=value).decay == value


def test_functions_take_any_decay():
    x_seq = torch.ones(3, 2)
    assert asgl_cuda.leaky_integrator(x_seq, 2.0)[:, 0].tolist() == [1, 3, 7]
    assert asgl_cuda.lif(x_seq, decay=-1.0, v_threshold=5.0, return_v_seq=True).v_seq[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", ["LIF", "BatchNormLIF"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["v_reset", "v_min"])
def test_a_potential_after_a_spike_at_the_threshold_is_refused(kind, learned, name):
    options = {"learn_threshold": learned}
    words = rf"asgl_cuda\.{kind}: {name} must be below v_threshold, .* got {name} {{}} and v_threshold {{}}"
    for value in (1.0, 1.5):
        with pytest.raises(ValueError, match=words.format(value, 1.0)):
            LAYERS[kind](**{name: value}, **options)
    layer = LAYERS[kind](**{name: 0.5}, **options)
    with pytest.raises(ValueError, match=words.format(0.5, 0.4)):
        layer.v_threshold = 0.4
    assert value_of(layer, "v_threshold") == 1
    LAYERS[kind](v_rest=-65.0, v_reset=-60.0, v_threshold=-50.0, **options)  # no warning: millivolts
    LAYERS[kind](v_rest=-65.0, v_reset=-65.0, v_threshold=0.0, **options)


@pytest.mark.parametrize("kind", ["LIF", "BatchNormLIF"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"v_threshold": 0.0}, "v_threshold 0 is not above v_rest 0: .* without any input"),
        ({"v_threshold": -0.5}, "v_threshold -0.5 is not above v_rest 0"),
        ({"v_threshold": 0.5, "v_rest": 0.75}, "v_threshold 0.5 is not above v_rest 0.75"),
        ({"v_threshold": -0.5, "v_rest": -1.0, "v_reset": None}, "a spike takes -0.5 off"),
        ({"v_reset": None, "reset_amount": 0.0}, "a spike takes 0 off"),
        ({"surrogate_gain": 0}, "surrogate_gain 0"),
    ],
)
def test_a_warning_once_with_the_users_line(kind, options, words):
    source = compile("\n\nmake(**options)", "the user's file", "exec")
    user = {"make": LAYERS[kind], "options": options, "__name__": "user"}
    with pytest.warns(UserWarning, match=rf"asgl_cuda\.{kind}: {words}") as found:
        exec(source, user)
    assert [(each.filename, each.lineno) for each in found] == [("the user's file", 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(source, user)


def test_the_setter_of_the_threshold_warns():
    layer = LIF()
    with pytest.warns(UserWarning, match="v_threshold 0 is not above v_rest 0"):
        layer.v_threshold = 0.0
    assert layer.v_threshold == 0


def test_no_warning_where_the_neurons_are_at_rest():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LIF(v_threshold=0.0, strict_threshold=True)
        LIF(surrogate_gain=1e-3)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_several_spikes_a_step_need_a_threshold(value):
    """At 0 there would be infinitely many, below 0 a negative count."""
    with pytest.raises(ValueError, match=f"multi_spike needs v_threshold > 0, got {value}"):
        LIF(multi_spike=True, v_reset=None, analog_prob=0.0, v_threshold=value)


def test_a_layer_as_new_is_one_with_what_was_set():
    layer = LIF(learn_threshold=True)
    layer.v_reset = 2.0  # the attribute is the user's
    nn.init.zeros_(layer.threshold)
    layer.reset_parameters()
    assert layer.v_threshold.item() == 1


# ---- names ----


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LIF(surrogate="atan"), "did you mean arctan, with width=1 / alpha"),
        (lambda: LIF(surrogate="ATan"), "did you mean arctan, with width=1 / alpha"),
        (lambda: LIF(surrogate="SoftSign"), "did you mean fast_sigmoid, with width=1 / alpha"),
        (lambda: LIF(surrogate="Rectangle"), "did you mean rectangle\\?"),
        (lambda: LIF(surrogate="trinagle"), "did you mean triangle\\?"),
        (lambda: asgl_cuda.lif(torch.ones(2, 3), surrogate="sigmoyd"), "did you mean sigmoid\\?"),
        (lambda: LIF(3, granularity="chanel"), "did you mean channel\\?"),
        (lambda: LIF(backend="CPU"), "did you mean cpu\\?"),
        (lambda: asgl_cuda.lif(torch.ones(2, 3), backend="referense"), "did you mean reference\\?"),
        (lambda: asgl_cuda.convert(nn.Identity(), backend="cdua"), "did you mean cuda\\?"),
        (lambda: BatchNormLIF(3, v_treshold=1.0), "BatchNormLIF.*'v_treshold'; did you mean v_threshold\\?"),
        (lambda: BatchNormLIF(3, learn_with=True), "'learn_with'; did you mean learn_width\\?"),
        (
            lambda: asgl_cuda.batch_norm_lif(torch.ones(2, 2, 3), training=True, analog_probe=0.1),
            "batch_norm_lif.*'analog_probe'; did you mean analog_prob\\?",
        ),
    ],
)
def test_did_you_mean(call, words):
    with pytest.raises((TypeError, ValueError), match=f"asgl_cuda.*{words}"):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LIF(tau=2), "'tau'; SpikingJelly's tau=2 is decay=0.5 and .* by tau, as input_gain=0.5 does"),
        (lambda: LIF(tau=None), "'tau'; SpikingJelly's tau is decay=1 - 1 / tau and .* as input_gain=1 / tau does"),
        (lambda: LIF(init_tau=4.0, learn_decay=True), "SpikingJelly's init_tau=4.0 is decay=0.75 and divides .*"),
        (
            lambda: BatchNormLIF(3, tau=2.0),
            "tau=2.0 is decay=0.5 and divides the input by tau, as input_scale=0.5 does",
        ),
        (lambda: AdaptiveLIF(tau=2.0), "tau=2.0 is decay=0.5 and divides the input by tau"),
        (lambda: LIF(tau=1), "tau=1 is decay=0 and divides the input by tau, as input_gain=1 does"),
        (lambda: asgl_cuda.lif(X, init_tau=2.0), "SpikingJelly's init_tau=2.0 is decay=0.5 and divides .*"),
        (lambda: LeakyIntegrator(tau=2.0), "tau=2.0 is decay=0.5 and divides the input by tau, as input_gain=0.5 does"),
        (
            lambda: asgl_cuda.lif(X, tau=2.0),
            "tau=2.0 is decay=0.5 and divides the input by tau, as input_gain=0.5 does",
        ),
        (lambda: asgl_cuda.batch_norm_lif(X, tau=2.0), "tau=2.0 is decay=0.5 .* as input_scale=0.5 does"),
        (lambda: asgl_cuda.adaptive_lif(X, adapt_decay=0.9, beta=0.9), "snnTorch's beta=0.9 is decay=0.9"),
        (lambda: asgl_cuda.leaky_integrator(X, beta=0.9), "snnTorch's beta=0.9 is decay=0.9"),
        (lambda: LIF(beta=0.9), "'beta'; snnTorch's beta=0.9 is decay=0.9"),
        (lambda: LIF(threshold=1), "'threshold'; snnTorch's threshold=1 is v_threshold=1, strict_threshold=True"),
        (lambda: LIF(v_th=1), "Norse's v_th=1 is v_threshold=1, strict_threshold=True"),
        (lambda: LIF(spike_threshold=0.5), "sinabs' spike_threshold=0.5 is v_threshold=0.5"),
        (lambda: LeakyIntegrator(threshold=1), "'threshold'"),
        (lambda: asgl_cuda.lif(X, learn_beta=True), "'learn_beta'"),
    ],
)
def test_arguments_of_other_libraries(call, words):
    with pytest.raises(TypeError, match=f"got an unexpected keyword argument .*{words}$"):
        call()


@pytest.mark.parametrize("make", [AdaptiveLIF, LeakyIntegrator])
def test_a_residual_is_refused_where_there_is_none(make):
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{make.__name__}: takes no residual; layer\(x_seq \+ residual\)"):
        make()(torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("layer", "shape", "sample"),
    [
        (nn.Conv2d(1, 8, 3), (8, 1, 8, 8), "1, H, W] for Conv2d"),
        (nn.Conv2d(8, 8, 3, padding=1), (1, 8, 6, 6), "8, H, W] for Conv2d"),
        (nn.Sequential(nn.Sequential(nn.ConvTranspose1d(6, 4, 1), nn.ReLU())), (2, 3, 6), "6, L] for ConvTranspose1d"),
        (nn.LazyConv3d(6, 1), (6, 1, 1, 1, 1), "C, D, H, W] for LazyConv3d"),
        (nn.Linear(6, 6), (2, 3), "6] for Linear"),
        (nn.LayerNorm((2, 6)), (2, 1, 6), "2, 6] for LayerNorm"),
    ],
    ids=str,
)
def test_a_missing_batch_is_not_taken_for_channels(layer, shape, sample):
    with pytest.raises(
        ValueError, match=re.escape(f"x_seq must be [T, B, {sample}, got shape {list(shape)}; x_seq.unsqu")
    ):
        OverTime(layer)(torch.rand(shape))
    assert OverTime(nn.ReLU())(torch.rand(2, 3)).shape == (2, 3)


def test_no_hint_where_nothing_is_near():
    with pytest.raises(ValueError, match=r"got 'step'$"):
        LIF(surrogate="step")


def test_names_of_other_libraries_are_the_same_functions():
    """The hint is only for functions equal to ours with width 1 / alpha."""
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    from asgl_cuda.interop.identify import identify

    theirs = {
        "atan": surrogate.ATan, "softsign": surrogate.SoftSign, "piecewisequadratic": surrogate.PiecewiseQuadratic,
        "piecewiseexp": surrogate.PiecewiseExp, "rect": surrogate.Rect,
    }  # fmt: skip
    assert theirs.keys() == ELSEWHERE.keys()
    for name, kind in theirs.items():
        found = identify(kind(alpha=3.0))
        assert (found.surrogate, found.width, found.gain) == (ELSEWHERE[name], pytest.approx(1 / 3), pytest.approx(1))
