"""Tests on a GPU: streams, devices, graphs, the kernels of large layers, out of memory."""

import copy
import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_equals_reference, random_input, real_of, rng_state, uniform
from torch import Tensor

import asgl_cuda
from asgl_cuda.backends import BACKENDS
from asgl_cuda.reference.noise import _philox4x32
from tools.gpu_check.layers import captured

WANTED = os.environ.get("ASGL_TEST_BACKENDS", "cuda,cupy").split(",")
GPU_BACKENDS = [name for name in ("cuda", "cupy") if name in WANTED and name in asgl_cuda.available_backends()]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU_BACKENDS, reason=str(asgl_cuda.unavailable_backends()))]

WAIT = 500_000_000  # cycles, some 0.3 s: longer than a busy host takes to queue a call


@pytest.fixture(params=GPU_BACKENDS or ["none"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends for a GPU."""
    return request.param


@pytest.fixture
def large() -> int:
    """Enough neurons for the kernels with four a thread."""
    properties = torch.cuda.get_device_properties("cuda")
    return 2 * properties.multi_processor_count * properties.max_threads_per_multi_processor


def noise(seed: int = 1234567890123) -> dict[str, Any]:
    return {"analog_prob": 0.3, "rng_state": rng_state(seed, device="cuda")}


def results(backend: str, x_seq: Tensor, grad: Tensor | None = None, **options) -> tuple[Tensor, ...]:
    """Spikes and gradients, of x and of the options that require one."""
    leaf = x_seq.detach().requires_grad_()
    s_seq = asgl_cuda.lif(leaf, **options, backend=backend)
    leaves = [leaf, *(value for value in options.values() if isinstance(value, Tensor) and value.requires_grad)]
    return s_seq.detach(), *torch.autograd.grad(s_seq, leaves, s_seq.detach() if grad is None else grad)


def same_bits(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("steps", "dtype", "v_reset"),
    [(1, torch.float32, 0.1), (4, torch.float16, None), (4, torch.bfloat16, 0.1), (7, torch.float32, None),
     (16, torch.float16, 0.1), (18, torch.bfloat16, None), (18, torch.float32, 0.1)],
)  # fmt: skip
def test_large_layer_with_one_width(backend, large, steps, dtype, v_reset):
    assert_equals_reference(
        random_input(steps, large, dtype=dtype, device="cuda"), backend, outputs=("s_seq",), v_reset=v_reset,
        width=uniform(low=0.5, high=1.5, device="cuda"), **noise(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "sizes", "surrogate"),
    [(torch.bfloat16, (), "rectangle"), (torch.float32, (16, 1), "sigmoid"), (torch.float32, (1, 128), "rectangle"),
     (torch.float64, (), "rectangle")],
)  # fmt: skip
def test_large_layer_with_everything(backend, large, dtype, sizes, surrogate):
    real = real_of(dtype)
    ranges = {
        "width": (0.7, 1.5), "decay": (0.4, 0.9), "v_threshold": (0.8, 1.2), "v_reset": (-0.2, 0.2),
        "input_gain": (0.8, 1.2), "input_bias": (-0.1, 0.1), "input_mean": (-0.1, 0.1),
    }  # fmt: skip
    parameters = {
        name: uniform(*sizes, low=low, high=high, dtype=real, device="cuda") for name, (low, high) in ranges.items()
    }
    assert_equals_reference(
        random_input(18, large // 2048, 16, 128, dtype=dtype, device="cuda"), backend, surrogate=surrogate,
        v_init=uniform(large // 2048, 16, 128, low=-1, high=1, dtype=real, device="cuda"), scale_output=True,
        **parameters, **noise(),
    )  # fmt: skip


def test_two_runs_of_a_large_layer_are_bit_identical(backend, large):
    x_seq = random_input(18, large // 16, 16, device="cuda")
    for sizes in ((), (16,)):
        width = uniform(*sizes, low=0.5, high=1.5, device="cuda")
        first, second = (results(backend, x_seq, width=width, **noise()) for _ in range(2))
        assert same_bits(first, second)


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.bfloat16, 4), (torch.float32, 1), (torch.float32, 2),
     (torch.float64, 1), (torch.float64, 3)],
)  # fmt: skip
def test_storage_that_begins_anywhere(backend, large, dtype, offset):
    """Input, gradient and potential as views that are not aligned for vector accesses."""
    real = real_of(dtype)

    def shifted(tensor: Tensor) -> Tensor:
        flat = torch.cat([tensor.new_zeros(offset), tensor.detach().flatten()])
        return flat[offset:].view(tensor.shape)

    x_seq, grad = (random_input(5, large, dtype=dtype, device="cuda").detach() for _ in range(2))
    v_init = random_input(large, dtype=real, device="cuda").detach()
    options = noise()
    expected = results(backend, x_seq, grad, v_init=v_init.requires_grad_(), **options)
    for x, g, v in (
        (shifted(x_seq), shifted(grad), shifted(v_init)),
        (shifted(x_seq), grad, v_init),
        (x_seq, shifted(grad), v_init),
        (x_seq, grad, shifted(v_init)),
    ):
        assert x.is_contiguous()
        assert same_bits(results(backend, x, g, v_init=v.detach().requires_grad_(), **options), expected)


def test_work_goes_to_the_current_stream(backend, large):
    """The input is written late, on another stream, and the host does not wait."""
    x_seq = random_input(18, large, device="cuda").detach()
    options = {"width": uniform(low=0.5, high=1.5, device="cuda"), **noise()}
    expected = results(backend, x_seq, **options)
    late = torch.zeros_like(x_seq)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(backend, late, **options)  # loads kernels, and fills the stream's memory cache
        side.synchronize()
        torch.cuda._sleep(WAIT)
        late.copy_(x_seq)
        actual = results(backend, late, **options)
        waiting = not side.query()
    side.synchronize()
    assert waiting
    assert same_bits(actual, expected)


def test_thread_that_has_not_used_the_device(backend):
    """Memory comes from torch's cache, so that only the kernel needs the device."""
    x_seq = random_input(18, 1000, device="cuda").detach()
    width = uniform(low=0.5, high=1.5, device="cuda")
    expected = results(backend, x_seq, width=width)
    found = []
    thread = threading.Thread(target=lambda: found.append(results(backend, x_seq, width=width)))
    thread.start()
    thread.join()
    assert same_bits(*found, expected)


def test_nothing_waits_for_the_device(backend):
    layer = asgl_cuda.LIF(31, granularity="channel", learn_decay=True, stateful=True, backend=backend).to("cuda")
    x_seq = random_input(20, 3, 31, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            x_seq.sum().item()
        for _ in range(2):
            layer(x_seq).sum().backward()
            layer.detach_()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current(backend, large):
    second = torch.device("cuda", 1)
    for neurons in (31, large):
        assert_equals_reference(
            random_input(18, neurons, device=second), backend, width=uniform(low=0.5, high=1.5, device=second),
            analog_prob=0.3, rng_state=rng_state(device=second),
        )  # fmt: skip
        assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=r"width must be on cuda:1 as x_seq, got cuda:0"):
        asgl_cuda.lif(random_input(4, 31, device=second), width=torch.ones((), device="cuda:0"))


@pytest.mark.parametrize("size", ["small", "large"])
def test_graph_of_forward_and_backward(backend, large, size):
    neurons = large if size == "large" else 1000
    x_seq = random_input(18, neurons, device="cuda").detach()
    width = uniform(low=0.5, high=1.5, device="cuda")
    options = {"width": width, **noise()}
    graph, outputs = captured(lambda: results(backend, x_seq, **options))
    for seed in (1, 2):
        x_seq.copy_(random_input(18, neurons, device="cuda"))
        options["rng_state"].copy_(rng_state(seed, device="cuda"))
        width.data.mul_(1.5)
        for _ in range(2):
            graph.replay()
            assert same_bits(outputs, results(backend, x_seq, **options))


@pytest.mark.parametrize("with_residual", [False, True])
def test_graph_of_a_normalised_layer(backend, large, with_residual):
    """Each replay takes a step of the running statistics, too."""
    layer = asgl_cuda.BatchNormLIF(16, analog_prob=0.0, backend=backend).to("cuda")
    inputs = [random_input(4, large // 2048, 16, 128, device="cuda") for _ in range(1 + with_residual)]

    def step(layer: asgl_cuda.BatchNormLIF) -> tuple[Tensor, ...]:
        s_seq = layer(*inputs)
        return s_seq.detach(), *torch.autograd.grad(s_seq, [*inputs, *layer.parameters()], s_seq.detach())

    graph, outputs = captured(lambda: step(layer))
    twin = copy.deepcopy(layer)
    for _ in range(2):
        for each in inputs:
            each.data.copy_(random_input(*each.shape, device="cuda"))
        graph.replay()
        assert same_bits(outputs, step(twin))
        assert same_bits(tuple(layer.buffers()), tuple(twin.buffers()))


def test_graph_draws_fresh_noise_at_each_replay(backend):
    x_seq = random_input(18, 1000, device="cuda").detach()
    x_seq[0] = 1.25  # u = 1/4: hard spikes are 1, analog ones 3/4

    def step() -> tuple[Tensor, ...]:
        return results(backend, x_seq, analog_prob=0.5)

    graph, outputs = captured(step)
    found = []
    for seed in (7, 8, 7):
        torch.manual_seed(seed)
        for _ in range(3):
            graph.replay()
            found.append(tuple(output.clone() for output in outputs))
    assert all(map(same_bits, found[:3], found[6:]))
    masks = [s_seq[0] == 0.75 for s_seq, _ in found[:6]]
    for i, mask in enumerate(masks):
        # 1000 fair coins: five deviations of the share are 0.08; two masks agree in half of their elements.
        shares = [mask.float().mean(), *((mask == later).float().mean() for later in masks[i + 1 :])]
        assert all(abs(share.item() - 0.5) < 0.08 for share in shares)


def test_graph_draws_the_same_noise_for_forward_and_backward(backend):
    x_seq = random_input(18, 1000, device="cuda").detach()

    def step() -> tuple[Tensor, ...]:
        state = BACKENDS[backend].operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device="cuda"))
        return state, *results(backend, x_seq, analog_prob=0.5, rng_state=state)

    graph, (state, *outputs) = captured(step)
    for _ in range(2):
        graph.replay()
        assert same_bits(tuple(outputs), results(backend, x_seq, analog_prob=0.5, rng_state=state.clone()))


def philox_mask(first: int, neurons: int, steps: int, analog_prob: float, state: Tensor) -> Tensor:
    """The definition of `analog_mask`, for neurons from `first`, a multiple of 4."""
    low = 0xFFFFFFFF
    n = torch.arange(first, first + neurons, device=state.device)
    t = torch.arange(steps, device=state.device)[:, None]
    seed, offset = state[0], state[1]
    group = n // 4
    words = torch.stack(
        torch.broadcast_tensors(
            *_philox4x32((group & low, group >> 32, t // 2, offset & low), (seed & low, seed >> 32 & low))
        )
    )
    lane = (4 * (t % 2) + n % 4).expand(steps, neurons)
    return (words.gather(0, (lane // 2)[None])[0] >> 16 * (lane % 2) & 0xFFFF) < round(analog_prob * 65536)


def assert_chunks_equal_reference(x_seq: Tensor, chunk: int, outputs: tuple[Tensor, ...], width: Tensor) -> None:
    """Spikes and gradients of x and width without noise, against the reference on `chunk` neurons at a time."""
    s_seq, dx, dwidth = outputs
    expected_dwidth, terms = 0.0, 0.0
    for begin in range(0, x_seq.shape[1], chunk):
        part = slice(begin, begin + chunk)
        x = x_seq[:, part].contiguous().requires_grad_()
        each = width.detach().expand(x.shape).requires_grad_()
        expected = asgl_cuda.lif(x, width=each, backend="reference")
        expected_dx, dwidths = torch.autograd.grad(expected, (x, each), s_seq[:, part].contiguous())
        assert torch.equal(s_seq[:, part], expected), f"spikes of neurons {begin} to {begin + chunk}"
        assert torch.equal(dx[:, part], expected_dx), f"gradients of neurons {begin} to {begin + chunk}"
        expected_dwidth += dwidths.double().sum().item()
        terms += dwidths.double().square().sum().item()
    # Terms may cancel; their roundings do not.
    assert abs(dwidth.item() - expected_dwidth) <= 1e-5 * max(abs(expected_dwidth), terms**0.5)


def test_more_than_2_31_elements(backend):
    """All neurons without noise; with noise, the first, middle and last neurons."""
    steps, neurons = 4, 2**29 + 12
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of the GPU's memory")
    x_seq = torch.empty(steps, neurons, dtype=torch.bfloat16, device="cuda").uniform_(-1, 2)
    width = torch.ones((), device="cuda", requires_grad=True)
    outputs = results(backend, x_seq, width=width)
    assert_chunks_equal_reference(x_seq, 2**24, outputs, width)
    del outputs

    # At this width no analog element is 0 or 1.
    state = rng_state(device="cuda")
    s_seq = asgl_cuda.lif(x_seq, width=16.0, analog_prob=0.3, rng_state=state, backend=backend)
    analog = (s_seq != 0) & (s_seq != 1)
    for first, count in ((0, 4096), (2**28, 4096), (neurons - 4096, 4096)):
        assert torch.equal(analog[:, first : first + count], philox_mask(first, count, steps, 0.3, state))


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """Limits this process to its reserved memory plus a number of bytes."""

    def grant(more: int) -> None:
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield grant
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_is_an_error_and_no_more(backend, little_memory):
    x_seq = random_input(4, 2**24, dtype=torch.bfloat16, device="cuda")
    size = x_seq.numel() * x_seq.element_size()
    s_seq = asgl_cuda.lif(x_seq, backend=backend)
    (expected,) = torch.autograd.grad(s_seq, x_seq, s_seq.detach(), retain_graph=True)
    # Room in forward for the spikes but not for the potentials, in backward for nothing.
    for room, call in (
        (2 * size, lambda: asgl_cuda.lif(x_seq, return_v_seq=True, return_h_seq=True, backend=backend)),
        (size // 2, lambda: torch.autograd.grad(s_seq, x_seq, s_seq.detach(), retain_graph=True)),
    ):
        gc.collect()  # what other tests left in cycles would be freed in between
        before = torch.cuda.memory_allocated()
        little_memory(room)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            call()
        gc.collect()  # the error's traceback
        assert torch.cuda.memory_allocated() == before
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert same_bits(results(backend, x_seq), (s_seq.detach(), expected))


@pytest.mark.sanitizer
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer(backend, tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    # Without torch's cache each tensor is an allocation with bounds of its own.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [*command, sys.executable, "-m", "tools.gpu_check.small_calls", "--device", "cuda", "--backend", backend],
        capture_output=True, text=True, timeout=240, env={**os.environ, **environment},
    )  # fmt: skip
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "\ndone\n" in result.stdout
