"""The layer adds parameters, training mode and a carried potential to the function."""

import copy

import pytest
import torch
from comparison import LEARN_ALL, random_input, randomized
from torch import fx, nn

import asgl_cuda
from asgl_cuda import LIF
from asgl_cuda.surrogate import SURROGATES


def hard(s_seq):
    return ((s_seq == 0) | (s_seq == 1)).all().item()


def test_training_draws_noise_and_evaluation_fires_hard_spikes(backend, device):
    layer = LIF(backend=backend, analog_prob=0.5).to(device)
    x_seq = random_input(6, 64, device=device)
    assert not hard(layer(x_seq))
    layer.eval()
    assert hard(layer(x_seq))
    assert torch.equal(layer(x_seq), layer(x_seq))
    layer.train()
    assert not hard(layer(x_seq))


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


# The time dimension, the shape of the input, and the shapes of parameters by channel and by neuron in it.
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
    options = {"analog_prob": 0.4, "v_reset": None, "backend": backend, **LEARN_ALL}
    layer = LIF(features, granularity=granularity, time_dim=time_dim, **options)
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
    """A diverging Adam takes steps of the learning rate's size in the stored logarithm and logit."""
    layer = LIF(5, granularity="channel", learn_decay=True, backend=backend).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=step)
    for _ in range(3):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, float(sign))
        optimizer.step()
        assert (layer.width > 0).all()
        assert layer.width.isfinite().all()
        assert ((layer.decay > 0) & (layer.decay < 1)).all()
        # Some element has u = 0, which a width of 0 turns into NaN.
        x_seq = torch.ones(4, 3, 5, device=device, requires_grad=True)
        layer.eval()(x_seq).sum().backward()
        assert x_seq.grad.isfinite().all()


def test_the_layer_has_all_options_of_the_function(backend, device):
    given = {
        "decay": 0.75, "v_threshold": 0.9, "v_reset": None, "reset_amount": 0.7, "v_rest": 0.25, "input_gain": 0.5,
        "width": 1.5, "surrogate_gain": 0.5, "strict_threshold": True, "scale_output": True, "backend": backend,
    }  # fmt: skip
    layer = LIF(**given).to(device).eval()
    # Some potentials equal the threshold, where strict_threshold decides.
    x_seq = random_input(5, 3, 31, device=device).detach()
    x_seq[0, :, :9] = 2 * (0.9 - 0.25)
    x_seq.requires_grad_()
    ours, theirs = layer(x_seq), asgl_cuda.lif(x_seq, **given)
    assert torch.equal(ours, theirs)
    grads = (torch.autograd.grad(s_seq.sum(), x_seq)[0] for s_seq in (ours, theirs))
    assert torch.equal(*grads)
    for part in ("reset_amount=0.7", "v_rest=0.25", "input_gain=0.5", "surrogate_gain=0.5", "strict_threshold=True"):
        assert part in repr(layer)


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
            with pytest.raises(
                RuntimeError, match=rf"asgl_cuda\.{type(layer).__name__}: torch\.jit can neither .*torch\.export can"
            ):
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
    assert model[1].width.dtype == model[1].decay.dtype == torch.float32
    out.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == parameter.dtype == dtype
        assert parameter.grad.isfinite().all()


def test_float32_parameters_with_half_input(backend, device):
    layer = LIF(8, granularity="channel", backend=backend, **LEARN_ALL).to(device)
    layer(torch.rand(4, 3, 8, device=device).bfloat16()).float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def toy_problem(device):
    """Two classes, by which half of the inputs has the larger sum."""
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
    # Half of the loss of guessing (ln 2) is out of reach of a network whose neurons pass no gradient.
    assert sum(losses[-5:]) / 5 < 0.35, losses[::6]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


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
    """Validation comes first, then training without a reset: the carried potential must not be an inference tensor."""
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
