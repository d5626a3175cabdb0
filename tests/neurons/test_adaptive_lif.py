"""Adaptive neurons: what is theirs alone. The rest is asked of all features, in test_features.py."""

import pytest
import torch
from comparison import random_input

import asgl_cuda
from asgl_cuda.backends import BACKENDS
from asgl_cuda.reference.records import IN_CURRENT, IN_RESET, Numbers, Rules
from asgl_cuda.reference.surrogates import INTEGER


def test_without_adaptation_it_is_lif(backend, device):
    x_seq = random_input(18, 5, 36, device=device)
    expected = asgl_cuda.lif(x_seq, v_rest=0.1, backend=backend)
    for to_threshold in (False, True):
        actual = asgl_cuda.adaptive_lif(x_seq, adapt_decay=0.9, v_rest=0.1, to_threshold=to_threshold, backend=backend)
        assert torch.equal(actual, expected)


def test_w_init_alone_begins_at_rest(backend, device):
    x_seq, w_init = random_input(5, 3, 4, device=device), torch.rand(3, 4, device=device)
    options = {"adapt_decay": 0.9, "v_rest": 0.3, "return_h_seq": True, "w_init": w_init, "backend": backend}
    v_init = torch.full_like(w_init, 0.3)
    outputs = (asgl_cuda.adaptive_lif(x_seq, v_init=each, **options).h_seq for each in (None, v_init))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("amount", "v_last"), [(None, 1.5), (1.0, 2.0)])
def test_w_is_in_the_reset_of_the_threshold_alone(backend, device, amount, v_last):
    x_seq, w_init = torch.full((1, 3), 3.0, device=device), torch.full((3,), 0.5, device=device)
    options = {"adapt_decay": 0.9, "to_threshold": True, "v_reset": None, "return_v_last": True, "backend": backend}
    output = asgl_cuda.adaptive_lif(x_seq, w_init=w_init, reset_amount=amount, **options)
    assert (output.v_last == v_last).all()


@pytest.mark.parametrize("name", [each for each in ("cpu", "cuda") if each in asgl_cuda.available_backends()])
def test_operators_refuse_what_no_kernel_computes(name):
    x_seq = torch.randn(3, 4, device="cuda" if name == "cuda" else "cpu")
    numbers = Numbers(1.0, 0.5, 1.0, 0.0, 0.9, 0.0, 0.1, residual_gain=1.0, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    plain = Rules(*[0] * 12, adaptation=IN_CURRENT, time_dim=0, trailing=0)
    for rules, residual, message in (
        (plain._replace(surrogate=INTEGER, levels=4), None, "adaptive neurons have no integer spikes"),
        (plain, x_seq, "adaptive neurons have no residual"),
        (plain._replace(adaptation=3), None, "no adaptation has the number 3"),
        (plain._replace(adaptation=IN_RESET, hard_reset=1), None, "no adaptation has the number 4 with a hard reset"),
    ):
        with pytest.raises(ValueError, match=message):
            BACKENDS[name].operators.lif_forward(x_seq, *[None] * 9, residual, numbers, rules, [False] * 4)
