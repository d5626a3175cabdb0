"""The extension's direct functions for its operators, used by plain eager calls alone."""

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import asgl_cuda
from asgl_cuda.backends import BACKENDS, Operators, direct_operators, extension, operators_of
from asgl_cuda.reference.records import Numbers, Rules
from asgl_cuda.reference.surrogates import INTEGER

CPU = BACKENDS["cpu"]
pytestmark = pytest.mark.skipif(CPU.direct is None, reason="this build has no extension")


def test_every_operator_is_there():
    operators = Operators(*(getattr(torch.ops.asgl_cuda, name) for name in Operators._fields))
    assert len(CPU.direct) == len(operators) == len(set(map(id, CPU.direct)))
    drawn = []
    for each in (CPU.direct, operators):
        torch.manual_seed(1)
        drawn.append(each.draw_rng_state(torch.empty(2, dtype=torch.int64)))
    assert torch.equal(*drawn)


class Subclass(torch.Tensor):
    """Records intercepted functions."""

    seen = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Subclass.seen += (function,)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_and_modes_of_functions_ask_for_operators():
    """Any input can; a subclass gets its own type back."""
    s_seq = asgl_cuda.lif(torch.rand(4, 7).as_subclass(Subclass), backend="cpu")
    assert type(s_seq) is Subclass
    assert CPU.operators.lif_forward in Subclass.seen
    inputs = [torch.rand(3), None, torch.rand(3)]
    assert operators_of("cpu", inputs) is CPU.direct
    with BaseTorchFunctionMode():
        assert operators_of("cpu", inputs) is CPU.operators
    for place in range(3):
        some = [*inputs[:place], torch.rand(3).as_subclass(Subclass), *inputs[place + 1 :]]
        assert operators_of("cpu", some) is CPU.operators


def test_a_mode_of_the_dispatcher_sees_direct_calls():
    functions = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            functions.append(function)
            return function(*args, **(kwargs or {}))

    x_seq = torch.rand(4, 7, requires_grad=True)
    with Seen():
        asgl_cuda.lif(x_seq, backend="cpu").sum().backward()
    assert {CPU.operators.lif_forward, CPU.operators.lif_backward} <= set(functions)


@pytest.mark.parametrize("way", ["operators", "direct"])
def test_both_ways_refuse_wrong_arguments(way):
    forward = getattr(CPU, way).lif_forward
    with pytest.raises((TypeError, RuntimeError), match="lif_forward"):
        forward(torch.rand(4, 7))


NUMBERS = Numbers(1.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, residual_gain=1.0, v_rest=0.0, surrogate_gain=1.0, v_min=0.0)
RULES = Rules(*[0] * len(Rules._fields))
X, STATE = torch.rand(4, 2, 3), torch.arange(4)


def lif(x_seq=X, numbers=NUMBERS, rng_state=None, width=None, **rules):
    rules = rules.get("rules", RULES._replace(**{name: each for name, each in rules.items() if name != "rules"}))
    return "lif_forward", (x_seq, None, rng_state, width, *[None] * 7, numbers, rules, [False] * 4)


def recurrent(x_seq=X, numbers=NUMBERS, rng_state=None, **rules):
    tensors = x_seq, torch.eye(3), torch.ones(9, 3), None, None, None, rng_state
    return "recurrent_forward", (*tensors, numbers, RULES._replace(**rules), False, False, [False] * 8)


def integrator(x_seq=X, numbers=NUMBERS, **rules):
    return "integrator_forward", (x_seq, *[None] * 3, numbers, RULES._replace(**rules), False, False)


def normalised(mean=None, variance=None, batches=None, x_seq=X, time_dim=0):
    mean, variance = (torch.zeros(3) if each is None else each for each in (mean, variance))
    return "batch_norm_update", (mean, variance, batches, 0.1, x_seq, *[None] * 5, 1e-5, 1.0, time_dim)


REFUSED = {
    "too few numbers": (lif(numbers=[0.0] * 2), "expected 11 numbers, got 2"),
    "too many numbers": (lif(numbers=[*NUMBERS, 0.0]), "expected 11 numbers, got 12"),
    "too many numbers, recurrent": (recurrent(numbers=[*NUMBERS, 0.0]), "expected 11 numbers, got 12"),
    "too many rules": (lif(rules=[*RULES, 0]), "expected 15 rules, got 16"),
    "no steps": (lif(torch.rand(0, 2, 3)), "at least one time step"),
    "no steps, recurrent": (recurrent(torch.rand(0, 2, 3)), "at least one time step"),
    "no steps, integrated": (integrator(torch.rand(0, 2, 3)), "at least one time step"),
    "no steps, normalised": (normalised(x_seq=torch.rand(0, 2, 3)), "at least one time step"),
    "no such dimension": (lif(time_dim=3), r"time_dim must be in \[0, 3\), got 3"),
    "time counted from the end": (lif(time_dim=-1), r"time_dim must be in \[0, 3\), got -1"),
    "a parameter of no dimension": (lif(width=torch.ones(3), trailing=3), r"trailing must be in \[0, 3\), got 3"),
    "neurons as time": (recurrent(time_dim=2), "time_dim must be 0 or 1, got 2"),
    "strided x_seq": (lif(torch.rand(4, 2, 6)[..., ::2]), "contiguous or channels_last"),
    "strided x_seq, recurrent": (recurrent(torch.rand(4, 2, 6)[..., ::2]), "x_seq must be contiguous"),
    "x_seq of two dimensions, recurrent": (recurrent(torch.rand(4, 3)), "have 3 dimensions"),
    "strided rng_state": (lif(rng_state=STATE[::2], analog_below=9), "contiguous int64 tensor of 2 elements"),
    "strided rng_state, recurrent": (recurrent(rng_state=STATE[::2], analog_below=9), "tensor of 2 elements"),
    "strided rng_state that is not drawn from": (lif(rng_state=STATE[::2]), "tensor of 2 elements"),
    "rng_state of another type": (lif(rng_state=STATE[:2].int(), analog_below=9), "contiguous int64 tensor"),
    "rng_state without a probability": (lif(rng_state=STATE[:2], analog_below=65537), "tensor of 3 elements"),
    "no rng_state": (recurrent(analog_below=9), "tensor of 2 elements"),
    "negative probability": (lif(rng_state=STATE[:2], analog_below=-1), "analog_below must be in"),
    "probability above 1": (recurrent(rng_state=STATE[:3], analog_below=65538), "analog_below must be in"),
    "no such surrogate": (lif(surrogate=8), "no surrogate has the number 8"),
    "negative surrogate": (recurrent(surrogate=-1), "no surrogate of recurrent neurons has the number -1"),
    "integer spikes, recurrent": (recurrent(surrogate=INTEGER), "no surrogate of recurrent neurons"),
    "several spikes, recurrent": (recurrent(multi_spike=1), "recurrent neurons have no multi_spike"),
    "levels, recurrent": (recurrent(levels=3), "recurrent neurons have no multi_spike, levels"),
    "a floor, recurrent": (recurrent(floored=1), "recurrent neurons have no multi_spike, levels, v_min"),
    "a periodic surrogate, recurrent": (recurrent(periodic=1), "recurrent neurons have no multi_spike"),
    "a bias, recurrent": (recurrent(numbers=NUMBERS._replace(input_bias=0.5)), "no input_bias and input_mean"),
    "a mean, recurrent": (recurrent(numbers=NUMBERS._replace(input_mean=0.5)), "no input_bias and input_mean"),
    "an adaptation of two places": (recurrent(adaptation=3), "no adaptation has the number 3"),
    "levels beyond 16 bits": (lif(levels=2**16), r"levels must be in \[0, 65535\], got 65536"),
    "negative levels": (lif(levels=-1), r"levels must be in \[0, 65535\], got -1"),
    "a logarithm of no tensor": (lif(log_width=1), "a decay given as its logit must be tensors"),
    "a logit of no tensor": (lif(logit_decay=1), "a decay given as its logit must be tensors"),
    "several counters": (normalised(batches=torch.zeros(2, dtype=torch.int64)), "must be an int64 tensor of one"),
    "no counter": (normalised(batches=torch.zeros(0, dtype=torch.int64)), "must be an int64 tensor of one"),
    "a counter of another type": (normalised(batches=torch.zeros(())), "must be an int64 tensor of one"),
    "strided statistics": (normalised(variance=torch.zeros(6)[::2]), "must be contiguous and have shape"),
    "statistics of another type": (normalised(mean=torch.zeros(3).double()), "must be contiguous and have shape"),
}


@pytest.mark.parametrize("way", ["operators", "direct"])
@pytest.mark.parametrize("case", REFUSED)
def test_both_ways_refuse(way, case):
    """What Python never passes, but a graph or a bare call may."""
    (name, arguments), words = REFUSED[case]
    before = [each.clone() for each in arguments[:2]] if name == "batch_norm_update" else []
    with pytest.raises(ValueError, match=f"asgl_cuda: .*{words}"):
        getattr(getattr(CPU, way), name)(*arguments)
    assert all(torch.equal(*each) for each in zip(arguments, before, strict=False))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("h_seq", torch.Tensor.half, "h_seq must have type Float, got Half"),
        ("emitted", lambda _: None, "emitted must be a tensor"),
        ("emitted", torch.Tensor.double, "emitted must have type Float, got Double"),
    ],
)
def test_what_forward_kept_is_checked(name, change, words):
    """An exported graph may have other tensors for it."""
    calls = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "recurrent_backward" in str(function):
                calls.append((function, [*args]))
            return function(*args, **(kwargs or {}))

    x_seq, weight = torch.rand(4, 2, 3, requires_grad=True), torch.eye(3).requires_grad_()
    with Noted():
        asgl_cuda.recurrent_lif(x_seq, weight, backend="cpu").sum().backward()
    [(function, arguments)] = calls
    place = [each.name for each in function._schema.arguments].index(name)
    arguments[place] = change(arguments[place])
    with pytest.raises((TypeError, RuntimeError), match=words):
        function(*arguments)


def test_an_extension_compiled_before_is_called_through_torch_ops():
    assert direct_operators(extension.module) == CPU.direct
    assert direct_operators(SimpleNamespace(lif_forward=CPU.direct.lif_forward)) is None
    assert direct_operators(None) is None
