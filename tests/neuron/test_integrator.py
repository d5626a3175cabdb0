"""The leaky integrator: every fused backend has the bits of the reference, except in the gradients of parameters."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from comparison import real_of, uniform
from test_layouts import LAYOUTS, laid_out
from torch.func import grad, vmap

import asgl_cuda
from asgl_cuda.reference import Numbers, Rules

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAST_PLACE = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-5, torch.float64: 1e-12}
SHAPE = (19, 6, 8, 3, 5)
delays = pytest.mark.parametrize("delay", [False, True])


def outputs_of(x_seq, backend, names, **options):
    """The outputs of these names."""
    out = asgl_cuda.leaky_integrator(x_seq, **options, return_v_last="v_last" in names, backend=backend)
    found = {"v_seq": out} if isinstance(out, torch.Tensor) else out._asdict()
    return [found[name] for name in names]


def assert_equals_reference(x_seq, backend, names=("v_seq", "v_last"), **options):
    """Parameter gradients are sums in another order; in half types decay's sum is over rounded potentials.

    Roundings scale with the potential, but terms with the distance from v_rest: hence the factor 4.
    """
    leaves = {name: each for name, each in options.items() if isinstance(each, torch.Tensor)}
    # Expanded parameters expose the terms of the reference's gradients.
    terms = {name: each if name == "v_init" else each.expand(x_seq.shape) for name, each in leaves.items()}
    expected = outputs_of(x_seq, "reference", names, **{**options, **terms})
    actual = outputs_of(x_seq, backend, names, **options)
    grads = [torch.randn_like(each) for each in expected]
    expected_grads = torch.autograd.grad(expected, [x_seq, *terms.values()], grads, allow_unused=True)
    actual_grads = torch.autograd.grad(actual, [x_seq, *leaves.values()], grads, allow_unused=True)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    for name, ours, theirs in zip(["x_seq", *leaves], actual_grads, expected_grads, strict=True):
        if name in ("x_seq", "v_init"):
            assert torch.equal(ours, theirs), name
            continue
        total, size = (each.double().sum_to_size(leaves[name].shape) for each in (theirs, theirs.square()))
        allowed = 4 * LAST_PLACE[x_seq.dtype] if name == "decay" else LAST_PLACE[real_of(x_seq.dtype)]
        assert ((ours - total).abs() <= allowed * torch.maximum(total.abs(), size.sqrt()) + 1e-30).all(), name


def arguments(x_seq, *shape, time_dim=0):
    """A v_init, and a decay and a gain of this shape."""
    real, device = real_of(x_seq.dtype), x_seq.device
    state = [size for dim, size in enumerate(x_seq.shape) if dim != time_dim % x_seq.dim()]
    return {
        "v_init": uniform(*state, low=-1, high=1, dtype=real, device=device),
        "decay": uniform(*shape, low=0.3, high=0.95, dtype=real, device=device),
        "input_gain": uniform(*shape, low=-1.5, high=1.5, dtype=real, device=device),
        "v_rest": 0.3,
        "time_dim": time_dim,
    }


def inputs(*shape, dtype=torch.float32, device="cpu"):
    return uniform(*shape, low=-1, high=2, dtype=dtype, device=device)


@delays
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 16, 17, 33])
@pytest.mark.parametrize("neurons", [1, 7, 31, 257, 4096])
def test_sizes(backend, device, steps, neurons, delay):
    x_seq = inputs(steps, neurons, device=device)
    if steps > delay:  # else the output is v_init
        assert_equals_reference(x_seq, backend, ["v_seq"], decay=0.7, input_gain=0.3, delay=delay)
    assert_equals_reference(x_seq, backend, **arguments(x_seq), delay=delay)


@delays
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", [["v_seq"], ["v_last"], ["v_seq", "v_last"]])
@pytest.mark.parametrize("learned", [[], ["decay"], ["input_gain"], ["decay", "input_gain"]])
@pytest.mark.parametrize("steps", [3, 18])
def test_each_gradient_alone(backend, device, dtype, asked, learned, steps, delay):
    x_seq = inputs(steps, 5, 36, dtype=dtype, device=device)
    given = arguments(x_seq, 36)
    options = {name: given[name] for name in ("v_init", "v_rest", *learned)}
    assert_equals_reference(x_seq, backend, asked, delay=delay, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["time first", "batch first", "channels last"])
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (8, 1, 1), (8, 3, 5), (5,), (8, 1, 5), (6, 1, 1, 1), (19, 1, 1, 1, 1), (19, 1, 8, 1, 1), SHAPE],
)
def test_shapes_of_parameters(backend, device, dtype, layout, shape):
    x_seq, time_dim = laid_out(layout, inputs(*SHAPE, dtype=dtype, device=device))
    shape = (*shape[1::-1], *shape[2:]) if len(shape) == 5 and time_dim == 1 else shape
    if len(shape) == 4 and time_dim == 1:
        shape = (6, 1, 1, 1, 1)
    assert_equals_reference(x_seq.requires_grad_(), backend, **arguments(x_seq, *shape, time_dim=time_dim))


@delays
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout, delay):
    for dtype in (torch.float32, torch.bfloat16):
        x_seq, time_dim = laid_out(layout, inputs(18, 3, 5, 4, 8, dtype=dtype, device=device))
        assert_equals_reference(x_seq.requires_grad_(), backend, **arguments(x_seq, time_dim=time_dim), delay=delay)


@pytest.mark.parametrize("mixed", [("channels last", "time first"), ("time first", "channels last")])
def test_gradient_of_another_layout(backend, device, mixed):
    (x_seq, _), (grads, _) = (laid_out(each, inputs(6, 3, 5, 4, 8, device=device)) for each in mixed)
    results = []
    for name in (backend, "reference"):
        leaves = [x_seq.detach().requires_grad_(), torch.full((5, 1, 1), 0.7, device=device, requires_grad=True)]
        out = asgl_cuda.leaky_integrator(*leaves, input_gain=leaves[1], backend=name)
        results.append(torch.autograd.grad(out, leaves, grads))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@delays
@pytest.mark.parametrize("shapes", [((), ()), ((4,), (3, 1)), ((5, 1, 1), (5, 3, 4))])
def test_gradcheck(backend, device, delay, shapes):
    def function(name, x_seq, v_init, decay, input_gain):
        out = asgl_cuda.leaky_integrator(
            x_seq, decay, input_gain=input_gain, v_init=v_init, v_rest=0.3, delay=delay, return_v_last=True,
            backend=name,
        )  # fmt: skip
        return tuple(out)

    x_seq = inputs(5, 3, 4, dtype=torch.float64, device=device)
    given = arguments(x_seq)
    decay, input_gain = (uniform(*shape, low=0.2, high=0.9, dtype=torch.float64, device=device) for shape in shapes)
    for name in (backend, "reference"):
        assert torch.autograd.gradcheck(
            partial(function, name), (x_seq, given["v_init"], decay, input_gain), fast_mode=True
        )


@delays
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_as_good_as_pytorch(backend, device, dtype, delay):
    """Against float32 throughout, the error is at most twice the error of a plain loop in the half type."""
    x_seq, weights = inputs(8, 4096, dtype=dtype, device=device), torch.randn(8, 4096).to(device, dtype)

    def loop(x, decay):
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            before, v = v, decay * v + x[t]
            out.append(before if delay else v)
        return torch.stack(out)

    def results(function, x, real):
        decay = torch.full((4096,), 0.8, dtype=real, device=device, requires_grad=True)
        x = x.detach().requires_grad_()
        out = function(x, decay)
        return [each.float() for each in (out, *torch.autograd.grad(out, (x, decay), weights.to(out.dtype)))]

    ours = results(
        lambda x, decay: asgl_cuda.leaky_integrator(x, decay, delay=delay, backend=backend), x_seq, torch.float32
    )
    for our, plain, exact in zip(
        ours, results(loop, x_seq, dtype), results(loop, x_seq.float(), torch.float32), strict=True
    ):
        assert (our - exact).abs().mean() <= 2 * (plain - exact).abs().mean() + 1e-6


@delays
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_go_through(backend, device, value, delay):
    for step in (0, 2, 5):
        x_seq = inputs(6, 24, device=device)
        with torch.no_grad():
            x_seq[step, ::3] = value
        results = []
        for name in (backend, "reference"):
            decay = torch.full((24,), 0.6, device=device, requires_grad=True)
            out = asgl_cuda.leaky_integrator(x_seq, decay, delay=delay, return_v_last=True, backend=name)
            results.append(
                (*out, *torch.autograd.grad(list(out), (x_seq, decay), [torch.ones_like(each) for each in out]))
            )
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_only_what_a_gradient_needs_is_saved(backend, device):
    """Keeps x only for a learned input_gain, the output only for a learned decay."""
    x_seq = inputs(5, 64, device=device)
    ones = torch.ones((), device=device)
    for decay, input_gain, wanted in ((0.5, 1.0, ""), (ones, ones, ""), (ones.clone().requires_grad_(), 1.0, "out"),
                                      (0.5, ones.clone().requires_grad_(), "x_seq")):  # fmt: skip
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = asgl_cuda.leaky_integrator(x_seq, decay, input_gain=input_gain, backend=backend)
        found = {"out": out.data_ptr(), "x_seq": x_seq.data_ptr()}
        assert [each.data_ptr() for each in saved if each.numel() > 1] == ([found[wanted]] if wanted else [])


@pytest.mark.parametrize("shape", [(3, 0), (3, 0, 4)])
def test_no_neurons(backend, device, shape):
    x_seq = inputs(*shape, device=device)
    decay = torch.full((), 0.5, device=device, requires_grad=True)
    out = asgl_cuda.leaky_integrator(x_seq, decay, return_v_last=True, backend=backend)
    assert (out.v_seq.shape, out.v_last.shape) == (shape, shape[1:])
    assert torch.autograd.grad(out.v_seq.sum(), decay)[0] == 0


def test_same_tensor_twice(backend, device):
    value = torch.full((7,), 0.6, device=device, requires_grad=True)
    x_seq = inputs(4, 7, device=device)
    function = asgl_cuda.leaky_integrator
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(each(x_seq, value, input_gain=value, backend=name).sum(), value)[0]
        for each, name in ((compiled, backend), (function, backend), (function, "reference"))
    ]
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[2])


def test_second_derivative_and_forward_mode_are_refused(backend, device):
    x_seq = inputs(3, 5, device=device)
    decay = torch.full((), 0.6, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(
        asgl_cuda.leaky_integrator(x_seq, decay, backend=backend).square().sum(), x_seq, create_graph=True
    )
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match=r"asgl_cuda.*forward-mode"):
        torch.func.jvp(lambda x: asgl_cuda.leaky_integrator(x, backend=backend), (x_seq.detach(),), (x_seq.detach(),))


@delays
@pytest.mark.parametrize("mode", ["default", "dynamic"])
def test_compile(backend, device, mode, delay):
    """One graph with the eager bits; with dynamic shapes, for all lengths."""

    def function(x_seq, decay, gain):
        out = asgl_cuda.leaky_integrator(
            x_seq, decay, input_gain=gain, delay=delay, return_v_last=True, backend=backend
        )
        return out.v_seq * 2, out.v_last

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=mode == "dynamic", backend=counter)
    counts = []
    for steps, neurons in [(5, 12), (7, 9)] if mode == "dynamic" else [(5, 12)]:
        x_seq = inputs(steps, 3, neurons, device=device)
        decay, gain = (torch.full((), value, device=device, requires_grad=True) for value in (0.7, 1.3))
        results = []
        for each in (compiled, function):
            outputs = each(x_seq, decay, gain)
            results.append(
                (*outputs, *torch.autograd.grad(outputs[0].square().sum() + outputs[1].sum(), (x_seq, decay, gain)))
            )
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("layout", ["time first", "batch first", "channels last"])
def test_opcheck(backend, device, layout, monkeypatch):
    operators = asgl_cuda.backends.BACKENDS[backend].operators
    x_seq, time_dim = laid_out(layout, inputs(5, 2, 3, 4, 4, device=device).detach())
    given = arguments(x_seq, 4, 4, time_dim=time_dim)
    v_init, decay, gain = (given[name].detach() for name in ("v_init", "decay", "input_gain"))
    parameters = None, decay, None, None, gain, None, None, None
    packed = list(parameters), [1.0] * len(Numbers._fields), [0] * (len(Rules._fields) - 1) + [time_dim]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.integrator_forward, (x_seq, v_init, *packed, True, True), test_utils=tests)
    wanted = [True, True, *(each is not None for each in parameters)]
    sequences = torch.rand_like(x_seq), torch.rand_like(v_init), torch.rand_like(x_seq), x_seq, v_init
    torch.library.opcheck(operators.integrator_backward, (*sequences, *packed, False, wanted), test_utils=tests)
    with pytest.raises(ValueError, match="needs v_seq and one of input_gain x_seq"):
        operators.integrator_backward(*sequences[:2], None, *sequences[3:], *packed, False, wanted)


@delays
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_is_a_loop(backend, device, delay, shared):
    x_seq = inputs(3, 5, 4, 8, device=device).detach()
    decay, gain = (torch.rand(3, 8, device=device) for _ in range(2))

    def loss(x, decay, gain):
        out = asgl_cuda.leaky_integrator(x, decay, input_gain=gain, delay=delay, return_v_last=True, backend=backend)
        return (out.v_seq**2).sum() + out.v_last.sum()

    function = grad(loss, (0, 1, 2))
    dims = (0, None, 0) if shared else (0, 0, 0)
    found = vmap(function, dims)(x_seq, decay[0] if shared else decay, gain)
    for index in range(3):
        expected = function(x_seq[index], decay[0 if shared else index], gain[index])
        assert torch.equal(found[0][index], expected[0])
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours[index], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"x_seq": torch.ones(3, dtype=torch.int64)}, TypeError, "x_seq must be float16"),
        ({"decay": "0.5"}, TypeError, "decay must be a float or a tensor, got str"),
        ({"decay": float("nan")}, ValueError, "decay must be a number, got nan"),
        ({"input_gain": torch.ones(3)}, ValueError, r"input_gain must broadcast against x_seq of shape \[4, 2\]"),
        ({"v_rest": None}, TypeError, "v_rest must be a float, got NoneType"),
        ({"v_init": torch.ones(3)}, ValueError, r"v_init must have shape \[2\], got \[3\]"),
        ({"delay": 1}, TypeError, "delay must be a bool, got int"),
        ({"return_v_last": None}, TypeError, "return_v_last must be a bool"),
        ({"time_dim": 2}, ValueError, r"time_dim must be in \[-2, 1\]"),
        ({"backend": "best"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=f"asgl_cuda.leaky_integrator: {words}"):
        asgl_cuda.leaky_integrator(**{"x_seq": torch.ones(4, 2), **options})
