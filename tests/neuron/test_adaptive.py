"""Adaptive neurons: every fused backend has the bits of the reference, except in the gradients of parameters."""

import contextlib
from functools import partial

import pytest
import torch
from comparison import random_input, real_of, rng_state, uniform
from test_layouts import LAYOUTS, laid_out
from torch.func import grad, vmap

import asgl_cuda
from asgl_cuda.backends import BACKENDS
from asgl_cuda.reference import IN_CURRENT, IN_RESET, Numbers, Rules
from asgl_cuda.surrogate import INTEGER

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAST_PLACE = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}
RESETS = {"hard": {"v_reset": -0.1}, "soft": {"v_reset": None}, "amount": {"v_reset": None, "reset_amount": 0.7}}
ALL = ("s_seq", "v_last", "w_last", "v_seq", "h_seq")
forms = pytest.mark.parametrize("to_threshold", [False, True], ids=["current", "threshold"])


def arguments(x_seq, *shape, time_dim=0, **more):
    """States, and every parameter in this shape."""
    kind = {"dtype": real_of(x_seq.dtype), "device": x_seq.device}
    state = [size for dim, size in enumerate(x_seq.shape) if dim != time_dim % x_seq.dim()]
    ranges = {"adapt_decay": (0.5, 0.95), "adapt_potential": (-0.2, 0.4), "adapt_spike": (0, 0.5), "decay": (0.3, 0.9),
              "width": (0.5, 2), "v_threshold": (0.8, 1.2)}  # fmt: skip
    values = {name: uniform(*shape, low=low, high=high, **kind) for name, (low, high) in ranges.items()}
    states = {name: uniform(*state, low=-1, high=1, **kind) for name in ("v_init", "w_init")}
    return {**values, **states, "v_rest": 0.2, "time_dim": time_dim, **more}


def results(x_seq, backend, names, options):
    """Outputs of these names, and the gradients of all leaves."""
    asked = {f"return_{name}": True for name in names if name not in ("s_seq", "w_last")}
    output = asgl_cuda.adaptive_lif(x_seq, **{**options, **asked}, backend=backend)
    outputs = [output] if isinstance(output, torch.Tensor) else [getattr(output, name) for name in names]
    torch.manual_seed(1)
    grads = [torch.randn(each.shape).to(each) for each in outputs]  # in any memory layout
    leaves = {"x_seq": x_seq, **{name: each for name, each in options.items() if isinstance(each, torch.Tensor)}}
    leaves = {name: each for name, each in leaves.items() if each.requires_grad}
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True, materialize_grads=True)
    return dict(zip(names, outputs, strict=True)), dict(zip(leaves, found, strict=True))


def assert_equals_reference(x_seq, backend, names=("s_seq", "v_last", "w_last"), **options):
    """Equal bits, but of smooth functions."""
    exact = options.get("surrogate", "rectangle") == "rectangle"
    expected, expected_grads = results(x_seq, "reference", names, options)
    actual, actual_grads = results(x_seq, backend, names, options)
    place = LAST_PLACE[x_seq.dtype]
    for name, ours in (actual | {f"grad of {name}": each for name, each in actual_grads.items()}).items():
        theirs = expected_grads[name.removeprefix("grad of ")] if name.startswith("grad") else expected[name]
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        if name.startswith("grad") and not name.endswith(("x_seq", "_init")):
            torch.testing.assert_close(ours, theirs, rtol=3e-5 if place > 1e-10 else 1e-12, atol=1e3 * min(place, 1e-6))
        elif exact:
            assert torch.equal(ours, theirs), name
        else:
            torch.testing.assert_close(ours, theirs, rtol=10 * place, atol=10 * place)


@forms
@pytest.mark.parametrize("steps", [1, 2, 7, 16, 17, 33])
@pytest.mark.parametrize("neurons", [1, 7, 257, 1100])
def test_sizes(backend, device, steps, neurons, to_threshold):
    x_seq = random_input(steps, neurons, device=device)
    assert_equals_reference(x_seq, backend, ["s_seq"], adapt_decay=0.9, adapt_spike=0.3, to_threshold=to_threshold)
    assert_equals_reference(x_seq, backend, **arguments(x_seq, to_threshold=to_threshold))


@forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("analog_prob", [0, 0.3, 1])
@pytest.mark.parametrize("names", [("s_seq",), ("v_last", "w_last"), ("s_seq", "v_seq"), ALL])
def test_outputs_and_their_gradients(backend, device, dtype, reset, analog_prob, names, to_threshold):
    x_seq = random_input(18, 5, 36, dtype=dtype, device=device)
    options = arguments(x_seq, 36, **RESETS[reset], analog_prob=analog_prob, rng_state=rng_state(device=device))
    assert_equals_reference(x_seq, backend, names, **options, to_threshold=to_threshold)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", [*asgl_cuda.surrogate.SURROGATES])
@pytest.mark.parametrize("flags", [{}, {"strict_threshold": True, "detach_reset": True, "surrogate_gain": 0.7}])
def test_surrogates(backend, device, dtype, surrogate, flags, to_threshold):
    x_seq = random_input(9, 64, dtype=dtype, device=device)
    options = arguments(x_seq, 64, surrogate=surrogate, analog_prob=0.3, rng_state=rng_state(device=device), **flags)
    assert_equals_reference(x_seq, backend, **options, to_threshold=to_threshold)


@forms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout, to_threshold):
    for dtype in (torch.float32, torch.bfloat16):
        x_seq, time_dim = laid_out(layout, random_input(18, 3, 5, 4, 8, dtype=dtype, device=device))
        options = arguments(x_seq, time_dim=time_dim, to_threshold=to_threshold)
        assert_equals_reference(x_seq.requires_grad_(), backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", ["rectangle", "arctan"])
@pytest.mark.parametrize("analog_prob", [0, 0.3, 1])
@pytest.mark.parametrize("names", [("s_seq",), ALL])
def test_in_the_reset_alone(backend, device, dtype, surrogate, analog_prob, names, monkeypatch):
    """As interop.sinabs needs it; no argument asks for it."""
    monkeypatch.setattr(asgl_cuda.adaptive, "_place_of_w", lambda *_: IN_RESET)
    x_seq = random_input(18, 5, 36, dtype=dtype, device=device)
    options = arguments(x_seq, 36, v_reset=None, surrogate=surrogate, analog_prob=analog_prob)
    assert_equals_reference(x_seq, backend, names, **options, rng_state=rng_state(device=device))


@pytest.mark.parametrize(
    "shape", [(), (1,), (8, 1, 1), (8, 3, 5), (5,), (8, 1, 5), (6, 1, 1, 1), (19, 1, 1, 1, 1), (19, 1, 8, 1, 1)]
)
@pytest.mark.parametrize("reset", RESETS)
def test_shapes_of_parameters(backend, device, reset, shape):
    x_seq = random_input(19, 6, 8, 3, 5, dtype=torch.float64, device=device)
    assert_equals_reference(x_seq, backend, **arguments(x_seq, *shape, **RESETS[reset]))


@forms
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("shape", [(), (4,), (5, 1, 1)])
def test_gradcheck(backend, device, reset, shape, to_threshold):
    """All elements are analog, so that the outputs are smooth."""
    x_seq = random_input(5, 3, 4, dtype=torch.float64, device=device)
    options = arguments(x_seq, *shape, surrogate="sigmoid", analog_prob=1, **RESETS[reset], to_threshold=to_threshold)
    named = {name: each for name, each in options.items() if isinstance(each, torch.Tensor)}

    def function(name, x_seq, *values):
        given = {**options, **dict(zip(named, values, strict=True))}
        return asgl_cuda.adaptive_lif(
            x_seq, **given, return_v_last=True, return_v_seq=True, return_h_seq=True, backend=name
        )

    for name in (backend, "reference"):
        assert torch.autograd.gradcheck(partial(function, name), (x_seq, *named.values()), fast_mode=True)


@forms
def test_two_parts_are_the_whole(backend, device, to_threshold):
    x_seq = random_input(40, 3, 50, device=device).detach()
    options = {"adapt_decay": 0.9, "adapt_potential": 0.1, "adapt_spike": 0.3, "analog_prob": 0.0, "backend": backend}
    options |= {"to_threshold": to_threshold, "return_v_last": True}
    whole = asgl_cuda.adaptive_lif(x_seq, **options)
    first = asgl_cuda.adaptive_lif(x_seq[:17], **options)
    second = asgl_cuda.adaptive_lif(x_seq[17:], **options, v_init=first.v_last, w_init=first.w_last)
    assert torch.equal(torch.cat([first.s_seq, second.s_seq]), whole.s_seq)
    assert torch.equal(second.w_last, whole.w_last)


def test_without_adaptation_it_is_lif(backend, device):
    x_seq = random_input(18, 5, 36, device=device)
    expected = asgl_cuda.lif(x_seq, v_rest=0.1, backend=backend)
    for to_threshold in (False, True):
        actual = asgl_cuda.adaptive_lif(x_seq, adapt_decay=0.9, v_rest=0.1, to_threshold=to_threshold, backend=backend)
        assert torch.equal(actual, expected)


@forms
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(backend, device, value, to_threshold):
    for step in (0, 2, 5):
        x_seq = random_input(6, 24, device=device)
        with torch.no_grad():
            x_seq[step, ::3] = value
        options = {"adapt_decay": 0.9, "adapt_potential": 0.1, "adapt_spike": 0.2, "to_threshold": to_threshold}
        ours, theirs = (results(x_seq, name, ("s_seq", "v_last", "w_last"), options) for name in (backend, "reference"))
        for found, expected in zip(ours, theirs, strict=True):
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], equal_nan=True, rtol=1e-5, atol=1e-6)


@forms
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, device, dynamic, to_threshold):
    def function(x_seq, spike):
        output = asgl_cuda.adaptive_lif(
            x_seq, adapt_decay=0.9, adapt_spike=spike, to_threshold=to_threshold, return_v_last=True, backend=backend
        )
        return output.s_seq * 2, output.w_last

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for steps, neurons in [(5, 12), (7, 9)]:
        x_seq, spike = (
            random_input(steps, 3, neurons, device=device),
            torch.tensor(0.3, device=device, requires_grad=True),
        )
        found = []
        for each in (compiled, function):
            outputs = each(x_seq, spike)
            found.append((*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), (x_seq, spike))))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)


def test_w_init_alone_begins_at_rest(backend, device):
    x_seq, w_init = random_input(5, 3, 4, device=device), torch.rand(3, 4, device=device)
    options = {"adapt_decay": 0.9, "v_rest": 0.3, "return_h_seq": True, "w_init": w_init, "backend": backend}
    v_init = torch.full_like(w_init, 0.3)
    outputs = (asgl_cuda.adaptive_lif(x_seq, v_init=each, **options).h_seq for each in (None, v_init))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("amount", "v_last"), [(None, 1.5), (1.0, 2.0)])
def test_w_is_in_the_reset_of_the_threshold_alone(backend, device, amount, v_last):
    x_seq, w_init = torch.full((1, 3), 3.0, device=device), torch.full((3,), 0.5, device=device)
    options = {"adapt_decay": 0.9, "to_threshold": True, "v_reset": None, "return_v_last": True, "backend": backend}
    output = asgl_cuda.adaptive_lif(x_seq, w_init=w_init, reset_amount=amount, **options)
    assert (output.v_last == v_last).all()


@pytest.mark.parametrize("steps", [16, 20])
def test_opcheck(backend, device, steps):
    """Also of the sizes of checkpoints, which are those of two states."""
    x_seq, init = random_input(steps, 3, 4, device=device).detach(), torch.rand(2, 3, 4, device=device)
    numbers = Numbers(1.0, 0.5, 1.0, 0.0, 0.9, 0.0, 0.1, residual_gain=1.0, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    rules = Rules(*[0] * 12, adaptation=IN_CURRENT, time_dim=0)
    arguments = (x_seq, init, None, [None] * 8, numbers, rules, [True] * 4)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(BACKENDS[backend].operators.lif_forward, arguments, test_utils=tests)


@pytest.mark.parametrize("analog_prob", [0.0, 0.3])
@pytest.mark.parametrize("steps", [5, 20])
def test_vmap_is_a_loop(backend, device, analog_prob, steps):
    x_seq, w_init = random_input(3, steps, 4, 8, device=device).detach(), torch.rand(3, 4, 8, device=device)
    decay = torch.rand(3, 8, device=device)
    state = rng_state(device=device) if analog_prob else None

    def loss(x, w, decay):
        output = asgl_cuda.adaptive_lif(
            x, adapt_decay=decay, adapt_potential=0.1, adapt_spike=0.3, w_init=w, analog_prob=analog_prob,
            rng_state=state, return_v_last=True, backend=backend,
        )  # fmt: skip
        return (output.s_seq**2).sum() + (output.v_last * output.w_last).sum()

    function = grad(loss, (0, 1, 2))
    found = vmap(function)(x_seq, w_init, decay)
    for index in range(3):
        expected = function(x_seq[index], w_init[index], decay[index])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[index], theirs, rtol=1e-5, atol=1e-6)


def test_recompute_and_no_neurons(backend, device):
    x_seq = random_input(20, 3, 50, device=device)
    grads = []
    for recompute in (False, True):
        with asgl_cuda.recompute_spikes() if recompute else contextlib.nullcontext():
            s_seq = asgl_cuda.adaptive_lif(x_seq, adapt_decay=0.9, adapt_spike=0.3, backend=backend)
            out = s_seq @ torch.ones(50, 2, device=device, requires_grad=True)
        grads.append(torch.autograd.grad(out.sum(), x_seq)[0])
    assert torch.equal(*grads)
    empty = torch.zeros(3, 0, device=device, requires_grad=True)
    spike = torch.tensor(0.3, device=device, requires_grad=True)
    output = asgl_cuda.adaptive_lif(empty, adapt_decay=0.9, adapt_spike=spike, return_v_last=True, backend=backend)
    assert output.w_last.shape == (0,)
    assert torch.autograd.grad(output.s_seq.sum(), spike)[0] == 0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"adapt_decay": "0.5"}, TypeError, "adapt_decay must be a float or a tensor"),
        ({"adapt_spike": torch.ones(7)}, ValueError, "adapt_spike must broadcast"),
        ({"adapt_potential": float("nan")}, ValueError, "adapt_potential must be a number"),
        ({"w_init": torch.ones(3)}, ValueError, r"w_init must have shape \[4\]"),
        ({"v_init": torch.ones(3)}, ValueError, r"v_init must have shape \[4\]"),
        ({"to_threshold": 1}, TypeError, "to_threshold must be a bool"),
        ({"levels": 4}, TypeError, "unexpected keyword argument 'levels'"),
        ({"residual": torch.ones(5, 4)}, TypeError, "unexpected keyword argument 'residual'"),
        ({"v_min": 0.0}, TypeError, "unexpected keyword argument 'v_min'"),
    ],
)
def test_arguments_are_checked(given, error, message):
    with pytest.raises(error, match=f"asgl_cuda.adaptive_lif: (got an )?{message}"):
        asgl_cuda.adaptive_lif(torch.rand(5, 4), **{"adapt_decay": 0.9, **given})


@pytest.mark.parametrize("name", [each for each in ("cpu", "cuda") if each in asgl_cuda.available_backends()])
def test_operators_refuse_what_no_kernel_computes(name):
    x_seq = torch.randn(3, 4, device="cuda" if name == "cuda" else "cpu")
    numbers = Numbers(1.0, 0.5, 1.0, 0.0, 0.9, 0.0, 0.1, residual_gain=1.0, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    plain = Rules(*[0] * 12, adaptation=IN_CURRENT, time_dim=0)
    for rules, residual, message in (
        (plain._replace(surrogate=INTEGER, levels=4), None, "adaptive neurons have no integer spikes"),
        (plain, x_seq, "adaptive neurons have no residual"),
        (plain._replace(adaptation=3), None, "no adaptation has the number 3"),
        (plain._replace(adaptation=IN_RESET, hard_reset=1), None, "no adaptation has the number 4 with a hard reset"),
    ):
        with pytest.raises(ValueError, match=message):
            BACKENDS[name].operators.lif_forward(
                x_seq, None, None, [*[None] * 7, residual], numbers, rules, [False] * 4
            )
