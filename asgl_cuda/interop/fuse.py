"""`fuse` and `unfuse`: normalisations fused with the neurons behind them, and the inverse.

Graphs show the users of a module's output: for a Sequential the order of its modules, for any other module a torch.fx
trace of its forward, with the called modules as nodes. The output of a normalisation is followed from its call, out of
modules that return the output and into modules that pass the output on, to the neurons. Every call of an entered
module must have this output as its only input.

    channel dimension at the neurons = channel dimension at the normalisation + splits - joins of time and batch

One addition may be on the way: the sum is followed likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..layout import channel_dim
from ..neuron import LIF, BatchNormLIF
from .convert import Left, Replaced, Report, convert, libraries, taken
from .converted import Converted, bare_class
from .graphs import Calls, asks_for_shape, calls_of, is_first_alone, is_sequential, name_of_user, parts_time, summand
from .normalised import Normalisation, Normalised, PassedThrough, Place, join, varies_by_channel

_LISTS = (nn.ModuleList, nn.ModuleDict)  # never called


def fuse(model: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Fuses normalisations into the neurons behind: ``joined, report = asgl_cuda.fuse(model)``.

    Returns the model, a copy unless `inplace`, and a report on its normalisations.

    Known are `torch.nn.BatchNorm1d`, `2d` and `3d`, `SyncBatchNorm` and SpikingJelly's equivalents, followed by
    `asgl_cuda.LIF` or by a neuron layer that `convert` knows, which is converted. In between, time and batch may part:
    by `unflatten(0, ...)`, SpikingJelly's `SeqToANNContainer`, `tdLayer` of the code of ASGL's authors, or
    `asgl_cuda.OverTime`. See `asgl_cuda.batch_norm_lif`.

    Residual blocks: the neurons also compute the sum of the normalised value and a shortcut, by `+`, `+=`, `add` or
    `add_`, if they alone use it. Of two normalisations in a sum, the first is fused. The sum is computed apart if it
    changes the shortcut in place, or if shapes or types differ.

    No module is moved: parameters, buffers and their names, state, optimizers and checkpoints stay valid. The
    normalisation itself then returns its input, in front of a sum an object that can only be added; a normalisation
    whose output or sum has, or may have, other users is left, with the reason in the report. An operand modified in
    place before the neurons is an error, unseen under `torch.compile`. The normalisation has gradients where the
    neurons have; a branch under `torch.no_grad` or in a reentrant checkpoint, in front of a sum, is an error. Replace
    neither module of a pair, else the next call raises RuntimeError, as in replicas of `nn.DataParallel`
    (`DistributedDataParallel` works). Call `torch.nn.utils.fusion.fuse_conv_bn_eval`,
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` and the like before `fuse` or after `unfuse`;
    `asgl_cuda.convert_sync_batchnorm` also converts fused pairs.

    Only neurons that normalise are converted: call `convert` for all neurons, before or after. A forward is traced with
    its current attributes, on every branch that depends on shapes of tensors. A Sequential is assumed to call its
    modules in order, unless a trace shows otherwise.

    Args:
        model: any module.
        inplace: fuse the model instead of a copy; existing optimizers stay valid.

    Returns:
        The model, and a `Report` of the neurons that normalise and the normalisations that are left.

    Raises TypeError if `model` is no module.

    Example::

        norm = asgl_cuda.OverTime(torch.nn.BatchNorm1d(4))
        joined, report = asgl_cuda.fuse(torch.nn.Sequential(norm, asgl_cuda.LIF()))
        print(report)
        spikes = joined(torch.rand(5, 2, 4))

    The same in PyTorch: the model as it is.
    """
    model = taken(model, inplace, "asgl_cuda.fuse")
    report = Report([], [])
    norms = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    norms = {path: norm for path, norm in norms.items() if not isinstance(norm, PassedThrough)}
    if not norms:
        return model, report
    flow = _Flow(model)
    for path, norm in sorted(norms.items(), key=lambda pair: flow.is_second(pair[1])):
        try:
            layer = _fuse(flow, norm)
        except _Leave as reason:
            report.left.append(Left(path, type(norm).__name__, str(reason)))
            continue
        by = f"normalises as well, instead of {path}"
        report.replaced.append(Replaced(flow.paths[layer], bare_class(layer).__name__, by))
    return model, report


def unfuse(model: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """The inverse of `fuse`: ``model, report = asgl_cuda.unfuse(joined)``. Trained values stay.

    Args:
        model: a module returned by `fuse`, or an owner.
        inplace: change the model instead of a copy.

    Returns:
        The model, and a `Report` of both layers of each pair.

    Raises TypeError if `model` is no module.

    Example::

        norm = asgl_cuda.OverTime(torch.nn.BatchNorm1d(4))
        joined, _ = asgl_cuda.fuse(torch.nn.Sequential(norm, asgl_cuda.LIF()))
        model, report = asgl_cuda.unfuse(joined)
        print(report)
    """
    model = taken(model, inplace, "asgl_cuda.unfuse")
    report = Report([], [])
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Normalised):
            name = type(layer).__name__
            layer.end_normalised()
            report.replaced.append(Replaced(path, name, type(layer).__name__))
    for path, norm in model.named_modules():
        if isinstance(norm, PassedThrough):
            name = type(norm).__name__
            if norm.is_computed():
                report.left.append(Left(path, name, "the neurons that compute it are not in this model"))
            else:
                norm.end_passing()
                report.replaced.append(Replaced(path, name, type(norm).__name__))
    return model, report


class _Leave(Exception):  # noqa: N818
    """The reason why a normalisation is not fused."""


def _fuse(flow: _Flow, norm: nn.Module) -> Any:
    """Fuses a normalisation with the neurons behind it; returns the neurons."""
    _check_norm(norm)
    way = flow.neurons_behind(norm)
    parted, place, layer = way
    name = type(layer).__name__
    if isinstance(layer, Normalised | BatchNormLIF):
        raise _Leave(f"{way.what} goes to {name}, which has a normalisation of its own")
    if isinstance(layer, LIF) and (type(layer)._lif, type(layer).forward) != (LIF._lif, LIF.forward):
        raise _Leave(f"its output goes to {name}, which computes something else than asgl_cuda.LIF")
    converted = not isinstance(layer, LIF | Converted)
    if converted:
        left = convert(layer, inplace=True)[1].left
        if not isinstance(layer, Converted):
            raise _Leave(f"its output goes to {name}: {left[0].reason}")
    try:
        if isinstance(layer, Converted) and not layer.takes_input:
            raise _Leave(f"its output goes to {name}, whose input no neuron takes as it is")
        _check_channels(norm, layer, parted)
    except _Leave:
        if converted:
            layer.end()
        raise
    at_norm, at_layer = flow.places(norm, layer)
    join(layer, at_layer, Normalisation(norm, at_norm, converted), place is not None)
    return layer


def _check_norm(norm: nn.Module) -> None:
    if isinstance(norm, LazyModuleMixin):
        raise _Leave("it does not know the number of its channels before it was called")
    forward = type(norm).forward
    known = (known for library in libraries() for known in getattr(library, "NORMALISATIONS", ()))
    if forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and type(norm) not in known:
        raise _Leave(f"{type(norm).__name__} computes something else than torch.nn's")


def _dims_of(norm: nn.Module) -> tuple[int, ...]:
    """Possible numbers of input dimensions, with time and batch joined."""
    for dims, kind in (((2, 3), nn.BatchNorm1d), ((4,), nn.BatchNorm2d), ((5,), nn.BatchNorm3d)):
        if isinstance(norm, kind):
            return dims
    return (2, 3, 4, 5)


def _check_channels(norm: nn.Module, layer: Any, parted: int) -> None:
    """Requires equal channel dimensions, and an input gain and bias that are scalar or per channel."""
    channel, name = 1 + parted, bare_class(layer).__name__
    found: set[int] = set()
    for dims in (dims + parted for dims in _dims_of(norm)):
        time_dim = layer.time_dim
        dim = 1 if time_dim is None else channel_dim(time_dim if time_dim >= 0 else time_dim + dims)
        if dim < dims:  # fewer dimensions fail in the call
            found.add(dim)
    if found != {channel}:
        said = " or ".join(str(dim) for dim in sorted(found)) or "not there"
        raise _Leave(f"its channels are dimension {channel} of what goes to {name}, whose channels are {said}")
    for value in layer.input_terms() if isinstance(layer, Converted) else ():
        if isinstance(value, Tensor) and not any(varies_by_channel(value, dims - 1) for dims in _dims_of(norm)):
            raise _Leave(f"its output goes to {name}, whose input gain or bias has shape {list(value.shape)}")


class _Site(NamedTuple):
    """A call: the calling module, and the node in its graph."""

    owner: nn.Module
    node: fx.Node


class _Way(NamedTuple):
    """What a value has passed: a shift of the channels, 1 where time and batch parted; a sum; the neurons at last."""

    parted: int
    place: int | None = None  # in the sum
    layer: Any = None

    @property
    def what(self) -> str:
        return "its output" if self.place is None else "the sum of its output and another"

    def parting(self, shift: int) -> _Way:
        return self._replace(parted=self.parted + shift)


_Entered = dict[nn.Module, set[_Site]]  # modules on the way to the neurons, with the calls followed


class _Flow:
    """The data flow between the modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.owners: dict[nn.Module, list[nn.Module]] = {module: [] for module in self.paths}
        for module in self.paths:
            for child in module._modules.values():  # children() would skip duplicates
                if child is not None:
                    self.owners[child].append(module)
        known = list(libraries())
        self.neurons = {
            module
            for module in self.paths
            if isinstance(module, LIF | Converted) or any(library.find(module) is not None for library in known)
        }
        self.calls: dict[nn.Module, Calls] = {}
        self.failures: dict[nn.Module, str] = {}
        self.sites: dict[nn.Module, list[_Site]] = {module: [] for module in self.paths}
        inside = {part for module in self.neurons for part in module.modules()}
        for module in self.paths:
            parts = set() if module in inside or isinstance(module, _LISTS) else set(module.modules()) - {module}
            if any(part in self.neurons or isinstance(part, _BatchNorm) for part in parts):
                self._read(module)
        self._forget_uncalled()

    def _read(self, module: nn.Module) -> None:
        try:
            calls = calls_of(module)
            nodes = [node for graph in calls.graphs for node in graph.find_nodes(op="call_module")]
            children = [module.get_submodule(str(node.target)) for node in nodes]
        except Exception as error:  # user code may raise anything when given proxies
            message = (str(error).splitlines() or [""])[0]
            self.failures[module] = f"{type(error).__name__}{': ' if message else ''}{message[:150]}"
            return
        self.calls[module] = calls
        for child, node in zip(children, nodes, strict=True):
            self.sites[child].append(_Site(module, node))

    def _forget_uncalled(self) -> None:
        """Drops calls by Sequentials used as lists: never called, unlike their modules."""
        for module in self.paths:
            if not is_sequential(module) or module is self.model or self.sites[module]:
                continue
            called = [site for child in module.children() for site in self.sites[child]]
            if any(site.owner is not module for site in called):
                for child in module.children():
                    self.sites[child] = [site for site in self.sites[child] if site.owner is not module]

    def neurons_behind(self, norm: nn.Module) -> _Way:
        """The way to the single layer with the output, or the sum, as its only input."""
        _check_single(norm, self.owners[norm], "it")
        self._check_callers(norm)
        if not self.sites[norm]:
            owner = self._owner(norm)
            raise _Leave(f"{type(owner).__name__} does not call it" if owner else "it is the model itself")
        _check_hooks(norm, "it", _OUTPUT_HOOKS)
        entered: _Entered = {}
        parted = int(getattr(norm, "step_mode", "s") == "m")  # SpikingJelly's multi-step mode has time and batch apart
        way = _one_of(self._goes_to(site, _Way(parted), entered) for site in self.sites[norm])
        for module, sites in entered.items():
            name = type(module).__name__
            self._check_callers(module)
            if set(self.sites[module]) != sites:
                raise _Leave(f"its output goes to {name}, which is called with something else, too")
            _check_hooks(module, name, _INPUT_HOOKS)
        _check_single(way.layer, self.owners[way.layer], type(way.layer).__name__)
        return way

    def is_second(self, norm: nn.Module) -> bool:
        """Whether the output is the second operand of a sum, which `first += second` adds in place of the first."""
        try:
            return self.neurons_behind(norm).place == 1
        except _Leave:
            return False

    def places(self, *modules: nn.Module) -> list[Place]:
        """Paths below the nearest common owner."""
        paths = [self.paths[module].split(".") for module in modules]
        shared = next(depth for depth, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1)
        owner = self.model.get_submodule(".".join(paths[0][:shared]))
        return [Place(owner, ".".join(path[shared:])) for path in paths]

    def _owner(self, module: nn.Module) -> nn.Module | None:
        """The first owner that can be called."""
        owner = next(iter(self.owners[module]), None)
        while isinstance(owner, _LISTS):
            owner = next(iter(self.owners[owner]), None)
        return owner

    def _check_callers(self, module: nn.Module) -> None:
        """Checks that the owner was traced; for a module without known calls, outer owners, too."""
        owner = self._owner(module)
        while owner is not None:
            if owner in self.failures:
                raise _Leave(f"the forward of {type(owner).__name__} can't be traced: {self.failures[owner]}")
            owner = None if self.sites[module] else self._owner(owner)

    def _goes_to(self, site: _Site, way: _Way, entered: _Entered, inwards: bool = False) -> _Way:
        """Follows a node's value to the neurons; `inwards`: the node is an input of the owner."""
        owner, node = site
        users = [user for user in node.users if not asks_for_shape(user)]
        name = " and ".join(dict.fromkeys(name_of_user(owner, user) for user in users))
        if len(users) != 1:
            if way.place is not None and any(summand(node, user) is not None for user in users):
                name += ": it is also the next shortcut"
            raise _Leave(f"{way.what} is used {len(users)} times, by {name}" if users else "nothing uses it")
        (user,) = users
        if user.op == "output" and inwards:
            raise _Leave(f"{way.what} goes to {type(owner).__name__}")
        if user.op == "output" and user.args[0] is node:
            return self._leaves(owner, way, entered)
        if parts_time(owner, user):
            return self._goes_to(_Site(owner, user), way.parting(1), entered, inwards)
        place = summand(node, user)
        if place is not None and way.place is None:
            return self._goes_to(_Site(owner, user), way._replace(place=place), entered, inwards)
        if user.op != "call_module" or not is_first_alone(node, user):
            raise _Leave(f"{way.what} goes to {name}")
        module = owner.get_submodule(str(user.target))
        entered.setdefault(module, set()).add(_Site(owner, user))
        if module in self.neurons:
            return way._replace(layer=module)
        calls = self.calls.get(module)
        if calls is None or calls.entering is None:
            raise _Leave(f"{way.what} goes to {name}")
        inputs = (graph.find_nodes(op="placeholder")[0] for graph in calls.graphs)
        into = way.parting(calls.entering)
        return _one_of(self._goes_to(_Site(module, node), into, entered, True) for node in inputs)

    def _leaves(self, module: nn.Module, way: _Way, entered: _Entered) -> _Way:
        """Follows the value returned by a module to the neurons."""
        name = type(module).__name__
        _check_hooks(module, name, _OUTPUT_HOOKS)
        self._check_callers(module)
        leaving = self.calls[module].leaving
        if module is self.model:
            raise _Leave(f"{way.what} is that of the model")
        if leaving is None:
            raise _Leave(f"{way.what} goes through {name}")
        if not self.sites[module]:
            raise _Leave(f"{way.what} is that of {name}, which nothing calls")
        return _one_of(self._goes_to(site, way.parting(leaving), entered) for site in self.sites[module])


def _one_of(found: Iterable[_Way]) -> _Way:
    ways = set(found)
    if len(ways) > 1:
        raise _Leave(f"its output goes to {' and '.join(sorted(type(way.layer).__name__ for way in ways))}")
    return ways.pop()


_OUTPUT_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_INPUT_HOOKS = ("_forward_pre_hooks", "_backward_hooks")


def _check_hooks(module: nn.Module, name: str, kinds: Sequence[str]) -> None:
    """Refuses hooks that would see values no longer normalised."""
    if any(getattr(module, kind) for kind in kinds):
        raise _Leave(f"{name} has hooks, which would see values that are not normalised")


def _check_single(module: nn.Module, owners: Sequence[nn.Module], name: str) -> None:
    if len(owners) > 1:
        raise _Leave(f"{name} is in the model {len(owners)} times")
    if "forward" in vars(module):
        raise _Leave(f"{name} has a forward that is not of its class")
