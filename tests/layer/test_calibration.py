"""`calibrate`: rates of layers, changes of weights alone, and errors that name the layer."""

import copy

import pytest
import torch
from comparison import Stack
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF, LeakyIntegrator, Monitor, OverTime, calibrate

RATE = 0.2


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


def images(x_seq):
    return x_seq.reshape(*x_seq.shape[:2], 1, 4, 4)


def residual(norm=None):
    """Two branches in front of the last neurons."""

    def forward(model, x_seq):
        s_seq = model.lif(model.first(x_seq))
        return model.last(model.norm(model.inside(s_seq) + s_seq))

    layers = {"first": nn.Linear(16, 16), "lif": LIF(), "inside": nn.Linear(16, 16), "last": LIF()}
    return Stack(forward, norm=norm or nn.Identity(), **layers)


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Linear(16, 40), LIF(), nn.Linear(40, 40), LIF(), nn.Linear(40, 40), LIF()),
    "options": lambda: nn.Sequential(
        nn.Linear(16, 40, bias=False), LIF(40, granularity="neuron", v_threshold=3.0, scale_output=True),
        nn.Linear(40, 40), LIF(v_reset=None, decay=0.9, strict_threshold=True, learn_threshold=True, learn_decay=True),
        nn.Linear(40, 40), LIF(v_reset=None, multi_spike=True, analog_prob=0.0),
    ),
    "currents": lambda: nn.Sequential(
        nn.Linear(16, 40), LeakyIntegrator(learn_decay=True), LIF(), nn.Dropout(0.5), nn.Linear(40, 40),
        LeakyIntegrator(decay=0.9, delay=True), nn.Dropout(0.5), LIF(stateful=True),
    ),
    "normalised": lambda: nn.Sequential(
        nn.Linear(16, 40), BatchNormLIF(40), nn.Linear(40, 40), OverTime(nn.BatchNorm1d(40)), LIF(),
        nn.Linear(40, 40), nn.LayerNorm(40), LIF(),
    ),
    "residual, normalised": lambda: residual(OverTime(nn.BatchNorm1d(16))),
    "fused": lambda: asgl_cuda.fuse(
        nn.Sequential(nn.Linear(16, 40), OverTime(nn.BatchNorm1d(40)), LIF(), nn.Linear(40, 40), LIF()),
        torch.rand(3, 2, 16),
    )[0],
    "shared neurons": lambda: nn.Sequential(nn.Linear(16, 40), lif := LIF(), nn.Linear(40, 40), lif),
    "inplace": lambda: nn.Sequential(nn.Linear(16, 40), LIF(), nn.ReLU(inplace=True), nn.Linear(40, 40), LIF()),
    "checkpointed": lambda: Stack(
        lambda m, x_seq: checkpoint(m.layers, x_seq, use_reentrant=False),
        layers=nn.Sequential(nn.Linear(16, 40), LIF(), nn.Linear(40, 40), LIF()),
    ),
    "double": lambda: nn.Sequential(OverTime(nn.Linear(16, 40)), LIF(), nn.Linear(40, 40), LIF()).double(),
}  # fmt: skip


def convolutional():
    return nn.Sequential(
        OverTime(nn.Conv2d(1, 8, 3, padding=1)), OverTime(nn.AvgPool2d(2)), LIF(8, granularity="channel"),
        OverTime(nn.Conv2d(8, 8, 1)), OverTime(nn.MaxPool2d(2)), LIF(), nn.Flatten(2), nn.Linear(8, 20), LIF(),
    )  # fmt: skip


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_fire_at_the_rate(name, rate, x_seq):
    torch.manual_seed(1)
    model = NETWORKS[name]()
    x_seq = x_seq.to(next(model.parameters()).dtype)
    state = copy.deepcopy(model.state_dict())
    report = calibrate(model, x_seq, rate)
    assert [row.layer for row in report.layers] == [
        name for name, _ in asgl_cuda.asgl_layers(model)
    ] or "shared" in name
    assert len(report.layers) > 1
    elements = 4 * 32 * 16  # at least
    for row in report.layers:
        assert row.rate_after == pytest.approx(rate, rel=0.01, abs=2 / elements), row
    weights = {row.weight: row.factor for row in report.layers}
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key] * weights.get(key, 1.0)), key
    again = calibrate(model, x_seq, rate)
    assert all(row.factor == 1 for row in again.layers), "idempotent"
    assert [row.rate_before for row in again.layers] == [row.rate_after for row in report.layers]


def test_rates_are_those_of_evaluation(x_seq):
    torch.manual_seed(2)
    for make, inputs in ((NETWORKS["linear"], x_seq), (convolutional, images(x_seq))):
        model = make()
        report = calibrate(model, inputs)
        assert rates_of(model, inputs) == pytest.approx({row.layer: row.rate_after for row in report.layers})
        assert all(row.rate_before < 0.1 for row in report.layers)


def test_running_statistics_are_taken_in_evaluation(x_seq):
    torch.manual_seed(3)
    model = NETWORKS["normalised"]()
    for _ in range(50):
        model(x_seq)
    model.eval()
    report = calibrate(model, x_seq, 0.3)
    assert rates_of(model, x_seq) == pytest.approx({row.layer: row.rate_after for row in report.layers}, abs=1e-6)


def test_batch_statistics_are_taken_in_training(x_seq):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 40), BatchNormLIF(40, analog_prob=0.0))
    nn.init.normal_(model[0].weight, std=3.0)
    (row,) = calibrate(model, x_seq).layers
    assert model(x_seq).mean().item() == pytest.approx(row.rate_after)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_weights_changes(training, x_seq):
    """State, modes, noise, generator and gradients stay."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(16, 40), BatchNormLIF(40, stateful=True, analog_prob=0.4), nn.Dropout(), nn.Linear(40, 40), LIF(),
    ).train(training)  # fmt: skip
    model[2].train(not training)
    model(x_seq).sum().backward()
    before = copy.deepcopy(model)
    grads = [value.grad.clone() for value in model.parameters()]
    drawn = torch.get_rng_state()
    report = calibrate(model, x_seq)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(model[1].v, before[1].v)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert [layer.analog_prob for _, layer in asgl_cuda.asgl_layers(model)] == [0.4, 0.2]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value.grad, grad) for value, grad in zip(model.parameters(), grads, strict=True))
    scaled = {row.weight for row in report.layers}
    for (name, value), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, old) == (name not in scaled)
        assert value.requires_grad
    for value, old in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(value, old)


def test_a_forward_that_draws_random_numbers(x_seq):
    """The same ones in each run, and none of the generator's."""
    torch.manual_seed(9)
    layers = {"linear": nn.Linear(16, 40), "lif": LIF()}
    model = Stack(lambda m, x_seq: m.lif(m.linear(x_seq + 9 * torch.rand_like(x_seq))), **layers)
    drawn = torch.get_rng_state()
    (row,) = calibrate(model, x_seq).layers
    assert torch.equal(torch.get_rng_state(), drawn)
    assert row.rate_after == rates_of(model, x_seq)["lif"]


def test_bias_alone_and_units(x_seq):
    """Biases are not scaled: a rate that they alone exceed is an error."""
    model = nn.Sequential(nn.Linear(16, 8), LIF())
    with torch.no_grad():
        model[0].bias.fill_(5.0)
        model[0].weight.abs_()
    with pytest.raises(ValueError, match=r"asgl_cuda\.calibrate: 1: no factor on 0\.weight makes it fire at 0\.2; .*"):
        calibrate(model, x_seq)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (residual, r"last: its input must have one weight, got several paths: inside\.weight and a path"),
        (lambda: nn.Sequential(LIF(), nn.Linear(16, 4), LIF()), "0: there must be a linear layer, a convolution or"),
        (lambda: nn.Sequential(weight_norm(nn.Linear(16, 4)), LIF()), r"1: there must be .*\(parametrised weights"),
        (lambda: nn.Sequential(nn.Linear(16, 4).requires_grad_(False), LIF()), r"1: .* 0\.weight, which is frozen"),
        (lambda: nn.Sequential(nn.Linear(16, 4), BatchNormLIF(4, affine=False)), "1: its normalisation has no weight"),
        (lambda: nn.Sequential(nn.Linear(16, 4), OverTime(nn.BatchNorm1d(4, affine=False)), LIF()), "2: no factor"),
        (
            lambda: Stack(
                lambda m, x_seq: m.last(m.linear(m.lif(m.linear(x_seq)))), lif=LIF(), last=LIF(),
                linear=nn.Linear(16, 16),
            ), r"last: in front of it is linear\.weight, which is in front of lif, too",
        ),
        (lambda: tied(), r"1: in front of it is 0\.weight, which several modules share"),
        (lambda: tied(memory=True), r"1: in front of it is 0\.weight, which shares memory with 2\.weight"),
        (lambda: of_inference_mode(), r"1: in front of it is 0\.weight, which was made in inference mode"),
        (lambda: Remembering(), r"lif: fires at .* and not at 0\.4 when the model runs again: its rate"),
        (
            lambda: Stack(detached, linear=nn.Linear(16, 16), lif=LIF()),
            r"lif: its input must come with its graph, got one that torch\.no_grad\(\),",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(4), LIF()), r"0\.weight has no shape yet: call the model once before"),
    ],
)  # fmt: skip
def test_refused_models(make, message, x_seq):
    """The error names the layer, and the model is unchanged."""
    torch.manual_seed(6)
    model = make()
    lazy = isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.LazyLinear)
    state = {} if lazy else copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        calibrate(model, x_seq, 0.4)
    assert lazy or all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def tied(memory=False):
    model = nn.Sequential(nn.Linear(16, 16), LIF(), nn.Linear(16, 16), LIF())
    if memory:
        model[2].weight.data = model[0].weight.data
    else:
        model[2].weight = model[0].weight
    return model


def of_inference_mode():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(16, 16), LIF())


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


def test_a_weight_in_front_of_earlier_layers(x_seq):
    """The weight in front of `late` also precedes `early`, which runs first."""
    torch.manual_seed(8)
    layers = {"trunk": nn.Linear(16, 40), "head": nn.Linear(40, 40), "early": LIF(), "late": LIF()}
    model = Stack(lambda m, x_seq: (m.early(m.head(y := m.trunk(x_seq))), m.late(y)), **layers)
    report = calibrate(model, x_seq)
    assert [row.weight for row in report.layers] == ["head.weight", "trunk.weight"]
    for row in report.layers:
        assert row.rate_after == pytest.approx(0.2, rel=0.02), row


def test_autocast_and_modules_of_two_names(x_seq):
    """Autocast caches weights, here before scaling; a module may be registered twice."""
    linear, lif = nn.Linear(16, 40), LIF()
    model = Stack(lambda m, x_seq: m.layers(x_seq), linear=linear, lif=lif, layers=nn.Sequential(linear, lif))
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = calibrate(model, x_seq).layers
    assert (row.layer, row.weight) == ("lif", "linear.weight")
    assert row.rate_after == pytest.approx(0.2, rel=0.02)
    with torch.inference_mode():
        made = torch.rand(4, 8, 16)
    assert calibrate(model, made, torch.tensor(0.3)).layers[0].rate_after == pytest.approx(0.3, rel=0.02)


def test_rates_that_no_factor_changes():
    with pytest.raises(ValueError, match=r"rate is 0 whatever the factor, as for a silent input or behind a normal"):
        calibrate(nn.Sequential(nn.Linear(16, 4, bias=False), LIF()), torch.zeros(4, 8, 16))


def test_rates_that_jump():
    """With few distinct inputs the nearest rate is taken, unless too far off."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), LIF(decay=0.0))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.5], [0.25]]))
    (row,) = calibrate(model, torch.ones(2, 5, 1), 0.4).layers
    assert row.rate_after == pytest.approx(1 / 3)
    with pytest.raises(
        ValueError, match=r"1: no factor on 0\.weight makes it fire at 0\.1; the rate is 0 at the factor"
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
    for rate in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"asgl_cuda\.calibrate: rate must be in \(0, 1\), got"):
            calibrate(model, x_seq, rate)
    with pytest.raises(TypeError, match=r"asgl_cuda\.calibrate: rate must be a float"):
        calibrate(model, x_seq, "0.2")
    with pytest.raises(TypeError, match=r"asgl_cuda\.calibrate: model must be a torch\.nn\.Module, got int"):
        calibrate(1, x_seq)
    with pytest.raises(ValueError, match=r"asgl_cuda\.calibrate: model must have an ASGL layer, got a Linear without"):
        calibrate(nn.Linear(16, 4), x_seq)
    with pytest.raises(ValueError, match=r"asgl_cuda\.calibrate: 1: x_seq must have samples, got an empty output"):
        calibrate(model, x_seq[:, :0])


def test_several_inputs_and_layers_that_do_not_run(x_seq):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lif, self.spare = nn.Embedding(10, 16), LIF(), LIF()
            self.linear, self.last = nn.Linear(16, 8, bias=False), LIF()

        def forward(self, tokens, scale):
            s_seq = self.lif(self.embed(tokens) * scale)
            return self.last(self.linear(s_seq))

    model = Two()
    tokens = torch.randint(10, (4, 32, 5), generator=torch.Generator().manual_seed(0))
    report = calibrate(model, (tokens, 0.1))
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
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert calibrate(compiled, x_seq) == expected
    inside = copy.deepcopy(model)
    inside[2].compile(backend="eager")
    with torch.no_grad():
        assert calibrate(inside, x_seq) == expected
    with torch.inference_mode():
        assert calibrate(model, x_seq) == expected
