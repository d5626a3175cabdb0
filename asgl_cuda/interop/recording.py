"""Loops over time steps that are recorded and computed afterwards, each operation for all steps in one call.

A model's own code runs once per step on `Recorded` values. Operations that differ only in the step of their operands,
such as `linear(x[0], w)` and `linear(x[1], w)`, form one `Operation`, which `torch.vmap` computes, or a loop where vmap
can't. The steps of a neuron form one `Chain`, which its layer computes as a sequence. Each is computed after the others
that it needs. A chain that needs its own results, as where spikes return to an earlier layer, is refused.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from ..torch_modes import current_checkpoint, is_in_function_forward

_CALLER = "asgl_cuda.convert"
_local = threading.local()
_serials = itertools.count(1)  # ids of groups, each used once, unlike id(group)


def current_recording() -> Recording | None:
    """The recording in which this thread's code runs, or None."""
    return getattr(_local, "recording", None)


# ---- grad mode and autocast: each operation is computed in the modes in which it was recorded ----

_DEVICES = ("cpu", "cuda")
_NO_AUTOCAST = (None, None)
_Modes: TypeAlias = "tuple[bool, tuple[torch.dtype | None, ...]]"


def _current_modes() -> _Modes:
    """Whether gradients are enabled; by device, the dtype of autocast, or None where it is off."""
    if not any(map(torch.is_autocast_enabled, _DEVICES)):
        return torch.is_grad_enabled(), _NO_AUTOCAST
    return torch.is_grad_enabled(), tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in _DEVICES
    )


@contextmanager
def _in_modes(modes: _Modes) -> Iterator[None]:
    """Enters the modes in which an operation was recorded."""
    with ExitStack() as stack:
        grad, types = _current_modes()
        if modes[0] != grad:
            stack.enter_context(torch.set_grad_enabled(modes[0]))
        for device, dtype, current in zip(_DEVICES, modes[1], types, strict=True):
            if dtype is not current:
                stack.enter_context(torch.autocast(device, dtype, enabled=dtype is not None))
        yield


# ---- values ----


class Recorded:
    """A placeholder for a value of one step that is computed later: member `index` of a group."""

    __slots__ = ("__weakref__", "group", "index", "recording")

    def __init__(self, recording: Recording, group: Group, index: int) -> None:
        self.recording, self.group, self.index = recording, group, index

    def value(self, use: str) -> Any:
        """Computes and returns the value. `use` names the function that needs it, for errors."""
        return self.recording.value_of(self, use)

    def call_after_recording(self, function: Callable[[Any], object]) -> None:
        """Calls the function with the value at the end of the recording, which computes it if nothing else does."""
        _mark_used(self.group)
        self.recording.waiting.append((self.group, self.index, function))

    def __getattr__(self, name: str) -> Any:
        if name in _METADATA:
            return getattr(self.group.meta(), name)
        if name == "device":
            return self.group.device()
        if name == "is_cuda":
            return self.group.device().type == "cuda"
        if name == "requires_grad":
            return self.group.requires_grad
        if name in _FACTORIES:
            return getattr(torch.empty(0, dtype=self.dtype, device=self.device), name)
        if name in _OF_GRAPH:
            raise RuntimeError(
                f"{_CALLER}: with sequences, {name} of a value in a step can't be recorded, because the value is "
                "computed only after the model's code has run; use asgl_cuda.convert(model) without sequences, which "
                "computes step by step"
            )
        if isinstance(self.group, Operation):  # a field of a named tuple, as x.max(1).values
            made = getattr(torch.return_types, self.group.function.__name__, None)
            if name in (fields := getattr(made, "__match_args__", ())):
                return self.recording.record_call(Tensor.__getitem__, self, fields.index(name))
        found = getattr(Tensor, name)  # an AttributeError names Tensor
        if name in _NEEDING_VALUE:
            return getattr(self.value(name), name)
        return (
            partial(self.recording.record_call, found, self)
            if callable(found)
            else self.recording.record_call(found.__get__, self)
        )

    def __iter__(self) -> Iterator[Any]:
        meta = self.group.meta()
        return (self.recording.record_call(Tensor.__getitem__, self, each) for each in range(len(meta)))

    def __len__(self) -> int:
        return len(self.group.meta())

    def __repr__(self) -> str:
        return repr(self.value("repr"))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function outside of the recorded code, where the values are computed first."""
        name = function.__name__
        args, kwargs = tree_map_only(cls, lambda each: each.value(name), (args, kwargs or {}))
        return function(*args, **kwargs)


def _recorded_operator(name: str) -> Any:
    """Makes the method `name` of `Recorded`, which does what this method of tensors does."""
    function = getattr(Tensor, name)

    def method(self: Recorded, *args: Any) -> Any:
        """Records the operator, or computes the value for an operator that needs it at once, such as `__bool__`."""
        if args == (None,) and name in ("__eq__", "__ne__"):
            return name == "__ne__"
        if name in _NEEDING_VALUE:
            return getattr(self.value(name), name)(*args)
        return self.recording.record_call(function, self, *args)

    return method


# Names of attributes of tensors, by what a `Recorded` does for them. It reads _METADATA from a tensor on the device
# "meta". _FACTORIES make a tensor of the same dtype and device. _NEEDING_VALUE make it compute the value at once.
# _OF_GRAPH raise an error, because they need the value's autograd node, which does not exist yet.
_METADATA = {"shape", "ndim", "dtype", "layout", "size", "dim", "numel", "is_sparse", "is_nested", "is_quantized",
             "is_floating_point", "is_complex", "stride", "nelement", "itemsize", "ndimension"}  # fmt: skip
_FACTORIES = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
_OF_GRAPH = {"requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "grad", "grad_fn",
             "is_leaf", "output_nr"}  # fmt: skip
_LIKE = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like}
_NEEDING_VALUE = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__complex__",
                  "__format__", "__array__", "__reduce_ex__", "__contains__", "backward", "data_ptr",
                  "untyped_storage"}  # fmt: skip
_OPERATORS = {name for name in dir(Tensor) if name[:2] == "__" and callable(getattr(Tensor, name))} - {*dir(object)}
_OPERATORS |= {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__format__", "__reduce_ex__"}
for _name in _OPERATORS - {"__torch_function__", "__torch_dispatch__", "__setstate__", "__deepcopy__", "__hash__"}:
    if _name not in vars(Recorded):
        setattr(Recorded, _name, _recorded_operator(_name))
Recorded.__hash__ = object.__hash__  # type: ignore[method-assign]


# Frequent functions whose result is never a view, so no shared memory needs to be looked for.
_NEW_MEMORY = {"linear", "conv1d", "conv2d", "conv3d", "batch_norm", "relu", "max_pool2d", "avg_pool2d", "stack", "cat",
               "__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "add", "sub", "mul", "sum", "mean"}  # fmt: skip


class Group:
    """Results of different steps that are computed together: `stack`, `[steps, ...]`, or `items`, one per step."""

    sources: Sequence[Group] = ()
    stack: Any = None  # a tensor, or nested tuples of tensors
    items: Sequence[Any] | None = None
    requires_grad = False
    _meta: Any = NotImplemented  # None is a value

    def __init__(self) -> None:
        self.serial = next(_serials)
        self.values: list[weakref.ref[Recorded]] = []  # those that the model's code got, by index

    def __len__(self) -> int:
        raise NotImplementedError

    def is_computed(self) -> bool:
        """Whether the values are computed."""
        return self.stack is not None or self.items is not None

    def as_stack(self) -> Any:
        """All members as one stack, made once."""
        if self.stack is None:
            assert self.items is not None
            if isinstance(self.items[0], Tensor):
                self.stack = torch.stack(list(self.items))
                return self.stack
            self.stack = tree_map(lambda *each: torch.stack(each), *self.items)
        return self.stack

    def item(self, index: int) -> Any:
        """The value of one member."""
        if self.items is None:
            if isinstance(self.stack, Tensor):
                self.items = self.stack.unbind(0)
                return self.items[index]
            leaves, spec = tree_flatten(self.stack)
            columns = [leaf.unbind(0) for leaf in leaves]
            self.items = [tree_unflatten(each, spec) for each in zip(*columns, strict=True)]
        return self.items[index]

    def gather(self, indices: Sequence[int]) -> Any:
        """The stack of these members."""
        stack, first, count = self.as_stack(), indices[0], len(indices)
        if first == 0 and count == len(self) and list(indices) == list(range(count)):
            return stack
        if list(indices) != list(range(first, first + count)):
            return tree_map(lambda each: each[list(indices)], stack)
        return tree_map(lambda each: each.narrow(0, first, count), stack)

    def meta(self) -> Any:
        """A member, a tensor, a nested tuple of tensors or None, on the device "meta": shapes and dtypes alone."""
        if self._meta is NotImplemented:
            with torch.no_grad():
                todo = [self]  # not by recursion: a sum over the steps is as deep as there are steps
                while todo:
                    group = todo[-1]
                    unknown = [each for each in group.sources if each._meta is NotImplemented]
                    if not unknown and group._meta is NotImplemented:
                        group._meta = group.make_meta()
                    todo[-1:] = [group, *unknown] if unknown else []
        return self._meta

    def make_meta(self) -> Any:
        """Makes the value that `meta` returns. `meta` of `sources` is known."""
        raise NotImplementedError

    def device(self) -> torch.device:
        """The device of the members, before they are computed."""
        raise NotImplementedError

    def is_tuple(self) -> bool:
        """Whether members are tuples of tensors."""
        return False

    @functools.cached_property
    def memory(self) -> set[int]:
        """Ids of the memory of a member on the device "meta", which views share with their base."""
        try:
            return {_storage_id(each) for each in _leaves(self.meta()) if isinstance(each, Tensor)}
        except Exception:  # results whose shape depends on values, as of nonzero: new memory
            return set()


class Existing(Group):
    """One value that exists already, such as the input of the model."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.items = [value]
        self.requires_grad = isinstance(value, Tensor) and value.requires_grad

    def __len__(self) -> int:
        return 1

    def make_meta(self) -> Any:
        assert self.items is not None
        return _on_meta_device(self.items[0])

    def device(self) -> torch.device:
        assert self.items is not None
        return self.items[0].device  # type: ignore[no-any-return]


def _on_meta_device(value: Any) -> Any:
    """A tensor of this shape and type on the device "meta", or that device for another; any other value as it is."""
    if isinstance(value, torch.device):
        return torch.device("meta")
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


class _Hole:
    """A placeholder in the arguments of an operation.

    It stands for the operand of this number or, if the number is None, for an index that differs by step.
    """

    def __init__(self, number: int | None) -> None:
        self.number = number


class Operation(Group):
    """The calls of one function in several steps. A call is a member: the index of its operand in each of `sources`."""

    after: Operation | None = None  # an earlier one that updates the same running statistics

    def __init__(self, function: Any, args: Any, kwargs: Any, operands: Sequence[Recorded], modes: _Modes) -> None:
        super().__init__()
        function = operator.getitem if function is Tensor.__getitem__ else function  # takes tuples as well
        self.function, self.args, self.kwargs, self.modes = function, args, kwargs, modes
        self.sources = [_mark_used(each.group) for each in operands]
        self.is_new = function.__name__ in _NEW_MEMORY
        self.members: list[tuple[int, ...]] = []
        self.indices: list[tuple[int, ...]] = []  # for each member, the indices that getitem gets
        self.given = [each for each in _leaves((args, kwargs)) if isinstance(each, Tensor)]
        operands_and_given: list[Any] = [*self.sources, *self.given]
        self.requires_grad = modes[0] and any(each.requires_grad for each in operands_and_given)

    def __len__(self) -> int:
        return len(self.members)

    def is_tuple(self) -> bool:
        """As in Group. `meta` is not asked for if it can't be computed (`memory` is then empty) or is a new tensor."""
        return not self.is_new and bool(self.memory) and isinstance(self.meta(), (tuple, list))

    def required_groups(self) -> Sequence[Group]:
        """The groups that must be computed before this one."""
        return self.sources if self.after is None else [*self.sources, self.after]

    def call_function(self, values: Sequence[Any], indices: tuple[int, ...] = ()) -> Any:
        """Calls the function, with these values in the holes for operands and these indices in the other holes."""
        left = iter(indices)

        def fill(each: Any) -> Any:
            """The value for a hole; any other argument as it is."""
            if not isinstance(each, _Hole):
                return each
            return next(left) if each.number is None else values[each.number]

        args, kwargs = _fill_holes((self.args, self.kwargs), fill)
        return self.function(*args, **kwargs)

    def run(self) -> None:
        """Computes all members in the modes of the call."""
        with _in_modes(self.modes):
            self.compute()
        computed = [self.items] if self.items is not None else [*_leaves(self.stack)]
        if any(len(each) != len(self) for each in computed):
            raise RuntimeError(
                f"{_CALLER}: with sequences, {len(self)} calls of {self.function.__name__} must give as many results, "
                f"got {' and '.join(str(len(each)) for each in computed)}. This is a bug of asgl_cuda; please report "
                "it. Until it is fixed, use asgl_cuda.convert(model) without sequences, which computes step by step"
            )

    def compute(self) -> None:
        """Computes all members together where possible, otherwise one by one.

        If only the indices of getitem differ, one selection computes all. If nothing differs, a pure function is called
        once, and its result expanded. If operands differ, vmap computes all, except where steps update running
        statistics, in the order of the steps.
        """
        count, columns = len(self), list(zip(*self.members, strict=True))
        varies = [len({*column}) > 1 for column in columns]
        if count == 1:
            self.items = [self._compute_one(0)]
        elif self.indices[0] and len({*self.indices}) > 1:
            if not any(varies):
                self.stack = _select_steps(self.sources[0].item(columns[0][0]), self.args[1], self.indices)
            if self.stack is None:
                self.items = [self._compute_one(each) for each in range(count)]
        elif not any(varies):
            with _Purity() as seen:  # type: ignore[no-untyped-call]
                first = self._compute_one(0)
            if seen.pure and all(isinstance(each, Tensor) for each in tree_flatten(first)[0]):
                self.stack = tree_map(lambda each: each.expand(count, *each.shape), first)
            else:  # for example random numbers, which must differ by step
                self.items = [first, *(self._compute_one(each) for each in range(1, count))]
        elif self._updates_statistics():
            self.items = [self._compute_one(each) for each in range(count)]
        else:
            try:
                pairs = zip(self.sources, columns, varies, strict=True)
                values = [source.gather(column) if each else source.item(column[0]) for source, column, each in pairs]
                dims = tuple(0 if each else None for each in varies)
                function = lambda *values: self.call_function(values, self.indices[0])  # noqa: E731
                self.stack = torch.vmap(function, dims, randomness="different")(*values)
            except Exception:  # no batching rule, or no tensors; the function's own errors are raised again below
                self.items = [self._compute_one(each) for each in range(count)]

    def _compute_one(self, index: int) -> Any:
        """Computes one member alone."""
        pairs = zip(self.sources, self.members[index], strict=True)
        return self.call_function([source.item(each) for source, each in pairs], self.indices[index])

    def _updates_statistics(self) -> bool:
        """Whether each step updates running statistics."""
        return self.function is nn.functional.batch_norm and (self.args[5:6] or (self.kwargs.get("training"),))[0]

    def updated_statistics(self) -> int | None:
        """An id of the running statistics that each step updates, or None."""
        running = self.args[1] if len(self.args) > 1 else self.kwargs.get("running_mean")
        return _storage_id(running) if self._updates_statistics() and isinstance(running, Tensor) else None

    def make_meta(self) -> Any:
        metas = [source.meta() for source in self.sources]
        if self.function in (Tensor.cpu, Tensor.cuda):
            return metas[0]
        args, kwargs = tree_map(_on_meta_device, (self.args, self.kwargs))
        if self.function is Tensor.to:
            args, kwargs = tree_map_only(str, lambda device: "meta", (args, kwargs))
        whole = Operation(self.function, args, kwargs, (), self.modes)
        return whole.call_function(metas, self.indices[0])

    def device(self) -> torch.device:
        for each in _leaves((self.args, self.kwargs)):
            if isinstance(each, (torch.device, str)) and self.function is Tensor.to:
                return torch.device(each)
        if self.function in (Tensor.cpu, Tensor.cuda):
            return torch.device(self.function.__name__)
        if self.sources:
            return self.sources[0].device()
        return self.given[0].device


class Stacked(Operation):
    """torch.stack of members of one group. A stack that only one call makes, as after the loop, is no copy of them."""

    def compute(self) -> None:
        if len(self) > 1:  # a stack in each step, or of each window of steps
            super().compute()
            return
        dim: int = self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else 0)
        self.items = [tree_map(lambda each: each.movedim(0, dim), self.sources[0].gather(self.members[0]))]


def _leaves(value: Any) -> Iterator[Any]:
    """The values in nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _structure(value: Any) -> str:
    """The structure of a model's output, for errors."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_structure(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_structure, value))})"
    return "tensor" if isinstance(value, (Recorded, Tensor)) else type(value).__name__


def _fill_holes(value: Any, fill: Callable[[Any], Any]) -> Any:
    """The value with each hole replaced by fill(hole): as tree_map, but also in slices, not in torch's named tuples."""
    if isinstance(value, _Hole):
        return fill(value)
    if type(value) in (tuple, list):
        return type(value)(_fill_holes(each, fill) for each in value)
    if type(value) is dict:
        return {name: _fill_holes(each, fill) for name, each in value.items()}
    if type(value) is slice:
        return slice(*(_fill_holes(each, fill) for each in (value.start, value.stop, value.step)))
    return value


def _select_steps(base: Tensor, index: Any, indices: Sequence[tuple[int, ...]]) -> Tensor | None:
    """`base[index]` with the integer of each step, stacked; None if the index does more than select on a dimension."""
    index = index if isinstance(index, tuple) else (index,)
    rest: tuple[Any, ...] = ()
    if not isinstance(base, Tensor) or len(indices[0]) > 1:
        return None
    if index[0] is Ellipsis and len(index) == 2:
        dim = base.dim() - 1
    else:
        dim = next((place for place, each in enumerate(index) if isinstance(each, _Hole)), -1)
        rest = (*index[:dim], slice(None), *index[dim + 1 :])
        if dim < 0 or any(not isinstance(each, slice) or each.step is not None for each in rest):
            return None
    size: int = base.shape[dim]
    steps = [each[0] for each in indices]
    if not all(-size <= each < size for each in steps):
        return None
    base = (base[rest] if rest else base).movedim(dim, 0)
    steps = [each % size for each in steps]
    if steps == list(range(steps[0], steps[0] + len(steps))):
        return base if len(steps) == size else base.narrow(0, steps[0], len(steps))
    return base[steps]


class _Purity(TorchDispatchMode):
    """A mode that notes whether all functions called in it are pure: they draw no random numbers and change nothing."""

    pure = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        changes = function._schema.is_mutable or ("batch_norm" in function.name() and "backward" not in function.name())
        self.pure &= not changes and torch.Tag.nondeterministic_seeded not in function.tags
        return function(*args, **kwargs or {})


class Result(Group):
    """One of the results of a chain, such as the spikes, in all of its steps."""

    def __init__(self, chain: Chain, name: str) -> None:
        super().__init__()
        self.chain, self.name = chain, name
        self.is_used = False
        self.requires_grad = True

    def __len__(self) -> int:
        return len(self.chain.inputs)

    def is_wanted(self) -> bool:
        """Whether the values of steps before the last one may be needed."""
        return self.is_used or any(each() is not None for each in self.values[:-1])

    def make_meta(self) -> Any:  # spikes and states have the shape of the input
        return self.sources[0].meta()

    def device(self) -> torch.device:
        return self.chain.inputs[0].group.device()

    def item(self, index: int) -> Any:
        """The value in one step. The last one needs no stack, because the chain has it."""
        if self.stack is None and self.items is None and index == len(self) - 1:
            return self.chain.final[self.name]
        return super().item(index)

    def gather(self, indices: Sequence[int]) -> Any:
        if self.stack is None:  # the last step alone is left
            return torch.stack([self.item(each) for each in indices])
        return super().gather(indices)

    def is_computed(self) -> bool:
        """Whether the chain has run. It computes only results that are wanted; others then have no values."""
        return self.chain.is_done


def _mark_used(group: Group) -> Group:
    """Notes that a value of this group is used later, so that a `Result` keeps all its steps, and returns the group."""
    if isinstance(group, Result):
        group.is_used = True
    return group


class Chain:
    """Consecutive steps of one layer, each of which starts from the states that the step before has left."""

    is_done = False

    def __init__(self, layer: Any, initial: dict[str, Any], modes: _Modes) -> None:
        self.layer, self.modes = layer, modes
        self.initial = {name: _as_member(each) for name, each in initial.items()}
        self.inputs: list[_Member] = []
        self.mark = self._values_beside_states()
        self.results = {name: Result(self, name) for name in (SPIKES, *initial)}
        self.final: dict[str, Any] = {}

    def is_continued_by(self, states: dict[str, Any]) -> bool:
        """Whether the states are those that the last step of the chain left."""
        last = len(self.inputs) - 1
        for name, state in states.items():
            if type(state) is not Recorded or state.group is not self.results[name] or state.index != last:
                return False
        return True

    def _values_beside_states(self) -> list[Any]:
        """The values with which the layer computes besides its states: ids and versions of its tensors, and numbers."""
        mark: list[Any] = []
        for module in self.layer.modules():
            mark += [value for name, value in vars(module).items() if name[0] != "_" and type(value) in _NUMBERS]
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if isinstance(tensor, Tensor) and name not in self.initial:
                    mark += (id(tensor), 0 if tensor.is_inference() else tensor._version)
        return mark

    def required_groups(self) -> list[Group]:
        """The groups that must be computed before the chain runs."""
        return [each.group for each in (*self.inputs, *self.initial.values()) if isinstance(each, _Member)]

    def has_changed_layer(self) -> bool:
        """Whether a value with which the layer computes, other than a state, has changed since the first step."""
        return self.mark != self._values_beside_states()

    def run(self) -> None:
        """Computes all steps of the layer at once."""
        groups = {each.group for each in self.inputs}
        if len(groups) > 1:
            x_seq = torch.stack([each.group.item(each.at) for each in self.inputs])
        else:
            x_seq = groups.pop().gather([each.at for each in self.inputs])
        initial = {
            name: each.group.item(each.at) if isinstance(each, _Member) else each for name, each in self.initial.items()
        }
        wanted = {name for name, each in self.results.items() if each.is_wanted()}
        layer, kept = self.layer, self.layer.carried_states()
        for name in kept:
            layer.set_state(name, initial[name])
        try:
            with _in_modes(self.modes):
                found, self.final = layer.compute_steps(x_seq, initial, wanted)
            self.final |= layer.carried_states()
        finally:
            for name, state in kept.items():  # those of a later step, or of a reset after the loop
                layer.set_state(name, state)
        for name, stack in found.items():
            self.results[name].stack = stack
        self.is_done = True

    def store_final_states(self) -> None:
        """Sets the layer's states to those after the loop."""
        for name, state in self.layer.carried_states().items():
            if type(state) is Recorded:
                is_last = self.is_continued_by({name: state}) and name in self.final
                self.layer.set_state(name, self.final[name] if is_last else state.value("").clone())


_NUMBERS = (bool, int, float, str)
SPIKES = "spikes"  # name of the only result of a chain that is not a state


class _Member(NamedTuple):
    """A member of a group."""

    group: Group
    at: int


def _as_member(value: Any) -> Any:
    """A recorded value as its group and index, marked as used; any other value as it is."""
    return _Member(_mark_used(value.group), value.index) if type(value) is Recorded else value


# ---- recording ----


class Recording:
    """Records the calls of layers and of torch's functions inside ``with recording: ...``, and computes them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.operations: dict[Any, Operation] = {}
        self.chains: dict[nn.Module, Chain] = {}  # the current one of each layer
        self.earlier: list[Chain] = []  # those that are complete
        self.effects: list[Operation] = []  # changes of tensors that exist already, in order
        self.existing: dict[int, Existing] = {}
        self.updates: dict[int, Operation] = {}  # the last operation that updates these running statistics
        self.readers: dict[Group, list[Operation]] = {}  # the operations by the groups of their operands
        self.read: set[int] = set()  # storages of existing tensors that recorded operations read
        self.written: set[int] = set()  # those that effects will change
        self.is_running = False
        self.checkpoint = current_checkpoint()
        self.asked = ""  # the function that needs a value, for errors
        self.waiting: list[tuple[Group, int, Callable[[Any], object]]] = []
        self.calls: dict[nn.Module, int] = {}  # number of recorded steps of each layer
        self.before: dict[Any, dict[str, Any]] = {}  # states of layers before their first step

    def __enter__(self) -> Recording:
        self._outer, self._mode = current_recording(), cast("Any", _Mode(self))
        _local.recording = self
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        _local.recording = self._outer
        self._mode = None
        if error[0] is not None:  # nothing will compute the recorded states: restore those before
            for layer, states in self.before.items():
                for name, state in states.items():
                    layer.set_state(name, state)
        for chain in (*self.earlier, *self.chains.values()):  # breaks reference cycles, which would keep tensors alive
            chain.results.clear()

    def as_operand(self, value: Tensor) -> Recorded:
        """Wraps an existing tensor, so that calls with it are recorded."""
        return Recorded(self, self.existing.setdefault(id(value), Existing(value)), 0)

    def record_call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Records the call of a function of torch."""
        if self.is_running or current_recording() is not self:
            return Recorded.__torch_function__(function, (), args, kwargs)
        if function in _LIKE:
            return function(args[0].group.meta(), *args[1:], **{"device": args[0].device, **kwargs})
        if not torch.is_grad_enabled() and is_in_function_forward():
            raise RuntimeError(
                f"{_CALLER}: with sequences, the model can't call {function.__name__} in the forward of a "
                "torch.autograd.Function, because its arguments are computed only after the model's code has run; use "
                "asgl_cuda.convert(model) without sequences, which computes step by step"
            )
        if kwargs.get("out") is not None:
            raise RuntimeError(
                f"{_CALLER}: with sequences, {function.__name__} can't be recorded with the argument out; use what the "
                "function returns, or asgl_cuda.convert(model) without sequences"
            )
        reads = function in (torch.stack, torch.Tensor.__getitem__)  # frequent, and never in place
        changed = None if reads else _out_of_place_call(function, args, kwargs)
        if not changed:
            return self._record_operation(function, args, kwargs)
        target = args[0]
        if type(target) is Recorded:
            function, args, kwargs, name = changed
            if refusal := self._in_place_refusal(target, name, function is not None):
                raise RuntimeError(f"{_CALLER}: with sequences, {refusal}")
            made = self._record_operation(function, args, kwargs)
            target.group, target.index = made.group, made.index
            target.group.values[target.index] = weakref.ref(target)
        else:
            self._record_write(function, args, kwargs)
        return target

    def _in_place_refusal(self, target: Recorded, name: str, has_plain: bool) -> str:
        """Why the function `name` can't change `target` in place, and what to do instead; "" if it can."""
        if not has_plain:
            called = "`tensor[...] = value`" if name == "__setitem__" else name
            return (
                f"{called} on a tensor that the model's forward gets or computes can't be recorded; use a function "
                "that returns a new tensor, as torch.where or masked_fill, or asgl_cuda.convert(model) without "
                "sequences"
            )
        sharing = self._sharing(target)
        if any(isinstance(group, Existing) for group, _ in sharing):
            plain = "an operator that does not assign, as x + 1" if name[:2] == "__" else name.removesuffix("_")
            plain = plain if name[-1] == "_" else f"{name} with inplace=False"
            return f"{name} can't change the model's input, or a part of it, in place; change x.clone(), or use {plain}"
        for group, index in sharing:
            other = group.values[index]()
            if other is None or other is target or (other.group, other.index) != (group, index):
                continue
            return (
                f"{name} can't change a value of a step in place, because it shares memory with a view (view, flatten, "
                "indexing); change a clone() instead"
            )
        return ""

    def _sharing(self, value: Recorded) -> set[tuple[Group, int]]:
        """The members of groups that share memory with a value: it, its views, and those of which it is a view."""
        found: set[tuple[Group, int]] = set()
        todo = [(value.group, value.index)]
        while todo:
            group, index = place = todo.pop()
            if place in found:
                continue
            found.add(place)
            near: list[tuple[Group, int]] = []
            if isinstance(group, Operation) and not group.is_new:
                near += zip(group.sources, group.members[index], strict=True)
            for reader in self.readers.get(group, ()):
                if not reader.is_new:
                    members = (zip(reader.sources, each, strict=True) for each in reader.members)
                    near += [(reader, at) for at, member in enumerate(members) if place in member]
            todo += [each for each in near if each[0].memory & value.group.memory]
        return found

    def _record_write(self, function: Any, args: Any, kwargs: Any) -> None:
        """Records a change in place of an existing tensor, after computing what was recorded before and reads it."""
        storage = _storage_id(args[0])
        if storage in self.read:
            self.compute_all(function.__name__)
        self.written.add(storage)
        self._record_operation(function, args, kwargs, merge=False)

    def _record_operation(self, function: Any, args: Any, kwargs: Any, merge: bool = True) -> Recorded:
        """Records a call. With `merge` it becomes a member of the operation of the same call in other steps, if any."""
        operands: list[Recorded] = []
        indices: list[int] = []
        modes = _current_modes()
        key: list[Any] = [function, modes]
        is_item = function is Tensor.__getitem__ and type(args[0]) is Recorded
        if is_item and not (type(args[1]) is int and args[0].group.is_tuple()):  # members of tuples differ in shape
            _scan_argument(args[0], key, operands, None)
            _scan_argument(args[1], key, operands, indices)
            steps = args[0].group
            if isinstance(steps, Existing) and type(args[1]) is int and not -len(args[0]) <= args[1] < len(args[0]):
                raise IndexError(f"index {args[1]} is out of bounds for dimension 0 with size {len(args[0])}")
        else:
            for each in args:
                _scan_argument(each, key, operands, None)
            if kwargs:
                _scan_argument(kwargs, key, operands, None)
        made = self.operations.get(place := tuple(key)) if merge else None
        if made is None or made.is_computed():
            if current_checkpoint() is not self.checkpoint:
                raise RuntimeError(
                    f"{_CALLER}: with sequences, steps are computed after the model's code has run, so a "
                    "torch.utils.checkpoint inside of the model saves no memory; put the checkpoint around the model"
                )
            numbers = itertools.count()
            takes_indices = bool(indices)
            args, kwargs = (_with_holes(each, numbers, takes_indices) for each in (args, kwargs))
            groups = {each.group for each in operands}
            are_all = bool(args) and isinstance(args[0], (list, tuple)) and len(args[0]) == len(operands)
            kind = Stacked if function is torch.stack and len(groups) == 1 and are_all else Operation
            made = kind(function, args, kwargs, operands, modes)
            self.read |= {_storage_id(each) for each in made.given[not merge :]}  # not what an effect changes
            if merge:
                self.operations[place] = made
                for group in groups:
                    self.readers.setdefault(group, []).append(made)
            else:
                self.effects.append(made)
        if function is nn.functional.batch_norm and (statistics := made.updated_statistics()) is not None:
            last = self.updates.setdefault(statistics, made)
            if last is not made:
                if len(made):
                    raise RuntimeError(
                        f"{_CALLER}: with sequences, a batch_norm that updates running statistics must be called once "
                        "per step, on the output of the same operation in each step, because the statistics depend on "
                        "the order of the calls; use asgl_cuda.convert(model) without sequences, which computes step "
                        "by step"
                    )
                made.after, self.updates[statistics] = last, made
        made.members.append(tuple(each.index for each in operands))
        made.indices.append(tuple(indices))
        found = Recorded(self, made, len(made) - 1)
        made.values.append(weakref.ref(found))
        return found

    def add_layer_step(self, layer: Any, x: Any, states: dict[str, Any]) -> dict[str, Recorded]:
        """Records a step of a layer from these states. Returns the spikes and the states after it, by name."""
        modes = _current_modes()
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if layer not in self.before:
            self.before[layer] = layer.carried_states()
        chain = self.chains.get(layer)
        if chain is None or not chain.is_continued_by(states) or chain.modes != modes or chain.is_done:
            if chain is not None:
                if chain.is_done and chain.is_continued_by(states):
                    example = ", as in `if spk.sum() > 0`," if self.asked == "__bool__" else ""
                    name = self.layer_name(layer)
                    raise RuntimeError(
                        f"{_CALLER}: with sequences, all steps of {name} are computed at once, after the model's code "
                        f"has run, but between two steps this code calls {self.asked}{example} and so needs a computed "
                        "value or changes a tensor that the steps use; remove this call, or use "
                        "asgl_cuda.convert(model) without sequences, which computes step by step"
                    )
                self.earlier.append(chain)
            chain = self.chains[layer] = Chain(layer, states, modes)
        chain.inputs.append(_as_member(x if type(x) is Recorded else self.as_operand(x)))
        found = {}
        for name, result in chain.results.items():
            found[name] = Recorded(self, result, len(chain.inputs) - 1)
            result.values.append(weakref.ref(found[name]))
            result.sources = [chain.inputs[0].group]  # of the same shape
        return found

    def count_resets(self) -> Counter[Any]:
        """The number of steps of each layer whose states do not come from earlier steps."""
        chains = (*self.earlier, *self.chains.values())
        return Counter(each.layer for each in chains if not any(type(one) is _Member for one in each.initial.values()))

    def layer_name(self, layer: nn.Module) -> str:
        """The name of the layer in errors: its path and its class."""
        path = next((path for path, module in self.model.named_modules() if module is layer), "")
        return f"{path or '(the model)'} ({getattr(type(layer), 'original', type(layer)).__name__})"

    # ---- computing ----

    def value_of(self, recorded: Recorded, use: str) -> Any:
        """Computes and returns a recorded value. `use` names the function that needs it, for errors."""
        self.asked = use
        self._compute(recorded.group)
        return recorded.group.item(recorded.index)

    def compute_all(self, use: str) -> None:
        """Computes all that is recorded. `use` names the function that requires this, for errors."""
        self.asked = use
        self._compute(*self.operations.values())
        self._run_effects_and_chains()

    def _run_effects_and_chains(self) -> None:
        """Runs what changes tensors or layers: changes in place, updates of running statistics, and chains."""
        for effect in self.effects:
            self._compute(effect)
        self.effects.clear()
        self._compute(*self.updates.values())  # also of values that nothing uses
        for chain in (*self.earlier, *self.chains.values()):
            self._compute(chain)
        self.read.clear()
        self.written.clear()

    def compute_output(self, output: Any) -> Any:
        """Computes what was recorded, stores the states of layers, and returns the output with its values computed."""
        for each in _leaves(output):
            if type(each) is Recorded and isinstance(each.group, Result):
                each.group.is_used = True
        self._run_effects_and_chains()
        for group, index, function in self.waiting:
            self._compute(group)
            function(group.item(index))
        for chain in self.chains.values():
            chain.store_final_states()
        for module in self.model.modules():
            for values in (vars(module), *vars(module).values()):
                if isinstance(values, (dict, list)):
                    pairs = values.items() if isinstance(values, dict) else enumerate(values)
                    for name, each in [(name, each) for name, each in pairs if type(each) is Recorded]:
                        values[name] = each.value("")
        return tree_map_only(Recorded, lambda each: each.value("the model's output"), output)

    def stack_outputs(self, outputs: Sequence[Any]) -> Any:
        """Stacks the outputs of calls that were one step each."""
        first, spec = tree_flatten(outputs[0])
        leaves = [first]
        try:
            for output in outputs[1:]:
                leaves.append(spec.flatten_up_to(output))  # dicts with their keys in any order
        except ValueError:
            raise RuntimeError(
                f"{_CALLER}: with sequences, a model must return the same structure in each step, got "
                f"{_structure(outputs[0])} in step 0 and {_structure(output)} in step {len(leaves)}"
            ) from None
        return tree_unflatten([self._stack_output(each) for each in zip(*leaves, strict=True)], spec)

    def _stack_output(self, values: tuple[Any, ...]) -> Any:
        """Stacks one output of all steps; the stack is recorded if any of the outputs is. None if all are None."""
        if all(each is None for each in values):
            return None
        if not all(isinstance(each, (Recorded, Tensor)) for each in values):
            kinds = ["Tensor" if isinstance(each, (Recorded, Tensor)) else type(each).__name__ for each in values]
            other = next((f" and {kind} in step {step}" for step, kind in enumerate(kinds) if kind != kinds[0]), "")
            raise TypeError(
                f"{_CALLER}: with sequences, a model must return tensors in each step, or None in every step, got "
                f"{kinds[0]} in step 0{other}"
            )
        some = any(type(each) is Recorded for each in values)
        return self.record_call(torch.stack, list(values)) if some else torch.stack(values)

    def pass_through(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function of existing tensors, after computing what is recorded of those that it reads or changes."""
        name = function.__name__
        if self.written and name not in _METADATA and name != "__get__":
            tensors = (each for each in _leaves((args, kwargs)) if isinstance(each, Tensor))
            if any(_storage_id(each) in self.written for each in tensors):
                self.compute_all(name)
        out = kwargs.get("out")
        if self.read and (out is not None or _out_of_place_call(function, args, kwargs)):
            changed = (each for each in _leaves((out, args[:1])) if isinstance(each, Tensor))
            if any(_storage_id(each) in self.read for each in changed):
                self.compute_all(name)
        return function(*args, **kwargs)

    def _compute(self, *wanted: Any) -> None:
        """Computes these groups and chains, and what they need."""
        if self.is_running:  # called inside of an operation that is being computed
            return
        self.is_running = True
        try:
            for each in wanted:
                self._compute_in_order(each)
        finally:
            self.is_running = False

    def _compute_in_order(self, wanted: Any) -> None:
        """Computes a group or chain after all that it needs, without recursion. Raises RuntimeError for a cycle."""
        todo, opened = [_computing_unit(wanted)], set()  # a stack of units, and those of them that wait for others
        while todo:
            unit = todo[-1]
            missing = (
                []
                if _is_computed(unit)
                else [_computing_unit(each) for each in unit.required_groups() if not each.is_computed()]
            )
            if missing:
                opened.add(unit)
                if again := next((each for each in missing if each in opened), None):
                    path = [each for each in todo[todo.index(again) :] if each in opened]
                    names = [self.layer_name(each.layer) for each in path if isinstance(each, Chain)]
                    own = "this layer" if len(names) == 1 else "these layers"
                    raise RuntimeError(
                        f"{_CALLER}: with sequences, all steps of a layer are computed at once, but the input of "
                        f"{' and '.join(names)} depends on earlier outputs of {own}, by feedback or because a layer is "
                        "used twice in a step; use asgl_cuda.convert(model) without sequences, which computes step by "
                        "step"
                    )
                todo += dict.fromkeys(missing)
                continue
            todo.pop()
            if not _is_computed(unit):
                if isinstance(unit, Chain) and unit.has_changed_layer():
                    raise RuntimeError(
                        f"{_CALLER}: with sequences, all steps of {self.layer_name(unit.layer)} are computed at once, "
                        "after the model's code has run, but this code changes parameters or attributes of the layer "
                        "after its first step; use asgl_cuda.convert(model) without sequences, which computes step by "
                        "step"
                    )
                unit.run()


def _computing_unit(group: Any) -> Any:
    """The unit that computes a group: the chain of a result, or the group itself."""
    return group.chain if isinstance(group, Result) else group


def _is_computed(unit: Any) -> bool:
    """Whether a unit, which is a group or a chain, is computed."""
    return unit.is_done if isinstance(unit, Chain) else unit.is_computed()


class _Mode(TorchFunctionMode):
    """Passes all calls of torch's functions in a recording to it."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recording.is_running:
            return function(*args, **(kwargs or {}))
        if Recorded in types:
            return self.recording.record_call(function, *args, **(kwargs or {}))
        return self.recording.pass_through(function, args, kwargs or {})


def _scan_argument(value: Any, key: list[Any], operands: list[Recorded], indices: list[int] | None) -> None:
    """Adds an argument to the `key` by which equal calls are found.

    Recorded values in it are also added to `operands`, and integers to `indices` if that is a list.
    """
    kind = type(value)
    if kind is Recorded:
        operands.append(value)
        key.append(-value.group.serial)  # negative, because ids of tensors are positive
    elif isinstance(value, Tensor):
        key.append(id(value))
    elif kind in (tuple, list) or isinstance(value, (tuple, list)):
        key.append((kind, len(value)))
        for each in value:
            _scan_argument(each, key, operands, indices)
    elif kind is dict:
        key.append((dict, *value))
        for each in value.values():
            _scan_argument(each, key, operands, None)
    elif kind is slice:
        key.append(slice)
        for each in (value.start, value.stop, value.step):
            _scan_argument(each, key, operands, None)
    elif kind is int and indices is not None:
        indices.append(value)
        key.append(_Hole)
    else:
        key.append((kind, id(value) if kind.__hash__ is None else value or str(value)))  # 0.0 equals -0.0


def _with_holes(value: Any, numbers: Iterator[int], takes_indices: bool, inside: bool = False) -> Any:
    """An argument with holes in place of operands and, if it `takes_indices`, of integers in the index of getitem."""
    kind = type(value)
    if kind is Recorded:
        return _Hole(next(numbers))
    if kind in (tuple, list) or isinstance(value, (tuple, list)):
        made = [_with_holes(each, numbers, takes_indices, True) for each in value]
        return made if isinstance(value, list) else tuple(made)
    if kind is dict:
        return {name: _with_holes(each, numbers, False) for name, each in value.items()}
    if kind is slice:
        return slice(*(_with_holes(each, numbers, False) for each in (value.start, value.stop, value.step)))
    return _Hole(None) if kind is int and takes_indices and inside else value


def _storage_id(tensor: Tensor) -> int:
    """An id of the memory of a tensor, equal for views of the same memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor of torch.func, or a sparse one, has no storage
        return id(tensor)


@functools.cache
def _in_place_form(function: Any) -> tuple[Any, str, int | None] | None:
    """How a function changes its first argument in place. None if it does not.

    If it always does, as `add_`: the function that computes the same out of place, or None without one, as for
    `x[i] = value`; the name of the given function; and None. If an argument `inplace` decides: the function itself, its
    name, and the position of this argument.
    """
    name = function.__name__
    if name == "__setitem__":
        return None, name, None
    plain = ""
    if name[:3] == "__i" and name[-2:] == "__" and name not in ("__invert__", "__int__", "__index__"):
        plain = f"__{name[3:]}"
    elif name[-1:] == "_" and name[-2:] != "__":
        plain = name[:-1]
    if plain:
        owner = next((each for each in (Tensor, torch, nn.functional) if getattr(each, name, None) is function), Tensor)
        found = getattr(owner, plain, getattr(Tensor, plain, None))
        return found and _keeping_dtype(found), name, None
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return (function, name, names.index("inplace")) if "inplace" in names else None


def _keeping_dtype(function: Any) -> Any:
    """Wraps a function so that its result keeps the dtype of the first argument, as a change in place does."""

    @functools.wraps(function)
    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        return function(target, *args, **kwargs).to(target.dtype)

    return call


def _out_of_place_call(function: Any, args: Any, kwargs: Any) -> Any:
    """The same call without a change in place: function, arguments, and name of the given function.

    The function is None if there is no such call, as for `x[i] = value`. Returns None, not a tuple, if the given call
    changes nothing.
    """
    kind = _in_place_form(function)
    if kind is None:
        return None
    plain, name, place = kind
    if place is None:
        return plain, args, kwargs, name
    if kwargs.get("inplace"):
        return plain, args, {**kwargs, "inplace": False}, name
    if len(args) > place and args[place]:
        return plain, (*args[:place], False, *args[place + 1 :]), kwargs, name
    return None
