"""A layer of another library whose steps are computed by the fused neuron.

It stays an instance of its class: `convert` puts a class between the two, whose forward calls `asgl_cuda.lif` with what
the layer holds. So parameters, buffers, state, hooks and names are those of the layer, the library's own functions that
reset, detach or copy it go on working, and to give the layer back is to take that class away.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..functional import LIFOutput, lif
from ..layer import Noisy, bounded, give_dimension
from ..surrogate import SURROGATES


class SpikeFunction(NamedTuple):
    """A spike and its gradient: `gain / width * f(u / width)`, the spike at u > 0 if `strict`, else at u >= 0."""

    surrogate: str
    width: float
    gain: float
    strict: bool


class Settings(NamedTuple):
    """How a layer was converted, beside what the layer itself holds."""

    spike: SpikeFunction
    backend: str | None


class Wrapper(NamedTuple):
    """A module that calls others one after the other: which, and where the channels go on the way in and out.

    -1 where time and batch become one dimension, +1 where they part, None where the value itself is not handed on, as
    where the steps are computed one by one.
    """

    names: list[str]
    entering: int | None
    leaving: int | None


class Fused(Noisy):
    """What stands between a converted layer and its class. Each library has a subclass of its own."""

    settings: Settings
    log_width: nn.Parameter | None
    time_dim: int | None  # where time is in its input, None if that is of one step

    # Of the class that `fused_class` makes of it.
    fused_forward: type[Fused]
    original: type[nn.Module]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What the library's class has."""

    @property
    def width(self) -> Tensor | float:
        """The width of the surrogate, in units of the input: a tensor of one value if learned."""
        return self.settings.spike.width if self.log_width is None else bounded(self.log_width).exp()

    def begin(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        """Takes up the settings of a conversion."""
        self.settings = settings
        self.analog_prob = analog_prob
        self.log_width = None
        if learn_width:
            device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
            # With a dimension, which fully_shard of PyTorch wants.
            self.log_width = nn.Parameter(torch.full((1,), math.log(settings.spike.width), device=device))

    def end(self) -> None:
        """Becomes what it was before, with the values that its parameters have now."""
        self.end_noise()
        del self.settings, self.log_width
        self.__class__ = self.original  # type: ignore[assignment]

    def lif(self, x_seq: Tensor, **options: Any) -> LIFOutput:
        """`asgl_cuda.lif` with the layer's surrogate and noise."""
        for name, given in options.items():
            if isinstance(given, Tensor):
                # PyTorch takes integers as well, and one number from another device.
                value = number(_floating(given))
                is_number = isinstance(value, Tensor) and value.dim() == 0
                options[name] = value.to(x_seq.device) if is_number else value
        result = self.compute(
            _floating(x_seq),
            width=self.width,
            surrogate=self.settings.spike.surrogate,
            surrogate_gain=self.settings.spike.gain,
            strict_threshold=self.settings.spike.strict,
            analog_prob=self.analog_prob_of_call(x_seq),
            return_v_last=True,
            backend=self.settings.backend,
            **options,
        )
        assert isinstance(result, LIFOutput)
        return result

    def compute(self, x_seq: Tensor, **options: Any) -> Tensor | LIFOutput:
        """`asgl_cuda.lif`; where the layer is fused with a normalisation, both."""
        return lif(x_seq, **options)

    def input_terms(self) -> tuple[Tensor | float, Tensor | float]:
        """Gain and bias of the input, as `asgl_cuda.lif` has them."""
        return 1.0, 0.0

    def hold_width(self) -> bool:
        """Writes the learned width into the layer's own surrogate, if that can hold it."""
        return False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        give_dimension(state_dict, prefix, "log_width")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name to be found by: it is made again.
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return _new, (self.fused_forward, self.original), *rest


def number(value: Any) -> Any:
    """A constant in a tensor of the CPU as a float, with which a call costs less; anything else as it is."""
    if type(value) is not Tensor or value.dim() or value.device.type != "cpu" or value.requires_grad:
        return value
    return value if torch.compiler.is_compiling() else float(value)


def _floating(value: Tensor) -> Tensor:
    """The value itself, or in the type that PyTorch gives integers when they meet a float."""
    if value.is_floating_point() or value.is_complex():
        return value
    return value.to(torch.get_default_dtype())


_classes: dict[tuple[type[Fused], type[nn.Module]], type[Fused]] = {}


def fused_class(forward: type[Fused], original: type[nn.Module]) -> type[Fused]:
    """`original` with the forward of `forward`: one class, however often it is asked for."""
    if (forward, original) not in _classes:
        names = {"fused_forward": forward, "original": original, "__module__": forward.__module__}
        made: Any = type(f"Fused{original.__name__}", (forward, original), names)
        made.forward = _leaf(made.forward)
        _classes[forward, original] = made
    return _classes[forward, original]


def _leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same, except that torch.fx sees one call of the module, as of those of torch.nn."""

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], fx.Proxy):
            tracer: Any = args[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return call


def _new(forward: type[Fused], original: type[nn.Module]) -> Fused:
    made = fused_class(forward, original)
    return made.__new__(made)


def unknown(layer: nn.Module, known: tuple[type[nn.Module], ...]) -> str:
    """Why a neuron is left whose class is none of `known`."""
    base = next((base for base in type(layer).__mro__ if base in known), None)
    if base is None or base.__module__.split(".")[0] == type(layer).__module__.split(".")[0]:
        return "asgl_cuda has no such neuron"
    name = base.__name__
    return f"it is a subclass of {name}, which may compute something else; convert knows {name} itself"


# ---- which surrogate a library's spike function has ----

# Where f is half its largest value, and that value, at width 1.
_HALF: dict[str, tuple[float, float]] = {
    "rectangle": (0.5, 1.0),
    "triangle": (0.5, 1.0),
    "sigmoid": (2 * math.log(1 + math.sqrt(2)), 0.25),
    "arctan": (2 / math.pi, 0.5),
    "erf": (math.sqrt(math.log(2)), 1 / math.sqrt(math.pi)),
    "fast_sigmoid": (math.sqrt(2) - 1, 0.5),
    "laplace": (math.log(2), 0.5),
}
_PROBES = (0.05, 0.11, 0.23, 0.37, 0.61, 0.79, 0.93, 1.3, 1.9, 2.7, 4.1)


def slopes(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """The gradient of a function of one value, at each of `u`."""
    with torch.enable_grad():
        leaf = u.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return slope


def fires_strictly(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a spike function needs u > 0 to fire."""
    return not bool(function(torch.zeros(1, dtype=torch.float64)) > 0)


def identify(function: Callable[[Tensor], Tensor]) -> SpikeFunction | str:
    """What `function` of u = h - v_threshold is, told by its values and gradients; or why it is nothing known.

    Width and gain follow from the largest slope and from where it has halved; the slope is then compared with that of
    the surrogate on both sides of the threshold, to 1e-6 of its largest value.
    """
    try:
        return _identify(function)
    except Exception as error:  # of a function that is the library's or the user's
        return f"its spike function fails with {type(error).__name__}: {error}"


def _identify(function: Callable[[Tensor], Tensor]) -> SpikeFunction | str:
    def at(*u: float) -> Tensor:
        return slopes(function, torch.tensor(u, dtype=torch.float64))

    around = torch.tensor([-1e3, -1e-9, 1e-9, 1e3], dtype=torch.float64)
    if function(around).tolist() != [0, 0, 1, 1]:
        return "its spike function emits something else than 0 below and 1 above the threshold"
    leaf = torch.ones(1, dtype=torch.float64, requires_grad=True)
    if not function(leaf).requires_grad:
        return "its spike function has no gradient"
    peak = float(at(1e-15))
    if not (math.isfinite(peak) and peak > 0):
        return f"its surrogate has the slope {peak:g} at the threshold"
    grid = [10.0 ** (power / 4) for power in range(-24, 17)]
    high = next((u for u, slope in zip(grid, at(*grid).tolist(), strict=True) if slope < peak / 2), None)
    if high is None:
        return "its surrogate does not fall off"
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(at(middle)) >= peak / 2 else (low, middle)
    for name, (half, largest) in _HALF.items():
        width = high / half
        u = [sign * probe * width for probe in _PROBES for sign in (-1, 1)]
        expected = slopes(SURROGATES[name].cumulative, torch.tensor(u, dtype=torch.float64) / width)
        if ((at(*u) / peak - expected / largest).abs() < 1e-6).all():
            return SpikeFunction(name, width, peak * width / largest, fires_strictly(function))
    return "its surrogate is none of those of asgl_cuda"
