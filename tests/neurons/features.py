"""What neurons can do, and how each is called. A new feature is a row of FEATURES: test_features.py asks the rest.

A `Case` is all of a call that features have in common. CASES are a covering array: every two values of two fields meet
in a case. A feature makes its arguments for a case; where it lacks a value, `instead` names another.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from comparison import real_of, rng_state, uniform
from torch import Tensor

import asgl_cuda
from asgl_cuda.neurons.adaptive_lif import run_adaptive
from asgl_cuda.neurons.lif import LIF_DEFAULTS
from asgl_cuda.reference.records import IN_RESET
from asgl_cuda.reference.surrogates import PERIODIC, SURROGATES
from asgl_cuda.selfcheck import EXACT_SURROGATES, THRESHOLD_BAND

Options = dict[str, Any]


class Case(NamedTuple):
    """A call but for its feature."""

    dtype: torch.dtype = torch.float32
    steps: int = 5
    surrogate: str = "rectangle"
    reset: str = "hard"  # soft, by the threshold or by an amount of its own
    layout: str = "time first"
    shape: str = "neuron"  # of parameters, but for the time dimension; see Draw
    noise: float = 0.0
    sizes: tuple[int, ...] = (2, 3, 2, 5)  # [B, C, H, W]
    flags: str = "none"
    asked: str = "all"  # which outputs

    def __str__(self) -> str:
        return "-".join(str(each).removeprefix("torch.").replace(" ", "") for each in self)


# Segments have up to 16 steps. Neurons: one, fours, none of them full, and more than a tile of 1024 (CPU), 128 or 512
# (GPU), whose edges cross channels of 400.
FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "steps": (1, 4, 17, 33),
    "surrogate": tuple(SURROGATES),
    "reset": ("hard", "soft", "amount"),
    "layout": ("time first", "batch first", "time last", "channels last", "transposed", "sliced"),
    "shape": ("float", "one", "channel", "neuron", "step", "mixed"),
    "noise": (0.0, 0.3, 1.0),
    "sizes": ((1, 1, 1, 1), (3, 8, 2, 6), (2, 5, 3, 7), (2, 6, 20, 20)),
    "flags": ("none", "detached", "scaled"),
    "asked": ("spikes", "states", "all"),
}
FLAGS: dict[str, Options] = {
    "none": {},
    "detached": {"detach_reset": True, "strict_threshold": True, "surrogate_gain": 1.7},
    "scaled": {"scale_output": True},
}


def covering(factors: Mapping[str, Iterable[Any]]) -> list[Case]:
    """Rows in which every two values of two factors meet, chosen greedily."""
    missing = {
        frozenset(two)
        for one, other in itertools.combinations(factors.items(), 2)
        for two in itertools.product(*([(name, value) for value in values] for name, values in (one, other)))
    }
    in_order = sorted(missing, key=lambda two: sorted(map(str, two)))
    rows = []
    while missing:
        row = dict(next(two for two in in_order if two in missing))
        for name, values in factors.items():
            if name not in row:
                met = {each: sum({(name, each), item} in missing for item in row.items()) for each in values}
                row[name] = max(met, key=lambda value: met[value])
        missing -= {frozenset(two) for two in itertools.combinations(row.items(), 2)}
        rows.append(Case(**row))
    return rows


CASES = covering(FACTORS)


def laid_out(name: str, x_seq: Tensor) -> tuple[Tensor, int]:
    """x_seq, [T, B, C, ...], in the layout called `name`, and its time dimension."""
    x_seq = x_seq.detach()
    order = range(x_seq.dim())
    spatial = order[3:]
    return {
        "time first": (x_seq.contiguous(), 0),
        "batch first": (x_seq.transpose(0, 1).contiguous(), 1),
        "channels, time": (x_seq.movedim(0, 2).contiguous(), 2),
        "time last": (x_seq.movedim(0, -1).contiguous(), x_seq.dim() - 1),
        "channels last": (x_seq.movedim(2, -1).contiguous().movedim(-1, 2), 0),
        "channels last, batch first": (x_seq.permute(1, 0, *spatial, 2).contiguous().movedim(-1, 2), 1),
        "transposed": (x_seq.transpose(0, 1).contiguous().transpose(0, 1), 0),
        "reversed": (x_seq.permute(*reversed(order)).contiguous().permute(*reversed(order)), 0),
        "sliced": (torch.cat([x_seq, x_seq], dim=-1)[..., : x_seq.shape[-1]], 0),
        "every second step": (x_seq.repeat_interleave(2, dim=0)[::2], 0),
        "expanded": (x_seq[:, :1].expand(x_seq.shape), 0),
    }[name]


# Used as they are, the others copied.
IN_PLACE = ("time first", "batch first", "channels, time", "time last", "channels last", "channels last, batch first")
COPIED = ("transposed", "reversed", "sliced", "every second step", "expanded")


class Draw:
    """Random arguments in the types, shapes and layout of a case; with `only`, a single one is a tensor."""

    def __init__(
        self,
        case: Case,
        sizes: tuple[int, ...],
        device: Any,
        current: tuple[float, float],
        exact: bool,
        only: str | None,
    ) -> None:
        self.case, self.exact, self.only, self.drawn = case, exact, only, 0
        self.like: Options = {"dtype": real_of(case.dtype), "device": device}
        self.standard = case.steps, *sizes
        low, high = current
        x_seq = uniform(*self.standard, low=low, high=high, dtype=case.dtype, device=device)
        x_seq, self.time_dim = laid_out(case.layout, x_seq)
        self.x_seq = x_seq.requires_grad_(only in (None, "x_seq"))

    def shape(self) -> list[int]:
        """The shape of the next parameter, which broadcasts against x_seq."""
        steps, batch, *neuron = self.standard
        channel, last = [neuron[0], *[1] * len(neuron[1:])], [*[1] * len(neuron[1:]), neuron[-1]]
        mixed = [last, [neuron[0], *last[1:]], [batch, *[1] * len(neuron)], [steps, 1, *channel], [*self.standard]]
        self.drawn += 1
        name = self.case.shape
        sizes = {"one": [1] * (self.drawn % 2), "channel": channel, "neuron": neuron, "step": [steps, 1, *[1] * len(
            neuron)], "mixed": mixed[self.drawn % len(mixed)]}[name]  # fmt: skip
        if name != "one" and self.time_dim:
            sizes = [1] * (len(self.standard) - len(sizes)) + sizes
            sizes.insert(self.time_dim, sizes.pop(0))
            while sizes[0] == 1 and len(sizes) > 1:
                sizes.pop(0)
        return sizes

    def __call__(self, name: str, low: float, high: float) -> Any:
        """A parameter, or its value in the middle."""
        if self.case.shape == "float" or self.only not in (None, name):
            return (low + high) / 2
        value = uniform(*self.shape(), low=low, high=high, **self.like)
        # A gradient's term is a difference, possibly as small as its operands' roundings. Such errors show where bits
        # differ and few terms are summed.
        few_terms = self.x_seq.numel() < 8 * value.numel()
        return value.requires_grad_(self.exact or not few_terms)

    def tensor(self, name: str, *shape: int, low: float, high: float, **like: Any) -> Tensor:
        value = uniform(*shape, low=low, high=high, **{**self.like, **like})
        return value.requires_grad_(self.only in (None, name))

    def state(self, name: str, low: float = -1.0, high: float = 1.0) -> Tensor:
        value = self.tensor(name, *self.x_seq.select(self.time_dim, 0).shape, low=low, high=high)
        return value.requires_grad_(value.requires_grad and (self.exact or value.numel() >= 8))

    def sequence(self, name: str, low: float = -0.5, high: float = 0.5) -> Tensor:
        return self.tensor(name, *self.x_seq.shape, low=low, high=high, dtype=self.case.dtype)


def neuron(draw: Draw) -> Options:
    """What all neurons have."""
    case = draw.case
    options = {
        "width": draw("width", 0.7, 1.5), "decay": draw("decay", 0.4, 0.9), "v_rest": 0.25,
        "v_threshold": draw("v_threshold", 0.8, 1.2), "surrogate": case.surrogate, "analog_prob": case.noise,
        "rng_state": rng_state(device=draw.x_seq.device), "time_dim": draw.time_dim, **FLAGS[case.flags],
    }  # fmt: skip
    options["v_reset"] = draw("v_reset", -0.2, 0.2) if case.reset == "hard" else None
    if case.reset == "amount":
        options["reset_amount"] = draw("reset_amount", 0.6, 1.2)
    if case.asked != "spikes":
        options["v_init"] = draw.state("v_init")
    return options


def plain(draw: Draw, **more: Any) -> Options:
    gained = {"input_gain": (0.8, 1.2), "input_bias": (-0.1, 0.1), "input_mean": (-0.1, 0.1)}
    return {**neuron(draw), **{name: draw(name, *ends) for name, ends in gained.items()}, **more}


def lean(draw: Draw) -> Options:
    """The common case in networks, served by the leanest kernels."""
    case = draw.case
    names = "surrogate", "analog_prob", "rng_state", "time_dim", "detach_reset", "strict_threshold", "surrogate_gain"
    options = {name: value for name, value in neuron(draw).items() if name in (*names, "v_init")}
    width = draw.tensor("width", low=0.7, high=1.5)
    return {
        **options,
        "width": width,
        "decay": 0.6,
        "v_threshold": 0.9,
        "v_reset": 0.1 if case.reset == "hard" else None,
    }


def residual(draw: Draw) -> Options:
    floor = {"v_min": -0.2} if draw.case.asked == "all" else {}
    gain = 1.0 if draw.case.flags == "none" else 0.5
    return plain(draw, residual=draw.sequence("residual"), residual_gain=gain, **floor)


def levels(draw: Draw) -> Options:
    options = {name: value for name, value in plain(draw).items() if name not in ("width", "surrogate")}
    more = {"residual": draw.sequence("residual")} if draw.case.flags == "detached" else {}
    return {**options, "levels": 4 if draw.case.asked == "all" else 7, **more}


def several(draw: Draw) -> Options:
    """Without noise, which decides here about a floor and a limit."""
    more = {0.3: {"v_min": -0.5}, 1.0: {"levels": 3}}.get(draw.case.noise, {})
    return {**plain(draw), "analog_prob": 0.0, "multi_spike": True, **more}


def floor(draw: Draw) -> Options:
    """Under the hard reset it holds between spikes, and after spikes if above v_reset."""
    return plain(draw, v_min=-0.25 if draw.case.flags == "none" else 0.2)


ADAPTATION = {"adapt_decay": (0.5, 0.95), "adapt_potential": (-0.2, 0.4), "adapt_spike": (0.0, 0.5)}


def adaptive(draw: Draw, **more: Any) -> Options:
    options = {**neuron(draw), **{name: draw(name, *ends) for name, ends in ADAPTATION.items()}, **more}
    options.pop("scale_output", None)
    return options | ({"w_init": draw.state("w_init")} if "v_init" in options else {})


def in_the_reset(x_seq: Tensor, **options: Any) -> Any:
    """Adaptive neurons as interop.sinabs has them; no argument of `adaptive_lif` asks for these."""
    return run_adaptive(x_seq, {**LIF_DEFAULTS, **options, "adaptation": IN_RESET})  # type: ignore[typeddict-item]


def integrator(draw: Draw) -> Options:
    case = draw.case
    options = {"decay": draw("decay", 0.3, 0.95), "input_gain": draw("input_gain", -1.5, 1.5)}
    options |= {"v_init": draw.state("v_init")} if case.asked != "spikes" or case.flags == "scaled" else {}
    return {**options, "v_rest": 0.3, "delay": case.flags == "scaled", "time_dim": draw.time_dim}


def normalised(draw: Draw, training: bool, with_residual: bool = False) -> Options:
    channels = draw.standard[2]
    options = {**neuron(draw), "training": training, "input_scale": 1.2 if draw.case.flags == "scaled" else 1.0}
    for name, low, high in (
        ("weight", 0.5, 1.5),
        ("bias", -0.5, 1.0),
        ("running_mean", -0.5, 0.5),
        ("running_var", 0.5, 1.5),
    ):
        value = draw.tensor(name, channels, low=low, high=high)
        options[name] = value.detach() if name.startswith("running") else value
    if with_residual:
        gain = 1.0 if draw.case.flags == "none" else 0.7
        options |= {"residual": draw.sequence("residual"), "residual_gain": gain}
    return options


def recurrent(draw: Draw, to_threshold: bool | None = None) -> Options:
    """In float64, or with multiples of 1/64 and hard spikes: sums of exact products have the same bits in any order."""
    case, count = draw.case, draw.standard[-1]
    exact = case.dtype != torch.float64

    def weight(name: str, *shape: int) -> Tensor:
        value = draw.tensor(name, *shape, low=-1, high=1).detach()
        value = (value * 64).round() / 64 if exact else value / count**0.5
        return value.requires_grad_(draw.only in (None, name))

    options = {
        **neuron(draw),
        "input_gain": 0.5 if case.flags == "scaled" else 1.0,
        "detach_recurrent": case.flags == "detached",
    }
    options["weight"] = weight("weight", *((count,) if case.reset == "amount" else (count, count)))
    options |= {"bias": weight("bias", count)} if case.flags != "none" else {}
    if case.asked != "spikes" or case.flags == "scaled":
        options["syn_decay"] = draw("syn_decay", 0.2, 0.9)
        options["i_init"] = draw.state("i_init")
    if "v_init" in options:
        options["s_init"] = draw.state("s_init").detach().round().requires_grad_(draw.only in (None, "s_init"))
    if to_threshold is not None:
        options |= {name: draw(name, *ends) for name, ends in ADAPTATION.items()}
        options |= {"input_gain": 1.0, "to_threshold": to_threshold}
        options |= {"w_init": draw.state("w_init")} if "v_init" in options else {}
    return options | ({"analog_prob": 0.0} if exact else {})


PLACE = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}
OF_TYPE = ("s_seq", "grad_x_seq", "grad_residual")  # the others are of the type of the arithmetic
STATES = ("v_init", "w_init", "s_init", "i_init")


def is_sum(name: str) -> bool:
    """Whether this is a parameter's gradient, summed in another order."""
    return name.startswith("grad_") and name not in OF_TYPE and name.removeprefix("grad_") not in STATES


def bits(case: Case, name: str) -> float:
    """The same bits for rectangle and triangle, else some ten roundings, and one more on store in half types."""
    if is_sum(name):
        return 1e-12 if case.dtype == torch.float64 else 1e-5
    if case.surrogate in EXACT_SURROGATES:
        return 0.0
    return PLACE[case.dtype if name in OF_TYPE else real_of(case.dtype)]


def integrated(case: Case, name: str) -> float:
    """The sum for decay is over stored potentials, whose roundings scale with the distance from v_rest."""
    if not is_sum(name):
        return 0.0
    place = {torch.float32: 1e-5, torch.float64: 1e-12}
    return 4 * (place | PLACE | place)[case.dtype] if name == "grad_decay" else place[real_of(case.dtype)]


def summed(case: Case, name: str) -> float:
    """Statistics are sums; half types store gain * dh and then dx, and sum what they stored."""
    if name in ("grad_x_seq", "grad_residual") and case.dtype in (torch.float16, torch.bfloat16):
        return 4 * PLACE[case.dtype]
    if name.startswith("grad_") or name.startswith("running_"):
        return 1e-12 if case.dtype == torch.float64 else 1e-5
    return max(1e-13, PLACE[case.dtype if name == "s_seq" else real_of(case.dtype)])


def fed_back(case: Case, name: str) -> float:
    """In float64 spikes are compared, too: no rounding is near a threshold.

    In float32 a gradient of the input has, as all others, sums of the neurons that it feeds, in another order, which
    each step multiplies by the weight again.
    """
    if case.dtype == torch.float64:
        return 1e-10
    return 0.0 if not name.startswith("grad_") else max(1e-5, PLACE[case.dtype]) if name == "grad_x_seq" else 1e-5


def fed_back_and_adapting(case: Case, name: str) -> float:
    """In float32 a parameter's gradient may be a thousandth of the terms that cancel in it, with their roundings."""
    return 1e-3 if is_sum(name) and case.dtype != torch.float64 else fed_back(case, name)


class Feature(NamedTuple):
    """A row of FEATURES."""

    function: Callable[..., Any]
    arguments: Callable[[Draw], Options]  # for a case, x_seq aside
    allowed: Callable[[Case, str], float] = bits  # relative error of an output or a gradient
    instead: Mapping[str, Mapping[Any, Any]] = {}  # values of Case that it lacks, and the ones that replace them
    current: tuple[float, float] = (-1.0, 2.0)  # of x_seq
    outputs: tuple[str, ...] = ("s_seq", "v_last", "v_seq", "h_seq")
    layer: Callable[..., Any] | None = None
    flat: bool = False  # takes [T, B, N] alone
    kept: tuple[int, int] = (1, 0)  # sequences that backward keeps: in the type of x_seq, and of the arithmetic
    smooth: bool = True  # a smooth function where every element is analog
    splits: bool = True  # two parts are the whole

    def adapted(self, case: Case) -> Case:
        return Case(*(self.instead.get(name, {}).get(each, each) for name, each in case._asdict().items()))

    def call(self, case: Case, device: Any, only: str | None = None) -> tuple[Tensor, Options]:
        """x_seq and the other arguments."""
        case = self.adapted(case)
        batch, *sizes = case.sizes
        flat = (batch, int(torch.tensor(sizes).prod()))
        exact = case.dtype == torch.float64 or self.allowed(case, "h_seq") == 0
        draw = Draw(case, flat if self.flat else case.sizes, device, self.current, exact, only)
        return draw.x_seq, self.arguments(draw)

    def names(self, asked: str) -> list[str]:
        """Of the outputs that are asked for."""
        first, *others = self.outputs
        return [first, *(name for name in others if asked == "all" or (asked == "states" and name.endswith("last")))]

    def run(self, x_seq: Tensor, options: Options, names: Iterable[str], backend: str) -> dict[str, Tensor]:
        """Outputs by name; those that this call lacks are left out."""
        wanted = [name for name in ("v_last", "v_seq", "h_seq") if name in self.outputs[1:]]
        last = any(name.endswith("last") for name in names)
        returned = {f"return_{name}": last if name == "v_last" else name in names for name in wanted}
        output = self.function(x_seq, **options, **returned, backend=backend)
        found = {self.outputs[0]: output} if isinstance(output, Tensor) else output._asdict()
        return {name: found[name] for name in names if found[name] is not None}


ALWAYS_SOFT = {"hard": "soft"}
HARD = {"soft": "hard", "amount": "hard"}
# Kernels of single values: no layout of images, no parameter but one or by neuron; the largest weight has 130 rows.
ROWS = {
    "layout": dict.fromkeys(("time last", "channels, time"), "batch first"),
    "shape": {"channel": "neuron", "step": "one", "mixed": "neuron"},
    "sizes": {(2, 6, 20, 20): (33, 13, 2, 5)},
}
MORE_THAN_ONE = {"sizes": {(1, 1, 1, 1): (4, 5, 3, 1)}}  # value a channel
ADAPTIVE = ("s_seq", "v_last", "w_last", "v_seq", "h_seq")
to_threshold = partial(adaptive, to_threshold=True)
in_training, in_evaluation = partial(normalised, training=True), partial(normalised, training=False)
beside_a_residual = partial(normalised, training=True, with_residual=True)
batch_norm = Feature(asgl_cuda.batch_norm_lif, in_training, summed, MORE_THAN_ONE, layer=asgl_cuda.BatchNormLIF)
adaptive_lif = Feature(asgl_cuda.adaptive_lif, adaptive, outputs=ADAPTIVE, layer=asgl_cuda.AdaptiveLIF)
lif = Feature(asgl_cuda.lif, plain, layer=asgl_cuda.LIF)
recurrent_lif = Feature(
    asgl_cuda.recurrent_lif, recurrent, fed_back, ROWS, flat=True, kept=(0, 2), layer=asgl_cuda.RecurrentLIF,
    outputs=("s_seq", "v_last", "s_last", "i_last", "v_seq", "h_seq"),
)  # fmt: skip
recurrent_adaptive = recurrent_lif._replace(
    allowed=fed_back_and_adapting, kept=(0, 3), outputs=(*recurrent_lif.outputs, "w_last")
)

FEATURES = {
    "plain": lif._replace(instead={"reset": HARD}),
    "soft": lif._replace(instead={"reset": ALWAYS_SOFT}),
    "lean": lif._replace(arguments=lean, instead={"asked": {"all": "spikes"}}),
    "residual": lif._replace(arguments=residual, kept=(2, 0)),
    "levels": lif._replace(
        arguments=levels, instead={"reset": ALWAYS_SOFT, "surrogate": dict.fromkeys(SURROGATES, "rectangle")},
        current=(-3.0, 6.0),
    ),
    "several spikes": lif._replace(
        arguments=several, instead={"reset": ALWAYS_SOFT, "surrogate": {"arctan": PERIODIC}}, current=(-3.0, 5.0),
        smooth=False,
    ),
    "floor": lif._replace(arguments=floor),
    "adaptive": adaptive_lif,
    "adaptive to the threshold": adaptive_lif._replace(arguments=to_threshold),
    "adaptive in the reset": adaptive_lif._replace(
        function=in_the_reset, instead={"reset": ALWAYS_SOFT}, layer=None,
    ),
    "integrator": Feature(
        asgl_cuda.leaky_integrator, integrator, integrated, outputs=("v_seq", "v_last"),
        layer=asgl_cuda.LeakyIntegrator, kept=(2, 0),
    ),
    "normalised": batch_norm._replace(splits=False),
    "normalised in evaluation": batch_norm._replace(arguments=in_evaluation),
    "normalised beside a residual": batch_norm._replace(arguments=beside_a_residual, kept=(2, 0), splits=False),
    "recurrent": recurrent_lif,
    "recurrent and adaptive": recurrent_adaptive._replace(arguments=partial(recurrent, to_threshold=False)),
    "recurrent, to the threshold": recurrent_adaptive._replace(arguments=partial(recurrent, to_threshold=True)),
}  # fmt: skip
PARAMETERS = ("width", "decay", "v_threshold", "v_reset", "reset_amount", "input_gain", "input_bias", "input_mean",
              "adapt_decay", "adapt_potential", "adapt_spike")  # fmt: skip
# Their gradients are sums whose terms may cancel; w_init's over the steps, whose thresholds or currents it changes.
SUMMED = *PARAMETERS, "weight", "bias", "syn_decay", "w_init"


def leaves_of(x_seq: Tensor, options: Options) -> dict[str, Tensor]:
    tensors = {"x_seq": x_seq, **{name: each for name, each in options.items() if isinstance(each, Tensor)}}
    return {name: each for name, each in tensors.items() if each.requires_grad}


def random_like(outputs: Iterable[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(each.shape, generator=generator).to(each) for each in outputs]


def error(actual: Tensor, expected: Tensor, size: Tensor | None = None, least: float = 1e-30) -> float:
    """The largest difference as a share of a size, the largest expected value by default; NaN equals NaN."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (actual - expected).abs().nan_to_num(nan=torch.inf))
    if not gap.numel():
        return 0.0
    size = expected.abs().nan_to_num(0, 0).max() if size is None else torch.maximum(size, expected.abs())
    return float((gap / size.clamp(min=least)).max())


def assert_equals_reference(feature: Feature, case: Case, backend: str, device: Any, only: str | None = None) -> None:
    """Outputs, all gradients, and running statistics."""
    case = feature.adapted(case)
    x_seq, options = feature.call(case, device, only)
    leaves = leaves_of(x_seq, options)
    # Expanded parameters show the terms of the reference's gradients, whose roundings remain where the terms cancel.
    terms = (
        {} if feature.flat else {name: each.expand(x_seq.shape) for name, each in leaves.items() if name in PARAMETERS}
    )
    names = feature.names(case.asked)
    running = [
        {name: options[name].clone() for name in ("running_mean", "running_var") if name in options} for _ in "12"
    ]
    everything = feature.run(x_seq, {**options, **terms, **running[0]}, feature.outputs, "reference")
    actual = feature.run(x_seq, {**options, **running[1]}, names, backend)
    expected = {name: everything[name] for name in names if name in everything}
    assert actual.keys() == expected.keys()

    time_dim, keep = options["time_dim"], torch.ones_like(x_seq, dtype=torch.bool)
    if "h_seq" in everything and not feature.flat:  # else nothing is near a threshold
        band = 0.0 if feature.allowed(case, "h_seq") == 0 else THRESHOLD_BAND
        v_threshold = torch.as_tensor(options["v_threshold"], device=x_seq.device).detach()
        near = ((everything["h_seq"].detach() - v_threshold).abs() < band).any(dim=time_dim, keepdim=True)
        keep = (~near).expand_as(x_seq)
        assert keep.float().mean() > 0.9 or x_seq.numel() < 500
    kept = {name: keep.select(time_dim, 0) if name.endswith("last") else keep for name in names}

    def without(value: Tensor, name: str) -> Tensor:
        return torch.where(kept[name], value, torch.zeros_like(value))

    depend = [name for name, each in expected.items() if each.requires_grad]
    grads = [
        without(each, name) for name, each in zip(depend, random_like(expected[name] for name in depend), strict=True)
    ]
    unused = {} if case.asked == "all" and not feature.flat else {"allow_unused": True, "materialize_grads": True}
    found: list[Iterable[Tensor]] = [
        torch.autograd.grad([outputs[name] for name in depend], inputs, grads, **unused)
        for outputs, inputs in ((expected, [*{**leaves, **terms}.values()]), (actual, [*leaves.values()]))
    ]
    errors = {name: error(without(actual[name], name), without(each, name)) for name, each in expected.items()}
    # What parameters' gradients are sums of, which may cancel; terms may have cancelled already.
    if "x_seq" in leaves:
        grad_currents = found[0][0]
    else:
        x_leaf, copies = x_seq.detach().requires_grad_(), {name: each.clone() for name, each in running[0].items()}
        again = feature.run(x_leaf, {**options, **copies}, feature.outputs, "reference")
        (grad_currents,) = torch.autograd.grad([again[name] for name in depend], x_leaf, grads, **unused)
    size_of_currents = float(grad_currents.double().norm())
    # The reference's slope of a sigmoid, F (1 - F) / width, has the roundings of F, which are those of exp and of a
    # division, together up to one eps, however small 1 - F is.
    least_of_slopes = 1e-30
    if case.surrogate == "sigmoid" and case.dtype in (torch.float32, torch.float64) and grads:
        largest = max(float(each.abs().max()) for each in grads if each.numel())
        widths = torch.as_tensor(options.get("width", 1.0)).detach()
        narrowest = float(widths.min()) if widths.numel() else 1.0
        least_of_slopes = torch.finfo(case.dtype).eps / PLACE[case.dtype] * largest / narrowest
    for name, theirs, ours in zip(leaves, *found, strict=True):
        size, least = None, least_of_slopes
        if name in SUMMED:
            least = max(size_of_currents / max(ours.numel(), 1) ** 0.5, least)
        if name in terms:
            size = theirs.double().square().sum_to_size(ours.shape).sqrt()
            theirs = theirs.double().sum_to_size(ours.shape)
        assert (ours.shape, ours.dtype) == (leaves[name].shape, leaves[name].dtype)
        errors[f"grad_{name}"] = error(ours, theirs, size, least)
    errors |= {name: error(running[1][name], each) for name, each in running[0].items()}
    for name, each in errors.items():
        assert each <= feature.allowed(case, name), f"{name}: {each}, all: {errors}"
    for name, each in actual.items():
        assert each.dtype == (x_seq.dtype if name == feature.outputs[0] else real_of(x_seq.dtype)), name
