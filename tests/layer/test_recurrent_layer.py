"""The layer of recurrent neurons: its parameters and states, and what it shares with `LIF`."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import asgl_cuda
from asgl_cuda import OverTime, RecurrentLIF

T, B, N = 6, 3, 8
LEARNED = {
    "learn_decay": True, "learn_threshold": True, "syn_decay": 0.6, "learn_syn_decay": True, "granularity": "neuron",
    "surrogate": "sigmoid",
}  # fmt: skip
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


def layer_of(backend="reference", device="cpu", **options):
    torch.manual_seed(0)
    layer = RecurrentLIF(N, **{"analog_prob": 0.0, "decay": 0.8, "width": 1.5, **options}, backend=backend).to(device)
    with torch.no_grad():
        layer.recurrent_weight *= 3  # else most spikes change nothing
    return layer


def network(backend="reference", device="cpu", inputs=5, **options):
    layer = layer_of(backend, device, **options)
    return nn.Sequential(nn.Linear(inputs, N), layer, nn.Linear(N, N), asgl_cuda.LIF(analog_prob=0.0)).to(device)


def sequence(*shape, device="cpu"):
    torch.manual_seed(1)
    return 3 * torch.rand(shape or (T, B, N), device=device) - 0.8


def gradients(out, *leaves):
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    return torch.autograd.grad((out * weights).sum(), leaves)


# ---- the function ----


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("time_dim", [0, 1])
def test_is_the_function_of_its_parameters(backend, device, granularity, time_dim):
    layer = layer_of(
        backend, device, **{**LEARNED, "granularity": granularity}, time_dim=time_dim, input_gain=0.9, v_rest=0.1
    )
    assert list(layer.state_dict()) == [
        "log_width", "logit_decay", "threshold", "recurrent_weight", "recurrent_bias", "logit_syn_decay"
    ]  # fmt: skip
    with torch.no_grad():
        for name in ("log_width", "logit_decay", "threshold", "logit_syn_decay"):
            parameter = getattr(layer, name)
            assert parameter.shape == ((1,) if granularity == "layer" else (N,))
            parameter += 0.2 * torch.rand_like(parameter)
    x_seq = sequence(device=device).movedim(0, time_dim).contiguous()
    expected = asgl_cuda.recurrent_lif(
        x_seq, layer.recurrent_weight, bias=layer.recurrent_bias, syn_decay=layer.logit_syn_decay.sigmoid(),
        width=layer.log_width.exp(), decay=layer.logit_decay.sigmoid(), v_threshold=layer.threshold, time_dim=time_dim,
        input_gain=0.9, v_rest=0.1, surrogate="sigmoid", backend=backend,
    )  # fmt: skip
    actual = layer(x_seq)
    assert actual.any()
    assert torch.equal(actual, expected)
    parameters = list(layer.parameters())
    for ours, theirs in zip(gradients(actual, *parameters), gradients(expected, *parameters), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_autapses_are_neither_used_nor_moved(backend, device):
    layer = layer_of(backend, device, autapses=False)
    x_seq = sequence(device=device)
    expected = layer(x_seq)
    with torch.no_grad():
        layer.recurrent_weight.fill_diagonal_(float("nan"))
    assert torch.equal(layer(x_seq), expected)
    (gradient,) = gradients(layer(x_seq), layer.recurrent_weight)
    assert not gradient.diagonal().any()
    assert gradient.any()
    assert torch.isfinite(gradient).all()


def test_elementwise_is_a_diagonal(backend, device):
    own, dense = layer_of(backend, device, recurrent="elementwise"), layer_of(backend, device)
    with torch.no_grad():
        dense.recurrent_weight.copy_(torch.diag(own.recurrent_weight))
        dense.recurrent_bias.copy_(own.recurrent_bias)
    x_seq = sequence(device=device)
    assert own.recurrent_weight.shape == (N,)
    assert torch.equal(own(x_seq), dense(x_seq))
    (ours,) = gradients(own(x_seq), own.recurrent_weight)
    (theirs,) = gradients(dense(x_seq), dense.recurrent_weight)
    torch.testing.assert_close(ours, theirs.diagonal(), rtol=1e-5, atol=1e-5)


def test_detached_recurrence_keeps_the_gradient_of_the_weight(backend, device):
    layer = layer_of(backend, device, detach_recurrent=True, surrogate="sigmoid")
    x_seq = sequence(device=device).requires_grad_()
    alone = layer_of(backend, device, surrogate="sigmoid", recurrent="elementwise", bias=False)
    with torch.no_grad():
        alone.recurrent_weight.zero_()
    last = (torch.arange(T, device=device) == T - 1).reshape(-1, 1, 1)
    ours, weight = torch.autograd.grad((layer(x_seq) * last).sum(), [x_seq, layer.recurrent_weight])
    assert weight.any()
    # What the last step has from the others comes through each neuron's own potential.
    one = torch.autograd.grad((layer(x_seq)[-1, :, 0]).sum(), x_seq)[0]
    assert not one[..., 1:].any()
    assert ours[0].any()


# ---- states ----


@pytest.mark.parametrize("syn_decay", [None, 0.7])
def test_calls_and_steps_are_the_sequence(backend, device, syn_decay):
    options = {"syn_decay": syn_decay, "surrogate": "sigmoid"}
    x_seq = sequence(device=device).requires_grad_()
    expected = layer_of(backend, device, **options)(x_seq)
    layer = layer_of(backend, device, stateful=True, store_v_seq=True, **options)
    parts = torch.cat([layer(x_seq[:2]), layer(x_seq[2:])])
    assert torch.equal(parts, expected)
    assert torch.equal(layer.s, expected[-1])
    assert (layer.i is None) == (syn_decay is None)
    assert layer.v_seq.shape == (T - 2, B, N)
    for ours, theirs in zip(gradients(parts, x_seq), gradients(expected, x_seq), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    states = [name for name in ("v", "s", "i") if getattr(layer, name) is not None]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(torch.equal(getattr(copied, name), getattr(layer, name)) for name in states)
    asgl_cuda.detach(nn.Sequential(layer))
    assert not any(getattr(layer, name).requires_grad for name in states)
    layer.double()
    assert all(getattr(layer, name).dtype == torch.float64 for name in states)
    layer = layer_of(backend, device, **options)
    for call in (layer.step, lambda x: asgl_cuda.step(layer, x)):
        asgl_cuda.reset(layer)
        assert layer.v is layer.s is layer.i is None
        assert torch.equal(torch.stack([call(x) for x in x_seq]), expected)
    assert torch.equal(layer(x_seq), expected), "a layer that is not stateful starts at rest"


def test_a_state_of_another_shape_is_refused(backend, device):
    layer = layer_of(backend, device, stateful=True)
    layer(sequence(device=device))
    layer.v = None
    with pytest.raises(ValueError, match=r"carried s has shape \[3, 8\] and the input, without time, \[2, 8\]"):
        layer(sequence(T, 2, N, device=device))


# ---- parameters ----


def test_state_dict_copies_and_first_values():
    layer, other = layer_of(**LEARNED), RecurrentLIF(N, **LEARNED)
    bound = N**-0.5
    assert other.recurrent_weight.abs().max() <= bound < 1.5 * other.recurrent_weight.abs().max()
    assert other.recurrent_bias.abs().max() <= bound
    assert other.logit_syn_decay.sigmoid().tolist() == pytest.approx([0.6] * N)
    other.load_state_dict(layer.state_dict())
    x_seq = sequence()
    layer.eval()
    expected = layer(x_seq)
    for each in (other.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(each(x_seq), expected)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(5.0)
    layer.reset_parameters()
    assert layer.recurrent_weight.abs().max() <= bound
    assert layer.syn_decay.tolist() == pytest.approx([0.6] * N)
    assert layer.decay.tolist() == pytest.approx([0.8] * N)


def test_meta_device():
    layer = RecurrentLIF(N, **LEARNED, device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.zeros(T, B, N, device="meta")).is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert 0 < layer.recurrent_weight.abs().max() <= N**-0.5
    assert layer.syn_decay.tolist() == pytest.approx([0.6] * N)
    assert layer(sequence()).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(backend, device, dtype):
    """Parameters of half types are computed with as float32."""
    layer = layer_of(backend, device, **LEARNED).to(dtype)
    x_seq = sequence(device=device).to(dtype)
    out = layer(x_seq)
    assert out.dtype == dtype
    assert torch.equal(out, copy.deepcopy(layer).float()(x_seq))
    out.sum().backward()
    assert layer.recurrent_weight.grad.dtype == dtype
    assert layer.recurrent_weight.grad.any()


def test_parameter_groups():
    model = network(**LEARNED, analog_prob=0.2)
    named = {id(value): name for name, value in model.named_parameters()}
    groups = asgl_cuda.parameter_groups(model, lr=0.1, norm_weight_decay=0.0)
    found = {group["name"]: {named[id(value)] for value in group["params"]} for group in groups}
    assert found == {
        "weights": {"0.weight", "1.recurrent_weight", "2.weight"},
        "norms": {"0.bias", "1.recurrent_bias", "2.bias"},
        "neurons": {"1.logit_decay", "1.threshold", "1.logit_syn_decay"},
        "widths": {"1.log_width", "3.log_width"},
    }


def test_a_parameter_is_the_first_value_of_syn_decay():
    given = nn.Parameter(torch.tensor(0.25))
    layer = RecurrentLIF(N, syn_decay=given, learn_syn_decay=True)
    assert layer.syn_decay.item() == pytest.approx(0.25)
    assert "_syn_decay" not in dict(layer.named_parameters())
    assert RecurrentLIF(N, syn_decay=given.requires_grad_(False)).syn_decay == 0.25


def test_extra_repr():
    text = repr(RecurrentLIF(N, recurrent="elementwise", bias=False, syn_decay=0.5, detach_recurrent=True, decay=0.9))
    assert text.startswith(
        f"RecurrentLIF({N}, recurrent=elementwise, bias=False, syn_decay=0.5, detach_recurrent=True,"
    )
    assert "decay=0.9" in text
    text = repr(RecurrentLIF(N, autapses=False, syn_decay=0.5, learn_syn_decay=True))
    assert "recurrent=dense, autapses=False, syn_decay=0.5 (learned)" in text


@pytest.mark.parametrize(("given", "error", "message"), [
    ({"recurrent": "conv"}, ValueError, "recurrent must be"),
    ({"recurrent": "elementwise", "autapses": False}, ValueError, "has autapses alone, got autapses=False"),
    ({"hidden_size": 0}, ValueError, "hidden_size"),
    ({"hidden_size": (2, 3)}, TypeError, "hidden_size must be an int"),
    ({"bias": 1}, TypeError, "bias must be a bool"),
    ({"autapses": None}, TypeError, "autapses must be a bool"),
    ({"detach_recurrent": "no"}, TypeError, "detach_recurrent must be a bool"),
    ({"learn_syn_decay": True}, ValueError, "learn_syn_decay needs syn_decay"),
    ({"syn_decay": 1.5}, ValueError, "syn_decay must be in"),
    ({"syn_decay": 1.0, "learn_syn_decay": True}, ValueError, "a learned syn_decay must be in"),
    ({"levels": 4}, TypeError, "levels"),
    ({"multi_spike": True}, TypeError, "multi_spike"),
    ({"v_min": -1.0}, TypeError, "v_min"),
    ({"num_features": 4}, TypeError, "num_features"),
])  # fmt: skip
def test_errors(given, error, message):
    with pytest.raises(error, match=message) as raised:
        RecurrentLIF(**{"hidden_size": N, **given})
    assert "asgl_cuda.RecurrentLIF" in str(raised.value)


def test_no_residual_and_no_other_shape():
    layer = layer_of()
    with pytest.raises(TypeError, match="takes no residual"):
        layer(sequence(), sequence())
    with pytest.raises(ValueError, match=r"x_seq must have shape \[T, B, N\]"):
        layer(sequence(T, B, 2, N))
    with pytest.raises(ValueError, match="weight must have shape"):
        layer(sequence(T, B, N + 1))


# ---- what it shares with LIF ----


@pytest.mark.parametrize("analog_prob", [0.0, 0.5])
@pytest.mark.parametrize("scale_output", [False, True])
def test_monitor_measures_potentials(backend, device, scale_output, analog_prob):
    """Also of spikes whose height is the threshold, from the carried states and with the same noise."""
    options = {"syn_decay": 0.7, "v_threshold": 0.4, "scale_output": scale_output, "stateful": True}
    layer = layer_of(backend, device, **options, analog_prob=analog_prob, surrogate="sigmoid")
    x_seq = sequence(device=device)
    torch.manual_seed(2)
    expected = [layer(x_seq[:3]), layer(x_seq[3:])]
    asgl_cuda.reset(layer)
    torch.manual_seed(2)
    with asgl_cuda.Monitor(layer) as monitor:
        found = [layer(x_seq[:3]), layer(x_seq[3:])]
    assert all(map(torch.equal, found, expected))
    values = monitor.result()[""]
    height = 0.4 if scale_output else 1.0
    s_seq = torch.cat(expected)
    hard = (s_seq == 0) | (s_seq == height)
    if not analog_prob:
        assert values["firing_rate"] == pytest.approx((s_seq > 0).double().mean().item())
        assert values["analog_share"] == 0
    else:
        assert values["analog_share"] == pytest.approx(1 - hard.double().mean().item())
        assert 0.2 < values["analog_share"] < 0.8
    assert 0 < values["inside"] < 1
    assert values["smoothing_error"] > 0


def test_calibrate(backend, device):
    """By the weights in front; those that return the spikes stay."""
    model = network(backend, device, syn_decay=0.5)
    x_seq = torch.randn(20, 16, 5, device=device)
    before = model[1].recurrent_weight.clone()
    report = asgl_cuda.calibrate(model, x_seq, 0.2)
    assert [(row.layer, row.weight) for row in report.layers] == [("1", "0.weight"), ("3", "2.weight")]
    model.eval()
    for layer in (model[:2], model):
        assert layer(x_seq).mean().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(model[1].recurrent_weight, before)
    with pytest.raises(ValueError, match=r"asgl_cuda\.calibrate: 0: its input must .*, got a path without weight"):
        asgl_cuda.calibrate(nn.Sequential(model[1], asgl_cuda.LIF().to(device)), model[0](x_seq), 0.2)


def test_recomputed_spikes(backend, device):
    model = network(backend, device, analog_prob=0.5)
    x_seq = torch.randn(T, B, 5, device=device)
    results = []
    for context in (nullcontext, asgl_cuda.recompute_spikes):
        torch.manual_seed(3)
        with context():
            out = model(x_seq)
        results.append((out, *gradients(out, *model.parameters())))
    assert all(map(torch.equal, *results))


def test_left_by_fuse_and_refused_by_to_nir(backend, device):
    x_seq = sequence(device=device)
    model = nn.Sequential(nn.Linear(N, N), OverTime(nn.BatchNorm1d(N)), layer_of(backend)).to(device)
    fused, report = asgl_cuda.fuse(model, x_seq)
    assert not report.replaced
    assert [row.path for row in report.left] == ["1.layer"]
    assert torch.equal(fused(x_seq), copy.deepcopy(model)(x_seq))
    undecided, _ = asgl_cuda.fuse(model)
    assert torch.equal(undecided(x_seq), fused(x_seq))
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    with pytest.raises(ValueError, match=r"asgl_cuda\.to_nir: .*\(RecurrentLIF\).*can't be represented in NIR"):
        asgl_cuda.to_nir(nn.Sequential(nn.Linear(N, N), layer_of()), sequence())


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, device, strict):
    model = network(backend, device, **LEARNED)
    x_seq = torch.randn(T, B, 5, device=device)
    expected = model(x_seq)
    exported = torch.export.export(model, (x_seq,), strict=strict).module()
    actual = exported(x_seq)
    assert torch.equal(actual, expected)
    theirs = dict(model.named_parameters())
    ours = dict(exported.named_parameters())
    found = gradients(actual, *(ours[name] for name in theirs))
    for name, mine, other in zip(theirs, found, gradients(expected, *theirs.values()), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, device, use_reentrant):
    layer = layer_of(backend, device, **{**LEARNED, "analog_prob": 0.5})
    leaves = [sequence(device=device).requires_grad_(), *layer.parameters()]
    results = []
    for call in (layer, lambda x_seq: checkpoint(layer, x_seq, use_reentrant=use_reentrant)):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(3)
        out = call(leaves[0])
        torch.rand(7, device=device)  # between forward and the second one
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *results))


# ---- several processes ----


def trained(model, x_seq):
    """Two calls, whose states go on, a step of an optimizer in between."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        out = model(x_seq)
        optimizer.zero_grad()
        out.square().sum().backward()
        optimizer.step()
        asgl_cuda.detach(model)
    return out.detach()


def smooth():
    layer = layer_of(**LEARNED, analog_prob=1.0, stateful=True)
    return nn.Sequential(nn.Linear(5, N), layer, nn.Linear(N, 2)).double()


def joint():
    torch.manual_seed(4)
    return torch.randn(T, 4, 5, dtype=torch.float64)


def _in_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        module = smooth()
        model = DistributedDataParallel(module)
        model.register_comm_hook(None, _sum)
        out = trained(model, joint()[:, 2 * rank : 2 * rank + 2])
        torch.save((out, module.state_dict(), module[1].s), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def _sum(_, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


@needs_gloo
def test_distributed_data_parallel(tmp_path):
    """Two processes with parts of a batch, and states of their own, are as one with the whole."""
    module = smooth()
    expected = trained(module, joint())
    mp.spawn(_in_process, (str(tmp_path),), 2)
    results = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    torch.testing.assert_close(torch.cat([out for out, *_ in results], 1), expected)
    torch.testing.assert_close(torch.cat([s for *_, s in results]), module[1].s)
    for _, state, _ in results:
        for name, value in module.state_dict().items():
            torch.testing.assert_close(state[name], value)


@needs_gloo
@pytest.mark.parametrize("recurrent", ["dense", "elementwise"])
def test_fully_shard(tmp_path, recurrent):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def make():
        layer = layer_of(**LEARNED, recurrent=recurrent)  # which sets the seed
        return nn.Sequential(nn.Linear(5, N), layer, nn.Linear(N, 2))

    plain, sharded = make(), make()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        for module in (sharded[1], sharded):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        x_seq = torch.randn(T, B, 5)
        assert torch.equal(*(trained(model, x_seq) for model in (plain, sharded)))
        for name, value in sharded.state_dict().items():
            assert torch.equal(value.full_tensor(), plain.state_dict()[name]), name
    finally:
        dist.destroy_process_group()
