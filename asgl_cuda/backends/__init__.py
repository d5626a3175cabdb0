"""The table of backends, their availability, and the choice for a tensor.

In eager mode operators are called as pybind11 functions (csrc/ops/direct_calls.h); compilers and transforms see
torch.ops.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import has_torch_function

from ..checks import check_name, user_stacklevel
from . import cupy, extension, ops


class Operators(NamedTuple):
    """The operators of ops.py, as one backend implements them."""

    draw_rng_state: Callable[[torch.Tensor], torch.Tensor]
    lif_forward: Callable[..., ops.ForwardResult]
    lif_backward: Callable[..., ops.BackwardResult]
    integrator_forward: Callable[..., ops.ForwardResult]
    integrator_backward: Callable[..., ops.BackwardResult]
    recurrent_forward: Callable[..., ops.ForwardResult]
    recurrent_backward: Callable[..., ops.BackwardResult]
    batch_norm_coefficients: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    batch_norm_update: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    batch_norm_backward: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Backend(NamedTuple):
    """An implementation of the neuron. `operators` is None for the reference, which autograd differentiates.

    `problem` returns why the backend does not work, with a remedy, or None if it works; `misfit` returns the same for
    one device. Both are called when a backend is chosen for a tensor, never at import. `direct` has the same operators
    as functions that bypass torch.ops.
    """

    device_types: tuple[str, ...]  # empty if any device is supported
    operators: Operators | None
    problem: Callable[[], str | None]
    direct: Operators | None = None
    misfit: Callable[[torch.device], str | None] = lambda device: None

    def supports(self, device: torch.device) -> bool:
        """Whether the backend is for tensors on this device."""
        return not self.device_types or device.type in self.device_types

    def problem_on(self, device: torch.device) -> str | None:
        """Why the backend does not work on this device, or None."""
        return self.problem() or self.misfit(device)

    def problem_on_current_device(self) -> str | None:
        """Why the backend does not work on the current device, or None. Also reports a missing GPU."""
        problem = self.problem()
        if problem is not None or self.device_types != ("cuda",):
            return problem
        if not torch.cuda.is_available():
            return "torch finds no CUDA device: torch.cuda.is_available() is False"
        return self.misfit(torch.device("cuda", torch.cuda.current_device()))


def registered_operators(namespace: str) -> Operators:
    """The operators that are registered with torch in this namespace."""
    library = getattr(torch.ops, namespace)
    return Operators(*(getattr(library, name).default for name in Operators._fields))


def direct_operators(functions: Any) -> Operators | None:
    """The operators as functions (csrc/ops/direct_calls.h) in an object; None without a fitting extension."""
    found: list[Any] = [getattr(functions, name, None) for name in Operators._fields]
    return None if None in found else Operators(*found)


def _cuda_problem() -> str | None:
    """Why the backend 'cuda' does not work here, or None."""
    info = extension.build_info
    if info is not None and info.cuda is None:
        if torch.version.cuda is None:
            command = extension.build_command()
            return f"torch {torch.__version__} is a build without CUDA. Install one for CUDA, then run: {command}"
        return f"the extension was built without CUDA: {info.reason}. To build it anew: {extension.build_command()}"
    return extension.problem


def _cuda_misfit(device: torch.device) -> str | None:
    """Why no kernel that nvcc compiled runs on this GPU, or None. Computed once per GPU; initialises CUDA."""
    return _compute_cuda_misfit(device)


_cuda_misfit._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see cupy.problem


@functools.cache
def _compute_cuda_misfit(device: torch.device) -> str | None:
    """As `_cuda_misfit`, but torch.compile would trace it."""
    info = extension.build_info
    if info is None or info.cuda is None or not torch.cuda.is_available():  # fake tensors need no GPU
        return None
    capability = torch.cuda.get_device_capability(device)
    if info.code_for(capability) is not None:
        return None
    asked = "{}.{}".format(*capability)
    return (
        f"the extension has no kernels for {torch.cuda.get_device_name(device)}, of compute capability {asked}: it was "
        f"built by {info.cuda}. To build it with TORCH_CUDA_ARCH_LIST={asked} in the environment: "
        f"{extension.build_command()}"
    )


# Ends the error for an unknown backend, unless a similar name is suggested.
NONE_IS_BEST = "; None, the default, is the best for the device of x_seq"

# The backends in order of preference. backend=None takes the first one that works for the device of x_seq.
BACKENDS: dict[str, Backend] = {
    "cuda": Backend(
        ("cuda",), registered_operators("asgl_cuda"), _cuda_problem, direct_operators(extension.module), _cuda_misfit
    ),
    "cupy": Backend(("cuda",), registered_operators(cupy.NAMESPACE), cupy.problem, direct_operators(cupy.FUNCTIONS)),
    "cpu": Backend(
        ("cpu",), registered_operators("asgl_cuda"), lambda: extension.problem, direct_operators(extension.module)
    ),
    "reference": Backend((), None, lambda: None),
}


def operators_of(backend: str, inputs: Sequence[torch.Tensor | None]) -> Operators:
    """The operators of a fused backend for a call with these inputs.

    Compilers, torch function modes and subclasses of Tensor intercept only calls of torch.ops.
    """
    found = BACKENDS[backend]
    assert found.operators is not None  # every backend but the reference has operators
    if torch.compiler.is_compiling() or found.direct is None or has_torch_function(inputs):
        return found.operators
    return found.direct


def backend_of(operator: Any) -> str:
    """The name of the first backend with this operator. Several may have it: the dispatcher chooses by device."""
    return next(name for name, each in BACKENDS.items() if each.operators is not None and operator in each.operators)


_warned: set[str] = set()
# For each device, the fused backend that choose_backend took, and the values of BACKENDS at that time. If BACKENDS has
# changed since, choose_backend chooses again.
_best: dict[torch.device, tuple[str, tuple[Backend, ...]]] = {}


def available_backends() -> tuple[str, ...]:
    """The names of the backends that work on this machine, preferred ones first.

    `unavailable_backends` returns the others, with the reasons.

    Example::

        print(asgl_cuda.available_backends())  # ('cpu', 'reference') without a GPU
    """
    return tuple(name for name, backend in BACKENDS.items() if backend.problem_on_current_device() is None)


def unavailable_backends() -> dict[str, str]:
    """The backends that do not work on this machine, as a dict from names to reasons, usually with a remedy.

    Example::

        for name, problem in asgl_cuda.unavailable_backends().items():
            print(f"{name}: {problem}")
    """
    problems = {name: backend.problem_on_current_device() for name, backend in BACKENDS.items()}
    return {name: problem for name, problem in problems.items() if problem is not None}


def choose_backend(name: str | None, device: torch.device, caller: str) -> str:
    """The backend `name` after checks, or the best one for the device; warns if only the reference works there.

    Raises ValueError if the backend is unknown or does not serve the device, RuntimeError if it does not work.
    """
    if name is not None:
        if not isinstance(name, str) or name not in BACKENDS:
            check_name("backend", name, BACKENDS, caller, otherwise=NONE_IS_BEST)
        backend = BACKENDS[name]
        problem = backend.problem()
        if problem is None and not backend.supports(device):
            raise ValueError(
                f"{caller}: backend {name!r} needs x_seq on {' or '.join(backend.device_types)}, got {device}"
            )
        problem = problem or backend.misfit(device)
        if problem is not None:
            raise RuntimeError(f"{caller}: backend {name!r} is not available: {problem}")
        return name
    compiling = torch.compiler.is_compiling()
    if not compiling and device in _best:
        found, table = _best[device]
        if table == tuple(BACKENDS.values()):
            return found
    for candidate, backend in BACKENDS.items():
        if backend.supports(device) and backend.problem_on(device) is None:
            if backend.operators is not None and not compiling:
                _best[device] = candidate, tuple(BACKENDS.values())
            if candidate == "reference" and device.type != "meta":  # the meta device computes nothing
                _warn_about_reference(device)
            return candidate
    raise AssertionError("the reference serves every device")


def _warn_about_reference(device: torch.device) -> None:
    """Warns once per type of device, at the user's line, why no fused backend works there."""
    if device.type in _warned:
        return
    _warned.add(device.type)
    problems = [
        f"{name}: {problem}"
        for name, backend in BACKENDS.items()
        if backend.supports(device) and (problem := backend.problem_on(device)) is not None
    ]
    why = "; ".join(problems) if problems else f"no fused backend serves {device.type}"
    message = f"asgl_cuda: using the slow reference backend on {device.type}: {why}"
    warnings.warn(message, stacklevel=user_stacklevel())


_warn_about_reference._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see cupy.problem
