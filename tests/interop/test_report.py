"""Reports of `convert`: faster alternatives, and why nothing was found."""

import inspect
import pickle
import subprocess
import sys

import norse.torch as norse
import pytest
import snntorch
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.surrogate import S2NN, Sigmoid
from torch import nn

import asgl_cuda


def notes(*layers):
    return str(asgl_cuda.convert(nn.Sequential(*layers))[1]).splitlines()


def test_the_step_mode_of_spikingjelly_is_named_with_what_it_costs():
    model = nn.Sequential(nn.Linear(2, 2), neuron.LIFNode(), neuron.IFNode(), neuron.LIFNode(step_mode="m"))
    (note,) = asgl_cuda.convert(model)[1].notes
    assert note.startswith(
        "1, 2: step mode 's' computes a step a call; spikingjelly.activation_based.functional.set_st"
    )
    assert note.endswith("set_step_mode(model, 'm') computes whole sequences, 3 to 12 times faster")
    assert str(asgl_cuda.convert(model)[1]).endswith(note)
    functional.set_step_mode(model, "m")
    assert not asgl_cuda.convert(model)[1].notes


def test_so_are_layers_that_take_a_step_a_call():
    report = notes(snntorch.Leaky(beta=0.5), norse.LIFCell(), norse.LIF(), norse.LIFBoxCell())
    assert [line.partition(";")[0] for line in report[5:]] == ["0: a step a call", "1: a step a call"]
    assert "asgl_cuda.interop.snntorch.MultiStep(layer) computes whole" in report[5]
    assert "norse.torch.LIF computes whole sequences" in report[6]


def test_nothing_is_found():
    first, said = notes(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    assert first == "0 replaced, 0 left"
    assert said.startswith("no neurons that are known among Linear, ReLU; imported: spikingjelly 2")
    assert "; snntorch 1" in said


def test_nothing_is_left_to_do():
    converted, _ = asgl_cuda.convert(nn.Sequential(neuron.LIFNode()))
    assert notes(converted, asgl_cuda.LIF(), asgl_cuda.LeakyIntegrator()) == [
        "0 replaced, 0 left", "0.0 is converted already", "1 is a layer of asgl_cuda", "2 is a layer of asgl_cuda",
    ]  # fmt: skip
    assert notes(*converted)[1] == "0 is converted already"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "no library of neurons is imported; known are spikingjelly.activation_based, snntorch, norse.torch and"),
        (
            "sys.modules['spikingjelly'] = types.ModuleType('empty')",
            "imported: spikingjelly 2.0.0, but not spikingjelly.activation_based or spikingjelly.clock_driven, "
            "which has the neurons that are known",
        ),
    ],
)  # fmt: skip
def test_which_libraries_are_imported(code, said):
    program = f"import sys, types, torch, asgl_cuda\n{code}\nprint(asgl_cuda.convert(torch.nn.Linear(2, 2))[1])"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert said in result.stdout.replace("2.0.0.0", "2.0.0")


def test_a_report_is_a_pair():
    report = asgl_cuda.convert(nn.Sequential(neuron.LIFNode()))[1]
    replaced, left = report
    assert (replaced, left) == (report.replaced, report.left) == report
    again = pickle.loads(pickle.dumps(report))
    assert (again, again.notes) == (report, report.notes)
    assert isinstance(report, asgl_cuda.interop.Report)


@pytest.mark.parametrize("name", ["convert", "revert", "fuse", "unfuse"])
def test_docstrings_show_both_results(name):
    """package/test_examples.py runs the examples."""
    text = inspect.getdoc(getattr(asgl_cuda, name))
    assert f", report = asgl_cuda.{name}(" in text.splitlines()[0]
    assert "\nReturns:\n" in text


def test_a_copy_of_spikingjelly_is_named():
    kind = type("LIFNode", (nn.Module,), {"__module__": "src.spikingjelly.neuron", "neuronal_charge": None})
    _, report = asgl_cuda.convert(nn.Sequential(kind()))
    assert report.left[0].reason.startswith("it is of src.spikingjelly, a copy of SpikingJelly that convert does not")


def test_hooks_of_a_surrogate_and_costs_are_noted():
    nodes = [neuron.LIFNode(step_mode="m", surrogate_function=function()) for function in (Sigmoid, Sigmoid, S2NN)]
    nodes[1].surrogate_function.register_forward_hook(lambda *given: None)
    nodes[2].detach_reset = True
    _, report = asgl_cuda.convert(nn.Sequential(*nodes))
    assert report.notes[0] == "1: hooks of surrogate_function no longer fire"
    assert report.notes[1].startswith(
        "2: its own surrogate, outside of the kernel, may be slower than before in training"
    )
