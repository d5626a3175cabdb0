"""The states that a model carries from call to call: single time steps, reset and detach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.utils import _pytree

from .checks import check_int, check_step
from .interop.converted import Converted, Streamed
from .interop.libraries import libraries
from .interop.nir.neurons import Delay
from .interop.sequences import InSequences
from .neurons.base import NeuronLayer, check_module
from .neurons.over_time import OverTime

_CALLER = "asgl_cuda.step"


class _Taker(NamedTuple):
    """A module that takes steps, and its name in errors."""

    name: str
    module: nn.Module
    streamed: Streamed
    inside: bool  # a module around it determines time_dim
    compiled: bool  # hooks would be ignored, or compiled

    def state(self) -> Any:
        return None if self.streamed.state is None else getattr(self.module, self.streamed.state)


def _takers(model: nn.Module) -> Iterator[_Taker]:
    """Each taker once; refuses unstreamable modules."""
    known = [library.streamed for library in libraries()]
    found: set[nn.Module] = set()
    left: list[tuple[nn.Module, str, bool, bool]] = [(model, "", False, False)]  # path, inside, compiled
    while left:  # a recursive closure would be a reference cycle, which keeps the model
        module, path, inside, compiled = left.pop()
        if module in found:
            continue
        found.add(module)
        name = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
        compiled = compiled or "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if isinstance(module, NeuronLayer):
            answer: Streamed | str | None = Streamed(module.time_dim, "v", has_switch=True)
        elif isinstance(module, InSequences):
            answer = module.streamed()
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase, Delay)):
            answer = "it begins at rest with each call, unless the model hands its state on"
        else:
            answer = next((each for streamed in known if (each := streamed(module)) is not None), None)
        if isinstance(answer, str):
            raise RuntimeError(f"{_CALLER}: {name} can't take a step at a time: {answer}")
        if answer is not None:
            yield _Taker(name, module, answer, inside, compiled)
        if isinstance(module, InSequences):  # whose layers take what it gives them
            continue
        compiled = compiled or isinstance(module, Converted)  # which does not call what is inside
        inside = inside or answer is not None or isinstance(module, OverTime)  # has no dimension of time inside
        children = [(each, child) for each, child in module._modules.items() if child is not None]
        left += [(child, f"{path}.{each}" if path else each, inside, compiled) for each, child in reversed(children)]


def _time_dim_of(takers: Sequence[_Taker]) -> int | None:
    """The dimension of time in the model's input; None where a call is a step."""
    first: dict[int | None, str] = {}
    for taker in takers:
        if not taker.inside:
            first.setdefault(taker.streamed.time_dim, taker.name)
    if len(first) > 1:
        said = (f"{name} {'takes a step a call' if at is None else f'has time at {at}'}" for at, name in first.items())
        raise ValueError(
            f"{_CALLER}: all layers must have time at the same dimension, or time_dim must say where it is in the "
            f"model's input; {', '.join(said)}"
        )
    return next(iter(first), 0)


class _Watch:
    """Refuses steps whose results would differ from a call with the whole sequence."""

    def __init__(self, takers: Sequence[_Taker]) -> None:
        self._called: set[_Taker] = set()
        self._states = {taker: taker.state() for taker in takers}  # as the last call left them

    def check_states(self, *takers: _Taker) -> None:
        for taker in takers or self._called:
            state, left = taker.state(), self._states[taker]
            same = state is left
            if isinstance(state, Tensor) and isinstance(left, Tensor):  # may have been detached
                same = state.shape == left.shape and state.data_ptr() == left.data_ptr()
            if not same:
                raise RuntimeError(
                    f"{_CALLER}: {taker.name} is reset, or its state replaced, by the model's own forward: that "
                    "belongs outside, between sequences, as in asgl_cuda.reset(model)"
                )

    def before(self, taker: _Taker, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if hasattr(value, "shape")]
        if taker in self._called:
            raise RuntimeError(
                f"{_CALLER}: {taker.name} is called twice in one step but carries one state: each place needs a layer "
                "of its own; for a model whose forward goes over time itself, time_dim must say where time is"
            )
        self._called.add(taker)
        if len(inputs) > 1 and not isinstance(module, NeuronLayer):  # whose second one is the residual
            raise RuntimeError(
                f"{_CALLER}: {taker.name} gets its state from the model's forward, which begins anew with each call; "
                "it must keep the state itself, as snnTorch's layers do with init_hidden=True"
            )
        self.check_states(taker)
        time_dim = taker.streamed.time_dim
        if time_dim is None or not inputs or not -len(inputs[0].shape) <= time_dim < len(inputs[0].shape):
            return  # the layer refuses what it can't take
        if (steps := inputs[0].shape[time_dim]) != 1:
            raise RuntimeError(
                f"{_CALLER}: {taker.name} gets {steps} time steps in one step: the model's forward makes them of its "
                "input, and what comes after can be stepped"
            )

    def after(self, taker: _Taker, *_: Any) -> None:
        self._states[taker] = taker.state()


def _without_time(output: Tensor, x_t: Tensor, time_dim: int) -> Tensor:
    if -output.dim() <= time_dim < output.dim() and output.shape[time_dim] == 1:
        without = output.squeeze(time_dim)
        # A size of 1 may be the batch.
        if x_t.dim() < 2 or x_t.shape[0] != 1 or tuple(without.shape[:1]) == (1,):
            return without
    raise ValueError(
        f"{_CALLER}: the model's output must have time where its input has it, at time_dim {time_dim}, got shape "
        f"{list(output.shape)} for an input with a single step of shape {list(x_t.shape)}: a sum or mean over time "
        "comes after the steps, outside of the model"
    )


def step(model: nn.Module, x_t: Tensor, *, time_dim: int | None = None) -> Any:
    """One time step of a model: input and output are without time, and the layers carry their states to the next step.

    T calls compute the same as one call with the whole sequence, bit for bit for neurons in evaluation. The layers of
    asgl_cuda need not be stateful, and start at rest again after `asgl_cuda.reset(model)`; `asgl_cuda.detach(model)`
    cuts the graph for truncated backpropagation. Layers of SpikingJelly, snnTorch and sinabs carry their states as
    usual, converted or not. If all layers take one step per call, no time dimension is added.

    Args:
        model: any module that keeps the time dimension; sums over time come after the steps. State or mixing over time
            in its own forward, as `asgl_cuda.lif`, a shift or attention, is not detected. To be compiled as a whole,
            `asgl_cuda.step(torch.compile(model), x_t)`: calls inside are not watched then.
        x_t: the input of the step, `[B, ...]`.
        time_dim: dimension of time in the model's input and output; default as in the layers, else 0.

    Returns the model's output, with each tensor in tuples, lists and dicts without time.

    Raises TypeError for no module or no tensor, ValueError where layers differ in time_dim or the output has no time,
    RuntimeError for a layer that can't carry its state from call to call, is called twice in a step, gets its state
    from the caller, or is reset by the model's own forward. After it some layers have taken the step: reset the model.

    Example::

        net = torch.nn.Sequential(torch.nn.Linear(4, 8), asgl_cuda.LIF(), torch.nn.Linear(8, 2)).eval()
        for x_t in torch.rand(10, 32, 4):
            out = asgl_cuda.step(net, x_t)  # [32, 2]
        asgl_cuda.reset(net)
    """
    check_module(model, _CALLER)
    if time_dim is not None:
        check_int("time_dim", time_dim, _CALLER)
    takers = list(_takers(model))
    time_dim = _time_dim_of(takers) if time_dim is None else time_dim
    check_step(x_t, time_dim or 0, _CALLER)
    watched = [taker for taker in takers if not taker.compiled]
    watch = _Watch(watched)
    with ExitStack() as undo:
        for layer in (cast("Any", taker.module) for taker in takers if taker.streamed.has_switch):
            undo.callback(setattr, layer, "stateful", layer.stateful)
            layer.stateful = True
        for taker in watched:
            before, after = partial(watch.before, taker), partial(watch.after, taker)
            undo.callback(taker.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(taker.module.register_forward_hook(after).remove)
        output = model(x_t if time_dim is None else x_t.unsqueeze(time_dim))
        watch.check_states()
    if time_dim is None:
        return output
    return _pytree.tree_map_only(Tensor, lambda each: _without_time(each, x_t, time_dim), output)


def reset(model: nn.Module) -> None:
    """Clears the potentials carried by the model's layers: the next call of each starts at rest.

    Layers are those of asgl_cuda, and those of SpikingJelly, snnTorch and sinabs, converted or not, which are reset by
    their library's own methods. Norse's layers are stateless.

    Raises TypeError where `model` is no module.

    Example::

        model = nn.Sequential(nn.Linear(64, 128), asgl_cuda.LIF(stateful=True))
        for x in torch.randn(10, 32, 64):  # one step per call
            spikes = model(x.unsqueeze(0))  # [1, 32, 128]
        asgl_cuda.reset(model)  # before the next sequence
    """
    _of_all_layers(model, "reset", "reset")


def detach(model: nn.Module) -> None:
    """Detaches the potentials carried by the model's layers, for truncated backpropagation through time.

    The next call continues from the detached values, where its backward ends. For layers, see `asgl_cuda.reset`.

    Raises TypeError where `model` is no module.

    Example::

        for chunk in x_seq.split(2):
            model(chunk).sum().backward()
            asgl_cuda.detach(model)
    """
    _of_all_layers(model, "detach", "detach_")


def _of_all_layers(model: nn.Module, name: str, method: str) -> None:
    """Calls the method of each of our layers, and the function of this name of each library."""
    check_module(model, f"asgl_cuda.{name}")
    functions = [getattr(library, name) for library in libraries() if hasattr(library, name)]
    for module in model.modules():
        if isinstance(module, NeuronLayer):
            getattr(module, method)()
        for function in functions:
            function(module)
