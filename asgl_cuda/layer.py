"""ASGL layers, `asgl_cuda.LIF` and layers that `asgl_cuda.convert` has made such, have this in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_analog_prob, check_multi_spike


def give_dimension(state_dict: dict[str, Any], prefix: str, *names: str) -> None:
    """Gives parameters of a whole layer the dimension that they lack in older checkpoints."""
    for name in names:
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and value.dim() == 0:
            state_dict[prefix + name] = value.reshape(1)


def check_features(num_features: int | Sequence[int] | None, granularity: str, caller: str) -> tuple[int, ...]:
    """The sizes of what each parameter of a layer is for, which fit its granularity."""
    if num_features is None:
        sizes: Sequence[int] = ()
    else:
        sizes = num_features if isinstance(num_features, Sequence) else (num_features,)
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(
            f"{caller}: num_features must be an int or a sequence of ints, got {type(num_features).__name__}"
        )
    if granularity not in ("layer", "channel", "neuron"):
        raise ValueError(f"{caller}: granularity must be layer, channel or neuron, got {granularity!r}")
    if granularity == "layer":
        if sizes:
            raise ValueError(
                f"{caller}: num_features needs granularity 'channel' or 'neuron', got {num_features} with "
                "granularity 'layer'"
            )
        return ()
    if num_features is None or (granularity == "channel" and len(sizes) != 1):
        wanted = "the number of channels" if granularity == "channel" else "the shape of the neurons"
        raise ValueError(f"{caller}: granularity {granularity!r} needs num_features, {wanted}, got {num_features}")
    if any(size < 1 for size in sizes):
        raise ValueError(f"{caller}: num_features must be positive, got {num_features}")
    return tuple(sizes)


class Noisy(nn.Module):
    """A layer with a share of analog elements, which is data of a compiled graph: a schedule compiles nothing anew."""

    _analog_prob: float
    _has_noise: bool  # apart from the share, so that a compiled graph depends on nothing else
    _analog_prob_data: Tensor  # no buffer: DistributedDataParallel would send it round at each call

    @property
    def analog_prob(self) -> float:
        """Share of elements that emit the smooth value in training."""
        return self._analog_prob

    @analog_prob.setter
    def analog_prob(self, value: float) -> None:
        caller = f"asgl_cuda.{type(self).__name__}"
        check_analog_prob(value, caller)
        if getattr(self, "multi_spike", False):
            check_multi_spike(self.v_reset, value, caller)
        self._analog_prob, self._has_noise = float(value), value > 0
        self._keep_as_data(getattr(self, "_analog_prob_data", torch.empty(0, device="cpu")).device)

    def analog_prob_of_call(self, x_seq: Tensor) -> Tensor | float:
        """`analog_prob` for `asgl_cuda.lif`; 0 in evaluation."""
        if not self.training or not self._has_noise:
            return 0.0
        return self._analog_prob_data.to(x_seq.device) if torch.compiler.is_compiling() else self._analog_prob

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **options: Any) -> Any:
        super()._apply(fn, *arguments, **options)  # type: ignore[no-untyped-call]
        if "_analog_prob_data" in self.__dict__:  # whatever fn does to the values and their type
            self._keep_as_data(fn(self._analog_prob_data).device)
        return self

    def _keep_as_data(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # it is for training, too
            self._analog_prob_data = torch.full((1,), self._analog_prob, dtype=torch.float64, device=device)

    def end_noise(self) -> None:
        """The layer becomes one that has never had a share of analog elements."""
        for name in ("_analog_prob", "_has_noise", "_analog_prob_data"):
            self.__dict__.pop(name, None)


def asgl_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The ASGL layers of a model with their names, in the order of `named_modules`, each once.

    An ASGL layer is a module with a float `analog_prob`, a parameter or None `log_width`, and `width`. Those without
    noise are among them: they may get some, and can be monitored. Raises TypeError where `model` is no module.
    """
    check_module(model, "asgl_cuda.asgl_layers")
    # torch.compile's wrapper of a layer passes attributes on, and would count as a second layer, hence getattr_static.
    return (
        (name, module)
        for name, module in model.named_modules()
        if inspect.getattr_static(module, "analog_prob", None) is not None and hasattr(module, "log_width")
    )


def some_asgl_layers(model: nn.Module, caller: str) -> dict[str, Any]:
    """The same as a dict; refuses a model that has none."""
    check_module(model, caller)
    layers = dict(asgl_layers(model))
    if not layers:
        raise ValueError(f"{caller}: model must have an ASGL layer, got a {type(model).__name__} without")
    return layers


def check_module(model: Any, caller: str) -> None:
    """Refuses anything that is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
