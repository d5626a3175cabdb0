"""`fuse` and `unfuse`: normalisations computed by the neurons after them, and the inverse.

Only the normalisation changes. It returns a `Pending`, from which the neurons after it compute both. Any other code
that uses the `Pending` gets the value that the normalisation would have returned.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_map_only

from ..calls.arguments import Arguments
from ..checks import arguments_of, raise_explained
from ..layout import channel_dim, real_type
from ..neurons.batch_norm_lif import module_batch_norm_lif
from ..neurons.deferred import NormOutput, Pending, backward_hook_of, tensor_of, with_version
from ..neurons.lif import LIFOutput
from ..torch_modes import active_saved_tensor_hooks, current_checkpoint, is_in_backward, is_in_function_forward
from .convert import Left, Replaced, Report, convert, copy_model, model_or_copy
from .converted import Converted, Overlay, bare_class, overlaid_class
from .libraries import imported_adapters

_CALLER = "asgl_cuda.fuse"
_UNCOPIED = "call fuse(model, inplace=True) without an example, which needs no copy"
_CONVERTED = "_converted_by_fuse"  # attribute of layers that `fuse` has converted, so that `unfuse` restores them

# The last call of each normalisation, by id(normalisation). A call keeps its normalisation alive, so no other object
# can have that id while the entry exists.
_calls: weakref.WeakValueDictionary[int, NormOutput] = weakref.WeakValueDictionary()


def fuse(model: nn.Module, example: Any = None, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Merges normalisations into the neurons after them: ``joined, report = asgl_cuda.fuse(model, x_seq)``.

    - Normalisations may be `torch.nn.BatchNorm1d`, `2d` and `3d`, `SyncBatchNorm`, and SpikingJelly's equivalents. They
      may also be subclasses whose forward calls `super().forward`, as many classes named tdBatchNorm do.
    - The neurons may be `asgl_cuda.LIF`, or neurons of another library that `convert` supports. The latter must emit
      spikes, take whole sequences, and have no synaptic current and no recurrent weights. With an example, `fuse`
      converts only those that it merges.
    - Between a normalisation and its neurons there may be views (`reshape`, `transpose`, ...), multiplications by
      numbers, and one addition of a tensor of the same shape and type, as in a residual block. The forward of a
      subclass may contain the same operations.

    A normalisation is not merged, and the report says why, if anything except these neurons uses its output or the
    result of the addition. It is also not merged if the neurons are called step by step, where two layers are faster
    than one.

    Parameters and buffers keep their names and values, so checkpoints stay valid. A merged normalisation returns a
    stand-in for its output. From the stand-in, the neurons compute normalisation and spikes in one call. Any other code
    that gets the stand-in computes with the value that the normalisation alone would return. A call of the fused model
    can raise RuntimeError in these cases:

    - The stand-in reaches a `torch.autograd.Function`, which would lose the gradient.
    - The neurons have a backward hook that was registered after `fuse`.
    - The normalisation and the neurons are not in the same `torch.utils.checkpoint`.
    - The input of the normalisation or the added tensor was changed in place before the call of the neurons.
    - The output of the normalisation was changed in place, and the neurons get a view of it from before the change.

    In inference mode and under `torch.compile`, changes in place are not noticed.

    A normalisation is not merged if `fuse` finds a backward hook on it, on its neurons, or on a module that contains
    only one of the two. Without an example, no normalisation is merged if any submodule has a backward hook.

    Args:
        model: any module.
        example: an input of the model, or a tuple of its positional arguments. Copies of the model are called with
            it, in training and in evaluation mode. Without an example, the first calls of the model decide what is
            merged, and complete the report. In that case, `fuse` converts all neurons that `convert` can convert.
        inplace: fuse the model instead of a copy; existing optimizers stay valid.

    Returns:
        The model, and a `Report` of the neurons that now also normalise, and of the normalisations that are not merged.

    Raises TypeError if `model` is not a module, RuntimeError if it can't be copied, and ValueError if the model raises
    an error when it is called with `example`. Errors of asgl_cuda and OutOfMemoryError are passed on.

    Example::

        norm = asgl_cuda.OverTime(torch.nn.BatchNorm1d(4))
        joined, report = asgl_cuda.fuse(torch.nn.Sequential(norm, asgl_cuda.LIF()), torch.rand(5, 2, 4))
        print(report)
    """
    model = model_or_copy(model, inplace, _CALLER, _UNCOPIED)
    before = {module for module in model.modules() if isinstance(module, Converted)}
    convert(model, inplace=True)
    converted = [each for each in model.modules() if isinstance(each, Converted) and each not in before]
    report = Report([], [])
    for path, each in model.named_modules():
        if isinstance(each, Fused):
            report.left.append(Left(path, bare_class(each).__name__, "an earlier fuse has merged it already"))
    norms = [
        (path, each)
        for path, each in model.named_modules()
        if isinstance(each, _BatchNorm) and not isinstance(each, Fused)
    ]
    given = None if example is None else arguments_of(example)
    hooked_part = _hooked_part(model) if given is None else ""
    left = {path: reason for path, norm in norms if (reason := _reason_to_leave(norm) or hooked_part)}
    joined: dict[str, str] = {}
    try:
        if given is not None:
            joined, others = _try_example(model, [path for path, _ in norms if path not in left], given)
            left |= others
    finally:
        kept = {model.get_submodule(path) for path in joined.values()} if given is not None else {*converted}
        for layer in converted:
            if layer in kept:
                vars(layer)[_CONVERTED] = True
            else:
                layer.restore_original()
    outcome = None if given is not None else _Outcome(model, report)
    for path, norm in norms:
        if path in left:
            report.left.append(Left(path, type(norm).__name__, left[path]))
            continue
        make_fused(norm, outcome)
        if given is not None:
            report.replaced.append(_fused_row(path, joined[path], model.get_submodule(joined[path])))
        else:
            report.notes = ["the model's first calls decide what else is merged; fuse(model, example) decides at once"]
    return model, report


def unfuse(model: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Separates what `fuse` has merged: ``model, report = asgl_cuda.unfuse(joined)``. Trained values stay.

    Args:
        model: a module that `fuse` has returned, a part of it, or a module that contains it.
        inplace: change the model instead of a copy.

    Returns:
        The model, and a `Report` of the restored layers: normalisations, and neurons that `fuse` had converted.

    Raises TypeError if `model` is not a module, and RuntimeError if it can't be copied.

    Example::

        norm = asgl_cuda.OverTime(torch.nn.BatchNorm1d(4))
        joined, _ = asgl_cuda.fuse(torch.nn.Sequential(norm, asgl_cuda.LIF()))
        model, report = asgl_cuda.unfuse(joined)
        print(report)
    """
    model = model_or_copy(model, inplace, "asgl_cuda.unfuse")
    report = Report([], [])
    for path, module in list(model.named_modules()):
        made = type(module).__name__
        if isinstance(module, Fused) or (vars(module).pop(_CONVERTED, False) and isinstance(module, Converted)):
            module.restore_original()
            report.replaced.append(Replaced(path, made, type(module).__name__))
    return model, report


_FUSE_AGAIN = "fuse the original model again with an example for which this happens"


class Fused(Overlay):
    """The overlay of a normalisation. It returns a `Pending`, whose value the neurons after it compute."""

    prefix = "Fused"

    outcome: _Outcome | None = None
    track_running_stats: bool

    @classmethod
    def bases_and_namespace(cls, original: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
        """As in the base class, but after a user's class whose own forward then calls the overlay's as its base's."""
        base = _normalisation_base(original)
        if base is None or base is original:
            return super().bases_and_namespace(original)
        return (original, overlaid_class(cls, base)), {"forward": _wrapped_forward(original.forward)}

    def forward(self, input: Any) -> Any:
        """The stand-in for the output, or the output itself if this call must return a tensor."""
        if isinstance(input, fx.Proxy):  # torch.fx traces the layer as one call, without its computation
            return _leaf_call(self, input)
        input = tensor_of(input, self.original.__name__)
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            last = _calls.get(id(self)) if self.training or self.outcome is not None else None
            # In backward, activation checkpointing calls the layer again and must get what forward computed. Decisions
            # of `outcome` are then ignored, because they are usually made after this layer's forward. If one was made
            # before, in the same checkpoint, torch raises CheckpointError in this step.
            if self.outcome is not None and self.outcome.is_left(self) and not is_in_backward():
                forward = super().forward
                if last is None:  # otherwise its last call still needs the overlay
                    self.restore_original()
                return forward(input)
            reason = ""  # why this call must return a tensor
            if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                reason = "it is called by torch.jit.trace"
            # Activation checkpointing calls the layer again in backward. If it is reentrant, no hooks on saved tensors
            # are active then.
            elif is_in_function_forward() or (is_in_backward() and active_saved_tensor_hooks() is None):
                reason = "it is called inside of a torch.autograd.Function, such as a reentrant checkpoint"
            elif backward_hook_of(self):
                reason = "it has a backward hook"
            # If nothing has used the output of the last call, that call has not updated the running statistics yet. It
            # must do so before this call.
            if self.training and last is not None and last.is_unused():
                reason = "it is called again before its output is used"
                last.value_because(reason)
            if reason:
                self.note_left(reason)
                return super().forward(input)
        # In step mode "m", the input of SpikingJelly's layers has separate dimensions for time and batch. A step_mode
        # that only a user's own class has does not count.
        has_time = getattr(type(self), "step_mode", None) is not None and self.step_mode == "m"
        has_time = has_time and hasattr(_normalisation_base(self.original), "step_mode")
        self._check_input_dim(input[0] if has_time else input)
        call = NormOutput(self, input)
        if not is_compiling and (self.training or self.outcome is not None):
            _calls[id(self)] = call
        return Pending(call, call, 1 + has_time, input, watched=with_version(input))

    def compute_alone(self, x: Tensor, training: bool, update: bool) -> Tensor:
        """Computes the output as a tensor, for code other than neurons. Updates running statistics only if `update`."""
        now = self.training, self.track_running_stats
        self.training, self.track_running_stats = training, now[1] and update
        try:
            return super().forward(x)  # type: ignore[no-any-return]
        finally:
            self.training, self.track_running_stats = now

    def reason_against(self, pending: Pending, given: Arguments) -> str:
        """Why neurons called with the arguments `given` can't compute this normalisation; "" if they can."""
        here, there = current_checkpoint(), pending.call.checkpoint
        if here is not there and (here is not None or self.training):
            where = "inside of another torch.utils.checkpoint than its neurons"
            if here is None or there is None:
                sides = ("inside", "outside") if here is None else ("outside", "inside")
                where = "{} of a torch.utils.checkpoint and its neurons {}".format(*sides)
            raise self.refusal(
                f"the normalisation is called {where}, and a checkpoint calls its part again in backward",
                "put both into the same checkpoint, or ",
            )
        if torch.is_grad_enabled() and not pending.has_graph:
            return "which is called with gradients, while the normalisation was called without"
        if self.training != pending.call.training:
            return "after a change between training and evaluation mode"
        back = pending.x.dim() - channel_dim(given["time_dim"] % pending.x.dim())
        for value in (given["input_gain"], given["input_bias"]):
            sizes = value.shape if isinstance(value, Tensor) else ()
            if [len(sizes) - dim for dim, size in enumerate(sizes) if size != 1] not in ([], [back]):
                return f"whose input gain or bias has shape {list(sizes)}"
        return ""

    def hook_before(self, layer: nn.Module) -> str:
        """Describes a backward hook of the neurons `layer`, or of a module that contains only one of the two; or ""."""
        if torch.compiler.is_compiling():
            return ""
        return backward_hook_of(layer) or ("" if self.outcome is None else self.outcome.hook_between(self, layer))

    def compute_with_neurons(
        self, x_seq: Tensor, given: Arguments, update: bool, factor: float = 1.0
    ) -> Tensor | LIFOutput:
        """`asgl_cuda.batch_norm_lif` of input_gain (factor y + residual) + input_bias, with y the normalised input."""
        weight, bias, scale = self.weight, self.bias, 1.0
        input_gain: Any
        input_gain, input_bias, residual = given["input_gain"], given["input_bias"], given["residual"]
        residual_gain: Any = input_gain
        if isinstance(input_gain, float) and isinstance(input_bias, float) and input_bias == 0:
            scale = input_gain * factor
        else:
            options: Any = {"dtype": real_type(x_seq.dtype), "device": x_seq.device}
            values = (torch.as_tensor(value, **options) for value in (input_gain, input_bias))
            gain, shift = (value.reshape(-1).expand(self.num_features) for value in values)
            gain = gain * factor
            weight = gain if weight is None else gain * weight.to(gain.dtype)
            bias = shift if bias is None else gain * bias.to(gain.dtype) + shift
        if residual is not None and not isinstance(input_gain, float):
            residual, residual_gain = (residual * input_gain).to(x_seq.dtype), 1.0
        # If process_group is None, a SyncBatchNorm uses all processes. For `batch_norm_lif`, None means only this
        # process, and "world" means all.
        group = (self.process_group or "world") if isinstance(self, nn.SyncBatchNorm) else None
        if residual is not None or weight is not self.weight or scale != 1:
            residual_gain = 1.0 if residual is None else residual_gain
            given = {**given, "input_gain": 1.0, "input_bias": 0.0, "residual": residual}
            given["residual_gain"] = residual_gain
        return module_batch_norm_lif(
            self, x_seq, given=given, weight=weight, bias=bias, update=update, input_scale=scale, process_group=group
        )

    def refusal(self, text: str, remedy: str = "", last: str = _FUSE_AGAIN) -> RuntimeError:
        """Notes for the report that this layer can't be merged, and returns the error that says so.

        `text` says why, as a clause after "but": a use of the output, a change in place, a hook or a checkpoint.
        `remedy` is a first remedy, which ends in ", or ", and `last` the remedy named after `unfuse`.
        """
        self.note_left(text)
        return RuntimeError(
            f"{_CALLER}: {self.original.__name__} is computed by the neurons after it, but {text}; {remedy}"
            f"call asgl_cuda.unfuse(model, inplace=True), or {last}, so that this layer is left as it is"
        )

    def note_taken(self, layer: Any) -> None:
        """Notes for the report that the neurons `layer` have computed this normalisation."""
        if self.outcome is not None and not torch.compiler.is_compiling():
            self.outcome.add_joined(self, layer)

    def note_left(self, reason: str) -> None:
        """Notes for the report why this normalisation had to compute its value itself."""
        # Calls in backward are those of activation checkpointing, which may stop them before the neurons are called.
        # They say nothing about the layer.
        if self.outcome is not None and not torch.compiler.is_compiling() and not is_in_backward():
            self.outcome.add_left(self, reason)

    def restore_original(self) -> None:
        """Restores the layer, with its current values."""
        self.__dict__.pop("outcome", None)
        self.remove_overlay()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, computed by the neurons after it"


def make_fused(norm: Any, outcome: _Outcome | None = None) -> None:
    """Gives a normalisation the overlay `Fused`. With an `outcome`, its calls decide whether it stays fused."""
    norm.__class__ = overlaid_class(Fused, type(norm))
    if outcome is not None:
        norm.outcome = outcome


class _Outcome:
    """Notes from calls of the model which normalisations neurons compute, and which not. Updates the `report`."""

    def __init__(self, model: nn.Module, report: Report | None = None) -> None:
        self.paths = weakref.WeakKeyDictionary({module: path for path, module in model.named_modules()})
        self.report = report
        self.joined: dict[str, str] = {}  # path of the normalisation: path of the neurons
        self.left: dict[str, str] = {}  # path of the normalisation: the reason

    def __reduce__(self) -> Any:
        return type(None), ()  # in a copy of the model, calls change nothing more

    def add_joined(self, norm: nn.Module, layer: nn.Module) -> None:
        """Notes that the neurons `layer` have computed the normalisation."""
        path, layer_path = self.paths.get(norm, ""), self.paths.get(layer, "")
        if path not in self.joined and self.report is not None:
            self.report.replaced.append(_fused_row(path, layer_path, layer))
        self.joined.setdefault(path, layer_path)

    def add_left(self, norm: nn.Module, reason: str) -> None:
        """Notes that the normalisation had to compute its value itself, and the reason."""
        path = self.paths.get(norm, "")
        if path not in self.left and self.report is not None:
            self.report.left.append(Left(path, bare_class(norm).__name__, reason))
            self.report.replaced[:] = [row for row in self.report.replaced if row.by != _fused_row(path, "", norm).by]
        self.left.setdefault(path, reason)

    def is_left(self, norm: nn.Module) -> bool:
        """Whether the normalisation computes its value itself from now on."""
        return self.paths.get(norm, "") in self.left

    def hook_between(self, norm: nn.Module, layer: nn.Module) -> str:
        """Describes a backward hook of a module that contains only one of the two; "" without one or once joined."""
        if self.paths.get(norm, "") in self.joined:
            return ""
        hooks = ((module, hook) for module in self.paths if (hook := backward_hook_of(module)))
        return next((hook for module, hook in hooks if len({norm, layer} & {*module.modules()}) == 1), "")

    def unused_outputs(self, reason: str) -> dict[str, str]:
        """The paths of the normalisations whose outputs nothing has used yet, each with the given reason."""
        calls = (call for call in list(_calls.values()) if call.is_unused() and call.of in self.paths)
        return {self.paths[call.of]: reason for call in calls}


def _fused_row(path: str, layer_path: str, layer: nn.Module) -> Replaced:
    """The report's row for the neurons at `layer_path`, which compute the normalisation at `path`."""
    return Replaced(layer_path, bare_class(layer).__name__, f"normalises as well, instead of {path}")


def _try_example(model: nn.Module, paths: list[str], example: tuple[Any, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Calls copies of the model with the example, in training and in evaluation mode.

    Returns the path of the neurons for each normalisation that neurons compute, and the reason for each that is left.
    """
    refused: dict[str, str] = {}
    while True:
        joined: dict[str, str] = {}
        left = dict(refused)
        for training in (True, False):
            made = copy_model(model, _CALLER, _UNCOPIED, model.parameters()).train(training)
            outcome = _Outcome(made)
            for path in paths:
                if path not in refused:
                    make_fused(made.get_submodule(path), outcome)
            try:
                output = _call_with_example(made, example)
            except Exception as error:
                line = (str(error).splitlines() or [""])[0]
                new = {path: reason for path, reason in outcome.left.items() if path not in refused}
                why = f"with the stand-in for its output the model's forward fails: {type(error).__name__}: {line}"
                new = new or outcome.unused_outputs(why)
                if not new:
                    expected = f"{_CALLER}: example must be an input of the model or a tuple of its arguments"
                    mode = f", in {'training' if training else 'evaluation'} mode,"
                    raise_explained(error, expected, example, mode)
                refused |= new
                break
            tree_map_only(Pending, lambda each: each.value_for("the caller of the model"), output)
            left |= outcome.unused_outputs("nothing in the model uses its output") | outcome.left
            joined |= outcome.joined
        else:
            left |= {path: "the example does not reach it" for path in paths if path not in joined | left}
            return {path: layer for path, layer in joined.items() if path not in left}, left


def _call_with_example(model: nn.Module, example: tuple[Any, ...]) -> Any:
    """The output for copies of the example's tensors. Restores the states of the random number generators."""
    values = tree_map_only(Tensor, lambda each: each.detach().clone().requires_grad_(each.requires_grad), example)
    devices = {tensor.device.index for tensor in model.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(sorted(devices)), torch.enable_grad():
        return model(*values)


def _hooked_part(model: nn.Module) -> str:
    """Why `fuse` without an example merges nothing: a part of the model has a backward hook. "" if none has."""
    for path, module in model.named_modules():
        if path and (module._backward_hooks or module._backward_pre_hooks):
            return (
                f"{path} ({bare_class(module).__name__}) has a backward hook, which may need the gradient of this "
                "layer's output; fuse(model, example) finds out"
            )
    return ""


def _reason_to_leave(norm: nn.Module) -> str:
    """Why a normalisation can't be merged, whatever comes after it; empty if it can."""
    if isinstance(norm, LazyModuleMixin):
        return "its number of channels is unknown until its first call"
    if "forward" in vars(norm):
        return "its forward is an attribute of the module, not the method of its class"
    kind = type(norm)
    base = _normalisation_base(kind)
    if base is None:
        return _unknown_class_reason(kind)
    users = kind.__mro__[: kind.__mro__.index(base)]
    taken = {name for each in users for name in vars(each)} & {*vars(Fused), *vars(Overlay)} - {*dir(nn.Module)}
    return f"its class defines {', '.join(sorted(taken))}, a name that fused layers use" if taken else ""


def _unknown_class_reason(kind: type[nn.Module]) -> str:
    """Why a normalisation can't be merged: its class computes something else than torch's."""
    return f"{kind.__name__} computes something else than torch.nn's normalisations"


def _normalisation_base(kind: type[nn.Module]) -> Any:
    """The class with a forward that neurons can compute: `kind`, or a base of a user's class; None without one."""
    known = [known for library in imported_adapters() for known in getattr(library, "NORMALISATIONS", ())]
    forwards = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return next((each for each in kind.__mro__ if getattr(each, "forward", None) in forwards or each in known), None)


def _leaf_call(norm: Any, input: fx.Proxy) -> fx.Proxy:
    """The call of the normalisation as one node in a graph of torch.fx."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(norm), (input,), {})  # type: ignore[no-any-return]


def _wrapped_forward(forward: Any) -> Any:
    """Wraps the forward of a user's normalisation, to see whether it changes the output of its base class."""

    @functools.wraps(forward)
    def call(self: Fused, input: Any) -> Any:
        """Calls the user's forward. If it does not return the stand-in, the normalisation computes its value itself."""
        if isinstance(input, fx.Proxy):
            return _leaf_call(self, input)
        output = forward(self, input)
        if type(output) is not Pending and isinstance(self, Fused):
            self.note_left(_unknown_class_reason(self.original))
        return output

    return call
