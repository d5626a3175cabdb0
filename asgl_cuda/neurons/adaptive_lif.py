"""Adaptive neurons, with a second state w: the function `adaptive_lif` and the layer `AdaptiveLIF`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..calls.arguments import INPUT, Arguments, NeuronArguments
from ..checks import check_bool, check_finite, check_keywords, min_and_max
from ..reference.learned import Logit
from ..reference.records import IN_CURRENT, IN_RESET, IN_THRESHOLD
from .base import fill_parameter, format_values
from .deferred import tensor_of
from .lif import LIF, LIF_DEFAULTS, lacking_options, run_lif
from .spiking import Neurons

_CALLER = "asgl_cuda.adaptive_lif"
# Options of `lif` and `LIF` that adaptive neurons do not have.
_WITHOUT = lacking_options(Neurons, *INPUT)
_NEURON = [name for name in LIF_DEFAULTS if name not in _WITHOUT]


class AdaptiveLIFOutput(NamedTuple):
    """The result of `adaptive_lif` if potentials are asked for: the fields of `LIFOutput`, and `w_last`.

    `h_seq` is the value that is compared with v_threshold. With `to_threshold`, it is the potential before the reset
    minus the adaptation. `w_last` is the adaptation with which the next step would begin. `return_v_last` asks for
    `v_last` and `w_last`.
    """

    s_seq: Tensor
    v_last: Tensor | None
    w_last: Tensor | None
    v_seq: Tensor | None
    h_seq: Tensor | None


def adaptation_bits(v_reset: Any, reset_amount: Any, to_threshold: bool) -> int:
    """The bits of `Rules.adaptation`, which say where the adaptation w acts."""
    if not to_threshold:
        return IN_CURRENT
    return IN_THRESHOLD | IN_RESET if v_reset is None and reset_amount is None else IN_THRESHOLD


def adaptive_lif(
    x_seq: Tensor,
    *,
    adapt_decay: Tensor | float,
    adapt_potential: Tensor | float = 0.0,
    adapt_spike: Tensor | float = 0.0,
    to_threshold: bool = False,
    w_init: Tensor | None = None,
    **neuron: Unpack[NeuronArguments],
) -> Tensor | AdaptiveLIFOutput:
    """Leaky integrate-and-fire neurons that adapt, over a whole sequence: adLIF and ALIF.

    Args:
        x_seq: input current, as for `lif`.
        adapt_decay: fraction of the adaptation w that is left after a step. adapt_decay, adapt_potential and
            adapt_spike are floats or tensors, like `decay` of `lif`.
        adapt_potential: at each step, `adapt_potential * (v - v_rest)` is added to w, where v is the potential after
            the reset.
        adapt_spike: amount that a spike adds to w, in units of x_seq.
        to_threshold: add w to the threshold instead of subtracting w from the current. Under a soft reset without
            `reset_amount`, w is then also added to the amount that a spike subtracts.
        w_init: w in the first step, in the shape of x_seq without time; default 0.
        neuron: arguments of `lif` except `input_*`, `residual`, `residual_gain`, `scale_output`, `levels`,
            `multi_spike` and `v_min`.

    Returns:
        The spikes, or an `AdaptiveLIFOutput` if a potential was asked for. All outputs are differentiable as in `lif`,
        and also with respect to w_init, adapt_decay, adapt_potential and adapt_spike.

    Raises TypeError, ValueError and RuntimeError as `lif` does.

    Example::

        s_seq = asgl_cuda.adaptive_lif(torch.randn(100, 32, 128), adapt_decay=0.97, adapt_spike=0.1, decay=0.9)

    The same in PyTorch, for the defaults of `lif`::

        v, w = torch.zeros_like(x_seq[0]), torch.zeros_like(x_seq[0])
        for t in range(T):
            h = decay * v + (x_seq[t] - (0 if to_threshold else w))
            s[t] = (h - (w if to_threshold else 0) >= v_threshold).to(h)
            v = h * (1 - s[t])
            w = adapt_decay * w + (adapt_potential * v + adapt_spike * s[t])

    Sources: Bittar, Garner: A surrogate gradient spiking baseline for speech command recognition, Frontiers in
    Neuroscience 2022. That paper multiplies adapt_potential by the potential before the soft reset. To compute the
    same, add `adapt_potential * reset_amount` to `adapt_spike`. For w on the threshold: Bellec, Salaj, Subramoney,
    Legenstein, Maass: Long short-term memory and learning-to-learn in networks of spiking neurons, NeurIPS 2018.
    """
    check_keywords(neuron, _KNOWN, _CALLER, _WITHOUT)
    check_bool("to_threshold", to_threshold, _CALLER)
    given: Arguments = {
        **LIF_DEFAULTS,
        **neuron,
        "adapt_decay": adapt_decay,
        "adapt_potential": adapt_potential,
        "adapt_spike": adapt_spike,
        "w_init": w_init,
    }
    given["adaptation"] = adaptation_bits(given["v_reset"], given["reset_amount"], to_threshold)
    return run_adaptive(x_seq, given)


# The keyword arguments of `adaptive_lif`, for errors and hints.
_KNOWN = *_NEURON, *(adaptive_lif.__kwdefaults__ or {})


def run_adaptive(x_seq: Tensor, given: Arguments) -> Tensor | AdaptiveLIFOutput:
    """The result of `adaptive_lif` from a record of its arguments, in which `adaptation` says where w acts."""
    return run_lif(_CALLER, tensor_of(x_seq, _CALLER), given, AdaptiveLIFOutput)


_FACTORS = "adapt_potential", "adapt_spike"


class Adapting(Neurons):
    """Spiking neurons that may have an adaptation, with constant or learned values: adaptive and recurrent ones."""

    _constants = (*Neurons._constants, "_adapt_decay", "_adapt_potential", "_adapt_spike", *_FACTORS)
    w: Tensor | None
    logit_adapt_decay: nn.Parameter | None
    adapt_potential: Tensor | float
    adapt_spike: Tensor | float
    _adapt_potential: Tensor | float
    _adapt_spike: Tensor | float
    to_threshold: bool

    def _set_up_lif(
        self, given: Mapping[str, Any], own: Callable[..., Any], lacking: Collection[str], **others: Any
    ) -> None:
        """Sets up the neurons, at first without an adaptation, from the `given` options of `LIF` and from `others`.

        Refuses keyword arguments that neither the constructor `own` takes, nor `LIF`, without those in `lacking`.
        """
        defaults = LIF.__init__.__kwdefaults__ or {}
        known = [name for name in defaults if name not in lacking]
        check_keywords(given, [*known, *(own.__kwdefaults__ or {})], self._caller, lacking)
        self._set_up_neurons({**defaults, **given, **others})
        self.logit_adapt_decay, self.to_threshold = None, False
        self._adapt_decay: Tensor | float | None = None

    def _set_up_adaptation(
        self, adapt_decay: Any, adapt_potential: Any, adapt_spike: Any, to_threshold: Any, learn_adaptation: Any,
        device: Any, dtype: Any,
    ) -> None:  # fmt: skip
        """Checks the arguments of the adaptation, and makes constants or parameters of them."""
        self.to_threshold = check_bool("to_threshold", to_threshold, self._caller)
        learned = check_bool("learn_adaptation", learn_adaptation, self._caller)
        empty = partial(torch.empty, self.num_features or 1, device=device, dtype=dtype)
        self.logit_adapt_decay = nn.Parameter(empty()) if learned else None
        if learned:
            self.adapt_potential = nn.Parameter(empty())
            self.adapt_spike = nn.Parameter(empty())
        self._store_adaptation(adapt_decay, adapt_potential, adapt_spike)
        if not learned:
            self.adapt_potential, self.adapt_spike = self._adapt_potential, self._adapt_spike

    def _store_adaptation(self, adapt_decay: Any, *factors: Any) -> None:
        """Checks the decay and the `factors` of the adaptation, and stores them as constants and in the parameters."""
        learned, option = self.logit_adapt_decay, "learn_adaptation"
        self._adapt_decay = self._store_decay(learned, "adapt_decay", adapt_decay, option)
        for name, given in zip(_FACTORS, factors, strict=True):
            value = self._checked_value(name, given, learned, option)
            for each in min_and_max(value):
                check_finite(name, each, self._caller)
            setattr(self, f"_{name}", value)
            if learned is not None:
                fill_parameter(getattr(self, name), value)

    def reset_parameters(self) -> None:
        """Resets the learned parameters to the values that were set last, and clears states.

        The parameters of the adaptation are reset to their initial values.
        """
        if self._adapt_decay is not None:
            self._store_adaptation(self._adapt_decay, self._adapt_potential, self._adapt_spike)
        super().reset_parameters()

    @property
    def adapt_decay(self) -> Tensor | float | None:
        """The decay of the adaptation per step, a tensor if learned; None without an adaptation."""
        return self._adapt_decay if self.logit_adapt_decay is None else Logit(self.logit_adapt_decay).value()

    def _arguments_of_call(self, x_seq: Tensor, *arguments: Any, **options: Any) -> Arguments:
        """As in the base class, with the arguments of the adaptation."""
        given = super()._arguments_of_call(x_seq, *arguments, **options)
        if self._adapt_decay is None:
            return given
        adaptation: Sequence[Any] = (self.adapt_decay, self.adapt_potential, self.adapt_spike)
        if self.num_features:
            adaptation = self._match_meta_device(adaptation, x_seq)
        given["adapt_decay"], given["adapt_potential"], given["adapt_spike"] = adaptation
        given["adaptation"] = adaptation_bits(self.v_reset, self.reset_amount, self.to_threshold)
        return given

    def extra_repr(self) -> str:
        if self._adapt_decay is None:
            return super().extra_repr()
        names = "adapt_decay", *_FACTORS
        parts = [f"{name}={format_values(getattr(self, '_' + name), self.logit_adapt_decay)}" for name in names]
        return ", ".join([super().extra_repr(), *parts, *(["to_threshold=True"] if self.to_threshold else [])])


class AdaptiveLIF(Adapting):
    """Leaky integrate-and-fire neurons that adapt: `LIF` with a second state, as in `asgl_cuda.adaptive_lif`.

    Args:
        num_features: as for `LIF`.
        adapt_decay: fraction of the adaptation w that is left after a step, in [0, 1]. If learned it must be in
            [3.1e-7, 1 - 3.1e-7], and is stored as a logit. adapt_decay, adapt_potential and adapt_spike are floats or
            tensors, like `decay` of `LIF`.
        adapt_potential: at each step, `adapt_potential * (v - v_rest)` is added to w, where v is the potential after
            the reset.
        adapt_spike: amount that a spike adds to w, in units of the input.
        to_threshold: add w to the threshold instead of subtracting w from the input current, see
            `asgl_cuda.adaptive_lif`.
        learn_adaptation: whether adapt_decay, adapt_potential and adapt_spike are learned, with one value per layer,
            channel or neuron as `granularity` says, instead of being constants.
        lif_options: arguments of `LIF` except `input_gain`, `scale_output`, `levels`, `multi_spike` and `v_min`.

    A stateful layer carries the adaptation as `w`, in addition to `v`. If the adaptation is learned, the state dict has
    `logit_adapt_decay`, `adapt_potential` and `adapt_spike`. Raises the errors of `LIF`.

    Example::

        model = nn.Sequential(
            nn.Linear(64, 128),
            asgl_cuda.AdaptiveLIF(128, granularity="neuron", decay=0.9, learn_decay=True, learn_adaptation=True),
        )
        s_seq = model(torch.randn(100, 32, 64))  # [T, B, 64] to [T, B, 128]
    """

    _caller = "asgl_cuda.AdaptiveLIF"
    _function = _CALLER
    _states = ("v", "w")

    def __init__(
        self,
        num_features: int | Sequence[int] | None = None,
        *,
        adapt_decay: Tensor | float = 0.97,
        adapt_potential: Tensor | float = 0.0,
        adapt_spike: Tensor | float = 0.1,
        to_threshold: bool = False,
        learn_adaptation: bool = False,
        **lif_options: Any,
    ) -> None:
        super().__init__()
        self._set_up_lif(lif_options, AdaptiveLIF.__init__, _WITHOUT, num_features=num_features)
        placed = {name: lif_options.get(name) for name in ("device", "dtype")}
        self._set_up_adaptation(adapt_decay, adapt_potential, adapt_spike, to_threshold, learn_adaptation, **placed)

    def _call_function(self, x_seq: Tensor, w_init: Tensor | None = None, **options: Any) -> Tensor | AdaptiveLIFOutput:
        """Calls `asgl_cuda.adaptive_lif`."""
        given = self._arguments_of_call(x_seq, self.input_gain, **options)
        given["w_init"] = w_init
        return run_adaptive(x_seq, given)
