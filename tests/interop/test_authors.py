"""The layers that the authors of ASGL published: outputs, widths and noise before and after conversion."""

import authors_code
import pytest
import torch
from conversions import authors_layer, close

import asgl_cuda


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("kind", [authors_code.InvRectangle, authors_code.InvSigmoid])
@pytest.mark.parametrize("vreset", [None, 0.1])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_outputs_and_gradients(p, vreset, kind, granularity):
    """All elements are hard or all are smooth, since the libraries draw different noise."""
    spike = authors_code.EfficientNoisySpikeII(kind(2.0, granularity=granularity), p=p)
    layer = authors_code.LIFLayer(4, spike_fn=spike, decay=0.6, thresh=0.7, vreset=vreset)
    torch.manual_seed(0)
    x_seq, grad = torch.randn(2, 4, 3, 2, 5, 5)
    layer(torch.zeros_like(x_seq))  # makes the widths
    converted, report = asgl_cuda.convert(layer)
    assert len(report.replaced) == 1
    results = []
    for each in (layer, converted):
        leaf = x_seq.clone().requires_grad_()
        out = each(leaf)
        results.append((out, each.vmem, torch.autograd.grad((out * grad).sum(), [leaf, *each.parameters()])))
    (theirs, their_v, their_grads), (ours, our_v, our_grads) = results
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_v, their_v)
    assert len(our_grads) == 3
    for our, their in zip(our_grads, their_grads, strict=True):
        assert their.abs().max() > 0
        assert close(our, their)


@pytest.mark.parametrize("learnable", [False, True])
def test_before_the_widths_are_made(learnable):
    """The first call of either layer makes the parameter, with the authors' shape and name."""
    spike = authors_code.EfficientNoisySpikeII(authors_code.InvSigmoid(2.0, learnable, "channel"), p=0.0)
    layer = authors_code.LIFLayer(3, spike_fn=spike)
    converted, _ = asgl_cuda.convert(layer)
    x_seq = torch.randn(5, 2, 6, 3, 3)
    torch.testing.assert_close(converted(x_seq), layer(x_seq))
    shapes = ({name: value.shape for name, value in each.named_parameters()} for each in (converted, layer))
    assert next(shapes) == next(shapes)
    assert torch.as_tensor(converted.width).mean().item() == pytest.approx(0.5)


def test_noise_and_share():
    layer = authors_layer(1, p=0.3, surrogate=authors_code.InvRectangle, thresh=1.0)
    converted, _ = asgl_cuda.convert(layer)
    x_seq = torch.full((1, 20000), 1.25)  # analog elements are 3/4, spikes are 1
    assert abs((converted(x_seq) == 0.75).float().mean() - 0.3) < 0.02
    assert converted.analog_prob == 0.3
    converted.analog_prob = 0.1  # as a schedule sets it
    assert converted.cell.spike_fn.p == 0.1
    assert abs((converted(x_seq) == 0.75).float().mean() - 0.1) < 0.02
    assert (converted.eval()(x_seq) == 1).all()
    back, report = asgl_cuda.revert(converted)
    assert type(back) is authors_code.LIFLayer
    assert back.cell.spike_fn.p == 0.1
    assert not report.left
