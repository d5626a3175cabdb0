"""`convert(model, sequences=...)`: random loops over steps give their own results and gradients, or are refused."""

import random
import re
from itertools import pairwise

import pytest
import snntorch
import torch
from torch import nn

import asgl_cuda

pytestmark = pytest.mark.usefixtures("in_double", "spikes_in_double")
B, N = 3, 4
stack, cat = torch.stack, torch.cat


def in_place(a, b):
    c = a + b
    d = c
    d -= 1
    c.mul_(0.5)
    return c + d


def through_dict(a, b):
    found = {"a": [a, b], "b": (b,)}
    return found["a"][1] * found["b"][0] + found["a"][0]


def in_place_of_less_precision(a, b):
    c = a.to(torch.float32)
    c += b
    return c.double()


def sizes(a, b):
    left, right = a.split([1, N - 1], 1)
    places = b.max(1, keepdim=True).indices
    return (right * right.shape[1]).sum(1, keepdim=True) + left.cpu().shape[1] + torch.zeros_like(places) / 2 + b


def max_and_place(a, b):
    values, places = a.max(1, keepdim=True)
    return b * values + places


# From two values of a step, [B, N], and the number of the step to a third one.
IN_STEP = {
    "stack": lambda a, b, t: stack([a, b]).sum(0),
    "stack of one": lambda a, b, t: stack([a])[0] + b,
    "stack of equals": lambda a, b, t: stack([a, a], 1).mean(1) + b,
    "stack of columns": lambda a, b, t: stack([a[:, 2], a[:, 0], b[:, 1], a[:, 2]], 1),
    "stack of rows": lambda a, b, t: stack(list(a)) - b,
    "stack of indexed rows": lambda a, b, t: stack([a[i] for i in range(B)]) - b,
    "stack of a tuple": lambda a, b, t: stack(tuple(x * 2 for x in (a, b, a)), -1).amax(-1),
    "stack of unbound": lambda a, b, t: stack(a.unbind(1)[::-1], 1) + b,
    "stack of chunks": lambda a, b, t: stack(a.chunk(2, 1)).sum(0).repeat(1, 2) * b,
    "stack of stacks": lambda a, b, t: stack([stack([a, b]), stack([b, b])]).sum((0, 1)),
    "cat": lambda a, b, t: cat([a[:, :1], b, a[:, :2]], 1)[:, 1 : N + 1],
    "cat of equals": lambda a, b, t: cat([a, a])[1 : B + 1] + b,
    "hstack": lambda a, b, t: torch.hstack([a[:, :2], a[:, 2:]]) * b,
    "vstack": lambda a, b, t: torch.vstack([a, b, a])[2 : B + 2],
    "dstack": lambda a, b, t: torch.dstack([a, b, b]).sum(-1),
    "column_stack": lambda a, b, t: torch.column_stack([a[:, i] for i in (3, 0, 0)] + [b[:, 1]]),
    "sum of a list": lambda a, b, t: sum([a, b, a, a]),
    "max of a list": lambda a, b, t: torch.amax(stack([a, b]), 0),
    "einsum": lambda a, b, t: torch.einsum("bi,bj->bj", a, b),
    "fields": lambda a, b, t: a.max(1).values[:, None] * b + torch.aminmax(a, dim=0).min,
    "sorted": lambda a, b, t: a.sort(1).values + b.sort(1, descending=True).indices,
    "unpacked": lambda a, b, t: max_and_place(a, b),
    "topk": lambda a, b, t: a.topk(2, 1)[0].repeat(1, 2) + torch.topk(b, 2).values[:, :1],
    "where": lambda a, b, t: torch.where(a > b, a, -b),
    "step in a number": lambda a, b, t: a * t + b,
    "step in an index": lambda a, b, t: a[:, t % N, None] + b,
    "step in a shift": lambda a, b, t: a.roll(t, 1) + b,
    "every other step": lambda a, b, t: a + b if t % 2 else a - b,
    "in place": lambda a, b, t: in_place(a, b),
    "in place, of less precision": lambda a, b, t: in_place_of_less_precision(a, b),
    "signed zero": lambda a, b, t: torch.atan2(a * 0, b * (-0.0 if t % 2 else 0.0) - 0.0) + b,
    "sizes": lambda a, b, t: sizes(a, b),
    "a dict": lambda a, b, t: through_dict(a, b),
    "detached": lambda a, b, t: a.detach() + b,
    "transposed": lambda a, b, t: a.T.flip(0).T + b,
}  # fmt: skip
# From a list of earlier values, not empty, to a value [B, N]. Also called in a step.
OF_LIST = {
    "last": lambda r: r[-1] * 1,
    "first": lambda r: r[0] + r[-1],
    "middle": lambda r: r[len(r) // 2] * 2,
    "all": lambda r: stack(r).mean(0),
    "reversed": lambda r: stack(r[::-1])[0] + r[0],
    "strided": lambda r: stack(r[::2]).sum(0),
    "last two": lambda r: stack(r[-2:]).sum(0),
    "first two": lambda r: stack(tuple(r[:2]), 1).sum(1),
    "two parts": lambda r: stack(r[: (len(r) + 1) // 2]).sum(0) - stack(r[len(r) // 2 :]).sum(0),
    "cat": lambda r: cat(r).reshape(len(r), B, N).amax(0),
    "cat of columns": lambda r: cat(r, 1)[:, -N:],
    "vstack": lambda r: torch.vstack(r)[:B] + torch.hstack(r)[:, :N],
    "sum": lambda r: sum(r) / 3,
    "windows": lambda r: stack([stack(r[t : t + 2]).sum(0) for t in range(len(r))]).mean(0),
    "growing": lambda r: stack([stack(r[: t + 1]).mean(0) for t in range(len(r))]).sum(0),
    "members of the stack": lambda r: stack([stack(r)[t] for t in range(len(r))]).sum(0),
    "differences": lambda r: sum((b - a for a, b in pairwise(r)), r[0]),
    "repeated": lambda r: stack([r[0], r[0], r[-1]]).sum(0) + stack([r[-1]] * 2).mean(0),
    "best step": lambda r: stack(r).max(0).values + stack(r).argmax(0),
    "nested": lambda r: stack([stack([a, b]).sum(0) for a, b in zip(r, r[::-1], strict=True)]).amax(0),
}


class Program(nn.Module):
    """Statements of a loop, drawn by the seed. Each appends a value to those of the step, or calls a layer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.steps, self.is_looped = draw.choice([1, 2, 3, 5]), draw.random() < 0.75
        self.fc = nn.ModuleList([nn.Linear(N, N) for _ in range(2)])
        self.mix = nn.Sequential(nn.Linear(N, N), nn.Tanh())
        options = {"beta": 0.8, "threshold": 0.6, "init_hidden": draw.random() < 0.5 or not self.is_looped}
        self.lif = nn.ModuleList([snntorch.Leaky(output=True, **options) for _ in range(2)])
        kinds = ["of step"] * 4 + ["mix"] + self.is_looped * ["record", "of list", "add", "add in place", "write"]
        middle = [draw.choice(kinds) for _ in range(draw.randint(1, 4))]
        last = [draw.choice(kinds) for _ in range(draw.randint(1, 5))]
        self.statements = [
            (kind, draw.choice([*IN_STEP]), draw.choice([*OF_LIST]), draw.random(), draw.random())
            for kind in ("layer", *middle, "layer", *last)
        ]
        self.begins_with_zeros = draw.random() < 0.3
        self.results = [(draw.choice([*OF_LIST]), draw.random()) for _ in range(2)]

    def step(self, x, t, mems, kept):
        values, layer = [x], 0
        for n, (kind, step_function, list_function, *places) in enumerate(self.statements):
            a, b = (values[int(place * len(values))] for place in places)
            lists = [each for each in kept["lists"].values() if each]
            if kind == "layer":
                values += self.lif[layer](self.fc[layer](a), *mems[layer : layer + 1])
                mems[layer : layer + 1] = values[-1:] if mems else []
            elif kind == "of step":
                values.append(IN_STEP[step_function](a, b, t))
            elif kind == "mix":
                values.append(stack([self.mix(a), self.mix(b), self.mix(a)]).sum(0))
            elif kind == "record":
                kept["lists"].setdefault(n, []).append(a)
            elif kind == "of list" and lists:
                values.append(OF_LIST[list_function](lists[int(places[0] * len(lists))]))
            elif kind == "add":
                kept["sums"][n] = kept["sums"].get(n, 0) + a
            elif kind == "add in place":
                kept["sums"].setdefault(n, torch.zeros(B, N)).add_(a)
            elif kind == "write":
                kept["sums"].setdefault(n, torch.zeros(self.steps, B, N))[t] = a
            layer += kind == "layer"
        return values

    def forward(self, x_seq):
        if not self.is_looped:
            return tuple(self.step(x_seq, 0, [], {"lists": {}, "sums": {}})[1:])
        mems = [] if self.lif[0].init_hidden else [each.reset_mem() for each in self.lif]
        kept = {"lists": {"all": [torch.zeros(B, N)] * self.begins_with_zeros}, "sums": {}}
        for t, x in enumerate(x_seq):
            kept["lists"]["all"].append(self.step(x, t, mems, kept)[-1])
        lists = [*kept["lists"].values()]
        found = [OF_LIST[name](lists[int(place * len(lists))]) for name, place in self.results]
        return {"found": found, "sums": [each * 1 for each in kept["sums"].values()], "all": stack(lists[0])}


def leaves(value):
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else None
    return [value] if values is None else [leaf for each in values for leaf in leaves(each)]


def run(model, call, x_seq):
    asgl_cuda.reset(model)
    leaf = x_seq.clone().requires_grad_()
    output = leaves(call(leaf))
    total = 0 * leaf.sum()  # programs may return constants alone
    for each in output:
        total = total + (each * torch.arange(1.0, 1 + each.numel()).reshape(each.shape).cos()).sum()
    # Zeros for no gradient: a parameter that only unused steps need has none in the loop, and zeros if it is converted.
    return output, torch.autograd.grad(total, [leaf, *model.parameters()], allow_unused=True, materialize_grads=True)


def is_equal(model, seed=0):
    """Compares the converted loop. Returns False if it is refused."""
    x_seq = 3 * torch.rand(model.steps, B, N, generator=torch.Generator().manual_seed(seed))
    call = model if model.is_looped else lambda x_seq: [stack(each) for each in zip(*map(model, x_seq), strict=True)]
    expected = run(model, call, x_seq)
    fast, _ = asgl_cuda.convert(model, sequences="loop" if model.is_looped else True)
    try:
        found = run(fast, fast, x_seq)
    except RuntimeError as error:
        if not re.match("asgl_cuda.convert: with sequences, .* without sequences", str(error)):
            raise
        return False
    for one, other in zip((*expected[0], *expected[1]), (*found[0], *found[1]), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)  # float64: the order of sums alone differs
    return True


@pytest.mark.filterwarnings("ignore:.*called no neuron layer more than once")  # some have a single step
def test_programs():
    """Refused are those alone that feed a layer with what it emitted before."""
    assert sum(is_equal(Program(seed), seed) for seed in range(150)) > 135


@pytest.mark.parametrize("begins_with_zeros", [False, True])
@pytest.mark.parametrize("name", [*IN_STEP, *OF_LIST])
def test_operation(name, begins_with_zeros):
    model = Program(9)
    model.steps, model.begins_with_zeros = 5, begins_with_zeros
    if name in IN_STEP:
        model.statements = [("layer", "", "", 0, 0), ("of step", name, "", 0.99, 0.5), ("of step", name, "", 0.99, 0.5)]
    else:
        model.statements, model.results = [("layer", "", "", 0, 0)], [(name, 0)]
    assert is_equal(model)


def test_a_result_is_missing(monkeypatch):
    vmap = torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda *args, **kwargs: lambda *values: vmap(*args, **kwargs)(*values)[1:])
    model = Program(9)
    fast, _ = asgl_cuda.convert(model, sequences="loop")
    with pytest.raises(RuntimeError, match=r"\d+ calls of linear must give as many results, got \d+\. .* report it"):
        fast(torch.rand(model.steps, B, N))
