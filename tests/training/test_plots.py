"""Pictures show the values that they are given, and say what they lack."""

import sys

import pytest
import torch
from torch import nn

import asgl_cuda

figures = pytest.importorskip("matplotlib.figure")
RESULTS = [{"0": {"width": 1.0, "firing_rate": 0.1}, "1": {"width": 2.0}}, {"0": {"width": 3.0}, "1": {"width": 4.0}}]


@pytest.fixture
def ax():
    return figures.Figure().subplots()


@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (1, 3), (5, 2, 2, 3)])
def test_spikes(ax, shape):
    s_seq = (torch.rand(shape) < 0.4).float().requires_grad_()
    assert asgl_cuda.plot_spikes(s_seq, ax=ax) is ax
    marks = {tuple(map(int, each)) for each in ax.collections[0].get_offsets()}
    flat = s_seq.flatten(1)
    assert marks == {(t, n) for t in range(flat.shape[0]) for n in range(flat.shape[1]) if flat[t, n]}


def test_layers(ax):
    asgl_cuda.plot_layers(RESULTS, "width", ax=ax)
    assert {line.get_label(): list(line.get_ydata()) for line in ax.lines} == {"0": [1, 3], "1": [2, 4]}
    ax.clear()
    asgl_cuda.plot_layers([{"0": {}}, {"0": {"firing_rate": 0.1}}], ax=ax)  # not in the first result
    before, after = ax.lines[0].get_ydata()
    assert before != before
    assert after == 0.1
    ax.clear()
    asgl_cuda.plot_layers(RESULTS[0], ax=ax)
    assert [bar.get_height() for bar in ax.patches] == [0.1]


def test_layers_of_a_model(ax):
    model = nn.Sequential(nn.Linear(2, 3), asgl_cuda.LIF())
    with asgl_cuda.Monitor(model) as monitor:
        model(torch.rand(4, 2, 2))
    asgl_cuda.plot_layers(monitor.result(), "width", ax=ax)
    assert [bar.get_height() for bar in ax.patches] == [pytest.approx(monitor.result()["1"]["width"])]


def test_gradient_norms(ax):
    gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    asgl_cuda.plot_gradient_norms({"x": gradient}, ax=ax)
    first, second, third = ax.lines[0].get_ydata()
    assert (first, third, ax.lines[0].get_label()) == (5, 1, "x")
    assert second != second  # a zero has no place on a logarithmic axis
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: asgl_cuda.plot_spikes([1]), TypeError, "s_seq must be a tensor"),
        (lambda: asgl_cuda.plot_spikes(torch.ones(3)), ValueError, r"\[T, N, \.\.\.\], .* got \[3\]"),
        (lambda: asgl_cuda.plot_spikes(torch.ones(0, 3)), ValueError, r"without a size 0, got \[0, 3\]"),
        (lambda: asgl_cuda.plot_gradient_norms(None), TypeError, "gradients must be a tensor"),
        (lambda: asgl_cuda.plot_gradient_norms({"x": torch.ones(2)}), ValueError, "x must have shape"),
        (lambda: asgl_cuda.plot_layers([]), TypeError, "results must be"),
        (lambda: asgl_cuda.plot_layers(asgl_cuda.Monitor(asgl_cuda.LIF())), TypeError, r"call result\(\) of the Mon"),
        (lambda: asgl_cuda.plot_layers(RESULTS, "rate"), ValueError, r"in results \(firing_rate, width\), got 'rate'"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="plot_spikes draws with matplotlib: pip install matplotlib"):
        asgl_cuda.plot_spikes(torch.ones(2, 2))
