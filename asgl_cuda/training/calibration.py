"""`calibrate`: scales weights, layer by layer, until the neurons behind them fire at a given rate.

Related: layer-sequential unit-variance initialisation (Mishkin, Matas: All You Need Is a Good Init, ICLR 2016), with a
measured variance, and fluctuation-driven initialisation (Rossbroich, Gygax, Zenke, 2022), with assumed rates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from ..checks import read_number
from ..interop.convert import Left, copied, libraries
from ..interop.converted import STATEFUL, bare_class
from ..layer import some_asgl_layers
from ..neuron import LIF, BatchNormLIF
from ..pending import Pending
from .kit import reset
from .monitor import aligned

_CALLER = "asgl_cuda.calibrate"

_TOLERANCE = 0.01  # relative to the rate
_ROUNDS = 3
_WIDEST = 24  # factors from 2^-24 to 2^24 are tried
_NARROWEST = 2**-14  # an interval of log2(factor); a rate that changes in it by more than the tolerance jumps

_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class CalibratedLayer(NamedTuple):
    """A layer of neurons: name, weight in front, firing rate before and after, and factor."""

    layer: str
    weight: str
    rate_before: float
    rate_after: float
    factor: float


class Calibration(NamedTuple):
    """The layers set by `calibrate`, in order of execution, and the layers left. `print` shows a table."""

    layers: list[CalibratedLayer]
    left: list[Left]

    def __str__(self) -> str:
        rows = [("layer", "weight", "rate before", "after", "factor")]
        rows += [
            (row.layer or "(the model)", row.weight, f"{row.rate_before:.4f}", f"{row.rate_after:.4f}",
             f"{row.factor:.4g}")
            for row in self.layers
        ]  # fmt: skip
        left = [f"{row.path or '(the model)'}: {row.layer}, left: {row.reason}" for row in self.left]
        return "\n".join([*aligned(rows, "<<>>>"), *left])


def calibrate(model: nn.Module, x_seq: Any, rate: float = 0.2) -> Calibration:
    """Scales the weights in front of the neurons, from one batch, until each layer fires at `rate`.

    For networks without normalisation, whose deeper layers are otherwise silent at first and learn nothing. Call once,
    after construction or conversion of the model and before the optimizer's first step. Biases, thresholds and widths
    stay. The scaled weight belongs to the linear layer or convolution in front of the neurons, through views, pooling,
    dropout and currents, or to a normalisation in between, also in `BatchNormLIF`.

    Args:
        model: any module with firing layers of asgl_cuda or converted ones, running all time steps in one call. A model
            in DistributedDataParallel is calibrated on the batches of all processes, each of which must call.
        x_seq: a batch as the model takes it; a tuple is its positional arguments.
        rate: share of neurons and steps with a spike, in (0, 1), reached to within 1% of `rate`; less exactly if
            few distinct inputs let the rate rise only in larger steps.

    Rates are measured on copies, with the model's hooks, with hard spikes, without dropout, from rest. Normalisations
    use batch statistics in training mode, else running statistics. Only the scaled weights of the model change:
    potentials, running statistics, training mode, `analog_prob` and random number generators stay.

    Returns:
        The layers in order of execution with rates before and after and factors, and the layers left: not run by this
        input, or unconverted neurons of another library. `print` shows a table.

    Raises:
        ValueError: a layer that no factor can bring to `rate`: behind several paths, without a weight in front, with a
            shared, parametrised or frozen weight, out of reach, or with a rate that depends on earlier calls. The
            message names the layer; the model is unchanged.
        TypeError: no module, or a rate that is no number.
        RuntimeError: the model can't be copied.

    Example::

        net = nn.Sequential(nn.Linear(64, 128), LIF(), nn.Linear(128, 128), LIF(), nn.Linear(128, 10))
        print(asgl_cuda.calibrate(net, x_seq))
    """
    some_asgl_layers(model, _CALLER)
    rate = read_number("rate", rate, _CALLER)
    if not 0 < rate < 1:
        raise ValueError(f"{_CALLER}: rate must be in (0, 1), got {rate}")
    model, group = _unwrapped(model)
    inputs = x_seq if isinstance(x_seq, tuple) else (x_seq,)
    with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        trial = _Trial(model, inputs, group)
        before = trial.run()
        factors = dict.fromkeys(before, 1.0)
        for _ in range(_ROUNDS):  # a weight may also be in front of earlier layers
            for site in factors:
                factors[site] *= trial.factor_for(site, rate)
            after = trial.run()
            if all(abs(after[site] - trial.found[site]) <= trial.tolerance(site, rate) for site in factors):
                break
        # In a fresh copy, as the model's next call.
        after = _Trial(model, inputs, group).run(factors=factors)
    for site in factors:
        if after.get(site) is None or abs(after[site] - trial.found[site]) > 5 * trial.tolerance(site, rate):
            raise ValueError(
                f"{_CALLER}: {site.layer or 'the model'}: fires at {after.get(site, math.nan):.3g} and not at {rate:g} "
                "when the model runs again: its rate must not depend on earlier calls or on the layers behind it"
            )
    weights = dict(model.named_parameters())
    layers = []
    with torch.no_grad():
        for site, factor in factors.items():
            layers.append(CalibratedLayer(*site, before[site], after[site], factor))
            if factor != 1:
                weights[site.weight].mul_(factor)
    run = {site.layer for site in factors}
    left = [
        Left(name, bare_class(layer).__name__, "not run by this input")
        for layer, name in trial.neurons.items()
        if name not in run
    ]
    left += [Left(name, type(layer).__name__, "not converted") for layer, name in trial.foreign.items()]
    return Calibration(layers, left)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model inside DistributedDataParallel and torch.compile, and its process group."""
    group = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            group, model = model.process_group, model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model, group


class _Site(NamedTuple):
    """Names of neurons and of the weight in front; a layer with several calls may have several."""

    layer: str
    weight: str


class _Finished(Exception):  # noqa: N818  # not an error
    """Ends a run after the last call of the measured layer."""


class _Trial:
    """A copy of the model with trial weights."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], group: Any) -> None:
        try:
            self._model = copied(model)
        except Exception as error:  # raised by a user's __deepcopy__
            raise RuntimeError(
                f"{_CALLER}: measures on a copy of the model, which can't be copied: {type(error).__name__}: {error}"
            ) from error
        self._inputs, self._group = inputs, group
        self._devices = sorted({value.device.index for value in self._model.parameters() if value.is_cuda})
        self._name_parameters(model)
        self._set_modes(model)
        self.neurons = {layer: name for name, layer in some_asgl_layers(self._model, _CALLER).items()}
        for layer in self.neurons:
            layer.analog_prob = 0.0
        self.foreign = {layer: name for name, layer in self._model.named_modules() if self._is_foreign(layer)}
        for layer in self.foreign:
            layer.register_forward_hook(lambda layer, args, output: _pytree.tree_map_only(Tensor, _source, output))
        self._calls: dict[_Site, int] = {}  # per full run, to end shorter runs
        self._elements: dict[_Site, int] = {}
        self.found: dict[_Site, float] = {}  # rates reached
        self._until: _Site | None = None

    def _is_foreign(self, layer: nn.Module) -> bool:
        """Whether the layer is a library's unconverted neuron: its graph is not followed."""
        found = (library.find(layer) for library in libraries()) if layer not in self.neurons else ()
        return any(answer not in (None, STATEFUL) for answer in found)

    def _name_parameters(self, model: nn.Module) -> None:
        """Collects names of parameters, weights, and reasons why some can't be scaled."""
        self._names: dict[int, str] = {}
        self._parameters = dict(self._model.named_parameters())
        self._problems: dict[str, str] = {}
        owned: dict[int, tuple[nn.Module, str]] = {}  # owner and name
        owners: dict[int, str] = {}  # by address, since deep copies share no memory
        for name, value in model.named_parameters():
            if is_lazy(value):
                raise ValueError(f"{_CALLER}: {name} has no shape yet: call the model once before")
            if not value.requires_grad:
                self._problems[name] = f"{name}, which is frozen (requires_grad=False)"
            elif value.is_inference():
                self._problems[name] = f"{name}, which was made in inference mode and can't be changed"
            elif hasattr(value, "to_local"):
                self._problems[name] = f"{name}, which is sharded: calibrate before fully_shard"
            elif value.numel() and (first := owners.setdefault(value.data_ptr(), name)) != name:
                self._problems |= dict.fromkeys((first, name), f"{first}, which shares memory with {name}")
        for name, value in self._parameters.items():
            self._names[id(value)] = name
            value.requires_grad_(value.is_floating_point())
        self._weights: set[int] = set()
        for module in self._model.modules():
            own = dict(module.named_parameters(recurse=False))
            for name, value in own.items():
                first = self._names[id(value)]
                if (module, name) != owned.setdefault(id(value), (module, name)):
                    self._problems[first] = f"{first}, which several modules share"
            weight = own.get("weight")
            if weight is not None and (weight.dim() > 1 or isinstance(module, (*_NORMALISATIONS, BatchNormLIF))):
                self._weights.add(id(weight))

    def _set_modes(self, model: nn.Module) -> None:
        """Evaluation, with normalisations in their own modes."""
        self._model.eval()
        for mine, other in zip(self._model.modules(), model.modules(), strict=True):
            if isinstance(mine, (*_NORMALISATIONS, BatchNormLIF)):
                mine.training = other.training

    def run(self, until: _Site | None = None, factors: Mapping[_Site, float] | None = None) -> dict[_Site, float]:
        """Runs the model from rest and returns the rates.

        Ends after the last call of `until`, if given. `factors` scale the weights first.
        """
        for site, factor in (factors or {}).items():
            with torch.no_grad():
                self._parameters[site.weight].mul_(factor)
        self._tallies: dict[_Site, list[Tensor]] = {}
        self._sites: dict[nn.Module, _Site] = {}
        self._until = until
        reset(self._model)
        torch.clear_autocast_cache()  # holds casts of earlier trial weights
        with ExitStack() as hooks, suppress(_Finished), torch.random.fork_rng(self._devices):  # the same random numbers
            for layer in self.neurons:  # hooks that stay would be reference cycles
                hooks.callback(layer.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(self._after).remove)
            self._model(*_pytree.tree_map_only(Tensor, _source, self._inputs))
        if until is None:
            self._calls = {site: len(tally) for site, tally in self._tallies.items()}
        return {site: self._rate(site, torch.stack(tally).sum(0)) for site, tally in self._tallies.items()}

    def _rate(self, site: _Site, counts: Tensor) -> float:
        """The rate from counts of spikes and elements, over all processes."""
        if self._group is not None:
            torch.distributed.all_reduce(counts, group=self._group)
        spikes, elements = counts.tolist()
        if not elements:
            raise ValueError(f"{_CALLER}: {site.layer or 'the model'}: x_seq must have samples, got an empty output")
        self._elements[site] = elements
        return spikes / elements  # type: ignore[no-any-return]

    def tolerance(self, site: _Site, rate: float) -> float:
        """The tolerance of the rate: 1% of `rate`, or one spike."""
        return max(_TOLERANCE * rate, 1 / self._elements[site])

    def _before(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(iter(inspect.signature(layer.forward).parameters), "")
        x, residual = args[0] if args else kwargs.get(first), kwargs.get("residual")
        norm = layer if isinstance(layer, BatchNormLIF) else x.norm if isinstance(x, Pending) else None
        if isinstance(x, Pending):
            residual, x = x.residual, x.x
        elif isinstance(layer, LIF) and len(args) > 1:
            residual = args[1]
        self._sites[layer] = _Site(self.neurons[layer], self._weight_of(layer, norm, x, residual))

    def _after(self, layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        site = self._sites[layer]
        s_seq = next(value for value in _pytree.tree_leaves(output) if isinstance(value, Tensor))
        counts = [s_seq.count_nonzero(), s_seq.new_tensor(s_seq.numel(), dtype=torch.int64)]
        self._tallies.setdefault(site, []).append(torch.stack(counts))
        if site == self._until and len(self._tallies[site]) == self._calls[site]:
            raise _Finished
        return _pytree.tree_map_only(Tensor, _source, output)

    def _weight_of(self, layer: Any, norm: Any, x: Tensor | None, residual: Tensor | None) -> str:
        """The name of the only weight that scales the input of these neurons, up to biases."""
        name = self.neurons[layer] or "the model"
        if norm is not None:
            if norm.weight is None:
                raise ValueError(f"{_CALLER}: {name}: its normalisation has no weight to be scaled (affine=False)")
            found, bare = {self._names[id(norm.weight)]}, False
        elif not isinstance(x, Tensor) or x.grad_fn is None:
            raise ValueError(
                f"{_CALLER}: {name}: its input must come with its graph, got one that torch.no_grad(), detach() or "
                "reentrant checkpointing cut off"
            )
        else:
            found, bare = self._weights_behind(x)
        if residual is not None:
            others, is_bare = self._weights_behind(residual) if residual.grad_fn is not None else (set(), True)
            found, bare = found | others, bare or is_bare
        if not found:
            raise ValueError(
                f"{_CALLER}: {name}: there must be a linear layer, a convolution or a normalisation with a weight in "
                "front of it, got none (parametrised weights are none)"
            )
        if bare or len(found) > 1:
            branches = " and ".join([*sorted(found), *(["a path without weight"] if bare else [])])
            raise ValueError(
                f"{_CALLER}: {name}: its input must have one weight, got several paths: {branches}. A "
                "normalisation in front of it, such as asgl_cuda.BatchNormLIF, gives it one"
            )
        (weight,) = found
        if weight in self._problems:
            raise ValueError(f"{_CALLER}: {name}: in front of it is {self._problems[weight]}")
        own = self.neurons[layer]
        other = next((site for site in self._tallies if site.weight == weight and site.layer != own), None)
        if other is not None:
            raise ValueError(f"{_CALLER}: {name}: in front of it is {weight}, which is in front of {other.layer}, too")
        return weight

    def _weights_behind(self, x: Tensor) -> tuple[set[str], bool]:
        """The nearest weights in the graph of x, and whether a path without weight leads to earlier neurons."""
        found: set[str] = set()
        bare = False
        waiting: list[Any] = [x.grad_fn]
        seen: set[Any] = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            inputs = [(each, _leaf_behind(each)) for each, _ in node.next_functions if each is not None]
            weights = {id(leaf) for _, leaf in inputs if leaf is not None} & self._weights
            found |= {self._names[each] for each in weights}
            for each, leaf in inputs if not weights else []:
                if leaf is None:
                    waiting.append(each)
                elif id(leaf) not in self._names:
                    bare = True
        return found, bare

    def factor_for(self, site: _Site, rate: float) -> float:
        """The factor on the weight for this rate, applied to the copy."""
        weight = self._parameters[site.weight]
        start = weight.detach().clone()
        found: dict[float, float] = {}  # rates by log2 of the factor

        def excess(log_factor: float) -> float:
            with torch.no_grad():
                weight.copy_(start * 2**log_factor)
            found[log_factor] = self.run(site)[site]
            missed = found[log_factor] - rate
            return 0.0 if abs(missed) <= self.tolerance(site, rate) else missed

        log_factor = _root(excess)
        if log_factor is None or not rate / 2 <= found[log_factor] <= 2 * rate:
            low, high = min(found), max(found)
            seen = f"{found[low]:.3g} at the factor {2**low:.3g} and {found[high]:.3g} at {2**high:.3g}"
            if len({*found.values()}) == 1:
                seen = f"{found[low]:.3g} whatever the factor, as for a silent input or behind a normalisation"
            raise ValueError(
                f"{_CALLER}: {site.layer or 'the model'}: no factor on {site.weight} makes it fire at {rate:g}; the "
                f"rate is {seen}"
            )
        excess(log_factor)
        self.found[site] = found[log_factor]
        return float(2**log_factor)


def _root(function: Callable[[float], float]) -> float | None:
    """The root of a rising function, bracketed outwards from 0; the better side of a jump; None without sign change."""
    near, at_near = 0.0, function(0.0)
    if at_near == 0:
        return near
    far = -math.copysign(1.0, at_near)
    while (at_far := function(far)) * at_near > 0:
        near, at_near = far, at_far
        far *= 2
        if abs(far) > _WIDEST:
            return None
    halve = False
    while at_far != 0 and abs(far - near) > _NARROWEST:
        # Secants alone are slow with a flat rate on one side.
        share = 0.5 if halve else min(max(at_near / (at_near - at_far), 0.1), 0.9)
        halve = not halve
        middle = near + share * (far - near)
        at_middle = function(middle)
        if at_middle * at_near > 0:
            near, at_near = middle, at_middle
        else:
            far, at_far = middle, at_middle
    return far if abs(at_far) <= abs(at_near) else near


def _source(value: Tensor) -> Tensor:
    """The value detached, as the start of a new graph."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    leaf = value.clone() if value.is_inference() else value
    return leaf.detach().requires_grad_().clone()  # leaves can't be changed in place


def _leaf_behind(node: Any) -> Tensor | None:
    """The leaf behind nodes with one input each, as of a transposed weight."""
    while not hasattr(node, "variable"):
        inputs = [each for each, _ in node.next_functions if each is not None]
        if len(inputs) != 1:
            return None
        (node,) = inputs
    return node.variable  # type: ignore[no-any-return]
