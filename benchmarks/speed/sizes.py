"""Measured sizes: shapes and types of neuron layers and of blocks, and sweeps over them.

A block is batch normalisation followed by neurons, in some with a residual added between the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .clocks import MOST_SAMPLES, Sample, sample_of

LAYOUTS = ("time first", "channels_last")  # of blocks


def normal(device: torch.device, dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=getattr(torch, dtype))


class Size(NamedTuple):
    """A measured layer: the shape `[steps, neurons]` and dtype of its input, and which rows are measured."""

    steps: int
    neurons: int
    dtype: str
    compiled: bool = True  # with a row for torch.compile, which takes seconds
    peers: bool = True  # with rows for the other libraries
    adaptive: bool = False  # with rows for adaptive neurons, in place of those of ASGL

    @property
    def elements(self) -> int:
        return self.steps * self.neurons

    @property
    def bytes(self) -> int:
        return self.elements * getattr(torch, self.dtype).itemsize

    def random(self, device: torch.device) -> Tensor:
        return normal(device, self.dtype, self.steps, self.neurons)

    def __str__(self) -> str:
        return f"T = {self.steps}, N = {self.neurons}, {self.dtype}{', adaptive' if self.adaptive else ''}"


class Block(NamedTuple):
    """A measured normalisation with neurons: the shape `[T, B, C, H, W]`, dtype and layout of its input."""

    shape: tuple[int, ...]
    dtype: str
    layout: str = LAYOUTS[0]
    compiled: bool = True
    residual: bool = False  # added between the two

    @property
    def accesses(self) -> int:
        return 11 if self.residual else 9

    @property
    def steps(self) -> int:
        return self.shape[0]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * getattr(torch, self.dtype).itemsize

    def random(self, device: torch.device) -> Tensor:
        if self.layout == "channels_last":
            steps, batch, channels, *space = self.shape
            return normal(device, self.dtype, steps, batch, *space, channels).movedim(-1, 2)
        return normal(device, self.dtype, *self.shape)

    def __str__(self) -> str:
        layout = "" if self.layout == LAYOUTS[0] else f", {self.layout}"
        return f"block {list(self.shape)}, {self.dtype}{layout}{', residual' if self.residual else ''}"


CPU_SIZES = (
    Size(4, 2**20, "float32"),
    Size(16, 2**18, "float32"),
    Size(128, 2**15, "float32"),
    Size(4, 2**20, "bfloat16", peers=False),
    Size(4, 2**23, "float32", peers=False),
)
BLOCK_SHAPE = (4, 32, 64, 32, 32)
CPU_BLOCKS = (
    Block(BLOCK_SHAPE, "float32"),
    Block(BLOCK_SHAPE, "float32", "channels_last"),
    Block(BLOCK_SHAPE, "bfloat16", compiled=False),
    Block(BLOCK_SHAPE, "float32", residual=True),
)
# Sizes by which the kernels are judged.
GPU_SIZES = tuple(
    Size(steps, neurons, dtype) for steps, neurons in ((4, 2**24), (128, 2**19)) for dtype in ("float32", "bfloat16")
)
# A cache may hold part of the first block between passes, but of no other.
GPU_BLOCK_SHAPE = (4, 256, 64, 32, 32)
GPU_BLOCKS = (
    Block(BLOCK_SHAPE, "float32"),
    Block(GPU_BLOCK_SHAPE, "float32"),
    Block(GPU_BLOCK_SHAPE, "float32", "channels_last"),
    Block(GPU_BLOCK_SHAPE, "bfloat16"),
)
GPU_RESIDUAL_BLOCKS = tuple(Block(GPU_BLOCK_SHAPE, dtype, residual=True) for dtype in ("float32", "bfloat16"))
JUDGED = tuple(
    each._replace(compiled=False)
    for each in (*(size._replace(peers=False) for size in GPU_SIZES), *GPU_BLOCKS, *GPU_RESIDUAL_BLOCKS)
)
COMPILED_SIZES = (*GPU_SIZES, *GPU_BLOCKS, *(Size(16, 2**22, dtype, peers=False) for dtype in ("float32", "bfloat16")))


def description(size: Size | Block) -> dict[str, Any]:
    """The fields of a size, as they are written in a report."""
    return {name: value for name, value in size._asdict().items() if name not in ("compiled", "peers")}


def small(size: Size | Block) -> Size | Block:
    """A small size of the same kind, to try a measurement for GPUs on a CPU."""
    if isinstance(size, Block):
        return size._replace(shape=(4, 2, 8, 8, 8))
    return size._replace(steps=min(size.steps, 8), neurons=min(size.neurons, 2**12))


def usual_sizes(device: torch.device) -> Sequence[Size | Block]:
    return (*GPU_SIZES, *GPU_BLOCKS, *GPU_RESIDUAL_BLOCKS) if device.type == "cuda" else (*CPU_SIZES, *CPU_BLOCKS)


def sweep(name: str, device: torch.device) -> Sequence[Size | Block]:
    """The sizes of a sweep. T, N and adaptive have 16 times the neurons on a GPU, and FOR_GPUS small sizes on a CPU."""
    more = 4 if device.type == "cuda" else 0
    if name in FOR_GPUS:
        sizes = FOR_GPUS[name]
        return sizes if device.type == "cuda" else list(dict.fromkeys(map(small, sizes)))
    return {
        "T": [Size(steps, 2 ** (15 + more), "float32") for steps in (1, 2, 4, 8, 16, 32, 64, 128)],
        "N": [Size(4, 2 ** (power + more), "float32") for power in range(8, 23, 2)],
        "adaptive": [Size(*size, "float32", adaptive=True) for size in ((128, 2 ** (15 + more)), (100, 64 * 700))],
    }[name]


FOR_GPUS = {"judged": JUDGED, "compiled": COMPILED_SIZES}
SWEEPS = ("T", "N", "adaptive", *FOR_GPUS)


def samples(size: Size | Block, device: torch.device) -> list[Sample]:
    """Inputs that take turns, so that none stays in the GPU's cache. One on a CPU, where users benefit from caches."""
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(math.ceil(2 * cache / size.bytes), MOST_SAMPLES)
    tensors = 3 if isinstance(size, Block) and size.residual else 2
    return [sample_of(*(size.random(device) for _ in range(tensors))) for _ in range(count)]
