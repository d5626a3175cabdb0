"""Models to and from NIR, the Neuromorphic Intermediate Representation that other libraries and chips read.

    tau v' = v_leak - v + r x                                NIR's LIF, time in seconds
    v[t] = v[t-1] + dt / tau (v_leak - v[t-1] + r x[t])      its Euler step of length dt
    h[t] = v_rest + decay (v[t-1] - v_rest) + g x[t]         asgl_cuda.LIF with input_gain g

They are the same for decay = 1 - dt / tau, r = g tau / dt and v_leak = v_rest; for decay = 1, NIR's IF with v' = r x
and r = g / dt. Gain and v_leak only move the scale of the potential: v_threshold and v_reset become
(v_threshold - v_leak) / g and (v_reset - v_leak) / g, with g = 1 and v_leak = 0. What is read is read so; what is
written has its gain in r, and v_leak = 0, because a potential starts at 0 for whoever else reads it.

Source: Pedersen et al.: Neuromorphic intermediate representation: A unified instruction set for interoperable
brain-inspired computing, Nature Communications 15, 8122 (2024).
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
from collections.abc import Callable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .checks import check_number
from .interop.conversion import copied
from .interop.fused import Fused
from .interop.normalised import Normalised
from .layout import real_type
from .neuron import LIF, BatchNormLIF, Granularity
from .over_time import OverTime

if TYPE_CHECKING:
    import nir

_DT = 1e-4  # seconds; the step that the other libraries assume as well
_KEY = "asgl_cuda"  # what asgl_cuda.LIF has and NIR has not stands under it in the metadata of a node

_EXPORTED = "asgl_cuda.LIF, converted neurons, Linear, Conv1d, Conv2d, AvgPool2d, Flatten, Dropout, Identity"
_SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)  # in evaluation
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FOLD = "torch.nn.utils.fusion.fuse_conv_bn_eval or fuse_linear_bn_eval"
_ADDITIONS = (operator.add, torch.add, "add")


class Scale(nn.Module):
    """NIR's Scale: the input times a constant of the shape of the neurons."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x_seq: Tensor) -> Tensor:
        return x_seq * self.scale


def to_nir(model: nn.Module, example_input: Tensor, dt: float = _DT, *, allow_soft_reset: bool = False) -> nir.NIRGraph:
    """The model, as it is in evaluation, as a graph of NIR.

    Args:
        model: layers of asgl_cuda.LIF, Linear, Conv1d, Conv2d, AvgPool2d (with `divisor_override=1`: SumPool2d) and
            Flatten, in sequence or connected by additions, in any modules that torch.fx can trace. A layer that knows
            no time may be surrounded by `x_seq.flatten(0, 1)` and `unflatten(0, ...)`, as in `asgl_cuda.OverTime`.
            Dropout and Identity vanish. Neurons of other libraries may stand for asgl_cuda.LIF where they are converted
            and get a sequence; `from_nir` makes an asgl_cuda.LIF of them.
        example_input: `[T, B, ...]`, or `[B, T, ...]` where the LIF layers have `time_dim=1`; only its shape and type
            count. The model is not changed, nor potentials that it carries.
        dt: length of a step, in seconds.
        allow_soft_reset: write layers with soft reset, too. NIR's LIF resets to v_reset, and only `from_nir` sees in
            the metadata of the node that this one does not.

    NIR's neuron fires at v > v_threshold, asgl_cuda.LIF at v >= v_threshold: the metadata says so, too, and it matters
    for potentials that equal the threshold exactly. `scale_output` becomes a Scale node, half precision float32.

    Raises:
        ImportError: nir or nirtorch is not installed.
        TypeError: an argument is of another type.
        ValueError: the model can't be traced or has a layer that NIR can't represent; the message names it.
    """
    nirtorch = _require("nirtorch.torch_tracer", "asgl_cuda.to_nir")
    dt = _check_dt(dt, "asgl_cuda.to_nir")
    if not isinstance(model, nn.Module):
        raise TypeError(f"asgl_cuda.to_nir: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"asgl_cuda.to_nir: example_input must be a tensor, got {type(example_input).__name__}")
    if not isinstance(allow_soft_reset, bool):
        raise TypeError(f"asgl_cuda.to_nir: allow_soft_reset must be True or False, got {allow_soft_reset!r}")
    if example_input.dim() < 3:
        raise ValueError(
            f"asgl_cuda.to_nir: example_input must have time, batch and neurons, [T, B, ...], "
            f"got shape {list(example_input.shape)}"
        )
    model = copied(model).eval()
    for module in model.modules():
        if isinstance(module, LIF):
            module.reset()
    tracer = nirtorch.NIRTorchTracer((LIF, Fused))
    if tracer.is_leaf_module(model, ""):
        model = nn.Sequential(model)  # the tracer would look into it
    try:
        traced = fx.GraphModule(model, tracer.trace(model))
    except Exception as error:  # whatever the model's own code raises when it is given fx's proxies
        raise ValueError(f"asgl_cuda.to_nir: {type(model).__name__} can't be traced: {error}") from error
    export = _Export(traced, dt, allow_soft_reset)
    export.extra_traceback = False  # fx would add the whole graph to every message
    with torch.no_grad():
        export.run(example_input)
    graph: nir.NIRGraph = export.nir.NIRGraph(export.nodes, export.edges)
    return graph


def from_nir(graph: nir.NIRGraph, dt: float | None = None) -> fx.GraphModule:
    """The graph as a module in evaluation mode, `[T, B, ...]` to `[T, B, ...]`, whose submodules have the nodes' names.

    Args:
        graph: one Input, one Output, between them LIF, IF, Affine, Linear, Conv1d, Conv2d, AvgPool2d, SumPool2d,
            Flatten and Scale, without cycles; edges into the same node are added.
        dt: length of a step, in seconds, or in the unit that the graph has tau in; default what `to_nir` wrote the node
            with, else 1e-4.

    LIF and IF become asgl_cuda.LIF. A node that `to_nir` wrote becomes the same layer again, parameters included, but
    with time first. For others, what NIR does not know is the default of asgl_cuda.LIF; decay and threshold are
    parameters that require no gradient where they differ between neurons, else constants. Weights keep their type.

    Raises:
        ImportError: nir is not installed.
        TypeError: an argument is of another type.
        ValueError: a node can't be represented, or its numbers are not those that its metadata says; the message names
            it.
    """
    nir = _require("nir", "asgl_cuda.from_nir")
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(
            f"asgl_cuda.from_nir: graph must be a nir.NIRGraph, as nir.read gives it of a file, "
            f"got {type(graph).__name__}"
        )
    if dt is not None:
        dt = _check_dt(dt, "asgl_cuda.from_nir")
    nodes = graph.nodes
    for kind in ("Input", "Output"):
        names = [name for name, node in nodes.items() if type(node).__name__ == kind]
        if len(names) != 1:
            raise ValueError(f"asgl_cuda.from_nir: the graph must have one {kind} node, got {names}")
    sources: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target in dict.fromkeys(map(tuple, graph.edges)):  # some exporters write an edge twice
        if source not in nodes or target not in nodes:
            raise ValueError(f"asgl_cuda.from_nir: the edge {source} -> {target} is between nodes that are not there")
        sources[target].append(source)
    try:
        order = list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise ValueError(f"asgl_cuda.from_nir: recurrent graphs are not supported, got the cycle {cycle}") from None

    modules: dict[str, nn.Module] = {}
    result = fx.Graph()
    values: dict[str, Any] = {}
    for name in order:
        node, kind = nodes[name], type(nodes[name]).__name__
        where = f"asgl_cuda.from_nir: node {name!r} ({kind})"
        if kind == "Input":
            values[name] = result.placeholder("x_seq")
            continue
        if not sources[name]:
            raise ValueError(f"{where} has no input")
        value = values[sources[name][0]]
        for source in sources[name][1:]:
            value = result.call_function(operator.add, (value, values[source]))
        if kind == "Output":
            output = value
        elif kind == "Scale" and _is_scale_of(node, [modules.get(source) for source in sources[name]]):
            values[name] = value  # the layer before does it
        elif kind in ("LIF", "IF"):
            modules[name] = layer = _lif_from(node, dt, where)
            followers = [nodes[target] for target, before in sources.items() if name in before]
            if layer.scale_output and not all(_is_scale_of(follower, [layer]) for follower in followers):
                raise ValueError(f"{where} has scale_output in its metadata, but no Scale node by v_threshold after it")
            values[name] = result.call_module(name, (value,))
        elif kind in _IMPORTS:
            modules[name] = _IMPORTS[kind](node)
            values[name] = result.call_module(name, (value,))
        else:
            known = ", ".join(("LIF", "IF", *_IMPORTS))
            raise ValueError(f"{where} can't be represented; what can be: {known}")
    result.output(output)
    return fx.GraphModule(modules, result).eval()


def _require(name: str, caller: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{caller}: needs NIR: pip install nir nirtorch ({error})") from error


def _check_dt(dt: float, caller: str) -> float:
    dt = check_number("dt", dt, caller)
    if not 0 < dt < float("inf"):
        raise ValueError(f"{caller}: dt must be > 0 and finite, got {dt}")
    return dt


class _Flow(NamedTuple):
    """What a tensor of the traced model is in the graph."""

    sources: tuple[str, ...]  # the nodes whose sum it is
    shape: tuple[int, ...]  # of the neurons
    leading: int  # dimensions before them: 2 are time and batch, 1 is both in one
    dtype: torch.dtype


class _Export(fx.Interpreter):
    """Runs the traced model and writes down a node of NIR for each layer that it meets."""

    def __init__(self, traced: fx.GraphModule, dt: float, allow_soft_reset: bool) -> None:
        super().__init__(traced)
        self.nir = _require("nir", "asgl_cuda.to_nir")
        self.dt = dt
        self.allow_soft_reset = allow_soft_reset
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.flows: dict[fx.Node, _Flow] = {}
        self.time_and_batch = torch.Size()  # the leading sizes of the input
        self.time_dim: int | None = None  # of the LIF layers before
        self.computed: dict[str, Any] = {}  # what the converted layer that was called last asked for
        self.layers: dict[type[nn.Module], Callable[[Any, _Flow, str], Any]] = {
            LIF: self._lif,
            Fused: self._converted,
            nn.Linear: self._linear,
            nn.Conv1d: self._conv,
            nn.Conv2d: self._conv,
            nn.AvgPool2d: self._pool,
            nn.Flatten: self._flatten,
        }

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            self._check_module(n)  # before the module itself complains, in words that do not name it
            module = self.module.get_submodule(str(n.target))
            if isinstance(module, Fused):
                vars(module)["compute"] = lambda x_seq, **options: self._compute(module, x_seq, options)
        value = super().run_node(n)
        if n.op == "output":
            self._output(n)
        elif isinstance(value, Tensor):
            self.flows[n] = self._flow(n, value)
        return value  # sizes and the like are not part of the graph

    def _check_module(self, n: fx.Node) -> None:
        module = self.module.get_submodule(str(n.target))
        if isinstance(module, Fused) and module.time_dim is None:
            raise ValueError(
                f"{_at(n.target, module)}: must take time and batch apart, [T, B, ...], got one step a call"
            )
        if _kind(module) in self.layers or type(module) in _SILENT:
            return
        hint = f"what can be: {_EXPORTED}"
        if isinstance(module, _BATCH_NORM):
            hint = f"fold it into the layer before it: {_FOLD}"
        elif isinstance(module, Normalised):
            hint = f"it normalises: take that out with asgl_cuda.unfuse, then fold it into the layer before: {_FOLD}"
        elif isinstance(module, BatchNormLIF):
            hint = f"it normalises: make it a BatchNorm and a LIF, then fold the former into the layer before: {_FOLD}"
        raise ValueError(f"{_at(n.target, module)} can't be represented in NIR; {hint}")

    def _flow(self, n: fx.Node, value: Tensor) -> _Flow:
        if n.op == "placeholder":
            flow = _Flow((n.name,), tuple(value.shape[2:]), 2, value.dtype)
            self.time_and_batch = value.shape[:2]
            self.nodes[n.name] = self.nir.Input(input_type={"input": _shape(flow.shape)})
            return flow
        inputs = [self.flows[source] for source in n.all_input_nodes if source in self.flows]
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
        sizes, leading = (*n.args[1:], *n.kwargs.values()), inputs[0].leading if inputs else 0
        if n.op == "call_module":
            return self._module(n, inputs[0], value)
        if n.target in _ADDITIONS and inputs and len(inputs) == len(n.args) and not n.kwargs:
            sources = tuple(source for flow in inputs for source in flow.sources)
            # NIR has no edge twice, and no broadcasting.
            if len(set(sources)) == len(sources) and all(flow[1:] == inputs[0][1:] for flow in inputs):
                return inputs[0]._replace(sources=sources)
        elif name == "flatten" and leading == 2 and sizes == (0, 1):
            return inputs[0]._replace(leading=1)
        elif name == "unflatten" and leading == 1 and sizes[:1] == (0,) and value.shape[:2] == self.time_and_batch:
            return inputs[0]._replace(leading=2)
        module = next(reversed(n.meta.get("nn_module_stack") or {"": None})) or "the model itself"
        raise ValueError(
            f"asgl_cuda.to_nir: {name} in {module} can't be represented in NIR; between layers, what can be: additions "
            f"of different layers' outputs, flatten(0, 1) and unflatten(0, ...) of time and batch"
        )

    def _module(self, n: fx.Node, flow: _Flow, value: Tensor) -> _Flow:
        module = self.module.get_submodule(str(n.target))
        if type(module) in _SILENT:
            return flow
        node = self.layers[_kind(module)](module, flow, _at(n.target, module))
        after = flow._replace(sources=(n.name,), shape=tuple(value.shape[flow.leading :]), dtype=value.dtype)
        # nir gets those of grouped convolutions and oblong kernels wrong, and of pooling only later.
        node.input_type, node.output_type = {"input": _shape(flow.shape)}, {"output": _shape(after.shape)}
        self._add(n.name, node, flow.sources)
        layer: Any = module
        if self.computed.get("scale_output") if isinstance(layer, Fused) else getattr(layer, "scale_output", False):
            after = after._replace(sources=(f"{n.name}_scale",))
            scale = node.v_threshold.copy()
            if isinstance(layer, LIF):  # whose node has the threshold above v_rest
                scale = _numpy(_per_neuron(layer, layer.v_threshold, flow.shape).to(real_type(flow.dtype), copy=True))
            self._add(after.sources[0], self.nir.Scale(scale), (n.name,))
        return after

    def _add(self, name: str, node: Any, sources: tuple[str, ...]) -> None:
        self.nodes[name] = node
        self.edges.extend((source, name) for source in sources)

    def _output(self, n: fx.Node) -> None:
        flow = self.flows.get(n.args[0]) if isinstance(n.args[0], fx.Node) else None
        if flow is None or flow.leading != 2:
            raise ValueError(f"asgl_cuda.to_nir: the model must return one tensor [T, B, ...], got {n.args[0]}")
        self._add(n.name, self.nir.Output(output_type={"output": _shape(flow.shape)}), flow.sources)

    def _lif(self, layer: LIF, flow: _Flow, where: str) -> Any:
        self._check_neurons(flow, layer.time_dim, layer.v_reset is None, where)
        if len(layer.num_features) > len(flow.shape):
            raise ValueError(
                f"{where}: num_features {list(layer.num_features)} must be the shape of neurons, {list(flow.shape)}"
            )
        if not layer.input_gain > 0:
            raise ValueError(f"{where}: input_gain must be > 0, got {layer.input_gain}")
        decay, v_threshold = (_per_neuron(layer, value, flow.shape) for value in (layer.decay, layer.v_threshold))
        v_reset = 0.0 if layer.v_reset is None else layer.v_reset - layer.v_rest
        gain, reset = (torch.full_like(decay, value) for value in (layer.input_gain, v_reset))
        node = self._neurons(flow, where, decay, v_threshold - layer.v_rest, reset, gain)
        node.metadata = {_KEY: _metadata(layer, self.dt)}
        return node

    def _compute(self, layer: Fused, x_seq: Tensor, options: dict[str, Any]) -> Any:
        self.computed = options
        return type(layer).compute(layer, x_seq, **options)

    def _converted(self, layer: Fused, flow: _Flow, where: str) -> Any:
        """From what it asked for: `h = v_rest + decay (v - v_rest) + input_gain x + input_bias`."""
        assert layer.time_dim is not None

        def of(name: str, default: float | Tensor = 0.0) -> Tensor:
            value = _double(self.computed.get(name, default))
            return value.reshape(value.shape[-len(flow.shape) :]).expand(flow.shape)

        soft = self.computed["v_reset"] is None
        self._check_neurons(flow, layer.time_dim, soft, where)
        decay, v_threshold = of("decay"), of("v_threshold")
        if soft and self.computed.get("reset_amount") is not None and not torch.equal(of("reset_amount"), v_threshold):
            raise ValueError(f"{where}: its reset must take v_threshold off, got {_range(of('reset_amount'))}")
        v_leak = of("v_rest") + (of("input_bias") / (1 - decay)).nan_to_num(0.0)
        v_reset = torch.zeros_like(decay) if soft else of("v_reset")
        node = self._neurons(flow, where, decay, v_threshold, v_reset, of("input_gain", 1.0), v_leak)
        if soft:
            same = _new_lif(_meaning(node, self.dt, where), where)
            same.v_reset = None
            node.metadata = {_KEY: _metadata(same, self.dt)}
        return node

    def _check_neurons(self, flow: _Flow, time_dim: int, soft: bool, where: str) -> None:
        if flow.leading != 2:
            raise ValueError(f"{where}: time and batch must be apart, got them in one by flatten(0, 1)")
        found = time_dim % (flow.leading + len(flow.shape))
        if found > 1:
            raise ValueError(f"{where}: time must be the first or second dimension, got time_dim {time_dim}")
        if self.time_dim not in (None, found):
            raise ValueError(f"{where}: time must be where the layers before have it, got time_dim {time_dim}")
        self.time_dim = found
        if soft and not self.allow_soft_reset:
            raise ValueError(
                f"{where} has a soft reset, and whoever reads NIR resets to v_reset; allow_soft_reset=True writes it "
                "for asgl_cuda.from_nir, which sees it in the metadata"
            )

    def _neurons(
        self,
        flow: _Flow,
        where: str,
        decay: Tensor,
        v_threshold: Tensor,
        v_reset: Tensor,
        gain: Tensor,
        v_leak: Tensor | None = None,
    ) -> Any:
        """The equations at the top of this file."""
        if not ((decay >= 0) & (decay <= 1)).all():
            raise ValueError(f"{where}: decay must be in [0, 1], got {_range(decay)}")
        fields = {"v_threshold": v_threshold, "v_reset": v_reset}
        if "v_reset" not in {field.name for field in dataclasses.fields(self.nir.LIF)}:
            if v_reset.any():
                raise ValueError(
                    f"{where}: v_reset {_range(v_reset)} needs a newer nir, got one whose LIF resets to 0: "
                    "pip install -U nir"
                )
            del fields["v_reset"]
        if (decay == 1).all():
            kind, fields["r"] = self.nir.IF, gain / self.dt
        else:
            kind, steps = self.nir.LIF, 1 / (1 - decay)
            fields["r"], fields["tau"] = gain * steps, self.dt * steps
            fields["v_leak"] = torch.zeros_like(decay) if v_leak is None else v_leak
        dtype = real_type(flow.dtype)
        return kind(**{name: _numpy(value.to(dtype)) for name, value in fields.items()})

    def _linear(self, layer: nn.Linear, flow: _Flow, where: str) -> Any:
        if len(flow.shape) != 1:
            raise ValueError(f"{where}: NIR's Affine takes neurons in one dimension, got shape {list(flow.shape)}")
        weight = _numpy(layer.weight)
        return self.nir.Linear(weight) if layer.bias is None else self.nir.Affine(weight, _numpy(layer.bias))

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
        one = isinstance(layer, nn.Conv1d)
        sizes = {
            "input_shape": flow.shape[1:],
            "stride": layer.stride,
            "padding": padding,
            "dilation": layer.dilation,
        }
        return (self.nir.Conv1d if one else self.nir.Conv2d)(
            weight=_numpy(layer.weight),
            bias=_numpy(layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias),
            groups=layer.groups,
            **{name: size[0] if one else tuple(size) for name, size in sizes.items()},
        )

    def _pool(self, layer: nn.AvgPool2d, flow: _Flow, where: str) -> Any:
        _check_batched(flow, 3, where)
        sums = layer.divisor_override == 1
        padding = _pair(layer.padding)
        if layer.ceil_mode or not (sums or layer.divisor_override is None):
            raise ValueError(f"{where}: ceil_mode and divisor_override other than 1 can't be represented in NIR")
        if any(padding) and not (sums or layer.count_include_pad):
            raise ValueError(f"{where}: count_include_pad=False can't be represented in NIR")
        sizes = (_shape(_pair(layer.kernel_size)), _shape(_pair(layer.stride)), _shape(padding))
        return (self.nir.SumPool2d if sums else self.nir.AvgPool2d)(*sizes)

    def _flatten(self, layer: nn.Flatten, flow: _Flow, where: str) -> Any:
        dims = flow.leading + len(flow.shape)
        start, end = layer.start_dim % dims - flow.leading, layer.end_dim % dims - flow.leading
        if start < 0:
            raise ValueError(
                f"{where} must leave time and batch alone: start_dim at least {flow.leading}, got {layer.start_dim}"
            )
        return self.nir.Flatten(
            input_type={"input": _shape(flow.shape)}, start_dim=start, end_dim=-1 if end == len(flow.shape) - 1 else end
        )


def _kind(module: nn.Module) -> type[nn.Module]:
    """By which a layer is exported; a converted layer has a class of its own for each that it may have been."""
    return Fused if isinstance(module, Fused) and not isinstance(module, Normalised) else type(module)


def _at(target: Any, module: nn.Module) -> str:
    return f"asgl_cuda.to_nir: {target} ({type(module).__name__})"


def _check_batched(flow: _Flow, dims: int, where: str) -> None:
    # torch's layers take one dimension less as well, and would then see the batch, or time, as channels.
    if flow.leading != 1 or len(flow.shape) != dims:
        raise ValueError(
            f"{where}: must get {dims} dimensions after time and batch in one, as in asgl_cuda.OverTime, "
            f"got {len(flow.shape)} after {flow.leading}"
        )


def _numpy(value: Tensor) -> Any:
    return value.detach().to("cpu", real_type(value.dtype)).contiguous().numpy()


def _shape(sizes: Sequence[int]) -> Any:
    return torch.tensor(sizes, dtype=torch.int64).numpy()


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _per_neuron(layer: LIF, value: Tensor | float, shape: Sequence[int]) -> Tensor:
    """A parameter of the granularity's shape, float64 in the shape of the neurons."""
    value = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    if layer.granularity == "channel" and value.dim():
        value = value.reshape(-1, *[1] * (len(shape) - 1))
    return value.expand(tuple(shape))


def _metadata(layer: LIF, dt: float) -> dict[str, Any]:
    """What `_lif_from` makes the same layer of: numbers, strings, arrays and dictionaries, all that a file can hold."""
    options = {
        "decay": layer._decay,
        "v_threshold": layer._v_threshold,
        "v_rest": layer.v_rest,
        "input_gain": layer.input_gain,
        "width": layer._width,
        "surrogate": layer.surrogate,
        "surrogate_gain": layer.surrogate_gain,
        "analog_prob": layer.analog_prob,
        "granularity": layer.granularity,
        "learn_width": layer.log_width is not None,
        "learn_decay": layer.logit_decay is not None,
        "learn_threshold": layer.threshold is not None,
        "strict_threshold": layer.strict_threshold,
        "detach_reset": layer.detach_reset,
        "scale_output": layer.scale_output,
        "stateful": layer.stateful,
        "store_v_seq": layer.store_v_seq,
    }
    options |= {name: value for name in ("v_reset", "reset_amount") if (value := getattr(layer, name)) is not None}
    return {
        "dt": dt,
        "reset": "soft" if layer.v_reset is None else "hard",
        "strict_threshold": layer.strict_threshold,
        "width": _numpy(torch.as_tensor(layer.width).reshape(-1)),
        "options": options,
        "num_features": _shape(layer.num_features),
        # Scalars can't be compressed in a file.
        "parameters": {name: _numpy(parameter.reshape(-1)) for name, parameter in layer.named_parameters()},
    }


class _Neurons(NamedTuple):
    """What a node of NIR means at a step, in the units of asgl_cuda.LIF: float64, in the shape of the neurons."""

    decay: Tensor
    v_threshold: Tensor
    v_reset: Tensor


def _meaning(node: Any, dt: float, where: str) -> _Neurons:
    """The equations at the top of this file."""
    r, v_threshold = _double(node.r), _double(node.v_threshold)
    v_reset = _double(0.0 if getattr(node, "v_reset", None) is None else node.v_reset)
    if type(node).__name__ == "IF":
        decay, gain, v_leak = torch.ones_like(r), r * dt, _double(0.0)
    else:
        rate = dt / _double(node.tau)
        decay, gain, v_leak = 1 - rate, r * rate, _double(node.v_leak)
        # tau = dt may have been rounded.
        decay = torch.where(decay.abs() < 1e-6, 0.0, decay)
        if not ((decay >= 0) & (decay <= 1)).all():
            raise ValueError(f"{where}: tau must be at least dt = {dt}, got {_range(_double(node.tau))}")
    if not (gain > 0).all():
        raise ValueError(f"{where}: r must be > 0, got {_range(r)}")
    # r = tau / dt may have been rounded, and would take the threshold along.
    gain = torch.where((gain - 1).abs() < 1e-6, 1.0, gain)
    values = torch.broadcast_tensors(decay, (v_threshold - v_leak) / gain, (v_reset - v_leak) / gain)
    return _Neurons(*values)


def _lif_from(node: Any, dt: float | None, where: str) -> LIF:
    ours = node.metadata.get(_KEY)
    neurons = _meaning(node, dt if dt is not None else float(ours["dt"]) if ours else _DT, where)
    return _new_lif(neurons, where) if ours is None else _same_lif(neurons, ours, where)


def _same_lif(neurons: _Neurons, ours: dict[str, Any], where: str) -> LIF:
    # A file gives numpy's numbers; the layer is to have Python's, as before.
    options = {name: value.item() if hasattr(value, "item") else value for name, value in ours["options"].items()}
    if ours["reset"] == "soft":
        options["v_reset"] = None
    layer = LIF([int(size) for size in ours["num_features"]], **options)
    for name, value in ours.get("parameters", {}).items():
        parameter = layer.get_parameter(name)
        parameter.data = torch.as_tensor(value).reshape(parameter.shape).clone()
    expected = {"decay": layer.decay, "v_threshold": layer.v_threshold, "v_reset": layer.v_reset}
    for name, value in expected.items():
        if value is None:
            continue
        said = getattr(neurons, name)
        value = _per_neuron(layer, value, said.shape)
        if name != "decay":
            value = (value - layer.v_rest) / layer.input_gain
        if not torch.allclose(said, value, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"{where}: its numbers say {name} {_range(said)} and metadata[{_KEY!r}] says {_range(_double(value))}, "
                f"written with dt = {float(ours['dt'])}; without metadata[{_KEY!r}] the numbers alone are read"
            )
    return layer


def _new_lif(neurons: _Neurons, where: str) -> LIF:
    decay, v_threshold, v_reset = neurons
    if v_reset.min() != v_reset.max():
        raise ValueError(f"{where}: v_reset must be the same for all neurons, got {_range(v_reset)}")
    varies = {name: bool(value.min() != value.max()) for name, value in neurons._asdict().items()}
    if varies["decay"] and not ((decay > 3.1e-7) & (decay < 1 - 3.1e-7)).all():
        raise ValueError(f"{where}: a decay that differs between neurons must be in (0, 1), got {_range(decay)}")
    granularity: Granularity = "layer"
    num_features: tuple[int, ...] | None = None
    if any(varies.values()):
        rows = torch.stack((decay, v_threshold)).reshape(2, len(decay), -1)  # [2, C, neurons of the channel]
        granularity, num_features = "neuron", tuple(decay.shape)
        if (rows == rows[..., :1]).all():
            granularity, num_features = "channel", num_features[:1]
            decay, v_threshold = rows[..., 0]
    layer = LIF(
        num_features,
        granularity=granularity,
        decay=float(decay.flatten()[0]),
        v_threshold=float(v_threshold.flatten()[0]),
        v_reset=float(v_reset.flatten()[0]),
        learn_decay=varies["decay"],
        learn_threshold=varies["v_threshold"],
    )
    for parameter, value in ((layer.logit_decay, decay.logit()), (layer.threshold, v_threshold)):
        if parameter is not None:
            parameter.data = value.to(parameter.dtype, copy=True)
            parameter.requires_grad_(False)
    return layer


def _is_scale_of(node: Any, layers: Sequence[nn.Module | None]) -> bool:
    """Whether the node is the Scale that `to_nir` writes after the layer because it has scale_output."""
    if type(node).__name__ != "Scale" or len(layers) != 1 or not isinstance(layers[0], LIF):
        return False
    layer, scale = layers[0], _double(node.scale)
    return layer.scale_output and torch.allclose(scale, _per_neuron(layer, layer.v_threshold, scale.shape))


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def _range(value: Tensor) -> str:
    low, high = float(value.min()), float(value.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _weights(module: nn.Module, node: Any) -> nn.Module:
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            setattr(module, name, nn.Parameter(torch.as_tensor(getattr(node, name)).detach().clone()))
    return module


def _sizes(value: Any) -> Any:
    """Sizes as torch's layers take them, whether they were numbers, tuples, arrays or, for padding, a word."""
    if isinstance(value, str):
        return value
    return tuple(int(size) for size in torch.as_tensor(value).reshape(-1))


def _linear_from(node: Any) -> nn.Module:
    outputs, inputs = node.weight.shape
    return _weights(nn.Linear(inputs, outputs, bias=hasattr(node, "bias")), node)


def _conv_from(node: Any) -> nn.Module:
    outputs, inputs, *kernel_size = node.weight.shape
    groups = int(node.groups)
    kind = nn.Conv1d if len(kernel_size) == 1 else nn.Conv2d
    sizes = {name: _sizes(getattr(node, name)) for name in ("stride", "padding", "dilation")}
    return OverTime(_weights(kind(inputs * groups, outputs, tuple(kernel_size), groups=groups, **sizes), node))


def _pool_from(node: Any) -> nn.Module:
    kernel_size, stride, padding = (
        _pair(sizes * 2 if len(sizes) == 1 else sizes)
        for sizes in (_sizes(node.kernel_size), _sizes(node.stride), _sizes(node.padding))
    )
    divisor = 1 if type(node).__name__ == "SumPool2d" else None
    return OverTime(nn.AvgPool2d(kernel_size, stride, padding, divisor_override=divisor))


def _flatten_from(node: Any) -> nn.Module:
    start, end = (int(dim) + 2 if dim >= 0 else int(dim) for dim in (node.start_dim, node.end_dim))
    return nn.Flatten(start, end)


_IMPORTS: dict[str, Callable[[Any], nn.Module]] = {
    "Affine": _linear_from,
    "Linear": _linear_from,
    "Conv1d": _conv_from,
    "Conv2d": _conv_from,
    "AvgPool2d": _pool_from,
    "SumPool2d": _pool_from,
    "Flatten": _flatten_from,
    "Scale": lambda node: Scale(torch.as_tensor(node.scale).detach().clone()),
}
