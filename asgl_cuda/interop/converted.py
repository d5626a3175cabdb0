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
from ..neurons.lif import LIF_DEFAULTS, LIFOutput, lif, run_lif_after_norm
from ..reference.learned import Logarithm
from .identify import FLAT, SpikeFunction, closure_values
from .recording import Recording, current_recording


class Settings(NamedTuple):
    """Settings of a conversion that the layer's own attributes do not say."""

    spike: Any  # a SpikeFunction; None if the layer does not fire
    backend: str | None
    dtype: torch.dtype | None = None  # dtype of the spikes; None for that of the potential
    asgl: bool = False  # whether the surrogate comes from `asgl` and not from the layer


class Overlay(nn.Module):
    """Base of the classes that are inserted before a layer's class, to give the layer another forward.

    The layer remains an instance of its class, with its parameters, buffers, state, hooks and names; the library's
    functions to reset, detach or copy layers still work. Removing the class restores the layer.
    """

    prefix: str  # prefix of the names of classes that `overlaid_class` makes

    # The two classes from which `overlaid_class` has made this one.
    overlay: type[Overlay]
    original: type[nn.Module]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Attributes of the layer's class."""

    @classmethod
    def bases_and_namespace(cls, original: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
        """Bases and namespace of the class that `overlaid_class` makes for layers of class `original`."""
        return (cls, original), {}

    def remove_overlay(self) -> None:
        """Restores the layer's previous class."""
        self.__class__ = self.original  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle can't find a class that was made at run time, so `_new_module` makes the class again.
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return _new_module, _overlays_and_class(type(self)), *rest


_made: dict[tuple[type[Overlay], type[nn.Module]], Any] = {}


def overlaid_class(overlay: type[Overlay], original: type[nn.Module]) -> Any:
    """A subclass of `original` whose methods `overlay` overrides, made once for each pair."""
    if (overlay, original) not in _made:
        bases, more = overlay.bases_and_namespace(original)
        names = {"overlay": overlay, "original": original, "__module__": overlay.__module__, **more}
        _made[overlay, original] = type(f"{overlay.prefix}{original.__name__}", bases, names)
    return _made[overlay, original]


def bare_class(layer: nn.Module) -> type[nn.Module]:
    """The layer's class without overlays."""
    bare: type[nn.Module] = _overlays_and_class(type(layer))[-1]
    return bare


def _overlays_and_class(made: type[nn.Module]) -> tuple[Any, ...]:
    """The overlays of a class from first to last, then the class of the library."""
    return (made.overlay, *_overlays_and_class(made.original)) if issubclass(made, Overlay) else (made,)


def _new_module(*parts: Any) -> nn.Module:
    """An empty module, for pickle, of the class that `_overlays_and_class` has split into `parts`."""
    *overlays, made = parts
    for overlay in reversed(overlays):
        made = overlaid_class(overlay, made)
    new: nn.Module = made.__new__(made)
    return new


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Names in `dependencies` for the module that feeds spikes back to the neurons. The value of such an entry is the reason
# why a layer with this module can't be converted, or None if it can.
FEEDBACK = ("feedback", "rec_connect", "recurrent")


class Snapshot:
    """The layer as it was at its conversion, with which each call compares the layer.

    It contains the values of `dependencies`, and the attributes, tensors and closure variables of the spike function.
    For all modules among these, whose forward the converted layer does not call, it also contains methods and hooks.

    Tensors are compared by identity and version. If one of these has changed, they are compared by value, so that
    loading equal values, or copying the model, is not a change. Compiled code compares no tensors, classes, closures,
    methods and hooks.
    """

    def __init__(self, layer: Converted) -> None:
        self.mark: list[Any] = []  # number of attributes and ids of hooks of each object at the last check
        self.function = next(iter(layer.dependencies().values()))
        self.closure = _closure_variables(self.function)
        values, functions, replaced = self._objects_to_compare(layer)
        self.names = {name: frozenset(_attributes_of(each)) for name, each in replaced.items()}
        self.hooks = {name: _hook_ids(each) for name, each in replaced.items()}
        self.own = {name: sorted(self.names[name] - _MODULE_ATTRIBUTES) for name in functions}
        self._remember(self._values_to_compare(values, functions))

    def _objects_to_compare(self, layer: Converted) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """By name: the values of `dependencies`; the spike function, if it is used, and its modules; all modules."""
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
                functions |= _modules_among(held)
            elif isinstance(function, nn.Module) and function._modules:
                functions |= _modules_among({name: function})
        return values, functions, _modules_among(values) | functions

    def _values_to_compare(self, values: dict[str, Any], functions: dict[str, Any]) -> dict[str, Any]:
        """`values`, and the attributes and tensors of `functions`."""
        is_compiling = torch.compiler.is_compiling()
        for name, each in functions.items():
            for attribute in self.own.get(name, ()):
                values[f"{name}.{attribute}"] = getattr(each, attribute, None)
            if not is_compiling and isinstance(each, nn.Module) and (each._buffers or each._parameters):
                tensors = {**each._buffers, **each._parameters}
                values |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        return values

    def _remember(self, values: dict[str, Any]) -> None:
        """Stores the values, and copies and versions of the tensors among them."""
        self.values = values
        tensors = {name: each for name, each in values.items() if isinstance(each, Tensor)}
        self.copies = {name: each.detach().clone() for name, each in tensors.items()}
        self.versions = {name: each._version for name, each in tensors.items() if not each.is_inference()}

    def first_difference(self, layer: Converted) -> str | None:
        """The first difference between the layer now and at its conversion, in words, or None."""
        values, functions, replaced = self._objects_to_compare(layer)
        values, before = self._values_to_compare(values, functions), self.values
        is_compiling = torch.compiler.is_compiling()
        if is_compiling:
            values = {name: each for name, each in values.items() if not isinstance(each, (Tensor, type))}
        elif (
            len(values) == len(before)
            and all(map(operator.is_, values.values(), before.values()))
            and all(before[name]._version == version for name, version in self.versions.items())
        ):
            return self._replaced_method_or_hook(layer, replaced)
        for name, value in values.items():
            old = self.copies.get(name, before.get(name))
            if not (value is old or _is_equal(value, old)):
                if old is None and name in FEEDBACK:  # `value` is then the sentence of `feedback_reason`
                    return str(value)
                now, was = _describe(value), _describe(old)
                return f"its {name} is {now}, and was {was}" if now != was else f"its {name} is another {now}"
        if is_compiling:
            return None
        self._remember(values)
        return self._replaced_method_or_hook(layer, replaced)

    def _replaced_method_or_hook(self, layer: Converted, replaced: dict[str, Any]) -> str | None:
        """The first method that an attribute replaces, or the first module with other hooks, in words, or None."""
        mark: list[Any] = [len(layer.__dict__)]
        for each in replaced.values():
            mark += (len(_attributes_of(each)), _hook_ids(each))
        if mark == self.mark:
            return None
        if reason := replaced_method_reason(layer):
            return reason
        for name, each in replaced.items():
            for attribute in _attributes_of(each):
                if attribute not in self.names.get(name, ()) and hasattr(type(each), attribute):
                    return f"its {name}.{attribute} is an attribute, not the method of {type(each).__name__}"
            if _hook_ids(each) != self.hooks.get(name):
                return f"its {name} has other hooks than before, which would not be called"
        self.mark = mark
        return None


def _closure_variables(function: Any) -> list[tuple[str, int]]:
    """Names and indices of closure variables of types whose copies compare as equal."""
    if not isinstance(function, FunctionType):
        return []
    kinds = (Tensor, nn.Module, bool, int, float, str, type, FunctionType)
    found = enumerate(zip(function.__code__.co_freevars, closure_values(function), strict=True))
    return [(name, place) for place, (name, value) in found if isinstance(value, kinds)]


def _modules_among(values: dict[str, Any]) -> dict[str, Any]:
    """The modules among the values, and their submodules, by name."""
    found: dict[str, Any] = {}
    for name, each in values.items():
        if isinstance(each, nn.Module):
            found |= dict(each.named_modules(prefix=name)) if each._modules else {name: each}
    return found


def _attributes_of(function: Any) -> dict[str, Any]:
    """The attributes of a function or module; empty for objects that can't have attributes."""
    return getattr(function, "__dict__", {})


def _hook_ids(function: Any) -> list[int]:
    """The ids of a module's hooks. torch uses each id once."""
    return [each for hooks in HOOKS for each in getattr(function, hooks, ())]


def _is_equal(one: Any, other: Any) -> bool:
    """Whether two values of a dependency count as equal. Modules do if they are of one class."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other.to(one.device)).all())
    if isinstance(one, nn.Module):  # a replica is another object, and attributes are compared one by one
        # In compiled code an instance of a subclass also counts as equal, because torch.export wraps shared modules in
        # subclasses.
        return type(one) is type(other) or (torch.compiler.is_compiling() and isinstance(one, type(other)))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _describe(value: Any) -> str:
    """A value in words, for an error: the name of a function or class, otherwise the value."""
    return getattr(value, "__name__", None) or (
        type(value).__name__ if isinstance(value, nn.Module) else format_value(value)
    )


def version_of(tensor: Tensor) -> int:
    """The number of changes in place; 0 for an inference tensor, which does not count them."""
    return 0 if tensor.is_inference() else tensor._version


class Converted(Overlay, Noisy):
    """The overlay of converted layers. Each library has a subclass, whose forward calls `lif`.

    If the layer does not fire, its forward calls only `integrate`, and it has no noise, `width` and `log_width`.
    """

    prefix = "Converted"

    settings: Settings
    log_width: nn.Parameter | None
    _snapshot: Snapshot
    time_dim: int | None  # time dimension of the input, None if the input is one step
    multi_spike = False  # several spikes per step, for which noise is not defined
    takes_one_step = property(lambda self: self.time_dim is None)  # whether a call takes one step
    takes_input_directly = True  # whether `lif` gets the layer's own input, as fusion with a normalisation requires
    register_buffer = nn.Module.register_buffer  # a library's override costs 20 us per assignment of a buffer

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "original" in vars(cls):  # a class made by `overlaid_class`
            cls.forward = _wrapped_forward(cls.forward)

    @property
    def width(self) -> Tensor | float:
        """The width of the surrogate, in units of the input: a tensor of one value if learned."""
        return self._current_width()

    def _current_width(self) -> Tensor | float:
        """The width of the next call: the learned one, or that of the settings."""
        return self.settings.spike.width if self.log_width is None else Logarithm(self.log_width).value()

    def description(self) -> str:
        """The computation of the layer in words, for reports and `repr`."""
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

    def begin_conversion(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        """Stores the settings of a conversion, and what is to be compared at each call; adds a learned width."""
        self.settings = settings
        self._snapshot = Snapshot(self)
        if settings.spike is None:
            return
        self.analog_prob = analog_prob
        self.log_width = None
        if learn_width:
            device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
            # Of shape [1], because torch's fully_shard refuses zero-dimensional parameters.
            self.log_width = nn.Parameter(torch.full((1,), math.log(settings.spike.width), device=device))

    def restore_original(self) -> None:
        """Restores the original layer, with the current values of its parameters."""
        self._drop_noise_attributes()
        if self.settings.spike is not None:
            del self.log_width
        del self.settings, self._snapshot
        self.remove_overlay()

    def dependencies(self) -> dict[str, Any]:
        """The values that must not change after the conversion, by name, because they are read only once.

        The first is the spike function, or None. A call raises RuntimeError if one has changed, see `Snapshot`.
        """
        raise NotImplementedError

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the layer has changed since its conversion."""
        reason = self._snapshot.first_difference(self)
        if reason is not None:
            raise RuntimeError(
                f"asgl_cuda.convert: {bare_class(self).__name__} was changed after its conversion: {reason}; convert "
                "again with the same arguments: asgl_cuda.convert(asgl_cuda.revert(model)[0], ...)"
            )

    def can_run_original(self) -> bool:
        """Whether the library's own forward computes the same, as without noise, `asgl` and a requested backend."""
        return self.settings.backend is None and not self.settings.asgl and not getattr(self, "_has_noise", False)

    def prefers_original_step(self) -> bool:
        """Whether to run the library's own forward, which compilers fuse with the operations around it."""
        return torch.compiler.is_compiling() and self.can_run_original()

    def lif(self, x_seq: Tensor, **options: Any) -> LIFOutput:
        """`asgl_cuda.lif` with the layer's surrogate and noise, and spikes of the library's type."""
        self.check_unchanged()
        x_seq, dtype = as_floating(x_seq), self.settings.dtype
        if dtype is not None and x_seq.dtype in HALF_TYPES:
            x_seq = x_seq.to(dtype)
        options = self._lif_options(x_seq, options)
        if isinstance(x_seq, Pending):  # a normalisation before this layer, which the layer computes as well
            result = run_lif_after_norm(x_seq, self, "asgl_cuda.lif", {**LIF_DEFAULTS, **options})  # type: ignore[typeddict-item]
        else:
            result = lif(x_seq, **options)
        assert isinstance(result, LIFOutput)
        dtype = dtype or result.s_seq.dtype
        return result if result.s_seq.dtype is dtype else result._replace(s_seq=result.s_seq.to(dtype))

    def _lif_options(self, x_seq: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """The options of `lif` from the layer's settings, completed by `options`."""
        width = self.width if self.log_width is None else Logarithm(self.log_width)
        return {
            "surrogate": self.settings.spike.surrogate,
            "surrogate_gain": self.settings.spike.gain,
            "strict_threshold": self.settings.spike.strict,
            "analog_prob": self.analog_prob_of_call(x_seq),
            "return_v_last": True,
            "backend": self.settings.backend,
            **_prepared_options({"width": width, **options}, x_seq, self),
        }

    def integrate(self, x_seq: Tensor, **options: Any) -> IntegratorOutput:
        """`asgl_cuda.leaky_integrator` on the layer's backend, with the last potential."""
        x_seq = tensor_of(x_seq, bare_class(self).__name__)
        if self.settings.spike is None:  # layers that fire are checked in `lif`
            self.check_unchanged()
        options = _prepared_options(options, x_seq, self)
        result = leaky_integrator(as_floating(x_seq), return_v_last=True, backend=self.settings.backend, **options)
        assert isinstance(result, IntegratorOutput)
        return result

    def speed_advice(self) -> str | None:
        """Advice to call with whole sequences, for a layer that is called step by step, or None."""
        return _ADVICE if self.takes_one_step else None

    # ---- recording of a loop over the steps, see recording.py ----

    def record_step(self, recording: Recording, *args: Any, **kwargs: Any) -> Any:
        """Records one step and returns the layer's recorded result.

        Layers that take one step per call override it; others are refused.
        """
        raise RuntimeError(
            f"asgl_cuda.convert: with sequences, a neuron layer must take one step per call, but "
            f"{recording.layer_name(self)} takes a whole sequence; use asgl_cuda.convert(model) without sequences"
        )

    def carried_states(self) -> dict[str, Any]:
        """The states that the layer keeps from step to step, by name."""
        return {}

    def set_state(self, name: str, value: Any) -> None:
        """Sets a state that the layer keeps from step to step."""
        setattr(self, name, value)

    def compute_steps(self, x_seq: Tensor, states: dict[str, Any], wanted: set[str]) -> tuple[Any, Any]:
        """Computes all steps of `x_seq`, starting from `states`.

        Returns two dicts by name: the stacked results, among them the states in `wanted`, and the final states. The
        caller sets the states that the layer keeps itself before the call, and reads them after it.
        """
        raise NotImplementedError

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses torch.jit.script, which calls this method first. Also called for torch.jit.trace."""
        raise RuntimeError(
            f"asgl_cuda.convert: torch.jit can't trace or script a converted {bare_class(self).__name__}; call "
            "asgl_cuda.revert before, or use torch.compile or torch.export"
        )


_ADVICE = (
    "one step per call gains little; convert(model, sequences=True) computes all steps at once "
    '(sequences="loop" if the model\'s forward contains the loop over the steps)'
)

# What an adapter's `conversion_of` returns for a module. For a layer that can be converted, it is the subclass of
# `Converted`, and the spike function or None if the layer does not fire. For another neuron layer of the library, it is
# the reason as text. For any other module, it is None.
Conversion: TypeAlias = tuple[type[Converted], Callable[[Tensor], Tensor] | SpikeFunction | None] | str | None

# What an adapter's `streaming_of` returns for a module. For a module with a state over time or a time dimension, it is
# how `asgl_cuda.step` calls the module, or the reason as text why `step` can't. For any other module, it is None.
Streaming: TypeAlias = "Streamed | str | None"


class CarriesStates:
    """Base of modules whose calls continue from the states of earlier ones only while `stateful` is True.

    A stateful call after one that was not starts at rest as well. After `asgl_cuda.reset`, a stateful call continues
    from the states that the layers have.
    """

    stateful = False
    _carries = True  # whether a stateful call continues from the layers' states

    def starts_at_rest(self) -> bool:
        """Whether this call starts at rest. Also records for the next call whether this one is stateful."""
        at_rest = not (self.stateful and self._carries)
        self._carries = self.stateful
        return at_rest


class Streamed(NamedTuple):
    """How a module takes a sequence one time step per call, as in `asgl_cuda.step`.

    `time_dim` is the time dimension of its input, or None if the input is one step. `state` is the name of the
    attribute with its state, or None if no single attribute has it, as in containers. If `has_switch`, the module
    carries its state from call to call only while its attribute `stateful` is True.
    """

    time_dim: int | None
    state: str | None
    has_switch: bool = False


def float_if_scalar(value: Any) -> Any:
    """A zero-dimensional CPU tensor as a float, for cheaper calls; any other value unchanged.

    A value with a gradient is converted only while gradients are disabled.
    """
    if type(value) not in PLAIN_TENSORS or value.dim() or not value.is_cpu or torch.compiler.is_compiling():
        return value
    return value if value.requires_grad and torch.is_grad_enabled() else float(value)


def _prepared_options(options: dict[str, Any], x_seq: Tensor, layer: Converted) -> dict[str, Any]:
    """The options with their tensors as `lif` takes them.

    Integers become floating point, scalars move to the device of `x_seq`, both as in PyTorch, and tensors with as many
    dimensions as a step get a time dimension. Raises ValueError for a tensor with more dimensions than a step.
    """
    time_dim, dims = options.get("time_dim", 0), x_seq.dim() - 1  # number of dimensions of a step
    for name, given in options.items():
        if not isinstance(given, Tensor):
            continue
        if given.dim() > dims - (time_dim > 0) and not name.endswith("_init"):
            if given.dim() > dims:
                shape = [*x_seq.shape[:time_dim], *x_seq.shape[time_dim + 1 :]]
                raise ValueError(
                    f"asgl_cuda.convert: a parameter of {bare_class(layer).__name__}, from which {name} is computed, "
                    f"must broadcast to the shape of the input in a step, {shape}, got shape {list(given.shape)}"
                )
            options[name] = given = given.unsqueeze(time_dim)
        if not (given.dim() and given.is_floating_point()):
            value = as_floating(given) if name == "v_init" else float_if_scalar(as_floating(given))
            is_number = isinstance(value, Tensor) and value.dim() == 0
            options[name] = value.to(x_seq.device) if is_number else value
    return options


def as_floating(value: Tensor) -> Tensor:
    """A tensor of integers in the default dtype, as by PyTorch's type promotion; any other tensor unchanged."""
    return value if value.is_floating_point() or value.is_complex() else value.to(torch.get_default_dtype())


def _wrapped_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps forward for callers other than eager code.

    Records the call for torch.fx, as one of the module, or for a `Recording`; refuses torch.jit; and computes a
    `Pending` input that the layer can't take.
    """

    @functools.wraps(forward)
    def call(self: Converted, *args: Any, **kwargs: Any) -> Any:
        """Returns what was recorded of the call, or the result of forward."""
        if not torch.compiler.is_compiling() and (found := current_recording()) is not None and not found.is_running:
            return self.record_step(found, *args, **kwargs)
        is_pending = bool(args) and isinstance(args[0], Pending)
        if args and not is_pending and isinstance(args[0], fx.Proxy):
            tracer: Any = args[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self.__prepare_scriptable__()  # raises
        if is_pending and (self.takes_one_step or not self.takes_input_directly):
            why = (
                "which is called step by step"
                if self.takes_one_step
                else "which is recurrent, has a synaptic current or does not fire"
            )
            args = args[0].value_for(f"{bare_class(self).__name__}, {why}"), *args[1:]
        return forward(self, *args, **kwargs)

    return call


def replaced_method_reason(layer: nn.Module) -> str | None:
    """Why a layer can't be converted: an attribute of the instance replaces one of its methods. None if none does."""
    kind = bare_class(layer)
    for name in vars(layer):
        if name not in _OVERRIDABLE and inspect.isroutine(inspect.getattr_static(kind, name, None)):
            return f"its {name} is an attribute of this layer, not the method of {kind.__name__}"
    return None


def name_clash_reason(layer: nn.Module, overlay: type[Converted]) -> str | None:
    """Why a layer can't be converted: it, or a user's class, has a name that `overlay` uses. None if it has not."""
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
            return f"its attribute {name} has a name that converted layers use themselves; rename the attribute"
    return None


# Names that a user's subclass may override, because they do not change what a call computes. A converted layer still
# calls the overriding methods.
_OVERRIDABLE = {
    "__init__", "__repr__", "__dict__", "__weakref__", "__annotate_func__", "_get_name", "extra_repr", "train", "reset",
    "reset_mem", "reset_states",
}  # fmt: skip


def known_class_or_reason(layer: nn.Module, known: Collection[Any], mixing: tuple[type[nn.Module], ...] = ()) -> Any:
    """The class in `known` that computes the same as the layer, or the reason why there is none.

    It is the layer's own class, or the base of a user's subclass that overrides nothing on which results may depend.
    Subclasses of a class in `mixing` are refused, because they have weights between neurons or time steps.
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
    return override_reason(kind, base) or base


def override_reason(kind: type[nn.Module], base: type[nn.Module]) -> str | None:
    """Why a user's subclass `kind` of `base` can't be converted: it overrides what may change results. Or None."""
    for each in kind.__mro__:
        for name, value in vars(each).items():
            if name in _OVERRIDABLE or each in base.__mro__ or inspect.getattr_static(kind, name) is not value:
                continue
            # The base class may set an attribute of this name on its instances, and then the class itself does not show
            # the attribute. A property with a setter would replace that attribute, so it is always refused.
            sets = value.fset is not None if isinstance(value, property) else hasattr(type(value), "__set__")
            if sets or (hasattr(base, name) and (callable(value) or hasattr(value, "__get__"))):
                return f"its {name} is defined by {each.__name__}, not by {base.__name__}, which convert knows"
    return None
