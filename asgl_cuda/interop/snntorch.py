"""snnTorch: `Leaky`, `Lapicque`, `Synaptic`, `RLeaky` and `RSynaptic`, step by step, `MultiStep` for whole sequences.

    m[t] = clamp(beta, 0, 1) m[t-1] + x[t] - threshold [m[t-1] > threshold]        "subtract"; the reset is detached
    m[t] = clamp(beta, 0, 1) m[t-1] (1 - [m[t-1] > threshold]) + x[t]              "zero";     and "none" has none
    spike = m[t] > threshold

In Lapicque, 1 - time_step / (R C) replaces clamp(beta, 0, 1), and time_step / C x[t] replaces x[t]. In Synaptic a
current, syn[t] = clamp(alpha, 0, 1) syn[t-1] + x[t], replaces x[t]. In RLeaky and RSynaptic it is replaced by
x[t] + recurrent(spike[t-1]). In all of these, "zero" clears the input of the step as well.

The reset comes one step late. So m is h of asgl_cuda, the potential before reset, and the potential after it is
v[t] = h[t] - threshold / beta s[t]. With reset_delay=False, m is returned after a reset that is not detached, and is
not reset again. An ASGL layer resets by the value that it has emitted. A potential from its caller is reset by
comparison with the threshold.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import snntorch
import torch
from snntorch._neurons import rleaky, rsynaptic
from torch import Tensor, nn

from ..checks import HALF_TYPES, check_bool, format_type
from ..neurons.deferred import Pending
from ..neurons.over_time import placement_advice
from ..torch_modes import is_transform_active
from .converted import (
    CarriesStates,
    Conversion,
    Converted,
    Settings,
    Streamed,
    Streaming,
    bare_class,
    float_if_scalar,
    known_class_or_reason,
    version_of,
)
from .recording import SPIKES, Recording
from .recurrent import Recurrent, feedback_reason, synaptic_inputs

# The smallest beta with which a sequence is computed in one call. A beta between 0 and this value is replaced by it, so
# that threshold / beta is finite. Only a tensor that can't be read, for example in compiled code, is replaced. If beta
# can be read and is below `_SMALL_BETA`, the sequence is computed step by step.
_LEAST_BETA = 1e-6
# If beta is known to be below this value, a sequence is computed step by step, because threshold / beta would cause
# large rounding errors in the gradient of beta. At beta = 1e-3 their relative size is 6e-5.
_SMALL_BETA = 1e-3

_RETURNING = (nn.Linear, rleaky.RecurrentOneToOne, rsynaptic.RecurrentOneToOne)
_MULTI_STEP = "asgl_cuda.interop.snntorch.MultiStep"
_NAMES = "a Leaky, Lapicque, Synaptic, RLeaky or RSynaptic"


class ConvertedLeaky(Converted):
    """A `Leaky` or `Lapicque`: a call takes one step, with snnTorch's arguments and results."""

    time_dim = None
    reset_delay = True  # always True for Lapicque
    _states: tuple[str, ...] = ("mem",)
    _last: tuple[Tensor, int, Tensor] | None = None  # the last noisy step: potential, its version, spikes
    _smallness: tuple[Any, bool] = (), False  # id and version of beta when it was read, and whether it was small

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        return {
            "spike_grad": self.spike_grad,
            "inhibition": self.inhibition,
            "state_quant": self.state_quant,
            "reset_mechanism": self._reset_mechanism,
            "state_function": self.state_function,
            "reset_delay": self.reset_delay,
            "graded_spikes_factor": self._buffers.get("graded_spikes_factor"),
        }

    def begin_conversion(self, settings: Settings, analog_prob: float, learn_width: bool) -> None:
        """Stores the settings of a conversion, and registers the layer with snnTorch."""
        super().begin_conversion(settings, analog_prob, learn_width)
        register_with_library(self)

    def prefers_original_step(self) -> bool:
        """Whether to run snnTorch's own step.

        A layer that keeps its states also does so if beta learns, whose gradient takes the time that kernels save.
        """
        if self.init_hidden and self.beta.requires_grad and torch.is_grad_enabled():
            return self.can_run_original()
        return super().prefers_original_step()

    def forward(self, input_: Tensor, *states: Tensor | None, **named: Tensor | None) -> Any:
        """Computes one step, with the arguments and results of the layer in snnTorch."""
        if self.prefers_original_step():
            return super().forward(input_, *states, **named)
        return self.pack_results(input_, *self.compute_step(input_, *states, **named))

    def carried_states(self) -> dict[str, Any]:
        """The states that the layer keeps from step to step, by name."""
        return {name: self._buffers[name] for name in self._states}

    def given_states(self, caller: str, given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """The states that a call passes after the input, by name. Raises TypeError for other arguments."""
        unknown = [*given[len(self._states) :], *(named.keys() - {*self._states[len(given) :]})]
        if unknown:
            expected = f"{bare_class(self).__name__} takes {' and '.join(['an input', *self._states])}"
            if len(given) > len(self._states):
                got = f"{1 + len(given)} positional arguments"
            elif unknown[0] in self._states:
                got = f"{unknown[0]} twice, by position and by name"
            else:
                got = f"an argument {unknown[0]!r}"
            raise TypeError(f"{caller}: {expected}, got {got}")
        return {**dict(zip(self._states, given, strict=False)), **named}

    def set_state(self, name: str, value: Any) -> None:
        """Sets a state that the layer keeps from step to step."""
        self._buffers[name] = value  # not setattr, which refuses a value that is still `Recorded`

    def record_step(self, recording: Recording, input_: Any, *given: Any, **named: Any) -> Any:
        """Records one step. Takes and returns what the layer's forward takes and returns."""
        states = self.carried_states()
        for name, value in self.given_states("asgl_cuda.convert", given, named).items():
            if value is not None:
                self._check_state_argument(name)
                states[name] = value
        results = recording.add_layer_step(self, input_, states)
        for name in states:
            self.set_state(name, results[name])
        spikes, *others = [results[name] for name in (*(() if "spk" in states else (SPIKES,)), *states)]
        return spikes if self.init_hidden and not self.output else (spikes, *others)

    def compute_steps(self, x_seq: Tensor, states: dict[str, Any], wanted: set[str]) -> tuple[Any, Any]:
        """Computes all steps from the stored states, see `Converted.compute_steps`. Returns all, wanted or not."""
        late = self.reset_delay or self.reset_mechanism != "subtract"
        steps = self.compute_sequence if late else self.loop_over_steps
        spikes, *others = steps(x_seq, *(None for _ in states))
        self.pack_results(x_seq, spikes, time_dims=1)
        names = [name for name in states if name != "spk"]
        found = {SPIKES: spikes, "spk": spikes, **dict(zip(names, others, strict=True))}
        return {name: each for name, each in found.items() if name in (SPIKES, *states) and each is not None}, {}

    def compute_step(self, input_: Tensor, mem: Tensor | None = None) -> tuple[Tensor, ...]:
        """Spikes and states after one step, from the given states or the stored ones."""
        return self._charge_and_fire(input_.unsqueeze(0), mem)

    def _charge_and_fire(self, x_seq: Tensor, mem: Tensor | None) -> tuple[Tensor, ...]:
        """Spikes and potentials after one step `x_seq`, `[1, ...]`, before which the pending reset is applied."""
        mechanism, threshold, (decay, gain) = (
            self.reset_mechanism,
            float_if_scalar(self.threshold),
            self._decay_and_gain(),
        )
        self._check_parameter_shapes(x_seq.shape[1:], threshold, decay)
        v_init = self._state_before(x_seq, mem)
        if mechanism != "none":
            reset = self._pending_reset(v_init, threshold)
        if mechanism == "zero":
            v_init = (1 - reset) * v_init
        elif mechanism == "subtract":
            is_one = isinstance(gain, float) and gain == 1
            x_seq = _subtract_scaled(x_seq, reset, threshold if is_one else threshold / gain)
        output = self.lif(
            x_seq, v_init=v_init, decay=decay, input_gain=gain, v_threshold=threshold, v_reset=None, reset_amount=0.0,
            detach_reset=True,
        )  # fmt: skip
        assert output.v_last is not None
        spk = output.s_seq.squeeze(0)  # its gradient is cheaper than that of indexing
        mem = self._in_snntorch_dtype(output.v_last, x_seq)
        if mechanism != "none" and not self.reset_delay:
            mem = _subtract_scaled(mem, spk - reset, threshold if mechanism == "subtract" else mem)
        elif self._has_noise:
            self.__dict__["_last"] = mem, version_of(mem), spk.detach()  # faster than Module.__setattr__
        self._store_state("mem", mem)
        return spk, mem

    def compute_sequence(self, x_seq: Tensor, mem: Tensor | None = None) -> tuple[Tensor, ...]:
        """Spikes and states of all steps, from the given states or the stored ones. Stores the last states."""
        options = self._sequence_options()
        if self._has_small_beta(options["decay"]):
            return self.loop_over_steps(x_seq, mem)
        self._check_parameter_shapes(x_seq.shape[1:], options["v_threshold"], options["decay"])
        # snnTorch's mem is the potential before the reset. With reset_delay=False the reset happens in the same step,
        # and mem is the potential after the reset.
        options["return_h_seq"] = is_before_reset = self.reset_delay or self.reset_mechanism == "none"
        options |= {} if is_before_reset else {"detach_reset": False, "return_v_seq": True}
        output = self.lif(x_seq, v_init=self._initial_potential(x_seq, mem, options), **options)
        mem_seq = output.h_seq if is_before_reset else output.v_seq
        assert mem_seq is not None
        mem_seq = self._in_snntorch_dtype(mem_seq, x_seq)
        self._store_state("mem", mem_seq[-1].clone())
        return output.s_seq, mem_seq

    def loop_over_steps(self, x_seq: Tensor, *states: Tensor | None) -> tuple[Tensor, ...]:
        """Spikes and states of all steps, stacked, computed step by step."""
        steps: list[tuple[Tensor, ...]] = []
        for x in x_seq:
            steps.append(self.compute_step(x, *states))
            states = () if self.init_hidden else steps[-1][-len(states) :]
        return tuple(map(torch.stack, zip(*steps, strict=True)))

    def _store_state(self, name: str, value: Tensor) -> None:
        """Sets a state. A buffer is set directly, without the 3 us that setattr of a module takes."""
        if name in self._buffers and not torch.compiler.is_compiling():
            self._buffers[name] = value
        else:
            setattr(self, name, value)

    def pack_results(self, input_: Tensor, spk: Tensor, *states: Tensor, time_dims: int = 0) -> Any:
        """The return value of the layer, spikes or spikes and states, after a check of the spikes' shape."""
        if spk.shape != input_.shape:  # because snnTorch would reset its states in each step
            self._raise_for_parameter_shape(input_.shape[time_dims:])
            raise ValueError(
                f"asgl_cuda.convert: the recurrent weights of {bare_class(self).__name__} must keep the shape of the "
                f"input, {list(input_.shape)}, but spikes get shape {list(spk.shape)}"
            )
        return spk if self.init_hidden and not self.output else (spk, *states)

    def _check_parameter_shapes(self, shape: torch.Size, *used: Tensor | float) -> None:
        """Raises ValueError for a parameter of the layer that does not broadcast against a step of this shape.

        Looks for one only if a value in `used`, the parameters of this call, has dimensions: numbers always broadcast.
        """
        for each in used:
            if isinstance(each, Tensor) and each.dim():
                self._raise_for_parameter_shape(shape)

    def _raise_for_parameter_shape(self, shape: torch.Size) -> None:
        """Raises ValueError for the first parameter of the layer that does not broadcast against a step, if any."""
        values = {name: getattr(self, name, None) for name in ("alpha", "beta", "R", "C", "threshold")}
        values["recurrent.V"] = getattr(getattr(self, "recurrent", None), "V", None)
        for name, value in values.items():
            sizes = value.shape if isinstance(value, Tensor) else ()
            fits = all(size in (1, wanted) for size, wanted in zip(reversed(sizes), reversed(shape), strict=False))
            if len(sizes) > len(shape) or not fits:
                raise ValueError(
                    f"asgl_cuda.convert: {name} of {bare_class(self).__name__} must have one value, or broadcast to "
                    f"the shape of the input in a step, {list(shape)}, got shape {list(sizes)}"
                )

    def _in_snntorch_dtype(self, mem_seq: Tensor, x_seq: Tensor) -> Tensor:
        """The potentials in the dtype of the input, or in float32 if in snnTorch a reset or a beta promotes them."""
        if x_seq.dtype not in HALF_TYPES or self.reset_mechanism != "none":
            return mem_seq
        leak = (self.R, self.C) if isinstance(self, snntorch.Lapicque) else (self.beta,)
        return mem_seq if any(value.dim() for value in leak) else mem_seq.to(x_seq.dtype)

    def _decay_and_gain(self) -> tuple[Any, Any]:
        """The options `decay` and `input_gain` of `lif`."""
        if not isinstance(self, snntorch.Lapicque):
            return _clamp_to_unit(self.beta), 1.0
        R, C, time_step = self.R, self.C, self.time_step  # noqa: N806
        # The gain is time_step / C. The operations are in the order of snnTorch's, so that the gain has the same
        # rounding.
        return float_if_scalar(1 - time_step / (R * C)), float_if_scalar(R * (1 / (R * C)) * time_step)

    def _sequence_options(self) -> dict[str, Any]:
        """The options of `lif` for a sequence."""
        threshold, (decay, gain) = float_if_scalar(self.threshold), self._decay_and_gain()
        options = {"v_threshold": threshold, "input_gain": gain, "detach_reset": True, "return_h_seq": True}
        if self.reset_mechanism == "zero":
            return {**options, "decay": decay, "v_reset": 0.0}
        if self.reset_mechanism == "none":
            return {**options, "decay": decay, "v_reset": None, "reset_amount": 0.0}
        decay = _raise_to_least(decay, _LEAST_BETA)
        return {**options, "decay": decay, "v_reset": None, "reset_amount": threshold / decay}

    def _initial_potential(self, x_seq: Tensor, mem: Tensor | None, options: dict[str, Any]) -> Tensor:
        """The `v_init` of a sequence: the potential before it, after the pending reset."""
        mem = self._state_before(x_seq, mem)
        reset = self._pending_reset(mem, options["v_threshold"])
        return (
            (1 - reset) * mem
            if options["v_reset"] is not None
            else _subtract_scaled(mem, reset, options["reset_amount"])
        )

    def _state_before(self, x_seq: Tensor, state: Tensor | None, name: str = "mem") -> Tensor:
        """The state before a step or sequence: `state`, or the stored one for None. Zeros if its shape differs."""
        if state is None:
            state = getattr(self, name)
        else:
            self._check_state_argument(name)
        return state if state.shape == x_seq.shape[1:] else x_seq.new_zeros(x_seq.shape[1:])

    def _check_state_argument(self, name: str) -> None:
        """Refuses a state as an argument if the layer keeps its states itself."""
        if self.init_hidden:
            raise TypeError(f"`{name}` should not be passed as an argument while `init_hidden=True`")

    def _has_small_beta(self, decay: Tensor | float) -> bool:
        """Whether beta is known to be so small that a sequence must be computed step by step.

        Reads a tensor once after each change. It can't be read while compiling, under transforms of torch.func, and
        while a CUDA graph is captured.
        """
        if self.reset_mechanism != "subtract":
            return False
        if isinstance(decay, float):
            return abs(decay) < _SMALL_BETA
        captured = decay.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or is_transform_active() or captured:
            return False
        mark = id(self.beta), version_of(self.beta)
        if self._smallness[0] != mark:
            self._smallness = mark, bool((decay.detach().abs() < _SMALL_BETA).any())
        return self._smallness[1]

    def _pending_reset(self, mem: Tensor, threshold: Tensor | float) -> Tensor:
        """The spikes of the last step, whose reset is pending: as emitted if it had noise, else `mem > threshold`."""
        last = self.__dict__.pop("_last", None)
        if last is not None and mem is last[0] and version_of(mem) == last[1]:
            return last[2]  # type: ignore[no-any-return]
        # snnTorch checks whether mem - threshold is above 0, and this difference of unsigned integers wraps around.
        above = mem > threshold if mem.is_floating_point() else mem - self.threshold > 0
        return above.to(mem.dtype)

    def restore_original(self) -> None:
        """Restores the original layer."""
        for name in ("_last", "_smallness"):
            self.__dict__.pop(name, None)
        super().restore_original()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_last"}  # not leaves: not copied


class ConvertedSynaptic(ConvertedLeaky):
    """A `Synaptic`: a call takes one step, with snnTorch's arguments and results."""

    takes_input_directly = False
    syn: Tensor
    _states: tuple[str, ...] = ("syn", "mem")

    def speed_advice(self) -> str | None:
        """Advice to call with whole sequences."""
        return f"{super().speed_advice()}; a step may store more bytes for backward than in snnTorch"

    def compute_step(self, input_: Tensor, syn: Any = None, mem: Any = None) -> Any:  # type: ignore[override]
        """Spikes, current and potential after one step."""
        syn = _clamp_to_unit(self.alpha) * self._state_before(input_.unsqueeze(0), syn, "syn") + input_
        self._store_state("syn", syn)
        spk, mem = self._charge_and_fire(syn.unsqueeze(0), mem)
        return spk, syn, mem

    def compute_sequence(self, x_seq: Tensor, syn: Any = None, mem: Any = None) -> Any:  # type: ignore[override]
        """Spikes, currents and potentials of all steps."""
        if self._has_small_beta(_clamp_to_unit(self.beta)):
            return self.loop_over_steps(x_seq, syn, mem)
        syn = self._state_before(x_seq, syn, "syn")
        syn_seq, self.syn = self.integrate(x_seq, decay=_clamp_to_unit(self.alpha), v_init=syn)
        s_seq, mem_seq = super().compute_sequence(syn_seq, mem)
        return s_seq, syn_seq, mem_seq


class ConvertedRLeaky(Recurrent, ConvertedLeaky):
    """An `RLeaky` whose `recurrent` is a Linear or one weight per neuron. A call takes one step, as in snnTorch."""

    _weights = ("V",)
    _states: tuple[str, ...] = ("spk", "mem")
    prefers_original_step = ConvertedLeaky.prefers_original_step  # snnTorch's step is not faster here

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        return {**super().dependencies(), "recurrent": feedback_reason(self.recurrent, _RETURNING)}

    def compute_step(self, input_: Tensor, spk: Any = None, *states: Any, **named: Any) -> Any:  # type: ignore[override]
        """Spikes and states after one step, in which the last spikes are fed back."""
        spk = self._state_before(input_.unsqueeze(0), spk, "spk")
        spk, *after = super().compute_step(input_ + self.recurrent(spk), *states, **named)
        spk = spk.clone()  # clone: detach_() refuses views
        self._store_state("spk", spk)
        return spk, *after

    def compute_sequence(self, x_seq: Tensor, spk: Any = None, mem: Any = None) -> Any:  # type: ignore[override]
        """Spikes and potentials of all steps."""
        if not self._fits_recurrent_lif(x_seq):
            return self.loop_over_steps(x_seq, spk, mem)
        s_seq, mem_seq, *_ = self._recurrent_sequence(x_seq, spk, mem)
        return s_seq, mem_seq

    def _fits_recurrent_lif(self, x_seq: Tensor) -> bool:
        """Whether `recurrent_lif` can compute the layer.

        Values must be single or one per neuron, and beta not so small that `threshold / beta` loses precision.
        """
        values = (self.threshold, self.beta, getattr(self, "alpha", None), getattr(self.recurrent, "V", None))
        shape = x_seq.shape[-1:]
        fits = all(not isinstance(each, Tensor) or each.numel() == 1 or each.shape == shape for each in values)
        return fits and not self._has_small_beta(_clamp_to_unit(self.beta))

    def _recurrent_sequence(self, x_seq: Tensor, spk: Any, mem: Any, **synapse: Any) -> Any:
        """Spikes, potentials, and the arguments s_init, weight and bias of `synaptic_inputs`."""
        self.check_unchanged()
        options, s_init = self._sequence_options(), self._state_before(x_seq, spk, "spk")
        v_init = self._initial_potential(x_seq, mem, options)
        if isinstance(self.recurrent, nn.Linear):
            weight, bias = self.recurrent.weight, self.recurrent.bias
        else:
            weight, bias = torch.as_tensor(self.recurrent.V).reshape(-1).expand(x_seq.shape[-1]), None
        options |= {"v_init": v_init, "s_init": s_init, "bias": bias, **synapse}
        output = self.recurrent_lif(x_seq, weight, options.pop("input_gain"), **options)
        assert output.h_seq is not None
        mem_seq = self._in_snntorch_dtype(output.h_seq, x_seq)
        for name, state in (("spk", output.s_seq[-1]), ("mem", mem_seq[-1]), ("syn", output.i_last)):
            if state is not None:
                self._store_state(name, state.clone())
        return output.s_seq, mem_seq, s_init, weight, bias


class ConvertedRSynaptic(ConvertedRLeaky, ConvertedSynaptic):  # type: ignore[misc]
    """An `RSynaptic`: a call takes one step, with snnTorch's arguments and results."""

    _states = ("spk", "syn", "mem")

    def compute_sequence(self, x_seq: Tensor, spk: Any = None, syn: Any = None, mem: Any = None) -> Any:  # type: ignore[override]
        """Spikes, currents and potentials of all steps; no currents where the layer does not return them."""
        if not self._fits_recurrent_lif(x_seq):
            return self.loop_over_steps(x_seq, spk, syn, mem)
        alpha, syn = _clamp_to_unit(self.alpha), self._state_before(x_seq, syn, "syn")
        s_seq, mem_seq, *weights = self._recurrent_sequence(x_seq, spk, mem, syn_decay=alpha, i_init=syn)
        if self.init_hidden and not self.output:  # the layer then returns only spikes
            return s_seq, None, mem_seq
        syn_seq, _ = self.integrate(synaptic_inputs(x_seq, s_seq, *weights), decay=alpha, v_init=syn)
        return s_seq, syn_seq, mem_seq


def _subtract_scaled(value: Tensor, spikes: Tensor, amount: Tensor | float) -> Tensor:
    """`value - spikes * amount`."""
    if isinstance(amount, float) and value.is_floating_point():
        return value.sub(spikes, alpha=amount)
    return value - spikes * amount


def _clamp_to_unit(value: Tensor) -> Tensor | float:
    """The value, clamped to [0, 1]; a float if it is constant."""
    value = float_if_scalar(value)
    return min(max(value, 0.0), 1.0) if isinstance(value, float) else value.clamp(0, 1)


def _raise_to_least(value: Tensor | float, least: float) -> Tensor | float:
    """The value, raised to `least` where it is in [0, least), with the gradient of the value. A negative one stays."""
    if isinstance(value, float):
        return least if 0 <= value < least else value
    return value + torch.where((value >= 0) & (value < least), least - value, 0.0).detach()


class MultiStep(CarriesStates, nn.Module):
    """Applies `Leaky`, `Lapicque`, `Synaptic`, `RLeaky` or `RSynaptic` of snnTorch to a whole sequence in one call.

    Args:
        layer: a layer of snnTorch, converted in place if necessary.
        stateful: a call continues from the states of the call before, if this was stateful too, until
            `asgl_cuda.reset(model)`. By default a state that is not passed starts at rest. `stateful` may be set later,
            as an attribute.

    A call takes `x_seq` `[T, ...]` and, unless the layer has init_hidden, optional initial states. It returns the
    layer's results of all steps, stacked: spikes, or spikes and states. The layer keeps the last states, such as
    `layer.mem`. A state dict has the keys of the layer alone.

    `snntorch.utils.reset(model)` does not find the layer. With `stateful=True` use `asgl_cuda.reset(model)`, which also
    resets other layers of snnTorch.

    Raises TypeError for arguments of another type, ValueError for a layer that can't be converted or that resets by
    subtraction without delay, and RuntimeError in a call if the layer has been reverted.

    The same with snnTorch::

        for x in x_seq:
            spk, mem = layer(x, mem)
            spk, syn, mem = layer(x, syn, mem)  # Synaptic
            spk, mem = layer(x, spk, mem)  # RLeaky
            spk, syn, mem = layer(x, spk, syn, mem)  # RSynaptic

    Example::

        import snntorch
        from asgl_cuda.interop.snntorch import MultiStep

        neurons = MultiStep(snntorch.Leaky(beta=0.9))
        spk_seq, mem_seq = neurons(torch.rand(10, 2, 4))  # [T, B, 4] each
    """

    def __init__(self, layer: nn.Module, *, stateful: bool = False) -> None:
        from .convert import convert

        super().__init__()
        self.stateful = check_bool("stateful", stateful, _MULTI_STEP)
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{_MULTI_STEP}: layer must be {_NAMES} of snnTorch, got {format_type(layer)}")
        if not isinstance(layer, tuple(_CONVERTED)):
            raise ValueError(f"{_MULTI_STEP}: layer must be {_NAMES} of snnTorch, got {bare_class(layer).__name__}")
        if not getattr(layer, "reset_delay", True) and layer.reset_mechanism == "subtract":
            raise ValueError(f"{_MULTI_STEP}: a reset by subtraction needs reset_delay=True, got False")
        if not isinstance(layer, ConvertedLeaky):
            reason = conversion_of(layer)  # asked before `convert`, which also converts layers inside of a refused one
            if not isinstance(reason, str):
                _, report = convert(layer, inplace=True)
                reason = report.left[0].reason if report.left else ""
            if reason:
                raise ValueError(
                    f"{_MULTI_STEP}: layer must be {_NAMES} of snnTorch that can be converted, but {reason}"
                )
        self.layer = layer

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The state dict of the layer."""
        return self.layer.state_dict(*args, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Also loads a state dict of the layer alone, without the prefix `layer.`."""
        inside = f"{prefix}layer."
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(inside)]:
            state_dict[inside + key.removeprefix(prefix)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, x_seq: Tensor, *states: Tensor | None, **named: Tensor | None) -> Any:
        """The results of all steps of `x_seq` `[T, ...]`, stacked."""
        if not isinstance(x_seq, (Pending, Tensor)):
            raise TypeError(f"{_MULTI_STEP}: x_seq must be a tensor, got {type(x_seq).__name__}")
        if not isinstance(self.layer, ConvertedLeaky):
            raise RuntimeError(
                f"{_MULTI_STEP}: layer must be converted, got a {type(self.layer).__name__} that is not, perhaps "
                "because of asgl_cuda.revert; asgl_cuda.convert(model, inplace=True) converts it"
            )
        given = self.layer.given_states(_MULTI_STEP, states, named)
        for name, state in given.items():
            if not isinstance(state, (Tensor, NoneType)):
                raise TypeError(f"{_MULTI_STEP}: {name} must be a tensor or None, got {type(state).__name__}")
        if self.starts_at_rest():
            self.layer.reset_mem()
        return self.layer.pack_results(x_seq, *self.layer.compute_sequence(x_seq, **given), time_dims=1)


_CONVERTED = {
    snntorch.Leaky: ConvertedLeaky,
    snntorch.Lapicque: ConvertedLeaky,
    snntorch.Synaptic: ConvertedSynaptic,
    snntorch.RLeaky: ConvertedRLeaky,
    snntorch.RSynaptic: ConvertedRSynaptic,
}
_MIXING = (snntorch.RLeaky, snntorch.RSynaptic, snntorch.SLSTM, snntorch.SConv2dLSTM, snntorch.LeakyParallel)
_NEURONS = (snntorch.SpikingNeuron, *_MIXING)


def conversion_of(layer: nn.Module) -> Conversion:
    """How to convert a layer of snnTorch, see `Conversion`."""
    kind = known_class_or_reason(layer, _CONVERTED, _MIXING)
    if isinstance(kind, str):
        return kind if isinstance(layer, _NEURONS) or bare_class(layer).__name__ == "LeakyKernel" else None
    leaky: Any = layer
    if importlib.metadata.version("snntorch").split(".")[0] != "1":
        return (
            f"it is of snnTorch {importlib.metadata.version('snntorch')}, and convert knows only the reset of version 1"
        )
    if leaky.inhibition:
        return "it has inhibition, which asgl_cuda does not support (inhibition=True)"
    if leaky.state_quant:
        return "it quantises its state, which asgl_cuda does not support (state_quant)"
    if isinstance(leaky.graded_spikes_factor, nn.Parameter) or bool((leaky.graded_spikes_factor != 1).any()):
        return "its spikes are graded, which asgl_cuda does not support (graded_spikes_factor)"
    base = {"subtract": kind._base_sub, "zero": kind._base_zero, "none": kind._base_int}[leaky.reset_mechanism]
    if getattr(leaky.state_function, "__func__", None) is not base:
        return "its state_function is not that of its reset_mechanism"
    if leaky.reset_mechanism == "zero" and kind is not snntorch.Leaky:
        return 'it resets the input of the next step to 0 as well, and lif only the potential (reset_mechanism="zero")'
    if kind is snntorch.Lapicque and (leaky.R * leaky.C).requires_grad:
        return "its R and C come from the learned beta, once, by a graph that ends with the first backward (learn_beta)"
    if issubclass(_CONVERTED[kind], Recurrent) and (reason := feedback_reason(leaky.recurrent, _RETURNING)) is not None:
        return reason
    if kind is snntorch.RSynaptic and not leaky.reset_delay:
        return "its reset without delay fails in snnTorch (reset_delay=False)"
    return _CONVERTED[kind], leaky.spike_grad


def register_with_library(model: nn.Module) -> None:
    """Adds the layers of a copied model to the list of layers that snnTorch resets and detaches."""
    instances: list[Any] = snntorch.SpikingNeuron.instances
    known = {id(layer) for layer in instances}
    instances.extend(
        layer for layer in model.modules() if isinstance(layer, snntorch.SpikingNeuron) and id(layer) not in known
    )


def reset(module: nn.Module) -> None:
    """Resets the states of a neuron of snnTorch."""
    if isinstance(module, snntorch.SpikingNeuron) and hasattr(module, "reset_mem"):
        module.reset_mem()


def detach(module: nn.Module) -> None:
    """Detaches the states of a neuron of snnTorch."""
    if isinstance(module, _NEURONS):
        for name in module._non_persistent_buffers_set:  # the names of its states
            state = module._buffers[name]
            module._buffers[name] = None if state is None else state.detach()


def placement_outside_over_time(module: nn.Module) -> str | None:
    """How to use a module that `OverTime` refuses, see `imported_adapters`; None for other modules."""
    if isinstance(module, MultiStep):
        return placement_advice("MultiStep(...)")
    if isinstance(module, tuple(_CONVERTED)):
        return placement_advice(f"{_MULTI_STEP}({bare_class(module).__name__}(..., init_hidden=True))", in_place=True)
    return "and call it as snnTorch does" if isinstance(module, _NEURONS) else None


def reason_not_written(module: nn.Module) -> str | None:
    """Why `to_nir` can't write a module, or None."""
    if isinstance(module, MultiStep):
        return "NIR's neurons have another reset than its layer; use asgl_cuda.LIF in its place"
    return None


def streaming_of(module: nn.Module) -> Streaming:
    """How a module takes a sequence one time step per call, see `Streaming`."""
    if isinstance(module, MultiStep):
        return Streamed(0, None, has_switch=True)
    if not isinstance(module, _NEURONS):
        return None
    return Streamed(None, "mem") if hasattr(module, "mem") else "it carries no potential from call to call"
