"""The extension's direct functions for its operators, used by plain eager calls alone."""

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import asgl_cuda
from asgl_cuda import extension
from asgl_cuda.backends import BACKENDS, Operators, direct_operators, operators_of

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
    with pytest.raises(ValueError, match="asgl_cuda: expected 11 numbers, got 2"):
        forward(torch.rand(4, 7), *[None] * 10, [0.0] * 2, [0] * 14, [False] * 4)
    with pytest.raises((TypeError, RuntimeError), match="lif_forward"):
        forward(torch.rand(4, 7))


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
