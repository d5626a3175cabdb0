"""Models and graphs for the tests of NIR."""

from itertools import pairwise

import pytest
import torch

nir = pytest.importorskip("nir", minversion="1.0.7")
np = pytest.importorskip("numpy")
pytest.importorskip("nirtorch", minversion="2.6")

NUMBERS = ("tau", "tau_syn", "tau_mem", "r", "w_in", "v_leak", "v_threshold", "v_reset")


def rewritten(graph, path, type_check=True):
    nir.write(path, graph)
    return nir.read(path, type_check=type_check)


def euler(node, x_seq, dt=1e-4):
    """The equations of NIR for a node of neurons or integrators, in float64, by steps of dt: spikes, or potentials."""
    x_seq = x_seq.double()
    number = {name: torch.as_tensor(value).double() for name, value in vars(node).items() if name in NUMBERS}
    zero = torch.zeros_like(number["r"])
    v_leak, v_reset = number.get("v_leak", zero), number.get("v_reset", zero)
    v, i, out = v_leak.expand(x_seq.shape[1:]), torch.zeros_like(x_seq[0]), []
    tau = number.get("tau", number.get("tau_mem"))
    for x in x_seq:
        if "tau_syn" in number:
            i = i + dt * (number["w_in"] * x - i) / number["tau_syn"]
        current = number["r"] * (i if "tau_syn" in number else x)
        v = v + dt * (current if tau is None else (v_leak - v + current) / tau)
        s = v > number["v_threshold"] if "v_threshold" in number else None
        out.append(v if s is None else s)
        v = v if s is None else torch.where(s, v_reset, v)
    return torch.stack(out).float()


def fires(s_seq):
    return 0.02 < (s_seq != 0).float().mean() < 0.9


def nir_lif(**numbers):
    """A node of 6 neurons, by default with the values of asgl_cuda.LIF()."""
    named = {"tau": 2e-4, "r": 2.0, "v_leak": 0.0, "v_threshold": 1.0} | numbers
    return nir.LIF(**{name: np.full(6, value, np.float32) for name, value in named.items()})


def cuba(kind=nir.CubaLIF, **numbers):
    """A node of 6 neurons with a current."""
    named = {"tau_syn": 4e-4, "tau_mem": 2e-4, "r": 2.0, "v_leak": 0.0, "w_in": 4.0}
    named |= ({"v_threshold": 1.0} if kind is nir.CubaLIF else {}) | numbers
    return kind(**{name: np.full(6, value, np.float64) for name, value in named.items()})


def graph_of(*nodes, edges=None, **more):
    """The nodes as 0, 1, ..., between Input and Output: a chain, or with the given edges."""
    shape = np.array([6])
    named = {"in": nir.Input(input_type={"input": shape}), **{str(i): node for i, node in enumerate(nodes)}, **more}
    named["out"] = nir.Output(output_type={"output": shape})
    names = [name for name in named if name not in more]
    return nir.NIRGraph(named, edges or list(pairwise(names)), type_check=False)
