"""Neurons with a synaptic current, and layers that do not fire, are converted to what they were."""

import copy
import pickle

import libraries  # noqa: F401
import norse.torch as norse
import pytest
import snntorch
import torch
from converted_layers import SHAPE, assert_same, check, norse_run, norse_run_whole
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from test_convert import train_alike
from torch import nn

import asgl_cuda
from asgl_cuda.interop.snntorch import MultiStep

# ---- Norse ----

CURRENT = {"tau_syn_inv": torch.tensor(300.0), "tau_mem_inv": torch.tensor(400.0), "v_leak": torch.tensor(0.1)}
FIRING = {"v_th": torch.tensor(0.6), "v_reset": torch.tensor(-0.2)}


@pytest.mark.parametrize("method", ["super", "triangle"])
@pytest.mark.parametrize("name", ["LIF", "LIFCell", "IAF", "IAFCell"])
def test_norse(name, method):
    values = (CURRENT if "LIF" in name else {}) | FIRING
    parameters = (norse.LIFParameters if "LIF" in name else norse.IAFParameters)(**values, method=method)

    def make():
        made = getattr(norse, name)(parameters)
        if not name.endswith("Cell"):
            made.record_states = True
        return made

    check(make, norse_run if name.endswith("Cell") else norse_run_whole, threshold=0.6, scale=2.0)


def test_norse_by_default():
    def make():
        return norse.LIF(record_states=True)

    check(make, norse_run_whole, scale=12.0)


@pytest.mark.parametrize("name", ["LIF", "LI"])
def test_norse_states_and_learned_time_constants(name):
    """Gradients flow through states that are handed on; in Norse a parameter is wherever the user keeps it."""
    x = 20 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    tau_syn, tau_mem, leak = (torch.tensor(value, requires_grad=True) for value in (200.0, 100.0, 0.2))
    given = {"tau_syn_inv": tau_syn, "tau_mem_inv": tau_mem, "v_leak": leak}
    made = norse.LIF(norse.LIFParameters(**given)) if name == "LIF" else norse.LI(norse.LIParameters(**given))
    fused, _ = asgl_cuda.convert(made, inplace=False)
    fused.p = made.p  # the copy's own are others
    results = []
    for each in (made, fused):
        first, state = each(x[0])
        out, state = each(x[1], state)
        assert type(state).__name__ == {"LIF": "LIFFeedForwardState", "LI": "LIState"}[name]
        total = (out + first).sum() + (state.v * 3 + state.i).sum()
        results.append([first, out, *state, *torch.autograd.grad(total, [tau_syn, tau_mem, leak])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert all(each.any() for each in results[0])


NORSE_READ_OUTS = {
    "LI": (lambda: norse.LI(), lambda layer, x: [layer(x)[0], *layer(x, layer(x)[1])[1]]),
    "LI, a leak": (lambda: norse.LI(norse.LIParameters(**CURRENT)), lambda layer, x: [layer(x)[0], *layer(x)[1]]),
    "LI, states": (lambda: norse.LI(record_states=True), lambda layer, x: [layer(x)[0], *layer(x)[1]]),
}


@pytest.mark.parametrize("asgl", [None, {}])
@pytest.mark.parametrize("name", NORSE_READ_OUTS)
def test_norse_read_outs(name, asgl):
    make, call = NORSE_READ_OUTS[name]
    assert_same(make, call, torch.randn(SHAPE), {"asgl": asgl})


def test_norse_in_half_types():
    """The current of LIF and LI is float32 at first, which makes their results float32."""
    x = torch.randn(SHAPE).bfloat16()
    for made in (norse.LIF(), norse.LIFCell(), norse.LI(), norse.IAF()):
        out, fused = made(x)[0], asgl_cuda.convert(made)[0](x)[0]
        assert fused.dtype == out.dtype
        torch.testing.assert_close(fused, out, rtol=2e-2, atol=2e-2)


def test_norse_lifted():
    x = 20 * torch.rand(SHAPE)
    for cell in (norse.LIFCell(), norse.IAFCell()):
        fused, report = asgl_cuda.convert(norse.Lift(cell))
        assert [row.path for row in report.replaced] == ["lifted_module"]
        (ours, our_state), (theirs, their_state) = fused(x), norse.Lift(cell)(x)
        torch.testing.assert_close((ours, *our_state), (theirs, *their_state))


def test_norse_sparse_input():
    x = torch.eye(4) * 20
    fused, _ = asgl_cuda.convert(norse.LIFCell())
    out, _ = fused(x.to_sparse())
    assert out.is_sparse
    assert torch.equal(out.to_dense(), norse.LIFCell()(x)[0])


class ReadOut(nn.Module):
    """Time steps of a network without time in its parts, or all of them at once."""

    def __init__(self, model, whole):
        super().__init__()
        self.model, self.whole = model, whole

    def forward(self, x_seq):
        if self.whole:
            return self.model(x_seq)[0]
        state, out = None, []
        for x in x_seq:
            v, state = self.model(x, state)
            out.append(v)
        return torch.stack(out)


@pytest.mark.parametrize("whole", [True, False])
def test_a_convolutional_net_of_norse(whole):
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6 * 16, 3)]
    if whole:
        first, second, last = map(norse.Lift, parts)
        neurons, read_out = [norse.LIF(), norse.IAF()], norse.LI()
    else:
        first, second, last = parts
        neurons, read_out = [norse.LIFCell(), norse.IAFCell()], norse.LICell()
    pool, flat = nn.AvgPool2d(2), nn.Flatten(2 if whole else 1)
    pool = norse.Lift(pool) if whole else pool
    model = ReadOut(norse.SequentialState(first, neurons[0], pool, second, neurons[1], flat, last, read_out), whole)
    x_seq = 20 * torch.rand(9, 6, 1, 8, 8)
    train_alike(model, lambda net: 10 * net(x_seq).mean(0), 3 if whole else 2, left=[] if whole else ["LICell"])


# ---- snnTorch ----


def snntorch_run(layer, x_seq):
    """The layer itself passes its states; what is returned for the potential has the current in it."""
    s, *states = map(torch.stack, zip(*(layer(x) for x in x_seq), strict=True))
    return s, sum(states), states[-1].detach()


SNNTORCH = {
    "Synaptic": lambda **options: snntorch.Synaptic(alpha=0.7, beta=0.8, threshold=0.9, **options),
    "Synaptic, learned": lambda **options: snntorch.Synaptic(
        alpha=torch.linspace(0.3, 0.9, SHAPE[-1]), beta=0.8, threshold=0.9, learn_alpha=True, learn_beta=True,
        learn_threshold=True, **options,
    ),
    "Synaptic, at once": lambda **options: snntorch.Synaptic(
        alpha=0.7, beta=0.8, threshold=0.9, reset_delay=False, learn_alpha=True, **options
    ),
    "Lapicque": lambda **options: snntorch.Lapicque(beta=0.8, threshold=0.9, **options),
    "Lapicque, R and C": lambda **options: snntorch.Lapicque(
        R=0.5, C=3, time_step=0.8, threshold=0.9, learn_threshold=True, **options
    ),
}  # fmt: skip


@pytest.mark.parametrize("reset_mechanism", ["subtract", "none"])
@pytest.mark.parametrize("name", SNNTORCH)
def test_snntorch(name, reset_mechanism):
    check(lambda: SNNTORCH[name](reset_mechanism=reset_mechanism), snntorch_run, threshold=0.9, scale=1.5)


@pytest.mark.parametrize("init_hidden", [True, False])
@pytest.mark.parametrize("name", ["Synaptic", "Synaptic, learned", "Lapicque"])
def test_snntorch_multi_step(name, init_hidden):
    torch.manual_seed(0)
    layer, twin = (SNNTORCH[name](init_hidden=init_hidden, output=init_hidden) for _ in range(2))
    multi = MultiStep(twin)
    for _ in range(2):
        x_seq = torch.randn(9, *SHAPE[1:])
        expected = list(map(torch.stack, zip(*(layer(x) for x in x_seq), strict=True)))
        found = multi(x_seq)
        assert len(found) == len(expected)
        torch.testing.assert_close(list(found), expected)
        for ours, theirs in zip(twin.parameters(), layer.parameters(), strict=True):
            ours = torch.autograd.grad(sum(found).sum(), ours, retain_graph=True)
            torch.testing.assert_close(
                ours, torch.autograd.grad(sum(expected).sum(), theirs, retain_graph=True), rtol=1e-4, atol=1e-4
            )
    if not init_hidden:
        states = torch.rand(len(expected) - 1, *SHAPE[1:])
        torch.testing.assert_close(multi(x_seq, mem=states[-1])[0][0], layer(x_seq[0], mem=states[-1])[0])
        torch.testing.assert_close(multi(x_seq, *states)[0][0], layer(x_seq[0], *states)[0])


@pytest.mark.parametrize("alpha", [1.2, -0.1])
def test_snntorch_learned_alpha_is_clamped(alpha):
    def make():
        return snntorch.Synaptic(alpha=alpha, beta=0.8, learn_alpha=True)

    check(make, snntorch_run, scale=1.5, dead_parameters=True)
    x_seq = torch.randn(SHAPE)
    torch.testing.assert_close(MultiStep(make())(x_seq)[0], snntorch_run(make(), x_seq)[0])


@pytest.mark.parametrize("name", ["R", "C", "time_step"])
def test_snntorch_values_that_change_between_two_calls(name):
    results = []
    for each in (snntorch.Lapicque(R=0.5, C=3.0), asgl_cuda.convert(snntorch.Lapicque(R=0.5, C=3.0))[0]):
        x = 3 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
        _, mem = each(x[0])
        setattr(each, name, 1.2 * getattr(each, name))
        results.append(each(x[1], mem))
    torch.testing.assert_close(*results)


def test_snntorch_arguments_and_states():
    layer = snntorch.Synaptic(alpha=0.7, beta=0.8, init_hidden=True)
    fused, _ = asgl_cuda.convert(layer)
    x, syn, mem = torch.randn(3, *SHAPE[1:])
    for each in (layer, fused):
        with pytest.raises(TypeError, match="`mem` or `syn` should not be passed"):
            each(x, syn, mem)
        each.reset_mem()
        each(x.requires_grad_())
    torch.testing.assert_close([fused.syn, fused.mem], [layer.syn, layer.mem])
    snntorch.Synaptic.detach_hidden()
    assert fused.syn.grad_fn is fused.mem.grad_fn is None
    utils.reset(nn.Sequential(fused))
    assert not fused.syn.any()
    assert not fused.mem.any()


def test_a_net_of_snntorch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 10), snntorch.Synaptic(alpha=0.8, beta=0.9, init_hidden=True, learn_alpha=True),
        nn.Linear(10, 6), snntorch.Lapicque(beta=0.8, init_hidden=True),
        nn.Linear(6, 3), snntorch.Leaky(beta=0.8, reset_mechanism="none", init_hidden=True, output=True),
    )  # fmt: skip
    x_seq = 2 * torch.rand(7, 6, 8)

    def scores_of(net):
        utils.reset(net)
        return torch.stack([net(x)[1] for x in x_seq]).mean(0)

    train_alike(model, scores_of, 3)


# ---- SpikingJelly ----


def simple_run(node, x_seq):
    s, v, h = [], [], []
    for x in x_seq:
        before = node.v
        s.append(node(x))
        v.append(node.v)
        rest, tau = node.v_reset or 0.0, getattr(node, "tau", None)
        leak = 0.0 if tau is None else (rest - before) / tau
        h.append(torch.as_tensor(before + leak + (x / tau if getattr(node, "decay_input", False) else x)).detach())
    return torch.stack(s), torch.stack(v), torch.stack(h)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("decay_input", [None, True, False])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
def test_simple_nodes_of_spikingjelly(v_reset, decay_input, detach_reset):
    if decay_input is not None and v_reset is None:
        pytest.skip("SpikingJelly's own equation needs a number")

    def make():
        options = {"v_reset": v_reset, "v_threshold": 0.8, "detach_reset": detach_reset}
        return neuron.SimpleIFNode(**options) if decay_input is None else neuron.SimpleLIFNode(
            1.6, decay_input, **options
        )  # fmt: skip

    check(make, simple_run, threshold=0.8)


def test_a_simple_node_does_not_begin_anew_by_itself():
    fused, _ = asgl_cuda.convert(neuron.SimpleIFNode())
    fused(torch.rand(4, 5))
    with pytest.raises(ValueError, match=r"v_init must have shape \[3, 5\], got \[4, 5\]"):
        fused(torch.rand(3, 5))


def cuba_run(node, x_seq):
    before = node.v
    s, v, c = map(torch.stack, zip(*((node(x), node.v, node.c) for x in x_seq), strict=True))
    previous = torch.cat([torch.as_tensor(before).expand(x_seq.shape[1:])[None], v[:-1]])
    return s, v + c, (node.v_decay * previous + c).detach()


@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
def test_cuba_of_spikingjelly(v_reset):
    check(lambda: neuron.CUBALIFNode(v_reset=v_reset), cuba_run, threshold=0.5)

    def whole():
        made = neuron.CUBALIFNode(v_reset=v_reset)
        made.step_mode, made.store_v_seq = "m", True
        return made

    def run(node, x_seq):
        s = node(x_seq)
        return s, node.v_seq + node.c, node.v_seq.detach()

    node, (fused, _) = whole(), asgl_cuda.convert(whole())
    x_seq = torch.randn(SHAPE)
    for _ in range(2):
        torch.testing.assert_close(run(fused, x_seq), run(node, x_seq))
    torch.testing.assert_close(run(fused, x_seq[:, :2]), run(node, x_seq[:, :2]))  # both states begin anew
    functional.reset_net(fused)
    assert fused.c == 0.0


def read_out(node, x_seq):
    out = node(x_seq)
    return [*out, node.v] if isinstance(out, list) else [out, node.v]


@pytest.mark.parametrize("decode", [None, "max-mem", "max-abs-mem", "mean-mem", "last_mem"])
@pytest.mark.parametrize("asgl", [None, {}])
@pytest.mark.parametrize("kind", ["NonSpikingIFNode", "NonSpikingLIFNode"])
def test_read_outs_of_spikingjelly(kind, asgl, decode):
    fused = assert_same(lambda: getattr(neuron, kind)(decode=decode), read_out, torch.randn(SHAPE), {"asgl": asgl})
    twin = pickle.loads(pickle.dumps(asgl_cuda.convert(getattr(neuron, kind)())[0]))
    assert type(copy.deepcopy(twin)) is type(fused)


def test_a_net_of_spikingjelly():
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), neuron.CUBALIFNode(), layer.AvgPool2d(2),
        layer.Conv2d(4, 6, 3, padding=1), neuron.SimpleLIFNode(2.0, False), layer.Flatten(),
        layer.Linear(6 * 16, 3), neuron.NonSpikingLIFNode(decode="mean-mem"),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    x_seq = 2 * torch.rand(5, 6, 1, 8, 8)

    def scores_of(net):
        functional.reset_net(net)
        return 10 * net(x_seq)

    train_alike(model, scores_of, 3)


# ---- all ----


READ_OUTS = {
    "LI": lambda: norse.LI(), "NonSpikingLIFNode": lambda: neuron.NonSpikingLIFNode()
}  # fmt: skip


@pytest.mark.parametrize("name", READ_OUTS)
def test_a_read_out_is_no_asgl_layer(name):
    made = READ_OUTS[name]()
    keys = set(vars(made))
    model, report = asgl_cuda.convert(nn.ModuleDict({"out": made, "lif": neuron.LIFNode()}), asgl={"analog_prob": 0.5})
    assert report.replaced[0] == ("out", name, "leaky_integrator")
    assert [path for path, _ in asgl_cuda.asgl_layers(model)] == ["lif"]
    assert list(model.state_dict()) == ["lif.log_width"]
    assert not hasattr(model["out"], "log_width")
    with asgl_cuda.spiking_eval(model):
        model["out"](torch.rand(3, 4, 5))
    back, report = asgl_cuda.revert(model)
    assert type(back["out"]) is type(made)
    assert report.replaced[0] == ("out", f"Converted{name}", name)
    assert [row.path for row in report.left] == ["lif"] or not report.left
    assert set(vars(asgl_cuda.revert(asgl_cuda.convert(made)[0])[0])) == keys


@pytest.mark.parametrize(
    "make", [norse.LIFCell, norse.LI, lambda: snntorch.Synaptic(alpha=0.5, beta=0.5, init_hidden=True)]
)
def test_fuse_leaves_what_filters_its_input(make):
    made = make()
    model = norse.SequentialState if isinstance(made, norse.LI | norse.LIFCell) else nn.Sequential
    fused, report = asgl_cuda.fuse(model(nn.BatchNorm1d(3), made))
    name = type(made).__name__
    assert [row.reason for row in report.left] == [f"its output goes to {name}, whose input no neuron takes as it is"]
    assert type(fused[1]) is type(made)
