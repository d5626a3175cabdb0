"""`convert(model, sequences=...)`: what a loop over the steps computes, by one call of each layer, or a refusal."""

import copy
import gc
import operator
import warnings
import weakref

import norse.torch as norse
import pytest
import snntorch
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.nn.functional import dropout, max_pool2d, relu
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda.interop.converted import Converted

pytestmark = pytest.mark.usefixtures("in_double", "spikes_in_double")
T, B, N = 12, 3, 8


class Net(nn.Module):
    """Two layers; `step` is their step, from states and an input to new states and a result."""

    def __init__(self, first=None, second=None):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(N, 10), nn.Linear(10, 6)
        self.lif1 = snntorch.Leaky(beta=0.9) if first is None else first
        self.lif2 = snntorch.Leaky(beta=0.7, threshold=0.5, learn_beta=True) if second is None else second

    def step(self, x, states):
        spikes, *one = self.lif1(self.fc1(x), *states[0])
        spikes, *other = self.lif2(self.fc2(spikes), *states[1])
        return [one, other], spikes, other[-1]


def steps_of(net, x_seq, states=((), ())):
    for x in x_seq:
        states, spikes, mem = net.step(x, states)
        yield states, spikes, mem


def stacked(net, x_seq):
    spikes, mem = zip(*(found[1:] for found in steps_of(net, x_seq)), strict=True)
    return torch.stack(spikes), torch.stack(mem, dim=1)


def static(net, x_seq):
    states, rec = [(), ()], []
    for _ in range(T):
        states, spikes, _ = net.step(x_seq[0], states)
        rec.append(spikes)
    return torch.stack(rec).sum(0)


def batch_first(net, x_seq):
    x, states, rec = x_seq.transpose(0, 1), [(), ()], []
    for t in range(x.size(1)):
        states, _, mem = net.step(x[:, t].reshape(x.shape[0], -1), states)
        rec.append(mem.unsqueeze(0))
    return torch.cat(rec).max(0)[0]


def time_last(net, x_seq):
    x, states, rec = x_seq.permute(1, 2, 0), [(), ()], []
    for t in range(x.shape[-1]):
        states, spikes, _ = net.step(x[..., [t]].squeeze(-1), states)
        rec.append(spikes)
    return rec


def sums(net, x_seq):
    total, count = torch.zeros(x_seq.shape[1], 6), 0
    for _, spikes, mem in steps_of(net, x_seq):
        total += mem
        count = count + spikes
    if count.sum() > 1e9:  # behind the loop values may be asked for
        total = total * 0
    return {"mean": total / len(x_seq), "count": count}


def written(net, x_seq):
    rec = x_seq.new_zeros(T, x_seq.size(1), 6)
    for t, (_, _, mem) in enumerate(steps_of(net, x_seq)):
        rec[t, :, :] = mem
    return rec


def delayed(net, x_seq):
    states, spikes, rec = [(), ()], torch.zeros(B, 10), []
    for x in x_seq:
        out, mem2 = net.lif2(net.fc2(spikes), *states[1])
        spikes, mem1 = net.lif1(net.fc1(x), *states[0])
        states = [(mem1,), (mem2,)]
        rec.append(out + mem2)
    return torch.stack(rec)


def truncated(net, x_seq):
    states, rec = [(), ()], []
    for t, x in enumerate(x_seq):
        states, _, mem = net.step(x, states)
        rec.append(mem)
        if t == 4:
            states = [[state.detach() for state in each] for each in states]
    return torch.stack(rec)


def in_place(net, x_seq):
    states, rec = [(), ()], []
    for x in x_seq:
        current = net.fc1(x)
        current += x.sum(1, keepdim=True)
        spikes, mem = net.lif1(relu(current, inplace=True), *states[0])
        states = [(mem,), ()]
        rec.append(dropout(spikes, 0.0, net.training))
    return torch.stack(rec)


def no_gradient(net, x_seq):
    states, rec = [(), ()], []
    for x in x_seq:
        with torch.no_grad():
            scale = net.fc1(x).mean()
        states, _, mem = net.step(x * scale, states)
        rec.append(mem)
    return torch.stack(rec)


def on_itself(net, x_seq):
    net.rec = []
    for found, spikes, _ in steps_of(net, x_seq):
        states = found
        net.rec.append(spikes)
        net.last = spikes
    return states[0][0]


def reset_at_the_end(net, x_seq):
    found = stacked(net, x_seq)
    net.lif1.reset_mem()
    return found


LOOPS = {
    each.__name__: each
    for each in (stacked, static, batch_first, time_last, sums, written, delayed, truncated, in_place, no_gradient,
                 on_itself, reset_at_the_end)
}  # fmt: skip
LAYERS = {
    "zero": lambda: (
        snntorch.Leaky(beta=0.9, reset_mechanism="zero"),
        snntorch.Leaky(beta=0.5, reset_mechanism="none"),
    ),
    "at once": lambda: (snntorch.Leaky(beta=0.9, reset_delay=False), snntorch.Lapicque(beta=0.5)),
    "Synaptic": lambda: (snntorch.Synaptic(alpha=0.6, beta=0.8), snntorch.Synaptic(alpha=0.9, beta=0.8)),
    "recurrent": lambda: (
        snntorch.RLeaky(beta=0.9, linear_features=10),
        snntorch.RSynaptic(alpha=0.5, beta=0.8, all_to_all=False, V=0.3),
    ),
}


def norse_net(net, x_seq):
    states, rec = [None, None], x_seq.new_zeros(T, B, 6)
    for t, x in enumerate(x_seq):
        spikes, states[0] = net.lif1(net.fc1(x), states[0])
        rec[t], states[1] = net.lif2(net.fc2(spikes), states[1])
    return rec, states[0].v, states[1]


P = norse.LIFParameters(v_th=torch.tensor(0.2))
CELLS = {
    "LIFCell, LICell": lambda: (norse.LIFCell(p=P), norse.LICell()),
    "LIFRecurrentCell, LIBoxCell": lambda: (norse.LIFRecurrentCell(10, 10, p=P), norse.LIBoxCell()),
    "IAFCell, LIFBoxCell": lambda: (norse.IAFCell(), norse.LIFBoxCell()),
}


def sequential(*neurons):
    torch.manual_seed(0)
    first, second, *norm = neurons
    return nn.Sequential(nn.Linear(N, 10), *norm, first, nn.Linear(10, 6), second)


HIDDEN = {"init_hidden": True}
STEPS = {
    "snnTorch": lambda: sequential(
        snntorch.Leaky(beta=0.9, **HIDDEN), snntorch.Synaptic(alpha=0.5, beta=0.9, output=True, **HIDDEN)
    ),
    "SpikingJelly": lambda: sequential(
        neuron.CUBALIFNode(c_decay=0.5, v_decay=0.8), neuron.ParametricLIFNode(store_v_seq=True), nn.BatchNorm1d(10)
    ),
    "SpikingJelly, spikes that return": lambda: sequential(
        layer.LinearRecurrentContainer(neuron.CUBALIFNode(c_decay=0.5, v_decay=0.8), 10, 10),
        layer.ElementWiseRecurrentContainer(neuron.LIFNode(), lambda y, x: x - y),
    ),
    "Norse": lambda: norse.Lift(norse.SequentialState(nn.Linear(N, 10), norse.LIFCell(p=P), norse.LICell())),
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [found for each in values for found in tensors(each)]


def run(model, call, x_seq):
    """Outputs, states and gradients, after two calls."""
    asgl_cuda.reset(model)
    call(x_seq)
    asgl_cuda.reset(model)
    leaf = x_seq.clone().requires_grad_()
    output = tensors(call(leaf))
    total = sum((each * torch.arange(1.0, 1 + each.numel()).reshape(each.shape).cos()).sum() for each in output)
    gradients = torch.autograd.grad(total, [leaf, *model.parameters()], allow_unused=True)
    kept = [state for layer in model.modules() for state in tensors(getattr(layer, "_memories", {}))]
    recorded = tensors([getattr(model, "rec", []), getattr(model, "last", [])])
    return [*output, *gradients, *model.buffers(), *kept, *recorded]


def input_of(steps=T):
    return 4 * torch.rand(steps, B, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def compare(model, call, fast):
    x_seq = input_of()
    for one, other in zip(run(model, call, x_seq), run(fast, fast, x_seq), strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # float64: the order of sums alone differs
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loop", LOOPS)
def test_loop(loop):
    model = type("Looped", (Net,), {"forward": LOOPS[loop]})()
    fast, report = asgl_cuda.convert(model, sequences="loop")
    compare(model, model, fast)
    assert (report.replaced[0].path, report.left) == ("", [])


@pytest.mark.parametrize("layers", LAYERS)
def test_layers(layers):
    model = type("Looped", (Net,), {"forward": stacked})(*LAYERS[layers]())
    compare(model, model, asgl_cuda.convert(model, sequences="loop")[0])


@pytest.mark.parametrize("cells", CELLS)
def test_norse(cells):
    model = type("Looped", (Net,), {"forward": norse_net})(*CELLS[cells]())
    compare(model, model, asgl_cuda.convert(model, sequences="loop")[0])


@pytest.mark.parametrize("library", STEPS)
def test_steps(library):
    model = STEPS[library]()
    if library == "Norse":  # Lift has the loop
        compare(model, model, asgl_cuda.convert(model, sequences="loop")[0])
        return

    def call(x_seq):
        found = [each if isinstance(each, tuple) else (each,) for each in map(model, x_seq)]
        return tuple(map(torch.stack, zip(*found, strict=True)))

    compare(model, call, asgl_cuda.convert(model, sequences=True)[0])


def test_only_spikes_are_known_where_these_return():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = layer.LinearRecurrentContainer(neuron.CUBALIFNode(0.5, 0.8), N, N)

        def forward(self, x):
            return self.lif(x) + getattr(self.lif.sub_module, self.read)

    fast, _ = asgl_cuda.convert(Reading(), sequences=True)
    for fast.read in "vc":
        words = rf"only the spikes of a LinearRecurrentContainer are known .* not the {fast.read} of its node; "
        with pytest.raises(RuntimeError, match=words):
            fast(input_of())


def test_convolutions():
    """Shapes that the code asks for are those of a step."""

    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 6)
            self.lif1, self.lif2 = snntorch.Leaky(beta=0.8), snntorch.Leaky(beta=0.8)

        def forward(self, x_seq):
            mem1, mem2, rec = self.lif1.reset_mem(), self.lif2.reset_mem(), []
            for x in x_seq:
                x = x.view(len(x), 1, 2, 4).repeat(1, 1, 2, 1)
                cur = max_pool2d(self.norm(self.conv(x)), 2)
                spikes, mem1 = self.lif1(cur, mem1)
                spikes, mem2 = self.lif2(self.fc(spikes.view(cur.size(0), -1)), mem2)
                rec.append(spikes.chunk(2, dim=1)[0] + mem2[:, :3])
            return torch.stack(rec)

    model = Convolutional()
    compare(model, model, asgl_cuda.convert(model, sequences="loop")[0])


def test_over_time_before_the_loop():
    """Its checks are those of a call with a tensor."""

    class Embedded(Net):
        def forward(self, x_seq):
            return stacked(self, asgl_cuda.OverTime(self.embedding)(x_seq))

    model = Embedded()
    model.embedding = nn.Linear(N, N)
    fast, _ = asgl_cuda.convert(model, sequences="loop")
    compare(model, model, fast)
    with pytest.raises(ValueError, match=r"OverTime: x_seq must be \[T, B, .*got shape \[12, 8\]"):
        fast(input_of()[:, 0])


def test_random_numbers_differ_by_step():
    """An input that is the same in each step is computed once, unless the function draws."""

    class Encoded(Net):
        def forward(self, x):
            return torch.stack([torch.bernoulli(x) for _ in range(50)]), [self.lif1(self.fc1(x))[0] for _ in range(2)]

    fast, _ = asgl_cuda.convert(Encoded(), sequences="loop")
    spikes, _ = fast(torch.full((B, N), 0.5))
    assert len({tuple(each.flatten().tolist()) for each in spikes}) == 50


@pytest.mark.parametrize("sequences", [True, "loop"])
def test_one_call_of_each_layer(sequences, monkeypatch):
    calls = []
    lif = Converted.lif
    monkeypatch.setattr(
        Converted, "lif", lambda self, *args, **options: calls.append(self) or lif(self, *args, **options)
    )
    model = type("Looped", (Net,), {"forward": stacked})() if sequences == "loop" else STEPS["snnTorch"]()
    fast, _ = asgl_cuda.convert(model, sequences=sequences)
    fast(input_of())
    assert len(calls) == len({*calls}) == 2


def fed_back(net, x_seq):
    states, spikes = [(), ()], torch.zeros(B, 6)
    for x in x_seq:
        states, spikes, _ = net.step(x + spikes.sum(1, keepdim=True), states)
    return spikes


def asked(net, x_seq):
    for _, spikes, mem in steps_of(net, x_seq):
        if spikes.sum() > 3:
            mem = mem * 2
    return mem


def read_back(net, x_seq):
    rec = torch.zeros(T, B, 6)
    for t, (_, spikes, _) in enumerate(steps_of(net, x_seq)):
        rec[t] = spikes
        rec[t].mean()
    return rec


def twice(net, x_seq):
    states, rec = (), []
    for x in x_seq:
        for _ in range(2):
            x, *states = net.lif1(x, *states)
        rec.append(x)
    return torch.stack(rec)


class Square(torch.autograd.Function):
    """A user's own."""

    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_function(net, x_seq):
    return torch.stack([net.step(Square.apply(x), [(), ()])[1] for x in x_seq])


def through_view(net, x_seq):
    for x in x_seq:
        current = net.fc1(x)
        some = current[:, :2]
        current.mul_(2)
        spikes, _ = net.lif1(current)
    return spikes + some.mean()


def checkpointed(net, x_seq):
    return torch.stack([net.lif1(checkpoint(net.fc1, x, use_reentrant=False))[0] for x in x_seq])


def changed(net, x_seq):
    states, rec = [(), ()], []
    for x in x_seq:
        states, spikes, _ = net.step(x, states)
        with torch.no_grad():
            net.lif1.threshold.mul_(1.01)
        rec.append(spikes)
    return torch.stack(rec)


def input_in_place(net, x_seq):
    x_seq += 1
    return stacked(net, x_seq)


def with_a_hook(net, x_seq):
    for _, _, mem in steps_of(net, x_seq):
        mem.register_hook(lambda gradient: 2 * gradient)
    return mem


def made_a_leaf(net, x_seq):
    return torch.stack([mem.requires_grad_() for _, _, mem in steps_of(net, x_seq)])


def with_out(net, x_seq):
    rec = torch.zeros(B, 6)
    with torch.no_grad():
        for _, spikes, _ in steps_of(net, x_seq):
            torch.add(rec, spikes, out=rec)
    return rec


def normalised_twice(net, x_seq):
    net.__dict__.setdefault("norm", nn.BatchNorm1d(6))
    return torch.stack([net.norm(net.norm(mem) + 1) for _, _, mem in steps_of(net, x_seq)])


REFUSED = {
    normalised_twice: "a batch_norm that updates running statistics must be called once per step",
    with_out: "add can't be recorded with the argument out; use what the function returns, or .* without sequences",
    with_a_hook: "register_hook of a value in a step can't be recorded.* without sequences",
    made_a_leaf: "requires_grad_ of a value in a step can't be recorded",
    changed: r"all steps of lif1 \(Leaky\) are computed at once, .* this code changes parameters or attributes",
    input_in_place: r"__iadd__ can't change the model's input, or .* as x \+ 1",
    fed_back: r"the input of lif1 \(Leaky\) and lif2 \(Leaky\) depends on earlier outputs of these layers",
    asked: r"all steps of lif1 \(Leaky\) are .* calls __bool__, as in `if spk\.sum\(\) > 0`, and so .*; remove",
    read_back: r"calls __getitem__ and so .*changes a tensor that the steps use; remove",
    twice: r"the input of lif1 \(Leaky\) depends on earlier outputs of this layer, .* used twice in a step",
    in_function: r"in the forward of a torch\.autograd\.Function, because",
    through_view: r"mul_ can't change a value of a step in place, because it shares memory with a view .* clone\(\)",
    checkpointed: "put the checkpoint around the model",
}


@pytest.mark.parametrize("loop", REFUSED, ids=lambda each: each.__name__)
def test_refused(loop):
    """The layers keep their states; the loop itself still runs."""
    model = type("Looped", (Net,), {"forward": loop})()
    fast, _ = asgl_cuda.convert(model, sequences="loop")
    before = [each.clone() for name, each in fast.named_buffers() if not name.endswith("threshold")]
    with pytest.raises(RuntimeError, match=REFUSED[loop]):
        fast(input_of())
    after = [each for name, each in fast.named_buffers() if not name.endswith("threshold")]
    assert all(map(torch.equal, before, after))
    model(input_of())


UNRECORDED = r" on a tensor that .* can't be recorded; use .* torch\.where or masked_fill, or .* without sequences$"
OF_INPUT = r" can't change the model's input, or a part of it, in place; change x\.clone\(\), or use "
IN_PLACE = {
    "an item": (lambda x, current: operator.setitem(current, 0, 1.0), rf"`tensor\[\.\.\.\] = value`{UNRECORDED}"),
    "zero_": (lambda x, current: current.zero_(), f"zero_{UNRECORDED}"),
    "an item of the input": (
        lambda x, current: operator.setitem(x, 0, 1.0),
        rf"`tensor\[\.\.\.\] = value`{UNRECORDED}",
    ),
    "mul_": (lambda x, current: x.mul_(2), f"mul_{OF_INPUT}mul$"),
    "a view": (lambda x, current: x[:, :1].mul_(2), f"mul_{OF_INPUT}mul$"),
    "relu": (lambda x, current: relu(x, inplace=True), f"relu{OF_INPUT}relu with inplace=False$"),
    "+=": (lambda x, current: operator.iadd(x, 1), rf"__iadd__{OF_INPUT}an operator .*, as x \+ 1$"),
}


@pytest.mark.parametrize(("change", "words"), IN_PLACE.values(), ids=IN_PLACE)
def test_what_changes_a_tensor_in_place_names_its_own_remedy(change, words):
    class Changing(Net):
        def forward(self, x):
            current = self.fc1(x)
            change(x, current)
            return self.lif1(current)[0]

    fast, _ = asgl_cuda.convert(Changing(), sequences=True)
    with pytest.raises(RuntimeError, match=f"asgl_cuda.convert: with sequences, {words}"):
        fast(input_of())


VIEWS = {
    "property": lambda x: x.T,
    "data": lambda x: x.data,
    "unbind": lambda x: x.unbind(1)[1],
    "fields": lambda x: x.split([1, 9], 1)[1],
    "diagonal": lambda x: torch.diagonal(x),
    "dropout in evaluation": lambda x: dropout(x, 0.5, training=False),
    "dtype as it is": lambda x: x.type(x.dtype),
    "a view of a view": lambda x: x.swapaxes(0, 1)[None].mT,
}


@pytest.mark.parametrize("changes_view", [True, False])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_change_in_place_that_views_would_show_is_refused(view, changes_view):
    class Changing(Net):
        def forward(self, x):
            current = self.fc1(x)
            some = view(current)
            (some if changes_view else current).mul_(2)
            return self.lif1(current + some.sum())[0]

    fast, _ = asgl_cuda.convert(Changing(), sequences=True)
    with pytest.raises(RuntimeError, match="mul_ can't change a value of a step in place, because it shares memory"):
        fast(input_of())


def test_a_change_in_place_after_the_view_is_gone():
    class Changing(Net):
        def forward(self, x):
            current = self.fc1(x).unflatten(1, (2, 5)).flatten(1)
            current.mul_(2)
            values, places = current.max(1, keepdim=True)
            values += places
            return self.lif1(current)[0] + values

    model = Changing()
    fast, _ = asgl_cuda.convert(model, sequences=True)
    torch.testing.assert_close(fast(input_of()), torch.stack([*map(model, input_of())]))


def test_the_shape_of_a_sum_over_many_steps():
    """Without recursion, which ends at a depth of 1,000."""

    class Counting(Net):
        def forward(self, x_seq):
            count = 0
            for x in x_seq:
                count = count + self.lif1(self.fc1(x))[0]
            return count / count.shape[0]

    model = Counting()
    x_seq = input_of(1200)
    fast, _ = asgl_cuda.convert(model, sequences="loop")
    with torch.no_grad():
        torch.testing.assert_close(fast(x_seq), model(x_seq))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("is_used", [True, False])
def test_running_statistics(momentum, is_used):
    """In the order of the steps, which counts if each has a momentum of its own; also of values that nothing uses."""

    class Normalised(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(10, momentum=momentum)

        def forward(self, x_seq):
            rec, mem = [], self.lif1.reset_mem()
            for x in x_seq:
                current = self.fc1(x)
                normal = self.norm(current)
                spikes, mem = self.lif1(normal if is_used else current, mem)
                rec.append(spikes)
            return torch.stack(rec)

    model = Normalised()
    compare(model, model, asgl_cuda.convert(model, sequences="loop")[0])


def test_a_stack_of_the_last_state():
    """Of which alone the layer keeps a value, if the layer was computed before."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = neuron.LIFNode()

        def forward(self, x_seq):
            for x in x_seq:
                spikes = self.lif(x)
            assert spikes.sum() < 1e9  # computes the layer
            return torch.stack([self.lif.v, self.lif.v])

    model = Late()
    compare(model, model, asgl_cuda.convert(model, sequences="loop")[0])


def test_a_tuple_of_each_step():
    class Largest(Net):
        def forward(self, x):
            return self.lif1(self.fc1(x))[0].max(1)

    fast, _ = asgl_cuda.convert(Largest(), sequences=True)
    for steps in (1, T):
        values, places = fast(input_of(steps))
        assert values.shape == places.shape == (steps, B)


class Switching(Net):
    """Returns what `kinds[0]` makes of the spikes and currents of the first step, and `kinds[1]` of later ones."""

    def forward(self, x):
        current = self.fc1(x)
        spikes = self.lif1(current)[0]
        self.calls = getattr(self, "calls", 0) + 1
        return self.kinds[min(self.calls, 2) - 1](spikes, current)


def test_a_dict_with_its_keys_in_another_order():
    model = type("Net", (Switching,), {"kinds": (lambda s, i: {"s": s, "i": i}, lambda s, i: {"i": i, "s": s})})()
    found = asgl_cuda.convert(model, sequences=True)[0](input_of())
    steps = [model(x) for x in input_of()]
    assert list(found) == ["s", "i"]
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in steps]))


SWITCHES = {
    "other keys": (
        lambda s, i: {"s": s},
        lambda s, i: {"s": s, "i": i},
        r"\{s: tensor\} in .* \{s: tensor, i: tensor\}",
    ),
    "a longer list": (lambda s, i: [s, None], lambda s, i: [s, None, 1], r"list\(tensor, NoneType\) in .*, int\)"),
    "another type": (
        lambda s, i: {"s": (s,)},
        lambda s, i: {"s": [s]},
        r"\{s: tuple\(tensor\)\} in .* \{s: list\(tensor\)\}",
    ),
}


@pytest.mark.parametrize(("first", "second", "words"), SWITCHES.values(), ids=SWITCHES)
def test_outputs_of_another_structure(first, second, words):
    model = type("Net", (Switching,), {"kinds": (first, second)})()
    with pytest.raises(RuntimeError, match=f"must return the same structure in each step, got {words} in step 1$"):
        asgl_cuda.convert(model, sequences=True)[0](input_of())


def test_a_loop_is_no_step():
    fast, _ = asgl_cuda.convert(type("Looped", (Net,), {"forward": stacked})(), sequences=True)
    with pytest.raises(RuntimeError, match=r'lif1 \(Leaky\) has had 3 calls after step 1; use sequences="loop"'):
        fast(input_of())


@pytest.mark.parametrize("rest", [lambda lif: lif.reset_mem(), lambda lif: torch.zeros(B, 10)], ids=["reset", "zeros"])
def test_states_as_arguments(rest):
    """A model whose caller passes the states; called without them, each step would start at rest."""

    class Passing(Net):
        def forward(self, x, mem=None):
            return self.lif1(self.fc1(x), rest(self.lif1) if mem is None else mem)

    fast, _ = asgl_cuda.convert(Passing(), sequences=True)
    with pytest.raises(RuntimeError, match=r'resets lif1 \(Leaky\) in each step; .* sequences="loop"$'):
        fast(input_of())


def test_models_refused():
    hidden = snntorch.Leaky(beta=0.9, **HIDDEN)
    models = {
        "0 .Alpha. is left: asgl_cuda has no such neuron": nn.Sequential(snntorch.Alpha(alpha=0.9, beta=0.8), hidden),
        "1 .LIF. takes a sequence": nn.Sequential(hidden, asgl_cuda.LIF()),
        "0 .MultiStep. takes a sequence": nn.Sequential(asgl_cuda.interop.snntorch.MultiStep(snntorch.Leaky(0.9))),
        "0 .IFNode. takes a sequence": nn.Sequential(neuron.IFNode(step_mode="m")),
        "got none": nn.Linear(2, 2),
        '1 .LIFCell. gets its state from its caller; .* sequences="loop"': norse.SequentialState(
            nn.Linear(N, 10), norse.LIFCell()
        ),
        r"\(the model\) .LICell. gets its state": norse.LICell(),
    }
    for message, model in models.items():
        kinds = [type(each) for each in model.modules()]
        with pytest.raises(ValueError, match=message):
            asgl_cuda.convert(model, sequences=True, inplace=True)
        assert [type(each) for each in model.modules()] == kinds
    with pytest.raises(ValueError, match='sequences must be False, True or "loop", got 1'):
        asgl_cuda.convert(hidden, sequences=1)


@pytest.mark.parametrize("args", [(), (torch.rand(2, 3, N),) * 2, (torch.rand(0, 3, N),), (None,)])
def test_arguments_refused(args):
    fast, _ = asgl_cuda.convert(STEPS["snnTorch"](), sequences=True)
    with pytest.raises((TypeError, ValueError), match=r"x_seq .*\[T, \.\.\.\]"):
        fast(*args)
    with pytest.raises(TypeError, match=r"one tensor by position, x_seq \[T, \.\.\.\], got x=Tensor$"):
        fast(x=torch.rand(2, 3, N))


class EverySecond(nn.Module):
    """Returns its spikes in every second step."""

    def __init__(self):
        super().__init__()
        self.neurons, self.steps = snntorch.Leaky(0.9, init_hidden=True), 0

    def forward(self, x):
        self.steps += 1
        spikes = self.neurons(x)
        return spikes if self.steps % 2 else None


def test_an_output_that_is_missing_in_a_step_is_refused():
    fast, _ = asgl_cuda.convert(EverySecond(), sequences=True)
    with pytest.raises(TypeError, match=r"got Tensor in step 0 and NoneType in step 1$"):
        fast(torch.rand(2, 3, N))


def test_one_step_of_a_batch_is_warned_of(monkeypatch):
    """Once, since the batch would be taken for time."""
    monkeypatch.setattr(asgl_cuda.checks, "_warned", set())
    fast, _ = asgl_cuda.convert(STEPS["snnTorch"](), sequences=True)
    with pytest.warns(UserWarning, match=r"sequences=True got .* \[3, 8\], of which dimension 0 .* asgl_cuda\.step"):
        fast(input_of()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(input_of()[0])
        fast(input_of())


@pytest.mark.parametrize("library", ["snnTorch", "SpikingJelly"])
def test_a_copy_after_a_step_of_training(library):
    """As of the original model, whose states have the graph as well."""
    fast, _ = asgl_cuda.convert(STEPS[library](), sequences=True)
    loss = sum(each.sum() for each in tensors(fast(input_of())))
    loss.backward()
    asgl_cuda.reset(fast)
    copied = tensors(copy.deepcopy(fast)(input_of()))
    assert all(map(torch.equal, copied, tensors(fast(input_of()))))


def test_states():
    """At rest at each call, or going on; single steps; steps after an error."""
    fast, _ = asgl_cuda.convert(STEPS["snnTorch"](), sequences=True)
    x_seq = input_of()
    with torch.no_grad():
        spikes = fast(x_seq)[0]
        assert torch.equal(fast(x_seq)[0], spikes)
        for _ in range(2):  # from rest after a whole call, without a reset
            assert torch.equal(torch.stack([asgl_cuda.step(fast, x)[0] for x in x_seq]), spikes)
            assert torch.equal(fast(x_seq)[0], spikes)
        assert not fast.stateful
        with pytest.raises(RuntimeError):
            fast(x_seq[..., 1:])
        fast.stateful = True
        assert torch.equal(torch.cat([fast(x_seq[:1])[0], fast(x_seq[1:])[0]]), spikes)
        layers = [layer for layer in fast.modules() if isinstance(layer, Converted)]
        kept = [layer.carried_states() for layer in layers]
        expected = fast(x_seq)[0]
        fast.stateful = False
        fast(x_seq)
        fast.stateful = True
        asgl_cuda.reset(fast)  # states that are set after it are continued
        for layer, states in zip(layers, kept, strict=True):
            for name, state in states.items():
                layer.set_state(name, state)
        assert torch.equal(fast(x_seq)[0], expected)
        fast.stateful = False
        loop, _ = asgl_cuda.convert(type("Looped", (Net,), {"forward": stacked})(), sequences="loop")
        with pytest.raises(RuntimeError, match="has a loop over the steps; write a module for one step"):
            asgl_cuda.step(loop, x_seq[0])
        loop.stateful = True
        with pytest.raises(RuntimeError, match="stateful=True is for models converted with sequences=True"):
            loop(x_seq)


def test_a_loop_that_forward_does_not_have(monkeypatch):
    monkeypatch.setattr(asgl_cuda.checks, "_warned", set())
    fast, _ = asgl_cuda.convert(STEPS["snnTorch"](), sequences="loop")
    with pytest.warns(
        UserWarning, match="forward called no neuron layer more than once, .* convert with sequences=True"
    ):
        fast(input_of())


def test_nothing_is_kept():
    """Without a garbage collection, which does not see the memory of a GPU."""
    fast, _ = asgl_cuda.convert(STEPS["snnTorch"](), sequences=True)
    gc.disable()
    try:
        x_seq = input_of()
        given = weakref.ref(x_seq)
        with torch.no_grad():
            fast(x_seq)
        del x_seq
        assert given() is None
    finally:
        gc.enable()


def test_overlay():
    """Copies, names of parameters, and `revert`."""
    model = STEPS["snnTorch"]()
    fast, _ = asgl_cuda.convert(model, sequences=True)
    x_seq = input_of()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fast)(x_seq)[0], fast(x_seq)[0])
    assert [*fast.state_dict()] == [*model.state_dict()]
    assert isinstance(fast, nn.Sequential)
    original, _ = asgl_cuda.revert(fast)
    assert [type(each) for each in original.modules()] == [type(each) for each in model.modules()]


def test_seen_by_hooks_and_modes():
    """Monitor, a checkpoint around the model, torch.compile and autocast see what they see in a loop."""
    fast, _ = asgl_cuda.convert(STEPS["snnTorch"](), sequences=True)
    x_seq = input_of()
    with asgl_cuda.Monitor(fast) as monitor:
        spikes = fast(x_seq)[0]
    assert monitor.result()["3"]["firing_rate"] == pytest.approx(float(spikes.mean()))
    one, other = (x_seq.clone().requires_grad_() for _ in range(2))
    fast(one)[2].sum().backward()
    checkpoint(fast, other, use_reentrant=False)[2].sum().backward()
    assert torch.equal(one.grad, other.grad)
    with torch.no_grad():
        assert torch.equal(torch.compile(fast, backend="eager")(x_seq)[0], fast(x_seq)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x_seq.float())[1].dtype is torch.float64
