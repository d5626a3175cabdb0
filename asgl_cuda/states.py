"""step, reset and detach of a whole model. Layers carry their own states (neurons/base.py, interop/converted.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from .checks import check_int, check_step
from .interop.converted import CarriesStates, Converted, Streamed, Streaming, bare_class
from .interop.libraries import imported_adapters
from .interop.nir.neurons import Delay
from .interop.sequences import InSequences
from .neurons.base import NeuronLayer, check_module, set_plain_attribute
from .neurons.over_time import OverTime

_CALLER = "asgl_cuda.step"


class _SteppedModule:
    """A module of the model during `step`. It refuses calls whose results would differ from those for a sequence."""

    def __init__(self, model: nn.Module, module: nn.Module, streamed: Streamed, inside: bool, compiled: bool) -> None:
        self.model, self.module, self.streamed = model, module, streamed
        self.inside = (
            inside  # inside another layer with time, or OverTime, so the model's input may have another time_dim
        )
        self.compiled = compiled  # compiled code would ignore or compile hooks
        self.around = getattr(module, "_watch", None)  # set while `step` runs for a model around this one
        self.called = False
        self.left = self._state()  # the state after the last call

    @property
    def name(self) -> str:
        """The module in words for errors."""
        return _describe_module(self.model, self.module)

    def _state(self) -> Any:
        """The state that the module carries; None if it carries none, or several."""
        return None if self.streamed.state is None else getattr(self.module, self.streamed.state)

    def check_state(self) -> None:
        """Refuses a state that the model's forward has replaced since the module's last call."""
        state, left = self._state(), self.left
        same = state is left
        if not same and isinstance(state, Tensor) and isinstance(left, Tensor):
            # The state may have been detached, which makes another tensor of the same memory.
            same = state.shape == left.shape and state.data_ptr() == left.data_ptr()
        if not same:
            raise RuntimeError(
                f"{_CALLER}: {self.name} must keep its state, but the model's own forward resets or replaces it; do "
                "not do this in forward, and call asgl_cuda.reset(model) between sequences instead"
            )

    def before_call(self, x_seq: Any) -> None:
        """Runs before each call of the module. Refuses a second call, a replaced state, and several time steps."""
        if self.called:
            raise RuntimeError(
                f"{_CALLER}: {self.name} is called twice in one step but carries only one state; use another layer "
                "for the second call. If the model's forward loops over time, pass the time dimension of its input as "
                "time_dim"
            )
        self.called = True
        if self.around is not None:
            self.around.before_call(x_seq)
        self.check_state()
        shape, time_dim = x_seq.shape, self.streamed.time_dim
        if time_dim is None or not -len(shape) <= time_dim < len(shape):
            return  # a wrong time_dim or input, which the layer itself refuses
        if (steps := shape[time_dim]) != 1:
            raise RuntimeError(
                f"{_CALLER}: {self.name} has time in dimension {time_dim} and must get one step, got {steps} in an "
                f"input of shape {list(shape)}. Pass the time dimension of the model's input as time_dim. If the "
                "model's forward merges time and batch, it must separate them before this layer. It must not encode "
                "its input as a sequence; encode it before asgl_cuda.step"
            )

    def after_call(self) -> None:
        """Runs after each call of the module. Keeps its state, to see later whether the model has replaced it."""
        if self.around is not None:
            self.around.after_call()
        self.left = self._state()

    def register_hooks(self) -> Iterator[RemovableHandle]:
        """Yields the handles of hooks that run `before_call` and `after_call`, for a layer of another library.

        Each hook is registered when its handle is taken. A call with a second tensor, a state from the model's forward,
        is refused.
        """

        def check_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Checks the call. A second tensor is a state from the model's forward, which is refused."""
            inputs = [value for value in (*args, *kwargs.values()) if hasattr(value, "shape")]
            if len(inputs) > 1 and not self.called:
                raise RuntimeError(
                    f"{_CALLER}: {self.name} gets its state as an argument from the model's forward; the layer must "
                    "keep the state itself, as snnTorch's layers do with init_hidden=True"
                )
            if inputs:
                self.before_call(inputs[0])

        yield self.module.register_forward_pre_hook(check_call, with_kwargs=True)
        yield self.module.register_forward_hook(lambda *_: self.after_call())


def _describe_module(model: nn.Module, module: nn.Module) -> str:
    """The module in words for errors: its class, and its path in the model."""
    path = next(path for path, each in model.named_modules() if each is module)
    name = bare_class(module).__name__
    return f"{name} at {path!r}" if path else name


_streamed_by_time_dim = functools.cache(functools.partial(Streamed, state="v", has_switch=True))

# For each class of modules, the function of its library that says how a module takes steps, or None if no library knows
# the class. Asking all libraries takes 4 us, so it is done once per class.
_streamed_by_class: dict[type[nn.Module], Callable[[nn.Module], Streaming] | None] = {}


def _how_stepped(module: nn.Module) -> Streaming:
    """How the module takes single steps, or in words why it can't; None for a module without time."""
    if isinstance(module, NeuronLayer):
        return _streamed_by_time_dim(module.time_dim)
    if isinstance(module, InSequences):
        return module.streaming()
    kind = type(module)
    if kind not in _streamed_by_class:
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase, Delay)):
            return "it keeps no state from call to call; call the model with whole sequences, or in a loop of your own"
        asked = (library.streaming_of for library in imported_adapters())
        _streamed_by_class[kind] = next((streamed for streamed in asked if streamed(module) is not None), None)
    streamed = _streamed_by_class[kind]
    return None if streamed is None else streamed(module)


def _stepped_modules(model: nn.Module) -> Iterator[_SteppedModule]:
    """The modules of the model that have time, each once. Raises RuntimeError for one that can't take single steps."""
    found: set[nn.Module] = set()
    left: list[tuple[nn.Module, bool, bool]] = [(model, False, False)]  # modules to visit, with `inside` and `compiled`
    while left:  # no recursive closure: it would be a reference cycle, which keeps the model alive
        module, inside, compiled = left.pop()
        if module in found:
            continue
        found.add(module)
        children = module._modules
        compiled = compiled or "_orig_mod" in children or module._compiled_call_impl is not None
        answer = _how_stepped(module)
        if isinstance(answer, str):
            raise RuntimeError(f"{_CALLER}: {_describe_module(model, module)} can't be called step by step: {answer}")
        if answer is not None:
            yield _SteppedModule(model, module, answer, inside, compiled)
        if isinstance(module, InSequences):  # it calls its layers with whole sequences itself
            continue
        compiled = compiled or isinstance(module, Converted)  # converted layers do not call the modules inside
        inside = inside or answer is not None or isinstance(module, OverTime)  # modules inside see no time dimension
        left += [(child, inside, compiled) for child in reversed(children.values()) if child is not None]


def _time_dim_of(stepped_modules: Sequence[_SteppedModule]) -> int | None:
    """The dimension of time in the model's input; None if its layers take one step per call, without time."""
    first: dict[int | None, _SteppedModule] = {}
    for stepped in stepped_modules:
        if not stepped.inside:
            first.setdefault(stepped.streamed.time_dim, stepped)
    if len(first) > 1:
        said = (
            f"{'none (one step per call)' if at is None else at} for {stepped.name}" for at, stepped in first.items()
        )
        raise ValueError(
            f"{_CALLER}: all layers must have the same time dimension, got {', '.join(said)}; if this is meant, pass "
            "the time dimension of the model's input as time_dim"
        )
    return next(iter(first), 0)


def _remove_time_dim(output: Tensor, x_t: Tensor, time_dim: int) -> Tensor:
    """The output of one step without its time dimension. Raises ValueError if it has none."""
    if -output.dim() <= time_dim < output.dim() and output.shape[time_dim] == 1:
        without = output.squeeze(time_dim)
        # If the batch has size 1, squeeze may have removed the batch instead of time. The output then no longer begins
        # with the batch.
        if x_t.dim() < 2 or x_t.shape[0] != 1 or tuple(without.shape[:1]) == (1,):
            return without
        raise ValueError(
            f"{_CALLER}: the model's output must keep the time dimension, {time_dim}, and the batch of x_t, got shape "
            f"{list(output.shape)} for x_t of shape {list(x_t.shape)}; x_t must have a batch, and the model must not "
            "sum or average over time"
        )
    raise ValueError(
        f"{_CALLER}: the model's output must have the time dimension of its input, time_dim {time_dim}, got shape "
        f"{list(output.shape)} for an input with a single step of shape {list(x_t.shape)}; compute a sum or mean over "
        "time after the steps, outside of the model"
    )


def step(model: nn.Module, x_t: Tensor, *, time_dim: int | None = None) -> Any:
    """Calls a model for one time step. Input and output have no time dimension, and layers keep their states.

    In evaluation, T calls compute the same as one call with a sequence of T steps, up to rounding (see `model` for an
    exception). In training, each step draws new noise, and `BatchNormLIF` normalises by the statistics of that step.
    Layers of asgl_cuda need not be `stateful`. After `asgl_cuda.reset(model)` they start at rest again. Layers of
    SpikingJelly, snnTorch and sinabs carry their states as usual, also after `convert`. The model itself gets x_t as a
    sequence of one step. Only if all its neurons take one step per call, as SpikingJelly's do in step mode "s", does it
    get x_t as it is.

    Args:
        model: any module that takes a sequence and returns one, with time in the same dimension. The results of T steps
            differ from those for a sequence, without an error, if the model's own forward keeps a state or combines
            several time steps, for example by `asgl_cuda.lif`, a shift in time or attention over time. To compile, call
            `asgl_cuda.step(torch.compile(model), x_t)`. In compiled code, the calls of layers are not checked.
        x_t: the input of the step, `[B, ...]`.
        time_dim: dimension of time in the model's input and output; default the `time_dim` of the layers.

    Returns the model's output, with the time dimension removed from all tensors, also in tuples, lists and dicts.

    Raises TypeError if an argument has a wrong type, and ValueError if layers differ in time_dim and the argument
    `time_dim` is None, if x_t has too few dimensions for time_dim, or if the output has no time dimension. Raises
    RuntimeError if a layer can't carry its state from call to call, gets several time steps, or is called twice in a
    step. Also raises RuntimeError if the model's own forward passes a state to a layer or resets a layer. After an
    error some layers may have taken the step, so reset the model.

    Example::

        net = torch.nn.Sequential(torch.nn.Linear(4, 8), asgl_cuda.LIF(), torch.nn.Linear(8, 2)).eval()
        for x_t in torch.rand(10, 32, 4):
            out = asgl_cuda.step(net, x_t)  # [32, 2]
        asgl_cuda.reset(net)
    """
    check_module(model, _CALLER)
    if time_dim is not None:
        check_int("time_dim", time_dim, _CALLER)
    stepped_modules = list(_stepped_modules(model))
    time_dim = _time_dim_of(stepped_modules) if time_dim is None else time_dim
    check_step(x_t, time_dim or 0, _CALLER)
    handles: list[RemovableHandle] = []
    kept: list[tuple[Any, str, Any]] = []  # attributes to restore

    def set_until_end(layer: Any, name: str, value: Any) -> None:
        """Sets an attribute until the step ends."""
        kept.append((layer, name, getattr(layer, name)))
        set_plain_attribute(layer, name, value)

    try:
        for stepped in stepped_modules:
            if stepped.streamed.has_switch:
                set_until_end(stepped.module, "stateful", True)
            if stepped.compiled:
                continue
            if isinstance(stepped.module, NeuronLayer):
                set_until_end(stepped.module, "_watch", stepped)
            else:
                handles += stepped.register_hooks()
        output = model(x_t if time_dim is None else x_t.unsqueeze(time_dim))
        for stepped in stepped_modules:
            if stepped.called:
                stepped.check_state()
    finally:
        for handle in handles:
            handle.remove()
        for layer, name, value in kept:
            set_plain_attribute(layer, name, value)
    if time_dim is None:
        return output
    if isinstance(output, Tensor):
        return _remove_time_dim(output, x_t, time_dim)
    return _pytree.tree_map_only(Tensor, lambda each: _remove_time_dim(each, x_t, time_dim), output)


def reset(model: nn.Module) -> None:
    """Clears the states that the layers of a model carry, such as potentials, so that their next call starts at rest.

    `reset` also resets the layers of SpikingJelly, snnTorch and sinabs, before and after `convert`. Norse's layers
    carry no state.

    Raises TypeError if `model` is not a module.

    Example::

        model = nn.Sequential(nn.Linear(64, 128), asgl_cuda.LIF(stateful=True))
        for x in torch.randn(10, 32, 64):  # one step per call
            spikes = model(x.unsqueeze(0))  # [1, 32, 128]
        asgl_cuda.reset(model)  # before the next sequence
    """
    _call_on_all_layers(model, "reset", "reset")
    for module in model.modules():
        if isinstance(module, CarriesStates):
            vars(module).pop("_carries", None)


def detach(model: nn.Module) -> None:
    """Detaches the states that the layers of a model carry, for truncated backpropagation through time.

    The next call continues from the same states, but no gradient passes back through them. `detach` works for the same
    layers as `asgl_cuda.reset`.

    Raises TypeError if `model` is not a module.

    Example::

        for chunk in x_seq.split(2):
            model(chunk).sum().backward()
            asgl_cuda.detach(model)
    """
    _call_on_all_layers(model, "detach", "detach_")


def _call_on_all_layers(model: nn.Module, name: str, method: str) -> None:
    """Calls `method` of each layer of asgl_cuda, and for every module the functions `name` of the other libraries."""
    check_module(model, f"asgl_cuda.{name}")
    functions = [getattr(library, name) for library in imported_adapters() if hasattr(library, name)]
    for module in model.modules():
        if isinstance(module, NeuronLayer):
            getattr(module, method)()
        for function in functions:
            function(module)
