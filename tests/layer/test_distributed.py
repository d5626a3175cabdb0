"""Shared statistics: two processes with parts of a batch have the results of one with the joint batch."""

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


def network(backend, group=None):
    """Two layers, so that the second's input gradient flows through the first."""
    torch.manual_seed(0)
    lif_options = {"surrogate": "sigmoid", "backend": backend, "analog_prob": 1.0}
    return nn.Sequential(
        asgl_cuda.BatchNormLIF(3, process_group=group, **lif_options),
        nn.Linear(5, 4),
        asgl_cuda.BatchNormLIF(3, process_group="world", **lif_options),
    ).double()


def pair(backend, norm):
    return nn.Sequential(OverTime(norm), asgl_cuda.LIF(surrogate="sigmoid", backend=backend, analog_prob=1.0)).double()


def trained(model, module, x_seq, steps=2):
    """The output of the last step, and the gradient of its input; `module` has the parameters of `model`."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(steps):
        leaf = x_seq.clone().requires_grad_()
        s_seq = model(leaf)
        optimizer.zero_grad()
        s_seq.square().sum().backward()
        optimizer.step()
    return s_seq.detach(), leaf.grad


def train_in_process(rank, backend, wrapped):
    module = network(backend, dist.group.WORLD)
    model = module
    if wrapped:
        model = DistributedDataParallel(module)
        # DistributedDataParallel averages gradients over the processes; the joint batch has their sum.
        model.register_comm_hook(None, sum_of_gradients)
    s_seq, grad = trained(model, module, share(joint_batch(), rank), steps=2 if wrapped else 1)
    return s_seq, grad, module.state_dict()


def sum_of_gradients(_, bucket):
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def train_recomputed(rank, context):
    """Several layers, alternating weights and neurons."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), asgl_cuda.LIF(), nn.Linear(4, 4), asgl_cuda.LIF(learn_decay=True), nn.Linear(4, 5)]
    module = nn.Sequential(*layers).double()
    model = DistributedDataParallel(module)
    torch.manual_seed(rank)
    with context:
        s_seq, grad = trained(model, module, share(joint_batch(), rank))
    return s_seq, grad, module.state_dict()


def train_fused(rank, backend):
    """SyncBatchNorm, which has no CPU kernels of its own."""
    model, _ = asgl_cuda.fuse(pair(backend, nn.SyncBatchNorm(3)))
    s_seq, grad = trained(model, model, share(joint_batch(), rank), steps=1)
    return s_seq, grad, model.state_dict()


def three(backend):
    """A fused pair, weights, and a BatchNormLIF."""
    torch.manual_seed(0)
    neurons = {"surrogate": "sigmoid", "backend": backend, "analog_prob": 1.0}
    joined, report = asgl_cuda.fuse(pair(backend, nn.BatchNorm1d(3)), joint_batch())
    assert len(report.replaced) == 1
    return nn.Sequential(joined, nn.Linear(5, 4), asgl_cuda.BatchNormLIF(3, **neurons)).double()


def train_converted(rank, backend, group):
    model = asgl_cuda.convert_sync_batchnorm(three(backend), group)
    s_seq, grad = trained(model, model, share(joint_batch(), rank), steps=1)
    return s_seq, grad, model.state_dict()


def with_an_empty_share(rank):
    layer = asgl_cuda.BatchNormLIF(3, analog_prob=0.0, process_group=dist.group.WORLD)
    leaf = (unshared() if rank == 0 else torch.zeros(4, 0, 3, 5)).requires_grad_()
    layer(leaf).sum().backward()
    return leaf.grad, layer.running_mean, layer.running_var


def with_one_value(rank, backend):
    """An error in all processes: its message, and the running statistics after it."""
    layer = asgl_cuda.BatchNormLIF(3, process_group="world", backend=backend)
    try:
        layer(torch.ones(1, 1 - rank, 3))
    except ValueError as error:
        return str(error), layer.running_var.tolist()
    return "nothing", layer.running_var.tolist()


def with_a_tensor_of_all():
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    try:
        asgl_cuda.lif(DTensor.from_local(torch.ones(4, 3), mesh))
    except TypeError as error:
        return str(error)
    return "nothing"


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


def unshared():
    return torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(1))


def in_process(rank, folder, backends):
    """Every case at once, because processes take seconds to start."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    found = {(name, wrapped): train_in_process(rank, name, wrapped) for name in backends for wrapped in (False, True)}
    found |= {(name, "fused"): train_fused(rank, name) for name in backends}
    found |= {(name, "one value"): with_one_value(rank, name) for name in backends}
    found["calibrated"] = with_calibration(rank)
    found |= {(name, "converted"): train_converted(rank, name, None) for name in backends}
    found |= {(name, "converted, group"): train_converted(rank, name, dist.group.WORLD) for name in backends}
    found["kept"] = train_recomputed(rank, nullcontext())
    found["recomputed"] = train_recomputed(rank, asgl_cuda.recompute_spikes())
    found["empty"] = with_an_empty_share(rank)
    found["DTensor"] = with_a_tensor_of_all()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # a process still communicating would abort once its peer exits
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The findings of each process."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(in_process, (str(folder), BACKENDS), PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def check(results, module, case, same_weights):
    """Compares the result with a module that trains with the joint batch."""
    s_seq, grad = trained(module, module, joint_batch(), steps=2 if same_weights else 1)
    for rank, result in enumerate(results):
        own_s_seq, own_grad, state = result[case]
        torch.testing.assert_close(own_s_seq, share(s_seq, rank), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(own_grad, share(grad, rank), rtol=1e-9, atol=1e-12)
        for key, value in module.state_dict().items():
            if same_weights or "running" in key or "tracked" in key:
                torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12, msg=key)


WITH_THE_JOINT_BATCH = {
    False: network,
    True: network,  # in DistributedDataParallel
    "fused": lambda name: pair(name, nn.BatchNorm1d(3)),
    "converted": three,
    "converted, group": three,
}


@pytest.mark.parametrize("case", WITH_THE_JOINT_BATCH)
@pytest.mark.parametrize("name", BACKENDS)
def test_two_processes_are_as_one_with_the_joint_batch(results, name, case):
    """Spikes, gradients, running statistics and, where the processes share gradients, weights after two steps."""
    check(results, WITH_THE_JOINT_BATCH[case](name), (name, case), same_weights=case is True)


def test_spikes_computed_again_change_no_bit(results):
    for result in results:
        for kept, recomputed in zip(result["kept"][:2], result["recomputed"][:2], strict=True):
            assert torch.equal(kept, recomputed)
        for name, value in result["kept"][2].items():
            assert torch.equal(value, result["recomputed"][2][name]), name


def test_conversion_keeps_parameters_names_and_pairs():
    model = three("reference")
    model.append(nn.Sequential(nn.BatchNorm1d(3), asgl_cuda.OverTime(nn.BatchNorm2d(3))))
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


@pytest.mark.parametrize("group", ["world", 0, dist.GroupMember.NON_GROUP_MEMBER])
def test_conversion_without_a_process_group_changes_nothing(group):
    model = nn.Sequential(asgl_cuda.BatchNormLIF(3), nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match=r"asgl_cuda\.convert_sync_batchnorm: process_group must be a process group"):
        asgl_cuda.convert_sync_batchnorm(model, group)
    assert model[0].process_group is None
    assert type(model[1]) is nn.BatchNorm1d


def test_conversion_of_a_step_mode_that_would_be_lost_is_refused():
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    model = nn.Sequential(asgl_cuda.BatchNormLIF(3), layer.BatchNorm1d(3), layer.BatchNorm1d(3, step_mode="m"))
    with pytest.raises(ValueError, match=r"asgl_cuda\.convert_sync_batchnorm: 2 \(BatchNorm1d of SpikingJelly\) must"):
        asgl_cuda.convert_sync_batchnorm(model)
    assert model[0].process_group is None
    model[2].step_mode = "s"
    assert type(asgl_cuda.convert_sync_batchnorm(model)[2]) is nn.SyncBatchNorm


def test_a_process_without_samples_takes_part(results):
    alone = asgl_cuda.BatchNormLIF(3, analog_prob=0.0)
    leaf = unshared().requires_grad_()
    alone(leaf).sum().backward()
    torch.testing.assert_close(results[0]["empty"][0], leaf.grad)
    for result in results:
        _, mean, variance = result["empty"]
        torch.testing.assert_close(mean, alone.running_mean)
        torch.testing.assert_close(variance, alone.running_var)


def test_a_group_of_one_process_is_none(tmp_path):
    world = asgl_cuda.BatchNormLIF(3, process_group="world")
    world(torch.randn(2, 1, 3))  # before there are processes
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        for layer in (asgl_cuda.BatchNormLIF(3, process_group=dist.group.WORLD), world):
            with pytest.raises(ValueError, match="more than one value a channel, got x_seq of shape"):
                layer(torch.ones(1, 1, 3))
            layer(torch.randn(2, 1, 3))
    finally:
        dist.destroy_process_group()


def test_a_layer_of_all_processes_can_be_copied():
    layer = asgl_cuda.BatchNormLIF(3, process_group="world")
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.process_group == "world"


@pytest.mark.parametrize("group", ["World", 0, dist.GroupMember.NON_GROUP_MEMBER])
def test_no_process_group(group):
    message = 'process_group must be a process group that this process is in, "world" or None, got'
    with pytest.raises(TypeError, match=message):
        asgl_cuda.BatchNormLIF(3, process_group=group)(torch.randn(2, 1, 3))


@pytest.mark.parametrize("context", [nullcontext, asgl_cuda.recompute_spikes])
def test_fully_shard(tmp_path, context):
    """Every parameter is sharded by its first dimension, also one value a layer, without changing a bit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), asgl_cuda.LIF(learn_decay=True, learn_threshold=True), nn.Linear(6, 2))

    plain, sharded = make(), make()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        for module in (sharded[1], sharded):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        results = []
        for model in (plain, sharded):
            torch.manual_seed(1)
            with context() if model is sharded else nullcontext():
                results.append(trained(model, model, torch.randn(4, 3, 5)))
        assert all(torch.equal(*each) for each in zip(*results, strict=True))
        for name, value in sharded.state_dict().items():
            assert torch.equal(value.full_tensor(), plain.state_dict()[name]), name
        for name in ("width", "decay", "v_threshold"):
            assert getattr(sharded[1], name).item() == getattr(plain[1], name).item()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_in_all_processes_is_an_error_of_each(results, backend):
    for rank in range(PROCESSES):
        said, running_var = results[rank][backend, "one value"]
        assert said == (
            "asgl_cuda.batch_norm_lif: training needs more than one value a channel, got one in all processes, here "
            f"x_seq of shape [1, {1 - rank}, 3]"
        )
        assert running_var == [1, 1, 1]


def test_a_tensor_of_many_processes_is_refused(results):
    for found in results:
        assert found["DTensor"] == (
            "asgl_cuda.lif: x_seq must be a tensor of this process, got a DTensor; neurons are independent, so that "
            "x_seq.to_local() can be taken where time is not sharded"
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
