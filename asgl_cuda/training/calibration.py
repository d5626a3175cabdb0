"""`calibrate`: scales weights, layer by layer, until the neurons after them fire at a given rate.

Related: layer-sequential unit-variance initialisation (Mishkin, Matas: All You Need Is a Good Init, ICLR 2016), with a
measured variance, and fluctuation-driven initialisation (Rossbroich, Gygax, Zenke, 2022), with assumed rates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from ..checks import arguments_of, format_value, raise_explained, read_number
from ..interop import convert, unfuse
from ..interop.convert import Left, copy_model
from ..interop.converted import bare_class
from ..neurons.batch_norm_lif import BatchNormLIF
from ..states import reset
from .layers import asgl_layers, require_asgl_layers
from .monitor import table_lines

_CALLER = "asgl_cuda.calibrate"
_TOLERANCE = 0.01  # tolerance relative to the rate
_MORE_RUNS = 5  # runs beyond one per layer, for layers called several times and inputs not linear in the weight
_WIDEST = 12  # factors from 2^-12 to 2^12 are tried; larger ones would scale rounding errors
_NARROWEST = 2**-14  # width in log2(factor) at which bisection ends: the rate jumps there by more than the tolerance
NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, BatchNormLIF)


class CalibratedLayer(NamedTuple):
    """A calibrated layer of neurons: its name, its firing rates, and the name and the factor of the scaled weight."""

    layer: str
    weight: str
    rate_before: float
    rate_after: float
    factor: float


class Calibration(NamedTuple):
    """The layers that `calibrate` has set, in order of execution, and those that did not run. `print` shows a table."""

    layers: list[CalibratedLayer]
    left: list[Left]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "weight", "rate before", "after", "factor")]
        rows += [(row[0] or "(the model)", row[1], *(f"{value:.4g}" for value in row[2:])) for row in self.layers]
        left = [f"{row.path or '(the model)'}: {row.layer}, left: {row.reason}" for row in self.left]
        return "\n".join([*table_lines(rows, "<<>>>"), *left])


def calibrate(model: nn.Module, x_seq: Any, rate: float = 0.2) -> Calibration:
    """Scales weights until each layer of spiking neurons fires at `rate` on one batch.

    Without `calibrate`, the deeper layers of a network that has no normalisation are often silent at first, and then
    learn late or not at all. Call `calibrate` once, before the first step of the optimizer, and after `convert` if you
    use it. `calibrate` scales the weight of the linear layer or convolution before the neurons, also if views, pooling,
    dropout or synaptic currents lie in between. If a normalisation lies in between, or is part of a `BatchNormLIF`,
    `calibrate` scales the weight of the normalisation instead. Nothing else of the model changes.

    Rates are measured on a copy of the model. In this copy neurons start at rest and emit spikes without noise, and
    dropout is off. Normalisations in training mode use the statistics of the batch.

    Args:
        model: any module that runs all time steps in one call and has spiking layers of asgl_cuda, or converted ones.
            If the model is in DistributedDataParallel, every process must call `calibrate`, with its own batch.
        x_seq: a batch, as the model takes it. If the model takes several arguments, pass a tuple of them.
        rate: fraction of elements with a spike, in (0, 1). An element is one neuron of one sample at one time step. The
            rate is reached to within 1 % of `rate`, or to within one spike of the batch if that is more. If only some
            rates are possible, for example because the input has few distinct values, `calibrate` takes the nearest of
            them, which must lie between `rate / 2` and `2 * rate`.

    Returns the layers in order of execution, each with its rates before and after and the factor of its weight, and the
    layers that did not run.

    Raises ValueError, which names the layer, if no single weight scales the input of the layer, if this weight is
    shared, parametrised or frozen, if no factor of the weight gives this rate, or if the rate depends on earlier calls.
    Also raises ValueError if `rate` is outside of (0, 1), if the model has no spiking layers, or if the model does not
    take `x_seq`. Raises TypeError if `model` is not a module, and RuntimeError if it can't be copied. After an error
    the model is unchanged.

    Example::

        net = nn.Sequential(nn.Linear(64, 128), LIF(), nn.Linear(128, 128), LIF(), nn.Linear(128, 10))
        print(asgl_cuda.calibrate(net, x_seq))
    """
    require_asgl_layers(model, _CALLER)
    if isinstance(rate, Tensor) and rate.numel() != 1:
        raise ValueError(
            f"{_CALLER}: rate must be a float, got {format_value(rate)}; pass several inputs of the model as a tuple"
        )
    rate = read_number("rate", rate, _CALLER)
    if not 0 < rate < 1:
        raise ValueError(f"{_CALLER}: rate must be in (0, 1), got {rate}")
    group = None
    while (is_shared := isinstance(model, nn.parallel.DistributedDataParallel)) or "_orig_mod" in model._modules:
        group = model.process_group if is_shared else group
        model = model.get_submodule("module" if is_shared else "_orig_mod")
    with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        trial = _Trial(model, arguments_of(x_seq), rate, group)
        with _explaining_model_errors(x_seq):
            before = trial.run()
        trial.measure_biases(before)
        for _ in range(len(before) + _MORE_RUNS):
            scaled = trial.scaled
            after = trial.run()
            if trial.scaled == scaled:
                break
    for site in before:
        if not trial.is_reached(site, after.get(site, math.nan)):
            seen = f"{after.get(site)} at the factor {site.factor:.3g}, and another one in other runs"
            raise trial.unreachable_rate_error(site, seen)
    for site in before:
        with torch.no_grad():
            model.get_parameter(site.weight).mul_(site.factor)
    layers = [CalibratedLayer(each.layer, each.weight, before[each], after[each], each.factor) for each in before]
    others = {layer: name for layer, name in trial.neurons.items() if name not in {site.layer for site in before}}
    return Calibration(
        layers, [Left(name, bare_class(layer).__name__, "not run by this input") for layer, name in others.items()]
    )


@contextmanager
def _explaining_model_errors(x_seq: Any) -> Iterator[None]:
    """Turns an error of the model's first call into a ValueError that says what x_seq must be."""
    try:
        yield
    except Exception as error:
        hint = "; for a batch (x, y), pass x alone" if isinstance(x_seq, (list, tuple)) else ""
        expected = f"{_CALLER}: x_seq must be what the model takes, a tuple for several arguments"
        raise_explained(error, expected, [x_seq], hint=hint)


class _Site:
    """A layer of neurons and the weight before it, by name. A layer called several times may have several weights."""

    def __init__(self, layer: str, weight: str, rate: float) -> None:
        self.layer, self.weight, self.factor = layer, weight, 1.0
        self.found, self.tolerance = rate, 0.0  # the nearest rate found, and its tolerance
        self.calls: list[Any] = []  # the calls of a run: layer, input, other arguments, output
        self.biases: list[Tensor] = []  # inputs of the neurons if the weight were 0
        self.since = 0  # number of scalings in all runs before the first call of this run


class _Trial:
    """A copy of the model that is run repeatedly, to find the factors of the weights."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], rate: float, group: Any) -> None:
        self._read_parameters(model)
        self._model, _ = unfuse(copy_model(model, _CALLER), inplace=True)
        for name in dict(asgl_layers(model)).keys() - dict(asgl_layers(self._model)).keys():
            convert(self._model.get_submodule(name), inplace=True)  # unfuse has reverted it
        for mine, other in zip(self._model.eval().modules(), model.modules(), strict=True):
            if isinstance(mine, NORMALISATIONS):
                mine.training = other.training
        self._parameters = dict(self._model.named_parameters())
        self._names = {id(value): name for name, value in self._parameters.items()}
        for value in self._parameters.values():
            value.requires_grad_(value.is_floating_point())
        self.neurons = {layer: name for name, layer in require_asgl_layers(self._model, _CALLER).items()}
        for layer in self.neurons:
            layer.analog_prob = 0.0
        self._inputs, self._rate, self._group = inputs, rate, group
        self._sites: dict[tuple[str, str], _Site] = {}
        self.scaled = 0  # number of scalings
        self._layers: dict[str, str] = {}  # names of layers by weight

    def _read_parameters(self, model: nn.Module) -> None:
        """Collects the weights, and the reasons why some parameters can't be scaled, by name."""
        self._weights: dict[str, Tensor] = {}
        self._problems: dict[str | None, str] = {}
        owners: dict[int, str] = {}
        for path, module in model.named_modules():
            for name, value in module.named_parameters(path, recurse=False):
                if is_lazy(value):
                    raise ValueError(f"{_CALLER}: {name} has no shape yet: call the model once before")
                if name.endswith("weight") and (value.dim() > 1 or isinstance(module, NORMALISATIONS)):
                    self._weights[name] = value
                if value.is_inference():
                    self._problems[name] = "made in inference mode"
                elif not value.requires_grad or hasattr(value, "to_local"):
                    self._problems[name] = "sharded" if hasattr(value, "to_local") else "frozen"
                elif value.numel() and (first := owners.setdefault(value.data_ptr(), name)) != name:
                    self._problems |= {first: f"shared with {name}", name: f"shared with {first}"}

    def _set_factor(self, site: _Site, factor: float) -> None:
        """Sets the weight to its original value times the factor."""
        with torch.no_grad():
            self._parameters[site.weight].copy_(self._weights[site.weight] * factor)

    def run(self) -> dict[_Site, float]:
        """Runs the model from rest, and returns the firing rates by site, in order of execution.

        After `measure_biases`, also scales weights on the way. The rate of a site whose weight this run scales is that
        before scaling.
        """
        for site in self._sites.values():
            site.calls = []
        reset(self._model)
        torch.clear_autocast_cache()  # the cache holds casts of earlier weights
        devices = {value.device.index for value in self._parameters.values() if value.is_cuda}
        with ExitStack() as hooks, torch.random.fork_rng(devices):  # every run draws the same random numbers
            for layer in self.neurons:  # removed after the run, because they would be reference cycles
                hooks.callback(layer.register_forward_hook(self._record_call, with_kwargs=True, prepend=True).remove)
            self._model(*_start_new_graphs(self._inputs))
        sites = [site for site in self._sites.values() if site.calls]
        return {site: self._rate_of(site, [call[-1] for call in site.calls]) for site in sites}

    def measure_biases(self, sites: Iterable[_Site]) -> None:
        """Runs the model with the weights of these sites at 0, and then restores the weights.

        Stores in `site.biases` the inputs that the neurons got, which are those from biases alone.
        """
        for site in sites:
            self._set_factor(site, 0.0)
        self.run()
        for site in sites:
            self._set_factor(site, 1.0)
            site.biases = [x for _, x, *_ in site.calls]

    def _record_call(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook of neurons that records the call. The output that it returns replaces that of the call.

        After `measure_biases`, the last call of the layer in a run also scales its weight, if no weight was scaled
        since its first call.
        """
        given = inspect.signature(layer.forward).bind(*args, **kwargs)
        x, residual = given.args[0], given.arguments.pop("residual", None)
        key = self.neurons[layer], self._scaling_weight(layer, x, residual)
        site = self._sites.setdefault(key, _Site(*key, self._rate))
        site.since = site.since if site.calls else self.scaled
        site.calls.append((layer, x.detach().clone(), given.args[1:], given.kwargs, _start_new_graphs(output)))
        is_fresh = site.since == self.scaled
        # A call is the last one of a run if there were as many calls, of the same shapes, in measure_biases. Before
        # measure_biases there are no biases to compare with, so nothing is scaled.
        is_last = [each.shape for _, each, *_ in site.calls] == [each.shape for each in site.biases]
        return self._fit_weight(site) if is_fresh and is_last else site.calls[-1][-1]

    def _fit_weight(self, site: _Site) -> Any:
        """Scales the weight until the neurons fire at the rate, and returns the last call's output for this weight."""
        outputs = [output for *_, output in site.calls]
        if self.is_reached(site, self._rate_of(site, outputs)):
            return outputs[-1]
        rates = _search_factor(
            lambda power: self._rate_of(site, self._repeat_calls(site, 2**power)), self._rate, site.tolerance / 2
        )
        best = min(rates, key=lambda power: abs(rates[power] - self._rate))
        least, most = min(rates.values()), max(rates.values())
        is_jump = least < self._rate < most and 0.5 <= rates[best] / self._rate <= 2
        if abs(rates[best] - self._rate) > site.tolerance and not is_jump:
            seen = (f"{rates[power]:.3g} at the factor {2**power:.3g}" for power in (min(rates), max(rates)))
            is_elsewhere = least < most and not least < self._rate < most
            advice = f"; rates from {least:.3g} to {most:.3g} were found" if is_elsewhere else ""
            raise self.unreachable_rate_error(site, " and ".join(seen) + advice)
        output = _start_new_graphs(self._repeat_calls(site, 2**best)[-1])
        site.factor *= 2**best
        site.found = rates[best]
        self.scaled += 1
        return output

    def _repeat_calls(self, site: _Site, factor: float) -> list[Any]:
        """The outputs of the neurons with another factor on their weight, from rest."""
        self._set_factor(site, site.factor * factor)
        outputs, parts = list[Any](), dict[int, Any]()  # new values by the id of the old ones, for calls that get them
        for layer, *_ in site.calls:
            reset(layer)
        with torch.no_grad():
            for (layer, x, *more, output), bias in zip(site.calls, site.biases, strict=True):
                args, kwargs = _pytree.tree_map(lambda value: parts.get(id(value), value), more)  # noqa: B023
                scaled = x if isinstance(layer, BatchNormLIF) else bias.lerp(x, factor)  # it applies the weight itself
                outputs.append(layer.forward(scaled, *args, **kwargs))
                parts |= zip(map(id, _pytree.tree_leaves(output)), _pytree.tree_leaves(outputs[-1]), strict=True)
        return outputs

    def _rate_of(self, site: _Site, outputs: list[Any]) -> float:
        """The fraction of elements with a spike, over all processes. Also sets the site's tolerance."""
        spikes = [next(each for each in _pytree.tree_leaves(output) if isinstance(each, Tensor)) for output in outputs]
        elements = spikes[0].new_tensor(sum(each.numel() for each in spikes), dtype=torch.int64)
        counts = torch.stack([*(each.count_nonzero() for each in spikes), elements])
        if self._group is not None:
            torch.distributed.all_reduce(counts, group=self._group)
        *fired, count = counts.tolist()
        if not count:
            raise ValueError(
                f"{_CALLER}: {self._describe(site.layer)} must get samples, got an empty output of shape "
                f"{list(spikes[0].shape)}; pass an x_seq with which every layer gets some"
            )
        site.tolerance = max(_TOLERANCE * self._rate, 1 / count)
        return sum(fired) / count  # type: ignore[no-any-return]

    def is_reached(self, site: _Site, measured: float) -> bool:
        """Whether a measured rate is the wanted one, or the nearest that was found, up to the site's tolerance."""
        return min(abs(measured - self._rate), abs(measured - site.found)) <= site.tolerance

    def unreachable_rate_error(self, site: _Site, seen: str) -> ValueError:
        """Makes the error that no factor leads to the rate. `seen` says which rates were measured."""
        return ValueError(
            f"{_CALLER}: {self._describe(site.layer)}: no factor on {site.weight} makes it fire at {self._rate:g}; the "
            f"rate is {seen}. Another rate, more varied samples, or a normalisation before these neurons may help"
        )

    def _describe(self, name: str) -> str:
        """A layer in words for errors: its path in the model, and its class."""
        return f"{name or 'the model'} ({bare_class(self._model.get_submodule(name)).__name__})"

    def _scaling_weight(self, layer: Any, x: Tensor, residual: Tensor | None) -> str:
        """The name of the only weight that scales the input of these neurons, which is theirs from now on.

        Raises ValueError if there is not exactly one, if it can't be scaled, or if other neurons have it already.
        """
        normalises = isinstance(layer, BatchNormLIF)
        if normalises and not layer.affine:
            raise ValueError(
                f"{_CALLER}: {self._describe(self.neurons[layer])} must have a weight that can be scaled, got "
                "affine=False; make it with affine=True"
            )
        paths = self._nearest_weights(x) if not normalises else {self._names[id(layer.weight)]}
        added = set() if residual is None else self._nearest_weights(residual)
        problems = self._problems | dict.fromkeys(paths & added, "also before the residual")
        paths |= added
        weight, name = next(iter(paths), None), self.neurons[layer]
        if weight is not None and len(paths) == 1 and weight not in problems:
            if (other := self._layers.setdefault(weight, name)) == name:
                return weight
            problems[weight] = f"also before {other}"
        got = ["an input without one"] if None in paths else []
        got += [f"{each} ({problems[each]})" if each in problems else f"{each}" for each in paths - {None}]
        remedy = "" if normalises else ". Put a normalisation before these neurons, or use asgl_cuda.BatchNormLIF"
        raise ValueError(
            f"{_CALLER}: {self._describe(name)}: one weight that calibrate can scale must determine its input, got "
            f"{' and '.join(sorted(got))}; such a weight belongs to a linear layer, a convolution or a normalisation, "
            "scales nothing but the input of these neurons, is not frozen, shared or parametrised, and is used where "
            f"autograd records its use{remedy}"
        )

    def _nearest_weights(self, x: Tensor) -> set[str | None]:
        """The names of the nearest weights in the graph of x; None for a path, or a graph, that has no weight."""
        found: set[str | None] = set()
        seen, waiting = set[Any](), [x.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves = {each: _leaf_of_node(each) for each, _ in node.next_functions if each is not None}
            names = {self._names.get(id(leaf)) for leaf in leaves.values() if leaf is not None}
            weights = names & self._weights.keys()
            found |= weights or names & {None}
            waiting += [] if weights else [each for each, leaf in leaves.items() if leaf is None]
        return found or {None}


def _search_factor(rate_at: Callable[[float], float], rate: float, tolerance: float) -> dict[float, float]:
    """Searches the factor by bracketing and bisection. Returns the rates measured, by log2 of the factor."""
    rates = {0.0: rate_at(0.0)}
    is_above = rates[0.0] > rate
    near, far = 0.0, -1.0 if is_above else 1.0
    rates[far] = rate_at(far)
    while (rates[far] > rate) == is_above and abs(far) < _WIDEST:
        near, far = far, max(-_WIDEST, min(2 * far, _WIDEST))
        rates[far] = rate_at(far)
    while min(abs(each - rate) for each in rates.values()) > tolerance and abs(far - near) > _NARROWEST:
        middle = (near + far) / 2
        rates[middle] = rate_at(middle)
        near, far = (middle, far) if (rates[middle] > rate) == is_above else (near, middle)
    return rates


def _start_new_graph(value: Tensor) -> Tensor:
    """The tensor detached, as the start of a new autograd graph. A tensor of integers is returned as it is."""
    is_number = value.is_floating_point() or value.is_complex()
    return value.clone().detach().requires_grad_().clone() if is_number else value  # leaves can't be changed in place


def _start_new_graphs(values: Any) -> Any:
    """Nested values in which each tensor starts a new autograd graph."""
    return _pytree.tree_map_only(Tensor, _start_new_graph, values)


def _leaf_of_node(node: Any) -> Tensor | None:
    """The leaf at the end of a chain of autograd nodes with one input each, as of a transposed weight; or None."""
    while not hasattr(node, "variable"):
        inputs = [each for each, _ in node.next_functions if each is not None]
        if len(inputs) != 1:
            return None
        (node,) = inputs
    return node.variable  # type: ignore[no-any-return]
