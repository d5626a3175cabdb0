"""Draws the rng_state of a call (seed, offset), unless it is given. `checked_call` in plan.py asks for it.

Kernels derive each element's bits from it (csrc/math/philox.h, reference/noise.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..checks import check_analog_prob_tensor, check_generator, check_rng_state
from ..reference.records import DRAWS
from ..torch_modes import is_transform_active


def rng_state_of_call(
    caller: str, x_seq: Tensor, analog_below: int, given: Any, backend: str, together: bool
) -> Tensor | None:
    """The rng_state that the operators get: the given one, or a new one; None if no noise is needed.

    If analog_prob is a tensor, `Rules.analog_below` is BELOW_IN_STATE, and the limit for draws is the third element of
    rng_state, because one more tensor in the schemas would slow all calls. With `together`, one call of an operator may
    compute all samples of a vmap.
    """
    rng_state, generator, analog_prob = given["rng_state"], given["generator"], given["analog_prob"]
    below = check_analog_prob_tensor(analog_prob, x_seq, caller) if isinstance(analog_prob, Tensor) else None
    if rng_state is not None:
        check_rng_state(rng_state, x_seq, caller)
        if generator is not None:
            raise ValueError(f"{caller}: rng_state and generator exclude each other, got both; pass only one of them")
    if generator is not None:
        check_generator(generator, x_seq, caller)
    if analog_below in (0, DRAWS):
        return None
    if rng_state is None:
        rng_state = _draw_rng_state(x_seq, generator, backend, together and below is None)
    return rng_state.contiguous() if below is None else torch.cat([rng_state, below])


def _draw_rng_state(x_seq: Tensor, generator: torch.Generator | None, backend: str, together: bool) -> Tensor:
    """A new (seed, offset), `[2]`, drawn by the generator, or by the default generator of the device.

    With `together`, the noise under vmap follows its `randomness`: the same for all samples, or different noise. The
    result is then `[1, 2]`, see `_draw_under_transforms`.
    """
    operators = BACKENDS[backend].operators
    if operators is not None:
        if torch.compiler.is_compiling():
            if generator is None:
                return operators.draw_rng_state(torch.empty(2, dtype=torch.int64, device=x_seq.device))
        elif together and is_transform_active():
            return _draw_under_transforms(x_seq.device, generator)
    return torch.randint(2**63 - 1, (2,), generator=generator, device=x_seq.device)


def _draw_under_transforms(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A random rng_state `[1, 2]`, by the rules of vmap's `randomness`.

    For different noise per sample, rng_state is mapped with equal values: the first dimension tells batching rules that
    the neurons of all samples are numbered consecutively.
    """
    from torch._functorch import pyfunctorch

    levels = pyfunctorch.retrieve_all_functorch_interpreters()
    maps = [each for each in levels if isinstance(each, pyfunctorch.VmapInterpreter)]
    if any(each.randomness() == "error" for each in maps):
        return torch.randint(2**63 - 1, (1, 2), generator=generator, device=device)  # vmap refuses this call
    apart = [each for each in maps if each.randomness() == "different"]
    with pyfunctorch.temporarily_clear_interpreter_stack():
        state = torch.randint(2**63 - 1, (1, 2), generator=generator, device=device)
        state = state.expand(*(each.batch_size() for each in apart), 1, 2)
        for each in apart:  # outermost first
            state = torch._C._functorch._add_batch_dim(state, 0, each.level())
    return state
