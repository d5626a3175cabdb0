"""Spikes recomputed in backward: the same bits, freed storages, errors where values changed."""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from comparison import Stack
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from asgl_cuda import LIF, AdaptiveLIF, BatchNormLIF, OverTime, RecurrentLIF, lif, recompute_spikes
from asgl_cuda.calls import recompute

STEPS, BATCH = 4, 3
usual = contextlib.nullcontext


def conv(inputs=8, outputs=4):
    return OverTime(nn.Conv2d(inputs, outputs, 3, padding=1))


def images(dtype=torch.float32, channels_last=False):
    x = torch.randn(STEPS * BATCH, 2, 6, 6, dtype=dtype)
    return (x.to(memory_format=torch.channels_last) if channels_last else x).unflatten(0, (STEPS, BATCH))


def rows(steps=STEPS, *more):
    return torch.randn(steps, BATCH, *more, 12)


def two_convs(*neurons):
    return nn.Sequential(conv(2, 8), *neurons, conv(), LIF(), nn.Flatten(2), nn.Linear(144, 5))


def layered(function, **layers):
    """A function of the model and spikes of the first layers."""
    layers = {"first": conv(2, 8), "neuron": LIF(), "last": conv(), **layers}
    return Stack(lambda m, x: function(m, m.neuron(m.first(x))), **layers)


def attention(m, x):
    q, k, v = (layer(x) for layer in (m.q, m.k, m.v))
    return (q @ k.transpose(-1, -2)) @ v


def linear(size=12):
    return nn.Sequential(nn.Linear(12, size), LIF())


def freed(count):
    return [False] * count


# The model, its input, and whether the spikes of each LIF stay: where the output views them, they were changed, or they
# have no gradient.
PATTERNS = {
    "LIF": lambda: (two_convs(LIF()), images(), freed(2)),
    "BatchNormLIF": lambda: (two_convs(BatchNormLIF(8)), images(), freed(2)),
    "by channel, all learned": lambda: (
        two_convs(LIF(8, granularity="channel", learn_decay=True, learn_threshold=True)), images(), freed(2),
    ),
    "scaled output, potentials stored": lambda: (
        two_convs(LIF(scale_output=True, learn_threshold=True, store_v_seq=True)), images(), freed(2),
    ),
    "adaptive": lambda: (two_convs(AdaptiveLIF(adapt_spike=0.3)), images(), freed(2)),
    "several spikes a step": lambda: (
        two_convs(LIF(multi_spike=True, v_reset=None, analog_prob=0.0, surrogate="periodic_exponential")), images(),
        freed(2),
    ),
    "bfloat16": lambda: (two_convs(LIF()).bfloat16(), images(torch.bfloat16), freed(2)),
    "channels_last": lambda: (
        nn.Sequential(conv(2, 8), BatchNormLIF(8), OverTime(nn.MaxPool2d(3, 2, 1)), conv(), nn.Flatten(2)).to(
            memory_format=torch.channels_last
        ),
        images(channels_last=True), freed(1),
    ),
    "average pooling": lambda: (
        nn.Sequential(conv(2, 8), LIF(), OverTime(nn.AvgPool2d(2)), conv(), BatchNormLIF(4), nn.Flatten(2)), images(),
        [False, True],
    ),
    "max pooling": lambda: (
        nn.Sequential(conv(2, 8), LIF(), OverTime(nn.MaxPool2d(2)), conv(), BatchNormLIF(4), nn.Flatten(2)), images(),
        [False, True],
    ),
    "max pooling for two": lambda: (
        layered(
            lambda m, s: m.last(p := m.pool(s)) + m.two(p), pool=OverTime(nn.AdaptiveMaxPool2d(2)), two=conv()
        ), images(), freed(1),
    ),
    "two consumers": lambda: (layered(lambda m, s: m.last(s) + m.two(s) * s.mean(), two=conv()), images(), freed(1)),
    "residual block": lambda: (
        layered(
            lambda m, s: m.last(m.second(m.conv(s)) + s), neuron=BatchNormLIF(8), conv=conv(8, 8),
            second=BatchNormLIF(8),
        ), images(), freed(2),
    ),
    "neurons on spikes": lambda: (
        nn.Sequential(conv(2, 8), LIF(), LIF(v_threshold=0.5), conv()), images(), freed(2),
    ),
    "attention": lambda: (Stack(attention, q=linear(), k=linear(), v=linear()), rows(STEPS, 7), freed(3)),
    "stateful": lambda: (
        Stack(
            lambda m, x: torch.cat([m.net(part) for part in x.split(2)]),
            net=nn.Sequential(nn.Linear(12, 6), LIF(stateful=True), nn.Linear(6, 3)),
        ), rows(), freed(2),
    ),
    "recurrent": lambda: (
        nn.Sequential(nn.Linear(12, 8), RecurrentLIF(8), nn.Linear(8, 12), linear(), nn.Linear(12, 3)), rows(),
        freed(1),
    ),
    "dropout and concatenation": lambda: (
        layered(lambda m, s: m.last(torch.cat([m.drop(s), s], 2)), first=conv(2, 4), drop=nn.Dropout(0.5)), images(),
        freed(1),
    ),
    "changed before use": lambda: (layered(lambda m, s: m.last(s.mul_(2))), images(), [True]),
    "part without gradient": lambda: (
        nn.Sequential(conv(2, 8).requires_grad_(False), LIF(learn_width=False), conv(), LIF(), conv(4, 4)), images(),
        [True, False],
    ),
}  # fmt: skip


def pattern(name):
    """The model and its input."""
    torch.manual_seed(1)
    return PATTERNS[name]()[:2]


def trained(function, x, context, model=None):
    """Output and all gradients of one step, by the model."""
    model = model or function
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    with context:
        y = function(x)
    return y.detach(), *backward(y, x, model)


def backward(y, x, model, **options):
    torch.manual_seed(3)
    y.backward(torch.randn_like(y), **options)
    return x.grad, *(None if p.grad is None else p.grad.clone() for p in model.parameters())


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def storages_of_spikes(model, x, context, layers=(LIF, AdaptiveLIF)):
    """Weak references to the storages of all spikes of a forward, and the output."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: found.append(StorageWeakRef(output.untyped_storage())))
        for layer in model.modules()
        if isinstance(layer, layers)
    ]
    torch.manual_seed(3)
    with context:
        y = model(x)
    for hook in hooks:
        hook.remove()
    return found, y


def assert_frees(model, x):
    found, y = storages_of_spikes(model, x, usual())
    assert all(storage.expired() for storage in found), y.shape


@pytest.mark.parametrize("name", PATTERNS)
def test_the_same_bits_without_the_spikes(name):
    torch.manual_seed(1)
    model, x, expected_to_stay = PATTERNS[name]()
    twin = copy.deepcopy(model)
    without, y = storages_of_spikes(model, x, usual())
    assert name == "dropout and concatenation" or not all(storage.expired() for storage in without)
    expected = y.detach(), *backward(y, x, model)
    assert any(each is not None and each.any() for each in expected[2:])
    found, y = storages_of_spikes(twin, x, recompute_spikes())
    assert [not storage.expired() for storage in found] == expected_to_stay
    assert_same((y.detach(), *backward(y, x, twin)), expected)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):  # a normalisation counts one batch
        assert torch.equal(one, other)


# ---- views ----


class Marked(torch.Tensor):
    """A tensor of another type."""


def pairs(spikes):
    return torch.view_as_complex(spikes.unflatten(-1, (-1, 2)))


VIEWS = {
    "conjugate": lambda s: pairs(s).conj(),
    "detached": lambda s: s.detach(),
    "expanded": lambda s: s.expand(2, *s.shape),
    "imaginary": lambda s: pairs(s).imag,
    "negative": lambda s: pairs(s).conj().imag,
    "negative, as input of neurons": lambda s: lif(pairs(s).conj().imag, width=4.0, analog_prob=0.5),
    "of another type": lambda s: s.view(torch.int32),
    "of another type and back": lambda s: s.view(torch.int32).view(torch.float32),
    "overlapping": lambda s: s.as_strided((5, 6), (2, 1), 3),
    "pairs": pairs,
    "pairs and back": lambda s: torch.view_as_real(pairs(s)),
    "part": lambda s: s.chunk(2, -1)[1].unbind(0)[2],
    "permuted": lambda s: s.permute(2, 0, 1),
    "real part of the conjugate": lambda s: pairs(s).conj().real,
    "strided": lambda s: s[1:, ::2, 1::3],
    "subclass": lambda s: s.as_subclass(Marked),
    "zero tensor": lambda s: torch._efficientzerotensor(s.shape),
}  # fmt: skip

# Views that shape, strides and offset do not describe.
SAVED = {"conjugate", "negative", "of another type", "pairs", "subclass"}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    def product(context):
        torch.manual_seed(1)
        x = torch.randn(STEPS, BATCH, 8, requires_grad=True)
        with context:
            spikes = lif(x * 2, analog_prob=0.5)
            storage = StorageWeakRef(spikes.untyped_storage())
            viewed = VIEWS[view](spikes)
            dtype = viewed.dtype if viewed.is_complex() else torch.float32
            weight = torch.randn(viewed.shape, dtype=dtype, requires_grad=True)
            loss = (viewed * weight).abs().square().sum() + spikes.sum()
            del spikes, viewed
        kept = not storage.expired()
        loss.backward()
        return weight.grad, x.grad, kept

    expected, found = product(usual()), product(recompute_spikes())
    assert expected[1].any()
    assert_same(found[:2], expected[:2])
    assert found[2] == (view in SAVED)


# ---- what is kept ----


def test_graphs_that_are_dropped_or_done_keep_nothing():
    model, x = pattern("two consumers")
    with recompute_spikes():
        y = model(x)
        (calls,) = recompute._thread.known.values()
        calls = weakref.ref(calls)
        del y
        gc.collect()
        assert calls() is None
        assert not recompute._thread.known
    leaf, linear = torch.randn(STEPS, BATCH, 12, requires_grad=True), nn.Linear(12, 5)
    with recompute_spikes():
        x = leaf * 2
        loss = linear(lif(x)).sum()
    storage = StorageWeakRef(x.untyped_storage())
    del x
    assert not storage.expired()
    loss.backward()
    assert storage.expired()


def test_computed_once_for_all_who_ask(monkeypatch):
    calls = []
    compute = recompute._SpikesOfCall._compute_again
    monkeypatch.setattr(recompute._SpikesOfCall, "_compute_again", lambda self: calls.append(self) or compute(self))
    model, x = pattern("two consumers")
    trained(model, x, recompute_spikes())
    assert len(calls) == 1
    assert calls[0]._recomputed is None


def pooled(side, context, around_pooling=usual):
    """An image, the result of max pooling, and of a convolution behind it."""
    torch.manual_seed(1)
    image = torch.randn(1, 2, side, side, requires_grad=True)
    with context:
        with around_pooling():
            p = functional.max_pool2d(image * 2, 3, 2)
        y = functional.conv2d(p, torch.ones(1, 2, 3, 3, requires_grad=True))
    return image, p, y


@pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="needs a torch that names the hooks of a node"
)
@pytest.mark.parametrize(("side", "dtype"), [(9, torch.int16), (181, torch.int16), (182, torch.int32)])
def test_indices_of_max_pooling_in_fewer_bytes(side, dtype):
    """The largest index is the number of pixels less one: 32760 and 33123."""
    image, p, y = pooled(side, recompute_spikes())
    assert p.grad_fn._raw_saved_result1.data._tensor.dtype is dtype
    expected, _, other = pooled(side, usual())
    for _ in range(2):
        (found,) = torch.autograd.grad(y.square().sum(), image, retain_graph=True)
        assert torch.equal(found, *torch.autograd.grad(other.square().sum(), expected, retain_graph=True))


def test_indices_that_others_save_or_change():
    """Saved under a user's hooks, which only backward may call, or in a graph freed by backward."""
    unpacked = []

    def others():
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor, lambda tensor: unpacked.append(1) or tensor
        )

    image, p, y = pooled(9, recompute_spikes(), others)
    assert not unpacked
    y.sum().backward()
    expected, _, other = pooled(9, usual())
    other.sum().backward()
    assert torch.equal(image.grad, expected.grad)
    with recompute_spikes():
        functional.conv2d(p, torch.ones(1, 2, 1, 1, requires_grad=True))
        p, indices = functional.max_pool2d(torch.randn(1, 2, 4, 4, requires_grad=True) * 2, 2, return_indices=True)
        indices.add_(1)
        y = functional.conv2d(p, torch.ones(1, 2, 1, 1, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- autograd ----


def test_two_backwards():
    model, x = pattern("two consumers")
    expected = trained(model, x, usual())
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    with recompute_spikes():
        y = model(x)
    for retain in (True, False):
        x.grad = None
        model.zero_grad()
        assert_same((y.detach(), *backward(y, x, model, retain_graph=retain)), expected)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("changed", ["input", "width", "weight", "spikes"])
def test_values_that_changed_after_use(changed):
    """Of spikes autograd alone refuses the change; the context gives correct gradients."""
    model, x = pattern("LIF")
    expected = trained(model, x, usual())
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    with recompute_spikes():
        c = model[0](x)
        s = model[1](c)
        y = model[2:](s)
    with torch.no_grad():
        {"input": c, "width": model[1].log_width, "weight": model[2].layer.weight, "spikes": s}[changed].add_(1)
    if changed == "spikes":
        assert_same((y.detach(), *backward(y, x, model)), expected)
        return
    words = r"^asgl_cuda.recompute_spikes: x_seq \(torch.float32, shape \[4, 3, 8, 6, 6\]\), which .*"
    with pytest.raises(RuntimeError, match=words * (changed == "input") + "modified by an inplace operation: expected"):
        y.sum().backward()


def test_a_parameter_that_is_freed_after_forward():
    """As by FSDP, which gathers it again for the backward of its own layer alone."""
    x, decay, linear = torch.randn(STEPS, BATCH, 12), torch.full((12,), 0.8, requires_grad=True), nn.Linear(12, 5)

    def run():
        return linear(lif(x, decay=decay)).square().sum()

    (expected,) = torch.autograd.grad(run(), linear.weight)
    with recompute_spikes():
        loss = run()
    decay.untyped_storage().resize_(0)
    (found,) = torch.autograd.grad(loss, linear.weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("double", "seen"),
    [
        (lambda s: s.mul_(2), True),
        (lambda s: s.detach().mul_(2), True),
        (lambda s: [each.mul_(2) for each in s.unbind()], True),
        (lambda s: s.data.mul_(2), False),
        (lambda s: s.detach().numpy().__imul__(2), False),
    ],
    ids=["in place", "detached", "views", "data", "NumPy"],
)
def test_spikes_that_changed_before_use(double, seen):
    """Changes that autograd does not see are not in the recomputed spikes."""
    weight = torch.ones(8, requires_grad=True)
    with recompute_spikes():
        s = lif(torch.randn(STEPS, BATCH, 8, requires_grad=True) * 2)
        unchanged = s.detach().clone()
        with torch.no_grad():
            double(s)
        assert torch.equal(s, 2 * unchanged)
        y = s * weight
    y.sum().backward()
    assert torch.equal(weight.grad, (2 if seen else 1) * unchanged.sum((0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    model = nn.Sequential(nn.Linear(6, 8), LIF().to(dtype), nn.Linear(8, 3))
    x = torch.randn(STEPS, BATCH, 6)
    expected = trained(copy.deepcopy(model), x, torch.autocast("cpu", torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(trained(model, x, recompute_spikes()), expected)


# ---- other hooks ----


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["inside", "around", "of the context", "of the context, around"])
def test_activation_checkpointing(where, reentrant):
    """Frees what it frees without the context."""
    model, x = pattern("BatchNormLIF")
    expected = trained(copy.deepcopy(model), x, usual())
    first, second = model[:2], model[2:]

    def part(function, *arguments):
        return checkpoint(function, *arguments, use_reentrant=reentrant)

    functions = {
        "inside": lambda _, x: second(part(first, x)),
        "around": lambda _, x: part(model, x),
        "of the context": lambda _, x: part(inside(model), x),
        "of the context, around": lambda _, x: part(inside(model), x),
    }
    context = usual() if where == "of the context" else recompute_spikes()
    x = x.clone().requires_grad_()
    (current, *_), y = storages_of_spikes(Stack(functions[where], model=model), x, context, nn.Module)
    assert current.expired()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    grad = torch.randn_like(y)
    torch.set_rng_state(state)
    y.backward(grad)
    assert_same((y.detach(), x.grad, *(p.grad for p in model.parameters())), expected)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_hooks_of_others(where):
    """Save everything, and once."""
    model, x = pattern("BatchNormLIF")
    twin = copy.deepcopy(model)
    without, kept = Counted(model), Counted(twin)
    expected = trained(without(model), x, usual(), model)
    function = inside(kept(twin)) if where == "inside" else kept(inside(twin))
    assert_same(trained(function, x, usual(), twin), expected)
    assert kept.total == without.total


# ---- contexts ----


def is_closed():
    return recompute.open_contexts == recompute.traced_contexts == recompute._thread.depth == 0


def test_exception_inside_and_nesting():
    model, x = pattern("LIF")
    expected = trained(model, x, usual())
    with pytest.raises(ValueError, match="inside"), recompute_spikes(), recompute_spikes():
        raise ValueError("inside")
    assert is_closed()
    assert_same(trained(model, x, usual()), expected)
    with recompute_spikes():
        assert_same(trained(model, x, recompute_spikes()), expected)
        assert_same(trained(model, x, usual()), expected)
    assert is_closed()


def test_around_the_forward_of_a_model():
    """Also where a hook raises before the context is entered: torch then calls only the hook behind forward."""
    model, x = pattern("BatchNormLIF")
    expected = trained(copy.deepcopy(model), x, usual())
    assert recompute_spikes(model) is model
    twin = copy.deepcopy(model)
    assert_same(trained(twin, x, usual()), expected)
    assert_frees(twin, x)
    with pytest.raises(RuntimeError):
        model(x[:, :, :1])
    assert is_closed()

    def refuse(*_):
        raise ValueError("refused")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ValueError, match="refused"):
        model(x)
    handle.remove()
    assert is_closed()
    assert_frees(model, x)
    with pytest.raises(TypeError, match=r"^asgl_cuda.recompute_spikes: model must be a torch.nn.Module, got int$"):
        recompute_spikes(3)


def test_threads_know_nothing_of_each_other():
    model, x = pattern("LIF")
    twin = copy.deepcopy(model)
    with recompute_spikes():
        found = []
        thread = threading.Thread(target=lambda: found.extend(storages_of_spikes(twin, x, usual())))
        thread.start()
        thread.join()
        assert not recompute._thread.known
    assert not any(storage.expired() for storage in found[0])


FUNC = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f, randomness="same")(x).sum())(x[None]),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(1.0))[0],
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f), randomness="same")(x[None]),
}


@pytest.mark.parametrize("transform", FUNC)
def test_torch_func(transform):
    """Around the context transforms work, and spikes are saved as usual; inside of it torch.func refuses its hooks."""
    model, x = pattern("LIF")

    def result(function):
        torch.manual_seed(3)
        return FUNC[transform](lambda x: function(x).sum(), x)

    expected = result(model)
    assert torch.equal(result(inside(model)), expected)
    with pytest.raises(
        RuntimeError, match=r"^asgl_cuda.recompute_spikes: torch.func.{grad, vjp,.* call them outside of the context"
    ):
        inside(lambda _: result(model))(x)
    assert is_closed()
    assert torch.equal(result(recompute_spikes(model)), expected)


# ---- torch.compile ----


class Counted:
    """Counts the bytes that autograd saves in the last call of a function, without parameters."""

    def __init__(self, model):
        self._own = {each.data_ptr() for each in model.parameters()}
        self._saved = {}

    def __call__(self, function):
        def pack(tensor):
            if tensor.data_ptr() not in self._own:
                self._saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def call(x):
            self._saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return function(x)

        return call

    @property
    def total(self):
        return sum(self._saved.values())


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def inside(model):
    def function(x):
        with recompute_spikes():
            return model(x)

    return function


WHERE = {  # counting inside of hooks that the context installs
    "around": lambda model, count: inside(count(compiled(model))),
    "inside": lambda model, count: count(compiled(inside(model))),
    "of the model": lambda model, count: count(compiled(recompute_spikes(model))),
    "of the compiled model": lambda model, count: recompute_spikes(
        Stack(lambda m, x: count(m.net)(x), net=compiled(model))
    ),
}


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 saves spikes in compiled models")
@pytest.mark.parametrize("where", WHERE)
def test_compiled(where):
    torch._dynamo.reset()  # a graph of a model without hooks is used for the same model with hooks
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 64), LIF(analog_prob=0.3), nn.Linear(64, 64), BatchNormLIF(64), nn.Linear(64, 3))
    twin, x = copy.deepcopy(model), torch.randn(STEPS, BATCH, 6)
    without, kept = Counted(model), Counted(twin)
    without(model)(x.clone().requires_grad_())
    expected = trained(model, x, usual())
    function = WHERE[where](twin, kept)
    for _ in range(2):
        assert_same(trained(function, x, usual(), twin), expected)
    assert 0 < kept.total < 0.6 * without.total
    assert is_closed()


def test_compiled_pooling():
    model, x = pattern("max pooling")
    torch._dynamo.reset()
    expected = trained(compiled(model), x, usual(), model)
    assert_same(trained(compiled(model), x, recompute_spikes(), model), expected)


def test_compiled_code_breaks_and_raises():
    """Contexts that compiled code opens are closed."""

    def forward(m, x):
        s = m.first(x)
        torch._dynamo.graph_break()
        if len(x) == 1:
            raise ValueError("one step")
        return m.second(s)

    model, x = Stack(forward, first=linear(), second=linear()), torch.randn(STEPS, BATCH, 12)
    expected = trained(model, x, usual())
    for function in (inside(model), recompute_spikes(copy.deepcopy(model))):
        function = torch.compile(function, backend="aot_eager")
        for _ in range(2):
            torch.manual_seed(3)
            assert torch.equal(function(x.clone().requires_grad_()), expected[0])
            with pytest.raises(ValueError, match="one step"):
                function(x[:1])
            assert is_closed()


def test_memory_budget_of_the_compiler():
    """It would draw other noise in backward."""
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        for analog_prob in (0.0, 0.3):
            model = nn.Sequential(nn.Linear(6, 8), LIF(analog_prob=analog_prob), nn.Linear(8, 3))
            x = torch.randn(STEPS, BATCH, 6)
            expected = trained(model, x, usual())
            if not analog_prob:
                assert_same(trained(compiled(model), x, usual(), model), expected)
                continue
            with pytest.raises(RuntimeError, match=r"asgl_cuda: torch._functorch.config.activation_memory_budget must"):
                compiled(model)(x)
            with torch.no_grad():
                compiled(model)(x)
