"""The base classes of layers: constant and learned values, noise, and states that `stateful` layers carry.

A layer's `_states` names them: v, with an adaptation w, and in recurrent layers s and i. `reset` clears them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, fx, nn
from typing_extensions import Self

from ..backends import BACKENDS, NONE_IS_BEST
from ..checks import (
    FLOATING_TYPES,
    accept_none,
    check_analog_prob,
    check_bool,
    check_device_and_dtype,
    check_finite,
    check_floating,
    check_input,
    check_int,
    check_multi_spike,
    check_name,
    check_options,
    check_sizes,
    check_step,
    format_type,
    format_value,
    min_and_max,
    read_finite,
    read_number,
    read_values,
    warn_once,
)
from ..layout import Features, state_shape
from ..reference.learned import BOUND, Logarithm, Logit
from ..torch_modes import is_transform_active
from .deferred import tensor_of

Granularity = Literal["layer", "channel", "neuron"]
_GRANULARITIES = ("layer", "channel", "neuron")

Value = Tensor | float | Logarithm | Logit  # a parameter of neurons, as a layer passes it to a call

_LEAST_DECAY = 1 / (1 + math.exp(BOUND))


def _check_backend(name: str, value: Any, caller: str) -> str:
    """Checks that the value is the name of a backend, and returns it."""
    check_name(name, value, BACKENDS, caller, otherwise=NONE_IS_BEST)
    return value  # type: ignore[no-any-return]


def fill_parameter(parameter: Tensor | None, value: Tensor | float) -> None:
    """Sets a parameter or buffer to one value or to a tensor of values. Does nothing if it is None."""
    if parameter is not None:
        with torch.no_grad():
            parameter.copy_(value) if isinstance(value, Tensor) else parameter.fill_(value)


def format_values(value: Tensor | float, parameter: Tensor | None = None) -> str:
    """An initial value as text for `repr`: the least and the largest of several, and whether they are learned."""
    least, most = (f"{each:g}" for each in min_and_max(value))
    return f"{'' if parameter is None else 'learned from '}{least if least == most else f'{least} to {most}'}"


def set_plain_attribute(layer: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute that is no parameter, buffer or module, without the 0.9 us of nn.Module.__setattr__."""
    if torch.compiler.is_compiling():
        setattr(layer, name, value)
    else:
        vars(layer)[name] = value


class Settable(nn.Module):
    """A module whose properties can be set to a Parameter, which nn.Module would register instead."""

    _weights: ClassVar[tuple[str, ...]] = ()  # names of parameters that are not values of neurons

    def _neuron_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of this module, without `_weights` and without those of modules inside."""
        return [each for each in self.named_parameters(recurse=False) if each[0] not in self._weights]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch, but a property gets the parameter by its setter."""
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, param)
        else:
            super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in torch, but a property gets the buffer by its setter."""
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, tensor)
        else:
            super().register_buffer(name, tensor, persistent)


class Noisy(Settable):
    """A layer with noise. Compiled graphs read analog_prob from a tensor, so they are not recompiled if it changes."""

    _analog_prob: float  # for eager calls: reading a tensor would synchronise with the GPU
    # Compiled graphs read analog_prob from this tensor, of shape [1], or [0] if analog_prob is 0. It is not a buffer,
    # because DistributedDataParallel would broadcast a buffer at each call.
    _analog_prob_data: Tensor

    @property
    def analog_prob(self) -> float:
        """Fraction of elements that emit the smooth value in training."""
        return self._analog_prob

    @analog_prob.setter
    def analog_prob(self, value: float) -> None:
        self._set_analog_prob(value)

    def _set_analog_prob(self, value: Any) -> None:
        """Checks and sets `analog_prob`, for eager calls and compiled graphs."""
        caller = getattr(self, "_caller", f"asgl_cuda.{type(self).__name__}")
        value = read_number("analog_prob", value, caller)
        check_analog_prob(value, caller)
        if getattr(self, "multi_spike", False):
            check_multi_spike(getattr(self, "v_reset", None), value, caller)
        self._analog_prob = value
        self._make_analog_prob_data(getattr(self, "_analog_prob_data", torch.empty(0, device="cpu")).device)

    def analog_prob_of_call(self, x_seq: Tensor) -> Tensor | float:
        """The analog_prob of a call: 0 in evaluation, otherwise a float, or in compiled code with noise a tensor."""
        if not self.training:
            return 0.0
        if not torch.compiler.is_compiling():
            return self._analog_prob
        return self._analog_prob_data.to(x_seq.device) if self._has_noise else 0.0

    @property
    def _has_noise(self) -> bool:
        """Whether there is noise. Read from a shape, so that a compiled graph does not depend on the value."""
        return self._analog_prob_data.numel() > 0

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **options: Any) -> Any:
        """As in torch, for `to()` and others; also moves the data of analog_prob."""
        super()._apply(fn, *arguments, **options)  # type: ignore[no-untyped-call]
        if "_analog_prob_data" in self.__dict__:  # fn decides the device; values and type stay
            self._make_analog_prob_data(fn(self._analog_prob_data).device)
        return self

    def _make_analog_prob_data(self, device: torch.device) -> None:
        """Rebuilds `_analog_prob_data` on `device`: one element, the probability, or no element without noise."""
        size = int(self._analog_prob > 0)
        with torch.inference_mode(False):  # inference tensors can't be used in training
            self._analog_prob_data = torch.full((size,), self._analog_prob, dtype=torch.float64, device=device)

    def _drop_noise_attributes(self) -> None:
        """Removes the attributes of this class from a layer that gets its original class back."""
        for name in ("_analog_prob", "_analog_prob_data"):
            self.__dict__.pop(name, None)


class NeuronLayer(Settable):
    """A layer of neurons or integrators: a decay and other values of a granularity, and carried states (`_states`)."""

    _caller: ClassVar[str]  # the name of the layer in errors
    _function: ClassVar[str]  # the functional form, for errors
    # Names of the states that are carried from call to call. The function has an argument `{name}_init` and a result
    # `{name}_last` for each. The states are not buffers, because DistributedDataParallel would broadcast buffers.
    _states: ClassVar[tuple[str, ...]] = ("v",)
    _least_batch: ClassVar[int] = 0  # dimensions of the batch that an input must have
    _constants: ClassVar[tuple[str, ...]] = ("_decay",)  # attributes that are floats or tensors, but not buffers
    logit_decay: nn.Parameter | None
    store_v_seq = False
    v: Tensor | None
    # While asgl_cuda.step runs, it sets this to an object whose methods the layer calls before and after each call.
    # Hooks of torch would cost 10 us per module instead.
    _watch: Any = None

    # Options of the constructor that become attributes, with their checks `check(name, value, caller)`.
    _options: ClassVar[dict[str, Callable[..., Any]]] = {
        **dict.fromkeys(("v_rest", "input_gain"), read_finite),
        "stateful": check_bool,
        "time_dim": check_int,
        "backend": accept_none(_check_backend),
    }
    _norm_options: ClassVar[dict[str, Callable[..., Any]]] = {}  # as _options, for the normalisation in the layer
    v_rest: float
    input_gain: float
    stateful: bool
    time_dim: int
    backend: str | None

    def _set_options(self, given: Mapping[str, Any]) -> None:
        """Checks and sets the options, granularity and sizes that the constructor got. Values of neurons come later."""
        caller, granularity = self._caller, given["granularity"]
        check_name("granularity", granularity, _GRANULARITIES, caller)
        check_device_and_dtype(given["device"], given["dtype"], caller)
        self.num_features = self._checked_num_features(given["num_features"], granularity)
        self.granularity: Granularity = granularity
        self._features = Features(granularity == "channel", self.num_features, self._least_batch)
        self._place = torch.empty(0, device=given["device"])  # an empty tensor that records the layer's device
        self._set_checked_options(given, self._options)
        self.reset()

    def _set_checked_options(self, given: Mapping[str, Any], checks: Mapping[str, Callable[..., Any]]) -> None:
        """Sets the options of which `checks` has the names as attributes, after these checks."""
        for name, value in check_options(given, checks, self._caller).items():
            setattr(self, name, value)

    def _checked_num_features(self, num_features: Any, granularity: Granularity) -> tuple[int, ...]:
        """num_features as a tuple, empty if the granularity is "layer"."""
        if isinstance(num_features, float) and granularity == "layer" and 0 <= num_features <= 1:
            raise TypeError(
                f"{self._caller}: num_features must be an int or a sequence of ints, got {num_features:g}; a decay is "
                f"passed by name, decay={num_features:g}"
            )
        sizes = () if num_features is None else check_sizes("num_features", num_features, self._caller)
        if granularity == "layer":
            if sizes:
                raise ValueError(
                    f"{self._caller}: num_features needs granularity 'channel' or 'neuron', got "
                    f"{format_value(num_features)} with granularity 'layer', which has one value for the whole layer; "
                    "leave num_features out, or also pass granularity='neuron'"
                )
            return ()
        if num_features is None or (granularity == "channel" and len(sizes) != 1):
            wanted = "the number of channels" if granularity == "channel" else "the shape of the neurons"
            raise ValueError(
                f"{self._caller}: granularity {granularity!r} needs num_features, {wanted}, got "
                f"{format_value(num_features)}"
            )
        return sizes

    def _checked_value(
        self, name: str, value: Any, parameter: Tensor | None = None, option: str = ""
    ) -> Tensor | float:
        """Checks a value of neurons. Returns a float, or a tensor with a value for each channel or neuron.

        If the value initialises a `parameter`, `option` is the argument that made it learned.
        """
        learned = parameter is not None
        found = read_values(name, value, self._caller, self.num_features, learned, option)
        for each in () if learned else min_and_max(found):
            check_finite(name, each, self._caller)
        return self._moved_to_device(found, self._place.device)  # type: ignore[no-any-return]

    @staticmethod
    def _moved_to_device(value: Any, device: torch.device) -> Any:
        """The value, moved to the device if it is a tensor and the device is not "meta"."""
        return value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value

    @property
    def decay(self) -> Tensor | float:
        """The decay per step.

        A learned decay is a tensor: of shape `[]` for granularity "layer", else `num_features`.
        """
        return self._property_value(self._decay_value())

    @decay.setter
    def decay(self, value: Tensor | float) -> None:
        self._set_decay(value)

    def _set_decay(self, value: Any) -> None:
        """Checks the decay and keeps it as the value last set. If it is learned, also stores it in the parameter."""
        self._decay = self._store_decay(self.logit_decay, "decay", value, "learn_decay")

    def _store_decay(self, parameter: Tensor | None, name: str, given: Any, option: str) -> Tensor | float:
        """Checks a decay and returns it as `_checked_value` does. Also writes its logit into `parameter`, if given."""
        found = self._checked_value(name, given, parameter, option)
        for value in min_and_max(found):
            if value < 0 or value > 1:
                is_tau = name == "decay" and value > 1.0001  # smaller ones are rather a decay of 1, rounded
                hint = f"; SpikingJelly's tau={value:g} is decay={1 - 1 / value:g}" if is_tau else ""
                got = f"{value:g}" if f"{value:g}" not in ("0", "1") else repr(value)  # 1 + 1e-9 is not shown as 1
                raise ValueError(f"{self._caller}: {name} must be in [0, 1], got {got}{hint}")
            if parameter is not None and not _LEAST_DECAY <= value <= 1 - _LEAST_DECAY:
                raise ValueError(
                    f"{self._caller}: a learned {name} must be in [{_LEAST_DECAY:.3g}, 1 - {_LEAST_DECAY:.3g}], got "
                    f"{value}"
                )
        if parameter is not None:
            logit = found.double().logit() if isinstance(found, Tensor) else math.log(found / (1 - found))
            fill_parameter(parameter, logit)
        return found

    def _decay_value(self) -> Value:
        """The decay that a call gets: the constant, or the stored logit of a learned one."""
        return self._decay if self.logit_decay is None else Logit(self.logit_decay)

    def _property_value(self, value: Value) -> Tensor | float:
        """The value as a property returns it: a scalar if it is one for the whole layer."""
        if isinstance(value, (Logarithm, Logit)):
            value = value.value()
        # The sum makes a scalar of the only element. reshape(()) would raise an error for a tensor that fully_shard has
        # sharded.
        return value.sum() if isinstance(value, Tensor) and not self.num_features else value

    def _inputs_of_call(self, x_seq: Tensor, residual: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """The arguments of a call of the layer, as x_seq and the options that `_call_function` takes."""
        if residual is not None:
            raise TypeError(
                f"{self._caller}: takes no residual; call layer(x_seq + residual). If the argument is a state, leave "
                "it out: with stateful=True and in asgl_cuda.step the layer carries its states"
            )
        return tensor_of(x_seq, type(self).__name__), {}

    def forward(self, x_seq: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output for `x_seq` `[T, ...]`, or with time at `time_dim`, in the same shape.

        `LIF` adds a `residual` of that shape to its input, and `BatchNormLIF` to its normalised input. Other layers
        take no residual.
        """
        if isinstance(x_seq, fx.Proxy):
            return self._record_fx_call(x_seq, residual)
        if torch._C._get_tracing_state() is not None:
            self.__prepare_scriptable__()  # raises
        x_seq, options = self._inputs_of_call(x_seq, residual)
        if not isinstance(x_seq, Tensor) or x_seq.dtype not in FLOATING_TYPES:
            check_input(x_seq, self.time_dim, self._caller)  # names the layer, not its function
        if not (self.stateful or self.store_v_seq):
            return self._call_function(x_seq, **options)  # type: ignore[no-any-return]
        time_dim = check_input(x_seq, self.time_dim, self._caller)
        if (watch := self._watch) is not None:
            watch.before_call(x_seq)
        if is_transform_active():
            raise RuntimeError(
                f"{self._caller}: with stateful, store_v_seq or asgl_cuda.step a layer keeps potentials, which it "
                f"can't do inside a transform of torch.func; use {self._function}, which takes v_init and can return "
                "potentials"
            )
        states = self._states if self.stateful else ()  # without stateful, only `step` uses states
        for name in states:
            if (state := getattr(self, name)) is not None:
                self._check_state(name, state, x_seq, time_dim)
            options[f"{name}_init"] = self._carried_state(name)
        if self.stateful:
            options["return_v_last"] = True
        if self.store_v_seq:
            options["return_v_seq"] = True
        result = self._call_function(x_seq, **options)
        for name in states:
            set_plain_attribute(self, name, getattr(result, f"{name}_last"))
        if self.store_v_seq:
            self.v_seq = result.v_seq
        if watch is not None:
            watch.after_call()
        return result[0]  # type: ignore[no-any-return]

    def _check_state(self, name: str, state: Any, x_seq: Tensor, time_dim: int) -> None:
        """Refuses a carried state that does not fit x_seq. Warns if x_seq seems to be a batch without time."""
        check_floating(name, state, x_seq, self._caller)
        shape, carried = state_shape(x_seq, time_dim), list(state.shape)
        if carried != shape:
            one_step = list(x_seq.shape) == carried
            remedy = "call reset() before an input of another shape"
            if one_step:
                remedy = "if the input is one time step without a time dimension, call step() instead of the layer"
            carried_state = "potential" if name == "v" else f"state {name}"
            raise ValueError(
                f"{self._caller}: the carried {carried_state} must have the shape of the input without time, {shape}, "
                f"got {carried}; {remedy}"
            )
        if len(carried) == 1 and x_seq.shape[time_dim] > 1 and not torch.compiler.is_compiling():
            _warn_of_time(self._caller, x_seq, time_dim)

    def step(self, x_t: Tensor) -> Tensor:
        """Computes one time step, and carries the states, such as `v`, to the next step until `reset()`.

        Input and output have no time dimension. The layer need not be stateful. If it is not, calls with a whole
        sequence neither use nor change the states that the steps carry. In training, `BatchNormLIF` normalises by the
        statistics of the step. Raises the errors of a call of the layer.
        """
        x_t = tensor_of(x_t, f"a step of {type(self).__name__}")
        check_step(x_t, self.time_dim, self._caller)
        stateful = self.stateful
        set_plain_attribute(self, "stateful", True)
        try:
            return self(x_t.unsqueeze(self.time_dim)).squeeze(self.time_dim)  # type: ignore[no-any-return]
        finally:
            set_plain_attribute(self, "stateful", stateful)

    def _call_function(self, x_seq: Tensor, **options: Any) -> Any:
        """Calls the function of the layer with its parameters.

        Returns the output sequence, or if states are asked for, a tuple that begins with it, with `{name}_last` of each
        state, and v_seq.
        """
        raise NotImplementedError

    def _record_fx_call(self, x_seq: Any, residual: Any) -> Any:
        """Records the call as one node of a torch.fx graph. By default, fx only does so for torch's own layers."""
        tracer: Any = x_seq.tracer
        is_own = type(self).forward.__module__.partition(".")[0] == __name__.partition(".")[0]
        if not is_own or tracer.root is self:
            remedies = ["trace a module that contains the layer"] if tracer.root is self else []
            if not is_own:
                remedies.append(f"use a Tracer whose is_leaf_module says that {type(self).__name__} is a leaf")
            raise TypeError(
                f"{self._caller}: torch.fx can record calls of {type(self).__name__} but not its forward; "
                + ", and ".join(remedies)
            )
        x_seq, more = self._inputs_of_call(x_seq, residual)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x_seq,), more)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses torch.jit.script, which calls this method first, and torch.jit.trace, for which forward calls it."""
        raise RuntimeError(
            f"{self._caller}: torch.jit can neither trace nor script {type(self).__name__}; use "
            "torch.compile or torch.export"
        )

    def _carried_state(self, name: str) -> Tensor | None:
        """The state of this name with which the next call begins; None if it begins at rest."""
        state: Tensor | None = getattr(self, name)
        # Autograd does not accept inference tensors, but it accepts copies that are made outside of inference mode.
        if state is not None and not torch.compiler.is_compiling() and state.is_inference():
            return state if torch.is_inference_mode_enabled() else state.clone()
        return state

    def _match_meta_device(self, values: Sequence[Any], x_seq: Tensor) -> Sequence[Any]:
        """The values themselves, or on the device "meta" if x_seq is there, so that shapes can be inferred."""
        if not x_seq.is_meta:
            return values

        def on_meta(value: Any) -> Any:
            """The value on the device "meta", if it is a tensor."""
            if isinstance(value, (Logarithm, Logit)):
                return type(value)(on_meta(value.stored))
            return value.to("meta") if isinstance(value, Tensor) else value

        return [on_meta(value) for value in values]

    def _broadcast(self, value: Any, x_seq: Tensor) -> Any:
        """A value reshaped to broadcast against x_seq, if it is a tensor of the granularity's shape."""
        if not isinstance(value, Tensor) or not self.num_features:
            return value
        return value.reshape(self._features.broadcast_shape(x_seq, self.time_dim % x_seq.dim()))

    @property
    def _stored_names(self) -> tuple[str, ...]:
        """Names of the attributes that a call sets: the states, and v_seq if the layer has the option store_v_seq."""
        return (*self._states, "v_seq") if "store_v_seq" in self._options else self._states

    def reset(self) -> None:
        """Clears the states, so that the next call starts at rest."""
        for name in self._stored_names:
            setattr(self, name, None)

    def _map_stored(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replaces each state, and v_seq, by the result of `fn` for it."""
        for name in self._stored_names:
            value = getattr(self, name)
            setattr(self, name, None if value is None else fn(value))

    def detach_(self) -> Self:
        """Detaches the states, and `v_seq`, from their graph, for truncated backpropagation through time."""
        self._map_stored(Tensor.detach)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch, for `to()`, `half()` and others; also converts the states, and moves constants to the device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._map_stored(fn)
        self._place = fn(self._place)
        for name in self._constants:
            if name in self.__dict__:  # otherwise it is a parameter
                setattr(self, name, self._moved_to_device(getattr(self, name), self._place.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # copy.deepcopy refuses tensors that are not leaves of the graph.
        kept = {name: value.detach() for name in self._stored_names if (value := getattr(self, name)) is not None}
        return self.__dict__ | kept


def _warn_of_time(caller: str, x_seq: Tensor, time_dim: int) -> None:
    """Warns once that a stateful layer takes its input of two dimensions for `[T, N]`, not for `[B, N]`."""
    warn_once(
        f"{caller}, time",
        f"{caller}: a stateful layer got an input of shape {list(x_seq.shape)}, of which dimension {time_dim} is taken "
        "for time. If the input is one time step of a batch, call layer.step(x_t) or asgl_cuda.step(model, x_t). If it "
        "is a sequence without a batch, add a batch dimension of size 1",
    )


def check_module(model: Any, caller: str) -> None:
    """Refuses anything but a module."""
    if not isinstance(model, nn.Module):
        hint = "; pass the model itself" if isinstance(model, Iterator) else ""
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {format_type(model)}{hint}")
