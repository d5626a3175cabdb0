"""Recurrent neurons: every fused backend against the reference, and the reference against a plain loop.

Sums of a product have another order in each backend. In float32 a difference in the last place can become a spike, so
that outputs are compared in float64, or with weights that are multiples of 1/64, whose sums are exact.
"""

import copy
import random

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

import asgl_cuda
from asgl_cuda.selfcheck import EXACT_SURROGATES
from asgl_cuda.surrogate import SURROGATES

NAMES = ("s_seq", "v_last", "s_last", "i_last", "v_seq", "h_seq")
SIZES = [(1, 1, 1), (2, 3, 5), (5, 1, 63), (17, 2, 65), (9, 33, 10), (3, 33, 130), (6, 16, 64), (2, 5, 1030)]


def rand(*shape, low=-1.0, high=1.0, dtype=torch.float64, device="cpu"):
    return (torch.rand(shape, dtype=dtype) * (high - low) + low).to(device)


def case(seed, size=None, dtype=torch.float64, device="cpu"):
    """The arguments of a random call, tensors as leaves."""
    draw = random.Random(seed)
    pick = draw.choice
    torch.manual_seed(seed)
    steps, batch, count = size or pick(SIZES)
    time_dim = pick((0, 1))
    shape = (batch, steps, count) if time_dim else (steps, batch, count)
    each = {"dtype": dtype, "device": device}
    given = {"x_seq": rand(*shape, low=-0.5, high=1.5, **each), "time_dim": time_dim}
    given["weight"] = rand(*pick(((count, count), (count,))), **each) / count**0.5
    given["bias"] = pick((None, rand(count, **each)))
    given["syn_decay"] = pick((None, 0.7, rand(low=0.2, high=0.9, **each), rand(count, low=0.2, high=0.9, **each)))
    given["decay"] = pick((0.6, rand(1, 1, count, low=0.2, high=0.9, **each)))
    given["width"] = pick((1.3, rand(low=0.5, high=2, **each), rand(count, low=0.5, high=2, **each)))
    given["v_threshold"] = pick((0.8, rand(count, low=0.5, high=1, **each)))
    if pick((True, False)):
        given["v_reset"] = pick((0.0, 0.1, rand(count, low=-0.2, high=0.2, **each)))
    else:
        given |= {"v_reset": None, "reset_amount": pick((None, 0.9, rand(count, low=0.5, high=1, **each)))}
    given["input_gain"] = pick((1.0, 0.5))
    given["v_rest"] = pick((0.0, -0.1))
    given["surrogate"] = pick(list(SURROGATES))
    given["analog_prob"] = pick((0.0, 0.3, 1.0))
    given["rng_state"] = torch.tensor([draw.getrandbits(62), draw.getrandbits(62)], device=device)
    for flag in ("detach_recurrent", "detach_reset", "scale_output", "strict_threshold"):
        given[flag] = pick((False, False, True))
    states = ["v_init", "s_init"] + ["i_init"] * (given["syn_decay"] is not None)
    given |= {name: rand(batch, count, **each) for name in states if pick((True, False))}
    names = [name for name in given if isinstance(given[name], torch.Tensor) and name != "rng_state"]
    return given, {name: given[name].requires_grad_() for name in names}


def outputs_of(given, backend, asked=NAMES):
    last = any(name.endswith("last") for name in asked)
    wanted = {"return_v_last": last, "return_v_seq": "v_seq" in asked, "return_h_seq": "h_seq" in asked}
    output = asgl_cuda.recurrent_lif(**given, **wanted, backend=backend)
    found = {"s_seq": output} if isinstance(output, torch.Tensor) else output._asdict()
    return {name: found[name] for name in asked if found[name] is not None}


def assert_equals_reference(given, leaves, backend, asked=NAMES, tolerance=1e-10):
    expected, actual = (outputs_of(given, name, asked) for name in ("reference", backend))
    assert actual.keys() == expected.keys()
    for name, each in expected.items():
        assert actual[name].dtype == each.dtype
        torch.testing.assert_close(actual[name], each, rtol=tolerance, atol=tolerance, msg=name)
    grads = [torch.randn_like(each) for each in expected.values()]
    theirs, ours = (
        torch.autograd.grad(list(each.values()), list(leaves.values()), grads, allow_unused=True)
        for each in (expected, actual)
    )
    for name, our, their in zip(leaves, ours, theirs, strict=True):
        their = torch.zeros_like(leaves[name]) if their is None else their
        our = torch.zeros_like(leaves[name]) if our is None else our
        # A sum of up to 561 terms rounds by their size.
        size = 1 + their.abs().max() if their.numel() else 1.0
        torch.testing.assert_close(our / size, their / size, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("seed", range(48))
def test_equals_reference(backend, device, seed):
    given, leaves = case(seed, device=device)
    asked = random.Random(seed).choice([NAMES, NAMES, ("s_seq",), ("s_seq", "v_last", "s_last", "i_last")])
    assert_equals_reference(given, leaves, backend, asked)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("surrogate", EXACT_SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bits_where_sums_are_exact(backend, device, dtype, surrogate, size):
    *_, count = size
    x_seq = rand(*size, low=-0.5, high=1.5, dtype=dtype, device=device)
    weight = (rand(count, count, dtype=torch.float32, device=device) * 64).round() / 64
    given = {"x_seq": x_seq, "weight": weight, "decay": 0.75, "syn_decay": 0.5, "surrogate": surrogate}
    expected, actual = (outputs_of(given, name) for name in ("reference", backend))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert 0.02 < expected["s_seq"].float().mean() < 0.98 or x_seq.numel() < 50


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


@pytest.mark.parametrize("seed", range(12))
def test_gradcheck(backend, device, seed):
    """On the smooth function, where every element is analog."""
    given, _ = case(seed, (3, 2, 4), device=device)
    given |= {"analog_prob": 1.0, "detach_recurrent": False, "detach_reset": False, "surrogate": "sigmoid"}
    leaves = {
        name: each.detach()
        for name, each in given.items()
        if isinstance(each, torch.Tensor) and each.is_floating_point()
    }

    def function(*values):
        return tuple(outputs_of({**given, **dict(zip(leaves, values, strict=True))}, backend).values())

    assert torch.autograd.gradcheck(function, [each.requires_grad_() for each in leaves.values()])


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
        x_seq, weight, bias=bias, decay=decay, syn_decay=syn_decay, width=width, backend="reference"
    )
    assert torch.equal(actual, expected)
    grads = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(each, leaves, grads) for each in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("recurrent", ["dense", "elementwise"])
@pytest.mark.parametrize("by_reference", [False, True])
def test_steps_are_the_sequence(backend, device, recurrent, by_reference):
    """With states handed on, and the noise of step t at offset + t."""
    backend = "reference" if by_reference else backend
    torch.manual_seed(1)
    x_seq = rand(7, 3, 20, device=device)
    weight = rand(*((20, 20) if recurrent == "dense" else (20,)), device=device)
    options = {"syn_decay": 0.6, "analog_prob": 0.4, "backend": backend, "return_v_last": True}
    whole = asgl_cuda.recurrent_lif(x_seq, weight, rng_state=torch.tensor([5, 11], device=device), **options)
    state = {}
    for t, x in enumerate(x_seq):
        rng_state = torch.tensor([5, 11 + t], device=device)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x_seq", "weight", "s_init", "grads"])
def test_not_finite(backend, device, where, value):
    """A value that is not finite reaches what it reaches in PyTorch: neurons that did not spike do not hide it."""
    torch.manual_seed(3)
    given = {
        name: rand(*shape, device=device)
        for name, shape in (("x_seq", (4, 3, 20)), ("weight", (20, 20)), ("s_init", (3, 20)))
    }
    grads = torch.randn(4, 3, 20, dtype=torch.float64, device=device)
    (grads if where == "grads" else given[where]).view(-1)[7] = value
    leaves = [each.requires_grad_() for each in given.values()]
    outputs = [asgl_cuda.recurrent_lif(**given, surrogate="sigmoid", backend=name) for name in ("reference", backend)]
    assert torch.equal(*(each.isnan() for each in outputs))
    expected, actual = (torch.autograd.grad(each, leaves, grads) for each in outputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_empty_batch(backend, device):
    x_seq = torch.empty(4, 0, 6, device=device, requires_grad=True)
    weight = torch.rand(6, 6, device=device, requires_grad=True)
    s_seq = asgl_cuda.recurrent_lif(x_seq, weight, syn_decay=0.5, backend=backend)
    assert s_seq.shape == x_seq.shape
    s_seq.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(6, 6, device=device))


def test_layouts(backend, device):
    """Any layout is that of a contiguous copy."""
    torch.manual_seed(4)
    x_seq, weight = rand(6, 5, 8, device=device).transpose(0, 1), rand(16, 16, device=device)[::2, ::2]
    grads = rand(8, 6, 5, device=device).permute(2, 1, 0)
    found = []
    for given in ((x_seq, weight, grads), tuple(each.contiguous() for each in (x_seq, weight, grads))):
        leaves = [each.detach().requires_grad_() for each in given[:2]]
        s_seq = asgl_cuda.recurrent_lif(*leaves, backend=backend)
        found.append((s_seq, *torch.autograd.grad(s_seq, leaves, given[2].transpose(0, 1).transpose(0, 1))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_frozen_weight(backend, device):
    x_seq = rand(3, 2, 6, device=device).requires_grad_()
    weight = rand(6, 6, device=device)
    frozen = asgl_cuda.recurrent_lif(x_seq, weight, backend=backend).sum()
    (expected,) = torch.autograd.grad(frozen, x_seq)
    learned = asgl_cuda.recurrent_lif(x_seq, weight.requires_grad_(), backend=backend).sum()
    assert torch.equal(torch.autograd.grad(learned, x_seq)[0], expected)


def test_kept_bytes():
    """4 bytes an element beside the spikes."""
    x_seq, weight = torch.randn(50, 32, 64, requires_grad=True), torch.randn(64, 64)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        s_seq = asgl_cuda.recurrent_lif(x_seq, weight, syn_decay=0.5, analog_prob=0.2)
    small = weight.nbytes + 6 * 64 * 4 + 16
    assert s_seq.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) <= 2 * x_seq.nbytes + small


WRONG = {
    "four dimensions": ({"x_seq": torch.zeros(2, 3, 4, 4)}, "x_seq must have shape [T, B, N]"),
    "time last": ({"time_dim": 2}, "got [5, 3, 4] with time_dim=2"),
    "weight of another size": ({"weight": torch.zeros(4, 3)}, "weight must have shape [4, 4] or [4], got [4, 3]"),
    "integer weight": (
        {"weight": torch.zeros(4, 4, dtype=torch.int64)},
        "weight must be of a floating type, got torch.int64",
    ),
    "bias of another size": ({"bias": torch.zeros(3)}, "bias must have shape [4], got [3]"),
    "width by step": ({"width": torch.ones(5, 1, 1)}, "width must have one value or shape [4], got [5, 1, 1]"),
    "width by sample": ({"width": torch.ones(3, 1)}, "width must have one value or shape [4], got [3, 1]"),
    "width by step and neuron": (
        {"width": torch.ones(5, 1, 4)},
        "width must have one value or shape [4], got [5, 1, 4]",
    ),
    "current without a synapse": ({"i_init": torch.zeros(3, 4)}, "i_init needs syn_decay"),
    "state of another shape": ({"s_init": torch.zeros(4)}, "s_init must have shape [3, 4], got [4]"),
    "synapse by step": (
        {"syn_decay": torch.ones(5, 1, 1)},
        "syn_decay must have one value or shape [4], got [5, 1, 1]",
    ),
    "synapse of integers": (
        {"syn_decay": torch.ones(4, dtype=torch.int64)},
        "syn_decay must be of a floating type, got torch.int64",
    ),
    "synapse that is no number": ({"syn_decay": float("nan")}, "syn_decay must be a number, got nan"),
    "reset by sample": ({"v_reset": torch.zeros(3, 1)}, "v_reset must have one value or shape [4], got [3, 1]"),
    "width that is no number": ({"width": "wide"}, "width must be"),
    "width of integers": ({"width": torch.ones(4, dtype=torch.int64)}, "width must be of a floating type"),
    "levels": ({"levels": 4}, "recurrent neurons have no levels"),
    "residual": ({"residual": torch.zeros(5, 3, 4)}, "recurrent neurons have no residual"),
    "floor": ({"v_min": 0.0}, "recurrent neurons have no v_min"),
    "typing error": ({"sydecay": 0.5}, "sydecay"),
    "gain": ({"input_gain": float("nan")}, "input_gain must be"),
    "surrogate": ({"surrogate": "box"}, "surrogate must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    change, words = WRONG[name]
    given = {"x_seq": torch.zeros(5, 3, 4), "weight": torch.zeros(4, 4)} | change
    with pytest.raises((TypeError, ValueError)) as raised:
        asgl_cuda.recurrent_lif(**given)
    assert words in str(raised.value)
    assert "asgl_cuda.recurrent_lif" in str(raised.value)


def test_compiled(backend, device):
    def loss(x_seq, weight, syn_decay):
        out = asgl_cuda.recurrent_lif(x_seq, weight, syn_decay=syn_decay, return_v_last=True, backend=backend)
        return (out.s_seq * 0.5).sum() + out.i_last.sum()

    leaves = [rand(5, 3, 8, device=device), rand(8, 8, device=device), rand(8, low=0.3, high=0.9, device=device)]
    for each in leaves:
        each.requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, actual = (torch.autograd.grad(each(*leaves), leaves) for each in (loss, compiled))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


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


def test_transforms(backend, device):
    """Vmap over weights, grad inside, and an ensemble of layers, are loops."""
    x_seq, weights = rand(4, 3, 6, device=device), rand(5, 6, 6, device=device)

    def loss(weight):
        return asgl_cuda.recurrent_lif(x_seq, weight, width=2.0, backend=backend).sum()

    expected = torch.stack([grad(loss)(each) for each in weights])
    assert torch.equal(vmap(grad(loss))(weights), expected)
    layers = [asgl_cuda.RecurrentLIF(6, backend=backend, device=device, dtype=torch.float64) for _ in range(3)]
    states = stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0])
    found = vmap(lambda *state: functional_call(skeleton, state, (x_seq,)), randomness="different")(*states)
    assert found.shape == (3, *x_seq.shape)
    skeleton.eval()
    found = vmap(lambda *state: functional_call(skeleton, state, (x_seq,)))(*states)
    for ours, layer in zip(found, layers, strict=True):
        assert torch.equal(ours, layer.eval()(x_seq))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_noise_under_vmap(backend, device, randomness):
    x_seq = rand(4, 30, 8, device=device).expand(2, 4, 30, 8)
    weight = rand(8, 8, device=device)

    def spikes(x_seq):
        return asgl_cuda.recurrent_lif(x_seq, weight, analog_prob=0.5, backend=backend)

    one, two = vmap(spikes, randomness=randomness)(x_seq)
    assert torch.equal(one, two) == (randomness == "same")


def test_second_derivative_is_refused():
    x_seq, weight = rand(3, 2, 4).requires_grad_(), rand(4, 4).requires_grad_()
    s_seq = asgl_cuda.recurrent_lif(x_seq, weight, surrogate="sigmoid", backend="cpu")
    (first,) = torch.autograd.grad(s_seq.sum(), x_seq, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), x_seq)


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
