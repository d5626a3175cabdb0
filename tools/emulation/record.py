"""Records the launches of calls, for tests/cuda/programs/replay.cpp, which repeats them with mistakes or sanitizers.

Calls are drawn at random from tables of shapes. They run with the CPU's kernels and with emulated CUDA kernels, and
their results must agree with the reference's.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asgl_cuda import backends, leaky_integrator, lif, recurrent_lif
from asgl_cuda.backends import extension, launcher
from asgl_cuda.layout import real_type
from asgl_cuda.neurons.adaptive_lif import run_adaptive
from asgl_cuda.neurons.batch_norm_lif import module_batch_norm_lif
from asgl_cuda.neurons.lif import LIF_DEFAULTS
from asgl_cuda.reference.learned import Logarithm, Logit
from asgl_cuda.reference.records import IN_CURRENT, IN_RESET, IN_THRESHOLD

from . import emulated

NAMESPACE = "asgl_cuda_recorded"
BACKENDS = "cpu", "recorded"


# ---- random arguments ----


class Random(random.Random):
    """A generator of random choices and tensors."""

    def once_in(self, times: int) -> bool:
        """True with a probability of 1 / times."""
        return self.randrange(times) == 0

    def values(self, *shape: int, low: float = -1.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of uniformly distributed values."""
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (uniform * (high - low) + low).to(dtype)


class Call(NamedTuple):
    """A call of `function`; `learned` names the tensors that want gradients, `given` the results that have one."""

    function: Callable[..., Any]
    options: dict[str, Any]
    learned: Sequence[str] = ()
    given: Sequence[str] = ("s_seq",)
    exact: bool = True  # no result of exp is in the state: no rounding may flip a spike
    multiprocessors: int = emulated.TINY
    backends: Sequence[str] = BACKENDS


class Shape(NamedTuple):
    """The shape of x_seq: [steps, *dims], or with batch_first [dims[0], steps, *dims[1:]]."""

    steps: int
    dims: tuple[int, ...]
    batch_first: bool = False

    def sequence(self) -> tuple[int, ...]:
        return self.with_time(self.steps, self.dims)

    def with_time(self, steps: int, dims: Sequence[int]) -> tuple[int, ...]:
        return (dims[0], steps, *dims[1:]) if self.batch_first else (steps, *dims)

    def inner(self) -> int:
        """The number of adjacent neurons of a step."""
        return torch.Size(self.dims[1:] if self.batch_first else self.dims).numel()


def parameter_shape(random: Random, shape: Shape, kind: str, per_step: bool) -> tuple[int, ...]:
    """The shape of a parameter with one value, or with a value for each index of some adjacent dimensions."""
    dims = shape.dims
    runs = [(i, j) for i in range(len(dims)) for j in range(i + 1, len(dims) + 1)]
    if kind == "fours":
        runs = [(i, j) for i, j in runs if torch.Size(dims[j:]).numel() % 4 == 0]
    elif kind == "by neuron":
        runs = [(i, j) for i, j in runs if j == len(dims) and not random.once_in(3)]
    begin, end = random.choice(runs) if runs and kind != "uniform" and not random.once_in(4) else (0, 0)
    sizes = [size if begin <= i < end else 1 for i, size in enumerate(dims)]
    return shape.with_time(shape.steps if per_step else 1, sizes)


def infinite_at_last(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A v_reset that is infinite at the last step, so that a product with 0 that must be left out gives NaN."""
    v_reset = torch.full(shape.with_time(shape.steps, [1] * len(shape.dims)), 0.1, dtype=dtype)
    v_reset.select(int(shape.batch_first), -1).fill_(float("inf"))
    return v_reset


# ---- the neuron ----

# Bounds of the parameters.
NEURON = {
    "width": (0.5, 1.5), "decay": (0.2, 0.95), "v_threshold": (0.6, 1.2), "v_reset": (-0.2, 0.2),
    "reset_amount": (0.5, 1.0), "input_gain": (0.5, 1.5), "input_bias": (-0.2, 0.2), "input_mean": (-0.3, 0.3),
}  # fmt: skip
LEARNED = {"width": ("log_width", Logarithm, -0.7, 0.4), "decay": ("logit_decay", Logit, -1.4, 2.9)}
KINDS = "plain", "normalised", "uniform", "fours", "any", "by neuron"


def as_layers_store(function: Callable[..., Any], **options: Any) -> Any:
    """Calls the function, with width and decay as a logarithm and a logit if they are so given, as by layers."""
    for name, (stored, kind, *_) in LEARNED.items():
        if stored in options:
            options[name] = kind(options.pop(stored))
    return function(**options)


neuron, recurrent, integrator = (
    partial(as_layers_store, function) for function in (lif, recurrent_lif, leaky_integrator)
)


def neuron_call(number: int, shape: Shape, kind: str, multiprocessors: int, by_options: bool) -> Call:
    """A random call of `lif`. With `by_options` it has an option that only general kernels support."""
    random = Random(number)
    toss, once_in = (lambda: random.once_in(2)), random.once_in
    settled = kind in ("plain", "normalised", "by neuron", "by channel") or toss()
    plain = kind == "plain" or (settled and kind in ("fours", "any", "by neuron") and toss())
    seldom = 8 if settled else 2
    dtype = torch.float64 if number % 9 == 8 else (torch.float32, torch.bfloat16)[number // 2 % 2]
    real = real_type(dtype)
    hard = dtype != torch.float64 and number % 2 == 0
    infinite = hard and not by_options and once_in(2 if shape.steps == 1 else 8)
    gradients = not infinite and not once_in(4)
    options: dict[str, Any] = {
        "surrogate": "rectangle" if hard else "sigmoid",
        "time_dim": int(shape.batch_first),
        "v_rest": random.uniform(-0.2, 0.2) if once_in(seldom) else 0.0,
        "surrogate_gain": random.choice((1.0, 1.5)),
        "strict_threshold": toss(),
        "scale_output": once_in(6 if settled else 2),
        "detach_reset": toss() and not infinite,
        "analog_prob": random.choice((0, 20000, 20000, 20000, 65535, 65536)) / 65536,
        "rng_state": torch.tensor([random.randrange(-(2**60), 2**60), random.randrange(-(2**33), 2**33)]),
    }
    if by_options:
        hard = toss()
        rules = random.choice(("floor", "levels", "several", "several")) if not hard else "floor"
        options["v_min"] = random.uniform(-0.3, 0.3) if rules != "several" or toss() else None
        if rules == "levels":
            options.update(levels=2, surrogate="rectangle")  # the threshold is the width
        if rules == "several":
            options.update(multi_spike=True, analog_prob=0.0, levels=random.choice((2, None)))
            options["surrogate"] = random.choice(("sigmoid", "rectangle"))
        if rules == "several" and options["v_min"] is None and once_in(3):
            options["surrogate"] = "periodic_exponential"
    learned: list[str] = []
    by_channel = parameter_shape(random, shape, "any", False)  # of all parameters of the input alike
    other = random.choice(("input_gain", "input_bias", "input_mean")) if once_in(3) else None
    per_step = once_in(8 if settled else 3)
    options["v_reset"] = None
    for name in NEURON:
        if name == ("reset_amount" if hard else "v_reset"):
            continue
        (low, high), is_input = NEURON[name], name.startswith("input")
        if (plain and is_input and name != other) or (name == "width" and options.get("levels")):
            continue
        options[name] = random.uniform(low, high)
        constant = (is_input or toss()) if plain else toss() if kind == "normalised" and not is_input else once_in(8)
        times = 4 if not settled or name == "width" or is_input else 2
        wanted = once_in(10 if settled else 2) if name == "input_mean" else not once_in(times)
        if constant:
            continue
        by_step = per_step and toss()
        apart = "fours" if kind == "normalised" and is_input else kind
        sizes = parameter_shape(random, shape, apart, by_step)
        if kind == "by channel" and is_input:
            sizes = by_channel
        source = name
        if name in LEARNED and not by_step and once_in(3):
            source, _, low, high = LEARNED[name]
            del options[name]
        options[source] = random.values(*sizes, low=low, high=high, dtype=real)
        learned += [source] * (wanted and gradients)
    if infinite:
        options["v_reset"] = infinite_at_last(shape, real)
    x_seq = random.values(*shape.sequence(), low=-1.0, high=2.0, dtype=dtype)
    if once_in(8):  # misaligned
        x_seq = torch.cat([x_seq.flatten()[:1], x_seq.flatten()])[1:].view(x_seq.shape)
    options["x_seq"] = x_seq
    if toss():
        options["v_init"] = random.values(*shape.dims, low=-0.5, dtype=real)
        learned += ["v_init"] * toss()
    if once_in(3):
        options.update(residual=random.values(*shape.sequence(), dtype=dtype), residual_gain=random.choice((1.0, 0.5)))
        learned += ["residual"] * (not once_in(4))
    learned += ["x_seq"] * (not once_in(8))
    given = ["s_seq"] * (not once_in(8))
    for name, likely in (("v_last", toss()), ("v_seq", once_in(seldom)), ("h_seq", once_in(seldom))):
        options[f"return_{name}"] = likely
        given += [name] * (likely and (name == "h_seq" or not infinite) and toss())
    smooth = options["surrogate"] == "sigmoid" and options["analog_prob"] > 0
    return Call(neuron, options, learned, given, not smooth, multiprocessors)


def neuron_calls() -> Iterator[Call]:
    """The calls of `lif` that are recorded."""
    number, values = 0, partial(Random(2).values, low=0.5)
    for steps in (17, 4, 33, 1, 5, 8, 2, 16, 9):  # first those that find most mistakes
        for shape in (
            Shape(steps, (3, 4, 43)), Shape(steps, (257,)), Shape(steps, (4, 4, 16), True), Shape(steps, (7,)),
            Shape(steps, (28, 5, 2), True), Shape(steps, (5, 140)), Shape(steps, (6, 10)), Shape(steps, (4, 4, 32)),
        ):  # fmt: skip
            for kind in KINDS:
                if kind == "by neuron" and shape.inner() % 4 != 0:
                    continue
                multiprocessors = (emulated.TINY, emulated.LARGE, emulated.TINY, 1)[number % 4]
                yield neuron_call(number, shape, kind, multiprocessors, number % 5 == 4)
                number += 1
    for number in range(48):  # several tiles of the CPU's kernels, not aligned with rows
        dims, steps = ((4, 700), (2800,), (93, 30), (4, 5, 140))[number % 4], (4, 17, 5)[number % 3]
        kind = ("normalised", "by channel", "any", "by channel", "plain", "uniform")[number // 4 % 6]
        call = neuron_call(number, Shape(steps, dims, number % 5 == 0), kind, 0, number % 7 == 3)
        yield call._replace(backends=("cpu",))
    for name in ("input_gain", "input_bias", "input_mean"):  # each alone makes the input not plain
        yield chosen_call((260,), {name: 0.3})
    yield chosen_call((260,), {"return_v_last": True}, given=("v_last",))
    yield chosen_call((260,), {"v_min": 0.0, "return_v_last": True}, given=("s_seq", "v_last"))  # and v_reset
    for neurons in (7, 64):  # one a thread, and four
        noise = {"analog_prob": 0.3, "rng_state": torch.tensor([3, 5])}
        yield chosen_call((neurons,), noise, steps=530)
    # One value a channel in channels_last, over several tiles; and of two sorts of channels.
    yield chosen_call((93, 30), {name: values(30) for name in ("input_gain", "input_bias")})
    yield chosen_call((4, 5, 140), {"input_gain": values(5, 1), "input_bias": values(4, 1, 1)})
    for number in range(6):
        yield threshold_call(number)
    for dims, steps in SUMS:
        yield sum_call(dims, steps)


def chosen_call(
    dims: tuple[int, ...], options: dict[str, Any], given: Sequence[str] = ("s_seq",), steps: int = 4
) -> Call:
    """A call of `lif` with these options."""
    x_seq = Random(1).values(steps, *dims, low=-1.0, high=2.0)
    learned = [name for name, value in options.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return Call(neuron, {"x_seq": x_seq, "surrogate": "rectangle", **options}, ["x_seq", *learned], given)


def threshold_call(number: int) -> Call:
    """A call of `lif` with potentials at the threshold, or above it by subnormal numbers."""
    random = Random(number)
    above = torch.tensor((0.0, 0.0, 2.0**-140, 2.0**-149))[random.values(5, 4, 65, low=0, high=4).long()]
    options = {"x_seq": 2.0**-126 + above, "v_threshold": 2.0**-126, "v_reset": 0.0, "decay": 0.5}
    if number % 2 == 0:
        options["width"] = random.values(65, low=0.5, high=1.5)
    return Call(neuron, options | {"surrogate": "rectangle", "strict_threshold": number < 4}, ["x_seq"])


# Dimensions [runs, values, neurons of a run] and steps of sums: of runs that are split, of more values than threads, of
# runs over eight tiles and nine; and of more than 256 blocks, of one neuron a thread and of four, where values repeat
# and where they do not.
SUMS = (
    ((5000, 100, 1), 1), ((30000, 7, 1), 2), ((300001, 3, 1), 1), ((2000, 5, 3), 1), ((50, 1000, 4), 3),
    ((3000, 2, 130), 1), ((3, 140000, 1), 1), ((2, 524291, 1), 1), ((600, 2, 2000), 1), ((1, 12, 841), 3),
    ((1, 12, 903), 3), ((1, 524292, 1), 2), ((1, 8, 4111), 1), ((1, 33, 4000), 1), ((4711, 7, 1), 1),
    ((16600, 8, 1), 1),
)  # fmt: skip


def sum_call(dims: tuple[int, int, int], steps: int) -> Call:
    """A call of `lif` whose parameters have gradients of long sums, for one row of SUMS."""
    random = Random(dims[0])
    options = {
        "x_seq": random.values(steps, *dims, high=2.0, dtype=torch.bfloat16),
        "v_threshold": random.values(steps if steps == 2 else 1, 1, dims[1], 1, low=0.6, high=1.2),
        "decay": random.values(1, 1, dims[1], 1, low=0.2, high=0.9),
        "surrogate": "rectangle",
    }
    return Call(neuron, options, ["v_threshold", "decay"])


# ---- comparison ----


def results(call: Call, backend: str) -> dict[str, Tensor]:
    """The results of a call by name, and the gradients of the tensors that want some."""
    arguments = {
        name: value.detach().requires_grad_(name in call.learned) if isinstance(value, Tensor) else value
        for name, value in call.options.items()
    }
    output = call.function(**arguments, backend=backend)
    found: dict[str, Tensor] = output._asdict() if hasattr(output, "_asdict") else {"s_seq": output}
    found = {name: value for name, value in found.items() if value is not None}
    given = {name: value for name, value in found.items() if name in call.given and value.requires_grad}
    if given and call.learned:
        grads = [Random(name).values(*value.shape, dtype=value.dtype) for name, value in given.items()]
        leaves = [arguments[name] for name in call.learned]
        found_grads = torch.autograd.grad(
            list(given.values()), leaves, grads, allow_unused=True, materialize_grads=True
        )
        found |= {f"grad_{name}": grad for name, grad in zip(call.learned, found_grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def check(call: Call, name: str, actual: Tensor, expected: Tensor) -> None:
    """Compares a result up to roundings: of exp, of half types, and of sums, whose terms are of size 1."""
    x_seq = call.options["x_seq"]
    sums = name.startswith("grad_") and name[5:] not in ("x_seq", "residual", "v_init", "w_init")
    terms = x_seq.numel() / min(expected.numel(), x_seq.shape[-1]) if sums else 1
    if call.function is recurrent:
        terms = max(terms, x_seq.shape[-1] / 16)
    rounded = x_seq.dtype == torch.bfloat16 and (sums or expected.dtype == x_seq.dtype)
    allowed = 2**-7 if rounded else 1e-5 if call.exact else 5e-5
    torch.testing.assert_close(
        actual, expected, rtol=allowed, atol=allowed * terms, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


# ---- adaptive neurons, integrators ----

PLACES_OF_W = IN_CURRENT, IN_THRESHOLD, IN_THRESHOLD | IN_RESET, IN_RESET
ADAPTIVE = {
    **{name: each for name, each in NEURON.items() if not name.startswith("input")},
    "adapt_decay": (0.5, 0.95), "adapt_potential": (-0.2, 0.4), "adapt_spike": (0.0, 0.5),
}  # fmt: skip


def adaptive(x_seq: Tensor, **options: Any) -> Any:
    return run_adaptive(x_seq, {**LIF_DEFAULTS, **options})  # type: ignore[typeddict-item]


def random_parameters(random: Random, shape: Shape, bounds: dict[str, tuple[float, float]], real: torch.dtype) -> Any:
    """A random number or tensor for each parameter, and the names of the tensors that want gradients."""
    options: dict[str, Any] = {name: random.uniform(*each) for name, each in bounds.items()}
    tensors = [name for name in bounds if not random.once_in(3)]
    for name in tensors:
        sizes = parameter_shape(random, shape, random.choice(("any", "fours")), random.once_in(3))
        options[name] = random.values(*sizes, low=bounds[name][0], high=bounds[name][1], dtype=real)
    return options, [name for name in tensors if not random.once_in(4)]


def adaptive_call(number: int, shape: Shape) -> Call:
    """A random call of an adaptive neuron."""
    random = Random(number)
    dtype = torch.float64 if number % 5 == 4 else (torch.float32, torch.bfloat16)[number % 2]
    place = PLACES_OF_W[number // 2 % 4]
    hard = not place & IN_RESET and random.once_in(2)
    infinite = hard and random.once_in(2 if shape.steps == 1 else 6)
    real = real_type(dtype)
    bounds = {name: each for name, each in ADAPTIVE.items() if name != ("reset_amount" if hard else "v_reset")}
    options, learned = random_parameters(random, shape, bounds, real)
    if infinite:
        options["v_reset"] = infinite_at_last(shape, real)
        learned = [name for name in learned if name != "v_reset"]
    options = {"v_reset": None, "time_dim": int(shape.batch_first), "adaptation": place} | options
    options |= {
        "surrogate": random.choice(("rectangle", "sigmoid")),
        "v_rest": 0.0 if random.once_in(3) else random.uniform(-0.2, 0.2),
        "surrogate_gain": random.choice((1.0, 1.5)),
        "strict_threshold": random.once_in(2),
        "detach_reset": random.once_in(3),
        "analog_prob": random.choice((0, 20000, 20000, 65536)) / 65536,
        "rng_state": torch.tensor([random.randrange(-(2**60), 2**60), random.randrange(-(2**33), 2**33)]),
        "x_seq": random.values(*shape.sequence(), low=-1.0, high=2.0, dtype=dtype),
    }
    learned += ["x_seq"] * (not random.once_in(8))
    if random.once_in(2):
        options |= {name: random.values(*shape.dims, low=-0.5, dtype=real) for name in ("v_init", "w_init")}
        learned += ["v_init", "w_init"] * random.once_in(2)
    given = ["s_seq"] * (not random.once_in(6))
    for name, likely in (("v_last", 2), ("v_seq", 3), ("h_seq", 3)):
        options[f"return_{name}"] = random.once_in(likely)
        if options[f"return_{name}"] and (name == "h_seq" or not infinite) and not random.once_in(4):
            given += [name, "w_last"] if name == "v_last" else [name]
    exact = options["surrogate"] == "rectangle" or options["analog_prob"] == 0
    return Call(adaptive, options, learned, given, exact)


def integrator_call(number: int, shape: Shape) -> Call:
    """A random call of the leaky integrator."""
    random = Random(number)
    dtype = torch.float64 if number % 5 == 4 else (torch.float32, torch.bfloat16)[number % 2]
    bounds = {"decay": (0.3, 0.95), "input_gain": (-1.5, 1.5)}
    options, learned = random_parameters(random, shape, bounds, real_type(dtype))
    decay = options["decay"]
    if isinstance(decay, Tensor) and decay.shape[int(shape.batch_first)] == 1 and random.once_in(2):
        options["logit_decay"] = options.pop("decay").logit()
        learned = ["logit_decay" if name == "decay" else name for name in learned]
    options |= {
        "v_rest": random.choice((0.0, -0.3)),
        "delay": random.once_in(2),
        "time_dim": int(shape.batch_first),
        "return_v_last": random.once_in(2),
        "x_seq": random.values(*shape.sequence(), dtype=dtype),
    }
    learned += ["x_seq"] * (not random.once_in(6))
    if random.once_in(2):
        options["v_init"] = random.values(*shape.dims, dtype=real_type(dtype))
        learned += ["v_init"] * random.once_in(2)
    given = ["s_seq", "v_seq", *["v_last"] * random.once_in(2)]
    return Call(integrator, options, learned, given, multiprocessors=random.choice((0, 1, 132)))


def calls_of(call: Callable[[int, Shape], Call]) -> Iterator[Call]:
    """The recorded calls of one sort, over steps, shapes and layouts."""
    lengths, all_dims = (17, 4, 1, 33, 5, 8, 40, 2), ((7,), (3, 172), (257,), (4, 128), (6, 10), (4, 25), (1,))
    for number, (steps, dims, _) in enumerate(itertools.product(lengths, all_dims, range(2))):
        yield call(number, Shape(steps, dims, len(dims) > 1 and number % 3 == 0))


# ---- recurrent neurons, on the CPU alone ----


def recurrent_call(number: int, shape: tuple[int, int, int]) -> Call:
    """A random call of recurrent neurons. Weights are multiples of 1/64: sums of spikes are exact in any order."""
    random = Random(number)
    steps, batch, count = shape
    time_dim = random.randrange(2)
    dtype = (torch.float32, torch.bfloat16, torch.float32, torch.float64)[number % 4]
    real, sequence = real_type(dtype), (batch, steps, count) if time_dim else (steps, batch, count)
    sizes = [count] if random.once_in(4) else [count, count]
    weight = random.values(*sizes, low=-64, high=64, dtype=real).round() / 64
    if random.once_in(8):
        weight.view(-1)[weight.numel() // 2] = float("nan")
    options: dict[str, Any] = {"weight": weight, "time_dim": time_dim}
    for name in ("width", "decay", "v_threshold", "bias", "syn_decay", random.choice(("v_reset", "reset_amount"))):
        if name != "syn_decay" or random.once_in(2):
            options[name] = random.values(count, low=0.3, dtype=real)
    options.setdefault("v_reset", None)
    if number % 3 == 0:
        options["log_width"], options["logit_decay"] = options.pop("width").log(), options.pop("decay").logit()
    adapts = random.once_in(3)
    for name in ("adapt_decay", "adapt_potential", "adapt_spike") if adapts else ():
        options[name] = random.values(count, low=0.1, high=0.9, dtype=real)
    learned = [name for name, value in options.items() if isinstance(value, Tensor)]
    learned = [] if random.once_in(3) else learned[random.once_in(3) :]  # without the weight
    options |= {
        "v_rest": random.choice((0.0, -0.1)),
        "surrogate": random.choice(("rectangle", "sigmoid")),
        "strict_threshold": random.once_in(4),
        "scale_output": random.once_in(3),
        "detach_reset": random.once_in(3),
        "detach_recurrent": random.once_in(4),
        "input_gain": 1.0 if adapts else random.choice((1.0, 0.5)),
        "to_threshold": adapts and random.once_in(2),
        "analog_prob": random.choice((0, 0, 13107, 65536)) / 65536,
        "rng_state": torch.tensor([number, -1 - number]),
        "x_seq": random.values(*sequence, low=-0.5, high=1.5, dtype=dtype),
        **{f"return_{name}": random.once_in(2) for name in ("v_last", "v_seq", "h_seq")},
    }
    needs = {"i_init": "syn_decay", "w_init": "adapt_decay"}
    for name in ("v_init", "s_init", "i_init", "w_init"):
        if random.once_in(2) and (name not in needs or needs[name] in options):
            options[name] = random.values(batch, count, low=0.0, dtype=real)
            learned += [name] * random.once_in(2)
    given = [name for name in ("v_last", "s_last", "i_last", "w_last", "v_seq", "h_seq") if random.once_in(2)]
    given += ["s_seq"] * (not random.once_in(8) or not given)
    return Call(recurrent, options, [*learned, "x_seq"], given, exact=False, backends=("cpu",))


def recurrent_calls() -> Iterator[Call]:
    """The recorded calls of recurrent neurons."""
    shapes = (1, 1, 1), (3, 2, 5), (2, 17, 9), (6, 16, 4), (4, 33, 31), (2, 3, 66), (9, 40, 33)
    for number, shape in enumerate([each for each in shapes for _ in range(16)] + [(2, 2, 1040)] * 3):
        yield recurrent_call(number, shape)
    # Few spikes, so that products skip zeros. One spike is 2, and a NaN in the input makes a gradient NaN.
    x_seq, s_init = torch.full((3, 4, 9), -1.0), torch.zeros(4, 9)
    x_seq[0, 0, 0], x_seq[2, 1, 3], s_init[2, 5] = 3.0, float("nan"), 2.0
    options = {"x_seq": x_seq, "s_init": s_init, "weight": torch.full((9, 9), 1 / 64), "surrogate": "sigmoid"}
    yield Call(recurrent, options, ["weight", "x_seq"], exact=False, backends=("cpu",))


# ---- batch normalisation ----


class Normalised(NamedTuple):
    """Results of neurons after a batch normalisation, and its statistics afterwards."""

    s_seq: Tensor
    h_seq: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    count: Tensor | None


def normalised(x_seq: Tensor, norm: dict[str, Any], training: bool, *, backend: str, **options: Any) -> Normalised:
    """Runs neurons after a batch normalisation."""
    module = torch.nn.BatchNorm1d(x_seq.shape[2], dtype=real_type(x_seq.dtype), **norm).train(training)
    weight, bias, scale = (options.pop(name, None) for name in ("weight", "bias", "input_scale"))
    given: Any = {**LIF_DEFAULTS, **options, "backend": backend}
    output = module_batch_norm_lif(module, x_seq, given, weight, bias, input_scale=scale)
    s_seq, h_seq = (output, None) if isinstance(output, Tensor) else (output.s_seq, output.h_seq)
    mean, variance = module.running_mean, module.running_var
    assert mean is not None
    assert variance is not None
    return Normalised(s_seq, h_seq, mean, variance, module.num_batches_tracked)


def batch_norm_call(number: int, shape: Shape) -> Call:
    """A random call of neurons after a batch normalisation. Channels are the second dimension of dims."""
    random = Random(number)
    dtype = (torch.float32, torch.bfloat16, torch.float32, torch.float64)[number % 4]
    real, channels = real_type(dtype), shape.dims[1]
    far = random.once_in(2) * (100 if dtype == torch.bfloat16 else 10000)
    x_seq = random.values(*shape.sequence(), low=-1.7, high=1.7, dtype=torch.float64)
    if random.once_in(2):
        x_seq = x_seq.mul(5).floor()
    options: dict[str, Any] = {
        "x_seq": (x_seq + far).to(dtype),
        "norm": {"momentum": random.choice((0.1, 0.7, 1.0)), "eps": random.choice((1e-5, 1e-3))},
        "training": not random.once_in(6),
        "input_scale": random.choice((1.0, 0.7)),
        "surrogate": "rectangle",
    }
    if dtype == torch.float64:
        options |= {"surrogate": "sigmoid", "v_reset": None}
    learned = ["x_seq"] * (not random.once_in(8))
    for name, low in (("weight", 0.5), ("bias", -1.0)):
        if random.once_in(2):
            options[name] = random.values(channels, low=low, high=1.5, dtype=real)
            learned.append(name)
    if random.once_in(2):
        options["residual"] = random.values(*shape.sequence(), dtype=dtype)
        learned.append("residual")
    return Call(normalised, options, learned, exact=False)


def batch_norm_calls() -> Iterator[Call]:
    """The recorded calls of neurons after a batch normalisation."""
    shapes = (
        (5, (2, 3, 7)), (4, (10, 3, 128)), (1, (5, 1, 600)), (2, (35, 100)), (1, (5, 200, 3)), (13, (10, 64, 4)),
        (4, (32, 1, 10)), (5, (13, 3, 49)), (1, (4099, 3, 4)), (1, (5, 3, 1024)), (2, (65, 200)), (3, (1366, 4)),
        (1, (1, 64, 10)), (1, (2, 2, 17921)),
    )  # fmt: skip
    for number, (shape, _) in enumerate(itertools.product(shapes, range(5))):
        yield batch_norm_call(number, Shape(*shape))
    for dims in ((9, 2, 65540), (9, 3, 30000)):  # several tiles and splits of the CPU's kernels
        yield batch_norm_call(1, Shape(1, dims))._replace(backends=("cpu",))


# ---- recording ----

FAMILIES: dict[str, Callable[[], Iterator[Call]]] = {
    "neuron": neuron_calls,
    "adaptive": partial(calls_of, adaptive_call),
    "integrator": partial(calls_of, integrator_call),
    "recurrent": recurrent_calls,
    "normalisation": batch_norm_calls,
}


class Recording:
    """A launcher that starts the emulated kernels and records their arguments."""

    def __init__(self, emulation: emulated.Emulation) -> None:
        self.library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.library.asgl_record_launch.restype = ctypes.c_char_p
        self.multiprocessors = emulated.TINY
        self._launch = emulation.library.asgl_emulated_launch

    def resident_threads(self, device: torch.device) -> int:
        return self.multiprocessors * emulated.THREADS_EACH

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        problem = self.library.asgl_record_launch(
            kernel.encode(), ctypes.c_longlong(blocks), threads, ctypes.c_void_p(params),
            ctypes.c_longlong(self.resident_threads(device)), self._launch,
        )  # fmt: skip
        if problem is not None:
            raise RuntimeError(f"{kernel}: {problem.decode()}")


def record(directory: Path) -> None:
    """Writes the recorded calls of each family to `<family>.cpu` and `<family>.cuda` in the directory."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what is uninitialised with NaN
    recording = Recording(emulated.register())
    functions = launcher.define_with_kernels(NAMESPACE, "CPU", recording)
    backends.BACKENDS["recorded"] = backends.Backend(
        ("cpu",),
        backends.registered_operators(NAMESPACE),
        lambda: extension.problem,
        backends.direct_operators(functions),
    )
    count = left_out = 0
    for family, calls in FAMILIES.items():
        paths = directory / f"{family}.cpu", directory / f"{family}.cuda", extension.module.__file__
        recording.library.asgl_record(*(os.fsencode(path) for path in paths))
        for call in calls():
            count += 1
            left_out += not compared(call, recording)
        recording.library.asgl_record(None, None, None)
    print(f"{count} calls, {left_out} of them left out")


def compared(call: Call, recording: Recording) -> bool:
    """Compares a call's results with the reference's, unless roundings might flip a spike; returns whether it did."""
    expected = results(call, "reference")
    if not call.exact:
        h_seq = results(call._replace(options={**call.options, "return_h_seq": True}, learned=()), "reference")["h_seq"]
        if ((h_seq - call.options.get("v_threshold", 1.0)).abs() < 1e-5).any():
            return False
    recording.multiprocessors = call.multiprocessors
    for backend in call.backends:
        for name, actual in results(call, backend).items():
            check(call, name, actual, expected.get(name, torch.zeros_like(actual)))
    return True


if __name__ == "__main__":
    record(Path(sys.argv[1]))
