"""What `fuse` and `unfuse` do with a model: the numbers, the pairs that they find, what they leave, and why."""

import copy
import gc
import pickle
import weakref

import pytest

pytest.importorskip("norse")
pytest.importorskip("sinabs")
pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")

import authors_code
import norse.torch as norse
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda.interop.converted import Converted
from asgl_cuda.interop.normalised import Normalised, PassedThrough
from asgl_cuda.interop.snntorch import MultiStep
from asgl_cuda.over_time import OverTime

BACKENDS = [name for name in ("reference", "cpu") if name in asgl_cuda.available_backends()]

T, B, C = 5, 4, 3


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def in_double():
    """In float64 no spike hangs on how a sum is rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def on(model, backend):
    """All layers of neurons on one backend."""
    for module in model.modules():
        if isinstance(module, asgl_cuda.LIF):
            module.backend = backend
        elif isinstance(module, Converted):
            module.settings = module.settings._replace(backend=backend)
    return model


def scattered(model):
    """With normalisations that do something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.3), ("running_var", 0.5)):
                    if getattr(module, name) is not None:
                        getattr(module, name).uniform_(low, low + 1.5)
    return model


def reset(model):
    for module in model.modules():
        if isinstance(module, neuron.BaseNode):
            module.reset()
        elif isinstance(module, sinabs.layers.StatefulLayer):
            module.reset_states()
        elif isinstance(module, snntorch.Leaky) and module.init_hidden:
            module.reset_mem()


def history(model, x_seq, call=None):
    """What two calls in training and one in evaluation give: outputs, gradients, buffers."""
    found = {}
    for number, training in enumerate((True, True, False)):
        torch.manual_seed(number)
        model.train(training)
        model.zero_grad()
        x = x_seq.clone().requires_grad_()
        out = model(x) if call is None else call(model, x)
        if out.requires_grad:  # not in evaluation of the authors' code
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(number))).sum().backward()
        found |= {f"output {number}": out.detach(), f"x.grad {number}": x.grad}
        found |= {f"{name}.grad {number}": value.grad for name, value in model.named_parameters()}
        found |= {f"{name} {number}": value.clone() for name, value in model.named_buffers() if "mem" not in name}
        if call is not None:
            reset(model)
    return found


def assert_alike(model, x_seq, pairs, backend, call=None):
    """The fused model gives what the model gives that is only converted, and so does the one that unfuse gives back.

    What the model itself gives differs by what `convert` changes: how exactly it finds the width of a surrogate.
    """
    scattered(model)
    classes = [type(module) for module in model.modules()]
    fused, report = asgl_cuda.fuse(model)
    assert (len(report.replaced), report.left) == (pairs, []), report
    assert len([module for module in fused.modules() if isinstance(module, Normalised)]) == pairs
    on(fused, backend)
    expected = history(on(asgl_cuda.convert(model)[0], backend), x_seq, call)
    assert 0.02 < expected["output 1"].count_nonzero() / expected["output 1"].numel() < 0.98
    torch.testing.assert_close(history(fused, x_seq, call), expected, rtol=1e-9, atol=1e-11)
    original = {name: value for name, value in history(copy.deepcopy(model), x_seq, call).items() if value is not None}
    found = {name: expected[name] for name in original}
    torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert list(fused.state_dict()) == list(model.state_dict())
    back, report = asgl_cuda.unfuse(asgl_cuda.fuse(model)[0])
    assert (len(report.replaced), report.left) == (pairs, [])
    assert [type(module) for module in back.modules()] == classes
    back = on(asgl_cuda.convert(back)[0], backend)
    torch.testing.assert_close(history(back, x_seq, call), expected, rtol=1e-9, atol=1e-11)


class Block(nn.Module):
    """Convolutions and a shortcut, as in a residual network; its second normalisation is added to the input."""

    def __init__(self, channels=C, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.lif1 = asgl_cuda.LIF(**options)
        self.conv2 = OverTime(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)))
        self.lif2 = asgl_cuda.LIF(**options)

    def forward(self, x_seq):
        y = self.bn1(self.conv1(x_seq.flatten(0, 1)))
        s_seq = self.lif1(y.unflatten(0, x_seq.shape[:2]))
        return self.lif2(self.conv2(s_seq) + x_seq)


OURS = {
    "over time": (lambda: [OverTime(nn.Sequential(nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4))), asgl_cuda.LIF()], (C, 6, 6)),
    "nested": (
        lambda: [
            nn.Sequential(OverTime(nn.Conv2d(C, 4, 3)), nn.Sequential(OverTime(nn.BatchNorm2d(4)))),
            nn.Sequential(nn.Sequential(asgl_cuda.LIF(4, granularity="channel", learn_decay=True)), nn.Flatten(3)),
        ],
        (C, 6, 6),
    ),
    "by unflatten": (
        lambda: [nn.Flatten(0, 1), nn.BatchNorm1d(C), nn.Unflatten(0, (T, B)), asgl_cuda.LIF(detach_reset=True)],
        (C,),
    ),
    "3d": (lambda: [OverTime(nn.BatchNorm3d(C)), asgl_cuda.LIF(v_reset=None)], (C, 2, 3, 4)),
    "1d with a length": (lambda: [OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(scale_output=True)], (C, 6)),
    "batch first": (lambda: [OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(time_dim=1)], (C, 6)),
    "sync": (lambda: [OverTime(nn.SyncBatchNorm(C)), asgl_cuda.LIF()], (C, 2, 2)),
    "no affine": (lambda: [OverTime(nn.BatchNorm1d(C, affine=False)), asgl_cuda.LIF()], (C, 6)),
    "no statistics": (lambda: [OverTime(nn.BatchNorm1d(C, track_running_stats=False)), asgl_cuda.LIF()], (C, 6)),
    "average of all": (lambda: [OverTime(nn.BatchNorm1d(C, eps=0.1, momentum=None)), asgl_cuda.LIF()], (C, 6)),
    "stateful": (lambda: [OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(stateful=True, detach_reset=True)], (C, 6)),
    "gain and rest": (
        lambda: [
            OverTime(nn.BatchNorm1d(C)),
            asgl_cuda.LIF(input_gain=0.7, v_rest=0.2, v_reset=None, reset_amount=0.5, strict_threshold=True),
        ],
        (C, 6),
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_layers_of_asgl_cuda(name, backend):
    make, shape = OURS[name]

    def call(model, x_seq):
        out = model(x_seq)
        for module in model.modules():
            if isinstance(module, asgl_cuda.LIF):
                module.detach_()
        return out

    assert_alike(nn.Sequential(*make()), torch.randn(T, B, *shape), 1, backend, call)


@pytest.mark.parametrize("time_dim", [2, -1])
def test_time_last(time_dim, backend):
    """`[B, C, T]`: what torch.nn takes for the length is the time."""
    model = nn.Sequential(nn.Conv1d(C, 4, 3), nn.BatchNorm1d(4), asgl_cuda.LIF(time_dim=time_dim))
    assert_alike(model, torch.randn(B, C, 9), 1, backend)


def test_a_forward_that_is_traced(backend):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = OverTime(nn.Conv2d(1, C, 3, padding=1))
            self.bn, self.lif = nn.BatchNorm2d(C), asgl_cuda.LIF()
            self.steps = nn.ModuleList([OverTime(nn.BatchNorm2d(C)), asgl_cuda.LIF()])

        def forward(self, x_seq, scale=None):
            if scale is not None:
                x_seq = x_seq * scale
            y_seq = self.first(x_seq)
            time, batch = y_seq.shape[:2]
            y = self.bn(y_seq.flatten(0, 1))
            y_seq = self.lif(torch.unflatten(y, dim=0, sizes=(y.size(0) // batch, y.shape[0] // time)))
            for module in self.steps:
                y_seq = module(y_seq)
            return y_seq

    assert_alike(Net(), torch.randn(T, B, 1, 4, 4), 2, backend)


def test_a_loop_over_time_that_is_traced(backend):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn, self.leaky = nn.Linear(6, C), nn.BatchNorm1d(C), snntorch.Leaky(beta=0.5)

        def forward(self, x_seq):
            mem, out = torch.zeros(B, C), []
            for step in range(T):
                spk, mem = self.leaky(self.bn(self.fc(x_seq[step])), mem)
                out += [spk, mem]
            return torch.stack(out)

    assert_alike(Loop(), torch.randn(T, B, 6), 1, backend)


def jelly(made, mode="m"):
    functional.set_step_mode(made, mode)
    return made


def over_steps(model, x_seq):
    return torch.stack([model(x) for x in x_seq])


SPIKINGJELLY = {
    "LIFNode": lambda: [layer.BatchNorm2d(C), neuron.LIFNode()],
    "ParametricLIFNode": lambda: [layer.BatchNorm2d(C), neuron.ParametricLIFNode(v_reset=None)],
    "ParametricLIFNode, x undecayed": lambda: [layer.BatchNorm2d(C), neuron.ParametricLIFNode(decay_input=False)],
    "ParametricLIFNode, no affine": lambda: [layer.BatchNorm2d(C, affine=False), neuron.ParametricLIFNode()],
    "IFNode": lambda: [layer.BatchNorm2d(C), neuron.IFNode(surrogate_function=surrogate.ATan())],
    "SeqToANNContainer": lambda: [
        layer.SeqToANNContainer(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
        neuron.LIFNode(v_reset=0.1),
    ],
    "tdBN": lambda: [layer.ThresholdDependentBatchNorm2d(0.7, 1.0, C), neuron.LIFNode(tau=1.5)],
    "OverTime": lambda: [OverTime(nn.BatchNorm2d(C)), neuron.LIFNode()],
}


@pytest.mark.parametrize("name", SPIKINGJELLY)
def test_spikingjelly(name, backend):
    model = nn.Sequential(*SPIKINGJELLY[name]())
    for module in model:
        if isinstance(module, neuron.BaseNode | layer.BatchNorm2d):
            module.step_mode = "m"
    assert_alike(model, 2 * torch.randn(T, B, C, 4, 4), 1, backend, lambda model, x: model(x))


@pytest.mark.parametrize("mode", ["s", "a container of single steps"])
def test_spikingjelly_a_step_a_call(mode, backend):
    parts = jelly(nn.Sequential(layer.Linear(6, C), layer.BatchNorm1d(C), neuron.LIFNode(tau=1.5)), "s")
    if mode == "s":
        assert_alike(parts, 3 * torch.randn(T, B, 6), 1, backend, over_steps)
    else:
        assert_alike(layer.MultiStepContainer(*parts), 3 * torch.randn(T, B, 6), 1, backend, lambda model, x: model(x))


def test_step_modes_set_after_fusing(backend):
    model = scattered(nn.Sequential(layer.BatchNorm1d(C, step_mode="m"), neuron.LIFNode(step_mode="m"))).eval()
    fused = on(asgl_cuda.fuse(model)[0], backend)
    x_seq = 3 * torch.randn(T, B, C)
    expected = model(x_seq)
    assert expected.any()
    torch.testing.assert_close(over_steps(jelly(fused, "s"), x_seq), expected)


def test_snntorch(backend):
    model = nn.Sequential(
        nn.Linear(6, C), nn.BatchNorm1d(C), snntorch.Leaky(beta=0.9, init_hidden=True, learn_beta=True)
    )
    assert_alike(model, 3 * torch.randn(T, B, 6), 1, backend, over_steps)


def test_multi_step(backend):
    """The layer of MultiStep is converted already, so it has its backend before."""
    model = nn.Sequential(OverTime(nn.BatchNorm1d(C)), MultiStep(snntorch.Leaky(beta=0.9, init_hidden=True)))
    assert_alike(on(model, backend), 2 * torch.randn(T, B, C), 1, backend, lambda model, x: model(x))
    plain = asgl_cuda.unfuse(asgl_cuda.fuse(model)[0])[0]
    assert type(plain[1].layer).__name__ == "ConvertedLeaky"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "tau", [torch.tensor(400.0), torch.tensor([300.0, 400.0, 500.0]), torch.tensor([[300.0], [400.0], [500.0]])]
)
def test_norse(tau, affine, backend):
    """The input current has a gain, and a bias where the potential leaks towards something; also one a channel."""
    p = norse.LIFBoxParameters(tau_mem_inv=tau, v_leak=torch.tensor(0.4), v_th=torch.tensor(0.8))
    model = norse.SequentialState(nn.BatchNorm1d(C, affine=affine), norse.LIFBoxCell(p))

    def call(model, x_seq):
        state, out = None, []
        for x in x_seq:
            spikes, state = model(x, state)
            out += [spikes, state[-1].v]
        return torch.stack(out)

    assert_alike(model, 2 * torch.randn(T, B, C, *[2] * (tau.dim() - 1)), 1, backend, call)


def test_norse_with_what_is_between():
    made = norse.SequentialState(nn.BatchNorm1d(C), norse.LIFBoxCell(), return_hidden=True)
    assert "the forward of SequentialState can't be traced" in reasons(made)["0"]
    made = norse.SequentialState(norse.LIFBoxCell(), nn.BatchNorm1d(C))
    model = nn.Sequential(made, asgl_cuda.LIF())
    assert reasons(model) == {"0.1": "its output goes through SequentialState"}


SINGLE = {"spike_fn": sinabs.activation.SingleSpike, "spike_threshold": torch.tensor(0.3, dtype=torch.float64)}


@pytest.mark.parametrize("name", ["LIFSqueeze", "IAFSqueeze", "LIF", "LIF by channel", "IAF"])
def test_sinabs(name, backend):
    if name.endswith("Squeeze"):
        made = getattr(sinabs.layers, name)(**({"tau_mem": 3.0} if "LIF" in name else {}), batch_size=B, **SINGLE)
        parts = [nn.BatchNorm2d(C), made]
    else:
        tau = torch.tensor([2.0, 3.0, 4.0])[:, None, None] if "channel" in name else 3.0
        made = sinabs.layers.IAF(**SINGLE) if name == "IAF" else sinabs.layers.LIF(tau, **SINGLE)
        parts = [nn.BatchNorm2d(C), sinabs.layers.UnflattenTime(B), made]
    assert_alike(nn.Sequential(*parts), 2 * torch.randn(B * T, C, 2, 2), 1, backend, lambda model, x: model(x))


def test_sinabs_repeat(backend):
    model = nn.Sequential(sinabs.layers.Repeat(nn.BatchNorm2d(C)), sinabs.layers.IAF(**SINGLE))
    assert_alike(model, torch.randn(B, T, C, 2, 2), 1, backend, lambda model, x: model(x))


def authors_layer(p=0.0):
    return authors_code.LIFLayer(T, False, spike_fn=authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(), p=p))


@pytest.mark.parametrize("apart", [False, True])
def test_the_authors_code(apart, backend):
    parts = [nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)]
    wrapped = [authors_code.tdLayer(part, T) for part in parts] if apart else [
        authors_code.tdLayer(nn.Sequential(*parts), T)
    ]  # fmt: skip
    model = nn.Sequential(*wrapped, authors_layer())
    model(torch.randn(T, B, C, 4, 4))  # the width becomes a parameter

    assert_alike(model, torch.randn(T, B, C, 4, 4), 1, backend)


def test_a_layer_named_like_the_authors_that_is_not():
    class tdLayer(nn.Module):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.layer = nn.BatchNorm2d(C)

        def forward(self, x):
            return torch.stack([self.layer(step) for step in x])

    _, report = asgl_cuda.fuse(nn.Sequential(tdLayer(), asgl_cuda.LIF()))
    assert "the forward of tdLayer can't be traced" in report.left[0].reason


def test_noise_and_float32(backend):
    """In float32 what differs is the last places of potentials, which may flip a spike: with noise everywhere, none."""
    model = nn.Sequential(OverTime(nn.Sequential(nn.Linear(6, C), nn.BatchNorm1d(C))), asgl_cuda.LIF(analog_prob=1.0))
    assert_alike(model, torch.randn(T, B, 6), 1, backend)
    model = scattered(model.float())
    x_seq = torch.randn(T, B, 6, dtype=torch.float32)
    fused = on(asgl_cuda.fuse(model)[0], backend)
    torch.testing.assert_close(history(fused, x_seq), history(model, x_seq), rtol=1e-5, atol=1e-5)


def test_the_neurons_mode_is_that_of_the_noise_and_the_normalisations_that_of_the_statistics(backend):
    model = scattered(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.5)))
    fused = on(asgl_cuda.fuse(model)[0], backend)
    x_seq = torch.randn(T, B, C)
    for frozen in (0, 1):
        for net in (model, fused):
            net.train()
            net[frozen].eval()
        torch.manual_seed(1)
        expected = model(x_seq)
        torch.manual_seed(1)
        torch.testing.assert_close(fused(x_seq), expected)
        assert expected.frac().any() == (frozen == 0)
        torch.testing.assert_close(fused[0].layer.running_var, model[0].layer.running_var)


# ---- which are left, and why ----


def reasons(model):
    _, report = asgl_cuda.fuse(model)
    return {row.path: row.reason for row in report.left}


def test_a_residual_block(backend):
    block = scattered(Block())
    fused, report = asgl_cuda.fuse(block)
    assert report.replaced == [("lif1", "LIF", "normalises as well, instead of bn1")]
    assert report.left == [("conv2.layer.1", "BatchNorm2d", "its output goes to add")]
    x_seq = torch.randn(T, B, C, 4, 4)
    torch.testing.assert_close(history(on(fused, backend), x_seq), history(on(block, backend), x_seq))
    assert str(report).splitlines() == [
        "1 replaced, 1 left",
        "lif1           LIF          normalises as well, instead of bn1",
        "conv2.layer.1  BatchNorm2d  left: its output goes to add",
    ]


class Traced(nn.Module):
    """Calls its parts as a function says."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def norm_and_lif(function, **parts):
    return Traced(function, bn=OverTime(nn.BatchNorm1d(C)), lif=asgl_cuda.LIF(), **parts)


def tapped(net, x):
    y = net.bn(x)
    return net.lif(y) + y


def sometimes_tapped(net, x):
    y = net.bn(x)
    return (net.lif(y), y) if net.training else net.lif(y)


LEFT = {
    "used twice": (tapped, "its output is used 2 times, by LIF and add"),
    "used twice in training": (sometimes_tapped, "its output is used 2 times, by LIF and the caller of Traced"),
    "returned": (lambda net, x: net.bn(net.lif(x)), "its output is that of the model"),
    "returned with another": (lambda net, x: (net.bn(x), net.lif(x)), "its output goes to the caller of Traced"),
    "something between": (lambda net, x: net.lif(net.bn(x).relu()), "its output goes to relu"),
    "a module between": (lambda net, x: net.lif(nn.functional.relu(net.bn(x))), "its output goes to relu"),
    "no call": (lambda net, x: net.lif(x), "its output is that of OverTime, which nothing calls"),
    "unused": (lambda net, x: (net.bn(x), net.lif(x))[1], "nothing uses it"),
    "another input": (
        lambda net, x: net.lif(net.bn(x)) + net.lif(x),
        "its output goes to LIF, which is called with something else, too",
    ),
    "twice in one call": (lambda net, x: (lambda y: net.lif(y, y))(net.bn(x)), "its output goes to LIF"),
    "parted by another shape": (
        lambda net, x: net.lif(net.bn(x).unflatten(0, x.shape[1:3])),
        "its output goes to unflatten",
    ),
    "by keyword": (lambda net, x: net.lif(x_seq=net.bn(x)), "its output goes to LIF"),
    "not traced": (
        lambda net, x: net.lif(net.bn(x)) if x.sum() > 0 else x,
        "the forward of Traced can't be traced: TraceError: symbolically traced variables cannot be used as inputs",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_by_what_is_traced(name):
    function, reason = LEFT[name]
    found = reasons(norm_and_lif(function))
    assert list(found) == ["bn.layer"]
    assert found["bn.layer"].startswith(reason)


def guarded(net, x):
    if x.ndim != 3:
        raise ValueError(f"expected [T, B, C], got {x.shape}")
    assert x.shape[-1] == C
    return net.lif(net.bn(x))


def by_shape(net, x):
    y = net.bn(x)
    return net.lif(y) if x.shape[0] > 1 else net.lif(y) + y


def by_many_shapes(net, x):
    while x.shape[0] > 1:
        x = x[1:]
    return net.lif(net.bn(x))


def failing(net, x):
    if x.dim() == 4:
        x = torch.stack([x[step] for step in range(x.shape[0])])
    return net.lif(net.bn(x))


def test_a_forward_that_looks_at_shapes(backend):
    """Every way that it may go is looked at, except those that end in an error of its own."""
    assert_alike(norm_and_lif(guarded), torch.randn(T, B, C), 1, backend)
    assert reasons(norm_and_lif(by_shape)) == {"bn.layer": "its output is used 2 times, by LIF and add"}
    assert "shapes lead it more than 32 ways" in reasons(norm_and_lif(by_many_shapes))["bn.layer"]
    assert "can't be traced: TypeError: 'Proxy' object cannot be" in reasons(norm_and_lif(failing))["bn.layer"]


def test_an_attention_of_spikingjelly(backend):
    attention = pytest.importorskip("spikingjelly.activation_based.layer.attention")
    model = attention.SpikingSelfAttention(8, 2)
    for module in model.modules():
        if isinstance(module, neuron.LIFNode):
            module.v_threshold = 0.2
    assert_alike(model, 3 * torch.randn(T, B, 8, 6), 2, backend, lambda model, x: model(x))


def test_left_by_an_argument_that_may_be_absent():
    """Both ways of the forward are looked at, with the argument and without."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.lif = OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF()

        def forward(self, x, shortcut=None):
            y = self.bn(x)
            return self.lif(y) + (y if shortcut is None else shortcut)

    assert reasons(Net()) == {"bn.layer": "its output is used 2 times, by LIF and add"}


def test_left_by_a_forward_of_its_own():
    """torch.fx traces that of the class."""
    model = norm_and_lif(lambda net, x: net.lif(net.bn(x)))
    model.forward = lambda x: model.bn(x)
    assert "the forward of Traced can't be traced: TypeError: it is not that of its class" in reasons(model)["bn.layer"]
    model = norm_and_lif(lambda net, x: net.lif(net.bn(x)))
    model.lif.forward = lambda x: x
    assert reasons(model) == {"bn.layer": "LIF has a forward that is not of its class"}


@pytest.mark.parametrize("parted", [nn.Unflatten(1, (C, 1)), nn.Unflatten(0, (T, B, 1))])
def test_left_by_parting_what_is_not_time_and_batch(parted):
    model = nn.Sequential(nn.BatchNorm1d(C), parted, asgl_cuda.LIF())
    assert reasons(model) == {"0": "its output goes to Unflatten"}
    sizes = (parted.dim, parted.unflattened_size)
    model = Traced(lambda net, x: net.lif(net.bn(x).unflatten(*sizes)), bn=nn.BatchNorm1d(C), lif=asgl_cuda.LIF())
    assert reasons(model) == {"bn": "its output goes to unflatten"}


def test_left_by_the_neurons():
    class Louder(asgl_cuda.LIF):
        def forward(self, x_seq):
            return 2 * super().forward(x_seq)

    class Slower(asgl_cuda.LIF):
        def _lif(self, x_seq, time_dim, **options):
            return super()._lif(x_seq / 2, time_dim, **options)

    def before(*neurons):
        return nn.Sequential(OverTime(nn.BatchNorm2d(C)), *neurons)

    assert reasons(before(nn.ReLU())) == {"0.layer": "its output goes to ReLU"}
    assert reasons(before(Louder())) == {"0.layer": "its output goes to Louder, which computes something else than "
                                                    "asgl_cuda.LIF"}  # fmt: skip
    assert "Slower, which computes something else" in reasons(before(Slower()))["0.layer"]
    own = asgl_cuda.BatchNormLIF(C)
    assert "BatchNormLIF, which has a normalisation of its own" in reasons(before(own))["0.layer"]
    unknown = neuron.QIFNode(step_mode="m")
    assert reasons(before(unknown)) == {"0.layer": "its output goes to QIFNode: asgl_cuda has no such neuron"}
    many = sinabs.layers.LIF(2.0)
    assert "its output goes to LIF: it may spike several times a step" in reasons(before(many))["0.layer"]
    assert type(many) is sinabs.layers.LIF


def test_left_by_the_channels():
    """And a layer that would have been converted for it stays what it is."""
    cases = {
        nn.Sequential(nn.BatchNorm2d(C), asgl_cuda.LIF()): ("1", "2"),
        nn.Sequential(nn.BatchNorm1d(C), asgl_cuda.LIF(time_dim=1)): ("1", "2"),
        nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(time_dim=-1)): ("2", "1"),
        nn.Sequential(layer.BatchNorm2d(C, step_mode="m"), neuron.LIFNode(step_mode="s")): ("2", "1"),
        nn.Sequential(layer.BatchNorm2d(C, step_mode="s"), neuron.LIFNode(step_mode="m")): ("1", "2"),
        nn.Sequential(OverTime(nn.BatchNorm2d(C)), snntorch.Leaky(beta=0.5, init_hidden=True)): ("2", "1"),
        nn.Sequential(OverTime(OverTime(nn.BatchNorm2d(C))), asgl_cuda.LIF()): ("3", "2"),
    }
    for model, (own, theirs) in cases.items():
        (reason,) = reasons(model).values()
        assert reason.startswith(f"its channels are dimension {own} of what goes to "), reason
        assert reason.endswith(f"whose channels are {theirs}"), reason
        fused, _ = asgl_cuda.fuse(model)
        assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]


def test_left_by_an_input_gain_of_each_neuron():
    p = norse.LIFBoxParameters(tau_mem_inv=torch.full((C, 2, 2), 400.0))
    model = norse.SequentialState(nn.BatchNorm2d(C), norse.LIFBoxCell(p))
    assert reasons(model) == {"0": "its output goes to LIFBoxCell, whose input gain or bias has shape [3, 2, 2]"}


def test_an_input_gain_that_is_no_channels_is_an_error_of_the_call():
    """One of a length [2] is by channel for an input [B, C] and by position for [B, C, L]."""
    p = norse.LIFBoxParameters(tau_mem_inv=torch.full((C,), 400.0))
    fused, report = asgl_cuda.fuse(norse.SequentialState(nn.BatchNorm1d(C), norse.LIFBoxCell(p)))
    assert not report.left
    with pytest.raises(ValueError, match=r"LIFBoxCell has an input gain or bias of shape \[3\], .* for \[1, 4, 3, 3\]"):
        on(fused, "reference")(torch.randn(B, C, C))


def test_left_by_the_normalisation():
    class Doubled(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    def behind(norm):
        return nn.Sequential(OverTime(norm), asgl_cuda.LIF())

    assert reasons(behind(Doubled(C))) == {"0.layer": "Doubled computes something else than torch.nn's"}
    _, report = asgl_cuda.fuse(behind(nn.LazyBatchNorm1d()), inplace=True)  # torch can't copy it
    assert "before it was called" in report.left[0].reason
    jelly = nn.Sequential(layer.TemporalEffectiveBatchNorm1d(T, C), asgl_cuda.LIF())
    assert "TemporalEffectiveBatchNorm1d computes something else" in reasons(jelly)["0"]
    listed = Traced(lambda net, x: net.lif(x), parts=nn.ModuleList([nn.BatchNorm1d(C)]), lif=asgl_cuda.LIF())
    assert reasons(listed) == {"parts.0": "Traced does not call it"}
    through = Traced(lambda net, x: x, lif=asgl_cuda.LIF())
    model = nn.Sequential(OverTime(nn.BatchNorm1d(C)), through, asgl_cuda.LIF())
    assert reasons(model) == {"0.layer": "its output goes to Traced"}
    replaced = nn.BatchNorm1d(C)
    replaced.forward = lambda x: x
    assert reasons(behind(replaced)) == {"0.layer": "it has a forward that is not of its class"}
    shared = nn.BatchNorm1d(C)
    model = nn.Sequential(OverTime(shared), asgl_cuda.LIF(), OverTime(shared), asgl_cuda.LIF())
    assert reasons(model) == {"0.layer": "it is in the model 2 times"}
    assert reasons(nn.BatchNorm1d(C)) == {"": "it is the model itself"}


def test_left_by_hooks():
    def pair():
        return nn.Sequential(OverTime(nn.BatchNorm1d(C)), nn.Sequential(asgl_cuda.LIF()))

    def nothing(*_):
        return None

    for path in ("0.layer", "0"):
        for kind in ("forward_hook", "full_backward_hook", "full_backward_pre_hook"):
            model = pair()
            getattr(model.get_submodule(path), f"register_{kind}")(nothing)
            assert "has hooks, which would see" in reasons(model)["0.layer"], (path, kind)
    for path in ("1", "1.0"):
        model = pair()
        model.get_submodule(path).register_forward_pre_hook(nothing)
        assert "has hooks, which would see" in reasons(model)["0.layer"]
    model = pair()
    model[0].layer.register_forward_pre_hook(nothing)
    model[1][0].register_forward_hook(nothing)
    assert reasons(model) == {}


def test_left_by_shared_neurons():
    lif = asgl_cuda.LIF()
    model = nn.Sequential(OverTime(nn.BatchNorm1d(C)), lif, OverTime(nn.BatchNorm1d(C)), lif)
    assert set(reasons(model).values()) == {"its output goes to LIF, which is called with something else, too"}
    model = norm_and_lif(lambda net, x: net.lif(net.bn(x)))
    model.again = model.lif
    assert reasons(model) == {"bn.layer": "LIF is in the model 2 times"}


def test_a_head_that_is_called_by_another_as_well():
    """The neurons have one call, in a Sequential that has two."""
    head = nn.Sequential(asgl_cuda.LIF(), nn.Linear(C, C))
    model = norm_and_lif(lambda net, x: net.head(net.bn(x)) + net.head(x), head=head)
    assert reasons(model) == {"bn.layer": "its output goes to Sequential, which is called with something else, too"}
    model = norm_and_lif(lambda net, x: net.head(net.bn(x)), head=head)
    assert reasons(model) == {}


def test_neurons_that_are_in_what_can_not_be_traced():
    """It may call them with something else."""
    inner = Traced(lambda net, x: net.lif(x) if x.sum() > 0 else x, lif=asgl_cuda.LIF())
    model = Traced(lambda net, x: net.inner.lif(net.bn(x)), bn=OverTime(nn.BatchNorm1d(C)), inner=inner)
    (reason,) = reasons(model).values()
    assert reason.startswith("the forward of Traced can't be traced: TraceError")


def test_a_block_that_is_called_twice(backend):
    """A pair inside of it stays a pair."""
    model = Traced(
        lambda net, x: net.part(net.part(x)), part=nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF())
    )
    assert_alike(model, torch.randn(T, B, C), 1, backend)


def test_a_sequential_whose_parts_others_call():
    """As a list of layers, or by a slice: what a trace shows counts, not the order."""

    def features():
        return nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(), OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF())

    def loop(net, x):
        for part in net.features:
            x = part(x)
        return x

    def tapped_loop(net, x):
        taps = []
        for part in net.features:
            x = part(x)
            taps.append(x)
        return x + taps[2]

    def sliced(net, x):
        y = net.features[:3](x)
        return net.features[3](y) + y

    assert reasons(Traced(loop, features=features())) == {}
    model = Traced(lambda net, x: net.lif(loop(net, x)), features=features()[:3], lif=asgl_cuda.LIF())
    assert reasons(model) == {}
    assert list(reasons(Traced(tapped_loop, features=features()))) == ["features.2.layer"]
    assert list(reasons(Traced(sliced, features=features()))) == ["features.2.layer"]


def test_a_sequential_in_what_can_not_be_traced():
    """Its order is known, whoever calls it; what follows it is not."""
    inner = nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(), OverTime(nn.BatchNorm1d(C)))
    model = Traced(lambda net, x: net.lif(net.inner(x)) if x.sum() > 0 else x, inner=inner, lif=asgl_cuda.LIF())
    _, report = asgl_cuda.fuse(model)
    assert [row.path for row in report.replaced] == ["inner.1"]
    assert [row.path for row in report.left] == ["inner.2.layer"]
    assert "the forward of Traced can't be traced" in report.left[0].reason


def test_a_trace_leaves_no_trace():
    """The forward is run with what stands for tensors; nothing of it stays."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.leaky = nn.BatchNorm1d(C), snntorch.Leaky(beta=0.5, init_hidden=True)
            self.register_buffer("calls", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.last = self.leaky(self.bn(x))
            self.seen.append(self.last)
            self.leaky.reset_mem()
            return self.last

    model = Counting()
    model.leaky.mem = torch.ones(2)
    fused, report = asgl_cuda.fuse(model, inplace=True)
    assert len(report.replaced) == 1
    assert (fused.calls.item(), fused.seen, hasattr(fused, "last")) == (0, [], False)
    assert fused.leaky.mem.tolist() == [1, 1]
    assert fused.training


def test_a_trace_copies_no_parameters(monkeypatch):
    model = norm_and_lif(lambda net, x: net.lif(net.bn(x)))
    copies = []
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda parameter, memo: copies.append(parameter) or parameter)
    assert len(asgl_cuda.fuse(model, inplace=True)[1].replaced) == 1
    assert not copies


# ---- the model stays what it was ----


def net(backend="reference"):
    """One pair of ours, one of SpikingJelly's."""
    made = nn.Sequential(
        OverTime(nn.Sequential(nn.Linear(6, C), nn.BatchNorm1d(C))),
        asgl_cuda.LIF(C, granularity="channel", analog_prob=0.0, backend=backend),
        layer.BatchNorm1d(C, step_mode="m"),
        neuron.ParametricLIFNode(step_mode="m"),
    )
    asgl_cuda.convert(made, inplace=True, backend=backend)
    return scattered(made)


def test_a_copy_is_fused_unless_inplace_is_said():
    model = net()
    classes = [type(module) for module in model.modules()]
    fused, _ = asgl_cuda.fuse(model)
    assert [type(module) for module in model.modules()] == classes
    same, _ = asgl_cuda.fuse(model, inplace=True)
    assert same is model
    for made in (fused, same):
        assert isinstance(made[0].layer[1], PassedThrough)
        assert isinstance(made[1], Normalised)
        assert type(made[1]).__name__ == "NormalisedLIF"
        assert type(made[2]).__name__ == "PassedBatchNorm1d"
        assert isinstance(made[2], layer.BatchNorm1d)
        assert isinstance(made[3], neuron.ParametricLIFNode)
    kept, _ = asgl_cuda.unfuse(same)
    assert isinstance(same[1], Normalised)
    assert not isinstance(kept[1], Normalised)
    assert asgl_cuda.unfuse(same, inplace=True)[0] is model
    assert [type(module) for module in model.modules()] == classes


def test_fuse_converts_and_unfuse_gives_back_what_was_there():
    model = nn.Sequential(layer.BatchNorm1d(C, step_mode="m"), neuron.LIFNode(step_mode="m"))
    before = set(vars(model[1]))
    fused, report = asgl_cuda.fuse(model)
    assert report.replaced == [("1", "LIFNode", "normalises as well, instead of 0")]
    assert type(fused[1]).__name__ == "NormalisedConvertedLIFNode"
    back, report = asgl_cuda.unfuse(fused)
    assert report.replaced == [("1", "NormalisedConvertedLIFNode", "LIFNode")]
    assert type(back[1]) is neuron.LIFNode
    assert set(vars(back[1])) == before
    converted, _ = asgl_cuda.convert(model)
    back, _ = asgl_cuda.unfuse(asgl_cuda.fuse(converted)[0])
    assert type(back[1]).__name__ == "ConvertedLIFNode"


def test_names_parameters_and_checkpoints(backend):
    model = net(backend)
    fused, _ = asgl_cuda.fuse(model)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    other = net(backend)
    with torch.no_grad():
        other[0].layer[1].weight.fill_(0.1)
        other[2].running_mean.fill_(0.2)
    for made in (model, fused):
        assert made.load_state_dict(other.state_dict()) == ([], [])
    x_seq = torch.randn(T, B, 6)
    torch.testing.assert_close(fused.eval()(x_seq), model.eval()(x_seq))
    model.train()(x_seq)
    functional.reset_net(model)
    fused.load_state_dict(model.state_dict())
    model.load_state_dict(fused.state_dict())
    assert fused[2].num_batches_tracked == model[2].num_batches_tracked == 1


def test_an_optimizer_goes_on(backend):
    """That of the model trains the model that was fused in place."""
    model = net(backend)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(made.parameters(), lr=0.5, momentum=0.9) for made in (model, twin)]
    for step in range(4):
        if step == 1:
            asgl_cuda.fuse(model, inplace=True)
        if step == 3:
            asgl_cuda.unfuse(model, inplace=True)
        x_seq, grad = torch.randn(T, B, 6), torch.randn(T, B, C)
        for made, optimizer in zip((model, twin), optimizers, strict=True):
            functional.reset_net(made)
            optimizer.zero_grad()
            (made(x_seq) * grad).sum().backward()
            optimizer.step()
    assert not torch.equal(model[0].layer[1].weight, net()[0].layer[1].weight)
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "fuse again", "of a model that has run"])
def test_copies(how, backend, tmp_path):
    model = net(backend)
    x_seq = torch.randn(T, B, 6)
    if how == "of a model that has run":
        model(x_seq)
        functional.reset_net(model)
    fused, _ = asgl_cuda.fuse(model)
    if how == "of a model that has run":
        twin = copy.deepcopy(fused)
    else:
        fused(x_seq)  # potentials are inside a graph now
        functional.reset_net(fused)
    if how == "pickle":
        torch.save(fused, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(pickle.loads(pickle.dumps(fused))) is nn.Sequential
    elif how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "fuse again":
        twin, report = asgl_cuda.fuse(fused)
        assert report == ([], [])
    for made in (fused, twin):
        assert [type(module) for module in made.modules()] == [type(module) for module in fused.modules()]
        assert made[1].normalisation.norm is made[0].layer[1]
        assert made[3].normalisation.norm is made[2]
    assert twin[2] is not fused[2]
    found, expected = (history(made, x_seq, lambda model, x: model(x)) for made in (twin, fused))
    torch.testing.assert_close(found, expected)
    back, report = asgl_cuda.unfuse(twin)
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert len(report.replaced) == 2


def test_types_and_devices(backend):
    fused = asgl_cuda.fuse(net(backend))[0].half()
    assert fused[1].normalisation.norm.weight.dtype == torch.float16
    out = fused(torch.randn(T, B, 6, dtype=torch.float16))
    assert out.dtype == torch.float16
    assert out.isfinite().all()
    assert {value.device.type for value in fused.to("meta").state_dict().values()} == {"meta"}
    assert fused[3].normalisation.norm.running_mean.device.type == "meta"


def test_convert_and_revert_know_fused_layers():
    fused, _ = asgl_cuda.fuse(net())
    classes = [type(module) for module in fused.modules()]
    again, report = asgl_cuda.convert(fused)
    assert report == ([], [])
    assert [type(module) for module in again.modules()] == classes
    back, report = asgl_cuda.revert(fused)
    assert [type(module) for module in back.modules()] == classes
    assert report.left == [
        ("3", "ParametricLIFNode", "it is fused with a normalisation: asgl_cuda.unfuse comes first"),
    ]  # fmt: skip
    plain = asgl_cuda.revert(asgl_cuda.unfuse(fused)[0])[0]
    assert type(plain[3]) is neuron.ParametricLIFNode


def test_fusing_after_training_the_rest_of_the_kit(backend):
    """Monitor, schedule and parameter groups take it for the layer that it is; looking changes no statistics."""
    model = scattered(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.5, backend=backend)))
    fused, _ = asgl_cuda.fuse(model)
    x_seq = torch.randn(T, B, C)
    found = []
    for made in (model, fused):
        torch.manual_seed(0)
        with asgl_cuda.Monitor(made) as monitor:
            made(x_seq)
        found.append(monitor.result()["1"])
    assert found[1] == pytest.approx(found[0])
    assert found[0]["analog_share"] > 0
    assert fused[0].layer.num_batches_tracked == 1
    torch.testing.assert_close(fused[0].layer.running_mean, model[0].layer.running_mean)
    sizes = [[len(group["params"]) for group in asgl_cuda.parameter_groups(made, 0.1)] for made in (model, fused)]
    assert sizes[0] == sizes[1]


def test_unfusing_a_part():
    fused, _ = asgl_cuda.fuse(net())
    part, report = asgl_cuda.unfuse(fused[:1])
    assert report.left == [("0.layer.1", "PassedBatchNorm1d", "the neurons that compute it are not in this model")]
    assert isinstance(part[0].layer[1], PassedThrough)
    _, report = asgl_cuda.unfuse(fused[1:2], inplace=True)
    assert len(report.replaced) == 1
    assert type(fused[0].layer[1]) is nn.BatchNorm1d
    assert isinstance(fused[2], PassedThrough)


def folded(model):
    conv, norm = model[0].layer
    model[0].layer[0] = fuse_linear_bn_eval(conv, norm)
    model[0].layer[1] = nn.Identity()


def set_aside(model):
    model[0]._modules["layer"] = nn.Sequential(model[0].layer[0], nn.BatchNorm1d(C))


EXCHANGES = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "folded": folded,
    "with what holds it": set_aside,
    "the neurons": lambda model: model.__setitem__(1, nn.ReLU()),
}


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", EXCHANGES)
def test_one_of_a_pair_is_exchanged(name, copied):
    """The other would normalise a second time, or not at all; unfuse makes of it what the model has now."""
    parts = OverTime(nn.Sequential(nn.Linear(6, C), nn.BatchNorm1d(C))), asgl_cuda.LIF(analog_prob=0.0)
    model = scattered(nn.Sequential(*parts)).eval()
    x_seq = torch.randn(T, B, 6)
    fused, _ = asgl_cuda.fuse(model)
    fused = copied(fused) if copied else fused
    torch.testing.assert_close(fused(x_seq), model(x_seq))
    held = [*fused.modules()]  # whoever holds on to them
    for made in (model, fused):
        EXCHANGES[name](made)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"asgl_cuda\.fuse: .* not there any more.*: asgl_cuda\.unfuse takes"):
            fused(x_seq)
    again, report = asgl_cuda.unfuse(fused)
    assert (len(report.replaced), report.left) == (1, [])
    if "Batch" in name or "holds" in name:
        again, report = asgl_cuda.fuse(again)
        assert len(report.replaced) == 1
    torch.testing.assert_close(again(x_seq), model(x_seq))
    assert held


def test_a_pair_that_is_moved_wrapped_or_called_in_part():
    """Both are there yet, or nobody can say."""

    def pair():
        return asgl_cuda.fuse(scattered(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.0))))[0]

    torch.manual_seed(0)
    x_seq = torch.randn(T, B, C)
    torch.manual_seed(1)
    expected = pair()(x_seq)
    assert expected.any()

    def wrapped(model):
        model[0].layer = nn.Sequential(model[0].layer)
        model[1] = nn.Sequential(model[1])

    def called_again(model):
        model(x_seq)
        return checkpoint(model[1], x_seq.requires_grad_(), use_reentrant=False)

    changes = {
        "wrapped": wrapped, "moved": lambda model: model.insert(0, nn.Identity()),
        "a slice": lambda model: nn.Sequential(*model), "alone": lambda model: copy.deepcopy(model[1])(x_seq),
        "called again": called_again,
    }  # fmt: skip
    for name, change in changes.items():
        torch.manual_seed(1)
        model = pair()
        changed = change(model)
        out = changed if isinstance(changed, torch.Tensor) else (changed or model)(x_seq)
        torch.testing.assert_close(out, expected, msg=name)
        if out.requires_grad:
            out.sum().backward()


def test_an_exchange_in_a_compiled_model():
    torch._dynamo.reset()
    model = asgl_cuda.fuse(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.0)))[0].eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x_seq = torch.randn(T, B, C)
    assert torch.equal(compiled(x_seq), model(x_seq))
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(Exception, match="would normalise a second time"):
        compiled(x_seq)
    torch._dynamo.reset()


def test_a_model_is_freed_without_the_collector():
    gc.disable()
    try:
        model = weakref.ref(asgl_cuda.fuse(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF()))[0])
        assert model() is None
    finally:
        gc.enable()


def test_what_it_shows():
    shown = repr(asgl_cuda.fuse(net())[0])
    assert "NormalisedLIF([3], width=1 (learned)" in shown
    assert "normalised by BatchNorm1d" in shown
    assert "PassedBatchNorm1d(3, eps=1e-05" in shown
    alone = asgl_cuda.fuse(nn.Sequential(nn.BatchNorm1d(C), norse.LIFBoxCell()))[0]
    assert "normalised by BatchNorm1d" in repr(alone)


def test_errors_of_a_call():
    fused, _ = asgl_cuda.fuse(net())
    with pytest.raises(ValueError, match=r"asgl_cuda\.batch_norm_lif: running_mean must have shape \[4\]"):
        asgl_cuda.fuse(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF()))[0].eval()(torch.randn(T, B, 4))
    with pytest.raises(ValueError, match="needs more than one value a channel"):
        fused[1:2](torch.randn(1, 1, C))


@pytest.mark.parametrize("function", [asgl_cuda.fuse, asgl_cuda.unfuse])
def test_what_is_no_module(function):
    with pytest.raises(
        TypeError, match=rf"asgl_cuda\.{function.__name__}: model must be a torch\.nn\.Module, got list"
    ):
        function([nn.BatchNorm1d(C)])
    with pytest.raises(TypeError, match="positional"):
        function(nn.Linear(2, 2), True)


def test_a_model_without_normalisations():
    assert asgl_cuda.fuse(nn.Sequential(nn.Linear(2, 2), asgl_cuda.LIF()))[1] == ([], [])
    assert asgl_cuda.unfuse(nn.Sequential(nn.Linear(2, 2), asgl_cuda.LIF()))[1] == ([], [])


def test_processes_that_share_their_statistics(monkeypatch):
    """Those of the layer, or all there are; a BatchNorm has its own. layer/test_distributed.py has two processes."""
    from asgl_cuda.interop import normalised

    asked = []
    monkeypatch.setattr(
        normalised,
        "module_batch_norm_lif",
        lambda norm, x_seq, **options: asked.append(options["process_group"]) or x_seq,
    )
    for norm in (nn.SyncBatchNorm(C), nn.SyncBatchNorm(C, process_group="some"), nn.BatchNorm1d(C)):
        asgl_cuda.fuse(nn.Sequential(OverTime(norm), asgl_cuda.LIF()), inplace=True)[0](torch.randn(T, B, C))
    assert asked == ["world", "some", None]


def test_nir_wants_them_apart():
    example = torch.randn(T, B, C)
    fused, _ = asgl_cuda.fuse(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF()))
    with pytest.raises(ValueError, match=r"1 \(NormalisedLIF\) can't .* it normalises: .* asgl_cuda\.unfuse"):
        asgl_cuda.to_nir(fused, example)
    for model in (asgl_cuda.BatchNormLIF(C), nn.Sequential(asgl_cuda.BatchNormLIF(C))):
        with pytest.raises(ValueError, match=r"\(BatchNormLIF\) can't be .* it normalises: make it a"):
            asgl_cuda.to_nir(model, example)
