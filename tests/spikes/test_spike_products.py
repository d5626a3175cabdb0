"""Products of spikes: values, gradients, bits and what they are given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spike_cases import CASES, LAST, Case
from torch.nn import functional

import asgl_cuda
from asgl_cuda.spikes import functional as products

pytestmark = pytest.mark.skipif("cpu" not in asgl_cuda.available_backends(), reason="no compiled extension")


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def with_gradients(function, *inputs):
    inputs = [each.detach().requires_grad_() for each in inputs]
    result = function(*inputs)
    torch.manual_seed(3)
    grad = torch.randn(result.shape, dtype=torch.float64).to(result.dtype)
    return result.detach(), *torch.autograd.grad(result, inputs, grad)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_torch_in_float64(case, dtype, values):
    """To some roundings of a sum of thousands of elements."""
    torch.manual_seed(0)
    inputs = case.spikes(dtype=dtype, values=values), *case.parameters(dtype)
    found = with_gradients(case.ours, *inputs)
    expected = with_gradients(case.torchs, *(each.double() for each in inputs))
    allowed = 2e-5 if dtype == torch.float32 else 1e-13
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() <= allowed * theirs.abs().max()
    assert found[0].stride() == case.torchs(*inputs).stride()


def test_random_layers():
    torch.manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high + 1, ()))

    for _ in range(150):
        kernel = (draw(1, 7), draw(1, 7)) if draw(0, 2) else None
        sizes = (draw(1, 4), draw(1, 70), draw(7, 15), draw(7, 15)) if kernel else (draw(1, 300), draw(1, 400))
        padding = draw(0, 4) if kernel else 0
        drawn = Case(sizes, draw(1, 200), kernel, draw(1, 3), padding, LAST if draw(0, 1) else torch.contiguous_format)
        inputs = drawn.spikes(draw(0, 10) / 10, values=bool(draw(0, 1))), *drawn.parameters()
        expected = with_gradients(drawn.torchs, *(each.double() for each in inputs))
        for ours, theirs in zip(with_gradients(drawn.ours, *inputs), expected, strict=True):
            assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp_min(1e-30), drawn


@pytest.mark.parametrize("stride", [9, 2**20, 2**28, 2**31])
def test_strides_beyond_the_image(stride):
    """Each image gives one pixel; a product of such strides has no place in 64 bits."""
    x = (torch.rand(2, 8, 5, 5, dtype=torch.float64) < 0.3).double()
    weight = torch.randn(4, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    results = [each(x, weight, None, stride) for each in (asgl_cuda.spike_conv2d, functional.conv2d)]
    grads = [torch.autograd.grad(each.square().sum(), weight)[0] for each in results]
    torch.testing.assert_close((results[0], grads[0]), (results[1], grads[1]))


@pytest.mark.parametrize("values", [False, True])
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(case, values):
    torch.manual_seed(0)
    x, (weight, bias) = case.spikes(values=values), case.parameters()
    together = case.ours(x, weight, bias)
    for alone, row in zip(x, together, strict=True):
        assert torch.equal(case.ours(alone, weight, bias), row)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_bits(case, threads):
    torch.manual_seed(0)
    inputs = case.spikes(values=True), *case.parameters()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradients(case.ours, *inputs)
        torch.set_num_threads(threads)
        several = with_gradients(case.ours, *inputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], several[0])
    assert torch.equal(one[2], several[2])  # of the weight; the others are torch's


def test_layouts_and_padded_zeros_change_no_bits():
    """Nor do zeros beside the spikes, as in a wider layer or a padded image."""
    torch.manual_seed(0)
    case = CASES["3 x 3, last"]
    x, (weight, bias) = case.spikes(values=True), case.parameters()
    result = case.ours(x, weight, bias)
    assert torch.equal(case.ours(x.contiguous(), weight, bias), result)
    assert torch.equal(case.ours(x, weight.contiguous(memory_format=LAST), bias), result)
    assert torch.equal(asgl_cuda.spike_conv2d(functional.pad(x, [1] * 4), weight, bias), result)
    rows, weight = CASES["odd"].spikes(values=True), CASES["odd"].parameters()[0]
    assert torch.equal(
        asgl_cuda.spike_linear(functional.pad(rows, [3, 40]), functional.pad(weight, [3, 40])),
        asgl_cuda.spike_linear(rows, weight),
    )


DIGEST = """
import hashlib, torch
from spike_cases import CASES
from asgl_cuda.spikes import functional
for case in CASES.values():
    torch.manual_seed(0)
    for values in (False, True):
        x, (weight, bias) = case.spikes(values=values), case.parameters()
        weight.requires_grad_()
        result = case.ours(x, weight, bias)
        grad, = torch.autograd.grad(result, weight, torch.ones_like(result) / 3)
        print(hashlib.sha256(result.detach().contiguous().numpy().tobytes() + grad.numpy().tobytes()).hexdigest())
"""


def test_instruction_sets_with_fma_change_no_bits():
    from asgl_cuda.backends import extension

    if extension.module.cpu_instruction_set() != "AVX-512":
        pytest.skip("the processor has one of the two")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())])
    found = [
        subprocess.run(
            [sys.executable, "-c", DIGEST], check=True, capture_output=True, text=True,
            env={**os.environ, "ASGL_CUDA_INSTRUCTION_SET": name, "PYTHONPATH": paths},
        ).stdout
        for name in ("avx2", "avx512")
    ]  # fmt: skip
    assert found[0] == found[1] != ""


@pytest.mark.parametrize("name", ["odd", "3 x 3", "stride", "5 x 2"])
def test_gradcheck(name):
    torch.manual_seed(0)
    case = CASES[name]
    inputs = case.spikes(0.5, torch.float64, values=True), *case.parameters(torch.float64)
    assert torch.autograd.gradcheck(case.ours, [each.requires_grad_() for each in inputs], fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("name", ["odd", "3 x 3, last"])
def test_gradients_that_are_asked_for(name, wanted):
    torch.manual_seed(0)
    case = CASES[name]
    inputs = [case.spikes(), *case.parameters()]
    all_of_them = with_gradients(case.ours, *inputs)[1:]
    for index in wanted:
        inputs[index].requires_grad_()
    result = case.ours(*inputs)
    torch.manual_seed(3)
    grads = torch.autograd.grad(
        result, [inputs[index] for index in wanted], torch.randn(result.shape, dtype=torch.float64).float()
    )
    for index, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, all_of_them[index], rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_are_summed_and_weights_behind_zeros_are_not():
    x = torch.tensor([[0.0, 1.0, 2.0], [float("nan"), 0.0, 1.0], [0.0, float("inf"), -0.0]])
    weight = torch.tensor([[float("nan"), 1.0, 2.0], [1.0, -1.0, float("inf")]])
    result = asgl_cuda.spike_linear(x, weight)
    expected = torch.tensor([[5.0, float("inf")], [float("nan")] * 2, [float("inf"), -float("inf")]])
    torch.testing.assert_close(result, expected, equal_nan=True)
    image = torch.zeros(1, 2, 4, 4)
    image[0, 1, 0, 0] = float("inf")
    kernel = torch.ones(3, 2, 3, 3, requires_grad=True)
    ours = asgl_cuda.spike_conv2d(image, kernel, padding=1)
    assert ours.isinf().sum() == 3 * 4
    (grad,) = torch.autograd.grad(ours, kernel, torch.ones_like(ours))
    assert not grad.isnan().any()  # the border is not multiplied by infinity
    assert grad.isinf().sum() == 3 * 4


def test_subnormals_are_no_zeros():
    """Lists are by bits, whether or not the processor flushes subnormals."""
    x = torch.full((3, 40), 1e-40)
    weight = torch.full((2, 40), 1e30)
    expected = asgl_cuda.spike_linear(x, weight)
    assert (expected > 0).all()
    if torch.set_flush_denormal(True):
        try:
            assert asgl_cuda.spike_linear(x, weight).shape == (3, 2)
            packed = products._pack_spikes(functional.pad(x, [0, 24]), (2, 64), (), ())
        finally:
            torch.set_flush_denormal(False)
        assert packed.nbytes == 3 * 8 + x.nbytes


@pytest.mark.parametrize(
    ("x", "weight"),
    [((0, 3), (4, 3)), ((2, 0), (4, 0)), ((2, 3), (0, 3)), ((0, 2, 5, 5), (4, 2, 3, 3))],
)
def test_empty(x, weight):
    inputs = torch.rand(x), torch.rand(weight), torch.rand(weight[0])
    case = Case(x, weight[0], None if len(x) == 2 else (3, 3))
    for ours, theirs in zip(with_gradients(case.ours, *inputs), with_gradients(case.torchs, *inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_a_single_row():
    torch.manual_seed(0)
    inputs = (torch.rand(60) < 0.3).float(), torch.randn(20, 60), torch.randn(20)
    for ours, theirs in zip(
        with_gradients(asgl_cuda.spike_linear, *inputs), with_gradients(functional.linear, *inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_strided_inputs():
    torch.manual_seed(0)
    base = (torch.rand(40, 60) < 0.3).float()
    weight = torch.randn(20, 60)
    for x, w in [
        (base[::2, 1::2], weight[:, ::2]),
        (base.t(), torch.randn(40, 20).t()),
        (base[:1].expand(7, 60), weight),
        (torch._neg_view(base), weight),
        (base, weight.expand(20, 60)[::3]),
    ]:
        for ours, theirs in zip(
            with_gradients(asgl_cuda.spike_linear, x, w), with_gradients(functional.linear, x, w), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 63, 64, 65, 20000])
def test_packed_spikes(length, values):
    """A bit an element, where all spikes are 1, from which the products are those of the spikes."""
    torch.manual_seed(0)
    x, weight, grad = Case((1, length), 1).spikes(0.1, values=values), torch.randn(3, length), torch.randn(1, 3)
    packed = products._pack_spikes(x, weight.shape, (), ())
    assert packed.nbytes == -(-length // 64) * 8 + (4 * int(x.count_nonzero()) if values else 0)
    product, gradient = torch.ops.asgl_cuda.spike_product, torch.ops.asgl_cuda.spike_weight_gradient
    unread = torch.full_like(x, torch.nan)
    rest = weight, None, None, [], []
    assert torch.equal(product(unread, *rest, packed), product(x, *rest, None))
    rest = weight.shape, [], [], False
    assert torch.equal(gradient(grad, unread, *rest, packed), gradient(grad, x, *rest, None))
    for wrong in (packed[:-8], torch.cat([packed, packed[:8]]), packed.float()):
        with pytest.raises(ValueError, match="packed must be the result of pack_spikes for x"):
            product(unread, weight, None, None, [], [], wrong)


def test_a_changed_input_does_not_change_gradients():
    x, weight = (torch.rand(5, 100) < 0.2).float(), torch.randn(3, 100, requires_grad=True)
    expected = x.sum(0).expand(3, 100).clone()
    result = asgl_cuda.spike_linear(x, weight)
    x.zero_()
    assert torch.equal(torch.autograd.grad(result.sum(), weight)[0], expected)


def test_others_are_torchs():
    torch.manual_seed(0)
    x, weight = (torch.rand(2, 4, 6, 6) < 0.3).float(), torch.randn(6, 4, 3, 3)
    for options in ({"dilation": 2}, {"groups": 2, "padding": 1}):
        kernel = weight[:, : 4 // options.get("groups", 1)]
        assert torch.equal(asgl_cuda.spike_conv2d(x, kernel, **options), functional.conv2d(x, kernel, **options))
    half = x.bfloat16(), weight.bfloat16()
    assert torch.equal(asgl_cuda.spike_conv2d(*half), functional.conv2d(*half))
    rows = x.flatten(1)
    matrix = torch.randn(5, 144)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = asgl_cuda.spike_linear(rows, matrix), functional.linear(rows, matrix)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    meta = asgl_cuda.spike_linear(rows.to("meta"), matrix.to("meta"))
    assert meta.shape == (2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: asgl_cuda.spike_linear(x, torch.rand(3, 5)), r"spike_linear: the input must have shape \[..., 5\]"),
        (
            lambda x: asgl_cuda.spike_conv2d(x, torch.rand(3, 5, 3, 3)),
            r"spike_conv2d: the input must have shape \[N, 5, H, W\] or \[5, H, W\], got \[2, 4\]",
        ),
        (
            lambda x: asgl_cuda.spike_linear(x, torch.rand(3, 4), torch.rand(2)),
            r"spike_linear: bias must have shape \[3\], got \[2\]",
        ),
        (
            lambda x: asgl_cuda.spike_conv2d(x.reshape(2, 4, 1, 1), torch.rand(3, 4, 1, 1), torch.rand(2)),
            r"spike_conv2d: bias must have shape \[3\], got \[2\]",
        ),
        (
            lambda x: asgl_cuda.spike_conv2d(x.reshape(2, 4, 1, 1), torch.rand(3, 4, 3, 3)),
            "the kernel is larger than the image",
        ),
        *(
            (
                lambda x, options=options: asgl_cuda.spike_conv2d(
                    x.reshape(2, 4, 1, 1), torch.rand(3, 4, 3, 3), **options
                ),
                "padding must be numbers, 'valid' or, with stride 1, 'same', got",
            )
            for options in (
                {"padding": "full"},
                {"padding": "same", "stride": 2},
                {"padding": "same", "stride": (1, 2)},
            )
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda given: asgl_cuda.spike_linear(given, torch.rand(3, 4)),
        lambda given: asgl_cuda.spike_linear(torch.rand(2, 4), given),
        lambda given: asgl_cuda.spike_linear(torch.rand(2, 4), torch.rand(3, 4), given or [0.0]),
        lambda given: asgl_cuda.spike_conv2d(given, torch.rand(3, 4, 1, 1)),
        lambda given: asgl_cuda.spike_conv2d(torch.rand(2, 4, 1, 1), given),
        lambda given: asgl_cuda.SpikeLinear(4, 3)(given),
        lambda given: asgl_cuda.SpikeConv1d(4, 3, 1)(given),
        lambda given: asgl_cuda.SpikeConv2d(4, 3, 1, groups=1, dilation=2)(given),
    ],
)
@pytest.mark.parametrize("given", ["x", None, [[1.0] * 4]], ids=str)
def test_what_is_no_tensor(call, given):
    with pytest.raises(TypeError, match=r"asgl_cuda\..* (input|weight|bias) must be a tensor, got (str|NoneType|list)"):
        call(given)


def test_operands_of_other_types():
    with pytest.raises(
        TypeError, match=r"spike_linear: input must have the dtype of weight, torch\.float32, got torch\.int64"
    ):
        asgl_cuda.spike_linear(torch.ones(2, 4, dtype=torch.int64), torch.rand(3, 4))
    with pytest.raises(
        TypeError, match=r"bias must have the dtype and device of input, torch\.float32 on cpu, got torch\.float64"
    ):
        asgl_cuda.spike_linear(torch.rand(2, 4), torch.rand(3, 4), torch.rand(3).double())


def test_second_derivatives_and_forward_mode():
    x, weight = torch.rand(3, 4), torch.rand(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(asgl_cuda.spike_linear(x, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        grad.sum().backward()
    _, tangent = torch.func.jvp(lambda w: asgl_cuda.spike_linear(x, w), (weight.detach(),), (torch.ones(2, 4),))
    torch.testing.assert_close(tangent, x.sum(1, keepdim=True).expand(3, 2))


def test_operators():
    torch.manual_seed(0)
    for name in ("odd", "stride"):
        case = CASES[name]
        x, (weight, bias) = case.spikes(), case.parameters()
        spatial = ([case.stride] * 2, [case.padding] * 2) if case.kernel else ([], [])
        tensors = [each.requires_grad_() for each in (x, weight, bias)]
        torch.library.opcheck(torch.ops.asgl_cuda.spike_product.default, (*tensors, None, *spatial, None))
        grad = torch.randn_like(case.torchs(x, weight)).detach()
        arguments = grad, x.detach(), list(weight.shape), *spatial, False, None
        torch.library.opcheck(torch.ops.asgl_cuda.spike_weight_gradient.default, arguments)
