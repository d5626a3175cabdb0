"""Draws the method in one figure, from runs of the library: `python -m docs.figures.method`.

Top: one neuron of a call of `asgl_cuda.lif`, with potential, surrogate window and output. Bottom: the smooth value and
its slope at the first and the last width of a training on digits, and the learned widths. method.png has them side by
side, method_narrow.png, for phones, below each other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import asgl_cuda
from asgl_cuda.reference.surrogates import SURROGATES
from benchmarks import palette
from benchmarks.learning.demo import BATCH_SIZE, load_data, scores_of, spiking_mlp, widths_of
from benchmarks.learning.optimizers import SGD, optimizer_of

STEPS, THRESHOLD, WIDTH, DECAY, ANALOG_PROB = 26, 1.0, 0.9, 0.7, 0.3
SURROGATE = "rectangle"
HIDDEN, FIRST_WIDTH, EPOCHS = (256, 256, 256), 5.0, 25


class Neuron(NamedTuple):
    """One neuron's values, `[T]` each: potential before and after reset, output, analog mask."""

    h_seq: Tensor
    v_seq: Tensor
    s_seq: Tensor
    analog: Tensor


def one_neuron(seed: int = 253) -> Neuron:
    x_seq = 0.45 + 0.25 * torch.randn(STEPS, 1, generator=torch.Generator().manual_seed(seed))
    rng_state = torch.tensor([seed, 0])
    options: dict[str, Any] = {"decay": DECAY, "width": WIDTH, "v_threshold": THRESHOLD, "surrogate": SURROGATE}
    output = asgl_cuda.lif(
        x_seq, analog_prob=ANALOG_PROB, rng_state=rng_state, return_h_seq=True, return_v_seq=True, **options
    )
    assert isinstance(output, asgl_cuda.LIFOutput)
    assert output.h_seq is not None
    assert output.v_seq is not None
    mask = asgl_cuda.analog_mask(x_seq, ANALOG_PROB, rng_state)
    return Neuron(*(each[:, 0] for each in (output.h_seq, output.v_seq, output.s_seq, mask)))


def trained_widths(epochs: int, seed: int = 0) -> list[list[float]]:
    """The widths by layer, at the start and after each epoch of a training on digits."""
    train_images, _, train_labels, _ = load_data(seed)
    torch.manual_seed(seed)
    model = spiking_mlp(HIDDEN, width=FIRST_WIDTH, surrogate=SURROGATE)
    optimizer = optimizer_of(model, SGD)
    steps = epochs * -(-len(train_images) // BATCH_SIZE)
    steppers: list[Any] = [optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]
    widths = [widths_of(model)]
    for _ in range(epochs):
        for batch in torch.randperm(len(train_images)).split(BATCH_SIZE):
            model.zero_grad()
            nn.functional.cross_entropy(scores_of(model, train_images[batch]), train_labels[batch]).backward()
            for stepper in steppers:
                stepper.step()
        widths.append(widths_of(model))
    return widths


def draw_potential(panel: Any, neuron: Neuron, margin: float) -> None:
    """The potential over time, the threshold, and the window in which a gradient passes; text in the margin."""
    low, high = THRESHOLD - WIDTH / 2, THRESHOLD + WIDTH / 2
    panel.fill_between([-1, STEPS], low, high, facecolor=palette.SKY, alpha=0.28, linewidth=0)
    panel.plot([-1, STEPS], [THRESHOLD, THRESHOLD], color=palette.BLACK, linewidth=1, linestyle="--")
    before = 0.0
    for t, (h, v) in enumerate(zip(neuron.h_seq.tolist(), neuron.v_seq.tolist(), strict=True)):
        panel.plot([t - 1, t], [before, h], color=palette.BLACK, linewidth=1.4)
        if v != h:
            panel.plot([t, t], [h, v], color=palette.GREY, linewidth=1.2, linestyle=(0, (1, 1)))
        before = v
    emitted = zip(neuron.h_seq.tolist(), neuron.s_seq.tolist(), neuron.analog.tolist(), strict=True)
    for t, (h, s, analog) in enumerate(emitted):
        if analog:
            panel.plot(t, h, "D", color=palette.VERMILION, markerfacecolor="white", markersize=7, zorder=3)
        elif s == 1:
            panel.plot(t, h, "o", color=palette.BLACK, markersize=6, zorder=3)
    panel.set(xlim=(-1, STEPS + margin), ylim=(-0.15, 1.85), ylabel="potential", yticks=(0, THRESHOLD))
    panel.set_yticklabels(["0", "threshold"])
    panel.set_title(f"A neuron, analog_prob = {ANALOG_PROB}; dotted: resets", loc="left")
    arrow = {"arrowstyle": "<->", "color": palette.BLUE, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5}
    panel.annotate("", (STEPS + 0.4, low), (STEPS + 0.4, high), arrowprops=arrow)
    text = "window of the\nsurrogate: here\na gradient passes.\nIts width is learned"
    panel.text(STEPS + 0.8, THRESHOLD, text, va="center", fontsize=9.5, color=palette.BLUE)


def draw_output(panel: Any, neuron: Neuron, margin: float) -> None:
    """The output: solid bars for spikes, hatched bars with diamonds for smooth values."""
    for t, (s, analog) in enumerate(zip(neuron.s_seq.tolist(), neuron.analog.tolist(), strict=True)):
        if analog:
            panel.bar(t, s, 0.62, facecolor="white", edgecolor=palette.VERMILION, hatch="////", linewidth=1.2)
            panel.plot(
                t, s, "D", color=palette.VERMILION, markerfacecolor="white", markersize=6, zorder=3, clip_on=False
            )
        elif s:
            panel.bar(t, s, 0.62, color=palette.BLACK)
    panel.set(xlim=(-1, STEPS + margin), ylim=(0, 1.25), ylabel="output", yticks=(0, 1), xlabel="time step")
    panel.set_xticks(range(0, STEPS, 5))
    handles = [
        mpl.patches.Patch(facecolor=palette.BLACK, label="hard: spike,\nor none"),
        mpl.patches.Patch(facecolor="white", edgecolor=palette.VERMILION, hatch="////", label="analog: H(u)"),
    ]
    right = (STEPS + 0.4) / (STEPS + 1 + margin)
    panel.legend(handles=handles, loc="center left", bbox_to_anchor=(right, 0.5), fontsize=9.5, borderaxespad=0.2)


def draw_surrogate(value: Any, slope: Any, widths: list[list[float]]) -> None:
    """The hard spike, and H and its slope at the first layer's width before and after training."""
    u = torch.linspace(-3.2, 3.2, 1281)
    value.plot(u, (u >= 0).float(), color=palette.BLACK, linewidth=1, linestyle="--", label="hard spike")
    for width, color, line, when in (
        (widths[0][0], palette.ORANGE, "-.", "at the start"),
        (widths[-1][0], palette.BLUE, "-", "at the end"),
    ):
        smooth = SURROGATES[SURROGATE].cumulative(u / width)
        value.plot(u, smooth, color=color, linestyle=line, linewidth=2, label=f"width {width:.1f}, {when}")
        slope.fill_between(u[1:], smooth.diff() / (u[1] - u[0]), color=color, alpha=0.15, linewidth=0)
        slope.plot(u[1:], smooth.diff() / (u[1] - u[0]), color=color, linestyle=line, linewidth=2)
    value.set(ylabel="smooth\nvalue H(u)", yticks=(0, 1), xlim=(-3.2, 3.2), ylim=(-0.06, 1.12))
    value.tick_params(labelbottom=False)
    value.legend(loc="lower right", fontsize=9, handlelength=2.6, borderaxespad=0.1)
    value.set_title("Smooth value and slope, layer 1", loc="left")
    slope.set(ylabel="slope H'(u)", yticks=(0,), xlim=(-3.2, 3.2), xlabel="u = potential - threshold")
    slope.set_ylim(bottom=0)


def draw_widths(panel: Any, widths: list[list[float]]) -> None:
    """The width of each layer over the epochs."""
    styles = zip(("-", "--", "-."), palette.MARKERS, (palette.BLUE, palette.GREEN, palette.PURPLE), strict=False)
    for layer, (line, marker, color) in enumerate(styles):
        values = [each[layer] for each in widths]
        panel.plot(
            values,
            line,
            color=color,
            marker=marker,
            markevery=5,
            markersize=5,
            clip_on=False,
            label=f"layer {layer + 1}",
        )
    panel.set(xlabel="epoch of a training on digits", ylabel="learned width", ylim=(0, 1.1 * FIRST_WIDTH))
    panel.set_xlim(0, len(widths) - 1)
    panel.legend(loc="upper right")
    panel.set_title("Training shrinks windows that begin too wide", loc="left")


def draw(neuron: Neuron, widths: list[list[float]], file: Path, narrow: bool = False) -> None:
    with mpl.rc_context({**palette.STYLE, "axes.grid": False, "axes.titlesize": 10.5, "axes.titleweight": "bold"}):
        figure = Figure(figsize=(4.8, 8.6) if narrow else (9, 6.3))
        above, below = figure.subfigures(2, 1, height_ratios=(3.3, 5.3) if narrow else (3.3, 2.7))
        potential, output = above.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
        first, second = below.subfigures(*((2, 1) if narrow else (1, 2)))
        margin = 12.5 if narrow else 5.6  # steps, for the text beside the last
        draw_potential(potential, neuron, margin)
        draw_output(output, neuron, margin)
        draw_surrogate(*first.subplots(2, 1, sharex=True, height_ratios=(1.6, 1)), widths)
        draw_widths(second.subplots(), widths)
        figure.savefig(file, dpi=150 if narrow else 200)


def main() -> int:
    """Runs the neuron and the training, and draws."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.method", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    neuron, widths = one_neuron(), trained_widths(arguments.epochs)
    draw(neuron, widths, arguments.folder / "method.png")
    draw(neuron, widths, arguments.folder / "method_narrow.png", narrow=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
