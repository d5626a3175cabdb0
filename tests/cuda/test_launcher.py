"""The operators on a launcher in Python: what it is asked, by which thread, and what becomes of its errors."""

import threading

import pytest
import torch
from comparison import random_input, uniform

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import extension, launcher

pytestmark = pytest.mark.skipif(extension.module is None, reason=str(extension.problem))

NAMESPACE = "asgl_cuda_recording"


class Recorder:
    """A launcher that starts nothing."""

    def __init__(self) -> None:
        self.refused = "nothing"  # part of a kernel's name
        self.kernels: list[str] = []
        self.threads: set[int] = set()
        self.asked: list[torch.device] = []

    def resident_threads(self, device: torch.device) -> int:
        self.asked.append(device)
        return 2048

    def launch(self, device: torch.device, kernel: str, blocks: int, threads: int, params: int, size: int) -> None:
        assert device.type == "cpu"
        assert min(blocks, threads, params, size) > 0
        if self.refused in kernel:
            raise ArithmeticError(f"refused: {kernel}")
        self.kernels.append(kernel.removeprefix("asgl::").split("<")[0])
        self.threads.add(threading.get_ident())


RECORDER = Recorder()
FUNCTIONS = launcher.define_with_kernels(NAMESPACE, "CPU", RECORDER)


@pytest.fixture(params=["direct", "torch.ops"])
def recorder(request, monkeypatch) -> Recorder:
    """The recorder behind the backend "recording", called as functions or through torch.ops."""
    direct = backends.direct_operators(FUNCTIONS) if request.param == "direct" else None
    backend = backends.Backend(("cpu",), backends.registered_operators(NAMESPACE), lambda: None, direct)
    monkeypatch.setitem(backends.BACKENDS, "recording", backend)
    RECORDER.__init__()
    return RECORDER


def step(steps: int = 4) -> None:
    """Forward and backward with a learned width."""
    width = uniform(low=0.5, high=1.0)
    asgl_cuda.lif(random_input(steps, 8), width=width, backend="recording").sum().backward()


def test_launches_in_order(recorder):
    """The size of the device is asked only where it decides."""
    step()
    assert recorder.kernels == ["lif_forward_kernel", "lif_backward_settled_kernel", "gradient_sum_kernel"]
    assert recorder.asked == []
    step(17)
    assert set(recorder.asked) == {torch.device("cpu")}


@pytest.mark.parametrize("refused", ["lif_forward", "lif_backward", "gradient_sum"])
def test_errors_reach_the_caller(recorder, refused):
    recorder.refused = refused
    with pytest.raises(ArithmeticError, match=f"refused: asgl::{refused}"):
        step()
    recorder.refused = "nothing"
    step()
    assert recorder.kernels[-3:] == ["lif_forward_kernel", "lif_backward_settled_kernel", "gradient_sum_kernel"]


def test_several_threads(recorder):
    """Each waits for the interpreter's lock in its launches, and none for another thread."""
    all_live = threading.Barrier(4)  # the identifier of a thread that has ended may be another's

    def steps() -> None:
        all_live.wait(timeout=60)
        for _ in range(20):
            step()

    threads = [threading.Thread(target=steps) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(recorder.kernels) == 4 * 20 * 3
    assert len(recorder.threads) == 4


def test_compiled_graph_launches(recorder):
    layer = asgl_cuda.LIF(learn_width=False, analog_prob=0.0, backend="recording")
    torch.compile(layer, backend="aot_eager", fullgraph=True)(random_input(4, 8)).sum().backward()
    assert recorder.kernels == ["lif_forward_kernel", "lif_backward_settled_kernel"]
