"""State, copies and errors of models under `fuse` and `unfuse`."""

import copy
import gc
import pickle
import weakref

import norse.torch as norse
import pytest
import torch
from conversions import B, C, T, history, monitored, scattered
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda.interop.normalised import Normalised, PassedThrough
from asgl_cuda.over_time import OverTime

pytestmark = pytest.mark.usefixtures("in_double")


def net(backend="reference"):
    """One pair of ours, one of SpikingJelly's."""
    made = nn.Sequential(
        OverTime(nn.Sequential(nn.Linear(6, C), nn.BatchNorm1d(C))),
        asgl_cuda.LIF(C, granularity="channel", analog_prob=0.0, backend=backend),
        layer.BatchNorm1d(C, step_mode="m"),
        neuron.ParametricLIFNode(step_mode="m"),
    )
    asgl_cuda.convert(made, inplace=True, backend=backend)
    return scattered(made)


def test_a_copy_is_fused_unless_inplace_is_said():
    model = net()
    classes = [type(module) for module in model.modules()]
    fused, _ = asgl_cuda.fuse(model)
    assert [type(module) for module in model.modules()] == classes
    same, _ = asgl_cuda.fuse(model, inplace=True)
    assert same is model
    for made in (fused, same):
        assert isinstance(made[0].layer[1], PassedThrough)
        assert isinstance(made[1], Normalised)
        assert type(made[1]).__name__ == "NormalisedLIF"
        assert type(made[2]).__name__ == "PassedBatchNorm1d"
        assert isinstance(made[2], layer.BatchNorm1d)
        assert isinstance(made[3], neuron.ParametricLIFNode)
    kept, _ = asgl_cuda.unfuse(same)
    assert isinstance(same[1], Normalised)
    assert not isinstance(kept[1], Normalised)
    assert asgl_cuda.unfuse(same, inplace=True)[0] is model
    assert [type(module) for module in model.modules()] == classes


def test_fuse_converts_and_unfuse_gives_back_what_was_there():
    model = nn.Sequential(layer.BatchNorm1d(C, step_mode="m"), neuron.LIFNode(step_mode="m"))
    before = set(vars(model[1]))
    fused, report = asgl_cuda.fuse(model)
    assert report.replaced == [("1", "LIFNode", "normalises as well, instead of 0")]
    assert type(fused[1]).__name__ == "NormalisedConvertedLIFNode"
    back, report = asgl_cuda.unfuse(fused)
    assert report.replaced == [("1", "NormalisedConvertedLIFNode", "LIFNode")]
    assert type(back[1]) is neuron.LIFNode
    assert set(vars(back[1])) == before
    converted, _ = asgl_cuda.convert(model)
    back, _ = asgl_cuda.unfuse(asgl_cuda.fuse(converted)[0])
    assert type(back[1]).__name__ == "ConvertedLIFNode"


def test_names_parameters_and_checkpoints(backend):
    model = net(backend)
    fused, _ = asgl_cuda.fuse(model)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    other = net(backend)
    with torch.no_grad():
        other[0].layer[1].weight.fill_(0.1)
        other[2].running_mean.fill_(0.2)
    for made in (model, fused):
        assert made.load_state_dict(other.state_dict()) == ([], [])
    x_seq = torch.randn(T, B, 6)
    torch.testing.assert_close(fused.eval()(x_seq), model.eval()(x_seq))
    model.train()(x_seq)
    functional.reset_net(model)
    fused.load_state_dict(model.state_dict())
    model.load_state_dict(fused.state_dict())
    assert fused[2].num_batches_tracked == model[2].num_batches_tracked == 1


def test_an_optimizer_goes_on(backend):
    """The model's optimizer trains the model fused in place."""
    model = net(backend)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(made.parameters(), lr=0.5, momentum=0.9) for made in (model, twin)]
    for step in range(4):
        if step == 1:
            asgl_cuda.fuse(model, inplace=True)
        if step == 3:
            asgl_cuda.unfuse(model, inplace=True)
        x_seq, grad = torch.randn(T, B, 6), torch.randn(T, B, C)
        for made, optimizer in zip((model, twin), optimizers, strict=True):
            functional.reset_net(made)
            optimizer.zero_grad()
            (made(x_seq) * grad).sum().backward()
            optimizer.step()
    assert not torch.equal(model[0].layer[1].weight, net()[0].layer[1].weight)
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "fuse again", "of a model that has run"])
def test_copies(how, backend, tmp_path):
    model = net(backend)
    x_seq = torch.randn(T, B, 6)
    if how == "of a model that has run":
        model(x_seq)
        functional.reset_net(model)
    fused, _ = asgl_cuda.fuse(model)
    if how == "of a model that has run":
        twin = copy.deepcopy(fused)
    else:
        fused(x_seq)  # potentials are inside a graph now
        functional.reset_net(fused)
    if how == "pickle":
        torch.save(fused, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(pickle.loads(pickle.dumps(fused))) is nn.Sequential
    elif how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "fuse again":
        twin, report = asgl_cuda.fuse(fused)
        assert report == ([], [])
    for made in (fused, twin):
        assert [type(module) for module in made.modules()] == [type(module) for module in fused.modules()]
        assert made[1].normalisation.norm is made[0].layer[1]
        assert made[3].normalisation.norm is made[2]
    assert twin[2] is not fused[2]
    found, expected = (history(made, x_seq, lambda model, x: model(x)) for made in (twin, fused))
    torch.testing.assert_close(found, expected)
    back, report = asgl_cuda.unfuse(twin)
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert len(report.replaced) == 2


def test_types_and_devices(backend):
    fused = asgl_cuda.fuse(net(backend))[0].half()
    assert fused[1].normalisation.norm.weight.dtype == torch.float16
    out = fused(torch.randn(T, B, 6, dtype=torch.float16))
    assert out.dtype == torch.float16
    assert out.isfinite().all()
    assert {value.device.type for value in fused.to("meta").state_dict().values()} == {"meta"}
    assert fused[3].normalisation.norm.running_mean.device.type == "meta"


def test_convert_and_revert_know_fused_layers():
    fused, _ = asgl_cuda.fuse(net())
    classes = [type(module) for module in fused.modules()]
    again, report = asgl_cuda.convert(fused)
    assert report == ([], [])
    assert [type(module) for module in again.modules()] == classes
    back, report = asgl_cuda.revert(fused)
    assert [type(module) for module in back.modules()] == classes
    assert report.left == [
        ("3", "ParametricLIFNode", "it is fused with a normalisation: asgl_cuda.unfuse comes first"),
    ]  # fmt: skip
    plain = asgl_cuda.revert(asgl_cuda.unfuse(fused)[0])[0]
    assert type(plain[3]) is neuron.ParametricLIFNode


def test_fusing_after_training_the_rest_of_the_kit(backend):
    """Monitor, schedule and parameter groups see a LIF; monitoring changes no statistics."""
    model = scattered(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.5, backend=backend)))
    fused, _ = asgl_cuda.fuse(model)
    x_seq = torch.randn(T, B, C)
    found = [monitored(made, x_seq, "1") for made in (model, fused)]
    assert found[1].pop("constant") == 0  # no channel of the normalisation
    assert found[1] == pytest.approx(found[0])
    assert found[0]["analog_share"] > 0
    assert fused[0].layer.num_batches_tracked == 1
    torch.testing.assert_close(fused[0].layer.running_mean, model[0].layer.running_mean)
    sizes = [[len(group["params"]) for group in asgl_cuda.parameter_groups(made, 0.1)] for made in (model, fused)]
    assert sizes[0] == sizes[1]


def test_unfusing_a_part():
    fused, _ = asgl_cuda.fuse(net())
    part, report = asgl_cuda.unfuse(fused[:1])
    assert report.left == [("0.layer.1", "PassedBatchNorm1d", "the neurons that compute it are not in this model")]
    assert isinstance(part[0].layer[1], PassedThrough)
    _, report = asgl_cuda.unfuse(fused[1:2], inplace=True)
    assert len(report.replaced) == 1
    assert type(fused[0].layer[1]) is nn.BatchNorm1d
    assert isinstance(fused[2], PassedThrough)


def folded(model):
    conv, norm = model[0].layer
    model[0].layer[0] = fuse_linear_bn_eval(conv, norm)
    model[0].layer[1] = nn.Identity()


def set_aside(model):
    model[0]._modules["layer"] = nn.Sequential(model[0].layer[0], nn.BatchNorm1d(C))


EXCHANGES = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "folded": folded,
    "with what holds it": set_aside,
    "the neurons": lambda model: model.__setitem__(1, nn.ReLU()),
}


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", EXCHANGES)
def test_one_of_a_pair_is_exchanged(name, copied):
    """The other layer would normalise twice or not at all; unfuse gives it the model's current values."""
    parts = OverTime(nn.Sequential(nn.Linear(6, C), nn.BatchNorm1d(C))), asgl_cuda.LIF(analog_prob=0.0)
    model = scattered(nn.Sequential(*parts)).eval()
    x_seq = torch.randn(T, B, 6)
    fused, _ = asgl_cuda.fuse(model)
    fused = copied(fused) if copied else fused
    torch.testing.assert_close(fused(x_seq), model(x_seq))
    held = [*fused.modules()]  # other references to them
    for made in (model, fused):
        EXCHANGES[name](made)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"asgl_cuda\.fuse: .* not there any more.*: asgl_cuda\.unfuse takes"):
            fused(x_seq)
    again, report = asgl_cuda.unfuse(fused)
    assert (len(report.replaced), report.left) == (1, [])
    if "Batch" in name or "holds" in name:
        again, report = asgl_cuda.fuse(again)
        assert len(report.replaced) == 1
    torch.testing.assert_close(again(x_seq), model(x_seq))
    assert held


def test_a_pair_that_is_moved_wrapped_or_called_in_part():
    """Both are still in the model, or this is unknown."""

    def pair():
        return asgl_cuda.fuse(scattered(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.0))))[0]

    torch.manual_seed(0)
    x_seq = torch.randn(T, B, C)
    torch.manual_seed(1)
    expected = pair()(x_seq)
    assert expected.any()

    def wrapped(model):
        model[0].layer = nn.Sequential(model[0].layer)
        model[1] = nn.Sequential(model[1])

    def called_again(model):
        model(x_seq)
        return checkpoint(model[1], x_seq.requires_grad_(), use_reentrant=False)

    changes = {
        "wrapped": wrapped, "moved": lambda model: model.insert(0, nn.Identity()),
        "a slice": lambda model: nn.Sequential(*model), "alone": lambda model: copy.deepcopy(model[1])(x_seq),
        "called again": called_again,
    }  # fmt: skip
    for name, change in changes.items():
        torch.manual_seed(1)
        model = pair()
        changed = change(model)
        out = changed if isinstance(changed, torch.Tensor) else (changed or model)(x_seq)
        torch.testing.assert_close(out, expected, msg=name)
        if out.requires_grad:
            out.sum().backward()


def test_an_exchange_in_a_compiled_model():
    torch._dynamo.reset()
    model = asgl_cuda.fuse(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF(analog_prob=0.0)))[0].eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x_seq = torch.randn(T, B, C)
    assert torch.equal(compiled(x_seq), model(x_seq))
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(Exception, match="would normalise a second time"):
        compiled(x_seq)
    torch._dynamo.reset()


def test_a_model_is_freed_without_the_collector():
    gc.disable()
    try:
        model = weakref.ref(asgl_cuda.fuse(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF()))[0])
        assert model() is None
    finally:
        gc.enable()


def test_repr():
    shown = repr(asgl_cuda.fuse(net())[0])
    assert "NormalisedLIF([3], width=1 (learned)" in shown
    assert "normalised by BatchNorm1d" in shown
    assert "PassedBatchNorm1d(3, eps=1e-05" in shown
    alone = asgl_cuda.fuse(nn.Sequential(nn.BatchNorm1d(C), norse.LIFBoxCell()))[0]
    assert "normalised by BatchNorm1d" in repr(alone)


def test_errors_of_a_call():
    fused, _ = asgl_cuda.fuse(net())
    with pytest.raises(ValueError, match=r"asgl_cuda\.batch_norm_lif: running_mean must have shape \[4\]"):
        asgl_cuda.fuse(nn.Sequential(OverTime(nn.BatchNorm1d(C)), asgl_cuda.LIF()))[0].eval()(torch.randn(T, B, 4))
    with pytest.raises(ValueError, match="needs more than one value a channel"):
        fused[1:2](torch.randn(1, 1, C))


def test_a_model_without_normalisations():
    assert asgl_cuda.fuse(nn.Sequential(nn.Linear(2, 2), asgl_cuda.LIF()))[1] == ([], [])
    assert asgl_cuda.unfuse(nn.Sequential(nn.Linear(2, 2), asgl_cuda.LIF()))[1] == ([], [])


def test_processes_that_share_their_statistics(monkeypatch):
    """A layer names its processes, by default all; a BatchNorm has none. layer/test_distributed.py runs two."""
    from asgl_cuda.interop import normalised

    asked = []
    monkeypatch.setattr(
        normalised,
        "module_batch_norm_lif",
        lambda norm, x_seq, **options: asked.append(options["process_group"]) or x_seq,
    )
    for norm in (nn.SyncBatchNorm(C), nn.SyncBatchNorm(C, process_group="some"), nn.BatchNorm1d(C)):
        asgl_cuda.fuse(nn.Sequential(OverTime(norm), asgl_cuda.LIF()), inplace=True)[0](torch.randn(T, B, C))
    assert asked == ["world", "some", None]
