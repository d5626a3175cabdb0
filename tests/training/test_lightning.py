"""The callback for Lightning."""

import sys
import types

import pytest
import torch
from layer_cases import network

import asgl_cuda
from asgl_cuda import AnalogProbSchedule, Monitor, lightning_callback


class Callback:
    """Mimics Lightning's."""


def lightning(monkeypatch, *names):
    """Installs the packages, and no other Lightning."""
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Callback=type(name, (Callback,), {})))
        if name not in names:
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_callback(monkeypatch, name):
    lightning(monkeypatch, "lightning", name)
    model = network()
    schedule, monitor = AnalogProbSchedule.linear(model, 4), Monitor(model)
    callback = lightning_callback(schedule, monitor)
    assert type(callback).__mro__[1].__name__ == name, "the one that was imported"
    logged = []
    module = types.SimpleNamespace(log_dict=lambda values, sync_dist: logged.append((values, sync_dist)))

    def step(x_seq):
        callback.on_train_batch_start(None, module, x_seq, 0)
        model(x_seq)
        callback.on_train_batch_end(None, module, None, x_seq, 0)

    for epoch in range(2):
        callback.on_train_epoch_start(None, module)
        assert schedule.epoch == epoch
        step(torch.randn(4, 3, 7))
        seen = monitor.result()
        model(torch.full((4, 3, 7), 100.0))  # validation
        assert monitor.result() == seen
        callback.on_train_epoch_end(None, module)
        assert logged[epoch] == (monitor.scalars(), True)
        assert "firing_rate/1" in logged[epoch][0]
        assert schedule.epoch == epoch + 1
    callback.on_train_epoch_start(None, module)
    assert "firing_rate" not in monitor.result()["1"], "each epoch begins anew"

    fresh = network()
    resumed = lightning_callback(AnalogProbSchedule.linear(fresh, 4))
    resumed.load_state_dict(callback.state_dict())
    assert fresh[1].analog_prob == model[1].analog_prob == 0.1

    callback.on_train_batch_start(None, module, None, 0)
    callback.on_exception(None, module, ValueError())
    assert not model[1]._forward_hooks


def test_lightning_callback_with_one_of_the_two(monkeypatch):
    lightning(monkeypatch, "lightning", "lightning.pytorch", "pytorch_lightning")
    model, logged = network(), []
    module = types.SimpleNamespace(log_dict=lambda values, sync_dist: logged.append(values))
    schedule = AnalogProbSchedule.linear(model, 4)
    for callback in (lightning_callback(schedule), lightning_callback(monitor=Monitor(model))):
        callback.on_train_epoch_start(None, module)
        callback.on_train_batch_start(None, module, None, 0)
        callback.on_train_batch_end(None, module, None, None, 0)
        callback.on_exception(None, module, ValueError())
        callback.on_train_epoch_end(None, module)
        callback.load_state_dict(callback.state_dict())
    assert schedule.epoch == 1
    assert logged == [{"width/1": 1.0, "width/3": 1.0}]


def test_lightning_callback_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"asgl_cuda\.lightning_callback: needs a schedule, a monitor or both"):
        lightning_callback()
    for name, kind in (("schedule", "AnalogProbSchedule"), ("monitor", "Monitor")):
        with pytest.raises(TypeError, match=rf"asgl_cuda\.lightning_callback: {name} .* asgl_cuda\.{kind}, got int"):
            lightning_callback(**{name: 5})
        with pytest.raises(TypeError, match=rf"asgl_cuda\.{kind}, got the class {kind}; pass an instance$"):
            lightning_callback(**{name: getattr(asgl_cuda, kind)})
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ImportError, match="lightning"):
        lightning_callback(monitor=Monitor(network()))
