"""`fuse` and `unfuse`: normalisations with the neurons behind them as one, and apart again.

What a module's output becomes is read off graphs: of a Sequential, the order of its modules; of any other module, what
torch.fx traces of its forward, in which every module that it calls is a node. A normalisation is followed from where it
is called, out of the modules that return its output and into those that hand it on, to the neurons. Every module that
is entered must be called with that output alone, wherever it is called.

    channel of the neurons' input = channel of the normalisation's + where time and batch part - where they join
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..layout import channel_dim
from ..neuron import LIF, BatchNormLIF
from .conversion import Left, Replaced, Report, check_model, convert, copied, libraries, taken
from .fused import Fused, Wrapper
from .normalised import Normalisation, Normalised, PassedThrough, Place, normalised_class, varies_by_channel

_SHAPE_QUERIES = ("size", "dim", "shape", "ndim", "dtype", "device")
_LISTS = (nn.ModuleList, nn.ModuleDict)  # are not called


def fuse(model: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """The model with its normalisations computed by the neurons behind them, and a report of what was fused and left.

    Known are `torch.nn.BatchNorm1d`, `2d` and `3d`, `SyncBatchNorm` and SpikingJelly's forms of them, followed by
    `asgl_cuda.LIF` or by a neuron layer that `convert` knows, which is converted. Between them time and batch may part:
    by `unflatten(0, ...)`, SpikingJelly's `SeqToANNContainer`, `tdLayer` of the code of ASGL's authors, or
    `asgl_cuda.OverTime`. See `asgl_cuda.batch_norm_lif`.

    No module is moved: parameters, buffers and their names, state, optimizers and checkpoints stay valid. The
    normalisation itself then returns its input, so whatever looks at its output sees that; it is left where the model
    does so, or where it is not certain that it does not. The report says of each one that is left why. Exchange neither
    the normalisation nor the neurons of a pair: `torch.nn.SyncBatchNorm.convert_sync_batchnorm`,
    `torch.nn.utils.fusion.fuse_conv_bn_eval` and the like come before, or after `unfuse`; else the next call raises
    RuntimeError, as it does in replicas of `nn.DataParallel`; `DistributedDataParallel` takes a fused model.

    Only neurons that normalise are converted: for the others call `convert` as well, before or after. What a forward
    does is taken from a trace with its attributes as they are now, on every way that shapes of tensors may lead it. A
    Sequential is taken to call its modules in order, unless a trace shows otherwise.

    Args:
        model: any module.
        inplace: fuse in the model itself and not in a copy; optimizers then hold its parameters already.

    Raises TypeError where it is no module.

    The same in PyTorch: the model as it is.
    """
    check_model(model, inplace, "asgl_cuda.fuse")
    model = taken(model, inplace, "asgl_cuda.fuse")
    report = Report([], [])
    if not any(_is_unfused(module) for module in model.modules()):
        return model, report
    flow = _Flow(model)
    for path, norm in list(model.named_modules()):
        if not _is_unfused(norm):
            continue
        name = type(norm).__name__
        try:
            layer = _fuse(flow, norm)
        except _LeftAsItIs as reason:
            report.left.append(Left(path, name, str(reason)))
            continue
        report.replaced.append(Replaced(flow.paths[layer], _name_of(layer), f"normalises as well, instead of {path}"))
    return model, report


def unfuse(model: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """The model as it was before `fuse`, with the values that training gave it, and a report.

    Args:
        model: a module that `fuse` returned, or one that holds it.
        inplace: take apart in the model itself and not in a copy.

    Raises TypeError where it is no module.
    """
    check_model(model, inplace, "asgl_cuda.unfuse")
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


class _LeftAsItIs(Exception):  # noqa: N818
    """Why a normalisation is not fused."""


def _leave(reason: str) -> NoReturn:
    raise _LeftAsItIs(reason)


def _is_unfused(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, PassedThrough)


def _name_of(layer: nn.Module) -> str:
    """Of its class before it was converted or fused."""
    made = layer.behind if isinstance(layer, Normalised) else type(layer)
    return made.original.__name__ if issubclass(made, Fused) else made.__name__


# ---- one pair ----


def _fuse(flow: _Flow, norm: nn.Module) -> Normalised:
    """Fuses, and returns the neurons."""
    _check_norm(norm)
    found = flow.neurons_behind(norm)
    layer: Any = found.layer
    name = type(layer).__name__
    if isinstance(layer, Normalised | BatchNormLIF):
        _leave(f"its output goes to {name}, which has a normalisation of its own")
    if isinstance(layer, LIF) and (type(layer)._lif, type(layer).forward) != (LIF._lif, LIF.forward):
        _leave(f"its output goes to {name}, which computes something else than asgl_cuda.LIF")
    converted = not isinstance(layer, LIF | Fused)
    if converted:
        left = convert(layer, inplace=True)[1].left
        if not isinstance(layer, Fused):
            _leave(f"its output goes to {name}: {left[0].reason}")
    try:
        _check_channels(norm, layer, found.parted)
    except _LeftAsItIs:
        if converted:
            layer.end()
        raise
    layer.__class__ = normalised_class(layer)
    at_norm, at_layer = flow.places(norm, layer)
    layer.begin_normalised(Normalisation(norm, at_norm, converted), at_layer)
    assert isinstance(layer, Normalised)
    return layer


def _check_norm(norm: nn.Module) -> None:
    if isinstance(norm, LazyModuleMixin):
        _leave("it does not know the number of its channels before it was called")
    forward = type(norm).forward
    known = (known for library in libraries() for known in getattr(library, "NORMALISATIONS", ()))
    if forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and type(norm) not in known:
        _leave(f"{type(norm).__name__} computes something else than torch.nn's")


def _is_over_time(norm: Any) -> bool:
    """Whether time and batch are apart in its input, as in SpikingJelly's step mode "m"."""
    return getattr(norm, "step_mode", "s") == "m"


def _dims_of(norm: nn.Module) -> tuple[int, ...]:
    """How many dimensions its input may have, where time and batch are one."""
    for dims, kind in (((2, 3), nn.BatchNorm1d), ((4,), nn.BatchNorm2d), ((5,), nn.BatchNorm3d)):
        if isinstance(norm, kind):
            return dims
    return (2, 3, 4, 5)


def _check_channels(norm: nn.Module, layer: Any, parted: int) -> None:
    """The channels of both must be the same dimension, and the layer's own gain no finer than by channel."""
    channel = 1 + parted
    theirs = [_channel_of(layer, dims + parted) for dims in _dims_of(norm)]
    # In other cases there are no channels, which is an error of the call.
    found = {dim for dim, dims in zip(theirs, _dims_of(norm), strict=True) if dim < dims + parted}
    if found != {channel}:
        said = " or ".join(str(dim) for dim in sorted(found)) or "not there"
        _leave(f"its channels are dimension {channel} of what goes to {_name_of(layer)}, whose channels are {said}")
    if isinstance(layer, Fused):
        for value in layer.input_terms():
            fits = (varies_by_channel(value, dims - 1) for dims in _dims_of(norm) if isinstance(value, Tensor))
            if isinstance(value, Tensor) and not any(fits):
                _leave(f"its output goes to {_name_of(layer)}, whose input gain or bias has shape {list(value.shape)}")


def _channel_of(layer: Any, dims: int) -> int:
    """The channels in an input of so many dimensions; of one step, the second dimension."""
    if layer.time_dim is None:
        return 1
    return channel_dim(layer.time_dim if layer.time_dim >= 0 else layer.time_dim + dims)


# ---- where outputs go ----


class _Site(NamedTuple):
    """A call: by which module, and the node in its graph."""

    owner: nn.Module
    node: fx.Node


class _Arrival(NamedTuple):
    """Neurons, and how many dimensions farther back the channels are in their input: 1 where time and batch parted."""

    layer: nn.Module
    parted: int


_Entered = dict[nn.Module, set[_Site]]  # on the way to the neurons: modules, by which of their calls


class _Calls(NamedTuple):
    """What a module calls: a graph for each way that its forward may go."""

    graphs: list[fx.Graph]
    entering: int | None = 0  # see Wrapper
    leaving: int | None = 0


class _Flow:
    """Who calls whom in a model, and with what."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.owners: dict[nn.Module, list[nn.Module]] = {module: [] for module in self.paths}
        for module in self.paths:
            for child in module._modules.values():  # children() gives each only once
                if child is not None:
                    self.owners[child].append(module)
        self.neurons = {module for module in self.paths if _is_neuron(module)}
        self.calls: dict[nn.Module, _Calls] = {}
        self.failures: dict[nn.Module, str] = {}
        self.sites: dict[nn.Module, list[_Site]] = {module: [] for module in self.paths}
        inside = {part for module in self.neurons for part in module.modules()}
        for module in self.paths:
            parts = set(module.modules()) - {module} if module not in inside else set()
            if any(part in self.neurons or isinstance(part, _BatchNorm) for part in parts):
                self._read(module)
        self._forget_uncalled()

    def _read(self, module: nn.Module) -> None:
        if isinstance(module, _LISTS):
            return
        try:
            calls = _calls_of(module)
            sites = [
                (module.get_submodule(str(node.target)), _Site(module, node))
                for graph in calls.graphs
                for node in graph.nodes
                if node.op == "call_module"
            ]
        except Exception as error:  # whatever the module's own code raises when it is given fx's proxies
            message = (str(error).splitlines() or [""])[0]
            self.failures[module] = f"{type(error).__name__}{': ' if message else ''}{message[:150]}"
            return
        self.calls[module] = calls
        for child, site in sites:
            self.sites[child].append(site)

    def _forget_uncalled(self) -> None:
        """A Sequential whose modules are called one by one by others, and that is not called itself, is a mere list."""
        for module in self.paths:
            if not _is_sequential(module) or module is self.model or self.sites[module]:
                continue
            called = [site for child in module.children() for site in self.sites[child]]
            if any(site.owner is not module for site in called):
                for child in module.children():
                    self.sites[child] = [site for site in self.sites[child] if site.owner is not module]

    def neurons_behind(self, norm: nn.Module) -> _Arrival:
        """The layer that alone gets the output, and gets nothing else."""
        _check_single(norm, self.owners[norm], "it")
        self._check_callers(norm)
        if not self.sites[norm]:
            owner = self._owner(norm)
            _leave(f"{type(owner).__name__} does not call it" if owner else "it is the model itself")
        _check_hooks(norm, "it", _OUTPUT_HOOKS)
        entered: _Entered = {}
        parted = int(_is_over_time(norm))
        layer, parted = _one_of(self._goes_to(site, parted, entered) for site in self.sites[norm])
        for module, sites in entered.items():
            name = type(module).__name__
            self._check_callers(module)
            if set(self.sites[module]) != sites:
                _leave(f"its output goes to {name}, which is called with something else, too")
            _check_hooks(module, name, _INPUT_HOOKS)
        _check_single(layer, self.owners[layer], type(layer).__name__)
        return _Arrival(layer, parted)

    def places(self, *modules: nn.Module) -> list[Place]:
        """Where each is below the nearest module that has them all."""
        paths = [self.paths[module].split(".") for module in modules]
        shared = next(depth for depth, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1)
        owner = self.model.get_submodule(".".join(paths[0][:shared]))
        return [Place(owner, ".".join(path[shared:])) for path in paths]

    def _owner(self, module: nn.Module) -> nn.Module | None:
        """The first module that holds it and can be called."""
        owner = next(iter(self.owners[module]), None)
        while isinstance(owner, _LISTS):
            owner = next(iter(self.owners[owner]), None)
        return owner

    def _check_callers(self, module: nn.Module) -> None:
        """What may call it must have been traced; for a Sequential, whose order is known, those around it need not."""
        owner = self._owner(module)
        while owner is not None:
            if owner in self.failures:
                _leave(f"the forward of {type(owner).__name__} can't be traced: {self.failures[owner]}")
            owner = None if self.sites[module] else self._owner(owner)

    def _goes_to(self, site: _Site, parted: int, entered: _Entered, inwards: bool = False) -> _Arrival:
        """Follows the value of a node to the neurons; `inwards` if it came into the owner from outside."""
        owner, node = site
        users = [user for user in node.users if not _asks_for_shape(user)]
        names = list(dict.fromkeys(_name_of_user(owner, user) for user in users))
        if len(users) != 1:
            _leave(f"its output is used {len(users)} times, by {' and '.join(names)}" if users else "nothing uses it")
        (user,), (name,) = users, names
        if user.op == "output" and inwards:
            _leave(f"its output goes to {type(owner).__name__}")
        if user.op == "output" and user.args[0] is node:
            return self._leaves(owner, parted, entered)
        if _parts(owner, user):
            return self._goes_to(_Site(owner, user), parted + 1, entered, inwards)
        if user.op != "call_module" or not _is_first_alone(node, user):
            _leave(f"its output goes to {name}")
        module = owner.get_submodule(str(user.target))
        entered.setdefault(module, set()).add(_Site(owner, user))
        if module in self.neurons:
            return _Arrival(module, parted)
        calls = self.calls.get(module)
        if calls is None or calls.entering is None:
            _leave(f"its output goes to {name}")
        inputs = [next(node for node in graph.nodes if node.op == "placeholder") for graph in calls.graphs]
        into = parted + calls.entering
        return _one_of(self._goes_to(_Site(module, node), into, entered, True) for node in inputs)

    def _leaves(self, module: nn.Module, parted: int, entered: _Entered) -> _Arrival:
        """Follows what a module returns."""
        name = type(module).__name__
        _check_hooks(module, name, _OUTPUT_HOOKS)
        self._check_callers(module)
        leaving = self.calls[module].leaving
        if module is self.model:
            _leave("its output is that of the model")
        if leaving is None:
            _leave(f"its output goes through {name}")
        if not self.sites[module]:
            _leave(f"its output is that of {name}, which nothing calls")
        return _one_of(self._goes_to(site, parted + leaving, entered) for site in self.sites[module])


def _one_of(found: Iterable[_Arrival]) -> _Arrival:
    arrivals = set(found)
    if len(arrivals) > 1:
        _leave(f"its output goes to {' and '.join(sorted(type(layer).__name__ for layer, _ in arrivals))}")
    return arrivals.pop()


_OUTPUT_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_INPUT_HOOKS = ("_forward_pre_hooks", "_backward_hooks")


def _check_hooks(module: nn.Module, name: str, kinds: Sequence[str]) -> None:
    """No hook may see the input of the neurons, which is not normalised any more."""
    if any(getattr(module, kind) for kind in kinds):
        _leave(f"{name} has hooks, which would see values that are not normalised")


def _check_single(module: nn.Module, owners: Sequence[nn.Module], name: str) -> None:
    if len(owners) > 1:
        _leave(f"{name} is in the model {len(owners)} times")
    if "forward" in vars(module):
        _leave(f"{name} has a forward that is not of its class")


def _is_neuron(module: nn.Module) -> bool:
    return isinstance(module, LIF | Fused) or any(library.find(module) is not None for library in libraries())


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


# ---- graphs ----


def _calls_of(module: nn.Module) -> _Calls:
    if "forward" in vars(module):
        raise TypeError("it is not that of its class")
    wrapper = Wrapper(list(module._modules), 0, 0) if _is_sequential(module) else None
    for library in libraries():
        wrapper = wrapper or getattr(library, "wrapped", lambda module: None)(module)
    if wrapper is None:
        return _Calls(_traced(module))
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in wrapper.names:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return _Calls([graph], wrapper.entering, wrapper.leaving)


_WAYS = 32  # through one forward, at most


class _Tracer(fx.Tracer):
    """Looks into no module but the one that is traced, and goes on where the way depends on a shape, as it is told."""

    def __init__(self, ways: Sequence[bool] = ()) -> None:
        super().__init__()
        self.ways = list(ways)
        self.taken: list[bool] = []

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not _is_of_shapes(obj.node):
            return super().to_bool(obj)
        self.taken.append(self.ways[len(self.taken)] if len(self.taken) < len(self.ways) else False)
        return self.taken[-1]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if _is_sequential(m) and not any(m is part for part in self.root.modules()):
            return forward(*args, **kwargs)  # a slice of another
        return super().call_module(m, forward, args, kwargs)


def _traced(module: nn.Module) -> list[fx.Graph]:
    """Graphs of its forward in training and in evaluation, with arguments that are None by default given and not.

    On a copy: a forward may keep what it computes, and count its calls.
    """
    parameters = inspect.signature(type(module).forward).parameters
    absent = {name: None for name, parameter in parameters.items() if parameter.default is None}
    graphs: dict[str, fx.Graph] = {}
    for training in (True, False):
        for concrete in [{}, absent] if absent else [{}]:
            for graph in _ways_of(module, training, concrete):
                graphs.setdefault(str(graph), graph)
    return list(graphs.values())


def _ways_of(module: nn.Module, training: bool, concrete: dict[str, None]) -> list[fx.Graph]:
    """A graph for each way that shapes may lead, except those that end in an error which the forward itself raises."""
    graphs: list[fx.Graph] = []
    refusal: Exception = RuntimeError("it has no way")
    ways: list[list[bool]] = [[]]
    for count, way in enumerate(ways):  # to which more are added
        if count == _WAYS:
            raise RuntimeError(f"shapes lead it more than {_WAYS} ways")
        made = copied(module, module.parameters())
        made.training = training
        tracer = _Tracer(way)
        try:
            graphs.append(tracer.trace(made, concrete))
        except (ValueError, AssertionError) as error:
            if not tracer.taken or not _raises_itself(error):
                raise
            refusal = error
        ways += [[*tracer.taken[:choice], True] for choice in range(len(way), len(tracer.taken))]
    if not graphs:
        raise refusal
    return graphs


def _raises_itself(error: Exception) -> bool:
    """Whether it comes from a raise or an assert of the model's own code."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    code, own = trace.tb_frame.f_code.co_code, trace.tb_frame.f_globals.get("__name__", "")
    return dis.opname[code[trace.tb_lasti]] == "RAISE_VARARGS" and own.split(".")[0] != "torch"


def _name_of_user(owner: nn.Module, user: fx.Node) -> str:
    if user.op == "output":
        return f"the caller of {type(owner).__name__}"
    if user.op == "call_module":
        return type(owner.get_submodule(str(user.target))).__name__
    return user.target if isinstance(user.target, str) else getattr(user.target, "__name__", str(user.target))


def _is_of_shapes(node: fx.Node) -> bool:
    """Whether it is computed of shapes and types alone."""
    sources = node.all_input_nodes
    return _asks_for_shape(node) or (bool(sources) and all(_is_of_shapes(source) for source in sources))


def _asks_for_shape(user: fx.Node) -> bool:
    if user.target is getattr:
        return user.args[1] in _SHAPE_QUERIES
    return user.op == "call_method" and str(user.target) in _SHAPE_QUERIES


def _is_first_alone(node: fx.Node, user: fx.Node) -> bool:
    """Whether the call has the value as its first argument and as no other."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return bool(user.args) and user.args[0] is node and found.count(node) == 1


def _parts(owner: nn.Module, user: fx.Node) -> bool:
    """Whether it makes two dimensions of the first one, time and batch."""
    if user.op == "call_module":
        module = owner.get_submodule(str(user.target))
        if any(type(module) in getattr(library, "PARTING", ()) for library in libraries()):
            return True
        return isinstance(module, nn.Unflatten) and module.dim == 0 and _is_pair(module.unflattened_size)
    if user.target not in ("unflatten", torch.unflatten):
        return False
    arguments: dict[str, Any] = dict(zip(("input", "dim", "sizes"), user.args, strict=False)) | user.kwargs
    return arguments.get("dim") == 0 and _is_pair(arguments.get("sizes"))


def _is_pair(sizes: Any) -> bool:
    """Whether they are two: a pair, or the first two of a shape."""
    if isinstance(sizes, fx.Node):
        return sizes.target is operator.getitem and sizes.args[1] in (slice(2), slice(0, 2))
    return isinstance(sizes, Sequence) and len(sizes) == 2
