"""`convert(model, sequences=...)`: all steps of a model that is written step by step, computed together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from ..checks import format_value, warn_once
from ..neurons.base import NeuronLayer
from .converted import CarriesStates, Converted, Overlay, Streamed, bare_class, overlaid_class
from .libraries import imported_adapters
from .recording import Recording, current_recording

_CALLER = "asgl_cuda.convert"


class InSequences(CarriesStates, Overlay):
    """The overlay of a whole model. Its forward records the model's own code, and then computes whole sequences."""

    prefix = "Sequences"
    _sequences: str  # "steps", or "loop", which refuses `stateful`

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Records what the model's code does in each step, and then computes whole sequences."""
        if self._sequences == "steps":
            return self._run_steps(*args, **kwargs)
        if self.stateful:
            raise RuntimeError(
                f'{_CALLER}: stateful=True is for models converted with sequences=True; with sequences="loop", the '
                "model's own forward decides from which states it starts"
            )
        if _runs_without_recording():
            return super().forward(*args, **kwargs)
        with Recording(self) as found:
            args, kwargs = tree_map_only(Tensor, found.as_operand, (args, kwargs))
            output = super().forward(*args, **kwargs)
            if max(found.calls.values(), default=0) == 1:
                warn_once(
                    f"{_CALLER}, loop",
                    f'{_CALLER}: in a model converted with sequences="loop", forward called no neuron layer more than '
                    "once, so the input was taken for one time step. If the input has several steps, forward has no "
                    "loop over them: convert with sequences=True",
                )
            return found.compute_output(output)

    def _run_steps(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model once for each step of x_seq, recorded, and returns the outputs of all steps, stacked."""
        x_seq = args[0] if args else None
        if len(args) != 1 or kwargs or not isinstance(x_seq, Tensor):
            got = [type(each).__name__ for each in args]
            got += [f"{name}={type(each).__name__}" for name, each in kwargs.items()]
            raise TypeError(
                f"{_CALLER}: with sequences=True, a call takes one tensor by position, x_seq [T, ...], got "
                f"{', '.join(got) or 'nothing'}" + (f"; {_STATES_AS_ARGUMENTS}" if len(got) > 1 else "")
            )
        if x_seq.dim() < 1 or not len(x_seq):
            raise ValueError(f"{_CALLER}: x_seq must have at least one step, [T, ...], got shape {list(x_seq.shape)}")
        if x_seq.dim() == 2 and x_seq.is_floating_point() and not torch.compiler.is_compiling():
            warn_once(
                f"{_CALLER}, time",
                f"{_CALLER}: a model converted with sequences=True got an input of shape {list(x_seq.shape)}, of which "
                "dimension 0 is taken for time. If the input is one time step of a batch, call asgl_cuda.step(model, "
                "x_t). If it is a sequence without a batch, add a batch dimension of size 1",
            )
        if self.starts_at_rest():
            self._reset_states()
        if _runs_without_recording():
            return tree_map(lambda *each: torch.stack(each), *[super(InSequences, self).forward(x) for x in x_seq])
        with Recording(self) as found:
            outputs = []
            for x in found.as_operand(x_seq):
                outputs.append(super().forward(x))
                self._check_calls(found, len(outputs))
            self._check_states(found, len(outputs))
            return found.compute_output(found.stack_outputs(outputs))

    def _reset_states(self) -> None:
        """Resets the states of all layers."""
        known = [library.reset for library in imported_adapters() if hasattr(library, "reset")]
        for module in self.modules():
            for reset in known:
                reset(module)

    def _check_calls(self, found: Recording, steps: int) -> None:
        """Raises RuntimeError if a layer was called more often than the model, which was called once in each step."""
        for layer, calls in found.calls.items():
            if calls > steps:
                name = found.layer_name(layer)
                raise RuntimeError(
                    f"{_CALLER}: with sequences=True, each call of the model must call each neuron layer once, but "
                    f'{name} has had {calls} calls after step {steps}; use sequences="loop" if the model\'s forward '
                    "has a loop over the steps, or asgl_cuda.convert(model) without sequences if the layer is used "
                    "twice in one step"
                )

    def _check_states(self, found: Recording, steps: int) -> None:
        """Raises RuntimeError if the model's code resets a layer in each of several steps, which start at rest then."""
        for layer, resets in found.count_resets().items():
            if resets == steps > 1:
                raise RuntimeError(
                    f"{_CALLER}: with sequences=True, layers must keep their states, but the model's code resets "
                    f"{found.layer_name(layer)} in each step; remove the reset; {_STATES_AS_ARGUMENTS}"
                )

    def streaming(self) -> Streamed | str:
        """How the model takes a sequence one time step per call, see `Streaming`."""
        if self._sequences == "steps":
            return Streamed(0, None, has_switch=True)
        return "its forward has a loop over the steps; write a module for one step and convert it with sequences=True"

    def end_sequences(self) -> None:
        """Removes the overlay, so that calls of the model are its own again."""
        for name in ("stateful", "_carries"):
            self.__dict__.pop(name, None)
        del self._sequences
        self.remove_overlay()


def _runs_without_recording() -> bool:
    """Whether to run the model's loop without a recording: for compilers and tracers, or inside of a recording."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or current_recording() is not None  # type: ignore


_STATES_AS_ARGUMENTS = (
    "if the model takes its states as arguments, put it into a module with the loop over the steps, and convert that "
    'module with sequences="loop"'
)
# How the report describes the converted model, by the value that `checked_sequences` returns.
_TEXT = {
    "steps": "one call takes all steps, x_seq [T, ...]",
    "loop": "the loop over the steps in its forward is computed for all steps at once",
}


def checked_sequences(sequences: Any) -> str | None:
    """Checks the argument `sequences` of `convert`. Returns "steps" for True, "loop", or None for False."""
    if isinstance(sequences, bool):
        return "steps" if sequences else None
    if not isinstance(sequences, str) or sequences != "loop":
        raise ValueError(f'{_CALLER}: sequences must be False, True or "loop", got {format_value(sequences)}')
    return sequences


def refusal_reason(model: nn.Module, left: list[Any], sequences: str) -> str:
    """Why `sequences` refuses a model whose layers have been converted, except those in `left`; "" if it does not."""
    if left:
        path, layer, reason = left[0]
        return f"every neuron must be converted, but {path or '(the model)'} ({layer}) is left: {reason}"
    known = [library.streaming_of for library in imported_adapters()]
    for path, layer in model.named_modules():
        answers = [answer for streaming_of in known if isinstance(answer := streaming_of(layer), Streamed)]
        takes_all = isinstance(layer, Converted) and not layer.takes_one_step
        if takes_all or isinstance(layer, NeuronLayer) or any(each.time_dim is not None for each in answers):
            name = f"{path or '(the model)'} ({bare_class(layer).__name__})"
            return f"layers must take one step per call, but {name} takes a sequence; convert without sequences"
        if sequences == "steps" and isinstance(layer, Converted) and not layer.carried_states():
            return (
                f"layers must keep their states, but {path or '(the model)'} ({bare_class(layer).__name__}) gets its "
                "state from its caller; convert a module whose forward contains the loop over the steps, with "
                'sequences="loop"'
            )
    if not any(isinstance(layer, Converted) for layer in model.modules()):
        return "a model must have neurons that take one step per call, got none"
    if "forward" in vars(model):
        return "the model's forward must be the method of its class, got an attribute of the model"
    used = ("stateful", "streaming", "starts_at_rest", "_carries", "_sequences", "end_sequences")
    names = [name for name in used if hasattr(model, name)]
    taken = names if names and not isinstance(model, InSequences) else []
    return f"the model has an attribute {taken[0]}, a name that converted models use; rename it" if taken else ""


def overlay_model(model: nn.Module, sequences: str) -> str:
    """Gives the model the overlay `InSequences`, for "steps" or "loop", and returns its description for the report."""
    if not isinstance(model, InSequences):
        model.__class__ = overlaid_class(InSequences, type(model))
    model.__dict__["_sequences"] = sequences
    return _TEXT[sequences]
