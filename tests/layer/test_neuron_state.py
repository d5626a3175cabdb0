"""The layer's carried potential, its copies and checkpoints, and which values it takes."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from comparison import LEARN_ALL, random_input, randomized
from torch import nn

import asgl_cuda
from asgl_cuda import LIF


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("cuts", [(1,), (16,), (3, 20)])
def test_split_sequence_is_one_sequence(backend, device, v_reset, time_dim, cuts):
    """Spikes and gradients, in float32 and with the potential carried in float32 for a half input."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = LIF(stateful=True, v_reset=v_reset, time_dim=time_dim, backend=backend).to(device).eval()
        x_seq = random_input(21, 3, 31, dtype=dtype, device=device).detach().movedim(0, time_dim).requires_grad_()
        grad = torch.randn(x_seq.shape).to(x_seq)
        whole = layer(x_seq)
        v_last = layer.v
        (expected,) = torch.autograd.grad(whole, x_seq, grad)
        layer.reset()
        assert layer.v is None
        parts = [layer(part) for part in x_seq.tensor_split(cuts, dim=time_dim)]
        split = torch.cat(parts, dim=time_dim)
        assert torch.equal(split, whole)
        assert torch.equal(layer.v, v_last)
        assert layer.v.dtype == torch.float32
        (dx,) = torch.autograd.grad(split, x_seq, grad)
        assert torch.equal(dx, expected)
        # Without the carried potential the parts differ.
        layer.reset()
        last = x_seq.tensor_split(cuts, dim=time_dim)[-1]
        assert not torch.equal(layer(last), parts[-1])


def test_truncated_backpropagation(backend, device):
    layer = LIF(stateful=True, learn_decay=True, backend=backend).to(device).eval()
    assert layer.detach_().v is None
    first, second = random_input(5, 3, 31, device=device), random_input(6, 3, 31, device=device)
    layer(first).sum().backward()
    v = layer.v.detach().clone()
    assert layer.detach_() is layer
    assert torch.equal(layer.v, v)
    layer.zero_grad()
    s_seq = layer(second)
    s_seq.sum().backward()
    assert first.grad is not None
    # The carried potential acts as a given v_init.
    twin = second.detach().requires_grad_()
    expected = asgl_cuda.lif(twin, decay=layer.decay, width=layer.width, v_init=v, backend=backend)
    expected.sum().backward()
    assert torch.equal(s_seq, expected)
    assert torch.equal(second.grad, twin.grad)


@pytest.mark.parametrize("shape", [(5, 2, 31), (5, 3, 30), (5, 3, 31, 1), (5, 31)])
def test_changed_batch_shape_names_both_shapes(backend, device, shape):
    layer = LIF(stateful=True, backend=backend).to(device)
    layer(torch.rand(5, 3, 31, device=device))
    v = layer.v
    with pytest.raises(ValueError, match=r"asgl_cuda\.LIF: .*reset\(\)") as caught:
        layer(torch.rand(shape, device=device))
    assert "[3, 31]" in str(caught.value)
    assert str(list(shape[1:])) in str(caught.value)
    assert layer.v is v, "a refused call must not lose the state"
    layer.reset()
    layer(torch.rand(shape, device=device))
    assert layer.v.shape == shape[1:]


STATEFUL = {
    "LIF": LIF, "BatchNormLIF": partial(asgl_cuda.BatchNormLIF, 7), "LeakyIntegrator": asgl_cuda.LeakyIntegrator,
    "AdaptiveLIF": asgl_cuda.AdaptiveLIF,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [*((kind, "v") for kind in STATEFUL), ("AdaptiveLIF", "w")])
@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (torch.zeros(3, 5), ValueError, r"the carried {} has shape \[3, 5\] and the input, without time, \[3, 7\]"),
        (torch.zeros(()), ValueError, r"the carried {} has shape \[\] and"),
        (torch.zeros(3, 7, dtype=torch.int64), TypeError, "{} must be of a floating type, got torch.int64"),
        (torch.zeros(3, 7, device="meta"), ValueError, "{} must be on cpu as x_seq, got meta"),
        (0.0, TypeError, "{} must be a tensor, got float"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_named(kind, name, state, error, words):
    layer = STATEFUL[kind](stateful=True)
    setattr(layer, name, state)
    wanted = words.format("potential" if name == "v" and "carried" in words else name)
    for call in (layer, lambda x_seq: layer.step(x_seq[0]), lambda x_seq: asgl_cuda.step(layer, x_seq[0])):
        with pytest.raises(error, match=rf"asgl_cuda\.{kind}: {wanted}"):
            call(torch.rand(5, 3, 7))
        assert getattr(layer, name) is state


def test_state_is_cast_with_the_module(backend, device):
    layer = LIF(stateful=True, learn_decay=True, backend=backend).to(device).eval()
    x_seq = random_input(5, 3, 31, device=device)
    layer(x_seq)
    before = layer.detach_().v
    layer.to(torch.float64)
    assert layer.v.dtype == layer.log_width.dtype == torch.float64
    assert torch.equal(layer.v, before.double())
    given = {"decay": layer.decay, "width": layer.width, "v_init": before.double()}
    expected = asgl_cuda.lif(x_seq.double(), **given, return_v_last=True, backend=backend)
    s_seq = layer(x_seq.double())
    assert torch.equal(s_seq, expected.s_seq)
    assert torch.equal(layer.v, expected.v_last)
    assert layer.v.dtype == torch.float64
    layer.to("meta")
    assert layer.v.device.type == "meta"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_in_the_middle_of_training(backend, device, duplicate):
    """The carried potential is part of a graph then, and torch refuses to copy such a tensor."""
    layer = LIF(31, granularity="channel", stateful=True, analog_prob=0.4, backend=backend, **LEARN_ALL).to(device)
    x_seq = random_input(5, 3, 31, device=device)
    s_seq = layer(x_seq)
    assert layer.v.requires_grad
    twin = duplicate(layer)
    assert torch.equal(twin.v, layer.v)
    assert not twin.v.requires_grad
    assert layer.v.requires_grad, "the original keeps its graph"
    assert twin.training
    assert repr(twin) == repr(layer)
    torch.manual_seed(3)
    following = layer(x_seq)
    torch.manual_seed(3)
    twin_following = twin(x_seq)
    assert torch.equal(following, twin_following)
    # Neither storage nor graph is shared.
    assert twin.log_width.data_ptr() != layer.log_width.data_ptr()
    twin_following.sum().backward()
    assert layer.log_width.grad is None
    (s_seq + following).sum().backward()
    assert layer.log_width.grad is not None


def test_deepcopy_keeps_parameters_in_no_grad_and_frozen(backend):
    layer = LIF(stateful=True, backend=backend).requires_grad_(False)
    assert not copy.deepcopy(layer).log_width.requires_grad


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
def test_state_dict_round_trip(backend, device, granularity):
    features = {"layer": None, "channel": 5, "neuron": (5, 3)}[granularity]
    arguments = {"granularity": granularity, "stateful": True, "backend": backend, **LEARN_ALL}
    layer = randomized(LIF(features, **arguments)).to(device)
    layer(torch.rand(4, 2, 5, 3, device=device))
    assert layer.v is not None
    assert set(layer.state_dict()) == {"log_width", "logit_decay", "threshold"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = LIF(features, **arguments).to(device)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for ours, theirs in zip(fresh.parameters(), layer.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert fresh.v is None


def test_scalars_of_older_checkpoints_load():
    layer = LIF(**LEARN_ALL)
    state = {"0.log_width": torch.tensor(0.5), "0.logit_decay": torch.tensor(1.5), "0.threshold": torch.tensor(2.0)}
    nn.Sequential(layer).load_state_dict(state)
    assert all(value.dim() == 0 for value in state.values()), "the caller's dict stays"
    assert float(layer.width) == pytest.approx(math.exp(0.5))
    for name in ("log_width", "logit_decay", "threshold"):
        assert torch.equal(layer.get_parameter(name), state[f"0.{name}"].reshape(1))
    for value in (layer.width, layer.decay, layer.v_threshold):
        assert value.shape == (), "one value for the layer is a scalar"


def test_state_dict_of_another_granularity_is_refused(backend):
    with pytest.raises(RuntimeError, match="size mismatch for log_width"):
        LIF(3, granularity="channel", backend=backend).load_state_dict(LIF(backend=backend).state_dict())


def test_repr_tells_what_was_set(backend):
    assert repr(LIF(backend=backend)) == (
        "LIF(width=1 (learned), decay=0.5, v_threshold=1, v_reset=0.0, surrogate=rectangle, analog_prob=0.2, "
        "granularity=layer)"
    )
    flags = {"detach_reset": True, "scale_output": True, "stateful": True}
    options = {"decay": 0.25, "v_reset": None, "learn_decay": True, "learn_width": False, "surrogate": "arctan"}
    text = repr(LIF((8, 3, 2), granularity="neuron", time_dim=1, analog_prob=0.0, **options, **flags, backend=backend))
    for part in (
        "[8, 3, 2]", "width=1,", "decay=0.25 (learned)", "v_reset=None", "surrogate=arctan", "analog_prob=0,",
        "granularity=neuron", "time_dim=1", *(f"{flag}=True" for flag in flags),
    ):  # fmt: skip
        assert part in text, text
    assert "\n" not in text


FLAGS = (
    "learn_width", "learn_decay", "learn_threshold", "strict_threshold", "detach_reset", "scale_output", "stateful",
    "store_v_seq",
)  # fmt: skip

BAD = [
    # Positional arguments, options, error, and words of the message.
    ((), {"granularity": "row"}, ValueError, ["granularity", "layer, channel or neuron", "'row'"]),
    ((), {"granularity": "channel"}, ValueError, ["num_features", "number of channels", "None"]),
    ((), {"granularity": "neuron"}, ValueError, ["num_features", "shape of the neurons", "None"]),
    (([3, 4],), {"granularity": "channel"}, ValueError, ["num_features", "number of channels", "[3, 4]"]),
    ((3.0,), {"granularity": "channel"}, TypeError, ["num_features", "int", "float"]),
    ((-3,), {"granularity": "channel"}, ValueError, ["num_features", "-3"]),
    (("ab",), {"granularity": "neuron"}, TypeError, ["num_features", "int", "str"]),
    ((), {"surrogate": "gaussian"}, ValueError, ["surrogate", "rectangle, triangle, sigmoid", "'gaussian'"]),
    ((), {"width": 0.0}, ValueError, ["width", "> 0", "0.0"]),
    ((), {"width": -1}, ValueError, ["width", "> 0", "-1"]),
    ((), {"width": float("nan")}, ValueError, ["width", "> 0", "nan"]),
    ((), {"width": "1"}, TypeError, ["width", "float", "str"]),
    ((), {"decay": 0.0, "learn_decay": True}, ValueError, ["decay", "(0, 1)", "0.0"]),
    ((), {"decay": 1, "learn_decay": True}, ValueError, ["decay", "(0, 1)", "1"]),
    ((), {"decay": float("nan"), "learn_decay": True}, ValueError, ["decay", "(0, 1)", "nan"]),
    ((), {"analog_prob": 1.5}, ValueError, ["analog_prob", "[0, 1]", "1.5"]),
    ((), {"analog_prob": -0.1}, ValueError, ["analog_prob", "[0, 1]", "-0.1"]),
    ((), {"analog_prob": float("nan")}, ValueError, ["analog_prob", "[0, 1]", "nan"]),
    ((), {"time_dim": "0"}, TypeError, ["time_dim", "int", "str"]),
    ((), {"time_dim": 1.0}, TypeError, ["time_dim", "int", "float"]),
    ((128,), {}, ValueError, ["num_features", "'channel' or 'neuron'", "128", "'layer'"]),
    ((0,), {"granularity": "channel"}, ValueError, ["num_features", "positive", "0"]),
    ((), {"dtype": torch.int32}, TypeError, ["dtype", "float32", "torch.int32"]),
    ((), {"v_rest": -math.inf}, ValueError, ["v_rest", "finite", "-inf"]),
    ((True,), {"granularity": "channel"}, TypeError, ["num_features", "int", "bool"]),
    (([2, True],), {"granularity": "neuron"}, TypeError, ["num_features", "int", "list"]),
    ((), {"width": float("inf"), "learn_width": False}, ValueError, ["width", "finite", "inf"]),
    ((), {"width": 1e9}, ValueError, ["learned width", "[3.06e-07, 3.27e+06]", "1000000000.0"]),
    ((), {"decay": 1e-9, "learn_decay": True}, ValueError, ["decay", "3.06e-07 from the ends", "1e-09"]),
    ((), {"v_reset": None, "reset_amount": "1"}, TypeError, ["reset_amount", "float", "str"]),
    ((), {"reset_amount": 0.5}, ValueError, ["reset_amount", "v_reset=None", "0.0"]),
    ((), {"backend": "foo"}, ValueError, ["backend", "cpu, reference", "'foo'"]),
    *(
        ((), {"v_reset": None, name: float("nan")}, ValueError, [name, "finite", "nan"])
        for name in ("decay", "v_threshold", "reset_amount", "v_rest", "input_gain", "surrogate_gain")
    ),
    ((), {"v_reset": float("inf")}, ValueError, ["v_reset", "finite", "inf"]),
    *(((), {flag: "no"}, TypeError, [flag, "bool", "str"]) for flag in FLAGS),
]


BAD_NORM = [
    ((3.0,), {}, ValueError, ["num_features must be a number of channels", "3.0"]),
    ((None,), {}, ValueError, ["num_features must be a number of channels", "None"]),
    (([3, 4],), {}, ValueError, ["num_features must be one number for granularity 'layer'", "[3, 4]"]),
    ((3,), {"input_gain": 2.0}, TypeError, ["input_gain", "LIF", "input_scale"]),
    ((3,), {"eps": math.nan}, ValueError, ["eps", "finite", "nan"]),
    ((3,), {"eps": -1.0}, ValueError, ["eps", ">= 0", "-1.0"]),
    ((3,), {"momentum": 1.5}, ValueError, ["momentum", "[0, 1] or None", "1.5"]),
    ((3,), {"momentum": math.nan}, ValueError, ["momentum", "[0, 1] or None", "nan"]),
    ((3,), {"input_scale": math.nan}, ValueError, ["input_scale", "finite", "nan"]),
    ((3,), {"affine": "no"}, TypeError, ["affine", "bool", "str"]),
    ((3,), {"track_running_stats": 1}, TypeError, ["track_running_stats", "bool", "int"]),
]


BAD_INTEGRATOR = [
    ((), {"granularity": "all"}, ValueError, ["granularity must be"]),
    ((), {"decay": 1.0, "learn_decay": True}, ValueError, ["a learned decay must be in"]),
    ((), {"decay": math.inf}, ValueError, ["decay must be finite"]),
    ((), {"num_features": 3}, ValueError, ["num_features needs granularity"]),
    ((), {"granularity": "channel"}, ValueError, ["needs num_features"]),
    ((), {"backend": "best"}, ValueError, ["backend must be one of"]),
    ((), {"v_rest": math.nan}, ValueError, ["v_rest must be finite"]),
]
ALL_BAD = {"LIF": BAD, "BatchNormLIF": BAD_NORM, "LeakyIntegrator": BAD_INTEGRATOR}


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "error", "words"),
    [(kind, *row) for kind, rows in ALL_BAD.items() for row in rows],
    ids=lambda value: str(value)[:40],
)
def test_bad_constructor_arguments(kind, arguments, options, error, words):
    with pytest.raises(error, match=rf"^asgl_cuda\.{kind}: ") as caught:
        getattr(asgl_cuda, kind)(*arguments, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_statistics_of_averaged_weights():
    """The docstring of BatchNormLIF replaces torch.optim.swa_utils.update_bn by a loop that gives the same values."""
    norm, fused = nn.BatchNorm1d(4), asgl_cuda.BatchNormLIF(4, analog_prob=0.0)
    pair = nn.Sequential(asgl_cuda.OverTime(norm), LIF(analog_prob=0.0))
    batches = [torch.randn(3, 6, 4) + shift for shift in (0, 1, 5)]
    for model in (fused, pair):
        model(batches[-1])
    torch.optim.swa_utils.update_bn(batches, pair)
    for layer in nn.Sequential(fused).modules():
        if isinstance(layer, asgl_cuda.BatchNormLIF):
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        for batch in batches:
            fused(batch)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(fused, key), getattr(norm, key), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "wrong"), [("width", 2.0, -1.0), ("decay", 0.75, math.nan), ("v_threshold", 0.5, "1")]
)
def test_values_can_be_set(learned, name, value, wrong):
    layer = LIF(3, granularity="channel", **dict.fromkeys(LEARN_ALL, learned))
    parameters = list(layer.parameters())
    setattr(layer, name, value)
    with pytest.raises((ValueError, TypeError), match=rf"asgl_cuda\.LIF: .*{name} must be"):
        setattr(layer, name, wrong)
    torch.testing.assert_close(torch.as_tensor(getattr(layer, name)), torch.full((3,) if learned else (), value))
    assert f"{name}={value:g}" in repr(layer)
    assert all(now is before for now, before in zip(layer.parameters(), parameters, strict=True))
    assert [parameter.requires_grad for parameter in layer.parameters()] == [True] * (3 * learned)


@pytest.mark.parametrize("kind", [LIF, asgl_cuda.BatchNormLIF])
def test_a_layer_made_without_values(kind):
    """Parameters of any type and on any device, and values set later, as in torch's layers."""
    options = {"granularity": "channel", "width": 1.5, "decay": 0.75, "stateful": True, "backend": "reference"}
    options |= LEARN_ALL
    expected = kind(3, **options).double()
    layer = kind(3, **options, device="meta", dtype=torch.float64)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert all(value.is_meta and value.dtype in (torch.float64, torch.int64) for value in tensors)
    layer(torch.zeros(2, 4, 3, device="meta", dtype=torch.float64))
    skipped = nn.utils.skip_init(kind, 3, **options, dtype=torch.float64)
    for made in (layer.to_empty(device="cpu"), skipped):
        assert not all(torch.equal(made.state_dict()[key], value) for key, value in expected.state_dict().items())
        made.reset_parameters()
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(made.state_dict()[key], value, rtol=1e-6, atol=0)
        assert made.v is None
