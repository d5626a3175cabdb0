"""The kernels and grids that the operators choose for CUDA."""

import pytest
import torch
from comparison import assert_equals_reference, random_input, rng_state, uniform

import asgl_cuda
from asgl_cuda.backends import launched
from tools.emulation import emulated
from tools.emulation.emulated import THREADS_EACH

BLOCK = 128  # kBlockThreads of csrc/params/neuron.h
NEURONS = 3 * THREADS_EACH


@pytest.fixture
def backend():
    return "emulated"


def blocks_for(neurons, lanes):
    return -(-neurons // (BLOCK * lanes))


def grids(emulation):
    return [(launch.blocks, launch.threads) for launch in emulation.take_launches()]


@pytest.mark.parametrize(
    ("steps", "options", "multiprocessors", "lanes"),
    [
        (3, {}, emulated.TINY, 4),
        (16, {}, emulated.LARGE, 4),
        (17, {}, emulated.LARGE, 1),  # few neurons for many steps
        (17, {}, NEURONS // THREADS_EACH * 16 // 3, 1),
        (17, {}, NEURONS // THREADS_EACH * 16 // 3 - 1, 4),
        (16, {"decay": 0.9, "input_gain": 2.0}, emulated.LARGE, 4),
        (3, {"v_rest": 0.5}, emulated.TINY, 4),  # the general kernels
        (3, {"v_rest": 0.5}, emulated.LARGE, 1),
        (3, {"v_rest": 0.5}, NEURONS // THREADS_EACH, 4),
        (3, {"v_rest": 0.5}, NEURONS // THREADS_EACH + 1, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_neurons_a_thread(emulation, backend, steps, options, multiprocessors, lanes, dtype):
    """Four where no parameter changes over time, except few neurons for many steps; else where blocks fill the GPU."""
    emulation.set_multiprocessors(multiprocessors)
    x_seq = random_input(steps, NEURONS, dtype=dtype)
    asgl_cuda.lif(x_seq, **options, backend=backend).sum().backward()
    expected = (blocks_for(NEURONS, 1 if dtype == torch.float64 else lanes), BLOCK)
    assert grids(emulation) == [expected, expected]


@pytest.mark.parametrize(("multiprocessors", "steps"), [(emulated.LARGE, 3), (1, 17)])
def test_neurons_a_thread_where_the_mean_wants_a_gradient(emulation, backend, multiprocessors, steps):
    """Only backward takes the general kernel."""
    emulation.set_multiprocessors(multiprocessors)
    x_seq, mean = random_input(steps, NEURONS), uniform(low=0.1, high=0.2)
    asgl_cuda.lif(x_seq, input_mean=mean, backend=backend).sum().backward()
    forward, backward, _ = emulation.take_launches()
    lanes = 1 if multiprocessors == emulated.LARGE else 4
    assert (forward.blocks, backward.blocks) == (blocks_for(NEURONS, 4), blocks_for(NEURONS, lanes))
    assert "lif_backward_kernel" in backward.kernel


@pytest.mark.parametrize(
    ("name", "lanes"),
    [("plain", 4), ("odd", 1), ("rows of 6", 1), ("shifted", 1), ("width per 2", 1), ("width per 4", 4),
     ("batch first", 4), ("shifted gradient", 1)],
)  # fmt: skip
def test_layouts_for_four_neurons(emulation, backend, name, lanes):
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
    out = asgl_cuda.lif(x_seq, **options, time_dim=time_dim, backend=backend)
    grad = torch.randn(out.numel() + 1)[1:].view(out.shape) if "gradient" in name else torch.randn(out.shape)
    torch.autograd.grad(out, x_seq, grad)
    forward, backward = grids(emulation)
    assert backward == (blocks_for(neurons, lanes), BLOCK)
    assert forward == ((blocks_for(neurons, 4), BLOCK) if "gradient" in name else backward)


@pytest.mark.parametrize("multiprocessors", [emulated.TINY, emulated.LARGE])
@pytest.mark.parametrize("steps", [4, 8, 9, 16, 40])
@pytest.mark.parametrize("sizes", [(), (6, 1), (NEURONS // 6,), (2, 1, 1)])
def test_both_mappings_agree_with_the_reference(emulation, backend, multiprocessors, steps, sizes):
    emulation.set_multiprocessors(multiprocessors)
    for outputs in (("s_seq",), ("s_seq", "v_last", "v_seq", "h_seq")):
        x_seq, width = random_input(steps, 2, 6, NEURONS // 6), uniform(*sizes, low=0.5, high=1.5)
        noise = {"analog_prob": 0.3, "rng_state": rng_state()}
        assert_equals_reference(x_seq, backend, outputs=outputs, width=width, **noise)


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
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_by_neuron(emulation, backend, name, steps, dtype):
    """Four neurons a thread with settled kernels where values are adjacent and aligned."""
    emulation.set_multiprocessors(emulated.TINY)
    sizes, parameters, options, lanes = BY_NEURON[name]
    made = {key: uniform(*size, low=0.5, high=1.0) for key, size in parameters.items()}
    if name == "shifted":
        made["width"] = uniform(NEURONS + 1, low=0.5, high=1.0).detach()[1:].requires_grad_()
    noise = {"analog_prob": 0.3, "rng_state": rng_state()}
    x_seq = random_input(steps, *sizes, dtype=dtype)
    assert_equals_reference(x_seq, backend, **{"outputs": ("s_seq",), **noise, **made, **options})
    forward, backward, *_ = grids(emulation)
    assert forward == backward == (blocks_for(x_seq[0].numel(), lanes), BLOCK)


def test_channels_last(emulation, backend):
    """Channels are adjacent: four neurons a thread. A block stores one value a channel."""
    emulation.set_multiprocessors(emulated.TINY)
    x_seq = torch.randn(4, 66, 8, 8, 4).movedim(-1, 2).requires_grad_()
    width, gain = uniform(4, 1, 1, low=0.5, high=1.5), uniform(4, 1, 1, low=0.5, high=1.5)
    assert_equals_reference(x_seq, backend, outputs=("s_seq",), width=width, input_gain=gain)
    assert [blocks for blocks, _ in grids(emulation)] == [33, 33, 2]


def test_sums_of_many_runs(emulation, backend):
    """Split, and added up by a second launch."""
    x_seq, width = random_input(2, 1200, 4, 2, 2), uniform(4, 1, 1, low=0.5, high=1.5)
    assert_equals_reference(x_seq, backend, outputs=("s_seq",), width=width)
    assert [blocks for blocks, _ in grids(emulation)][-2:] == [5, 1]  # 75 runs of a thread, at most 16 after the split


def test_sums_of_many_blocks(emulation, backend):
    """One value for all neurons: a block adds up the sums of hundreds of blocks."""
    x_seq, width = random_input(2, 4 * 300 * BLOCK), uniform(low=0.5, high=1.5)
    assert_equals_reference(x_seq, backend, outputs=("s_seq",), width=width)
    assert [blocks for blocks, _ in grids(emulation)] == [300, 300, 1]


@pytest.mark.parametrize(
    ("shape", "size", "blocks"),
    [
        ((2, 3, 2, 64, 64), (2, 1, 1), 2),  # a block an element, each of whose runs touches nine tiles
        ((2, 70, 6, 4, 8), (6, 1, 1), 1),  # 32 elements side by side, 16 runs of each at a time
        ((2, 70, 40, 2, 2), (40, 1, 1), 2),
        ((2, 70, 6, 4, 8), (6, 4, 8), 6),
        ((2, 3, 6, 10, 11), (6, 10, 11), 3),  # two of the three runs at a time
        ((2, 1, 6, 10, 11), (6, 10, 11), 2),
        ((5, 3, 2, 48, 48), (5, 1, 1, 1, 1), 5),
        ((5, 3, 6, 4, 8), (5, 1, 6, 1, 1), 1),
    ],
)
def test_sums_of_elements_side_by_side(emulation, backend, shape, size, blocks):
    x_seq, width = random_input(*shape), uniform(*size, low=0.5, high=1.5)
    assert_equals_reference(x_seq, backend, outputs=("s_seq",), width=width)
    assert [blocks for blocks, _ in grids(emulation)][-1] == blocks


def varied_calls(backend, emulation):
    """A small set of calls that reaches every decision of the launchers."""

    def call(*shape, gradient_of=("s_seq", "v_seq", "h_seq"), **options):
        output = asgl_cuda.lif(torch.randn(shape, requires_grad=True), **options, backend=backend)
        if not isinstance(output, torch.Tensor):
            output = torch.stack(
                [sequence.sum() for name in gradient_of if (sequence := getattr(output, name)) is not None]
            )
        output.sum().backward()

    width, gain = uniform(low=0.5, high=1.5), uniform(6, 1, low=0.5, high=1.5)
    call(8, 2048, width=width)
    for output in ("v_seq", "h_seq"):
        call(20, 2, 6, 32, width=width, **{f"return_{output}": True})
    call(4, 6, 32, return_v_last=True, gradient_of=("v_last",))
    call(4, 2, 6, 32, input_gain=gain, v_rest=0.5)
    call(4, 2, 6, 32, input_gain=gain, input_mean=uniform(low=0.1, high=0.2))
    call(4, 2, 6, 32, input_gain=2.0)
    call(4, 2, 6, 32, input_bias=gain)
    call(4, 2, 6, 32, scale_output=True)
    call(4, 2, 6, 32, v_min=-0.5)
    call(4, 2, 6, 32, v_reset=None, multi_spike=True)
    call(4, 6, 2, width=uniform(6, 1, low=0.5, high=1.5))
    call(4, 6, 7, width=width)
    call(4, 6, 7, width=uniform(6, 1, low=0.5, high=1.5), decay=uniform(6, 7, low=0.5, high=0.9))
    call(4, 6, 32, decay=uniform(4, 1, 1, low=0.5, high=0.9))
    call(32, 3, 6, time_dim=1, width=width)
    for batch in (3, 20):
        call(3, batch, 6, 4, width=uniform(6, 4, low=0.5, high=1.5))
    call(2, 3584, width=width)  # eight tiles
    call(2, 300 * 512 + 1, width=width)
    emulation.set_multiprocessors(1)
    call(5, 1024, v_rest=0.5)
    call(16, 128)
    call(17, 128)
    call(17, 132)
    emulation.set_multiprocessors(emulated.TINY)
    asgl_cuda.lif(torch.randn(4, 6, 32), width=width, backend=backend).sum().backward()
    asgl_cuda.lif(torch.randn(4 * 2048 + 1)[1:].view(4, 2048).requires_grad_(), backend=backend).sum().backward()
    for shift, options in ((0, {"delay": True}), (1, {"input_gain": width}), (0, {"input_gain": width, "v_rest": 0.5})):
        x_seq = torch.randn(4 * 2048 + shift)[shift:].view(4, 2048).requires_grad_()
        emulation.set_multiprocessors(2 if "v_rest" in options else emulated.TINY)
        outputs = asgl_cuda.leaky_integrator(x_seq, **options, return_v_last=True, backend=backend)
        torch.autograd.backward(list(outputs), [torch.ones_like(output) for output in outputs])
    emulation.set_multiprocessors(emulated.TINY)
    for shape in ((3, 2, 6, 4, 8), (3, 2, 5, 2, 3), (3, 2, 130, 1)):
        x_seq = torch.randn(shape, requires_grad=True)
        asgl_cuda.batch_norm_lif(x_seq, training=True, backend=backend).sum().backward()


def test_every_kernel_has_a_name(emulation):
    names = launched.kernel_names()
    assert len(set(names)) == len(names)
    varied_calls("emulated", emulation)
    launches = emulation.take_launches()
    assert len({launch.kernel for launch in launches}) > 20
    assert {launch.kernel for launch in launches} <= set(names)
    with pytest.raises(RuntimeError, match="no such kernel"):
        emulation.launch(torch.device("cpu"), names[0][:-1], 1, 1, 0, 0)
