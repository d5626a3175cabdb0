"""Models that the tests of `fuse` share, and their comparison with what is made of them."""

import copy

import libraries  # noqa: F401
import sinabs.activation
import sinabs.layers
import snntorch
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import asgl_cuda
from asgl_cuda.interop.converted import Converted
from asgl_cuda.interop.normalised import Normalised

T, B, C = 5, 4, 3


def on(model, backend):
    """All layers of neurons on one backend."""
    for module in model.modules():
        if isinstance(module, asgl_cuda.LIF):
            module.backend = backend
        elif isinstance(module, Converted):
            module.settings = module.settings._replace(backend=backend)
    return model


def scattered(model):
    """The model with normalisations that do something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.3), ("running_var", 0.5)):
                    if getattr(module, name) is not None:
                        getattr(module, name).uniform_(low, low + 1.5)
    return model


def reset(model):
    for module in model.modules():
        if isinstance(module, neuron.BaseNode):
            module.reset()
        elif isinstance(module, sinabs.layers.StatefulLayer):
            module.reset_states()
        elif isinstance(module, snntorch.Leaky) and module.init_hidden:
            module.reset_mem()


def history(model, x_seq, call=None):
    """The outputs, gradients and buffers of two calls in training and one in evaluation."""
    found = {}
    for number, training in enumerate((True, True, False)):
        torch.manual_seed(number)
        model.train(training)
        model.zero_grad()
        x = x_seq.clone().requires_grad_()
        out = model(x) if call is None else call(model, x)
        if out.requires_grad:  # not in evaluation of the authors' code
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(number))).sum().backward()
        found |= {f"output {number}": out.detach(), f"x.grad {number}": x.grad}
        found |= {f"{name}.grad {number}": value.grad for name, value in model.named_parameters()}
        found |= {f"{name} {number}": value.clone() for name, value in model.named_buffers() if "mem" not in name}
        if call is not None:
            reset(model)
    return found


def assert_alike(model, x_seq, pairs, backend, call=None):
    """The fused model gives the results of the model that is only converted, and so does the model that unfuse returns.

    The model itself differs from both as far as `convert` finds the width of a surrogate inexactly.
    """
    scattered(model)
    classes = [type(module) for module in model.modules()]
    fused, report = asgl_cuda.fuse(model)
    assert (len(report.replaced), report.left) == (pairs, []), report
    assert len([module for module in fused.modules() if isinstance(module, Normalised)]) == pairs
    on(fused, backend)
    expected = history(on(asgl_cuda.convert(model)[0], backend), x_seq, call)
    assert 0.02 < expected["output 1"].count_nonzero() / expected["output 1"].numel() < 0.98
    torch.testing.assert_close(history(fused, x_seq, call), expected, rtol=1e-9, atol=1e-11)
    original = {name: value for name, value in history(copy.deepcopy(model), x_seq, call).items() if value is not None}
    found = {name: expected[name] for name in original}
    torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert list(fused.state_dict()) == list(model.state_dict())
    back, report = asgl_cuda.unfuse(asgl_cuda.fuse(model)[0])
    assert (len(report.replaced), report.left) == (pairs, [])
    assert [type(module) for module in back.modules()] == classes
    back = on(asgl_cuda.convert(back)[0], backend)
    torch.testing.assert_close(history(back, x_seq, call), expected, rtol=1e-9, atol=1e-11)


def reasons(model):
    _, report = asgl_cuda.fuse(model)
    return {row.path: row.reason for row in report.left}
