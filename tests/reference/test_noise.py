"""The noise: the generator against its published vectors, its statistics, and the same mask everywhere."""

import math

import pytest
import torch
from comparison import rng_state

import asgl_cuda
from asgl_cuda.checks import check_analog_prob_tensor
from asgl_cuda.reference.noise import _philox4x32

# Random123 (Salmon et al., SC 2011) publishes these counters, keys and results of Philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = _philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert tuple(word.item() for word in words) == expected


def analog_elements(x_seq, backend, analog_prob, state, time_dim=0):
    """A backend's mask, inferred from outputs: u = 1/4 everywhere, so hard spikes are 1, analog elements 3/4."""
    x_seq = torch.full_like(x_seq, 1.25)
    s_seq = asgl_cuda.lif(
        x_seq,
        decay=0.0,
        surrogate="rectangle",
        analog_prob=analog_prob,
        rng_state=state,
        time_dim=time_dim,
        backend=backend,
    )
    assert set(s_seq.unique().tolist()) <= {0.75, 1.0}
    return s_seq == 0.75


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 1031), (33, 7, 3), (4, 2, 3, 4, 5)])
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 3), (-1, 2**32 + 3), (2**40 + 7, -5), (-(2**62), 3)])
def test_mask_of_backend_is_analog_mask(backend, device, shape, seed, offset):
    """Only the low 32 bits of the offset count."""
    x_seq = torch.empty(shape, device=device)
    state = rng_state(seed, offset, device)
    mask = asgl_cuda.analog_mask(x_seq, 0.4, state)
    assert torch.equal(mask, analog_elements(x_seq, backend, 0.4, state))
    assert torch.equal(mask, asgl_cuda.analog_mask(x_seq, 0.4, rng_state(seed, offset % 2**32, device)))


@pytest.mark.parametrize("shape", [(1030, 5), (131076, 1), (2, 262150)])
def test_mask_of_many_steps_and_neurons(backend, device, shape):
    """More pairs of steps, and groups of neurons, than 8 and 16 bits count."""
    x_seq, state = torch.empty(shape, device=device), rng_state(device=device)
    mask = asgl_cuda.analog_mask(x_seq, 0.4, state)
    assert torch.equal(mask, analog_elements(x_seq, backend, 0.4, state))
    for dim, size in ((0, 512), (0, 131072), (1, 1024), (1, 262144)):
        if size < shape[dim]:
            later = mask.narrow(dim, size, shape[dim] - size)
            assert not torch.equal(later, mask.narrow(dim, 0, later.shape[dim]))


def test_rng_state_may_lie_anywhere(backend, device):
    """Seed and offset need not be adjacent in memory."""
    x_seq, state = torch.empty(5, 1031, device=device), rng_state(device=device)
    apart = torch.stack([state, state + 1], dim=1)[:, 0]
    assert not apart.is_contiguous()
    for states in (apart, state):
        mask = asgl_cuda.analog_mask(x_seq, 0.4, states)
        assert torch.equal(mask, analog_elements(x_seq, backend, 0.4, apart))


def test_analog_prob_is_rounded_to_nearest():
    x_seq, state = torch.empty(2, 500000), rng_state()
    masks = [asgl_cuda.analog_mask(x_seq, below / 65536, state) for below in (2, 2.6, 3)]
    assert torch.equal(masks[1], masks[2])
    assert not torch.equal(masks[1], masks[0])
    for below in (2, 2.4, 2.6, 3):
        share = torch.tensor(below / 65536, dtype=torch.float64)
        assert check_analog_prob_tensor(share, x_seq, "test").tolist() == [round(below)]


@pytest.mark.parametrize("time_dim", [0, 1, 2, -1])
def test_mask_with_time_elsewhere(backend, device, time_dim):
    x_seq = torch.empty(6, 5, 9, device=device)
    state = rng_state(device=device)
    mask = asgl_cuda.analog_mask(x_seq, 0.3, state, time_dim=time_dim)
    assert torch.equal(mask, analog_elements(x_seq, backend, 0.3, state, time_dim))
    flat = asgl_cuda.analog_mask(x_seq.movedim(time_dim, 0).contiguous(), 0.3, state)
    assert torch.equal(mask, flat.movedim(0, time_dim))


@pytest.mark.parametrize(("time_dim", "channel"), [(0, 2), (1, 2), (3, 1)])
def test_mask_follows_memory_of_channels_last(backend, device, time_dim, channel):
    x_seq = torch.empty(3, 2, 5, 4, 6, device=device)
    in_memory = x_seq.movedim(channel, -1).contiguous()
    channels_last = in_memory.movedim(-1, channel)
    state = rng_state(device=device)
    mask = asgl_cuda.analog_mask(channels_last, 0.3, state, time_dim)
    assert torch.equal(mask, analog_elements(channels_last, backend, 0.3, state, time_dim))
    expected = asgl_cuda.analog_mask(in_memory, 0.3, state, time_dim - (time_dim > channel))
    assert torch.equal(mask, expected.movedim(-1, channel))


def test_definition_element_by_element():
    """The definition of the noise, written out with Python integers for each element."""
    steps, neurons, seed, offset, analog_prob = 5, 11, 2**35 + 11, 7, 0.37
    mask = asgl_cuda.analog_mask(torch.empty(steps, neurons), analog_prob, rng_state(seed, offset))
    for t in range(steps):
        for n in range(neurons):
            group = n // 4
            counter = (group % 2**32, group // 2**32, t // 2, offset % 2**32)
            key = (seed % 2**32, seed // 2**32)
            words = _philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
            lane = 4 * (t % 2) + n % 4
            r = words[lane // 2].item() >> (16 * (lane % 2)) & 0xFFFF
            assert mask[t, n].item() == (r < round(analog_prob * 65536))


@pytest.mark.parametrize("analog_prob", [0.0, 1.0, 0.5 / 65536 - 1e-9, 1 - 1e-9])
def test_none_and_all_need_no_draw(backend, device, analog_prob):
    x_seq = torch.empty(4, 37, device=device)
    mask = analog_elements(x_seq, backend, analog_prob, rng_state(device=device))
    assert mask.all() if analog_prob > 0.5 else not mask.any()
    drawn = torch.get_rng_state()
    asgl_cuda.lif(x_seq, analog_prob=analog_prob, backend=backend)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_share_of_analog_elements():
    """The share is binomial: five deviations leave one chance in two million of a false alarm (the seed is fixed)."""
    x_seq = torch.empty(64, 20000)
    for analog_prob in (1 / 65536, 0.01, 0.2, 0.5, 0.9):
        share = asgl_cuda.analog_mask(x_seq, analog_prob, rng_state()).double().mean().item()
        probability = round(analog_prob * 65536) / 65536
        deviation = math.sqrt(probability * (1 - probability) / x_seq.numel())
        assert abs(share - probability) < 5 * deviation


def test_default_noise_obeys_manual_seed(backend, device):
    x_seq = torch.full((4, 64), 1.25, device=device)

    def run(generator=None):
        return asgl_cuda.lif(
            x_seq, decay=0.0, surrogate="rectangle", analog_prob=0.5, generator=generator, backend=backend
        )

    torch.manual_seed(7)
    first, second = run(), run()
    torch.manual_seed(7)
    assert torch.equal(first, run())
    assert not torch.equal(first, second)
    # The reference draws the same values from the same generator.
    torch.manual_seed(7)
    options = {"decay": 0.0, "surrogate": "rectangle", "analog_prob": 0.5, "backend": "reference"}
    assert torch.equal(first, asgl_cuda.lif(x_seq, **options))
    generator = torch.Generator(device).manual_seed(3)
    third = run(generator)
    assert torch.equal(third, run(torch.Generator(device).manual_seed(3)))
    assert not torch.equal(third, first)
