"""`to_nir`: a module as a graph of NIR."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ...adaptive import AdaptiveLIF
from ...checks import FLOATING_TYPES, check_bool, check_dense
from ...integrator import LeakyIntegrator
from ...layer import NeuronLayer, check_module
from ...layout import real_type
from ...neuron import LIF, BatchNormLIF
from ...reference import normalisation
from ..convert import LIBRARIES, copied, libraries
from ..converted import Converted, bare_class
from ..fuse import Fused
from .neurons import DT, Delay, Neurons, Scale, add_metadata, new_lif, per_neuron, read_neurons, spike_height
from .nodes import KEY
from .values import INSTALL, as_array, as_double, as_pair, as_shape, check_dt, first_line, installed, range_of, require

if TYPE_CHECKING:
    import nir

_CALLER = "asgl_cuda.to_nir"
_EXPORTED = (
    "asgl_cuda.LIF, BatchNormLIF and LeakyIntegrator, converted neurons, Linear, Conv1d, Conv2d, AvgPool2d, Flatten, "
    "BatchNorm, Dropout, Identity"
)
_SILENT = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip  # in evaluation
_WITH_WEIGHTS = ("Affine", "Linear", "Conv1d", "Conv2d")
_ADDITIONS = (operator.add, torch.add, "add")


def to_nir(model: nn.Module, example_input: Tensor, dt: float = DT, *, allow_soft_reset: bool = False) -> nir.NIRGraph:
    """The model in evaluation mode as a graph of NIR.

    Args:
        model: layers of asgl_cuda.LIF and LeakyIntegrator, Linear, Conv1d, Conv2d, AvgPool2d (with
            `divisor_override=1`: SumPool2d), Flatten and BatchNorm, in sequence or connected by additions, in any
            modules that torch.fx can trace. A layer without time may be surrounded by `x_seq.flatten(0, 1)` and
            `unflatten(0, ...)`, as in `asgl_cuda.OverTime`, or be SpikingJelly's in step mode "m". Dropout and Identity
            are dropped. Results of `from_nir` can be written. Neurons of other libraries must be converted, get a
            sequence and have no synaptic current; `from_nir` makes asgl_cuda.LIF layers of these neurons.
        example_input: `[T, B, ...]`, or `[B, T, ...]` if the LIF layers have `time_dim=1`; only shape and dtype matter.
            The model and its carried potentials stay unchanged.
        dt: length of a step, in seconds.
        allow_soft_reset: also write layers with soft reset, with several spikes per step and with v_min. NIR's LIF
            resets to v_reset; only `from_nir` reads the layer's own reset from the metadata.

    A normalisation, also in asgl_cuda.BatchNormLIF and in pairs joined by `asgl_cuda.fuse`, is folded with its running
    statistics into weight and bias of the preceding Linear or convolution. Without such a layer, or if its output has
    other users, the normalisation becomes a separate Affine or convolution, with weights of 0 between channels.

    A LeakyIntegrator becomes an LI, or an I without leak, with `delay` in front of a Delay; in front of a LIF, as the
    current of a CubaLIF, it stays a separate node.

    NIR's neuron fires at v > v_threshold, asgl_cuda.LIF at v >= v_threshold, as recorded in the metadata: a difference
    only for potentials equal to the threshold. `scale_output` becomes a Scale node, half precision float32.

    Raises:
        ImportError: nir or nirtorch is not installed.
        TypeError: an argument is of another type.
        ValueError: the model can't be traced or has a layer that NIR can't represent; the message names it.
    """
    nirtorch = require("nirtorch.torch_tracer", _CALLER)
    dt = check_dt(dt, _CALLER)
    check_module(model, _CALLER)
    if not isinstance(example_input, Tensor):
        raise TypeError(f"{_CALLER}: example_input must be a tensor, got {type(example_input).__name__}")
    check_bool("allow_soft_reset", allow_soft_reset, _CALLER)
    check_dense("example_input", example_input, _CALLER)
    if example_input.dtype not in FLOATING_TYPES:
        raise TypeError(
            f"{_CALLER}: example_input must be float16, bfloat16, float32 or float64, got {example_input.dtype}"
        )
    if example_input.dim() < 3 or not example_input.numel():
        raise ValueError(
            f"{_CALLER}: example_input must have time, batch and neurons, [T, B, ...], "
            f"got shape {list(example_input.shape)}"
        )
    try:
        model = copied(model).eval()
    except Exception as error:  # raised by a layer's own __deepcopy__
        raise ValueError(f"{_CALLER}: {type(model).__name__} can't be copied: {first_line(error)}") from error
    for module in model.modules():
        if isinstance(module, NeuronLayer):
            module.reset()
        if isinstance(module, Fused):
            module.end()
    tracer = _tracer(nirtorch.NIRTorchTracer)
    if tracer.is_leaf_module(model, ""):
        model = nn.Sequential(model)  # a root is always traced
    try:
        traced = fx.GraphModule(model, tracer.trace(model))
    except _NotTraced as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # user code may raise anything, given fx's proxies
        raise ValueError(f"{_CALLER}: {type(model).__name__} can't be traced: {first_line(error)}") from error
    export = _Export(traced, dt, allow_soft_reset)
    export.extra_traceback = False  # fx would add the whole graph to every message
    with torch.no_grad():
        export.run(example_input)
    return export.finished()


def _name_of_function(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


class _NotTraced(ValueError):  # noqa: N818
    """Names an untraceable module."""


def _tracer(base: Any) -> Any:
    """A tracer whose leaves are the layers of asgl_cuda and of the libraries."""

    class Tracer(base):  # type: ignore[misc]
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return super().is_leaf_module(m, module_qualified_name) or _is_layer(m)

        def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            try:
                return super().call_module(m, forward, args, kwargs)
            except _NotTraced:
                raise
            except Exception as error:  # user code
                where = f"{_CALLER}: {self.path_of_module(m)} ({_name_of(m)})"
                raise _NotTraced(f"{where} can't be traced: {first_line(error)}") from error

    return Tracer((LIF, LeakyIntegrator, Scale, Delay, Converted))


def _is_layer(module: nn.Module) -> bool:
    """Whether the module is a library's layer, not a container, or a normalisation."""
    own = _library_of(type(module)) is not None and not module._modules
    return own or _kind(module) is _BatchNorm or _found(module) is not None


def _place(n: fx.Node) -> str:
    """A function in the traced model, and the module that calls it."""
    module = next(reversed(n.meta.get("nn_module_stack") or {"": None})) or "the model itself"
    return f"{_name_of_function(n)} in {module}"


def _library_of(kind: type[nn.Module]) -> str | None:
    name = kind.__module__.split(".")[0]
    return name if name in LIBRARIES else None


def _name_of(module: nn.Module) -> str:
    """The class of a module for errors: the library's, for a converted or fused module."""
    kind = bare_class(module)
    library = _library_of(kind)
    return kind.__name__ if library is None else f"{kind.__name__} of {library}"


class _Flow(NamedTuple):
    """A tensor of the traced model, in the NIR graph."""

    sources: tuple[str, ...]  # the nodes to be summed
    shape: tuple[int, ...]  # the shape of the neurons
    leading: int  # dimensions in front: 2 for time and batch, 1 for both in one
    dtype: torch.dtype


class _ByChannel(NamedTuple):
    """`gain x + shift` for each channel, float64: a placeholder until `finished`."""

    gain: Tensor
    shift: Tensor
    flow: _Flow
    where: str


class _Export(fx.Interpreter):
    """Runs the traced model and writes a node of NIR for each layer."""

    def __init__(self, traced: fx.GraphModule, dt: float, allow_soft_reset: bool) -> None:
        super().__init__(traced)
        self.nir = require("nir", _CALLER)
        self.names = {node.name for node in traced.graph.nodes}
        self.dt = dt
        self.allow_soft_reset = allow_soft_reset
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.flows: dict[fx.Node, _Flow] = {}
        self.time_and_batch = torch.Size()  # the leading sizes of the input
        self.time_dim: int | None = None  # of the preceding LIF layers
        self.computed: dict[str, Any] = {}  # the options of `lif` in the last call of a converted layer
        self.scale: Tensor | None = None  # the factor on the spikes of the current layer
        self.layers: dict[type[nn.Module], Callable[[Any, _Flow, str], Any]] = {
            LIF: self._lif,
            BatchNormLIF: self._lif,
            LeakyIntegrator: self._integrator,
            Scale: self._scale,
            Delay: self._delay,
            Converted: self._converted,
            nn.Linear: self._linear,
            nn.Conv1d: self._conv,
            nn.Conv2d: self._conv,
            nn.AvgPool2d: self._pool,
            nn.Flatten: self._flatten,
            _BatchNorm: self._batch_norm,
        }

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            return self._run_module(n)
        try:
            value = super().run_node(n)
        except Exception as error:  # any error of a torch operation
            raise ValueError(f"{_CALLER}: {_place(n)} can't be run: {first_line(error)}") from error
        if n.op == "output":
            self._output(n)
        elif isinstance(value, Tensor):
            self.flows[n] = self._flow(n, value)
        return value  # sizes etc. are not part of the graph

    def _run_module(self, n: fx.Node) -> Any:
        """Runs a layer and writes its node, if possible before: the layer's own errors don't mention NIR."""
        module: Any = self.module.get_submodule(str(n.target))
        where = f"{_CALLER}: {n.target} ({_name_of(module)})"
        self._check_module(module, where)
        inputs = [self.flows[source] for source in n.all_input_nodes if source in self.flows]
        if len(inputs) != 1 or len(n.args) + len(n.kwargs) != 1:
            raise ValueError(f"{where}: must be called with the output of a layer, or of several in an addition, alone")
        flow, kind, silent = inputs[0], _kind(module), _kind(module) in _SILENT
        flow = _without_time(module, flow, where)
        norm = _norm_of(module)
        if norm is not None:
            self._check_place(flow, module.time_dim, where)
            by_channel = _by_channel(norm, flow, where, getattr(module, "input_scale", 1.0))
            flow = flow._replace(sources=(self._add(self._free(f"{n.name}_norm"), by_channel, flow),))
        self.scale = node = None
        if isinstance(module, Converted):
            vars(module)["compute"] = partial(self._compute, module)
        elif not silent:
            node = self.layers[kind](module, flow, where)
        try:
            value = super().run_node(n)
        except Exception as error:  # any error of the layer itself
            raise ValueError(
                f"{where} can't be run with an input of shape {list(self.env[n.all_input_nodes[0]].shape)}: "
                f"{first_line(error)}"
            ) from error
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: must return one tensor, got {type(value).__name__}")
        if not silent:
            node = self._converted(module, flow, where) if node is None else node
            after = flow._replace(shape=tuple(value.shape[inputs[0].leading :]), dtype=value.dtype)
            flow = after._replace(sources=(self._add(n.name, node, flow, after),))
        if isinstance(module, LeakyIntegrator) and module.delay:
            node = self._delay_of(torch.ones(flow.shape))
            flow = flow._replace(sources=(self._add(self._free(f"{n.name}_delay"), node, flow),))
        if self.scale is not None:
            scale = self.nir.Scale(as_array(self.scale.to(real_type(flow.dtype))))
            flow = flow._replace(sources=(self._add(self._free(f"{n.name}_scale"), scale, flow),))
        self.flows[n] = flow._replace(leading=inputs[0].leading)
        return value

    def _check_module(self, module: nn.Module, where: str) -> None:
        steps = ", in step mode 'm'" if getattr(module, "step_mode", "m") == "s" else ""
        found = None if isinstance(module, Converted) else _found(module)
        kind: Any = found[0] if isinstance(found, tuple) else type(module)
        if issubclass(kind, AdaptiveLIF) or (issubclass(kind, Converted) and kind.adapts):
            raise ValueError(f"{where} can't be represented in NIR, which has no node for neurons that adapt")
        if isinstance(module, Converted) and module.time_dim is None:
            raise ValueError(f"{where}: must take time and batch apart, [T, B, ...], got one step a call{steps}")
        if isinstance(module, Converted) and not module.takes_input:
            raise ValueError(f"{where}: must be a neuron that its input alone drives, got a current or no spikes")
        if _kind(module) not in self.layers and _kind(module) not in _SILENT:
            hint = f"what can be: {_EXPORTED}"
            if isinstance(module, LazyModuleMixin):
                hint = "it knows its shapes after a first call of the model"
            elif isinstance(found, str):
                hint = f"asgl_cuda.convert leaves it: {found}"
            elif found is not None:
                hint = f"it must be converted first, by asgl_cuda.convert{steps}"
            raise ValueError(f"{where} can't be represented in NIR; {hint}")
        for owner in filter(None, (module, _norm_of(module))):
            for name, value in (*owner.named_parameters(), *owner.named_buffers()):
                if value.is_meta or value.is_complex() or not value.isfinite().all():
                    got = "no values" if value.is_meta else value.dtype if value.is_complex() else "nan or infinity"
                    raise ValueError(f"{where}: {name} must have finite real values, got {got}")

    def _flow(self, n: fx.Node, value: Tensor) -> _Flow:
        if n.op == "placeholder":
            flow = _Flow((n.name,), tuple(value.shape[2:]), 2, value.dtype)
            self.time_and_batch = value.shape[:2]
            self.nodes[n.name] = self.nir.Input(input_type={"input": as_shape(flow.shape)})
            return flow
        inputs = [self.flows[source] for source in n.all_input_nodes if source in self.flows]
        name = _name_of_function(n)
        sizes, leading = (*n.args[1:], *n.kwargs.values()), inputs[0].leading if inputs else 0
        if n.target in _ADDITIONS and inputs and len(inputs) == len(n.args) and not n.kwargs:
            sources = tuple(source for flow in inputs for source in flow.sources)
            # NIR has no duplicate edges and no broadcasting.
            if len(set(sources)) == len(sources) and all(flow[1:] == inputs[0][1:] for flow in inputs):
                return inputs[0]._replace(sources=sources)
        elif name == "flatten" and leading == 2 and sizes == (0, 1):
            return inputs[0]._replace(leading=1)
        elif name == "unflatten" and leading == 1 and sizes[:1] == (0,) and value.shape[:2] == self.time_and_batch:
            return inputs[0]._replace(leading=2)
        raise ValueError(
            f"{_CALLER}: {_place(n)} can't be represented in NIR; between layers, what can be: additions "
            f"of different layers' outputs, flatten(0, 1) and unflatten(0, ...) of time and batch"
        )

    def _add(self, name: str, node: Any, flow: _Flow, after: _Flow | None = None) -> str:
        """Adds a node behind the flow's sources; `after`: the output's flow."""
        if not isinstance(node, _ByChannel):
            # nir infers wrong types for grouped convolutions and non-square kernels, none for pooling.
            node.input_type = {"input": as_shape(flow.shape)}
            node.output_type = {"output": as_shape((after or flow).shape)}
        self.nodes[name] = node
        self.edges.extend((source, name) for source in flow.sources)
        return name

    def _free(self, name: str) -> str:
        """The name, with `_` appended until unused."""
        while name in self.names or name in self.nodes:
            name += "_"
        return name

    def finished(self) -> Any:
        """The graph, with normalisations folded into preceding weights or as separate layers."""
        self._drop_unused()
        for name, node in list(self.nodes.items()):
            if isinstance(node, _ByChannel) and not self._fold(name, node):
                self.nodes[name] = self._layer_of(node)
        try:
            return self.nir.NIRGraph(self.nodes, self.edges)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{_CALLER}: {installed()} does not take the graph: {first_line(error)}") from error

    def _drop_unused(self) -> None:
        """Drops nodes without a path to the output: nir would add an Output to each such node."""
        used = {name for name, node in self.nodes.items() if isinstance(node, self.nir.Output)}
        for source, target in reversed(self.edges):  # edges are in the order of execution
            if target in used:
                used.add(source)
        self.nodes = {name: node for name, node in self.nodes.items() if name in used}
        self.edges = [edge for edge in self.edges if edge[1] in used]

    def _fold(self, name: str, by_channel: _ByChannel) -> bool:
        """Folds a normalisation into the preceding weights, unless their output has other users."""
        sources = [source for source, target in self.edges if target == name]
        before = self.nodes[sources[0]]
        takers = [target for source, target in self.edges if source in sources]
        if len(sources) != 1 or takers != [name] or type(before).__name__ not in _WITH_WEIGHTS:
            return False
        gain, shift = by_channel.gain, by_channel.shift
        weight, bias = as_double(before.weight), getattr(before, "bias", None)
        real = real_type(by_channel.flow.dtype)
        weight = weight * gain.reshape(-1, *[1] * (weight.dim() - 1))
        bias = shift if bias is None else as_double(bias) * gain + shift
        folded = self.nir.Affine(as_array(weight.to(real)), as_array(bias.to(real)))
        if type(before).__name__.startswith("Conv"):
            before.weight, before.bias = folded.weight, folded.bias
        else:
            folded.input_type, folded.output_type = before.input_type, before.output_type
            self.nodes[sources[0]] = folded
        del self.nodes[name]
        edges = [edge for edge in self.edges if edge[1] != name]
        self.edges = [(sources[0] if source == name else source, target) for source, target in edges]
        return True

    def _layer_of(self, by_channel: _ByChannel) -> Any:
        """An Affine, or a convolution of one pixel, not grouped because few readers support groups."""
        gain, shift, flow, where = by_channel
        sizes = flow.shape[1:]
        if len(sizes) > 2:
            raise ValueError(f"{where}: NIR has no convolution for neurons of shape {list(flow.shape)}")
        weight, bias = (as_array(value.to(real_type(flow.dtype))) for value in (gain.diag(), shift))
        if not sizes:
            node = self.nir.Affine(weight, bias)
        elif len(sizes) == 1:
            node = self.nir.Conv1d(sizes[0], weight[:, :, None], 1, 0, 1, 1, bias)
        else:
            node = self.nir.Conv2d(tuple(sizes), weight[:, :, None, None], (1, 1), (0, 0), (1, 1), 1, bias)
        node.input_type, node.output_type = {"input": as_shape(flow.shape)}, {"output": as_shape(flow.shape)}
        return node

    def _output(self, n: fx.Node) -> None:
        flow = self.flows.get(n.args[0]) if isinstance(n.args[0], fx.Node) else None
        if flow is None or flow.leading != 2:
            raise ValueError(f"{_CALLER}: the model must return one tensor [T, B, ...], got {n.args[0]}")
        self._add(n.name, self.nir.Output(output_type={"output": as_shape(flow.shape)}), flow)

    def _lif(self, layer: LIF, flow: _Flow, where: str) -> Any:
        self._check_layer(layer, flow, where)
        self._check_reset(layer.v_reset is None, layer.v_min is not None, where)
        if not layer.input_gain > 0:
            raise ValueError(f"{where}: input_gain must be > 0, got {layer.input_gain}")
        decay, v_threshold = (per_neuron(layer, value, flow.shape) for value in (layer.decay, layer.v_threshold))
        v_reset = 0.0 if layer.v_reset is None else layer.v_reset - layer.v_rest
        gain, reset = (torch.full_like(decay, value) for value in (layer.input_gain, v_reset))
        self.scale = per_neuron(layer, spike_height(layer), flow.shape).clone() if layer.scale_output else None
        neurons = Neurons(decay, v_threshold - layer.v_rest, reset)
        return add_metadata(self._neurons(neurons, gain, torch.zeros_like(decay), flow, where), layer, self.dt)

    def _neurons(self, neurons: Neurons, gain: Tensor, v_leak: Tensor, flow: _Flow, where: str) -> Any:
        """An IF or LIF node with the given parameters."""
        decay, v_threshold, v_reset = neurons
        _check_decay(decay, where)
        fields = {"v_threshold": v_threshold, "v_reset": v_reset}
        if "v_reset" not in self.nir.LIF.__dataclass_fields__:
            if v_reset.any():
                raise ValueError(
                    f"{where}: v_reset {range_of(v_reset)} needs a newer nir, got one whose LIF resets to 0, "
                    f"{installed()}: {INSTALL}"
                )
            del fields["v_reset"]
        return self._node(self.nir.IF, self.nir.LIF, decay, gain, v_leak, flow, **fields)

    def _node(
        self, integrates: Any, leaks: Any, decay: Tensor, gain: Tensor, v_leak: Tensor, flow: _Flow, **fields: Tensor
    ) -> Any:
        if (decay == 1).all():
            kind, fields["r"] = integrates, gain / self.dt
        else:
            kind, steps = leaks, 1 / (1 - decay)
            fields |= {"r": gain * steps, "tau": self.dt * steps, "v_leak": v_leak}
        return kind(**{name: as_array(value.to(real_type(flow.dtype))) for name, value in fields.items()})

    def _integrator(self, layer: LeakyIntegrator, flow: _Flow, where: str) -> Any:
        self._check_layer(layer, flow, where)
        decay = per_neuron(layer, layer.decay, flow.shape)
        _check_decay(decay, where)
        if layer.v_rest and (layer.delay or (decay == 1).all()):
            raise ValueError(f"{where}: v_rest with delay, or where nothing leaks, can't be represented in NIR")
        if layer.stateful and layer.delay:
            raise ValueError(f"{where}: delay with stateful=True can't be represented in NIR")
        gain, v_leak = (torch.full_like(decay, value) for value in (layer.input_gain, layer.v_rest))
        return add_metadata(self._node(self.nir.I, self.nir.LI, decay, gain, v_leak, flow), layer, self.dt)

    def _compute(self, layer: Converted, x_seq: Tensor, **options: Any) -> Any:
        self.computed = options
        return type(layer).compute(layer, x_seq, **options)

    def _converted(self, layer: Converted, flow: _Flow, where: str) -> Any:
        """The node of the layer's last `lif` call: `h = v_rest + decay (v - v_rest) + input_gain x + input_bias`."""
        assert layer.time_dim is not None

        def of(name: str, default: float | Tensor = 0.0) -> Tensor:
            value = as_double(self.computed.get(name, default))
            return value.reshape(value.shape[-len(flow.shape) :]).expand(flow.shape)

        soft = self.computed["v_reset"] is None
        self._check_place(flow, layer.time_dim, where)
        self._check_reset(soft, False, where)
        if layer.multi_spike or any(self.computed.get(name) is not None for name in ("v_min", "levels")):
            raise ValueError(f"{where}: several spikes a step and a least potential can't be represented in NIR")
        decay, v_threshold = of("decay"), of("v_threshold")
        if soft and self.computed.get("reset_amount") is not None and not torch.equal(of("reset_amount"), v_threshold):
            raise ValueError(f"{where}: its reset must take v_threshold off, got {range_of(of('reset_amount'))}")
        self.scale = v_threshold.clone() if self.computed.get("scale_output") else None
        v_leak = of("v_rest") + (of("input_bias") / (1 - decay)).nan_to_num(0.0)
        v_reset = torch.zeros_like(decay) if soft else of("v_reset")
        neurons = Neurons(decay, v_threshold, v_reset)
        node = self._neurons(neurons, of("input_gain", 1.0), v_leak, flow, where)
        if not soft:
            return node
        same = new_lif(read_neurons(node, self.dt, where), where)
        same.v_reset = None
        return add_metadata(node, same, self.dt)

    def _check_layer(self, layer: LIF | LeakyIntegrator, flow: _Flow, where: str) -> None:
        self._check_place(flow, layer.time_dim, where)
        if len(layer.num_features) > len(flow.shape):
            raise ValueError(
                f"{where}: num_features {list(layer.num_features)} must be the shape of neurons, {list(flow.shape)}"
            )

    def _check_place(self, flow: _Flow, time_dim: int, where: str) -> None:
        if flow.leading != 2:
            raise ValueError(f"{where}: time and batch must be apart, got them in one by flatten(0, 1)")
        found = time_dim % (flow.leading + len(flow.shape))
        if found > 1:
            raise ValueError(f"{where}: time must be the first or second dimension, got time_dim {time_dim}")
        if self.time_dim not in (None, found):
            raise ValueError(f"{where}: time must be where the layers before have it, got time_dim {time_dim}")
        self.time_dim = found

    def _check_reset(self, soft: bool, floored: bool, where: str) -> None:
        if (soft or floored) and not self.allow_soft_reset:
            raise ValueError(
                f"{where} has {'a soft reset' if soft else 'a v_min'}, and whoever reads NIR resets to v_reset; "
                "allow_soft_reset=True writes it for asgl_cuda.from_nir, which sees it in the metadata"
            )

    def _scale(self, layer: Scale, flow: _Flow, where: str) -> Any:
        scale = layer.scale
        while scale.dim() > len(flow.shape) and len(scale) == 1:
            scale = scale[0]
        sizes = zip(reversed(scale.shape), reversed(flow.shape), strict=False)
        if scale.dim() > len(flow.shape) or any(own not in (1, size) for own, size in sizes):
            shapes = f"{list(flow.shape)}, got {list(layer.scale.shape)}"
            raise ValueError(f"{where}: scale must have the shape of neurons, {shapes}")
        return self.nir.Scale(as_array(scale.broadcast_to(flow.shape)))

    def _delay(self, layer: Delay, flow: _Flow, where: str) -> Any:
        self._check_place(flow, 0, where)
        return self._delay_of(layer.steps.expand(flow.shape))

    def _delay_of(self, steps: Tensor) -> Any:
        node = self.nir.Delay(as_array(self.dt * steps.double()))
        node.metadata = {KEY: {"dt": self.dt, "num_features": as_shape(())}}
        return node

    def _linear(self, layer: nn.Linear, flow: _Flow, where: str) -> Any:
        if len(flow.shape) != 1:
            raise ValueError(f"{where}: NIR's Affine takes neurons in one dimension, got shape {list(flow.shape)}")
        weight = as_array(layer.weight)
        return self.nir.Linear(weight) if layer.bias is None else self.nir.Affine(weight, as_array(layer.bias))

    def _conv(self, layer: nn.Conv1d | nn.Conv2d, flow: _Flow, where: str) -> Any:
        _check_batched(flow, layer.weight.dim() - 1, where)
        if layer.padding_mode != "zeros":
            raise ValueError(f"{where}: padding_mode must be zeros, got {layer.padding_mode}")
        spans = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = layer.padding
        if padding == "same":
            if any(span % 2 for span in spans):
                raise ValueError(f"{where}: padding 'same' must be equal on both sides, got kernel {layer.kernel_size}")
            padding = tuple(span // 2 for span in spans)
        elif padding == "valid":
            padding = (0,) * len(spans)
        one, dilation = isinstance(layer, nn.Conv1d), layer.dilation
        sizes = {"input_shape": flow.shape[1:], "stride": layer.stride, "padding": padding, "dilation": dilation}
        return (self.nir.Conv1d if one else self.nir.Conv2d)(
            weight=as_array(layer.weight),
            bias=as_array(layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias),
            groups=layer.groups,
            **{name: size[0] if one else tuple(size) for name, size in sizes.items()},
        )

    def _pool(self, layer: nn.AvgPool2d, flow: _Flow, where: str) -> Any:
        _check_batched(flow, 3, where)
        sums = layer.divisor_override == 1
        padding = as_pair(layer.padding)
        if layer.ceil_mode or not (sums or layer.divisor_override is None):
            raise ValueError(f"{where}: ceil_mode and divisor_override other than 1 can't be represented in NIR")
        if any(padding) and not (sums or layer.count_include_pad):
            raise ValueError(f"{where}: count_include_pad=False can't be represented in NIR")
        sizes = (as_shape(as_pair(layer.kernel_size)), as_shape(as_pair(layer.stride)), as_shape(padding))
        return (self.nir.SumPool2d if sums else self.nir.AvgPool2d)(*sizes)

    def _flatten(self, layer: nn.Flatten, flow: _Flow, where: str) -> Any:
        dims = flow.leading + len(flow.shape)
        start, end = layer.start_dim % dims - flow.leading, layer.end_dim % dims - flow.leading
        if start < 0:
            raise ValueError(
                f"{where} must leave time and batch alone: start_dim at least {flow.leading}, got {layer.start_dim}"
            )
        end = -1 if end == len(flow.shape) - 1 else end
        return self.nir.Flatten(input_type={"input": as_shape(flow.shape)}, start_dim=start, end_dim=end)

    def _batch_norm(self, norm: Any, flow: _Flow, where: str) -> _ByChannel:
        _check_batched(flow, len(flow.shape), where)
        return _by_channel(norm, flow, where)


def _by_channel(norm: Any, flow: _Flow, where: str, input_scale: float = 1.0) -> _ByChannel:
    """Gain and shift of a normalisation in evaluation mode."""
    if norm.running_mean is None:
        raise ValueError(f"{where}: must have running statistics, got track_running_stats=False")
    channels = norm.running_mean.numel()
    if flow.shape[:1] != (channels,):
        raise ValueError(f"{where}: must get its {channels} channels first, got neurons of shape {list(flow.shape)}")
    gain, shift, mean = normalisation(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, input_scale, torch.float64
    )
    return _ByChannel(gain.cpu(), (shift - gain * mean).cpu(), flow, where)


def _kind(module: nn.Module) -> Any:
    """The class that selects a layer's export: torch's for a library's equivalent."""
    if isinstance(module, Converted):
        return Converted
    kind = bare_class(module)
    if kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and not issubclass(kind, LazyModuleMixin):
        return _BatchNorm
    for library in libraries():
        if kind in getattr(library, "NORMALISATIONS", ()):
            return _BatchNorm
        kind = getattr(library, "PLAIN", {}).get(kind, kind)
    return kind


def _without_time(module: nn.Module, flow: _Flow, where: str) -> _Flow:
    """The flow inside a layer: SpikingJelly's layers join time and batch in step mode "m"."""
    kind, step_mode = _kind(module), getattr(module, "step_mode", None)
    if kind in (Converted, nn.Linear, *_SILENT) or step_mode is None:
        return flow
    if step_mode == "m" and flow.leading != 2:
        raise ValueError(f"{where}: step_mode 'm' takes time and batch apart, got them in one by flatten(0, 1)")
    if step_mode == "s" and flow.leading != 1 and kind is not nn.Flatten:
        raise ValueError(f"{where}: step_mode must be 'm' where time and batch are apart, got 's'")
    return flow._replace(leading=1) if step_mode == "m" else flow


def _norm_of(module: nn.Module) -> Any:
    """The normalisation computed by neurons, or None."""
    return module if isinstance(module, BatchNormLIF) else None


def _found(module: nn.Module) -> Any:
    """The libraries' answer for an unconverted layer, see `Found`."""
    return next((answer for library in libraries() if (answer := library.find(module)) is not None), None)


def _check_decay(decay: Tensor, where: str) -> None:
    if not ((decay >= 0) & (decay <= 1)).all():
        raise ValueError(f"{where}: decay must be in [0, 1], got {range_of(decay)}")


def _check_batched(flow: _Flow, dims: int, where: str) -> None:
    # torch's layers also take inputs without batch, and would use batch or time as channels.
    if flow.leading != 1 or len(flow.shape) != dims:
        raise ValueError(
            f"{where}: must get {dims} dimensions after time and batch in one, as in asgl_cuda.OverTime, "
            f"got {len(flow.shape)} after {flow.leading}"
        )
