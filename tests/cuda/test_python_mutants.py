"""Mistakes in the launchers in Python: what they would start is not what those in C++ start."""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from comparison import uniform
from test_launches import described

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import integrator_kernels, neuron_kernels, normalisation_kernels
from tools.emulation import emulated

NEURON, INTEGRATOR, NORMALISATION = neuron_kernels, integrator_kernels, normalisation_kernels
PYTHON = {
    "four though rows are of six": (NEURON, "layout.inner % 4 == 0", "layout.inner % 2 == 0"),
    "four need not share a parameter": (NEURON, "view.inner % 4", "view.inner % 2"),
    "x may be misaligned": (NEURON, "in (self.x_seq, self.v_init", "in (self.v_init"),
    "exactly four for one neuron a thread": (NEURON, "steps == short and lanes == 4 and", "steps == short and"),
    "exactly four in general": (NEURON, "lanes == 4 and input != GENERAL else 0", "lanes == 4 else 0"),
    "plain input for one neuron a thread": (NEURON, "lanes == 1 and input == PLAIN", "False"),
    "fours for few neurons": (NEURON, "self.layout.neurons // 4 >= resident // 4", "True"),
    "fours for few neurons and long sequences": (NEURON, "or self.layout.neurons > resident // 16", "or True"),
    "fours as where all is settled": (NEURON, "input == GENERAL:\n            return", "False:\n            return"),
    "no fours for a whole segment": (NEURON, "steps <= CHECKPOINT_STEPS or", "steps < CHECKPOINT_STEPS or"),
    "settled in spite of h_seq": (NEURON, "v_seq is None and h_seq is None)", "v_seq is None)"),
    "settled in spite of v_seq": (NEURON, "call.input(v_seq is None and h", "call.input(h"),
    "settled in spite of scaled spikes": (NEURON, "or self.options.scale_output", ""),
    "settled in spite of v_rest": (NEURON, " or self.options.v_rest != 0", ""),
    "settled in spite of several spikes": (NEURON, " or self.model == BY_OPTIONS", ""),
    "single spikes in spite of several": (NEURON, "rules.multi_spike or rules.floored", "rules.floored"),
    "no floor": (NEURON, "rules.multi_spike or rules.floored", "rules.multi_spike"),
    "settled in spite of a step stride": (NEURON, "if any(view.data and view.step_stride", "if any(False"),
    "settled in spite of a mean's gradient": (NEURON, " and not wants_mean", ""),
    "settled in spite of h_seq's gradient": (NEURON, "and grad_h_seq is None", ""),
    "settled in spite of v_seq's gradient": (NEURON, "and grad_v_seq is None", ""),
    "settled without a gradient of the spikes": (NEURON, "both = grad_s_seq is not None and", "both ="),
    "settled though dx is not asked for": (NEURON, "grad_s_seq is not None and grad_x_seq is not None",
                                           "grad_s_seq is not None"),
    "plain in spite of a gain": (NEURON, "(gain.constant, bias.constant, mean.constant) == (1, 0, 0)",
                                 "(bias.constant, mean.constant) == (0, 0)"),
    "plain in spite of biases": (NEURON, "not any(view.data for view in of_input) and", ""),
    "the same parameter at all steps": (NEURON, "step_stride=parameter.step_stride", "step_stride=0"),
    "tensors as constants": (NEURON, "bits(view.data for", "bits(False for"),
    "no gradients wanted": (NEURON, "bits(address for", "bits(False for"),
    "parameters alike": (NEURON, "alike = len(ways) == 1", "alike = True"),
    "a step from neuron to neuron for all": (NEURON, "strides = tuple(int(view.count > 1)", "strides = tuple(1"),
    "a quotient that is too small": (NEURON, "// by + 1", "// by"),
    "a power too small": (NEURON, "31 + (by - 1)", "30 + (by - 1)"),
    "too few slots": (NEURON, "layout.neurons // view.inner + blocks", "layout.neurons // view.inner"),
    "a width's gradient as any other's": (NEURON, 'name == "width"', "False"),
    "too few slots for a whole block": (NEURON, '>= constant("kManySlots")', '> constant("kManySlots")'),
    "too few slots of a run": (NEURON, "(view.inner + tile - 2) // tile + 1", "(view.inner + tile - 1) // tile"),
    "runs of all elements": (NEURON, "(view.inner * view.count)", "view.inner"),
    "more slots than threads": (NEURON, "min(slots, threads)", "slots"),
    "runs that there are not": (NEURON, 'min(runs, constant("kMostRunsEach"))', 'constant("kMostRunsEach")'),
    "no power": (NEURON, "1 << (most.bit_length() - 1)", "most"),
    "elements without runs": (NEURON, "elements_each = threads // runs_each", "elements_each = threads"),
    "a block an element": (NEURON, "blocks_for(gradient.numel(), elements_each)", "gradient.numel()"),
    "no delay": (INTEGRATOR, "tiles, delay=delay, v_seq", "tiles, delay=False, v_seq"),
    "backward without delay": (INTEGRATOR, "gradients, delay=delay", "gradients, delay=False"),
    "no sums for the gain": (INTEGRATOR, "asked.decay or asked.input_gain else", "asked.decay else"),
    "x of backward may be misaligned": (INTEGRATOR, "grad_v_last, *sequences, *gradients", "grad_v_last, *gradients"),
    "a last potential's gradient forgotten": (INTEGRATOR, "grad_last=grad_v_last, v", "grad_last=None, v"),
    "four integrators whatever the parameters": (
        INTEGRATOR, "call.input(True), grad_v_last", '"kPlain", grad_v_last'
    ),
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


def make_calls(backend, emulation):
    """It calls all launchers, in about as few calls as show the mistakes."""

    def call(*shape, gradient_of=("s_seq", "v_seq", "h_seq"), **options):
        output = asgl_cuda.lif(torch.randn(shape, requires_grad=True), **options, backend=backend)
        if not isinstance(output, torch.Tensor):
            output = torch.stack(
                [sequence.sum() for name in gradient_of if (sequence := getattr(output, name)) is not None]
            )
        output.sum().backward()

    width, gain = uniform(low=0.5, high=1.5), uniform(6, 1, low=0.5, high=1.5)
    call(8, 2048, width=width)
    for output in ("v_seq", "h_seq"):
        call(20, 2, 6, 32, width=width, **{f"return_{output}": True})
    call(4, 6, 32, return_v_last=True, gradient_of=("v_last",))
    call(4, 2, 6, 32, input_gain=gain, v_rest=0.5)
    call(4, 2, 6, 32, input_gain=gain, input_mean=uniform(low=0.1, high=0.2))
    call(4, 2, 6, 32, input_gain=2.0)
    call(4, 2, 6, 32, input_bias=gain)
    call(4, 2, 6, 32, scale_output=True)
    call(4, 2, 6, 32, v_min=-0.5)
    call(4, 2, 6, 32, v_reset=None, multi_spike=True)
    call(4, 6, 2, width=uniform(6, 1, low=0.5, high=1.5))
    call(4, 6, 7, width=width)
    call(4, 6, 7, width=uniform(6, 1, low=0.5, high=1.5), decay=uniform(6, 7, low=0.5, high=0.9))
    call(4, 6, 32, decay=uniform(4, 1, 1, low=0.5, high=0.9))
    call(32, 3, 6, time_dim=1, width=width)
    for batch in (3, 20):
        call(3, batch, 6, 4, width=uniform(6, 4, low=0.5, high=1.5))
    call(2, 3584, width=width)  # eight tiles
    call(2, 300 * 512 + 1, width=width)
    emulation.set_multiprocessors(1)
    call(5, 1024, v_rest=0.5)
    call(16, 128)
    call(17, 128)
    call(17, 132)
    emulation.set_multiprocessors(emulated.TINY)
    asgl_cuda.lif(torch.randn(4, 6, 32), width=width, backend=backend).sum().backward()
    asgl_cuda.lif(torch.randn(4 * 2048 + 1)[1:].view(4, 2048).requires_grad_(), backend=backend).sum().backward()
    for shift, options in ((0, {"delay": True}), (1, {"input_gain": width}), (0, {"input_gain": width, "v_rest": 0.5})):
        x_seq = torch.randn(4 * 2048 + shift)[shift:].view(4, 2048).requires_grad_()
        emulation.set_multiprocessors(2 if "v_rest" in options else emulated.TINY)
        outputs = asgl_cuda.leaky_integrator(x_seq, **options, return_v_last=True, backend=backend)
        torch.autograd.backward(list(outputs), [torch.ones_like(output) for output in outputs])
    emulation.set_multiprocessors(emulated.TINY)
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
        for kind in (NEURON.NeuronOperators, INTEGRATOR.IntegratorOperators, NORMALISATION.NormalisationOperators):
            each = getattr(mutant, kind.__name__) if kind.__module__ == module.__name__ else kind
            for operator in vars(kind):
                if not operator.startswith("_"):
                    setattr(operators, operator, getattr(each(recorder), operator))
        monkeypatch.setitem(backends.BACKENDS, "mutant", backends.Backend(("cpu",), operators, lambda: None))
        make_calls("mutant", emulation)
        found[text] = [described(launch, torch.float32) for launch in recorder.launches]
    make_calls("emulated", emulation)
    expected = [described(launch, torch.float32) for launch in emulation.take_launches()]
    assert found[source] == expected
    assert found[text] != expected
