"""`convert(model, sequences=...)`: all steps of a model that is written step by step, computed together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from ..checks import format_value
from ..neurons.base import NeuronLayer
from .converted import Converted, Overlay, Streamed, bare_class, overlaid
from .libraries import libraries
from .recording import Recording, recording

_CALLER = "asgl_cuda.convert"


class InSequences(Overlay):
    """The overlay of a whole model. Its forward runs the model's own code, and computes what that has recorded."""

    prefix = "Sequences"
    stateful = False  # whether a call goes on from the states of the last one; for "steps"
    _sequences: str  # "steps" or "loop"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Records what the model's code does with its steps, and then computes whole sequences."""
        if self._sequences == "steps":
            return self._of_steps(*args, **kwargs)
        if _runs_loops():
            return super().forward(*args, **kwargs)
        with Recording(self) as found:
            args, kwargs = tree_map_only(Tensor, found.given, (args, kwargs))
            return found.end(super().forward(*args, **kwargs))

    def _of_steps(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model once for each step of x_seq, recorded, and stacks the outputs."""
        x_seq = args[0] if args else None
        if len(args) != 1 or kwargs or not isinstance(x_seq, Tensor):
            got = ", ".join(type(each).__name__ for each in (*args, *kwargs.values()))
            raise TypeError(
                f"{_CALLER}: with sequences=True, a call takes x_seq [T, ...] alone, got {got or 'nothing'}; "
                'a model that gets its states from outside needs a module around, with the loop, and sequences="loop"'
            )
        if x_seq.dim() < 1 or not len(x_seq):
            raise ValueError(f"{_CALLER}: x_seq must have at least one step, [T, ...], got shape {list(x_seq.shape)}")
        if not self.stateful:
            self._rest()
        if _runs_loops():
            return tree_map(lambda *each: torch.stack(each), *[super(InSequences, self).forward(x) for x in x_seq])
        with Recording(self) as found:
            outputs = []
            for x in found.given(x_seq):
                outputs.append(super().forward(x))
                self._check_calls(found, len(outputs))
            return found.end(found.stack(outputs))

    def _rest(self) -> None:
        """Resets the states of all layers."""
        known = [library.reset for library in libraries() if hasattr(library, "reset")]
        for module in self.modules():
            for reset in known:
                reset(module)

    def _check_calls(self, found: Recording, steps: int) -> None:
        """Refuses a layer with more calls than there were steps."""
        for layer, calls in found.calls.items():
            if calls > steps:
                raise RuntimeError(
                    f"{_CALLER}: with sequences=True, a call of the model is one step, but {found.name(layer)} takes "
                    f'{calls} steps in call {steps}: for a forward with a loop over the steps use sequences="loop"; '
                    "layers that are used twice in a step can't be computed as sequences"
                )

    def streamed(self) -> Streamed | str:
        """How the model takes a single step of a stream."""
        if self._sequences == "steps":
            return Streamed(0, None, has_switch=True)
        return "its forward has a loop over the steps"

    def end_sequences(self) -> None:
        """Restores the model."""
        self.__dict__.pop("stateful", None)
        del self._sequences
        self.take_off()


def _runs_loops() -> bool:
    """Whether the model's own loop is run, as by compilers, which fuse a step with the operations around."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or recording() is not None  # type: ignore


_TEXT = {
    "steps": "one call takes all steps, x_seq [T, ...]",
    "loop": "its loop over the steps is computed for all steps at once",
}


def kind_of(sequences: Any) -> str | None:
    """Checks the argument `sequences` of `convert`. Returns "steps" for True, "loop", or None for False."""
    if isinstance(sequences, bool):
        return "steps" if sequences else None
    if not isinstance(sequences, str) or sequences != "loop":
        raise ValueError(f'{_CALLER}: sequences must be False, True or "loop", got {format_value(sequences)}')
    return sequences


def reason_against(model: nn.Module, left: list[Any]) -> str:
    """Why a converted model is refused; "" if it is not."""
    if left:
        path, layer, reason = left[0]
        return f"every neuron must be converted, but {path or '(the model)'} ({layer}) is left: {reason}"
    known = [library.streamed for library in libraries()]
    for path, layer in model.named_modules():
        answers = [answer for streamed in known if isinstance(answer := streamed(layer), Streamed)]
        takes_all = isinstance(layer, Converted) and not layer.takes_steps
        if takes_all or isinstance(layer, NeuronLayer) or any(each.time_dim is not None for each in answers):
            name = f"{path or '(the model)'} ({bare_class(layer).__name__})"
            return f"layers must take one step per call; {name} takes a sequence"
    if not any(isinstance(layer, Converted) for layer in model.modules()):
        return "a model must have neurons that take one step per call, got none"
    if "forward" in vars(model):
        return "the model's forward must be the method of its class, got an attribute of the model"
    names = [name for name in ("stateful", "streamed", "_sequences", "end_sequences") if hasattr(model, name)]
    taken = names if names and not isinstance(model, InSequences) else []
    return f"the model has an attribute {taken[0]}, a name that the converted model uses itself" if taken else ""


def in_sequences(model: nn.Module, kind: str) -> str:
    """Overlays the model, and returns what the report says of it."""
    if not isinstance(model, InSequences):
        model.__class__ = overlaid(InSequences, type(model))
    model.__dict__["_sequences"] = kind
    return _TEXT[kind]
