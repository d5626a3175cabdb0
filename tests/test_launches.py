"""What the CUDA launchers choose, seen on the emulated device: neurons a thread, grid, second stage of the sums."""

import emulated
import pytest
import torch
from comparison import assert_equals_reference, random_input, rng_state, uniform

import asgl_cuda

BLOCK = 128  # kBlockThreads of csrc/lif_kernels.cuh
NEURONS = 1536


def blocks_for(neurons, lanes):
    return -(-neurons // (BLOCK * lanes))


@pytest.mark.parametrize(("multiprocessors", "lanes"), [(emulated.TINY, 4), (emulated.LARGE, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_neurons_a_thread(emulation, multiprocessors, lanes, dtype):
    emulation.set_multiprocessors(multiprocessors)
    x_seq = random_input(3, NEURONS, dtype=dtype)
    asgl_cuda.lif(x_seq, backend="emulated").sum().backward()
    expected = (blocks_for(NEURONS, 1 if dtype == torch.float64 else lanes), BLOCK)
    assert emulation.take_launches() == [expected, expected]


@pytest.mark.parametrize(
    ("name", "lanes"),
    [("plain", 4), ("odd", 1), ("rows of 6", 1), ("shifted", 1), ("width per 2", 1), ("width per 4", 4),
     ("batch first", 4), ("shifted gradient", 1)],
)  # fmt: skip
def test_four_neurons_need_a_layout(emulation, name, lanes):
    """Side by side, at a multiple of 16 bytes, with the same parameters."""
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
    forward, backward = emulation.take_launches()
    assert backward == (blocks_for(neurons, lanes), BLOCK)
    assert forward == ((blocks_for(neurons, 4), BLOCK) if "gradient" in name else backward)


@pytest.mark.parametrize("multiprocessors", [emulated.TINY, emulated.LARGE])
@pytest.mark.parametrize("steps", [4, 8, 9, 16, 40])
@pytest.mark.parametrize("sizes", [(), (6, 1), (NEURONS // 6,), (2, 1, 1)])
def test_both_mappings_agree_with_the_reference(emulation, multiprocessors, steps, sizes):
    emulation.set_multiprocessors(multiprocessors)
    for outputs in (("s_seq",), ("s_seq", "v_last", "v_seq", "h_seq")):
        assert_equals_reference(
            random_input(steps, 2, 6, NEURONS // 6),
            "emulated",
            outputs=outputs,
            width=uniform(*sizes, low=0.5, high=1.5),
            analog_prob=0.3,
            rng_state=rng_state(),
        )


def test_sums_of_many_blocks(emulation):
    """One value for all neurons: a block adds up what hundreds of blocks have stored."""
    emulation.set_multiprocessors(emulated.LARGE)
    neurons = 300 * BLOCK
    x_seq, width = random_input(2, neurons), uniform(low=0.5, high=1.5)
    assert_equals_reference(x_seq, "emulated", outputs=("s_seq",), width=width)
    assert [grid for grid, _ in emulation.take_launches()] == [300, 300, 1]
