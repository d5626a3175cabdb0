"""A stand-in for the code that the authors of ASGL published: the names, attributes and arithmetic of its layers."""

import math

import torch
from torch import nn


class _Surrogate(nn.Module):
    """Makes its parameter at the first call, in the shape of the granularity."""

    def __init__(self, alpha=1.0, learnable=True, granularity="layer"):
        super().__init__()
        self.learnable = learnable
        self.granularity = granularity
        self.alpha = self.first(alpha) if learnable else torch.tensor(self.first(alpha))

    def make(self, u):
        if not self.learnable or isinstance(self.alpha, nn.Parameter):
            return
        shapes = {"layer": (1,), "channel": (1, u.shape[1], 1, 1) if u.dim() > 2 else (1,), "neuron": u.shape[1:]}
        self.alpha = nn.Parameter(torch.full(shapes[self.granularity], float(self.alpha)))


class InvRectangle(_Surrogate):
    """1 / width is exp(alpha)."""

    first = staticmethod(math.log)

    def forward(self, u):
        self.make(u)
        return (u * self.alpha.exp() + 0.5).clamp(0, 1)


class InvSigmoid(_Surrogate):
    """1 / width is alpha."""

    first = float

    def forward(self, u):
        self.make(u)
        return (u * self.alpha).sigmoid()


class InvTanh(_Surrogate):
    """A name unknown to asgl_cuda."""

    first = float


class EfficientNoisySpike(nn.Module):
    """A hard spike with the gradient of the surrogate."""

    def __init__(self, inv_sg):
        super().__init__()
        self.inv_sg = inv_sg

    def forward(self, u):
        smooth = self.inv_sg(u)
        return smooth + ((u >= 0).float() - smooth).detach()


class EfficientNoisySpikeII(EfficientNoisySpike):
    """In training a share `p` of the elements is smooth."""

    def __init__(self, inv_sg, p=0.5, spike=True):
        super().__init__(inv_sg)
        self.p = p
        self.spike = spike
        self.mask = None

    def forward(self, u):
        smooth = self.inv_sg(u)
        if not self.training:
            return (u >= 0).float() if self.spike else smooth
        self.mask = torch.bernoulli(torch.full_like(u, 1 - self.p))
        return smooth + (self.mask * ((u >= 0).float() - smooth)).detach()


class LIFCell(nn.Module):
    """One step, from potential and input current to the next potential and the spike."""

    def __init__(self, spike_fn, decay=0.5, thresh=0.5, vreset=None, use_gate=False):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor([math.log(decay / (1 - decay))]))
        self.thresh = thresh
        self.vreset = vreset
        self.use_gate = use_gate
        self.spike_fn = spike_fn

    def forward(self, vmem, psp):
        vmem = self.decay.sigmoid() * vmem + psp
        spike = self.spike_fn(vmem - self.thresh)
        vmem = vmem - self.thresh * spike if self.vreset is None else vmem * (1 - spike) + self.vreset * spike
        return vmem, spike


class LIFLayer(nn.Module):
    """All steps; a spike is as high as the threshold."""

    def __init__(self, nb_steps, retain_v=True, **cell):
        super().__init__()
        self.nb_steps = nb_steps
        self.retain_v = retain_v
        self.cell = LIFCell(**cell)

    def forward(self, x):
        vmem, out = 0, []
        for step in range(self.nb_steps):
            vmem, spike = self.cell(vmem, x[step])
            out.append(spike * self.cell.thresh)
        if self.retain_v:
            self.vmem = vmem
        return torch.stack(out)


class tdLayer(nn.Module):  # noqa: N801
    """A layer without time, applied to all steps at once."""

    def __init__(self, layer, nb_steps):
        super().__init__()
        self.nb_steps = nb_steps
        self.layer = layer

    def forward(self, x):
        x = x.contiguous()
        x = self.layer(x.view(-1, *x.shape[2:]))
        return x.view(self.nb_steps, -1, *x.shape[1:])
