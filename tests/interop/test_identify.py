"""Surrogates found in functions."""

import re

import pytest
import torch

import asgl_cuda
from asgl_cuda.interop.identify import identify_spike_function


def spiking(smooth, fires):
    """A spike function with this smooth value and these spikes."""

    def function(u):
        return smooth(u) + (fires(u).to(u) - smooth(u)).detach()

    return function


@pytest.mark.parametrize(("width", "gain"), [(1e-3, 1.0), (0.3, 30.0), (1.0, 0.1), (7.0, 1.0), (200.0, 30.0)])
@pytest.mark.parametrize("name", asgl_cuda.reference.surrogates.SURROGATES)
def test_surrogates_are_identified(name, width, gain):
    cumulative = asgl_cuda.reference.surrogates.SURROGATES[name].cumulative
    found = identify_spike_function(spiking(lambda u: cumulative(u / width) * gain, lambda u: u > 0))
    assert (found.surrogate, found.strict) == (name, True)
    assert (found.width, found.gain) == pytest.approx((width, gain), rel=1e-6)


def test_a_lopsided_surrogate_is_none_of_ours():
    function = spiking(lambda u: torch.sigmoid(torch.where(u < 0, u, 1.001 * u)), lambda u: u >= 0)
    assert re.fullmatch("its surrogate, .*, is not one that asgl_cuda has", identify_spike_function(function))
