"""The noise: which elements are analog, by a counter-based generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import memory_order
from .records import BELOW_IN_STATE, DRAWS

SEED_PER_STEP = 0x61C8864680B583EB  # kSeedPerStep of csrc/params/recurrent.h


def rng_states_of_steps(rng_state: Tensor | None, steps: int) -> Tensor | list[None]:
    """The rng_state of each step of recurrent neurons, in which SEED_PER_STEP * t is added to the seed."""
    if rng_state is None:
        return [None] * steps
    is_seed = torch.arange(rng_state.shape[0], device=rng_state.device) == 0
    return rng_state + torch.arange(steps, device=rng_state.device)[:, None] * SEED_PER_STEP * is_seed


def _philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on 32-bit words in int64 tensors."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products of int64 wrap modulo 2^64, so they have the bits of unsigned products.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32 & low) ^ c1 ^ k0, product1 & low
        c2, c3 = (product0 >> 32 & low) ^ c3 ^ k1, product0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def _draws(neurons: int, steps: int, rng_state: Tensor) -> Tensor:
    """16 random bits for each step and neuron, [steps, neurons]: one Philox block serves 4 neurons and 2 steps."""
    low = 0xFFFFFFFF
    device = rng_state.device
    group = torch.arange((neurons + 3) // 4, device=device)
    pair = torch.arange((steps + 1) // 2, device=device)[:, None]
    seed, offset = rng_state[0], rng_state[1]
    words = _philox4x32((group & low, group >> 32, pair, offset & low), (seed & low, seed >> 32 & low))
    lanes = [bits for word in torch.broadcast_tensors(*words) for bits in (word & 0xFFFF, word >> 16)]
    draws: Tensor = torch.stack(lanes, dim=-1).unflatten(-1, (2, 4))  # pair, group, step in pair, neuron in group
    return draws.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:steps, :neurons]


def analog_mask_below(x_seq: Tensor, analog_below: int, rng_state: Tensor | None, time_dim: int) -> Tensor:
    """Which elements of x_seq are analog: those whose draw, an integer in [0, DRAWS), is below `analog_below`."""
    if analog_below in (0, DRAWS):
        return torch.full(x_seq.shape, analog_below > 0, dtype=torch.bool, device=x_seq.device)
    assert rng_state is not None
    below = rng_state[2] if analog_below == BELOW_IN_STATE else analog_below
    order = memory_order(x_seq, time_dim)
    sizes = [x_seq.shape[dim] for dim in order if dim != time_dim]
    steps = x_seq.shape[time_dim]
    mask = _draws(x_seq.numel() // steps, steps, rng_state) < below
    # Reorders the mask from [time, neurons] to the memory order of x_seq, then to the order of its dimensions.
    mask = mask.unflatten(1, sizes).movedim(0, order.index(time_dim)) if sizes else mask[:, 0]
    return mask.permute([order.index(dim) for dim in range(x_seq.dim())])
