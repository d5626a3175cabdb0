"""The operators of recurrent neurons on devices without kernels for them: loops over the operators of the neuron.

csrc/ops/recurrent.h has them for the CPU. `parameters`, [6, N], are width, decay, v_threshold, reset, bias and
syn_decay, the last unused without a synapse; numbers and rules those of the neuron. `wanted` selects the results: in
forward, beside s_seq, `emitted` (s in the type of the arithmetic, before scale_output), h_seq, v_seq, i_seq, v_last,
s_last and i_last; in backward the gradients of x_seq (in that type, too), weight, parameters, v_init, s_init and
i_init. Backward takes emitted and h_seq of forward, and i_seq for the gradient of syn_decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import Numbers, Rules, recurrent_reference, states_of_steps


def forward_by_steps(
    library: Any,
    x_seq: Tensor,
    weight: Tensor,
    parameters: Tensor,
    v_init: Tensor | None,
    s_init: Tensor | None,
    i_init: Tensor | None,
    rng_state: Tensor | None,
    numbers: Sequence[float],
    rules: Sequence[int],
    has_synapse: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The operator recurrent_forward, by `library.lif_forward`."""

    def step(*arguments: Any) -> Any:
        i, v, state, neuron, numbers, rules = arguments
        s, v, h = library.lif_forward(i, v, state, [*neuron], [*numbers], [*rules], [True, False, True, False])
        return s, v, None, h

    s_seq, *others = recurrent_reference(
        x_seq, weight, parameters, v_init, s_init, i_init, rng_state, Numbers(*numbers), Rules(*rules), has_synapse,
        step=step,
    )  # fmt: skip
    asked = [each for each, is_asked in zip(others, wanted, strict=True) if is_asked]
    return [each.clone(memory_format=torch.contiguous_format) for each in (s_seq, *asked)]


def backward_by_steps(
    library: Any,
    grad_s_seq: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_h_seq: Tensor | None,
    grad_v_last: Tensor | None,
    grad_s_last: Tensor | None,
    grad_i_last: Tensor | None,
    h_seq: Tensor,
    emitted: Tensor,
    i_seq: Tensor | None,
    weight: Tensor,
    parameters: Tensor,
    v_init: Tensor | None,
    s_init: Tensor | None,
    i_init: Tensor | None,
    rng_state: Tensor | None,
    numbers: Sequence[float],
    rules: Sequence[int],
    has_synapse: bool,
    detach_recurrent: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The operator recurrent_backward, by `library.lif_backward`.

    The neuron's step is computed from h as its current, at rest and with a decay that does not matter.
    """
    named, rule = Numbers(*numbers), Rules(*rules)
    width, decay, v_threshold, reset, _, syn_decay = parameters
    wants_x_seq, wants_weight, wants_parameters, wants_v_init, wants_s_init, wants_i_init = wanted
    real = h_seq.dtype

    def by_step(sequence: Tensor | None) -> Any:
        return [None] * steps if sequence is None else sequence.to(real).movedim(rule.time_dim, 0).contiguous()

    steps = h_seq.shape[rule.time_dim]
    g_seq, gv_seq, gh_seq = by_step(grad_s_seq), by_step(grad_v_seq), by_step(grad_h_seq)
    h, s, states = by_step(h_seq), by_step(emitted), states_of_steps(rng_state, steps)
    neuron = [width, None, v_threshold, reset, *[None] * 4]
    numbers_of_h = [*named._replace(decay=0.0, input_gain=1.0, v_rest=0.0)]
    rules_of_step = [*rule.changed(time_dim=0, scale_output=0)]
    wanted_of_step = [True, False, wants_parameters, False, wants_parameters, wants_parameters, *[False] * 4]
    no_checkpoints = h_seq.new_zeros(2)
    totals = torch.zeros_like(parameters)
    dh_seq, dj_seq = [], []
    feedback, dv, di = grad_s_last, grad_v_last, grad_i_last
    with torch.autocast(h_seq.device.type, enabled=False):
        for t in reversed(range(steps)):
            g = g_seq[t]
            if g is not None and rule.scale_output:
                totals[2] += (g * s[t]).sum(0)
                g = v_threshold * g
            if feedback is not None:
                g = feedback if g is None else g + feedback
            gradients = [None if each is None else each[None] for each in (g, gv_seq[t], gh_seq[t])]
            (dh,), *found = library.lif_backward(
                [gradients[0], dv, *gradients[1:]], h[t][None], None, states[t], no_checkpoints, neuron, numbers_of_h,
                rules_of_step, wanted_of_step,
            )  # fmt: skip
            if wants_parameters:
                grad_width, grad_v_threshold, grad_reset = found
                totals[0] += grad_width  # not by a list of indices, which would be copied from the host
                totals[2] += grad_v_threshold
                totals[3] += grad_reset
            dj = named.input_gain * dh
            if has_synapse:
                dj = dj if di is None else dj + di
                di = syn_decay * dj
            dv = decay * dh
            feedback = None
            if not detach_recurrent:
                feedback = dj * weight if weight.dim() == 1 else dj @ weight
            dh_seq.append(dh)
            dj_seq.append(dj)
        dh_all, dj_all = torch.stack(dh_seq[::-1]), torch.stack(dj_seq[::-1])
        nothing = torch.zeros_like(dj)
        s_before = torch.cat([(nothing if s_init is None else s_init)[None], s[:-1]])
        if wants_parameters:
            v = h * (1 - s) + reset * s if rule.hard_reset else h - reset * s
            rest = torch.full_like(nothing, named.v_rest)
            v_before = torch.cat([(rest if v_init is None else v_init)[None], v[:-1]])
            totals[1] = (dh_all * (v_before - named.v_rest)).sum((0, 1))
            totals[4] = dj_all.sum((0, 1))
            if i_seq is not None:
                i_before = torch.cat([(nothing if i_init is None else i_init)[None], by_step(i_seq)[:-1]])
                totals[5] = (dj_all * i_before).sum((0, 1))
        if wants_weight:
            by_weight = dj_all.flatten(0, 1), s_before.flatten(0, 1)
            grad_weight = (by_weight[0] * by_weight[1]).sum(0) if weight.dim() == 1 else by_weight[0].T @ by_weight[1]
    results = [dj_all.movedim(0, rule.time_dim).contiguous()] if wants_x_seq else []
    results += [grad_weight] if wants_weight else []
    results += [totals] if wants_parameters else []
    for asked, gradient in ((wants_v_init, dv), (wants_s_init, feedback), (wants_i_init, di)):
        results += [nothing if gradient is None else gradient] if asked else []
    return results
