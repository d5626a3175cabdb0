"""SpikingJelly: the nodes in `_KNOWN`, of version 2 and of the earlier versions 0.0.0.0.x.

    h = v + x                                   IFNode, SimpleIFNode, NonSpikingIFNode
    h = v - (v - v_reset) / tau + x             LIFNode, SimpleLIFNode
    h = v + (x - (v - v_reset)) / tau           the same with decay_input; NonSpikingLIFNode, where v_reset is 0
    1 / tau = sigmoid(w)                        ParametricLIFNode
    h = v_decay v + c;  c = c_decay c + x       CUBALIFNode, with the updated c

A spike at h >= v_threshold resets to v_reset or, if v_reset is None (0 in the equations), subtracts v_threshold.
ILIFNode is a LIFNode that emits round(clamp(h / v_threshold, 0, D)) spikes.

Recurrent containers feed the output y of their node back. The node's input is rc([x, y[t-1]]), where rc is a Linear, or
f(y[t-1], x), where f is a function of elements.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from ..checks import MOST_LEVELS
from ..neurons.lif import LIFOutput
from ..neurons.over_time import placement_advice
from .converted import (
    Conversion,
    Converted,
    Streamed,
    Streaming,
    bare_class,
    known_class_or_reason,
    replaced_method_reason,
)
from .identify import SpikeFunction, closure_values
from .recording import SPIKES, Recording
from .recurrent import Recurrent, feedback_reason

# SpikingJelly has `clock_driven` up to version 0.0.0.0.14, and `activation_based` from that version on.
_PACKAGES = [
    package
    for package in ("spikingjelly.activation_based", "spikingjelly.clock_driven")
    if importlib.util.find_spec(package) is not None
]


def _installed_classes(file: str, *names: str) -> tuple[Any, ...]:
    """The classes of these names that the installed version defines in `file`."""
    files = [importlib.import_module(f"{package}.{file}") for package in _PACKAGES]
    return tuple(getattr(each, name) for name in names for each in files if hasattr(each, name))


class ConvertedNode(Converted):
    """A node: a call takes all steps in step mode "m", one in "s". Stores `v` and `v_seq` as SpikingJelly does."""

    v: Any
    surrogate_function: Any
    _levels: int | None = None

    @property
    def time_dim(self) -> int | None:  # type: ignore[override]
        """0 in step mode "m"; None if a call takes one step."""
        return 0 if self.step_mode == "m" else None

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        precision = self.__dict__.get("_neuron_precision")
        return {
            "surrogate_function": self.surrogate_function,
            "precision": precision,
            "detach_reset": self.detach_reset,
        }

    def speed_advice(self) -> str | None:
        """Advice to use step mode "m", for a node in step mode "s"; otherwise None."""
        if self.step_mode != "s":
            return None
        whole = "spikingjelly.activation_based.functional.set_step_mode(model, 'm')"
        return f"step mode 's' gains little; {whole} computes whole sequences, which takes several times less time"

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """The spikes of a sequence `[T, ...]`."""
        output = self._run_lif(x_seq, whole=True)
        if output.v_seq is not None:
            self.v_seq = output.v_seq
        return output.s_seq

    def single_step_forward(self, x: Tensor) -> Tensor:
        """The spikes of one step."""
        if self.prefers_original_step():
            return super().single_step_forward(x)  # type: ignore[misc,no-any-return]
        output = self._run_lif(x.unsqueeze(0), whole=False)
        if hasattr(self, "_append_v_seq") and self.store_v_seq:  # only since version 2
            self._append_v_seq(output.v_last)
        return output.s_seq.squeeze(0)

    def _run_lif(self, x_seq: Tensor, whole: bool) -> LIFOutput:
        """The result of `lif` for `[T, ...]`, with all potentials if it is a `whole` sequence that stores them."""
        return self._charge_and_fire(
            self._charging_current(x_seq, whole), x_seq, whole and getattr(self, "store_v_seq", False)
        )

    def _charge_and_fire(self, current: Tensor, x_seq: Tensor, return_v_seq: bool) -> LIFOutput:
        """The result of `lif` for the current that charges the neurons. Stores the last potential in `v`."""
        output = self.lif(
            current,
            input_gain=_input_gain(self),
            levels=self._levels,
            return_v_seq=return_v_seq,
            **_node_options(self, x_seq),
        )
        self.v = output.v_last
        return output

    def carried_states(self) -> dict[str, Any]:
        """The states that the node keeps from step to step, by name."""
        return {name: getattr(self, name) for name in ("v", "c") if name in self._memories}

    def record_step(self, recording: Recording, x: Any) -> Any:
        """Records one step. Takes and returns what the node's forward takes and returns."""
        if self.step_mode == "m":
            return super().record_step(recording, x)
        results = recording.add_layer_step(self, x, states := self.carried_states())
        for name in states:
            setattr(self, name, results[name])
        if hasattr(self, "_append_v_seq") and self.store_v_seq:
            self._append_v_seq(results["v"])
        return results[SPIKES]

    def compute_steps(self, x_seq: Tensor, states: dict[str, Any], wanted: set[str]) -> tuple[Any, Any]:
        """Computes all steps from the stored states, see `Converted.compute_steps`."""
        current = self._charging_current(x_seq, True)
        output = self._charge_and_fire(current, x_seq, "v" in wanted)
        found = {SPIKES: output.s_seq, "v": output.v_seq, "c": current if "c" in states else None}
        return {name: each for name, each in found.items() if each is not None}, {}

    def _charging_current(self, x_seq: Tensor, whole: bool) -> Tensor:
        """The current that charges the neurons: here the input. Subclasses use `whole`: whether x_seq is a sequence."""
        return x_seq


class ConvertedCUBALIFNode(ConvertedNode):
    """A node that a leaky current, `c`, charges. Its potential leaks to 0, whatever v_reset is."""

    takes_input_directly = False
    c: Any

    def _charging_current(self, x_seq: Tensor, whole: bool) -> Tensor:
        """The synaptic current in each step; stores the last one in `c`."""
        c = _stored_state(self, self.c, x_seq, 0.0, None)
        if not whole:  # one step is cheaper without a call of the integrator
            self.c = self.c_decay * c + x_seq.squeeze(0)
            return self.c.unsqueeze(0)  # type: ignore[no-any-return]
        c_seq, self.c = self.integrate(x_seq, decay=self.c_decay, v_init=c)
        return c_seq


def _leak_per_step(node: Any) -> Tensor | float:
    """The fraction of the potential that leaks per step; 0 for nodes without a leak."""
    if isinstance(node, _PARAMETRIC):
        return node.w.sigmoid()  # type: ignore[no-any-return]
    return 1 / node.tau if isinstance(node, _LEAKY) else 0.0


def _node_options(node: Any, x_seq: Tensor) -> dict[str, Any]:
    """The options of `lif` that follow from the node's attributes and state, without `input_gain`."""
    v_reset = 0.0 if node.v_reset is None else node.v_reset
    v_rest = 0.0 if isinstance(node, _CUBA) else v_reset
    return {
        "decay": node.v_decay if isinstance(node, _CUBA) else 1 - _leak_per_step(node),
        "v_threshold": node.v_threshold,
        "v_reset": node.v_reset,
        "v_rest": v_rest,
        "v_init": _stored_state(node, node.v, x_seq, v_reset, v_rest),
        "detach_reset": node.detach_reset,
    }


def _input_gain(node: Any) -> Tensor | float:
    """The factor on the input, `input_gain` of `lif`."""
    if isinstance(node, _INTEGER):
        return 1.0
    # Up to SpikingJelly 0.0.0.0.8 leaky nodes have no decay_input, and always multiply the input by 1 / tau.
    return _leak_per_step(node) if isinstance(node, _LEAKY) and getattr(node, "decay_input", True) else 1.0


def _stored_state(node: Any, value: Any, x_seq: Tensor, at_start: float, at_rest: float | None) -> Any:
    """The node's state `value` (v, or the current c) as a tensor of the shape of a step, for the first state of a call.

    A number is expanded. A tensor of another shape is replaced by `at_start`, as in SpikingJelly; simple nodes and
    those of clock_driven keep it. Returns None for the number `at_rest`, with which the function starts by default,
    unless the input has an integer type, which the state then takes. With `at_rest=None` the result is a tensor.
    """
    is_integer, simple = not x_seq.is_floating_point(), isinstance(node, (ConvertedClockDrivenNode, *_SIMPLE))
    if isinstance(value, Tensor) and value.shape != x_seq.shape[1:] and not simple:
        value = at_start
    if not isinstance(value, Tensor):
        return None if value == at_rest and not is_integer else x_seq.new_full(x_seq.shape[1:], value)
    # Since version 2, SpikingJelly stores states in the input's dtype.
    return value.to(x_seq.dtype) if is_integer and not simple and hasattr(node, "materialize_states") else value


class ConvertedContainer(Recurrent):
    """A recurrent container of a node, or of a Linear and a node, which keep their parameters and states."""

    y: Any
    _feedback_factor: float | str  # see the function of this name

    time_dim = ConvertedNode.time_dim
    speed_advice = ConvertedNode.speed_advice

    def begin_conversion(self, *arguments: Any) -> None:
        """Stores the settings of a conversion and the factor of the feedback."""
        self._feedback_factor = _feedback_factor(self)
        super().begin_conversion(*arguments)

    def restore_original(self) -> None:
        """Restores the original layer."""
        del self._feedback_factor
        super().restore_original()

    def _neuron_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of neurons, including those of the node in the container."""
        return [*super()._neuron_parameters(), *_linear_and_node(self)[1].named_parameters(recurse=False)]

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        _, node = _linear_and_node(self)
        found = {"surrogate_function": None, "sub_module": self.sub_module, "node": type(node)}
        if not _is_neuron(node):  # a module without a surrogate has replaced the node
            return found
        found |= ConvertedNode.dependencies(node)
        found["store_v_seq"] = getattr(node, "store_v_seq", False)
        if isinstance(self, _WITH_WEIGHTS):  # the reason, which becomes the error, if rc can't be converted any more
            return {**found, "feedback": feedback_reason(self.rc)}
        return {**found, "element_wise_function": self.element_wise_function}

    def carried_states(self) -> dict[str, Any]:
        """The container's last output and the states of its node, by name."""
        node = _linear_and_node(self)[1]
        return {"y": self.y, **{name: getattr(node, name) for name in ("v", "c") if name in node._memories}}

    def set_state(self, name: str, value: Any) -> None:
        """Sets a state of the container or of its node."""
        setattr(self if name == "y" else _linear_and_node(self)[1], name, value)

    def record_step(self, recording: Recording, x: Any) -> Any:
        """Records one step. Takes and returns what the container's forward takes and returns."""
        if self.step_mode == "m":
            return super().record_step(recording, x)
        results = recording.add_layer_step(self, x, states := self.carried_states())
        for name in states:
            self.set_state(name, results[name])
        return results["y"]

    def compute_steps(self, x_seq: Tensor, states: dict[str, Any], wanted: set[str]) -> tuple[Any, Any]:
        """Computes all steps from the stored states, which the container and its node keep themselves.

        Returns the spikes of each step, but no states of the node.
        """
        if missing := wanted & {"v", "c"}:
            raise RuntimeError(
                f"asgl_cuda.convert: with sequences, only the spikes of a {bare_class(self).__name__} are known in "
                f"each step, not the {missing.pop()} of its node; between two steps the model's code must neither read "
                "it nor change a mode such as no_grad; use asgl_cuda.convert(model) without sequences"
            )
        return {"y": self.multi_step_forward(x_seq)}, {}

    def single_step_forward(self, x: Tensor) -> Tensor:
        """The spikes of one step."""
        if self.prefers_original_step():
            return super().single_step_forward(x)  # type: ignore[misc,no-any-return]
        return self.multi_step_forward(x.unsqueeze(0)).squeeze(0)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """The spikes of a sequence `[T, ...]`, each of which is fed back in the next step."""
        self.check_unchanged()  # before the parts of the container are used
        linear, node = _linear_and_node(self)
        if isinstance(self, _WITH_WEIGHTS):
            input_weight, weight = self.rc.weight.tensor_split([self.rc.out_features], 1)
            x_seq = nn.functional.linear(x_seq, input_weight, self.rc.bias)
            x_seq, weight = (x_seq, weight) if linear is None else (linear(x_seq), linear.weight @ weight)
        else:
            weight = x_seq.new_full(x_seq.shape[-1:] if x_seq.dim() > 1 else (1,), float(self._feedback_factor))
        options = _node_options(node, x_seq)
        if isinstance(node, _CUBA):
            options |= {"syn_decay": node.c_decay, "i_init": _stored_state(node, node.c, x_seq, 0.0, 0.0)}
        output = self.recurrent_lif(x_seq, weight, _input_gain(node), s_init=self.y, **options)
        node.v, self.y = output.v_last, output.s_seq[-1].clone()  # clone: detach_() refuses views
        if output.i_last is not None:
            node.c = output.i_last
        return output.s_seq


def _linear_and_node(container: Any) -> tuple[Any, Any]:
    """The Linear inside of a container, or None, and the node."""
    inside = container.sub_module
    pair = isinstance(container, _WITH_WEIGHTS) and type(inside) is nn.Sequential and len(inside) == 2
    return (inside[0], inside[1]) if pair and isinstance(inside[0], nn.Linear) else (None, inside)


def _feedback_factor(container: Any) -> float | str:
    """The number w if the node's input is x + w y, 1 for a container with a Linear; or why there is no such number."""
    if isinstance(container, _WITH_WEIGHTS):
        return feedback_reason(container.rc) or 1.0
    function = container.element_wise_function
    name = getattr(function, "__name__", type(function).__name__)
    reason = f"its spikes y return by {name}(y, x); only functions x + w y with a number w can be converted"
    held = any(isinstance(each, (Tensor, nn.Module)) for each in closure_values(function))
    if held or not isinstance(function, (FunctionType, BuiltinFunctionType)):
        return reason
    y, x = (torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in _PROBES)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            value = function(y, x)
            grad_y, grad_x = torch.autograd.grad(value.sum(), (y, x), materialize_grads=True)
    except Exception:  # functions of users may raise anything
        return reason
    expected = x + grad_y[0] * y, grad_y[:1].expand(y.shape), torch.ones_like(x)
    return float(grad_y[0]) if all(map(torch.allclose, (value, grad_y, grad_x), expected)) else reason


_PROBES = ((0.0, 1.0, 0.0, 1.0, 0.5, -3.0), (0.0, 0.0, 1.5, -2.5, 40.0, 0.125))  # values of y and of x


class ConvertedILIFNode(ConvertedNode):
    """A node that emits several spikes per step, as one integer."""

    multi_spike = True

    @property
    def _levels(self) -> int:  # type: ignore[override]
        """The most spikes per step."""
        return int(getattr(self.surrogate_function, "max_spike_count", 0))  # for 0, `lif` raises

    def _charge_and_fire(self, current: Tensor, x_seq: Tensor, return_v_seq: bool) -> LIFOutput:
        """The result of the base class, with spikes in the dtype of the input."""
        output = super()._charge_and_fire(current, x_seq, return_v_seq)
        return output._replace(s_seq=output.s_seq.to(x_seq.dtype))  # integer inputs give integer spikes

    def description(self) -> str:
        """The computation of the layer, in words."""
        return f"{self._levels} levels"


class ConvertedClockDrivenNode(ConvertedNode):
    """A node of `clock_driven`. By its class, a call takes a step, or a sequence whose potentials it stores."""

    store_v_seq = True

    @property
    def step_mode(self) -> str:
        """The step mode as newer versions have it: "m" for sequences, "s" for single steps."""
        return "m" if isinstance(self, _MULTI_STEP) else "s"

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        return {**super().dependencies(), "Lava": self.__dict__.get("backend") == "lava"}

    def speed_advice(self) -> str | None:
        """Advice to use the MultiStep class, for a node that takes single steps; otherwise None."""
        if self.step_mode == "m":
            return None
        return "one step per call gains little; MultiStep nodes compute whole sequences, several times faster"

    def record_step(self, recording: Recording, x: Any) -> Any:
        """Records one step, and stores its spikes if this version of SpikingJelly does."""
        spikes = super().record_step(recording, x)
        if "spike" in self._memories:
            self.spike = spikes
        return spikes

    def forward(self, x: Tensor) -> Tensor:
        """The spikes of a step or a sequence. Stores them if this version of SpikingJelly does."""
        whole = self.step_mode == "m"
        if not whole and self.prefers_original_step():
            return super().forward(x)  # type: ignore[no-any-return]
        spikes = self.multi_step_forward(x) if whole else self.single_step_forward(x)
        if "spike" in self._memories:  # only up to 0.0.0.0.8
            self.spike = spikes[-1] if whole else spikes
            if whole:
                self.spike_seq = spikes
        return spikes


class ConvertedNonSpikingNode(Converted):
    """A node that does not fire. A call takes all steps, starts at 0, and decodes potentials as SpikingJelly does."""

    takes_input_directly = False
    time_dim = 0

    def dependencies(self) -> dict[str, Any]:
        """Values that must not change after the conversion, see `Converted.dependencies`."""
        return {"function": None}

    def forward(self, x_seq: Tensor) -> Any:
        """The potentials of a sequence `[T, ...]`, decoded."""
        leak, gain = (1 / self.tau, 1 / self.tau) if isinstance(self, _READ_OUTS) else (0.0, 1.0)
        v_seq, self.v = self.integrate(x_seq, decay=1 - leak, input_gain=gain)
        if self.decode == "max-mem":
            return v_seq.max(0).values
        if self.decode == "max-abs-mem":
            high, low = v_seq.max(0).values, v_seq.min(0).values
            return torch.where(high.abs() > low.abs(), high, low)
        if self.decode == "mean-mem":
            return v_seq.mean(0)
        return v_seq[-1] if self.decode == "last_mem" else list(v_seq)


# Equivalents of torch.nn's normalisations. In step mode "m" their input has separate dimensions for time and batch.
# ThresholdDependentBatchNorm differs from BatchNorm only in the initial weight. Before version 2 it has a forward of
# its own, which merges time and batch twice, and is left out.
_OF_THRESHOLD = tuple(f"ThresholdDependentBatchNorm{dims}d" for dims in (1, 2, 3))
NORMALISATIONS = (
    *_installed_classes("layer", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
    *(found for found in _installed_classes("layer", *_OF_THRESHOLD) if "forward" not in vars(found)),
)

# Equivalents of torch.nn's layers in evaluation. In training, SpikingJelly's dropout keeps its mask over time. In step
# mode "m" the input has separate dimensions for time and batch.
PLAIN = {
    found: getattr(nn, found.__name__)
    for found in _installed_classes(
        "layer", "Linear", "Conv1d", "Conv2d", "AvgPool2d", "Flatten", "Dropout", "Dropout2d"
    )
}

_SIMPLE = _installed_classes("neuron", "SimpleIFNode", "SimpleLIFNode")
_CUBA, _PARAMETRIC = _installed_classes("neuron", "CUBALIFNode"), _installed_classes("neuron", "ParametricLIFNode")
_READ_OUTS = _installed_classes("neuron", "NonSpikingLIFNode")
_NON_SPIKING = (*_installed_classes("neuron", "NonSpikingIFNode"), *_READ_OUTS)
_INTEGER = _installed_classes("neuron", "ILIFNode")
_LEAKY = _installed_classes("neuron", "LIFNode", "SimpleLIFNode", "ParametricLIFNode")
_MULTI_STEP = _installed_classes("neuron", "MultiStepIFNode", "MultiStepLIFNode", "MultiStepParametricLIFNode")
_KNOWN = (*_installed_classes("neuron", "IFNode"), *_INTEGER, *_LEAKY, *_MULTI_STEP, *_SIMPLE, *_CUBA, *_NON_SPIKING)
_WITH_STEP_MODE = _installed_classes("base", "StepModule")
_WITH_WEIGHTS = _installed_classes("layer", "LinearRecurrentContainer")
_FEEDING = tuple(
    found
    for found in (*_WITH_WEIGHTS, *_installed_classes("layer", "ElementWiseRecurrentContainer"))
    if issubclass(found, _WITH_STEP_MODE)
)
_MIXING = _installed_classes("neuron", "PSN", "MaskedPSN", "SlidingPSN", "ILCBaseNode")

_MEMORY, _OF_SEQUENCES = _installed_classes("base", "MemoryModule"), _installed_classes("base", "MultiStepModule")
_CELLS = _installed_classes("rnn", "SpikingRNNCellBase")
_RECURRENT = (*_installed_classes("rnn", "SpikingRNNBase"), *_CELLS)
_DROPOUTS = _installed_classes("layer", "Dropout", "Dropout2d", "DropConnectLinear")  # these carry a mask, not a state

_JOINING, _IN_STEPS = (
    _installed_classes("layer", "SeqToANNContainer"),
    _installed_classes("layer", "MultiStepContainer"),
)
_CONTAINERS = dict.fromkeys((*_JOINING, *_IN_STEPS), 0)  # time_dim by class
_CONTAINERS |= dict.fromkeys(_installed_classes("layer", "TLastSeqToANNContainer", "TLastMultiStepContainer"), -1)
_STATEFUL = "it is not a neuron that convert knows, but carries a state"


def _is_neuron(layer: nn.Module) -> bool:
    """Whether the layer is a neuron of SpikingJelly, or a user's that is derived or copied from one."""
    files = tuple(f"{package}.neuron" for package in _PACKAGES)
    in_file = any(base.__module__.startswith(files) for base in type(layer).__mro__)
    return in_file or hasattr(layer, "neuronal_charge")


def conversion_of(layer: nn.Module) -> Conversion:
    """How to convert a layer of SpikingJelly, see `Conversion`."""
    kind = known_class_or_reason(layer, (*_KNOWN, *_FEEDING), _MIXING)
    if isinstance(kind, str):
        carries = isinstance(layer, _MEMORY) and layer._memories and not isinstance(layer, _DROPOUTS)
        return kind if _is_neuron(layer) else _STATEFUL if carries or isinstance(layer, _RECURRENT) else None
    if kind in _NON_SPIKING:
        return ConvertedNonSpikingNode, None
    if kind in _FEEDING:
        return _container_conversion(layer)
    node: Any = layer
    if not getattr(node.surrogate_function, "spiking", True):
        return "its surrogate function does not spike (spiking=False)"
    if getattr(node, "_neuron_precision", None) is not None:
        return "it has a precision of its own"
    if getattr(node, "backend", None) == "lava":
        return 'it is computed by Lava (backend="lava")'
    if isinstance(node.v_reset, Tensor):
        return "its v_reset is a tensor; a number or None can be converted"
    if kind in _INTEGER:
        return _integer_node_conversion(node.surrogate_function)
    if not isinstance(layer, _WITH_STEP_MODE):
        return ConvertedClockDrivenNode, node.surrogate_function
    return ConvertedCUBALIFNode if kind in _CUBA else ConvertedNode, node.surrogate_function


def _container_conversion(container: Any) -> Conversion:
    """How to convert a recurrent container, see `Conversion`."""
    if isinstance(factor := _feedback_factor(container), str):
        return factor
    linear, node = _linear_and_node(container)
    if linear is not None and (reason := feedback_reason(linear)):
        return reason
    found, name = conversion_of(node), type(node).__name__
    if isinstance(found, tuple):
        found = replaced_method_reason(node) or found
    if not isinstance(found, tuple) or found[0] not in (ConvertedNode, ConvertedCUBALIFNode):
        why = f": {found}" if isinstance(found, str) else " is not a neuron that convert supports in a container"
        return f"its {name}{why}"
    if getattr(node, "store_v_seq", False):
        return f"its {name} stores its potentials (store_v_seq)"
    return ConvertedContainer, found[1]


def _integer_node_conversion(function: Any) -> Conversion:
    """How to convert an ILIFNode with this surrogate, a MultiLevelSpikeCount; see `Conversion`."""
    levels, *window = function.max_spike_count, function.grad_min, function.grad_max
    if levels > MOST_LEVELS:
        return f"it counts up to {levels} spikes, more than {MOST_LEVELS}, the most that asgl_cuda supports"
    if window != [0, levels]:
        return f"its gradient's window is {window}, not [0, {levels}] (grad_window)"
    return ConvertedILIFNode, SpikeFunction("rectangle", 1.0, 1.0, False)


def reset(module: Any) -> None:
    """Resets the states of a module of SpikingJelly."""
    if isinstance(module, _MEMORY):
        module.reset()


def detach(module: Any) -> None:
    """Detaches the states of a module of SpikingJelly."""
    if isinstance(module, _MEMORY):  # unlike functional.detach_net, also views and lists
        module._memories.update(tree_map_only(Tensor, torch.detach, module._memories))
        if isinstance(v_seq := getattr(module, "v_seq", None), Tensor):
            module.v_seq = v_seq.detach()


def _is_refused_by_over_time(module: nn.Module) -> bool:
    """Whether `OverTime` refuses the module, because it takes time or carries states itself."""
    if isinstance(module, _RECURRENT):
        return True
    if isinstance(module, _OF_SEQUENCES):
        return not isinstance(module, (_BatchNorm, *_CONTAINERS))
    return hasattr(module, "neuronal_charge") or (isinstance(module, _MEMORY) and not isinstance(module, _DROPOUTS))


def _step_mode_of(module: Any) -> str:
    """The step mode of a module: its attribute or, for modules of `clock_driven`, by its class name."""
    in_name = any(each.__name__.startswith("MultiStep") for each in type(module).__mro__)
    return str(getattr(module, "step_mode", "m" if in_name else "s"))


def placement_outside_over_time(module: nn.Module) -> str | None:
    """How to use a module that `OverTime` refuses, see `imported_adapters`; None for other modules."""
    if not _is_refused_by_over_time(module):
        return None
    name = bare_class(module).__name__
    if isinstance(module, _CELLS):
        return "and call it as SpikingJelly does"
    if isinstance(module, (*_OF_SEQUENCES, *_RECURRENT)) or _step_mode_of(module) == "m":
        return placement_advice(f"{name}(...)")
    layer = f"{name}(..., step_mode='m')" if hasattr(module, "step_mode") else f"MultiStepContainer({name}(...))"
    return placement_advice(layer, in_place=True)


def streaming_of(module: nn.Module) -> Streaming:
    """How a module takes a sequence one time step per call, see `Streaming`."""
    if type(module) in _CONTAINERS:
        return Streamed(_CONTAINERS[type(module)], None)
    if not _is_refused_by_over_time(module):
        return None
    memories = getattr(module, "_memories", {})
    step_mode = _step_mode_of(module)
    if "v" in memories or (memories and (step_mode == "s" or not _is_neuron(module))):
        return Streamed(0 if step_mode == "m" else None, "v" if "v" in memories else None)
    return "it carries no potential from call to call"
