"""Layers that know no time, over a sequence."""

from __future__ import annotations

from torch import Tensor, fx, nn


class OverTime(nn.Module):
    """A layer that knows no time, such as a convolution or a batch normalisation, applied to all steps at once.

    Args:
        layer: any module, several in an `nn.Sequential`.

    Shapes: `[T, B, ...]` to `[T, B, ...]`, or `[B, T, ...]` to `[B, T, ...]`; the layer sees time and batch in one,
    `[T * B, ...]`.

    Raises TypeError where `layer` is no module or the input no tensor, ValueError for an input without time and batch.

    The same in PyTorch::

        layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"asgl_cuda.OverTime: layer must be a torch.nn.Module, got {type(layer).__name__}")
        self.layer = layer

    def forward(self, x_seq: Tensor) -> Tensor:
        if isinstance(x_seq, Tensor):
            if x_seq.is_nested or x_seq.dim() < 2:
                got = "a nested tensor" if x_seq.is_nested else f"shape {list(x_seq.shape)}"
                raise ValueError(f"asgl_cuda.OverTime: x_seq must have time and batch, [T, B, ...], got {got}")
        elif not isinstance(x_seq, fx.Proxy):
            raise TypeError(f"asgl_cuda.OverTime: x_seq must be a tensor, got {type(x_seq).__name__}")
        return self.layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])  # type: ignore[no-any-return]
