"""`Pending`: the output of a normalisation that `fuse` merges, computed only if other code than neurons uses it.

Neurons compute each element of a step on its own, so a view between the two may as well be before the normalisation:

    lif(view(norm(x)) + s) = batch_norm_lif(view(x), residual=s)    with the channels where the view puts them
    lif(a norm(x)) = batch_norm_lif(x, input_scale=a)               for a number a

`Pending` is no subclass of Tensor, because that would enter a `torch.autograd.Function` without its gradient.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..calls.arguments import VALUES, Arguments
from ..layout import channel_dim
from ..torch_modes import current_checkpoint, is_in_function_forward

_SWAPS, _MOVES = ("transpose", "swapaxes", "swapdims"), ("movedim", "moveaxis")
_BY_SHAPE = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "to")
_VIEWS = frozenset((*_SWAPS, *_MOVES, *_BY_SHAPE, "permute", "contiguous", "view_as", "reshape_as"))
_PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__"))
_SUMS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
_QUERIES = frozenset(
    ("shape", "ndim", "dtype", "device", "layout", "size", "dim", "numel", "is_cuda", "is_sparse", "is_nested",
     "is_floating_point", "is_complex", "new_zeros", "new_ones", "new_full")
)  # fmt: skip


class DeferredTensor:
    """A tensor that is computed only if needed. Here it is the sum of `of` and another tensor."""

    tensor: Tensor | None = None
    changes = 0  # how often the tensor, or a view of it, was changed in place

    def __init__(self, of: Any, other: Tensor) -> None:
        self.of, self.other, self.has_graph = of, other, torch.is_grad_enabled()

    def compute(self, reason: str) -> Tensor:
        """Computes the sum. `reason` says in words why it is needed."""
        return self.of.value_because(reason) + self.other  # type: ignore[no-any-return]

    def value_because(self, reason: str) -> Tensor:
        """The tensor, computed once, with a graph if gradients were enabled when the layers ran."""
        if self.tensor is None:
            with torch.set_grad_enabled(self.has_graph):
                self.tensor = self.compute(reason)
        return self.tensor


class NormOutput(DeferredTensor):
    """The output of a call of the normalisation `of` with the input `other`, computed only if needed."""

    taken = False  # whether neurons have computed the normalisation, and updated its running statistics
    training = False

    def __init__(self, norm: Any, x: Tensor) -> None:
        super().__init__(norm, x)
        self.training, self.checkpoint = norm.training, current_checkpoint()

    def compute(self, reason: str) -> Tensor:
        """Computes the output, and tells the normalisation the reason why it was not merged."""
        value: Tensor = self.of.compute_alone(self.other, self.training, not self.taken)
        self.of.note_left(reason)
        return value

    def is_unused(self) -> bool:
        """Whether nothing has used the output yet: neither neurons nor other code."""
        return self.tensor is None and not self.taken

    def __del__(self) -> None:
        if self.is_unused() and self.training:  # a normalisation that is not merged would have counted this batch
            with suppress(Exception):  # for example if a channel has only one value
                self.value_because("nothing uses it")


class Pending:
    """A stand-in for `views(source)`: `source` is a normalised value, or its sum with another tensor.

    `x` is the input of the normalisation, and `residual` the other tensor, both after the views. Their dimension
    `channel` has the channels. Views, factors and one addition return another `Pending`. Other functions, operators and
    methods get the value that separate layers compute.
    """

    value: Tensor | None = None
    factor = 1.0  # the product of factors on the normalised value; a sum with another tensor takes no factors

    def __init__(
        self,
        call: NormOutput,
        source: DeferredTensor,
        channel: int,
        x: Tensor,
        residual: Tensor | None = None,
        views: tuple[Any, ...] = (),
        watched: tuple[Any, ...] = (),  # pairs of a tensor that must not change and its version
    ) -> None:
        self.call, self.source, self.channel, self.x, self.residual = call, source, channel, x, residual
        self.views, self.watched, self.changes = views, watched, source.changes
        self.views_have_graph = torch.is_grad_enabled()
        self.has_graph = call.has_graph  # whether gradients were enabled in the call, and since then

    @property
    def norm(self) -> Any:
        """The module of the normalisation."""
        return self.call.of

    @property
    def requires_grad(self) -> bool:
        """Whether the value would require a gradient."""
        values = (self.x, self.norm.weight, self.norm.bias, self.residual) if self.has_graph else (self.residual,)
        return self.views_have_graph and any(each is not None and each.requires_grad for each in values)

    def value_for(self, use: str) -> Tensor:
        """The value, for code that `use` names in words."""
        if torch.compiler.is_compiling():
            return self.value_because("")
        what = "its output" if self.residual is None else "the sum of its output and another"
        return self.value_because(f"{what} {'is used again, by' if self.call.taken else 'goes to'} {use.strip('_')}")

    def value_because(self, reason: str) -> Tensor:
        """The value, computed once; `reason` says in words why it is needed."""
        if self.value is None:
            self.check_unchanged()
            value = self.source.value_because(reason)
            with torch.set_grad_enabled(self.views_have_graph):
                for name, args, kwargs in self.views:
                    value = getattr(value, name)(*args, **kwargs)
            self.value = value
        return self.value

    def is_computed(self) -> bool:
        """Whether the value exists already, or a tensor that it is made from: the sum, or the normalisation's output.

        Neurons then no longer merge.
        """
        return self.value is not None or self.source.tensor is not None or self.call.tensor is not None

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a change in place, or a Function, would make results or gradients wrong."""
        if self.changes != self.source.changes:
            raise self.norm.refusal(
                "a view of its output, made before the output was changed in place, is used after the change",
                "use the changed tensor or a new view of it, ",
            )
        if any(version != _version(tensor) for tensor, version in self.watched):
            raise self.norm.refusal(
                "its input, or the tensor added to its output, has been modified by an inplace operation"
            )
        if is_in_function_forward() and self.requires_grad:
            raise self.norm.refusal("its output goes to a torch.autograd.Function, which would lose its gradient")

    def __getattr__(self, name: str) -> Any:
        if name in _QUERIES:
            return getattr(self.x, name)
        if name in _VIEWS:
            return partial(self._view, name)
        if name in _SUMS:
            return partial(self._add, name)
        if name in _PRODUCTS:
            return partial(self._multiply, name)
        if not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return self._value_attribute(name)

    def _value_attribute(self, name: str) -> Any:
        """The attribute or method `name` of the value, which is computed for it."""
        value = self.value_for(name)
        self._count_change(name)
        return getattr(value, name)

    def _count_change(self, name: str) -> None:
        """If this method changes a tensor in place, counts it, so that `check_unchanged` refuses older views."""
        if name in _CHANGING:
            self.source.changes += 1
            self.changes = self.source.changes

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs, first = function.__name__, kwargs or {}, args[0] if args else None
        if isinstance(first, Pending) and name in _VIEWS:
            return first._view(name, *args[1:], **kwargs)
        if name in _SUMS and len(args) == 2:
            if isinstance(first, Pending):
                return first._add("add_" if name in _CHANGING else "add", args[1], **kwargs)
            if name not in _CHANGING:
                return args[1]._add("add", first, **kwargs)
        if name in _PRODUCTS and len(args) == 2:
            one, other = (first, args[1]) if isinstance(first, Pending) else (args[1], first)
            return one._multiply("mul", other, **kwargs)
        args, kwargs = (tree_map_only(Pending, lambda each: each.value_for(name), each) for each in (args, kwargs))
        if isinstance(first, Pending):
            first._count_change(name)
        return function(*args, **kwargs)

    # ---- views, and the sum with a residual ----

    def _view(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A view: another `Pending` if it is known which dimension has the channels, otherwise a view of the value."""
        if name in ("view_as", "reshape_as"):
            name, args = "reshape", (args[0].shape,)
        if name == "to" and args == (self.x.dtype,) and not kwargs:
            return self
        x: Any = self.x
        residual, channel = self.residual, self.channel
        if self.is_computed():
            channel = -1
        elif name != "contiguous":
            channel = self._channel_after_view(name, args, kwargs)
            if channel >= 0:
                on_input = "reshape" if name == "view" else name  # the layout of x may not allow a view
                x, residual = (
                    each if each is None else getattr(each, on_input)(*args, **kwargs) for each in (x, residual)
                )
                if name in _BY_SHAPE:
                    channel = _channel_after_reshape(self.x.shape, x.shape, channel)
        if channel < 0:
            return getattr(self.value_for(name), name)(*args, **kwargs)
        views = (*self.views, (name, args, kwargs))
        return self._pass_state_to(Pending(self.call, self.source, channel, x, residual, views, self.watched))

    def _pass_state_to(self, made: Pending) -> Pending:
        """Copies the factor, and whether gradients were enabled, to `made`, a view or sum of this value. Returns it."""
        made.has_graph = self.has_graph and torch.is_grad_enabled()
        made.factor = self.factor
        if made.source is self.source:
            made.changes, made.views_have_graph = self.changes, made.views_have_graph and self.views_have_graph
        return made

    def _channel_after_view(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The dimension of the channels after a view that permutes; for one that reshapes, as before; -1 if unknown."""
        x = self.x
        if name in _BY_SHAPE:
            if name == "to":  # half types must not be rounded between normalisation and neurons
                return self.channel if args == (torch.float32,) and not kwargs and x.dtype.itemsize == 2 else -1
            return -1 if any(isinstance(each, torch.dtype) for each in (*args, *kwargs.values())) else self.channel
        order = list(range(x.dim()))
        dims = args[0] if len(args) == 1 else args
        if kwargs or not all(isinstance(dim, int) for dim in dims):
            return -1
        if name == "permute":
            order = [dim % x.dim() for dim in dims]
        elif name in _SWAPS:
            first, second = dims
            order[first], order[second] = order[second], order[first]
        else:
            source, destination = dims
            order.insert(destination % x.dim(), order.pop(source))
        return order.index(self.channel)

    def _add(self, name: str, other: Any, alpha: float = 1, **more: Any) -> Any:
        """The sum with another tensor: a `Pending` if neurons can add it, otherwise the sum with the value."""
        if isinstance(other, Pending):
            other = other.value_for("add")
        x, is_taken = self.x, self.is_computed() or self.call.taken or self.residual is not None
        kind = (other.shape, other.dtype, other.device) if isinstance(other, Tensor) else None
        if is_taken or kind != (x.shape, x.dtype, x.device) or more or alpha != 1:
            return self._value_attribute(name)(other, **more, **({} if alpha == 1 else {"alpha": alpha}))
        self.check_unchanged()
        of = self._pass_state_to(Pending(self.call, self.source, self.channel, x, None, self.views, self.watched))
        source, seen = DeferredTensor(of, other), (*self.watched, *with_version(other))
        if name not in _CHANGING:
            return self._pass_state_to(Pending(self.call, source, self.channel, x, other, (), seen))
        self._count_change(name)
        of.changes, self.views_have_graph = self.changes, torch.is_grad_enabled()
        self.has_graph &= self.views_have_graph
        self.source, self.residual, self.views, self.watched, self.changes = source, other, (), seen, 0
        return self

    def _multiply(self, name: str, other: Any, **more: Any) -> Any:
        """The product with a constant: a `Pending` if neurons can compute it, otherwise the product with the value."""
        is_constant = type(other) in (int, float) and math.isfinite(other) and not more
        if not is_constant or self.is_computed() or self.residual is not None:
            return self._value_attribute(name)(tensor_of(other, name), **more)
        self.check_unchanged()
        views = (*self.views, (name, (other,), {}))
        made = self._pass_state_to(Pending(self.call, self.source, self.channel, self.x, None, views, self.watched))
        made.factor *= other
        return made

    # ---- neurons ----

    def value_unless_merged(self, layer: Any, given: Arguments, update: bool) -> Tensor | None:
        """None if the neurons `layer` can compute normalisation and sum in their call; otherwise the value.

        The arguments are those of `run_merged`.
        """
        name = _class_name(layer)
        if self.is_computed() or (update and self.call.taken):
            return self.value_for(name)
        self.check_unchanged()
        if hook := self.norm.hook_before(layer):
            raise self.norm.refusal(
                f"{hook} would get no gradient of {self.norm.original.__name__}'s output",
                "remove the hook, ",
                "register the hook before asgl_cuda.fuse(model, example)",
            )
        why = self._reason_against(given) or self.norm.reason_against(self, given)
        return self.value_for(f"{name}, {why}") if why else None

    def run_merged(self, layer: Any, given: Arguments, update: bool) -> Any:
        """The output of the neurons `layer` for the arguments `given`, in one call with normalisation and sum.

        Without `update` running statistics stay unchanged, for a call that is made again.
        """
        x: Any = self.x
        residual, v_init, time_dim = self.residual, given["v_init"], given["time_dim"] % x.dim()
        # The dimension that has the channels, and the one in which the operator expects them.
        here, there = dims = self.channel, channel_dim(time_dim)
        here_of_state, there_of_state = (dim - (dim > time_dim) for dim in dims)
        if here != there:
            x, residual = (each if each is None else each.contiguous().movedim(here, there) for each in (x, residual))
            given = {**given, "v_init": None if v_init is None else v_init.movedim(here_of_state, there_of_state)}
        if residual is not None:
            given = {**given, "residual": residual}
        running_mean = self.norm.running_mean
        version = None if running_mean is None else _version(running_mean)
        try:
            output = self.norm.compute_with_neurons(x, given, update, self.factor)
        except BaseException:  # for example from a checkpoint, which may stop the call after the update
            self.call.taken = update and running_mean is not None and _version(running_mean) != version
            raise
        if update:
            self.call.taken = True
            self.norm.note_taken(layer)
        if here == there:
            return output
        if isinstance(output, Tensor):
            return output.movedim(there, here)
        moves = (there, here), (there_of_state, here_of_state), (there, here), (there, here)
        found: Any = (each if each is None else each.movedim(*move) for each, move in zip(output, moves, strict=True))
        return type(output)(*found)

    def _reason_against(self, given: Arguments) -> str:
        """Why the channels can't be moved to the dimension in which the operator expects them; "" if they can."""
        x, time_dim = self.x, given["time_dim"]
        if not -x.dim() <= time_dim < x.dim():
            return f"whose time_dim is {time_dim}"
        time_dim = time_dim % x.dim()
        here, there = self.channel, channel_dim(time_dim)
        if there >= x.dim() or here == time_dim or (here < time_dim) != (there < time_dim):
            return f"which has time in dimension {time_dim}, with the channels in {here} of {list(x.shape)}"
        if here != there:
            by_name: Any = given
            values = [getattr(by_name[name], "stored", by_name[name]) for name in VALUES]
            if "features" in given or any(isinstance(each, Tensor) and each.numel() > 1 for each in values):
                return f"whose parameters differ, for channels in dimension {there}, not {here}"
            analog_prob = given["analog_prob"]
            if not x.is_contiguous() and (isinstance(analog_prob, Tensor) or analog_prob > 0):
                return "whose noise would fall on other elements in this layout"
        return ""


def _channel_after_reshape(before: Any, after: Any, channel: int) -> int:
    """The dimension that has the channels after a reshape: of their size, after as many elements; -1 without one."""
    front, found = math.prod(before[:channel]), -1
    for dim, size in enumerate(after):
        if size == before[channel] and math.prod(after[:dim]) == front:
            found = dim
            if dim - len(after) == channel - len(before):  # of several dimensions of size 1, the one in the same place
                break
    return found if front else -1


def tensor_of(x: Any, use: str) -> Any:
    """The value of a `Pending`, for code that `use` names in words; anything else as it is."""
    return x.value_for(use) if isinstance(x, Pending) else x


def _class_name(layer: nn.Module) -> str:
    """The name of the layer's class, or for a converted layer of its original class."""
    return getattr(type(layer), "original", type(layer)).__name__


def _version(tensor: Tensor) -> int:
    """The number of changes in place; 0 in compiled code and for inference tensors, which do not count them."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def with_version(tensor: Tensor) -> tuple[Any, ...]:
    """An entry of `watched`: the tensor with its version, which shows later whether the tensor has changed."""
    return ((tensor, _version(tensor)),)


def backward_hook_of(module: nn.Module) -> str:
    """The backward hook of this module or of all modules, in words; "" if there is none. Such hooks need tensors."""
    every = nn.modules.module
    if every._global_backward_hooks or every._global_backward_pre_hooks:
        return "the backward hook of all modules"
    has_hook = module._backward_hooks or module._backward_pre_hooks
    return f"the backward hook of {_class_name(module)}" if has_hook else ""


def _make_operator(name: str) -> Any:
    """Makes the operator `name` of `Pending`, such as `__add__`."""

    def operator(self: Pending, *args: Any) -> Any:
        """The sum or product, which may be a `Pending`; for other operators, their result for the value."""
        if name in _SUMS:
            return self._add(name, *args)
        return self._multiply(name, *args) if name in _PRODUCTS else self._value_attribute(name)(*args)

    return operator


_OPERATORS = {name for name in dir(Tensor) if name[:2] == "__" and callable(getattr(Tensor, name))} - {*dir(object)}
_OPERATORS |= {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__repr__", "__format__", "__reduce_ex__"}
_CHANGING = {name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")} | {"__setitem__"}
_CHANGING |= {*(name for name in _OPERATORS if name[:3] == "__i" and f"__{name[3:]}" in _OPERATORS)}
for _name in _OPERATORS - {"__torch_function__", "__torch_dispatch__", "__setstate__"}:
    if _name not in vars(Pending):
        setattr(Pending, _name, _make_operator(_name))
