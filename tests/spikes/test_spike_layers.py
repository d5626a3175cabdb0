"""SpikeLinear, SpikeConv1d and SpikeConv2d are torch's layers with another product."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import asgl_cuda

pytestmark = pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="no compiled extension")

LAYERS = {  # torch's name, arguments, a sample
    "Linear": ("Linear", (12, 33), {}, (12,)),
    "Linear without bias": ("Linear", (12, 33), {"bias": False}, (12,)),
    "Conv1d": ("Conv1d", (4, 33, 3), {"padding": 1, "stride": 2}, (4, 9)),
    "Conv2d": ("Conv2d", (4, 33, 3), {"padding": 1}, (4, 6, 5)),
    "same": ("Conv2d", (4, 6, (4, 3)), {"padding": "same"}, (4, 6, 5)),
    "reflected": ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (4, 6, 5)),
    "circular": ("Conv1d", (4, 6, 3), {"padding": 2, "padding_mode": "circular"}, (4, 9)),
    "groups": ("Conv2d", (4, 6, 3), {"groups": 2}, (4, 6, 5)),
}


@pytest.fixture(autouse=True)
def no_graphs():
    """Those of earlier tests count as recompilations."""
    torch.compiler.reset()


@pytest.fixture(params=LAYERS)
def layers(request):
    """A layer of torch, ours with its state, and spikes [N, ...]."""
    torch.manual_seed(0)
    kind, arguments, options, sample = LAYERS[request.param]
    dense = getattr(nn, kind)(*arguments, **options)
    ours = getattr(asgl_cuda, f"Spike{kind}")(*arguments, **options)
    ours.load_state_dict(dense.state_dict())
    return dense, ours, (torch.rand(5, *sample) < 0.3).float()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def gradients(model, x):
    x = x.detach().requires_grad_()
    result = model(x)
    return result, *torch.autograd.grad(result.square().sum(), (x, *model.parameters()))


def test_computes_what_torchs_layer_does(layers):
    dense, ours, x = layers
    for found, expected in zip(gradients(ours, x), gradients(dense, x), strict=True):
        close(found, expected)
    close(ours(x[0]), dense(x[0]))
    assert repr(ours).removeprefix("Spike") == repr(dense)
    dense.load_state_dict(ours.state_dict())
    assert isinstance(ours, type(dense))


def test_a_step_has_the_bits_of_the_sequence(layers):
    """In evaluation by the kept copy of the weight, in training without."""
    _, ours, x = layers
    expected = ours(x)
    assert ours._copy is None
    ours.eval()
    for alone, row in zip(x, expected, strict=True):
        assert torch.equal(ours(alone.unsqueeze(0))[0], row)
        with torch.no_grad():
            assert torch.equal(ours(alone.unsqueeze(0))[0], row)
    assert (ours._copy is None) == (getattr(ours, "groups", 1) == 2)


def trained(layer):
    with torch.enable_grad():
        layer(torch.ones(1, *(layer.in_channels, 6, 5) if hasattr(layer, "in_channels") else (12,))).sum().backward()
    torch.optim.SGD(layer.parameters(), 1.0, fused=True).step()


CHANGES = {
    "in place": lambda layer: layer.weight.add_(1),
    "copied": lambda layer: layer.weight.copy_(torch.rand_like(layer.weight)),
    "state dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "data, and eval": lambda layer: (layer.weight.data.add_(1), layer.eval()),
    "data in training": lambda layer: (layer.train(), layer.weight.data.add_(1), layer.eval()),
    "type and back": lambda layer: (layer.double(), layer.weight.data.add_(1), layer.float()),
    "vector": lambda layer: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(layer.parameters()) + 1, layer.parameters()
    ),
    "fused optimizer": lambda layer: trained(layer),  # counts no version
    "pruned": lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_the_copy_follows_the_weight(name, change):
    from torch.nn.utils import prune  # noqa: F401

    torch.manual_seed(0)
    kind, arguments, options, sample = LAYERS[name]
    ours = getattr(asgl_cuda, f"Spike{kind}")(*arguments, **options).eval()
    x = (torch.rand(1, *sample) < 0.5).float()
    with torch.no_grad():
        before = ours(x)
        assert ours._copy is not None
        CHANGES[change](ours)
        again = type(ours)(*arguments, **options)  # in training: no copy
        again.weight.copy_(ours.weight)
        again.bias.copy_(ours.bias)
        assert torch.equal(ours(x), again(x))
        assert not torch.equal(ours(x), before)


def test_freed_weights_do_not_alias():
    """A weight at the address of an earlier one is another weight."""
    layer = asgl_cuda.SpikeLinear(16, 16).eval()
    x = torch.ones(1, 16)
    for value in range(5):
        layer.weight = nn.Parameter(torch.full((16, 16), float(value)))
        gc.collect()
        layer.bias.data.zero_()
        with torch.no_grad():
            assert (layer(x) == 16 * value).all()


def test_copies_and_files_have_no_copy_of_the_weight(layers):
    _, ours, x = layers
    ours.eval().requires_grad_(False)
    expected = ours(x[:1])
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert again._copy is None
        assert torch.equal(again(x[:1]), expected)
        with torch.no_grad():
            again.weight.zero_()
        assert torch.equal(ours(x[:1]), expected)


def test_compiled_and_exported(layers):
    _, ours, x = layers
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for found, expected in zip(gradients(compiled, x), gradients(ours, x), strict=True):
        close(found, expected)
    assert torch.equal(compiled(x), ours(x))
    exported = torch.export.export(ours, (x,))
    module = exported.module()
    assert torch.equal(module(x), ours(x))
    for found, expected in zip(gradients(module, x), gradients(ours, x), strict=True):
        close(found, expected)
    names = [str(node.target) for node in exported.graph.nodes]
    assert ("asgl_cuda.spike_product.default" in names) == (getattr(ours, "groups", 1) == 1)


@pytest.mark.slow  # compiles C++
def test_compiled_by_inductor():
    """A network with its gradients; a second batch size compiles nothing wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(
        asgl_cuda.OverTime(asgl_cuda.SpikeConv2d(4, 33, 3, padding=1)), asgl_cuda.BatchNormLIF(33, analog_prob=0.0),
        nn.Flatten(2), asgl_cuda.SpikeLinear(33 * 30, 10),
    )  # fmt: skip
    compiled = torch.compile(model, fullgraph=True)
    for samples in (3, 5, 6):
        x_seq = (torch.rand(2, samples, 4, 6, 5) < 0.3).float()
        for found, expected in zip(gradients(compiled, x_seq), gradients(model, x_seq), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(compiled.eval()(x_seq), model.eval()(x_seq))


def test_transforms(layers):
    dense, ours, x = layers
    found, expected = ({name: each.detach() for name, each in layer.named_parameters()} for layer in (ours, dense))

    def loss(layer, parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample.unsqueeze(0),)).square().sum()

    for layer, parameters in ((ours, found), (dense, expected)):
        per_sample = torch.func.vmap(torch.func.grad(lambda *a, layer=layer: loss(layer, *a)), in_dims=(None, 0))
        parameters["result"] = per_sample({**parameters}, x)
    for name, grad in expected["result"].items():
        close(found["result"][name], grad)
    assert torch.equal(torch.func.vmap(ours)(x), ours(x))
    close(torch.func.vmap(ours, in_dims=1)(x.unsqueeze(1).expand(5, 2, *x.shape[1:]))[1], dense(x))


def test_checkpointed(layers):
    _, ours, x = layers
    x.requires_grad_()
    expected = gradients(ours, x)
    result = checkpoint(ours, x, use_reentrant=False)
    for found, grad in zip(
        torch.autograd.grad(result.square().sum(), (x, *ours.parameters())), expected[1:], strict=True
    ):
        assert torch.equal(found, grad)


def test_saves_a_bit_for_each_spike():
    """Where the spikes are a neuron's, they are freed. An input without zeros is saved as it is."""
    saved = []
    layer = asgl_cuda.SpikeLinear(256, 64)
    x = (torch.rand(32, 256) < 0.1).float()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        layer(x)
        assert sum(each.nbytes for each in saved if each is not layer.weight) == 32 * 256 / 8
        saved.clear()
        layer(x * torch.rand_like(x))
        assert sum(each.nbytes for each in saved if each is not layer.weight) < 0.2 * x.nbytes
        saved.clear()
        dense = torch.rand_like(x) + 1
        layer(dense)
        assert [each.data_ptr() for each in saved if each is not layer.weight] == [dense.data_ptr()]


def test_in_a_network():
    """Over time, in steps, calibrated, with decayed weights, with recomputed spikes."""
    torch.manual_seed(0)

    def network(linear, convolution):
        return nn.Sequential(
            asgl_cuda.OverTime(convolution(2, 8, 3, padding=1)), asgl_cuda.LIF(analog_prob=0.0), nn.Flatten(2),
            linear(8 * 36, 20), asgl_cuda.LIF(analog_prob=0.0), linear(20, 5),
        )  # fmt: skip

    model, dense = network(asgl_cuda.SpikeLinear, asgl_cuda.SpikeConv2d), network(nn.Linear, nn.Conv2d)
    dense.load_state_dict(model.state_dict())
    x_seq = torch.rand(6, 3, 2, 6, 6) * 3
    close(model(x_seq), dense(x_seq))
    with asgl_cuda.recompute_spikes():
        found = gradients(model, x_seq)
    for ours, theirs in zip(found, gradients(dense, x_seq), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    asgl_cuda.calibrate(model, x_seq)
    asgl_cuda.calibrate(dense, x_seq)
    close(model[3].weight, dense[3].weight)
    groups, others = (asgl_cuda.parameter_groups(each, lr=1.0, weight_decay=0.1) for each in (model, dense))
    assert [len(each["params"]) for each in groups] == [len(each["params"]) for each in others]
    model.eval()
    with torch.no_grad():
        expected = model(x_seq)
        for x_t, row in zip(x_seq, expected, strict=True):
            assert torch.equal(asgl_cuda.step(model, x_t), row)
    with pytest.raises(ValueError, match=r"\[T, B, 2, H, W\] for SpikeConv2d"):
        model[0](x_seq[0])


def test_nir_has_the_dense_layers():
    pytest.importorskip("nir")
    torch.manual_seed(0)
    model = nn.Sequential(asgl_cuda.SpikeLinear(4, 3), asgl_cuda.LIF(width=1.0))
    dense = nn.Sequential(nn.Linear(4, 3), asgl_cuda.LIF(width=1.0))
    dense.load_state_dict(model.state_dict())
    ours, theirs = (asgl_cuda.to_nir(each, torch.rand(2, 1, 4)) for each in (model, dense))
    assert ours.edges == theirs.edges
    assert (ours.nodes["_0"].weight == theirs.nodes["_0"].weight).all()
    assert type(ours.nodes["_0"]) is type(theirs.nodes["_0"])
