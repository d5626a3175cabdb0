"""Compares each backend with the reference on this machine, for `python -m asgl_cuda check` and the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS, available_backends
from .calls.arguments import RETURNS
from .layout import real_type
from .neurons.leaky_integrator import leaky_integrator
from .neurons.lif import LIFOutput, lif
from .neurons.recurrent_lif import recurrent_lif
from .reference.surrogates import PERIODIC, SURROGATES

# The outputs of `lif` that are compared.
OUTPUTS = "s_seq", *(name.removeprefix("return_") for name in RETURNS)

# Surrogates that are bit-identical in every backend. Most others call exp, erf or atan, whose rounding depends on the
# math library.
EXACT_SURROGATES = ("rectangle", "triangle")

# Computations that differ by roundings may disagree on spikes near the threshold. If bits may differ, neurons that come
# closer to the threshold than this (tens of float32 roundings) are left out.
THRESHOLD_BAND = 1e-5


class Difference(NamedTuple):
    """The largest difference between two tensors, absolute and relative to a size.

    The size is the largest value of the reference. For the gradient of a parameter, which is a sum, it is the larger of
    the sum and the root of the sum of squares, because terms may cancel while their roundings do not.
    """

    absolute: float
    relative: float


def differences(
    x_seq: Tensor, backend: str, band: float = 0.0, outputs: Sequence[str] = OUTPUTS, **options: Any
) -> dict[str, Difference]:
    """Compares `lif` on a backend with the reference: `outputs`, and the gradients of all tensors that require them.

    Backward starts from random gradients of the outputs. `options` are arguments of `lif`. Neurons whose potential
    comes within `band` of the threshold are left out.
    """
    leaves = {"x_seq": x_seq, **{name: value for name, value in options.items() if isinstance(value, Tensor)}}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    # The gradient of a parameter is a sum over elements. If the parameter is expanded first, its gradient contains the
    # terms of this sum, from which `size` is computed.
    terms = {
        name: leaf.expand(x_seq.shape) for name, leaf in leaves.items() if name not in ("x_seq", "v_init", "residual")
    }
    everything = _outputs(x_seq, "reference", OUTPUTS, **{**options, **terms})
    expected = {name: everything[name] for name in outputs}
    actual = _outputs(x_seq, backend, outputs, **options)

    time_dim = options.get("time_dim", 0)
    v_threshold = torch.as_tensor(options.get("v_threshold", 1.0), device=x_seq.device)
    near = (everything["h_seq"].detach() - v_threshold.detach()).abs() < band
    keep_seq = (~near.any(dim=time_dim, keepdim=True)).expand_as(x_seq)
    keep = {name: keep_seq.select(time_dim, 0) if name == "v_last" else keep_seq for name in expected}

    def zero_near_threshold(value: Tensor, name: str) -> Tensor:
        """The value with zeros for neurons whose potential came within `band` of the threshold."""
        return torch.where(keep[name], value, torch.zeros_like(value))

    generator = torch.Generator().manual_seed(0)
    grads = [
        zero_near_threshold(torch.randn(output.shape, generator=generator).to(output), name)
        for name, output in expected.items()
    ]
    expected_grads = torch.autograd.grad(list(expected.values()), list({**leaves, **terms}.values()), grads)
    actual_grads = torch.autograd.grad(list(actual.values()), list(leaves.values()), grads)
    pairs = {
        name: (zero_near_threshold(value, name), zero_near_threshold(actual[name], name))
        for name, value in expected.items()
    }
    found = {name: _difference(*pair) for name, pair in pairs.items()}
    for (name, leaf), expected_grad, actual_grad in zip(leaves.items(), expected_grads, actual_grads, strict=True):
        size = None
        if name in terms:
            size = expected_grad.double().square().sum_to_size(leaf.shape).sqrt()
            expected_grad = expected_grad.double().sum_to_size(leaf.shape)
        found[f"grad_{name}"] = _difference(expected_grad, actual_grad, size)
    return found


def _outputs(x_seq: Tensor, backend: str, names: Sequence[str], **options: Any) -> dict[str, Tensor]:
    """The outputs of `lif` with these names."""
    wanted: dict[str, Any] = {f"return_{name}": name in names for name in OUTPUTS[1:]}
    output = lif(x_seq, **options, **wanted, backend=backend)
    found = output._asdict() if isinstance(output, LIFOutput) else {"s_seq": output}
    return {name: found[name] for name in names}


def _difference(expected: Tensor, actual: Tensor, size: Tensor | None = None) -> Difference:
    """The `Difference` relative to the largest expected value, or if `size` is given, to the size of each element."""
    assert expected.shape == actual.shape
    expected, actual = expected.detach().double(), actual.detach().double()
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    gap = torch.where(same, 0.0, (expected - actual).abs().nan_to_num(nan=float("inf")))
    if size is None:
        finite = expected.abs()[expected.isfinite()]
        size = finite.max() if finite.numel() else torch.zeros(())
    else:
        size = torch.maximum(size, expected.abs())
    relative = gap / size.clamp(min=1e-30)
    return Difference(*(value.max().item() if value.numel() else 0.0 for value in (gap, relative)))


class Row(NamedTuple):
    """The difference of one quantity in one case; `python -m asgl_cuda check` prints the rows of a case in one line."""

    backend: str
    what: str
    quantity: str
    difference: Difference
    allowed: float  # relative difference; 0 means the same bits

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed."""
        return self.difference.relative <= self.allowed


def check_backends() -> Iterator[Row]:
    """A row for each quantity that is compared, of all functions on each available backend, device and type.

    The functions are `lif` with each surrogate and reset, `leaky_integrator` and `recurrent_lif`.
    """
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for backend in available_backends():  # the reference has no device_types
        for kind in product(BACKENDS[backend].device_types, dtypes):
            for each in product(SURROGATES, (0.0, None)):
                yield from _lif_rows(backend, *kind, *each)
            yield from _lif_rows(backend, *kind, PERIODIC, None)
            yield from _lif_rows(backend, *kind, EXACT_SURROGATES[0], 0.0, residual=True)
            yield from _integrator_rows(backend, *kind)
            yield from _recurrent_rows(backend, *kind)


_STEPS, _BATCH, _CHANNELS = 21, 5, 67
# The spacing of floating-point values near 1, in the type of the output.
_SPACING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


class _Random:
    """Makes reproducible random leaf tensors on this device, in the type of the arithmetic for this type of input."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self._like: dict[str, Any] = {"device": device, "dtype": real_type(dtype)}

    def __call__(self, *shape: int, low: float, high: float, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64) * (high - low) + low
        return values.to(**self._like).to(dtype).requires_grad_()


def _lif_rows(
    backend: str, device: str, dtype: torch.dtype, surrogate: str, v_reset: float | None, residual: bool = False
) -> Iterator[Row]:
    """Rows for `lif` on this backend. With PERIODIC, neurons have multi_spike and v_min."""
    random = _Random(device, dtype)
    x_seq = random(_STEPS, _BATCH, _CHANNELS, low=-1.0, high=2.0, dtype=dtype)
    exact, several = surrogate in EXACT_SURROGATES, surrogate == PERIODIC
    rows = differences(
        x_seq,
        backend,
        band=0.0 if exact or several else THRESHOLD_BAND,
        width=random(_CHANNELS, low=0.5, high=2.0),
        decay=random(low=0.4, high=0.8),
        v_threshold=random(_CHANNELS, low=0.8, high=1.2),
        v_reset=v_reset,
        surrogate=surrogate,
        multi_spike=several,
        v_min=-0.5 if several else None,
        analog_prob=0.0 if several else 0.3,
        rng_state=torch.tensor([1234567890123, 42], device=device),
        residual=random(_STEPS, _BATCH, _CHANNELS, low=-0.5, high=0.5, dtype=dtype) if residual else None,
    )
    spacing = _SPACING.get(dtype, 1e-6)
    what = f"{str(dtype).removeprefix('torch.')}, {surrogate}, {'soft' if v_reset is None else 'hard'} reset"
    what += ", residual" if residual else ""
    for name, difference in rows.items():
        summed = name.startswith("grad_") and name not in ("grad_x_seq", "grad_residual")
        typed = name in ("s_seq", "grad_x_seq", "grad_residual")
        # Gradients of parameters are sums over thousands of elements, which backends add up in different orders.
        allowed = 1e-5 if summed else 0.0 if exact else spacing if typed else 1e-6
        yield Row(backend, what, name, difference, allowed)


def _integrator_rows(backend: str, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Rows for `leaky_integrator` on this backend."""
    random = _Random(device, dtype)
    inputs = {
        "x_seq": random(_STEPS, _BATCH, _CHANNELS, low=-1.0, high=2.0, dtype=dtype),
        "v_init": random(_BATCH, _CHANNELS, low=-1.0, high=1.0),
        "decay": random(_CHANNELS, low=0.4, high=0.8),
        "input_gain": random(low=0.5, high=2.0),
    }
    # Fused backends compute the gradient of decay from the output, which is rounded to the type of x_seq.
    allowed = {"grad_input_gain": 1e-5, "grad_decay": _SPACING.get(dtype, 1e-5)}
    yield from _function_rows(backend, leaky_integrator, inputs, allowed, return_v_last=True)


def _recurrent_rows(backend: str, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Rows for `recurrent_lif`. Weights are multiples of 1/64, so their sums over spikes are exact in any order."""
    random = _Random(device, dtype)
    inputs = {
        "x_seq": random(_STEPS, _BATCH, _CHANNELS, low=-1.0, high=2.0, dtype=dtype),
        "weight": (random(_CHANNELS, _CHANNELS, low=-16.0, high=16.0).detach().round() / 64).requires_grad_(),
        "syn_decay": random(_CHANNELS, low=0.4, high=0.8),
        "decay": random(_CHANNELS, low=0.4, high=0.8),
    }
    allowed = {f"grad_{name}": 1e-5 for name in inputs} | {"grad_x_seq": _SPACING.get(dtype, 1e-5)}
    yield from _function_rows(backend, recurrent_lif, inputs, allowed, return_v_last=True, return_h_seq=True)


def _function_rows(
    backend: str, function: Callable[..., Any], inputs: dict[str, Tensor], allowed: dict[str, float], **options: bool
) -> Iterator[Row]:
    """Rows for the outputs and gradients of a function. Bits must be equal unless `allowed` has the quantity."""

    def results(backend: str) -> dict[str, Tensor]:
        """The outputs of the function, and the gradients of its inputs, by name."""
        outputs = function(**inputs, **options, backend=backend)._asdict()
        found = {name: value for name, value in outputs.items() if value is not None}
        loss = sum(each.double().square().sum() for each in found.values())
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        return {**found, **{f"grad_{name}": each for name, each in zip(inputs, gradients, strict=True)}}

    expected, dtype = results("reference"), inputs["x_seq"].dtype
    what = f"{str(dtype).removeprefix('torch.')}, {function.__name__}"
    for name, actual in results(backend).items():
        yield Row(backend, what, name, _difference(expected[name], actual), allowed.get(name, 0.0))
