"""Helpers of training and evaluation: a Lightning callback, evaluation with hard spikes, shared batch statistics."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..checks import format_type, format_value
from ..interop.converted import bare_class
from ..interop.fuse import Fused, make_fused
from ..interop.libraries import imported_adapters
from ..neurons.base import check_module, require_asgl_layers
from ..neurons.batch_norm_lif import BatchNormLIF
from .monitor import Monitor
from .schedule import AnalogProbSchedule


def lightning_callback(schedule: AnalogProbSchedule | None = None, monitor: Monitor | None = None) -> Any:
    """A Lightning callback that steps `schedule` and logs the results of `monitor` at the end of each training epoch.

    The monitor watches training steps, but not validation, and is reset at the start of each epoch. Its `scalars()` are
    logged by name, as means over the processes. Checkpoints save and restore the state of the schedule. The callback
    belongs to `lightning`, or to `pytorch_lightning` if only that is imported.

    Raises ValueError if both are None, TypeError for other types, and ImportError if Lightning is not installed.
    """
    if schedule is None and monitor is None:
        raise ValueError("asgl_cuda.lightning_callback: needs a schedule, a monitor or both, got None and None")
    for name, value, kind in (("schedule", schedule, AnalogProbSchedule), ("monitor", monitor, Monitor)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"asgl_cuda.lightning_callback: {name} must be an asgl_cuda.{kind.__name__}, got {format_type(value)}"
            )
    is_old = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    lightning = importlib.import_module("pytorch_lightning" if is_old else "lightning.pytorch")

    class ASGLCallback(lightning.Callback):  # type: ignore[misc, name-defined]
        """The callback. Its methods are those of Lightning's base class."""

        # Schedule and monitor refer to the model. Methods that had them in a closure would make a reference cycle,
        # which would keep the model alive.
        def __init__(self, schedule: AnalogProbSchedule | None, monitor: Monitor | None) -> None:
            super().__init__()
            self._schedule, self._monitor = schedule, monitor

        def on_train_epoch_start(self, *_: Any) -> None:
            if self._monitor is not None:
                self._monitor.reset()

        def on_train_batch_start(self, *_: Any) -> None:
            if self._monitor is not None:
                self._monitor.start()

        def on_train_batch_end(self, *_: Any) -> None:
            if self._monitor is not None:
                self._monitor.stop()

        on_exception = on_train_batch_end

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if self._monitor is not None:
                module.log_dict(self._monitor.scalars(), sync_dist=True)
            if self._schedule is not None:
                self._schedule.step()

        def state_dict(self) -> dict[str, Any]:
            """The state of the schedule, which Lightning saves in its checkpoints."""
            return {} if self._schedule is None else self._schedule.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Restores the state of the schedule from a checkpoint of Lightning."""
            if self._schedule is not None:
                self._schedule.load_state_dict(state_dict)

    return ASGLCallback(schedule, monitor)


@contextmanager
def spiking_eval(model: nn.Module) -> Iterator[None]:
    """A context in which every ASGL layer emits hard spikes, with surrogate gradients, for attacks and fine-tuning.

    On entry `analog_prob` is set to 0. On exit each layer gets its own value back, also after an exception. Nothing
    else changes: not the modes of batch norm and dropout, carried potentials or `requires_grad`. Attacks need
    `model.eval()` as well, and fine-tuning does not. Do not step an `AnalogProbSchedule` inside, because its values are
    lost on exit.

    The result is a context manager and a decorator of functions. A call without `with` does nothing.

    Raises ValueError for a model without ASGL layers, and TypeError if `model` is not a module, both on entry.

    Example::

        model = nn.Sequential(nn.Linear(64, 128), asgl_cuda.LIF(analog_prob=0.2))
        x_seq = torch.randn(4, 32, 64, requires_grad=True)
        with asgl_cuda.spiking_eval(model):
            (gradient,) = torch.autograd.grad(model(x_seq).sum(), x_seq)
    """
    before = [(layer, layer.analog_prob) for layer in require_asgl_layers(model, "asgl_cuda.spiking_eval").values()]
    try:
        for layer, _ in before:
            layer.analog_prob = 0.0
        yield
    finally:
        for layer, analog_prob in before:
            layer.analog_prob = analog_prob


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """The model, with normalisations that share batch statistics between processes in training.

    Applies `torch.nn.SyncBatchNorm.convert_sync_batchnorm` in place, and also converts `BatchNormLIF`, which torch's
    function skips. Layers that `asgl_cuda.fuse` has merged stay merged, whereas torch's function would separate them.
    Parameters and buffers stay.

    Args:
        model: any module, before it is wrapped in `DistributedDataParallel`.
        process_group: the processes that share statistics; default all.

    Returns:
        The model, or its replacement if the model itself is a normalisation.

    Raises:
        TypeError: model is not a module, or process_group is not a process group.
        ValueError: a normalisation of SpikingJelly has step mode "m", which torch's layer would lose. Nothing is
            changed then.

    Example::

        model = asgl_cuda.convert_sync_batchnorm(model)  # then DistributedDataParallel(model)
    """
    caller = "asgl_cuda.convert_sync_batchnorm"
    check_module(model, caller)
    if process_group is not None and not (
        torch.distributed.is_available() and isinstance(process_group, torch.distributed.ProcessGroup)
    ):
        raise TypeError(
            f"{caller}: process_group must be a process group that this process is in, or None for all processes, "
            f"got {format_value(process_group)}"
        )
    kinds = [kind for library in imported_adapters() for kind in getattr(library, "NORMALISATIONS", ())]
    fused = [path for path, module in model.named_modules() if isinstance(module, Fused)]
    for path, module in model.named_modules():
        name = bare_class(module).__name__
        if bare_class(module) in kinds and getattr(module, "step_mode", "s") == "m":
            raise ValueError(
                f"{caller}: {path or 'the model'} ({name} of SpikingJelly) can't be in step mode 'm', because torch's "
                "SyncBatchNorm takes no time dimension; use torch's layer in a SeqToANNContainer, or BatchNormLIF"
            )
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            module.process_group = "world" if process_group is None else process_group
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    for path in fused:
        make_fused(model.get_submodule(path))
    return model
