"""Random inputs, and the meaning of "equal to the reference" for each type and surrogate."""

from typing import Any

import torch
from torch import Tensor, nn

from asgl_cuda import LIF
from asgl_cuda.selfcheck import EXACT_SURROGATES, THRESHOLD_BAND, differences

LEARN_ALL = {"learn_width": True, "learn_decay": True, "learn_threshold": True}
REAL = {torch.float64: torch.float64}  # every other type computes in float32


def real_of(dtype: torch.dtype) -> torch.dtype:
    return REAL.get(dtype, torch.float32)


def uniform(*shape: int, low: float, high: float, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """A leaf that requires a gradient."""
    values = torch.rand(shape, dtype=torch.float64) * (high - low) + low
    return values.to(device, dtype).requires_grad_()


def random_input(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Currents under which neurons with the default parameters fire at about every third step."""
    return uniform(*shape, low=-1.0, high=2.0, dtype=dtype, device=device)


def rng_state(seed: int = 1234567890123, offset: int = 42, device: Any = "cpu") -> Tensor:
    return torch.tensor([seed, offset], device=device)


def negated(value: Tensor) -> Tensor:
    """The same values under torch's negative bit."""
    lazy = torch._neg_view(value.detach().neg())
    assert lazy.is_neg()
    assert torch.equal(lazy, value)
    return lazy.requires_grad_(value.requires_grad)


def randomized(model: nn.Module) -> nn.Module:
    """The same model with another value for each element of the neurons' parameters."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LIF):
                for parameter in layer.parameters():
                    parameter += torch.rand_like(parameter) * 0.3
    return model


def assert_equals_reference(x_seq: Tensor, backend: str, **options: Any) -> None:
    """Compares outputs and all gradients: the same bits for rectangle, the default here, and triangle, else roundings.

    - Triangle gradients under 1e-37 may differ by a few smallest subnormals: see csrc/math/surrogates.h.
    - Potentials and float32 spikes of the other surrogates may differ by 1e-6, some ten roundings.
    - Half types round these values once more on store, so they may differ by one ulp.
    - Parameter gradients are sums in another order, and may differ by 1e-5.
    """
    options = {"surrogate": "rectangle", **options}
    exact = options["surrogate"] in EXACT_SURROGATES
    found = differences(x_seq, backend, band=0.0 if exact else THRESHOLD_BAND, **options)
    last_place = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}[x_seq.dtype]
    real_place = 1e-14 if x_seq.dtype == torch.float64 else 1e-6
    for name, difference in found.items():
        if name.startswith("grad_") and name not in ("grad_x_seq", "grad_v_init", "grad_residual"):
            allowed = 1e-12 if x_seq.dtype == torch.float64 else 1e-5
        elif exact:
            allowed = 0.0
        else:
            allowed = last_place if name in ("s_seq", "grad_x_seq", "grad_residual") else real_place
        assert difference.relative <= allowed, f"{name}: {difference}, allowed {allowed}, all: {found}"


class Stack(nn.Module):
    """A model with the given function as forward."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x_seq):
        return self.function(self, x_seq)
