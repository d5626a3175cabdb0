"""Spikes recomputed in backward instead of stored: `with asgl_cuda.recompute_spikes():` around forward.

A convolution or a linear layer saves its input for backward, which in a spiking network is spikes. Noise is
counter-based: one forward kernel computes the same spikes, analog values included, from the neuron's saved tensors.

Backward of neurons also recomputes potentials from checkpoints; that is unrelated, and needs no context.

Max pooling saves indices as int64, twice the bytes of its float32 result; `_SavedTensor` keeps them in a smaller type.

Hooks on saved tensors put a `_Placeholder` in place of spikes and views of spikes, recognised by their storage; a weak
reference keeps the address of a storage from being reused. Under such hooks autograd does not compare versions of
tensors, so `_SavedTensor` does.

Where other hooks on saved tensors are active, such as those of activation checkpointing, nothing is recomputed.
Checkpointing counts what it saves, and its memory is freed only if nothing else keeps the inputs of neurons.

torch.compile does not trace such hooks. There `torch.utils.checkpoint` tells AOTAutograd to compute a call of neurons
again in backward.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload
from weakref import WeakSet, WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ..checks import format_type
from ..torch_modes import is_exporting, is_transform_active

Module = TypeVar("Module", bound=nn.Module)

_CALLER = "asgl_cuda.recompute_spikes"


class _Thread(threading.local):
    """The open contexts of a thread, and the calls of neurons inside them by the storage of their spikes."""

    hooks: contextlib.AbstractContextManager[None]
    known: WeakValueDictionary[int, _SpikesOfCall]

    def __init__(self) -> None:
        self.depth = 0
        self.packed = False  # whether the hooks have saved a tensor
        self.models: list[nn.Module] = []  # models whose forward has opened a context


_thread = _Thread()
# The numbers of open contexts. If both are 0, calls of neurons remember nothing for recomputation. Contexts in code
# that torch.compile traces are counted apart, because torch.compile traces neither locks nor hooks.
open_contexts = 0  # in all threads
traced_contexts = 0
_count_lock = threading.Lock()


class _SavedTensor:
    """A tensor saved for backward. `unpack` refuses it if it has changed. Indices may be kept in a smaller type."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self._tensor, self._name, self._version = tensor, name, tensor._version
        self._dtype = tensor.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor. `_narrow_indices` reads it of a `_SavedTensor` or a `_Placeholder`."""
        return self._tensor.shape

    def narrow(self, dtype: torch.dtype) -> None:
        """Keeps the values in another type. `unpack` returns them in the original one."""
        if self._tensor._version == self._version:
            self._tensor = self._tensor.to(dtype)
            self._version = self._tensor._version

    def unpack(self) -> Tensor:
        """The tensor for backward. Raises RuntimeError if it was modified after it was saved."""
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"{_CALLER}: {self._name} ({self._tensor.dtype}, shape {list(self._tensor.shape)}), which backward "
                f"needs, has been modified by an inplace operation: expected version {self._version}, got "
                f"{self._tensor._version}; modify a copy of it, or modify it after backward"
            )
        return self._tensor.to(self._dtype)


class _SpikesOfCall:
    """The spikes of one call of neurons: how to compute them again, and the placeholders that need them."""

    def __init__(self, spikes: Tensor, compute: Callable[..., Tensor], inputs: dict[str, Tensor | None]) -> None:
        self._storage = StorageWeakRef(spikes.untyped_storage())
        self._dtype, self._version = spikes.dtype, spikes._version
        self._compute = compute
        self._inputs = [
            None if each is None else _pack_saved_tensor(each.detach(), name) for name, each in inputs.items()
        ]
        self._waiting: WeakSet[_Placeholder] = WeakSet()
        self._answered: WeakSet[_Placeholder] = WeakSet()
        self._recomputed: Tensor | None = None
        self._node = ref(spikes.grad_fn)  # the node of the call, which owns this object until a layer saves the spikes
        self._lock = threading.Lock()

    @property
    def key(self) -> int:
        """The address that identifies the storage of the spikes."""
        return self._storage.cdata  # type: ignore[no-any-return]

    def placeholder_for(self, tensor: Tensor) -> _Placeholder | None:
        """What to save in place of a tensor in this storage; None if it does not view unmodified spikes of its type."""
        if self._storage.expired() or (tensor._version, tensor.dtype) != (self._version, self._dtype):
            return None
        if tensor.is_neg():
            return None
        placeholder = _Placeholder(self, tensor)
        self._waiting.add(placeholder)
        if (node := self._node()) is not None:
            node.asgl_cuda_spikes = None  # type: ignore[attr-defined]
        return placeholder

    def spikes_for(self, placeholder: _Placeholder) -> Tensor:
        """The spikes, computed again for the first placeholder that needs them, and freed after the last one."""
        with self._lock:
            spikes = self._recomputed
            if spikes is None:
                spikes = self._recomputed = self._compute_again()
            self._answered.add(placeholder)
            if len(self._answered) >= len(self._waiting):
                self._recomputed = None
                self._answered.clear()
            return spikes

    def _compute_again(self) -> Tensor:
        """The spikes, computed again from the inputs of the call."""
        inputs = [None if each is None else each.unpack() for each in self._inputs]
        with torch.no_grad():
            return self._compute(*inputs)


class _Placeholder:
    """What autograd saves in place of spikes or of a view of them."""

    def __init__(self, spikes: _SpikesOfCall, tensor: Tensor) -> None:
        self._spikes = spikes
        self.shape, self._stride, self._offset = tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(self) -> Tensor:
        """The spikes, or the view of them that was saved."""
        return self._spikes.spikes_for(self).as_strided(self.shape, self._stride, self._offset)


# Names of autograd nodes whose saved `result1` contains indices into the last two dimensions of the input.
_MAX_POOLING = ("MaxPool2DWithIndicesBackward0", "AdaptiveMaxPool2DBackward0")


def _narrow_indices(tensor: Tensor) -> None:
    """Keeps the saved indices of max pooling in 2 or 4 bytes instead of 8, if `tensor` is its result or a view."""
    node = (tensor if tensor._base is None else tensor._base).grad_fn
    if node is None or node.name() not in _MAX_POOLING:
        return
    raw = node._raw_saved_self, node._raw_saved_result1  # type: ignore[attr-defined]
    hooks = [getattr(each, "unpack_hook", None) for each in raw]
    if any(hook is not _unpack_saved_tensor for hook in hooks):  # other hooks, or an older torch without names
        return
    source, indices = (each.data for each in raw)
    *_, height, width = source.shape
    for dtype in (torch.int16, torch.int32):
        if height * width <= torch.iinfo(dtype).max:
            indices.narrow(dtype)
            return


def _pack_saved_tensor(tensor: Tensor, name: str = "a tensor") -> _SavedTensor | _Placeholder:
    """The hook that saves a tensor: a placeholder if it has the spikes of a known call, otherwise the tensor."""
    _thread.packed = True
    if type(tensor) is Tensor and tensor.layout is torch.strided and _thread.depth:
        spikes = _thread.known.get(tensor.untyped_storage()._cdata)
        placeholder = None if spikes is None else spikes.placeholder_for(tensor)
        if placeholder is not None:
            return placeholder
        _narrow_indices(tensor)
    return _SavedTensor(tensor, name)


def _unpack_saved_tensor(packed: _SavedTensor | _Placeholder) -> Tensor:
    """The hook that restores a saved tensor."""
    return packed.unpack()


def _saved_tensor_hooks() -> contextlib.AbstractContextManager[None]:
    """A context with the two hooks; one without effect if other hooks are active, or torch.func refuses hooks."""
    if is_transform_active():
        return contextlib.nullcontext()
    try:
        with disable_saved_tensors_hooks("none may be active"):
            pass
    except RuntimeError:
        return contextlib.nullcontext()
    return saved_tensors_hooks(_pack_saved_tensor, _unpack_saved_tensor)


class _Context(contextlib.ContextDecorator):
    """The context of `recompute_spikes`. The outermost one of a thread installs the hooks."""

    def __enter__(self) -> None:
        global open_contexts, traced_contexts
        if torch.compiler.is_compiling():
            traced_contexts += 1
            return
        if _thread.depth == 0:
            _thread.known = WeakValueDictionary()
            _thread.hooks = _saved_tensor_hooks()
            _thread.hooks.__enter__()
        _thread.depth += 1
        with _count_lock:
            open_contexts += 1

    def __exit__(self, *error: Any) -> None:
        global open_contexts, traced_contexts
        if torch.compiler.is_compiling():
            traced_contexts -= 1
            return
        with _count_lock:
            open_contexts -= 1
        _thread.depth -= 1
        if _thread.depth == 0:
            _thread.hooks.__exit__(*error)
            del _thread.known, _thread.hooks
            if error and "support saved tensor hooks" in str(error[1]):
                raise RuntimeError(
                    f"{_CALLER}: torch.func.{{grad, vjp, jacrev, hessian}} can't be called inside of the context, "
                    "because they do not support hooks on saved tensors; call them outside of the context"
                ) from error[1]


@overload
def recompute_spikes() -> _Context: ...
@overload
def recompute_spikes(model: Module) -> Module: ...
def recompute_spikes(model: nn.Module | None = None) -> Any:
    """Makes backward recompute spikes, bit for bit, instead of storing them.

    Layers after asgl_cuda's neurons, such as convolutions and linear layers, usually store their input for backward.
    Backward runs the forward kernel of a call of neurons once more, for all layers that need the spikes of this call.

    Args:
        model: a model whose later forward passes all recompute spikes. Pass a model if a trainer calls it for you.
            With None, the result is a context for a `with` statement around the forward pass. Loss and backward may be
            inside or outside of the context.

    The following are stored as usual: spikes of `RecurrentLIF` and of the backend "reference", outputs of dropout and
    pooling, concatenated or cast spikes, views of another type, and spikes modified in place before use. If spikes are
    modified through ``.data`` or NumPy, which autograd does not notice, backward computes with the unmodified spikes.

    Spikes are also stored as usual in functions that torch.func transforms, and if other hooks on saved tensors
    (torch.utils.checkpoint, save_on_cpu) are active inside or around the context. With torch.compile, the context may
    be around the compiled code or in it. The guide "Memory" lists what is stored after which layer.

    Returns:
        `model` if it is given, otherwise a context manager, which is also a decorator.

    Raises:
        TypeError: model is not a module.
        RuntimeError: in backward, if a tensor saved in the context, such as the input of a `LIF`, was modified in place
            after forward. Also if torch.func.grad, vjp, jacrev or hessian is called in the context, because these
            functions do not support hooks on saved tensors.

    Example::

        model = torch.nn.Sequential(asgl_cuda.BatchNormLIF(64), torch.nn.Flatten(2), torch.nn.Linear(64, 10))
        with asgl_cuda.recompute_spikes():
            loss = model(torch.randn(4, 32, 64)).square().mean()
        loss.backward()  # computes the spikes for the gradient of the linear layer's weight
    """
    if model is None:
        return _Context()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: model must be a torch.nn.Module, got {format_type(model)}")
    model.register_forward_pre_hook(_open_before_forward)
    model.register_forward_hook(_close_after_forward, always_call=True)
    return model


def _open_before_forward(model: nn.Module, *_: Any) -> None:
    """A forward pre-hook that opens a context."""
    _Context().__enter__()
    if not torch.compiler.is_compiling():
        _thread.models.append(model)


def _close_after_forward(model: nn.Module, *_: Any) -> None:
    """A forward hook that closes the context, also after an error in forward."""
    # torch also calls this hook if an earlier hook raised an error, so that _open_before_forward did not run. Then
    # there is no context to close.
    if torch.compiler.is_compiling():
        _Context().__exit__()
    elif _thread.models and _thread.models[-1] is model:
        _thread.models.pop()
        _Context().__exit__()


def apply_and_remember(
    apply: Callable[..., Any],
    function: type[torch.autograd.Function],
    inputs: Sequence[Any],
    remember: Callable[[Any], None],
) -> Any:
    """Returns apply(function, *inputs), for a call of neurons in an open context, and lets backward recompute it.

    In eager mode, calls `remember` with the results if the hooks of this context have saved tensors of the call. In
    compiled code a checkpoint takes the place of `remember`, except in export and in transforms.
    """
    if torch.compiler.is_compiling():
        if is_exporting() or is_transform_active():
            return apply(function, *inputs)
        return checkpoint(lambda: apply(function, *inputs), use_reentrant=False)
    _thread.packed = False
    results = apply(function, *inputs)
    if _thread.packed:  # otherwise other hooks have saved the tensors of the call
        remember(results)
    return results


def remember_spikes(spikes: Tensor, compute: Callable[..., Tensor], inputs: dict[str, Tensor | None]) -> None:
    """If this thread is inside a context, makes backward recompute the spikes of this call.

    `compute` gets the values of `inputs` in their order.
    """
    if not _thread.depth or type(spikes) is not Tensor or spikes.grad_fn is None:
        return
    found = _SpikesOfCall(spikes, compute, inputs)
    _thread.known[found.key] = found
    # `known` has only a weak reference, so the autograd node keeps `found` alive. If the graph is freed without a
    # backward, `found` is freed as well.
    spikes.grad_fn.asgl_cuda_spikes = found  # type: ignore[attr-defined]
