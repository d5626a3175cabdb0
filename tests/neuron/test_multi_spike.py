"""Several spikes a step, and a floor of the potential: fused backends against the reference, and all against sinabs."""

import copy
import pickle
from functools import partial

import pytest
import torch
from comparison import assert_equals_reference, random_input, real_of, rng_state, uniform
from torch.func import vmap

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF
from asgl_cuda.surrogate import PERIODIC, SURROGATES

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SEVERAL = {"multi_spike": True, "v_reset": None}


def currents(*shape, **options):
    """Up to five spikes in one step, and some potentials below any floor."""
    return uniform(*shape, low=-3, high=5, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", [*SURROGATES, PERIODIC])
@pytest.mark.parametrize("v_min", [None, -0.3])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_neuron(backend, device, dtype, surrogate, v_min, detach_reset):
    parameter = partial(uniform, dtype=real_of(dtype), device=device)
    assert_equals_reference(
        currents(18, 5, 32, dtype=dtype, device=device), backend, **SEVERAL, surrogate=surrogate, surrogate_gain=1.7,
        v_min=v_min, detach_reset=detach_reset, scale_output=detach_reset, width=parameter(low=0.7, high=1.5),
        decay=parameter(low=0.4, high=0.9), v_threshold=parameter(32, low=0.8, high=1.2),
        reset_amount=parameter(32, low=0.8, high=1.2), v_init=parameter(5, 32, low=-2, high=1),
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 16, 17, 33])
@pytest.mark.parametrize("neurons", [1, 31, 4096])
@pytest.mark.parametrize("surrogate", ["rectangle", PERIODIC])
def test_nothing_but_spikes(backend, device, steps, neurons, surrogate):
    """Without a specialised kernel; the threshold is also the reset amount."""
    assert_equals_reference(
        currents(steps, neurons, device=device), backend, **SEVERAL, outputs=("s_seq",), surrogate=surrogate,
        v_min=-0.5, v_threshold=uniform(low=0.8, high=1.2, device=device),
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [(1,), (8, 1, 1), (8, 3, 4), (19, 1, 1, 1, 1), (19, 1, 8, 1, 1)])
@pytest.mark.parametrize("surrogate", ["triangle", PERIODIC])
def test_parameter_shapes(backend, device, sizes, surrogate):
    parameter = partial(uniform, *sizes, device=device)
    assert_equals_reference(
        currents(19, 6, 8, 3, 4, device=device), backend, **SEVERAL, surrogate=surrogate, v_min=-0.5,
        width=parameter(low=0.5, high=1.5), decay=parameter(low=0.4, high=0.9),
        v_threshold=parameter(low=0.8, high=1.2), reset_amount=parameter(low=0.8, high=1.2),
        input_gain=parameter(low=0.8, high=1.2), input_bias=parameter(low=-0.1, high=0.1), v_rest=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("v_reset", [0.1, None])
@pytest.mark.parametrize("analog_prob", [0.0, 0.4, 1.0])
def test_floor_of_single_spikes(backend, device, dtype, surrogate, v_reset, analog_prob):
    """With the hard reset the floor holds between spikes, and after spikes if above v_reset."""
    parameter = partial(uniform, dtype=real_of(dtype), device=device)
    for v_min in (-0.25, 0.2):
        assert_equals_reference(
            random_input(17, 3, 36, dtype=dtype, device=device), backend, surrogate=surrogate, v_min=v_min,
            v_reset=v_reset, strict_threshold=v_min < 0, analog_prob=analog_prob, width=parameter(low=0.7, high=1.5),
            decay=parameter(36, low=0.4, high=0.9), rng_state=rng_state(device=device),
        )  # fmt: skip


@pytest.mark.parametrize("v_min", [None, -0.5, 0.0])
def test_a_floor_of_0_is_one(backend, device, v_min):
    output = asgl_cuda.lif(-torch.ones(1, 3, device=device), v_min=v_min, return_v_last=True, backend=backend)
    assert (output.v_last == (-1.0 if v_min is None else v_min)).all()


@pytest.mark.parametrize("v_threshold", [1.0, 0.3])
@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid", PERIODIC])
@pytest.mark.parametrize("v_min", [None, -1.0])
def test_extreme_potentials(backend, device, v_threshold, surrogate, v_min):
    """The spike count equals PyTorch's expression, also for an invalid threshold."""
    extremes = [1e3, 1000.5, -1e3, 0.0, -0.0, 1e-40, 0.3, 0.6, 0.9, 3e38, *map(float, ("nan", "inf", "-inf"))]
    x_seq = torch.tensor(extremes, device=device).repeat(6, 4)
    x_seq[1::2] = 0.25
    x_seq.requires_grad_()
    options = {**SEVERAL, "v_threshold": v_threshold, "surrogate": surrogate, "v_min": v_min, "return_h_seq": True}
    found = {}
    for name in (backend, "reference"):
        out = asgl_cuda.lif(x_seq, **options, backend=name)
        found[name] = out.s_seq, out.h_seq, *torch.autograd.grad([out.s_seq, out.h_seq], x_seq, [x_seq.sign()] * 2)
    s_seq, h_seq, dx = found[backend]
    expected = (h_seq > 0) * torch.div(h_seq, torch.full_like(h_seq, v_threshold), rounding_mode="trunc")
    for ours, theirs in ((s_seq, expected), (s_seq, found["reference"][0]), (h_seq, found["reference"][1])):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(dx, found["reference"][2], equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", asgl_cuda.available_backends())
@pytest.mark.parametrize("v_min", [None, -0.3])
@pytest.mark.parametrize("function", ["SingleExponential", "PeriodicExponential"])
def test_sinabs(name, v_min, function):
    """Spikes and potentials are bit-identical to a loop with sinabs' functions; gradients agree."""
    activation = pytest.importorskip("sinabs.activation")
    device = (asgl_cuda.backends.BACKENDS[name].device_types or ("cpu",))[0]
    v_threshold, decay, grad_width, grad_scale = 1.1, 0.9, 0.4, 1.3
    surrogate = getattr(activation, function)(grad_width, grad_scale)
    x_seq, grad = currents(33, 50, device=device), torch.randn(33, 50, device=device)

    v, spikes, potentials = torch.zeros_like(x_seq[0]), [], []
    for x in x_seq:
        v = decay * v + x
        s = activation.MultiSpike.apply(v, v_threshold, surrogate)
        v = v - s * v_threshold
        if v_min is not None:
            v = torch.nn.functional.relu(v - v_min) + v_min
        spikes.append(s)
        potentials.append(v)
    spikes, potentials = torch.stack(spikes), torch.stack(potentials)
    expected = torch.autograd.grad([spikes, potentials], x_seq, [grad, grad])
    assert spikes.max() > 3

    ours = {
        "SingleExponential": {
            "surrogate": "laplace", "width": v_threshold * grad_width, "surrogate_gain": 2 * grad_scale,
        },
        "PeriodicExponential": {
            "surrogate": PERIODIC, "width": grad_width, "surrogate_gain": 2 * grad_width * grad_scale,
        },
    }[function]  # fmt: skip
    out = asgl_cuda.lif(
        x_seq, **SEVERAL, **ours, decay=decay, v_threshold=v_threshold, v_min=v_min, return_v_seq=True, backend=name
    )
    assert torch.equal(out.s_seq, spikes)
    assert torch.equal(out.v_seq, potentials)
    torch.testing.assert_close(torch.autograd.grad([out.s_seq, out.v_seq], x_seq, [grad, grad]), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"multi_spike": True}, ValueError, r"needs v_reset=None, got v_reset 0\.0"),
        ({"multi_spike": 1, "v_reset": None}, TypeError, "multi_spike must be a bool, got int"),
        ({**SEVERAL, "analog_prob": 0.2}, ValueError, r"needs analog_prob=0, got 0\.2: .* no smooth number of spikes"),
        ({"surrogate": PERIODIC, "v_reset": None}, ValueError, "'periodic_exponential' needs multi_spike=True"),
        ({"surrogate": "periodic"}, ValueError, "surrogate must be one of rectangle, .*, periodic_exponential, got"),
        ({"v_min": float("nan")}, ValueError, "v_min must be finite, got nan"),
        ({"v_min": -float("inf")}, ValueError, "v_min must be finite, got -inf"),
        ({"v_min": "0"}, TypeError, "v_min must be a float, got str"),
    ],
)
def test_errors(options, error, message):
    x_seq = torch.zeros(4, 3)
    with pytest.raises(error, match=f"asgl_cuda.lif: .*{message}"):
        asgl_cuda.lif(x_seq, **options)
    with pytest.raises(error, match=f"asgl_cuda.LIF: .*{message}"):
        LIF(**{"analog_prob": 0.0, **options})
    with pytest.raises(error, match=message):
        asgl_cuda.batch_norm_lif(torch.zeros(4, 2, 3), training=True, **options)


def test_noise_is_refused():
    with pytest.raises(ValueError, match="needs analog_prob=0, got 0"):
        asgl_cuda.lif(torch.zeros(4, 3), **SEVERAL, analog_prob=torch.zeros(()))
    with pytest.raises(ValueError, match=r"needs analog_prob=0, got 0\.2"):  # the default of layers
        LIF(**SEVERAL)
    layer = LIF(**SEVERAL, analog_prob=0.0)
    with pytest.raises(ValueError, match=r"needs analog_prob=0, got 0\.1"):
        layer.analog_prob = 0.1
    assert layer.analog_prob == 0


def test_layer(backend, device):
    options = {**SEVERAL, "surrogate": PERIODIC, "v_min": -0.5, "decay": 0.8}
    layer = LIF(**options, analog_prob=0.0, learn_decay=True, stateful=True, backend=backend, device=device)
    assert layer.state_dict().keys() == LIF(learn_decay=True).state_dict().keys()
    assert "v_min=-0.5, multi_spike=True" in repr(layer)
    assert LIF(**options, analog_prob=0.0, levels=2).log_width is not None  # a limit leaves the surrogate
    x_seq = currents(7, 3, 9, device=device).detach()
    whole = asgl_cuda.lif(x_seq, **{**options, "decay": layer.decay}, backend=backend)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.reset()
        s_seq = torch.cat([other(part) for part in x_seq.split(4)])
        torch.testing.assert_close(s_seq, whole)
        assert s_seq.max() > 2
        assert layer.v.min() == -0.5


def test_batch_norm(backend, device):
    """The same as both layers in sequence, where rounding between them flips no spike."""
    x_seq = currents(5, 4, 6, 3, device=device)
    layer = BatchNormLIF(
        6, **SEVERAL, surrogate=PERIODIC, v_min=-0.5, analog_prob=0.0, input_scale=2.0, backend=backend, device=device
    )
    expected = copy.deepcopy(layer)
    expected.backend = "reference"
    grad = torch.randn(x_seq.shape, device=device)
    results = []
    for each in (layer, expected):
        s_seq = each(x_seq)
        results.append((s_seq, *torch.autograd.grad(s_seq, (x_seq, each.weight, each.bias, each.log_width), grad)))
    assert results[0][0].max() > 2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compile(backend, device):
    layer = LIF(**SEVERAL, surrogate=PERIODIC, v_min=-0.5, analog_prob=0.0, backend=backend, device=device)
    torch._dynamo.reset()  # graphs of other backends' layers would count
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x_seq = currents(6, 3, 8, device=device)
    for v_min in (-0.5, -0.4, None):  # each a different graph constant
        layer.v_min = v_min
        assert torch.equal(compiled(x_seq), layer(x_seq))
        assert torch.equal(*(torch.autograd.grad(each(x_seq).sum(), x_seq)[0] for each in (compiled, layer)))


def test_vmap(backend, device):
    x_seq = currents(3, 6, 8, device=device).detach()
    function = partial(asgl_cuda.lif, **SEVERAL, surrogate=PERIODIC, v_min=-0.5, backend=backend)
    assert torch.equal(vmap(function)(x_seq), torch.stack([function(each) for each in x_seq]))


def test_monitor():
    """`firing_rate` counts elements with any spikes; no quantity of smooth values is defined."""
    layer = LIF(**SEVERAL, surrogate=PERIODIC, v_min=-0.5, analog_prob=0.0, scale_output=True)
    layer.v_threshold = 0.4
    monitor = asgl_cuda.Monitor(layer)
    with monitor:
        s_seq = layer(currents(6, 3, 8))
    found = monitor.result()[""]
    assert found["firing_rate"] == pytest.approx((s_seq > 0).double().mean().item())
    assert found.keys() == {"width", "firing_rate", "inside", "dead", "saturated"}
