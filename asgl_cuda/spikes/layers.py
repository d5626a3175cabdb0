"""torch's linear layers and convolutions as products that only spikes cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backends import extension
from ..neurons.deferred import tensor_of
from ..torch_modes import is_transform_active
from .functional import convolution_by_kernel, has_kernel, linear_by_kernel

# In evaluation without gradients, a linear layer uses a cached transposed copy of its weight if a call has at most this
# number of samples, because transposing the weight in the call would take longer than the product. A convolution does
# so if its input has at most this number of pixels, over all samples, for each element of its kernel.
_FEW_SAMPLES = 64


def _parameter_of(layer: nn.Module, name: str) -> Any:
    """The parameter of this name, without the 0.4 us that attribute access of nn.Module takes."""
    own = layer._parameters
    return own[name] if name in own else getattr(layer, name)


class _CachedPanels:
    """A copy of a weight in the kernels' order, `panels`, and what shows whether the weight has changed since."""

    def __init__(self, weight: Tensor) -> None:
        self._key = self._key_of(weight)
        self._storage = weight.untyped_storage()  # kept alive, so that no other weight gets its address
        self.panels: Tensor = extension.module.spike_panels(weight.detach())  # type: ignore[union-attr]

    @staticmethod
    def _key_of(weight: Tensor) -> tuple[Any, ...]:
        """Properties of the weight, of which at least one changes if torch knows of a change of the weight."""
        return weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype

    def is_current_for(self, weight: Tensor) -> bool:
        """Whether this is a copy of the weight as it is now."""
        return self._key_of(weight) == self._key


class _SpikeLayer(nn.Module):
    """Base of the layers: in evaluation it keeps a copy of the weight for calls with few samples, such as single steps.

    The copy is not part of state dicts, copies and pickles of the layer. A change of the weight is seen by its version,
    another storage by its address. Some optimizers, such as torch's fused ones, do not change the version, so a call in
    training or with a gradient of the weight drops the copy.
    """

    weight: Tensor
    _copy: _CachedPanels | None = None

    def _cached_panels(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The weight in the kernels' order, cached, for calls with few samples; None otherwise.

        Drops the cache where an optimizer may change the weight.
        """
        if self.training or (weight.requires_grad and torch.is_grad_enabled()):
            self._copy = None
            return None
        if (
            x.numel() * weight.shape[0] > _FEW_SAMPLES * weight.numel()
            or torch.compiler.is_compiling()  # the copy would become a constant of the graph
            or is_transform_active()  # the weight may be a wrapper without memory of its own
            or type(weight) not in (nn.Parameter, Tensor)  # a subclass may have no memory either
            or weight.is_inference()  # has no version that would show a change
        ):
            return None
        copy = self._copy  # read once: another thread may replace it
        if copy is None or not copy.is_current_for(weight):
            copy = self._copy = _CachedPanels(weight)
        return copy.panels

    def train(self, mode: bool = True) -> Any:
        """Sets the mode as in torch, and drops the copy of the weight."""
        self._copy = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch, for `to()` and others; drops the copy of the weight."""
        self._copy = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_copy"}


class SpikeLinear(_SpikeLayer, nn.Linear):
    """`torch.nn.Linear` for inputs that are mostly zero, such as spikes.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`. The state dict is the same as that of
            `torch.nn.Linear`.

    Shapes: `[..., in_features]` to `[..., out_features]`.

    On the CPU, in float32 and float64, the layer skips zero inputs. See `spike_linear` for the computation, and for the
    cases in which torch's operator is used. With hundreds of features, we estimate that the layer is faster on the CPU
    than `torch.nn.Linear` if at most about half of the inputs are non-zero: see the guide "Layers that only spikes
    cost".

    In evaluation and without gradients, calls with small inputs, such as single time steps, use a transposed copy of
    the weight. The layer keeps the copy until the weight changes, a call needs a gradient of the weight, or ``train()``
    or ``eval()`` is called. The layer does not notice changes through ``.data`` or NumPy: call ``eval()`` after them.
    In training, a call with a single vector is slower than with `torch.nn.Linear`.

    Raises the errors of `spike_linear`.

    Example::

        model = nn.Sequential(nn.Linear(40, 512), asgl_cuda.LIF(), asgl_cuda.SpikeLinear(512, 256), asgl_cuda.LIF())
        s_seq = model(torch.randn(100, 32, 40))  # [T, B, 40] to [T, B, 256]
    """

    def forward(self, input: Tensor) -> Tensor:
        """The output `[..., out_features]` for `input` `[..., in_features]`, with the bias."""
        caller = "asgl_cuda.SpikeLinear"
        x = tensor_of(input, caller)
        weight, bias = _parameter_of(self, "weight"), _parameter_of(self, "bias")
        if has_kernel(x, weight, caller):
            return linear_by_kernel(x, weight, bias, self._cached_panels(x, weight), caller)
        return functional.linear(x, weight, bias)


class _SpikeConv(_SpikeLayer):
    """Base of the convolutions: their forward by the kernels, or by torch's operator where these do not apply."""

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of `input`, `[N, in_channels, ...]` or `[in_channels, ...]`, with the bias."""
        layer: Any = self
        weight, bias = layer.weight, layer.bias
        caller = f"asgl_cuda.{type(self).__name__}"
        x = tensor_of(input, caller)
        if not has_kernel(x, weight, caller) or layer.groups != 1 or any(each != 1 for each in layer.dilation):
            return layer._conv_forward(x, weight, bias)  # type: ignore[no-any-return]
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = (0,) * len(layer.kernel_size)
        return convolution_by_kernel(x, weight, bias, self._cached_panels(x, weight), layer.stride, padding, caller)


class SpikeConv1d(_SpikeConv, nn.Conv1d):
    """`torch.nn.Conv1d` for inputs that are mostly zero, such as spikes.

    Args:
        in_channels, out_channels and so on: all arguments of `torch.nn.Conv1d`. The state dict is the same as that of
            `torch.nn.Conv1d`.

    Shapes: `[N, in_channels, L]` or `[in_channels, L]`, as `torch.nn.Conv1d`.

    See `SpikeConv2d`, which computes in the same way. Raises the errors of `spike_conv2d`.

    Example::

        layer = asgl_cuda.SpikeConv1d(64, 64, 5, padding=2)
        current = layer((torch.rand(32, 64, 100) < 0.1).float())  # [32, 64, 100]
    """


class SpikeConv2d(_SpikeConv, nn.Conv2d):
    """`torch.nn.Conv2d` for inputs that are mostly zero, such as spikes.

    Args:
        in_channels, out_channels and so on: all arguments of `torch.nn.Conv2d`. The state dict is the same as that of
            `torch.nn.Conv2d`.

    Shapes: `[N, in_channels, H, W]` or `[in_channels, H, W]`, as `torch.nn.Conv2d`. For sequences wrap the layer in
    `asgl_cuda.OverTime`.

    On the CPU, in float32 and float64, the layer skips zero inputs. See `spike_conv2d` for the computation, and for the
    cases in which torch's operator is used. See `SpikeLinear` for the copy of the weight that calls with small inputs
    use. With hundreds of channels, we estimate that the layer is faster on the CPU than `torch.nn.Conv2d` if at most
    about 40 % of the inputs are non-zero. With only 32 channels, the limit is about 27 %.

    Raises the errors of `spike_conv2d`.

    Example::

        block = nn.Sequential(
            asgl_cuda.OverTime(asgl_cuda.SpikeConv2d(64, 64, 3, padding=1, bias=False)), asgl_cuda.BatchNormLIF(64)
        )
        s_seq = block((torch.rand(4, 8, 64, 16, 16) < 0.1).float())  # [T, B, C, H, W]
    """


# Layers of torch, each with the spike layer that replaces it.
SPIKE_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SpikeLinear, nn.Conv1d: SpikeConv1d, nn.Conv2d: SpikeConv2d,
}  # fmt: skip


def expected_speedup(layer: nn.Module, share: float) -> float:
    """How many times as fast as torch's layer an evaluation is, if the fraction `share` of the inputs is not zero.

    Fitted to times in float32 of layers with 32 to 1,024 channels and fractions of 0.05 to 0.5.
    """
    per_channel, each = (25, 1.5) if isinstance(layer, nn.Linear) else (14, 2.1)
    fewest = min(layer.weight.shape[:2])  # type: ignore[index]
    return 1 / (per_channel / fewest + each * share)
