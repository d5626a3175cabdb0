"""Products of spikes that the tests ask the same questions."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import asgl_cuda

LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


class Case(NamedTuple):
    """A linear map where `kernel` is None, else a convolution of `x`, [N, C, H, W]."""

    x: tuple[int, ...]
    outputs: int
    kernel: tuple[int, int] | None = None
    stride: int = 1
    padding: int | str = 0
    layout: torch.memory_format = CONTIGUOUS

    def spikes(self, share: float = 0.2, dtype: torch.dtype = torch.float32, values: bool = False) -> Tensor:
        """Zeros, and ones or, with `values`, any numbers."""
        x = (torch.rand(self.x) < share).to(dtype)
        x = x * torch.randn_like(x) if values else x
        return x.contiguous(memory_format=self.layout) if self.kernel else x

    def parameters(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        shape = (self.outputs, self.x[1], *self.kernel) if self.kernel else (self.outputs, self.x[-1])
        return torch.randn(shape, dtype=dtype), torch.randn(self.outputs, dtype=dtype)

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kernel is None:
            return asgl_cuda.spike_linear(x, weight, bias)
        return asgl_cuda.spike_conv2d(x, weight, bias, self.stride, self.padding)

    def torchs(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kernel is None:
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, self.stride, self.padding)


# Sums and outputs across the edges of vectors, groups of 32, 64 and 128 columns, batches of 256 pixels, tiles of 512
# pixels in rows and columns, ranges of 1024 channels, words of 64 bits.
CASES = {
    "one": Case((1, 1), 1),
    "odd": Case((3, 37), 5),
    "batch of sequences": Case((5, 3, 100), 33),
    "many rows": Case((1100, 65), 140),
    "many inputs": Case((9, 2100), 70),
    "3 x 3": Case((2, 3, 5, 7), 4, (3, 3), padding=1),
    "3 x 3, last": Case((3, 17, 9, 8), 70, (3, 3), padding=1, layout=LAST),
    "many pixels": Case((2, 6, 27, 25), 40, (3, 3), layout=LAST),
    "stride": Case((2, 8, 9, 10), 33, (3, 3), stride=2, padding=1, layout=LAST),
    "1 x 1": Case((2, 33, 6, 5), 20, (1, 1)),
    "5 x 2": Case((2, 5, 8, 6), 40, (5, 2), padding=2, layout=LAST),
    "7 x 7": Case((2, 4, 11, 13), 9, (7, 7), stride=2, padding=3),
    "wide padding": Case((2, 4, 4, 4), 6, (2, 2), padding=3),
    "same": Case((2, 4, 7, 6), 6, (4, 3), padding="same"),
    "patches": Case((2, 3, 32, 33), 40, (16, 16), stride=16),
    "wide": Case((2, 3, 2, 1100), 35, (3, 3), padding=1, layout=LAST),
    "no height": Case((3, 4, 1, 9), 6, (1, 3), padding=1, layout=LAST),
}
