"""Random inputs, and what "equal to the reference" means for each type and surrogate."""

from typing import Any

import torch
from torch import Tensor

from asgl_cuda.selfcheck import EXACT_SURROGATES, THRESHOLD_BAND, differences

REAL = {torch.float64: torch.float64}  # every other type computes in float32


def real_of(dtype: torch.dtype) -> torch.dtype:
    return REAL.get(dtype, torch.float32)


def uniform(*shape: int, low: float, high: float, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """A leaf that requires its gradient."""
    values = torch.rand(shape, dtype=torch.float64) * (high - low) + low
    return values.to(device, dtype).requires_grad_()


def random_input(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Currents under which neurons with the default parameters fire at about every third step."""
    return uniform(*shape, low=-1.0, high=2.0, dtype=dtype, device=device)


def rng_state(seed: int = 1234567890123, offset: int = 42, device: Any = "cpu") -> Tensor:
    return torch.tensor([seed, offset], device=device)


def assert_equals_reference(x_seq: Tensor, backend: str, **options: Any) -> None:
    """Outputs and all gradients: the same bits for rectangle and triangle, else the last places (DESIGN: types, bits).

    - Gradients of triangle under 1e-37 may differ by a few of the smallest numbers: csrc/math/surrogates.h says why.
    - Potentials and float32 spikes of the other surrogates: 1e-6, some ten roundings.
    - Half types round that once more when they are stored, so a last place of the type may flip.
    - Parameter gradients are sums in another order: 1e-5.
    """
    surrogate = options.get("surrogate", "rectangle")
    exact = surrogate in EXACT_SURROGATES
    found = differences(x_seq, backend, band=0.0 if exact else THRESHOLD_BAND, **options)
    last_place = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}[x_seq.dtype]
    real_place = 1e-14 if x_seq.dtype == torch.float64 else 1e-6
    for name, difference in found.items():
        if name.startswith("grad_") and name not in ("grad_x_seq", "grad_v_init"):
            allowed = 1e-12 if x_seq.dtype == torch.float64 else 1e-5
        elif exact:
            allowed = 0.0
        else:
            allowed = last_place if name in ("s_seq", "grad_x_seq") else real_place
        assert difference.relative <= allowed, f"{name}: {difference}, allowed {allowed}, all: {found}"
