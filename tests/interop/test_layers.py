"""Each library's layers against their conversions: one table, `conversions.CASES`, one test a question."""

import copy
import pickle
from contextlib import nullcontext

import norse.torch as norse
import pytest
import sinabs.layers
import snntorch
import torch
from conversions import (
    CASES,
    LAYERS,
    NOT_WHOLE,
    READ_OUT,
    RECURRENT,
    SINGLE,
    SNNTORCH,
    WHOLE,
    B,
    N,
    T,
    authors_layer,
    flat,
    gradients,
    leaky,
    norse_values,
    norses,
    run,
    same,
)  # fmt: skip
from snntorch import utils
from spikingjelly.activation_based import functional, neuron
from torch import nn

import asgl_cuda
from asgl_cuda.calls import recompute
from asgl_cuda.interop.converted import Converted
from asgl_cuda.interop.snntorch import MultiStep

# ---- outputs, states and gradients, in float64 ----


def case(name, whole=False, **options):
    """A layer and its conversion, `whole` for a whole sequence of a layer of snnTorch."""
    torch.manual_seed(1)
    made, twin = CASES[name].make(), CASES[name].make()
    twin.load_state_dict(made.state_dict())
    if name in RECURRENT and name.endswith(("a step", "Cell")):  # else their own step
        options.setdefault("backend", "reference")
    converted, report = asgl_cuda.convert(twin, inplace=True, **options)
    assert len(report.replaced) == 1, report
    assert CASES[name].by in (None, report.replaced[0].by) or options.get("asgl")
    return made, MultiStep(converted, stateful=True) if whole else converted


def inputs(name, calls=2, dtype=torch.float64):
    _, _, shape, scale, *_ = CASES[name]
    torch.manual_seed(0)
    return [(scale * (torch.randn(T, *shape, dtype=dtype) + 0.3)).requires_grad_() for _ in range(calls)]


def calls_of(layer, sequences):
    """The results of several calls, with states carried over."""
    found, state = [], ()
    for x_seq in sequences:
        results, state = run(layer, x_seq, state)
        found += results
    return found


OF_STEPS = [*SNNTORCH, *(name for name in RECURRENT if name.startswith("R"))]  # which MultiStep takes, too
ALL_CASES = [(name, False) for name in CASES] + [(name, True) for name in OF_STEPS if name not in NOT_WHOLE]
in_double = pytest.mark.usefixtures("in_double", "spikes_in_double")


@in_double
@pytest.mark.parametrize(
    ("name", "whole"), ALL_CASES, ids=[f"{name}{', whole' if whole else ''}" for name, whole in ALL_CASES]
)
def test_equal(name, whole):
    """Spikes, outputs, states and all gradients of two calls in training and one in evaluation."""
    made, converted = case(name, whole)
    layer = converted.layer if whole else converted
    assert isinstance(layer, type(made))
    assert list(layer.state_dict()) == list(made.state_dict())
    _, by, *_, rtol, fires = CASES[name]
    for calls in (2, 1) if not name.startswith("Inv") else (2,):  # the authors' layer has no gradient in evaluation
        sequences = inputs(name, calls)
        theirs, ours = (calls_of(each.double().train(calls == 2), sequences) for each in (made, converted))
        if fires and by != READ_OUT:
            assert 0.02 < (theirs[0] != 0).double().mean() < 0.98
            assert torch.equal(ours[0], theirs[0])
        same(ours, theirs, rtol)
        expected = gradients(theirs, made, *sequences)
        assert all(gradient is not None and gradient.any() for gradient in expected[:calls])
        same(gradients(ours, converted, *sequences), expected, rtol)
        asgl_cuda.reset(made), asgl_cuda.reset(converted)


def test_resets_with_gradients_need_steps():
    for name in NOT_WHOLE:
        with pytest.raises(ValueError, match="needs reset_delay=True, got False"):
            MultiStep(CASES[name].make())


LEARNED_ALONE = ("PLIF, 0.0", "Leaky, learned, subtract", "Synaptic, learned, none", "LIF, super")
LEARNING = [name for name in CASES if "element" not in name and (name in RECURRENT or name in LEARNED_ALONE)]


@in_double
@pytest.mark.parametrize("name", LEARNING)
def test_parameters_copies_and_revert(name):
    """Parameters are the layer's own, states are copied, and the original comes back with what was learned."""
    (made, converted), rtol = case(name), max(1e-10, CASES[name].rtol)
    (x_seq,) = inputs(name, 1)
    copies = [copy.deepcopy(converted)]
    if name in RECURRENT and name.startswith(("sinabs", "container")):  # others hold what pickle can't find
        copies.append(pickle.loads(pickle.dumps(converted)))
    expected, _ = run(made, x_seq)
    for each in (converted, *copies):
        same(run(each, x_seq)[0], expected, rtol)
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.5)
    ids = {key: id(value) for key, value in converted.named_parameters()}
    asgl_cuda.reset(converted)
    first, _ = run(converted, x_seq)
    sum(value.sum() for value in first).backward()
    optimizer.step()
    asgl_cuda.reset(converted)
    after = [value.detach().clone() for value in run(converted, x_seq)[0]]
    original, report = asgl_cuda.revert(converted, inplace=True)
    assert (type(original), len(report.replaced), report.left) == (type(made), 1, [])
    assert {key: id(value) for key, value in original.named_parameters()} == ids
    asgl_cuda.reset(original)
    same(after, run(original, x_seq)[0], rtol)
    learned = [value for value in original.parameters() if value.requires_grad]
    assert any(value.grad.any() for value in learned) or not learned
    learned = {key: value for key, value in original.state_dict().items() if key not in ("v_mem", "i_syn")}
    made.load_state_dict(learned, strict=False)
    asgl_cuda.reset(made)
    same(run(made, x_seq)[0], after, rtol)


# ---- noise, and the smooth value ----


@in_double
@pytest.mark.parametrize(
    ("name", "other"),
    [("RLeaky", None), ("RSynaptic", None), ("LIFRecurrent", norse.LIFRecurrentCell), ("container", None),
     ("element-wise", None), ("Leaky, learned, subtract", None)],
)  # fmt: skip
def test_smooth_steps_are_the_smooth_sequence(name, other):
    """With analog_prob 1 neurons reset by, and spikes return as, the smooth values, in sequences as in steps."""
    asgl = {"analog_prob": 1.0, "width": 0.7, "surrogate": "sigmoid"}
    _, whole = case(name, asgl=asgl)
    steps = copy.deepcopy(whole)
    if other is not None:
        cell = other(4, N, norse_values())
        cell.load_state_dict({key: value for key, value in whole.state_dict().items() if key != "log_width"})
        steps, _ = asgl_cuda.convert(cell, asgl=asgl)
    elif name in ("container", "element-wise"):
        steps.step_mode = "s"
    else:
        whole = MultiStep(whole)
    (x_seq,) = inputs(name, 1)
    (theirs, _), (ours, _) = run(steps, x_seq), run(whole, x_seq)
    assert ((theirs[0] > 0) & (theirs[0] < 1)).all()
    same(ours, theirs, 1e-10)
    expected = gradients(theirs, steps, x_seq)
    assert all(gradient.any() for gradient in expected)
    same(gradients(ours, whole, x_seq), expected, 1e-10)
    asgl_cuda.reset(whole.eval())
    assert set(run(whole, x_seq)[0][0].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("learnable", [False, True])
def test_the_authors_widths_before_they_are_made(learnable):
    """The first call of either layer makes the parameter, with the authors' shape and name."""
    layer = authors_layer(made=False, steps=3, granularity="channel")
    layer.cell.spike_fn.inv_sg.learnable = learnable
    converted, _ = asgl_cuda.convert(layer)
    x_seq = torch.randn(5, 2, 6, 3, 3)
    torch.testing.assert_close(converted(x_seq), layer(x_seq))
    shapes = ({name: value.shape for name, value in each.named_parameters()} for each in (converted, layer))
    assert next(shapes) == next(shapes)
    assert torch.as_tensor(converted.width).mean().item() == pytest.approx(0.5)


def test_the_authors_noise():
    layer = authors_layer(steps=1, p=0.3, thresh=1.0)
    converted, _ = asgl_cuda.convert(layer)
    x_seq = torch.full((1, 20000), 1.25)
    analog = torch.sigmoid(torch.tensor(0.5))
    assert abs((converted(x_seq) == analog).float().mean() - 0.3) < 0.02
    assert converted.analog_prob == 0.3
    converted.analog_prob = 0.1  # as a schedule sets it
    assert abs((converted(x_seq) == analog).float().mean() - 0.1) < 0.02
    assert (converted.eval()(x_seq) == 1).all()
    back, report = asgl_cuda.revert(converted)
    assert (type(back), back.cell.spike_fn.p, report.left) == (type(layer), 0.1, [])


# ---- in a network with weights before and behind, spikes recomputed ----


class Network(nn.Module):
    """A layer between weights; of several outputs the first."""

    def __init__(self, layer, features):
        super().__init__()
        self.before, self.layer, self.behind = nn.Linear(features, features), layer, nn.Linear(features, 3)

    def forward(self, x):
        return self.behind(flat(self.layer(self.before(x)))[0])


@pytest.mark.parametrize("asgl", [None, {"width": 1.0, "analog_prob": 0.3}], ids=["same", "asgl"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "authors"])
def test_recomputed_spikes(name, asgl, monkeypatch):
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    model, report = asgl_cuda.convert(Network(make(), shape[-1]), asgl=asgl)
    if not report.replaced:
        pytest.skip("ASGL has no noise for this layer")
    computed, original = [], recompute._SpikesOfCall._compute_again
    monkeypatch.setattr(recompute._SpikesOfCall, "_compute_again", lambda self: computed.append(self) or original(self))
    x, found = torch.randn(shape) * 3 + 1, []
    for each, context in ((copy.deepcopy(model), nullcontext()), (model, asgl_cuda.recompute_spikes())):
        torch.manual_seed(0)
        with context:
            loss = each(x).square().sum()
        learned = [value for value in each.parameters() if value.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, learned, allow_unused=True)])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    if shape == WHOLE:
        assert bool(computed) == (model.layer.settings.spike is not None)


# ---- types of inputs, autocast, torch.fx, torch.export: as the library's own layer ----


def outputs(layer, x):
    """All tensors returned by two calls or recorded by sinabs."""
    found, state = [], ()
    for _ in range(2):
        out = layer(x, *state)
        found += flat(out)
        state = out[1:] if isinstance(out, tuple) and not getattr(layer, "init_hidden", False) else ()
    return [*found, *getattr(layer, "recordings", {}).values()]


TYPES = [(torch.bfloat16, None), (torch.float16, None), (torch.float64, None), (torch.float32, torch.bfloat16),
         (torch.bfloat16, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "authors"])  # whose spikes are float32 at first
def test_types(name):
    make, shape = LAYERS[name]
    for dtype, cast in TYPES:
        x = (3 * torch.rand(shape)).to(dtype)
        with torch.autocast("cpu", dtype=cast) if cast else nullcontext():
            try:
                expected = outputs(make(), x)
            except RuntimeError as error:
                assert "autocast" in str(error)  # noqa: PT017
                continue  # the library's own layer can't
            found = outputs(asgl_cuda.convert(make())[0], x)
            assert [each.dtype for each in found] == [each.dtype for each in expected], (dtype, cast)


INTEGERS = {
    **{name: make for name, (make, _) in LAYERS.items() if "norse L" not in name and "Exp" not in name},
    "LIFNode, a reset": lambda: neuron.ParametricLIFNode(v_reset=0.3),
    "IFNode, soft": lambda: neuron.IFNode(v_reset=None),
    "CUBALIFNode, soft": lambda: neuron.CUBALIFNode(v_reset=None),
    "ILIFNode": lambda: neuron.ILIFNode(step_mode="m"),
    "Leaky, whole numbers": lambda: snntorch.Leaky(beta=1, threshold=2, reset_mechanism="zero"),
    "norse LIFBoxCell, whole numbers": lambda: norse.LIFBoxCell(
        norse.LIFBoxParameters(v_th=torch.tensor(1), tau_mem_inv=torch.tensor(400))
    ),
    "sinabs LIF, whole numbers": lambda: sinabs.layers.LIF(tau_mem=3, spike_threshold=1, **SINGLE),
    "sinabs IAF, whole numbers": lambda: sinabs.layers.IAF(spike_threshold=50, **SINGLE),
    "sinabs IAF, whole numbers, several": lambda: sinabs.layers.IAF(spike_threshold=50, min_v_mem=-1),
}
del INTEGERS["authors"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_integers(name, default, request):
    """Integer thresholds and inputs, which PyTorch's operations mix with floats of the default type.

    Some results of snnTorch and Norse are float32 under any.
    """
    if default == torch.float64:
        request.getfixturevalue("in_double")
    for dtype in (torch.int64, torch.uint8):
        x = torch.randint(0, 60 if "whole" in name and "IAF" in name else 4, (6, B, N)).to(dtype)
        layer, (converted, report) = INTEGERS[name](), asgl_cuda.convert(INTEGERS[name]())
        assert len(report.replaced) == 1
        theirs = outputs(layer, x)
        assert theirs[0].any()
        is_default = all(each.dtype == default for each in theirs)
        torch.testing.assert_close(outputs(converted, x), theirs, check_dtype=is_default or default == torch.float32)
        for state in {"v", "v_mem"} & set(dir(layer)):
            torch.testing.assert_close(getattr(converted, state), getattr(layer, state))


@pytest.mark.parametrize("name", LAYERS)
def test_traced(name):
    """torch.fx sees one call; torch.jit is refused."""
    make, shape = LAYERS[name]
    x, other = 3 * torch.rand(2, *shape)
    converted, _ = asgl_cuda.convert(make())
    for take in (torch.jit.script, lambda net: torch.jit.trace(net, x)):
        with pytest.raises(RuntimeError, match=r"asgl_cuda\.convert: torch\.jit can't .*; call asgl_cuda\.revert"):
            take(nn.Sequential(converted))
    net = nn.Sequential(nn.Identity(), converted)
    graph = torch.fx.symbolic_trace(net)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"][-1] == "1"
    expected = asgl_cuda.convert(make())[0](other)
    torch.testing.assert_close(graph(other), expected)


COMPILED = {
    "container": CASES["container"].make,
    "sinabs, least potential": lambda: sinabs.layers.IAF(min_v_mem=-1.0, shape=(B, N)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_sequences(name):
    """Graphs read no tensor's value: a conversion has stored bounds as floats."""
    converted, _ = asgl_cuda.convert(COMPILED[name]())
    x_seq = 8 * torch.randn(T, B, N, requires_grad=True)
    x_seq = x_seq.transpose(0, 1) if name.startswith("sinabs") else x_seq
    found = []
    for call in (converted, torch.compile(converted, backend="eager", fullgraph=True)):
        asgl_cuda.reset(converted)
        out = call(x_seq)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), x_seq)])
    assert found[0][0].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_shared_surrogate(strict):
    """torch.export wraps a module that several layers share, as SpikingJelly's default surrogate, in another class."""
    model, _ = asgl_cuda.convert(nn.Sequential(*(neuron.LIFNode(step_mode="m") for _ in range(2))))
    x_seq = 3 * torch.rand(4, 2, 5)
    exported = torch.export.export(model, (x_seq,), strict=strict)
    functional.reset_net(model)
    assert torch.equal(exported.module()(x_seq), model(x_seq))


# ---- what single libraries do ----


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("kind", ["LIFNode", "CUBALIFNode"])
def test_the_method_that_is_called_decides_between_a_step_and_a_sequence(kind, step_mode):
    made = getattr(neuron, kind)()
    made.step_mode, made.store_v_seq = step_mode, True
    converted, _ = asgl_cuda.convert(made)
    x_seq = 3 * torch.rand(WHOLE)
    assert torch.equal(converted.multi_step_forward(x_seq), made.multi_step_forward(x_seq))
    torch.testing.assert_close((converted.v_seq, converted.v), (made.v_seq, made.v))
    made.reset(), converted.reset()
    for x in x_seq:
        assert torch.equal(converted.single_step_forward(x), made.single_step_forward(x))
    torch.testing.assert_close(converted.v_seq, made.v_seq)


def test_state_of_spikingjelly():
    """reset_net, detach_net and set_step_mode reach the converted layer; another batch size begins anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), neuron.LIFNode(step_mode="m"))
    converted, _ = asgl_cuda.convert(net)
    x = torch.randn(5, 3, 4)
    first = converted(x)
    functional.detach_net(converted)
    converted.zero_grad()  # of sinabs, detaches
    assert not converted[1].v.requires_grad
    functional.reset_net(converted)
    assert torch.equal(converted(x), first)
    net(x)
    assert torch.equal(converted(x[:, :2]), net(x[:, :2]))
    functional.set_step_mode(converted, "s")
    functional.reset_net(converted)
    assert torch.equal(torch.stack([converted(each) for each in x]), first)
    simple, _ = asgl_cuda.convert(neuron.SimpleIFNode())  # which does not
    simple(torch.rand(4, 5))
    with pytest.raises(ValueError, match=r"v_init must have shape \[3, 5\], got \[4, 5\]"):
        simple(torch.rand(3, 5))


@pytest.mark.parametrize("name", [name for name in RECURRENT if "LIFRecurrent" not in name])  # of Norse: handed on
def test_states_are_detached_in_place(name):
    """As the libraries' own functions do, which views refuse."""
    _, converted = case(name)
    (x_seq,) = inputs(name, 1, torch.float32)
    run(converted, x_seq)
    functional.detach_net(converted)
    converted.zero_grad()  # of sinabs, detaches
    snntorch.RLeaky.detach_hidden()
    snntorch.RSynaptic.detach_hidden()
    if name.startswith("RSyn"):
        converted.spk.detach_()  # which its detach_hidden leaves
    states = [getattr(converted, name) for name in ("y", "spk", "mem", "v_mem") if hasattr(converted, name)]
    assert states
    assert not any(state.requires_grad for state in states)


def test_detach_reaches_recorded_potentials():
    """Those of steps, which SpikingJelly's detach_net detaches, too."""
    model, _ = asgl_cuda.convert(nn.Sequential(neuron.LIFNode(store_v_seq=True), neuron.IFNode()))
    model(torch.rand(3, 4, requires_grad=True))
    assert model[0].v_seq.requires_grad
    asgl_cuda.detach(model)
    assert not model[0].v_seq.requires_grad


@in_double
@pytest.mark.parametrize("kind", ["LIF", "IAF", "ExpLeak"])
def test_values_of_each_sample(kind):
    """Of as many samples as steps: sinabs broadcasts values against a step, `lif` against the sequence."""
    options = {"tau_mem": torch.linspace(2, 9, T * N).reshape(T, N)} if kind != "IAF" else {}
    if kind != "ExpLeak":
        options |= {"spike_threshold": torch.linspace(0.5, 1.3, T * N).reshape(T, N), **SINGLE}
    made = getattr(sinabs.layers, kind)(**options).double()
    x, found = 3 * torch.rand(T, T, N), []
    for layer in (made, asgl_cuda.convert(made)[0]):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        learned = [value for value in layer.parameters() if value.requires_grad]
        found.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *learned])])
    assert len(found[0][0].unique()) > 1
    torch.testing.assert_close(*found)


def a_threshold(shape):
    made = neuron.IFNode(step_mode="m")
    made.v_threshold = torch.rand(shape)
    return asgl_cuda.convert(made)[0]


BEYOND = {  # values, and the input
    "SpikingJelly": (lambda: a_threshold((T, 1, 1)), WHOLE, "v_threshold"),
    "snnTorch, a step": (
        lambda: asgl_cuda.convert(snntorch.Leaky(0.5, torch.rand(2, 1)))[0],
        (N,),
        "threshold of Leaky",
    ),
    "snnTorch": (lambda: MultiStep(snntorch.Leaky(torch.rand(T, 1))), (T, N), "beta of Leaky"),
    "Norse": (lambda: asgl_cuda.convert(norses("LIF", tau_syn_inv=torch.rand(T, 1)))[0], (T, N), "decay"),
    "a current": (lambda: asgl_cuda.convert(snntorch.Synaptic(torch.rand(2, 1), 0.5))[0], (N,), "alpha of Synaptic"),
    "weights": (lambda: MultiStep(snntorch.RLeaky(0.5, torch.rand(2, 1), False)), (T, N), "recurrent.V of RLeaky"),
    "a neuron's, beside fewer": (
        lambda: asgl_cuda.convert(snntorch.Leaky(0.5, torch.ones(4)))[0],
        (3, 1),
        "threshold of Leaky",
    ),
    "a neuron's, beside others": (
        lambda: asgl_cuda.convert(snntorch.Leaky(0.5, torch.ones(4)))[0],
        (3, 5),
        "threshold of Leaky",
    ),
    "a current of more neurons": (
        lambda: MultiStep(snntorch.Synaptic(0.5, 0.5, torch.ones(4))),
        (T, 3, 1),
        "threshold of Synaptic",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_values_of_more_dimensions_than_a_step(name):
    """They would be taken for values of each time, where there are as many."""
    make, shape, what = BEYOND[name]
    with pytest.raises(ValueError, match=rf"asgl_cuda\.convert: (?=.*{what}\b).*must .*broadcast to "):
        make()(torch.rand(shape))


def test_norse_lifted_and_sparse():
    x = 20 * torch.rand(WHOLE)
    for cell in (norse.LIFCell(), norse.IAFCell()):
        converted, report = asgl_cuda.convert(norse.Lift(cell))
        assert [row.path for row in report.replaced] == ["lifted_module"]
        (ours, our_state), (theirs, their_state) = converted(x), norse.Lift(cell)(x)
        torch.testing.assert_close((ours, *our_state), (theirs, *their_state))
    x = torch.eye(4) * 20
    out, _ = asgl_cuda.convert(norse.LIFCell())[0](x.to_sparse())
    assert out.is_sparse
    assert torch.equal(out.to_dense(), norse.LIFCell()(x)[0])
    for layer in (norse.LIFCell(), norse.LIFRecurrent(4, 4)):
        for options in ({"asgl": {}}, {"backend": "reference"}):
            with pytest.raises(ValueError, match=r"takes dense inputs, got a sparse one; pass input\.to_dense"):
                asgl_cuda.convert(layer, **options)[0](x.to_sparse())


@pytest.mark.parametrize("options", [{"tau_syn": 2.0}, {"norm_input": False, **SINGLE}], ids=["current", "single"])
def test_states_and_copies_of_sinabs(options):
    current = "tau_syn" in options
    converted, _ = asgl_cuda.convert(sinabs.layers.LIF(3.0, **options), asgl=None if current else {"width": 2.0})
    x = torch.randn(4, 9, 5)
    converted(x)
    twin = copy.deepcopy(converted)
    assert type(twin) is type(converted)
    assert twin.spike_threshold is not converted.spike_threshold
    if not current:
        assert twin.analog_prob == 0.5
        assert twin.log_width is not converted.log_width
    states = ("v_mem", "i_syn")[: 1 + current]
    for name in states:
        assert torch.equal(getattr(twin, name), getattr(converted, name))
    converted.reset_states()
    for name in states:
        assert not getattr(converted, name).any()
        assert getattr(twin, name).any()
    twin.eval()(x[:2])  # another batch size: sinabs takes over states of the old one
    assert {getattr(twin, name).shape for name in states} == {(2, 5)}
    assert current or 0 < twin.firing_rate < 1


@pytest.mark.parametrize("tau_syn", [None, 3.0])
def test_a_copy_learns_and_the_original_does(tau_syn):
    """The __deepcopy__ of sinabs detaches the original's decays, and shares parameters that it was given."""
    layer = sinabs.layers.LIF(tau_mem=3.0, tau_syn=tau_syn, train_alphas=True, norm_input=False)
    layer(torch.rand(2, 6, 5, requires_grad=True) * 8)
    model = nn.Sequential(layer)
    learned = {name: value.requires_grad for name, value in model.named_parameters()}
    converted, _ = asgl_cuda.convert(model)
    for made in (model, converted):
        assert {name: value.requires_grad for name, value in made.named_parameters()} == learned
        asgl_cuda.reset(made)
        made(torch.rand(2, 6, 5) * 8).sum().backward()
        assert {name: value.grad is not None for name, value in made.named_parameters()} == learned
    pointers = [{value.data_ptr() for value in made.parameters()} for made in (model, converted)]
    assert pointers[0].isdisjoint(pointers[1])
    assert layer.v_mem.data_ptr() != converted[0].v_mem.data_ptr()


@pytest.mark.parametrize("reset_fn", [sinabs.activation.MembraneSubtract(), sinabs.activation.MembraneReset()])
@pytest.mark.parametrize("spike_fn", [sinabs.activation.SingleSpike, sinabs.activation.MultiSpike])
def test_gradient_of_the_threshold(reset_fn, spike_fn):
    """Only a subtraction has one."""
    grads = []
    for convert in (False, True):
        layer = sinabs.layers.IAF(spike_fn=spike_fn, reset_fn=reset_fn)
        layer.spike_threshold.requires_grad_()
        model = asgl_cuda.convert(nn.Sequential(layer))[0] if convert else nn.Sequential(layer)
        model(torch.tensor([[[0.8], [0.9], [2.7]]], requires_grad=True)).sum().backward()
        grads.append(model[0].spike_threshold.grad)
    one, other = grads
    assert (one is None) == (other is None)
    if one is not None:
        torch.testing.assert_close(one, other)


def test_a_large_threshold():
    """Where the probes give one spike at most, there may be more."""
    layer = sinabs.layers.IAF(spike_threshold=torch.tensor(5e3), reset_fn=sinabs.activation.MembraneReset())
    converted, _ = asgl_cuda.convert(layer)
    x = 1e4 * torch.rand(2, 8, 5)
    assert layer(x).max() > 1
    layer.reset_states()
    assert torch.equal(converted(x), layer(x))


# ---- snnTorch: MultiStep, states and the list of all layers ----


def test_errors_of_multi_step():
    for layer, error, words in (
        (nn.Linear(2, 2), ValueError, "a Leaky, .* or RSynaptic of snnTorch, got Linear"),
        (snntorch.Leaky(beta=0.5, state_quant=lambda mem: mem), ValueError, "of snnTorch .*, but it quantises its"),
        (5, TypeError, "a Leaky, .* or RSynaptic of snnTorch, got int"),
        (snntorch.Leaky, TypeError, "of snnTorch, got the class Leaky; pass an instance"),
    ):
        with pytest.raises(error, match=rf"snntorch\.MultiStep: layer must be .*{words}"):
            MultiStep(layer)
    assert isinstance(MultiStep(snntorch.Lapicque(0.9)).layer, Converted)
    mine = type("Mine", (snntorch.Leaky,), {"forward": lambda self, x: x})(beta=0.5)
    mine.inner = snntorch.Leaky(beta=0.5)
    with pytest.raises(ValueError, match="that can be converted, but"):
        MultiStep(mine)
    assert not isinstance(mine.inner, Converted)
    node, undelayed = neuron.LIFNode(), snntorch.Leaky(beta=0.5, reset_delay=False)
    for layer, words in ((node, "got LIFNode"), (undelayed, "subtraction needs reset_delay=True, got False")):
        with pytest.raises(ValueError, match=words):
            MultiStep(layer)
        assert not isinstance(layer, Converted)
    multi, synaptic = MultiStep(snntorch.Leaky(beta=0.5)), MultiStep(snntorch.Synaptic(alpha=0.5, beta=0.5))
    for call, words in (
        (lambda: multi([1.0]), "x_seq must be a tensor, got list"),
        (lambda: multi(torch.ones(2, 3), 5), "mem must be a tensor or None, got int"),
        (lambda: synaptic(torch.ones(2, 3), None, 5), "mem must be a tensor or None, got int"),
        (lambda: multi(torch.ones(2, 3), memory=None), "Leaky takes an input and mem, got an argument 'memory'"),
        (lambda: multi(torch.ones(2, 3), mem=0.5), "mem must be a tensor or None, got float"),
    ):
        with pytest.raises(TypeError, match=rf"snntorch\.MultiStep: {words}$"):
            call()
    reverted, _ = asgl_cuda.revert(multi)
    x_seq = torch.rand(3, 2)
    with pytest.raises(
        RuntimeError, match=r"got a Leaky that is not, perhaps because of asgl_cuda\.revert; asgl_cuda\.convert"
    ):
        reverted(x_seq)
    assert torch.equal(asgl_cuda.convert(reverted)[0](x_seq)[0], multi(x_seq)[0])


@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_multi_step_states_and_keys(kind):
    """A call starts at rest, unless it is given states; keys are those of the layer, and of older versions."""
    options = {"beta": 0.8, "learn_threshold": True, **({"alpha": 0.7} if kind == "Synaptic" else {})}
    layer, model = (nn.Sequential(nn.Identity(), getattr(snntorch, kind)(**options)) for _ in range(2))
    multi = nn.Sequential(nn.Identity(), MultiStep(model[1]))
    x_seq = torch.randn(9, 3, 7)
    first = multi(x_seq)[0]
    assert torch.equal(first, run(layer[1], x_seq)[0][0])
    assert torch.equal(multi(x_seq)[0], first)
    states = torch.rand(len(options) - 1, 3, 7)
    asgl_cuda.reset(layer)
    torch.testing.assert_close(multi[1](x_seq, mem=states[-1])[0][0], layer[1](x_seq[0], mem=states[-1])[0])
    torch.testing.assert_close(multi[1](x_seq, *states)[0][0], layer[1](x_seq[0], *states)[0])
    assert list(multi.state_dict()) == list(layer.state_dict())
    values = {**layer.state_dict(), "1.threshold": torch.tensor(0.3)}
    old = {key.replace("1.", "1.layer."): value for key, value in values.items()}
    for given in (values, old):
        multi.load_state_dict(layer.state_dict())
        multi.load_state_dict(given)
        assert multi[1].layer.threshold == torch.tensor(0.3)


@pytest.mark.parametrize("name", [name for name in SNNTORCH if "negative" in name])
def test_negative_decays_are_kept(name, monkeypatch):
    """Raised to the least decay, they would be computed step by step, or wrongly in a compiled graph."""
    made, whole = case(name, whole=True)
    (x_seq,) = inputs(name, 1, torch.float32)
    expected = run(made, x_seq)[0]
    monkeypatch.setattr(type(whole.layer), "loop_over_steps", lambda *given: pytest.fail("step by step"))
    for call in (whole, torch.compile(whole, backend="eager")):
        asgl_cuda.reset(whole)
        torch.testing.assert_close(flat(call(x_seq)), expected, check_dtype=False)


CARRYING = {
    "Leaky": {}, "Synaptic": {"alpha": 0.7}, "RLeaky": {"linear_features": 7},
    "RSynaptic": {"alpha": 0.7, "linear_features": 7},
}  # fmt: skip


@pytest.mark.parametrize("hidden", [False, True], ids=["", "init_hidden"])
@pytest.mark.parametrize("kind", CARRYING)
def test_multi_step_carries_states_if_asked_for(kind, hidden):
    """In evaluation, where nothing else would tell that a second sequence goes on from the first."""
    torch.manual_seed(0)
    multi = MultiStep(getattr(snntorch, kind)(beta=0.8, init_hidden=hidden, **CARRYING[kind])).eval()
    x_seq = 2 * torch.rand(9, 3, 7)
    whole = multi(x_seq) if hidden else multi(x_seq)[0]
    multi.stateful = True
    for again in (False, True):  # first after a call that is not stateful, then from the states of stateful ones
        if again:
            asgl_cuda.reset(multi)
        found = [out if hidden else out[0] for out in map(multi, x_seq.split(4))]
        assert torch.equal(torch.cat(found), whole)
    utils.reset(nn.Sequential(multi))  # finds children of its own classes alone
    assert not torch.equal(multi(x_seq) if hidden else multi(x_seq)[0], whole)
    multi.stateful = False
    assert torch.equal(multi(x_seq) if hidden else multi(x_seq)[0], whole)
    found = [asgl_cuda.step(multi, x) for x in x_seq]  # also starts at rest
    assert torch.equal(torch.stack(found if hidden else [out[0] for out in found]), whole)
    for value in (1, None):
        with pytest.raises(TypeError, match=r"snntorch\.MultiStep: stateful must be a bool"):
            MultiStep(snntorch.Leaky(0.5), stateful=value)


@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_states_are_kept_or_given(kind):
    values = {"beta": 0.8, **({"alpha": 0.7} if kind == "Synaptic" else {})}
    x, *states = torch.randn(1 + len(values), 3, 4)
    kept, _ = asgl_cuda.convert(getattr(snntorch, kind)(**values, init_hidden=True))
    with pytest.raises(TypeError, match=r"`(mem|syn)` should not be passed"):
        kept(x, *states)
    made = getattr(snntorch, kind)(**values)
    given, _ = asgl_cuda.convert(made)
    torch.testing.assert_close(given(x, *states), made(x, *states))
    for name in ("mem", "syn")[: len(values)]:
        torch.testing.assert_close(getattr(given, name), getattr(made, name))


@pytest.mark.parametrize("function", ["convert", "revert", "fuse", "unfuse"])
def test_hidden_states_of_a_copy_are_found(function):
    """`detach_hidden` and `reset_hidden` iterate over a list of all created layers; also those that stay unchanged."""

    class Mine(snntorch.Leaky):
        pass

    kept = [Mine(beta=0.5, init_hidden=True), snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True)]
    model = nn.Sequential(nn.BatchNorm1d(2), snntorch.Leaky(beta=0.5, init_hidden=True), *kept)
    if function in ("revert", "unfuse"):
        model, _ = asgl_cuda.convert(model)
    x = 5 + torch.randn(3, 2)
    made, _ = getattr(asgl_cuda, function)(model, *[x] * (function == "fuse"))
    made(x), model(x)
    snntorch.Leaky.detach_hidden()
    assert not made[1].mem.requires_grad
    utils.reset(made)
    for layer in (layer for net in (made, model) for layer in net if isinstance(layer, snntorch.SpikingNeuron)):
        assert not (layer.syn if isinstance(layer, snntorch.Synaptic) else layer.mem).any(), type(layer)
    count = len(snntorch.SpikingNeuron.instances)
    asgl_cuda.convert(leaky(), inplace=True)
    assert len(snntorch.SpikingNeuron.instances) == count + 1
