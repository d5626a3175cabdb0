"""What a layer that is called step by step keeps from one call to the next, since checks take longer than the kernel.

The layer's values are read at each call. While they are the same numbers, what was made of them holds, and so does the
checked call of `lif` for inputs of the same kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import PLAIN_TENSORS
from ..functional import Call
from ..layout import is_dense
from ..reference import Parameters
from ..transforms import transforming


class Known:
    """A layer's values, what was made of them unless it has gradients, and a call of `lif` with the result."""

    def __init__(self, settings: Any, values: list[Any], made: Any) -> None:
        self.settings, self.values, self.made = settings, values, made
        self._kind: Any = None
        self._call: Call | None = None
        self._names: list[str | None] = []  # options that are tensors, in the places of the parameters

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the layer knows nothing

    def call(self, x_seq: Tensor, v_init: Tensor, options: dict[str, Any]) -> Call | None:
        """The call with these tensors, if its kind is known; None where it has to be checked."""
        if self._call is None or self._kind != _kind(x_seq, v_init) or transforming():
            return None
        backend, numbers, rules, wanted, *_ = self._call
        parameters = [None if name is None else options[name] for name in self._names]
        x_seq = x_seq if is_dense(x_seq, rules[-1]) else x_seq.contiguous()
        return Call(backend, numbers, rules, wanted, x_seq, v_init, None, parameters)

    def learn(self, call: Call, x_seq: Tensor, v_init: Tensor, options: dict[str, Any]) -> None:
        """Keeps a call with these options, if `lif` takes tensors as they are."""
        self._kind, self._call = _kind(x_seq, v_init), None
        if self._kind is None or transforming() or call.v_init is not v_init:
            return
        names = Parameters(*Parameters._fields)._asdict()
        names["reset"] = "reset_amount" if options["v_reset"] is None else "v_reset"
        pairs = list(zip(names.values(), call.parameters, strict=True))
        if all(each is None or (each is options.get(name) and type(each) in PLAIN_TENSORS) for name, each in pairs):
            self._names = [None if each is None else name for name, each in pairs]
            self._call = call._replace(x_seq=None, v_init=None, parameters=())  # type: ignore[arg-type]


def _kind(x_seq: Tensor, v_init: Tensor) -> Any:
    """What may be known of both without their numbers; None where that is not enough."""
    if type(x_seq) is not Tensor or type(v_init) is not Tensor or x_seq.layout is not torch.strided:
        return None
    return x_seq.shape, x_seq.dtype, x_seq.device, v_init.shape, v_init.dtype, v_init.device
