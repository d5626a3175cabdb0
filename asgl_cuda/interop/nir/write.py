"""`to_nir`: a module as a graph of NIR."""

from __future__ import annotations

import operator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ...checks import check_bool, check_input
from ...layout import real_type
from ...neurons.base import NeuronLayer, check_module
from ...neurons.batch_norm_lif import BatchNormLIF
from ...neurons.leaky_integrator import LeakyIntegrator
from ...neurons.lif import LIF, unknown_options
from ...neurons.recurrent_lif import RecurrentLIF
from ...reference.normalisation import normalisation_coefficients
from ...spikes.layers import SPIKE_LAYERS
from ..convert import convert, copy_model
from ..converted import Converted, bare_class
from ..fuse import unfuse
from ..libraries import LIBRARIES, imported_adapters
from ..recurrent import Recurrent
from ..sequences import InSequences
from . import neurons as units
from .neurons import KEY, RECURRENCE, Delay, Scale, as_double, as_nir_shape, first_wrong, prefixed_errors, range_of

if TYPE_CHECKING:
    import nir

_CALLER = "asgl_cuda.to_nir"
# Options of layers that a node can represent, or that change no spike in evaluation.
_KNOWN = {
    "v_rest", "input_gain", "v_min", "strict_threshold", "scale_output", "levels",
    "multi_spike", "surrogate_gain", "detach_reset", "delay", "stateful", "store_v_seq", "time_dim", "backend",
    "eps", "momentum", "input_scale", "affine", "track_running_stats",
}  # fmt: skip
_KNOWN_OF_CALLS = {  # the same for the options with which converted layers call `lif`
    "decay", "input_gain", "input_bias", "v_rest", "v_threshold", "v_reset", "reset_amount", "scale_output", "levels",
    "v_min", "strict_threshold", "surrogate", "surrogate_gain", "width", "detach_reset", "analog_prob", "rng_state",
    "generator", "v_init", "time_dim", "return_v_last", "return_v_seq", "return_h_seq", "backend", "multi_spike",
}  # fmt: skip
_SILENT = (  # layers without effect in evaluation
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def to_nir(
    model: nn.Module, example_input: Tensor, dt: float = units.DT, *, allow_soft_reset: bool = False
) -> nir.NIRGraph:
    """Makes a graph of NIR from a model. The graph describes the model in evaluation mode.

    Args:
        model: a module that torch.fx can trace. It may contain LIF, BatchNormLIF, LeakyIntegrator and spike layers of
            asgl_cuda, and Linear, Conv1d, Conv2d, AvgPool2d, Flatten and BatchNorm of torch. The model may add outputs
            of layers. Dropout and Identity are left out. Convolutions, poolings and BatchNorm need time and batch in
            one dimension: wrap them in `asgl_cuda.OverTime`, or call `x_seq.flatten(0, 1)` before and
            `unflatten(0, ...)` after them. SpikingJelly's layers in step mode "m" do not need this. Neurons of other
            libraries are converted as by `asgl_cuda.convert`. They must fire at most once per step, take a sequence,
            return one tensor, and have no synaptic current, no recurrence and no lower limit of the potential.
        example_input: `[T, B, ...]`, or `[B, T, ...]` if the LIF layers have `time_dim=1`; its values do not matter.
        dt: length of a step, in seconds.
        allow_soft_reset: also write layers that have a soft reset, several spikes per step or v_min, which NIR's LIF
            does not have. The metadata of the node then contain these options, and only `from_nir` reads them. The
            readers of Norse, snnTorch and SpikingJelly reset to v_rest, emit at most one spike per step and ignore
            v_min. The neurons of sinabs always subtract the threshold, and may emit several spikes per step.

    A LIF is written with r = 1 and v_leak = 0. Threshold and reset, measured from v_rest, are multiplied by
    `(1 - decay) / input_gain`. Apart from rounding this changes no spike. A LIF with decay 1 becomes an IF with r = 1 /
    dt, whose threshold and reset are only divided by `input_gain`. A LeakyIntegrator becomes an LI with r = input_gain
    / (1 - decay) or, with decay 1, an I with r = input_gain / dt. If the LeakyIntegrator has `delay`, a Delay follows.
    The normalisation of a BatchNorm or a BatchNormLIF, or one that `fuse` merged into neurons, is folded into the
    weights of the linear layer or convolution before it. If there is none, or if the output of that layer is also used
    elsewhere, the normalisation becomes an Affine or a convolution. If a LIF has `scale_output=True`, a Scale follows.
    Half types are written as float32.

    Raises:
        ImportError: nir or nirtorch is not installed.
        TypeError: an argument is of another type.
        ValueError: the model can't be traced or has a layer that NIR can't represent. The message names the layer.
        RuntimeError: the model can't be copied.
    """
    tracer = units.import_and_check_dt("nirtorch.torch_tracer", dt, _CALLER).NIRTorchTracer
    check_module(model, _CALLER)
    check_bool("allow_soft_reset", allow_soft_reset, _CALLER)
    check_input(example_input, 0, _CALLER, "example_input")
    if example_input.dim() < 3 or not example_input.numel():
        got = list(example_input.shape)
        raise ValueError(
            f"{_CALLER}: example_input must have dimensions for time, batch and neurons, [T, B, ...], none of size 0, "
            f"got shape {got}"
        )
    root = copy_model(model, _CALLER)
    if _is_leaf(model) or _reason_not_written(model) is not None:  # fx always traces a root
        root = nn.Sequential(root)
    unfuse(root, inplace=True)
    _, report = convert(root, inplace=True)
    left = {root.get_submodule(row.path): f"asgl_cuda.convert leaves it, because {row.reason}" for row in report.left}
    left |= {
        module: reason for module in root.modules() if (reason := _reason_not_written(module)) and module not in left
    }
    for module in root.eval().modules():
        if isinstance(module, NeuronLayer):
            module.reset()
    tracer = tracer({type(module) for module in root.modules() if _is_leaf(module) or module in left})
    with prefixed_errors(f"{_CALLER}: {type(model).__name__} can't be traced by torch.fx, which to_nir needs"):
        traced = fx.GraphModule(root, tracer.trace(root))
    traced.graph.eliminate_dead_code()  # nir would add an Output to each node without a follower
    writer = _Writer(traced, float(dt), allow_soft_reset, real_type(example_input.dtype), left)
    with torch.no_grad():
        writer.run(example_input)
    return writer.finished_graph()


def _is_leaf(module: nn.Module) -> bool:
    """Whether torch.fx must not trace into the module: a layer of torch, asgl_cuda or a library, but no container."""
    if isinstance(module, (NeuronLayer, Scale, Delay, Converted, _BatchNorm, *SPIKE_LAYERS.values())):
        return True
    return type(module).__module__.split(".")[0] in ("torch", *LIBRARIES) and not module._modules


def _reason_not_written(module: nn.Module) -> str | None:
    """Why `to_nir` can't write a module, by the adapter of its library or because of `sequences`. None for others."""
    if isinstance(module, InSequences):
        return "it runs a loop over steps (convert with sequences); use asgl_cuda.LIF in place of its neurons"
    reasons = (getattr(library, "reason_not_written", lambda module: None)(module) for library in imported_adapters())
    return next((reason for reason in reasons if reason is not None), None)


def _in_place_of(layer: Converted) -> str:
    """Layers of asgl_cuda that compute the same as the converted layer, and that `to_nir` writes, for errors."""
    if layer.settings.spike is None:
        return "asgl_cuda.LeakyIntegrator"
    return "asgl_cuda.LIF" if layer.takes_input_directly else "asgl_cuda.LeakyIntegrator before asgl_cuda.LIF"


class _Flow(NamedTuple):
    """A tensor of the traced model, as a value in the graph of NIR."""

    sources: tuple[str, ...]  # names of the nodes to be summed
    shape: tuple[int, ...]  # the shape of the neurons
    leading: int  # leading dimensions: 2 for time and batch, 1 if they are merged


class _Writer(fx.Interpreter):
    """Runs the traced model and writes nodes of NIR for each layer."""

    def __init__(self, traced: fx.GraphModule, dt: float, allow_soft_reset: bool, real: Any, left: Any) -> None:
        super().__init__(traced)
        self.extra_traceback = False  # fx would add the whole graph to every message
        self.nir = units.import_and_check_dt("nir", dt, _CALLER)
        self.dt, self.allow_soft_reset, self.real, self.left = dt, allow_soft_reset, real, left
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.flows: dict[fx.Node, _Flow] = {}
        self.time_and_batch = torch.Size()
        self.time_dim: int | None = None  # time dimension of the preceding neurons
        self.calls: list[dict[str, Any]] = []  # options of the calls of `lif` by the converted layer that runs
        # For each class of layers, a function that makes the layer's NIR nodes, in order, by the suffix of their names.
        self.layers: dict[Any, Any] = {
            **dict.fromkeys(_SILENT, lambda layer, flow: {}),
            **dict.fromkeys((LIF, LeakyIntegrator), self._neuron_nodes),
            BatchNormLIF: lambda layer, flow: {
                "_norm": self._normalisation_nodes(layer, flow)[""],
                **self._neuron_nodes(layer, flow),
            },
            Converted: self._converted_nodes,
            Scale: lambda layer, flow: {"": self.nir.Scale(self._as_array(layer.scale, flow))},
            Delay: lambda layer, flow: {"": self._delay_node(layer.steps, flow)},
            **dict.fromkeys((*SPIKE_LAYERS, *SPIKE_LAYERS.values()), self._weight_nodes),
            nn.AvgPool2d: self._pool_nodes,
            nn.Flatten: self._flatten_nodes,
            **dict.fromkeys((_BatchNorm, nn.SyncBatchNorm), self._normalisation_nodes),
        }
        for library in imported_adapters():
            self.layers |= dict.fromkeys(getattr(library, "NORMALISATIONS", ()), self._normalisation_nodes)
            self.layers |= {own: self.layers[plain] for own, plain in getattr(library, "PLAIN", {}).items()}

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node of the traced model, and adds the NIR nodes for its computation to the graph."""
        inputs = [self.flows[source] for source in n.all_input_nodes if source in self.flows]
        if n.op == "call_module":
            module = self.module.get_submodule(str(n.target))
            with prefixed_errors(f"{_CALLER}: {n.target} ({bare_class(module).__name__})"):
                return self._run_module(n, module, inputs)
        place = next(reversed(n.meta.get("nn_module_stack") or {"": None})) or "the model itself"
        with prefixed_errors(f"{_CALLER}: {getattr(n.target, '__name__', n.target)} in {place}"):
            value = super().run_node(n)
            if n.op == "placeholder":
                self.time_and_batch = value.shape[:2]
                self.flows[n] = self._add_node(
                    n.name, self.nir.Input(None), _Flow((), value.shape[2:], 2), value.shape[2:]
                )
            elif n.op == "output":
                if n.args[0] not in self.flows or inputs[0].leading != 2:
                    merged = "one with time and batch merged; unflatten(0, x_seq.shape[:2]) separates them"
                    got = merged if n.args[0] in self.flows else n.args[0]
                    raise ValueError(f"the model must return one tensor [T, B, ...], got {got}")
                self._add_node(n.name, self.nir.Output(None), inputs[0], inputs[0].shape)
            elif isinstance(value, Tensor):  # other values, such as sizes, are not part of the graph
                self.flows[n] = self._flow_after_function(n, value, inputs)
        return value

    def _flow_after_function(self, n: fx.Node, value: Tensor, inputs: list[_Flow]) -> _Flow:
        """The flow of the output of a function between layers. Raises ValueError for one that NIR can't represent."""
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
        sizes, leading = (*n.args[1:], *n.kwargs.values()), inputs[0].leading if inputs else 0
        if n.target in (operator.add, torch.add, "add") and len(inputs) == 2 == len(n.args):
            sources = tuple(source for flow in inputs for source in flow.sources)
            if n.kwargs:
                got = ", ".join(f"{option}={value}" for option, value in n.kwargs.items())
                raise ValueError(f"can't be represented in NIR, which adds without a factor; got {got}")
            one, other = (list(self.env[each].shape) for each in n.all_input_nodes)
            if one != other:
                raise ValueError(f"can't be represented in NIR, which has no broadcasting; got {one} and {other}")
            # NIR has no duplicate edges, so x + x can't be represented.
            if len(set(sources)) == len(sources) and inputs[0][1:] == inputs[1][1:]:
                return inputs[0]._replace(sources=sources)
        elif name == "flatten" and leading == 2 and sizes == (0, 1):
            return inputs[0]._replace(leading=1)
        elif name == "unflatten" and leading == 1 and value.shape[:2] == self.time_and_batch:
            return inputs[0]._replace(leading=2)
        raise ValueError(
            "can't be represented in NIR; between layers there may only be sums x + y of their outputs, each output "
            "once, and flatten(0, 1) and unflatten(0, ...) of time and batch; in place of other functions use layers "
            "that can be represented, such as nn.Flatten(2) for flatten(2)"
        )

    def _run_module(self, n: fx.Node, module: Any, inputs: list[_Flow]) -> Any:
        """Runs a layer, and adds its NIR nodes to the graph."""
        kind = Converted if isinstance(module, Converted) and module not in self.left else type(module)
        kind = _BatchNorm if kind.forward is _BatchNorm.forward else kind  # also of a user's subclass
        if kind not in self.layers or isinstance(module, Recurrent):
            if module in self.left:
                raise ValueError(f"can't be written; {self.left[module]}")
            known = ", ".join(sorted({each.__name__.strip("_") for each in self.layers if each is not Converted}))
            is_recurrent = isinstance(module, (RecurrentLIF, Recurrent))
            reason = RECURRENCE if is_recurrent else f"layers that can be: {known}, and some neurons of other libraries"
            raise ValueError(f"can't be represented in NIR; {reason}")
        if len(inputs) != 1 or len(n.args) + len(n.kwargs) != 1:
            count = len(n.args) + len(n.kwargs)
            got = f"{count} arguments" if count != 1 else "a value that no layer computes"
            raise ValueError(f"must have one argument, the output of a layer or the sum of such outputs, got {got}")
        if kind is Converted:
            self.calls = []
            vars(module)["lif"] = partial(self._record_lif_call, module)
        flow = inputs[0]
        if isinstance(module, (_ConvNd, nn.AvgPool2d, _BatchNorm)):
            _check_batch_dims(module, flow)  # whose error, unlike torch's, has the remedy
        value = super().run_node(n)
        if not isinstance(value, Tensor):
            hint = f"; use {_in_place_of(module)} in its place, which returns one" if kind is Converted else ""
            raise ValueError(f"must return one tensor, got {type(value).__name__}{hint}")
        if kind in (Converted, Delay) or isinstance(module, NeuronLayer):
            self._keep_time_dim(module, flow)
        for suffix, node in self.layers[kind](module, flow).items():
            name = n.graph._graph_namespace.create_name(n.name + suffix, None) if suffix else n.name
            flow = self._add_node(name, node, flow, value.shape[flow.leading :])
        self.flows[n] = flow
        return value

    def _record_lif_call(self, layer: Converted, x_seq: Tensor, **options: Any) -> Any:
        """Calls `lif` for a converted layer, and records the options."""
        self.calls.append(options)
        return type(layer).lif(layer, x_seq, **options)

    def _keep_time_dim(self, layer: Any, flow: _Flow) -> None:
        """Keeps the time dimension of a layer's input, with which that of later layers is compared.

        Raises ValueError if the input does not have time and batch as two dimensions, if time is neither dimension 0
        nor 1, or if it is elsewhere than in the layers before.
        """
        time_dim = getattr(layer, "time_dim", 0)
        if time_dim is None:
            mode = ", or set its step_mode to 'm'" if hasattr(layer, "step_mode") else ""
            raise ValueError(
                "must take whole sequences, [T, B, ...], but takes one step per call, or an input with time and batch "
                f"merged; use {_in_place_of(layer)} in its place{mode}"
            )
        if flow.leading != 2:
            raise ValueError(
                "must take time and batch as two dimensions, [T, B, ...], got both merged by flatten(0, 1); call "
                "unflatten(0, x_seq.shape[:2]) before this layer"
            )
        found, self.time_dim = self.time_dim, time_dim % (2 + len(flow.shape))
        wanted = "0 or 1" if found is None else f"{found}, as in the layers before"
        if self.time_dim > 1 or found not in (None, self.time_dim):
            raise ValueError(f"time must be dimension {wanted}, got time_dim {time_dim}")

    def _add_node(self, name: str, node: Any, flow: _Flow, shape: Any) -> _Flow:
        """Adds a node after the flow's sources. `shape` is the shape of its output."""
        # nir would infer wrong types for grouped convolutions and non-square kernels, and none for pooling.
        node.input_type, node.output_type = {"input": as_nir_shape(flow.shape)}, {"output": as_nir_shape(shape)}
        self.nodes[name] = node
        self.edges.extend((source, name) for source in flow.sources)
        return flow._replace(sources=(name,), shape=tuple(shape))

    def _as_array(self, value: Any, flow: _Flow | None = None) -> Any:
        """An array in the type of the model; with a flow, expanded to one value per neuron."""
        value = as_double(value) if flow is None else as_double(value).expand(flow.shape)
        return value.to(self.real).contiguous().numpy()

    def _neuron_nodes(self, layer: Any, flow: _Flow) -> dict[str, Any]:
        """The NIR nodes of a LIF or LeakyIntegrator, by suffix of their names.

        Raises ValueError for an option or a value that NIR can't represent.
        """
        if options := unknown_options(layer, _KNOWN):
            raise ValueError(f"has {options}, which to_nir can't write")
        fires, numbers = isinstance(layer, LIF), cast("dict[str, Any]", units.constants_of_layer(layer, flow.shape))
        decay = numbers.pop("decay")
        if (is_wrong := ~((decay >= 0) & (decay <= 1))).any():
            raise ValueError(f"decay must be in [0, 1], got {first_wrong(decay, is_wrong)}")
        leaks = not (decay == 1).all()
        if leaks and (decay == 1).any():  # their tau would be infinite
            raise ValueError(f"decay must be 1 for all neurons or for none, got {range_of(decay)}")
        unit, per_step = (1 - decay, 1.0) if leaks else (decay, self.dt)
        if fires:
            others = {  # what readers do instead that do not use the metadata
                "reset the potential to v_rest": layer.v_reset is None,
                f"ignore v_min={layer.v_min}": layer.v_min is not None,
                "emit at most one spike per step": layer.levels != 1
                and (layer.multi_spike or layer.levels is not None),
            }
            if not self.allow_soft_reset and (instead := [each for each, differs in others.items() if differs]):
                got = "a soft reset (v_reset=None)" if layer.v_reset is None else f"v_min={layer.v_min}"
                raise ValueError(
                    f"has {got}, which NIR's neurons do not have; to_nir(..., allow_soft_reset=True) stores it in the "
                    "metadata, which asgl_cuda.from_nir reads, but most other readers then "
                    + " and ".join(filter(None, (", ".join(instead[:-1]), instead[-1])))
                )
            if not layer.input_gain > 0:
                raise ValueError(f"input_gain must be > 0, got {layer.input_gain}")
            numbers = {name: value * unit for name, value in numbers.items()} | {"r": 1 / per_step}
        else:
            pairs = {
                "v_rest and no leak (decay 1)": layer.v_rest and not leaks,
                "v_rest and delay": layer.v_rest and layer.delay,
                "stateful=True and delay=True": layer.stateful and layer.delay,
            }
            if pair := next((pair for pair, there in pairs.items() if there), None):
                raise ValueError(f"has {pair}, which can't be represented together in NIR")
            numbers = {"r": numbers["input_gain"] / unit / per_step, "v_leak": numbers["v_rest"]}
        numbers |= {"tau": self.dt / unit, "v_leak": numbers.get("v_leak", 0.0)} if leaks else {}
        kind = getattr(self.nir, ("LI" if leaks else "I") + ("F" if fires else ""))
        node = kind(
            **{name: self._as_array(value, flow) for name, value in numbers.items() if leaks or name != "v_leak"}
        )
        node.metadata = {KEY: units.metadata_of(layer, self.dt)}
        if fires and layer.scale_output:
            return {"": node, "_scale": self.nir.Scale(self._as_array(units.spike_heights(layer, flow.shape)))}
        return {"": node} if fires or not layer.delay else {"": node, "_delay": self._delay_node(1, flow)}

    def _converted_nodes(self, layer: Converted, flow: _Flow) -> dict[str, Any]:
        """The NIR nodes of a converted layer, from the options of its call of `lif`."""
        call = self.calls[0] if len(self.calls) == 1 else {}
        if layer.settings.spike is None:
            raise ValueError(
                "does not fire, and to_nir writes neurons of other libraries only if they fire; use "
                f"{_in_place_of(layer)} in its place"
            )
        if not layer.takes_input_directly or not call:
            raise ValueError(
                "has a synaptic current, which to_nir writes only for asgl_cuda's own layers; use "
                f"{_in_place_of(layer)} in its place"
            )
        only_ours = {
            "several spikes per step": layer.multi_spike or call.get("levels") is not None,
            "a lower limit of the potential": call.get("v_min") is not None,
        }
        if got := " and ".join(name for name, there in only_ours.items() if there):
            raise ValueError(
                f"has {got}, which to_nir writes only for asgl_cuda's own layers; use {_in_place_of(layer)} in its "
                "place, and to_nir(..., allow_soft_reset=True)"
            )
        if unknown := call.keys() - _KNOWN_OF_CALLS:
            raise ValueError(f"has {', '.join(sorted(unknown))}, which to_nir can't write for converted layers")

        def per_neuron(name: str, default: float = 0.0) -> Tensor:
            """An option of the call, as float64 of the neurons' shape."""
            value = as_double(call.get(name, default))
            return value.reshape(value.shape[-len(flow.shape) :]).expand(flow.shape)

        decay, gain = per_neuron("decay"), per_neuron("input_gain", 1.0)
        soft, scaled = call["v_reset"] is None, "scale_output" in call
        v_rest = per_neuron("v_rest") + (per_neuron("input_bias") / (1 - decay)).nan_to_num(0.0)
        numbers = {"decay": decay, "v_threshold": (per_neuron("v_threshold") - v_rest) / gain}
        amount = per_neuron("v_threshold" if call.get("reset_amount") is None else "reset_amount") / gain
        if not soft:
            numbers["v_reset"] = (per_neuron("v_reset") - v_rest) / gain
        elif not torch.equal(amount, numbers["v_threshold"]):
            numbers["reset_amount"] = amount
        options = {"strict_threshold": layer.settings.spike.strict, "scale_output": scaled}
        same = units.layer_with_constants(LIF, numbers, **options, **({"v_reset": None} if soft else {}))
        return self._neuron_nodes(same, flow)

    def _delay_node(self, steps: Any, flow: _Flow) -> Any:
        """A NIR node that delays by a number of steps."""
        node = self.nir.Delay((self.dt * as_double(steps).expand(flow.shape)).numpy())
        node.metadata = {KEY: {"dt": self.dt}}
        return node

    def _weight_nodes(self, layer: Any, flow: _Flow) -> dict[str, Any]:
        """The NIR node of a linear layer or convolution."""
        dims, sizes = layer.weight.dim() - 2, {}
        kind = (self.nir.Affine, self.nir.Conv1d, self.nir.Conv2d)[dims]
        if dims:
            if layer.padding_mode != "zeros":
                raise ValueError(f"padding_mode must be zeros, got {layer.padding_mode}")
            sizes = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
            sizes["input_shape"] = flow.shape[1:]
            sizes = {
                name: size[0] if dims == 1 and size not in ("same", "valid") else size for name, size in sizes.items()
            }
            sizes["groups"] = layer.groups
        elif len(flow.shape) != 1:
            got = f"{len(flow.shape)} in shape {list(flow.shape)} (without time and batch)"
            raise ValueError(f"its input must have one dimension of neurons, as NIR's Affine takes it, got {got}")
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias  # readers expect a bias
        node = kind(weight=self._as_array(layer.weight), bias=self._as_array(bias), **sizes)
        node.metadata = {KEY: {"bias": False}} if layer.bias is None else {}
        return {"": node}

    def _pool_nodes(self, layer: nn.AvgPool2d, flow: _Flow) -> dict[str, Any]:
        """The NIR node of a pooling."""
        sums = layer.divisor_override == 1
        sizes = [
            as_nir_shape(nn.modules.utils._pair(size)) for size in (layer.kernel_size, layer.stride, layer.padding)
        ]
        counted = sums or layer.count_include_pad or not sizes[2].any()
        if layer.divisor_override not in (1, None):
            raise ValueError(f"divisor_override must be None or 1, got {layer.divisor_override}")
        options = {"ceil_mode=True": layer.ceil_mode, "count_include_pad=False with padding": not counted}
        if any(options.values()):
            got = " and ".join(name for name, there in options.items() if there)
            raise ValueError(f"has {got}, which NIR's poolings do not have")
        return {"": (self.nir.SumPool2d if sums else self.nir.AvgPool2d)(*sizes)}

    def _flatten_nodes(self, layer: nn.Flatten, flow: _Flow) -> dict[str, Any]:
        """The NIR node that flattens dimensions of a sample."""
        leading = 1 if getattr(layer, "step_mode", "s") == "m" else flow.leading
        start, end = (dim % (leading + len(flow.shape)) - leading for dim in (layer.start_dim, layer.end_dim))
        if start < 0:
            raise ValueError(f"must not flatten time or batch: start_dim must be >= {leading}, got {layer.start_dim}")
        end = -1 if end == len(flow.shape) - 1 else end
        return {"": self.nir.Flatten(input_type={"input": as_nir_shape(flow.shape)}, start_dim=start, end_dim=end)}

    def _normalisation_nodes(self, norm: Any, flow: _Flow) -> dict[str, Any]:
        """The NIR node of a normalisation in evaluation mode. Its weights are float64 until `finished_graph`."""
        mean, (channels, *sizes), scale = norm.running_mean, flow.shape, getattr(norm, "input_scale", 1.0)
        if mean is None:
            raise ValueError("must have running statistics, to be written as weights, got track_running_stats=False")
        if len(mean) != channels:
            got = f"{channels} in shape {list(flow.shape)} (without time and batch)"
            raise ValueError(f"its input must have {len(mean)} channels, got {got}")
        if len(sizes) > 2:
            got = f"{len(sizes)} in shape {list(flow.shape)} (without time and batch)"
            raise ValueError(f"its input must have at most 2 dimensions after the channels, got {got}")
        real = torch.float64
        gain, shift, mean = normalisation_coefficients(
            mean, norm.running_var, norm.weight, norm.bias, norm.eps, scale, real
        )
        weight, bias = gain.diag().reshape(channels, channels, *[1] * len(sizes)).numpy(), (shift - gain * mean).numpy()
        if not sizes:
            node = self.nir.Affine(weight, bias)
        else:  # not grouped: few readers support groups
            one = len(sizes) == 1
            node = (self.nir.Conv1d if one else self.nir.Conv2d)(sizes[0] if one else sizes, weight, 1, 0, 1, 1, bias)
        node.metadata = {KEY: {"normalises": True}}
        return {"": node}

    def finished_graph(self) -> Any:
        """The graph, after folding each normalisation into the weights before it, if there are any."""
        for name, node in list(self.nodes.items()):
            if "normalises" not in node.metadata.get(KEY, {}):
                continue
            before = [source for source, target in self.edges if target == name]
            users = [target for source, target in self.edges if source in before]
            weights, weight, bias = self.nodes[before[0]], as_double(node.weight), as_double(node.bias)
            if len(before) == 1 and users == [name] and hasattr(weights, "weight"):
                gain = weight.flatten(1).diagonal()
                weight, bias = as_double(weights.weight), as_double(weights.bias) * gain + bias
                weight = weight * gain.reshape(-1, *[1] * (weight.dim() - 1))
                edges = [edge for edge in self.edges if edge[1] != name]
                self.edges = [(before[0] if source == name else source, target) for source, target in edges]
                del self.nodes[name]
                node = weights
            node.weight, node.bias, node.metadata = self._as_array(weight), self._as_array(bias), {}
        return self.nir.NIRGraph(self.nodes, self.edges)


def _check_batch_dims(layer: Any, flow: _Flow) -> None:
    """Raises ValueError unless the input has the leading dimensions that the layer takes, and as many more."""
    is_norm = isinstance(layer, _BatchNorm)
    dims = len(flow.shape) if is_norm else 3 if isinstance(layer, nn.AvgPool2d) else layer.weight.dim() - 1
    separate = getattr(layer, "step_mode", "s") == "m"
    wanted = "time and batch separate, [T, B, ...]," if separate else "time and batch merged, [T·B, ...],"
    if flow.leading != 1 + separate or len(flow.shape) != dims:
        mode = "in step mode 'm' its" if separate else "its"
        hint = "; wrap the layer in asgl_cuda.OverTime" if flow.leading > 1 and not separate else ""
        found, start = ("separate", "T, B") if flow.leading > 1 else ("merged", "T·B")
        got = f"them {found} and {len(flow.shape)} more, [{', '.join([start, *map(str, flow.shape)])}]"
        more = f"{dims} more dimension{'s' * (dims > 1)}"
        raise ValueError(f"{mode} input must have {wanted} and {more}, got {got}{hint}")
