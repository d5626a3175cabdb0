"""The backends under test, and the fixtures of every test."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config

import asgl_cuda
from asgl_cuda.selfcheck import EXACT_SURROGATES
from tools import host_compiler, ptx
from tools.emulation import emulated

# A cached graph would be run although an operator has changed since.
torch._inductor.config.force_disable_caches = True

# Read at the first matrix product on a GPU, where deterministic algorithms need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# ASGL_TEST_BACKENDS lists the backends to test, with commas; by default, available ones and the emulations.
WANTED = os.environ.get("ASGL_TEST_BACKENDS")
_WANTED_NAMES = () if WANTED is None else tuple(WANTED.split(","))
EMULATION = PTX_MACHINE = None
if WANTED is None or {"emulated", "ptx"} & set(_WANTED_NAMES):  # PTX is compared with it
    if host_compiler.compiler() is None:
        print("asgl_cuda: no C++ compiler, so the CUDA kernels are not tested by emulation")
    else:
        EMULATION = emulated.register()

SEED = int(os.environ.get("ASGL_TEST_SEED", "0"))  # no test may depend on it

# PTX takes long to compile: by default only one of its backends is tested, only in PTX_FILES, on chosen kernels.
if WANTED is None or "ptx" in _WANTED_NAMES:
    if ptx.missing() is not None:
        print(f"asgl_cuda: {ptx.missing()}, so the PTX of the CUDA kernels is not tested")
    else:
        PTX_MACHINE = ptx.Machine()
        others = EMULATION if WANTED is None else None  # runs the other kernels
        for each, multiprocessors in ptx.BACKENDS.items():
            ptx.register(each, ptx.Launcher(PTX_MACHINE, multiprocessors, emulation=others))
# Of a question to a feature, one case of each type; the others are slow.
PTX_FILES = {f"test_{name}.py" for name in ("features", "properties", "gradients", "multi_spike")}

# Each is compared with the reference by the whole suite.
FUSED_BACKENDS = [
    name
    for name in asgl_cuda.available_backends()
    if name != "reference" and (WANTED is None or name in _WANTED_NAMES or (name in ptx.BACKENDS and PTX_MACHINE))
]


def _surrogate_of(item: pytest.Item, params: dict[str, Any]) -> str | None:
    """Of questions to all features only the cases run as PTX, which reach every kernel."""
    if item.path.name == "test_features.py":
        return getattr(params.get("case"), "surrogate", None)
    return str(params.get("surrogate", "rectangle"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of a backend against the reference, so that no other test reruns for each GPU backend."""
    kept, left_out, questions = [], [], set()
    for item in items:
        callspec = getattr(item, "callspec", None)
        params = {} if callspec is None else callspec.params
        runs = True
        if params.get("backend") in FUSED_BACKENDS:
            item.add_marker("backend")
        if params.get("backend") == "emulated" and item.get_closest_marker("traced"):
            item.add_marker("slow")
        if params.get("backend") in ptx.BACKENDS:
            item.add_marker("ptx")
            runs = WANTED is not None or (
                params["backend"] == "ptx"
                and item.path.name in PTX_FILES
                and _surrogate_of(item, params) in EXACT_SURROGATES
            )
            if runs and "case" in params:
                question = item.name.removesuffix(f"{params['case']}]"), params["case"].dtype
                if question in questions:
                    item.add_marker("slow")
                questions.add(question)
        (kept if runs else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(params=FUSED_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device that the backend under test works on."""
    return torch.device(asgl_cuda.backends.BACKENDS[backend].device_types[0])


@pytest.fixture(scope="session")
def compiler() -> list[str]:
    """The host's C++ compiler."""
    command = host_compiler.compiler()
    if command is None:
        pytest.skip(f"no C++ compiler: {host_compiler.command()[0]} is not on PATH, and CXX names the one to use")
    return command


@pytest.fixture(autouse=True)
def outputs_filled_with_nan() -> Iterator[None]:
    """Uninitialised memory is filled with NaN, so that an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(SEED)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def emulation() -> Iterator[emulated.Emulation]:
    """The emulated device, restored after the test."""
    if EMULATION is None:
        pytest.skip("no emulation")
    EMULATION.take_launches()
    yield EMULATION
    EMULATION.set_multiprocessors(emulated.TINY)
