"""Several processes: two with parts of a batch have the results of one with the joint batch."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import asgl_cuda
from asgl_cuda import OverTime

PROCESSES = 2
BATCHES = (3, 5)  # unequal sizes
BACKENDS = [name for name in ("reference", "cpu") if name in asgl_cuda.available_backends()]

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


def joint_batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, sum(BATCHES), 3, 5, dtype=torch.float64, generator=generator) * 2 + 5


def share(x_seq, rank):
    first = sum(BATCHES[:rank])
    return x_seq[:, first : first + BATCHES[rank]]


def options(backend):
    """Smooth, so that roundings decide no spike."""
    torch.manual_seed(0)
    return {"surrogate": "sigmoid", "backend": backend, "analog_prob": 1.0}


def network(backend, group=None):
    """Two layers, so that the second's input gradient flows through the first."""
    given = options(backend)
    first, second = (asgl_cuda.BatchNormLIF(3, process_group=each, **given) for each in (group, "world"))
    return nn.Sequential(first, nn.Linear(5, 4), second).double()


def pair(backend, norm):
    return nn.Sequential(OverTime(norm), asgl_cuda.LIF(**options(backend))).double()


def three(backend):
    """A fused pair, weights, and a BatchNormLIF."""
    joined, report = asgl_cuda.fuse(pair(backend, nn.BatchNorm1d(3)), joint_batch())
    assert len(report.replaced) == 1
    return nn.Sequential(joined, nn.Linear(5, 4), asgl_cuda.BatchNormLIF(3, **options(backend))).double()


def returning(backend):
    """A recurrent layer, whose states of two calls are those of its own part of the batch."""
    learned = {"learn_decay": True, "learn_threshold": True, "syn_decay": 0.6, "learn_syn_decay": True}
    layer = asgl_cuda.RecurrentLIF(8, granularity="neuron", stateful=True, **learned, **options(backend))
    return nn.Sequential(nn.Flatten(2), nn.Linear(15, 8), layer, nn.Linear(8, 2)).double()


def sparse(backend):
    """Spike layers; every element is analog, and not zero."""
    first, second = (asgl_cuda.LIF(**options(backend)) for _ in range(2))
    return nn.Sequential(first, asgl_cuda.SpikeLinear(5, 4), second, asgl_cuda.SpikeLinear(4, 6)).double()


def thresholds():
    """Several layers, alternating weights and neurons with noise."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), asgl_cuda.LIF(), nn.Linear(4, 4), asgl_cuda.LIF(learn_decay=True), nn.Linear(4, 5)]
    return nn.Sequential(*layers).double()


def trained(model, module, x_seq, steps):
    """The output of the last step, the gradient of its input, and the state; `module` has the parameters of `model`."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(steps):
        leaf = x_seq.clone().requires_grad_()
        s_seq = model(leaf)
        optimizer.zero_grad()
        s_seq.square().sum().backward()
        optimizer.step()
        asgl_cuda.detach(model)
    return s_seq.detach(), leaf.grad, module.state_dict()


def train_shared(rank, module):
    """In DistributedDataParallel, which averages gradients over the processes; the joint batch has their sum."""
    model = DistributedDataParallel(module)
    model.register_comm_hook(None, sum_of_gradients)
    return trained(model, module, share(joint_batch(), rank), steps=2)


def sum_of_gradients(_, bucket):
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def train_recomputed(rank, context):
    module = thresholds()
    model = DistributedDataParallel(module)
    torch.manual_seed(rank)
    with context:
        return trained(model, module, share(joint_batch(), rank), steps=2)


# By the name of a backend: the model of one process, that of each of several, and whether it is shared.
CASES = {
    "alone": (network, lambda name: network(name, dist.group.WORLD), False),
    "shared": (network, lambda name: network(name, dist.group.WORLD), True),
    "fused": (  # with SyncBatchNorm, which has no CPU kernels of its own
        lambda name: pair(name, nn.BatchNorm1d(3)), lambda name: asgl_cuda.fuse(pair(name, nn.SyncBatchNorm(3)))[0],
        False,
    ),
    "converted": (three, lambda name: asgl_cuda.convert_sync_batchnorm(three(name)), False),
    "converted, group": (three, lambda name: asgl_cuda.convert_sync_batchnorm(three(name), dist.group.WORLD), False),
    "recurrent": (returning, returning, True),
    "spike layers": (sparse, sparse, True),
}  # fmt: skip


def with_an_empty_share(rank):
    layer = asgl_cuda.BatchNormLIF(3, analog_prob=0.0, process_group=dist.group.WORLD)
    leaf = (unshared() if rank == 0 else torch.zeros(4, 0, 3, 5)).requires_grad_()
    layer(leaf).sum().backward()
    return leaf.grad, layer.running_mean, layer.running_var


def unshared():
    return torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(1))


def error_of(call, *arguments):
    try:
        call(*arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def with_one_value(rank, backend):
    """An error in all processes: its message, and the running statistics after it."""
    layer = asgl_cuda.BatchNormLIF(3, process_group="world", backend=backend)
    return error_of(layer, torch.ones(1, 1 - rank, 3)), layer.running_var.tolist()


def calibrated_network(group):
    torch.manual_seed(0)
    norm = asgl_cuda.BatchNormLIF(9, process_group=group)
    return nn.Sequential(nn.Linear(5, 9), asgl_cuda.LIF(), nn.Linear(9, 9), asgl_cuda.LIF(), nn.Linear(9, 9), norm)


def calibrated_batch():
    return torch.rand(8, 5, generator=torch.Generator().manual_seed(5)).expand(4, -1, -1)


def with_calibration(rank):
    model = DistributedDataParallel(calibrated_network("world"))
    part = calibrated_batch()[:, :3] if rank == 0 else calibrated_batch()[:, 3:]
    report = asgl_cuda.calibrate(model, part)
    return [tuple(row) for row in report.layers], [value.detach() for value in model.parameters()]


def with_penalty(model, x_seq):
    """The penalty on the rates, and gradients; the second layer is called once more."""
    with asgl_cuda.FiringRates(model) as rates:
        s_seq = model(x_seq)
        inner = getattr(model, "module", model)
        inner[3](2 * s_seq[..., :4])
        penalty = rates.penalty(0.3)
    penalty.backward()
    return penalty.detach(), [each.grad for each in inner.parameters() if each.grad is not None]


def smooth():
    """Without noise, which differs by the samples; the threshold is learned, as a weight is."""
    torch.manual_seed(0)
    given = {"surrogate": "sigmoid", "analog_prob": 1.0, "learn_threshold": True}
    return nn.Sequential(nn.Linear(5, 4), asgl_cuda.LIF(**given), nn.Linear(4, 4), asgl_cuda.LIF(**given)).double()


def in_process(rank, folder, backends):
    """Every case at once, because processes take seconds to start."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    found = {}
    for name in backends:
        found[name, "one value"] = with_one_value(rank, name)
        for case, (_, make, shared) in CASES.items():
            model = make(name)
            if shared:
                found[name, case] = train_shared(rank, model)
            else:
                found[name, case] = trained(model, model, share(joint_batch(), rank), steps=1)
            if case == "recurrent":
                found[name, "state"] = model[2].s
    found["calibrated"] = with_calibration(rank)
    module = DistributedDataParallel(smooth(), find_unused_parameters=True)
    found["penalty"] = with_penalty(module, share(joint_batch(), rank))
    found["kept"] = train_recomputed(rank, nullcontext())
    found["recomputed"] = train_recomputed(rank, asgl_cuda.recompute_spikes())
    found["empty"] = with_an_empty_share(rank)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    found["DTensor"] = error_of(asgl_cuda.lif, DTensor.from_local(torch.ones(4, 3), mesh))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # a process still communicating would abort once its peer exits
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The findings of each process."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(in_process, (str(folder), BACKENDS), PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_two_processes_are_as_one_with_the_joint_batch(results, name, case):
    """Spikes, gradients, running statistics and, where the processes share gradients, weights after two steps."""
    make, _, shared = CASES[case]
    module = make(name)
    s_seq, grad, states = trained(module, module, joint_batch(), steps=2 if shared else 1)
    for rank, result in enumerate(results):
        own_s_seq, own_grad, state = result[name, case]
        torch.testing.assert_close(own_s_seq, share(s_seq, rank), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(own_grad, share(grad, rank), rtol=1e-9, atol=1e-12)
        for key, value in states.items():
            if shared or "running" in key or "tracked" in key:
                torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12, msg=key)
        if case == "recurrent":
            torch.testing.assert_close(result[name, "state"], share(module[2].s[None], rank)[0])


def test_spikes_computed_again_change_no_bit(results):
    for result in results:
        assert all(map(torch.equal, result["kept"][:2], result["recomputed"][:2]))
        assert all(map(torch.equal, result["kept"][2].values(), result["recomputed"][2].values()))


def test_a_process_without_samples_takes_part(results):
    alone = asgl_cuda.BatchNormLIF(3, analog_prob=0.0)
    leaf = unshared().requires_grad_()
    alone(leaf).sum().backward()
    torch.testing.assert_close(results[0]["empty"][0], leaf.grad)
    for result in results:
        torch.testing.assert_close(result["empty"][1:], (alone.running_mean, alone.running_var))


def test_errors_of_each_process(results):
    """One value in all processes, and a tensor of many processes."""
    for rank, result in enumerate(results):
        for name in BACKENDS:
            assert result[name, "one value"] == (
                "asgl_cuda.batch_norm_lif: the statistics of a batch need more than one value per channel over "
                f"all processes, got x_seq of shape [1, {1 - rank}, 3] in this process; use a larger batch",
                [1, 1, 1],
            )
        assert result["DTensor"] == (
            "asgl_cuda.lif: x_seq must be a local tensor, got a DTensor; pass x_seq.full_tensor(), or x_seq.to_local() "
            "if only the batch is sharded. With to_local(), a batch normalisation in training needs process_group"
        )


def test_calibration_is_of_the_joint_batch(results):
    """All processes have the same factors, though their parts of the batch differ."""
    (rows, weights), (others, other_weights) = (found["calibrated"] for found in results)
    assert rows == others
    assert all(map(torch.equal, weights, other_weights))
    whole = asgl_cuda.calibrate(calibrated_network(None), calibrated_batch()).layers
    assert [row.layer for row in whole] == ["1", "3", "5"]
    for row, (layer, weight, *numbers) in zip(whole, rows, strict=True):
        assert (row.layer, row.weight) == (layer, weight)
        assert row[2:] == pytest.approx(numbers, rel=1e-6)


def test_a_penalty_on_rates_is_of_the_joint_batch(results):
    """Value and averaged gradients, for parts of different sizes."""
    penalty, grads = with_penalty(smooth(), joint_batch())
    for found, own in (result["penalty"] for result in results):
        torch.testing.assert_close(found, penalty)
        for ours, theirs in zip(own, grads, strict=True):
            torch.testing.assert_close(ours, theirs)


# ---- a group of one process ----


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_process_is_none(request):
    world = asgl_cuda.BatchNormLIF(3, process_group="world")
    for again in (copy.deepcopy(world), pickle.loads(pickle.dumps(world))):
        assert again.process_group == "world"
    world(torch.randn(2, 1, 3))  # before there are processes
    request.getfixturevalue("alone")
    for layer in (asgl_cuda.BatchNormLIF(3, process_group=dist.group.WORLD), world):
        with pytest.raises(ValueError, match="more than one value per channel, got x_seq of shape"):
            layer(torch.ones(1, 1, 3))
        layer(torch.randn(2, 1, 3))


@pytest.mark.usefixtures("alone")
def test_fully_shard():
    """Every parameter is sharded by its first dimension, also one value a layer, without changing a bit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def make():
        torch.manual_seed(0)
        learned = {"learn_decay": True, "learn_threshold": True}
        returning = [
            asgl_cuda.RecurrentLIF(6, recurrent=kind, syn_decay=0.6, learn_syn_decay=True, **learned)
            for kind in ("dense", "elementwise")
        ]
        return nn.Sequential(nn.Linear(5, 6), asgl_cuda.LIF(**learned), nn.Linear(6, 6), *returning, nn.Linear(6, 2))

    def train(model, context=nullcontext):
        torch.manual_seed(1)
        with context():
            return trained(model, model, torch.randn(4, 3, 5), steps=2)

    s_seq, grad, states = train(plain := make())
    assert grad.any()
    for context in (nullcontext, asgl_cuda.recompute_spikes):
        sharded = make()
        for module in (*sharded[1:5], sharded):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        own_s_seq, own_grad, own_states = train(sharded, context)
        assert torch.equal(own_s_seq, s_seq)
        assert torch.equal(own_grad, grad)
        for name, value in own_states.items():
            assert torch.equal(value.full_tensor(), states[name]), name
        for name in ("width", "decay", "v_threshold"):
            assert getattr(sharded[1], name).item() == getattr(plain[1], name).item()


# ---- conversion ----


def test_conversion_keeps_parameters_names_and_pairs():
    model = three("reference")
    model.append(nn.Sequential(nn.BatchNorm1d(3), OverTime(nn.BatchNorm2d(3))))
    parameters, names, x_seq = list(model.parameters()), list(model.state_dict()), joint_batch()
    with torch.no_grad():
        model[0](x_seq)
    model.eval()
    whole = model[:3](x_seq)
    converted = asgl_cuda.convert_sync_batchnorm(model)
    assert converted is model
    assert [type(module) for module in model[3].modules()].count(nn.SyncBatchNorm) == 2
    assert model[2].process_group == "world"
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert torch.equal(model[:3](x_seq), whole)
    assert torch.equal(asgl_cuda.convert_sync_batchnorm(model)[:3](x_seq), whole), "twice is once"
    apart, report = asgl_cuda.unfuse(copy.deepcopy(model))
    assert len(report.replaced) == 1, report
    assert type(apart[0][0].layer) is nn.SyncBatchNorm
    torch.testing.assert_close(apart[:3](x_seq), whole)
    lone = asgl_cuda.BatchNormLIF(3)
    assert asgl_cuda.convert_sync_batchnorm(lone) is lone
    assert lone.process_group == "world"
    assert type(asgl_cuda.convert_sync_batchnorm(nn.BatchNorm1d(3))) is nn.SyncBatchNorm


@pytest.mark.parametrize("group", ["World", 0, dist.GroupMember.NON_GROUP_MEMBER])
def test_no_process_group(group):
    """Also for a conversion, which changes nothing then, and takes no name."""
    message = 'process_group must be a process group that this process is in, "world" or None, got'
    with pytest.raises(TypeError, match=message):
        asgl_cuda.BatchNormLIF(3, process_group=group)(torch.randn(2, 1, 3))
    model = nn.Sequential(asgl_cuda.BatchNormLIF(3), nn.BatchNorm1d(3))
    for each in (group, "world"):
        with pytest.raises(TypeError, match=r"asgl_cuda\.convert_sync_batchnorm: process_group must be a process gro"):
            asgl_cuda.convert_sync_batchnorm(model, each)
    assert model[0].process_group is None
    assert type(model[1]) is nn.BatchNorm1d


def test_conversion_of_a_step_mode_that_would_be_lost_is_refused():
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    model = nn.Sequential(asgl_cuda.BatchNormLIF(3), layer.BatchNorm1d(3), layer.BatchNorm1d(3, step_mode="m"))
    with pytest.raises(ValueError, match=r"batchnorm: 2 \(BatchNorm1d of SpikingJelly\) can't be in step mode 'm', "):
        asgl_cuda.convert_sync_batchnorm(model)
    assert model[0].process_group is None
    model[2].step_mode = "s"
    assert type(asgl_cuda.convert_sync_batchnorm(model)[2]) is nn.SyncBatchNorm
