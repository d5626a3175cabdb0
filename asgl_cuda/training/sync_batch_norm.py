"""Batch statistics that processes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..checks import format_value
from ..interop.converted import bare_class
from ..interop.fuse import Fused, make_fused
from ..interop.libraries import imported_adapters
from ..neurons.base import check_module
from ..neurons.batch_norm_lif import BatchNormLIF


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Makes the batch normalisations of a model share their batch statistics between processes in training.

    Applies `torch.nn.SyncBatchNorm.convert_sync_batchnorm` in place, and also converts `BatchNormLIF`, which torch's
    function skips. Layers that `asgl_cuda.fuse` has merged stay merged. Parameters and buffers stay the same tensors.
    In training on CPUs, torch's `SyncBatchNorm` raises an error if `torch.distributed` is initialised.

    Args:
        model: any module, before it is wrapped in `DistributedDataParallel`.
        process_group: the processes that share statistics; default all.

    Returns:
        The model itself, or a `SyncBatchNorm` in its place if the model is a batch normalisation of torch or
        SpikingJelly, or of a subclass of these.

    Raises:
        TypeError: model is not a module, or process_group is not a process group.
        ValueError: a normalisation of SpikingJelly has step mode "m", but torch's `SyncBatchNorm` takes no time
            dimension. Nothing is changed then.

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
                "SyncBatchNorm takes no time dimension; use a torch.nn.BatchNorm layer in SpikingJelly's "
                "SeqToANNContainer, or asgl_cuda.BatchNormLIF in place of the normalisation and its neurons"
            )
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            module.process_group = "world" if process_group is None else process_group
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    for path in fused:
        make_fused(model.get_submodule(path))
    return model
