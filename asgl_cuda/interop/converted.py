"""Converted layers of other libraries, computed by `asgl_cuda.lif` from the layers' own values."""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Collection
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, fx, nn

from ..checks import HALF_TYPES, PLAIN_TENSORS, format_value
from ..neurons.base import Noisy
from ..neurons.deferred import Pending, tensor_of
from ..neurons.leaky_integrator import IntegratorOutput, leaky_integrator
from ..neurons.lif import LIF_DEFAULTS, LIFOutput, lif, run_lif_after
from ..reference.learned import Logarithm
from .identify import FLAT, SpikeFunction, captured
from .recording import Recording, recording


class Settings(NamedTuple):
    """Settings of a conversion that are not settings of the layer."""

    spike: Any  # a SpikeFunction; None if the layer does not fire
    backend: str | None
    dtype: torch.dtype | None = None  # dtype of the spikes; None for that of the potential
    asgl: bool = False  # whether the surrogate comes from `asgl` and not from the layer


class Overlay(nn.Module):
    """The base of classes inserted before a layer's class.

    The layer remains an instance of its class, with its parameters, buffers, state, hooks and names; the library's
    functions to reset, detach or copy layers still work. Removing the class restores the layer.
    """

    prefix: str  # prefix of the names of classes that `overlaid` makes

    # The overlay from which `overlaid` made this class.
    overlay: type[Overlay]
    original: type[nn.Module]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Attributes of the layer's class."""

    @classmethod
    def bases(cls, original: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
        """The bases of the class for layers of `original`, and names of its own."""
        return (cls, original), {}

    def take_off(self) -> None:
        """Restores the layer's previous class."""
        self.__class__ = self.original  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # `_new` remakes the class, which pickle can't find by name.
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return _new, _parts(type(self)), *rest


_made: dict[tuple[type[Overlay], type[nn.Module]], Any] = {}


def overlaid(overlay: type[Overlay], original: type[nn.Module]) -> Any:
    """`original` with `overlay` before it; cached."""
    if (overlay, original) not in _made:
        bases, more = overlay.bases(original)
        names = {"overlay": overlay, "original": original, "__module__": overlay.__module__, **more}
        _made[overlay, original] = type(f"{overlay.prefix}{original.__name__}", bases, names)
    return _made[overlay, original]


def bare_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class without overlays."""
    bare: type[nn.Module] = _parts(type(layer))[-1]
    return bare


def _parts(made: type[nn.Module]) -> tuple[Any, ...]:
    """The overlays in order, then the bare class."""
    return (made.overlay, *_parts(made.original)) if issubclass(made, Overlay) else (made,)


def _new(*parts: Any) -> nn.Module:
    """An empty module of the class that `_parts` has taken apart, for pickle."""
    *overlays, made = parts
    for overlay in reversed(overlays):
        made = overlaid(overlay, made)
    new: nn.Module = made.__new__(made)
    return new


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


FEEDBACK = ("feedback", "rec_connect", "recurrent")  # through which spikes return, in `dependencies`: why not, or None


class Basis:
    """What a layer was converted from, compared at each call.

    These are the values of `dependencies`, with the attributes, tensors and closure of the spike function, and, of all
    modules among them, whose forward is not called any more, methods and hooks.

    Tensors are compared by identity and number of writes, and after a change of either by value: equal values, loaded
    or of a copy, are no change. Compiled graphs compare neither tensors nor classes, closures, methods and hooks.
    """

    def __init__(self, layer: Converted) -> None:
        self.mark: list[Any] = []  # methods and hooks at the last check
        self.function = next(iter(layer.dependencies().values()))
        self.closure = _closure(self.function)
        values, functions, replaced = self._replaced(layer)
        self.names = {name: frozenset(_attributes(each)) for name, each in replaced.items()}
        self.hooks = {name: _hooks_of(each) for name, each in replaced.items()}
        self.own = {name: sorted(self.names[name] - _MODULE_ATTRIBUTES) for name in functions}
        self._note(self._read(values, functions))

    def _replaced(self, layer: Converted) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The values of `dependencies`; the spike function, if computed with, and the modules inside; all modules."""
        values = layer.dependencies()
        name, function = next(iter(values.items()))
        functions: dict[str, Any] = {}
        if layer.settings.asgl:
            del values[name]
        elif function is not None:
            functions[name] = function
            if torch.compiler.is_compiling():
                return values, functions, functions
            if self.closure and function is self.function:
                held = {f"{key} of {name}": function.__closure__[cell].cell_contents for key, cell in self.closure}
                values |= held
                functions |= _with_children(held)
            elif isinstance(function, nn.Module) and function._modules:
                functions |= _with_children({name: function})
        return values, functions, _with_children(values) | functions

    def _read(self, values: dict[str, Any], functions: dict[str, Any]) -> dict[str, Any]:
        """The values, and those of the functions."""
        is_compiling = torch.compiler.is_compiling()
        for name, each in functions.items():
            for attribute in self.own.get(name, ()):
                values[f"{name}.{attribute}"] = getattr(each, attribute, None)
            if not is_compiling and isinstance(each, nn.Module) and (each._buffers or each._parameters):
                tensors = {**each._buffers, **each._parameters}
                values |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        return values

    def _note(self, values: dict[str, Any]) -> None:
        """Keeps values, copies of their tensors, and the versions of these."""
        self.values = values
        tensors = {name: each for name, each in values.items() if isinstance(each, Tensor)}
        self.copies = {name: each.detach().clone() for name, each in tensors.items()}
        self.versions = {name: each._version for name, each in tensors.items() if not each.is_inference()}

    def changed(self, layer: Converted) -> str | None:
        """The first difference in words, or None."""
        values, functions, replaced = self._replaced(layer)
        values, before = self._read(values, functions), self.values
        is_compiling = torch.compiler.is_compiling()
        if is_compiling:
            values = {name: each for name, each in values.items() if not isinstance(each, (Tensor, type))}
        elif (
            len(values) == len(before)
            and all(map(operator.is_, values.values(), before.values()))
            and all(before[name]._version == version for name, version in self.versions.items())
        ):
            return self._hidden(layer, replaced)
        for name, value in values.items():
            old = self.copies.get(name, before.get(name))
            if not (value is old or _alike(value, old)):
                if old is None and name in FEEDBACK:  # a sentence of `lacking`
                    return str(value)
                now, was = _in_words(value), _in_words(old)
                return f"its {name} is {now}, and was {was}" if now != was else f"its {name} is another {now}"
        if is_compiling:
            return None
        self._note(values)
        return self._hidden(layer, replaced)

    def _hidden(self, layer: Converted, replaced: dict[str, Any]) -> str | None:
        """The first method that an attribute hides, or the first other hooks, in words."""
        mark: list[Any] = [len(layer.__dict__)]
        for each in replaced.values():
            mark += (len(_attributes(each)), _hooks_of(each))
        if mark == self.mark:
            return None
        if reason := exchanged(layer):
            return reason
        for name, each in replaced.items():
            for attribute in _attributes(each):
                if attribute not in self.names.get(name, ()) and hasattr(type(each), attribute):
                    return f"its {name}.{attribute} is an attribute, not the method of {type(each).__name__}"
            if _hooks_of(each) != self.hooks.get(name):
                return f"its {name} has other hooks than before, which would not be called"
        self.mark = mark
        return None


def _closure(function: Any) -> list[tuple[str, int]]:
    """The names and places of a closure's variables whose types leave copies equal."""
    if not isinstance(function, FunctionType):
        return []
    kinds = (Tensor, nn.Module, bool, int, float, str, type, FunctionType)
    found = enumerate(zip(function.__code__.co_freevars, captured(function), strict=True))
    return [(name, place) for place, (name, value) in found if isinstance(value, kinds)]


def _with_children(values: dict[str, Any]) -> dict[str, Any]:
    """The modules among the values, and all that are inside, by name."""
    found: dict[str, Any] = {}
    for name, each in values.items():
        if isinstance(each, nn.Module):
            found |= dict(each.named_modules(prefix=name)) if each._modules else {name: each}
    return found


def _attributes(function: Any) -> dict[str, Any]:
    """The attributes of a function or module; none for objects that can't have any."""
    return getattr(function, "__dict__", {})


def _hooks_of(function: Any) -> list[int]:
    """The numbers of the hooks, which torch does not give twice."""
    return [each for hooks in HOOKS for each in getattr(function, hooks, ())]


def _alike(one: Any, other: Any) -> bool:
    """Whether two values of a dependency are equal; for modules, whether they are of one class."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other.to(one.device)).all())
    if isinstance(one, nn.Module):  # whose attributes are compared; replicas are others
        # Compiled code is an exception, because torch.export wraps shared modules in subclasses.
        return type(one) is type(other) or (torch.compiler.is_compiling() and isinstance(one, type(other)))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _in_words(value: Any) -> str:
    """A value for an error: the name of a function or class, else the value."""
    return getattr(value, "__name__", None) or (
        type(value).__name__ if isinstance(value, nn.Module) else format_value(value)
    )


def version_of(tensor: Tensor) -> int:
    """The number of writes to the tensor; not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


class Converted(Overlay, Noisy):
    """The overlay of converted layers. Each library has a subclass, whose forward calls `lif`.

    For a layer that does not fire, forward only calls `integrate`, without noise, width and `log_width`.
    """

    prefix = "Converted"

    settings: Settings
    log_width: nn.Parameter | None
    _basis: Basis
    time_dim: int | None  # time dimension of the input, None if the input is one step
    multi_spike = False  # several spikes per step, for which noise is not defined
    takes_steps = property(lambda self: self.time_dim is None)  # whether a call takes one step
    takes_input = True  # whether `lif` gets the layer's own input, as fusion with a normalisation requires
    register_buffer = nn.Module.register_buffer  # an override costs 20 us per assignment of a buffer

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "original" in vars(cls):  # made by `overlaid`, with a forward
            cls.forward = _entered(cls.forward)

    @property
    def width(self) -> Tensor | float:
        """The width of the surrogate, in units of the input: a tensor of one value if learned."""
        return self._width_of_call()

    def _width_of_call(self) -> Tensor | float:
        """The width that `lif` gets, learned or from the settings."""
        return self.settings.spike.width if self.log_width is None else Logarithm(self.log_width).value()

    def description(self) -> str:
        """The computation of the layer, in words."""
        if self.settings.spike is None:
            return "leaky_integrator"
        surrogate, width, gain, _ = self.settings.spike
        text = f"{surrogate}, width {float(torch.as_tensor(self.width).detach().mean()):.4g}"
        if width == FLAT:
            text = f"slope {gain / width:.4g} everywhere"
        elif abs(gain - 1) > 1e-6:
            text += f", gradient times {gain:.4g}"
        if self.analog_prob or self.log_width is not None:
            text += f", analog_prob {self.analog_prob:g}{', width learned' if self.log_width is not None else ''}"
        return text

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}computed by asgl_cuda: {self.description()}"

    def begin(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        """Applies the settings of a conversion."""
        self.settings = settings
        self._basis = Basis(self)
        if settings.spike is None:
            return
        self.analog_prob = analog_prob
        self.log_width = None
        if learn_width:
            device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
            # Of shape [1], because torch's fully_shard refuses zero-dimensional parameters.
            self.log_width = nn.Parameter(torch.full((1,), math.log(settings.spike.width), device=device))

    def end(self) -> None:
        """Restores the original layer, with the current values of its parameters."""
        self.remove_noise()
        if self.settings.spike is not None:
            del self.log_width
        del self.settings, self._basis
        self.take_off()

    def dependencies(self) -> dict[str, Any]:
        """What the conversion depends on and what may change, by name: first the spike function, or None."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises if the layer is not what it was converted from."""
        reason = self._basis.changed(self)
        if reason is not None:
            raise RuntimeError(
                f"asgl_cuda.convert: {bare_class(self).__name__} was changed after its conversion: {reason}; convert "
                "again with the same arguments: asgl_cuda.convert(asgl_cuda.revert(model)[0], ...)"
            )

    def is_plain(self) -> bool:
        """Whether results equal the original layer's, and no backend is asked for."""
        return self.settings.backend is None and not self.settings.asgl and not getattr(self, "_has_noise", False)

    def steps_as_before(self) -> bool:
        """Whether to run the library's own forward: compilers fuse a step with the operations around."""
        return torch.compiler.is_compiling() and self.is_plain()

    def lif(self, x_seq: Tensor, **options: Any) -> LIFOutput:
        """`asgl_cuda.lif` with the layer's surrogate and noise, and spikes of the library's type."""
        self.check()
        x_seq, dtype = as_floating(x_seq), self.settings.dtype
        if dtype is not None and x_seq.dtype in HALF_TYPES:
            x_seq = x_seq.to(dtype)
        options = self._all_options(x_seq, options)
        if isinstance(x_seq, Pending):  # from the normalisation in front, which `fuse` has left to the layer
            result = run_lif_after(x_seq, self, "asgl_cuda.lif", {**LIF_DEFAULTS, **options})  # type: ignore[typeddict-item]
        else:
            result = lif(x_seq, **options)
        assert isinstance(result, LIFOutput)
        dtype = dtype or result.s_seq.dtype
        return result if result.s_seq.dtype is dtype else result._replace(s_seq=result.s_seq.to(dtype))

    def _all_options(self, x_seq: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """The options of `lif`: the given ones, and those of the layer's settings."""
        width = self.width if self.log_width is None else Logarithm(self.log_width)
        return {
            "surrogate": self.settings.spike.surrogate,
            "surrogate_gain": self.settings.spike.gain,
            "strict_threshold": self.settings.spike.strict,
            "analog_prob": self.analog_prob_of_call(x_seq),
            "return_v_last": True,
            "backend": self.settings.backend,
            **_taken({"width": width, **options}, x_seq),
        }

    def integrate(self, x_seq: Tensor, **options: Any) -> IntegratorOutput:
        """`asgl_cuda.leaky_integrator`."""
        x_seq = tensor_of(x_seq, bare_class(self).__name__)
        if self.settings.spike is None:  # else in `lif`
            self.check()
        options = _taken(options, x_seq)
        result = leaky_integrator(as_floating(x_seq), return_v_last=True, backend=self.settings.backend, **options)
        assert isinstance(result, IntegratorOutput)
        return result

    def advice(self) -> str | None:
        """Advice on calls with whole sequences, for a layer called step by step."""
        return _ADVICE if self.takes_steps else None

    # ---- a layer in a recorded loop, see recording.py ----

    def record_step(self, recording: Recording, *args: Any, **kwargs: Any) -> Any:
        """Records one step and returns the layer's recorded result.

        Layers that take one step per call override it; others are refused.
        """
        raise RuntimeError(f"asgl_cuda.convert: with sequences, {recording.name(self)} must take one step per call")

    def recorded_states(self) -> dict[str, Any]:
        """The states that the layer keeps from step to step, by name."""
        return {}

    def keep_state(self, name: str, value: Any) -> None:
        """Sets a state that the layer keeps from step to step."""
        setattr(self, name, value)

    def steps_from(self, x_seq: Tensor, states: dict[str, Any], wanted: set[str]) -> tuple[Any, Any]:
        """All steps from these states: stacks of the results by name, of states only the `wanted`, and final states.

        States that the layer keeps are set before, and read after.
        """
        raise NotImplementedError

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses torch.jit.script, which calls this first, and torch.jit.trace."""
        raise RuntimeError(
            f"asgl_cuda.convert: torch.jit can't take a converted {bare_class(self).__name__}; call asgl_cuda.revert "
            "before, or use torch.compile or torch.export"
        )


_ADVICE = (
    "one step per call gains little; convert(model, sequences=True) computes all steps at once "
    '(sequences="loop" if the model\'s forward contains the loop over the steps)'
)

# An adapter's answer for a layer: the converting class and the spike function (None if the layer does not fire), or the
# reason to leave the layer; None unless the layer is a neuron of the library.
Found: TypeAlias = tuple[type[Converted], Callable[[Tensor], Tensor] | SpikeFunction | None] | str | None

# An adapter's answer on streaming: how, or why not; None for a module without state.
InStream: TypeAlias = "Streamed | str | None"


class Streamed(NamedTuple):
    """How a module takes the steps of a stream: the time dimension of its input, and the attribute with its state.

    None for an input of one step, and without a single state, as in containers. With a switch the module carries its
    state only while its attribute `stateful` is set.
    """

    time_dim: int | None
    state: str | None
    has_switch: bool = False


def number(value: Any) -> Any:
    """A zero-dimensional CPU tensor as a float, for cheaper calls; any other value unchanged.

    Learned values are constants while gradients are disabled.
    """
    if type(value) not in PLAIN_TENSORS or value.dim() or not value.is_cpu or torch.compiler.is_compiling():
        return value
    return value if value.requires_grad and torch.is_grad_enabled() else float(value)


def _taken(options: dict[str, Any], x_seq: Tensor) -> dict[str, Any]:
    """The options, with integer tensors and scalars of other devices accepted as in PyTorch.

    Values belong to a step: with more dimensions they would be taken for one of each time.
    """
    time_dim, dims = options.get("time_dim", 0), x_seq.dim() - 1  # without time
    for name, given in options.items():
        if not isinstance(given, Tensor):
            continue
        if given.dim() > dims - (time_dim > 0) and not name.endswith("_init"):
            if given.dim() > dims:
                shape = [*x_seq.shape[:time_dim], *x_seq.shape[time_dim + 1 :]]
                raise ValueError(
                    f"asgl_cuda.convert: {name} must broadcast against a step of the input, of shape {shape}, got "
                    f"shape {list(given.shape)}"
                )
            options[name] = given = given.unsqueeze(time_dim)
        if not (given.dim() and given.is_floating_point()):
            value = as_floating(given) if name == "v_init" else number(as_floating(given))
            is_number = isinstance(value, Tensor) and value.dim() == 0
            options[name] = value.to(x_seq.device) if is_number else value
    return options


def as_floating(value: Tensor) -> Tensor:
    """Integers in the default dtype, as by PyTorch's type promotion; other values unchanged."""
    return value if value.is_floating_point() or value.is_complex() else value.to(torch.get_default_dtype())


def _entered(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps forward: torch.fx sees one call of the module, as of torch.nn's; torch.jit is refused."""

    @functools.wraps(forward)
    def call(self: Converted, *args: Any, **kwargs: Any) -> Any:
        """Records the call, refuses what forward can't take, or calls forward."""
        if not torch.compiler.is_compiling() and (found := recording()) is not None and not found.is_running:
            return self.record_step(found, *args, **kwargs)
        is_pending = bool(args) and isinstance(args[0], Pending)
        if args and not is_pending and isinstance(args[0], fx.Proxy):
            tracer: Any = args[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self.__prepare_scriptable__()
        if is_pending and (self.takes_steps or not self.takes_input):
            why = "which is called step by step" if self.takes_steps else "whose input no neuron takes as it is"
            args = args[0].tensor(f"{bare_class(self).__name__}, {why}"), *args[1:]
        return forward(self, *args, **kwargs)

    return call


def exchanged(layer: nn.Module) -> str | None:
    """The reason to leave a layer with a method replaced on the instance, or None."""
    kind = bare_class(layer)
    for name in vars(layer):
        if name not in _FREE and inspect.isroutine(inspect.getattr_static(kind, name, None)):
            return f"its {name} is an attribute of this layer, not the method of {kind.__name__}"
    return None


def shadowed(layer: nn.Module, overlay: type[Converted]) -> str | None:
    """The reason to leave a layer that has a name of `overlay`, by itself or by a user's class, or None."""
    library = overlay.__module__.rpartition(".")[2]
    ours = [each for each in overlay.__mro__ if not issubclass(nn.Module, each)]
    taken = {*vars(Converted), *(name for each in (Converted, Overlay, Noisy) for name in each.__annotations__)}
    for name, value in (item for each in ours for item in vars(each).items()):
        if name.startswith("_") or callable(value) or isinstance(value, property):
            taken.add(name)
    taken -= set(dir(nn.Module))
    users = [each for each in bare_class(layer).__mro__ if each.__module__.partition(".")[0] != library]
    names = [*vars(layer), *layer._parameters, *layer._buffers, *layer._modules]
    for name in (*names, *(name for each in users for name in vars(each))):
        if name in taken:
            return f"its attribute {name} has a name that converted layers use themselves"
    return None


# A subclass may override these: they do not change results, and those of the subclass are still called.
_FREE = {
    "__init__", "__repr__", "__dict__", "__weakref__", "__annotate_func__", "_get_name", "extra_repr", "train", "reset",
    "reset_mem", "reset_states",
}  # fmt: skip


def known_class(layer: nn.Module, known: Collection[Any], mixing: tuple[type[nn.Module], ...] = ()) -> Any:
    """The class in `known` that computes the layer, or why there is none; classes of `mixing` have weights.

    It is the layer's own, or the base of a user's subclass that overrides nothing that results may depend on.
    """
    kind = bare_class(layer)
    if kind in known:
        return kind
    if isinstance(layer, mixing):
        return "it has weights between its neurons or time steps"
    base = next((base for base in kind.__mro__ if base in known), object)
    between = kind.__mro__[: kind.__mro__.index(base)]
    if base is object or base.__module__.split(".")[0] in [each.__module__.split(".")[0] for each in between]:
        return "asgl_cuda has no such neuron"
    return overridden(kind, base) or base


def overridden(kind: type[nn.Module], base: type[nn.Module]) -> str | None:
    """The reason to leave a layer of `kind`, a user's subclass of `base`, or None."""
    for each in kind.__mro__:
        for name, value in vars(each).items():
            if name in _FREE or each in base.__mro__ or inspect.getattr_static(kind, name) is not value:
                continue
            # A property with a setter may replace an attribute that the base class sets on instances, which can't be
            # seen in the class.
            sets = value.fset is not None if isinstance(value, property) else hasattr(type(value), "__set__")
            if sets or (hasattr(base, name) and (callable(value) or hasattr(value, "__get__"))):
                return f"its {name} is defined by {each.__name__}, not by {base.__name__}, which convert knows"
    return None
