"""Layers that know no time, over a sequence."""

from __future__ import annotations

from torch import Tensor, nn


class OverTime(nn.Module):
    """A layer that knows no time, such as a convolution or a batch normalisation, applied to all steps at once.

    Args:
        layer: any module, several in an `nn.Sequential`.

    Shapes: `[T, B, ...]` to `[T, B, ...]`, or `[B, T, ...]` to `[B, T, ...]`; the layer sees time and batch in one,
    `[T * B, ...]`.

    Raises TypeError where `layer` is no module.

    Example::

        model = nn.Sequential(asgl_cuda.OverTime(nn.Conv2d(1, 16, 3)), asgl_cuda.BatchNormLIF(16))
        s_seq = model(torch.randn(4, 32, 1, 8, 8))  # [T, B, 1, 8, 8] to [T, B, 16, 6, 6]

    The same in PyTorch::

        layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"asgl_cuda.OverTime: layer must be a torch.nn.Module, got {type(layer).__name__}")
        self.layer = layer

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])  # type: ignore[no-any-return]
