"""A callback for Lightning."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ..checks import format_type
from .monitor import Monitor
from .schedule import AnalogProbSchedule


def lightning_callback(schedule: AnalogProbSchedule | None = None, monitor: Monitor | None = None) -> Any:
    """A Lightning callback that steps `schedule` and logs the results of `monitor` at the end of each training epoch.

    The monitor watches training steps, but not validation, and is reset at the start of each epoch. The values of
    `monitor.scalars()` are logged by name, as means over the processes. Checkpoints save and restore the state of the
    schedule. The callback is for the package `lightning`, or for `pytorch_lightning` if only that is imported.

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

        # schedule and monitor refer to the model. If methods captured them as variables, the model would stay alive
        # until a garbage collection, because a class is always in a reference cycle. So they are attributes.
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
