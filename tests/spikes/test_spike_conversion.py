"""Models whose layers become spike layers where their inputs are sparse, and back."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import asgl_cuda
from asgl_cuda import LIF

pytestmark = pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="no compiled extension")


def network():
    torch.manual_seed(0)
    quiet = partial(LIF, analog_prob=0.0)
    return nn.Sequential(
        asgl_cuda.OverTime(nn.Conv2d(2, 40, 3)), quiet(), asgl_cuda.OverTime(nn.Conv2d(40, 40, 3)), quiet(),
        nn.Flatten(2), nn.Linear(160, 64), quiet(v_threshold=0.3), nn.Linear(64, 64), nn.Linear(64, 48, bias=False),
        quiet(), nn.Linear(48, 5),
    )  # fmt: skip


def test_sparse_layers_of_a_network():
    model, x_seq = network(), torch.rand(5, 3, 2, 6, 6)
    optimizer = torch.optim.Adam(model.parameters())
    parameters, expected = list(model.parameters()), model(x_seq)
    found, report = asgl_cuda.to_spike_layers(model, x_seq)
    assert found is model
    replaced = {row.path: row.by for row in report.replaced}
    assert list(replaced) == ["2.layer", "5", "7"]
    assert replaced["2.layer"].startswith("SpikeConv2d, 0.")
    left = {row.path: row.reason for row in report.left}
    assert "fewer than 32 channels" in left["0.layer"]
    assert "too dense" in left["8"]
    assert "fewer than 32 outputs" in left["10"]
    assert all(mine is other for mine, other in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x_seq), expected, rtol=1e-4, atol=1e-4)
    model(x_seq).sum().backward()
    optimizer.step()
    assert model.training
    assert asgl_cuda.to_spike_layers(model, x_seq)[1].replaced == []
    back, report = asgl_cuda.from_spike_layers(model)
    assert [row.path for row in report.replaced] == list(replaced)
    assert not any("Spike" in type(each).__name__ for each in back.modules())


def test_layers_that_are_left():
    torch.manual_seed(0)

    class Own(nn.Linear):
        pass

    class OnZeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.normed = Own(64, 64), weight_norm(nn.Linear(64, 64))
            self.rounded, self.grouped = nn.Linear(64, 64).bfloat16(), nn.Conv1d(64, 64, 3, groups=2)
            self.unused = nn.Linear(64, 64)

        def forward(self, x):
            return self.own(x), self.normed(x), self.rounded(x.bfloat16()), self.grouped(x.t())

    _, report = asgl_cuda.to_spike_layers(nn.Linear(32, 64), torch.zeros(64, 32))
    assert report.left[0].reason == "too small to gain: it has 32 inputs and 64 outputs"

    class Casting(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    model = nn.Sequential(Casting(64, 64), nn.Linear(64, 64))
    rows = asgl_cuda.to_spike_layers(model, torch.zeros(3, 64, dtype=torch.int32))[1].left
    assert [row.path for row in rows] == ["0", "1"]
    assert "subclass" in rows[0].reason

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(input=x)

    assert asgl_cuda.to_spike_layers(Named(), torch.zeros(2, 64))[1].replaced
    replaced, left = asgl_cuda.to_spike_layers(OnZeros(), torch.zeros(64, 64))[1]
    assert replaced == []
    reasons = ["subclass", "subclass", "float32 and float64", "groups", "does not reach"]
    assert all(reason in row.reason for reason, row in zip(reasons, left, strict=True)), left
    with pytest.raises(TypeError, match=r"to_spike_layers: model must be a torch.nn.Module, got int"):
        asgl_cuda.to_spike_layers(3, None)
    for example, kind in ((None, "NoneType"), ("x", "str")):
        with pytest.raises(TypeError, match=rf"to_spike_layers: input must be a tensor, got {kind}"):
            asgl_cuda.to_spike_layers(nn.Linear(64, 64), example)
    error = (
        r"to_spike_layers: example must be an input .*, got a tensor of shape \[3, 7\].*, with which the model raises"
    )
    with pytest.raises(ValueError, match=error):
        asgl_cuda.to_spike_layers(nn.Linear(64, 64), torch.zeros(3, 7))


MODELS = {
    "as they are": lambda model, example: model,
    "converted": lambda model, example: asgl_cuda.convert(model)[0],
    "fused": lambda model, example: asgl_cuda.fuse(asgl_cuda.convert(model)[0], example)[0],
}


@pytest.mark.parametrize("change", MODELS)
def test_models_of_other_libraries(change):
    snntorch = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), snntorch.Leaky(0.9, init_hidden=True), nn.Linear(64, 64),
        snntorch.Leaky(0.9, init_hidden=True),
    )  # fmt: skip
    x = torch.randn(8, 20)
    model, report = asgl_cuda.to_spike_layers(MODELS[change](model, x), x)
    assert [row.path for row in report.replaced] == ["2"]
    assert model(x).shape == (8, 64)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("change", MODELS)
def test_spikingjellys_layers(change, step_mode):
    """They go over the steps themselves; copies and files too, and back."""
    jelly = pytest.importorskip("spikingjelly.activation_based")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 40, 3), layer.BatchNorm2d(40), neuron.LIFNode(), layer.Conv2d(40, 40, 3, bias=False),
        layer.BatchNorm2d(40), neuron.LIFNode(), layer.Flatten(), layer.Linear(160, 48), neuron.IFNode(),
    )  # fmt: skip
    functional.set_step_mode(net, step_mode)
    x_seq = torch.rand(5, 3, 2, 6, 6) * 2
    example = x_seq if step_mode == "m" else x_seq[0]

    def outputs(model):
        jelly.functional.reset_net(model)
        with torch.no_grad():
            return model(x_seq) if step_mode == "m" else torch.stack([model(x_t) for x_t in x_seq])

    model = MODELS[change](net, example).eval()
    expected, kinds = outputs(model), [type(each) for each in model]
    model, report = asgl_cuda.to_spike_layers(model, example)
    assert [(row.path, row.layer) for row in report.replaced] == [("3", "Conv2d"), ("7", "Linear")]
    assert isinstance(model[3], asgl_cuda.SpikeConv2d)
    assert isinstance(model[3], layer.Conv2d)
    assert asgl_cuda.to_spike_layers(model, example)[1].replaced == []
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(outputs(again), expected)
        assert isinstance(again[7], asgl_cuda.SpikeLinear)
        assert again[3].step_mode == step_mode
    model, report = asgl_cuda.from_spike_layers(model)
    assert [row.by for row in report.replaced] == ["Conv2d", "Linear"]
    assert [type(each) for each in model] == kinds
