"""The data: CIFAR with the authors' augmentation, frames of DVS-CIFAR10 from a folder, and generated samples.

A sample is an image `[C, H, W]` or frames `[T, C, H, W]`. All randomness is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from .presets import CLASSES, Settings

Samples = Dataset[tuple[Tensor, int]]

# Means and deviations of the authors' code.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_CUTOUT = 16
_SIDE = 48  # height and width of frames, in pixels
_MOST_SHIFT = 5


def in_a_line(error: Exception) -> str:
    """The type of an error and the first sentence of its message."""
    return shorten(f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0]}", 300)


def cutout(image: Tensor) -> Tensor:
    """A square of 16 x 16 pixels around a random pixel set to 0, less where it leaves the image."""
    rows, columns = (
        (torch.arange(size) - int(torch.randint(size, ())) + _CUTOUT // 2).clamp(-1, _CUTOUT)
        for size in image.shape[-2:]
    )
    inside = (rows.ge(0) & rows.lt(_CUTOUT))[:, None] & (columns.ge(0) & columns.lt(_CUTOUT))
    return image.masked_fill(inside, 0.0)


def cifar(name: str, root: Path) -> tuple[Samples, Samples]:
    try:
        from torchvision import datasets, transforms
    except ImportError:
        raise SystemExit("CIFAR is read and augmented by torchvision: pip install torchvision") from None
    to_tensor, normalise = transforms.ToTensor(), transforms.Normalize(*_STATISTICS[name])
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[128, 128, 128])
    augmented = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), policy, to_tensor, cutout, normalise]
    )
    plain = transforms.Compose([to_tensor, normalise])
    kind = getattr(datasets, name.upper())
    try:
        return kind(str(root), train=True, transform=augmented), kind(str(root), train=False, transform=plain)
    except RuntimeError:
        raise SystemExit(
            f"{root} must have {kind.base_folder}, as torchvision leaves it: "
            f"torchvision.datasets.{kind.__name__}({str(root)!r}, download=True)"
        ) from None


def augment_frames(frames: Tensor) -> Tensor:
    """Mirrors frames at random, and rolls them by up to 5 pixels."""
    if torch.rand(()) < 0.5:
        frames = frames.flip(-1)
    shifts = torch.randint(-_MOST_SHIFT, _MOST_SHIFT + 1, (2,)).tolist()
    return frames.roll(shifts, (-2, -1))


def resized(events: Tensor) -> Tensor:
    """Frames `[T, 2, H, W]` of 0 and 1, resized to 48 x 48 pixels, each channel by itself."""
    return functional.interpolate(events, (_SIDE, _SIDE), mode="bilinear", antialias=True)


def resized_as_la(events: Tensor) -> Tensor:
    """The same as the authors do it, by Pillow: channel 0 as the grey of an image whose alpha is channel 1.

    Pillow multiplies grey by alpha before it resizes, and divides by alpha after it. So events of channel 0 count only
    where channel 1 has events in the same pixel.
    """
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("--frames la resizes by Pillow: pip install pillow") from None
    images = (Image.fromarray(frame) for frame in events.mul(255).byte().movedim(1, -1).contiguous().numpy())
    small = np.stack([np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)) for image in images])
    return torch.from_numpy(small).movedim(-1, 1).div(255)


class Frames(Samples):
    """DVS-CIFAR10 in a folder: files `.pt` of frames and label, or folders of classes with SpikingJelly's `.npz`."""

    def __init__(self, folder: Path, settings: Settings, augment: Callable[[Tensor], Tensor] | None) -> None:
        steps = settings.steps
        self.files = sorted(each for suffix in ("pt", "npz") for each in folder.rglob(f"*.{suffix}"))
        if not self.files:
            raise SystemExit(
                f"{folder} must have frames of DVS-CIFAR10: .pt files of (frames [{steps}, 2, H, W], label), or a "
                "folder of .npz files for each class, as spikingjelly.datasets.CIFAR10DVSTEBNSplit(root, train, "
                f'data_type="frame", frames_number={steps}, split_by="number") makes them'
            )
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.labels = {name: number for number, name in enumerate(classes)}
        self.steps, self.classes, self.augment = steps, CLASSES[settings.data], augment
        self.resize = resized_as_la if settings.frames == "la" else resized
        try:
            self._read(self.files[0])  # an error that all files have is raised before training
        except ValueError as error:
            raise SystemExit(str(error)) from None

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, file: Path) -> tuple[Tensor, int]:
        try:
            if file.suffix == ".pt":
                content, label = torch.load(file, weights_only=True)
            else:
                content, label = np.load(file)["frames"], self.labels[file.parent.name]
            content, label = torch.as_tensor(content), int(label)
        except Exception as error:  # by torch, pickle, zipfile and NumPy
            raise ValueError(f"{file} has no frames with a label that can be read: {in_a_line(error)}") from error
        if content.dim() != 4 or tuple(content.shape[:2]) != (self.steps, 2):
            raise ValueError(f"{file}: expected frames [{self.steps}, 2, H, W], found {list(content.shape)}")
        if not 0 <= label < self.classes:
            raise ValueError(f"{file}: expected a label from 0 to {self.classes - 1}, found {label}")
        return content.gt(0).float(), label  # several events of a pixel and frame count once

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        events, label = self._read(self.files[index])
        frames = self.resize(events)
        return frames if self.augment is None else self.augment(frames), label


class Synthetic(Samples):
    """Generated samples in a data set's shapes, easy to learn: each class has a pattern of blocks, with noise added."""

    def __init__(self, count: int, shape: tuple[int, ...], classes: int, first: int = 0) -> None:
        draw = torch.Generator().manual_seed(0)
        blocks = torch.randn(classes, *shape[:-2], 4, 4, generator=draw)
        self.patterns = functional.interpolate(blocks.flatten(1, -3), shape[-2:]).reshape(classes, *shape)
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % len(self.patterns)
        draw = torch.Generator().manual_seed(self.first + index)
        return self.patterns[label] + 0.5 * torch.randn(self.patterns[label].shape, generator=draw), label


def samples_of(settings: Settings, root: Path | None, synthetic: int | None) -> tuple[Any, Any]:
    """The samples for training and for the test; generated ones if their number is given as `synthetic`."""
    events = settings.data == "dvs-cifar10"
    if synthetic is not None:
        shape = (settings.steps, 2, _SIDE, _SIDE) if events else (3, 32, 32)
        classes = CLASSES[settings.data]
        return Synthetic(synthetic, shape, classes), Synthetic(synthetic // 2, shape, classes, first=synthetic)
    if root is None:
        raise SystemExit("--data-root must name the folder of the data, or --synthetic a number of generated samples")
    if events:
        return Frames(root / "train", settings, augment_frames), Frames(root / "test", settings, None)
    return cifar(settings.data, root)
