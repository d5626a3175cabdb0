"""Mistakes in the launchers in Python: what they would start is not what those in C++ start."""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import emulated
import pytest
import torch
from comparison import uniform
from test_launches import described

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import neuron_kernels, normalisation_kernels

NEURON, NORMALISATION = neuron_kernels, normalisation_kernels
PYTHON = {
    "four though rows are of six": (NEURON, "layout.inner % 4 == 0", "layout.inner % 2 == 0"),
    "four need not share a parameter": (NEURON, "view.inner % 4", "view.inner % 2"),
    "x may be misaligned": (NEURON, "in (self.x_seq, self.v_init", "in (self.v_init"),
    "too long a segment": (NEURON, "if steps <= each", "if steps < each"),
    "plain in spite of a potential's gradient": (NEURON, "or grad_h_seq is not None", ""),
    "normalised in spite of v_rest": (NEURON, " or self.options.v_rest != 0", ""),
    "the same parameter at all steps": (NEURON, "step_stride=parameter.step_stride", "step_stride=0"),
    "too few slots": (NEURON, "layout.neurons // view.inner + blocks", "layout.neurons // view.inner"),
    "a width's gradient as any other's": (NEURON, 'name == "width"', "False"),
    "a thread for many slots": (NEURON, '>= constant("kManySlots")', '>= 4 * constant("kManySlots")'),
    "units of one lane": (NORMALISATION, "units = inner // lanes", "units = inner"),
    "tile beyond the last channel": (NORMALISATION, "min(threads // units, channels)", "threads // units"),
    "one row at a time": (NORMALISATION, "ways = threads // width", "ways = 1"),
    "channels may share four": (NORMALISATION, "inner % 4 == 0", "inner % 2 == 0"),
    "no more channels than threads": (
        NORMALISATION, 'adjoint_kernel(real), blocks_for(channels, constant("kBlockThreads"))',
        "adjoint_kernel(real), 1",
    ),
}  # fmt: skip


class Recorder:
    """A launcher that starts nothing."""

    def __init__(self, emulation):
        self.resident_threads = emulation.resident_threads
        self.launches = []

    def launch(self, device, kernel, blocks, threads, params):
        self.launches.append(emulated.Launch(kernel, blocks, threads, bytes(params)))


def make_calls(backend):
    """It calls all launchers, in about as few calls as show the mistakes."""
    width = uniform(low=0.5, high=1.5)
    for shape, options in (
        ((8, 2048), {"width": width}),
        ((20, 2, 6, 32), {"width": width, "return_h_seq": True}),
        ((4, 2, 6, 32), {"input_gain": uniform(6, 1, low=0.5, high=1.5), "v_rest": 0.5}),
        ((4, 6, 2), {"width": uniform(6, 1, low=0.5, high=1.5)}),
        ((4, 6, 32), {"decay": uniform(4, 1, 1, low=0.5, high=0.9)}),
        ((32, 3, 6), {"time_dim": 1, "width": width}),
        ((2, 300 * 512), {"width": width}),
    ):
        output = asgl_cuda.lif(torch.randn(shape, requires_grad=True), **options, backend=backend)
        (output if isinstance(output, torch.Tensor) else output.h_seq).sum().backward()
    asgl_cuda.lif(torch.randn(4 * 2048 + 1)[1:].view(4, 2048).requires_grad_(), backend=backend).sum().backward()
    for shape in ((3, 2, 6, 4, 8), (3, 2, 5, 2, 3), (3, 2, 130, 1)):
        x_seq = torch.randn(shape, requires_grad=True)
        asgl_cuda.batch_norm_lif(x_seq, training=True, backend=backend).sum().backward()


@pytest.mark.parametrize("name", PYTHON)
def test_mutant_in_python_is_found(emulation, monkeypatch, name):
    found = {}
    module, old, new = PYTHON[name]
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} has changed: find the mutant {name} its new place"
    for text in (source, source.replace(old, new)):
        mutant = ModuleType(module.__name__)
        exec(compile(text, module.__name__, "exec"), mutant.__dict__)
        recorder = Recorder(emulation)
        operators = SimpleNamespace()
        for kind in (NEURON.NeuronOperators, NORMALISATION.NormalisationOperators):
            each = getattr(mutant, kind.__name__) if kind.__module__ == module.__name__ else kind
            for operator in vars(kind):
                if not operator.startswith("_"):
                    setattr(operators, operator, getattr(each(recorder), operator))
        monkeypatch.setitem(backends.BACKENDS, "mutant", backends.Backend(("cpu",), operators, lambda: None))
        make_calls("mutant")
        found[text] = [described(launch, torch.float32) for launch in recorder.launches]
    make_calls("emulated")
    expected = [described(launch, torch.float32) for launch in emulation.take_launches()]
    assert found[source] == expected
    assert found[text] != expected
