"""Batch statistics shared between processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..interop.convert import libraries
from ..interop.converted import bare_class, overlaid
from ..interop.normalised import Normalised, PassedThrough
from ..layer import check_module
from ..neuron import BatchNormLIF

_CALLER = "asgl_cuda.convert_sync_batchnorm"


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """The model, with normalisations that share batch statistics between processes in training.

    Applies `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, in place, and also converts `BatchNormLIF`, which torch
    skips, and pairs joined by `asgl_cuda.fuse`, which torch separates. Parameters and buffers stay.

    Args:
        model: any module, before `DistributedDataParallel` takes it.
        process_group: default all processes.

    Returns:
        The model; if itself a normalisation, its replacement.

    Raises:
        TypeError: model is no module, or process_group no process group.
        ValueError: a normalisation of SpikingJelly has step mode "m", which torch's would lose, or the neurons that
            compute a normalisation are not in the model. Nothing has been changed then.

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
    computed = {id(layer.normalisation.norm): layer for layer in model.modules() if isinstance(layer, Normalised)}
    pairs: dict[str, tuple[PassedThrough, Normalised]] = {}
    for path, module in model.named_modules():
        name = bare_class(module).__name__
        if bare_class(module) in kinds and getattr(module, "step_mode", "s") == "m":
            raise ValueError(
                f"{_CALLER}: {path or 'the model'} ({name} of SpikingJelly) must have step mode 's', which torch's "
                "SyncBatchNorm has, got 'm'; torch's layer in a SeqToANNContainer, or BatchNormLIF, can be converted"
            )
        if isinstance(module, PassedThrough):
            if id(module) not in computed:
                raise ValueError(
                    f"{_CALLER}: the neurons that compute {path or 'the model'} ({name}) must be in the model: convert "
                    "the model that asgl_cuda.fuse returned"
                )
            pairs[path] = module, computed[id(module)]
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            module.process_group = "world" if process_group is None else process_group
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    for path, (norm, layer) in pairs.items():
        made: Any = model.get_submodule(path)
        made.__class__ = overlaid(norm.overlay, type(made))
        made.neurons = norm.neurons
        layer.normalisation = layer.normalisation._replace(norm=made)
    return model
