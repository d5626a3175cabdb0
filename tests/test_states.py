"""A model that takes one time step a call, errors of models that can't be streamed, and layers over time."""

import collections
import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
from comparison import Stack, random_input
from layer_cases import make
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF, LeakyIntegrator, Monitor, OverTime

T, B, C = 6, 3, 5


def exact(layer):
    """The layer with weights whose sums are exact for any number of rows of a matrix product."""
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_((value * 16).round() / 4)
    return layer


def inputs(*shape):
    return torch.randint(-2, 4, shape).float()


def network(time_dim=0, **options):
    options["time_dim"] = time_dim
    return nn.Sequential(
        OverTime(exact(nn.Conv2d(1, C, 3))),
        BatchNormLIF(C, **options),
        OverTime(nn.MaxPool2d(2)),
        Stack(
            lambda m, x_seq: x_seq + m.neurons(m.layer(x_seq)), layer=OverTime(exact(nn.Conv2d(C, C, 3, padding=1))),
            neurons=LIF(C, granularity="channel", **options),
        ),
        OverTime(nn.Sequential(nn.Flatten(), exact(nn.Linear(C * 9, 7)))),
        LeakyIntegrator(decay=0.5, **options),
        LIF(v_threshold=4.0, **options),
        exact(nn.Linear(7, 2)),
        LeakyIntegrator(decay=0.75, delay=True, **options),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("time_dim", [0, 1])
def test_steps_of_a_model_are_one_sequence(backend, device, time_dim):
    model = network(time_dim, backend=backend).to(device)
    x_seq = inputs(T, B, 1, 8, 8).to(device)
    whole = model(x_seq.movedim(0, time_dim))
    assert whole.any()
    for _ in range(2):
        steps = [asgl_cuda.step(model, x_t) for x_t in x_seq]
        assert steps[0].shape == (B, 2)
        assert torch.equal(torch.stack(steps, time_dim), whole)
        asgl_cuda.reset(model)
    asgl_cuda.step(model, x_seq[0])
    assert torch.equal(model(x_seq.movedim(0, time_dim)), whole)


def test_a_batch_of_one_keeps_its_dimension():
    model = network()
    x_seq = inputs(T, 1, 1, 8, 8)
    steps = torch.stack([asgl_cuda.step(model, x_t) for x_t in x_seq])
    assert torch.equal(steps, model(x_seq))
    with pytest.raises(
        ValueError,
        match=r"asgl_cuda\.step: .* must keep the time dimension, 0, and the batch of x_t, got shape \[1, 2\]",
    ):
        asgl_cuda.step(Stack(lambda m, x: m.model(x).mean(0), model=model), x_seq[0])


def test_truncated_backpropagation_through_steps(backend, device):
    layers = LIF(learn_decay=True, backend=backend), LeakyIntegrator(backend=backend)
    model = nn.Sequential(nn.Linear(4, C), layers[0], nn.Linear(C, 3), layers[1]).to(device).double().eval()
    x_seq = torch.randn(T, B, 4, dtype=torch.float64, device=device)

    def gradients(run):
        asgl_cuda.reset(model)
        model.zero_grad()
        for part in x_seq.split(2):
            run(part).square().sum().backward()
            asgl_cuda.detach(model)
        return [value.grad.clone() for value in model.parameters()]

    stepped = gradients(lambda part: torch.stack([asgl_cuda.step(model, x_t) for x_t in part]))
    model[1].stateful = model[3].stateful = True
    for ours, theirs in zip(stepped, gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # sums over rows in another order


def with_reset(model, x_seq):
    asgl_cuda.reset(model)
    return model.lif(x_seq)


def with_reset_behind(model, x_seq):
    s_seq = model.lif(x_seq)
    asgl_cuda.reset(model)
    return s_seq


def with_another_state(model, x_seq):
    if model.lif.v is not None:
        model.lif.v = torch.zeros_like(model.lif.v)
    return model.lif(x_seq)


REFUSED = {
    "reset behind": (Stack(with_reset_behind, lif=LIF()), RuntimeError, r"LIF at 'lif' must keep its state, but"),
    "reset inside": (Stack(with_reset, lif=LIF()), RuntimeError, r"LIF at 'lif' must keep its state, but the model's"),
    "state replaced": (Stack(with_another_state, lif=LIF()), RuntimeError, r"LIF at 'lif' must keep its state"),
    "shared neurons": (
        Stack(lambda m, x: m.lif(m.lif(x)), lif=LIF()), RuntimeError, r"LIF at 'lif' is called twice in one step",
    ),
    "time of its own": (
        Stack(lambda m, x: m.lif(x.expand(4, -1, -1)), lif=LIF()), RuntimeError,
        "must get one step, got 4 .* Pass the time dimension",
    ),
    "recurrent": (nn.Sequential(LIF(), nn.LSTM(C, C)), RuntimeError, "LSTM at '1' can't be .* keeps no state"),
    "recurrent cell": (Stack(lambda m, x: x, cell=nn.LSTMCell(C, C)), RuntimeError, "LSTMCell at 'cell' can't be"),
    "time in two places": (
        nn.Sequential(LIF(), LIF(time_dim=1)), ValueError, r"got 0 for LIF at '0', 1 for LIF at '1'",
    ),
    "sum over time": (Stack(lambda m, x: m.lif(x).sum(0), lif=LIF()), ValueError, r"time_dim 0, got shape \[3, 5\]"),
    "no module": (LIF, TypeError, "model must be a torch.nn.Module"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_errors_of_models_that_can_not_be_streamed(model, error, words):
    def steps():
        for _ in range(2):
            asgl_cuda.step(model, torch.rand(B, C))

    with pytest.raises(error, match=rf"asgl_cuda\.step: .*{words}"):
        steps()
    for module in model.modules() if isinstance(model, nn.Module) else ():
        assert not getattr(module, "stateful", False)
        assert getattr(module, "_watch", None) is None


@pytest.mark.parametrize(
    ("x_t", "time_dim", "error", "words"),
    [
        ([1.0], 0, TypeError, "x_t must be a tensor"),
        (None, 0, TypeError, "x_t must be a tensor"),
        (torch.rand(3), 2, ValueError, "x_t.* must have at least 2 dimensions for time_dim 2"),
    ],
)
def test_inputs_that_are_refused(x_t, time_dim, error, words):
    with pytest.raises(error, match=rf"asgl_cuda\.step: {words}"):
        asgl_cuda.step(LIF(), x_t, time_dim=time_dim)
    with pytest.raises(error, match=rf"asgl_cuda\.LIF: {words}"):
        LIF(time_dim=time_dim).step(x_t)
    assert LIF(time_dim=-3).step(torch.rand(B, C)).shape == (B, C), "the first, from the end"


def doubled(model):
    model[0].register_forward_hook(lambda module, args, output: 2 * output)


CHANGES = {
    "another layer": lambda model: model.append(LeakyIntegrator(decay=0.5)),
    "other neurons": lambda model: model.__setitem__(1, LIF(decay=0.25, analog_prob=0.0)),
    "time at 1": lambda model: setattr(model[1], "time_dim", 1),
    "hook": doubled,
    "mode": lambda model: model.train(not model.training),
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_a_step_sees_what_has_changed_after_the_last(change, training):
    model = nn.Sequential(exact(nn.Linear(4, C)), LIF(analog_prob=0.0), exact(nn.Linear(C, 3))).train(training)
    x_seq = inputs(T, B, 4)
    before = [asgl_cuda.step(model, x_t) for x_t in x_seq]
    changed = CHANGES[change](model)
    model = changed if isinstance(changed, nn.Module) else model
    asgl_cuda.reset(model)
    time_dim = model[1].time_dim
    found = torch.stack([asgl_cuda.step(model, x_t) for x_t in x_seq], time_dim)
    assert torch.equal(found, model(x_seq.movedim(0, time_dim)))
    same = change in ("time at 1", "mode", "copied", "pickled")
    assert torch.equal(found.movedim(time_dim, 0), torch.stack(before)) == same


def test_steps_of_a_part_inside_of_a_step():
    """Its layers are watched by both."""
    inner = nn.Sequential(exact(nn.Linear(4, C)), LIF())
    once = Stack(lambda m, x_seq: asgl_cuda.step(m.inner, x_seq[0])[None], inner=inner).eval()
    x_seq = inputs(T, B, 4)
    assert torch.equal(torch.stack([asgl_cuda.step(once, x_t) for x_t in x_seq]), inner(x_seq))
    twice = Stack(lambda m, x_seq: [asgl_cuda.step(m.inner, x_t)[None] for x_t in (x_seq[0], x_seq[0])], inner=inner)
    asgl_cuda.reset(twice)
    with pytest.raises(RuntimeError, match=r"asgl_cuda\.step: LIF at 'inner\.1' is called twice in one step"):
        asgl_cuda.step(twice, x_seq[0])
    assert inner[1]._watch is None


def test_flags_come_back_after_an_exception():
    def fail(*_):
        raise ZeroDivisionError

    model = nn.Sequential(LIF(), LIF(stateful=True), nn.Linear(C, C))
    model[2].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        asgl_cuda.step(model, torch.rand(B, C))
    assert [layer.stateful for layer in model[:2]] == [False, True]
    assert [layer._watch for layer in model[:2]] == [None, None]
    layer = LIF()
    layer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        layer.step(torch.rand(B, C))
    assert not layer.stateful


def test_outputs_of_several_tensors():
    """Containers keep their classes; a detach inside is no reset."""
    pair = collections.namedtuple("pair", "s x")

    def forward(model, x_seq):
        s_seq = model.lif(x_seq)
        model.lif.detach_()
        return collections.OrderedDict(s=s_seq, more=(x_seq, [x_seq, None]), pair=pair(s_seq, x_seq))

    x_t = torch.rand(B, C)
    found = asgl_cuda.step(Stack(forward, lif=LIF()), x_t)
    assert type(found) is collections.OrderedDict
    assert type(found["pair"]) is pair
    assert found["s"].shape == found["pair"].s.shape == (B, C)
    assert all(torch.equal(each, x_t) for each in (found["more"][0], found["more"][1][0], found["pair"].x))
    assert found["more"][1][1] is None


def test_no_step_compiles_anew():
    """Steps of several layers in one function, and of a compiled model."""
    torch._dynamo.reset()
    layers = [make(kind, None, granularity="channel").eval() for kind in ("LIF", "AdaptiveLIF", "LeakyIntegrator")]
    model = nn.Sequential(exact(nn.Linear(4, 8)), LIF(), LeakyIntegrator(delay=True)).eval()
    counters = [torch._dynamo.testing.CompileCounterWithBackend("aot_eager") for _ in range(2)]

    def steps(x_t):
        return tuple(layer.step(x_t) for layer in layers)

    stepped = torch.compile(steps, backend=counters[0], fullgraph=True)
    compiled = torch.compile(model, backend=counters[1])
    x_seq = random_input(8, B, 8).detach()
    with torch.no_grad():
        for call, given, whole, counter in (
            (stepped, x_seq, [layer(x_seq) for layer in layers], counters[0]),
            (lambda x_t: (asgl_cuda.step(compiled, x_t),), x := inputs(8, B, 4), [model(x)], counters[1]),
        ):
            found = [call(x_t) for x_t in given[:2]]
            after_two = counter.frame_count
            found += [call(x_t) for x_t in given[2:]]
            assert counter.frame_count == after_two <= 2 * len(counters)
            for ours, theirs in zip(zip(*found, strict=True), whole, strict=True):
                assert torch.equal(torch.stack(ours), theirs)


def test_a_monitor_sees_steps_and_sequences_as_they_are(backend, device):
    layer = LIF(surrogate="rectangle", backend=backend).to(device).eval()
    x_seq = random_input(T, B, C, device=device).detach()
    results = []
    for run in (lambda: layer(x_seq), lambda: [layer.step(x_t) for x_t in x_seq], lambda: layer(x_seq)):
        with Monitor(layer) as monitor:
            run()
        results.append(monitor.result()[""])
    for key in ("firing_rate", "inside", "smoothing_error"):
        assert results[0][key] == pytest.approx(results[1][key], abs=1e-12)
        assert results[0][key] == results[2][key], "it starts at rest, whatever steps carry"


def test_a_stateful_layer_that_goes_on_with_two_dimensions_warns(monkeypatch):
    monkeypatch.setattr(asgl_cuda.checks, "_warned", set())
    layer, x_t = LIF(stateful=True), torch.rand(8, C)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x_t)  # one sequence without batch
        layer.reset()
        layer(x_t)
        one_step = LIF(stateful=True)
        for _ in range(2):
            one_step(x_t[:1])
            LIF()(x_t)
    with pytest.warns(UserWarning, match=r"asgl_cuda\.LIF: .*\[8, 5\], of which .* 0 .* layer\.step\(x_t\)") as got:
        layer(x_t)
    assert (got[0].filename, got[0].lineno) == (__file__, inspect.currentframe().f_lineno - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x_t)  # once a process
        batched, stepped = LIF(stateful=True), LeakyIntegrator()
        for _ in range(2):
            batched(x_t.unsqueeze(1))
            stepped.step(x_t)


# ---- layers over time ----


class Positional(nn.Linear):
    """Adds a dimension by itself."""

    def forward(self, x):
        return super().forward(x.unsqueeze(-1))


def test_over_time_takes_what_knows_no_time():
    """Also layers that add a dimension, recurrent ones that process the tokens of a step, and a compiler."""
    assert OverTime(nn.ReLU())(torch.rand(2, 3)).shape == (2, 3)
    assert OverTime(Positional(1, 4))(torch.rand(5, 2)).shape == (5, 2, 4)
    conv = nn.Conv1d(1, 4, 3)
    conv.register_forward_pre_hook(lambda _, args: (args[0].unsqueeze(1),))
    assert OverTime(conv)(torch.rand(5, 2, 9)).shape == (5, 2, 4, 7)
    OverTime(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.GRU(3, 3))))
    layer = OverTime(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    x_seq = torch.rand(T, B, 3)
    for made in (torch.jit.script(layer), torch.compile(layer, backend="eager", fullgraph=True)):
        assert torch.equal(made(x_seq), layer(x_seq))


def test_over_time_refuses_layers_with_a_state():
    for layer in (LIF(), BatchNormLIF(3), LeakyIntegrator(), nn.LSTM(3, 3), nn.GRU(3, 3), nn.LSTMCell(3, 3)):
        name = type(layer).__name__
        with pytest.raises(TypeError, match=rf"asgl_cuda\.OverTime: layer must not use time, got {name}, "):
            OverTime(layer)
        if not isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
            inside = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Identity(), layer))
            words = rf"got {name} at '1\.1', .*nn\.Sequential\(OverTime\(\.\.\.\), {name}\("
            with pytest.raises(TypeError, match=words):
                OverTime(inside)
    for layer, remedy in ((nn.GRU(3, 3), "put it outside of OverTime"), (nn.GRUCell(3, 3), "call it in a loop over")):
        with pytest.raises(TypeError, match=f"merged; {remedy}"):
            OverTime(layer)
    layer, x_seq = OverTime(nn.Sequential(nn.Linear(3, 3))), torch.rand(T, B, 3)
    layer(x_seq)
    layer.layer.append(LIF())  # neurons that come later
    with pytest.raises(TypeError, match=r"asgl_cuda\.OverTime: layer must not use time, got LIF at '1'"):
        layer(x_seq)
    layer.layer = LIF()
    with pytest.raises(TypeError, match=r"asgl_cuda\.OverTime: layer must not use time, got LIF, "):
        layer(x_seq)
