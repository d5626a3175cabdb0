"""Cached calls of layers that are called step by step, since checks take longer than the kernel.

The layer's values are read at each call. While unchanged, results derived from the values stay valid, as does the
checked call of `lif` for inputs of the same signature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..checks import PLAIN_TENSORS
from ..layout import is_dense
from ..reference import Parameters
from ..transforms import transforming


class Known:
    """A layer's values, the result derived from them unless it has gradients, and a call of `lif`."""

    def __init__(self, settings: Any, values: list[Any], made: Any) -> None:
        self.settings, self.values, self.made = settings, values, made
        self._kind: Any = None
        self._call: Call | None = None
        self._names: list[str | None] = []  # tensor options by parameter; [] without any

    def __reduce__(self) -> Any:
        return type(None), ()  # not copied with the layer

    def call(self, x_seq: Tensor, v_init: Tensor, options: dict[str, Any]) -> Call | None:
        """The call with these tensors; None unless its signature is known."""
        if self._call is None or self._kind != _kind(x_seq, v_init) or transforming():
            return None
        backend, plan, numbers, *_, parameters = self._call
        if self._names:
            parameters = [None if name is None else options[name] for name in self._names]
        x_seq = x_seq if is_dense(x_seq, plan.rules.time_dim) else x_seq.contiguous()
        return Call(backend, plan, numbers, x_seq, v_init, None, parameters)

    def learn(self, call: Call, x_seq: Tensor, v_init: Tensor, options: dict[str, Any]) -> None:
        """Stores a call with these options, if `lif` converts no tensor."""
        self._kind, self._call = _kind(x_seq, v_init), None
        if self._kind is None or transforming() or call.v_init is not v_init:
            return
        reset = "reset_amount" if options["v_reset"] is None else "v_reset"
        pairs = list(zip(Parameters(*Parameters._fields)._replace(reset=reset), call.parameters, strict=True))
        if all(each is None or (each is options.get(name) and type(each) in PLAIN_TENSORS) for name, each in pairs):
            names = [None if each is None else name for name, each in pairs]
            self._names = names if any(names) else []
            self._call = call._replace(x_seq=None, v_init=None, parameters=[None] * len(names))  # type: ignore[arg-type]


def _kind(x_seq: Tensor, v_init: Tensor) -> Any:
    """The signature of both; None if insufficient."""
    if type(x_seq) is not Tensor or type(v_init) is not Tensor or x_seq.layout is not torch.strided:
        return None
    return x_seq.shape, x_seq.dtype, x_seq.device, v_init.shape, v_init.dtype, v_init.device
