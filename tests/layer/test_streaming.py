"""One time step a call has the bits of the whole sequence; errors of models that can't be streamed."""

import collections
import inspect
import io
import re
import warnings

import pytest
import torch
import torch._dynamo.testing
from comparison import Stack, random_input, randomized
from torch import nn

import asgl_cuda
from asgl_cuda import LIF, BatchNormLIF, LeakyIntegrator, Monitor, OverTime

T, B, C = 6, 3, 5

LAYERS = {
    "neurons": lambda **options: LIF(learn_decay=True, **options),
    "neurons by channel": lambda **options: randomized(LIF(C, granularity="channel", v_reset=None, **options)),
    "normalised neurons": lambda **options: randomized(BatchNormLIF(C, **options)),
    "integrator": lambda **options: LeakyIntegrator(learn_decay=True, **options),
    "delayed integrator": lambda **options: LeakyIntegrator(delay=True, v_rest=0.25, **options),
}


def exact(layer):
    """The layer with weights whose sums are exact for any number of rows of a matrix product."""
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_((value * 16).round() / 4)
    return layer


def inputs(*shape):
    return torch.randint(-2, 4, shape).float()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("time_dim", [0, 1, -1])
@pytest.mark.parametrize("stateful", [False, True])
def test_steps_of_a_layer_are_one_sequence(backend, device, make, time_dim, stateful):
    for dtype in (torch.float32, torch.bfloat16):
        layer = make(time_dim=time_dim, stateful=stateful, backend=backend).to(device).eval()
        x_seq = random_input(T, B, C, 4, dtype=dtype, device=device).detach().movedim(0, time_dim).requires_grad_()
        grad = torch.randn(x_seq.shape).to(x_seq)
        whole = layer(x_seq)
        (expected,) = torch.autograd.grad(whole, x_seq, grad)
        layer.reset()
        for _ in range(2):
            steps = [layer.step(x_t) for x_t in x_seq.unbind(time_dim)]
            assert all(step.shape == (B, C, 4) for step in steps)
            stepped = torch.stack(steps, time_dim)
            assert torch.equal(stepped, whole)
            assert layer.v.dtype == torch.float32
            assert layer.stateful is stateful
            (found,) = torch.autograd.grad(stepped, x_seq, grad)
            assert torch.equal(found, expected)
            assert not torch.equal(layer.step(x_seq.select(time_dim, 0)), steps[0])
            layer.reset()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_whole_sequence_is_not_surprised_by_steps(backend, device, make):
    layer = make(backend=backend).to(device).eval()
    layer.store_v_seq = isinstance(layer, LIF)
    x_seq = random_input(T, B, C, 4, device=device)
    whole = layer(x_seq)
    first = layer.step(x_seq[0])
    v = layer.v
    assert torch.equal(layer(x_seq), whole)
    assert layer.v is v, "the stream goes on after it"
    assert torch.equal(torch.stack([first, layer.step(x_seq[1])]), whole[:2])
    with pytest.raises(ValueError, match="carried potential has shape"):
        layer.step(x_seq[0, :2])


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
@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_a_model_are_one_sequence(backend, device, time_dim, fused):
    model = network(time_dim, backend=backend)
    if fused:
        norm = nn.BatchNorm2d(C)
        norm.running_var.fill_(4.0)
        model[1] = nn.Sequential(OverTime(norm), LIF(time_dim=time_dim, backend=backend)).eval()
        model, report = asgl_cuda.fuse(model, inputs(T, B, 1, 8, 8).movedim(0, time_dim))
        assert len(report.replaced) == 1, report
    model = model.to(device)
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
    with pytest.raises(ValueError, match=r"asgl_cuda\.step: the model's output must have time .* \[1, 2\] for"):
        asgl_cuda.step(Stack(lambda m, x: m.model(x).mean(0), model=model), x_seq[0])


def test_truncated_backpropagation_through_steps(backend, device):
    model = nn.Sequential(nn.Linear(4, C), LIF(learn_decay=True, backend=backend), nn.Linear(C, 3),
                          LeakyIntegrator(backend=backend)).to(device).double()  # fmt: skip
    model.eval()
    stateful = nn.Sequential(*model)
    x_seq = torch.randn(T, B, 4, dtype=torch.float64, device=device)

    def gradients(run):
        asgl_cuda.reset(model)
        model.zero_grad()
        for part in x_seq.split(2):
            run(part).square().sum().backward()
            asgl_cuda.detach(model)
            assert not model[1].v.requires_grad
        return [value.grad.clone() for value in model.parameters()]

    stepped = gradients(lambda part: torch.stack([asgl_cuda.step(model, x_t) for x_t in part]))
    model[1].stateful = model[3].stateful = True
    for ours, theirs in zip(stepped, gradients(stateful), strict=True):
        # Sums over rows in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


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
    "reset behind": (Stack(with_reset_behind, lif=LIF()), RuntimeError, r"LIF at 'lif' is reset, .* by the model's"),
    "recurrent cell": (Stack(lambda m, x: x, cell=nn.LSTMCell(C, C)), RuntimeError, "LSTMCell at 'cell' can't take a"),
    "shared neurons": (
        Stack(lambda m, x: m.lif(m.lif(x)), lif=LIF()), RuntimeError, r"LIF at 'lif' is called twice in one step",
    ),
    "reset inside": (Stack(with_reset, lif=LIF()), RuntimeError, r"LIF at 'lif' is reset, .* by the model's own"),
    "state replaced": (Stack(with_another_state, lif=LIF()), RuntimeError, r"LIF at 'lif' is reset, or its state rep"),
    "time of its own": (
        Stack(lambda m, x: m.lif(x.expand(4, -1, -1)), lif=LIF()), RuntimeError, "LIF at 'lif' gets 4 time steps",
    ),
    "recurrent": (nn.Sequential(LIF(), nn.LSTM(C, C)), RuntimeError, "LSTM at '1' can't take a step .* begins at rest"),
    "time in two places": (
        nn.Sequential(LIF(), LIF(time_dim=1)), ValueError, r"LIF at '0' has time at 0, LIF at '1' has time at 1",
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
    if isinstance(model, nn.Module):
        for module in model.modules():
            assert not getattr(module, "stateful", False)
            assert not module._forward_pre_hooks
            assert not module._forward_hooks


@pytest.mark.parametrize(
    ("x_t", "time_dim", "error", "words"),
    [
        ([1.0], 0, TypeError, "x_t must be a tensor"),
        (None, 0, TypeError, "x_t must be a tensor"),
        (torch.rand(3), 2, ValueError, "x_t.* must have 2 or more dimensions for time_dim 2"),
    ],
)
def test_inputs_that_are_refused(x_t, time_dim, error, words):
    with pytest.raises(error, match=rf"asgl_cuda\.step: {words}"):
        asgl_cuda.step(LIF(), x_t, time_dim=time_dim)
    with pytest.raises(error, match=rf"asgl_cuda\.LIF: {words}"):
        LIF(time_dim=time_dim).step(x_t)


def test_time_from_the_end():
    assert LIF(time_dim=-3).step(torch.rand(B, C)).shape == (B, C)


def test_flags_come_back_after_an_exception():
    def fail(*_):
        raise ZeroDivisionError

    model = nn.Sequential(LIF(), LIF(stateful=True), nn.Linear(C, C))
    model[2].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        asgl_cuda.step(model, torch.rand(B, C))
    assert [layer.stateful for layer in model[:2]] == [False, True]
    assert not model[0]._forward_pre_hooks
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


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_no_step_compiles_anew(make):
    torch._dynamo.reset()
    layer = make().eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    stepped = torch.compile(layer.step, backend=counter, fullgraph=True)
    x_seq = random_input(8, B, C, 4).detach()
    whole = layer(x_seq)
    with torch.no_grad():
        found = [stepped(x_t) for x_t in x_seq[:2]]
        after_two = counter.frame_count
        found += [stepped(x_t) for x_t in x_seq[2:]]
    assert after_two == counter.frame_count <= 2
    assert torch.equal(torch.stack(found), whole)


def test_steps_of_a_compiled_model():
    model = nn.Sequential(exact(nn.Linear(4, C)), LIF(), LeakyIntegrator(delay=True)).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    x_seq = inputs(8, B, 4)
    with torch.no_grad():
        found = [asgl_cuda.step(compiled, x_t) for x_t in x_seq[:2]]
        after_two = counter.frame_count
        found += [asgl_cuda.step(compiled, x_t) for x_t in x_seq[2:]]
        assert counter.frame_count == after_two
        assert torch.equal(torch.stack(found), model(x_seq))


def test_a_monitor_sees_steps_and_sequences_as_they_are(backend, device):
    layer = LIF(backend=backend).to(device).eval()
    x_seq = random_input(T, B, C, device=device).detach()
    results = []
    for run in (lambda: layer(x_seq), lambda: [layer.step(x_t) for x_t in x_seq], lambda: layer(x_seq)):
        with Monitor(layer) as monitor:
            run()
        results.append(monitor.result()[""])
    for key in ("firing_rate", "inside", "smoothing_error"):
        assert results[0][key] == pytest.approx(results[1][key], abs=1e-12)
        assert results[0][key] == results[2][key], "it starts at rest, whatever steps carry"


def test_a_copy_has_what_steps_carry():
    layer = LIF(learn_decay=True)
    layer.step(torch.rand(B, C, requires_grad=True))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).v, layer.v)
    assert layer.to(torch.float64).v.dtype == torch.float64


@pytest.mark.parametrize("make", [LIF, BatchNormLIF, LeakyIntegrator])
def test_a_forgotten_reset_says_what_helps(backend, device, make):
    layer = make(*(C,) * (make is BatchNormLIF), stateful=True, backend=backend).to(device)
    linear = nn.Linear(4, C).to(device)
    x_seq = torch.rand(T, B, 4, device=device)
    layer(linear(x_seq)).sum().backward()
    second = layer(linear(x_seq))
    with pytest.raises(
        RuntimeError, match=r"second time.*asgl_cuda\.reset\(model\).*asgl_cuda\.detach\(model\)"
    ) as got:
        second.sum().backward()
    assert "second time" in str(got.value.__cause__)
    assert "asgl_cuda" not in str(got.value.__cause__)
    asgl_cuda.detach(layer)
    layer(linear(x_seq)).sum().backward()
    asgl_cuda.reset(layer)
    layer(linear(x_seq)).sum().backward()


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
        for _ in range(2):
            LIF()(x_t)
    with pytest.warns(UserWarning, match=r"asgl_cuda\.LIF: .*\[8, 5\], whose dimension 0.* layer\.step\(x_t\)") as got:
        layer(x_t)
    line = inspect.currentframe().f_lineno - 1
    assert (got[0].filename, got[0].lineno) == (__file__, line)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x_t)  # once a process
        batched = LIF(stateful=True)
        for _ in range(2):
            batched(x_t.unsqueeze(1))
        stepped = LeakyIntegrator()
        for _ in range(2):
            stepped.step(x_t)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (LIF(8, granularity="channel"), (4, 8, 5), "[T, B, C, ...] with C = 8; got [4, 8, 5]; is time missing?"),
        (LIF(8, granularity="channel"), (4, 8), "[T, B, C, ...] with C = 8; got [4, 8]; is time missing?"),
        (LIF(8, granularity="channel"), (4, 6, 5), "[T, B, C, ...] with C = 8; got [4, 6, 5]"),
        (
            LIF(8, granularity="channel", time_dim=1), (4, 8, 5),
            "[B, T, C, ...] with C = 8; got [4, 8, 5]; is time missing?",
        ),
        (LIF(8, granularity="channel", time_dim=-1), (4, 6, 5, 7), "[B, C, ..., T] with C = 8; got [4, 6, 5, 7]"),
        (LIF((4, 8), granularity="neuron"), (4, 8), "[T, B, 4, 8] with the neurons last; got [4, 8]; is time missing?"),
        (
            LeakyIntegrator((4, 8), granularity="neuron", learn_decay=True), (2, 3, 8),
            "[T, B, 4, 8] with the neurons last; got [2, 3, 8]",
        ),
        (BatchNormLIF(8), (4, 8, 5, 6), "[T, B, C, ...] with C = 8; got [4, 8, 5, 6]; is time missing?"),
        (BatchNormLIF(8), (4, 3, 5, 6), "[T, B, C, ...] with C = 8; got [4, 3, 5, 6]"),
        (BatchNormLIF(8), (4, 8), "a dimension of channels, the second but time, got shape [4, 8] with time_dim 0; is "
                                  "time missing?"),
        (LIF(time_dim=1), (4,), "got 1; is time missing?"),
        (LIF(time_dim=-3), (4, 5), "got -3; is time missing?"),
    ],
)  # fmt: skip
def test_errors_about_channels(layer, shape, words):
    with pytest.raises(ValueError, match=re.escape(words) + "$"):
        layer(torch.rand(shape))


def test_a_step_for_a_stateful_layer_that_has_a_sequence(backend):
    layer = LIF(stateful=True, backend=backend)
    layer(torch.rand(T, B, C))
    with pytest.raises(
        ValueError, match=r"asgl_cuda\.LIF: the carried potential has shape \[3, 5\].*step\(\) takes one"
    ):
        layer(torch.rand(B, C))


def test_over_time_refuses_stateful_layers():
    for layer in (LIF(), BatchNormLIF(3), LeakyIntegrator(), nn.LSTM(3, 3), nn.GRU(3, 3)):
        name = type(layer).__name__
        with pytest.raises(TypeError, match=rf"asgl_cuda\.OverTime: layer must know no time, got {name}, "):
            OverTime(layer)
        inside = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Identity(), layer))
        if isinstance(layer, nn.RNNBase):
            OverTime(inside)  # may process the tokens of a step
            continue
        with pytest.raises(TypeError, match=rf"got {name} at '1\.1', .*nn\.Sequential\(OverTime\(\.\.\.\), {name}\("):
            OverTime(inside)


class Positional(nn.Linear):
    """Adds a dimension by itself."""

    def forward(self, x):
        return super().forward(x.unsqueeze(-1))


def test_over_time_takes_layers_that_add_a_dimension():
    assert OverTime(Positional(1, 4))(torch.rand(5, 2)).shape == (5, 2, 4)
    conv = nn.Conv1d(1, 4, 3)
    conv.register_forward_pre_hook(lambda _, args: (args[0].unsqueeze(1),))
    assert OverTime(conv)(torch.rand(5, 2, 9)).shape == (5, 2, 4, 7)


def test_over_time_refuses_neurons_that_come_later_cells_and_inputs_without_batch():
    layer = OverTime(nn.Sequential(nn.Linear(3, 3)))
    x_seq = torch.rand(T, B, 3)
    layer(x_seq)
    layer.layer.append(LIF())
    with pytest.raises(TypeError, match=r"asgl_cuda\.OverTime: layer must know no time, got LIF at '1'"):
        layer(x_seq)
    layer.layer = LIF()
    with pytest.raises(TypeError, match=r"asgl_cuda\.OverTime: layer must know no time, got LIF, "):
        layer(x_seq)
    with pytest.raises(TypeError, match=r"asgl_cuda\.OverTime: layer must know no time, got LSTMCell"):
        OverTime(nn.LSTMCell(3, 3))
    with pytest.raises(ValueError, match=r"asgl_cuda\.OverTime: x_seq must have time and batch, .* got shape \[3\]"):
        OverTime(nn.Linear(3, 3))(torch.rand(3))


def test_over_time_can_be_scripted_and_compiled():
    layer = OverTime(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    x_seq = torch.rand(T, B, 3)
    for made in (torch.jit.script(layer), torch.compile(layer, backend="eager", fullgraph=True)):
        assert torch.equal(made(x_seq), layer(x_seq))
