"""The layers that the authors of ASGL published: outputs, widths and noise before and after conversion."""

import authors_code
import pytest
import torch
from conversions import authors_layer

import asgl_cuda


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
