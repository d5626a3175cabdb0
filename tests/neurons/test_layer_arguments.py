"""Arguments and inputs of layers: numbers of every type, invalid values, and names from other libraries."""

import copy
import inspect
import io
import math
import re
import warnings
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, AdaptiveLIF, BatchNormLIF, LeakyIntegrator, OverTime, RecurrentLIF, checks
from asgl_cuda.reference.surrogates import ELSEWHERE

numpy = pytest.importorskip("numpy")

LAYERS = {
    "LIF": LIF, "BatchNormLIF": partial(BatchNormLIF, 3), "LeakyIntegrator": LeakyIntegrator,
    "AdaptiveLIF": AdaptiveLIF, "RecurrentLIF": partial(RecurrentLIF, 3, syn_decay=0.5),
}  # fmt: skip
X = torch.ones(2, 4, 3)
NUMBERS = {  # of each layer, those that another one does not have
    "LIF": (
        "decay", "width", "v_threshold", "analog_prob", "v_reset", "v_min", "surrogate_gain", "v_rest", "input_gain",
    ),
    "BatchNormLIF": ("eps", "momentum", "input_scale"),
    "LeakyIntegrator": ("decay", "v_rest", "input_gain"),
    "AdaptiveLIF": ("adapt_decay", "adapt_potential", "adapt_spike"),
    "RecurrentLIF": ("syn_decay",),
}  # fmt: skip
PAIRS = [(kind, name) for kind, names in NUMBERS.items() for name in names]
SETTERS = [*(("LIF", name) for name in ("width", "decay", "v_threshold", "analog_prob")), ("LeakyIntegrator", "decay")]
LEARNED = {
    "width": "learn_width", "decay": "learn_decay", "v_threshold": "learn_threshold", "syn_decay": "learn_syn_decay",
    **dict.fromkeys(NUMBERS["AdaptiveLIF"], "learn_adaptation"),
}  # fmt: skip
NUMBER_LIKE = {
    "a tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "a tensor with a dimension": lambda value: torch.tensor([value], dtype=torch.float64),
    "a number of numpy": numpy.float64,
    "an array": lambda value: numpy.array(value),
    "an array with a dimension": lambda value: numpy.array([value]),
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
    layer = LAYERS[kind](**{name: NUMBER_LIKE[like](0.25)})
    assert value_of(layer, name) == pytest.approx(0.25, rel=1e-6)
    names = {"log_width", "weight", "bias", "recurrent_weight", "recurrent_bias"}
    assert set(dict(layer.named_parameters())) <= names
    assert "0.25" in repr(layer)
    layer(torch.rand(2, 4, 3))
    copy.deepcopy(layer)


@pytest.mark.parametrize(("kind", "name"), SETTERS)
@pytest.mark.parametrize("like", NUMBER_LIKE)
@pytest.mark.parametrize("learned", [False, True])
def test_setters_take_them_too(kind, name, like, learned):
    layer = LAYERS[kind](**({LEARNED[name]: learned} if name in LEARNED else {}))
    parameters = dict(layer.named_parameters())
    setattr(layer, name, NUMBER_LIKE[like](0.25))
    assert value_of(layer, name) == pytest.approx(0.25, rel=1e-6)
    assert dict(layer.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[key] for key, parameter in layer.named_parameters())
    with pytest.raises((ValueError, TypeError), match=rf"asgl_cuda\.{kind}: .*{name} must be"):
        setattr(layer, name, "1")
    assert value_of(layer, name) == pytest.approx(0.25, rel=1e-6)


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
    words = rf"asgl_cuda\.{kind}: {name} is a constant and .* {option + '=True' if option else ''}.*item\(\)"
    options = {option: False} if option else {}
    with pytest.raises(ValueError, match=words):
        LAYERS[kind](**{name: given}, **options)
    if (kind, name) in SETTERS:
        if option:
            setattr(layer, name, given)
            assert getattr(layer, name).item() == pytest.approx(0.25)
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
        (torch.ones((), device="meta"), "a float or a tensor of one value, got a tensor on meta"),
        (torch.tensor(True), "a float.*, got .*bool"),
        (torch.tensor(1j), "a float.*, got .*complex"),
        (numpy.ones(2), "a float.*, got ndarray"),
        (10**400, "a float, got a number beyond"),
        (nn.Identity(), "a float.*, got Identity"),
        ("1", "a float.*, got str"),
    ],
    ids=str,
)
def test_other_values_are_refused(kind, name, value, words):
    with pytest.raises((TypeError, ValueError), match=rf"asgl_cuda\.{kind}: {name} must be {words}"):
        LAYERS[kind](**{name: value})


@pytest.mark.parametrize("kind", [list, tuple, numpy.array])
def test_several_values_that_are_no_tensor(kind):
    """The error names the shape that a tensor must have, and its remedy works; otherwise the granularity is missing."""
    decay = kind([0.75, 0.5])
    options = {"num_features": 2, "granularity": "channel"}
    words = (
        rf"a float or a tensor of one value, or of shape \[2\], got {type(decay).__name__}; torch.as_tensor\(decay\)"
    )
    with pytest.raises(TypeError, match=rf"asgl_cuda\.LIF: decay must be {words} makes a tensor of it$"):
        LIF(decay=decay, **options)
    assert LIF(decay=torch.as_tensor(decay), **options).decay.tolist() == [0.75, 0.5]
    with pytest.raises(
        TypeError, match=r"decay must be a float or a tensor of one value, got .*; granularity 'channel' or"
    ):
        LIF(decay=decay)


@pytest.mark.parametrize("kind", ["LIF", "BatchNormLIF", "LeakyIntegrator", "AdaptiveLIF"])
@pytest.mark.parametrize("granularity", ["channel", "neuron"])
def test_numbers_of_numpy_are_sizes_and_flags(kind, granularity):
    options = {"granularity": granularity, "time_dim": numpy.int64(1), "stateful": numpy.bool_(True)}
    for size in (numpy.int64(3), (numpy.int32(3),)):
        layer = getattr(asgl_cuda, kind)(size, learn_decay=numpy.bool_(True), **options)
        assert layer.num_features == (3,)
        assert (type(layer.num_features[0]), type(layer.time_dim), type(layer.stateful)) == (int, int, bool)
        assert layer.logit_decay.shape == (3,)


# ---- invalid values ----

FLAGS = (
    "learn_width", "learn_decay", "learn_threshold", "strict_threshold", "detach_reset", "scale_output", "stateful",
    "store_v_seq",
)  # fmt: skip
BAD = [
    # The layer, arguments, and the message; TypeError where a type is named.
    ("LIF", {"granularity": "row"}, "granularity must be one of layer, channel, neuron, got 'row'"),
    ("LIF", {"granularity": "channel"}, "granularity 'channel' needs num_features, the number of channels, got None"),
    ("LIF", {"granularity": "neuron"}, "granularity 'neuron' needs num_features, the shape of the neurons, got None"),
    ("LIF", {"num_features": [3, 4], "granularity": "channel"}, r".* needs num_features, .* channels, got \[3, 4\]"),
    ("LIF", {"num_features": 3.0, "granularity": "channel"}, "num_features must be an int.*, got 3.0$"),
    ("LIF", {"num_features": -3, "granularity": "channel"}, "num_features must be .*positive.*-3"),
    ("LIF", {"num_features": 0, "granularity": "channel"}, "num_features must be .*positive.*0"),
    ("LIF", {"num_features": "ab", "granularity": "neuron"}, "num_features must be an int.*, got 'ab'"),
    ("LIF", {"num_features": True, "granularity": "channel"}, "num_features must be an int.*, got True"),
    ("LIF", {"num_features": [2, True], "granularity": "neuron"}, r"num_features must be an int.*, got \[2, True\]"),
    ("LIF", {"num_features": [[64]], "granularity": "neuron"}, r"num_features must be an int.*, got \[\[64\]\]$"),
    ("LIF", {"num_features": torch.tensor([3]), "granularity": "neuron"}, r"num_features .*; num_features.tolist\(\)"),
    ("LIF", {"num_features": 128}, "num_features needs granularity 'channel' .*, got 128 with .* 'layer', .* leave"),
    ("LIF", {"num_features": 0.9}, "num_features must be an int .*, got 0.9; a decay is passed by name, decay=0.9"),
    ("LIF", {"decay": 1 + 1e-9}, r"decay must be in \[0, 1\], got 1.000000001$"),
    ("LIF", {"surrogate": "step"}, "surrogate must be one of .*, got 'step'$"),
    ("LIF", {"width": 0.0}, "width must be > 0.* 0.0"),
    ("LIF", {"width": math.nan}, "width must be > 0.* nan"),
    ("LIF", {"width": math.inf, "learn_width": False}, "width must be finite, got inf"),
    ("LIF", {"width": 1e9}, r"a learned width must be in \[3\.059\d+e-07, 32690\d+\.\d+\], got 1000000000.0"),
    ("LIF", {"decay": 0.0, "learn_decay": True}, r"a learned decay must be in \[3.06e-07, 1 - 3.06e-07\], got 0.0"),
    ("LIF", {"decay": 1, "learn_decay": True}, r"a learned decay must be in \[3.06e-07, .*, got 1"),
    ("LIF", {"decay": 1e-9, "learn_decay": True}, r"a learned decay must be in \[3.06e-07, .*, got 1e-09"),
    ("LIF", {"decay": math.nan, "learn_decay": True}, r"a learned decay must be in \[3.06e-07, .*, got nan"),
    ("LIF", {"time_dim": 1.0}, "time_dim must be an int, got float"),
    ("LIF", {"device": "gpu"}, r"device must be a torch\.device, its name or its index, got 'gpu'"),
    ("LIF", {"dtype": torch.int32}, "dtype must be .*float32.*torch.int32"),
    ("LIF", {"v_reset": math.inf}, "v_reset must be finite, got inf"),
    ("LIF", {"v_rest": -math.inf}, "v_rest must be finite, got -inf"),
    *(
        ("LIF", {"v_reset": None, name: math.nan}, f"{name} must be finite, got nan")
        for name in ("decay", "v_threshold", "reset_amount", "v_rest", "input_gain", "surrogate_gain")
    ),
    ("LIF", {"reset_amount": 0.5}, "reset_amount .* needs v_reset=None, got v_reset 0.0"),
    ("LIF", {"backend": "foo"}, "backend must be one of .*reference.*'foo'"),
    *(
        (
            "LIF", {"v_threshold": value, "v_reset": None, "multi_spike": True, "analog_prob": 0.0},
            f"multi_spike needs v_threshold > 0, got {value}",
        )
        for value in (0.0, -1.0)
    ),
    *(("LIF", {flag: "no"}, f"{flag} must be a bool, got str") for flag in FLAGS),
    *(
        ("BatchNormLIF", {"num_features": given}, f"num_features must be a positive int, .*, got {given}")
        for given in (3.0, None)
    ),
    ("BatchNormLIF", {"num_features": [3, 4]}, r"num_features must be one number for .* 'layer', got \[3, 4\]; g"),
    ("BatchNormLIF", {"input_gain": 2.0}, "takes no input_gain; use input_scale, the factor on the normalised input"),
    ("BatchNormLIF", {"eps": math.nan}, "eps must be finite, got nan"),
    ("BatchNormLIF", {"eps": -1.0}, "eps must be >= 0, got -1.0"),
    ("BatchNormLIF", {"momentum": 1.5}, r"momentum must be in \[0, 1\] or None, got 1.5"),
    ("BatchNormLIF", {"momentum": math.nan}, r"momentum must be in \[0, 1\] or None, got nan"),
    ("BatchNormLIF", {"input_scale": math.nan}, "input_scale must be finite, got nan"),
    ("BatchNormLIF", {"affine": "no"}, "affine must be a bool, got str"),
    ("BatchNormLIF", {"track_running_stats": 1}, "track_running_stats must be a bool, got int"),
    *(
        (kind, {"surrogate": "periodic_exponential"}, "surrogate 'periodic_exponential' needs multi_spike=True, which "
         "only LIF, BatchNormLIF and their functions take; the surrogates without multi_spike are rectangle, ")
        for kind in ("LIF", "AdaptiveLIF", "RecurrentLIF")
    ),
    ("AdaptiveLIF", {"surrogate": "none"}, "surrogate must be one of rectangle, triangle, .*, got 'none'"),
    ("LeakyIntegrator", {"granularity": "all"}, "granularity must be"),
    ("LeakyIntegrator", {"decay": 1.0, "learn_decay": True}, "a learned decay must be in"),
    ("LeakyIntegrator", {"decay": math.inf}, "decay must be finite"),
    ("LeakyIntegrator", {"delay": 1}, "delay must be a bool, got int"),
    ("LeakyIntegrator", {"backend": "best"}, "backend must be one of"),
    ("AdaptiveLIF", {"adapt_decay": 1.5}, r"adapt_decay must be in \[0, 1\], got 1.5$"),
    ("AdaptiveLIF", {"adapt_decay": 1.0, "learn_adaptation": True}, "a learned adapt_decay must be in"),
    ("AdaptiveLIF", {"adapt_spike": math.inf}, "adapt_spike must be finite"),
    ("AdaptiveLIF", {"to_threshold": 1}, "to_threshold must be a bool"),
    ("AdaptiveLIF", {"levels": 4}, ".*unexpected keyword argument 'levels'"),
    ("AdaptiveLIF", {"input_gain": 2.0}, ".*unexpected keyword argument 'input_gain'"),
    ("RecurrentLIF", {"recurrent": "conv"}, "recurrent must be"),
    ("RecurrentLIF", {"recurrent": "elementwise", "autapses": False}, ".* needs autapses=True, got False"),
    ("RecurrentLIF", {"hidden_size": 0}, "hidden_size must be .*positive"),
    ("RecurrentLIF", {"hidden_size": (2, 3)}, "hidden_size must be an int, got tuple"),
    *(("RecurrentLIF", {flag: 1}, f"{flag} must be a bool") for flag in ("bias", "autapses", "detach_recurrent")),
    ("RecurrentLIF", {"learn_syn_decay": True, "syn_decay": None}, "learn_syn_decay needs syn_decay"),
    ("RecurrentLIF", {"syn_decay": 1.5}, "syn_decay must be in"),
    ("RecurrentLIF", {"syn_decay": 1.0, "learn_syn_decay": True}, "a learned syn_decay must be in"),
    ("RecurrentLIF", {"adapt_decay": 1.5}, r"adapt_decay must be in \[0, 1\], got 1.5$"),
    ("RecurrentLIF", {"adapt_decay": 0.9, "input_gain": 2.0}, "input_gain must be 1 with an adaptation, got 2.0"),
    *(
        ("RecurrentLIF", {name: value}, f"{name} needs adapt_decay, got {value} without an adaptation")
        for name, value in (("adapt_potential", 0.1), ("adapt_spike", 0.0), ("to_threshold", True),
                            ("learn_adaptation", True))
    ),
    ("RecurrentLIF", {"num_features": 4}, ".*unexpected keyword argument 'num_features'"),
    *(
        ("RecurrentLIF", {name: 1}, f".*keyword argument '{name}', .* that these neurons do not have")
        for name in ("levels", "multi_spike", "v_min", "residual")
    ),
]  # fmt: skip
FIRST = {"BatchNormLIF": {"num_features": 3}, "RecurrentLIF": {"hidden_size": 3, "syn_decay": 0.5}}


@pytest.mark.parametrize(("kind", "arguments", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_arguments(kind, arguments, words):
    with pytest.raises((TypeError, ValueError), match=rf"^asgl_cuda\.{kind}: {words}") as caught:
        getattr(asgl_cuda, kind)(**{**FIRST.get(kind, {}), **arguments})
    is_type_error = re.search(
        "must be an? (int|bool|dtype).*, got|dtype|keyword|takes no input|have no", str(caught.value)
    )
    assert caught.type is (TypeError if is_type_error else ValueError)


@pytest.mark.parametrize(("width", "learned"), [(1e-40, False), (1e-9, True)])
def test_a_width_that_an_error_names_is_accepted(width, learned):
    """A bound that was rounded to the other side would be refused."""
    with pytest.raises(ValueError, match="width must be") as caught:
        asgl_cuda.LIF(width=width, learn_width=learned)
    bounds = re.findall(r"\d+\.\d+(?:e[+-]\d+)?", str(caught.value).split("got")[0])
    assert bounds
    for bound in bounds:
        asgl_cuda.LIF(width=float(bound), learn_width=learned)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("learned", [False, True])
def test_a_decay_outside_of_0_and_1_is_refused(kind, learned):
    words = rf"asgl_cuda\.{kind}: decay must be in \[0, 1\], got "
    for value, hint in (
        (2.0, "2; SpikingJelly's tau=2 is decay=0.5"),
        (20, "20; SpikingJelly's tau=20 is decay=0.95"),
        (1.001, "1.001; SpikingJelly's tau="),
        (-1, "-1$"),
        (-1e-9, "-1e-09$"),
    ):
        with pytest.raises(ValueError, match=words + hint):
            LAYERS[kind](decay=value, learn_decay=learned)
        layer = LAYERS[kind](learn_decay=learned)
        with pytest.raises(ValueError, match=words + hint):
            layer.decay = value
        assert value_of(layer, "decay") == 0.5
    for value in (0, 1):
        assert learned or LAYERS[kind](decay=value).decay == value


def test_functions_take_any_decay():
    x_seq = torch.ones(3, 2)
    assert asgl_cuda.leaky_integrator(x_seq, 2.0)[:, 0].tolist() == [1, 3, 7]
    assert asgl_cuda.lif(x_seq, decay=-1.0, v_threshold=5.0, return_v_seq=True).v_seq[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["v_reset", "v_min"])
def test_a_potential_after_a_spike_at_the_threshold_is_refused(learned, name):
    options = {"learn_threshold": learned}
    words = rf"asgl_cuda\.LIF: {name} must be below v_threshold, .* got {name} {{}} and v_threshold {{}}"
    for value in (1.0, 1.5):
        with pytest.raises(ValueError, match=words.format(f"{value:g}", 1)):
            LIF(**{name: value}, **options)
    layer = LIF(**{name: 0.5}, **options)
    with pytest.raises(ValueError, match=words.format(0.5, 0.4)):
        layer.v_threshold = 0.4
    assert value_of(layer, "v_threshold") == 1
    LIF(v_rest=-65.0, v_reset=-60.0, v_threshold=-50.0, **options)  # no warning: millivolts
    LIF(v_rest=-65.0, v_reset=-65.0, v_threshold=0.0, **options)


@pytest.mark.parametrize("kind", ["LIF", "BatchNormLIF"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"v_threshold": 0.0}, "v_threshold 0 is not above v_rest 0: .* without any input"),
        ({"v_threshold": 0.5, "v_rest": 0.75}, "v_threshold 0.5 is not above v_rest 0.75"),
        ({"v_threshold": -0.5, "v_rest": -1.0, "v_reset": None}, "a spike subtracts -0.5 from"),
        ({"v_reset": None, "reset_amount": 0.0}, "a spike subtracts 0 from"),
        ({"surrogate_gain": 0}, "surrogate_gain is 0"),
    ],
)
def test_a_warning_once_with_the_users_line(kind, options, words):
    with pytest.warns(UserWarning, match=rf"asgl_cuda\.{kind}: {words}") as found:
        LAYERS[kind](**options)
    assert [(each.filename, each.lineno) for each in found] == [(__file__, inspect.currentframe().f_lineno - 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LAYERS[kind](**options)


def test_the_setter_of_the_threshold_warns_but_not_where_neurons_are_at_rest():
    layer = LIF()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LIF(v_threshold=0.0, strict_threshold=True)
        LIF(surrogate_gain=1e-3)
    with pytest.warns(UserWarning, match="v_threshold 0 is not above v_rest 0"):
        layer.v_threshold = 0.0
    assert layer.v_threshold == 0


def test_a_layer_as_new_is_one_with_what_was_set():
    layer = LIF(learn_threshold=True)
    layer.v_reset = 2.0  # the attribute is the user's
    nn.init.zeros_(layer.threshold)
    layer.reset_parameters()
    assert layer.v_threshold.item() == 1


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["adapt_decay", "adapt_potential", "adapt_spike"])
def test_an_adaptation_has_no_value_none(name, learned):
    with pytest.raises(TypeError, match=f"asgl_cuda.AdaptiveLIF: {name} must be a float, got NoneType"):
        AdaptiveLIF(**{name: None}, learn_adaptation=learned)


@pytest.mark.parametrize("kind", LAYERS)
def test_none_is_refused_where_a_function_refuses_it(kind):
    layer = LAYERS[kind]
    defaults = getattr(layer, "func", layer).__init__.__kwdefaults__ or {}
    names = [*NUMBERS[kind], *(name for name, value in defaults.items() if isinstance(value, float))]
    for name in {*names} - {"v_reset", "v_min", "momentum", "syn_decay"}:  # documented to be None
        with pytest.raises(TypeError, match=rf"asgl_cuda\.{kind}: {name} must be a float, got NoneType"):
            layer(**{name: None})


# ---- values by neuron ----

N = 6
BY_NEURON = {  # a value's ends, and its option to learn it
    "decay": (0.1, 0.9, "learn_decay"),
    "width": (0.5, 2.0, "learn_width"),
    "v_threshold": (0.5, 2.0, "learn_threshold"),
    "v_reset": (-1.0, 0.4, None),
    "reset_amount": (0.2, 1.0, None),
    "syn_decay": (0.1, 0.9, "learn_syn_decay"),
    "adapt_decay": (0.1, 0.9, "learn_adaptation"),
    "adapt_potential": (-0.2, 0.2, "learn_adaptation"),
    "adapt_spike": (-0.1, 0.5, "learn_adaptation"),
}
COMMON = ("decay", "width", "v_threshold", "v_reset", "reset_amount")
ADAPTATION = ("adapt_decay", "adapt_potential", "adapt_spike")
OF_LAYERS = [
    (kind, name, learned)
    for kind, names in {
        LIF: COMMON, BatchNormLIF: COMMON, LeakyIntegrator: ("decay",), AdaptiveLIF: (*COMMON, *ADAPTATION),
        RecurrentLIF: (*COMMON, *ADAPTATION, "syn_decay"),
    }.items()
    for name in names
    for learned in ((False, True) if BY_NEURON[name][2] else (False,))
]  # fmt: skip


def by_neuron(kind, name, learned, value, granularity="neuron", **options):
    """A layer with this value, learned or not, and the others' defaults."""
    _, _, option = BY_NEURON[name]
    if option == "learn_width" and kind is not LeakyIntegrator:
        options["learn_width"] = learned
    elif option is not None:
        options[option] = learned
    if name == "reset_amount":
        options["v_reset"] = None
    if kind is RecurrentLIF and name.startswith("adapt"):
        options.setdefault("adapt_decay", 0.5)
    if kind is not LeakyIntegrator:
        options["analog_prob"] = 0.0
    return kind(N, **{**options, name: value}, granularity=granularity)


@pytest.mark.parametrize("granularity", ["channel", "neuron"])
@pytest.mark.parametrize(("kind", "name", "learned"), OF_LAYERS)
def test_a_value_for_each_neuron(kind, name, learned, granularity):
    """Each neuron computes as one of a layer with that value alone; copies, files, moves and resets keep it."""
    low, high, _ = BY_NEURON[name]
    value, x_seq = torch.linspace(low, high, N), torch.rand(5, 4, N) * 2 - 0.5
    torch.manual_seed(0)
    layer = by_neuron(kind, name, learned, value, granularity)
    torch.testing.assert_close(torch.as_tensor(getattr(layer, name)).detach(), value)
    assert f"{name}={'learned from ' if learned else ''}{low:g} to {high:g}" in repr(layer)
    expected = layer(x_seq).detach()
    for n in range(N) if kind is not RecurrentLIF else ():
        alone = by_neuron(kind, name, learned, value[n].item(), granularity)
        assert torch.equal(alone(x_seq)[..., n], expected[..., n])
    with torch.device("meta"):
        empty = by_neuron(kind, name, learned, value, granularity)
    assert empty(x_seq.to("meta")).is_meta
    empty.to_empty(device="cpu").reset_parameters()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for each in (
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
        empty,
        copy.deepcopy(layer).double().float(),
    ):
        each.load_state_dict(layer.state_dict())
        assert torch.equal(each(x_seq), expected)
    if not learned:
        half = copy.deepcopy(layer).half()
        torch.testing.assert_close(getattr(half, name), value, rtol=0, atol=0)
    uniform = by_neuron(kind, name, learned, high, granularity)
    assert layer.state_dict().keys() == uniform.state_dict().keys()
    value.zero_()
    assert torch.equal(layer(x_seq), expected), "a copy"


@pytest.mark.parametrize("name", ["decay", "width", "v_threshold"])
@pytest.mark.parametrize("learned", [False, True])
def test_setters_take_a_value_for_each_neuron(name, learned):
    low, high, _ = BY_NEURON[name]
    layer, value = by_neuron(LIF, name, learned, high), torch.linspace(low, high, N)
    setattr(layer, name, value)
    torch.testing.assert_close(getattr(layer, name).detach(), value)
    with pytest.raises(ValueError, match=rf"LIF: {name} must be .* or of shape \[6\], got a tensor of shape \[5\]"):
        setattr(layer, name, value[:5])
    torch.testing.assert_close(getattr(layer, name).detach(), value)
    setattr(layer, name, high)
    assert (torch.as_tensor(getattr(layer, name)) == pytest.approx(high)) if not learned else True


@pytest.mark.parametrize(("kind", "name", "learned"), OF_LAYERS)
def test_other_shapes_and_values_are_refused(kind, name, learned):
    low, high, option = BY_NEURON[name]
    value = torch.linspace(low, high, N)
    bad = {
        "or of shape [6], got a tensor of shape [5]": value[:5],
        "or of shape [6], got a tensor of shape [6, 1]": value[:, None],
        "or of shape [6], got torch.complex64": value.to(torch.complex64),
        "whose values can't be read": value.to("meta"),
        "nan": torch.where(value == high, torch.nan, value),
    }
    if not learned:
        remedy = "" if option is None else f"set {option}=True to learn it, or "
        bad[f"requires a gradient; {remedy}pass {name}.detach() for a constant"] = nn.Parameter(value)
    if "decay" in name:
        bad["got 1.5"] = torch.where(value == high, 1.5, value)
    for words, each in bad.items():
        with pytest.raises((TypeError, ValueError), match=rf"^asgl_cuda\.{kind.__name__}: .*" + re.escape(words)):
            by_neuron(kind, name, learned, each)
    if kind not in (BatchNormLIF, RecurrentLIF):
        with pytest.raises(ValueError, match="granularity 'channel' or 'neuron' takes a value for each"):
            kind(**{name: value})


class Moved(torch.Tensor):
    """Records where it is moved."""

    devices = ()

    def to(self, *arguments, **options):
        Moved.devices += arguments
        return self


def test_constants_by_neuron_move_with_the_layer():
    values = {name: torch.linspace(*BY_NEURON[name][:2], N).as_subclass(Moved) for name in BY_NEURON}
    layer = RecurrentLIF(N, granularity="neuron", v_reset=None)
    layer._syn_decay, layer._adapt_decay = values.pop("syn_decay"), values.pop("adapt_decay")
    for name, value in values.items():
        setattr(layer, name if name in ("v_reset", "reset_amount") or name.startswith("adapt") else f"_{name}", value)
    Moved.devices = ()
    layer.to("cpu")
    assert Moved.devices == (torch.device("cpu"),) * len(BY_NEURON)
    layer.to("meta")
    assert Moved.devices == (torch.device("cpu"),) * len(BY_NEURON)


def test_a_reset_at_one_neurons_threshold_is_refused():
    v_reset, v_threshold = torch.tensor([0.0, 0.5]), torch.tensor([0.4, 0.5])
    LIF(2, granularity="neuron", v_reset=v_reset, v_threshold=v_threshold + 0.1)
    with pytest.raises(ValueError, match="v_reset must be below v_threshold"):
        LIF(2, granularity="neuron", v_reset=v_reset, v_threshold=v_threshold)


# ---- inputs ----

CHANNEL, NEURON = {"granularity": "channel"}, {"granularity": "neuron"}


@pytest.mark.parametrize(
    ("layer", "given", "words"),
    [
        # An input, or its shape, and words of the message.
        (LIF(8, **CHANNEL), (4, 8, 5), "[T, B, C, ...] with C = 8, got [4, 8, 5]; is time or the batch missing?"),
        (LIF(8, **CHANNEL), (4, 8), "[T, B, C, ...] with C = 8, got [4, 8]; is time or the batch missing?"),
        (LIF(8, **CHANNEL), (4, 6, 5), "[T, B, C, ...] with C = 8, got [4, 6, 5]"),
        (LIF(8, **CHANNEL, time_dim=1), (4, 8, 5), "C, ...] with C = 8, got [4, 8, 5]; is time or the batch missing?"),
        (LIF(8, **CHANNEL, time_dim=-1), (4, 6, 5, 7), "[B, C, ..., T] with C = 8, got [4, 6, 5, 7]"),
        (LIF((4, 8), **NEURON), (4, 8), "4, 8] (B may be missing or several dimensions), got [4, 8]; is time missing?"),
        (LIF(64, **NEURON, time_dim=2), (2, 8, 4), "x_seq must have shape [B, 64, T], got [2, 8, 4]"),
        (LIF(64, **NEURON, time_dim=1), (8, 64), "shape [B, T, 64], got [8, 64]; is time or the batch missing?"),
        (LIF((2, 3, 5, 1), **NEURON), (2, 3, 5), "[T, B, 2, 3, 5, 1] (B may be missing or several dimensions), got "
         "[2, 3, 5]"),
        (LeakyIntegrator((4, 8), **NEURON, learn_decay=True), (2, 3, 8), "4, 8] (B may be missing or several dimensions"
         "), got [2, 3, 8]"),
        (BatchNormLIF(8), (4, 8, 5, 6), "running_mean must have shape [5], with a value for each channel (dimension 2) "
         "of x_seq of shape [4, 8, 5, 6], got [8]; is time or the batch missing?"),
        (BatchNormLIF(8), (4, 3, 5, 6), "of x_seq of shape [4, 3, 5, 6], got [8]"),
        (BatchNormLIF(8).step, (4, 3, 8), "got [8]; if step got a sequence, call the model itself"),
        (BatchNormLIF(8), (4, 8), "time and batch, got shape [4, 8] with time_dim 0; is time or the batch missing?"),
        (LIF(time_dim=1), (4,), "got 1; is time or the batch missing?"),
        (LIF(time_dim=-3), (4, 5), "got -3; is time or the batch missing?"),
        (LIF((4, 8), **NEURON, learn_width=False), (4, 8), "[T, B, 4, 8] (B may be missing or several dimensions), go"
         "t [4, 8]; is time missing?"),
        (LeakyIntegrator(8, **NEURON), (8,), "[T, B, 8] (B may be missing or several dimensions), got [8]; is time mi"
         "ssing?"),
        (LeakyIntegrator(8, **CHANNEL), (4, 8), "[T, B, C, ...] with C = 8, got [4, 8]; is time or the batch missing?"),
        (AdaptiveLIF(8, **CHANNEL, learn_width=False), (4, 8), "with C = 8, got [4, 8]; is time or the batch missing?"),
        (LIF(8, **CHANNEL, levels=2, v_reset=None), (4, 8, 5), "C = 8, got [4, 8, 5]; is time or the batch missing?"),
        (BatchNormLIF((8, 8, 8), **NEURON), (4, 8, 8, 8), "[T, B, 8, 8, 8] (B may be several dimensions), got [4, 8, 8"
         ", 8]; is time or the batch missing?"),
        (BatchNormLIF(8, affine=False, track_running_stats=False), (4, 8, 6, 6), "must have shape [T, "
         "B, C, ...] with C = 8, got [4, 8, 6, 6]; is time or the batch missing?"),
        (RecurrentLIF(3), (2, 3), "must have shape [T, B, N], or [B, T, N] with time_dim=1, got [2, 3] with time_dim=0;"
         " is time or the batch missing?"),
        (LIF(), [[1.0]], "x_seq must be a tensor, got list"),
        (LIF(), numpy.ones((2, 3)), "x_seq must be a tensor, got ndarray; torch.tensor(x_seq) converts it"),
        (LIF(), [torch.ones(3)] * 2, "x_seq must be a tensor, got list; torch.stack(x_seq) joins its tensors"),
        (LIF(3, **CHANNEL), [[1.0]], "x_seq must be a tensor, got list"),
        (LIF(), torch.tensor(1.0), "x_seq must have at least one dimension"),
        (LIF(3, **CHANNEL), torch.tensor(1.0), "x_seq must have at least one dimension"),
        *((partial(layer, X), X, "takes no residual; call layer(x_seq + residual). If the argument is a state")
          for layer in (AdaptiveLIF(), LeakyIntegrator(), RecurrentLIF(3))),
        (RecurrentLIF(3).step, (2, 4, 3), "x_seq must have shape [T, B, N], or [B, T, N] with time_dim=1, got [1, 2, "
         "4, 3] with time_dim=0; if step got a sequence, call the model itself instead"),
        (RecurrentLIF(4), X, "the last dimension of x_seq must be hidden_size, 4, got shape [2, 4, 3]"),
        (OverTime(nn.Conv2d(1, 8, 3)), (8, 1, 8, 8), "[T, B, 1, H, W] for Conv2d, got shape [8, 1, 8, 8]; x_seq.unsqu"),
        (OverTime(nn.Conv2d(1, 8, 3)), (8, 1, 8, 8), "a batch of size 1, x_seq.unsqueeze(0) a single time step"),
        (OverTime(nn.Conv2d(8, 8, 3, padding=1)), (1, 8, 6, 6), "[T, B, 8, H, W] for Conv2d, got"),
        (OverTime(nn.Sequential(nn.Sequential(nn.ConvTranspose1d(6, 4, 1), nn.ReLU()))), (2, 3, 6),
         "[T, B, 6, L] for ConvTranspose1d, got"),
        (OverTime(nn.LazyConv3d(6, 1)), (6, 1, 1, 1, 1), "[T, B, C, D, H, W] for LazyConv3d, got"),
        (OverTime(nn.Linear(6, 6)), (2, 3), "[T, B, 6] for Linear, got"),
        (OverTime(nn.LayerNorm((2, 6))), (2, 1, 6), "[T, B, 2, 6] for LayerNorm, got"),
        (OverTime(nn.Linear(3, 3)), (3,), "x_seq must have time and batch, "),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_inputs_that_do_not_fit(layer, given, words):
    with pytest.raises((TypeError, ValueError), match=r"^asgl_cuda\.\w+: .*" + re.escape(words)) as caught:
        layer(torch.rand(given) if isinstance(given, tuple) else given)
    assert ("is time or the batch missing?" in str(caught.value)) == ("is time or the batch missing?" in words)


def test_unsqueeze_is_advised_only_where_one_dimension_is_missing():
    for shape in ((8, 1), (8, 1, 8)):
        with pytest.raises(ValueError, match=rf"for Conv2d, got shape {re.escape(str([*shape]))}$"):
            OverTime(nn.Conv2d(1, 8, 3))(torch.rand(shape))


@pytest.mark.parametrize("kind", LAYERS)
def test_an_error_names_the_layer(kind):
    features = {} if kind in ("BatchNormLIF", "RecurrentLIF") else {"num_features": 3}
    by_neuron = LAYERS[kind](**features, **NEURON)
    for layer, given in (
        (LAYERS[kind](), [[1.0]]),
        (LAYERS[kind](), None),
        (by_neuron, [[1.0]]),
        (by_neuron, X.bool()),
    ):
        with pytest.raises(TypeError, match=rf"^asgl_cuda\.{kind}: x_seq must be (a tensor|float16)"):
            layer(given)


# ---- names ----

BY_GAIN = "divides the input by tau, as input_gain=0.5 does"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LIF(surrogate="atan"), "did you mean arctan, with width=1 / alpha"),
        (lambda: LIF(surrogate="SoftSign"), "did you mean fast_sigmoid, with width=1 / alpha"),
        (lambda: LIF(surrogate="Rectangle"), "did you mean rectangle\\?"),
        (lambda: LIF(surrogate="trinagle"), "did you mean triangle\\?"),
        (lambda: asgl_cuda.lif(X, surrogate="sigmoyd"), "did you mean sigmoid\\?"),
        (lambda: LIF(3, granularity="chanel"), "did you mean channel\\?"),
        (lambda: LIF(backend="CPU"), "did you mean cpu\\?"),
        (lambda: LIF(backend="gpu"), "got 'gpu'; None, the default, is the best for the device of x_seq"),
        (
            lambda: asgl_cuda.lif(X, backend="torch"),
            "got 'torch'; None, the default, is the best for the device of x_seq",
        ),
        (lambda: RecurrentLIF(64, input_size=3), "'input_size'; for inputs of another size put .* before the layer"),
        (lambda: RecurrentLIF(64, num_layers=3), "'num_layers'; for several layers put several RecurrentLIF .*"),
        (lambda: LIF(alpha=2.0), "snnTorch's alpha is the decay of a LeakyIntegrator .* alpha is width=1 / alpha"),
        (lambda: LIF(alpha=0.5), "snnTorch's alpha=0.5 is the decay of .*"),
        (lambda: LeakyIntegrator(alpha=0.9), "'alpha'; snnTorch's alpha=0.9 is decay=0.9"),
        (lambda: asgl_cuda.leaky_integrator(X, alpha=0.9), "'alpha'; snnTorch's alpha=0.9 is decay=0.9"),
        (lambda: RecurrentLIF(3, alpha=0.9), "'alpha'; snnTorch's alpha=0.9 is syn_decay=0.9, SpikingJelly's alpha .*"),
        (lambda: asgl_cuda.recurrent_lif(X, X, alpha=2), "snnTorch's alpha is syn_decay, SpikingJelly's alpha is .*"),
        (lambda: LIF(tau_syn=5.0), "'tau_syn'; sinabs' tau_syn is .* of a LeakyIntegrator before the layer, and .*"),
        (
            lambda: LeakyIntegrator(tau_syn=5.0),
            r"'tau_syn'; sinabs' tau_syn is decay=exp\(-1 / tau_syn\) and multiplies the input by decay",
        ),
        (lambda: RecurrentLIF(3, tau_syn=5.0), r"sinabs' tau_syn is syn_decay=exp\(-1 / tau_syn\) and .* by syn_decay"),
        (lambda: BatchNormLIF(3, input_size=3), "'input_size'"),
        (lambda: asgl_cuda.batch_norm_lif(X, input_size=3), "'input_size'"),
        (lambda: asgl_cuda.lif(X, step_mode="m"), "x_seq has all time steps, as in SpikingJelly's step mode 'm'"),
        (lambda: LIF(beta=torch.nan), "snnTorch's beta is decay"),
        (lambda: LIF(beta=20), "snnTorch's beta is decay"),
        (lambda: LIF(size=3), "'size'"),
        (lambda: asgl_cuda.lif(X, backend="referense"), "did you mean reference\\?"),
        (lambda: asgl_cuda.convert(nn.Identity(), backend="cdua"), "did you mean cuda\\?"),
        (lambda: BatchNormLIF(3, v_treshold=1.0), "BatchNormLIF.*'v_treshold'; did you mean v_threshold\\?"),
        (
            lambda: asgl_cuda.batch_norm_lif(X, training=True, analog_probe=0.1),
            "batch_norm_lif.*'analog_probe'; did you mean analog_prob\\?",
        ),
        (lambda: LIF(tau=2), f"'tau'; SpikingJelly's tau=2 is decay=0.5 and {BY_GAIN}"),
        (lambda: LIF(tau=None), "'tau'; SpikingJelly's tau is decay=1 - 1 / tau and .* as input_gain=1 / tau does"),
        (lambda: LIF(tau=1), "tau=1 is decay=0 and divides the input by tau, as input_gain=1 does"),
        (lambda: LIF(init_tau=4.0, learn_decay=True), "SpikingJelly's init_tau=4.0 is decay=0.75 and divides .*"),
        (
            lambda: BatchNormLIF(3, tau=2.0),
            "tau=2.0 is decay=0.5 and divides the input by tau, as input_scale=0.5 does",
        ),
        (lambda: AdaptiveLIF(tau=2.0), "tau=2.0 is decay=0.5 and divides the input by tau"),
        (lambda: LeakyIntegrator(tau=2.0), f"tau=2.0 is decay=0.5 and {BY_GAIN}"),
        (lambda: asgl_cuda.lif(X, tau=2.0), f"tau=2.0 is decay=0.5 and {BY_GAIN}"),
        (lambda: asgl_cuda.batch_norm_lif(X, tau=2.0), "tau=2.0 is decay=0.5 .* as input_scale=0.5 does"),
        (lambda: asgl_cuda.adaptive_lif(X, adapt_decay=0.9, beta=0.9), "snnTorch's beta=0.9 is decay=0.9"),
        (lambda: asgl_cuda.leaky_integrator(X, beta=0.9), "snnTorch's beta=0.9 is decay=0.9"),
        (lambda: LIF(threshold=1), "'threshold'; snnTorch's threshold=1 is v_threshold=1, strict_threshold=True"),
        (lambda: LIF(slope=9), r"snnTorch's fast_sigmoid\(slope\) is .*, width=1 / slope, surrogate_gain=2 / slope"),
        (lambda: LIF(surrogate=abs), r"pass a name: .*\(slope\) is .*\(alpha\) is surrogate='arctan', width=1 / alpha"),
        (lambda: LIF(v_th=1), "Norse's v_th=1 is v_threshold=1, strict_threshold=True"),
        (lambda: LIF(spike_threshold=0.5), "sinabs' spike_threshold=0.5 is v_threshold=0.5"),
        (lambda: LIF(batch_first=True), "'batch_first'; batch_first=True of torch.nn.RNN is time_dim=1"),
        (lambda: BatchNormLIF(3, step_mode="m"), "in SpikingJelly's step mode 'm', layer.step\\(x_t\\) as in 's'"),
        (lambda: LeakyIntegrator(threshold=1), "'threshold'"),
        (lambda: asgl_cuda.lif(X, learn_beta=True), "'learn_beta'"),
    ],
)
def test_names_of_another_spelling_or_library(call, words):
    with pytest.raises((TypeError, ValueError), match=rf"^asgl_cuda\..*{words}\??$") as caught:
        call()
    assert (caught.type is TypeError) == ("got an unexpected keyword argument" in str(caught.value))


def test_the_size_of_the_input_is_no_argument():
    with pytest.raises(
        TypeError, match=r"asgl_cuda\.RecurrentLIF: takes only hidden_size .* got \(64, 128\); .*Linear"
    ):
        RecurrentLIF(64, 128)


def test_the_kind_of_a_weight_does_not_change():
    layer = RecurrentLIF(3, recurrent="elementwise")
    with pytest.raises(AttributeError, match=r"asgl_cuda\.RecurrentLIF: recurrent decides the shape of the weight"):
        layer.recurrent = "dense"
    assert layer.recurrent == copy.deepcopy(layer).recurrent == "elementwise"


def test_a_momentum_that_is_set():
    layer = BatchNormLIF(3)
    for value in (math.nan, torch.tensor(math.nan), torch.tensor([math.inf])):
        layer.momentum = value
        with pytest.raises(ValueError, match=r"asgl_cuda\.batch_norm_lif: momentum must be finite, got (nan|inf)"):
            layer(X)
    assert layer.running_mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [numpy.ones(3), numpy.zeros(3), torch.ones(3)], ids=str)
def test_an_adaptation_that_is_not_there_has_no_values(value):
    words = "adapt_spike needs adapt_decay, got .* without an adaptation"
    with pytest.raises(ValueError, match=rf"asgl_cuda\.RecurrentLIF: {words}"):
        RecurrentLIF(3, adapt_spike=value)
    with pytest.raises(ValueError, match=rf"asgl_cuda\.recurrent_lif: {words}"):
        asgl_cuda.recurrent_lif(X, torch.zeros(3, 3), adapt_spike=value)


def test_names_of_other_libraries_are_the_same_functions():
    """The hint is only for functions equal to ours with width 1 / alpha."""
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    from asgl_cuda.interop.identify import identify_spike_function

    theirs = {
        "atan": surrogate.ATan, "softsign": surrogate.SoftSign, "piecewisequadratic": surrogate.PiecewiseQuadratic,
        "piecewiseexp": surrogate.PiecewiseExp, "rect": surrogate.Rect,
    }  # fmt: skip
    assert theirs.keys() == ELSEWHERE.keys()
    for name, kind in theirs.items():
        found = identify_spike_function(kind(alpha=3.0))
        assert (found.surrogate, found.width, found.gain) == (ELSEWHERE[name], pytest.approx(1 / 3), pytest.approx(1))
