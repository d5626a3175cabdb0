"""`Pending`: a normalised value that is computed only if something else than neurons asks for it.

Neurons act on each element of a step alone, so that views in between commute with the normalisation:

    lif(view(norm(x)) + s) = batch_norm_lif(view(x), residual=s)    with the channels where the view puts them
    lif(a norm(x)) = batch_norm_lif(x, input_scale=a)               for a number a

A plain object: a subclass of Tensor would enter a `torch.autograd.Function` without its gradient.
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

_SWAPS, _MOVES = ("transpose", "swapaxes", "swapdims"), ("movedim", "moveaxis")
_BY_SHAPE = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "to")
_VIEWS = frozenset((*_SWAPS, *_MOVES, *_BY_SHAPE, "permute", "contiguous", "view_as", "reshape_as"))
_PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__"))
_SUMS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
_QUERIES = frozenset(
    ("shape", "ndim", "dtype", "device", "layout", "size", "dim", "numel", "is_cuda", "is_sparse", "is_nested",
     "is_floating_point", "is_complex", "new_zeros", "new_ones", "new_full")
)  # fmt: skip


class Source:
    """A tensor that the layers would have computed, here a sum. `value_because` computes it, for a reason in words."""

    tensor: Tensor | None = None
    changes = 0  # number of changes in place

    def __init__(self, of: Any, other: Tensor) -> None:
        self.of, self.other, self.has_graph = of, other, torch.is_grad_enabled()

    def compute(self, reason: str) -> Tensor:
        """Computes the tensor."""
        return self.of.value_because(reason) + self.other  # type: ignore[no-any-return]

    def value_because(self, reason: str) -> Tensor:
        """The tensor, computed once, with a graph if gradients were enabled when the layers ran."""
        if self.tensor is None:
            with torch.set_grad_enabled(self.has_graph):
                self.tensor = self.compute(reason)
        return self.tensor


class Normal(Source):
    """The output of a call of a normalisation."""

    taken = False  # whether neurons have computed it, and updated the running statistics
    training = False

    def __init__(self, norm: Any, x: Tensor) -> None:
        super().__init__(norm, x)
        self.training, self.checkpoint = norm.training, current_checkpoint()

    def compute(self, reason: str) -> Tensor:
        """Computes the normalised value, and tells the normalisation that it was not merged."""
        value: Tensor = self.of.compute_alone(self.other, self.training, not self.taken)
        self.of.note_left(reason)
        return value

    def is_open(self) -> bool:
        """Whether neither neurons nor others have used the output."""
        return self.tensor is None and not self.taken

    def __del__(self) -> None:
        if self.is_open() and self.training:  # the layer itself would have counted the batch
            with suppress(Exception):  # for example for a batch of one value
                self.value_because("nothing uses it")


class Pending:
    """Views of a normalised value times `factor`, or of its sum with one other tensor: `views(source)`.

    `x` and `residual`, the operands, have seen the views; the channels are dimension `channel`. Views, factors and one
    addition make another; other functions, operators and methods of tensors get the value, as the layers computed it.
    """

    value: Tensor | None = None
    factor = 1.0  # scales only the normalised value, not the other operand

    def __init__(
        self,
        call: Normal,
        source: Source,
        channel: int,
        x: Tensor,
        residual: Tensor | None = None,
        views: tuple[Any, ...] = (),
        watched: tuple[Any, ...] = (),  # tensors that must not change, with their versions
    ) -> None:
        self.call, self.source, self.channel, self.x, self.residual = call, source, channel, x, residual
        self.views, self.watched, self.changes = views, watched, source.changes
        self.views_have_graph = torch.is_grad_enabled()
        self.has_graph = call.has_graph  # that of the call; views and sums inherit it

    @property
    def norm(self) -> Any:
        """The normalisation."""
        return self.call.of

    @property
    def requires_grad(self) -> bool:
        """Whether the value would require a gradient."""
        values = (self.x, self.norm.weight, self.norm.bias, self.residual) if self.has_graph else (self.residual,)
        return self.views_have_graph and any(each is not None and each.requires_grad for each in values)

    def tensor(self, use: str) -> Tensor:
        """The value, which `use` needs."""
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
        """Whether the value, or the tensor that it is a view of, is computed."""
        return self.value is not None or self.source.tensor is not None or self.call.tensor is not None

    def check_unchanged(self) -> None:
        """Raises if a change in place would make the value differ from that of the separate layers."""
        if self.changes != self.source.changes:
            raise self.norm.refusal(
                "its output, or a view of it, was changed in place after the tensor that is used here had been made "
                "from it",
                "make that tensor after the change, ",
            )
        if any(version != _version(tensor) for tensor, version in self.watched):
            raise self.norm.refusal(
                "its input, or what is added to its output, has been modified by an inplace operation"
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
        """The attribute or method `name` of the value."""
        value = self.tensor(name)
        self._count_change(name)
        return getattr(value, name)

    def _count_change(self, name: str) -> None:
        """Counts a change in place, so that `check_unchanged` refuses other views that are not computed yet."""
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
        args, kwargs = (tree_map_only(Pending, lambda each: each.tensor(name), each) for each in (args, kwargs))
        if isinstance(first, Pending):
            first._count_change(name)
        return function(*args, **kwargs)

    # ---- views and the sum ----

    def _view(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A view: another `Pending` if the place of the channels is known, otherwise a view of the value."""
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
            return getattr(self.tensor(name), name)(*args, **kwargs)
        views = (*self.views, (name, args, kwargs))
        return self._pass_state_to(Pending(self.call, self.source, channel, x, residual, views, self.watched))

    def _pass_state_to(self, made: Pending) -> Pending:
        """Passes on what is known of a value to a view of it, or to a sum."""
        made.has_graph = self.has_graph and torch.is_grad_enabled()
        made.factor = self.factor
        if made.source is self.source:
            made.changes, made.views_have_graph = self.changes, made.views_have_graph and self.views_have_graph
        return made

    def _channel_after_view(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The dimension of the channels after a permutation; the present one for a reshape; -1 for other views."""
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
        """The sum with another tensor: another `Pending` if neurons can add it, otherwise of the value."""
        if isinstance(other, Pending):
            other = other.tensor("add")
        x, is_taken = self.x, self.is_computed() or self.call.taken or self.residual is not None
        kind = (other.shape, other.dtype, other.device) if isinstance(other, Tensor) else None
        if is_taken or kind != (x.shape, x.dtype, x.device) or more or alpha != 1:
            return self._value_attribute(name)(other, **more, **({} if alpha == 1 else {"alpha": alpha}))
        self.check_unchanged()
        of = self._pass_state_to(Pending(self.call, self.source, self.channel, x, None, self.views, self.watched))
        source, seen = Source(of, other), (*self.watched, *with_version(other))
        if name not in _CHANGING:
            return self._pass_state_to(Pending(self.call, source, self.channel, x, other, (), seen))
        self._count_change(name)
        of.changes, self.views_have_graph = self.changes, torch.is_grad_enabled()
        self.has_graph &= self.views_have_graph
        self.source, self.residual, self.views, self.watched, self.changes = source, other, (), seen, 0
        return self

    def _multiply(self, name: str, other: Any, **more: Any) -> Any:
        """The product with a constant: another `Pending` if possible, otherwise of the value."""
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
        """The value, if `layer`, the neurons after it, can't take normalisation and sum into one call; None if it can.

        Arguments as in `run_merged`.
        """
        name = _class_name(layer)
        if self.is_computed() or (update and self.call.taken):
            return self.tensor(name)
        self.check_unchanged()
        if hook := self.norm.hook_before(layer):
            raise self.norm.refusal(
                f"{hook} would get no gradient of {self.norm.original.__name__}'s output",
                "remove the hook, ",
                "register the hook before asgl_cuda.fuse(model, example)",
            )
        why = self._reason_against(given) or self.norm.reason_against(self, given)
        return self.tensor(f"{name}, {why}") if why else None

    def run_merged(self, layer: Any, given: Arguments, update: bool) -> Any:
        """The output of `layer` with the arguments `given`, in one call with normalisation and sum.

        Without `update` nothing changes, for a call that is repeated.
        """
        x: Any = self.x
        residual, v_init, time_dim = self.residual, given["v_init"], given["time_dim"] % x.dim()
        here, there = dims = (
            self.channel,
            channel_dim(time_dim),
        )  # the channels' dimension, and where the operator expects it
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
        """Why the operator can't get the channels where it expects them; "" if it can."""
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
    """The dimension of the channels after a reshape: of their size, with as many elements before it; -1 without one."""
    front, found = math.prod(before[:channel]), -1
    for dim, size in enumerate(after):
        if size == before[channel] and math.prod(after[:dim]) == front:
            found = dim
            if dim - len(after) == channel - len(before):  # of several dimensions of size 1, the one in the same place
                break
    return found if front else -1


def tensor_of(x: Any, use: str) -> Any:
    """The value of a `Pending`; anything else as it is."""
    return x.tensor(use) if isinstance(x, Pending) else x


def _class_name(layer: nn.Module) -> str:
    """The name of the layer's class before it was converted."""
    return getattr(type(layer), "original", type(layer)).__name__


def _version(tensor: Tensor) -> int:
    """The number of writes; not counted in inference mode and in compiled code."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def with_version(tensor: Tensor) -> tuple[Any, ...]:
    """The tensor with its version, which shows later whether the tensor has changed."""
    return ((tensor, _version(tensor)),)


def is_in_function_forward() -> bool:
    """Whether the forward of a torch.autograd.Function runs, which, unlike torch.no_grad, disables forward mode too."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    return not torch._C._is_fwd_grad_enabled()


def backward_hook_of(module: nn.Module) -> str:
    """A hook in backward of this module, or of every module, in words; "" if there is none. Hooks need tensors."""
    every = nn.modules.module
    if every._global_backward_hooks or every._global_backward_pre_hooks:
        return "the backward hook of all modules"
    has_hook = module._backward_hooks or module._backward_pre_hooks
    return f"the backward hook of {_class_name(module)}" if has_hook else ""


def is_in_backward() -> bool:
    """Whether autograd computes gradients here, as where a checkpoint computes its forward again."""
    return torch._C._current_graph_task_id() != -1


def active_saved_tensor_hooks() -> Any:
    """The saved-tensor hooks of torch.autograd.graph on top, from torch 2.7 on; None: there are none."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None or torch.compiler.is_compiling() else top(False)


def current_checkpoint() -> Any:
    """An object that identifies the checkpoint that is being computed, or None; reentrant checkpoints have none."""
    hooks = active_saved_tensor_hooks()
    return hooks[0] if hooks and hooks[0].__module__ == "torch.utils.checkpoint" else None


def _operator(name: str) -> Any:
    """The method `name` of tensors for `Pending`."""

    def operator(self: Pending, *args: Any) -> Any:
        """A sum or product that may stay pending, otherwise the value's operator."""
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
        setattr(Pending, _name, _operator(_name))
