"""Foreign graphs are read by NIR's equations; other libraries read and write the same neuron."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from comparison import random_input
from nir_graphs import cuba, euler, fires, graph_of, nir, nir_lif, np, rewritten
from torch import nn

from asgl_cuda import LIF, LeakyIntegrator, OverTime, step
from asgl_cuda.interop.nir import from_nir, to_nir

SOME = np.array([2, 3, 2, 4, 5, 3])


def integrator(kind, **numbers):
    return kind(**{name: np.full(6, value) for name, value in numbers.items()})


EQUATIONS = {
    "gain": nir_lif(r=1.3),
    "rest": nir_lif(v_leak=0.2, r=1.5),
    "gains for each": nir_lif(r=SOME / 2),
    "tau for each": nir_lif(tau=SOME * 1e-4, r=SOME),
    "thresholds for each": nir_lif(v_threshold=SOME / 4),
    "resets for each": nir_lif(v_leak=0.1 * SOME, r=1.5),
    "no decay for each": nir_lif(tau=SOME / 2e4),
    "a reset": nir_lif(v_reset=-0.5, r=1.5, v_leak=0.1),
    "integrator": integrator(nir.LI, r=1.5, tau=3e-4, v_leak=0.3),
    "integrator, tau for each": integrator(nir.LI, r=1.5, tau=SOME * 1e-4, v_leak=0.0),
    "sum, gains for each": integrator(nir.I, r=-SOME),
    "sum": integrator(nir.I, r=2e3),
}
CURRENTS = {
    "numbers alike": {},
    "a gain and a rest": {"r": 1.5, "w_in": 2.5, "v_leak": 0.2},
    "time constants for each": {"tau_syn": SOME * 2e-4, "tau_mem": SOME * 1e-4, "r": SOME},
    "gains for each": {"w_in": SOME, "r": SOME / 2},
    "a current without memory": {"tau_syn": 1e-4, "w_in": 1.0},
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_nodes_of_others_are_read_by_their_equations(name):
    node, x_seq = EQUATIONS[name], random_input(40, 5, 6).detach()
    back, expected = from_nir(graph_of(node)), euler(node, x_seq)
    torch.testing.assert_close(back(x_seq), expected, rtol=1e-5, atol=1e-5)
    if isinstance(node, nir.LIF):
        layer = back.get_submodule("0")
        assert fires(expected)
        assert layer.granularity == ("channel" if "for each" in name else "layer")
        assert [parameter for parameter in layer.parameters() if parameter.requires_grad] == [layer.log_width]


@pytest.mark.parametrize("kind", [nir.CubaLIF, nir.CubaLI])
@pytest.mark.parametrize("name", CURRENTS)
def test_currents_of_others_are_read_by_their_equations(name, kind):
    node, x_seq = cuba(kind, **CURRENTS[name]), random_input(40, 5, 6).detach()
    back, expected = from_nir(graph_of(node)), euler(node, x_seq)
    integrators = [layer for layer in back.modules() if isinstance(layer, LeakyIntegrator)]
    assert len(integrators) == 1 + (kind is nir.CubaLI)
    assert integrators[0].granularity == ("channel" if name == "time constants for each" else "layer")
    assert kind is nir.CubaLI or fires(expected)
    torch.testing.assert_close(back(x_seq), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(from_nir(to_nir(back, x_seq))(x_seq), back(x_seq)), "written as nodes of their own"


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


def test_dt_of_others_and_any_name():
    node = nir_lif(tau=2e-3)
    names = {"block": "block", "block.0": "block_0_", "a.0": "a.0", "forward": "forward_", "self": "self_", "": "_",
             "a-b/c": "a_b_c", "class.1": "class_.1", "x_seq": "x_seq", '"); exit; ("': "____exit____"}  # fmt: skip
    chain = ["in", *names, "out"]
    edges = [*pairwise(chain), ("in", "block")]  # some exporters write an edge twice
    back = from_nir(graph_of(edges=edges, **dict.fromkeys(names, node)), dt=1e-3)
    x_seq = random_input(20, 5, 6).detach()
    assert torch.equal(from_nir(graph_of(node), dt=1e-3)(x_seq), LIF().eval()(x_seq))
    assert {path for path, module in back.named_modules() if isinstance(module, LIF)} == set(names.values())
    expected = x_seq
    for _ in names:
        expected = LIF().eval()(expected)
    assert fires(expected)
    assert torch.equal(copy.deepcopy(back)(x_seq), expected)


def test_rounding_of_r_does_not_move_the_threshold():
    node = nir_lif(tau=3e-4, r=3.0)
    assert float(node.r[0]) * 1e-4 / float(node.tau[0]) != 1
    assert from_nir(graph_of(node)).get_submodule("0").v_threshold == 1


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


def test_a_delay_may_be_rounded_to_float32():
    steps = np.array([25001, 3_000_001, 1, 0])
    node = nir.Delay((steps * 1e-4).astype(np.float32))
    assert from_nir(graph_of(node)).get_submodule("0").steps.tolist() == steps.tolist()
    with pytest.raises(ValueError, match=r"delay must be a multiple of dt = 0\.0001, got 1234\.57"):
        from_nir(
            graph_of(nir.Delay((np.array([12_345_678]) * 1e-4).astype(np.float32)))
        )  # its neighbour is 1.2 dt away


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
    with pytest.raises(RuntimeError, match="Delay at '0' can't be called step by step"):
        step(back, x_seq[0])
    with pytest.raises(TypeError, match="OverTime: layer must not use time, got Delay"):
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


ONES = np.ones(6, np.float32)
IMAGE = nir.Conv2d((5, 4), np.ones((2, 3, 3, 3), np.float32), 1, 0, 1, 1, np.ones(2, np.float32))


def with_(node, **values):
    """The node with values that its class would refuse."""
    node = copy.deepcopy(node)
    for name, value in values.items():
        setattr(node, name, value)
    return node


BAD_NODES = {
    "strings": (with_(nir_lif(), v_leak=np.array(["0"] * 6)), "can't convert np.ndarray of type numpy.str_"),
    "complex": (with_(nir_lif(), tau=ONES + 1j), "must have real numbers, got complex ones"),
    "another shape": (with_(nir_lif(), tau=ONES[:5]), "The size of tensor a"),
    "nan": (nir_lif(v_threshold=float("nan")), "v_threshold must be finite, got nan"),
    "groups": (with_(IMAGE, groups=3), "out_channels must be divisible by groups"),
    "a graph inside": (graph_of(nir_lif()), "can't be read; the documentation"),
    "a delay by half a step": (
        nir.Delay(np.array([0.0, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 0.0])),
        r"delay must be a multiple of dt = 0.0001, got 0.00015 for neuron \[2\]; pass the time step",
    ),
    "a delay at a known dt": (
        with_(nir.Delay(np.array([1.5e-4])), metadata={"asgl_cuda": {"dt": 1e-4}}),
        r"delay must be a multiple of dt = 0.0001, got 0.00015 for neuron \[0\]$",
    ),
    "a delay backwards": (nir.Delay(-ONES), "delay must be at least 0, got -1"),
    "tau": (nir_lif(tau=5e-5), "tau must be at least dt = 0.0001, got 5e-05"),
    "no leak": (nir_lif(tau=np.inf), r"tau must be finite, got inf for neuron \[0\]"),
    "tau of a current": (cuba(tau_syn=5e-5), "tau_syn must be at least dt = 0.0001"),
    "r": (nir_lif(r=SOME - 2), r"r must be > 0, got 0 for neuron \[0\]"),
    "rests": (cuba(nir.CubaLI, v_leak=SOME), "v_leak must be the same for all .* v_rest of .*; got 2 to 5"),
    "no rest": (nir_lif(v_leak=np.nan), r"v_leak must be finite, got nan for neuron \[0\]"),
    "no threshold": (nir.Threshold(0 * SOME + np.inf), r"threshold must be finite, got inf for neuron \[0\]"),
    "no gain": (cuba(nir.CubaLI, w_in=SOME * np.nan), r"w_in must be finite, got nan for neuron \[0\]"),
}


@pytest.mark.parametrize("name", BAD_NODES)
def test_errors_name_the_node(name):
    node, message = BAD_NODES[name]
    with pytest.raises(
        ValueError, match=rf"^asgl_cuda\.from_nir: node '1' \({type(node).__name__}\): .*{message}"
    ) as error:
        from_nir(graph_of(nir_lif(), node))
    assert "\n" not in str(error.value)


LINE = [("in", "0"), ("0", "1"), ("1", "out")]


@pytest.mark.parametrize(
    ("edges", "more", "message"),
    [
        (LINE, {"more": nir.Output(ONES)}, r"must have one Output node, got \['more', 'out'\]"),
        (LINE, {"more": nir.Input(ONES)}, r"must have one Input node, got \['in', 'more'\]"),
        (
            [*LINE, ("1", "2"), ("2", "0")],
            {"2": nir_lif()},
            "can't read the cycle (0 -> 1 -> 2 -> 0|1 -> 2 -> 0 -> 1|2 -> 0 -> 1 -> 2); NIR does not say when",
        ),
    ],
)
def test_graphs_that_are_no_chains(edges, more, message):
    with pytest.raises(ValueError, match=f"^asgl_cuda.from_nir: .*{message}"):
        from_nir(graph_of(nir_lif(), nir_lif(), edges=edges, **more))


def changed(layer, metadata=None, **numbers):
    """The graph that to_nir writes for a layer, with other options in the metadata, or other numbers in the node."""
    graph = to_nir(layer, torch.rand(2, 3, 6))
    for name, value in numbers.items():
        getattr(graph.nodes["_0"], name)[:] = value
    graph.nodes["_0"].metadata["asgl_cuda"]["options"].update(metadata or {})
    return graph


CHANGED = {
    "an option that is not known": (lambda: changed(LIF(), {"speed": 1}), "speed"),
    "a surrogate that is not known": (lambda: changed(LIF(), {"surrogate": "step"}), "surrogate must be one of"),
    "a decay of text": (lambda: changed(LIF(), {"decay": "half"}), "decay must be a float, got str"),
    "another tau": (
        lambda: changed(LIF(), tau=4e-4),
        r"decay is 0.5 for neuron \[0\] there, but 0.75 .* by the node, for dt = 0.0001; delete this entry",
    ),
    "another threshold": (
        lambda: changed(LIF(), v_threshold=2),
        "v_threshold is 1 .* 4 .*, for dt = 0.0001, both scaled to input_gain = 1 and v_rest = 0",
    ),
    "another reset": (lambda: changed(LIF(), v_reset=0.1), "v_reset is 0 .* there, but 0.2 .* by the node"),
    "another gain": (lambda: changed(LeakyIntegrator(), r=4), "input_gain is 1 .* there, but 2 "),
    "another rest": (lambda: changed(LeakyIntegrator(), v_leak=4), "v_rest is 0 .* there, but 4 "),
}


@pytest.mark.parametrize("name", CHANGED)
def test_metadata_and_numbers_must_agree(name):
    make, message = CHANGED[name]
    with pytest.raises(ValueError, match=rf"node '_0' \(LIF?\): metadata\['asgl_cuda'\] can't be used: .*{message}"):
        from_nir(make())
    graph = make()
    graph.nodes["_0"].metadata = {"other": [1]}
    from_nir(graph)


def test_the_scale_of_levels_is_their_reciprocal():
    graph = to_nir(LIF(levels=4, scale_output=True, v_reset=None), torch.rand(2, 3, 6), allow_soft_reset=True)
    graph.nodes["_0_scale"].scale[:] = 2
    with pytest.raises(
        ValueError, match=r"heights of the LIF '_0' before it.*: expected 0\.25 for neuron \[0\], got 2;"
    ):
        from_nir(graph)


def test_a_scale_of_other_neurons_than_the_first():
    """The error names the first neuron that differs, and its remedy reads the scale as it is."""
    layer = LIF(6, granularity="neuron", scale_output=True, v_threshold=torch.linspace(0.5, 1, 6))
    graph = to_nir(layer, torch.rand(2, 3, 6))
    graph.nodes["_0_scale"].scale[3:] = 1.25
    with pytest.raises(ValueError, match=r"expected 0\.8 for neuron \[3\], got 1\.25; correct the scale, or delete"):
        from_nir(graph)
    del graph.nodes["_0"].metadata["asgl_cuda"]
    assert from_nir(graph)(torch.full((2, 3, 6), 1e3)).amax((0, 1)).tolist() == pytest.approx(
        [0.5, 0.6, 0.7, *[1.25] * 3]
    )


def test_the_scale_of_scaled_output_must_be_there():
    graph = to_nir(LIF(scale_output=True, v_threshold=0.5), torch.rand(2, 3, 6))
    graph.nodes["_0_scale"].scale[:] = 2
    with pytest.raises(
        ValueError,
        match=r"'_0_scale' \(Scale\): scale must equal the spike heights of the LIF '_0' .* 0\.5 for .*, got 2",
    ):
        from_nir(graph)
    graph.nodes["_0_scale"].scale[:] = 0.5
    graph.edges.append(("input_1", "_0_scale"))  # the sum of scaled spikes and another
    with pytest.raises(
        ValueError, match=r"must be a Scale .* the LIF '_0' .*, got Scale with input '_0' and 'input_1'; insert"
    ):
        from_nir(graph)
    del graph.nodes["_0_scale"]
    graph.edges[:] = [("input_1", "_0"), ("_0", "output")]
    with pytest.raises(
        ValueError, match=r"'output' .*: must be a Scale .* the LIF '_0' .*, got Output with input '_0'; insert"
    ):
        from_nir(graph)


# The rest needs other libraries.


def network():
    """Linear and LIF, twice, whose spikes are many and, with these weights and inputs, not up to a rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), LIF(decay=0.75), nn.Linear(16, 12), LIF(v_threshold=0.7)).eval()
    for linear in (model[0], model[2]):
        linear.weight.data *= 3
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
        output = layer._call_function(inputs[0], update=False, return_h_seq=True)
        margins.append((output.h_seq - layer.v_threshold).abs().min())

    for layer in (layer for layer in model.modules() if isinstance(layer, LIF)):
        layer.register_forward_pre_hook(measure)
    expected = model(x_seq)
    assert min(margins) > 1e-5
    assert fires(expected)
    assert torch.equal(s_seq, expected)


def by_snntorch(graph, path, x_seq):
    return stepped(pytest.importorskip("snntorch.import_nir").import_from_nir(graph), x_seq)


def by_norse(graph, path, x_seq):
    nir.write(path, graph)
    return stepped(pytest.importorskip("norse.torch").from_nir(nir.read(path), dt=1e-4), x_seq)


def by_spikingjelly(graph, path, x_seq):
    nir.write(path, graph)
    read = pytest.importorskip("spikingjelly.activation_based.nir_exchange").import_from_nir
    return stepped(read(path, step_mode="s"), x_seq)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:nirtorch")
@pytest.mark.parametrize("read", [by_snntorch, by_norse, by_spikingjelly])
def test_others_read_it(read, tmp_path):
    """Norse ignores r, v_reset, and weights without a bias."""
    model, x_seq = network()
    if read is by_norse:
        model.extend([
            nn.Linear(12, 6, bias=False),
            LIF(6, granularity="channel", learn_decay=True, input_gain=0.3, v_threshold=0.05),
            nn.Linear(6, 5), LIF(decay=1.0, input_gain=0.5, v_threshold=0.1), nn.Linear(5, 4),
            LIF(v_rest=0.2, v_reset=0.2),
        ]).eval()  # fmt: skip
        model[5].logit_decay += torch.linspace(-1, 2, 6)
        for linear in (model[6], model[8]):
            linear.weight *= 4
    elif read is by_spikingjelly:
        model.extend([nn.Linear(12, 6), LIF(decay=1.0, v_threshold=0.1)]).eval()
    assert_same_spikes(model, x_seq, read(to_nir(model, x_seq), tmp_path / "model.nir", x_seq))


def outputs_of_norse(cell, model, x_seq, **values):
    """Norse writes dt / tau_mem_inv as tau; its cells have steps of 1e-3. Files take numbers by neuron alone."""
    norse = pytest.importorskip("norse.torch")
    kind = getattr(norse, cell.replace("Cell", "Parameters"))
    values = {"v_th": 0.1, "tau_mem_inv": 200.0, **values} if cell != "IAFCell" else {"v_th": 0.4, **values}

    def neurons(size):
        numbers = {name: float(kind._field_defaults[name]) for name in OF_NEURONS & {*kind._fields}} | values
        each = {name: torch.full((size,), value) for name, value in numbers.items() if isinstance(value, float)}
        return getattr(norse, cell)(kind(**{**numbers, **each}))

    for linear in (model[0], model[2]):
        linear.weight *= 4
    other = norse.SequentialState(model[0], neurons(16), model[2], neurons(12))
    return norse.to_nir(other, x_seq[0, 0], dt=1.0), stepped(other, x_seq), 1.0 if cell == "IAFCell" else 1e-3


def reset_subtract(*given):
    return pytest.importorskip("norse.torch").functional.reset.reset_subtract(*given)


OF_NEURONS = {"v_leak", "tau_syn_inv", "tau_mem_inv", "v_reset"}


def outputs_of_snntorch(kind, model, x_seq, mechanism="zero", delay=True):
    snntorch, module = pytest.importorskip("snntorch"), pytest.importorskip("snntorch.export_nir")

    def neurons(size):
        current = {"alpha": torch.linspace(0.3, 0.8, size)} if kind == "Synaptic" else {}
        return getattr(snntorch, kind)(
            beta=torch.full((size,), 0.75), threshold=torch.full((size,), 1.5 if current else 0.8), **current,
            reset_mechanism=mechanism, reset_delay=delay, init_hidden=True,
        )  # fmt: skip

    other = nn.Sequential(model[0], neurons(16), model[2], neurons(12))
    graph = module.export_to_nir(other, x_seq[:1, 0], ignore_dims=[0])
    for index in (1, 3):
        other[index].reset_mem()
    return graph, torch.stack([other(x) for x in x_seq]), None


def outputs_of_sinabs(model, x_seq, single=True, to_zero=True):
    """It writes r = 1, in steps."""
    layers, sinabs_nir = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.nir")
    activation = pytest.importorskip("sinabs.activation")
    neurons = layers.IAFSqueeze(
        batch_size=5, spike_fn=activation.SingleSpike if single else activation.MultiSpike,
        reset_fn=activation.MembraneReset() if to_zero else activation.MembraneSubtract(),
        spike_threshold=torch.tensor(3.0),
    )  # fmt: skip
    other, batch_first = nn.Sequential(model[0], neurons), x_seq.transpose(0, 1).flatten(0, 1)
    graph = sinabs_nir.to_nir(other, batch_first)
    neurons.reset_states()
    return graph, other(batch_first).unflatten(0, (5, 20)).transpose(0, 1), 1.0


def outputs_of_spikingjelly(make, model, x_seq):
    module = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    from spikingjelly.activation_based import functional, neuron

    other = nn.Sequential(model[0], make(neuron), model[2], make(neuron))
    functional.set_step_mode(other, "m")
    graph = module.export_to_nir(other, x_seq)
    functional.reset_net(other)
    return graph, other(x_seq), None


# What docs/guides/nir.md says of the files that other libraries write: equal spikes, or others.
WRITERS = {
    "norse, LIFBoxCell": partial(outputs_of_norse, "LIFBoxCell", v_leak=0.05),
    "norse, IAFCell": partial(outputs_of_norse, "IAFCell"),
    "snntorch, Leaky": partial(outputs_of_snntorch, "Leaky"),
    "snntorch, Leaky, at once": partial(outputs_of_snntorch, "Leaky", delay=False),
    "snntorch, Synaptic, at once": partial(outputs_of_snntorch, "Synaptic", delay=False),
    "sinabs, IAF": outputs_of_sinabs,
    "spikingjelly, LIFNode": partial(
        outputs_of_spikingjelly, lambda neuron: neuron.LIFNode(3.0, v_reset=0.1, v_threshold=0.4)
    ),
    "spikingjelly, decay_input": partial(outputs_of_spikingjelly, lambda neuron: neuron.LIFNode(decay_input=False)),
    "spikingjelly, IFNode": partial(outputs_of_spikingjelly, lambda neuron: neuron.IFNode()),
    "spikingjelly, ParametricLIFNode": partial(
        outputs_of_spikingjelly, lambda neuron: neuron.ParametricLIFNode(1.5, v_threshold=0.4)
    ),
    "spikingjelly, CUBALIFNode": partial(outputs_of_spikingjelly, lambda neuron: neuron.CUBALIFNode(0.6, 0.7)),
}
OTHERS = {
    "norse, LIFCell": partial(outputs_of_norse, "LIFCell"),
    "norse, a reset to another value": partial(outputs_of_norse, "LIFBoxCell", v_reset=-0.2),
    "norse, a reset by subtraction": partial(outputs_of_norse, "LIFBoxCell", reset_method=reset_subtract),
    "snntorch, Synaptic": partial(outputs_of_snntorch, "Synaptic"),
    "snntorch, subtract": partial(outputs_of_snntorch, "Leaky", mechanism="subtract"),
    "snntorch, none": partial(outputs_of_snntorch, "Leaky", mechanism="none"),
    "sinabs, several spikes": partial(outputs_of_sinabs, single=False, to_zero=False),
    "sinabs, a reset by subtraction": partial(outputs_of_sinabs, to_zero=False),
    "spikingjelly, IFNode that starts at v_reset": partial(
        outputs_of_spikingjelly, lambda neuron: neuron.IFNode(v_reset=-0.2)
    ),
}


def in_file(graph, path):
    nir.write(path, graph)
    return nir.read(path)


@torch.no_grad()
@pytest.mark.usefixtures("in_double", "spikes_in_double")
@pytest.mark.filterwarnings("ignore:nirtorch")
@pytest.mark.parametrize("name", [*WRITERS, *OTHERS])
def test_others_write_it(name, tmp_path):
    """In float64, through a file. A file names no reset, no delay and no gain, so that others can't be refused."""
    model, x_seq = network()
    model, x_seq = model.double(), x_seq.double()
    graph, expected, dt = {**WRITERS, **OTHERS}[name](model, x_seq)
    s_seq = from_nir(in_file(graph, tmp_path / "model.nir"), dt=dt, dtype=torch.float64)(x_seq)
    assert fires(expected)
    differ = (s_seq != expected).double().mean()
    assert differ == 0 if name in WRITERS else differ > 0.01


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:nirtorch")
def test_norses_own_step():
    """By default Norse multiplies its time constants by 1e-3, so that a cell's step is 1e-6 there."""
    norse = pytest.importorskip("norse.torch")
    other, x = norse.SequentialState(nn.Linear(8, 16), norse.LIFBoxCell()), torch.rand(20, 5, 8)
    graph = norse.to_nir(other, x[0])
    with pytest.raises(ValueError, match=r"tau must be at least dt = 0\.001, got 1e-05; if the graph was written for"):
        from_nir(graph, dt=1e-3)
    assert from_nir(graph, dt=1e-6).get_submodule("1").decay == pytest.approx(0.9)
