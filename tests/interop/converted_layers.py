"""The comparison of a layer of another library with its conversion."""

import libraries  # noqa: F401
import torch

import asgl_cuda
from asgl_cuda.selfcheck import THRESHOLD_BAND

SHAPE = (5, 3, 7)  # T, B, neurons
CALLS = 3
# A share of the largest value: two orders of the same sums differ by some tens of float32 roundings.
TOLERANCE = 1e-5


class Trace:
    """A layer's record of several calls: all tensors are [calls * T, ...], `h` is the potential before reset."""

    def __init__(self, s, v, h, grads):
        self.s, self.v, self.h, self.grads = s, v, h, grads


def trace(layer, run, x, grads):
    """`run(layer, x)` is called for each of `x` with the state that the layer keeps, and returns s, v and h."""
    leaves = [each.clone().requires_grad_() for each in x]
    parts = [run(layer, leaf) for leaf in leaves]
    s, v, h = (torch.cat(values) for values in zip(*parts, strict=True))
    loss = (s * grads[0]).sum() + (v * grads[1]).sum()
    parameters = [value for _, value in sorted(layer.named_parameters()) if value.requires_grad]
    return Trace(s.detach(), v.detach(), h, torch.autograd.grad(loss, [*leaves, *parameters]))


def close(ours, theirs):
    return bool(((ours - theirs).abs() <= TOLERANCE * theirs.abs().max().clamp(min=1)).all())


def check(make, run, threshold=1.0, scale=1.0, dead_parameters=False, several=False):
    """Compares a layer with its conversion: spikes equal, unless both potentials are as good as at the threshold.

    With `several` spikes a step, every multiple of it is one.

    A spike that flips changes everything after it, so an input on which one does is only checked for that.
    """
    for seed in range(6):
        torch.manual_seed(seed)
        x = [scale * torch.randn(SHAPE) for _ in range(CALLS)]
        grads = torch.randn(2, CALLS * SHAPE[0], *SHAPE[1:])
        layer = make()
        fused, report = asgl_cuda.convert(make(), inplace=True)
        assert [row.path for row in report.replaced] == [""], report
        assert type(fused) is not type(layer)
        assert isinstance(fused, type(layer))
        theirs, ours = trace(layer, run, x, grads), trace(fused, run, x, grads)
        flips = ours.s != theirs.s
        if flips.any():
            first = flips & (flips.cumsum(0) == 1)
            nearest = ((theirs.h / threshold).round() * threshold) if several else threshold
            distance = torch.maximum((theirs.h - nearest).abs(), (ours.h - nearest).abs())
            assert (distance[first] < THRESHOLD_BAND).all(), "a spike differs away from the threshold"
            continue
        assert 0.02 < (theirs.s != 0).float().mean() < 0.98
        assert (theirs.s.max() > 1) == several
        assert close(ours.v, theirs.v)
        assert len(ours.grads) == len(theirs.grads)
        for number, (our, their) in enumerate(zip(ours.grads, theirs.grads, strict=True)):
            assert their.abs().max() > 0 or (number >= CALLS and dead_parameters)
            assert close(our, their), f"gradient {number} differs by {(our - their).abs().max()}"
        return
    raise AssertionError("spikes flipped for every seed")


def leaky_steps_of(layer, x_seq):
    """The outputs of steps that hand on what they return, each stacked."""
    steps, states = [], ()
    for x in x_seq:
        steps.append(layer(x, *states))
        states = steps[-1][1:]
    return [torch.stack(values) for values in zip(*steps, strict=True)]


def norse_run(layer, x_seq):
    """What it returns for the potential has the current in it, where there is one, to be compared with it."""
    state, p = getattr(layer, "kept", None), layer.p
    s, v, h = [], [], []
    for x in x_seq:
        kept = layer.initial_state(x) if state is None else state
        current = x + (kept.i if hasattr(kept, "i") else 0)
        charged = layer.dt * p.tau_mem_inv * (current + p.v_leak - kept.v) if hasattr(p, "v_leak") else current
        h.append((kept.v + charged).detach().expand(x.shape))
        spike, state = layer(x, state)
        s.append(spike)
        v.append(state.v + getattr(state, "i", 0))
    layer.kept = state
    return torch.stack(s), torch.stack(v), torch.stack(h)


def norse_run_whole(layer, x_seq):
    """The same of a layer that takes a sequence, and records its states."""
    kept = getattr(layer, "kept", None)
    s, states = layer(x_seq, kept)
    layer.kept = type(states)(*(each[-1] for each in states))
    start, p = layer.initial_state(x_seq) if kept is None else kept, layer.p
    before = {name: torch.cat([getattr(start, name).expand(x_seq.shape[1:])[None], getattr(states, name)[:-1]])
              for name in states._fields}  # fmt: skip
    current = x_seq + before.get("i", 0)
    charged = layer.dt * p.tau_mem_inv * (current + p.v_leak - before["v"]) if hasattr(p, "v_leak") else current
    return s, sum(states), (before["v"] + charged).detach()


def assert_same(make, call, x, options=()):
    """Outputs, and gradients of x and of parameters, of a layer that does not fire and of its conversion."""
    layer, (fused, report) = make(), asgl_cuda.convert(make(), **dict(options))
    assert [row.by for row in report.replaced] == ["leaky_integrator"], report
    results = []
    for each in (layer, fused):
        leaf = x.clone().requires_grad_()
        outputs = call(each, leaf)
        weighted = [(out * torch.arange(1.0, 1 + out.numel()).reshape(out.shape).cos()).sum() for out in outputs]
        leaves = [leaf, *(value for value in each.parameters() if value.requires_grad)]
        results.append([*outputs, *torch.autograd.grad(sum(weighted), leaves)])
    for ours, theirs in zip(*results[::-1], strict=True):
        assert theirs.any()
        assert ours.shape == theirs.shape
        assert close(ours, theirs), (ours - theirs).abs().max()
    return fused
