"""Adaptive neurons of Norse and sinabs, converted, in float64: spikes equal, all gradients within 1e-12."""

import random

import norse.torch as norse
import pytest
import sinabs.layers
import torch
from sinabs import activation
from sinabs.layers.alif import ALIFSqueeze
from torch import nn

import asgl_cuda

T, B, N = SHAPE = 9, 3, 7
SEEDS = range(10)


@pytest.fixture(autouse=True)
def in_double(monkeypatch):
    """Everything in float64, sinabs' spikes as well, which round its gradients to float32."""

    def forward(ctx, v_mem, spike_threshold, surrogate_grad_fn):
        ctx.save_for_backward(v_mem.clone())
        ctx.spike_threshold, ctx.surrogate_grad_fn = spike_threshold, surrogate_grad_fn
        return (v_mem - spike_threshold >= 0).to(v_mem)

    monkeypatch.setattr(activation.SingleSpike, "forward", staticmethod(forward))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def leaf(*shape, low=0.0, high=1.0):
    return (torch.rand(shape) * (high - low) + low).requires_grad_()


def assert_same(make, call, leaves):
    """`call` returns the spikes, then other tensors, of a layer and of its conversion."""
    found = []
    for convert in (False, True):
        layer = make()
        names = list(layer.state_dict())
        if convert:
            layer, report = asgl_cuda.convert(layer, inplace=True)
            assert (len(report.replaced), report.left) == (1, [])
            assert list(layer.state_dict()) == names
        copies = [each.detach().clone().requires_grad_() for each in leaves]
        spikes, *others = call(layer, *copies)
        generator = torch.Generator().manual_seed(0)
        total = sum((each * torch.randn(each.shape, generator=generator)).sum() for each in (spikes, *others))
        inputs = [*copies, *(each for each in layer.parameters() if each.requires_grad)]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        found.append((spikes.detach(), [each.detach() for each in others], grads))
    (theirs, their_values, their_grads), (ours, our_values, our_grads) = found
    assert 0.02 < theirs.mean() < 0.98
    assert torch.equal(ours, theirs)
    assert ours.dtype is theirs.dtype
    assert [each is None for each in our_grads] == [each is None for each in their_grads]
    assert their_grads[0].any()
    for our, their in zip((*our_values, *our_grads), (*their_values, *their_grads), strict=True):
        if their is not None:
            torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12 * max(1, float(their.abs().max())))


# ---- sinabs ----

SURROGATES = {
    "exponential": activation.SingleExponential(0.6, 1.3),
    "gaussian": activation.Gaussian(0.0, 0.4, 0.7),
    "heaviside": activation.Heaviside(0.3),
    "of a user": lambda v, threshold: ((v - threshold).abs() < threshold / 2).to(v),
}


def alif(seed, squeezed=False, **options):
    """A layer with random values, and random forms of them."""
    torch.manual_seed(seed)
    draw = random.Random(seed)

    def value(low, high, by_neuron=True):
        shape = (N,) if by_neuron and draw.random() < 0.4 else ()
        return torch.rand(shape) * (high - low) + low

    norm_input = draw.random() < 0.5
    given = {
        "tau_mem": value(3.0, 9.0), "tau_adapt": value(5.0, 20.0), "adapt_scale": value(0.4, 1.8),
        "tau_syn": value(2.0, 5.0) if draw.random() < 0.4 else None, "spike_threshold": value(0.6, 1.1),
        "train_alphas": draw.random() < 0.5, "norm_input": norm_input, "record_states": draw.random() < 0.5,
        **options,
    }  # fmt: skip
    return ALIFSqueeze(batch_size=B, **given) if squeezed else sinabs.layers.ALIF(**given)


def start(layer, *states):
    layer.init_state_with_shape((B, N))
    for name, state in zip(("v_mem", "b"), states, strict=False):
        setattr(layer, name, state)


def states_of(layer):
    return [layer.v_mem, layer.b, layer.spike_threshold, *(layer.recordings[name] for name in sorted(layer.recordings))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize(
    ("surrogate", "reset"),
    [(name, activation.MembraneReset()) for name in SURROGATES]
    + [(name, activation.MembraneSubtract(amount)) for name in ("exponential", "gaussian") for amount in (0.7, None)],
)
def test_alif(seed, squeezed, surrogate, reset):
    """Two calls, of which the second goes on from the states of the first."""
    made = alif(seed, reset_fn=reset)
    weak = 1 if made.norm_input is False else 6
    x = [leaf(B, T, N, low=-weak, high=3 * weak) for _ in range(2)]

    def call(layer, first, second, v_mem, b):
        start(layer, v_mem, b)
        flat = (lambda each: each.flatten(0, 1)) if squeezed else (lambda each: each)
        outs = []
        for number, each in enumerate((first, second)):
            if seed % 3 == 0 and number:
                asgl_cuda.detach(layer)
            outs.append(layer(flat(each)))
            others = states_of(layer)
        torch.testing.assert_close(layer.firing_rate, outs[-1].mean())
        return torch.cat(outs), *others

    def make():
        return alif(seed, squeezed, reset_fn=reset, surrogate_grad_fn=SURROGATES[surrogate])

    assert_same(make, call, [*x, leaf(B, N), leaf(B, N)])


def test_alif_copies_resets_and_batches():
    layer = sinabs.layers.ALIF(3.0, 5.0, norm_input=False, reset_fn=activation.MembraneReset())
    converted, _ = asgl_cuda.convert(nn.Sequential(layer))
    assert not converted[0].norm_input  # which sinabs' own __deepcopy__ forgets
    for x in (torch.rand(4, 6, 5), torch.rand(2, 6, 5), torch.rand(2, 6, 5)):
        with torch.no_grad():
            assert torch.equal(converted(x), layer(x))
        torch.testing.assert_close(states_of(converted[0]), states_of(layer))
    asgl_cuda.reset(converted)
    assert not converted[0].b.any()
    back, _ = asgl_cuda.revert(converted)
    assert type(back[0]) is sinabs.layers.ALIF
    assert set(vars(back[0])) == set(vars(layer))


@pytest.mark.parametrize("tau_syn", [None, 3.0])
@pytest.mark.parametrize("kind", [sinabs.layers.LIF, sinabs.layers.ALIF])
def test_a_copy_learns_and_the_original_does(kind, tau_syn):
    """The __deepcopy__ of sinabs detaches the original's decays, and shares parameters that it was given."""
    options = {} if kind is sinabs.layers.LIF else {"tau_adapt": 5.0, "adapt_scale": nn.Parameter(torch.tensor(1.8))}
    layer = kind(tau_mem=3.0, tau_syn=tau_syn, train_alphas=True, **options)
    layer(torch.rand(2, 6, 5, requires_grad=True) * 8)
    model = nn.Sequential(layer)
    learned = {name: value.requires_grad for name, value in model.named_parameters()}
    converted, report = asgl_cuda.convert(model)
    assert len(report.replaced) == 1
    for made in (model, converted):
        assert {name: value.requires_grad for name, value in made.named_parameters()} == learned
        asgl_cuda.reset(made)
        made(torch.rand(2, 6, 5) * 8).sum().backward()
        assert {name: value.grad is not None for name, value in made.named_parameters()} == learned
    assert {value.data_ptr() for value in model.parameters()}.isdisjoint(
        map(torch.Tensor.data_ptr, converted.parameters())
    )
    assert layer.v_mem.data_ptr() != converted[0].v_mem.data_ptr()


@pytest.mark.parametrize("reset", [{"v_reset": 0.0}, {"v_reset": None}], ids=["hard", "soft"])
def test_alif_with_noise(reset):
    """One draw for both passes: the same elements are analog."""
    torch.manual_seed(0)
    reset_fn = activation.MembraneSubtract() if reset["v_reset"] is None else activation.MembraneReset()
    layer = alif(0, reset_fn=reset_fn, norm_input=False, tau_syn=None, record_states=True)
    converted, _ = asgl_cuda.convert(layer, asgl={"surrogate": "triangle", "width": 0.8, "analog_prob": 0.3})
    x = 2 * torch.rand(B, T, N)
    s_seq = converted(x)
    before = torch.cat([torch.zeros(B, 1, N), converted.recordings["b"][:, :-1]], 1)
    rng_state = None
    asgl_cuda.reset(converted)
    torch.manual_seed(3)
    s_seq = converted(x)
    before = torch.cat([torch.zeros(B, 1, N), converted.recordings["b"][:, :-1]], 1)
    torch.manual_seed(3)
    rng_state = torch.randint(2**62, (2,))
    expected = asgl_cuda.lif(
        x, decay=converted.alpha_mem_calculated, v_threshold=converted.b0 + converted.adapt_scale * before, width=0.8,
        surrogate="triangle", analog_prob=0.3, rng_state=rng_state, time_dim=1, **reset,
    )  # fmt: skip
    torch.testing.assert_close(s_seq, expected)
    assert not set(s_seq.unique().tolist()) <= {0.0, 1.0}
    s_seq.sum().backward()
    assert converted.log_width.grad != 0


def test_alif_that_changes():
    converted, _ = asgl_cuda.convert(sinabs.layers.ALIF(3.0, 5.0, reset_fn=activation.MembraneReset()))
    converted.min_v_mem = -1.0
    with pytest.raises(RuntimeError, match=r"it has a least potential \(min_v_mem\), which adaptive neurons lack"):
        converted(torch.rand(2, 3, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: sinabs.layers.ALIF(3.0, 5.0, reset_fn=activation.MembraneReset(), shape=(B, N)),
        lambda: sinabs.layers.ALIF(3.0, 5.0, 4.0, shape=(B, N)),
        lambda: norse.LSNN(norse.LSNNParameters(tau_mem_inv=torch.tensor(400.0))),
    ],
)
def test_compiled(make):
    x, found = 8 * torch.rand(B, B, N), []
    for compiles in (False, True):
        layer, _ = asgl_cuda.convert(make())
        whole = not isinstance(layer, norse.LSNN)  # whose initial state can't be traced
        call = torch.compile(layer, backend="eager", fullgraph=whole) if compiles else layer
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            out = call(leaf)
        out = out[0] if isinstance(out, tuple) else out
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    assert found[0][0].any()
    torch.testing.assert_close(*found)


# ---- Norse ----

METHODS = "super", "triangle", "tanh", "heavi_erfc"


def lsnn(seed, kind, method, learns):
    """A layer whose values are parameters of its own, if learned, since Norse's are not."""
    torch.manual_seed(seed)
    draw = random.Random(seed)

    def value(low, high, by_neuron=True):
        shape = (N,) if by_neuron and draw.random() < 0.4 else ()
        made = torch.rand(shape) * (high - low) + low
        return nn.Parameter(made) if learns else made

    p = norse.LSNNParameters(
        tau_syn_inv=value(200.0, 500.0), tau_mem_inv=value(200.0, 600.0), tau_adapt_inv=value(20.0, 200.0),
        v_leak=value(0.0, 0.2, False), v_th=value(0.5, 0.8, False), v_reset=value(-0.3, 0.1), beta=value(0.3, 1.2),
        method=method, alpha=2.0,
    )  # fmt: skip
    layer = getattr(norse, kind)(p, **({"record_states": draw.random() < 0.5} if kind == "LSNN" else {}))
    for name, each in p._asdict().items():
        if isinstance(each, nn.Parameter):
            layer.register_parameter(name, each)
    return layer


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("kind", ["LSNN", "LSNNCell"])
@pytest.mark.parametrize("given", [True, False])
def test_lsnn(seed, kind, method, learns, given):
    """Two calls or all steps, the state handed on, once detached; from rest or a given state."""
    torch.manual_seed(seed)
    x = leaf(2 * T, B, N, low=-2, high=5)
    first = [leaf(B, N, low=-0.3, high=0.5), leaf(B, N), leaf(B, N, low=0.4, high=1.2)] if given else []

    def call(layer, x_seq, *values):
        state = norse.LSNNFeedForwardState(*values) if values else None
        outs = []
        for number, part in enumerate(x_seq.split(T) if kind == "LSNN" else x_seq):
            if getattr(layer, "record_states", False) and number:
                state = type(state)(*(each[-1] for each in state))
            if number == 1 and seed % 3 == 0:
                state = type(state)(*(each.detach() for each in state))
            out, state = layer(part, state)
            assert isinstance(state, norse.LSNNFeedForwardState)
            outs.append(out)
        return torch.cat(outs), *state

    assert_same(lambda: lsnn(seed, kind, method, learns), call, [x, *first])


def test_lsnn_in_a_network():
    """SequentialState hands the states on; without gradients, and in evaluation, too."""
    torch.manual_seed(0)
    model = norse.SequentialState(nn.Linear(4, 6), norse.LSNN(), nn.Linear(6, 3), norse.LSNN()).eval()
    with torch.no_grad():
        model[2].weight.abs_().mul_(60)
    converted, report = asgl_cuda.convert(model)
    assert (len(report.replaced), report.left) == (2, [])
    state, our_state = None, None
    for x in 60 * torch.rand(2, 30, 5, 4):
        with torch.no_grad():
            out, state = model(x, state)
            ours, our_state = converted(x, our_state)
        assert 0 < out.mean() < 1
        assert torch.equal(ours, out)
        torch.testing.assert_close(our_state, state)


def test_lsnn_with_noise():
    converted, report = asgl_cuda.convert(norse.LSNN(), asgl={"width": 0.7, "analog_prob": 0.5})
    assert not report.left
    x = (20 * torch.rand(SHAPE)).requires_grad_()
    out, _ = converted(x)
    out.sum().backward()
    assert not set(out.unique().tolist()) <= {0.0, 1.0}
    assert converted.log_width.grad != 0
