"""Every layer by the same questions: its function, its states, copies and casts; then what one of them has alone."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from comparison import random_input
from layer_cases import CASES, NEURONS, Foreign, N, make
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import (
    LIF,
    AnalogProbSchedule,
    BatchNormLIF,
    Monitor,
    RecurrentLIF,
    asgl_layers,
    parameter_groups,
    spiking_eval,
)

T, B = 6, 3
kinds = pytest.mark.parametrize("kind", CASES)
neurons = pytest.mark.parametrize("kind", NEURONS)


def inputs(*shape, device="cpu", dtype=torch.float32):
    """Currents under which most neurons fire."""
    return random_input(*(shape or (T, B, N)), device=device, dtype=dtype).detach().mul(2).requires_grad_()


def gradients(out, *leaves):
    weights = torch.linspace(-1, 2, out.numel(), device=out.device).reshape(out.shape).to(out)
    return torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)


def states_of(layer, kind):
    return [getattr(layer, name) for name in CASES[kind].states]


# ---- the function ----

# The granularity, the time dimension, the shape of the input, and the shape of a parameter in it.
PLACES = [
    ("layer", 0, (T, B, N), (1,)),
    ("channel", 1, (B, T, N), (N,)),
    ("neuron", 0, (T, B, N), (N,)),
    ("channel", -1, (B, N, T), (N, 1)),
    ("channel", 1, (B, T, N, 5, 2), (N, 1, 1)),
    ("neuron", 2, (B, N, T, 5, 2), (1, N, 1, 5, 2)),
    ("neuron", -2, (B, N, 5, T, 2), (1, N, 5, 1, 2)),
    ("neuron", 0, (T, B, B, N), (N,)),
    ("neuron", 1, (B, T, B, N, 5), (N, 5)),
]
OF_FUNCTIONS = [
    (kind, *place)
    for kind, case in CASES.items()
    for place in PLACES
    if case.function and (not kind.startswith("RecurrentLIF") or (len(place[2]) == 3 and place[1] >= 0))
]


@pytest.mark.parametrize(("kind", "granularity", "time_dim", "shape", "in_x_seq"), OF_FUNCTIONS)
def test_is_the_function_of_its_parameters(backend, device, kind, granularity, time_dim, shape, in_x_seq):
    """Output, potentials and gradients in training, of values that differ by neuron, which a state dict has."""
    case, features = CASES[kind], tuple(size for size in shape[1:] if size not in (T, B))
    features = {"layer": None, "channel": N, "neuron": features}[granularity]
    layer = make(kind, backend, device, features=features, granularity=granularity, time_dim=time_dim)
    assert list(layer.state_dict()) == case.state_dict
    x_seq, spikes = inputs(*shape, device=device), kind in NEURONS
    layer.store_v_seq = spikes
    torch.manual_seed(5)
    actual = layer(x_seq)
    values = {name: getattr(layer, attribute) for name, attribute in case.learned.items()}
    if not kind.startswith("RecurrentLIF") and granularity != "layer":
        assert {tuple(value.shape) for value in values.values()} == {layer.num_features}
        values = {name: value.reshape(in_x_seq) for name, value in values.items()}
    torch.manual_seed(5)
    options = {**case.options, **values, **({"return_v_seq": True} if spikes else {})}
    expected = case.function(x_seq, **options, time_dim=time_dim, backend=backend)
    if spikes:
        assert torch.equal(layer.v_seq, expected.v_seq)
        actual, expected = torch.stack([actual, layer.v_seq]), torch.stack([expected.s_seq, expected.v_seq])
        layer.reset()
        assert layer.v_seq is layer.v is None
    assert actual.any()
    assert torch.equal(actual, expected)
    leaves = x_seq, *layer.parameters()
    for ours, theirs in zip(gradients(actual, *leaves), gradients(expected, *leaves), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LIF", "LeakyIntegrator"])
def test_parameters_are_passed_as_stored(backend, device, kind):
    """No view of one enters the graph, where the channels are not the last dimension."""
    layer = make(kind, backend, device, features=N, granularity="channel")
    given = {getattr(node, "variable", None) for node, _ in layer(inputs(T, B, N, 5, 2)).grad_fn.next_functions}
    assert {*layer.parameters()} <= given


@neurons
def test_noise_is_of_training_alone(backend, device, kind):
    """Evaluation has hard spikes and gradients, and draws nothing."""
    layer = make(kind, backend, device, learn=False, surrogate="sigmoid", learn_width=True)
    x_seq = inputs(T, B, N, device=device)
    assert len(layer(x_seq).unique()) > 2
    layer.eval()
    torch.manual_seed(3)
    expected = torch.rand(8, device=device)
    torch.manual_seed(3)
    s_seq = layer(x_seq)
    assert torch.equal(torch.rand(8, device=device), expected)
    assert len(s_seq.unique()) == 2
    assert torch.equal(layer(x_seq), s_seq)
    assert all(each.any() for each in gradients(s_seq, x_seq, layer.log_width))
    layer.train()
    assert len(layer(x_seq).unique()) > 2


# ---- states ----


@pytest.mark.parametrize(("time_dim", "dtype"), [(0, torch.float32), (1, torch.bfloat16)])
@kinds
def test_calls_and_steps_are_one_sequence(backend, device, kind, time_dim, dtype):
    """Outputs and gradients; states are in float32 for half inputs, too."""
    layer = make(kind, backend, device, time_dim=time_dim).eval()
    x_seq = random_input(21, B, N, dtype=dtype, device=device).detach().movedim(0, time_dim).requires_grad_()
    layer.store_v_seq = kind != "LeakyIntegrator"
    whole = layer(x_seq)
    expected = gradients(whole, x_seq)
    assert states_of(layer, kind) == [None] * len(CASES[kind].states)

    def is_whole(parts, join):
        torch.testing.assert_close(gradients(join(parts, time_dim), x_seq), expected, rtol=1e-5, atol=1e-6)
        assert all(state.dtype == torch.float32 for state in states_of(layer, kind))
        return torch.equal(join(parts, time_dim), whole)

    for cuts in ((1,), (16,), (3, 20)):
        layer.stateful = False
        parts = x_seq.tensor_split(cuts, dim=time_dim)
        alone = layer(parts[-1])
        layer.stateful = True
        found = [layer(part) for part in parts]
        assert is_whole(found, torch.cat)
        layer.reset()
        assert torch.equal(layer(parts[-1]), alone), "from rest"
        layer.reset()
    for stateful in (True, False):
        layer.stateful = stateful
        found = [layer.step(x_t) for x_t in x_seq.unbind(time_dim)]
        assert layer.stateful is stateful
        assert is_whole(found, torch.stack)
        v = layer.v
        if not stateful:
            assert torch.equal(layer(x_seq), whole), "a sequence begins at rest"
            assert layer.v is v, "the stream goes on after it"
        asgl_cuda.reset(nn.Sequential(layer))
        assert states_of(layer, kind) == [None] * len(CASES[kind].states)


@pytest.mark.parametrize(
    ("kind", "given"),
    [(kind, name) for kind, case in CASES.items() if case.function for name in case.states]
    + [
        ("AdaptiveLIF", "vw"),
        ("AdaptiveLIF, threshold", "vw"),
        ("RecurrentLIF", "vsi"),
        ("RecurrentLIF, adaptive", "vsiw"),
    ],
)
def test_states_that_are_set_are_used(backend, device, kind, given):
    """Each alone, where others start at rest, and together, in calls and in steps, also of a half type."""
    case, x_seq = CASES[kind], inputs(device=device).detach()
    layer = make(kind, backend, device, learn=False, stateful=True).eval()
    states = {name: torch.rand(B, N, device=device).half().requires_grad_() for name in given}
    options = {name: value for name, value in case.options.items() if name != "analog_prob"}
    more = {}
    if kind.startswith("RecurrentLIF"):
        more = {"weight": layer.recurrent_weight, "bias": layer.recurrent_bias}
    inits = {f"{name}_init": state.float() for name, state in states.items()}
    expected = case.function(x_seq, **options, **more, **inits, backend=backend)
    for call in (layer, lambda x_seq: torch.stack([layer.step(x_t) for x_t in x_seq])):
        layer.reset()
        for name, state in states.items():
            setattr(layer, name, state)
        actual = call(x_seq)
        assert torch.equal(actual, expected)
        assert all(grad.any() for grad in torch.autograd.grad(actual.sum(), states.values()))
    if case.function is asgl_cuda.leaky_integrator:
        v_init = states["v"].detach()
        found = [asgl_cuda.leaky_integrator(x_seq, v_init=each, backend=backend) for each in (v_init, v_init.float())]
        assert torch.equal(*found)


STATES = [(kind, name) for kind, case in CASES.items() if kind != "soft reset" for name in case.states]


@pytest.mark.parametrize(("kind", "name"), STATES)
@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (
            torch.zeros(B, 5),
            ValueError,
            r"the carried {} must have the shape of the input without time, \[3, 8\], got \[3, 5\]; call reset\(\)",
        ),
        (torch.zeros(()), ValueError, r"the carried {} must have .*, got \[\]; call"),
        (
            torch.zeros(T, B, N),
            ValueError,
            r"the carried {} must have .*, got \[6, 3, 8\]; if the input is one time step .*, call step\(\)",
        ),
        (
            torch.zeros(B, N, dtype=torch.int64),
            TypeError,
            "{} must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (torch.zeros(B, N, device="meta"), ValueError, "{} must be on cpu as x_seq, got meta"),
        (0.0, TypeError, "{} must be a tensor, got float"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_state_that_does_not_fit_is_named(kind, name, state, error, words):
    layer = make(kind, stateful=True)
    setattr(layer, name, state)
    in_words = "potential" if name == "v" else f"state {name}"
    wanted = words.format(in_words if "carried" in words else name)
    kind = type(layer).__name__
    for call in (layer, lambda x_seq: layer.step(x_seq[0]), lambda x_seq: asgl_cuda.step(layer, x_seq[0])):
        if "step" not in words or call is layer:
            with pytest.raises(error, match=rf"asgl_cuda\.{kind}: {wanted}"):
                call(torch.rand(T, B, N))
        assert getattr(layer, name) is state, "a refused call must not lose the state"


@kinds
def test_copies_detached_and_cast_states(backend, device, kind):
    """A state is part of a graph in the middle of training, and torch refuses to copy such a tensor."""
    layer = make(kind, backend, device, stateful=True, granularity="channel")
    if kind != "LeakyIntegrator":
        layer.store_v_seq = True
    x_seq = inputs(device=device)
    first = layer(x_seq)
    before = states_of(layer, kind)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
    assert all(state.requires_grad for state in states_of(layer, kind)), "the original keeps its graph"
    torch.manual_seed(3)
    following = layer(x_seq)
    for twin in twins:
        assert repr(twin) == repr(layer)
        assert all(map(torch.equal, states_of(twin, kind), before))
        assert not any(state.requires_grad for state in states_of(twin, kind))
        torch.manual_seed(3)
        again = twin(x_seq)
        assert torch.equal(again, following)
        again.sum().backward()
        assert layer.logit_decay.grad is None
        assert twin.logit_decay.data_ptr() != layer.logit_decay.data_ptr()
    (first + following).sum().backward()
    assert layer.logit_decay.grad is not None
    before = states_of(layer, kind)
    assert layer.detach_() is layer
    potentials = [getattr(layer, name) for name in layer._stored_names if getattr(layer, name) is not None]
    assert not any(value.requires_grad for value in potentials)
    assert all(map(torch.equal, states_of(layer, kind), before))
    layer.double()
    assert all(map(torch.equal, states_of(layer, kind), [state.double() for state in before]))
    assert layer(x_seq.double()).dtype == states_of(layer, kind)[0].dtype == torch.float64
    layer.to("meta")
    assert all(state.is_meta for state in states_of(layer, kind))
    assert not any(parameter.requires_grad for parameter in copy.deepcopy(layer.requires_grad_(False)).parameters())


@kinds
def test_a_forgotten_reset_says_what_helps(backend, device, kind):
    """Also of states of inference mode: validation comes first, then training without a reset."""
    model = nn.Sequential(nn.Linear(4, N), make(kind, backend, "cpu", stateful=True)).to(device)
    x_seq = torch.rand(T, B, 4, device=device)
    with torch.inference_mode():
        model(x_seq)
    model(x_seq).sum().backward()
    second = model(x_seq)
    words = r"second time.*asgl_cuda\.reset\(model\).*asgl_cuda\.detach\(model\)"
    with pytest.raises(RuntimeError, match=words) as caught:
        second.sum().backward()
    assert "second time" in str(caught.value.__cause__)
    assert "asgl_cuda" not in str(caught.value.__cause__)
    asgl_cuda.detach(model)
    model(x_seq).sum().backward()
    asgl_cuda.reset(model)
    model(x_seq).sum().backward()


# ---- parameters ----


@pytest.mark.parametrize("granularity", ["layer", "neuron"])
@kinds
def test_parameters_come_back(kind, granularity):
    """From a file, without states; and the first values, by reset_parameters, also of a layer made without values."""
    layer = make(kind, granularity=granularity, stateful=True).eval()
    x_seq = inputs()
    expected = layer(x_seq)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = make(kind, granularity=granularity, stateful=True).eval()
    first = CASES[kind].kind(layer.num_features or None, **fresh_options(kind, granularity)).double()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert fresh.v is None
    assert torch.equal(fresh(x_seq), expected)
    empty = CASES[kind].kind(
        layer.num_features or None, **fresh_options(kind, granularity), device="meta", dtype=torch.float64
    )
    assert all(value.is_meta for value in (*empty.parameters(), *empty.buffers()))
    assert empty(torch.zeros(2, 3, N, device="meta", dtype=torch.float64)).is_meta
    for made in (fresh.double(), empty.to_empty(device="cpu")):
        made.reset_parameters()
        assert made.v is None
        for name, value in first.state_dict().items():
            found = made.state_dict()[name]
            if name.startswith("recurrent"):
                bound = N**-0.5  # as of torch.nn.RNN
                smallest = bound * 2 ** (-64 / found.numel())  # of the largest value, in all draws but one of 2^64
                assert smallest < found.abs().max() <= bound
            else:
                torch.testing.assert_close(found, value, rtol=1e-6, atol=0)


def fresh_options(kind, granularity):
    case = CASES[kind]
    return {**case.options, **dict.fromkeys(case.learn, True), "granularity": granularity, "backend": "reference"}


@pytest.mark.parametrize("value", [math.inf, -math.inf, 60.0, -60.0])
def test_parameters_beyond_their_range_stay_valid(backend, device, value):
    """A diverging Adam takes steps of the learning rate's size in the stored logarithm and logit."""
    layer = LIF(learn_decay=True, backend=backend).to(device).eval()
    with torch.no_grad():
        layer.log_width.fill_(value)
        layer.logit_decay.fill_(value)
    assert 0 < layer.width.item() < math.inf
    assert 0 < layer.decay.item() < 1
    layer.width.backward()
    assert 0 < layer.log_width.grad < math.inf
    # Some element has u = 0, which a width of 0 turns into NaN.
    x_seq = torch.ones(4, 3, 5, device=device, requires_grad=True)
    layer(x_seq).sum().backward()
    assert x_seq.grad.isfinite().all()


def test_layers_and_functions_have_the_same_defaults():
    """But for the noise, and the reset that layers detach."""
    function, layer = asgl_cuda.lif.__kwdefaults__, LIF.__init__.__kwdefaults__
    both = function.keys() & layer.keys()
    differ = {name: (function[name], layer[name]) for name in both if function[name] != layer[name]}
    assert differ == {"analog_prob": (0.0, 0.5), "detach_reset": (False, True)}
    for kind in (asgl_cuda.BatchNormLIF, asgl_cuda.AdaptiveLIF, asgl_cuda.RecurrentLIF):
        made = kind(N, granularity="channel")
        assert {name: getattr(made, name) for name in ("surrogate", *differ)} == {
            "surrogate": layer["surrogate"], "analog_prob": 0.5, "detach_reset": True
        }  # fmt: skip


FUNCTIONS = {
    "lif": asgl_cuda.lif,
    "batch_norm_lif": partial(asgl_cuda.batch_norm_lif, training=True),
    "adaptive_lif": partial(asgl_cuda.adaptive_lif, adapt_decay=0.9),
    "recurrent_lif": lambda x_seq, **options: asgl_cuda.recurrent_lif(x_seq, torch.zeros(N).to(x_seq), **options),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_default_surrogate_is_a_sigmoid(backend, device, function):
    x_seq = inputs(T, B, N, device=device).detach()
    for name in (backend, "reference"):
        smooth = partial(function, x_seq, analog_prob=1.0, backend=name)
        assert torch.equal(smooth(), smooth(surrogate="sigmoid"))
        assert not torch.equal(smooth(), smooth(surrogate="rectangle"))


def test_repr_tells_what_was_set():
    neuron = "width=learned from 1.3, decay=learned from 0.7, v_threshold=learned from 0.9, v_reset={}, surrogate={}, "
    neuron += "analog_prob=0.4, granularity={}"
    options = {"granularity": "neuron", "time_dim": 1, "stateful": True, "store_v_seq": True}
    assert repr(make("LIF", features=(N, 3), **options)) == (
        f"LIF([8, 3], {neuron.format(0.1, 'rectangle', 'neuron')}, input_gain=0.8, surrogate_gain=0.5, "
        "detach_reset=False, scale_output=True, stateful=True, store_v_seq=True, time_dim=1)"
    )
    assert repr(make("soft reset")) == (
        f"LIF({neuron.format(None, 'sigmoid', 'layer')}, reset_amount=0.7, v_min=-0.5, v_rest=0.25, "
        "strict_threshold=True)"
    )
    learned = "adapt_decay=learned from 0.9, adapt_potential=learned from 0.1, adapt_spike=learned from 0.3"
    learned += ", to_threshold=True"
    layer = make("AdaptiveLIF, threshold")
    assert repr(layer) == f"AdaptiveLIF({neuron.format(0.1, 'rectangle', 'layer')}, detach_reset=False, {learned})"
    others = "input_gain=0.5, v_rest=0.25, granularity=channel, delay=True, time_dim=1"
    layer = make("LeakyIntegrator", granularity="channel", time_dim=1)
    assert repr(layer) == f"LeakyIntegrator([8], decay=learned from 0.7, {others})"
    layer = RecurrentLIF(N, recurrent="elementwise", bias=False, syn_decay=0.5, detach_recurrent=True)
    own = "recurrent=elementwise, bias=False, syn_decay=0.5, detach_recurrent=True, width=learned from 1, decay=0.5, "
    assert repr(layer).startswith(f"RecurrentLIF({N}, {own}")
    layer = RecurrentLIF(N, autapses=False, syn_decay=0.5, learn_syn_decay=True)
    assert "(8, recurrent=dense, autapses=False, syn_decay=learned from 0.5, " in repr(layer)
    learned = (
        "adapt_decay=learned from 0.9, adapt_potential=learned from 0, adapt_spike=learned from 0.1, to_threshold=True"
    )
    layer = RecurrentLIF(N, adapt_decay=0.9, learn_adaptation=True, to_threshold=True)
    assert repr(layer).endswith(f", {learned})")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@kinds
def test_half_types(backend, device, kind, dtype):
    """Half parameters are computed with as float32; float32 ones take half inputs, as under autocast."""
    layer = make(kind, backend, device, granularity="channel", stateful=True)
    x_seq = inputs(device=device, dtype=dtype).detach()
    with torch.autocast(device.type, dtype):
        layer(nn.Linear(N, N, device=device)(x_seq.float())).float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    assert all(state.dtype == torch.float32 for state in states_of(layer, kind))
    asgl_cuda.reset(layer)
    layer.zero_grad()
    layer.to(dtype)
    assert all(getattr(layer, name).dtype == torch.float32 for name in ("decay", "width") if hasattr(layer, name))
    outputs = []
    for each in (layer, copy.deepcopy(layer).float()):
        torch.manual_seed(3)
        outputs.append(torch.cat([each(x_seq), each(x_seq)]))
    assert torch.equal(*outputs)
    assert outputs[0].dtype == dtype
    outputs[0].float().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == parameter.dtype == dtype
        assert parameter.grad.isfinite().all()


# ---- tools of torch ----


@pytest.mark.parametrize("use_reentrant", [False, True])
@kinds
def test_activation_checkpointing(backend, device, kind, use_reentrant):
    """Repeats the noise; saved tensors can be read only once without reentrance."""
    layers = [make(kind, backend, device, learn, granularity="channel") for learn in (True, False)]
    model, x_seq = nn.Sequential(*layers), inputs(20, B, N, device=device)
    results = []
    for call in (model, lambda x_seq: checkpoint(model, x_seq, use_reentrant=use_reentrant)):
        x_seq.grad = None
        model.zero_grad()
        torch.manual_seed(3)
        out = call(x_seq)
        torch.rand(7, device=device)  # draws between forward and recomputation must not change the latter
        out.square().sum().backward()
        results.append([out, x_seq.grad, *(each.grad for each in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is theirs is None) or torch.equal(ours, theirs)


@kinds
def test_torch_fx_takes_the_layer_for_a_leaf(kind):
    model = nn.Sequential(nn.Linear(N, N), nn.Sequential(make(kind), nn.Linear(N, N)), make(kind)).eval()
    x_seq = inputs()
    traced = fx.symbolic_trace(model)
    again = fx.symbolic_trace(traced)
    assert [node.target for node in again.graph.nodes if node.op == "call_module"] == ["0", "1.0", "1.1", "2"]
    for training in (False, True):
        outputs = []
        for each in (model, traced, again):
            torch.manual_seed(1)
            outputs.append(each.train(training)(x_seq))
        assert all(torch.equal(output, outputs[0]) for output in outputs)

    class Doubled(type(model[2])):
        def forward(self, x_seq):
            return super().forward(2 * x_seq)

    model[2].__class__ = Doubled
    leaf = "use a Tracer whose is_leaf_module says that Doubled is a leaf"
    for each, remedy in (
        (make(kind), "trace a module that contains the layer$"),
        (model, leaf),
        (model[2], f"trace a module that contains the layer, and {leaf}"),
    ):
        with pytest.raises(TypeError, match=rf"asgl_cuda\.\w+: torch\.fx .* not its forward; {remedy}"):
            fx.symbolic_trace(each)


@kinds
def test_torch_jit_names_what_works_instead(kind):
    layer, x_seq = make(kind), inputs()
    words = rf"asgl_cuda\.{type(layer).__name__}: torch\.jit can neither .*use torch\.compile or torch\.export"
    for model in (layer, nn.Sequential(nn.Identity(), layer)):
        for call in (torch.jit.script, lambda model: torch.jit.trace(model, x_seq, check_trace=False)):
            with pytest.raises(RuntimeError, match=words):
                call(model)


# ---- recurrent neurons alone ----


def recurrent(backend, device, **options):
    torch.manual_seed(0)
    layer = RecurrentLIF(N, **{"analog_prob": 0.0, "decay": 0.8, "width": 1.5, **options}, backend=backend).to(device)
    with torch.no_grad():
        layer.recurrent_weight *= 3  # else most spikes change nothing
    return layer


def test_autapses_are_neither_used_nor_moved(backend, device):
    layer = recurrent(backend, device, autapses=False)
    x_seq = inputs(device=device)
    expected = layer(x_seq)
    with torch.no_grad():
        layer.recurrent_weight.fill_diagonal_(float("nan"))
    assert torch.equal(layer(x_seq), expected)
    (gradient,) = gradients(layer(x_seq), layer.recurrent_weight)
    assert not gradient.diagonal().any()
    assert gradient.any()
    assert torch.isfinite(gradient).all()


def test_elementwise_is_a_diagonal(backend, device):
    own, dense = recurrent(backend, device, recurrent="elementwise"), recurrent(backend, device)
    with torch.no_grad():
        dense.recurrent_weight.copy_(torch.diag(own.recurrent_weight))
        dense.recurrent_bias.copy_(own.recurrent_bias)
    x_seq = inputs(device=device)
    assert own.recurrent_weight.shape == (N,)
    assert torch.equal(own(x_seq), dense(x_seq))
    (ours,) = gradients(own(x_seq), own.recurrent_weight)
    (theirs,) = gradients(dense(x_seq), dense.recurrent_weight)
    torch.testing.assert_close(ours, theirs.diagonal(), rtol=1e-5, atol=1e-5)


def test_detached_recurrence_keeps_the_gradient_of_the_weight(backend, device):
    """What the last step has from the others comes through each neuron's own potential."""
    layer = recurrent(backend, device, detach_recurrent=True, surrogate="sigmoid")
    x_seq = inputs(device=device)
    ours, weight = torch.autograd.grad(layer(x_seq)[-1].sum(), [x_seq, layer.recurrent_weight])
    assert weight.any()
    assert ours[0].any()
    (one,) = torch.autograd.grad(layer(x_seq)[-1, :, 0].sum(), x_seq)
    assert not one[..., 1:].any()


def test_recurrent_layers_are_left_by_fuse_and_refused_by_to_nir():
    x_seq = inputs().detach()
    model = nn.Sequential(nn.Linear(N, N), asgl_cuda.OverTime(nn.BatchNorm1d(N)), recurrent("reference", "cpu"))
    fused, report = asgl_cuda.fuse(model, x_seq)
    assert not report.replaced
    assert [row.path for row in report.left] == ["1.layer"]
    assert torch.equal(fused(x_seq), copy.deepcopy(model)(x_seq))
    pytest.importorskip("nirtorch")
    with pytest.raises(ValueError, match=r"1 \(RecurrentLIF\).*can't be represented in NIR; NIR does not say when"):
        asgl_cuda.to_nir(nn.Sequential(nn.Linear(N, N), model[2]), x_seq)


def test_statistics_of_averaged_weights():
    """The docstring of BatchNormLIF replaces torch.optim.swa_utils.update_bn by a loop that gives the same values."""
    norm, fused = nn.BatchNorm1d(4), BatchNormLIF(4, analog_prob=0.0)
    pair = nn.Sequential(asgl_cuda.OverTime(norm), LIF(analog_prob=0.0))
    batches = [torch.randn(3, 6, 4) + shift for shift in (0, 1, 5)]
    for model in (fused, pair):
        model(batches[-1])
    torch.optim.swa_utils.update_bn(batches, pair)
    fused.reset_running_stats()
    fused.momentum = None
    with torch.no_grad():
        for batch in batches:
            fused(batch)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(fused, key), getattr(norm, key), rtol=1e-5, atol=1e-6)


def test_each_asgl_layer_once():
    """Also of another kind; not the wrapper of a compiled one."""
    shared, foreign = LIF(), Foreign()
    model = nn.Sequential(
        shared, nn.Linear(2, 2), nn.Sequential(foreign, shared), LIF(analog_prob=0, learn_width=False)
    )
    assert list(asgl_layers(model)) == [("0", shared), ("2.0", foreign), ("3", model[3])]
    wrapper = torch.compile(shared, backend="eager")
    assert list(asgl_layers(wrapper)) == [("_orig_mod", shared)], "a wrapper of torch.compile is no layer"


@pytest.mark.parametrize(
    ("call", "name", "needs_neurons"),
    [
        (asgl_layers, "asgl_layers", False),
        (lambda model: AnalogProbSchedule.cosine(model, 3), "AnalogProbSchedule", True),
        (lambda model: parameter_groups(model, 0.1), "parameter_groups", False),
        (Monitor, "Monitor", True),
        (lambda model: spiking_eval(model).__enter__(), "spiking_eval", True),
        (asgl_cuda.reset, "reset", False),
        (asgl_cuda.detach, "detach", False),
        (asgl_cuda.convert_sync_batchnorm, "convert_sync_batchnorm", False),
    ],
)
def test_models_that_are_refused(call, name, needs_neurons):
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{name}: model must be a torch\.nn\.Module, got list"):
        call([LIF()])
    if needs_neurons:
        with pytest.raises(ValueError, match=rf"asgl_cuda\.{name}: model must have an ASGL layer, got a Sequential"):
            call(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match=r"add an asgl_cuda\.LIF, or turn neurons of other libraries"):
            call(nn.Linear(2, 2))
