"""What `convert` says: what would be faster, why nothing was found, and no neuron of a known library in silence."""

import inspect
import pickle
import subprocess
import sys
import textwrap

import libraries  # noqa: F401
import norse.torch as norse
import pytest
import snntorch
import torch
from norse.torch.module.exp_filter import ExpFilter
from snntorch._neurons.leakykernel import LeakyKernel
from spikingjelly.activation_based import encoding, functional, layer, neuron, rnn
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
            "sys.modules['spikingjelly'] = sys.modules['spikingjelly.clock_driven'] = types.ModuleType('old')",
            "imported: spikingjelly 2.0.0, but not spikingjelly.activation_based, which has the neurons that are known",
        ),
    ],
)  # fmt: skip
def test_which_libraries_are_imported(code, said):
    program = f"import sys, types, torch, asgl_cuda\n{code}\nprint(asgl_cuda.convert(torch.nn.Linear(2, 2))[1])"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert said in result.stdout.replace("2.0.0.0", "2.0.0")


STATEFUL = "it is no neuron that convert knows, but carries a state"
KNOWN_BY_NAME = {
    "SynapseFilter": (lambda: layer.SynapseFilter(2.0), STATEFUL),
    "Delay": (lambda: layer.Delay(1), STATEFUL),
    "LatencyEncoder": (lambda: encoding.LatencyEncoder(3), STATEFUL),
    "SpikingLSTMCell": (lambda: rnn.SpikingLSTMCell(2, 2), STATEFUL),
    "NeuNorm": (lambda: layer.NeuNorm(2, 2, 2), STATEFUL),
    "LeakyKernel": (lambda: LeakyKernel(2, 2), "asgl_cuda has no such neuron"),
    "ConstantCurrentLIFEncoder": (lambda: norse.ConstantCurrentLIFEncoder(3), "asgl_cuda has no such neuron"),
    "ExpFilter": (lambda: ExpFilter(2, 2), "asgl_cuda has no such neuron"),
}


@pytest.mark.parametrize("name", KNOWN_BY_NAME)
def test_no_neuron_of_a_known_library_is_passed_over(name):
    make, reason = KNOWN_BY_NAME[name]
    assert ("0", name, reason) in asgl_cuda.convert(nn.Sequential(make()))[1].left


def test_a_dropout_is_no_neuron():
    assert asgl_cuda.convert(nn.Sequential(layer.Dropout(0.5), layer.Linear(2, 2)))[1] == ([], [])


def test_a_report_is_a_pair():
    report = asgl_cuda.convert(nn.Sequential(neuron.LIFNode()))[1]
    replaced, left = report
    assert (replaced, left) == (report.replaced, report.left) == report
    again = pickle.loads(pickle.dumps(report))
    assert (again, again.notes) == (report, report.notes)
    assert isinstance(report, asgl_cuda.interop.Report)


@pytest.mark.parametrize("name", ["convert", "revert", "fuse", "unfuse"])
def test_the_docstring_shows_both_results_and_its_example_runs(name, capsys):
    text = inspect.getdoc(getattr(asgl_cuda, name))
    assert f", report = asgl_cuda.{name}(" in text.splitlines()[0]
    assert "\nReturns:\n" in text
    _, _, example = text.partition("Example::\n")
    lines = example.splitlines()
    end = next((place for place, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    exec(textwrap.dedent("\n".join(lines[:end])), {"torch": torch, "asgl_cuda": asgl_cuda})
    assert "replaced, 0 left" in capsys.readouterr().out
