"""What a kernel is given: the structures of csrc/lif_params.h and batch_norm_params.h, by the same names."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_float, c_longlong, c_uint, c_void_p
from typing import Any, NamedTuple

import torch

WIDTH, _DECAY, _THRESHOLD, _RESET, INPUT_GAIN, INPUT_BIAS, INPUT_MEAN = range(7)
NUM_PARAMETERS = 7


class SequenceShape(Structure):  # noqa: D101
    _fields_ = (("outer", c_longlong), ("steps", c_longlong), ("inner", c_longlong))


class NoiseParams(Structure):  # noqa: D101
    _fields_ = (("rng_state", c_void_p), ("analog_below", c_uint))


class ChannelShape(Structure):  # noqa: D101
    _fields_ = (("rows", c_longlong), ("channels", c_longlong), ("inner", c_longlong))


class ChannelTiles(Structure):  # noqa: D101
    _fields_ = (
        ("shape", ChannelShape),
        ("lanes", c_longlong), ("width", c_longlong), ("ways", c_longlong),
        ("units_per_channel", c_longlong), ("channels_per_tile", c_longlong), ("tiles_per_channel", c_longlong),
        ("rows_per_split", c_longlong), ("splits", c_longlong),
    )  # fmt: skip


class Normalisation(Structure):  # noqa: D101
    _fields_ = (("eps", c_double), ("input_scale", c_double))


class MomentsParams(Structure):  # noqa: D101
    _fields_ = (("tiles", ChannelTiles), ("x_seq", c_void_p), ("moments", c_void_p))


class CoefficientsParams(Structure):  # noqa: D101
    _fields_ = (
        ("moments", c_void_p), ("slots", c_longlong), ("channels", c_longlong),
        ("mean", c_void_p), ("variance", c_void_p), ("weight", c_void_p), ("bias", c_void_p),
        ("options", Normalisation), ("coefficients", c_void_p), ("total", c_void_p),
    )  # fmt: skip


class AdjointParams(Structure):  # noqa: D101
    _fields_ = (
        ("moments", c_void_p), ("coefficients", c_void_p), ("channels", c_longlong),
        ("grad_gain", c_void_p), ("grad_bias", c_void_p), ("total_grad_gain", c_void_p), ("total_grad_bias", c_void_p),
        ("options", Normalisation), ("grad_weight", c_void_p), ("grad_shift", c_void_p), ("adjoint", c_void_p),
    )  # fmt: skip


class InputGradientParams(Structure):  # noqa: D101
    _fields_ = (
        ("tiles", ChannelTiles), ("x_seq", c_void_p), ("mean", c_void_p), ("adjoint", c_void_p),
        ("grad_x_seq", c_void_p),
    )  # fmt: skip


class Structures(NamedTuple):
    """Those that depend on the type of the arithmetic; x_seq's type changes no layout."""

    ParameterView: type[Structure]
    ForwardParams: type[Structure]
    BackwardParams: type[Structure]
    GradientSum: type[Structure]


def _structures(real: Any) -> Structures:
    class ParameterView(Structure):
        _fields_ = (
            ("data", c_void_p), ("constant", real),
            ("step_stride", c_longlong), ("inner", c_longlong), ("count", c_longlong),
        )  # fmt: skip

    class NeuronOptions(Structure):
        _fields_ = (
            ("v_rest", real), ("surrogate_gain", real),
            ("strict_threshold", c_bool), ("scale_output", c_bool), ("detach_reset", c_bool),
        )  # fmt: skip

    lif_params = (
        ("shape", SequenceShape), ("parameters", ParameterView * NUM_PARAMETERS), ("options", NeuronOptions),
        ("noise", NoiseParams), ("x_seq", c_void_p), ("v_init", c_void_p),
    )  # fmt: skip

    class ForwardParams(Structure):
        _fields_ = (
            *lif_params,
            ("s_seq", c_void_p), ("v_last", c_void_p), ("v_seq", c_void_p), ("h_seq", c_void_p),
            ("checkpoints", c_void_p),
        )  # fmt: skip

    class GradientPartials(Structure):
        _fields_ = (("data", c_void_p), ("slots", c_longlong))

    class BackwardParams(Structure):
        _fields_ = (
            *lif_params,
            ("grad_s_seq", c_void_p), ("grad_v_last", c_void_p), ("grad_v_seq", c_void_p), ("grad_h_seq", c_void_p),
            ("checkpoints", c_void_p), ("grad_x_seq", c_void_p), ("grad_v_init", c_void_p),
            ("partials", GradientPartials * NUM_PARAMETERS),
        )  # fmt: skip

    class GradientSum(Structure):
        _fields_ = (
            ("partials", GradientPartials), ("parameter", ParameterView), ("shape", SequenceShape),
            ("tile", c_longlong), ("is_width", c_bool), ("gradient", c_void_p),
        )  # fmt: skip

    return Structures(ParameterView, ForwardParams, BackwardParams, GradientSum)


STRUCTURES = {torch.float32: _structures(c_float), torch.float64: _structures(c_double)}
