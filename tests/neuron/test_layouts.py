"""Memory layouts: some are used in place, some are copied, with the same result."""

import pytest
import torch
from comparison import assert_equals_reference, random_input, rng_state, uniform

import asgl_cuda


def results(x_seq, backend, time_dim=0, **options):
    """Spikes and gradient with time first."""
    out = asgl_cuda.lif(x_seq, **options, time_dim=time_dim, backend=backend)
    weights = torch.randn(out.movedim(time_dim, 0).shape, generator=torch.Generator().manual_seed(1)).to(out)
    (dx,) = torch.autograd.grad(out, x_seq, weights.movedim(0, time_dim))
    return out.movedim(time_dim, 0), dx.movedim(time_dim, 0)


def laid_out(name, x_seq):
    """x_seq, [T, B, C, H, W], in the layout called `name`, and its time dimension."""
    x_seq = x_seq.detach()
    return {
        "time first": (x_seq.contiguous(), 0),
        "batch first": (x_seq.transpose(0, 1).contiguous(), 1),
        "channels, time": (x_seq.permute(1, 2, 0, 3, 4).contiguous(), 2),
        "time last": (x_seq.permute(1, 2, 3, 4, 0).contiguous(), -1),
        "transposed": (x_seq.transpose(0, 1).contiguous().transpose(0, 1), 0),
        "reversed": (x_seq.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0), 0),
        "sliced": (torch.cat([x_seq, x_seq], dim=-1)[..., : x_seq.shape[-1]], 0),
        "every second step": (x_seq.repeat_interleave(2, dim=0)[::2], 0),
        "channels last": (x_seq.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3), 0),
        "channels last, batch first": (x_seq.permute(1, 0, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3), 1),
        "expanded": (x_seq[:, :1].expand(x_seq.shape), 0),
    }[name]


LAYOUTS = ("time first", "batch first", "channels, time", "time last", "transposed", "reversed", "sliced",
           "every second step", "channels last", "channels last, batch first", "expanded")  # fmt: skip
IN_PLACE = ("time first", "batch first", "channels, time", "time last", "channels last", "channels last, batch first")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(18, 3, 5, 4, 7), (4, 1, 1, 1, 1), (5, 2, 1, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_does_not_show(backend, device, layout, sizes, dtype):
    x_seq = random_input(*sizes, dtype=dtype, device=device).detach()
    if layout == "expanded":
        x_seq = x_seq[:, :1].expand(x_seq.shape)
    view, time_dim = laid_out(layout, x_seq)
    expected = results(x_seq.contiguous().requires_grad_(), "reference")
    actual = results(view.requires_grad_(), backend, time_dim)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tensors_in_each_layout(backend, device, layout):
    x_seq, time_dim = laid_out(layout, random_input(18, 3, 5, 4, 7, device=device))
    # As x_seq, with 1 for time and batch.
    shape = {2: (1, 5, 1, 4, 7), -1: (1, 5, 4, 7, 1)}.get(time_dim, (1, 1, 5, 4, 7))
    v_init_shape = [size for dim, size in enumerate(x_seq.shape) if dim != time_dim % 5]
    assert_equals_reference(
        x_seq.requires_grad_(), backend, width=uniform(*shape, low=0.5, high=1.5, device=device),
        decay=uniform(low=0.4, high=0.9, device=device), v_init=uniform(*v_init_shape, low=-1, high=1, device=device),
        analog_prob=0.3, rng_state=rng_state(device=device), time_dim=time_dim,
    )  # fmt: skip


@pytest.mark.parametrize("layout", IN_PLACE)
def test_layouts_used_without_a_copy(backend, device, layout):
    """The tensor saved for backward is x_seq itself; the output has the input's layout."""
    x_seq, time_dim = laid_out(layout, random_input(4, 3, 5, 4, 7, device=device))
    x_seq.requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = asgl_cuda.lif(
            x_seq, time_dim=time_dim, return_v_last=True, return_v_seq=True, return_h_seq=True, backend=backend
        )
    assert x_seq.data_ptr() in saved
    assert out.s_seq.stride() == out.v_seq.stride() == out.h_seq.stride() == x_seq.stride()
    (dx,) = torch.autograd.grad(out.s_seq.sum(), x_seq)
    assert dx.stride() == x_seq.stride()


@pytest.mark.parametrize(
    ("sizes", "time_dim", "parameters"),
    [
        ((5, 2, 6, 20, 20), 0, {"input_gain": (6, 1, 1), "input_bias": (6, 1, 1), "width": ()}),
        ((5, 2, 6, 20, 20), 0, {"input_gain": (6, 1, 1), "input_mean": (20, 20)}),
        ((5, 2, 6, 20, 20), 0, {"input_bias": (20,), "input_mean": (6, 20, 1)}),
        ((4, 5, 700), 1, {"width": (), "decay": (700,)}),
        ((4, 5, 700), 1, {"width": ()}),
    ],
    ids=["channels", "unlike parameters", "unlike parameters in turns", "runs with parameters", "runs"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_cross_the_edges_of_tiles(backend, device, sizes, time_dim, parameters, dtype):
    """Channels of 400 and runs of 700 neurons straddle tiles of 1024 neurons (CPU), 128 or 512 (GPU)."""
    options = {name: uniform(*shape, low=0.5, high=1.0, device=device) for name, shape in parameters.items()}
    x_seq = random_input(*sizes, dtype=dtype, device=device)
    assert_equals_reference(x_seq, backend, outputs=("s_seq",), time_dim=time_dim, **options)


def test_one_dimension_is_one_neuron(backend, device):
    x_seq = random_input(33, device=device)
    assert_equals_reference(
        x_seq, backend, width=uniform(low=0.5, high=1.5, device=device), v_init=uniform(low=-1, high=1, device=device),
        analog_prob=0.5, rng_state=rng_state(device=device),
    )  # fmt: skip


def test_inputs_are_left_alone(backend, device):
    x_seq = random_input(18, 31, device=device)
    tensors = {
        "width": uniform(31, low=0.5, high=1.5, device=device),
        "v_init": uniform(31, low=-1, high=1, device=device),
        "rng_state": rng_state(device=device),
    }
    before = {name: tensor.detach().clone() for name, tensor in {**tensors, "x_seq": x_seq}.items()}
    asgl_cuda.lif(x_seq, **tensors, analog_prob=0.3, backend=backend).sum().backward()
    for name, tensor in {**tensors, "x_seq": x_seq}.items():
        assert torch.equal(tensor, before[name])


def test_outputs_are_no_views(backend, device):
    """Views made in an autograd function could be neither changed nor detached in place."""
    x_seq = torch.randn(3, 2, 4, 5, 6, device=device).movedim(-1, 2).requires_grad_()  # channels_last
    for x in (x_seq, x_seq.contiguous()):
        output = asgl_cuda.lif(x, return_v_last=True, return_v_seq=True, return_h_seq=True, backend=backend)
        assert not any(tensor._is_view() for tensor in output)
        output.v_last.detach_()
        output.s_seq.mul_(2)
