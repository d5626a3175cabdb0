"""The leaky integrator: what backward keeps. The rest is asked of all features, in test_features.py."""

import pytest
import torch
from comparison import random_input

import asgl_cuda
from asgl_cuda.backends import BACKENDS
from asgl_cuda.reference.records import Numbers, Rules


@pytest.mark.parametrize(("learned", "wanted"), [("", ""), ("decay", "out"), ("input_gain", "x_seq")])
def test_only_what_a_gradient_needs_is_saved(backend, device, learned, wanted):
    """Keeps x only for a learned input_gain, the output only for a learned decay."""
    x_seq, saved = random_input(5, 64, device=device), []
    values = {name: torch.ones((), device=device, requires_grad=name == learned) for name in ("decay", "input_gain")}

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = asgl_cuda.leaky_integrator(x_seq, **values, backend=backend)
    found = {"out": out.data_ptr(), "x_seq": x_seq.data_ptr()}
    assert [each.data_ptr() for each in saved if each.numel() > 1] == ([found[wanted]] if wanted else [])


def test_the_operator_needs_what_a_gradient_needs(backend, device):
    x_seq, decay = random_input(5, 4, device=device).detach(), torch.ones((), device=device)
    rest = decay, None, [1.0] * len(Numbers._fields), [0] * len(Rules._fields), False, [True] * 4
    with pytest.raises(ValueError, match="the gradient of input_gain needs x_seq"):
        BACKENDS[backend].operators.integrator_backward(x_seq, None, None, x_seq, None, *rest)
