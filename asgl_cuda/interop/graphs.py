"""The calls of a module, from torch.fx graphs of its forward."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .convert import copied, libraries
from .converted import Wrapper

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_SHAPE_QUERIES = ("size", "dim", "shape", "ndim", "dtype", "device")
_MOST_WAYS = 32  # paths per forward


class Calls(NamedTuple):
    """The calls of a module: a graph per path through its forward."""

    graphs: list[fx.Graph]
    entering: int | None = 0  # see Wrapper
    leaving: int | None = 0


def calls_of(module: nn.Module) -> Calls:
    """The calls of a module; raises the errors of tracing its forward."""
    if "forward" in vars(module):
        raise TypeError("it is not that of its class")
    wrapper = Wrapper(list(module._modules), 0, 0) if is_sequential(module) else None
    for library in libraries():
        wrapper = wrapper or getattr(library, "wrapped", lambda module: None)(module)
    if wrapper is None:
        return Calls(_traced(module))
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in wrapper.names:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return Calls([graph], wrapper.entering, wrapper.leaving)


class _Tracer(fx.Tracer):
    """Traces only the module, with the given decisions at branches on shapes."""

    def __init__(self, ways: Sequence[bool] = ()) -> None:
        super().__init__()
        self.ways = iter(ways)
        self.taken: list[bool] = []

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not _is_of_shapes(obj.node):
            return super().to_bool(obj)
        self.taken.append(next(self.ways, False))
        return self.taken[-1]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if is_sequential(m) and not any(m is part for part in self.root.modules()):
            return forward(*args, **kwargs)  # a slice, so not owned
        return super().call_module(m, forward, args, kwargs)


def _traced(module: nn.Module) -> list[fx.Graph]:
    """Graphs of forward in training and evaluation, with and without arguments that default to None.

    Traces copies, since a forward may store results and count its calls.
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
    """A graph per shape-dependent path, except paths that end in an error of forward itself."""
    graphs: list[fx.Graph] = []
    refusal: Exception = RuntimeError("it has no way")
    ways: list[list[bool]] = [[]]
    for count, way in enumerate(ways):  # extended in the loop
        if count == _MOST_WAYS:
            raise RuntimeError(f"shapes lead it more than {_MOST_WAYS} ways")
        made = copied(module, module.parameters())
        made.training = training
        tracer = _Tracer(way)
        try:
            graphs.append(tracer.trace(made, concrete))
        except (ValueError, AssertionError) as error:
            if not tracer.taken or not _raises_itself(error):
                raise
            refusal = error
        finally:
            vars(tracer).update(root=None, tensor_attrs=None)  # fx leaves the tracer in a reference cycle
        ways += [[*tracer.taken[:choice], True] for choice in range(len(way), len(tracer.taken))]
    if not graphs:
        raise refusal
    return graphs


def _raises_itself(error: Exception) -> bool:
    """Whether the model raised the error, not torch, whose tracer raises the same types."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).split(".")[0] != "torch"


def is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def name_of_user(owner: nn.Module, user: fx.Node) -> str:
    """The name of the node in reports."""
    if user.op == "output":
        return f"the caller of {type(owner).__name__}"
    return type(owner.get_submodule(str(user.target))).__name__ if user.op == "call_module" else name_of_function(user)


def name_of_function(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _is_of_shapes(node: fx.Node) -> bool:
    """Whether the node depends on shapes and types only."""
    sources = node.all_input_nodes
    return asks_for_shape(node) or (bool(sources) and all(_is_of_shapes(source) for source in sources))


def asks_for_shape(node: fx.Node) -> bool:
    query = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None
    return query in _SHAPE_QUERIES


def is_first_alone(node: fx.Node, user: fx.Node) -> bool:
    """Whether the value is the first argument and no other."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return bool(user.args) and user.args[0] is node and found.count(node) == 1


def summand(node: fx.Node, user: fx.Node) -> int | None:
    """The place of the value in a sum of two; None unless `user` is one, and does not replace the other operand."""
    if user.op == "call_module" or user.target not in _ADDITIONS or user.kwargs not in ({}, {"alpha": 1}):
        return None
    if len(user.args) != 2 or len(user.all_input_nodes) != 2:
        return None
    place = user.args.index(node)
    return None if place and user.target == "add_" else place


def parts_time(owner: nn.Module, user: fx.Node) -> bool:
    """Whether the call splits the first dimension into time and batch."""
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
    """Whether there are two sizes: a pair, or the first two of a shape."""
    if isinstance(sizes, fx.Node):
        return sizes.target is operator.getitem and sizes.args[1] in (slice(2), slice(0, 2))
    return isinstance(sizes, Sequence) and len(sizes) == 2
