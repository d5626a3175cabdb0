"""torch.compile, autocast, checkpointing, no_grad, inference mode and fake tensors."""

import pytest
import torch
import torch._dynamo.testing
from comparison import random_input, rng_state, uniform
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda.backends import BACKENDS
from asgl_cuda.reference import Numbers, Rules


@pytest.fixture
def compiled(backend):
    """A compiler of functions with fullgraph=True, and the counter of compilations."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def compile_it(function, **options):
        return torch.compile(function, fullgraph=True, backend=counter, **options)

    yield compile_it, counter
    torch._dynamo.reset()


def with_gradients(function, *inputs):
    out = function(*inputs)
    outputs = [output for output in (out if isinstance(out, tuple) else (out,)) if output is not None]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, inputs, grads))


def assert_all_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize("all_outputs", [False, True])
def test_compile_gives_the_same(backend, device, compiled, all_outputs):
    compile_it, counter = compiled
    state = rng_state(device=device)
    every = dict.fromkeys(("return_v_last", "return_v_seq", "return_h_seq"), True) if all_outputs else {}

    def function(x_seq, width, decay):
        # Operations around the layer, so that the graph holds more than one node.
        learned = {"width": width.exp(), "decay": decay.sigmoid()}
        return asgl_cuda.lif(x_seq * 1.5, **learned, analog_prob=0.3, rng_state=state, backend=backend, **every)

    inputs = (
        random_input(5, 3, 31, device=device),
        uniform(31, low=-0.5, high=0.5, device=device),
        uniform(low=-0.5, high=0.5, device=device),
    )
    ours, theirs = with_gradients(compile_it(function), *inputs), with_gradients(function, *inputs)
    # The exponential before the layer is the compiler's own and may round otherwise.
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_compile_of_the_layer_alone_is_bit_identical(backend, device, compiled):
    compile_it, _ = compiled
    state = rng_state(device=device)

    def function(x_seq, width):
        return asgl_cuda.lif(x_seq, width=width, analog_prob=0.3, rng_state=state, backend=backend)

    inputs = (random_input(20, 3, 31, device=device), uniform(low=0.5, high=1.5, device=device))
    assert_all_equal(with_gradients(compile_it(function), *inputs), with_gradients(function, *inputs))


def test_compile_draws_the_same_noise_as_eager(backend, device, compiled):
    compile_it, _ = compiled

    def function(x_seq):
        first = asgl_cuda.lif(x_seq, analog_prob=0.5, backend=backend)
        return first, asgl_cuda.lif(x_seq, analog_prob=0.5, backend=backend)

    fast = compile_it(function)
    for requires_grad in (True, False):
        x_seq = random_input(4, 300, device=device).requires_grad_(requires_grad)
        torch.manual_seed(5)
        expected = function(x_seq)
        assert not torch.equal(*expected)
        torch.manual_seed(5)
        assert_all_equal(fast(x_seq), expected)


def test_compile_where_the_learned_threshold_is_subtracted(backend, device, compiled):
    """One tensor as two parameters, which the compiler refuses as such."""
    compile_it, _ = compiled

    def function(x_seq, v_threshold):
        return asgl_cuda.lif(x_seq, v_threshold=v_threshold, v_reset=None, backend=backend)

    inputs = (random_input(5, 31, device=device), uniform(31, low=0.5, high=1.0, device=device))
    assert_all_equal(with_gradients(compile_it(function), *inputs), with_gradients(function, *inputs))


SEVERAL_TIMES = {
    # Calls in which the input x or the potentials v are also other arguments.
    "input": lambda x, v, **options: asgl_cuda.lif(x, width=x, v_threshold=x, surrogate="sigmoid", **options),
    "potential": lambda x, v, **options: asgl_cuda.lif(x, v_init=v, v_threshold=v, input_bias=v, **options),
    "last potential": lambda x, v, **options: asgl_cuda.lif(x, v_init=v, decay=v, return_v_last=True, **options).v_last,
    "input of an integrator": lambda x, v, **options: asgl_cuda.leaky_integrator(x, x, input_gain=x, **options),
    "potential of an integrator": lambda x, v, **options: asgl_cuda.leaky_integrator(x, v, v_init=v, **options),
    "normalised": lambda x, v, **options: asgl_cuda.batch_norm_lif(
        x, weight=v[0], bias=v[0], training=True, v_init=v, width=v, v_threshold=x, **options
    ),
    "normalised by one": lambda x, v, **options: (
        lambda one, same: asgl_cuda.batch_norm_lif(x, one, one, same, same, width=v, v_init=v, **options)
    )(v[0].detach(), v[0]),
}


@pytest.mark.parametrize("name", SEVERAL_TIMES)
@pytest.mark.parametrize("with_grads", [True, False])
def test_compile_where_one_tensor_is_several_arguments(backend, device, compiled, name, with_grads):
    compile_it, _ = compiled
    inputs = (uniform(5, 4, 3, low=0.5, high=1.5, device=device), uniform(4, 3, low=0.5, high=1.5, device=device))

    def function(*inputs):
        return SEVERAL_TIMES[name](*inputs, backend=backend)

    def called(function):
        if with_grads:
            s_seq = function(*inputs)
            return [s_seq, *torch.autograd.grad(s_seq.square().sum(), inputs, materialize_grads=True)]
        with torch.no_grad():
            return [function(*inputs)]

    for actual, expected in zip(called(compile_it(function)), called(function), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("prob", [0.0, 1 / 65536, 0.3, 1 - 1 / 65536, 1.0])
@pytest.mark.parametrize("steps", [4, 20])
def test_analog_prob_as_data_is_as_a_number(backend, device, prob, steps):
    x_seq = random_input(steps, 3, 60, device=device)
    width = uniform(60, low=0.5, high=1.5, device=device)
    state = rng_state(device=device)
    every = torch.tensor([prob], device=device, dtype=torch.float64)

    def by(analog_prob, name):
        def function(x_seq, width):
            return asgl_cuda.lif(
                x_seq, width=width, analog_prob=analog_prob, rng_state=state, return_v_last=True, backend=name
            )

        return with_gradients(function, x_seq, width)

    assert_all_equal(by(every, backend), by(prob, backend))
    assert_all_equal(by(every, "reference"), by(prob, "reference"))


def test_analog_prob_as_data_compiles_once(backend, device, compiled):
    compile_it, counter = compiled

    def function(x_seq, analog_prob):
        return asgl_cuda.lif(x_seq, analog_prob=analog_prob, backend=backend)

    fast = compile_it(function)
    x_seq = random_input(4, 300, device=device)
    for prob in (0.0, 0.1, 0.2, 0.9, 1.0):
        data = torch.tensor(prob, device=device)
        torch.manual_seed(5)
        expected = function(x_seq, data)
        torch.manual_seed(5)
        assert torch.equal(fast(x_seq, data), expected)
    assert counter.frame_count == 1


def test_dynamic_shapes_compile_once(backend, device, compiled):
    compile_it, counter = compiled
    state = rng_state(device=device)

    def function(x_seq, width):
        return asgl_cuda.lif(x_seq, width=width, analog_prob=0.3, rng_state=state, return_v_last=True, backend=backend)

    width = uniform(low=0.5, high=1.5, device=device)
    fast = compile_it(function, dynamic=True)
    counts = []
    for steps, neurons in ((4, 60), (5, 61), (16, 7), (17, 300), (40, 33), (3, 1000)):
        x_seq = random_input(steps, neurons, device=device)
        assert_all_equal(with_gradients(fast, x_seq, width), with_gradients(function, x_seq, width))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


def test_compile_of_channels_last_and_module(backend, device, compiled, monkeypatch):
    # TF32 convolutions round to ten bits, and algorithms differ.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    compile_it, counter = compiled
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Unflatten(0, (4, 3)),
        asgl_cuda.LIF(8, granularity="channel", analog_prob=0.3, learn_decay=True, backend=backend),
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    x_seq = torch.rand(4, 3, 2, 6, 6, device=device)
    torch.manual_seed(1)
    expected = model(x_seq)
    torch.manual_seed(1)
    actual = compile_it(model)(x_seq)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert counter.frame_count == 1


@pytest.mark.parametrize("steps", [16, 20])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(backend, device, steps, layout):
    operators = BACKENDS[backend].operators
    x_seq = random_input(steps, 2, 3, 4, 5, device=device).detach()
    if layout == "channels_last":
        x_seq = x_seq.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    parameters = [torch.rand(3, 1, 1, device=device) + 0.5, None, None, torch.zeros((), device=device), *[None] * 3]
    parameters.append(torch.rand_like(x_seq))  # the residual
    numbers = Numbers(0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, residual_gain=0.5, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    rules = Rules(0, 1, *[0] * 8, analog_below=20000, levels=0, adaptation=0, time_dim=0)
    state = rng_state(device=device)
    v_init = torch.rand(2, 3, 4, 5, device=device)
    forward = (x_seq, v_init, state, parameters, numbers, rules, [True] * 4)
    torch.library.opcheck(operators.lif_forward, forward)
    s_seq, v_last, v_seq, h_seq, checkpoints = operators.lif_forward(*forward)
    grads = [torch.randn_like(output) for output in (s_seq, v_last, v_seq, h_seq)]
    wants_parameters = [True, False, False, True, False, False, False, True]
    inputs = (x_seq, v_init, state, checkpoints, parameters, numbers, rules)
    torch.library.opcheck(operators.lif_backward, (grads, *inputs, [True, True, *wants_parameters]))
    no_grads = [None, grads[1], None, None]
    torch.library.opcheck(operators.lif_backward, (no_grads, *inputs, [False, False, *wants_parameters]))
    torch.library.opcheck(operators.draw_rng_state, (state,), test_utils=("test_schema", "test_faketensor"))


def test_fake_tensors_have_the_real_layout(backend, device):
    x_seq = torch.rand(4, 2, 3, 4, 5, device=device).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    every = {"return_v_last": True, "return_v_seq": True, "return_h_seq": True, "backend": backend}
    real = asgl_cuda.lif(x_seq, **every)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = asgl_cuda.lif(mode.from_tensor(x_seq), **every)
    for ours, theirs in zip(real, fake, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, dtype):
    """A convolution under autocast gives half currents: spikes in that type, states and parameters in float32."""
    layer = nn.Linear(6, 31, device=device)
    width = uniform(31, low=0.5, high=1.5, device=device)
    x_seq = torch.rand(4, 3, 6, device=device)
    with torch.autocast(device.type, dtype):
        current = layer(x_seq)
        options = {"width": width, "analog_prob": 0.3, "rng_state": rng_state(device=device)}
        out = asgl_cuda.lif(current, **options, return_v_last=True, backend=backend)
    assert current.dtype == out.s_seq.dtype == dtype
    assert out.v_last.dtype == torch.float32
    out.s_seq.float().sum().backward()
    assert width.grad.dtype == layer.weight.grad.dtype == torch.float32
    expected = asgl_cuda.lif(current.detach(), **options, backend="reference")
    assert torch.equal(out.s_seq, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_noise(backend, device, use_reentrant):
    x_seq = random_input(20, 3, 31, device=device)
    width = uniform(low=0.5, high=1.5, device=device)

    def function(x, w):
        return asgl_cuda.lif(x, width=w, analog_prob=0.5, backend=backend)

    def run(call):
        torch.manual_seed(3)
        s_seq = call()
        # Draws between forward and recomputation must not change the latter.
        torch.rand(7, device=device)
        if use_reentrant:
            return backward(s_seq)
        return s_seq, *torch.autograd.grad(s_seq.square().sum(), (x_seq, width))

    def backward(s_seq):
        x_seq.grad = width.grad = None
        s_seq.square().sum().backward()
        return s_seq, x_seq.grad, width.grad

    assert_all_equal(
        run(lambda: checkpoint(function, x_seq, width, use_reentrant=use_reentrant)),
        run(lambda: function(x_seq, width)),
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("layer", ["LIF", "LeakyIntegrator", "BatchNormLIF"])
def test_activation_checkpointing_of_layers(backend, device, layer, learned, use_reentrant):
    """Saved tensors can be read only once without reentrance."""
    learns = {"learn_decay": learned}
    if layer != "LeakyIntegrator":
        learns |= {"learn_width": learned, "learn_threshold": learned}
    if layer == "BatchNormLIF":
        learns |= {"affine": learned}
    model = getattr(asgl_cuda, layer)(7, granularity="channel", **learns, backend=backend).to(device)
    x_seq = random_input(20, 3, 7, device=device)
    gain = uniform(7, low=0.5, high=1.0, device=device)
    leaves = [x_seq, *model.parameters()]
    if layer == "LeakyIntegrator" and learned:
        leaves.append(gain)

    def function(x_seq):
        out = model(x_seq)
        return asgl_cuda.leaky_integrator(out, input_gain=gain, backend=backend) if gain is leaves[-1] else out

    def run(call):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(3)
        out = call()
        out.square().sum().backward()
        return out, *(leaf.grad for leaf in leaves)

    def checkpointed():
        return checkpoint(function, x_seq, use_reentrant=use_reentrant)

    assert_all_equal(run(checkpointed), run(lambda: function(x_seq)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(backend, device, mode):
    x_seq = random_input(40, 3, 31, device=device)
    width = uniform(low=0.5, high=1.5, device=device)
    saved = []
    options = {"width": width, "analog_prob": 0.3, "rng_state": rng_state(device=device), "backend": backend}
    expected = asgl_cuda.lif(x_seq, **options)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor), mode():
        s_seq = asgl_cuda.lif(x_seq, **options)
    assert not saved
    assert not s_seq.requires_grad
    assert torch.equal(s_seq, expected)


def test_checkpoints_are_not_written_without_gradients(backend, device, monkeypatch):
    written = []
    operators = BACKENDS[backend].operators

    def spy(*arguments):
        *_, checkpoints = results = operators.lif_forward(*arguments)
        written.append(checkpoints.numel() if len(results) > 1 else 0)
        return results

    spied = BACKENDS[backend]._replace(operators=operators._replace(lif_forward=spy), direct=None)
    monkeypatch.setitem(BACKENDS, backend, spied)
    x_seq = random_input(40, 31, device=device)
    with torch.no_grad():
        asgl_cuda.lif(x_seq, backend=backend)
    asgl_cuda.lif(x_seq.detach(), backend=backend)
    asgl_cuda.lif(x_seq, backend=backend)
    assert written == [0, 0, 2 * 31 + 2]


def test_anomaly_mode(backend, device):
    x_seq = random_input(4, 31, device=device)
    with torch.autograd.detect_anomaly(check_nan=True):
        asgl_cuda.lif(x_seq, analog_prob=0.5, backend=backend).sum().backward()


def test_default_dtype_and_default_device_do_not_matter(backend, device):
    x_seq = random_input(4, 31, device=device)
    expected = asgl_cuda.lif(x_seq, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(asgl_cuda.lif(x_seq, backend=backend), expected)
        assert torch.equal(asgl_cuda.lif(x_seq, backend="reference"), expected)
    finally:
        torch.set_default_dtype(torch.float32)
