"""Recurrent neurons: sizes of tiles, the reference against a plain loop, and what is theirs alone."""

import pytest
import torch
from features import FACTORS, FEATURES, Case, assert_equals_reference
from torch.func import vmap

import asgl_cuda

SIZES = [(5, 1, 63), (17, 2, 65), (9, 33, 10), (3, 33, 130), (6, 16, 64), (2, 5, 1030), (2, 4113, 3)]  # [T, B, N]


def rand(*shape, low=-1.0, high=1.0, dtype=torch.float64, device="cpu"):
    return (torch.rand(shape, dtype=dtype) * (high - low) + low).to(device)


@pytest.mark.parametrize(("steps", "batch", "count"), SIZES)
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
def test_sizes(backend, device, dtype, steps, batch, count):
    """Around 16 rows of the batch, and vectors; and of more than 256 times 16 rows."""
    case = Case(dtype, steps, "triangle", sizes=(batch, count, 1, 1), noise=0.3, flags="scaled")
    assert_equals_reference(FEATURES["recurrent"], case, backend, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_output", [False, True])
def test_half_types_keep_what_was_emitted(backend, device, dtype, scale_output):
    """Gradients are those of a float32 input of the same values, rounded once."""
    torch.manual_seed(0)
    x_seq, weight = rand(9, 4, 20, dtype=dtype, device=device), rand(20, 20, dtype=torch.float32, device=device)
    rng_state = torch.tensor([3, 4], device=device)
    options = {"analog_prob": 0.5, "rng_state": rng_state, "scale_output": scale_output, "v_threshold": 0.5}
    found = {}
    for given in (dtype, torch.float32):
        leaves = [x_seq.detach().to(given).requires_grad_(), weight.detach().requires_grad_()]
        s_seq = asgl_cuda.recurrent_lif(*leaves, **options, backend=backend)
        assert s_seq.dtype == given
        grads = torch.autograd.grad(s_seq, leaves, torch.ones_like(s_seq))
        found[given] = [each.float() for each in (s_seq, *grads)]
    for half, single in zip(found[dtype], found[torch.float32], strict=True):
        rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-8
        torch.testing.assert_close(half, single, rtol=2 * rounding, atol=1e-6)


def plain_loop(x_seq, weight, bias, decay, syn_decay, width):
    """A recurrent layer as people write it."""
    s = i = v = torch.zeros_like(x_seq[0])
    s_seq = []
    for x in x_seq:
        i = syn_decay * i + x + s @ weight.T + bias
        h = decay * v + i
        smooth = ((h - 1) / width + 0.5).clamp(0, 1)
        s = smooth + ((h >= 1).to(h) - smooth).detach()
        v = h * (1 - s)
        s_seq.append(s)
    return torch.stack(s_seq)


def test_reference_is_a_plain_loop():
    torch.manual_seed(0)
    leaves = [
        rand(20, 5, 9, low=-0.5, high=1.5),
        rand(9, 9),
        rand(9),
        *(torch.tensor(each).double() for each in (0.8, 0.6, 1.5)),
    ]
    for each in leaves:
        each.requires_grad_()
    x_seq, weight, bias, decay, syn_decay, width = leaves
    expected = plain_loop(*leaves)
    actual = asgl_cuda.recurrent_lif(
        x_seq,
        weight,
        bias=bias,
        decay=decay,
        syn_decay=syn_decay,
        width=width,
        surrogate="rectangle",
        backend="reference",
    )
    assert torch.equal(actual, expected)
    grads = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(each, leaves, grads) for each in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def state_of_step(seed, offset, t):
    seed = (seed + 0x61C8864680B583EB * t) % 2**64
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed, offset])


def masks_of(seed, offset, backend, device, steps=24, batch=64, count=32):
    """What is analog, seen in what neurons without a weight emit."""
    x_seq, rng_state = (
        torch.full((steps, batch, count), 0.9, device=device),
        torch.tensor([seed, offset], device=device),
    )
    options = {"decay": 0.0, "width": 4.0, "analog_prob": 0.5, "rng_state": rng_state}
    s_seq = asgl_cuda.recurrent_lif(x_seq, torch.zeros(count, device=device), **options, backend=backend)
    assert 0.45 < (s_seq > 0).float().mean() < 0.55
    return (s_seq > 0).double()


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize("other", [(9, 1), (9, 2), (10, 0), (9, 2**31), (9 - 2**63, 0)])
def test_calls_of_near_states_share_no_noise(backend, device, by_reference, other):
    """At no lag; of 47 shares of 2,048 elements or more that agree, each is within five deviations of a half."""
    backend = "reference" if by_reference else backend
    one, two = masks_of(9, 0, backend, device), masks_of(*other, backend, device)
    for lag in range(-23, 24):
        earlier, later = (one[: 24 - lag], two[lag:]) if lag >= 0 else (one[-lag:], two[:lag])
        agree = (earlier == later).double()
        assert abs(agree.mean() - 0.5) < 5 * 0.5 / agree.numel() ** 0.5, f"lag {lag}"
        if lag:
            own = (one[: 24 - lag] == one[lag:]) if lag > 0 else (one[-lag:] == one[:lag])
            assert abs(own.double().mean() - 0.5) < 5 * 0.5 / own.numel() ** 0.5, f"own, lag {lag}"


@pytest.mark.parametrize("recurrent", ["dense", "elementwise"])
@pytest.mark.parametrize("by_reference", [False, True])
def test_steps_are_the_sequence(backend, device, recurrent, by_reference):
    """With states handed on, and the noise of step t by its own seed."""
    backend = "reference" if by_reference else backend
    torch.manual_seed(1)
    x_seq = rand(7, 3, 20, device=device)
    weight = rand(*((20, 20) if recurrent == "dense" else (20,)), device=device)
    options = {"syn_decay": 0.6, "analog_prob": 0.4, "backend": backend, "return_v_last": True}
    whole = asgl_cuda.recurrent_lif(x_seq, weight, rng_state=torch.tensor([5, 11], device=device), **options)
    state = {}
    for t, x in enumerate(x_seq):
        rng_state = state_of_step(5, 11, t).to(device)
        out = asgl_cuda.recurrent_lif(x[None], weight, rng_state=rng_state, **options, **state)
        state = {"v_init": out.v_last, "s_init": out.s_last, "i_init": out.i_last}
        assert torch.equal(out.s_seq[0], whole.s_seq[t])
        is_analog = asgl_cuda.analog_mask(x[None], 0.4, rng_state)[0]
        assert set(whole.s_seq[t][~is_analog].tolist()) <= {0.0, 1.0}
    for name in ("v_last", "s_last", "i_last"):
        assert torch.equal(getattr(out, name), getattr(whole, name))


@pytest.mark.parametrize("rate", [0.05, 0.9])
def test_bits_do_not_depend_on_threads_or_batch(rate):
    torch.manual_seed(2)
    x_seq = rand(7, 50, 70, high=2 * rate, low=-2 * (1 - rate), dtype=torch.float32).requires_grad_()
    weight = rand(70, 70, dtype=torch.float32).requires_grad_()
    grads = torch.randn(7, 50, 70)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            s_seq = asgl_cuda.recurrent_lif(x_seq, weight, width=4.0, backend="cpu", rng_state=torch.tensor([1, 2]))
            return s_seq, *torch.autograd.grad(s_seq, [x_seq, weight], grads)
        finally:
            torch.set_num_threads(before)

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)
    s_seq = asgl_cuda.recurrent_lif(x_seq, weight, width=4.0, backend="cpu")
    assert torch.equal(asgl_cuda.recurrent_lif(x_seq[:, 17:19], weight, width=4.0, backend="cpu"), s_seq[:, 17:19])


@pytest.mark.parametrize("value", [2.0, -2.0, -0.0, 2.0**-126, 2.0**-149, 2.0**120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_zeros_are_left_out(backend, device, dtype, value):
    """One state of each row is not zero, in each place of a vector and of what follows the last one."""
    count = 21
    s_init, x_seq = value * torch.eye(count, dtype=dtype), torch.zeros(2, count, count, dtype=dtype, device=device)
    weight = torch.linspace(-2, 2, count * count, dtype=dtype).view(count, count)
    found = []
    for name in (backend, "reference"):
        leaves = [each.detach().clone().to(device).requires_grad_() for each in (weight, s_init)]
        output = asgl_cuda.recurrent_lif(
            x_seq, leaves[0], s_init=leaves[1], v_threshold=1e300 if dtype == torch.float64 else 1e38, width=1e3,
            surrogate="fast_sigmoid", backend=name, return_h_seq=True,
        )  # fmt: skip
        grads = torch.autograd.grad((output.h_seq * x_seq.new_ones(count).cumsum(0)).sum(), leaves)
        found.append((output.h_seq, *grads))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("time_dim", [0, 1])
def test_bits_do_not_depend_on_the_product(time_dim):
    """Products are gathered or dense by the spikes of 16 neurons; here half of them are connected to none."""
    torch.manual_seed(6)
    count, half, grads = 40, slice(0, 8), torch.randn(9, 40, 40)
    x_seq = rand(9, 40, count, low=-2.0, high=1.2, dtype=torch.float32)
    weight = torch.zeros(count, count)
    weight[half, half] = rand(8, 8, dtype=torch.float32)
    found = []
    for others in (-100.0, 100.0):  # which never spike, and always
        x_seq[..., 8:] = others
        leaves = [x_seq.clone().requires_grad_(), weight.clone().requires_grad_()]
        s_seq = asgl_cuda.recurrent_lif(*leaves, time_dim=time_dim, width=3.0, backend="cpu")
        dx, dw = torch.autograd.grad(s_seq, leaves, grads)
        found.append((s_seq[..., half], dx[..., half], dw[half, half]))
    assert 0.05 < found[0][0].mean() < 0.25
    for gathered, dense in zip(*found, strict=True):
        assert torch.equal(gathered, dense)


@pytest.mark.parametrize("detach_recurrent", [False, True])
def test_exported_and_trained(backend, device, detach_recurrent):
    """Gradients of an exported program are those of the layer."""
    layer = asgl_cuda.RecurrentLIF(
        6, syn_decay=0.5, learn_syn_decay=True, detach_recurrent=detach_recurrent, analog_prob=0.0, backend=backend
    ).to(device)
    x_seq = torch.randn(5, 3, 6, device=device)
    exported = torch.export.export(layer, (x_seq,)).module()
    modules = layer, exported  # which share their parameters
    found = [torch.autograd.grad(each(x_seq).square().sum(), list(layer.parameters())) for each in modules]
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_noise_under_vmap(backend, device, randomness):
    x_seq = rand(4, 30, 8, device=device).expand(2, 4, 30, 8)
    weight = rand(8, 8, device=device)

    def spikes(x_seq):
        return asgl_cuda.recurrent_lif(x_seq, weight, analog_prob=0.5, backend=backend)

    one, two = vmap(spikes, randomness=randomness)(x_seq)
    assert torch.equal(one, two) == (randomness == "same")


def test_autocast(backend, device):
    """Products stay in float32."""
    x_seq, weight = torch.randn(6, 4, 20, device=device), torch.randn(20, 20, device=device, requires_grad=True)
    for name in (backend, "reference"):
        expected = asgl_cuda.recurrent_lif(x_seq, weight, width=3.0, backend=name)
        with torch.autocast(device.type, torch.bfloat16):
            actual = asgl_cuda.recurrent_lif(x_seq, weight, width=3.0, backend=name)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(each.sum(), weight)[0] for each in (expected, actual)]
        assert torch.equal(*grads)
