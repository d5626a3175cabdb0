"""The kernels and grids that the operators choose for CUDA."""

import pytest
import torch
from comparison import assert_equals_reference, random_input, rng_state, uniform

import asgl_cuda
from asgl_cuda.backends import launcher
from tools.emulation.emulated import LARGE, THREADS_EACH, TINY

BLOCK = 128  # kBlockThreads of csrc/params/neuron.h
NEURONS = 3 * THREADS_EACH
FEW = NEURONS // THREADS_EACH * 16 // 3  # multiprocessors for which NEURONS are few
HALF, FLOAT, DOUBLE = torch.float16, torch.float32, torch.float64
NOISE = {"analog_prob": 0.3, "rng_state": rng_state()}


def blocks_for(neurons, lanes):
    return -(-neurons // (BLOCK * lanes))


def grids(emulation):
    return [(launch.blocks, launch.threads) for launch in emulation.take_launches()]


@pytest.mark.parametrize(
    ("dtype", "steps", "options", "multiprocessors", "lanes"),
    [
        (FLOAT, 3, {}, TINY, (4, 4)),
        (HALF, 16, {}, LARGE, (4, 4)),
        (DOUBLE, 3, {}, TINY, (1, 1)),
        (FLOAT, 17, {}, LARGE, (1, 1)),  # few neurons for many steps
        (HALF, 17, {}, FEW, (1, 1)),
        (FLOAT, 17, {}, FEW - 1, (4, 4)),
        (FLOAT, 16, {"decay": 0.9, "input_gain": 2.0}, LARGE, (4, 4)),
        (HALF, 3, {"v_rest": 0.5}, TINY, (4, 4)),  # the general kernels
        (FLOAT, 3, {"v_rest": 0.5}, LARGE, (1, 1)),
        (FLOAT, 3, {"v_rest": 0.5}, NEURONS // THREADS_EACH, (4, 4)),
        (DOUBLE, 3, {"v_rest": 0.5}, NEURONS // THREADS_EACH, (1, 1)),
        (FLOAT, 3, {"v_rest": 0.5}, NEURONS // THREADS_EACH + 1, (1, 1)),
        (FLOAT, 3, {"input_mean": 0.1}, LARGE, (4, 1)),  # only backward takes the general kernel, for its gradient
        (FLOAT, 17, {"input_mean": 0.1}, 1, (4, 4)),
    ],
)
def test_neurons_a_thread(emulation, dtype, steps, options, multiprocessors, lanes):
    """Four where no parameter changes over time, except few neurons for many steps; else where blocks fill the GPU."""
    emulation.set_multiprocessors(multiprocessors)
    x_seq = random_input(steps, NEURONS, dtype=dtype)
    if "input_mean" in options:
        options = {"input_mean": uniform(low=0.1, high=0.2)}
    asgl_cuda.lif(x_seq, **options, backend="emulated").sum().backward()
    launches = emulation.take_launches()[:2]
    assert [(each.blocks, each.threads) for each in launches] == [(blocks_for(NEURONS, each), BLOCK) for each in lanes]
    assert ("lif_backward_kernel" in launches[1].kernel) == bool({"v_rest", "input_mean"} & options.keys())


@pytest.mark.parametrize(
    ("name", "lanes"),
    [("plain", 4), ("odd", 1), ("rows of 6", 1), ("shifted", 1), ("width per 2", 1), ("width per 4", 4),
     ("batch first", 4), ("shifted gradient", 1)],
)  # fmt: skip
def test_layouts_for_four_neurons(emulation, name, lanes):
    """Adjacent, aligned to 16 bytes, with the same parameters."""
    neurons, options, time_dim = NEURONS, {}, 0
    x_seq = torch.randn(3, neurons)
    if name == "odd":
        x_seq = x_seq[:, :-1].contiguous()
    elif name == "rows of 6":
        x_seq, time_dim = torch.randn(256, 3, 6), 1
    elif name == "batch first":
        x_seq, time_dim = torch.randn(256, 3, 8), 1
    elif name == "shifted":
        x_seq = torch.randn(3 * neurons + 1)[1:].view(3, neurons)
    elif name.startswith("width"):
        inner = int(name[-1])
        x_seq = x_seq.view(3, neurons // inner, inner)
        options = {"width": uniform(neurons // inner, 1, low=0.5, high=1.5).detach()}
    x_seq = x_seq.requires_grad_()
    neurons = x_seq.numel() // 3
    out = asgl_cuda.lif(x_seq, **options, time_dim=time_dim, backend="emulated")
    grad = torch.randn(out.numel() + 1)[1:].view(out.shape) if "gradient" in name else torch.randn(out.shape)
    torch.autograd.grad(out, x_seq, grad)
    forward, backward = grids(emulation)
    assert backward == (blocks_for(neurons, lanes), BLOCK)
    assert forward == ((blocks_for(neurons, 4), BLOCK) if "gradient" in name else backward)


# Sizes of a step and of parameters, other options, neurons a thread.
BY_NEURON = {
    "one parameter": ((2, NEURONS), {"width": (NEURONS,)}, {}, 4),
    "one shared": ((2, NEURONS), {"width": (NEURONS,), "decay": (NEURONS,), "v_threshold": ()}, {}, 4),
    "of the input": ((2, NEURONS), {"width": (NEURONS,), "input_gain": (NEURONS,), "input_bias": (NEURONS,)}, {}, 4),
    "channels shared": ((2, 6, NEURONS // 6), {"width": (6, NEURONS // 6), "v_threshold": (6, 1)}, {}, 4),
    "odd": ((2, NEURONS - 2), {"width": (NEURONS - 2,)}, {}, 1),
    "pairs shared": ((2, NEURONS // 2, 2), {"width": (NEURONS // 2, 2), "decay": (NEURONS // 2, 1)}, {}, 1),
    "shifted": ((2, NEURONS), {"width": (NEURONS,)}, {}, 1),
    "general": ((2, NEURONS), {"width": (NEURONS,)}, {"v_rest": 0.5}, 1),
    "store_v_seq": ((2, NEURONS), {"width": (NEURONS,)}, {"outputs": ("s_seq", "v_seq")}, 1),
}


@pytest.mark.parametrize("name", BY_NEURON)
@pytest.mark.parametrize(("steps", "dtype"), [(4, torch.bfloat16), (20, torch.float32)])
def test_parameters_by_neuron(emulation, name, steps, dtype):
    """Four neurons a thread with settled kernels where values are adjacent and aligned."""
    emulation.set_multiprocessors(TINY)
    sizes, parameters, options, lanes = BY_NEURON[name]
    made = {key: uniform(*size, low=0.5, high=1.0) for key, size in parameters.items()}
    if name == "shifted":
        made["width"] = uniform(NEURONS + 1, low=0.5, high=1.0).detach()[1:].requires_grad_()
    x_seq = random_input(steps, *sizes, dtype=dtype)
    assert_equals_reference(x_seq, "emulated", **{"outputs": ("s_seq",), **NOISE, **made, **options})
    forward, backward, *_ = grids(emulation)
    assert forward == backward == (blocks_for(x_seq[0].numel(), lanes), BLOCK)


@pytest.mark.parametrize(
    ("shape", "size", "blocks"),
    [
        ((2, 4 * 300 * BLOCK), (), [300, 300, 1]),  # a block adds up the sums of hundreds of blocks
        ((2, 1200, 4, 2, 2), (4, 1, 1), [5, 1]),  # 75 runs of a thread, split, and added up by a second launch
        ((2, 3, 2, 64, 64), (2, 1, 1), [2]),  # a block an element, each of whose runs touches nine tiles
        ((2, 70, 6, 4, 8), (6, 1, 1), [1]),  # 32 elements side by side, 16 runs of each at a time
        ((2, 70, 40, 2, 2), (40, 1, 1), [2]),
        ((2, 70, 6, 4, 8), (6, 4, 8), [6]),
        ((2, 3, 6, 10, 11), (6, 10, 11), [3]),  # two of the three runs at a time
        ((2, 1, 6, 10, 11), (6, 10, 11), [2]),
        ((5, 3, 2, 48, 48), (5, 1, 1, 1, 1), [5]),
        ((5, 3, 6, 4, 8), (5, 1, 6, 1, 1), [1]),
    ],
)
def test_sums_of_gradients(emulation, shape, size, blocks):
    x_seq, width = random_input(*shape), uniform(*size, low=0.5, high=1.5)
    assert_equals_reference(x_seq, "emulated", outputs=("s_seq",), width=width)
    assert [each for each, _ in grids(emulation)][-len(blocks) :] == blocks


def test_channels_last(emulation):
    """Channels are adjacent: four neurons a thread. A block stores one value a channel."""
    emulation.set_multiprocessors(TINY)
    x_seq = torch.randn(4, 66, 8, 8, 4).movedim(-1, 2).requires_grad_()
    width, gain = uniform(4, 1, 1, low=0.5, high=1.5), uniform(4, 1, 1, low=0.5, high=1.5)
    assert_equals_reference(x_seq, "emulated", outputs=("s_seq",), width=width, input_gain=gain)
    assert [blocks for blocks, _ in grids(emulation)] == [33, 33, 2]


def test_kernel_without_a_name(emulation):
    with pytest.raises(RuntimeError, match="no such kernel"):
        emulation.launch(torch.device("cpu"), launcher.kernel_names()[0][:-1], 1, 1, 0, 0)
