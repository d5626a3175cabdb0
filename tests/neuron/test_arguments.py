"""Invalid arguments: the type of the error, the expected value and the given one."""

import inspect
import warnings
from functools import partial

import pytest
import torch
from comparison import assert_equals_reference
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import backends, call, checks, extension
from asgl_cuda.checks import shown

X = torch.zeros(4, 6, 3)
STATE = torch.zeros(2, dtype=torch.int64)

with_extension = pytest.mark.skipif(extension.module is None, reason=str(extension.problem))

BAD = [
    # Options, error, and words of the message.
    ({"x_seq": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, ["x_seq", "float32", "torch.int64"]),
    ({"x_seq": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, ["x_seq", "float32", "complex64"]),
    ({"x_seq": [[1.0]]}, TypeError, ["x_seq", "tensor", "list"]),
    ({"x_seq": torch.tensor(1.0)}, ValueError, ["x_seq", "at least one dimension"]),
    ({"x_seq": torch.zeros(0, 3)}, ValueError, ["x_seq", "time step", "[0, 3]"]),
    ({"time_dim": 3}, ValueError, ["time_dim", "[-3, 2]", "got 3"]),
    ({"time_dim": -4}, ValueError, ["time_dim", "got -4"]),
    ({"time_dim": 1.0}, TypeError, ["time_dim", "int", "float"]),
    *(
        ({name: torch.ones(5)}, ValueError, [name, "[4, 6, 3]", "[5]"])
        for name in ("width", "decay", "v_threshold", "v_reset", "input_gain", "input_bias", "input_mean")
    ),
    ({"decay": torch.ones(2, 4, 6, 3)}, ValueError, ["decay", "[4, 6, 3]", "[2, 4, 6, 3]"]),
    ({"width": torch.ones(1, 4, 6, 3)}, ValueError, ["width", "[4, 6, 3]", "[1, 4, 6, 3]"]),
    ({"width": torch.ones(3, dtype=torch.int32)}, TypeError, ["width", "floating", "torch.int32"]),
    ({"decay": torch.ones((), dtype=torch.bool)}, TypeError, ["decay", "floating", "torch.bool"]),
    ({"v_threshold": torch.ones(3, dtype=torch.complex64)}, TypeError, ["v_threshold", "floating"]),
    ({"width": torch.ones(3, device="meta")}, ValueError, ["width", "cpu", "meta"]),
    ({"width": "1"}, TypeError, ["width", "float or a tensor", "str"]),
    ({"decay": None}, TypeError, ["decay", "float or a tensor", "NoneType"]),
    ({"width": True}, TypeError, ["width", "bool"]),
    ({"width": 0.0}, ValueError, ["width", "> 0", "0.0"]),
    ({"width": -1}, ValueError, ["width", "> 0", "-1"]),
    ({"width": float("nan")}, ValueError, ["width", "> 0", "nan"]),
    ({"width": float("inf")}, ValueError, ["width", "finite", "inf"]),
    ({"width": 1e-40}, ValueError, ["width", "1.08e-19", "1e-40"]),
    ({"width": torch.tensor(-0.5)}, ValueError, ["width", "> 0", "-0.5"]),
    ({"width": torch.tensor([1.0, 0.0, 1.0])}, ValueError, ["width", "> 0", "0.0"]),
    ({"width": torch.tensor([1.0, float("nan"), 1.0])}, ValueError, ["width", "> 0", "nan"]),
    ({"width": torch.full((3,), 1e-40)}, ValueError, ["width", "1.08e-19"]),
    ({"width": torch.tensor([1.0, float("inf"), 1.0])}, ValueError, ["width", "finite", "inf"]),
    ({"width": torch.tensor([1e-40, float("inf"), 1.0])}, ValueError, ["width", "1.08e-19"]),
    ({"width": torch.tensor([[float("inf")]])}, ValueError, ["width", "finite", "inf"]),
    ({"width": torch.tensor([float("inf"), float("nan")])[:, None].expand(2, 3)[:1]}, ValueError, ["width", "inf"]),
    ({"width": 10**400}, ValueError, ["width", "float", "beyond"]),
    ({"decay": -(10**400)}, ValueError, ["decay", "float", "beyond"]),
    ({"v_rest": 10**5000}, ValueError, ["v_rest", "float", "beyond"]),
    ({"time_dim": 10**5000}, ValueError, ["time_dim", "[-3, 2]"]),
    ({"backend": ["cpu"]}, ValueError, ["backend", "cpu, reference", "['cpu']"]),
    ({"backend": {"cpu": 1}}, ValueError, ["backend", "cpu, reference", "{'cpu': 1}"]),
    ({"surrogate": ["arctan"]}, ValueError, ["surrogate", "arctan", "['arctan']"]),
    ({"rng_state": STATE.to_sparse()}, TypeError, ["rng_state", "dense", "sparse"]),
    ({"multi_spike": True, "v_reset": None, "analog_prob": [0.1]}, TypeError, ["analog_prob", "float", "list"]),
    *(
        ({name: float("nan")}, ValueError, [name, "a number", "nan"])
        for name in ("decay", "v_threshold", "v_rest", "surrogate_gain")
    ),
    ({"strict_threshold": "no"}, TypeError, ["strict_threshold", "bool", "str"]),
    ({"return_v_seq": 1}, TypeError, ["return_v_seq", "bool", "int"]),
    ({"generator": 3}, TypeError, ["generator", "torch.Generator", "int"]),
    ({"x_seq": torch.zeros(4, 3).to_sparse()}, TypeError, ["x_seq", "dense", "sparse"]),
    ({"x_seq": torch.zeros(4, 3).to_mkldnn()}, TypeError, ["x_seq", "dense", "mkldnn"]),
    ({"x_seq": torch.nested.nested_tensor([torch.zeros(3)])}, TypeError, ["x_seq", "dense", "nested"]),
    ({"width": torch.ones(3).to_sparse()}, TypeError, ["width", "dense", "sparse"]),
    ({"analog_prob": 1.5}, ValueError, ["analog_prob", "[0, 1]", "1.5"]),
    ({"analog_prob": -0.1}, ValueError, ["analog_prob", "[0, 1]", "-0.1"]),
    ({"analog_prob": float("nan")}, ValueError, ["analog_prob", "[0, 1]", "nan"]),
    ({"analog_prob": torch.ones(2)}, TypeError, ["analog_prob", "float", "tensor of one", "[2]"]),
    ({"analog_prob": torch.tensor(1)}, TypeError, ["analog_prob", "float", "int64"]),
    ({"analog_prob": torch.tensor(1.5)}, ValueError, ["analog_prob", "[0, 1]", "1.5"]),
    ({"analog_prob": torch.tensor(0.5, device="meta")}, ValueError, ["analog_prob", "cpu", "meta"]),
    ({"surrogate": "gaussian"}, ValueError, ["surrogate", "rectangle, triangle, sigmoid", "'gaussian'"]),
    ({"surrogate_gain": "2"}, TypeError, ["surrogate_gain", "str"]),
    ({"v_rest": torch.zeros(3)}, TypeError, ["v_rest", "float", "Tensor"]),
    ({"backend": "gpu"}, ValueError, ["backend", "cpu", "reference", "'gpu'"]),
    ({"rng_state": (1, 2)}, TypeError, ["rng_state", "int64", "tuple"]),
    ({"rng_state": torch.zeros(2)}, TypeError, ["rng_state", "int64", "float32"]),
    ({"rng_state": torch.zeros(3, dtype=torch.int64)}, ValueError, ["rng_state", "[2]", "[3]"]),
    ({"rng_state": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, ["rng_state", "cpu", "meta"]),
    ({"rng_state": STATE, "generator": torch.Generator()}, ValueError, ["rng_state", "generator"]),
    ({"v_init": torch.zeros(6, 4)}, ValueError, ["v_init", "[6, 3]", "[6, 4]"]),
    ({"v_init": torch.zeros(3)}, ValueError, ["v_init", "[6, 3]", "[3]"]),
    ({"v_init": 0.0}, TypeError, ["v_init", "tensor", "float"]),
    ({"v_init": torch.zeros(6, 3, dtype=torch.int64)}, TypeError, ["v_init", "floating", "int64"]),
    ({"v_init": torch.zeros(6, 3, device="meta")}, ValueError, ["v_init", "cpu", "meta"]),
    ({"residual_gain": 0.5}, ValueError, ["residual_gain needs a residual", "0.5"]),
    *(
        ({"multi_spike": True, "v_reset": None, "v_threshold": value}, ValueError, ["v_threshold > 0", "multi_spike"])
        for value in (0.0, -1, torch.tensor([1.0, 0.0, 1.0]), torch.tensor(float("nan")))
    ),
    ({"tau": 2.0}, TypeError, ["'tau'", "tau=2.0 is decay=0.5", "divides the input", "input_gain=0.5"]),
    ({"v_treshold": 2.0}, TypeError, ["'v_treshold'", "did you mean v_threshold?"]),
    ({"reset_amount": 1.0}, ValueError, ["reset_amount", "v_reset=None"]),
    ({"width": torch.zeros(3), "analog_prob": 0.5}, ValueError, ["width must be > 0", "got 0.0"]),
    ({"reset_amount": torch.ones(5), "v_reset": None}, ValueError, ["reset_amount", "[4, 6, 3]", "[5]"]),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD, ids=lambda value: shown(value)[:40])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_arguments(options, error, words, backend):
    options = {"backend": backend, **options}
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        asgl_cuda.lif(options.pop("x_seq", X), **options)
    message = str(caught.value)
    assert message.startswith("asgl_cuda.lif: ")
    for word in words:
        assert word in message, message
    assert torch.equal(state, torch.get_rng_state()), "the generator must not have been advanced"


def test_accepted_arguments_stand_for_no_others(monkeypatch):
    """Checks are kept by signature, where True == 1, and only so many."""
    asgl_cuda.lif(X, strict_threshold=True)
    with pytest.raises(TypeError, match="strict_threshold must be a bool, got int"):
        asgl_cuda.lif(X, strict_threshold=1)
    monkeypatch.setattr(checks, "_MOST_PLANS", 3)
    for number in range(9):
        asgl_cuda.lif(X, v_rest=number / 8)
    assert len(inspect.getclosurevars(call._plan_of).nonlocals["plans"]) <= 3


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
    monkeypatch.setattr("asgl_cuda.call.BACKENDS", broken)
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
    """NaN gives no spike and no gradient of x, but NaN in parameter gradients, as in a layer that multiplies.

    NaN in a parameter's gradient shows the user, and torch.amp.GradScaler, the NaN in the input.
    """
    x_seq = torch.tensor([[0.5, 0.9], [float("nan"), 0.3], [1.0, 0.7]], device=device)
    found = {}
    for name in (backend, "reference"):
        x = x_seq.clone().requires_grad_()
        width, decay = (torch.tensor(value, device=device, requires_grad=True) for value in (1.0, 0.5))
        s_seq = asgl_cuda.lif(x, width=width, decay=decay, backend=name)
        s_seq.sum().backward()
        found[name] = (s_seq, x.grad, width.grad, decay.grad)
    for ours, theirs in zip(found[backend], found["reference"], strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    s_seq, grad_x_seq, grad_width, _ = found[backend]
    assert s_seq[:, 0].tolist() == [0, 0, 0]
    assert grad_x_seq[1:, 0].tolist() == [0, 0]
    assert grad_width.isnan()
