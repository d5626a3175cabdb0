"""Normalisations that `fuse` leaves, with the reasons; and what else meets the output of one that is fused."""

import copy
import math
from functools import partial

import norse.torch as norse
import pytest
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from comparison import Stack
from conversions import B, C, T, history, scattered
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda.interop.fuse import Fused
from asgl_cuda.neurons.over_time import OverTime

pytestmark = pytest.mark.usefixtures("in_double")

SHAPE = (T, B, C, 4, 4)


def plain(net, x):
    return net.lif(norm(net, x))


def norm(net, x):
    """The normalised value, in time and batch."""
    return net.bn(net.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])


def network(forward=plain, **parts):
    lif = asgl_cuda.LIF(analog_prob=0.0, surrogate="sigmoid")
    parts = {"conv": nn.Conv2d(C, C, 1), "bn": nn.BatchNorm2d(C), "lif": lif} | parts
    return scattered(Stack(forward, **parts))


def reasons(model, example=None):
    _, report = asgl_cuda.fuse(model, example)
    return {row.path: row.reason for row in report.left}


# ---- other uses: equal, or an error ----


class Doubled(torch.autograd.Function):
    """Twice the input."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def with_value(use):
    return lambda net, x: use(net, norm(net, x), x)


def change_of_an_alias(net, y, x):
    z = y.view_as(x)
    y += x
    return net.lif(z)


def alias_of_a_change(net, y, x):
    alias = y
    y += x
    return net.lif(y) + alias


def without_gradients(net, x):
    with torch.no_grad():
        y = norm(net, x)
    return net.lif(y + x)


def views_without_gradients(net, x):
    y = net.bn(net.conv(x.flatten(0, 1)))
    with torch.no_grad():
        z = y.unflatten(0, x.shape[:2])
    return net.lif(z + x)


def logged(net, y, x):
    with torch.no_grad():
        net.mean = y.mean()
    return net.lif(y)


def out_of_order(net, x):
    first, second = norm(net, x), norm(net, 2 * x)
    return net.lif(second) + net.lif(first)


def frozen_in_between(net, y, x):
    training = net.bn.training
    net.bn.eval()
    s_seq = net.lif(y)
    net.bn.train(training)
    return s_seq


def combined_by(form):
    return with_value(lambda net, y, x: net.lif(form(y, x)))


saved = partial(checkpoint, use_reentrant=False)


def neurons_saved(net, y):
    return saved(lambda: net.lif(y))


# The use, and the reason in a report. Then, the error where the value of a fused normalisation would not be equal.
AGAIN, SUM = "its output is used again, by ", "the sum of its output and another "
FUNCTION = "its output goes to a torch.autograd.Function, which would lose its gradient"
REENTRANT = "it is called inside of a torch.autograd.Function, such as a reentrant checkpoint"
VIEW = "a view of its output, made before the output was changed in place, is used after the change"
APART = "the normalisation is called {} of a torch.utils.checkpoint and its neurons {}, and a checkpoint calls"
INSIDE, OUTSIDE = APART.format("inside", "outside"), APART.format("outside", "inside")
ANOTHER = "the normalisation is called inside of another torch.utils.checkpoint than its neurons"
USES = {
    "used twice": (with_value(lambda net, y, x: net.lif(y) + y), AGAIN + "add"),
    "in evaluation": (with_value(lambda net, y, x: net.lif(y) if net.training else net.lif(y) + y), AGAIN + "add"),
    "neurons twice": (with_value(lambda net, y, x: net.lif(y) + net.lif(y)), AGAIN + "LIF"),
    "before": (with_value(lambda net, y, x: y.mean() + net.lif(y)), "its output goes to mean"),
    "the next shortcut": (
        with_value(lambda net, y, x: (lambda z: net.lif(z) + z)(y + x)), SUM + "is used again, by add"
    ),
    "two summands": (combined_by(lambda y, x: y + x + x), SUM + "goes to add"),
    "itself": (combined_by(lambda y, x: y + y), "its output goes to add"),
    "a number": (combined_by(lambda y, x: 1 + y), "its output goes to radd"),
    "alpha": (combined_by(lambda y, x: torch.add(y, x, alpha=2)), "its output goes to add"),
    "one step": (combined_by(lambda y, x: y + x[:1]), "its output goes to add"),
    "a difference": (combined_by(lambda y, x: x - y), "its output goes to sub"),
    "a function": (combined_by(lambda y, x: (y + x).relu()), SUM + "goes to relu"),
    "in a list": (combined_by(lambda y, x: torch.cat([y, x])), "its output goes to cat"),
    "expanded": (combined_by(lambda y, x: y.unsqueeze(1).expand(T, 2, B, C, 4, 4)), "its output goes to expand"),
    "channels joined": (combined_by(lambda y, x: y.flatten(2)), "its output goes to flatten"),
    "channels joined behind others": (
        combined_by(lambda y, x: y.permute(0, 1, 3, 2, 4).flatten(2, 3)), "its output goes to flatten"
    ),
    "channels for time": (combined_by(lambda y, x: y.movedim(2, 0)), "its output goes to LIF, which has time in"),
    "in numpy": (with_value(lambda net, y, x: net.lif(y) * float(y.detach().numpy().sum())), AGAIN + "detach"),
    "functional": (with_value(lambda net, y, x: asgl_cuda.lif(y, surrogate="sigmoid")), "its output goes to asgl_cuda"),
    "the residual": (with_value(lambda net, y, x: net.lif(x, y)), "its output goes to LIF"),
    "*=": (with_value(lambda net, y, x: net.lif(y.__imul__(2))), "its output goes to imul"),
    "relu in place": (with_value(lambda net, y, x: (torch.relu_(y), net.lif(y))[1]), "its output goes to relu"),
    "+= of an alias": (with_value(alias_of_a_change), SUM + "is used again, by add"),
    "+= of a view": (with_value(change_of_an_alias), VIEW, VIEW),
    "relu in place of a view": (
        with_value(lambda net, y, x: (lambda z: (y.relu_(), net.lif(z))[1])(y.view_as(x))),
        "its output goes to relu", VIEW,
    ),
    "without gradients": (without_gradients, SUM + "goes to LIF, which is called with gradients, while the "
        "normalisation was called without"),
    "views without gradients": (views_without_gradients, SUM + "goes to LIF, which is called with gradients"),
    "logged": (with_value(logged), "its output goes to mean"),
    "in a Function": (combined_by(lambda y, x: Doubled.apply(y)), FUNCTION, FUNCTION),
    "neurons in a reentrant checkpoint": (
        with_value(lambda net, y, x: checkpoint(net.lif, y, use_reentrant=True)), FUNCTION, FUNCTION,
    ),
    "in a reentrant checkpoint": (
        lambda net, x: net.lif(checkpoint(lambda x: norm(net, x), x, use_reentrant=True)), REENTRANT,
    ),
    "both in a reentrant checkpoint": (
        lambda net, x: checkpoint(lambda x: plain(net, x), x, use_reentrant=True), REENTRANT,
    ),
    "in a checkpoint": (
        lambda net, x: net.lif(saved(lambda x: norm(net, x), x)), INSIDE, INSIDE,
    ),
    "neurons in a checkpoint": (with_value(lambda net, y, x: neurons_saved(net, y)), OUTSIDE, OUTSIDE),
    "in two checkpoints": (
        lambda net, x: neurons_saved(net, saved(lambda x: norm(net, x), x)), ANOTHER, ANOTHER,
    ),
    "unused": (lambda net, x: (norm(net, x), net.lif(x))[1], "nothing uses it"),
    "kept": (lambda net, x: (net.__dict__.update(kept=norm(net, x)), net.lif(x))[1], "nothing in the model uses its"),
    "out of order": (out_of_order, "it is called again before its output is used"),
    "frozen in between": (with_value(frozen_in_between), "its output goes to LIF, after a change between training"),
    "not called": (lambda net, x: net.lif(net.conv(x.flatten(0, 1)).view_as(x)), "the example does not reach it"),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_uses(name, backend):
    """Left by an example; without one from the first use on; and of use to code that the example did not reach."""
    forward, reason, *error = USES[name]
    model, x_seq = network(forward), torch.randn(SHAPE)
    model.lif.backend = backend
    left, report = asgl_cuda.fuse(model, x_seq)
    assert not report.replaced
    assert report.left[0][:2] == ("bn", "BatchNorm2d")
    assert report.left[0].reason.startswith(reason)
    expected = history(copy.deepcopy(model), x_seq)
    torch.testing.assert_close(history(left, x_seq), expected, rtol=0, atol=0)
    if name == "kept":  # counted in a later call
        return
    fused, report = asgl_cuda.fuse(network(), x_seq)
    assert len(report.replaced) == 1
    fused.load_state_dict(model.state_dict())
    undecided, report = asgl_cuda.fuse(model)
    for made in (fused, undecided):
        made.function, made.lif.backend = forward, backend
        if error:
            with pytest.raises(RuntimeError, match=f"BatchNorm2d is computed by the neurons after it, but {error[0]}"):
                history(made, x_seq)
        else:
            torch.testing.assert_close(history(made, x_seq), expected, rtol=1e-9, atol=1e-11)
    if name != "not called":
        assert [row.path for row in report.left] == ["bn"]
        assert not report.replaced
        if not error:
            assert report.left[0].reason.startswith(reason)
            undecided(x_seq)
            assert type(undecided.bn) is nn.BatchNorm2d


def test_a_view_after_the_change():
    """The remedy of the error for a view before the change: both are the same in the separate layers."""

    def changing(net, x, late):
        y = norm(net, x)
        z = y.transpose(3, 4)
        y += x
        return net.lif(y.transpose(3, 4) if late else z)

    x_seq = torch.randn(SHAPE)
    fused = asgl_cuda.fuse(network(), x_seq)[0]
    separate = network()
    separate.load_state_dict(fused.state_dict())
    fused.function = separate.function = partial(changing, late=False)
    with pytest.raises(
        RuntimeError, match=f"{VIEW}; use the changed tensor or a new view of it, call asgl_cuda.unfuse"
    ):
        fused(x_seq)
    expected = separate(x_seq)
    fused.function = partial(changing, late=True)
    torch.testing.assert_close(fused(x_seq), expected)


def test_operands_that_change_in_between():
    def changing_x(net, x):
        h = net.conv(x.flatten(0, 1))
        y = net.bn(h)
        h.mul_(2)
        return net.lif(y.view_as(x))

    def changing_the_shortcut(net, x):
        x = x * 1
        z = norm(net, x) + x
        x.mul_(2)
        return net.lif(z)

    x_seq = torch.randn(SHAPE)
    for forward in (changing_x, changing_the_shortcut):
        fused = asgl_cuda.fuse(network(), x_seq)[0]
        fused.function = forward
        with torch.no_grad(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            fused(x_seq)
        with torch.inference_mode():  # counts no changes
            fused(x_seq)


def test_code_that_takes_tensors_alone():
    """Left, as only the value that was in its hands."""

    def strict(net, x):
        y = net.second(norm(net, x))
        if type(y) is not torch.Tensor:
            raise TypeError("a tensor, please")
        return net.lif(plain(net, y))

    model = network(strict, second=OverTime(nn.BatchNorm2d(C)))
    assert reasons(model, torch.randn(SHAPE)) == {
        "bn": "its output goes to BatchNorm2d",
        "second.layer": "with the stand-in for its output the model's forward fails: TypeError: a tensor, please",
    }
    with pytest.raises(ValueError, match="the model raises, in training mode, ZeroDivisionError"):
        asgl_cuda.fuse(network(lambda net, x: plain(net, x) / (1 // 0)), torch.randn(SHAPE))


# ---- neurons ----


class Slower(asgl_cuda.LIF):
    """Uses its input."""

    def _call_function(self, x_seq, update=True, **options):
        return super()._call_function(x_seq / 2, update, **options)


def jelly(made, mode="m"):
    made.step_mode = mode
    return made


def elsewhere(lif):
    """Neurons whose input has the channels in its last dimension."""
    return nn.Sequential(nn.Flatten(3), Stack(lambda net, x: net.lif(x.transpose(2, 3)), lif=lif))


ELSEWHERE = "whose parameters differ, for channels in dimension 2, not 3"
FILTERS = "which is recurrent, has a synaptic current or does not fire"
STEPS = "which is called step by step"
NEURONS = {
    "of a subclass": (Slower(), "Slower"),
    "with a normalisation": (asgl_cuda.BatchNormLIF(C), "BatchNormLIF"),
    "adaptive": (asgl_cuda.AdaptiveLIF(), "AdaptiveLIF"),
    "by channel elsewhere": (
        elsewhere(asgl_cuda.LIF(16, granularity="channel", analog_prob=0.0)), f"LIF, {ELSEWHERE}",
    ),
    "by channel elsewhere, of constants": (
        elsewhere(asgl_cuda.LIF(16, granularity="channel", learn_width=False, analog_prob=0.0)), f"LIF, {ELSEWHERE}",
    ),
    "by channel elsewhere, of sinabs": (
        elsewhere(sinabs.layers.LIF(torch.linspace(2, 5, C), norm_input=False)), f"LIF, {ELSEWHERE}",
    ),
    "of a wrong time_dim": (asgl_cuda.LIF(time_dim=1), None),
    "unknown": (jelly(neuron.QIFNode()), "getitem"),
    "with a gain of each neuron": (
        sinabs.layers.LIF(torch.full((C, 4, 4), 2.0)), f"LIF, whose input gain or bias has shape [{C}, 4, 4]",
    ),
    "with a current": (sinabs.layers.LIF(2.0, tau_syn=3.0), f"LIF, {FILTERS}"),
    "without spikes": (sinabs.layers.ExpLeak(2.0), f"ExpLeak, {FILTERS}"),
    "CUBALIFNode": (jelly(neuron.CUBALIFNode(0.5, 0.5)), f"CUBALIFNode, {FILTERS}"),
    "LIFNode, step by step": (jelly(neuron.LIFNode(), "s"), f"LIFNode, {STEPS}"),
    "Leaky": (snntorch.Leaky(beta=0.5, init_hidden=True), f"Leaky, {STEPS}"),
    "LIFBoxCell": (norse.SequentialState(norse.LIFBoxCell()), f"LIFBoxCell, {STEPS}"),
    "LIF of Norse": (norse.SequentialState(norse.LIF()), f"LIF, {FILTERS}"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEURONS)
def test_neurons(name):
    """They get the value; layers that would have been converted for it are left as they are."""
    lif, goes_to = NEURONS[name]
    model = network(lif=lif.double())
    x_seq = torch.randn(SHAPE)
    if isinstance(lif, norse.SequentialState):
        model.function = lambda net, x: net.lif(norm(net, x))[0]
    classes = [type(module) for module in model.modules()]
    left, report = asgl_cuda.fuse(model, x_seq)
    assert [row.reason for row in report.left] == ([] if goes_to is None else [f"its output goes to {goes_to}"])
    assert [type(module) for module in left.modules()] == classes or goes_to is None
    assert asgl_cuda.unfuse(asgl_cuda.fuse(model)[0])[1].replaced
    asgl_cuda.reset(model)


# ---- normalisations ----


def norm_of_a_user(use, **names):
    """A normalisation whose forward does what `use` does with that of its base."""
    kind = type("Mine", (nn.BatchNorm2d,), names)
    kind.forward = lambda self, x: use(super(kind, self).forward, x, self)
    return kind(C)


class Arithmetic(nn.BatchNorm2d):
    """Normalises by itself, as the first tdBatchNorm."""

    def forward(self, x):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
        return (x - mean) / (var + self.eps).sqrt() * self.weight[:, None, None]


class Functional(nn.BatchNorm2d):
    """Normalises by torch's function."""

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True)


def test_normalisations():
    x_seq = torch.randn(SHAPE)
    replaced = nn.BatchNorm2d(C)
    replaced.forward = lambda x: x
    cases = {
        Arithmetic(C): "Arithmetic computes something else than torch.nn's normalisations",
        Functional(C): "Functional computes something else than torch.nn's normalisations",
        norm_of_a_user(lambda norm, x, self: norm(x).relu()): "its output goes to relu",
        norm_of_a_user(lambda norm, x, self: norm(x) * self.weight[0]): "its output goes to mul",
        norm_of_a_user(lambda norm, x, self: norm(x) * torch.ones(())): "its output goes to mul",
        norm_of_a_user(lambda norm, x, self: norm(x) * math.inf): "its output goes to mul",
        norm_of_a_user(lambda norm, x, self: norm(x) + 1): "its output goes to add",
        norm_of_a_user(lambda norm, x, self: norm(x) / 2): "its output goes to truediv",
        norm_of_a_user(lambda norm, x, self: 2 * (norm(x) + x)): "the sum of its output and another goes to rmul",
        norm_of_a_user(lambda norm, x, self: norm(x) + norm(2 * x)): "its output goes to add",
        norm_of_a_user(
            lambda norm, x, self: norm(x), outcome=3
        ): "its class defines outcome, a name that fused layers use",
        replaced: "its forward is an attribute of the module, not the method of its class",
        nn.GroupNorm(1, C): None,
    }
    for each, reason in cases.items():
        assert reasons(network(bn=each), x_seq) == ({} if reason is None else {"bn": reason})
    teb = nn.Sequential(layer.TemporalEffectiveBatchNorm2d(T, C), asgl_cuda.LIF())
    assert reasons(teb, x_seq) == {"0": "its output goes to mul"}
    assert reasons(nn.BatchNorm2d(C), x_seq[0]) == {"": "its output goes to the caller of the model"}
    lazy = nn.Sequential(OverTime(nn.LazyBatchNorm2d()), asgl_cuda.LIF())  # torch can't copy it
    assert "until its first call" in asgl_cuda.fuse(lazy, inplace=True)[1].left[0].reason
    with pytest.raises(ValueError, match="expected 4D input"):
        asgl_cuda.fuse(network(), x_seq)[0].bn(x_seq)


def test_what_is_fused_already():
    """Is not fused again, and the report says so."""
    x_seq = torch.rand(3, 2, 4)
    joined, _ = asgl_cuda.fuse(nn.Sequential(OverTime(nn.BatchNorm1d(4)), asgl_cuda.LIF()), x_seq)
    for example in (None, x_seq):
        again, report = asgl_cuda.fuse(joined, example)
        assert [(row.path, row.reason) for row in report.left] == [("0.layer", "an earlier fuse has merged it already")]
        assert isinstance(again[0].layer, Fused)


def nothing(*_):
    """A hook that changes nothing."""


BACKWARD_HOOKS = "full_backward_hook", "full_backward_pre_hook"
BLIND = "the backward hook of {} would get no gradient of BatchNorm2d's output"


@pytest.mark.parametrize("kind", BACKWARD_HOOKS)
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("bn", "it has a backward hook"), ("before", BLIND.format("Sequential")), ("lif", BLIND.format("LIF")),
        ("after", BLIND.format("Sequential")),
    ],
)  # fmt: skip
def test_backward_hooks(path, reason, kind):
    """Would see no gradient of a stand-in: the normalisation is left, and an error for hooks that come after `fuse`."""
    model = network(lambda net, x: net.after(net.before(net.conv(x.flatten(0, 1))).view_as(x)))
    model.before, model.after = nn.Sequential(model.bn), nn.Sequential(model.lif)
    x_seq = torch.randn(SHAPE)
    undecided, report = asgl_cuda.fuse(model)
    getattr(undecided.get_submodule(path), f"register_{kind}")(nothing)
    if path == "bn":
        undecided(x_seq)
    else:
        remedies = r"remove the hook, call .*, or register the hook before asgl_cuda\.fuse\(model, example\), so"
        with pytest.raises(RuntimeError, match=f"{reason}; {remedies}"):
            undecided(x_seq)
    assert [row.reason for row in report.left] == [reason]
    getattr(model.get_submodule(path), f"register_{kind}")(nothing)
    assert reasons(model, x_seq) == {"bn": reason}


@pytest.mark.parametrize("kind", BACKWARD_HOOKS)
@pytest.mark.parametrize("path", ["conv", "bn", "last", "lif"])
def test_backward_hooks_of_parts_without_an_example(path, kind):
    """All normalisations are left, and a part that follows them gets all gradients from the first call on."""
    model = network(lambda net, x: net.lif(net.last(norm(net, x))), last=nn.Linear(4, 4).double())
    undecided, report = asgl_cuda.fuse(model)
    assert not report.left
    seen, shapes = [], []
    getattr(model.get_submodule(path), f"register_{kind}")(lambda module, *grads: seen.append(grads[-2:]))
    undecided, report = asgl_cuda.fuse(model)
    assert [row.path for row in report.left] == ["bn"]
    assert report.left[0].reason.startswith(f"{path} (")
    assert "has a backward hook, which may need the gradient of this layer's output" in report.left[0].reason
    for _ in range(2):
        undecided(torch.randn(SHAPE).requires_grad_()).sum().backward()
        shapes.append([None if grad is None else grad.shape for grads in seen[-1] for grad in grads])
        asgl_cuda.reset(undecided)
    assert shapes[0] == shapes[1]
    assert shapes[0]
    assert None not in shapes[0]


def test_hooks():
    """Other hooks change nothing; one of backward that neurons get later is an error."""
    x_seq, seen = torch.randn(SHAPE), []
    model = network()
    model.conv.register_full_backward_hook(nothing)
    model.register_full_backward_hook(nothing)
    model.lif.register_forward_hook(nothing)
    fused, report = asgl_cuda.fuse(model, x_seq)
    assert len(report.replaced) == 1
    fused.lif.register_full_backward_hook(nothing)
    with pytest.raises(RuntimeError, match=BLIND.format("LIF")):
        fused(x_seq)
    hooked = network()
    hooked.bn.register_forward_hook(lambda module, args, output: seen.append(output.mean()))
    assert reasons(hooked, x_seq) == {"bn": "its output goes to mean"}


@pytest.mark.parametrize("kind", BACKWARD_HOOKS)
def test_hooks_of_all_modules(kind):
    x_seq = torch.randn(SHAPE)
    handle = getattr(torch.nn.modules.module, f"register_module_{kind}")(nothing)
    try:
        assert reasons(network(), x_seq) == {"bn": "it has a backward hook"}
        undecided, report = asgl_cuda.fuse(network())
        undecided(x_seq)
        assert [row.reason for row in report.left] == ["it has a backward hook"]
    finally:
        handle.remove()


def test_a_hook_of_all_modules_between_a_normalisation_and_its_neurons():
    def hooked(net, x):
        y = norm(net, x)
        handle = torch.nn.modules.module.register_module_full_backward_hook(nothing)
        try:
            return net.lif(y)
        finally:
            handle.remove()

    fused = asgl_cuda.fuse(network(), torch.randn(SHAPE))[0]
    fused.function = hooked
    with pytest.raises(RuntimeError, match=BLIND.format("all modules")):
        fused(torch.randn(SHAPE))


def test_shared_modules_and_calls_in_turn(backend):
    """A block that is called twice; a normalisation at two places."""
    model = network(lambda net, x: plain(net, plain(net, x)))
    model.again = model.bn
    model.lif.backend = backend
    x_seq = torch.randn(SHAPE)
    fused, report = asgl_cuda.fuse(model, x_seq)
    assert len(report.replaced) == 1
    assert isinstance(fused.again, Fused)
    torch.testing.assert_close(history(fused, x_seq), history(model, x_seq), rtol=1e-9, atol=1e-11)
