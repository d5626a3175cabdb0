"""A training run: epochs and tests, in one process or several, from and to checkpoints.

Weights are trained by SGD with a rate that falls along a cosine, widths and decays by Adam with a constant rate.
Normalisations, biases and neurons have no weight decay. Every epoch seeds torch's generators again, so that a resumed
run continues with the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler

import asgl_cuda

from .data import in_a_line
from .networks import network_of
from .presets import Settings, scheduled_width

_TET_SHARE, _TET_MEAN = 1e-3, 1.0
_NAMES = {"T": "steps", "thresh": "threshold", "decay": "decay"}  # of settings in the authors' program and here


def optimizers_of(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """SGD for the weights, and a second optimizer, Adam, for the neurons, whose rate does not follow the cosine."""
    groups = asgl_cuda.parameter_groups(
        model, settings.rate, settings.width_rate, settings.weight_decay, norm_weight_decay=0.0
    )
    neurons = [group for group in groups if group["name"] == "neurons"]
    weights = [group for group in groups if group["name"] != "neurons"]
    return [torch.optim.SGD(weights, momentum=0.9), *([torch.optim.Adam(neurons)] if neurons else [])]


def loss_of(scores: Tensor, labels: Tensor, kind: str) -> Tensor:
    """The loss of scores `[T, B, classes]`.

    mean    cross-entropy of the mean over time
    tet     (1 - 0.001) * mean cross-entropy of the steps + 0.001 * mean of (scores - 1)^2
            (Deng, Li, Zhang, Gu: Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting, 2022)
    """
    scores = scores.float()
    if kind == "mean":
        return functional.cross_entropy(scores.mean(0), labels)
    by_step = functional.cross_entropy(scores.flatten(0, 1), labels.repeat(len(scores)))
    return (1 - _TET_SHARE) * by_step + _TET_SHARE * (scores - _TET_MEAN).square().mean()


def checkpoint_of(file: Path, device: torch.device) -> dict[str, Any]:
    """The content of a checkpoint of this program or of the authors', who call the network `best_net`."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # theirs may hold the arguments
            saved = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # by files, pickle, zipfile and torch
        raise SystemExit(f"{file} is no checkpoint that can be read: {in_a_line(error)}") from None
    if not isinstance(saved, dict) or not ({"network", "settings"} <= saved.keys() or "best_net" in saved):
        raise SystemExit(f"{file} must be a checkpoint of this program or of the authors', and is neither")
    return saved


def settings_in(saved: dict[str, Any], preset: Settings) -> Settings:
    """The settings of a checkpoint. The authors' have few settings, which replace those of the preset."""
    if "best_net" in saved:
        arguments = vars(saved.get("config", argparse.Namespace()))
        known = {_NAMES[name]: value for name, value in arguments.items() if name in _NAMES and value is not None}
        known["learn_decay"] = any(name.endswith("cell.decay") for name in saved["best_net"])
        return replace(preset, **known, frames="la" if preset.data == "dvs-cifar10" else "separate")
    try:
        settings = Settings(**saved["settings"])
    except (TypeError, ValueError) as error:
        raise SystemExit(f"the checkpoint has settings that are none here: {in_a_line(error)}") from None
    if (settings.data, settings.network) != (preset.data, preset.network):
        raise SystemExit(
            f"the checkpoint is of {settings.data}-{settings.network}, not of {preset.data}-{preset.network}"
        )
    return settings


class Options(NamedTuple):
    """How a training run is computed."""

    device: torch.device
    amp: bool = False
    compiled: bool = False
    recompute: bool = False
    workers: int = 0


class Training:
    """The state of a training run, and its epochs."""

    def __init__(self, settings: Settings, samples: tuple[Any, Any], options: Options) -> None:
        self.settings, self.options = settings, options
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if settings.batch % self.processes:
            raise SystemExit(f"--batch {settings.batch} must be a multiple of the {self.processes} processes")
        self.epoch, self.best = 0, 0.0
        torch.manual_seed(settings.seed)
        train, test = samples
        example = self.sequence_of(torch.stack([test[0][0]] * 2))
        self.network = asgl_cuda.fuse(network_of(settings), example, inplace=True)[0].to(options.device)
        self.model: nn.Module = self.network
        if dist.is_initialized():
            self.model = DistributedDataParallel(self.network)
        if options.compiled:
            self.model = torch.compile(self.model)  # type: ignore[assignment]
        self.optimizers = optimizers_of(self.network, settings)
        self.cosine = CosineAnnealingLR(self.optimizers[0], settings.epochs)
        gpu = options.device.type == "cuda"
        batches = partial(
            DataLoader[Any], batch_size=settings.batch // self.processes, num_workers=options.workers, pin_memory=gpu
        )
        self.sampler = DistributedSampler[Any](train, self.processes, self.rank, seed=settings.seed)
        self.train_batches = batches(train, sampler=self.sampler)
        self.test_batches = batches(test)

    def sequence_of(self, samples: Tensor) -> Tensor:
        """`[T, B, ...]`; an image is a constant current."""
        if samples.dim() == 4:
            return samples.expand(self.settings.steps, *samples.shape)
        return samples.transpose(0, 1).contiguous()

    def scores_of(self, model: nn.Module, samples: Tensor) -> Tensor:
        """`[T, B, classes]`."""
        x_seq = self.sequence_of(samples.to(self.options.device, non_blocking=True))
        with torch.autocast(self.options.device.type, torch.bfloat16, enabled=self.options.amp):
            return model(x_seq)  # type: ignore[no-any-return]

    def train_epoch(self, shown: Callable[[Any], Iterable[Any]] = iter) -> float:
        """Trains for one epoch, and returns the mean loss. `shown` wraps the batches, for example in a progress bar."""
        torch.manual_seed((self.settings.seed * 10_000 + self.epoch) * 1000 + self.rank)
        self.sampler.set_epoch(self.epoch)
        if self.settings.widths == "schedule":
            for _, layer in asgl_cuda.asgl_layers(self.network):
                layer.width = scheduled_width(self.settings, self.epoch)
        self.model.train()
        losses = []
        for samples, labels in shown(self.train_batches):
            with asgl_cuda.recompute_spikes() if self.options.recompute else nullcontext():
                scores = self.scores_of(self.model, samples)
            loss = loss_of(scores, labels.to(self.options.device), self.settings.loss)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            losses.append(loss.detach())
        self.cosine.step()
        self.epoch += 1
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def accuracy(self) -> float:
        """The accuracy in percent on the test samples, with hard spikes, in this process alone."""
        self.network.eval()
        right = [
            self.scores_of(self.network, samples).float().mean(0).argmax(1).cpu() == labels
            for samples, labels in self.test_batches
        ]
        return 100 * float(torch.cat(right).float().mean())

    def save(self, file: Path) -> None:
        """Writes a checkpoint atomically."""
        states = {name: each.state_dict() for name, each in self._parts().items()}
        part = file.with_suffix(".part")
        torch.save({"settings": asdict(self.settings), "epoch": self.epoch, "best": self.best, **states}, part)
        part.replace(file)

    def _parts(self) -> dict[str, Any]:
        optimizers = {f"optimizer{number}": each for number, each in enumerate(self.optimizers)}
        return {"network": self.network, "cosine": self.cosine, **optimizers}

    def resume(self, file: Path) -> None:
        """Continues from a checkpoint of this program with the same settings."""
        saved = checkpoint_of(file, self.options.device)
        if "best_net" in saved:
            raise SystemExit(f"{file} is of the authors' program, --resume goes on from this program's")
        found, expected = asdict(settings_in(saved, self.settings)), asdict(self.settings)
        other = [name for name in expected if found[name] != expected[name]]
        if other:
            expected, found = ({name: each[name] for name in other} for each in (expected, found))
            raise SystemExit(f"{file} is of other settings: expected {expected}, found {found}")
        self.epoch, self.best = saved["epoch"], saved["best"]
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])

    def load_network(self, saved: dict[str, Any]) -> None:
        """Loads the network alone."""
        try:
            self.network.load_state_dict(saved["best_net" if "best_net" in saved else "network"])
        except RuntimeError as error:
            raise SystemExit(f"the checkpoint does not fit {self.settings.network}: {in_a_line(error)}") from None
