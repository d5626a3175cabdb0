"""A width given as its logarithm and a decay given as its logit: the values of learned.py, with the same bits."""

import pytest
import torch
from comparison import random_input, real_of, rng_state, uniform
from torch.utils._python_dispatch import TorchDispatchMode

import asgl_cuda
from asgl_cuda.reference.learned import BOUND, Logarithm, Logit
from asgl_cuda.selfcheck import EXACT_SURROGATES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_torchs_to_the_last_places(dtype):
    given = torch.linspace(-BOUND, BOUND, 20001, dtype=dtype)
    wide = given.double()
    for learned, exact in ((Logarithm, wide.exp()), (Logit, wide.sigmoid())):
        error = (learned(given).value().double() / exact - 1).abs().max()
        assert error < 2 * torch.finfo(dtype).eps
    assert Logarithm(torch.zeros(1, dtype=dtype)).value() == 1
    assert Logit(torch.zeros(1, dtype=dtype)).value() == 0.5


def test_the_bound_stops_no_gradient_and_nan_stays():
    for learned in (Logarithm, Logit):
        beyond = torch.tensor([-100.0, -BOUND, BOUND, 100.0, torch.nan], requires_grad=True)
        values = learned(beyond).value()
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[2], values[3])
        assert values[4].isnan()
        (grad,) = torch.autograd.grad(values[:4].sum(), beyond)
        assert (grad[:4] > 0).all()


class AnotherDevice(TorchDispatchMode):
    """Its functions differ by a last place where IEEE 754 requires no correct rounding."""

    FREE = ("atan", "erf", "exp", "exp2", "expm1", "ldexp", "log", "log1p", "log2", "pow", "rsqrt", "sigmoid", "tanh")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function.overloadpacket.__name__ not in self.FREE:
            return result
        self.calls += 1
        return torch.nextafter(result, torch.full_like(result, torch.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", [*EXACT_SURROGATES, "sigmoid"])
@pytest.mark.parametrize("options", [{"analog_prob": 0.5}, {"multi_spike": True, "v_reset": None}])
def test_promised_bits_of_the_reference_depend_on_no_device(dtype, surrogate, options):
    """Spikes, potentials, and the gradients of the input and v_init."""
    x_seq, v_init = random_input(9, 40, dtype=dtype), random_input(40, dtype=dtype)
    log_width, logit = (uniform(40, low=-4.0, high=4.0, dtype=dtype) for _ in range(2))

    def results():
        learned = {"width": Logarithm(log_width), "decay": Logit(logit), "surrogate": surrogate}
        given = {**learned, **options, "rng_state": rng_state() if "analog_prob" in options else None}
        out = asgl_cuda.lif(x_seq, v_init=v_init, **given, return_v_seq=True, backend="reference")
        return out.s_seq, out.v_seq, *torch.autograd.grad((out.s_seq + out.v_seq).sum(), (x_seq, v_init))

    expected = results()
    with AnotherDevice() as device:
        found = results()
    assert device.calls, "the derivatives of exp and sigmoid are the device's"
    same = all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert same == (surrogate in EXACT_SURROGATES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(), (1,), (6, 1), (6, 5), (2, 1, 1)])
def test_kernels_make_the_same_values(backend, device, dtype, sizes):
    """Every element is analog, so that each shows the width, and each potential shows the decay."""
    real = real_of(dtype)
    log_width, logit = (uniform(*sizes, low=-17.0, high=17.0, dtype=real, device=device) for _ in range(2))
    x_seq = random_input(20, 2, 6, 5, dtype=dtype, device=device)
    options = {"analog_prob": 1.0, "backend": backend, "return_h_seq": True}
    ours = asgl_cuda.lif(x_seq, width=Logarithm(log_width), decay=Logit(logit), **options)
    theirs = asgl_cuda.lif(x_seq, width=Logarithm(log_width).value(), decay=Logit(logit).value(), **options)
    assert torch.equal(ours.s_seq, theirs.s_seq)
    assert torch.equal(ours.h_seq, theirs.h_seq)
    grad = torch.randn(x_seq.shape, dtype=real, generator=torch.Generator().manual_seed(0)).to(x_seq)
    for our, their in zip(
        *(torch.autograd.grad(out.s_seq, (x_seq, log_width, logit), grad) for out in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1,), (5,)])
def test_kernels_of_recurrent_neurons_make_the_same_values(backend, device, dtype, sizes):
    real = real_of(dtype)
    log_width, logit = (uniform(*sizes, low=-17.0, high=17.0, dtype=real, device=device) for _ in range(2))
    x_seq, weight = random_input(9, 33, 5, dtype=dtype, device=device), random_input(5, 5, dtype=real, device=device)
    options = {"analog_prob": 0.5, "surrogate": "sigmoid", "backend": backend, "return_h_seq": True}

    def results(width, decay):
        rng_state = torch.tensor([1, 2], device=device)
        out = asgl_cuda.recurrent_lif(x_seq, weight, width=width, decay=decay, rng_state=rng_state, **options)
        grad = torch.linspace(-1, 1, x_seq.numel(), device=device).view(x_seq.shape).to(x_seq)
        return out.s_seq, out.h_seq, *torch.autograd.grad(out.s_seq, (x_seq, weight, log_width, logit), grad)

    ours = results(Logarithm(log_width), Logit(logit))
    theirs = results(Logarithm(log_width).value(), Logit(logit).value())
    for our, their in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(our, their)
    for our, their in zip(ours[3:], theirs[3:], strict=True):  # up to roundings of the derivatives
        torch.testing.assert_close(our, their)


def test_steps_are_refused(backend, device):
    x_seq, log = torch.randn(4, 3, device=device), torch.zeros(4, 1, device=device)
    for learned in ({"width": Logarithm(log)}, {"decay": Logit(log)}):
        with pytest.raises((ValueError, RuntimeError), match="tensors without time steps"):
            asgl_cuda.lif(x_seq, **learned, backend=backend)
