"""The layers that the tests ask the same questions, and models that they share."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import asgl_cuda
from asgl_cuda import LIF

N = 8  # neurons, or channels


class Case(NamedTuple):
    """A layer: its class of the number of neurons, options, and what it has under `learn`."""

    kind: Callable[..., nn.Module]  # of num_features
    function: Callable[..., Any] | None  # takes the options too, and the learned values by name
    options: dict[str, Any]
    learn: tuple[str, ...]
    learned: dict[str, str]  # names of learned values, and of attributes that show them
    state_dict: list[str]
    states: tuple[str, ...] = ("v",)


def recurrent(num_features: int | None, **options: Any) -> nn.Module:
    return asgl_cuda.RecurrentLIF(N, **options)


def batch_norm(num_features: int | None, **options: Any) -> nn.Module:
    return asgl_cuda.BatchNormLIF(N, **options)


LEARN = ("learn_width", "learn_decay", "learn_threshold")
LEARNED = {name: name for name in ("width", "decay", "v_threshold")}
NAMES = ["log_width", "logit_decay", "threshold"]
HARD = {
    "decay": 0.7, "v_threshold": 0.9, "v_reset": 0.1, "width": 1.3, "surrogate": "rectangle", "analog_prob": 0.4,
    "detach_reset": False,
}  # fmt: skip
SOFT = {**HARD, "v_reset": None, "reset_amount": 0.7, "v_rest": 0.25, "detach_reset": True, "strict_threshold": True}
ADAPTIVE = {"adapt_decay": 0.9, "adapt_potential": 0.1, "adapt_spike": 0.3}
adaptive = partial(
    Case, asgl_cuda.AdaptiveLIF, asgl_cuda.adaptive_lif, learn=(*LEARN, "learn_adaptation"),
    learned=LEARNED | {name: name for name in ADAPTIVE}, states=("v", "w"),
    state_dict=[*NAMES, "logit_adapt_decay", "adapt_potential", "adapt_spike"],
)  # fmt: skip
RETURNING = {"weight": "recurrent_weight", "bias": "recurrent_bias", "syn_decay": "syn_decay"}
RETURNING_NAMES = ["recurrent_weight", "recurrent_bias", "logit_syn_decay"]
returning = partial(
    Case, recurrent, lambda x_seq, weight, **options: asgl_cuda.recurrent_lif(x_seq, weight, **options),
    learn=(*LEARN, "learn_syn_decay"), learned=LEARNED | RETURNING, state_dict=[*NAMES, *RETURNING_NAMES],
    states=("v", "s", "i"),
)  # fmt: skip
CASES = {
    "LIF": Case(
        LIF, asgl_cuda.lif, HARD | {"input_gain": 0.8, "surrogate_gain": 0.5, "scale_output": True}, LEARN, LEARNED,
        NAMES,
    ),
    "soft reset": Case(LIF, asgl_cuda.lif, SOFT | {"surrogate": "sigmoid", "v_min": -0.5}, LEARN, LEARNED, NAMES),
    "AdaptiveLIF": adaptive(options=SOFT | ADAPTIVE),
    "AdaptiveLIF, threshold": adaptive(options=HARD | ADAPTIVE | {"to_threshold": True}),
    "BatchNormLIF": Case(
        batch_norm, None, HARD | {"decay": 0.9}, LEARN, {},
        [*NAMES, "weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    ),
    "LeakyIntegrator": Case(
        asgl_cuda.LeakyIntegrator, asgl_cuda.leaky_integrator,
        {"decay": 0.7, "input_gain": 0.5, "v_rest": 0.25, "delay": True}, ("learn_decay",), {"decay": "decay"},
        ["logit_decay"],
    ),
    "RecurrentLIF": returning(options=HARD | {"syn_decay": 0.6, "input_gain": 0.9, "surrogate": "sigmoid"}),
    "RecurrentLIF, adaptive": returning(
        options=HARD | ADAPTIVE | {"syn_decay": 0.6, "surrogate": "sigmoid"},
        learn=(*LEARN, "learn_syn_decay", "learn_adaptation"),
        learned=LEARNED | RETURNING | {name: name for name in ADAPTIVE}, states=("v", "s", "i", "w"),
        state_dict=[*NAMES, *RETURNING_NAMES, "logit_adapt_decay", "adapt_potential", "adapt_spike"],
    ),
}  # fmt: skip
NEURONS = [name for name in CASES if name != "LeakyIntegrator"]  # all that spike


def make(name: str, backend: str | None = "reference", device: Any = "cpu", learn: bool = True, **options: Any) -> Any:
    """A layer of the case, another value for each element of its parameters."""
    case = CASES[name]
    features = options.pop("features", None if options.get("granularity", "layer") == "layer" else N)
    flags = dict.fromkeys(case.learn, True) if learn else {}
    layer = case.kind(features, **{**case.options, **flags, "backend": backend, **options}).to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.rand_like(parameter)
    return layer


def network(**options: Any) -> nn.Sequential:
    """Layers "1" and "3" start with different noise."""
    return nn.Sequential(nn.Linear(7, 5), LIF(analog_prob=0.2, **options), nn.Linear(5, 3), LIF(analog_prob=0.8))


class Foreign(nn.Module):
    """Mimics a converted neuron of another library: the attributes of LIF, but not the class."""

    def __init__(self, output: Any = None, **attributes: Any) -> None:
        super().__init__()
        self.analog_prob = 0.3
        self.log_width = nn.Parameter(torch.tensor([0.0, math.log(3.0)]))
        self.beta = nn.Parameter(torch.tensor(0.9))
        self.recurrent = nn.Linear(2, 2)
        self.output = output
        for name, value in attributes.items():
            setattr(self, name, value)

    @property
    def width(self) -> torch.Tensor:
        return self.log_width.exp()

    def forward(self, x_seq: torch.Tensor) -> Any:
        return x_seq if self.output is None else self.output
