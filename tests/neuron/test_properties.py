"""Whole calls at random: any shape, layout, type and option that `lif` takes has the same properties."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from comparison import assert_equals_reference, real_of, rng_state, uniform
from torch import Tensor

import asgl_cuda
from asgl_cuda.selfcheck import EXACT_SURROGATES
from asgl_cuda.surrogate import SURROGATES

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EVERY = {"return_v_last": True, "return_v_seq": True, "return_h_seq": True}

# Examples do not change the backend or the device, which are function-scoped.
many = settings(
    deadline=None,
    derandomize=True,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Around segments of 4, 8 and 16 steps, groups of 4 neurons and the width of vectors; with some sizes
# several runs fit in a tile.
STEPS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 18, 32, 33, 40)
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 67, 400, 700)
MOST_ELEMENTS = 40000  # processed by one CPU thread
MOST_NEURONS = 3000
ANALOG_PROBS = (0.0, 1 / 65536, 0.2, 0.7, 1.0)

RANGES = {
    "width": (0.5, 1.5),
    "decay": (0.3, 0.9),
    "v_threshold": (0.7, 1.2),
    "v_reset": (-0.3, 0.3),
    "reset_amount": (0.6, 1.2),
    "input_gain": (0.8, 1.2),
    "input_bias": (-0.1, 0.1),
    "input_mean": (-0.1, 0.1),
}


class TensorSpec(NamedTuple):
    """A parameter's shape and whether its gradient is asked for."""

    shape: tuple[int, ...]
    requires_grad: bool


class Call(NamedTuple):
    """A call without its values: `tensors` builds them, so that a failing example is readable."""

    shape: tuple[int, ...]
    memory_order: tuple[int, ...]  # the dimensions of x_seq, outermost first
    sliced_dim: int | None  # the dimension in which x_seq is every second element of a larger tensor
    dtype: torch.dtype
    parameters: dict[str, TensorSpec | float]
    v_init: TensorSpec | None
    options: dict[str, Any]
    seed: int

    def tensors(self, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """x_seq, a leaf with the layout of the call, and the options of `lif`."""
        torch.manual_seed(self.seed)
        real = real_of(self.dtype)
        sizes = [self.shape[dim] for dim in self.memory_order]
        if self.sliced_dim is not None:
            sizes[self.memory_order.index(self.sliced_dim)] *= 2
        values = uniform(*sizes, low=-1.0, high=2.0, dtype=self.dtype, device=device).detach()
        x_seq = values.permute([self.memory_order.index(dim) for dim in range(len(sizes))])
        if self.sliced_dim is not None:
            x_seq = x_seq.unflatten(self.sliced_dim, (-1, 2)).select(self.sliced_dim + 1, 1)
        assert x_seq.shape == self.shape
        options = dict(self.options)
        specs = {**self.parameters, **({} if self.v_init is None else {"v_init": self.v_init})}
        for name, spec in specs.items():
            low, high = RANGES.get(name, (-1.0, 1.0))
            if isinstance(spec, TensorSpec):
                leaf = uniform(*spec.shape, low=low, high=high, dtype=real, device=device)
                options[name] = leaf.requires_grad_(spec.requires_grad)
            else:
                options[name] = low + spec * (high - low)
        if "reset_amount" in options:
            options["v_reset"] = None
        options["rng_state"] = rng_state(self.seed, self.seed // 7, device)
        return x_seq.requires_grad_(), options


@st.composite
def calls(draw: st.DrawFn, analog_probs: tuple[float, ...] = ANALOG_PROBS, min_steps: int = 1) -> Call:
    dims = min(draw(st.integers(1, 8)), 5)  # channels_last needs 4 or 5
    time_dim = draw(st.integers(0, dims - 1))
    shape = []
    steps = draw(st.sampled_from([steps for steps in STEPS if steps >= min_steps]))
    room = min(MOST_NEURONS, MOST_ELEMENTS // steps)
    for dim in range(dims):
        if dim == time_dim:
            shape.append(steps)
        else:
            shape.append(draw(st.sampled_from([size for size in SIZES if size <= room])))
            room //= shape[-1]

    in_order = tuple(range(dims))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "channels_last", "transposed", "any order"]))
    order = in_order
    if layout == "channels_last" and dims > 3:
        channel = 2 if time_dim <= 1 else 1
        order = (*(dim for dim in in_order if dim != channel), channel)
    elif layout == "transposed" and dims > 1:
        first = draw(st.integers(0, dims - 2))
        order = (*in_order[:first], first + 1, first, *in_order[first + 2 :])
    elif layout == "any order":
        order = tuple(draw(st.permutations(in_order)))

    surrogate = draw(st.sampled_from(list(SURROGATES)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))

    def tensor_spec() -> TensorSpec:
        full = shape[dims - draw(st.integers(0, dims)) :]
        kept = draw(st.lists(st.booleans(), min_size=len(full), max_size=len(full)))
        sizes = tuple(size if keep else 1 for size, keep in zip(full, kept, strict=True))
        requires_grad = draw(st.sampled_from([True, True, False]))
        # A gradient's term is a difference, possibly as small as its operands' roundings. Such errors show where bits
        # differ between backends and few terms are summed; float64 is precise enough for two thousand elements.
        few_terms = math.prod(shape) < 8 * math.prod(sizes)
        same_bits = surrogate in EXACT_SURROGATES or (dtype == torch.float64 and math.prod(shape) <= 2000)
        return TensorSpec(sizes, requires_grad and (same_bits or not few_terms))

    reset = draw(st.sampled_from(["v_reset", "reset_amount", "threshold"]))
    names = ["width", "decay", "v_threshold", "input_gain", "input_bias", "input_mean"]
    names += [] if reset == "threshold" else [reset]
    parameters: dict[str, TensorSpec | float] = {}
    for name in names:
        kind = draw(st.sampled_from(["default", "float", "tensor", "tensor"]))
        if kind == "tensor":
            parameters[name] = tensor_spec()
        elif kind == "float":
            parameters[name] = draw(st.sampled_from([0.0, 0.25, 1.0]))
    options: dict[str, Any] = {"v_reset": None} if reset == "threshold" else {}

    v_init = None
    if draw(st.booleans()):
        v_init = TensorSpec(tuple(shape[:time_dim] + shape[time_dim + 1 :]), draw(st.booleans()))
    options |= {
        "time_dim": draw(st.sampled_from([time_dim, time_dim - dims])),
        "surrogate": surrogate,
        "surrogate_gain": draw(st.sampled_from([1.0, 1.7])),
        "v_rest": draw(st.sampled_from([0.0, 0.25])),
        "strict_threshold": draw(st.booleans()),
        "scale_output": draw(st.booleans()),
        "detach_reset": draw(st.booleans()),
        "analog_prob": draw(st.sampled_from(analog_probs)),
    }
    sliced_dim = draw(st.none() | st.none() | st.integers(0, dims - 1))
    seed = draw(st.integers(0, 2**40))
    return Call(tuple(shape), order, sliced_dim, dtype, parameters, v_init, options, seed)


def leaves_of(x_seq: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {"x_seq": x_seq, **{name: value for name, value in options.items() if isinstance(value, Tensor)}}
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


@many
@given(call=calls())
def test_equals_reference(backend, device, call):
    x_seq, options = call.tensors(device)
    assert_equals_reference(x_seq, backend, **options)


@many
@given(call=calls())
def test_promises_of_any_call(backend, device, call):
    """Shapes and types, hard spikes outside the mask, and the same bits on any number of threads."""
    x_seq, options = call.tensors(device)
    leaves = leaves_of(x_seq, options)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = asgl_cuda.lif(x_seq, **options, **EVERY, backend=backend)
            generator = torch.Generator().manual_seed(0)
            grads = [torch.randn(each.shape, generator=generator).to(each) for each in out]
            runs.append((*out, *torch.autograd.grad(out, list(leaves.values()), grads)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))

    assert out.s_seq.shape == out.v_seq.shape == out.h_seq.shape == x_seq.shape
    assert out.v_last.dtype == out.v_seq.dtype == out.h_seq.dtype == real_of(x_seq.dtype)
    assert torch.equal(out.v_last, out.v_seq.select(options["time_dim"], -1))
    for leaf, each in zip(leaves.values(), runs[0][4:], strict=True):
        assert (each.shape, each.dtype) == (leaf.shape, leaf.dtype)
    if not options["scale_output"]:
        mask = asgl_cuda.analog_mask(x_seq, options["analog_prob"], options["rng_state"], options["time_dim"])
        assert ((out.s_seq == 0) | (out.s_seq == 1) | mask).all()


def narrowed(options: dict[str, Any], dims: int, begin: int, end: int) -> dict[str, Any]:
    """The options of the steps from begin to end: parameters that vary over time are narrowed."""
    part = dict(options)
    for name in RANGES:
        value = options.get(name)
        time_dim = options["time_dim"] % dims
        if isinstance(value, Tensor) and dims - value.dim() <= time_dim:
            time = time_dim - (dims - value.dim())
            if value.shape[time] > 1:
                part[name] = value.narrow(time, begin, end - begin)
    return part


# Without noise, which is indexed by the steps of a call.
@many
@given(call=calls(analog_probs=(0.0, 0.0, 1.0), min_steps=2), data=st.data())
def test_splitting_time_is_one_run(backend, device, call, data):
    x_seq, options = call.tensors(device)
    time_dim, dims = options["time_dim"] % x_seq.dim(), x_seq.dim()
    steps = x_seq.shape[time_dim]
    cut = data.draw(st.integers(1, steps - 1), label="cut")
    whole = asgl_cuda.lif(x_seq, **options, **EVERY, backend=backend)
    first = asgl_cuda.lif(x_seq.narrow(time_dim, 0, cut), **narrowed(options, dims, 0, cut), **EVERY, backend=backend)
    later = {**narrowed(options, dims, cut, steps), "v_init": first.v_last}
    second = asgl_cuda.lif(x_seq.narrow(time_dim, cut, steps - cut), **later, **EVERY, backend=backend)
    for name in ("s_seq", "v_seq", "h_seq"):
        joined = torch.cat([getattr(first, name), getattr(second, name)], dim=time_dim)
        assert torch.equal(joined, getattr(whole, name)), name
    assert torch.equal(second.v_last, whole.v_last)

    grad_s = torch.randn(whole.s_seq.shape).to(whole.s_seq)
    grad_v = torch.randn(whole.v_last.shape).to(whole.v_last)
    leaves = leaves_of(x_seq, options)
    split = torch.cat([first.s_seq, second.s_seq], dim=time_dim)
    expected = torch.autograd.grad((whole.s_seq, whole.v_last), list(leaves.values()), (grad_s, grad_v))
    actual = torch.autograd.grad((split, second.v_last), list(leaves.values()), (grad_s, grad_v))
    for name, ours, theirs in zip(leaves, actual, expected, strict=True):
        if name in ("x_seq", "v_init"):
            assert torch.equal(ours, theirs), name
        else:
            # Split sums round otherwise, and terms of up to some hundred may cancel.
            scale = math.sqrt(x_seq.numel())
            eps = torch.finfo(theirs.dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=1e3 * eps, atol=1e3 * eps * scale)
