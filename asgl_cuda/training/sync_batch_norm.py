"""Batch statistics shared between processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..interop.convert import libraries
from ..interop.converted import bare_class
from ..interop.fuse import Fused, overlay
from ..layer import check_module
from ..neuron import BatchNormLIF

_CALLER = "asgl_cuda.convert_sync_batchnorm"


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """The model, with normalisations that share batch statistics between processes in training.

    Applies `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, in place, and also converts `BatchNormLIF`, which torch
    skips; what `asgl_cuda.fuse` has joined, which torch takes apart, stays so. Parameters and buffers stay.

    Args:
        model: any module, before `DistributedDataParallel` takes it.
        process_group: default all processes.

    Returns:
        The model; if itself a normalisation, its replacement.

    Raises:
        TypeError: model is no module, or process_group no process group.
        ValueError: a normalisation of SpikingJelly has step mode "m", which torch's would lose. Nothing has been
            changed then.

    Example::

        model = asgl_cuda.convert_sync_batchnorm(model)  # then DistributedDataParallel(model)
    """
    check_module(model, _CALLER)
    if process_group is not None and not (
        torch.distributed.is_available() and isinstance(process_group, torch.distributed.ProcessGroup)
    ):
        raise TypeError(
            f"{_CALLER}: process_group must be a process group that this process is in, or None for all processes, "
            f"got {process_group!r}"
        )
    kinds = [kind for library in libraries() for kind in getattr(library, "NORMALISATIONS", ())]
    fused = [path for path, module in model.named_modules() if isinstance(module, Fused)]
    for path, module in model.named_modules():
        name = bare_class(module).__name__
        if bare_class(module) in kinds and getattr(module, "step_mode", "s") == "m":
            raise ValueError(
                f"{_CALLER}: {path or 'the model'} ({name} of SpikingJelly) must have step mode 's', which torch's "
                "SyncBatchNorm has, got 'm'; torch's layer in a SeqToANNContainer, or BatchNormLIF, can be converted"
            )
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            module.process_group = "world" if process_group is None else process_group
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    for path in fused:
        overlay(model.get_submodule(path))
    return model
