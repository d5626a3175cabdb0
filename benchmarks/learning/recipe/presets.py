"""The settings of a training run, and presets: the authors' two published commands, and the same for other data sets.

For options that a published command leaves out, presets have the default of the authors' program. The other presets
take the settings for CIFAR-100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from asgl_cuda.reference.surrogates import SURROGATES


@dataclass(frozen=True)
class Settings:
    """The settings on which the result of a training run depends, besides data, device and precision.

    Raises ValueError for a value out of range, and names its option.
    """

    data: str
    network: str
    loss: str  # "mean": cross-entropy of the mean over time; "tet": of every step, with a pull towards 1
    widths: str = "learned"  # or "fixed", "schedule", "per-step"
    seed: int = 60
    steps: int = 2
    batch: int = 128  # over all processes
    epochs: int = 300
    rate: float = 0.1  # initial rate of SGD, annealed along a cosine
    width_rate: float = 3e-4  # constant rate of Adam, for widths and decays
    weight_decay: float = 5e-4
    width: float = 5.0  # initial width
    surrogate: str = "sigmoid"
    analog_prob: float = 0.2
    decay: float = 0.5
    learn_decay: bool = True
    threshold: float = 1.0
    channels: float = 1.0  # factor on the channels of the network
    frames: str = "separate"  # how frames of events are resized; "la": polarities as grey and alpha, as the authors do

    def __post_init__(self) -> None:
        learned = {"decay": (1e-6, 1 - 1e-6)} if self.learn_decay else {}
        for name, (least, most) in (_LIMITS | learned).items():
            value = getattr(self, name)
            if not least <= value <= most:  # nan, too
                expected = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
                raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {value}")
        if self.frames == "la" and self.data != "dvs-cifar10":
            raise ValueError(f"--frames la is of dvs-cifar10, whose frames have two channels, not of {self.data}")


CHOICES = {"loss": ("mean", "tet"), "surrogate": tuple(SURROGATES), "frames": ("separate", "la")}
_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("steps", "batch", "epochs"), (1, math.inf)),
    **dict.fromkeys(("rate", "width_rate", "weight_decay"), (0, 1e6)),
    **dict.fromkeys(("width", "threshold", "channels"), (1e-6, 1e6)),
    **dict.fromkeys(("analog_prob", "decay"), (0, 1)),
    "seed": (0, 1e9),
}
CLASSES = {"cifar10": 10, "cifar100": 100, "dvs-cifar10": 10}

_DVS = Settings(
    "dvs-cifar10", "vggsnn2", "tet", seed=200, steps=10, batch=32, epochs=100, weight_decay=1e-3, width=1.0,
    surrogate="rectangle", analog_prob=0.1, learn_decay=False, threshold=0.5,
)  # fmt: skip
# The authors train ResNet on the mean, and VGG on events alone, under TET: VGG on CIFAR, and its loss, are ours.
PRESETS = {
    f"{data}-{network}": Settings(data, network, "tet" if network == "vgg13" else "mean")
    for data in ("cifar10", "cifar100")
    for network in ("resnet18", "resnet19", "vgg13")
} | {"dvs-cifar10-vggsnn2": _DVS}
PUBLISHED = ("cifar100-resnet18", "dvs-cifar10-vggsnn2")

# What a baseline changes.
BASELINES: dict[str, dict[str, Any]] = {
    "fixed": {"widths": "fixed", "analog_prob": 0.0},
    "no-noise": {"analog_prob": 0.0},
    "schedule": {"widths": "schedule", "analog_prob": 0.0},
    "per-step": {"widths": "per-step"},
}


def scheduled_width(settings: Settings, epoch: int) -> float:
    """The width of the baseline "schedule", which falls by equal factors to a tenth in the last epoch."""
    return float(settings.width * 0.1 ** (epoch / max(settings.epochs - 1, 1)))
