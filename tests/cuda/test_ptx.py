"""The PTX of the CUDA kernels computes the same bits as their source, kernel by kernel, from every front end."""

import os
from collections.abc import Callable
from itertools import cycle, product

import pytest
import torch
from comparison import assert_equals_reference, random_input, real_of, rng_state, uniform

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import cupy
from asgl_cuda.backends.extension import compilation
from asgl_cuda.reference.surrogates import SURROGATES
from asgl_cuda.selfcheck import EXACT_SURROGATES
from tools import ptx
from tools.emulation import emulated
from tools.kernels.cuda_code import CSRC, Nvcc, run

pytestmark = [pytest.mark.ptx, pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing()))]

# All kernels take minutes to compile.
ALL = "ptx" in os.environ.get("ASGL_TEST_BACKENDS", "").split(",")
only_all = pytest.mark.skipif(not ALL, reason="ASGL_TEST_BACKENDS=ptx compiles all of them")
HALF_TYPES = (torch.float16, torch.bfloat16)
STEPS = (1, 4, 5, 16, 17, 33)
INPUTS = ("plain", "normalised", "general")
# A neuron of each type with chosen kernels.
NEURONS = {
    dtype: {"surrogate": surrogate, "v_reset": 0.1 if reset == "hard" else None}
    for dtype, surrogate, reset in ptx.CHOSEN
}


@pytest.fixture
def with_launcher(monkeypatch, emulation) -> Callable[..., ptx.Machine]:
    """Installs a launcher as the backend `tried`; the emulation gets the same multiprocessors."""

    def install(multiprocessors: int = emulated.TINY, **options) -> ptx.Machine:
        machine = ptx.Machine()
        operators = backends.Operators(**ptx.Launcher(machine, multiprocessors, **options).operators())
        monkeypatch.setitem(backends.BACKENDS, "tried", backends.Backend(("cpu",), operators, lambda: None))
        emulation.set_multiprocessors(multiprocessors)
        return machine

    return install


def results(backend: str, dtype: torch.dtype, surrogate: str, reset: str, steps: int, input: str, analog_prob: float):
    """Outputs and gradients of a call that takes the kernels for this input."""
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


def assert_same_bits(call: Callable[..., tuple[torch.Tensor, ...]], *arguments) -> None:
    for one, other in zip(call("tried", *arguments), call("emulated", *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ptx.BACKENDS)
@pytest.mark.parametrize(("dtype", "surrogate", "reset"), ptx.CHOSEN)
def test_chosen_kernels(with_launcher, name, dtype, surrogate, reset):
    with_launcher(ptx.BACKENDS[name])
    for (steps, input), analog_prob in zip(product(STEPS, INPUTS), cycle((0.3, 0.0, 0.3, 1.0)), strict=False):
        assert_same_bits(results, dtype, surrogate, reset, steps, input, analog_prob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_gradients(with_launcher, dtype):
    """A value has few slots, summed by a thread, or many, summed by a block."""
    with_launcher()

    def gradients(backend, shape, sizes):
        torch.manual_seed(0)
        width, decay = (uniform(*sizes, low=0.5, high=0.9, dtype=dtype) for _ in range(2))
        x_seq = random_input(*shape, dtype=dtype)
        output = asgl_cuda.lif(x_seq, width=width, decay=decay, backend=backend, **NEURONS[dtype])
        return torch.autograd.grad(output, (x_seq, width, decay), torch.randn(shape).to(output))

    for shape, sizes in (((2, 300 * 512), ()), ((3, 4, 6, 68), (6, 1)), ((3, 6, 68), (6, 68)), ((2, 5, 7), (2, 1, 1))):
        assert_same_bits(gradients, shape, sizes)


@pytest.mark.parametrize("dtype", NEURONS)
def test_batch_normalisation(with_launcher, dtype):
    """Four columns a thread, and one; channels that share a tile, or span several; two values a channel."""
    with_launcher()

    def normalised(backend, *shape):
        torch.manual_seed(0)
        x_seq = random_input(*shape, dtype=dtype)
        weight = uniform(shape[2], low=0.5, high=1.5, dtype=real_of(dtype))
        output = asgl_cuda.batch_norm_lif(
            x_seq, weight=weight, training=True, analog_prob=0.3, rng_state=rng_state(), backend=backend,
            **NEURONS[dtype],
        )  # fmt: skip
        return output, *torch.autograd.grad(output, (x_seq, weight), torch.randn(shape).to(output))

    for shape in ((3, 2, 6, 4, 8), (3, 2, 5, 2, 3), (3, 2, 130, 1), (1, 70, 3, 600), (2, 1, 4)):
        assert_same_bits(normalised, *shape)


# ---- other compilers ----


def by_nvcc(kernel: str, architecture: str, *options: str) -> str:
    """The PTX of one kernel, as the extension is compiled."""
    nvcc = Nvcc.find()
    assert nvcc is not None
    directory = ptx.DIRECTORY / f"nvcc-{os.getpid()}"
    directory.mkdir(parents=True, exist_ok=True)
    source, target = directory / "kernel.cu", directory / "kernel.ptx"
    source.write_text(f"{cupy.SOURCE}void* kernel = reinterpret_cast<void*>(&{kernel});\n")
    command = [nvcc.path, *compilation.NVCC_FLAGS, *options, f"-arch={architecture}", "-I", CSRC, "-ptx", source]
    run([*command, "-o", target])
    return target.read_text()


# Options of launchers; types and steps that are compiled by default, with plain input.
COMPILERS = {
    "compute_75": ({"architecture": "compute_75"}, (torch.float16,), (1, 4)),  # no packed conversion, no clamp
    "compute_120": ({"architecture": "compute_120"}, (torch.bfloat16,), (1, 4)),  # another front end of NVRTC
    "nvcc": ({"compile_kernel": by_nvcc}, (torch.bfloat16,), (4,)),
}


@pytest.mark.parametrize(
    ("compiler", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if dtype in types else only_all, id=f"{name}, {dtype}")
        for name, (_, types, _) in COMPILERS.items()
        for dtype in NEURONS
    ],
)
def test_other_compilers(with_launcher, compiler, dtype):
    options, _, steps_by_default = COMPILERS[compiler]
    if compiler == "nvcc" and Nvcc.find() is None:
        pytest.skip("no nvcc on the PATH")
    with_launcher(**options)
    (chosen,) = (each for each in ptx.CHOSEN if each[0] == dtype and each[1] == NEURONS[dtype]["surrogate"])
    for steps, input in product(STEPS, INPUTS) if ALL else product(steps_by_default, ("plain",)):
        assert_same_bits(results, *chosen, steps, input, 0.3)


# ---- exp, erf, atan and the reciprocal ----

KINDS = [
    pytest.param(dtype, reset, marks=[] if (dtype, reset) == (torch.float32, "hard") else only_all)
    for dtype in (torch.float32, *HALF_TYPES)
    for reset in ("hard", "soft")
]


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize(("dtype", "reset"), KINDS)
def test_all_surrogates_with_the_functions_of_the_host(with_launcher, surrogate, dtype, reset):
    """Device and host differ in libdevice and the approximate reciprocal alone."""
    with_launcher(options=("-DASGL_HOST_FUNCTIONS",))
    for steps, input in product((4, 17), ("plain", "general")) if ALL else [(4, "plain")]:
        assert_same_bits(results, dtype, surrogate, reset, steps, input, 0.3)


@pytest.mark.parametrize("surrogate", [each for each in SURROGATES if each not in EXACT_SURROGATES])
@pytest.mark.parametrize(("dtype", "reset"), [each for each in KINDS if each.values[1] == "hard"])
def test_approximations_at_their_error_bounds(with_launcher, surrogate, dtype, reset):
    """The suite's tolerances hold with a device's errors: one ulp in the reciprocal, two ulps in the power of two."""
    machine = with_launcher()

    def compare(steps: int, surrogate: str) -> None:
        assert_equals_reference(
            random_input(steps, 5, 68, dtype=dtype), "tried", surrogate=surrogate, outputs=("s_seq",), analog_prob=0.7,
            width=uniform(low=0.7, high=1.5), rng_state=rng_state(),
        )  # fmt: skip

    for machine.rcp_units, machine.ex2_units in product((1, -1), (2, -2)):
        for steps in STEPS if ALL else (4,):
            compare(steps, surrogate)
    if surrogate == "sigmoid":
        machine.rcp_units = 200
        with pytest.raises(AssertionError, match="allowed"):
            compare(4, surrogate)
