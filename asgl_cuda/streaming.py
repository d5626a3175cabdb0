"""Single time steps of a whole model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .checks import check_int, check_step
from .interop.convert import libraries
from .interop.converted import Streamed
from .interop.nir.neurons import Delay
from .layer import NeuronLayer, check_module
from .over_time import OverTime
from .pending import Pending

_CALLER = "asgl_cuda.step"


class _Taker(NamedTuple):
    """A module that takes steps, and its path."""

    path: str
    module: nn.Module
    streamed: Streamed
    inside: bool  # a module around it determines time_dim
    compiled: bool  # hooks would be ignored, or compiled

    @property
    def name(self) -> str:
        name = type(self.module).__name__
        return f"{name} at {self.path!r}" if self.path else name


def _takers(model: nn.Module) -> Iterator[_Taker]:
    """Each taker once; refuses unstreamable modules."""
    known = [library.streamed for library in libraries()]
    found: set[nn.Module] = set()
    left: list[tuple[nn.Module, str, bool, bool]] = [
        (model, "", False, False)
    ]  # path, inside and compiled, as in _Taker
    while left:  # a recursive closure would be a reference cycle, which keeps the model
        module, path, inside, compiled = left.pop()
        if module in found:
            continue
        found.add(module)
        compiled = compiled or "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if isinstance(module, NeuronLayer):
            answer: Streamed | str | None = Streamed(module.time_dim, "v")
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase, Delay)):
            answer = "it begins at rest with each call, unless the model hands its state on"
        else:
            answer = next((each for streamed in known if (each := streamed(module)) is not None), None)
        if isinstance(answer, str):
            name = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
            raise RuntimeError(f"{_CALLER}: {name} can't take a step at a time: {answer}")
        if answer is not None:
            yield _Taker(path, module, answer, inside, compiled)
        inside = inside or answer is not None or isinstance(module, OverTime)  # has no dimension of time inside
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        left += [(child, f"{path}.{name}" if path else name, inside, compiled) for name, child in reversed(children)]


def _time_dim_of(takers: Sequence[_Taker]) -> int | None:
    """The dimension of time in the model's input; None where a call is a step."""
    first: dict[int | None, _Taker] = {}
    for taker in takers:
        if not taker.inside:
            first.setdefault(taker.streamed.time_dim, taker)
    if len(first) > 1:
        said = ", ".join(
            f"{taker.name} {'takes a step a call' if time_dim is None else f'has time at {time_dim}'}"
            for time_dim, taker in first.items()
        )
        raise ValueError(
            f"{_CALLER}: all layers must have time at the same dimension, or time_dim must say where it is in the "
            f"model's input; {said}"
        )
    return next(iter(first), 0)


class _Watch:
    """Refuses steps whose results would differ from a call with the whole sequence."""

    def __init__(self, takers: Sequence[_Taker]) -> None:
        self._takers = {taker.module: taker for taker in takers if not taker.compiled}
        self._called: set[nn.Module] = set()
        self._states: dict[nn.Module, Any] = {}
        self._left: dict[nn.Module, Any] = {}  # states after the layers' calls
        self._handles: list[Any] = []

    def start(self) -> None:
        for module, taker in self._takers.items():
            if taker.streamed.state is not None:
                self._states[module] = getattr(module, taker.streamed.state)
                self._handles.append(module.register_forward_hook(self._look_behind))
            self._handles.append(module.register_forward_pre_hook(self._look, with_kwargs=True))

    def finish(self) -> None:
        """Refuses a model whose forward ends with a reset."""
        for module, left in self._left.items():
            self._check_state(module, left)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _check_state(self, module: nn.Module, expected: Any) -> None:
        taker = self._takers[module]
        assert taker.streamed.state is not None
        if not _is_same(getattr(module, taker.streamed.state), expected):
            raise RuntimeError(
                f"{_CALLER}: {taker.name} is reset, or its state replaced, by the model's own forward: that belongs "
                "outside, between sequences, as in asgl_cuda.reset(model)"
            )

    def _look_behind(self, module: nn.Module, *_: Any) -> None:
        state = self._takers[module].streamed.state
        assert state is not None
        self._left[module] = getattr(module, state)

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taker = self._takers[module]
        _, state = taker.streamed
        values = (value.x if isinstance(value, Pending) else value for value in (*args, *kwargs.values()))
        tensors = [value for value in values if isinstance(value, Tensor)]
        if module in self._called:
            raise RuntimeError(
                f"{_CALLER}: {taker.name} is called twice in one step but carries one state: each place needs a layer "
                "of its own; for a model whose forward goes over time itself, time_dim must say where time is"
            )
        self._called.add(module)
        if len(tensors) > 1 and not isinstance(module, NeuronLayer):  # whose second one is the residual
            raise RuntimeError(
                f"{_CALLER}: {taker.name} gets its state from the model's forward, which begins anew with each call; "
                "it must keep the state itself, as snnTorch's layers do with init_hidden=True"
            )
        if state is not None:
            self._check_state(module, self._states[module])
        steps = _steps_in(tensors, taker.streamed.time_dim)
        if steps != 1:
            raise RuntimeError(
                f"{_CALLER}: {taker.name} gets {steps} time steps in one step: the model's forward makes them of its "
                "input, and what comes after can be stepped"
            )


def _is_same(state: Any, other: Any) -> bool:
    """Whether the states are the same, up to detach."""
    if isinstance(state, Tensor) and isinstance(other, Tensor):
        return state.shape == other.shape and state.data_ptr() == other.data_ptr()
    return state is other


def _steps_in(tensors: Sequence[Tensor], time_dim: int | None) -> int:
    """The time steps in the first tensor; 1 where unknown, which the layer refuses."""
    if time_dim is None or not tensors or not -tensors[0].dim() <= time_dim < tensors[0].dim():
        return 1
    return tensors[0].shape[time_dim]


def _without_time(output: Any, x_t: Tensor, time_dim: int) -> Any:
    """The output of one step; values other than tensors stay."""
    if isinstance(output, dict):
        made = copy.copy(output)  # keeps the class
        for key, value in output.items():
            made[key] = _without_time(value, x_t, time_dim)
        return made
    if isinstance(output, (list, tuple)):
        values = [_without_time(value, x_t, time_dim) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if not isinstance(output, Tensor):
        return output
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

    T calls compute the same as one call with the whole sequence, bit for bit for neurons in evaluation. `LIF`,
    `BatchNormLIF` and `LeakyIntegrator` need not be stateful, and start at rest again after `asgl_cuda.reset(model)`;
    `asgl_cuda.detach(model)` cuts the graph for truncated backpropagation. Layers of SpikingJelly, snnTorch and sinabs
    carry their states as usual, converted or not. If all layers take one step per call, no time dimension is added.

    Args:
        model: any module that keeps the time dimension; sums over time come after the steps.
        x_t: the input of the step, `[B, ...]`.
        time_dim: dimension of time in the model's input and output; default as in the layers, else 0.

    State or mixing over time in the model's own forward, as `asgl_cuda.lif`, a shift or attention, is not detected:
    each step is a sequence of length 1.

    Compile the model, not the step: `asgl_cuda.step(torch.compile(model), x_t)`. Calls inside are not watched then.
    After an error in the model some layers have taken the step: reset the model.

    Returns:
        The model's output, each tensor without time.

    Raises:
        TypeError: model is no module, or x_t no tensor.
        ValueError: layers differ in time_dim, or the output has no time.
        RuntimeError: a layer can't carry its state from call to call, is called twice in a step, gets its state from
            the caller, or is reset by the model's own forward.

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
    watch = _Watch(takers)
    layers = [(module, module.stateful) for module in model.modules() if isinstance(module, NeuronLayer)]
    try:
        for layer, _ in layers:
            layer.stateful = True
        watch.start()
        output = model(x_t if time_dim is None else x_t.unsqueeze(time_dim))
        watch.finish()
    finally:
        watch.stop()
        for layer, stateful in layers:
            layer.stateful = stateful
    return output if time_dim is None else _without_time(output, x_t, time_dim)
