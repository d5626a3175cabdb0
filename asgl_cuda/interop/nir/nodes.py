"""Nodes of NIR for `from_nir`: of known kinds, with tensors for arrays, checked before layers are made."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import shown
from .values import as_double, as_sizes, check_dt, first_line, require

KEY = "asgl_cuda"  # key in a node's metadata, of properties without equivalent in NIR
_NEURONS: dict[str, tuple[str, ...]] = {
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "IF": ("r", "v_threshold", "v_reset"),
    "CubaLIF": ("tau_syn", "tau_mem", "r", "v_leak", "v_threshold", "v_reset", "w_in"),
    "LI": ("tau", "r", "v_leak"),
    "I": ("r",),
    "CubaLI": ("tau_syn", "tau_mem", "r", "v_leak", "w_in"),
}
_ARRAYS = {
    **_NEURONS,
    "Affine": ("weight", "bias"),
    "Linear": ("weight",),
    "Conv1d": ("weight", "bias"),
    "Conv2d": ("weight", "bias"),
    "AvgPool2d": (),
    "SumPool2d": (),
    "Flatten": (),
    "Scale": ("scale",),
    "Threshold": ("threshold",),
    "Delay": ("delay",),
}
_WEIGHTS = ("Affine", "Linear", "Conv1d", "Conv2d", "Scale")
_ELEMENTWISE = (*_NEURONS, "Scale", "Threshold", "Delay")
_OPTIONAL = ("v_reset",)  # missing in older files, then 0
_ENDS = ("start_dim", "end_dim")
_DIMS = {"Conv1d": 1, "Conv2d": 2, "AvgPool2d": 2, "SumPool2d": 2}

Shape = tuple[int, ...]


def checked_node(node: Any, where: str, dtype: torch.dtype) -> Any:
    """A copy with tensors for arrays, ints for sizes and a dict of metadata; weights must be finite in `dtype`."""
    kind = type(node).__name__
    if kind in ("Input", "Output"):
        return node
    if kind not in _ARRAYS:
        raise ValueError(f"{where} can't be represented; what can be: {', '.join(_ARRAYS)}")
    node = copy.copy(node)
    node.metadata = _metadata(node, where)
    for name in _ARRAYS[kind]:
        value = getattr(node, name, None)
        if value is not None or name not in _OPTIONAL:
            setattr(node, name, as_real(name, value, where, dtype if kind in _WEIGHTS else torch.float64))
    if kind in _NEURONS:
        _check_alike(node, where)
    elif kind in ("Affine", "Linear"):
        _check_shape("weight", node.weight, "[outputs, inputs]", 2, where)
        _check_bias(node, where)
    elif kind == "Flatten":
        node.start_dim, node.end_dim = (_whole(name, getattr(node, name, None), where) for name in _ENDS)
    elif kind in _DIMS:
        _check_window(node, _DIMS[kind], where)
    return node


def as_real(name: str, value: Any, where: str, dtype: torch.dtype) -> Tensor:
    """The array as a floating tensor, real, not empty and finite in `dtype`."""
    np = require("numpy", "asgl_cuda.from_nir")
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value.resolve_conj().resolve_neg()).numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {name} must be an array of real numbers, got {first_line(error)}") from error
    if array.dtype.kind not in "fiu":
        got = "None" if value is None else f"an array of {array.dtype}" if array.ndim else f"{array.dtype}"
        raise ValueError(f"{where}: {name} must be an array of real numbers, got {got}")
    if not array.size:
        raise ValueError(f"{where}: {name} must not be empty, got shape {list(array.shape)}")
    kept = array.dtype.kind == "f" and array.dtype.itemsize in (2, 4, 8)
    # torch takes neither foreign byte orders nor negative strides.
    result = torch.from_numpy(np.array(array, array.dtype.newbyteorder("=") if kept else np.float64, order="C"))
    if not (finite := result.to(dtype).isfinite()).all():
        raise ValueError(f"{where}: {name} must be finite in {dtype}, got {result[~finite][0].item()}")
    return result


def sequence_of_ints(value: Any) -> list[int] | None:
    """A list of ints, else None; files give arrays."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    return list(value) if all(isinstance(each, int) and not isinstance(each, bool) for each in value) else None


def _metadata(node: Any, where: str) -> dict[str, Any]:
    """The node's metadata under KEY, in the types that `to_nir` writes."""
    metadata = getattr(node, "metadata", None)
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ValueError(f"{where}: metadata must be a dict, got {type(metadata).__name__}")
    ours = metadata.get(KEY)
    if ours is None or type(node).__name__ not in ("LIF", "IF", "LI", "I", "Delay"):
        return {}
    where = f"{where}: metadata[{KEY!r}]"
    if not isinstance(ours, Mapping):
        raise ValueError(f"{where} must be a dict, got {type(ours).__name__}")
    for name, kind in (("options", Mapping), ("parameters", Mapping)):
        if not isinstance(ours.get(name, {}), kind):
            raise ValueError(f"{where}[{name!r}] must be a dict, got {type(ours[name]).__name__}")
    found = dict(ours)
    try:
        found["dt"] = check_dt(_as_python(ours.get("dt")), where)
    except TypeError as error:
        raise ValueError(str(error)) from error
    found["options"] = {str(name): _as_python(value) for name, value in ours.get("options", {}).items()}
    features = sequence_of_ints(ours.get("num_features"))
    if features is None:
        raise ValueError(f"{where}['num_features'] must be a sequence of ints, got {shown(ours.get('num_features'))}")
    found["num_features"] = features
    found["parameters"] = {
        str(name): as_real(f"parameters[{name!r}]", value, where, torch.float32)
        for name, value in ours.get("parameters", {}).items()
    }
    return {KEY: found}


def _check_alike(node: Any, where: str) -> None:
    """Requires one shape of all arrays, except single elements."""
    shapes = {name: list(value.shape) for name in _NEURONS[type(node).__name__]
              if isinstance(value := getattr(node, name, None), Tensor)}  # fmt: skip
    if len({tuple(shape) for shape in shapes.values() if math.prod(shape) != 1}) > 1:
        said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{where}: all its arrays must have one shape, got {said}")


def _check_shape(name: str, value: Tensor, expected: str, dims: int, where: str) -> None:
    if value.dim() != dims:
        raise ValueError(f"{where}: {name} must have shape {expected}, got {list(value.shape)}")


def _check_bias(node: Any, where: str) -> None:
    outputs, bias = node.weight.shape[0], getattr(node, "bias", None)
    if bias is not None and list(bias.shape) != [outputs]:
        raise ValueError(f"{where}: bias must have shape {[outputs]} as its weight says, got {list(bias.shape)}")


def _check_window(node: Any, dims: int, where: str) -> None:
    """For convolution and pooling; sizes become tuples."""
    convolves = hasattr(node, "weight")
    if convolves:
        _check_shape("weight", node.weight, f"[outputs, inputs{', size' * dims}]", 2 + dims, where)
        _check_bias(node, where)
        node.groups = _whole("groups", node.groups, where)
        if node.groups < 1 or node.weight.shape[0] % node.groups:
            raise ValueError(f"{where}: groups must divide its {node.weight.shape[0]} outputs, got {node.groups}")
        kernel = tuple(node.weight.shape[2:])
        node.dilation = _sizes("dilation", node.dilation, 1, dims, where)
    else:
        node.kernel_size = kernel = _sizes("kernel_size", node.kernel_size, 1, dims, where)
    node.stride = _sizes("stride", node.stride, 1, dims, where)
    if isinstance(node.padding, bytes):
        node.padding = node.padding.decode(errors="replace")
    if convolves and isinstance(node.padding, str):
        if node.padding not in ("same", "valid"):
            raise ValueError(f"{where}: padding must be 'same', 'valid' or sizes, got {shown(node.padding)}")
        if node.padding == "same" and max(node.stride) > 1:
            raise ValueError(f"{where}: padding 'same' needs stride 1, got {list(node.stride)}")
        return
    node.padding = _sizes("padding", node.padding, 0, dims, where)
    if not convolves and any(2 * pad > size for pad, size in zip(node.padding, kernel, strict=True)):
        raise ValueError(
            f"{where}: padding must be at most half of kernel_size, got {list(node.padding)} for {list(kernel)}"
        )


def _sizes(name: str, value: Any, least: int, dims: int, where: str) -> Shape:
    """A size per dimension; a single one is repeated."""
    try:
        numbers = as_double(value).reshape(-1)
        sizes = as_sizes(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        numbers, sizes = torch.zeros(0), ()
    sizes = sizes * dims if len(sizes) == 1 else sizes
    if len(sizes) != dims or min(sizes) < least or not (numbers == numbers.round()).all():
        counted = "a whole number" if dims == 1 else f"one or {dims} whole numbers"
        raise ValueError(f"{where}: {name} must be {counted}, at least {least}, got {shown(value)}")
    return sizes


def _as_python(value: Any) -> Any:
    """A number as a Python type, since files give numpy's."""
    return value.item() if getattr(value, "size", 0) == 1 else value


def _whole(name: str, value: Any, where: str) -> int:
    number = _as_python(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{where}: {name} must be a whole number, got {shown(value)}")
    return number


def shape_after(node: Any, shape: Shape | None, where: str) -> Shape | None:
    """The output's shape for an input of `shape`, None if unknown; raises if the node can't take `shape`."""
    kind = type(node).__name__
    if kind in _ELEMENTWISE:
        return _shape_after_elementwise(node, shape, where)
    if kind in ("Affine", "Linear"):
        outputs, inputs = node.weight.shape
        if shape is not None and (not shape or shape[-1] != inputs):
            raise ValueError(f"{where}: its weight takes {inputs} neurons, got shape {list(shape)}")
        return (outputs,) if shape is None else (*shape[:-1], outputs)
    if kind == "Flatten":
        return _shape_after_flatten(node, shape, where)
    if shape is None:
        return None
    return _shape_after_window(node, shape, where) if kind in _DIMS else shape


def _shape_after_elementwise(node: Any, shape: Shape | None, where: str) -> Shape | None:
    arrays = [getattr(node, name, None) for name in _ARRAYS[type(node).__name__]]
    own = max((tuple(value.shape) for value in arrays if isinstance(value, Tensor)), key=math.prod)
    if shape is None:
        return None if 1 in own or not own else own
    # A single value is broadcast; for neurons also one per channel, as in some exporters.
    by_channel = len(own) == 1 and type(node).__name__ in _NEURONS and shape[:1] == own
    alike = len(own) == len(shape) and all(a in (1, b) for a, b in zip(own, shape, strict=True))
    if math.prod(own) == 1 or by_channel or alike:
        return shape
    raise ValueError(f"{where}: its arrays are for neurons of shape {list(own)}, got {list(shape)}")


def _shape_after_flatten(node: Any, shape: Shape | None, where: str) -> Shape | None:
    start, end = node.start_dim, node.end_dim
    if start > end and (start < 0) == (end < 0):
        raise ValueError(f"{where}: start_dim must not be after end_dim, got {start} and {end}")
    declared = sequence_of_ints((getattr(node, "input_type", None) or {}).get("input"))
    if shape is None and declared is None and (start < 0 or end < -1):
        raise ValueError(
            f"{where}: start_dim {start} and end_dim {end} must be counted from the front, since nothing says how many "
            "dimensions there are"
        )
    if shape is None and (declared is None or (start >= 0 and end >= -1)):
        return None
    dims = len(declared or () if shape is None else shape)
    if not dims or not (-dims <= start < dims and -dims <= end < dims and start % dims <= end % dims):
        raise ValueError(f"{where}: start_dim {start} and end_dim {end} do not fit a shape of {dims} dimensions")
    if shape is None:  # a node's declared input is not passed on: some exporters include the batch
        return None
    start, end = start % dims, end % dims
    return (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def _shape_after_window(node: Any, shape: Shape, where: str) -> Shape:
    dims, convolves = _DIMS[type(node).__name__], hasattr(node, "weight")
    kernel = tuple(node.weight.shape[2:]) if convolves else node.kernel_size
    channels = node.weight.shape[1] * node.groups if convolves else shape[0] if shape else 0
    if len(shape) != 1 + dims or shape[0] != channels:
        expected = f"[{channels if convolves else 'channels'}{', size' * dims}]"
        raise ValueError(f"{where}: takes neurons of shape {expected}, got {list(shape)}")
    if node.padding == "same":
        return (node.weight.shape[0], *shape[1:])
    padding = (0,) * dims if node.padding == "valid" else node.padding
    dilation = node.dilation if convolves else (1,) * dims
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    free = [n + 2 * p - span for n, p, span in zip(shape[1:], padding, spans, strict=True)]
    if min(free) < 0:
        raise ValueError(f"{where}: its window of {spans} is larger than its input {list(shape)} with its padding")
    return (
        node.weight.shape[0] if convolves else channels,
        *(f // s + 1 for f, s in zip(free, node.stride, strict=True)),
    )
