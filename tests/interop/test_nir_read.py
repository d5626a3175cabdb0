"""Foreign graphs are read by NIR's equations; other libraries read and write the same neuron."""

import pytest
import torch
from comparison import random_input
from nir_graphs import cuba, euler, fires, graph_of, nir, nir_lif, np, rewritten
from torch import nn

from asgl_cuda import LIF, BatchNormLIF, LeakyIntegrator, OverTime, step
from asgl_cuda.interop.nir import from_nir, to_nir

SOME = np.array([2, 3, 2, 4, 5, 3])
FOREIGN = {
    "gain": {"r": 1.3},
    "rest": {"v_leak": 0.2, "r": 1.5},
    "a gain for each": {"r": SOME / 2},
    "a tau for each": {"tau": SOME * 1e-4, "r": SOME},
    "a threshold for each": {"v_threshold": SOME / 4},
    "a reset": {"v_reset": -0.5, "r": 1.5, "v_leak": 0.1},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_nodes_of_others_are_read_by_their_equations(name):
    node = nir_lif(**FOREIGN[name])
    back = from_nir(graph_of(node))
    layer = back.get_submodule("0")
    x_seq = random_input(40, 5, 6).detach()
    s_seq = euler(node, x_seq)
    assert fires(s_seq)
    assert torch.equal(back(x_seq), s_seq)
    assert layer.granularity == ("channel" if "for each" in name else "layer")
    assert [parameter for parameter in layer.parameters() if parameter.requires_grad] == [layer.log_width]


def test_numbers_that_differ_inside_a_channel_are_read_by_neuron():
    tau = torch.linspace(2e-4, 5e-4, 12).reshape(3, 4).numpy()
    node = nir.LIF(tau=tau, r=tau * 1e4, v_leak=tau * 0, v_threshold=tau * 0 + 1)
    back = from_nir(graph_of(node))
    assert back.get_submodule("0").granularity == "neuron"
    x_seq = random_input(20, 5, 3, 4).detach()
    assert torch.equal(back(x_seq), euler(node, x_seq))


CURRENTS = {
    "numbers alike": {},
    "a gain and a rest": {"r": 1.5, "w_in": 2.5, "v_leak": 0.2},
    "time constants for each": {"tau_syn": SOME * 2e-4, "tau_mem": SOME * 1e-4, "r": SOME},
    "gains for each": {"w_in": SOME, "r": SOME / 2},
    "a current without memory": {"tau_syn": 1e-4, "w_in": 1.0},
}


@pytest.mark.parametrize("kind", [nir.CubaLIF, nir.CubaLI])
@pytest.mark.parametrize("name", CURRENTS)
def test_currents_of_others_are_read_by_their_equations(name, kind):
    node = cuba(kind, **CURRENTS[name])
    x_seq = random_input(40, 5, 6).detach()
    back = from_nir(graph_of(node))
    integrators = [layer for layer in back.modules() if isinstance(layer, LeakyIntegrator)]
    assert len(integrators) == 1 + (kind is nir.CubaLI)
    assert integrators[0].granularity == ("channel" if name == "time constants for each" else "layer")
    expected = euler(node, x_seq)
    if kind is nir.CubaLIF:
        assert fires(expected)
        assert torch.equal(back(x_seq), expected)
    torch.testing.assert_close(back(x_seq), expected, rtol=1e-5, atol=1e-5)
    again = from_nir(to_nir(back, x_seq))
    assert torch.equal(again(x_seq), back(x_seq)), "written as nodes of their own"


@pytest.mark.parametrize("numbers", [{"tau": 3e-4, "v_leak": 0.3}, {"tau": SOME * 1e-4}, {"r": -SOME}, {}])
def test_integrators_of_others(numbers):
    fields = {"r": 1.5, "v_leak": 0.0} | numbers if "tau" in numbers else {"r": 2e3} | numbers
    node = (nir.LI if "tau" in numbers else nir.I)(**{name: np.full(6, value) for name, value in fields.items()})
    x_seq = random_input(20, 5, 6).detach()
    torch.testing.assert_close(from_nir(graph_of(node))(x_seq), euler(node, x_seq), rtol=1e-5, atol=1e-5)


def test_float64_weights_become_the_type_of_the_model():
    """Files usually have float64, the default type of numpy."""
    weight = np.random.default_rng(0).normal(size=(6, 6))
    graph = graph_of(nir.Affine(weight, weight[0]), cuba(tau_mem=SOME * 1e-4), nir.Scale(weight[0]), cuba(nir.CubaLI))
    x_seq = random_input(5, 3, 6).detach()
    back = from_nir(graph)
    assert {value.dtype for value in (*back.parameters(), *back.buffers())} == {torch.float32}
    assert back(x_seq).dtype == torch.float32
    whole = from_nir(graph, dtype=torch.float64)
    assert torch.equal(whole.get_submodule("0").weight, torch.as_tensor(weight))
    assert whole(x_seq.double()).dtype == torch.float64


def test_dt_of_others_and_dots_in_names():
    node = nir_lif(tau=2e-3)
    edges = [("in", "block.0"), ("block.0", "out"), ("in", "block.0")]
    back = from_nir(graph_of(edges=edges, **{"block.0": node}), dt=1e-3)
    x_seq = random_input(20, 5, 6).detach()
    assert torch.equal(back(x_seq), LIF().eval()(x_seq))
    assert back.get_submodule("block.0").decay == pytest.approx(0.5)


def test_rounding_of_r_does_not_move_the_threshold():
    node = nir_lif(tau=3e-4, r=3.0)
    assert float(node.r[0]) * 1e-4 / float(node.tau[0]) != 1
    assert from_nir(graph_of(node)).get_submodule("0").v_threshold == 1


def test_scale_of_others():
    scale = np.linspace(0.5, 2, 6, dtype=np.float32)
    x_seq = random_input(5, 3, 6).detach()
    assert torch.equal(from_nir(graph_of(nir.Scale(scale)))(x_seq), x_seq * torch.as_tensor(scale))
    node = nir_lif(v_threshold=0.5)
    s_seq = euler(node, x_seq)
    assert torch.equal(from_nir(graph_of(node, nir.Scale(node.v_threshold)))(x_seq), s_seq * 0.5)


@pytest.mark.filterwarnings("ignore:.*neurons at rest fire without any input")
@pytest.mark.parametrize("threshold", [0.3, SOME / 4, -SOME / 20, 0.0])
def test_thresholds(threshold):
    """Crossed, not reached: inputs are multiples of 1/4."""
    node = nir.Threshold(np.full(6, threshold))
    x_seq = (random_input(20, 5, 6).detach() * 4).round() / 4
    back = from_nir(graph_of(node))
    expected = (x_seq > torch.as_tensor(node.threshold)).float()
    assert fires(expected)
    assert torch.equal(back(x_seq), expected)
    assert torch.equal(from_nir(to_nir(back, x_seq))(x_seq), expected)
    back(leaf := x_seq.requires_grad_()).sum().backward()
    assert leaf.grad.any(), "a surrogate's gradient"


@pytest.mark.parametrize("steps", [0, 1, 3, 40, SOME - 2])
def test_delays(steps, tmp_path):
    node = nir.Delay(np.full(6, steps) * 1e-4)
    x_seq = random_input(20, 5, 6)
    back = from_nir(rewritten(graph_of(node, nir_lif()), tmp_path / "model.nir"))
    delayed = torch.zeros_like(x_seq)
    for neuron, own in enumerate(np.broadcast_to(steps, 6)):
        delayed[own:, :, neuron] = x_seq[: max(20 - own, 0), :, neuron]
    found = back.get_submodule("0")(x_seq)
    assert torch.equal(found, delayed)
    weights = random_input(20, 5, 6).detach()
    gradients = [torch.autograd.grad((each * weights).sum(), x_seq)[0] for each in (found, delayed)]
    assert torch.equal(*gradients)
    assert torch.equal(back(x_seq), LIF().eval()(delayed))
    again = to_nir(back, x_seq, dt=1e-3)
    assert np.array_equal(next(each for each in again.nodes.values() if isinstance(each, nir.Delay)).delay,
                          node.delay * 10)  # fmt: skip
    assert torch.equal(from_nir(again)(x_seq), back(x_seq))
    with pytest.raises(RuntimeError, match="Delay at '0' can't take a step at a time"):
        step(back, x_seq[0])
    with pytest.raises(TypeError, match="OverTime: layer must know no time, got Delay"):
        OverTime(nn.Sequential(back.get_submodule("0")))


def test_an_integrator_with_delay(tmp_path):
    """It is written as two nodes."""
    model = nn.Sequential(LeakyIntegrator(decay=0.8, input_gain=0.7, delay=True), LIF(v_threshold=0.3)).eval()
    x_seq = random_input(20, 5, 6).detach()
    graph = rewritten(to_nir(model, x_seq, dt=1e-3), tmp_path / "model.nir")
    assert [type(node) for node in graph.nodes.values()].count(nir.Delay) == 1
    back = from_nir(graph)
    assert fires(back(x_seq))
    assert torch.equal(back(x_seq), model(x_seq))


# The rest needs other libraries.


def network():
    """Linear and LIF, twice, with weights under which both layers fire."""
    model = nn.Sequential(nn.Linear(8, 16), LIF(decay=0.75), nn.Linear(16, 12), LIF(v_threshold=0.7)).eval()
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight *= 3
    return model, random_input(20, 5, 8).detach()


def normalised_network():
    """Two normalised layers: one after weights, one at the input."""
    model = nn.Sequential(BatchNormLIF(8, v_threshold=0.7), nn.Linear(8, 12), BatchNormLIF(12, v_threshold=0.7)).eval()
    with torch.no_grad():
        model[1].weight *= 3
        for layer in (model[0], model[2]):
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
    return model, random_input(20, 5, 8).detach()


def stepped(model, x_seq):
    """The outputs, by step, of a model that returns (output, state)."""
    state, s_seq = None, []
    for x in x_seq:
        s, state = model(x, state)
        s_seq.append(s)
    return torch.stack(s_seq)


def assert_same_spikes(model, x_seq, s_seq):
    """The spikes equal the model's, whose potentials are too far from the threshold for rounding to matter."""
    margins = []

    def measure(layer, inputs):
        output = layer._lif(inputs[0], update=False, return_h_seq=True)
        margins.append((output.h_seq - layer.v_threshold).abs().min())

    layers = [layer for layer in model.modules() if isinstance(layer, LIF)]
    hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
    expected = model(x_seq)
    for hook in hooks:
        hook.remove()
    assert min(margins) > 1e-5
    assert fires(expected)
    assert torch.equal(s_seq, expected)


@pytest.mark.parametrize("make", [network, normalised_network])
def test_snntorch_reads_it(make, capsys):
    module = pytest.importorskip("snntorch.import_nir")
    model, x_seq = make()
    with torch.no_grad():
        s_seq = stepped(module.import_from_nir(to_nir(model, x_seq)), x_seq)
    if make is network:
        assert "scaling weights" not in capsys.readouterr().out  # printed where r is not tau / dt
    assert_same_spikes(model, x_seq, s_seq)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_spikingjelly_reads_it(step_mode, tmp_path):
    module = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    model, x_seq = network()
    model.extend([nn.Linear(12, 6), LIF(decay=1.0, v_threshold=0.1)]).eval()
    nir.write(tmp_path / "model.nir", to_nir(model, x_seq))
    with torch.no_grad():
        other = module.import_from_nir(tmp_path / "model.nir", step_mode=step_mode)
        s_seq = other(x_seq)[0] if step_mode == "m" else stepped(other, x_seq)
    assert_same_spikes(model, x_seq, s_seq)


def test_norse_writes_it():
    norse = pytest.importorskip("norse.torch")

    def neuron(decay):
        return norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=torch.tensor(1 - decay)), dt=1.0)

    model, x_seq = network()
    other = norse.SequentialState(model[0], neuron(0.75), model[2], neuron(0.5))
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight *= 3  # Norse multiplies the input by 1 - decay
        # dt = 1: Norse writes tau in steps.
        back = from_nir(norse.to_nir(other, x_seq[0], dt=1.0), dt=1.0)
        assert_same_spikes(back, x_seq, stepped(other, x_seq))


@pytest.mark.filterwarnings("ignore:nirtorch")
def test_norse_writes_currents_and_reads_the_same():
    norse = pytest.importorskip("norse.torch")
    model, x_seq = network()
    p = norse.LIFParameters(tau_mem_inv=torch.tensor(200.0), v_th=torch.tensor(0.1))
    other = norse.SequentialState(model[0], norse.LIFCell(p), model[2], norse.LIFCell())
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight *= 8
        graph = norse.to_nir(other, x_seq[0], dt=1.0)  # Norse writes tau as dt / tau_mem_inv
        assert sum(isinstance(node, nir.CubaLIF) for node in graph.nodes.values()) == 2
        expected = stepped(norse.from_nir(graph, dt=1e-3), x_seq)
        assert_same_spikes(from_nir(graph, dt=1e-3), x_seq, expected)


@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_snntorch_writes_it(kind):
    snntorch, module = pytest.importorskip("snntorch"), pytest.importorskip("snntorch.export_nir")

    def neuron(size):
        alone = {"threshold": torch.full((size,), 0.8)}
        current = {"alpha": torch.linspace(0.3, 0.8, size), "threshold": torch.full((size,), 1.5)}
        return getattr(snntorch, kind)(
            beta=torch.full((size,), 0.75), reset_mechanism="zero", reset_delay=False, init_hidden=True,
            **(alone if kind == "Leaky" else current),
        )  # fmt: skip

    model, x_seq = network()
    other = nn.Sequential(model[0], neuron(16), model[2], neuron(12))
    graph = module.export_to_nir(other, x_seq[:1, 0], ignore_dims=[0])
    for index in (1, 3):
        other[index].reset_mem()
    with torch.no_grad():
        assert_same_spikes(from_nir(graph), x_seq, torch.stack([other(x) for x in x_seq]))


def test_sinabs_writes_it():
    layers = pytest.importorskip("sinabs.layers")
    sinabs_nir = pytest.importorskip("sinabs.nir")
    activation = pytest.importorskip("sinabs.activation")
    model, x_seq = network()
    neuron = layers.IAFSqueeze(
        batch_size=5, spike_fn=activation.SingleSpike, reset_fn=activation.MembraneReset(),
        spike_threshold=torch.tensor(3.0),
    )  # fmt: skip
    other = nn.Sequential(model[0], neuron)
    batch_first = x_seq.transpose(0, 1).flatten(0, 1)
    graph = sinabs_nir.to_nir(other, batch_first)
    neuron.reset_states()
    with torch.no_grad():
        s_seq = other(batch_first).unflatten(0, (5, 20)).transpose(0, 1)
        # dt = 1: sinabs writes r = 1, in steps.
        assert_same_spikes(from_nir(graph, dt=1.0), x_seq, s_seq)


def test_spikingjelly_writes_it():
    module = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    from spikingjelly.activation_based import functional, neuron

    model, x_seq = network()
    other = nn.Sequential(
        model[0], neuron.LIFNode(tau=3.0, v_reset=0.1, v_threshold=0.4), model[2], neuron.LIFNode(decay_input=False)
    )
    functional.set_step_mode(other, "m")
    graph = module.export_to_nir(other, x_seq)
    functional.reset_net(other)
    with torch.no_grad():
        assert_same_spikes(from_nir(graph), x_seq, other(x_seq))
