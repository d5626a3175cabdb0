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


# ---- sinabs ----


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
