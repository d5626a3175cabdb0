"""Models exported by torch.export, then trained, or compiled ahead of time."""

import copy

import pytest
import torch
from comparison import random_input, rng_state, uniform
from torch import nn

import asgl_cuda
from asgl_cuda.backends import BACKENDS
from asgl_cuda.reference import Numbers, Rules


@pytest.fixture(params=["fused", "reference"])
def name(request, backend):
    """The name of a backend."""
    if request.param == "fused":
        return backend
    if backend in ("emulated", "ptx"):
        pytest.skip("the reference is the same beside any backend of its device")
    return "reference"


def network(layer, name, device, **options):
    """A network with neurons of one kind, by default without noise."""
    kinds = {
        "LIF": lambda: asgl_cuda.LIF(
            7, granularity="channel", learn_decay=True, learn_threshold=True, v_rest=0.1, surrogate="sigmoid",
            backend=name, **{"analog_prob": 0.0, **options},
        ),
        "soft reset": lambda: asgl_cuda.LIF(
            v_reset=None, learn_decay=True, detach_reset=True, surrogate="arctan", backend=name,
            **{"analog_prob": 0.0, **options},
        ),
        "rectangle": lambda: asgl_cuda.LIF(width=2.0, backend=name, **{"analog_prob": 0.0, **options}),
        "integrator": lambda: asgl_cuda.LeakyIntegrator(7, granularity="channel", learn_decay=True, backend=name),
        "normalised": lambda: asgl_cuda.BatchNormLIF(7, backend=name, **{"analog_prob": 0.0, **options}),
    }  # fmt: skip
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), kinds[layer](), nn.Linear(7, 7), kinds[layer](), nn.Linear(7, 3))
    return model.to(device)


LAYERS = ("LIF", "soft reset", "rectangle", "integrator", "normalised")


def trained(model, x_seq, steps=3):
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


def assert_trains_alike(program, model, x_seq):
    """An exported normalisation sums its gradients in another order."""
    module = program.module()
    expected = trained(copy.deepcopy(model), x_seq)
    assert all(each.abs().sum() > 0 for each in expected[1:5])
    for ours, theirs in zip(trained(module, x_seq), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_exported_model_trains_as_the_model(name, device, layer, decomposed):
    model = network(layer, name, device)
    x_seq = torch.randn(4, 6, 5, device=device) * 3
    program = torch.export.export(copy.deepcopy(model), (x_seq,))
    assert_trains_alike(program.run_decompositions() if decomposed else program, model, x_seq)


@pytest.mark.parametrize("layer", ["LIF", "normalised"])
def test_exported_by_the_compilers_front_end(name, device, layer):
    model = network(layer, name, device)
    x_seq = torch.randn(4, 6, 5, device=device) * 3
    assert_trains_alike(torch.export.export(copy.deepcopy(model), (x_seq,), strict=True), model, x_seq)


@pytest.mark.parametrize("layer", ["LIF", "integrator", "normalised"])
def test_exported_without_gradients_and_in_evaluation(backend, device, layer):
    """The graph requests no checkpoints."""
    model = network(layer, backend, device).eval()
    x_seq = torch.randn(20, 6, 5, device=device) * 3
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model), (x_seq,))
    assert torch.equal(program.module()(x_seq), model(x_seq))
    assert_trains_alike(program, model, x_seq)


def test_exported_with_dynamic_shapes_and_compiled(backend, device):
    model = network("LIF", backend, device)
    x_seq = torch.randn(20, 6, 5, device=device) * 3
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(copy.deepcopy(model), (x_seq,), dynamic_shapes=({1: batch},))
    assert_trains_alike(program, model, torch.randn(20, 9, 5, device=device) * 3)
    module = copy.deepcopy(program.module())
    module.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(trained(compiled, x_seq), trained(model, x_seq), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decomposed", [False, True])
def test_noise_of_an_exported_model(backend, device, decomposed):
    """New at each call and in each layer, equal to the model's, and the same in backward."""
    model = nn.Sequential(*(asgl_cuda.LIF(analog_prob=0.5, width=4.0, backend=backend) for _ in range(2))).to(device)
    x_seq = torch.rand(5, 400, device=device)
    program = torch.export.export(copy.deepcopy(model), (x_seq,))
    module = (program.run_decompositions() if decomposed else program).module()
    torch.manual_seed(3)
    assert not torch.equal(module(x_seq), module(x_seq))
    torch.manual_seed(3)
    ours = trained(module, x_seq)
    torch.manual_seed(3)
    for each, other in zip(ours, trained(model, x_seq), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-6)


class AllOutputs(nn.Module):
    """Every output of `lif`, by every parameter."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x_seq, v_init, rng_state, tensors):
        every = dict.fromkeys(("return_v_last", "return_v_seq", "return_h_seq"), True)
        options = {"analog_prob": 0.5, "surrogate": "triangle", "backend": self.backend}
        return tuple(asgl_cuda.lif(x_seq, v_init=v_init, rng_state=rng_state, **tensors, **options, **every))


def test_every_output_and_every_input(name, device):
    names = ("width", "decay", "v_threshold", "v_reset", "input_gain", "input_bias", "input_mean")
    tensors = {each: uniform(6, low=0.3, high=0.9, device=device) for each in names}
    tensors["width"] = uniform(low=1.0, high=2.0, device=device)
    x_seq, v_init = random_input(5, 3, 6, device=device), uniform(3, 6, low=-1, high=1, device=device)
    inputs = (x_seq, v_init, rng_state(device=device), tensors)
    model = AllOutputs(name)
    module = torch.export.export(model, inputs).module()

    def results(function):
        outputs = function(*inputs)
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
        return *outputs, *torch.autograd.grad(outputs, (x_seq, v_init, *tensors.values()), grads)

    for ours, theirs in zip(results(module), results(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_nan_in_an_exported_reference(device):
    """NaN emits no spike, as in the model."""
    model = asgl_cuda.LIF(analog_prob=0.0, backend="reference").to(device)
    x_seq = torch.rand(3, 4, device=device)
    x_seq[1, 2] = float("nan")
    assert torch.equal(torch.export.export(model, (x_seq,)).module()(x_seq), model(x_seq))


@pytest.mark.parametrize("layer", ["LIF", "integrator", "normalised"])
def test_second_derivatives_are_refused(backend, device, layer):
    x_seq = torch.randn(4, 6, 5, device=device).requires_grad_()
    module = torch.export.export(network(layer, backend, device), (x_seq,)).module()
    (grad,) = torch.autograd.grad(module(x_seq).square().sum(), x_seq, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        grad.square().sum().backward()


def operator_inputs(device):
    parameters = [uniform(3, low=0.5, high=1.5, device=device), None, None, uniform(low=0.5, high=1, device=device)]
    numbers = Numbers(0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, residual_gain=1.0, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
    rules = Rules(1, 1, *[0] * 8, analog_below=0, levels=0, adaptation=0, time_dim=0)
    return random_input(20, 2, 3, device=device), None, None, [*parameters, *[None] * 4], numbers, rules


@pytest.mark.parametrize("keeps_checkpoints", [False, True])
def test_the_operator_by_itself(backend, device, keeps_checkpoints):
    """No output is silently left out, and a graph is made only on request."""
    operators = BACKENDS[backend].operators
    x_seq, _, _, parameters, *_ = inputs = operator_inputs(device)
    width, *_, reset = leaves = [each for each in parameters if each is not None]
    s_seq, v_last, *checkpoints = operators.lif_forward(*inputs, [True, False, False, keeps_checkpoints])
    assert len(checkpoints) == keeps_checkpoints
    assert not any(each.requires_grad for each in checkpoints)
    options = {"width": width, "v_reset": reset, "surrogate": "triangle", "return_v_last": True, "backend": backend}
    expected = asgl_cuda.lif(x_seq, **options)
    grads = torch.autograd.grad(s_seq.sum() + v_last.sum(), [x_seq, *leaves])
    others = torch.autograd.grad(expected.s_seq.sum() + expected.v_last.sum(), [x_seq, *leaves])
    assert all(torch.equal(*pair) for pair in zip(grads, others, strict=True))
    with torch.no_grad():
        s_seq, *_ = operators.lif_forward(*inputs, [True, False, False, keeps_checkpoints])
    assert not s_seq.requires_grad


def test_opcheck_with_gradients(backend, device):
    operators = BACKENDS[backend].operators
    x_seq, _, _, parameters, *packed = operator_inputs(device)
    torch.library.opcheck(operators.lif_forward, (x_seq, None, None, parameters, *packed, [True] * 4))
    parameters[1] = uniform(3, low=0.3, high=0.9, device=device)
    torch.library.opcheck(operators.integrator_forward, (x_seq, None, parameters, *packed, False, True))
    x_seq = random_input(4, 2, 3, device=device)
    weight, bias = uniform(3, low=0.5, high=1.5, device=device), uniform(3, low=0.5, high=1.5, device=device)
    arguments = (x_seq, None, None, None, weight, bias, 1e-5, 0.9, 0)
    torch.library.opcheck(operators.batch_norm_coefficients, arguments)


def test_backward_operators_refuse_to_be_differentiated(backend, device):
    operators = BACKENDS[backend].operators
    x_seq, _, _, parameters, numbers, rules = operator_inputs(device)
    s_seq, checkpoints = operators.lif_forward(x_seq, None, None, parameters, numbers, rules, [False] * 3 + [True])
    grads = [torch.ones_like(s_seq).requires_grad_(), None, None, None]
    inputs = (x_seq, None, None, checkpoints, parameters, numbers, rules)
    wanted = [True, False, True, *[False] * 7]
    for gradient in operators.lif_backward(grads, *inputs, wanted):
        with pytest.raises(RuntimeError, match="a second derivative was asked for"):
            gradient.sum().backward()


def test_statistics_of_several_processes_are_refused(backend, device):
    x_seq = random_input(4, 2, 3, device=device)
    statistics = torch.rand(2, 3, 3, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="train the model that it was made of"):
        BACKENDS[backend].operators.batch_norm_coefficients(x_seq, statistics, None, None, None, None, 1e-5, 1.0, 0)


def check_compiled_ahead_of_time(name, device, layer, tmp_path):
    model = nn.Sequential(network(layer, name, device), asgl_cuda.LeakyIntegrator(backend=name)).eval()
    x_seq = torch.randn(3, 6, 5, device=device)
    with torch.no_grad():
        program = torch.export.export(model, (x_seq,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(compiled(x_seq), model(x_seq))


@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="no CPU kernels")
def test_compiled_ahead_of_time(tmp_path):
    check_compiled_ahead_of_time("cpu", "cpu", "normalised", tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("layer", ["LIF", "normalised"])
def test_compiled_ahead_of_time_by_each_backend(name, device, layer, tmp_path):
    check_compiled_ahead_of_time(name, device, layer, tmp_path)


@pytest.mark.parametrize("layer", ["LIF", "integrator", "normalised"])
def test_transforms_of_an_exported_model(backend, device, layer):
    """torch.func.grad, also per sample; missing derivatives are refused."""
    model = network(layer, backend, device).eval()
    x_seq = torch.randn(4, 6, 5, device=device) * 3
    module = torch.export.export(model, (x_seq,)).module()
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters, x_seq, function=module):
        return torch.func.functional_call(function, parameters, (x_seq,)).square().sum()

    grads, others = torch.func.grad(loss)(parameters, x_seq), torch.func.grad(loss)(parameters, x_seq, model)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, others[key], rtol=1e-5, atol=1e-6)
    several = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([x_seq, x_seq]))
    for key, grad in several.items():
        torch.testing.assert_close(grad, others[key].expand(grad.shape), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda x_seq: torch.func.grad(loss, 1)(parameters, x_seq).square().sum())(x_seq)
    with pytest.raises(RuntimeError, match="forward-mode differentiation was asked for"):
        torch.func.jvp(lambda x_seq: loss(parameters, x_seq), (x_seq,), (x_seq,))
    dual_level = torch.autograd.forward_ad.dual_level()
    with pytest.raises(RuntimeError, match="forward-mode differentiation was asked for"), dual_level:
        module(torch.autograd.forward_ad.make_dual(x_seq, torch.ones_like(x_seq)))
