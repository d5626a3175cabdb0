"""Neurons as code for publications writes them, in our words: threshold functions and loops over steps."""

import torch
from torch import nn


class Spike(torch.autograd.Function):
    """A spike at u >= 0 with the slope of a rectangle, `kind` 0, or a triangle of width `width`."""

    @staticmethod
    def forward(ctx, u, width, triangle):
        ctx.save_for_backward(u)
        ctx.width, ctx.triangle = width, triangle
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        y = u / ctx.width
        slope = (1 - y.abs()).clamp(min=0) if ctx.triangle else (y.abs() <= 0.5).to(u)
        return grad * slope / ctx.width, None, None


class MemUpdate(nn.Module):
    """`mem = mem * decay * (1 - spike) + x`, without a gradient through the reset."""

    def __init__(self, threshold=0.5, width=1.0, decay=0.25, triangle=False):
        super().__init__()
        self.threshold, self.width, self.decay, self.triangle = threshold, width, decay, triangle

    def forward(self, x_seq):
        mem, spike, out = 0.0, torch.zeros_like(x_seq[0]), []
        for x in x_seq:
            mem = mem * self.decay * (1 - spike.detach()) + x
            spike = Spike.apply(mem - self.threshold, self.width, self.triangle)
            out.append(spike)
        return torch.stack(out)


class SigmoidLIF(nn.Module):
    """A learned decay, `sigmoid(w)`, and a reset by subtraction."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x_seq):
        v, out = 0.0, []
        for x in x_seq:
            v = v * self.w.sigmoid() + x
            spike = Spike.apply(v - 1, 1.0, True)
            v = v - spike
            out.append(spike)
        return torch.stack(out)


class TdBNLIF(nn.Module):
    """A normalisation over time and batch, whose weights start at `alpha * threshold`, and neurons behind it."""

    def __init__(self, channels, alpha=1.0, threshold=0.5):
        super().__init__()
        self.norm, self.neurons = nn.BatchNorm2d(channels), MemUpdate(threshold)
        nn.init.constant_(self.norm.weight, alpha * threshold)

    def forward(self, x_seq):
        return self.neurons(self.norm(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2]))
