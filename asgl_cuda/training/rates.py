"""Firing rates with gradients, for penalties in the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import HALF_TYPES, format_value, read_finite
from ..neurons.batch_norm_lif import check_process_group, sharing_group
from ..torch_modes import is_in_backward, is_transform_active
from .layers import require_asgl_layers

_CALLER = "asgl_cuda.FiringRates"


class FiringRates:
    """Differentiable firing rates of the ASGL layers of a model, for calls inside `with rates:` or after `start()`.

    The rate of a layer is the mean of its output over these calls, in spikes per neuron and time step. In training with
    `analog_prob` above 0, the mean includes smooth values. With `levels` or `multi_spike` all spikes of a step are
    counted, so the rate can exceed 1.

    Args:
        model: any module that contains ASGL layers (see `asgl_cuda.asgl_layers`), such as those that
            `asgl_cuda.convert` makes.
        process_group: the processes over which rates are averaged. It is a process group of torch.distributed, "world"
            for all processes that exist when the rates are taken, or None for this process alone. Every process of the
            group must then call `take()` and `penalty()` equally often.

    `take()` returns the rates over the calls since rates were last taken. `penalty()` takes the rates as well, and
    returns a penalty on them. Only calls that autograd records are counted, so an evaluation under `torch.no_grad()`
    between training steps changes nothing. The autograd graph of each call is kept until the rates are taken, so take
    them once per training step. Call `start()` before the first call of a compiled model. Calls under transforms of
    torch.func, and calls inside reentrant checkpoints, are not counted.

    Example::

        model = nn.Sequential(nn.Linear(20, 64), asgl_cuda.BatchNormLIF(64), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(asgl_cuda.parameter_groups(model, lr=1e-3))
        batches = [(torch.rand(4, 32, 20), torch.randint(10, (32,))) for _ in range(3)]
        with asgl_cuda.FiringRates(model) as rates:
            for x_seq, labels in batches:
                scores = model(x_seq).mean(0)  # [32, 10]
                loss = nn.functional.cross_entropy(scores, labels) + 3.0 * rates.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    Raises ValueError if the model has no ASGL layers, or if a layer has `scale_output`, so that the height of its
    spikes is not 1. Raises TypeError if `model` is not a module, or if `process_group` is not as described above.

    Source of penalties on rates: Zenke, Vogels: The remarkable robustness of surrogate gradient learning for instilling
    complex function in spiking neural networks, Neural Computation 33 (2021).
    """

    def __init__(self, model: nn.Module, *, process_group: Any = "world") -> None:
        self._layers = require_asgl_layers(model, _CALLER)
        for name, layer in self._layers.items():
            if getattr(layer, "scale_output", False):
                height = "1 / levels" if getattr(layer, "_emits_levels", False) else "v_threshold"
                raise ValueError(
                    f"{_CALLER}: {name or 'the model'} ({type(layer).__name__}) has scale_output=True, so that its "
                    f"mean output is not a firing rate; multiply the weights of the next layer by {height} instead"
                )
        check_process_group(process_group, _CALLER)
        self._process_group = process_group
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._sums: dict[str, tuple[Any, int]] = {}  # by layer: the sum of its outputs, and their number

    def start(self) -> None:
        """Starts recording the outputs of the layers. It has no effect if recording has started already."""
        for name, layer in () if self._handles else self._layers.items():
            # This hook must run before other forward hooks, which may replace the layer's output.
            self._handles.append(layer.register_forward_hook(_Hook(self._sums, name), prepend=True))

    def stop(self) -> None:
        """Stops recording, and drops calls whose rates have not been taken."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sums.clear()

    def __enter__(self) -> FiringRates:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def take(self) -> dict[str, Tensor]:
        """Returns the rates of the calls since rates were last taken: a scalar tensor for each called layer, by name.

        Raises RuntimeError if no call of a layer is recorded.
        """
        sums = {name: self._sums[name] for name in self._layers if name in self._sums}
        self._sums.clear()
        rates = {name: total / count for name, (total, count) in sums.items()}
        if (group := sharing_group(self._process_group, _CALLER)) is not None:
            rates = self._averaged_over_processes(rates, sums, group)
        if not rates:
            raise RuntimeError(
                f"{_CALLER}: no call of a layer is recorded. Call the model with gradients, inside `with rates:` or "
                "after start(). Take the rates once per forward pass, before the `with` block or stop() ends the "
                "recording. For a compiled model, call start() before its first call. Calls under transforms of "
                "torch.func or reentrant checkpoints are never recorded"
            )
        return rates

    def _averaged_over_processes(
        self, rates: dict[str, Tensor], sums: dict[str, tuple[Any, int]], group: Any
    ) -> dict[str, Tensor]:
        """The rates over all processes.

        Their gradients contain only this process's calls, scaled so that the mean over the processes, which
        DistributedDataParallel takes, is the gradient of the rates.
        """
        device = next((rate.device for rate in rates.values()), None)
        given = [sums.get(name, (torch.zeros(()), 0)) for name in self._layers]  # the same layers in all processes
        numbers = [torch.stack([total.detach().to(device, torch.float64) for total, _ in given])]
        numbers.append(numbers[0].new_tensor([count for _, count in given]))
        shared = torch.stack(numbers)
        torch.distributed.all_reduce(shared, group=group)
        processes, found = torch.distributed.get_world_size(group), {}
        for name, total, count in zip(self._layers, *shared.unbind(), strict=True):
            if (rate := rates.get(name)) is not None:
                own, _ = sums[name]
                found[name] = (total / count).to(rate) + processes * (own - own.detach()) / count.to(rate)
        return found

    def penalty(self, target: float | Mapping[str, float] | None = None) -> Tensor:
        """Takes the rates, and returns a penalty on them. Multiply it by a weight and add it to the loss.

        Args:
            target: the rate that every layer should have, a dict from the names of some layers to the rates that these
                should have, or None. A rate is in [0, 1], or at least 0 if the layer has `levels` or `multi_spike`.

        Returns a scalar tensor. With None it is the mean of the rates of all layers that were called, which pushes
        towards silence. With a rate or a dict it is the mean of `(rate - target) ** 2` over the called layers that have
        a target.

        Raises the errors of `take`, TypeError or ValueError for invalid targets, and KeyError if the dict has a name
        that no layer has.
        """
        targets: Mapping[str, Any] = target if isinstance(target, Mapping) else dict.fromkeys(self._layers, target)
        for name, value in targets.items():
            if name not in self._layers:
                names = ", ".join(map(repr, self._layers))
                hint = "; '' is the model itself" if "" in self._layers else ""
                raise KeyError(f"{_CALLER}: no ASGL layer is named {name!r}; the layers are named {names}{hint}")
            if target is None:
                continue
            layer = self._layers[name]
            several = getattr(layer, "levels", None) is not None or getattr(layer, "multi_spike", False)
            if not 0 <= read_finite("target", value, _CALLER) <= (math.inf if several else 1):
                limit = "at least 0" if several else "in [0, 1]"
                kind = f"{name or 'the model'} ({type(layer).__name__})"
                raise ValueError(f"{_CALLER}: target must be {limit} for {kind}, got {format_value(value)}")
        called = self.take()
        rates = {name: rate for name, rate in called.items() if name in targets}
        if not rates:
            raise RuntimeError(
                f"{_CALLER}: no call of a layer with a target is recorded: got targets for "
                f"{', '.join(map(repr, targets)) or 'no layer'}, and calls of {', '.join(map(repr, called))}"
            )
        values = [rate if target is None else (rate - targets[name]) ** 2 for name, rate in rates.items()]
        return torch.stack([each.to(values[0].device) for each in values]).mean()


class _Hook:
    """A forward hook that adds up the outputs of a layer. On a copy of the layer it does nothing."""

    def __init__(self, sums: dict[str, tuple[Any, int]] | None = None, name: str = "") -> None:
        self._sums, self._name = sums, name

    def __reduce__(self) -> Any:
        return _Hook, ()

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        s_seq = output[0] if isinstance(output, tuple) else output
        if (
            self._sums is None
            or is_transform_active()
            or not isinstance(s_seq, Tensor)
            or not s_seq.requires_grad
            or s_seq.numel() == 0
        ):
            return
        if not torch.compiler.is_compiling() and is_in_backward():  # a checkpoint repeats a forward that was counted
            return
        total, count = self._sums.get(self._name, (0.0, 0))
        own = s_seq.sum(dtype=torch.float32 if s_seq.dtype in HALF_TYPES else None)
        self._sums[self._name] = total + own, count + s_seq.numel()
