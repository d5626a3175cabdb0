"""The PTX of the CUDA kernels gives what their source gives: the same bits, kernel by kernel, from every front end."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from comparison import assert_equals_reference, random_input, real_of, rng_state, uniform

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.extension import compilation
from asgl_cuda.selfcheck import EXACT_SURROGATES
from asgl_cuda.surrogate import SURROGATES
from tools.emulation import emulated
from tools.kernels.cuda_code import CSRC, Nvcc, run
from tools.ptx import backend as ptx

pytestmark = [pytest.mark.ptx, pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing()))]

# Others than the chosen kernels take minutes to compile.
ALL = "ptx" in os.environ.get("ASGL_TEST_BACKENDS", "").split(",")
HALF_TYPES = (torch.float16, torch.bfloat16)
STEPS = (1, 4, 5, 16, 17, 33)
INPUTS = ("plain", "normalised", "general")
# A neuron of each type whose kernels are chosen.
NEURONS = {
    dtype: {"surrogate": surrogate, "v_reset": 0.1 if reset == "hard" else None}
    for dtype, surrogate, reset in ptx.CHOSEN
}


@pytest.fixture
def with_launcher(monkeypatch, emulation) -> Iterator[Callable[..., ptx.Launcher]]:
    """Makes the backend `tried` of a launcher, and the emulation take as many neurons a thread as that does."""

    def install(machine: ptx.Machine, multiprocessors: int = emulated.TINY, *how, **options) -> ptx.Launcher:
        launcher = ptx.Launcher(machine, multiprocessors, *how, **options)
        operators = backends.Operators(**launcher.operators())
        monkeypatch.setitem(backends.BACKENDS, "tried", backends.Backend(("cpu",), operators, lambda: None))
        emulation.set_multiprocessors(multiprocessors)
        return launcher

    return install


@pytest.fixture(scope="module")
def machine() -> ptx.Machine:
    return ptx.Machine()


def results(backend: str, dtype: torch.dtype, surrogate: str, reset: str, steps: int, input: str, analog_prob: float):
    """Outputs and gradients of a call that needs the kernels for this input, and others that have four lanes or one."""
    torch.manual_seed(steps)
    real = real_of(dtype)

    def parameter(*shape: int, low: float, high: float) -> torch.Tensor:
        return uniform(*shape, low=low, high=high, dtype=real)

    x_seq = random_input(steps, 2, 6, 68, dtype=dtype)
    options = {"width": parameter(low=0.7, high=1.5), "v_reset": 0.1 if reset == "hard" else None}
    if input != "plain":
        options |= {"input_gain": parameter(6, 1, low=0.8, high=1.2), "input_bias": parameter(6, 1, low=-0.1, high=0.1)}
        options |= {"input_mean": uniform(6, 1, low=-0.1, high=0.1, dtype=real).detach()}
    if input == "general":
        options |= {
            "decay": parameter(steps, 1, 1, 1, low=0.4, high=0.9),
            "v_threshold": parameter(6, 1, low=0.8, high=1.2),
            "v_init": parameter(2, 6, 68, low=-1.0, high=1.0),
            **{"v_rest": 0.25, "scale_output": True, "return_v_last": True, "return_v_seq": True, "return_h_seq": True},
        }
    output = asgl_cuda.lif(
        x_seq, **options, surrogate=surrogate, analog_prob=analog_prob, rng_state=rng_state(), backend=backend
    )
    outputs = list(output) if input == "general" else [output]
    leaves = [x_seq, *(each for each in options.values() if isinstance(each, torch.Tensor) and each.requires_grad)]
    grads = [torch.randn(each.shape).to(each) for each in outputs]
    return (*outputs, *torch.autograd.grad(outputs, leaves, grads))


def assert_same_bits(first, second) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ptx.BACKENDS)
@pytest.mark.parametrize(("dtype", "surrogate", "reset"), ptx.CHOSEN)
def test_chosen_kernels(machine, with_launcher, name, dtype, surrogate, reset):
    with_launcher(machine, ptx.BACKENDS[name])
    for steps in STEPS:
        for input in INPUTS:
            for analog_prob in (0.0, 0.3, 1.0):
                call = dtype, surrogate, reset, steps, input, analog_prob
                assert_same_bits(results("tried", *call), results("replayed", *call))


@pytest.mark.parametrize("name", ptx.BACKENDS)
def test_sums_of_gradients(machine, with_launcher, name):
    """A value has few slots and a thread, or many and a block."""
    with_launcher(machine, ptx.BACKENDS[name])
    for shape, sizes in (((2, 300 * 512), ()), ((3, 4, 6, 68), (6, 1)), ((3, 6, 68), (6, 68)), ((2, 5, 7), (2, 1, 1))):
        for dtype in (torch.float32, torch.float64):
            found = []
            for backend in ("tried", "replayed"):
                torch.manual_seed(0)
                width, decay = (uniform(*sizes, low=0.5, high=0.9, dtype=dtype) for _ in range(2))
                x_seq = random_input(*shape, dtype=dtype)
                output = asgl_cuda.lif(x_seq, width=width, decay=decay, backend=backend, **NEURONS[dtype])
                found.append(torch.autograd.grad(output, (x_seq, width, decay), torch.randn(shape).to(output)))
            assert_same_bits(*found)


@pytest.mark.parametrize("dtype", NEURONS)
def test_batch_normalisation(machine, with_launcher, dtype):
    """There are four columns a thread, and one; channels share a tile, or have several; one has a single value."""
    with_launcher(machine)
    for shape in ((3, 2, 6, 4, 8), (3, 2, 5, 2, 3), (3, 2, 130, 1), (1, 70, 3, 600), (2, 1, 4)):
        found = []
        for backend in ("tried", "replayed"):
            torch.manual_seed(0)
            x_seq = random_input(*shape, dtype=dtype)
            weight = uniform(shape[2], low=0.5, high=1.5, dtype=real_of(dtype))
            output = asgl_cuda.batch_norm_lif(
                x_seq, weight=weight, training=True, analog_prob=0.3, rng_state=rng_state(), backend=backend,
                **NEURONS[dtype],
            )  # fmt: skip
            found.append((output, *torch.autograd.grad(output, (x_seq, weight), torch.randn(shape).to(output))))
        assert_same_bits(*found)


# ---- other compilers ----

# compute_75 has no packed conversion and no clamp, compute_120 goes through another front end of NVRTC.
ARCHITECTURES = ("compute_75", "compute_120")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "surrogate", "reset"), ptx.CHOSEN)
def test_other_architectures(machine, with_launcher, architecture, dtype, surrogate, reset):
    """By default only the kernels that differ most are compiled: of half types, and for four steps."""
    if not ALL and dtype not in HALF_TYPES:
        pytest.skip("ASGL_TEST_BACKENDS=ptx compiles all of them")
    with_launcher(machine, emulated.TINY, architecture)
    for steps in STEPS if ALL else (1, 4):
        for input in INPUTS if ALL else ("plain",):
            call = dtype, surrogate, reset, steps, input, 0.3
            assert_same_bits(results("tried", *call), results("replayed", *call))


def by_nvcc(kernel: str, architecture: str, *options: str) -> str:
    """The PTX of one kernel, as the extension is compiled."""
    nvcc = Nvcc.find()
    assert nvcc is not None
    directory = ptx.DIRECTORY / f"nvcc-{os.getpid()}"
    directory.mkdir(parents=True, exist_ok=True)
    source, target = directory / "kernel.cu", directory / "kernel.ptx"
    source.write_text(f"{ptx.jit.SOURCE}void* kernel = reinterpret_cast<void*>(&{kernel});\n")
    command = [nvcc.path, *compilation.NVCC_FLAGS, *options, f"-arch={architecture}", "-I", CSRC, "-ptx", source]
    run([*command, "-o", target])
    return target.read_text()


@pytest.mark.skipif(Nvcc.find() is None, reason="there is no nvcc on the PATH")
@pytest.mark.parametrize(("dtype", "surrogate", "reset"), ptx.CHOSEN)
def test_nvcc(machine, with_launcher, dtype, surrogate, reset):
    if not ALL and dtype != torch.bfloat16:
        pytest.skip("ASGL_TEST_BACKENDS=ptx compiles all of them")
    with_launcher(machine, compile_kernel=by_nvcc)
    for steps in STEPS if ALL else (4,):
        for input in INPUTS if ALL else ("plain",):
            call = dtype, surrogate, reset, steps, input, 0.3
            assert_same_bits(results("tried", *call), results("replayed", *call))


# ---- exp, erf, atan and the reciprocal ----


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_all_surrogates_with_the_functions_of_the_host(machine, with_launcher, surrogate, reset, dtype):
    """Nothing else differs between a device and the host than libdevice and the approximate reciprocal."""
    if not ALL and (dtype, reset) != (torch.float32, "hard"):
        pytest.skip("ASGL_TEST_BACKENDS=ptx compiles all of them")
    with_launcher(machine, options=("-DASGL_HOST_FUNCTIONS",))
    for steps in (4, 17) if ALL else (4,):
        for input in ("plain", "general") if ALL else ("plain",):
            call = dtype, surrogate, reset, steps, input, 0.3
            assert_same_bits(results("tried", *call), results("replayed", *call))


INEXACT = [surrogate for surrogate in SURROGATES if surrogate not in EXACT_SURROGATES]


@pytest.mark.parametrize("surrogate", INEXACT)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_approximations_that_are_off_by_their_bounds(with_launcher, surrogate, dtype):
    """The reciprocal of a device may be off by one last place, its power of two by two: the suite's bars hold."""
    if not ALL and dtype != torch.float32:
        pytest.skip("ASGL_TEST_BACKENDS=ptx compiles all of them")
    machine = ptx.Machine()
    with_launcher(machine)
    for machine.rcp_units, machine.ex2_units in ((0, 0), (1, 2), (1, -2), (-1, 2), (-1, -2)):
        for steps in STEPS if ALL else (4,):
            for analog_prob in (0.3, 1.0):
                assert_equals_reference(
                    random_input(steps, 5, 68, dtype=dtype), "tried", surrogate=surrogate, outputs=("s_seq",),
                    width=uniform(low=0.7, high=1.5), analog_prob=analog_prob, rng_state=rng_state(),
                )  # fmt: skip


def test_approximations_that_are_further_off_are_found(with_launcher):
    machine = ptx.Machine()
    with_launcher(machine)
    machine.rcp_units = 200
    with pytest.raises(AssertionError, match="allowed 1e-06"):
        assert_equals_reference(
            random_input(4, 5, 68), "tried", surrogate="sigmoid", outputs=("s_seq",), analog_prob=1.0,
            width=uniform(low=0.7, high=1.5), rng_state=rng_state(),
        )  # fmt: skip
