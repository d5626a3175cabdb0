"""Converted layers whose spikes return to them through a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import HALF_TYPES
from ..neurons.deferred import tensor_of
from ..neurons.recurrent_lif import RecurrentLIFOutput, recurrent_lif
from .converted import HOOKS, Converted, as_floating, bare_class, float_if_scalar


class Recurrent(Converted):
    """A converted layer whose sequences `asgl_cuda.recurrent_lif` computes, with the library's own weights."""

    takes_input_directly = False

    def prefers_original_step(self) -> bool:
        """Whether to run the library's own step, which takes 0.6 of the time of a kernel's call."""
        return self.can_run_original()

    def recurrent_lif(self, x_seq: Tensor, weight: Tensor, gain: Any = 1.0, **options: Any) -> RecurrentLIFOutput:
        """`asgl_cuda.recurrent_lif` with the layer's surrogate and noise. The input may be `[T, ..., N]`.

        `gain` is a factor on the current after the synapse. A tensor is applied to the input of the synapse instead,
        because `recurrent_lif` takes only a number.
        """
        self.check_unchanged()
        x_seq, dtype = as_floating(tensor_of(x_seq, bare_class(self).__name__)), self.settings.dtype
        if dtype is not None and x_seq.dtype in HALF_TYPES:
            x_seq = x_seq.to(dtype)
        gain = float_if_scalar(gain)
        is_number = isinstance(gain, float)
        if not is_number:
            x_seq, weight = x_seq * gain, weight * (gain.unsqueeze(-1) if gain.dim() and weight.dim() > 1 else gain)
            scaled = ("bias", "i_init")
            options |= {name: options[name] * gain for name in scaled if options.get(name) is not None}
        shape, states = x_seq.shape, ("v_init", "s_init", "i_init")
        if len(shape) != 3:
            count = weight.shape[-1]
            x_seq = x_seq.reshape(shape[0], -1, count)
            options |= {name: options[name].reshape(-1, count) for name in states if options.get(name) is not None}
        options = {**self._lif_options(x_seq, options), "input_gain": gain if is_number else 1.0}
        output = recurrent_lif(x_seq, weight, **options)
        assert isinstance(output, RecurrentLIFOutput)
        if len(shape) != 3:
            whole = {}
            for name, each in output._asdict().items():
                if each is not None:  # clone: detach_() refuses views
                    each = each.reshape(shape) if name.endswith("_seq") else each.reshape(shape[1:]).clone()
                whole[name] = each
            output = RecurrentLIFOutput(**whole)
        if output.i_last is not None and not is_number:
            output = output._replace(i_last=output.i_last / gain)
        return output if dtype is None else output._replace(s_seq=output.s_seq.to(dtype))


def synaptic_inputs(
    x_seq: Tensor, s_seq: Tensor, s_init: Tensor | None, weight: Tensor, bias: Tensor | None = None, time_dim: int = 0
) -> Tensor:
    """The inputs of the synapses in all steps, x[t] + bias + weight s[t-1], which `recurrent_lif` does not return."""
    first = torch.zeros_like(s_seq.select(time_dim, 0)) if s_init is None else s_init
    before = torch.cat([first.unsqueeze(time_dim), s_seq.narrow(time_dim, 0, s_seq.shape[time_dim] - 1)], time_dim)
    x_seq = x_seq if bias is None else x_seq + bias
    return x_seq + (before * weight if weight.dim() == 1 else nn.functional.linear(before, weight))


def feedback_reason(feedback: nn.Module, known: tuple[type[nn.Module], ...] = (nn.Linear,)) -> str | None:
    """Why spikes can't return through `feedback`: it computes more than classes in `known`, or has hooks. Or None."""
    name = bare_class(feedback).__name__
    if "forward" in vars(feedback) or type(feedback).forward not in [each.forward for each in known]:
        return f"its spikes return through a {name}; a Linear can be converted"
    if any(getattr(feedback, hooks) for hooks in HOOKS):
        return f"its spikes return through a {name} with hooks, which would no longer fire"
    return None
