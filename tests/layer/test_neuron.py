"""The layer: what it adds to the function, which is parameters, training mode and a carried potential."""

import copy
import io
import math
import pickle

import pytest
import torch
from comparison import random_input
from torch import fx, nn

import asgl_cuda
from asgl_cuda import LIF
from asgl_cuda.surrogate import SURROGATES

LEARN_ALL = {"learn_width": True, "learn_decay": True, "learn_threshold": True}


def hard(s_seq):
    return ((s_seq == 0) | (s_seq == 1)).all().item()


def randomized(layer):
    """The same layer with another value for each of its parameters' elements."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.rand_like(parameter) * 0.3
    return layer


def test_training_draws_noise_and_evaluation_fires_hard_spikes(backend, device):
    layer = LIF(backend=backend, analog_prob=0.5).to(device)
    x_seq = random_input(6, 64, device=device)
    assert not hard(layer(x_seq))
    layer.eval()
    assert hard(layer(x_seq))
    assert torch.equal(layer(x_seq), layer(x_seq))
    layer.train()
    assert not hard(layer(x_seq))


def test_noise_obeys_manual_seed(backend, device):
    layer = LIF(backend=backend, analog_prob=0.5).to(device)
    x_seq = random_input(6, 64, device=device)
    torch.manual_seed(3)
    first, second = layer(x_seq), layer(x_seq)
    torch.manual_seed(3)
    assert torch.equal(first, layer(x_seq))
    assert not torch.equal(first, second)


def test_evaluation_leaves_the_generator_alone(backend, device):
    layer = LIF(backend=backend, analog_prob=0.5).to(device).eval()
    x_seq = random_input(6, 64, device=device)
    torch.manual_seed(3)
    expected = torch.rand(8, device=device)
    torch.manual_seed(3)
    layer(x_seq)
    assert torch.equal(torch.rand(8, device=device), expected)


def test_surrogate_gradients_flow_in_evaluation(backend, device):
    x_seq = random_input(6, 64, device=device)
    layer = LIF(backend=backend).to(device).eval()
    layer(x_seq).sum().backward()
    assert x_seq.grad.abs().sum() > 0
    assert layer.log_width.grad != 0


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("v_reset", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_function(backend, device, surrogate, v_reset, training):
    options = {"surrogate": surrogate, "v_reset": v_reset, "detach_reset": True, "scale_output": True}
    layer = LIF(backend=backend, analog_prob=0.4, decay=0.7, v_threshold=0.9, width=1.3, **options, **LEARN_ALL)
    layer = layer.to(device).train(training)
    x_seq = random_input(5, 3, 31, device=device)
    grad = torch.randn(x_seq.shape).to(device)
    torch.manual_seed(11)
    ours = layer(x_seq)
    parameters = (layer.log_width, layer.logit_decay, layer.threshold)
    our_grads = torch.autograd.grad(ours, (x_seq, *parameters), grad)
    torch.manual_seed(11)
    width, decay, threshold = layer.log_width.exp(), layer.logit_decay.sigmoid(), layer.threshold
    prob = 0.4 if training else 0.0
    theirs = asgl_cuda.lif(
        x_seq, width=width, decay=decay, v_threshold=threshold, analog_prob=prob, backend=backend, **options
    )
    assert torch.equal(ours, theirs)
    for our, their in zip(our_grads, torch.autograd.grad(theirs, (x_seq, *parameters), grad), strict=True):
        assert torch.equal(our, their)


def test_initial_values_are_those_given(backend):
    layer = LIF(3, granularity="channel", decay=0.7, v_threshold=0.9, width=1.3, backend=backend, **LEARN_ALL)
    for name, value in (("decay", 0.7), ("v_threshold", 0.9), ("width", 1.3)):
        # The logarithm and the logit are float32 and back.
        torch.testing.assert_close(getattr(layer, name), torch.full((3,), value))


# Where time is, the shape of the input, and the shapes that a channel's and a neuron's parameters take in it.
INPUTS = [
    (0, (6, 4, 5), (1, 1, 5), (1, 1, 5)),
    (1, (4, 6, 5), (1, 1, 5), (1, 1, 5)),
    (-1, (4, 5, 6), (1, 5, 1), (1, 5, 1)),
    (0, (6, 4, 5, 3, 2), (1, 1, 5, 1, 1), (1, 1, 5, 3, 2)),
    (1, (4, 6, 5, 3, 2), (1, 1, 5, 1, 1), (1, 1, 5, 3, 2)),
    (2, (4, 5, 6, 3, 2), (1, 5, 1, 1, 1), (1, 5, 1, 3, 2)),
    (-2, (4, 5, 3, 6, 2), (1, 5, 1, 1, 1), (1, 5, 3, 1, 2)),
    (4, (4, 5, 3, 2, 6), (1, 5, 1, 1, 1), (1, 5, 3, 2, 1)),
]


@pytest.mark.parametrize(("time_dim", "shape", "channel_shape", "neuron_shape"), INPUTS)
@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
def test_granularity(backend, device, time_dim, shape, channel_shape, neuron_shape, granularity):
    features = {"layer": None, "channel": 5, "neuron": (5, 3, 2)[: len(shape) - 2]}[granularity]
    layer = LIF(
        features,
        granularity=granularity,
        time_dim=time_dim,
        analog_prob=0.4,
        v_reset=None,
        backend=backend,
        **LEARN_ALL,
    )
    sizes = {"layer": (1,), "channel": (5,), "neuron": features}[granularity]
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == dict.fromkeys(
        ("log_width", "logit_decay", "threshold"), sizes
    )
    layer = randomized(layer).to(device)
    x_seq = random_input(*shape, device=device)
    grad = torch.randn(shape).to(device)
    torch.manual_seed(5)
    ours = layer(x_seq)
    (dx,) = torch.autograd.grad(ours, x_seq, grad, retain_graph=True)
    ours.backward(grad)
    in_x_seq = {"layer": (), "channel": channel_shape, "neuron": neuron_shape}[granularity]
    width, decay, threshold = (
        value.detach().reshape(in_x_seq).requires_grad_() for value in (layer.width, layer.decay, layer.v_threshold)
    )
    torch.manual_seed(5)
    theirs = asgl_cuda.lif(
        x_seq, width=width, decay=decay, v_threshold=threshold, v_reset=None, analog_prob=0.4, time_dim=time_dim,
        backend=backend,
    )  # fmt: skip
    expected_dx, dwidth, ddecay, dthreshold = torch.autograd.grad(theirs, (x_seq, width, decay, threshold), grad)
    assert torch.equal(ours, theirs)
    assert torch.equal(dx, expected_dx)
    decay = decay.detach()
    # The chain rule of exp and of the sigmoid, which autograd may associate otherwise.
    expected = (dwidth * width.detach(), ddecay * decay * (1 - decay), dthreshold)
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        assert parameter.grad.shape == parameter.shape
        torch.testing.assert_close(parameter.grad, gradient.reshape(sizes))


@pytest.mark.parametrize("learn_width", [False, True])
@pytest.mark.parametrize("learn_decay", [False, True])
@pytest.mark.parametrize("learn_threshold", [False, True])
def test_flags_decide_which_parameters_exist(backend, device, learn_width, learn_decay, learn_threshold):
    layer = LIF(
        31, granularity="channel", learn_width=learn_width, learn_decay=learn_decay, learn_threshold=learn_threshold,
        decay=0.7, v_threshold=0.9, width=1.3, backend=backend,
    ).to(device)  # fmt: skip
    asked = {"log_width": learn_width, "logit_decay": learn_decay, "threshold": learn_threshold}
    expected = {name for name, learned in asked.items() if learned}
    assert {name for name, _ in layer.named_parameters()} == set(layer.state_dict()) == expected
    layer(random_input(5, 3, 31, device=device)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    for name, learned, value in (
        ("width", learn_width, 1.3), ("decay", learn_decay, 0.7), ("v_threshold", learn_threshold, 0.9),
    ):  # fmt: skip
        assert isinstance(getattr(layer, name), torch.Tensor) == learned
        torch.testing.assert_close(
            torch.as_tensor(getattr(layer, name)).cpu(), torch.tensor(value).expand(31 if learned else ())
        )


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("step", [10.0, 60.0])
def test_width_and_decay_stay_in_range_after_violent_steps(backend, device, sign, step):
    """Steps of the learning rate's size in the stored logarithm and logit, as a diverging Adam takes them."""
    layer = LIF(5, granularity="channel", learn_decay=True, backend=backend).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=step)
    for _ in range(3):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, float(sign))
        optimizer.step()
        assert (layer.width > 0).all()
        assert layer.width.isfinite().all()
        assert ((layer.decay > 0) & (layer.decay < 1)).all()
        # u = 0 for some element: what a width of 0 turns into NaN.
        x_seq = torch.ones(4, 3, 5, device=device, requires_grad=True)
        layer.eval()(x_seq).sum().backward()
        assert x_seq.grad.isfinite().all()


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
        # Carried, the potential does show: without it the parts differ.
        layer.reset()
        last = x_seq.tensor_split(cuts, dim=time_dim)[-1]
        assert not torch.equal(layer(last), parts[-1])


def test_reset_starts_at_rest_again(backend, device):
    layer = LIF(stateful=True, backend=backend).to(device).eval()
    x_seq = random_input(5, 3, 31, device=device)
    first, second = layer(x_seq), layer(x_seq)
    layer.reset()
    assert torch.equal(layer(x_seq), first)
    assert not torch.equal(first, second)


def test_stateless_layer_carries_nothing(backend, device):
    layer = LIF(backend=backend).to(device).eval()
    x_seq = random_input(5, 3, 31, device=device)
    assert torch.equal(layer(x_seq), layer(x_seq))
    assert layer.v is None


def test_truncated_backpropagation(backend, device):
    layer = LIF(stateful=True, learn_decay=True, backend=backend).to(device).eval()
    first, second = random_input(5, 3, 31, device=device), random_input(6, 3, 31, device=device)
    layer(first).sum().backward()
    v = layer.v.detach().clone()
    assert layer.detach_() is layer
    assert torch.equal(layer.v, v)
    layer.zero_grad()
    s_seq = layer(second)
    s_seq.sum().backward()
    assert first.grad is not None
    # As if the carried potential were given from outside.
    twin = second.detach().requires_grad_()
    expected = asgl_cuda.lif(twin, decay=layer.decay, width=layer.width, v_init=v, backend=backend)
    expected.sum().backward()
    assert torch.equal(s_seq, expected)
    assert torch.equal(second.grad, twin.grad)


def test_gradient_flows_into_the_first_call_without_detach(backend, device):
    layer = LIF(stateful=True, backend=backend).to(device).eval()
    first, second = random_input(5, 3, 31, device=device), random_input(6, 3, 31, device=device)
    layer(first)
    layer(second).sum().backward()
    assert first.grad.abs().sum() > 0


def test_backward_into_a_freed_graph_is_an_error(backend, device):
    layer = LIF(stateful=True, backend=backend).to(device).eval()
    layer(random_input(5, 3, 31, device=device)).sum().backward()
    second = layer(random_input(5, 3, 31, device=device))
    with pytest.raises(RuntimeError, match="second time"):
        second.sum().backward()


def test_detach_before_the_first_call(backend):
    layer = LIF(stateful=True, backend=backend)
    assert layer.detach_() is layer
    assert layer.v is None


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


def test_number_of_steps_may_change_between_calls(backend, device):
    layer = LIF(stateful=True, backend=backend).to(device)
    for steps in (4, 1, 33):
        layer(torch.rand(steps, 3, 31, device=device))


def test_state_is_cast_with_the_module(backend, device):
    layer = LIF(stateful=True, learn_decay=True, backend=backend).to(device).eval()
    x_seq = random_input(5, 3, 31, device=device)
    layer(x_seq)
    before = layer.detach_().v
    layer.to(torch.float64)
    assert layer.v.dtype == layer.log_width.dtype == torch.float64
    assert torch.equal(layer.v, before.double())
    expected = asgl_cuda.lif(
        x_seq.double(),
        decay=layer.decay,
        width=layer.width,
        v_init=before.double(),
        return_v_last=True,
        backend=backend,
    )
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
    # Nothing is shared: neither storage nor graph.
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
    # positional, options, error, what the message must name
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
    ((), {"decay": "0.5"}, TypeError, ["decay", "float", "str"]),
    ((), {"v_threshold": "1"}, TypeError, ["v_threshold", "float", "str"]),
    ((), {"v_reset": "0"}, TypeError, ["v_reset", "float", "str"]),
    ((), {"analog_prob": 1.5}, ValueError, ["analog_prob", "[0, 1]", "1.5"]),
    ((), {"analog_prob": -0.1}, ValueError, ["analog_prob", "[0, 1]", "-0.1"]),
    ((), {"analog_prob": float("nan")}, ValueError, ["analog_prob", "[0, 1]", "nan"]),
    ((), {"analog_prob": "0.5"}, TypeError, ["analog_prob", "float", "str"]),
    ((), {"time_dim": "0"}, TypeError, ["time_dim", "int", "str"]),
    ((), {"time_dim": 1.0}, TypeError, ["time_dim", "int", "float"]),
    ((128,), {}, ValueError, ["num_features", "'channel' or 'neuron'", "128", "'layer'"]),
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


@pytest.mark.parametrize(("arguments", "options", "error", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_constructor_arguments(arguments, options, error, words):
    with pytest.raises(error) as caught:
        LIF(*arguments, **options)
    message = str(caught.value)
    assert message.startswith("asgl_cuda.LIF: ")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
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
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_constructor_arguments_of_batch_norm_lif(arguments, options, error, words):
    with pytest.raises(error) as caught:
        asgl_cuda.BatchNormLIF(*arguments, **options)
    message = str(caught.value)
    assert message.startswith("asgl_cuda.BatchNormLIF: ")
    assert all(word in message for word in words), message


def test_statistics_of_averaged_weights():
    """What the docstring of BatchNormLIF has instead of torch.optim.swa_utils.update_bn does what that does."""
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
    """As torch's layers: parameters of any type and on any device, and values that come later."""
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


def test_what_the_function_has_the_layer_has(backend, device):
    given = {
        "decay": 0.75, "v_threshold": 0.9, "v_reset": None, "reset_amount": 0.7, "v_rest": 0.25, "input_gain": 0.5,
        "width": 1.5, "surrogate_gain": 0.5, "strict_threshold": True, "backend": backend,
    }  # fmt: skip
    layer = LIF(**given).to(device).eval()
    # Some potentials that are the threshold exactly, which strict_threshold is about.
    x_seq = random_input(5, 3, 31, device=device).detach()
    x_seq[0, :, :9] = 2 * (0.9 - 0.25)
    x_seq.requires_grad_()
    ours, theirs = layer(x_seq), asgl_cuda.lif(x_seq, **given)
    assert torch.equal(ours, theirs)
    grads = (torch.autograd.grad(s_seq.sum(), x_seq)[0] for s_seq in (ours, theirs))
    assert torch.equal(*grads)
    for part in ("reset_amount=0.7", "v_rest=0.25", "input_gain=0.5", "surrogate_gain=0.5", "strict_threshold=True"):
        assert part in repr(layer)


def test_tau_of_spikingjelly():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    tau, x_seq = 4.0, random_input(8, 3, 31)
    theirs = neuron.LIFNode(tau=tau, step_mode="m")
    ours = LIF(decay=1 - 1 / tau, input_gain=1 / tau, analog_prob=0.0)
    assert torch.equal(ours(4 * x_seq), theirs(4 * x_seq))


@pytest.mark.parametrize("stateful", [False, True])
def test_potentials_are_kept(backend, device, stateful):
    layer = LIF(stateful=stateful, store_v_seq=True, v_reset=None, backend=backend).to(device).eval()
    x_seq = random_input(5, 3, 31, device=device)
    assert layer.v_seq is None
    s_seq = layer(x_seq)
    expected = asgl_cuda.lif(x_seq, width=layer.width, v_reset=None, return_v_seq=True, backend=backend)
    assert torch.equal(s_seq, expected.s_seq)
    assert torch.equal(layer.v_seq, expected.v_seq)
    assert (layer.v is not None) == stateful
    assert set(layer.state_dict()) == {"log_width"}
    assert torch.equal(copy.deepcopy(layer).double().v_seq, layer.v_seq.double())
    (grad,) = torch.autograd.grad(layer.v_seq.sum(), x_seq)
    assert grad.abs().sum() > 0
    assert not layer.detach_().v_seq.requires_grad
    layer.reset()
    assert layer.v_seq is layer.v is None


@pytest.mark.parametrize("make", [LIF, lambda: asgl_cuda.BatchNormLIF(31)], ids=["LIF", "BatchNormLIF"])
def test_torch_fx_takes_the_layer_for_a_leaf(make):
    model = nn.Sequential(nn.Linear(31, 31), nn.Sequential(make(), nn.Linear(31, 31)), make()).eval()
    x_seq = random_input(5, 3, 31)
    traced = fx.symbolic_trace(model)
    again = fx.symbolic_trace(traced)
    assert [node.target for node in again.graph.nodes if node.op == "call_module"] == ["0", "1.0", "1.1", "2"]
    assert torch.equal(traced(x_seq), model(x_seq))
    assert torch.equal(again(x_seq), model(x_seq))
    traced.train()
    torch.manual_seed(1)
    expected = model.train()(x_seq)
    torch.manual_seed(1)
    assert torch.equal(traced(x_seq), expected)


def test_torch_fx_does_not_look_into_the_layer():
    class Doubled(LIF):
        def forward(self, x_seq):
            return super().forward(2 * x_seq)

    for model in (LIF(), nn.Sequential(Doubled())):
        with pytest.raises(TypeError, match=r"asgl_cuda\.LIF: torch\.fx .* must be a leaf"):
            fx.symbolic_trace(model)


@pytest.mark.parametrize("layer", [LIF(), asgl_cuda.BatchNormLIF(3)], ids=["LIF", "BatchNormLIF"])
def test_torch_jit_names_what_works_instead(layer):
    x_seq = torch.rand(4, 2, 3)
    for model in (layer, nn.Sequential(nn.Identity(), layer)):
        for call in (torch.jit.script, lambda model: torch.jit.trace(model, x_seq, check_trace=False)):
            with pytest.raises(RuntimeError, match=r"asgl_cuda\.LIF: torch\.jit can neither .*torch\.export can"):
                call(model)
    exported = torch.export.export(layer.eval(), (x_seq,)).module()
    assert torch.equal(exported(x_seq), layer(x_seq))


@pytest.mark.parametrize(("granularity", "features"), [("channel", 4), ("neuron", (5, 4)), ("neuron", (2, 3, 5, 1))])
def test_input_that_does_not_fit_the_features(backend, device, granularity, features):
    layer = LIF(features, granularity=granularity, backend=backend).to(device)
    with pytest.raises(ValueError, match=r"asgl_cuda\.LIF: granularity") as caught:
        layer(torch.rand(2, 3, 5, device=device))
    sizes = [features] if isinstance(features, int) else list(features)
    assert str(sizes) in str(caught.value)
    assert "[2, 3, 5]" in str(caught.value)


@pytest.mark.parametrize(
    ("x_seq", "error", "message"),
    [([[1.0]], TypeError, "must be a tensor, got list"), (torch.tensor(1.0), ValueError, "at least one dimension")],
    ids=["list", "scalar"],
)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_bad_input(backend, granularity, x_seq, error, message):
    layer = LIF(3 if granularity == "channel" else None, granularity=granularity, backend=backend)
    with pytest.raises(error, match=message):
        layer(x_seq)


@pytest.mark.parametrize(
    "options", [{"decay": 0}, {"v_threshold": 1}, {"width": 2, "learn_width": False}, {"v_reset": 0}]
)
def test_integers_are_numbers(backend, device, options):
    x_seq = random_input(5, 3, 31, device=device)
    floats = {name: value if name == "learn_width" else float(value) for name, value in options.items()}
    ours, theirs = (LIF(**given, backend=backend).to(device).eval()(x_seq) for given in (options, floats))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stateful", [False, True])
def test_half_model(backend, device, dtype, stateful):
    model = nn.Sequential(
        nn.Linear(6, 8), LIF(8, granularity="channel", stateful=stateful, backend=backend, **LEARN_ALL), nn.Linear(8, 2)
    ).to(device, dtype)
    x_seq = torch.rand(4, 3, 6, device=device).to(dtype)
    for _ in range(2):
        out = model(x_seq)
        assert out.dtype == dtype
    out.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == parameter.dtype == dtype
        assert parameter.grad.isfinite().all()


def test_float32_parameters_with_half_input(backend, device):
    layer = LIF(8, granularity="channel", backend=backend, **LEARN_ALL).to(device)
    layer(torch.rand(4, 3, 8, device=device).bfloat16()).float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def toy_problem(device):
    """Two classes, told apart by whether the first or the second half of the inputs is larger."""
    inputs = torch.rand(64, 12)
    labels = (inputs[:, :6].sum(dim=1) > inputs[:, 6:].sum(dim=1)).long()
    return inputs.expand(6, 64, 12).to(device), labels.to(device)


@pytest.mark.parametrize("surrogate", ["rectangle", "sigmoid"])
def test_small_network_learns(backend, device, surrogate):
    inputs, labels = toy_problem(device)
    neuron = {"surrogate": surrogate, "backend": backend, **LEARN_ALL}
    model = nn.Sequential(
        nn.Linear(12, 24), LIF(24, granularity="channel", **neuron), nn.Linear(24, 24), LIF(**neuron), nn.Linear(24, 2)
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(inputs).mean(dim=0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Half of what a coin's guess costs (ln 2) is out of reach of a network whose neurons pass no gradient.
    assert sum(losses[-5:]) / 5 < 0.35, losses[::6]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_convolutional_network_in_sequential(backend, device):
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Unflatten(0, (4, 3)),
        LIF(5, granularity="channel", backend=backend, **LEARN_ALL), nn.Flatten(2), nn.Linear(5 * 4 * 4, 2),
    ).to(device)  # fmt: skip
    model(torch.rand(4, 3, 2, 6, 6, device=device)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_functional_call_uses_the_given_parameters(backend, device):
    layer = LIF(8, granularity="channel", backend=backend, **LEARN_ALL).to(device).eval()
    other = randomized(copy.deepcopy(layer))
    x_seq = random_input(5, 3, 8, device=device)
    given = {name: parameter.detach().clone().requires_grad_() for name, parameter in other.named_parameters()}
    s_seq = torch.func.functional_call(layer, given, (x_seq,))
    assert torch.equal(s_seq, other(x_seq))
    assert not torch.equal(s_seq, layer(x_seq))
    s_seq.sum().backward()
    assert all(parameter.grad is not None for parameter in given.values())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_functional_call_carries_the_state(backend, device):
    layer = LIF(stateful=True, backend=backend).to(device).eval()
    twin = copy.deepcopy(layer)
    x_seq = random_input(5, 3, 8, device=device)
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(layer, dict(layer.named_parameters()), (x_seq,)), twin(x_seq))


def test_inference_mode_before_training(backend, device):
    """Validation first, then training without a reset: the carried potential must not be an inference tensor."""
    layer = LIF(stateful=True, backend=backend).to(device)
    x_seq = random_input(5, 3, 8, device=device)
    with torch.inference_mode():
        layer(x_seq)
    layer(x_seq).sum().backward()
    assert x_seq.grad is not None


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e10, -1e10])
def test_parameters_at_the_end_of_the_number_line_stay_valid(value):
    layer = LIF(learn_decay=True)
    with torch.no_grad():
        layer.log_width.fill_(value)
        layer.logit_decay.fill_(value)
    assert 0 < layer.width.item() < float("inf")
    assert 0 < layer.decay.item() < 1
    layer.width.backward()
    assert layer.log_width.grad.isfinite()
    assert layer.log_width.grad > 0
