"""The training kit: its layers, Lightning, hard spikes and resets."""

import sys
import types

import pytest
import torch
from comparison import random_input
from layer_cases import Foreign, network
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, AnalogProbSchedule, Monitor, asgl_layers, lightning_callback, parameter_groups, spiking_eval


def test_each_asgl_layer_once():
    """Also of another kind; not the wrapper of a compiled one."""
    shared, foreign = LIF(), Foreign()
    model = nn.Sequential(
        shared, nn.Linear(2, 2), nn.Sequential(foreign, shared), LIF(analog_prob=0, learn_width=False)
    )
    assert list(asgl_layers(model)) == [("0", shared), ("2.0", foreign), ("3", model[3])]
    wrapper = torch.compile(shared, backend="eager")
    assert list(asgl_layers(wrapper)) == [("_orig_mod", shared)], "a wrapper of torch.compile is no layer"


@pytest.mark.parametrize(
    ("call", "name", "needs_neurons"),
    [
        (asgl_layers, "asgl_layers", False),
        (lambda model: AnalogProbSchedule.cosine(model, 3), "AnalogProbSchedule", True),
        (lambda model: parameter_groups(model, 0.1), "parameter_groups", False),
        (Monitor, "Monitor", True),
        (lambda model: spiking_eval(model).__enter__(), "spiking_eval", True),
        (asgl_cuda.reset, "reset", False),
        (asgl_cuda.detach, "detach", False),
        (asgl_cuda.convert_sync_batchnorm, "convert_sync_batchnorm", False),
    ],
)
def test_models_that_are_refused(call, name, needs_neurons):
    with pytest.raises(TypeError, match=rf"asgl_cuda\.{name}: model must be a torch\.nn\.Module, got list"):
        call([LIF()])
    if needs_neurons:
        with pytest.raises(ValueError, match=rf"asgl_cuda\.{name}: model must have an ASGL layer, got a Sequential"):
            call(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match=r"add an asgl_cuda\.LIF, or turn neurons of other libraries"):
            call(nn.Linear(2, 2))


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


@pytest.mark.parametrize("training", [True, False])
def test_spiking_eval(training):
    """Hard spikes, the gradients of evaluation, and nothing else; again inside itself, and after an exception."""
    model = nn.Sequential(nn.Linear(6, 5), LIF(width=9.0), nn.Dropout(0.5), LIF(width=9.0, analog_prob=1.0), Foreign())
    model.train(training)
    modes = [module.training for module in model.modules()]
    probs = lambda: [layer.analog_prob for _, layer in asgl_layers(model)]  # noqa: E731
    x_seq = torch.randn(4, 3, 6, requires_grad=True)
    with spiking_eval(model):
        assert probs() == [0, 0, 0]
        assert [module.training for module in model.modules()] == modes
        s_seq = model(x_seq)
        assert ((s_seq == 0) | (s_seq == 1)).all()
        s_seq.sum().backward()
        assert x_seq.grad.abs().sum() > 0
        with spiking_eval(model):
            pass
        assert probs() == [0, 0, 0]
    assert probs() == [0.5, 1.0, 0.3]
    with pytest.raises(ZeroDivisionError), spiking_eval(model):
        raise ZeroDivisionError
    assert probs() == [0.5, 1.0, 0.3]
    layer, x_seq = LIF(analog_prob=0.5), random_input(6, 3, 31)
    with spiking_eval(layer):
        (found,) = torch.autograd.grad(layer(x_seq).sum(), x_seq)
    (expected,) = torch.autograd.grad(layer.eval()(x_seq).sum(), x_seq)
    assert torch.equal(found, expected)


def test_spiking_eval_as_a_decorator():
    model = network()

    @spiking_eval(model)
    def shares(depth):
        return [model[1].analog_prob, model[3].analog_prob] + (shares(depth - 1) if depth else [])

    for _ in range(2):
        assert shares(1) == [0, 0, 0, 0]
        assert (model[1].analog_prob, model[3].analog_prob) == (0.2, 0.8)


def test_spiking_eval_of_a_layer_that_refuses_changes_nothing():
    class Stubborn(LIF):
        @property
        def analog_prob(self):
            return 0.5

        @analog_prob.setter
        def analog_prob(self, value):
            if value == 0 and hasattr(self, "threshold"):
                raise ZeroDivisionError

    model = nn.Sequential(LIF(analog_prob=0.4), Stubborn())
    with pytest.raises(ZeroDivisionError), spiking_eval(model):
        pass
    assert model[0].analog_prob == 0.4
