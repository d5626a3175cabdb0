"""Calls leave no reference cycles: without a garbage collection, which does not see GPU memory, everything is freed."""

import copy
import functools
import gc
import sys
import types
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda import LIF, AdaptiveLIF, AnalogProbSchedule, BatchNormLIF, LeakyIntegrator, Monitor, OverTime

T, B, C = 3, 2, 4


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (T, B, C), requires_grad=True)


def trained(output: Tensor) -> None:
    output.sum().backward()


def network() -> nn.Sequential:
    block = nn.Sequential(OverTime(nn.Linear(C, C)), OverTime(nn.BatchNorm1d(C)), LIF())
    return nn.Sequential(block, nn.Linear(C, C), LIF(stateful=True), LeakyIntegrator())


def lif_with_everything() -> None:
    state, width = torch.rand(B, C, requires_grad=True), torch.ones(C, requires_grad=True)
    out = asgl_cuda.lif(
        inputs(), width=width, residual=inputs(), v_init=state, analog_prob=0.5, return_v_last=True, return_h_seq=True
    )
    trained(out.s_seq + out.h_seq + out.v_last)


def layers() -> None:
    for layer in (LIF(learn_decay=True), BatchNormLIF(C), AdaptiveLIF(learn_adaptation=True), LeakyIntegrator()):
        layer.stateful = True
        trained(layer(inputs()))
        asgl_cuda.detach(layer)
        trained(layer.step(inputs(B, C)))
        copy.deepcopy(asgl_cuda.spiking_eval(layer).__enter__() or layer)(inputs()) if hasattr(layer, "width") else None
        asgl_cuda.reset(layer)


def stepped() -> None:
    model = network()
    trained(sum(asgl_cuda.step(model, x_t) for x_t in inputs()))


def recomputed() -> None:
    model = network()
    with asgl_cuda.recompute_spikes():
        trained(model(inputs()))


def watched() -> None:
    model = network()
    schedule = AnalogProbSchedule.cosine(model, 3)
    with Monitor(model) as monitor:
        model(inputs())
    schedule.step()
    assert str(monitor)
    optimizer = torch.optim.SGD(asgl_cuda.parameter_groups(model, lr=0.1), momentum=0.9)
    trained(model(inputs()))
    optimizer.step()
    lightning = types.SimpleNamespace(Callback=type("Callback", (), {}))
    with mock.patch.dict(sys.modules, {"lightning.pytorch": lightning}):
        asgl_cuda.lightning_callback(schedule, monitor)


@functools.cache  # Norse's layers are reference cycles, and snnTorch lists all its layers
def layer_of(library: str, name: str, **options: Any) -> nn.Module:
    return getattr(pytest.importorskip(library), name)(**options)


def converted(*layer: str, **options: Any) -> None:
    model, report = asgl_cuda.convert(layer_of(*layer, **options), inplace=True)
    assert len(report.replaced) == 1
    output = model(inputs())
    trained(output[0] if isinstance(output, tuple) else output)
    asgl_cuda.reset(model)
    asgl_cuda.revert(model, inplace=True)


def fused() -> None:
    model, report = asgl_cuda.fuse(network(), inputs())
    assert len(report.replaced) == 1
    trained(model(inputs()))
    asgl_cuda.unfuse(model)


def exchanged() -> None:
    pytest.importorskip("nirtorch")
    model = nn.Sequential(nn.Linear(C, C), LIF(analog_prob=0, learn_width=False))
    asgl_cuda.from_nir(asgl_cuda.to_nir(model.eval(), torch.rand(T, B, C)))(inputs())


def refused() -> None:
    model = network()
    for call in (
        lambda: asgl_cuda.lif(inputs(), v_init=inputs()),
        lambda: asgl_cuda.step(nn.Sequential(nn.LSTM(C, C), model), inputs(B, C)),
        lambda: asgl_cuda.calibrate(nn.Sequential(LIF()), inputs()),
        lambda: OverTime(model),
        lambda: [model[2](inputs(T, batch, C)) for batch in (1, 2)],
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            call()


CALLS = {
    "lif": lif_with_everything,
    "lif in torch.func": lambda: torch.func.vmap(torch.func.grad(lambda x: asgl_cuda.lif(x).sum()))(inputs()),
    "adaptive_lif": lambda: trained(asgl_cuda.adaptive_lif(inputs(), adapt_decay=0.9, w_init=torch.rand(B, C))),
    "batch_norm_lif": lambda: trained(asgl_cuda.batch_norm_lif(inputs(), training=True, weight=inputs(C))),
    "leaky_integrator": lambda: trained(asgl_cuda.leaky_integrator(inputs(), inputs(C))),
    "analog_mask": lambda: asgl_cuda.analog_mask(inputs(), 0.5, torch.tensor([1, 2])),
    "unroll_levels": lambda: asgl_cuda.unroll_levels(torch.ones(T, B, C), 2),
    "layers": layers,
    "step": stepped,
    "recompute_spikes": recomputed,
    "Monitor, schedule, parameter_groups": watched,
    "calibrate": lambda: asgl_cuda.calibrate(nn.Sequential(nn.Linear(C, C), LIF()), inputs(T, 64, C)),
    "convert spikingjelly": lambda: converted("spikingjelly.activation_based.neuron", "LIFNode", step_mode="m"),
    "convert snntorch": lambda: converted("snntorch", "Leaky", beta=0.9),
    "convert norse": lambda: converted("norse.torch", "LIF"),
    "convert sinabs": lambda: converted("sinabs.layers", "LIF", tau_mem=10.0),
    "convert_sync_batchnorm": lambda: asgl_cuda.convert_sync_batchnorm(nn.Sequential(BatchNormLIF(C))),
    "fuse, unfuse": fused,
    "to_nir, from_nir": exchanged,
    "errors": refused,
}
KEPT = {"to_nir, from_nir"}  # fx.GraphModule and its graph refer to each other, in torch and so in nirtorch


def found() -> Counter[str]:
    kinds = (type(each) for each in gc.get_objects())
    return Counter(kind.__name__ for kind in kinds if issubclass(kind, (Tensor, nn.Module)))


@pytest.mark.parametrize("name", CALLS)
def test_nothing_outlives_a_call(name):
    call = CALLS[name]
    call()  # fills caches
    gc.disable()
    gc.freeze()  # what there is already takes no part
    try:
        call()  # replaces states
        before = found()
        call()
        assert not found() - before or name in KEPT
        gc.collect()
        assert not found() - before
    finally:
        gc.unfreeze()
        gc.enable()
