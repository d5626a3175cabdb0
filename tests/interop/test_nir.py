"""Models to and from NIR: the same layer comes back, and errors name the parts that cannot be written."""

import sys

import authors_code
import pytest
import torch
from comparison import LEARN_ALL, Stack, random_input, randomized
from nir_graphs import convolutional, euler, fires, graph_of, nir, nir_lif, np, public_types, rewritten
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, LeakyIntegrator
from asgl_cuda.interop.nir import from_nir, to_nir
from asgl_cuda.over_time import OverTime

LAYERS = {
    "hard reset": (lambda: LIF(), {}),
    "soft reset": (lambda: LIF(v_reset=None, **LEARN_ALL), {"allow_soft_reset": True}),
    "learned": (lambda: LIF(**LEARN_ALL), {}),
    "channel": (lambda: LIF(4, granularity="channel", **LEARN_ALL), {}),
    "neuron": (lambda: LIF((4, 6, 5), granularity="neuron", **LEARN_ALL), {}),
    "no leak": (lambda: LIF(decay=1.0, v_threshold=1.5), {}),
    "scaled output": (lambda: LIF(4, granularity="channel", scale_output=True, v_threshold=0.6, **LEARN_ALL), {}),
    "another step": (lambda: LIF(**LEARN_ALL), {"dt": 1e-3}),
    "v_reset": (lambda: LIF(v_reset=-0.25), {}),
    "gain and rest": (
        lambda: LIF(4, granularity="channel", input_gain=0.7, v_rest=0.2, v_reset=0.2, scale_output=True, **LEARN_ALL),
        {},
    ),
    "gain and rest without leak": (lambda: LIF(decay=1.0, input_gain=0.7, v_rest=-0.2, v_reset=-0.2), {}),
    "several spikes": (
        lambda: LIF(
            v_reset=None, multi_spike=True, v_min=-0.5, surrogate="periodic_exponential", analog_prob=0, v_threshold=0.3
        ), {"allow_soft_reset": True},
    ),
    "integer spikes": (
        lambda: LIF(v_reset=None, levels=4, scale_output=True, v_threshold=0.3, learn_threshold=True, analog_prob=0.1),
        {"allow_soft_reset": True},
    ),
    "a floor": (lambda: LIF(v_min=-0.25), {"allow_soft_reset": True}),
    "reset amount": (
        lambda: LIF(v_reset=None, reset_amount=0.5, strict_threshold=True, surrogate_gain=0.5, store_v_seq=True),
        {"allow_soft_reset": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_layer_comes_back(name, tmp_path):
    make, options = LAYERS[name]
    model = randomized(convolutional(make()))
    x_seq = random_input(6, 3, 2, 6, 5).detach()
    back = from_nir(rewritten(to_nir(model, x_seq, **options), tmp_path / "model.nir"))
    assert not back.training
    (before, after) = (next(layer for layer in each.modules() if isinstance(layer, LIF)) for each in (model, back))
    assert repr(before) == repr(after)
    assert public_types(before) == public_types(after)
    assert all(parameter.requires_grad for parameter in back.parameters())
    torch.testing.assert_close(dict(after.named_parameters()), dict(before.named_parameters()), rtol=0, atol=0)
    assert torch.equal(back(x_seq), model.eval()(x_seq))
    assert fires(model[:2](x_seq))


INTEGRATORS = {
    "defaults": (lambda: LeakyIntegrator(), {}),
    "learned": (lambda: LeakyIntegrator(learn_decay=True), {}),
    "channel": (lambda: LeakyIntegrator(4, granularity="channel", learn_decay=True), {"dt": 1e-3}),
    "neuron": (lambda: LeakyIntegrator((4, 6, 5), granularity="neuron", learn_decay=True, input_gain=0.3), {}),
    "no decay": (lambda: LeakyIntegrator(decay=0.0), {}),
    "no leak": (lambda: LeakyIntegrator(decay=1.0, input_gain=-0.7), {}),
    "gain and rest": (lambda: LeakyIntegrator(decay=0.9, input_gain=0.1, v_rest=-0.3, stateful=True), {}),
}


@pytest.mark.parametrize("name", INTEGRATORS)
def test_the_same_integrators_come_back(name, tmp_path):
    """As neurons' current, in a node of its own, and as a read-out; NIR's equations give the outputs."""
    make, options = INTEGRATORS[name]
    model = randomized(convolutional(nn.Sequential(make(), LIF(v_threshold=0.2)))).append(LeakyIntegrator(decay=0.9))
    x_seq = random_input(6, 3, 2, 6, 5).detach()
    graph = rewritten(to_nir(model, x_seq, **options), tmp_path / "model.nir")
    kind, current = nir.I if name == "no leak" else nir.LI, model[0](x_seq)
    (node,) = [node for node in graph.nodes.values() if isinstance(node, kind) and node.r.shape == (4, 6, 5)]
    layer = model[1][0]
    expected = layer(current)
    layer.reset()
    torch.testing.assert_close(euler(node, current, **options), expected, rtol=1e-5, atol=1e-5)
    back = from_nir(graph)
    ours, theirs = ([m for m in each.modules() if isinstance(m, LeakyIntegrator)] for each in (model, back))
    assert [repr(each) for each in ours] == [repr(each) for each in theirs]
    assert [public_types(each) for each in ours] == [public_types(each) for each in theirs]
    assert all(torch.equal(*pair) for pair in zip(ours[0].parameters(), theirs[0].parameters(), strict=True))
    assert torch.equal(back(x_seq), model.eval()(x_seq))


def test_float64_and_what_the_metadata_says(tmp_path):
    layer = randomized(LIF(3, granularity="channel", v_threshold=0.3, decay=0.7)).double()
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2), LeakyIntegrator(decay=0.9)).double().eval()
    x_seq = random_input(8, 4, 3, dtype=torch.float64).detach()
    graph = rewritten(to_nir(model, x_seq), tmp_path / "model.nir")
    node = next(node for node in graph.nodes.values() if isinstance(node, nir.LIF))
    assert node.tau.dtype == np.float64
    ours = node.metadata["asgl_cuda"]
    assert (ours["reset"], bool(ours["strict_threshold"])) == ("hard", False)
    assert torch.equal(torch.as_tensor(ours["width"]), layer.width.detach())
    back = from_nir(graph, dtype=torch.float64)
    assert torch.equal(back(x_seq), model(x_seq)), "through a file"
    assert {value.dtype for value in from_nir(graph).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "name",
    [
        "hard reset", "learned", "channel", "neuron", "no leak", "another step", "v_reset",
        "gain and rest without leak",
    ],
)  # fmt: skip
def test_the_nodes_numbers_are_the_neuron(name):
    make, options = LAYERS[name]
    layer = randomized(make()).eval()
    x_seq = random_input(12, 3, 4, 6, 5).detach()
    graph = to_nir(layer, x_seq, **options)
    node = next(node for node in graph.nodes.values() if isinstance(node, (nir.LIF, nir.IF)))
    assert isinstance(node, nir.IF) == name.endswith(("no leak", "without leak"))
    assert node.r.shape == (4, 6, 5)
    assert node.r.dtype == np.float32
    assert isinstance(node, nir.IF) or (node.r == 1).all(), "Norse ignores r"
    # Float32 against float64: none of 4320 potentials is so near the threshold that rounding matters.
    assert torch.equal(euler(node, x_seq, **options), layer(x_seq))


class Skip(nn.Module):
    """A residual block of one layer, with an addition in two ways."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.lif = LIF()

    def forward(self, x_seq):
        s_seq = self.lif(self.inner(x_seq) + x_seq)
        return torch.add(self.outer(s_seq), s_seq)


OTHER_LAYERS = {
    "Linear": (lambda: nn.Linear(5, 3), (5,)),
    "Linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "Conv1d": (lambda: OverTime(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2)), (4, 9)),
    "Conv1d same": (lambda: OverTime(nn.Conv1d(4, 6, 3, padding="same")), (4, 9)),
    "Conv2d": (lambda: OverTime(nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)), (2, 9, 8)),
    "Conv2d in groups": (lambda: OverTime(nn.Conv2d(4, 6, 3, groups=2)), (4, 9, 8)),
    "Conv2d oblong": (lambda: OverTime(nn.Conv2d(4, 6, (3, 5), padding=(1, 0), stride=(1, 2))), (4, 9, 8)),
    "AvgPool2d": (lambda: OverTime(nn.AvgPool2d(3, 2, padding=1)), (2, 9, 8)),
    "SumPool2d": (lambda: OverTime(nn.AvgPool2d((2, 3), divisor_override=1)), (2, 9, 8)),
    "Flatten": (lambda: nn.Flatten(2), (2, 9, 8)),
    "Flatten of some": (lambda: nn.Flatten(2, 3), (2, 9, 8)),
    "Dropout": (lambda: nn.Sequential(nn.Dropout(), nn.Identity()), (5,)),
    "additions": (lambda: nn.Sequential(Skip(), Skip()), (5,)),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_other_layers(name, tmp_path):
    make, shape = OTHER_LAYERS[name]
    model = nn.Sequential(make(), LIF())
    x_seq = random_input(6, 3, *shape).detach()
    # nir's own inference of shapes refuses these.
    type_check = name not in ("Conv2d in groups", "Conv2d oblong")
    back = from_nir(rewritten(to_nir(model, x_seq), tmp_path / "model.nir", type_check))
    assert torch.equal(back(x_seq), model.eval()(x_seq))
    biases = [[getattr(each, "bias", None) is None for each in one.modules() if hasattr(each, "weight")]
              for one in (model, back)]  # fmt: skip
    assert biases[0] == biases[1]


def test_every_option_of_the_layer_is_written():
    (node,) = [node for node in to_nir(LIF(), torch.rand(2, 3, 4)).nodes.values() if isinstance(node, nir.LIF)]
    not_of_the_neuron = {"time_dim", "backend", "device", "dtype"}
    where_there_is_one = {"reset_amount", "v_min", "levels"}
    options = set(LIF.__init__.__kwdefaults__) - not_of_the_neuron - where_there_is_one
    assert set(node.metadata["asgl_cuda"]["options"]) == options
    node = to_nir(LeakyIntegrator(), torch.rand(2, 3, 4)).nodes["_0"]
    options = set(LeakyIntegrator.__init__.__kwdefaults__) - not_of_the_neuron - {"delay"}
    assert set(node.metadata["asgl_cuda"]["options"]) == options


def test_time_in_the_second_dimension_is_first_afterwards():
    model = nn.Sequential(nn.Linear(5, 4), LIF(time_dim=1)).eval()
    x_seq = random_input(3, 6, 5).detach()  # [B, T, ...]
    back = from_nir(to_nir(model, x_seq))
    assert torch.equal(back(x_seq.transpose(0, 1)), model(x_seq).transpose(0, 1))


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(5, 4), LIF(stateful=True, analog_prob=0.0), LeakyIntegrator(stateful=True))
    x_seq = random_input(6, 3, 5).detach()
    model(x_seq)
    potential = model[1].v
    to_nir(model, torch.zeros(2, 7, 5))
    assert model.training
    assert model[1].v is potential


def test_unused_layers_are_not_written():
    """Each node that nothing follows gets an Output of its own from nir."""
    layers = {"linear": nn.Linear(4, 4), "lif": LIF(), "head": nn.Linear(4, 2), "last": LIF()}
    model = Stack(lambda m, x: (m.lif(m.head(m.linear(x))), m.last(m.linear(x)))[1], **layers).eval()
    x_seq = random_input(6, 3, 4).detach()
    graph = to_nir(model, x_seq)
    assert list(graph.nodes) == ["x_seq", "linear_1", "last", "output"]
    assert torch.equal(from_nir(graph)(x_seq), model(x_seq))


def decaying(layer, decay):
    """The layer with an invalid decay."""
    layer._decay = decay
    return layer


LINEAR = {"linear": nn.Linear(4, 4), "lif": LIF()}
NOT_REPRESENTED = {
    "soft reset": (lambda: nn.Sequential(LIF(v_reset=None)), r"0 \(LIF\): has a soft reset.*allow_soft_reset=True"),
    "floor": (lambda: nn.Sequential(LIF(v_min=-1.0)), r"0 \(LIF\): has a v_min.*allow_soft_reset=True"),
    "delay": (lambda: LeakyIntegrator(delay=True, v_rest=0.1), r"LeakyIntegrator.: .* v_rest or stateful with delay"),
    "a start that is not 0": (lambda: LeakyIntegrator(decay=1.0, v_rest=0.5), "v_rest without leak"),
    "batch norm": (
        lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(3))),
        r"0\.0 \(BatchNorm1d\): must get 1 dimensions after time and batch in one, as in .*OverTime, got 1 after 2",
    ),
    "statistics of the batch": (
        lambda: OverTime(nn.BatchNorm1d(4, track_running_stats=False)), r"layer \(BatchNorm1d\): .* running statistics",
    ),
    "shapes that are not known": (lambda: nn.Sequential(nn.LazyLinear(3)), r"0 \(LazyLinear\): can't be represented"),
    "another layer": (lambda: nn.Sequential(nn.ReLU()), r"0 \(ReLU\): can't be represented in NIR; what can be: .*LIF"),
    "adaptation": (lambda: asgl_cuda.AdaptiveLIF(), r"0 \(AdaptiveLIF\): can't be represented in NIR"),
    "a volume": (lambda: OverTime(nn.BatchNorm3d(2)), r"BatchNorm3d\): .*"),
    "mean": (lambda: Stack(lambda m, x: m.lif(x).mean(0), **LINEAR), "mean in the model itself: can't be represented"),
    "a constant added": (lambda: Stack(lambda m, x: m.linear(x) + 1, **LINEAR), "add in the model itself"),
    "twice the same": (lambda: Stack(lambda m, x: m.linear(x) + x + x, **LINEAR), "add in the model itself"),
    "two arguments": (
        lambda: Stack(lambda m, x: m.lif(x, m.linear(x)), **LINEAR), r"lif \(LIF\): must be called with the output of a"
    ),
    "unflatten": (lambda: Stack(lambda m, x: m.lif(x.unflatten(2, (2, 2))), **LINEAR), "unflatten in the model"),
    "batch first": (
        lambda: Stack(lambda m, x: m.linear(x.flatten(0, 1)).unflatten(0, (3, 2)), **LINEAR), "unflatten in the model",
    ),
    "batch as channels": (
        lambda: nn.Sequential(nn.Conv1d(3, 3, 1)),
        r"0 \(Conv1d\): must get 2 dimensions after time and batch in one, as in .*OverTime, got 1 after 2",
    ),
    "no way for fx": (lambda: Stack(lambda m, x: m.lif(x) if x.sum() > 0 else x, **LINEAR), "Stack can't be traced"),
    "two outputs": (lambda: Stack(lambda m, x: (m.lif(x), x), **LINEAR), r"must return one tensor \[T, B, ...\]"),
    "neurons without time": (
        lambda: Stack(lambda m, x: m.lif(x.flatten(0, 1)).unflatten(0, x.shape[:2]), lif=LIF()),
        r"lif \(LIF\): must take time and batch apart",
    ),
    "batch flattened": (lambda: nn.Sequential(nn.Flatten()), r"0 \(Flatten\): must leave time and batch alone.*got 1"),
    "time last": (lambda: nn.Sequential(LIF(time_dim=-1)), r"0 \(LIF\): time must be in front.*got time_dim -1"),
    "time elsewhere": (lambda: nn.Sequential(LIF(), LIF(time_dim=1)), r"1 \(LIF\): time must be .* before have it"),
    "input gain": (lambda: nn.Sequential(LIF(input_gain=-1)), r"0 \(LIF\): input_gain must be > 0, got -1\.0"),
    "decay": (lambda: nn.Sequential(decaying(LIF(), 1.5)), r"0 \(LIF\): decay must be in \[0, 1\], got 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_REPRESENTED)
def test_errors_name_the_unsupported_layer(name):
    make, message = NOT_REPRESENTED[name]
    x_seq = torch.rand(2, 2, 2, 3, 4, 5) if name == "a volume" else torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match=f"asgl_cuda.to_nir: .*{message}") as error:
        to_nir(make(), x_seq)
    assert "\n" not in str(error.value)  # fx's account of the traced graph


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode must be zeros, got circular"),
        (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "count_include_pad"),
        (nn.Linear(6, 3), r"neurons in one dimension, got shape \[2, 5, 6\]"),
    ],
)
def test_unsupported_options_of_layers(layer, message):
    with pytest.raises(ValueError, match=rf"asgl_cuda.to_nir: layer \({type(layer).__name__}\).*{message}"):
        to_nir(OverTime(layer), torch.rand(2, 3, 2, 5, 6))


@pytest.mark.parametrize(("missing", "call"), [("nir", from_nir), ("nirtorch", to_nir)])
def test_without_nir_the_error_says_what_to_install(missing, call, monkeypatch):
    for name in (missing, "nirtorch.torch_tracer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf'{call.__name__}: needs {missing}: pip install "nir>=1.0.7" "nirtorch>=2.6"'
    ):
        call(LIF(), torch.rand(2, 3, 4)) if call is to_nir else call(None)


def neurons_of_libraries():
    """By name: neurons of other libraries, and the error where NIR has no such node."""
    jelly = pytest.importorskip("spikingjelly.activation_based.neuron")
    layers, activation = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.activation")
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(), p=0.0)
    tau = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0])
    single = {"spike_fn": activation.SingleSpike, "spike_threshold": torch.tensor(0.3)}
    amount = {"reset_fn": activation.MembraneSubtract(0.4)}
    return {
        "LIFNode": (jelly.LIFNode(tau=1.7, step_mode="m"), None),
        "PLIFNode": (jelly.ParametricLIFNode(v_threshold=0.7, decay_input=False, step_mode="m"), None),
        "IFNode": (jelly.IFNode(step_mode="m"), None),
        "soft": (jelly.LIFNode(v_reset=None, step_mode="m"), None),
        "LIF of sinabs": (layers.LIF(tau, reset_fn=activation.MembraneReset(), **single), None),
        "IAF of sinabs": (layers.IAF(**single), None),
        "LIFLayer": (authors_code.LIFLayer(6, spike_fn=spike, thresh=0.8), None),
        "soft, not allowed": (jelly.LIFNode(v_reset=None, step_mode="m"), r"1 \(LIFNode\): has a soft reset"),
        "floor": (layers.IAF(min_v_mem=-1.0, **single), r"1 \(IAF\): has a least potential, which can't"),
        "several": (layers.IAF(), r"1 \(IAF\): has several spikes a step, which can't"),
        "current": (layers.IAF(tau_syn=3.0, **single), r"1 \(IAF\): has a current, or no spikes, which"),
        "ALIF": (layers.ALIF(2.0, 3.0, **amount), r"1 \(ALIF\): has adaptation and "),
        "ExpLeak": (layers.ExpLeak(2.0), r"1 \(ExpLeak\): has a current, or no spikes, which"),
        "amount of sinabs": (layers.IAF(**amount, **single), None),
        "a step a call": (jelly.LIFNode(), r"1 \(LIFNode\): must take .* got one step a call"),
        "squeezed": (
            layers.IAFSqueeze(batch_size=3, **single),
            r"1 \(IAFSqueeze\): must take time and batch apart",
        ),
    }


CONVERTED = (
    "LIFNode", "PLIFNode", "IFNode", "soft", "LIF of sinabs", "IAF of sinabs", "LIFLayer", "soft, not allowed", "floor",
    "several", "current", "ALIF", "ExpLeak", "amount of sinabs", "a step a call", "squeezed",
)  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_layers(name):
    """NIR has neither strict thresholds nor surrogates, so spikes are compared away from the threshold."""
    made, error = neurons_of_libraries()[name]
    torch.manual_seed(0)
    model = asgl_cuda.convert(nn.Sequential(nn.Linear(4, 5), made))[0].eval()
    x_seq = 3 * torch.randn(6, 6, 4)
    if error is not None:
        with pytest.raises(ValueError, match=rf"asgl_cuda\.to_nir: {error}"):
            to_nir(model, x_seq, allow_soft_reset=name != "soft, not allowed")
        return
    graph = to_nir(model, x_seq, allow_soft_reset=True)
    s_seq = from_nir(graph)(x_seq.transpose(0, 1) if "sinabs" in name else x_seq)
    expected = model(x_seq)
    assert 0.02 < (expected > 0).float().mean() < 0.98
    torch.testing.assert_close(s_seq.transpose(0, 1) if "sinabs" in name else s_seq, expected)


X = torch.ones(2, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: to_nir(None, X), TypeError, r"to_nir: model must be a torch\.nn\.Module, got NoneType"),
        (lambda: to_nir(LIF(), [1.0]), TypeError, "to_nir: example_input must be a tensor, got list"),
        (lambda: to_nir(LIF(), X[0]), ValueError, r"to_nir: example_input .* batch and neurons.*got shape \[2, 2\]"),
        (lambda: to_nir(LIF(), X, "1"), TypeError, "to_nir: dt must be a float, got str"),
        (lambda: to_nir(LIF(), X, dt=0), ValueError, "to_nir: dt must be > 0, got 0.0"),
        (lambda: from_nir(graph_of(nir_lif()), dt=-1), ValueError, "from_nir: dt must be > 0, got -1.0"),
        (lambda: to_nir(LIF(), X, allow_soft_reset=1), TypeError, "to_nir: allow_soft_reset must be a bool, got int"),
        (lambda: from_nir("model.nir"), TypeError, r"from_nir: graph must be a nir\.NIRGraph, .*, got str"),
    ],
)
def test_arguments(call, error, message):
    with pytest.raises(error, match=rf"asgl_cuda\.{message}"):
        call()
