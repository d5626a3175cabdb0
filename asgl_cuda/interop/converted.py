"""A layer of another library that `convert` has changed: `asgl_cuda.lif` computes its steps with its own values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn

from ..functional import LIFOutput, lif
from ..integrator import IntegratorOutput, leaky_integrator
from ..layer import Noisy, give_dimension
from ..learned import Logarithm
from .identify import SpikeFunction


class Settings(NamedTuple):
    """The settings of a conversion that the layer itself does not hold."""

    spike: Any  # a SpikeFunction; None where the layer does not fire
    backend: str | None


class Wrapper(NamedTuple):
    """A module that calls others one after the other: which, and where the channels go on the way in and out.

    -1 where time and batch become one dimension, +1 where they part, None where the value itself is not handed on, as
    where the steps are computed one by one.
    """

    names: list[str]
    entering: int | None
    leaving: int | None


class Overlay(nn.Module):
    """The base of the classes that are put before a layer's class.

    The layer stays an instance of its class and computes something else. Parameters, buffers, state, hooks and names
    are still its own, the library's functions that reset, detach or copy it go on working, and to give the layer back
    is to take the class away.
    """

    prefix: str  # begins the name of a class that `overlaid` makes

    # `overlaid` sets these in the class that it makes.
    overlay: type[Overlay]
    original: type[nn.Module]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Whatever the layer's class has."""

    def take_off(self) -> None:
        """Gives the layer the class back that it had before."""
        self.__class__ = self.original  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds no such class by its name: it is made again.
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return _new, _parts(type(self)), *rest


_made: dict[tuple[type[Overlay], type[nn.Module]], Any] = {}


def overlaid(overlay: type[Overlay], original: type[nn.Module]) -> Any:
    """`original` with `overlay` before it: one class, however often it is asked for."""
    if (overlay, original) not in _made:
        names = {"overlay": overlay, "original": original, "__module__": overlay.__module__}
        _made[overlay, original] = type(f"{overlay.prefix}{original.__name__}", (overlay, original), names)
    return _made[overlay, original]


def bare_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class without the classes before it."""
    bare: type[nn.Module] = _parts(type(layer))[-1]
    return bare


def _parts(made: type[nn.Module]) -> tuple[Any, ...]:
    """The classes that are before another one, the first one first, and that one."""
    return (made.overlay, *_parts(made.original)) if issubclass(made, Overlay) else (made,)


def _new(*parts: Any) -> nn.Module:
    *overlays, made = parts
    for overlay in reversed(overlays):
        made = overlaid(overlay, made)
    new: nn.Module = made.__new__(made)
    return new


class Converted(Overlay, Noisy):
    """The class before a converted layer's own. Each library has a subclass, whose forward calls `lif`.

    Where the layer does not fire it calls `integrate` alone: then there are no noise, no width and no `log_width`.
    """

    prefix = "Converted"

    settings: Settings
    log_width: nn.Parameter | None
    time_dim: int | None  # where time is in its input, None if the input is one step
    multi_spike = False  # whether it may spike several times a step, for which there is no noise
    takes_input = True  # whether `lif` has the layer's own input, which is then what a normalisation may be fused with

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "original" in vars(cls):  # `overlaid` makes the class, which has a forward
            cls.forward = _leaf(cls.forward)

    @property
    def width(self) -> Tensor | float:
        """The width of the surrogate, in units of the input: a tensor of one value if learned."""
        return self.settings.spike.width if self.log_width is None else Logarithm(self.log_width).value()

    def begin(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        """Takes up the settings of a conversion."""
        self.settings = settings
        if settings.spike is None:
            return
        self.analog_prob = analog_prob
        self.log_width = None
        if learn_width:
            device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
            # It has a dimension because fully_shard of PyTorch wants one.
            self.log_width = nn.Parameter(torch.full((1,), math.log(settings.spike.width), device=device))

    def end(self) -> None:
        """Becomes what it was before, with the values that its parameters have now."""
        self.end_noise()
        if self.settings.spike is not None:
            del self.log_width
        del self.settings
        self.take_off()

    def lif(self, x_seq: Tensor, **options: Any) -> LIFOutput:
        """`asgl_cuda.lif` with the layer's surrogate and noise."""
        result = self.compute(
            _floating(x_seq),
            width=self.width if self.log_width is None else Logarithm(self.log_width),
            surrogate=self.settings.spike.surrogate,
            surrogate_gain=self.settings.spike.gain,
            strict_threshold=self.settings.spike.strict,
            analog_prob=self.analog_prob_of_call(x_seq),
            return_v_last=True,
            backend=self.settings.backend,
            **_taken(options, x_seq),
        )
        assert isinstance(result, LIFOutput)
        return result

    def integrate(self, x_seq: Tensor, **options: Any) -> IntegratorOutput:
        """`asgl_cuda.leaky_integrator`."""
        options = _taken(options, x_seq)
        result = leaky_integrator(_floating(x_seq), return_v_last=True, backend=self.settings.backend, **options)
        assert isinstance(result, IntegratorOutput)
        return result

    def compute(self, x_seq: Tensor, **options: Any) -> Tensor | LIFOutput:
        """`asgl_cuda.lif`; where the layer is fused with a normalisation, both."""
        return lif(x_seq, **options)

    def input_terms(self) -> tuple[Tensor | float, Tensor | float]:
        """Gain and bias of the input, as `asgl_cuda.lif` has them."""
        return 1.0, 0.0

    def hold_width(self) -> bool:
        """Writes the learned width into the layer's own surrogate, and says whether that can hold it."""
        return False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        give_dimension(state_dict, prefix, "log_width")
        super()._load_from_state_dict(state_dict, prefix, *arguments)


# How a library's file answers for a layer: the class that converts it and its spike function, None if it does not fire,
# or why it is left; None where it is no neuron of the library.
Found: TypeAlias = tuple[type[Converted], Callable[[Tensor], Tensor] | SpikeFunction | None] | str | None

# How it answers about streams: how the module takes them, or why it can't; None where it carries nothing.
InStream: TypeAlias = "Streamed | str | None"


class Streamed(NamedTuple):
    """How a module takes the steps of a stream: where time is in its input, and the attribute that holds its state.

    None where its input is one step, and where it is no layer but calls some.
    """

    time_dim: int | None
    state: str | None


def number(value: Any) -> Any:
    """A constant in a tensor of the CPU as a float, with which a call costs less; anything else as it is."""
    if type(value) is not Tensor or value.dim() or value.device.type != "cpu" or value.requires_grad:
        return value
    return value if torch.compiler.is_compiling() else float(value)


def _taken(options: dict[str, Any], x_seq: Tensor) -> dict[str, Any]:
    """The options with their tensors as PyTorch takes them: integers as well, and one number from another device."""
    for name, given in options.items():
        if isinstance(given, Tensor):
            value = number(_floating(given))
            is_number = isinstance(value, Tensor) and value.dim() == 0
            options[name] = value.to(x_seq.device) if is_number else value
    return options


def _floating(value: Tensor) -> Tensor:
    """The value itself, or in the type that PyTorch gives integers when they meet a float."""
    return value if value.is_floating_point() or value.is_complex() else value.to(torch.get_default_dtype())


def _leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same, except that torch.fx sees one call of the module, as it does with the modules of torch.nn."""

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], fx.Proxy):
            tracer: Any = args[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return call


def unknown(layer: nn.Module, known: tuple[type[nn.Module], ...], mixing: tuple[type[nn.Module], ...] = ()) -> str:
    """Why a neuron is left whose class is none of `known`; those of `mixing` have weights."""
    if isinstance(layer, mixing):
        return "it mixes neurons, or steps, by weights of its own"
    base = next((base for base in type(layer).__mro__ if base in known), None)
    if base is None or base.__module__.split(".")[0] == type(layer).__module__.split(".")[0]:
        return "asgl_cuda has no such neuron"
    name = base.__name__
    return f"it is a subclass of {name}, which may compute something else; convert knows {name} itself"
