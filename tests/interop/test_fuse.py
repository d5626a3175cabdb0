"""Outputs, gradients and statistics of fused layers of each library."""

import authors_code
import norse.torch as norse
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from comparison import Stack
from conversions import SINGLE, B, C, T, assert_alike, assert_same_sums, authors_layer, history, on, reasons, scattered
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import asgl_cuda
from asgl_cuda.interop.snntorch import MultiStep
from asgl_cuda.over_time import OverTime

pytestmark = pytest.mark.usefixtures("in_double")


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
    """In `[B, C, T]` the dimension that torch.nn takes for the length is the time."""
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
    def forward(net, x_seq):
        mem, out = torch.zeros(B, C), []
        for step in range(T):
            spk, mem = net.leaky(net.bn(net.fc(x_seq[step])), mem)
            out += [spk, mem]
        return torch.stack(out)

    loop = Stack(forward, fc=nn.Linear(6, C), bn=nn.BatchNorm1d(C), leaky=snntorch.Leaky(beta=0.5))
    assert_alike(loop, torch.randn(T, B, 6), 1, backend)


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
    """MultiStep converts the layer, which thus has a backend before fusion."""
    model = nn.Sequential(OverTime(nn.BatchNorm1d(C)), MultiStep(snntorch.Leaky(beta=0.9, init_hidden=True)))
    assert_alike(on(model, backend), 2 * torch.randn(T, B, C), 1, backend, lambda model, x: model(x))
    plain = asgl_cuda.unfuse(asgl_cuda.fuse(model)[0])[0]
    assert type(plain[1].layer).__name__ == "ConvertedLeaky"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "tau", [torch.tensor(400.0), torch.tensor([300.0, 400.0, 500.0]), torch.tensor([[300.0], [400.0], [500.0]])]
)
def test_norse(tau, affine, backend):
    """The input current has a gain and, from v_leak, a bias; also one gain a channel."""
    p = norse.LIFBoxParameters(tau_mem_inv=tau, v_leak=torch.tensor(0.4), v_th=torch.tensor(0.8))
    model = norse.SequentialState(nn.BatchNorm1d(C, affine=affine), norse.LIFBoxCell(p))

    def call(model, x_seq):
        state, out = None, []
        for x in x_seq:
            spikes, state = model(x, state)
            out += [spikes, state[-1].v]
        return torch.stack(out)

    assert_alike(model, 2 * torch.randn(T, B, C, *[2] * (tau.dim() - 1)), 1, backend, call)


def test_norse_with_other_modules_between():
    made = norse.SequentialState(nn.BatchNorm1d(C), norse.LIFBoxCell(), return_hidden=True)
    assert "the forward of SequentialState can't be traced" in reasons(made)["0"]
    made = norse.SequentialState(norse.LIFBoxCell(), nn.BatchNorm1d(C))
    model = nn.Sequential(made, asgl_cuda.LIF())
    assert reasons(model) == {"0.1": "its output goes through SequentialState"}


THRESHOLD = {"spike_threshold": torch.tensor(0.3, dtype=torch.float64)}
SPIKES = {"SingleSpike": {**THRESHOLD, **SINGLE}, "MultiSpike": {**THRESHOLD, "min_v_mem": -0.5}}


@pytest.mark.parametrize("options", SPIKES.values(), ids=SPIKES)
@pytest.mark.parametrize("name", ["LIFSqueeze", "IAFSqueeze", "LIF", "LIF by channel", "IAF"])
def test_sinabs(name, options, backend):
    if name.endswith("Squeeze"):
        made = getattr(sinabs.layers, name)(**({"tau_mem": 3.0} if "LIF" in name else {}), batch_size=B, **options)
        parts = [nn.BatchNorm2d(C), made]
    else:
        tau = torch.tensor([2.0, 3.0, 4.0])[:, None, None] if "channel" in name else 3.0
        made = sinabs.layers.IAF(**options) if name == "IAF" else sinabs.layers.LIF(tau, **options)
        parts = [nn.BatchNorm2d(C), sinabs.layers.UnflattenTime(B), made]
    assert_alike(nn.Sequential(*parts), 2 * torch.randn(B * T, C, 2, 2), 1, backend, lambda model, x: model(x))


def test_sinabs_repeat(backend):
    model = nn.Sequential(sinabs.layers.Repeat(nn.BatchNorm2d(C)), sinabs.layers.IAF(**SPIKES["SingleSpike"]))
    assert_alike(model, torch.randn(B, T, C, 2, 2), 1, backend, lambda model, x: model(x))


@pytest.mark.parametrize("apart", [False, True])
def test_the_authors_code(apart, backend):
    parts = [nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)]
    wrapped = [authors_code.tdLayer(part, T) for part in parts] if apart else [
        authors_code.tdLayer(nn.Sequential(*parts), T)
    ]  # fmt: skip
    model = nn.Sequential(*wrapped, authors_layer(T, retain_v=False))
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
    """Float32 roundings may flip hard spikes: training has none with analog_prob 1, and in evaluation none flips."""
    model = nn.Sequential(OverTime(nn.Sequential(nn.Linear(6, C), nn.BatchNorm1d(C))), asgl_cuda.LIF(analog_prob=1.0))
    assert_alike(model, torch.randn(T, B, 6), 1, backend)
    model = scattered(model.float())
    x_seq = torch.randn(T, B, 6, dtype=torch.float32)
    fused = on(asgl_cuda.fuse(model)[0], backend)
    assert_same_sums(history(fused, x_seq), history(model, x_seq))


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


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training, momentum, backend):
    """Empty spikes, zero gradients and, in training, a counted batch, as in separate layers."""
    model = nn.Sequential(OverTime(nn.BatchNorm2d(C, momentum=momentum)), asgl_cuda.LIF())
    layer = nn.Sequential(asgl_cuda.BatchNormLIF(C, momentum=momentum))
    results = []
    for net in (model, asgl_cuda.fuse(model)[0], layer):
        x_seq = torch.zeros(T, 0, C, 4, 4, requires_grad=True)
        out = on(net, backend).train(training)(x_seq)
        out.sum().backward()
        of_norm = net[0] if net is layer else net[0].layer
        results.append(
            (out.shape, x_seq.grad.shape, *(value.tolist() for _, value in sorted(of_norm.named_buffers())),
             of_norm.weight.grad.tolist(), of_norm.bias.grad.tolist())
        )  # fmt: skip
        assert int(of_norm.num_batches_tracked) == training
    assert results[1] == results[0] == results[2]
