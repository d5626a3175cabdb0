"""Layers of other libraries whose spikes return to them, converted: against the library's own."""

import copy
import pickle

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from conversions import SINGLE
from sinabs.activation import MembraneReset, MembraneSubtract
from snntorch import surrogate
from spikingjelly.activation_based import layer, neuron
from torch import nn

import asgl_cuda
from asgl_cuda.interop.snntorch import MultiStep

T, B, N = 6, 3, 5
pytestmark = pytest.mark.usefixtures("in_double", "spikes_in_double")

Linear, ElementWise = layer.LinearRecurrentContainer, layer.ElementWiseRecurrentContainer


def each(*values):
    """A value for each neuron."""
    return torch.linspace(*values, N)


def norse_values(**values):
    given = {"tau_mem_inv": 400.0, "alpha": 2.0, "v_th": 0.3, **values}
    return norse.LIFParameters(**{name: torch.as_tensor(value) for name, value in given.items()})


def stepped(made, x_seq, state):
    """A call for each step, which is given what the last one returned, or keeps it."""
    results = []
    for x in x_seq:
        result = made(x, *state)
        results.append(result if isinstance(result, tuple) else (result,))
        state = results[-1] if isinstance(result, tuple) and not getattr(made, "init_hidden", False) else ()
    return [torch.stack(values) for values in zip(*results, strict=True)], state


def called(made, x_seq, state):
    """One call with the whole sequence."""
    result = made(x_seq, *state)
    results = list(result) if isinstance(result, tuple) else [result]
    keeps = getattr(getattr(made, "layer", made), "init_hidden", True)
    return results, () if keeps else tuple(value[-1] for value in results)


def with_norse(made, x_seq, state):
    if isinstance(made, norse.LIFRecurrent):
        spikes, state = made(x_seq, *state)
        last = type(state)(*(value[-1] for value in state)) if made.record_states else state
        return [spikes, *state], (last,)
    spikes = []
    for x in x_seq:
        result, *state = made(x, *state)
        spikes.append(result)
    return [torch.stack(spikes), *state[0]], state


def with_sinabs(made, x_seq, state):
    spikes = made(x_seq.transpose(0, 1)).transpose(0, 1)
    return [spikes, made.v_mem, *([] if made.i_syn is None else [made.i_syn])], ()


def with_spikingjelly(made, x_seq, state):
    spikes = made(x_seq) if made.step_mode == "m" else torch.stack([made(x) for x in x_seq])
    node = made.sub_module[-1] if isinstance(made.sub_module, nn.Sequential) else made.sub_module
    return [spikes, made.y, node.v, *([node.c] if hasattr(node, "c") else [])], ()


ATAN = {"spike_grad": surrogate.atan(alpha=2.0)}
LEARNED = {"learn_beta": True, "learn_threshold": True, **ATAN}
# A layer, how it is called, and the shape of a step.
LAYERS = {
    "RLeaky": (lambda: snntorch.RLeaky(0.8, linear_features=N, **LEARNED), stepped, (B, N)),
    "RLeaky, each": (
        lambda: snntorch.RLeaky(each(0.5, 0.9), V=each(-0.5, 1.0), all_to_all=False, **LEARNED), stepped, (B, N),
    ),
    "RLeaky, state inside": (
        lambda: snntorch.RLeaky(0.8, V=0.5, all_to_all=False, init_hidden=True, output=True, **ATAN), stepped,
        (B, 2, N),
    ),
    "RLeaky, spikes alone": (
        lambda: snntorch.RLeaky(0.8, linear_features=N, init_hidden=True, learn_recurrent=False, **ATAN), stepped,
        (B, N),
    ),
    "RLeaky, none": (
        lambda: snntorch.RLeaky(0.8, linear_features=N, reset_mechanism="none", **ATAN), stepped, (B, N),
    ),
    "RLeaky, values of other shapes": (
        lambda: snntorch.RLeaky(torch.linspace(0.5, 0.9, 2 * N).reshape(2, N), V=0.5, all_to_all=False, **LEARNED),
        stepped, (B, 2, N),
    ),
    "RLeaky, forgets": (lambda: snntorch.RLeaky(1e-4, linear_features=N, learn_beta=True, **ATAN), stepped, (B, N)),
    "RSynaptic": (
        lambda: snntorch.RSynaptic(0.7, 0.8, linear_features=N, learn_alpha=True, **LEARNED), stepped, (B, N),
    ),
    "RSynaptic, each": (
        lambda: snntorch.RSynaptic(each(0.2, 0.8), each(0.5, 0.9), V=each(-0.5, 1.0), all_to_all=False, **LEARNED),
        stepped, (B, N),
    ),
    "RSynaptic, spikes alone": (
        lambda: snntorch.RSynaptic(0.7, 0.8, linear_features=N, init_hidden=True, **ATAN), stepped, (B, N),
    ),
    "LIFRecurrent": (lambda: norse.LIFRecurrent(4, N, norse_values()), with_norse, (B, 4)),
    "LIFRecurrent, recorded": (
        lambda: norse.LIFRecurrent(4, N, norse_values(v_leak=0.125, v_reset=-0.25), record_states=True, autapses=True),
        with_norse, (B, 2, 4),
    ),
    "LIFRecurrent, each": (
        lambda: norse.LIFRecurrent(4, N, norse_values(tau_mem_inv=each(300.0, 600.0), tau_syn_inv=each(100.0, 200.0))),
        with_norse, (B, 4),
    ),
    "LIFRecurrentCell": (lambda: norse.LIFRecurrentCell(4, N, norse_values()), with_norse, (B, 4)),
    "sinabs": (lambda: sinabs.layers.LIFRecurrent(3.0, nn.Linear(N, N), **SINGLE).double(), with_sinabs, (B, N)),
    "sinabs, each": (
        lambda: sinabs.layers.LIFRecurrent(
            each(2.0, 4.0), nn.Linear(N, N), each(1.0, 3.0), train_alphas=True, **SINGLE
        ).double(),
        with_sinabs, (B, N),
    ),
    "sinabs, reset": (
        lambda: sinabs.layers.LIFRecurrent(
            3.0, nn.Linear(N, N, bias=False), reset_fn=MembraneReset(), norm_input=False, **SINGLE
        ).double(),
        with_sinabs, (B, N),
    ),
    "sinabs IAF": (
        lambda: sinabs.layers.IAFRecurrent(
            nn.Linear(N, N), tau_syn=2.0, reset_fn=MembraneSubtract(0.5), **SINGLE
        ).double(),
        with_sinabs, (B, 2, N),
    ),
    "container": (lambda: Linear(neuron.LIFNode(v_reset=0.25), N, N, step_mode="m"), with_spikingjelly, (B, N)),
    "container, a step": (lambda: Linear(neuron.LIFNode(v_reset=None), N, N), with_spikingjelly, (B, N)),
    "container of a Linear": (
        lambda: Linear(nn.Sequential(nn.Linear(4, N), neuron.ParametricLIFNode()), 4, N, step_mode="m"),
        with_spikingjelly, (B, 2, 4),
    ),
    "container, CUBALIFNode": (
        lambda: Linear(neuron.CUBALIFNode(), N, N, bias=False, step_mode="m"), with_spikingjelly, (B, N),
    ),
    "element-wise": (
        lambda: ElementWise(neuron.IFNode(v_reset=None), lambda y, x: x - 0.3 * y, step_mode="m"), with_spikingjelly,
        (B, 2, N),
    ),
    "element-wise, no batch": (
        lambda: ElementWise(neuron.LIFNode(v_threshold=0.5), torch.add, step_mode="m"), with_spikingjelly, (),
    ),
    "element-wise, a step": (
        lambda: ElementWise(neuron.LIFNode(decay_input=False, detach_reset=True), lambda y, x: y + x),
        with_spikingjelly, (B, N),
    ),
}  # fmt: skip
SEQUENCES = [name for name in LAYERS if name.startswith("R")]  # of snnTorch, which takes steps
CASES = [*((name, False) for name in LAYERS), *((name, True) for name in SEQUENCES)]
over_cases = pytest.mark.parametrize(
    ("name", "in_sequence"), CASES, ids=[f"{name}{', in sequence' if whole else ''}" for name, whole in CASES]
)
over_layers = pytest.mark.parametrize("name", LAYERS)


def case(name, in_sequence=False, **options):
    """A layer, its conversion, and how each is called."""
    torch.manual_seed(1)
    make, call, _ = LAYERS[name]
    made = make()
    if name.endswith(("a step", "Cell")):  # else their own step
        options.setdefault("backend", "reference")
    converted, report = asgl_cuda.convert(made, **options)
    assert [row.path for row in report.replaced] == [""], report
    return made, MultiStep(converted) if in_sequence else converted, call, called if in_sequence else call


def inputs(name, calls=1):
    *_, shape = LAYERS[name]
    low, high = (0, 20) if name.startswith("container") else (-3, 4)
    return [torch.empty(T, *shape).uniform_(low, high).requires_grad_() for _ in range(calls)]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def gradients(values, made, *others):
    weights = [torch.linspace(-1, 1, value.numel()).reshape(value.shape) for value in values]
    tensors = getattr(made, "p", ())
    learned = [each for each in (*made.parameters(), *tensors) if isinstance(each, torch.Tensor) and each.requires_grad]
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    return torch.autograd.grad(loss, [*others, *learned], allow_unused=True, materialize_grads=True)


@over_cases
def test_outputs_states_and_gradients(name, in_sequence):
    """Through two calls, in which states go on as they do in the library."""
    made, converted, call, ours_call = case(name, in_sequence)
    sequences = inputs(name, 2)
    theirs, ours, state, our_state = [], [], (), ()
    for x_seq in sequences:
        found, state = call(made, x_seq, state)
        mine, our_state = ours_call(converted, x_seq, our_state)
        theirs += found
        ours += mine
    assert 0 < (theirs[0] + theirs[len(theirs) // 2]).mean() < 2
    same(ours, theirs)
    expected = gradients(theirs, made, *sequences)
    assert all(gradient.any() for gradient in expected[2:])
    same(gradients(ours, converted, *sequences), expected)
    asgl_cuda.reset(converted)
    same(ours_call(converted, sequences[0], ())[0], ours[: len(ours) // 2])


@over_layers
def test_copies_state_dicts_and_revert(name):
    made, converted, call, _ = case(name)
    (x_seq,) = inputs(name)
    assert list(converted.state_dict()) == list(made.state_dict())
    expected = [value.clone() for value in call(made, x_seq, ())[0]]
    asgl_cuda.reset(made)
    copies = [copy.deepcopy(converted)]
    if name.startswith(("sinabs", "container")):  # others hold functions and classes that pickle can't find
        copies.append(pickle.loads(pickle.dumps(converted)))
    original, report = asgl_cuda.revert(converted)
    assert type(original) is type(made)
    assert len(report.replaced) == 1
    assert not report.left
    learned = {key: value for key, value in made.state_dict().items() if key not in ("v_mem", "i_syn")}
    for copied in (*copies, original):
        copied.load_state_dict(learned, strict=False)
        same(call(copied, x_seq, ())[0], expected)


@over_layers
def test_parameters_are_the_layers_own(name):
    torch.manual_seed(1)
    make, call, _ = LAYERS[name]
    made = make()
    before = dict(made.named_parameters())
    if not any(value.requires_grad for value in before.values()):
        pytest.skip("has no parameters that learn")
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    converted, _ = asgl_cuda.convert(made, inplace=True)
    assert converted is made
    assert {key: id(value) for key, value in converted.named_parameters()} == {k: id(v) for k, v in before.items()}
    (x_seq,) = inputs(name)
    first, _ = call(converted, x_seq, ())
    sum(value.sum() for value in first).backward()
    optimizer.step()
    asgl_cuda.reset(converted)
    after, _ = call(converted, x_seq, ())
    original, _ = asgl_cuda.revert(converted)
    asgl_cuda.reset(original)
    same(after, call(original, x_seq, ())[0])
    assert any(not torch.equal(one, other) for one, other in zip(first, after, strict=True))


@pytest.mark.parametrize(("name", "other"), [
    ("RLeaky", None), ("RSynaptic", None), ("LIFRecurrent", norse.LIFRecurrentCell), ("container", None),
    ("element-wise", None),
])  # fmt: skip
def test_smooth_steps_are_the_smooth_sequence(name, other):
    """With analog_prob 1 the smooth values return, in sequences as in steps."""
    asgl = {"analog_prob": 1.0, "width": 0.7, "surrogate": "sigmoid"}
    _, whole, call, _ = case(name, asgl=asgl)
    steps = copy.deepcopy(whole)
    if other is not None:
        cell = other(4, N, norse_values())
        cell.load_state_dict({key: value for key, value in whole.state_dict().items() if key != "log_width"})
        steps, _ = asgl_cuda.convert(cell, asgl=asgl)
    elif name in ("container", "element-wise"):
        steps.step_mode = "s"
    else:
        whole = MultiStep(whole)
    (x_seq,) = inputs(name)
    theirs, _ = call(steps, x_seq, ())
    ours, _ = (called if isinstance(whole, MultiStep) else call)(whole, x_seq, ())
    assert ((theirs[0] > 0) & (theirs[0] < 1)).all()
    same(ours, theirs)
    expected = gradients(theirs, steps, x_seq)
    assert all(gradient.any() for gradient in expected)
    same(gradients(ours, whole, x_seq), expected)
    whole.eval()
    asgl_cuda.reset(whole)
    hard, _ = (called if isinstance(whole, MultiStep) else call)(whole, x_seq, ())
    assert set(hard[0].unique().tolist()) == {0.0, 1.0}


def hooked(made, path):
    made.get_submodule(path).register_forward_hook(lambda module, args, output: output)
    return made


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
SOME = {"linear_features": N}
# A layer that is left, and why.
LEFT = {
    "convolution": (
        lambda: snntorch.RLeaky(0.9, conv2d_channels=2, kernel_size=3), "its spikes return through a Conv2d; a Linear",
    ),
    "convolution of a synapse": (
        lambda: snntorch.RSynaptic(0.9, 0.9, conv2d_channels=2, kernel_size=3), "return through a Conv2d; a Linear",
    ),
    "hooks": (lambda: hooked(snntorch.RLeaky(0.9, **SOME), "recurrent"), "a Linear with hooks, which would no longer"),
    "reset to 0": (
        lambda: snntorch.RLeaky(0.9, reset_mechanism="zero", **SOME), "it resets the input of the next step to 0",
    ),
    "a reset that fails": (
        lambda: snntorch.RSynaptic(0.9, 0.9, reset_delay=False, **SOME), r"fails in snnTorch \(reset_delay=False\)",
    ),
    "a Sequential": (lambda: sinabs.layers.LIFRecurrent(2.0, FLAT, **SINGLE), "return through a Sequential; a Linear"),
    "several spikes": (
        lambda: sinabs.layers.LIFRecurrent(2.0, nn.Linear(N, N)), "times a step, which recurrent neurons do not",
    ),
    "least potential": (
        lambda: sinabs.layers.LIFRecurrent(2.0, nn.Linear(N, N), min_v_mem=-1.0, **SINGLE), "recurrent neurons lack",
    ),
    "recorded": (
        lambda: sinabs.layers.LIFRecurrent(2.0, nn.Linear(N, N), record_states=True, **SINGLE), r"\(record_states\)",
    ),
    "adaptive": (
        lambda: sinabs.layers.ALIFRecurrent(2.0, 2.0, rec_connect=nn.Linear(N, N)), "it mixes neurons, or steps, by",
    ),
    "an own surrogate": (
        lambda: snntorch.RLeaky(0.9, spike_grad=surrogate.SFS(), **SOME), "its surrogate",
    ),
    "adjoint": (
        lambda: norse.LIFRecurrent(4, N, norse.LIFParameters(method="adjoint")), "it steps by lif_adjoint_step",
    ),
    "another model": (lambda: norse.LSNNRecurrent(4, N), "it mixes neurons, or steps, by weights of its own"),
    "a product": (
        lambda: ElementWise(neuron.IFNode(), lambda y, x: y * x), r"return by <lambda>\(y, x\); x \+ w y with a num",
    ),
    "a root": (lambda: ElementWise(neuron.IFNode(), lambda y, x: x + y.abs().sqrt()), "x \\+ w y with a number w"),
    "of a tensor": (
        lambda: ElementWise(neuron.IFNode(), (lambda w: lambda y, x: x + w * y)(torch.ones(1))), "x \\+ w y with a num",
    ),
    "a module": (lambda: ElementWise(neuron.IFNode(), nn.Bilinear(N, N, N)), r"return by Bilinear\(y, x\)"),
    "an error": (lambda: ElementWise(neuron.IFNode(), lambda y, x: y.nothing), "x \\+ w y with a number w"),
    "integer spikes": (lambda: Linear(neuron.ILIFNode(), N, N), "its ILIFNode is no neuron that recurrent layers have"),
    "an unknown node": (lambda: Linear(neuron.QIFNode(), N, N), "its QIFNode: asgl_cuda has no such neuron"),
    "no node": (lambda: Linear(nn.ReLU(), N, N), "its ReLU is no neuron that recurrent layers have"),
    "kept potentials": (
        lambda: Linear(neuron.LIFNode(store_v_seq=True), N, N), r"its LIFNode stores its potentials \(store_v_seq\)",
    ),
    "weights in between": (
        lambda: Linear(nn.Sequential(nn.Linear(N, N), nn.ReLU(), neuron.IFNode()), N, N), "its Sequential is no neuron",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_by_name(name):
    make, why = LEFT[name]
    made = make()
    before = type(made)
    converted, report = asgl_cuda.convert(made, inplace=True)
    assert type(converted) is before
    reasons = [row.reason for row in report.left if row.path == ""]
    assert len(reasons) == 1
    with pytest.raises(ValueError, match=why):
        raise ValueError(reasons[0])


CHANGES = {
    "another connection": ("RLeaky", lambda made: setattr(made, "recurrent", nn.Identity()), "through a Identity"),
    "a hook": ("sinabs", lambda made: hooked(made, "rec_connect"), "with hooks"),
    "recorded": ("sinabs", lambda made: setattr(made, "record_states", True), "record_states is True"),
    "another node": ("container", lambda made: setattr(made, "sub_module", neuron.QIFNode()), "sub_module is QIFNode"),
    "another function": (
        "element-wise", lambda made: setattr(made, "element_wise_function", torch.mul), "element_wise_function is mul",
    ),
    "potentials": ("container", lambda made: setattr(made.sub_module, "store_v_seq", True), "store_v_seq is True"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_conversion_are_refused(change):
    name, function, words = CHANGES[change]
    _, converted, _, call_in_sequence = case(name, in_sequence=name == "RLeaky")
    function(getattr(converted, "layer", converted))
    with pytest.raises(RuntimeError, match=f"was changed after its conversion: its .*{words}"):
        call_in_sequence(converted, *inputs(name), ())


@pytest.mark.parametrize("name", ["LIFRecurrentCell", "container, a step"])
def test_steps_without_noise_are_the_librarys_own(name, monkeypatch):
    """Which are faster than a kernel's call; with `asgl` or a backend they are not."""
    calls = []
    original = asgl_cuda.interop.recurrent.recurrent_lif
    monkeypatch.setattr(
        asgl_cuda.interop.recurrent, "recurrent_lif", lambda *x, **o: calls.append(1) or original(*x, **o)
    )
    for options, times in (({"backend": None}, 0), ({}, T), ({"backend": None, "asgl": {}}, T)):
        calls.clear()
        _, converted, call, _ = case(name, **options)
        call(converted, *inputs(name), ())
        assert len(calls) == times


def test_diagonal_without_autapses_has_no_gradient():
    """Norse's hook of its weight is the copy's as well."""
    _, converted, call, _ = case("LIFRecurrent")
    call(converted, *inputs("LIFRecurrent"), ())[0][0].sum().backward()
    gradient = converted.recurrent_weights.grad
    assert gradient.any()
    assert not gradient.diagonal().any()


@pytest.mark.parametrize("name", ["RLeaky, spikes alone", "container", "container, a step"])
def test_step(name):
    """asgl_cuda.step carries the spikes that return."""
    _, converted, call, _ = case(name)
    (x_seq,) = inputs(name)
    (expected, *_), _ = call(converted, x_seq, ())
    asgl_cuda.reset(converted)
    same([torch.stack([asgl_cuda.step(converted, x) for x in x_seq])], [expected])


@pytest.mark.parametrize("name", ["LIFRecurrent", "sinabs", "container", "RSynaptic"])
def test_compiled_sequences(name):
    _, converted, _, call = case(name, in_sequence=name == "RSynaptic")
    (x_seq,) = inputs(name)
    state = ()
    if name == "LIFRecurrent":  # whose own first state torch.compile can't trace
        state = call(converted, x_seq, ())[1]
    expected, _ = call(converted, x_seq, state)
    asgl_cuda.reset(converted)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    given = x_seq.transpose(0, 1) if name == "sinabs" else x_seq
    found = compiled(given, *state)
    found = found[0] if isinstance(found, tuple) else found
    same([found.transpose(0, 1) if name == "sinabs" else found], expected[:1])


def test_weights_are_in_the_group_of_weights():
    """What returns spikes is no parameter of the neurons."""
    for name, weights in {
        "RLeaky, each": {"V"},
        "RLeaky": {"recurrent.weight", "recurrent.bias"},
        "LIFRecurrent": {"input_weights", "recurrent_weights"},
        "container of a Linear": {"rc.weight", "rc.bias", "sub_module.0.weight", "sub_module.0.bias"},
    }.items():
        _, converted, *_ = case(name, asgl={})
        groups = {group["name"]: group["params"] for group in asgl_cuda.parameter_groups(converted, lr=0.1)}
        named = {id(value): key for key, value in converted.named_parameters()}
        assert {named[id(value)] for value in groups["weights"]} == weights
        assert [named[id(value)] for value in groups["widths"]] == ["log_width"]
