"""The launchers in C++ and in Python choose the same kernels, grids and parameters."""

import ctypes

import pytest
import torch
from comparison import assert_equals_reference, random_input, real_of, rng_state, uniform

import asgl_cuda
from asgl_cuda.backends import neuron_kernels
from asgl_cuda.backends.structures import structure
from asgl_cuda.reference import Numbers, Parameters, Rules
from asgl_cuda.surrogate import SURROGATES
from tools.emulation import emulated
from tools.emulation.emulated import THREADS_EACH

BLOCK = 128  # kBlockThreads of csrc/cuda/access.cuh
NEURONS = 3 * THREADS_EACH


@pytest.fixture(params=["emulated", "replayed"])
def backend(request):
    """The launchers in C++, and the launchers in Python."""
    return request.param


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


def fields(value, prefix=""):
    """Name and value of every field; for a pointer, whether it is null."""
    if hasattr(value, "_fields_"):
        for name, kind in value._fields_:
            member = getattr(value, name)
            yield from (
                [(prefix + name, bool(member))] if kind is ctypes.c_void_p else fields(member, f"{prefix}{name}.")
            )
    elif isinstance(value, ctypes.Array):
        for index, each in enumerate(value):
            yield from fields(each, f"{prefix[:-1]}[{index}].")
    else:
        yield prefix[:-1], value


def described(launch, dtype):
    name = {
        "lif_forward_kernel": "ForwardParams",
        "lif_backward_kernel": "BackwardParams",
        "lif_backward_settled_kernel": "BackwardParams",
        "adaptive_forward_kernel": "ForwardParams",
        "adaptive_backward_kernel": "BackwardParams",
        "gradient_sum_kernel": "GradientSum",
        "integrator_kernel": "IntegratorParams",
        "batch_moments_kernel": "MomentsParams",
        "batch_norm_coefficients_kernel": "CoefficientsParams",
        "batch_norm_running_kernel": "RunningParams",
        "batch_norm_adjoint_kernel": "AdjointParams",
        "batch_norm_input_gradient_kernel": "InputGradientParams",
    }[launch.kernel.removeprefix("asgl::").split("<")[0]]
    kind = structure(name, real_of(dtype))
    assert len(launch.params) == ctypes.sizeof(kind)
    return launch.kernel, launch.blocks, launch.threads, dict(fields(kind.from_buffer_copy(launch.params)))


def both(emulation, dtype, x_seq, outputs=(), function=asgl_cuda.lif, **options):
    """The launches from C++ and from Python, forward and backward."""
    found = []
    leaves = [x_seq, *(value for value in options.values() if isinstance(value, torch.Tensor) and value.requires_grad)]
    for name in ("emulated", "replayed"):
        emulation.take_launches()
        result = function(x_seq, **options, **{f"return_{output}": True for output in outputs}, backend=name)
        values = [value for value in (result if outputs else [result]) if value is not None]
        torch.autograd.grad(values, leaves, [torch.ones_like(value) for value in values])
        found.append([described(launch, dtype) for launch in emulation.take_launches()])
    assert len(found[0]) >= 2
    return found


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PARAMETERS = ("width", "decay", "v_threshold", "v_reset", "input_gain", "input_bias", "input_mean")


@pytest.mark.parametrize("multiprocessors", [emulated.TINY, 1, emulated.LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 4, 5, 8, 9, 33])
def test_same_launches_over_sizes(emulation, multiprocessors, dtype, steps):
    emulation.set_multiprocessors(multiprocessors)
    for neurons in (1, 31, 128, 132, 2048, 2052, 4 * 2048, 254 * BLOCK, 255 * BLOCK, 300 * BLOCK):
        compiled, in_python = both(
            emulation, dtype, random_input(steps, neurons, dtype=dtype), width=uniform(low=0.5, high=1.5)
        )
        assert in_python == compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_same_launches_over_options(emulation, dtype, surrogate, hard, noise):
    x_seq = random_input(5, 2, 6, 4, dtype=dtype)
    base = {"surrogate": surrogate, "v_reset": 0.1 if hard else None, "analog_prob": noise, "rng_state": rng_state()}
    for options in (
        {},
        {"v_rest": 0.5, "surrogate_gain": 2.0},
        {"v_rest": 1e-60},  # 0 in float32
        {"strict_threshold": True},
        {"scale_output": True},
        {"detach_reset": True},
        {"input_gain": 2.0},
        {"input_bias": 0.5},
        {"input_mean": 0.5},
        {"input_gain": uniform(6, 1, low=0.5, high=1.0), "input_bias": uniform(6, 1, low=0.5, high=1.0)},
        {"input_gain": uniform(5, 1, 1, 1, low=0.5, high=1.0)},
        {"input_mean": uniform(6, 1, low=0.5, high=1.0).detach(), "width": uniform(low=0.5, high=1.0)},
        {"outputs": ("v_last",)},
        {"outputs": ("v_seq",)},
        {"outputs": ("h_seq",)},
        {"v_init": random_input(2, 6, 4, dtype=real_of(dtype))},
    ):
        compiled, in_python = both(emulation, dtype, x_seq, **{**base, **options})
        assert in_python == compiled, options


@pytest.mark.parametrize("layout", ["time first", "batch first", "channels_last", "time last"])
@pytest.mark.parametrize(
    "sizes", [(), (1, 1, 1), (6, 1, 1), (6, 4, 8), (1, 1, 8), (1, 4, 1), (2, 6, 1, 1), (2, 1, 4, 8)]
)
def test_same_launches_over_parameters(emulation, layout, sizes):
    x_seq, time_dim = torch.randn(20, 2, 6, 4, 8), 0
    if layout == "batch first":
        x_seq, time_dim = torch.randn(2, 20, 6, 4, 8), 1
    elif layout == "channels_last":
        x_seq = torch.randn(20, 2, 4, 8, 6).permute(0, 1, 4, 2, 3)
    elif layout == "time last":
        x_seq, time_dim = torch.randn(2, 6, 4, 8, 20), 4
    if layout != "time first":
        sizes = sizes[1:] if len(sizes) == 4 else sizes
    if layout == "time last" and sizes:
        sizes = (*sizes, 1)
    x_seq.requires_grad_()
    for name in PARAMETERS:
        for size in (sizes, [extent if dim == time_dim else 1 for dim, extent in enumerate(x_seq.shape)]):
            parameter = uniform(*size, low=0.5, high=1.0)
            compiled, in_python = both(emulation, torch.float32, x_seq, time_dim=time_dim, **{name: parameter})
            assert in_python == compiled, name


@pytest.mark.parametrize("multiprocessors", [emulated.TINY, 1, emulated.LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [4, 33])
def test_same_launches_of_the_integrator(emulation, multiprocessors, dtype, steps):
    """Forward, backward, and sums of learned parameters."""
    emulation.set_multiprocessors(multiprocessors)
    for neurons, shift, options, launches in (
        (2048, 0, {}, 2), (2048, 0, {"delay": True, "v_rest": 0.5, "outputs": ("v_last",)}, 2), (1031, 0, {}, 2),
        (2048, 0, {"decay": uniform(low=0.5, high=0.9, dtype=real_of(dtype))}, 3),
        (2048, 1, {"input_gain": uniform(2048, low=0.5, high=0.9, dtype=real_of(dtype))}, 3),
        (2048, 0, {"input_gain": uniform(steps, 1, low=0.5, high=0.9, dtype=real_of(dtype))}, 3),
    ):  # fmt: skip
        x_seq = random_input(steps * neurons + shift, dtype=dtype).detach()[shift:].view(steps, neurons)
        compiled, in_python = both(
            emulation, dtype, x_seq.requires_grad_(), function=asgl_cuda.leaky_integrator, **options
        )
        assert in_python == compiled
        assert len(compiled) == launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [4, 33])
def test_same_launches_of_adaptive_neurons(emulation, dtype, steps):
    """One neuron a thread, however many there are."""
    emulation.set_multiprocessors(emulated.TINY)
    for neurons in (1031, 300 * BLOCK):
        for options in ({"adapt_spike": 0.1}, {"to_threshold": True, "adapt_spike": uniform(low=0, high=1)}):
            compiled, in_python = both(
                emulation, dtype, random_input(steps, neurons, dtype=dtype), function=asgl_cuda.adaptive_lif,
                adapt_decay=0.9, outputs=("v_last",), **options,
            )  # fmt: skip
            assert in_python == compiled
            assert [launch[1] for launch in compiled[:2]] == [-(-neurons // BLOCK)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["time first", "channels_last", "shifted"])
@pytest.mark.parametrize("training", [True, False])
def test_same_launches_of_batch_norm(emulation, dtype, layout, training):
    """Tiles of part of a channel, of some channels, of all; one split, and several."""
    for batch, channels, height, width in (
        (2, 6, 4, 8), (3, 5, 7, 7), (1, 200, 1, 4), (5, 3, 24, 25), (2, 130, 1, 1), (90, 3, 2, 1), (300, 2, 4, 4),
    ):  # fmt: skip
        x_seq = torch.randn(3, batch, channels, height, width).to(dtype)
        if layout == "channels_last":
            x_seq = x_seq.movedim(2, -1).contiguous().movedim(-1, 2)
        elif layout == "shifted":
            x_seq = torch.randn(x_seq.numel() + 1).to(dtype)[1:].view_as(x_seq)
        real = real_of(dtype)
        running = {"running_mean": torch.zeros(channels), "running_var": torch.ones(channels)}
        compiled, in_python = both(
            emulation, dtype, x_seq.requires_grad_(), function=asgl_cuda.batch_norm_lif, training=training,
            **({} if training else running), weight=uniform(channels, low=0.5, high=1.5, dtype=real), input_scale=0.7,
            analog_prob=0.3, rng_state=rng_state(),
        )  # fmt: skip
        assert in_python == compiled
        assert [launch[0].split("<")[0] for launch in compiled] == [
            *(["asgl::batch_moments_kernel"] if training else []),
            "asgl::batch_norm_coefficients_kernel",
            "asgl::lif_forward_kernel",
            compiled[2 + training][0].split("<")[0],
            "asgl::gradient_sum_kernel",
            "asgl::batch_norm_adjoint_kernel",
            *(["asgl::batch_norm_input_gradient_kernel"] if training else []),
        ]


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


def test_same_launches_of_varied_calls(emulation):
    found = []
    for backend in ("emulated", "replayed"):
        emulation.take_launches()
        varied_calls(backend, emulation)
        found.append([described(launch, torch.float32) for launch in emulation.take_launches()])
    assert len(found[0]) > 90
    assert found[0] == found[1]


@pytest.mark.parametrize("what", ["x_seq", "v_init"])
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_same_launches_where_storage_begins_anywhere(emulation, what, offset):
    x_seq, v_init = torch.randn(3, 2048), torch.randn(2048)
    shifted = {name: torch.randn(value.numel() + offset)[offset:].view_as(value) for name, value in
               (("x_seq", x_seq), ("v_init", v_init))}  # fmt: skip
    inputs = {"x_seq": x_seq, "v_init": v_init, what: shifted[what]}
    compiled, in_python = both(
        emulation, torch.float32, **{name: leaf.requires_grad_() for name, leaf in inputs.items()}
    )
    assert in_python == compiled


@pytest.mark.parametrize("by", [1, 2, 3, 4, 7, 641, 784, 65535, 65536, 65537, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1])
def test_divisors_divide(by):
    _, factor, shift = neuron_kernels._divisor(by)
    assert factor < 2**32
    largest = 2**31 // by * by
    values = {value + by * many for value in (-1, 0, 1) for many in (0, 1, 2, 3, 1000, largest // by)}
    for value in filter(range(2**31).__contains__, {*values, 2**31 - 1, 2**31 - 2}):
        assert value * factor >> shift == value // by


def test_neurons_beyond_31_bits_are_general():
    numbers = Numbers(**{**dict.fromkeys(Numbers._fields, 0.0), "input_gain": 1.0})
    rules = Rules(**dict.fromkeys(Rules._fields, 0))
    for neurons, expected in ((2**31 - 1, "kPlain"), (2**31, "kGeneral")):
        x_seq = torch.empty(1, neurons, dtype=torch.float16, device="meta")
        call = neuron_kernels.Call(x_seq, None, None, [None] * len(Parameters._fields), numbers, rules)
        assert call.input(only_spikes=True) == expected


def test_params_of_another_size_are_refused(emulation):
    """Before a kernel reads beyond a structure that has changed on one side alone."""
    kernel = "asgl::gradient_sum_kernel<float>"
    with pytest.raises(RuntimeError, match="parameters take 824 bytes, got 680"):
        emulation.launch(torch.device("cpu"), kernel, 1, 1, structure("ForwardParams", torch.float32)())
    with pytest.raises(RuntimeError, match="no such kernel"):
        emulation.launch(torch.device("cpu"), kernel[:-1], 1, 1, structure("GradientSum", torch.float32)())
