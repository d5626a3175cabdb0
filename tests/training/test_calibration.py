"""`calibrate`: rates of layers, changes of weights alone, and errors that name the layer."""

import copy
import itertools

import pytest
import torch
from comparison import Stack
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF, LeakyIntegrator, Monitor, OverTime, calibrate


@pytest.fixture
def x_seq():
    return torch.rand(1, 32, 16, generator=torch.Generator().manual_seed(5)).expand(4, -1, -1)


def rates_of(model, x_seq):
    """The rates with hard spikes by layer name."""
    model = copy.deepcopy(model).eval()
    asgl_cuda.reset(model)
    with Monitor(model) as monitor:
        model(x_seq)
    return {name: values["firing_rate"] for name, values in monitor.result().items()}


def residual(norm=None):
    """Two branches in front of the last neurons."""
    layers = {"first": nn.Linear(16, 16), "lif": LIF(), "inside": nn.Linear(16, 16), "last": LIF()}
    forward = lambda m, x_seq: m.last(m.norm(m.inside(s_seq := m.lif(m.first(x_seq))) + s_seq))  # noqa: E731
    return Stack(forward, norm=norm or nn.Identity(), **layers)


def linear(*neurons):
    sizes = (16, 40, 40, 40)
    return nn.Sequential(
        *(each for size, made in zip(sizes, neurons, strict=False) for each in (nn.Linear(size, 40), made))
    )


NETWORKS = {
    "linear": lambda: linear(LIF(), LIF(), LIF()),
    "options": lambda: linear(
        LIF(40, granularity="neuron", v_threshold=3.0, scale_output=True),
        LIF(v_reset=None, decay=0.9, strict_threshold=True, learn_threshold=True, learn_decay=True),
        LIF(v_reset=None, multi_spike=True, analog_prob=0.0),
    ),
    "currents": lambda: linear(
        nn.Sequential(LeakyIntegrator(learn_decay=True), LIF(), nn.Dropout(0.5)),
        nn.Sequential(LeakyIntegrator(decay=0.9, delay=True), nn.Dropout(0.5), LIF(stateful=True)),
    ),
    "normalised": lambda: linear(
        BatchNormLIF(40), nn.Sequential(OverTime(nn.BatchNorm1d(40)), LIF()), nn.Sequential(nn.LayerNorm(40), LIF())
    ),
    "residual, normalised": lambda: residual(OverTime(nn.BatchNorm1d(16))),
    "fused": lambda: asgl_cuda.fuse(
        nn.Sequential(nn.Linear(16, 40), OverTime(nn.BatchNorm1d(40)), LIF(), nn.Linear(40, 40), LIF()),
        torch.rand(3, 2, 16),
    )[0],
    "shared neurons": lambda: linear(lif := LIF(), lif),
    "inplace": lambda: linear(nn.Sequential(LIF(), nn.ReLU(inplace=True)), LIF()),
    "checkpointed": lambda: Stack(
        lambda m, x_seq: checkpoint(m.layers, x_seq, use_reentrant=False), layers=linear(LIF(), LIF())
    ),
    "double": lambda: nn.Sequential(OverTime(nn.Linear(16, 40)), LIF(), nn.Linear(40, 40), LIF()).double(),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(2, (1, 4, 4)), OverTime(nn.Conv2d(1, 8, 3, padding=1)), OverTime(nn.AvgPool2d(2)),
        LIF(8, granularity="channel"), OverTime(nn.Conv2d(8, 8, 1)), OverTime(nn.MaxPool2d(2)), LIF(), nn.Flatten(2),
        nn.Linear(8, 20), LIF(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rate"), [*zip(NETWORKS, itertools.cycle([0.05, 0.2, 0.4])), ("linear", 0.4), ("options", 0.05)]
)
def test_layers_fire_at_the_rate(name, rate, x_seq):
    """In four runs: the rates before, the biases, one in which all weights are set, and one that confirms the rates."""
    torch.manual_seed(1)
    model, runs = NETWORKS[name](), []
    x_seq = x_seq.to(next(model.parameters()).dtype)
    state = copy.deepcopy(model.state_dict())
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    report = calibrate(model, x_seq, rate)
    handle.remove()
    assert len(runs) == 4
    layers = [name for name, _ in asgl_cuda.asgl_layers(model)]
    assert [row.layer for row in report.layers] == layers * (2 if "shared" in name else 1)
    elements = 4 * 32 * 16  # at least
    for row in report.layers:
        assert row.rate_after == pytest.approx(rate, rel=0.01, abs=2 / elements), row
    weights = {row.weight: row.factor for row in report.layers}
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key] * weights.get(key, 1.0)), key
    again = calibrate(model, x_seq, rate)
    assert all(row.factor == 1 for row in again.layers), "idempotent"
    assert [row.rate_before for row in again.layers] == [row.rate_after for row in report.layers]
    if name in ("linear", "convolutional"):
        assert rates_of(model, x_seq) == pytest.approx({row.layer: row.rate_after for row in report.layers})


def test_statistics_are_those_of_the_mode(x_seq):
    torch.manual_seed(3)
    joined = BatchNormLIF(40, analog_prob=0.0), BatchNormLIF(40)
    model = linear(joined[0], nn.Sequential(OverTime(nn.BatchNorm1d(40)), LIF()), joined[1])
    nn.init.normal_(model[0].weight, std=3.0)
    first = calibrate(model, x_seq).layers[0]
    assert model[:2](x_seq).mean().item() == pytest.approx(first.rate_after), "of the batch, in training"
    for _ in range(50):
        model(x_seq)
    runs = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    report = calibrate(model.eval(), x_seq, 0.3)
    handle.remove()
    assert len(runs) == 4
    assert rates_of(model, x_seq) == pytest.approx({row.layer: row.rate_after for row in report.layers}, abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_weights_changes(training, x_seq):
    """State, modes, noise, generator and gradients stay."""
    torch.manual_seed(4)
    model = linear(nn.Sequential(BatchNormLIF(40, stateful=True, analog_prob=0.4), nn.Dropout()), LIF()).train(training)
    model[1][1].train(not training)
    model(x_seq).sum().backward()
    before = copy.deepcopy(model)
    grads = [value.grad.clone() for value in model.parameters()]
    drawn = torch.get_rng_state()
    report = calibrate(model, x_seq)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(model[1][0].v, before[1][0].v)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert [layer.analog_prob for _, layer in asgl_cuda.asgl_layers(model)] == [0.4, 0.5]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value.grad, grad) for value, grad in zip(model.parameters(), grads, strict=True))
    scaled = {row.weight for row in report.layers}
    for (name, value), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, old) == (name not in scaled)
        assert value.requires_grad
    assert all(map(torch.equal, model.buffers(), before.buffers()))


def test_a_forward_that_draws_random_numbers(x_seq):
    """The same ones in each run, and none of the generator's."""
    torch.manual_seed(9)
    model = Stack(
        lambda m, x_seq: m.lif(m.linear(x_seq + 9 * torch.rand_like(x_seq))), linear=nn.Linear(16, 40), lif=LIF()
    )
    drawn = torch.get_rng_state()
    (row,) = calibrate(model, x_seq).layers
    assert torch.equal(torch.get_rng_state(), drawn)
    assert row.rate_after == pytest.approx(rates_of(model, x_seq)["lif"], abs=2 / x_seq.numel())


def tied(memory=False):
    model = nn.Sequential(nn.Linear(16, 16), LIF(), nn.Linear(16, 16), LIF())
    if memory:
        model[2].weight.data = model[0].weight.data
    else:
        model[2].weight = model[0].weight
    return model


def made_in_inference_mode():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(16, 16), LIF())


def loud():
    """Fires by its biases alone, which are not scaled."""
    model = nn.Sequential(nn.Linear(16, 8), LIF())
    nn.init.constant_(model[0].bias, 5.0)
    nn.init.uniform_(model[0].weight)
    return model


class Remembering(nn.Module):
    """A model that depends on the previous call."""

    def __init__(self):
        super().__init__()
        self.linear, self.lif, self.last = nn.Linear(16, 16), LIF(), None

    def forward(self, x_seq):
        x_seq = self.linear(x_seq) + (0 if self.last is None else self.last)
        self.last = x_seq.detach()
        return self.lif(x_seq)


def detached(model, x_seq):
    with torch.no_grad():
        return model.lif(model.linear(x_seq))


ONE = "one weight that calibrate can scale must determine its input"
REFUSED = {
    "sum": (residual, rf"last .* {ONE}, got an input without one and inside\.weight; such a weight belongs"),
    "residual given": (
        lambda: Stack(lambda m, x: m.lif(m.linear(x), x), linear=nn.Linear(16, 16), lif=LIF()),
        r"lif \(LIF\): .* got an input without one and linear\.weight;",
    ),
    "residual by a weight": (
        lambda: Stack(lambda m, x: m.lif(m.a(x), m.b(x)), a=nn.Linear(16, 4), b=nn.Linear(16, 4), lif=LIF()),
        r"lif \(LIF\): .* got a\.weight and b\.weight;",
    ),
    "residual by the same weight": (
        lambda: Stack(lambda m, x: m.lif(m.linear(x), m.linear(x)), linear=nn.Linear(16, 4), lif=LIF()),
        r"lif \(LIF\): .* got linear\.weight \(also before the residual\);",
    ),
    "residual of a layer that is not affine": (
        lambda: Stack(
            lambda m, x: m.lif(x, m.linear(x)), linear=nn.Linear(16, 16), lif=BatchNormLIF(16, affine=False)
        ), r"lif \(BatchNormLIF\) must have a weight that can be scaled, got affine=False;",
    ),
    "two branches": (
        lambda: Stack(lambda m, x: m.lif(m.a(x) + m.b(x)), a=nn.Linear(16, 4), b=nn.Linear(16, 4), lif=LIF()),
        r"lif \(LIF\): .* got a\.weight and b\.weight;",
    ),
    "no weight": (lambda: nn.Sequential(LIF(), nn.Linear(16, 4), LIF()), r"0 \(LIF\): .* got an input without one;"),
    "parametrised": (lambda: nn.Sequential(weight_norm(nn.Linear(16, 4)), LIF()), r"1 .* got an input without one;"),
    "frozen": (lambda: nn.Sequential(nn.Linear(16, 4).requires_grad_(False), LIF()), r"1 .* 0\.weight \(frozen\);"),
    "frozen normalisation": (
        lambda: nn.Sequential(nn.Linear(16, 4), BatchNormLIF(4).requires_grad_(False)),
        r"1 \(BatchNormLIF\): .* got 1\.weight \(frozen\); .* autograd records its use$",
    ),
    "affine": (
        lambda: nn.Sequential(nn.Linear(16, 4), BatchNormLIF(4, affine=False)),
        r"1 \(BatchNormLIF\) must have a weight that can be scaled, got affine=False;",
    ),
    "normalised again": (
        lambda: nn.Sequential(nn.Linear(16, 4), OverTime(nn.BatchNorm1d(4, affine=False)), LIF(v_threshold=9.0)),
        r"2 \(LIF\): no factor on 0.weight makes it fire at 0.4; the rate is 0.0 at",
    ),
    "used twice": (
        lambda: Stack(
            lambda m, x_seq: m.last(m.linear(m.lif(m.linear(x_seq)))), lif=LIF(), last=LIF(), linear=nn.Linear(16, 16)
        ), r"last \(LIF\): .* got linear\.weight \(also before lif\)",
    ),
    "tied": (tied, r"1 \(LIF\): .* got 0\.weight \(shared with 2\.weight\)"),
    "one memory": (lambda: tied(memory=True), r"1 \(LIF\): .* got 0\.weight \(shared with 2\.weight\)"),
    "inference": (made_in_inference_mode, r"1 \(LIF\): .* got 0\.weight \(made in inference mode\); "),
    "remembering": (Remembering, r"lif .* no factor on linear\.weight makes it fire at 0\.4; .* another one in other"),
    "detached": (lambda: Stack(detached, linear=nn.Linear(16, 16), lif=LIF()), r"lif .* got an input without one;"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), LIF()), r"0\.weight has no shape yet: call the model once before"),
    "biases": (loud, r"1 .* no factor on 0\.weight makes it fire at 0\.4; the rate is \S+ at the factor .* and \S+ at"),
    "sparse": (
        lambda: Stack(
            lambda m, x: m.lif(m.linear(torch.cat([x[:1], 0 * x[1:]]))), linear=nn.Linear(16, 4, bias=False), lif=LIF()
        ), r"lif \(LIF\): no factor .*; rates from 0\S* to 0\.1\S* were found\. Another rate, ",
    ),
    "silent": (
        lambda: Stack(lambda m, x: m.lif(m.linear(0 * x)), linear=nn.Linear(16, 4, bias=False), lif=LIF()),
        r"lif \(LIF\): no factor .* the rate is 0 at the factor 1 and 0 at the factor \S+\. Another rate, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_models(make, message, x_seq):
    """The error names the layer, and the model is unchanged."""
    torch.manual_seed(6)
    model = make()
    state = {} if "shape" in message else copy.deepcopy(model.state_dict())
    drawn = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"asgl_cuda\.calibrate: {message}"):
        calibrate(model, x_seq, 0.4)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_inputs_that_are_not_linear_in_a_weight_and_weights_of_several_layers(x_seq):
    """The weight in front of `late` also precedes `early`, which runs first: more runs find both."""
    torch.manual_seed(8)
    layers = {"trunk": nn.Linear(16, 40), "head": nn.Linear(40, 40), "early": LIF(), "late": LIF()}
    model = Stack(lambda m, x_seq: (m.early(m.head(y := m.trunk(x_seq))), m.late(nn.functional.silu(y))), **layers)
    report = calibrate(model, x_seq)
    assert [row.weight for row in report.layers] == ["head.weight", "trunk.weight"]
    assert [row.rate_after for row in report.layers] == pytest.approx([0.2, 0.2], rel=0.01)


def test_autocast_and_modules_of_two_names(x_seq):
    """Autocast caches weights, here before scaling; a module may be registered twice."""
    lin, lif = nn.Linear(16, 40), LIF()
    model = Stack(lambda m, x_seq: m.layers(x_seq), linear=lin, lif=lif, layers=nn.Sequential(lin, lif))
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = calibrate(model, x_seq).layers
    assert (row.layer, row.weight) == ("lif", "linear.weight")
    assert row.rate_after == pytest.approx(0.2, rel=0.02)
    with torch.inference_mode():
        made = torch.rand(4, 8, 16)
    assert calibrate(model, made, torch.tensor(0.3)).layers[0].rate_after == pytest.approx(0.3, rel=0.02)


def test_rates_that_jump():
    """With few distinct inputs the nearest rate is taken, unless too far off."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), LIF(decay=0.0))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.5], [0.25]]))
    for rate in (0.4, 0.3):
        (row,) = calibrate(model, torch.ones(2, 5, 1), rate).layers
        assert row.rate_after == pytest.approx(1 / 3)
    with pytest.raises(
        ValueError, match=r"1 \(LIF\): no factor on 0\.weight makes it fire at 0\.1; the rate is 0 at the f"
    ):
        calibrate(model, torch.ones(2, 5, 1), 0.1)


def test_one_spike_is_as_near_as_it_gets():
    """Among 30 elements, of which 21 fire."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), LIF(decay=0.0))
    x_seq = torch.arange(1, 31).reshape(3, 10, 1) / 10
    for spikes, is_near in ((22, True), (20, True), (19, False)):
        nn.init.ones_(model[0].weight)
        (row,) = calibrate(model, x_seq, spikes / 30).layers
        assert (row.factor == 1) is is_near
        assert row.rate_after == pytest.approx(spikes / 30, abs=1.01 / 30)


def test_arguments(x_seq):
    model = NETWORKS["linear"]()
    for given, error, message in (
        ((model, x_seq, 1.0), ValueError, r"rate must be in \(0, 1\), got 1"),
        ((model, x_seq, 0.0), ValueError, r"rate must be in \(0, 1\), got 0"),
        ((model, x_seq, "0.2"), TypeError, "rate must be a float"),
        ((model, x_seq, x_seq), ValueError, "rate must be a float, got a tensor of shape .* as a tuple"),
        ((1, x_seq), TypeError, r"model must be a torch\.nn\.Module, got int"),
        ((nn.Linear(16, 4), x_seq), ValueError, "model must have an ASGL layer, got a Linear without"),
        (
            (model, [(x_seq, 1)]),
            ValueError,
            r"x_seq must be what .*, got a list, with which .* TypeError: .*pass x alone",
        ),
        (
            (model, (x_seq, 1)),
            ValueError,
            r"x_seq must be .*, got a tuple, with which .* TypeError: .*; for a batch \(x, y",
        ),
        ((model, "x"), ValueError, r"x_seq must be .*, got a str, with which the model raises TypeError: .*[^e]$"),
        (
            (model, x_seq[..., :3]),
            ValueError,
            r"x_seq must .*, got a tensor of shape \[4, 32, 3\], .* RuntimeError: mat1 ",
        ),
        ((model, x_seq[:, :0]), ValueError, r"1 \(LIF\) must get samples, got an empty output of shape \["),
    ):
        with pytest.raises(error, match=rf"asgl_cuda\.calibrate: {message}"):
            calibrate(*given)


class Two(nn.Module):
    """Two inputs, and a layer that does not run."""

    def __init__(self):
        super().__init__()
        self.embed, self.lif, self.spare, self.linear, self.last = (
            nn.Embedding(10, 16),
            LIF(),
            LIF(),
            nn.Linear(16, 8),
            LIF(),
        )

    def forward(self, tokens, scale):
        return self.last(self.linear(self.lif(self.embed(tokens) * scale)))


def test_several_inputs_and_layers_that_do_not_run():
    tokens = torch.randint(10, (4, 32, 5), generator=torch.Generator().manual_seed(0))
    report = calibrate(Two(), (tokens, 0.1))
    assert [row.weight for row in report.layers] == ["embed.weight", "linear.weight"]
    assert report.left == [("spare", "LIF", "not run by this input")]
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "weight", "rate", "before", "after", "factor"]
    assert lines[1].split()[:2] == ["lif", "embed.weight"]
    assert lines[3] == "spare: LIF, left: not run by this input"


def test_compiled_models_and_inference_mode(x_seq):
    torch.manual_seed(7)
    model = NETWORKS["linear"]()
    expected = calibrate(copy.deepcopy(model), x_seq)
    assert calibrate(torch.compile(copy.deepcopy(model), backend="eager"), x_seq) == expected
    inside = copy.deepcopy(model)
    inside[2].compile(backend="eager")
    with torch.no_grad():
        assert calibrate(inside, x_seq) == expected
    with torch.inference_mode():
        assert calibrate(model, x_seq) == expected


def test_recurrent_layers(backend, device):
    """By the weights in front; those that return the spikes stay."""
    torch.manual_seed(0)
    layer = asgl_cuda.RecurrentLIF(8, syn_decay=0.5, analog_prob=0.0, decay=0.8, width=1.5, backend=backend)
    model = nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 8), LIF(analog_prob=0.0)).to(device).eval()
    x_seq = torch.randn(20, 16, 5, device=device)
    before = layer.recurrent_weight.clone()
    report = calibrate(model, x_seq, 0.2)
    assert [(row.layer, row.weight) for row in report.layers] == [("1", "0.weight"), ("3", "2.weight")]
    for part in (model[:2], model):
        assert part(x_seq).mean().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(layer.recurrent_weight, before)
    with pytest.raises(
        ValueError, match=r"asgl_cuda\.calibrate: 0 \(RecurrentLIF\): one weight .* must .*, got an input without one"
    ):
        calibrate(nn.Sequential(layer, LIF().to(device)), model[0](x_seq), 0.2)
