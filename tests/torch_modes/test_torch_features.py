"""torch.compile, torch.export, ahead-of-time compilation, operators, no_grad and fake tensors.

Compilations take seconds: each compiles all layers as the branches of one model.
"""

import copy

import pytest
import torch
import torch._dynamo.testing
from comparison import Stack, random_input, rng_state, uniform
from torch import nn

import asgl_cuda
from asgl_cuda.backends import BACKENDS
from asgl_cuda.reference.records import Numbers, Rules


@pytest.fixture(autouse=True)
def no_graphs():
    """Graphs of earlier tests are forgotten."""
    torch._dynamo.reset()


@pytest.fixture(params=["fused", "reference"])
def name(request, backend):
    """The name of a backend."""
    if request.param == "fused":
        return backend
    if backend in ("emulated", "ptx"):
        pytest.skip("the reference is the same beside any backend of its device")
    return "reference"


def with_gradients(function, *inputs):
    """All outputs, and the gradients of all inputs."""
    out = function(*inputs)
    outputs = [output for output in (out if isinstance(out, tuple) else (out,)) if output is not None]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, inputs, grads, materialize_grads=True))


def assert_all_equal(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))


KINDS = {
    "LIF": lambda **options: asgl_cuda.LIF(
        8, granularity="channel", learn_decay=True, learn_threshold=True, v_rest=0.1, surrogate="sigmoid", **options
    ),
    "soft reset": lambda **options: asgl_cuda.LIF(
        v_reset=None, learn_decay=True, detach_reset=True, surrogate="arctan", **options
    ),
    "integrator": lambda analog_prob, **options: asgl_cuda.LeakyIntegrator(
        8, granularity="channel", learn_decay=True, **options
    ),
    "normalised": lambda **options: asgl_cuda.BatchNormLIF(8, **options),
    "adaptive": lambda **options: asgl_cuda.AdaptiveLIF(8, granularity="channel", learn_adaptation=True, **options),
    "recurrent": lambda **options: asgl_cuda.RecurrentLIF(8, syn_decay=0.5, learn_syn_decay=True, **options),
}


IN_KERNELS = ("LIF", "integrator", "normalised")  # kernels read their learned values as they are stored


def branches(backend, device, kinds=KINDS, analog_prob=0.0):
    """A layer of each kind between weights."""
    torch.manual_seed(1)
    options = {"analog_prob": analog_prob, "backend": backend}
    made = {
        kind.replace(" ", "_"): nn.Sequential(nn.Linear(5, 8), KINDS[kind](**options), nn.Linear(8, 3))
        for kind in kinds
    }
    return Stack(lambda model, x_seq: torch.cat([each(x_seq) for each in model.children()], -1), **made).to(device)


def inputs(device, steps=4, batch=6):
    return torch.randn(steps, batch, 5, device=device) * 3


def trained(model, x_seq, steps=2):
    """The outputs, and the gradients and state of each step of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        out = model(x_seq)
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
        found += [out.detach(), *(each.grad.clone() for _, each in sorted(model.named_parameters()))]
        found += [each.clone() for _, each in sorted(model.state_dict().items())]
    return found


def assert_trains_alike(module, model, x_seq, seed=3):
    """A normalisation sums its gradients in another order in a graph."""
    torch.manual_seed(seed)
    expected = trained(copy.deepcopy(model), x_seq)
    assert sum(bool(each.any()) for each in expected) > 0.8 * len(expected)
    torch.manual_seed(seed)
    for ours, theirs in zip(trained(module, x_seq), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- torch.compile ----


@pytest.mark.traced
def test_compiled_function(backend, device):
    """The same bits and noise as in eager mode, of any size by one graph."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    state = rng_state(device=device)
    every = dict.fromkeys(("return_v_last", "return_v_seq", "return_h_seq"), True)

    def function(x_seq, width, v_threshold):
        # One tensor as two parameters, threshold and reset, which the compiler refuses as such.
        given = {"width": width, "v_threshold": v_threshold, "v_reset": None, "analog_prob": 0.3}
        noisy = asgl_cuda.lif(x_seq, analog_prob=0.5, backend=backend)
        return *asgl_cuda.lif(x_seq, **given, rng_state=state, **every, backend=backend), noisy

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    leaves = uniform(low=0.5, high=1.5, device=device), uniform(low=0.5, high=1.0, device=device)
    counts = set()
    for steps, neurons in ((4, 60), (17, 300), (40, 33)):
        x_seq, results = random_input(steps, neurons, device=device), []
        for each in (compiled, function):
            torch.manual_seed(5)
            results.append(with_gradients(each, x_seq, *leaves))
        assert_all_equal(*results)
        counts.add(counter.frame_count)
    assert len(counts) == 1, counts
    with torch.no_grad():
        torch.manual_seed(5)
        expected = function(x_seq, *leaves)
        torch.manual_seed(5)
        assert_all_equal(compiled(x_seq, *leaves), expected)


@pytest.mark.traced
def test_compiled_layers(backend, device, monkeypatch):
    """In channels_last, behind a convolution."""
    # TF32 convolutions round to ten bits, and algorithms differ.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    layers = [KINDS[kind](analog_prob=0.3, backend=backend) for kind in KINDS if kind != "recurrent"]
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Unflatten(0, (4, 3)), *layers
    ).to(device, memory_format=torch.channels_last)
    x_seq, outputs = torch.rand(4, 3, 2, 6, 6, device=device), []
    for call in (model, torch.compile(model, fullgraph=True, backend=counter)):
        torch.manual_seed(1)
        outputs.append(call(x_seq))
    torch.testing.assert_close(*outputs)
    outputs[1].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert counter.frame_count == 1


OF_ANY_SIZE = {
    "LIF": lambda **options: asgl_cuda.LIF(5, **options),
    "behind LIF": lambda **options: nn.Sequential(
        asgl_cuda.LIF(backend=options["backend"]), asgl_cuda.RecurrentLIF(5, **options)
    ),
    "recurrent": lambda **options: asgl_cuda.RecurrentLIF(5, **options),
    "synapse": lambda **options: asgl_cuda.RecurrentLIF(5, syn_decay=torch.rand(5), adapt_decay=0.5, **options),
    "elementwise": lambda **options: asgl_cuda.RecurrentLIF(5, recurrent="elementwise", bias=False, **options),
    "adaptive": lambda **options: asgl_cuda.AdaptiveLIF(5, adapt_decay=torch.rand(5), **options),
    "integrator": lambda **options: asgl_cuda.LeakyIntegrator(5, learn_decay=True, **options),
    "normalised": lambda **options: asgl_cuda.BatchNormLIF(5, decay=torch.rand(5), **options),
}


@pytest.mark.traced
@pytest.mark.parametrize("kind", OF_ANY_SIZE)
def test_compiled_for_any_size(name, device, kind):
    """Parameters have sizes that are known, inputs do not."""
    layer = OF_ANY_SIZE[kind](granularity="neuron", backend=name).to(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=counter)
    counts = set()
    for steps, batch in ((2, 3), (3, 4)):
        x_seq, results = torch.randn(steps, batch, 5, device=device, requires_grad=True), []
        for call in (layer, compiled):
            torch.manual_seed(2)
            results.append(with_gradients(lambda x_seq, *_, call=call: call(x_seq), x_seq, *layer.parameters()))
        assert_all_equal(*results)
        counts.add(counter.frame_count)
    assert len(counts) == 1 or name == "reference"  # whose loop is unrolled


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


@pytest.mark.parametrize("with_grads", [True, False])
def test_compile_where_one_tensor_is_several_arguments(backend, device, with_grads):
    leaves = (uniform(5, 4, 3, low=0.5, high=1.5, device=device), uniform(4, 3, low=0.5, high=1.5, device=device))

    def function(*leaves):
        return tuple(each(*leaves, backend=backend) for each in SEVERAL_TIMES.values())

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(with_grads):
        call = with_gradients if with_grads else lambda function, *leaves: function(*leaves)
        for actual, expected in zip(call(compiled, *leaves), call(function, *leaves), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("prob", [0.0, 1 / 65536, 0.3, 1 - 1 / 65536, 1.0])
def test_analog_prob_as_data_is_as_a_number(name, device, prob):
    leaves = random_input(20, 3, 60, device=device), uniform(60, low=0.5, high=1.5, device=device)
    state = rng_state(device=device)

    def by(analog_prob):
        options = {"analog_prob": analog_prob, "rng_state": state, "return_v_last": True, "backend": name}
        return with_gradients(lambda x_seq, width: asgl_cuda.lif(x_seq, width=width, **options), *leaves)

    assert_all_equal(by(torch.tensor([prob], device=device, dtype=torch.float64)), by(prob))


# ---- operators ----


def operator_inputs(device, x_seq):
    parameters = [uniform(3, low=0.5, high=1.5, device=device), None, None, uniform(low=0.5, high=1, device=device)]
    numbers = Numbers(0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, residual_gain=0.5, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    rules = Rules(1, 1, *[0] * 8, analog_below=0, levels=0, adaptation=0, time_dim=0, trailing=0)
    return x_seq, None, None, *parameters, *[None] * 4, numbers, rules


def test_totals_of_several_processes_have_no_derivative(backend, device):
    """An exported graph is of one process."""
    x_seq, statistics = random_input(4, 2, 3, device=device), torch.rand(2, 3, 3, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="train the original model, and export it afterwards"):
        BACKENDS[backend].operators.batch_norm_coefficients(x_seq, statistics, *[None] * 4, 1e-5, 1.0, 0)


@pytest.mark.parametrize("keeps_checkpoints", [False, True])
def test_the_operator_by_itself(backend, device, keeps_checkpoints):
    """No output is silently left out, a graph is made only on request, and has one derivative."""
    operators = BACKENDS[backend].operators
    x_seq, _, _, *rest = given = operator_inputs(device, random_input(20, 2, 3, device=device))
    width, reset = leaves = [each for each in rest if isinstance(each, torch.Tensor)]
    s_seq, v_last, *checkpoints = operators.lif_forward(*given, [True, False, False, keeps_checkpoints])
    assert len(checkpoints) == keeps_checkpoints
    assert not any(each.requires_grad for each in checkpoints)
    options = {"width": width, "v_reset": reset, "surrogate": "triangle", "return_v_last": True, "backend": backend}
    expected = asgl_cuda.lif(x_seq, **options)
    grads = torch.autograd.grad(s_seq.sum() + v_last.sum(), [x_seq, *leaves])
    others = torch.autograd.grad(expected.s_seq.sum() + expected.v_last.sum(), [x_seq, *leaves])
    assert_all_equal(grads, others)
    with torch.no_grad():
        assert not operators.lif_forward(*given, [True, False, False, keeps_checkpoints])[0].requires_grad
    if keeps_checkpoints:
        grads = [torch.ones_like(s_seq).requires_grad_(), None, None, None]
        inputs = (x_seq, None, None, *checkpoints, *rest)
        for gradient in operators.lif_backward(*grads, *inputs, [True, False, True, *[False] * 7]):
            with pytest.raises(RuntimeError, match="a second derivative was asked for"):
                gradient.sum().backward()


# ---- modes ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(backend, device, mode, monkeypatch):
    written, saved = [], []
    operators = BACKENDS[backend].operators

    def spy(*arguments):
        *_, checkpoints = results = operators.lif_forward(*arguments)
        written.append(checkpoints.numel() if len(results) > 1 else 0)
        return results

    spied = BACKENDS[backend]._replace(operators=operators._replace(lif_forward=spy), direct=None)
    monkeypatch.setitem(BACKENDS, backend, spied)
    x_seq, width = random_input(40, 31, device=device), uniform(low=0.5, high=1.5, device=device)
    options = {"width": width, "analog_prob": 0.3, "rng_state": rng_state(device=device), "backend": backend}
    expected = asgl_cuda.lif(x_seq, **options)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor), mode():
        s_seq = asgl_cuda.lif(x_seq, **options)
    assert not saved
    assert not s_seq.requires_grad
    assert torch.equal(s_seq, expected)
    asgl_cuda.lif(x_seq.detach(), backend=backend)
    assert written == [2 * 31 + 2, 0, 0]


def test_anomaly_mode_and_another_default_type(backend, device):
    x_seq = random_input(4, 31, device=device)
    with torch.autograd.detect_anomaly(check_nan=True):
        asgl_cuda.lif(x_seq, analog_prob=0.5, backend=backend).sum().backward()
    expected = asgl_cuda.lif(x_seq, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(asgl_cuda.lif(x_seq, backend=each), expected) for each in (backend, "reference"))
    finally:
        torch.set_default_dtype(torch.float32)


# ---- torch.export ----


@pytest.mark.parametrize(
    ("name", "way"),
    [("fused", "plain"), ("fused", "decomposed"), ("fused", "strict"), ("reference", "plain")],
    indirect=["name"],
)
@pytest.mark.traced
def test_an_exported_model_trains_as_the_model(name, device, way):
    """Also by the compiler's front end; noise is new at each step and in each layer, as the model's."""
    kinds = IN_KERNELS if name == "reference" else KINDS  # as unrolled loops, which take long
    model, x_seq = branches(name, device, kinds, analog_prob=0.3), inputs(device)
    program = torch.export.export(copy.deepcopy(model), (x_seq,), strict=way == "strict")
    program = program.run_decompositions() if way == "decomposed" else program
    assert_trains_alike(program.module(), model, x_seq)


def test_exported_without_gradients_and_in_evaluation(backend, device):
    """The graph requests no checkpoints."""
    model, x_seq = branches(backend, device).eval(), inputs(device, steps=20)
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model), (x_seq,))
    assert torch.equal(program.module()(x_seq), model(x_seq))
    assert_trains_alike(program.module(), model, x_seq)


def test_exported_with_dynamic_shapes_and_compiled(backend, device):
    model = branches(backend, device, ("LIF",))
    x_seq = inputs(device, steps=20)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(copy.deepcopy(model), (x_seq,), dynamic_shapes=({1: batch},))
    module = program.module()
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    assert_trains_alike(module, model, inputs(device, steps=20, batch=9))
    assert_trains_alike(compiled, model, x_seq)


def test_every_output_and_every_input(name, device):
    names = ("width", "decay", "v_threshold", "v_reset", "input_gain", "input_bias", "input_mean")
    given = {each: uniform(6, low=0.3, high=0.9, device=device) for each in names}
    given |= {"width": uniform(low=1.0, high=2.0, device=device), "x_seq": random_input(5, 3, 6, device=device)}
    given["v_init"] = uniform(3, 6, low=-1, high=1, device=device)
    options = {"analog_prob": 0.5, "surrogate": "triangle", "surrogate_gain": 0.5, "backend": name}
    options |= dict.fromkeys(("return_v_last", "return_v_seq", "return_h_seq"), True)
    model, state = Stack(lambda _, given: tuple(asgl_cuda.lif(**given, **options))), rng_state(device=device)
    module = torch.export.export(model, ({**given, "rng_state": state},)).module()

    def results(function):
        def of_leaves(*values):
            return function({**dict(zip(given, values, strict=True)), "rng_state": state})

        return with_gradients(of_leaves, *given.values())

    for ours, theirs in zip(results(module), results(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_nan_in_an_exported_reference():
    """NaN emits no spike, as in the model."""
    model, x_seq = asgl_cuda.LIF(analog_prob=0.0, backend="reference"), torch.rand(3, 4)
    x_seq[1, 2] = float("nan")
    assert torch.equal(torch.export.export(model, (x_seq,)).module()(x_seq), model(x_seq))


@pytest.mark.parametrize("kind", IN_KERNELS)
def test_transforms_of_an_exported_model(backend, device, kind):
    """torch.func.grad, also per sample; missing derivatives are refused."""
    model, x_seq = branches(backend, device, (kind,)).eval(), inputs(device)
    module = torch.export.export(model, (x_seq,)).module()
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters, x_seq, function=module):
        return torch.func.functional_call(function, parameters, (x_seq,)).square().sum()

    grads, others = torch.func.grad(loss)(parameters, x_seq), torch.func.grad(loss)(parameters, x_seq, model)
    several = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([x_seq, x_seq]))
    for key, other in others.items():
        torch.testing.assert_close(grads[key], other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(several[key], other.expand(several[key].shape), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda x_seq: torch.func.grad(loss, 1)(parameters, x_seq).square().sum())(x_seq)
    leaf = x_seq.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="forward-mode differentiation was asked for"):
        torch.func.jvp(lambda x_seq: loss(parameters, x_seq), (x_seq,), (x_seq,))
    dual_level = torch.autograd.forward_ad.dual_level()
    with pytest.raises(RuntimeError, match="forward-mode differentiation was asked for"), dual_level:
        module(torch.autograd.forward_ad.make_dual(x_seq, torch.ones_like(x_seq)))


@pytest.mark.traced
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["fused", pytest.param("reference", marks=pytest.mark.slow)], indirect=True)
def test_compiled_ahead_of_time(name, device, tmp_path):
    model, x_seq = branches(name, device, IN_KERNELS).eval(), inputs(device, steps=3)
    with torch.no_grad():
        program = torch.export.export(model, (x_seq,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(compiled(x_seq), model(x_seq))
