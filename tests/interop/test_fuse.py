"""Outputs, gradients and statistics of fused models: neurons of each library, views and sums in between."""

import copy
import operator
import pickle
import sys
from functools import partial

import authors_code
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from comparison import Stack
from conversions import SINGLE, B, C, T, assert_alike, authors_layer, history, on, scattered
from spikingjelly.activation_based import base, functional, layer, neuron
from spikingjelly.activation_based.model import spiking_resnet
from torch import nn

import asgl_cuda
from asgl_cuda.interop.fuse import Fused
from asgl_cuda.interop.snntorch import MultiStep
from asgl_cuda.neurons.over_time import OverTime

pytestmark = pytest.mark.usefixtures("in_double")

H = 4
SHAPE = (T, B, C, H, H)


# ---- neurons ----


def ours(norm, **options):
    return lambda: nn.Sequential(OverTime(norm), asgl_cuda.LIF(**options))


def jelly(norm, node):
    norm.step_mode = node.step_mode = "m"
    return nn.Sequential(norm, node)


def sinabs_with(made):
    return nn.Sequential(nn.BatchNorm2d(C), *([] if "Squeeze" in type(made).__name__ else [UNFLATTEN]), made)


UNFLATTEN = sinabs.layers.UnflattenTime(B)
ONE, SEVERAL = (
    {"spike_threshold": torch.tensor(0.3), **SINGLE},
    {"spike_threshold": torch.tensor(0.3), "min_v_mem": -0.5},
)
NEURONS = {
    "3d": (ours(nn.BatchNorm3d(C), v_reset=None), (T, B, C, 2, 3, 4)),
    "1d, values learned by channel": (
        ours(nn.BatchNorm1d(C), num_features=C, granularity="channel", learn_decay=True), (T, B, C, 6),
    ),
    "without a length": (ours(nn.BatchNorm1d(C), scale_output=True), (T, B, C)),
    "batch first": (ours(nn.BatchNorm1d(C), time_dim=1), (T, B, C, 6)),
    "time last": (lambda: nn.Sequential(nn.Conv1d(C, C, 3), nn.BatchNorm1d(C), asgl_cuda.LIF(time_dim=-1)), (B, C, 9)),
    "sync": (ours(nn.SyncBatchNorm(C)), SHAPE),
    "no affine": (ours(nn.BatchNorm2d(C, affine=False)), SHAPE),
    "no statistics": (ours(nn.BatchNorm2d(C, track_running_stats=False)), SHAPE),
    "average of all": (ours(nn.BatchNorm2d(C, eps=0.1, momentum=None)), SHAPE),
    "gain and rest": (
        ours(nn.BatchNorm2d(C), input_gain=0.7, v_rest=0.2, v_reset=None, reset_amount=0.5, strict_threshold=True),
        SHAPE,
    ),
    "all steps noisy": (ours(nn.BatchNorm2d(C), surrogate="rectangle", analog_prob=1.0), SHAPE),
    "LIFNode": (lambda: jelly(layer.BatchNorm2d(C), neuron.LIFNode(tau=1.5, v_reset=0.1)), SHAPE),
    "ParametricLIFNode, no affine": (
        lambda: jelly(layer.BatchNorm2d(C, affine=False), neuron.ParametricLIFNode()), SHAPE,
    ),
    "tdBN": (lambda: jelly(layer.ThresholdDependentBatchNorm2d(0.7, 1.0, C), neuron.LIFNode(tau=1.5)), SHAPE),
    "SeqToANNContainer": (
        lambda: jelly(layer.SeqToANNContainer(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)), neuron.LIFNode()), SHAPE,
    ),
    "MultiStep": (
        lambda: nn.Sequential(OverTime(nn.BatchNorm1d(C)), MultiStep(snntorch.Leaky(beta=0.9, init_hidden=True))),
        (T, B, C),
    ),
    "tdLayer": (
        lambda: nn.Sequential(authors_code.tdLayer(nn.BatchNorm2d(C), T), authors_layer(made=False, retain_v=False)),
        SHAPE,
    ),
    "sinabs' LIF by channel": (
        lambda: sinabs_with(sinabs.layers.LIF(torch.arange(2.0, 2.0 + C)[:, None, None], norm_input=True, **SEVERAL)),
        (B * T, C, 2, 2),
    ),
    "sinabs' LIFSqueeze": (
        lambda: sinabs_with(sinabs.layers.LIFSqueeze(tau_mem=3.0, batch_size=B, **SEVERAL)), (B * T, C, 2, 2),
    ),
    "sinabs' IAF": (lambda: sinabs_with(sinabs.layers.IAF(**ONE)), (B * T, C, 2, 2)),
}  # fmt: skip


# ---- normalisations of users, which end in their base's forward ----


class Joined(nn.BatchNorm2d):
    """Time and batch in one, as tdBatchNorm of published models."""

    alpha, v_th = 1.0, 1.0

    def forward(self, x):
        steps, batch, *sizes = x.shape
        y = super().forward(x.reshape(steps * batch, *sizes))
        return y.view(steps, batch, *y.shape[1:]).contiguous()


class Scaled(Joined):
    """With the factors of tdBN, and another class in between."""

    alpha, v_th = 0.7, 1.5

    def forward(self, x):
        return self.alpha * self.v_th * super().forward(x)


class TimeLast(nn.BatchNorm2d):
    """Of `[B, C, H, W, T]`."""

    def forward(self, x):
        folded = x.permute(4, 0, 1, 2, 3)
        return super().forward(folded.flatten(0, 1)).unflatten(0, folded.shape[:2]).permute(1, 2, 3, 4, 0).mul(2)


class Halved:
    """A mixin."""

    def forward(self, x):
        return torch.mul(super().forward(x), 0.5)


class Mixed(Halved, nn.BatchNorm2d):
    """Whose forward is the mixin's."""


class Stepping(nn.BatchNorm2d, base.StepModule):
    """With a step mode of its own."""

    def forward(self, x):
        return functional.seq_to_ann_forward(x, super().forward) if self.step_mode == "m" else super().forward(x)


class OfSpikingJelly(layer.BatchNorm2d):
    """With the step mode of its base."""

    def forward(self, x):
        return super().forward(x) * -1.25


class Synchronised(nn.SyncBatchNorm):
    """Over the processes."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]) * 2.0


OF_USERS = {
    "Joined": (lambda: nn.Sequential(Joined(C), asgl_cuda.LIF()), SHAPE),
    "Scaled": (lambda: nn.Sequential(Scaled(C), asgl_cuda.LIF()), SHAPE),
    "Scaled, a gain and a rest": (
        lambda: nn.Sequential(Scaled(C), asgl_cuda.LIF(input_gain=0.7, v_rest=0.2, v_reset=None)), SHAPE,
    ),
    "Scaled, a gain that is learned": (lambda: jelly(Stepping(C), neuron.ParametricLIFNode(v_reset=0.1)), SHAPE),
    "TimeLast": (lambda: nn.Sequential(TimeLast(C), asgl_cuda.LIF(time_dim=4)), (B, C, H, H, T)),
    "Mixed": (ours(Mixed(C)), SHAPE),
    "Stepping": (lambda: jelly(Stepping(C), neuron.LIFNode(tau=1.5)), SHAPE),
    "OfSpikingJelly": (lambda: jelly(OfSpikingJelly(C), neuron.LIFNode(tau=1.5)), SHAPE),
    "Synchronised": (lambda: nn.Sequential(Synchronised(C), asgl_cuda.LIF()), SHAPE),
    "Scaled, by channel": (
        lambda: sinabs_with_scaled(
            sinabs.layers.LIF(torch.arange(2.0, 2.0 + C)[:, None, None], norm_input=True, **SEVERAL)
        ),
        (T, B, C, 2, 2),
    ),
    "Scaled, in a sum": (
        lambda: Stack(lambda net, x: net.lif(net.norm(x) + x), norm=Scaled(C), lif=asgl_cuda.LIF(input_gain=0.8)),
        SHAPE,
    ),
    "Scaled, a sum with a learned gain": (
        lambda: Stack(
            lambda net, x: net.lif(net.norm(x) + x), norm=Scaled(C), lif=neuron.ParametricLIFNode(step_mode="m")
        ), SHAPE,
    ),
    "a factor in the model": (
        lambda: Stack(lambda net, x: net.lif(3 * net.norm(x)), norm=Joined(C), lif=asgl_cuda.LIF()), SHAPE,
    ),
}  # fmt: skip


def sinabs_with_scaled(made):
    return Stack(lambda net, x: net.lif(net.norm(x).transpose(0, 1)), norm=Scaled(C), lif=made)


def test_a_users_normalisation_is_restored_copied_and_traced():
    x_seq = torch.randn(SHAPE)
    model = scattered(nn.Sequential(Scaled(C), asgl_cuda.LIF(analog_prob=0.0)))
    fused, report = asgl_cuda.fuse(model, x_seq)
    assert report == ([("1", "LIF", "normalises as well, instead of 0")], [])
    expected = model.eval()(x_seq)
    traced = torch.fx.GraphModule(fused, torch.fx.Tracer(autowrap_modules=()).trace(fused))
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), traced):
        assert isinstance(each.get_submodule("0"), (Fused, Scaled))
        torch.testing.assert_close(each.eval()(x_seq), expected, rtol=1e-9, atol=0)
    undecided, report = asgl_cuda.fuse(model)
    torch.testing.assert_close(undecided(x_seq), expected, rtol=1e-9, atol=0)
    assert [row.by for row in report.replaced] == ["normalises as well, instead of 0"]
    assert type(asgl_cuda.unfuse(fused, inplace=True)[0][0]) is Scaled


# ---- views ----


def views(forward, norm=nn.BatchNorm1d, **parts):
    """Neurons behind `forward` of a normalised value."""
    return Stack(lambda net, x: net.lif(forward(net, x)), norm=norm(C), lif=asgl_cuda.LIF(analog_prob=0.0), **parts)


def linear(net, x):
    """Of a published transformer: the channels are last."""
    y = net.norm(net.fc(x.flatten(0, 1)).transpose(-1, -2))
    return y.transpose(-1, -2).reshape(*x.shape[:3], C).contiguous()


VIEWS = {
    "reshape": lambda net, x: net.norm(x.flatten(0, 1)).reshape(T, B, C, 6).contiguous(),
    "view, torch.flatten": lambda net, x: torch.flatten(net.norm(x.flatten(0, 1)).view(T, B, C, 2, 3), 3),
    "view_as": lambda net, x: net.norm(x.flatten(0, 1)).view_as(x),
    "unflatten by keyword": lambda net, x: torch.unflatten(net.norm(x.flatten(0, 1)), dim=0, sizes=x.shape[:2]),
    "sizes of the value": lambda net, x: (lambda y: y.unflatten(0, (y.size(0) // B, y.shape[0] // T)))(
        net.norm(x.flatten(0, 1))
    ),
    "transpose": lambda net, x: net.norm(x.flatten(0, 1)).transpose(-1, -2).reshape(T, B, 6, C),
    "permute, a dimension split": lambda net, x: net.norm(x.flatten(0, 1)).view(T, B, C, 2, 3).permute(0, 1, 3, 4, 2),
    "torch.permute": lambda net, x: torch.permute(net.norm(x.flatten(0, 1)).view(T, B, C, 6), (0, 3, 1, 2)),
    "movedim": lambda net, x: net.norm(x.flatten(0, 1)).view(T, B, C, 6).movedim(2, -1),
    "channels in front of batch": lambda net, x: net.norm(x.flatten(0, 1)).view(T, B, C, 6).swapaxes(1, 2),
    "squeeze": lambda net, x: net.norm(x.flatten(0, 1)).unsqueeze(2).squeeze(2).view(T, B, C, 6),
    "rows in the batch": lambda net, x: net.norm(x.flatten(0, 1)).view(T, B, C, 6).permute(0, 1, 3, 2).flatten(1, 2),
}  # fmt: skip


# ---- sums ----


def conv_bn():
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C))


def block(form=operator.add, lif=None, branch=None):
    """`form` of the normalised value and the input, then neurons."""
    parts = {"branch": branch or OverTime(conv_bn()), "lif": lif or asgl_cuda.LIF(detach_reset=True)}
    return Stack(lambda net, x: net.lif(form(net.branch(x), x)), **parts)


def in_place(y, x):
    y += x
    return y


FORMS = {
    "y + x": operator.add,
    "x + y": lambda y, x: x + y,
    "y += x": in_place,
    "torch.add(y, x)": torch.add,
    "y.add(x), alpha 1": lambda y, x: y.add(x, alpha=1),
    "y.add_(x)": lambda y, x: y.add_(x),
    "expanded": lambda y, x: y + x[:1].expand_as(x),
    "in another layout": lambda y, x: y + x.transpose(3, 4).contiguous().transpose(3, 4),
    "views behind": lambda y, x: (y.flatten(0, 1) + x.flatten(0, 1)).unflatten(0, (T, B)).movedim(2, 4).flatten(2, 3),
}


SUMMING = {
    "a gain": lambda: block(lif=asgl_cuda.LIF(input_gain=0.7, v_rest=0.2)),
    "the residual of the layer": lambda: Stack(
        lambda net, x: net.lif(net.branch(x), residual=x), branch=OverTime(conv_bn()), lif=asgl_cuda.LIF(input_gain=0.7)
    ),
    "ParametricLIFNode": lambda: block(lif=neuron.ParametricLIFNode(v_reset=0.1, step_mode="m")),
    "MultiStep": lambda: block(lif=MultiStep(snntorch.Leaky(beta=0.9, init_hidden=True))),
    "tdLayer": lambda: block(lif=authors_layer(made=False, retain_v=False), branch=authors_code.tdLayer(conv_bn(), T)),
    "SeqToANNContainer": lambda: block(
        lif=nn.Sequential(neuron.IFNode(step_mode="m")), branch=layer.SeqToANNContainer(*conv_bn())
    ),
    "sinabs": lambda: block(
        lif=nn.Sequential(UNFLATTEN, sinabs.layers.LIF(3.0, norm_input=True, **ONE)), branch=conv_bn()
    ),
}


MODELS = {
    **{f"neurons: {name}": row for name, row in NEURONS.items()},
    **{f"of users: {name}": row for name, row in OF_USERS.items()},
    **{f"views: {name}": (partial(views, view), (T, B, C, 6)) for name, view in VIEWS.items()},
    **{
        f"adds: {name}": (partial(block, form, asgl_cuda.LIF(analog_prob=0.0) if "views" in name else None), SHAPE)
        for name, form in FORMS.items()
    },
    **{f"adds: {name}": (make, (B * T, C, H, H) if name == "sinabs" else SHAPE) for name, make in SUMMING.items()},
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name, backend):
    make, shape = MODELS[name]
    model, x_seq = make().double(), 2 * torch.randn(shape)
    if "tdLayer" in name:
        model(x_seq)  # the width becomes a parameter
    assert_alike(on(model, backend), x_seq, 1, backend)


def test_channels_last_are_not_copied(backend, monkeypatch):
    """What the operator gets is a view of the linear layer's output."""
    fuse = sys.modules["asgl_cuda.interop.fuse"]
    model, seen = views(linear, fc=nn.Linear(6, C)), []
    original = fuse.module_batch_norm_lif
    monkeypatch.setattr(
        fuse, "module_batch_norm_lif", lambda norm, x, **more: seen.append(x) or original(norm, x, **more)
    )
    assert_alike(model, 2 * torch.randn(T, B, 5, 6), 1, backend)
    assert all(x.shape == (T, B, C, 5) and x.movedim(2, -1).is_contiguous() for x in seen)
    assert len(seen) > 2


def test_noise_falls_on_the_same_elements(backend):
    """Else the value is computed: the layout of the input is not the value's."""
    parts = {"norm": nn.BatchNorm2d(C), "lif": asgl_cuda.LIF(analog_prob=0.3)}
    model = Stack(lambda net, x: net.lif(net.norm(x.flatten(0, 1)).view(T, B, C, -1).transpose(2, 3)), **parts)
    x_seq = torch.randn(SHAPE)
    for x, joined in ((x_seq, 0), (x_seq.movedim(2, -1).contiguous().movedim(-1, 2), 1)):
        fused, report = asgl_cuda.fuse(scattered(model), x)
        assert len(report.replaced) == joined
        assert joined or "whose noise would fall on other elements in this layout" in report.left[0].reason
        expected = history(on(model, backend), x)
        assert expected["output 1"].frac().any()
        if joined == 0:
            torch.testing.assert_close(history(on(fused, backend), x), expected)


@pytest.mark.parametrize("first", ["branch", "shortcut"])
def test_two_normalisations_in_a_sum(first, backend):
    """The first operand is fused, in whatever order the modules are."""
    parts = {"branch": OverTime(conv_bn()), "shortcut": OverTime(conv_bn())}
    parts = dict(sorted(parts.items(), reverse=first == "shortcut"))
    model = Stack(
        lambda net, x: net.lif(net.branch(x) + net.shortcut(x)), **parts, lif=asgl_cuda.LIF(detach_reset=True)
    )
    x_seq = torch.randn(SHAPE)
    fused, report = asgl_cuda.fuse(scattered(model), x_seq)
    assert report.replaced == [("lif", "LIF", "normalises as well, instead of branch.layer.1")]
    assert report.left == [("shortcut.layer.1", "BatchNorm2d", "its output goes to add")]
    torch.testing.assert_close(
        history(on(fused, backend), x_seq), history(on(model, backend), x_seq), rtol=1e-9, atol=1e-11
    )


def test_a_spiking_resnet(backend):
    """The downsampling branches are second operands. In float64 no spike flips."""
    model = spiking_resnet.spiking_resnet18(spiking_neuron=neuron.LIFNode, num_classes=4, step_mode="m")
    functional.set_step_mode(model, "m")
    x_seq = torch.randn(2, 2, 3, 16, 16)
    model = on(asgl_cuda.convert(scattered(model))[0], backend)
    made, report = asgl_cuda.fuse(model, x_seq)
    assert (len(report.replaced), len(report.left)) == (17, 3)
    assert all("downsample" in row.path for row in report.left)
    results = []
    for net in (made, model):
        x = x_seq.clone().requires_grad_()
        out = net(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *net.parameters()]), *net.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


# ---- types and modes ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype, backend):
    """The convolution gives bfloat16: other summands are added by torch."""
    model = scattered(block(lambda y, x: y + x.to(dtype), asgl_cuda.LIF(analog_prob=1.0))).float()
    x_seq, found = torch.randn(SHAPE, dtype=torch.float32), []
    with torch.autocast("cpu", torch.bfloat16):
        fused, report = asgl_cuda.fuse(model, x_seq)
        assert [row.reason for row in report.left] == ([] if dtype == torch.bfloat16 else ["its output goes to add"])
        for made in (on(fused, backend), model):
            torch.manual_seed(1)
            found.append(made(x_seq))
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.04)


CASTS = {
    "to": lambda y, dtype: y.to(dtype),
    "by keyword": lambda y, dtype: y.to(dtype=dtype),
    "to a device as well": lambda y, dtype: y.to("cpu", dtype),
    "to another's type": lambda y, dtype: y.to(torch.empty(0, dtype=dtype)),
    "type": lambda y, dtype: y.type(dtype),
}


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast, of, to):
    """Outputs have the type of the cast, and its rounding, but that half types may be normalised in float32."""
    model = views(lambda net, x: CASTS[cast](net.norm(x.flatten(0, 1)), to).unflatten(0, (T, B)))
    model = scattered(model).to(of)
    model.lif = asgl_cuda.LIF(surrogate="sigmoid", analog_prob=1.0).to(of)
    x_seq = torch.randn(T, B, C, 6).to(of)
    fused, report = asgl_cuda.fuse(model, x_seq)
    found, expected = fused(x_seq), model(x_seq)
    assert found.dtype == expected.dtype == to
    assert len(report.replaced) == (cast == "to" and (to == of or (of, to) == (torch.bfloat16, torch.float32)))
    allowed = 2**-7 if torch.bfloat16 in (of, to) else 1e-6 if report.replaced else 0.0
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed)


def test_modes_of_both_layers(backend):
    """The neurons' mode is that of the noise, the normalisation's that of the statistics."""
    model = scattered(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.5)))
    x_seq = torch.randn(T, B, C)
    fused = on(asgl_cuda.fuse(model, x_seq)[0], backend)
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
